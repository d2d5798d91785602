"""How often the host waits for the device, and how many kernels it launches: `tests/counting.py` counts on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from counting import Count, Methods, Operators, counted
from engine_suite import batch, ref_scores, small

from rgpb import TokenScores, fused_loss, linear_logprob
from rgpb.engine.chunks import MASS_TILE

SHAPE = (4, 6, 141, 24)
CASES = {
    "BNF, labels as bool": {"objective": "bnf"},
    "BNF, nothing ignored": {"objective": "bnf", "masked": False},
    "BNF, labels of ±1": {"objective": "bnf", "label": "int"},
    "BNF, packed": {"objective": "bnf", "packed": True},
    "DPO": {"objective": "dpo"},
    "DPO, packed": {"objective": "dpo", "packed": True},
    "DPO in two passes": {"objective": "dpo", "path": "two_pass"},
    "`linear_logprob`": {"objective": "scores"},
}
TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+), (\d+) \|$", TEXT, re.MULTILINE)
TABLE = {name: tuple(map(int, numbers)) for name, *numbers in ROWS}
MOST_WAITS, MOST_LAUNCHES = 3, 40  # of a call, and of BNF on a padded batch


def count(monkeypatch, objective, *, tokens=6, masked=True, packed=False, label="bool", **how):
    """Waits and launches of a call, by default on the row kernels, forward and backward."""
    how = {"impl": "triton"} | how
    hidden, head, target, ref_logits = batch((4, tokens, *SHAPE[2:]), torch.bfloat16, masked=masked)
    given = {}
    if objective == "swepo":
        given["rewards"] = torch.randn(len(target) // 2, 2)
    if objective in ("bnf", "dpo", "swepo"):
        given["ref"] = TokenScores(*(x.float() for x in ref_scores(ref_logits, target)[:3]))
    if objective == "bnf":
        good = torch.arange(len(target)) % 2 == 0
        given["label"] = good if label == "bool" else good.long() * 2 - 1
    if packed:
        given["cu_seqlens"] = torch.arange(0, target.numel() + 1, target.shape[1], dtype=torch.int32)
        hidden, target = hidden.detach().view(-1, SHAPE[-1]).requires_grad_(), target.view(-1)
        given |= {"ref": given["ref"].flat()} if "ref" in given else {}
    with counted(monkeypatch) as found:
        if objective == "scores":
            loss = linear_logprob(hidden, head, target, **how).logp.sum()
        else:
            loss = fused_loss(hidden, head, target, objective=objective, **given, **how)
            loss = loss[0] if how.get("return_metrics") else loss
        torch.autograd.grad(loss, [hidden, head.weight])
    return found


@pytest.mark.parametrize("case", CASES)
def test_waits_and_launches_are_those_of_the_documents(case, monkeypatch):
    """Forward and backward in one chunk; fewer launches than it says are no fault."""
    waits, launches, unread, launches_unread = TABLE[case]
    assert waits <= MOST_WAITS
    assert launches <= MOST_LAUNCHES or not case.startswith("BNF") or case == "BNF, packed"
    for validate, most in ((True, (waits, launches)), (False, (unread, launches_unread))):
        found = count(monkeypatch, validate=validate, **CASES[case])
        assert len(found.waits) == most[0], found
        assert len(found.launches) <= most[1], found


@pytest.mark.parametrize(("objective", "kernel"), [("bnf", "token_loss_kernel"), ("dpo", "target_kernel")])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_more_chunks_take_no_more_waits(objective, kernel, packed, monkeypatch):
    """How long pairs are is read with what else the door checks."""
    how = {"tokens": 40, "workspace": small(SHAPE, torch.bfloat16), "packed": packed}
    found = count(monkeypatch, objective, path="single", **how)
    assert found.launches.count(f"{kernel} (Triton)") > 1, found
    assert len(found.waits) == 2 + packed, found


def test_skipping_waits_for_nothing(monkeypatch):
    """In several chunks, with one launch each for the lists and the products of dX and of dW."""
    monkeypatch.setitem(MASS_TILE, "cpu", 64)
    how = {"tokens": 40, "workspace": 1 << 17, "path": "single"}
    found = count(monkeypatch, "dpo", grad_tolerance=0.1, **how)
    chunks = found.launches.count("head_kernel (Triton)")
    assert chunks > 1, found
    assert found.launches.count("hidden_kernel (Triton)") == chunks
    assert found.launches.count("list_kernel (Triton)") == 2 * chunks
    assert len(found.waits) == len(count(monkeypatch, "dpo", **how).waits), found


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize(
    "how",
    [
        {"objective": "bnf", "label": "int"},
        {"objective": "bnf", "packed": True, "return_metrics": True},
        {"objective": "bnf", "tokens": 40, "workspace": small(SHAPE, torch.bfloat16)},
        {"objective": "dpo"},
        {"objective": "dpo", "packed": True, "return_metrics": True},
        {"objective": "swepo"},
        {"objective": "mle + 0.5*sequence_unlikelihood"},
        {"objective": "scores"},
        {"objective": "dpo", "impl": "torch"},
        {"objective": "scores", "impl": "torch"},
    ],
    ids=lambda how: ", ".join(map(str, how.values())),
)
def test_nothing_waits_where_nothing_is_validated(how, masked, monkeypatch):
    """As a CUDA graph asks for: nothing is read, and nothing copied from the host."""
    found = count(monkeypatch, masked=masked, validate=False, **how)
    assert not found.waits, found
    assert not found.copies, found


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "a mask written to": lambda x: x.index_put_((x > 0,), torch.ones(2)),
    "repeats of unknown sum": lambda x: x.repeat_interleave(x.long()),
}
NOT_WAITING = {
    "a view": lambda x: x[1:],
    "an index": lambda x: x[torch.tensor([0, 1])],
    "a fill by a mask": lambda x: x.masked_fill_(x > 0, 1.0),
    "one value by a mask": lambda x: x.index_put_((x > 0,), torch.ones(())),
    "repeats of known sum": lambda x: x.repeat_interleave(x.long(), output_size=2),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
def test_the_counter_knows_what_waits(name):
    found = Count()
    with Operators(found), Methods(found):
        (WAITING | NOT_WAITING)[name](torch.tensor([1.0, 1.0, 0.0]))
    assert len(found.waits) == (name in WAITING), found


def test_the_counter_knows_what_is_launched():
    found, x = Count(), torch.ones(4, 4)
    with Operators(found), Methods(found):
        x[1:].view(-1, 2).t().reshape(3, 4).add(1)
        torch.empty(3), x.new_zeros(0), x.detach(), x.unbind(), x.expand(2, 4, 4)
        torch.mm(x, x, out=torch.empty(4, 4))
    assert found.launches == ["clone", "add", "mm"], found
