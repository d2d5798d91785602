"""The contestants of `rgpb bench` under pytest-benchmark: `pytest benchmarks`, which can compare with earlier runs.

Sizes come from the environment: RGPB_BENCH_SHAPES="2048,512,32000 8192,1024,32000", RGPB_BENCH_DTYPES="fp32 bf16",
RGPB_BENCH_DEVICE=cuda, RGPB_BENCH_ROUNDS=9. All who do a job are checked and timed as in `rgpb bench`, in the same
rounds; pytest-benchmark is then told each one's seconds, by a clock that shows what was measured.
"""

from __future__ import annotations

import os
from functools import cache

import pytest

from rgpb.bench import contest, jobs_of, line_up, parse_shape
from rgpb.bench.contest import NAIVE, PATHS, Case
from rgpb.engine.plan import DEFAULT_WORKSPACE

SHAPES = [parse_shape(text) for text in os.environ.get("RGPB_BENCH_SHAPES", "64,32,1024").split()]
DTYPES = os.environ.get("RGPB_BENCH_DTYPES", "fp32").split()
DEVICE = os.environ.get("RGPB_BENCH_DEVICE", "cpu")
ROUNDS = int(os.environ.get("RGPB_BENCH_ROUNDS", "5"))
JOBS = jobs_of([*NAIVE], [*PATHS])


class Clock:
    """What pytest-benchmark takes for the time: it moves by the seconds that it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@cache
def case_of(shape, dtype):
    """The batch and the answers, made once for all jobs."""
    return Case(shape, dtype, DEVICE)


@cache
def raced(shape, dtype, job):
    """All who do a job, timed in the same rounds."""
    case = case_of(shape, dtype)
    ready = [contest.prepared(case, job, one) for one in line_up(job, JOBS[job], DEFAULT_WORKSPACE, "auto")]
    return contest.race(case, ready, ROUNDS)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("job", "at"),
    [(job, at) for job, paths in JOBS.items() for at in range(1 + len(paths))],
    ids=lambda x: str(x) if isinstance(x, int) else f"{x.loss} {x.kind}",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(benchmark, shape, dtype, job, at):
    race = raced(shape, dtype, job)
    row = race.rows[at]
    if row.status.startswith("plan"):
        pytest.skip(f"{row.status} for {row.path}")
    assert row.status == "ok", row
    benchmark.group = f"{shape} {dtype} {job.loss} {job.kind}"
    benchmark.name = f"{row.impl} {row.path}"
    benchmark.extra_info.update(row._asdict())
    seconds = iter(race.seconds[at])

    def next_round():
        CLOCK.now += next(seconds)

    benchmark.pedantic(next_round, rounds=len(race.seconds[at]))
