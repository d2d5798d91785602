"""The chunk loops: library products into one reused buffer, row kernels between them.

    score            Z = X Wᵀ → (z_y, lse_other, H_o), and O = Q W − w_y where the hidden gradient will be asked for
    single_pass      the same, and at once D from the chunk's coefficients: dX = D W, dW += Dᵀ X
    head_gradient    Z again, slice by slice of V: dW = Dᵀ X finished per slice
    hidden_gradient  Z again, dX = D W (only where the entropy has a gradient)

D = diag(r) E as the row kernels leave it. With Q the softmax over the other tokens and O = Q W − w_y,
dX = g_lo · O + (g_zy + g_lo) · w_y needs no second look at the logits.
All loops run without autograd and without autocast, over the rows that aren't ignored.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, C rows of a chunk, S slice of V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.engine.plan import Sizes, convert_rows, row_chunk, single_chunk, sizes, slice_chunk
from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream, statistics_, weights_, with_target_

Rows = slice | Tensor


class Problem(NamedTuple):
    """One call, flattened: hidden [P, H], weight [V, H], bias [V] or None, target int64 [P]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    softcap: float | None
    scale: float
    ignore_index: int
    workspace: int
    compute_dtype: torch.dtype

    @property
    def sizes(self) -> Sizes:
        vocab, width = self.weight.shape
        return sizes(vocab, width, self.weight.dtype, self.compute_dtype, self.weight.device.type)

    @property
    def acc_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def gemm_dtype(self) -> torch.dtype:
        return {2: self.compute_dtype, 4: torch.float32, 8: torch.float64}[self.sizes.gemm]

    def epilogue(self) -> Epilogue:
        bias = None if self.bias is None else self.bias.to(self.acc_dtype)
        return Epilogue(bias, self.softcap, self.scale)


class Kept:
    """The positions that aren't ignored, in order. Where all are kept nothing is gathered: rows are views."""

    def __init__(self, target_P: Tensor, ignore_index: int):
        self.device = target_P.device
        index = (target_P != ignore_index).nonzero().squeeze(1)
        self.count = len(index)
        self.index = None if self.count == len(target_P) else index

    def rows(self, *ranges: tuple[int, int]) -> Rows:
        """The positions of the kept rows start … stop of each range, one after the other."""
        if self.index is None:
            if len(ranges) == 1:
                return slice(*ranges[0])
            return torch.cat([torch.arange(*r, device=self.device) for r in ranges])
        return torch.cat([self.index[start:stop] for start, stop in ranges])


class Products:
    """The matrix products of one sweep, with their buffers."""

    def __init__(self, p: Problem, rows: int):
        self.p, self.sizes, self.dtype = p, p.sizes, p.gemm_dtype
        vocab, width = p.weight.shape
        self.logits_buffer = p.hidden.new_empty(rows, vocab, dtype=p.acc_dtype)
        self.converted = p.hidden.new_empty(convert_rows(self.sizes, p.workspace), width, dtype=self.dtype)
        self.half = self.dtype.itemsize == 2
        self.epilogue = p.epilogue()

    def inputs(self, rows: Rows) -> Tensor:
        return self.p.hidden[rows].to(self.dtype)

    def weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the products' dtype: whole where it is, else converted slice by slice."""
        if not self.sizes.convert:
            yield slice(0, self.sizes.vocab), self.p.weight
            return
        for part in spans(self.sizes.vocab, len(self.converted)):
            converted = self.converted[: part.stop - part.start]
            yield part, converted.copy_(self.p.weight[part])

    def logits(self, x_CH: Tensor) -> Tensor:
        """X Wᵀ in float32 (float64) before anything is rounded. [C, V]"""
        z = self.logits_buffer[: len(x_CH)]
        for part, weight in self.weight():
            mm(x_CH, weight.t(), z[:, part])
        return z

    def half_view(self, z_CV: Tensor) -> Tensor | None:
        """16-bit [C, V] over the first half of each row's bytes, where the products take 16-bit operands."""
        return z_CV.view(self.dtype)[:, : z_CV.shape[1]] if self.half else None

    def statistics(self, rows: Rows, into: Statistics) -> tuple[Tensor, Tensor]:
        """Score `rows` into `into`; the weights [C, V] at hand, and their sums [C]."""
        z = self.logits(self.inputs(rows))
        scores, total = statistics_(z, self.p.target[rows], self.epilogue, into.h_o is not None, self.half_view(z))
        for column, value in zip(into, scores):
            if column is not None:
                column[rows] = value
        return z if not self.half else self.half_view(z), total  # type: ignore[return-value]

    def hidden_rows(self, out_PH: Tensor, rows: Rows, e_CV: Tensor, r: Tensor) -> None:
        """out[rows] = diag(r) E W, straight into place where the rows are a view of the right dtype."""
        in_place = isinstance(rows, slice) and out_PH.dtype == e_CV.dtype
        dx = out_PH[rows] if in_place else e_CV.new_empty(len(e_CV), out_PH.shape[1], dtype=self.p.acc_dtype)
        for part, weight in self.weight():
            mm(e_CV[:, part], weight, dx, accumulate=part.start > 0)
        dx.mul_(r[:, None])
        if not in_place:
            out_PH[rows] = dx.to(out_PH.dtype)


