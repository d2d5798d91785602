"""The arrays by which the other tests are thinned cover what they say."""

from __future__ import annotations

import itertools

import covering as module
import pytest
from covering import covering

PARAMETERS = {"a": "uvwxy", "b": (True, False), "c": (1, 2, 3), "d": {"one": 1, "two": 2}, "e": (0.5, None)}


@pytest.mark.parametrize("strength", [2, 3])
def test_every_tuple_of_values_occurs(strength, monkeypatch):
    monkeypatch.setattr(module, "FULL", False)
    rows = [row.values for row in covering(strength, **PARAMETERS)]
    columns = [list(values) for values in PARAMETERS.values()]
    for places in itertools.combinations(range(len(columns)), strength):
        wanted = set(itertools.product(*(columns[i] for i in places)))
        assert {tuple(row[i] for i in places) for row in rows} == wanted
    assert len(rows) == len(set(rows)) < 120 / (2 if strength == 3 else 6)


def test_the_whole_product_when_asked_and_when_nothing_is_left_out(monkeypatch):
    whole = list(itertools.product(*PARAMETERS.values()))
    monkeypatch.setattr(module, "FULL", True)
    assert [row.values for row in covering(2, **PARAMETERS)] == whole
    monkeypatch.setattr(module, "FULL", False)
    assert [row.values for row in covering(5, **PARAMETERS)] == whole
    assert len(covering(2, a="uvw", b=(1, 2))) == 6


def test_ids_tell_the_values():
    import torch

    row, *_ = covering(2, name=["bnf"], head={"soft-cap": 2.5}, bias=[True], dtype=[torch.float32], loss=[covering])
    assert row.id == "bnf-soft-cap-bias=True-float32-loss=covering"
