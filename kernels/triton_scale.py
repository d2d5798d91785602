"""x *= g in place, for a number g on the device. Where g is 1, as for the gradient of a loss that is summed up no
further, nothing of x is read, and the host waits for nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS = 1024  # eight of 8 warps fill a multiprocessor: enough for 128 of them


@triton.jit(do_not_specialize=["n"])
def scale_kernel(
    x_ptr,  # [n] in place
    g_ptr,  # one number
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = tl.load(g_ptr).to(ACC)
    if g != 1:  # NaN is not 1
        whole = n // BLOCK * BLOCK
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, whole, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = x_ptr + start + tl.arange(0, BLOCK)
            tl.store(at, (tl.load(at).to(ACC) * g).to(x_ptr.dtype.element_ty))
        if tl.program_id(0) == 0:
            offs = whole + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(ACC)
            tl.store(x_ptr + offs, (x * g).to(x_ptr.dtype.element_ty), mask=offs < n)


def scale_(x: Tensor, g: Tensor) -> Tensor:
    """`x.mul_(g)` for a dense x of up to two dimensions, g 0-d on the same device."""
    flat = x if x.is_contiguous() else x.t()  # gradients lie as their tensors do
    assert flat.is_contiguous()
    if x.numel():
        programs = min(PROGRAMS, triton.cdiv(x.numel(), BLOCK))
        scale_kernel[(programs,)](flat, g, x.numel(), BLOCK=BLOCK, num_warps=8)
    return x
