"""What a run's `metrics.jsonl` says: a table before and after, and a picture; also of several runs side by side.

A reward is what a judge gave; β · log-ratio of a response is its implicit reward, in the log under `rewards/`.

Evaluation lines ("split": "eval") are averages over the whole evaluation set, training lines since the line before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rgpb.train.files import save_whole_file, write_text

METRICS = {
    "loss": "loss",
    "reward/sampled": "mean reward of completions sampled from the model",
    "perplexity": "perplexity of chosen responses",
    "agility": "agility: p(chosen) − p(rejected) per token",
    "rewards/margins": "margin of implicit rewards, β · log-ratio",
    "rewards/accuracies": "pairs with the higher implicit reward on the chosen",
    "logps/accuracies": "pairs with the higher likelihood per token on the chosen",
    "logps/chosen": "log-likelihood of chosen responses",
    "logps/rejected": "log-likelihood of rejected responses",
}

# How lines look: of evaluations and of training batches
EVALUATED: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
TRAINED: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.45}

# What panels show beside the losses: title, unit, metrics
SHARED = (
    ("implicit reward margin of chosen over rejected", "β · difference of log-ratios, nats", ("rewards/margins",)),
    ("perplexity of chosen responses", "perplexity, e^(nats per token)", ("perplexity",)),
    ("agility", "p(chosen) − p(rejected) per token", ("agility",)),
    ("log-likelihood of responses", "change since the start, nats", ("logps/chosen", "logps/rejected")),
    ("pairs ranked rightly by likelihood", "share of pairs", ("logps/accuracies",)),
    ("reward of sampled completions", "mean reward", ("reward/sampled",)),
)


class Line(NamedTuple):
    """One line of a table: a metric before and after training. None: not measured, or not finite."""

    name: str
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in a run's folder, in order.

    Raises:
        ValueError: no such file, or a line that isn't JSON.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"folder: expected one of a run, with metrics.jsonl, got {str(folder)!r}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]!r} ({error})") from None
    return records


def lines(records: list[dict[str, Any]]) -> list[Line]:
    """First against last evaluation, for every metric of `METRICS` that was measured."""
    evaluations = [record for record in records if record["split"] == "eval"]
    if not evaluations:
        raise ValueError("metrics.jsonl: expected at least one evaluation, got none")
    first, last = evaluations[0], evaluations[-1]
    return [Line(name, first.get(name), last.get(name)) for name in METRICS if name in first or name in last]


def write(folder: str | Path) -> None:
    """Write `report.md` and `report.png` into a run's folder.

    Raises:
        ValueError: as `read_metrics`.
    """
    folder = Path(folder)
    records = read_metrics(folder)
    note, result = ((_json(folder / name)) for name in ("run.json", "result.json"))
    settings = note.get("settings", {})
    text = [f"# {settings.get('loss', 'run')}: {records[-1]['step']} steps", "", *markdown(table(records))]
    if note:
        apart = any("held out" in name for name in result.get("counts", ()))
        same = "prompts of it that were held out" if apart else "some of what it was trained on"
        text += ["", f"Trained on {note['sources']['data']}, evaluated on {note['sources']['eval_data'] or same}."]
        text += [f"Settings: {', '.join(f'{k}={v}' for k, v in settings.items() if k not in ('data', 'eval_data'))}."]
    for title, key in (("Training data", "counts"), ("Evaluation data", "eval_counts")):
        if key in result:
            text += ["", f"{title}: {counted(result[key])}."]
    write_text(folder / "report.md", "\n".join([*text, "", "![curves](report.png)", ""]))
    plot({settings.get("loss", folder.name): records}, folder / "report.png")


def compare(
    runs: Mapping[str, str | Path],
    out: str | Path,
    extra: Mapping[str, Mapping[str, str]] | None = None,
    note: str = "",
) -> None:
    """Runs side by side: `report.md` and `report.png` in `out`.

    Args:
        runs: a name and a folder for each.
        out: folder for the two files; made if it isn't there.
        extra: further lines of the table: name → run → text.
        note: a paragraph below the table.

    Raises:
        ValueError: no runs, or as `read_metrics`.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    records = {name: read_metrics(folder) for name, folder in runs.items()}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = ["# Runs side by side", "", *markdown(comparison(records, extra))]
    text += ["", "In brackets: the change from before training."]
    text += ["", note] if note else []
    write_text(out / "report.md", "\n".join([*text, "", "![curves](report.png)", ""]))
    plot(records, out / "report.png")


def comparison(
    records: Mapping[str, list[dict[str, Any]]], extra: Mapping[str, Mapping[str, str]] | None = None
) -> list[list[str]]:
    """The table of `compare`, header first, without losses and margins: objectives and β of their own differ."""
    found = {run: {line.name: line for line in lines(rows)} for run, rows in records.items()}
    rows = [["", *records]]
    rows += [[name, *(values.get(run, "–") for run in records)] for name, values in (extra or {}).items()]
    for name, title in METRICS.items():
        if name not in ("loss", "rewards/margins") and any(name in metrics for metrics in found.values()):
            cells = [metrics.get(name, Line(name, None, None)) for metrics in found.values()]
            rows.append([title, *(f"{number(c.after)} ({number(c.change, sign=True)})" for c in cells)])
    spent = {run: costs(rows) for run, rows in records.items()}
    kinds = dict.fromkeys(kind for values in spent.values() for kind in values)
    return rows + [[kind, *(spent[run].get(kind, "–") for run in records)] for kind in kinds]


