"""What the results in a folder say: ceilings and times beside what plans foretold of them, and aims beside what came.

Tables without rows and columns without values are left out; an aim without a measurement says which part is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rgpb.bench.contest import LOG_PROB, SCORES, kind_of
from rgpb.bench.measure import failed
from rgpb.bench.tables import free_table, summary
from rgpb.engine.plan import DEFAULT_WORKSPACE

from .calls import LLAMA

Rows = list[dict[str, Any]]
MIB = 2**20


class Results(NamedTuple):
    """The rows of each part, and the provenance of its last run; how the processes of a first run ended."""

    rows: dict[str, Rows]
    provenance: dict[str, dict[str, Any]]
    parts: Sequence[dict[str, Any]] = ()

    def ok(self, part: str) -> Rows:
        """Rows that were right."""
        return [row for row in self.rows.get(part, []) if row["status"] == "ok"]


def read(folder: Path) -> Results:
    """The JSON of all parts in a folder.

    Raises:
        ValueError: there is none, or a file that isn't of a part.
    """
    results = Results({}, {})
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results.rows[content["part"]], results.provenance[content["part"]] = content["rows"], content["provenance"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: expected the JSON of a part, got {path} ({error!r})") from error
    ended = folder / "parts.tsv"  # of `first_run.sh`; what a part was run for last counts
    if not results.rows and not ended.exists():
        raise ValueError(f"out: expected a folder with the JSON of parts, got {folder}")
    lines = [line.split("\t") for line in ended.read_text().splitlines()] if ended.exists() else []
    return results._replace(parts=[dict(zip(ENDED, line)) for line in {line[0]: line for line in lines}.values()])


# -- how it went -------------------------------------------------------------------------------------------------------

ENDED = ("part", "ended", "seconds", "budget", "compiled")
STATUS = {
    "0": "ok", "1": "SOMETHING IS OFF", "2": "NOT RUN", "3": "ok, rows are left", "5": "NOTHING WAS CHECKED",
    "9": "MEMORY IS MISUSED", "124": "KILLED at the end of its budget", "137": "KILLED at the end of its budget",
    "no time": "NO TIME WAS LEFT",
}  # fmt: skip


def parts(results: Results) -> Rows:
    """How each process of a first run ended."""
    return [row | {"ended": STATUS.get(row["ended"], f"FAILED with {row['ended']}")} for row in results.parts]


def wrong(results: Results) -> Rows:
    """Every row that isn't right: of what, and why."""
    return [
        {"part": part, "row": " ".join(str(x) for x in [*row.values()][:8] if x not in (None, row["status"])),
         "why": row["status"], "error": row.get("value_error") or row.get("off") or row.get("error")}
        for part, rows in results.rows.items()
        for row in rows
        if failed(row)
    ]  # fmt: skip


