"""Derivatives of an objective: each token's coefficient, and curves of it over probabilities.

Derivative means ∂L/∂·. Coefficient means −∂L/∂(log p): positive where gradient descent raises the token.

Dimensions: P token positions (masked ones included), U units, G points of a curve, C × R points of a landscape.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.analysis.numbers import shown, split_pairs
from rgpb.layout import Layout, Responses, TokenScores, token_scores
from rgpb.objectives import Objective, resolve, unit_values

ObjectiveLike = str | Callable[..., Tensor] | Mapping[str, float]  # what `rgpb.objectives.resolve` takes


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
        split_pairs("responses", responses.layout.tokens)
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
        raise ValueError(f"{name}: expected a tensor of one dimension, not empty, got {shown(values)}")
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
