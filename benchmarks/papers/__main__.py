"""Try the papers' claims on small models: `python -m benchmarks.papers --out benchmarks/results/papers`.

Each script writes a table, a picture and a JSON file per claim. One whose files are all there is skipped. At the end
the claims that are in the folder make one table (with `--docs docs/claims.md` the project's own).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rgpb.bench.plan import argument, positive

from .claim import claims_table, modules, read


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the results; needed but for --list")
    add("--only", nargs="+", metavar="NAME", help="scripts or claims; default: all")
    add("--hh-rlhf", type=Path, metavar="DIR", help="folder with train.jsonl.gz and test.jsonl.gz of HH-RLHF")
    add("--alpaca-eval", type=Path, metavar="FILE", help="JSON lines with prompt, completions and rewards")
    add("--seeds", type=argument(positive), default=4, help="runs of each; default %(default)s")
    add("--docs", type=Path, metavar="FILE", help="the table of all claims; default: claims.md in --out")
    add("--again", action="store_true", help="also those whose results are there")
    add("--list", action="store_true", help="only print scripts and claims")
    add("--quiet", action="store_true", help="show no progress")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for.

    Returns:
        0, or 2 for bad arguments.
    """
    parser = make_parser()
    a = parser.parse_args(argv)
    if a.out is None and not a.list:
        parser.error("--out: expected a folder, got none")
    scripts = modules()
    known = {name for script, module in scripts.items() for name in (script, *(c.name for c in module.CLAIMS))}
    unknown = sorted(set(a.only or ()) - known)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    torch.set_num_threads(1)  # tensors this small are slower on more
    data = {key: path for key, path in (("hh_rlhf", a.hh_rlhf), ("alpaca_eval", a.alpaca_eval)) if path is not None}
    for name, module in scripts.items():
        names = [claim.name for claim in module.CLAIMS]
        if a.only and not {name, *names} & set(a.only):
            continue
        if a.list:
            print(
                name,
                *(f"  {claim.name}: {claim.paper} {claim.where}: {claim.text}" for claim in module.CLAIMS),
                sep="\n",
            )
            continue
        if not a.again and all((a.out / f"{claim}.json").exists() for claim in names):
            print(f"{name}: done", file=sys.stderr)
            continue
        start = time.monotonic()
        try:
            findings = module.run(a.out, data, seeds=a.seeds, progress=not a.quiet)
        except ValueError as error:
            if not str(error).startswith("--"):
                raise
            parser.error(f"{name}: {error}")
        for finding in findings:
            print(f"{finding.claim.name}: {finding.verdict}: {finding.number}")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if not a.list:
        docs = a.docs or a.out / "claims.md"
        docs.parent.mkdir(parents=True, exist_ok=True)
        notes = a.out / "notes.txt"
        text = notes.read_text(encoding="utf-8").strip() if notes.exists() else ""
        docs.write_text(claims_table(read(a.out), text, a.out, docs.parent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
