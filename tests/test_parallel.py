"""Several ranks against one process on the whole: sharded heads, batches and sequences, and what travels between them.

Dimensions: B responses, T padded length, V vocabulary, H hidden size.
"""

from __future__ import annotations

import pytest
import rank_cells as cells
import torch

from rgpb import OBJECTIVES, fused_loss
from rgpb.engine.plan import shard_traffic
from rgpb.objectives import RunningMean

pytestmark = pytest.mark.xdist_group("ranks")

VOCAB = {2: (52, 0), 4: (20, 1, 9, 0)}  # the last has the rest
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
SOME = ("bnf", "dpo", "swepo", "kto", "mle + 0.5*dpo", "entropic")
MORE = ("mle", "unlikelihood", "bco", "rdpo", "infonca", "sequence_unlikelihood", "orpo", "bnf + mle")


@pytest.fixture(autouse=True)
def _only_here():
    """The objective of these tests is none of the library's."""
    yield
    OBJECTIVES.pop("entropic", None)


def close(found, expected, tolerance):
    """That the norm of the difference is at most that part of the norm."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def compare(made, name, i, shape, tolerance, vocab=None, data=None, sequence=None, keywords=None, **given):
    """The ranks' results of one loss against one process."""
    one = cells.run(cells.problem(**given), name, **(keywords or {}))
    ranks = torch.arange(len(made)).view(shape)
    averaged = shape[1] * shape[2]  # DDP and FSDP take the mean over these
    first = [made[r][i] for r in ranks[0].flatten()]
    close(sum(x["loss"] for x in first) / averaged, one["loss"], tolerance)
    for kind in ("weight", "bias"):
        if one[kind] is not None:
            parts = [sum(made[r][i][kind] for r in row.flatten()) / averaged for row in ranks]
            close(torch.cat(parts) if vocab else parts[0], one[kind], tolerance)
    responses, length = one["hidden"].shape[:2]
    for v in range(shape[0]):
        hidden = torch.full_like(one["hidden"], torch.nan)
        for d in range(shape[1]):
            rows = cells.units(name, data)[d] if data else torch.arange(responses)
            for s in range(shape[2]):
                columns = torch.arange(length)[cells.cuts(sequence, length)[s] if sequence else slice(None)]
                own = made[ranks[v, d, s]][i]["hidden"]
                hidden[rows[:, None], columns] = own.reshape(len(rows), len(columns), cells.H) / averaged
        close(hidden, one["hidden"], tolerance)
    for result in (made[r][i] for r in ranks.flatten()):
        assert sorted(result["metrics"]) == sorted(one["metrics"])
        for key, value in one["metrics"].items():
            torch.testing.assert_close(result["metrics"][key], value, msg=key)


def check(pool, names, shape, **asked):
    made = pool(cells.sharded, names, shape, **asked)
    asked.pop("pack", None)
    for i, name in enumerate(names):
        compare(made, name, i, shape, TOLERANCE[asked.get("dtype", "float64")], **asked)


