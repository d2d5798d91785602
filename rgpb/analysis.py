"""What a loss does to a model, seen from token scores: coefficients, likelihood–derivative curves, differences between
preferred and dispreferred responses, and shifts from one model to another. Numbers first; `plot_*` draws them.

Everything is a function of `TokenScores` but two definitions that speak of the whole vocabulary, `gradient_difference`
and `vocabulary_shift`: they take hidden states and the head, and hold a chunk of logits at a time.

Derivative means ∂L/∂·. Coefficient means −∂L/∂(log p): positive where gradient descent raises the token.

Dimensions: P token positions (masked ones included), B responses, B/2 pairs stacked `[chosen; rejected]`, T steps of
the longest response, U units, V vocabulary, H hidden size, G points of a curve, C × R points of a landscape.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.fused import check_groups, make_layout
from rgpb.head import LMHead, as_head
from rgpb.layout import Layout, Responses, TokenScores, pairs
from rgpb.logprob import check_inputs, token_scores
from rgpb.objectives import Objective, resolve, unit_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ObjectiveLike = str | Callable[..., Tensor] | Mapping[str, float]  # what `rgpb.objectives.resolve` takes

IGNORE = -100
SLICE = 1 << 14  # vocabulary entries whose weights are converted, or logits summed, at once
UNKNOWN = Objective("", lambda responses: responses.logps())  # one that may ask for anything

# -- responses --------------------------------------------------------------------------------------------------------


def make_responses(
    scores: TokenScores,
    target: Tensor,
    *,
    ref: TokenScores | None = None,
    label: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Responses:
    """Group a model's token scores into responses, detached.

    Args:
        scores: of `linear_logprob` or `rgpb.hf.token_scores`, in the shape of `target`; with `entropy=True` for
            objectives that read it (bnf).
        target: int64 [B, T], or packed [N] with `cu_seqlens`; `ignore_index` on prompt and padding.
        ref: the reference's scores in the same shape, or None.
        label: [B] bool or ±1, or None.
        rewards: [G, K], for objectives of groups that need them, or None.
        group_size: K, for objectives of groups without rewards.
        cu_seqlens: int32 or int64 [B+1], bounds of the packed responses.

    Raises:
        ValueError: shapes that don't fit, labels other than bool or ±1, or rewards that aren't finite.
    """
    layout = make_layout(target, cu_seqlens, ignore_index)
    flat = _flat("scores", scores, target)
    unscored = (flat.logp == 0) & (flat.log_odds == 0) & (flat.lse == 0)
    if layout.mask is not None and bool((layout.mask & unscored).any()):
        at = int((layout.mask & unscored).nonzero()[0])
        raise ValueError(
            f"target: expected {ignore_index} where nothing was scored, got a token at flat position {at}; the scores "
            "of a causal LM's batch stand at `rgpb.hf.aligned_targets(labels)`"
        )
    flat_ref = None if ref is None else _flat("ref", ref, target)
    if label is not None:
        signs = label.double() * 2 - 1 if label.dtype == torch.bool else label.double()
        if signs.shape != (layout.responses,) or not bool((signs.abs() == 1).all()):
            raise ValueError(f"label: expected [B={layout.responses}] of bool or ±1, got {_shown(label)}")
        label = signs
    if rewards is not None or group_size is not None:
        group_size, rewards = check_groups(UNKNOWN, group_size, rewards, layout, scores.logp)
    sums = None if flat_ref is None else layout.sum(flat_ref.logp)
    return Responses(flat, flat_ref, sums, label, layout, group_size, rewards)


# -- perplexity, agility, information and gradient difference ---------------------------------------------------------


def perplexity(responses: Responses) -> Tensor:
    """exp(−S̄), S̄ the mean token log-probability; NaN for a response without tokens. float64 [B]. RGPB §6."""
    return torch.exp(-_mean_logp(responses))


def agility(responses: Responses) -> Tensor:
    """e^{S̄_w} − e^{S̄_l}, S̄ the mean token log-probability; NaN where either has no token. float64 [B/2]. RGPB §6.

    Raises:
        ValueError: an odd number of responses.
    """
    chosen, rejected = _pairs("responses", _mean_logp(responses).exp())
    return chosen - rejected


class InformationDifference(NamedTuple):
    """How much more probability mass the preferred response has than the dispreferred.

    Attributes:
        probability: float64 [B/2], in (−1, 1).
        log_probability: float64 [B/2], the same of logarithms.
        steps: float64 [B/2, T], p(y_w,t) − p(y_l,t) at the t-th token of each; NaN where either has ended.
    """

    probability: Tensor
    log_probability: Tensor
    steps: Tensor


def information_difference(responses: Responses, *, length_normalize: bool = True) -> InformationDifference:
    """π(y_w) − π(y_l), and the same of log π.

    RGPB Definition 4.1 is a difference of probability masses of y+ and y−, aggregated over the steps, and §6 identifies
    agility with it. So the mass of a response is e^{S̄} here (`probability` is then `agility`), which doesn't vanish
    with the length; `length_normalize=False` takes e^S. The difference of logarithms is what DPO's coefficient depends
    on, and still tells responses apart whose masses are all nearly 0.

    Args:
        responses: pairs, stacked `[chosen; rejected]`.

    Raises:
        ValueError: an odd number of responses.
    """
    logp = _mean_logp(responses) if length_normalize else responses.logps().detach()
    chosen, rejected = _pairs("responses", logp)
    w, l = pairs(_by_step(responses.policy.logp.detach().double().exp(), responses.layout))
    return InformationDifference(chosen.exp() - rejected.exp(), chosen - rejected, w - l)


class GradientDifference(NamedTuple):
    """Distances between the output gradients of a pair at the same step; NaN where either response has ended.

    Attributes:
        softmax: [B/2, T], ‖p_w − p_l‖.
        output: [B/2, T], ‖(onehot(y_w) − p_w) − (onehot(y_l) − p_l)‖: the two gradients of log p on the logits.
        same_target: bool [B/2, T], y_w = y_l at that step; False past the end.
        pairs: [B/2], mean of `softmax` over the steps; NaN for a pair without a common step.
    """

    softmax: Tensor
    output: Tensor
    same_target: Tensor
    pairs: Tensor


@torch.no_grad()
def gradient_difference(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    order: float = 1.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
    workspace: int = DEFAULT_WORKSPACE,
) -> GradientDifference:
    """How far apart the gradients are that the two responses of a pair send into the logits, step by step.

    RGPB Definition 4.2 is the p-norm of the difference of two gradients at one step. By Lemma 4.1 it comes from the
    softmax distributions and from whether the targets are the same, and the paper goes on with the softmax part;
    `softmax` is that, `output` is both. The norm is over the vocabulary, so this needs logits: those of a chunk of
    steps at a time.

    Args:
        hidden: [B, T, H], or packed [N, H] with `cu_seqlens`; pairs stacked `[chosen; rejected]`.
        head: weight [V, H] or an `LMHead`.
        target: int64 [B, T] or [N]; step t is a response's t-th position whose target isn't `ignore_index`.
        order: p of the norm, ≥ 1 (`math.inf` for the largest entry). 1 is twice the total variation, so at most 2.
        workspace: bytes of logits held at most; at least one step is taken at a time.

    Returns:
        float32 tensors (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or targets that don't fit, an odd number of responses, or order < 1.
    """
    head = check_inputs(hidden, head, target, "auto", workspace)
    if not order >= 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    _check_range(target, len(head.weight), ignore_index)
    places = _places(make_layout(target, cu_seqlens, ignore_index), target.numel())
    w, l = _pairs("target", places)
    flat, y = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    both = (w >= 0) & (l >= 0)
    at_w, at_l = w[both], l[both]
    dtype = _result_dtype(hidden)
    softmax, output = flat.new_empty(2, len(at_w), dtype=dtype)
    rows = max(1, workspace // (4 * len(head.weight) * dtype.itemsize))  # a difference, logits and two temporaries
    for start in range(0, len(at_w), rows):
        part = slice(start, start + rows)
        i, j = at_w[part], at_l[part]
        difference = _logits(flat[i], head, dtype).softmax(-1)
        difference -= _logits(flat[j], head, dtype).softmax(-1)
        softmax[part] = torch.linalg.vector_norm(difference, order, -1)
        row = torch.arange(len(i), device=y.device)
        difference[row, y[i]] -= 1
        difference[row, y[j]] += 1
        output[part] = torch.linalg.vector_norm(difference, order, -1)

    def shown(values: Tensor) -> Tensor:
        return values.new_full(both.shape, torch.nan).masked_scatter(both, values)

    same = both.masked_scatter(both, y[at_w] == y[at_l])
    whole = shown(softmax)
    return GradientDifference(whole, shown(output), same, whole.nanmean(1))


# -- derivatives of the objectives ------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """What an objective does to each token. Positive: gradient descent raises it.

    Attributes:
        loss: [U], the value of each unit.
        logp: float64 [P], −∂L/∂(log p) of each position, L the sum over units; 0 at masked positions.
        logit: float64 [P], −∂L/∂z_y, the other logits fixed.
        probability: float64 [P], p; NaN at masked positions.
    """

    loss: Tensor
    logp: Tensor
    logit: Tensor
    probability: Tensor


def coefficients(objective: ObjectiveLike, responses: Responses, **options: Any) -> Coefficients:
    """Each token's coefficient under an objective: by RGPB Lemma 4.1 all there is of a method's gradient.

    By autograd through the objective itself, so also for one of your own. A dependence on the log-odds or the lse
    counts as one on log p with the other logits fixed.

    Args:
        objective: a name, a weighted sum ("mle + 0.5*dpo", or a mapping), or a function of `Responses`.
        responses: with the reference, labels, rewards or groups that the objective needs (`make_responses`).
        **options: the objective's own.

    Raises:
        ValueError: an unknown objective or option, an odd number of responses for pairs, or something missing that the
            objective needs.
    """
    spec = _spec(objective, options)
    if spec.unit == "pair":
        _pairs("responses", responses.layout.tokens)
    loss, logp, logit = _derivatives(spec, responses, options)
    probability = responses.policy.logp.detach().double().exp()
    if responses.layout.mask is not None:
        probability = torch.where(responses.layout.mask, probability, torch.nan)
    return Coefficients(loss, -logp, -logit, probability)


class Curve(NamedTuple):
    """A loss and its derivatives along a token's likelihood. All float64 [G].

    Attributes:
        probability: p, as given.
        loss: of the pair that the token is in (of the token alone for an objective that knows no rejected).
        logp: ∂L/∂(log p).
        prob: ∂L/∂p.
        logit: ∂L/∂z_y, the token's logit, the others fixed. BNF Figure 1 draws its absolute value.
    """

    probability: Tensor
    loss: Tensor
    logp: Tensor
    prob: Tensor
    logit: Tensor


class LikelihoodCurves(NamedTuple):
    """The curve of a chosen token and of a rejected one; None where an objective (mle) knows no rejected."""

    chosen: Curve
    rejected: Curve | None


def likelihood_curves(
    objective: ObjectiveLike,
    probability: Tensor,
    *,
    ref: float = 0.5,
    partner: float | None = None,
    other_entropy: float = 0.0,
    **options: Any,
) -> LikelihoodCurves:
    """How hard an objective pushes a token, against how likely it is: BNF Figure 1, for any objective.

    Responses of one token each. While one moves along `probability`, the other response of its pair stays at `partner`.
    With labels (bnf) chosen and rejected are labelled +1 and −1. An objective that couples the batch sees one such pair
    at a time as its batch: give kto's `z0` and bco's `delta` a number where that is to be a constant. By autograd
    through the objective.

    Args:
        objective: a name, a weighted sum or a function of `Responses`, with one value per response or pair.
        probability: [G], each in (0, 1).
        ref: the reference's probability of either token.
        partner: the probability of the token that stays; default `ref`, where training starts.
        other_entropy: entropy of the distribution over the other tokens. Only the loss of objectives that read it (bnf)
            depends on it.
        **options: the objective's own.

    Raises:
        ValueError: a probability outside (0, 1), an unknown objective or option, or an objective of groups.
    """
    spec = _pairwise(objective, options)
    p = _probabilities("probability", probability)
    held = _probabilities("partner", torch.full_like(p, ref if partner is None else partner))
    curves = []
    for side, (w, l) in enumerate(((p, held), (held, p))):
        loss, logp, logit = _of_pairs(spec, w, l, ref, other_entropy, options)
        logp, logit = logp[side], logit[side]
        curves.append(Curve(p, loss, logp, logp / p, logit))
    return LikelihoodCurves(curves[0], None if _alone(spec) else curves[1])


class Landscape(NamedTuple):
    """Coefficients of a pair over a grid of probabilities. Positive: gradient descent raises that response.

    Attributes:
        pi_chosen, pi_rejected: float64 [C] and [R], the grid.
        chosen: float64 [C, R], −∂L/∂log π(y+).
        rejected: float64 [C, R], −∂L/∂log π(y−).
        total: float64 [C, R], their sum: what pushes a token that both share, where ∇log π(y+) = ∇log π(y−).
        total_probability: float64 [C, R], −∂L/∂π(y+) − ∂L/∂π(y−): the same where ∇π(y+) = ∇π(y−) instead. RGPB
            Eq. 22–24 and Figure 2, as its text describes them.
    """

    pi_chosen: Tensor
    pi_rejected: Tensor
    chosen: Tensor
    rejected: Tensor
    total: Tensor
    total_probability: Tensor


def coefficient_landscape(
    objective: ObjectiveLike,
    pi_chosen: Tensor,
    pi_rejected: Tensor,
    *,
    ref: float = 0.5,
    other_entropy: float = 0.0,
    **options: Any,
) -> Landscape:
    """The coefficients on log π(y+) and log π(y−) of an objective, over (π+, π−), with responses of one token.

    RGPB §5.2 asks what becomes of a token that y+ and y− share: the two gradients meet in it. With c the coefficients
    on log π, what it says of the three methods is true of c₊/π₊ + c₋/π₋ and not of c₊ + c₋: DPO's has the sign of
    π₋ − π₊, Unlikelihood's explodes as π₋ → 1, ExMATE's depends on π₊ alone and is positive for β < 1. That is
    `total_probability`. `total` is the sum where the contexts are the same, and with them the derivatives of the
    logarithms: 0 for DPO, 1 − β π₋ for ExMATE.

    Args:
        objective: of pairs or with labels: a name, a weighted sum or a function of `Responses`.
        pi_chosen, pi_rejected: [C] and [R], each in (0, 1).
        ref: the reference's probability of either; equal ones cancel in DPO.
        other_entropy: as `likelihood_curves`.
        **options: the objective's own.

    Raises:
        ValueError: a probability outside (0, 1), an unknown objective or option, an objective of groups, or one that
            knows no rejected response (mle).
    """
    spec = _pairwise(objective, options)
    if _alone(spec):
        raise ValueError(f"objective: expected one that tells chosen from rejected, got {spec.name}")
    pi_chosen, pi_rejected = _probabilities("pi_chosen", pi_chosen), _probabilities("pi_rejected", pi_rejected)
    grid = torch.meshgrid(pi_chosen, pi_rejected, indexing="ij")
    _, logp, _ = _of_pairs(spec, grid[0].reshape(-1), grid[1].reshape(-1), ref, other_entropy, options)
    c = -logp.view(2, *grid[0].shape)
    return Landscape(pi_chosen, pi_rejected, c[0], c[1], c[0] + c[1], c[0] / grid[0] + c[1] / grid[1])


# -- shifts from one model to another ---------------------------------------------------------------------------------


def gini(values: Tensor) -> Tensor:
    """Gini coefficient over the last dimension: Σ_ij abs(x_i − x_j) / (2 N Σ_i x_i). float64 [..., N] → [...].

    0: all equal (also where all are 0); 1 − 1/N: one has everything. Gini 1912; BNF §5.3.

    Raises:
        ValueError: no value, or one that is negative or not finite.
    """
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values: expected shape [..., N] with N ≥ 1, got {list(values.shape)}")
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError("values: expected finite numbers of at least 0, got others")
    return _gini(values.double(), torch.full(values.shape[:-1], values.shape[-1], device=values.device))


class Shifts(NamedTuple):
    """What changed on the same responses from one model to another: the six panels of BNF Figure 3. All float64.

    Attributes:
        logp: [B], change of Σ log p.
        logp_mean: [B], per token; NaN for a response without tokens.
        logit: [B], Σ_t abs(change of z_y), z_y the logit of the response's own token.
        logit_mean: [B], per token; NaN likewise.
        gini: [B], Gini coefficient of abs(change of z_y) over the response's tokens; NaN likewise.
        token_logp, token_logit: [P], the changes of each position, with sign; NaN at masked positions.
    """

    logp: Tensor
    logp_mean: Tensor
    logit: Tensor
    logit_mean: Tensor
    gini: Tensor
    token_logp: Tensor
    token_logit: Tensor


def shifts(
    before: TokenScores,
    after: TokenScores,
    target: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Shifts:
    """Shifts of the log-likelihood and of the tokens' logits, and how evenly the latter spread over a response.

    BNF §5.3 compares policy and reference on generated responses. Of the logits it looks at the tokens of the response
    (its Gini coefficient tells whether a shift comes from many tokens or few); z_y = log p + lse, so token scores are
    enough and no logit is formed. For the whole vocabulary: `vocabulary_shift`.

    Args:
        before, after: scores of the same `target` under two models, in its shape.
        target: int64 [B, T], or packed [N] with `cu_seqlens`; `ignore_index` on prompt and padding.

    Raises:
        ValueError: shapes that don't fit, or scores whose `lse` is 0 throughout (they came from log-probabilities).
    """
    layout = make_layout(target, cu_seqlens, ignore_index)
    flat = {name: _flat(name, scores, target) for name, scores in (("before", before), ("after", after))}
    for name, scores in flat.items():
        if bool((scores.logp != 0).any()) and not bool((scores.lse != 0).any()):
            raise ValueError(f"{name}.lse: expected the logsumexp of the logits, got 0 throughout")
    old, new = flat["before"], flat["after"]
    logp = new.logp.double() - old.logp.double()
    logit = logp + (new.lse.double() - old.lse.double())
    size, tokens = logit.abs(), layout.tokens
    by_step = _by_step(size, layout)

    def shown(per_response: Tensor) -> Tensor:
        return torch.where(tokens > 0, per_response, torch.nan)

    def masked(per_token: Tensor) -> Tensor:
        return per_token if layout.mask is None else torch.where(layout.mask, per_token, torch.nan)

    return Shifts(
        logp=layout.sum(logp),
        logp_mean=shown(layout.mean(logp)),
        logit=layout.sum(size),
        logit_mean=shown(layout.mean(size)),
        gini=shown(_gini(by_step.nan_to_num(0.0), tokens)),
        token_logp=masked(logp),
        token_logit=masked(logit),
    )


def percentile_shares(values: Tensor, baseline: Tensor, *, bins: int = 10) -> Tensor:
    """The share of `values` in each percentile bin of `baseline`: BNF Figure 4. float64 [bins], summing to 1.

    1 / bins everywhere: spread as the baseline; more at both ends: more polarised. A value outside the baseline's range
    counts in the bin at its end, one on an edge above it; NaN (a masked token of `Shifts.token_logp`) doesn't count.

    Args:
        values, baseline: any shapes, such as `Shifts.token_logp` of two models that came from one.

    Raises:
        ValueError: no value that isn't NaN, or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    found = []
    for name, given in (("values", values), ("baseline", baseline)):
        x = given.detach().double().reshape(-1)
        x = x[~x.isnan()]
        if not len(x):
            raise ValueError(f"{name}: expected at least one number, got {_shown(given)}")
        found.append(x)
    x, base = found[0], found[1].sort().values
    # numpy's "linear" quantiles; torch.quantile refuses more than 16M elements
    at = torch.arange(1, bins, dtype=torch.float64, device=x.device) * (len(base) - 1) / bins
    low, high = base[at.floor().long()], base[at.ceil().long()]
    edges = torch.lerp(low, high, at - at.floor())
    which = torch.searchsorted(edges, x, right=True)
    return (which[:, None] == torch.arange(bins, device=x.device)).double().mean(0)


class VocabularyShift(NamedTuple):
    """Change of every vocabulary entry's logit, over tokens.

    Attributes:
        mean: float64 [V], mean over the tokens of the change of z_k.
        absolute: float64 [V], mean of its absolute value.
        gini: float64 0-d, Gini coefficient of `absolute`: 0 where all entries shift alike.
        tokens: how many tokens.
    """

    mean: Tensor
    absolute: Tensor
    gini: Tensor
    tokens: int


@torch.no_grad()
def vocabulary_shift(
    hidden_before: Tensor,
    head_before: Tensor | LMHead,
    hidden_after: Tensor,
    head_after: Tensor | LMHead,
    target: Tensor,
    *,
    ignore_index: int = IGNORE,
    workspace: int = DEFAULT_WORKSPACE,
) -> VocabularyShift:
    """How the logits of the whole vocabulary moved between two models, averaged over the tokens of `target`.

    BNF §5.3's logit shift for every entry instead of the response's own tokens. Sums per entry are accumulated over
    chunks of tokens and slices of the vocabulary, so logits never exist as [tokens, V].

    Args:
        hidden_before, hidden_after: [..., H] of the two models (their H may differ) at the same places.
        head_before, head_after: weight [V, H] or an `LMHead`, over one vocabulary.
        target: int64 [...]; places with `ignore_index` don't count. Otherwise its values aren't read.
        workspace: bytes of logits held at most.

    Raises:
        ValueError: shapes, dtypes or vocabularies that don't fit, or no token.
    """
    (old, old_head), (new, new_head) = (
        (hidden, _checked(hidden, head, target, workspace, side))
        for hidden, head, side in ((hidden_before, head_before, "before"), (hidden_after, head_after, "after"))
    )
    vocab = len(old_head.weight)
    if len(new_head.weight) != vocab:
        raise ValueError(f"head_after: expected the vocabulary of head_before, {vocab}, got {len(new_head.weight)}")
    where = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    if not len(where):
        raise ValueError("target: expected at least one token that isn't ignored, got none")
    dtype = torch.promote_types(_result_dtype(old), _result_dtype(new))
    flat = [hidden.reshape(-1, hidden.shape[-1]) for hidden in (old, new)]
    columns = min(vocab, SLICE)
    rows = max(1, workspace // (4 * columns * dtype.itemsize))  # two chunks of logits and two temporaries
    total, absolute = torch.zeros(2, vocab, dtype=torch.float64, device=old.device)
    for start in range(0, len(where), rows):
        at = where[start : start + rows]
        x_old, x_new = (x[at] for x in flat)
        for first in range(0, vocab, columns):
            part = slice(first, first + columns)
            change = _logits(x_new, _slice(new_head, part), dtype) - _logits(x_old, _slice(old_head, part), dtype)
            total[part] += change.sum(0, dtype=torch.float64)
            absolute[part] += change.abs_().sum(0, dtype=torch.float64)
    total, absolute = total / len(where), absolute / len(where)
    return VocabularyShift(total, absolute, gini(absolute), len(where))


# -- plots ------------------------------------------------------------------------------------------------------------
# One convention: names to results, one colour each, and a Figure back; with a path also a whole PNG file or none.


def plot_perplexity_agility(runs: Mapping[str, Responses], path: str | Path | None = None) -> Figure:
    """Each pair as a dot, agility to the right and perplexity of the chosen upwards, and each run's mean as a cross.

    Args:
        runs: name → pairs, stacked `[chosen; rejected]`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs, or an odd number of responses.
    """
    figure, axes = _figure("runs", runs, 1, 1)
    for i, (name, responses) in enumerate(runs.items()):
        x, (y, _) = agility(responses), pairs(perplexity(responses))
        known = ~(x.isnan() | y.isnan())
        x, y = x[known].cpu(), y[known].cpu()
        axes[0].plot(x, y, ".", color=f"C{i}", alpha=0.4, label=name)
        if len(x):
            axes[0].plot([x.mean()], [y.mean()], "x", color=f"C{i}", markersize=10, markeredgewidth=2)
    axes[0].set_yscale("log")
    _dress(axes[0], "perplexity and agility", "agility: e^S̄ of chosen − of rejected", "perplexity of the chosen")
    return _finish(figure, path)


def plot_information_difference(runs: Mapping[str, InformationDifference], path: str | Path | None = None) -> Figure:
    """Pairs in order of their difference, of probabilities and of log-probabilities (RGPB Figure 3a, b).

    Args:
        runs: name → `information_difference`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.probability, found.log_probability)):
            panel.plot(_ordered(values), ".-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], "information difference", "pairs, sorted", "π(y+) − π(y−)")
    _dress(axes[1], "of logarithms", "pairs, sorted", "log π(y+) − log π(y−)")
    return _finish(figure, path)


def plot_gradient_difference(runs: Mapping[str, GradientDifference], path: str | Path | None = None) -> Figure:
    """Mean over the pairs at each step (RGPB Figure 3c): of the softmax distributions, and with the targets.

    Args:
        runs: name → `gradient_difference`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.softmax, found.output)):
            panel.plot(values.nanmean(0).cpu(), ".-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], "gradient difference: softmax", "step", "‖p+ − p−‖")
    _dress(axes[1], "with the target tokens", "step", "‖(1[y+] − p+) − (1[y−] − p−)‖")
    return _finish(figure, path)


def plot_coefficients(runs: Mapping[str, Coefficients], path: str | Path | None = None) -> Figure:
    """Each token as a dot: its coefficient on log p and on its logit, against its probability.

    Args:
        runs: name → `coefficients`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.logp, found.logit)):
            panel.plot(found.probability.cpu(), values.cpu(), ".", color=f"C{i}", alpha=0.4, label=name)
    _dress(axes[0], "coefficient on log p", "p of the token", "−∂L/∂ log p")
    _dress(axes[1], "coefficient on the logit", "p of the token", "−∂L/∂z")
    return _finish(figure, path)


def plot_likelihood_curves(
    curves: Mapping[str, LikelihoodCurves], path: str | Path | None = None, *, derivative: str = "logit"
) -> Figure:
    """The size of a token's derivative against its likelihood, chosen and rejected side by side (BNF Figure 1).

    Args:
        curves: name → `likelihood_curves`.
        path: also write a PNG there.
        derivative: "logit", "logp" or "prob", the field of `Curve` to draw.

    Raises:
        ValueError: no curves, or an unknown derivative.
    """
    named = {"logit": "z", "logp": "log p", "prob": "p"}
    if derivative not in named:
        raise ValueError(f"derivative: expected one of {sorted(named)}, got {derivative!r}")
    figure, axes = _figure("curves", curves, 1, 2)
    for i, (name, both) in enumerate(curves.items()):
        for panel, curve in zip(axes, both):
            if curve is not None:
                size = getattr(curve, derivative).abs()
                panel.plot(curve.probability.cpu(), size.cpu(), color=f"C{i}", label=name)
    for panel, title in zip(axes, ("chosen", "rejected")):
        _dress(panel, title, "likelihood p", f"|∂L/∂{named[derivative]}|")
    return _finish(figure, path)


def plot_landscapes(landscapes: Mapping[str, Landscape], path: str | Path | None = None) -> Figure:
    """A row of maps for each objective: both coefficients and their two sums; red raises, blue lowers.

    Colours end at the 95th percentile of the absolute values, since some coefficients explode at an edge. The black
    line is 0.

    Args:
        landscapes: name → `coefficient_landscape`.
        path: also write a PNG there.

    Raises:
        ValueError: no landscapes.
    """
    figure, axes = _figure("landscapes", landscapes, len(landscapes), 4)
    titles = ("on log π(y+)", "on log π(y−)", "sum, y+ = y−", "sum on probabilities")
    for row, (name, found) in enumerate(landscapes.items()):
        x, y = found.pi_chosen.cpu().numpy(), found.pi_rejected.cpu().numpy()
        for panel, title, values in zip(axes[4 * row : 4 * row + 4], titles, found[2:]):
            most = max(float(values.abs().flatten().quantile(0.95)), 1e-12)
            z = values.T.cpu().numpy()
            mesh = panel.pcolormesh(x, y, z, cmap="RdBu_r", vmin=-most, vmax=most, shading="nearest")
            if (
                min(z.shape) > 1 and z.min() < -1e-12 and z.max() > 1e-12
            ):  # a 0 that rounding left isn't a change of sign
                panel.contour(x, y, z, levels=[0.0], colors="black", linewidths=0.8)
            figure.colorbar(mesh, ax=panel)
            panel.set_title(f"{name}: {title}", fontsize=9)
            panel.set_xlabel("π(y+)", fontsize=8)
            panel.set_ylabel("π(y−)", fontsize=8)
    return _finish(figure, path)


def plot_shifts(runs: Mapping[str, Shifts], path: str | Path | None = None) -> Figure:
    """The six panels of BNF Figure 3: distributions over the responses, and logit against log-likelihood shifts.

    Args:
        runs: name → `shifts`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 2, 3)
    titles = {
        "logp": "log-likelihood shift",
        "logit": "absolute logit shift",
        "": "logit against log-likelihood shift",
        "logp_mean": "log-likelihood shift per token",
        "logit_mean": "absolute logit shift per token",
        "gini": "Gini coefficient of the logit shifts",
    }
    for panel, (field, title) in zip(axes, titles.items()):
        for i, (name, found) in enumerate(runs.items()):
            if field:
                values = _ordered(getattr(found, field))
                share = torch.arange(1, len(values) + 1) / max(len(values), 1)
                panel.plot(values, share, drawstyle="steps-post", color=f"C{i}", label=name)
            else:
                panel.plot(found.logp.cpu(), found.logit.cpu(), ".", color=f"C{i}", alpha=0.4, label=name)
        _dress(panel, title, *((title, "share of responses") if field else ("Σ Δ log p", "Σ |Δz|")))
    return _finish(figure, path)


