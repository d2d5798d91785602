"""Who is compared: a batch, each loss as naive PyTorch and as this library, the bare products, the exact answer.

Naive is the form of the papers' listings: all logits, `log_softmax`, `gather`, autograd. Its signs are those of the
papers' equations, and its logits are raised to float32. No position is masked, so nobody pays for padding.

Who passed the check against float64 is weighed, then timed in the same rounds as the bare products.

Dimensions: N tokens, B responses of length T (N = B · T), H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb import reference
from rgpb.bench.measure import ABSENT, Result, Times, explain, installed, interleaved, peak_memory, release
from rgpb.bench.tables import Row
from rgpb.engine.plan import Plan
from rgpb.engine.workspace import Workspace, settled
from rgpb.fused import fused_loss
from rgpb.head import LMHead
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES
from rgpb.validation import Checks, How, make_layout, plan_call, tokens_of_units

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATHS = ("single", "two_pass", "frozen", "forward")
LOG_PROB = "log-prob"  # what a forward-only contestant computes in place of a loss
SCORES = "scores"  # the same with a gradient of its own for each token: a weighted mean, of `weighed`

# What a contestant may be off float64 to be timed at all: loss or log-probability, gradient relative to its norm.
TOLERANCE = {
    ("fused", torch.float32): (1e-4, 1e-4),
    ("fused", torch.bfloat16): (1e-4, 1e-2),  # gradients are rounded to 8 bits, scores aren't
    ("naive", torch.float32): (1e-4, 1e-4),
    ("naive", torch.bfloat16): (1e-1, 1e-1),  # logits are rounded to 8 bits
}
LONGEST_RESPONSE = 128
EXACT_ROWS = 256
# Rows of a bare product. On a GPU dX of 512 rows has too few tiles to fill it: that would be no floor.
FLOOR_ROWS = {"cpu": 512, "cuda": 4096}
FLOORS = (1, 2, 3, 4)  # units that `Floor` has
Run = Callable[[], Result]


class Shape(NamedTuple):
    """Sizes of a case: N, H, V."""

    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Job(NamedTuple):
    """A loss, `LOG_PROB` or `SCORES`; and the gradients: "full", "frozen" (the hidden states') or "forward" (none)."""

    loss: str
    kind: str


class Batch(NamedTuple):
    """Inputs of a case, the same for all contestants.

    Attributes:
        hidden, weight: [B, T, H] and [V, H], leaves that require a gradient.
        target: int64 [B, T].
        label: float32 [B], ±1.
        ref: float32 [B, T], log π_ref of the targets: the policy's own, perturbed; BNF's ratio is capped for some.
        rewards: float64 [G, K] of groups of four, or two, responses.
        logp: float64 [B, T], the exact log-probabilities of the targets.
        softcap: of the logits.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    label: Tensor
    ref: Tensor
    rewards: Tensor
    logp: Tensor
    softcap: float | None = None

    def inputs(self, kind: str) -> tuple[Tensor, Tensor]:
        """(hidden, weight), detached as far as the kind of job asks for no gradient."""
        hidden = self.hidden.detach() if kind == "forward" else self.hidden
        return hidden, self.weight if kind == "full" else self.weight.detach()

    def to(self, device: torch.device | str) -> Batch:
        """The same leaves elsewhere."""
        moved: list[Any] = [x.detach().to(device).requires_grad_(x.requires_grad) for x in self if torch.is_tensor(x)]
        return Batch(*moved)._replace(softcap=self.softcap)


def make_batch(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, softcap: float | None = None) -> Batch:
    """Random states with logits of standard deviation 2, in an even number of responses of at most 128 tokens.

    Raises:
        ValueError: an odd N.
    """
    tokens, width, vocab = shape
    if tokens % 2:
        raise ValueError(f"shape: expected an even number of tokens, for pairs of responses, got N={tokens}")
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    hidden = normal(tokens // length_of(tokens), length_of(tokens), width).to(dtype)
    weight = normal(vocab, width).mul_(2 / width**0.5).to(dtype)
    target = torch.randint(vocab, hidden.shape[:2], generator=random, device=device)
    return finished(hidden, weight, target, random, softcap)


def length_of(tokens: int) -> int:
    """T of so many tokens: the longest of at most `LONGEST_RESPONSE` that makes an even number of responses."""
    return max(t for t in range(1, LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)


def finished(
    hidden: Tensor, weight: Tensor, target: Tensor, random: torch.Generator, softcap: float | None = None
) -> Batch:  # fmt: skip
    """The batch of such states, head and targets: labels alternate, the reference is the policy's own, perturbed."""
    head = LMHead(weight.double(), softcap=softcap)
    rows = zip(hidden.flatten(0, 1).split(EXACT_ROWS), target.flatten().split(EXACT_ROWS))
    logp = torch.cat([_at(reference.logits(x.double(), head).log_softmax(-1), y) for x, y in rows]).view(target.shape)
    noise = torch.randn(target.shape, generator=random, device=target.device)
    ref = (logp + 0.3 * noise).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=target.device) % 2)
    rewards = torch.linspace(0, 7, len(target), dtype=torch.float64, device=target.device).sin()
    rewards = rewards.view(-1, 4 if len(target) % 4 == 0 else 2)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, rewards, logp, softcap)