class HeadSum:
    """dW = Σ Dᵀ X over chunks. In place where the weight is 32-bit or one chunk is all; else in a float32 buffer."""

    def __init__(self, p: Problem, products: Products, weight: bool, bias: bool, chunks: int):
        self.p, self.products, self.fresh = p, products, True
        self.dweight = torch.empty_like(p.weight) if weight else None
        self.dbias = p.hidden.new_empty(p.weight.shape[0], 1, dtype=p.acc_dtype) if bias else None
        self.sum = self.dweight
        if weight and products.sizes.accumulate and chunks > 1:
            self.sum = torch.empty_like(p.weight, dtype=torch.float32)

    def add(self, e_CV: Tensor, r: Tensor, rows: Rows) -> None:
        """The part of `rows`, D = diag(r) E."""
        if self.dbias is not None:
            mm(e_CV.t(), r[:, None].to(e_CV.dtype), self.dbias, accumulate=not self.fresh)
        if self.sum is not None:
            x = (self.p.hidden[rows] * r[:, None]).to(e_CV.dtype)
            if self.sum.dtype == e_CV.dtype or self.products.half:
                mm(e_CV.t(), x, self.sum, accumulate=not self.fresh)
            else:  # a 16-bit result of float32 operands passes through float32, slice by slice
                for part in spans(len(self.sum), len(self.products.converted)):
                    self.sum[part] = e_CV[:, part].t() @ x
        self.fresh = False

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        for never_written in (self.sum, self.dbias) if self.fresh else ():
            if never_written is not None:
                never_written.zero_()
        if self.dweight is not None and self.sum is not None and self.sum is not self.dweight:
            self.dweight.copy_(self.sum)
        return self.dweight, None if self.dbias is None else self.dbias.view(-1).to(self.p.weight.dtype)


def spans(total: int, step: int) -> Iterator[slice]:
    """0 … total in steps."""
    for start in range(0, total, max(step, 1)):
        yield slice(start, min(start + step, total))


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = A B, or out += A B; 16-bit operands may have a float32 result (CUDA)."""
    if a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def check_rows(p: Problem, kept: Kept) -> None:
    """Refuse what would turn into a finite but wrong loss.

    Raises:
        ValueError: a target outside [0, V) that isn't `ignore_index`, or hidden states that aren't finite.
    """
    vocab = p.weight.shape[0]
    outside = ((p.target < 0) | (p.target >= vocab)) & (p.target != p.ignore_index)
    rows = kept.rows((0, kept.count))
    finite = outside.new_ones(0)
    if kept.count:
        least, most = p.hidden.aminmax(dim=1)  # both carry NaN; no temporary of the size of hidden
        finite = ((least > -torch.inf) & (most < torch.inf))[rows]
    ok = torch.stack([~outside.any(), finite.all()]).tolist()  # one synchronisation for both
    if not ok[0]:
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"target: expected values in [0, {vocab}) or ignore_index={p.ignore_index}, "
            f"got {int(p.target[at])} at flat position {at}"
        )
    if not ok[1]:
        at = int((~finite).nonzero()[0])
        at = at if isinstance(rows, slice) else int(rows[at])
        raise ValueError(f"hidden: expected finite values, got NaN or infinity at flat position {at}")


def score(p: Problem, entropy: bool, accumulate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z_y, lse_other, H_o) [P], 0 at ignored positions, and O [P, H] in the hidden dtype; the last two on demand."""
    kept = Kept(p.target, p.ignore_index)
    check_rows(p, kept)
    scores = empty_statistics(p, entropy)
    accumulated = torch.zeros_like(p.hidden) if accumulate else p.hidden.new_empty(0)
    step, _ = row_chunk(p.sizes, p.workspace, kept.count)
    products = Products(p, step)
    for chunk in spans(kept.count, step):
        rows = kept.rows((chunk.start, chunk.stop))
        weights, total = products.statistics(rows, scores)
        if accumulate:
            r, j_y = torch.where(total > 0, 1 / total, 0), products.epilogue.jacobian(scores.z_y[rows])
            r = with_target_(weights, p.target[rows], r, -torch.ones_like(r) * j_y)
            products.hidden_rows(accumulated, rows, weights, r)
    return *scores[:2], scores.z_y.new_empty(0) if scores.h_o is None else scores.h_o, accumulated


