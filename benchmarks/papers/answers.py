"""A generated task whose policies are judged exactly: all answers to a prompt are enumerated.

A prompt is four symbols of five, an answer as well, and the best answer is the prompt backwards. The reward of an
answer, 0 to 10, is how close its symbols come to that on the circle of symbols. A small Llama is first fitted to
answers that are right in each place with probability 0.4; it is the reference and the start of every policy. With 625
answers to a prompt, a policy's expected reward and its KL divergence from the reference are sums, not samples.

Used by the scripts of SWEPO and MC-PO; it tries no claim itself.

Dimensions: P prompts, L symbols of a prompt or an answer, C = 625 answers, K answers of a group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from rgpb.objectives import OBJECTIVES

from .claim import spread
from .models import IGNORE, Batch, clone, tiny_llama, train

SYMBOLS, LENGTH = 5, 4
ANSWERS = torch.tensor(list(product(range(SYMBOLS), repeat=LENGTH)))  # [C, L], in lexicographic order
CLOSENESS = torch.tensor([10.0, 5.0, 0.0, 0.0, 5.0])  # by the difference of two symbols on the circle
FIRST_DRAFT = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.2])  # likewise, probabilities of what the reference is fitted to
RATES = (3e-4, 1e-3, 3e-3)  # each method takes its own best of these
PROMPTS_PER_STEP = 32
TUNING = 1000  # the seed of the world that learning rates are chosen on, no seed of a result


class World(NamedTuple):
    """What all methods of one seed share.

    Attributes:
        model: the reference.
        prompts: [P, L], those with training answers.
        logps: log π_ref of every answer to them, float64 [P, C].
        held_out: [P', L], those that policies are judged on.
        held_out_logps: float64 [P', C].
        steps: updates of a training run.
    """

    model: PreTrainedModel
    prompts: Tensor
    logps: Tensor
    held_out: Tensor
    held_out_logps: Tensor
    steps: int


class Method(NamedTuple):
    """An objective of the library with options, and the rows that it is given.

    Attributes:
        objective: a name in `rgpb.OBJECTIVES`.
        options: of the objective; a generator is added where it has that option.
        pick: (answers [P, K], rewards [P, K], generator) → [P, 2], chosen and rejected; None for whole groups.
    """

    objective: str
    options: Mapping[str, Any] = {}
    pick: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None


class Point(NamedTuple):
    """A policy on the way: after `step` updates its expected true reward and KL(π‖π_ref) on held-out prompts."""

    step: int
    reward: float
    kl: float


class Groups(NamedTuple):
    """Training answers: indices into `ANSWERS`, int64 [P, K], and rewards as a judge with some noise gives them."""

    answers: Tensor
    rewards: Tensor


def true_rewards(prompts: Tensor) -> Tensor:
    """The reward of every answer, 0 to 10: mean closeness to the prompt backwards. [P, L] → [P, C]."""
    return CLOSENESS[(ANSWERS[None] - prompts.flip(1)[:, None]) % SYMBOLS].mean(2)


@torch.no_grad()
def all_logps(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """log π of every answer, by one forward of each prefix of three symbols. [P, L] → float64 [P, C]."""
    prefixes = ANSWERS[::SYMBOLS, :-1]
    parts = []
    for part in prompts.split(16):
        said = prefixes.repeat(len(part), 1)
        ids = torch.cat([part.repeat_interleave(len(prefixes), 0), said], 1)
        logps = model.eval()(input_ids=ids).logits[:, LENGTH - 1 :].double().log_softmax(-1)
        of_prefix = logps[:, :-1].gather(2, said[..., None]).sum((1, 2))
        parts.append((of_prefix[:, None] + logps[:, -1]).view(len(part), -1))
    return torch.cat(parts)


@lru_cache(maxsize=8)
def make_world(seed: int, quick: bool = False) -> World:
    """Reference and prompts of one seed; the same for the same seed. `quick` makes them too small to learn anything."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ANSWERS), generator=draw)
    seen, judged, steps = (8, 4, 3) if quick else (480, 48, 1000)
    prompts, held_out = ANSWERS[order[:seen]], ANSWERS[order[seen : seen + judged]]
    model = tiny_llama(SYMBOLS, seed, hidden=16 if quick else 64, layers=1 if quick else 2)
    batches = []
    for _ in range(steps):
        asked = prompts[torch.randint(seen, (2 * PROMPTS_PER_STEP,), generator=draw)]
        off = torch.multinomial(FIRST_DRAFT, asked.numel(), replacement=True, generator=draw).view_as(asked)
        batches.append(make_batch(asked, (asked.flip(1) + off) % SYMBOLS))
    train(model, batches, "mle", lr=3e-3, steps=steps, schedule="cosine")
    known, judged_logps = all_logps(model, prompts), all_logps(model, held_out)
    return World(model, prompts, known, held_out, judged_logps, 4 if quick else 90)


def make_batch(prompts: Tensor, answers: Tensor) -> Batch:
    """[B, L], [B, L] → input ids and labels [B, 2L]."""
    ids = torch.cat([prompts, answers], 1)
    return {"input_ids": ids, "labels": torch.cat([torch.full_like(prompts, IGNORE), answers], 1)}


def draw_groups(world: World, tilts: Sequence[float], seed: int, noise: float = 1.0) -> Groups:
    """K different answers to each prompt, the k-th from π_ref(y) exp(tilt_k · reward): as if by K models. [P, K]."""
    draw = torch.Generator().manual_seed(seed)
    rewards, logps = true_rewards(world.prompts), world.logps.clone()
    drawn = []
    for tilt in tilts:
        drawn.append(torch.multinomial((logps + tilt * rewards).softmax(1), 1, generator=draw))
        logps.scatter_(1, drawn[-1], -torch.inf)
    answers = torch.cat(drawn, 1)
    return Groups(answers, rewards.gather(1, answers) + noise * torch.randn(answers.shape, generator=draw))


def by_rank(groups: Groups) -> Groups:
    """Each group's answers from the best to the worst, as judged. [P, K]."""
    order = groups.rewards.argsort(1, descending=True)
    return Groups(groups.answers.gather(1, order), groups.rewards.gather(1, order))


def judge(world: World, step: int, logps: Tensor) -> Point:
    """Expected true reward and KL(π‖π_ref) on the held-out prompts, from log π of every answer to them, [P', C]."""
    reward = (logps.exp() * true_rewards(world.held_out)).sum(1).mean()
    kl = (logps.exp() * (logps - world.held_out_logps)).sum(1).mean()
    return Point(step, float(reward), float(kl))


def align(
    world: World, method: Method, groups: Groups, *, rate: float, seed: int, choice: int | None = None, points: int = 3
) -> tuple[list[Point], PreTrainedModel]:
    """Train a copy of the reference for `world.steps` updates of 32 prompts each.

    Args:
        world: reference and prompts.
        method: what to train with.
        groups: training answers of `world.prompts`, and rewards as judged.
        rate: learning rate at the start; it falls to a tenth, so that the last update is no outlier.
        seed: of the order of the prompts, and of what the objective draws.
        choice: seed of `method.pick`; default: `seed`.
        points: how often the policy is judged, the last time after the last update.

    Returns:
        The points on the way, the reference's at the front, and the policy.
    """
    answers, model = groups.answers, clone(world.model)
    options = dict(method.options)
    if "generator" in (OBJECTIVES[method.objective].options or ()):
        options["generator"] = torch.Generator().manual_seed(seed)
    if method.pick is None:
        options["group_size"] = answers.shape[1]
    else:
        answers = method.pick(*groups, torch.Generator().manual_seed(seed if choice is None else choice))
    batches = []
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
    for some in order.split(PROMPTS_PER_STEP):
        rows, of_row = answers[some], some[:, None].expand(-1, answers.shape[1])
        if method.pick is not None:
            rows, of_row = rows.T, of_row.T  # [chosen; rejected]
        batch = make_batch(world.prompts[of_row.reshape(-1)], ANSWERS[rows.reshape(-1)])
        batches.append(batch if method.pick is not None else {**batch, "rewards": groups.rewards[some]})
    stops = {round(world.steps * (i + 1) / points) for i in range(points)}
    path = [judge(world, 0, world.held_out_logps)]

    def look(step: int) -> None:
        if step in stops:
            path.append(judge(world, step, all_logps(model, world.held_out)))

    train(
        model, batches, method.objective,
        ref_model=world.model, lr=rate, steps=world.steps, schedule="cosine", each=look, **options,
    )  # fmt: skip
    return path, model


class Trials(NamedTuple):
    """Runs of one method: its learning rate, and per seed the points on the way and the policy."""

    rate: float
    paths: list[list[Point]]
    models: list[PreTrainedModel]

    @property
    def final(self) -> list[float]:
        """Expected reward at the end, per seed."""
        return [path[-1].reward for path in self.paths]


def compare(
    methods: Mapping[str, tuple[Method, Callable[[World, int], Groups]]],
    *,
    seeds: int,
    quick: bool,
    progress: bool,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Trials]:
    """Every method from the same references, each with its own best learning rate.

    Args:
        methods: name → method and what makes its answers from a world and a seed.
        seeds: how many worlds.
        quick: tiny worlds.
        progress: whether a line on stderr shows how far it is.
        rates: learning rates that are known already, by name.
    """
    found = {}
    for name, (method, make) in methods.items():
        rate = (rates or {}).get(name) or best_rate(method, make, quick, name if progress else None)
        paths, models = [], []
        for seed in range(seeds):
            say(progress, f"{name}: seed {seed + 1}/{seeds}")
            world = make_world(seed, quick)
            path, model = align(world, method, make(world, seed), rate=rate, seed=seed)
            paths.append(path)
            models.append(model)
        found[name] = Trials(rate, paths, models)
    say(progress, "")
    return found


def best_rate(
    method: Method, make: Callable[[World, int], Groups], quick: bool = False, progress: str | None = None
) -> float:
    """The learning rate whose policy has the highest expected reward at the end, in the world made for this choice."""
    world = make_world(TUNING, quick)
    groups, final = make(world, TUNING), {}
    for rate in RATES:
        say(progress is not None, f"{progress}: learning rate {rate:g}")
        final[rate] = align(world, method, groups, rate=rate, seed=TUNING, points=1)[0][-1].reward
    return max(RATES, key=lambda rate: final[rate])


def reward_at(path: Sequence[Point], kl: float) -> float:
    """The expected reward where the policy's KL divergence first reached `kl`, by linear interpolation."""
    for a, b in pairwise(path):
        if b.kl >= kl:
            share = (kl - a.kl) / (b.kl - a.kl) if b.kl > a.kl else 1.0
            return a.reward + share * (b.reward - a.reward)
    return path[-1].reward


def at_shared_kl(found: Mapping[str, Trials]) -> dict[str, list[float]]:
    """Each method's expected reward at the largest KL divergence that all methods reach, per seed."""
    out: dict[str, list[float]] = {name: [] for name in found}
    for paths in zip(*(trials.paths for trials in found.values())):
        kl = min(max(point.kl for point in path) for path in paths)
        for name, path in zip(found, paths):
            out[name].append(reward_at(path, kl))
    return out


def table(found: Mapping[str, Trials]) -> list[list[str]]:
    """A row for each method, header first."""
    shared = at_shared_kl(found)
    rows = [["method", "learning rate", "expected reward", "sd over seeds", "KL from the reference", "at equal KL"]]
    start = [path[0].reward for path in next(iter(found.values())).paths]
    rows.append(["reference", "–", spread(start), f"{_sd(start):.2g}", "0", spread(start)])
    for name, trials in found.items():
        kl = spread([path[-1].kl for path in trials.paths])
        final = trials.final
        rows.append([name, f"{trials.rate:g}", spread(final), f"{_sd(final):.2g}", kl, spread(shared[name])])
    return rows


def picture(found: Mapping[str, Trials], title: str) -> Figure:
    """Left: expected reward against KL on the way, mean over the seeds. Right: the ends, seed by seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, trials) in enumerate(found.items()):
        colour = f"C{number % 10}"
        kl = [fmean(point.kl for point in at) for at in zip(*trials.paths)]
        reward = [fmean(point.reward for point in at) for at in zip(*trials.paths)]
        left.plot(kl, reward, "o-" if number < 10 else "s--", color=colour, markersize=4, label=name)
        right.scatter(trials.final, [number] * len(trials.final), color=colour, s=16)
        right.scatter([fmean(trials.final)], [number], color=colour, marker="|", s=300)
    left.set(xlabel="KL(policy ‖ reference)", ylabel="expected reward, 0 to 10", title=title)
    right.set(xlabel="expected reward at the end; bar: mean", yticks=range(len(found)), yticklabels=list(found))
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def settings(**own: Any) -> dict[str, Any]:
    """What the scripts of this task have in common, and their own."""
    return {
        "task": "4 symbols of 5; the best answer is the prompt backwards; reward 0 to 10; 625 answers, all enumerated",
        "model": "Llama, 2 layers, width 64",
        "prompts": "480, and 48 held out",
        "updates": "90 of 32 prompts, learning rate down to a tenth (cosine)",
        "learning rates": f"each method's best of {list(RATES)} in one other world, by the expected reward at the end",
        **own,
    }


def say(progress: bool, text: str) -> None:
    """A line on stderr that the next one replaces."""
    if progress:
        print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)
