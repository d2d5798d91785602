"""What comes out: rows as a table (terminal, Markdown), JSON with provenance, and a picture."""

from __future__ import annotations

import json
import math
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
    """results.json and results.png in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, points = ([bare(row._asdict()) for row in part] for part in (report.rows, report.points))
    save(folder / "results.json", {"provenance": report.provenance, "rows": rows, "points": points})
    plot(report, folder / "results.png")


def bare(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what wasn't measured: `read` fills it in again."""
    return {name: value for name, value in row.items() if value is not None}


def finite(x: Any) -> Any:
    """The row with None for what isn't finite: JSON has no NaN."""
    if isinstance(x, dict):
        return {name: finite(y) for name, y in x.items()}
    if isinstance(x, list):
        return [finite(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def save(path: Path, content: dict[str, Any]) -> None:
    """JSON with a line for each key, and for each row of a list. NaN and infinity are refused: JSON has none."""

    def text(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, allow_nan=False)
        return "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in value) + "\n ]"

    lines = ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in content.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read(path: Path) -> Report:
    """A report from its results.json, or from the JSON of a part of `benchmarks.gpu`.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, rows = content["provenance"], content["rows"]
        if "table" in content or ("part" in content and not all({*row} <= {*Row._fields} for row in rows)):
            return Report(facts, [], [], [{**row} for row in content.get("table", rows)])  # rows of another kind
        return Report(facts, [Row(**row) for row in rows], [Row(**row) for row in content["points"]])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"render: expected a results.json of `rgpb bench`, got {path} ({error})") from error


COLOURS, OTHERS = {"fused": "tab:blue", "naive": "tab:gray"}, "lightgray"
WHO = {"fused": "rgpb", "naive": "naive PyTorch"}


def plot(report: Report, path: Path) -> None:
    """For each case: milliseconds and extra MiB of each contestant, job by job beside naive PyTorch; memory over N.

    Its rows that have no time are left out. Draws nothing where none has one.
    """
    from matplotlib.figure import Figure

    timed = [
        (title, [row for row in rows if row.seconds is not None and row.impl != "gemm"])
        for title, rows in sections(report)
    ]
    timed = [(title, [row for job in jobs_of(rows).values() for row in job]) for title, rows in timed if rows]
    if not timed:
        return
    heights = [1.6 + 0.3 * max(len(rows), 8) for _, rows in timed]
    over_tokens = len({point.tokens for point in report.points}) > 1
    figure = Figure(figsize=(18 if over_tokens else 12, sum(heights)), layout="constrained")
    panels = figure.subplots(len(timed), 3 if over_tokens else 2, squeeze=False, height_ratios=heights)
    for (title, rows), (left, middle, *right) in zip(timed, panels):
        ends = [1e3 * (row.seconds_80 or row.seconds or 0.0) for row in rows]
        bars(left, rows, [1e3 * (row.seconds or 0.0) for row in rows], ends)
        spread(left, rows)
        left.set_xlabel("ms: median, and from the 20 to the 80 % quantile")
        left.set_title(f"{title}\ntime of forward and backward, or of scores alone", fontsize=10, loc="left")
        sizes = [(row.extra_bytes or 0) / 2**20 for row in rows]
        bars(middle, rows, sizes, sizes)
        middle.set_yticklabels([])
        middle.set_xlabel("MiB")
        middle.set_title("memory beyond inputs and gradients", fontsize=10, loc="left")
        for axes in right:
            memory_over_tokens(axes, report.points, rows[0])
    figure.legend(handles=legend([row for _, rows in timed for row in rows]), loc="outside upper right", ncols=4)
    figure.savefig(path, dpi=100)


def spread(axes: Any, rows: Sequence[Row]) -> None:
    """Whiskers from the 20 to the 80 per cent quantile."""
    for at, row in enumerate(rows):
        if row.seconds_20 is not None and row.seconds_80 is not None:
            axes.plot([row.seconds_20 * 1e3, row.seconds_80 * 1e3], [at, at], color="black", lw=1, marker="|")


def jobs_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each job, (loss, kind), naive PyTorch first: `single` and `two_pass` are the same job."""
    jobs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kind = row.path if row.path in ("forward", "frozen") else "full"
        jobs.setdefault((row.loss, kind), []).append(row)
    return {job: sorted(found, key=lambda row: row.impl != "naive") for job, found in jobs.items()}


def bars(axes: Any, rows: Sequence[Row], values: Sequence[float], ends: Sequence[float]) -> None:
    """A bar for each row, its value behind its end, and through each job's a dashed line where naive PyTorch's ends."""
    axes.barh(range(len(rows)), values, color=[COLOURS.get(row.impl, OTHERS) for row in rows], height=0.75)
    axes.set_xlim(0, 1.2 * max(ends) or 1.0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=9)
    start = 0
    for found in jobs_of(rows).values():
        if found[0].impl == "naive":
            axes.plot([values[start]] * 2, [start - 0.45, start + len(found) - 0.55], "--", color="tab:red", lw=1.2)
        start += len(found)
        axes.axhline(start - 0.5, color="black", linewidth=0.4)
    for at, (value, end) in enumerate(zip(values, ends)):
        text = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        axes.annotate(
            text, (end, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def legend(rows: Sequence[Row]) -> list[Any]:
    """Whose colour is which, and what the dashed line is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {WHO.get(row.impl, "others"): COLOURS.get(row.impl, OTHERS) for row in rows}
    dashed = Line2D([], [], linestyle="--", color="tab:red", label="naive PyTorch at the same job")
    return [*(Patch(color=colour, label=name) for name, colour in names.items()), dashed]


def label(row: Row) -> str:
    """What a row is, for a picture."""
    path = {"full": "", "forward": "", "frozen": ", frozen head", "two_pass": ", two passes", "single": ", one pass"}
    who = contestant(row._replace(impl=WHO.get(row.impl, row.impl)))
    return f"{row.loss}{path[row.path]}: {who}"


def memory_over_tokens(axes: Any, points: Sequence[Row], of: Row) -> None:
    """A line for each contestant at the head that a row has."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    lines: dict[str, list[tuple[int, float]]] = {}
    for p in points:
        if (p.case, p.dtype, p.width, p.vocab) == (of.case, of.dtype, of.width, of.vocab) and p.extra_bytes:
            lines.setdefault(label(p), []).append((p.tokens, p.extra_bytes / 2**20))
    for at, (who, places) in enumerate(lines.items()):
        naive = WHO["naive"] in who
        style, colour = ("--", "tab:gray") if naive else ("-", f"C{at % 10}")
        size = 5 + 3 * (len(lines) - at) / len(lines)  # of lines that coincide, each shows
        axes.plot(*zip(*sorted(places)), style, color=colour, marker="osD^v"[at % 5], markersize=size, label=who)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({n for places in lines.values() for n, _ in places}))
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    if lines:
        axes.legend(fontsize=8)
    axes.set(xlabel="tokens N (logarithmic)", ylabel="MiB (logarithmic)")
    axes.set_title("the same memory over the number of tokens", fontsize=10, loc="left")
