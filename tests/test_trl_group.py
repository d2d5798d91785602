"""TRL's GRPO trainer with objectives of groups, beside `rgpb.hf.loss` by hand on the completions that it sampled.

Dimensions: K completions of a prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

from rgpb import OBJECTIVES, TokenScores, hf, objective
from rgpb.train.tokens import train_tokenizer
from rgpb.trl import GroupTrainer, group

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

K, BETA, HEAT, LR = 4, 0.3, 0.7, 0.1
PROMPTS = [f"{a} + 1 =" for a in range(4, 24)]  # of two lengths
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


class Watched(GroupTrainer):
    """Keeps what each batch was: the weights before, what came to the loss, its value; and what was sampled."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.kept: list[Any] = []
        self.sampled: list[Any] = []
        super().__init__(*args, **keywords)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        state = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        loss = super()._compute_loss(model, inputs)
        parts = self.current_gradient_accumulation_steps if self.model.training else 1
        self.kept.append((state, inputs, parts * loss.item()))
        return loss

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for prompt, ids in zip(prompts, completion_ids_list):
            parts = [own(len(self.sampled), ids) for own in (size_of, kinds_of)]
            given = [weight * part for weight, part in zip((1.0, 0.5), parts) if part is not None]
            self.sampled.append((prompt, tuple(ids), sum(given) if given else None))
        return found


def size_of(place: int, ids: Any) -> float | None:
    return None if place % K == 2 else float(sum(ids) % 5)


def kinds_of(place: int, ids: Any) -> float | None:
    return None if place % K in (1, 2) else float(len(set(ids)))


def first_reward(completion_ids: Any, **_: Any) -> list[float | None]:
    return [size_of(place, ids) for place, ids in enumerate(completion_ids)]


