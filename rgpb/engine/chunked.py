"""The loops over chunks of rows and slices of the vocabulary, and how the chunked engine makes what they multiply.

    score            Z = X Wᵀ → (z_y, lse_other, H_o), and O = Q W − w_y where the hidden gradient will be asked for
    single_pass      the same, and at once D from the chunk's coefficients: dX = D W, dW += Dᵀ X
    head_gradient    Z again, slice by slice of V: dW = Dᵀ X finished per slice
    hidden_gradient  Z again, dX = D W (only where the entropy has a gradient)

D = diag(r) E as the kernels leave it; r is None where it is all 1. `Products` makes E by library products into one
reused buffer and row kernels over it; `tiled.Tiles` overrides just that. With Q the softmax over the other tokens and
O = Q W − w_y, dX = g_lo · O + (g_zy + g_lo) · w_y needs no second look at the logits.
All loops run without autograd and without autocast, over the rows that aren't ignored.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, C rows of a chunk, S slice of V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.engine import plan
from rgpb.engine.plan import Sizes, convert_rows, row_chunk, single_chunk, sizes, slice_chunk
from rgpb.kernels import cpp_rows, torch_rows
from rgpb.kernels.cpp_rows import fresh
from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream

Rows = slice | Tensor

# Chunks of rows come in multiples of this, but for the last: registers take so many.
ROW_UNIT = 16


class Problem(NamedTuple):
    """One call, flattened: hidden [P, H], weight [V, H], bias [V] or None, target int64 [P].

    With `order` the vocabulary is taken in that order, and `target` and `bias` are already in it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    softcap: float | None
    scale: float
    ignore_index: int
    workspace: int
    compute_dtype: torch.dtype
    impl: str = "torch"
    engine: str = "chunked"
    order: Tensor | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without autocast, and on the tensors' own GPU: Triton launches on the current one."""
        device = self.hidden.device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.autocast(device.type, enabled=False), current:
            yield

    @property
    def sizes(self) -> Sizes:
        vocab, width = self.weight.shape
        made = sizes(
            vocab, width, self.weight.dtype, self.compute_dtype, self.weight.device.type, self.impl, self.engine
        )
        strided = self.engine == "tiled" and self.weight.stride(1) != 1 and width > 1
        return made.gathered() if self.order is not None else made._replace(convert=made.convert or strided)

    def ordered(self, order: Tensor) -> Problem:
        """The same with the vocabulary in that order. int64 [V]."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        target = torch.where(self.target == self.ignore_index, self.ignore_index, place[self.target.clamp(min=0)])
        bias = None if self.bias is None else self.bias[order]
        return self._replace(order=order, target=target, bias=bias)

    def weight_rows(self, part: slice) -> Tensor:
        """The head's rows for entries `part` of the vocabulary, as it is stored. [S, H]"""
        return self.weight[part if self.order is None else self.order[part]]

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


class TokenTerms(NamedTuple):
    """A token-wise loss that the Triton and C++ row kernels have themselves, for the rows of a chunk.

    Attributes:
        loss: of `triton_rows.TOKEN_LOSSES`.
        weight: factor of each token's loss, [C]; negative for a rejected one.
        ref: (log p, log-odds) of the reference, [C] each, or None.
        entropy: whether its value needs H_o.
        add: takes the tokens' losses.
    """

    loss: str
    weight: Tensor
    ref: tuple[Tensor, Tensor] | None
    entropy: bool
    add: Callable[[Tensor], object]


