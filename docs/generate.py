"""The parts of the documents that are computed: tables of measurements, options of objectives, verdicts, plans.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit with 1 where one is out of date (tests/test_docs.py does the same)

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, where NAME is a key of `PARTS`. Numbers
come from benchmarks/results, verdicts from docs/claims.md, options from the registry, plans from `rgpb plan`: no number
in the documents is typed by hand, unless the sentence says where it was read.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rgpb import cli
from rgpb.bench.plan import HEADS, predictions
from rgpb.bench.tables import Row as BenchRow
from rgpb.engine.chunks import Sizes, sizes
from rgpb.engine.plan import plan
from rgpb.engine.rates import RATES, product_seconds
from rgpb.objectives import OBJECTIVES, Objective, describe_options

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = ROOT / "docs" / "claims.md"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))

# Where each set of measurements lies, under benchmarks/results.
SMALL = "cpu-2-threads/2048-512-32000/results.json"
LARGE = "cpu-2-threads/1024-2048-128256/results.json"
BF16 = "cpu-2-threads/1024-512-32000-bf16/results.json"
GROUPS = "cpu-2-threads/groups/results.json"
AVX2 = "cpu-2-threads-avx2/2048-512-32000/results.json"
AVX2_16MIB = "cpu-2-threads-avx2/2048-512-32000-16MiB/results.json"
PEERS = "cpu-2-threads/peers/cpu.json"
PRODUCTS = "cpu-2-threads/products/results.json"
SKIPPING = "cpu-2-threads/skipping/results.json"
KEPT = "cpu-2-threads/kept-2048-512-32000/results.json"
KEPT_LARGE = "cpu-2-threads-avx2/kept-1024-2048-128256/results.json"
SKIPPING_TILES = "cpu-2-threads/skipping-tiles/results.json"
SKIPPING_BF16 = "cpu-2-threads-avx2/skipping-bf16/results.json"
SKIPPING_FLAT = "cpu-2-threads-avx2/skipping-flat/results.json"
GROWTH = "cpu-2-threads/growth/results.json"
CALLS = "cpu-2-threads/calls/results.json"
TRAINED = "cpu-2-threads/trained/results.json"
REAL = "cpu-2-threads/real/results.json"
STEP = "cpu-2-threads/trainer-step/results.json"
LONGEST = "cpu-2-threads/longest/results.json"
TOKENS = "papers/tokens.json"

JOBS = {"bnf": "BNF", "dpo": "DPO", "mle": "`mle`", "swepo": "SWEPO", "log-prob": "log-probabilities"}
PATHS = {"full": "", "single": "", "two_pass": ", two passes", "frozen": ", frozen head", "forward": ""}

# What was aimed at, set before measuring: (measurements, loss, path) → times the products alone.
AIMS = {
    (SMALL, "bnf", "single"): 1.06,
    (LARGE, "bnf", "single"): 1.04,
    (SMALL, "dpo", "two_pass"): 1.06,
    (SMALL, "log-prob", "forward"): 1.08,
    (KEPT, "bnf", "single"): 1.03,
    (KEPT_LARGE, "bnf", "single"): 1.03,
    (KEPT, "dpo", "single"): 1.02,
    (KEPT, "dpo", "two_pass"): 1.02,
}

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """A run's JSON; what a row leaves out is None, or "" for a note."""
    made = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if "rows" in made:
        left_out = {field: BenchRow._field_defaults.get(field) for field in BenchRow._fields}
        made["rows"] = [{**left_out, **row} for row in made["rows"]]
    return made


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; columns from number `right` on are aligned to the right."""
    rule = ["---" if column < right else "---:" for column in range(len(headers))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headers, rule, *rows))


def conditions(name: str) -> str:
    """One line: machine, versions, commit, date."""
    made = load(name)["provenance"]
    rounds = made.get("repeats") or made.get("rounds")
    return (
        f"Measured {made['date'][:10]} on {made['threads']} threads of an {made.get('cpu', made['device'])}, PyTorch "
        f"{made['torch']}, commit `{made['commit'][:7]}`, medians of {rounds} interleaved rounds: "
        f"[data](../benchmarks/results/{name})."
    )


def shape(row: Row) -> str:
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[row["dtype"]]
    return f"N = {row['tokens']:,}, H = {row['width']:,}, V = {row['vocab']:,}, {dtype}"


def ms(row: Row) -> str:
    return f"{row['seconds'] * 1e3:,.0f} ms"


def mib(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:,.0f} MiB"


def job(row: Row) -> str:
    return JOBS[row["loss"]] + PATHS[row["path"]]


# -- measurements -----------------------------------------------------------------------------------------------------


def summary() -> str:
    """The README's table: naive PyTorch is the reference, one job a row."""
    rows = [row for row in load(SMALL)["rows"] if row["impl"] != "gemm"]
    lines = []
    for ours in rows:
        if ours["impl"] != "fused" or ours["path"] == "two_pass":
            continue
        path = "full" if ours["path"] == "single" else ours["path"]
        (naive,) = (r for r in rows if r["impl"] == "naive" and r["loss"] == ours["loss"] and r["path"] == path)
        memory = ours["extra_bytes"] / naive["extra_bytes"]
        both = f"{ours['over_naive']:.2f} × time, {memory:.2f} × memory"
        lines.append((job(ours), f"{ms(naive)}, {mib(naive)}", f"**{ms(ours)}, {mib(ours)}**", both))
    return table((shape(rows[0]), "naive PyTorch", "rgpb", "rgpb ÷ naive"), lines)


