"""The parts that time all contestants on LM heads: those of known models in bfloat16, and on a CPU in float32.

For each row: the answer is compared with float64, then the memory is taken, then the call is timed in rounds with the
bare products of as many units and with naive PyTorch doing the same job. On a CPU all who do a job share the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from rgpb.bench import cases
from rgpb.bench.cases import DTYPES, LOG_PROB, TOLERANCE, Floor, Result, Shape
from rgpb.bench.measure import interleaved, peak_memory, quantiles
from rgpb.bench.report import Row

from .journal import ABSENT, Group, Journal, Settings, Task, explain, release, say
from .lineup import JOBS, Case, Entry, Job, Run, absent, entries, exact, make_case

# (model, N, H, V, soft-cap); N = 8192 first: if time is short, that is what there is.
LLAMA = tuple(("Llama-3-8B", tokens, 4096, 128256, None) for tokens in (8192, 4096, 32768))
OTHERS = (
    ("Qwen2.5-7B", 8192, 3584, 152064, None),
    ("Gemma-2-9B", 8192, 3584, 256000, 30.0),
    ("Pythia-2.8B", 8192, 2560, 50304, None),
)
# The second has eight times the flops of the first.
CPU = (("small", 2048, 512, 32000, None), ("Llama-3.2-1B", 1024, 2048, 128256, None))
UNITS = (1, 2, 3, 4)
# Timing of one row, or of all rows of a job, ends after so many seconds, but not before this many rounds.
ROW_SECONDS, JOB_SECONDS, LEAST_ROUNDS = 4.0, 200.0, 3


class Lab:
    """A case with its bare products and its answers in float64, each made when it is first asked for."""

    def __init__(self, name: str, shape: Shape, softcap: float | None, settings: Settings, dtype: str):
        self.name, self.shape, self.softcap, self.settings, self.dtype = name, shape, softcap, settings, dtype
        self.title = name if softcap is None else f"{name}, soft-cap {softcap:g}"
        self.known: dict[tuple[str, bool], Result] = {}

    @cached_property
    def case(self) -> Case:
        """The inputs."""
        say(f"{self.title}: N = {self.shape.tokens}, H = {self.shape.width}, V = {self.shape.vocab}")
        return make_case(self.name, self.shape, self.softcap, DTYPES[self.dtype], self.settings.device)

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
        return Row(loss, path, impl, self.dtype, *self.shape, units, case=self.title, **more)

    def key(self, *parts: object) -> str:
        """The key of a row of this case."""
        return " | ".join(str(part) for part in (self.title, self.shape, self.dtype, *parts) if part is not None)


def tasks(
    journal: Journal, settings: Settings, shapes: tuple[tuple[str, int, int, int, float | None], ...],
    dtype: str = "bf16", together: bool = False,
) -> Iterator[Task | Group]:  # fmt: skip
    """A row for each bare product and each contestant of each job, at each shape; `together`: a job's rows at once."""
    for name, *sizes, softcap in settings.shapes or shapes:
        lab = Lab(name, Shape(*sizes), softcap, settings, settings.dtype or dtype)  # type: ignore[arg-type]
        for units in UNITS:
            yield Task(lab.key("products", f"{units}U"), partial(floor_row, lab, units))
        for job in JOBS:
            found = entries(job, settings.workspaces, settings.device, lab.dtype)
            keyed = {entry_key(lab, job, entry): entry for entry in found}
            if together:
                yield Group(tuple(keyed), partial(job_rows, journal, lab, job, keyed))
            else:
                for key in keyed:
                    yield Task(key, partial(as_task, journal, lab, job, keyed, key))
        del lab
        release(settings.device)


def as_task(journal: Journal, lab: Lab, job: Job, keyed: dict[str, Entry], key: str) -> dict[str, Any]:
    """The row of a contestant, beside naive PyTorch if that has passed its check by now."""
    return contestant_row(lab, job, keyed[key], passed_naive(journal, keyed))._asdict()


def passed_naive(journal: Journal, keyed: dict[str, Entry]) -> Entry | None:
    """Naive PyTorch, the first of those who do a job, if its row is there and right."""
    key, naive = next(iter(keyed.items()))
    return naive if journal.rows.get(key, {}).get("status") == "ok" else None


