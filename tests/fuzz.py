"""Random calls of the losses and scores against the dense float64 oracle, and a soak.

    python tests/fuzz.py --cases 100000 [--start 0] [--impls torch,cpp]
    TRITON_INTERPRET=1 python tests/fuzz.py --cases 2000 --impls triton,tiled
    python tests/fuzz.py --soak 50000

A case is drawn from its seed alone. One that fails is made smaller while it still fails, and printed as a program;
`fuzz_cases.txt` keeps those that found something, and `test_fuzz.py` replays them.

Budget: as `engine_suite.assert_in_budget`; where that is too tight, since naive PyTorch was lucky, what relative
changes of all inputs by one rounding do to the exact result, some times over.

Dimensions: B responses, T padded length, N packed length, V vocabulary, H hidden size, r columns beside W, G groups of
K responses.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from engine_suite import IMPLS, NAMES, ref_scores
from torch import Tensor

from rgpb import OBJECTIVES, LMHead, Workspace, fused_loss, linear_logprob, reference
from rgpb.head import HeadWeight, Quantised
from rgpb.objectives.ranges import Between, OneOf
from rgpb.objectives.registry import Option

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAIRS = [name for name in NAMES if OBJECTIVES[name].unit == "pair"]
FIELDS = ("logp", "log_odds", "lse", "entropy", "other_entropy")
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "with room": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "sliced": lambda x: torch.cat([x[:1], x])[1 if len(x) else 0 :],
    "expanded": lambda x: x[:1].expand(x.shape),
}
REFUSAL = re.compile(r"[\w.*+ ]+: expected .+ got .+", re.DOTALL)
SPOILS = (
    "option", "unknown option", "target", "hidden", "weight", "shape", "label", "no label", "no ref", "more ref",
    "rewards", "cu_seqlens", "reduction", "impl", "temperature", "softcap", "workspace", "path", "ref", "twice",
)  # fmt: skip
SENSITIVE = 16  # so many times what one rounding of the inputs does


class Wrong(Exception):
    """What a call did isn't what it should do."""


@dataclass(frozen=True)
class Case:
    """A call. `lengths`: positions of each response; `holes`: share of them that is masked; `sure`: how far hidden
    states point at their targets; `trained`: of h(idden), w(eight), b(ias), m(ore columns); `options` are sorted."""

    seed: int
    name: str = "mle"
    impl: str = "torch"
    dtype: str = "float64"
    lengths: tuple[int, ...] = (2, 2)
    packed: bool = False
    vocab: int = 5
    width: int = 3
    group: int = 2
    options: tuple[tuple[str, Any], ...] = ()
    reduction: str = "mean"
    path: str = "auto"
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    columns: int = 0
    quantised: bool = False
    tied: bool = False
    trained: str = "hwbm"
    hidden_strides: str = "dense"
    weight_strides: str = "dense"
    target_strides: str = "dense"
    holes: float = 0.0
    ignore: int = -100
    junk: bool = False
    spread: float = 1.0
    sure: float = 0.0
    ref: str = "scores"
    label: str = "int64"
    upstream: str = "one"
    backwards: int = 1
    workspace: str = "default"
    kept: bool = False
    tolerance: float | str | None = None
    sort: bool = False
    metrics: bool = False
    validate: bool = True
    spoil: str = ""

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = [f"{f.name}={given[f.name]!r}" for f in dataclasses.fields(self) if given[f.name] != f.default]
        return f"Case({', '.join(changed)})"


# -- from a seed to a case --------------------------------------------------------------------------------------------


