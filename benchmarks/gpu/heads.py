"""The parts that time all contestants on the LM heads of known models, in bfloat16.

For each row: the answer is compared with float64, then the memory is taken, then the call is timed in rounds with the
bare products of as many units and with naive PyTorch doing the same job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch

from rgpb.bench import cases
from rgpb.bench.cases import DTYPES, LOG_PROB, TOLERANCE, Floor, Result, Shape
from rgpb.bench.measure import interleaved, peak_memory, quantiles
from rgpb.bench.report import Row

from .journal import ABSENT, Journal, Settings, Task, explain, release, say
from .lineup import JOBS, Case, Entry, Job, Run, absent, entries, exact, make_case

# (model, N, H, V, soft-cap); N = 8192 first: if time is short, that is what there is.
LLAMA = tuple(("Llama-3-8B", tokens, 4096, 128256, None) for tokens in (8192, 4096, 32768))
OTHERS = (
    ("Qwen2.5-7B", 8192, 3584, 152064, None),
    ("Gemma-2-9B", 8192, 3584, 256000, 30.0),
    ("Pythia-2.8B", 8192, 2560, 50304, None),
)
DTYPE = "bf16"
UNITS = (1, 2, 3, 4)
# Timing of one row ends after so many seconds, but not before this many rounds.
ROW_SECONDS, LEAST_ROUNDS = 4.0, 3


class Lab:
    """A case with its bare products and its answers in float64, each made when it is first asked for."""

    def __init__(self, name: str, shape: Shape, softcap: float | None, settings: Settings):
        self.name, self.shape, self.softcap, self.settings = name, shape, softcap, settings
        self.title = name if softcap is None else f"{name}, soft-cap {softcap:g}"
        self.known: dict[tuple[str, bool], Result] = {}

    @cached_property
    def case(self) -> Case:
        """The inputs."""
        say(f"{self.title}: N = {self.shape.tokens}, H = {self.shape.width}, V = {self.shape.vocab}")
        return make_case(self.name, self.shape, self.softcap, DTYPES[DTYPE], self.settings.device)

    @cached_property
    def floor(self) -> Floor:
        """The bare products."""
        return Floor(self.case.batch)

    def truth(self, loss: str, without_ref: bool) -> Result:
        """The answer; those of one loss are held at a time."""
        batch = self.case.batch
        if loss == LOG_PROB:
            return Result(batch.logp, ())
        if (loss, without_ref) not in self.known:
            self.known = {key: value for key, value in self.known.items() if key[0] == loss}
            head = cases.LMHead(batch.weight, softcap=self.softcap)
            ref = torch.zeros_like(batch.ref) if without_ref else batch.ref
            self.known[loss, without_ref] = exact(loss, batch.hidden, head, batch.target, ref, batch.label)
        return self.known[loss, without_ref]

    def row(self, loss: str, path: str, impl: str, units: int, **more: Any) -> Row:
        """A row of this case."""
        return Row(loss, path, impl, DTYPE, *self.shape, units, case=self.title, **more)

    def key(self, *parts: object) -> str:
        """The key of a row of this case."""
        return " | ".join(str(part) for part in (self.title, self.shape, DTYPE, *parts) if part is not None)


def tasks(
    journal: Journal, settings: Settings, shapes: tuple[tuple[str, int, int, int, float | None], ...]
) -> Iterator[Task]:
    """A row for each bare product and each contestant of each job, at each shape."""
    for name, *sizes, softcap in settings.shapes or shapes:
        lab = Lab(name, Shape(*sizes), softcap, settings)  # type: ignore[arg-type]
        for units in UNITS:
            yield Task(lab.key("products", f"{units}U"), partial(floor_row, lab, units))
        for job in JOBS:
            naive, *others = entries(job, settings.workspaces)
            naive_key = entry_key(lab, job, naive)
            for entry in (naive, *others):
                run = partial(as_task, journal, lab, job, entry, naive, naive_key)
                yield Task(entry_key(lab, job, entry), run)
        del lab
        release(settings.device)


def as_task(journal: Journal, lab: Lab, job: Job, entry: Entry, naive: Entry, naive_key: str) -> dict[str, Any]:
    """The row of a contestant, beside naive PyTorch if that has passed its check by now."""
    passed = journal.rows.get(naive_key, {}).get("status") == "ok"
    return contestant_row(lab, job, entry, naive if passed else None)._asdict()


def entry_key(lab: Lab, job: Job, entry: Entry) -> str:
    """The key of a contestant's row."""
    return lab.key(job.loss, job.kind, entry.impl, entry.path, entry.kernels, entry.workspace, entry.note)


