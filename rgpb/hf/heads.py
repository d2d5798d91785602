"""The head as its module holds it at the moment: what the engine multiplies with, and where gradients go.

| the head is                       | what is multiplied                                                               |
|-----------------------------------|----------------------------------------------------------------------------------|
| `nn.Linear`                       | its weight                                                                       |
| with LoRA                         | [W, B₁, …] with [x, s₁ A₁ drop(x), …], columns beside W: W is never copied       |
| with DoRA                         | the same times m / ‖W + s B A‖, row by row: a copy of W a call, and all of dW    |
| with trainable tokens             | W with those rows replaced: the same cost; PEFT itself pays the copy, too        |
| in PEFT's `modules_to_save`       | the active copy, or the original where adapters are disabled                     |
| quantised (torchao, bitsandbytes) | floats of a slice at a time; frozen                                              |
| held by FSDP in another unit      | gathered once a call                                                             |
| split by tensor parallelism       | a rank's own rows, as a `VocabShard`                                             |

Everything else is refused by name. PEFT, torchao and bitsandbytes are known by their classes' names, never imported.

Dimensions: V vocabulary, H hidden size, r columns of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.engine.stored import rows_of
from rgpb.head import FLOATS, HeadWeight, described
from rgpb.hf.quantised import quantised
from rgpb.hf.sharded import gathered, vocab_shard, whole_input
from rgpb.hf.wrappers import innermost
from rgpb.parallel import VocabShard

_LORA = {f"peft.tuners.lora.{name}" for name in ("layer.Linear", "bnb.Linear8bitLt", "bnb.Linear4bit")}
_SAVED, _TOKENS = "peft.utils.other.ModulesToSaveWrapper", "peft.utils.other.TrainableTokensWrapper"
_TOKENS_LAYER = "peft.tuners.trainable_tokens.layer.TrainableTokensLayer"
_DORA = "peft.tuners.lora.variants.DoraLinearVariant"
# Rows of W + s B A whose norms are taken at a time
_NORM_ROWS = 4096


def _as_it_is(x: Tensor) -> Tensor:
    return x


class HeadView(NamedTuple):
    """The linear part of a head, z = W x + b, read inside its module's forward.

    Attributes:
        weight: [V, H], or a `HeadWeight`; gradients of it reach the parameters.
        bias: [V] or None.
        widen: from the module's input to what the weight is multiplied with: with LoRA H + r columns.
        shard: which rows of the whole head these are, where tensor parallelism splits it.
    """

    weight: Any
    bias: Tensor | None
    widen: Callable[[Tensor], Tensor] = _as_it_is
    shard: VocabShard | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, in its dtype; under autocast in whichever it has."""
        x = whole_input(x)
        if torch.is_autocast_enabled(x.device.type):
            return self.widen(x)
        return self.widen(x).to(self.weight.dtype)  # Mamba returns float32 for a head of 16 bits, and casts

    def logits(self, x: Tensor) -> Tensor:
        """W x + b of a few inputs. [..., V]"""
        if isinstance(self.weight, Tensor):
            return nn.functional.linear(x, self.weight, self.bias)
        parts = [nn.functional.linear(x, rows) for rows in rows_of(self.weight, _NORM_ROWS)]
        z = torch.cat(parts, dim=-1)
        return z if self.bias is None else z + self.bias


def view(head: nn.Module, model: PreTrainedModel) -> HeadView:
    """Read a head.

    Args:
        head: the module, inside any wrapper of its own.
        model: what it belongs to.

    Raises:
        ValueError: a module or a weight that isn't known, by name.
    """
    held = _read(head, model)
    bias, final = held.bias, getattr(model, "final_logits_bias", None)  # BART and its relatives: a buffer [1, V]
    if final is not None:
        final = final.to(device=held.weight.device, dtype=held.weight.dtype).view(-1)
        bias = final if bias is None else bias + final
    return held._replace(bias=bias)


def state(head: nn.Module) -> tuple[Any, ...]:
    """What decides how `view` reads a head, as something that compares."""
    told = []
    for module in head.modules():
        layer: Any = module
        variants = [(name, type(layer.lora_variant.get(name)).__name__) for name in getattr(layer, "lora_A", ())]
        active, merged = getattr(layer, "active_adapters", ()), getattr(layer, "merged_adapters", ())
        told.append(
            (type(layer).forward, getattr(layer, "_disable_adapters", None), *map(tuple, (active, merged, variants)))
        )
    return tuple(told)


