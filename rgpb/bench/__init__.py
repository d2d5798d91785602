"""`rgpb bench`: this library beside naive PyTorch and the bare matrix products; `rgpb plan`: what a call will run and hold.

A configuration is first checked against float64, and is timed only if it passes.
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

from rgpb.bench.cases import (
    DTYPES, NAIVE, PATHS, TOLERANCE, Batch, Contestant, Floor, Result, Shape, errors, exact, fused, make_batch, naive,
    naive_bytes, naive_path,
)  # fmt: skip
from rgpb.bench.measure import interleaved, peak_memory, provenance, quantiles
from rgpb.bench.report import Point, Report, Row, markdown, plot, read, show, write
from rgpb.engine.plan import DEFAULT_WORKSPACE, plan, sizes
from rgpb.logprob import IMPLEMENTATIONS
from rgpb.objectives import OBJECTIVES

SMALL, LARGE = Shape(256, 128, 4096), Shape(2048, 512, 32000)
BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def check(batch: Batch, contestants: list[Contestant], shape: Shape, dtype: str) -> list[Row]:
    """A row per contestant (all of one loss) with its errors against float64, not timed yet."""
    loss = contestants[0].loss
    forward = loss == "log-prob"
    both = any(c.path not in ("frozen", "forward") for c in contestants)
    truth = Result(batch.logp, ()) if forward else exact(batch, loss, weight_grad=both)
    rows = []
    for c in contestants:
        row = Row(loss, c.path, c.impl, dtype, *shape, c.units, planned_bytes=c.plan and c.plan.extra_bytes)
        try:
            found = errors(c.run(), truth)
        except torch.OutOfMemoryError:
            rows.append(row._replace(status="out of memory"))
            continue
        allowed = TOLERANCE[c.impl, DTYPES[dtype]]
        passed = found[0] <= allowed[0] and found[2] <= allowed[1]
        value, gradient, relative = (x if math.isfinite(x) else None for x in found)
        rows.append(row._replace(
            status="ok" if passed else "FAILED", value_error=value, gradient_error=gradient, gradient_error_relative=relative
        ))  # fmt: skip
    return rows


def run_group(
    batch: Batch, contestants: list[Contestant], shape: Shape, dtype: str, repeats: int, device: str
) -> list[Row]:
    """One loss at one shape: all are checked; memory and interleaved times of those that passed, the bare products among them."""
    rows = {(c.impl, c.path): row for c, row in zip(contestants, check(batch, contestants, shape, dtype))}
    passed = {(c.impl, c.path): c for c in contestants if rows[c.impl, c.path].status == "ok"}
    for key, c in passed.items():
        peak, extra = peak_memory(c.run, device)
        rows[key] = rows[key]._replace(peak_bytes=peak, extra_bytes=extra)
    floor = Floor(batch)
    floors = sorted({c.units for c in passed.values()})
    runs: dict[Any, Callable[[], object]] = {units: partial(floor.run, units) for units in floors}
    times = interleaved({**runs, **{key: c.run for key, c in passed.items()}}, repeats, device)

    def ratios(key: object, to: object) -> list[float]:
        return [a / b for a, b in zip(times[key], times[to])]

    def timed(row: Row, key: object) -> Row:
        median, low, high = quantiles(times[key])
        return row._replace(seconds=median, seconds_20=low, seconds_80=high)

    for key, c in passed.items():
        median, low, high = quantiles(ratios(key, c.units))
        rival = ("naive", naive_path(c.path))
        over_naive = quantiles(ratios(key, rival))[0] if c.impl == "fused" and rival in times else None
        rows[key] = timed(rows[key], key)._replace(
            over_floor=median, over_floor_20=low, over_floor_80=high, over_naive=over_naive
        )
    loss = contestants[0].loss
    return [timed(Row(loss, "products", "gemm", dtype, *shape, n), n) for n in floors] + list(rows.values())


def line_up(
    batch: Batch, loss: str, paths: list[str], impl: str, workspace: int, say: Callable[[str], object]
) -> list[Contestant]:
    """The library on each path that the plan takes, and the naive form of each job before it; `say` is told of the others."""
    contestants: dict[tuple[str, str], Contestant] = {}
    for path in paths:
        ours = fused(batch, loss, path, impl, workspace)
        if ours.plan is not None and ours.plan.path != path:
            say(f"{loss} {path}: left out, the plan takes {ours.plan.path} ({ours.plan.reason})")
            continue
        for c in (naive(batch, loss, path), ours):
            contestants.setdefault((c.impl, c.path), c)
    return list(contestants.values())


def run_shape(
    shape: Shape, dtype: str, losses: list[str], paths: list[str], repeats: int, workspace: int, impl: str, device: str
) -> tuple[list[Row], list[Point]]:
    """All rows of a shape, and memory over N (an eighth, a quarter, a half, all) for the first path of each loss."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    batch = make_batch(shape, DTYPES[dtype], device)
    backward = [path for path in paths if path != "forward"]
    groups = [(loss, backward) for loss in losses if backward] + [("log-prob", ["forward"])] * ("forward" in paths)
    rows: list[Row] = []
    points: list[Point] = []
    for loss, its_paths in groups:
        contestants = line_up(batch, loss, its_paths, impl, workspace, say)
        if not contestants:
            continue
        say(f"{loss} {shape.tokens},{shape.width},{shape.vocab} {dtype}: {len(contestants)} contestants, {repeats} rounds")
        made = run_group(batch, contestants, shape, dtype, repeats, device)
        rows += made
        passed = {(row.impl, row.path) for row in made if row.status == "ok"}
        for part in (8, 4, 2, 1):
            if shape.tokens % (2 * part) == 0:
                smaller = shape._replace(tokens=shape.tokens // part)
                its_batch = make_batch(smaller, DTYPES[dtype], device) if part > 1 else batch
                for c in line_up(its_batch, loss, its_paths[:1], impl, workspace, lambda _: None):
                    if (c.impl, c.path) in passed:
                        extra = peak_memory(c.run, device).extra
                        points.append(Point(loss, c.path, c.impl, dtype, *smaller, extra))
    return rows, points


# -- the command line ------------------------------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """"512MiB", "1.5GiB" or plain bytes, as an int.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if not match or match[2] not in BYTES or float(match[1]) * BYTES[match[2]] < 1:
        raise ValueError(f"workspace: expected bytes, as 512MiB, 4GiB or 1000000, got {text!r}")
    return int(float(match[1]) * BYTES[match[2]])


def parse_shape(text: str) -> Shape:
    """"2048,512,32000" as N, H, V.

    Raises:
        ValueError: not three positive integers, or an odd N.
    """
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text) or int(text.split(",")[0]) % 2:
        raise ValueError(f"shape: expected N,H,V, N even, as 2048,512,32000, got {text!r}")
    return Shape(*map(int, text.split(",")))


