"""Models: attaching the loss to them, and from inputs to the last hidden states.

Dimensions: B responses, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.head import LMHead, described
from rgpb.hf.attach import Attached, head_forward, install
from rgpb.hf.checks import check_head as _check_head
from rgpb.hf.checks import check_shift, head_input, try_ahead, try_left_padding, try_packing
from rgpb.hf.heads import view, without_adapters
from rgpb.hf.wrappers import around, base_of, inner, sharded_by

_SHIFT = "prepare_decoder_input_ids_from_labels"


def attach(model: nn.Module, *, sync_elsewhere: bool = False) -> nn.Module:
    """Let the loss run inside a model's own forward, and check its head.

    Call it before the model is wrapped in FSDP or ZeRO-3; anything else attaches by itself at the first `loss` or
    `token_scores`. Afterwards the model is what it was, but its forward also takes the step that these two give it. A
    copy of it is attached, too.

    Args:
        model: a transformers model with an LM head, or PEFT around one.
        sync_elsewhere: whether gradients are averaged over processes by other means than DDP, FSDP or DeepSpeed around
            the model. Without it `loss` refuses a bare model where several processes run.

    Returns:
        `model`.

    Raises:
        ValueError: no transformers model, a head that can't be read, or one that does more than `LMHead` holds.
    """
    base = base_of(model)
    attached = install(base)
    attached.sync_elsewhere = sync_elsewhere
    _check_head(base, attached)
    if sharded_by(base) is None:
        with without_adapters(head_forward(base).head) as there:  # for ref="base", once something is wrapped around
            if there:
                _check_head(base, attached)
    if sharded_by(base) is None:
        if not base.config.is_encoder_decoder:
            try_packing(base, attached)
            try_left_padding(base, attached)
            try_ahead(base, attached)
        elif (shift := _shift_in_forward(base)) is not None:
            check_shift(base, attached, shift)
    return model


def check_head(model: nn.Module) -> None:
    """Compare the model's own logits with those of its head as `LMHead` holds it, on three tokens.

    `attach`, `token_scores` and `loss` do this, again only where something changed that the logits depend on.

    Raises:
        ValueError: the two disagree by more than rounding. Names the family and the largest difference.
    """
    base = base_of(model)
    _check_head(base, install(base))


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The last hidden states, differentiable: what the head of `read_head` turns into logits.

    Args:
        model: a transformers causal LM, an encoder–decoder with text input, or a PEFT model around one; not wrapped.
        input_ids: int64 [B, T]; of an encoder–decoder, what the encoder reads.
        attention_mask: [B, T], or whatever else the model takes, or None.
        kwargs: further inputs of the model. An encoder–decoder needs `decoder_input_ids`, or `labels`, which
            are then shifted right as the model itself does. Causal models ignore `labels`.

    Returns:
        [B, T, H] in the head's dtype (in the backbone's under autocast), with LoRA on the head H + r columns; for an
        encoder–decoder T is the decoder's.

    Raises:
        ValueError: a model of a kind that this module can't take apart, or no inputs for the decoder.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids: expected a tensor (a batch goes in as **batch), got {type(input_ids).__name__}")
    base = _bare(model)
    attached = install(base)
    inputs = model_inputs(base, attached, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
    return head_input(base, attached, inputs)


def read_head(model: nn.Module) -> LMHead:
    """The head that turns `hidden_states` into logits: weight and bias themselves, soft-cap and scale as checked.

    Where a family scales hidden states before its head (T5, MiniCPM), that is in `hidden_states`, and not in `scale`;
    `LMHead.from_model` is for hidden states as the backbone leaves them.

    Raises:
        ValueError: as `attach`.
    """
    base = _bare(model)
    attached = install(base)
    held = view(head_forward(base).head, base)
    return LMHead(held.weight, held.bias, *_check_head(base, attached))


def _bare(model: nn.Module) -> PreTrainedModel:
    """The model in nothing but PEFT: what goes around a wrapper isn't synchronised by it."""
    base = base_of(model)
    for at in around(model):
        if inner(at) is not None:
            raise ValueError(
                f"model: expected a bare transformers PreTrainedModel, got {described(at)} around it; rgpb.hf.loss and "
                "rgpb.hf.token_scores go through wrappers"
            )
    return base


def model_inputs(model: PreTrainedModel, attached: Attached, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the model's forward takes it: without labels, which would make it compute a loss of its own."""
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if model.config.is_encoder_decoder and inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = _shift_right(model, attached, labels)
    return inputs


def _shift_right(model: PreTrainedModel, attached: Attached, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"decoder_input_ids: expected them, or labels, for {described(model)}, got neither")
    own: Any = getattr(model, _SHIFT, None)
    if own is not None:
        return own(labels=labels)
    shift = _shift_in_forward(model)
    if shift is None:
        raise ValueError(f"decoder_input_ids: expected them for {described(model)}, which can't shift labels")
    check_shift(model, attached, shift)
    return shift(labels)


def _shift_in_forward(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What a forward that shifts labels itself does so with, by its name in the family's module.

    None where the model has a method for that, or nothing is known of it.
    """
    config, modules = model.config.get_text_config(), [sys.modules.get(cls.__module__) for cls in type(model).__mro__]
    pad, start = (getattr(config, f"{name}_token_id", None) for name in ("pad", "decoder_start"))
    found: Any = next((f for module in modules if (f := getattr(module, "shift_tokens_right", None)) is not None), None)
    if getattr(model, _SHIFT, None) is not None or found is None or pad is None or start is None:
        return None
    return lambda labels: found(labels, pad, start)
