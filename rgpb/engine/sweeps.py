"""The three sweeps, each its loop and its operator: score, loss, pull back.

    score      Z = X Wᵀ → (z_y, lse_other, H_o), and O = Q W − w_y where the gradient of hidden will be asked for
    loss       the same, and at once D from the chunk's coefficients: dX = D W, dW += Dᵀ X  (the single pass)
    pull_back  Z again, slice by slice of V: dW = Dᵀ X finished per slice; dX = D W only where H_o has a gradient

With Q the softmax over the other tokens and O = Q W − w_y, dX = g_lo · O + (g_zy + g_lo) · w_y needs no second look at
the logits. All loops run without autograd and without autocast, over the rows that aren't ignored. What a chunk holds
stands in the call.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, C rows of a chunk, S slice of V, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.engine import skipping
from rgpb.engine.call import Call, Tensors
from rgpb.engine.coefficients import Coefficients
from rgpb.engine.operator import is_intercepted, is_traced, operator
from rgpb.engine.products import (
    Apart,
    HeadSlices,
    HeadSum,
    Kept,
    Problem,
    Products,
    Rows,
    chunk_spans,
    empty_statistics,
    length,
    spans,
    split_rows,
)
from rgpb.kernels import devices
from rgpb.kernels.torch_rows import TorchRows, apply_
from rgpb.kernels.types import Chunk, Statistics, TokenTerms, Upstream, Weighed, acc_dtype
from rgpb.objectives import resolve


def filled(into: Statistics | None, found: Statistics, rows: Rows, p: Problem) -> Statistics:
    """All statistics, with those of `rows` in their places and 0 where there are none yet."""
    if isinstance(rows, slice) and rows == slice(0, p.target.shape[0]):
        return found
    if into is None:
        into = empty_statistics(p, found.h_o is not None)
    for column, value in zip(into, found):
        if column is not None and value is not None:
            column[rows] = value
    return into


def empty_rows(p: Problem, kept: Kept) -> Tensor:
    """For a value of each row [P, H] that is kept; 0 elsewhere."""
    return torch.empty_like(p.hidden) if kept.index is None else torch.zeros_like(p.hidden)


def checked_rows(
    hidden: Tensor, target: Tensor, vocab: int, ignore: int, counts: Tensor | None = None
) -> tuple[Kept, list[int]]:
    """The positions that aren't ignored, and `counts` on the host, read back at once; refuses what would turn into a
    finite but wrong loss. hidden [P, H], target [P], counts int64 [n]

    Raises:
        ValueError: a target outside [0, V) that isn't `ignore_index`, or hidden states that aren't finite.
    """
    if not len(target):
        return Kept(target, 0), [0] * (0 if counts is None else len(counts))
    kept = target != ignore
    upto = kept.cumsum(0)
    low, high = (target * kept).aminmax()  # 0, which is in every vocabulary, for those that are ignored
    # NaN and infinity pass through a sum; so does what overflows in it, hence the second look
    bits = hidden.detach().sum().double().view(torch.int64)
    facts = (upto[-1:], low[None], high[None], bits[None])
    count, least, most, total, *rest = torch.cat(facts if counts is None else (*facts, counts)).tolist()
    if least < 0 or most >= vocab:
        at = int((((target < 0) | (target >= vocab)) & kept).nonzero()[0])
        raise ValueError(
            f"target: expected values in [0, {vocab}) or ignore_index={ignore}, "
            f"got {int(target[at])} at flat position {at}"
        )
    if total >> 52 & 0x7FF == 0x7FF:  # the exponent of what isn't finite
        low, high = hidden.aminmax(dim=1)  # both carry NaN; no temporary of the size of hidden
        wrong = (kept & ~((low > -torch.inf) & (high < torch.inf))).nonzero()
        if len(wrong):
            raise ValueError(f"hidden: expected finite values, got NaN or infinity at flat position {int(wrong[0])}")
    return Kept(upto, count), rest


def read_rows(p: Problem, counts: Tensor | None = None) -> tuple[Kept, list[int]]:
    """`checked_rows` of a problem; without `Call.validate` nothing is read."""
    if not p.call.validate:
        return p.kept(), []
    return checked_rows(p.hidden, p.target, p.vocab, p.call.ignore_index, counts)


# -- score ------------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What `score` returns; all but the first two are empty unless asked for.

    Attributes:
        z_y, lse_other: [P], 0 at ignored positions.
        h_o: [P].
        accumulated: O [P, H], in the hidden states' dtype.
        active: of skipping, which tiles of the vocabulary count for which rows, bool [P, T].
        left_out: float32 [P], a bound of the softmax mass of the other tiles.
        order: int64 [V], the order of the vocabulary that the tiles are in.
        report: float32 [P + 1], of skipping (`skipping.Skipped.read`): NaN, until a backward fills it in.
    """

    z_y: Tensor
    lse_other: Tensor
    h_o: Tensor
    accumulated: Tensor
    active: Tensor
    left_out: Tensor
    order: Tensor
    report: Tensor


