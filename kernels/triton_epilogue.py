"""What follows the bare product W x, inside a Triton kernel: z ← cap · tanh(scale · (z + b) / cap), and its derivative.

Bias, soft-cap and scale cost nothing where they aren't there: SOFTCAP and SCALE are constants of a model, so each of
their values is a compiled kernel of its own, exact also in float64.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# 0 for every exponential, and finite: its product with one is 0.
IMPOSSIBLE = tl.constexpr(-1e3)


@triton.jit
def exp(x, FACTOR: tl.constexpr = 1.0):
    """exp(FACTOR · x); in float32 the hardware's 2ˣ, whose results below 2⁻¹²⁶ are 0."""
    if x.dtype == tl.float64:
        return tl.exp(x * FACTOR)
    else:
        return tl.exp2(x * (FACTOR * LOG2E))


@triton.jit
def reciprocal(x):
    """1 / x for 1 ≤ x ≤ 2; in float32 by one instruction, right to a unit in the last place."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)


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
        e = exp(tl.abs(z), -2.0 / SOFTCAP)  # of the magnitude: no overflow
        inverse = reciprocal(1.0 + e)
        p = e * inverse
        t = SOFTCAP - (2.0 * SOFTCAP) * p
        z = tl.where(z < 0, -t, t)
        j = (4.0 * SCALE) * (p * inverse)
    return z, j


@triton.jit
def gradient(z, lse_other, h_o, g_lo, g_ho):
    """∂L/∂z_k of the tokens that aren't the target: q_k (g_lo − g_ho (H_o + log q_k)), 0 where q_k = 0."""
    log_q = z - lse_other
    q = exp(log_q)
    factor = g_lo
    if g_ho is not None:
        factor = g_lo - g_ho * (h_o + tl.maximum(log_q, IMPOSSIBLE))  # not 0 · inf; NaN stays in q
    return q * factor


def hash_helpers(names: dict[str, Any]) -> None:
    """Have Triton hash the functions of a module that its kernels call, inner ones first.

    Triton's key of a kernel has the global constants of what it calls only where that was hashed before. Else the key
    would depend on which kernels came earlier, and what was compiled wouldn't be found again.
    """
    for name, x in list(names.items()):
        if isinstance(x, triton.JITFunction) and not name.endswith("_kernel"):
            x.cache_key  # noqa: B018


hash_helpers(globals())
