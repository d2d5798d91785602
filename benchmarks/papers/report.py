"""What is kept of a claim, one line of JSON each; and what is made of it: docs/claims.md, and a picture per claim.

A number over the seeds is a list or, of runs that kept no more than that, the text "mean ± standard error".
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from rgpb.bench.measure import provenance

from .claims import CLAIMS, ON_REAL, PAPERS, TRIALS, WORLDS, Claim
from .judge import VERDICTS, Values, every, judge, spread
from .outcomes import RATES, SEEDS, Lines, Outcome, best_rate, of_units, outcome, runs_of

RESULTS = Path(__file__).parents[1] / "results" / "papers"  # the project's own
FILE = "claims.jsonl"
MODEL = "SmolLM2-135M"
CHANGED = ", as changed"  # a claim that has a text of its own there
SHOWN = {  # of the runs on it, by kind of units
    "Pairs": (
        "change of log p of chosen", "change of log p of rejected", "accuracy by Δ per token",
        "abs. shift of log p per answer", "abs. logit shift per token", "Gini coefficient of logit shifts",
    ),
    "Groups": ("accuracy of the order", "reward of the answer with the highest Δ"),
}  # fmt: skip
COLUMNS = 3  # panels of a picture beside each other
RATE = re.compile(r" at ([\d.e-]+)(?= |$)")  # as trials name what they train at several learning rates
ORDER = {claim.name: place for place, claim in enumerate(CLAIMS)}


def record(claim: Claim, values: Values, settings: dict[str, Any]) -> dict[str, Any]:
    """The line of a claim: verdict, deciding numbers, all values per seed, what else came out, and where it was run."""
    parts = judge(claim.parts, values)
    return {
        "claim": claim.name,
        "verdict": every([verdict for _, verdict, _ in parts]),
        "parts": [{"at": at, "verdict": verdict, "told": told} for at, verdict, told in parts],
        "beside": [part.judge(values)._replace(verdict="") for part in claim.beside],
        "values": {
            quantity: {name: [x if math.isfinite(x) else str(x) for x in its] for name, its in methods.items()}
            for quantity, methods in values.items()
        },
        "settings": settings,
        "provenance": provenance("cpu"),
    }


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of a folder by claim, in the table's order; a `ValueError` for a line that isn't one of a claim."""
    path, found = folder / FILE, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            its = json.loads(line)
            if its["claim"] not in ORDER or its["verdict"] not in VERDICTS:
                raise ValueError("unknown claim or verdict")
            found[its["claim"]] = its
        except (KeyError, TypeError, ValueError) as error:
            where = f"line {number} of {path}"
            raise ValueError(f"out: expected a claim and its verdict in {where}, got {error}") from error
    return {name: found[name] for name in ORDER if name in found}


def save(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Put lines in the place of the same claims' in the folder's file, which is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {**load(folder), **{its["claim"]: its for its in records}}
    lines = [json.dumps(kept[name], ensure_ascii=False, allow_nan=False) for name in ORDER if name in kept]
    partial = folder / f"{FILE}.partial"
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, folder / FILE)


def page(folder: Path) -> str:
    """The text of docs/claims.md from a folder's lines and notes: counts, how to read it, a table by paper."""
    records, runs = load(folder), runs_of(folder)
    real = {name: outcome(claim, runs) for name, claim in ON_REAL.items() if name in records}
    found = [(CLAIMS[ORDER[name]].paper, its["verdict"]) for name, its in records.items()]
    lines = ["# The papers' claims, tried", ""]
    held, failed, undecided = ([verdict for _, verdict in found].count(verdict) for verdict in VERDICTS)
    lines += [f"**{held} hold, {failed} do not hold, {undecided} can't be decided at this size.**", ""]
    lines += [*_counts(found), "", *_notes(folder, "notes.txt"), f"## On {MODEL}", ""]
    lines += [*_counts([(CLAIMS[ORDER[name]].paper, its.verdict) for name, its in real.items()], "not run yet")]
    lines += ["", *_notes(folder, "smollm2.txt")]
    for paper, full in PAPERS.items():
        rows = [("claim", "place", "small models", MODEL, "numbers", "name; trial in world")]
        for claim in (CLAIMS[ORDER[name]] for name in records if CLAIMS[ORDER[name]].paper == paper):
            its, there = records[claim.name], real.get(claim.name)
            seeds = its["settings"]["seeds"]
            numbers = [f"{seeds} seeds."] if seeds != SEEDS else []
            for part in its["parts"]:  # of a condition all numbers where it holds, else those that decided
                told = [one for one in part["told"] if one[2] in ("", part["verdict"])]
                under = f"Learning rate {part['at']}, {part['verdict']}: " if part["at"] else ""
                numbers.append(f"{under}{_told(told, ' at ' + part['at'])}.")
            numbers += [f"Beside: {_told(its['beside'])}."] if its["beside"] else []
            verdict = "not tried" if there is None else f"**{there.verdict}**" if there.seeds else "not run yet"
            if there is not None and there.seeds and ON_REAL[claim.name].text:
                verdict += CHANGED
            numbers += [_on_real(ON_REAL[claim.name].text, there)] if there is not None and there.seeds else []
            name = f"`{claim.name}`; {claim.trial} in {claim.world}"
            rows.append((claim.text, claim.place, f"**{its['verdict']}**", verdict, "<br>".join(numbers), name))
        lines += [f"## {full}", "", *_table(rows), ""]
    lines += _rates(runs)
    for title, named in (("Worlds: what is set up", WORLDS), ("Trials: what is trained and measured", TRIALS)):
        what = [("name", "what"), *((f"`{name}`", (f.__doc__ or "").split("\n")[0]) for name, f in named.items())]
        lines += [f"## {title}", "", *_table(what), ""]
    return "\n".join(lines[:-1]) + "\n"


