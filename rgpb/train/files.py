"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what the writers of other libraries say, in which no errno is left
UNWRITTEN = re.compile(r"PytorchStreamWriter|inline_container|\(os error (\d+)\)|unexpected pos")


def write_failure(error: BaseException) -> OSError | None:
    """A file system's refusal (full, read-only, no permission, a file in place of a folder) that an error comes from,
    None where it comes from something else."""
    if isinstance(error, OSError):
        return error
    found = UNWRITTEN.search(str(error))
    if found is None:
        return None
    reason = os.strerror(int(found[1])) if found[1] else "a file could not be written (is the disk full?)"
    return OSError(int(found[1] or errno.EIO), reason)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, all of it or none."""
    save_whole_file(path, lambda place: place.write_text(json.dumps(value, indent=1) + "\n"))


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, all of it or none."""
    save_whole_file(path, lambda place: place.write_text(text, encoding="utf-8"))


def save_whole_file(path: Path, save: Callable[[Path], Any]) -> None:
    """All of the file or none."""
    place = path.with_suffix(path.suffix + ".tmp")
    with naming(path):
        save(place)
        os.replace(place, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Where a file system refuses without saying what, say it."""
    try:
        yield
    except Exception as error:
        failure = write_failure(error)
        if failure is None or failure.filename is not None:
            raise
        failure.filename = str(path)
        raise failure from error


def save_whole_folder(path: Path, *saves: Callable[[Path], Any]) -> None:
    """All of the folder or none."""
    place = path.with_suffix(".tmp")
    for old in (place, path):
        if old.exists():
            shutil.rmtree(old)
    with naming(path):
        for save in saves:
            save(place)
        os.replace(place, path)
