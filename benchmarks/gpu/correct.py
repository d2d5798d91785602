"""Every path, kernel and head against float64, at awkward shapes, with a loss of each kind; each twice, bitwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb import reference
from rgpb.bench import cases
from rgpb.bench.cases import Result
from rgpb.fused import fused_loss
from rgpb.head import LMHead
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES

from .journal import Settings, Task, explain
from .lineup import exact, graded, kernels_for, keywords, plan_of, rewards_of

# B, T, V, H: off every tile; and in this workspace more than one chunk and slice of everything
WORKSPACE = 96 * 2**20  # of the larger shape two chunks or more, each longer than a pair
SHAPES = ((4, 33, 1031, 72), (8, 128, 32003, 256))
HEADS = {"plain": (False, None, 1.0), "bias": (True, None, 1.0), "soft-cap and scale": (True, 5.0, 0.7)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATHS = ("single", "two_pass", "frozen", "forward")
SCORES, ENTROPY = "scores", "scores with entropy"
# The kernels' own losses, and one of each way to couple tokens: the engine knows no more of a loss.
LOSSES = ("mle", "nll_pll", "unlikelihood", "bnf", "exmate", "dpo", "ipo", "swepo")
FIELDS = ("logp", "log_odds", "lse", "entropy", "other_entropy")
# Of a loss, relative where it is above 1; of a log-probability; of the other scores; of a gradient, over its norm.
VALUE, LOGP, OTHER = 1e-4, {"fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-4}, 1e-4
GRADIENT = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
LARGEST = 2.0**8  # what the largest entry of a float16 gradient is scaled to


class Inputs(NamedTuple):
    """A batch: leaves in their dtype, a reference and labels."""

    hidden: Tensor
    head: LMHead
    target: Tensor
    ref: Tensor
    label: Tensor


def make_inputs(shape: tuple[int, int, int, int], dtype: str, head: str, device: str) -> Inputs:
    """Random states with logits of standard deviation 2 before scale and soft-cap; a few positions are masked."""
    B, T, V, H = shape
    biased, softcap, scale = HEADS[head]
    random = torch.Generator(device).manual_seed(0)

    def leaf(*size: int, std: float = 1.0) -> Tensor:
        made = torch.randn(*size, generator=random, device=device) * std
        return made.to(DTYPES[dtype]).requires_grad_()

    hidden, weight = leaf(B, T, H), leaf(V, H, std=2 / H**0.5)
    lm_head = LMHead(weight, leaf(V) if biased else None, softcap, scale)
    target = torch.randint(V, (B, T), generator=random, device=device)
    logp = true_scores(hidden, lm_head, target)["logp"].detach()
    noise = torch.randn(B, T, generator=random, device=device)
    ref = (logp + 0.3 * noise).clamp(max=-1e-3).float()
    target[0, : min(2, T - 1)] = -100
    target[-1, T - 1] = -100 if T > 1 else target[-1, T - 1]
    return Inputs(hidden, lm_head, target, ref, 1.0 - 2 * (torch.arange(B, device=device) % 2))


def true_scores(hidden: Tensor, head: LMHead, target: Tensor) -> dict[str, Tensor]:
    """The oracle's scores in float64."""
    bias = None if head.bias is None else head.bias.double()
    return reference.token_scores(hidden.double(), head._replace(weight=head.weight.double(), bias=bias), target)


