"""What comes out: rows as a table (terminal, Markdown), CSV, JSON with provenance, and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One contestant at one shape. What wasn't measured is None; a row that isn't "ok" has no time.

    Attributes:
        loss, path, impl, units: as in `Contestant`; impl "gemm" for the bare products, or whose it is.
        dtype, tokens, width, vocab: the case.
        status: "ok", "FAILED" (off float64 by more than the tolerance), "out of memory", or "plan: …" and the path that
            the plan takes instead; "not installed: …", "refused: …" or "error: …" and the reason.
        value_error: largest error of the loss or the log-probs; gradient_error: of a gradient;
            gradient_error_relative: largest ‖error‖ / ‖gradient‖; all against float64.
        planned_bytes: what the plan foretells for extra_bytes.
        peak_bytes: held beyond the inputs; extra_bytes: beyond inputs and gradients.
        seconds: median over the rounds; seconds_20, seconds_80: quantiles.
        over_floor: median of the rounds' ratios to the bare products of as many units; over_naive: to the naive form of
            the same job.
        case: the case's name.
        kernels, workspace, note: what else tells this contestant from its like: implementation, bytes, options.
        planned_seconds: what the plan foretells for seconds.
        rounds: of timing.
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
    case: str | None = None
    kernels: str | None = None
    workspace: int | None = None
    note: str | None = None
    planned_seconds: float | None = None
    rounds: int | None = None


class Report(NamedTuple):
    """All of a run; `points` are rows of which only extra_bytes counts, at several N; `table` is for other results."""

    provenance: dict[str, Any]
    rows: list[Row]
    points: list[Row]
    table: Sequence[dict[str, Any]] = ()


HEADERS = ("", "", "ms (20–80 %)", "× floor", "× naive", "peak MiB", "extra MiB", "error", "gradient’s")


def contestant(row: Row) -> str:
    """Who it is: impl, and what tells it from its like."""
    workspace = None if row.workspace is None else f"{row.workspace / 2**20:,.6g} MiB"
    return ", ".join(part for part in (row.impl, row.kernels, workspace, row.note) if part is not None)


def cells(row: Row) -> tuple[str, ...]:
    """The row under `HEADERS`. The error is absolute, the gradient's relative to its norm."""

    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    low, time, high = (shown(s, ",.1f", 1e3) for s in (row.seconds_20, row.seconds, row.seconds_80))
    floor = shown(row.over_floor, ".2f")
    return (
        f"{row.loss} {row.path}", contestant(row), f"{time} ({low}–{high})" if time else row.status,
        f"{floor} of {row.units}U" if floor else "", shown(row.over_naive, ".2f"),
        shown(row.peak_bytes, ",.1f", 2**-20), shown(row.extra_bytes, ",.1f", 2**-20), shown(row.value_error, ".0e"),
        "" if row.path == "forward" else shown(row.gradient_error_relative, ".0e"),
    )  # fmt: skip


def sections(report: Report) -> list[tuple[str, list[Row]]]:
    """The rows of each case under its title."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        name = "" if row.case is None else f"{row.case}: "
        found.setdefault(f"{name}N = {row.tokens}, H = {row.width}, V = {row.vocab}, {row.dtype}", []).append(row)
    return list(found.items())


def summary(provenance: dict[str, Any]) -> str:
    """Provenance as one line."""
    return ", ".join(f"{key} {value}" for key, value in provenance.items() if value is not None)


def markdown(report: Report) -> str:
    """Tables for a README, provenance below them."""
    lines = []
    for title, rows in sections(report):
        table = [HEADERS, ("---",) * 2 + ("---:",) * (len(HEADERS) - 2), *map(cells, rows)]
        lines += [f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in table), ""]
    if report.table:
        lines += [*free_table(report.table), ""]
    return "\n".join([*lines, summary(report.provenance), ""])


def free_table(table: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table whose columns are the keys, in order of appearance."""

    def shown(value: object) -> str:
        text = f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", r"\|").replace("\n", " ")

    columns = list(dict.fromkeys(name for row in table for name in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(name)) for name in columns] for row in table)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def show(report: Report) -> None:
    """Tables on the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 140)  # what the columns need: a narrow terminal wraps lines, no number is cut
    for title, rows in sections(report):
        table = Table(*HEADERS, title=title, box=SIMPLE, title_justify="left")
        for at, column in enumerate(table.columns):
            column.no_wrap, column.justify = True, "right" if at > 1 else "left"
        for row in rows:
            style = "red" if row.status != "ok" else "bold" if row.impl == "fused" else None
            table.add_row(*cells(row), style=style)
        console.print(table)
    console.print(summary(report.provenance))


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
    """A report from its results.json, or from the JSON of a part of `benchmarks.gpu`.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "table" in content:  # its rows are of another kind
            return Report(content["provenance"], [], [], [{**row} for row in content["table"]])
        rows, points = ([Row(**row) for row in content[key]] for key in ("rows", "points"))
        return Report(content["provenance"], rows, points)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"render: expected a results.json of `rgpb bench`, got {path} ({error})") from error


def plot(report: Report, path: Path) -> None:
    """A pair of panels for each case: time over the floor, and memory beyond inputs and gradients over N."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    cases = [(title, [row for row in rows if row.over_floor is not None]) for title, rows in sections(report)]
    heights = [1 + max(10, len(timed)) / 4 for _, timed in cases]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    panels = figure.subplots(max(len(cases), 1), 2, squeeze=False, gridspec_kw={"height_ratios": heights or [1]})
    for (title, timed), (left, right) in zip(cases, panels):
        colours = ["tab:blue" if row.impl == "fused" else "tab:gray" for row in timed]
        left.barh(range(len(timed)), [row.over_floor for row in timed], color=colours)
        left.set_yticks(range(len(timed)), [f"{row.loss} {row.path}, {contestant(row)}" for row in timed], fontsize=8)
        left.invert_yaxis()
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set(title=title, xlabel="time over the bare products of as many flops")
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for p in report.points:
            if timed and (p.dtype, p.width, p.vocab) == (timed[0].dtype, timed[0].width, timed[0].vocab):
                style = "-" if p.impl == "fused" else "--"
                line = lines.setdefault((f"{p.loss} {p.path}, {contestant(p)}", style), [])
                line.append((p.tokens, (p.extra_bytes or 0) / 2**20))
        for (name, style), places in lines.items():
            right.plot(*zip(*sorted(places)), style, marker="o", markersize=4, label=name)
        if lines:
            right.set_xscale("log", base=2)
            right.set_xticks(sorted({n for places in lines.values() for n, _ in places}))
            right.set_yscale("log", base=2)
            for axis in (right.xaxis, right.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())
            right.legend(fontsize=8)
        right.set(xlabel="tokens N", ylabel="MiB beyond inputs and gradients")
    figure.savefig(path, dpi=120)
