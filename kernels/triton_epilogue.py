"""What follows the bare product W x, inside a Triton kernel: z ← cap · tanh(scale · (z + b) / cap), and its derivative.

Bias, soft-cap and scale cost nothing where they aren't there: SOFTCAP and SCALE are constants of a model, so each of
their values is a compiled kernel of its own, exact also in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(z, bias, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """Raw products → (logits, J). `bias` broadcasts against `z`, or is None.

    J = scale · (1 − tanh²) comes from the same exponential as tanh, so it is right to rounding where the cap saturates.
    """
    if bias is not None:
        z += bias
    if SCALE != 1.0:
        z *= SCALE
    j = tl.full(z.shape, SCALE, z.dtype)
    if SOFTCAP is not None:
        e = tl.exp(-2.0 * tl.abs(z / SOFTCAP))  # of the magnitude: no overflow
        inverse = 1.0 / (1.0 + e)
        t = SOFTCAP * (1.0 - e) * inverse
        z = tl.where(z < 0, -t, t)
        j = (4.0 * SCALE) * e * inverse * inverse
    return z, j


@triton.jit
def gradient(z, lse_other, h_o, g_lo, g_ho):
    """∂L/∂z_k of the tokens that aren't the target: q_k (g_lo − g_ho (H_o + log q_k)), 0 where q_k = 0."""
    log_q = z - lse_other
    q = tl.exp(log_q)
    factor = g_lo
    if g_ho is not None:
        factor = g_lo - g_ho * (h_o + log_q)
    return tl.where(q == 0, 0.0, q * factor)  # 0 · inf; NaN stays
