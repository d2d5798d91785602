"""How MC-PO draws its rejected response, and from which candidates: Figure 2 on the generated task of `answers`.

each prompt: 7 answers, ranked ──first preferred, second left out, worst 5, 3 or 1 are candidates──▶ kernel ──▶ policy
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .answers import (
    Groups,
    Method,
    Trials,
    World,
    all_logps,
    by_rank,
    compare,
    draw_groups,
    make_world,
    picture,
    settings,
    table,
)
from .claim import Claim, Finding, decide, differences, every, spread, write

CLAIMS = (
    Claim(
        "mcpo_samplers",
        "MC-PO",
        "§5.3, Figure 2",
        "Drawing the rejected response with probability ∝ e^{βΔ} gives a better policy than taking the candidate with "
        "the highest or lowest βΔ, or any.",
    ),
    Claim(
        "mcpo_min",
        "MC-PO",
        "§5.3, Figure 2",
        "Taking the candidate with the lowest βΔ gives the worst policy of the samplers.",
    ),
    Claim(
        "mcpo_candidates",
        "MC-PO",
        "§5.3, Figure 2",
        "MC-PO gets worse as the better candidates are removed, from five to three to one.",
    ),
)
TILTS = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)  # seven models of rising quality
SAMPLERS = ("mc", "random", "max", "min")
SHARP = 1.0  # the second beta: at 0.1 the kernel's weights are nearly even


def ranked(world: World, seed: int, candidates: int = 5) -> Groups:
    """The best of seven answers as judged, then the worst `candidates` of the five that rank third to seventh."""
    answers, rewards = by_rank(draw_groups(world, TILTS, seed))
    kept = [0, *range(len(TILTS) - candidates, len(TILTS))]
    return Groups(answers[:, kept], rewards[:, kept])


def kernel_weights(
    world: World, model: PreTrainedModel, groups: Groups, beta: float = 0.1, prompts: int = 96
) -> Tensor:
    """With what probability the kernel draws each candidate under a policy, for the first prompts. [prompts, K − 1]"""
    logps = all_logps(model, world.prompts[:prompts])
    ratios = (logps - world.logps[:prompts]).gather(1, groups.answers[:prompts, 1:])
    return (beta * ratios).softmax(1)


def even_candidates(world: World, model: PreTrainedModel, groups: Groups, beta: float) -> float:
    """exp of the mean entropy of the kernel's weights: so many equally likely candidates would have the same."""
    weights = kernel_weights(world, model, groups, beta)
    return math.exp(-float(torch.special.xlogy(weights, weights).sum(1).mean()))


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train with every sampler, and with fewer candidates; write tables and pictures.

    Args: as `swepo_weighting.run`.
    """
    methods: dict[str, tuple[Method, Callable[[World, int], Groups]]] = {}
    for beta in (0.1, SHARP):
        for sampler in SAMPLERS:
            methods[f"{sampler}, 5 candidates, beta {beta:g}"] = (
                Method("mc_po", {"sampler": sampler, "beta": beta}),
                ranked,
            )
    found = compare(methods, seeds=seeds, quick=quick, progress=progress)
    fewer = {f"mc, {n} candidate{'s'[: n > 1]}, beta 0.1": n for n in (3, 1)}
    found |= compare(
        {name: (Method("mc_po"), partial(ranked, candidates=n)) for name, n in fewer.items()},
        seeds=seeds,
        quick=quick,
        progress=progress,
        rates=dict.fromkeys(fewer, found["mc, 5 candidates, beta 0.1"].rate),
    )

    def five(sampler: str, beta: float = 0.1) -> str:
        return f"{sampler}, 5 candidates, beta {beta:g}"

    even = {
        beta: [
            even_candidates(make_world(seed, quick), model, ranked(make_world(seed, quick), seed), beta)
            for seed, model in enumerate(found[five("mc", beta)].models)
        ]
        for beta in (0.1, SHARP)
    }
    contests = (
        [(five("mc"), five(other)) for other in SAMPLERS[1:]],
        [(five(other), five("min")) for other in SAMPLERS[:-1]],
        list(zip([five("mc"), *fewer], fewer)),
    )
    findings = []
    for claim, contest in zip(CLAIMS, contests):
        gaps = [differences(found[a].final, found[b].final) for a, b in contest]
        number = "Expected reward at the end, beta 0.1. " + _said(contest, found)
        if claim.name == "mcpo_samplers":
            number += f" The kernel's weights are like those of {spread(even[0.1])} even candidates of 5."
            sharp = [(five("mc", SHARP), five(other, SHARP)) for other in SAMPLERS[1:]]
            number += f" At beta {SHARP:g} (not part of the verdict): " + _said(sharp, found)
            number += f" {spread(even[SHARP])} even candidates there."
        recorded = recorded_settings(seeds)
        findings.append(Finding(claim, every([decide(gap) for gap in gaps]), number, table(found), recorded))
        write(findings[-1], out, picture(found, "MC-PO: samplers and candidates"))
    return findings


def recorded_settings(seeds: int, **own: object) -> dict[str, object]:
    """What the scripts of MC-PO record."""
    return settings(
        answers="7 to a prompt, drawn from the reference tilted by exp(c · reward), "
        f"c = {list(TILTS)}; by rank: first preferred, second left out, others candidates",
        rewards="true ones plus noise of sd 1, for the ranks",
        seeds=seeds,
        **own,
    )


def _said(contest: list[tuple[str, str]], found: dict[str, Trials]) -> str:
    def short(name: str) -> str:
        sampler, candidates, _ = name.split(", ")
        return sampler if candidates.startswith("5") else f"{sampler} with {candidates}"

    gaps = (
        f"{short(a)} less {short(b)}: {spread(differences(found[a].final, found[b].final), sign=True)}"
        for a, b in contest
    )
    return "; ".join(gaps) + "."
