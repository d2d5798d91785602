"""How it is measured: times in interleaved rounds, memory as the allocator sees it, and where the numbers come from."""

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

# The profiler announces its own start and stop on stderr, at a level below this one.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quantiles(values: list[float]) -> list[float]:
    """[median, 20 per cent, 80 per cent] of at least one value, interpolated."""
    return torch.tensor(values).double().quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()


def interleaved(runs: Mapping[Any, Callable[[], object]], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each run in each round: one round to warm up, then `rounds` in which each runs once.

    What disturbs the machine for a while disturbs all runs of a round, so ratios within a round stand. The order turns
    by one place from round to round.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        shift = turn % max(len(names), 1)
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
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rgpb": rgpb.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **options,
    }


def _version(package: str) -> str | None:
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
