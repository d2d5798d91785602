"""`rgpb bench`: this library beside naive PyTorch and the bare matrix products: time, memory, error.

A configuration is first checked against float64, and timed only if it passes.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rgpb.arguments import argument, parse_bytes, positive
from rgpb.bench import cases
from rgpb.bench.cases import DTYPES, LOG_PROB, NAIVE, PATHS, TOLERANCE, Batch, Contestant, Floor, Shape, make_batch
from rgpb.bench.measure import interleaved, peak_memory, provenance, quantiles
from rgpb.bench.report import Report, Row, markdown, plot, read, show, write
from rgpb.kernels import IMPLEMENTATIONS

SMALL, LARGE = Shape(256, 128, 4096), Shape(2048, 512, 32000)


def line_up(batch: Batch, loss: str, paths: list[str], impl: str, workspace: int) -> list[Contestant]:
    """The library on each path, and the naive form of each job once."""
    ours = [cases.fused(batch, loss, path, impl, workspace) for path in paths]
    theirs = {c.path: c for c in (cases.naive(batch, loss, path) for path in paths)}
    return [*theirs.values(), *ours]


def check(batch: Batch, contestants: list[Contestant], shape: Shape, dtype: str) -> list[Row]:
    """A row for each contestant (all of one loss) with its errors against float64, neither timed nor weighed."""
    loss = contestants[0].loss
    truth = cases.exact(batch, loss, weight_grad=any(c.path not in ("frozen", "forward") for c in contestants))
    rows = []
    for c in contestants:
        row = Row(loss, c.path, c.impl, dtype, *shape, c.units)
        if c.plan is not None:
            row = row._replace(planned_bytes=c.plan.extra_bytes)
            if c.plan.path != c.path:
                print(f"{loss} {c.path}: the plan takes {c.plan.path}, {c.plan.reason}", file=sys.stderr)
                rows.append(row._replace(status=f"plan: {c.plan.path}"))
                continue
        try:
            found = cases.errors(c.run(), truth)
        except torch.OutOfMemoryError:
            rows.append(row._replace(status="out of memory"))
            continue
        most = TOLERANCE[c.impl, DTYPES[dtype]]
        status = "ok" if found[0] <= most[0] and found[2] <= most[1] else "FAILED"  # a NaN fails, too
        value, gradient, relative = (x if math.isfinite(x) else None for x in found)
        row = row._replace(value_error=value, gradient_error=gradient, gradient_error_relative=relative)
        rows.append(row._replace(status=status))
    return rows


def run_group(
    batch: Batch, contestants: list[Contestant], shape: Shape, dtype: str, repeats: int, device: str
) -> list[Row]:
    """One loss at one shape: all are checked; those that passed are weighed, then timed with the bare products."""
    rows = dict(zip(contestants, check(batch, contestants, shape, dtype)))
    passed = [c for c in contestants if rows[c].status == "ok"]
    for c in passed:
        peak, extra = peak_memory(c.run, device)
        rows[c] = rows[c]._replace(peak_bytes=peak, extra_bytes=extra)
    floor, units = Floor(batch), sorted({c.units for c in passed})
    runs: dict[Any, Callable[[], object]] = {n: partial(floor.run, n) for n in units}
    times = interleaved({**runs, **{c: c.run for c in passed}}, repeats, device)

    def timed(row: Row, key: object) -> Row:
        median, low, high = quantiles(times[key])
        return row._replace(seconds=median, seconds_20=low, seconds_80=high)

    def ratio(key: object, to: object) -> float:
        return quantiles([a / b for a, b in zip(times[key], times[to])])[0]

    rivals = {c.path: c for c in passed if c.impl == "naive"}
    for c in passed:
        rows[c] = timed(rows[c], c)._replace(over_floor=ratio(c, c.units))
        rival = rivals.get(cases.naive_path(c.path))
        if c.impl == "fused" and rival is not None:
            rows[c] = rows[c]._replace(over_naive=ratio(c, rival))
    floors = [timed(Row("products", f"{n}U", "gemm", dtype, *shape, n), n) for n in units]
    return floors + list(rows.values())


def run_shape(
    shape: Shape, dtype: str, losses: list[str], paths: list[str], repeats: int, workspace: int, impl: str, device: str
) -> tuple[list[Row], list[Row]]:
    """The rows of a shape, and memory at an eighth, a quarter, a half and all of N for the first loss.

    Raises:
        ValueError: an odd N, or a `workspace` too small for one row.
    """
    batch = make_batch(shape, DTYPES[dtype], device)
    backward = [path for path in paths if path != "forward"]
    groups = [(loss, backward) for loss in losses if backward] + [(LOG_PROB, ["forward"])] * ("forward" in paths)
    rows: list[Row] = []
    for loss, its_paths in groups:
        print(f"{loss} {shape} {dtype}: {', '.join(its_paths)}", file=sys.stderr, flush=True)
        rows += run_group(batch, line_up(batch, loss, its_paths, impl, workspace), shape, dtype, repeats, device)
    loss, its_paths = groups[0]
    points = [Row(*row[:8], extra_bytes=row.extra_bytes) for row in rows if row.loss == loss and row.status == "ok"]
    passed = {(point.impl, point.path) for point in points}
    for smaller in (
        shape._replace(tokens=shape.tokens // part) for part in (2, 4, 8) if shape.tokens % (2 * part) == 0
    ):
        its_batch = make_batch(smaller, DTYPES[dtype], device)
        for c in line_up(its_batch, loss, its_paths, impl, workspace):
            if (c.impl, c.path) in passed:
                extra = peak_memory(c.run, device).extra
                points.append(Row(loss, c.path, c.impl, dtype, *smaller, c.units, extra_bytes=extra))
    return rows, points


def parse_shape(text: str) -> Shape:
    """N, H, V from a text such as 2048,512,32000.

    Raises:
        ValueError: not three positive integers, or an odd N.
    """
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text) or int(text.split(",")[0]) % 2:
        raise ValueError(f"expected N,H,V with N even, as 2048,512,32000, got {text!r}")
    return Shape(*map(int, text.split(",")))


def _names(known: tuple[str, ...], text: str) -> list[str]:
    if not set(text.split(",")) <= set(known):
        raise ValueError(f"expected names of {','.join(known)}, separated by commas, got {text!r}")
    return text.split(",")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `bench`."""
    parser = subparsers.add_parser("bench", help="compare with naive PyTorch: time, memory, error", description=__doc__)
    defaults = f"default {SMALL} and {LARGE}"
    parser.add_argument("--shape", action="append", type=argument(parse_shape), metavar="N,H,V", help=defaults)
    for name, known, default in (
        ("dtype", (*DTYPES,), "fp32"),
        ("loss", (*NAIVE,), ",".join(NAIVE)),
        ("path", PATHS, ",".join(PATHS)),
    ):
        parser.add_argument(
            f"--{name}", type=argument(partial(_names, known)), default=default, help=f"some of {','.join(known)}"
        )
    parser.add_argument("--repeats", type=argument(positive), default=5, help="rounds, after one to warm up; default 5")
    parser.add_argument("--threads", type=argument(positive), help="of torch; default: what torch takes")
    parser.add_argument("--workspace", type=argument(parse_bytes), default="512MiB", help="default %(default)s")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results.json, .csv and .png")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="only print its table as Markdown and redraw its plot"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report, or render a report. 1 if a contestant failed its check.

    Raises:
        ValueError: a package or a GPU is missing, `workspace` is too small, or the file to render isn't a report.
    """
    a = arguments
    missing = [package for package in ("matplotlib", "rich") if find_spec(package) is None]
    if missing:
        raise ValueError(f"bench needs {' and '.join(missing)}: pip install 'rgpb[bench]'")
    if a.render is not None:
        report = read(a.render)
        if report.rows:
            plot(report, a.render.with_suffix(".png"))
        print(markdown(report), end="")
        return 0
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, got torch.cuda.is_available() = False")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    report = Report(provenance(a.device, repeats=a.repeats, workspace=a.workspace, kernels=a.impl), [], [])
    for shape in a.shape or [SMALL, LARGE]:
        for dtype in a.dtype:
            rows, points = run_shape(shape, dtype, a.loss, a.path, a.repeats, a.workspace, a.impl, a.device)
            report.rows.extend(rows)
            report.points.extend(points)
    write(report, a.out)
    show(report)
    return int(any(row.status == "FAILED" for row in report.rows))
