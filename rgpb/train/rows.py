"""Preference data: files → rows → units.

A row has a prompt and responses in one of three forms; other keys are left alone, and one file has one form:

    {"prompt": …, "chosen": …, "rejected": …}                   pairs
    {"prompt": …, "completion": …, "label": true | 1 | -1}      labelled   (false, 0 and -1: dispreferred)
    {"prompt": …, "completions": [K], "rewards": [K]}           rewarded

Texts are strings, or chats: lists of {"role": …, "content": …} in the prompt and in every response.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "rewarded": ("prompt", "completions", "rewards"),
}
PAIRINGS = ("best-worst", "best-each", "all")
GROUPS = "groups"  # in place of a pairing: all of a row's responses as one unit

Text = str | list[dict[str, str]]


class Row(NamedTuple):
    """One line of a file.

    Attributes:
        where: file and line, for messages.
        prompt: a string, or a chat.
        completions: the responses, as many as `rewards`.
        rewards: higher is better: (1, 0) of a pair, (±1,) of a labelled response.
    """

    where: str
    prompt: Text
    completions: tuple[Text, ...]
    rewards: tuple[float, ...]


class Preferences(NamedTuple):
    """A file of preferences.

    Attributes:
        source: the path.
        form: a key of `FORMS`.
        rows: at least one.
    """

    source: str
    form: str
    rows: list[Row]


def read_preferences(path: str | Path) -> Preferences:
    """Read and check a whole file before anything else happens.

    Args:
        path: JSON lines, plain or gzipped (told apart by content); a Parquet file; or a folder that
            `datasets.Dataset.save_to_disk` made.

    Raises:
        ValueError: no such file; not JSON; missing or ill-typed keys; an empty response; mixed forms; no rows. The
            message names file and line, what was expected and what came.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data: expected a file or folder, got {str(path)!r}, which does not exist")
    rows: list[Row] = []
    form, chat = "", False
    for where, record in _records(path):
        found = _form(where, record)
        row = _row(where, found, record)
        is_chat = isinstance(row.prompt, list)
        if not rows:
            form, chat = found, is_chat
        elif (found, is_chat) != (form, chat):
            expected, got = (f"a row of {f}{', as chats' * c}" for f, c in ((form, chat), (found, is_chat)))
            raise ValueError(f"{where}: expected {expected}, as in {rows[0].where}, got {got}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}:1: expected at least one row of preferences, got an empty file")
    return Preferences(str(path), form, rows)


def read_prompts(path: str | Path) -> Preferences:
    """Read the prompts of a file: rows of any form, or {"prompt": …} alone. Their responses aren't looked at.

    Returns:
        Preferences of the form "prompts", whose rows have no completions.

    Raises:
        ValueError: as `read_preferences`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data: expected a file or folder, got {str(path)!r}, which does not exist")
    rows: list[Row] = []
    for where, record in _records(path):
        if not isinstance(record, dict) or record.get("prompt") is None:
            raise ValueError(f"{where}: expected an object with the key prompt, got {shown(record)}")
        prompt = _text(where, "prompt", record["prompt"], None)
        if rows and isinstance(prompt, list) != isinstance(rows[0].prompt, list):
            expected, got = ("a chat" if isinstance(p, list) else "a string" for p in (rows[0].prompt, prompt))
            raise ValueError(f"{where}: prompt: expected {expected}, as in {rows[0].where}, got {got}")
        rows.append(Row(where, prompt, (), ()))
    if not rows:
        raise ValueError(f"{path}:1: expected at least one prompt, got an empty file")
    return Preferences(str(path), "prompts", rows)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of every row."""
    if path.is_dir() or _starts_with(path, b"PAR1"):
        yield from ((f"{path}:{i}", record) for i, record in enumerate(_tables(path), 1))
        return
    number = 0
    try:
        with gzip.open(path) if _starts_with(path, b"\x1f\x8b") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: expected UTF-8, got the bytes {line[error.start :][:8]!r}") from None
                except RecursionError:
                    raise ValueError(f"{where}: expected one JSON object, got one nested too deeply") from None
                except json.JSONDecodeError as error:
                    start = line[:40].decode(errors="replace").rstrip()
                    raise ValueError(
                        f"{where}: expected one JSON object, got {start!r} … ({error.msg}, column {error.colno})"
                    ) from None
                yield where, record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: expected a complete gzip file, got {error}") from None


def _tables(path: Path) -> Iterable[Any]:
    """Rows of a Parquet file or a saved dataset, through `datasets`."""
    import datasets
    import pyarrow.parquet

    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.Dataset(pyarrow.parquet.read_table(path))
    except (FileNotFoundError, pyarrow.ArrowInvalid) as error:
        raise ValueError(
            f"data: expected a Parquet file, or a folder saved by datasets, got {str(path)!r} ({error})"
        ) from None
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(f"data: expected one split of {str(path)!r}, such as a folder in it, got {sorted(table)}")
    return table


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _form(where: str, record: Any) -> str:
    forms = "; ".join(", ".join(keys) for keys in FORMS.values())
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the keys {forms}; got {shown(record)}")
    found = [form for form, keys in FORMS.items() if all(record.get(key) is not None for key in keys)]
    if len(found) != 1:
        got = [key if record[key] is not None else f"{key} (null)" for key in sorted(record)]
        raise ValueError(f"{where}: expected the keys of one form ({forms}), got {', '.join(got) or 'none'}")
    return found[0]


def _row(where: str, form: str, record: dict[str, Any]) -> Row:
    prompt = _text(where, "prompt", record["prompt"], None)
    chat = isinstance(prompt, list)
    if form == "pairs":
        pair = tuple(_text(where, key, record[key], chat) for key in ("chosen", "rejected"))
        return Row(where, prompt, pair, (1.0, 0.0))
    if form == "labelled":
        label = record["label"]
        if isinstance(label, str) or label not in (True, False, -1):
            raise ValueError(f"{where}: label: expected true, false, 0, 1 or -1, got {shown(label)}")
        completion = _text(where, "completion", record["completion"], chat)
        return Row(where, prompt, (completion,), (1.0 if label > 0 else -1.0,))
    completions, rewards = record["completions"], record["rewards"]
    for key, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where}: {key}: expected a list of at least one, got {shown(value)}")
    if len(rewards) != len(completions):
        raise ValueError(f"{where}: rewards: expected {len(completions)}, one per completion, got {len(rewards)}")
    for i, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) < 1e300:
            raise ValueError(f"{where}: rewards[{i}]: expected a finite number, got {shown(reward)}")
    texts = tuple(_text(where, f"completions[{i}]", text, chat) for i, text in enumerate(completions))
    return Row(where, prompt, texts, tuple(float(reward) for reward in rewards))


def _text(where: str, key: str, value: Any, chat: bool | None) -> Text:
    """A string or a chat; a response (`chat` known) must be of the prompt's kind and not empty."""
    is_chat = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    if not is_chat and not isinstance(value, str):
        raise ValueError(f'{where}: {key}: expected a string or a list of {{"role", "content"}}, got {shown(value)}')
    if chat is not None and chat != is_chat:
        expected, got = ("a chat" if c else "a string" for c in (chat, is_chat))
        raise ValueError(f"{where}: {key}: expected {expected} as the prompt is, got {got}")
    if not value and (is_chat or chat is not None):
        raise ValueError(f"{where}: {key}: expected some text, got {shown(value)}")
    for text in [turn["content"] for turn in value] if is_chat else [value]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{where}: {key}: expected text that UTF-8 can say, got half a surrogate pair")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value] if is_chat else value


def shown(value: Any) -> str:
    """A value as it stands in a message: 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


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
