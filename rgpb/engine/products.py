"""The matrix products of a sweep: operands in the dtype that they are multiplied in, their buffers, the sum of dW.

D = ∂L/∂(X Wᵀ) = diag(r) E as the kernel sets leave it; r is None where it is all 1. The factor r of a row is left to
the [C, H] sides: dX = r ∘ (E W), dW = Eᵀ (r ∘ X).

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, C rows of a chunk, S slice of V.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.engine.call import Call, Tensors
from rgpb.kernels import KernelSet, kernel_set, matmul
from rgpb.kernels.cpp_rows import fresh
from rgpb.kernels.types import Chunk, Epilogue, Statistics, acc_dtype, inside

Rows = slice | Tensor

# Chunks of rows come in multiples of this, but for the last: registers take so many.
ROW_UNIT = 16


class Problem(NamedTuple):
    """One call with its tensors: hidden [P, H], weight [V, H], bias [V] or None, target int64 [P].

    With `order` the vocabulary is taken in that order, and `target` and `bias` are already in it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    call: Call
    order: Tensor | None = None

    @staticmethod
    def of(tensors: Tensors, call: Call) -> Problem:
        """That of an operator's tensors."""
        hidden, weight, target = tensors.need("hidden", "weight", "target")
        return Problem(hidden, weight, tensors.bias, target, call)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without autocast, and on the tensors' own GPU: Triton launches on the current one."""
        device = self.hidden.device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.autocast(device.type, enabled=False), current:
            yield

    def ordered(self, order: Tensor) -> Problem:
        """The same with the vocabulary in that order. int64 [V]"""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ignore = self.call.ignore_index
        target = torch.where(self.target == ignore, ignore, place[self.target.clamp(min=0)])
        bias = None if self.bias is None else self.bias[order]
        return self._replace(order=order, target=target, bias=bias)

    def weight_rows(self, part: slice) -> Tensor:
        """The head's rows for entries `part` of the vocabulary, as it is stored. [S, H]"""
        return self.weight[part if self.order is None else self.order[part]]

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.weight.dtype)

    @property
    def half(self) -> bool:
        """Whether the products take 16-bit operands."""
        return self.call.dtype.itemsize == 2

    def epilogue(self) -> Epilogue:
        bias = None if self.bias is None else self.bias.to(self.acc_dtype)
        return Epilogue(bias, self.call.softcap, self.call.scale)

    def kept(self) -> Kept:
        """The positions that aren't ignored."""
        return Kept(self.target, self.call.ignore_index)


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

    def chunks(self, most: int) -> Iterator[Rows]:
        """All of them, in chunks of about equal length."""
        for chunk in even_spans(self.count, most):
            yield self.rows((chunk.start, chunk.stop))


