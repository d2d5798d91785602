"""What skipping saves on a real model: `python -m benchmarks.skipping --model MODEL --pairs PAIRS --out DIR`.

MODEL is a folder of a transformers model, or a GGUF file (with the package `gguf`); PAIRS is JSON Lines, also gzipped,
with `prompt`, `chosen` and `rejected`. The model's hidden states of the responses' tokens are made once, and cut into
responses of equal length, since some peers take no others. One step of each loss, forward and backward, is timed in
interleaved rounds: the bare three products, naive PyTorch, peers that are installed, and the library without a
tolerance and with one, with memory of its own and with memory that is kept (the head's gradient, too, as the bare
products do it). Beside the times stand the share of tiles left out and how far that moves the gradients. The last
table, and the picture, say what other tolerances leave out of each loss, of chosen and rejected responses apart, and of
flat logits. In dpo and swepo all tokens of a response have the same coefficient, so its part is as in mle. `--count`
measures no time: it says what the Triton kernels would multiply on a GPU.

Dimensions: B responses, T tokens of each, V vocabulary, H hidden size.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.gpu import peers
from rgpb import Workspace, fused_loss
from rgpb.arguments import argument, positive
from rgpb.bench.contest import NAIVE, Batch, Floor, Job, finished, fused, naive
from rgpb.bench.measure import Result, explain, installed, interleaved, provenance
from rgpb.bench.tables import free_table, save
from rgpb.engine import skipping
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.engine.rates import RATES
from rgpb.engine.skipping import choose

LOSSES = ("bnf", "dpo", "swepo", "mle")
TOLERANCES = tuple(2.0**-k for k in range(4, 25, 4))
FLAT = 0.01  # the head is multiplied by that

Run = Callable[[], Result]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON Lines."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:  # type: ignore[union-attr]
        for line in lines:
            yield json.loads(line)


@torch.no_grad()
def states(model: Path, pairs: Path, tokens: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [B, T, H], weight [V, H], target [B, T]): half of the tokens are of chosen responses, then rejected."""
    from rgpb.train.models import load_pretrained, load_tokenizer

    tokenizer, lm = load_tokenizer(model), load_pretrained(model, torch.float32)
    half = tokens // length // 2 * length
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {"chosen": [], "rejected": []}
    found = dict.fromkeys(sides, 0)
    for row in rows_of(pairs):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side, made in sides.items():
            response = tokenizer(row[side])["input_ids"]
            if found[side] < half and response:
                ids = torch.tensor([(prompt + response)[-lm.config.max_position_embeddings :]])
                count = min(len(response), ids.shape[1] - 1)
                hidden = lm.model(ids)[0][0]
                made.append((hidden[-count - 1 : -1], ids[0, -count:]))
                found[side] += count
        print(f"\r{sum(found.values())} of {2 * half} tokens", end="", flush=True)
        if min(found.values()) >= half:
            break
    print()
    parts = [
        (torch.cat([x for x, _ in made])[:half], torch.cat([y for _, y in made])[:half]) for made in sides.values()
    ]
    hidden, target = (torch.cat(each) for each in zip(*parts))
    weight = lm.get_output_embeddings().weight.clone()
    return hidden.view(-1, length, hidden.shape[1]), weight, target.view(-1, length)


def others(batch: Batch, loss: str) -> Iterator[tuple[str, Run]]:
    """Naive PyTorch and the peers that do this loss, by name."""
    job = Job(loss, "full")
    yield "naive PyTorch", naive(batch, job)[0]
    ways: dict[str, Callable[[], tuple[Run, None]]] = {"naive, torch.compile": partial(naive, batch, job, True)}
    if loss != "bnf":  # which needs the entropy of the other tokens
        if installed("cut_cross_entropy"):
            ways["cut_cross_entropy, torch_compile"] = partial(
                peers.cut_cross_entropy, batch, job, impl="torch_compile"
            )
        lce = partial(peers.torch_linear_cross_entropy, batch, job)
        ways["F.linear_cross_entropy, 256 rows"] = partial(lce, {"batch_chunk_size": 256})
        if loss == "mle":
            ways["F.linear_cross_entropy, 1024 rows"] = partial(lce, {"batch_chunk_size": 1024})
        if installed("trl.kernels"):
            ways["TRL's fused head"] = partial(peers.trl_head, batch, job)
    for name, way in ways.items():
        try:
            run = way()[0]
            run()
        except Exception as error:
            print(f"{name}: {explain(error)}")
            continue
        yield name, run


