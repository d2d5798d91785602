"""The processes of a run: what all of them know, who writes, and which of them is missing.

`--batch-size` is that of all processes together: each takes its share of every batch, so that a step is the same step
on any number of them.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rgpb.arguments import told

T = TypeVar("T")

ROLL_CALL = 5.0  # seconds in which a rank that is there answers when a collective has failed
HEAD_START = 3.0  # seconds that rank 0 has to report what all ranks refuse alike


class ElsewhereError(RuntimeError):
    """What another rank has raised, and reports."""


class Ranks:
    """The processes of a run, this one among them.

    Attributes:
        rank, world: this one's number, and how many there are.
        group: for small values of the CPU; None where there is one process.
        doing: what is under way, for messages.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world, self.group, self.doing = rank, world, group, "the start"

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on all ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, value: int) -> int:
        """The sum over all ranks."""
        if self.alone:
            return value
        whole = torch.tensor(value)
        dist.all_reduce(whole, group=self.group)
        return int(whole)

    def add_up(self, values: Sequence[torch.Tensor]) -> None:
        """Put the sum over all ranks into tensors on the CPU."""
        for value in () if self.alone else values:
            dist.all_reduce(value, group=self.group)

    def by_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; none goes on before it is made.

        Raises:
            ElsewhereError: on the others, where rank 0 failed.
        """
        if self.alone:
            return make()
        made: list[Any] = [None]
        if self.first:
            try:
                made = [(True, make())]
            except Exception as error:
                dist.broadcast_object_list([(False, f"{type(error).__name__}: {error}")], src=0, group=self.group)
                raise
        dist.broadcast_object_list(made, src=0, group=self.group)
        fine, value = made[0]
        if not fine:
            raise ElsewhereError(f"rank 0: {value}")
        return value

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of a batch: parts differ by one at most, and in the ranks' order they are the whole."""
        n = len(items)
        return items[self.rank * n // self.world : (self.rank + 1) * n // self.world]


ALONE = Ranks()


def processes() -> int:
    """How many there are, as the launcher says; no process group is needed to know."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """This process's number, as the launcher says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def open_ranks(device: torch.device, timeout: float) -> Ranks:
    """Join the process group, or take the one that is there.

    Args:
        device: of this rank's model.
        timeout: seconds until a rank that doesn't come counts as missing.
    """
    if processes() == 1:
        return ALONE
    patience = timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, world = _meet(timeout)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    whole = device.type == "cpu" and dist.get_backend() == "gloo"
    group = dist.group.WORLD if whole else dist.new_group(backend="gloo", timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def _meet(timeout: float) -> tuple[dist.Store, int, int]:
    """A store that the ranks of this start alone know, this one's number, and how many there are.

    torchrun keeps one store over its restarts, and in it the addresses of ranks that are gone (pytorch/pytorch#135712).
    Who reads one is refused, or waits for five times the timeout, as gloo does while it connects. So rank 0 makes up a
    name, and says it in answer to questions that the others make up. What is left over answers none.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    name = uuid.uuid4().hex
    if rank:
        store.set(f"rgpb/question/{rank}", name)
        name = store.get(f"rgpb/answer/{name}").decode()  # waits for it
        store.set(f"rgpb/heard/{name}/{rank}", "")
    absent, deadline = set() if rank else {*range(1, world)}, time.monotonic() + timeout
    while absent:
        for other in sorted(absent):
            if store.check([f"rgpb/heard/{name}/{other}"]):
                absent.remove(other)
            elif store.check([f"rgpb/question/{other}"]):
                store.set(f"rgpb/answer/{store.get(f'rgpb/question/{other}').decode()}", name)
        if absent and time.monotonic() > deadline:
            raise RuntimeError(f"{_named(sorted(absent))} missing at the start: silent for {timeout:g} s (--timeout)")
        time.sleep(0.01)
    return dist.PrefixStore(f"rgpb/start/{name}", store), rank, world


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def close_ranks() -> None:
    """Leave the process group, once all is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def missing(ranks: Ranks) -> list[int]:
    """Ranks that don't answer, after a collective has failed: those that hang or are gone."""
    store: Any = dist.distributed_c10d._get_default_store()
    names = [f"rgpb/here/{rank}" for rank in range(ranks.world)]
    store.set(names[ranks.rank], "1")
    deadline = time.monotonic() + ROLL_CALL
    while True:
        absent = [rank for rank, name in enumerate(names) if not store.check([name])]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.05)


def report_failure(error: BaseException, ranks: Ranks | None, timeout: float) -> None:
    """Say once, of all ranks, what went wrong.

    Args:
        error: what this rank has raised.
        ranks: None where the process group wasn't joined yet.
        timeout: as given to `open_ranks`.
    """
    name = ""
    if not dist.is_initialized() or ranks is None:
        if own_rank():
            time.sleep(HEAD_START)  # what all refuse is reported by rank 0, and the launcher then stops the others
            name = f"rank {own_rank()}: "
    else:
        if isinstance(error, ElsewhereError):
            return
        try:
            lost = isinstance(error, RuntimeError) and _is_collective(error)
            absent = missing(ranks) if lost else []
            store: Any = dist.distributed_c10d._get_default_store()
            if store.add("rgpb/failed", 1) > 1:
                return
        except Exception:  # the store is gone, with the rank that kept it
            absent = [0]
        if absent:
            text = f"{_named(absent)} missing in {ranks.doing}: gone, or silent for {timeout:g} s (--timeout)"
            print(f"rgpb: error: {text}; start again to go on after the last checkpoint", file=sys.stderr, flush=True)
            return
        name = f"rank {ranks.rank}: "
    if isinstance(error, ValueError | ModuleNotFoundError | FloatingPointError | OSError):
        print(f"rgpb: error: {name}{told(error)}", file=sys.stderr, flush=True)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"{name}{text}", file=sys.stderr, flush=True)


def _is_collective(error: BaseException) -> bool:
    """Whether an error comes from a collective that another rank did not end."""
    text = str(error).lower()
    known = ("gloo", "nccl", "timed out", "connection closed", "connection reset", "broken pipe", "recv", "barrier")
    return isinstance(error, dist.DistError) or any(word in text for word in known)
