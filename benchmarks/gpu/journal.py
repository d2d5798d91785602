"""Rows on disk: each is appended to `<part>.jsonl` when it is finished, and a row that is there isn't run again.

A line is `{"run": provenance}` at the start of a run that adds rows, or `{"key": …, "row": {…}}`. A last line that was
cut off in the middle is dropped.
"""

from __future__ import annotations

import gc
import json
import math
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgpb.bench.measure import provenance

ABSENT = "not installed: "
WORKSPACES = {"cuda": (512 * 2**20, 4 * 2**30), "cpu": (512 * 2**20, 16 * 2**20)}
PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels")


class Task(NamedTuple):
    """One row to be: its key within the part, and what makes it."""

    key: str
    run: Callable[[], dict[str, Any]]


class Group(NamedTuple):
    """Rows to be that are measured together: their keys, and what makes the rows of those keys that it is given."""

    keys: tuple[str, ...]
    run: Callable[[list[str]], Iterable[dict[str, Any]]]


class Settings(NamedTuple):
    """What the command line says.

    Attributes:
        device: "cuda" or "cpu".
        rounds: of timing, at most.
        workspaces: bytes, each a variant of the library's contestants.
        shapes: (name, N, H, V, soft-cap) in place of a part's own.
        cap: tokens, where the search for the longest batch ends.
        minutes: of one part, after which no row is begun.
        only, without: patterns on the keys of rows.
        dtype: of the heads, in place of a part's own.
        share: (i, n): only the i-th of n parts of the rows, by their keys.
        model, text, steps: of the language model: a folder in place of training one, what it reads, how long it trains.
    """

    device: str
    rounds: int = 20
    workspaces: tuple[int, ...] = WORKSPACES["cuda"]
    shapes: tuple[tuple[str, int, int, int, float | None], ...] = ()
    cap: int = 1 << 20
    minutes: float = 8.5
    only: re.Pattern[str] | None = None
    without: re.Pattern[str] | None = None
    dtype: str | None = None
    model: Path | None = None
    text: tuple[Path, ...] = ()
    steps: int | None = None
    share: tuple[int, int] = (0, 1)

    def wants(self, key: str) -> bool:
        """Whether the patterns let a row through, and it is in this run's share."""
        mine, of = self.share
        return (
            (self.only is None or self.only.search(key) is not None)
            and (self.without is None or self.without.search(key) is None)
            and zlib.crc32(key.encode()) % of == mine
        )


class Outcome(NamedTuple):
    """How many rows a part failed, how many it has left for the next run, and how many this one has added."""

    failed: int
    left: int
    added: int = 0


class Journal:
    """The rows of a part, by key, in the order in which they were finished.

    Raises:
        ValueError: the file holds something else than rows.
    """

    def __init__(self, folder: Path, part: str):
        self.part, self.path, self.json = part, folder / f"{part}.jsonl", folder / f"{part}.json"
        self.rows: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        if lines[-1]:
            self.path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                if "run" in entry:
                    self.runs.append(entry["run"])
                else:
                    self.rows[entry["key"]] = entry["row"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: expected a row of this suite, got {error!r}") from error
        self.fresh = True  # this run has added no row yet

    def done(self, key: str) -> bool:
        """Whether the row is there, and no module was installed since that it lacked."""
        status = self.rows.get(key, {}).get("status")
        return status is not None and not (status.startswith(ABSENT) and installed(status.removeprefix(ABSENT)))

    def add(self, key: str, row: dict[str, Any], run: dict[str, Any]) -> None:
        """Append a finished row."""
        lines = [{"run": {**run, "first_row": len(self.rows)}}] if self.fresh else []
        self.runs += [line["run"] for line in lines]
        self.fresh = False
        self.rows[key] = finite(row)
        with self.path.open("a", encoding="utf-8") as file:
            for line in [*lines, {"key": key, "row": self.rows[key]}]:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def write(self, run: dict[str, Any], left: int, **more: Any) -> None:
        """The JSON of the part: the last run's provenance, all runs, all rows, and `more`."""
        content = {
            "part": self.part,
            "provenance": {name: x for name, x in (self.runs or [run])[-1].items() if name != "first_row"},
            "runs": self.runs,
            "left": left,
            "rows": list(self.rows.values()),
            "points": [],
            **more,
        }
        self.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def work(
    journal: Journal,
    tasks: Iterator[Task | Group],
    settings: Settings,
    run: dict[str, Any],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Outcome:
    """Run what isn't done yet, within the minutes; at least one task, so that repeated runs come to an end.

    Raises:
        ValueError: the rows that are there are another device's.
    """
    there = journal.runs[-1].get("device") if journal.runs else None
    if there not in (None, run.get("device")):
        raise ValueError(f"out: expected results of {run.get('device')}, got those of {there} in {journal.path}")
    start, longest, made, left, added = time.monotonic(), 0.0, 0, 0, 0
    try:
        for task in tasks:
            together = task.keys if isinstance(task, Group) else (task.key,)
            keys = [key for key in together if settings.wants(key) and not journal.done(key)]
            if not keys:
                continue
            begin = time.monotonic()
            if left or (made and begin - start + longest > 60 * settings.minutes):
                left += len(keys)
                continue
            for key, row in zip(keys, task.run(keys) if isinstance(task, Group) else [task.run()]):
                journal.add(key, row, run)
                added += 1
                say(f"{journal.part}: {key}: {row.get('status')} ({time.monotonic() - begin:.1f} s)")
            took, made = time.monotonic() - begin, made + 1
            longest = max(0.8 * longest, took)
            if not alive(settings.device):  # the row is on record; no other can be run by this process
                left += 1
                say(f"{journal.part}: the device doesn't answer after {keys[-1]}; run it again for the rest")
                raise SystemExit(3)
    finally:
        journal.write(run, left, **summary(list(journal.rows.values())))
    if left:
        say(f"{journal.part}: {left} rows don't fit into {settings.minutes:g} minutes; run it again for them")
    return Outcome(sum(map(failed, journal.rows.values())), left, added)


def alive(device: str) -> bool:
    """Whether the device still works: after an illegal access nothing does."""
    try:
        release(device)
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def failed(row: dict[str, Any]) -> bool:
    """A result off float64; or an exception, other than a refusal, in this library."""
    status = row.get("status", "")
    return status.startswith("FAILED") or (status.startswith("error") and row.get("impl", "fused") == "fused")


def explain(error: Exception) -> str:
    """The status of a row whose contestant raised."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{ABSENT}{error.name}"
    text = " ".join(str(error).replace("|", "/").split())[:200]
    return f"refused: {text}" if isinstance(error, ValueError) else f"error: {type(error).__name__}: {text}"


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


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None for what isn't finite: JSON has no NaN."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: clean(y) for name, y in x.items()}
        if isinstance(x, list):
            return [clean(y) for y in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return {name: clean(x) for name, x in row.items()}


def release(device: str) -> None:
    """Give the device's memory back that nobody holds any more."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def describe(settings: Settings) -> dict[str, Any]:
    """Provenance with the peers' versions and the facts of the GPU."""
    options: dict[str, Any] = {"rounds": settings.rounds, **peers()}
    if settings.device == "cuda":
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        options |= {
            "capability": f"{facts.major}.{facts.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": facts.multi_processor_count,
            "memory": facts.total_memory,
        }
    return provenance(settings.device, **options)


def peers() -> dict[str, str]:
    """The versions of the other libraries that are installed."""
    found = {}
    for package in PEERS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return shown[0] if shown else None
