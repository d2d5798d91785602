"""The dense oracle: materialised logits and the papers' formulas as printed, for tests and comparisons.

Everything runs in the dtype of its inputs, as a naive implementation would; give float64 for ground truth.
It shares no code with the engine and takes the longer road on purpose: a Python loop over the responses, the
other tokens gathered into a [n, V−1] tensor of their own, sums over all V tokens, and autograd's gradient.

Dimensions: B responses, T positions of a padded response, N positions of a packed batch, H hidden size,
V vocabulary, n tokens of a response that aren't masked, U units (responses or pairs).
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.head import LMHead, as_head


def logits(hidden: Tensor, head: Tensor | LMHead) -> Tensor:
    """z = scale · (W x + b), then softcap · tanh(z / softcap) where a soft-cap is set.

    Args:
        hidden: [..., H].
        head: weight [V, H] or an `LMHead`, in the dtype of `hidden`.

    Returns:
        [..., V] in the dtype of `hidden`.

    Raises:
        ValueError: H or the dtypes differ.
    """
    weight, bias, softcap, scale = as_head(head)
    _expect(hidden.dtype == weight.dtype, "hidden", f"the head's {weight.dtype}", hidden.dtype)
    h = weight.shape[-1]
    _expect(hidden.shape[-1] == h, "hidden", f"[..., {h}] to match the head", list(hidden.shape))
    z = F.linear(hidden, weight, bias) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_scores(hidden: Tensor, head: Tensor | LMHead, target: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """Statistics of the target token: `logp`, `log_odds`, `lse`, `entropy`, `other_entropy`.

    Args:
        hidden: [..., H].
        head: weight [V, H] or an `LMHead`, in the dtype of `hidden`.
        target: int64 [...]; target[t] is what hidden[t] predicts.
        ignore_index: the target that marks a masked position. Its hidden state is never read.

    Returns:
        Tensors in the shape of `target` and the dtype of `hidden`, differentiable, 0 at masked positions.
        `other_entropy` is the entropy of p_k / (1 − p) over the tokens k that aren't the target.

    Raises:
        ValueError: shapes or dtypes that don't fit, or a target outside the vocabulary.
    """
    _check_target(hidden, head, target, ignore_index)
    mask = target != ignore_index
    z, y = logits(hidden[mask], head), target[mask]
    log_p = z.log_softmax(-1)
    log_q = _others(z, y).log_softmax(-1)
    scores = {
        "logp": _at(log_p, y),
        "log_odds": _at(z, y) - _others(z, y).logsumexp(-1),
        "lse": z.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "other_entropy": -(log_q.exp() * log_q).sum(-1),
    }
    return {name: z.new_zeros(target.shape).index_put((mask,), value) for name, value in scores.items()}


class Response(NamedTuple):
    """What a formula sees of one response, its masked positions left out.

    Attributes:
        z: logits [n, V].
        y: targets [n].
        ref: log π_ref(y) [n]; NaN for a loss without a reference.
        ref_rest: log(1 − π_ref(y)) [n]; NaN likewise.
        label: +1 preferred, −1 dispreferred; NaN for a loss without labels.
    """

    z: Tensor
    y: Tensor
    ref: Tensor
    ref_rest: Tensor
    label: float

    def reduce(self, per_token: Tensor, length_normalize: bool) -> Tensor:
        """Mean over the tokens, or their sum; 0 where there are none. [n] → 0-d."""
        return per_token.sum() / (max(len(self.y), 1) if length_normalize else 1)

    def logp(self, length_normalize: bool = False) -> Tensor:
        """log π_θ(y), or that per token. 0-d."""
        return self.reduce(_at(self.z.log_softmax(-1), self.y), length_normalize)

    def log_ratio(self, length_normalize: bool = False) -> Tensor:
        """Δ = log π_θ(y) − log π_ref(y), or that per token. 0-d."""
        return self.logp(length_normalize) - self.reduce(self.ref, length_normalize)


class Loss:
    """A formula of one response, or of one (chosen, rejected) pair, over a batch.

    Called as `dpo(hidden, head, target, ref=ref, beta=0.1)`:

    Args:
        hidden: [B, T, H], or packed [N, H].
        head: weight [V, H] or an `LMHead`, in the dtype of `hidden`.
        target: int64 [B, T] or [N]; target[t] is what hidden[t] predicts. Pairs: [chosen; rejected] stacked.
        ref: log π_ref of the targets, in the shape of `target`; detached.
        ref_logits: the reference's logits [*target.shape, V] in place of `ref`; detached. They say more where
            the reference is nearly certain: 1 − π_ref is then the sum over the other tokens.
        label: [B] bool or ±1.
        cu_seqlens: integers [B + 1], the bounds of the packed responses.
        ignore_index: the target that marks a masked position. Its hidden state and reference are never read.
        reduction: "mean", "sum" or "none" over the units.
        options: the keywords of the formula.

    Returns:
        0-d, or [U] for "none", in the dtype of `hidden`. A unit without any token is exactly 0.

    Raises:
        ValueError: shapes, dtypes or values that don't fit; a reference or label missing or without use.
        TypeError: an option that the formula doesn't have.
    """

    def __init__(
        self, formula: Callable[..., Tensor], *, pair: bool = False, ref: bool = False, label: bool = False
    ) -> None:
        self.formula, self.pair, self.needs_ref, self.needs_label = formula, pair, ref, label
        self.__name__, self.__doc__ = formula.__name__, formula.__doc__

    def __call__(
        self,
        hidden: Tensor,
        head: Tensor | LMHead,
        target: Tensor,
        *,
        ref: Tensor | None = None,
        ref_logits: Tensor | None = None,
        label: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        **options: float,
    ) -> Tensor:
        given = [name for name, x in (("ref", ref), ("ref_logits", ref_logits)) if x is not None]
        wanted = "one of ref and ref_logits" if self.needs_ref else "no reference"
        _expect(len(given) == self.needs_ref, "ref", f"{wanted} for {self.__name__}", given or None)
        wanted = "labels [B]" if self.needs_label else "None"
        _expect((label is not None) == self.needs_label, "label", f"{wanted} for {self.__name__}", label)
        _expect(reduction in ("mean", "sum", "none"), "reduction", "'mean', 'sum' or 'none'", repr(reduction))
        responses = _responses(hidden, head, target, ref, ref_logits, label, cu_seqlens, ignore_index)
        half = len(responses) // 2
        if self.pair:
            _expect(2 * half == len(responses), "target", "chosen and rejected responses", len(responses))
        units = zip(responses[:half], responses[half:]) if self.pair else zip(responses)
        values = torch.stack([self._value(unit, options) for unit in units])
        return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()

    def _value(self, unit: tuple[Response, ...], options: dict[str, float]) -> Tensor:
        if any(len(r.y) for r in unit):
            return self.formula(*unit, **options)
        return torch.cat([r.z for r in unit]).sum()  # no element: a 0 that can still be differentiated


@Loss
def mle(r: Response, *, length_normalize: bool = True) -> Tensor:
    """−log π(y), per token by default: maximum likelihood. RGPB Eq. 2–3."""
    return -r.logp(length_normalize)


@partial(Loss, pair=True)
def nll_pll(w: Response, l: Response, *, length_normalize: bool = True) -> Tensor:
    """−log π(y_w) + log π(y_l), per token by default. BNF Eq. 1."""
    return -w.logp(length_normalize) + l.logp(length_normalize)


@partial(Loss, pair=True)
def unlikelihood(w: Response, l: Response, *, alpha: float = 1.0) -> Tensor:
    """−mean_t log p_t over y_w − α · mean_t log(1 − p_t) over y_l. RGPB Eq. 5; Welleck et al. 2020.

    1 − p is the sum of the other tokens' probabilities, so it doesn't round to 0.
    """
    return -w.logp(True) - alpha * l.reduce(_log_rest(l.z, l.y), True)


@partial(Loss, pair=True)
def exmate(w: Response, l: Response, *, beta: float = 1.0, length_normalize: bool = True) -> Tensor:
    """−log π(y_w) + β π(y_l), both log-probabilities per token by default. RGPB Eq. 6."""
    return -w.logp(length_normalize) + beta * l.logp(length_normalize).exp()


@partial(Loss, pair=True, ref=True)
def dpo(w: Response, l: Response, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), m = β(Δ_w − Δ_l). RGPB Eq. 4 is ε = 0; Rafailov et al. 2023."""
    m = beta * (w.log_ratio() - l.log_ratio())
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


