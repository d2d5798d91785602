"""What comes out: rows as a table (terminal, Markdown), CSV, JSON with provenance, and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One contestant at one shape. What wasn't measured is None; a row that isn't "ok" has no time.

    Attributes:
        loss, path, impl, units: as in `Contestant`; impl "gemm" for the bare products.
        dtype, tokens, width, vocab: the case.
        status: "ok", "FAILED" (off float64 by more than the tolerance), "out of memory", or why the plan takes another
            path.
        value_error: largest error of the loss or the log-probs; gradient_error: of a gradient;
            gradient_error_relative: largest ‖error‖ / ‖gradient‖; all against float64.
        planned_bytes: what the plan foretells for extra_bytes.
        peak_bytes: held beyond the inputs; extra_bytes: beyond inputs and gradients.
        seconds: median over the rounds; seconds_20, seconds_80: quantiles.
        over_floor: median of the rounds' ratios to the bare products of as many units; over_naive: to the naive form of
            the same job.
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
    over_naive: float | None = None


class Report(NamedTuple):
    """All of a run; `points` are rows that have only extra_bytes, at several N."""

    provenance: dict[str, Any]
    rows: list[Row]
    points: list[Row]


HEADERS = (
    "N,H,V", "dtype", "loss", "path", "", "ms (20–80 %)", "× floor", "× naive", "peak MiB", "extra MiB", "error",
    "gradient error",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The row under `HEADERS`. The error is absolute, the gradient's relative to its norm."""

    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    low, time, high = (shown(s, ",.1f", 1e3) for s in (row.seconds_20, row.seconds, row.seconds_80))
    floor = shown(row.over_floor, ".2f")
    return (
        f"{row.tokens},{row.width},{row.vocab}", row.dtype, row.loss, row.path, row.impl,
        f"{time} ({low}–{high})" if time else row.status, f"{floor} of {row.units}U" if floor else "",
        shown(row.over_naive, ".2f"), shown(row.peak_bytes, ",.1f", 2**-20), shown(row.extra_bytes, ",.1f", 2**-20),
        shown(row.value_error, ".0e"), "" if row.path == "forward" else shown(row.gradient_error_relative, ".0e"),
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
    """The table on the terminal, a section for each group of contestants."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADERS, caption=summary(report.provenance))
    for row, following in zip(report.rows, [*report.rows[1:], None]):
        last = following is None or following.impl == "gemm" != row.impl
        style = "red" if row.status != "ok" else "bold" if row.impl == "fused" else None
        table.add_row(*cells(row), style=style, end_section=last)
    Console().print(table)


def write(report: Report, folder: Path) -> None:
    """results.json, results.csv (provenance in each line) and results.png in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, points = ([row._asdict() for row in part] for part in (report.rows, report.points))
    content = json.dumps({"provenance": report.provenance, "rows": rows, "points": points}, indent=1, allow_nan=False)
    (folder / "results.json").write_text(content + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [*Row._fields, *report.provenance])
        lines.writeheader()
        lines.writerows({**row, **report.provenance} for row in rows)
    plot(report, folder / "results.png")


def read(path: Path) -> Report:
    """A report from its results.json.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, points = ([Row(**row) for row in content[key]] for key in ("rows", "points"))
        return Report(content["provenance"], rows, points)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"render: expected a results.json of `rgpb bench`, got {path} ({error})") from error


def plot(report: Report, path: Path) -> None:
    """Left, time over the floor; right, memory beyond inputs and gradients over N."""
    from matplotlib.figure import Figure

    colours = {"fused": "tab:blue", "naive": "tab:gray"}
    timed = [row for row in report.rows if row.over_floor is not None]
    figure = Figure(figsize=(13, 1.5 + max(4, 0.28 * len(timed))), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(range(len(timed)), [row.over_floor for row in timed], color=[colours[row.impl] for row in timed])
    names = [f"{r.loss} {r.path}, {r.impl}   {r.tokens},{r.width},{r.vocab} {r.dtype}" for r in timed]
    left.set_yticks(range(len(timed)), names, fontsize=7)
    left.invert_yaxis()
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("time over the bare products of as many flops")
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for r in report.points:
        name = f"{r.loss} {r.path}, {r.impl}   {r.width},{r.vocab} {r.dtype}"
        lines.setdefault((name, r.impl, r.dtype), []).append((r.tokens, (r.extra_bytes or 0) / 2**20))
    for (name, impl, dtype), places in lines.items():
        style = "-" if dtype == "fp32" else "--"
        right.plot(*zip(*sorted(places)), marker="o", markersize=3, color=colours[impl], linestyle=style)
        right.annotate(name, max(places), fontsize=6, ha="right", va="bottom")
    if lines:
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=2)
    right.set_xlabel("tokens N")
    right.set_ylabel("MiB beyond inputs and gradients")
    figure.savefig(path, dpi=150)
