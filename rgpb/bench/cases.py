"""What is compared: a batch, the losses as naive PyTorch writes them, the fused ones, the bare products, and the exact answer.

Naive is the shape that the papers' listings have: all logits, `log_softmax`, `gather`, autograd. Its signs are those of the
papers' equations, its logits are raised to float32 first. No position is masked, so no contestant pays for padding.

Dimensions: N tokens, B responses of length T (N = B · T), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb import reference
from rgpb.engine.plan import Plan
from rgpb.fused import call_plan, fused_loss
from rgpb.head import LMHead
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATHS = ("single", "two_pass", "frozen", "forward")

# (loss or log-probability, gradient relative to its norm): what a contestant may be off the float64 answer to be timed at all.
TOLERANCE = {
    ("fused", torch.float32): (1e-4, 1e-4),
    ("fused", torch.bfloat16): (1e-4, 1e-2),  # the gradients are rounded to 8 bits, the scores aren't
    ("naive", torch.float32): (1e-4, 1e-4),
    ("naive", torch.bfloat16): (1e-1, 1e-1),  # its logits are rounded to 8 bits
}
LONGEST_RESPONSE = 128
EXACT_ROWS = 256
# Rows of one bare product. On a GPU 512 rows of dX are too few tiles to fill it, so that 512 would be no floor.
FLOOR_ROWS = {"cpu": 512, "cuda": 4096}


class Shape(NamedTuple):
    """Sizes of a case: N, H, V."""

    tokens: int
    width: int
    vocab: int


class Batch(NamedTuple):
    """Inputs of a case, the same for all contestants.

    Attributes:
        hidden, weight: [B, T, H] and [V, H], leaves that require a gradient.
        target: int64 [B, T].
        label: float32 [B], ±1.
        ref: float32 [B, T], log π_ref of the targets: the policy's own, perturbed, so that BNF's ratio is capped for some.
        logp: float64 [B, T], the exact log-probabilities of the targets.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    label: Tensor
    ref: Tensor
    logp: Tensor


class Result(NamedTuple):
    """What a contestant returns: the loss (or log-probs) and the gradients that its path makes (hidden, then weight)."""

    value: Tensor
    gradients: tuple[Tensor, ...]


class Contestant(NamedTuple):
    """A row to be.

    Attributes:
        loss: name, or "log-prob" for a forward-only call.
        path: of `PATHS`; for the naive form "full", "frozen" or "forward".
        impl: "fused" or "naive".
        units: products of 2 · N · V · H flops.
        run: does the work once.
        plan: what the library will do; None for the naive form. It may have taken another path than the one asked for.
    """

    loss: str
    path: str
    impl: str
    units: int
    run: Callable[[], Result]
    plan: Plan | None = None


