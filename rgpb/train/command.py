"""`rgpb train`: a flag for each field of `TrainConfig`, signals, and what came out."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from rgpb.objectives import OBJECTIVES, Objective, describe_options
from rgpb.objectives.registry import OptionText
from rgpb.train.flags import FIELDS, add_flags, settings_of
from rgpb.train.ranks import close_ranks, own_rank, processes, report_failure
from rgpb.train.report import read_metrics, show, table
from rgpb.train.run import train
from rgpb.train.signals import StoppedError, terminable


def add_parser(subparsers: Any) -> None:
    """`rgpb train`: one flag per field of `TrainConfig`."""
    parser = subparsers.add_parser(
        "train",
        usage="rgpb train --data DATA --output OUTPUT [flags]",
        help="train a model on preference data",
        description="Train a model on preference data. A flag without a value has an opposite: --no-cpu undoes\n"
        "`cpu: true` in the file of --config.",
        epilog=described_losses(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, dict.fromkeys(FIELDS))
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


def run(arguments: argparse.Namespace) -> int:
    """The command: train, then show what came out."""
    config = settings_of(arguments)
    several = processes() > 1
    try:
        with terminable():
            result = train(config)
    except KeyboardInterrupt as error:
        code = getattr(error, "code", 128 + signal.SIGINT)
        if own_rank():
            return code
        said, same = f"{error}; " if error.args else "", f"rgpb {shlex.join(arguments.argv)}"
        said += "the same command goes on" if several else f"to go on: {same}"
        raise StoppedError(code - 128, f"{signal.Signals(code - 128).name}: {said}") from None
    except Exception as error:
        if not several:
            raise
        report_failure(error, getattr(error, "ranks", None), config.timeout)
        sys.stderr.flush()
        os._exit(2 if isinstance(error, ValueError) else 1)  # nothing waits for ranks that are gone
    if several:
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