def _rates(runs: Lines) -> list[str]:
    """What came out at each learning rate, of pairs and of groups."""
    lines: list[str] = []
    for kind, quantities in SHOWN.items():
        methods = [method for method in dict.fromkeys(name for name, _, _ in runs) if not method.startswith("start")]
        rows = [("method", "learning rate", "seeds", *quantities)]
        for method in methods:
            best = best_rate(method, runs)
            for rate in RATES:
                its = [of_units(one, runs) for (name, at, _), one in runs.items() if (name, at) == (method, rate)]
                if its and set(quantities) <= set(its[0]):
                    means = [[fmean(unit) for unit in zip(*(one[name] for one in its))] for name in quantities]
                    name = f"**{rate:g}**" if rate == best else f"{rate:g}"
                    rows.append((method, name, str(len(its)), *(spread(values) for values in means)))
        if len(rows) > 1:
            lines += [f"## {kind} on {MODEL}, at each learning rate", "", *_table(rows), ""]
    text = "In bold the rate that was taken. Means over held-out units, of all seeds, ± the error over the units."
    return [*lines[:2], text, "", *lines[2:]] if lines else []


def _on_real(text: str, its: Outcome) -> str:
    """What the real model said: all numbers where the claim holds, else those that decided."""
    told = _told([one for one in its.told if one.verdict == its.verdict])
    beside = f" Beside: {_told(its.beside)}." if its.beside else ""
    seeds = f"{its.seeds}" if its.seeds == its.most else f"{its.seeds} to {its.most}"
    return f"*{MODEL}*, {seeds} seeds: {text + ' ' if text else ''}{told}.{beside}"


def _counts(found: Sequence[tuple[str, str]], other: str = "") -> list[str]:
    """A table of (paper, verdict); `other` names an empty verdict."""
    names, verdicts = (*VERDICTS, *([other] if other else [])), (*VERDICTS, *([""] if other else []))
    rows: list[Sequence[str]] = [("", *names)]
    rows += [(paper, *(str(found.count((paper, verdict))) for verdict in verdicts)) for paper in PAPERS]
    return _table([*rows, ("all", *(str([v for _, v in found].count(verdict)) for verdict in verdicts))])


def _notes(folder: Path, name: str) -> list[str]:
    return [(folder / name).read_text(encoding="utf-8")] if (folder / name).exists() else []


def _told(told: Sequence[Sequence[str]], at: str = "") -> str:
    return "; ".join(f"{what.removesuffix(at)}: {number}" for what, number, _ in told).replace(f"{at} less", " less")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, header first."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:])]


def _picture(its: Mapping[str, Any]) -> Figure:
    claim = CLAIMS[ORDER[its["claim"]]]
    wanted = [
        name for name in dict.fromkeys(p.quantity for p in (*claim.parts, *claim.beside)) if name in its["values"]
    ]
    panels = {name: its["values"][name] for name in wanted or its["values"]}
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    height = 1.2 + 0.22 * max(len(methods) for methods in panels.values())
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (quantity, methods) in zip(grid, panels.items()):
        for place, found in enumerate(methods.values()):
            dots = [] if isinstance(found, str) else [float(x) for x in found if math.isfinite(float(x))]
            text = found if isinstance(found, str) else spread(dots) if dots else "nan"
            mean, _, error = text.partition(" ± ")
            axes.errorbar(float(mean), place, xerr=float(error or 0), fmt="|", color="tab:blue", capsize=3)
            axes.plot(dots, [place] * len(dots), ".", color="black")
        names = [RATE.sub(r", learning rate \1", name) for name in methods]
        axes.set_yticks(range(len(methods)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{quantity}\nmean ± standard error", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{its['claim']}: {its['verdict']}", fontsize=9)
    return figure


def render(folder: Path, into: Path) -> None:
    """Draw <claim>.png for each line of a folder: a panel for each quantity, mean ± standard error, a dot a seed."""
    into.mkdir(parents=True, exist_ok=True)
    for name, its in load(folder).items():
        _picture(its).savefig(into / f"{name}.png", dpi=110)