def drawn(seed: int, impls: tuple[str, ...] = IMPLS) -> Case:
    """The case of a seed."""
    r = random.Random(seed)

    def rarely(share: float) -> bool:
        return r.random() < share

    name = "scores" if rarely(0.08) else " + 0.5*".join(r.sample(PAIRS, 2)) if rarely(0.03) else r.choice(NAMES)
    spec = OBJECTIVES.get(name.split(" + ")[0])
    unit = "response" if spec is None else spec.unit
    group = r.randint(2, 4)
    units = r.choice((1, 1, 2, 2, 3, 4))
    count = units * {"pair": 2, "group": group}.get(unit, 1)
    longest = r.choice((1, 2, 3, 5, 8)) if rarely(0.95) else 64 // count
    lengths = tuple(0 if rarely(0.12) else r.randint(0, max(longest, 1)) for _ in range(count))
    vocab = r.choice((1, 2, 3, r.randint(2, 12), r.randint(2, 48), r.randint(2, 48), r.randint(48, 300)))
    width = r.choice((1, 2, r.randint(1, 9), r.randint(1, 20), r.randint(1, 48)))
    bias, columns, dtype = rarely(0.35), r.randint(1, 4) if rarely(0.12) else 0, r.choice(list(DTYPES))
    quantised = not columns and rarely(0.05)
    tied = not columns and not quantised and rarely(0.06)
    path = r.choice(("auto", "auto", "auto", "single", "two_pass", "frozen", "forward"))
    trained = "".join(part for part in "hwbm" if rarely(0.8)) if rarely(0.3) else "hwbm"
    trained = trained.replace("w", "").replace("b", "").replace("m", "") if path == "frozen" else trained
    tolerance = r.choice((0.0, 1e-6, 1e-2, 0.3, "auto")) if rarely(0.1) and name != "scores" else None
    reduction = r.choice(("mean", "mean", "sum", "none"))
    validate = tolerance is not None or not rarely(0.06)
    ref = r.choice(("scores", "scores", "logp", "sums", "pair"))
    if ref == "sums" and (spec is None or spec.ref != "sums" or " + " in name):
        ref = "logp"
    if any(OBJECTIVES[part.split("*")[-1]].ref == "tokens" for part in name.split(" + ") if part != "scores"):
        ref = "scores" if ref != "pair" else ref  # of a rounded log p alone, 1 − p isn't known
    ordinary = rarely(0.9)
    return Case(
        seed=seed,
        name=name,
        impl="auto" if "torch" in impls and rarely(0.1) else r.choice(impls),
        dtype=dtype,
        lengths=lengths,
        packed=rarely(0.4),
        vocab=vocab,
        width=width,
        group=group,
        options=() if spec is None or " + " in name else _options(r, name, group),
        reduction="mean" if " + " in name and reduction == "none" else reduction,
        path=path,
        bias=bias,
        softcap=r.choice((0.7, 2.5, 30.0)) if rarely(0.2) else None,
        scale=r.choice((0.0625, 0.3, -0.7, 2.0)) if rarely(0.25) else 1.0,
        temperature=r.choice((0.6, 1.7)) if rarely(0.15) else 1.0,
        columns=columns,
        quantised=quantised,
        tied=tied,
        trained=trained,
        hidden_strides="dense" if rarely(0.6) or tied else r.choice(list(STRIDES)),
        weight_strides="dense" if rarely(0.6) or tied else r.choice(list(STRIDES)),
        target_strides="dense" if rarely(0.7) else r.choice(list(STRIDES)),
        holes=r.choice((0.2, 0.6, 1.0)) if rarely(0.3) else 0.0,
        ignore=r.choice((-1, 0, vocab, vocab // 2)) if rarely(0.15) else -100,
        junk=validate and not tied and rarely(0.1),
        spread=r.choice((0.1, 1.0, 1.0, 4.0)) if ordinary else 20.0,
        sure=r.choice((2.0, 12.0)) if rarely(0.15) else 0.0,
        ref=ref,
        label=r.choice(("int64", "bool", "float32", "float64")),
        upstream=r.choice(("one", "number", "random")),
        backwards=2 if rarely(0.1) else 1,
        workspace=r.choice(("least", "least", "twice")) if rarely(0.2) else "default",
        kept=rarely(0.08),
        tolerance=tolerance,
        sort=tolerance is not None and rarely(0.4),
        metrics=tolerance is not None or rarely(0.1),
        validate=validate,
        spoil=r.choice(SPOILS) if validate and rarely(0.04) else "",
    )


def _options(r: random.Random, name: str, group: int) -> tuple[tuple[str, Any], ...]:
    """Options of an objective, each from its declared range or left at its default. Sorted by name."""
    made: dict[str, Any] = {}
    for option, (declared, *_) in (OBJECTIVES[name].declared or {}).items():
        if option in ("generator",) or r.random() < 0.4:
            continue
        made[option] = _value(r, declared, group)
    if name == "mc_po" and made.get("sampler", "mc") in ("mc", "random"):
        made["m"] = group - 1  # what is drawn by chance has tests of its own
    return tuple(sorted(made.items()))


def _value(r: random.Random, option: Option, group: int) -> Any:
    if option.name == "m":
        return r.randint(1, group - 1)
    kinds = option.classes or ()
    if bool in kinds:
        return r.random() < 0.5
    for allowed in option.ranges:
        if isinstance(allowed, OneOf):
            return r.choice(allowed.values)
        assert isinstance(allowed, Between), option
        if int in kinds and float not in kinds:
            return r.randint(math.ceil(allowed.low), math.ceil(allowed.low) + 3)
        if allowed.high < math.inf:
            inside = allowed.low + (allowed.high - allowed.low) * r.choice((r.random(), 1e-6, 1 - 1e-6))
            return allowed.low if allowed.ends[0] == "[" and r.random() < 0.2 else inside
        return allowed.low if allowed.holds(allowed.low) and r.random() < 0.25 else allowed.low + 10 ** r.uniform(-2, 1)
    return r.choice((None, 0.0, round(r.uniform(-2, 2), 3)))  # bco's δ, kto's z₀


# -- from a case to a call --------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What the result depends on, exact values."""

    hidden: Tensor
    base: Tensor
    more: Tensor | None
    bias: Tensor | None
    ref: Tensor | None  # logits, or hidden states of the reference's head, or log-probabilities


class Given:
    """The tensors of a case, and both roads."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        self.g = torch.Generator().manual_seed(case.seed)
        c, B, T = case, len(case.lengths), max(case.lengths)
        self.specs = [OBJECTIVES[part.split("*")[-1]] for part in c.name.split(" + ") if c.name != "scores"]
        self.shape = (sum(c.lengths),) if c.packed else (B, T)
        H, V = c.width, c.vocab

        base = (self.random(V, H) / H**0.5).to(self.dtype)
        self.quantised = None
        if c.quantised:
            codes = torch.randint(-127, 128, (V, H), dtype=torch.int8, generator=self.g)
            scales = (torch.rand(V, 1, dtype=torch.float64, generator=self.g) / 99).to(self.dtype)
            self.quantised = Quantised("integers", self.dtype, H, scales)
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.codes, base = codes, (codes.to(wide) * scales.to(wide)).to(self.dtype)
        target = torch.randint(V, self.shape, generator=self.g)
        if c.target_strides == "expanded" and target.numel():
            target = target[:1].expand(self.shape)
        live = torch.ones(self.shape, dtype=torch.bool)
        if not c.packed:
            live &= torch.arange(T) < torch.tensor(c.lengths)[:, None]
        live &= torch.rand(self.shape, generator=self.g) >= c.holes
        if c.target_strides == "expanded" and target.numel():
            live = live[:1].expand(self.shape)
        target = torch.where(live, target, c.ignore)
        self.live = target != c.ignore  # where `ignore` is a token, that one is masked, too
        self.target = STRIDES[c.target_strides](target)

        hidden = c.spread * self.random(*self.shape, H)
        if c.sure:
            hidden = hidden + c.sure * base.double()[target.clamp(0, V - 1)] * H
        more = (0.3 * self.random(V, c.columns)).to(self.dtype) if c.columns else None
        hidden = torch.cat([hidden, self.random(*self.shape, c.columns)], -1).to(self.dtype)
        bias = self.random(V).to(self.dtype) if c.bias else None
        self.ids = torch.randint(V, self.shape, generator=self.g) if c.tied else None
        hidden = base[self.ids] if self.ids is not None else hidden
        hidden = STRIDES[c.hidden_strides](hidden)
        base = STRIDES[c.weight_strides](base)
        if c.quantised:
            self.codes = STRIDES["dense" if c.weight_strides == "expanded" else c.weight_strides](self.codes)
            base = base if c.weight_strides != "expanded" else self.codes.to(wide).mul(scales.to(wide)).to(self.dtype)
        ref = self.reference(self.dtype)
        self.parts = Parts(hidden, base, more, bias, ref)
        self.label = self.rewards = None
        if any(spec.label for spec in self.specs):
            self.label = torch.randint(2, (B,), generator=self.g) * 2 - 1
        if any(spec.rewards for spec in self.specs):
            self.rewards = torch.randint(-4, 5, (B // c.group, c.group), generator=self.g).double() / 4

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.g)

    def reference(self, dtype: torch.dtype) -> Tensor | None:
        """Of "pair" hidden states; else logits, or their log-probabilities as they are given."""
        if not any(spec.ref for spec in self.specs):
            return None
        c = self.case
        if c.ref == "pair":
            self.ref_head = (self.random(c.vocab, c.width) / c.width**0.5).to(dtype)
            return self.random(*self.shape, c.width).to(dtype)
        z = self.random(*self.shape, c.vocab)
        if c.ref in ("logp", "sums"):
            logp = z.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
            return logp if c.ref == "sums" or dtype == torch.float64 else logp.float()
        return z

    @cached_property
    def tokens(self) -> Tensor:
        """Targets with a token of the vocabulary everywhere."""
        return self.target.clamp(0, self.case.vocab - 1)

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        if not self.case.packed:
            return None
        ends = [sum(self.case.lengths[:i]) for i in range(len(self.case.lengths) + 1)]
        return torch.tensor(ends, dtype=torch.int32 if self.case.seed % 2 else torch.int64)

    # the engine's road

    def keywords(self) -> dict[str, Any]:
        """What the engine takes beside hidden, head and target."""
        c, made = self.case, dict[str, Any](self.case.options)
        made |= {"ignore_index": c.ignore, "temperature": c.temperature, "impl": c.impl, "path": c.path}
        made["path"] = "auto" if c.path == "frozen" else c.path
        made |= {"validate": c.validate}
        if c.tolerance is not None:
            made |= {"grad_tolerance": c.tolerance, "sort_vocab": c.sort}
        if c.name == "scores":
            return made | {"entropy": True}
        made |= {"objective": c.name, "reduction": c.reduction, "return_metrics": c.metrics}
        if self.cu_seqlens is not None:
            made["cu_seqlens"] = self.cu_seqlens
        if self.label is not None:
            made["label"] = self.label > 0 if c.label == "bool" else self.label.to(getattr(torch, c.label))
        if self.rewards is not None:
            made["rewards"] = self.rewards.float() if c.seed % 2 else self.rewards
        elif self.specs[0].unit == "group":
            made["group_size"] = c.group
        if (ref := self.parts.ref) is not None:
            if c.ref == "pair":
                made["ref"] = (ref, LMHead(self.ref_head, softcap=3.0))
            elif c.ref == "logp":
                made["ref"] = ref
            elif c.ref == "sums":
                sums = self.sums(torch.where(self.live, ref, 0.0))
                made["ref"] = ref if sums.shape == self.target.shape else sums
            else:
                made["ref"] = ref_scores(ref, self.tokens)
        return made

    def sums(self, x: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in x.split(self.case.lengths)]) if self.case.packed else x.sum(1)

    def leaves(self) -> tuple[list[Tensor], Tensor, LMHead]:
        """(those with a gradient, hidden, head); new ones each time."""
        c, p = self.case, self.parts
        base = p.base.detach().requires_grad_("w" in c.trained and self.quantised is None)
        more, bias = (
            None if x is None else x.detach().requires_grad_(part in c.trained)
            for x, part in ((p.more, "m"), (p.bias, "b"))
        )
        hidden = p.hidden.detach()
        if c.junk:
            hidden = hidden.masked_fill(~self.live[..., None], torch.nan)
        hidden = base[self.ids] if self.ids is not None else hidden.requires_grad_("h" in c.trained)
        weight: Any = base
        if more is not None or self.quantised is not None:
            weight = HeadWeight(base if self.quantised is None else self.codes, more, self.quantised)
        wanted = [x for x in (hidden, base, more, bias) if x is not None and x.requires_grad and x.is_leaf]
        return wanted, hidden, LMHead(weight, bias, c.softcap, c.scale)

    def ours(self, keywords: dict[str, Any], workspace: Any) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """(loss or scores [fields, …], gradients, metrics)."""
        c = self.case
        wanted, hidden, head = self.leaves()
        keywords = keywords | {"workspace": workspace}
        with torch.set_grad_enabled(c.path != "forward"):
            if c.name == "scores":
                found = linear_logprob(hidden, head, self.target, **keywords)
                loss, metrics = torch.stack([getattr(found, field) for field in FIELDS]), {}
            elif c.metrics:
                loss, metrics = fused_loss(hidden, head, self.target, **keywords)
            else:
                loss, metrics = fused_loss(hidden, head, self.target, **keywords), {}
        if not wanted or c.path == "forward":
            return loss, [], metrics
        upstream = self.upstream(loss)
        gradients = list(torch.autograd.grad(loss, wanted, upstream, retain_graph=c.backwards > 1))
        if c.backwards > 1:  # computed another way, so only within the budget
            first = [x.clone() for x in gradients]
            again = torch.autograd.grad(loss, wanted, upstream)
            if not all(map(same, first, gradients)):
                raise Wrong("the second backward changed what the first gave")
            gradients += again
        return loss, gradients, metrics

    def upstream(self, loss: Tensor) -> Tensor:
        made = torch.ones(loss.shape, dtype=torch.float64)
        if self.case.upstream == "number":
            made *= -1.5
        elif self.case.upstream == "random":
            made = torch.randn(loss.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.case.seed))
        return made.to(loss.dtype)

    # the oracle's

    def oracle(self, dtype: torch.dtype, shaken: torch.Generator | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(loss or scores, its terms, gradients), everything in `dtype`; `shaken`: inputs changed by one rounding."""
        c, eps = self.case, torch.finfo(self.dtype).eps

        def to(x: Tensor | None) -> Tensor | None:
            if x is None or not x.is_floating_point():
                return x
            x = x.detach().to(dtype)
            return x if shaken is None else x * (1 + eps * (2 * torch.rand(x.shape, dtype=dtype, generator=shaken) - 1))

        hidden, base, more, bias, ref = map(to, self.parts)
        assert hidden is not None
        assert base is not None
        flags = (("h", None if c.tied else hidden), ("w", None if c.quantised else base), ("m", more), ("b", bias))
        wanted = [x.requires_grad_() for part, x in flags if x is not None and part in c.trained]
        wanted = wanted if c.path != "forward" else []
        # the tied hidden states are gathered, so that both ways to W count
        seen = base[self.ids] if self.ids is not None else hidden
        if shaken is not None and self.ids is not None:
            seen = seen * (1 + eps * (2 * torch.rand(seen.shape, dtype=dtype, generator=shaken) - 1))
        weight = base if more is None else torch.cat([base, more], 1)
        head = LMHead(weight, bias, c.softcap, c.scale)
        if c.name == "scores":
            head = head._replace(
                scale=c.scale / c.temperature, softcap=None if c.softcap is None else c.softcap / c.temperature
            )
            scores = reference.token_scores(seen, head, self.target, c.ignore)
            loss = terms = torch.stack([scores[field] for field in FIELDS])
        else:
            terms = self._terms(seen, head, ref, to)
            loss = terms if c.reduction == "none" else terms.sum() if c.reduction == "sum" else terms.mean()
        if not wanted:
            return loss.detach(), terms.detach(), []
        gradients = torch.autograd.grad(loss, wanted, self.upstream(loss), allow_unused=True)
        found = [torch.zeros_like(x) if made is None else made for x, made in zip(wanted, gradients)]
        return loss.detach(), terms.detach(), found

    def _terms(self, hidden: Tensor, head: LMHead, ref: Tensor | None, to: Callable[..., Any]) -> Tensor:
        """[U]"""
        c, options = self.case, dict(self.case.options)
        total: Any = 0.0
        for part, spec in zip(c.name.split(" + "), self.specs):
            given: dict[str, Any] = {}
            if spec.ref and ref is not None:
                if c.ref == "pair":
                    given["ref_logits"] = reference.logits(ref, LMHead(to(self.ref_head), softcap=3.0)) / c.temperature
                else:
                    given["ref" if c.ref in ("logp", "sums") else "ref_logits"] = ref
            if spec.unit == "group":
                given["group_size"] = c.group
            if spec.label:
                given["label"] = self.label
            if spec.rewards:
                given["rewards"] = self.rewards
            if spec.name == "mc_po":
                given["drawn"] = self.drawn
                options = {name: value for name, value in options.items() if name == "beta"}
            factor = float(part.split("*")[0]) if "*" in part else 1.0
            total = total + factor * reference.LOSSES[spec.name](
                hidden, head, self.target, cu_seqlens=self.cu_seqlens, ignore_index=c.ignore,
                temperature=c.temperature, reduction="none", **given, **options,
            )  # fmt: skip
        return total

    @cached_property
    def drawn(self) -> list[list[int]]:
        """mc_po's negatives: all, or the M of the highest (lowest) βΔ, in float64."""
        c, options = self.case, dict(self.case.options)
        m, sampler = options.get("m", 1), options.get("sampler", "mc")
        everyone = [list(range(1, c.group))] * (len(c.lengths) // c.group)
        if m == c.group - 1:
            return everyone
        p = [None if x is None else x.detach().double() for x in self.parts]
        weight = p[1] if p[2] is None else torch.cat([p[1], p[2]], 1)
        hidden = p[1][self.ids] if self.ids is not None else p[0]
        head = LMHead(weight, p[3], c.softcap, c.scale)
        z = reference.logits(hidden, head) / c.temperature
        ref = p[4]
        if c.ref == "pair":
            ref = reference.logits(ref, LMHead(self.ref_head.double(), softcap=3.0)) / c.temperature
        if c.ref in ("pair", "scores"):
            ref = ref.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        ratio = z.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0] - ref
        scores = self.sums(torch.where(self.live, ratio, 0.0)).view(-1, c.group)
        there = self.sums(self.live.double()).view(-1, c.group) > 0
        made = []
        for group, present in zip(scores.tolist(), there.tolist()):
            rows = sorted((i for i in range(1, c.group) if present[i]), key=lambda i: group[i])
            made.append(rows[-m:] if sampler == "max" else rows[:m])
        return made


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))


