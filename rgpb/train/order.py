"""The order of the data: one for any number of ranks, each of which takes its share of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Dataset, Sampler

from rgpb.train.ranks import Ranks

FILLER = "filler"  # the key of a batch that only keeps a rank in step: it counts for nothing


class Shares(Sampler[list[int]]):
    """This rank's part of each batch: numbers of units; where that is none, −1 − the batch's first unit.

    The order of an epoch is the one of Trainer in one process (accelerate's `SeedableRandomSampler`).

    Args:
        count: units of the data.
        batch_size: of all ranks together.
        seed: of the order; None: as the data comes.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, ranks: Ranks) -> None:
        self.count, self.batch_size, self.seed, self.ranks = count, batch_size, seed, ranks
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
            whole = order[first : first + self.batch_size]
            yield list(self.ranks.share(whole)) or [-1 - whole[0]]


class _Numbered(Dataset[Any]):
    """Units by the numbers of `Shares`: (unit, whether it counts)."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[Any, bool]:
        return (self.data[number], True) if number >= 0 else (self.data[-1 - number], False)


def loader(
    data: Any, collate: Callable[[Sequence[Any]], dict[str, Any]], shares: Shares, device: torch.device
) -> DataLoaderShard:
    """Batches of this rank, on its device, fetched one ahead."""

    def made(units: list[tuple[Any, bool]]) -> dict[str, Any]:
        return {**collate([unit for unit, _ in units]), FILLER: torch.tensor(not units[0][1])}

    return DataLoaderShard(
        _Numbered(data), device=device, batch_sampler=shares, collate_fn=made, pin_memory=device.type == "cuda"
    )
