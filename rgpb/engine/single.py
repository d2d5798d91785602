"""`rgpb::single_pass`: the loss and its gradients in one sweep, 3 units of work instead of 4.

A chunk of whole units (pairs or groups; or any tokens, where the objective couples none) is scored, the objective gives
its coefficients, and the logits at hand become gradients at once. The operator takes the objective by its registered
name, so that `torch.compile` sees a tensor function.

Dimensions: P positions, B responses, V vocabulary, H hidden size.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rgpb.engine import chunked
from rgpb.engine.plan import single_chunk
from rgpb.kernels.torch_rows import Statistics, Upstream
from rgpb.layout import Layout, Responses, TokenScores, tokens_of_each
from rgpb.logprob import is_traced, refuse_double_backward, token_scores
from rgpb.objectives import resolve, unit_values, units


def encode_options(options: dict[str, Any]) -> str:
    """Options of numbers, strings and booleans as one string, for the operator's signature."""
    return ",".join(f"{key!r}:{value!r}" for key, value in sorted(options.items()))


def encodable(options: dict[str, Any]) -> bool:
    """Whether `encode_options` can carry them: what a literal can say."""
    return all(
        type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)) for value in options.values()
    )


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Autograd on small tensors in an operator's body, which the dispatcher runs with the autograd keys off."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        # not through the caller's hooks: checkpointing would take these tensors for its own
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield


