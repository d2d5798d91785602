"""The dense oracle: materialised logits and the papers' formulas as printed, for tests and comparisons.

Everything runs in the dtype of its inputs, as a naive implementation would; give float64 for ground truth.
It shares no code with the engine and takes the longer road on purpose: a Python loop over the responses, the
other tokens gathered into a [n, V−1] tensor of their own, sums over all V tokens, and autograd's gradient.

Dimensions: B responses, T positions of a padded response, N positions of a packed batch, H hidden size,
V vocabulary, n tokens of a response that aren't masked, G groups of K responses each, U units (responses, pairs
or groups). Formulas: S = log π_θ(y), Δ = S − log π_ref(y), S̄ = S/n; w chosen, l rejected; σ the sigmoid.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025); SWEPO is arXiv 2412.04628; MC-PO is arXiv 2502.04567.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

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
        ValueError: H or the dtypes differ, or the head is sharded.
    """
    weight, bias, softcap, scale, shard = as_head(head)
    _expect(shard is None, "head.shard", "None, a whole head", shard)
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
    """A formula of one response, one (chosen, rejected) pair, one group, or all responses together, over a batch.

    Called as `dpo(hidden, head, target, ref=ref, beta=0.1)`:

    Args:
        hidden: [B, T, H], or packed [N, H].
        head: weight [V, H] or an `LMHead`, in the dtype of `hidden`.
        target: int64 [B, T] or [N]; target[t] is what hidden[t] predicts. Pairs: [chosen; rejected] stacked.
            Groups: K consecutive responses; those without tokens don't take part.
        ref: log π_ref of the targets, in the shape of `target`; detached.
        ref_logits: the reference's logits [*target.shape, V] in place of `ref`; detached. They say more where
            the reference is nearly certain: 1 − π_ref is then the sum over the other tokens.
        label: [B] bool or ±1.
        group_size: K.
        rewards: [G, K]; finite where the response has tokens.
        drawn: for each group the rows of the negatives that were drawn, counted from 1 (row 0 is y₀).
        cu_seqlens: integers [B + 1], the bounds of the packed responses.
        ignore_index: the target that marks a masked position. Its hidden state and reference are never read.
        temperature: what the policy's logits are divided by.
        reduction: "mean", "sum" or "none" over the units.
        options: the keywords of the formula.

    Returns:
        0-d, or [U] for "none", in the dtype of `hidden`. A unit without any token is exactly 0.

    Raises:
        ValueError: shapes, dtypes or values that don't fit; an argument missing or without use.
        TypeError: an option that the formula doesn't have.
    """

    def __init__(
        self,
        formula: Callable[..., Tensor],
        *,
        unit: str = "response",
        ref: bool = False,
        label: bool = False,
        rewards: bool = False,
        drawn: bool = False,
    ) -> None:
        self.formula, self.unit, self.pair = formula, unit, unit == "pair"
        self.needs_ref, self.needs_label, self.needs_rewards, self.needs_drawn = ref, label, rewards, drawn
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
        group_size: int | None = None,
        rewards: Tensor | None = None,
        drawn: Sequence[Sequence[int]] | None = None,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        reduction: str = "mean",
        **options: Any,
    ) -> Tensor:
        given = [name for name, x in (("ref", ref), ("ref_logits", ref_logits)) if x is not None]
        wanted = "one of ref and ref_logits" if self.needs_ref else "no reference"
        _expect(len(given) == self.needs_ref, "ref", f"{wanted} for {self.__name__}", given or None)
        for name, value, needed, kind in (
            ("label", label, self.needs_label, "labels [B]"),
            ("group_size", group_size, self.unit == "group", "the size K of a group"),
            ("rewards", rewards, self.needs_rewards, "rewards [G, K]"),
            ("drawn", drawn, self.needs_drawn, "the drawn rows of each group"),
        ):
            _expect((value is not None) == needed, name, f"{kind if needed else None} for {self.__name__}", value)
        _expect(reduction in ("mean", "sum", "none"), "reduction", "'mean', 'sum' or 'none'", repr(reduction))
        responses = _responses(
            hidden, head, target, ref, ref_logits, label, cu_seqlens, ignore_index, temperature
        )  # fmt: skip
        if self.unit == "batch":
            values = self._of_batch(responses, options)
        elif group_size is not None:
            values = torch.stack(self._of_groups(responses, group_size, rewards, drawn, options))
        else:
            half = len(responses) // 2
            if self.pair:
                _expect(2 * half == len(responses), "target", "chosen and rejected responses", len(responses))
            units = zip(responses[:half], responses[half:]) if self.pair else zip(responses)
            values = torch.stack(
                [self.formula(*unit, **options) if any(len(r.y) for r in unit) else _zero(unit) for unit in units]
            )
        return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()

    def _of_groups(
        self,
        responses: list[Response],
        k: int,
        rewards: Tensor | None,
        drawn: Sequence[Sequence[int]] | None,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """One value per group. Without rewards, row 0 is y₀, and a group without it has nothing to learn from."""
        wanted = f"a divisor of the {len(responses)} responses"
        _expect(k > 0 and len(responses) % k == 0, "group_size", wanted, k)
        groups = [responses[i : i + k] for i in range(0, len(responses), k)]
        taking_part = [[i for i, r in enumerate(group) if len(r.y)] for group in groups]
        if rewards is not None:
            shape = [len(groups), k]
            _expect(list(rewards.shape) == shape, "rewards", f"[G, K] = {shape}", list(rewards.shape))
            finite = all(rewards[g, rows].isfinite().all() for g, rows in enumerate(taking_part))
            _expect(finite, "rewards", "finite values where a response has tokens", rewards.tolist())
        if drawn is not None:
            fits = len(drawn) == len(groups) and all(0 < i < k for rows in drawn for i in rows)
            _expect(fits, "drawn", f"rows 1 … {k - 1} for each of {len(groups)} groups", drawn)
            taking_part = [[i for i in present if i in (0, *rows)] for present, rows in zip(taking_part, drawn)]
        values = []
        for g, (group, rows) in enumerate(zip(groups, taking_part)):
            present = [group[i] for i in rows]
            if not rows or (rewards is None and rows[0] != 0):
                values.append(_zero(group))
            elif rewards is None:
                values.append(self.formula(present, **options))
            else:
                values.append(self.formula(present, rewards[g, rows].to(present[0].z), **options))
        return values

    def _of_batch(self, responses: list[Response], options: dict[str, Any]) -> Tensor:
        """One value per response, from a formula of all that have tokens; 0 for the others. [B]"""
        present = [r for r in responses if len(r.y)]
        values = iter(self.formula(present, **options) if present else ())
        return torch.stack([next(values) if len(r.y) else _zero([r]) for r in responses])


def _zero(responses: Sequence[Response]) -> Tensor:
    """The sum of no element: a 0 that can still be differentiated."""
    return torch.cat([r.z[:0] for r in responses]).sum()


@Loss
def mle(r: Response, *, length_normalize: bool = True) -> Tensor:
    """−log π(y), per token by default: maximum likelihood. RGPB Eq. 2–3."""
    return -r.logp(length_normalize)


@partial(Loss, unit="pair")
def nll_pll(w: Response, l: Response, *, length_normalize: bool = True) -> Tensor:
    """−log π(y_w) + log π(y_l), per token by default. BNF Eq. 1."""
    return -w.logp(length_normalize) + l.logp(length_normalize)


@partial(Loss, unit="pair")
def unlikelihood(w: Response, l: Response, *, alpha: float = 1.0) -> Tensor:
    """−mean_t log p_t over y_w − α · mean_t log(1 − p_t) over y_l. RGPB Eq. 5; Welleck et al. 2020.

    1 − p is the sum of the other tokens' probabilities, so it doesn't round to 0.
    """
    return -w.logp(True) - alpha * l.reduce(_log_rest(l.z, l.y), True)


@partial(Loss, unit="pair")
def exmate(w: Response, l: Response, *, beta: float = 1.0, length_normalize: bool = True) -> Tensor:
    """−log π(y_w) + β π(y_l), both log-probabilities per token by default. RGPB Eq. 6."""
    return -w.logp(length_normalize) + beta * l.logp(length_normalize).exp()


@partial(Loss, unit="pair", ref=True)
def dpo(w: Response, l: Response, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), m = β(Δ_w − Δ_l). RGPB Eq. 4 is ε = 0; Rafailov et al. 2023."""
    m = beta * (w.log_ratio() - l.log_ratio())
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


@partial(Loss, unit="pair", ref=True)
def ipo(w: Response, l: Response, *, tau: float = 0.1, length_normalize: bool = True) -> Tensor:
    """(Δ_w − Δ_l − 1/(2τ))², each Δ per token by default. BNF Table 2; Azar et al. 2023."""
    return (w.log_ratio(length_normalize) - l.log_ratio(length_normalize) - 1 / (2 * tau)) ** 2


@partial(Loss, unit="pair")
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


@partial(Loss, unit="pair")
def sequence_unlikelihood(w: Response, l: Response, *, alpha: float = 1.0, length_normalize: bool = False) -> Tensor:
    """−S_w − α log(1 − e^{S_l}), or with S̄ in both. RGPB Eq. 5 for whole responses. An empty y_l adds nothing."""
    return -w.logp(length_normalize) - (alpha * _log_complement(l, length_normalize) if len(l.y) else 0)


@partial(Loss, unit="pair")
def slic(w: Response, l: Response, *, delta: float = 1.0, lam: float = 0.0) -> Tensor:
    """max(0, δ − S_w + S_l) − λ S̄_w. BNF Table 2, where λ is 0; Zhao et al. 2023."""
    return (delta - w.logp() + l.logp()).clamp(min=0) - lam * w.logp(True)


@partial(Loss, unit="pair")
def cpo(
    w: Response,
    l: Response,
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    lam: float = 1.0,
    length_normalize: bool = False,
) -> Tensor:
    """−log σ(β(S_w − S_l) − γ) − λ S̄_w, or S̄ in both terms. Xu et al. 2024.

    MC-PO Table 5 has the second form, with λβ for λ.
    """
    margin = beta * (w.logp(length_normalize) - l.logp(length_normalize)) - gamma
    return -F.logsigmoid(margin) - lam * w.logp(True)


@partial(Loss, unit="pair")
def orpo(w: Response, l: Response, *, lam: float = 0.1) -> Tensor:
    """−S̄_w − λ log σ(log odds(y_w) − log odds(y_l)), odds = e^{S̄} / (1 − e^{S̄}). Hong et al. 2024, Eq. 6–7.

    Without tokens on one side there is no odds ratio, and no second term.
    """
    if not (len(w.y) and len(l.y)):
        return -w.logp(True)
    odds_w, odds_l = (r.logp(True) - _log_complement(r, True) for r in (w, l))
    return -w.logp(True) - lam * F.logsigmoid(odds_w - odds_l)


@partial(Loss, unit="pair", ref=True)
def rdpo(w: Response, l: Response, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """−log σ(β(Δ_w − Δ_l) + α(n_w − n_l)): DPO for the reward r − α n. Park et al. 2024."""
    return -F.logsigmoid(beta * (w.log_ratio() - l.log_ratio()) + alpha * len(w.y) - alpha * len(l.y))


@partial(Loss, unit="pair", ref=True)
def rpo(w: Response, l: Response, *, beta: float = 0.1, lam: float = 1.0) -> Tensor:
    """−log σ(β(Δ_w − Δ_l)) − λ S̄_w. Pang et al. 2024; MC-PO Table 5 prints Δ_w for S̄_w."""
    return -F.logsigmoid(beta * (w.log_ratio() - l.log_ratio())) - lam * w.logp(True)


@partial(Loss, unit="pair", ref=True)
def exo(w: Response, l: Response, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """KL(p ‖ q) of p = (σ(m), σ(−m)), m = β(Δ_w − Δ_l), from q = (1 − ε, ε). Ji et al. 2024, Eq. 16."""
    m = beta * (w.log_ratio() - l.log_ratio())
    log_p = torch.stack([F.logsigmoid(m), F.logsigmoid(-m)])
    return (log_p.exp() * (log_p - log_p.new_tensor([1 - epsilon, epsilon]).log())).sum()


@partial(Loss, unit="pair", ref=True)
def sppo(w: Response, l: Response, *, beta: float = 0.1) -> Tensor:
    """(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))². Wu et al. 2024; MC-PO Table 5 prints β/2 for 1/(2β)."""
    return (w.log_ratio() - 1 / (2 * beta)) ** 2 + (l.log_ratio() + 1 / (2 * beta)) ** 2


@partial(Loss, unit="pair", ref=True)
def nca_pair(w: Response, l: Response, *, beta: float = 0.1) -> Tensor:
    """−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l). MC-PO Table 5; Chen et al. 2024."""
    reward_w, reward_l = beta * w.log_ratio(), beta * l.log_ratio()
    return -F.logsigmoid(reward_w) - 0.5 * F.logsigmoid(-reward_w) - 0.5 * F.logsigmoid(-reward_l)


@partial(Loss, unit="pair", ref=True)
def apo_zero(w: Response, l: Response, *, beta: float = 0.1) -> Tensor:
    """1 − σ(βΔ_w) + σ(βΔ_l). D'Oosterlinck et al. 2024, Eq. 7."""
    return 1 - torch.sigmoid(beta * w.log_ratio()) + torch.sigmoid(beta * l.log_ratio())