def measured(*names: str) -> str:
    """All rows of some runs at one shape, beside the products alone and naive PyTorch."""
    lines = []
    for name in names:
        rows = [row for row in load(name)["rows"] if row["impl"] != "gemm" and row["status"] == "ok"]
        space = load(name)["provenance"]["workspace"]
        for row in rows:
            ours = row["impl"] == "fused"
            what = f"**{job(row)}**" if ours else f"{job(row)}, naive"
            if ours and space != 512 << 20:
                what += f", workspace {space >> 20} MiB"
            # one error of the loss or log-probability, one of the gradients relative to their norm
            errors = (f"{row['value_error']:.0e}", "" if row["path"] == "forward" else _error(row))
            naive = f"{row['over_naive']:.2f}" if row["over_naive"] else ""
            lines.append((what, ms(row), f"{row['over_floor']:.2f} × {row['units']}", naive, mib(row), *errors))
    headers = (
        shape(load(names[0])["rows"][0]), "time", "products alone", "naive", "memory", "error", "gradient’s error"
    )  # fmt: skip
    return "\n\n".join([table(headers, lines), conditions(names[0])])


def skipping_other() -> str:
    """Where a tolerance was timed besides: bfloat16, and logits that are flat. BNF."""
    lines = []
    for name, what in ((SKIPPING_BF16, "bfloat16"), (SKIPPING_FLAT, "flat logits, float32")):
        content = load(name)
        rows = {row["way"]: row for row in content["table"] if row["loss"] == "bnf"}
        tokens = int(content["provenance"]["shape"].split()[0])
        cells = [f"{rows[way]['ms']:,} ms" for way in ("naive PyTorch", "rgpb, kept", "rgpb, tolerance, kept")]
        share = rows["rgpb, tolerance, kept"]["left out"]
        source = f"[data](../benchmarks/results/{name})"
        lines.append((f"{what}, {tokens:,} tokens", *cells, f"{share:.2f}", source))
    return table(("BNF, τ = 2⁻⁸", "naive", "rgpb, kept", "with tolerance", "left out", ""), lines)


def skipping_tiles() -> str:
    """What the Triton kernels would multiply of the same model's masks."""
    lines = [
        (
            f"{row['loss']}, {row['tokens']:,} tokens, {row['order']}",
            *(f"{row[name]:.2f}" for name in ("pairs", "dW", "dX", "dX, rows as they lie")), f"{row['MB']:,} MB",
            f"{row['over 3U']:.2f}",
        )
        for row in load(SKIPPING_TILES)["table"]
    ]  # fmt: skip
    headers = ("", "pairs that count", "in dW", "in dX", "in dX with rows as they lie", "loaded", "predicted / 3U")
    made = load(SKIPPING_TILES)["provenance"]
    source = f"[data](../benchmarks/results/{SKIPPING_TILES})"
    return f"{table(headers, lines)}\n\nCounted {made['date'][:10]} at commit `{made['commit'][:7]}`: {source}."


def _error(row: Row) -> str:
    return f"{row['gradient_error_relative']:.0e}"