def second_reward(completion_ids: Any, **_: Any) -> list[float | None]:
    return [kinds_of(place, ids) for place, ids in enumerate(completion_ids)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tokenizer and a model each: the reference."""
    tokenizer, folders = train_tokenizer(["a"], 258), {}
    for family, sizes in (("Llama", LLAMA), ("GPT2", GPT2)):
        folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=258, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2, **sizes
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def arguments(folder: Any, **settings: Any) -> trl.GRPOConfig:
    given: dict[str, Any] = {
        "num_generations": K, "per_device_train_batch_size": 2 * K, "max_completion_length": 4, "beta": BETA,
        "temperature": HEAT, "reward_weights": [1.0, 0.5], "report_to": [], "use_cpu": True, "bf16": False,
        "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "optim": "sgd",
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "disable_tqdm": True,
        "max_steps": 2,
    }  # fmt: skip
    return trl.GRPOConfig(str(folder), **given | settings)


def trainer_of(saved: Path, folder: Any, model: Any = None, settings: Any = None, **how: Any) -> Watched:
    """Of a model some way from its reference."""
    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(saved)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Watched(
        model, [first_reward, second_reward], arguments(folder, **settings or {}),
        processing_class=transformers.AutoTokenizer.from_pretrained(saved, padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), eval_dataset=Dataset.from_dict({"prompt": PROMPTS[5:8]}),
        **how,
    )  # fmt: skip


def groups_of(trainer: Watched, inputs: Any) -> list[list[Any]]:
    """What was sampled of the groups of a batch, as their prompts tell: each whole and not mixed."""
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool()):
        rows = [tuple(row[there].tolist()) for row, there in zip(ids, mask)]
        matches = [
            whole for whole in (trainer.sampled[at : at + K] for at in range(0, len(trainer.sampled), K))
            if sorted(rows) == sorted(tuple(tokens(trainer, prompt)) + done for prompt, done, _ in whole)
        ]  # fmt: skip
        assert len(matches) == 1
        found.append(matches[0])
    return found


def tokens(trainer: Watched, prompt: str) -> list[int]:
    return trainer.processing_class(prompt)["input_ids"]


def by_hand(trainer: Watched, model: Any, reference: Any, whole: list[Any]) -> torch.Tensor:
    """The loss of one group, from the texts that were sampled, padded on the right."""
    spec, options = trainer.spec, dict(trainer.options)
    rows = sorted((row for row in whole if row[2] is not None), key=lambda row: row[2], reverse=True)
    if not spec.rewards:
        rows = [row for place, row in enumerate(rows) if not place or row[2] < rows[0][2]]
    if len(rows) < 2:
        return sum(p.sum() for p in model.parameters()) * 0.0
    given: dict[str, Any] = {"group_size": len(rows)}
    if spec.rewards:
        given = {"rewards": torch.tensor([[reward for _, _, reward in rows]])}
    if "m" in options:
        options["m"] = min(options["m"], len(rows) - 1)
    both = [(tokens(trainer, prompt), list(ids)) for prompt, ids, _ in rows]
    width = max(len(prompt) + len(ids) for prompt, ids in both)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, ids in both:
        empty = width - len(prompt) - len(ids)
        batch["input_ids"].append(prompt + ids + [0] * empty)
        batch["attention_mask"].append([1] * (width - empty) + [0] * empty)
        batch["labels"].append([-100] * len(prompt) + ids + [-100] * empty)
    return hf.loss(
        model, {name: torch.tensor(x) for name, x in batch.items()}, trainer.objective, ref=reference,
        temperature=HEAT, **given, **options,
    )  # fmt: skip


def check_steps(trainer: Watched, saved: Path, states: list[Any], kept: list[Any]) -> None:
    """Losses of batches and weights after steps; kept: of each step, its batches (of all processes)."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(saved)
    for before, after, batches in zip(states[:-1], states[1:], kept, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(saved)
        model.load_state_dict(before)
        losses = [
            torch.stack([by_hand(trainer, model, reference, whole) for whole in groups_of(trainer, inputs)]).mean()
            for inputs, _ in batches
        ]
        for loss, (_, value) in zip(losses, batches):
            assert value == pytest.approx(loss.item(), abs=2e-6)
        torch.stack(losses).mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(after[name], before[name] - LR * parameter.grad, atol=2e-6, rtol=1e-5, msg=name)
        assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "name", "options", "rows", "accumulation"),
    [
        ("Llama", "swepo", {"alpha": 0.5}, 2 * K, 1),
        ("Llama", "mc_po", {"sampler": "max", "m": 2}, K, 2),
        pytest.param("Llama", "infonca", {"tau": 0.5}, 2 * K, 1, marks=pytest.mark.full),
        pytest.param("Llama", "nca", {"tau": 0.5}, K, 3, marks=pytest.mark.full),
        pytest.param("Llama", "multi_dpo", {"pairing": "all"}, K, 2, marks=pytest.mark.full),
        pytest.param("Llama", {"swepo": 1.0, "mle": 0.1}, {}, 2 * K, 1, marks=pytest.mark.full),
        pytest.param("GPT2", "swepo", {}, 2 * K, 2, marks=pytest.mark.full),  # counts padding as positions
    ],
)
def test_steps(family, name, options, rows, accumulation, saved, tmp_path):
    """Groups of one generation are shuffled over two steps, or over the batches of one."""
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    settings |= {"steps_per_generation": 2, "per_device_eval_batch_size": 2 * K}
    trainer = trainer_of(saved[family], tmp_path, settings=settings, objective=name, options=options)
    trainer.train()
    kept = trainer.kept
    assert len(kept) == 2 * accumulation
    states = [kept[0][0], kept[accumulation][0], trainer.model.state_dict()]
    steps = [[(x, loss) for _, x, loss in kept[at : at + accumulation]] for at in (0, accumulation)]
    check_steps(trainer, saved[family], states, steps)
    # every group once, as often as TRL takes it
    taken = [whole[0][:2] for step in steps for inputs, _ in step for whole in groups_of(trainer, inputs)]
    assert len(set(taken)) == len(taken) == 2 * accumulation * rows // K
    logs = trainer.state.log_history[0]
    assert {"reward", "rewards/first_reward/mean", "completions/mean_length", "logps/chosen"} <= logs.keys()
    assert {"rewards/margins", "rewards/accuracies", "agility/rejected"} <= logs.keys()
    assert not {"kl", "clip_ratio/region_mean"} & logs.keys()
    mean = sum(loss for _, loss in steps[0]) / accumulation
    assert logs["loss"] == pytest.approx(mean, abs=6e-5)  # transformers 4 rounds what it logs to four places
    if name == "swepo" and family == "Llama":
        trainer.kept.clear()
        found = trainer.evaluate()
        losses = [
            by_hand(trainer, trainer.model, transformers.AutoModelForCausalLM.from_pretrained(saved[family]), whole)
            for _, inputs, _ in trainer.kept for whole in groups_of(trainer, inputs)
        ]  # fmt: skip
        assert len(losses) == 3
        assert found["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
        assert "eval_rewards/accuracies" in found


@pytest.mark.full
def test_completions_are_taken_again(saved, tmp_path):
    """With `num_iterations`: the same batch, which has what the objective reads and no more."""
    settings = {"num_iterations": 2, "per_device_train_batch_size": K}
    trainer = trainer_of(saved["Llama"], tmp_path, settings=settings)
    trainer.train()
    first, second = (inputs for _, inputs, _ in trainer.kept)
    assert first is second
    assert set(first) == {"input_ids", "attention_mask", "labels", "rewards", "ref_logp", "ref_log_odds"}
    states = [state for state, *_ in trainer.kept]
    states.append(trainer.model.state_dict())
    check_steps(trainer, saved["Llama"], states, [[(inputs, loss)] for _, inputs, loss in trainer.kept])


def test_what_each_token_skips_is_not_logged(saved, tmp_path):
    trainer = trainer_of(saved["Llama"], tmp_path, options={"grad_tolerance": 1e-2}, settings={"max_steps": 1})
    trainer.train()
    found = trainer.state.log_history[0]
    assert 0 <= found["skipped/share"] <= 1
    assert "skipped/bound" not in found


@pytest.mark.full
def test_bf16_and_checkpointing(saved, tmp_path):
    """Under autocast the model is still its own reference at the first step; and what is saved goes on."""
    settings = {"bf16": True, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1}
    for steps in (1, 2):
        model = transformers.AutoModelForCausalLM.from_pretrained(saved["Llama"])
        trainer = trainer_of(saved["Llama"], tmp_path, model, settings | {"max_steps": steps})
        trainer.train(resume_from_checkpoint=steps > 1)
    logs = trainer.state.log_history
    assert [logs[0][f"rewards/{side}"] for side in ("chosen", "rejected")] == [0.0, 0.0]
    assert logs[1]["step"] == 2
    assert logs[1]["rewards/chosen"] != 0.0
    assert "trained with rgpb's GroupTrainer" in (tmp_path / "README.md").read_text()


@pytest.mark.full
@pytest.mark.parametrize("coefficient", [None, 2.0, 0.0])
def test_a_routers_loss_is_added(coefficient, tmp_path):
    sizes = {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=258, max_position_embeddings=64, initializer_range=0.2, **sizes)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["a"], 258).save_pretrained(tmp_path / "model")
    trainer = trainer_of(tmp_path / "model", tmp_path, settings={"router_aux_loss_coef": coefficient})
    trainer.train()
    model.router_aux_loss_coef = 0.5 if coefficient is None else coefficient
    for state, inputs, loss in trainer.kept:
        assert trainer.model.config.router_aux_loss_coef == 0.5  # it is saved
        model.load_state_dict(state)
        flat = {name: x.flatten(0, 1) for name, x in inputs.items() if name != "rewards"}
        ref = TokenScores(flat.pop("ref_logp"), flat.pop("ref_log_odds"), torch.zeros(flat["labels"].shape))
        how = {"ref": ref, "rewards": inputs["rewards"], "temperature": HEAT, "beta": BETA}
        expected = hf.loss(model, flat | {"output_router_logits": True}, "swepo", **how)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        if coefficient != 0.0:
            assert loss > hf.loss(model, flat, "swepo", **how).item() + 0.5


