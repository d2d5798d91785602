"""Does skipping change what is learnt? `python -m benchmarks.trained --model MODEL --pairs PAIRS --out DIR`.

MODEL and PAIRS are those of `benchmarks.skipping`. The model's last layers, its final norm and a copy of its head are
trained, in float32, without a tolerance and with some, on pairs in the same order; then without one in other orders.
The spread of these is the noise that a tolerance is held against. What the layers below give is computed once. The
table has held-out pairs whose chosen response has the higher reward, and the share left out. It says how far weights,
and log-likelihoods of held-out responses, end from those of the first run, over how far that one went. The picture has
the losses.

Each run is written to --keep as it ends, so a command that was interrupted goes on with the next.

A pair is one sequence: prompt, chosen, rejected response, each without its last token. The rejected one doesn't see the
chosen one, and stands at the same positions. A batch is all its pairs end to end.

Dimensions: P pairs of a batch, n tokens of a pair, M of a batch, N of them predict one of a response, H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.skipping import rows_of
from rgpb import Workspace, fused_loss, linear_logprob
from rgpb.arguments import argument, positive
from rgpb.bench.measure import provenance
from rgpb.bench.tables import free_table, save
from rgpb.train.files import save_whole_file
from rgpb.train.models import load_pretrained, load_tokenizer

BETA = 0.1
RUNS = (("none", 0), ("1e-2", 0), ("none", 1), ("auto", 0), ("none", 2))
TOLERANCES = {"none": None, "auto": "auto", "1e-2": 1e-2}


class Pair(NamedTuple):
    """The tokens of a pair's three parts."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def ids(self) -> Tensor:
        """Of its sequence, [n]."""
        return torch.tensor(self.prompt + self.chosen[:-1] + self.rejected[:-1])

    def parts(self) -> Tensor:
        """0, 1 or 2 in prompt, chosen and rejected, [n]."""
        return torch.repeat_interleave(torch.tensor([len(self.prompt), len(self.chosen) - 1, len(self.rejected) - 1]))

    def positions(self) -> Tensor:
        """[n]"""
        sizes = [len(self.prompt)] + [len(self.prompt) + len(side) - 1 for side in (self.chosen, self.rejected)]
        ranges = [torch.arange(size) for size in sizes]
        return torch.cat([ranges[0], ranges[1][sizes[0] :], ranges[2][sizes[0] :]])


class Layout(NamedTuple):
    """How pairs lie in a batch.

    positions: [1, M]. mask: which token sees which, bool [1, 1, M, M]. rows: what predicts each token of the responses,
    the chosen ones first, int64 [N]. target: these tokens, [N]. cu_seqlens: where each response begins, [2P + 1].
    """

    positions: Tensor
    mask: Tensor
    rows: Tensor
    target: Tensor
    cu_seqlens: Tensor


def layout(pairs: Sequence[Pair]) -> Layout:
    """All pairs end to end."""
    blocks, rows = [], ([], [])  # type: tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]
    start = 0
    for pair in pairs:
        part, last = pair.parts(), len(pair.prompt) - 1
        blocks.append(((part[:, None] == part) | (part == 0)).tril())
        for side, number in zip(rows, (1, 2)):
            inside = (part == number).nonzero()[:, 0]
            side.append(start + torch.cat([torch.tensor([last]), inside]))
        start += len(part)
    chosen, rejected = rows
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return Layout(
        torch.cat([pair.positions() for pair in pairs])[None],
        torch.block_diag(*(block.float() for block in blocks)).bool()[None, None],
        torch.cat(chosen + rejected),
        torch.tensor([token for side in sides for token in side]),
        nn.functional.pad(torch.tensor([len(side) for side in sides]).cumsum(0), (1, 0)),
    )


