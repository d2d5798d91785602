"""`rgpb.analysis` on a real model, token by token: `python -m benchmarks.papers.tokens --model FILE --work DIR …`.

The model, the pairs and `--work` are those of `benchmarks.papers.real`. MLE, BNF, DPO and ExMATE are trained on the
same pairs at one learning rate; then four questions are answered, as tokens.json and three pictures:

* Which tokens of the preferred response lose likelihood, by their probability before and by their place?
* Where do the coefficients of each loss lie?
* How many tokens is the model sure of?
* What does BNF's printed formula make of those, in float32 and in bfloat16?

What was trained is kept in `--work`: repeated, the command only draws.
"""

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rgpb.analysis import coefficients, make_responses
from rgpb.bench.measure import provenance
from rgpb.layout import TokenScores
from rgpb.train.files import save_whole_file, write_text

# isort: off
from .models import LOG, Method
from .on_pairs import FOUR, MOVERS
from .real import TRIALS, World, drawn
from .report import RESULTS
from .upper import SCORES, Known, Upper, batch, likelihoods, round_, rows_of, score, train, whole

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TRAINED = ("MLE", "BNF", "DPO", "ExMATE")
RATE, SEEN = 3e-5, 80  # pairs of the training data to look at
LOSSES: dict[str, Method] = {
    "nll_pll": ("nll_pll", {}), "bnf": MOVERS["BNF"], "dpo": MOVERS["DPO"], "ipo": MOVERS["IPO"],
    "simpo": MOVERS["SimPO"], "exmate": FOUR["ExMATE"], "unlikelihood": FOUR["unlikelihood"],
    "kto": ("kto", {"beta": 0.1}),
}  # fmt: skip
BINS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99, 1.0)  # of a token's probability before
PLACES = (0, 1, 2, 4, 8, 16, 32, 64)
LEAST = 2.0**-24  # below this 1 − p, a float32 p is 1
LEAST16 = 2.0**-9  # likewise bfloat16
SURE = (1e-2, LEAST16, 1e-4, 1e-6, LEAST)
FLOORS = (1.0, 1e-2, LEAST16, 1e-4, 1e-6, LEAST, 0.0)  # bins of 1 − p
OFTEN = 8  # a word is told that stands there so often


@torch.no_grad()
def scored(upper: Upper, world: World, known: Sequence[Known]) -> TokenScores:
    """Scores of all completions, one after another."""
    parts = []
    for places in rows_of([its.unit for its in known]):
        some = [known[i] for i in places]
        its = batch(some, whole([one.unit for one in some]))
        parts.append(score(upper, world.head, its.hidden, its.row))
    return joined(parts)


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in SCORES))


def after(world: World, method: str, known: Mapping[str, Sequence[Known]]) -> dict[str, TokenScores]:
    """Scores of each part's completions after training, from `work` or put there."""
    path = world.work / "tokens" / f"{method}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        trial, upper = TRIALS[method], Upper(world.model, world.layers)
        upper.requires_grad_(True)
        make, steps = trial.feed(world.pairs["train"], 0)
        LOG.info("%s", method)
        objective, options = trial.method
        train(upper, world.head, make, objective, rate=RATE, steps=steps, **options)
        found = {name: scored(upper, world, its)._asdict() for name, its in known.items()}
        save_whole_file(path, partial(torch.save, found))
    return {name: TokenScores(**its) for name, its in torch.load(path, weights_only=True).items()}


class Tokens:
    """The tokens of a part's completions, one after another: ids, places in the completion, and which are of chosen."""

    def __init__(self, known: Sequence[Known]) -> None:
        completions = [(k, one) for its in known for k, one in enumerate(its.unit.completions)]
        self.ids = torch.tensor([token for _, one in completions for token in one])
        self.place = torch.tensor([at for _, one in completions for at in range(len(one))])
        self.chosen = torch.tensor([k == 0 for k, one in completions for _ in one])
        self.bounds = torch.tensor([0, *(len(one) for _, one in completions)]).cumsum(0)
        self.before = joined([its.ref for its in known])