@partial(Loss, unit="pair", ref=True)
def apo_down(w: Response, l: Response, *, beta: float = 0.1) -> Tensor:
    """σ(βΔ_w) + 1 − σ(β(Δ_w − Δ_l)). D'Oosterlinck et al. 2024, Eq. 8."""
    return torch.sigmoid(beta * w.log_ratio()) + 1 - torch.sigmoid(beta * (w.log_ratio() - l.log_ratio()))


@partial(Loss, unit="batch", ref=True, label=True)
def bco(responses: list[Response], *, beta: float = 0.1, delta: float | None = None) -> Tensor:
    """−log σ(label · (βΔ − δ)), δ the detached mean of βΔ over the batch unless given. Jung et al. 2024. [B]

    MC-PO Table 5 prints −βΔ − δ for the rejected, where the label's sign belongs to δ, too.
    """
    rewards, label = _rewards(responses, beta), _labels(responses)
    shift = rewards.detach().mean() if delta is None else delta
    return -F.logsigmoid(label * (rewards - shift))


@partial(Loss, unit="batch", ref=True, label=True)
def kto(
    responses: list[Response],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z0: float | Tensor | None = None,
) -> Tensor:
    """w · (1 − σ(label · β(Δ − z₀))), w by the label. Ethayarajh et al. 2024, Eq. 7–8. [B]

    z₀, detached: max(0, mean Δ) of the batch, or of mismatched completions whose Δ are given as a tensor; a number
    is taken as it is.
    """
    delta, label = _rewards(responses, 1.0), _labels(responses)
    if z0 is None or isinstance(z0, Tensor):
        z0 = (delta if z0 is None else z0.to(delta)).detach().mean().clamp(min=0)
    weight = torch.where(label > 0, desirable_weight * label, -undesirable_weight * label)
    return weight * (1 - torch.sigmoid(label * beta * (delta - z0)))