def aims() -> str:
    lines = []
    for (name, loss, path), aim in AIMS.items():
        (row,) = (r for r in load(name)["rows"] if (r["loss"], r["path"], r["impl"]) == (loss, path, "fused"))
        ratio = row["over_floor"]
        kept = ", kept workspace" * (name in (KEPT, KEPT_LARGE))
        lines.append(
            (f"{job(row)}; {shape(row)}{kept}", f"{aim:.2f}", f"{ratio:.2f}", "met" if ratio <= aim else "missed")
        )
    return table(("time over the products alone", "aim", "measured", ""), lines)


NAMES = {
    "fused": "**rgpb**",
    "naive": "naive PyTorch",
    "compiled": "naive, `torch.compile`",
    "CCE": "cut_cross_entropy",
    "F.linear_cross_entropy": "`F.linear_cross_entropy`",
    "Liger": "Liger",
    "TRL": "TRL",
}


def peers() -> str:
    """Each contestant's fastest setting on each job: ms, MiB."""
    rows = [row for row in load(PEERS)["rows"] if row["impl"] in NAMES]
    jobs = [("bnf", ""), ("dpo", ""), ("dpo", "frozen"), ("mle", ""), ("log-prob", "")]
    lines: list[list[str]] = []
    settings: dict[tuple[str, str], list[str]] = {}
    for impl, name in NAMES.items():
        cells = [name]
        for loss, path in jobs:
            mine = [
                row
                for row in rows
                if (row["impl"], row["loss"], row["status"]) == (impl, loss, "ok")
                and (row["path"] == "frozen") == (path == "frozen")
            ]
            best = min(mine, key=lambda row: row["seconds"], default=None)
            cells.append(f"{ms(best)}, {mib(best)}" if best else "–")
            if best and best["note"]:
                what = JOBS[loss] + (", frozen head" if path else "")
                settings.setdefault((name, best["note"]), []).append(what)
        lines.append(cells)
    taken = "; ".join(f"{name}: `{note}` ({', '.join(done)})" for (name, note), done in settings.items())
    made = load(PEERS)["provenance"]
    versions = ", ".join(
        f"{name} {made[name]}" for name in ("trl", "liger-kernel", "cut-cross-entropy") if name in made
    )
    headers = (shape(rows[0]), *(JOBS[loss] + (", frozen head" if path else "") for loss, path in jobs))
    return "\n\n".join([table(headers, lines), f"Fastest settings: {taken}.", f"{conditions(PEERS)} With {versions}."])


def products() -> str:
    found = load(PRODUCTS)["table"]
    counts = (128, 256, 512, 1024)
    vocab = load(PRODUCTS)["provenance"]["vocab"]

    def rate(product: str, rows: int, columns: int, pad: int = 0) -> str:
        (line,) = (
            x
            for x in found
            if x.get("product") == product and (x.get("rows"), x.get("columns"), x.get("pad")) == (rows, columns, pad)
        )
        return f"{line['gflops']:.0f}"

    kinds = (
        ("logits, all columns at once", "logits", vocab),
        ("logits, 1,024 columns at a time", "logits", 1024),
        ("dX", "dX", vocab),
        ("dW, accumulated", "dW", vocab),
    )
    by_rows = table(
        (f"GFLOP/s, H = 512, V = {vocab:,}", *(f"{count:,} rows" for count in counts)),
        [(text, *(rate(product, count, columns) for count in counts)) for text, product, columns in kinds],
    )
    widths = (1024, 2048, 4096)
    by_columns = table(
        ("GFLOP/s, slices of dW over 2,048 rows", *(f"{width:,} columns" for width in widths)),
        [
            (text, *(rate("slices of dW", 2048, width, pad) for width in widths))
            for text, pad in (("rows dense", 0), ("16 elements between rows", 16))
        ],
    )
    memory = table(
        ("writing memory", "GB/s"),
        [(x["product"].removeprefix("write "), f"{x['GB/s']:.1f}") for x in found if "GB/s" in x],
    )
    shares = table(
        ("share of a call", "row kernels", "products"),
        [
            (_call(x["product"]), f"{x['row kernels, %']:.1f} %", f"{x['products, %']:.1f} %")
            for x in found
            if "row kernels, %" in x
        ],
    )
    return "\n\n".join([by_rows, by_columns, memory, shares, conditions(PRODUCTS)])


def _call(name: str) -> str:
    loss, path = name.split()
    return JOBS[loss] + PATHS[path]


