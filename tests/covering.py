"""Covering arrays: few combinations of many parameters in which every pair (or triple) of values occurs.

    @pytest.mark.parametrize(("name", "path", "head"), covering(2, name=NAMES, path=PATHS, head=HEADS))

A fault that shows for some pair of values shows in a row of strength 2, and there are about as many rows as the two
longest parameters have pairs. `pytest --full` runs the whole product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

SEED = 1  # of the arrays, printed by `conftest.py`; another one gives other rows that cover as much
FULL = False  # set by `conftest.py` before tests are collected


def covering(strength: int, **parameters: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    """Rows for `pytest.mark.parametrize`, whose names are those of `parameters`, in the same order.

    Args:
        strength: 2 covers all pairs of values, 3 all triples. With no more parameters than that: the whole product.
        parameters: The values of each; a mapping gives its keys, which are taken for the ids.

    Returns:
        One `pytest.param` a row, in the order of the whole product, with an id such as "dpo-single-bias=True".
    """
    named = {name: _named(name, values) for name, values in parameters.items()}
    places = {name: range(len(values)) for name, values in named.items()}
    if FULL or strength >= len(named):
        rows = list(itertools.product(*places.values()))
    else:
        import covertable  # here, since `pytest -m gpu` has to start on a machine that has pytest and torch alone

        made = covertable.make(places, strength=strength, salt=str(SEED))
        rows = sorted(tuple(row[name] for name in named) for row in made)
    cells = [[values[i] for values, i in zip(named.values(), row)] for row in rows]
    return [pytest.param(*(value for _, value in row), id="-".join(label for label, _ in row)) for row in cells]


def _named(name: str, values: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    """[(label, value)]: what is told by itself goes by its text, all else by "name=value"."""
    if isinstance(values, Mapping):
        return [(str(key), key) for key in values]
    return [(_label(name, value), value) for value in values]


def _label(name: str, value: Any) -> str:
    text = str(getattr(value, "__name__", value))
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    return text if isinstance(value, str) else f"{name}={text}"