def floor_row(lab: Lab, units: int) -> dict[str, Any]:
    """The bare products of that many units."""
    row = lab.row("products", f"{units}U", "gemm", units)
    try:
        times, rounds = timed({units: partial(lab.floor.run, units)}, lab.settings)
    except Exception as error:
        return row._replace(status=explain(error))._asdict()
    return with_time(row, times[units])._replace(rounds=rounds)._asdict()


def contestant_row(lab: Lab, job: Job, entry: Entry, naive: Entry | None) -> Row:
    """One contestant: checked, and if it passed weighed and timed. `naive`, if it passed, is timed beside it."""
    row = lab.row(
        job.loss, entry.path, entry.impl, entry.units or 0,
        kernels=entry.kernels, workspace=entry.workspace, note=entry.note,
    )  # fmt: skip
    missing = absent(entry)
    if missing is not None:
        return row._replace(status=f"{ABSENT}{missing}")
    try:
        run, plan = entry.make(lab.case, job)
        if plan is not None:
            row = row._replace(
                units=plan.units, planned_bytes=plan.extra_bytes, planned_seconds=getattr(plan, "seconds", None)
            )
            if plan.path != entry.path:
                return row._replace(status=f"plan: {plan.path}")
        row = checked(row, run, lab.truth(job.loss, entry.without_ref))
        if row.status != "ok":
            return row
        release(lab.settings.device)
        peak, extra = peak_memory(run, lab.settings.device)
        row = row._replace(peak_bytes=peak, extra_bytes=extra)
        return against(row, lab, job, run, None if naive is entry else naive)
    except Exception as error:
        status = explain(error)
    return row._replace(status=status)


def checked(row: Row, run: Run, truth: Result) -> Row:
    """The row with its errors, and "FAILED" where they are more than the tolerance; a NaN fails, too."""
    found = cases.errors(run(), truth)
    most = TOLERANCE["fused" if row.impl == "fused" else "naive", DTYPES[row.dtype]]
    status = "ok" if found[0] <= most[0] and found[2] <= most[1] else "FAILED"
    value, gradient, relative = (x if math.isfinite(x) else None for x in found)
    return row._replace(status=status, value_error=value, gradient_error=gradient, gradient_error_relative=relative)


def against(row: Row, lab: Lab, job: Job, run: Run, naive: Entry | None) -> Row:
    """The row with its time, over the bare products and over naive PyTorch in the same rounds."""
    as_many = row.units if row.units in UNITS else 1  # of other numbers one is timed
    runs: dict[str, Callable[[], object]] = {"floor": partial(lab.floor.run, as_many), "this": run}
    if naive is not None:
        runs["naive"] = naive.make(lab.case, job)[0]
    try:
        times, rounds = timed(runs, lab.settings)
    except torch.OutOfMemoryError:
        if naive is None:
            raise
        times = None
    if times is None:  # beside this one there is no room for naive PyTorch; outside the handler, so that it is freed
        release(lab.settings.device)
        return against(row, lab, job, run, None)
    over_floor = ratio(times["this"], times["floor"]) * as_many / row.units
    row = with_time(row, times["this"])._replace(rounds=rounds, over_floor=over_floor)
    return row if naive is None else row._replace(over_naive=ratio(times["this"], times["naive"]))


def timed(runs: dict[Any, Callable[[], object]], settings: Settings) -> tuple[dict[Any, list[float]], int]:
    """Interleaved rounds, as many as `ROW_SECONDS` have room for."""
    start = time.perf_counter()
    interleaved(runs, 0, settings.device)
    once = max(time.perf_counter() - start, 1e-9)
    rounds = min(settings.rounds, max(LEAST_ROUNDS, int(ROW_SECONDS / once)))
    return interleaved(runs, rounds, settings.device), rounds


def with_time(row: Row, seconds: list[float]) -> Row:
    """The row with median and quantiles."""
    median, low, high = quantiles(seconds)
    return row._replace(seconds=median, seconds_20=low, seconds_80=high)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return quantiles([a / b for a, b in zip(ours, theirs)])[0]


def points(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Memory over N for BNF with full gradients, from the rows of all N."""
    return {
        "points": [
            row
            for row in rows
            if row["loss"] == "bnf" and row["path"] != "frozen" and row["extra_bytes"] is not None
        ]
    }  # fmt: skip