def _some_of(known: tuple[str, ...], text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"expected names of {', '.join(known)}, separated by commas, got {text!r}")
    return chosen


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse: the message of a `ValueError` is shown as it is."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def add_parser(subparsers: Any) -> None:
    """Add `bench` and `plan`. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    bench = subparsers.add_parser("bench", help="compare with naive PyTorch and the bare products: time, memory, error")
    bench.add_argument("--shape", action="append", type=_argument(parse_shape), metavar="N,H,V", help="may be repeated")
    bench.add_argument("--dtype", type=_argument(partial(_some_of, tuple(DTYPES))), default=["fp32"], help="fp32,bf16")
    bench.add_argument("--loss", type=_argument(partial(_some_of, tuple(NAIVE))), default=list(NAIVE), help=",".join(NAIVE))
    bench.add_argument("--path", type=_argument(partial(_some_of, PATHS)), default=list(PATHS), help=",".join(PATHS))
    bench.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up (default 5)")
    bench.add_argument("--threads", type=int, help="of torch; default: as many as it takes by itself")
    bench.add_argument("--workspace", type=_argument(parse_bytes), default=DEFAULT_WORKSPACE, help="as 512MiB, the default")
    bench.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of results.json, .csv and .png")
    bench.add_argument("--render", type=Path, metavar="JSON", help="print its table as Markdown, redraw its plot beside it")
    bench.set_defaults(run=bench_command)
    shows = subparsers.add_parser("plan", help="what a call will run, why, and what it costs")
    for name, text in (("tokens", "N, response tokens"), ("hidden", "H"), ("vocab", "V")):
        shows.add_argument(f"--{name}", type=int, required=True, help=text)
    shows.add_argument("--loss", choices=sorted(OBJECTIVES), default="bnf")
    shows.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    shows.add_argument("--device-type", choices=("cpu", "cuda"), default="cuda")
    shows.add_argument("--frozen-head", action="store_true", help="the head has no gradient (LoRA)")
    shows.add_argument("--workspace", type=_argument(parse_bytes), default=DEFAULT_WORKSPACE, help="as 512MiB, the default")
    shows.set_defaults(run=plan_command)


def bench_command(arguments: argparse.Namespace) -> int:
    """`rgpb bench`. 1 if a contestant failed its check, 2 if it can't be run at all."""
    missing = [package for package in ("matplotlib", "rich") if find_spec(package) is None]
    problem = None
    if missing:
        problem = f"needs {' and '.join(missing)}: pip install 'rgpb[bench]'"
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        problem = "--device: expected a CUDA GPU, got torch.cuda.is_available() = False"
    elif arguments.repeats < 1 or (arguments.threads is not None and arguments.threads < 1):
        problem = f"--repeats and --threads: expected at least 1, got {arguments.repeats} and {arguments.threads}"
    if problem is not None:
        print(f"rgpb bench: {problem}", file=sys.stderr)
        return 2
    try:
        return _render(arguments.render) if arguments.render is not None else _bench(arguments)
    except ValueError as error:
        print(f"rgpb bench: {error}", file=sys.stderr)
        return 2