def finish_hidden_(p: Problem, accumulated: Tensor, z_y: Tensor, g_zy: Tensor, g_lo: Tensor) -> None:
    """O → dX = g_lo · O + (g_zy + g_lo) · w_y in place, a few rows at a time. [P, H]

    The second term is 0 for a loss of p alone, so nothing of the rounding of O is blown up by a difference.
    """
    kept = p.target != p.ignore_index
    rest = (g_zy + g_lo) * p.epilogue().jacobian(z_y)
    rest, g_lo = torch.where(kept, rest, 0)[:, None], torch.where(kept, g_lo, 0)[:, None]
    target = torch.where(kept, p.target, 0)
    step = max(1, min(1 << 24, p.workspace) // (4 * 8 * p.weight.shape[1]))
    for rows in spans(len(target), step):
        dx = accumulated[rows].to(p.acc_dtype).mul_(g_lo[rows])
        accumulated[rows] = dx.addcmul_(p.weight[target[rows]].to(p.acc_dtype), rest[rows])


def single_pass(
    p: Problem,
    chunks: Iterator[tuple[Rows, Callable[[Statistics], Upstream]]],
    kept: Kept,
    need: tuple[bool, bool, bool],
    entropy: bool,
) -> tuple[Statistics, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in the forward. `chunks` yields rows and what turns their statistics into coefficients.

    A chunk with more rows than the workspace holds is swept twice: for its statistics, then for its gradients.

    Returns:
        (z_y, lse_other, H_o) [P], dhidden [P, H], dweight [V, H], dbias [V]; None where `need` says so.
    """
    tokens = kept.count
    rows_that_fit, _ = single_chunk(p.sizes, p.workspace, tokens)
    scores = empty_statistics(p, entropy)
    dhidden = torch.zeros_like(p.hidden) if need[0] else None
    products = Products(p, rows_that_fit)
    total = HeadSum(p, products, need[1], need[2], chunks=-(-tokens // max(rows_that_fit, 1)))
    for rows, coefficients in chunks:
        blocks = split_rows(rows, rows_that_fit)
        for block in blocks:
            weights, sums = products.statistics(block, scores)
        upstream = coefficients(scores.at(rows))
        for block, part in zip(blocks, spans(len(upstream.g_zy), rows_that_fit)):
            if len(blocks) > 1:
                weights, sums = products.statistics(block, scores)
            g_zy, g_lo, _ = upstream.at(part)
            r = torch.where(sums > 0, g_lo / sums, 0)
            r = with_target_(weights, p.target[block], r, g_zy * products.epilogue.jacobian(scores.z_y[block]))
            if dhidden is not None:
                products.hidden_rows(dhidden, block, weights, r)
            total.add(weights, r, block)
    return scores, dhidden, *total.finished()


def head_gradient(
    p: Problem, statistics: Statistics, upstream: Upstream, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, H] and db [V]: logits again for a slice of V, all rows; each slice of dW is complete when it is left."""
    kept = Kept(p.target, p.ignore_index)
    vocab, width = p.weight.shape
    dtype, acc, epilogue = p.gemm_dtype, p.acc_dtype, p.epilogue()
    if not kept.count:
        return torch.zeros_like(p.weight) if need_weight else None, p.weight.new_zeros(vocab) if need_bias else None
    dweight = torch.empty_like(p.weight) if need_weight else None
    dbias = p.hidden.new_empty(vocab, 1, dtype=acc) if need_bias else None
    rows_step, slice_step, _ = slice_chunk(p.sizes, p.workspace, kept.count)
    buffer = p.hidden.new_empty(rows_step * slice_step, dtype=acc)
    for part in spans(vocab, slice_step):
        weight = p.weight[part].to(dtype)
        z_buffer = buffer.view(rows_step, slice_step)
        if part.stop - part.start < slice_step:  # the last slice: keep its rows contiguous
            z_buffer = buffer[: rows_step * len(weight)].view(rows_step, len(weight))
        dw = None
        if dweight is not None:
            in_place = dweight.dtype == acc
            dw = dweight[part] if in_place else p.hidden.new_empty(len(weight), width, dtype=acc)
        for chunk in spans(kept.count, rows_step):
            rows = kept.rows((chunk.start, chunk.stop))
            x, z = p.hidden[rows].to(dtype), z_buffer[: chunk.stop - chunk.start]
            mm(x, weight.t(), z)
            e, r = recomputed_(p, z, rows, part, statistics, upstream, epilogue.slice(part.start, part.stop))
            if dw is not None:
                mm(e.t(), (x * r[:, None]).to(dtype), dw, accumulate=chunk.start > 0)
            if dbias is not None:
                mm(e.t(), r[:, None].to(e.dtype), dbias[part], accumulate=chunk.start > 0)
        if dweight is not None and dw is not None and not in_place:
            dweight[part] = dw
    return dweight, None if dbias is None else dbias.view(-1).to(p.weight.dtype)


def hidden_gradient(p: Problem, statistics: Statistics, upstream: Upstream) -> Tensor:
    """dX [P, H] with the logits formed again: where H_o has a gradient, O alone doesn't give it."""
    kept = Kept(p.target, p.ignore_index)
    dhidden = torch.zeros_like(p.hidden)
    step, _ = row_chunk(p.sizes, p.workspace, kept.count)
    products, epilogue = Products(p, step), p.epilogue()
    whole = slice(0, p.weight.shape[0])
    for chunk in spans(kept.count, step):
        rows = kept.rows((chunk.start, chunk.stop))
        z = products.logits(products.inputs(rows))
        e, r = recomputed_(p, z, rows, whole, statistics, upstream, epilogue)
        products.hidden_rows(dhidden, rows, e, r)
    return dhidden


def recomputed_(
    p: Problem, z: Tensor, rows: Rows, part: slice, statistics: Statistics, upstream: Upstream, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """Products of `rows` with the slice `part` of the head → (E, r) with D = diag(r) E."""
    y = p.target[rows] - part.start
    y = torch.where((y >= 0) & (y < part.stop - part.start), y, -1)
    scores, gradients = statistics.at(rows), upstream.at(rows)
    half = z.view(p.gemm_dtype)[:, : z.shape[1]] if p.sizes.gemm == 2 else None
    r = weights_(z, scores, gradients, epilogue, half)
    e = z if half is None else half
    return e, with_target_(e, y, r, gradients.g_zy * epilogue.jacobian(scores.z_y))


def empty_statistics(p: Problem, entropy: bool) -> Statistics:
    """0 at every position [P]."""
    z_y, lse_other, h_o = (p.hidden.new_zeros(len(p.target), dtype=p.acc_dtype) for _ in range(3))
    return Statistics(z_y, lse_other, h_o if entropy else None)


def split_rows(rows: Rows, step: int) -> list[Rows]:
    """`rows` in pieces of at most `step`."""
    if isinstance(rows, Tensor):
        return list(rows.split(step)) if len(rows) else []
    return [slice(rows.start + s.start, rows.start + s.stop) for s in spans(rows.stop - rows.start, step)]
