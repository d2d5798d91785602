"""Trials on pairs, of Tuan & Wang (2024) and of BNF: what is trained in a world and measured.

A trial returns numbers per seed, by quantity and method, and the settings that are its own.
"""

import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.analysis import percentile_shares, shifts

# isort: off
from .judge import Values
from .models import (
    IGNORE, LOG, Batch, Method, Pair, add, chosen_only, evaluate, padded, scores, targets, train,
)  # fmt: skip
from .worlds import REPLY, World

Found = tuple[Values, dict[str, Any]]
Measured = dict[str, float]
ON_SEEN = ", on training pairs"
FOUR: dict[str, Method] = {
    "MLE": ("mle", {}), "unlikelihood": ("unlikelihood", {"alpha": 1.0}), "ExMATE": ("exmate", {"beta": 1.0}),
    "DPO": ("dpo", {"beta": 0.1}),
}  # fmt: skip
SUMS: dict[str, Method] = {
    "MLE + DPO in one loss": ("mle + dpo", {"dpo.beta": 0.1}),
    "ExMATE + DPO in one loss": ("exmate + dpo", {"exmate.beta": 1.0, "dpo.beta": 0.1}),
}
MOVERS: dict[str, Method] = {
    "BNF": ("bnf", {}), "DPO": ("dpo", {"beta": 0.1}), "IPO": ("ipo", {"tau": 0.1}),
    "SimPO": ("simpo", {"beta": 2.0, "gamma": 0.5}),
}  # fmt: skip
COLLAPSING: dict[str, Method] = {"NLL+PLL": ("nll_pll", {}), "DPO": ("dpo", {}), "BNF": ("bnf", {})}
COEFFICIENTS = (0.1, 0.3, 1.0, 3.0)
RATIOS = (0.0, 0.25, 0.5, 1.0)


def trained(world: World, seed: int, start: PreTrainedModel, method: Method, rate: float) -> PreTrainedModel:
    """A copy of `start`, which is the reference, after one run on the world's pairs; `mle` sees the chosen."""
    objective, options = method
    LOG.info("%s, seed %d", objective, seed)
    batches, model = world.batches[seed], deepcopy(start)
    read = [chosen_only(batch) for batch in batches] if objective == "mle" else batches
    train(model, read, objective, ref_model=start, lr=rate, steps=world.steps, **options)
    return model


def compare(
    world: World, methods: Mapping[str, Method], rate: float, starts: Sequence[PreTrainedModel] = ()
) -> Values:  # fmt: skip
    """Each method from each start; all with the same rate, steps and batches. "start" is what was before."""
    values: Values = {}
    for seed, start in enumerate(starts or world.starts):
        for name in ("start", *methods):
            model = trained(world, seed, start, methods[name], rate) if name in methods else start
            add(values, name, evaluate(model, world.test[seed]))
            for batch in world.seen[seed : seed + 1]:
                add(values, name, {f"{what}{ON_SEEN}": value for what, value in evaluate(model, batch).items()})
    return values


def merge(values: Values, more: Values, rename: Mapping[str, str]) -> None:
    """Add to `values` the methods of `more` that `rename` has, under their new names."""
    for quantity, methods in more.items():
        values.setdefault(quantity, {}).update({new: methods[name] for name, new in rename.items()})


def four_losses(world: World) -> Found:
    """MLE, unlikelihood, ExMATE and DPO at one learning rate; DPO also at the others."""
    values = compare(world, FOUR, world.rate)
    for rate in world.rates:  # a loss that learns nothing at one rate may learn at another
        more = values if rate == world.rate else compare(world, {"DPO": FOUR["DPO"]}, rate)
        merge(values, more, {"DPO": f"DPO at {rate:g}"})
    agility = values["agility"]
    values["a tenth of ExMATE's agility less |agility|"] = {
        name: [e / 10 - abs(x) for e, x in zip(agility["ExMATE"], its)] for name, its in agility.items()
    }
    return values, {"learning rate": world.rate}


def two_stages(world: World) -> Found:
    """MLE or ExMATE, then DPO (after MLE also ExMATE) with the model after the first as reference; and in one loss."""
    values = compare(world, SUMS, world.rate)
    for name, seconds in (("MLE", ("DPO", "ExMATE")), ("ExMATE", ("DPO",))):
        firsts = [trained(world, i, start, FOUR[name], world.rate) for i, start in enumerate(world.starts)]
        second = compare(world, {other: FOUR[other] for other in seconds}, world.rate, firsts)
        merge(values, second, {"start": name, **{other: f"{name}, then {other}" for other in seconds}})
    return values, {"learning rate": world.rate}


def coefficients(world: World) -> Found:
    """ExMATE and DPO at several β; also the least-squares slope of what comes out over log₁₀ β."""
    names = {"ExMATE": "exmate", "DPO": "dpo"}
    methods = {f"{name}, β = {b:g}": (names[name], {"beta": b}) for name in names for b in COEFFICIENTS}
    values = compare(world, methods, world.rate)
    places = [math.log10(beta) for beta in COEFFICIENTS]
    middle = sum(places) / len(places)
    norm = sum((x - middle) ** 2 for x in places)
    for quantity in ("log perplexity", "agility"):
        for name in names:
            its = zip(*(values[quantity][f"{name}, β = {beta:g}"] for beta in COEFFICIENTS))
            slopes = [sum((x - middle) * y for x, y in zip(places, ys)) / norm for ys in its]
            values.setdefault(f"change of {quantity} by a tenfold β", {})[name] = slopes
    return values, {"learning rate": world.rate}


