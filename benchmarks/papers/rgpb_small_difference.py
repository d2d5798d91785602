"""One response under its own prompt and under a slightly different one (Tuan & Wang 2024, §6.2).

As in CausalDialogue chosen and rejected are the same words: what differs is the prompt. Here it is a generated dialogue
with one cue word among others; the words of the answer depend on the cue, and the prompt of the rejected response has
another cue. The start, an encoder–decoder as in the paper, has learnt the language of prompts and answers without any
link between them, so its two probabilities hardly differ.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from .claim import Claim, Finding, bars, decide, differences, every, spread, write
from .models import (
    END,
    OPTIMISER,
    Batch,
    Measured,
    Method,
    Response,
    best_rate,
    column,
    compare,
    padded,
    pair_batches,
    tiny_t5,
    train,
)

CLAIMS = (
    Claim(
        "rgpb_small_difference_dpo", "RGPB", "§6.2",
        "Where the same response is chosen under its own prompt and rejected under a slightly different one, DPO "
        "learns next to nothing: agility stays near zero (here: under a tenth of ExMATE's), perplexity above MLE's.",
    ),
    Claim(
        "rgpb_small_difference_exmate", "RGPB", "§6.2",
        "In the same case ExMATE improves both at once: lower perplexity and higher agility than MLE.",
    ),
    Claim(
        "rgpb_small_difference_unlikelihood", "RGPB", "§6.2",
        "In the same case unlikelihood training ends with a higher perplexity than MLE.",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {
    "MLE": ("mle", {}),
    "unlikelihood": ("unlikelihood", {"alpha": 1.0}),
    "ExMATE": ("exmate", {"beta": 1.0}),
    "DPO": ("dpo", {"beta": 0.1}),
}
CUES, WORDS, PROMPT, ANSWER = 12, 24, 10, 6
FAVOURITES, LOYALTY = 4, 0.7  # words that go with a cue, and the probability of drawing one of them
VOCAB = 2 + CUES + 2 * WORDS
PAIRS, TEST, BATCH, EPOCHS, RATES = 960, 300, 32, 5, (3e-4, 1e-3, 3e-3)
PRETRAINING = {"steps": 150, "lr": 3e-3, "batch": 32}
HIDDEN, LAYERS = 64, 2


def dialogue(rng: random.Random, linked: bool = True, large: bool = False) -> tuple[Response, Response]:
    """A chosen and a rejected response: the same answer under its prompt and under one with another cue.

    Args:
        rng: of all that is drawn.
        linked: whether the answer goes with the cue; else with another one, drawn for itself.
        large: reject an answer to the other cue, under the same prompt, instead.
    """
    cue, other = rng.sample(range(CUES), 2)
    words = [2 + CUES + rng.randrange(WORDS) for _ in range(PROMPT)]
    at = rng.randrange(PROMPT)
    own, wrong = ([*words[:at], 2 + which, *words[at + 1 :]] for which in (cue, other))
    answer = _answer(rng, cue if linked else rng.randrange(CUES))
    return (own, answer), ((own, _answer(rng, other)) if large else (wrong, answer))


def _answer(rng: random.Random, topic: int) -> list[int]:
    drawn = [
        (topic * FAVOURITES + rng.randrange(FAVOURITES)) % WORDS if rng.random() < LOYALTY else rng.randrange(WORDS)
        for _ in range(ANSWER)
    ]
    return [*(2 + CUES + WORDS + word for word in drawn), END]


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Train each method for five epochs of the pairs from the same start, and compare on held-out pairs.

    Args:
        out: folder for tables, pictures and JSON.
        data: not needed.
        seeds: runs of each; they draw the weights, the dialogues and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.
    """
    found, settings = trained(seeds, quick, progress)
    findings = [_dpo(found, settings), _exmate(found, settings), _unlikelihood(found, settings)]
    for finding in findings:
        write(finding, out, picture(found))
    return findings


def picture(found: dict[str, list[Measured]]) -> Any:
    """Log-perplexity and agility of each method: a figure."""
    names = ("log perplexity", "agility")
    return bars({name: {m: column(f, name) for m, f in found.items()} for name in names})


class Prepared(NamedTuple):
    """A model per seed to start from, batches of pairs per seed, held-out pairs, steps, the learning rate, settings."""

    starts: list[PreTrainedModel]
    batches: list[list[Batch]]
    test: Batch
    steps: int
    lr: float
    settings: dict[str, Any]


