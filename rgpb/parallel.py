"""Ranks that share a call: the shards of a head, groups for sequences and batches, and the collectives between them.

Three kinds of groups, each of its own ranks:

    head        each rank has some rows of the LM head, and all have the same tokens       `VocabShard`
    sequence    each rank has some tokens of the same responses                            `sequence_group=`
    data        each rank has other responses of one batch                                 `data_group=`

Every rank of a group has to make the same calls in the same order.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size, B responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VocabShard(NamedTuple):
    """Which rows of the whole head [V, H] a rank has: those from `start` on. `of` makes it.

    Attributes:
        group: the ranks that hold the head together; in the order of their rows.
        start: the first row of this rank.
        vocab: V of the whole head.
    """

    group: ProcessGroup
    start: int
    vocab: int

    @staticmethod
    def of(group: ProcessGroup, rows: int) -> VocabShard:
        """The shard of a rank with `rows` rows, from the rows of all ranks: one all-gather.

        Raises:
            ValueError: not a group of this rank, or a rank without rows: the same error on each.
        """
        check_group("group", group)
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, torch.tensor(rows, dtype=torch.int64, device=device), group=group)
        every = [int(count) for count in counts]
        if min(every) < 1:
            raise ValueError(f"rows: expected at least 1 on each rank, got {every}")
        return VocabShard(group, sum(every[: dist.get_rank(group)]), sum(every))


def check_group(name: str, group: object) -> None:
    """Refuse what isn't a group of ranks that this one belongs to."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"{name}: expected a torch.distributed process group that this rank belongs to, got {type(group).__name__}"
        )


def ranks_of(group: ProcessGroup | None) -> int:
    """How many ranks a group has; 1 for none."""
    return 1 if group is None else dist.get_world_size(group)


# -- collectives ------------------------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """All ranks compute the same from the sum, so each one's own part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def all_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Σ of the ranks' x, the same on each. Its gradient goes to each rank's own x as it is."""
    return x if group is None else _Sum.apply(x, group)


@torch.no_grad()
def all_max(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest of the ranks' x, element by element; without gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def from_first(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """What the first rank of the group has, on each: bool, any shape."""
    if group is None:
        return x
    sent = x.to(torch.uint8, memory_format=torch.contiguous_format, copy=True)
    dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
    return sent.bool()


class _Before(torch.autograd.Function):
    """The sum of the ranks before; a rank's own x has the gradients of the ranks behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)[: dist.get_rank(group)].sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradients[0], ctx.group)[dist.get_rank(ctx.group) + 1 :].sum(0), None


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """Those of all ranks, one below the other."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def sum_before(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Σ of the x of the ranks before this one in the group; 0 on the first."""
    return torch.zeros_like(x) if group is None else _Before.apply(x, group)


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def gradient_times(x: Tensor, factor: int) -> Tensor:
    """x itself, its gradient times `factor`."""
    return x if factor == 1 else _Times.apply(x, factor)


class _Entering(torch.autograd.Function):
    """Some rows of hidden states [P, H], the same on each rank, which each then multiplies with rows of its own.

    Backward: the ranks' gradients are summed as they are, and rounded to the hidden states' type once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor | None, dtype: torch.dtype, group: ProcessGroup) -> Tensor:
        ctx.index, ctx.group, ctx.shape, ctx.dtype = index, group, hidden.shape, hidden.dtype
        rows = hidden if index is None else hidden[index]
        return rows.view_as(rows) if rows.dtype == dtype else rows.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradients[0].contiguous()  # made for this edge alone, so it is summed in place
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        if ctx.index is None:
            return total.to(ctx.dtype), None, None, None
        whole = total.new_zeros(ctx.shape, dtype=ctx.dtype)
        whole[ctx.index] = total.to(ctx.dtype)
        return whole, None, None, None


def entering(hidden: Tensor, index: Tensor | None, dtype: torch.dtype, group: ProcessGroup) -> Tensor:
    """Rows `index` (None: all) of hidden [P, H] in `dtype`; their gradient is summed over the group in it. [N, H]"""
    return _Entering.apply(hidden, index, dtype, group)
