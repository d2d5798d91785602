"""Trials on groups of answers, of SWEPO and MC-PO: what is trained in a world and measured. As `on_pairs`."""

import math
from copy import deepcopy
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import rgpb

# isort: off
from .judge import Values, differences
from .models import LOG, Batch, add, padded, scores, train
from .on_pairs import Found
from .policies import (
    ANSWERS, LENGTH, SYMBOLS, Groups, Method, Task, align, all_logps, best_rate, compare,
    draw_groups, make_task, measured, true_rewards,
)  # fmt: skip
from .worlds import Data, World

SEVEN = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)  # tilts
EVEN = "even candidates that the kernel's weights are like"
BETAS = (0.1, 1.0)  # at 0.1 the kernel's weights are nearly even
COUNTS = (1, 2, 4, 8, 16, 32, 64)
STEPS, EARLY = 200, 25
STEP_SIZE = {"mle": 2.0, "swepo": 10.0}


def best_and_random(answers: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """The best answer as judged and one of the others. [P, K], [P, K] → [P, 2]."""
    best = rewards.argmax(1, keepdim=True)
    other = torch.multinomial(torch.ones_like(rewards).scatter(1, best, 0.0), 1, generator=generator)
    return answers.gather(1, torch.cat([best, other], 1))


def best_and_worst(answers: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """The best answer as judged and the worst. [P, K], [P, K] → [P, 2]."""
    return answers.gather(1, torch.stack([rewards.argmax(1), rewards.argmin(1)], 1))


GROUP_LOSSES = {
    "DPO, best and random": Method("dpo", pick=best_and_random),
    "DPO, best and worst": Method("dpo", pick=best_and_worst),
    "DPO, best and each": Method("multi_dpo", {"pairing": "best"}),
    "InfoNCA": Method("infonca"),
    "SWEPO, one against all, p = 0": Method("swepo", {"p": 0, "mode": "one_vs_all"}),
    "SWEPO, p = 0": Method("swepo", {"p": 0}),
    "SWEPO, p = 1": Method("swepo", {"p": 1}),
    "SWEPO, p = 2": Method("swepo", {"p": 2}),
}


def group_losses(world: World) -> Found:
    """DPO on pairs, InfoNCA and SWEPO on groups of four answers with noisy rewards."""
    return measured(compare(world, GROUP_LOSSES, draw_groups))


def six_choices(world: World) -> Found:
    """Six choices of DPO's rejected answer and six orders of the prompts; SWEPO takes all answers, so only orders."""
    dpo, swepo = GROUP_LOSSES["DPO, best and random"], GROUP_LOSSES["SWEPO, p = 1"]
    rates = {method.objective: best_rate(method, draw_groups, world.quick) for method in (dpo, swepo)}
    runs = {"DPO, choice and order": (dpo, 1), "DPO, choice alone": (dpo, 0), "SWEPO, p = 1, order": (swepo, 1)}
    values: Values = {}
    for seed in range(world.seeds):
        task = make_task(seed, world.quick)
        groups = draw_groups(task, seed)
        for name, (method, reorder) in runs.items():
            rewards = []
            for choice in range(2 if world.quick else 6):
                order, rate = 100 * seed + reorder * choice, rates[method.objective]
                policy = align(task, method, groups, rate=rate, seed=order, choice=100 * seed + choice)
                rewards.append(policy.reward)
            add(values, name, {"expected reward": fmean(rewards), "sd of the expected reward": stdev(rewards)})
    return values, {"learning rate": rates}


def order_accuracy(delta: Tensor, rewards: Tensor) -> float:
    """In what part of the pairs of a group with different rewards Δ has the same order. [G, K], [G, K]."""
    better = rewards[:, :, None] > rewards[:, None, :]
    return float((delta[:, :, None] > delta[:, None, :])[better].double().mean())


def order_of_answers(world: World) -> Found:
    """DPO, InfoNCA and SWEPO on groups of six real answers; in how many held-out pairs Δ has the rewards' order.

    A model of this size can't be asked for answers, so what is measured is the implicit reward Δ = log π / π_ref.
    """
    count, learnt = world.rewards.shape[1], len(world.orders[0])

    def batches_of(which: Tensor, picks: Tensor) -> list[Batch]:
        """Batches of 8 groups in the order of `which`, answer after answer; of their pairs [chosen; rejected]."""
        batches = []
        for some in which.split(8):
            rows = picks[some].T if picks.shape[1] == 2 else picks[some]
            groups = some[None, :].expand_as(rows) if picks.shape[1] == 2 else some[:, None].expand_as(rows)
            its = [world.answers[g][k] for g, k in zip(groups.flatten().tolist(), rows.flatten().tolist())]
            batches.append({**padded(its, pad=world.pad), "rewards": world.rewards[some]})
        return batches

    def summed(model: PreTrainedModel) -> Tensor:
        """log π of every held-out answer, float64 [G, K]."""
        return torch.cat([scores(model, batch).logp.double().sum(1).view(-1, count) for batch in test])

    columns = torch.arange(count).expand_as(world.rewards)
    test = batches_of(torch.arange(learnt, len(world.answers)), columns)
    values: Values = {}
    for seed, start in enumerate(world.starts):
        reference = summed(start)
        for name, method in GROUP_LOSSES.items():
            if name in ("DPO, best and each", "SWEPO, one against all, p = 0"):
                continue
            LOG.info("%s, seed %d", name, seed)
            picks, options, model = columns, dict(method.options), deepcopy(start)
            if method.pick is not None:
                picks = method.pick(columns, world.rewards, torch.Generator().manual_seed(seed))
            else:
                options["group_size"] = count
            its = batches_of(world.orders[seed], picks)
            train(model, its, method.objective, ref_model=start, lr=1e-3, steps=len(its), schedule="cosine", **options)
            accuracy = order_accuracy(summed(model) - reference, world.rewards[learnt:])
            add(values, name, {"accuracy of the order": accuracy})
    return values, {"learning rate": 1e-3}


def ranked(task: Task, seed: int, candidates: int = 5) -> Groups:
    """The best of seven answers as judged, then the worst `candidates` of the five that rank third to seventh."""
    answers, rewards = draw_groups(task, seed, SEVEN)
    order = rewards.argsort(1, descending=True)[:, [0, *range(7 - candidates, 7)]]
    return answers.gather(1, order), rewards.gather(1, order)


def kernel_weights(task: Task, model: PreTrainedModel, groups: Groups, beta: float) -> Tensor:
    """With what probability the kernel draws each candidate under a policy, for the first 96 prompts. [96, K − 1]"""
    ratios = all_logps(model, task.prompts[:96]) - task.logps[:96]
    return (beta * ratios.gather(1, groups[0][:96, 1:])).softmax(1)


def samplers(world: World) -> Found:
    """MC-PO with each sampler from five candidates at two β; with the kernel also from three and from one."""
    every = [(sampler, beta) for beta in BETAS for sampler in ("mc", "random", "max", "min")]
    methods = {f"{s}, 5 candidates, beta {b:g}": Method("mc_po", {"sampler": s, "beta": b}) for s, b in every}
    found = compare(world, methods, ranked)
    rate, _ = found["mc, 5 candidates, beta 0.1"]
    for n in (3, 1):
        name = f"mc, {n} candidate{'s'[: n > 1]}, beta 0.1"
        found |= compare(world, {name: Method("mc_po")}, partial(ranked, candidates=n), rate)
    values, rates = measured(found)
    for beta in BETAS:
        name = f"mc, 5 candidates, beta {beta:g}"
        for seed, policy in enumerate(found[name][1]):
            task = make_task(seed, world.quick)
            weights = kernel_weights(task, policy.model, ranked(task, seed), beta)
            even = math.exp(-float(torch.special.xlogy(weights, weights).sum(1).mean()))
            add(values, name, {EVEN: even})
    return values, rates


def negatives(world: World) -> Found:
    """MC-PO with one, two and three rejected responses, drawn by the kernel (MC-PO) or at random (RNCE)."""
    names = {"MC-PO": "mc", "RNCE": "random"}
    methods = {f"{x}, M = {m}": Method("mc_po", {"sampler": names[x], "m": m}) for x in names for m in (1, 2, 3)}
    found = compare(world, methods, ranked)
    values, rates = measured(found)
    reward = values["expected reward"]
    gains = {name: differences(reward[f"{name}, M = 3"], reward[f"{name}, M = 1"]) for name in names}
    values["gain of expected reward from M = 1 to M = 3"] = gains
    return values, rates


def switch(answers: Tensor, generator: torch.Generator) -> Tensor:
    """Each answer with a random two different symbols of it, if it has such, exchanged. Indices, [P] → [P]."""
    symbols = ANSWERS[answers]
    first, second = torch.combinations(torch.arange(LENGTH)).unbind(1)
    differ = symbols[:, first] != symbols[:, second]
    weights = torch.where(differ.any(1, keepdim=True), differ.double(), 1.0)
    pair = torch.multinomial(weights, 1, generator=generator)[:, 0]
    a, b = first[pair][:, None], second[pair][:, None]
    switched = symbols.scatter(1, a, symbols.gather(1, b)).scatter(1, b, symbols.gather(1, a))
    return (switched * SYMBOLS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


def injected(task: Task, seed: int) -> Groups:
    """`ranked`, and the preferred answer with two symbols switched as a last candidate. [P, 7]"""
    answers, rewards = ranked(task, seed)
    noise = switch(answers[:, 0], torch.Generator().manual_seed(seed))[:, None]
    rewards_of_noise = true_rewards(task.prompts).gather(1, noise)
    return torch.cat([answers, noise], 1), torch.cat([rewards, rewards_of_noise], 1)


def switched_copy(world: World) -> Found:
    """MC-PO and DPO with and without a sixth candidate: the preferred answer with two of its symbols switched.

    On text such a candidate is close to the preferred response without being a good contrast to it. Here the order of
    the symbols matters, so the switched answer is also a worse one: "true reward" says how much.
    """
    mc, some = Method("mc_po", {"beta": 0.1}), Method("mc_po", {"beta": 0.1, "sampler": "random"})
    switched = Method("dpo", {"beta": 0.1}, lambda answers, rewards, generator: answers[:, [0, -1]])
    found = compare(world, {"DPO(−), switched": switched, "DPO, any of 6": some, "MC-PO of 6": mc}, injected)
    found |= compare(world, {"DPO, any of 5": some, "MC-PO of 5": mc}, ranked)
    values, rates = measured(found)
    reward = values["expected reward"]
    values["loss of expected reward by the switched copy"] = {
        "DPO": differences(reward["DPO, any of 5"], reward["DPO, any of 6"]),
        "MC-PO": differences(reward["MC-PO of 5"], reward["MC-PO of 6"]),
    }
    for seed, policy in enumerate(found["MC-PO of 6"][1]):
        task = make_task(seed, world.quick)
        groups = injected(task, seed)
        share = float(kernel_weights(task, policy.model, groups, 0.1)[:, -1].mean())
        add(values, "MC-PO of 6", {"the switched copy's share of the draws": share})
        true = true_rewards(task.prompts).gather(1, groups[0]).mean(0).tolist()
        for name, value in {"preferred": true[0], "switched": true[-1], "other candidates": fmean(true[1:-1])}.items():
            add(values, name, {"true reward": value})
    return values, rates


def distribution(data: Data, seeds: int, quick: bool) -> World:
    """64 prompts with 64 responses of one token each, half of them acceptable, whose distribution is known."""
    return World(seeds, quick)


def fit(reference: Tensor, rows: Tensor, objective: str, steps: int) -> list[Tensor]:
    """The policy after every step of gradient descent from the reference, float64 [P, V] both.

    Of the responses `rows`, int64 [P, K], "swepo" takes the first half for acceptable (reward 1, else 0).
    """
    prompts, k = rows.shape
    table = reference.log().float().T.contiguous().requires_grad_()  # the head, [V, H = P]
    hidden = torch.eye(prompts).repeat_interleave(k, 0)[:, None]  # [P·K, 1, P]: which prompt
    options: dict[str, Any] = {}
    if objective == "swepo":
        rewards = (torch.arange(k) < k // 2).double().expand(prompts, k)
        options = {"ref": reference.log().float().gather(1, rows).reshape(-1), "rewards": rewards, "group_size": k}
    policies = []
    for _ in range(steps):
        loss = rgpb.fused_loss(hidden, table, rows.reshape(-1, 1), objective=objective, **options)
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table - STEP_SIZE[objective] * prompts * gradient).detach().requires_grad_()
        policies.append(table.detach().double().T.softmax(1))
    return policies


def bias(world: World) -> Found:
    """Bias of an attribute over k sampled responses per prompt: of their mean, and of policies fitted to them.

    A policy is a row of logits per prompt, so it can be any distribution; the theorem assumes that it becomes that of
    the samples.
    """
    prompts, steps = (4, 3) if world.quick else (64, STEPS)
    values: Values = {}
    for seed in range(world.seeds):
        draw, shape = torch.Generator().manual_seed(seed), (prompts, 64)
        reference = torch.randn(shape, generator=draw, dtype=torch.float64).softmax(1)
        good = torch.rand(shape, generator=draw).argsort(1).argsort(1) < 32
        attribute = torch.randn(shape, generator=draw, dtype=torch.float64) + good
        acceptable, other = (part / part.sum(1, True) for part in (reference * good, reference * ~good))
        mean = (acceptable * attribute).sum(1)
        deviation = (acceptable * (attribute - mean[:, None]) ** 2).sum(1).sqrt().max().item()

        def of(policy: Tensor, attribute: Tensor = attribute, mean: Tensor = mean) -> float:
            return float(((policy * attribute).sum(1) - mean).abs().mean())

        for k in COUNTS:
            LOG.info("bias, seed %d, k = %d", seed, k)
            some, others = (torch.multinomial(p, k, replacement=True, generator=draw) for p in (acceptable, other))
            sampled = float((attribute.gather(1, some).mean(1) - mean).abs().mean())
            trained = [of(one) for one in fit(reference, torch.cat([some, others], 1), "swepo", steps)]
            found = {"reference": of(reference), "sample mean": sampled, "swepo": trained[-1]}
            found |= {"swepo, early": trained[min(EARLY, steps) - 1], "swepo, best stop": min(trained)}
            found["mle"] = of(fit(reference, some, "mle", steps)[-1])
            add(values, f"k = {k}", {f"bias, {name}": value for name, value in found.items()})
            add(values, f"k = {k}", {"bound σ_max/√k less bias, sample mean": deviation / math.sqrt(k) - sampled})
    return values, {}
