"""What a script reports of a paper's claim: verdict, number, table, settings; and how it is written down.

A verdict comes from differences over paired seeds: two methods start from the same model and see the same data, so
what they differ by is one number per seed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any, NamedTuple

from rgpb.bench.measure import provenance
from rgpb.bench.report import summary

PAPERS = ("RGPB", "BNF", "SWEPO", "MC-PO")
VERDICTS = ("holds", "does not hold", "not decidable at this size")
PREFIXES = ("rgpb_", "bnf_", "swepo_", "mcpo_")
RESULTS = Path(__file__).parents[1] / "results" / "papers"  # the project's own
OPTIONS = {"hh_rlhf": "--hh-rlhf", "alpaca_eval": "--alpaca-eval"}  # of the command, by key of `data`


class Claim(NamedTuple):
    """A statement of a paper that can be tried on small models.

    Attributes:
        name: also the file name of table and picture.
        paper: one of `PAPERS`.
        where: section, table or appendix.
        text: the claim in a sentence or two.
    """

    name: str
    paper: str
    where: str
    text: str


class Finding(NamedTuple):
    """What came out.

    Attributes:
        claim: what was tried.
        verdict: one of `VERDICTS`, from the numbers.
        number: the deciding number or numbers, in a sentence.
        rows: the table, header first.
        settings: what is needed to repeat it.
    """

    claim: Claim
    verdict: str
    number: str
    rows: list[list[str]]
    settings: dict[str, Any]


def decide(differences: Sequence[float]) -> str:
    """The verdict on "the difference is positive", from one difference per seed.

    A mean counts when it exceeds twice its standard error; with one seed nothing does. Infinite differences (one of the
    two collapsed) count where all have the same sign.

    Raises:
        ValueError: no difference, or one that isn't a number.
    """
    if not differences or any(math.isnan(x) for x in differences):
        raise ValueError(f"differences: expected one number per seed, got {list(differences)}")
    if len(differences) < 2:
        return VERDICTS[2]
    if any(math.isinf(x) for x in differences):
        above, below = all(x > 0 for x in differences), all(x < 0 for x in differences)
        return VERDICTS[0 if above else 1 if below else 2]
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    return VERDICTS[0 if mean > 2 * error else 1 if mean < -2 * error else 2]


def every(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: it holds where all do, and fails where one does.

    Raises:
        ValueError: none given, or an unknown one.
    """
    if not verdicts or not set(verdicts) <= set(VERDICTS):
        raise ValueError(f"verdicts: expected some of {VERDICTS}, got {list(verdicts)}")
    return next((v for v in (VERDICTS[1], VERDICTS[2]) if v in verdicts), VERDICTS[0])


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a − b, seed by seed. Two that are infinite alike don't differ.

    Raises:
        ValueError: of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} values, one per seed as in a, got {len(b)}")
    return [0.0 if x == y else x - y for x, y in zip(a, b)]


