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
        carried = x.new_zeros(())
        for result in (self.results.loss, *(self.results.tensors or ())):
            if result is not None and result.requires_grad:
                carried = carried + result.reshape(-1)[:1].sum().to(x.dtype)
        return carried.expand(*x.shape[:-2], 0, 1).clone()  # FSDP warns of a view


class Attached:
    """What an attached model keeps.

    Attributes:
        forward: the model's, as it was.
        sync_elsewhere: see `rgpb.hf.attach`.
        passed: what has been found out about the model, so that each check runs once.
        step: the one under way.
        head, head_forward: the head's module, and its forward as it was.
    """

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward
        self.sync_elsewhere = False
        self.passed: dict[Any, Any] = {}
        self.step: Step | None = None
        self.head: nn.Module | None = None
        self.head_forward: Callable[..., Any] | None = None

    def through(self, model: PreTrainedModel, step: Step, kwargs: dict[str, Any]) -> Any:
        """The output of the model's own forward, with the step in its head's place."""
        self.take(model)
        self.step, step.results = step, None
        try:
            return self.forward(**kwargs)
        finally:
            self.step = None

    def run(self, model: PreTrainedModel, step: Step, kwargs: dict[str, Any]) -> Results:
        """A step's results, in the graph behind the hooks of whatever wraps the head."""
        output = self.through(model, step, kwargs)
        results = step.results
        if results is None:
            raise ValueError(f"model: expected a forward that calls its head, got none in {described(model)}")
        nothing = output["logits"].sum()  # of no position: exactly 0

        def behind(x: Tensor) -> Tensor:
            return x + nothing.to(x.dtype) if x.requires_grad else x

        return Results(
            loss=None if results.loss is None else behind(results.loss),
            tensors=None if results.tensors is None else tuple(behind(x) for x in results.tensors),
            aux_loss=output.get("aux_loss"),
        )

    def take(self, model: PreTrainedModel) -> nn.Module:
        """Put our forward in the place of the head's, wherever the head is now; returns the head's module."""
        found = model.get_output_embeddings()
        if found is None:
            raise ValueError(f"model: expected an LM head, got none in {described(model)}")
        head: nn.Module = innermost(found)
        before = None if self.head is None else _placed(self.head)
        if self.head is head and before is not None:
            return head
        if self.head is not None and before is not None:
            setattr(self.head, before, self.head_forward)
        # accelerate's hook for offloaded weights stands in `forward` and calls what it keeps as `_old_forward`
        place = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        self.head, self.head_forward = head, getattr(head, place)
        head.__dict__["_rgpb"] = self
        setattr(head, place, MethodType(forward, head))
        return head


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A head's, while it is attached; by this name, so that a pickled head has its own again."""
    attached: Attached = self.__dict__["_rgpb"]
    assert attached.head_forward is not None
    if attached.step is None:
        return attached.head_forward(x, *args, **kwargs)
    if kwargs:
        raise ValueError(f"batch: expected nothing that acts on the head itself, got {', '.join(sorted(kwargs))}")
    return attached.step.inside(self, x, attached.head_forward)


def _placed(head: nn.Module) -> str | None:
    """Where our forward stands in a head."""
    for place in ("forward", "_old_forward"):
        if getattr(head.__dict__.get(place), "__func__", None) is forward:
            return place
    return None


def _taking_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that also takes `rgpb=`. Its signature, which Trainer reads, stays."""

    @functools.wraps(function)
    def forward(self: Any, *args: Any, rgpb: Step | None = None, **kwargs: Any) -> Any:
        attached: Attached = self.__dict__["_rgpb"]
        return attached.forward(*args, **kwargs) if rgpb is None else _run(attached, self, rgpb, kwargs)

    forward._rgpb = True  # type: ignore[attr-defined]
    return forward


@functools.partial(torch.compiler.disable, recursive=False)  # the model inside is compiled, frame by frame
def _run(attached: Attached, model: Any, step: Step, kwargs: dict[str, Any]) -> Results:
    return attached.run(model, step, kwargs)


def attached_to(model: PreTrainedModel) -> Attached | None:
    """What `install` made of a model, if its forward still leads there: accelerate takes wrappers of it off."""
    method: Any = model.forward
    while method is not None:
        function = getattr(method, "__func__", method)
        if getattr(function, "_rgpb", False):
            return model.__dict__["_rgpb"]
        method = getattr(function, "__wrapped__", None)
    return None


def install(model: PreTrainedModel) -> Attached:
    """Let a model's forward take `rgpb=`. One that does stays as it is."""
    found = attached_to(model)
    if found is None:
        found = Attached(model.forward)
        model.__dict__["_rgpb"] = found
        model.forward = MethodType(_taking_step(getattr(model.forward, "__func__", model.forward)), model)
    return found