@contextmanager
def without_adapters(head: nn.Module) -> Iterator[bool]:
    """Adapters of the head alone switched off; gives whether there are any, and none that is merged."""
    layers = [module for module in head.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    merged = any(getattr(layer, "merged_adapters", None) for layer in layers)
    try:
        for layer in layers if not merged else ():
            layer._disable_adapters = True  # type: ignore[assignment]
        yield bool(layers) and not merged
    finally:
        for layer, was in zip(layers, before):
            layer._disable_adapters = was


def _read(head: Any, model: PreTrainedModel) -> HeadView:
    head = innermost(head)
    # what computes the logits: FSDP gives a module a class of its own below, with the same forward
    by = next(cls for cls in type(head).__mro__ if "forward" in vars(cls))
    name = f"{by.__module__}.{by.__qualname__}"
    if name == "peft.utils.other.AuxiliaryTrainingWrapper":  # whose forward these two share
        name = next(
            (f"{c.__module__}.{c.__qualname__}" for c in type(head).__mro__ if c.__name__ in _SAVED + _TOKENS), ""
        )
    if name in _LORA:
        return _lora(head, model)
    if name == _SAVED:
        return _read(_saved(head), model)
    if name == _TOKENS:
        return _tokens(head.token_adapter, model)
    if name == _TOKENS_LAYER:
        return _tokens(head, model)
    if name.startswith("peft."):
        raise ValueError(
            f"model: expected LoRA, modules_to_save or trainable tokens as PEFT's adapter on the head of "
            f"{described(model)}, got {name}; leave the head out of its target_modules"
        )
    return _linear(head, by, model)


def _linear(head: Any, by: type, model: PreTrainedModel) -> HeadView:
    found = quantised(head, by, described(model))
    if found is not None:
        return HeadView(found, head.bias)
    if by is nn.Linear:
        if (shard := vocab_shard(head.weight, model)) is not None:
            bias = None if head.bias is None else head.bias.to_local()
            return _checked(head.weight.to_local(), bias, described(model))._replace(shard=shard)
        weight, bias = gathered(head.weight, model), gathered(head.bias, model)
        if type(weight) in (nn.Parameter, Tensor):
            return _checked(weight, bias, described(model))
    named, weight = f"{type(head).__module__}.{described(head)}", getattr(head, "weight", None)
    held = "" if weight is None else f" with a weight of type {type(weight).__name__}"
    raise ValueError(f"model: expected a plain nn.Linear as head of {described(model)}, got {named}{held}")


def _checked(weight: Tensor, bias: Tensor | None, name: str) -> HeadView:
    if weight.dtype not in FLOATS or weight.dim() != 2 or weight.is_meta:
        found = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"model: expected a float weight [V, H] on a device as head of {name}, got {found}")
    return HeadView(weight, bias)


def _whole(held: HeadView, model: PreTrainedModel) -> None:
    """Refuse adapters on rows of a head."""
    if held.shard is not None:
        raise ValueError(
            f"model: expected no adapter on the head of {described(model)}, which tensor parallelism splits, got one; "
            "leave the head out of target_modules"
        )


def _saved(head: Any) -> nn.Module:
    """The module that PEFT's wrapper runs: the first active adapter's, or the original."""
    active = head.active_adapters
    if head.disable_adapters or not active or any(adapter not in head._adapters for adapter in active):
        return head.original_module
    return head.modules_to_save[active[0]]


def _tokens(layer: Any, model: PreTrainedModel) -> HeadView:
    """W with the trained tokens' rows in place. PEFT leaves the bias out then, and so do we."""
    held, active = _read(layer.base_layer, model), layer.active_adapters
    if layer.disable_adapters or not active:
        if layer.merged:
            layer.unmerge()
        return _read(layer.base_layer, model)
    if layer.merged:
        return held
    _whole(held, model)
    if not isinstance(held.weight, Tensor):
        raise ValueError(
            f"model: expected a head of floats below trainable tokens of {described(model)}, got a quantised one; "
            "train the tokens of the embedding alone, or keep the head out of the quantisation"
        )
    layer._check_overlapping_tokens(active)
    weight = held.weight
    for name in active:
        rows = torch.tensor(layer.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, rows, gathered(layer.trainable_tokens_delta[name], model).to(weight))
    return HeadView(weight, None)


