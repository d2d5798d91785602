"""One form for every operator: `rgpb::name(Tensor[] inputs, str call) -> Tensor[]`.

The call names the inputs (`Call.given`), so schema, fake implementation and autograd are written once, here. An
operator is what it runs, what its results look like, and, where it has a gradient, what to save and how to pull back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgpb.engine.call import Call, Tensors

SCHEMA = "(Tensor[] inputs, str call) -> Tensor[]"


def operator(
    name: str,
    run: Callable[[Tensors, Call], Sequence[Tensor]],
    fake: Callable[[Tensors, Call], Sequence[Tensor]],
    setup: Callable[[Any, Tensors, Sequence[Tensor]], int] | None = None,
    backward: Callable[[Any, Sequence[Tensor | None]], dict[str, Tensor | None]] | None = None,
) -> None:
    """Register `rgpb::name`.

    Args:
        run: tensors and call → results, none of which may be a view of an input.
        fake: the same in shapes and dtypes alone.
        setup: saves what the backward needs on the context, whose `call` is set; returns how many of the results, from
            the first, have a gradient.
        backward: upstream gradients of the results (None where there is none) → those of the inputs, by name.
            `ctx.needs` has the names of the inputs that need one.
    """

    def split(inputs: list[Tensor], text: str) -> tuple[Tensors, Call]:
        call = Call.parse(text)
        return Tensors.unpack(inputs, call), call

    made = torch.library.custom_op(
        f"rgpb::{name}", lambda inputs, call: list(run(*split(inputs, call))), mutates_args=(), schema=SCHEMA
    )
    made.register_fake(lambda inputs, call: list(fake(*split(inputs, call))))
    if setup is None or backward is None:
        return

    def set_up(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        tensors, ctx.call = split(*inputs)
        ctx.mark_non_differentiable(*output[setup(ctx, tensors, output) :])

    def pull_back(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "rgpb: second derivatives are not available (create_graph=True was given); "
                "use rgpb.reference for a dense form that has them"
            )
        given = ctx.call.given
        ctx.needs = {name for name, need in zip(given, ctx.needs_input_grad[0]) if need}
        gradients = backward(ctx, upstream)
        return [gradients.get(name) if name in ctx.needs else None for name in given], None

    made.register_autograd(pull_back, setup_context=set_up)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler records the operations: what was returned must then not change in place."""
    return type(x) not in (Tensor, nn.Parameter)