def make_batch(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
    """A batch of random states: logits of standard deviation 2, responses of up to 128 tokens, stacked as pairs.

    Raises:
        ValueError: an odd N.
    """
    tokens, width, vocab = shape
    if tokens % 2:
        raise ValueError(f"shape: expected an even number of tokens (pairs of responses), got N={tokens}")
    length = max(t for t in range(1, LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    hidden = normal(tokens // length, length, width).to(dtype)
    weight = normal(vocab, width).mul_(2 / width**0.5).to(dtype)
    target = torch.randint(vocab, hidden.shape[:2], generator=random, device=device)
    exact_weight, rows = weight.double(), hidden.view(-1, width).split(EXACT_ROWS)
    logp = torch.cat([
        reference.logits(x.double(), exact_weight).log_softmax(-1).gather(-1, y[:, None])
        for x, y in zip(rows, target.view(-1).split(EXACT_ROWS))
    ]).view(target.shape)  # fmt: skip
    ref = (logp + 0.3 * normal(*target.shape)).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, logp)


# -- naive PyTorch ---------------------------------------------------------------------------------------------------------


def naive_bnf(log_p: Tensor, target: Tensor, label: Tensor, ref: Tensor) -> Tensor:
    """BNF Eq. 4 and 6 (ICLR 2025). log_p [B, T, V], the rest as in `Batch`."""
    target_logp = _at(log_p, target)
    p = target_logp.detach().exp()
    f_target = (target_logp.detach() - ref).exp().clamp(max=1)
    f_others = (1 - f_target) / (1 - p)  # times p_k, for the other tokens k
    others = (log_p.detach().exp() * log_p).sum(-1) - p * target_logp
    return -(label * (f_target * target_logp + f_others * others).mean(-1)).mean()


def naive_dpo(log_p: Tensor, target: Tensor, label: Tensor, ref: Tensor) -> Tensor:
    """Rafailov et al. 2023, β = 0.1; pairs stacked [chosen; rejected], so `label` has no part in it."""
    chosen, rejected = (_at(log_p, target) - ref).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def naive_mle(log_p: Tensor, target: Tensor, label: Tensor, ref: Tensor) -> Tensor:
    """−log p per token, averaged over the responses."""
    return -_at(log_p, target).mean(-1).mean()


NAIVE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "bnf": naive_bnf, "dpo": naive_dpo, "mle": naive_mle,
}  # fmt: skip


def _at(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(-1, target[..., None]).squeeze(-1)


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """[..., V] in float32 (float64 for float64 input). The logits are rounded to the inputs' type first, as a model's are."""
    z = F.linear(hidden, weight)
    return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)


def naive_bytes(tokens: int, vocab: int, itemsize: int, gradient: bool = True) -> int:
    """What the naive form holds at its peak beyond inputs and gradients: 3 · N · V float32 numbers, whatever the loss.

    In the backward: log-probabilities, their gradient (from `gather`), and that of the logits or, for BNF, of Σ p log p. A
    forward-only call holds logits and log-probabilities, and 16-bit logits beside their float32 copy.

    Args:
        itemsize: bytes of an input element, 4 or 2.
        gradient: False for a forward-only call.
    """
    return tokens * vocab * (12 if gradient else 8 + 2 * (itemsize == 2))


# -- contestants -----------------------------------------------------------------------------------------------------------


def naive_path(path: str) -> str:
    """The naive form of a path of the library: single and two pass are both its "full"."""
    return path if path in ("forward", "frozen") else "full"


def naive(batch: Batch, loss: str, path: str) -> Contestant:
    """Naive PyTorch that does the same job as the library on `path`."""

    def run() -> Result:
        hidden, weight, target, label, ref, _ = batch
        if path == "forward":
            with torch.no_grad():
                return Result(_at(log_probs(hidden, weight), target), ())
        weight = weight.detach() if path == "frozen" else weight
        return _with_gradients(NAIVE[loss](log_probs(hidden, weight), target, label, ref), hidden, weight)

    return Contestant(loss, naive_path(path), "naive", {"forward": 1, "frozen": 2}.get(path, 3), run)


def fused(batch: Batch, loss: str, path: str, impl: str, workspace: int) -> Contestant:
    """This library, called so that it takes `path` if the plan finds that it can.

    Raises:
        ValueError: a `workspace` too small for one row.
    """
    spec = None if path == "forward" else OBJECTIVES[loss]
    weight = batch.weight.detach() if path in ("frozen", "forward") else batch.weight
    hidden = batch.hidden.detach() if path == "forward" else batch.hidden
    reduction = "none" if path == "two_pass" else "mean"
    plan = call_plan(hidden, LMHead(weight), spec or OBJECTIVES["mle"], reduction, workspace, {})

    def run() -> Result:
        if spec is None:
            return Result(linear_logprob(hidden, weight, batch.target, impl=impl, workspace=workspace).logp, ())
        extra = {"label": batch.label if spec.label else None, "ref": None if spec.ref is None else batch.ref}
        value = fused_loss(
            hidden, weight, batch.target, objective=loss, reduction=reduction, impl=impl, workspace=workspace, **extra
        )
        return _with_gradients(value.mean(), hidden, weight)

    return Contestant(loss, path, "fused", plan.units, run, plan)


def _with_gradients(value: Tensor, hidden: Tensor, weight: Tensor) -> Result:
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return Result(value.detach(), torch.autograd.grad(value, wanted))


class Floor:
    """The bare products of a case in its dtype, chunk by chunk into buffers that are there already.

    1 unit: logits; 2: and dX; 3: and dW; 4: the logits twice. Nothing elementwise, nothing allocated.
    """

    def __init__(self, batch: Batch):
        self.x, self.weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
        self.rows = min(len(self.x), FLOOR_ROWS[self.x.device.type])
        self.z = self.x.new_empty(self.rows, len(self.weight))
        self.dx, self.dweight = torch.empty_like(self.x), torch.empty_like(self.weight)

    def run(self, units: int) -> None:
        """The products of that many units, over all of N."""
        for start in range(0, len(self.x), self.rows):
            x = self.x[start : start + self.rows]
            z = self.z[: len(x)]
            torch.mm(x, self.weight.t(), out=z)
            if units == 4:
                torch.mm(x, self.weight.t(), out=z)
            if units >= 2:
                torch.mm(z, self.weight, out=self.dx[start : start + self.rows])
            if units >= 3:
                self.dweight.addmm_(z.t(), x, beta=float(start > 0))


# -- the exact answer ------------------------------------------------------------------------------------------------------


def exact(batch: Batch, loss: str, weight_grad: bool) -> Result:
    """The oracle's loss and gradients in float64, one response or pair at a time, so that it fits where naive does."""
    formula = reference.LOSSES[loss]
    weight = batch.weight.detach().double().requires_grad_(weight_grad)
    responses = len(batch.target)
    units = responses // 2 if formula.pair else responses
    value, dhidden, dweight = batch.logp.new_zeros(()), [], torch.zeros_like(weight) if weight_grad else None
    order = []
    for unit in range(units):
        places = [unit, unit + units] if formula.pair else [unit]
        hidden = batch.hidden.detach()[places].double().requires_grad_()
        needs = {"ref": batch.ref[places]} if formula.needs_ref else {}
        needs |= {"label": batch.label[places]} if formula.needs_label else {}
        part = formula(hidden, weight, batch.target[places], **needs) / units
        gradients = torch.autograd.grad(part, [hidden, weight] if weight_grad else [hidden])
        value += part.detach()
        dhidden.append(gradients[0])
        order += places
        if dweight is not None:
            dweight += gradients[1]
    back = torch.argsort(torch.tensor(order))
    stacked = torch.cat(dhidden)[back.to(batch.target.device)]
    return Result(value, (stacked,) if dweight is None else (stacked, dweight))


def errors(made: Result, exact: Result) -> tuple[float, float, float]:
    """(largest error of the value, largest of a gradient, largest ‖error‖ / ‖gradient‖); the last two 0 without gradients."""
    value = (made.value.double() - exact.value).abs().max().item()
    largest = relative = 0.0
    for gradient, truth in zip(made.gradients, exact.gradients):
        difference = gradient.double() - truth
        largest = max(largest, difference.abs().max().item())
        relative = max(relative, (difference.norm() / truth.norm()).item())
    return value, largest, relative
