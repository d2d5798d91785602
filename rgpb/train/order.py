"""The order of the data: one for any number of ranks, each of which takes its share of every batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Dataset, Sampler

from rgpb.train.ranks import Ranks

FILLER = "filler"  # the key of a batch that only keeps a rank in step: it counts for nothing


class Order(Sampler[list[int]]):
    """Each batch of all ranks together: numbers of units.

    The order of an epoch is that of Trainer in one process (accelerate's `SeedableRandomSampler`).

    Args:
        count: units of the data.
        batch_size: of all ranks together.
        seed: of the order; None: as the data comes.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = 0
        self.sampler = self  # where accelerate's loader looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        if self.seed is not None:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for first in range(0, self.count, self.batch_size):
            yield order[first : first + self.batch_size]

    def first(self, batches: int) -> Iterator[list[int]]:
        """So many batches of the first epochs, but no unit's second one."""
        return itertools.islice(Order(self.count, self.batch_size, self.seed), batches)


class _Shares(Dataset[Any]):
    """This rank's share of a batch: its units, and whether they count. Where it has none, the batch's first unit keeps
    it in step. Data with `units_of` has any number of units in each place."""

    def __init__(self, data: Any, ready: Callable[[Sequence[int]], None], ranks: Ranks) -> None:
        self.data, self.ready, self.ranks = data, ready, ranks

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, places: list[int]) -> tuple[list[Any], bool]:
        self.ready(places)
        units_of = getattr(self.data, "units_of", lambda place: [self.data[place]])
        units = [unit for place in self.ranks.share(places) for unit in units_of(place)]
        return units or [self.data[places[0]]], bool(units)


def loader(
    data: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    order: Order,
    ready: Callable[[Sequence[int]], None],
    ranks: Ranks,
    device: torch.device,
) -> DataLoaderShard:
    """Batches of this rank, on its device, fetched one ahead.

    Args:
        ready: called with the units of all ranks before a batch of them is made.
    """

    def made(share: tuple[list[Any], bool]) -> dict[str, Any]:
        units, counts = share
        return {**collate(units), FILLER: torch.tensor(not counts)}

    return DataLoaderShard(
        _Shares(data, ready, ranks),
        device=device,
        batch_sampler=order,
        collate_fn=made,
        pin_memory=device.type == "cuda",
    )