METRICS = {"return_metrics": True}
EVERYTHING = ("bias", "softcap", "scale")
LAYOUTS = {  # the last length of a cut is what is left
    "head": ((4, 1, 1), {"vocab": VOCAB[4]}),
    "head, float32": ((4, 1, 1), {"vocab": VOCAB[4], "head": EVERYTHING, "dtype": "float32"}),
    "batch, one rank without responses": ((1, 4, 1), {"data": (1, 2, 0, 1), "keywords": METRICS}),
    "responses, one rank without tokens": ((1, 1, 4), {"sequence": (2, 0, 1, 2), "keywords": METRICS}),
    "responses, packed, float32": ((1, 1, 4), {"sequence": (2, 0, 1, 2), "pack": True, "dtype": "float32"}),
    "batch, packed, float32": ((1, 4, 1), {"data": (1, 2, 1, 0), "pack": True, "dtype": "float32"}),
    "batch and responses": ((1, 2, 2), {"data": (3, 0), "sequence": (3, 2), "keywords": METRICS}),
    "head and batch": ((2, 2, 1), {"vocab": (20, 0), "data": (1, 0), "keywords": METRICS}),
    "head and responses": ((2, 1, 2), {"vocab": (20, 0), "sequence": (1, 4), "head": EVERYTHING}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_make_what_one_process_makes(ranks, layout):
    shape, asked = LAYOUTS[layout]
    check(ranks(4), SOME, shape, **asked)


@pytest.mark.parametrize("layout", ["head and batch", "batch and responses", "responses, one rank without tokens"])
def test_other_losses(ranks, layout):
    shape, asked = LAYOUTS[layout]
    check(ranks(4), MORE, shape, **asked)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mc_po"])
def test_every_loss(ranks, layout, name):
    shape, asked = LAYOUTS[layout]
    check(ranks(4), (name,), shape, **asked)


@pytest.mark.full
@pytest.mark.parametrize("parts", [(1, 0), (52, 0), (26, 0)])
@pytest.mark.parametrize("head", [(), EVERYTHING])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_ranks(ranks, parts, head, dtype):
    check(ranks(2), SOME, (2, 1, 1), vocab=parts, head=head, dtype=dtype)


def test_sums_over_a_batch(ranks):
    check(ranks(4), SOME, (1, 4, 1), data=(1, 2, 0, 1), keywords={"reduction": "sum"})


def test_values_of_units_are_as_they_are(ranks):
    made = ranks(4)(cells.sharded, ("dpo",), (1, 4, 1), data=(1, 2, 0, 1), keywords={"reduction": "none"})
    one = cells.run(cells.problem(), "dpo", reduction="none")
    torch.testing.assert_close(torch.cat([x[0]["loss"] for x in made]), one["loss"])
    torch.testing.assert_close(sum(x[0]["weight"] for x in made), one["weight"])


# -- the batch --------------------------------------------------------------------------------------------------------


def test_a_running_mean_takes_the_whole_batch_in(ranks):
    delta, expected = RunningMean(), []
    for seed in (0, 1):
        cells.run(cells.problem(seed=seed), "bco", delta=delta)
        expected.append(float(delta.mean))
    for found, count in ranks(4)(cells.running, (1, 5, 2, 0)):
        assert found == pytest.approx(expected, rel=1e-12)
        assert count == float(delta.count)


def test_mismatched_completions_on_some_ranks(ranks):
    made = ranks(4)(cells.mismatched, (2, 1, 2))
    one = cells.run(cells.problem(), "kto", z0=torch.arange(1.0, 6.0))
    close(sum(x["weight"] for x in made) / 4, one["weight"], 1e-12)


# -- a sharded head ---------------------------------------------------------------------------------------------------


def scores_agree(made, one, tolerance=1e-12):
    for result in made:
        for found, expected in zip(result["scores"], one["scores"], strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        close(result["hidden"], one["hidden"], tolerance)
    close(torch.cat([x["weight"] for x in made]), one["weight"], tolerance)


def test_scores_with_entropy(ranks):
    made = ranks(4)(cells.scores_of, VOCAB[4], head=EVERYTHING)
    scores_agree(made, cells.scores(cells.problem(head=EVERYTHING)))


def test_rows_that_a_bias_rules_out(ranks):
    """A slice without any possible token adds nothing, and no NaN."""
    made = ranks(4)(cells.ruled_out, (20, 6, 9, 0))
    p = cells.without(cells.problem(head=("bias",)), cells.cuts((20, 6, 9, 0)))
    scores_agree(made, cells.scores(p))


def test_confident_tokens(ranks):
    """The rank that has the target leaves it out of the sum: no cancellation where p rounds to 1."""
    made = ranks(4)(cells.confident, VOCAB[4])
    p = cells.certain(cells.problem("float32"))
    exact = cells.linear_logprob(p["hidden"].double(), p["weight"].double(), p["target"]).log_odds
    for found in made:
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_summed_before_they_are_rounded(ranks, dtype):
    """No further from float64 than one process's gradients are: its error, and one rounding of each number."""
    made = ranks(4)(cells.sharded, ("dpo",), (4, 1, 1), vocab=VOCAB[4], dtype=dtype, head=EVERYTHING)
    p = cells.problem(dtype, head=EVERYTHING)
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in p.items()}
    exact, one = cells.run(wide, "dpo"), cells.run(p, "dpo")
    rounding = torch.finfo(getattr(torch, dtype)).eps / 2

    def error(found, kind):
        return float((found.double() - exact[kind]).norm() / exact[kind].norm())

    for result in (x[0] for x in made):
        assert result["hidden"].dtype == getattr(torch, dtype)
        assert error(result["hidden"], "hidden") <= max(error(one["hidden"], "hidden"), rounding)
    weight = torch.cat([x[0]["weight"] for x in made])
    assert error(weight, "weight") <= error(one["weight"], "weight") + rounding


def test_autocast(ranks):
    made = ranks(4)(cells.autocast, VOCAB[4], head=EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        one = cells.run(cells.problem("float32", head=EVERYTHING), "dpo")
    for result in made:
        close(result["hidden"], one["hidden"], 2**-7)
    close(torch.cat([x["weight"] for x in made]), one["weight"], 2**-7)


@pytest.mark.parametrize("cut", [((4, 1, 1), {"vocab": VOCAB[4]}), ((2, 1, 2), {"vocab": (20, 0), "sequence": (3, 2)})])
def test_ranks_with_the_same_responses_draw_the_same(ranks, cut):
    shape, asked = cut
    losses = ranks(4)(cells.drawn_alike, shape, **asked)
    assert [loss for (loss,) in losses] == pytest.approx([losses[0][0]] * 4)


@pytest.mark.parametrize("entropy", [False, True])
def test_what_travels(ranks, entropy):
    """The formula of `rgpb plan`, byte by byte; masked rows stay at home."""
    name, p = "entropic" if entropy else "mle", cells.problem("float32")
    tokens = int((p["target"] >= 0).sum())
    expected = shard_traffic(tokens, cells.H, 4, entropy)
    for ((_, seen),) in ranks(2)(cells.vocab_parallel, (name,), VOCAB[2], {}, dtype="float32"):
        assert {kind for kind, _ in seen} == {"all_reduce"}
        assert sum(size for _, size in seen) == sum(expected)
        assert seen[-1] == ("all_reduce", expected.hidden)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "change", "keywords", "text"),
    [
        ((20, 0, 9, 0), {}, {}, "rows: expected at least 1 on each rank, got [20, 0, 9, 24]"),
        (VOCAB[4], {}, {"path": "single"}, "path: expected 'auto' or 'two_pass', since the head is sharded"),
        (VOCAB[4], {}, {"grad_tolerance": "auto"}, "grad_tolerance: expected None with a sharded head"),
        (VOCAB[4], {"target": torch.full((12, 5), cells.V)}, {}, f"target: expected values in [0, {cells.V})"),
        (VOCAB[4], {"hidden": torch.full((12, 5, cells.H), torch.nan).double()}, {}, "hidden: expected finite values"),
    ],
)  # fmt: skip
def test_every_rank_refuses_the_same(ranks, parts, change, keywords, text):
    for said in ranks(4)(cells.refused, parts, change, keywords):
        assert said is not None
        assert said.startswith(text)


def test_a_single_pass_of_tokens_on_several_ranks(ranks):
    for said in ranks(4)(cells.refused_of_sequences, {"path": "single"}):
        assert said.startswith("path: expected 'auto' or 'two_pass', since sequence_group: coefficients are known")


@pytest.mark.parametrize("name", ["data_group", "sequence_group"])
def test_what_is_no_group(name):
    p = cells.problem()
    with pytest.raises(ValueError, match=f"{name}: expected a torch.distributed process group .* got str"):
        fused_loss(p["hidden"], p["weight"], p["target"], objective="mle", **{name: "world"})


def test_what_is_no_shard():
    p = cells.problem()
    head = cells.LMHead(p["weight"], shard="first")
    with pytest.raises(ValueError, match="head.shard: expected a VocabShard or None, got str"):
        fused_loss(p["hidden"], head, p["target"], objective="mle")
    head = cells.LMHead(p["weight"], shard=cells.VocabShard(None, 0, cells.V))
    with pytest.raises(ValueError, match="head.shard.group: expected a torch.distributed process group"):
        fused_loss(p["hidden"], head, p["target"], objective="mle")


@pytest.mark.full
@pytest.mark.parametrize("cut", [{"vocab": (20, 0)}, {"sequence": (2, 0)}])
def test_compiled(ranks, cut):
    """Collectives may break the graph; the result is the same."""
    for compiled, eager in ranks(2)(cells.compiled, **cut):
        for kind in ("loss", "hidden", "weight"):
            close(compiled[kind], eager[kind], 1e-6)
