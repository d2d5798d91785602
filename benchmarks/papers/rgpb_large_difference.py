"""MLE, unlikelihood, ExMATE and DPO on HH-RLHF pairs, whose replies differ much (Tuan & Wang 2024, §6.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .claim import Claim, Finding, bars, decide, differences, every, need, spread, write
from .models import ON_SEEN, Measured, Method, column, compare, pair_batches
from .rgpb_dialogues import RATES, prepare

CLAIMS = (
    Claim(
        "rgpb_large_difference_dpo", "RGPB", "§6.3",
        "Where chosen and rejected responses differ much (HH-RLHF), DPO reaches the highest agility and the worst "
        "perplexity.",
    ),
    Claim(
        "rgpb_large_difference_exmate", "RGPB", "§6.3",
        "Where chosen and rejected responses differ much (HH-RLHF), ExMATE reaches the lowest perplexity and the "
        "second highest agility.",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {
    "MLE": ("mle", {}),
    "unlikelihood": ("unlikelihood", {"alpha": 1.0}),
    "ExMATE": ("exmate", {"beta": 1.0}),
    "DPO": ("dpo", {"beta": 0.1}),
}


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train each method for one epoch of the pairs from the same start, and compare on held-out pairs.

    Args:
        out: folder for table, picture and JSON.
        data: "hh_rlhf", a folder.
        seeds: runs of each; they draw the weights of the start and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.

    Raises:
        ValueError: no such data.
    """
    texts, starts, batches, test, steps, lr, settings = prepare(need(data, "hh_rlhf"), seeds, quick, progress)
    seen = [pair_batches(texts.train[: len(texts.test)], len(texts.test), 0, pad=texts.pad)[0]] * seeds
    found = compare(starts, batches, test, METHODS, lr=lr, steps=steps, progress=progress, seen=seen)
    for rate in RATES:  # DPO may want another one than MLE
        if rate != lr and not quick:
            name = f"DPO at {rate:g}"
            found |= compare(
                starts, batches, test, {name: METHODS["DPO"]}, lr=rate, steps=steps, progress=progress, seen=seen
            )
    rule = (
        f"{settings['rule for the learning rate']}; DPO also at the others, and the claim about it has to hold at each"
    )
    settings = {
        **settings,
        "rule for the learning rate": rule,
        "methods": {name: [m, o] for name, (m, o) in METHODS.items()},
    }
    held_out = {name: one for name, one in found.items() if not name.endswith(ON_SEEN)}
    found = held_out | found  # training pairs last
    findings = [judge_dpo(CLAIMS[0], found, settings), judge_exmate(CLAIMS[1], found, settings)]
    names = ("perplexity", "agility")
    for finding in findings:
        write(finding, out, bars({name: {m: column(f, name) for m, f in held_out.items()} for name in names}))
    return findings


def table(found: dict[str, list[Measured]]) -> list[list[str]]:
    """Perplexity, agility and likelihoods of each method, mean ± standard error over the seeds."""
    names = ("perplexity", "agility", "chosen", "rejected", "accuracy")
    header = ["", "perplexity", "agility", "log p of chosen", "log p of rejected", "accuracy by mean log p"]
    return [header, *([m, *(spread(column(f, name)) for name in names)] for m, f in found.items())]


def judge_dpo(claim: Claim, found: dict[str, list[Measured]], settings: dict[str, Any]) -> Finding:
    """Whether DPO, at each of its rates, has the highest agility and the worst perplexity of `METHODS`."""
    others = [name for name in METHODS if name != "DPO"]
    parts, told = [], []
    for name in (name for name in found if name.startswith("DPO") and not name.endswith(ON_SEEN)):
        gaps = {
            (quantity, other): differences(column(found[name], quantity), column(found[other], quantity))
            for quantity in ("agility", "log perplexity")
            for other in others
        }
        best = max(others, key=lambda other: sum(column(found[other], "agility")))
        worst = max(others, key=lambda other: sum(column(found[other], "log perplexity")))
        verdicts = [decide(gap) for gap in gaps.values()]
        rate = name if " " in name else f"DPO at {settings['learning rate']:g}"
        told.append(
            f"{rate}: agility less that of the best other ({best}) {spread(gaps['agility', best], sign=True)}, "
            f"log-perplexity less that of the worst other ({worst}) "
            f"{spread(gaps['log perplexity', worst], sign=True)} ({every(verdicts)})"
        )
        parts += verdicts
    return Finding(claim, every(parts), f"{'; '.join(told)}.", table(found), settings)


def judge_exmate(claim: Claim, found: dict[str, list[Measured]], settings: dict[str, Any]) -> Finding:
    """Whether ExMATE has the lowest perplexity of `METHODS`, and the second highest agility, after DPO."""
    others = [name for name in METHODS if name != "ExMATE"]
    exmate = {quantity: column(found["ExMATE"], quantity) for quantity in ("agility", "log perplexity")}
    lower = {name: differences(column(found[name], "log perplexity"), exmate["log perplexity"]) for name in others}
    above = {name: differences(exmate["agility"], column(found[name], "agility")) for name in others if name != "DPO"}
    below = differences(column(found["DPO"], "agility"), exmate["agility"])
    best = min(others, key=lambda name: sum(column(found[name], "log perplexity")))
    next_ = max(above, key=lambda name: sum(column(found[name], "agility")))
    number = (
        f"Log-perplexity of the best other ({best}) less ExMATE's: {spread(lower[best], sign=True)}; ExMATE's agility "
        f"less that of {next_}: {spread(above[next_], sign=True)}, DPO's less ExMATE's: {spread(below, sign=True)}."
    )
    parts = [decide(gap) for gap in (*lower.values(), *above.values(), below)]
    return Finding(claim, every(parts), number, table(found), settings)