def skipping() -> str:
    """What skipping saves on a real model: times, and what other tolerances leave out."""
    content = load(SKIPPING)
    lines = []
    for row in content["table"]:
        error = "" if row["dX off"] is None else f"{row['dX off']:.0e} / {row['dW off']:.0e}"
        share = "" if row["left out"] is None else f"{row['left out']:.2f}"
        over = [f"{row[f'over {other}']:.2f}" for other in ("3U", "naive")]
        lines.append((f"{row['loss']}: {row['way']}", f"{row['ms']:,} ms", *over, share, error))
    times = table(("", "time", "over the products", "over naive", "left out", "dX / dW off"), lines)
    rows: dict[str, list[str]] = {}
    for row in content["units"]:
        name = row["loss"] if row["of"] == "all" else f"{row['loss']}, {row['of']}"
        rows.setdefault(name, []).append(f"{row['units']:.2f}")
    tolerances = [row["tolerance"] for row in content["units"][: len(next(iter(rows.values())))]]
    headers = ["products, by tolerance", *(x if x == "auto" else f"2^{math.log2(x):.0f}" for x in tolerances)]
    return "\n\n".join([times, table(headers, [(name, *cells) for name, cells in rows.items()]), conditions(SKIPPING)])


def small() -> str:
    """Calls of a few tokens: medians beside naive cross-entropy."""
    content = load(CALLS)
    lines = [
        (f"{row['call']}, {row['shape']}", *(f"{row[way]:.2f} ms" for way in ("rgpb", "naive")), f"{row['over']:.1f}")
        for row in content["table"]
    ]
    return "\n\n".join([table(("", "rgpb", "naive cross-entropy", "ratio"), lines), conditions(CALLS)])


def growth() -> str:
    """How a step's time over the bare products grows with each size."""
    content = load(GROWTH)
    threads = list(dict.fromkeys(row["threads"] for row in content["table"]))
    found: dict[tuple[str, str], list[str]] = {}
    for row in content["table"]:
        sizes = ", ".join(f"**{row[name]:,}**" if name == row["grows"] else f"{row[name]:,}" for name in "NVH")
        found.setdefault((row["grows"], sizes), []).append(f"{row['over the products']:.2f}")
    headers = ("N, V, H", *(f"{count} thread{'s' * (count > 1)}" for count in threads))
    return "\n\n".join([table(headers, [(sizes, *of) for (_, sizes), of in found.items()]), conditions(GROWTH)])


def trained() -> str:
    """What skipping changes in training, beside the spread of seeds."""
    content = load(TRAINED)
    lines: list[tuple[str, ...]] = [("before training", "", "0.500", "", "", "", "")]
    for row in content["table"]:
        name = "no tolerance" if row["tolerance"] == "none" else f"τ = {row['tolerance']}"
        apart = [
            "" if row[f"{what} off"] is None else f"{row[f'{what} off']:.3f}" for what in ("head", "layers", "scores")
        ]
        right = f"{row['held-out accuracy']:.3f} ± {row['standard error']:.3f}"
        lines.append(
            (f"{name}, seed {row['seed']}", f"{row['loss, last tenth']:.3f}", right, *apart, f"{row['left out']:.2f}")
        )
    headers = (
        "", "loss, last tenth", "held-out pairs ranked rightly", "head off", "layers off", "scores off", "left out"
    )  # fmt: skip
    made = content["provenance"]
    source = f"Measured {made['date'][:10]}, PyTorch {made['torch']}: [data](../benchmarks/results/{TRAINED})."
    return "\n\n".join([table(headers, lines), source])


def trainer_step() -> str:
    """A training step in a trainer, whole and from the hidden states on."""
    lines = [
        (
            f"{row['way']}{', π_ref = 1' * row['way'].startswith('Liger')}",
            *(
                x
                for part in ("step", "loss part")
                for x in (f"{row[f'{part}, ms']:,.0f} ms", f"{row[f'{part} over TRL']:.2f}")
            ),
            f"{row['peak, MiB']:,} MiB",
        )
        for row in load(STEP)["table"]
        if row["status"] == "ok"
    ]
    return "\n\n".join([table(("", "step", "over TRL", "loss part", "over TRL", "peak"), lines), conditions(STEP)])


