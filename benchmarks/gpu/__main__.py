"""The benchmark suite for a GPU: `python -m benchmarks.gpu --out benchmarks/results/h200`.

With `--device cpu` it has the part `cpu`: all contestants in float32; the others run there, too, when they are named.
Each part writes DIR/<part>.json and, row by row, DIR/<part>.jsonl. A part that was cut short goes on where it stopped
when the same command is given again; delete its .jsonl to begin anew. `rgpb bench --render DIR/<part>.json` prints its
tables and draws its plot. A row that is there isn't run again, whatever `--rounds` says.

Exit codes: 2 for bad arguments or a part that can't be run, else 3 if rows are left for the next run, else 1 if a
result was off float64, else 0.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgpb.bench import parse_shape
from rgpb.bench.cases import DTYPES
from rgpb.bench.plan import argument, parse_bytes, positive
from rgpb.bench.report import markdown, read

from . import correct, device, heads, roofline, verdict
from .journal import WORKSPACES, Group, Journal, Outcome, Settings, Task, describe, say, work

Rows = list[dict[str, Any]]


class Part(NamedTuple):
    """A part: what it shows, its rows to be, and what its JSON holds beside them.

    Attributes:
        text: one line for `--list`.
        tasks: from the journal and the settings.
        summary: from all rows: `points` of a plot, or a `table`.
        shown: whether its table is printed at the end.
        device: where it is run when no part is named.
    """

    text: str
    tasks: Callable[[Journal, Settings], Iterator[Task | Group]]
    summary: Callable[[Rows], dict[str, Any]]
    shown: bool = False
    device: str = "cuda"


def _table(rows: Rows) -> dict[str, Any]:
    return {"table": [{name: x for name, x in row.items() if not isinstance(x, dict)} for row in rows]}


def _lazily(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that needs more than `rgpb[bench]` brings: transformers and what trains with it."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__package__}.{module}"), function)(*arguments)

    return call


def _named(shapes: tuple[tuple[str, int, int, int, float | None], ...]) -> str:
    return "; ".join(f"{name} N={n} H={h} V={v}" + (f" soft-cap {c:g}" if c else "") for name, n, h, v, c in shapes)


PARTS = {
    "correct": Part(
        "every loss, path, kernel, head and dtype against float64, twice",
        lambda journal, settings: correct.tasks(settings),
        correct.summary,
    ),
    "ceilings": Part(
        "copy bandwidth and the rates of bare products",
        lambda journal, settings: device.ceilings(settings),
        _table,
    ),
    "kernels": Part(
        "each kernel alone against a copy of as many bytes and the library's product, in the same rounds",
        lambda journal, settings: roofline.kernels(settings),
        _table,
    ),
    "profile": Part(
        "where a call's time goes: products, row and tile kernels, the rest, idle",
        lambda journal, settings: roofline.profiles(settings),
        _table,
    ),
    "llama": Part(
        f"all contestants: {_named(heads.LLAMA)}",
        lambda journal, settings: heads.tasks(journal, settings, heads.LLAMA),
        heads.points,
    ),
    "others": Part(
        f"all contestants: {_named(heads.OTHERS)}",
        lambda journal, settings: heads.tasks(journal, settings, heads.OTHERS),
        heads.points,
    ),
    "longest": Part(
        "the most tokens before memory runs out, naive and fused BNF",
        lambda journal, settings: device.longest(settings),
        _table,
    ),
    "steps": Part(
        "training steps of a 1B Llama (on a CPU a toy), BNF and DPO: tokens per second, peak memory; naive and fused",
        _lazily("steps", "tasks"),
        _table,
    ),
    "training": Part(
        "300 steps of a small model (on a CPU 6 of a toy), fused in bfloat16 and naive in float32: do the curves agree",
        _lazily("steps", "training"),
        _lazily("steps", "summary"),
        shown=True,
    ),
    "skip": Part(
        "certified skipping on a made-up peaked distribution: share, units, bound, error, time",
        _lazily("skipping", "skip"),
        _table,
    ),
    "trained": Part(
        "the same on text, at stages of the training of a small language model, or with --model on yours",
        _lazily("skipping", "trained"),
        _table,
    ),
    "tune": Part(
        "the sweep of the kernels' configurations",
        lambda journal, settings: device.tune(settings),
        device.tune_table,
        shown=True,
    ),
    "cpu": Part(
        f"all contestants in float32, in the same rounds: {_named(heads.CPU)}",
        lambda journal, settings: heads.tasks(journal, settings, heads.CPU, "fp32", together=True),
        heads.points,
        device="cpu",
    ),
}


def parse_case(text: str) -> tuple[str, int, int, int, float | None]:
    """(name, N, H, V, soft-cap) from a text such as mine=2048,512,32000 or mine=2048,512,32000,30.

    Raises:
        ValueError: anything else.
    """
    name, _, sizes = text.partition("=")
    head, _, softcap = sizes.rpartition(",") if sizes.count(",") == 3 else (sizes, "", "")
    if not name or (softcap and not re.fullmatch(r"\d+(\.\d+)?", softcap)):
        raise ValueError(f"expected NAME=N,H,V or NAME=N,H,V,softcap, got {text!r}")
    shape = parse_shape(head)
    return name, shape.tokens, shape.width, shape.vocab, float(softcap) if softcap else None


def parse_pattern(text: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        ValueError: not one.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {text!r} ({error})") from error


def parse_share(text: str) -> tuple[int, int]:
    """(i, n) from a text such as 0/8.

    Raises:
        ValueError: anything else, or i not less than n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"expected I/N with I from 0 to N-1, as 0/8, got {text!r}")
    return int(match[1]), int(match[2])