@pytest.mark.parametrize("given", ["peft_config", pytest.param("adapters", marks=pytest.mark.full)])
def test_reference_of_adapters(given, saved, tmp_path):
    """The model without new adapters; of adapters that were there, these as they were."""
    import peft

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved["Llama"])
    reference = copy.deepcopy(model)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    how: dict[str, Any] = {"peft_config": lora}
    if given == "adapters":
        model, how = peft.get_peft_model(model, lora), {}
        reference = copy.deepcopy(model)
    settings = {"per_device_train_batch_size": K, "learning_rate": 5.0}
    trainer = trainer_of(saved["Llama"], tmp_path, model, settings, objective="infonca", **how)
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, x in trainer.model.named_parameters() if not torch.equal(x, before[name])}
    assert moved
    assert all("lora" in name and ".default." in name for name in moved)
    assert len(trainer.kept) == 2
    for _, inputs, _ in trainer.kept:
        batch = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            scores = hf.token_scores(reference, batch, temperature=HEAT)
            now = hf.token_scores(trainer.model, batch, temperature=HEAT)
        torch.testing.assert_close(inputs["ref_logp"].flatten(0, 1), scores.logp, atol=1e-5, rtol=1e-5)
        assert (now.logp - scores.logp).abs().max() > 1e-2


