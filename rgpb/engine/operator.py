"""One form for every operator: `rgpb::name(Tensor[] inputs, str call) -> Tensor[]`.

The call names the inputs (`Call.given`), so schema, fake implementation and autograd are written once, here. An
operator is what it runs, what its results look like, and, where it has a gradient, what to save and how to pull back.
Where nobody records or intercepts operators, the same functions run without the dispatcher: that saves a small call
half of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgpb.engine.call import Call, Tensors

SCHEMA = "(Tensor[] inputs, str call) -> Tensor[]"
# What autograd's own vmap and that of torch.func mark their tensors with.
BATCHED = [torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched")]


def operator(
    name: str,
    run: Callable[[Tensors, Call], Sequence[Tensor]],
    fake: Callable[[Tensors, Call], Sequence[Tensor]],
    setup: Callable[[Any, Tensors, Sequence[Tensor]], int] | None = None,
    backward: Callable[[Any, Sequence[Tensor | None]], dict[str, Tensor | None]] | None = None,
) -> Callable[[Tensors, Call], Sequence[Tensor]]:
    """Register `rgpb::name`; returns what calls it.

    Args:
        run: tensors and call → results, none of which may be a view of an input.
        fake: the same in shapes and dtypes alone.
        setup: saves what the backward needs on the context, whose `call` is set; returns how many of the results, from
            the first, have a gradient.
        backward: upstream gradients of the results (None where there is none) → those of the inputs, by name.
            `ctx.needs` has the names of the inputs that need one.
    """

    def split(inputs: Sequence[Tensor], text: str) -> tuple[Tensors, Call]:
        call = Call.parse(text)
        return Tensors.unpack(inputs, call), call

    made = torch.library.custom_op(
        f"rgpb::{name}", lambda inputs, call: list(run(*split(inputs, call))), mutates_args=(), schema=SCHEMA
    )
    made.register_fake(lambda inputs, call: list(fake(*split(inputs, call))))

    def dispatched(tensors: Tensors, call: Call) -> Sequence[Tensor]:
        return made(*tensors.pack(call))

    if setup is None or backward is None:
        return lambda tensors, call: (dispatched if is_intercepted(tensors) else run)(tensors, call)

    def save(ctx: Any, tensors: Tensors, call: Call, output: Sequence[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.mark_non_differentiable(*output[setup(ctx, tensors, output) :])

    def gradients(ctx: Any, upstream: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "rgpb: second derivatives are not available (create_graph=True was given); "
                "use rgpb.reference for a dense form that has them"
            )
        if any(is_batched(g) for g in upstream if g is not None):
            raise RuntimeError(
                "rgpb: several gradients at once are not available (is_grads_batched, vectorize or vmap was given); "
                "ask for one after the other, or use rgpb.reference for a dense form that has them"
            )
        given = ctx.call.given
        ctx.needs = {name for name, need in zip(given, needed) if need}
        found = backward(ctx, upstream)
        return [found.get(name) if name in ctx.needs else None for name in given]

    made.register_autograd(
        lambda ctx, upstream: (gradients(ctx, upstream, ctx.needs_input_grad[0]), None),
        setup_context=lambda ctx, inputs, output: save(ctx, *split(*inputs), output),
    )

    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = Tensors.unpack(inputs, call)
        output = tuple(run(tensors, call))
        save(ctx, tensors, call, output)
        return output

    def pull_back(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients(ctx, upstream, ctx.needs_input_grad[1:])

    methods = {"forward": staticmethod(forward), "backward": staticmethod(pull_back)}
    direct: Any = type(f"rgpb_{name}", (torch.autograd.Function,), methods)

    def called(tensors: Tensors, call: Call) -> Sequence[Tensor]:
        if is_intercepted(tensors):
            return dispatched(tensors, call)
        call = call._replace(given=tensors.given)
        inputs = tensors.present
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return direct.apply(call, *inputs)
        return run(tensors, call)

    return called


def is_batched(x: Tensor) -> bool:
    """Whether it stands for several tensors, which kernels can't read."""
    if torch.compiler.is_compiling():
        return False
    found = torch._C._dispatch_keys(x)
    return any(found.has(key) for key in BATCHED)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler records the operations: what was returned must then not change in place."""
    return type(x) not in (Tensor, nn.Parameter)


def is_intercepted(tensors: Tensors) -> bool:
    """Whether somebody looks at the operators: a compiler, a tracer, a dispatch mode, a tensor of another type."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return True
    return any(is_traced(x) for x in tensors.present)