def longest() -> str:
    """The longest pair within a limit, and the length that no longer fits."""
    content = load(LONGEST)
    made, ways = content["provenance"], dict.fromkeys(row["way"] for row in content["table"])
    found = {(row["way"], row["loss"]): row for row in content["table"]}

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        if row["longest"] is None:
            over = f" (not {row['too long']:,})" if row["too long"] else ""
            return f"{row['fits']:,}{over} *" if row["fits"] else "not tried yet"
        return f"{row['longest']:,}, the cap" if row["capped"] else f"{row['longest']:,} (not {row['too long']:,})"

    lines = [(way, *(cell(found.get((way, loss))) for loss in ("dpo", "bnf"))) for way in ways]
    source = (
        f"Measured {made['date'][:10]}, {made['model']}, {made['limit'] / 2**30:g} GiB, attention within "
        f"{made['window']:,} tokens, PyTorch {made['torch']}, "
        f"commit `{made['commit'][:7]}`: [data](../benchmarks/results/{LONGEST}), [picture](images/longest.png). "
        "*: fits; the limit isn't found yet."
    )
    return "\n\n".join([table(("tokens of each response", "DPO", "BNF"), lines), source])


def real() -> str:
    """What `make real` showed of held-out pairs."""
    content = load(REAL)
    first, *_ = content["table"]
    made = content["provenance"]
    source = (
        f"Measured {made['date'][:10]} on {made['threads']} threads of an {made['cpu']}, PyTorch {made['torch']}, "
        f"{made['held_out']} pairs held out; training took {made['seconds'] / 60:.0f} minutes and "
        f"{made['peak_bytes'] / 2**30:.1f} GiB: [data](../benchmarks/results/{REAL})."
    )
    return "\n\n".join([table([*first], [list(row.values()) for row in content["table"]]), source])


# -- claims -----------------------------------------------------------------------------------------------------------


CHANGED = ", as changed"  # as benchmarks.papers.report has it
VERDICTS = ("**holds**", "**does not hold**", "**not decidable at this size**")


def versions() -> str:
    """What `make versions` found."""
    rows = json.loads((ROOT / "tests" / "versions.json").read_text(encoding="utf-8"))
    names = ("transformers", "PEFT", "TRL", "Triton", "numpy")
    return table(
        ["", *names, "passed", "failed"],
        [
            [name, *(row["versions"][each.lower()] for each in names), f"{row['passed']}", f"{len(row['failed'])}"]
            for name, row in rows.items()
        ],
        right=len(names) + 1,
    )


def claims() -> list[tuple[str, str, str]]:
    """(claim, verdict on small models, verdict on the real one or "") of each row of docs/claims.md.

    "…, as changed": the real one's is of another claim, on other data or of another measure.
    """
    rows = [line.strip("| ").split(" | ") for line in CLAIMS.read_text(encoding="utf-8").splitlines()]
    found = [cells for cells in rows if len(cells) > 3 and cells[2] in VERDICTS]
    return [
        (cells[0], cells[2].strip("*"), cells[3].replace("*", "") if cells[3].removesuffix(CHANGED) in VERDICTS else "")
        for cells in found
    ]


def tally() -> str:
    small, real = (
        [verdict for _, verdict, _ in claims()],
        [verdict.removesuffix(CHANGED) for _, _, verdict in claims() if verdict],
    )

    def told(verdicts: list[str]) -> str:
        held, failed = verdicts.count("holds"), verdicts.count("does not hold")
        return f"{held} held, {failed} did not, and {len(verdicts) - held - failed} could not be decided"

    also = f" Of {len(real)} that were tried on SmolLM2-135M, some of them changed, {told(real)}." if real else ""
    return f"**Of {len(small)} claims of the four papers that were tried here on small models, {told(small)}.{also}**"