@cache
def prepare(seeds: int, quick: bool, progress: bool, large: bool = False) -> Prepared:
    """Dialogues, models that know their language, and the rate for all methods: the one at which MLE does best.

    Args:
        seeds, quick, progress: as for `run`.
        large: as for `dialogue`.
    """
    starts, batches = [], []
    for seed in range(seeds):
        rng = random.Random(seed)
        model = tiny_t5(VOCAB, seed, hidden=16 if quick else HIDDEN, layers=1 if quick else LAYERS)
        size, steps = int(PRETRAINING["batch"]), 2 if quick else int(PRETRAINING["steps"])
        texts = [[dialogue(rng, linked=False)[0] for _ in range(size)] for _ in range(steps)]
        label = f"language without links, seed {seed}" if progress else None
        reading = [padded(text, encoder_decoder=True) for text in texts]
        train(model, reading, "mle", lr=PRETRAINING["lr"], steps=steps, schedule="cosine", progress=label)
        starts.append(model)
        pairs = [dialogue(rng, large=large) for _ in range(4 if quick else PAIRS)]
        batches.append(pair_batches(pairs, BATCH, seed, encoder_decoder=True))
    rng = random.Random(-1)
    held_out = [dialogue(rng, large=large) for _ in range(8 if quick else 2 * TEST)]
    half = len(held_out) // 2
    (valid,), (test,) = (
        pair_batches(part, half, 0, encoder_decoder=True) for part in (held_out[:half], held_out[half:])
    )
    steps = 2 if quick else EPOCHS * len(batches[0])
    lr = best_rate(starts, batches, valid, RATES[:1] if quick else RATES, steps)
    rejected = "answer goes with another cue" if large else "prompt has another cue"
    settings = {
        "data": f"generated dialogues: {PROMPT} words with one of {CUES} cues, answers of {ANSWER} words, each with "
        f"probability {LOYALTY} among {FAVOURITES} that go with the cue; the rejected {rejected}",
        "pairs": {"train": PAIRS, "validation": TEST, "test": TEST},
        "model": f"T5, random weights, {LAYERS} + {LAYERS} layers, width {HIDDEN}, 4 heads",
        "optimiser": OPTIMISER,
        "start": f"MLE on dialogues whose answers don't depend on the prompt, {PRETRAINING}, cosine",
        "seeds": seeds,
        "batch": f"{BATCH} pairs",
        "steps": steps,
        "learning rate": lr,
        "rule for the learning rate": f"one for all methods: of {RATES}, that with MLE's lowest validation perplexity",
        "reference": "the start",
    }
    return Prepared(starts, batches, test, steps, lr, settings)


def trained(
    seeds: int, quick: bool, progress: bool, large: bool = False
) -> tuple[dict[str, list[Measured]], dict[str, Any]]:
    """What each method reached on held-out dialogues, and the settings. Arguments as for `prepare`."""
    starts, batches, test, steps, lr, settings = prepare(seeds, quick, progress, large)
    found = compare(starts, batches, test, METHODS, lr=lr, steps=steps, progress=progress)
    for rate in RATES:  # a loss that learns nothing at one rate may learn at another
        if rate != lr:
            name = f"DPO at {rate:g}"
            other = compare(starts, batches, test, {name: METHODS["DPO"]}, lr=rate, steps=steps, progress=progress)
            found[name] = other[name]
    rule = (
        f"{settings['rule for the learning rate']}; DPO also at the others, and the claim about it has to hold at each"
    )
    methods = {name: [m, o] for name, (m, o) in METHODS.items()}
    return found, {**settings, "methods": methods, "rule for the learning rate": rule}


def _table(found: dict[str, list[Measured]]) -> list[list[str]]:
    names = ("perplexity", "agility", "chosen", "rejected")
    header = ["", "perplexity", "agility", "log p under its prompt", "log p under the other prompt"]
    return [header, *([m, *(spread(column(f, name)) for name in names)] for m, f in found.items())]


def _dpo(found: dict[str, list[Measured]], settings: dict[str, Any]) -> Finding:
    exmate, mle = column(found["ExMATE"], "agility"), column(found["MLE"], "log perplexity")
    parts, told = [], []
    for name in (name for name in found if name.startswith("DPO")):
        agility = column(found[name], "agility")
        worse = differences(column(found[name], "log perplexity"), mle)
        verdicts = [decide([e / 10 - abs(d) for e, d in zip(exmate, agility)]), decide(worse)]
        rate = name if " " in name else f"DPO at {settings['learning rate']:g}"
        told.append(
            f"{rate}: agility {spread(agility)}, log-perplexity less that of MLE {spread(worse, sign=True)}, log p of "
            f"the response {spread(column(found[name], 'chosen'))} ({every(verdicts)})"
        )
        parts += verdicts
    number = (
        f"Agility of ExMATE {spread(exmate)}, log p of the response at the start "
        f"{spread(column(found['start'], 'chosen'))}. {'; '.join(told)}."
    )
    return Finding(CLAIMS[0], every(parts), number, _table(found), settings)


def _exmate(found: dict[str, list[Measured]], settings: dict[str, Any]) -> Finding:
    lower = differences(column(found["MLE"], "log perplexity"), column(found["ExMATE"], "log perplexity"))
    higher = differences(column(found["ExMATE"], "agility"), column(found["MLE"], "agility"))
    number = (
        f"Log-perplexity of MLE less that of ExMATE: {spread(lower, sign=True)}; agility of ExMATE less that of MLE: "
        f"{spread(higher, sign=True)}."
    )
    return Finding(CLAIMS[1], every([decide(lower), decide(higher)]), number, _table(found), settings)


def _unlikelihood(found: dict[str, list[Measured]], settings: dict[str, Any]) -> Finding:
    worse = differences(column(found["unlikelihood"], "log perplexity"), column(found["MLE"], "log perplexity"))
    number = f"Log-perplexity of unlikelihood less that of MLE: {spread(worse, sign=True)}."
    return Finding(CLAIMS[2], decide(worse), number, _table(found), settings)