# -- naive PyTorch -----------------------------------------------------------------------------------------------------


def naive_bnf(log_p: Tensor, batch: Batch) -> Tensor:
    """BNF Eq. 4 and 6 (ICLR 2025). log_p [B, T, V]."""
    target_logp = _at(log_p, batch.target)
    p = target_logp.detach().exp()
    f_target = (target_logp.detach() - batch.ref).exp().clamp(max=1)
    f_others = (1 - f_target) / (1 - p)  # times p_k, for every other token k
    others = (log_p.detach().exp() * log_p).sum(-1) - p * target_logp
    return -(batch.label * (f_target * target_logp + f_others * others).mean(-1)).mean()


def naive_dpo(log_p: Tensor, batch: Batch) -> Tensor:
    """Rafailov et al. 2023 with β = 0.1; responses stacked [chosen; rejected]. log_p [B, T, V]."""
    chosen, rejected = (_at(log_p, batch.target) - batch.ref).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def naive_mle(log_p: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood per token, averaged over the responses. log_p [B, T, V]."""
    return -_at(log_p, batch.target).mean(-1).mean()


def naive_swepo(log_p: Tensor, batch: Batch) -> Tensor:
    """SWEPO Eq. 9–11 with β = 0.1, α = 1, p = 2; the responses of a group are consecutive. log_p [B, T, V]."""
    deviation = batch.rewards - batch.rewards.mean(1, keepdim=True)
    score = 0.1 * (_at(log_p, batch.target) - batch.ref).sum(-1).view_as(deviation) + deviation**2
    positive = score.masked_fill(deviation <= 0, -torch.inf)
    return (score.logsumexp(1) - positive.logsumexp(1)).mean()


NAIVE: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "bnf": naive_bnf,
    "dpo": naive_dpo,
    "swepo": naive_swepo,
    "mle": naive_mle,
}


def _at(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(-1, target[..., None]).squeeze(-1)


def log_probs(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """[..., V], float32 (of float64 float64), from logits that are made and soft-capped in the type of the inputs."""
    z = F.linear(hidden, weight)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)


def weighed(logp: Tensor, batch: Batch) -> Tensor:
    """The mean of log-probabilities [B, T] with weights of both signs: the loss that `SCORES` is."""
    return (batch.ref.to(logp.dtype).sin() * logp).mean()


def kind_of(path: str) -> str:
    """The kind of job that a path does: `single` and `two_pass` do the same, "full"."""
    return path if path in ("forward", "frozen") else "full"


def units_of(kind: str) -> int:
    """Products of 2 · N · V · H flops, for those who keep what the backward needs."""
    return {"forward": 1, "frozen": 2}.get(kind, 3)


def graded(value: Tensor, *inputs: Tensor) -> Result:
    """The value, and the gradients of those inputs that ask for one."""
    return Result(value.detach(), torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))


def run_of(value: Callable[[Tensor, Tensor], Tensor], batch: Batch, job: Job) -> Run:
    """What does a job once, from a function of (hidden, weight)."""
    hidden, weight = batch.inputs(job.kind)

    def run() -> Result:
        if job.kind == "forward":
            with torch.no_grad():
                return Result(value(hidden, weight), ())
        return graded(value(hidden, weight), hidden, weight)

    return run


def naive(batch: Batch, job: Job, compiled: bool = False) -> tuple[Run, None]:
    """Naive PyTorch. `compiled`: by `torch.compile`."""

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = log_probs(hidden, weight, batch.softcap)
        if job.loss in (LOG_PROB, SCORES):
            logp = _at(log_p, batch.target)
            return logp if job.loss == LOG_PROB else weighed(logp, batch)
        return NAIVE[job.loss](log_p, batch)

    if not compiled:
        return run_of(value, batch, job), None
    torch._dynamo.reset()  # what other cases compiled isn't looked up, and counts towards no limit
    return run_of(torch.compile(value, dynamic=False), batch, job), None


# -- the library, the floor, the truth ---------------------------------------------------------------------------------


def on_path(
    batch: Batch, job: Job, path: str, workspace: int | Workspace, **how: Any
) -> tuple[Callable[[], Tensor], Plan]:
    """The library's call on `path` where it can take it, and its plan, which says so where it can't.

    Args:
        path: of `PATHS`; or "auto", the one that is planned.
        workspace: bytes, or what keeps them.
        how: impl, grad_tolerance, sort_vocab.

    Raises:
        ValueError: the library refuses: no such implementation here, or a `workspace` too small for one row.
    """
    hidden, weight = batch.inputs(job.kind)
    head = LMHead(weight, softcap=batch.softcap)
    spec = OBJECTIVES["mle" if job.loss in (LOG_PROB, SCORES) else job.loss]
    unit_tokens = tokens_of_units(spec, make_layout(batch.target, None, -100), batch.rewards.shape[1], Checks())
    planned: dict[str, Any] = {} if job.loss == SCORES else {"spec": spec, "unit_tokens": unit_tokens}
    size, kept = settled(workspace)
    asked = How(path=path, workspace=size, kept=kept, **how)
    try:
        plan, _ = plan_call(hidden, head, asked, **planned)
    except ValueError as error:
        if not str(error).startswith("path:"):
            raise
        asked = asked._replace(path="auto")
        plan, _ = plan_call(hidden, head, asked, **planned)
    given = {**how, "path": asked.path, "workspace": workspace}

    def call() -> Tensor:
        if job.loss in (LOG_PROB, SCORES):
            logp = linear_logprob(hidden, head, batch.target, **given).logp
            return logp if job.loss == LOG_PROB else weighed(logp, batch)
        label, ref = batch.label if spec.label else None, None if spec.ref is None else batch.ref
        return fused_loss(
            hidden, head, batch.target, objective=job.loss, label=label, ref=ref,
            rewards=batch.rewards if spec.rewards else None, **given,
        )  # fmt: skip

    return call, plan


def fused(batch: Batch, job: Job, path: str, workspace: int | Workspace, **how: Any) -> tuple[Run, Plan]:
    """The library on a path: what does the job once, and the plan. Arguments and errors as of `on_path`."""
    call, plan = on_path(batch, job, path, workspace, **how)
    return run_of(lambda *_: call(), batch, job), plan


class Floor:
    """The bare products of a case in its dtype, chunk by chunk into buffers that exist; nothing elementwise.

    One unit: logits; two: and dX; three: and dW; four: the logits twice.
    """

    def __init__(self, batch: Batch):
        self.x, self.weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
        self.rows = min(len(self.x), FLOOR_ROWS[self.x.device.type])
        self.z = self.x.new_empty(self.rows, len(self.weight))
        self.dx, self.dweight = torch.empty_like(self.x), torch.empty_like(self.weight)

    def run(self, units: int) -> None:
        """The products of that many units, over all N rows."""
        for x, dx in zip(self.x.split(self.rows), self.dx.split(self.rows)):
            z = self.z[: len(x)]
            for _ in range(2 if units == 4 else 1):
                torch.mm(x, self.weight.t(), out=z)
            if units >= 2:
                torch.mm(z, self.weight, out=dx)
            if units >= 3:
                first = x.data_ptr() == self.x.data_ptr()
                torch.addmm(self.dweight, z.t(), x, beta=0.0 if first else 1.0, out=self.dweight)


@partial(reference.Loss, ref=True)
def exact_scores(r: reference.Response) -> Tensor:
    """`weighed` of one response, by the oracle."""
    return (r.ref.sin() * _at(r.z.log_softmax(-1), r.y)).mean()


def exact(batch: Batch, job: Job) -> Result:
    """The oracle's loss and gradients in float64, one response, pair or group at a time: at most 512 rows of logits."""
    if job.loss == LOG_PROB:
        return Result(batch.logp, ())
    formula = exact_scores if job.loss == SCORES else reference.LOSSES[job.loss]
    hidden, weight = batch.hidden.detach().double(), batch.weight.detach().double()
    head = LMHead(weight.requires_grad_(job.kind == "full"), softcap=batch.softcap)
    value, dhidden, dweight = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
    size = batch.rewards.shape[1] if formula.unit == "group" else 2 if formula.unit == "pair" else 1
    units = len(hidden) // size
    for unit in range(units):
        places = [unit * size + k if formula.unit == "group" else unit + units * k for k in range(size)]
        of_group: dict[str, Any] = {}
        if formula.unit == "group":
            of_group = {"rewards": batch.rewards[unit : unit + 1], "group_size": size}
        x = hidden[places].requires_grad_()
        ref, label = (given[places] if needed else None for given, needed in (
            (batch.ref, formula.needs_ref), (batch.label, formula.needs_label),
        ))  # fmt: skip
        part = formula(x, head, batch.target[places], ref=ref, label=label, **of_group) / units
        dhidden[places], *more = torch.autograd.grad(part, [x, weight] if job.kind == "full" else [x])
        value += part.detach()
        if more:
            dweight += more[0]
    return Result(value, (dhidden, dweight) if job.kind == "full" else (dhidden,))


def errors(made: Result, truth: Result) -> tuple[float, float, float]:
    """Largest error of the value, largest of a gradient, largest ‖error‖ / ‖gradient‖; NaN where anything is."""
    found = [(made.value.double() - truth.value).abs().max(), truth.value.new_zeros(()), truth.value.new_zeros(())]
    for gradient, true in zip(made.gradients, truth.gradients):
        difference = gradient.double() - true
        found[1:] = [
            torch.maximum(found[1], difference.abs().max()),
            torch.maximum(found[2], difference.norm() / true.norm()),
        ]
    value, largest, relative = (x.item() for x in found)
    return value, largest, relative


# -- the contest -------------------------------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """Who does a job.

    Attributes:
        impl: "fused" for this library, "naive", or whose it is.
        path: of `PATHS`; the kind of job for the others.
        units: products of 2 · N · V · H flops; None for what the plan says.
        make: from batch and job: what does it once, and this library's plan.
        kernels, workspace, note: what else tells it from its like.
        module: what has to be installed.
        without_ref: scored against π_ref = 1, which it can't be given otherwise.
    """

    impl: str
    path: str
    units: int | None
    make: Callable[[Batch, Job], tuple[Run, Plan | None]]
    kernels: str | None = None
    workspace: int | None = None
    note: str | None = None
    module: str | None = None
    without_ref: bool = False


class Case:
    """A shape with its batch, bare products and exact answers, each made when it is first asked for."""

    def __init__(self, shape: Shape, dtype: str, device: str, softcap: float | None = None, name: str | None = None):
        self.shape, self.dtype, self.device, self.softcap = shape, dtype, device, softcap
        capped = "" if softcap is None else f", soft-cap {softcap:g}"
        self.title = None if name is None else name + capped
        self.known: dict[tuple[Job, bool], Result] = {}

    @cached_property
    def batch(self) -> Batch:
        """The inputs."""
        return make_batch(self.shape, DTYPES[self.dtype], self.device, softcap=self.softcap)

    @cached_property
    def floor(self) -> Floor:
        """The bare products."""
        return Floor(self.batch)

    def truth(self, job: Job, without_ref: bool = False) -> Result:
        """In float64; the answers to one job are held at a time."""
        if (job, without_ref) not in self.known:
            self.known = {key: value for key, value in self.known.items() if key[0] == job}
            batch = self.batch._replace(ref=torch.zeros_like(self.batch.ref)) if without_ref else self.batch
            self.known[job, without_ref] = exact(batch, job)
        return self.known[job, without_ref]

    def row(self, loss: str, path: str, impl: str, units: int, **more: Any) -> Row:
        """A row of this case."""
        return Row(loss, path, impl, self.dtype, *self.shape, units, case=self.title, **more)


class Ready(NamedTuple):
    """A contestant's row with errors and memory, and what does its job; None where it has no part in the rounds."""

    row: Row
    run: Run | None = None


def prepared(case: Case, job: Job, one: Contestant) -> Ready:
    """Check a contestant against float64, and if it passed take its memory."""
    row = case.row(
        job.loss, one.path, one.impl, one.units or 0, kernels=one.kernels, workspace=one.workspace, note=one.note
    )
    if one.module is not None and not installed(one.module):
        return Ready(row._replace(status=f"{ABSENT}{one.module}"))
    try:
        run, plan = one.make(case.batch, job)
        if plan is not None:
            row = row._replace(units=plan.units, planned_bytes=plan.extra_bytes, planned_seconds=plan.seconds)
            if plan.path != one.path:
                return Ready(row._replace(status=f"plan: {plan.path}"))
        row = checked(row, run(), case.truth(job, one.without_ref))
        if row.status != "ok":
            return Ready(row)
        release(case.device)
        peak, extra = peak_memory(run, case.device)
        return Ready(row._replace(peak_bytes=peak, extra_bytes=extra), run)
    except Exception as error:  # whatever a library raises is its result
        status = explain(error)
    return Ready(row._replace(status=status))


def checked(row: Row, made: Result, truth: Result) -> Row:
    """The row with its errors, and "FAILED" where they are more than the tolerance; a NaN fails, too."""
    found = errors(made, truth)
    most = TOLERANCE["fused" if row.impl == "fused" else "naive", DTYPES[row.dtype]]
    status = "ok" if found[0] <= most[0] and found[2] <= most[1] else "FAILED"
    value, gradient, relative = (x if math.isfinite(x) else None for x in found)
    return row._replace(status=status, value_error=value, gradient_error=gradient, gradient_error_relative=relative)


class Raced(NamedTuple):
    """The contestants' rows, those of the bare products, and the seconds of both, in their order."""

    rows: list[Row]
    floors: list[Row]
    seconds: list[list[float]]


def race(
    case: Case, ready: Sequence[Ready], rounds: int, budget: float = math.inf, rival: Run | None = None
) -> Raced:  # fmt: skip
    """Time all who passed their check in the same rounds, with as many bare products as each has.

    If one of them raises, each is timed by itself.

    Args:
        ready: as `prepared` gives them; naive PyTorch first, if it takes part.
        rounds, budget: as of `interleaved`.
        rival: naive PyTorch, where it isn't among them.
    """
    runs: dict[Any, Run] = {at: one.run for at, one in enumerate(ready) if one.run is not None}
    rows, naive_at = [one.row for one in ready], "rival"
    if 0 in runs and rows[0].impl == "naive":
        naive_at = 0  # type: ignore[assignment]
    elif rival is not None and runs:
        runs["rival"] = rival
    floors = {f"{n}U": n for n in sorted({floor_units(rows[at]) for at in runs if at != "rival"})}
    if not runs:
        return Raced(rows, [], [[] for _ in rows])
    try:
        products = {name: partial(case.floor.run, n) for name, n in floors.items()}
        times = interleaved({**products, **runs}, rounds, case.device, budget)
    except Exception as error:
        status = explain(error)
    else:
        made = [timed(row, times, at, naive_at) if at in runs else row for at, row in enumerate(rows)]
        of_floors = [with_time(case.row("products", name, "gemm", n), times, name) for name, n in floors.items()]
        return Raced(made, of_floors, [times.seconds.get(at, []) for at in (*range(len(rows)), *floors)])
    release(case.device)
    if len(runs) == 1:
        return Raced([row._replace(status=status) if at in runs else row for at, row in enumerate(rows)], [], [])
    beside = runs.get(naive_at) if len(ready) > 1 else None  # alone with naive, it is tried without
    alone = [race(case, [one], rounds, budget, beside if at != naive_at else None) for at, one in enumerate(ready)]
    return Raced([one.rows[0] for one in alone], [], [])


def timed(row: Row, times: Times, at: int, naive_at: Any) -> Row:
    """The row with its time, over as many units of bare products as it has, and over naive PyTorch."""
    units = floor_units(row)
    row = with_time(row, times, at)
    row = row._replace(over_floor=times.over(at, f"{units}U") * units / row.units)
    return row if at == naive_at or naive_at not in times.seconds else row._replace(over_naive=times.over(at, naive_at))


def with_time(row: Row, times: Times, name: Any) -> Row:
    """The row with median and quantiles."""
    median, low, high = times.quantiles(name)
    return row._replace(seconds=median, seconds_20=low, seconds_80=high, rounds=times.rounds)


def floor_units(row: Row) -> int:
    """How many units of bare products a row is timed with: of other numbers than `FLOORS` one."""
    return row.units if row.units in FLOORS else 1
