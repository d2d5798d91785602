"""Other people's trainers on this package's losses: TRL's through `TRLMixin`, and axolotl's plug-in.

What needs axolotl runs where it is installed, and is skipped elsewhere: it pins its own TRL and transformers. It last
ran on axolotl 0.21.0 (TRL 1.14.1, on Python 3.11, though it asks for 3.12) and 0.19.0 (TRL 1.9.0). It needs a
copy of this file outside the checkout, whose folder kernels/ would hide the package of that name, and in the
environment AXOLOTL_DO_NOT_TRACK=1 and HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from rgpb import hf
from rgpb.axolotl.mixin import TRLMixin
from rgpb.axolotl.settings import RgpbArgs
from rgpb.hf.batches import from_trl
from rgpb.train.tokens import train_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


class DPOTrainer(TRLMixin, trl.DPOTrainer):
    pass


class KTOTrainer(TRLMixin, trl.KTOTrainer):
    pass


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    tokenizer = train_tokenizer(["a"], 258)
    config = LlamaConfig(vocab_size=258, max_position_embeddings=64, tie_word_embeddings=False, **SIZES)
    torch.manual_seed(0)
    rows = [{"prompt": f"{a} + 1 =", "chosen": f" {a + 1}", "rejected": f" {a - 1} or so"} for a in range(12)]
    return tokenizer, LlamaForCausalLM(config), rows


def trainer_of(parts: Any, folder: Any, kind: Any, settings: dict[str, Any] | None = None, **keywords: Any) -> Any:
    """A trainer of a copy of the model, some way from its reference."""
    tokenizer, model, rows = parts
    single = issubclass(kind, trl.KTOTrainer)
    args = (trl.KTOConfig if single else trl.DPOConfig)(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", gradient_checkpointing=False, learning_rate=0.5, optim="sgd",
        disable_tqdm=True, **({"max_steps": 3} | (settings or {})),
    )  # fmt: skip
    if single:
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if "peft_config" not in keywords:
        keywords.setdefault("ref_model", copy.deepcopy(model))
    return kind(trained, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **keywords)


def steps_of(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_sums_of_another_reference_are_left_out(parts, tmp_path):
    """Those that the dataset has, unless the trainer is told to store them itself."""
    tokenizer, model, rows = parts
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -9.0} for row in rows]
    found = [
        steps_of(trainer_of((tokenizer, model, data), tmp_path, DPOTrainer, objective="dpo"))[0]["loss"]
        for data in (rows, parts[2])
    ]
    assert found[0] == found[1]


def test_a_batch_of_pairs_of_trl():
    ids, mask = torch.arange(12).view(4, 3), torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": -ids[0, :2].float()}
    found = from_trl(batch | {"ref_rejected_logps": -ids[1, :2].float(), "KL_input_ids": ids})
    assert found["labels"].tolist() == [[-100, 1, 2], [-100, 4, -100], [-100, -100, 8], [-100, 10, 11]]
    assert found["label"].tolist() == [True, True, False, False]
    assert found["ref_logp"].tolist() == [0, -1, -3, -4]
    assert set(found) == {"input_ids", "attention_mask", "labels", "label", "ref_logp"}
    with pytest.raises(ValueError, match="batch: expected TRL's completion_mask, got 'input_ids'"):
        from_trl({"input_ids": ids})


@pytest.mark.parametrize("settings", [{}, pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.full)])
def test_dpo_is_trls_own(parts, tmp_path, settings):
    theirs = trainer_of(parts, tmp_path / "a", trl.DPOTrainer, settings)
    ours = trainer_of(parts, tmp_path / "b", DPOTrainer, settings, objective="dpo")
    wanted, found = steps_of(theirs), steps_of(ours)
    assert len(wanted) == 3
    for a, b in zip(wanted, found):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies"):
            assert b[name] == pytest.approx(a[name], abs=2e-6, rel=2e-6), name
    for a, b in zip(theirs.model.parameters(), ours.model.parameters()):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0)


def test_bnf_of_pairs_and_evaluation(parts, tmp_path):
    """A step is that of `hf.loss` on the rows of both its batches, the chosen ones good."""
    _, model, rows = parts
    extra = {"max_grad_norm": 1e9}
    trainer = trainer_of(parts, tmp_path, DPOTrainer, extra, objective="bnf", eval_dataset=Dataset.from_list(rows[:4]))
    before, seen, inner = trainer.evaluate()["eval_loss"], [], trainer.objective_loss
    weights = [p.detach().clone() for p in trainer.model.parameters()]

    def watched(model: Any, inputs: Any, reduction: str) -> Any:
        seen.append(inputs)
        return inner(model, inputs, reduction)

    trainer.objective_loss = watched
    trainer.args.max_steps = 1
    (step,) = steps_of(trainer)
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert {"rewards/margins", "logps/chosen"} <= step.keys()
    alone = copy.deepcopy(model)
    for p, was in zip(alone.parameters(), weights):
        p.data.copy_(was)
    loss = torch.zeros(())
    for batch in seen[:2]:
        assert batch["label"].tolist() == [True, True, False, False]
        inputs = {name: value for name, value in batch.items() if name != "label"}
        part = hf.loss(alone, inputs, "bnf", label=batch["label"], ref=model, reduction="sum") / 8
        part.backward()
        loss += part.detach()
    assert step["loss"] == pytest.approx(float(loss), abs=1e-6)
    for p, now in zip(alone.parameters(), trainer.model.parameters()):
        torch.testing.assert_close(now, p - 0.5 * p.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", ["simpo", pytest.param({"dpo": 1.0, "mle": 0.2}, marks=pytest.mark.full)])
def test_without_a_reference_none_is_kept(parts, tmp_path, objective):
    trainer = trainer_of(
        parts, tmp_path, DPOTrainer, objective=objective, options={"dpo.beta": 0.2} if objective != "simpo" else {}
    )
    assert (trainer.ref_model is None) == (objective == "simpo")
    assert len(steps_of(trainer)) == 3


def test_adapters_and_single_responses(parts, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_of(parts, tmp_path, KTOTrainer, {"max_steps": 2}, objective="bnf", peft_config=config)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    assert sorted(batch) == ["attention_mask", "input_ids", "label", "labels"]
    assert batch["label"].tolist() == [True, False]
    assert trainer.ref == "base"
    first, second = steps_of(trainer)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)  # fresh adapters change nothing
    assert abs(second["rewards/margins"]) > 1e-3


def test_a_copied_adapter_is_refused(parts, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(parts[1]), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model: expected one without adapters, beside peft_config"):
        trainer_of((parts[0], model, parts[2]), tmp_path, DPOTrainer, objective="bnf", ref_model=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rgpb_objective": "bnff", "rl": "dpo"}, "did you mean 'bnf'"),
        ({"rgpb_objective": "bnf"}, "rl: expected dpo or kto beside rgpb_objective, got None"),
        (
            {"rgpb_objective": "swepo", "rl": "dpo"},
            "expected a loss of pairs or single responses with rl: dpo, got swepo",
        ),
        ({"rgpb_objective": "dpo", "rl": "kto"}, "expected a loss of single responses with rl: kto, got dpo"),
        (
            {"rgpb_objective": "dpo", "rl": "dpo", "rl_beta": 0.2},
            "rl_beta: expected none beside rgpb_objective, got 0.2",
        ),
        (
            {"rgpb_objective": "dpo", "rl": "dpo", "rgpb_options": {"bta": 1}},
            r"options of dpo: .*got \['bta'\]; did you",
        ),
        ({"rgpb_objective": "bnf", "rl": "dpo", "precompute_ref_log_probs": True}, "bnf needs scores of tokens"),
        (
            {"rgpb_objective": "bnf", "rl": "dpo", "context_parallel_size": 2},
            "context_parallel_size: expected 1, got 2",
        ),
        ({"rgpb_objective": "mle", "rl": "dpo"}, "expected a loss that tells good from bad responses, got mle"),
        ({"rgpb_objective": {"bnf": 1, "mle": 1}, "rl": "kto"}, "expected a loss that tells good from bad responses"),
        ({"rgpb_options": {"beta": 1}}, "rgpb_objective: expected a loss beside rgpb_options, got none"),
    ],
)
def test_settings_of_the_plugin_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        RgpbArgs.model_validate(data)


def test_settings_of_the_plugin():
    assert RgpbArgs.model_validate({}).rgpb_objective is None
    options = {"dpo.beta": 0.2, "grad_tolerance": "auto"}
    found = RgpbArgs.model_validate({"rgpb_objective": {"dpo": 1, "mle": 0.5}, "rl": "dpo", "rgpb_options": options})
    assert found.rgpb_objective == {"dpo": 1.0, "mle": 0.5}
    assert found.rgpb_options == options


def axolotl_trainer(parts: Any, folder: Path, **changes: Any) -> Any:
    """What axolotl makes of a configuration, by its own steps up to the training."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault

    tokenizer, model, rows = parts
    folder.mkdir()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if changes.get("rl") == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"}
            for r in rows
            for n in r
            if n != "prompt"
        ]
    fields = {f"field_{name}": name for name in rows[0]}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = load_cfg(
        DictDefault(
            {
                "base_model": str(folder / "model"),
                "tokenizer_config": str(folder / "model"),
                "datasets": [{"path": str(folder / "rows.jsonl"), "split": "train", "type": fields}],
                "dataset_prepared_path": str(folder / "prepared"),
                "output_dir": str(folder / "out"),
                "rl": "dpo",
                "sequence_len": 64,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "optimizer": "adamw_torch",
                "lr_scheduler": "constant",
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "save_strategy": "no",
                "val_set_size": 0,
                "bf16": False,
                "fp16": False,
                "tf32": False,
                "attn_implementation": "sdpa",
                "seed": 1,
            }
            | changes
        )
    )
    return setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0]


