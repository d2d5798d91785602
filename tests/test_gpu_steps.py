"""The parts `steps` and `training` of `python -m benchmarks.gpu` on a CPU, with tiny models."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ isn't installed

from benchmarks.gpu import journal, steps
from rgpb import LMHead, hf, reference
from rgpb.bench import cases, report
from rgpb.bench.cases import Shape

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="expects Triton to be refused on a CPU"
)

SETTINGS = journal.Settings("cpu", rounds=1)


def run(folder, part, **more):
    """Outcome, and the JSON of the part."""
    log, settings = journal.Journal(folder, part), SETTINGS._replace(**more)
    make, shown = {
        "steps": (lambda: steps.tasks(log, settings), lambda rows: {"table": rows}),
        "training": (lambda: steps.training(None, settings), steps.summary),
    }[part]
    outcome = journal.work(log, make(), settings, {"device": "CPU"}, shown)
    return outcome, json.loads(log.json.read_text())


def only(pattern):
    return {"only": journal.re.compile(pattern)}


# -- the two ways to a loss --------------------------------------------------------------------------------------------


@pytest.fixture
def ragged():
    """Model, a batch of responses of several lengths, and reference scores; in float64."""
    model = steps.make_llama(steps.MODELS["cpu"].sizes, torch.float64, "cpu", "eager", 0)
    ids = torch.randint(257, (4, 9))
    labels = ids.clone()
    for response, (first, end) in enumerate(((2, 9), (3, 7), (1, 8), (4, 6))):
        labels[response, :first] = labels[response, end:] = steps.IGNORE
    batch = {"input_ids": ids, "labels": labels}
    with hf.evaluating(model):
        logp = hf.token_scores(model, batch).logp
    return model, batch, logp + 0.3 * torch.randn(4, 9).double() * (logp != 0)


@pytest.mark.parametrize("loss", ["mle", "bnf", "dpo"])
@pytest.mark.parametrize("impl", steps.IMPLS)
def test_both_are_the_oracle_s(loss, impl, ragged):
    """Loss and gradients, with masked positions, in float64."""
    model, batch, ref = ragged
    formula, head = reference.LOSSES[loss], hf.read_head(model)
    ours = steps.loss_value(model, batch, loss, impl, None if loss == "mle" else ref)
    target = hf.aligned_targets(batch["labels"])
    hidden = hf.hidden_states(model, batch["input_ids"])
    exact = formula(
        hidden, LMHead(head.weight), target, ref=ref if formula.needs_ref else None,
        label=torch.tensor([True, True, False, False]) if formula.needs_label else None,
    )  # fmt: skip
    precise = impl == "fused"  # transformers' users raise logits to float32
    close = {"rtol": 1e-9, "atol": 1e-12} if precise else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(ours.double(), exact, **close)
    parameters = list(model.parameters())
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(exact, parameters)):
        torch.testing.assert_close(one, other, **close)


def test_naive_is_the_papers_listing():
    """That of `rgpb.bench.cases`, where nothing is masked; only the labels stand otherwise."""
    batch = cases.make_batch(Shape(32, 8, 61), torch.float32, "cpu")
    batch = batch._replace(label=2.0 * steps.preferred(batch.target) - 1)
    log_p = cases.log_probs(batch.hidden, batch.weight)
    for loss in ("mle", "bnf", "dpo"):
        terms = steps.scored(loss, log_p, batch.target)
        ours = steps.plain_loss(loss, *terms, torch.ones_like(batch.target).bool(), batch.ref)
        torch.testing.assert_close(ours, cases.NAIVE[loss](log_p, batch))


def test_a_certain_token_leaves_naive_bnf_finite():
    z = torch.tensor([[[90.0, 0.0, 1.0]], [[90.0, 0.0, 1.0]]], requires_grad=True)
    target, ref = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), -1e-3)
    terms = steps.scored("bnf", z.log_softmax(-1), target)
    steps.plain_loss("bnf", *terms, torch.ones(2, 1).bool(), ref).backward()
    assert z.grad.isfinite().all()


# -- steps -------------------------------------------------------------------------------------------------------------


def test_the_model_is_llama_s():
    """Sizes of the model card; transformers takes the angles' base by a name that changed."""
    made = steps.MODELS["cuda"]
    config = steps.LlamaConfig(**made.sizes)
    with torch.device("meta"):
        model = steps.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400
    assert model.lm_head.weight is model.model.embed_tokens.weight
    llama = steps.Llama(SETTINGS)
    angles = llama.model.model.rotary_emb.inv_freq
    torch.testing.assert_close(angles, 500000.0 ** -(torch.arange(0, 8, 2) / 8))
    assert all(layer.gradient_checkpointing for layer in llama.model.model.layers)
    assert all(module.training for module in llama.model.modules())