def _score(tensors: Tensors, call: Call) -> Scored:
    """The statistics of each position, and what the backward will ask for."""
    p = Problem.of(tensors, call)
    with p.running():
        kept, _ = read_rows(p)
        p, order = in_order(p, kept)
        skip = call.tolerance is not None
        statistics, accumulated = None, empty_rows(p, kept) if call.accumulate else p.hidden.new_empty(0)
        active = p.hidden.new_zeros((len(p.target), tiles_of(p.weight, call)) if skip else 0, dtype=torch.bool)
        left_out = p.hidden.new_zeros(len(p.target) if skip else 0, dtype=torch.float32)
        score_only = not (call.accumulate or skip)
        scored = min(call.chunks.scored_rows, kept.count)
        rows, together = (scored, scored) if score_only else call.chunks.sweep_for(kept.count)
        products = Products(p, rows, together, score_only)
        for chunk in kept.chunks(rows, together, call.chunks.even):
            given, tile, some = products.chunk(chunk), call.tile or None, None
            if call.accumulate:
                found, masses, weighed = products.set.weigh(given, call.entropy, tile)
            else:
                found, masses = products.set.score(given, call.entropy, tile)
            one = torch.ones_like(found.z_y)
            if masses is not None and call.tolerance is not None:
                own = given.y // call.tile
                some, left_out[chunk] = skipping.choose(masses, own, found, Upstream(-one, one), one, call.tolerance)
                active[chunk] = some
            if call.accumulate:
                e, r = products.set.pull_back(given, weighed, found, Upstream(-one, one))
                products.pull_back(chunk, e, r, some, accumulated, None)
            statistics = filled(statistics, found, chunk, p)
        products.multiply()
        statistics = statistics or empty_statistics(p, call.entropy)
    report = p.hidden.new_full((len(p.target) + 1 if skip else 0,), torch.nan, dtype=torch.float32)
    h_o = p.hidden.new_empty(0, dtype=p.acc_dtype) if statistics.h_o is None else statistics.h_o
    return Scored(statistics.z_y, statistics.lse_other, h_o, accumulated, active, left_out, order, report)


def _score_fake(t: Tensors, call: Call) -> Scored:
    hidden, weight, target = t.need("hidden", "weight", "target")
    acc, positions, skip = acc_dtype(call.weight_dtype(weight)), target.shape, call.tolerance is not None
    return Scored(
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions if call.entropy else (0,), dtype=acc),
        torch.empty_like(hidden) if call.accumulate else hidden.new_empty(0),
        hidden.new_empty((*positions, tiles_of(weight, call)) if skip else (0,), dtype=torch.bool),
        hidden.new_empty(positions if skip else (0,), dtype=torch.float32),
        target.new_empty(weight.shape[0] if call.sort_vocab else 0),
        hidden.new_empty((positions[0] + 1) if skip else 0, dtype=torch.float32),
    )


