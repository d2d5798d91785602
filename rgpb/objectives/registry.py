"""What the engine has to know of an objective, and the table of all of them.

Dimensions: B responses, U units (responses, pairs or groups).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.layout import Responses, pairs

COUPLES = ("token", "pair", "batch")
REFS = (None, "sums", "tokens")
RESERVED = {
    "objective",
    "label",
    "ref",
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
        name: key in `OBJECTIVES`.
        function: `Responses`, then keyword options → one value per unit, [U].
        couples: what has to be scored before a token's coefficient is known. "token": the value is a sum of terms
            that each depend on one token (times constants such as 1/|y|), so values of parts add up; "pair": responses
            i and i + B/2 belong together; "batch": anything.
        unit: "response" or "pair", what one value belongs to.
        ref: None, "sums" (Σ log π_ref per response is enough) or "tokens" (per-token scores).
        label: whether it needs the label of each response.
        entropy: whether `other_entropy` has to be computed.
        entropy_grad: whether the value depends on it differentiably.
        terms: for couples="token", where a kernel has the loss of one token itself: (tokens of each response, labels or
            None, options) → its name in `rgpb.kernels.triton_rows.TOKEN_LOSSES` and each response's factor, [B]; None
            where the kernel can't serve the options.
        options: the function's keyword options and their defaults; None for a function that isn't registered, whose
            options aren't checked.
    """

    name: str
    function: Callable[..., Tensor]
    couples: str = "batch"
    unit: str = "response"
    ref: str | None = None
    label: bool = False
    entropy: bool = False
    entropy_grad: bool = False
    terms: Callable[..., tuple[str, Tensor] | None] | None = None
    options: dict[str, Any] | None = None


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str | Callable[..., Tensor] | None = None,
    *,
    couples: str = "batch",
    unit: str | None = None,
    ref: str | None = None,
    label: bool = False,
    entropy: bool = False,
    entropy_grad: bool = False,
    terms: Callable[..., tuple[str, Tensor] | None] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of `Responses` as an objective; the function itself is returned unchanged.

    Args:
        name: default: the function's own name. Registering the same function again (a notebook cell) replaces it.
        unit: default: "pair" for `couples="pair"`, else "response".
        couples, ref, label, entropy, entropy_grad, terms: see `Objective`.

    Raises:
        ValueError: a name that is taken, an unknown value of `couples`, `unit` or `ref`, two that don't go together, or
            an option that `fused_loss` has already.
    """
    if callable(name):  # @objective without parentheses
        return objective()(name)  # type: ignore[return-value]
    for argument, value, expected in (
        ("couples", couples, COUPLES),
        ("unit", unit, (None, "response", "pair")),
        ("ref", ref, REFS),
    ):
        if value not in expected:
            raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")

    if couples == "pair" and unit == "response":
        raise ValueError("unit: expected 'pair' with couples='pair', got 'response'")
    if couples == "token" and ref == "sums":
        raise ValueError("ref: expected 'tokens' or None with couples='token', since parts have to add up; got 'sums'")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        key = name or function.__name__
        known = OBJECTIVES.get(key)
        place = (function.__module__, function.__qualname__)
        if known is not None and (known.function.__module__, known.function.__qualname__) != place:
            raise ValueError(f"name: expected a name that isn't taken, got {key!r}")
        kind = unit or ("pair" if couples == "pair" else "response")
        options = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[1:]}
        taken = sorted(set(options) & RESERVED)
        if taken:
            raise ValueError(f"options: expected names that `fused_loss` doesn't have, got {taken}")
        OBJECTIVES[key] = Objective(
            key, function, couples, kind, ref, label, entropy or entropy_grad, entropy_grad, terms, options
        )
        return function

    return register


def resolve(objective: str | Callable[..., Tensor]) -> Objective:
    """The registered objective of that name or function; any other function may couple the whole batch."""
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected a function or one of {sorted(OBJECTIVES)}, got {objective!r}")
        return OBJECTIVES[objective]
    if not callable(objective):
        raise ValueError(f"objective: expected a name or a function of Responses, got {type(objective).__name__}")
    for known in OBJECTIVES.values():
        if known.function is objective:
            return known
    return Objective(getattr(objective, "__name__", "objective"), objective)


def unit_values(spec: Objective, responses: Responses, options: dict[str, Any]) -> Tensor:
    """The objective's values [U], exactly 0 (and without gradient) for units that have no token.

    Raises:
        ValueError: the function doesn't return one value per response or pair.
    """
    values = spec.function(responses, **options)
    count = responses.layout.tokens
    whole, half = (len(count),), (len(count) // 2,)
    expected = [whole, half] if spec.options is None else [half if spec.unit == "pair" else whole]
    if not isinstance(values, Tensor) or tuple(values.shape) not in expected:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"objective: expected {spec.name} to return {' or '.join(map(str, expected))} values, got {shape}"
        )
    if tuple(values.shape) != whole:
        count = sum(pairs(count))  # type: ignore[assignment]
    return torch.where(count > 0, values, 0.0)
