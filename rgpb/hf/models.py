"""Models: from inputs to the last hidden states.

Dimensions: B responses, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.head import described, read_head, unwrap


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The backbone's last hidden states, differentiable: what the head of `read_head` turns into logits.

    Args:
        model: a transformers causal LM, an encoder–decoder with text input, or a PEFT model around one.
        input_ids: int64 [B, T]; of an encoder–decoder, what the encoder reads.
        attention_mask: [B, T], or whatever else the model takes, or None.
        kwargs: further inputs of the model. An encoder–decoder needs `decoder_input_ids`, or `labels`, which
            are then shifted right as the model itself does. Causal models ignore `labels`.

    Returns:
        [B, T, H] in the head's dtype (in the backbone's under autocast); for an encoder–decoder T is the
        decoder's.

    Raises:
        ValueError: a model of a kind that this module can't take apart, or no inputs for the decoder.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids: expected a tensor (a batch goes in as **batch), got {type(input_ids).__name__}")
    model = unwrap(model)
    labels = kwargs.pop("labels", None)
    if model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None:
        kwargs["decoder_input_ids"] = _shift_right(model, labels)
    backbone = _backbone(model)
    hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)[0]
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden
    return hidden.to(read_head(model).weight.dtype)  # Mamba returns float32 for a head of 16 bits, and casts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _backbone(model: PreTrainedModel) -> Callable[..., Any]:
    """What maps a model's inputs to its last hidden states, first of its outputs."""
    backbone = model.base_model
    if backbone is model:  # where the prefix names a part of some enclosing model (Llama-4's text model)
        backbone = getattr(model, "model", model)
    if backbone is not model and not _makes_logits(backbone):
        return backbone
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    if not model.config.is_encoder_decoder or encoder is None or decoder is None or _makes_logits(decoder):
        raise ValueError(f"model: expected a backbone that ends in hidden states, got none in {described(model)}")

    def stacks(input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool, **kwargs: Any) -> Any:
        """T5 and its relatives have no backbone around their two stacks."""
        names = [name for name in kwargs if name.startswith("decoder_")]
        of_decoder = {name.removeprefix("decoder_"): kwargs.pop(name) for name in names}
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        return decoder(
            **of_decoder,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )

    return stacks


def _makes_logits(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _shift_right(model: PreTrainedModel, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"decoder_input_ids: expected them, or labels, for {described(model)}, got neither")
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(f"decoder_input_ids: expected them for {described(model)}, which can't shift labels")
    return shift(labels=labels)
