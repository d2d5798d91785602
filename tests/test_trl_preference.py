"""`PreferenceTrainer` and `UnpairedTrainer` of `rgpb.trl` beside TRL's, and beside `rgpb.hf.loss` called by hand."""

from __future__ import annotations

import copy
import math
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM
from trl_trainers import LOSSES, MARKS, SIZES, away, make, trainer_of

from rgpb import hf
from rgpb.objectives import RunningMean
from rgpb.train.tokens import train_tokenizer
from rgpb.trl import PreferenceTrainer, UnpairedTrainer, accelerate

pytestmark = MARKS
parts = pytest.fixture(scope="module")(make)

SHARED = ("loss", "grad_norm", *(f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")))


def ours(parts, folder, given=None, **settings):
    return trainer_of(parts, folder, PreferenceTrainer, given, **settings)


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(trainer, batch):
    """Loss and gradients of one batch."""
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def same(a, b, atol=1e-6):
    torch.testing.assert_close(a[0], b[0], atol=atol, rtol=1e-6)
    assert len(a[1]) == len(b[1]) > 0
    for x, y in zip(a[1], b[1]):
        torch.testing.assert_close(x, y, atol=atol * max(1.0, float(y.abs().max())), rtol=0)


def history(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_each_loss_of_trl(parts, tmp_path):
    """Of one batch: its value and gradients are TRL's."""
    theirs = trainer_of(parts, tmp_path, label_smoothing=0.1)
    batch = first_batch(theirs)
    for loss_type in LOSSES:
        theirs.loss_types = [loss_type]
        smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
        given = {"ref_model": None} if loss_type == "sft" else None
        trainer = ours(parts, tmp_path, given, loss_type=loss_type, **smoothing)
        same(gradients(trainer, first_batch(trainer)), gradients(theirs, batch))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "beta": 0.3},
        pytest.param(
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, marks=pytest.mark.full
        ),
        pytest.param({"max_length": 14, "loss_type": "ipo", "optim": "sgd"}, marks=pytest.mark.full),
        pytest.param({"max_length": 6, "truncation_mode": "keep_end"}, marks=pytest.mark.full),
        pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.full),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 2}, marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_twenty_steps(parts, tmp_path, settings):
    """Losses, metrics and weights beside TRL's own."""
    results = []
    for kind in (trl.DPOTrainer, PreferenceTrainer):
        trainer = trainer_of(parts, tmp_path / kind.__name__, kind, max_steps=20, **settings)
        trainer.train()
        results.append((history(trainer), [p.detach() for p in trainer.model.parameters()]))
    (theirs, weights), (found, others) = results
    assert len(theirs) == len(found) == 20
    for a, b in zip(theirs, found):
        for name in SHARED:
            factor = settings.get("beta", 0.1) if settings.get("loss_type") == "ipo" and "rewards" in name else 1.0
            assert math.isclose(a[name], factor * b[name], rel_tol=1e-5, abs_tol=2e-6), (name, a[name], b[name])
        assert a["num_tokens"] == b["num_tokens"]
    for a, b in zip(weights, others):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("loss_type", "weights", "by_hand", "options"),
    [
        (["bnf"], None, "bnf", {}),
        (["simpo"], None, "simpo", {}),
        (["kto"], None, "kto", {"beta": 0.1}),
        (["bnf", "dpo", "mle"], [1.0, 0.5, 0.1], {"bnf": 1.0, "dpo": 0.5, "mle": 0.1}, {"dpo.beta": 0.1}),
    ],
)
def test_own_objectives(parts, tmp_path, loss_type, weights, by_hand, options):
    trainer = ours(
        parts, tmp_path, given=None if loss_type != ["simpo"] else {"ref_model": None}, loss_type=loss_type,
        loss_weights=weights,
    )  # fmt: skip
    batch = first_batch(trainer)
    value = gradients(trainer, batch)
    model, plain = away(parts[1]), {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        ref = hf.token_scores(parts[1], plain)
    half = len(plain["labels"]) // 2
    assert int((plain["labels"][:half] != -100).sum()) > 0
    label = torch.arange(2 * half) < half
    loss = hf.loss(
        model, plain, by_hand, label=label if loss_type in (["bnf"], ["kto"]) else None,
        ref=None if loss_type == ["simpo"] else ref, **options,
    )  # fmt: skip
    loss.backward()
    same(value, (loss.detach(), [p.grad for p in model.parameters()]))


def test_mle_sees_the_chosen_alone(parts, tmp_path):
    trainer = ours(parts, tmp_path, {"ref_model": None}, loss_type="mle")
    assert trainer.ref_model is None
    batch = first_batch(trainer)
    assert len(batch["input_ids"]) == 4
    with_rejected = ours(parts, tmp_path, loss_type="sigmoid")
    torch.testing.assert_close(batch["labels"], first_batch(with_rejected)["labels"][:4, : batch["labels"].shape[1]])


@pytest.mark.parametrize("loss_type", ["bnf", "sigmoid"])
def test_packed_and_precomputed(parts, tmp_path, loss_type):
    """Without padding, and with reference scores that are stored: the same loss."""
    plain = ours(parts, tmp_path, loss_type=loss_type)
    expected = gradients(plain, first_batch(plain))
    packed = ours(parts, tmp_path, loss_type=loss_type, padding_free=True)
    batch = first_batch(packed)
    assert batch["input_ids"].shape[0] == 1
    assert packed.args.padding_free
    same(gradients(packed, batch), expected, 2e-6)
    for free in (False, True):
        stored = ours(parts, tmp_path, loss_type=loss_type, padding_free=free, precompute_ref_log_probs=True)
        batch = first_batch(stored)
        assert batch["ref_logp"].abs().sum() > 0
        stored.ref_model = None
        same(gradients(stored, batch), expected, 2e-6)


def test_stored_scores_are_of_model_and_tokens(parts, tmp_path):
    """The same for every loss; others where the model, the cut or the precision is another."""

    def stored(given=None, **settings):
        trainer = ours(parts, tmp_path, given, precompute_ref_log_probs=True, **settings)
        return trainer.train_dataset, trainer

    first, _ = stored(loss_type="bnf")
    second, trainer = stored(loss_type="sigmoid", beta=0.5)
    assert first.cache_files[-1]["filename"] == second.cache_files[-1]["filename"]
    cut, _ = stored(loss_type="bnf", max_length=8, truncation_mode="keep_end")
    assert sum(map(len, cut["ref_rejected_logp"])) < sum(map(len, first["ref_rejected_logp"]))
    turned = copy.deepcopy(parts[1])
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 7.0}  # with the same weights
    third, _ = stored({"ref_model": turned}, loss_type="bnf")
    assert first.cache_files[-1]["filename"] != third.cache_files[-1]["filename"]
    other, _ = stored({"ref_model": away(parts[1])}, loss_type="bnf")
    assert other["ref_chosen_logp"] != first["ref_chosen_logp"]
    row = {name: first[3][name] for name in ("prompt_ids", "chosen_ids")}
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    logits = parts[1](input_ids=ids).logits.double().log_softmax(-1)
    start = len(row["prompt_ids"])
    by_hand = logits[0, start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(first[3]["ref_chosen_logp"]).double(), by_hand, atol=1e-5, rtol=1e-5)
    wrong = trainer.data_collator
    row = dict(first[3], chosen_ids=[*first[3]["chosen_ids"], 5])
    with pytest.raises(ValueError, match="ref_logp: expected one for each of .* reference scores are of other tokens"):
        wrong([row])


