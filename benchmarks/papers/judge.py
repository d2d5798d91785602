"""Verdicts: from numbers per seed to whether a claim holds.

Methods of one seed start from the same model and see the same data, so what two of them differ by is one number per
seed, or one per seed and held-out unit. A difference counts when its mean exceeds twice its standard error.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

VERDICTS = ("holds", "does not hold", "not decidable at this size")
HOLDS, FAILS, OPEN = VERDICTS

Values = dict[str, dict[str, list[float]]]  # quantity → method → one number per seed
Numbers = Mapping[str, Mapping[str, Sequence[Any]]]  # likewise, or of each seed a list, a number per held-out unit
SEEN = 2.84  # standard errors: a difference of so many exceeds twice its error four times in five


class Told(NamedTuple):
    """A number of a claim: what it is, mean ± standard error as text, and the verdict ("" where it decides nothing)."""

    what: str
    number: str
    verdict: str = ""


class Above(NamedTuple):
    """In `quantity`, method `more` exceeds method `less` by more than `by`, the smallest difference that counts.

    An empty name stands for 0; `at` is the condition, such as a learning rate, that the part belongs to.
    """

    quantity: str
    more: str
    less: str = ""
    by: float = 0.0
    at: str = ""

    def judge(self, values: Numbers) -> Told:
        """Verdict on the differences. Told are the differences or, where one name is empty, the other's own values."""
        found = values[self.quantity]
        one = self.more or self.less
        gaps = list(found[one]) if self.more else changed(found[one], -1.0)
        what, shown = f"{self.quantity}, {one}", spread(found[one])
        if self.more and self.less:
            gaps = differences(found[self.more], found[self.less])
            what, shown = f"{what} less {self.less}", spread(gaps, sign=True)
        return Told(what, shown, decide(changed(gaps, less=self.by)))


class Slope(NamedTuple):
    """`quantity` goes with a power, `expected`, of what its methods ("k = 1", "k = 2", …) are numbered by.

    No value of the quantity `floor` may be negative.
    """

    quantity: str
    expected: float
    floor: str = ""
    at: str = ""

    def judge(self, values: Numbers) -> Told:
        """Whether the slope's interval, twice its error to both sides, has `expected`; open where it has 0 as well."""
        slope, error = fit_slope(values[self.quantity])
        low, high = slope - 2 * error, slope + 2 * error
        verdict = FAILS if not low <= self.expected <= high else OPEN if low <= 0 <= high else HOLDS
        if self.floor and any(x < 0 for seeds in values[self.floor].values() for x in seeds):
            verdict = FAILS
        return Told(f"slope of {self.quantity}", f"{slope:.3f} ± {error:.3f}", verdict)


Part = Above | Slope


def judge(parts: Sequence[Part], values: Numbers) -> list[tuple[str, str, list[Told]]]:
    """Condition, verdict and numbers, for each condition under which the parts have to hold."""
    return [
        (at, every([one.verdict for one in told]), told)
        for at in dict.fromkeys(part.at for part in parts)
        for told in [[part.judge(values) for part in parts if part.at == at]]
    ]


def estimate(values: Sequence[Any]) -> tuple[float, float]:
    """Mean and standard error of one finite number per seed, or of one per seed and held-out unit.

    The error is that over the seeds; with units that over them is added, as their spread is another. What neither
    explains is in both, so with units the error is rather too large.
    """
    if not isinstance(values[0], Sequence):
        return fmean(values), stdev(values) / math.sqrt(len(values))
    mean, over_seeds = estimate([fmean(one) for one in values])
    _, over_units = estimate([fmean(its) for its in zip(*values)])
    return mean, math.hypot(over_seeds, over_units)


def decide(differences: Sequence[Any]) -> str:
    """The verdict on "the difference is positive", from one difference per seed, or one per seed and held-out unit.

    With one seed it stays open. Infinite differences (one of the two collapsed) count where all have the same sign.
    """
    flat = flattened(differences)
    if not flat or any(math.isnan(x) for x in flat):
        raise ValueError(f"differences: expected one number per seed, got {list(differences)}")
    if len(differences) < 2:
        return OPEN
    if any(math.isinf(x) for x in flat):
        return HOLDS if all(x > 0 for x in flat) else FAILS if all(x < 0 for x in flat) else OPEN
    mean, error = estimate(differences)
    return HOLDS if mean > 2 * error else FAILS if mean < -2 * error else OPEN


def flattened(values: Sequence[Any]) -> list[float]:
    """All numbers, whether one per seed or a list."""
    return [x for one in values for x in (one if isinstance(one, Sequence) else [one])]


def changed(values: Sequence[Any], times: float = 1.0, less: float = 0.0) -> list[Any]:
    """Each number times something, less something."""
    return [changed(x, times, less) if isinstance(x, Sequence) else times * x - less for x in values]


def every(verdicts: Sequence[str]) -> str:
    """The verdict on several parts, at least one: it holds where all do, and fails where one does."""
    if not verdicts or not set(verdicts) <= set(VERDICTS):
        raise ValueError(f"verdicts: expected some of {VERDICTS}, got {list(verdicts)}")
    return next((v for v in (FAILS, OPEN) if v in verdicts), HOLDS)


def differences(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """a − b, seed by seed, and unit by unit. Two that are infinite alike don't differ."""
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} values, one per seed as in a, got {len(b)}")
    return [differences(x, y) if isinstance(x, Sequence) else 0.0 if x == y else x - y for x, y in zip(a, b)]


def spread(values: Sequence[Any], sign: bool = False) -> str:
    """Mean ± standard error, of units also the smallest effect to be seen; each value where one isn't finite."""
    form, flat = f"{'+' if sign else ''}.3g", flattened(values)
    if any(not math.isfinite(x) for x in flat):
        return ", ".join(f"{x:{form}}" for x in flat)
    if len(values) == 1:
        return f"{fmean(flat):{form}}"
    mean, error = estimate(values)
    return f"{mean:{form}} ± {error:.2g}" + (f" [{SEEN * error:.2g}]" if isinstance(values[0], Sequence) else "")


def fit_slope(curve: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Slope of log value over log number, and its error: the larger of the fit's own and that over the seeds."""
    x = [math.log(float(name.rpartition(" ")[2])) for name in curve]
    middle = fmean(x)
    scale = sum((a - middle) ** 2 for a in x)

    def line(y: Sequence[float]) -> tuple[float, float]:
        slope = sum((a - middle) * b for a, b in zip(x, y)) / scale
        left = [b - fmean(y) - slope * (a - middle) for a, b in zip(x, y)]
        return slope, math.sqrt(sum(a * a for a in left) / (len(x) - 2) / scale)

    logs = [[math.log(value) for value in seeds] for seeds in curve.values()]
    slopes = [line(y)[0] for y in zip(*logs)]
    over_seeds = stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
    slope, error = line([fmean(seeds) for seeds in logs])
    return slope, max(error, over_seeds)
