"""What the results in a folder say: ceilings and times beside what plans foretold of them, and aims beside what came.

Nothing is run. A table without rows and a column without values are left out; an aim without a measurement says which
part is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rgpb.bench.cases import LOG_PROB, naive_path
from rgpb.bench.report import free_table, summary
from rgpb.engine.plan import DEFAULT_WORKSPACE, RATES

from .heads import LLAMA

Rows = list[dict[str, Any]]
MIB = 2**20


class Results(NamedTuple):
    """The rows of each part, those without a measurement too, and the provenance of its last run."""

    rows: dict[str, Rows]
    provenance: dict[str, dict[str, Any]]

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
    if not results.rows:
        raise ValueError(f"out: expected a folder with the JSON of parts, got {folder}")
    return results


# -- aims --------------------------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """Something that can be measured, the most that it should be, and how it is found in the results.

    `found` gives the value and whose it is; None without a measurement.
    """

    text: str
    most: float
    part: str
    found: Callable[[Results], tuple[float, str] | None]
    form: str = ".3g"


def least(rows: Rows, value: Callable[[dict[str, Any]], float | None]) -> tuple[float, str] | None:
    """The smallest value, and whose it is."""
    found = [(made, row["kernels"] or row["impl"]) for row in rows if (made := value(row)) is not None]
    return min(found) if found else None


SAME = ("case", "tokens", "width", "vocab", "dtype")


def first_case(results: Results) -> dict[str, Any]:
    """What rows of the part `llama` have in common that aims are about: those of N = 8192, or the first there are."""
    rows = results.rows.get("llama", [])
    wanted = [row for row in rows if (row["case"], row["tokens"]) == LLAMA[0][:2]] or rows
    return {name: wanted[0][name] for name in SAME} if wanted else {}


def of_first_case(results: Results) -> Rows:
    """The right rows of that."""
    case = first_case(results)
    return [row for row in results.ok("llama") if {name: row[name] for name in SAME} == case]


def ours(results: Results) -> Rows:
    """This library's."""
    return [row for row in of_first_case(results) if row["impl"] == "fused"]


def over_floor(loss: str, path: str, workspace: int | None) -> Callable[[Results], tuple[float, str] | None]:
    """Time over the bare products of as many units; on the faster engine. None: whatever the workspace."""

    def found(results: Results) -> tuple[float, str] | None:
        rows = [row for row in ours(results) if (row["loss"], row["path"]) == (loss, path)]
        rows = [row for row in rows if workspace is None or row["workspace"] == workspace]
        return least(rows, lambda row: row["over_floor"])

    return found


def beside_peers(results: Results) -> tuple[float, str] | None:
    """BNF with all gradients: time over the fastest of all others."""
    rows = [row for row in of_first_case(results) if row["loss"] == "bnf" and naive_path(row["path"]) == "full"]
    best = least([row for row in rows if row["impl"] == "fused"], lambda row: row["seconds"])
    rival = least([row for row in rows if row["path"] == "full"], lambda row: row["seconds"])
    return None if rival is None or best is None else (best[0] / rival[0], f"{best[1]} over {rival[1]}")


def log_prob_error(results: Results) -> tuple[float, str] | None:
    """The largest error of a log-probability."""
    found = [(row["value_error"], row["kernels"]) for row in ours(results) if row["loss"] == LOG_PROB]
    return max((one for one in found if one[0] is not None), default=None)


def extra_memory(results: Results) -> tuple[float, str] | None:
    """MB beyond inputs and gradients at the default workspace: the most of all N, losses and kernels."""
    rows = [row for row in results.ok("llama") if row["impl"] == "fused" and row["workspace"] == DEFAULT_WORKSPACE]
    found = [(row["extra_bytes"], f"{row['kernels']}, N = {row['tokens']}") for row in rows if row["extra_bytes"]]
    return (max(found)[0] / 1e6, max(found)[1]) if found else None


def skipped_units(results: Results) -> tuple[float, str] | None:
    """Units that BNF's forward and backward take with tolerance "auto" after all of the training."""
    rows = [row for row in results.ok("trained") if (row["loss"], row["tolerance"]) == ("bnf", "auto")]
    last = max((row.get("steps") or 0 for row in rows), default=0)
    rows = [row for row in rows if (row.get("steps") or 0) == last]
    found = min(rows, key=lambda row: row["units"], default=None)
    if found is None:
        return None
    size = f"N = {found['tokens']}, H = {found['width']}, V = {found['vocab']}"
    return found["units"], f"{found['kernels']}, {size}, perplexity {found['perplexity']:.3g}"


