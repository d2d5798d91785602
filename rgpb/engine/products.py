"""The matrix products of a sweep: operands in the dtype that they are multiplied in, their buffers, the sum of dW.

D = ∂L/∂(X Wᵀ) = diag(r) E as the kernel sets leave it; r is None where it is all 1. The factor r of a row is left to
the [K, H] sides: dX = r ∘ (E W), dW = Eᵀ (r ∘ X).

Logits are formed for C rows at a time. On a GPU their 16-bit E is kept apart (`Apart`), so that K ≥ C rows are
multiplied at once: dX then fills the multiprocessors, and dW is summed over fewer parts, or is one product.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, C rows of a chunk, K rows that are
multiplied at once, S slice of V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.engine import skipping, stored
from rgpb.engine.call import Call, Tensors
from rgpb.engine.workspace import Workspace, of_key
from rgpb.kernels import KernelSet, kernel_set, matmul
from rgpb.kernels.cpp_rows import fresh
from rgpb.kernels.types import Chunk, Counting, Epilogue, Statistics, acc_dtype, aligned, inside

Rows = slice | Tensor

# Even chunks of rows come in multiples of this, but for the last: registers take so many.
ROW_UNIT = 16
# Results are put into their places so many rows at a time, at least.
ROW_PIECE = 128


class Problem(NamedTuple):
    """One call with its tensors: hidden [P, H], weight [V, H], bias [V] or None, target int64 [P].

    With `order` the vocabulary is taken in that order, and `target` and `bias` are already in it. With `more` [V, r]
    hidden has H + r columns. With `scales` the weight is codes. In either case it is put together slice by slice.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    call: Call
    order: Tensor | None = None
    more: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    workspace: Workspace | None = None

    @staticmethod
    def of(t: Tensors, call: Call) -> Problem:
        """That of an operator's tensors."""
        hidden, weight, target = t.need("hidden", "weight", "target")
        kept = of_key(call.kept)
        if not call.validate:
            target = target.masked_fill(target == call.ignore_index, 0)
        return Problem(hidden, weight, t.bias, target, call, None, t.more, t.scales, t.zeros, kept)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without autocast, and on the tensors' own GPU: Triton launches on the current one."""
        device = self.hidden.device
        with ExitStack() as around:
            if torch.is_autocast_enabled(device.type):
                around.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                around.enter_context(torch.cuda.device(device))
            if self.workspace is not None:
                around.enter_context(self.workspace.using(device))
            yield

    def room(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for the time of the call, not cleared."""
        if self.workspace is not None:
            return self.workspace.take(name, shape, dtype, self.hidden.device)
        return fresh(self.hidden.new_empty(shape, dtype=dtype))

    def gradient(self, share: Share) -> Tensor:
        """Memory for what of the head's gradient is one tensor's, not cleared."""
        if self.workspace is not None:
            return self.workspace.gradient(share.name, share.like)
        return fresh(torch.empty_like(share.like))

    def ordered(self, order: Tensor) -> Problem:
        """The same with the vocabulary in that order. int64 [V]"""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ignore = self.call.ignore_index
        target = torch.where(self.target == ignore, ignore, place[self.target.clamp(0, len(order) - 1)])
        bias = None if self.bias is None else self.bias[order]
        return self._replace(order=order, target=target, bias=bias)

    def weight_rows(self, part: slice) -> Tensor:
        """The head's rows for entries `part` of the vocabulary, as it is stored, or put together. [S, H]"""
        which = part if self.order is None else self.order[part]
        if not self.assembled:
            return self.weight[which]
        return self.assemble_(self.hidden.new_empty(part.stop - part.start, self.width, dtype=self.call.dtype), which)

    def assemble_(self, out: Tensor, which: Rows) -> Tensor:
        """Fill `out` [S, H] with the head's rows `which`, as it is stored or put together."""
        width = self.width if self.more is None else self.width - self.more.shape[1]
        if self.call.stored:
            stored.rows_(out[:, :width], self.call.stored, self.weight, self.scales, self.zeros, which)
        else:
            out[:, :width].copy_(self.weight[which])
        if self.more is not None:
            out[:, width:].copy_(self.more[which])
        return out

    @property
    def assembled(self) -> bool:
        """Whether the weight isn't one tensor of floats."""
        return self.more is not None or bool(self.call.stored)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Of hidden states and weight alike, with the columns beside it."""
        return self.hidden.shape[1]

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.call.weight_dtype(self.weight)

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.weight_dtype)

    def shares(self) -> list[Share]:
        """What of the weight asks for a gradient: the weight, and the columns beside it."""
        _, need_weight, _ = self.call.needs
        more = self.width if self.more is None else self.width - self.more.shape[1]
        found = [Share("weight", self.weight, slice(0, more))] if need_weight else []
        if self.call.needs_more and self.more is not None:
            found.append(Share("more", self.more, slice(more, self.width)))
        return found

    @property
    def half(self) -> bool:
        """Whether the products take 16-bit operands."""
        return self.call.dtype.itemsize == 2

    def epilogue(self) -> Epilogue:
        bias = None if self.bias is None else self.bias.to(self.acc_dtype)
        return Epilogue(bias, self.call.softcap, self.call.scale)

    def kept(self) -> Kept:
        """The positions that are computed: those that aren't ignored."""
        if not self.call.validate:
            return Kept(self.target, len(self.target))
        return Kept.of(self.target, self.call.ignore_index)


class Share(NamedTuple):
    """One tensor of the weight, and the columns of it: `like` [V, columns]."""

    name: str
    like: Tensor
    columns: slice


class Kept:
    """The positions that aren't ignored, in order. Where all are kept nothing is gathered: rows are views."""

    def __init__(self, upto_P: Tensor, count: int):
        """upto_P: how many are kept up to each position, int64, which ends with `count`: nothing is read back."""
        self.device, self.count = upto_P.device, count
        place = torch.arange(1, count + 1, device=self.device) if count < len(upto_P) else None
        self.index = None if place is None else torch.searchsorted(upto_P, place)

    @staticmethod
    def of(target_P: Tensor, ignore_index: int) -> Kept:
        """The same from the targets. One wait for a GPU."""
        upto = (target_P != ignore_index).cumsum(0)
        return Kept(upto, int(upto[-1]) if len(upto) else 0)

    def rows(self, *ranges: tuple[int, int]) -> Rows:
        """The positions of the kept rows start … stop of each range, one after the other."""
        first, last = ranges[0][0], ranges[-1][1]
        if all(before[1] == after[0] for before, after in pairwise(ranges)):
            return slice(first, last) if self.index is None else self.index[first:last]
        if self.index is None:
            return torch.cat([torch.arange(*r, device=self.device) for r in ranges])
        return torch.cat([self.index[start:stop] for start, stop in ranges])

    def chunks(self, chunk: int, together: int, even: bool) -> Iterator[Rows]:
        """All of them, as `chunk_spans` has them."""
        for span in chunk_spans(self.count, chunk, together, even):
            yield self.rows((span.start, span.stop))


class Apart:
    """16-bit E of several chunks, apart from their logits, until one product takes all its rows: e [K, V]."""

    def __init__(self, e_KV: Tensor):
        self.e, self.handed = e_KV, 0
        self.done: list[tuple[Rows, Tensor | None]] = []

    def has_room(self, count: int) -> bool:
        """Whether so many rows fit beside those that are there."""
        return self.handed + count <= len(self.e)

    def hand(self, count: int) -> Tensor:
        """Where E of the next rows goes. [C, V]"""
        self.handed += count
        return self.e[self.handed - count : self.handed]

    def add(self, rows: Rows, r: Tensor | None) -> None:
        """E of `rows`, the next of those that were handed out, is there; r [C]."""
        self.done.append((rows, r))

    def take(self) -> tuple[Rows, Tensor, Tensor | None]:
        """(rows, E, r) of all that is there; empty from then on."""
        rows, factors = zip(*self.done)
        lengths = [length(x) for x in rows]
        e, r = self.e[: sum(lengths)], None
        given = [factor for factor in factors if factor is not None]
        if given:
            assert len(given) == len(factors)  # a kernel set leaves them to all rows, or to none
            r = torch.cat(given) if len(given) > 1 else given[0]
        self.done, self.handed = [], 0
        return joined(rows, e.device), e, r


class Products:
    """Chunks of a sweep over all of V for a kernel set, and the products with the E that the set makes of them.

    rows: C, of a chunk, at most; together: K, where E is kept apart; score_only: no gradient will be asked for.
    """

    def __init__(self, p: Problem, rows: int, together: int = 0, score_only: bool = False):
        self.p, self.chunks, self.dtype, self.half = p, p.call.chunks, p.call.dtype, p.half
        self.set: KernelSet = kernel_set(p.call.impl)
        self.vocab = p.vocab
        self.converted = p.room("converted", self.chunks.converted, p.width, dtype=self.dtype)
        self.epilogue = p.epilogue()
        # a library product that makes blocks of its own, and tile kernels, take the weight as wide as it comes
        step = self.converted.shape[0] or self.vocab
        self.columns = step if self.half or p.call.impl == "tiled" else min(step, self.chunks.columns)
        self.buffer = self._buffer(rows, score_only)
        self.apart: Apart | None = None
        if self.chunks.apart and not score_only:
            self.apart = Apart(p.room("e", max(rows, together), self.chunks.room, dtype=self.dtype)[:, : self.vocab])
        self.gathered: tuple[Rows, Tensor] | None = None  # the last chunk's
        self.sinks: tuple[Tensor | None, HeadSum | None] = None, None

    def _buffer(self, rows: int, score_only: bool) -> Tensor:
        """Logits [C, V] in the accumulators' type, for the tile kernels weights in the operands'. What is only scored
        takes one slice (C++) or nothing (tiles)."""
        chunks, impl = self.chunks, self.p.call.impl
        if score_only and impl == "cpp":
            return self.p.room("logits", rows, chunks.columns + chunks.pad, dtype=self.p.acc_dtype)[:, : self.vocab]
        rows = 0 if score_only and impl == "tiled" else rows
        dtype = self.dtype if impl == "tiled" else self.p.acc_dtype
        return self.p.room("logits", rows, chunks.room, dtype=dtype)[:, : self.vocab]

    def chunk(self, rows: Rows, score_only: bool = False) -> Chunk:
        """The positions `rows` against all of the head; `score_only`: their E isn't asked for."""
        x, out = self.inputs(rows), None
        self.gathered = rows, x
        if self.apart is not None and not score_only:
            self.make_room(len(x))
            out = self.apart.hand(len(x))
        return Chunk(
            x, self.p.target[rows], self.vocab, self.columns, partial(self.parts, self.columns),
            partial(self.parts, self.chunks.columns), self.epilogue, self.buffer[: x.shape[0]], self.chunks.room, out,
        )  # fmt: skip

    def make_room(self, count: int) -> bool:
        """Whether E of so many rows can be kept apart until it is multiplied."""
        if self.apart is None or count > len(self.apart.e):
            return False
        if not self.apart.has_room(count):
            self.multiply()
        return True

    def pull_back(
        self, rows: Rows, e_CV: Tensor, r: Tensor | None, active: Tensor | None, out_PH: Tensor | None,
        head: HeadSum | None,
    ) -> None:  # fmt: skip
        """out[rows] = diag(r) E W, and the part of `rows` in the sum of dW; with E apart when `multiply` is called.

        active: which tiles count for which rows, bool [C, T]; None for all.
        """
        if active is None:
            if self.apart is not None:
                self.sinks = out_PH, head
                self.apart.add(rows, r)
                return
            if out_PH is not None:
                self.hidden_rows(out_PH, rows, e_CV, r)
            if head is not None:
                head.add(e_CV, r, rows)
            return
        direct = self.p.weight.dtype == self.dtype and not self.p.assembled
        if direct or len(self.converted) % self.p.call.tile == 0:
            counting = self.set.counting(active, self.p.call.tile)
            if counting is not None:
                if out_PH is not None:
                    self.counted_rows(out_PH, rows, e_CV, r, active, direct)
                if head is not None:
                    head.add_counted(e_CV, r, rows, counting)
                return
        sides = [] if head is None else head.sides(rows, e_CV, r)
        dx = None if out_PH is None else e_CV.new_zeros(len(e_CV), out_PH.shape[1], dtype=self.p.acc_dtype)
        tiles = skipping.tiles_and_rows(active, self.vocab, self.p.call.tile, self.chunks.picked)
        for part, chosen in tiles:
            e = e_CV[:, part] if chosen is None else e_CV[:, part].index_select(0, chosen)
            if dx is not None:
                weight = self.p.weight_rows(part).to(self.dtype)
                if chosen is None:
                    matmul.mm(e, weight, dx, accumulate=True)
                else:
                    some = dx.new_empty(len(chosen), dx.shape[1])
                    matmul.mm(e, weight, some)
                    dx.index_add_(0, chosen, some)
                del weight
            if head is not None:
                head.add_part(part, e, [x if chosen is None else x.index_select(0, chosen) for x in sides])
        if dx is not None and out_PH is not None:
            out_PH[rows] = times(dx, r, out_PH.dtype)

    def counted_rows(
        self, out_PH: Tensor, rows: Rows, e_CV: Tensor, r: Tensor | None, active: Tensor, direct: bool
    ) -> None:  # fmt: skip
        """out[rows] = diag(r) E W where `active`. direct: the weight is read where it lies, in any order."""
        tile, order = self.p.call.tile, self.p.order if direct else None
        parts = iter([(slice(0, self.vocab), self.p.weight)]) if direct else self.weight()
        once = direct or len(self.converted) == self.vocab
        out, places, factor = out_PH, None, r
        if not once:
            out, factor = e_CV.new_empty(len(e_CV), out_PH.shape[1], dtype=self.p.acc_dtype), None
        elif isinstance(rows, slice):
            out = out_PH[rows]
        else:
            places = rows
        for part, weight in parts:
            some = self.set.counting(active[:, part.start // tile : -(-part.stop // tile)], tile)
            assert some is not None
            some.hidden(e_CV[:, part], weight, out, factor, places, order, add=part.start > 0)
        if not once:
            out_PH[rows] = times(out, r, out_PH.dtype)

    def multiply(self) -> None:
        """The products with all E that is kept apart."""
        if self.apart is None or not self.apart.done:
            return
        (out_PH, head), (rows, e_KV, r) = self.sinks, self.apart.take()
        if out_PH is not None:
            self.hidden_rows(out_PH, rows, e_KV, r)
        if head is not None:
            head.add(e_KV, r, rows)

    def inputs(self, rows: Rows) -> Tensor:
        x = self.p.hidden[rows].to(self.dtype)
        return x.contiguous() if self.p.call.impl == "tiled" else x  # whose kernels read along H

    def hidden(self, rows: Rows) -> Tensor:
        """Hidden states [K, H] in their own dtype, not gathered again where they are those of the last chunk."""
        if self.gathered is not None and rows is self.gathered[0] and self.gathered[1].dtype == self.p.hidden.dtype:
            return self.gathered[1]
        return self.p.hidden[rows]

    def parts(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """`weight`, in slices of so many columns at most, for which logits are formed by one product."""
        for part, weight in self.weight():
            for some in spans(weight.shape[0], columns):
                yield slice(part.start + some.start, part.start + some.stop), weight[some]

    def weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the operands' dtype and the problem's order: whole where it is, else converted slice by
        slice."""
        if not self.converted.shape[0]:
            yield slice(0, self.vocab), self.p.weight
            return
        for part in spans(self.vocab, len(self.converted)):
            converted, order = self.converted[: part.stop - part.start], self.p.order
            if self.p.assembled:
                yield part, self.p.assemble_(converted, part if order is None else order[part])
            elif order is not None and converted.dtype == self.p.weight.dtype:
                yield part, torch.index_select(self.p.weight, 0, order[part], out=converted)
            else:
                yield part, converted.copy_(self.p.weight_rows(part))

    def hidden_rows(self, out_PH: Tensor, rows: Rows, e_CV: Tensor, r: Tensor | None) -> None:
        """out[rows] = diag(r) E W, straight into place where the rows are a view of the right dtype."""
        # 16-bit results are rounded once: the product is one, and its rows have no factor, or one that rounds no worse
        once = out_PH.dtype == e_CV.dtype and not (self.half and self.converted.shape[0])
        in_place = isinstance(rows, slice) and once
        dtype = out_PH.dtype if once and r is None else self.p.acc_dtype
        dx = out_PH[rows] if in_place else e_CV.new_empty(e_CV.shape[0], out_PH.shape[1], dtype=dtype)
        for part, weight in self.weight():
            matmul.mm(e_CV[:, part], weight, dx, accumulate=part.start > 0)
        if in_place:
            if r is not None:
                dx.mul_(r[:, None])
            return
        for part in spans(len(dx), max(ROW_PIECE, -(-len(dx) // 4))):  # not all of it in two types at once
            places = slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
            out_PH[places] = times(dx[part], None if r is None else r[part], out_PH.dtype)


class HeadSum:
    """dW = Σ Dᵀ X over chunks. In place where one chunk is all, or the weight is 32-bit and in its own order; else in a
    buffer of accumulators, in the order of the problem."""

    def __init__(self, p: Problem, products: Products, one_chunk: bool):
        self.p, self.products, self.empty, self.one_chunk = p, products, True, one_chunk
        self.shares = p.shares()
        self.made = [p.gradient(share) for share in self.shares]
        self.sums = list(self.made)
        self.dbias = p.hidden.new_empty(p.vocab, 1, dtype=p.acc_dtype) if p.call.needs[2] else None
        self.written: list[slice] = []  # of the vocabulary, where only some of it is
        self.apart = not one_chunk and (p.weight_dtype.itemsize == 2 or p.order is not None)
        if self.apart:
            self.sums = [p.room(f"sum of {x.name}", *x.like.shape, dtype=p.acc_dtype) for x in self.shares]

    def add(self, e_CV: Tensor, r: Tensor | None, rows: Rows) -> None:
        """The part of `rows`, D = diag(r) E."""
        if self.dbias is not None:
            matmul.mm(e_CV.t(), ones_or(r, e_CV), self.dbias, accumulate=not self.empty)
        for share, total in zip(self.shares, self.sums):
            x = times(self.products.hidden(rows)[:, share.columns], r, e_CV.dtype)
            if total.dtype == e_CV.dtype or self.products.half:
                matmul.mm(e_CV.t(), x, total, accumulate=not self.empty)
            else:  # a 16-bit result of float32 operands passes through float32, slice by slice
                for part in spans(len(total), len(self.products.converted)):
                    total[part] = e_CV[:, part].t() @ x
        self.empty = False

    def sides(self, rows: Rows, e_CV: Tensor, r: Tensor | None) -> list[Tensor]:
        """What Eᵀ is multiplied with for each of the sums, [C, columns] in the operands' dtype."""
        found = [times(self.p.hidden[rows, share.columns], r, e_CV.dtype) for share in self.shares]
        return found if self.dbias is None else [*found, ones_or(r, e_CV)]

    def add_counted(self, e_CV: Tensor, r: Tensor | None, rows: Rows, counting: Counting) -> None:
        """The part of `rows`, of what counts."""
        totals = self.sums if self.dbias is None else [*self.sums, self.dbias]
        order, room = None if self.apart else self.p.order, self.products.chunks.room
        counting.head(e_CV, self.sides(rows, e_CV, r), totals, order, room, add=not self.empty)
        self.empty = False

    def add_part(self, part: slice, e: Tensor, sides: list[Tensor]) -> None:
        """The share of some rows in the entries `part` of the vocabulary: e [R, S], sides [R, columns]."""
        totals = self.sums if self.dbias is None else [*self.sums, self.dbias]
        if self.empty and not self.one_chunk:
            for total in totals:
                total.zero_()
        self.empty = False
        self.written.append(part)
        order = None if self.apart else self.p.order
        for x, total in zip(sides, totals):
            if order is None and (total.dtype == e.dtype or self.products.half):
                matmul.mm(e.t(), x, total[part], accumulate=not self.one_chunk)
                continue
            product = e.new_empty(e.shape[1], x.shape[1], dtype=self.p.acc_dtype)
            matmul.mm(e.t(), x, product)
            total[part if order is None else order[part]] = product.to(total.dtype)

    def finished(self) -> dict[str, Tensor]:
        """By name those of dW [V, H], d more [V, r] and db [V] that are asked for, in the weight's dtype."""
        for never_written in (*self.sums, self.dbias) if self.empty else ():
            if never_written is not None:
                never_written.zero_()
        if self.one_chunk and self.written:
            self._clear_rest()
        order, dbias = self.p.order if self.apart else None, self.dbias
        for made, total in zip(self.made, self.sums):
            if order is not None:
                for part in spans(len(total), self.products.chunks.picked):
                    made[order[part]] = total[part].to(made.dtype)
            elif made is not total:
                made.copy_(total)
        found = {share.name: made for share, made in zip(self.shares, self.made)}
        if dbias is not None:
            if order is not None:
                dbias = torch.empty_like(dbias).index_copy_(0, order, dbias)
            found["bias"] = dbias.view(-1).to(self.p.weight_dtype)
        return found

    def _clear_rest(self) -> None:
        """Zeros where one chunk, that is all, wrote nothing."""
        rest = torch.ones(self.p.vocab, dtype=torch.bool, device=self.p.hidden.device)
        for part in self.written:
            rest[part] = False
        rows = rest.nonzero().squeeze(1)
        if self.p.order is not None:
            rows = self.p.order[rows]
        for total in self.sums if self.dbias is None else [*self.sums, self.dbias]:
            total.index_fill_(0, rows, 0)


class HeadSlices:
    """dW [V, H] and db [V], a slice of the vocabulary at a time; each slice is complete when it is left."""

    def __init__(self, p: Problem, columns: int, chunk: int, rows: int):
        self.p, self.set, self.dtype = p, kernel_set(p.call.impl), p.call.dtype
        self.rows, self.pad = rows, p.call.chunks.pad
        self.shares = p.shares()
        self.made = [p.gradient(share) for share in self.shares]
        self.dbias = p.hidden.new_empty(p.vocab, 1, dtype=p.acc_dtype) if p.call.needs[2] else None
        dtype = self.dtype if p.call.impl == "tiled" else p.acc_dtype
        self.buffer = p.room("slice", chunk * self.stride(columns), dtype=dtype)
        self.e = p.room("e of slice", rows * self.stride(columns) * p.call.chunks.apart, dtype=self.dtype)
        self.epilogue = p.epilogue()

    def stride(self, columns: int) -> int:
        """Length of a row of logits and of E."""
        return columns + self.pad if self.pad else aligned(columns)

    def apart(self, columns: int) -> Apart | None:
        """Where E of a slice is kept, if apart from its logits."""
        if not self.p.call.chunks.apart:
            return None
        stride = self.stride(columns)
        rows = min(self.rows, len(self.e) // stride)
        return Apart(self.e[: rows * stride].view(rows, stride)[:, :columns])

    def chunk(self, x: Tensor, y: Tensor, part: slice, weight: Tensor, out: Tensor | None = None) -> Chunk:
        """Rows x [C, H] with targets y [C] against the slice `part` of the head, weight [S, H]."""
        columns = len(weight)
        stride = self.stride(columns)
        z = self.buffer[: len(x) * stride].view(len(x), stride)[:, :columns]
        epilogue = self.epilogue.slice(part.start, part.stop)

        def whole() -> Iterator[tuple[slice, Tensor]]:
            yield slice(0, columns), weight

        room = columns if self.pad else stride
        return Chunk(x, inside(y, part), columns, columns, whole, whole, epilogue, z, room, out)

    def add(
        self, dw: list[Tensor], db: Tensor | None, x: Tensor, e: Tensor, r: Tensor | None, first: bool
    ) -> None:  # fmt: skip
        """The share of rows x [K, H] in the sums of a slice, written where it is the first, else added. e [K, S]"""
        for share, total in zip(self.shares, dw):
            matmul.mm(e.t(), times(x[:, share.columns], r, e.dtype), total, accumulate=not first)
        if db is not None:
            matmul.mm(e.t(), ones_or(r, e), db, accumulate=not first)

    def room(self, part: slice, count: int) -> tuple[list[Tensor], Tensor | None]:
        """Where the sums of a slice over `count` rows go, [S, H] for each share of the weight, and [S, 1]."""
        p, size = self.p, part.stop - part.start
        if self.in_place(count):
            sums = [made[part] for made in self.made]
        else:
            sums = [p.hidden.new_empty(size, made.shape[1], dtype=p.acc_dtype) for made in self.made]
        for dw in sums if not count else ():
            dw.zero_()
        return sums, None if self.dbias is None else self.dbias.new_zeros(size, 1)

    def in_place(self, count: int) -> bool:
        """Whether the product over `count` rows is the slice of dW itself: one of the accumulators' type, or one that
        is rounded once."""
        dtype = self.p.weight_dtype
        return self.p.order is None and (dtype == self.p.acc_dtype or (dtype == self.dtype and count <= self.rows))

    def keep(self, part: slice, count: int, sums: list[Tensor], db: Tensor | None) -> None:
        """Put the finished sums of a slice where they belong."""
        order = self.p.order
        places = part if order is None else order[part]
        for made, dw in zip(self.made, sums) if not self.in_place(count) else ():
            if order is None:
                made[part].copy_(dw)  # converts as it writes
            else:
                made[places] = dw.to(made.dtype)
        if self.dbias is not None and db is not None:
            self.dbias[places] = db

    def finished(self) -> dict[str, Tensor]:
        """As `HeadSum.finished`."""
        found = {share.name: made for share, made in zip(self.shares, self.made)}
        if self.dbias is not None:
            found["bias"] = self.dbias.view(-1).to(self.p.weight_dtype)
        return found


def times(x_CH: Tensor, r: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(r) X, rounded once, in one pass."""
    if r is None:
        return x_CH.to(dtype)
    return torch.mul(x_CH, r[:, None], out=x_CH.new_empty(x_CH.shape, dtype=dtype))


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


def chunk_spans(total: int, chunk: int, together: int, even: bool) -> Iterator[slice]:
    """0 … total in parts of at most `together`, each in spans of at most `chunk`. `even`: parts and spans are of about
    equal length; else all but the last are full, so that no span crosses a multiple of `together`."""
    cut = even_spans if even else spans
    for whole in cut(total, together):
        for part in cut(whole.stop - whole.start, chunk):
            yield slice(whole.start + part.start, whole.start + part.stop)


def joined(rows: Sequence[Rows], device: torch.device) -> Rows:
    """All of some rows, one after the other."""
    if all(isinstance(x, slice) for x in rows) and all(a.stop == b.start for a, b in pairwise(rows)):  # type: ignore[union-attr]
        return slice(rows[0].start, rows[-1].stop)  # type: ignore[union-attr]
    if len(rows) == 1:
        return rows[0]
    return torch.cat([torch.arange(x.start, x.stop, device=device) if isinstance(x, slice) else x for x in rows])


def length(rows: Rows) -> int:
    """How many they are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def split_rows(rows: Rows, step: int) -> list[Rows]:
    """`rows` in pieces of at most `step`."""
    if isinstance(rows, Tensor):
        return list(rows.split(step)) if len(rows) else []
    return [slice(rows.start + s.start, rows.start + s.stop) for s in spans(rows.stop - rows.start, step)]


def empty_statistics(p: Problem, entropy: bool, positions: int | None = None) -> Statistics:
    """0 at every position [P], or at so many."""
    count = len(p.target) if positions is None else positions
    zeros = partial(p.hidden.new_zeros, count, dtype=p.acc_dtype)
    return Statistics(zeros(), zeros(), zeros() if entropy else None)
