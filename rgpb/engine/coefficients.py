"""What an objective says of a chunk: the coefficients of its tokens, ∂L/∂z_y and ∂L/∂lse_other.

A chunk holds whole units (pairs or groups), or any tokens where the objective couples none. Its value is summed up on
the way, so the loss is there when the last chunk is.

Dimensions: P positions, B responses, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rgpb.engine.call import Call, Tensors
from rgpb.engine.products import Kept, Rows, chunk_spans
from rgpb.kernels import kernel_set
from rgpb.kernels.types import Statistics, TokenTerms, Upstream, acc_dtype
from rgpb.layout import Layout, Responses, TokenScores, token_scores
from rgpb.objectives import resolve, unit_values, units


class Coefficients:
    """The objective of a single pass, chunk by chunk.

    Attributes:
        total: the loss so far, float64 0-d; None before the first chunk.
        asks: tokens of each response, int64 [B], where chunks are made of whole units; they are wanted on the host.
    """

    def __init__(self, tensors: Tensors, call: Call):
        weight, self.count = tensors.need("weight", "tokens")
        self.t, self.call, self.spec, self.options = tensors, call, resolve(call.objective), dict(call.options)
        self.units = units(self.spec, len(self.count), call.group_size)
        self.total: Tensor | None = None
        self.asks = None if self.spec.couples == "token" else self.count
        self.acc_dtype = acc_dtype(call.weight_dtype(weight))

    def add(self, value: Tensor) -> None:
        """Of a chunk to the loss, float64 0-d."""
        self.total = value if self.total is None else self.total + value

    def chunks(
        self, kept: Kept, rows: int, together: int, counts: list[int]
    ) -> Iterator[tuple[Rows, Tensor, Callable[[Statistics], Upstream] | TokenTerms]]:
        """Rows of a chunk, or of units, how many of them are of one response, and what turns their statistics into
        coefficients, or, where the kernel set has it and nothing is skipped, the loss itself.

        Units come in as many as fit a chunk, or, where sweeps leave weights, as are multiplied together; a longer one
        by itself. counts: what `asks`, or nothing.
        """
        if self.asks is not None:
            yield from self._units(kept, together if self.call.chunks.weighs else rows, counts)
            return
        own = None
        if self.spec.terms is not None:
            own = self.spec.terms(self.count, self.t.label, **self.options)
        known = kernel_set(self.call.impl).token_losses if self.call.tolerance is None else ()
        in_kernel = own if own is not None and own[0] in known else None
        ends = None
        for chunk in chunk_spans(kept.count, rows, together, self.call.chunks.even):
            inside = self.count
            if chunk != slice(0, kept.count):
                ends = self.count.cumsum(0) if ends is None else ends
                inside = ends.clamp(chunk.start, chunk.stop) - (ends - self.count).clamp(chunk.start, chunk.stop)
            positions = kept.rows((chunk.start, chunk.stop))
            if in_kernel is not None:
                yield positions, inside, self._terms(in_kernel, positions, inside, chunk.stop - chunk.start)
            else:
                whole = Layout(len(self.count), inside, self.count, None, positions=chunk.stop - chunk.start)
                yield positions, inside, self._of(positions, whole, [slice(None)])

    def _units(
        self, kept: Kept, rows: int, counts: list[int]
    ) -> Iterator[tuple[Rows, Tensor, Callable[[Statistics], Upstream]]]:
        """Whole pairs or groups."""
        end = [0, *accumulate(counts)]
        # a pair's responses lie one in each half, a group's K in a row
        starts, width = ([0, self.units], 1) if self.spec.unit == "pair" else ([0], self.call.group_size)
        for first, last in pack_units(counts, starts, width, rows):
            runs = [slice(start + first * width, start + last * width) for start in starts]
            runs = [slice(None)] if (first, last) == (0, self.units) else runs
            count = picked(self.count, runs)
            inside = [(end[run.start or 0], end[-1 if run.stop is None else run.stop]) for run in runs]
            whole = Layout(len(count), count, count, None, positions=sum(stop - start for start, stop in inside))
            positions = kept.rows(*inside)
            yield positions, count, self._of(positions, whole, runs)

    def _of(self, rows: Rows, part: Layout, responses: list[slice]) -> Callable[[Statistics], Upstream]:
        """The objective of some responses' tokens, `rows`, laid out as `part`."""
        t, spec = self.t, self.spec
        ref = None
        if t.ref_logp is not None and t.ref_log_odds is not None:
            logp = t.ref_logp[rows]
            ref = TokenScores(logp, t.ref_log_odds[rows], torch.zeros_like(logp))

        def selected(x: Tensor | None) -> Tensor | None:
            return None if x is None else picked(x, responses)

        def value(z_y: Tensor, lse_other: Tensor, h_o: Tensor | None) -> Tensor:
            policy = token_scores(z_y, lse_other, h_o, mask=None, entropy=False)
            seen = Responses(
                policy, ref, selected(t.ref_sums), selected(t.label), part, self.call.group_size or None,
                selected(t.rewards),
            )  # fmt: skip
            values = unit_values(spec, seen, self.options).sum()
            return values / self.units if self.call.mean else values

        def coefficients(statistics: Statistics) -> Upstream:
            with autograd_inside_operator():
                z_y, lse_other = (s.detach().requires_grad_() for s in statistics[:2])
                part_value = value(z_y, lse_other, statistics.h_o)
                g_zy, g_lo = torch.autograd.grad(
                    part_value, (z_y, lse_other), allow_unused=True, materialize_grads=True
                )
            self.add(part_value.detach().double())
            return Upstream(g_zy, g_lo)

        return coefficients

    def _terms(self, known: tuple[str, Tensor], rows: Rows, inside: Tensor, tokens: int) -> TokenTerms:
        """The loss of `rows` for a kernel that has it; `inside`: how many of them are each response's, [B]."""
        name, factor = known
        ref = None
        if self.t.ref_logp is not None and self.t.ref_log_odds is not None:
            ref = self.t.ref_logp[rows].to(self.acc_dtype), self.t.ref_log_odds[rows].to(self.acc_dtype)
        # divided as float64, and rounded as it is written
        factor = torch.div(factor, self.units if self.call.mean else 1, out=factor.new_empty(0, dtype=self.acc_dtype))
        if self.call.validate:
            factor = torch.repeat_interleave(factor, inside, output_size=tokens)
        else:
            factor = self._of_positions(factor)[rows]
        return TokenTerms(name, factor, ref, self.spec.entropy)

    def _of_positions(self, factor: Tensor) -> Tensor:
        """Each response's factor at all its positions, 0 at ignored ones, without knowing how many those are. [P]"""
        target = self.t.need("target")[0]
        kept = target != self.call.ignore_index
        response = torch.searchsorted(self.count.cumsum(0), kept.cumsum(0))
        return torch.where(kept, factor[response], 0)


def picked(x: Tensor, runs: list[slice]) -> Tensor:
    """The entries of `x` in the runs, one after the other."""
    return x[runs[0]] if len(runs) == 1 else torch.cat([x[run] for run in runs])


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Autograd on small tensors in an operator's body, which the dispatcher runs with the autograd keys off."""
    keys: Any = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        # not through the caller's hooks: checkpointing would take these tensors for its own; and detached, since a node
        # that holds its own output is never freed where no backward comes to it
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None:  # else the caller has none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x))
        yield


def pack_units(counts: list[int], starts: list[int], width: int, step: int) -> Iterator[tuple[int, int]]:
    """Runs of whole units of at most `step` tokens; a longer unit is a run of its own.

    Unit u has `width` responses from each of `starts` + u · width; `counts` are the tokens of the B responses.
    """
    units = len(counts) // (len(starts) * width)
    first = tokens = 0
    for unit in range(units):
        more = sum(sum(counts[start + unit * width : start + (unit + 1) * width]) for start in starts)
        if tokens and tokens + more > step:
            yield first, unit
            first, tokens = unit, 0
        tokens += more
    if tokens:
        yield first, units