def test_adapters_that_took_weights_over(saved, tmp_path):
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="model: expected adapters without which .* got init_lora_weights='olora'"):
        trainer_of(saved["Llama"], tmp_path, objective="infonca", peft_config=lora)


def test_completions_that_do_not_count(saved, tmp_path, monkeypatch):
    """Truncated ones and those without a reward take no part, tokens of tools neither; the best comes first."""
    settings = {"mask_truncated_completions": True}
    trainer = trainer_of(saved["Llama"], tmp_path, settings=settings, objective="rnce")
    end, (a, b) = trainer.processing_class.eos_token_id, (70, 71)
    done = [[a, end], [a, b, b], [b, b, b, end], [b, end], [a, a, end], [a, b, end], [b, a, end], [a, a, a, end]]
    tools = [[1] * len(ids) for ids in done]
    tools[3] = [0, 1]
    prompts = [tokens(trainer, PROMPTS[place >= K]) for place in range(2 * K)]
    monkeypatch.setattr(trainer, "_generate", lambda given: (prompts, done, tools, ["x"] * 8, None, {}, None, []))
    rewards = torch.tensor([[1.0], [9.0], [3.0], [2.0], [5.0], [5.0], [torch.nan], [-1.0]])
    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", lambda *args: rewards)
    trainer.reward_weights, trainer.reward_func_names = torch.tensor([2.0]), ["own"]
    trainer.model.train()
    inputs = [{"prompt": PROMPTS[place >= K]} for place in range(2 * K)]
    made = trainer._generate_and_score_completions(inputs)
    labels = [[[x for x in row.tolist() if x != -100] for row in whole] for whole in made["labels"]]
    assert labels == [[[b, b, b, end], [end], [a, end], []], [[a, a, end], [], [a, a, a, end], []]]
    assert made["rewards"].tolist() == [[6.0, 4.0, 2.0, 0.0], [10.0, 0.0, -2.0, 0.0]]
    trainer.spec = OBJECTIVES["swepo"]  # reads rewards: those that are as good stay
    made = trainer._generate_and_score_completions(inputs)
    assert made["rewards"].tolist() == [[6.0, 4.0, 2.0, 0.0], [10.0, 10.0, -2.0, 0.0]]
    with pytest.raises(ValueError, match="per_device_train_batch_size: expected a multiple of the 4 completions of a"):
        trainer._generate_and_score_completions(inputs[:6])
    monkeypatch.setattr(
        trl.GRPOTrainer, "_generate_and_score_completions", lambda *args: {"pixel_values": torch.ones(1)}
    )
    with pytest.raises(ValueError, match="train_dataset: expected prompts of text, got images"):
        trainer._generate_and_score_completions(inputs)


def refused(match: str, folder: Any, settings: Any = None, **how: Any) -> None:
    with pytest.raises(ValueError, match=match):
        GroupTrainer(None, None, arguments(folder, **settings or {}), **how)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.3), ("loss_type", "grpo"), ("scale_rewards", False), ("importance_sampling_level", "sequence"),
        ("delta", 2.0), ("entropy_coef", 0.1), ("cast_lm_head_to_fp32", True),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(name, value, tmp_path):
    refused(rf"{name}: expected .*, since swepo has no use for it, got", tmp_path, {name: value})


