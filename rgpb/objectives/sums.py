"""Weighted sums of objectives, and what a caller's `objective=` means.

Dimensions: B responses, U units (responses, pairs or groups).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.groups import best
from rgpb.objectives.registry import (
    COUPLES,
    GUESTS,
    OBJECTIVES,
    REFS,
    SUMS,
    UNITS,
    Objective,
    Option,
    find,
    is_built_in,
    suggest,
    unit_values,
)

TERM = re.compile(r"(?P<signs>[+-]{0,2})(?:(?P<factor>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*)?(?P<name>[^\W\d]\w*)")


def resolve(objective: str | Callable[..., Tensor] | Mapping[str, float]) -> Objective:
    """The objective that is meant.

    Args:
        objective: a registered name or function; a weighted sum, as a mapping name → weight or a string such as
            "mle + 0.5*dpo"; or any other function of `Responses`, which may couple the whole batch.

    Raises:
        ValueError: an unknown name, weights that aren't finite numbers, or terms that don't go together.
    """
    if isinstance(objective, Mapping):
        return weighted_sum(objective)
    if isinstance(objective, str):
        if (named := find(objective)) is not None:
            return named
        if any(sign in objective for sign in "+-*"):
            return SUMS.get(objective) or weighted_sum(parse_sum(objective))
        raise ValueError(
            f"objective: expected a function or one of {sorted(OBJECTIVES)}, got {objective!r}"
            f"{suggest(objective, OBJECTIVES)}"
        )
    if not callable(objective):
        raise ValueError(f"objective: expected a name or a function of Responses, got {type(objective).__name__}")
    for known in (*OBJECTIVES.values(), *GUESTS.values()):
        if known.function is objective:
            return known
    return Objective(getattr(objective, "__name__", "objective"), objective)


def parse_sum(text: str) -> dict[str, float]:
    """ "mle + 0.5*dpo" → {"mle": 1.0, "dpo": 0.5}.

    Raises:
        ValueError: a term that isn't a name or number*name, or a name that comes twice.
    """
    terms: dict[str, float] = {}
    rest = text.replace(" ", "")
    while rest:
        term = TERM.match(rest)
        if term is None or find(term["name"]) is None or (terms and not term["signs"]):
            raise ValueError(
                f"objective: expected terms such as mle or 0.5*dpo, of {sorted(OBJECTIVES)}, got {rest!r} in {text!r}"
                f"{'' if term is None or find(term['name']) else suggest(term['name'], OBJECTIVES)}"
            )
        if term["name"] in terms:
            raise ValueError(f"objective: expected each name once, got {term['name']!r} twice in {text!r}")
        terms[term["name"]] = float(term["factor"] or 1.0) * (-1.0) ** term["signs"].count("-")
        rest = rest[term.end() :]
    return terms


def weighted_sum(weights: Mapping[str, float]) -> Objective:
    """Σ weight · objective as one objective, at the cost of one sweep over the vocabulary.

    All terms see the same responses. Beside pairs (groups) an objective of single responses that can't tell good from
    bad (mle) is that of the chosen (of the best by reward; without rewards of the first), and one with labels takes the
    chosen for +1 and the rejected for −1, and the mean of both. Beside labels only the responses with +1 count for it.

    An option is written `name.option`; without `name.` it goes to every term that has it.

    A loss of the package has no negative weight: minimising −L rewards the bad examples and penalises the good ones,
    for most of them without bound. An objective of your own may have one, since it can be a quantity to be raised, such
    as an entropy.

    Raises:
        ValueError: no terms, an unknown name, a weight that isn't a finite number or is negative, pairs or labels
            beside groups, or something beside an objective that draws responses (mc_po).
    """
    parts = _parts(weights)
    key = " + ".join(f"{weight!r}*{spec.name}" for spec, weight in parts)
    if key in SUMS:
        return SUMS[key]
    specs = [spec for spec, _ in parts]
    unit = max((spec.unit for spec in specs), key=UNITS.index)
    labelled = [spec.name for spec in specs if spec.label]
    if {"pair", "group"} <= {spec.unit for spec in specs}:
        raise ValueError(f"objective: expected pairs or groups in one sum, got both in {key!r}")
    drawing = [spec.name for spec in specs if spec.draw is not None]
    if drawing and len(specs) > 1:
        raise ValueError(f"objective: expected {drawing[0]} by itself, since it draws what to look at; got {key!r}")
    if unit == "group" and labelled:
        raise ValueError(f"objective: expected no labels beside groups, got {labelled} in {key!r}")
    declared: dict[str, tuple[Option, ...]] = {}
    for spec in specs:
        for name, known in (spec.declared or {}).items():
            declared[f"{spec.name}.{name}"] = known
            declared[name] = declared.get(name, ()) + known
    couples = max((spec.couples for spec in specs), key=COUPLES.index)
    if couples == "token" and unit == "group":
        couples = "group"  # the best response is known of whole groups only

    def function(responses: Responses, **given: Any) -> Tensor:
        total: Tensor | float = 0.0
        for spec, weight in parts:
            own = {o: given[k] for o in spec.options or () for k in (o, f"{spec.name}.{o}") if k in given}
            total = total + weight * _in_units(spec, unit, bool(labelled), responses, own)
        return total  # type: ignore[return-value]

    made = Objective(
        key, function, couples, unit,
        ref=max((spec.ref for spec in specs), key=REFS.index),
        label=unit == "response" and bool(labelled),
        rewards=any(spec.rewards for spec in specs),
        entropy=any(spec.entropy for spec in specs),
        entropy_grad=any(spec.entropy_grad for spec in specs),
        running=tuple(f"{spec.name}.{name}" for spec in specs for name in spec.running),
        mismatched=tuple(f"{spec.name}.{name}" for spec in specs for name in spec.mismatched),
        options={name: known[0].default for name, known in declared.items()},
        declared=declared,
        parts=tuple(parts),
    )  # fmt: skip
    SUMS[key] = made
    return made


def _parts(weights: Mapping[str, float]) -> list[tuple[Objective, float]]:
    """The terms and their weights."""
    if not weights:
        raise ValueError("objective: expected at least one name and its weight, got none")
    parts: list[tuple[Objective, float]] = []
    for name, weight in weights.items():
        spec = find(name)
        if spec is None:
            raise ValueError(
                f"objective: expected names of {sorted(OBJECTIVES)}, got {name!r}{suggest(name, OBJECTIVES)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 1e300:
            raise ValueError(f"objective: expected a finite number as weight of {name}, got {weight!r}")
        if weight < 0 and is_built_in(spec):
            raise ValueError(
                f"objective: expected a weight of 0 or more for {name}, since a negative one rewards the bad examples "
                f"and penalises the good ones, got {weight!r}"
            )
        parts.append((spec, float(weight)))
    return parts


def _in_units(spec: Objective, unit: str, labelled: bool, responses: Responses, options: dict[str, Any]) -> Tensor:
    """Values of one term of a sum, per unit of the sum. [U]"""
    if spec.unit == unit == "response" and labelled and not spec.label and responses.label is not None:
        return torch.where(responses.label > 0, unit_values(spec, responses, options), 0.0)
    if spec.unit == unit:
        return unit_values(spec, responses, options)
    if unit == "group":
        return responses.groups(unit_values(spec, responses, options)).gather(1, best(responses)[:, None])[:, 0]
    if spec.label:
        half = torch.ones(len(responses.layout.tokens) // 2, dtype=torch.float64, device=responses.layout.tokens.device)
        responses = responses._replace(label=torch.cat([half, -half]))
        chosen, rejected = pairs(unit_values(spec, responses, options))
        return (chosen + rejected) / 2
    return pairs(unit_values(spec, responses, options))[0]


def reward_scale(spec: Objective, options: dict[str, Any]) -> Any:
    """β of the implicit reward β (S − R): the objective's own, or that of a sum's first term with one; else 1."""
    for term, _ in spec.parts:
        if term.ref is not None and "beta" in (term.options or {}):
            return options.get(f"{term.name}.beta", options.get("beta", (term.options or {})["beta"]))
    return {**(spec.options or {}), **options}.get("beta", 1.0)
