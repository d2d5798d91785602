"""What the tests of TRL's trainers share: a tiny model with its tokenizer and data, and trainers of it."""

from __future__ import annotations

import copy

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from rgpb.train.tokens import train_tokenizer

MARKS = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
CONFIGS = {trl.SFTTrainer: trl.SFTConfig, trl.KTOTrainer: trl.KTOConfig, trl.DPOTrainer: trl.DPOConfig}


def make():
    """Tokenizer, model and pairs."""
    tokenizer = train_tokenizer(["a"], 258)
    config = LlamaConfig(vocab_size=258, max_position_embeddings=64, tie_word_embeddings=False, **SIZES)
    torch.manual_seed(0)
    rows = [{"prompt": f"{a} + 1 =", "chosen": f" {a + 1}", "rejected": f" {a - 1} or so"} for a in range(20)]
    return tokenizer, LlamaForCausalLM(config), Dataset.from_list(rows)


def away(model):
    """A copy of a model, some way from it."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def trainer_of(parts, folder, kind=None, given=None, **settings):
    """A trainer of a copy of the model, some way from its reference."""
    tokenizer, model, data = parts
    kind = kind or trl.DPOTrainer
    config = next(known for base, known in CONFIGS.items() if issubclass(kind, base))
    args = config(
        str(folder), report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        **{"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
        | {"use_cpu": True} | settings,
    )  # fmt: skip
    extra = {} if kind is trl.SFTTrainer else {"ref_model": copy.deepcopy(model)}
    given = {"model": away(model), "train_dataset": data, **extra, **(given or {})}
    return kind(args=args, processing_class=tokenizer, **given)
