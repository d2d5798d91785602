"""NLL+PLL, DPO and BNF on pairs of answers that differ in two digits (BNF, §2 and Figure 1).

No learning rate is picked: every method is run at every rate of a grid, and a claim has to hold at each of them.
"""

from __future__ import annotations

from pathlib import Path

from .bnf_sums import described, load, right
from .claim import Claim, Finding, curves, decide, differences, every, spread, write
from .models import clone, evaluate, pair_batches, train

CLAIMS = (
    Claim(
        "bnf_no_collapse", "BNF", "§2.1, §3.2",
        "On nearly identical pairs the sum of likelihood losses, up on the chosen and down on the rejected (NLL+PLL), "
        "makes the model collapse (here: chosen responses lose more than one nat per token), while BNF does not.",
    ),
    Claim(
        "bnf_dpo_chosen", "BNF", "§2.3",
        "On nearly identical pairs DPO lowers the likelihood of the chosen response.",
    ),
    Claim(
        "bnf_keeps_reasoning", "BNF", "§2.3, §5.1",
        "On pairs of nearly identical solutions BNF preserves the model better than DPO and NLL+PLL do: a higher "
        "likelihood of the right solution, and more sums answered rightly.",
    ),
)  # fmt: skip
METHODS = {"NLL+PLL": "nll_pll", "DPO": "dpo", "BNF": "bnf"}
RATES, BATCH, EPOCHS = (1e-4, 3e-4, 1e-3), 32, 2
LOSS = 1.0  # nats per token; what counts as a collapse


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Two epochs of each method at each learning rate from the same start, measured on held-out sums.

    Args:
        out: folder for tables, pictures and JSON.
        data: not needed.
        seeds: runs of each; they draw the sums, the weights of the start and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    loaded = [load(seed, quick) for seed in range(seeds)]
    chosen: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in RATES} for name in METHODS}
    correct: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in RATES} for name in METHODS}
    before: list[tuple[float, float]] = []
    steps = 2
    for seed, (sums, start) in enumerate(loaded):
        batches = pair_batches(sums.pairs, BATCH, seed)
        steps = 2 if quick else EPOCHS * len(batches)
        count = (sums.test["labels"][: len(sums.test["labels"]) // 2] >= 0).sum(1).double().mean().item()
        before.append((evaluate(start, sums.test).chosen / count, right(start, sums.test)))
        for name, objective in METHODS.items():
            for rate in RATES:
                model = clone(start)
                label = f"{name} at {rate:g}, seed {seed}" if progress else None
                train(model, batches, objective, ref_model=start, lr=rate, steps=steps, progress=label)
                chosen[name][rate].append(evaluate(model, sums.test).chosen / count)
                correct[name][rate].append(right(model, sums.test))
    changes = {
        name: {rate: [x - b for x, (b, _) in zip(values, before)] for rate, values in places.items()}
        for name, places in chosen.items()
    }
    header = ["", "learning rate", "log p per token of chosen", "its change", "sums answered rightly"]
    rows = [header, ["start", "", spread([b for b, _ in before]), "", spread([r for _, r in before])]]
    for name in METHODS:
        for rate in RATES:
            values = (chosen[name][rate], changes[name][rate], correct[name][rate])
            rows.append([name, f"{rate:g}", *(spread(x, sign=x is values[1]) for x in values)])
    settings = {
        **described(loaded[0][0]), "seeds": seeds, "batch": f"{BATCH} pairs", "steps": steps,
        "learning rates": RATES, "rule for the learning rate": "none picked: a claim has to hold at each of them",
        "methods": METHODS, "options": "defaults (DPO: β = 0.1)", "reference": "the start", "collapse": f"{LOSS} nat",
    }  # fmt: skip
    collapse = {
        rate: every(
            [decide([-x - LOSS for x in changes["NLL+PLL"][rate]]), decide([x + LOSS for x in changes["BNF"][rate]])]
        )
        for rate in RATES
    }
    falls = {rate: decide([-x for x in changes["DPO"][rate]]) for rate in RATES}
    keeps = {
        rate: every(
            [
                decide(differences(found["BNF"][rate], found[other][rate]))
                for found in (changes, correct)
                for other in ("DPO", "NLL+PLL")
            ]
        )
        for rate in RATES
    }
    told = ((changes, ("NLL+PLL", "BNF")), (changes, ("DPO",)), (correct, ("BNF", "DPO", "NLL+PLL")))
    findings = []
    for claim, (found, names), verdicts in zip(CLAIMS, told, (collapse, falls, keeps)):
        parts = [
            f"at {rate:g} {', '.join(f'{name} {spread(found[name][rate], 2, found is changes)}' for name in names)} "
            f"({verdicts[rate]})"
            for rate in RATES
        ]
        what = "Change of the chosen's log-likelihood per token" if found is changes else "Sums answered rightly"
        finding = Finding(claim, every([*verdicts.values()]), f"{what}: {'; '.join(parts)}.", rows, settings)
        panels = {"change of log p per token of chosen": changes, "sums answered rightly": correct}
        write(finding, out, curves(panels, "learning rate", log=True))
        findings.append(finding)
    return findings
