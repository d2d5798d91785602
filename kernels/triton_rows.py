"""The row kernels in Triton: one program sweeps one row of a chunk of logits; the formulas are those of `torch_rows`.

Forward, per row with target y, in one reading sweep with a running maximum m:
    lse_other = m + log Σ_{k≠y} exp(z_k − m)        H_o = log Σ_{k≠y} exp(z_k − m) − Σ_{k≠y} q_k (z_k − m)
Vector-Jacobian product, in a second sweep that reads logits and writes dlogits, in place or as narrower numbers:
    ∂L/∂z_y = g_zy        ∂L/∂z_k = q_k · (g_lo − g_ho · (H_o + log q_k)),  k ≠ y;        times J_k
Where the results lie apart from the logits, the first sweep is the only one: it writes E_k = J_k exp(z_k − s), and what
is left are the target's entry and a factor of each row, D = diag(r) E. The shift s is the target's logit, known before
the sweep. A row whose maximum turns out to be far from it is swept again relative to that, in the same launch.
For token-wise losses everything is one launch, and the coefficient is computed between.

A block of BLOCK_V columns is [BLOCK_V / LANES, LANES], and each lane has running statistics of its own, merged once at
the end of the row: the threads of a program don't meet before. Blocks inside the vocabulary have no masks.

In place is safe because a program owns its row, loads the target's logit before anything is stored, and, where the
stores are narrower than the loads, puts a barrier between a block's loads and its stores: they fall on bytes that are
read by then. The target's entry is stored last, behind a barrier.

A negative target: in `statistics`, `weights` and `token_loss_` the row is ignored (zeros come out); in `gradients_` the
target lies in another slice of the vocabulary.

Dimensions: C rows of the buffer, V vocabulary (or a slice of it), T tiles of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgpb.kernels import configs
from rgpb.kernels.rows import RowSet
from rgpb.kernels.triton_epilogue import IMPOSSIBLE, exp, finish, gradient, hash_helpers
from rgpb.kernels.triton_skipping import Counting
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
    dense,
)

# How far the largest logit of a row may lie from the shift of its weights: exp(40) times the length of a row, and times
# the largest ratio of a target's coefficient to the others' (types.LARGEST_RATIO), is inside the range of float32.
FARTHEST = tl.constexpr(40.0)
# Below every possible token's logit, and the difference of two of these is finite.
LOWEST_FLOAT, LOWEST_DOUBLE = tl.constexpr(-1.7e38), tl.constexpr(-8e307)

# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _columns(BLOCK_V: tl.constexpr, LANES: tl.constexpr):
    return tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _logits(z_row, bias_ptr, offs, V, room, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """One block of a row of logits, and J there. MASKED: the vocabulary ends in it."""
    ACC: tl.constexpr = tl.float64 if z_row.dtype.element_ty == tl.float64 else tl.float32
    bias = None
    if MASKED:
        z = tl.load(z_row + offs, mask=offs < room, other=0.0).to(ACC)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs, mask=offs < V, other=0.0).to(ACC)
    else:
        z = tl.load(z_row + offs).to(ACC)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs).to(ACC)
    z, j = finish(z, bias, SOFTCAP, SCALE)
    return z, j


@triton.jit
def _others(
    z_row, bias_ptr, start, cols, y, V, room, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """The same for columns start + cols, with −inf at the target and outside of the vocabulary."""
    z, j = _logits(z_row, bias_ptr, start + cols, V, room, MASKED, SOFTCAP, SCALE)
    wanted = cols != y - start  # in 32 bits: a compiler takes start + cols to 64
    if MASKED:
        wanted = wanted & (cols < V - start)
    return tl.where(wanted, z, -float("inf")), j


@triton.jit
def _target(z_row, bias_ptr, y, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """The target's logit, and J there."""
    ACC: tl.constexpr = tl.float64 if z_row.dtype.element_ty == tl.float64 else tl.float32
    z_y = tl.load(z_row + y).to(ACC)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + y).to(ACC)
    z_y, j_y = finish(z_y, bias, SOFTCAP, SCALE)
    return z_y, j_y


