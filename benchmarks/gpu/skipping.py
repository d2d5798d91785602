"""Certified skipping, on a made-up peaked distribution and on what a language model has learnt.

Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import language
from rgpb.bench import contest
from rgpb.bench.contest import TOLERANCE, Batch, Job, Shape, finished, graded, length_of
from rgpb.bench.measure import Result, explain, interleaved, release
from rgpb.fused import fused_loss
from rgpb.objectives import OBJECTIVES

from .calls import LLAMA, ROW_SECONDS
from .journal import Journal, Settings, Task, single
from .peers import kernels_for

TOLERANCES: tuple[float | str, ...] = (1e-5, 1e-4, 1e-3, 1e-2, "auto")
LOSSES = ("bnf", "mle")
PEAKED = {"cuda": LLAMA[0], "cpu": ("peaked", 2048, 256, 32768, None)}
TOKENS = {"cuda": 8192, "cpu": 2048}  # N, of held-out text


def peaked_batch(shape: Shape, device: str, seed: int = 0) -> Batch:
    """A head that has been trained, in outline: Zipf-distributed words, most of them predicted with confidence.

    The logit of word k is log frequency + a little noise; that of the target is 2 … 18 above. A common direction of the
    states carries the frequencies, a target's own row the confidence. Words are in random order, as in a vocabulary
    that wasn't sorted. In bfloat16.
    """
    tokens, width, vocab = shape
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    rank = torch.randperm(vocab, generator=random, device=device) + 1.0
    common = torch.nn.functional.normalize(normal(width), dim=0)
    weight = normal(vocab, width) / width**0.5 - rank.log()[:, None] * common / 4
    target = torch.multinomial(1 / rank, tokens, replacement=True, generator=random)
    confidence = 2 + 16 * torch.rand(tokens, 1, generator=random, device=device)
    own = weight[target] - (weight[target] @ common)[:, None] * common
    hidden = 4 * common + confidence * torch.nn.functional.normalize(own, dim=1) + 0.5 * normal(tokens, width)
    length = length_of(tokens)
    return finished(hidden.view(-1, length, width).bfloat16(), weight.bfloat16(), target.view(-1, length), random)


class Subject:
    """A batch, its answers in float64, and the library's own without skipping; each made when first asked for."""

    def __init__(self, make: Callable[[], Batch], settings: Settings, known: dict[str, Any]):
        self.make, self.settings, self.more = make, settings, known
        self.known: dict[Any, Result] = {}

    @cached_property
    def batch(self) -> Batch:
        """The inputs."""
        return self.make()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its rows say of it: N, H and V, and how peaked it is, by the perplexity of the targets and the part of
        them that have more than nine tenths of the probability."""
        b = self.batch
        sizes = {"tokens": b.target.numel(), "width": b.weight.shape[1], "vocab": len(b.weight)}
        confident = (b.logp > -0.10536).double().mean().item()
        return {**self.more, "perplexity": (-b.logp).mean().exp().item(), "confident": confident, **sizes}

    def kept(self, key: tuple[str, ...], make: Callable[[], Result]) -> Result:
        """What `make` gives, made once; the answers to one loss are held at a time."""
        if key not in self.known:
            self.known = {other: value for other, value in self.known.items() if other == key[:1]}
            self.known[key] = make()
        return self.known[key]

    def call(self, loss: str, kernels: str, **more: Any) -> tuple[Result, dict[str, Tensor]]:
        """Value and gradients, and the metrics of what was skipped."""
        b, spec = self.batch, OBJECTIVES[loss]
        value, metrics = fused_loss(
            b.hidden, b.weight, b.target, objective=loss, label=b.label if spec.label else None,
            ref=None if spec.ref is None else b.ref, workspace=self.settings.workspaces[0], return_metrics=True,
            impl=kernels, **more,
        )  # fmt: skip
        return graded(value, b.hidden, b.weight), metrics


def skip(journal: Journal) -> Iterator[Task]:
    """What a tolerance on the gradient saves, what it costs, and what sorting the vocabulary adds."""
    settings = journal.settings
    name, tokens, width, vocab, _ = (settings.shapes or (PEAKED[settings.device],))[0]
    shape = Shape(tokens, width, vocab)
    subject = Subject(partial(peaked_batch, shape, settings.device), settings, {})
    yield from rows_of(f"{name} | {shape}", subject, TOLERANCES)


def trained(journal: Journal) -> Iterator[Task]:
    """The same on held-out text under a language model, at stages of its training; the last with all tolerances.

    The model is `settings.model`; without one it is trained beside the results, or was there in an earlier run.
    """
    settings = journal.settings
    device, given = settings.device, settings.shapes[0] if settings.shapes else None
    scale, tokens = language.SCALES[device], TOKENS[device] if given is None else given[1]
    if given is not None:
        scale = scale._replace(width=given[2], vocab=given[3])
    if settings.steps is not None:
        scale = scale._replace(steps=settings.steps)
    corpus = language.read_corpus(settings.text or language.sources(), scale.text)
    stages: dict[Any, Any] = {None: settings.model}
    if settings.model is None:
        beside = journal.path.parent / "language-model"
        stages = dict(language.train_stages(beside, corpus, scale, tokens, device))
    first, last = next(iter(stages.values())), [*stages][-1]
    for steps, folder in stages.items():
        make = partial(language.states_batch, folder, first, corpus[1], tokens, device)
        subject = Subject(make, settings, {} if steps is None else {"steps": steps})
        title = f"{scale} | after {steps}"
        if steps is None:  # what isn't a model is known here; and one that has changed since is another
            title = f"{folder} {subject.batch.logp.mean().item()}"
        yield from rows_of(
            f"{title} | N = {tokens} of {corpus[2]}", subject, TOLERANCES if steps == last else ("auto",)
        )
        release(device)


def rows_of(title: str, subject: Subject, tolerances: tuple[float | str, ...]) -> Iterator[Task]:
    """A row without skipping, and two for each tolerance: with the vocabulary as it is and sorted."""
    for loss in LOSSES:
        for kernels in kernels_for(subject.settings.device):
            for tolerance in (None, *tolerances):
                for sort in (False, True) if tolerance is not None else (False,):
                    key = (
                        f"{title} | {subject.settings.workspaces[0]} | {loss} | {kernels} | {tolerance} | sorted={sort}"
                    )
                    yield single(key, partial(skip_row, subject, loss, kernels, tolerance, sort))


def skip_row(subject: Subject, loss: str, kernels: str, tolerance: float | str | None, sort: bool) -> dict[str, Any]:
    """One tolerance: the share skipped, its bound, the error that it made, and the time.

    A row of ∂L/∂logits lacks at most `bound` in the L1 norm, so dW lacks at most Σ bound ‖x‖ in the Frobenius norm, and
    dX at most ‖bound‖ max ‖w‖. Right means: both are off float64 by their usual tolerance and no more than that, and
    dW off the one without skipping by no more than Σ bound ‖x‖ and the roundings of both.

    units: products of 2 · N · V · H flops, of the plan less what is left out. bound: the largest of a row. certified:
    Σ bound ‖x‖; off: the difference from no skipping; both over ‖dW‖.
    """
    row: dict[str, Any] = {
        "loss": loss, "kernels": kernels, "tolerance": tolerance, "sorted": sort, "status": "ok", "path": None,
        "units": None, "share": None, "bound": None, "certified": None, "off": None, "value_error": None,
        "dX_error": None, "dW_error": None, "seconds": None, "seconds_20": None, "seconds_80": None, "over_none": None,
    }  # fmt: skip
    more: dict[str, Any] = {} if tolerance is None else {"grad_tolerance": tolerance, "sort_vocab": sort}
    settings = subject.settings
    try:
        row, b = {**subject.facts, **row}, subject.batch
        job, how = Job(loss, "full"), {"impl": kernels, **more}
        plan = contest.on_path(b, job, "auto", settings.workspaces[0], **how)[1]
        made, metrics = subject.call(loss, kernels, **more)
        row["share"] = float(metrics["skipped/share"]) if more else None  # NaN before the backward
        row |= {"path": plan.path, "units": plan.units - (3 if plan.path == "two_pass" else 2) * (row["share"] or 0.0)}
        truth = subject.kept((loss,), lambda: contest.exact(b, job))
        size = truth.gradients[1].norm()
        row["value_error"], _, row["dX_error"] = contest.errors(made._replace(gradients=made.gradients[:1]), truth)
        row["dW_error"] = ((made.gradients[1].double() - truth.gradients[1]).norm() / size).item()
        value_most, most = TOLERANCE["fused", torch.bfloat16]
        fine, certified, rows_most = row["value_error"] <= value_most, 0.0, most
        if more:
            bound = metrics["skipped/bound"].flatten().double()
            certified = ((bound * b.hidden.detach().double().flatten(0, 1).norm(dim=1)).sum() / size).item()
            widest = b.weight.detach().norm(dim=1).max().double()
            rows_most += (bound.norm() * widest / truth.gradients[0].norm()).item()
            plain = subject.kept((loss, kernels), lambda: subject.call(loss, kernels)[0]).gradients[1]
            off = ((made.gradients[1].double() - plain.double()).norm() / size).item()
            row |= {"bound": bound.max().item(), "certified": certified, "off": off}
            fine = fine and off <= certified + 2 * torch.finfo(torch.bfloat16).eps
        del made
        if not (fine and row["dX_error"] <= rows_most and row["dW_error"] <= most + certified):
            return row | {"status": "FAILED"}
        release(settings.device)
        runs: dict[str, Callable[[], object]] = {"this": partial(subject.call, loss, kernels, **more)}
        runs |= {"none": partial(subject.call, loss, kernels)} if more else {}
        times = interleaved(runs, settings.rounds, settings.device, ROW_SECONDS)
        row |= dict(zip(("seconds", "seconds_20", "seconds_80"), times.quantiles("this")))
        return row | {"over_none": times.over("this", "none") if more else None}
    except Exception as error:
        status = explain(error)
    return row | {"status": status}
