"""Objectives of a pair of responses to one prompt, stacked `[chosen; rejected]`.

S = Σ log π_θ, R = Σ log π_ref, Δ = S − R, S̄ = S / n of a response; w chosen, l rejected; σ the sigmoid.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.registry import objective


@objective(couples="pair")
def exmate(responses: Responses, *, beta: float = 1.0, length_normalize: bool = True) -> Tensor:
    """−S̄_w + β · exp(S̄_l), or with the sums S. [B/2]

    Tuan & Wang 2024 (arXiv 2408.16751), Eq. 6, with the mean token log-probability in both terms as its authors run it.
    """
    chosen, rejected = pairs(responses.logps(length_normalize))
    return -chosen + beta * rejected.exp()


@objective(couples="pair", ref="sums")
def dpo(responses: Responses, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), m = β (Δ_w − Δ_l). [B/2]

    Rafailov et al. 2023; Tuan & Wang 2024, Eq. 4. ε = `label_smoothing` (conservative DPO).
    """
    chosen, rejected = pairs(responses.log_ratios())
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@objective(couples="pair", ref="sums")
def ipo(responses: Responses, *, tau: float = 0.1, length_normalize: bool = True) -> Tensor:
    """(Δ_w / n_w − Δ_l / n_l − 1 / (2τ))², or with Δ itself as printed. [B/2]

    Azar et al. 2023; BNF (ICLR 2025), Table 2. Length-normalised as the authors run it.
    """
    chosen, rejected = pairs(responses.log_ratios(length_normalize))
    return (chosen - rejected - 1 / (2 * tau)).square()


@objective(couples="pair")
def simpo(responses: Responses, *, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """−log σ(β (S̄_w − S̄_l) − γ). No reference. [B/2]

    Meng et al. 2024; BNF (ICLR 2025), Table 2.
    """
    chosen, rejected = pairs(responses.logps(length_normalize=True))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
