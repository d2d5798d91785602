"""How often the host waits for the device, and how many kernels it launches: `tests/counting.py` counts on a CPU."""

from __future__ import annotations

import pytest
import torch
from counting import Count, Methods, Operators, counted
from engine_suite import batch, ref_scores, small

from rgpb import TokenScores, fused_loss, linear_logprob

SHAPE = (4, 6, 141, 24)
# of forward and backward in one chunk, with ignored positions: (objective and how, waits, most launches)
CASES = {
    "bnf": ({"objective": "bnf"}, 2, 40),
    "bnf, nothing ignored": ({"objective": "bnf", "masked": False}, 2, 31),
    "bnf, labels of ±1": ({"objective": "bnf", "label": "int"}, 2, 41),
    "bnf, packed": ({"objective": "bnf", "packed": True}, 3, 44),
    "dpo": ({"objective": "dpo"}, 2, 86),
    "dpo, packed": ({"objective": "dpo", "packed": True}, 3, 92),
    "dpo in two passes": ({"objective": "dpo", "path": "two_pass"}, 3, 122),
    "scores": ({"objective": "scores"}, 2, 82),
}


def count(monkeypatch, objective, *, tokens=6, masked=True, packed=False, label="bool", **how):
    """Waits and launches of a call on the row kernels, forward and backward."""
    hidden, head, target, ref_logits = batch((4, tokens, *SHAPE[2:]), torch.bfloat16, masked=masked)
    given = {}
    if objective in ("bnf", "dpo"):
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
            loss = linear_logprob(hidden, head, target, impl="triton", **how).logp.sum()
        else:
            loss = fused_loss(hidden, head, target, objective=objective, impl="triton", **given, **how)
        torch.autograd.grad(loss, [hidden, head.weight])
    return found


@pytest.mark.parametrize("case", CASES)
def test_waits_and_launches_of_a_call(case, monkeypatch):
    how, waits, launches = CASES[case]
    found = count(monkeypatch, **how)
    assert len(found.waits) == waits, found
    assert len(found.launches) <= launches, found


@pytest.mark.parametrize(("objective", "kernel"), [("bnf", "token_loss_kernel"), ("dpo", "gradients_kernel")])
def test_more_chunks_take_no_more_waits(objective, kernel, monkeypatch):
    """How long pairs are is read with what else the door checks."""
    found = count(monkeypatch, objective, tokens=40, path="single", workspace=small(SHAPE, torch.bfloat16))
    assert found.launches.count(f"{kernel} (Triton)") > 1, found
    assert len(found.waits) == 2, found


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
