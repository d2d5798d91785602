"""SIGINT and SIGTERM during a run: the step is finished and saved before they act."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rgpb.train.ranks import own_rank

HELD = (signal.SIGINT, signal.SIGTERM)


class StoppedError(KeyboardInterrupt):
    """A signal has ended a command.

    Attributes:
        code: the exit code that says which, 128 + its number.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(*([text] if text else []))
        self.code = 128 + number


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise a `StoppedError`, as SIGINT raises KeyboardInterrupt, where nothing else is set up for it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Hold:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one acts at once. Ignored signals stay
    ignored, and outside the main thread nothing is held.

    Attributes:
        number: of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Hold:
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in HELD}
            self._before = {n: old for n, old in found.items() if old not in (None, signal.SIG_IGN)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if own_rank() == 0:
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: this step is finished and saved first; a second one ends at once\n".encode())

    def _restore(self) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)
        self._before = {}


def act(number: int, text: str) -> NoReturn:
    """What the signal does where it isn't held; KeyboardInterrupt where it lets the program go on."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        error.args = (text,)
        raise
    raise KeyboardInterrupt(text)