@partial(Loss, unit="group", ref=True, rewards=True)
def infonca(group: list[Response], rewards: Tensor, *, beta: float = 0.1, tau: float = 1.0) -> Tensor:
    """−Σ_k softmax(r/τ)_k log softmax(βΔ)_k. SWEPO Eq. 23; Chen et al. 2024."""
    return -((rewards / tau).softmax(0) * _rewards(group, beta).log_softmax(0)).sum()


@partial(Loss, unit="group", ref=True, rewards=True)
def nca(group: list[Response], rewards: Tensor, *, beta: float = 0.1, tau: float = 1.0) -> Tensor:
    """−Σ_k softmax(r/τ)_k log σ(βΔ_k) − (1/K) Σ_k log σ(−βΔ_k). Chen et al. 2024."""
    s = _rewards(group, beta)
    return -((rewards / tau).softmax(0) * F.logsigmoid(s)).sum() - F.logsigmoid(-s).mean()


@partial(Loss, unit="group", ref=True, rewards=True)
def swepo(
    group: list[Response],
    rewards: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    p: float = 2,
    mode: str = "above_mean",
) -> Tensor:
    """−log Σ_{Y+} e^s / Σ_all e^s, s = βΔ + α |d|^p, d = r − mean r. SWEPO Eq. 9–11, 15–17.

    Y+ is {d > 0}, or only the best of it (the first of several) for `mode="one_vs_all"`. 0 where Y+ is empty, which
    is where all rewards are equal.
    """
    _expect(mode in ("above_mean", "one_vs_all"), "mode", "'above_mean' or 'one_vs_all'", repr(mode))
    d = rewards - rewards.mean()
    s = _rewards(group, beta) + alpha * d.abs() ** p
    best = torch.arange(len(group), device=d.device) == rewards.argmax()
    positive = d > 0 if mode == "above_mean" else (d > 0) & best
    if not positive.any():
        return _zero(group)
    return s.logsumexp(0) - s[positive].logsumexp(0)