def test_steps(tmp_path):
    outcome, made = run(tmp_path, "steps")
    assert outcome[:2] == (0, 0)
    rows = made["rows"]
    keys = [(row["length"], row["loss"], row["impl"]) for row in rows]
    assert keys == [(n, loss, impl) for n in (16, 33) for loss in ("bnf", "dpo") for impl in ("naive", "fused")]
    weights = rows[0]["parameters"] * 4
    for row, naive in zip(rows, [row for row in rows if row["impl"] == "naive" for _ in range(2)]):
        assert row["status"] == "ok"
        assert row["steps"] == steps.LEAST_STEPS
        assert row["seconds_20"] <= row["seconds"] <= row["seconds_80"]
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["seconds"])
        assert row["peak_bytes"] is None
        assert 3 * weights < row["base_bytes"] < 3 * weights + 1000  # and the number of the step
        assert row["value"] == pytest.approx(row["expected"], abs=1e-5)
        assert row["gradient_error"] < 1e-5
        if row["impl"] == "fused":
            assert row["over_naive"] == pytest.approx(row["seconds"] / naive["seconds"])
            assert row["path"] in cases.PATHS
            assert row["kernels"] in ("cpp", "torch")
        if row["loss"] == "dpo":
            assert row["value"] == pytest.approx(math.log1p(math.exp(-1)), abs=1e-5)
    shown = report.markdown(report.read(tmp_path / "steps.json"))
    assert "| tiny Llama | " in shown

    outcome, again = run(tmp_path, "steps")  # nothing more to do
    assert (outcome, again) == ((0, 0, 0), made)


def test_a_step_moves_no_weight():
    """And does all of its work: AdamW's moments are no longer 0."""
    llama = steps.Llama(SETTINGS)
    before = [p.clone() for p in llama.model.parameters()]
    assert llama.optimizer.defaults["lr"] == 0
    llama.graded(16, "dpo", "naive")
    llama.update()
    for old, new in zip(before, llama.model.parameters()):
        assert torch.equal(old, new)
        assert new.grad is None
        assert llama.optimizer.state[new]["exp_avg"].abs().max() > 0


def test_a_run_of_steps_goes_on(tmp_path):
    """Fused is compared with a naive row of an earlier run."""
    assert run(tmp_path, "steps", minutes=0, **only("16 . bnf"))[0] == (0, 1, 1)
    outcome, made = run(tmp_path, "steps", **only("16 . bnf"))
    assert outcome[:2] == (0, 0)
    assert [row["impl"] for row in made["rows"]] == ["naive", "fused"]
    assert made["rows"][1]["over_naive"] > 0


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan", "naive"])
def test_no_time_for_a_wrong_step(wrong, tmp_path, monkeypatch):
    """A row that failed has no time, and the next one has a model without its NaN."""
    loss_value = steps.loss_value

    def broken(model, batch, loss, impl, ref=None):
        value = loss_value(model, batch, loss, impl, ref)
        if (loss, impl) != ("bnf", "naive" if wrong == "naive" else "fused"):
            return value
        if wrong == "gradient":
            return 1.01 * value - 0.01 * value.detach()
        return value * torch.nan if wrong == "nan" else value + 1e-3

    monkeypatch.setattr(steps, "loss_value", broken)
    outcome, made = run(tmp_path, "steps", **only(" 16 "))
    assert outcome.failed == 1
    rows = {(row["loss"], row["impl"]): row for row in made["rows"]}
    failed = rows.pop(("bnf", "naive" if wrong == "naive" else "fused"))
    assert failed["status"] == "FAILED"
    assert failed["seconds"] is failed["tokens_per_second"] is failed["over_naive"] is None
    assert {row["status"] for row in rows.values()} == {"ok"}
    if wrong == "naive":
        assert rows["bnf", "fused"]["over_naive"] is None