@pytest.mark.parametrize("how", ["config", "model"])
def test_peft(parts, tmp_path, how):
    """The reference is the model without its new adapters, or a copy of those that it came with; as TRL has it."""
    _, model, _ = parts
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    results = []
    for kind in (trl.DPOTrainer, PreferenceTrainer):
        torch.manual_seed(3)
        given = {"ref_model": None, "model": copy.deepcopy(model)}
        given |= {"peft_config": config} if how == "config" else {"model": get_peft_model(given["model"], config)}
        trainer = trainer_of(parts, tmp_path / kind.__name__, kind, given, max_steps=3, learning_rate=1e-2)
        trainer.train()
        weights = [p.detach() for name, p in trainer.model.named_parameters() if ".default." in name]
        assert len(weights) == 2
        results.append((history(trainer), weights))
    for a, b in zip(*(steps for steps, _ in results)):
        for name in SHARED:
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=2e-6), (name, a[name], b[name])
    for a, b in zip(*(weights for _, weights in results)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert results[1][0][-1]["rewards/margins"] != 0


def test_adapters_that_took_weights_over(parts, tmp_path):
    """TRL takes what such adapters leave for the reference, and takes weights over again for a copy of them."""
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="ref_model: expected adapters without .* got init_lora_weights='pissa'"):
        ours(parts, tmp_path, {"ref_model": None, "peft_config": config})
    model = get_peft_model(copy.deepcopy(parts[1]), config)
    before = copy.deepcopy(model.state_dict())
    for loss in ("sigmoid", "simpo"):
        with pytest.raises(ValueError, match="ref_model: expected adapters without"):
            ours(parts, tmp_path, {"ref_model": None, "model": model}, loss_type=loss)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    ours(parts, tmp_path, {"model": model}, max_steps=1).train()  # with a reference model


