"""The table, `claims.tsv`: a claim in each row, the world and the trial in which it is tried, and where it holds.

"Holds where" lists parts, all of which have to hold: `quantity: more > less by 1`, or `quantity ~ -0.5, floor` for a
slope (`judge`). " / " stands between alternatives, each of which has to hold; 0 is zero; @ is " at " and a learning
rate, each of those listed. What is "told beside" decides nothing.

`smollm2.tsv` has the claims that are tried on a real model as well, with a text where that differs.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from . import on_groups, on_pairs, policies, worlds
from .judge import Above, Part, Slope, Values

PAPERS = {"RGPB": "Tuan & Wang 2024", "BNF": "BNF (ICLR 2025)", "SWEPO": "SWEPO", "MC-PO": "MC-PO"}
_WORLDS = (
    worlds.cue_in_prompt, worlds.hh_rlhf, worlds.cue_in_answer, worlds.sums, policies.backwards, worlds.alpaca_eval,
    on_groups.distribution,
)  # fmt: skip
_TRIALS = (
    on_pairs.four_losses, on_pairs.two_stages, on_pairs.coefficients, on_pairs.each_rate, on_pairs.without_partners,
    on_pairs.how_far, on_groups.group_losses, on_groups.order_of_answers, on_groups.six_choices, on_groups.bias,
    on_groups.samplers, on_groups.switched_copy, on_groups.negatives,
)  # fmt: skip
WORLDS: dict[str, Callable[..., worlds.World]] = {world.__name__: world for world in _WORLDS}
TRIALS: dict[str, Callable[..., tuple[Values, dict[str, Any]]]] = {trial.__name__: trial for trial in _TRIALS}


class Claim(NamedTuple):
    """A row of the table; `paper` is a key of `PAPERS`, `world` of `WORLDS`, `trial` of `TRIALS`."""

    name: str
    paper: str
    place: str
    world: str
    trial: str
    text: str
    parts: list[Part]
    beside: list[Part]


def parse(text: str, at: str = "") -> list[Part]:
    """The parts in a cell of the table, under a learning rate or none.

    Raises:
        ValueError: neither `quantity: more > less` nor `quantity ~ slope`.
    """
    parts: list[Part] = []
    for part in text.replace("@", f" at {at}").split("; ") if text else []:
        quantities, colon, rest = part.partition(": ")
        more, above, less = rest.partition(" > ")
        if above:
            less, _, by = less.partition(" by ")
            sides = [["" if name == "0" else name for name in side.split(" / ")] for side in (more, less)]
            every = product(quantities.split(" / "), *sides)
            parts += [Above(quantity, a, b, float(Fraction(by or "0")), at) for quantity, a, b in every]
        elif " ~ " in part and not colon:
            quantity, _, slope = part.partition(" ~ ")
            expected, _, floor = slope.partition(", ")
            parts.append(Slope(quantity, float(expected), floor))
        else:
            raise ValueError(f"claims.tsv: expected 'quantity: more > less' or 'quantity ~ slope', got {part!r}")
    return parts


def _rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()[1:]]


CLAIMS = tuple(
    Claim(name, paper, place, world, trial, text,
          [part for at in rates.split() or [""] for part in parse(where, at)], parse(beside))
    for name, paper, place, world, trial, rates, text, where, beside in _rows("claims.tsv")
)  # fmt: skip


class OnReal(NamedTuple):
    """How a claim is tried on the real model: its text, "" where that is the claim's own, and what has to hold."""

    text: str
    parts: list[Part]
    beside: list[Part]


ON_REAL = {name: OnReal(text, parse(where), parse(beside)) for name, text, where, beside in _rows("smollm2.tsv")}
