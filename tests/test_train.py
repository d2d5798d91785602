"""Training: the loss of a step, reference scores and their cache, interrupted runs, refusals, reports, and the demo."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

import rgpb
from rgpb import cli, hf
from rgpb import demo as demo_module
from rgpb.demo import arithmetic_pairs
from rgpb.engine.chunks import Limits
from rgpb.hf.batches import reference_of
from rgpb.kernels import tuned
from rgpb.objectives import OBJECTIVES, RunningMean, resolve
from rgpb.train import TrainConfig, flags, models, progress, report, signals, teacher, train
from rgpb.train import config as settings_module
from rgpb.train.folder import open_run
from rgpb.train.rows import read_preferences
from rgpb.train.tokens import Collator, held_out, tokenise, train_tokenizer
from rgpb.train.trainer import PreferenceTrainer, Stage

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def small_model(monkeypatch, request):
    """The built-in model, smaller: only the wiring is tested here. Pictures are drawn where they are tested."""
    monkeypatch.setitem(settings_module.BUILT_IN, "tiny-llama", ("LlamaConfig", SMALL))
    if request.cls not in (TestReport, TestDemo):
        monkeypatch.setattr(report, "plot", lambda runs, path: None)


def full(*values):
    """A case of `make test-full` alone."""
    return pytest.param(*values, marks=pytest.mark.full)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unpaired(rows):
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in rows
        for key in ("chosen", "rejected")
    ]


def rewarded(n):
    """Rows of 4, 2 and 3 judged completions of 1 to 3 characters, and every fifth one that is judged all alike."""
    rows = []
    for i in range(n):
        texts = [f"{(7 * i + 3 * k) % 100}" for k in range((4, 2, 3)[i % 3])]
        texts[-1] += "!"
        rewards = [1.0] * len(texts) if i % 5 == 4 else [(i + k) % 3 - 0.5 * k for k in range(len(texts))]
        rows.append({"prompt": f"{i}:", "completions": texts, "rewards": rewards})
    return rows


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", arithmetic_pairs(24, seed=1))


@pytest.fixture
def groups(tmp_path):
    return write(tmp_path / "groups.jsonl", rewarded(20))


def config(data, output, **changes):
    settings = {"loss": "dpo", "steps": 4, "batch_size": 3, "lr": 3e-3, "vocab_size": 258, "log_steps": 2, "cpu": True}
    settings |= {"eval_rows": 200}
    return TrainConfig(data=data, output=str(output), progress=False, **{**settings, **changes})


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def records(folder):
    """Metrics without what differs from run to run."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_bytes")} for r in report.read_metrics(folder)]


GROUPED = sorted(name for name, spec in OBJECTIVES.items() if spec.unit == "group")


