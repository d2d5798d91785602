"""BNF where only a part of the preferred responses has a dispreferred partner (BNF, §5.2 and Table 6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from .bnf_sums import Pair, described, load, right
from .claim import Claim, Finding, curves, decide, differences, every, spread, write
from .models import Batch, Measured, clone, evaluate, padded, train

CLAIMS = (
    Claim(
        "bnf_unpaired", "BNF", "§5.2, Table 6",
        "BNF improves over the model it starts from even when no response has a partner (pairing ratio 0 %).",
    ),
    Claim(
        "bnf_pairing_ratio", "BNF", "§5.2, Table 6",
        "The larger the part of the pairs that are whole, the better the result.",
    ),
)  # fmt: skip
RATIOS = (0.0, 0.25, 0.5, 1.0)
RATES, BATCH = (1e-4, 3e-4, 1e-3), 64


def masked(pairs: Sequence[Pair], ratio: float, seed: int) -> list[Batch]:
    """Batches of labelled responses from pairs of which all but a part lost one response, either with probability ½.

    Args:
        pairs: (preferred, dispreferred).
        ratio: part of the pairs that stay whole.
        seed: of which pairs, which response, and the order.
    """
    rng = random.Random(seed)
    order = list(range(len(pairs)))
    rng.shuffle(order)
    whole = set(order[: round(ratio * len(pairs))])
    responses = []
    for i, (preferred, dispreferred) in enumerate(pairs):
        both = [(preferred, True), (dispreferred, False)]
        responses += both if i in whole else [both[rng.random() < 0.5]]
    rng.shuffle(responses)
    parts = [responses[at : at + BATCH] for at in range(0, len(responses), BATCH)]
    return [{**padded([r for r, _ in part]), "label": torch.tensor([label for _, label in part])} for part in parts]


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """One epoch of what is left at each ratio; each ratio takes the rate with the best validation answers.

    Args:
        out: folder for tables, pictures and JSON.
        data: not needed.
        seeds: runs of each; they draw the sums, the start's weights, what is masked, and the order.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    loaded = [load(seed, quick) for seed in range(seeds)]
    before = [(right(start, sums.test), evaluate(start, sums.test)) for sums, start in loaded]
    correct: dict[float, list[float]] = {}
    rows = [["pairing ratio", "responses", "learning rate", "sums answered rightly", "log p of chosen", "of rejected"]]
    rows.append(
        [
            "start",
            "0",
            "",
            spread([x for x, _ in before]),
            *(spread([getattr(m, n) for _, m in before]) for n in ("chosen", "rejected")),
        ]
    )
    chosen_rates = {}
    for ratio in RATIOS:
        results: dict[float, list[tuple[float, float, Measured]]] = {}
        count = 0
        for rate in RATES:
            results[rate] = []
            for seed, (sums, start) in enumerate(loaded):
                batches = masked(sums.pairs, ratio, seed)
                count = sum(len(batch["label"]) for batch in batches)
                steps, model = 2 if quick else len(batches), clone(start)
                label = f"{ratio:.0%} at {rate:g}, seed {seed}" if progress else None
                train(model, batches, "bnf", ref_model=start, lr=rate, steps=steps, progress=label)
                results[rate].append((right(model, sums.valid), right(model, sums.test), evaluate(model, sums.test)))
        best = max(RATES, key=lambda rate: sum(valid for valid, _, _ in results[rate]))
        correct[ratio], chosen_rates[f"{ratio:.0%}"] = [test for _, test, _ in results[best]], best
        rows.append(
            [f"{ratio:.0%}", str(count), f"{best:g}", spread(correct[ratio]),
             *(spread([getattr(m, name) for _, _, m in results[best]]) for name in ("chosen", "rejected"))]
        )  # fmt: skip
    settings = {
        **described(loaded[0][0]), "seeds": seeds, "batch": f"{BATCH} responses", "steps": "one epoch",
        "learning rates": chosen_rates, "reference": "the start",
        "rule for the learning rate": f"for each ratio that of {RATES} with the most validation sums answered rightly",
    }  # fmt: skip
    gain = differences(correct[0.0], [x for x, _ in before])
    rises = [differences(correct[b], correct[a]) for a, b in pairwise(RATIOS)]
    number = f"Part of held-out sums answered rightly with no pairs less that before: {spread(gain, sign=True)}."
    findings = [Finding(CLAIMS[0], decide(gain), number, rows, settings)]
    steps_up = ", ".join(f"{a:.0%} to {b:.0%} {spread(x, 2, True)}" for (a, b), x in zip(pairwise(RATIOS), rises))
    number = f"Change of the part of held-out sums answered rightly: {steps_up}."
    findings.append(Finding(CLAIMS[1], every([decide(x) for x in rises]), number, rows, settings))
    start_line = {ratio: [x for x, _ in before] for ratio in RATIOS}
    for finding in findings:
        write(finding, out, curves({"sums answered rightly": {"BNF": correct, "start": start_line}}, "pairing ratio"))
    return findings
