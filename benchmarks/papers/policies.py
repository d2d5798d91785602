"""A generated task whose policies are judged exactly: all answers to a prompt are enumerated.

A prompt is four symbols of five, an answer as well, and the best answer is the prompt backwards. The reward of an
answer, 0 to 10, is how close its symbols come to that on the circle of symbols. A small Llama is first fitted to
answers that are right in each place with probability 0.4; it is the reference and the start of every policy. With 625
answers to a prompt, a policy's expected reward and its KL divergence from the reference are sums, not samples.

Dimensions: P prompts, L symbols of a prompt or an answer, C = 625 answers, K answers of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgpb.objectives import OBJECTIVES

from .judge import Values
from .models import IGNORE, LOG, Batch, add, tiny_llama, train
from .worlds import Data, World

SYMBOLS, LENGTH = 5, 4
ANSWERS = torch.tensor(list(product(range(SYMBOLS), repeat=LENGTH)))  # [C, L], in lexicographic order
CLOSENESS = torch.tensor([10.0, 5.0, 0.0, 0.0, 5.0])  # by the difference of two symbols on the circle
FIRST_DRAFT = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.2])  # likewise, probabilities of what the reference is fitted to
RATES = (3e-4, 1e-3, 3e-3)  # each method takes its own best of these
PROMPTS_PER_STEP = 32
TUNING = 1000  # the seed of the task that learning rates are chosen on, no seed of a result


class Task(NamedTuple):
    """What all methods of one seed share."""

    model: PreTrainedModel  # the reference
    prompts: Tensor  # [P, L], those with training answers
    logps: Tensor  # log π_ref of every answer to them, float64 [P, C]
    held_out: Tensor  # [P', L], those that policies are judged on
    held_out_logps: Tensor  # float64 [P', C]
    steps: int  # updates of a run


class Method(NamedTuple):
    """An objective with options (a generator is added where it has that option), and the rows that it is given.

    `pick`: (answers [P, K], rewards [P, K], generator) → [P, 2], chosen and rejected; None for whole groups.
    """

    objective: str
    options: Mapping[str, Any] = {}
    pick: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None


class Policy(NamedTuple):
    """A trained model, judged on held-out prompts."""

    model: PreTrainedModel
    reward: float  # expected true reward
    kl: float  # KL(π‖π_ref)
    before: float  # the reference's expected true reward


Trials = tuple[float, list[Policy]]  # a method's learning rate, and its policy for each seed
Groups = tuple[Tensor, Tensor]  # answers, indices into `ANSWERS`, int64 [P, K], and rewards as a noisy judge gives them
Maker = Callable[[Task, int], Groups]


def backwards(data: Data, seeds: int, quick: bool) -> World:
    """Four symbols of five to be said backwards, reward 0 to 10; policies are judged exactly, over all 625 answers."""
    return World(seeds, quick)


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


@cache
def make_task(seed: int, quick: bool = False) -> Task:
    """Reference and prompts of one seed; the same for the same seed."""
    LOG.info("backwards, seed %d", seed)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ANSWERS), generator=draw)
    seen, judged, steps = (8, 4, 3) if quick else (480, 48, 1000)
    prompts, held_out = ANSWERS[order[:seen]], ANSWERS[order[seen : seen + judged]]
    model = tiny_llama(SYMBOLS, seed, quick)
    batches = []
    for _ in range(steps):
        asked = prompts[torch.randint(seen, (2 * PROMPTS_PER_STEP,), generator=draw)]
        off = torch.multinomial(FIRST_DRAFT, asked.numel(), replacement=True, generator=draw).view_as(asked)
        batches.append(_batch(asked, (asked.flip(1) + off) % SYMBOLS))
    train(model, batches, "mle", lr=3e-3, steps=steps, schedule="cosine")
    known, judged_logps = all_logps(model, prompts), all_logps(model, held_out)
    return Task(model, prompts, known, held_out, judged_logps, 4 if quick else 90)


def _batch(prompts: Tensor, answers: Tensor) -> Batch:
    labels = torch.cat([torch.full_like(prompts, IGNORE), answers], 1)
    return {"input_ids": torch.cat([prompts, answers], 1), "labels": labels}


def draw_groups(task: Task, seed: int, tilts: Sequence[float] = (0.0, 0.1, 0.2, 0.3)) -> Groups:
    """K answers to each prompt, the k-th from π_ref(y) exp(tilt_k · reward), as if by K models; noise has sd 1."""
    draw = torch.Generator().manual_seed(seed)
    rewards, logps = true_rewards(task.prompts), task.logps.clone()
    drawn = []
    for tilt in tilts:
        drawn.append(torch.multinomial((logps + tilt * rewards).softmax(1), 1, generator=draw))
        logps.scatter_(1, drawn[-1], -torch.inf)
    answers = torch.cat(drawn, 1)
    return answers, rewards.gather(1, answers) + torch.randn(answers.shape, generator=draw)


def align(task: Task, method: Method, groups: Groups, *, rate: float, seed: int, choice: int | None = None) -> Policy:
    """Train a copy of the reference.

    The learning rate falls to a tenth, so that the last update is no outlier. `seed` is that of the order of the
    prompts and of what the objective draws; `choice`, by default the same, that of `method.pick`.
    """
    (answers, rewards), model = groups, deepcopy(task.model)
    options = dict(method.options)
    if "generator" in (OBJECTIVES[method.objective].options or ()):
        options["generator"] = torch.Generator().manual_seed(seed)
    if method.pick is None:
        options["group_size"] = answers.shape[1]
    else:
        answers = method.pick(answers, rewards, torch.Generator().manual_seed(seed if choice is None else choice))
    batches = []
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
    for some in order.split(PROMPTS_PER_STEP):
        rows, of_row = answers[some], some[:, None].expand(-1, answers.shape[1])
        if method.pick is not None:
            rows, of_row = rows.T, of_row.T  # [chosen; rejected]
        batch = _batch(task.prompts[of_row.reshape(-1)], ANSWERS[rows.reshape(-1)])
        batches.append(batch if method.pick is not None else {**batch, "rewards": rewards[some]})
    options |= {"ref_model": task.model, "lr": rate, "steps": task.steps, "schedule": "cosine"}
    train(model, batches, method.objective, **options)
    logps, true = all_logps(model, task.held_out), true_rewards(task.held_out)
    reward, before = (float((x.exp() * true).sum(1).mean()) for x in (logps, task.held_out_logps))
    return Policy(model, reward, float((logps.exp() * (logps - task.held_out_logps)).sum(1).mean()), before)


def best_rate(method: Method, make: Maker, quick: bool) -> float:
    """The learning rate whose policy has the highest expected reward at the end, in the task made for this choice."""
    task = make_task(TUNING, quick)
    groups = make(task, TUNING)
    final = {rate: align(task, method, groups, rate=rate, seed=TUNING).reward for rate in RATES}
    return max(RATES, key=lambda rate: final[rate])


def compare(world: World, methods: Mapping[str, Method], make: Maker, rate: float | None = None) -> dict[str, Trials]:
    """Every method from the same references, on answers from `make`, with `rate` or its own best learning rate."""
    found = {}
    for name, method in methods.items():
        LOG.info("%s", name)
        at = rate or best_rate(method, make, world.quick)
        tasks = [make_task(seed, world.quick) for seed in range(world.seeds)]
        its = [align(task, method, make(task, seed), rate=at, seed=seed) for seed, task in enumerate(tasks)]
        found[name] = at, its
    return found


def measured(found: Mapping[str, Trials]) -> tuple[Values, dict[str, Any]]:
    """Expected reward and KL of each method and of the reference; and the learning rates."""
    values: Values = {}
    for name, (_, policies) in found.items():
        for policy in policies:
            if name == next(iter(found)):
                add(values, "reference", {"expected reward": policy.before, "KL from the reference": 0.0})
            add(values, name, {"expected reward": policy.reward, "KL from the reference": policy.kl})
    return values, {"learning rate": {name: rate for name, (rate, _) in found.items()}}