def ours(batch: Batch, loss: str, tolerance: float | str, kept: Workspace) -> Iterator[tuple[str, Run, dict[str, Any]]]:
    """The library's ways by name, with their keywords."""
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("rgpb", {}),
        ("rgpb, kept", {"workspace": kept}),
        ("rgpb, two passes, kept", {"workspace": kept, "path": "two_pass"}),
        ("rgpb, tolerance", {"grad_tolerance": tolerance}),
        ("rgpb, tolerance, kept", {"grad_tolerance": tolerance, "workspace": kept}),
    )
    for name, given in ways:
        how = {"path": "auto", "workspace": DEFAULT_WORKSPACE, "impl": "auto", **given}
        yield name, fused(batch, Job(loss, "full"), **how)[0], how


def arguments(batch: Batch, loss: str) -> dict[str, Any]:
    """What a loss takes beside hidden states, head and target."""
    found = {"bnf": {"label": batch.label, "ref": batch.ref}, "dpo": {"ref": batch.ref}}
    return found.get(loss, {"ref": batch.ref, "rewards": batch.rewards} if loss == "swepo" else {})


def left_out(batch: Batch, loss: str, **how: Any) -> tuple[Result, dict[str, Tensor]]:
    """One call, with its metrics."""
    value, metrics = fused_loss(
        batch.hidden, batch.weight, batch.target, objective=loss, return_metrics=True, **arguments(batch, loss), **how
    )
    return Result(value.detach(), torch.autograd.grad(value, [batch.hidden, batch.weight])), metrics


def moved(made: Result, whole: Result) -> dict[str, float]:
    """‖difference‖ / ‖gradient‖ of dX and dW."""
    offs = [
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(made.gradients, whole.gradients)
    ]
    return {"dX off": float(f"{offs[0]:.1e}"), "dW off": float(f"{offs[1]:.1e}")}


def race(batch: Batch, losses: tuple[str, ...], tolerance: float | str, rounds: int) -> list[dict[str, Any]]:
    """A row for each loss and way: milliseconds, and over the three products, naive and the library's own."""
    table = []
    for loss in losses:
        kept, floor = Workspace(gradients=True), Floor(batch)
        runs: dict[str, Callable[[], object]] = {"bare three products": partial(floor.run, 3)}
        runs |= dict(others(batch, loss)) if loss in NAIVE else {}
        hows: dict[str, dict[str, Any]] = {}
        for name, run, how in ours(batch, loss, tolerance, kept):
            runs[name], hows[name] = run, how
        times = interleaved(runs, rounds, "cpu")
        whole, _ = left_out(batch, loss)
        for name in runs:
            row: dict[str, Any] = {"loss": loss, "way": name, "ms": round(1e3 * times.quantiles(name)[0])}
            row |= {f"over {key}": round(times.over(name, other), 3) for key, other in (
                ("3U", "bare three products"), ("naive", "naive PyTorch"), ("rgpb", "rgpb"),
            )}  # fmt: skip
            row |= dict.fromkeys(("left out", "dX off", "dW off"))
            if "tolerance" in name:
                made, metrics = left_out(batch, loss, **{**hows[name], "path": "auto"})
                row |= {"left out": round(metrics["skipped/share"].item(), 3), **moved(made, whole)}
            table.append(row)
        print("\n".join(free_table(table[-len(runs) :])), flush=True)
    return table


def sweep(batch: Batch, losses: tuple[str, ...]) -> list[dict[str, Any]]:
    """What tolerances leave out, in units of products: 1 + 2 (1 − s). Flat logits are those of the head times FLAT."""
    half = len(batch.target) // 2
    cases = [(loss, "all", batch) for loss in losses]
    for side, rows in {"chosen": slice(0, half), "rejected": slice(half, None)}.items():
        hidden = batch.hidden.detach()[rows].requires_grad_()
        target, label, ref = batch.target[rows], batch.label[rows], batch.ref[rows]
        some = batch._replace(hidden=hidden, target=target, label=label, ref=ref)
        cases += [(loss, side, some) for loss in losses if loss in ("bnf", "mle")]
    flat = batch._replace(weight=(FLAT * batch.weight.detach()).requires_grad_())
    cases += [(loss, "flat logits", flat) for loss in losses if loss in ("bnf", "mle")]
    table = []
    for loss, of, data in cases:
        kept = Workspace()
        whole, _ = left_out(data, loss)
        for tolerance in (*TOLERANCES, "auto"):
            made, metrics = left_out(data, loss, grad_tolerance=tolerance, workspace=kept)
            share = metrics["skipped/share"].item()
            row = {"loss": loss, "of": of, "tolerance": tolerance, "left out": round(share, 3)}
            table.append(row | {"units": round(1 + 2 * (1 - share), 2), **moved(made, whole)})
        print("\n".join(free_table(table[-len(TOLERANCES) - 1 :])), flush=True)
    return table


