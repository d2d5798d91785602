"""What the engine has to know of an objective, and the table of all of them; weighted sums of them.

Dimensions: B responses, U units (responses, pairs or groups), G groups, K responses of a group.
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.layout import Responses, pairs

COUPLES = ("token", "pair", "group", "batch")
UNITS = ("response", "pair", "group")
REFS = (None, "sums", "tokens")
RESERVED = {
    "hidden",
    "head",
    "target",
    "objective",
    "label",
    "ref",
    "group_size",
    "rewards",
    "cu_seqlens",
    "ignore_index",
    "reduction",
    "return_metrics",
    "impl",
    "engine",
    "grad_tolerance",
    "sort_vocab",
    "workspace",
}


class Objective(NamedTuple):
    """A loss as a function of token scores, with what it needs.

    Attributes:
        name: key in `OBJECTIVES`; of a weighted sum, its terms as `resolve` reads them.
        function: `Responses`, then keyword options → one value per unit, [U].
        couples: what has to be scored before a token's coefficient is known. "token": the value is a sum of terms
            that each depend on one token (times constants such as 1/|y|), so values of parts add up; "pair": responses
            i and i + B/2 belong together; "group": K consecutive responses do; "batch": anything.
        unit: "response", "pair" or "group", what one value belongs to.
        ref: None, "sums" (Σ log π_ref per response is enough) or "tokens" (per-token scores).
        label: whether it needs the label of each response.
        rewards: whether it needs the reward of each response.
        entropy: whether `other_entropy` has to be computed.
        entropy_grad: whether the value depends on it differentiably.
        terms: for couples="token", where a kernel has the loss of one token itself: (tokens of each response, labels or
            None, options) → its name in `rgpb.kernels.triton_rows.TOKEN_LOSSES` and each response's factor, [B]; None
            where the kernel can't serve the options.
        draw: for an objective that looks at some of a group's responses only: (responses, options) → which, bool [B],
            from scores without gradient. The others are then left out before anything is differentiated. With an option
            `m`: the first and M others.
        running: names of options that may hold a `RunningMean`; `rgpb train` keeps one for each.
        mismatched: names of options that take Δ of completions behind prompts they don't belong to; `rgpb train` makes
            them.
        options: the function's keyword options and their defaults; None for a function that isn't registered, whose
            options aren't checked.
    """

    name: str
    function: Callable[..., Tensor]
    couples: str = "batch"
    unit: str = "response"
    ref: str | None = None
    label: bool = False
    rewards: bool = False
    entropy: bool = False
    entropy_grad: bool = False
    terms: Callable[..., tuple[str, Tensor] | None] | None = None
    draw: Callable[..., Tensor] | None = None
    running: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    options: dict[str, Any] | None = None


TERM = re.compile(r"(?P<signs>[+-]{0,2})(?:(?P<factor>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*)?(?P<name>[^\W\d]\w*)")
OBJECTIVES: dict[str, Objective] = {}
SUMS: dict[str, Objective] = {}  # those in use, by name


def objective(
    name: str | Callable[..., Tensor] | None = None,
    *,
    couples: str = "batch",
    unit: str | None = None,
    ref: str | None = None,
    label: bool = False,
    rewards: bool = False,
    entropy: bool = False,
    entropy_grad: bool = False,
    terms: Callable[..., tuple[str, Tensor] | None] | None = None,
    draw: Callable[..., Tensor] | None = None,
    running: tuple[str, ...] = (),
    mismatched: tuple[str, ...] = (),
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of `Responses` as an objective; the function itself is returned unchanged.

    Args:
        name: default: the function's own name. Registering one of your own again (a notebook cell) replaces it.
        unit: default: "pair" or "group" for `couples` of that name, else "response".
        couples, ref, label, rewards, entropy, entropy_grad, terms, draw, running, mismatched: see `Objective`.

    Raises:
        ValueError: a name that is taken or isn't an identifier, an unknown value of `couples`, `unit` or `ref`, two
            that don't go together, or an option that `fused_loss` has already.
    """
    if callable(name):  # @objective without parentheses
        return objective()(name)  # type: ignore[return-value]
    for argument, value, expected in (
        ("couples", couples, COUPLES),
        ("unit", unit, (None, *UNITS)),
        ("ref", ref, REFS),
    ):
        if value not in expected:
            raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")
    kind = unit or (couples if couples in UNITS else "response")
    if couples in UNITS and kind != couples:
        raise ValueError(f"unit: expected {couples!r} with couples={couples!r}, got {kind!r}")
    if couples == "token" and ref == "sums":
        raise ValueError("ref: expected 'tokens' or None with couples='token', since parts have to add up; got 'sums'")
    if kind != "group" and (rewards or draw is not None):
        raise ValueError(f"unit: expected 'group' with rewards or draw, got {kind!r}")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        key = name or getattr(function, "__name__", None)
        if key is None:
            raise ValueError(f"name: expected one for a function without, {type(function).__name__}; got None")
        known = OBJECTIVES.get(key)
        if known is not None and known.function.__module__.startswith("rgpb.") and known.function is not function:
            raise ValueError(f"name: expected a name that isn't taken, got {key!r}")
        if name is not None and not key.isidentifier():
            raise ValueError(f"name: expected an identifier, got {key!r}")
        parameters = list(inspect.signature(function).parameters.values())[1:]
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
            raise ValueError(f"options: expected each by its name, got *args or **keywords of {key}")
        options = {p.name: p.default for p in parameters}
        taken = sorted(set(options) & RESERVED)
        if taken:
            raise ValueError(f"options: expected names that `fused_loss` doesn't have, got {taken}")
        SUMS.clear()
        OBJECTIVES[key] = Objective(
            key, function, couples, kind, ref, label, rewards, entropy or entropy_grad, entropy_grad, terms, draw,
            running, mismatched, options,
        )  # fmt: skip
        return function

    return register


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
        if objective in OBJECTIVES:
            return OBJECTIVES[objective]
        if any(sign in objective for sign in "+-*"):
            return SUMS.get(objective) or weighted_sum(parse_sum(objective))
        raise ValueError(f"objective: expected a function or one of {sorted(OBJECTIVES)}, got {objective!r}")
    if not callable(objective):
        raise ValueError(f"objective: expected a name or a function of Responses, got {type(objective).__name__}")
    for known in OBJECTIVES.values():
        if known.function is objective:
            return known
    return Objective(getattr(objective, "__name__", "objective"), objective)


