"""Preference data: files → rows → units.

A row has a prompt and responses in one of three forms:

    {"prompt": …, "chosen": …, "rejected": …}                   pairs
    {"prompt": …, "completion": …, "label": true | 1 | -1}      labelled   (false, 0 and -1: dispreferred)
    {"prompt": …, "completions": [K], "rewards": [K]}           rewarded

`rgpb.train.layouts` has the other ways in which files say the same; one file has one. Other keys are left unread.

Texts are strings, or chats: lists of {"role": …, "content": …, …}. What else a message holds goes to the chat template,
as do a row's `tools` and `chat_template_kwargs`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rgpb.train.layouts import TEMPLATE, Preferences, Row, described, keys_of, read_layout, read_prompt, shown

PAIRINGS = ("best-worst", "best-each", "all")
SAMPLED_PAIRINGS = ("best-worst", "best-random", "unpaired")  # of completions that an online run samples
GROUPS = "groups"  # in place of a pairing: all of a row's responses as one unit


def read_preferences(path: str | Path) -> Preferences:
    """Read and check a whole file before anything else happens.

    Args:
        path: JSON lines or a JSON array, plain or gzipped (told apart by content); a Parquet or Arrow file; a folder of
            shards of one of these; or a folder that `datasets.Dataset.save_to_disk` made.

    Raises:
        ValueError: no such file; not JSON; missing or ill-typed keys; an empty response; mixed forms or layouts; labels
            of which 0 may mean two things; no rows. The message names file and line, what was expected and what came.
    """
    path = _existing(path)
    rows: list[Row] = []
    notes: Counter[str] = Counter()
    unread: set[str] = set()
    labels: dict[float, str] = {}  # where each number was first seen
    layout, chat, first = None, False, ""
    for where, record in _records(path, unread):
        found, row, noted = read_layout(where, record)
        is_chat = isinstance(row.prompt, list)
        if layout is None:
            layout, chat, first = found, is_chat, where
        elif (found, is_chat) != (layout, chat):
            same = (found.form, is_chat) == (layout.form, chat)
            expected, got = (
                f"the keys {', '.join(f.keys)}" if same else f"a row of {f.form}{', as chats' * c}"
                for f, c in ((layout, chat), (found, is_chat))
            )
            raise ValueError(f"{where}: expected {expected}, as in {first}, got {got}")
        value = record.get("label")
        if found.form == "labelled" and (isinstance(value, int | float) or value in ("0", "1", "+1", "-1")):
            labels.setdefault(float(value), where)
            if {-1.0, 0.0, 1.0} <= labels.keys():
                raise ValueError(
                    f"{where}: label: expected two values, got {shown(value)} beside "
                    f"{', '.join(f'{v:g} in {w}' for v, w in labels.items() if v != value)}"
                )
        if "" in row.completions:  # of two texts with one prompt: as if the assistant had said nothing
            notes["rows left out, an empty response"] += 1
            continue
        notes.update(noted)
        unread.update(key for key in record if key not in keys_of(layout) and not (is_chat and key in TEMPLATE))
        rows.append(row)
    if layout is None or not rows:
        got = "an empty file" if layout is None else "none with some text in each response"
        raise ValueError(f"{path}:1: expected at least one row of preferences, got {got}")
    if layout.merged:
        rows = _merged(rows)
    name = ", ".join(layout.keys) + (" as chats" if chat else "")
    return Preferences(str(path), layout.form, rows, name, tuple(sorted(unread)), dict(notes))


def read_prompts(path: str | Path) -> Preferences:
    """Read the prompts of a file: rows of any layout, or {"prompt": …} alone, whose responses aren't looked at.

    Returns:
        Preferences of the form "prompts", whose rows have no completions.

    Raises:
        ValueError: as `read_preferences`.
    """
    path = _existing(path)
    rows: list[Row] = []
    for where, record in _records(path, set()):
        row = read_prompt(where, record)
        if rows and isinstance(row.prompt, list) != isinstance(rows[0].prompt, list):
            expected, got = ("a chat" if isinstance(p, list) else "a string" for p in (rows[0].prompt, row.prompt))
            raise ValueError(f"{where}: prompt: expected {expected}, as in {rows[0].where}, got {got}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}:1: expected at least one prompt, got an empty file")
    return Preferences(str(path), "prompts", rows, "prompt")


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise ValueError(f"data: expected a file or folder, got {str(path)!r}, which does not exist")
    if not (Path(path).is_file() or Path(path).is_dir()):  # its beginning is read twice, and a run that goes on anew
        raise ValueError(
            f"data: expected a file or folder, got {str(path)!r}, a pipe or device; write it to a file first"
        )
    return Path(path)


def _merged(rows: list[Row]) -> list[Row]:
    """Rows of one judged response each → rows of all responses to a prompt, in the order of their first ones."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps([row.prompt, row.template]), []).append(row)
    return [
        same[0]._replace(
            completions=tuple(c for row in same for c in row.completions),
            rewards=tuple(r for row in same for r in row.rewards),
        )
        for same in by_prompt.values()
    ]


