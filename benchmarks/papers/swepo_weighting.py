"""SWEPO against DPO and InfoNCA, and its weights: Table 1 on the generated task of `answers`.

each prompt: 4 answers with noisy rewards ──DPO pairs | InfoNCA | SWEPO──▶ policies, judged by exact expected reward
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .answers import Groups, Method, Trials, World, compare, draw_groups, picture, settings, table
from .claim import Claim, Finding, decide, differences, every, spread, write

CLAIMS = (
    Claim(
        "swepo_baselines",
        "SWEPO",
        "Table 1",
        "SWEPO weighted by deviation (p = 1, p = 2) gives a better policy than DPO on the best response and a random "
        "or the worst one, and than InfoNCA.",
    ),
    Claim(
        "swepo_weighting",
        "SWEPO",
        "§6.2, Table 1",
        "Weighting the group contrast by the deviation (p = 1) or its square (p = 2) improves on no weighting (p = 0).",
    ),
    Claim(
        "swepo_positives",
        "SWEPO",
        "§6.2, Table 1",
        "Contrasting all responses above the mean with those below is better than the best with all others (p = 0).",
    ),
)
TILTS = (0.0, 0.1, 0.2, 0.3)  # four models of rising quality


def best_and_random(answers: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """The best answer as judged and one of the others. [P, K], [P, K] → [P, 2]."""
    best = rewards.argmax(1, keepdim=True)
    other = torch.multinomial(torch.ones_like(rewards).scatter(1, best, 0.0), 1, generator=generator)
    return answers.gather(1, torch.cat([best, other], 1))


def best_and_worst(answers: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """The best answer as judged and the worst. [P, K], [P, K] → [P, 2]."""
    ends = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)
    return answers.gather(1, ends)


def groups_of_four(world: World, seed: int) -> Groups:
    """Four answers to each prompt."""
    return draw_groups(world, TILTS, seed)


METHODS = {
    "DPO, best and random": Method("dpo", pick=best_and_random),
    "DPO, best and worst": Method("dpo", pick=best_and_worst),
    "DPO, best and each": Method("multi_dpo", {"pairing": "best"}),
    "InfoNCA": Method("infonca"),
    "SWEPO, one against all, p = 0": Method("swepo", {"p": 0, "mode": "one_vs_all"}),
    "SWEPO, p = 0": Method("swepo", {"p": 0}),
    "SWEPO, p = 1": Method("swepo", {"p": 1}),
    "SWEPO, p = 2": Method("swepo", {"p": 2}),
}


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train with every method, write tables and pictures.

    Args:
        out: folder of the results.
        data: not used; the task is generated.
        seeds: references, with their own prompts and answers.
        quick: tiny sizes, for tests.
        progress: whether to show it.
    """
    found = compare(
        {name: (method, groups_of_four) for name, method in METHODS.items()},
        seeds=seeds, quick=quick, progress=progress,
    )  # fmt: skip
    weighted, baselines = ("SWEPO, p = 1", "SWEPO, p = 2"), ("DPO, best and random", "DPO, best and worst", "InfoNCA")
    contests = (
        [(a, b) for a in weighted for b in baselines],
        [(a, "SWEPO, p = 0") for a in weighted],
        [("SWEPO, p = 0", "SWEPO, one against all, p = 0")],
    )
    findings = [_finding(claim, contest, found) for claim, contest in zip(CLAIMS, contests)]
    for finding in findings:
        write(finding, out, picture(found, "SWEPO, DPO and InfoNCA on groups of 4"))
    return findings


def _finding(claim: Claim, contest: list[tuple[str, str]], found: dict[str, Trials]) -> Finding:
    gaps = {(a, b): differences(found[a].final, found[b].final) for a, b in contest}
    number = "; ".join(f"{a} less {b}: {spread(gap, sign=True)}" for (a, b), gap in gaps.items())
    recorded = settings(
        answers=f"4 to a prompt, drawn from the reference tilted by exp(c · reward), c = {list(TILTS)}",
        rewards="true ones plus noise of sd 1",
        beta=0.1,
        alpha=1.0,
        tau=1.0,
        seeds=len(found[contest[0][0]].paths),
    )
    verdict = every([decide(gap) for gap in gaps.values()])
    return Finding(claim, verdict, f"Expected reward at the end. {number}.", table(found), recorded)
