"""Rows on disk: each is appended to `<part>.jsonl` when it is finished, and a row that is there isn't run again.

A line is `{"run": provenance}` at the start of a run that adds rows, or `{"key": …, "row": {…}}`. A last line that was
cut off in the middle is dropped.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rgpb.bench.measure import ABSENT, alive, explain, failed, installed, provenance, version_of
from rgpb.bench.tables import finite, save

WORKSPACES = {"cuda": (512 * 2**20, 4 * 2**30), "cpu": (512 * 2**20, 16 * 2**20)}
PEERS = ("liger-kernel", "cut-cross-entropy", "trl")


class Task(NamedTuple):
    """Rows to be that are measured together: their keys within the part, and what makes those that it is given."""

    keys: tuple[str, ...]
    run: Callable[[list[str]], Iterable[tuple[str, dict[str, Any]]]]


def single(key: str, make: Callable[[], dict[str, Any]], row: dict[str, Any] | None = None) -> Task:
    """A task of one row: all its columns, with what `make` adds to them, or with the status why it couldn't."""

    def run(keys: list[str]) -> list[tuple[str, dict[str, Any]]]:
        try:
            more = make()
        except Exception as error:
            more = {"status": explain(error)}
        return [(key, {**(row or {}), **more})]

    return Task((key,), run)


class Settings(NamedTuple):
    """What the command line says; `shapes`: (name, N, H, V, soft-cap)."""

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
    again: bool = False

    def wants(self, key: str) -> bool:
        """Whether the patterns let a row through."""
        return (self.only is None or self.only.search(key) is not None) and (
            self.without is None or self.without.search(key) is None
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

    def __init__(self, folder: Path, part: str, settings: Settings):
        self.settings = settings
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
        """Whether the row is there, and no module was installed since that it lacked; with `again`, and is right."""
        row = self.rows.get(key, {})
        status = row.get("status")
        if self.settings.again and failed(row):
            return False
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
        last = {name: x for name, x in (self.runs or [run])[-1].items() if name != "first_row"}
        content = {"part": self.part, "provenance": last, "runs": self.runs, "left": left}
        save(self.json, {**content, "rows": list(self.rows.values()), "points": [], **more})


Summary = Callable[[list[dict[str, Any]]], dict[str, Any]]


def work(journal: Journal, tasks: Iterable[Task], run: dict[str, Any], summary: Summary) -> Outcome:
    """Run what isn't done yet, within the minutes; at least one task, so that repeated runs come to an end.

    Raises:
        ValueError: the rows that are there are another device's.
    """
    there = journal.runs[-1].get("device") if journal.runs else None
    if there not in (None, run.get("device")):
        raise ValueError(f"out: expected results of {run.get('device')}, got those of {there} in {journal.path}")
    start, settings, longest, made, left, added = time.monotonic(), journal.settings, 0.0, 0, 0, 0
    try:
        for task in tasks:
            keys = [key for key in task.keys if settings.wants(key) and not journal.done(key)]
            begin = time.monotonic()
            if not keys:
                continue
            if left or (made and begin - start + longest > 60 * settings.minutes):
                left += len(keys)
                continue
            for key, row in task.run(keys):
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


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def describe(settings: Settings) -> dict[str, Any]:
    """Provenance with the peers' versions, and a hash of the sources, which a copy without a commit has, too."""
    versions = {name: version_of(name) for name in PEERS}
    return provenance(settings.device, rounds=settings.rounds, sources=sources(), **versions)


def sources() -> str:
    """Of all that a result depends on: the package and its kernels. That of a commit, if its files are those."""
    root = Path(__file__).parents[2]
    files = [path for name in ("rgpb", "kernels", "csrc") for path in sorted((root / name).rglob("*.*"))]
    texts = [path.read_bytes() for path in files if path.suffix in (".py", ".cpp", ".h", ".inl")]
    return sha256(b"".join(texts)).hexdigest()[:12]
