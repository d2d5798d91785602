"""Objectives of a pair of responses to one prompt, stacked `[chosen; rejected]`.

`<name>_terms` says the same loss to a kernel that computes it token by token in the launch that sweeps the logits.

p = π_θ of a token, λ its log-odds; S = Σ log π_θ, R = Σ log π_ref, Δ = S − R, S̄ = S / n of a response of n tokens;
w chosen, l rejected; σ the sigmoid. All of them take two responses as a pair as soon as one of the two has a token.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.ranges import Between, NonNegative, Positive
from rgpb.objectives.registry import objective
from rgpb.objectives.single import per_token


def nll_pll_terms(tokens: Tensor, label: Tensor | None, *, length_normalize: bool = True) -> tuple[str, Tensor]:
    weight = per_token(tokens, length_normalize)
    return "nll", torch.where(_chosen(tokens), weight, -weight)


def unlikelihood_terms(tokens: Tensor, label: Tensor | None, *, alpha: float = 1.0) -> tuple[str, Tensor]:
    weight = per_token(tokens, length_normalize=True)
    return "unlikelihood", torch.where(_chosen(tokens), weight, -alpha * weight)


def _chosen(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens), device=tokens.device) < len(tokens) // 2


@objective(couples="token", unit="pair", terms=nll_pll_terms)
def nll_pll(responses: Responses, *, length_normalize: bool = True) -> Tensor:
    """Likelihood up on the chosen, down on the rejected: −S̄_w + S̄_l, or the sums. [B/2]

    BNF (ICLR 2025), Eq. 1: the baseline that collapses, because −S̄_l has no lower bound.
    """
    chosen, rejected = pairs(responses.logps(length_normalize))
    return rejected - chosen


@objective(couples="token", unit="pair", terms=unlikelihood_terms)
def unlikelihood(responses: Responses, *, alpha: Annotated[float, NonNegative()] = 1.0) -> Tensor:
    """−S̄_w − α · mean_t log(1 − p_t) over the rejected. [B/2]

    Welleck et al. 2020; Tuan & Wang 2024, Eq. 5. log(1 − p) = logsigmoid(−λ) stays right as p → 1.
    """
    chosen, _ = pairs(responses.logps(length_normalize=True))
    _, rejected = pairs(responses.mean(F.logsigmoid(-responses.policy.log_odds)))
    return -chosen - alpha * rejected


@objective(couples="pair")
def exmate(
    responses: Responses, *, beta: Annotated[float, NonNegative()] = 1.0, length_normalize: bool = True
) -> Tensor:
    """−S̄_w + β · exp(S̄_l), or with the sums S. [B/2]

    Tuan & Wang 2024 (arXiv 2408.16751), Eq. 6, with the mean token log-probability in both terms as its authors run it.
    """
    chosen, rejected = pairs(responses.logps(length_normalize))
    return -chosen + beta * rejected.exp()


@objective(couples="pair", ref="sums")
def dpo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    label_smoothing: Annotated[float, Between(0, 0.5, "[)")] = 0.0,
) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), m = β (Δ_w − Δ_l). [B/2]

    Rafailov et al. 2023; Tuan & Wang 2024, Eq. 4. ε = `label_smoothing` (conservative DPO).
    """
    chosen, rejected = pairs(responses.log_ratios())
    return smoothed(beta * (chosen - rejected), label_smoothing)


@objective(couples="pair", ref="sums")
def ipo(responses: Responses, *, tau: Annotated[float, Positive()] = 0.1, length_normalize: bool = True) -> Tensor:
    """(Δ_w / n_w − Δ_l / n_l − 1 / (2τ))², or with Δ itself as printed. [B/2]

    Azar et al. 2023; BNF (ICLR 2025), Table 2. Length-normalised as the authors run it.
    """
    chosen, rejected = pairs(responses.log_ratios(length_normalize))
    return (chosen - rejected - 0.5 / tau).square()