@partial(Loss, unit="group", ref=True)
def rnce(group: list[Response], *, beta: float = 0.1) -> Tensor:
    """−βΔ_0 + log Σ_i e^{βΔ_i}; the first response is y₀. MC-PO Eq. 7."""
    s = _rewards(group, beta)
    return -s[0] + s.logsumexp(0)


@partial(Loss, unit="group", ref=True, drawn=True)
def mc_po(group: list[Response], *, beta: float = 0.1) -> Tensor:
    """`rnce` of y₀ and the negatives that were drawn. MC-PO Algorithm 1; the draw itself is the caller's (`drawn`)."""
    return rnce.formula(group, beta=beta)


@partial(Loss, unit="group", ref=True, rewards=True)
def multi_dpo(
    group: list[Response],
    rewards: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairing: str = "best",
) -> Tensor:
    """Mean of `dpo` over (the best, each with a lower reward), or over all (i, j) with r_i > r_j. SWEPO Appendix E.

    0 where all rewards are equal.
    """
    _expect(pairing in ("best", "all"), "pairing", "'best' or 'all'", repr(pairing))
    r = rewards.tolist()
    winners = range(len(r)) if pairing == "all" else [r.index(max(r))]
    values = [
        dpo.formula(group[i], group[j], beta=beta, label_smoothing=label_smoothing)
        for i in winners
        for j in range(len(r))
        if r[i] > r[j]
    ]
    return torch.stack(values).mean() if values else _zero(group)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(mle, nll_pll, unlikelihood, sequence_unlikelihood, exmate, bnf, dpo, ipo, simpo, slic, cpo, orpo, rdpo, rpo),
        *(exo, sppo, nca_pair, apo_zero, apo_down, bco, kto),
        *(infonca, nca, swepo, rnce, mc_po, multi_dpo),
    )
}


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