def plot_percentile_shares(
    shares: Mapping[str, Tensor], path: str | Path | None = None, *, title: str = "shifts in the baseline's bins"
) -> Figure:
    """How each model's token shifts fall into the baseline's percentile bins (BNF Figure 4).

    Args:
        shares: name → `percentile_shares`.
        path: also write a PNG there.
        title: of the panel.

    Raises:
        ValueError: no shares.
    """
    figure, axes = _figure("shares", shares, 1, 1)
    for i, (name, values) in enumerate(shares.items()):
        centres = (torch.arange(len(values)) + 0.5) * 100 / len(values)
        axes[0].plot(centres, values.cpu(), "o-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], title, "percentile of the baseline", "share of tokens")
    return _finish(figure, path)


def plot_vocabulary_shift(runs: Mapping[str, VocabularyShift], path: str | Path | None = None) -> Figure:
    """Mean logit shifts in order, and the Lorenz curve of the absolute ones, whose bow is the Gini coefficient.

    Args:
        runs: name → `vocabulary_shift`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        axes[0].plot(_ordered(found.mean), color=f"C{i}", label=name)
        size = _ordered(found.absolute)
        entries = torch.linspace(0, 1, len(size) + 1)
        shares = torch.cat([size.new_zeros(1), size.cumsum(0) / size.sum()]) if bool(size.any()) else entries
        axes[1].plot(entries, shares, color=f"C{i}", label=f"{name}: {float(found.gini):.3f}")
    axes[1].plot([0, 1], [0, 1], ":", color="grey")
    _dress(axes[0], "mean logit shift", "vocabulary entries, sorted", "mean Δz")
    _dress(axes[1], "Lorenz curve and Gini coefficient", "share of the vocabulary", "share of mean |Δz|")
    return _finish(figure, path)


# -- inside -----------------------------------------------------------------------------------------------------------


def _shown(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _flat(name: str, scores: TokenScores, target: Tensor) -> TokenScores:
    if not isinstance(scores, TokenScores):
        raise ValueError(f"{name}: expected TokenScores, got {_shown(scores)}")
    for field, values in zip(scores._fields, scores):
        if values is not None and values.shape != target.shape:
            raise ValueError(f"{name}.{field}: expected {list(target.shape)} as target, got {list(values.shape)}")
    return TokenScores(*(None if x is None else x.detach().reshape(-1) for x in scores))  # type: ignore[arg-type]


def _pairs(name: str, per_response: Tensor) -> tuple[Tensor, Tensor]:
    if len(per_response) % 2:
        raise ValueError(
            f"{name}: expected an even number of responses, stacked [chosen; rejected], got {len(per_response)}"
        )
    return pairs(per_response)


def _mean_logp(responses: Responses) -> Tensor:
    """S̄, NaN for a response without tokens. [B]"""
    return torch.where(responses.layout.tokens > 0, responses.logps(length_normalize=True).detach(), torch.nan)


def _places(layout: Layout, positions: int) -> Tensor:
    """The position of each response's t-th unmasked token, −1 past its end. int64 [B, T]."""
    device, count = layout.tokens.device, layout.tokens
    lengths = layout.lengths
    if lengths is None:
        lengths = torch.full_like(count, positions // max(layout.responses, 1))
    owner = torch.repeat_interleave(torch.arange(layout.responses, device=device), lengths)
    where = torch.arange(positions, device=device)
    if layout.mask is not None:
        where, owner = where[layout.mask], owner[layout.mask]
    step = torch.arange(len(where), device=device) - (count.cumsum(0) - count)[owner]
    places = torch.full((layout.responses, int(count.max()) if len(count) else 0), -1, device=device)
    places[owner, step] = where
    return places


def _by_step(values: Tensor, layout: Layout) -> Tensor:
    """[P] → [B, T], NaN past a response's end."""
    places = _places(layout, len(values))
    if not len(values):
        return values.new_full(places.shape, torch.nan)
    return torch.where(places >= 0, values[places.clamp(min=0)], torch.nan)


def _gini(values: Tensor, count: Tensor) -> Tensor:
    """Gini coefficient of `count` values of each row, the rest of which is 0. [..., N], [...] → [...]."""
    ordered, n = values.sort(-1).values, values.shape[-1]
    # the zeros that only fill a row come first, and weigh nothing wherever they stand
    rank = torch.arange(1, n + 1, device=values.device, dtype=values.dtype) - (n - count)[..., None]
    weight = 2 * rank - count[..., None] - 1
    total = ordered.sum(-1)
    return torch.where(total > 0, (weight * ordered).sum(-1) / (count * total), 0.0)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slice(head: LMHead, part: slice) -> LMHead:
    return head._replace(weight=head.weight[part], bias=None if head.bias is None else head.bias[part])


def _logits(x: Tensor, head: LMHead, dtype: torch.dtype) -> Tensor:
    """[C, H] → [C, V] in `dtype`; the weight is converted a slice at a time."""
    weight, bias, softcap, scale = as_head(head)
    z = x.new_empty(len(x), len(weight), dtype=dtype)
    for first in range(0, len(weight), SLICE):
        part = slice(first, first + SLICE)
        z[:, part] = x.to(dtype) @ weight[part].to(dtype).T
    if bias is not None:
        z += bias
    z *= scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _checked(hidden: Tensor, head: Tensor | LMHead, target: Tensor, workspace: int, side: str) -> LMHead:
    """`check_inputs`, whose messages name the arguments of that side."""
    try:
        return check_inputs(hidden, head, target, "auto", workspace)
    except ValueError as error:
        text = re.sub(r"\b(hidden|head)\b", rf"\1_{side}", str(error))
        raise ValueError(text) from None


def _check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    outside = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
    if len(outside):
        raise ValueError(f"target: expected {ignore_index} or 0 … {vocab - 1}, got {int(outside[0])}")


def _spec(objective: ObjectiveLike, options: dict[str, Any]) -> Objective:
    spec = resolve(objective)
    unknown = [option for option in options if spec.options is not None and option not in spec.options]
    if unknown:
        raise ValueError(f"options of {spec.name}: expected a subset of {sorted(spec.options or ())}, got {unknown}")
    return spec


def _pairwise(objective: ObjectiveLike, options: dict[str, Any]) -> Objective:
    spec = _spec(objective, options)
    if spec.unit not in ("response", "pair"):
        raise ValueError(f"objective: expected one of responses or pairs, got {spec.name}, which is one of groups")
    return spec


def _alone(spec: Objective) -> bool:
    """Whether an objective looks at a response without asking whether it is good (mle)."""
    return spec.options is not None and spec.unit == "response" and not spec.label


def _probabilities(name: str, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: expected a tensor of one dimension, not empty, got {_shown(values)}")
    values = values.detach().double()
    outside = values[~((values > 0) & (values < 1))]
    if len(outside):
        raise ValueError(f"{name}: expected probabilities inside (0, 1), got {outside[0].item()}")
    return values


def _derivatives(spec: Objective, responses: Responses, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Values [U], and ∂/∂(log p) and ∂/∂z_y of their sum, [P] each, with the other logits fixed."""
    policy, mask = responses.policy, responses.layout.mask
    log_odds = policy.log_odds.detach().double()
    fields = {"logp": policy.logp, "log_odds": policy.log_odds, "lse": policy.lse}
    leaves = [x.detach().double().requires_grad_() for x in fields.values()]
    scores = TokenScores(*leaves, *(None if x is None else x.detach() for x in policy[3:]))
    with torch.enable_grad():
        values = unit_values(spec, responses._replace(policy=scores), options)
        g_logp = g_odds = g_lse = torch.zeros_like(log_odds)
        if values.requires_grad:
            g_logp, g_odds, g_lse = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    # d log p = (1 − p) dz, dλ = dz, d lse = p dz. Kept apart, so that a loss of log p alone divides by no 1 − p
    p, rest = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    others = g_odds + g_lse * p
    logit = g_logp * rest + others
    logp = g_logp + torch.where(others != 0, others / rest, 0.0)
    if mask is not None:
        logp, logit = torch.where(mask, logp, 0.0), torch.where(mask, logit, 0.0)
    return values.detach(), logp, logit


def _of_pairs(
    spec: Objective, w: Tensor, l: Tensor, ref: float, other_entropy: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [G] and derivatives [2, G] of pairs of one-token responses with the given probabilities, [G] each."""
    if not 0 < ref < 1:
        raise ValueError(f"ref: expected a probability inside (0, 1), got {ref}")
    if spec.couples == "batch" and len(w) > 1:  # each point is a batch of its own
        each = [_of_pairs(spec, a, b, ref, other_entropy, options) for a, b in zip(w.split(1), l.split(1))]
        return tuple(torch.cat(parts, -1) for parts in zip(*each))  # type: ignore[return-value]
    g, known = len(w), spec.options is not None
    own = torch.ones(2, g, dtype=w.dtype, device=w.device)
    own[1] = -1

    def scored(p: Tensor) -> TokenScores:
        # the other tokens' logsumexp is 0
        h_o = torch.full_like(p, other_entropy)
        return token_scores(torch.logit(p), torch.zeros_like(p), h_o, mask=None, entropy=False)

    reference = scored(torch.full_like(own, ref).view(-1)) if spec.ref is not None or not known else None
    ones = torch.ones(2 * g, dtype=torch.int64, device=w.device)
    responses = Responses(
        policy=scored(torch.cat([w, l])),
        ref=reference,
        ref_sums=None if reference is None else reference.logp,
        label=own.view(-1) if spec.label or not known else None,
        layout=Layout(2 * g, None, ones, None),
    )
    values, logp, logit = _derivatives(spec, responses, options)
    if len(values) == 2 * g:
        values = values[:g] if _alone(spec) else values[:g] + values[g:]
    return values, logp.view(2, g), logit.view(2, g)


def _ordered(values: Tensor) -> Tensor:
    values = values.reshape(-1)
    return values[~values.isnan()].sort().values.cpu()


def _figure(name: str, results: Mapping[str, Any], rows: int, columns: int) -> tuple[Figure, list[Any]]:
    if not results:
        raise ValueError(f"{name}: expected at least one, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        path = Path(path)
        place = path.with_name(path.name + ".tmp")
        figure.savefig(place, dpi=100, format="png")
        os.replace(place, path)
    return figure
