"""How a step's cost grows: `python -m benchmarks.growth --out DIR`.

BNF, forward and backward, in float32 on random states, over the bare three products of the same shape: N, V and H grow,
one at a time, in a `Workspace` of one size that is kept, on one thread and on two. The picture has a panel for each.

Dimensions: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from rgpb import Workspace
from rgpb.arguments import argument, positive
from rgpb.bench.contest import Floor, Job, Shape, fused, make_batch
from rgpb.bench.measure import interleaved, provenance
from rgpb.bench.tables import free_table, save

SHAPES: dict[str, list[Shape]] = {
    "N": [Shape(n, 256, 8192) for n in (256, 1024, 4096, 16384, 65536)],
    "V": [Shape(512, 512, v) for v in (8192, 32768, 131072, 262144)],
    "H": [Shape(512, h, 16384) for h in (256, 512, 1024, 2048, 4096)],
}
NAMES = {"N": "tokens", "V": "vocab", "H": "width"}


def point(shape: Shape, threads: int, rounds: int, kept: Workspace) -> dict[str, Any]:
    """One shape: milliseconds of a step and of the products, and the median of their ratios."""
    torch.set_num_threads(threads)
    batch = make_batch(shape, torch.float32, "cpu")
    floor = Floor(batch)
    step, plan = fused(batch, Job("bnf", "full"), "auto", kept, impl="auto")
    times = interleaved({"step": step, "products": partial(floor.run, 3)}, rounds, "cpu", shortest=0.05)
    of = {name: round(1e3 * times.quantiles(name)[0], 1) for name in ("step", "products")}
    over = round(times.over("step", "products"), 3)
    return {
        "N": shape.tokens, "V": shape.vocab, "H": shape.width, "threads": threads, "path": plan.path,
        "step, ms": of["step"], "products, ms": of["products"], "over the products": over,
    }  # fmt: skip


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """A panel for each size that grows."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SHAPES), sharey=True), SHAPES):
        for threads in dict.fromkeys(row["threads"] for row in table):
            rows = [row for row in table if row["grows"] == name and row["threads"] == threads]
            label = f"{threads} thread{'s' * (threads > 1)}"
            axes.plot([row[name] for row in rows], [row["over the products"] for row in rows], "o-", label=label)
        fixed = [f"{other} = {getattr(SHAPES[name][0], NAMES[other]):,}" for other in SHAPES if other != name]
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"{name}, with {' and '.join(fixed)}")
        axes.axhline(1, color="gray", lw=0.8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time over the bare three products")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the table, and write it with its provenance and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--rounds", type=argument(positive), default=5, help="default %(default)s")
    parser.add_argument("--workspace", type=argument(positive), default=512, help="MiB, default %(default)s")
    parser.add_argument("--threads", type=argument(positive), nargs="+", default=(1, 2), help="default 1 2")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.png")
    a = parser.parse_args()
    table: list[dict[str, Any]] = []
    for threads in a.threads:
        for name, shapes in SHAPES.items():
            kept = Workspace(a.workspace << 20, gradients=True)
            for shape in shapes:
                table.append({"grows": name, **point(shape, threads, a.rounds, kept)})
                print(", ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    facts = provenance("cpu", workspace=a.workspace << 20, rounds=a.rounds, threads_compared=list(a.threads))
    a.out.mkdir(parents=True, exist_ok=True)
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table})
    draw(table, a.out / "results.png")
    print("\n".join(free_table(table)))


if __name__ == "__main__":
    main()