@torch.no_grad()
def right(model: PreTrainedModel, batch: Batch) -> float:
    """Part of the prompts whose greedy answer is the chosen one; each of its tokens is the likeliest then."""
    chosen = chosen_only(batch)
    hidden = hf.hidden_states(model.eval(), chosen["input_ids"], chosen["attention_mask"])
    best, target = (hidden @ hf.read_head(model).weight.T).argmax(-1), hf.aligned_targets(chosen["labels"])
    return ((best == target) | (target == IGNORE)).all(1).double().mean().item()


def each_rate(world: World) -> Found:
    """NLL+PLL, DPO and BNF, two epochs at each of three learning rates; likelihoods, and sums answered rightly."""
    values: Values = {}
    for seed, start in enumerate(world.starts):
        test = world.test[seed]
        count = (chosen_only(test)["labels"] >= 0).sum(1).double().mean().item()
        before = evaluate(start, test)["log p of chosen"] / count
        runs = {f"{name} at {rate:g}": (COLLAPSING[name], rate) for name in COLLAPSING for rate in world.rates}
        for name in ("start", *runs):
            model = trained(world, seed, start, *runs[name]) if name in runs else start
            logp = evaluate(model, test)["log p of chosen"] / count
            found = {"log p per token of chosen": logp, "change of log p per token of chosen": logp - before}
            add(values, name, {**found, "sums answered rightly": right(model, test)})
    return values, {"learning rate": world.rates}


def masked(pairs: Sequence[Pair], ratio: float, seed: int) -> list[Batch]:
    """Batches of labelled responses of pairs, of which a part, `ratio`, is whole; the others lost either response."""
    rng = random.Random(seed)
    order = list(range(len(pairs)))
    rng.shuffle(order)
    whole = set(order[: round(ratio * len(pairs))])
    responses = []
    for i, (preferred, dispreferred) in enumerate(pairs):
        both = [(preferred, True), (dispreferred, False)]
        responses += both if i in whole else [both[rng.random() < 0.5]]
    rng.shuffle(responses)
    parts = [responses[at : at + 64] for at in range(0, len(responses), 64)]
    return [{**padded([r for r, _ in part]), "label": torch.tensor([label for _, label in part])} for part in parts]


def without_partners(world: World) -> Found:
    """BNF, one epoch of what is left when responses lose their partners, at each ratio's own best learning rate."""
    values: Values = {}
    best: dict[str, float] = {}
    for name, ratio in {"start": 0.0, **{f"{ratio:.0%}": ratio for ratio in RATIOS}}.items():
        rated: dict[float, tuple[float, Values]] = {}
        for rate in world.rates if name != "start" else (0.0,):
            valid = 0.0
            found: Values = {}
            for seed, start in enumerate(world.starts):
                model = deepcopy(start)
                if rate:
                    batches = masked(world.pairs[seed], ratio, seed)
                    steps = 2 if world.quick else len(batches)
                    train(model, batches, "bnf", ref_model=start, lr=rate, steps=steps)
                valid += right(model, world.valid[seed])
                test = world.test[seed]
                add(found, name, {"sums answered rightly": right(model, test), **evaluate(model, test)})
            rated[rate] = valid, found
        best[name] = max(rated, key=lambda rate: rated[rate][0])
        merge(values, rated[best[name]][1], {name: name})
    return values, {"learning rate": best}


@torch.no_grad()
def answers(model: PreTrainedModel, world: World, length: int) -> Batch:
    """A batch of greedy answers to held-out prompts, of up to `length` tokens."""
    inputs = torch.tensor(world.prompts)
    found = model.eval().generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=length, do_sample=False,
        eos_token_id=world.end, pad_token_id=world.pad,
    )  # fmt: skip
    replies = [[token for token in row if token != world.pad] for row in found[:, inputs.shape[1] :].tolist()]
    return padded(list(zip(world.prompts, replies)), pad=world.pad)


def moved(model: PreTrainedModel, reference: PreTrainedModel, own: Batch, common: Batch) -> tuple[Measured, Tensor]:
    """Mean absolute shifts over a model's own answers, and the log p shift of each token of `common`, NaN if masked."""
    of_own, fixed = (shifts(scores(reference, b), scores(model, b), targets(model, b)) for b in (own, common))
    found = {
        "abs. shift of log p per answer": of_own.logp.abs(),
        "abs. shift of log p per token": of_own.logp_mean.abs(),
        "abs. logit shift per answer": of_own.logit,
        "abs. logit shift per token": of_own.logit_mean,
        "Gini coefficient of logit shifts": of_own.gini,
    }
    return {name: x.nanmean().item() for name, x in found.items()}, fixed.token_logp


def outer(tokens: Tensor, of: Tensor) -> float:
    """Part of `tokens` in the first and the last of the ten bins that `of` fills equally: 0.2 for `of` itself."""
    return percentile_shares(tokens, of)[[0, -1]].sum().item()


def how_far(world: World) -> Found:
    """BNF, DPO, IPO and SimPO, one epoch at each of three learning rates; how far likelihoods and logits move."""
    values: Values = {}
    length = 4 if world.quick else REPLY
    for seed, start in enumerate(world.starts):
        for rate in world.rates:
            tokens = {}
            for name, method in MOVERS.items():
                model = trained(world, seed, start, method, rate)
                found, tokens[name] = moved(model, start, answers(model, world, length), world.test[seed])
                add(values, f"{name} at {rate:g}", found)
            for name, its in tokens.items():
                add(
                    values, f"{name} at {rate:g}", {"part of the tokens in DPO's outer bins": outer(its, tokens["DPO"])}
                )
    return values, {"learning rate": world.rates}
