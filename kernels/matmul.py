"""The library's matrix product, with 16-bit operands and float32 results where the device has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgpb.kernels import devices


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = A B, or out += A B. 16-bit operands may have a float32 result: on CUDA, and on a CPU for bfloat16 where
    `cpp_rows.BF16_PRODUCTS`."""
    if a.dtype == torch.bfloat16 and devices.kind(a.device) == "cpu":
        if out.stride(1) != 1:
            a, b, out = b.t(), a.t(), out.t()  # gradients lie as their tensors do
        torch.ops.rgpb.mm_bf16(with_unit_stride(a), with_unit_stride(b), out, accumulate)
        return
    more: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **more, out=out)
    else:
        torch.mm(a, b, **more, out=out)


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if neither its rows nor its columns are dense, as library products do it."""
    return x if 1 in x.stride() else x.contiguous()