@objective(couples="pair")
def simpo(
    responses: Responses, *, beta: Annotated[float, Positive()] = 2.0, gamma: Annotated[float, NonNegative()] = 0.5
) -> Tensor:
    """−log σ(β (S̄_w − S̄_l) − γ). No reference. [B/2]

    Meng et al. 2024; BNF (ICLR 2025), Table 2.
    """
    chosen, rejected = pairs(responses.logps(length_normalize=True))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@objective(couples="pair")
def sequence_unlikelihood(
    responses: Responses, *, alpha: Annotated[float, NonNegative()] = 1.0, length_normalize: bool = False
) -> Tensor:
    """−S_w − α log(1 − e^{S_l}), or with the means S̄. [B/2]

    Tuan & Wang 2024, Eq. 5, with the probabilities of whole responses; Welleck et al. 2020. A rejected response without
    tokens adds nothing.
    """
    chosen, _ = pairs(responses.logps(length_normalize))
    _, others = pairs(mean_complement(responses) if length_normalize else responses.log_complement())
    _, there = pairs(responses.present)
    return -chosen - alpha * torch.where(there, others, 0.0)


@objective(couples="pair")
def slic(
    responses: Responses, *, delta: Annotated[float, NonNegative()] = 1.0, lam: Annotated[float, NonNegative()] = 0.0
) -> Tensor:
    """max(0, δ − S_w + S_l) − λ S̄_w. [B/2]

    Zhao et al. 2023; BNF (ICLR 2025), Table 2, which has λ = 0.
    """
    chosen, rejected = pairs(responses.logps())
    return (delta - chosen + rejected).clamp(min=0) - lam * mean_chosen(responses)


@objective(couples="pair")
def cpo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    gamma: Annotated[float, NonNegative()] = 0.0,
    lam: Annotated[float, NonNegative()] = 1.0,
    length_normalize: bool = False,
) -> Tensor:
    """−log σ(β (S_w − S_l) − γ) − λ S̄_w; `length_normalize`: with S̄ in the first term (CPO-SimPO). [B/2]

    Xu et al. 2024; MC-PO (arXiv 2502.04567), Table 5.
    """
    chosen, rejected = pairs(responses.logps(length_normalize))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma) - lam * mean_chosen(responses)


@objective(couples="pair")
def orpo(responses: Responses, *, lam: Annotated[float, NonNegative()] = 0.1) -> Tensor:
    """−S̄_w − λ log σ(a(S̄_w) − a(S̄_l)), a(S̄) = S̄ − log(1 − e^S̄), the log-odds. [B/2]

    Hong et al. 2024, Eq. 6–7. A pair of which one response has no token has no odds ratio: its second term is 0.
    """
    means, there = responses.logps(length_normalize=True), pairs(responses.present)
    chosen, rejected = pairs((means - mean_complement(responses)).clamp(max=1e30))  # finite also where both are certain
    both = there[0] & there[1]
    return -pairs(means)[0] - lam * torch.where(both, F.logsigmoid(chosen - rejected), 0.0)


@objective(couples="pair", ref="sums")
def rdpo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    alpha: Annotated[float, NonNegative()] = 0.01,
) -> Tensor:
    """−log σ(β (Δ_w − Δ_l) + α (n_w − n_l)): DPO that discounts length. [B/2]

    Park et al. 2024. Its reward is r − α n, so that under preferences σ(r_w − r_l) it is smallest at βΔ = r − α n +
    const: of two responses with the same reward the shorter one is favoured.
    """
    chosen, rejected = pairs(beta * responses.log_ratios() + alpha * responses.layout.tokens.double())
    return -F.logsigmoid(chosen - rejected)


@objective(couples="pair", ref="sums")
def rpo(
    responses: Responses, *, beta: Annotated[float, Positive()] = 0.1, lam: Annotated[float, NonNegative()] = 1.0
) -> Tensor:
    """−log σ(β (Δ_w − Δ_l)) − λ S̄_w. [B/2]

    MC-PO (arXiv 2502.04567), Table 5; Pang et al. 2024.
    """
    return dpo(responses, beta=beta) - lam * mean_chosen(responses)