def costs(records: list[dict[str, Any]]) -> dict[str, str]:
    """Time and memory of a run, as text. On a CPU the memory is that of the whole process, libraries included."""
    peak = max(record["peak_bytes"] for record in records)
    owner = "the process" if records[-1]["device"] == "cpu" else "tensors"
    return {"seconds": f"{records[-1]['seconds']:.1f}", f"peak memory of {owner}": f"{peak / 2**20:.0f} MiB"}


def counted(counts: Mapping[str, int]) -> str:
    """What became of the rows; reasons that applied to none are left out."""
    return "; ".join(f"{name}: {n}" for name, n in counts.items() if n or name in ("rows", "units"))


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits; "–" for what wasn't measured."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.4g}"


def show(rows: list[list[str]], title: str) -> None:
    """Print a table, header first, to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.HORIZONTALS, show_lines=True, padding=(0, 1, 0, 0))
    shown.add_column(rows[0][0], overflow="fold")
    for name in rows[0][1:]:  # a number is never broken in two
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows[1:]:
        shown.add_row(*row)
    Console().print(shown)


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """The table of one run, header first."""
    body = [
        [METRICS[line.name], number(line.before), number(line.after), number(line.change, sign=True)]
        for line in lines(records)
    ]
    return [
        ["", "before", "after", "change"],
        *body,
        *([name, "", value, ""] for name, value in costs(records).items()),
    ]


class Curve(NamedTuple):
    """One metric of one run in a panel."""

    run: str
    metric: str
    dashed: bool = False
    shift: bool = False  # drawn as the change since its first evaluation


class Panel(NamedTuple):
    """Curves that share an axis, and so a scale."""

    title: str
    unit: str
    curves: list[Curve]


def panels(runs: Mapping[str, list[dict[str, Any]]]) -> list[Panel]:
    """What `plot` draws: metrics that were measured. Runs share a panel only where they share a scale.

    Each run's loss has a panel of its own. Margins are drawn of a single run alone, since each has its own β.
    """
    titles = {run: f"loss of {run}" if len(runs) > 1 else "loss" for run in runs}
    out = [Panel(title, "loss per response, pair or group", [Curve(run, "loss")]) for run, title in titles.items()]
    measured = {run: {name for record in records for name in record} for run, records in runs.items()}
    for title, unit, names in SHARED:
        curves = [
            Curve(run, name, dashed=name == "logps/rejected", shift=len(names) > 1)
            for run in runs
            for name in names
            if name in measured[run]
        ]
        if curves and not (len(runs) > 1 and names == ("rewards/margins",)):
            out.append(Panel(title, unit, curves))
    return out


def plot(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """A grid of curves over the steps, one colour per run: training batches thin, evaluations thick with dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = {run: f"C{i}" for i, run in enumerate(runs)}
    drawn = panels(runs)
    columns = 3 if len(drawn) <= 6 or len(drawn) == 9 else 4
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(drawn) :]:
        axes.remove()
    for axes, panel in zip(every, drawn):
        _draw(axes, panel, runs, colours)
    keys = [Line2D([], [], color=colour, linewidth=4, label=run) for run, colour in colours.items()]
    keys += [
        Line2D([], [], color="0.3", label="thick: evaluation set", **EVALUATED),
        Line2D([], [], color="0.3", label="thin: training batches, mean since the previous point", **TRAINED),
    ]
    if any(curve.dashed for panel in drawn for curve in panel.curves):
        keys += [
            Line2D([], [], color="0.3", linewidth=1.8, linestyle="-", label="solid: chosen"),
            Line2D([], [], color="0.3", linewidth=1.8, linestyle="--", label="dashed: rejected"),
        ]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 4), fontsize=9, frameon=False)
    save_whole_file(path, lambda place: figure.savefig(place, dpi=100, format="png"))


def _draw(axes: Any, panel: Panel, runs: Mapping[str, list[dict[str, Any]]], colours: Mapping[str, str]) -> None:
    """One panel. Only what evaluations measure is drawn as a change: training batches are of other responses."""
    seen: list[float] = []
    for run, name, dashed, shift in panel.curves:
        for split, look in (("train", TRAINED), ("eval", EVALUATED)):
            points = [(r["step"], r[name]) for r in runs[run] if r["split"] == split and r.get(name) is not None]
            if not points or (shift and split == "train"):
                continue
            steps, values = zip(*points)
            values = tuple(value - values[0] for value in values) if shift else values
            axes.plot(steps, values, linestyle="--" if dashed else "-", color=colours[run], **look)
            seen += values
    if panel.curves[0].metric == "perplexity" and seen and max(seen) > 20 * min(seen):
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def markdown(rows: list[list[str]]) -> list[str]:
    """A table as Markdown's lines, header first."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
