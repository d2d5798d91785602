"""Theorem 5.1 of SWEPO: does the bias of an attribute fall as 1/√k with the number k of responses per prompt?

    acceptable distribution, known ──k acceptable and k other responses──▶ (a) their mean  (b) a policy fitted to them

A policy here is a table of logits, one row per prompt over 64 responses of one token each, so that any distribution can
be represented, as the theorem assumes; it is trained by gradient descent through the library's fused losses.

The theorem's proof is about the mean of k samples; that a trained policy takes on the samples' distribution is
assumed. Maximum likelihood does. SWEPO's gradient on the logits adds up to 0 over a group, so responses that were not
sampled keep their odds among each other; one that was sampled n times is pushed n times as hard, so n adds to its
log-odds instead of multiplying its odds.

Dimensions: P prompts, V = 64 responses, k sampled of each kind.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rgpb

from .answers import say
from .claim import VERDICTS, Claim, Finding, write

CLAIMS = (
    Claim(
        "swepo_bias_sample",
        "SWEPO",
        "Theorem 5.1",
        "The mean of an attribute over k sampled acceptable responses deviates from the true mean as 1/√k.",
    ),
    Claim(
        "swepo_bias",
        "SWEPO",
        "Theorem 5.1",
        "After training with SWEPO on k acceptable and k other responses per prompt, the policy's expected attribute "
        "deviates from that of the acceptable distribution as 1/√k.",
    ),
)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
STEPS, EARLY = 200, 25
CURVES = ("reference", "sample mean", "mle", "swepo, early", "swepo", "swepo, best stop")
STEP_SIZE = {"mle": 2.0, "swepo": 10.0}


class Problem(NamedTuple):
    """Attribute f, the acceptable and the other distribution, and the reference. Each float64 [P, V]."""

    attribute: Tensor
    acceptable: Tensor
    other: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """The attribute's mean over acceptable responses, [P]."""
        return (self.acceptable * self.attribute).sum(1)

    @property
    def deviation(self) -> Tensor:
        """Its standard deviation, [P]."""
        return (self.acceptable * (self.attribute - self.mean[:, None]) ** 2).sum(1).sqrt()


def make_problem(prompts: int, generator: torch.Generator, responses: int = 64) -> Problem:
    """A random reference; a random half of the responses is acceptable, with an attribute higher by 1 on average.

    Acceptable and other responses are drawn in proportion to the reference.
    """
    shape = (prompts, responses)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(1)
    good = torch.rand(shape, generator=generator).argsort(1).argsort(1) < responses // 2
    attribute = torch.randn(shape, generator=generator, dtype=torch.float64) + good
    acceptable, other = reference * good, reference * ~good
    return Problem(attribute, acceptable / acceptable.sum(1, True), other / other.sum(1, True), reference)


def fit(problem: Problem, rows: Tensor, objective: str, steps: int) -> list[Tensor]:
    """Bias of each prompt, abs(E_π[f] − μ), [P], after every step of gradient descent from the reference.

    Args:
        problem: as above.
        rows: int64 [P, K], responses of each prompt; for "swepo" the first half acceptable (reward 1, else 0).
        objective: "mle" or "swepo".
        steps: how many, of a size by which prompts don't depend on each other.
    """
    prompts, k = rows.shape
    table = problem.reference.log().float().T.contiguous().requires_grad_()  # the head, [V, H = P]
    hidden = torch.eye(prompts).repeat_interleave(k, 0)[:, None]  # [P·K, 1, P]: which prompt
    target = rows.reshape(-1, 1)
    options: dict[str, Any] = {}
    if objective == "swepo":
        ref = problem.reference.log().float().gather(1, rows).reshape(-1)
        rewards = (torch.arange(k) < k // 2).double().expand(prompts, k)
        options = {"ref": ref, "rewards": rewards, "group_size": k}
    biases = []
    for _ in range(steps):
        loss = rgpb.fused_loss(hidden, table, target, objective=objective, **options)
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table - STEP_SIZE[objective] * prompts * gradient).detach().requires_grad_()
        policy = table.detach().double().T.softmax(1)
        biases.append(((policy * problem.attribute).sum(1) - problem.mean).abs())
    return biases


class Fit(NamedTuple):
    """log bias = intercept + slope · log k; the error is the larger of the fit's own and that over seeds."""

    slope: float
    error: float


def fit_slope(biases: list[list[float]]) -> Fit:
    """A line through log bias against log k, from the biases of each seed at each of `COUNTS`."""
    x = [math.log(k) for k in COUNTS]
    middle = fmean(x)
    scale = sum((a - middle) ** 2 for a in x)

    def line(values: list[float]) -> Fit:
        y = [math.log(value) for value in values]
        slope = sum((a - middle) * b for a, b in zip(x, y)) / scale
        left = [b - fmean(y) - slope * (a - middle) for a, b in zip(x, y)]
        return Fit(slope, math.sqrt(sum(a * a for a in left) / (len(x) - 2) / scale))

    slopes = [line(of_seed).slope for of_seed in biases]
    over_seeds = stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
    whole = line([math.exp(fmean(map(math.log, at))) for at in zip(*biases)])
    return Fit(whole.slope, max(whole.error, over_seeds))


