"""The token-wise losses in Triton, inside a row kernel: value and slope in the log-odds λ of one token's loss.

Here, in `csrc/token_losses.inl` and as the objectives' own formulas in `rgpb/objectives/` they stand, and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1, right to rounding also where 1 + e = 1."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def token_loss(lam, h_o, weight, ref_logp, ref_lam, LOSS: tl.constexpr):
    """Value and ∂/∂λ of weight · (loss of one token); a rejected token has a negative weight.

    nll: −log p. unlikelihood: −log p, and |weight| · −log(1 − p) for a rejected token. bnf: MATH as in
    `rgpb.objectives.single.bnf`, f = min(p / p_ref, 1), c = min(1, exp(λ − λ_ref)).
    """
    e = tl.exp(-tl.abs(lam))
    log_1p = _log1p(e)
    log_p = tl.minimum(lam, 0.0) - log_1p
    log_not_p = tl.minimum(-lam, 0.0) - log_1p
    p = tl.where(lam >= 0, 1.0, e) / (1.0 + e)
    not_p = tl.where(lam >= 0, e, 1.0) / (1.0 + e)
    if LOSS == "nll":
        value = -weight * log_p
        slope = -weight * not_p
    elif LOSS == "unlikelihood":
        value = tl.where(weight > 0, -weight * log_p, weight * log_not_p)
        slope = tl.where(weight > 0, -weight * not_p, -weight * p)
    else:
        tl.static_assert(LOSS == "bnf")
        c = tl.where(lam >= ref_lam, 1.0, tl.exp(lam - ref_lam))
        x = tl.minimum(log_p - ref_logp, 0.0)
        near = -x * (1.0 + x * (0.5 + x * (1.0 / 6.0)))
        f_others = tl.where(x > -1e-4, near, 1.0 - tl.exp(x))
        others = tl.where(f_others > 0, f_others * (log_not_p - h_o), 0.0)
        own = tl.where(f_others < 1, (1.0 - f_others) * log_p, 0.0)
        value = -weight * (own + others)
        slope = -weight * c * not_p
    return tl.where(weight == 0, 0.0, value), tl.where(weight == 0, 0.0, slope)
