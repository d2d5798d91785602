"""Training on several ranks, in every wrapper, is training in one process on all of the data: a table of cells."""

from __future__ import annotations

import re
from pathlib import Path

import covering
import pytest
import wrapped
from covering import covering as rows
from wrapped import DATA, DDP, FSDP, OBJECTIVES, ZERO, Run

EXACT = 1e-6  # float32, relative to a tensor's norm
WRAPPERS = DDP | FSDP | ZERO
# What each column of the documents' table was run with
BF16 = ("ddp", "fsdp1", "fsdp2_norm", "fsdp2_tied", "zero2", "zero3")
LORA = ("ddp", "fsdp1", "fsdp2_layers", "zero2", "zero3")
SCORES = ("ddp", "fsdp1", "fsdp2", "fsdp2_norm", "zero3")
FOUR = ("ddp", "fsdp1", "fsdp2_norm")
PAGE = Path(__file__).parents[1] / "docs/integrate.md"
# the fast tests leave the further kinds of DDP out, and take fewer steps
REPLICAS, STEPS = (tuple(DDP), 5) if covering.FULL else (("ddp",), 2)

pytestmark = pytest.mark.xdist_group("ranks")
full, zero = pytest.mark.full, (pytest.mark.full, pytest.mark.deepspeed)


def marked(hows, *rest):
    """One cell for each, those of DeepSpeed marked."""
    return [pytest.param(how, *rest, marks=zero if how in ZERO else ()) for how in hows]


def static_and_unsynchronised(run):
    """torch's own limit: with static_graph, the first backward has to be a synchronised one."""
    return run.how == "ddp_static" and run.data == "accumulated"


def check(ranks, run, world=2, tolerance=EXACT):
    if static_and_unsynchronised(run):
        run = run._replace(data="synced")
    found = wrapped.errors(ranks(world)(wrapped.train, run)[0], wrapped.expected(run))
    assert max(found.values()) <= tolerance, f"{run}: {found}"


@pytest.mark.parametrize(("how", "objective", "data"), rows(2, how=(*REPLICAS, *FSDP), objective=OBJECTIVES, data=DATA))
def test_is_one_process(ranks, how, objective, data):
    check(ranks, Run(how, objective, data, steps=STEPS))


@full
@pytest.mark.deepspeed
@pytest.mark.parametrize(("how", "objective", "data"), rows(2, how=ZERO, objective=OBJECTIVES, data=DATA))
def test_deepspeed_is_one_process(ranks, how, objective, data):
    check(ranks, Run(how, objective, data))