def verdict_of(found: Fit) -> str:
    """Whether the slope's interval, twice its error to both sides, holds −½; undecided where it holds 0 as well."""
    low, high = found.slope - 2 * found.error, found.slope + 2 * found.error
    if low <= -0.5 <= high:
        return VERDICTS[2] if high >= 0 else VERDICTS[0]
    return VERDICTS[1]


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """Sample, fit, measure the slopes.

    Args: as `swepo_weighting.run`.
    """
    prompts, steps = (4, 3) if quick else (64, STEPS)
    biases: dict[str, list[list[float]]] = {name: [[] for _ in range(seeds)] for name in CURVES}
    bounded = True
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        problem = make_problem(prompts, generator)
        for k in COUNTS:
            say(progress, f"swepo_bias: seed {seed + 1}/{seeds}, k = {k}")
            good, bad = (
                torch.multinomial(p, k, replacement=True, generator=generator)
                for p in (problem.acceptable, problem.other)
            )
            sampled = (problem.attribute.gather(1, good).mean(1) - problem.mean).abs()
            trained = fit(problem, torch.cat([good, bad], 1), "swepo", steps)
            best = min(trained, key=lambda bias: float(bias.mean()))
            reference = ((problem.reference * problem.attribute).sum(1) - problem.mean).abs()
            for name, bias in (
                ("reference", reference),
                ("sample mean", sampled),
                ("mle", fit(problem, good, "mle", steps)[-1]),
                ("swepo, early", trained[min(EARLY, steps) - 1]),
                ("swepo", trained[-1]),
                ("swepo, best stop", best),
            ):
                biases[name][seed].append(float(bias.mean()))
            bounded &= float(sampled.mean()) <= float(problem.deviation.max()) / math.sqrt(k)
    say(progress, "")
    fits = {name: fit_slope(values) for name, values in biases.items() if name != "reference"}
    rows = [["", *(f"k = {k}" for k in COUNTS), "slope"]]
    for name, values in biases.items():
        means = [f"{fmean(at):.3f}" for at in zip(*values)]
        rows.append([name, *means, _shown(fits[name]) if name in fits else "–"])
    recorded = {
        "problem": f"{prompts} prompts, 64 responses, half of them acceptable",
        "attribute": "normal, variance 1, mean 1 for acceptable responses and 0 for others",
        "policy": "a row of logits per prompt, from the reference",
        "mle": f"on the k acceptable ones, {steps} steps of size {STEP_SIZE['mle']:g} per prompt",
        "swepo": f"beta 0.1, rewards 1 and 0, {steps} steps of size {STEP_SIZE['swepo']:g} per prompt",
        "early": f"after {EARLY} steps",
        "best stop": "the step with the smallest bias for that k, known only to who knows the true mean",
        "seeds": seeds,
    }
    number = {
        "swepo_bias_sample": f"Slope {_shown(fits['sample mean'])}; the bound σ_max/√k is "
        f"{'kept at every k' if bounded else 'broken'}.",
        "swepo_bias": f"Slope {_shown(fits['swepo'])} after {steps} steps, {_shown(fits['swepo, early'])} after "
        f"{EARLY}, {_shown(fits['swepo, best stop'])} at the best stop of each k; by maximum likelihood on the "
        f"acceptable ones: {_shown(fits['mle'])}.",
    }
    verdicts = (verdict_of(fits["sample mean"]) if bounded else VERDICTS[1], verdict_of(fits["swepo"]))
    findings = [Finding(c, verdict, number[c.name], rows, recorded) for c, verdict in zip(CLAIMS, verdicts)]
    for finding in findings:
        write(finding, out, _figure(biases, fits))
    return findings


def _shown(found: Fit) -> str:
    return f"{found.slope:.3f} ± {found.error:.3f}"


def _figure(biases: dict[str, list[list[float]]], fits: dict[str, Fit]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in biases.items():
        mean = [fmean(at) for at in zip(*values)]
        if name not in fits:
            axes.loglog(COUNTS, mean, "--", color="grey", label=name)
            continue
        axes.loglog(COUNTS, mean, "o-", label=f"{name}, slope {_shown(fits[name])}")
    start = fmean(of_seed[0] for of_seed in biases["sample mean"])
    axes.loglog(COUNTS, [start / math.sqrt(k) for k in COUNTS], "k:", label="1/√k")
    axes.set(xlabel="k, responses of each kind to a prompt", ylabel="mean abs(E[f] − μ)", title="Bias of an attribute")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return figure