@partial(Loss, pair=True, ref=True)
def ipo(w: Response, l: Response, *, tau: float = 0.1, length_normalize: bool = True) -> Tensor:
    """(Δ_w − Δ_l − 1/(2τ))², each Δ per token by default. BNF Table 2; Azar et al. 2023."""
    return (w.log_ratio(length_normalize) - l.log_ratio(length_normalize) - 1 / (2 * tau)) ** 2


@partial(Loss, pair=True)
def simpo(w: Response, l: Response, *, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """−log σ(β/|y_w| · log π(y_w) − β/|y_l| · log π(y_l) − γ). BNF Table 2; Meng et al. 2024."""
    return -F.logsigmoid(beta * w.logp(True) - beta * l.logp(True) - gamma)


@partial(Loss, ref=True, label=True)
def bnf(r: Response) -> Tensor:
    """−(label/|y|) Σ_t Σ_k f_k log p_k with f from `dynamic_target`. BNF Eq. 4 and 6."""
    f = dynamic_target(r.z, r.y, r.ref, r.ref_rest)
    return -r.label * r.reduce((f * r.z.log_softmax(-1)).sum(-1), True)


@partial(Loss, ref=True, label=True)
def bnf_as_printed(r: Response) -> Tensor:
    """`bnf` with f from `dynamic_target_as_printed`: one token whose 1 − p rounds to 0 makes it NaN."""
    f = dynamic_target_as_printed(r.z, r.y, r.ref)
    return -r.label * r.reduce((f * r.z.log_softmax(-1)).sum(-1), True)


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (mle, nll_pll, unlikelihood, exmate, bnf, dpo, ipo, simpo)}