class TestObjectives:
    # a loss of single tokens, one that keeps a mean, one of pairs; those of groups are below
    @pytest.mark.parametrize(
        "loss", [loss if loss in ("bnf", "bco", "dpo") else full(loss) for loss in sorted(OBJECTIVES)]
    )
    def test_every_objective_trains(self, data, tmp_path, loss):
        """Two batches of one small set, again and again: the loss of that set must fall."""
        result = train(config(data, tmp_path / "run", loss=loss, steps=16, batch_size=12, schedule="constant"))
        assert result["after"]["loss"] < result["before"]["loss"]
        assert all(v is not None for r in records(tmp_path / "run") for v in r.values())
        weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert all(w.isfinite().all() for w in weights.values())

    def test_unpaired_rows(self, tmp_path):
        path = write(tmp_path / "u.jsonl", unpaired(arithmetic_pairs(12, seed=1)))
        result = train(config(path, tmp_path / "bnf", loss="bnf"))
        assert result["counts"]["units"] == 24
        assert result["after"]["logps/rejected"] < 0
        result = train(config(path, tmp_path / "mle", loss="mle"))
        assert result["counts"]["left out as dispreferred"] == 12
        with pytest.raises(ValueError, match=r"u\.jsonl:1: expected pairs .* since dpo compares responses"):
            train(config(path, tmp_path / "dpo"))

    def test_rewarded_rows(self, tmp_path):
        rows = [
            {"prompt": "a", "completions": [" x", " y", " z"], "rewards": [0.1, float(i % 2), 0.1]} for i in range(6)
        ]
        rows.append({"prompt": "b", "completions": [" x", " y"], "rewards": [1, 1]})
        result = train(config(write(tmp_path / "k.jsonl", rows), tmp_path / "run", pairing="all"))
        assert result["counts"]["rows left out, all rewards equal"] == 1
        assert result["counts"]["units"] == 12

    @pytest.mark.parametrize(
        "loss", [x if x == "swepo" else full(x) for x in (*GROUPED, "mle + 0.5*swepo", "rnce + multi_dpo")]
    )
    def test_groups_train(self, groups, tmp_path, loss):
        """Groups of 4, 2 and 3: the loss of the whole set must fall."""
        result = train(config(groups, tmp_path / "run", loss=loss, steps=20, batch_size=8, schedule="constant"))
        assert result["after"]["loss"] < result["before"]["loss"]
        assert result["counts"]["rows left out, all rewards equal"] == 4
        assert (result["counts"]["units"], result["counts"]["responses"]) == (16, 49)
        assert all(v is not None for r in records(tmp_path / "run") for v in r.values())
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())

    def test_groups_are_not_made_of_labelled_rows(self, tmp_path):
        path = write(tmp_path / "u.jsonl", unpaired(arithmetic_pairs(2, seed=1)))
        for loss in ("swepo", "mle + rnce"):
            with pytest.raises(ValueError, match=r"u\.jsonl:1: expected pairs .* or rewarded .* compares responses"):
                train(config(path, tmp_path / loss, loss=loss))

    @pytest.mark.full
    def test_groups_after_fine_tuning(self, groups, tmp_path):
        """Fine-tuned on each group's best, which is evaluated on the groups."""
        train(config(groups, tmp_path / "run", loss="infonca", sft_epochs=1.0, sft_lr=1e-2, eval_steps=4))
        tuned, after = records(tmp_path / "run" / "sft"), records(tmp_path / "run")
        assert tuned[-1]["perplexity"] < 0.8 * tuned[0]["perplexity"]
        assert after[0]["perplexity"] == tuned[-1]["perplexity"]
        assert tuned[-1]["loss"] < 0.9 * tuned[0]["loss"]

    def test_weighted_sum(self, data, tmp_path):
        """Where policy and reference are one, dpo is log 2 whatever its β; its margin is measured with that β."""
        runs = {}
        for loss, options in (("mle", {}), ("mle + 0.5*dpo", {}), ("2*mle+dpo", {"dpo.beta": 0.3})):
            runs[loss] = train(config(data, tmp_path / loss, loss=loss, loss_option=options))
        mle, half, twice = (run["before"]["loss"] for run in runs.values())
        assert half == pytest.approx(mle + 0.5 * math.log(2), rel=1e-5)
        assert twice == pytest.approx(2 * mle + math.log(2), rel=1e-5)
        assert runs["2*mle+dpo"]["options"] == {"dpo.beta": 0.3}
        assert runs["2*mle+dpo"]["after"]["rewards/margins"] != 0
        # what is said of a sum is said of the same sum
        assert (
            train(config(data, tmp_path / "2*mle+dpo", loss="2*mle+dpo", loss_option={"dpo.beta": 0.3}))["resumed"]
            is None
        )
        with pytest.raises(ValueError, match=r"loss_option is \{'dpo.beta': 0.3\} there and \{'beta': 0.3\} now"):
            train(config(data, tmp_path / "2*mle+dpo", loss="2*mle+dpo", loss_option={"beta": 0.3}))

    @pytest.mark.parametrize(
        ("loss", "options", "rows", "packing"),
        [
            full("swepo", {"beta": 0.5}, "groups", False),
            ("swepo", {"mode": "one_vs_all"}, "groups", True),
            full("infonca", {"tau": 0.5}, "pairs", False),
            full("mc_po", {"m": 3}, "groups", False),
            full("rnce", {}, "groups", True),
            full("mle + 0.5*multi_dpo", {"multi_dpo.beta": 0.4}, "groups", False),
            ("mle + 0.5*dpo", {"dpo.beta": 0.2}, "pairs", False),
        ],
    )
    def test_metrics_of_groups_and_sums_are_those_of_fused_loss(
        self, data, groups, tmp_path, loss, options, rows, packing
    ):
        """Evaluated three units at a time, against one batch of all."""
        path = groups if rows == "groups" else data
        train(config(path, tmp_path / "run", loss=loss, loss_option=options, packing=packing, lr=1e-2))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        spec = resolve(loss)
        pairing = "groups" if spec.unit == "group" else "best-worst"
        units = with_reference(tokenise(read_preferences(path), tokenizer, pairing=pairing), tmp_path / "run")
        batch = Collator(0)(list(units))
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
        given = {"rewards": batch["rewards"]} if spec.rewards else {}
        if spec.unit == "group":
            given["group_size"] = batch["rewards"].shape[1]
        value, own = hf.loss(model, inputs, loss, ref=reference_of(batch), return_metrics=True, **given, **options)
        after = records(tmp_path / "run")[-1]
        assert after["loss"] == pytest.approx(value.item(), rel=1e-5)
        assert set(own) <= set(after)
        for name, expected in own.items():
            assert after[name] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6), name

    def test_trainers_metrics_are_those_of_fused_loss(self, data, tmp_path):
        """Evaluation computes its averages over the whole set by itself: compare with the losses' own, in one batch."""
        train(config(data, tmp_path / "run", batch_size=24))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        pairs = tokenise(read_preferences(data), tokenizer)
        scores = teacher.score_references(model, pairs, pad=0, batch_size=5)
        assert scores.logp.max() < 0
        pairs = with_reference(pairs, tmp_path / "run")
        batch = Collator(0)([pairs[i] for i in range(24)])
        inputs = {k: v for k, v in batch.items() if k != "label" and not k.startswith("ref")}
        loss, own = hf.loss(model, inputs, "dpo", ref=reference_of(batch), return_metrics=True)
        after = records(tmp_path / "run")[-1]
        assert after["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert set(own) <= set(after)
        for name, value in own.items():
            assert after[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def with_reference(units, folder):
    """The units with scores of the new model that a run has begun with."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = models.make_model(config("", folder), "tiny-llama", tokenizer)
    return units.with_ref(teacher.score_references(model, units, pad=0, batch_size=12))


class TestOneNumber:
    @pytest.mark.parametrize(
        ("loss", "batch_size"), [("bnf", 5), full("dpo", 5), ("swepo", 3), full("mle + 0.5*dpo", 24), full("kto", 24)]
    )
    def test_of_training_and_evaluation(self, data, groups, tmp_path, loss, batch_size):
        """An epoch that learns nothing, in batches that are differently made up, is an evaluation."""
        torch.manual_seed(7)
        other = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **SMALL))
        other.save_pretrained(tmp_path / "ref")
        rows = unpaired(arithmetic_pairs(8, seed=1))
        path = write(tmp_path / "u.jsonl", [row for i, row in enumerate(rows) if i % 3 != 1]) if loss == "bnf" else data
        path = groups if loss == "swepo" else path
        units = {"bnf": 11, "swepo": 16}.get(loss, 24)
        steps = math.ceil(units / batch_size)
        settings = {"steps": steps, "log_steps": steps, "batch_size": batch_size, "lr": 1e-30}
        train(config(path, tmp_path / "run", loss=loss, ref_model=str(tmp_path / "ref"), **settings))
        before, trained, _ = records(tmp_path / "run")
        shared = before.keys() & trained.keys() - {"split", "step", "epoch"}
        assert shared >= {"loss", "logps/chosen", "logps/rejected", "perplexity", "agility", "rewards/margins"}
        assert "rewards/accuracies" in shared or loss in ("bnf", "kto")
        for name in shared - {"device"}:
            assert trained[name] == pytest.approx(before[name], rel=1e-5, abs=1e-6), name


class TestStep:
    """The gradient of one optimizer step."""

    @pytest.fixture
    def gradient(self, data, tmp_path):
        """A function of loss, batch size and other settings: the optimizer's gradient, and the logged loss."""
        whole = config(data, tmp_path / "run", loss="bnf", steps=1)
        train(whole)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        pairs = tokenise(read_preferences(data), tokenizer).first(7)

        def of(loss, batch_size, **changes):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
            used = pairs if OBJECTIVES[loss].ref is None else with_reference(pairs, tmp_path / "run")
            caught = {}

            class Catch(TrainerCallback):
                def on_pre_optimizer_step(self, args, state, control, **keywords):
                    caught.update({name: p.grad.clone() for name, p in model.named_parameters()})

            name = f"{loss}-{batch_size}-{'-'.join(changes)}"
            changes = {"batch_size": batch_size, "max_grad_norm": 0.0, "steps": 1, "log_steps": 1, **changes}
            settings = config(data, tmp_path / name, **changes)
            stage = Stage(tmp_path / name, settings, OBJECTIVES[loss], {}, "")
            monkey = pytest.MonkeyPatch()
            start = PreferenceTrainer.__init__
            monkey.setattr(
                PreferenceTrainer, "__init__", lambda self, **k: (start(self, **k), self.add_callback(Catch()))[0]
            )
            with monkey.context():
                stage.fit(model, tokenizer, used, used, epochs=1.0, steps=1)
            monkey.undo()
            return caught, next(r["loss"] for r in records(tmp_path / name) if r["split"] == "train")

        return of

    @pytest.mark.parametrize("loss", [full("bnf"), "dpo"])
    def test_accumulation_is_one_big_batch(self, gradient, loss):
        """7 pairs as 3 + 3 + 1: a mean of the batches' means would be off."""
        whole, accumulated = gradient(loss, 7), gradient(loss, 3, grad_accum=3)
        assert accumulated[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)
        for name in whole[0]:
            torch.testing.assert_close(accumulated[0][name], whole[0][name], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("loss", ["bnf", full("simpo")])
    def test_packing_changes_nothing(self, gradient, loss):
        padded, packed = gradient(loss, 7), gradient(loss, 7, packing=True)
        assert packed[1] == pytest.approx(padded[1], rel=1e-5, abs=1e-6)
        for name in padded[0]:
            torch.testing.assert_close(packed[0][name], padded[0][name], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("loss", [full("swepo"), "mc_po", full("mle + 0.5*infonca")])
    def test_packing_groups_changes_nothing(self, groups, tmp_path, loss):
        """Unequal groups, a batch that isn't full, several steps."""
        for packing in (False, True):
            train(
                config(groups, tmp_path / str(packing), loss=loss, packing=packing, steps=8, log_steps=1, batch_size=5)
            )
        padded, packed = (records(tmp_path / str(packing)) for packing in (False, True))
        assert len(padded) == 10  # 8 steps, and before and after
        for one, other in zip(padded, packed):
            assert other.keys() == one.keys()
            for name in one.keys() - {"split", "device", "rewards/accuracies"}:  # ties before the first step
                assert other[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name

    @pytest.mark.parametrize("loss", ["swepo", full("mc_po")])
    def test_accumulated_groups_are_one_big_batch(self, groups, tmp_path, loss):
        """16 groups as 7 + 7 + 2; drawn without a choice, since a draw depends on the batch."""
        options = {"m": 3} if loss == "mc_po" else {}
        for size, accum in ((16, 1), (7, 3)):
            name, settings = tmp_path / str(size), {"grad_accum": accum, "loss_option": options, "lr": 1e-2}
            train(config(groups, name, loss=loss, steps=3, log_steps=1, batch_size=size, **settings))
        whole, parts = (records(tmp_path / size) for size in ("16", "7"))
        for one, other in zip(whole, parts):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)

    def test_metrics_of_a_step_are_those_of_one_big_batch(self, groups, tmp_path):
        """Responses that only fill a group up count in no average."""
        found = []
        for size, accum in ((16, 1), (4, 4)):
            settings = {"steps": 1, "log_steps": 1, "batch_size": size, "grad_accum": accum}
            train(config(groups, tmp_path / str(size), loss="swepo", **settings))
            found.append(next(r for r in records(tmp_path / str(size)) if r["split"] == "train"))
        for name in ("loss", "logps/chosen", "logps/rejected", "perplexity"):
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name

    @pytest.mark.full
    def test_gradient_checkpointing_changes_nothing(self, gradient):
        kept, recomputed = gradient("bnf", 7), gradient("bnf", 7, gradient_checkpointing=True)
        for name in kept[0]:
            torch.testing.assert_close(recomputed[0][name], kept[0][name], rtol=1e-4, atol=1e-7)

    @pytest.mark.full
    def test_bf16_is_used(self, data, tmp_path):
        """Autocast reaches a backbone that is called without Trainer's wrapped forward; weights stay float32."""
        exact, rounded = (
            train(config(data, tmp_path / str(bf16), loss="simpo", steps=1, bf16=bf16))["before"]["loss"]
            for bf16 in (False, True)
        )
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=2e-3)
        weights = load_file(tmp_path / "True" / "model" / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}


class TestFirstAndLast:
    """What ends a run early, before its first step or in the middle, and what must not."""

    def test_one_step_is_taken(self, data, tmp_path):
        """Warm-up begins at a rate of 0; of one step there is none."""
        train(config(data, tmp_path / "run", steps=1, log_steps=1, warmup=1.0))
        line = next(r for r in records(tmp_path / "run") if r["split"] == "train")
        assert line["learning_rate"] == 3e-3
        assert records(tmp_path / "run")[-1]["loss"] != records(tmp_path / "run")[0]["loss"]

    @pytest.mark.parametrize("clipped", [1.0, full(0.0)])
    def test_a_diverged_run_stops(self, data, tmp_path, monkeypatch, capsys, clipped):
        """By name, before the step that would spoil the weights."""
        compute = PreferenceTrainer.compute_loss

        def spoilt(self, *arguments, **keywords):
            loss = compute(self, *arguments, **keywords)
            return loss * math.nan if self.state.global_step == 3 else loss

        monkeypatch.setattr(PreferenceTrainer, "compute_loss", spoilt)
        flags = ["--loss=dpo", "--steps=6", "--save-steps=2", "--batch-size=3", "--lr=3e-3", "--vocab-size=258"]
        flags += ["--data", data, "--output", str(tmp_path / "run"), "--cpu", "--quiet", f"--max-grad-norm={clipped}"]
        assert cli.main(["train", *flags]) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"rgpb: error: training diverged in step 4: loss .*, gradient of norm nan; the last good loss was 0\.\d+ "
            r"in step 3; the step was not taken, and checkpoint-2 is as it was\. Try a lower --lr than 0\.003, .*\n",
            error,
        )
        found = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
        assert all(x.isfinite().all() for x in found.values())
        monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute)
        assert cli.main(["train", *flags]) == 0
        train(
            config(data, tmp_path / "whole", steps=6, save_steps=2, max_grad_norm=clipped, eval_rows=None, log_steps=10)
        )
        assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))

    def test_a_loss_alone_that_is_not_finite(self, data, tmp_path, monkeypatch):
        compute = PreferenceTrainer.compute_loss

        def spoilt(self, *arguments, **keywords):
            self._step = (math.inf, 1)
            return compute(self, *arguments, **keywords)

        monkeypatch.setattr(PreferenceTrainer, "compute_loss", spoilt)
        with pytest.raises(
            FloatingPointError, match="in step 1: loss inf, .* the last good loss was none; .*no checkpoint"
        ):
            train(config(data, tmp_path / "run"))

    def test_what_cannot_be_saved_is_refused_first(self, data, tmp_path, monkeypatch):
        train(config(data, tmp_path / "base", steps=1))
        place = tmp_path / "base" / "model" / "generation_config.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "temperature": 0.5, "do_sample": False}))
        monkeypatch.setattr(PreferenceTrainer, "evaluate", lambda self: pytest.fail("evaluated"))
        with pytest.raises(
            ValueError, match="model: expected one that can be saved at the end, .*temperature"
        ) as raised:
            train(config(data, tmp_path / "run", model=str(tmp_path / "base" / "model")))
        assert "\n" not in str(raised.value)
        assert raised.value.__cause__ is not None
        assert not list((tmp_path / "run").glob("rehearsal*"))

    def test_too_little_room_is_refused_first(self, data, tmp_path, monkeypatch):
        few = shutil._ntuple_diskusage(10**9, 10**9 - 10**4, 10**4)
        monkeypatch.setattr(models.shutil, "disk_usage", lambda path: few)
        with pytest.raises(
            ValueError, match=r"output: expected \d+ MiB free, for the model and 3 checkpoints .* got 0 MiB"
        ):
            train(config(data, tmp_path / "run"))

    def test_output_is_a_file(self, data, tmp_path, capsys):
        (tmp_path / "file").touch()
        for place, code, said in (
            (tmp_path / "file", 2, "output: expected a folder"),
            (tmp_path / "file" / "x", 1, "Not a"),
        ):
            assert cli.main(["train", "--data", data, "--output", str(place), "--cpu", "--quiet"]) == code
            assert re.fullmatch(rf"rgpb: error: .*{said}.*\n", capsys.readouterr().err)

    def test_data_is_tokenised_before_the_weights_are_read(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr("rgpb.train.run.make_model", lambda *arguments: pytest.fail("read"))
        with pytest.raises(ValueError, match="expected at most half of the responses affected, got responses cut"):
            train(config(data, tmp_path / "run", max_length=4, max_prompt_length=2))

    def test_an_estimate_comes_before_the_first_step(self, data, tmp_path, capfd, monkeypatch):
        """From the evaluation's speed; again from steps that were measured; where a run goes on from its own pace."""
        begun, compute = [], PreferenceTrainer.compute_loss

        def computing(self, *arguments, **keywords):
            if not begun:
                begun.append(capfd.readouterr().out)
            if stop and self.state.global_step == stop:
                raise KeyboardInterrupt
            return compute(self, *arguments, **keywords)

        monkeypatch.setattr(PreferenceTrainer, "compute_loss", computing)
        settings = dataclasses.replace(
            config(data, tmp_path / "run", steps=8, save_steps=4, eval_steps=3), progress=True
        )
        number = r"[\d.e-]+ (s|min)"
        for stop, steps, evaluations in ((6, 8, 3), (0, 4, 2)):  # noqa: B007
            begun.clear()
            with contextlib.suppress(KeyboardInterrupt):
                train(settings)
            number = r"[\d.e-]+ (s|min)"
            assert re.search(
                rf"estimate: {steps} steps, {number} each, and {evaluations} evaluations: {number}\n", begun[0]
            )
            assert re.search(rf"as measured: {steps - 3} steps, {number} each, ", capfd.readouterr().out)

    def test_dropout_is_off_unless_asked_for(self, data, tmp_path):
        """A model whose configuration has dropout of each kind; what is saved still has it."""
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
        base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=258, **sizes, attn_pdrop=0.4, resid_pdrop=0.4))
        base.save_pretrained(tmp_path / "base")
        train_tokenizer(["0"], 258).save_pretrained(tmp_path / "base")
        found = {}
        for name, changes in (("off", {}), ("on", {"dropout": True}), ("again", {})):
            train(config(data, tmp_path / name, model=str(tmp_path / "base"), loss="simpo", steps=2, **changes))
            found[name] = weights(tmp_path / name)
        assert_equal(found["off"], found["again"])
        assert any((found["on"][name] - x).abs().max() > 1e-6 for name, x in found["off"].items())
        settings = config(data, tmp_path / "x", model=str(tmp_path / "base"))
        model = models.load_model(settings, tmp_path / "base").train()
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)
        assert json.loads((tmp_path / "off" / "model" / "config.json").read_text())["attn_pdrop"] == 0.4

    def test_a_model_that_always_drops_is_refused(self):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **SMALL))
        model.model.norm.register_forward_hook(
            lambda module, inputs, out: torch.nn.functional.dropout(out, 0.5, module.training)
        )
        with pytest.raises(ValueError, match="dropout: expected a model whose dropout can be turned off, got LlamaFor"):
            models.without_dropout(model)


