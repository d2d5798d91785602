"""The tile kernels in Triton: logits exist in registers only, a [rows × vocabulary] tile at a time.

One kernel, three jobs, told apart by what it is given:
    score      each tile's partial statistics per row: its maximum, Σ exp(z_k − maximum), and for the entropy
               Σ exp(z_k − maximum)(z_k − maximum), k ≠ y; and z_y where the target lies in the tile
    weights    the same relative to a shift known per row, and E_k = J_k exp(z_k − shift) written, 0 at the target
    gradients  dlogits from known statistics and coefficients written: ∂L/∂z_y · J_y at the target,
               J_k q_k (g_lo − g_ho (H_o + log q_k)) elsewhere
`merge` then turns the partial statistics of all tiles into (lse_other, H_o) per row.

Programs are persistent: each takes every n-th tile, in an order in which neighbours share their slice of the weight.

Dimensions: C rows, V vocabulary (or a slice of it), H hidden size, T parts of tiles of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rgpb.kernels import configs
from rgpb.kernels.triton_epilogue import finish, gradient, hash_helpers
from rgpb.kernels.triton_rows import relative, with_target_
from rgpb.kernels.triton_skipping import Counting
from rgpb.kernels.types import Chunk, Epilogue, Statistics, TokenTerms, Upstream, Weighed, acc_dtype, dense, inside


@triton.jit
def _finish_tile(
    z, offs_c, start_v, tile_v,  # [C, V] raw products of rows offs_c and columns from start_v on, the partials' place
    target_ptr, bias_ptr, shift_ptr, ho_ptr, gzy_ptr, glo_ptr, gho_ptr, zy_ptr, top_ptr, sum_ptr, mean_ptr, stride_t,
    e_ptr, stride_ec, C, V, room, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What follows the product, of some columns."""
    offs_v = start_v + tl.arange(0, z.shape[1])
    in_c = offs_c < C
    in_v = offs_v < V
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=in_v, other=0.0).to(ACC)[None, :]
    z, j = finish(z, bias, SOFTCAP, SCALE)
    y = tl.load(target_ptr + offs_c, mask=in_c, other=-1)
    is_target = offs_v[None, :] == y[:, None]

    if glo_ptr is not None:
        lse_other = tl.load(shift_ptr + offs_c, mask=in_c, other=0.0)
        lse_other = tl.where(lse_other == -float("inf"), 0.0, lse_other)  # no other token: every q is 0
        g_zy = tl.load(gzy_ptr + offs_c, mask=in_c, other=0.0)
        g_lo = tl.load(glo_ptr + offs_c, mask=in_c, other=0.0)
        h_o = None
        g_ho = None
        if gho_ptr is not None:
            h_o = tl.load(ho_ptr + offs_c, mask=in_c, other=0.0)[:, None]
            g_ho = tl.load(gho_ptr + offs_c, mask=in_c, other=0.0)[:, None]
        d = gradient(z, lse_other[:, None], h_o, g_lo[:, None], g_ho)
        e = tl.where(is_target, g_zy[:, None], d)
    else:
        z_y = tl.sum(tl.where(is_target, z, 0.0), 1)
        tl.store(zy_ptr + offs_c, z_y, mask=in_c & (y >= start_v) & (y < start_v + z.shape[1]))
        others = tl.where(is_target | (offs_v >= V)[None, :], -float("inf"), z)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + offs_c, mask=in_c, other=0.0)
        else:
            shift = tl.max(others, 1)
            shift = tl.where(shift == -float("inf"), 0.0, shift)
            tl.store(top_ptr + tile_v.to(tl.int64) * stride_t + offs_c, shift, mask=in_c)
        e = tl.exp(others - shift[:, None])
        tl.store(sum_ptr + tile_v.to(tl.int64) * stride_t + offs_c, tl.sum(e, 1), mask=in_c)
        if mean_ptr is not None:
            mean = tl.sum(tl.where(e > 0, e * (z - shift[:, None]), 0.0), 1)
            tl.store(mean_ptr + tile_v.to(tl.int64) * stride_t + offs_c, mean, mask=in_c)
    if e_ptr is not None:
        e_ptrs = e_ptr + offs_c.to(tl.int64)[:, None] * stride_ec + offs_v[None, :]
        tl.store(e_ptrs, (e * j).to(e_ptr.dtype.element_ty), mask=in_c[:, None] & (offs_v < room)[None, :])