def _log_complement(r: Response, length_normalize: bool) -> Tensor:
    """log(1 − π(y)), or log(1 − e^{S̄}), without a difference from 1. 0-d.

    Whatever isn't y leaves it at exactly one token: 1 − π(y) = Σ_t (1 − p_t) Π_{u<t} p_u. So a small complement keeps
    its digits, and a probable response takes its S from it, since S itself has rounded.
    """
    log_p = _at(r.z.log_softmax(-1), r.y)
    before = torch.cat([log_p.new_zeros(1), log_p.cumsum(0)])[: len(r.y)]
    log_rest = (before + _log_rest(r.z, r.y)).logsumexp(0)
    if not length_normalize:
        return log_rest
    s = torch.log1p(-log_rest.exp()) if log_rest < math.log(0.5) else log_p.sum()
    return torch.log(-torch.expm1(r.reduce(s, True)))


def _rewards(responses: list[Response], beta: float) -> Tensor:
    """βΔ of each. [K]"""
    return torch.stack([beta * r.log_ratio() for r in responses])


def _labels(responses: list[Response]) -> Tensor:
    return torch.stack([r.z.new_tensor(r.label) for r in responses])


def _responses(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    ref: Tensor | None,
    ref_logits: Tensor | None,
    label: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    temperature: float,
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
        z, y = logits(hidden[place][mask], head) / temperature, target[place][mask]
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
