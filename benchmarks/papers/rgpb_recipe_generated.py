"""As `rgpb_recipe`, on generated dialogues whose preference a small model can learn (Tuan & Wang 2024, §6.4)."""

from __future__ import annotations

from pathlib import Path

from .claim import Claim, Finding
from .rgpb_recipe import CLAIMS as ON_HH_RLHF
from .rgpb_recipe import recipe
from .rgpb_small_difference import prepare

CLAIMS = tuple(
    Claim(c.name + "_generated", c.paper, c.where, f"{c.text} (Here on generated dialogues.)") for c in ON_HH_RLHF
)


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Five epochs of the first loss, five of the second, on the pairs of `rgpb_large_generated`.

    Args:
        out: folder for tables, pictures and JSON.
        data: not needed.
        seeds: runs of each; they draw the weights, the dialogues and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    return recipe(CLAIMS, out, *prepare(seeds, quick, progress, large=True), progress)
