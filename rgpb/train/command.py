"""`rgpb train`: one flag for each field of `TrainConfig`, and what came out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rgpb.objectives import OBJECTIVES, Objective, describe_options
from rgpb.objectives.registry import OptionText
from rgpb.train.config import TrainConfig
from rgpb.train.ranks import close_ranks, own_rank, processes, report_failure
from rgpb.train.report import read_metrics, show, table
from rgpb.train.run import train


def add_parser(subparsers: Any) -> None:
    """`rgpb train`: one flag per field of `TrainConfig`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model on preference data",
        epilog=described_losses(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for entry in fields(TrainConfig):
        add_flag(parser, entry)
    parser.set_defaults(run=run)


def described_losses() -> str:
    """Every objective's options that can be typed, and their defaults, for the end of the help."""
    lines = ["options of the objectives, as --loss-option KEY=VALUE (of one term of a sum: TERM.KEY=VALUE):"]
    for name, spec in sorted(OBJECTIVES.items()):
        typed = [
            f"    {o.name}: {kind}, default {_default(spec, o)}{'; ' + o.range if o.range else ''}"
            for o in describe_options(spec)
            if (kind := _typed(spec, o))
        ]
        lines += [f"  {name}", *typed] if typed else [f"  {name}: none"]
    return "\n".join(lines)


def _typed(spec: Objective, option: OptionText) -> str:
    """The types among an option's that a command line can say; "" where it can say none."""
    classes = (spec.declared or {})[option.name][0].classes
    if classes is None:
        return option.type
    return " or ".join(kind.__name__ for kind in classes if kind in (bool, int, float, str))


def _default(spec: Objective, option: OptionText) -> str:
    """What an option is where it isn't given, in a run."""
    if option.name in spec.running:
        return "its mean over all batches"
    if option.name in spec.mismatched:
        return "estimated from mismatched completions"
    return option.default or "none"


def add_flag(parser: argparse.ArgumentParser, entry: Any) -> None:
    """The flag of one field."""
    flag, meta, kind = "--" + entry.name.replace("_", "-"), entry.metadata, str(entry.type)
    required, choices = entry.default is MISSING and not kind.startswith("dict"), meta.get("choices")
    keywords: dict[str, Any] = {"help": meta["help"], "dest": entry.name}
    if meta.get("negative"):
        parser.add_argument(
            "--" + meta["negative"], action="store_false", **{**keywords, "help": meta["negative_help"]}
        )
    elif kind == "bool":
        parser.add_argument(flag, action="store_true", **keywords)
    elif kind.startswith("dict"):
        parser.add_argument(flag, action="append", default=[], metavar="KEY=VALUE", **keywords)
    else:
        shown = [meta["allowed"].text] if meta.get("allowed") and "type" not in meta else []
        shown += [] if required or entry.default is None else [f"default: {entry.default}"]
        parser.add_argument(
            flag,
            type=meta.get("type") or {"int": int, "float": float}.get(kind.partition(" ")[0], str),
            choices=choices,
            required=required,
            default=None if required else entry.default,
            **{**keywords, "help": meta["help"] + (f" ({'; '.join(shown)})" if shown else "")},
        )


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


def run(arguments: argparse.Namespace) -> int:
    """The command: train, then show what came out."""
    values = {entry.name: getattr(arguments, entry.name) for entry in fields(TrainConfig)}
    values["loss_option"] = parse_options(values["loss_option"])
    config = TrainConfig(**values)
    if processes() == 1:
        result = train(config)
    else:
        try:
            result = train(config)
        except Exception as error:
            report_failure(error, getattr(error, "ranks", None), config.timeout)
            sys.stderr.flush()
            os._exit(2 if isinstance(error, ValueError) else 1)  # nothing waits for ranks that are gone
        first = own_rank() == 0
        close_ranks()
        if not first:
            return 0
    if result["resumed"] is None:
        print(f"{config.output} is finished already; wrote its report again")
    elif result["resumed"]:
        print(f"went on after step {result['resumed']}")
    show(table(read_metrics(config.output)), title=f"{config.loss}: {result['steps']} steps")
    print(f"report: {Path(config.output) / 'report.md'}, model: {Path(config.output) / 'model'}")
    return 0
