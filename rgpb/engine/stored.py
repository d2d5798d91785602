"""Quantised weights: rows of them as floats, a few at a time.

A format is a function of codes, scales and zero points of some rows; a call names it (`Call.stored`).

Dimensions: V vocabulary, H hidden size, S rows of a slice, G groups of a row with a scale each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rgpb.head import HeadWeight

# Values made at a time, beside the slice that they are written to.
BLOCK = 1 << 17


def _integers(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(q − zero) · scale, group by group, of codes [S, H]."""
    q = codes.view(*scales.shape, -1).to(_wide(scales))
    if zeros is not None:
        q = q - zeros[:, :, None].to(q.dtype)
    return q.mul_(scales[:, :, None]).view(codes.shape)


def _pairs(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """table[q] · scale of two codes to a byte, the higher half first, codes [S, H / 2]; `zeros` is the table, [16]."""
    assert zeros is not None
    q = torch.stack([codes >> 4, codes & 15], dim=-1).view(*scales.shape, -1)
    return zeros.to(_wide(scales))[q.int()].mul_(scales[:, :, None]).view(len(codes), -1)


def _wide(scales: Tensor) -> torch.dtype:
    return torch.float64 if scales.dtype == torch.float64 else torch.float32


FORMATS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"integers": _integers, "pairs": _pairs}


def rows_(
    out: Tensor, stored: tuple[str, ...], codes: Tensor, scales: Tensor | None, zeros: Tensor | None,
    which: slice | Tensor,
) -> None:  # fmt: skip
    """Fill `out` [S, H] with the values of the rows `which`. `stored`: `Quantised.named`."""
    assert scales is not None
    name, _, rounded = stored
    step = max(1, BLOCK // out.shape[1])
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        some = slice(which.start + start, which.start + stop) if isinstance(which, slice) else which[start:stop]
        beside = zeros if zeros is None or name == "pairs" else zeros[some]
        made = FORMATS[name](codes[some], scales[some], beside)
        out[start:stop].copy_(made.to(getattr(torch, rounded)) if rounded else made)


def rows_of(weight: HeadWeight, step: int) -> Iterator[Tensor]:
    """A head's weight, so many rows at a time. [S, H + r]"""
    how = weight.quantised
    for start in range(0, weight.shape[0], step):
        part = slice(start, min(start + step, weight.shape[0]))
        if how is None:
            rows = weight.base[part]
        else:
            rows = weight.base.new_empty(part.stop - part.start, how.width, dtype=how.dtype)
            rows_(rows, how.named, weight.base, how.scales, how.zeros, part)
        yield rows if weight.more is None else torch.cat([rows, weight.more[part]], dim=1)
