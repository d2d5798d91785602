"""A candidate that is the preferred response with two tokens switched: MC-PO's Table 2 on the task of `answers`.

    preferred ──two of its symbols switched──▶ a sixth candidate ──DPO on it | on any | MC kernel──▶ policies

On text such a candidate is close to the preferred response without being a good contrast to it. Here the order of the
symbols matters, so the switched answer is also a worse one: the settings give its mean true reward.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from .answers import (
    ANSWERS,
    LENGTH,
    SYMBOLS,
    Groups,
    Method,
    World,
    compare,
    make_world,
    picture,
    table,
    true_rewards,
)
from .claim import Claim, Finding, decide, differences, every, spread, write
from .mcpo_samplers import kernel_weights, ranked, recorded_settings

CLAIMS = (
    Claim(
        "mcpo_noise",
        "MC-PO",
        "§5.4, Table 2",
        "With a switched copy of the preferred response among the candidates MC-PO gives a better policy than DPO on a "
        "candidate drawn at random, and loses less than it by the injection.",
    ),
    Claim(
        "mcpo_noise_pairs",
        "MC-PO",
        "§5.4, Table 2",
        "DPO with the switched copy as the rejected response degenerates: worse than with a random candidate, and than "
        "the model that it started from.",
    ),
    Claim(
        "mcpo_noise_share",
        "MC-PO",
        "§5.4",
        "The kernel avoids the switched copy: under the trained policy its share of the draws is below one in six.",
    ),
)
BETA = 0.1


def switch(answers: Tensor, generator: torch.Generator) -> Tensor:
    """Each answer with two different symbols of it exchanged, a random such pair. Indices into `ANSWERS`, [P] → [P].

    An answer of one symbol only stays as it is.
    """
    symbols = ANSWERS[answers]
    first, second = torch.combinations(torch.arange(LENGTH)).unbind(1)
    differ = symbols[:, first] != symbols[:, second]
    weights = torch.where(differ.any(1, keepdim=True), differ.double(), 1.0)
    pair = torch.multinomial(weights, 1, generator=generator)[:, 0]
    a, b = first[pair][:, None], second[pair][:, None]
    switched = symbols.scatter(1, a, symbols.gather(1, b)).scatter(1, b, symbols.gather(1, a))
    return (switched * SYMBOLS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


def injected(world: World, seed: int) -> Groups:
    """`ranked`, and the preferred answer with two symbols switched as a last candidate. [P, 7]"""
    answers, rewards = ranked(world, seed)
    noise = switch(answers[:, 0], torch.Generator().manual_seed(seed))[:, None]
    rewards_of_noise = true_rewards(world.prompts).gather(1, noise)
    return Groups(torch.cat([answers, noise], 1), torch.cat([rewards, rewards_of_noise], 1))


def first_and_last(answers: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Preferred and switched answer. [P, K] → [P, 2]."""
    return answers[:, [0, -1]]


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train with and without the switched candidate; write tables and pictures.

    Args: as `swepo_weighting.run`.
    """
    mc, some = Method("mc_po", {"beta": BETA}), Method("mc_po", {"beta": BETA, "sampler": "random"})
    methods = {
        "DPO(−), switched": (Method("dpo", {"beta": BETA}, first_and_last), injected),
        "DPO, any of 6": (some, injected),
        "MC-PO of 6": (mc, injected),
        "DPO, any of 5": (some, ranked),
        "MC-PO of 5": (mc, ranked),
    }
    found = compare(methods, seeds=seeds, quick=quick, progress=progress)
    final = {name: trials.final for name, trials in found.items()}
    start = [path[0].reward for path in found["MC-PO of 6"].paths]
    shares, rewards = [], {"preferred": 0.0, "switched": 0.0, "other candidates": 0.0}
    for seed in range(seeds):
        world = make_world(seed, quick)
        groups = injected(world, seed)
        weights = kernel_weights(world, found["MC-PO of 6"].models[seed], groups, BETA)
        shares.append(float(weights[:, -1].mean()))
        true = true_rewards(world.prompts).gather(1, groups.answers).mean(0).tolist()
        for name, value in zip(rewards, (true[0], true[-1], fmean(true[1:-1]))):
            rewards[name] += value / seeds
    gaps = {
        "mcpo_noise": {
            "MC-PO less DPO, both with the switched": differences(final["MC-PO of 6"], final["DPO, any of 6"]),
            "DPO's loss by it less MC-PO's": differences(
                differences(final["DPO, any of 5"], final["DPO, any of 6"]),
                differences(final["MC-PO of 5"], final["MC-PO of 6"]),
            ),
        },
        "mcpo_noise_pairs": {
            "DPO on any less DPO(−)": differences(final["DPO, any of 6"], final["DPO(−), switched"]),
            "reference less DPO(−)": differences(start, final["DPO(−), switched"]),
        },
        "mcpo_noise_share": {"one sixth less the share": [1 / 6 - share for share in shares]},
    }
    findings = []
    for claim in CLAIMS:
        of_claim = gaps[claim.name]
        what = "The switched copy's share of the draws" if claim.name == "mcpo_noise_share" else "Expected reward"
        number = "; ".join(f"{name}: {spread(values, sign=True)}" for name, values in of_claim.items())
        if claim.name == "mcpo_noise_share":
            number += f"; share {spread(shares)}"
        verdict = every([decide(values) for values in of_claim.values()])
        recorded = recorded_settings(
            seeds,
            beta=BETA,
            injected="the preferred answer with two different symbols exchanged, as a sixth candidate",
            true_rewards={name: round(value, 2) for name, value in rewards.items()},
        )
        findings.append(Finding(claim, verdict, f"{what}. {number}.", table(found), recorded))
        write(findings[-1], out, picture(found, "A switched copy of the preferred answer among the candidates"))
    return findings
