"""Each Triton kernel, and the library's product, alone against its roofline.

Inputs, answers and bytes are those of `rgpb tune`; a kernel that isn't right has no time. It is timed in the same
rounds as its ceilings: a copy that reads and writes as many bytes together, and for kernels with a matrix product the
library's own of the same [C, H] and [H, V] with float32 results. A share of a copy above 1 is no error where more is
read than written. What is shorter than `SHORTEST` is repeated back to back, as its ceilings are.

Dimensions: C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch

from rgpb.bench.contest import DTYPES, Shape
from rgpb.bench.measure import interleaved, release
from rgpb.bench.tune import KERNELS, TOLERANCE, Inputs, error_of
from rgpb.engine.rates import RATES
from rgpb.kernels import resolve_impl
from rgpb.kernels.devices import architecture
from rgpb.kernels.matmul import mm

from .calls import CPU, LLAMA, ROW_SECONDS
from .journal import Journal, Settings, Task, single

# C: a chunk in a small and in a large workspace.
ROWS, SHORTEST = {"cuda": (1024, 8192), "cpu": (512,)}, 1e-3
COLUMNS = ("error", "bytes", "flops", "seconds", "seconds_20", "seconds_80", "predicted_seconds", "copy_rate",
           "share_of_copy", "share_of_product", "rounds")  # fmt: skip


class Chunk:
    """The inputs, made when they are first asked for."""

    def __init__(self, shape: Shape, settings: Settings):
        self.shape, self.settings, self.dtype = shape, settings, DTYPES[settings.dtype or "bf16"]
        self.device, self.flops = torch.device(settings.device), 2 * shape.tokens * shape.width * shape.vocab

    @cached_property
    def inputs(self) -> Inputs:
        """For all kernels."""
        return Inputs(self.shape, self.dtype, self.device)

    @cached_property
    def product(self) -> Callable[[], object]:
        """The library's, with float32 results; on a CPU of float32 operands."""
        x, w = (t if self.device.type == "cuda" else t.float() for t in (self.inputs.x, self.inputs.w))
        return partial(mm, x, w.t(), torch.empty_like(self.inputs.z))


def tasks(journal: Journal) -> Iterator[Task]:
    """A row for each kernel; N of a shape in place of these is C."""
    settings = journal.settings
    name, tokens, width, vocab, _ = (settings.shapes or {"cuda": LLAMA, "cpu": CPU}[settings.device])[0]
    for rows in (tokens,) if settings.shapes else ROWS[settings.device]:
        chunk = Chunk(Shape(rows, width, vocab), settings)
        for kernel in ("product", *KERNELS):
            key = f"{name} | {chunk.shape} | {settings.dtype or 'bf16'} | {kernel}"
            row = {"kernel": kernel, "case": name, **chunk.shape._asdict(), "dtype": str(chunk.dtype), "status": "ok"}
            make = partial(of_product, chunk) if kernel == "product" else partial(of_kernel, chunk, kernel)
            yield single(key, make, row | dict.fromkeys(COLUMNS))
        del chunk
        release(settings.device)


def of_product(chunk: Chunk) -> dict[str, Any]:
    """The library's product; its own result is what the others are checked with."""
    moved = chunk.inputs.x.nbytes + chunk.inputs.w.nbytes + 4 * chunk.inputs.z.numel()
    times = timed(chunk, {"this": chunk.product}, moved)
    return times | {"bytes": moved, "flops": chunk.flops, **predicted(chunk, 0, 0, "library")}


def of_kernel(chunk: Chunk, name: str) -> dict[str, Any]:
    """A Triton kernel: checked, and if it passed timed."""
    resolve_impl("triton", chunk.device)
    kernel = KERNELS[name](chunk.inputs)
    row: dict[str, Any] = {"bytes": kernel.moved, "flops": chunk.flops if kernel.product else None}
    row |= predicted(chunk, kernel.moved, kernel.stored, "tile" if kernel.product else None)
    row["error"] = error_of(kernel, None)
    if not row["error"] <= TOLERANCE[chunk.dtype]:  # a NaN fails, too
        return row | {"status": "FAILED"}
    runs: dict[str, Callable[[], object]] = {"this": partial(kernel.run, None)}
    return row | timed(chunk, {**runs, **({"product": chunk.product} if kernel.product else {})}, kernel.moved)


def predicted(chunk: Chunk, moved: int, stored: int, rate: str | None) -> dict[str, Any]:
    """Seconds from the rates that plans are made with, of 16-bit products; nothing is assumed to overlap."""
    arch = architecture(chunk.device)
    if arch is None or (rate is not None and chunk.dtype.itemsize != 2):
        return {}
    rates = RATES[arch]
    seconds = moved / rates.copy if rate is None else chunk.flops / getattr(rates, rate) + stored / rates.copy
    return {"predicted_seconds": seconds}


def timed(chunk: Chunk, runs: dict[str, Callable[[], object]], moved: int) -> dict[str, Any]:
    """Seconds, and shares of the ceilings: medians of the rounds' ratios."""
    release(chunk.settings.device)
    source = torch.randint(256, (max(moved // 2, 1),), dtype=torch.uint8, device=chunk.device)
    runs = {**runs, "copy": partial(torch.empty_like(source).copy_, source)}
    times = interleaved(runs, chunk.settings.rounds, chunk.settings.device, ROW_SECONDS, SHORTEST)
    median, low, high = times.quantiles("this")
    return {
        "seconds": median, "seconds_20": low, "seconds_80": high, "rounds": times.rounds,
        "copy_rate": source.nbytes * 2 / times.quantiles("copy")[0],
        "share_of_copy": times.over("copy", "this"),
        "share_of_product": times.over("product", "this") if "product" in runs else None,
    }  # fmt: skip