@objective(couples="pair", ref="sums")
def exo(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    epsilon: Annotated[float, Between(0, 0.5, "()")] = 1e-3,
) -> Tensor:
    """σ(m) (log σ(m) − log(1 − ε)) + σ(−m) (log σ(−m) − log ε), m = β (Δ_w − Δ_l). [B/2]

    Ji et al. 2024, Eq. 16: the reverse KL divergence of (σ(m), σ(−m)) from (1 − ε, ε), smallest at σ(m) = 1 − ε; so
    the chosen is preferred for ε below ½. MC-PO's Table 5 drops ε.
    """
    chosen, rejected = pairs(responses.log_ratios())
    margin = beta * (chosen - rejected)
    up, down = (F.logsigmoid(m).clamp(min=-745) for m in (margin, -margin))  # e⁻⁷⁴⁵ is 0, and 0 · ∞ no number
    return up.exp() * (up - math.log1p(-epsilon)) + down.exp() * (down - math.log(epsilon))


@objective(couples="pair", ref="sums")
def sppo(responses: Responses, *, beta: Annotated[float, Positive()] = 0.1) -> Tensor:
    """(Δ_w − 1 / (2β))² + (Δ_l + 1 / (2β))². [B/2]

    Wu et al. 2024, with hard preferences. MC-PO's Table 5 prints 0.5 β for 0.5 / β.
    """
    (chosen, rejected), shift = pairs(responses.log_ratios()), 0.5 / beta
    return (chosen - shift).square() + (rejected + shift).square()


@objective(couples="pair", ref="sums")
def nca_pair(responses: Responses, *, beta: Annotated[float, Positive()] = 0.1) -> Tensor:
    """−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l). [B/2]

    Chen et al. 2024 (NCA); MC-PO (arXiv 2502.04567), Table 5.
    """
    chosen, rejected = pairs(beta * responses.log_ratios())
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@objective(couples="pair", ref="sums")
def apo_zero(responses: Responses, *, beta: Annotated[float, Positive()] = 0.1) -> Tensor:
    """1 − σ(βΔ_w) + σ(βΔ_l): the chosen up, the rejected down. [B/2]

    D'Oosterlinck et al. 2024 (APO), Eq. 7.
    """
    chosen, rejected = pairs(beta * responses.log_ratios())
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@objective(couples="pair", ref="sums")
def apo_down(responses: Responses, *, beta: Annotated[float, Positive()] = 0.1) -> Tensor:
    """σ(βΔ_w) + 1 − σ(β (Δ_w − Δ_l)): both down, the rejected further. [B/2]

    D'Oosterlinck et al. 2024 (APO), Eq. 8.
    """
    chosen, rejected = pairs(beta * responses.log_ratios())
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), without the second term for ε = 0: it may be infinite."""
    value = -(1 - label_smoothing) * F.logsigmoid(margin)
    return value - label_smoothing * F.logsigmoid(-margin) if label_smoothing else value


def mean_chosen(responses: Responses) -> Tensor:
    """S̄_w. [B/2]"""
    return pairs(responses.logps(length_normalize=True))[0]


def mean_complement(responses: Responses) -> Tensor:
    """log(1 − e^S̄), right also where S rounds to 0. −∞ where that is so of every token. float64 [B]"""
    whole = responses.log_complement()  # log(1 − e^S)
    certain = whole < -40  # then 1 − e^S̄ is (1 − e^S) / n to the last digit
    likely = (whole < -math.log(2)) & ~certain
    total = torch.where(likely, torch.log1p(-torch.where(likely, whole, -1.0).exp()), responses.logps())
    mean = torch.where(certain, -1.0, total / responses.n)
    return torch.where(certain, whole - responses.n.log(), torch.log(-torch.expm1(mean)))
