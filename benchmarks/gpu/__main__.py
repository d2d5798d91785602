"""The benchmark suite for a GPU: `python -m benchmarks.gpu --out benchmarks/results/h200`.

With `--device cpu` it has the part `cpu`: all contestants in float32; the others run there, too, when they are named.
Each part writes DIR/<part>.json and, row by row, DIR/<part>.jsonl. A part that was cut short goes on where it stopped
when the same command is given again; delete its .jsonl to begin anew. `rgpb bench --render DIR/<part>.json` prints its
tables and draws its plot. A row that is there isn't run again, whatever `--rounds` says.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgpb.arguments import argument, parse_bytes, positive
from rgpb.bench import parse_shape
from rgpb.bench.contest import DTYPES

from . import calls, verdict
from .journal import WORKSPACES, Journal, Outcome, Settings, describe, say, work


class Part(NamedTuple):
    """A part: one line for `--list`; what makes its tasks, from a journal and `more`; what its JSON holds beside rows;
    where it is run by default. It is imported when it is run: some need transformers."""

    text: str
    tasks: str
    more: tuple[Any, ...] = ()
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {}
    device: str = "cuda"


def _heads(heads: tuple[calls.Head, ...], dtype: str, device: str = "cuda") -> Part:
    return Part(f"all contestants: {calls.described(heads)}", "calls.tasks", (heads, dtype), device=device)


PARTS = {
    "products": Part("smoke: the engine's products, in each type of result", "smoke.products"),
    "rows": Part("smoke: each row kernel; narrow results over the logits' own bytes", "smoke.rows"),
    "tiles": Part("smoke: each tile kernel in each configuration; twice the same bits", "smoke.tiles"),
    "whole": Part("smoke: whole calls against float64; twice the same bits", "smoke.whole"),
    "ceilings": Part("rates of copies and of the library's products", "card.ceilings"),
    "kernels": Part("each kernel alone beside a copy of as many bytes and the library's product", "kernels.tasks"),
    "llama": _heads(calls.LLAMA, "bf16"),
    "others": _heads(calls.OTHERS, "bf16"),
    "longest": Part("the most tokens before memory runs out, naive and fused BNF", "calls.longest"),
    "steps": Part("training steps of a 1B Llama (on a CPU a toy): tokens per second, peak memory", "steps.tasks"),
    "skip": Part("certified skipping on a made-up peaked distribution: share, bound, error, time", "skipping.skip"),
    "trained": Part("the same on a language model that is trained first, or with --model on yours", "skipping.trained"),
    "tune": Part("the sweep of the kernels' configurations", "calls.tune", (), calls.tune_table),
    "profile": Part("where the time of a call goes: launches, waits, products", "card.profiled"),
    "cpu": _heads(calls.CPU, "fp32", "cpu"),
}


def parse_case(text: str) -> calls.Head:
    """(name, N, H, V, soft-cap) from a text such as mine=2048,512,32000 or mine=2048,512,32000,30.

    Raises:
        ValueError: anything else.
    """
    name, _, sizes = text.partition("=")
    head, _, softcap = sizes.rpartition(",") if sizes.count(",") == 3 else (sizes, "", "")
    if not name or (softcap and not re.fullmatch(r"\d+(\.\d+)?", softcap)):
        raise ValueError(f"expected NAME=N,H,V or NAME=N,H,V,softcap, got {text!r}")
    return name, *parse_shape(head), float(softcap) if softcap else None


def parse_pattern(text: str) -> re.Pattern[str]:
    """A regular expression. Raises a ValueError for anything else."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {text!r} ({error})") from error


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the results; needed, except with --list")
    add("--part", action="append", choices=tuple(PARTS), metavar="NAME", help="again for more; default: the device's")
    add("--verdict", action="store_true", help="run nothing: print what the results in --out say, as Markdown")
    add("--list", action="store_true", help="only print the parts")
    add(
        "--shape", action="append", type=argument(parse_case), default=[], metavar="NAME=N,H,V[,softcap]",
        help="in place of a part's own; again for more. kernels, longest, skip and trained take the first",
    )  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=tuple(DTYPES), help="of the heads; default: bf16, and fp32 for the part cpu")
    add("--threads", type=argument(positive), help="of torch; default: what torch takes")
    add("--minutes", type=float, default=8.5, help="of a part, then no row is begun; default 8.5")
    add(
        "--workspace", action="append", type=argument(parse_bytes), metavar="BYTES",
        help="of the library; again for more; default 512MiB and 4GiB, on a CPU 512MiB and 16MiB",
    )  # fmt: skip
    add("--rounds", type=argument(positive), default=20, help="of timing, at most; fewer for slow rows; default 20")
    add("--cap", type=argument(positive), default=1 << 20, help="tokens where `longest` ends; default %(default)s")
    add("--model", type=Path, metavar="DIR", help="transformers model and tokenizer for `trained`; default: trains one")
    add("--steps", type=argument(positive), help="of the training for `trained`; default: by device")
    add(
        "--text", action="append", type=Path, default=[], metavar="PATH",
        help="file or folder of text for `trained`; again for more; default: sources of Python and torch",
    )  # fmt: skip
    add("--only", type=argument(parse_pattern), metavar="REGEX", help="only rows whose key has it, as 'bnf.*tiled'")
    add("--again", action="store_true", help="run rows that failed once more")
    add("--without", type=argument(parse_pattern), metavar="REGEX", help="no row whose key has it, as 'compiled'")
    return parser


def run_part(name: str, folder: Path, settings: Settings) -> Outcome | None:
    """Run what is left of a part, and write its JSON; None where it can't be run with these settings, or here."""
    part = PARTS[name]
    try:
        journal, (module, _, function) = Journal(folder, name, settings), part.tasks.partition(".")
        tasks = getattr(import_module(f"{__package__}.{module}"), function)(journal, *part.more)
        outcome = work(journal, tasks, describe(settings), part.summary)
    except ImportError as error:
        say(f"{name}: not run, as it needs what `pip install rgpb[hf]` brings: {error}")
        return None
    except (OSError, ValueError) as error:
        say(f"{name}: not run: {error}")
        return None
    new = f"{outcome.added} of them new, {outcome.failed} failed, {outcome.left} left"
    say(f"{name}: {len(journal.rows)} rows, {new}: {journal.json}")
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for: 2 for bad arguments or a part that can't be run, else 3 if rows are left for the next
    run, else 1 if a result was off float64, else 0."""
    parser = make_parser()
    a = parser.parse_args(argv)
    if a.list:
        for name, part in PARTS.items():
            print(f"{name:10}{part.text}")
        return 0
    if a.out is None:
        parser.error("--out: expected a folder")
    if a.verdict:
        try:
            print("\n".join(verdict.lines(verdict.read(a.out))))
        except ValueError as error:
            parser.error(f"--{error}")
        return 0
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA GPU, got torch.cuda.is_available() = False")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    settings = Settings(
        a.device, a.rounds, tuple(a.workspace or WORKSPACES[a.device]), tuple(a.shape), a.cap, a.minutes, a.only,
        a.without, a.dtype, a.model, tuple(a.text), a.steps, a.again,
    )  # fmt: skip
    parts = a.part or [name for name, part in PARTS.items() if part.device == a.device]
    outcomes = [run_part(name, a.out, settings) for name in parts]
    if None in outcomes:
        return 2
    ran = [outcome for outcome in outcomes if outcome is not None]
    if any(outcome.left for outcome in ran):
        return 3
    return int(any(outcome.failed for outcome in ran))


if __name__ == "__main__":
    sys.exit(main())
