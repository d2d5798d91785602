"""What the runs on the real model came to: numbers per seed and held-out unit, from the lines that `real` writes."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from .claims import OnReal
from .judge import FAILS, OPEN, Above, Numbers, Part, Told, every

REAL = "smollm2.jsonl"  # a line for each run
SEEDS, RATES = 4, (1e-5, 3e-5, 1e-4)
BETA = 0.1  # of the score that learning rates are chosen by
LIKELIHOOD = ("MLE", "ExMATE", "unlikelihood", "MLE, then ExMATE")  # methods that are there to raise the chosen
OUTER = "part of the tokens in DPO's outer bins"

Line = Mapping[str, Any]
Lines = Mapping[tuple[str, float, int], Line]  # by method, learning rate and seed


def runs_of(folder: Path) -> dict[tuple[str, float, int], dict[str, Any]]:
    """A folder's lines, by method, learning rate and seed."""
    path = folder / REAL
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(its["method"], its["rate"], its["seed"]): its for its in map(json.loads, lines)}


def best_rate(method: str, lines: Lines) -> float | None:
    """The rate with the highest `score`, where all rates were run."""
    runs = {rate: lines[(method, rate, 0)] for rate in RATES if (method, rate, 0) in lines}
    scores = {rate: score(method, run, start_of(run, lines)) for rate, run in runs.items()}
    return max(scores, key=lambda rate: scores[rate]) if len(scores) == len(RATES) else None


def start_of(run: Line, lines: Lines) -> Line:
    """The start's line for a run's kind of units."""
    return lines[("start of pairs" if "own" in run else "start of groups", 0.0, 0)]