# One number to each row or tile is never loaded by more than 4 bytes a thread: its alignment, and how many there are,
# change no code.
VECTORS = [
    "target_ptr", "bias_ptr", "shift_ptr", "ho_ptr", "gzy_ptr", "glo_ptr", "gho_ptr", "zy_ptr", "top_ptr", "sum_ptr",
    "mean_ptr", "lo_ptr", "total_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=["C", "V", "stride_t"], do_not_specialize_on_alignment=VECTORS)
def tiles_kernel(
    x, stride_xc,  # [C, H] in: pointer or tensor descriptor
    w, stride_wv,  # [V, H] in: pointer or tensor descriptor
    target_ptr, bias_ptr,  # [C] (−1: in another slice), [V] or None
    shift_ptr, ho_ptr, gzy_ptr, glo_ptr, gho_ptr,  # [C] in, or None: what E is relative to; for gradients also these
    zy_ptr, top_ptr, sum_ptr, mean_ptr, stride_t,  # [C], [T, C] out, or None: z_y, partial statistics
    e_ptr, stride_ec,  # [C, V] out, or None: weights or dlogits
    C, V, H, room,  # room: columns of e that may be written, with the padding of its rows
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    EVEN_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Score, weights or gradients of all [BLOCK_C × BLOCK_V] tiles."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_c * tiles_v, tl.num_programs(0)):
        # GROUP tiles of rows go through the vocabulary together: a slice of W is read from memory once for them
        first = tile // (GROUP * tiles_v) * GROUP
        size = tl.minimum(tiles_c - first, GROUP)
        place = tile % (GROUP * tiles_v)
        tile_c = first + place % size
        tile_v = place // size
        start_c = tile_c * BLOCK_C
        start_v = tile_v * BLOCK_V
        offs_c = start_c + tl.arange(0, BLOCK_C)
        offs_v = start_v + tl.arange(0, BLOCK_V)
        rows = offs_c.to(tl.int64)

        z = tl.zeros((BLOCK_C, BLOCK_V), ACC)
        if TMA:
            for h in tl.range(0, H, BLOCK_H):
                a = x.load([start_c, h])
                b = w.load([start_v, h])
                z = tl.dot(a, b.T, z, input_precision="ieee", out_dtype=ACC)
        else:
            offs_h = tl.arange(0, BLOCK_H)
            # rows beyond the end are read as others that exist, and never stored
            a_ptrs = x + (rows % C)[:, None] * stride_xc + offs_h[None, :]
            b_ptrs = w + (offs_v % V).to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
            for h in tl.range(0, H, BLOCK_H):
                if EVEN_H:
                    a = tl.load(a_ptrs)
                    b = tl.load(b_ptrs)
                else:
                    a = tl.load(a_ptrs, mask=h + offs_h[None, :] < H, other=0.0)
                    b = tl.load(b_ptrs, mask=h + offs_h[None, :] < H, other=0.0)
                z = tl.dot(a, b.T, z, input_precision="ieee", out_dtype=ACC)
                a_ptrs += BLOCK_H
                b_ptrs += BLOCK_H

        if BLOCK_V == 256:  # finished 128 columns at a time: registers hold what one half needs beside the other
            left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_C, 2, 128)), (0, 2, 1)))
            for half in tl.static_range(2):
                _finish_tile(
                    left if half == 0 else right, offs_c, start_v + 128 * half, 2 * tile_v + half, target_ptr, bias_ptr,
                    shift_ptr, ho_ptr, gzy_ptr, glo_ptr, gho_ptr, zy_ptr, top_ptr, sum_ptr, mean_ptr, stride_t, e_ptr,
                    stride_ec, C, V, room, SOFTCAP, SCALE, ACC,
                )  # fmt: skip
        else:
            _finish_tile(
                z, offs_c, start_v, tile_v, target_ptr, bias_ptr, shift_ptr, ho_ptr, gzy_ptr, glo_ptr, gho_ptr, zy_ptr,
                top_ptr, sum_ptr, mean_ptr, stride_t, e_ptr, stride_ec, C, V, room, SOFTCAP, SCALE, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["C", "T", "stride_t"], do_not_specialize_on_alignment=VECTORS)
