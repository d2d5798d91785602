"""Who takes part: naive PyTorch, this library on each path, and other libraries where they are installed.

A job is a loss with full gradients, with a frozen head, or log-probabilities without gradient. Each entry makes a
callable that does a case's job once. Other libraries are called by their documented interface with the defaults of
their own, and no option that would change the result; where an option decides the time, with a better choice, too.

Dimensions: N tokens, B responses of length T (N = B · T), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb import reference
from rgpb.bench import cases
from rgpb.bench.cases import LOG_PROB, NAIVE, Batch, Result, Shape
from rgpb.engine.plan import Plan
from rgpb.fused import call_plan, fused_loss, make_layout, tokens_of_units
from rgpb.head import LMHead
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES

from .journal import installed

# The library's implementations: (impl, engine); an engine of None isn't passed on.
KERNELS = {
    "cpp": ("cpp", None),
    "torch": ("torch", None),
    "triton chunked": ("triton", "chunked"),
    "triton tiled": ("triton", "tiled"),
}
PATHS = {"full": ("single", "two_pass"), "frozen": ("frozen",), "forward": ("forward",)}
Run = Callable[[], Result]


class Job(NamedTuple):
    """What is computed: `loss` is a name or `LOG_PROB`, `kind` "full", "frozen" or "forward"."""

    loss: str
    kind: str


# Those of one loss stand together: they share the answer in float64.
JOBS = (
    *(Job(loss, kind) for loss in ("bnf", "dpo") for kind in ("full", "frozen")),
    Job("mle", "full"),
    Job(LOG_PROB, "forward"),
)


class Case(NamedTuple):
    """The inputs of a head: as in `rgpb.bench.cases`, and a soft-cap."""

    name: str
    shape: Shape
    softcap: float | None
    batch: Batch

    def inputs(self, kind: str) -> tuple[Tensor, Tensor]:
        """(hidden, weight), detached as far as the kind of job asks for no gradient."""
        hidden, weight = self.batch.hidden, self.batch.weight
        return (
            hidden.detach() if kind == "forward" else hidden,
            weight if kind == "full" else weight.detach(),
        )


class Entry(NamedTuple):
    """A contestant of one job.

    Attributes:
        impl: "fused" for this library, "naive", or whose it is.
        path: of `rgpb.bench.cases.PATHS`; "full", "frozen" or "forward" for the others.
        units: products of 2 · N · V · H flops; None for what the plan says.
        make: the callable that does the job, and this library's plan.
        kernels, workspace, note: what else tells it from its like.
        module: what has to be installed.
        without_ref: scored against π_ref = 1, which it can't be given otherwise.
    """

    impl: str
    path: str
    units: int | None
    make: Callable[[Case, Job], tuple[Run, Plan | None]]
    kernels: str | None = None
    workspace: int | None = None
    note: str | None = None
    module: str | None = None
    without_ref: bool = False


def make_case(name: str, shape: Shape, softcap: float | None, dtype: torch.dtype, device: str) -> Case:
    """The batch of `rgpb bench`; with a soft-cap its log-probabilities, exact and the reference's, are those of it.

    Raises:
        ValueError: an odd N.
    """
    batch = cases.make_batch(shape, dtype, device)
    if softcap is not None:
        hidden, target = batch.hidden.detach().flatten(0, 1), batch.target.flatten()
        head = LMHead(batch.weight.detach().double(), softcap=softcap)
        rows = zip(hidden.split(cases.EXACT_ROWS), target.split(cases.EXACT_ROWS))
        parts = [_at(reference.logits(x.double(), head).log_softmax(-1), y) for x, y in rows]
        logp = torch.cat(parts).view(batch.target.shape)
        ref = (logp + (batch.ref - batch.logp)).clamp(max=-1e-3).float()
        batch = batch._replace(logp=logp, ref=ref)
    return Case(name, shape, softcap, batch)


def exact(loss: str, hidden: Tensor, head: LMHead, target: Tensor, ref: Tensor | None, label: Tensor | None) -> Result:
    """The oracle's loss and gradients of hidden, weight and bias in float64, one response, pair or group at a time."""
    formula, rewards = reference.LOSSES[loss], rewards_of(loss, target)
    x = hidden.detach().double()
    leaves = [p.detach().double().requires_grad_() for p in (head.weight, head.bias) if p is not None]
    exact_head = LMHead(leaves[0], leaves[1] if head.bias is not None else None, head.softcap, head.scale)
    value, made = x.new_zeros(()), [torch.zeros_like(p) for p in (x, *leaves)]
    units = len(x) if formula.unit == "response" else len(x) // 2
    for unit in range(units):
        places = {"pair": [unit, unit + units], "group": [2 * unit, 2 * unit + 1]}.get(formula.unit, [unit])
        of_group: dict[str, Any] = {} if rewards is None else {"rewards": rewards[unit : unit + 1], "group_size": 2}
        part = x[places].requires_grad_()
        one = formula(
            part, exact_head, target[places],
            ref=ref[places] if formula.needs_ref and ref is not None else None,
            label=label[places] if formula.needs_label and label is not None else None, **of_group,
        ) / units  # fmt: skip
        gradients = torch.autograd.grad(one, [part, *leaves])
        value += one.detach()
        made[0][places] = gradients[0]
        for total, gradient in zip(made[1:], gradients[1:]):
            total += gradient
    return Result(value, tuple(made))