class Products:
    """Chunks of a sweep over all of V for a kernel set, and the products with the E that the set makes of them.

    rows: of a chunk, at most; score_only: no gradient will be asked for.
    """

    def __init__(self, p: Problem, rows: int, score_only: bool = False):
        self.p, self.chunks, self.dtype, self.half = p, p.call.chunks, p.call.dtype, p.half
        self.set: KernelSet = kernel_set(p.call.impl)
        self.vocab = p.weight.shape[0]
        self.converted = p.hidden.new_empty(self.chunks.converted, p.weight.shape[1], dtype=self.dtype)
        self.epilogue = p.epilogue()
        # a library product that makes blocks of its own, and tile kernels, take the weight as wide as it comes
        step = len(self.converted) or self.vocab
        self.columns = step if self.half or p.call.impl == "tiled" else min(step, self.chunks.columns)
        self.buffer = self._buffer(rows, score_only)

    def _buffer(self, rows: int, score_only: bool) -> Tensor:
        """Logits [C, V] in the accumulators' type, for the tile kernels weights in the operands'. What is only scored
        takes one slice (C++) or nothing (tiles)."""
        chunks, impl = self.chunks, self.p.call.impl
        if score_only and impl == "cpp":
            return self.p.hidden.new_empty(rows, chunks.columns + chunks.pad, dtype=self.p.acc_dtype)
        rows = 0 if score_only and impl == "tiled" else rows
        dtype = self.dtype if impl == "tiled" else self.p.acc_dtype
        return fresh(self.p.hidden.new_empty(rows, chunks.room, dtype=dtype))[:, : self.vocab]

    def chunk(self, rows: Rows) -> Chunk:
        """The positions `rows` against all of the head."""
        x = self.inputs(rows)
        return Chunk(
            x, self.p.target[rows], self.vocab, self.columns, partial(self.parts, self.columns),
            partial(self.parts, self.chunks.columns), self.epilogue, self.buffer[: len(x)], self.chunks.room,
        )  # fmt: skip

    def inputs(self, rows: Rows) -> Tensor:
        x = self.p.hidden[rows].to(self.dtype)
        return x.contiguous() if self.p.call.impl == "tiled" else x  # whose kernels read along H

    def parts(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """`weight`, in slices of so many columns at most, for which logits are formed by one product."""
        for part, weight in self.weight():
            for some in spans(len(weight), columns):
                yield slice(part.start + some.start, part.start + some.stop), weight[some]

    def weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the operands' dtype and the problem's order: whole where it is, else converted slice by
        slice."""
        if not len(self.converted):
            yield slice(0, self.vocab), self.p.weight
            return
        for part in spans(self.vocab, len(self.converted)):
            converted, order = self.converted[: part.stop - part.start], self.p.order
            if order is not None and converted.dtype == self.p.weight.dtype:
                yield part, torch.index_select(self.p.weight, 0, order[part], out=converted)
            else:
                yield part, converted.copy_(self.p.weight_rows(part))

    def hidden_rows(self, out_PH: Tensor, rows: Rows, e_CV: Tensor, r: Tensor | None) -> None:
        """out[rows] = diag(r) E W, straight into place where the rows are a view of the right dtype."""
        # 16-bit results are rounded once: the product is one, and its rows have no factor, or one that rounds no worse
        once = out_PH.dtype == e_CV.dtype and not (self.half and len(self.converted))
        in_place = isinstance(rows, slice) and once
        dtype = out_PH.dtype if once and r is None else self.p.acc_dtype
        dx = out_PH[rows] if in_place else e_CV.new_empty(len(e_CV), out_PH.shape[1], dtype=dtype)
        for part, weight in self.weight():
            matmul.mm(e_CV[:, part], weight, dx, accumulate=part.start > 0)
        if r is not None:
            dx.mul_(r[:, None])
        if not in_place:
            out_PH[rows] = dx.to(out_PH.dtype)


class HeadSum:
    """dW = Σ Dᵀ X over chunks. In place where the weight is 32-bit or one chunk is all; else in a float32 buffer."""

    def __init__(self, p: Problem, products: Products, weight: bool, bias: bool, one_chunk: bool):
        self.p, self.products, self.empty = p, products, True
        self.dweight = fresh(torch.empty_like(p.weight)) if weight else None
        self.dbias = p.hidden.new_empty(p.weight.shape[0], 1, dtype=p.acc_dtype) if bias else None
        self.sum = self.dweight
        if weight and p.weight.dtype.itemsize == 2 and not one_chunk:
            self.sum = fresh(torch.empty_like(p.weight, dtype=torch.float32))

    def add(self, e_CV: Tensor, r: Tensor | None, rows: Rows) -> None:
        """The part of `rows`, D = diag(r) E."""
        if self.dbias is not None:
            matmul.mm(e_CV.t(), ones_or(r, e_CV), self.dbias, accumulate=not self.empty)
        if self.sum is not None:
            x = times(self.p.hidden[rows], r).to(e_CV.dtype)
            if self.sum.dtype == e_CV.dtype or self.products.half:
                matmul.mm(e_CV.t(), x, self.sum, accumulate=not self.empty)
            else:  # a 16-bit result of float32 operands passes through float32, slice by slice
                for part in spans(len(self.sum), len(self.products.converted)):
                    self.sum[part] = e_CV[:, part].t() @ x
        self.empty = False

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """dW [V, H] and db [V] in the weight's dtype; None where not asked for."""
        for never_written in (self.sum, self.dbias) if self.empty else ():
            if never_written is not None:
                never_written.zero_()
        if self.dweight is not None and self.sum is not None and self.sum is not self.dweight:
            self.dweight.copy_(self.sum)
        return self.dweight, None if self.dbias is None else self.dbias.view(-1).to(self.p.weight.dtype)


class HeadSlices:
    """dW [V, H] and db [V], a slice of the vocabulary at a time; each slice is complete when it is left."""

    def __init__(self, p: Problem, weight: bool, bias: bool, columns: int, rows: int):
        self.p, self.set, self.dtype = p, kernel_set(p.call.impl), p.call.dtype
        self.rows, self.pad = rows, p.call.chunks.pad
        vocab = p.weight.shape[0]
        self.dweight = fresh(torch.empty_like(p.weight)) if weight else None
        self.dbias = p.hidden.new_empty(vocab, 1, dtype=p.acc_dtype) if bias else None
        dtype = self.dtype if p.call.impl == "tiled" else p.acc_dtype
        self.buffer = fresh(p.hidden.new_empty(rows * (columns + self.pad), dtype=dtype))
        self.epilogue = p.epilogue()

    def chunk(self, x: Tensor, y: Tensor, part: slice, weight: Tensor) -> Chunk:
        """Rows x [C, H] with targets y [C] against the slice `part` of the head, weight [S, H]."""
        columns = len(weight)
        stride = columns + self.pad
        z = self.buffer[: len(x) * stride].view(len(x), stride)[:, :columns]
        epilogue = self.epilogue.slice(part.start, part.stop)

        def whole() -> Iterator[tuple[slice, Tensor]]:
            yield slice(0, columns), weight

        return Chunk(x, inside(y, part), columns, columns, whole, whole, epilogue, z, columns)

    def room(self, part: slice, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Where the sums of a slice over `count` rows go, [S, H] and [S, 1]."""
        p, size, dw = self.p, part.stop - part.start, None
        if self.dweight is not None:
            dw = self.dweight[part] if self.in_place(count) else p.hidden.new_empty(
                size, p.weight.shape[1], dtype=p.acc_dtype
            )  # fmt: skip
            if not count:
                dw.zero_()
        return dw, None if self.dbias is None else self.dbias.new_zeros(size, 1)

    def in_place(self, count: int) -> bool:
        """Whether the product over `count` rows is the slice of dW itself: one of the accumulators' type, or one that
        is rounded once."""
        dtype = self.p.weight.dtype
        return self.p.order is None and (dtype == self.p.acc_dtype or (dtype == self.dtype and count <= self.rows))

    def keep(self, part: slice, count: int, dw: Tensor | None, db: Tensor | None) -> None:
        """Put the finished sums of a slice where they belong."""
        order = self.p.order
        places = part if order is None else order[part]
        if self.dweight is not None and dw is not None and not self.in_place(count):
            if order is None:
                self.dweight[part].copy_(dw)  # converts as it writes
            else:
                self.dweight[places] = dw.to(self.dweight.dtype)
        if self.dbias is not None and db is not None:
            self.dbias[places] = db

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """dW and db in the weight's dtype; None where not asked for."""
        return self.dweight, None if self.dbias is None else self.dbias.view(-1).to(self.p.weight.dtype)


def times(x_CH: Tensor, r: Tensor | None) -> Tensor:
    return x_CH if r is None else x_CH * r[:, None]


def ones_or(r: Tensor | None, like_CV: Tensor) -> Tensor:
    """r as a column [C, 1] in the operands' dtype."""
    return like_CV.new_ones(len(like_CV), 1) if r is None else r[:, None].to(like_CV.dtype)


def spans(total: int, step: int) -> Iterator[slice]:
    """0 … total in steps."""
    for start in range(0, total, max(step, 1)):
        yield slice(start, min(start + step, total))


def even_spans(total: int, most: int) -> Iterator[slice]:
    """0 … total in as few steps of at most `most` as it takes, of about equal length: a product of a few rows reads all
    of the weight, too."""
    count = -(-total // max(most, 1))
    yield from spans(total, min(most, -(-total // max(count * ROW_UNIT, 1)) * ROW_UNIT))


def split_rows(rows: Rows, step: int) -> list[Rows]:
    """`rows` in pieces of at most `step`."""
    if isinstance(rows, Tensor):
        return list(rows.split(step)) if len(rows) else []
    return [slice(rows.start + s.start, rows.start + s.stop) for s in spans(rows.stop - rows.start, step)]


def empty_statistics(p: Problem, entropy: bool) -> Statistics:
    """0 at every position [P]."""
    z_y, lse_other, h_o = (p.hidden.new_zeros(len(p.target), dtype=p.acc_dtype) for _ in range(3))
    return Statistics(z_y, lse_other, h_o if entropy else None)