# What a reader comes with → the losses to try, and the claims that bear on it: a piece of each one's text.
DECISIONS = (
    (
        "Pairs that differ in a few tokens (a digit, a step of a proof)",
        "`bnf`, or `exmate`; not `dpo` alone",
        (
            ("DPO lowers the chosen response", "On nearly identical pairs DPO lowers the likelihood of the chosen"),
            ("DPO learns next to nothing", "DPO learns next to nothing"),
            ("BNF preserves the model better", "BNF preserves the model better than DPO and NLL+PLL"),
            ("ExMATE improves perplexity and agility", "In the same case ExMATE improves both at once"),
        ),
    ),
    (
        "Pairs that differ much",
        "`dpo`, `exmate` or `mle`: compare them on your data",
        (
            (
                "ExMATE has the lowest perplexity",
                "differ much (HH-RLHF), ExMATE reaches the lowest perplexity",
            ),
            ("DPO has the highest agility", "differ much (HH-RLHF), DPO reaches the highest agility"),
        ),
    ),
    (
        "Likes and dislikes without partners",
        "`bnf`, `kto` or `bco`",
        (("BNF improves without any pairs", "BNF improves over the model it starts from even when no response"),),
    ),
    (
        "Several responses to a prompt, with rewards",
        "`swepo` with `p=0`",
        (
            ("All above the mean beat the best alone", "Contrasting all responses above the mean"),
            ("Weighting by deviation, and by its square, helps", "Weighting the group contrast by the deviation"),
            ("DPO varies more with the rejected response", "DPO's result varies more than that of SWEPO"),
        ),
    ),
    (
        "Several responses, the best known, no rewards",
        "`rnce`, or `mc_po`",
        (
            ("Drawing by the kernel beats other samplers", "Drawing the rejected response with probability"),
            ("The lowest βΔ is the worst sampler", "Taking the candidate with the lowest"),
        ),
    ),
    (
        "One model after another: first `mle`, then preferences",
        "`exmate` or `dpo` as second stage: compare",
        (("ExMATE improves both, DPO trades one for the other", "As second stage after MLE, ExMATE improves both"),),
    ),
    (
        "DPO moves the chosen responses too far",
        "a larger `beta`",
        (("A larger β preserves the chosen better", "A larger β of DPO lowers agility"),),
    ),
)  # fmt: skip


def decisions() -> str:
    known = claims()
    lines = []
    for situation, advice, wanted in DECISIONS:
        evidence = []
        for short, text in wanted:
            its = [both for claim, *both in known if text in claim and "generated dialogues" not in claim]
            if len(its) != 1:
                raise ValueError(f"DECISIONS: expected one claim with {text!r} in docs/claims.md, got {len(its)}")
            small, real = (verdict.replace("not decidable at this size", "undecided") for verdict in its[0])
            alike = "few tokens" not in situation  # the real model's pairs differ much
            there = f", on SmolLM2-135M **{real}**".replace(f"{CHANGED}**", f"**{CHANGED}")
            evidence.append(f"{short}: **{small}**" + (there if real and alike else ""))
        lines.append((situation, advice, "; ".join(evidence)))
    return table(("you have", "try first", "what was tried here, on small models and on SmolLM2-135M"), lines, right=3)


def moved_tokens() -> str:
    """What training did to single tokens of preferred responses of a real model."""

    def cells(method: str, part: str, its: Row) -> tuple[str, ...]:
        falls = {row["from"]: row.get("falling", math.nan) for row in its["by probability"]}
        words = ", ".join(f"`{word.replace(' ', '␣')}`" for word, _, _ in its["words"][:4])
        shares = [f"{share:.0%}" for share in (its["falling"], falls[0.0], falls[0.1], falls[0.99])]
        return (method, part, f"{its['mean']:+.3f}", *shares, words)

    headers = ("trained", "pairs", "mean Δ log p", "tokens that fall", "p < 0.01", "0.1–0.3", "≥ 0.99", "fall most")
    parts = {"seen": "trained on", "held-out": "held out"}
    found = load(TOKENS)["tokens"].items()
    return table(headers, [cells(method, parts[part], its[part]) for method, its in found for part in parts], right=2)


def sure_tokens() -> str:
    """How sure a real model is of tokens, and what becomes of BNF's printed formula."""
    names = {"seen": "replies of HH-RLHF, trained on", "held-out": "replies, held out", "own": "its own greedy answers"}
    lines = []
    for part, text in names.items():
        its = load(TOKENS)["sure"][part]["start"]
        below = [f"{its['1 − p below'][key]:.2%}" for key in ("0.01", "0.002", "0.0001")]
        lost = [f"{its[dtype]['responses without a finite gradient']:.0%}" for dtype in ("float32", "bfloat16")]
        lines.append((text, f"{its['tokens']:,}", *below, f"{its['smallest 1 − p']:.1e}", *lost))
    headers = ("responses", "tokens", "1 − p < 0.01", "< 2⁻⁹", "< 10⁻⁴", "least", "NaN in float32", "NaN in bfloat16")
    return table(headers, lines)


# -- objectives -------------------------------------------------------------------------------------------------------


def options_of(spec: Objective) -> list[tuple[str, str, str]]:
    """(name, default, range in words or "") of each option of an objective."""
    return [(option.name, option.default, brief(option.range)) for option in describe_options(spec)]