def merge_kernel(
    top_ptr, sum_ptr, mean_ptr, stride_t,  # [T, C] in; top_ptr None: all relative to shift; mean_ptr None: no entropy
    shift_ptr,  # [C] in, or None
    lo_ptr, ho_ptr, total_ptr,  # [C] out; ho_ptr, total_ptr may be None
    C, T,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Partial statistics of the tiles → lse_other and H_o of each row, and Σ exp(z_k − shift)."""
    ACC: tl.constexpr = tl.float64 if sum_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    top = tl.full([BLOCK_C], -float("inf"), ACC)
    if shift_ptr is not None:
        top = tl.load(shift_ptr + offs_c, mask=in_c, other=0.0)
    total = tl.zeros([BLOCK_C], ACC)
    mean = tl.zeros([BLOCK_C], ACC)
    for start in tl.range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        places = offs_t.to(tl.int64)[:, None] * stride_t + offs_c[None, :]
        inside = (offs_t < T)[:, None] & in_c[None, :]
        part = tl.load(sum_ptr + places, mask=inside, other=0.0)
        moved = tl.zeros([BLOCK_T, BLOCK_C], ACC)
        if top_ptr is not None:
            tops = tl.load(top_ptr + places, mask=inside & (part > 0), other=-float("inf"))  # empty tiles don't count
            new_top = tl.maximum(top, tl.max(tops, 0))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            moved = tl.where(part > 0, tops - shift[None, :], 0.0)
            back = tl.where(total > 0, top - shift, 0.0)
            if mean_ptr is not None:
                mean = tl.exp(back) * (mean + back * total)
            total = total * tl.exp(back)
            top = new_top
        weight = tl.exp(moved)
        total += tl.sum(tl.where(part > 0, part, part * 0) * weight, 0)
        if mean_ptr is not None:
            means = tl.load(mean_ptr + places, mask=inside, other=0.0)
            mean += tl.sum(weight * (means + moved * part), 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    log_total = tl.log(total)
    tl.store(lo_ptr + offs_c, top + log_total, mask=in_c)
    if ho_ptr is not None:
        tl.store(ho_ptr + offs_c, tl.where(total > 0, log_total - mean / total, 0.0), mask=in_c)
    if total_ptr is not None:
        tl.store(total_ptr + offs_c, total, mask=in_c)


hash_helpers(globals())

# -- launches ---------------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """Of each `Tile.part` of the vocabulary and row, [T, C]: maximum (or None), Σ exp, Σ exp · z (or None)."""

    top: Tensor | None
    total: Tensor
    mean: Tensor | None

    def tiles(self, start: int, stop: int) -> Partials:
        """Those of some tiles."""
        return Partials(*(None if x is None else x[start:stop] for x in self))  # type: ignore[arg-type]

    @classmethod
    def empty(cls, like: Tensor, tiles: int, rows: int, dtype: torch.dtype, top: bool, entropy: bool) -> Partials:
        """Uninitialised."""
        made = [like.new_empty(tiles, rows, dtype=dtype) if wanted else None for wanted in (top, True, entropy)]
        return cls(*made)  # type: ignore[arg-type]


def tma_ready(*tensors: Tensor) -> bool:
    """Whether rows of the tensors start at multiples of 16 bytes, which tensor descriptors need."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1 and min(x.shape) > 0
        for x in tensors
    )


