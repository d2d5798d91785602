"""What `rgpb tune` has kept on this machine: one file for all users' processes, read once by each."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=NamedTuple)


def folder() -> Path | None:
    """`rgpb` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home, "rgpb")  # expanduser leaves what it can't find


def file() -> Path | None:
    """`tuned.json` in that folder."""
    place = folder()
    return None if place is None else place / "tuned.json"


def read(kind: type[Kind], key: str) -> Kind | None:
    """What is kept under a key, or None.

    Raises:
        ValueError: the file is there but isn't such a file.
    """
    try:
        values = _known().get(key)
        return None if values is None else kind(*values)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"tuned choices: expected a file of `rgpb tune`, got {file()} ({error}); delete it") from error


def keep(key: str, values: tuple[Any, ...]) -> None:
    """Prefer these values from now on.

    Raises:
        ValueError: a user without a home.
    """
    path = file()
    if path is None:
        raise ValueError("XDG_CACHE_HOME: expected a folder to keep choices in, since this user has no home; got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    known = {**_known(), key: list(values)}
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)  # whole or not at all, also beside another process
    _known.cache_clear()


@cache
def _known() -> dict[str, list[Any]]:
    path = file()
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


@cache
def cpu_name() -> str:
    """The processor's name; where the system doesn't say, its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
