"""Worked sums for the BNF scripts: pairs that differ in one digit, and a model that often drops the carry."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.demo import arithmetic_pairs

from .models import END, IGNORE, OPTIMISER, Batch, Response, chosen_only, padded, pair_batches, tiny_llama, train

LETTERS = "0123456789+=,"  # token ids 2, 3, …
VOCAB, HIDDEN, LAYERS = 2 + len(LETTERS), 64, 2
READ, PAIRS, HELD_OUT = (
    3200,
    1280,
    300,
)  # sums to learn from with mistakes, to compare, and for validation and test each
WRONG = 0.6  # part of the answers read that have the mistake
PRETRAINING = {"steps": 400, "lr": 4e-3, "batch": 64}

Pair = tuple[Response, Response]


class Sums(NamedTuple):
    """Pairs (right answer, answer with a wrong carry), and batches of `HELD_OUT` pairs each."""

    pairs: list[Pair]
    valid: Batch
    test: Batch


def ids(text: str) -> list[int]:
    """Token ids of a text of digits and signs."""
    return [2 + LETTERS.index(letter) for letter in text]


def _pairs(rows: Sequence[dict[str, str]]) -> list[Pair]:
    def answer(row: dict[str, str], which: str) -> Response:
        return ids(row["prompt"]), [*ids(row[which]), END]

    return [(answer(row, "chosen"), answer(row, "rejected")) for row in rows]


@cache
def load(seed: int, quick: bool = False) -> tuple[Sums, PreTrainedModel]:
    """Sums and the model to start from, which has read answers with mistakes. To be copied, not trained."""
    read, count, held_out = (16, 8, 8) if quick else (READ, PAIRS, HELD_OUT)
    pairs = _pairs(arithmetic_pairs(read + 2 * held_out, seed))  # `read` are the sums of the comparison, too
    (valid,) = pair_batches(pairs[:held_out], held_out, 0)
    (test,) = pair_batches(pairs[held_out : 2 * held_out], held_out, 0)
    rest = pairs[2 * held_out :]
    coin = random.Random(seed)
    answers = [pair[coin.random() < WRONG] for pair in rest]
    size = int(PRETRAINING["batch"])
    model = tiny_llama(VOCAB, seed, hidden=16 if quick else HIDDEN, layers=1 if quick else LAYERS)
    batches = [padded(answers[at : at + size]) for at in range(0, len(answers), size)]
    steps = 2 if quick else int(PRETRAINING["steps"])
    train(model, batches, "mle", lr=PRETRAINING["lr"], steps=steps, schedule="cosine")
    return Sums(rest[:count], valid, test), model


@torch.no_grad()
def right(model: PreTrainedModel, batch: Batch) -> float:
    """Part of the prompts whose greedy answer is the chosen one.

    Greedy decoding gives a text exactly where each of its tokens is the most likely one after those before it.
    """
    chosen = chosen_only(batch)
    hidden = hf.hidden_states(model.eval(), chosen["input_ids"], chosen["attention_mask"])
    best, target = (hidden @ hf.read_head(model).weight.T).argmax(-1), hf.aligned_targets(chosen["labels"])
    return ((best == target) | (target == IGNORE)).all(1).double().mean().item()


def described(sums: Sums) -> dict[str, Any]:
    """Settings of data and start, for a finding."""
    return {
        "data": "generated sums of two numbers, worked out; the rejected answer has a wrong carry, so that the two "
        "differ in one digit of the working and one of the result",
        "pairs": {"train": len(sums.pairs), "validation": HELD_OUT, "test": HELD_OUT},
        "model": f"Llama, random weights, {LAYERS} layers, width {HIDDEN}, 4 heads; one token per letter",
        "optimiser": OPTIMISER,
        "start": f"MLE on {READ} answers, {WRONG:.0%} with the mistake, {PRETRAINING}, cosine",
    }
