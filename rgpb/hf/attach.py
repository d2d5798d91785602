"""The loss inside a model's own forward, so that whatever wraps the model acts on it: DDP, FSDP, ZeRO, autocast, PEFT.

An attached model's forward takes one more argument, `rgpb=`, a `Step`. It runs as ever up to the head. There the head's
own forward, after its hooks have gathered, moved or cast its weights, runs the step on its input instead of making
logits. What the model gets from its head are logits of no position. They carry the step's results through all hooks:
in the backward the gradient passes these first, so each wrapper has its weights in place again.

Dimensions: B responses, T positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rgpb.head import described
from rgpb.hf.sharded import placed_as, whole_output
from rgpb.hf.wrappers import innermost


@dataclass
class Results(ModelOutput):
    """What an attached forward returns of a step.

    Attributes:
        loss: [] or [U]; PEFT adds its own terms to what has this name.
        tensors: further results that may have a gradient.
        aux_loss: the model's own auxiliary loss (of a router), not yet in `loss`.
    """

    loss: Tensor | None = None
    tensors: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class Step:
    """What is done with a head's input, once a forward.

    Wrappers of the model don't look into it, so none casts or moves its tensors.

    Args:
        run: (head module, its input [B, T, H]) → results; what has a gradient is its `loss` or among its `tensors`.
    """

    def __init__(self, run: Callable[[nn.Module, Tensor], Results]):
        self.run = run
        self.results: Results | None = None

    @torch.compiler.disable
    def inside(self, head: nn.Module, x: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Run it; returns logits of no position, [B, 0, V], that the results' gradients depend on.

        logits: the head's own forward.
        """
        if self.results is not None:
            raise ValueError(f"model: expected a forward that calls its head once, got two calls of {described(head)}")
        self.results = self.run(head, x)
        local: Any = x.to_local() if hasattr(x, "to_local") else x
        carried = local.new_zeros(())
        for result in (self.results.loss, *(self.results.tensors or ())):
            if result is not None and result.requires_grad:
                carried = carried + result.reshape(-1)[:1].sum().to(carried.dtype)
        return placed_as(x, carried.expand(*x.shape[:-2], 0, 1).clone())  # FSDP warns of a view


class HeadForward:
    """A head's forward while its model is attached; an object, so that it is copied and pickled with the head.

    Attributes:
        head, forward: the module, and its forward as it was.
        step: what runs in its place at the moment.
    """

    def __init__(self, head: nn.Module, forward: Callable[..., Any]):
        self.head, self.forward = head, forward
        self.step: Step | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.step is None:
            return self.forward(x, *args, **kwargs)
        if kwargs:
            raise ValueError(f"batch: expected nothing that acts on the head itself, got {', '.join(sorted(kwargs))}")
        return self.step.inside(self.head, x, self.forward)


class Attached:
    """What is known of an attached model. It holds nothing of the model, which is copied without its copies.

    Attributes:
        sync_elsewhere: see `rgpb.hf.attach`.
        passed: what has been found out about the model, so that each check runs once.
    """

    def __init__(self) -> None:
        self.sync_elsewhere = False
        self.passed: dict[Any, Any] = {}


def through(model: PreTrainedModel, step: Step, call: Callable[[], Any]) -> Any:
    """What `call` of the model gives, with the step in its head's place."""
    held = head_forward(model)
    held.step, step.results = step, None
    try:
        return call()
    finally:
        held.step = None


def run(model: PreTrainedModel, step: Step, call: Callable[[], Any]) -> Results:
    """A step's results, in the graph behind the hooks of whatever wraps the head."""
    output = through(model, step, call)
    results = step.results
    if results is None:
        raise ValueError(f"model: expected a forward that calls its head, got none in {described(model)}")
    nothing = whole_output(output["logits"]).sum()  # of no position: exactly 0

    def behind(x: Tensor) -> Tensor:
        return x + nothing.to(x.dtype) if x.requires_grad else x

    return Results(
        loss=None if results.loss is None else behind(results.loss),
        tensors=None if results.tensors is None else tuple(behind(x) for x in results.tensors),
        aux_loss=output.get("aux_loss"),
    )


def head_forward(model: PreTrainedModel) -> HeadForward:
    """Our forward in the place of the head's, wherever the head is now."""
    found = model.get_output_embeddings()
    if found is None:
        raise ValueError(f"model: expected an LM head, got none in {described(model)}")
    head: Any = innermost(found)
    # accelerate's hook for offloaded weights stands in `forward` and calls what it keeps as `_old_forward`
    for place in ("forward", "_old_forward"):
        if isinstance(held := head.__dict__.get(place), HeadForward):
            return held
    place = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    held = HeadForward(head, getattr(head, place))
    setattr(head, place, held)
    return held


def _taking_step(function: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """A model's forward that also takes `rgpb=`. Its signature, which Trainer reads, stays.

    layer: where the model keeps the forward that it stands for.
    """

    @functools.wraps(function)
    def forward(self: Any, *args: Any, rgpb: Step | None = None, **kwargs: Any) -> Any:
        before = self.__dict__["_rgpb_forwards"][layer]
        return before(*args, **kwargs) if rgpb is None else _run(self, rgpb, functools.partial(before, **kwargs))

    forward._rgpb = True  # type: ignore[attr-defined]
    return forward


@functools.partial(torch.compiler.disable, recursive=False)  # the model inside is compiled, frame by frame
def _run(model: Any, step: Step, call: Callable[[], Any]) -> Results:
    return run(model, step, call)


def install(model: PreTrainedModel) -> Attached:
    """Let a model's forward take `rgpb=`. One that does stays as it is."""
    attached: Attached = model.__dict__.setdefault("_rgpb", Attached())
    if not _leads_here(model.forward):  # also where accelerate took wrappers off, and what is below them
        forwards = model.__dict__.setdefault("_rgpb_forwards", [])
        forwards.append(model.forward)
        function = getattr(model.forward, "__func__", model.forward)
        model.forward = MethodType(_taking_step(function, len(forwards) - 1), model)
    return attached


def _leads_here(method: Any) -> bool:
    while method is not None:
        function = getattr(method, "__func__", method)
        if getattr(function, "_rgpb", False):
            return True
        method = getattr(function, "__wrapped__", None)
    return False
