"""The command `rgpb`: a table of subcommands.

Each subcommand is a module with `add_parser(subparsers)`, which sets `run`, a function of the arguments, in its parser.
Only the module of the subcommand that is called gets imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from rgpb import __version__
from rgpb.arguments import told

COMMANDS = {
    "train": ("rgpb.train.command", "train a model on preference data"),
    "evaluate": ("rgpb.train.evaluation", "loss, accuracies and log-probabilities of a model on held-out data"),
    "bench": ("rgpb.bench", "compare with naive PyTorch and the bare products: time, memory, error"),
    "plan": ("rgpb.bench.plan", "what a call will run, why, and what it costs"),
    "doctor": ("rgpb.bench.doctor", "which kernels can run here, why not the others, and whether they are right"),
    "tune": ("rgpb.bench.tune", "time what the kernels' speed depends on, on this machine, and keep the fastest"),
    "demo": ("rgpb.demo", "compare three losses on arithmetic pairs, in a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code: 0, 1 for a result that isn't right, 2 for input that can't be used, 130 and 143 when
        stopped by SIGINT and SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="rgpb", description="Losses that reward good and penalise bad examples.")
    parser.add_argument("--version", action="version", version=f"rgpb {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    try:
        for name, (module, text) in COMMANDS.items():
            if name in argv[:1]:
                importlib.import_module(module).add_parser(subparsers)
            else:
                subparsers.add_parser(name, help=text)
        arguments = parser.parse_args(argv)
        arguments.argv = argv
        return arguments.run(arguments)
    except ModuleNotFoundError as error:
        print(f"rgpb: error: {error}; `pip install rgpb[hf,bench]` brings what the commands need", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"rgpb: error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"rgpb: error: {told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\nrgpb: {error if error.args else 'interrupted'}", file=sys.stderr)
        return getattr(error, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