def _score_setup(ctx: Any, t: Tensors, output: Sequence[Tensor]) -> int:
    found = Scored(*output)
    # The sum O becomes dX in place, so it is held once and given away; a second backward recomputes.
    ctx.accumulated = [found.accumulated] if ctx.call.accumulate else []
    ctx.report = found.report
    ctx.save_for_backward(
        t.hidden, t.bias, t.target, found.z_y, found.lse_other, found.h_o, found.active, found.left_out, found.order,
        *t.head.values(),
    )  # fmt: skip
    return 3 if ctx.call.entropy else 2


def _score_backward(ctx: Any, upstream: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    hidden, bias, target, z_y, lse_other, h_o, active, left_out, order, *rest = ctx.saved_tensors
    head = dict(zip(("weight", "more", "scales", "zeros"), rest))
    call: Call = ctx.call
    g_zy, g_lo = (torch.zeros_like(z_y) if g is None else g.contiguous() for g in upstream[:2])
    g_ho = upstream[2]
    made: dict[str, Tensor | None] = {}
    needs = set(ctx.needs)
    if "hidden" in needs and g_ho is None and ctx.accumulated:
        dhidden = ctx.accumulated.pop()
        if is_traced(dhidden):
            dhidden = dhidden.clone()
        finish_hidden_(dhidden, Tensors(target=target, z_y=z_y, g_zy=g_zy, g_lo=g_lo, **head), call)
        made["hidden"] = dhidden
        needs.discard("hidden")
    if needs:
        skip = call.tolerance is not None
        tensors = Tensors(
            hidden, bias=bias, target=target, z_y=z_y, lse_other=lse_other, h_o=h_o if call.entropy else None,
            g_zy=g_zy, g_lo=g_lo, g_ho=g_ho, active=active if skip else None, order=order if call.sort_vocab else None,
            **head,
        )  # fmt: skip
        asked = call._replace(needs=("hidden" in needs, "weight" in needs, "bias" in needs), needs_more="more" in needs)
        dhidden, dweight, dbias, dmore = _called_pull_back(tensors, asked)
        found = {"hidden": dhidden, "weight": dweight, "bias": dbias, "more": dmore}
        made.update({name: found[name] for name in needs})
    if len(ctx.report) and not is_traced(ctx.report):  # there it can't be filled in later
        _fill_in(ctx.report, target != call.ignore_index, active, left_out, g_zy, g_lo)
    return made


def _fill_in(report: Tensor, kept: Tensor, active: Tensor, left_out: Tensor, g_zy: Tensor, g_lo: Tensor) -> None:
    """What a backward left out, [P + 1], once the coefficients are known."""
    moved = counting(g_zy, g_lo) & kept
    report[:-1] = torch.where(moved, left_out * g_lo.abs(), 0)
    report[-1] = 1 - active[moved].sum() / (kept.sum() * active.shape[1]).clamp(min=1)


def counting(g_zy: Tensor, g_lo: Tensor) -> Tensor:
    """Rows with a gradient, bool [P]; NaN is one."""
    return (g_zy != 0) | (g_lo != 0)


_called_score = operator("score", _score, _score_fake, _score_setup, _score_backward)


def score(tensors: Tensors, call: Call) -> Scored:
    """The statistics of each position, differentiable in hidden, weight and bias."""
    return Scored(*_called_score(tensors, call))


def tiles_of(weight: Tensor, call: Call) -> int:
    """T."""
    return -(-weight.shape[0] // call.tile)


def in_order(p: Problem, kept: Kept) -> tuple[Problem, Tensor]:
    """The problem with the vocabulary in the order that lets most be left out, where that is asked for, and the order,
    int64 [V], else empty."""
    if not p.call.sort_vocab:
        return p, p.target.new_empty(0)
    if not kept.count:
        order: Tensor | None = torch.arange(p.vocab, device=p.target.device)
    elif p.workspace is not None:
        order = p.workspace.order(key_of(p), lambda: sampled_order(p, kept))
    else:
        order = sampled_order(p, kept)
    if order is None:
        return as_it_lies(p), torch.arange(p.vocab, device=p.target.device)
    return p.ordered(order), order.clone()


def as_it_lies(p: Problem) -> Problem:
    """The problem without copies of the weight, which only an order asks for."""
    strided = p.call.impl == "tiled" and p.weight.stride(1) != 1
    if p.weight.dtype != p.call.dtype or p.assembled or strided:
        return p
    return p._replace(call=p.call._replace(chunks=p.call.chunks._replace(converted=0)))


def key_of(p: Problem) -> tuple[Any, ...]:
    """What a workspace keeps an order of the vocabulary by."""
    return p.weight.device, tuple(p.weight.shape), p.call.tile, p.call.tolerance


def sampled_order(p: Problem, kept: Kept) -> Tensor:
    """`skipping.order_by_logits` of rows at even distances. int64 [V]"""
    room = max(1, p.call.chunks.sample_rows // skipping.SAMPLE_COPIES)
    rows = min(skipping.SAMPLE_ROWS, room, kept.count)
    some = torch.arange(rows, device=p.target.device) * (kept.count - 1) // max(rows - 1, 1)
    positions = some if kept.index is None else kept.index[some]
    # in memory of its own, which is given back before the call's buffers are taken
    products = Products(as_it_lies(p._replace(call=p.call._replace(impl="torch"), workspace=None)), rows)
    chunk = products.chunk(positions)
    z = TorchRows().logits(chunk)
    apply_(z, chunk.epilogue)
    return skipping.order_by_logits(z, p.call.tile)


def _finish_hidden_(accumulated: Tensor, t: Tensors, call: Call) -> None:
    """O → dX = g_lo · O + (g_zy + g_lo) · w_y in place, a few rows at a time. [P, H]

    The second term is 0 for a loss of p alone, so nothing of the rounding of O is blown up by a difference.
    """
    p = Problem.of(t._replace(hidden=accumulated), call)
    z_y, g_zy, g_lo = t.need("z_y", "g_zy", "g_lo")
    kept = p.target != call.ignore_index
    with p.running():
        rest = (g_zy + g_lo) * p.epilogue().jacobian(z_y)
        rest, g_lo = torch.where(kept, rest, 0)[:, None], torch.where(kept, g_lo, 0)[:, None]
        target = torch.where(kept, p.target, 0)
        step = max(1, min(1 << 24, call.workspace) // (4 * 8 * p.width))
        for rows in spans(len(target), step):
            dx = accumulated[rows].to(p.acc_dtype).mul_(g_lo[rows])
            w_y = p.assemble_(torch.empty_like(dx), target[rows])
            accumulated[rows] = dx.addcmul_(w_y, rest[rows])


@torch.library.custom_op(
    "rgpb::finish_hidden_", mutates_args=("accumulated",),
    schema="(Tensor(a!) accumulated, Tensor[] inputs, str call) -> ()",
)  # fmt: skip
def _dispatched_finish_hidden_(accumulated: Tensor, inputs: list[Tensor], text: str) -> None:
    call = Call.parse(text)
    _finish_hidden_(accumulated, Tensors.unpack(inputs, call), call)


def finish_hidden_(accumulated: Tensor, t: Tensors, call: Call) -> None:
    """`_finish_hidden_`, as an operator where somebody looks at them."""
    if is_intercepted(t._replace(hidden=accumulated)):
        _dispatched_finish_hidden_(accumulated, *t.pack(call))
    else:
        _finish_hidden_(accumulated, t, call)


# -- loss -------------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What `loss` returns; what isn't needed is empty.

    Attributes:
        loss: 0-d.
        z_y, lse_other, h_o: [P], with `Call.scored`.
        dhidden, dweight, dbias, dmore: [P, H], [V, H], [V], [V, r].
        report: float32 [P + 1], of skipping (`skipping.Skipped.read`).
    """

    loss: Tensor
    z_y: Tensor
    lse_other: Tensor
    h_o: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    dmore: Tensor
    report: Tensor


def _loss(tensors: Tensors, call: Call) -> Loss:
    """The loss and its gradients in one sweep: 3 units of work instead of 4, with a tolerance less.

    A chunk with more rows than the workspace holds is swept twice: for its statistics, then for its gradients.
    """
    p, objective = Problem.of(tensors, call), Coefficients(tensors, call)
    with p.running():
        kept, counts = read_rows(p, objective.asks)
        entropy, tile = objective.spec.entropy, call.tile or None
        p, _ = in_order(p, kept)
        report = p.hidden.new_zeros(len(p.target) + 1 if tile else 0, dtype=torch.float32)
        most, together = (max(1, rows) for rows in call.chunks.sweep_for(kept.count))
        statistics: Statistics | None = None
        dhidden = empty_rows(p, kept) if call.needs[0] else None
        products = Products(p, most, together)
        head = HeadSum(p, products, one_chunk=kept.count <= together)
        pairs: Tensor | int = 0  # a tensor as soon as there are any: nobody waits for it
        for rows, lengths, coefficients in objective.chunks(kept, most, together, counts):
            if isinstance(coefficients, TokenTerms):
                found, value, e, r = products.set.token_loss(products.chunk(rows), coefficients)
                objective.add(value.sum(dtype=torch.float64))
                statistics = filled(statistics, found, rows, p) if call.scored else None
                products.pull_back(rows, e, r, None, dhidden, head)
                continue
            blocks = split_rows(rows, most)
            # whose weights stay until the coefficients are known; of others only the statistics do
            stay = len(blocks) == 1 or (call.chunks.weighs and products.make_room(sum(map(length, blocks))))
            swept: list[tuple[Chunk, Tensor | None, Weighed]] = []
            for block in blocks:
                chunk = products.chunk(block, score_only=not stay)
                if stay:
                    found, masses, weighed = products.set.weigh(chunk, entropy, tile)
                    swept.append((chunk._replace(x=chunk.x[:0]), masses, weighed))
                else:
                    found, _ = products.set.score(chunk, entropy)
                statistics = filled(statistics, found, block, p)
            assert statistics is not None  # of a block at least
            upstream = coefficients(statistics.at(rows))
            largest = skipping.largest_of_response(upstream.g_lo, None if call.by_row else lengths)
            for at, (block, part) in enumerate(zip(blocks, spans(len(upstream.g_zy), most))):
                if stay:
                    chunk, masses, weighed = swept[at]
                else:
                    chunk = products.chunk(block)
                    found, masses, weighed = products.set.weigh(chunk, entropy, tile)
                active, given = None, (statistics.at(block), upstream.at(part))
                if masses is not None and call.tolerance is not None:
                    own = chunk.y // call.tile
                    active, bound = skipping.choose(masses, own, *given, largest[part], call.tolerance)
                    report[:-1][block] = bound
                    pairs += active.sum()
                e, r = products.set.pull_back(chunk, weighed, *given)
                products.pull_back(block, e, r, active, dhidden, head)
        products.multiply()
        if statistics is None or not call.scored:
            statistics = empty_statistics(p, entropy, len(p.target) if call.scored else 0)
        found_head = head.finished()
        if tile and kept.count:
            share = pairs / (kept.count * tiles_of(p.weight, call))
            report[-1] = 1 - share
            if p.workspace is not None and p.order is not None:
                p.workspace.measured(key_of(p), float(share))
    h_o = statistics.z_y.new_empty(0) if statistics.h_o is None else statistics.h_o
    made = (dhidden, *(found_head.get(name) for name in ("weight", "bias", "more")))
    gradients = [p.hidden.new_empty(0) if g is None else g for g in made]
    value = p.hidden.new_zeros(()) if objective.total is None else objective.total
    value = value.to(p.acc_dtype)
    return Loss(value, statistics.z_y, statistics.lse_other, h_o, *[*gradients, report])


def _loss_fake(t: Tensors, call: Call) -> Loss:
    hidden, weight, target = t.need("hidden", "weight", "target")
    positions = target.shape if call.scored else (0,)
    statistic = hidden.new_empty(positions, dtype=acc_dtype(call.weight_dtype(weight)))
    nothing = [hidden.new_empty(0) for _ in range(4)]
    need_hidden, need_weight, need_bias = call.needs
    return Loss(
        hidden.new_empty((), dtype=statistic.dtype),
        statistic,
        torch.empty_like(statistic),
        torch.empty_like(statistic) if resolve(call.objective).entropy else statistic.new_empty(0),
        torch.empty_like(hidden) if need_hidden else nothing[0],
        torch.empty_like(weight) if need_weight else nothing[1],
        hidden.new_empty(weight.shape[0], dtype=call.weight_dtype(weight)) if need_bias else nothing[2],
        torch.empty_like(t.more) if call.needs_more and t.more is not None else nothing[3],
        hidden.new_empty(target.shape[0] + 1 if call.tolerance is not None else 0, dtype=torch.float32),
    )


def _loss_setup(ctx: Any, t: Tensors, output: Sequence[Tensor]) -> int:
    ctx.gradients = list(output[4:8])  # given away in the backward: one copy of dweight is all there is
    ctx.save_for_backward(*t)
    return 1


def _loss_backward(ctx: Any, upstream: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    g = upstream[0]
    if g is None:
        return {}
    if not ctx.gradients:  # a second backward through the same graph
        ctx.gradients = list(_called_loss(Tensors(*ctx.saved_tensors), ctx.call)[4:8])
    made: dict[str, Tensor | None] = {}
    for name in ("hidden", "weight", "bias", "more"):
        gradient = ctx.gradients.pop(0)
        made[name] = _scale_(gradient, g, ctx.call.impl) if name in ctx.needs else None
    return made


def _scale_(gradient: Tensor, g: Tensor, impl: str) -> Tensor:
    """Times the upstream scalar: in place, with Triton and on a CPU not at all for the usual 1; out of place in a
    traced graph."""
    if is_traced(gradient):
        return gradient * g.to(gradient.dtype)
    if impl in ("triton", "tiled"):
        from rgpb.kernels.triton_scale import scale_  # only where Triton is

        return scale_(gradient, g)
    if devices.kind(gradient.device) == "cpu" and g.item() == 1:
        return gradient
    return gradient.mul_(g)


_called_loss = operator("loss", _loss, _loss_fake, _loss_setup, _loss_backward)


def loss(tensors: Tensors, call: Call) -> Loss:
    """The loss of a single pass, differentiable in hidden, weight and bias."""
    return Loss(*_called_loss(tensors, call))


# -- pull back --------------------------------------------------------------------------------------------------------


def _pull_back(t: Tensors, call: Call) -> list[Tensor]:
    """Gradients of hidden, weight, bias and more from recomputed logits, empty where not needed."""
    p = Problem.of(t, call)
    z_y, lse_other, g_zy, g_lo = t.need("z_y", "lse_other", "g_zy", "g_lo")
    statistics, upstream = Statistics(z_y, lse_other, t.h_o), Upstream(g_zy, g_lo, t.g_ho)
    need_hidden, need_weight, need_bias = call.needs
    dhidden = p.hidden.new_empty(0)
    head: dict[str, Tensor] = {}
    with p.running():
        kept = p.kept()
        if t.order is not None:
            p = p.ordered(t.order)
        if need_hidden:
            dhidden = hidden_gradient(p, kept, statistics, upstream, t.active)
        if need_weight or need_bias or call.needs_more:
            rows_of = None
            if t.active is not None:
                rows_of = skipping.rows_of_tiles(t.active & counting(g_zy, g_lo)[:, None])
            head = head_gradient(p, kept, statistics, upstream, rows_of)
    made = [head[name] if name in head else p.hidden.new_empty(0) for name in ("weight", "bias", "more")]
    return [dhidden, *made]


def _pull_back_fake(t: Tensors, call: Call) -> list[Tensor]:
    hidden, weight = t.need("hidden", "weight")
    need_hidden, need_weight, need_bias = call.needs
    return [
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        torch.empty_like(t.bias) if need_bias and t.bias is not None else hidden.new_empty(0),
        torch.empty_like(t.more) if call.needs_more and t.more is not None else hidden.new_empty(0),
    ]


_called_pull_back = operator("pull_back", _pull_back, _pull_back_fake)


def head_gradient(
    p: Problem, kept: Kept, statistics: Statistics, upstream: Upstream, rows_of: Callable[[int], Tensor] | None = None
) -> dict[str, Tensor]:
    """dW [V, H] and db [V], by name: logits again for a slice of V; each slice of dW is complete when it is left.

    Args:
        rows_of: positions that count for a tile of the vocabulary; default: all that are kept, for every slice.
    """
    vocab = p.vocab
    if not kept.count:
        zeros = {share.name: torch.zeros_like(share.like) for share in p.shares()}
        return zeros | ({"bias": p.hidden.new_zeros(vocab, dtype=p.weight_dtype)} if p.call.needs[2] else {})
    columns, rows, together = p.call.chunks.slice_for(kept.count)
    tile = vocab if rows_of is None else p.call.tile
    columns = min(columns, tile)
    sums = HeadSlices(p, columns, rows, together)
    for part in (
        slice(t.start + s.start, t.start + s.stop) for t in spans(vocab, tile) for s in spans(t.stop - t.start, columns)
    ):
        weight = p.weight_rows(part).to(p.call.dtype)
        chosen = None if rows_of is None else rows_of(part.start // tile)
        count = kept.count if chosen is None else len(chosen)
        dw, db = sums.room(part, count)
        apart, empty = sums.apart(len(weight)), True
        for span in chunk_spans(count, rows, together, p.call.chunks.even):
            some = kept.rows((span.start, span.stop)) if chosen is None else chosen[span]
            x, e, r = slice_of_rows(p, sums, some, part, weight, statistics, upstream, apart)
            if apart is not None:
                del x
                apart.add(some, r)
                if span.stop % together and span.stop < count:
                    continue
                some, e, r = apart.take()
                x = p.hidden[some].to(p.call.dtype)
            sums.add(dw, db, x, e, r, first=empty)
            empty = False
            del x  # the next rows are not held beside these
        sums.keep(part, count, dw, db)
        del weight, dw  # the next slice is not held beside this one
    return sums.finished()


def slice_of_rows(
    p: Problem, sums: HeadSlices, rows: Rows, part: slice, weight: Tensor, statistics: Statistics, upstream: Upstream,
    apart: Apart | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(x, E, r) of `rows` and a slice of V."""
    x = p.hidden[rows].to(p.call.dtype)
    out = None if apart is None else apart.hand(len(x))
    chunk = sums.chunk(x, p.target[rows], part, weight, out)
    return x, *sums.set.gradients(chunk, statistics.at(rows), upstream.at(rows))


def hidden_gradient(
    p: Problem, kept: Kept, statistics: Statistics, upstream: Upstream, active: Tensor | None = None
) -> Tensor:
    """dX [P, H] with the logits formed again: where H_o has a gradient, O alone doesn't give it."""
    dhidden = empty_rows(p, kept)
    rows, together = p.call.chunks.sweep_for(kept.count)
    products = Products(p, rows, together)
    for chunk in kept.chunks(rows, together, p.call.chunks.even):
        e, r = products.set.gradients(products.chunk(chunk), statistics.at(chunk), upstream.at(chunk))
        products.pull_back(chunk, e, r, None if active is None else active[chunk], dhidden, None)
    products.multiply()
    return dhidden
