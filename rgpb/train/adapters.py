"""LoRA: adapters in a model, by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rgpb import hf
from rgpb.train.config import TrainConfig
from rgpb.train.models import load_pretrained


def with_adapters(config: TrainConfig, model: Any) -> Any:
    """The model with the adapters that the settings ask for, in PEFT; itself without them.

    Raises:
        ValueError: modules that it doesn't have, or a head with an adapter that can't be read.
    """
    if config.lora_r is None:
        return model
    from peft import LoraConfig, get_peft_model

    names = targets(config.lora_target)
    torch.manual_seed(config.seed)  # all ranks draw the same
    try:
        alpha: Any = 2 * config.lora_r if config.lora_alpha is None else config.lora_alpha
        made = get_peft_model(
            model, LoraConfig(r=config.lora_r, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
        )
    except ValueError as error:
        raise ValueError(
            f"lora_target: expected modules of {config.model}, got {config.lora_target!r} ({error})"
        ) from None
    hf.check_head(made)
    return made


def targets(names: str | None) -> list[str] | str | None:
    """ "q_proj,v_proj" as PEFT takes it: a list; None and "all-linear" as they are."""
    if names is None or names == "all-linear":
        return names
    return [name.strip() for name in names.split(",") if name.strip()]


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """A model as it is without its adapters; one that has none as it is."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def save_merged(base: str | Path, adapter: Path, place: Path, dtype: Any) -> None:
    """The weights with the adapters added in, as a model of its own."""
    from peft import PeftModel

    whole: Any = load_pretrained(base, dtype)
    merged: Any = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    merged.save_pretrained(place)