def by(values: Tensor, of: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Mean and share below 0 of `values` where `of` is in each interval [low, high), the last closed."""
    rows = []
    for low, high in pairwise(edges):
        inside = values[(of >= low) & ((of < high) | (of == edges[-1]) & (high == edges[-1]))]
        row: dict[str, Any] = {"from": low, "to": high, "tokens": len(inside)}
        if len(inside):
            row |= {"mean": float(inside.mean()), "falling": float((inside < 0).double().mean())}
        rows.append(row)
    return rows


def words(ids: Tensor, moved: Tensor, tokenizer: Any, count: int = 10) -> list[list[Any]]:
    """The words whose log p fell most in the mean, of those that stand there `OFTEN` times: text, times, mean."""
    found = defaultdict(list)
    for token, x in zip(ids.tolist(), moved.tolist()):
        found[token].append(x)
    often = {token: sum(xs) / len(xs) for token, xs in found.items() if len(xs) >= OFTEN}
    return [
        [tokenizer.decode([token]), len(found[token]), round_(often[token])]
        for token in sorted(often, key=often.__getitem__)[:count]
    ]


def printed(policy: TokenScores, ref: TokenScores, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """BNF's coefficient of each token: as its formula is printed, (f − p) / (1 − p) in `dtype`; and by the odds."""
    p, q = policy.logp.to(dtype).exp(), ref.logp.to(dtype).exp()
    exact = (policy.log_odds.double() - ref.log_odds.double()).clamp(max=0).exp()
    return ((p / q).clamp(max=1) - p) / (1 - p), exact


def sure(policy: TokenScores, ref: TokenScores, bounds: Tensor) -> dict[str, Any]:
    """Of a part's tokens: shares with 1 − p below each of `SURE`, and what the printed formula does to them."""
    rest = torch.sigmoid(-policy.log_odds.double())
    shares = {f"{x:.2g}": (rest < x).double().mean().item() for x in SURE}
    found: dict[str, Any] = {"tokens": len(rest), "1 − p below": shares, "smallest 1 − p": rest.min().item()}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        wrong, exact = printed(policy, ref, dtype)
        lost, error = ~wrong.isfinite(), ((wrong.double() - exact) / exact).abs()
        rows = []
        for high, low in pairwise(FLOORS):
            inside = (rest <= high) & (rest > low)
            row = {"1 − p to": high, "tokens": int(inside.sum()), "not finite": int((lost & inside).sum())}
            known = error[inside & ~lost]
            rows.append({**row, "median error": known.median().item()} if len(known) else row)
        hit = torch.stack([part.any() for part in lost.split(bounds.diff().tolist())]).double().mean()
        found[name] = {"rows": rows, "responses without a finite gradient": hit.item()}
    return found


def draw_tokens(found: Mapping[str, Any], path: Path) -> None:
    """By probability before, by place, and the share that falls: of the tokens of the preferred responses."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, (method, its) in enumerate(found["tokens"].items()):
        seen = its["seen"]
        for axes, name in ((left, "by probability"), (middle, "by place")):
            axes.plot([row.get("mean") for row in seen[name]], "o-", ms=3, color=f"C{i}", label=method)
            labels = [f"{row['from']:g}–{row['to']:g}" for row in seen[name]]
            axes.set_xticks(range(len(labels)), labels, rotation=45, fontsize=7)
        shares = [its[part]["falling"] for part in ("seen", "held-out")]
        right.bar([i - 0.2, i + 0.2], shares, 0.38, color=[f"C{i}", "none"], edgecolor=f"C{i}")
    for axes, title, x in ((left, "by probability before", "p"), (middle, "by place in the response", "token")):
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(f"preferred, trained on: {title}", fontsize=9)
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel("mean change of log p", fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    right.set_xticks(range(len(found["tokens"])), list(found["tokens"]), fontsize=8)
    right.set_title("share of preferred tokens that lose likelihood\n(filled: trained on; empty: held out)", fontsize=9)
    right.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=90)


def draw_coefficients(policy: TokenScores, its: Tokens, path: Path) -> None:
    """A panel for each loss: every token's coefficient on its logit against its probability."""
    order = stacked(its)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), its.bounds.diff()[order].cumsum(0)])
    take = torch.cat([torch.arange(len(its.ids))[its.bounds[i] : its.bounds[i + 1]] for i in order])
    scores, ref = (TokenScores(*(getattr(one, name)[take] for name in SCORES)) for one in (policy, its.before))
    label = torch.arange(len(order)) < len(order) // 2
    responses = make_responses(scores, its.ids[take], ref=ref, label=label, cu_seqlens=bounds)
    chosen = its.chosen[take]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axes, (name, (objective, options)) in zip(figure.subplots(2, 4).flat, LOSSES.items()):
        got = coefficients(objective, responses, **options)
        for side, colour in ((chosen, "C2"), (~chosen, "C3")):
            axes.plot(got.probability[side], got.logit[side], ".", ms=1.5, alpha=0.35, color=colour)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("probability of the token", fontsize=9)
    figure.supylabel("−∂L/∂z: up (green: preferred), down (red: rejected)", fontsize=9)
    figure.savefig(path, dpi=90)


