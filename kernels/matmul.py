"""The library's matrix product, with 16-bit operands and float32 results where the device has it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rgpb.kernels import devices

# Of a product that is added afterwards, where the library can't add it by itself: bytes held at a time.
ADDED_BYTES = 32 << 20


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = A B, or out += A B. 16-bit operands may have a float32 result: on CUDA, and on a CPU for bfloat16 where
    `cpp_rows.BF16_PRODUCTS`."""
    if a.dtype == torch.bfloat16 and devices.kind(a.device) == "cpu":
        if out.stride(1) != 1:
            a, b, out = b.t(), a.t(), out.t()  # gradients lie as their tensors do
        torch.ops.rgpb.mm_bf16(with_unit_stride(a), with_unit_stride(b), out, accumulate)
        return
    more: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if not accumulate:
        torch.mm(a, b, **more, out=out)
    elif not more or adds_wide(a.device, a.dtype):
        torch.addmm(out, a, b, **more, out=out)
    else:
        rows = max(1, ADDED_BYTES // (out.shape[1] * out.element_size()))
        for some, total in zip(a.split(rows), out.split(rows)):
            total.add_(torch.mm(some, b, **more))


@cache
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` takes a float32 sum beside operands of a 16-bit `dtype`. torch 2.8 and 2.9 want all of one dtype
    (pytorch/pytorch#167931)."""
    operand = torch.zeros(8, 8, dtype=dtype, device=device)
    total = operand.float()
    try:
        torch.addmm(total, operand, operand, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if neither its rows nor its columns are dense, as library products do it."""
    return x if 1 in x.stride() else x.contiguous()
