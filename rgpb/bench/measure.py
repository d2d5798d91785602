"""How it is measured: times in interleaved rounds, memory as the allocator sees it, and where the numbers come from."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import rgpb
from rgpb.bench.cases import Result
from rgpb.kernels.matmul import mm

# The profiler announces its own start and stop on stderr, at a level below this one.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quantiles(values: list[float]) -> list[float]:
    """[median, 20 per cent, 80 per cent] of at least one value, interpolated."""
    return torch.tensor(values).double().quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()


def interleaved(runs: Mapping[Any, Callable[[], object]], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each run in each round: one round to warm up, then `rounds` in which each runs once.

    What disturbs the machine for a while disturbs all runs of a round, so ratios within a round stand. Each round has
    an order of its own, the same in every call: what a run leaves behind (caches, freed memory) has no fixed heir.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    for _ in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            _wait(device)
            start = time.perf_counter()
            result = runs[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
            del result
    return {name: seconds[1:] for name, seconds in times.items()}


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(
    dtype: torch.dtype, device: str | torch.device, seconds: float = 0.3, result: torch.dtype | None = None
) -> float:
    """Flops in a second of a library product X Wᵀ with [512, 1024] × [1024, 8192], a GPU [8192, 4096] × [4096, 8192].

    Median of what `seconds` allow. Where they don't allow one product of that size, it has fewer rows.

    Args:
        dtype: of the operands.
        device: a CPU or CUDA device.
        seconds: that it may take.
        result: type of the result in the engine's own product; default: the library's, in the type of the operands.
    """
    run = torch.mm if result is None else mm
    cpu = torch.device(device).type == "cpu"
    most, width, vocab = (512, 1024, 8192) if cpu else (8192, 4096, 8192)
    x, weight = (torch.randn(n, width, dtype=dtype, device=device) for n in (most, vocab))
    out, rows, spent = x.new_empty(most, vocab, dtype=result or dtype), 16, 0.0
    rates: list[float] = []
    run(x[:rows], weight.t(), out=out[:rows])  # the library sets itself up
    while spent < seconds:
        _wait(device)
        start = time.perf_counter()
        run(x[:rows], weight.t(), out=out[:rows])
        _wait(device)
        took = time.perf_counter() - start
        rates.append(2.0 * rows * width * vocab / took)
        spent += took
        if rows < most and spent + 3 * took < seconds:  # there is time for a larger one
            rows, rates = min(2 * rows, most), []
    return quantiles(rates)[0]


def copy_rate(device: str | torch.device, seconds: float = 0.2, fresh: bool = False) -> float:
    """Bytes read and written in a second by a copy of 64 MiB, on a GPU 1 GiB: more than caches hold. Median.

    fresh: into memory that is new each time, as the results of PyTorch's operations are on a CPU.
    """
    source = torch.ones(2**24 if torch.device(device).type == "cpu" else 2**28, device=device)
    into, spent = torch.ones_like(source), 0.0
    rates: list[float] = []
    while spent < seconds or len(rates) < 2:
        _wait(device)
        start = time.perf_counter()
        if fresh:
            source.clone()
        else:
            into.copy_(source)
        _wait(device)
        took = time.perf_counter() - start
        rates.append(2 * source.nbytes / took)
        spent += took
    return quantiles(rates)[0]


class Memory(NamedTuple):
    """Bytes held at the worst moment: beyond the inputs, and beyond inputs and the gradients returned."""

    peak: int
    extra: int


def peak_memory(run: Callable[[], Result], device: str) -> Memory:
    """The most that `run` holds at once, as torch's allocator knows it; scratch space inside the BLAS isn't in it.

    On a CPU the running sum of all allocations and releases, which the profiler records with their addresses, so that
    `extra` is exact. On CUDA `max_memory_allocated`; `extra` is then the peak less the gradients' bytes, which is too
    little for whoever has its peak before the gradients exist.
    """
    run()  # what is made once and stays (workspaces, caches) doesn't count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        peak = torch.cuda.max_memory_allocated() - before
        return Memory(peak, peak - sum(g.nbytes for g in result.gradients))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    gradients = {g.untyped_storage().data_ptr() for g in result.gradients}
    changes = _allocations(recorded)
    made_at = {address: at for at, (address, size) in enumerate(changes) if size > 0 and address in gradients}
    held = peak = beyond = extra = 0
    for at, (address, size) in enumerate(changes):
        held += size
        beyond += 0 if made_at.get(address) == at else size
        peak, extra = max(peak, held), max(extra, beyond)
    return Memory(peak, extra)


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; a release has negative bytes."""
    events = list(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found: list[tuple[int, int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found)]


def provenance(device: str, **options: object) -> dict[str, object]:
    """Machine, versions, date and commit (None outside a checkout), and `options`."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "rgpb": rgpb.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **options,
    }


def cpu_model() -> str:
    """The processor's name; where the system doesn't say, its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def memory_of_machine() -> int | None:
    """Bytes of main memory; None where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def version_of(package: str) -> str | None:
    """Of an installed package; None where it isn't."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, "-dirty" with changes; None where there is no git, or this file isn't tracked."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a repository around an installed package is none of ours
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
