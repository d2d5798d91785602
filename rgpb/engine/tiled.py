"""The tiled engine: E by Triton tile kernels that hold logits in registers only.

The loops are those of `chunked`. In the first sweep E = J exp(z − shift) is written relative to a shift known before
the row is: the maximum over its first tile, one of the row's own logits unless no token of that tile is possible. A row
that ends far from it is noticed from its sums, and its chunk is swept again relative to the true logsumexp.

Dimensions: P positions, C rows of a chunk, V vocabulary, T tiles of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgpb.engine import plan
from rgpb.engine.chunked import Products, Rows, fill, inside
from rgpb.kernels import configs, triton_rows, triton_tiles
from rgpb.kernels.torch_rows import Statistics, Upstream
from rgpb.kernels.triton_tiles import Partials

# How far a row's logsumexp may lie from the shift: e⁴⁰ times the largest ratio of a target's coefficient to the others'
# (torch_rows.LARGEST_RATIO) is 2e33, inside the range of float32 and bfloat16 also after a product with the weight.
LARGEST_RISE = 40.0


class Tiles(Products):
    """As `Products`, without logits in memory; the buffer holds E in the operands' dtype."""

    def empty(self, rows: int, score_only: bool) -> Tensor:
        return self.padded(0 if score_only else rows, self.dtype)

    def score(self, rows: Rows, into: Statistics, keep: bool, masses: Tensor | None = None) -> None:
        x, y, entropy = self.inputs(rows), self.p.target[rows], into.h_o is not None
        if not keep:
            scores = self._sweep(x, y, entropy, None, None, masses, rows)[0]
        else:
            shift, e = self._first_maximum(x, y), self.buffer[: len(x)]
            scores, total = self._sweep(x, y, entropy, shift, e, masses, rows)
            # one number read back per chunk; a row whose first tile has no possible token may also lie far below
            if not bool(((scores.lse_other - shift).abs() < LARGEST_RISE).all()):
                true = self._sweep(x, y, False, None, None, None, rows)[0].lse_other
                shift = torch.where(true == -torch.inf, 0, true)
                scores, total = self._sweep(x, y, entropy, shift, e, masses, rows)
            self.at_hand = e, total
        fill(into, scores, rows)

    def gradient(self, rows: Rows, scores: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        e, total = self.at_hand
        assert total is not None
        r = torch.where(total > 0, upstream.g_lo / total, 0)
        g_y = upstream.g_zy * self.epilogue.jacobian(scores.z_y)
        return e, triton_rows.with_target_(e, self.p.target[rows], r, g_y, total)

    def again(self, rows: Rows, scores: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        x, y = self.inputs(rows), self.p.target[rows]
        e = self.buffer[: len(x)]
        r = None
        for part, weight in self.weight():
            epilogue = self.epilogue.slice(part.start, part.stop)
            r = triton_tiles.gradients(
                x, weight, inside(y, part), scores, upstream, epilogue, e[:, part], self._room(part)
            )
        return e, r

    def _first_maximum(self, x: Tensor, y: Tensor) -> Tensor:
        """The largest logit of each row's first tile, the target's aside. [C]"""
        _, weight = next(self.weight())
        first = slice(0, min(len(weight), self._block(x, "score")))
        partials = Partials.empty(x, 1, len(x), self.p.acc_dtype, True, False)
        z_y = torch.empty_like(partials.total[0])
        triton_tiles.score(x, weight[first], inside(y, first), self.epilogue.slice(0, first.stop), z_y, partials)
        return partials.top[0]  # type: ignore[index]

    def _sweep(
        self, x: Tensor, y: Tensor, entropy: bool, shift: Tensor | None, e: Tensor | None, masses: Tensor | None,
        rows: Rows,
    ) -> tuple[Statistics, Tensor]:  # fmt: skip
        """Statistics, and Σ exp(z − shift); with a shift also E."""
        block = self._block(x, "score" if e is None else "weights")
        step = len(self.converted) if self.sizes.convert else self.sizes.vocab
        each = [-(-min(step, self.sizes.vocab - start) // block) for start in range(0, self.sizes.vocab, step)]
        partials = Partials.empty(x, sum(each), len(x), self.p.acc_dtype, shift is None, entropy)
        z_y = x.new_zeros(len(x), dtype=self.p.acc_dtype)
        done = 0
        for (part, weight), tiles in zip(self.weight(), each):
            out, epilogue = None if e is None else e[:, part], self.epilogue.slice(part.start, part.stop)
            these = partials.tiles(done, done + tiles)
            triton_tiles.score(x, weight, inside(y, part), epilogue, z_y, these, shift, out, self._room(part))
            done += tiles
        lse_other, h_o, total = triton_tiles.merge(partials, shift, entropy)
        if masses is not None:
            if plan.MASS_TILE % block or (len(each) > 1 and step % plan.MASS_TILE):
                raise ValueError(
                    f"workspace: expected room for {plan.MASS_TILE} converted rows of the weight with grad_tolerance "
                    f"on the tiled engine, got {self.p.workspace}; the chunked engine takes less"
                )
            masses[rows] = triton_tiles.masses(partials, shift, lse_other, plan.MASS_TILE // block)
        return Statistics(z_y, lse_other, h_o), total

    def inputs(self, rows: Rows) -> Tensor:
        return super().inputs(rows).contiguous()  # kernels read along H

    def _room(self, part: slice) -> int | None:
        """The last part may run over into the rows' padding."""
        return self.sizes.room - part.start if part.stop == self.sizes.vocab else None

    def _block(self, x: Tensor, kernel: str) -> int:
        return configs.tile(kernel, x.device, x.dtype).vocab
