"""Does skipping change what is learnt? `python -m benchmarks.trained --model MODEL --pairs PAIRS --out DIR`.

MODEL and PAIRS are those of `benchmarks.skipping`. The model's last layers, its final norm and a copy of its head are
trained, in float32, without a tolerance and with some, on pairs in the same order; then without one in other orders.
The spread of these is the noise that a tolerance is held against. What the layers below give is computed once. The
table has held-out pairs whose chosen response has the higher reward, how far weights end from those of the first run
(over how far that one went), and the share left out; the picture has the losses.

Each run is written to --keep as it ends, so a command that was interrupted goes on with the next.

Dimensions: P pairs of a batch, T tokens of the longest response with its prompt, H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.skipping import rows_of
from rgpb import Workspace, fused_loss, linear_logprob
from rgpb.arguments import argument, positive
from rgpb.bench.measure import provenance
from rgpb.bench.tables import free_table, save
from rgpb.train.models import load_pretrained, load_tokenizer

IGNORE = -100
BETA = 0.1
RUNS = (("none", 0), ("auto", 0), ("1e-2", 0), ("none", 1), ("none", 2))
TOLERANCES = {"none": None, "auto": "auto", "1e-2": 1e-2}


# A response behind its prompt: what the layers below make of all tokens but the last, [n − 1, H], and the tokens that
# follow these, IGNORE in the prompt, [n − 1]
Side = tuple[Tensor, Tensor]
Pair = tuple[Side, Side]


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

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]; padding is on the right, where no response sees it."""
        return self.body(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def parts(self) -> dict[str, Tensor]:
        """The trained weights, each part flat."""
        layers = [p.detach().reshape(-1) for p in self.body.parameters() if p.requires_grad]
        return {"head": self.head.detach().reshape(-1).clone(), "layers": torch.cat(layers)}


@torch.no_grad()
def states(lm: Any, tokenizer: Any, a: argparse.Namespace) -> list[Pair]:
    """The pairs whose prompt isn't too long, responses cut; hidden states in bfloat16."""
    bottom = copy.copy(lm.model)
    bottom._modules = {**lm.model._modules, "layers": lm.model.layers[: -a.layers], "norm": nn.Identity()}
    bottom.config = copy.deepcopy(lm.config)
    bottom.config.num_hidden_layers -= a.layers
    made: list[Pair] = []
    for row in rows_of(a.pairs):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [tokenizer(row[side])["input_ids"][: a.response] for side in ("chosen", "rejected")]
        if not prompt or len(prompt) > a.prompt or not all(sides) or sides[0] == sides[1]:
            continue
        pair = []
        for response in sides:
            ids = torch.tensor([prompt + response])
            hidden = bottom(ids, use_cache=False).last_hidden_state[0, :-1]
            target = ids[0, 1:].clone()
            target[: len(prompt) - 1] = IGNORE
            pair.append((hidden.bfloat16(), target))
        made.append((pair[0], pair[1]))
        print(f"\r{len(made)} pairs", end="", flush=True)
    print()
    return made


def batch_of(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """(hidden [2P, T, H], target [2P, T]), the chosen first."""
    sides = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    pad = nn.utils.rnn.pad_sequence
    hidden = pad([hidden.float() for hidden, _ in sides], batch_first=True)
    return hidden, pad([target for _, target in sides], batch_first=True, padding_value=IGNORE)


@torch.no_grad()
def scored(top: Top, pairs: list[Pair], workspace: Workspace, size: int = 16) -> Tensor:
    """Σ log p of the responses, [pairs, 2]."""
    sums = []
    for start in range(0, len(pairs), size):
        hidden, target = batch_of(pairs[start : start + size])
        logp = linear_logprob(top(hidden), top.head, target, workspace=workspace).logp
        sums.append(logp.double().sum(1).view(2, -1).T)
    return torch.cat(sums)


def order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of an endless shuffle."""
    generator = torch.Generator().manual_seed(seed)
    every = (i for _ in itertools.count() for i in torch.randperm(count, generator=generator).tolist())
    while True:
        yield list(itertools.islice(every, size))


def trained(
    top: Top, pairs: list[Pair], ref: Tensor, tolerance: str, seed: int, a: argparse.Namespace
) -> dict[str, Any]:
    """Train; the loss, the batch's reward accuracy and the share left out of each step."""
    workspace = Workspace()
    optimizer = torch.optim.AdamW([p for p in top.parameters() if p.requires_grad], lr=a.lr, weight_decay=0.0)
    kept: dict[str, list[float]] = {"loss": [], "accuracy": [], "share": [], "seconds": []}
    for step, chosen in enumerate(itertools.islice(order(len(pairs), a.batch, seed), a.steps)):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = a.lr * min(1.0, (step + 1) / (0.1 * a.steps))
        hidden, target = batch_of([pairs[i] for i in chosen])
        loss, metrics = fused_loss(
            top(hidden), top.head, target, objective=a.loss, ref=ref[chosen].T.reshape(-1), beta=BETA,
            grad_tolerance=TOLERANCES[tolerance], workspace=workspace, return_metrics=True,
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
        print(f"\r{a.loss}, {tolerance}, seed {seed}: {step + 1} of {a.steps}, {loss.item():.3f}", end="", flush=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.png")
    parser.add_argument("--keep", type=Path, default=Path("build/trained"), help="of hidden states and runs")
    parser.add_argument("--loss", choices=("dpo", "ipo", "simpo"), default="dpo")
    for name, default, text in (
        ("steps", 300, ""), ("batch", 4, "pairs; "), ("layers", 2, "that are trained; "),
        ("prompt", 64, "tokens; pairs with a longer one are left out; "), ("response", 48, "tokens; cut there; "),
        ("held", 220, "pairs held out; "), ("threads", 1, ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help=f"{text}default %(default)s")
    parser.add_argument("--lr", type=float, default=2e-5, help="of AdamW, after a tenth of the steps")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    told = {name: str(value) for name, value in vars(a).items() if name not in ("out", "keep", "threads")}
    a.keep.mkdir(parents=True, exist_ok=True)
    note = a.keep / "settings.json"
    if note.exists() and json.loads(note.read_text()) != told:
        raise SystemExit(f"keep: expected a new folder, or one of the same settings, got {a.keep}")
    note.write_text(json.dumps(told))
    lm = load_pretrained(a.model, torch.float32)
    if not (a.keep / "states.pt").exists():
        torch.save(states(lm, load_tokenizer(a.model), a), a.keep / "states.tmp")
        (a.keep / "states.tmp").rename(a.keep / "states.pt")
    every = torch.load(a.keep / "states.pt")
    held, pairs = every[: a.held], every[a.held :]
    start = Top(lm, a.layers)
    if not (a.keep / "ref.pt").exists():
        torch.save(scored(start, every, Workspace()), a.keep / "ref.pt")
    ref = torch.load(a.keep / "ref.pt")
    before = start.parts()
    for tolerance, seed in RUNS:
        place = a.keep / f"{tolerance}-{seed}.pt"
        if not place.exists():
            top = copy.deepcopy(start)
            kept = trained(top, pairs, ref[a.held :], tolerance, seed, a)
            made = {"kept": kept, "held": scored(top, held, Workspace()) - ref[: a.held], "weights": top.parts()}
            torch.save(made, place.with_suffix(".tmp"))
            place.with_suffix(".tmp").rename(place)
        report(a, before, len(pairs))


def report(a: argparse.Namespace, before: dict[str, Tensor], pairs: int) -> None:
    """Table and picture of the runs that are there."""
    table, curves = [], {}
    first: dict[str, Any] = torch.load(a.keep / f"{RUNS[0][0]}-{RUNS[0][1]}.pt")
    for name in RUNS:
        place = a.keep / f"{name[0]}-{name[1]}.pt"
        if place.exists():
            made = torch.load(place)
            distance = None if name == RUNS[0] else off(first["weights"], made["weights"], before)
            table.append(line(name, made["kept"], made["held"], first["held"], distance))
            curves[f"{name[0]}, seed {name[1]}"] = [round(loss, 5) for loss in made["kept"]["loss"]]
    print("\n".join(free_table(table)), flush=True)
    settings = {
        name: getattr(a, name) for name in ("loss", "steps", "batch", "layers", "prompt", "response", "held", "lr")
    }
    facts = provenance("cpu", model=a.model.name, pairs=a.pairs.name, trained_on=pairs, beta=BETA, **settings)
    a.out.mkdir(parents=True, exist_ok=True)
    points = [{"name": name, "loss": loss} for name, loss in curves.items()]
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table, "curves": points})
    draw(curves, a.out / "results.png")


if __name__ == "__main__":
    main()
