"""What comes out: rows as a table (terminal, Markdown), CSV, JSON with provenance, and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One contestant at one shape. What wasn't measured is None; a row that isn't "ok" has no time.

    Attributes:
        loss, path, impl, units: as `Contestant`; "gemm" for the bare products.
        dtype, tokens, width, vocab: the case.
        status: "ok", "FAILED" (its errors are over the tolerance) or "out of memory".
        value_error: largest abs error of the loss or log-probs; gradient_error: of a gradient; gradient_error_relative: largest
            ‖error‖ / ‖gradient‖. All against float64.
        planned_bytes: what the plan foretold for `extra_bytes`.
        peak_bytes: held beyond inputs; extra_bytes: beyond inputs and gradients.
        seconds: median over the rounds, and the 20 and 80 per cent quantiles.
        over_floor: median (and quantiles) of the rounds' ratios to the bare products of as many units; over_naive: to the naive
            form of the same job.
    """

    loss: str
    path: str
    impl: str
    dtype: str
    tokens: int
    width: int
    vocab: int
    units: int
    status: str = "ok"
    value_error: float | None = None
    gradient_error: float | None = None
    gradient_error_relative: float | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    seconds: float | None = None
    seconds_20: float | None = None
    seconds_80: float | None = None
    over_floor: float | None = None
    over_floor_20: float | None = None
    over_floor_80: float | None = None
    over_naive: float | None = None


class Point(NamedTuple):
    """Memory beyond inputs and gradients at one N."""

    loss: str
    path: str
    impl: str
    dtype: str
    tokens: int
    width: int
    vocab: int
    extra_bytes: int


class Report(NamedTuple):
    """All of a run."""

    provenance: dict[str, Any]
    rows: list[Row]
    points: list[Point]


HEADERS = (
    "N, H, V", "dtype", "loss", "path", "", "time (20–80 %)", "× floor", "× naive", "peak", "extra", "error", "gradient error",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The row as texts under `HEADERS`. "error" is absolute, "gradient error" relative to the gradient's norm."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    def mebibytes(value: int | None) -> str:
        return "" if value is None else f"{value / 2**20:,.1f} MiB"

    time = row.status
    if row.seconds is not None and row.seconds_20 is not None and row.seconds_80 is not None:
        time = f"{row.seconds * 1e3:,.1f} ms ({row.seconds_20 * 1e3:,.1f}–{row.seconds_80 * 1e3:,.1f})"
    return (
        f"{row.tokens}, {row.width}, {row.vocab}", row.dtype, row.loss, row.path, row.impl, time,
        shown(row.over_floor, "{:.2f}") + (f" of {row.units}U" if row.over_floor else ""), shown(row.over_naive, "{:.2f}"),
        mebibytes(row.peak_bytes), mebibytes(row.extra_bytes), shown(row.value_error, "{:.0e}"),
        shown(row.gradient_error_relative, "{:.0e}") if row.path != "forward" else "",
    )  # fmt: skip


def summary(provenance: dict[str, Any]) -> str:
    """Provenance as one line."""
    return ", ".join(f"{key} {value}" for key, value in provenance.items() if value is not None)


def markdown(report: Report) -> str:
    """The table for a README, provenance below it."""
    lines = [HEADERS, ("---",) * len(HEADERS), *map(cells, report.rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{summary(report.provenance)}\n"


def show(report: Report) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADERS, caption=summary(report.provenance))
    previous = None
    for row in report.rows:
        group = (row[3:7], row.loss)
        if row.impl == "gemm" and previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*cells(row), style="bold red" if row.status != "ok" else "bold" if row.impl == "fused" else "dim")
    Console().print(table)


def write(report: Report, folder: Path) -> None:
    """results.json, results.csv (each line with its provenance) and results.png in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "provenance": report.provenance,
        "rows": [row._asdict() for row in report.rows],
        "points": [point._asdict() for point in report.points],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [*Row._fields, *report.provenance])
        lines.writeheader()
        lines.writerows({**row._asdict(), **report.provenance} for row in report.rows)
    plot(report, folder / "results.png")


def read(path: Path) -> Report:
    """A report from its results.json.

    Raises:
        ValueError: not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, points = ([kind(**x) for x in content[key]] for kind, key in ((Row, "rows"), (Point, "points")))
        return Report(content["provenance"], rows, points)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"render: expected a results.json of `rgpb bench`, got {path} ({error})") from error


def plot(report: Report, path: Path) -> None:
    """Left, time over the floor; right, memory beyond inputs and gradients over N."""
    from matplotlib.figure import Figure

    timed = [row for row in report.rows if row.over_floor is not None]
    figure = Figure(figsize=(13, 1.5 + max(4, 0.28 * len(timed))), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    colours = {"fused": "tab:blue", "naive": "tab:gray"}
    for place, row in enumerate(timed):
        low, high = row.over_floor - row.over_floor_20, row.over_floor_80 - row.over_floor  # type: ignore[operator]
        bars.barh(place, row.over_floor, xerr=[[low], [high]], color=colours[row.impl])
    names = [f"{r.loss} {r.path}, {r.impl}  {r.tokens},{r.width},{r.vocab} {r.dtype}" for r in timed]
    bars.set_yticks(range(len(timed)), names, fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1.0, color="black", linewidth=0.8)
    bars.set_xlabel("time over the bare products of as many flops")
    series: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for p in report.points:
        series.setdefault((p.loss, p.path, p.impl, p.width, p.vocab, p.dtype), []).append((p.tokens, p.extra_bytes / 2**20))
    for (loss, job, impl, width, vocab, dtype), places in series.items():
        style = {"color": colours[impl], "linestyle": "-" if dtype == "fp32" else "--"}
        lines.plot(*zip(*sorted(places)), marker="o", markersize=3, **style)
        lines.annotate(f"{loss} {job} {width},{vocab} {dtype}", max(places), fontsize=6)
    if series:
        lines.set_xscale("log", base=2)
        lines.set_yscale("log", base=2)
    lines.set_xlabel("tokens N")
    lines.set_ylabel("MiB beyond inputs and gradients")
    figure.savefig(path, dpi=150)
