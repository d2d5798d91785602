"""How it is measured: times in interleaved rounds, memory as the allocator sees it, and on what machine."""

from __future__ import annotations

import os
import platform
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

# The profiler reports its own start and stop on stderr, below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quantiles(values: list[float]) -> list[float]:
    """[median, 20 per cent, 80 per cent] of at least one value, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()


def interleaved(runs: Mapping[Any, Callable[[], object]], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each run in each round. One warm-up round, then `rounds` in which each runs once.

    What disturbs the machine for a while disturbs all contestants of a round, so their ratios stand. The order turns by one
    place from round to round.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _wait(device)
            start = time.perf_counter()
            result = runs[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
            del result
    return {name: seconds[1:] for name, seconds in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Memory(NamedTuple):
    """Bytes held at the worst moment: of all that was allocated, and of that without the gradients returned."""

    peak: int
    extra: int


def peak_memory(run: Callable[[], Result], device: str) -> Memory:
    """The most that `run` holds at once beyond its inputs, as torch's allocator knows it.

    On a CPU the running sum of every allocation and release, which the profiler records with their addresses, so that `extra`
    is exact. On CUDA `max_memory_allocated`, and `extra` is the peak less the gradients' bytes (less than the truth, for
    whoever has its peak before the gradients exist). Scratch space inside the BLAS library is in neither.
    """
    run()  # what is made once and stays (workspaces, caches) doesn't count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Memory(peak, peak - sum(g.nbytes for g in result.gradients))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    gradients = {g.untyped_storage().data_ptr() for g in result.gradients}
    allocations = _allocations(recorded)
    made_at = {address: at for at, (address, size) in enumerate(allocations) if size > 0 and address in gradients}
    held = peak = without = extra = 0
    for at, (address, size) in enumerate(allocations):
        held += size
        without += 0 if made_at.get(address) == at else size
        peak, extra = max(peak, held), max(extra, without)
    return Memory(peak, extra)


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; a release has negative bytes."""
    found, stack = [], list(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while stack:
        event = stack.pop()
        stack += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            found.append((event.start_time_ns, len(found), fields.ptr, fields.alloc_size))
    return [(address, size) for *_, address, size in sorted(found)]


def provenance(device: str, **options: object) -> dict[str, object]:
    """Where numbers come from: machine, versions, date, commit (None outside a checkout) and the options of the run."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rgpb": rgpb.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        **options,
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this file's checkout, "-dirty" with changes; None where this file isn't tracked or there is no git."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else a repository around the environment would answer
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