def test_evaluation(parts, tmp_path):
    """Loss and metrics of held-out pairs, also where the last batch is smaller, and of pairs given afterwards."""
    data = parts[2]
    trainer = ours(
        parts, tmp_path, {"eval_dataset": data.select(range(6))}, loss_type="bnf", per_device_eval_batch_size=4,
        max_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    trainer.model.eval()
    whole = ours(parts, tmp_path, loss_type="bnf", per_device_eval_batch_size=6)
    whole.model = trainer.model
    again = whole.evaluate(data.select(range(6)))
    assert math.isclose(found["eval_loss"], again["eval_loss"], rel_tol=1e-5)
    assert math.isclose(found["eval_rewards/margins"], again["eval_rewards/margins"], rel_tol=1e-4)
    assert any("eval_loss" in line for line in trainer.state.log_history)
    sets = {"a": data.select(range(6)), "b": data.select(range(6, 9))}
    named = whole.evaluate(sets)  # TRL's own metrics lose the names
    assert named["eval_a_rewards/margins"] == again["eval_rewards/margins"] != named["eval_b_rewards/margins"]
    assert "eval_rewards/margins" not in named


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "settings", "mean"),
    [
        (PreferenceTrainer, {"loss_type": "bnf", "padding_free": True, "precompute_ref_log_probs": True}, False),
        (UnpairedTrainer, {"loss_type": "kto"}, False),
        (UnpairedTrainer, {"loss_type": "bco"}, True),
    ],
)
def test_resumed(parts, tmp_path, kind, settings, mean):
    """A run that goes on from a checkpoint, in the middle of an epoch, ends as one that was never interrupted."""
    data = parts if kind is PreferenceTrainer else unpaired(parts)
    settings |= {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    ends = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        given = {"options": {"delta": RunningMean()}} if mean else {}
        trainer = trainer_of(data, tmp_path, kind, given, save_strategy="no" if resumed else "steps", **settings)
        trainer.train(resume_from_checkpoint=resumed)
        ends.append([p.detach() for p in trainer.model.parameters()])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)
    if mean:
        (tmp_path / "checkpoint-2" / "running_means.pt").unlink()
        with pytest.raises(ValueError, match="options: expected the running mean delta in .*running_means.pt, got"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.full
def test_router_loss(parts, tmp_path):
    """Of a mixture of experts: TRL's, with the model's coefficient or the given one."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=258, num_local_experts=2, num_key_value_heads=1, tie_word_embeddings=False, **SIZES
    )
    model = MixtralForCausalLM(config)
    for coefficient, asked in ((None, False), (0.5, False), (0.0, False), (0.0, True)):
        results = []
        model.config.output_router_logits = asked
        for kind in (trl.DPOTrainer, PreferenceTrainer):
            trainer = trainer_of(
                (parts[0], model, parts[2]), tmp_path, kind, max_steps=3, gradient_accumulation_steps=2,
                router_aux_loss_coef=coefficient, optim="sgd", learning_rate=0.1,
            )  # fmt: skip
            trainer.train()
            assert trainer.model.config.router_aux_loss_coef == config.router_aux_loss_coef  # it is saved
            results.append(
                (
                    torch.tensor([line["loss"] for line in history(trainer)]),
                    [p.detach() for p in trainer.model.parameters()],
                )
            )
        same(results[1], results[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoyd"}, "loss_type: expected names of .*, got 'sigmoyd'; did you mean 'sigmoid'"),
        ({"loss_type": "swepo"}, "loss_type: expected objectives of pairs .*, got 'swepo', .* GroupTrainer takes it"),
        ({"loss_type": "bnf + mle"}, "loss_type: expected names of .*; of a sum give the names as a list, and loss_w"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type: expected each loss once, got 'dpo' twice"),
        ({"loss_type": "exmate", "beta": 2.5}, "beta: expected 0.1, since none of loss_type .*exmate.* takes it"),
        ({"label_smoothing": 0.1}, "label_smoothing: expected 0.0, since none of loss_type .*sigmoid"),
        ({"ld_alpha": 0.5}, "ld_alpha: expected None, .* DPOTrainer under rgpb.trl.accelerate"),
        ({"use_weighting": True}, "use_weighting: expected False"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type: expected 'reverse_kl'"),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected above 0 with 'exo_pair'"),
        ({"loss_type": "simpo"}, "ref_model: expected none, since loss_type .*simpo.* has no reference"),
    ],
)
def test_what_is_refused(parts, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ours(parts, tmp_path, **settings)


def test_smoothing_reaches_our_dpo(parts, tmp_path):
    assert ours(parts, tmp_path, loss_type="dpo", label_smoothing=0.2).options["label_smoothing"] == 0.2
    for name in ("tau", "ipo.tau"):
        assert ours(parts, tmp_path, {"options": {name: 0.7}}, loss_type="ipo").options == {"tau": 0.7}
    with pytest.raises(ValueError, match="options of ipo: expected a subset of .*, got .'tua'.*did you mean 'tau'"):
        ours(parts, tmp_path, {"options": {"tua": 0.7}}, loss_type="ipo")
    with pytest.raises(ValueError, match="args: expected a DPOConfig, got KTOConfig"):
        PreferenceTrainer(parts[1], args=trl.KTOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=parts[2])
    given = {"options": {"beta": 0.5, "hinge.beta": 0.2}}
    assert ours(parts, tmp_path, given, loss_type=["robust", "hinge"]).options == {
        "robust.label_smoothing": 0.0,
        **given["options"],
    }


def test_further_refusals(parts, tmp_path):
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        ours(parts, tmp_path, {"compute_metrics": lambda found: {}})
    with pytest.raises(ValueError, match="ref: expected none, since here it is ref_model; got"):
        ours(parts, tmp_path, {"ref": parts[1]})
    with pytest.raises(ValueError, match="options: expected no reduction, which the trainer gives"):
        ours(parts, tmp_path, {"options": {"reduction": "sum"}})
    streamed = parts[2].to_iterable_dataset()
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected a Dataset"):
        ours(parts, tmp_path, {"train_dataset": streamed}, max_steps=1, precompute_ref_log_probs=True)


def test_options_of_the_engine(parts, tmp_path):
    """What is skipped at each token stays out of the log; the reference is scored as the model is."""
    trainer = ours(parts, tmp_path, {"options": {"grad_tolerance": "auto"}}, loss_type="bnf", max_steps=1)
    trainer.train()
    (line,) = history(trainer)
    assert 0 <= line["skipped/share"] <= 1
    assert "skipped/bound" not in line
    trainer = ours(parts, tmp_path, {"options": {"impl": "nothing"}})
    with pytest.raises(ValueError, match="impl: expected"):
        trainer.reference(trainer.model, first_batch(trainer))


def test_scores_from_another_trainer(parts, tmp_path):
    """Stored scores of another reference are left out, TRL's sums too; missing ones are refused."""
    first = ours(parts, tmp_path, precompute_ref_log_probs=True)
    given = {"ref_model": away(parts[1]), "train_dataset": first.train_dataset}
    given["train_dataset"] = given["train_dataset"].add_column("ref_chosen_logps", [0.0] * 20)
    for stores in (False, True):
        trainer = ours(parts, tmp_path, given, precompute_ref_log_probs=stores)
        value, _ = gradients(trainer, first_batch(trainer))
        assert abs(float(value) - math.log(2)) < 1e-5  # the model is its own reference
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected rows with ref_chosen_logp"):
        trainer.data_collator(
            [{name: first.train_dataset[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}]
        )


def test_own_collators(parts, tmp_path):
    """Another trainer's is taken apart; one without a mask is refused."""
    first = ours(parts, tmp_path, {"ref_model": None}, loss_type="mle")
    again = ours(parts, tmp_path, {"data_collator": first.data_collator}, loss_type="sigmoid")
    assert len(first_batch(again)["input_ids"]) == 8
    wrong = ours(parts, tmp_path, {"data_collator": lambda rows: {"input_ids": torch.ones(2, 3)}})
    with pytest.raises(ValueError, match="batch: expected TRL.s completion_mask, got"):
        first_batch(wrong)


@pytest.mark.parametrize(
    ("loss_type", "words", "tags"),
    [
        (["sigmoid"], "trained with DPO, a method introduced in", ["dpo", "trl"]),
        (["bnf", "sft"], "trained with bnf + sft.", ["bnf", "sft", "trl"]),
    ],
)
def test_model_card(parts, tmp_path, loss_type, words, tags):
    trainer = ours(parts, tmp_path, loss_type=loss_type)
    trainer.create_model_card(model_name="m")
    assert words in (tmp_path / "README.md").read_text()
    assert sorted(trainer.model.model_tags) == tags


def unpaired(parts):
    tokenizer, model, data = parts
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for i, row in enumerate(data)
        for side in (["chosen", "rejected"] if i % 3 else ["chosen"])
    ]
    return tokenizer, model, Dataset.from_list(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"desirable_weight": 1.5},
        pytest.param({"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5}, marks=pytest.mark.full),
    ],
)
def test_twenty_steps_of_single_responses(parts, tmp_path, settings):
    """Losses and weights beside TRL's own, with its estimate of the KL divergence.

    Plain steps: Adam divides a gradient of rounding errors by its own size.
    """
    settings |= {"optim": "sgd", "learning_rate": 0.1}
    results = []
    for kind in (trl.KTOTrainer, UnpairedTrainer):
        trainer = trainer_of(unpaired(parts), tmp_path / kind.__name__, kind, max_steps=20, **settings)
        trainer.train()
        results.append((history(trainer), [p.detach() for p in trainer.model.parameters()]))
    (theirs, weights), (found, others) = results
    assert len(theirs) == len(found) == 20
    for a, b in zip(theirs, found):
        for name in {"loss", "rewards/chosen", "logps/chosen", "num_tokens", "grad_norm"} & a.keys():
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=2e-6), (name, a[name], b[name])
    for a, b in zip(weights, others):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss_type", ["bnf", "bco", "bnf + 0.1*mle"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_own_objectives_of_single_responses(parts, tmp_path, loss_type, precomputed):
    trainer = trainer_of(
        unpaired(parts), tmp_path, UnpairedTrainer, loss_type=loss_type, precompute_ref_log_probs=precomputed
    )
    batch = first_batch(trainer)
    assert set(batch["label"].tolist()) == {True, False}
    assert ("ref_logp" in batch) == precomputed
    value = gradients(trainer, batch)
    model, plain = away(parts[1]), {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        ref = hf.token_scores(parts[1], plain)
    options = {"beta": 0.1} if loss_type == "bco" else {}
    loss = hf.loss(model, plain, loss_type, label=batch["label"], ref=ref, **options)
    loss.backward()
    same(value, (loss.detach(), [p.grad for p in model.parameters()]))


def test_only_good_responses_count_for_mle(parts, tmp_path):
    """Also where many bad ones follow one another: no batch is without a good one."""
    given = {"ref_model": None, "train_dataset": parts[2]}  # pairs: TRL puts all chosen before all rejected
    trainer = trainer_of(parts, tmp_path, UnpairedTrainer, given, loss_type="mle", num_train_epochs=1)
    assert len(trainer.train_dataset) == 20
    assert all(trainer.train_dataset["label"])
    trainer.train()
    assert [math.isfinite(line["loss"]) for line in history(trainer)] == [True] * 5
    given["train_dataset"] = Dataset.from_list([{"prompt": "a", "completion": "b", "label": False}])
    with pytest.raises(ValueError, match="dataset: expected a label True, since mle sees those alone"):
        trainer_of(parts, tmp_path, UnpairedTrainer, given, loss_type="mle")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type: expected objectives of single responses, got 'dpo', one of pairs"),
        ({"loss_type": "ktoo"}, "loss_type: expected names of .*, got 'ktoo'; did you mean 'kto'"),
        ({"loss_type": "kto + mle"}, "loss_type: expected kto by itself"),
        ({"loss_type": "0.5*kto"}, "loss_type: expected kto by itself"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: expected False with kto"),
        ({"loss_type": "bnf", "desirable_weight": 2.0}, "desirable_weight: expected 1.0, since none of loss_type bnf"),
    ],
)
def test_what_is_refused_of_single_responses(parts, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(unpaired(parts), tmp_path, UnpairedTrainer, **settings)


@pytest.fixture(scope="module")
def pictured():
    """A processor, a model of images and text, and pairs."""
    tokenizer = train_tokenizer(["a"], 258)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = """{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}
        {%- if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}
        {%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(vocab_size=300, max_position_embeddings=128, **SIZES).to_dict(),
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **vision).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    rows = [
        {
            "images": [Image.fromarray(torch.randint(255, (16, 16, 3), dtype=torch.uint8).numpy())],
            "prompt": [{"role": "user", "content": f"what is {a}?"}],
            "chosen": [{"role": "assistant", "content": f"number {a}"}],
            "rejected": [{"role": "assistant", "content": f"letter {a} or so"}],
        }
        for a in range(8)
    ]
    return processor, model, Dataset.from_list(rows)


@pytest.mark.full
@pytest.mark.parametrize(
    ("theirs", "kind", "settings"),
    [
        (trl.DPOTrainer, PreferenceTrainer, {}),
        (trl.DPOTrainer, PreferenceTrainer, {"padding_free": True}),
        (trl.KTOTrainer, UnpairedTrainer, {}),
    ],
)
def test_images(pictured, theirs, kind, settings, tmp_path):
    """TRL's steps on pairs and single responses to an image."""
    processor, model, rows = pictured
    if kind is UnpairedTrainer:
        rows = Dataset.from_list(
            [
                {"images": row["images"], "prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in rows
                for side in ("chosen", "rejected")
            ]
        )
    results = []
    for each in (theirs, kind):
        more = settings if each is kind else {}
        trainer = trainer_of((processor, model, rows), tmp_path, each, max_steps=3, max_length=None, **PLAIN, **more)
        trainer.train()
        results.append(([line["loss"] for line in history(trainer)], list(trainer.model.parameters())))
    start = dict(away(model).named_parameters())
    assert any("vision" in name and not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="loss_type: expected one with a reference for images, .* got .*mle"):
        trainer_of((processor, model, rows), tmp_path, kind, {"ref_model": None}, loss_type="mle")


PLAIN = {"optim": "sgd", "learning_rate": 0.1}  # Adam divides a gradient of rounding errors by its own size


def on_a_rank(kind, accelerated, folder, settings, how=None):
    """Losses and weights of 20 steps, each rank with its share of the batches; with `how` in parts ("" in one piece),
    and the loss of an evaluation."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    made = make()
    made = unpaired(made) if issubclass(kind, trl.KTOTrainer) else made
    given = {"train_dataset": made[2].select(range(16))}
    if kind is trl.SFTTrainer:
        given = {"train_dataset": made[2].remove_columns("rejected").rename_column("chosen", "completion")}
    with accelerate() if accelerated else nullcontext(), in_parts(kind, how or "") as (kind, more):
        trainer = trainer_of(
            made, f"{folder}/{rank}", kind, given, max_steps=20, dataloader_drop_last=True, **settings, **more
        )
        trainer.train()
        losses = [line["loss"] for line in history(trainer)]
        if how is not None:
            losses.append(trainer.evaluate(made[2].select(range(16, 20)))["eval_loss"])
        weights = [whole(p) for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        if how:
            assert type(trainer.model_wrapped).__name__.startswith("FSDP" if how == "fsdp2" else "DeepSpeed")
    return torch.tensor(losses), weights


@contextmanager
def in_parts(kind, how):
    """A trainer and settings with which accelerate wraps a model as it would on GPUs: on CPUs it leaves FSDP out, and
    takes DeepSpeed's ranks for one."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    if not how:
        yield kind, {}
        return

    class Sharded(kind):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            told = {"distributed_type": DistributedType.FSDP}
            PartialState._shared_state.update(told)
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )  # fmt: skip
            vars(self.accelerator.state).update(told, fsdp_plugin=plugin)
            self.is_fsdp_enabled = True

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if how == "fsdp2":
            yield Sharded, {}
            return
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config
        from wrapped import deepspeed

        deepspeed()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        auto = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        )
        sharding = {"stage": int(how[-1])} | ({"stage3_param_persistence_threshold": 0} if how == "zero3" else {})
        config = auto | {"zero_optimization": sharding, "zero_allow_untested_optimizer": True}
        config |= {"zero_force_ds_cpu_optimizer": False}
        yield kind, {"use_cpu": False, "accelerator_config": {"use_configured_state": True}, "deepspeed": config}
        unset_hf_deepspeed_config()
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state(reset_partial_state=True)


