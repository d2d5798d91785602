"""Flags of the fields of `TrainConfig`, and their values: from the command line, over those of a file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rgpb.objectives import suggest
from rgpb.train.config import TrainConfig
from rgpb.train.rows import DECODER

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}

GROUPS = {
    "run": ("output", "overwrite", "seed", "cpu", "progress"),
    "data": (
        *("data", "eval_data", "eval_split", "eval_rows", "pairing", "max_length", "max_prompt_length"),
        *("truncation_side", "packing", "allow"),
    ),
    "loss": ("loss", "loss_option"),
    "model and reference": ("model", "vocab_size", "dropout", "ref_model", "ref_cache", "precompute_ref"),
    "online": ("online", "reward", "sampler", "candidates", "refresh", "temperature", "max_new_tokens"),
    "optimization": (
        *("epochs", "steps", "batch_size", "grad_accum", "lr", "warmup", "schedule", "weight_decay", "max_grad_norm"),
        *("sft_epochs", "sft_lr"),
    ),
    "adapters": ("lora_r", "lora_alpha", "lora_target", "merge"),
    "precision and memory": ("bf16", "dtype", "gradient_checkpointing", "workspace"),
    "metrics and checkpoints": ("log_steps", "eval_steps", "save_steps", "keep_checkpoints", "report_to"),
    "several processes": ("parallel", "timeout"),
}


def add_flags(parser: argparse.ArgumentParser, changes: Mapping[str, str | None]) -> None:
    """The flags of some fields, in groups, and `--config`. Nothing that isn't given gets into the namespace.

    Args:
        changes: the names of the fields, each with another text for the help, or None for the field's own.
    """
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in changes:
                add_flag(group, FIELDS[name], changes[name])
        if title == "run":
            group.add_argument("--config", metavar="FILE", help="YAML or JSON of these settings, or a run.json")


def add_flag(group: Any, entry: Any, text: str | None = None) -> None:
    """The flag of one field."""
    flag, meta, kind = "--" + entry.name.replace("_", "-"), entry.metadata, str(entry.type)
    keywords: dict[str, Any] = {"help": text or meta["help"], "dest": entry.name, "default": argparse.SUPPRESS}
    if kind == "bool":
        name, on = meta.get("negative", flag[2:]), "negative" not in meta
        keywords["help"] = text or meta.get("negative_help", meta["help"])
        group.add_argument("--" + name, action="store_true" if on else "store_false", **keywords)
        keywords["help"] = argparse.SUPPRESS
        group.add_argument("--no-" + name, action="store_false" if on else "store_true", **keywords)
    elif kind.startswith("dict"):
        group.add_argument(flag, action="append", metavar="KEY=VALUE", **keywords)
    else:
        shown = [meta["allowed"].text] if meta.get("allowed") and "type" not in meta else []
        if text is None:
            shown += ["required"] if entry.default is MISSING else []
            shown += [] if entry.default in (MISSING, None) else [f"default: {entry.default}"]
        keywords["help"] += f" ({'; '.join(shown)})" if shown else ""
        group.add_argument(flag, type=_type(entry), choices=meta.get("choices"), **keywords)


def _type(entry: Any) -> Any:
    """What turns a text into a value."""
    return entry.metadata.get("type") or {"int": int, "float": float}.get(str(entry.type).partition(" ")[0], str)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """["beta=0.2", "length_normalize=false"] → {"beta": 0.2, "length_normalize": False}.

    Raises:
        ValueError: no `=`, or no name before it.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"loss_option: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = {"true": True, "false": False}.get(text.lower(), text)
            options[key] = options[key] if isinstance(options[key], bool) else float(text)
        except ValueError:
            options[key] = text
    return options


def settings_of(arguments: argparse.Namespace, only: Container[str] = FIELDS, **defaults: Any) -> TrainConfig:
    """The settings: of the command line, then of the file of `--config`, then `defaults`, then `TrainConfig`'s own.

    Args:
        only: the fields that are taken from the file; others have their defaults.

    Raises:
        ValueError: a file that can't be used, or neither has what is required.
    """
    found = {} if arguments.config is None else read_settings(arguments.config)
    values = {**defaults, **{name: value for name, value in found.items() if name in only}}
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    if "loss_option" in given:
        given["loss_option"] = {**values.get("loss_option", {}), **parse_options(given["loss_option"])}
    values |= given
    required = [name for name, entry in FIELDS.items() if entry.default is entry.default_factory is MISSING]
    for name in required:
        if name not in values:
            raise ValueError(f"{name}: expected --{name}, or {name} in the file of --config; got neither")
    return TrainConfig(**values)


def read_settings(path: str) -> dict[str, Any]:
    """Values of fields from a YAML or JSON file, or from the `run.json` of a run, whose folder is then `output`.

    Raises:
        ValueError: no such file, not a mapping, an unknown or repeated name, or a value of another type.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"config: expected a file, got {path!r}, which isn't there")
    try:
        content = _parsed(file)
    except ValueError as error:
        raise ValueError(f"config: expected YAML or JSON in {path}, got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config: expected names of settings with their values in {path}, got {content!r}")
    if {"settings", "sources"} <= content.keys():
        content = _of_run(file, content)
    values: dict[str, Any] = {}
    negatives = {entry.metadata["negative"]: entry for entry in FIELDS.values() if "negative" in entry.metadata}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        entry = FIELDS.get(name) or negatives.get(name)
        if entry is None:
            raise ValueError(f"{path}: expected flags of rgpb train, got {key!r}{suggest(name, [*FIELDS, *negatives])}")
        if entry.name in values:
            raise ValueError(f"{path}: expected {entry.name} once, got {key!r} beside it")
        value = _value(f"{path}: {key}", entry, value)
        values[entry.name] = not value if name in negatives else value
    return values


def _parsed(file: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: it can't be read as JSON or YAML, or a name comes twice.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix.lower() == ".json":
        return DECODER.decode(text)
    import yaml  # type: ignore[import-untyped]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} twice")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _of_run(file: Path, note: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `run.json`; of its data and functions the places that the run was given."""
    settings = {name: value for name, value in note["settings"].items() if name != "functions"}
    return {"output": str(file.parent), **settings, **note.get("other settings", {}), **note["sources"]}


def _value(where: str, entry: Any, value: Any) -> Any:
    """A value of the file as the flag would give it.

    Raises:
        ValueError: another type than the field's.
    """
    kind = str(entry.type).partition(" ")[0].partition("[")[0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and entry.default is None:
        return None
    if kind == "dict" and isinstance(value, dict):
        texts = {k: parse_options([f"{k}={v}"])[k] for k, v in value.items() if isinstance(v, str)}
        return {str(k): texts.get(k, v) for k, v in value.items()}
    if (kind == "bool" and isinstance(value, bool)) or (kind == "float" and number):
        return value if kind == "bool" else float(value)
    if kind == "int" and number and math.isfinite(value) and int(value) == value:
        return int(value)
    if isinstance(value, str) and kind in ("str", "int", "float"):
        try:
            return _type(entry)(value)
        except (ValueError, argparse.ArgumentTypeError):
            pass
    raise ValueError(f"{where}: expected {_described(kind)}, got {value!r}")


def _described(kind: str) -> str:
    names = {"dict": "names with values", "bool": "true or false", "int": "a whole number", "float": "a number"}
    return names.get(kind, "a text")