def _render(path: Path) -> int:
    report = read(path)
    plot(report, path.with_suffix(".png"))
    print(markdown(report), end="")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    points: list[Point] = []
    fixed = (arguments.loss, arguments.path, arguments.repeats, arguments.workspace, arguments.impl, arguments.device)
    for shape in arguments.shape or [SMALL, LARGE]:
        for dtype in arguments.dtype:
            for collected, made in zip((rows, points), run_shape(shape, dtype, *fixed)):
                collected += made  # type: ignore[operator]
    options = {"repeats": arguments.repeats, "workspace": arguments.workspace, "impl": arguments.impl}
    report = Report(provenance(arguments.device, **options), rows, points)
    write(report, arguments.out)
    show(report)
    return int(any(row.status == "FAILED" for row in rows))


def plan_command(arguments: argparse.Namespace) -> int:
    """`rgpb plan`. 2 if nothing fits."""
    a, spec = arguments, OBJECTIVES[arguments.loss]
    dtype = {**DTYPES, "fp16": torch.float16}[a.dtype]
    try:
        if min(a.tokens, a.hidden, a.vocab) < 1:
            raise ValueError(f"tokens, hidden, vocab: expected at least 1, got {a.tokens}, {a.hidden}, {a.vocab}")
        chosen = plan(
            a.tokens, sizes(a.vocab, a.hidden, dtype, dtype, a.device_type), weight_grad=not a.frozen_head, couples=spec.couples,
            half=a.dtype == "fp16", entropy_grad=spec.entropy_grad, workspace=a.workspace,
        )  # fmt: skip
    except ValueError as error:
        print(f"rgpb plan: {error}", file=sys.stderr)
        return 2
    rivals = naive_bytes(a.tokens, a.vocab, dtype.itemsize)
    print(f"path     {chosen.path}: {chosen.reason}")
    print(f"work     {chosen.units} units of 2·N·V·H, {chosen.flops / 1e12:,.3g} TFLOP (naive: {2 if a.frozen_head else 3} units)")
    print(f"chunks   {chosen.rows:,} of {a.tokens:,} rows of logits at a time")
    print(f"memory   {chosen.extra_bytes / 2**20:,.1f} MiB beyond inputs and gradients, of {a.workspace / 2**20:,.1f} MiB allowed")
    print(f"naive    {rivals / 2**20:,.1f} MiB: 3 · N · V float32 numbers at its peak, {rivals / chosen.extra_bytes:,.1f} times as much")
    return 0