def test_naive_runs_out_of_memory(tmp_path, monkeypatch):
    """Then the rows after it run, on the same model, which holds no gradient of the step that was cut short."""
    log_probs, models, held = steps.log_probs, [], []

    def full(model, batch):
        models.append(model)
        made = log_probs(model, batch)
        if batch["input_ids"].shape[1] == 16:
            made.sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    tidy = steps.Llama.tidy

    def watched(llama, status):
        tidy(llama, status)
        held.append(sum(p.grad is not None for p in llama.model.parameters()))

    monkeypatch.setattr(steps, "log_probs", full)
    monkeypatch.setattr(steps.Llama, "tidy", watched)
    outcome, made = run(tmp_path, "steps", **only("dpo"))
    assert outcome[:2] == (0, 0)
    assert [row["status"] for row in made["rows"]] == ["out of memory", "ok", "ok", "ok"]
    assert {row["over_naive"] is None for row in made["rows"][:3]} == {True}
    assert made["rows"][3]["over_naive"] > 0
    assert len({*map(id, models)}) == 1
    assert held[:4] == [0] * 4


def test_an_error_of_the_library_is_a_failure(tmp_path, monkeypatch):
    def raises(*arguments, **keywords):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(hf, "fused_loss", raises)
    outcome, made = run(tmp_path, "steps", **only("16 . dpo"))
    assert [row["status"] for row in made["rows"]] == ["ok", "error: RuntimeError: no such kernel"]
    assert outcome.failed == 1


def test_what_a_loss_may_be_off():
    """Naive rounds its logits, the library doesn't; the errors of a sum grow with its root."""
    assert steps.tolerance("bnf", "fused", "bf16", 4096) == steps.tolerance("bnf", "naive", "fp32", 4096) == 1e-4
    assert steps.tolerance("bnf", "naive", "bf16", 4096) == 2**-7
    assert steps.tolerance("dpo", "naive", "bf16", 5000) == pytest.approx(10 * 2**-7)


def test_naive_in_bfloat16_is_within_its_tolerance(tmp_path):
    outcome, made = run(tmp_path, "steps", dtype="bf16")
    assert outcome[:2] == (0, 0)
    assert {row["status"] for row in made["rows"]} == {"ok"}
    assert max(abs(row["value"] - row["expected"]) for row in made["rows"] if row["impl"] == "naive") > 1e-5


# -- training ----------------------------------------------------------------------------------------------------------


def test_training(tmp_path):
    outcome, made = run(tmp_path, "training")
    assert outcome[:2] == (0, 0)
    rows = {(row["loss"], row["seed"], row["impl"]): row for row in made["rows"]}
    assert [*rows] == [(x, s, i) for s in steps.SEEDS for x in ("mle", "bnf", "dpo") for i in ("naive", "fused")]
    course = steps.COURSES["cpu"]
    for (loss, seed, impl), row in rows.items():
        assert row["status"] == "ok"
        assert len(row["curve"]) == row["steps"] == course.steps
        assert len({*row["curve"]}) > 1  # it trains
        assert row["curve"] == pytest.approx(rows[loss, seed, "naive"]["curve"], abs=3e-2)
        assert row["eval"] == pytest.approx(rows[loss, seed, "naive"]["eval"], abs=3e-2)
        if impl == "fused":
            assert row["curve"] != rows[loss, seed, "naive"]["curve"]  # it was in bfloat16
        if loss == "dpo":
            assert row["curve"][0] == pytest.approx(math.log(2), abs=1e-2)  # it starts from its reference
    assert rows["mle", 0, "naive"]["curve"] != rows["mle", 1, "naive"]["curve"]
    table = made["table"]
    assert [(line["loss"], line["seeds"], line["failed"], line["steps"]) for line in table] == [
        (loss, 3, 0, course.steps) for loss in ("mle", "bnf", "dpo")
    ]
    for line in table:
        assert 0 < line["difference"] < 0.03
        assert line["largest_smoothed"] < 0.03
        assert line["seed_std"] > 0
    assert table[0]["inside"] == 1
    assert "| mle | 3 | 0 | 6 | " in report.markdown(report.read(tmp_path / "training.json"))
    assert run(tmp_path, "training") == ((0, 0, 0), made)


