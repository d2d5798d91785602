"""Objectives whose gradient coefficient is known token by token.

`<name>_terms` says the same loss to a kernel that computes it token by token in the launch that sweeps the logits.

ℓ = log p of the policy, λ its log-odds, n the number of tokens of a response, S = Σ ℓ, S̄ = S / n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.registry import objective


def _per_token(tokens: Tensor, length_normalize: bool) -> Tensor:
    n = tokens.clamp(min=1).double()
    return 1 / n if length_normalize else torch.ones_like(n)


def _chosen(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens), device=tokens.device) < len(tokens) // 2


def mle_terms(tokens: Tensor, label: Tensor | None, *, length_normalize: bool = True) -> tuple[str, Tensor]:
    return "nll", _per_token(tokens, length_normalize)


def nll_pll_terms(tokens: Tensor, label: Tensor | None, *, length_normalize: bool = True) -> tuple[str, Tensor]:
    weight = _per_token(tokens, length_normalize)
    return "nll", torch.where(_chosen(tokens), weight, -weight)


def unlikelihood_terms(tokens: Tensor, label: Tensor | None, *, alpha: float = 1.0) -> tuple[str, Tensor] | None:
    if alpha < 0:  # the kernel tells the rejected by the sign
        return None
    weight = _per_token(tokens, length_normalize=True)
    return "unlikelihood", torch.where(_chosen(tokens), weight, -alpha * weight)


def bnf_terms(tokens: Tensor, label: Tensor | None) -> tuple[str, Tensor]:
    assert label is not None  # checked at the door
    return "bnf", label * _per_token(tokens, length_normalize=True)


@objective(couples="token", terms=mle_terms)
def mle(responses: Responses, *, length_normalize: bool = True) -> Tensor:
    """Maximum likelihood: −S̄, or −S. [B]

    Tuan & Wang 2024 (arXiv 2408.16751), Eq. 2–3; supervised fine-tuning.
    """
    return -responses.logps(length_normalize)


@objective(couples="token", unit="pair", terms=nll_pll_terms)
def nll_pll(responses: Responses, *, length_normalize: bool = True) -> Tensor:
    """Likelihood up on the chosen, down on the rejected: −S̄_w + S̄_l, or the sums. [B/2]

    BNF (ICLR 2025), Eq. 1: the baseline that collapses, because −S̄_l has no lower bound.
    """
    chosen, rejected = pairs(responses.logps(length_normalize))
    return rejected - chosen


@objective(couples="token", unit="pair", terms=unlikelihood_terms)
def unlikelihood(responses: Responses, *, alpha: float = 1.0) -> Tensor:
    """−S̄_w − α · mean_t log(1 − p_t) over the rejected. [B/2]

    Welleck et al. 2020; Tuan & Wang 2024, Eq. 5. log(1 − p) = logsigmoid(−λ) stays right as p → 1.
    """
    chosen, _ = pairs(responses.logps(length_normalize=True))
    _, rejected = pairs(responses.mean(F.logsigmoid(-responses.policy.log_odds)))
    return -chosen - alpha * rejected


@objective(couples="token", ref="tokens", label=True, entropy=True, terms=bnf_terms)
def bnf(responses: Responses) -> Tensor:
    """Bidirectional negative feedback: −(label / n) Σ_t Σ_k f_k log p_k with the dynamic target distribution f. [B]

    BNF (ICLR 2025), Eq. 4 and 6: f_y = min(p / p_ref, 1), f_k = (1 − f_y) p_k / (1 − p) elsewhere, detached. In
    closed form

        Σ_k f_k log p_k = f_y log p + (1 − f_y)(log(1 − p) − H_o),   its gradient on the logits c · (onehot − p),
        c = (f_y − p) / (1 − p) = min(1, exp(λ − λ_ref)),

    so f never has to exist: the coefficient c is the ratio of odds, capped at 1.
    """
    scores, ref = responses.policy, responses.ref
    if ref is None or scores.other_entropy is None or responses.label is None:
        raise ValueError("bnf: expected reference scores, labels and other_entropy; got None for one of them")
    log_odds = scores.log_odds.detach()
    c = torch.where(log_odds >= ref.log_odds, 1.0, torch.exp(log_odds - ref.log_odds))
    f_others = -torch.expm1((scores.logp.detach() - ref.logp).clamp(max=0))
    others = torch.where(f_others > 0, f_others * (F.logsigmoid(-log_odds) - scores.other_entropy.detach()), 0.0)
    own = torch.where(f_others < 1, (1 - f_others) * scores.logp.detach(), 0.0)
    descent = torch.where(c > 0, c * scores.logp, 0.0)
    return -responses.label * responses.mean(descent + (own + others - descent).detach())
