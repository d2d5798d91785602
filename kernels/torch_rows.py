"""The row kernels in plain torch operations: any device, float32 and float64.

Forward, per row with target y:
    z ← cap · tanh(scale · (z + b) / cap)
    lse_other = log Σ_{k≠y} exp(z_k)        H_o = lse_other − Σ_{k≠y} q_k z_k,  q_k = exp(z_k − lse_other)
Everything a loss needs follows from (z_y, lse_other, H_o): λ = z_y − lse_other, log p = logsigmoid(λ).

Vector-Jacobian product, for upstream gradients g_zy, g_lo, g_ho of these three:
    ∂L/∂z_y = g_zy        ∂L/∂z_k = q_k · (g_lo − g_ho · (H_o + log q_k)),  k ≠ y
times J_k = (1 − (z_k/cap)²) · scale for the raw product. Nothing here cancels as p → 1: hence the log-odds form.

A buffer of logits becomes E, and the gradients are D = diag(r) · E: the factor r of a row is left to the [C, H] sides
of the products, which spares a pass over [C, V]. Weights E_k = exp(z_k − max) go in the same pass as the statistics.

Dimensions: C rows of the buffer, V vocabulary (or a slice of it), R rows of a block that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rgpb.kernels import devices
from rgpb.kernels.rows import RowSet
from rgpb.kernels.types import (
    LARGEST_HALF_RATIO,
    LARGEST_RATIO,
    Chunk,
    Epilogue,
    Statistics,
    Upstream,
    Weighed,
)

# Size of one block of rows, and of each of at most four scratch buffers: what passes over a block costs a read of the
# cache.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def block_rows(vocab: int, itemsize: int, device_type: str) -> int:
    """R, the rows of one block."""
    return max(1, BLOCK_BYTES.get(device_type, BLOCK_BYTES["cuda"]) // (vocab * itemsize))


def statistics_(
    z_CV: Tensor,
    target_C: Tensor,
    epilogue: Epilogue,
    entropy: bool,
    out: Tensor | None = None,
    masses: Tensor | None = None,
    tile: int = 0,
) -> tuple[Statistics, Tensor]:
    """The statistics, and Σ E_k [C]. Products become weights J_k E_k, 0 at the target, in place or in `out`.

    In `out` the weights are normalised (their sum is 1), since a sum over V is beyond float16.

    Args:
        out: [C, V] view of 16-bit elements over the first half of each row's own bytes, or None.
        masses: [C, ⌈V / tile⌉] to be filled with the softmax mass over the other tokens of each `tile` columns.
    """
    columns = [z_CV.new_empty(len(z_CV)) for _ in range(4 if entropy else 3)]
    scratch = _scratch(z_CV)
    for rows in _blocks(z_CV):
        z, y = z_CV[rows], target_C[rows, None]
        apply_(z, epilogue)
        z_y = z.gather(1, y)
        z.scatter_(1, y, -torch.inf)
        top = z.amax(1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)  # no other token, or none that is possible
        shifted = torch.sub(z, top, out=scratch[: len(z)])
        jacobian = None if epilogue.softcap is None else epilogue.jacobian(z.scatter_(1, y, 0))
        weights = torch.exp(shifted, out=z)
        total = weights.sum(1)
        columns[0][rows] = z_y.squeeze(1)
        columns[1][rows] = top.squeeze(1) + total.log()
        columns[2][rows] = total
        if entropy:
            if epilogue.bias is None:
                shifted.scatter_(1, y, 0)  # 0 · −inf at the target,
            else:
                shifted.clamp_(min=torch.finfo(z.dtype).min)  # and at tokens that the bias rules out
            mean = shifted.mul_(weights).sum(1) / total
            columns[3][rows] = torch.where(total > 0, total.log() - mean, 0)
        if masses is not None:
            for at in range(masses.shape[1]):
                masses[rows, at] = weights[:, at * tile : (at + 1) * tile].sum(1)
            masses[rows] /= torch.where(total > 0, total, 1)[:, None]
        if jacobian is not None:
            weights.mul_(jacobian)
        elif epilogue.scale != 1.0:
            weights.mul_(epilogue.scale)
        if out is not None:
            out[rows] = weights.div_(total.clamp(min=1)[:, None]).to(
                out.dtype
            )  # complete before the write into the same bytes
    z_y, lse_other, total = columns[:3]
    return Statistics(z_y, lse_other, columns[3] if entropy else None), total if out is None else torch.ones_like(total)


def weights_(
    z_CV: Tensor, statistics: Statistics, upstream: Upstream, epilogue: Epilogue, out: Tensor | None = None
) -> Tensor:
    """Products become weights J_k q_k (with g_ho: the gradients themselves) from known statistics; returns r for them.

    The target's own entry may hold anything afterwards.
    """
    lse_other = torch.where(statistics.lse_other == -torch.inf, 0, statistics.lse_other)  # no other token: every q is 0
    scratch = _scratch(z_CV)
    g_lo, g_ho, h_o = upstream.g_lo, upstream.g_ho, statistics.h_o
    for rows in _blocks(z_CV):
        z = z_CV[rows]
        apply_(z, epilogue)
        jacobian = epilogue.jacobian(z)
        z.sub_(lse_other[rows, None])
        if g_ho is not None and h_o is not None:
            log_q = torch.clamp(z, min=torch.finfo(z.dtype).min / 2, out=scratch[: len(z)])  # 0 · −inf
            factor = log_q.add_(h_o[rows, None]).mul_(-g_ho[rows, None]).add_(g_lo[rows, None])
            z.exp_().mul_(factor)
        else:
            z.exp_()
        if not isinstance(jacobian, float) or jacobian != 1.0:
            z.mul_(jacobian)
        if out is not None:
            out[rows] = z.to(out.dtype)
    return g_lo if g_ho is None else torch.ones_like(g_lo)


def gradients_(
    z_CV: Tensor,
    target_C: Tensor,
    scores: Statistics,
    upstream: Upstream,
    epilogue: Epilogue,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Raw products → (E, r) with D = diag(r) E, from known statistics; in place or in `out`, as `statistics_`.

    A negative target lies in another slice of the vocabulary.
    """
    r = weights_(z_CV, scores, upstream, epilogue, out)
    e = z_CV if out is None else out
    return e, with_target_(e, target_C, r, upstream.g_zy * epilogue.jacobian(scores.z_y))