# -- aims --------------------------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """Something that can be measured, the most that it should be, and the rows and the value that say so.

    Of the first case of `llama`, or where that is what it says of all, the best row counts; the worst if `worst`.
    With a `capability` it is for such GPUs alone.
    """

    text: str
    most: float
    part: str
    rows: dict[str, Any]
    value: Callable[[dict[str, Any], Rows], float | None]
    worst: bool = False
    all_cases: bool = False
    capability: str | None = None


def floor(row: dict[str, Any], rows: Rows) -> float | None:
    """Time over the bare products of as many units."""
    return row["over_floor"]


def rival(row: dict[str, Any], rows: Rows) -> float | None:
    """Time over the fastest of the others at the same job."""
    others = [r["seconds"] for r in rows if r["impl"] != "fused" and (r["loss"], r["path"]) == (row["loss"], "full")]
    return row["seconds"] / min(others) if row["seconds"] and row["path"] != "frozen" and others else None


def milliseconds(row: dict[str, Any], rows: Rows) -> float | None:
    """Of one call."""
    return _times(row["seconds"], 1e3)


def foretold(row: dict[str, Any], rows: Rows) -> float | None:
    """Time over what the plan foretells."""
    return row["seconds"] / row["planned_seconds"] if row["seconds"] and row["planned_seconds"] else None


BIG = 4 * 2**30
OURS = {"impl": "fused"}
AIMS = (
    Aim("BNF on an H100 or H200, ms", 36, "llama", OURS | {"loss": "bnf", "path": "single"}, milliseconds,
        capability="9.0"),
    Aim("scores with gradients on an H100 or H200, ms", 50, "llama", OURS | {"loss": SCORES}, milliseconds,
        capability="9.0"),
    Aim("a call over its prediction", 1.15, "llama", OURS, foretold, worst=True),
    Aim("BNF, 4 GiB: over 3U", 1.15, "llama", OURS | {"loss": "bnf", "path": "single", "workspace": BIG}, floor),
    Aim("BNF, 512 MiB: over 4U", 1.12, "llama",
        OURS | {"loss": "bnf", "path": "two_pass", "workspace": DEFAULT_WORKSPACE}, floor),
    Aim("BNF over the fastest other", 1.0, "llama", OURS | {"loss": "bnf"}, rival),
    Aim("DPO: over 4U", 1.15, "llama", OURS | {"loss": "dpo", "path": "two_pass"}, floor),
    Aim("BNF, frozen head: over 2U", 1.2, "llama", OURS | {"loss": "bnf", "path": "frozen"}, floor),
    Aim("log-probabilities: over 1U", 1.15, "llama", OURS | {"path": "forward"}, floor),
    Aim("log-probabilities, error", 1e-5, "llama", OURS | {"loss": LOG_PROB},
        lambda row, rows: row["value_error"], worst=True),
    Aim("extra memory at any N in 512 MiB, MB", 600, "llama", OURS | {"workspace": DEFAULT_WORKSPACE},
        lambda row, rows: _times(row["extra_bytes"], 1e-6), worst=True, all_cases=True),
    Aim("BNF with skipping on a trained distribution, units", 2.5, "trained", {"loss": "bnf", "tolerance": "auto"},
        lambda row, rows: row["units"] if (row.get("steps") or 0) == max(r.get("steps") or 0 for r in rows) else None,
        all_cases=True),
)  # fmt: skip
SAME = ("case", "tokens", "width", "vocab", "dtype")


def first_case(results: Results) -> dict[str, Any]:
    """What rows of the part `llama` have in common that aims are about: those of N = 8192, or the first there are."""
    rows = results.rows.get("llama", [])
    wanted = [row for row in rows if (row["case"], row["tokens"]) == LLAMA[0][:2]] or rows
    return {name: wanted[0][name] for name in SAME} if wanted else {}


def aims(results: Results) -> Rows:
    """A line for each aim; none where nothing that they are about was measured."""
    lines: Rows = []
    for aim in AIMS:
        if aim.capability not in (None, results.provenance.get(aim.part, {}).get("capability")):
            continue
        case = {} if aim.all_cases else first_case(results)
        rows = [row for row in results.ok(aim.part) if case.items() <= row.items()]
        mine = [(aim.value(row, rows), row) for row in rows if aim.rows.items() <= row.items()]
        found = [(value, f"{row['kernels']}, N = {row['tokens']}") for value, row in mine if value is not None]
        line: dict[str, Any] = {"aim": aim.text, "at most": f"{aim.most:g}", "measured": None, "of": None}
        line["verdict"] = f"no right row of it in {aim.part}"
        if found:
            value, of = max(found) if aim.worst else min(found)
            verdict = "reached" if value <= aim.most else "missed"
            line |= {"measured": f"{value:.3g}", "of": of, "verdict": verdict}
        lines.append(line)
    return lines if any(line["measured"] is not None for line in lines) else []


# -- predictions -------------------------------------------------------------------------------------------------------


def ceilings(results: Results) -> Rows:
    """Measured rates beside those that plans are made with."""
    return [
        {"ceiling": row["ceiling"], "measured, T/s": _times(row["rate"], 1e-12),
         "plans assume, T/s": _times(row["assumed"], 1e-12)}
        for row in results.ok("ceilings")
    ]  # fmt: skip


def kernels(results: Results) -> Rows:
    """Each kernel's time beside the prediction, and its share of the ceilings."""
    return [
        {
            "kernel": row["kernel"], "C": row["tokens"], "ms": row["seconds"] * 1e3,
            "predicted ms": _times(row["predicted_seconds"], 1e3), "of a copy": row["share_of_copy"],
            "of the product": row["share_of_product"],
        }
        for row in results.ok("kernels")
        if row["seconds"] is not None
    ]  # fmt: skip


