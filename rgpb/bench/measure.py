"""How it is measured: times in interleaved rounds, memory as the allocator sees it, where the numbers come from, and
what a row says of one that raised."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import rgpb
from rgpb.kernels.matmul import mm
from rgpb.kernels.tuned import cpu_name

# The profiler announces its own start and stop on stderr, at a level below this one.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
ABSENT = "not installed: "


class Result(NamedTuple):
    """What a run returns: the loss (or log-probabilities), and the gradients that it makes."""

    value: Tensor
    gradients: tuple[Tensor, ...]


def quantiles(values: list[float]) -> list[float]:
    """[median, 20 per cent, 80 per cent] of at least one value, interpolated."""
    return torch.tensor(values).double().quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return quantiles([a / b for a, b in zip(ours, theirs)])[0]


LEAST_ROUNDS, MOST_CALLS = 3, 100


class Times(NamedTuple):
    """Seconds of one call of each run in each round, and how many calls were timed together."""

    seconds: dict[Any, list[float]]
    calls: dict[Any, int]
    rounds: int

    def quantiles(self, name: Any) -> list[float]:
        """[median, 20 per cent, 80 per cent] of a run's seconds."""
        return quantiles(self.seconds[name])

    def over(self, name: Any, other: Any) -> float:
        """The median of the rounds' ratios."""
        return ratio(self.seconds[name], self.seconds[other])


def interleaved(
    runs: Mapping[Any, Callable[[], object]], rounds: int, device: str,
    budget: float = math.inf, shortest: float = 0.0,
) -> Times:  # fmt: skip
    """Time runs side by side: one round to warm up, then `rounds` in which each runs once.

    What disturbs the machine for a while disturbs all runs of a round, so ratios within a round stand. Each round has
    an order of its own, the same in every call: what a run leaves behind (caches, freed memory) has no fixed heir. On a
    GPU the time is that between two CUDA events, around a device that has nothing else to do.

    Args:
        runs: what is timed, by name.
        rounds: at most; at least 1.
        device: "cpu" or "cuda".
        budget: seconds, after which no more rounds are planned; at least `LEAST_ROUNDS` (or `rounds`) are run.
        shortest: seconds. A run that takes less is repeated back to back and its time divided.
    """
    names, order, clock = list(runs), random.Random(0), _clock(device)
    once = {name: clock(runs[name], 1) for name in names}
    short = [name for name in names if once[name] < shortest]
    once.update({name: clock(runs[name], 10) for name in short})  # the wait for the device is a tenth of before
    calls = dict.fromkeys(names, 1)
    calls.update({name: max(1, min(MOST_CALLS, math.ceil(shortest / max(once[name], 1e-9)))) for name in short})
    round_takes = max(sum(once[name] * calls[name] for name in names), 1e-9)
    if budget < rounds * round_takes:
        rounds = min(rounds, max(LEAST_ROUNDS, int(budget / round_takes)))
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            seconds[name].append(clock(runs[name], calls[name]))
    return Times(seconds, calls, rounds)


def _clock(device: str | torch.device) -> Callable[[Callable[[], object], int], float]:
    """What gives the seconds of one call, from several back to back."""

    def on_cpu(run: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        took = time.perf_counter() - start
        del result
        return took / calls

    def on_gpu(run: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return on_cpu if torch.device(device).type == "cpu" else on_gpu


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
    clock = _clock(device)
    while spent < seconds:
        took = clock(partial(run, x[:rows], weight.t(), out=out[:rows]), 1)
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
    clock, once = _clock(device), source.clone if fresh else partial(into.copy_, source)
    while spent < seconds or len(rates) < 2:
        took = clock(once, 1)
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


def explain(error: Exception) -> str:
    """The status of a row whose contestant raised."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{ABSENT}{error.name}"
    text = " ".join(str(error).replace("|", "/").split())[:200]
    return f"refused: {text}" if isinstance(error, ValueError) else f"error: {type(error).__name__}: {text}"


def failed(row: dict[str, Any]) -> bool:
    """A result off float64; or an exception, other than a refusal, in this library."""
    status = row.get("status", "")
    return status.startswith("FAILED") or (status.startswith("error") and row.get("impl", "fused") == "fused")


def installed(module: str) -> bool:
    """Whether a module can be found, or an attribute of torch is there."""
    if module.startswith("torch."):
        owner: Any = torch
        for name in module.split(".")[1:]:
            owner = getattr(owner, name, None)
        return owner is not None
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def release(device: str) -> None:
    """Give the device's memory back that nobody holds any more."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def alive(device: str) -> bool:
    """Whether the device still works: after an illegal access nothing does."""
    try:
        release(device)
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def provenance(device: str, **options: object) -> dict[str, object]:
    """Machine, versions, date and commit (None outside a checkout), and `options`."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        **(_gpu() if device == "cuda" else {}),
        "cpu": cpu_name(),
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


def _gpu() -> dict[str, object]:
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "multiprocessors": facts.multi_processor_count,
        "memory": facts.total_memory,
    }


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
