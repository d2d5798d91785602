"""What the trials on pairs and groups start from: data, models that have read something, what is held out.

A world is made by a function of data sets (option → path), the number of seeds, and `quick`, which makes it too small
to learn anything. Seeds draw the weights of the start, generated data and the order of the pairs.
"""

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgpb.demo import arithmetic_pairs
from rgpb.train.rows import read_preferences
from rgpb.train.tokens import texts_of, train_tokenizer

from .models import END, LOG, PAD, Batch, Pair, Response, chosen_only, evaluate, padded, pair_batches, train
from .models import tiny_llama as llama
from .models import tiny_t5 as t5

Data = Mapping[str, Path]
OPTIONS = {"hh_rlhf": "--hh-rlhf", "alpaca_eval": "--alpaca-eval"}  # of the command, by key of `Data`
VOCAB, PROMPT, REPLY = 1024, 32, 48  # of text: byte pairs; tokens of the prompt's end and of the reply's beginning


def need(data: Data, key: str) -> Path:
    """The path of a data set; a `ValueError` that names the option where it isn't given, or isn't there."""
    if key not in data or not data[key].exists():
        raise ValueError(f"{OPTIONS[key]}: expected the path of this data set, got {data.get(key, 'none')}")
    return data[key]


@dataclass(eq=False)
class World:
    """What a trial is run in. Lists have one entry per seed, unless the trial makes it anew for each seed."""

    seeds: int
    quick: bool  # a few steps of a smaller model
    starts: list[PreTrainedModel] = field(default_factory=list)  # the reference, too; to be copied, not trained
    pairs: list[list[Pair]] = field(default_factory=list)  # to train on
    batches: list[list[Batch]] = field(default_factory=list)  # of them
    valid: list[Batch] = field(default_factory=list)  # held-out pairs
    test: list[Batch] = field(default_factory=list)
    seen: list[Batch] = field(default_factory=list)  # pairs of the training data to measure on
    steps: int = 0  # updates of a run
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)  # learning rates to try
    prompts: list[list[int]] = field(default_factory=list)  # held out, equally long
    pad: int = PAD
    end: int = END
    answers: list[list[Response]] = field(default_factory=list)  # of each group
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # 0 to 10, float32 [groups, answers]
    orders: list[Tensor] = field(default_factory=list)  # of the groups to train on; those after are held out

    @cached_property
    def rate(self) -> float:
        """The learning rate for all methods: the one at which `mle` ends with the lowest validation perplexity."""

        def final(rate: float) -> float:
            total = 0.0
            for start, its, valid in zip(self.starts, self.batches, self.valid):
                model = deepcopy(start)
                train(model, [chosen_only(batch) for batch in its], "mle", lr=rate, steps=self.steps)
                total += evaluate(model, valid)["log perplexity"]
            return total

        return min(self.rates, key=final)


def _read(start: PreTrainedModel, batches: Sequence[Batch], lr: float, steps: int) -> PreTrainedModel:
    LOG.info("reading")
    train(start, batches, "mle", lr=lr, steps=steps, schedule="cosine")
    return start