def calls(results: Results) -> Rows:
    """Each call of this library beside its prediction and its bare products."""
    return [
        {
            "case": row["case"], "N": row["tokens"], "call": f"{row['loss']} {row['path']}",
            "kernels": row["kernels"], "workspace, MiB": f"{row['workspace'] / MIB:,.0f}", "ms": row["seconds"] * 1e3,
            "predicted ms": _times(row["planned_seconds"], 1e3), "× floor": row["over_floor"],
            "of": f"{row['units']}U", "× naive": row["over_naive"],
            "extra MiB": _times(row["extra_bytes"], 1 / MIB), "planned MiB": _times(row["planned_bytes"], 1 / MIB),
        }
        for part in ("llama", "others", "cpu")
        for row in results.ok(part)
        if row["impl"] == "fused" and row["seconds"] is not None
    ]  # fmt: skip


def peers(results: Results) -> Rows:
    """The fastest setting of each contestant for each job, the fastest contestant first."""
    rows = [row for part in ("llama", "others", "cpu") for row in results.ok(part) if row["seconds"] is not None]
    found = {
        (row["case"], row["tokens"], row["loss"], kind_of(row["path"]), row["impl"]): row
        for row in sorted(rows, key=lambda row: -row["seconds"])  # the fastest comes last and stays
        if row["impl"] != "gemm"
    }
    ordered = sorted(found.items(), key=lambda item: (*item[0][:4], item[1]["seconds"]))
    return [
        {
            "case": case, "N": tokens, "job": f"{loss}, {kind}", "who": who, "setting": _setting(row, kind),
            "ms": row["seconds"] * 1e3, "extra MiB": _times(row["extra_bytes"], 1 / MIB), "error": row["value_error"],
        }
        for (case, tokens, loss, kind, who), row in ordered
    ]  # fmt: skip


def tuned(results: Results) -> Rows:
    """The fastest configuration of each kernel."""
    swept = [one for row in results.ok("tune") for one in row["rows"]]
    return [{name: row[name] for name in ("kernel", "config", "ms", "rate")} for row in swept if row.get("chosen")]


def profiled(results: Results) -> Rows:
    """Where the time of a call goes."""
    return [{name: x for name, x in row.items() if name != "status"} for row in results.ok("profile")]


def _setting(row: dict[str, Any], kind: str) -> str:
    workspace = None if row["workspace"] is None else f"{row['workspace'] / MIB:,.0f} MiB"
    path = None if row["path"] == kind else row["path"]
    return ", ".join(part for part in (row["kernels"], path, workspace, row["note"]) if part is not None)


def _times(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor


TABLES: tuple[tuple[str, Callable[[Results], Rows]], ...] = (
    ("Parts", parts),
    ("What is wrong", wrong),
    ("Aims", aims),
    ("Ceilings", ceilings),
    ("Kernels beside their predictions and ceilings", kernels),
    ("Calls beside their predictions", calls),
    ("The fastest setting of each", peers),
    ("The fastest configuration of each kernel", tuned),
    ("Where the time goes, per call; shares of the device's", profiled),
)


def lines(results: Results) -> Iterator[str]:
    """Markdown, provenance below all."""
    case = ", {case}, N = {tokens}".format(**known) if (known := first_case(results)) else ""
    for title, make in TABLES:
        rows = make(results)
        kept = {name for row in rows for name, value in row.items() if value is not None}
        if rows:
            shown = [{name: value for name, value in row.items() if name in kept} for row in rows]
            yield from (f"## {title}{case if make is aims else ''}", "", *free_table(shown), "")
    for part, rows in results.rows.items():
        yield f"* {part}: {len(results.ok(part))} of {len(rows)} rows right; {summary(results.provenance[part])}"
