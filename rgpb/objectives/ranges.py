"""Ranges of options, declared with the option: `beta: Annotated[float, Positive()] = 0.1`.

`rgpb.objectives.registry.check_options` checks them before anything is computed. A range of your own is anything with
`text` and `holds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Range(Protocol):
    """Which values an option takes.

    Attributes:
        text: what goes after "a number" or "a whole number", such as "above 0"; of `OneOf` the values themselves.
    """

    @property
    def text(self) -> str: ...

    def holds(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`; `ends` says which of the two belong to it, as in [0, 1)."""

    low: float
    high: float
    ends: str = "[]"

    def __post_init__(self) -> None:
        if self.ends not in ("[]", "[)", "(]", "()"):
            raise ValueError(f"ends: expected one of '[]', '[)', '(]', '()', got {self.ends!r}")
        if not self.low < self.high:
            raise ValueError(f"high: expected a number above low={self.low}, got {self.high}")

    @property
    def text(self) -> str:
        low = "" if self.low == -math.inf else f"{'above' if self.ends[0] == '(' else 'of at least'} {self.low:g}"
        high = "" if self.high == math.inf else f"{'below' if self.ends[1] == ')' else 'of at most'} {self.high:g}"
        return " and ".join(filter(None, (low, high)))

    def holds(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)


def Positive() -> Between:
    """Numbers above 0."""
    return Between(0, math.inf, "()")


def AtLeast(low: float) -> Between:
    """Numbers from `low` on."""
    return Between(low, math.inf, "[)")


def NonNegative() -> Between:
    """0 and the numbers above."""
    return AtLeast(0)


@dataclass(frozen=True, init=False)
class OneOf:
    """One of a few strings: `OneOf("best", "all")`."""

    values: tuple[str, ...]

    def __init__(self, *values: str) -> None:
        object.__setattr__(self, "values", values)

    @property
    def text(self) -> str:
        *most, last = map(repr, self.values)
        return f"{', '.join(most)} or {last}" if most else last

    def holds(self, value: str) -> bool:
        return value in self.values
