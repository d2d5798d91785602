"""The head as its module holds it at the moment: what the engine multiplies with, and where gradients go.

Dimensions: V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.head import FLOATS, described


class HeadView(NamedTuple):
    """The linear part of a head, z = W x + b, read inside its module's forward.

    Attributes:
        weight: [V, H]; gradients of it reach the parameters.
        bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None


def view(head: nn.Module, model: PreTrainedModel) -> HeadView:
    """Read a head.

    Args:
        head: the module, inside any wrapper of its own.
        model: what it belongs to.

    Raises:
        ValueError: a module or a weight that isn't known, by name.
    """
    weight, bias = _linear(head, described(model))
    final = getattr(model, "final_logits_bias", None)  # BART and its relatives: a buffer [1, V]
    if final is not None:
        final = final.to(weight).view(-1)
        bias = final if bias is None else bias + final
    return HeadView(weight, bias)


def _linear(head: nn.Module, name: str) -> HeadView:
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:  # also where FSDP gave it a class
        weight: Any = head.weight
        if type(weight) in (nn.Parameter, Tensor):
            return _checked(weight, head.bias, name)
    found, weight = f"{type(head).__module__}.{described(head)}", getattr(head, "weight", None)
    held = "" if weight is None else f" with a weight of type {type(weight).__name__}"
    raise ValueError(f"model: expected a plain nn.Linear as head of {name}, got {found}{held}")


def _checked(weight: Tensor, bias: Tensor | None, name: str) -> HeadView:
    if weight.dtype not in FLOATS or weight.dim() != 2 or weight.is_meta:
        found = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"model: expected a float weight [V, H] on a device as head of {name}, got {found}")
    return HeadView(weight, bias)