def test_what_is_refused(tmp_path, monkeypatch):
    given: list[str] = []
    fields = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
    assert all(fields[name].default is not dataclasses.MISSING for name in group.UNREAD)
    refused(r"loss_type: expected TRL's default, got 'mc_po'; .* GroupTrainer\(…, objective='mc_po'\)", tmp_path,
            {"loss_type": "mc_po", "beta": 0.0})  # fmt: skip
    monkeypatch.setattr(group, "GRPOConfig", lambda folder: given.append(folder) or arguments(folder, beta=0.0))
    with pytest.raises(ValueError, match=r"beta: expected the β of swepo, .* args=GRPOConfig\(…, beta=0.1\); got 0.0"):
        GroupTrainer(str(tmp_path / "model"), None)
    assert given == ["model-GRPO"]  # TRL's default
    refused("objective: expected one of groups, infonca, .* got dpo, of pairs", tmp_path, objective="dpo")
    refused("objective: expected a function or one of .* did you mean 'infonca'", tmp_path, objective="info_nca")
    refused("beta: expected the β of swepo, above 0, .* got 0.0", tmp_path, {"beta": 0.0})
    refused("options: expected no beta, got 0.2; GRPOConfig", tmp_path, options={"beta": 0.2})
    refused("options: expected no temperature", tmp_path, options={"temperature": 0.2})
    refused("options of swepo: expected a subset", tmp_path, options={"tau": 0.2})
    refused("options of mc_po: expected m to be", tmp_path, objective="mc_po", options={"m": 0})
    refused("per_device_train_batch_size: expected a multiple of num_generations, 4, .* got 2", tmp_path,
            {"per_device_train_batch_size": 2, "steps_per_generation": 2})  # fmt: skip
    refused("vllm_importance_sampling_correction: expected False beside use_vllm", tmp_path, {"use_vllm": True})
    try:

        @objective(couples="group")
        def likely_first(responses):
            return -responses.groups(responses.logps()).log_softmax(1)[:, 0]

        refused("beta: expected 0, since likely_first has no reference, got 0.3", tmp_path, objective="likely_first")
    finally:
        del OBJECTIVES["likely_first"]


@pytest.mark.full
@pytest.mark.xdist_group("ranks")
def test_two_processes(ranks, saved, tmp_path):
    """Each has one group of a step; the step is that of both."""
    found = ranks(2)(on_a_rank, str(saved["Llama"]), str(tmp_path))
    trainer = trainer_of(saved["Llama"], tmp_path)
    trainer.sampled = [row for sampled, *_ in found for row in sampled]
    (_, kept, states, evaluated, losses), (_, others, second, again, more) = found
    assert len(losses) == len(more) == 2
    assert evaluated == again == pytest.approx(sum(losses + more) / 4, abs=1e-5)
    for a, b in zip(states, second):
        assert all(torch.equal(a[name], b[name]) for name in a)
    values = [value for _, value in kept]
    assert values == [value for _, value in others]  # metrics and losses are of both
    reference = transformers.AutoModelForCausalLM.from_pretrained(saved["Llama"])
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        model = transformers.AutoModelForCausalLM.from_pretrained(saved["Llama"])
        model.load_state_dict(before)
        wholes = [whole for x in (kept, others) for whole in groups_of(trainer, x[step][0])]
        assert len(wholes) == 2
        torch.stack([by_hand(trainer, model, reference, whole) for whole in wholes]).mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(after[name], before[name] - LR * parameter.grad, atol=2e-6, rtol=1e-5, msg=name)


def on_a_rank(saved: str, folder: str) -> Any:
    """What was sampled; each step's groups and a metric; weights before and after; the evaluation, and its batches."""
    from accelerate.state import AcceleratorState

    trainer = trainer_of(Path(saved), folder, settings={"per_device_train_batch_size": K})
    trainer.train()
    states = [state for state, *_ in trainer.kept] + [copy.deepcopy(trainer.model.state_dict())]
    logs = trainer.state.log_history
    kept = [(inputs, logs[step]["logps/chosen"]) for step, (_, inputs, _) in enumerate(trainer.kept)]
    sampled = list(trainer.sampled)
    trainer.kept.clear()
    trainer.args.per_device_eval_batch_size = K
    evaluated = trainer.evaluate()["eval_loss"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return sampled, kept, states, evaluated, [loss for *_, loss in trainer.kept]
