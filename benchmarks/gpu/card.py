"""What the card can do, and where a call's time goes.

Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rgpb.bench import contest
from rgpb.bench.contest import DTYPES, SCORES, Case, Job, Shape
from rgpb.bench.measure import copy_rate, product_rate
from rgpb.engine.rates import RATES
from rgpb.kernels.devices import architecture

from .calls import CPU, LLAMA
from .journal import Journal, Task, single

CALLS = 3
# Names of device kernels: library products, this library's, and what makes the host wait
PRODUCT, OURS = r"gemm|nvjet|cutlass|xmma|aten::(add)?mm", r"^(statistics|gradients|token_loss|target|tiles|merge)\w*$"
WAITS = r"cuda\w*Synchronize|_local_scalar_dense|Memcpy DtoH"
RATE = {"copy": "copy", "bf16 → fp32": "library"}  # of those that plans are made with


def ceilings(journal: Journal) -> Iterator[Task]:
    """Rates per second of a copy (bytes) and of library products by type (flops)."""
    device = journal.settings.device
    types = [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")] if device == "cuda" else [("fp32", "fp32")]
    runs: dict[str, Callable[[], float]] = {"copy": partial(copy_rate, device)}
    for a, b in types:
        runs[f"{a} → {b}"] = partial(product_rate, DTYPES[a], device, 0.5, None if a == b else DTYPES[b])
    arch = architecture(torch.device(device))

    for name, rate in runs.items():
        assumed = getattr(RATES[arch], RATE[name]) if arch is not None and name in RATE else None
        row = {"ceiling": name, "status": "ok", "rate": None, "assumed": assumed}
        yield single(name, lambda rate=rate: {"rate": rate()}, row)  # type: ignore[misc]


def profiled(journal: Journal) -> Iterator[Task]:
    """A few calls of the losses under torch's profiler; tables go into `profile.txt` beside the part's JSON."""
    settings = journal.settings
    device, dtype = settings.device, settings.dtype or ("bf16" if settings.device == "cuda" else "fp32")
    name, *shape, _ = (settings.shapes or {"cuda": LLAMA, "cpu": CPU}[device])[0]
    case = Case(Shape(*shape), dtype, device, name=name)
    for loss, path, workspace in (
        ("bnf", "single", settings.workspaces[-1]), ("bnf", "auto", settings.workspaces[0]),
        ("dpo", "auto", settings.workspaces[0]), (SCORES, "auto", settings.workspaces[0]),
    ):  # fmt: skip
        for kernels in ("triton", "tiled"):
            key = f"{loss} | {path} | {kernels} | {workspace}"
            make = partial(contest.fused, job=Job(loss, "full"), path=path, workspace=workspace, impl=kernels)
            columns = ("launches", "waits", "ms", "busy", "products", "ours", "other")
            row = {"call": key, "status": "ok", **dict.fromkeys(columns)}
            yield single(key, partial(measured, case, make, key, journal.json.with_name("profile.txt")), row)


def measured(case: Case, make: Callable[..., Any], key: str, file: Path) -> dict[str, Any]:
    """Per call: launches, waits, milliseconds from its first to its last, and shares of the device's busy time."""
    cuda, run = case.device == "cuda", make(case.batch)[0]
    run()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as recorded:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = recorded.key_averages()
    kernels = [e for e in averages if not cuda or str(e.device_type).endswith("CUDA")]
    spent = {e.key: getattr(e, time) for e in kernels}
    busy = sum(spent.values()) or 1.0
    products = sum(us for name, us in spent.items() if re.search(PRODUCT, name, re.IGNORECASE))
    ours = sum(us for name, us in spent.items() if re.search(OURS, name))
    bounds = [(e.time_range.start, e.time_range.end) for e in recorded.events() or ()]
    wall = max(end for _, end in bounds) - min(start for start, _ in bounds)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"## {key}\n\n{averages.table(sort_by=time, row_limit=25, max_name_column_width=90)}\n\n")
    return {
        "launches": sum(e.count for e in kernels) / CALLS,
        "waits": sum(e.count for e in averages if re.search(WAITS, e.key)) / CALLS,
        "ms": wall / 1e3 / CALLS, "busy": busy / max(wall, 1e-9), "products": products / busy, "ours": ours / busy,
        "other": 1 - (products + ours) / busy,
    }  # fmt: skip
