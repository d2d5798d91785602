"""How a CPU's library likes its products: `python -m benchmarks.products --out DIR`.

The constants of `rgpb.engine.chunks` for CPUs (`cpu_limits`, PAD) come from these tables:
GFLOP/s of float32 products in the shapes that the engine asks for, for chunks of C rows, slices of S columns of the
vocabulary, and rows that lie `pad` elements further apart than they are long. Buffers exist before the time is taken.
Then what writing new memory costs. The last rows say what share of a whole call of the library its row kernels and its
products have.

Dimensions: C rows, H hidden size, V vocabulary, S columns of a slice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rgpb.arguments import argument, positive
from rgpb.bench.contest import LOG_PROB, Job, Shape, fused, kind_of, make_batch
from rgpb.bench.measure import interleaved, provenance, quantiles
from rgpb.bench.tables import free_table, save
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.kernels import cpp_rows

ROWS, COLUMNS, SLICES = (64, 128, 256, 512, 1024), (512, 1024, 2048, 4096, 0), (1024, 2048, 4096)  # 0: all


Key = tuple[str, int, int, int]  # product, C, S, pad


def logits(x_CH: Tensor, weight_VH: Tensor, z_CV: Tensor, columns: int) -> None:
    """Z = X Wᵀ, `columns` of it at a time."""
    for at in range(0, len(weight_VH), columns or len(weight_VH)):
        part = slice(at, at + (columns or len(weight_VH)))
        torch.mm(x_CH, weight_VH[part].t(), out=z_CV[:, part])


def slices(x_CH: Tensor, weight_VH: Tensor, z_CS: Tensor, dweight_VH: Tensor) -> None:
    """The two products of a slice of dW, for all slices: Z = X Wᵀ and dW = Zᵀ X."""
    for at in range(0, len(weight_VH), z_CS.shape[1]):
        part = weight_VH[at : at + z_CS.shape[1]]
        z = z_CS[:, : len(part)]
        torch.mm(x_CH, part.t(), out=z)
        torch.mm(z.t(), x_CH, out=dweight_VH[at : at + len(part)])


def runs(width: int, vocab: int, tokens: int) -> dict[Key, tuple[float, Callable[[], object]]]:
    """What does each product, and its flops."""
    weight, dweight = torch.randn(vocab, width), torch.zeros(vocab, width)
    x = torch.randn(tokens, width)
    found: dict[Key, tuple[float, Callable[[], object]]] = {}
    for rows in [rows for rows in ROWS if rows <= tokens]:
        z, part = torch.randn(rows, vocab), x[:rows]
        flops = 2.0 * rows * width * vocab
        for columns in COLUMNS:
            found["logits", rows, columns, 0] = flops, partial(logits, part, weight, z, columns)
        found["dX", rows, 0, 0] = flops, partial(torch.mm, z, weight, out=torch.empty_like(part))
        found["dW", rows, 0, 0] = flops, partial(torch.addmm, dweight, z.t(), part, out=dweight)
    for columns in SLICES:
        for pad in (0, 16):
            z = torch.empty(tokens, columns + pad)[:, :columns]
            key = "slices of dW", tokens, columns, pad
            found[key] = 4.0 * tokens * width * vocab, partial(slices, x, weight, z, dweight)
    return found


def new_memory(size: int, rounds: int) -> list[dict[str, Any]]:
    """What it costs to write memory that is new, as results and buffers are: GB/s, with huge pages and without."""

    def touch(fresh: Callable[[Tensor], Tensor]) -> None:
        fresh(torch.empty(size // 4)).zero_()

    there = torch.zeros(size // 4)
    ways: dict[str, Callable[[], object]] = {
        "write memory that is there": there.zero_,
        "write new memory": partial(touch, lambda x: x),
        "write new memory, huge pages": partial(touch, cpp_rows.fresh),
    }
    times = interleaved(ways, rounds, "cpu").seconds
    return [{"product": way, "GB/s": round(size / quantiles(seconds)[0] / 1e9, 2)} for way, seconds in times.items()]


def shares(shape: Shape) -> list[dict[str, Any]]:
    """Of a call's time, how much is the row kernels' and how much the products', as torch's profiler sees it."""
    batch, table = make_batch(shape, torch.float32, "cpu"), []
    for loss, path in (
        ("bnf", "single"),
        ("dpo", "single"),
        ("dpo", "two_pass"),
        ("bnf", "frozen"),
        (LOG_PROB, "forward"),
    ):
        run, _ = fused(batch, Job(loss, kind_of(path)), path, DEFAULT_WORKSPACE, impl="auto")
        run()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        spent = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
        parts = {"row kernels": "rgpb::row_", "products": ("aten::mm", "aten::addmm", "rgpb::mm_bf16")}
        of = {part: sum(t for key, t in spent.items() if key.startswith(names)) for part, names in parts.items()}
        total = sum(spent.values())
        table.append(
            {"product": f"{loss} {path}", **{f"{part}, %": round(100 * t / total, 1) for part, t in of.items()}}
        )
    return table


def main() -> None:
    """Measure, print the table, and write it with its provenance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    for name, default in (("width", 512), ("vocab", 32000), ("tokens", 2048), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help="default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    made = runs(a.width, a.vocab, a.tokens)
    times = interleaved({key: run for key, (_, run) in made.items()}, a.rounds, "cpu").seconds
    table: list[dict[str, Any]] = []
    for (product, rows, columns, pad), seconds in times.items():
        median, low, high = quantiles([made[product, rows, columns, pad][0] / s / 1e9 for s in seconds])
        table.append(
            {
                "product": product, "rows": rows, "columns": columns or a.vocab, "pad": pad,
                "gflops": round(median, 1), "20 %": round(low, 1), "80 %": round(high, 1),
            }
        )  # fmt: skip
    table += new_memory(4 * a.vocab * a.width, a.rounds)
    table += shares(Shape(a.tokens, a.width, a.vocab))
    facts = provenance("cpu", width=a.width, vocab=a.vocab, tokens=a.tokens, rounds=a.rounds)
    a.out.mkdir(parents=True, exist_ok=True)
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table})
    print("\n".join(free_table(table)))


if __name__ == "__main__":
    main()