def job_rows(
    journal: Journal, lab: Lab, job: Job, keyed: dict[str, Entry], keys: list[str]
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of those keys: each checked and weighed, then all that passed are timed in the same rounds.

    The bare products and naive PyTorch take part in these, the latter also where its row is there already.
    """
    ready = {}
    for key in keys:
        ready[key] = prepared(lab, job, keyed[key])
        say(f"checked: {key}: {ready[key].row.status}")
    naive_key, rows = next(iter(keyed)), {key: one.row for key, one in ready.items()}
    runs: dict[Any, Callable[[], object]] = {key: one.run for key, one in ready.items() if one.run is not None}
    timeable, rival = [*runs], passed_naive(journal, keyed)
    if rival is not None and naive_key not in ready:
        runs[naive_key] = rival.make(lab.case, job)[0]
    floors = {n: partial(lab.floor.run, n) for n in sorted({floor_units(rows[key]) for key in timeable})}
    once = max(sum(one.seconds for one in ready.values()), 1e-9)
    rounds = min(lab.settings.rounds, max(LEAST_ROUNDS, int(JOB_SECONDS / once)))
    try:
        times = interleaved({**floors, **runs}, rounds if timeable else 0, lab.settings.device)
    except Exception as error:
        say(f"{lab.title}: {job.loss} {job.kind}: not together, one by one: {explain(error)}")
        for key in keys:
            yield as_task(journal, lab, job, keyed, key)
        return
    for key in timeable:
        beside = None if key == naive_key else times.get(naive_key)
        rows[key] = compared(rows[key], times[key], times[floor_units(rows[key])], beside)._replace(rounds=rounds)
    yield from (row._asdict() for row in rows.values())


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


class Ready(NamedTuple):
    """A row that is ready for its time: with the call and the seconds that it takes, about; else without the call."""

    row: Row
    run: Run | None = None
    seconds: float = 0.0


def prepared(lab: Lab, job: Job, entry: Entry) -> Ready:
    """One contestant, checked, and if it passed weighed."""
    row = lab.row(
        job.loss, entry.path, entry.impl, entry.units or 0,
        kernels=entry.kernels, workspace=entry.workspace, note=entry.note,
    )  # fmt: skip
    missing = absent(entry)
    if missing is not None:
        return Ready(row._replace(status=f"{ABSENT}{missing}"))
    try:
        run, plan = entry.make(lab.case, job)
        if plan is not None:
            row = row._replace(
                units=plan.units, planned_bytes=plan.extra_bytes, planned_seconds=getattr(plan, "seconds", None)
            )
            if plan.path != entry.path:
                return Ready(row._replace(status=f"plan: {plan.path}"))
        row = checked(row, run, lab.truth(job.loss, entry.without_ref))
        if row.status != "ok":
            return Ready(row)
        release(lab.settings.device)
        start = time.perf_counter()
        peak, extra = peak_memory(run, lab.settings.device)
        seconds = (time.perf_counter() - start) / 2  # it runs twice
        return Ready(row._replace(peak_bytes=peak, extra_bytes=extra), run, seconds)
    except Exception as error:
        status = explain(error)
    return Ready(row._replace(status=status))


def contestant_row(lab: Lab, job: Job, entry: Entry, naive: Entry | None) -> Row:
    """One contestant: checked, and if it passed weighed and timed. `naive`, if it passed, is timed beside it."""
    row, run, _ = prepared(lab, job, entry)
    if run is None:
        return row
    try:
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
    runs: dict[str, Callable[[], object]] = {"floor": partial(lab.floor.run, floor_units(row)), "this": run}
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
    return compared(row, times["this"], times["floor"], times.get("naive"))._replace(rounds=rounds)


def floor_units(row: Row) -> int:
    """How many units of bare products this row is timed with: of other numbers one."""
    return row.units if row.units in UNITS else 1


def compared(row: Row, this: list[float], floor: list[float], naive: list[float] | None) -> Row:
    """The row with its time, over as many units of bare products as it has, and over naive PyTorch."""
    over_floor = ratio(this, floor) * floor_units(row) / row.units
    row = with_time(row, this)._replace(over_floor=over_floor)
    return row if naive is None else row._replace(over_naive=ratio(this, naive))


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
