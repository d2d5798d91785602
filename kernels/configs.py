"""Block shapes, warps and pipeline depths of the kernels, per architecture, with the reason for each.

The table is where a launch looks first if nothing was tuned on this machine; `rgpb tune` times the candidates on the
GPU at hand and keeps the fastest (`tuned.py`), which then comes before the table. Configurations don't depend on the
inputs' values, so results are bitwise the same from run to run.

No entry of the table has been timed on a GPU yet. They were chosen from what the compiler says (registers, spills,
shared memory; `tests/test_targets.py` holds them to it) and from the shapes of the matrix instructions.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from rgpb.kernels import tuned
from rgpb.kernels.devices import architecture

INTERPRETED = "interpreter"


class Rows(NamedTuple):
    """A row kernel: one program of `warps` warps takes `block_vocab` entries of its row at a time.

    Attributes:
        lanes: columns of a block that have statistics of their own: four float32, 16 bytes, of each thread.
    """

    block_vocab: int
    warps: int
    lanes: int


class Tile(NamedTuple):
    """A tile kernel: [rows × vocab] logits in registers, `width` of H at a time.

    Attributes:
        rows, vocab, width: BLOCK_C, BLOCK_V, BLOCK_H.
        group: tiles of rows that share a slice of the weight in the L2 cache.
        warps, stages: per program; depth of the load pipeline.
        programs: persistent programs per multiprocessor.
        tma: load through tensor descriptors, where the tensors' alignment allows it.
    """

    rows: int
    vocab: int
    width: int
    group: int
    warps: int
    stages: int
    programs: int
    tma: bool = False

    @property
    def part(self) -> int:
        """Columns that have partial statistics of their own: more at once take too many registers."""
        return min(self.vocab, 128)

    def parts(self, vocab: int) -> int:
        """Partial statistics of so many columns, those of whole tiles."""
        return -(-vocab // self.vocab) * (self.vocab // self.part)


# The row kernels are bound by memory: a block of 4096 float32 is four 16-byte loads a thread at 8 warps, and 4 to 8
# programs fit a multiprocessor (28 to 60 registers), 64 kB or more in flight, which covers the latency.
ROWS = {
    "default": Rows(4096, 8, 1024),
    "gfx9": Rows(4096, 8, 2048),  # waves of 64: two 16-byte loads a thread
    INTERPRETED: Rows(64, 1, 32),  # so that a small vocabulary has several blocks
}

# score: logits → partial statistics. weights: the same, and exp(z − shift) written. gradients: dlogits written.
#
# [128 × 128] float32 accumulators are 64 registers a thread at 8 warps and 128 at 4. The epilogue wants as many again,
# so 8 warps take 160 to 255 registers, and one program fills a multiprocessor's 65536 unless it has 4 warps: that is
# the way to two programs, where one's epilogue runs beside the other's products. Spills stay outside the matrix loop in
# every entry. Without bias, soft-cap and entropy they are 0 to 88 bytes a thread (triton 3.6.0), with an entropy up to
# 1 kB; a soft-cap costs the gradients of 4 warps about 0.5 kB a thread and tile and their weights 2 kB, a quarter
# megabyte beside the 2 MB of operands of a [128 × 128] tile at H = 4096. 8 warps spill at most 0.3 kB.
# Of skipping: hidden: [rows × width] of dX, `vocab` columns at a time. head: [vocab × width] of dW, `rows` at a time.
# [64 × 128] reads 96 bytes a cycle at the full rate of an H100's tensor cores, [128 × 128] 64, [128 × 256] 48; the port
# to the L2 cache carries 64.
TILES: dict[str, dict[str, list[Tile]]] = {
    "sm_80": {
        # the key of sm_86 and sm_89 too, which have 99 KiB of shared memory a program: 4 stages are 96 KiB (three
        # buffers of (128 + 128) × 64 × 2 bytes). 8 warps: 166 to 208 registers, no spills. Not [128 × 128 × 32] and
        # [128 × 256] with 4 and 8 warps for weights: with an entropy and a soft-cap ptxas gives up at 32 registers
        "score": [
            Tile(128, 128, 64, 8, 8, 4, 1), Tile(128, 128, 64, 8, 4, 3, 2), Tile(128, 256, 32, 8, 8, 3, 1),
            Tile(64, 128, 64, 8, 4, 3, 2),
        ],
        "weights": [Tile(128, 128, 64, 8, 8, 4, 1), Tile(128, 128, 64, 8, 4, 3, 2), Tile(64, 128, 64, 8, 4, 3, 2)],
        "gradients": [Tile(128, 128, 64, 8, 8, 4, 1), Tile(128, 128, 64, 8, 4, 3, 2), Tile(64, 128, 64, 8, 4, 3, 2)],
        "hidden": [Tile(128, 64, 128, 1, 8, 6, 1)],
        "head": [Tile(64, 128, 128, 1, 8, 3, 1)],
    },
    "sm_90": {
        # first the fewest bytes per product, [128 × 256] alone on its multiprocessor. wgmma wants 64 rows a warpgroup:
        # [128 × 128] is one warpgroup with two of them, 252 to 255 registers, exactly two programs in the register file
        # and 2 × 96 KiB of shared memory; with 8 warps it has the fewest spills, but no second program (172 to 250)
        "score": [
            Tile(128, 256, 64, 8, 8, 4, 1, True), Tile(128, 128, 64, 8, 4, 3, 2, True),
            Tile(128, 128, 64, 8, 8, 4, 1, True), Tile(64, 128, 64, 8, 4, 4, 2, True), Tile(128, 128, 64, 8, 4, 3, 2),
        ],
        "weights": [
            Tile(128, 256, 64, 8, 8, 4, 1, True), Tile(128, 128, 64, 8, 4, 3, 2, True),
            Tile(128, 128, 64, 8, 8, 4, 1, True), Tile(64, 128, 64, 8, 4, 4, 2, True), Tile(128, 128, 64, 8, 4, 3, 2),
        ],
        "gradients": [
            Tile(128, 256, 64, 8, 8, 4, 1, True), Tile(128, 128, 64, 8, 4, 3, 2, True),
            Tile(256, 128, 64, 8, 8, 3, 1, True), Tile(128, 128, 64, 8, 8, 4, 1, True),
            Tile(64, 128, 64, 8, 4, 4, 2, True), Tile(128, 128, 64, 8, 4, 3, 2),
        ],
        # 128 × 256 a program: 12 loads of 16 bytes a thread for four wgmma of 64 × 256 × 16 each warpgroup
        "hidden": [Tile(128, 64, 256, 1, 8, 6, 1)],
        "head": [Tile(64, 128, 256, 1, 8, 3, 1)],
    },
    "sm_100": {
        # accumulators live in tensor memory, 128 of its 512 columns a program; the epilogue still takes them through
        # registers, 186 to 255 at 4 warps. 3 stages, since 4 of them (128 KiB) leave no room for the second program.
        # 8 warps spill the least: 0 bytes, with all flags at most 248
        "score": [
            Tile(128, 128, 64, 8, 4, 3, 2, True), Tile(128, 128, 64, 8, 8, 4, 1, True),
            Tile(128, 256, 64, 8, 8, 4, 1, True),
        ],
        "weights": [
            Tile(128, 128, 64, 8, 4, 3, 2, True), Tile(128, 128, 64, 8, 8, 4, 1, True),
            Tile(128, 256, 64, 8, 8, 4, 1, True),
        ],
        "gradients": [
            Tile(128, 128, 64, 8, 4, 3, 2, True), Tile(128, 128, 64, 8, 8, 4, 1, True),
            Tile(128, 256, 64, 8, 8, 4, 1, True),
        ],
        "hidden": [Tile(128, 64, 256, 1, 8, 6, 1)],
        "head": [Tile(64, 128, 256, 1, 8, 3, 1)],
    },
    "sm_120": {
        # 99 KiB of shared memory and no wgmma: the shapes of sm_80, 64 KiB. No TMA: in triton 3.6 each of its loads
        # comes with a checked address, 254 instructions in the matrix loop where cp.async takes 178
        "score": [
            Tile(128, 128, 64, 8, 8, 3, 1), Tile(64, 128, 64, 8, 4, 3, 2), Tile(128, 128, 64, 8, 8, 3, 1, True),
        ],
        "weights": [
            Tile(128, 128, 64, 8, 8, 3, 1), Tile(64, 128, 64, 8, 4, 3, 2), Tile(128, 128, 64, 8, 8, 3, 1, True),
        ],
        "gradients": [
            Tile(128, 128, 64, 8, 8, 3, 1), Tile(64, 128, 64, 8, 4, 3, 2), Tile(128, 128, 64, 8, 8, 3, 1, True),
        ],
        "hidden": [Tile(128, 64, 128, 1, 8, 6, 1)],
        "head": [Tile(64, 128, 128, 1, 8, 3, 1)],
    },
    "gfx9": {
        # 64 KiB of LDS a compute unit, waves of 64: 32 KiB in one buffer of (128 + 128) × 64 × 2 bytes beside the loads
        # in registers; 108 to 195 registers, no spills. [128 × 256] spills with a soft-cap
        "score": [Tile(128, 128, 64, 8, 8, 2, 1), Tile(128, 128, 32, 8, 8, 3, 1)],
        "weights": [Tile(128, 128, 64, 8, 8, 2, 1), Tile(128, 128, 32, 8, 8, 3, 1)],
        "gradients": [Tile(128, 128, 64, 8, 8, 2, 1), Tile(128, 128, 32, 8, 8, 3, 1)],
        "hidden": [Tile(128, 64, 128, 1, 8, 2, 1)],
        "head": [Tile(64, 128, 128, 1, 8, 2, 1)],
    },
    INTERPRETED: {
        # several tiles along each dimension of a small problem, and more tiles than programs
        "score": [Tile(16, 64, 16, 2, 1, 1, 3)],
        "weights": [Tile(16, 64, 16, 2, 1, 1, 3)],
        "gradients": [Tile(16, 64, 16, 2, 1, 1, 3)],
        "hidden": [Tile(16, 64, 32, 1, 1, 1, 1)],
        "head": [Tile(16, 64, 32, 1, 1, 1, 1)],
    },
}  # fmt: skip

# float32 and float64 operands are two and four times as wide, and no tensor core takes them unrounded: small tiles that
# are right anywhere. The library product is the fast way there, and `plan` takes it.
WIDE = Tile(64, 64, 32, 8, 4, 2, 1)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def arch(device: torch.device) -> str:
    """The key of the tables for a device.

    Raises:
        ValueError: a device without a GPU architecture, outside the interpreter.
    """
    found = INTERPRETED if interpreted() else architecture(device)
    if found is None:
        raise ValueError(f"device: expected a CUDA or ROCm device for Triton kernels, got {device.type}")
    return found


@cache
def rows(device: torch.device) -> Rows:
    """The row kernels' configuration on `device`."""
    key = arch(device)
    kept = None if interpreted() else tuned.read(Rows, _key(device, "rows", ""))
    return kept or ROWS.get(key, ROWS["default"])


