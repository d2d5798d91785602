"""What the engine has to know of an objective, the table of all of them, and the check of their options.

Dimensions: B responses, U units (responses, pairs or groups).
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import torch
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives.ranges import OneOf, Range

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
    "data_group",
    "sequence_group",
    "ignore_index",
    "temperature",
    "scores",
    "reduction",
    "return_metrics",
    "impl",
    "engine",
    "grad_tolerance",
    "sort_vocab",
    "tolerance_per",
    "path",
    "workspace",
    "validate",
}


class Option(NamedTuple):
    """A keyword option of an objective.

    Attributes:
        name: as it is given.
        default: its value where it isn't given; `inspect.Parameter.empty` where it has to be.
        type: its annotation without ranges; without one, a number's, string's or bool's own, else `Any`.
        classes: those that `type` names; None where it says something else, so that any value is taken.
        ranges: what was declared with the annotation; all of them have to hold.
    """

    name: str
    default: Any
    type: Any
    classes: tuple[type, ...] | None
    ranges: tuple[Range, ...] = ()


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
            None, options) → its name in `rgpb.kernels.triton_rows.TOKEN_LOSSES` and each response's factor, [B].
        draw: for an objective that looks at some of a group's responses only: (responses, options) → which, bool [B],
            from scores without gradient. The others are then left out before anything is differentiated. With an option
            `m`: the first and M others.
        running: names of options that may hold a `RunningMean`; `rgpb train` keeps one for each.
        mismatched: names of options that take Δ of completions behind prompts they don't belong to; `rgpb train` makes
            them.
        options: the function's keyword options and their defaults; None for a function that isn't registered, whose
            options aren't checked.
        declared: what is known of each option; of a sum's option without `term.`, one entry for each term that has it.
        parts: of a weighted sum, its terms and their weights.
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
    terms: Callable[..., tuple[str, Tensor]] | None = None
    draw: Callable[..., Tensor] | None = None
    running: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    options: dict[str, Any] | None = None
    declared: dict[str, tuple[Option, ...]] | None = None
    parts: tuple[tuple[Objective, float], ...] = ()


OBJECTIVES: dict[str, Objective] = {}
GUESTS: dict[str, Objective] = {}  # what another library calls its own: taken by name, but none of the package's list
SUMS: dict[str, Objective] = {}  # those in use, by name


def find(name: str) -> Objective | None:
    """The objective of that name, or None."""
    return OBJECTIVES.get(name) or GUESTS.get(name)


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
    terms: Callable[..., tuple[str, Tensor]] | None = None,
    draw: Callable[..., Tensor] | None = None,
    running: tuple[str, ...] = (),
    mismatched: tuple[str, ...] = (),
    guest: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of `Responses` as an objective; the function itself is returned unchanged.

    Args:
        name: default: the function's own name. Registering one of your own again (a notebook cell) replaces it.
        unit: default: "pair" or "group" for `couples` of that name, else "response".
        couples, ref, label, rewards, entropy, entropy_grad, terms, draw, running, mismatched: see `Objective`.
        guest: into `GUESTS` in place of `OBJECTIVES`.

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
        known = find(key)
        if known is not None and is_built_in(known) and known.function is not function:
            raise ValueError(f"name: expected a name that isn't taken, got {key!r}")
        if name is not None and not key.isidentifier():
            raise ValueError(f"name: expected an identifier, got {key!r}")
        declared = _declared(key, function)
        SUMS.clear()
        (GUESTS if guest else OBJECTIVES)[key] = Objective(
            key, function, couples, kind, ref, label, rewards, entropy or entropy_grad, entropy_grad, terms, draw,
            running, mismatched, {name: known[0].default for name, known in declared.items()}, declared,
        )  # fmt: skip
        return function

    return register


def _declared(key: str, function: Callable[..., Tensor]) -> dict[str, tuple[Option, ...]]:
    """The options of a function of `Responses`, read from its signature."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        raise ValueError(f"options: expected each by its name, got *args or **keywords of {key}")
    taken = sorted({p.name for p in parameters} & RESERVED)
    if taken:
        raise ValueError(f"options: expected names that `fused_loss` doesn't have, got {taken}")
    made: dict[str, tuple[Option, ...]] = {}
    for parameter in parameters:
        option = _option(key, parameter, _globals(function))
        for allowed in option.ranges if option.default is not parameter.empty else ():
            if not allowed.holds(option.default):
                wanted = _range_text(option, allowed)
                raise ValueError(
                    f"options of {key}: expected a default of {option.name} in its range, {wanted}, "
                    f"got {option.default!r}"
                )
        made[option.name] = (option,)
    return made


