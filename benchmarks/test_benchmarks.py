"""The cases of `rgpb bench` one by one: `pytest benchmarks`.

Sizes come from the environment: RGPB_BENCH_SHAPES="2048,512,32000 8192,1024,32000", RGPB_BENCH_DTYPES="fp32 bf16",
RGPB_BENCH_DEVICE=cuda. Contestants run one after the other here; for ratios use `rgpb bench`, which interleaves them.
"""

from __future__ import annotations

import os

import pytest
import torch

from rgpb.bench import cases, check, parse_shape
from rgpb.engine.plan import DEFAULT_WORKSPACE

SHAPES = [parse_shape(text) for text in os.environ.get("RGPB_BENCH_SHAPES", "64,32,1024").split()]
DTYPES = os.environ.get("RGPB_BENCH_DTYPES", "fp32").split()
DEVICE = os.environ.get("RGPB_BENCH_DEVICE", "cpu")
JOBS = [
    *[
        ("naive", loss, path) for loss in cases.NAIVE for path in ("single", "frozen")
    ],  # two_pass does the job of single
    *[("fused", loss, path) for loss in cases.NAIVE for path in ("single", "two_pass", "frozen")],
    *[(impl, cases.LOG_PROB, "forward") for impl in ("naive", "fused")],
]


def synchronised(run):
    """`run`, ended when the device has ended."""

    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return timed


@pytest.fixture(
    scope="module", params=[(s, d) for s in SHAPES for d in DTYPES], ids=lambda case: f"{case[0]}-{case[1]}"
)
def case(request):
    """(shape, dtype, batch), made once for all contestants."""
    shape, dtype = request.param
    return shape, dtype, cases.make_batch(shape, cases.DTYPES[dtype], DEVICE)


@pytest.mark.parametrize(("impl", "loss", "path"), JOBS)
def test_time(benchmark, case, impl, loss, path):
    shape, dtype, batch = case
    if impl == "naive":
        contestant = cases.naive(batch, loss, path)
    else:
        contestant = cases.fused(batch, loss, path, "auto", DEFAULT_WORKSPACE)
    (row,) = check(batch, [contestant], shape, dtype)
    if row.status.startswith("plan"):
        pytest.skip(f"{row.status} for {path}")
    assert row.status == "ok", row
    benchmark.group = f"{shape} {dtype} {loss}, {contestant.units} units"
    benchmark.extra_info.update(value_error=row.value_error, gradient_error=row.gradient_error_relative)
    benchmark(synchronised(contestant.run))


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_floor(benchmark, case, units):
    shape, dtype, batch = case
    floor = cases.Floor(batch)
    benchmark.group = f"{shape} {dtype} bare products"
    benchmark(synchronised(lambda: floor.run(units)))
