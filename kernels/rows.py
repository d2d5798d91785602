"""What the row kernels of every language share as a kernel set: logits formed by library products into the chunk's
buffer, one row after the other in the set's own kernels.

Dimensions: C rows of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from rgpb.kernels import matmul
from rgpb.kernels.types import Chunk, Counting, Statistics, TokenTerms, Upstream, Weighed


class RowSet(ABC):
    """A kernel set over a buffer of logits; the methods are those of `rgpb.kernels.KernelSet`."""

    token_losses: tuple[str, ...] = ()

    def logits(self, chunk: Chunk) -> Tensor:
        """X Wᵀ in float32 (float64) before anything is rounded. [C, V]"""
        for part, weight in chunk.parts():
            matmul.mm(chunk.x, weight.t(), chunk.buffer[:, part])
        return chunk.buffer

    @staticmethod
    def narrow(chunk: Chunk) -> Tensor | None:
        """Where 16-bit E goes, [C, V], where the products take 16-bit operands: apart, or over the first half of each
        row's bytes."""
        if chunk.out is not None:
            return chunk.out
        z, dtype = chunk.buffer, chunk.x.dtype
        return z.view(dtype)[:, : z.shape[1]] if dtype.itemsize == 2 else None

    def counting(self, active: Tensor, tile: int) -> Counting | None:
        """None: a loop over the tiles does it."""
        return None

    @abstractmethod
    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]: ...

    @abstractmethod
    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]: ...

    @abstractmethod
    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]: ...

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:
        raise ValueError(f"loss: expected one of {self.token_losses}, got {terms.loss!r}")