def whole(parameter):
    """A parameter put together of its parts on all ranks."""
    from torch.distributed.tensor import DTensor

    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


IN_PARTS = {"loss_type": "bnf", "precompute_ref_log_probs": True, "gradient_accumulation_steps": 2, **PLAIN}


@pytest.mark.full
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("settings", [{}, IN_PARTS], ids=["dpo", "bnf"])
@pytest.mark.parametrize("how", ["fsdp2", *(pytest.param(f"zero{n}", marks=pytest.mark.deepspeed) for n in (2, 3))])
def test_models_in_parts(how, settings, ranks, tmp_path):
    """20 steps and an evaluation of two ranks beside those of one process."""
    share = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    if settings:
        share["per_device_train_batch_size"] = 1
    found = ranks(2)(on_a_rank, PreferenceTrainer, False, str(tmp_path / "parts"), {**settings, **share}, how)
    same(found[1], found[0])
    alone = {name: value for name, value in settings.items() if name != "gradient_accumulation_steps"}
    alone["per_device_eval_batch_size"] = 4
    same(found[0], on_a_rank(PreferenceTrainer, False, str(tmp_path / "one"), alone, ""))


@pytest.mark.full
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("theirs", "kind", "settings"),
    [
        (trl.DPOTrainer, PreferenceTrainer, {}),
        (trl.DPOTrainer, PreferenceTrainer, {"precompute_ref_log_probs": True}),
        (None, PreferenceTrainer, {"loss_type": "bnf", "padding_free": True, "precompute_ref_log_probs": True} | PLAIN),
        (trl.KTOTrainer, UnpairedTrainer, PLAIN),
        (trl.DPOTrainer, None, {}),
        (trl.SFTTrainer, None, {}),
    ],
)
def test_two_processes(theirs, kind, settings, ranks, tmp_path):
    """20 steps: TRL's on two processes, and ours on one, with the batches of both."""
    half = {**settings, "per_device_train_batch_size": 2}
    run = ranks(2)
    found = run(on_a_rank, kind or theirs, kind is None, str(tmp_path / "ours"), half)
    same(found[1], found[0])
    if theirs is not None:  # TRL stores scores of a dataset in memory where the other rank has no access
        half.pop("precompute_ref_log_probs", None)
        same(found[0], run(on_a_rank, theirs, False, str(tmp_path / "theirs"), half)[0])
    if kind is PreferenceTrainer:
        same(found[0], on_a_rank(kind, False, str(tmp_path / "one"), settings))