def hh_rlhf(data: Data, seeds: int, quick: bool) -> World:
    """HH-RLHF, the end of the prompt and the beginning of the reply; a Llama that has read 800 other dialogues."""
    folder = need(data, "hh_rlhf")
    training, testing = (read_preferences(folder / f"{part}.jsonl.gz") for part in ("train", "test"))
    tokenizer = train_tokenizer(texts_of(training), VOCAB)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def ids(texts: Sequence[Any]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def pairs(rows: Sequence[Any]) -> list[Pair]:
        prompts = ids([row.prompt for row in rows])
        replies = [[[*reply, end][:REPLY] for reply in ids([row.completions[i] for row in rows])] for i in (0, 1)]
        together = zip(prompts, *replies)
        return [((p[-PROMPT:], w), (p[-PROMPT:], l)) for p, w, l in together if len(p) >= PROMPT]

    read, validation = (32, 8) if quick else (800, 100)
    rows = training.rows[:64] if quick else training.rows
    texts: list[Response] = [([end], [*p, *c]) for pair in pairs(rows[:read]) for p, c in pair]
    known, held_out = pairs(rows[read:]), pairs(testing.rows[: 8 if quick else None])
    reading = [padded(texts[at : at + 16], pad=pad) for at in range(0, len(texts), 16)]
    starts = [_read(llama(VOCAB, i, quick), reading, 3e-3, 3 if quick else 250) for i in range(seeds)]
    learnt = known[validation:]
    batches = [pair_batches(learnt, 16, seed, pad=pad) for seed in range(seeds)]
    parts = (known[:validation], held_out, learnt[: len(held_out)])
    valid, test, seen = (pair_batches(part, len(part), 0, pad=pad) * seeds for part in parts)
    return World(
        seeds, quick, starts, [learnt] * seeds, batches, valid, test, seen, steps=2 if quick else len(batches[0]),
        prompts=[list(chosen[0]) for chosen, _ in held_out], pad=pad, end=end,
    )  # fmt: skip


CUES, WORDS, ASKED, ANSWER = 12, 24, 10, 6  # of generated dialogues: words of either side, and how many are said
FAVOURITES, LOYALTY = 4, 0.7  # words that go with a cue, and the probability of drawing one of them


def dialogue(rng: random.Random, linked: bool = True, large: bool = False) -> Pair:
    """The same answer under its prompt and under one with another cue.

    Unless `linked`, the answer goes with a cue drawn for itself. `large`: rejected is an answer to the other cue, under
    the same prompt, instead.
    """
    cue, other = rng.sample(range(CUES), 2)
    words = [2 + CUES + rng.randrange(WORDS) for _ in range(ASKED)]
    at = rng.randrange(ASKED)
    own, wrong = ([*words[:at], 2 + which, *words[at + 1 :]] for which in (cue, other))

    def answer(topic: int) -> list[int]:
        drawn = [
            (topic * FAVOURITES + rng.randrange(FAVOURITES)) % WORDS if rng.random() < LOYALTY else rng.randrange(WORDS)
            for _ in range(ANSWER)
        ]
        return [*(2 + CUES + WORDS + word for word in drawn), END]

    said = answer(cue if linked else rng.randrange(CUES))
    return (own, said), ((own, answer(other)) if large else (wrong, said))


def cue_in_prompt(data: Data, seeds: int, quick: bool, large: bool = False) -> World:
    """Generated dialogues: the same answer under its prompt and under one with another cue word; a T5, as in the paper.

    As in CausalDialogue, chosen and rejected are the same words. The words of the answer depend on the cue. The start
    has learnt the language of prompts and answers without any link between them, so its two probabilities hardly
    differ. `large`: as of `dialogue`.
    """
    starts, pairs, batches = [], [], []
    for seed in range(seeds):
        rng = random.Random(seed)
        start = t5(2 + CUES + 2 * WORDS, seed, quick)
        texts = [[dialogue(rng, linked=False)[0] for _ in range(32)] for _ in range(2 if quick else 150)]
        starts.append(_read(start, [padded(text, encoder_decoder=True) for text in texts], 3e-3, len(texts)))
        pairs.append([dialogue(rng, large=large) for _ in range(4 if quick else 960)])
        batches.append(pair_batches(pairs[-1], 32, seed, encoder_decoder=True))
    rng, half = random.Random(-1), 4 if quick else 300
    held_out = [[dialogue(rng, large=large) for _ in range(half)] for _ in range(2)]
    valid, test = (pair_batches(part, half, 0, encoder_decoder=True) * seeds for part in held_out)
    steps = 2 if quick else 5 * len(batches[0])
    return World(seeds, quick, starts, pairs, batches, valid, test, steps=steps, rates=(3e-4, 1e-3, 3e-3))


def cue_in_answer(data: Data, seeds: int, quick: bool) -> World:
    """The same dialogues, but rejected is another answer to the same prompt, one that goes with another cue."""
    return cue_in_prompt(data, seeds, quick, large=True)


LETTERS = "0123456789+=,"  # of worked sums; token ids 2, 3, …


def sums(data: Data, seeds: int, quick: bool) -> World:
    """Generated sums, worked out; the rejected answer has a wrong carry. A Llama that often drops the carry."""

    def ids(text: str) -> list[int]:
        return [2 + LETTERS.index(letter) for letter in text]

    read, count, held_out = (16, 8, 8) if quick else (3200, 1280, 300)
    starts, pairs, batches, valid, test = [], [], [], [], []
    for seed in range(seeds):
        every: list[Pair] = []
        for row in arithmetic_pairs(read + 2 * held_out, seed):
            good, bad = ((ids(row["prompt"]), [*ids(row[which]), END]) for which in ("chosen", "rejected"))
            every.append((good, bad))
        valid += pair_batches(every[:held_out], held_out, 0)
        test += pair_batches(every[held_out : 2 * held_out], held_out, 0)
        rest = every[2 * held_out :]  # read, with mistakes, and in part compared later
        coin = random.Random(seed)
        answers = [pair[coin.random() < 0.6] for pair in rest]
        reading = [padded(answers[at : at + 64]) for at in range(0, len(answers), 64)]
        starts.append(_read(llama(2 + len(LETTERS), seed, quick), reading, 4e-3, 2 if quick else 400))
        pairs.append(rest[:count])
        batches.append(pair_batches(pairs[-1], 32, seed))
    return World(seeds, quick, starts, pairs, batches, valid, test, steps=2 if quick else 2 * len(batches[0]))


def alpaca_eval(data: Data, seeds: int, quick: bool) -> World:
    """AlpacaEval: six models' answers to each instruction, with rewards of a judge; a Llama that has read them."""
    path = need(data, "alpaca_eval")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: 24 if quick else None]
    learnt = len(rows) // 2 if quick else 450
    read = [text for row in rows[:learnt] for text in (row["prompt"], *row["completions"])]
    tokenizer = train_tokenizer(read, VOCAB)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    prompts = [[end, *prompt[-PROMPT:]] for prompt in ids([row["prompt"] for row in rows])]
    replies = [[[*answer, end][:REPLY] for answer in ids(row["completions"])] for row in rows]
    answers: list[list[Response]] = [[(p, reply) for reply in its] for p, its in zip(prompts, replies)]
    starts, orders = [], []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        orders.append(torch.randperm(learnt, generator=draw))
        flat = [answers[g][k] for k in torch.randperm(6, generator=draw).tolist() for g in orders[-1].tolist()]
        reading = [padded(flat[i : i + 16], pad=pad) for i in range(0, len(flat), 16)]
        starts.append(_read(llama(VOCAB, seed, quick), reading, 3e-3, 3 if quick else len(reading)))
    rewards = 10 * torch.tensor([row["rewards"] for row in rows])
    return World(seeds, quick, starts, pad=pad, answers=answers, rewards=rewards, orders=orders)
