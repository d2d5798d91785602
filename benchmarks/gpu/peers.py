"""Who takes part: naive PyTorch, this library on each path, and other libraries where they are installed.

Other libraries are called by their documented interface with the defaults of their own, and no option that would change
the result; where an option decides the time, with a better choice, too.

Dimensions: N tokens, B responses of length T (N = B · T), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.bench import contest
from rgpb.bench.contest import LOG_PROB, NAIVE, SCORES, Batch, Contestant, Job, Run, run_of, units_of, weighed
from rgpb.bench.measure import installed
from rgpb.kernels import INTERPRETED

# The library's kernel sets for a device; whether they are there shows when they are called.
KERNELS = {"cpu": ("cpp", "torch"), "cuda": ("torch", "triton", "tiled")}
PATHS = {"full": ("single", "two_pass"), "frozen": ("frozen",), "forward": ("forward",)}
# Those of one loss stand together.
JOBS = (
    *(Job(loss, kind) for loss in ("bnf", "dpo") for kind in ("full", "frozen")),
    Job(SCORES, "full"),
    Job("mle", "full"),
    Job(LOG_PROB, "forward"),
)


def kernels_for(device: str) -> tuple[str, ...]:
    """Those of `KERNELS`; interpreted ones stand in for a GPU's."""
    return KERNELS["cuda" if INTERPRETED else device]


def loss_of(logp: Tensor, loss: str, batch: Batch) -> Tensor:
    """A loss of the targets' log-probabilities: the naive form with a vocabulary of one; for `LOG_PROB` just these."""
    logp = logp.view(batch.target.shape)
    if loss in (LOG_PROB, SCORES):
        return logp if loss == LOG_PROB else weighed(logp, batch)
    return NAIVE[loss](logp[..., None], batch._replace(target=torch.zeros_like(batch.target)))


# -- other libraries ---------------------------------------------------------------------------------------------------


def _no_softcap(batch: Batch, whose: str) -> None:
    if batch.softcap is not None:
        raise ValueError(f"{whose} has no soft-cap")


def of_tokens(batch: Batch, job: Job, nll: Callable[[Tensor, Tensor], Tensor]) -> tuple[Run, None]:
    """What does a job, from −log p of the targets, which `nll` averages itself for `mle`."""

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        made = nll(hidden, weight)
        return made if job.loss == "mle" else loss_of(-made, job.loss, batch)

    return run_of(value, batch, job), None


def torch_linear_cross_entropy(batch: Batch, job: Job, options: dict[str, Any] | None) -> tuple[Run, None]:
    """`F.linear_cross_entropy`; `options` of None is its unchunked form."""
    _no_softcap(batch, "F.linear_cross_entropy")
    if options is not None and not installed("torch.nn.LinearCrossEntropyOptions"):
        raise ValueError(f"F.linear_cross_entropy of torch {torch.__version__} has no options")
    more: dict[str, Any] = {} if options is None else {"options": torch.nn.LinearCrossEntropyOptions(**options)}
    more["reduction"], target = "mean" if job.loss == "mle" else "none", batch.target.flatten()
    return of_tokens(batch, job, lambda h, w: F.linear_cross_entropy(h.flatten(0, 1), w, target, **more))


def liger_cross_entropy(batch: Batch, job: Job, **options: Any) -> tuple[Run, None]:
    """`LigerFusedLinearCrossEntropyLoss`."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    options |= {} if batch.softcap is None else {"softcap": batch.softcap}
    options |= {"reduction": "none"} if job.loss == LOG_PROB else {}
    module = LigerFusedLinearCrossEntropyLoss(**options)
    return of_tokens(batch, job, lambda h, w: module(w, h.flatten(0, 1), batch.target.flatten()))


def liger_dpo(batch: Batch, job: Job, **options: Any) -> tuple[Run, None]:
    """`LigerFusedLinearDPOLoss` without a reference model: it takes no precomputed scores."""
    _no_softcap(batch, "LigerFusedLinearDPOLoss")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, **options)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return module(weight, hidden, batch.target.clone())[0]  # it marks its target as dynamic for compilers

    return run_of(value, batch, job), None


def cut_cross_entropy(batch: Batch, job: Job, **options: Any) -> tuple[Run, None]:
    """`cut_cross_entropy.linear_cross_entropy`: reduced for `mle`, else one value per token and autograd from there."""
    from cut_cross_entropy import linear_cross_entropy

    options |= {} if batch.softcap is None else {"softcap": batch.softcap}
    options["reduction"] = "mean" if job.loss == "mle" else "none"
    return of_tokens(batch, job, lambda h, w: linear_cross_entropy(h, w, batch.target, **options))


def trl_head(batch: Batch, job: Job, chunk_size: int | None = None) -> tuple[Run, None]:
    """What `trl.trainer.utils.add_fused_lm_head` gives a model: log-probabilities per token, and autograd from there.

    Written against TRL 1.16; `trl.kernels` isn't a public interface. A tile has `chunk_size` words; None for TRL's own.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, batch.target.flatten(), 1.0,
            chunk_size or _CHUNKED_LOGPROB_CHUNK_SIZE, batch.softcap, 1.0, ("log_probs",),
        )[0]  # fmt: skip
        return loss_of(logp, job.loss, batch)

    return run_of(value, batch, job), None


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


def entries(job: Job, workspaces: tuple[int, ...], device: str) -> list[Contestant]:
    """Everybody who does this job, naive first: others are compared with it."""
    kind, units = job.kind, units_of(job.kind)
    found = [Contestant("naive", kind, units, contest.naive)]
    # a gradient of its own for each token isn't known before all tokens have been scored
    for path in ("two_pass",) if job.loss == SCORES else PATHS[kind]:
        for kernels in kernels_for(device):
            for workspace in workspaces:
                make = partial(contest.fused, path=path, workspace=workspace, impl=kernels)
                found.append(Contestant("fused", path, None, make, kernels, workspace))
    found.append(Contestant("compiled", kind, units, partial(contest.naive, compiled=True)))
    return [*found, *others(job, units, device)]


def others(job: Job, units: int, device: str) -> Iterator[Contestant]:
    """Other libraries; `units` is for those who keep what the backward needs."""
    loss, kind = job
    again = units + (kind != "forward")  # for those who form the logits again in the backward
    cuda = device == "cuda"

    def entry(impl: str, make: Any, units: int, module: str | None, **more: Any) -> Contestant:
        return Contestant(impl, kind, units, make, module=module, **more)

    if loss == "bnf":
        return
    for note, options in LCE_OPTIONS[device].items():
        if loss == "mle" or note in LCE_PER_TOKEN:
            make_lce = partial(torch_linear_cross_entropy, options=options)
            its_units = units if loss == "mle" or options is None else again
            name = "torch.nn.functional.linear_cross_entropy"
            yield entry("F.linear_cross_entropy", make_lce, its_units, name, note=note)
    if loss not in ("dpo", SCORES):  # it has no gradient of one value per token
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
