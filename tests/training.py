"""Runs of `rgpb train` on the ranks of tests/ranks.py, and what they leave; for tests/test_train_ranks.py."""

from __future__ import annotations

import json
import os
import signal
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
    settings |= {"log_steps": 2, "save_steps": 100, "progress": False, "eval_rows": 200}
    return TrainConfig(data=data, output=str(output), **{**settings, **changes})


def run(settings: list[TrainConfig], stop: int | None = None, told: int | None = None) -> list[Any]:
    """The results of runs, one after the other; or the errors that they end in.

    stop: a step before which each run is broken off, on all ranks.
    told: a step behind which rank 1 alone gets SIGINT.
    """
    from rgpb.train.trainer import PreferenceTrainer

    if os.environ.get("WORLD_SIZE", "1") != "1":
        prepare()
        torch.use_deterministic_algorithms(True)
    compute, results = PreferenceTrainer.compute_loss, []

    def breaks(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        if self.state.global_step == told and self.ranks.rank == 1:
            signal.raise_signal(signal.SIGINT)
        return compute(self, *arguments, **keywords)

    for each in settings:
        PreferenceTrainer.compute_loss = compute if stop is told is None else breaks  # type: ignore[method-assign]
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


def blocks(settings: TrainConfig) -> list[int]:
    """Interrupt the scoring of references in its third block, then run; how many responses were scored at a time."""
    from rgpb.train import teacher

    prepare()
    torch.use_deterministic_algorithms(True)
    begun: list[int] = []
    compute = teacher.score_references

    def counted(*arguments: Any, responses: Any, **keywords: Any) -> Any:
        begun.append(len(responses))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return compute(*arguments, responses=responses, **keywords)

    teacher.score_references = counted
    try:
        run([settings])
        result = run([settings])[0]
        assert isinstance(result, dict), result
    finally:
        teacher.score_references = compute
    return begun


def prepare_torchrun() -> None:
    """As `prepare`, in a rank of torchrun that RGPB_TEST_KILL="<where> <step> [<seconds>],…" may end: one for each
    start, at that step or the next that is reached. What ends it is said on stderr."""
    import threading
    import time

    from rgpb.train import trainer
    from rgpb.train.folder import step_of

    settings_module.BUILT_IN["tiny-llama"] = ("LlamaConfig", SMALL)
    report.plot = lambda runs, path: None
    torch.use_deterministic_algorithms(True)
    kills, start = os.environ.get("RGPB_TEST_KILL", "").split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kill = kills[start] if start < len(kills) else ""
    if not kill:
        return
    where, step, *delay = kill.split()
    rank, at, timers = os.environ["RANK"], int(step), []

    def die() -> None:
        os.write(2, f"killed: {kill}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    save, replace, compute = trainer.save_state, os.replace, trainer.PreferenceTrainer.compute_loss

    def saved(place: Path, *rest: Any) -> None:
        if where == "save" and rank == "1" and step_of(place.parent.with_suffix("")) >= at:
            die()
        save(place, *rest)

    def replaced(source: Any, target: Any) -> None:
        if where == "rename" and Path(target).match("checkpoint-*") and step_of(Path(target)) >= at:
            die()
        replace(source, target)

    def computed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step >= at and rank == "1":
            if where == "hang":
                time.sleep(1000)
            if where == "step" and not timers:
                timers.append(threading.Timer(float(delay[0]), die))
                timers[0].start()
        return compute(self, *arguments, **keywords)

    trainer.save_state, os.replace = saved, replaced
    trainer.PreferenceTrainer.compute_loss = computed  # type: ignore[method-assign]


def launch(world: int, restarts: int, arguments: list[str]) -> None:
    """`rgpb train` on ranks that torchrun's agent starts anew after a death, by forking: none imports what all need."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from rgpb.train import command, trainer  # noqa: F401

    where = {"run_id": "deaths", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, world, **where, max_restarts=restarts, start_method="fork", monitor_interval=0.1)
    elastic_launch(config, _start)(arguments)


def _start(arguments: list[str]) -> None:
    import signal

    from rgpb.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's, which was forked too
    prepare_torchrun()
    assert main(arguments) == 0