class Top(nn.Module):
    """The layers that are trained, with the final norm and the head."""

    def __init__(self, lm: Any, layers: int) -> None:
        super().__init__()
        config = copy.deepcopy(lm.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, None  # no embedding is read
        self.body = type(lm.model)(config)
        self.body.layers.load_state_dict(lm.model.layers[-layers:].state_dict())
        self.body.norm.load_state_dict(lm.model.norm.state_dict())
        self.body.embed_tokens.requires_grad_(False)
        self.head = nn.Parameter(lm.get_output_embeddings().weight.detach().clone())

    def forward(self, hidden: Tensor, its: Layout) -> Tensor:
        """[1, M, H] → what predicts the responses' tokens, [N, H]."""
        body = self.body(inputs_embeds=hidden, attention_mask=its.mask, position_ids=its.positions, use_cache=False)
        return body.last_hidden_state[0, its.rows]

    def parts(self) -> dict[str, Tensor]:
        """The trained weights, each part flat."""
        layers = [p.detach().reshape(-1) for p in self.body.parameters() if p.requires_grad]
        return {"head": self.head.detach().reshape(-1).clone(), "layers": torch.cat(layers)}


def read(tokenizer: Any, a: argparse.Namespace) -> list[Pair]:
    """The pairs whose prompt isn't too long, responses cut."""
    made = []
    for row in rows_of(a.pairs):
        prompt, *sides = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
        chosen, rejected = (side[: a.response] for side in sides)
        if prompt and len(prompt) <= a.prompt and chosen and rejected and chosen != rejected:
            made.append(Pair(prompt, chosen, rejected))
    return made


@torch.no_grad()
def states(lm: Any, pairs: list[Pair], layers: int, size: int = 8) -> list[Tensor]:
    """What the layers below make of each pair's sequence, bfloat16 [n, H]."""
    bottom = copy.copy(lm.model)
    bottom._modules = {**lm.model._modules, "layers": lm.model.layers[:-layers], "norm": nn.Identity()}
    bottom.config = copy.deepcopy(lm.config)
    bottom.config.num_hidden_layers -= layers
    made: list[Tensor] = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        its, ids = layout(some), [pair.ids() for pair in some]
        how = {"attention_mask": its.mask, "position_ids": its.positions, "use_cache": False}
        hidden = bottom(torch.cat(ids)[None], **how).last_hidden_state[0]
        made += [part.bfloat16().clone() for part in hidden.split([len(x) for x in ids])]
        print(f"\r{len(made)} of {len(pairs)} pairs", end="", flush=True)
    print()
    return made


def hidden_of(states: list[Tensor]) -> Tensor:
    """[1, M, H] float32."""
    return torch.cat(states).float()[None]


@torch.no_grad()
def scored(top: Top, pairs: list[Pair], states: list[Tensor], size: int = 16) -> Tensor:
    """Σ log p of the responses, [pairs, 2]."""
    sums, workspace = [], Workspace()
    for start in range(0, len(pairs), size):
        here = slice(start, start + size)
        its = layout(pairs[here])
        logp = linear_logprob(top(hidden_of(states[here]), its), top.head, its.target, workspace=workspace).logp
        of = torch.repeat_interleave(its.cu_seqlens.diff())
        sums.append(torch.zeros(len(its.cu_seqlens) - 1).double().index_add(0, of, logp.double()).view(2, -1).T)
    return torch.cat(sums)


def order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of an endless shuffle."""
    generator = torch.Generator().manual_seed(seed)
    every = (i for _ in itertools.count() for i in torch.randperm(count, generator=generator).tolist())
    while True:
        yield list(itertools.islice(every, size))


def trained(
    top: Top, pairs: list[Pair], states: list[Tensor], ref: Tensor, tolerance: str, seed: int, a: argparse.Namespace
) -> dict[str, Any]:
    """Train; the loss, the batch's reward accuracy and the share left out of each step."""
    workspace = Workspace()
    optimizer = torch.optim.AdamW([p for p in top.parameters() if p.requires_grad], lr=a.lr, weight_decay=0.0)
    kept: dict[str, list[float]] = {"loss": [], "accuracy": [], "share": [], "seconds": []}
    for step, chosen in enumerate(itertools.islice(order(len(pairs), a.batch, seed), a.steps)):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = a.lr * min(1.0, (step + 1) / (0.1 * a.steps))
        its, hidden = layout([pairs[i] for i in chosen]), hidden_of([states[i] for i in chosen])
        loss, metrics = fused_loss(
            top(hidden, its), top.head, its.target, cu_seqlens=its.cu_seqlens, objective="dpo", beta=BETA,
            ref=ref[chosen].T.reshape(-1), grad_tolerance=TOLERANCES[tolerance], workspace=workspace,
            return_metrics=True,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept["loss"].append(loss.item())
        kept["accuracy"].append(metrics["rewards/accuracies"].item())
        kept["share"].append(metrics["skipped/share"].item() if "skipped/share" in metrics else 0.0)
        kept["seconds"].append(round(time.perf_counter() - began, 3))
        if not math.isfinite(kept["loss"][-1]):
            raise ValueError(f"lr: expected a loss that stays finite, got {kept['loss'][-1]} at step {step + 1}")
        print(f"\r{tolerance}, seed {seed}: {step + 1} of {a.steps}, {loss.item():.3f}", end="", flush=True)
    print()
    return kept


def right(ratio: Tensor) -> Tensor:
    """Whether a pair's chosen response has the higher reward; a tie counts half. [pairs, 2] → [pairs]"""
    return (1 + torch.sign(ratio[:, 0] - ratio[:, 1])) / 2


def off(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """‖a − b‖ / ‖a − start‖ of each part."""
    return {name: ((a[name] - b[name]).norm() / (a[name] - start[name]).norm()).item() for name in start}


def line(name: tuple[str, int], kept: dict[str, Any], scores: Tensor, first: Tensor, distance: Any) -> dict[str, Any]:
    """A run's row of the table."""
    correct, count, tenth = right(scores), len(scores), max(1, len(kept["loss"]) // 10)
    return {
        "tolerance": name[0],
        "seed": name[1],
        "loss, last tenth": round(sum(kept["loss"][-tenth:]) / tenth, 4),
        "held-out accuracy": round(correct.mean().item(), 4),
        "standard error": round((correct.std() / math.sqrt(count)).item(), 4),
        "margin": round(BETA * (scores[:, 0] - scores[:, 1]).mean().item(), 4),
        "verdicts changed": int((correct != right(first)).sum()),
        "head off": None if distance is None else round(distance["head"], 4),
        "layers off": None if distance is None else round(distance["layers"], 4),
        "scores off": None if distance is None else round(((scores - first).norm() / first.norm()).item(), 4),
        "left out": round(sum(kept["share"]) / len(kept["share"]), 3),
    }


def draw(curves: dict[str, list[float]], path: Path, window: int = 20) -> None:
    """Losses, as means over the last steps; and how far those of the first seed lie from the first run's."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, apart = figure.subplots(1, 2)
    means = {name: torch.tensor(loss).unfold(0, min(window, len(loss)), 1).mean(1) for name, loss in curves.items()}
    first, *others = means
    for name, loss in means.items():
        left.plot(range(window, window + len(loss)), loss, lw=1.3, ls="-" if "seed 0" in name else ":", label=name)
    for at, name in enumerate(others, 1):
        gap = (means[name] - means[first]).abs().clamp_min(1e-7)
        apart.plot(range(window, window + len(gap)), gap, lw=1.3, ls="-" if "seed 0" in name else ":", color=f"C{at}")
    left.set_ylabel(f"loss, mean of {window} steps")
    apart.set_ylabel("distance from the loss without a tolerance, seed 0")
    apart.set_yscale("log")
    for axes in (left, apart):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.png")
    parser.add_argument("--keep", type=Path, default=Path("build/trained"), help="of hidden states and runs")
    for name, default, text in (
        ("steps", 300, ""), ("batch", 4, "pairs; "), ("layers", 2, "that are trained; "),
        ("prompt", 64, "tokens; pairs with a longer one are left out; "), ("response", 32, "tokens; cut there; "),
        ("held", 220, "pairs held out; "), ("threads", 1, ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help=f"{text}default %(default)s")
    parser.add_argument("--lr", type=float, default=5e-6, help="of AdamW, after a tenth of the steps")
    a = parser.parse_args(given)
    torch.set_num_threads(a.threads)
    told = {name: str(value) for name, value in vars(a).items() if name not in ("out", "keep", "threads")}
    a.keep.mkdir(parents=True, exist_ok=True)
    note = a.keep / "settings.json"
    if note.exists() and json.loads(note.read_text()) != told:
        raise SystemExit(f"keep: expected a new folder, or one of the same settings, got {a.keep}")
    note.write_text(json.dumps(told))
    lm, every = load_pretrained(a.model, torch.float32), read(load_tokenizer(a.model), a)
    below = made_once(a.keep / "states.pt", lambda: states(lm, every, a.layers))
    start = Top(lm, a.layers)
    ref = made_once(a.keep / "ref.pt", lambda: scored(start, every, below))
    held, rest = slice(0, a.held), slice(a.held, None)

    def run(tolerance: str, seed: int) -> dict[str, Any]:
        top = copy.deepcopy(start)
        kept = trained(top, every[rest], below[rest], ref[rest], tolerance, seed, a)
        return {"kept": kept, "held": scored(top, every[held], below[held]) - ref[held], "weights": top.parts()}

    for each in RUNS:
        made_once(place_of(a, each), partial(run, *each))
        report(a, start.parts(), len(every) - a.held)


def made_once(place: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made where it isn't there, all of it or nothing."""
    if not place.exists():
        made = make()
        save_whole_file(place, lambda path: torch.save(made, path))
    return torch.load(place, weights_only=True)


def place_of(a: argparse.Namespace, name: tuple[str, int]) -> Path:
    """Where a run is kept."""
    return a.keep / f"{name[0]}-{name[1]}.pt"


def report(a: argparse.Namespace, before: dict[str, Tensor], pairs: int) -> None:
    """Table and picture of the runs that are there."""
    table, curves = [], {}
    first: dict[str, Any] = torch.load(place_of(a, RUNS[0]), weights_only=True)
    for name in RUNS:
        if place_of(a, name).exists():
            made = torch.load(place_of(a, name), weights_only=True)
            distance = None if name == RUNS[0] else off(first["weights"], made["weights"], before)
            table.append(line(name, made["kept"], made["held"], first["held"], distance))
            curves[f"{name[0]}, seed {name[1]}"] = [round(loss, 5) for loss in made["kept"]["loss"]]
    print("\n".join(free_table(table)), flush=True)
    settings = {name: getattr(a, name) for name in ("steps", "batch", "layers", "prompt", "response", "held", "lr")}
    facts = provenance("cpu", model=a.model.name, pairs=a.pairs.name, trained_on=pairs, beta=BETA, **settings)
    a.out.mkdir(parents=True, exist_ok=True)
    points = [{"name": name, "loss": loss} for name, loss in curves.items()]
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table, "curves": points})
    draw(curves, a.out / "results.png")


if __name__ == "__main__":
    main()
