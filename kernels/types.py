"""What kernels and engine exchange: a chunk of rows, its statistics, their gradients.

Dimensions: C rows of a chunk, V vocabulary (or a slice of it), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# The token-wise losses that kernel sets may have: `triton_token_losses.py` and `csrc/token_losses.inl`.
TOKEN_LOSSES = ("nll", "unlikelihood", "bnf")

# Room behind the rows of a slice of logits on a CPU: rows at a distance of a power of two share too few cache lines.
PAD = 16

# On a GPU rows of the buffers start at multiples of so many elements, so that accesses of 16 bytes stay aligned.
ALIGNED = 16

# Beyond this ratio of the target's gradient to the others' factor, the others are below the last bit of a float64.
LARGEST_RATIO = 1e16
# The same for float16, which has no larger numbers; beyond, the others are below the last bit of the target's entry.
LARGEST_HALF_RATIO = 6e4


class Epilogue(NamedTuple):
    """What follows the bare product W x: bias [V] in the buffer's dtype or None, soft-cap or None, scale."""

    bias: Tensor | None
    softcap: float | None
    scale: float

    def slice(self, start: int, stop: int) -> Epilogue:
        """The same for the vocabulary entries start … stop."""
        return self if self.bias is None else self._replace(bias=self.bias[start:stop])

    def jacobian(self, z: Tensor) -> Tensor | float:
        """J at the logits `z`."""
        return self.scale if self.softcap is None else self.scale * (1 - (z / self.softcap) ** 2)


class Statistics(NamedTuple):
    """Per row, each [C]: the target's logit, logsumexp and entropy (or None) of the others."""

    z_y: Tensor
    lse_other: Tensor
    h_o: Tensor | None

    def at(self, rows: slice | Tensor) -> Statistics:
        """The statistics of some rows."""
        return Statistics(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class Upstream(NamedTuple):
    """Gradients of the loss with respect to `Statistics`, each [C]; g_ho None where the entropy has none."""

    g_zy: Tensor
    g_lo: Tensor
    g_ho: Tensor | None = None

    def at(self, rows: slice | Tensor) -> Upstream:
        """The gradients of some rows."""
        return Upstream(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class TokenTerms(NamedTuple):
    """A token-wise loss that a kernel set computes itself, for the rows of a chunk.

    Attributes:
        loss: of `TOKEN_LOSSES`.
        factor: of each token's loss, [C]; negative for a rejected one.
        ref: (log p, log-odds) of the reference, [C] each, or None.
        entropy: whether its value needs H_o.
    """

    loss: str
    factor: Tensor
    ref: tuple[Tensor, Tensor] | None
    entropy: bool


class Chunk(NamedTuple):
    """Rows of hidden states against the head, or against a slice of it.

    Attributes:
        x: [C, H] in the dtype of the products' operands, unit stride along H.
        y: int64 [C], the target's column; −1 where it lies in another slice of the vocabulary.
        vocab: V, the columns.
        step: columns of a part, but for the last.
        parts: gives (columns, weight [S, H] in the operands' dtype), from the first column to the last.
        slices: the same in slices whose logits stay in a CPU's cache.
        epilogue: for all columns.
        buffer: [C, V], what the set writes into; narrower, or without rows, where a set that only scores wants less.
        room: columns of the buffers that may be touched: V, and the padding of their rows.
        out: [C, V] in the operands' type, where E goes; None: over the first half of the bytes of each of the buffer's
            rows, or, where its type is the operands', in place.
    """

    x: Tensor
    y: Tensor
    vocab: int
    step: int
    parts: Callable[[], Iterator[tuple[slice, Tensor]]]
    slices: Callable[[], Iterator[tuple[slice, Tensor]]]
    epilogue: Epilogue
    buffer: Tensor
    room: int
    out: Tensor | None = None


class Weighed(NamedTuple):
    """What `KernelSet.weigh` leaves behind until the coefficients are known.

    Attributes:
        e: [C, V], weights J exp(z − shift), or still the logits' raw products.
        total: Σ exp(z − shift) of each row, [C]; None where `e` holds products.
        j_y: J at the target's logit, [C], where the set has kept it.
    """

    e: Tensor
    total: Tensor | None
    j_y: Tensor | None = None


class Counting(Protocol):
    """The products of skipping over the (row, tile) pairs that count: `triton_skipping.Counting`."""

    def hidden(
        self, e_CV: Tensor, weight_VH: Tensor, out: Tensor, r: Tensor | None = None, places: Tensor | None = None,
        order: Tensor | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """out[places] = diag(r) E W[order], or added to: [·, H] of any floating type. Takes at least what counts.

        Args:
            e_CV, weight_VH: of one dtype; the weight has any strides.
            r: [C] in the accumulators' type.
            places, order: int64 [C] and [V]; default: one after the other.
        """

    def head(
        self, e_CV: Tensor, sides: list[Tensor], out: list[Tensor], order: Tensor | None = None,
        room: int | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """out[order] = Eᵀ X for each X of `sides`, or added to: [V, H] of any floating type.

        Args:
            sides: [C, H] each, of the dtype of E, times the factors of the rows; any strides.
            room: columns of E that may be read: V, and the padding of its rows.
        """


def aligned(length: int) -> int:
    """`length`, rounded up to a multiple of `ALIGNED`."""
    return -(-length // ALIGNED) * ALIGNED


def dense(*vectors: Tensor | None) -> list[Any]:
    """Vectors as kernels read them, with unit stride; None stays."""
    return [v if v is None else v.contiguous() for v in vectors]


def inside(y: Tensor, part: slice) -> Tensor:
    """Targets relative to the slice `part` of the vocabulary, −1 where they lie elsewhere."""
    y = y - part.start
    return torch.where((y >= 0) & (y < part.stop - part.start), y, -1)


def acc_dtype(stored: torch.dtype) -> torch.dtype:
    """The accumulators' type for operands or logits of a dtype: float64 for float64, else float32."""
    return torch.float64 if stored == torch.float64 else torch.float32
