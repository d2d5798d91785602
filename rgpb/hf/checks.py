"""What a model must pass once: its head is what `LMHead` holds, and packed responses stay apart."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.head import LMHead, described, read_head, unwrap
from rgpb.hf.batches import check_bounds, restarting_positions
from rgpb.hf.models import evaluating, hidden_states

_LOUD = 50.0  # the size `check_head` raises logits to, so that any soft-cap in use bends them visibly

# What a model has passed, so that each check runs once: "head", "packing" with its attention implementation.
_passed: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()


def check_head(model: nn.Module) -> None:
    """Compare the model's own logits with those of `hidden_states` and `read_head`, on three tokens.

    Catches a family whose head does more than `LMHead` holds. Compares twice: as things are, and with
    the head's input scaled up until the logits reach 50, since a soft-cap leaves small logits nearly as they
    are. Runs in evaluation mode without gradients, and puts every module's training flag back. `token_scores`
    and `loss` call this once for each model.

    Args:
        model: as for `hidden_states`.

    Raises:
        ValueError: the two disagree by more than rounding. Names the family and the largest difference.
    """
    model = unwrap(model)
    head, name = read_head(model), described(model)
    inputs = {"input_ids": probe_ids(model, 3)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    gain = 1.0
    linear: nn.Linear = model.get_output_embeddings()
    amplify = linear.register_forward_pre_hook(lambda _, args: (args[0] * gain, *args[1:]))
    try:
        with evaluating(model):
            hidden = hidden_states(model, **inputs)
            if hidden.shape[-1] != head.weight.shape[1]:
                found = f"{hidden.shape[-1]} in its hidden states and {head.weight.shape[1]} in its head"
                raise ValueError(f"model: expected one hidden size in {name}, got {found}")
            size = _dense(hidden, head._replace(softcap=None)).abs().max().item()
            for gain in (1.0, max(1.0, _LOUD / max(size, 1e-3))):
                ours, own = _dense(hidden * gain, head), model(**inputs, use_cache=False).logits
                if own.shape != ours.shape:
                    found = f"{tuple(own.shape)}"
                    raise ValueError(f"model: expected logits {tuple(ours.shape)} of {name}, got {found}")
                difference = (own.double() - ours.double()).abs().max().item()
                eps = max(torch.finfo(tensor.dtype).eps for tensor in (hidden, head.weight, ours, own))
                if not difference <= 16 * eps * max(size * gain, 1.0):
                    raise ValueError(
                        f"model: {name} does more to its hidden states or logits than LMHead holds: its "
                        f"logits differ by up to {difference:.3g} from those of its hidden states and head "
                        f"(softcap {head.softcap}, scale {head.scale:.6g}, logits up to {size * gain:.3g})"
                    )
    finally:
        amplify.remove()
    _passed.setdefault(model, set()).add("head")


def check_once(model: PreTrainedModel) -> None:
    """`check_head`, unless the model has passed it."""
    if "head" not in _passed.setdefault(model, set()):
        check_head(model)


def check_packed(model: PreTrainedModel, inputs: dict[str, Any], cu_seqlens: Tensor) -> None:
    """Fill in `position_ids`; refuse whatever would let one packed response see another."""
    name, attention = described(model), model.config._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(f"cu_seqlens: expected a causal LM, since no other can be packed, got {name}")
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask: expected none in a packed batch, since transformers tells responses apart "
            f"only where there is no mask; got shape {tuple(inputs['attention_mask'].shape)}"
        )
    check_bounds(cu_seqlens, inputs["input_ids"])
    restarting = restarting_positions(cu_seqlens)
    given = inputs.setdefault("position_ids", restarting)
    if not torch.equal(given, restarting.to(given)):
        expected = "[1, N], restarting from 0 where cu_seqlens says"
        raise ValueError(f"position_ids: expected {expected}, got {given.tolist()}")

    probe = f"packing, {attention}"
    if probe in _passed.setdefault(model, set()):
        return
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ValueError(f"cu_seqlens: {name} attends within chunks of the packed row, not of each response")
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=cu_seqlens.device)
    tokens, other = probe_ids(model, 5), probe_ids(model, 5)
    other[:, :3] = tokens[:, :3].flip(1)
    with evaluating(model):
        packed, beside, alone = (
            hidden_states(model, ids, position_ids=positions[:, -ids.shape[1] :])[:, -2:]
            for ids in (tokens, other, tokens[:, 3:])
        )
    eps, size = torch.finfo(alone.dtype).eps, alone.abs().max().item()
    leak, shift = (packed - beside).abs().max().item(), (packed - alone).abs().max().item()
    # A masked neighbour adds exact zeros; a response by itself runs in other shapes, and rounds differently.
    if not (leak <= 8 * eps * size and shift <= max(32 * eps, 1e-3) * size):
        raise ValueError(
            f"cu_seqlens: {name} with {attention} attention does not keep packed responses apart: hidden "
            f"states of size {size:.3g} move by {leak:.3g} with what stands before the response and are "
            f"{shift:.3g} away from those of the response alone; give a padded batch instead"
        )
    _passed[model].add(probe)


def _dense(hidden: Tensor, head: LMHead) -> Tensor:
    """The logits themselves, for the few tokens of a check."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    """A few different token ids, [1, count], that are none of the special ones."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = [token for token in range(count + len(special)) if token not in special][:count]
    embedding: Any = model.get_input_embeddings()
    return torch.tensor([ids], device=embedding.weight.device)