BIG = 4 * 2**30
AIMS = (
    Aim("BNF, 4 GiB: over 3U", 1.15, "llama", over_floor("bnf", "single", BIG)),
    Aim("BNF, default workspace: over 4U", 1.12, "llama", over_floor("bnf", "two_pass", DEFAULT_WORKSPACE)),
    Aim("BNF over the fastest other", 1.0, "llama", beside_peers),
    Aim("DPO: over 4U", 1.15, "llama", over_floor("dpo", "two_pass", None)),
    Aim("BNF, frozen head: over 2U", 1.2, "llama", over_floor("bnf", "frozen", None)),
    Aim("log-probabilities: over 1U", 1.15, "llama", over_floor(LOG_PROB, "forward", None)),
    Aim("log-probabilities, error", 1e-5, "llama", log_prob_error, ".1e"),
    Aim("extra memory at any N by default, MB", 600, "llama", extra_memory),
    Aim("BNF with skipping on a trained distribution, units", 2.5, "trained", skipped_units),
)


def aims(results: Results) -> Rows:
    """A line for each aim; none where nothing that they are about was measured."""
    lines: Rows = []
    for aim in AIMS:
        made = aim.found(results)
        line: dict[str, Any] = {"aim": aim.text, "at most": format(aim.most, "g"), "measured": None, "of": None}
        if made is None:
            lines.append(line | {"verdict": f"no right row of it in {aim.part}"})
            continue
        verdict = "reached" if made[0] <= aim.most else "missed"
        lines.append(line | {"measured": format(made[0], aim.form), "of": made[1], "verdict": verdict})
    return lines if any(line["measured"] is not None for line in lines) else []


# -- predictions -------------------------------------------------------------------------------------------------------


def ceilings(results: Results) -> Rows:
    """Measured rates beside those that plans are made with."""
    capability = results.provenance.get("ceilings", {}).get("capability") or ""
    rates = RATES.get(f"sm_{capability.replace('.', '')}")
    known = (
        {} if rates is None else {"copy, bytes/s": rates.copy, "product bf16, float32 output, flop/s": rates.library}
    )
    return [
        {
            "ceiling": row["what"], "measured, T/s": row["rate"] / 1e12,
            "plans assume, T/s": known[row["what"]] / 1e12 if row["what"] in known else None,
        }
        for row in results.ok("ceilings")
    ]  # fmt: skip


def kernels(results: Results) -> Rows:
    """Each kernel's time beside the prediction, and its share of the ceilings."""
    return [
        {
            "kernel": f"{row['kernel']}, {row['implementation']}", "C": row["rows"], "ms": row["seconds"] * 1e3,
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
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in ("llama", "others", "cpu"):
        for row in results.ok(part):
            job = (row["case"], row["tokens"], row["loss"], naive_path(row["path"]), row["impl"])
            if (
                row["impl"] != "gemm"
                and row["seconds"] is not None
                and (job not in found or row["seconds"] < found[job]["seconds"])
            ):
                found[job] = row
    ordered = sorted(found.items(), key=lambda item: (*item[0][:4], item[1]["seconds"]))
    return [
        {
            "case": case, "N": tokens, "job": f"{loss}, {kind}", "who": who, "setting": _setting(row, kind),
            "ms": row["seconds"] * 1e3, "extra MiB": _times(row["extra_bytes"], 1 / MIB), "error": row["value_error"],
        }
        for (case, tokens, loss, kind, who), row in ordered
    ]  # fmt: skip


def _setting(row: dict[str, Any], kind: str) -> str:
    workspace = None if row["workspace"] is None else f"{row['workspace'] / MIB:,.0f} MiB"
    path = None if row["path"] == kind else row["path"]
    return ", ".join(part for part in (row["kernels"], path, workspace, row["note"]) if part is not None)


def _times(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor


TABLES: tuple[tuple[str, Callable[[Results], Rows]], ...] = (
    ("Aims", aims),
    ("Ceilings", ceilings),
    ("Kernels beside their predictions and ceilings", kernels),
    ("Calls beside their predictions", calls),
    ("The fastest setting of each", peers),
)


def lines(results: Results) -> Iterator[str]:
    """Markdown, provenance below all."""
    known = first_case(results)
    case = f", {known['case']}, N = {known['tokens']}" if known else ""
    for title, make in TABLES:
        rows = make(results)
        kept = {name for row in rows for name, value in row.items() if value is not None}
        if rows:
            shown = [{name: value for name, value in row.items() if name in kept} for row in rows]
            yield from (f"## {title}{case if make is aims else ''}", "", *free_table(shown), "")
    for part, rows in results.rows.items():
        yield f"* {part}: {len(results.ok(part))} of {len(rows)} rows right; {summary(results.provenance[part])}"