class TestReference:
    @pytest.fixture
    def scored(self, monkeypatch):
        """Responses in each call that scores references."""
        calls, compute = [], teacher.score_references

        def scoring(model, data, **keywords):
            calls.append(keywords["responses"])
            return compute(model, data, **keywords)

        monkeypatch.setattr(teacher, "score_references", scoring)
        return calls

    def test_what_the_run_takes_is_scored_once(self, data, tmp_path, scored):
        """Three units to evaluate on, then 2 steps of 3: at most 9 of 24 pairs, in blocks, each before its step."""
        cache = {"ref_cache": str(tmp_path / "cache"), "eval_rows": 3}
        first = train(config(data, tmp_path / "run", steps=2, **cache))
        assert len(scored) == 3  # of the evaluation, and of each step
        assert sorted(r for block in scored for r in block) == sorted({r for block in scored for r in block})
        assert sum(map(len, scored)) <= 18
        assert first["before"]["loss"] == pytest.approx(math.log(2), rel=1e-5)
        train(config(data, tmp_path / "again", steps=2, lr=1e-4, **cache))
        assert len(scored) == 3
        assert records(tmp_path / "again")[0] == records(tmp_path / "run")[0]
        train(config(data, tmp_path / "longer", steps=5, **cache))
        assert len(scored) == 5  # steps 3 and 4, and 5
        train(config(data, tmp_path / "dpo", steps=2, seed=1, **cache))
        assert len(scored) == 8  # another new model

    def test_before_the_first_step_on_demand(self, data, tmp_path, scored):
        """Bitwise the same, without a second model."""
        for name, all_first in (("ahead", False), ("first", True)):
            train(config(data, tmp_path / name, precompute_ref=all_first, ref_cache=str(tmp_path / f"cache-{name}")))
        assert_equal(weights(tmp_path / "ahead"), weights(tmp_path / "first"))
        assert records(tmp_path / "ahead") == records(tmp_path / "first")

    def test_blocks(self):
        for first, sizes in ((1, [1, 1, 2, 4, 8, 16, 3]), (16, [16, 16, 3])):
            assert [len(group) for group in teacher._growing([[i] for i in range(35)], first)] == sizes

    def test_a_broken_file_is_named(self, data, tmp_path):
        settings = config(data, tmp_path / "run", ref_cache=str(tmp_path / "cache"))
        train(settings)
        broken = next((tmp_path / "cache").iterdir())
        broken.write_bytes(b"half")
        with pytest.raises(ValueError, match=f"ref_cache: expected a whole file, got {broken}"):
            train(config(data, tmp_path / "again", ref_cache=str(tmp_path / "cache")))
        save_file({"logp": torch.zeros(1), "log_odds": torch.zeros(1)}, broken)  # it would be taken for each token
        with pytest.raises(ValueError, match=rf"ref_cache: expected \d+ numbers logp in {broken}, got \[1\]"):
            train(config(data, tmp_path / "again", ref_cache=str(tmp_path / "cache")))

    def test_a_user_without_a_home(self, data, tmp_path, monkeypatch):
        """As in a container whose user is in no list: losses run, and a run says what it needs."""
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        tuned._known.cache_clear()
        assert (tuned.file(), tuned.read(Limits, "cpu")) == (None, None)
        with pytest.raises(ValueError, match="XDG_CACHE_HOME: expected a folder to keep choices in"):
            tuned.keep("cpu", (1,))
        with pytest.raises(
            ValueError, match="ref_cache: expected a folder for reference scores, since this user has no"
        ):
            teacher.cache_folder(config(data, tmp_path / "run"))
        assert teacher.cache_folder(config(data, tmp_path / "run", ref_cache="here")) == Path("here")

    def test_marks_are_part_of_a_block(self, data, tmp_path):
        """Where nothing is trained on, scores are 0: another template's marks have other scores of the same tokens."""
        tokens = tokenise(read_preferences(data), train_tokenizer(["a"], 258))
        marks = torch.ones(len(tokens.tokens), dtype=torch.bool)
        names = set()
        for targets in (None, marks, marks.index_fill(0, tokens.starts[1:] - 1, False)):
            references = teacher.References(config(data, tmp_path / "run"), "weights", 0)
            references.plan(tokens._with(targets=targets), [[0, 1], [2]], first=1)
            names |= {references._file(n) for n in range(2)}
        assert len(names) == 6

    def test_a_setting_of_the_model_is_part_of_its_fingerprint(self):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **SMALL))
        before = teacher.weights_fingerprint(model, "w")
        model.config.rms_norm_eps *= 2
        assert before not in (teacher.weights_fingerprint(model, "w"), teacher.weights_fingerprint(model, "v"))

    def test_of_another_model(self, data, tmp_path):
        train(config(data, tmp_path / "one", loss="mle", steps=8))
        result = train(config(data, tmp_path / "two", ref_model=str(tmp_path / "one" / "model")))
        model, ref = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "one" / name) for name in ("model", "checkpoint-8")
        )
        digest = teacher.weights_digest(model)
        assert digest == teacher.weights_digest(ref)
        assert teacher.weights_fingerprint(model, digest) == teacher.weights_fingerprint(ref, digest)
        assert result["before"]["rewards/chosen"] < -0.1  # the untrained policy is below the trained reference
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
        pairs = tokenise(read_preferences(data), tokenizer)
        scores = teacher.score_references(model, pairs, pad=0, batch_size=5)
        assert scores.logp.dtype == torch.float32
        trained = records(tmp_path / "one")[-1]["logps/chosen"]
        chosen = [scores.logp[scores.starts[r] : scores.starts[r + 1]].sum().item() for r in range(0, 48, 2)]
        assert sum(chosen) / 24 == pytest.approx(trained, rel=1e-5)

    def test_fine_tuning_comes_first_and_becomes_the_reference(self, data, tmp_path):
        result = train(config(data, tmp_path / "run", loss="bnf", sft_epochs=1.0, sft_lr=1e-2, eval_steps=2))
        tuned = records(tmp_path / "run" / "sft")
        assert tuned[-1]["perplexity"] < 0.8 * tuned[0]["perplexity"]
        assert result["before"]["perplexity"] == tuned[-1]["perplexity"]
        assert abs(result["before"]["rewards/margins"]) < 1e-4
        assert [r["step"] for r in records(tmp_path / "run") if r["split"] == "eval"] == [0, 2, 4]


