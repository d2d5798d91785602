"""Certified skipping: what the head's gradient may leave out, and a bound on what that costs.

Off the target |∂L/∂z_k| = |g| q_k, with q the softmax over the other tokens and g the row's coefficient, so the L1 norm
of what is left out of a row is exactly |g| times the mass left out. The first sweep keeps each row's mass per tile of
the vocabulary. For each row the tiles of least mass are left out as long as together they stay within

    budget = tolerance · max over rows |g|

A tile with the row's target is kept. What is left out is neither recomputed nor multiplied: a tile of dW is a product
over the rows that count for it. Only dW (and the bias' gradient) is affected; dX comes whole from the first sweep.

Dimensions: P positions, T tiles of MASS_TILE columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.engine import plan
from rgpb.engine.products import Problem
from rgpb.kernels.types import Statistics, Upstream

# A mass carries the rounding of its sum and that of float32 logits, which grows with them. The bound allows for both:
# so much of itself, and so much for each unit of the largest logit (8 spacings of float32).
ROUNDING, SPACING = 1e-3, 1e-6
# Masses sorted at a time, and what each takes for that.
BLOCK, BLOCK_ENTRY = 1 << 22, 64
# Tiles whose rows are read back from the device at once.
READ_TOGETHER = 16


class Skipped(NamedTuple):
    """What a backward left out; NaN until it has run (and under `torch.compile`).

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


def choose(
    p: Problem, masses: Tensor, statistics: Statistics, upstream: Upstream, tolerance: float, report: Tensor
) -> Callable[[int], Tensor]:
    """For each tile the positions that count for it; fills the report.

    Args:
        p: with its targets in the order that the masses are in.
        masses: [P, T]; 0 at ignored positions.
        statistics, upstream: [P].
        report: [P + 1].
    """
    target, kept = p.target, p.target != p.call.ignore_index
    g = torch.where(kept, upstream.g_lo.abs(), 0).double()
    g_y = torch.where(kept, upstream.g_zy, 0)
    largest = g.max() if len(g) else g.sum()
    budget = torch.where(largest < torch.inf, tolerance * largest, 0)  # an overflow stays to be seen
    finite = torch.where(statistics.lse_other == -torch.inf, 0, statistics.lse_other)
    slack = 1 + ROUNDING + SPACING * torch.maximum(finite.abs(), statistics.z_y.abs()).double()
    active = torch.empty(masses.shape, dtype=torch.bool, device=masses.device)
    step = max(1, min(BLOCK, p.call.workspace // BLOCK_ENTRY) // max(masses.shape[1], 1))
    for start in range(0, len(target), step):
        rows = slice(start, start + step)
        cost = masses[rows].to(torch.float64, copy=True).mul_((g * slack)[rows, None])
        tile = torch.where(kept[rows], target[rows] // plan.MASS_TILE, 0)[:, None]
        own = torch.where(g_y[rows, None] == 0, cost.gather(1, tile), torch.inf)  # NaN is kept
        cost.scatter_(1, tile, own)
        cost, index = cost.sort(1)
        left_out = cost.cumsum(1) <= budget
        report[:-1][rows] = torch.where(left_out, cost, 0).sum(1)
        active[rows] = torch.empty_like(left_out).scatter_(1, index, ~left_out)
    active &= kept[:, None]
    counted = kept.sum() * masses.shape[1]
    report[-1] = 1 - active.sum() / counted.clamp(min=1)

    found: dict[int, Tensor] = {}

    def rows_of(tile: int) -> Tensor:
        if tile not in found:
            found.clear()
            tiles = range(tile, min(tile + READ_TOGETHER, active.shape[1]))
            some = active[:, tiles.start : tiles.stop].t()
            found.update(zip(tiles, some.nonzero()[:, 1].split(some.sum(1).tolist())))
        return found[tile]

    return rows_of
