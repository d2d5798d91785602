"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, all of it or none."""
    save_whole_file(path, lambda place: place.write_text(json.dumps(value, indent=1) + "\n"))


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, all of it or none."""
    save_whole_file(path, lambda place: place.write_text(text, encoding="utf-8"))


def save_whole_file(path: Path, save: Callable[[Path], Any]) -> None:
    """All of the file or none."""
    place = path.with_suffix(path.suffix + ".tmp")
    save(place)
    os.replace(place, path)


def save_whole_folder(path: Path, *saves: Callable[[Path], Any]) -> None:
    """All of the folder or none."""
    place = path.with_suffix(".tmp")
    for old in (place, path):
        if old.exists():
            shutil.rmtree(old)
    for save in saves:
        save(place)
    os.replace(place, path)
