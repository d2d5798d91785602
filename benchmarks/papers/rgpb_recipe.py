"""Which loss before DPO, or beside it: MLE or ExMATE? On HH-RLHF pairs (Tuan & Wang 2024, §6.4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .claim import Claim, Finding, bars, decide, differences, every, need, spread, write
from .models import Batch, Method, chosen_only, clone, column, compare, evaluate, train
from .rgpb_dialogues import prepare
from .rgpb_large_difference import table

CLAIMS = (
    Claim(
        "rgpb_recipe", "RGPB", "§6.4",
        "DPO after ExMATE ends with a lower perplexity and a higher agility than DPO after MLE.",
    ),
    Claim(
        "rgpb_second_stage", "RGPB", "§6.4",
        "As second stage after MLE, ExMATE improves both perplexity and agility, while DPO gives up perplexity for "
        "agility.",
    ),
)  # fmt: skip
FIRST: dict[str, Method] = {"MLE": ("mle", {}), "ExMATE": ("exmate", {"beta": 1.0})}
DPO: Method = ("dpo", {"beta": 0.1})
SUMS: dict[str, Method] = {
    "MLE + DPO in one loss": ("mle + dpo", {"dpo.beta": 0.1}),
    "ExMATE + DPO in one loss": ("exmate + dpo", {"exmate.beta": 1.0, "dpo.beta": 0.1}),
}


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """One epoch of the first loss, one of the second, whose reference is the model after the first.

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
    return recipe(CLAIMS, out, starts, batches, test, steps, lr, settings, progress)


def recipe(
    claims: Sequence[Claim], out: Path, starts: Sequence[PreTrainedModel], batches: Sequence[Sequence[Batch]],
    test: Batch, steps: int, lr: float, settings: dict[str, Any], progress: bool,
) -> list[Finding]:  # fmt: skip
    """Train in one and two stages, judge the two claims, and write them."""
    found = {"start": [evaluate(model, test) for model in starts]}
    for name, (objective, options) in FIRST.items():
        firsts = []
        for seed, (model, its) in enumerate(zip(starts, batches)):
            policy = clone(model)
            label = f"{name}, seed {seed}" if progress else None
            seen = [chosen_only(batch) for batch in its] if objective == "mle" else its
            train(policy, seen, objective, ref_model=model, lr=lr, steps=steps, progress=label, **options)
            firsts.append(policy)
        seconds = {f"{name}, then DPO": DPO} | ({"MLE, then ExMATE": FIRST["ExMATE"]} if name == "MLE" else {})
        second = compare(firsts, batches, test, seconds, lr=lr, steps=steps, progress=progress)
        found |= {name: second.pop("start"), **second}
    summed = compare(starts, batches, test, SUMS, lr=lr, steps=steps, progress=progress)
    found |= {name: summed[name] for name in SUMS}

    logs, agility = ({m: column(f, name) for m, f in found.items()} for name in ("log perplexity", "agility"))
    settings = {
        **settings, "methods": {**FIRST, "DPO": DPO, **SUMS}, "steps": f"{steps} in each stage",
        "reference": "of a second stage the model after the first, else the start",
    }  # fmt: skip
    rows = table(found)
    lower = differences(logs["MLE, then DPO"], logs["ExMATE, then DPO"])
    higher = differences(agility["ExMATE, then DPO"], agility["MLE, then DPO"])
    number = (
        f"Log-perplexity of MLE, then DPO less that of ExMATE, then DPO: {spread(lower, sign=True)}; agility of the "
        f"latter less that of the former: {spread(higher, sign=True)}."
    )
    findings = [Finding(claims[0], every([decide(lower), decide(higher)]), number, rows, settings)]
    exmate, dpo = "MLE, then ExMATE", "MLE, then DPO"
    parts = {
        "ExMATE lowers log-perplexity by": differences(logs["MLE"], logs[exmate]),
        "raises agility by": differences(agility[exmate], agility["MLE"]),
        "DPO raises log-perplexity by": differences(logs[dpo], logs["MLE"]),
        "and agility by": differences(agility[dpo], agility["MLE"]),
    }
    number = "After MLE, " + "; ".join(f"{name} {spread(gap, sign=True)}" for name, gap in parts.items()) + "."
    findings.append(Finding(claims[1], every([decide(gap) for gap in parts.values()]), number, rows, settings))
    for finding in findings:
        write(finding, out, bars({"log-perplexity": logs, "agility": agility}))
    return findings