def is_registered(spec: Objective) -> bool:
    """Whether its name says it all: one of `OBJECTIVES`, or a sum of them."""
    return OBJECTIVES.get(spec.name) is spec or SUMS.get(spec.name) is spec


def check_options(spec: Objective, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with numbers of the type of their defaults.

    Raises:
        ValueError: an option that the objective doesn't have, or a value of another type, or not finite.
    """
    if spec.options is None:
        return dict(options)
    unknown = [name for name in options if name not in spec.options]
    if unknown:
        raise ValueError(f"options of {spec.name}: expected a subset of {sorted(spec.options)}, got {unknown}")
    checked = {}
    for name, value in options.items():
        kind = type(spec.options[name])
        if kind in (int, float):
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            number = number and -math.inf < value < math.inf
            if not number or kind(value) != value:
                wanted = "a whole number" if kind is int else "a finite number"
                raise ValueError(f"options of {spec.name}: expected {name} to be {wanted}, got {value!r}")
            value = kind(value)
        elif kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"options of {spec.name}: expected {name} to be a {kind.__name__}, got {value!r}")
        checked[name] = value
    return checked


def drawn(spec: Objective, responses: Responses, options: dict[str, Any]) -> Tensor:
    """Which responses the objective looks at. bool [B]

    Raises:
        ValueError: its `draw` gives something else.
    """
    assert spec.draw is not None
    keep = spec.draw(responses, options)
    expected = responses.present.shape
    if not isinstance(keep, Tensor) or keep.shape != expected or keep.dtype != torch.bool:
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"draw: expected bool {list(expected)} of {spec.name}, got {got}")
    return keep


def option(options: dict[str, Any], name: str) -> Any:
    """What was given for an option; `term.option` of a sum also by `option` alone. None where nothing was."""
    return options.get(name, options.get(name.rpartition(".")[2]))


def units(spec: Objective, responses: int, group_size: int | None) -> int:
    """How many values the objective has of that many responses."""
    return responses // {"response": 1, "pair": 2, "group": group_size or 1}[spec.unit]


def unit_values(spec: Objective, responses: Responses, options: dict[str, Any]) -> Tensor:
    """The objective's values [U], exactly 0 (and without gradient) for units that have no token.

    Raises:
        ValueError: the function doesn't return one value per response, pair or group.
    """
    values = spec.function(responses, **options)
    count = responses.layout.tokens
    counts = {"response": count}
    if len(count) % 2 == 0:
        chosen, rejected = pairs(count)
        counts["pair"] = chosen + rejected
    if responses.group_size is not None:
        counts["group"] = responses.groups(count).sum(1)
    if spec.options is not None:
        counts = {spec.unit: counts[spec.unit]}
    of = {tuple(c.shape): c for c in counts.values()}
    if not isinstance(values, Tensor) or tuple(values.shape) not in of:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"objective: expected {spec.name} to return {' or '.join(map(str, of))} values, got {shape}")
    return torch.where(of[tuple(values.shape)] > 0, values, 0.0)


# -- weighted sums ----------------------------------------------------------------------------------------------------


def parse_sum(text: str) -> dict[str, float]:
    """ "mle + 0.5*dpo" → {"mle": 1.0, "dpo": 0.5}.

    Raises:
        ValueError: a term that isn't a name or number*name, or a name that comes twice.
    """
    terms: dict[str, float] = {}
    rest = text.replace(" ", "")
    while rest:
        term = TERM.match(rest)
        if term is None or term["name"] not in OBJECTIVES or (terms and not term["signs"]):
            raise ValueError(
                f"objective: expected terms such as mle or 0.5*dpo, of {sorted(OBJECTIVES)}, got {rest!r} in {text!r}"
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

    Raises:
        ValueError: no terms, an unknown name, a weight that isn't a finite number, pairs or labels beside groups, or
            something beside an objective that draws responses (mc_po).
    """
    if not weights:
        raise ValueError("objective: expected at least one name and its weight, got none")
    parts: list[tuple[Objective, float]] = []
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise ValueError(f"objective: expected names of {sorted(OBJECTIVES)}, got {name!r}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 1e300:
            raise ValueError(f"objective: expected a finite number as weight of {name}, got {weight!r}")
        parts.append((OBJECTIVES[name], float(weight)))
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
    options: dict[str, Any] = {}
    for spec in reversed(specs):
        options.update({f"{spec.name}.{name}": default for name, default in (spec.options or {}).items()})
        options.update(spec.options or {})
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
        options=options,
    )  # fmt: skip
    SUMS[key] = made
    return made


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


def best(responses: Responses) -> Tensor:
    """Place in its group of the response with the highest reward, the first of several; 0 without rewards. int64 [G]"""
    present = responses.groups(responses.present)
    if responses.rewards is None:
        return torch.zeros_like(present[:, 0], dtype=torch.int64)
    rewards = responses.groups(responses.rewards).masked_fill(~present, -torch.inf)
    return (rewards == rewards.amax(1, keepdim=True)).int().argmax(1)


def reward_scale(spec: Objective, options: dict[str, Any]) -> Any:
    """β of the implicit reward β (S − R): the objective's own, or that of a sum's first term with one; else 1."""
    for name in parse_sum(spec.name) if spec.name in SUMS else ():
        term = OBJECTIVES[name]
        if term.ref is not None and "beta" in (term.options or {}):
            return options.get(f"{name}.beta", options.get("beta", (term.options or {})["beta"]))
    return {**(spec.options or {}), **options}.get("beta", 1.0)