@triton.jit
def _add(z, top, total, mean, ENTROPY: tl.constexpr):
    """A block taken into its lanes' largest z, Σ exp(z − top) and Σ exp(z − top) (z − top)."""
    new_top = tl.maximum(top, tl.max(z, 0))
    back = top - new_top
    rescale = exp(back)
    x = z - new_top[None, :]
    e = exp(x)
    if ENTROPY:
        mean = rescale * (mean + back * total) + tl.sum(e * tl.maximum(x, IMPOSSIBLE), 0)
    return new_top, total * rescale + tl.sum(e, 0), mean


@triton.jit
def _sweep(
    z_row, bias_ptr, y, V, room,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(lse_other, H_o) of a row."""
    ACC: tl.constexpr = tl.float64 if z_row.dtype.element_ty == tl.float64 else tl.float32
    LOWEST: tl.constexpr = LOWEST_DOUBLE if z_row.dtype.element_ty == tl.float64 else LOWEST_FLOAT
    cols = _columns(BLOCK_V, LANES)
    top = tl.full([LANES], LOWEST, ACC)
    total = tl.zeros([LANES], ACC)
    mean = tl.zeros([LANES], ACC)
    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V):
        z, _ = _others(z_row, bias_ptr, start, cols, y, V, room, False, SOFTCAP, SCALE)
        top, total, mean = _add(z, top, total, mean, ENTROPY)
    if whole < V:
        z, _ = _others(z_row, bias_ptr, whole, cols, y, V, room, True, SOFTCAP, SCALE)
        top, total, mean = _add(z, top, total, mean, ENTROPY)
    row_top = tl.max(top, 0)
    back = top - row_top
    rescale = exp(back)
    row_total = tl.sum(total * rescale, 0)
    log_total = tl.log(row_total)
    h_o = tl.full([], 0.0, ACC)
    if ENTROPY:
        row_mean = tl.sum(rescale * (mean + back * total), 0)
        h_o = tl.where(row_total > 0, log_total - row_mean / row_total, 0.0)
    return row_top + log_total, h_o


@triton.jit
def _weigh_block(
    z, j, e_row, offs, room, shift, top, total, mean, MASKED: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """Weights of a block written, and taken into its lanes' largest z, Σ exp(z − shift), Σ exp(z − shift) (z − top)."""
    e = exp(z - shift)
    if MASKED:
        tl.store(e_row + offs, (e * j).to(e_row.dtype.element_ty), mask=offs < room)
    else:
        tl.store(e_row + offs, (e * j).to(e_row.dtype.element_ty))
    new_top = tl.maximum(top, tl.max(z, 0))
    if ENTROPY:
        mean += (top - new_top) * total
        mean += tl.sum(e * tl.maximum(z - new_top[None, :], IMPOSSIBLE), 0)
    return new_top, total + tl.sum(e, 0), mean


@triton.jit
def _weigh(
    z_row, e_row, bias_ptr, y, z_y, V, room,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(lse_other, H_o, Σ exp(z − shift)) of a row, whose weights J exp(z − shift) are written; 0 at the target."""
    ACC: tl.constexpr = tl.float64 if z_row.dtype.element_ty == tl.float64 else tl.float32
    LOWEST: tl.constexpr = LOWEST_DOUBLE if z_row.dtype.element_ty == tl.float64 else LOWEST_FLOAT
    cols = _columns(BLOCK_V, LANES)
    whole = V // BLOCK_V * BLOCK_V
    shift = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)
    row_top = shift
    top = tl.full([LANES], LOWEST, ACC)
    total = tl.zeros([LANES], ACC)
    mean = tl.zeros([LANES], ACC)
    again = tl.full([], 1, tl.int32)
    while again > 0:
        top = tl.full([LANES], LOWEST, ACC)
        total = tl.zeros([LANES], ACC)
        mean = tl.zeros([LANES], ACC)
        for start in tl.range(0, whole, BLOCK_V):
            z, j = _others(z_row, bias_ptr, start, cols, y, V, room, False, SOFTCAP, SCALE)
            top, total, mean = _weigh_block(z, j, e_row, start + cols, room, shift, top, total, mean, False, ENTROPY)
        if whole < V:
            z, j = _others(z_row, bias_ptr, whole, cols, y, V, room, True, SOFTCAP, SCALE)
            top, total, mean = _weigh_block(z, j, e_row, whole + cols, room, shift, top, total, mean, True, ENTROPY)
        row_top = tl.max(top, 0)
        far = (row_top > LOWEST) & (tl.abs(row_top - shift) > FARTHEST)
        again = tl.where(far, 1, 0)  # relative to the maximum itself, so once
        shift = tl.where(far, row_top, shift)
    row_total = tl.sum(total, 0)
    log_total = tl.log(row_total)
    h_o = tl.full([], 0.0, ACC)
    if ENTROPY:
        row_mean = tl.sum(mean + (top - row_top) * total, 0)
        h_o = tl.where(row_total > 0, log_total + (shift - row_top) - row_mean / row_total, 0.0)
    return shift + log_total, h_o, row_total


@triton.jit
def _pull_back(
    z_row, out_row, bias_ptr, y, lse_other, h_o, g_y, g_lo, g_ho, V, room,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of a row → dlogits, g_y at the target. NARROW: in the same bytes, with fewer of them to an element."""
    lse_other = tl.where(lse_other == -float("inf"), 0.0, lse_other)  # no other token: every q is 0
    cols = _columns(BLOCK_V, LANES)
    whole = V // BLOCK_V * BLOCK_V
    tl.debug_barrier()  # whatever else was read of this row is read
    for start in tl.range(0, whole, BLOCK_V):
        offs = start + cols
        z, j = _logits(z_row, bias_ptr, offs, V, room, False, SOFTCAP, SCALE)
        d = (gradient(z, lse_other, h_o, g_lo, g_ho) * j).to(out_row.dtype.element_ty)
        if NARROW:
            tl.debug_barrier()
        tl.store(out_row + offs, d)
    if whole < V:
        offs = whole + cols
        z, j = _logits(z_row, bias_ptr, offs, V, room, True, SOFTCAP, SCALE)
        d = (gradient(z, lse_other, h_o, g_lo, g_ho) * j).to(out_row.dtype.element_ty)
        if NARROW:
            tl.debug_barrier()
        tl.store(out_row + offs, d, mask=offs < room)
    tl.debug_barrier()
    if y >= 0:
        tl.store(out_row + y, g_y.to(out_row.dtype.element_ty))


@triton.jit
def _clear(row, V, BLOCK_V: tl.constexpr):
    for start in tl.range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        tl.store(row + offs, tl.full([BLOCK_V], 0.0, row.dtype.element_ty), mask=offs < V)


# A kernel isn't compiled again for what changes none of its code: where vectors of rows begin, how long a row is.
VECTORS = [
    "target_ptr", "lo_ptr", "ho_ptr", "zy_ptr", "jy_ptr", "total_ptr", "gzy_ptr", "glo_ptr", "gho_ptr", "gy_ptr",
    "weight_ptr", "ref_logp_ptr", "ref_lam_ptr", "value_ptr", "r_ptr", "factor_ptr", "mass_ptr",
]  # fmt: skip
LENGTHS = ["V"]


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=VECTORS)
def statistics_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    e_ptr, stride_ec,  # [C, V] out, apart from z: weights, or None
    target_ptr, bias_ptr,  # [C], [V] or None
    zy_ptr, lo_ptr, ho_ptr,  # [C] out; ho_ptr None without entropy
    total_ptr, jy_ptr,  # [C] out with weights: Σ exp(z − shift), J at the target; jy_ptr None without a soft-cap
    V, room,  # columns; how many may be touched: with the padding of the rows
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(z_y, lse_other, H_o) of each row in one sweep, and E with it."""
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int32)
    z_row = z_ptr + row * stride_zc
    z_y = tl.full([], 0.0, ACC)
    j_y = tl.full([], SCALE, ACC)
    lse_other = tl.full([], 0.0, ACC)
    h_o = tl.full([], 0.0, ACC)
    total = tl.full([], 0.0, ACC)
    if y < 0:
        if e_ptr is not None:
            _clear(e_ptr + row * stride_ec, V, BLOCK_V)
    else:
        z_y, j_y = _target(z_row, bias_ptr, y, SOFTCAP, SCALE)
        if e_ptr is None:
            lse_other, h_o = _sweep(z_row, bias_ptr, y, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V, LANES)
        else:
            lse_other, h_o, total = _weigh(
                z_row, e_ptr + row * stride_ec, bias_ptr, y, z_y, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V,
                LANES,
            )  # fmt: skip
    tl.store(zy_ptr + row, z_y)
    tl.store(lo_ptr + row, lse_other)
    if ho_ptr is not None:
        tl.store(ho_ptr + row, h_o)
    if total_ptr is not None:
        tl.store(total_ptr + row, total)
    if jy_ptr is not None:
        tl.store(jy_ptr + row, j_y)


@triton.jit(do_not_specialize=[*LENGTHS, "T", "stride_mc"], do_not_specialize_on_alignment=VECTORS)
def masses_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    target_ptr, bias_ptr, lo_ptr,  # [C], [V] or None, [C] in: lse_other
    mass_ptr, stride_mc,  # [C, T] out
    V, T, room,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The softmax mass over the other tokens of each TILE columns, TILES of them to a program."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILES
    tiles = first + tl.arange(0, TILES)
    y = tl.load(target_ptr + row).to(tl.int32)
    lse_other = tl.load(lo_ptr + row)
    lse_other = tl.where(lse_other == -float("inf"), 0.0, lse_other)  # no other token: every q is 0
    cols = _columns(TILES * TILE, TILE)
    z, _ = _others(z_ptr + row * stride_zc, bias_ptr, first * TILE, cols, y, V, room, True, SOFTCAP, SCALE)
    mass = tl.where(y < 0, 0.0, tl.sum(exp(z - lse_other), 1))
    tl.store(mass_ptr + row * stride_mc + tiles, mass, mask=tiles < T)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=VECTORS)
def gradients_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    out_ptr, stride_oc,  # [C, V] out: dlogits, possibly over the same bytes
    target_ptr, bias_ptr,  # [C], [V] or None
    lo_ptr, ho_ptr,  # [C] in: statistics; ho_ptr None without g_ho
    gzy_ptr, glo_ptr, gho_ptr,  # [C] in: upstream gradients
    V, room,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dlogits of each row from known statistics and coefficients."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int32)
    z_row = z_ptr + row * stride_zc
    h_o = None
    g_ho = None
    if gho_ptr is not None:
        h_o = tl.load(ho_ptr + row)
        g_ho = tl.load(gho_ptr + row)
    _, j_y = _target(z_row, bias_ptr, tl.maximum(y, 0), SOFTCAP, SCALE)
    _pull_back(
        z_row, out_ptr + row * stride_oc, bias_ptr, y, tl.load(lo_ptr + row), h_o, tl.load(gzy_ptr + row) * j_y,
        tl.load(glo_ptr + row), g_ho, V, room, SOFTCAP, SCALE, NARROW, BLOCK_V, LANES,
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=VECTORS)
def token_loss_kernel(
    z_ptr, stride_zc,  # [C, V] in: raw products
    out_ptr, stride_oc,  # [C, V] out: weights apart from z, or without r_ptr dlogits, possibly over the same bytes
    target_ptr, bias_ptr,  # [C], [V] or None
    weight_ptr, ref_logp_ptr, ref_lam_ptr,  # [C] in: factor of each token's loss; reference, or None
    zy_ptr, lo_ptr, ho_ptr, value_ptr, r_ptr,  # [C] out; ho_ptr None without entropy; r_ptr None: two sweeps
    V, room,
    LOSS: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and dlogits of a token-wise loss in one launch: log-softmax, gather, reference, coefficient."""
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int32)
    z_row = z_ptr + row * stride_zc
    out_row = out_ptr + row * stride_oc
    z_y = tl.full([], 0.0, ACC)
    lse_other = tl.full([], 0.0, ACC)
    h_o = tl.full([], 0.0, ACC)
    value = tl.full([], 0.0, ACC)
    r = tl.full([], 0.0, ACC)
    if y < 0:
        _clear(out_row, V, BLOCK_V)  # a row that is ignored is never read, so nothing is ahead of these stores
    else:
        z_y, j_y = _target(z_row, bias_ptr, y, SOFTCAP, SCALE)
        total = tl.full([], 1.0, ACC)
        if r_ptr is None:
            lse_other, h_o = _sweep(z_row, bias_ptr, y, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V, LANES)
        else:
            lse_other, h_o, total = _weigh(
                z_row, out_row, bias_ptr, y, z_y, V, room, ho_ptr is not None, SOFTCAP, SCALE, BLOCK_V, LANES
            )
        lam = tl.where(lse_other == -float("inf"), float("inf"), z_y - lse_other)
        ref_logp = z_y * 0.0
        ref_lam = z_y * 0.0
        if ref_lam_ptr is not None:
            ref_logp = tl.load(ref_logp_ptr + row)
            ref_lam = tl.load(ref_lam_ptr + row)
        value, slope = token_loss(lam, h_o, tl.load(weight_ptr + row), ref_logp, ref_lam, LOSS)
        slope = tl.where(lse_other == -float("inf"), 0.0, slope)  # a certain token: no logit moves that
        if r_ptr is None:
            _pull_back(
                z_row, out_row, bias_ptr, y, lse_other, None, slope * j_y, -slope, None, V, room, SOFTCAP, SCALE,
                NARROW, BLOCK_V, LANES,
            )  # fmt: skip
        else:
            tl.debug_barrier()  # the sweep has written that entry, too
            tl.store(out_row + y, (-total * j_y).to(out_row.dtype.element_ty))
            r = tl.where(total == 0, 0.0, -slope / total)
    tl.store(zy_ptr + row, z_y)
    tl.store(lo_ptr + row, lse_other)
    tl.store(value_ptr + row, value)
    if ho_ptr is not None:
        tl.store(ho_ptr + row, h_o)
    if r_ptr is not None:
        tl.store(r_ptr + row, r)


