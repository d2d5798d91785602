"""Memory that calls keep between them, and the order of the vocabulary that their skipping goes by."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rgpb.engine.plan import DEFAULT_WORKSPACE, auto_workspace
from rgpb.kernels.cpp_rows import fresh

CPU = torch.device("cpu")
# An order is estimated anew when a call has to keep so much more than the first that went by it.
WORSE = 1.25
# Where an order leaves out less than this share, none is used for so many calls.
WORTH, PAUSE = 0.1, 64
# So many orders are kept, of several heads or tolerances; the oldest goes first.
ORDERS = 8


class Workspace:
    """Scratch memory that is kept from call to call, instead of being allocated by each.

    Give it as `workspace=` of any loss, or enter it: `with Workspace(): …` makes it the default of the calls inside. A
    call that finds it in use (by another thread) allocates its own. Results never lie in it.

    On a CPU, where the system takes long to hand out new memory, `gradients` also keeps that of the head's gradient:
    the next call writes into it if by then nobody holds that gradient any more, as after `zero_grad(set_to_none=True)`.
    It comes on top of `size`, and stays allocated between the steps. (CUDA's allocator does that by itself.)

    With a `grad_tolerance` it also keeps the order of the vocabulary by which most is left out (`sort_vocab`).
    Results depend on that order by rounding, and, within the tolerance, by what is left out.

    Args:
        size: bytes that a call may hold, and that are kept at most. Default: 512 MiB.
        gradients: keep the memory of the head's gradient, too. Default: False.

    Raises:
        ValueError: a size that isn't a positive whole number.
    """

    def __init__(self, size: int = DEFAULT_WORKSPACE, gradients: bool = False):
        check_size(size, "size")
        self.size, self.gradients, self.key = size, gradients, next(_keys)
        self._given: dict[str, torch.UntypedStorage] = {}
        self._blocks: dict[tuple[str, torch.device], Tensor] = {}
        self._orders: dict[Any, _Order] = {}
        self._lock, self._owner = threading.Lock(), 0
        self._taken: set[tuple[str, torch.device]] = set()
        self._streams: dict[torch.device, Any] = {}
        _alive[self.key] = self

    @property
    def held(self) -> int:
        """Bytes kept at the moment, gradients aside that somebody still holds."""
        return self._scratch + sum(self._given[name].nbytes() for name in self._given if _is_free(self._given, name))

    @property
    def _scratch(self) -> int:
        """Bytes of the blocks, which `size` bounds."""
        return sum(block.numel() for block in self._blocks.values())

    def free(self) -> None:
        """Give back all memory, and forget the order; waits for a call of another thread.

        Raises:
            RuntimeError: inside a call that runs in it.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("rgpb: expected Workspace.free() between calls, got it inside one")
        with self._lock:
            self._blocks.clear()
            self._orders.clear()
            self._given.clear()

    def __enter__(self) -> Workspace:
        _entered.stack = [*getattr(_entered, "stack", ()), self]
        return self

    def __exit__(self, *error: object) -> None:
        _entered.stack = _entered.stack[:-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, (self.size, self.gradients)  # a copy, or another process, has memory of its own

    @contextmanager
    def using(self, device: torch.device) -> Iterator[None]:
        """Around a call: what it takes is its own until then."""
        mine = self._lock.acquire(blocking=False)
        if not mine:
            yield
            return
        self._owner = threading.get_ident()
        try:
            if device.type == "cuda":  # the last call may still be running, on another stream
                stream = torch.cuda.current_stream(device)
                last = self._streams.get(device, stream)
                if last != stream:
                    stream.wait_stream(last)
                self._streams[device] = stream
            yield
        finally:
            self._owner = 0
            self._taken.clear()
            self._lock.release()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of that name, not cleared, until the call around it ends."""
        place, size = (name, device), math.prod(shape) * dtype.itemsize
        if self._owner != threading.get_ident() or place in self._taken or not size:
            return fresh(torch.empty(shape, dtype=dtype, device=device))
        self._taken.add(place)
        if place not in self._blocks or self._blocks[place].numel() < size:
            self._blocks.pop(place, None)
            for other in [other for other in self._blocks if other not in self._taken]:
                if self._scratch + size <= self.size:
                    break
                del self._blocks[other]
            if self._scratch + size > self.size:  # a block of this call's is larger than it asked for
                return fresh(torch.empty(shape, dtype=dtype, device=device))
            self._blocks[place] = fresh(torch.empty(size, dtype=torch.uint8, device=device))
        return self._blocks[place][:size].view(dtype).view(shape)

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """Memory for a gradient of that name, not cleared: that of the last one, if nobody holds it any more."""
        if not self.gradients or self._owner != threading.get_ident() or like.device.type != "cpu":
            return fresh(torch.empty_like(like))
        if name not in self._given or self._given[name].nbytes() != like.nbytes or not _is_free(self._given, name):
            self._given.pop(name, None)
            made = fresh(torch.empty_like(like))
            if like.nbytes == made.untyped_storage().nbytes():
                self._given[name] = made.untyped_storage()
            return made
        shape = torch.empty_like(like, device="meta")
        return like.new_empty(0).set_(self._given[name], 0, shape.shape, shape.stride())

    def order(self, key: object, estimate: Callable[[], Tensor]) -> Tensor | None:
        """The order of a head's vocabulary, estimated where none is kept; None where it isn't worth its while."""
        found = self._orders.get(key)
        if found is None:
            found = _Order(estimate())
            while len(self._orders) >= ORDERS:
                self._orders.pop(next(iter(self._orders)), None)
            self._orders[key] = found
        if found.pause > 0:
            found.pause -= 1
            if found.pause == 0:
                self._orders.pop(key, None)
            return None
        return found.order

    def measured(self, key: object, kept: float) -> None:
        """What share of the (row, tile) pairs a call by that order had to keep."""
        found = self._orders.get(key)
        if found is None or found.pause:
            return
        if kept > 1 - WORTH:
            found.pause = PAUSE
        elif found.kept is None:
            found.kept = kept
        elif kept > WORSE * found.kept:
            self._orders.pop(key, None)


class _Order:
    """An order [V], what the first call by it kept, and the calls that do without."""

    def __init__(self, order: Tensor):
        self.order, self.pause = order, 0
        self.kept: float | None = None


_keys = itertools.count(1)
_alive: WeakValueDictionary[int, Workspace] = WeakValueDictionary()
_entered = threading.local()  # `stack`: those of a thread


def _holders(given: dict[str, torch.UntypedStorage], name: str) -> tuple[int, int]:
    """How many hold a storage: tensors, views and arrays; and the storage object itself, which all have in common."""
    storage = given[name]
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_ALONE = _holders({"": torch.empty(1).untyped_storage()}, "")


def _is_free(given: dict[str, torch.UntypedStorage], name: str) -> bool:
    """Whether nobody but `given` holds that storage, in this process or in another one."""
    return _holders(given, name) == _ALONE and not given[name].is_shared()


def check_size(size: object, argument: str = "workspace") -> None:
    """Refuse what isn't a number of bytes."""
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ValueError(f"{argument}: expected a positive whole number of bytes, got {size}")


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, those included that PyTorch keeps for later; 0 without a GPU."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def settled(
    workspace: int | str | Workspace | None, device: torch.device = CPU, shared: bool = False
) -> tuple[int, int]:
    """(bytes, key of what is kept, or 0) of an argument: None for what is entered, or "auto".

    Args:
        device: of the call.
        shared: whether ranks have to take the same chunks, so that "auto" can't go by what is free on one of them.
    """
    if workspace is None:
        stack = getattr(_entered, "stack", ())
        workspace = stack[-1] if stack else "auto"
    if isinstance(workspace, str):
        if workspace != "auto":
            raise ValueError(
                f"workspace: expected a positive whole number of bytes, a Workspace or 'auto', got {workspace!r}"
            )
        workspace = DEFAULT_WORKSPACE if shared else auto_workspace(free_bytes(device))
    if isinstance(workspace, Workspace):
        return workspace.size, workspace.key
    check_size(workspace)
    return workspace, 0


def of_key(key: int) -> Workspace | None:
    """The workspace that a call names; None where it has none, or it is gone."""
    return _alive.get(key)
