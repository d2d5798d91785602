"""The parts on certified skipping: on a made-up peaked distribution, and on what a language model has learnt.

Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rgpb.bench import cases
from rgpb.bench.cases import TOLERANCE, Batch, Result, Shape
from rgpb.bench.measure import quantiles
from rgpb.fused import fused_loss
from rgpb.objectives import OBJECTIVES

from . import language
from .device import LLAMA
from .heads import ratio, timed
from .journal import Journal, Settings, Task, explain, release
from .lineup import exact, graded, kernels_for, keywords, plan_of

TOLERANCES: tuple[float | str, ...] = (1e-5, 1e-4, 1e-3, 1e-2, "auto")
LOSSES = ("bnf", "mle")
PEAKED = {"cuda": LLAMA, "cpu": ("peaked", 2048, 256, 32768, None)}
TOKENS = {"cuda": 8192, "cpu": 2048}  # N, of held-out text


def peaked_batch(shape: Shape, device: str, seed: int = 0) -> Batch:
    """A head that has been trained, in outline: Zipf-distributed words, most of them predicted with confidence.

    The logit of word k is log frequency + a little noise; that of the target is 2 … 18 above. A common direction of the
    states carries the frequencies, a target's own row the confidence. Words are in random order, as in a vocabulary
    that wasn't sorted. In bfloat16.
    """
    tokens, width, vocab = shape
    length = max(t for t in range(1, cases.LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)
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
    hidden, weight = (x.bfloat16().contiguous() for x in (hidden.view(-1, length, width), weight))
    target = target.view(-1, length)
    logp = language.exact_logp(hidden, weight, target)
    ref = (logp + 0.3 * normal(*target.shape)).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, ref.new_zeros(0, 2), logp)


class Subject:
    """A batch, its answers in float64, and the library's own without skipping; each made when first asked for.

    Attributes:
        facts: what its rows say of it.
    """

    def __init__(self, make: Callable[[], Batch], settings: Settings, facts: Callable[[Batch], dict[str, Any]]):
        self.make, self.settings, self.describe = make, settings, facts
        self.known: dict[Any, Result] = {}

    @cached_property
    def batch(self) -> Batch:
        """The inputs."""
        return self.make()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """N, H and V, and what else tells this batch from others."""
        b = self.batch
        return {**self.describe(b), "tokens": b.target.numel(), "width": b.weight.shape[1], "vocab": len(b.weight)}

    def truth(self, loss: str) -> Result:
        """In float64."""
        b = self.batch
        return self._kept((loss,), lambda: exact(loss, b.hidden, cases.LMHead(b.weight), b.target, b.ref, b.label))

    def plain(self, loss: str, kernels: str) -> Result:
        """Without skipping."""
        return self._kept((loss, kernels), lambda: self.call(loss, kernels)[0])

    def _kept(self, key: tuple[str, ...], make: Callable[[], Result]) -> Result:
        if key not in self.known:
            self.known = {other: value for other, value in self.known.items() if other == key[:1]}
            self.known[key] = make()
        return self.known[key]

    def call(self, loss: str, kernels: str, **more: Any) -> tuple[Result, Tensor | None, float | None]:
        """Value and gradients; of what was skipped each row's bound [N], and its share."""
        b, spec = self.batch, OBJECTIVES[loss]
        value, metrics = fused_loss(
            b.hidden, b.weight, b.target, objective=loss, label=b.label if spec.label else None,
            ref=None if spec.ref is None else b.ref, workspace=self.settings.workspaces[0], return_metrics=True,
            **keywords(kernels), **more,
        )  # fmt: skip
        made = graded(value, b.hidden, b.weight)
        if not more:
            return made, None, None
        return made, metrics["skipped/bound"].flatten(), float(metrics["skipped/share"])  # NaN before the backward


def skip(journal: Journal, settings: Settings) -> Iterator[Task]:
    """What a tolerance on the gradient saves, what it costs, and what sorting the vocabulary adds."""
    name, *sizes, _ = settings.shapes[0] if settings.shapes else PEAKED[settings.device]
    shape = Shape(*sizes)  # type: ignore[arg-type]
    subject = Subject(partial(peaked_batch, shape, settings.device), settings, lambda batch: {})
    yield from rows_of(f"{name} | {shape}", subject, TOLERANCES)


