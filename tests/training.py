"""Runs of `rgpb train` on the ranks of tests/ranks.py, and what they leave; for tests/test_train_ranks.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rgpb.train import TrainConfig, report, train
from rgpb.train import config as settings_module

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def prepare() -> None:
    """The built-in model, smaller, and no pictures; what torchrun says beside what tests/ranks.py says."""
    settings_module.BUILT_IN["tiny-llama"] = ("LlamaConfig", SMALL)
    report.plot = lambda runs, path: None
    world = os.environ.get("WORLD_SIZE", "1")
    os.environ.update(LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="1")


def config(data: str, output: Any, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"loss": "dpo", "steps": 5, "batch_size": 4, "lr": 3e-3, "vocab_size": 258, "cpu": True}
    settings |= {"log_steps": 2, "save_steps": 100, "progress": False}
    return TrainConfig(data=data, output=str(output), **{**settings, **changes})


def run(settings: list[TrainConfig], stop: int | None = None) -> list[Any]:
    """The results of runs, one after the other; or the errors that they end in.

    stop: a step before which each run is broken off, on all ranks.
    """
    from rgpb.train.trainer import PreferenceTrainer

    prepare()
    torch.use_deterministic_algorithms(True)
    compute, results = PreferenceTrainer.compute_loss, []

    def breaks(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        return compute(self, *arguments, **keywords)

    for each in settings:
        PreferenceTrainer.compute_loss = breaks if stop is not None else compute  # type: ignore[method-assign]
        try:
            results.append(train(each))
        except (ValueError, RuntimeError, KeyboardInterrupt) as error:
            results.append(f"{type(error).__name__}: {error}")
        finally:
            PreferenceTrainer.compute_loss = compute  # type: ignore[method-assign]
    return results


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