PLUGIN: dict[str, Any] = {"plugins": ["rgpb.axolotl.Plugin"]}


def test_axolotl_trains_dpo_as_its_own(parts, tmp_path):
    pytest.importorskip("axolotl")
    theirs = axolotl_trainer(parts, tmp_path / "theirs", rl_beta=0.1)
    ours = axolotl_trainer(parts, tmp_path / "ours", rgpb_objective="dpo", rgpb_options={"beta": 0.1}, **PLUGIN)
    assert type(ours).__module__ == "rgpb.axolotl.trainers"
    wanted, found = steps_of(theirs), steps_of(ours)
    assert len(wanted) == 3
    for a, b in zip(wanted, found):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-6)
        assert b["rewards/margins"] == pytest.approx(a["rewards/margins"], abs=2e-6)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters()):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": "dpo", "rgpb_objective": "bnf"},
        {"rl": "kto", "rgpb_objective": "bnf", "remove_unused_columns": False},
        {"rl": "dpo", "rgpb_objective": {"dpo": 1.0, "mle": 0.2}, "rgpb_options": {"dpo.beta": 0.2}},
        {
            "rl": "dpo",
            "rgpb_objective": "bnf",
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": ["q_proj"],
        },
    ],
)
def test_axolotl_trains_other_losses(parts, tmp_path, changes):
    pytest.importorskip("axolotl")
    trainer = axolotl_trainer(parts, tmp_path / "run", **PLUGIN, **changes)
    steps = steps_of(trainer)
    assert len(steps) == 3
    first, *_, last = ([step[n] for n in ("rewards/chosen", "rewards/rejected") if n in step] for step in steps)
    assert first == pytest.approx([0] * len(first), abs=1e-6)  # the policy is still the reference
    assert max(map(abs, last)) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "rgpb_objective: expected a loss, such as bnf or dpo"),
        (
            {"rgpb_objective": "bnf", "trainer_cls": "a.B"},
            "trainer_cls: expected none beside rgpb.axolotl.Plugin, got a.B",
        ),
        ({"rgpb_objective": "dpo", "rl_beta": 0.2}, "rl_beta: expected none beside rgpb_objective, got 0.2"),
    ],
)
def test_axolotl_refuses(parts, tmp_path, changes, message):
    pytest.importorskip("axolotl")
    with pytest.raises(ValueError, match=message):
        axolotl_trainer(parts, tmp_path / "run", **PLUGIN, **changes)
