"""How much a policy depends on which response was taken as the rejected one: SWEPO's Table 2.

    one reference, one set of answers ──six choices of DPO's rejected answer; six orders of the prompts──▶ six policies

SWEPO takes all answers, so only the order is left to vary; DPO is also trained with the order held fixed.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev, variance

from matplotlib.figure import Figure

from .answers import Method, align, best_rate, make_world, say, settings
from .claim import Claim, Finding, decide, differences, spread, write
from .swepo_weighting import METHODS, TILTS, groups_of_four

CLAIMS = (
    Claim(
        "swepo_variance",
        "SWEPO",
        "Table 2",
        "Over random choices of the rejected response DPO's result varies more than that of SWEPO, which takes all "
        "responses.",
    ),
)
CHOICES = 6
RUNS: dict[str, tuple[Method, bool]] = {  # method, and whether the order of the prompts varies too
    "DPO, choice and order": (METHODS["DPO, best and random"], True),
    "DPO, choice alone": (METHODS["DPO, best and random"], False),
    "SWEPO, p = 1, order": (METHODS["SWEPO, p = 1"], True),
}


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train each method several times from each reference; compare the spread of the exact expected rewards.

    Args: as `swepo_weighting.run`.
    """
    rates: dict[str, float] = {}
    for name, (method, _) in RUNS.items():
        known = next((rates[other] for other in rates if RUNS[other][0] is method), None)
        rates[name] = known or best_rate(method, groups_of_four, quick, name if progress else None)
    rewards: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    for seed in range(seeds):
        world = make_world(seed, quick)
        groups = groups_of_four(world, seed)
        for name, (method, reorder) in RUNS.items():
            rewards[name].append([])
            for choice in range(2 if quick else CHOICES):
                say(progress, f"{name}: seed {seed + 1}/{seeds}, choice {choice + 1}")
                order = 100 * seed + (choice if reorder else 0)
                path, _model = align(
                    world, method, groups, rate=rates[name], seed=order, choice=100 * seed + choice, points=1
                )
                rewards[name][-1].append(path[-1].reward)
    say(progress, "")
    spreads = {name: [stdev(of_seed) for of_seed in values] for name, values in rewards.items()}
    dpo, swepo = spreads["DPO, choice and order"], spreads["SWEPO, p = 1, order"]
    gap = differences(dpo, swepo)
    number = (
        f"Standard deviation of the expected reward, DPO {spread(dpo)}, SWEPO (p = 1) {spread(swepo)}; "
        f"DPO less SWEPO {spread(gap, sign=True)}."
    )
    rows = [["method", "learning rate", "expected reward", "variance", *(f"sd, seed {i + 1}" for i in range(seeds))]]
    for name, values in rewards.items():
        mean = spread([fmean(of_seed) for of_seed in values])
        var = fmean(variance(of_seed) for of_seed in values)
        rows.append([name, f"{rates[name]:g}", mean, f"{var:.3g}", *(f"{sd:.3g}" for sd in spreads[name])])
    recorded = settings(
        answers=f"4 to a prompt, drawn from the reference tilted by exp(c · reward), c = {list(TILTS)}",
        rewards="true ones plus noise of sd 1",
        choices=CHOICES,
        beta=0.1,
        seeds=seeds,
    )
    finding = Finding(CLAIMS[0], decide(gap), number, rows, recorded)
    write(finding, out, _figure(rewards))
    return [finding]


def _figure(rewards: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, values in enumerate(rewards.values()):
        for seed, of_seed in enumerate(values):
            centred = [value - fmean(of_seed) for value in of_seed]
            axes.scatter(centred, [number + 0.15 * (seed - (len(values) - 1) / 2)] * len(centred), color=f"C{number}")
    axes.set(xlabel="expected reward less the mean of its seed; a line per seed", yticks=range(len(rewards)))
    axes.set_yticklabels(list(rewards))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return figure
