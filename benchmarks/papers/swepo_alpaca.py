"""SWEPO, DPO and InfoNCA on AlpacaEval's groups: six models' answers to an instruction with rewards of a judge.

    450 groups ──a small Llama that has read them──▶ DPO | InfoNCA | SWEPO ──▶ order of held-out answers by Δ

A model of this size can't be asked for answers, so what is measured is the implicit reward: in how many pairs of
answers of a held-out group the one with the higher reward has the higher Δ = log π / π_ref.

Dimensions: G groups, K = 6 answers of a group.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from rgpb.data import train_tokenizer

from .answers import say
from .claim import Claim, Finding, decide, differences, every, need, spread, write
from .models import Batch, clone, padded, scores, tiny_llama, train
from .swepo_weighting import METHODS

CLAIMS = (
    Claim(
        "swepo_alpaca",
        "SWEPO",
        "Table 1",
        "SWEPO weighted by deviation (p = 1, p = 2) learns real preferences better than DPO on the best response and a "
        "random or the worst one, and than InfoNCA; here: orders held-out answers better.",
    ),
)
PROMPT, ANSWER, VOCAB = 32, 48, 1024  # tokens: the end of the prompt, the beginning of the answer
TRAIN, GROUPS = 450, 8  # groups to train on, and of one update
RATE = 1e-3
CONTESTANTS = ("DPO, best and random", "DPO, best and worst", "InfoNCA", "SWEPO, p = 0", "SWEPO, p = 1", "SWEPO, p = 2")


class Data(NamedTuple):
    """Tokens [prompt, answer] of each answer of each group, and rewards 0 to 10, [G, K]."""

    answers: list[list[tuple[list[int], list[int]]]]
    rewards: Tensor
    pad: int


def load(path: Path, quick: bool = False) -> Data:
    """The groups of a file of JSON lines; the tokenizer is learnt on the training groups' text."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: 24 if quick else None]
    seen = rows[: min(TRAIN, len(rows) // 2 if quick else TRAIN)]
    tokenizer = train_tokenizer([text for row in seen for text in (row["prompt"], *row["completions"])], VOCAB)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    prompts = [[tokenizer.eos_token_id, *prompt[-PROMPT:]] for prompt in ids([row["prompt"] for row in rows])]
    answers = [
        [(prompt, [*answer, tokenizer.eos_token_id][:ANSWER]) for answer in ids(row["completions"])]
        for prompt, row in zip(prompts, rows)
    ]
    return Data(answers, 10 * torch.tensor([row["rewards"] for row in rows]), tokenizer.pad_token_id)


def batches_of(data: Data, which: Tensor, picks: Tensor | None) -> list[Batch]:
    """Batches of 8 groups in the order of `which`; with `picks` [G, 2], their pairs [chosen; rejected] instead."""
    batches = []
    for some in which.split(GROUPS):
        if picks is None:
            batch = padded([answer for g in some.tolist() for answer in data.answers[g]], pad=data.pad)
            batch["rewards"] = data.rewards[some]
        else:
            batch = padded([data.answers[g][picks[g, side]] for side in (0, 1) for g in some.tolist()], pad=data.pad)
        batches.append(batch)
    return batches


def summed(model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """log π of every answer, float64 [G, K]."""
    return torch.cat([scores(model, batch).logp.double().sum(1).view(len(batch["rewards"]), -1) for batch in batches])


def order_accuracy(delta: Tensor, rewards: Tensor) -> float:
    """In what part of the pairs of a group with different rewards Δ has the same order. [G, K], [G, K]."""
    better = rewards[:, :, None] > rewards[:, None, :]
    return float((delta[:, :, None] > delta[:, None, :])[better].double().mean())


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Pretrain, train with every method, order the held-out groups.

    Args: as `swepo_weighting.run`; `data` needs "alpaca_eval".
    """
    path = need(data, "alpaca_eval")
    groups = load(path, quick)
    train_on = min(TRAIN, len(groups.answers) // 2) if quick else TRAIN
    test = batches_of(groups, torch.arange(train_on, len(groups.answers)), None)
    held_out = torch.cat([batch["rewards"] for batch in test])
    accuracy: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        say(progress, f"swepo_alpaca: seed {seed + 1}/{seeds}, pretraining")
        order = torch.randperm(train_on, generator=draw)
        flat = [groups.answers[g][k] for k in torch.randperm(6, generator=draw).tolist() for g in order.tolist()]
        reading = [padded(flat[i : i + 16], pad=groups.pad) for i in range(0, len(flat), 16)]
        start = tiny_llama(VOCAB, seed, hidden=16 if quick else 64, layers=1 if quick else 2)
        train(start, reading, "mle", lr=3e-3, steps=3 if quick else len(reading), schedule="cosine")
        reference = summed(start, test)
        for name in CONTESTANTS:
            say(progress, f"swepo_alpaca: seed {seed + 1}/{seeds}, {name}")
            method, model = METHODS[name], clone(start)
            picks, options = None, dict(method.options)
            if method.pick is not None:
                columns = torch.arange(groups.rewards.shape[1]).expand_as(groups.rewards)
                picks = method.pick(columns, groups.rewards, torch.Generator().manual_seed(seed))
            else:
                options["group_size"] = groups.rewards.shape[1]
            its = batches_of(groups, order, picks)
            train(model, its, method.objective, ref_model=start, lr=RATE, steps=len(its), schedule="cosine", **options)
            accuracy[name].append(order_accuracy(summed(model, test) - reference, held_out))
    say(progress, "")
    gaps = {f"{a} less {b}": differences(accuracy[a], accuracy[b]) for a in CONTESTANTS[4:] for b in CONTESTANTS[:3]}
    number = "Accuracy of the order. " + "; ".join(f"{k}: {spread(v, sign=True)}" for k, v in gaps.items()) + "."
    rows = [["method", "accuracy of the order", *(f"seed {i + 1}" for i in range(seeds))]]
    rows += [[name, spread(values), *(f"{x:.3f}" for x in values)] for name, values in accuracy.items()]
    settings = {
        "data": f"{path.name}: {train_on} groups to train on, {len(held_out)} held out, rewards times 10",
        "tokens": f"the prompt's last {PROMPT}, the answer's first {ANSWER}, vocabulary {VOCAB}",
        "model": "Llama, 2 layers, width 64; has read all training answers once",
        "updates": f"one epoch of {GROUPS} groups each, learning rate {RATE:g} for all, down to a tenth (cosine)",
        "beta": 0.1,
        "alpha": 1.0,
        "tau": 1.0,
        "seeds": seeds,
    }
    finding = Finding(CLAIMS[0], every([decide(gap) for gap in gaps.values()]), number, rows, settings)
    write(finding, out, _figure(accuracy))
    return [finding]


def _figure(accuracy: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, values in enumerate(accuracy.values()):
        axes.scatter(values, [number] * len(values), color=f"C{number}")
        axes.scatter([sum(values) / len(values)], [number], color=f"C{number}", marker="|", s=300)
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set(xlabel="held-out pairs ordered as by the judge; bar: mean", yticks=range(len(accuracy)))
    axes.set_yticklabels(list(accuracy))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return figure