class TestInterrupted:
    SETTINGS: ClassVar = {"loss": "bnf", "steps": 30, "grad_accum": 2, "save_steps": 4, "log_steps": 3, "eval_steps": 5}

    @pytest.mark.full
    def test_killed_run_ends_as_if_it_had_not_been(self, data, tmp_path, monkeypatch):
        """Log, evaluation and checkpoint steps interleave, so that averages reach over the interruption."""
        train(config(data, tmp_path / "whole", **self.SETTINGS))
        folder = tmp_path / "killed"
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in self.SETTINGS.items()]
        command = ["train", "--data", data, "--output", str(folder), *flags]
        command += ["--batch-size=3", "--lr=3e-3", "--vocab-size=258", "--eval-rows=200", "--cpu", "--quiet"]
        program = (
            "import sys, torch, rgpb.train.config as t; from rgpb.cli import main; torch.set_num_threads(1);"
            "torch.use_deterministic_algorithms(True);"
            f"t.BUILT_IN['tiny-llama'] = ('LlamaConfig', {SMALL}); sys.exit(main(sys.argv[1:]))"
        )
        process = subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.PIPE)
        while not any(folder.glob("checkpoint-*/progress.json")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "result.json").exists()
        steps = [int(path.parent.name.partition("-")[2]) for path in folder.glob("checkpoint-*/progress.json")]
        # A save that the kill cut short, and lines after the checkpoint, must not count.
        shutil.copytree(folder / f"checkpoint-{max(steps)}", folder / "checkpoint-29")
        (folder / "checkpoint-29" / "progress.json").unlink()
        (folder / "checkpoint-29" / "model.safetensors").write_bytes(b"half")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"split": "train", "st')
        computed = []
        monkeypatch.setattr(teacher, "score_references", lambda *a, **k: computed.append(1))
        result = train(config(data, folder, **self.SETTINGS))
        assert result["resumed"] in steps
        assert not computed
        assert records(folder) == records(tmp_path / "whole")
        one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize(
        ("loss", "rows"),
        [("bco", "pairs"), full("mc_po", "groups"), full("mle + 0.5*rnce", "groups"), full("mle + bco", "labels")],
    )
    def test_averages_and_draws_go_on(self, data, groups, tmp_path, monkeypatch, loss, rows):
        """A step that fails after a checkpoint; then the run goes on in a process whose random state is another."""
        labels = write(tmp_path / "u.jsonl", unpaired(arithmetic_pairs(12, seed=1)))
        path = {"pairs": data, "groups": groups, "labels": labels}[rows]
        settings = {"loss": loss, "steps": 9, "save_steps": 4, "log_steps": 3, "eval_steps": 3, "grad_accum": 2}
        train(config(path, tmp_path / "whole", **settings))
        compute = PreferenceTrainer.compute_loss

        def fails(self, *arguments, **keywords):
            if self.state.global_step == 6:
                raise KeyboardInterrupt
            return compute(self, *arguments, **keywords)

        with monkeypatch.context() as patched:
            patched.setattr(PreferenceTrainer, "compute_loss", fails)
            with pytest.raises(KeyboardInterrupt):
                train(config(path, tmp_path / "cut", **settings))
        torch.manual_seed(99)
        assert train(config(path, tmp_path / "cut", **settings))["resumed"] == 4
        assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
        assert records(tmp_path / "cut") == records(tmp_path / "whole")
        one, other = (
            json.loads((tmp_path / n / "checkpoint-9" / "progress.json").read_text()) for n in ("cut", "whole")
        )
        assert one["running"] == other["running"]
        assert bool(one["running"]) == ("bco" in loss)

    @pytest.mark.parametrize(
        ("moments", "flags"),
        [
            full(3, ["--loss=dpo", "--steps=3", "--save-steps=1"]),
            full(50, ["--loss=kto", "--steps=7", "--save-steps=2", "--eval-steps=3", "--sft-epochs=0.5"]),
        ],
    )
    @pytest.mark.skipif(sys.platform != "linux", reason="limits, mounts and capabilities of Linux")
    def test_at_random_moments(self, tmp_path, moments, flags):
        """Killed, interrupted, out of disk space, out of the right to write: the same command goes on, and ends bitwise
        as a run that nothing happened to."""
        data = write(tmp_path / "pairs.jsonl", arithmetic_pairs(12, seed=1))
        flags = [*flags, "--data", data, "--batch-size=3", "--log-steps=2", "--vocab-size=258", "--lr=3e-3", "--cpu"]
        program = Path(__file__).with_name("interrupts.py")
        done = subprocess.run(
            [sys.executable, str(program), str(moments), "0", *flags, "--quiet"],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == moments
        assert {line["stage"] for line in lines} > ({"training", "saving"} if moments > 5 else set())
        for line in lines:
            what = {name: line[name] for name in line if name != "then"}
            if line["kind"] == "SIGKILL":
                assert line["code"] == -signal.SIGKILL, what
            elif line["kind"] == "SIGINT":
                ended = "interrupted|SIGINT: (stopped after step .*, which is saved; )?to go on: rgpb train .*"
                assert line["code"] == 130, what
                assert re.fullmatch(f"(\nSIGINT: this step .*\n)?\nrgpb: ({ended})\n", line["said"]), what
            elif line["kind"] == "SIGTERM":  # before the command has begun it kills
                assert line["code"] in (143, -signal.SIGTERM), what
            elif line["code"]:  # 0 where nothing was left to write
                assert re.fullmatch(r"rgpb: error: .*\n", line["said"]), what
            assert (line["again"], line["same"]) == (0, ["weights", "metrics", "report", "left"]), line

    def test_killed_after_the_last_checkpoint(self, data, tmp_path):
        settings = config(data, tmp_path / "run")
        first = train(settings)
        before = records(tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()
        shutil.rmtree(tmp_path / "run" / "model")
        again = train(settings)
        assert (again["resumed"], records(tmp_path / "run")) == (4, before)
        assert again["after"]["loss"] == first["after"]["loss"]
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()

    def test_finished_run(self, data, tmp_path, capsys):
        train(config(data, tmp_path / "run"))
        (tmp_path / "run" / "report.md").unlink()
        stamp = os.stat(tmp_path / "run" / "model" / "model.safetensors").st_mtime_ns
        assert cli.main(self.flags(data, tmp_path / "run")) == 0
        assert "is finished already" in capsys.readouterr().out
        assert (tmp_path / "run" / "report.md").exists()
        assert os.stat(tmp_path / "run" / "model" / "model.safetensors").st_mtime_ns == stamp

    def test_other_settings(self, data, tmp_path, capsys):
        train(config(data, tmp_path / "run"))
        assert cli.main([*self.flags(data, tmp_path / "run"), "--lr", "1e-4"]) == 2
        assert "lr is 0.003 there and 0.0001 now (" in capsys.readouterr().err
        other = write(tmp_path / "other.jsonl", arithmetic_pairs(3, seed=5))
        with pytest.raises(ValueError, match=r"data is '\w+' there and '\w+' now \("):
            train(config(other, tmp_path / "run"))
        moved = shutil.copy(data, tmp_path / "moved.jsonl")  # the same rows elsewhere are the same data
        assert train(config(str(moved), tmp_path / "run", save_steps=7))["resumed"] is None
        (tmp_path / "run" / "thesis.txt").write_text("")
        assert train(config(other, tmp_path / "run", overwrite=True))["counts"]["rows"] == 3
        assert (tmp_path / "run" / "thesis.txt").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        with pytest.raises(ValueError, match="output: expected a new or empty folder .* with other files"):
            train(config(data, tmp_path / "mine", overwrite=True))
        assert (tmp_path / "mine" / "thesis.txt").exists()

    @pytest.mark.parametrize(
        ("changed", "settings"),
        [
            ("tokenizer's tokens", {"loss": "simpo"}),
            ("reference's weights", {"loss": "dpo"}),
            full("weights under the adapters", {"loss": "simpo", "lora_r": 2, "lora_target": "q_proj"}),
        ],
    )
    def test_another_model_in_the_same_folder(self, data, tmp_path, monkeypatch, changed, settings):
        """A run that goes on sees the tokens and the reference that it began with, or none."""
        train(config(data, tmp_path / "base", loss="mle", steps=1))
        place = tmp_path / "base" / "model"
        settings = config(data, tmp_path / "run", model=str(place), save_steps=1, **settings)

        def broken(self, *arguments, **keywords):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(PreferenceTrainer, "_get_grad_norm", broken)
            with pytest.raises(KeyboardInterrupt):
                train(settings)
        if changed == "tokenizer's tokens":
            shutil.copytree(place, tmp_path / "kept")
            tokenizer = AutoTokenizer.from_pretrained(place)
            end = [(tokenizer.eos_token, tokenizer.eos_token_id)]
            tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{end[0][0]} $A", special_tokens=end)
            tokenizer.save_pretrained(place)
        else:
            model = AutoModelForCausalLM.from_pretrained(place)
            model.get_input_embeddings().weight.data += 1e-3
            model.save_pretrained(place)
        with pytest.raises(ValueError, match=f"model: expected the {changed} with which the run in .* began, got"):
            train(settings)
        if changed == "tokenizer's tokens":
            shutil.rmtree(place)
            (tmp_path / "kept").rename(place)
            assert train(settings)["resumed"] == 0

    def test_a_run_that_never_began_binds_nobody(self, data, tmp_path):
        with pytest.raises(ValueError, match="vocab_size: expected at least 258"):
            train(config(data, tmp_path / "run", vocab_size=100))
        assert (tmp_path / "run" / "run.json").exists()
        assert train(config(data, tmp_path / "run"))["resumed"] == 0

    def flags(self, data, folder):
        flags = ["--loss=dpo", "--steps=4", "--batch-size=3", "--lr=3e-3", "--vocab-size=258", "--log-steps=2"]
        flags += ["--eval-rows=200"]
        return ["train", "--data", data, "--output", str(folder), *flags, "--cpu", "--quiet"]


class TestSignals:
    FLAGS: ClassVar = ["--loss=dpo", "--steps=6", "--save-steps=4", "--batch-size=3", "--grad-accum=2", "--lr=3e-3"]

    @pytest.fixture(autouse=True)
    def usual(self):
        """What a command in the foreground finds; a shell's background job ignores SIGINT."""
        before = {n: signal.getsignal(n) for n in signals.HELD}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def start(self, data, folder, monkeypatch, *numbers):
        """The command, in whose third step these signals come; its exit code."""
        compute, left = PreferenceTrainer.compute_loss, list(numbers)

        def interrupted(self, *arguments, **keywords):
            while left and self.state.global_step == 2:
                signal.raise_signal(left.pop(0))
            return compute(self, *arguments, **keywords)

        line = ["train", "--data", data, "--output", str(folder), *self.FLAGS, "--vocab-size=258", "--cpu"]
        with monkeypatch.context() as patched:
            patched.setattr(PreferenceTrainer, "compute_loss", interrupted)
            return cli.main(line)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), full(signal.SIGINT, 130)])
    def test_the_step_is_finished_and_saved(self, data, tmp_path, monkeypatch, capfd, number, code):
        """The line that goes on goes on there, to the weights of a run that nothing happened to."""
        before = {n: signal.getsignal(n) for n in signals.HELD}
        assert self.start(data, tmp_path / "run", monkeypatch, number) == code
        assert {n: signal.getsignal(n) for n in signals.HELD} == before
        assert [p.parent.name for p in (tmp_path / "run").glob("*/progress.json")] == ["checkpoint-3"]
        *_, last = capfd.readouterr().err.splitlines()
        name = signal.Signals(number).name
        assert re.fullmatch(
            rf"rgpb: {name}: stopped after step 3 of 6, which is saved; to go on: rgpb train --data {data} .*", last
        )
        assert cli.main(last.partition(" to go on: rgpb ")[2].split()) == 0
        assert "training with dpo: going on from step 3 of 6\n" in capfd.readouterr().out
        assert self.start(data, tmp_path / "whole", monkeypatch) == 0
        assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
        assert records(tmp_path / "run") == records(tmp_path / "whole")

    def test_a_second_one_ends_at_once(self, data, tmp_path, monkeypatch, capfd):
        assert self.start(data, tmp_path / "run", monkeypatch, signal.SIGINT, signal.SIGTERM) == 143
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        said = capfd.readouterr().err
        assert "\nSIGINT: this step is finished and saved first; a second one ends at once\n" in said
        assert "\nrgpb: SIGTERM: to go on: rgpb train --data" in said

    def test_what_ignores_signals_goes_on_ignoring_them(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with signals.Hold() as hold:
                signal.raise_signal(signal.SIGINT)
            assert (hold.number, signal.getsignal(signal.SIGINT)) == (0, signal.SIG_IGN)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_handler_that_does_nothing_does_not_finish_the_run(self):
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with pytest.raises(KeyboardInterrupt, match="stopped there"):
                signals.act(signal.SIGTERM, "stopped there")
        finally:
            signal.signal(signal.SIGTERM, before)


class TestProgress:
    def test_lines_where_there_is_no_terminal(self, capsys, monkeypatch):
        """One every few seconds, and one at the end."""
        clock = [100.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
        with progress.bar(12, "training", "step", initial=2) as shown:
            for step in range(10):
                clock[0] += 2.0
                shown.set_postfix({"loss": f"0.{step}"})
                shown.update(1)
        assert capsys.readouterr().err.splitlines() == [
            "training: step 5 of 12, 14 s left, loss 0.2",
            "training: step 8 of 12, 8 s left, loss 0.5",
            "training: step 11 of 12, 2 s left, loss 0.8",
            "training: step 12 of 12, loss 0.9",
        ]
        with progress.bar(3, "reference", "response", leave=False) as shown:
            shown.update(3)
        with progress.bar(3, "sampling", "prompt", quiet=True) as shown:
            clock[0] += 60
            shown.update(3)
        assert capsys.readouterr().err == ""

    def test_a_bar_on_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with progress.bar(3, "training", "step") as shown:
            shown.update(3)
        assert "\r" in capsys.readouterr().err


def given(*line):
    """The settings of a command line."""
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, dict.fromkeys(flags.FIELDS))
    return flags.settings_of(parser.parse_args(line))


class TestSettings:
    YAML = """
data: a.jsonl
output: runs/a
lr: 1e-3            # a text, by YAML's rules
batch-size: 4
eval_rows: 1.0e+2
loss_option: {beta: 0.2, label_smoothing: 1e-1, dpo.beta: 3}
quiet: true
cpu: true
workspace: 4GiB
ref_model: null
"""

    def test_the_command_line_wins(self, tmp_path):
        (tmp_path / "run.yaml").write_text(self.YAML)
        file = ["--config", str(tmp_path / "run.yaml")]
        expected = TrainConfig(
            data="a.jsonl", output="runs/a", lr=1e-3, batch_size=4, eval_rows=100, progress=False, cpu=True,
            loss_option={"beta": 0.2, "label_smoothing": 0.1, "dpo.beta": 3}, workspace=2**32,
        )  # fmt: skip
        assert given(*file) == expected
        assert type(given(*file).eval_rows) is int
        options = {"beta": 0.5, "label_smoothing": 0.1, "dpo.beta": 3}
        assert given(*file, "--lr=2", "--output", "b", "--no-cpu", "--no-quiet", "--loss-option", "beta=0.5") == (
            dataclasses.replace(expected, lr=2.0, output="b", cpu=False, progress=True, loss_option=options)
        )
        assert given("--data=a", "--output=b") == TrainConfig(data="a", output="b")

    def test_of_an_earlier_run(self, data, tmp_path):
        """Also what a run that goes on may have otherwise; with another output it is another run."""
        folder = tmp_path / "run"
        settings = config(data, folder, loss_option={"beta": 0.5}, save_steps=7, timeout=9.0, allow=True)
        open_run(folder, settings, read_preferences(data), None, None)
        assert given("--config", str(folder / "run.json")) == settings
        other = given("--config", str(folder / "run.json"), "--output", "b", "--lr", "1")
        assert other == dataclasses.replace(settings, output="b", lr=1.0)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            (
                "a.yaml",
                "data: a\nbatch_sise: 3",
                "a.yaml: expected flags of .*, got 'batch_sise'; did you mean",
            ),
            ("a.yaml", "data: a\nlr: 1\nlr: 2", "config: expected YAML or JSON in .*, got 'lr' twice"),
            (
                "a.json",
                '{"lr": 1, "lr": 2}',
                "config: expected YAML or JSON .*, got expected each key once, got 'lr'",
            ),
            ("a.yaml", "save-steps: 1\nsave_steps: 2", "expected save_steps once, got 'save_steps' beside it"),
            ("a.yaml", "quiet: true\nprogress: true", "expected progress once, got 'progress' beside it"),
            ("a.yaml", "lr: fast", "a.yaml: lr: expected a number, got 'fast'"),
            ("a.yaml", "steps: 1.5", "a.yaml: steps: expected a whole number, got 1.5"),
            ("a.yaml", "steps: .inf", "a.yaml: steps: expected a whole number, got inf"),
            ("a.yaml", "steps: true", "a.yaml: steps: expected a whole number, got True"),
            ("a.yaml", "cpu: 1", "a.yaml: cpu: expected true or false, got 1"),
            ("a.yaml", "loss: 3", "a.yaml: loss: expected a text, got 3"),
            ("a.yaml", "loss_option: [beta]", r"loss_option: expected names with values, got \['beta'\]"),
            ("a.yaml", "lr: null", "a.yaml: lr: expected a number, got None"),
            ("a.yaml", "- lr", r"config: expected names of settings .*, got \['lr'\]"),
            ("a.yaml", "lr: [", "config: expected YAML or JSON in .*, got "),
            ("b.yaml", "", "config: expected a file, got '.*a.yaml', which isn't there"),
            ("a.yaml", "data: a", "output: expected --output, or output in the file of --config; got neither"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            given("--config", str(tmp_path / name.replace("b", "a")))
        assert "\n" not in str(raised.value)

    def test_each_flag_is_in_one_group(self):
        assert sorted(name for names in flags.GROUPS.values() for name in names) == sorted(flags.FIELDS)

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--version"])
        assert capsys.readouterr().out == f"rgpb {rgpb.__version__}\n"


class TestEvaluate:
    @pytest.mark.parametrize("loss", ["dpo", full("kto"), full("simpo"), full("mc_po")])
    def test_is_what_the_run_measured(self, data, tmp_path, capsys, loss):
        """The same numbers as the last evaluation of the run that made the model, of the same data."""
        other, base = write(tmp_path / "other.jsonl", arithmetic_pairs(7, seed=2)), tmp_path / "base" / "model"
        train(config(data, tmp_path / "base", loss="mle", steps=1))
        options = {"beta": 0.3}
        settings = {"model": str(base), "eval_data": other, "loss_option": options, "lr": 1e-2}
        train(config(data, tmp_path / "run", loss=loss, **settings))
        line = [
            "evaluate",
            "--model",
            str(tmp_path / "run" / "model"),
            "--data",
            other,
            "--output",
            str(tmp_path / "e"),
        ]
        line += [f"--loss={loss}", "--loss-option=beta=0.3", "--batch-size=3", "--cpu"]
        line += [] if loss == "simpo" else ["--ref-model", str(base)]
        assert cli.main(line) == 0
        found, shown = json.loads((tmp_path / "e" / "evaluation.json").read_text()), capsys.readouterr().out
        beside = ("split", "step", "epoch", "device")
        after = {name: value for name, value in records(tmp_path / "run")[-1].items() if name not in beside}
        assert found["metrics"] == pytest.approx(after, rel=1e-6)
        assert ("rewards/accuracies" in after) == (loss != "simpo")
        assert (found["loss"], found["options"], found["counts"]["units"]) == (loss, options, 7)
        text = (tmp_path / "e" / "evaluation.md").read_text()
        for name in after.keys() & report.METRICS.keys():
            assert f"| {report.METRICS[name]} | {after[name]:.4g} |" in text
        assert f"{after['perplexity']:.4g}" in shown

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["--model=nano-llama"], "model: expected one that was trained, got 'nano-llama', which would be new"),
            (["--model=x", "--loss=dpo"], "ref_model: expected a model, since dpo compares with a reference; got none"),
            ([], "model: expected --model, or model in the file of --config; got neither"),
            (["--model=run"], r"model: expected a folder .* \(a run's is in run/model\), got 'run'"),
        ],
    )
    def test_what_cannot_be_evaluated(self, data, tmp_path, capsys, monkeypatch, line, message):
        monkeypatch.chdir(tmp_path)
        Path("run/model").mkdir(parents=True)
        Path("run/model/config.json").touch()
        assert cli.main(["evaluate", "--data", data, *line]) == 2
        assert re.search(f"rgpb: error: {message}", capsys.readouterr().err)


