"""Try the papers' claims on small models: `python -m benchmarks.papers --out DIR`.

Each claim is a row of `claims.py`, and what comes out one line of DIR/claims.jsonl. Claims that are tried together, in
one world and trial, are done or left together; those that have their lines are skipped. At the end docs/claims.md, or
DIR/claims.md where DIR isn't the project's own, is made of all lines.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from rgpb.bench.plan import argument, positive

from .claims import CLAIMS, TRIALS, WORLDS
from .outcomes import SEEDS
from .report import RESULTS, load, page, record, render, save


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for: 0, or 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results; default: the project's")
    add("--only", nargs="+", metavar="NAME", help="claims, worlds or trials; default: all")
    add("--hh-rlhf", type=Path, metavar="DIR", help="folder with train.jsonl.gz and test.jsonl.gz of HH-RLHF")
    add("--alpaca-eval", type=Path, metavar="FILE", help="JSON lines with prompt, completions and rewards")
    add("--seeds", type=argument(positive), default=SEEDS, help="runs of each; default %(default)s")
    add("--docs", type=Path, metavar="FILE", help="where to write the table of all claims")
    add("--again", action="store_true", help="also those whose results are there")
    add("--list", action="store_true", help="only print the claims")
    add("--render", type=Path, metavar="DIR", help="only draw a picture of each claim's results into this folder")
    add("--quick", action="store_true", help="tiny models that learn nothing, to see that everything runs")
    add("--quiet", action="store_true", help="show no progress")
    a = parser.parse_args(argv)
    known = {name for claim in CLAIMS for name in (claim.name, claim.world, claim.trial)}
    if unknown := sorted(set(a.only or ()) - known):
        parser.error(f"--only: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    if a.quick and a.out.resolve() == RESULTS:
        parser.error("--quick: expected another folder as --out, got the project's own")
    if a.list:
        for claim in CLAIMS:
            print(f"{claim.name}: {claim.paper} {claim.place}: {claim.text} ({claim.trial} in {claim.world})")
        return 0
    if a.render:
        render(a.out, a.render)
        return 0
    logging.basicConfig(level=logging.WARNING if a.quiet else logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # tensors this small are slower on more
    data = {key: path for key, path in (("hh_rlhf", a.hh_rlhf), ("alpaca_eval", a.alpaca_eval)) if path is not None}
    make = cache(lambda name: WORLDS[name](data, a.seeds, a.quick))
    for world, trial in dict.fromkeys((claim.world, claim.trial) for claim in CLAIMS):
        claims = [claim for claim in CLAIMS if (claim.world, claim.trial) == (world, trial)]
        if a.only and not {world, trial, *(claim.name for claim in claims)} & set(a.only):
            continue
        if not a.again and {claim.name for claim in claims} <= load(a.out).keys():
            print(f"{trial} in {world}: done", file=sys.stderr)
            continue
        start = time.monotonic()
        try:
            values, settings = TRIALS[trial](make(world))
        except ValueError as error:
            if not str(error).startswith("--"):
                raise
            parser.error(f"{world}: {error}")
        records = [record(claim, values, {"seeds": a.seeds, **settings}) for claim in claims]
        save(a.out, records)
        print(*(f"{one['claim']}: {one['verdict']}" for one in records), sep="\n")
        print(f"{trial} in {world}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    docs = a.docs or (RESULTS.parents[2] / "docs" if a.out.resolve() == RESULTS else a.out) / "claims.md"
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(a.out), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
