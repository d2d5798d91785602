"""What is compared: a batch, each loss as naive PyTorch and as this library, the bare products, and the exact answer.

Naive is the form of the papers' listings: all logits, `log_softmax`, `gather`, autograd. Its signs are those of the
papers' equations, and its logits are raised to float32. No position is masked, so nobody pays for padding.

Dimensions: N tokens, B responses of length T (N = B · T), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb import reference
from rgpb.engine.plan import Plan
from rgpb.fused import fused_loss
from rgpb.head import LMHead
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES
from rgpb.validation import How, plan_call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATHS = ("single", "two_pass", "frozen", "forward")
LOG_PROB = "log-prob"  # what a forward-only contestant computes in place of a loss

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


class Shape(NamedTuple):
    """Sizes of a case: N, H, V."""

    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Batch(NamedTuple):
    """Inputs of a case, the same for all contestants.

    Attributes:
        hidden, weight: [B, T, H] and [V, H], leaves that require a gradient.
        target: int64 [B, T].
        label: float32 [B], ±1.
        ref: float32 [B, T], log π_ref of the targets: the policy's own, perturbed; BNF's ratio is capped for some.
        rewards: float64 [G, K] of groups of four, or two, responses.
        logp: float64 [B, T], the exact log-probabilities of the targets.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    label: Tensor
    ref: Tensor
    rewards: Tensor
    logp: Tensor


class Result(NamedTuple):
    """The loss (or log-probs), and the gradients of hidden and weight, as far as the path makes them."""

    value: Tensor
    gradients: tuple[Tensor, ...]


class Contestant(NamedTuple):
    """Who does what.

    Attributes:
        loss: name, or `LOG_PROB`.
        path: of `PATHS`; for the naive form "full", "frozen" or "forward".
        impl: "fused" or "naive".
        units: products of 2 · N · V · H flops.
        run: does it once.
        plan: what the library will do, which may be another path; None for the naive form.
    """

    loss: str
    path: str
    impl: str
    units: int
    run: Callable[[], Result]
    plan: Plan | None = None


