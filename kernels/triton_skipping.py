"""The products of skipping in Triton: dX = diag(r) E W and dW = Eᵀ X over the (row, tile) pairs that count alone.

One launch makes lists, on the device, of what counts; one launch makes dX or dW from them. A program owns a tile of the
result and walks through its list in order: nothing is summed by atomics, and results are bitwise the same from run to
run.
    dX    [rows × H] of BLOCK_C rows: through the tiles of the vocabulary that count for one of them
    dW    [vocabulary × H] of one tile: through the rows that count for it
dX takes more than counts, wherever rows of one program differ. So rows come in the order of how many tiles count for
them, which puts those with few together, and starts the longest programs first.

Dimensions: C rows of a chunk, V vocabulary, H hidden size, T tiles of TILE columns, R tiles of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgpb.kernels import configs
from rgpb.kernels.types import acc_dtype, dense


@triton.jit(
    do_not_specialize=["stride_n", "stride_m", "stride_l", "M"],
    do_not_specialize_on_alignment=["active_ptr", "list_ptr", "count_ptr"],
)
def list_kernel(
    active_ptr, stride_n, stride_m,  # [N, M] bool in
    list_ptr, stride_l, count_ptr,  # [N, M], [N] int32 out
    M,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row the places that are set, in order, and how many they are."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.full([], 0, tl.int32)
    for start in tl.range(0, M, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        one = tl.load(active_ptr + row * stride_n + offs.to(tl.int64) * stride_m, mask=offs < M, other=0).to(tl.int32)
        tl.store(list_ptr + row * stride_l + count + tl.cumsum(one, 0) - one, offs, mask=one != 0)
        count += tl.sum(one, 0)
    tl.store(count_ptr + row, count)


@triton.jit(
    do_not_specialize=["C", "V", "stride_l"],
    do_not_specialize_on_alignment=["order_ptr", "rows_ptr", "list_ptr", "count_ptr", "r_ptr", "place_ptr"],
)
def hidden_kernel(
    e_ptr, stride_ec,  # [C, V] in
    w_ptr, stride_wv, stride_wh,  # [V, H] in
    order_ptr,  # [V] int64 in: where the head's rows lie, or None
    rows_ptr,  # [C] int64 in: rows in the order that they are taken in
    list_ptr, stride_l, count_ptr,  # [R, T], [R] int32 in: the tiles that count for each tile of rows
    r_ptr, place_ptr,  # [C] in, or None: factors of the rows; int64 in, or None: where their results lie
    out_ptr, stride_oc, stride_oh,  # [·, H] out
    C, V, H,
    ADD: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    RAGGED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dX = diag(r) E W of a [BLOCK_C × BLOCK_H] tile. ADD: dX is added to. RAGGED: BLOCK_V doesn't divide V."""
    STEPS: tl.constexpr = TILE // BLOCK_V
    tiles_h = tl.cdiv(H, BLOCK_H)
    tile_c = tl.program_id(0) // tiles_h
    offs_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = tl.program_id(0) % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = offs_h < H
    rows = tl.load(rows_ptr + tl.minimum(offs_c, C - 1))  # beyond the end: another that exists, never stored
    e_rows = e_ptr + rows[:, None] * stride_ec
    w_columns = w_ptr + offs_h.to(tl.int64)[None, :] * stride_wh
    tiles = list_ptr + tile_c.to(tl.int64) * stride_l
    count = tl.load(count_ptr + tile_c)
    whole = V // BLOCK_V
    last = tl.load(tiles + tl.maximum(count - 1, 0))
    steps = tl.where(count > 0, (count - 1) * STEPS + tl.minimum(STEPS, whole - last * STEPS), 0)
    acc = tl.zeros((BLOCK_C, BLOCK_H), ACC)
    for step in tl.range(0, steps):
        offs_v = tl.load(tiles + step // STEPS) * TILE + step % STEPS * BLOCK_V + tl.arange(0, BLOCK_V)
        e = tl.load(e_rows + offs_v[None, :])
        w_rows = offs_v.to(tl.int64)
        if order_ptr is not None:
            w_rows = tl.load(order_ptr + offs_v)
        w = tl.load(w_columns + w_rows[:, None] * stride_wv, mask=in_h[None, :], other=0.0)
        acc = tl.dot(e, w, acc, input_precision="ieee", out_dtype=ACC)
    if RAGGED:  # noqa: SIM102
        if (count > 0) & (last == V // TILE):  # the columns after the last whole block; behind them anything may lie
            offs_v = whole * BLOCK_V + tl.arange(0, BLOCK_V)
            in_v = offs_v < V
            e = tl.load(e_rows + offs_v[None, :], mask=in_v[None, :], other=0.0)
            w_rows = offs_v.to(tl.int64)
            if order_ptr is not None:
                w_rows = tl.load(order_ptr + offs_v, mask=in_v, other=0)
            w = tl.load(w_columns + w_rows[:, None] * stride_wv, mask=in_v[:, None] & in_h[None, :], other=0.0)
            acc = tl.dot(e, w, acc, input_precision="ieee", out_dtype=ACC)
    if r_ptr is not None:
        acc *= tl.load(r_ptr + rows)[:, None]
    places = rows
    if place_ptr is not None:
        places = tl.load(place_ptr + rows)
    out_ptrs = out_ptr + places[:, None] * stride_oc + offs_h.to(tl.int64)[None, :] * stride_oh
    stored = (offs_c < C)[:, None] & in_h[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=stored, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["V", "stride_l"], do_not_specialize_on_alignment=["order_ptr", "list_ptr", "count_ptr"])
def head_kernel(
    e_ptr, stride_ec,  # [C, V] in
    x_ptr, stride_xc, stride_xh,  # [C, H] in, times the rows' factors
    order_ptr,  # [V] int64 in: where the rows of the result lie, or None
    list_ptr, stride_l, count_ptr,  # [T, C + BLOCK_C], [T] int32 in: the rows that count for each tile
    out_ptr, stride_ov, stride_oh,  # [V, H] out
    V, H, room,  # room: columns of e that may be read, with the padding of its rows
    ADD: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dW = Eᵀ X of a [BLOCK_V × BLOCK_H] tile, a part of one of TILE rows. ADD: dW is added to."""
    tiles_h = tl.cdiv(H, BLOCK_H)
    start_v = tl.program_id(0) // tiles_h * BLOCK_V
    tile = start_v // TILE
    count = tl.load(count_ptr + tile)
    if ADD:  # noqa: SIM102
        if count == 0:
            return
    offs_v = start_v + tl.arange(0, BLOCK_V)
    offs_h = tl.program_id(0) % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = offs_h < H
    rows = list_ptr + tile.to(tl.int64) * stride_l
    e_columns = e_ptr + offs_v[None, :]
    x_columns = x_ptr + offs_h.to(tl.int64)[None, :] * stride_xh
    acc = tl.zeros((BLOCK_V, BLOCK_H), ACC)
    in_room = (offs_v < room)[None, :]  # what lies in the padding of E ends in rows that dW doesn't have
    offs_c = tl.arange(0, BLOCK_C)
    whole = count // BLOCK_C * BLOCK_C
    row = tl.load(rows + offs_c)
    for start in tl.range(0, whole, BLOCK_C):
        e = tl.load(e_columns + row.to(tl.int64)[:, None] * stride_ec, mask=in_room, other=0.0)
        x = tl.load(x_columns + row.to(tl.int64)[:, None] * stride_xc, mask=in_h[None, :], other=0.0)
        row = tl.load(rows + start + BLOCK_C + offs_c)  # of the next block: addresses are known before they are needed
        acc = tl.dot(e.T, x, acc, input_precision="ieee", out_dtype=ACC)
    if whole < count:
        some = (whole + offs_c < count)[:, None]
        at = tl.where(some, row[:, None], 0).to(tl.int64)
        e = tl.load(e_columns + at * stride_ec, mask=some & in_room, other=0.0)
        x = tl.load(x_columns + at * stride_xc, mask=some & in_h[None, :], other=0.0)
        acc = tl.dot(e.T, x, acc, input_precision="ieee", out_dtype=ACC)
    in_v = offs_v < V
    places = offs_v.to(tl.int64)
    if order_ptr is not None:
        places = tl.load(order_ptr + offs_v, mask=in_v, other=0)
    out_ptrs = out_ptr + places[:, None] * stride_ov + offs_h.to(tl.int64)[None, :] * stride_oh
    stored = in_v[:, None] & in_h[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=stored, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored)


# -- launches ---------------------------------------------------------------------------------------------------------


class Counting(NamedTuple):
    """The kernels' `types.Counting`: tiles of `tile` columns, a power of two, that count for rows, bool [C, T]."""

    active: Tensor
    tile: int

    def hidden(
        self, e_CV: Tensor, weight_VH: Tensor, out: Tensor, r: Tensor | None = None, places: Tensor | None = None,
        order: Tensor | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """As `types.Counting.hidden`; sums in the accumulators' type, rounded once."""
        (rows, vocab), width = e_CV.shape, out.shape[1]
        config = configs.tile("hidden", e_CV.device, e_CV.dtype)
        block = min(config.vocab, self.tile)
        taken, together = tiles_of_rows(self.active, config.rows)
        lists, stride, counts = _lists(together)
        r, places, order = dense(r, places, order)
        if rows:
            hidden_kernel[(len(counts) * triton.cdiv(width, config.width),)](
                e_CV, e_CV.stride(0), weight_VH, *weight_VH.stride(), order, taken, lists, stride, counts, r, places,
                out, *out.stride(), rows, vocab, width, add, self.tile, config.rows, block, config.width,
                vocab % block != 0, _acc(e_CV), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

    def head(
        self, e_CV: Tensor, sides: list[Tensor], out: list[Tensor], order: Tensor | None = None,
        room: int | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """As `types.Counting.head`; sums in the accumulators' type, rounded once."""
        vocab = e_CV.shape[1]
        config = configs.tile("head", e_CV.device, e_CV.dtype)
        block = min(config.vocab, self.tile)
        lists, stride, counts = _lists(self.active.t())
        (order,) = dense(order)
        for x, total in zip(sides, out):
            width = x.shape[1]
            head_kernel[(triton.cdiv(vocab, block) * triton.cdiv(width, config.width),)](
                e_CV, e_CV.stride(0), x, *x.stride(), order, lists, stride, counts, total, *total.stride(), vocab,
                width, room or vocab, add, self.tile, config.rows, block, config.width, _acc(e_CV),
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip


def tiles_of_rows(active_CT: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """The order that rows are taken in, int64 [C], and which tiles count for one of so many of them, bool [R, T]."""
    rows, tiles = active_CT.shape
    taken = active_CT.sum(1).argsort(descending=True, stable=True)
    padded = torch.nn.functional.pad(active_CT[taken], (0, 0, 0, -rows % together))
    return taken, padded.view(-1, together, tiles).any(1)


# Behind each list, for a block of `head` that is read ahead.
ROOM = 128


def _lists(active_NM: Tensor) -> tuple[Tensor, int, Tensor]:
    """The places that are set of each row, in order, int32 [N, M + ROOM], its stride, and how many they are, [N]."""
    rows, columns = active_NM.shape
    lists = torch.empty(rows, columns + ROOM, dtype=torch.int32, device=active_NM.device)
    counts = lists.new_empty(rows)
    if rows:
        list_kernel[(rows,)](active_NM, *active_NM.stride(), lists, lists.stride(0), counts, columns, 1024, num_warps=4)
    return lists, lists.stride(0), counts


def _acc(e_CV: Tensor) -> Any:
    return tl.float64 if acc_dtype(e_CV.dtype) == torch.float64 else tl.float32
