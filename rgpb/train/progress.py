"""Progress: a bar on a terminal; elsewhere, as in a log, a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

EVERY = 5.0  # seconds between two lines


class Lines:
    """What a bar shows, as lines on stderr.

    Args:
        total: how many there are to do.
        desc, unit: what is done, and of what.
        initial: how many of them are done already.
        leave: whether the end has a line, however short it all was.
    """

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0, leave: bool = True) -> None:
        self.total, self.desc, self.unit, self.initial, self.leave = total, desc, unit, initial, leave
        self.n, self.begun, self.shown = initial, time.monotonic(), ""
        self.said, self.last = self.begun, initial

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.said >= EVERY:
            self._say()

    def set_postfix(self, shown: Mapping[str, Any], refresh: bool = False) -> None:
        """What the next line has behind it; that line comes in its time."""
        self.shown = "".join(f", {name} {value}" for name, value in shown.items())

    def close(self) -> None:
        if self.leave and self.n > self.last:
            self._say()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self) -> None:
        self.said, self.last = time.monotonic(), self.n
        left = (self.said - self.begun) / max(1, self.n - self.initial) * (self.total - self.n)
        coming = f", {duration(left)} left" if self.n < self.total else ""
        print(f"{self.desc}: {self.unit} {self.n} of {self.total}{coming}{self.shown}", file=sys.stderr, flush=True)


def bar(
    total: int, desc: str, unit: str, initial: int = 0, leave: bool = True, quiet: bool = False
) -> tqdm[Any] | Lines:
    """A bar where stderr is a terminal, lines where it isn't, nothing where it is to be quiet."""
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, leave=leave, disable=quiet)
    return Lines(total, desc, unit, initial, leave)


def say(text: str) -> None:
    """A line on stdout, above a bar."""
    tqdm.write(text)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