@torch.library.custom_op("rgpb::single_pass", mutates_args=())
def single_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lengths: Tensor, label: Tensor | None,
    ref_logp: Tensor | None, ref_log_odds: Tensor | None, ref_sums: Tensor | None, rewards: Tensor | None,
    group_size: int, objective: str, options: str, mean: bool,
    softcap: float | None, scale: float, ignore_index: int, workspace: int, compute_dtype: torch.dtype,
    impl: str, engine: str, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, z_y, lse_other, H_o, dhidden, dweight, dbias); what isn't needed is empty.

    lengths: int64 [B], positions per response; ref_*: [P] or [B]; rewards: float64 [B]; group_size: K, or 0 where there
    are no groups; mean: whether the loss is the units' mean or sum.
    """
    spec, chosen_options = resolve(objective), ast.literal_eval("{" + options + "}")
    problem = chunked.Problem(
        hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine
    )
    kept = chunked.Kept(target, ignore_index)
    chunked.check_rows(problem, kept)
    mask = target != ignore_index
    count = tokens_of_each(mask, lengths)
    total_units = units(spec, len(count), group_size)
    total = hidden.new_zeros((), dtype=torch.float64)

    def coefficients(rows: chunked.Rows, part: Layout, responses: Tensor | slice) -> Callable[[Statistics], Upstream]:
        def selected(x: Tensor | None, index: Any) -> Tensor | None:
            return None if x is None else x[index]

        ref = None
        if ref_logp is not None and ref_log_odds is not None:
            ref = TokenScores(ref_logp[rows], ref_log_odds[rows], torch.zeros_like(ref_logp[rows]))

        def of(statistics: Statistics) -> Upstream:
            def value(z_y: Tensor, lse_other: Tensor) -> Tensor:
                policy = token_scores(z_y, lse_other, statistics[2], mask=None, entropy=False)
                sums = selected(ref_sums, responses)
                if spec.couples == "token" and ref is not None:
                    sums = part.sum(ref.logp)  # of this chunk: parts have to add up
                seen = Responses(
                    policy, ref, sums, selected(label, responses), part, group_size or None,
                    selected(rewards, responses),
                )  # fmt: skip
                values = unit_values(spec, seen, chosen_options).sum()
                return values / total_units if mean else values

            with autograd_inside_operator():
                z_y, lse_other = (s.detach().requires_grad_() for s in statistics[:2])
                part_value = value(z_y, lse_other)
                g_zy, g_lo = torch.autograd.grad(
                    part_value, (z_y, lse_other), allow_unused=True, materialize_grads=True
                )
            total.add_(part_value.detach().double())
            return Upstream(g_zy, g_lo)

        return of

    in_kernel = None
    if spec.terms is not None and impl in ("triton", "cpp") and engine == "chunked":
        in_kernel = spec.terms(count, label, **chosen_options)

    def terms(known: tuple[str, Tensor], rows: chunked.Rows, inside: Tensor, tokens: int) -> chunked.TokenTerms:
        name, factor = known
        ref = None
        if ref_logp is not None and ref_log_odds is not None:
            ref = (ref_logp[rows].to(problem.acc_dtype), ref_log_odds[rows].to(problem.acc_dtype))
        factor = (factor / total_units if mean else factor).to(problem.acc_dtype)
        weight = torch.repeat_interleave(factor, inside, output_size=tokens)
        return chunked.TokenTerms(name, weight, ref, spec.entropy, lambda values: total.add_(values.double().sum()))

    def chunks() -> Iterator[tuple[chunked.Rows, Callable[[Statistics], Upstream] | chunked.TokenTerms]]:
        step, _ = single_chunk(problem.sizes, workspace, kept.count)
        ends = count.cumsum(0)
        if spec.couples == "token":
            for chunk in chunked.even_spans(kept.count, step):
                inside = ends.clamp(chunk.start, chunk.stop) - (ends - count).clamp(chunk.start, chunk.stop)
                rows = kept.rows((chunk.start, chunk.stop))
                if in_kernel is not None:
                    yield rows, terms(in_kernel, rows, inside, chunk.stop - chunk.start)
                    continue
                yield rows, coefficients(rows, Layout(len(count), inside, count, None), slice(None))
            return
        counts = count.tolist()
        end = [0, *accumulate(counts)]
        # a pair's responses lie one in each half, a group's K in a row
        starts, width = ([0, total_units], 1) if spec.unit == "pair" else ([0], group_size)
        for first, last in pack_units(counts, starts, width, step):
            runs = [(start + first * width, start + last * width) for start in starts]
            rows = kept.rows(*((end[a], end[b]) for a, b in runs))
            members = torch.cat([torch.arange(a, b, device=count.device) for a, b in runs])
            whole = Layout(len(members), count[members], count[members], None)
            yield rows, coefficients(rows, whole, members)

    need = (need_hidden, need_weight, need_bias)
    with problem.running():
        statistics, *gradients = chunked.single_pass(problem, chunks(), kept, need, spec.entropy)
    z_y, lse_other, h_o = statistics
    made = [hidden.new_empty(0) if g is None else g for g in gradients]
    return total.to(z_y.dtype), z_y, lse_other, z_y.new_empty(0) if h_o is None else h_o, *made  # type: ignore[return-value]


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


@single_pass.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, lengths, label, ref_logp, ref_log_odds, ref_sums, rewards, group_size, objective,
    options, mean, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    statistic = hidden.new_empty(target.shape, dtype=acc)
    return (
        hidden.new_empty((), dtype=acc),
        statistic,
        torch.empty_like(statistic),
        torch.empty_like(statistic) if resolve(objective).entropy else statistic.new_empty(0),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_bias else hidden.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.gradients = list(output[4:])  # given away in the backward: one copy of dweight is all there is
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Any, ...]:
    refuse_double_backward()
    needs = ctx.needs_input_grad[:3]
    if g is None:
        return (None,) * 24
    if not ctx.gradients:  # a second backward through the same graph
        ctx.gradients = list(torch.ops.rgpb.single_pass(*ctx.saved_tensors, *ctx.options)[4:])
    made = []
    while ctx.gradients:
        made.append(_scale_(ctx.gradients.pop(0), g))
    return *[x if need else None for x, need in zip(made, needs)], *[None] * 21


def _scale_(gradient: Tensor, g: Tensor) -> Tensor:
    """Times the upstream scalar: in place, on a CPU not at all for the usual 1; out of place in a traced graph."""
    if is_traced(gradient):
        return gradient * g.to(gradient.dtype)
    if gradient.device.type == "cpu" and g.item() == 1:
        return gradient
    return gradient.mul_(g)


single_pass.register_autograd(_backward, setup_context=_setup)
