"""The row kernels in plain torch operations: any device, float32 and float64.

Forward, per row with target y:
    z ← cap · tanh(scale · (z + b) / cap)
    lse_other = log Σ_{k≠y} exp(z_k)        H_o = lse_other − Σ_{k≠y} q_k z_k,  q_k = exp(z_k − lse_other)
Everything a loss needs follows from (z_y, lse_other, H_o): λ = z_y − lse_other, log p = logsigmoid(λ).

Vector-Jacobian product, for upstream gradients g_zy, g_lo, g_ho of these three:
    ∂L/∂z_y = g_zy        ∂L/∂z_k = q_k · (g_lo − g_ho · (H_o + log q_k)),  k ≠ y
times (1 − (z/cap)²) · scale for the raw product. Nothing here cancels as p → 1: that is what the log-odds form is for.

Dimensions: C rows of the buffer, V vocabulary, R rows of a block that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Size of one block of rows, and of each of at most two scratch buffers: what passes over a block costs a read of the cache, not of memory.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class Epilogue(NamedTuple):
    """What follows the bare product W x: bias [V] in the buffer's dtype or None, soft-cap or None, scale."""

    bias: Tensor | None
    softcap: float | None
    scale: float

    def slice(self, start: int, stop: int) -> Epilogue:
        """The same for the vocabulary entries start … stop."""
        return self if self.bias is None else self._replace(bias=self.bias[start:stop])


def block_rows(vocab: int, itemsize: int, device_type: str) -> int:
    """R, the rows of one block."""
    return max(1, BLOCK_BYTES.get(device_type, BLOCK_BYTES["cuda"]) // (vocab * itemsize))


def statistics_(z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_y, lse_other, H_o), each [C], H_o only if asked for.

    Turns the products in `z_CV` into logits in place; afterwards the target's entry holds −inf.
    """
    z_y, lse_other = z_CV.new_empty(len(z_CV)), z_CV.new_empty(len(z_CV))
    h_o = z_CV.new_empty(len(z_CV)) if entropy else None
    scratch = _scratch(z_CV, 2 if entropy else 1)
    for rows in _blocks(z_CV):
        z, y = z_CV[rows], target_C[rows, None]
        _apply_(z, epilogue)
        z_y[rows] = z.gather(1, y).squeeze(1)
        z.scatter_(1, y, -torch.inf)
        top = z.amax(1)
        top = torch.where(top == -torch.inf, 0, top)  # no other token, or none that is possible
        shifted = torch.sub(z, top[:, None], out=scratch[0][: len(z)])
        weights = torch.exp(shifted, out=scratch[-1][: len(z)])
        total = weights.sum(1)
        lse_other[rows] = top + total.log()
        if h_o is not None:
            shifted.clamp_(min=torch.finfo(z.dtype).min)  # 0 · −inf at impossible tokens and at the target
            mean = shifted.mul_(weights).sum(1) / total
            h_o[rows] = torch.where(total > 0, total.log() - mean, 0)
    return z_y, lse_other, h_o


def dlogits_(
    z_CV: Tensor,
    target_C: Tensor,
    z_y: Tensor,
    lse_other: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor | None],
    epilogue: Epilogue,
    h_o: Tensor | None = None,
    out: Tensor | None = None,
    raw: bool = False,
) -> Tensor:
    """Turn logits into the gradients of the raw products, in place or into `out`, which may lie in the same bytes.

    Args:
        z_CV: soft-capped logits; the target's own entry may hold anything.
        target_C: the target's column, or −1 in rows whose target lies in another slice of the vocabulary.
        upstream: g_zy, g_lo, g_ho, each [C]; g_ho may be None.
        out: [C, V] view of 16-bit elements over the first half of each row's own bytes, or None.
        raw: whether `z_CV` still holds the bare products.
    """
    g_zy, g_lo, g_ho = upstream
    cap, scale = epilogue.softcap, epilogue.scale
    if cap is not None:
        g_zy = g_zy * (1 - (z_y / cap) ** 2)
    g_zy, g_lo = g_zy * scale, g_lo * scale
    lse_other = torch.where(lse_other == -torch.inf, 0, lse_other)  # no other token: every q is 0
    target_C, inside = target_C.clamp(min=0), target_C >= 0
    scratch = _scratch(z_CV, (g_ho is not None) + (cap is not None))
    for rows in _blocks(z_CV):
        z, y = z_CV[rows], target_C[rows, None]
        if raw:
            _apply_(z, epilogue)
        log_q = z.sub_(lse_other[rows, None])
        coefficient = g_lo[rows, None]
        jacobian = None
        if cap is not None:
            jacobian = torch.add(log_q, lse_other[rows, None], out=scratch[-1][: len(z)])
            jacobian.div_(cap).square_().neg_().add_(1)
        if g_ho is not None and h_o is not None:
            g_h = (scale * g_ho)[rows, None]
            finite = torch.clamp(log_q, min=torch.finfo(z.dtype).min / 2, out=scratch[0][: len(z)])
            coefficient = finite.add_(h_o[rows, None]).mul_(-g_h).add_(coefficient)
        d = log_q.exp_().mul_(coefficient)
        if jacobian is not None:
            d.mul_(jacobian)
        d.scatter_(1, y, torch.where(inside[rows, None], g_zy[rows, None], d.gather(1, y)))
        if out is not None:
            out[rows] = d.to(out.dtype)  # complete before the write: the two share their bytes
    return z_CV if out is None else out


def _apply_(z: Tensor, epilogue: Epilogue) -> None:
    """Raw products → logits, in place. [R, V]."""
    bias, cap, scale = epilogue
    if bias is not None:
        z.add_(bias)
    if scale != 1.0:
        z.mul_(scale)
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)


def _blocks(z_CV: Tensor) -> Iterator[slice]:
    step = block_rows(z_CV.shape[1], z_CV.element_size(), z_CV.device.type)
    for start in range(0, len(z_CV), step):
        yield slice(start, start + step)


def _scratch(z_CV: Tensor, count: int) -> list[Tensor]:
    rows = min(len(z_CV), block_rows(z_CV.shape[1], z_CV.element_size(), z_CV.device.type))
    return [z_CV.new_empty(rows, z_CV.shape[1]) for _ in range(count)]
