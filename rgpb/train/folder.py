"""The folder of a run: whose it is, and its checkpoints."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from rgpb.objectives import OBJECTIVES, parse_sum, resolve
from rgpb.train.config import TrainConfig
from rgpb.train.files import write_json
from rgpb.train.machine import parallel_of, precision_of
from rgpb.train.models import is_gguf
from rgpb.train.ranks import processes
from rgpb.train.rewards import Reward, Sampler
from rgpb.train.rows import Preferences

# What may change between an interrupted run and the one that goes on: nothing that results depend on.
FREE = (
    *("output", "data", "eval_data", "save_steps", "keep_checkpoints", "overwrite", "progress", "parallel", "timeout"),
    *("ref_cache", "precompute_ref", "allow", "report_to"),
)

# What a run writes, and `overwrite` removes.
OWN = (
    *("run.json", "result.json", "metrics.jsonl", "report.md", "report.png", "tokenizer", "rollouts", "sft", "model"),
    *("merged", "tensorboard", "checkpoint-*"),
)


def open_run(
    folder: Path, config: TrainConfig, preferences: Preferences, held_out: Preferences | None,
    reward: Reward | None, sampler: Sampler | None = None,
) -> None:  # fmt: skip
    """Make the folder, or check that it holds the same run.

    Raises:
        ValueError: a folder of something else, or of a run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, or a path where one can be made, got the file {folder}")
    functions = {name: given for name, given in (("reward", reward), ("sampler", sampler)) if given is not None}
    settings = _settings(config, preferences, held_out, functions)
    note = folder / "run.json"
    found = [] if not folder.exists() else [path for path in folder.iterdir() if path.suffix != ".tmp"]
    if found and not note.exists():
        raise ValueError(
            f"output: expected a new or empty folder or one of an earlier run, got {folder} with other files"
        )
    own = [path for path in found if any(path.match(pattern) for pattern in OWN)]
    if config.overwrite or not any(path.name not in ("run.json", "tokenizer") for path in own):
        for path in own:  # a run that got no further than its settings binds nobody
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        _check_same(folder, settings, functions)
        write_json(note, {**json.loads(note.read_text()), **_machine(config)})
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    sources = {"data": str(config.data), "eval_data": config.eval_data}
    sources |= {name: value for name in ("reward", "sampler") if (value := getattr(config, name)) is not None}
    content: dict[str, Any] = {"settings": settings, "sources": sources, "versions": versions, **_machine(config)}
    content |= {f"{name} source": _source(function) for name, function in functions.items()}
    write_json(note, content)


def _machine(config: TrainConfig) -> dict[str, Any]:
    """What may be another when a run goes on: how many processes share the work, and how; the precision that gives;
    settings that no result depends on."""
    apart = ("output", "data", "eval_data", "overwrite")
    free = {name: getattr(config, name) for name in FREE if name not in apart}
    machine = {"processes": processes(), "parallel": parallel_of(config), "precision": precision_of(config)}
    return {**machine, "other settings": free}


def _settings(
    config: TrainConfig, preferences: Preferences, held_out: Preferences | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What results depend on, as `run.json` keeps it."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["data"] = _data_digest(preferences)
    settings["eval_data"] = None if held_out is None else _data_digest(held_out)
    settings["loss"] = resolve(config.loss).name
    for name, function in given.items():
        asked = getattr(config, name)
        place = getattr(function, "__module__", "") if asked is None else Path(asked).name.partition(":")[0]
        settings[name] = f"{place}:{getattr(function, '__qualname__', type(function).__name__)}"
    functions = {name: _source(OBJECTIVES[name].function) for name in _terms(config.loss)}
    if any(functions.values()):
        settings["functions"] = functions
    for name in ("model", "ref_model"):
        if settings[name] is not None and (Path(settings[name]).is_dir() or is_gguf(settings[name])):
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def _check_same(folder: Path, settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    noted = json.loads((folder / "run.json").read_text())
    # settings that there weren't yet when the run began have their defaults; nothing was held out
    then = {**{entry.name: entry.default for entry in fields(TrainConfig)}, "eval_split": 0.0}
    earlier = {
        **(then if noted["settings"]["eval_data"] is None else {**then, "eval_split": None}),
        **noted["settings"],
    }
    for name, function in given.items():
        if noted.get(f"{name} source") != _source(function):
            did = {"reward": "judged", "sampler": "sampled"}[name]
            print(f"{name}: {settings[name]} has changed since this run began; what it {did} so far stays")
    differing = [
        f"{name} is {earlier.get(name)!r} there and {value!r} now"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"output: expected the settings of the run in {folder}, got others: {'; '.join(differing)} "
            "(take another --output, or --overwrite to start anew)"
        )


def check_origin(folder: Path, **digests: str) -> None:
    """Keep digests of what a run takes from its model's folder; where it goes on, refuse others.

    Raises:
        ValueError: tokens or weights that aren't those with which the run began.
    """
    note = json.loads((folder / "run.json").read_text())
    known = {**digests, **note.get("digests", {})}
    differing = [name for name, digest in digests.items() if known[name] != digest]
    if differing:
        raise ValueError(
            f"model: expected the {' and the '.join(differing)} with which the run in {folder} began, got others: its "
            "folder has changed (put back what was there, take another --output, or --overwrite to start anew)"
        )
    if note.get("digests") != known:
        write_json(folder / "run.json", {**note, "digests": known})


def _terms(loss: str) -> list[str]:
    """Names of the objectives in a loss."""
    return [loss] if loss in OBJECTIVES else [*parse_sum(loss)]


def _source(function: Any) -> str | None:
    """Digest of the text of a function that isn't this package's; None where it is, or can't be read."""
    if getattr(function, "__module__", "").startswith("rgpb."):
        return None
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def _data_digest(preferences: Preferences) -> str:
    """Digest of what was read: the same rows from another place are the same data."""
    digest = hashlib.sha256(preferences.form.encode())
    for row in preferences.rows:
        digest.update(json.dumps(row[1:]).encode())
    return digest.hexdigest()[:16]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. Incomplete ones, from an interrupted save, are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / "progress.json").exists() and path.suffix != ".tmp":
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=step_of, default=None)


def drop_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest complete ones; one whose removal is interrupted is no checkpoint any more."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / "progress.json").exists()]
    for path in sorted((path for path in complete if path.suffix != ".tmp"), key=step_of)[:-keep]:
        (path / "progress.json").unlink()
        shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])
