"""Objectives of K responses to one prompt, in consecutive rows.

S = Σ log π_θ, R = Σ log π_ref, Δ = S − R, r the reward of a response; σ the sigmoid. A response without tokens takes no
part in its group, so groups of unequal size are filled up with such responses.

Dimensions: B responses, G groups, K responses of a group.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.layout import Responses
from rgpb.objectives.pairs import smoothed
from rgpb.objectives.ranges import AtLeast, Between, NonNegative, OneOf, Positive
from rgpb.objectives.registry import objective

# Scores of those that take no part: e^ABSENT is 0, and no gradient through it is NaN.
ABSENT = -1e30
LARGEST = 1e12  # of a weight α |d|^p, so that none is infinite
# Rewards this close to their mean, relative to the largest, are at the mean: float32 rounding isn't a preference.
EQUAL = 2**-23


@objective(couples="group", ref="sums", rewards=True)
def infonca(
    responses: Responses, *, beta: Annotated[float, Positive()] = 0.1, tau: Annotated[float, Positive()] = 1.0
) -> Tensor:
    """−Σ_k softmax(r / τ)_k · log softmax(βΔ)_k. [G]

    Chen et al. 2024 (InfoNCA); SWEPO (arXiv 2412.04628), Eq. 23.
    """
    scores, rewards, present = _scores(responses, beta)
    wanted = _softmax(rewards, present, tau)
    return -(wanted * scores.log_softmax(1)).sum(1)


@objective(couples="group", ref="sums", rewards=True)
def nca(
    responses: Responses, *, beta: Annotated[float, Positive()] = 0.1, tau: Annotated[float, Positive()] = 1.0
) -> Tensor:
    """−Σ_k softmax(r / τ)_k · log σ(βΔ_k) − (1 / K) Σ_k log σ(−βΔ_k), K those that take part. [G]

    Chen et al. 2024 (NCA).
    """
    scores, rewards, present = _scores(responses, beta)
    scores = torch.where(present, scores, 0.0)
    wanted = _softmax(rewards, present, tau)
    down = torch.where(present, F.logsigmoid(-scores), 0.0).sum(1) / present.sum(1).clamp(min=1)
    return -(wanted * F.logsigmoid(scores)).sum(1) - down


@objective(couples="group", ref="sums", rewards=True)
def swepo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    alpha: Annotated[float, NonNegative()] = 1.0,
    p: Annotated[int, NonNegative()] = 2,
    mode: Annotated[str, OneOf("above_mean", "one_vs_all")] = "above_mean",
) -> Tensor:
    """−log Σ_{Y+} e^s / Σ e^s, s = βΔ + α |d|^p, d = r − mean r, Y+ = {d > 0}. [G]

    p = 0 weighs all alike. `mode="one_vs_all"`: Y+ is the best response. A group without a positive or without a
    negative response gives exactly 0.

    SWEPO (arXiv 2412.04628), Eq. 9–11 and 15.
    """
    scores, rewards, present = _scores(responses, beta)
    d = torch.where(present, rewards - rewards.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1), 0.0)
    d = torch.where(d.abs() > EQUAL * rewards.abs().amax(1, keepdim=True), d, 0.0)
    positive = d > 0
    if mode == "one_vs_all":
        first = torch.zeros_like(positive).scatter(1, best(responses)[:, None], True)
        positive = positive & first
    weights = (alpha * (d.abs() ** p).clamp(max=1e300)).clamp(max=LARGEST)  # an α of 0 meets no ∞
    return _contrast(scores + weights, positive, present)


@objective(couples="group", ref="sums")
def rnce(responses: Responses, *, beta: Annotated[float, Positive()] = 0.1) -> Tensor:
    """−βΔ_0 + log Σ_i e^{βΔ_i}: the group's first response against all of it. [G]

    MC-PO (arXiv 2502.04567), Eq. 7. With two responses it is DPO. A group whose first response, or all of whose others,
    have no token gives exactly 0.
    """
    scores, _, present = _scores(responses, beta)
    first = torch.arange(present.shape[1], device=present.device) == 0
    return _contrast(scores, present & first, present)


def draw_negatives(responses: Responses, options: dict[str, Any]) -> Tensor:
    """Which responses `mc_po` looks at: each group's first, and up to M of the others. bool [B]

    Args:
        responses: of all candidates, without gradient.
        options: of `mc_po`; β, sampler and M are those of its signature where they aren't given.
    """
    beta, sampler = options.get("beta", 0.1), options.get("sampler", "mc")
    m, generator = options.get("m", 1), options.get("generator")
    size = responses.group_size or 0
    if not 1 <= m < size:
        raise ValueError(f"m: expected a whole number from 1 to {size - 1}, the candidates of a group, got {m!r}")
    scores, _, present = _scores(responses, beta)
    keys = scores.detach()
    if m == size - 1:  # all of them, whatever the sampler
        return torch.ones_like(present).view(-1)
    if sampler in ("mc", "random"):
        if generator is not None and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "generator: expected none inside activation checkpointing, which computes the loss once more in the "
                "backward pass and would draw others then; got one (torch's default generators are put back; or call "
                "the loss outside the checkpoint)"
            )
        device = keys.device if generator is None else generator.device
        uniform = torch.rand(keys.shape, generator=generator, device=device, dtype=torch.float64).to(keys.device)
        gumbel = -torch.log(-torch.log(uniform))  # the M highest of score + Gumbel noise: drawn ∝ e^score
        keys = gumbel if sampler == "random" else keys + gumbel
    elif sampler == "min":
        keys = -keys
    others = present.clone()
    others[:, 0] = False
    chosen = keys.masked_fill(~others, -torch.inf).topk(m, dim=1).indices
    keep = torch.zeros_like(present).scatter(1, chosen, True) & others
    keep[:, 0] = True
    return keep.view(-1)


@objective(couples="group", ref="sums", draw=draw_negatives)
def mc_po(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    sampler: Annotated[str, OneOf("mc", "max", "min", "random")] = "mc",
    m: Annotated[int, AtLeast(1)] = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`rnce` of the group's first response against M of the others, drawn by the kernel of Algorithm 1. [G]

    "mc" draws with probability ∝ e^{βΔ} under the current policy, without replacement; "max" ("min") takes the M with
    the highest (lowest) βΔ, "random" any. The draw has no gradient; `generator` seeds it. M = 1 is DPO on the drawn
    pair.

    MC-PO (arXiv 2502.04567), Eq. 7 and Algorithm 1. That lists the first response among the candidates, too; here it is
    never its own negative.
    """
    options = {"beta": beta, "sampler": sampler, "m": m, "generator": generator}
    keep = responses.groups(draw_negatives(responses, options))
    scores, _, present = _scores(responses, beta)
    first = torch.arange(present.shape[1], device=present.device) == 0
    return _contrast(scores, present & first, present & keep)