def brief(allowed: str) -> str:
    """A range in signs: "a number of at least 0 and below 0.5" → "≥ 0, < 0.5"."""
    signs = {"a number ": "", "a whole number ": "whole, ", "of at least ": "≥ ", "above ": "> ", "below ": "< "}
    for words, sign in signs.items():
        allowed = allowed.replace(words, sign)
    return allowed.replace(" and ", ", ")


def needs(spec: Objective) -> str:
    """What a call is given beside hidden states, head and target."""
    listed = ["`label`"] if spec.label else []
    listed += ["`ref`" if spec.ref == "sums" else "`ref` per token"] if spec.ref else []
    listed += ["`rewards`" if spec.rewards else "`group_size`"] if spec.unit == "group" else []
    return ", ".join(listed) or "–"


def options(unit: str) -> str:
    lines = []
    for name, spec in OBJECTIVES.items():
        if spec.unit == unit and spec.function.__module__.startswith("rgpb."):
            listed = [
                f"`{option}={default}`" + (f" ({allowed})" if allowed else "")
                for option, default, allowed in options_of(spec)
            ]
            lines.append((f"`{name}`", ", ".join(listed) or "–", needs(spec), spec.couples))
    return table(("name", "options and defaults", "needs", "couples"), lines, right=4)


# -- plans ------------------------------------------------------------------------------------------------------------