class TestHeldOut:
    def test_all_of_a_prompt_or_nothing_of_it(self):
        rows = [f"{i % 50}" for i in range(150)]
        out = held_out(rows, None, 3)
        taken = {row for row, there in zip(rows, out) if there}
        assert len(taken) == 2
        assert out == [row in taken for row in rows]
        assert out == held_out(rows, None, 3) != held_out(rows, None, 4)
        assert sum(held_out(rows, 0.5, 3)) == 75
        assert not any(held_out(rows, 0.0, 3))
        assert not any(held_out(rows[:39], None, 3))  # less than two
        assert sum(held_out([str(i) for i in range(9000)], None, 0)) == 200
        with pytest.raises(ValueError, match="eval_split: expected a part with .* on either side, got 0.001 of 50"):
            held_out(rows, 0.001, 3)

    @pytest.mark.parametrize("loss", ["dpo", "swepo", "bnf"])
    def test_nothing_that_is_evaluated_is_trained_on(self, data, groups, tmp_path, monkeypatch, loss):
        """Pairs, groups, and labelled responses, of which each prompt has several."""
        rows = [*arithmetic_pairs(24, seed=1), *arithmetic_pairs(24, seed=1)]
        path = groups if loss == "swepo" else write(tmp_path / "d.jsonl", unpaired(rows) if loss == "bnf" else rows)
        sets = []

        def fit(self, model, tokenizer, train_set, eval_set, **named):
            sets.extend([train_set, eval_set])
            raise InterruptedError

        monkeypatch.setattr(Stage, "fit", fit)
        with pytest.raises(InterruptedError):
            train(config(path, tmp_path / "run", loss=loss, eval_split=0.25))
        prompts = [{tuple(unit[0].tokens[: unit[0].prompt].tolist()) for unit in units} for units in sets]
        assert list(map(len, prompts)) == ([12, 4] if loss == "swepo" else [18, 6])
        assert not prompts[0] & prompts[1]
        assert list(map(len, sets)) == {"dpo": [36, 12], "swepo": [12, 4], "bnf": [72, 24]}[loss]
        assert sets[0].counts["units held out"] == len(sets[1])

    def test_a_run_from_before(self, data, tmp_path):
        """It held nothing out; with data of its own to evaluate on, that changes nothing."""
        for eval_data in (None, data):
            folder, preferences = tmp_path / str(eval_data is None), read_preferences(data)
            held = None if eval_data is None else preferences
            settings = config(data, folder, eval_data=eval_data)
            open_run(folder, settings, preferences, held, None)
            (folder / "metrics.jsonl").touch()
            note = json.loads((folder / "run.json").read_text())
            del note["settings"]["eval_split"]
            (folder / "run.json").write_text(json.dumps(note))
            if eval_data is None:
                with pytest.raises(ValueError, match="eval_split is 0.0 there and None now"):
                    open_run(folder, settings, preferences, held, None)
                settings = dataclasses.replace(settings, eval_split=0.0)
            open_run(folder, settings, preferences, held, None)