@torch.no_grad()
def dynamic_target_as_printed(z: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    """f_y = min(π_θ/π_ref, 1) and f_k = (1 − f_y)/(1 − p_y) · p_k elsewhere. BNF Eq. 6.

    Args:
        z: logits [n, V].
        y: targets [n].
        ref: log π_ref(y) [n].

    Returns:
        [n, V], detached, in the dtype of `z`. NaN where p_y rounds to 1, or p_y and π_ref both underflow.
    """
    p = z.softmax(-1)
    p_y = _at(p, y)
    f_y = (p_y / ref.exp()).clamp(max=1)
    f = ((1 - f_y) / (1 - p_y))[:, None] * p
    return f.scatter(1, y[:, None], f_y[:, None])


@torch.no_grad()
def dynamic_target(z: Tensor, y: Tensor, ref: Tensor, ref_rest: Tensor) -> Tensor:
    """The same f (BNF Eq. 6) without a difference from 1, so it stays finite for every finite z and ref.

    1 − p is the sum of the other probabilities, and quotients are exponentials of log differences. The factor
    (1 − f_y)/(1 − p_y) of the other tokens is 0 for p_y ≥ π_ref. Else f_y = p_y/π_ref, so that it is also
    (1 − (1 − π_ref)/(1 − p_y)) / π_ref. The first form loses digits as p_y → 1, the second as π_ref → 0.

    Args:
        z: logits [n, V].
        y: targets [n].
        ref: log π_ref(y) [n].
        ref_rest: log(1 − π_ref(y)) [n].

    Returns:
        [n, V], detached, in the dtype of `z`.
    """
    log_p, rest = z.log_softmax(-1), _log_rest(z, y)
    log_f_y = (_at(log_p, y) - ref).clamp(max=0)
    first = -torch.expm1(log_f_y) / rest.exp()
    second = -torch.expm1((ref_rest - rest).clamp(max=0)) / ref.exp()
    factor = torch.where(ref > math.log(0.5), second, torch.where(log_f_y < 0, first, 0.0))
    return (factor[:, None] * log_p.exp()).scatter(1, y[:, None], log_f_y.exp()[:, None])


def _at(values: Tensor, y: Tensor) -> Tensor:
    """values[i, y_i]. [n, V], [n] → [n]."""
    return values.gather(-1, y[:, None]).squeeze(-1)


def _others(values: Tensor, y: Tensor) -> Tensor:
    """Each row without its target. [n, V], [n] → [n, V−1]."""
    n, v = values.shape
    return values[torch.arange(v, device=y.device) != y[:, None]].view(n, v - 1)


def _log_rest(z: Tensor, y: Tensor) -> Tensor:
    """log(1 − p_y), the log of the other tokens' summed probability. [n]"""
    return _others(z.log_softmax(-1), y).logsumexp(-1)


def _responses(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    ref: Tensor | None,
    ref_logits: Tensor | None,
    label: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> list[Response]:
    """Cut the batch into responses and leave the masked positions out."""
    _check_target(hidden, head, target, ignore_index)
    shape = list(target.shape)
    if ref is not None:
        _expect(list(ref.shape) == shape, "ref", f"the shape of target, {shape}", list(ref.shape))
    if ref_logits is not None:
        wanted = [*shape, as_head(head).weight.shape[0]]
        _expect(list(ref_logits.shape) == wanted, "ref_logits", str(wanted), list(ref_logits.shape))
    if cu_seqlens is None:
        _expect(len(shape) == 2 and shape[0] > 0, "target", "[B, T], or [N] with cu_seqlens", shape)
        places: list[int | slice] = list(range(shape[0]))
    else:
        _expect(len(shape) == 1, "target", "[N] beside cu_seqlens", shape)
        _expect(cu_seqlens.dim() == 1, "cu_seqlens", "[B + 1]", list(cu_seqlens.shape))
        ends = cu_seqlens.tolist()
        fits = len(ends) > 1 and ends == sorted(ends) and (ends[0], ends[-1]) == (0, shape[0])
        _expect(fits, "cu_seqlens", f"to rise from 0 to {shape[0]}", ends)
        places = [slice(start, end) for start, end in pairwise(ends)]
    labels = [math.nan] * len(places)
    if label is not None:
        labels = (2 * label.double() - 1 if label.dtype == torch.bool else label.double()).tolist()
        fits = list(label.shape) == [len(places)] and {*labels} <= {-1.0, 1.0}
        _expect(fits, "label", f"[{len(places)}] of bool or ±1", label)

    responses = []
    for place, its_label in zip(places, labels):
        mask = target[place] != ignore_index
        z, y = logits(hidden[place][mask], head), target[place][mask]
        logp = rest = z.new_full(y.shape, math.nan)
        if ref is not None:
            logp = ref[place][mask].detach().to(z.dtype).clamp(max=0)
            rest = torch.log(-torch.expm1(logp))
        elif ref_logits is not None:
            ref_z = ref_logits[place][mask].detach().to(z.dtype)
            logp, rest = _at(ref_z.log_softmax(-1), y), _log_rest(ref_z, y)
        responses.append(Response(z, y, logp, rest, its_label))
    return responses


def _check_target(hidden: Tensor, head: Tensor | LMHead, target: Tensor, ignore_index: int) -> None:
    """`ValueError` unless `target` is int64, shaped like the positions of `hidden`, and in the vocabulary."""
    _expect(target.dtype == torch.int64, "target", "int64", target.dtype)
    wanted = list(hidden.shape[:-1])
    _expect(list(target.shape) == wanted, "target", f"{wanted} to match hidden", list(target.shape))
    v = as_head(head).weight.shape[0]
    outside = target[(target != ignore_index) & ((target < 0) | (target >= v))].tolist()
    _expect(not outside, "target", f"{ignore_index} or 0 … {v - 1}", outside[:1])


def _expect(holds: bool, argument: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {got}")