def kernel_predictions() -> str:
    """What the two ceilings of an H200 allow each Triton kernel, on Llama-3-8B's head in bf16."""
    tokens, (width, vocab, _) = 8192, HEADS["llama-3-8b"]
    rates, logits = RATES["sm_90"], tokens * vocab
    flops, operands = 2 * logits * width, 2 * width * (tokens + vocab)
    partials = 3 * 4 * tokens * (vocab // 128)
    whole, rest = divmod(tokens, 640)
    formed, last, dx, dw = (
        product_seconds(rates, *each, 2)
        for each in ((640, vocab, width), (rest, vocab, width), (tokens, width, vocab), (vocab, width, tokens))
    )
    kernels = (
        ("library product → float32 logits, 640 rows at a time", True, 4 * logits + operands, whole * formed + last),
        ("library product → dX", True, 2 * logits + operands, dx),
        ("library product → dW", True, 2 * logits + operands, dw),
        ("`statistics_kernel`", False, 4 * logits, 4 * logits / rates.copy),
        ("`statistics_kernel`, weights written", False, 6 * logits, 6 * logits / rates.copy),
        ("`gradients_kernel`, bf16 out", False, 6 * logits, 6 * logits / rates.copy),
        ("`token_loss_kernel`, bf16 out", False, 6 * logits, 6 * logits / rates.copy),
        ("`tiles_kernel`, score", True, operands + partials, flops / rates.tile),
        ("`tiles_kernel`, weights or gradients", True, 2 * logits + operands, flops / rates.tile),
    )
    lines = []
    for name, multiplies, size, seconds in kernels:
        work = (f"{flops / 1e12:.1f} T", "products") if multiplies else ("–", "memory")
        lines.append((name, work[0], f"{size / 1e9:.1f} GB", work[1], f"{seconds * 1e3:.1f} ms"))
    headers = ("kernel", "flops", "bytes", "bound by", "predicted")
    return table(headers, lines)


def predicted_aims() -> str:
    """What was aimed at on an H200, for Llama-3-8B's head in bf16, beside what the plan predicts."""
    jobs: tuple[tuple[str, int, float, dict[str, Any]], ...] = (
        ("BNF, N = 8192, 4 GiB", 8192, 1.08, {"couples": "token", "workspace": 4 << 30}),
        ("BNF, N = 8192, 512 MiB", 8192, 1.10, {"couples": "token"}),
        ("BNF, N = 512, 512 MiB", 512, 1.35, {"couples": "token"}),
    )
    lines = []
    for name, tokens, aim, request in jobs:
        made = plan(tokens, llama("triton"), **request)
        assert made.seconds is not None
        over = made.seconds * RATES["sm_90"].library / made.flops
        lines.append(
            (
                name, f"{aim:.2f} × {made.units}U", f"{over:.3f} × {made.units}U", "met" if over <= aim else "missed",
                f"{made.path}, {made.rows} rows of logits, {made.together} of E, {made.extra_bytes / 2**30:.1f} GiB",
            )
        )  # fmt: skip
    return table(("call", "aim", "predicted", "", "plan"), lines)


def crossings() -> str:
    """From which workspace on a token-wise loss takes a single pass, and from which rate on tile kernels are faster."""
    rates, (width, vocab, _) = RATES["sm_90"], HEADS["llama-3-8b"]
    lines = []
    for tokens in (512, 2048, 8192, 32768):
        sizes_of = range(128 << 20, 8 << 30, 64 << 20)
        calls = ((size, plan(tokens, llama("triton"), couples="token", workspace=size)) for size in sizes_of)
        single = next(size for size, made in calls if made.path == "single")
        rows, tiles = (
            plan(tokens, llama(impl), couples="token", path="single", workspace=4 << 30) for impl in ("triton", "tiled")
        )
        assert rows.seconds is not None
        assert tiles.seconds is not None
        flops = 2 * tokens * vocab * width
        level = flops / (rows.seconds - tiles.seconds + flops / rates.tile) / rates.library
        lines.append((f"{tokens:,}", f"{single >> 20:,} MiB", f"{level:.0%}".replace("%", " %")))
    return table(("N", "a single pass from a workspace of", "`tiled` level with `triton` at"), lines)


def llama(impl: str) -> Sizes:
    """Llama-3-8B's head in bf16 on an H200."""
    width, vocab, _ = HEADS["llama-3-8b"]
    return sizes(vocab, width, torch.bfloat16, torch.bfloat16, "cuda", impl, arch="sm_90")


def planned(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(command.split()[1:])
    if code:
        raise ValueError(f"{command}: expected exit code 0, got {code}")
    return f"```\n$ {command}\n{out.getvalue().rstrip()}\n```"


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "small": lambda: measured(SMALL),
    "large": lambda: measured(LARGE),
    "bf16": lambda: measured(BF16),
    "groups": lambda: measured(GROUPS),
    "avx2": lambda: measured(AVX2, AVX2_16MIB),
    "aims": aims,
    "peers": peers,
    "products": products,
    "skipping": skipping,
    "kept": lambda: measured(KEPT),
    "kept-large": lambda: measured(KEPT_LARGE),
    "skipping-other": skipping_other,
    "skipping-tiles": skipping_tiles,
    "growth": growth,
    "calls": small,
    "trained": trained,
    "real": real,
    "trainer-step": trainer_step,
    "longest": longest,
    "predictions": predictions,
    "kernel-predictions": kernel_predictions,
    "predicted-aims": predicted_aims,
    "crossings": crossings,
    "versions": versions,
    "tally": tally,
    "decisions": decisions,
    "moved-tokens": moved_tokens,
    "sure-tokens": sure_tokens,
    "options-response": lambda: options("response"),
    "options-pair": lambda: options("pair"),
    "options-group": lambda: options("group"),
    "plan-ranks": lambda: planned("rgpb plan --model llama-3-405b --tokens 8192 --loss dpo --tp 8 --fsdp 64"),
    "plan-gpu": lambda: planned("rgpb plan --model llama-3-8b --tokens 8192 --loss bnf --workspace 4GiB"),
}
MARKED = re.compile(r"(<!-- begin ([a-z0-9-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def generated(name: str) -> str:
    """A document with all its generated parts made anew.

    Args:
        name: path of the document from the repository's root.

    Raises:
        ValueError: a marker without its partner, or of an unknown part.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    begun = re.findall(r"<!-- begin ([a-z0-9-]+) -->", text)
    if begun != [part for _, part, _ in MARKED.findall(text)] or begun != re.findall(
        r"<!-- end ([a-z0-9-]+) -->", text
    ):
        raise ValueError(f"{name}: expected each `begin` with its `end`, got {begun}")
    unknown = sorted(set(begun) - set(PARTS))
    if unknown:
        raise ValueError(f"{name}: expected parts of {sorted(PARTS)}, got {unknown}")
    made = {part: PARTS[part]() for part in begun}
    if name == "README.md":  # links start at the root there
        made = {part: body.replace("](../", "](") for part, body in made.items()}
    return MARKED.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[3]}", text)


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    changed = [name for name in DOCUMENTS if generated(name) != (ROOT / name).read_text(encoding="utf-8")]
    for name in changed:
        if arguments:
            print(f"{name}: out of date; run `python docs/generate.py`", file=sys.stderr)
        else:
            (ROOT / name).write_text(generated(name), encoding="utf-8")
    return 1 if changed and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
