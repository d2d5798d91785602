"""Certified skipping: what the gradients may leave out while the logits are at hand, and a bound on what that costs.

Off the target |∂L/∂z_k| = |g| q_k, with q the softmax over the other tokens and g the row's coefficient, so the L1 norm
of what is left out of a row is exactly |g| times the mass left out. A sweep gives each row's mass per tile of the
vocabulary. For each row the tiles of least mass are left out as long as together they stay within

    budget = tolerance · max |g| over the rows of the same response

or, where the coefficients aren't known yet, tolerance · |g| of the row itself. A tile with the row's target is kept.
The products dX = D W and dW = Dᵀ X then take of each tile only the rows that count for it: 1 + 2 (1 − s) units, where
the share s of all (row, tile) pairs is left out.

From a row's bound b, with x the row of hidden and w a row of the head: the row of dX is off by at most b · max ‖w‖, and
dW by at most Σ b ‖x‖ over the rows, in the Euclidean norm.

Tiles leave out most where tokens that are probable together lie together. `order_by_logits` finds such an order.

Dimensions: P positions, C rows of a chunk, T tiles of S columns, V vocabulary, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.kernels.types import Statistics, Upstream

# A mass carries the rounding of its sum and that of float32 logits, which grows with them. The bound allows for both:
# so much of itself, and so much for each unit of the largest logit (8 spacings of float32).
ROUNDING, SPACING = 1e-3, 1e-6
# Tiles for which more of the rows count are multiplied whole: picking rows would cost more than it saves.
DENSE = 0.8
# Bytes of a row and a tile while it is chosen what counts: masses sorted, their places, sums.
CHOICE_BYTES = 24
# Tiles whose rows are read back from the device at once.
READ_TOGETHER = 16
# Rows that an order is estimated from, and steps to a direction that tokens differ in most.
SAMPLE_ROWS, STEPS = 64, 4
# Copies of their logits that are held on the way.
SAMPLE_COPIES = 4


class Skipped(NamedTuple):
    """What the gradients of a call left out. NaN until the backward has run where coefficients are known only there
    (and under `torch.compile`).

    Attributes:
        bound: float32 [P], an upper bound of the L1 norm of what is left out of each row of ∂L/∂logits.
        share: of all (row, tile) pairs that aren't masked, how many were left out.
    """

    bound: Tensor
    share: Tensor

    @classmethod
    def read(cls, report: Tensor) -> Skipped:
        """Views of the operator's report, [P + 1]."""
        return cls(report[:-1], report[-1])


def largest_of_response(g: Tensor, lengths: Tensor | None) -> Tensor:
    """max |g| over the rows of the same response, [C]; of the row itself without `lengths`, [B] rows of each."""
    g = g.abs()
    if lengths is None:
        return g
    response = torch.repeat_interleave(lengths, output_size=len(g))
    return g.new_zeros(len(lengths)).scatter_reduce_(0, response, g, "amax")[response]


def choose(
    masses: Tensor, tile_of_target: Tensor, statistics: Statistics, upstream: Upstream, largest: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which tiles count for which rows, bool [C, T], and each row's bound, float32 [C].

    Args:
        masses: [C, T]. Overwritten.
        tile_of_target: int64 [C].
        statistics, upstream: [C].
        largest: [C], from `largest_of_response`.
    """
    g = upstream.g_lo.abs()
    finite = torch.where(statistics.lse_other == -torch.inf, 0, statistics.lse_other)
    z_y = torch.where(statistics.z_y.isfinite(), statistics.z_y, 0)  # a bias may rule the target out
    slack = 1 + ROUNDING + SPACING * torch.maximum(finite.abs(), z_y.abs())
    # in units of the row's own coefficient; finite, so that the target's tile is beyond; an overflow stays to be seen
    budget = torch.where(g > 0, tolerance * largest / g, torch.inf).clamp(max=torch.finfo(g.dtype).max)
    budget = torch.where(largest < torch.inf, budget / slack, 0)
    own = tile_of_target[:, None]
    kept = torch.where(upstream.g_zy[:, None] == 0, masses.gather(1, own), torch.inf)  # NaN is kept
    cost, index = masses.scatter_(1, own, kept).sort(1)
    left_out = cost.cumsum(1) <= budget[:, None]
    bound = torch.where(left_out, cost, 0).sum(1) * slack * g
    return torch.empty_like(left_out).scatter_(1, index, ~left_out), bound.float()


def tiles_and_rows(active: Tensor, vocab: int, tile: int, most: int) -> Iterator[tuple[slice, Tensor | None]]:
    """(columns, rows that count for them, int64, or None for all), without tiles that nothing counts for.

    Args:
        active: bool [C, T].
        tile: S.
        most: columns that neighbours of which all rows are taken are put together to.
    """
    counts = active.sum(0).tolist()
    rows = active.t().nonzero()[:, 1].split(counts)
    dense = [count >= DENSE * len(active) for count in counts]
    at = 0
    while at < len(counts):
        end = at + 1
        while dense[at] and end < len(counts) and dense[end] and (end + 1 - at) * tile <= most:
            end += 1
        if counts[at]:
            yield slice(at * tile, min(end * tile, vocab)), None if dense[at] else rows[at]
        at = end


def rows_of_tiles(active: Tensor) -> Callable[[int], Tensor]:
    """For each tile the positions that count for it. active: bool [P, T]"""
    found: dict[int, Tensor] = {}

    def rows_of(tile: int) -> Tensor:
        if tile not in found:
            found.clear()
            tiles = range(tile, min(tile + READ_TOGETHER, active.shape[1]))
            some = active[:, tiles.start : tiles.stop].t()
            found.update(zip(tiles, some.nonzero()[:, 1].split(some.sum(1).tolist())))
        return found[tile]

    return rows_of


def order_by_logits(z: Tensor, tile: int) -> Tensor:
    """The vocabulary in an order that has tokens which are probable together in one tile, int64 [V].

    The tokens are split in two across the direction in which their probabilities on the sampled rows differ most, and
    each half again, down to single tiles: first apart go frequent and rare ones, then those of different contexts.
    Tiles come by falling mass. Any order is right; a good one leaves out more.

    Args:
        z: logits of sampled rows, float32 or float64 [R, V]. Overwritten.
        tile: S.
    """
    log_q = z.sub_(z.logsumexp(1, keepdim=True))
    mass = log_q.exp().sum(0)
    features = log_q.clamp_(min=-1e3).div_(8).exp_().t()  # of the range that matters, neither q nor log q
    start = torch.linspace(-1, 1, features.shape[1], dtype=z.dtype, device=z.device)
    groups = [torch.arange(len(features), device=z.device)]
    while any(len(group) > tile for group in groups):
        groups = [half for group in groups for half in _halves(features, group, tile, start)]
    groups.sort(key=lambda group: -mass[group].sum().item() / len(group))
    groups.sort(key=lambda group: len(group) < tile)  # a tile that isn't whole is the last one
    return torch.cat(groups)


def _halves(features: Tensor, group: Tensor, tile: int, start: Tensor) -> list[Tensor]:
    """A group in two, by the direction of largest variance; the first has whole tiles."""
    if len(group) <= tile:
        return [group]
    some = features[group]
    some = some - some.mean(0)
    direction = start
    for _ in range(STEPS):
        direction = some.t() @ (some @ direction)
        direction = direction / direction.norm().clamp(min=torch.finfo(some.dtype).tiny)
    place = (some @ direction).argsort(descending=True, stable=True)
    half = -(-len(group) // tile) // 2 * tile
    return [group[place[:half]], group[place[half:]]]