def rewards_of(loss: str, target: Tensor) -> Tensor | None:
    """Rewards of groups of two, [B / 2, 2], where the loss needs them."""
    if not OBJECTIVES[loss].rewards:
        return None
    return torch.linspace(0, 3, len(target), device=target.device).view(-1, 2)


def graded(value: Tensor, *inputs: Tensor) -> Result:
    """The value and the gradients of those inputs that ask for one."""
    return Result(value.detach(), torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))


def _at(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(-1, target[..., None]).squeeze(-1)


def loss_of(logp: Tensor, loss: str, batch: Batch) -> Tensor:
    """A loss of the targets' log-probabilities: the naive form with a vocabulary of one; for `LOG_PROB` just these."""
    logp = logp.view(batch.target.shape)
    if loss == LOG_PROB:
        return logp
    return NAIVE[loss](logp[..., None], batch._replace(target=torch.zeros_like(batch.target)))


# -- naive PyTorch -----------------------------------------------------------------------------------------------------


def log_probs(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """[..., V], float32, from logits in the type of the inputs, soft-capped in that type, as a model returns them."""
    if softcap is None:
        return cases.log_probs(hidden, weight)
    z = softcap * torch.tanh(F.linear(hidden, weight) / softcap)
    return z.float().log_softmax(-1)


def naive(case: Case, job: Job, compiled: bool = False) -> tuple[Run, None]:
    """All logits, `log_softmax`, `gather`, autograd; the papers' listings. `compiled`: by `torch.compile`."""
    hidden, weight = case.inputs(job.kind)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = log_probs(hidden, weight, case.softcap)
        return _at(log_p, case.batch.target) if job.loss == LOG_PROB else NAIVE[job.loss](log_p, case.batch)

    called = value
    if compiled:
        torch._dynamo.reset()  # what other cases compiled isn't looked up, and counts towards no limit
        called = torch.compile(value, dynamic=False)
    return partial(_run, called, job, hidden, weight), None


def _run(value: Callable[[Tensor, Tensor], Tensor], job: Job, hidden: Tensor, weight: Tensor) -> Result:
    if job.kind == "forward":
        with torch.no_grad():
            return Result(value(hidden, weight), ())
    return graded(value(hidden, weight), hidden, weight)


def cross_entropy(case: Case, job: Job, raised: bool) -> tuple[Run, None]:
    """`F.cross_entropy` of all logits, in their own type or raised to float32."""
    hidden, weight = case.inputs(job.kind)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(hidden.flatten(0, 1), weight)
        z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
        return F.cross_entropy(z.float() if raised else z, case.batch.target.flatten())

    return partial(_run, value, job, hidden, weight), None


# -- this library ------------------------------------------------------------------------------------------------------


def kernels_for(device: str) -> tuple[str, ...]:
    """Those of `KERNELS` that are made for the device; whether they are there shows when they are called."""
    other = "triton" if device == "cpu" else "cpp"
    return tuple(name for name, (impl, _) in KERNELS.items() if impl != other)


def keywords(kernels: str) -> dict[str, Any]:
    """`impl` and, where it has one, `engine`."""
    impl, engine = KERNELS[kernels]
    return {"impl": impl} if engine is None else {"impl": impl, "engine": engine}


def plan_of(
    hidden: Tensor, head: LMHead, target: Tensor, loss: str, reduction: str, workspace: int, how: dict[str, Any]
) -> Plan:  # fmt: skip
    """What the library will do with these arguments; groups are of two, as `rewards_of` has them."""
    spec = OBJECTIVES["mle" if loss == LOG_PROB else loss]
    unit_tokens = tokens_of_units(spec, make_layout(target, None, -100), 2)
    return call_plan(hidden, head, spec, reduction, workspace, {}, unit_tokens=unit_tokens, **how)


def ours(case: Case, job: Job, path: str, kernels: str, workspace: int) -> tuple[Run, Plan]:
    """The library, called so that it takes `path` where it can.

    Raises:
        ValueError: it refuses: no such implementation here, or a `workspace` too small for one row.
    """
    hidden, weight = case.inputs(job.kind)
    head, batch, how = LMHead(weight, softcap=case.softcap), case.batch, keywords(kernels)
    reduction = "none" if path == "two_pass" else "mean"
    plan = plan_of(hidden, head, batch.target, job.loss, reduction, workspace, how)

    def run() -> Result:
        if job.loss == LOG_PROB:
            with torch.no_grad():
                return Result(linear_logprob(hidden, head, batch.target, workspace=workspace, **how).logp, ())
        spec = OBJECTIVES[job.loss]
        value = fused_loss(
            hidden, head, batch.target, objective=job.loss, label=batch.label if spec.label else None,
            ref=None if spec.ref is None else batch.ref, reduction=reduction, workspace=workspace, **how,
        )  # fmt: skip
        return graded(value.mean(), hidden, weight)

    return run, plan


# -- other libraries ---------------------------------------------------------------------------------------------------


def _no_softcap(case: Case, whose: str) -> None:
    if case.softcap is not None:
        raise ValueError(f"{whose} has no soft-cap")


def torch_linear_cross_entropy(case: Case, job: Job, options: dict[str, Any] | None) -> tuple[Run, None]:
    """`F.linear_cross_entropy`, reduced for `mle`, else a value per token; `options` of None is its unchunked form."""
    _no_softcap(case, "F.linear_cross_entropy")
    hidden, weight = case.inputs(job.kind)
    if options is not None and not installed("torch.nn.LinearCrossEntropyOptions"):
        raise ValueError(f"F.linear_cross_entropy of torch {torch.__version__} has no options")
    more: dict[str, Any] = {} if options is None else {"options": torch.nn.LinearCrossEntropyOptions(**options)}
    more["reduction"] = "mean" if job.loss == "mle" else "none"

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        made = F.linear_cross_entropy(hidden.flatten(0, 1), weight, case.batch.target.flatten(), **more)
        return made if job.loss == "mle" else loss_of(-made, job.loss, case.batch)

    return partial(_run, value, job, hidden, weight), None


def liger_cross_entropy(case: Case, job: Job, **options: Any) -> tuple[Run, None]:
    """`LigerFusedLinearCrossEntropyLoss`."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    hidden, weight = case.inputs(job.kind)
    if case.softcap is not None:
        options["softcap"] = case.softcap
    if job.loss == LOG_PROB:
        options["reduction"] = "none"
    module = LigerFusedLinearCrossEntropyLoss(**options)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        made = module(weight, hidden.flatten(0, 1), case.batch.target.flatten())
        return made if job.loss == "mle" else loss_of(-made, job.loss, case.batch)

    return partial(_run, value, job, hidden, weight), None


def liger_dpo(case: Case, job: Job, **options: Any) -> tuple[Run, None]:
    """`LigerFusedLinearDPOLoss` without a reference model: it takes no precomputed scores."""
    _no_softcap(case, "LigerFusedLinearDPOLoss")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight = case.inputs(job.kind)
    module = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, **options)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return module(weight, hidden, case.batch.target.clone())[0]  # it marks its target as dynamic for compilers

    return partial(_run, value, job, hidden, weight), None


def cut_cross_entropy(case: Case, job: Job, **options: Any) -> tuple[Run, None]:
    """`cut_cross_entropy.linear_cross_entropy`: reduced for `mle`, else one value per token and autograd from there."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = case.inputs(job.kind)
    if case.softcap is not None:
        options["softcap"] = case.softcap
    options["reduction"] = "mean" if job.loss == "mle" else "none"

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        made = linear_cross_entropy(hidden, weight, case.batch.target, **options)
        return made if job.loss == "mle" else loss_of(-made, job.loss, case.batch)

    return partial(_run, value, job, hidden, weight), None


def trl_head(case: Case, job: Job, chunk_size: int | None = None) -> tuple[Run, None]:
    """What `trl.trainer.utils.add_fused_lm_head` gives a model: log-probabilities per token, and autograd from there.

    Written against TRL 1.16; `trl.kernels` isn't a public interface. A tile has `chunk_size` words; None for TRL's own.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight = case.inputs(job.kind)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, case.batch.target.flatten(), 1.0,
            chunk_size or _CHUNKED_LOGPROB_CHUNK_SIZE, case.softcap, 1.0, ("log_probs",),
        )[0]  # fmt: skip
        return loss_of(logp, job.loss, case.batch)

    return partial(_run, value, job, hidden, weight), None


def quack(case: Case, job: Job) -> tuple[Run, None]:
    """`quack.linear_cross_entropy.chunked_linear_cross_entropy`."""
    _no_softcap(case, "quack's linear cross-entropy")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = case.inputs(job.kind)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, case.batch.target.flatten())

    return partial(_run, value, job, hidden, weight), None


# -- the line-up -------------------------------------------------------------------------------------------------------

# The chunking options of F.linear_cross_entropy by their names, for each kind of device. In float32 on a CPU "auto" is
# "compact", "balanced" does what "accurate" does, and the chunks that it takes have a few dozen rows.
LCE_OPTIONS: dict[str, dict[str, dict[str, Any] | None]] = {
    "cuda": {
        "unchunked": None,
        "options()": {},
        **{f"acc_policy={policy}": {"acc_policy": policy} for policy in ("accurate", "balanced", "compact")},
    },
    "cpu": {
        "unchunked": None,
        "options()": {},
        "aspect_ratio": {"chunking_method": "aspect_ratio"},
        "batch_chunk_size=256": {"batch_chunk_size": 256},
        "batch_chunk_size=256, accurate": {"batch_chunk_size": 256, "acc_policy": "accurate"},
        "batch_chunk_size=1024": {"batch_chunk_size": 1024},
    },
}
# Those that are also called for a value per token, with a loss on top.
LCE_PER_TOKEN = ("unchunked", "options()", "batch_chunk_size=256")


def entries(job: Job, workspaces: tuple[int, ...], device: str, dtype: str) -> list[Entry]:
    """Everybody who does this job, naive first: others are compared with it."""
    kind, units = job.kind, {"forward": 1, "frozen": 2}.get(job.kind, 3)
    found = [Entry("naive", kind, units, naive)]
    for path in PATHS[kind]:
        for kernels in kernels_for(device):
            for workspace in workspaces:
                make = partial(ours, path=path, kernels=kernels, workspace=workspace)
                found.append(Entry("fused", path, None, make, kernels, workspace))
    found.append(Entry("compiled", kind, units, partial(naive, compiled=True)))
    return [*found, *others(job, units, device, dtype)]


def others(job: Job, units: int, device: str, dtype: str) -> Iterator[Entry]:
    """Other libraries; `units` is for those who keep what the backward needs."""
    loss, kind = job
    again = units + (kind != "forward")  # for those who form the logits again in the backward
    cuda = device == "cuda"

    def entry(impl: str, make: Callable[..., tuple[Run, None]], units: int, module: str | None, **more: Any) -> Entry:
        return Entry(impl, kind, units, make, module=module, **more)

    if loss == "bnf":
        return
    if loss == "mle":
        for raised in (True, False) if dtype != "fp32" else (True,):
            note = "float32 logits" if raised else "16-bit logits"
            yield entry("F.cross_entropy", partial(cross_entropy, raised=raised), units, None, note=note)
    for note, options in LCE_OPTIONS[device].items():
        if loss == "mle" or note in LCE_PER_TOKEN:
            make_lce = partial(torch_linear_cross_entropy, options=options)
            its_units = units if loss == "mle" or options is None else again
            name = "torch.nn.functional.linear_cross_entropy"
            yield entry("F.linear_cross_entropy", make_lce, its_units, name, note=note)
    if loss == "mle" and cuda:
        yield entry("quack", quack, units, "quack")
    if loss != "dpo":
        yield entry("Liger", liger_cross_entropy, units, "liger_kernel")
    if loss == "mle" and cuda:
        make_liger = partial(liger_cross_entropy, accum_dtype=torch.float32)
        yield entry("Liger", make_liger, units, "liger_kernel", note="accum_dtype=float32")
    if loss == "dpo":
        for compiled in (True, False):
            for size in (1,) if cuda else (1, 4):  # pairs of a chunk
                note = f"compiled={compiled}, " + (f"chunk_size={size}, " if size != 1 else "") + "π_ref = 1"
                make_dpo = partial(liger_dpo, compiled=compiled, chunk_size=size)
                yield entry("Liger", make_dpo, units, "liger_kernel", note=note, without_ref=True)
    if cuda:
        yield entry("CCE", cut_cross_entropy, again, "cut_cross_entropy")
        if kind != "forward":
            make_cce = partial(cut_cross_entropy, filter_eps=None)
            yield entry("CCE", make_cce, again, "cut_cross_entropy", note="filter_eps=None")
    else:  # the one of its implementations that isn't for a GPU; it keeps all logits
        make_cce = partial(cut_cross_entropy, impl="torch_compile")
        yield entry("CCE", make_cce, units, "cut_cross_entropy", note="impl=torch_compile")
    yield entry("TRL", trl_head, again, "trl")
    if not cuda:  # tiles small enough for a cache
        yield entry("TRL", partial(trl_head, chunk_size=2048), again, "trl", note="chunk_size=2048")


def absent(entry: Entry) -> str | None:
    """The module that this entry lacks."""
    return None if entry.module is None or installed(entry.module) else entry.module