def test_a_run_of_training_goes_on(tmp_path):
    """Another process makes the same start again."""
    whole = run(tmp_path / "a", "training", **only(r"(mle|bnf) . 1 "))[1]["rows"]
    assert run(tmp_path / "b", "training", minutes=0, **only(r"(mle|bnf) . 1 "))[0] == (0, 3, 1)
    assert run(tmp_path / "b", "training", **only(r"(mle|bnf) . 1 "))[1]["rows"] == whole


def test_the_start_is_trained_once(monkeypatch):
    trained, train = [], steps.School.train

    def counted(school, loss, seed, impl):
        trained.append((loss, seed, impl))
        return train(school, loss, seed, impl)

    monkeypatch.setattr(steps.School, "train", counted)
    for task in steps.training(None, SETTINGS):
        if " 2 " not in task.key:
            assert task.run()["status"] == "ok"
    assert len(trained) == len({*trained}) == 2 * 3 * 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_in_a_curve_fails(where, tmp_path, monkeypatch):
    """There the training ends, and takes no part in the table."""
    loss_value, calls = steps.loss_value, []

    def broken(model, batch, loss, impl, ref=None):
        value = loss_value(model, batch, loss, impl, ref)
        calls.append(impl)
        if (impl, calls.count("fused")) == ("fused", 3):
            if where == "loss":
                return value * torch.nan
            value.register_hook(lambda gradient: gradient * torch.nan)
        return value

    monkeypatch.setattr(steps, "loss_value", broken)
    outcome, made = run(tmp_path, "training", **only(r"mle . [01] "))
    assert outcome.failed == 1
    assert [row["status"] for row in made["rows"]] == ["ok", "FAILED", "ok", "ok"]
    assert [x is None for x in made["rows"][1]["curve"]] == [False, False, True]
    line = made["table"][0]
    assert (line["seeds"], line["failed"], line["seed_std"], line["inside"]) == (1, 1, None, None)


def test_the_table_tells_curves_apart(monkeypatch):
    """By hand: fused half a unit above naive for one half of the steps, and seeds one unit apart."""
    monkeypatch.setattr(steps, "SMOOTH", 2)

    def row(impl, seed, curve):
        return {"loss": "mle", "seed": seed, "impl": impl, "status": "ok", "eval": curve[-1], "curve": curve}

    naive = [row("naive", seed, [seed + 0.0] * 9) for seed in range(3)]
    fused = [row("fused", seed, [seed + 0.5] * 5 + [seed + 3.0] * 4) for seed in range(3)]
    line = steps.summary([*naive, *fused])["table"][0]
    assert line["seed_std"] == line["eval_std"] == 1
    assert line["difference"] == pytest.approx((5 * 0.5 + 4 * 3) / 9)
    assert line["largest_smoothed"] == 3
    assert line["inside"] == 0.5  # of 8 smoothed steps 4 lie before the jump
    assert (line["eval"], line["naive_eval"]) == (4, 1)
    assert steps.summary(naive)["table"][0]["inside"] is None
    assert steps.summary([]) == {"table": []}


def test_texts_are_words_of_a_large_vocabulary():
    """As many as threes of characters, and no two texts alike."""
    school = steps.School(SETTINGS)
    words, prompt = school.words
    course = school.course
    assert words.shape == (2, course.data + course.held, 9)
    assert prompt == 2
    assert words.max() < course.sizes["vocab_size"]
    assert words.max() > course.sizes["vocab_size"] // 2  # anywhere among them
    assert torch.equal(words[0, :, :prompt], words[1, :, :prompt])
    assert (words[0] != words[1]).any(1).all()
    order = school.order(1)
    assert order.shape == (course.steps, course.pairs)
    assert sorted(order.flatten()[: course.data].tolist()) == list(range(course.data))
    assert not torch.equal(order, school.order(2))
    labels = school.batch("dpo", order[0])["labels"]
    assert labels.shape == (2 * course.pairs, 9)
    assert (labels[:, :prompt] == steps.IGNORE).all()
    assert (labels[:, prompt:] != steps.IGNORE).all()