@cache
def tile(kernel: str, device: torch.device, dtype: torch.dtype) -> Tile:
    """The configuration of a kernel of `TILES` on `device` for operands of `dtype`."""
    key = arch(device)
    if key != INTERPRETED and dtype.itemsize > 2:
        return WIDE
    kept = None if interpreted() else tuned.read(Tile, _key(device, kernel, str(dtype)))
    return kept or TILES[key][kernel][0]


def row_candidates() -> list[Rows]:
    """What tuning tries for the row kernels."""
    lanes = 4 * (64 if torch.version.hip else 32)
    return [
        Rows(block, warps, warps * lanes)
        for block in (2048, 4096, 8192, 16384)
        for warps in (4, 8, 16)
        if block >= warps * lanes
    ]


def programs(config: Tile, device: torch.device) -> int:
    """How many programs run at once: the size of a persistent grid."""
    if interpreted():
        return config.programs
    return config.programs * _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- what was tuned ---------------------------------------------------------------------------------------------------


def keep(device: torch.device, kernel: str, dtype: str, config: Rows | Tile) -> None:
    """Prefer `config` on devices of this name, with this version of Triton, from now on."""
    tuned.keep(_key(device, kernel, dtype), config)
    for known_by_now in (rows, tile):
        known_by_now.cache_clear()


def tiles_measured(device: torch.device) -> bool:
    """Whether tuning has kept a choice for the tile kernels on devices of this name."""
    if interpreted():
        return False
    return any(tuned.read(Tile, _key(device, "weights", str(dtype))) for dtype in (torch.bfloat16, torch.float16))


def _key(device: torch.device, kernel: str, dtype: str) -> str:
    name = INTERPRETED if interpreted() else torch.cuda.get_device_name(device)
    return ", ".join(part for part in (name, f"triton {triton.__version__}", kernel, dtype) if part)
