"""Quantised heads as `HeadWeight`: the codes of torchao's and bitsandbytes' layers, where rows of them can be read.

What a layer computes with its codes decides what is served: one that quantises its input, too, is refused, since its
logits aren't linear in the hidden states.

Dimensions: V vocabulary, H hidden size, G groups of a row with a scale each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rgpb.head import HeadWeight, Quantised

# of torchao: weight-only by codes [V, H] of one byte, with scales [V, G]
_CODES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def quantised(head: Any, by: type, name: str) -> HeadWeight | None:
    """The weight of a quantised linear layer whose forward is the class `by`'s, or None for one that isn't quantised.

    Args:
        name: of the model, for messages.

    Raises:
        ValueError: a format whose rows can't be read, or a layer that does more than multiply, by name.
    """
    layer, weight = f"{by.__module__}.{by.__qualname__}", getattr(head, "weight", None)
    if layer == "bitsandbytes.nn.modules.Linear8bitLt":
        raise ValueError(
            f"model: expected a head of {name} that multiplies its input as it is, got bitsandbytes' Linear8bitLt, "
            "which quantises the hidden states, too, on a GPU and in evaluation mode; keep the head out of it "
            "(llm_int8_skip_modules), or take 4 bits"
        )
    if layer == "bitsandbytes.nn.modules.Linear4bit":
        return _bitsandbytes(head, name)
    if by is not nn.Linear or not type(weight).__module__.startswith("torchao."):
        return None
    return _torchao(weight, name)


def _torchao(weight: Any, name: str) -> HeadWeight:
    kind = type(weight).__name__
    if kind not in _CODES:
        raise ValueError(
            f"model: expected one of {_CODES} of torchao as quantised head of {name}, got {kind}, whose rows "
            "can't be read one by one; keep the head out of the quantisation, or take Int8WeightOnlyConfig or "
            "IntxWeightOnlyConfig"
        )
    acting = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")
    found = [attribute for attribute in acting if getattr(weight, attribute, None) is not None]
    if found:
        raise ValueError(
            f"model: expected weight-only quantisation of the head of {name}, got {kind} with {found[0]}; keep the "
            "head out of the quantisation, or take Int8WeightOnlyConfig"
        )
    vocab, width = weight.qdata.shape
    scales, zeros = weight.scale, weight.zero_point
    if scales.dim() != 2 or scales.shape[0] not in (1, vocab) or width % scales.shape[1]:
        raise ValueError(
            f"model: expected scales [V, groups] of the head of {name}, got {tuple(scales.shape)} in {kind}; keep the "
            "head out of the quantisation"
        )
    scales = scales.expand(vocab, -1)
    zeros = None if zeros is None or kind == "Int8Tensor" else zeros.expand(vocab, -1)  # whose zeros are all 0
    by_row = kind == "Int8Tensor" and scales.shape[1] == 1  # the layer scales its product of the codes
    rounded = None if by_row else weight.dtype
    return HeadWeight(weight.qdata, None, Quantised("integers", weight.dtype, width, scales, zeros, rounded))


def _bitsandbytes(head: Any, name: str) -> HeadWeight:
    how = getattr(head.weight, "quant_state", None) or head.quant_state
    if how is None:
        raise ValueError(
            f"model: expected quantised weights as head of {name}, got a Linear4bit of bitsandbytes that has not been "
            "moved to a device yet; move the model first"
        )
    if getattr(how, "packing_format_for_cpu", False):
        raise ValueError(
            f"model: expected a Linear4bit of bitsandbytes as it was loaded as head of {name}, got one that an "
            "evaluation on a CPU has packed anew and rounded; load the model again and call rgpb.hf.attach(model) "
            "before it runs"
        )
    head.support_avx512bf16_for_cpu = False  # or a frozen forward of its own, the check's to begin with, would do that
    vocab, width = how.shape
    if width % how.blocksize:
        raise ValueError(
            f"model: expected a hidden size that blocks of {how.blocksize} divide as head of {name}, got {width} in "
            "bitsandbytes' Linear4bit, where a block may hold parts of two rows; keep the head out of the quantisation "
            "(llm_int8_skip_modules)"
        )
    scales = _absmax(how).view(vocab, -1)
    codes: Tensor = head.weight.data.view(vocab, width // 2)
    dtype = head.compute_dtype or how.dtype
    return HeadWeight(codes, None, Quantised("pairs", dtype, width, scales, how.code.float(), how.dtype))


def _absmax(how: Any) -> Tensor:
    """The largest magnitude of each block, itself quantised where `nested`. float32 [blocks]"""
    if not how.nested:
        return how.absmax.float()
    of_blocks = how.state2
    values = of_blocks.code[how.absmax.int().view(-1)]
    return values * of_blocks.absmax.repeat_interleave(of_blocks.blocksize)[: len(values)] + how.offset