def make_batch(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
    """Random states with logits of standard deviation 2, in an even number of responses of at most 128 tokens.

    Raises:
        ValueError: an odd N.
    """
    tokens, width, vocab = shape
    if tokens % 2:
        raise ValueError(f"shape: expected an even number of tokens, for pairs of responses, got N={tokens}")
    length = max(t for t in range(1, LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    hidden = normal(tokens // length, length, width).to(dtype)
    weight = normal(vocab, width).mul_(2 / width**0.5).to(dtype)
    target = torch.randint(vocab, hidden.shape[:2], generator=random, device=device)
    rows, exact_weight = (
        zip(hidden.view(-1, width).split(EXACT_ROWS), target.view(-1).split(EXACT_ROWS)),
        weight.double(),
    )
    logp = torch.cat([_at(reference.logits(x.double(), exact_weight).log_softmax(-1), y) for x, y in rows])
    logp = logp.view(target.shape)
    ref = (logp + 0.3 * normal(*target.shape)).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    rewards = torch.linspace(0, 7, len(target), dtype=torch.float64, device=device).sin()
    rewards = rewards.view(-1, 4 if len(target) % 4 == 0 else 2)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, rewards, logp)


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


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """[..., V], float32 (float64 for float64 input), from logits in the type of the inputs, as a model returns them."""
    z = F.linear(hidden, weight)
    return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)


def naive_bytes(tokens: int, vocab: int, itemsize: int, gradient: bool = True, softcap: bool = False) -> int:
    """What the naive form holds at its peak beyond inputs and gradients: 3 · N · V float32 numbers, whatever the loss.

    In the backward: log-probabilities, their gradient from `gather`, and that of the logits or, for BNF, of Σ p log p;
    with a soft-cap also its tanh, in the type of the inputs.
    A forward-only call holds logits and log-probabilities, and 16-bit logits beside their float32 copy.
    """
    return tokens * vocab * (12 + itemsize * softcap if gradient else 8 + 2 * (itemsize == 2))


def naive_moved(itemsize: int, entropy: bool = False, softcap: bool = False) -> int:
    """Bytes that the naive form reads and writes for each of its N · V logits, forward and backward.

    What its products read isn't counted, as it isn't for the library; what they write is.

    Args:
        itemsize: of the inputs and their logits, 2 or 4.
        entropy: whether the loss has a sum over the vocabulary beside the target, as BNF's Σ p log p.
        softcap: whether the logits are soft-capped, in the type of the inputs.
    """
    passes = (
        6 + 11 * entropy
    )  # log_softmax 2, the gradients of gather 1 and of log_softmax 3; of the sum and its own 11
    narrow = 1 + 13 * softcap  # logits written; z / c, tanh and c · tanh 6, their gradients 7
    return 4 * passes + itemsize * narrow + 12 * (itemsize == 2)  # raised to float32, and the gradient back


def naive_path(path: str) -> str:
    """The naive form of a path: `single` and `two_pass` do the same job, "full"."""
    return path if path in ("forward", "frozen") else "full"


def naive(batch: Batch, loss: str, path: str) -> Contestant:
    """Naive PyTorch doing the job that the library does on `path`."""

    def run() -> Result:
        if path == "forward":
            with torch.no_grad():
                return Result(_at(log_probs(batch.hidden, batch.weight), batch.target), ())
        weight = batch.weight.detach() if path == "frozen" else batch.weight
        return _with_gradients(NAIVE[loss](log_probs(batch.hidden, weight), batch), batch.hidden, weight)

    return Contestant(loss, naive_path(path), "naive", {"forward": 1, "frozen": 2}.get(path, 3), run)


# -- the library, the floor, the truth ---------------------------------------------------------------------------------


def fused(batch: Batch, loss: str, path: str, impl: str, workspace: int) -> Contestant:
    """The library on `path`.

    Raises:
        ValueError: a `workspace` too small for one row, or an `impl` or `path` that can't serve the request.
    """
    spec = OBJECTIVES["mle" if loss == LOG_PROB else loss]
    weight = batch.weight.detach() if path in ("frozen", "forward") else batch.weight
    hidden = batch.hidden.detach() if path == "forward" else batch.hidden
    plan, _ = plan_call(hidden, LMHead(weight), How(impl, path, workspace=workspace), spec=spec)

    def run() -> Result:
        if loss == LOG_PROB:
            scores = linear_logprob(hidden, weight, batch.target, impl=impl, path=path, workspace=workspace)
            return Result(scores.logp, ())
        label, ref = batch.label if spec.label else None, None if spec.ref is None else batch.ref
        value = fused_loss(
            hidden, weight, batch.target, objective=loss, label=label, ref=ref,
            rewards=batch.rewards if spec.rewards else None, impl=impl, path=path, workspace=workspace,
        )  # fmt: skip
        return _with_gradients(value, hidden, weight)

    return Contestant(loss, path, "fused", plan.units, run, plan)


def _with_gradients(value: Tensor, hidden: Tensor, weight: Tensor) -> Result:
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return Result(value.detach(), torch.autograd.grad(value, wanted))


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


def exact(batch: Batch, loss: str, weight_grad: bool) -> Result:
    """The oracle's loss and gradients in float64, one response, pair or group at a time: at most 512 rows of logits."""
    if loss == LOG_PROB:
        return Result(batch.logp, ())
    formula = reference.LOSSES[loss]
    hidden, weight = batch.hidden.detach().double(), batch.weight.detach().double().requires_grad_(weight_grad)
    value, dhidden, dweight = batch.logp.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
    size = batch.rewards.shape[1] if formula.unit == "group" else 2 if formula.unit == "pair" else 1
    units = len(hidden) // size
    for unit in range(units):
        places = [unit * size + k if formula.unit == "group" else unit + units * k for k in range(size)]
        of_group: dict[str, Any] = {}
        if formula.unit == "group":
            of_group = {"rewards": batch.rewards[unit : unit + 1], "group_size": size}
        x = hidden[places].requires_grad_()
        ref, label = (x[places] if needed else None for x, needed in (
            (batch.ref, formula.needs_ref), (batch.label, formula.needs_label),
        ))  # fmt: skip
        part = formula(x, weight, batch.target[places], ref=ref, label=label, **of_group) / units
        dhidden[places], *more = torch.autograd.grad(part, [x, weight] if weight_grad else [x])
        value += part.detach()
        if more:
            dweight += more[0]
    return Result(value, (dhidden, dweight) if weight_grad else (dhidden,))


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