def stacked(its: Tokens) -> list[int]:
    """Completions in the order [chosen; rejected], of those that stand pair by pair."""
    count = len(its.bounds) - 1
    return [*range(0, count, 2), *range(1, count, 2)]


def draw_sure(parts: Mapping[str, TokenScores], path: Path) -> None:
    """What share of the tokens is surer than each 1 − p, and where p rounds to 1."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, scores in parts.items():
        rest = torch.sigmoid(-scores.log_odds.double()).sort().values
        axes.plot(rest, torch.arange(1, len(rest) + 1) / len(rest), drawstyle="steps-post", label=name)
    for name, x in (("float32", LEAST), ("bfloat16", LEAST16)):
        axes.axvline(x, color="black", lw=0.8, ls=":")
        axes.text(x, 1.0, f" {name}: p = 1", fontsize=8, va="top", rotation=90, ha="right")
    axes.set(xscale="log", yscale="log", xlabel="1 − p of the token", ylabel="share of tokens below")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what isn't there, count, and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.tokens", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name in ("model", "work", "hh-rlhf"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="of tokens.json; default: the project's"
    )
    parser.add_argument("--pictures", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    parser.add_argument("--quick", action="store_true", help="few texts, to see that everything runs")
    a = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    world = World(a.model, {"hh_rlhf": a.hh_rlhf}, a.work, a.quick)
    known = {
        "seen": drawn(world.pairs["train"], 0, "pairs")[:SEEN],
        "held-out": world.pairs["test"],
        "own": world.pairs["own"],
    }
    tokens = {name: Tokens(its) for name, its in known.items()}
    trained = {method: after(world, method, known) for method in TRAINED}
    found: dict[str, Any] = {"tokens": {}, "sure": {}, "rate": RATE}
    for method, scores in trained.items():
        part: dict[str, Any] = {}
        for name in ("seen", "held-out"):
            its = tokens[name]
            moved = (scores[name].logp.double() - its.before.logp.double())[its.chosen]
            p, place = its.before.logp.double().exp()[its.chosen], its.place[its.chosen]
            part[name] = {
                "tokens": len(moved), "falling": (moved < 0).double().mean().item(), "mean": moved.mean().item(),
                "by probability": by(moved, p, BINS), "by place": by(moved, place, PLACES),
                "words": words(its.ids[its.chosen], moved, world.tokenizer),
            }  # fmt: skip
        found["tokens"][method] = part
    start = {name: its.before for name, its in tokens.items()}
    for name, its in tokens.items():
        found["sure"][name] = {
            "start": sure(its.before, its.before, its.bounds),
            **{method: sure(trained[method][name], its.before, its.bounds) for method in ("BNF", "DPO")},
        }
    found["likelihoods"] = {name: sum(likelihoods(its)["logp"]) for name, its in known.items()}
    for folder in (a.out, a.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found, "provenance": provenance("cpu")}, ensure_ascii=False, allow_nan=False)
    write_text(a.out / "tokens.json", text + "\n")
    draw_tokens(found, a.pictures / "smollm2-tokens.png")
    draw_coefficients(trained["DPO"]["seen"], tokens["seen"], a.pictures / "smollm2-coefficients.png")
    names = {"seen": "replies of HH-RLHF", "own": "the model's own answers"}
    draw_sure({text: start[name] for name, text in names.items()}, a.pictures / "smollm2-sure.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
