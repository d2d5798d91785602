"""As `rgpb_large_difference`, on generated dialogues whose preference a small model can learn (Tuan & Wang 2024, §6.3).

The dialogues of `rgpb_small_difference`, but the rejected response is another answer to the same prompt: one that goes
with another cue.
"""

from __future__ import annotations

from pathlib import Path

from .claim import Claim, Finding, write
from .rgpb_large_difference import CLAIMS as ON_HH_RLHF
from .rgpb_large_difference import judge_dpo, judge_exmate
from .rgpb_small_difference import picture, trained

CLAIMS = tuple(
    Claim(c.name.replace("difference", "generated"), c.paper, c.where, c.text.replace("HH-RLHF", "generated dialogues"))
    for c in ON_HH_RLHF
)


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train each method for five epochs of the pairs from the same start, and compare on held-out pairs.

    Args:
        out: folder for tables, pictures and JSON.
        data: not needed.
        seeds: runs of each; they draw the weights, the dialogues and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    found, settings = trained(seeds, quick, progress, large=True)
    findings = [judge_dpo(CLAIMS[0], found, settings), judge_exmate(CLAIMS[1], found, settings)]
    for finding in findings:
        write(finding, out, picture(found))
    return findings
