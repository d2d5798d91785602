"""What `rgpb tune` has kept on this machine: one file for all users' processes, read once by each."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=NamedTuple)


def file() -> Path:
    """`rgpb/tuned.json` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgpb" / "tuned.json"


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
    """Prefer these values from now on."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    known = {**_known(), key: list(values)}
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)  # whole or not at all, also beside another process
    _known.cache_clear()


@cache
def _known() -> dict[str, list[Any]]:
    return json.loads(file().read_text(encoding="utf-8")) if file().exists() else {}


@cache
def cpu_name() -> str:
    """The processor's name; where the system doesn't say, its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