class Bench:
    """Inputs of one dtype, head and shape, and the answers, made when first asked for and held for one loss."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, head: str, device: str):
        self.shape, self.dtype, self.head, self.device = shape, dtype, head, device
        self.made: Inputs | None = None
        self.known: dict[str, Any] = {}

    @property
    def inputs(self) -> Inputs:
        """The batch."""
        if self.made is None:
            self.made = make_inputs(self.shape, self.dtype, self.head, self.device)
        return self.made

    def truth(self, loss: str) -> Any:
        """Loss and gradients, or scores and the gradients of what `score_sum` adds up."""
        if loss not in self.known:
            x = self.inputs
            if loss in (SCORES, ENTROPY):
                leaves = [p.detach().double().requires_grad_() for p in self.leaves()]
                head = x.head._replace(weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
                scores = reference.token_scores(leaves[0], head, x.target)
                gradients = torch.autograd.grad(score_sum(scores, loss), leaves)
                found: Any = ({name: value.detach() for name, value in scores.items()}, gradients)
            else:
                found = exact(loss, x.hidden, x.head, x.target, x.ref, x.label)
            self.known = {loss: found}
        return self.known[loss]

    def leaves(self) -> list[Tensor]:
        """hidden, weight and, where there is one, bias."""
        head = self.inputs.head
        return [p for p in (self.inputs.hidden, head.weight, head.bias) if p is not None]


def score_sum(scores: dict[str, Tensor], loss: str) -> Tensor:
    """What is differentiated where there is no loss."""
    return scores["logp"].sum() + (scores["entropy"].sum() if loss == ENTROPY else 0)


def tasks(settings: Settings) -> Iterator[Task]:
    """A row for each loss, path, implementation, head and dtype, at each shape."""
    shapes: list[tuple[int, int, int, int]] = [*SHAPES]
    if settings.shapes:
        shapes = [(n // _length(n), _length(n), v, h) for _, n, h, v, _ in settings.shapes]
    for shape in shapes:
        for dtype in DTYPES:
            for head in HEADS:
                bench = Bench(shape, dtype, head, settings.device)
                for loss in (SCORES, ENTROPY, *LOSSES):
                    for path in ("two_pass",) if loss in (SCORES, ENTROPY) else PATHS:
                        for kernels in kernels_for(settings.device):
                            key = " | ".join((str(shape), dtype, head, loss, path, kernels))
                            yield Task(key, partial(make_row, bench, loss, path, kernels))


def _length(tokens: int) -> int:
    return max(t for t in range(1, cases.LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)


def make_row(bench: Bench, loss: str, path: str, kernels: str) -> dict[str, Any]:
    """The errors of one configuration, and whether a second call gave the same bits."""
    row: dict[str, Any] = {
        "loss": loss, "path": path, "kernels": kernels, "dtype": bench.dtype, "head": bench.head,
        "shape": list(bench.shape), "status": "ok", "value_error": None, "other_error": None,
        "gradient_error_relative": None, "same_twice": None,
    }  # fmt: skip
    try:
        return row | (scores(bench, loss, kernels) if loss in (SCORES, ENTROPY) else values(bench, loss, path, kernels))
    except Exception as error:
        return row | {"status": explain(error)}


def values(bench: Bench, loss: str, path: str, kernels: str) -> dict[str, Any]:
    """A loss and its gradients on one path."""
    x, spec, how = bench.inputs, OBJECTIVES[loss], keywords(kernels)
    head, hidden = x.head, x.hidden
    if path in ("frozen", "forward"):
        head = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    if path == "forward":
        hidden = hidden.detach()
    reduction = "none" if path == "two_pass" else "mean"
    plan = plan_of(hidden, head, x.target, loss, reduction, WORKSPACE, how)
    if plan.path != path:
        return {"status": f"plan: {plan.path}"}
    truth = bench.truth(loss)
    largest = max(gradient.abs().max().item() for gradient in truth.gradients)
    scale = 2.0 ** math.floor(math.log2(LARGEST / largest)) if bench.dtype == "fp16" and largest else 1.5

    def run() -> Result:
        value = fused_loss(
            hidden, head, x.target, objective=loss, label=x.label if spec.label else None,
            ref=None if spec.ref is None else x.ref, rewards=rewards_of(loss, x.target), reduction=reduction,
            workspace=WORKSPACE, **how,
        ).mean()  # fmt: skip
        if path == "forward":
            return Result(value, ())
        made = graded(value * scale, *(p for p in (hidden, head.weight, head.bias) if p is not None))
        return Result(value.detach(), made.gradients)

    made, again = run(), run()
    value, _, relative = cases.errors(made, Result(truth.value, tuple(g * scale for g in truth.gradients)))
    fine = value <= VALUE * max(1.0, truth.value.abs().item()) and relative <= GRADIENT[bench.dtype]
    found = {"value_error": value, "gradient_error_relative": None if path == "forward" else relative}
    return verdict(found, fine, (made.value, *made.gradients), (again.value, *again.gradients))


def scores(bench: Bench, loss: str, kernels: str) -> dict[str, Any]:
    """Log-probabilities and the other scores, and the gradient through them."""
    x, how, leaves = bench.inputs, keywords(kernels), bench.leaves()
    truth, true_gradients = bench.truth(loss)
    scale = 1.0
    if bench.dtype == "fp16":
        scale = 2.0 ** math.floor(math.log2(LARGEST / max(g.abs().max().item() for g in true_gradients)))

    def run() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        made = linear_logprob(x.hidden, x.head, x.target, entropy=loss == ENTROPY, workspace=WORKSPACE, **how)
        found = {name: getattr(made, name) for name in FIELDS if getattr(made, name) is not None}
        gradients = torch.autograd.grad(score_sum(found, loss) * scale, leaves)
        return {name: value.detach() for name, value in found.items()}, gradients

    (made, gradients), (again, more) = run(), run()
    off = {name: (value.double() - truth[name]).abs().max().item() for name, value in made.items()}
    exact_gradients = Result(x.ref.new_zeros(()), tuple(g * scale for g in true_gradients))
    relative = cases.errors(Result(x.ref.new_zeros(()), gradients), exact_gradients)[2]
    other = max(error for name, error in off.items() if name != "logp")
    fine = off["logp"] <= LOGP[bench.dtype] and other <= OTHER and relative <= GRADIENT[bench.dtype]
    found = {"value_error": off["logp"], "other_error": other, "gradient_error_relative": relative}
    return verdict(found, fine, (*made.values(), *gradients), (*again.values(), *more))


def verdict(found: dict[str, Any], fine: bool, once: tuple[Tensor, ...], twice: tuple[Tensor, ...]) -> dict[str, Any]:
    """The errors with the status: right, and the same twice."""
    same = all(torch.equal(a, b) for a, b in zip(once, twice))
    status = "FAILED" if not fine else "ok" if same else "FAILED: not the same twice"
    return {**found, "same_twice": same, "status": status}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest errors of each implementation, path and dtype, as the table to be shown."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        scored = row["loss"] in (SCORES, ENTROPY)
        groups.setdefault((row["kernels"], "scores" if scored else row["path"], row["dtype"]), []).append(row)

    def largest(group: list[dict[str, Any]], name: str) -> float | None:
        return max((row[name] for row in group if row[name] is not None), default=None)

    table = [
        {
            "kernels": kernels, "path": path, "dtype": dtype, "rows": len(group),
            "ok": sum(row["status"] == "ok" for row in group),
            "FAILED": sum(row["status"].startswith(("FAILED", "error")) for row in group),
            "value error": largest(group, "value_error"), "gradient’s": largest(group, "gradient_error_relative"),
            "else": "; ".join(sorted({row["status"] for row in group} - {"ok", "FAILED"})) or None,
        }
        for (kernels, path, dtype), group in groups.items()
    ]  # fmt: skip
    return {"table": table}
