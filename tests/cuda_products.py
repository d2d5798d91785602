"""Products of 16-bit operands with float32 results, `mm` and `addmm` with `out_dtype`: only CUDA has them.

Here they run on CPU tensors, and refuse what CUDA's refuse (aten/src/ATen/native/cuda/Blas.cpp).
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = (torch.float16, torch.bfloat16)


def is_wide(func):
    """Whether an operator is one of them."""
    return func in (torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out) or is_wide_sum(func)


def is_wide_sum(func):
    return func in (torch.ops.aten.addmm.dtype, torch.ops.aten.addmm.dtype_out)


def product(func, args, kwargs, one_dtype=False):
    """What the operator gives. `one_dtype`: `addmm` takes a sum of the operands' type only, as torch 2.8 and 2.9."""
    total, a, b, dtype = args if is_wide_sum(func) else (None, *args)
    out = kwargs.get("out")
    expect(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], "shapes")
    expect(a.dtype == b.dtype, "operands of one dtype")
    expect(dtype == a.dtype or (dtype == torch.float32 and a.dtype in HALVES), "out_dtype")
    expect(out is None or (out.dtype == dtype and out.shape == (a.shape[0], b.shape[1])), "out")
    made = a.float() @ b.float()
    if total is not None:
        expect(total.dtype == b.dtype or (total.dtype == dtype and not one_dtype), "self")
        made = kwargs.get("beta", 1) * total.float() + kwargs.get("alpha", 1) * made
    return made.to(dtype) if out is None else out.copy_(made)


def expect(holds, what):
    if not holds:
        raise RuntimeError(f"a product on CUDA: {what}")


class CudaProducts(TorchDispatchMode):
    """Around calls of `torch.mm` and `torch.addmm`. `made`: (operator's name, rows of the result) of each wide one."""

    def __init__(self, one_dtype=False):
        super().__init__()
        self.one_dtype, self.made = one_dtype, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not is_wide(func):
            return func(*args, **kwargs)
        made = product(func, args, kwargs, self.one_dtype)
        self.made.append((func._schema.name.split("::")[1], len(made)))
        return made
