"""The row kernels in Triton: one program sweeps one row of a chunk of logits; the formulas are those of `torch_rows`.

Forward, per row with target y, in one reading sweep with a running maximum m:
    lse_other = m + log Σ_{k≠y} exp(z_k − m)        H_o = log Σ_{k≠y} exp(z_k − m) − Σ_{k≠y} q_k (z_k − m)
Vector-Jacobian product, in a second sweep that reads logits and writes dlogits, in place or as 16-bit numbers over the
first half of each row's own bytes:
    ∂L/∂z_y = g_zy        ∂L/∂z_k = q_k · (g_lo − g_ho · (H_o + log q_k)),  k ≠ y;        times J_k
For token-wise losses both sweeps are one launch, and the coefficient is computed between them.

In place is safe because a program owns its row, loads the target's logit before anything is stored, and, where the
stores are narrower than the loads, puts a barrier between a block's loads and its stores: they fall on bytes that are
read by then.

A negative target: in `statistics` and `token_loss` the row is ignored (zeros come out); in `gradients` the target lies
in another slice of the vocabulary.

Dimensions: C rows of the buffer, V vocabulary (or a slice of it), T tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgpb.kernels import configs
from rgpb.kernels.rows import RowSet
from rgpb.kernels.triton_epilogue import finish, gradient
from rgpb.kernels.triton_token_losses import token_loss
from rgpb.kernels.types import (
    LARGEST_RATIO,
    TOKEN_LOSSES,
    Chunk,
    Epilogue,
    Statistics,
    TokenTerms,
    Upstream,
    Weighed,
    acc_dtype,
)

# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(z_row, bias_ptr, offs, V, room, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr):
    """One block of a row of logits, J there, and which of its places are inside the vocabulary."""
    inside = offs < V
    z = tl.load(z_row + offs, mask=offs < room, other=0.0).to(ACC)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs, mask=inside, other=0.0).to(ACC)
    z, j = finish(z, bias, SOFTCAP, SCALE)
    return z, j, inside


@triton.jit
def _target_logit(z_row, bias_ptr, y, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr):
    z_y = tl.load(z_row + y).to(ACC)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + y).to(ACC)
    z_y, _ = finish(z_y, bias, SOFTCAP, SCALE)
    return z_y


@triton.jit
def _sweep(
    z_row, bias_ptr, y, mass_row, V, room,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(lse_other, H_o) of a row; the logarithm of each block's Σ exp(z_k) into mass_row, unless that is None."""
    top = tl.full([], -float("inf"), ACC)
    total = tl.full([], 0.0, ACC)
    mean = tl.full([], 0.0, ACC)  # Σ exp(z_k − top) (z_k − top)
    for start in tl.range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z, _, inside = _logits(z_row, bias_ptr, offs, V, room, SOFTCAP, SCALE, ACC)
        z = tl.where(inside & (offs != y), z, -float("inf"))
        block_top = tl.max(z, 0)
        new_top = tl.maximum(top, block_top)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # no possible token so far
        rescale = tl.exp(top - shift)
        e = tl.exp(z - shift)
        block_total = tl.sum(e, 0)
        if ENTROPY:
            moved = tl.where(total > 0, rescale * (mean + (top - shift) * total), 0.0)
            mean = moved + tl.sum(tl.where(e > 0, e * (z - shift), 0.0), 0)
        if mass_row is not None:
            tl.store(mass_row + start // BLOCK_V, shift + tl.log(block_total))
        total = total * rescale + block_total
        top = new_top
    shift = tl.where(top == -float("inf"), 0.0, top)
    log_total = tl.log(total)
    h_o = tl.where(total > 0, log_total - mean / total, 0.0)
    return shift + log_total, h_o


@triton.jit
def _pull_back(
    z_row, out_row, bias_ptr, y, lse_other, h_o, g_zy, g_lo, g_ho, V, room,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logits of a row → dlogits. NARROW: in the same bytes, with fewer of them to an element."""
    lse_other = tl.where(lse_other == -float("inf"), 0.0, lse_other)  # no other token: every q is 0
    for start in tl.range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z, j, _ = _logits(z_row, bias_ptr, offs, V, room, SOFTCAP, SCALE, ACC)
        d = tl.where(offs == y, g_zy, gradient(z, lse_other, h_o, g_lo, g_ho)) * j
        if NARROW:
            tl.debug_barrier()
        tl.store(out_row + offs, d.to(out_row.dtype.element_ty), mask=offs < room)


@triton.jit
def statistics_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    target_ptr, bias_ptr,  # [C], [V] or None
    zy_ptr, lo_ptr, ho_ptr,  # [C] out; ho_ptr None without entropy
    mass_ptr, stride_mc,  # [C, T] out: log Σ exp(z_k) of each block, or None
    V, room,  # columns; how many may be touched: with the padding of the rows
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(z_y, lse_other, H_o) of each row in one reading sweep."""
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    z_row = z_ptr + row * stride_zc
    mass_row = None
    if mass_ptr is not None:
        mass_row = mass_ptr + row * stride_mc
    if y < 0:
        tl.store(zy_ptr + row, tl.full([], 0.0, ACC))
        tl.store(lo_ptr + row, tl.full([], 0.0, ACC))
        if ho_ptr is not None:
            tl.store(ho_ptr + row, tl.full([], 0.0, ACC))
        if mass_ptr is not None:
            for start in tl.range(0, V, BLOCK_V):
                tl.store(mass_row + start // BLOCK_V, tl.full([], -float("inf"), ACC))
    else:
        lse_other, h_o = _sweep(z_row, bias_ptr, y, mass_row, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V, ACC)
        tl.store(zy_ptr + row, _target_logit(z_row, bias_ptr, y, SOFTCAP, SCALE, ACC))
        tl.store(lo_ptr + row, lse_other)
        if ho_ptr is not None:
            tl.store(ho_ptr + row, h_o)


@triton.jit
def gradients_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    out_ptr, stride_oc,  # [C, V] out: dlogits, possibly over the same bytes
    target_ptr, bias_ptr,  # [C], [V] or None
    lo_ptr, ho_ptr,  # [C] in: statistics; ho_ptr None without g_ho
    gzy_ptr, glo_ptr, gho_ptr,  # [C] in: upstream gradients
    V, room,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dlogits of each row from known statistics and coefficients."""
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    h_o = None
    g_ho = None
    if gho_ptr is not None:
        h_o = tl.load(ho_ptr + row)
        g_ho = tl.load(gho_ptr + row)
    _pull_back(
        z_ptr + row * stride_zc, out_ptr + row * stride_oc, bias_ptr, tl.load(target_ptr + row),
        tl.load(lo_ptr + row), h_o, tl.load(gzy_ptr + row), tl.load(glo_ptr + row), g_ho, V, room,
        SOFTCAP, SCALE, NARROW, BLOCK_V, ACC,
    )  # fmt: skip


@triton.jit
def token_loss_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    out_ptr, stride_oc,  # [C, V] out: dlogits, possibly over the same bytes
    target_ptr, bias_ptr,  # [C], [V] or None
    weight_ptr, ref_logp_ptr, ref_lam_ptr,  # [C] in: factor of each token's loss; reference, or None
    zy_ptr, lo_ptr, ho_ptr, value_ptr,  # [C] out; ho_ptr None without entropy
    V, room,
    LOSS: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and dlogits of a token-wise loss in one launch: log-softmax, gather, reference, coefficient."""
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    z_row = z_ptr + row * stride_zc
    out_row = out_ptr + row * stride_oc
    z_y = tl.full([], 0.0, ACC)
    lse_other = tl.full([], 0.0, ACC)
    h_o = tl.full([], 0.0, ACC)
    value = tl.full([], 0.0, ACC)
    if y < 0:
        for start in tl.range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            # a row that is ignored is never read, so nothing is ahead of these stores
            tl.store(out_row + offs, tl.full([BLOCK_V], 0.0, out_ptr.dtype.element_ty), mask=offs < V)
    else:
        z_y = _target_logit(z_row, bias_ptr, y, SOFTCAP, SCALE, ACC)
        lse_other, h_o = _sweep(z_row, bias_ptr, y, None, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V, ACC)
        lam = tl.where(lse_other == -float("inf"), float("inf"), z_y - lse_other)
        ref_logp = z_y * 0.0
        ref_lam = z_y * 0.0
        if ref_lam_ptr is not None:
            ref_logp = tl.load(ref_logp_ptr + row)
            ref_lam = tl.load(ref_lam_ptr + row)
        value, slope = token_loss(lam, h_o, tl.load(weight_ptr + row), ref_logp, ref_lam, LOSS)
        slope = tl.where(lse_other == -float("inf"), 0.0, slope)  # a certain token: no logit moves that
        _pull_back(
            z_row, out_row, bias_ptr, y, lse_other, h_o, slope, -slope, None, V, room, SOFTCAP, SCALE, NARROW, BLOCK_V,
            ACC,
        )  # fmt: skip
    tl.store(zy_ptr + row, z_y)
    tl.store(lo_ptr + row, lse_other)
    tl.store(value_ptr + row, value)
    if ho_ptr is not None:
        tl.store(ho_ptr + row, h_o)


@triton.jit
def target_kernel(
    e_ptr, stride_ec,  # [C, V] in place: weights
    target_ptr, r_ptr, gy_ptr, total_ptr,  # [C] in: column or −1, factor of the row, ∂L/∂z_y · J_y, Σ of the weights
    factor_ptr,  # [C] out: the factor, changed where the target's gradient dwarfs the others'
    V,
    LARGEST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The target's entry such that D = diag(factor) · E."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    r = tl.load(r_ptr + row)
    g_y = tl.load(gy_ptr + row)
    e_row = e_ptr + row * stride_ec
    alone = tl.abs(g_y) > LARGEST * tl.abs(r) * tl.load(total_ptr + row)
    factor = tl.where(alone, 1.0, r)
    ratio = tl.where(g_y == 0, 0.0, g_y / tl.where(factor == 0, 1.0, factor)).to(e_ptr.dtype.element_ty)
    if alone:
        for start in tl.range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            tl.store(e_row + offs, tl.where(offs == y, ratio, 0.0).to(e_ptr.dtype.element_ty), mask=offs < V)
    elif y >= 0:
        tl.store(e_row + y, ratio)
    tl.store(factor_ptr + row, factor)


# -- launches ---------------------------------------------------------------------------------------------------------


def statistics(
    z_CV: Tensor,
    target_C: Tensor,
    epilogue: Epilogue,
    entropy: bool,
    tile: int | None = None,
    room: int | None = None,
) -> tuple[Statistics, Tensor | None]:
    """(z_y, lse_other, H_o) of each row; nothing is changed. Rows with a negative target are ignored.

    Args:
        z_CV: raw products, float64, float32, bfloat16 or float16, unit stride along V.
        room: columns of each row that may be read: V, and the row's own padding, so that accesses stay aligned.
        tile: also return the softmax mass over the other tokens of each `tile` columns, [C, ⌈V / tile⌉].
    """
    rows, vocab = z_CV.shape
    acc = acc_dtype(z_CV.dtype)
    z_y, lse_other = (z_CV.new_empty(rows, dtype=acc) for _ in range(2))
    h_o = torch.empty_like(z_y) if entropy else None
    masses = None if tile is None else z_CV.new_empty(rows, -(-vocab // tile), dtype=acc)
    config = configs.rows(z_CV.device)
    target_C, bias = dense(target_C, epilogue.bias)
    if rows:
        statistics_kernel[(rows,)](
            z_CV, z_CV.stride(0), target_C, bias, z_y, lse_other, h_o, masses,
            0 if masses is None else masses.stride(0), vocab, room or vocab, epilogue.softcap, epilogue.scale,
            BLOCK_V=tile or config.block_vocab,
            num_warps=config.warps if tile is None else max(1, min(config.warps, tile // 256)),
        )  # fmt: skip
    if masses is not None:
        masses.sub_(torch.where(lse_other == -torch.inf, 0, lse_other)[:, None]).exp_()
    return Statistics(z_y, lse_other, h_o), masses


def gradients_(
    z_CV: Tensor,
    target_C: Tensor,
    scores: Statistics,
    upstream: Upstream,
    epilogue: Epilogue,
    out: Tensor | None = None,
    room: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Raw products → (E, r) with dlogits D = diag(r) E, in place or in `out`; r is None where it is all 1.

    float16 has a narrow range, so there E is D over the largest coefficient of each row. A negative target lies in
    another slice of the vocabulary.

    Args:
        out: [C, V] of any floating type; over the first half of each row's own bytes, or elsewhere.
        room: columns that may be read and written: V, and the padding of both buffers' rows.
    """
    out = z_CV if out is None else out
    r = None
    if out.dtype == torch.float16:
        r, upstream = relative(upstream)
    config = configs.rows(z_CV.device)
    target_C, bias, *given = dense(
        target_C, epilogue.bias, scores.lse_other, scores.h_o if upstream.g_ho is not None else None, *upstream
    )
    if len(z_CV):
        gradients_kernel[(len(z_CV),)](
            z_CV, z_CV.stride(0), out, out.stride(0), target_C, bias, *given, z_CV.shape[1], room or z_CV.shape[1],
            epilogue.softcap, epilogue.scale, out.element_size() < z_CV.element_size(), BLOCK_V=config.block_vocab,
            num_warps=config.warps,
        )  # fmt: skip
    return out, r


def dense(*vectors: Tensor | None) -> list[Any]:
    """Vectors as kernels read them, with unit stride; None stays."""
    return [v if v is None else v.contiguous() for v in vectors]


def relative(upstream: Upstream) -> tuple[Tensor, Upstream]:
    """(r, upstream / r): the largest coefficient of each row taken out, for types with a narrow range."""
    r = torch.stack([g.abs() for g in upstream if g is not None]).amax(0)
    r = torch.where(r == 0, 1, r)
    return r, Upstream(*(None if g is None else g / r for g in upstream))  # type: ignore[arg-type]


def token_loss_(
    z_CV: Tensor, target_C: Tensor, terms: TokenTerms, epilogue: Epilogue, out: Tensor | None = None,
    room: int | None = None, config: configs.Rows | None = None,
) -> tuple[Statistics, Tensor, Tensor]:  # fmt: skip
    """Raw products → (statistics, loss of each token, dlogits), in place or in `out`, in one launch.

    Args:
        terms: the loss, with vectors in the accumulators' type.
        room: as in `gradients_`.
        config: default: that of the device.
    """
    if terms.loss not in TOKEN_LOSSES:
        raise ValueError(f"loss: expected one of {TOKEN_LOSSES}, got {terms.loss!r}")
    out = z_CV if out is None else out
    z_y, lse_other, value = (z_CV.new_empty(len(z_CV), dtype=acc_dtype(z_CV.dtype)) for _ in range(3))
    h_o = torch.empty_like(z_y) if terms.entropy else None
    config = config or configs.rows(z_CV.device)
    vectors = dense(target_C, epilogue.bias, terms.factor, *(terms.ref or (None, None)))
    if len(z_CV):
        token_loss_kernel[(len(z_CV),)](
            z_CV, z_CV.stride(0), out, out.stride(0), *vectors, z_y, lse_other, h_o, value, z_CV.shape[1],
            room or z_CV.shape[1], terms.loss, epilogue.softcap, epilogue.scale,
            out.element_size() < z_CV.element_size(), BLOCK_V=config.block_vocab, num_warps=config.warps,
        )  # fmt: skip
    return Statistics(z_y, lse_other, h_o), value, out


def with_target_(weights_CV: Tensor, target_C: Tensor, r: Tensor, g_y: Tensor, total: Tensor) -> Tensor:
    """As `torch_rows.with_target_`, for weights with the sum `total` [C], and without waiting for the device."""
    r, g_y, total = dense(r, g_y, total)
    factor = torch.empty_like(r)
    config = configs.rows(weights_CV.device)
    if len(r):
        target_kernel[(len(r),)](
            weights_CV, weights_CV.stride(0), target_C.contiguous(), r, g_y, total, factor, weights_CV.shape[1],
            LARGEST_RATIO, BLOCK_V=config.block_vocab, num_warps=config.warps,
        )  # fmt: skip
    return factor


class TritonRows(RowSet):
    """The kernel set of the Triton row kernels."""

    token_losses = TOKEN_LOSSES

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        return statistics(self.logits(chunk), chunk.y, chunk.epilogue, entropy, mass_tile, chunk.room)

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        found, masses = self.score(chunk, entropy, mass_tile)
        return found, masses, Weighed(chunk.buffer, None)

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor | None]:
        return gradients_(weighed.e, chunk.y, statistics, upstream, chunk.epilogue, self.narrow(chunk), chunk.room)

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        self.logits(chunk)
        return self.pull_back(chunk, Weighed(chunk.buffer, None), statistics, upstream)

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor]:
        return token_loss_(self.logits(chunk), chunk.y, terms, chunk.epilogue, self.narrow(chunk), chunk.room)
