"""transformers' Trainer with `hf.PreferenceMixin`, and accelerate: a step is that of one large batch.

Dimensions: B responses, T positions, K responses of a group.
"""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import SequentialSampler

from rgpb import OBJECTIVES, hf

V, H, T = 61, 32, 9
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class PairTrainer(hf.PreferenceMixin, transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """The rows in their order; transformers has no setting for it before 5.2."""
        return SequentialSampler(self.train_dataset)


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.2))


def rows_of(units: int, width: int) -> list[dict[str, torch.Tensor]]:
    """Units of `width` responses of uneven lengths, [width, T] each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (units, width, T), generator=generator)
    mask = torch.arange(T) < torch.randint(4, T + 1, (units, width, 1), generator=generator)
    labels = ids.masked_fill(~mask | (torch.arange(T) < 2), -100)
    number = torch.arange(units * width).view(units, width)
    return [
        {"input_ids": ids[u], "attention_mask": mask[u].long(), "labels": labels[u], "number": number[u]}
        for u in range(units)
    ]


def collate(rows: list[dict[str, Any]], packing: bool = False) -> dict[str, Any]:
    """Pairs `[chosen; rejected]`, groups in a row."""
    pairs = len(rows[0]["labels"]) == 2
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch = {n: (x.transpose(0, 1) if pairs else x).flatten(0, 1) for n, x in stacked.items()}
    number = batch.pop("number")
    batch["label"] = number % 3 != 0
    if len(rows[0]["labels"]) > 2:
        batch["rewards"] = number.float().mul(1.7).sin().view(len(rows), -1)
    return hf.pack(batch) if packing else batch


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant", "optim": "sgd"}
    settings |= {"max_grad_norm": 0.0, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    settings |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "num_train_epochs": 1}
    return transformers.TrainingArguments(str(folder), **settings | changes)


def trained(folder: Path, rows: Any, sizes: tuple[int, int], model: Any = None, collator: Any = collate, **how: Any):
    """The trainer after its steps, of (batch size, batches a step)."""
    changes = how.pop("changes", {})
    settings = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1], **changes}
    trainer = PairTrainer(
        model or model_of(), arguments(folder, **settings), train_dataset=rows, data_collator=collator, **how
    )
    trainer.train()
    return trainer


def same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("objective", "optim", "packing"),
    [("simpo", "sgd", False), ("bnf", "adamw_torch", True), ("swepo", "sgd", False)],
)
def test_accumulation_over_uneven_batches(objective, optim, packing, tmp_path):
    """Five units as batches of 2, 2 and 1 are what they are in one batch."""
    width = {"bnf": 1, "swepo": 3}.get(objective, 2)
    rows = rows_of(5, width)
    model, spec = model_of(), OBJECTIVES[objective]
    reference = model_of(1) if spec.ref else None
    lr = 0.01 if optim == "sgd" else 0.001
    changes = {"optim": optim, "learning_rate": lr, "per_device_eval_batch_size": 2, "adam_epsilon": 1e-4}
    changes |= {"max_grad_norm": 1e6}  # clips nothing; without one transformers 4 logs no norm
    how = {"objective": objective, "ref": reference, "changes": changes}
    collator = lambda units: collate(units, packing)  # noqa: E731
    parts = trained(tmp_path, rows, (2, 3), eval_dataset=rows, collator=collator, **copy.deepcopy(how))
    whole = trained(tmp_path, rows, (5, 1), eval_dataset=rows, collator=collator, **copy.deepcopy(how))
    same(parts.model, whole.model)
    for ours, theirs in zip(parts.state.log_history[:3], whole.state.log_history[:3]):
        for name in ("loss", "logps/chosen", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    # and Trainer's own words are those of a loop by hand
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr)
    if optim != "sgd":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, eps=1e-4)
    batch = collate(rows)
    given: dict[str, Any] = {"label": batch.pop("label") if spec.label else None, "ref": reference}
    given["rewards"] = batch.pop("rewards", None)
    batch.pop("label", None)
    for _ in range(3):
        loss = hf.loss(model, batch, objective, **given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same(parts.model, model)
    # transformers 4 rounds what it logs to four places
    assert parts.state.log_history[2]["loss"] == pytest.approx(loss.item(), abs=6e-5)
    with torch.no_grad():
        after = hf.loss(model, batch, objective, return_metrics=True, **given)
    found = parts.evaluate()
    assert found["eval_loss"] == pytest.approx(after[0].item(), abs=1e-5)
    assert found["eval_logps/chosen"] == pytest.approx(after[1]["logps/chosen"].item(), rel=1e-5)


def test_references(tmp_path):
    """A model, "base" with PEFT, and precomputed scores are the same reference; of sums, DPO needs no more."""
    import peft

    rows = rows_of(4, 2)

    def adapted() -> Any:
        torch.manual_seed(2)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(model_of(), lora)

    batch = {k: x for k, x in collate(rows).items() if k not in ("label", "number")}
    with torch.no_grad():
        scores = hf.token_scores(model_of(), batch)
    for row, chosen in enumerate(rows):
        at = torch.tensor([row, row + len(rows)])
        chosen |= {"ref_logp": scores.logp[at], "ref_log_odds": scores.log_odds[at]}
    given = {
        "model": (model_of(), lambda units: collate([{k: x for k, x in u.items() if "ref" not in k} for u in units])),
        "base": ("base", lambda units: collate([{k: x for k, x in u.items() if "ref" not in k} for u in units])),
        "scores": (None, collate),
        "sums": (None, lambda units: _summed(collate(units))),
    }
    found = {
        name: trained(tmp_path, rows, (2, 2), adapted(), collator, objective="dpo", ref=ref, options={"beta": 0.5})
        for name, (ref, collator) in given.items()
    }
    for trainer in found.values():
        same(trainer.model, found["model"].model)
        assert "rewards/margins" in trainer.state.log_history[0]
    start = adapted()
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found["base"].model.parameters(), start.parameters()))


def _summed(batch: dict[str, Any]) -> dict[str, Any]:
    del batch["ref_log_odds"]
    return batch | {"ref_logp": batch["ref_logp"].sum(1)}


def test_what_is_refused(tmp_path):
    def refused(match: str, changes: Any = None, **how: Any) -> None:
        with pytest.raises(ValueError, match=match):
            PairTrainer(
                model_of(), arguments(tmp_path, **changes or {}), train_dataset=rows_of(2, 2), data_collator=collate,
                **how,
            )  # fmt: skip

    refused("objective: expected a function or one of .* did you mean 'dpo'", objective="dpoo")
    refused("ref: expected a model, 'base' or None, got 'basis'", objective="dpo", ref="basis")
    refused("label_smoothing_factor: expected 0", {"label_smoothing_factor": 0.1})
    refused("compute_loss_func: expected none", compute_loss_func=lambda *a, **k: None)
    model = model_of()
    with pytest.raises(ValueError, match="ref: expected a model of its own"):
        PairTrainer(model, arguments(tmp_path), objective="dpo", ref=model)


@pytest.mark.full
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("objective", ["dpo", "bnf"])
def test_two_processes(objective, ranks, tmp_path):
    """Each with batches of 2 and 1 rows: the step of all six in one process."""
    found = ranks(2)(on_a_rank, objective, str(tmp_path))
    width = 2 if objective == "dpo" else 1
    rows = rows_of(6, width)
    alone = trained(tmp_path, rows, (6, 1), objective=objective, ref=model_of(1), eval_dataset=rows)
    for state, history, evaluated in found:
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
        for ours, theirs in zip(history[:3], alone.state.log_history[:3]):
            for name in ("loss", "logps/chosen", "rewards/chosen"):
                assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
        assert evaluated["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["fsdp2", "accelerate_loop"])
def test_examples_on_two_processes(name):
    """By torchrun the loss begins at log 2 and falls."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert not done.returncode, done.stderr
    first, last = map(float, re.findall(r"\d\.\d{3}", done.stdout))
    assert first == pytest.approx(math.log(2), abs=1e-3)
    assert last < 0.9 * first


def on_a_rank(objective: str, folder: str) -> Any:
    """Batches of 2 rows over both ranks, of which a collator moves one from the second's to the first's."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    width, rank = 2 if objective == "dpo" else 1, dist.get_rank()
    rows = rows_of(6, width)
    shares = ([rows[:3], rows[3:4]], [rows[4:5], rows[5:6]])  # of micro-batches: 3 and 1 units here, 1 and 1 there
    own = iter(())

    def uneven(units: list[Any]) -> Any:
        nonlocal own
        batch = next(own, None)
        if batch is None:
            own = iter(shares[rank])
            batch = next(own)
        return collate(batch)

    trainer = PairTrainer(
        model_of(), arguments(Path(folder) / str(rank), per_device_train_batch_size=1, gradient_accumulation_steps=2,
                              per_device_eval_batch_size=3, dataloader_drop_last=True),
        objective=objective, ref=model_of(1), train_dataset=rows[:4], data_collator=uneven,
    )  # fmt: skip
    trainer.train()
    trainer.data_collator = collate
    evaluated = trainer.evaluate(rows)
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer.model.state_dict(), trainer.state.log_history, evaluated