def _records(path: Path, unread: set[str]) -> Iterator[tuple[str, Any]]:
    """(where, record) of every row. Columns of media go into `unread`."""
    if path.is_dir() and not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        for shard in _shards(path):
            yield from _records(shard, unread)
    elif path.is_dir() or any(_starts_with(path, magic) for magic in (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        yield from ((f"{path}:{i}", record) for i, record in enumerate(_tables(path, unread), 1))
    else:
        yield from _json_records(path)


SHARD = re.compile(r"(.*?)[-_.]?(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{16})?")
KINDS = (".parquet", ".arrow", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
# How files begin that people have and that aren't read, and what unpacks them
PACKED = {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"),
    b"PK\x03\x04": ("ZIP", "unzip"),
}  # fmt: skip
UNREAD = (".zst", ".bz2", ".xz", ".zip")


def _shards(folder: Path) -> list[Path]:
    """The files of a folder that are parts of one."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        kind = next((kind for kind in (*KINDS, *UNREAD) if file.name.endswith(kind)), None)
        if kind is not None:
            found.setdefault(kind, []).append(file)
    if not found:
        raise ValueError(
            f"data: expected a Parquet file, or a folder saved by datasets or of shards ({', '.join(KINDS)}), "
            f"got {str(folder)!r}"
        )
    files = [file for files in found.values() for file in files]
    matches = [SHARD.fullmatch(file.name.partition(".")[0]) for file in files]
    names = {match[1] if match else file.name for file, match in zip(files, matches)}
    if len(found) > 1 or (len(files) > 1 and len(names) > 1):
        names = {file.name for file in files}
        raise ValueError(f"data: expected the shards of one file in {str(folder)!r}, got {shown(sorted(names))}")
    numbers = Counter(int(match[2]) for match in matches if match)
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise ValueError(f"data: expected each shard once in {str(folder)!r}, got several numbered {twice[0]}")
    total = {int(match[3]) for match in matches if match and match[3]}
    if total and total != {len(files)}:
        raise ValueError(f"data: expected {max(total)} shards in {str(folder)!r}, got {len(files)}")
    return files


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of JSON lines, or of one JSON array."""
    number, first = 0, True
    for magic, (kind, tool) in PACKED.items():
        if _starts_with(path, magic):
            raise ValueError(f"data: expected JSON, plain or gzipped, got {kind} in {str(path)!r} ({tool} unpacks it)")
    try:
        with gzip.open(path) if _starts_with(path, b"\x1f\x8b") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    yield from _array(path, number, line + lines.read())
                    return
                yield f"{path}:{number}", _parsed(f"{path}:{number}", line)
                first = False
    except _NoJsonError as error:
        table = first and path.suffix.lower() in (".csv", ".tsv")
        remedy = "; datasets.Dataset.from_csv makes a table of it, whose to_parquet is read" if table else ""
        raise ValueError(f"{error}{remedy}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: expected a complete gzip file, got {described(error)}") from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, refused where a key comes twice."""
    made = dict(items)
    if len(made) != len(items):
        twice = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise _TwiceError(f"expected each key once, got {shown(twice)} twice")
    return made


class _TwiceError(ValueError):
    pass


class _NoJsonError(ValueError):
    pass


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parsed(where: str, line: bytes) -> Any:
    """The JSON value of a line."""
    text = _decoded(where, line)
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"{where}: expected one JSON object, got one nested too deeply") from None
    except json.JSONDecodeError as error:
        start = text[:40].rstrip()
        raise _NoJsonError(
            f"{where}: expected one JSON object, got {start!r} … ({error.msg}, column {error.colno})"
        ) from None
    except ValueError as error:  # a key that comes twice, an integer of thousands of digits
        raise ValueError(f"{where}: {error}") from None


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place, _, line = where.rpartition(":")
        where = f"{place}:{int(line) + content.count(bytes([10]), 0, error.start)}"
        raise ValueError(f"{where}: expected UTF-8, got the bytes {content[error.start :][:8]!r}") from None


def _array(path: Path, line: int, content: bytes) -> Iterator[tuple[str, Any]]:
    """Records of a JSON array that begins in that line; each is where it begins."""
    text = _decoded(f"{path}:{line}", content)
    space, place = re.compile(r"\s*"), 0

    def skip(to: int) -> None:
        nonlocal place, line
        to = space.match(text, to).end()  # type: ignore[union-attr]
        line, place = line + text.count("\n", place, to), to

    def wrong(got: str) -> ValueError:
        return ValueError(f"{path}:{line}: expected a JSON array of objects, got {got}")

    skip(0)
    skip(place + 1)
    first = True
    while not text.startswith("]", place):
        if not first:
            if not text.startswith(",", place):
                raise wrong(f"{text[place : place + 40]!r} behind an object" if place < len(text) else "no end of it")
            skip(place + 1)
        try:
            record, end = DECODER.raw_decode(text, place)
        except RecursionError:
            raise wrong("one nested too deeply") from None
        except json.JSONDecodeError as error:
            at = line + text.count("\n", place, error.pos)
            raise wrong(f"{text[place : place + 40]!r} … ({error.msg}, line {at})") from None
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        yield f"{path}:{line}", record
        skip(end)
        first = False
    skip(place + 1)
    if place < len(text):
        raise wrong(f"{text[place : place + 40]!r} behind its end")


def _tables(path: Path, unread: set[str]) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or Arrow file or a saved dataset, through `datasets`, as plain values in any format."""
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f'data: expected datasets to be installed, to read {str(path)!r} (pip install "rgpb[hf]"); {error}'
        ) from None
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
            if isinstance(table, datasets.DatasetDict) and len(table) == 1:
                (table,) = table.values()
        elif _starts_with(path, b"PAR1"):
            table = datasets.Dataset(pyarrow.parquet.ParquetFile(path).read())
        else:
            opened = pyarrow.ipc.open_file if _starts_with(path, b"ARROW1") else pyarrow.ipc.open_stream
            with pyarrow.OSFile(str(path)) as file:
                table = datasets.Dataset(opened(file).read_all())
    except Exception as error:  # pyarrow and datasets have many
        got = f"{str(path)!r} ({described(error)})"
        raise ValueError(f"data: expected a Parquet or Arrow file, or a folder saved by datasets, got {got}") from error
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(f"data: expected one split of {str(path)!r}, such as a folder in it, got {sorted(table)}")
    media = [name for name, feature in table.features.items() if _is_media(feature)]
    classes = {name: each for name, each in table.features.items() if isinstance(each, datasets.ClassLabel)}
    unread.update(media)
    number = 0
    try:
        for batch in table.remove_columns(media).with_format(None).iter(batch_size=1000):
            named = {name: [_class_name(each, value) for value in batch[name]] for name, each in classes.items()}
            for values in zip(*{**batch, **named}.values()):
                yield {key: _without_nulls(value) for key, value in zip(batch, values)}
                number += 1
    except Exception as error:
        raise ValueError(f"{path}:{number + 1}: expected a row, got {described(error)}") from error


def _class_name(feature: Any, value: int | None) -> Any:
    """What a number of a column of classes stands for: another number, where the class is named so."""
    name = None if value is None else feature.int2str(value)
    return int(name) if name in ("-1", "0", "1") else name


def _is_media(feature: Any) -> bool:
    """Whether a column has images, sounds or the like somewhere: features that `datasets` decodes."""
    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    if isinstance(feature, list):
        return any(map(_is_media, feature))
    inner = getattr(feature, "feature", None)
    return type(feature).__module__ != "datasets.features.features" if inner is None else _is_media(inner)


def _without_nulls(value: Any) -> Any:
    """Tables give every object of a column the same keys: null is where a row has none."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def pair_up(preferences: Preferences, pairing: str = "best-worst") -> tuple[list[tuple[int, tuple[int, ...]]], int]:
    """Units as (row, completions of it): chosen and rejected, or the one response of a labelled row.

    Args:
        preferences: of any form.
        pairing: of K rewarded responses take "best-worst", one pair; "best-each", the best with every lower one; or
            "all", every pair of different rewards. Of several best (worst) the first counts. Or "groups": all of them,
            the best first; a pair is a group of two.

    Returns:
        The units, and the number of rows left out because all their rewards are equal.

    Raises:
        ValueError: an unknown `pairing`, or groups of labelled responses.
    """
    if pairing not in (*PAIRINGS, GROUPS):
        raise ValueError(f"pairing: expected one of {(*PAIRINGS, GROUPS)}, got {pairing!r}")
    if pairing == GROUPS and preferences.form == "labelled":
        raise ValueError(f"{preferences.rows[0].where}: expected pairs or rewarded completions, got labelled responses")
    units: list[tuple[int, tuple[int, ...]]] = []
    tied = 0
    for r, row in enumerate(preferences.rows):
        if preferences.form == "labelled":
            units.append((r, (0,)))
            continue
        places = range(len(row.rewards))
        best = max(places, key=row.rewards.__getitem__)
        worst = min(places, key=row.rewards.__getitem__)
        if row.rewards[best] == row.rewards[worst]:
            tied += 1
        elif pairing == GROUPS:
            units.append((r, tuple(sorted(places, key=row.rewards.__getitem__, reverse=True))))
        elif pairing == "best-worst":
            units.append((r, (best, worst)))
        else:
            above = places if pairing == "all" else (best,)
            units += [(r, (i, j)) for i in above for j in places if row.rewards[i] > row.rewards[j]]
    return units, tied