@triton.jit(do_not_specialize=[*LENGTHS, "stride_ec"], do_not_specialize_on_alignment=VECTORS)
def target_kernel(
    e_ptr, stride_ec,  # [C, V] in place: weights
    target_ptr, r_ptr, gy_ptr, total_ptr,  # [C] in: column or −1, factor of the row, ∂L/∂z_y · J_y, Σ of the weights
    factor_ptr,  # [C] out: the factor, changed where the target's gradient dwarfs the others'
    V,
    LARGEST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The target's entry such that D = diag(factor) · E."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int32)
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


hash_helpers(globals())

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
    found, _, _ = _statistics(z_CV, target_C, epilogue, entropy, None, room)
    return found, None if tile is None else masses(z_CV, target_C, found, epilogue, tile, room)


def weights(
    z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool, out: Tensor, room: int | None = None
) -> tuple[Statistics, Tensor, Tensor | None]:
    """(`statistics`, Σ exp(z − shift) [C], J at the targets [C] or None without a soft-cap), and the weights
    J exp(z − shift) of the other tokens in `out`, 0 at the target.

    Args:
        out: [C, V] of any floating type but float16, no byte of it the logits'.
        room: as in `gradients_`.
    """
    found, total, j_y = _statistics(z_CV, target_C, epilogue, entropy, out, room)
    assert total is not None
    return found, total, j_y


def _statistics(
    z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool, out: Tensor | None, room: int | None
) -> tuple[Statistics, Tensor | None, Tensor | None]:
    rows, vocab = z_CV.shape
    z_y, lse_other = (z_CV.new_empty(rows, dtype=acc_dtype(z_CV.dtype)) for _ in range(2))
    h_o = torch.empty_like(z_y) if entropy else None
    total = None if out is None else torch.empty_like(z_y)
    j_y = None if out is None or epilogue.softcap is None else torch.empty_like(z_y)
    config = configs.rows(z_CV.device)
    target_C, bias = dense(target_C, epilogue.bias)
    if rows:
        statistics_kernel[(rows,)](
            z_CV, z_CV.stride(0), out, 0 if out is None else out.stride(0), target_C, bias, z_y, lse_other, h_o, total,
            j_y, vocab, room or vocab, epilogue.softcap, epilogue.scale, *block_of(config, out, True),
            num_warps=config.warps,
        )  # fmt: skip
    return Statistics(z_y, lse_other, h_o), total, j_y


def masses(
    z_CV: Tensor, target_C: Tensor, scores: Statistics, epilogue: Epilogue, tile: int, room: int | None = None
) -> Tensor:
    """The softmax mass over the other tokens of each `tile` columns, [C, ⌈V / tile⌉], from known statistics."""
    rows, vocab = z_CV.shape
    count, together = -(-vocab // tile), 4
    made = scores.lse_other.new_empty(rows, count)
    target_C, bias, lse_other = dense(target_C, epilogue.bias, scores.lse_other)
    if rows:
        masses_kernel[(rows, -(-count // together))](
            z_CV, z_CV.stride(0), target_C, bias, lse_other, made, made.stride(0), vocab, count, room or vocab,
            epilogue.softcap, epilogue.scale, together, tile, num_warps=max(1, min(8, together * tile // 512)),
        )  # fmt: skip
    return made


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
            epilogue.softcap, epilogue.scale, narrows(z_CV, out), config.block_vocab, config.lanes,
            num_warps=config.warps,
        )  # fmt: skip
    return out, r


def block_of(config: configs.Rows, out: Tensor | None, weights: bool) -> tuple[int, int]:
    """BLOCK_V and LANES of a launch that sweeps for statistics. Where it writes in 16 bits, 16 bytes of a thread are
    twice as many columns; for weights a block is half as long then, in so few registers that three programs fit a
    multiprocessor."""
    narrow = out is not None and out.element_size() == 2
    lanes = config.lanes * (2 if narrow else 1)
    return max(lanes, config.block_vocab // (2 if narrow and weights else 1)), lanes


def narrows(z_CV: Tensor, out: Tensor) -> bool:
    """Whether `out` lies over the logits' own bytes with fewer of them to an element."""
    return out.data_ptr() == z_CV.data_ptr() and out.element_size() < z_CV.element_size()


def takes_weights(z_CV: Tensor, out: Tensor | None) -> bool:
    """Whether `out` can hold weights: no byte of it is the logits', which may have to be read again; and its range is
    wide enough for what isn't normalised."""
    return out is not None and out.data_ptr() != z_CV.data_ptr() and out.dtype != torch.float16


def relative(upstream: Upstream) -> tuple[Tensor, Upstream]:
    """(r, upstream / r): the largest coefficient of each row taken out, for types with a narrow range."""
    r = torch.stack([g.abs() for g in upstream if g is not None]).amax(0)
    r = torch.where(r == 0, 1, r)
    return r, Upstream(*(None if g is None else g / r for g in upstream))  # type: ignore[arg-type]


def token_loss_(
    z_CV: Tensor, target_C: Tensor, terms: TokenTerms, epilogue: Epilogue, out: Tensor | None = None,
    room: int | None = None, config: configs.Rows | None = None,
) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Raw products → (statistics, loss of each token, E, r) with dlogits D = diag(r) E, in place or in `out`, in one
    launch; r is None where it is all 1. Apart from the logits, and but for float16, it takes one sweep, else two.

    Args:
        terms: the loss, with vectors in the accumulators' type.
        out, room: as in `gradients_`.
        config: default: that of the device.
    """
    if terms.loss not in TOKEN_LOSSES:
        raise ValueError(f"loss: expected one of {TOKEN_LOSSES}, got {terms.loss!r}")
    z_y, lse_other, value = (z_CV.new_empty(len(z_CV), dtype=acc_dtype(z_CV.dtype)) for _ in range(3))
    h_o = torch.empty_like(z_y) if terms.entropy else None
    r = torch.empty_like(z_y) if takes_weights(z_CV, out) else None
    out = z_CV if out is None else out
    config = config or configs.rows(z_CV.device)
    vectors = dense(target_C, epilogue.bias, terms.factor, *(terms.ref or (None, None)))
    if len(z_CV):
        token_loss_kernel[(len(z_CV),)](
            z_CV, z_CV.stride(0), out, out.stride(0), *vectors, z_y, lse_other, h_o, value, r, z_CV.shape[1],
            room or z_CV.shape[1], terms.loss, epilogue.softcap, epilogue.scale, narrows(z_CV, out),
            *block_of(config, out, r is not None), num_warps=config.warps,
        )  # fmt: skip
    return Statistics(z_y, lse_other, h_o), value, out, r


def with_target_(weights_CV: Tensor, target_C: Tensor, r: Tensor, g_y: Tensor, total: Tensor) -> Tensor:
    """As `torch_rows.with_target_`, for weights with the sum `total` [C], and without waiting for the device."""
    target_C, r, g_y, total = dense(target_C, r, g_y, total)
    factor = torch.empty_like(r)
    config = configs.rows(weights_CV.device)
    if len(r):
        target_kernel[(len(r),)](
            weights_CV, weights_CV.stride(0), target_C, r, g_y, total, factor, weights_CV.shape[1],
            LARGEST_RATIO, BLOCK_V=config.block_vocab, num_warps=config.warps,
        )  # fmt: skip
    return factor


class TritonRows(RowSet):
    """The kernel set of the Triton row kernels. Weights go where 16-bit results lie apart from the logits; elsewhere
    these stay as they are until the coefficients are known."""

    token_losses = TOKEN_LOSSES

    def counting(self, active: Tensor, tile: int) -> Counting:
        return Counting(active, tile)

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        return statistics(self.logits(chunk), chunk.y, chunk.epilogue, entropy, mass_tile, chunk.room)

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        out = self.narrow(chunk)
        if out is None or not takes_weights(chunk.buffer, out):
            return *self.score(chunk, entropy, mass_tile), Weighed(chunk.buffer, None)
        z, y, epilogue = self.logits(chunk), chunk.y, chunk.epilogue
        found, total, j_y = weights(z, y, epilogue, entropy, out, chunk.room)
        made = None if mass_tile is None else masses(z, y, found, epilogue, mass_tile, chunk.room)
        return found, made, Weighed(out, total, j_y)

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor | None]:
        e, total, j_y = weighed
        if total is None:
            return gradients_(e, chunk.y, statistics, upstream, chunk.epilogue, self.narrow(chunk), chunk.room)
        r = torch.where(total > 0, upstream.g_lo / total, 0)
        g_y = upstream.g_zy * (chunk.epilogue.scale if j_y is None else j_y)
        return e, with_target_(e, chunk.y, r, g_y, total)

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        self.logits(chunk)
        return self.pull_back(chunk, Weighed(chunk.buffer, None), statistics, upstream)

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:
        return token_loss_(self.logits(chunk), chunk.y, terms, chunk.epilogue, self.narrow(chunk), chunk.room)
