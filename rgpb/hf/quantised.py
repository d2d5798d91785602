"""Quantised heads as `HeadWeight`: the codes of torchao's and bitsandbytes' layers, where rows of them can be read.

Dimensions: V vocabulary, H hidden size, G groups of a row with a scale each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rgpb.head import HeadWeight, Quantised

_INT8 = "torchao.quantization.quantize_.workflows.int8.int8_tensor.Int8Tensor"


def quantised(head: Any, by: type, name: str) -> HeadWeight | None:
    """The weight of a quantised linear layer whose forward is the class `by`'s, or None for one that isn't quantised.

    Raises:
        ValueError: a format whose rows can't be read, by name.
    """
    layer = f"{by.__module__}.{by.__qualname__}"
    if layer == "bitsandbytes.nn.modules.Linear8bitLt":
        return _bitsandbytes_8bit(head, name)
    if layer == "bitsandbytes.nn.modules.Linear4bit":
        return _bitsandbytes_4bit(head, name)
    weight = getattr(head, "weight", None)
    kind = type(weight)
    if by is not nn.Linear or not kind.__module__.startswith("torchao."):
        return None
    if kind.__name__ == "Int8Tensor":
        return _torchao_int8(weight, name)
    raise ValueError(
        f"model: expected torchao's Int8Tensor (Int8WeightOnlyConfig) as quantised head of {name}, got "
        f"{kind.__name__}, whose rows can't be read one by one; keep the head out of the quantisation"
    )


def _torchao_int8(weight: Any, name: str) -> HeadWeight:
    refused = [
        what
        for what, there in (
            ("quantised activations", weight.act_quant_scale is not None or _activations(weight)),
            ("scaled activations", weight.act_pre_scale is not None),
            ("codes that aren't [V, H]", weight.qdata.dim() != 2),
        )
        if there
    ]
    if refused:
        raise ValueError(
            f"model: expected torchao's weight-only int8 as head of {name}, got {refused[0]}; keep the head out of the "
            "quantisation, or take Int8WeightOnlyConfig"
        )
    vocab, width = weight.qdata.shape
    scales = weight.scale.expand(vocab, -1) if weight.scale.dim() == 2 else weight.scale.reshape(-1, 1)
    zeros = weight.zero_point
    zeros = None if zeros is None else zeros.expand(vocab, -1) if zeros.dim() == 2 else zeros.reshape(-1, 1)
    return HeadWeight(weight.qdata, None, Quantised("integers", weight.dtype, width, scales, zeros))


def _activations(weight: Any) -> bool:
    """Whether the product quantises its other operand."""
    return getattr(weight, "act_quant_kwargs", None) is not None


def _bitsandbytes_8bit(head: Any, name: str) -> HeadWeight:
    weight, state = head.weight, head.state
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
    if weight.dtype != torch.int8 or scales is None:
        raise ValueError(
            f"model: expected quantised weights (has_fp16_weights=False, on a device) as head of {name}, got "
            f"{weight.dtype} in bitsandbytes' Linear8bitLt; take a plain nn.Linear for the head"
        )
    if weight.device.type != "cpu":
        raise ValueError(
            f"model: expected a head of {name} that multiplies its input as it is, got bitsandbytes' Linear8bitLt, "
            f"which quantises it on {weight.device.type}; keep the head out of the quantisation (llm_int8_skip_modules)"
        )
    vocab, width = weight.shape
    dtype = head.compute_dtype if getattr(head, "compute_dtype", None) is not None else torch.float32
    return HeadWeight(weight.data, None, Quantised("integers", dtype, width, scales.view(vocab, 1).float() / 127))


def _bitsandbytes_4bit(head: Any, name: str) -> HeadWeight:
    how = head.weight.quant_state
    if how is None:
        raise ValueError(
            f"model: expected quantised weights as head of {name}, got a Linear4bit of bitsandbytes that has not been "
            "moved to a device yet; move the model first"
        )
    vocab, width = how.shape
    if width % how.blocksize:
        raise ValueError(
            f"model: expected a hidden size that blocks of {how.blocksize} divide as head of {name}, got {width} in "
            "bitsandbytes' Linear4bit, where a block holds parts of two rows; keep the head out of the quantisation"
        )
    scales = _absmax(how).view(vocab, -1)
    codes: Tensor = head.weight.data.view(vocab, width // 2)
    return HeadWeight(codes, None, Quantised("pairs", how.dtype, width, scales, how.code.float()))


def _absmax(how: Any) -> Tensor:
    """The largest magnitude of each block, itself quantised where `nested`. float32 [blocks]"""
    if not how.nested:
        return how.absmax.float()
    inner = how.state2
    blocks = inner.code[how.absmax.int()]
    scales = inner.absmax.repeat_interleave(inner.blocksize)[: len(blocks)]
    return blocks * scales + how.offset
