"""Host waits and launches of a call, counted without a GPU.

Tensors lie on the CPU, but the engine is told that they lie on a GPU: `rgpb.kernels.devices.kind` says "cuda", so it
takes the branches of CUDA. Triton's kernels are only noted, or run in its interpreter; CUDA's products are those of
`cuda_products`. Every operator is looked at from below autograd:

    wait     the host needs a number from the device before it can go on: `.item()`, `.tolist()`, `nonzero`, indexing by
             a mask, a copy to the host, `segment_reduce`'s own two checks
    launch   an operator that computes or copies, or a Triton kernel: at least one kernel on a GPU. Views and
             allocations are none, nor is what has no element
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
from cuda_products import is_wide, product
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rgpb.engine import operator
from rgpb.kernels import HAS_TRITON, devices, matmul

# Operators that read a number back: one wait each
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
# Neither: they make or reshape a tensor without touching its elements
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "resize_", "set_"}
ALIASES = {"detach", "_reshape_alias", "_unsafe_view", "view_as", "reshape", "contiguous"}
# Python methods that copy to the host and are no operator for a tensor that lies there already
TO_HOST = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu", torch.Tensor.numpy: "numpy"}
# What makes a tensor of the host's numbers: a copy to the device, which a CUDA graph doesn't take
FROM_HOST = {torch.tensor: "tensor", torch.as_tensor: "as_tensor", torch.Tensor.new_tensor: "new_tensor"}


class Count:
    """Names of what was counted, in order.

    Attributes:
        waits, launches: operators and kernels by name, once for each time.
        copies: of the host's numbers to the device.
        paused: above 0 while something runs that a GPU wouldn't run as it does here.
    """

    def __init__(self):
        self.waits, self.launches, self.copies, self.paused = [], [], [], 0

    def __repr__(self):
        return "\n".join(
            f"{len(found)} {what}: {', '.join(f'{name} × {n}' for name, n in Counter(found).items())}"
            for what, found in (("waits", self.waits), ("launches", self.launches), ("copies", self.copies))
        )


class Operators(TorchDispatchMode):
    def __init__(self, count, one_dtype=False):
        super().__init__()
        self.count, self.one_dtype = count, one_dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if self.count.paused or name in FREE | ALIASES or is_view(func):
            return func(*args, **kwargs)
        masks = masks_of(name, args)
        if name in READS:
            self.count.waits.append(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.count.waits.append("repeat_interleave without its size")
        elif masks:
            self.count.waits += [f"{name} by a mask"] * masks
        elif name == "segment_reduce" and not kwargs.get("unsafe"):
            self.count.waits += ["segment_reduce's check"] * 2
        made = product(func, args, kwargs, self.one_dtype) if is_wide(func) else func(*args, **kwargs)
        results = [x for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, torch.Tensor)]
        if name != "_local_scalar_dense" and any(x.numel() for x in results):
            self.count.launches.append(name)
        return made


class Methods(TorchFunctionMode):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_HOST and not self.count.paused:
            self.count.waits.append(TO_HOST[func])
        if func in FROM_HOST and not self.count.paused:
            self.count.copies.append(FROM_HOST[func])
        return func(*args, **(kwargs or {}))


def is_view(func):
    """Whether results lie in an argument's memory that isn't written to."""
    returned = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in returned)


def masks_of(name, args):
    """How many of an index's tensors are masks, which a GPU turns into positions. Filling by a mask needs none."""
    if name not in ("index", "index_put", "index_put_"):
        return 0
    if name != "index" and args[2].numel() == 1:
        return 0
    return sum(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


@contextmanager
def counted(monkeypatch, interpreted=False, one_dtype=False):
    """Count what runs inside, as on a GPU.

    Args:
        interpreted: run Triton's kernels, too; else their results are not written.
        one_dtype: of `cuda_products.product`.
    """
    count = Count()

    def launched(self, *args, **kwargs):
        count.launches.append(f"{self.fn.__name__} (Triton)")
        if not interpreted:
            return None
        count.paused += 1
        try:
            return launch(self, *args, **kwargs)
        finally:
            count.paused -= 1

    with monkeypatch.context() as patch:
        if HAS_TRITON:
            from triton.runtime import interpreter

            launch = interpreter.GridExecutor.__call__
            patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(devices, "kind", lambda device: "cuda")
        patch.setattr(operator, "is_intercepted", lambda tensors: False)  # the counter's mode isn't there on a GPU
        patch.setattr("rgpb.engine.sweeps.is_intercepted", lambda tensors: False)
        patch.setattr(matmul, "adds_wide", lambda device, dtype: not one_dtype)  # asked once, before all that counts
        with Operators(count, one_dtype), Methods(count):
            yield count