def counted(batch: Batch, losses: tuple[str, ...], tolerance: float) -> list[dict[str, Any]]:
    """What the Triton kernels multiply for the masks of this model, and what is predicted of it on an H200.

    Columns: `pairs`: of all (row, tile) pairs those that count. `dW`: the rows that count for each tile, in whole steps
    of them. `dX`: (tile of rows, tile) pairs with one that counts, `as they lie` and in the order that they are taken
    in. `MB`: E, W and X that the programs of dX and dW load, at this model's width. `over 3U`: predicted time of the
    products over that of three whole ones by the library.
    """
    from rgpb.kernels import configs, triton_skipping

    hidden, head = (configs.TILES["sm_90"][name][0] for name in ("hidden", "head"))
    width, rates, table = batch.weight.shape[1], RATES["sm_90"], []
    for tokens, loss, ordered in product((1024, 2048, 4096), losses, (False, True)):
        count, length = tokens // batch.target.shape[1], len(batch.target) // 2
        some = torch.cat([torch.arange(count // 2), length + torch.arange(count // 2)])  # of chosen and rejected alike
        masks: list[Tensor] = []

        def keeping(*given: Any) -> tuple[Tensor, Tensor]:
            active, bound = choose(*given)
            masks.append(active)  # noqa: B023
            return active, bound

        data = batch._replace(
            hidden=batch.hidden.detach()[some].requires_grad_(), target=batch.target[some], label=batch.label[some],
            ref=batch.ref[some],
        )  # fmt: skip
        with mock.patch.object(skipping, "choose", keeping):
            left_out(data, loss, grad_tolerance=tolerance, sort_vocab=ordered, workspace=4 << 30)
        active = torch.cat(masks)
        lying = torch.nn.functional.pad(active, (0, 0, 0, -len(active) % hidden.rows)).view(
            -1, hidden.rows, active.shape[1]
        )
        _, together = triton_skipping.tiles_of_rows(active, hidden.rows)
        steps = -(-active.sum(0) // head.rows)
        dx = together.sum().item() * hidden.rows / active.numel()
        dw = steps.sum().item() * head.rows / active.numel()
        tile = -(-len(batch.weight) // active.shape[1])
        loads = together.sum().item() * tile * (hidden.rows * -(-width // hidden.width) + width)
        loads += steps.sum().item() * head.rows * (tile * -(-width // head.width) + width * tile // head.vocab)
        row: dict[str, Any] = {"tokens": tokens, "loss": loss, "order": "sorted" if ordered else "as it lies"}
        row |= {"tile": tile, "pairs": round(active.float().mean().item(), 3), "dW": round(dw, 3), "dX": round(dx, 3)}
        row |= {"dX, rows as they lie": round(lying.any(1).float().mean().item(), 3), "MB": round(loads * 2 / 1e6)}
        table.append(row | {"over 3U": round((1 + (dx + dw) * rates.library / rates.tile) / 3, 2)})
    print("\n".join(free_table(table)))
    return table


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Units of products over the tolerance."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys((row["loss"], row["of"]) for row in table):
        rows = [row for row in table if (row["loss"], row["of"]) == name and row["tolerance"] != "auto"]
        label = name[0] if name[1] == "all" else f"{name[0]}, {name[1]}"
        axes.plot([row["tolerance"] for row in rows], [row["units"] for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(1, 3.1)
    axes.set_xlabel("tolerance: of a response's largest coefficient, what a row may leave out")
    axes.set_ylabel("products of 2·N·V·H flops, forward and backward")
    axes.axhline(3, color="gray", lw=0.8)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the tables, and write them with their provenance and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skipping", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    for name, default in (("tokens", 2048), ("length", 128), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help="default %(default)s")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tolerance", type=float, default=2.0**-8, help="default 2^-8")
    parser.add_argument("--head-scale", type=float, default=1.0, help="factor of the head; 0.01 makes flat logits")
    parser.add_argument("--count", action="store_true", help="only what Triton's kernels would multiply")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.png")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    hidden, weight, target = states(a.model, a.pairs, a.tokens, a.length)
    weight = a.head_scale * weight
    batch = finished(hidden.to(dtype), weight.to(dtype), target, torch.Generator().manual_seed(0))
    facts = provenance(
        "cpu", model=a.model.name, pairs=a.pairs.name, shape=f"{target.numel()} x {weight.shape[1]} x {len(weight)}",
        length=a.length, dtype=a.dtype, tolerance=a.tolerance, rounds=a.rounds, head_scale=a.head_scale,
    )  # fmt: skip
    if a.count:
        a.out.mkdir(parents=True, exist_ok=True)
        table = counted(batch, tuple(a.losses), a.tolerance)
        save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table})
        return
    table = race(batch, tuple(a.losses), a.tolerance, a.rounds)
    units = sweep(batch, tuple(a.losses))
    a.out.mkdir(parents=True, exist_ok=True)
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table, "units": units})
    draw(units, a.out / "results.png")


if __name__ == "__main__":
    main()
