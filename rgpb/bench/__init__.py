"""`rgpb bench`: this library beside naive PyTorch and the bare matrix products: time, memory, error.

A configuration is first checked against float64, and timed only if it passes.

| module    | holds                                                                                  |
|-----------|----------------------------------------------------------------------------------------|
| `contest` | who is compared: batches, naive PyTorch, this library; the check and the race          |
| `measure` | how it is measured: interleaved rounds, memory, provenance                             |
| `tables`  | rows as tables, JSON and pictures                                                      |
| `plan`    | `rgpb plan`: what a call will run, why, and what it costs                              |
| `doctor`  | `rgpb doctor`: which kernels can run here, and whether they are right                  |
| `tune`    | `rgpb tune`: the fastest configuration of each Triton kernel                           |
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rgpb.arguments import argument, parse_bytes, positive
from rgpb.bench import contest
from rgpb.bench.contest import DTYPES, LOG_PROB, NAIVE, PATHS, Case, Contestant, Job, Shape, kind_of, units_of
from rgpb.bench.measure import failed, peak_memory, provenance
from rgpb.bench.tables import Report, Row, markdown, plot, read, show, write
from rgpb.engine.workspace import Workspace
from rgpb.kernels import IMPLEMENTATIONS

SMALL, LARGE = Shape(256, 128, 4096), Shape(2048, 512, 32000)


def jobs_of(losses: list[str], paths: list[str]) -> dict[Job, list[str]]:
    """The jobs, and the paths on which the library does each; those of one loss stand together."""
    jobs: dict[Job, list[str]] = {}
    for loss in losses:
        for path in paths:
            if path != "forward":
                jobs.setdefault(Job(loss, kind_of(path)), []).append(path)
    return {**jobs, Job(LOG_PROB, "forward"): ["forward"]} if "forward" in paths else jobs


def line_up(job: Job, paths: list[str], workspace: int | Workspace, impl: str) -> list[Contestant]:
    """Naive PyTorch, then the library on each path."""
    return [
        Contestant("naive", job.kind, units_of(job.kind), lambda batch, job: contest.naive(batch, job)),
        *(
            Contestant("fused", path, None, partial(contest.fused, path=path, workspace=workspace, impl=impl))
            for path in paths
        ),
    ]


def run_shape(
    shape: Shape, dtype: str, jobs: dict[Job, list[str]], repeats: int, workspace: int | Workspace, impl: str,
    device: str,
) -> tuple[list[Row], list[Row]]:  # fmt: skip
    """Rows of a shape, and unless it is kept, memory at an eighth, a quarter, a half and all of N for the first job.

    Raises:
        ValueError: an odd N, or a `workspace` too small for one row.
    """
    case = Case(shape, dtype, device)
    rows: list[Row] = []
    points: list[Row] = []
    for job, paths in jobs.items():
        print(f"{job.loss} {shape} {dtype}: {', '.join(paths)}", file=sys.stderr, flush=True)
        contestants = line_up(job, paths, workspace, impl)
        for one in contestants:
            _, plan = one.make(case.batch, job)  # bad arguments are no result
            if plan is not None and plan.path != one.path:
                print(f"{job.loss} {one.path}: the plan takes {plan.path}, {plan.reason}", file=sys.stderr)
        raced = contest.race(case, [contest.prepared(case, job, one) for one in contestants], repeats)
        if not rows and isinstance(workspace, int):
            passed = [one for one, row in zip(contestants, raced.rows) if row.status == "ok"]
            points = [*memory_of(case, job, passed), *(row for row in raced.rows if row.status == "ok")]
        rows += [*raced.floors, *raced.rows]
    return rows, [Row(*row[:8], extra_bytes=row.extra_bytes) for row in points]


def memory_of(case: Case, job: Job, contestants: list[Contestant]) -> list[Row]:
    """Rows with the memory at an eighth, a quarter and a half of a case's tokens."""
    made: list[Row] = []
    for tokens in (case.shape.tokens // part for part in (8, 4, 2) if case.shape.tokens % (2 * part) == 0):
        smaller = Case(case.shape._replace(tokens=tokens), case.dtype, case.device)
        for one in contestants:
            run, plan = one.make(smaller.batch, job)
            row = smaller.row(job.loss, one.path, one.impl, one.units or (plan.units if plan is not None else 0))
            made.append(row._replace(extra_bytes=peak_memory(run, case.device).extra))
    return made


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
    text, about = "compare with naive PyTorch: time, memory, error", __doc__.partition("\n\n| ")[0]
    parser = subparsers.add_parser("bench", help=text, description=about)
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
    parser.add_argument("--keep", action="store_true", help="keep it, and the head's gradient, between calls")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results.json and results.png")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="JSON",
        help="measure nothing: print the tables of results as Markdown, and draw the picture of each beside it",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report, or render reports. 1 if a contestant failed its check.

    Raises:
        ValueError: a package or a GPU is missing, `workspace` is too small, or the file to render isn't a report.
    """
    a = arguments
    missing = [package for package in ("matplotlib", "rich") if find_spec(package) is None]
    if missing:
        raise ValueError(f"bench needs {' and '.join(missing)}: pip install 'rgpb[bench]'")
    if a.render is not None:
        for path in a.render:
            report = read(path)
            if report.rows:
                plot(report, path.with_suffix(".png"))
            print(markdown(report), end="")
        return 0
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, got torch.cuda.is_available() = False")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    workspace = Workspace(a.workspace, gradients=True) if a.keep else a.workspace
    facts = provenance(a.device, repeats=a.repeats, workspace=a.workspace, kept=a.keep, kernels=a.impl)
    report = Report(facts, [], [])
    for shape in a.shape or [SMALL, LARGE]:
        for dtype in a.dtype:
            jobs = jobs_of(a.loss, a.path)
            rows, points = run_shape(shape, dtype, jobs, a.repeats, workspace, a.impl, a.device)
            report.rows.extend(rows)
            report.points.extend(points)
    write(report, a.out)
    show(report)
    return int(any(failed(row._asdict()) for row in report.rows))