@full
@pytest.mark.parametrize("objective", ["bnf", "mc_po"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("how", FOUR)
def test_four_ranks_are_one_process(ranks, how, data, objective):
    check(ranks, Run(how, objective, data, steps=3), world=4)


@pytest.mark.parametrize("how", marked(BF16))
@pytest.mark.parametrize("objective", ["bnf", *(pytest.param(name, marks=full) for name in ("dpo", "swepo"))])
def test_mixed_precision_loses_no_more_than_the_models_own_logits(ranks, how, objective):
    run = Run(how, objective, bf16=True, steps=1)
    right = wrapped.expected(run)
    loss, gradients = wrapped.distances(ranks(2)(wrapped.train, run)[0], right)
    dense_loss, dense_gradients = wrapped.distances(ranks(2)(wrapped.train, run._replace(dense=True))[0], right)
    assert 1e-4 < gradients <= 1.25 * dense_gradients  # that it is bf16
    assert loss <= 2 * dense_loss + 2**-8  # a rounding of the hidden states


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["dpo", "mc_po", "kto"])
def test_responses_cut_into_parts_are_one_process(ranks, objective, reduction):
    right = wrapped.in_one(objective, reduction)
    for found in ranks(2)(wrapped.by_parts, objective, reduction):
        assert found.loss == pytest.approx(right.loss, rel=EXACT)
        for name, gradient in right.gradients.items():
            assert (found.gradients[name] - gradient).norm() <= 2 * EXACT * gradient.norm(), name


def test_a_wrong_gradient_is_noticed(ranks):
    """Replicas that nothing keeps together: each has the gradient of its own data."""
    run = Run("bare", steps=1)
    assert wrapped.errors(ranks(2)(wrapped.train, run)[0], wrapped.expected(run))["gradients"] > 0.1


@pytest.mark.parametrize(
    ("how", "scored"),
    [
        *marked(SCORES, "scores"),
        *marked(("fsdp1", "fsdp2_norm", "zero3"), "loss"),
        *marked(("fsdp1", "fsdp2_norm", "zero3"), "pending"),
        *marked(("fsdp2", "fsdp2_norm", "zero3"), "own"),  # FSDP1 has no public way to shard its outermost unit again
        *marked(("fsdp1", "fsdp2"), "after"),
    ],
)
def test_scores_leave_the_weights_right(ranks, how, scored):
    """What runs without gradients between backward and step, or between forward and backward."""
    check(ranks, Run(how, "sum", scored=scored, steps=3))


@full
@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
@pytest.mark.parametrize("how", marked(WRAPPERS))
def test_checkpointing(ranks, how, checkpointing):
    if (how, checkpointing) == ("ddp_unused", "reentrant"):
        checkpointing = "plain"  # torch's own limit: DDP would look for parameters of a graph that isn't there yet
    check(ranks, Run(how, "sum", checkpointing=checkpointing, steps=3))


@full
@pytest.mark.compile
@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_compiled(ranks, compiled):
    check(ranks, Run("ddp", "sum", compiled=compiled, steps=3))


@pytest.mark.parametrize("how", marked(LORA))
def test_adapters_beside_their_base(ranks, how):
    check(ranks, Run(how, "dpo", lora=True, steps=3))


@pytest.mark.parametrize("attached_first", [False, True])
def test_accelerate(ranks, attached_first):
    """Its autocast is the one around DDP, to the bit; unwrapped, the model is in float32 again."""
    trained, before, after, right = ranks(2)(wrapped.with_accelerate, attached_first)[0]
    theirs = ranks(2)(wrapped.train, Run("ddp", bf16=True, steps=1))[0]
    assert max(wrapped.errors(trained, theirs).values()) <= EXACT
    assert before != after == right


def test_trainer(ranks):
    right = wrapped.by_sgd()
    found = ranks(2)(wrapped.with_trainer, True)
    for weights in found:
        worst = max((weights[name] - x).norm() / x.norm() for name, x in right.items())
        assert worst <= EXACT
    undivided = ranks(2)(wrapped.with_trainer, False)[0]
    assert max((undivided[name] - x).norm() / x.norm() for name, x in right.items()) > 1e-4


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("parts", "one process for each device"),
        ("bare", "expected what averages gradients over 2 processes"),
        ("fsdp1", "attached before it is wrapped in FSDP"),
        ("fsdp2_layers", "attached before it is wrapped in FSDP"),
        pytest.param("zero3", "attached before it is wrapped in ZeRO-3, .* load it before", marks=zero),
    ],
)
def test_refusals(ranks, what, said):
    assert all(re.search(said, answer) for answer in ranks(2)(wrapped.refused, what))


def table():
    """What is run above, as docs/integrate.md has it."""
    columns = ("float32", "bf16", "two micro-batches", "checkpointing", "four ranks", 'LoRA, `ref="base"`', "scores")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for how, name in WRAPPERS.items():
        accumulated = "synchronised" if static_and_unsynchronised(Run(how, data="accumulated")) else "yes"
        checkpointed = "not reentrant" if how == "ddp_unused" else "yes"
        cells = ["yes", *("yes" if how in column else "" for column in (BF16, FOUR, LORA, SCORES))]
        cells[2:2] = [accumulated, checkpointed]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_documents_name_what_is_run():
    assert table() in PAGE.read_text(encoding="utf-8"), table()