class TestHub:
    def test_a_name_is_fetched(self, tmp_path, monkeypatch):
        calls = []

        def fetch(name, allow_patterns, ignore_patterns):
            calls.append((name, "*.safetensors" in allow_patterns))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        monkeypatch.chdir(tmp_path)
        settings = config("d", "o", model="owner/some-1.5B", ref_model="./owner/x")
        assert models.fetched(settings) == dataclasses.replace(settings, model=str(tmp_path))
        assert calls == [("owner/some-1.5B", True), ("owner/some-1.5B", False)]
        (tmp_path / "model.safetensors").touch()
        assert models.fetched(dataclasses.replace(settings, ref_model="a/b")).ref_model == str(tmp_path)
        assert calls[2:] == [("owner/some-1.5B", True), ("a/b", True)]
        (tmp_path / "owner").mkdir()
        assert [models.is_hub_name(name) for name in ("a/b", "owner/x", "gpt2", "/a/b", "a/b/c", "a/b.gguf", "a/")] == [
            True, False, False, False, False, False, False
        ]  # fmt: skip

    def test_no_hub(self, data, tmp_path, monkeypatch, capsys):
        def fetch(name, **_):
            raise FileNotFoundError("Nothing answers.\nMore of it.")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        assert cli.main(["train", "--data", data, "--output", str(tmp_path / "run"), "--model=own/er"]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(
            r"rgpb: error: model: expected .* on a hub that can be reached; got 'own/er' \(Nothing answers\.\)\. "
            r"Where there is a network: hf download own/er --local-dir er; then give that folder\n", said
        )  # fmt: skip


class TestReportTo:
    def test_the_package_is_asked_for_first(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
        for name in ("wandb", "tensorboard"):
            with pytest.raises(ValueError, match=rf"report_to: expected {name} to be installed \(pip install {name}\)"):
                train(config(data, tmp_path / "run", report_to=name))

    def test_every_line_is_sent(self, data, tmp_path, monkeypatch):
        """To TensorBoard in the run's folder, from the evaluation before the first step on."""
        sent = []

        class Writer:
            def __init__(self, log_dir):
                self.folder = log_dir

            def add_scalar(self, name, value, step):
                sent.append((self.folder, name, step))

            def add_text(self, *_):
                pass

            flush = close = add_text

        monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
        train(config(data, tmp_path / "run", report_to="tensorboard", sft_epochs=0.1))
        assert {folder for folder, _, _ in sent} == {str(tmp_path / "run" / "tensorboard")}
        assert {(name, step) for _, name, step in sent if name.endswith("/loss")} == {
            ("eval/loss", 0), ("train/loss", 2), ("train/loss", 4), ("eval/loss", 4)
        }  # fmt: skip


class TestRunningMean:
    def run(self, data, folder, monkeypatch, **changes):
        """A run of bco, and sum and number of the values that its mean was shown, batch by batch."""
        seen, take = [], RunningMean.take

        def taking(self, total, number):
            seen.append((float(total), int(number)))
            return take(self, total, number)

        with monkeypatch.context() as patched:
            patched.setattr(RunningMean, "take", taking)
            train(config(data, folder, **{"loss": "bco", "lr": 1e-2, "save_steps": 2, **changes}))
        return seen

    def progress(self, folder, step):
        return json.loads((folder / f"checkpoint-{step}" / "progress.json").read_text())["running"]

    def test_it_is_that_of_all_training_batches(self, data, tmp_path, monkeypatch):
        """And of no evaluation: those of one run are at every step, those of the other at the ends."""
        seen = self.run(data, tmp_path / "run", monkeypatch, eval_steps=1, grad_accum=2, eval_data=data)
        assert [number for _, number in seen] == [6, 6] * 4  # both of 3 pairs
        for step in (2, 4):
            totals, numbers = map(sum, zip(*seen[: 2 * step]))
            assert self.progress(tmp_path / "run", step) == {"delta": [pytest.approx(totals / numbers), numbers]}
        assert max(abs(total) for total, _ in seen) > 1e-3
        self.run(data, tmp_path / "other", monkeypatch, grad_accum=2, eval_data=data)
        assert_equal(weights(tmp_path / "other"), weights(tmp_path / "run"))
        assert self.progress(tmp_path / "other", 4) == self.progress(tmp_path / "run", 4)

    def test_evaluation_compares_with_it(self, data, tmp_path, monkeypatch):
        self.run(data, tmp_path / "run", monkeypatch)
        ((mean, _),) = self.progress(tmp_path / "run", 4).values()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        pairs = with_reference(tokenise(read_preferences(data), tokenizer), tmp_path / "run")
        batch = Collator(0)(list(pairs))
        inputs = {k: v for k, v in batch.items() if k != "label" and not k.startswith("ref")}
        label, ref = batch["label"], reference_of(batch)
        own, other = (hf.loss(model, inputs, "bco", label=label, ref=ref, delta=delta).item() for delta in (mean, None))
        assert own != pytest.approx(other, rel=1e-5)
        assert records(tmp_path / "run")[-1]["loss"] == pytest.approx(own, rel=1e-6)

    @pytest.mark.full
    def test_a_number_in_its_place(self, data, tmp_path, monkeypatch):
        assert self.run(data, tmp_path / "run", monkeypatch, loss_option={"delta": 0.5}) == []
        assert self.progress(tmp_path / "run", 4) == {}
        assert records(tmp_path / "run")[0]["loss"] == pytest.approx(
            sum(math.log1p(math.exp(x)) for x in (0.5, -0.5)) / 2, rel=1e-4
        )

    @pytest.mark.full
    def test_of_a_term_of_a_sum(self, data, tmp_path, monkeypatch):
        seen = self.run(data, tmp_path / "run", monkeypatch, loss="0.5*dpo + bco")
        mean = sum(total for total, _ in seen) / 24
        assert self.progress(tmp_path / "run", 4) == {"bco.delta": [pytest.approx(mean), 24]}


class TestDraws:
    @pytest.mark.parametrize("loss", ["mc_po", full("rnce")])
    def test_evaluation_draws_the_same_each_time(self, groups, tmp_path, loss):
        """Learning too slowly to change a weight."""
        settings = {"loss": loss, "lr": 1e-30, "eval_steps": 1, "loss_option": {"beta": 5.0}}
        torch.manual_seed(7)
        other = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **SMALL))  # so that negatives differ
        other.save_pretrained(tmp_path / "ref")
        train(config(groups, tmp_path / "run", ref_model=str(tmp_path / "ref"), **settings))
        losses = [r["loss"] for r in records(tmp_path / "run") if r["split"] == "eval"]
        assert losses == losses[:1] * 5
        trained = [r["loss"] for r in records(tmp_path / "run") if r["split"] == "train"]
        assert len(set(trained)) > 1

    def test_more_than_some_groups_have(self, tmp_path):
        """Batches of one group each, of 2 and of 4, that are to draw 3."""
        rows = [row for row in rewarded(12) if len(row["completions"]) != 3]
        path = write(tmp_path / "d.jsonl", rows)
        result = train(config(path, tmp_path / "run", loss="mc_po", loss_option={"m": 3}, batch_size=1))
        assert result["steps"] == 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"loss": "nope"}, r"loss: expected a function or one of \['apo_down', .*\], got 'nope'"),
            ({"loss_option": {"gamma": 1.0}}, r"loss_option: expected one of \['beta', .*\] for dpo, got 'gamma'"),
            ({"loss_option": {"beta": True}}, "loss_option: expected beta to be a float for dpo, got True"),
            ({"pairing": "x"}, "pairing: expected one of"),
            ({"batch_size": 0}, "batch_size: expected a positive whole number, got 0"),
            ({"warmup": 2.0}, "warmup: expected a part of the steps, from 0 to 1, got 2.0"),
            ({"lr": float("nan")}, "lr: expected a positive number, got nan"),
            ({"model": "nowhere"}, r"model: .* config.json or a GGUF file, or one of .*, got 'nowhere'"),
            ({"ref_model": "nowhere"}, "ref_model: expected a folder with a config.json or a GGUF file, got 'nowhere'"),
            ({"loss": "simpo", "ref_model": "x"}, "ref_model: expected none, since simpo has no reference; got 'x'"),
            ({"sft_lr": 1e-3}, "sft_lr: expected none without sft_epochs, got 0.001"),
            ({"vocab_size": 100}, "vocab_size: expected at least 258, got 100"),
            ({"loss": "swepo", "pairing": "all"}, "pairing: expected none, since swepo takes whole groups; got 'all'"),
            (
                {"loss": "mle + 0.5*dop"},
                r"loss: expected terms such as mle or 0.5\*dpo, of .*, got '\+0.5\*dop' in 'mle",
            ),
            ({"loss": "mle + mle"}, "loss: expected each name once, got 'mle' twice"),
            ({"loss": "inf*mle"}, r"loss: expected terms such as mle .*, got 'inf\*mle'"),
            ({"loss": "dpo + swepo"}, "loss: expected pairs or groups in one sum, got both"),
            ({"loss": "bnf + swepo"}, r"loss: expected no labels beside groups, got \['bnf'\]"),
            (
                {"loss": "mle + dpo", "loss_option": {"simpo.beta": 1.0}},
                r"loss_option: expected one of \['beta', 'dpo.beta', .*\] for .*dpo, got 'simpo.beta'",
            ),
            ({"loss": "mc_po", "loss_option": {"generator": 3}}, "loss_option: .*generator"),
            ({"loss": "mle + mc_po"}, "loss: expected mc_po by itself"),
            ({"loss": "mc_po", "loss_option": {"m": 1.5}}, "loss_option: expected m to be a int for mc_po, got 1.5"),
            ({"loss": "mc_po", "loss_option": {"m": 2}}, "m: expected a whole number from 1 to 1, .* got 2"),
            ({"loss": "bco", "loss_option": {"delta": "x"}}, "expected delta to be a float for bco, got 'x'"),
            ({"loss": "swepo", "loss_option": {"mode": "x"}}, "loss_option: swepo: expected mode to be .*, got 'x'"),
        ],
    )
    def test_settings(self, data, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            train(config(data, tmp_path / "run", **changes))
        assert not list(tmp_path.glob("run/checkpoint*"))

    def test_positions_and_vocabulary(self, data, tmp_path):
        train(config(data, tmp_path / "run"))
        folder = tmp_path / "run" / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pairs = tokenise(read_preferences(data), tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.max_position_embeddings = 5
        with pytest.raises(ValueError, match="max_length: expected at most 5, the positions of m; got"):
            models.check_tokens(model, "m", [pairs])
        pairs.tokens[0] = 999
        with pytest.raises(ValueError, match="model: expected a vocabulary for token 999, got 258 in m"):
            models.check_tokens(model, "m", [pairs])

    def test_the_command_says_what_is_wrong(self, tmp_path, capsys):
        path = write(tmp_path / "d.jsonl", [{"prompt": "a"}])
        assert cli.main(["train", "--data", path, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"rgpb: error: .*d\.jsonl:1: expected the keys of one form .*\n", error)
        assert not (tmp_path / "run").exists()
        assert cli.main(["train", "--data", path, "--output", "x", "--loss-option", "beta"]) == 2
        assert "loss_option: expected KEY=VALUE, got 'beta'" in capsys.readouterr().err

    def test_another_loss_in_the_same_folder(self, data, tmp_path, capsys):
        """A folder holds one run. Nothing is trained for this."""
        folder, preferences = tmp_path / "run", read_preferences(data)
        open_run(folder, config(data, folder, loss="bnf"), preferences, None, None)
        (folder / "metrics.jsonl").touch()
        given = ["--data", data, "--output", str(folder), "--loss", "dpo", "--steps", "4", "--cpu", "--quiet"]
        assert cli.main(["train", *given]) == 2
        error = capsys.readouterr().err
        assert re.search(
            rf"output: expected the settings of the run in {folder}, .*loss is 'bnf' there and 'dpo' now", error
        )
        assert "take another --output, or --overwrite to start anew" in error
        assert json.loads((folder / "run.json").read_text())["settings"]["loss"] == "bnf"

    def test_options_of_the_command(self):
        given = flags.parse_options(["beta=0.2", "length_normalize=False", "mode=x"])
        assert given == {"beta": 0.2, "length_normalize": False, "mode": "x"}
        checked = settings_module.check_options(OBJECTIVES["ipo"], {"tau": 1, "length_normalize": False})
        assert checked == {"tau": 1.0, "length_normalize": False}

    def test_help_names_the_options_of_every_loss(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        shown = capsys.readouterr().out
        text = shown.partition("options of the objectives")[2]
        for name, spec in OBJECTIVES.items():
            after = text.partition(f"\n  {name}")[2]
            assert all(f"    {key}: " in after for key in spec.options if key != "generator")
        assert "generator" not in text
        assert "    delta: float, default its mean over all batches\n" in text
        assert "    z0: float, default estimated from mismatched completions\n" in text
        flags = " ".join(shown.partition("options of the objectives")[0].split())
        assert "--lr LR peak learning rate (a positive number; default: 1e-05)" in flags
        assert "--steps STEPS optimizer steps, instead of --epochs (a positive whole number)" in flags

    def test_importing_the_package_leaves_transformers_alone(self):
        program = "import sys, rgpb, rgpb.cli; sys.exit('transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class TestReport:
    def test_numbers_are_those_of_the_metrics(self, data, tmp_path):
        train(config(data, tmp_path / "run", eval_steps=2))
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if line["split"] == "eval"]
        text = (tmp_path / "run" / "report.md").read_text()
        for name, title in report.METRICS.items():
            if name == "reward/sampled":  # of an online run
                assert title not in text
                continue
            first, last = evaluations[0][name], evaluations[-1][name]
            assert f"| {title} | {first:.4g} | {last:.4g} | {last - first:+.4g} |" in text
        assert f"| seconds |  | {lines[-1]['seconds']:.1f} |  |" in text
        assert f"| peak memory of the process |  | {max(x['peak_bytes'] for x in lines) / 2**20:.0f} MiB |  |" in text
        assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_side_by_side(self, tmp_path, capsys):
        """Two runs as their metrics say; the second has no reference."""
        beside = {"seconds": 2.0, "peak_bytes": 2**20, "device": "cpu"}
        runs = {loss: tmp_path / loss for loss in ("bnf", "simpo")}
        for i, folder in enumerate(runs.values()):
            values = {"loss": 2.0 + i, "agility": 0.25 - i, "perplexity": 7.5 + i}
            values |= {} if i else {"rewards/accuracies": 0.5}
            lines = [{"split": "eval", "step": step, **{k: v + step for k, v in values.items()}} for step in (0, 3)]
            folder.mkdir()
            write(folder / "metrics.jsonl", [{**line, **beside} for line in lines])
        report.compare(runs, tmp_path / "both", extra={"extra": {"bnf": "1"}}, note="A note.")
        text = (tmp_path / "both" / "report.md").read_text()
        assert (tmp_path / "both" / "report.png").read_bytes().startswith(b"\x89PNG")
        last = [records(folder)[-1] for folder in runs.values()]
        assert "| extra | 1 | – |" in text
        assert re.search(rf"\| agility.* \| {last[0]['agility']:.4g} \(.*\) \| {last[1]['agility']:.4g} \(", text)
        assert re.search(r"higher implicit reward on the chosen \| .* \| – \(–\) \|", text)  # simpo has no reference
        assert "A note." in text
        report.show(report.table(report.read_metrics(tmp_path / "bnf")), "title")
        assert f"{last[0]['perplexity']:.4g}" in capsys.readouterr().out

    def test_runs_share_a_panel_where_they_share_a_scale(self, tmp_path):
        """A loss has a panel of its own, and so each run's; margins depend on β, so they are one run's alone."""
        measured = {"loss": 1.0, "rewards/margins": 0.5, "logps/chosen": -2.0, "logps/rejected": -3.0}
        lines = [{"split": split, "step": i, **measured} for i in range(2) for split in ("train", "eval")]
        one, two = report.panels({"a": lines}), report.panels({"a": lines, "b": lines})
        assert [[curve.run for curve in panel.curves] for panel in one] == [["a"], ["a"], ["a", "a"]]
        assert [[curve.run for curve in panel.curves] for panel in two] == [["a"], ["b"], ["a", "a", "b", "b"]]
        assert [panel.curves[0].metric for panel in one] == ["loss", "rewards/margins", "logps/chosen"]
        assert [(curve.dashed, curve.shift) for curve in one[2].curves] == [(False, True), (True, True)]
        assert all(panel.unit for panel in two)

    def test_the_picture_says_what_its_lines_are(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(Figure, "savefig", lambda self, place, **_: drawn.append(self) or place.write_bytes(b""))
        steps = ((0, "eval", 3.0), (1, "train", 2.5), (2, "eval", 1.0))
        lines = [{"split": split, "step": step, "loss": x, "logps/chosen": -x} for step, split, x in steps]
        report.plot({"mine": lines}, tmp_path / "picture.png")
        (figure,) = drawn
        keys = {text.get_text() for text in figure.legends[0].get_texts()}
        assert keys == {"mine", "thick: evaluation set", "thin: training batches, mean since the previous point"}
        loss, shift = figure.axes
        assert [list(line.get_ydata()) for line in loss.lines] == [[2.5], [3.0, 1.0]]
        assert loss.lines[0].get_linewidth() < loss.lines[1].get_linewidth()
        assert [list(line.get_ydata()) for line in shift.lines] == [[0.0, 2.0]]  # since the start, evaluations alone
        assert all(axes.get_xlabel() == "optimizer step" and axes.get_ylabel() for axes in figure.axes)

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"folder: expected one of a run, with metrics.jsonl"):
            report.write(tmp_path)
        (tmp_path / "metrics.jsonl").write_text('{"split": "train"}\n{"spl')
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
            report.write(tmp_path)
        with pytest.raises(ValueError, match="runs: expected at least one, got none"):
            report.compare({}, tmp_path)


class TestDemo:
    def test_pairs(self):
        rows = arithmetic_pairs(500, seed=3)
        assert rows == arithmetic_pairs(500, seed=3) != arithmetic_pairs(500, seed=4)
        assert len({row["prompt"] for row in rows}) == 500
        for row in rows:
            a, b = (int(number) for number in row["prompt"][:-1].split("+"))
            ones, tens, result = row["chosen"].split(",")
            for sum_ in (ones, tens):
                left, right = sum_.split("=")
                assert sum(int(digit) for digit in left.split("+")) == int(right)
            assert int(result) == a + b
            assert abs(int(row["rejected"].split(",")[2]) - (a + b)) == 10
            differing = [i for i, (x, y) in enumerate(zip(row["chosen"], row["rejected"])) if x != y]
            assert len(differing) == 2
            assert len(row["chosen"]) == len(row["rejected"])
        with pytest.raises(ValueError, match="n: expected 1 to 7000, got 0"):
            arithmetic_pairs(0, seed=0)

    @pytest.mark.full
    def test_exact_answers_are_greedy_generation(self, tmp_path):
        rows = arithmetic_pairs(12, seed=0)
        half = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:5]]
        path = write(tmp_path / "d.jsonl", [*half, *rows[5:]])
        train(config(path, tmp_path / "run", loss="mle", steps=120, batch_size=6, lr=1e-2))
        folder, asked = tmp_path / "run" / "model", write(tmp_path / "asked.jsonl", rows)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        found = []
        for row in rows:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            text = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
            answer = tokenizer.decode(text)
            found.append([answer == row[key] + "<|endoftext|>" for key in ("chosen", "rejected")])
        rates = [sum(column) / 12 for column in zip(*found)]
        assert min(rates) > 0  # it has learnt both
        assert demo_module.exact_answers(folder, asked) == pytest.approx(rates)

    def test_small(self, tmp_path, monkeypatch, capsys):
        for name, value in {"NOISY": 40, "PAIRS": 30, "TEST": 10}.items():
            monkeypatch.setattr(demo_module, name, value)
        monkeypatch.setattr(demo_module, "STEP", {"responses": 4, "tokens": 8, "width": 16, "vocab": 100})
        drawn = []
        monkeypatch.setattr(report, "plot", lambda runs, path: drawn.append(sorted(runs)))
        result = demo_module.demo(tmp_path / "demo", progress=False)
        assert drawn == [["mle"], ["bnf"], ["dpo"], ["nll_pll"], ["BNF", "DPO", "NLL+PLL"]]
        out, text = capsys.readouterr().out, (tmp_path / "demo" / "report.md").read_text()
        for name in ("BNF", "DPO", "NLL+PLL"):
            right, wrong = result["right"][name], result["wrong"][name]
            assert f"{name} {right:.0%}" in result["summary"]
            assert f"{right:.1%} ({100 * (right - result['before'][0]):+.1f})" in text
            assert f"{wrong:.1%} ({100 * (wrong - result['before'][1]):+.1f})" in text
        assert result["summary"] in text
        assert result["summary"] in out
        assert result["step"] in text
        starts = [records(tmp_path / "demo" / loss)[0] for loss in demo_module.METHODS]
        assert len({start["perplexity"] for start in starts}) == 1
        again = demo_module.demo(tmp_path / "demo", progress=False)  # finished runs aren't run again
        assert (again["right"], again["before"]) == (result["right"], result["before"])
        with pytest.raises(ValueError, match="output: expected a new folder or that of an earlier demo"):
            demo_module.demo(tmp_path)

    def test_summary_follows_the_numbers(self):
        def run(change):
            lines = ({"split": "eval", "step": i, "logps/chosen": -2.0 + i * change} for i in range(2))
            return list(lines)

        text = demo_module.summarise({"A": run(-1.0), "B": run(0.5)}, {"A": 0.25, "B": 0.5}, 0.125)
        assert "from 12% to: B 50%, A 25%" in text
        assert "B +0.5, A -1: right answers became less likely with A." in text

    def test_disagreement_is_not_hidden(self, monkeypatch):
        monkeypatch.setattr(demo_module, "STEP", {"responses": 4, "tokens": 8, "width": 16, "vocab": 100})
        right = demo_module.fused_loss
        monkeypatch.setattr(demo_module, "fused_loss", lambda *a, **k: 1.01 * right(*a, **k))
        with pytest.raises(RuntimeError, match="the fused BNF step and the one with full logits disagree"):
            demo_module.one_step()

    @pytest.mark.full
    def test_whole(self, tmp_path):
        """The case that BNF's authors describe: pairs that differ in a digit or two."""
        assert cli.main(["demo", "--output", str(tmp_path / "demo"), "--quiet"]) == 0
        result = demo_module.demo(tmp_path / "demo", progress=False)
        right = result["right"]
        assert right["BNF"] > max(right["DPO"], right["NLL+PLL"], result["before"][0])


@pytest.mark.full
def test_an_option_of_a_sum_without_its_term_stands(data, tmp_path):
    """`delta` alone is bco's δ, so no running mean is kept instead."""
    losses = {}
    for name, options in (("dotted", {"bco.delta": 5.0}), ("plain", {"delta": 5.0}), ("none", {})):
        run = tmp_path / name
        train(config(data, run, loss="bco + 0.1*mle", steps=2, loss_option=options))
        losses[name] = [r["loss"] for r in records(run)]
    assert losses["dotted"] == losses["plain"] != losses["none"]


class TestTies:
    """An answer as good as the best is no negative of losses that read no rewards."""

    @pytest.mark.parametrize(("loss", "there"), [("mc_po", 2), full("rnce", 2), full("mle + rnce", 2), ("swepo", 3)])
    def test_what_takes_part(self, tmp_path, monkeypatch, loss, there):
        rows = [{"prompt": f"{i}+", "completions": ["2.", "two.", "3."], "rewards": [1, 1, 0]} for i in range(4)]
        seen = []
        whole = Stage.fit

        def fit(self, model, tokenizer, train_set, *more, **named):
            seen.append((train_set.units >= 0).sum(1).tolist())
            return whole(self, model, tokenizer, train_set, *more, **named)

        monkeypatch.setattr(Stage, "fit", fit)
        train(config(write(tmp_path / "t.jsonl", rows), tmp_path / "run", loss=loss, steps=1))
        assert seen == [[there] * 4]


def test_another_function_of_the_same_name_is_another_run(data, tmp_path):
    """An objective from outside the package is part of the settings by its text."""
    from rgpb import objective

    def up_of_this_test(seen):
        return -seen.logps(length_normalize=True)

    def down_of_this_test(seen):
        return seen.logps(length_normalize=True)

    try:
        objective("own_of_this_test", couples="token")(up_of_this_test)
        settings = config(data, tmp_path / "run", loss="own_of_this_test", steps=1)
        train(settings)
        assert train(settings)["resumed"] is None
        objective("own_of_this_test", couples="token")(down_of_this_test)
        with pytest.raises(ValueError, match="output: expected the settings of the run .*functions is"):
            train(settings)
    finally:
        del OBJECTIVES["own_of_this_test"]


class TestMismatched:
    """kto's z₀: the prompts of a batch with the completions of others."""

    def test_every_completion_follows_another_prompt(self, data):
        tokenizer = train_tokenizer(["0"], 258)
        pairs = tokenise(read_preferences(data), tokenizer)
        other = pairs.mismatched(max_length=100)
        assert torch.equal(other.prompts, pairs.prompts)
        for r in range(len(pairs.prompts)):
            mine, theirs = other.response(r), pairs.response((r + 2 - r % 2) % len(pairs.prompts))
            assert torch.equal(mine.tokens[: mine.prompt], pairs.response(r).tokens[: mine.prompt])
            assert torch.equal(mine.tokens[mine.prompt :], theirs.tokens[theirs.prompt :])
        short = pairs.mismatched(max_length=10)
        assert short.lengths().max() == 10

    def test_one_prompt_alone_is_refused(self, tmp_path):
        path = write(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
        with pytest.raises(ValueError, match="data: expected responses to two prompts at least"):
            train(config(path, tmp_path / "run", loss="kto"))
        train(config(path, tmp_path / "run", loss="kto", steps=1, loss_option={"z0": 0.5}))

    @pytest.mark.parametrize("packing", [False, full(True)])
    def test_the_step_and_the_evaluation_use_them(self, data, tmp_path, packing, monkeypatch):
        """The logged loss, before any step and in evaluation, is that of `fused_loss` with z₀ from the other batch."""
        run = tmp_path / "run"
        options = {"desirable_weight": 3.0, "beta": 0.5}  # so that z₀ doesn't cancel
        train(config(data, run, loss="kto", steps=3, batch_size=24, packing=packing, loss_option=options))
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        pairs = tokenise(read_preferences(data), tokenizer)
        batch = Collator(0)(list(with_reference(pairs, run)))
        other = with_reference(pairs.mismatched(1024), run)
        wrong = Collator(0)([(other.response(r),) for r in pairs.units.T.reshape(-1)])
        ratio = (hf.token_scores(model, inputs_of(wrong)).logp - wrong["ref_logp"]).sum(1)
        label, ref = batch["label"], reference_of(batch)
        loss = hf.loss(model, inputs_of(batch), "kto", label=label, ref=ref, z0=ratio.double(), **options).item()
        own = ratio + (wrong["ref_logp"] - batch["ref_logp"]).sum(1)  # less the scores of the others
        off = hf.loss(model, inputs_of(batch), "kto", label=label, ref=ref, z0=own.double(), **options).item()
        logged = records(run)[-1]["loss"]
        assert abs(logged - loss) < 1e-5
        assert abs(off - loss) > 1e-3


def inputs_of(batch):
    return {k: v for k, v in batch.items() if k not in ("label", "ref_logp", "ref_log_odds")}


def test_data_that_is_not_what_it_seems_has_to_be_allowed(tmp_path):
    """Nothing is written before; with `allow` the counts are in the report."""
    data = write(tmp_path / "same.jsonl", [{"prompt": f"{i}", "chosen": " a", "rejected": " a"} for i in range(4)])
    with pytest.raises(ValueError, match="at most half of the units .*equal responses: 4 of 4 .--allow"):
        train(config(data, tmp_path / "run", steps=1))
    result = train(config(data, tmp_path / "run", steps=1, allow=True))
    assert result["counts"]["units of equal responses"] == 4
    shown = (tmp_path / "run" / "report.md").read_text()
    assert "rows read as prompt, chosen, rejected: 4" in shown
    assert "units of equal responses: 4" in shown


def test_a_padding_token_that_the_model_has_not(data, tmp_path):
    tokenizer = train_tokenizer(["1 + 1 = 2"], 258)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, **SMALL))
    model.save_pretrained(tmp_path / "m")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(tmp_path / "m")
    assert tokenizer.pad_token_id == 258
    settings = {"model": str(tmp_path / "m"), "max_length": 64, "steps": 1}
    assert train(config(data, tmp_path / "run", **settings))["steps"] == 1
