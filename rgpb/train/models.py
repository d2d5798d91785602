"""The models of a run and their tokenizer: from a folder, or new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rgpb import hf
from rgpb.train.config import BUILT_IN, TrainConfig
from rgpb.train.files import save_whole_folder
from rgpb.train.rows import Preferences
from rgpb.train.tokens import PreferenceDataset, texts_of, train_tokenizer


def family_of(config: TrainConfig) -> str | None:
    """The built-in configuration's name, or None for a folder."""
    for name, folder in (("model", config.model), ("ref_model", config.ref_model)):
        if name == "model" and folder in BUILT_IN and not Path(folder).is_dir():
            continue
        if folder is not None and not (Path(folder) / "config.json").is_file():
            built_in = f", or one of {sorted(BUILT_IN)}" if name == "model" else ""
            raise ValueError(f"{name}: expected a folder with a config.json{built_in}, got {folder!r}")
    return None if Path(config.model).is_dir() else config.model


def make_tokenizer(config: TrainConfig, family: str | None, folder: Path, preferences: Preferences) -> Any:
    """The tokenizer of the model's folder; of a new model one learnt from the data, kept in `folder`."""
    if family is None:
        return AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    place = folder / "tokenizer"
    if not place.exists():
        tokenizer = train_tokenizer(texts_of(preferences), config.vocab_size)
        save_whole_folder(place, tokenizer.save_pretrained)
    return AutoTokenizer.from_pretrained(place, local_files_only=True)


def make_model(config: TrainConfig, family: str | None, tokenizer: Any) -> PreTrainedModel:
    """The model to train, in float32; a new one with weights drawn from the run's seed."""
    if family is None:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, local_files_only=True)
    kind, sizes = BUILT_IN[family]
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = max(2048, config.max_length)
    made = getattr(transformers, kind)(vocab_size=len(tokenizer), max_position_embeddings=length, **sizes, **tokens)
    transformers.set_seed(config.seed)
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def check_tokens(model: PreTrainedModel, name: str, sets: Sequence[PreferenceDataset]) -> None:
    """Refuse a model without the tokens or the positions that the data has."""
    for data in sets:
        check_sizes(model, name, int(data.tokens.max()), int(data.lengths().max()))


def check_sizes(model: PreTrainedModel, name: str, token: int, length: int) -> None:
    """Refuse a model without that token or so many positions."""
    vocab, longest = hf.read_head(model).weight.shape[0], getattr(model.config, "max_position_embeddings", None)
    if token >= vocab:
        raise ValueError(f"model: expected a vocabulary for token {token}, got {vocab} in {name}")
    if longest is not None and length > longest:
        raise ValueError(f"max_length: expected at most {longest}, the positions of {name}; got {length}")


def reference_model(config: TrainConfig) -> PreTrainedModel | None:
    """The model of `ref_model`, in float32, or None."""
    if config.ref_model is None:
        return None
    return AutoModelForCausalLM.from_pretrained(config.ref_model, dtype=torch.float32, local_files_only=True)