def parse_minutes(text: str) -> float:
    """A number of minutes, at least 0.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"expected minutes, as 8.5, got {text!r}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the results; needed, except with --list")
    add("--part", action="append", choices=tuple(PARTS), metavar="NAME", help="again for more; default: the device's")
    add(
        "--verdict", action="store_true",
        help="run nothing: what the results in --out say, beside predictions, aims and others, as Markdown",
    )  # fmt: skip
    add("--list", action="store_true", help="only print the parts")
    add(
        "--shape", action="append", type=argument(parse_case), default=[], metavar="NAME=N,H,V[,softcap]",
        help="in place of a part's own shapes; again for more. kernels, profile, longest, skip and trained take the "
        "first; steps and training have models of their own",
    )  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=tuple(DTYPES), help="of the heads; default: bf16, and fp32 for the part cpu")
    add("--threads", type=argument(positive), help="of torch; default: what torch takes")
    add("--minutes", type=argument(parse_minutes), default=8.5, help="of a part, then no row is begun; default 8.5")
    add(
        "--workspace", action="append", type=argument(parse_bytes), metavar="BYTES",
        help="of the library; again for more; default 512MiB and 4GiB, on a CPU 512MiB and 16MiB (steps: the "
        "library's default)",
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
    add("--without", type=argument(parse_pattern), metavar="REGEX", help="no row whose key has it, as 'compiled'")
    add(
        "--share", type=argument(parse_share), default=(0, 1), metavar="I/N",
        help="only a part of the rows, I from 0 to N-1: for N processes at a time where nothing is timed, as in "
        "`correct`, each with its own --out; their .jsonl files one after the other are that of all",
    )  # fmt: skip
    return parser


def run_part(name: str, folder: Path, settings: Settings) -> Outcome | None:
    """Run what is left of a part, and write its JSON; None where it can't be run with these settings, or here."""
    part = PARTS[name]
    try:
        journal = Journal(folder, name)
        outcome = work(journal, part.tasks(journal, settings), settings, describe(settings), part.summary)
    except ImportError as error:
        say(f"{name}: not run, as it needs what `pip install rgpb[hf]` brings: {error}")
        return None
    except (OSError, ValueError) as error:
        say(f"{name}: not run: {error}")
        return None
    if part.shown:
        print(markdown(read(journal.json)), end="")
    rows = f"{len(journal.rows)} rows, {outcome.added} of them new"
    say(f"{name}: {rows}, {outcome.failed} failed, {outcome.left} left: {journal.json}")
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for.

    Returns:
        2 for bad arguments or a part that can't be run, else 3 if rows are left for the next run, else 1 if a result
        was off float64, else 0.
    """
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
        a.without, a.dtype, a.model, tuple(a.text), a.steps, a.share,
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
