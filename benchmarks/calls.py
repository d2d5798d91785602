"""What small calls cost: `python -m benchmarks.calls --out DIR`.

A BNF step (forward and backward) and scores (`linear_logprob`, forward) of a few tokens, beside naive cross-entropy in
plain PyTorch, forward and backward, or forward. There it is Python and the dispatcher that take the time, not products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rgpb import linear_logprob
from rgpb.arguments import argument, positive
from rgpb.bench.contest import Shape
from rgpb.bench.measure import interleaved, provenance
from rgpb.bench.tables import free_table, save
from rgpb.fused import bnf_loss

SHAPES = (Shape(64, 64, 512), Shape(256, 128, 4096))
RESPONSES = 4


def calls(shape: Shape) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """(the library's call, the naive one) by name."""
    tokens, width, vocab = shape
    hidden = torch.randn(RESPONSES, tokens // RESPONSES, width, requires_grad=True)
    weight = torch.randn(vocab, width).mul_(width**-0.5).requires_grad_()
    target, label = torch.randint(vocab, hidden.shape[:2]), torch.arange(RESPONSES) % 2 == 0
    ref = linear_logprob(hidden.detach(), weight.detach(), target)

    def naive(reduction: str) -> torch.Tensor:
        return F.cross_entropy(hidden.flatten(0, 1) @ weight.t(), target.flatten(), reduction=reduction)

    def step() -> object:
        return torch.autograd.grad(bnf_loss(hidden, weight, target, label, ref=ref), [hidden, weight])

    def naive_step() -> object:
        return torch.autograd.grad(naive("mean"), [hidden, weight])

    scores = torch.no_grad()(lambda: linear_logprob(hidden, weight, target))
    naive_scores = torch.no_grad()(lambda: naive("none"))
    return {"BNF step": (step, naive_step), "scores": (scores, naive_scores)}


def main() -> None:
    """Measure, print the table, and write it with its provenance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--rounds", type=argument(positive), default=31, help="default %(default)s")
    parser.add_argument("--threads", type=argument(positive), default=2, help="default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    table: list[dict[str, Any]] = []
    for shape in SHAPES:
        for name, (ours, naive) in calls(shape).items():
            times = interleaved({"rgpb": ours, "naive": naive}, a.rounds, "cpu", shortest=0.02)
            ms = {way: round(1e3 * times.quantiles(way)[0], 3) for way in ("rgpb", "naive")}
            over = round(times.over("rgpb", "naive"), 2)
            table.append({"call": name, "shape": f"N={shape[0]}, H={shape[1]}, V={shape[2]}", **ms, "over": over})
    a.out.mkdir(parents=True, exist_ok=True)
    save(
        a.out / "results.json",
        {"provenance": provenance("cpu", rounds=a.rounds), "rows": [], "points": [], "table": table},
    )
    print("\n".join(free_table(table)))


if __name__ == "__main__":
    main()
