"""Random calls against the oracle (`fuzz.py`): a slice of the seeds, those that found something, and what the harness
would notice."""

from __future__ import annotations

import math
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz import Case, Wrong

from rgpb import OBJECTIVES

FOUND = [
    line.partition("  #")[0]
    for line in Path(__file__).with_name("fuzz_cases.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def test_random_calls_equal_the_oracle():
    for seed in range(40):
        fuzz.check(fuzz.drawn(seed))


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_more_random_calls(part):
    for seed in range(1000 + 250 * part, 1250 + 250 * part):
        fuzz.check(fuzz.drawn(seed))


@pytest.mark.parametrize("line", FOUND)
def test_what_was_found_stays_right(line):
    fuzz.check(eval(line, {"Case": Case}))


def test_a_case_is_its_seed_and_its_text():
    for seed in range(50):
        case = fuzz.drawn(seed)
        assert fuzz.drawn(seed) == case
        assert eval(str(case), {"Case": Case, "inf": math.inf}) == case
        first, again = (fuzz.Given(case).parts for _ in range(2))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again))


def test_cases_reach_everything():
    """All objectives, types, paths, layouts and refusals within some thousand seeds."""
    cases = [fuzz.drawn(seed) for seed in range(4000)]
    assert {case.name for case in cases} >= set(fuzz.NAMES) | {"scores"}
    for field, values in {
        "dtype": fuzz.DTYPES, "path": ("auto", "single", "two_pass", "frozen", "forward"), "packed": (True, False),
        "impl": (*fuzz.IMPLS, "auto"), "hidden_strides": fuzz.STRIDES, "weight_strides": fuzz.STRIDES,
        "target_strides": fuzz.STRIDES, "reduction": ("mean", "sum", "none"), "ref": ("scores", "logp", "sums", "pair"),
        "workspace": ("default", "least", "twice"), "kept": (True,), "quantised": (True,), "tied": (True,),
        "spoil": fuzz.SPOILS, "backwards": (2,), "upstream": ("one", "number", "random"), "validate": (False,),
    }.items():  # fmt: skip
        assert {getattr(case, field) for case in cases} >= set(values), field
    for name in fuzz.NAMES:
        given = {option for case in cases if case.name == name for option, _ in case.options}
        assert given >= set(OBJECTIVES[name].options or ()) - {"generator"}, name


def test_a_fault_is_seen_and_made_small(monkeypatch):
    """A gradient whose sign is wrong from V = 7 on, in float32 only."""
    right = fuzz.Given.ours

    def wrong(given, keywords, workspace):
        loss, gradients, metrics = right(given, keywords, workspace)
        if given.case.vocab >= 7 and given.case.dtype == "float32":
            gradients = [-x for x in gradients]
        return loss, gradients, metrics

    monkeypatch.setattr(fuzz.Given, "ours", wrong)
    case = Case(
        3, "simpo", "torch", "float32", (3, 1, 2, 4), vocab=29, width=8, bias=True, holes=0.2, upstream="number"
    )
    with pytest.raises(Wrong, match="gradient 1"):
        fuzz.check(case)
    small = fuzz.shrunk(case)
    assert (small.vocab, small.dtype, small.width, small.bias) == (7, "float32", 1, False)
    assert sum(small.lengths) <= 2
    assert "fuzz.check(fuzz.Case(" in fuzz.program(small)


def test_a_refusal_names_argument_and_expectation():
    assert fuzz.refusal(ValueError("options of dpo: expected beta to be a number above 0, got -1")) == "options"
    with pytest.raises(Wrong):
        fuzz.refusal(ValueError("beta is wrong"))


@pytest.mark.full
def test_the_soak_sees_what_stays(monkeypatch):
    held = []
    right = fuzz.Given.ours
    said = []
    monkeypatch.setattr(fuzz.Given, "ours", lambda *given: held.append(torch.zeros(3)) or right(*given))
    assert not fuzz.soak(2500, fuzz.IMPLS, said.append)
    assert any("tensors" in line and "grows" in line for line in said)
