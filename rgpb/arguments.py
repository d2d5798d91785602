"""Types of command-line arguments, and of what is written like them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Bytes from a text such as 512MiB, 1.5GiB or 1000000.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * BYTES.get(match[2].lower(), 0)) if match else 0
    if size < 1:
        raise ValueError(f"expected bytes, as 512MiB, 4GiB or 1000000, got {text!r}")
    return size


def positive(text: str) -> int:
    """An integer of at least 1.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise ValueError(f"expected a positive integer, got {text!r}")
    return int(text)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which then shows the message of its `ValueError`."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def told(error: BaseException) -> str:
    """An error in one line; of the file system's with path and reason."""
    if isinstance(error, OSError) and error.strerror:
        path = "" if error.filename is None else f"{error.filename}: "
        return f"{path}{error.strerror}; mend that and give the same command again"
    return " ".join(str(error).split())