def trained(journal: Journal, settings: Settings) -> Iterator[Task]:
    """The same on held-out text under a language model, at stages of its training; the last with all tolerances.

    The model is `settings.model`; without one it is trained beside the results, or was there in an earlier run.
    """
    device, given = settings.device, settings.shapes[0] if settings.shapes else None
    scale, tokens = language.SCALES[device], TOKENS[device] if given is None else given[1]
    if given is not None:
        scale = scale._replace(width=given[2], vocab=given[3])
    if settings.steps is not None:
        scale = scale._replace(steps=settings.steps)
    corpus = language.read_corpus(settings.text or language.sources(), scale.text)
    if settings.model is None:
        stages = language.train_stages(journal.path.parent / "language-model", corpus, scale, tokens, device)
    else:
        stages = [language.given_model(settings.model)]
    for stage in stages:
        make = partial(language.states_batch, stage.folder, stages[0].folder, corpus.held_out, tokens, device)
        title, known = f"{stage.folder} {language.changed(stage.folder)}", {}
        if stage.steps is not None:
            title, known = f"{language.described(scale)} | after {stage.steps}", {"steps": stage.steps}

        def facts(batch: Batch, known: dict[str, int] = known) -> dict[str, Any]:
            return {**known, **language.peakedness(batch)}

        tolerances = TOLERANCES if stage is stages[-1] else ("auto",)
        yield from rows_of(f"{title} | N = {tokens} of {corpus.digest}", Subject(make, settings, facts), tolerances)
        release(device)


def rows_of(title: str, subject: Subject, tolerances: tuple[float | str, ...]) -> Iterator[Task]:
    """A row without skipping, and two for each tolerance: with the vocabulary as it is and sorted."""
    for loss in LOSSES:
        for kernels in kernels_for(subject.settings.device):
            for tolerance in (None, *tolerances):
                for sort in (False, True) if tolerance is not None else (False,):
                    how = f"{loss} | {kernels} | {tolerance} | sorted={sort}"
                    key = f"{title} | {subject.settings.workspaces[0]} | {how}"
                    yield Task(key, partial(skip_row, subject, loss, kernels, tolerance, sort))


def skip_row(subject: Subject, loss: str, kernels: str, tolerance: float | str | None, sort: bool) -> dict[str, Any]:
    """One tolerance: the share skipped, its bound, the error that it made, and the time.

    A row of ∂L/∂logits lacks at most `bound` in the L1 norm, so dW lacks at most Σ bound ‖x‖ in the Frobenius norm.
    Right means: dX off float64 by its usual tolerance; dW by that and no more than Σ bound ‖x‖ beside it, and off the
    dW without skipping by no more than Σ bound ‖x‖ and the roundings of both.

    units: products of 2 · N · V · H flops, of the plan less what is left out of its second sweep. bound: the largest of
    a row. certified: Σ bound ‖x‖; off: the difference from no skipping; both over ‖dW‖.
    """
    row: dict[str, Any] = {
        "loss": loss, "kernels": kernels, "tolerance": tolerance, "sorted": sort, "status": "ok", "path": None,
        "units": None, "share": None, "bound": None, "certified": None, "off": None, "off_largest": None,
        "value_error": None, "dX_error": None, "dW_error": None, "seconds": None, "seconds_20": None,
        "seconds_80": None, "over_none": None,
    }  # fmt: skip
    more: dict[str, Any] = {} if tolerance is None else {"grad_tolerance": tolerance, "sort_vocab": sort}
    try:
        row = {**subject.facts, **row}
        b, workspace = subject.batch, subject.settings.workspaces[0]
        how = {**keywords(kernels), **more}
        plan = plan_of(b.hidden, cases.LMHead(b.weight), b.target, loss, "mean", workspace, how)
        made, bound, row["share"] = subject.call(loss, kernels, **more)
        row |= {"path": plan.path, "units": plan.units - 2 * (row["share"] or 0.0)}  # the logits again, and dW
        truth = subject.truth(loss)
        size = truth.gradients[1].norm()
        row["value_error"], _, row["dX_error"] = cases.errors(made._replace(gradients=made.gradients[:1]), truth)
        row["dW_error"] = off_by(made.gradients[1], truth.gradients[1])[0] / size.item()
        value_most, most = TOLERANCE["fused", torch.bfloat16]
        fine, certified = row["value_error"] <= value_most and row["dX_error"] <= most, 0.0
        if bound is not None:
            certified = ((bound.double() * b.hidden.detach().double().flatten(0, 1).norm(dim=1)).sum() / size).item()
            off, largest = off_by(made.gradients[1], subject.plain(loss, kernels).gradients[1])
            row |= {"bound": bound.max().item(), "certified": certified, "off": off / size.item()}
            row["off_largest"] = largest
            fine = fine and row["off"] <= certified + 2 * torch.finfo(torch.bfloat16).eps
        del made
        if not (fine and row["dW_error"] <= most + certified):
            return row | {"status": "FAILED"}
        release(subject.settings.device)
        runs: dict[Any, Callable[[], object]] = {"this": partial(subject.call, loss, kernels, **more)}
        if more:
            runs["none"] = partial(subject.call, loss, kernels)
        times, _ = timed(runs, subject.settings)
        row |= dict(zip(("seconds", "seconds_20", "seconds_80"), quantiles(times["this"])))
        if more:
            row["over_none"] = ratio(times["this"], times["none"])
        return row
    except Exception as error:
        status = explain(error)
    return row | {"status": status}


def off_by(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The Frobenius norm and the largest entry of the difference."""
    difference = one.double() - other.double()
    return difference.norm().item(), difference.abs().max().item()