class _Block(NamedTuple):
    """Columns of a weight under construction: [V, columns], and the factors of its rows [V] or None."""

    columns: Tensor
    factor: Tensor | None


def _lora(layer: Any, model: PreTrainedModel) -> HeadView:
    """[W, B₁, …] and [x, s₁ A₁ drop(x), …], for the adapters that are active, in their order."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    held = _read(layer.base_layer, model)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return held
    _whole(held, model)
    dtype, bias, blocks, factor = held.weight.dtype, None, list[_Block](), None
    for name in active:
        variant = layer.lora_variant.get(name)
        what = None if variant is None else f"{type(variant).__module__}.{type(variant).__qualname__}"
        if what not in (None, _DORA):
            raise ValueError(
                f"model: expected plain LoRA or DoRA on the head of {described(model)}, got {what} in adapter "
                f"{name!r}; leave the head out of its target_modules"
            )
        b = gathered(layer.lora_B[name].weight, model)
        own_bias = layer.lora_B[name].bias
        if own_bias is not None:
            own_bias = gathered(own_bias, model).to(dtype) * layer.scaling[name]
            bias = own_bias if bias is None else bias + own_bias
        made = None
        if variant is not None:
            made = _dora_factor(layer, name, held, b, model)
            blocks = [block._replace(factor=_times(block.factor, made)) for block in blocks]
            factor = _times(factor, made)
            bias = None if bias is None else bias * made
        blocks.append(_Block(b.to(dtype), made))
    if held.bias is not None:
        bias = held.bias if bias is None else held.bias + bias
    widen = _widened(layer, active, held.widen)
    if factor is None and all(block.factor is None for block in blocks):
        base = held.weight if isinstance(held.weight, HeadWeight) else HeadWeight(held.weight)
        if base.more is not None:  # of a layer below
            blocks.insert(0, _Block(base.more, None))
        return HeadView(base._replace(more=_side_by_side([block.columns for block in blocks])), bias, widen)
    if not isinstance(held.weight, Tensor):
        raise ValueError(
            f"model: expected a head of floats below DoRA of {described(model)}, got a quantised one; leave the head "
            "out of its target_modules, or take use_dora=False"
        )
    whole = [_scaled(held.weight, factor), *(_scaled(block.columns, block.factor) for block in blocks)]
    return HeadView(torch.cat(whole, dim=1), bias, widen)


def _widened(layer: Any, active: list[str], below: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """[x, s₁ A₁ drop(x), …]; dropout acts on what A is given, so z is what the layer itself makes of it."""

    def widen(x: Tensor) -> Tensor:
        given, columns = x, [below(x)]
        for name in active:
            given = layer._cast_input_dtype(given, layer.lora_A[name].weight.dtype)
            h = layer.lora_A[name](layer.lora_dropout[name](given)) * layer.scaling[name]
            columns.append(h if torch.is_autocast_enabled(x.device.type) else h.to(x.dtype))
        return torch.cat(columns, dim=-1)

    return widen


def _dora_factor(layer: Any, name: str, held: HeadView, b: Tensor, model: PreTrainedModel) -> Tensor:
    """m / ‖W + s B A‖ of each row, [V]. The norm is a constant for the gradient (DoRA, section 4.3)."""
    if layer.training and type(layer.lora_dropout[name]) is not nn.Identity:
        raise ValueError(
            f"model: expected lora_dropout=0 with DoRA on the head of {described(model)}, got "
            f"{layer.lora_dropout[name].p} in adapter {name!r}: what is dropped from the input of A is dropped from a "
            "part of W x as well; take lora_dropout=0, or leave the head out of target_modules"
        )
    a, norms = gathered(layer.lora_A[name].weight, model), []
    with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
        if isinstance(held.weight, Tensor):
            for rows, columns in zip(held.weight.split(_NORM_ROWS), b.split(_NORM_ROWS)):
                whole = rows.to(columns.dtype) + layer.scaling[name] * (columns @ a)
                norms.append(torch.linalg.vector_norm(whole, dim=1))
    norm = torch.cat(norms) if norms else b.new_ones(len(b))  # quantised: refused below
    magnitude = gathered(layer.lora_magnitude_vector[name].weight, model)
    return (magnitude / norm.to(magnitude.dtype)).to(held.weight.dtype)


def _times(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one * other


def _scaled(columns: Tensor, factor: Tensor | None) -> Tensor:
    return columns if factor is None else columns * factor[:, None]


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