def score(method: str, run: Line, start: Line) -> float:
    """What a learning rate is chosen by, on validation units.

    Of `LIKELIHOOD` the gain of the chosen per token; of others how likely the preferences are under Bradley–Terry with
    rewards βΔ, β = `BETA`: the mean of log σ(β (Δ_better − Δ_worse)) over the pairs of a unit.
    """
    shift, its = run["valid"]["shift"], start["valid"]
    if method in LIKELIHOOD:
        return fmean(x / n for x, n in zip(shift[::2], its["tokens"][::2]))
    size, found = start["settings"]["answers"], []
    rewards = its.get("rewards", [1.0, 0.0] * (len(shift) // 2))
    for at in range(0, len(shift), size):
        unit = list(zip(rewards[at : at + size], shift[at : at + size]))
        gaps = [x - y for a, x in unit for b, y in unit if a > b]
        found += [fmean(-math.log1p(math.exp(-BETA * gap)) for gap in gaps)] if gaps else []
    return fmean(found)


def numbers(lines: Lines, seeds: int) -> dict[str, dict[str, list[Any]]]:
    """Quantity → method → a list for each seed, with a number for each held-out unit: each method at its best rate.

    Methods with fewer seeds are left out.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    runs: dict[str, list[Line]] = {}
    for method in dict.fromkeys(name for name, _, _ in lines):
        rate = best_rate(method, lines)
        if rate is not None and all((method, rate, seed) in lines for seed in range(seeds)):
            runs[method] = [lines[(method, rate, seed)] for seed in range(seeds)]
    for method, its in runs.items():
        for one in its:
            for quantity, values in of_units(one, lines).items():
                found.setdefault(quantity, {}).setdefault(method, []).append(values)
    for method, its in runs.items() if "DPO" in runs else ():
        shares = [outer(one["test"]["quantiles"], dpo["test"]["quantiles"]) for one, dpo in zip(its, runs["DPO"])]
        found.setdefault(OUTER, {})[method] = shares
    return found


def of_units(run: Line, lines: Lines) -> dict[str, list[float]]:
    """A run's numbers of each held-out unit, by quantity."""
    return (of_pairs if "own" in run else of_groups)(run, start_of(run, lines))


class Outcome(NamedTuple):
    """A claim's verdict, its numbers and those beside. What decides it has `seeds` to `most` seeds, 0 without runs."""

    verdict: str = ""
    told: Sequence[Told] = ()
    beside: Sequence[Told] = ()
    seeds: int = 0
    most: int = 0


def outcome(claim: OnReal, lines: Lines) -> Outcome:
    """The verdict on a claim, each part with as many seeds as its methods have, at least two; `lines` as of `runs_of`.

    A claim that fails in one part fails, also before the runs of the others are there.
    """
    most = 1 + max((seed for _, _, seed in lines), default=0)
    values = {seeds: numbers(lines, seeds) for seeds in range(most, 1, -1)}

    def told(parts: Sequence[Part]) -> list[tuple[int, Told]]:
        known = [(next((k for k in values if _known(part, values[k])), 0), part) for part in parts]
        return [(k, part.judge(values[k])) for k, part in known if k]

    its, beside = told(claim.parts), [one for _, one in told(claim.beside)]
    verdict = every([one.verdict for _, one in its]) if its else OPEN
    if not its or (len(its) < len(claim.parts) and verdict != FAILS):
        return Outcome()
    decisive = [seeds for seeds, one in its if one.verdict == verdict]
    return Outcome(verdict, [one for _, one in its], beside, min(decisive), max(decisive))


def _known(part: Part, values: Numbers) -> bool:
    """Whether the runs of a part are there."""
    wanted = {part.more, part.less} - {""} if isinstance(part, Above) else set()
    return wanted <= set(values.get(part.quantity, ()))


def of_pairs(run: Line, start: Line) -> dict[str, list[float]]:
    """Of each held-out pair, and of each answer of the start's own."""
    (logp, n), shift = (start["test"][name] for name in ("logp", "tokens")), run["test"]["shift"]
    per_token = [x / k for x, k in zip(shift, n)]
    after = [(x + y) / k for x, y, k in zip(logp, shift, n)]
    own, tokens = run["own"], start["own"]["tokens"]
    return {
        "change of log p of chosen": shift[::2],
        "change of log p of rejected": shift[1::2],
        "change of log p per token of chosen": per_token[::2],
        "change of log p per token of rejected": per_token[1::2],
        "margin of Δ per token": [a - b for a, b in zip(per_token[::2], per_token[1::2])],
        "accuracy by Δ per token": [_above(a, b) for a, b in zip(per_token[::2], per_token[1::2])],
        "accuracy by likelihood per token": [_above(a, b) for a, b in zip(after[::2], after[1::2])],
        "log perplexity": [-x for x in after[::2]],
        "agility": [math.exp(a) - math.exp(b) for a, b in zip(after[::2], after[1::2])],
        "abs. shift of log p per answer": [abs(x) for x in own["shift"]],
        "abs. shift of log p per token": [abs(x) / k for x, k in zip(own["shift"], tokens)],
        "abs. logit shift per answer": [x * k for x, k in zip(own["logit"], tokens)],
        "abs. logit shift per token": own["logit"],
        "Gini coefficient of logit shifts": own["gini"],
    }


def of_groups(run: Line, start: Line) -> dict[str, list[float]]:
    """Of each held-out group."""
    shift, rewards = run["test"]["shift"], start["test"]["rewards"]
    size = start["settings"]["answers"]
    order, first = [], []
    for at in range(0, len(shift), size):
        delta, its = shift[at : at + size], rewards[at : at + size]
        better = [(a, b) for a in range(size) for b in range(size) if its[a] > its[b]]
        order.append(sum(_above(delta[a], delta[b]) for a, b in better) / len(better) if better else 0.5)
        first.append(its[max(range(size), key=lambda k: delta[k])])
    return {"accuracy of the order": order, "reward of the answer with the highest Δ": first}


def outer(its: Sequence[float], of: Sequence[float]) -> float:
    """Part of the tokens in the outer two of the ten bins that `of` fills equally, from 101 quantiles of both."""
    tenth = (len(of) - 1) // 10
    return _share_below(its, of[tenth]) + 1 - _share_below(its, of[-1 - tenth])


def _share_below(quantiles: Sequence[float], x: float) -> float:
    """Part of a distribution below x, between its quantiles in a straight line."""
    if x <= quantiles[0]:
        return 0.0
    for k, (low, high) in enumerate(pairwise(quantiles)):
        if x <= high:
            return (k + (x - low) / (high - low)) / (len(quantiles) - 1)
    return 1.0


def _above(a: float, b: float) -> float:
    """1, 0, or ½ where they are equal."""
    return 0.5 if a == b else float(a > b)
