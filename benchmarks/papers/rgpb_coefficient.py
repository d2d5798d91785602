"""What the coefficient β of ExMATE and of DPO does, on HH-RLHF pairs (Tuan & Wang 2024, Appendix G)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .claim import Claim, Finding, curves, decide, every, need, spread, write
from .models import Measured, Method, column, compare
from .rgpb_dialogues import prepare
from .rgpb_large_difference import table

CLAIMS = (
    Claim(
        "rgpb_coefficient_exmate", "RGPB", "Appendix G",
        "A larger β of ExMATE lowers the probabilities of the chosen responses and raises agility.",
    ),
    Claim(
        "rgpb_coefficient_dpo", "RGPB", "Appendix G",
        "A larger β of DPO lowers agility and preserves the probabilities of the chosen responses better.",
    ),
)  # fmt: skip
GRID = (0.1, 0.3, 1.0, 3.0)
NAMES = {"exmate": "ExMATE", "dpo": "DPO"}


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """One epoch at each β from the same start; the verdict is on slopes over log β, one per seed.

    Args:
        out: folder for tables, pictures and JSON.
        data: "hh_rlhf", a folder.
        seeds: runs of each; they draw the weights of the start and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.

    Raises:
        ValueError: no such data.
    """
    _, starts, batches, test, steps, lr, settings = prepare(need(data, "hh_rlhf"), seeds, quick, progress)
    methods: dict[str, Method] = {
        f"{NAMES[name]}, β = {beta:g}": (name, {"beta": beta}) for name in NAMES for beta in GRID
    }
    found = compare(starts, batches, test, methods, lr=lr, steps=steps, progress=progress)
    settings = {**settings, "β": GRID}
    findings = []
    for claim, name in zip(CLAIMS, NAMES):
        its = {beta: found[f"{NAMES[name]}, β = {beta:g}"] for beta in GRID}
        chosen, agility = (slopes(its, quantity) for quantity in ("log perplexity", "agility"))
        sign = 1 if name == "exmate" else -1
        verdict = every([decide([sign * x for x in values]) for values in (chosen, agility)])
        number = (
            f"From one β to the tenfold, log-perplexity changes by {spread(chosen, sign=True)} and agility by "
            f"{spread(agility, sign=True)}."
        )
        rows = table({"start": found["start"], **{f"β = {beta:g}": one for beta, one in its.items()}})
        finding = Finding(claim, verdict, number, rows, settings)
        panels = {
            quantity: {NAMES[name]: {beta: column(one, quantity) for beta, one in its.items()}}
            for quantity in ("log perplexity", "agility")
        }
        write(finding, out, curves(panels, "β", log=True))
        findings.append(finding)
    return findings


def slopes(found: Mapping[float, Sequence[Measured]], quantity: str) -> list[float]:
    """Least-squares slope of a quantity over log₁₀ of the key, one per seed."""
    places = [math.log10(key) for key in found]
    middle = sum(places) / len(places)
    values = [column(one, quantity) for one in found.values()]
    norm = sum((x - middle) ** 2 for x in places)
    return [sum((x - middle) * y for x, y in zip(places, ys)) / norm for ys in zip(*values)]
