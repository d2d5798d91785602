"""HH-RLHF for a small model: tokens, and a model that has read dialogues before any preference is shown to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rgpb.data import read_preferences, texts_of, train_tokenizer

from .models import OPTIMISER, Batch, Response, best_rate, padded, pair_batches, tiny_llama, train

PROMPT, REPLY = 32, 48  # tokens: the end of the prompt, the beginning of the reply
READ, VALID = 800, 100  # dialogues to read before; pairs to choose a learning rate on
VOCAB, HIDDEN, LAYERS = 1024, 64, 2
BATCH, RATES = 16, (1e-4, 3e-4, 1e-3)
PRETRAINING = {"steps": 250, "lr": 3e-3, "batch": 16}

Pair = tuple[Response, Response]


class Dialogues(NamedTuple):
    """Token ids of HH-RLHF.

    Attributes:
        read: texts to pretrain on, prompt and either reply.
        train, valid, test: pairs (chosen, rejected), of other dialogues; all prompts have `PROMPT` tokens.
        pad, end: token ids.
    """

    read: list[Response]
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    pad: int
    end: int


@cache
def load(folder: Path, quick: bool = False) -> Dialogues:
    """HH-RLHF from a folder with train.jsonl.gz and test.jsonl.gz; `quick` for a few dialogues.

    The tokenizer is learnt on the training file.
    """
    training, testing = (read_preferences(folder / f"{part}.jsonl.gz") for part in ("train", "test"))
    tokenizer = train_tokenizer(texts_of(training), VOCAB)
    end = tokenizer.eos_token_id

    def ids(texts: Sequence[Any]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def pairs(rows: Sequence[Any]) -> list[Pair]:
        prompts = ids([row.prompt for row in rows])
        replies = [[[*reply, end][:REPLY] for reply in ids([row.completions[i] for row in rows])] for i in (0, 1)]
        together = zip(prompts, *replies)
        return [((p[-PROMPT:], w), (p[-PROMPT:], l)) for p, w, l in together if len(p) >= PROMPT]

    read, valid = (32, 8) if quick else (READ, VALID)
    rows = training.rows[:64] if quick else training.rows
    texts: list[Response] = [([end], [*p, *c]) for pair in pairs(rows[:read]) for p, c in pair]
    seen = pairs(rows[read:])
    return Dialogues(
        texts, seen[valid:], seen[:valid], pairs(testing.rows[: 8 if quick else None]), tokenizer.pad_token_id, end
    )


@cache
def start(folder: Path, seed: int, quick: bool = False, progress: bool = False) -> PreTrainedModel:
    """A Llama with random weights that then read `Dialogues.read`. To be copied, not trained."""
    data = load(folder, quick)
    model = tiny_llama(VOCAB, seed, hidden=16 if quick else HIDDEN, layers=1 if quick else LAYERS)
    size = int(PRETRAINING["batch"])
    batches = [padded(data.read[at : at + size], pad=data.pad) for at in range(0, len(data.read), size)]
    steps = 3 if quick else int(PRETRAINING["steps"])
    label = f"reading dialogues, seed {seed}" if progress else None
    train(model, batches, "mle", lr=PRETRAINING["lr"], steps=steps, schedule="cosine", progress=label)
    return model


class Prepared(NamedTuple):
    """What the scripts on HH-RLHF share, so that their results can be compared.

    Attributes:
        texts: the data.
        starts: a model per seed, to be copied.
        batches: of training pairs, per seed.
        test: a batch of held-out pairs.
        steps: one epoch.
        lr: the learning rate of all methods.
        settings: all that, in words.
    """

    texts: Dialogues
    starts: list[PreTrainedModel]
    batches: list[list[Batch]]
    test: Batch
    steps: int
    lr: float
    settings: dict[str, Any]


@cache
def prepare(folder: Path, seeds: int, quick: bool = False, progress: bool = False) -> Prepared:
    """Data, starts, and the learning rate: one for all methods, the one at which MLE does best on validation pairs.

    Args:
        folder: of HH-RLHF.
        seeds: how many; they draw the weights of the start and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    texts = load(folder, quick)
    starts = [start(folder, seed, quick, progress) for seed in range(seeds)]
    batches = [pair_batches(texts.train, BATCH, seed, pad=texts.pad) for seed in range(seeds)]
    (valid,), (test,) = (pair_batches(pairs, len(pairs), 0, pad=texts.pad) for pairs in (texts.valid, texts.test))
    steps = 2 if quick else len(batches[0])
    lr = best_rate(starts, batches, valid, RATES[:1] if quick else RATES, steps)
    settings = {
        **described(texts), "seeds": seeds, "batch": f"{BATCH} pairs", "steps": steps, "learning rate": lr,
        "rule for the learning rate": f"one for all: of {RATES}, that with MLE's lowest validation perplexity",
        "reference": "the start",
    }  # fmt: skip
    return Prepared(texts, starts, batches, test, steps, lr, settings)


def described(data: Dialogues) -> dict[str, Any]:
    """Settings of data and start, for a finding."""
    return {
        "data": "HH-RLHF, train.jsonl.gz and test.jsonl.gz",
        "tokens": f"byte-pair, {VOCAB}; last {PROMPT} of the prompt, first {REPLY} of the reply",
        "pairs": {"train": len(data.train), "validation": len(data.valid), "test": len(data.test)},
        "model": f"Llama, random weights, {LAYERS} layers, width {HIDDEN}, 4 heads",
        "optimiser": OPTIMISER,
        "start": f"MLE on {len(data.read)} other texts (prompt and either reply), {PRETRAINING}, cosine",
    }