def _launch(
    config: configs.Tile, x_CH: Tensor, w_VH: Tensor, target_C: Tensor, epilogue: Epilogue, e_CV: Tensor | None,
    shift: Tensor | None, upstream: tuple[Tensor | None, ...], z_y: Tensor | None, partials: Partials | None,
    room: int | None,
) -> None:  # fmt: skip
    rows, width = x_CH.shape
    vocab = w_VH.shape[0]
    x_CH, w_VH = (t if t.stride(1) == 1 or width == 1 else t.contiguous() for t in (x_CH, w_VH))
    target_C, bias, shift, *upstream = dense(target_C, epilogue.bias, shift, *upstream)  # type: ignore[assignment]
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(vocab, config.vocab)
    tma = config.tma and tma_ready(x_CH, w_VH)
    x: Any = TensorDescriptor.from_tensor(x_CH, [config.rows, config.width]) if tma else x_CH
    w: Any = TensorDescriptor.from_tensor(w_VH, [config.vocab, config.width]) if tma else w_VH
    top, total, mean = partials or (None, None, None)
    tiles_kernel[(min(tiles, configs.programs(config, x_CH.device)),)](
        x, 0 if tma else x_CH.stride(0), w, 0 if tma else w_VH.stride(0), target_C, bias, shift, *upstream, z_y, top,
        total, mean, 0 if total is None else total.stride(0), e_CV, 0 if e_CV is None else e_CV.stride(0), rows, vocab,
        width, room or vocab, epilogue.softcap, epilogue.scale, config.rows, config.vocab, config.width, config.group,
        tma, tma or width % config.width == 0, tl.float64 if x_CH.dtype == torch.float64 else tl.float32,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def score(
    x_CH: Tensor, w_VH: Tensor, target_C: Tensor, epilogue: Epilogue, z_y: Tensor, partials: Partials,
    shift: Tensor | None = None, out: Tensor | None = None, room: int | None = None,
    config: configs.Tile | None = None,
) -> None:  # fmt: skip
    """Partial statistics of a (slice of a) head, and z_y [C] where the target lies in it.

    Args:
        x_CH, w_VH: of one dtype, unit stride along H.
        target_C: int64, the target's place in `w_VH`, −1 where it isn't there.
        shift, out: with both, also the weights E = J exp(z − shift) [C, V] in any floating dtype.
        room: columns that may be written to `out`: V, and the padding of its rows, so that stores stay aligned.
        config: default: that of the device.
    """
    if config is None:
        config = configs.tile("score" if out is None else "weights", x_CH.device, x_CH.dtype)
    _launch(config, x_CH, w_VH, target_C, epilogue, out, shift, (None,) * 4, z_y, partials, room)


def gradients(
    x_CH: Tensor, w_VH: Tensor, target_C: Tensor, scores: Statistics, upstream: Upstream, epilogue: Epilogue,
    out: Tensor, room: int | None = None, config: configs.Tile | None = None,
) -> Tensor | None:  # fmt: skip
    """dlogits of a (slice of a) head as E in `out` [C, V], and r with D = diag(r) E; None where it is all 1 (see
    `triton_rows.gradients_`)."""
    r = None
    if out.dtype == torch.float16:
        r, upstream = relative(upstream)
    config = config or configs.tile("gradients", x_CH.device, x_CH.dtype)
    needed = (scores.h_o if upstream.g_ho is not None else None, *upstream)
    _launch(config, x_CH, w_VH, target_C, epilogue, out, scores.lse_other, needed, None, None, room)
    return r


def merge(partials: Partials, shift: Tensor | None, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(lse_other, H_o or None, Σ exp(z_k − shift)), each [C], from the partial statistics of all tiles.

    Without a shift the sums are relative to the largest maximum of each row.
    """
    top, total, mean = partials
    tiles, rows = total.shape
    lse_other, whole = (total.new_empty(rows) for _ in range(2))
    h_o = torch.empty_like(whole) if entropy else None
    block = 32
    if rows:
        merge_kernel[(triton.cdiv(rows, block),)](
            top, total, mean, total.stride(0), shift, lse_other, h_o, whole, rows, tiles, block, 64, num_warps=4
        )
    return lse_other, h_o, whole


def masses(partials: Partials, shift: Tensor | None, lse_other: Tensor, per: int) -> Tensor:
    """Softmax mass over the other tokens of each `per` parts, [C, ⌈T / per⌉]."""
    top = shift[None] if partials.top is None else partials.top  # type: ignore[index]
    lse_other = torch.where(lse_other == -torch.inf, 0, lse_other)
    mass = partials.total * torch.exp(top - lse_other)
    tiles, rows = mass.shape
    padded = torch.nn.functional.pad(mass, (0, 0, 0, -tiles % per))
    return padded.view(-1, per, rows).sum(1).t()


# -- the kernel set ---------------------------------------------------------------------------------------------------

# How far a row's logsumexp may lie from the shift: e⁴⁰ times the largest ratio of a target's coefficient to the others'
# (types.LARGEST_RATIO) is 2e33, inside the range of float32 and bfloat16 also after a product with the weight.
LARGEST_RISE = 40.0


class Tiles:
    """The kernel set that never writes a logit; the methods are those of `rgpb.kernels.KernelSet`.

    A sweep writes weights E = J exp(z − shift) relative to a shift that is known before the row is: the maximum over
    its first tile, one of the row's own logits unless no token of that tile is possible. A row that ends far from it is
    noticed from its sums, and its chunk is swept again relative to the true logsumexp.
    """

    token_losses: tuple[str, ...] = ()

    def counting(self, active: Tensor, tile: int) -> Counting:
        return Counting(active, tile)

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        statistics, masses, _ = self._sweep(chunk, entropy, mass_tile, None)
        return statistics, masses

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        shift = self._first_maximum(chunk)
        scores, masses, total = self._sweep(chunk, entropy, mass_tile, shift)
        # one number read back per chunk; a row whose first tile has no possible token may also lie far below
        if not bool(((scores.lse_other - shift).abs() < LARGEST_RISE).all()):
            true = self._sweep(chunk, False, None, None)[0].lse_other
            shift = torch.where(true == -torch.inf, 0, true)
            scores, masses, total = self._sweep(chunk, entropy, mass_tile, shift)
        return scores, masses, Weighed(chunk.buffer, total)

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor]:
        e, total, _ = weighed
        assert total is not None
        r = torch.where(total > 0, upstream.g_lo / total, 0)
        return e, with_target_(e, chunk.y, r, upstream.g_zy * chunk.epilogue.jacobian(statistics.z_y), total)

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        e, r = chunk.buffer, None
        for part, weight in chunk.parts():
            epilogue = chunk.epilogue.slice(part.start, part.stop)
            y, out = inside(chunk.y, part), e[:, part]
            r = gradients(chunk.x, weight, y, statistics, upstream, epilogue, out, _room(chunk, part))
        return e, r

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:
        raise ValueError(f"loss: expected one of {self.token_losses}, got {terms.loss!r}")

    def _first_maximum(self, chunk: Chunk) -> Tensor:
        """The largest logit of each row's first columns, the target's aside. [C]"""
        x, (_, weight) = chunk.x, next(chunk.parts())
        config = configs.tile("score", x.device, x.dtype)
        first = slice(0, min(len(weight), config.part))
        partials = Partials.empty(x, config.parts(first.stop), len(x), acc_dtype(x.dtype), True, False)
        z_y = torch.empty_like(partials.total[0])
        score(x, weight[first], inside(chunk.y, first), chunk.epilogue.slice(0, first.stop), z_y, partials)
        return partials.top[0]  # type: ignore[index]

    def _sweep(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None, shift: Tensor | None
    ) -> tuple[Statistics, Tensor | None, Tensor]:
        """Statistics, masses and Σ exp(z − shift); with a shift also E in the buffer."""
        x, vocab, step = chunk.x, chunk.vocab, chunk.step
        config = configs.tile("score" if shift is None else "weights", x.device, x.dtype)
        block = config.vocab
        if mass_tile is not None and (mass_tile % block or (step < vocab and step % mass_tile)):
            raise ValueError(
                f"impl: expected another than 'tiled' for masses of {mass_tile} columns, which tiles of {block} in "
                f"slices of {step} don't make up"
            )
        each = [config.parts(min(step, vocab - start)) for start in range(0, vocab, step)]
        partials = Partials.empty(x, sum(each), len(x), acc_dtype(x.dtype), shift is None, entropy)
        z_y = x.new_zeros(len(x), dtype=acc_dtype(x.dtype))
        done = 0
        for (part, weight), tiles in zip(chunk.parts(), each):
            out, epilogue = (
                None if shift is None else chunk.buffer[:, part],
                chunk.epilogue.slice(part.start, part.stop),
            )
            these = partials.tiles(done, done + tiles)
            score(x, weight, inside(chunk.y, part), epilogue, z_y, these, shift, out, _room(chunk, part))
            done += tiles
        lse_other, h_o, total = merge(partials, shift, entropy)
        made = None if mass_tile is None else masses(partials, shift, lse_other, mass_tile // config.part)
        return Statistics(z_y, lse_other, h_o), made, total


def _room(chunk: Chunk, part: slice) -> int | None:
    """The last part may run over into the rows' padding."""
    return chunk.room - part.start if part.stop == chunk.vocab else None
