"""What products and passes over memory take on a device: rates, and tiles in waves."""

from __future__ import annotations

from typing import NamedTuple

# Tiles of the library's 16-bit products, and the part of its rate that each reaches. [128 × 256] needs 48 bytes a cycle
# of the L2 cache's 64 at a multiprocessor's full rate; [128 × 128] needs all 64: its part is an assumption.
PRODUCT_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.85}


class Rates(NamedTuple):
    """What a device does.

    Attributes:
        library, tile: flops a second of a 16-bit library product, and of the tile kernels' products.
        copy: bytes copied in a second.
        multiprocessors: that take tiles of products; 0 where these don't come in waves.
        clock: cycles a second of a multiprocessor, which issues four instructions of 32 threads in each.
        cache: bytes of the L2 cache.
    """

    library: float
    tile: float
    copy: float
    multiprocessors: int = 0
    clock: float = 0.0
    cache: int = 0


def _assumed(library: float, copy: float, multiprocessors: int, clock: float, cache: int) -> Rates:
    """Tile kernels at three quarters of the library's rate: an assumption, until a GPU has run them."""
    return Rates(library, 0.75 * library, copy, multiprocessors, clock, cache * 2**20)


# Per architecture. sm_90: what PyTorch has been seen to reach on an H200; the others are nine tenths of what vendors
# print for copies and eight tenths for products (A100, B200, RTX 5090, MI300X).
RATES = {
    "sm_80": _assumed(250e12, 1.8e12, 108, 1.41e9, 40),
    "sm_90": _assumed(788e12, 4.3e12, 132, 1.98e9, 50),
    "sm_100": _assumed(1800e12, 7.2e12, 148, 1.85e9, 126),
    "sm_120": _assumed(168e12, 1.6e12, 170, 2.4e9, 96),
    "gfx9": _assumed(1045e12, 4.8e12, 304, 2.1e9, 256),
}

# What is written and read again while it takes at most half of the L2 cache passes at so many times the rate of copies:
# an assumption.
CACHED = 1.5

# Instructions that a thread issues for a logit in the row kernels, in machine code for sm_90 (docs/kernels.md): in a
# sweep for statistics, one that writes weights as well, one that writes dlogits; and what a soft-cap adds.
STATISTICS_ISSUES, WEIGHTS_ISSUES, DLOGITS_ISSUES, SOFTCAP_ISSUES = 11.4, 16.1, 6.1, 12.3


def tile_waves(rows: int, columns: int, tile: tuple[int, int], multiprocessors: int) -> int:
    """How often all multiprocessors take a tile of a [rows, columns] result."""
    return -(-(-(-rows // tile[0]) * -(-columns // tile[1])) // multiprocessors)


def wave_efficiency(rows: int, columns: int, multiprocessors: int) -> float:
    """The part of a library product's rate that is left where its tiles don't fill all multiprocessors, or hang over
    the edge: the best of `PRODUCT_TILES`."""
    if not multiprocessors:
        return 1.0
    return max(
        rate * rows * columns / (tile_waves(rows, columns, tile, multiprocessors) * multiprocessors * tile[0] * tile[1])
        for tile, rate in PRODUCT_TILES.items()
    )


def product_seconds(rates: Rates, rows: int, columns: int, inner: int, itemsize: int) -> float:
    """A library product [rows, inner] × [inner, columns]: its flops in waves of tiles, or its operands' bytes."""
    if not rows * columns * inner:
        return 0.0
    flops = 2 * rows * columns * inner / rates.library / wave_efficiency(rows, columns, rates.multiprocessors)
    return max(flops, itemsize * inner * (rows + columns) / rates.copy) if rates.multiprocessors else flops