class Products:
    """The matrix products of one sweep over all of V, with their buffers; chunked: logits in float32, row kernels.

    `rows`: of a chunk; `score_only`: no gradient will be asked for.
    """

    def __init__(self, p: Problem, rows: int, score_only: bool = False):
        self.p, self.sizes, self.dtype = p, p.sizes, p.gemm_dtype
        self.converted = p.hidden.new_empty(convert_rows(self.sizes, p.workspace), p.weight.shape[1], dtype=self.dtype)
        self.half = self.dtype.itemsize == 2
        self.epilogue = p.epilogue()
        self.buffer = self.empty(rows, score_only)
        self.at_hand: tuple[Tensor, Tensor | None]

    def empty(self, rows: int, score_only: bool) -> Tensor:
        """The buffer of logits, [C, V]; for scores alone it may be one slice wide."""
        if score_only and self.sizes.sliced:
            return self.p.hidden.new_empty(rows, self.sizes.columns + plan.PAD, dtype=self.p.acc_dtype)
        return self.padded(rows, self.p.acc_dtype)

    def padded(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[C, V] whose rows are `room` long."""
        return fresh(self.p.hidden.new_empty(rows, self.sizes.room, dtype=dtype))[:, : self.sizes.vocab]

    def inputs(self, rows: Rows) -> Tensor:
        return self.p.hidden[rows].to(self.dtype)

    def weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the products' dtype and order: whole where it is, else converted slice by slice."""
        if not self.sizes.convert:
            yield slice(0, self.sizes.vocab), self.p.weight
            return
        for part in spans(self.sizes.vocab, len(self.converted)):
            converted, order = self.converted[: part.stop - part.start], self.p.order
            if order is not None and converted.dtype == self.p.weight.dtype:
                yield part, torch.index_select(self.p.weight, 0, order[part], out=converted)
            else:
                yield part, converted.copy_(self.p.weight_rows(part))

    def logits(self, x_CH: Tensor) -> Tensor:
        """X Wᵀ in float32 (float64) before anything is rounded. [C, V]"""
        z = self.buffer[: len(x_CH)]
        for part, weight in self.weight() if self.half else self.columns():  # `mm_bf16` makes blocks of its own
            mm(x_CH, weight.t(), z[:, part])
        return z

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """`weight`, in slices for which logits are formed by one product."""
        for part, weight in self.weight():
            for some in spans(len(weight), self.sizes.columns):
                yield slice(part.start + some.start, part.start + some.stop), weight[some]

    def half_view(self, z_CV: Tensor) -> Tensor | None:
        """16-bit [C, V] over the first half of each row's bytes, where the products take 16-bit operands."""
        return z_CV.view(self.dtype)[:, : z_CV.shape[1]] if self.half else None

    def score(self, rows: Rows, into: Statistics, keep: bool, masses: Tensor | None = None) -> None:
        """Statistics of `rows` into `into`, masses of each MASS_TILE columns into `masses` [P, T].

        keep: E is asked for next, by `gradient`.
        """
        if self.sizes.sliced and not keep and masses is None:
            fill(into, self._score_slices(self.inputs(rows), self.p.target[rows], into.h_o is not None), rows)
            return
        z, entropy = self.logits(self.inputs(rows)), into.h_o is not None
        if self.p.impl != "triton":
            made = None if masses is None else masses.new_empty(len(z), masses.shape[1])
            e = self.half_view(z)
            scores, total = row_kernels(self.p).statistics_(
                z, self.p.target[rows], self.epilogue, entropy, e, made, plan.MASS_TILE, keep
            )
            self.at_hand = (z if e is None else e), total
        else:
            tile = None if masses is None else plan.MASS_TILE
            scores, made = triton_rows().statistics(
                z, self.p.target[rows], self.epilogue, entropy, tile, self.sizes.room
            )
            self.at_hand = z, None
        fill(into, scores, rows)
        if masses is not None:
            masses[rows] = made  # type: ignore[assignment]

    def _score_slices(self, x_CH: Tensor, y_C: Tensor, entropy: bool) -> Statistics:
        """Statistics of logits that nobody asks for again: a slice of the vocabulary at a time, still in the cache when
        it is swept, in the first bytes of the buffer."""
        running = cpp_rows.begin(x_CH)
        for part, weight in self.columns():
            stride = min(len(weight) + plan.PAD, self.buffer.shape[1])
            z = self.buffer.view(-1)[: len(x_CH) * stride].view(len(x_CH), stride)[:, : len(weight)]
            mm(x_CH, weight.t(), z)
            cpp_rows.add_slice_(running, z, inside(y_C, part), self.epilogue.slice(part.start, part.stop), entropy)
        return cpp_rows.end(running, entropy, self.p.acc_dtype)

    def gradient(self, rows: Rows, scores: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        """(E, r) of the rows scored last."""
        z, total = self.at_hand
        target = self.p.target[rows]
        if total is None:
            return triton_rows().gradients_(
                z, target, scores, upstream, self.epilogue, self.half_view(z), self.sizes.room
            )
        r = torch.where(total > 0, upstream.g_lo / total, 0)
        return z, torch_rows.with_target_(z, target, r, upstream.g_zy * self.epilogue.jacobian(scores.z_y))

    def token_loss(self, rows: Rows, into: Statistics, terms: TokenTerms) -> Tensor:
        """Score `rows`, and at once E of a token-wise loss (r is None)."""
        z = self.logits(self.inputs(rows))
        scores, value, e = row_kernels(self.p).token_loss_(
            z, self.p.target[rows], terms.loss, terms.weight, terms.ref, self.epilogue, terms.entropy,
            self.half_view(z), self.sizes.room,
        )  # fmt: skip
        terms.add(value)
        fill(into, scores, rows)
        return e

    def again(self, rows: Rows, scores: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        """(E, r) of rows whose statistics are known."""
        z = self.logits(self.inputs(rows))
        return row_kernels(self.p).gradients_(
            z, self.p.target[rows], scores, upstream, self.epilogue, self.half_view(z), self.sizes.room
        )

    def hidden_rows(self, out_PH: Tensor, rows: Rows, e_CV: Tensor, r: Tensor | None) -> None:
        """out[rows] = diag(r) E W, straight into place where the rows are a view of the right dtype."""
        # 16-bit results are rounded once: the product is one, and its rows have no factor, or one that rounds no worse
        once = out_PH.dtype == e_CV.dtype and not (self.half and self.sizes.convert)
        in_place = isinstance(rows, slice) and once
        dtype = out_PH.dtype if once and r is None else self.p.acc_dtype
        dx = out_PH[rows] if in_place else e_CV.new_empty(len(e_CV), out_PH.shape[1], dtype=dtype)
        for part, weight in self.weight():
            mm(e_CV[:, part], weight, dx, accumulate=part.start > 0)
        if r is not None:
            dx.mul_(r[:, None])
        if not in_place:
            out_PH[rows] = dx.to(out_PH.dtype)


def triton_rows() -> Any:
    """The Triton row kernels, imported when first needed."""
    from rgpb.kernels import triton_rows

    return triton_rows


def row_kernels(p: Problem) -> Any:
    return triton_rows() if p.impl == "triton" else {"torch": torch_rows, "cpp": cpp_rows}[p.impl]


def products_of(p: Problem, rows: int, score_only: bool = False) -> Products:
    """What makes E for chunks of up to `rows` rows, on the problem's engine."""
    if p.engine == "tiled":
        from rgpb.engine.tiled import Tiles

        return Tiles(p, rows, score_only)
    return Products(p, rows, score_only)


def inside(y: Tensor, part: slice) -> Tensor:
    """Targets relative to the slice `part` of the vocabulary, −1 where they lie elsewhere."""
    y = y - part.start
    return torch.where((y >= 0) & (y < part.stop - part.start), y, -1)


def fill(into: Statistics, scores: Statistics, rows: Rows) -> None:
    for column, value in zip(into, scores):
        if column is not None:
            column[rows] = value


class HeadSum:
    """dW = Σ Dᵀ X over chunks. In place where the weight is 32-bit or one chunk is all; else in a float32 buffer."""

    def __init__(self, p: Problem, products: Products, weight: bool, bias: bool, chunks: int):
        self.p, self.products, self.fresh = p, products, True
        self.dweight = fresh(torch.empty_like(p.weight)) if weight else None
        self.dbias = p.hidden.new_empty(p.weight.shape[0], 1, dtype=p.acc_dtype) if bias else None
        self.sum = self.dweight
        if weight and products.sizes.accumulate and chunks > 1:
            self.sum = fresh(torch.empty_like(p.weight, dtype=torch.float32))

    def add(self, e_CV: Tensor, r: Tensor | None, rows: Rows) -> None:
        """The part of `rows`, D = diag(r) E."""
        if self.dbias is not None:
            mm(e_CV.t(), ones_or(r, e_CV), self.dbias, accumulate=not self.fresh)
        if self.sum is not None:
            x = times(self.p.hidden[rows], r).to(e_CV.dtype)
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


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = A B, or out += A B; 16-bit operands may have a float32 result (CUDA, and `cpp_rows.BF16_PRODUCTS`)."""
    if a.dtype == torch.bfloat16 and a.device.type == "cpu":
        if out.stride(1) != 1:
            a, b, out = b.t(), a.t(), out.t()  # gradients lie as their tensors do
        torch.ops.rgpb.mm_bf16(with_unit_stride(a), with_unit_stride(b), out, accumulate)
        return
    more: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **more, out=out)
    else:
        torch.mm(a, b, **more, out=out)


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if neither its rows nor its columns are dense, as library products do it."""
    return x if 1 in x.stride() else x.contiguous()


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


class Scored(NamedTuple):
    """What `score` returns; the last three are empty unless asked for.

    Attributes:
        z_y, lse_other: [P], 0 at ignored positions.
        h_o: [P].
        accumulated: O [P, H], in the hidden states' dtype.
        masses: softmax mass over the other tokens of each MASS_TILE columns, float32 [P, T].
        order: int64 [V], the order of the vocabulary's columns that `masses` are in.
    """

    z_y: Tensor
    lse_other: Tensor
    h_o: Tensor
    accumulated: Tensor
    masses: Tensor
    order: Tensor


def score(p: Problem, entropy: bool, accumulate: bool, masses: bool = False, sort_vocab: bool = False) -> Scored:
    """The statistics of each position, and what the backward will ask for."""
    kept = Kept(p.target, p.ignore_index)
    check_rows(p, kept)
    order = p.target.new_empty(0)
    if sort_vocab:
        order = order_by_mass(p, kept) if kept.count else torch.arange(len(p.weight), device=order.device)
        p = p.ordered(order)
    scores = empty_statistics(p, entropy)
    accumulated = torch.zeros_like(p.hidden) if accumulate else p.hidden.new_empty(0)
    kept_masses = None
    if masses:
        kept_masses = p.hidden.new_zeros(len(p.target), -(-p.weight.shape[0] // plan.MASS_TILE), dtype=p.acc_dtype)
    score_only = not (accumulate or masses)
    step, _ = row_chunk(p.sizes, p.workspace, kept.count, score_only=score_only)
    products = products_of(p, step, score_only)
    for chunk in even_spans(kept.count, step):
        rows = kept.rows((chunk.start, chunk.stop))
        products.score(rows, scores, accumulate, kept_masses)
        if accumulate:
            one = torch.ones_like(scores.z_y[rows])
            products.hidden_rows(accumulated, rows, *products.gradient(rows, scores.at(rows), Upstream(-one, one)))
    z_y, lse_other, h_o = scores
    if kept_masses is None:
        kept_masses = z_y.new_empty(0)
    return Scored(z_y, lse_other, z_y.new_empty(0) if h_o is None else h_o, accumulated, kept_masses, order)


# Rows from which the order of the vocabulary is estimated.
SAMPLE_ROWS = 128


def order_by_mass(p: Problem, kept: Kept) -> Tensor:
    """The vocabulary by falling softmax mass, estimated from rows at even distances. int64 [V]"""
    p = p._replace(engine="chunked", impl="torch")
    fits, _ = row_chunk(p.sizes, p.workspace, kept.count)
    rows = min(SAMPLE_ROWS, fits)
    some = torch.arange(rows, device=p.target.device) * (kept.count - 1) // max(rows - 1, 1)
    positions = some if kept.index is None else kept.index[some]
    products = Products(p, rows)
    z = products.logits(products.inputs(positions))
    torch_rows.apply_(z, products.epilogue)
    mass = z.sub_(z.logsumexp(1, keepdim=True)).exp_().sum(0)
    return mass.argsort(descending=True, stable=True)


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
    chunks: Iterator[tuple[Rows, Callable[[Statistics], Upstream] | TokenTerms]],
    kept: Kept,
    need: tuple[bool, bool, bool],
    entropy: bool,
) -> tuple[Statistics, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in the forward. `chunks` yields rows and what turns their statistics into coefficients, or the loss.

    A chunk with more rows than the workspace holds is swept twice: for its statistics, then for its gradients.

    Returns:
        (z_y, lse_other, H_o) [P], dhidden [P, H], dweight [V, H], dbias [V]; None where `need` says so.
    """
    tokens = kept.count
    rows_that_fit, _ = single_chunk(p.sizes, p.workspace, tokens)
    scores = empty_statistics(p, entropy)
    dhidden = torch.zeros_like(p.hidden) if need[0] else None
    products = products_of(p, rows_that_fit)
    total = HeadSum(p, products, need[1], need[2], chunks=-(-tokens // max(rows_that_fit, 1)))

    def pull_back(block: Rows, e: Tensor, r: Tensor | None) -> None:
        if dhidden is not None:
            products.hidden_rows(dhidden, block, e, r)
        total.add(e, r, block)

    for rows, coefficients in chunks:
        if isinstance(coefficients, TokenTerms):
            pull_back(rows, products.token_loss(rows, scores, coefficients), None)
            continue
        blocks = split_rows(rows, rows_that_fit)
        for block in blocks:
            products.score(block, scores, keep=len(blocks) == 1)
        upstream = coefficients(scores.at(rows))
        for block, part in zip(blocks, spans(len(upstream.g_zy), rows_that_fit)):
            if len(blocks) > 1:
                products.score(block, scores, keep=True)
            pull_back(block, *products.gradient(block, scores.at(block), upstream.at(part)))
    return scores, dhidden, *total.finished()


def head_gradient(
    p: Problem,
    statistics: Statistics,
    upstream: Upstream,
    need_weight: bool,
    need_bias: bool,
    rows_of: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, H] and db [V]: logits again for a slice of V; each slice of dW is complete when it is left.

    Args:
        rows_of: positions that count for a tile of MASS_TILE columns; default: all that are kept, for every slice.
    """
    kept = Kept(p.target, p.ignore_index)
    vocab, width = p.weight.shape
    dtype, acc, epilogue = p.gemm_dtype, p.acc_dtype, p.epilogue()
    if not kept.count:
        return torch.zeros_like(p.weight) if need_weight else None, p.weight.new_zeros(vocab) if need_bias else None
    dweight = fresh(torch.empty_like(p.weight)) if need_weight else None
    dbias = p.hidden.new_empty(vocab, 1, dtype=acc) if need_bias else None
    rows_step, slice_step, _ = slice_chunk(p.sizes, p.workspace, kept.count)
    tile = vocab if rows_of is None else plan.MASS_TILE
    slice_step = min(slice_step, tile)
    stride = slice_step + p.sizes.pad
    buffer = fresh(p.hidden.new_empty(rows_step * stride, dtype=dtype if p.engine == "tiled" else acc))
    for part in (
        slice(t.start + s.start, t.start + s.stop)
        for t in spans(vocab, tile)
        for s in spans(t.stop - t.start, slice_step)
    ):
        weight = p.weight_rows(part).to(dtype)
        places = part if p.order is None else p.order[part]
        chosen = None if rows_of is None else rows_of(part.start // tile)
        count = kept.count if chosen is None else len(chosen)
        dw = None
        if dweight is not None:
            # one chunk of rows: the product in the weight's own dtype is the slice, rounded once
            own = dweight.dtype == acc or (dweight.dtype == dtype and count <= rows_step)
            in_place = own and p.order is None
            dw = dweight[part] if in_place else p.hidden.new_empty(len(weight), width, dtype=acc)
        db = None if dbias is None else dbias.new_zeros(len(weight), 1)
        if dw is not None and not count:
            dw.zero_()
        for chunk in even_spans(count, rows_step):
            rows = kept.rows((chunk.start, chunk.stop)) if chosen is None else chosen[chunk]
            x = p.hidden[rows].to(dtype)
            stride = len(weight) + p.sizes.pad
            z = buffer[: len(x) * stride].view(len(x), stride)[:, : len(weight)]
            e, r = slice_gradient_(p, x, weight, z, rows, part, statistics, upstream, epilogue)
            if dw is not None:
                mm(e.t(), times(x, r).to(dtype), dw, accumulate=chunk.start > 0)
            if db is not None:
                mm(e.t(), ones_or(r, e), db, accumulate=chunk.start > 0)
        if dweight is not None and dw is not None and not in_place:
            if p.order is None:
                dweight[part].copy_(dw)  # converts as it writes
            else:
                dweight[places] = dw.to(dweight.dtype)
        if dbias is not None and db is not None:
            dbias[places] = db
        del weight, dw  # the next slice is not held beside this one
    return dweight, None if dbias is None else dbias.view(-1).to(p.weight.dtype)


def hidden_gradient(p: Problem, statistics: Statistics, upstream: Upstream) -> Tensor:
    """dX [P, H] with the logits formed again: where H_o has a gradient, O alone doesn't give it."""
    kept = Kept(p.target, p.ignore_index)
    dhidden = torch.zeros_like(p.hidden)
    step, _ = row_chunk(p.sizes, p.workspace, kept.count)
    products = products_of(p, step)
    for chunk in even_spans(kept.count, step):
        rows = kept.rows((chunk.start, chunk.stop))
        e, r = products.again(rows, statistics.at(rows), upstream.at(rows))
        products.hidden_rows(dhidden, rows, e, r)
    return dhidden


def slice_gradient_(
    p: Problem, x: Tensor, weight: Tensor, z: Tensor, rows: Rows, part: slice, statistics: Statistics,
    upstream: Upstream, epilogue: Epilogue,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(E, r) of `rows` and the slice `part` of the vocabulary, with D = diag(r) E; z [C, S] is room for it."""
    y = inside(p.target[rows], part)
    scores, gradients, epilogue = statistics.at(rows), upstream.at(rows), epilogue.slice(part.start, part.stop)
    if p.engine == "tiled":
        from rgpb.kernels import triton_tiles

        return z, triton_tiles.gradients(x, weight, y, scores, gradients, epilogue, z)
    mm(x, weight.t(), z)
    half = z.view(p.gemm_dtype)[:, : z.shape[1]] if p.sizes.gemm == 2 else None
    return row_kernels(p).gradients_(z, y, scores, gradients, epilogue, half)


def empty_statistics(p: Problem, entropy: bool) -> Statistics:
    """0 at every position [P]."""
    z_y, lse_other, h_o = (p.hidden.new_zeros(len(p.target), dtype=p.acc_dtype) for _ in range(3))
    return Statistics(z_y, lse_other, h_o if entropy else None)


def split_rows(rows: Rows, step: int) -> list[Rows]:
    """`rows` in pieces of at most `step`."""
    if isinstance(rows, Tensor):
        return list(rows.split(step)) if len(rows) else []
    return [slice(rows.start + s.start, rows.start + s.stop) for s in spans(rows.stop - rows.start, step)]