def with_target_(weights_CV: Tensor, target_C: Tensor, r: Tensor, g_y: Tensor) -> Tensor:
    """Put the target's entry in place so that D = diag(r) · E; returns r, changed where the target's gradient dwarfs
    the others'.

    Args:
        weights_CV: float32, float64 or 16-bit weights.
        target_C: the target's column, or −1 where it lies in another slice of the vocabulary.
        r: factor of a row of weights, [C].
        g_y: ∂L/∂z_y · J_y, [C].
    """
    largest = LARGEST_HALF_RATIO if weights_CV.dtype == torch.float16 else LARGEST_RATIO
    alone = g_y.abs() > largest * r.abs()
    if devices.kind(weights_CV.device) != "cpu" or bool(alone.any()):  # to ask a GPU is to wait for it
        weights_CV.masked_fill_(alone[:, None], 0)
        r = torch.where(alone, 1, r)
    at = torch.arange(len(r), device=r.device), target_C.clamp(min=0)  # `scatter_` would copy rows with room behind
    ratio = torch.where(g_y == 0, 0, g_y / r).to(weights_CV.dtype)
    weights_CV[at] = torch.where(target_C >= 0, ratio, weights_CV[at])
    return r


def apply_(z: Tensor, epilogue: Epilogue) -> None:
    """Raw products → logits, in place. [R, V]."""
    bias, cap, scale = epilogue
    if bias is not None:
        z.add_(bias)
    if scale != 1.0:
        z.mul_(scale)
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)


def _blocks(z_CV: Tensor) -> Iterator[slice]:
    step = block_rows(z_CV.shape[1], z_CV.element_size(), z_CV.device.type)
    for start in range(0, len(z_CV), step):
        yield slice(start, start + step)


def _scratch(z_CV: Tensor) -> Tensor:
    rows = min(len(z_CV), block_rows(z_CV.shape[1], z_CV.element_size(), z_CV.device.type))
    return z_CV.new_empty(rows, z_CV.shape[1])


class TorchRows(RowSet):
    """The kernel set of plain torch operations."""

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        statistics, masses, _ = self.weigh(chunk, entropy, mass_tile)
        return statistics, masses

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        z, out = self.logits(chunk), self.narrow(chunk)
        masses = None if mass_tile is None else z.new_empty(len(z), -(-z.shape[1] // mass_tile))
        statistics, total = statistics_(z, chunk.y, chunk.epilogue, entropy, out, masses, mass_tile or 0)
        return statistics, masses, Weighed(z if out is None else out, total)

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor]:
        return from_weights_(chunk, weighed, statistics, upstream)

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor]:
        z = self.logits(chunk)
        return gradients_(z, chunk.y, statistics, upstream, chunk.epilogue, self.narrow(chunk))


def from_weights_(chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """(E, r) from weights and their sum: `pull_back` of the sets whose sweep leaves weights behind."""
    e, total, _ = weighed
    assert total is not None
    r = torch.where(total > 0, upstream.g_lo / total, 0)
    return e, with_target_(e, chunk.y, r, upstream.g_zy * chunk.epilogue.jacobian(statistics.z_y))
