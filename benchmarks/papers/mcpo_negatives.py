"""More than one rejected response at a time: MC-PO's Table 3 on the generated task of `answers`.

5 candidates ──M = 1, 2, 3 drawn by the kernel (MC-PO) or at random (RNCE)──▶ policies, judged by exact expected reward
"""

from __future__ import annotations

from pathlib import Path

from .answers import Method, compare, picture, table
from .claim import Claim, Finding, decide, differences, every, spread, write
from .mcpo_samplers import ranked, recorded_settings

CLAIMS = (
    Claim(
        "mcpo_negatives",
        "MC-PO",
        "§5.4, Table 3",
        "MC-PO improves as the number M of drawn rejected responses goes from 1 to 2 to 3.",
    ),
    Claim(
        "mcpo_negatives_random",
        "MC-PO",
        "§5.4, Table 3",
        "From M = 1 to M = 3 MC-PO gains more than the same loss with rejected responses drawn at random (RNCE).",
    ),
    Claim(
        "mcpo_rnce",
        "MC-PO",
        "§5.4, Table 3",
        "At each M of 1, 2 and 3 MC-PO is better than the same loss with rejected responses drawn at random (RNCE).",
    ),
)
NAMES = {"mc": "MC-PO", "random": "RNCE"}
COUNTS = (1, 2, 3)


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train with each number of rejected responses; write tables and pictures.

    Args: as `swepo_weighting.run`.
    """
    methods = {
        f"{name}, M = {m}": (Method("mc_po", {"sampler": sampler, "m": m}), ranked)
        for sampler, name in NAMES.items()
        for m in COUNTS
    }
    found = compare(methods, seeds=seeds, quick=quick, progress=progress)

    def gap(a: str, b: str) -> list[float]:
        return differences(found[a].final, found[b].final)

    gains = {name: gap(f"{name}, M = 3", f"{name}, M = 1") for name in NAMES.values()}
    steps = {f"M = {m + 1} less M = {m}": gap(f"MC-PO, M = {m + 1}", f"MC-PO, M = {m}") for m in COUNTS[:-1]}
    more = {"MC-PO's gain less RNCE's": differences(gains["MC-PO"], gains["RNCE"])}
    ahead = {f"MC-PO less RNCE, M = {m}": gap(f"MC-PO, M = {m}", f"RNCE, M = {m}") for m in COUNTS}
    findings = []
    for claim, gaps in zip(CLAIMS, (steps, more, ahead)):
        number = "; ".join(f"{name}: {spread(values, sign=True)}" for name, values in gaps.items())
        if gaps is more:
            number += "".join(f"; {name}, M = 3 less M = 1: {spread(x, sign=True)}" for name, x in gains.items())
        verdict = every([decide(values) for values in gaps.values()])
        recorded = recorded_settings(seeds, beta=0.1, candidates=5)
        number = f"Expected reward at the end. {number}."
        findings.append(Finding(claim, verdict, number, table(found), recorded))
        write(findings[-1], out, picture(found, "MC-PO and RNCE with M rejected responses"))
    return findings