@objective(couples="group", ref="sums", rewards=True)
def multi_dpo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    label_smoothing: Annotated[float, Between(0, 0.5, "[)")] = 0.0,
    pairing: Annotated[str, OneOf("best", "all")] = "best",
) -> Tensor:
    """The mean of DPO over pairs of the group: the best with each lower one, or all with r_i > r_j. [G]

    SWEPO (arXiv 2412.04628), Appendix E: DPO×(K−1) for `pairing="best"`, DPO×C(K,2) for "all". A group without such a
    pair gives exactly 0.
    """
    scores, rewards, present = _scores(responses, beta)
    above = (rewards[:, :, None] > rewards[:, None, :]) & present[:, :, None] & present[:, None, :]
    if pairing == "best":
        first = torch.zeros_like(present).scatter(1, best(responses)[:, None], True)
        above = above & first[:, :, None]
    margin = torch.where(above, scores[:, :, None] - scores[:, None, :], 0.0)
    return torch.where(above, smoothed(margin, label_smoothing), 0.0).sum((1, 2)) / above.sum((1, 2)).clamp(min=1)


def best(responses: Responses) -> Tensor:
    """Place in its group of the response with the highest reward, the first of several; 0 without rewards. int64 [G]"""
    present = responses.groups(responses.present)
    if responses.rewards is None:
        return torch.zeros_like(present[:, 0], dtype=torch.int64)
    rewards = responses.groups(responses.rewards).masked_fill(~present, -torch.inf)
    return (rewards == rewards.amax(1, keepdim=True)).int().argmax(1)


def _scores(responses: Responses, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """βΔ (ABSENT for those that take no part), rewards (0 for those, and where there are none) and who does. [G, K]"""
    present = responses.groups(responses.present)
    scores = torch.where(present, beta * responses.groups(responses.log_ratios()), ABSENT)
    rewards = torch.zeros_like(scores) if responses.rewards is None else responses.groups(responses.rewards)
    return scores, torch.where(present, rewards, 0.0), present


def _softmax(rewards: Tensor, present: Tensor, tau: float) -> Tensor:
    counts = present | ~present.any(1, keepdim=True)  # a group of none still gets numbers, which nobody reads
    top = rewards.masked_fill(~counts, -torch.inf).amax(1, keepdim=True)
    return ((rewards - top) / tau).masked_fill(~counts, -torch.inf).softmax(1)


def _contrast(scores: Tensor, positive: Tensor, present: Tensor) -> Tensor:
    """−log Σ_{positive} e^s / Σ_{present} e^s; exactly 0 without a positive or without a negative. [G, K] → [G]"""
    negative = present & ~positive
    both = (positive.any(1) & negative.any(1))[:, None]

    def total(which: Tensor) -> Tensor:
        return torch.where(both, scores.masked_fill(~which, -torch.inf), 0.0).logsumexp(1)

    return torch.where(both[:, 0], -F.logsigmoid(total(positive) - total(negative)), 0.0)