def spread(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """Mean ± standard error over the seeds, as text."""
    form = f"{'+' if sign else ''}.{digits}g"
    if any(not math.isfinite(x) for x in values):
        return ", ".join(f"{x:{form}}" for x in values)
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{fmean(values):{form}}" + ("" if error is None else f" ± {error:.2g}")


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """A figure with a panel for each quantity: a bar for each method's mean, a dot for each seed.

    Args:
        panels: title → method → one value per seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.5 + 3.6 * len(panels), 3.4), layout="constrained")
    for (title, methods), panel in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0]):
        finite = {name: [x for x in values if math.isfinite(x)] for name, values in methods.items()}
        panel.bar(
            range(len(finite)), [fmean(values or [0.0]) for values in finite.values()], color="tab:blue", alpha=0.5
        )
        for at, values in enumerate(finite.values()):
            panel.plot([at] * len(values), values, "o", color="black", markersize=3)
        panel.set_xticks(range(len(finite)), list(finite), rotation=30, ha="right", fontsize=8)
        panel.axhline(0.0, color="black", linewidth=0.6)
        panel.set_title(title, fontsize=9)
    return figure


def curves(panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], xlabel: str, log: bool = False) -> Any:
    """A figure with a panel for each quantity: a line through the means over the seeds, a dot for each seed.

    Args:
        panels: title → line → place on the x axis → one value per seed.
        xlabel: what is on the x axis.
        log: whether that axis is logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.5 + 3.6 * len(panels), 3.4), layout="constrained")
    for (title, lines), panel in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0]):
        for name, places in lines.items():
            (line,) = panel.plot(list(places), [fmean(values) for values in places.values()], label=name)
            for x, values in places.items():
                panel.plot([x] * len(values), values, "o", color=line.get_color(), markersize=3)
        if log:
            panel.set_xscale("log")
        panel.set_xlabel(xlabel, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.legend(fontsize=7)
    return figure


def need(data: Mapping[str, Path], key: str) -> Path:
    """The path of a data set.

    Raises:
        ValueError: not given, or not there. Names the option.
    """
    if key not in data:
        raise ValueError(f"{OPTIONS[key]}: expected the path of this data set, got none")
    if not data[key].exists():
        raise ValueError(f"{OPTIONS[key]}: expected an existing path, got {data[key]}")
    return data[key]


def write(finding: Finding, out: Path, figure: Any) -> None:
    """<name>.png, <name>.md and, last, <name>.json in `out`, which is made; each replaces an older one whole.

    Args:
        finding: its verdict has to be one of `VERDICTS`, and its rows equally long.
        out: a folder.
        figure: of matplotlib.

    Raises:
        ValueError: another verdict, or ragged rows.
    """
    if finding.verdict not in VERDICTS:
        raise ValueError(f"verdict: expected one of {VERDICTS}, got {finding.verdict!r}")
    if len({len(row) for row in finding.rows}) != 1:
        raise ValueError(f"rows: expected rows of one length, got lengths {[len(row) for row in finding.rows]}")
    out.mkdir(parents=True, exist_ok=True)
    source = provenance("cpu")
    place = out / finding.claim.name
    figure.savefig(partial := place.with_suffix(".partial.png"), dpi=110)
    os.replace(partial, place.with_suffix(".png"))
    content = {**finding._asdict(), "claim": finding.claim._asdict(), "provenance": source}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    for suffix, body in ((".md", _page(finding, source)), (".json", text + "\n")):
        partial = place.with_suffix(f".partial{suffix}")
        partial.write_text(body, encoding="utf-8")
        os.replace(partial, place.with_suffix(suffix))


def read(out: Path) -> list[Finding]:
    """All findings of a folder, by paper, place in the paper and name.

    Raises:
        ValueError: a JSON file that `write` didn't write.
    """
    found = []
    for path in sorted(out.glob("*.json")):
        if path.stem.endswith(".partial"):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("provenance")
            found.append(Finding(**{**content, "claim": Claim(**content["claim"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"out: expected the JSON of a finding, got {path} ({error})") from error
    return sorted(found, key=_order)


def claims_table(
    findings: Sequence[Finding], notes: str = "", out: Path = RESULTS, place: Path = RESULTS.parents[2] / "docs"
) -> str:
    """The text of docs/claims.md: what was tried and what came out, with links to script, table and picture.

    Args:
        findings: from `read`.
        notes: what to know of these results, Markdown; those of a folder are in its notes.txt.
        out: the folder they are in, and `place` that of the table: links go from one to the other.
    """
    counted = [sum(f.verdict == verdict for f in findings) for verdict in VERDICTS]
    scripts = {claim.name: name for name, module in modules().items() for claim in module.CLAIMS}
    lines = [
        "# The papers' claims, tried on small models",
        "",
        "Each row is a claim of one of the four papers, tried on the CPU with models of under a million parameters, "
        "on generated tasks or on public preference data. A verdict is computed from differences over paired seeds: a "
        "difference counts when its mean exceeds twice its standard error. It speaks of this size and these tasks: "
        "neither “holds” nor “does not hold” carries over to large models by itself. With four seeds twice the "
        "standard error is a lenient bar (chance passes it about once in seven, on either side), and nothing is "
        "corrected for the number of claims.",
        "",
        f"{counted[0]} hold, {counted[1]} do not hold, {counted[2]} can't be decided at this size.",
        "",
        "To repeat, from a checkout: `python -m benchmarks.papers --out DIR --hh-rlhf DIR --alpaca-eval FILE`; about "
        "an hour on one core.",
        "",
    ]
    lines += [notes, ""] if notes else []
    rows = [["claim", "paper", "verdict", "number", "from"]]
    for finding in sorted(findings, key=_order):
        claim, results = finding.claim, os.path.relpath(out.resolve() / finding.claim.name, place.resolve())
        links = [f"[table]({results}.md)", f"[picture]({results}.png)"]
        if claim.name in scripts:
            script = Path(__file__).with_name(f"{scripts[claim.name]}.py")
            links.insert(0, f"[script]({os.path.relpath(script, place.resolve())})")
        rows.append(
            [claim.text, f"{claim.paper} {claim.where}", f"**{finding.verdict}**", finding.number, ", ".join(links)]
        )
    return "\n".join([*lines, *_table(rows), ""])


def modules() -> dict[str, ModuleType]:
    """The scripts of this package by name: those with a paper's prefix, and claims."""
    names = sorted(entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]))
    ordered = [name for prefix in PREFIXES for name in names if name.startswith(prefix)]
    found = {name: importlib.import_module(f"{__package__}.{name}") for name in ordered}
    return {name: module for name, module in found.items() if getattr(module, "CLAIMS", ())}


def _order(finding: Finding) -> tuple[int, bool, str, str]:
    claim = finding.claim
    return PAPERS.index(claim.paper), not claim.where.startswith("§"), claim.where, claim.name


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, header first."""
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:])]


def _page(finding: Finding, source: Mapping[str, Any]) -> str:
    claim = finding.claim
    settings = [f"* {name}: {_shown(value)}" for name, value in finding.settings.items()]
    lines = [f"# {claim.name}", "", f"{claim.paper}, {claim.where}: {claim.text}", ""]
    lines += [f"**{finding.verdict}**: {finding.number}", "", *_table(finding.rows), "", f"![]({claim.name}.png)", ""]
    return "\n".join([*lines, *settings, "", summary(dict(source)), ""])


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)