# -- the check --------------------------------------------------------------------------------------------------------


def check(case: Case) -> str:
    """ "ok", "refused ARGUMENT" or "oracle isn't finite".

    Raises:
        Wrong: a result out of its budget, or what should have been refused.
        Exception: whatever the call raised.
    """
    given = Given(case)
    keywords = given.keywords()
    if case.spoil and (spoilt := spoiled(given, keywords)) is not None:
        return spoilt
    try:
        loss, gradients, metrics = run(given, keywords)
    except ValueError as error:
        argument = refusal(error)
        allowed = {
            "path": case.path not in ("auto", "frozen"),
            "impl": case.impl == "tiled"
            and (not case.validate or case.dtype == "float16" or bool(case.tolerance and case.workspace != "default")),
        }
        if not allowed.get(argument, False):
            raise
        return f"refused {argument}"
    exact, terms, truths = given.oracle(torch.float64)
    if not all(x.isfinite().all() for x in (exact, *truths)):
        return "oracle isn't finite"
    for made, dtype in ((loss, torch.float64 if given.dtype == torch.float64 else torch.float32), *(
        (x, given.dtype) for x in gradients
    )):  # fmt: skip
        if made.dtype != dtype:
            raise Wrong(f"dtype {made.dtype}, expected {dtype}")
    truths = truths * case.backwards
    if len(gradients) != len(truths) or any(a.shape != b.shape for a, b in zip(gradients, truths)):
        raise Wrong("number or shape of the gradients")
    extra = left_out(given, metrics, truths[: len(truths) // case.backwards])
    compare(given, [loss, *gradients], [exact, *truths], terms, [extra[0], *extra[1:] * case.backwards])
    return "ok"


def run(given: Given, keywords: dict[str, Any]) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """In the workspace that the case asks for; of a kept one, the second of two calls."""
    case, size = given.case, 1 << 29
    if case.workspace != "default":
        size, found = least(given, keywords)
        if case.workspace == "least" and not case.kept:
            return found
        size *= 2
    if not case.kept:
        return given.ours(keywords, size)
    kept = Workspace(size, gradients=case.seed % 2 == 0)
    with torch.random.fork_rng(devices=[]):
        before = given.ours(keywords, kept)
    held = [x.clone() for x in (before[0].detach(), *before[1])]
    found = given.ours(keywords, kept)
    if not all(map(same, held, (before[0].detach(), *before[1]))):
        raise Wrong("a later call in the same Workspace changed a result")
    return found


def least(given: Given, keywords: dict[str, Any]) -> tuple[int, Any]:
    """The smallest workspace, as refusals name it, and what it gives: of the loss, of scores that a draw needs, of a
    reference."""
    size = 1
    for _ in range(4):
        try:
            return size, given.ours(keywords, size)
        except ValueError as error:
            named = re.match(r"workspace: expected at least (\d+) bytes", str(error))
            if named is None:
                raise
            size = int(named[1])
    raise Wrong(f"a workspace is refused that was named as enough: {size} bytes are asked for at last")


def refusal(error: ValueError) -> str:
    """The argument that was refused."""
    if not REFUSAL.match(str(error)):
        raise Wrong(f"a refusal without argument, expectation and what came: {error}") from error
    argument = str(error).split(":")[0]
    return re.sub(r" of .*", "", argument)


def left_out(given: Given, metrics: dict[str, Any], truths: list[Tensor]) -> list[float]:
    """How far the loss and each gradient may be off for what a tolerance left out, in the maximum norm."""
    case, p = given.case, given.parts
    if not case.tolerance or not truths:
        return [0.0] * (1 + len(truths))
    bound = metrics["skipped/bound"].double()
    if not bound.isfinite().all():
        # of two passes: known when the backward has run; the row's own coefficient is at most the most it can be
        raise Wrong("skipped/bound isn't finite after the backward")
    factor = given.upstream(torch.ones(1)).abs().max().item() if case.upstream == "number" else 1.0
    if case.reduction == "none" or case.upstream == "random":
        return [0.0] + [math.inf] * len(truths)
    bound = bound * factor * abs(case.scale / case.temperature)
    hidden = torch.where(given.live[..., None], p.hidden.double(), 0.0)
    weight = p.base.double() if p.more is None else torch.cat([p.base, p.more], 1).double()
    of_hidden = bound.max().item() * weight.norm(dim=1).max().item() if bound.numel() else 0.0
    of_weight = (bound * hidden.norm(dim=-1)).sum().item()
    of_bias = bound.sum().item()
    if case.tied:
        return [0.0, of_weight + of_hidden * bound.numel(), *[of_bias] * (len(truths) - 1)]
    made = {"h": of_hidden, "w": of_weight, "m": of_weight, "b": of_bias}
    parts = [("h", True), ("w", not case.quantised), ("m", p.more is not None), ("b", p.bias is not None)]
    return [0.0, *(1.0001 * made[name] for name, there in parts if there and name in case.trained)]


def differences(made: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """The largest of each tensor."""
    return [(a.detach().double() - b).abs().max().item() if b.numel() else 0.0 for a, b in zip(made, exact)]


def compare(given: Given, made: list[Tensor], exact: list[Tensor], terms: Tensor, more: list[float]) -> None:
    """Loss and gradients within their budgets."""
    wide = given.dtype == torch.float64
    errors = differences(made, exact)
    sizes = [max(b.abs().max().item(), 1e-30) if b.numel() else 0.0 for b in exact]
    if terms.numel():
        sizes[0] = max(sizes[0], terms.abs().max().item() * (terms.numel() if given.case.reduction == "sum" else 1))
    dtypes = [torch.float64 if wide else torch.float32, *(x.dtype for x in made[1:])]
    eps = [1e-13 if wide else torch.finfo(dtype).eps for dtype in dtypes]
    tight = [e * size + extra for e, size, extra in zip(eps, sizes, more)]
    if all(error <= allowed for error, allowed in zip(errors, tight)):
        return
    naive, _, rough = given.oracle(given.dtype)
    lucky = differences((naive, *rough * given.case.backwards), exact)
    if all(error <= 2 * off + allowed for error, off, allowed in zip(errors, lucky, tight)):
        return
    moved = [0.0] * len(exact)
    shaken = torch.Generator().manual_seed(1)
    for _ in range(6):
        value, _, changed = given.oracle(torch.float64, shaken)
        found = differences((value, *changed * given.case.backwards), exact)
        moved = [max(a, b) for a, b in zip(moved, found)]
    # below the normal numbers, and where coefficients of the loss's size cancel
    tiny = torch.finfo(given.dtype).smallest_normal * given.target.numel() * 4
    sides = [x.detach().double()[x.isfinite()].abs() for x in given.parts[:2]]
    largest = max(1.0, *(x.max().item() for x in sides if x.numel()))
    # autograd's softmax rounds p to 1 in the oracle, where the engine keeps 1 − p; so does a group's, of β times scores
    largest *= max([1.0, *(abs(value) for _, value in given.case.options if isinstance(value, float))])
    tiny += 4 * torch.finfo(torch.float64).eps * largest * (1 + terms.abs().sum().item()) * (1 + given.target.numel())
    # log-probabilities round, also where their differences are small; so do p = exp(z − lse), by the size of z
    many = max(terms.abs().sum().item(), math.log(given.case.vocab))
    tiny += torch.finfo(dtypes[0]).eps * many * (1 + given.case.spread + given.case.sure)
    logit = 0.0
    if not wide:
        hidden, weight = (x.double().norm(dim=-1).max().item() if x.numel() else 0.0 for x in given.parts[:2])
        logit = min(hidden * weight * abs(given.case.scale) / given.case.temperature, given.case.softcap or math.inf)
    for i, (error, off, allowed, move) in enumerate(zip(errors, lucky, tight, moved)):
        budget = (0.0 if math.isnan(off) else 2 * off) + (4 + logit * (i > 0)) * allowed + SENSITIVE * move + tiny
        if not error <= budget:
            what = "loss" if i == 0 else f"gradient {i} of {len(exact) - 1}"
            raise Wrong(f"{what}: error {error:.2e}, budget {budget:.2e} (naive {off:.2e}, one rounding {move:.2e})")


def spoiled(given: Given, keywords: dict[str, Any]) -> str | None:
    """Put a fault in that has to be refused, and see it refused. None where the case has no place for it."""
    c, kind = given.case, given.case.spoil
    workspace: Any = 1 << 29
    p, live = given.parts, given.live.nonzero()
    if kind == "option":
        spec = given.specs[0] if len(given.specs) == 1 else None
        limited = [n for n, (o, *_) in ((spec and spec.declared) or {}).items() if o.ranges]
        if not limited:
            return None
        keywords[limited[0]] = -1e300
    elif kind == "unknown option" and c.name != "scores":
        keywords["betta"] = 0.1
    elif kind == "target" and len(live):
        given.target = given.target.clone()
        given.target[tuple(live[-1])] = c.vocab + 1 if c.vocab + 1 != c.ignore else c.vocab + 2
    elif kind == "hidden" and len(live) and not c.tied:
        hidden = p.hidden.clone()
        hidden[tuple(live[-1])] = torch.inf
        given.parts = p._replace(hidden=hidden)
    elif kind == "weight" and not c.quantised and not c.tied:
        other = torch.float32 if given.dtype != torch.float32 else torch.float64
        given.parts = p._replace(base=p.base.to(other), bias=None if p.bias is None else p.bias.to(other))
    elif kind == "shape":
        given.target = given.target[..., None]
    elif kind == "label" and given.label is not None and c.label != "bool":
        keywords["label"] = given.label * 2
    elif kind == "no label" and given.label is not None:
        keywords["label"] = None
    elif kind == "no ref" and p.ref is not None:
        keywords["ref"] = None
    elif kind == "more ref" and p.ref is None and c.name != "scores":
        keywords["ref"] = torch.zeros(given.shape)
    elif kind == "rewards" and given.rewards is not None and len(live):
        there = given.sums(given.live.double()).view(-1, c.group) > 0
        keywords["rewards"] = torch.where(there, torch.nan, given.rewards)
    elif kind == "cu_seqlens" and given.cu_seqlens is not None and c.name != "scores":
        keywords["cu_seqlens"] = given.cu_seqlens + 1
    elif kind == "reduction" and c.name != "scores":
        keywords["reduction"] = "average"
    elif kind in ("impl", "path"):
        keywords[kind] = "best"
    elif kind == "temperature":
        keywords["temperature"] = 0.0
    elif kind == "softcap":
        given.case = replace(c, softcap=-1.0)
    elif kind == "workspace":
        workspace = 0
    elif kind == "ref" and isinstance(keywords.get("ref"), Tensor) and len(live):
        keywords["ref"] = torch.ones_like(keywords["ref"])
    elif kind == "twice" and c.path != "forward":
        return refused_second_derivative(given, keywords)
    else:
        return None
    try:
        given.ours(keywords, workspace)
    except ValueError as error:
        return f"refused {refusal(error)}"
    raise Wrong(f"spoilt {kind} isn't refused")


def refused_second_derivative(given: Given, keywords: dict[str, Any]) -> str | None:
    wanted, hidden, head = given.leaves()
    call = linear_logprob if given.case.name == "scores" else fused_loss
    try:
        made: Any = call(hidden, head, given.target, **keywords)
    except ValueError as error:
        return f"refused {refusal(error)}"
    value = made.logp.sum() if given.case.name == "scores" else made[0] if given.case.metrics else made
    if not wanted or not given.live.any():
        return None
    try:
        torch.autograd.grad(value.sum(), wanted, create_graph=True)
    except RuntimeError as error:
        if "second derivatives are not available" in str(error):
            return "refused second derivative"
        raise
    raise Wrong("a second derivative isn't refused")


# -- failures ---------------------------------------------------------------------------------------------------------


def failure(case: Case) -> str | None:
    """What is wrong, in one line; None where nothing is."""
    try:
        check(case)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
    return None


def kind_of(said: str) -> str:
    return re.sub(r"[\d.e+-]+", "", said)[:40]


def shrunk(case: Case, tries: int = 400) -> Case:
    """A smaller case with a failure of the same kind."""
    said = failure(case)
    if said is None:
        return case
    wanted = kind_of(said)
    progress = True
    while progress and tries > 0:
        progress = False
        for smaller in simpler(case):
            tries -= 1
            for seed in (case.seed, 1, 2):
                candidate = replace(smaller, seed=seed)
                found = failure(candidate)
                if found is not None and kind_of(found) == wanted:
                    case, progress = candidate, True
                    break
            if progress or tries <= 0:
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    lengths, spec = case.lengths, OBJECTIVES.get(case.name.split(" + ")[0])
    unit = "response" if spec is None else spec.unit
    of = {"pair": 2, "group": case.group}.get(unit, 1)
    units = len(lengths) // of
    for i in range(units if units > 1 else 0):
        gone = {i, i + units} if unit == "pair" else set(range(i * of, (i + 1) * of))
        yield replace(case, lengths=tuple(n for j, n in enumerate(lengths) if j not in gone))
    for i, n in enumerate(lengths):
        for less in sorted({n // 2, n - 1, 1} & set(range(n))):
            yield replace(case, lengths=(*lengths[:i], less, *lengths[i + 1 :]))
    for field, least in (("vocab", 2), ("width", 1), ("columns", 0)):
        now = getattr(case, field)
        for less in sorted({least, now // 2, now - 1} & set(range(least, now))):
            yield replace(case, **{field: less})
    for i in range(len(case.options) if case.name != "mc_po" else 0):  # without them it draws by chance
        yield replace(case, options=(*case.options[:i], *case.options[i + 1 :]))
    for f in dataclasses.fields(case):
        kept = f.name in ("seed", "name", "lengths", "vocab", "width", "columns", "group", "options", "impl")
        if not kept and getattr(case, f.name) != f.default:
            yield replace(case, **{f.name: f.default})


def program(case: Case) -> str:
    environment = "TRITON_INTERPRET=1 " if case.impl in ("triton", "tiled") else ""
    return f'{environment}PYTHONPATH=tests python -c "import fuzz; fuzz.deterministic(); fuzz.check(fuzz.{case})"'


# -- a soak -----------------------------------------------------------------------------------------------------------


def soak(calls: int, impls: tuple[str, ...], out: Callable[[str], None], minutes: float = math.inf) -> bool:
    """Forward and backward of some hundred cases over and over, in kept memory and without; whether what the process
    holds stays as it was. Every 250 calls are a sample; a line is fitted to the last 80 %."""
    kept, given = Workspace(1 << 20, gradients=True), []
    for seed in range(10**9, 10**9 + 600):
        case = replace(drawn(seed, impls), spoil="", metrics=False, tolerance=None, workspace="default", kept=False)
        one = Given(case if case.path in ("frozen", "forward") else replace(case, path="auto"))
        given.append((one, one.keywords()))
    samples: list[tuple[float, ...]] = []
    order, start = random.Random(0), time.monotonic()
    for done in range(calls):
        if time.monotonic() - start > 60 * minutes:
            out(f"{done} calls in {minutes:g} minutes")
            break
        one, keywords = order.choice(given)
        one.ours(keywords, kept if done % 2 else 1 << 29)
        if done % 250 == 249:
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
            samples.append((resident, tensors, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
        if done % 10000 == 9999:
            out(f"{done + 1} calls: " + ", ".join(f"{x:g}" for x in samples[-1]))
    flat = True
    table = torch.tensor(samples[len(samples) // 5 :], dtype=torch.float64)
    n = len(table)
    at = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    for name, values in zip(("resident MiB", "tensors", "threads", "open files"), table.T):
        slope = (at * values).sum() / at.square().sum()
        rest = values - values.mean() - slope * at
        noise = (rest.square().sum() / max(n - 2, 1)).sqrt()
        growth = slope.item() * n
        holds = growth <= max(3 * noise.item(), 0.5 if name == "resident MiB" else 0.01)
        flat &= holds
        out(
            f"{name}: {values[0]:g} … {values[-1]:g}, {growth:+.3g} over {n * 250} calls by the line, noise {noise:.2g}"
            f"{'' if holds else ': grows'}"
        )
    return flat


# -- the program ------------------------------------------------------------------------------------------------------


def deterministic() -> None:
    """As in `conftest.py`: one thread, memory that nobody wrote is NaN."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--impls", default=",".join(IMPLS), help="kernel sets")
    parser.add_argument("--every", type=int, default=1000, help="cases between two lines")
    parser.add_argument("--keep-going", type=int, default=20, help="failures after which it ends")
    parser.add_argument("--trace", action="store_true", help="print each seed before it runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--soak", type=int, default=0, metavar="CALLS")
    given = parser.parse_args()
    impls = tuple(given.impls.split(","))
    deterministic()

    def out(text: str) -> None:
        print(text, flush=True)

    if given.soak:
        sys.exit(not soak(given.soak, impls, out, given.minutes))
    counts: Counter[str] = Counter()
    failed, start = 0, time.monotonic()
    for seed in range(given.start, given.start + given.cases):
        if time.monotonic() - start > 60 * given.minutes:
            break
        if given.trace:
            out(f"seed {seed}")
        case = drawn(seed, impls)
        try:
            counts[check(case)] += 1
        except Exception as error:
            failed += 1
            out(f"FAILED seed {seed}: {type(error).__name__}: {error}\n  {case}")
            if not isinstance(error, Wrong | ValueError):
                out("  " + "".join(traceback.format_exception(error)[-3:]))
            small = shrunk(case)
            out(f"  shrunk: {failure(small)}\n  {program(small)}")
            if failed >= given.keep_going:
                break
        if (seed + 1 - given.start) % given.every == 0:
            out(f"{seed + 1 - given.start} cases to seed {seed}, {time.monotonic() - start:.0f} s, {failed} failed")
    named = ", ".join(f"{n} {k}" for k, n in sorted(counts.items()))
    out(f"{sum(counts.values()) + failed} cases, {failed} failed; {named}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
