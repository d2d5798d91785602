"""The losses of TRL's DPOTrainer that this library has no objective for, in TRL's normalisation and by its names.

Importing this module makes them known by name, also to `rgpb.fused_loss` and in weighted sums. The other names of TRL's
mean objectives of the library: `NAMES`.

S = Σ log π_θ, R = Σ log π_ref, Δ = S − R of a response of n tokens; w chosen, l rejected; m = β (Δ_w − Δ_l); σ the
sigmoid. Pairs are stacked `[chosen; rejected]`.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.pairs import smoothed
from rgpb.objectives.ranges import Between, Positive
from rgpb.objectives.registry import objective

NAMES = {"sigmoid": "dpo", "exo_pair": "exo", "sppo_hard": "sppo"}  # TRL's → ours

Above = Annotated[float, Positive()]
Smoothing = Annotated[float, Between(0, 0.5, "[)")]


def _margin(responses: Responses, beta: float, length_normalize: bool = False) -> Tensor:
    chosen, rejected = pairs(beta * responses.log_ratios(length_normalize))
    return chosen - rejected


@objective(couples="pair", ref="sums", guest=True)
def hinge(responses: Responses, *, beta: Above = 0.1) -> Tensor:
    """max(0, 1 − m). [B/2]

    SLiC's hinge on the margin of DPO; Liu et al. 2023 (arXiv 2309.06657).
    """
    return (1 - _margin(responses, beta)).clamp(min=0)


@objective(couples="pair", ref="sums", guest=True)
def robust(responses: Responses, *, beta: Above = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """(−(1 − ε) log σ(m) + ε log σ(−m)) / (1 − 2ε). [B/2]

    Chowdhury et al. 2024 (arXiv 2403.00409): ε = `label_smoothing`, the part of the labels that are flipped.
    """
    margin = _margin(responses, beta)
    value = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        value = value + label_smoothing * F.logsigmoid(-margin)
    return value / (1 - 2 * label_smoothing)


@objective(couples="pair", ref="sums", guest=True)
def bco_pair(responses: Responses, *, beta: Above = 0.1) -> Tensor:
    """−log σ(βΔ_w) − log σ(−βΔ_l). [B/2]

    Jung et al. 2024 (arXiv 2404.04656), without their δ.
    """
    chosen, rejected = pairs(beta * responses.log_ratios())
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@objective(couples="batch", unit="pair", ref="sums", guest=True)
def aot(responses: Responses, *, beta: Above = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """−(1 − ε) log σ(βδ) − ε log σ(−βδ), δ = sort(S_w − S_l) − sort(R_w − R_l), sorted over the batch. [B/2]

    Melnyk et al. 2024 (arXiv 2406.05882). Each rank sorts its own batch.
    """
    scores = responses.logps()
    chosen, rejected = pairs(scores)
    ref_chosen, ref_rejected = pairs(scores.detach() - responses.log_ratios().detach())
    delta = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    return smoothed(beta * delta, label_smoothing)


@objective(couples="batch", unit="pair", ref="sums", guest=True)
def aot_unpaired(responses: Responses, *, beta: Above = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """As `aot`, with δ = sort(Δ_w) − sort(Δ_l). [B/2]"""
    chosen, rejected = pairs(responses.log_ratios())
    return smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


@objective(couples="pair", ref="sums", guest=True)
def discopop(responses: Responses, *, beta: Above = 0.1, tau: Above = 0.05) -> Tensor:
    """−(1 − σ(m/τ)) log σ(m) + σ(m/τ) e^{−m}. [B/2]

    Lu et al. 2024 (arXiv 2406.08414), Eq. 5.
    """
    margin = _margin(responses, beta)
    share = torch.sigmoid(margin / tau)
    return -(1 - share) * F.logsigmoid(margin) + share * torch.exp(-margin)


@objective(couples="pair", ref="sums", guest=True)
def sigmoid_norm(responses: Responses, *, beta: Above = 0.1) -> Tensor:
    """−log σ(β (Δ_w / n_w − Δ_l / n_l)): DPO on means over tokens. [B/2]

    Lambert et al. 2024 (Tülu 3, arXiv 2411.15124).
    """
    return -F.logsigmoid(_margin(responses, beta, length_normalize=True))


@objective(couples="batch", unit="pair", guest=True)
def sft(responses: Responses) -> Tensor:
    """−Σ log π_θ over all chosen tokens of the batch, over their number; each pair has its share of it. [B/2]

    `mle` beside pairs is the mean of each chosen response first, and then of these.
    """
    chosen, _ = pairs(responses.logps())
    tokens, number = responses.total(pairs(responses.layout.tokens)[0])
    return -chosen * number / tokens.clamp(min=1)


@objective(couples="batch", ref="sums", label=True, guest=True)
def apo_zero_unpaired(
    responses: Responses, *, beta: Above = 0.1, desirable_weight: Above = 1.0, undesirable_weight: Above = 1.0
) -> Tensor:
    """w · σ(−label · βΔ), w by the label. [B]

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), Eq. 7, of single responses.
    """
    assert responses.label is not None  # checked at the door
    weight = torch.where(responses.label > 0, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-responses.label * beta * responses.log_ratios())
