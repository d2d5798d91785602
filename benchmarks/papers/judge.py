"""Verdicts: from numbers per seed to whether a claim holds.

Methods of one seed start from the same model and see the same data, so what two of them differ by is one number per
seed. A difference counts when its mean exceeds twice its standard error.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

VERDICTS = ("holds", "does not hold", "not decidable at this size")
HOLDS, FAILS, OPEN = VERDICTS

Values = dict[str, dict[str, list[float]]]  # quantity → method → one number per seed


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

    def judge(self, values: Values) -> Told:
        """Verdict on the differences. Told are the differences or, where one name is empty, the other's own values."""
        found = values[self.quantity]
        one = self.more or self.less
        gaps = found[one] if self.more else [-x for x in found[one]]
        what, shown = f"{self.quantity}, {one}", spread(found[one])
        if self.more and self.less:
            gaps = differences(found[self.more], found[self.less])
            what, shown = f"{what} less {self.less}", spread(gaps, sign=True)
        return Told(what, shown, decide([gap - self.by for gap in gaps]))


class Slope(NamedTuple):
    """`quantity` goes with a power, `expected`, of what its methods ("k = 1", "k = 2", …) are numbered by.

    No value of the quantity `floor` may be negative.
    """

    quantity: str
    expected: float
    floor: str = ""
    at: str = ""

    def judge(self, values: Values) -> Told:
        """Whether the slope's interval, twice its error to both sides, has `expected`; open where it has 0 as well."""
        slope, error = fit_slope(values[self.quantity])
        low, high = slope - 2 * error, slope + 2 * error
        verdict = FAILS if not low <= self.expected <= high else OPEN if low <= 0 <= high else HOLDS
        if self.floor and any(x < 0 for seeds in values[self.floor].values() for x in seeds):
            verdict = FAILS
        return Told(f"slope of {self.quantity}", f"{slope:.3f} ± {error:.3f}", verdict)


Part = Above | Slope


def judge(parts: Sequence[Part], values: Values) -> list[tuple[str, str, list[Told]]]:
    """Condition, verdict and numbers, for each condition under which the parts have to hold."""
    return [
        (at, every([one.verdict for one in told]), told)
        for at in dict.fromkeys(part.at for part in parts)
        for told in [[part.judge(values) for part in parts if part.at == at]]
    ]


def decide(differences: Sequence[float]) -> str:
    """The verdict on "the difference is positive", from one difference per seed; with one seed it stays open.

    Infinite differences (one of the two collapsed) count where all have the same sign.
    """
    if not differences or any(math.isnan(x) for x in differences):
        raise ValueError(f"differences: expected one number per seed, got {list(differences)}")
    if len(differences) < 2:
        return OPEN
    if any(math.isinf(x) for x in differences):
        return HOLDS if all(x > 0 for x in differences) else FAILS if all(x < 0 for x in differences) else OPEN
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    return HOLDS if mean > 2 * error else FAILS if mean < -2 * error else OPEN


def every(verdicts: Sequence[str]) -> str:
    """The verdict on several parts, at least one: it holds where all do, and fails where one does."""
    if not verdicts or not set(verdicts) <= set(VERDICTS):
        raise ValueError(f"verdicts: expected some of {VERDICTS}, got {list(verdicts)}")
    return next((v for v in (FAILS, OPEN) if v in verdicts), HOLDS)


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a − b, seed by seed. Two that are infinite alike don't differ."""
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} values, one per seed as in a, got {len(b)}")
    return [0.0 if x == y else x - y for x, y in zip(a, b)]


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean ± standard error over the seeds, as text; each value where one isn't finite."""
    form = f"{'+' if sign else ''}.3g"
    if any(not math.isfinite(x) for x in values):
        return ", ".join(f"{x:{form}}" for x in values)
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{error}"


def fit_slope(curve: dict[str, list[float]]) -> tuple[float, float]:
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