def _option(key: str, parameter: inspect.Parameter, names: dict[str, Any]) -> Option:
    annotation, default = parameter.annotation, parameter.default
    if isinstance(annotation, str):  # as `from __future__ import annotations` leaves them
        try:
            annotation = eval(annotation, names)
        except (NameError, TypeError) as error:  # such as a name imported for type checkers alone
            if "Annotated" in annotation:  # a range must not get lost
                raise ValueError(
                    f"options of {key}: expected an annotation of {parameter.name} whose names stand in its module, "
                    f"got {annotation!r}: {error}"
                ) from None
            annotation = parameter.empty
    ranges: tuple[Range, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        ranges = tuple(extra for extra in extras if isinstance(extra, Range))
    plain = type(default) if type(default) in (bool, int, float, str) else Any
    kind = plain if annotation is parameter.empty or (annotation, plain) == (int, float) else annotation
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return Option(parameter.name, default, kind, tuple(members) if all(map(_is_class, members)) else None, ranges)


def _is_class(kind: Any) -> bool:
    """Whether `isinstance` can tell its values: not `Any`, `list[int]` or most protocols."""
    try:
        return (isinstance(kind, type) and not isinstance(None, kind)) or kind is types.NoneType
    except TypeError:
        return False


def _globals(function: Any) -> dict[str, Any]:
    """The names that a function's annotations can use."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return getattr(function if hasattr(function, "__globals__") else type(function).__call__, "__globals__", {})


def is_built_in(spec: Objective) -> bool:
    """Whether it is one of the package's own."""
    return getattr(spec.function, "__module__", "").startswith("rgpb.")


def is_registered(spec: Objective) -> bool:
    """Whether its name says it all: that of an objective, or of a sum of them."""
    return find(spec.name) is spec or SUMS.get(spec.name) is spec


def check_options(spec: Objective, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with numbers of the type that is declared.

    Raises:
        ValueError: an option that the objective doesn't have, or a value of another type, not finite, or out of range.
    """
    if spec.options is None:
        return dict(options)
    unknown = [name for name in options if name not in spec.options]
    if unknown:
        raise ValueError(
            f"options of {spec.name}: expected a subset of {sorted(spec.options)}, got {unknown}"
            f"{suggest(unknown[0], spec.options)}"
        )
    checked: dict[str, Any] = {}
    for name, value in options.items():
        for option in (spec.declared or {})[name]:
            checked[name] = _checked(spec.name, name, option, checked.get(name, value))
    return checked


def _checked(owner: str, name: str, option: Option, value: Any) -> Any:
    """The value as its option has it; `name` is what it was given as."""
    if option.classes is not None and value is not option.default:
        fitting = [kind for kind in option.classes if _fits(value, kind)]
        if not fitting:
            wanted = [_words(kind) for kind in option.classes]
            wanted = [", ".join(wanted[:-1]), wanted[-1]] if wanted[1:] else wanted
            got = repr(value) if isinstance(value, numbers.Number | str | None) else type(value).__name__
            raise ValueError(f"options of {owner}: expected {name} to be {' or '.join(wanted)}, got {got}")
        value = fitting[0](value) if fitting[0] in (int, float) else value
    for allowed in option.ranges:
        if not allowed.holds(value):
            raise ValueError(
                f"options of {owner}: expected {name} to be {_range_text(option, allowed)}, got {value!r}"
                f"{suggest(value, allowed.values) if isinstance(allowed, OneOf) else ''}"
            )
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind not in (int, float):
        return isinstance(value, kind)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max and kind(value) == value


def _words(kind: type) -> str:
    known = {float: "a finite number", int: "a whole number", types.NoneType: "None"}
    return known.get(kind, f"a {'torch.' * (getattr(torch, kind.__name__, None) is kind)}{kind.__name__}")


def _range_text(option: Option, allowed: Range) -> str:
    if isinstance(allowed, OneOf):
        return allowed.text
    return f"{'a whole number' if option.type is int else 'a number'} {allowed.text}"


class OptionText(NamedTuple):
    """An option in words, for help and documentation.

    Attributes:
        name: as it is given; of a sum `term.option`, and `option` for all terms that have it.
        type: such as "float" or "RunningMean | float | None".
        default: as it would be typed; "" where the option has to be given.
        range: such as "a number above 0", or the values there are; "" where any will do.
    """

    name: str
    type: str
    default: str
    range: str


def describe_options(spec: Objective) -> list[OptionText]:
    """The options of an objective or sum, in the order of its signature; none of a function that isn't registered."""
    described = []
    for name, declared in (spec.declared or {}).items():
        first = declared[0]
        ranges = dict.fromkeys(_range_text(option, allowed) for option in declared for allowed in option.ranges)
        default = "" if first.default is inspect.Parameter.empty else repr(first.default)
        described.append(OptionText(name, type_text(first.type), default, " and ".join(ranges)))
    return described


def type_text(kind: Any) -> str:
    """A type as one writes it: `float`, `RunningMean | float | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(type_text, get_args(kind)))
    if kind is types.NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def suggest(name: Any, known: Iterable[str]) -> str:
    """What goes after an unknown name: "; did you mean 'dpo'?", or "" where nothing is near it.

    >>> suggest("DPO", ["dpo", "ipo"]), suggest("x", ["dpo"])
    ("; did you mean 'dpo'?", '')
    """
    by_case = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_case, n=1)
    return f"; did you mean {by_case[near[0]]!r}?" if near else ""


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
