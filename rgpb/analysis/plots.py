"""Pictures of the numbers: names to results, one colour each, and a Figure back; with a path also a whole PNG file or
none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgpb.analysis.changes import Shifts, VocabularyShift
from rgpb.analysis.derivatives import Coefficients, Landscape, LikelihoodCurves
from rgpb.analysis.numbers import GradientDifference, InformationDifference, agility, perplexity
from rgpb.layout import Responses, pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_perplexity_agility(runs: Mapping[str, Responses], path: str | Path | None = None) -> Figure:
    """Each pair as a dot, agility to the right and perplexity of the chosen upwards, and each run's mean as a cross.

    Args:
        runs: name → pairs, stacked `[chosen; rejected]`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs, or an odd number of responses.
    """
    figure, axes = _figure("runs", runs, 1, 1)
    for i, (name, responses) in enumerate(runs.items()):
        x, (y, _) = agility(responses), pairs(perplexity(responses))
        known = ~(x.isnan() | y.isnan())
        x, y = x[known].cpu(), y[known].cpu()
        axes[0].plot(x, y, ".", color=f"C{i}", alpha=0.4, label=name)
        if len(x):
            axes[0].plot([x.mean()], [y.mean()], "x", color=f"C{i}", markersize=10, markeredgewidth=2)
    axes[0].set_yscale("log")
    _dress(axes[0], "perplexity and agility", "agility: e^S̄ of chosen − of rejected", "perplexity of the chosen")
    return _finish(figure, path)


def plot_information_difference(runs: Mapping[str, InformationDifference], path: str | Path | None = None) -> Figure:
    """Pairs in order of their difference, of probabilities and of log-probabilities (RGPB Figure 3a, b).

    Args:
        runs: name → `information_difference`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.probability, found.log_probability)):
            panel.plot(_ordered(values), ".-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], "information difference", "pairs, sorted", "π(y+) − π(y−)")
    _dress(axes[1], "of logarithms", "pairs, sorted", "log π(y+) − log π(y−)")
    return _finish(figure, path)


def plot_gradient_difference(runs: Mapping[str, GradientDifference], path: str | Path | None = None) -> Figure:
    """Mean over the pairs at each step (RGPB Figure 3c): of the softmax distributions, and with the targets.

    Args:
        runs: name → `gradient_difference`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.softmax, found.output)):
            panel.plot(values.nanmean(0).cpu(), ".-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], "gradient difference: softmax", "step", "‖p+ − p−‖")
    _dress(axes[1], "with the target tokens", "step", "‖(1[y+] − p+) − (1[y−] − p−)‖")
    return _finish(figure, path)


def plot_coefficients(runs: Mapping[str, Coefficients], path: str | Path | None = None) -> Figure:
    """Each token as a dot: its coefficient on log p and on its logit, against its probability.

    Args:
        runs: name → `coefficients`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        for panel, values in zip(axes, (found.logp, found.logit)):
            panel.plot(found.probability.cpu(), values.cpu(), ".", color=f"C{i}", alpha=0.4, label=name)
    _dress(axes[0], "coefficient on log p", "p of the token", "−∂L/∂ log p")
    _dress(axes[1], "coefficient on the logit", "p of the token", "−∂L/∂z")
    return _finish(figure, path)


def plot_likelihood_curves(
    curves: Mapping[str, LikelihoodCurves], path: str | Path | None = None, *, derivative: str = "logit"
) -> Figure:
    """The size of a token's derivative against its likelihood, chosen and rejected side by side (BNF Figure 1).

    Args:
        curves: name → `likelihood_curves`.
        path: also write a PNG there.
        derivative: "logit", "logp" or "prob", the field of `Curve` to draw.

    Raises:
        ValueError: no curves, or an unknown derivative.
    """
    named = {"logit": "z", "logp": "log p", "prob": "p"}
    if derivative not in named:
        raise ValueError(f"derivative: expected one of {sorted(named)}, got {derivative!r}")
    figure, axes = _figure("curves", curves, 1, 2)
    for i, (name, both) in enumerate(curves.items()):
        for panel, curve in zip(axes, both):
            if curve is not None:
                size = getattr(curve, derivative).abs()
                panel.plot(curve.probability.cpu(), size.cpu(), color=f"C{i}", label=name)
    for panel, title in zip(axes, ("chosen", "rejected")):
        _dress(panel, title, "likelihood p", f"|∂L/∂{named[derivative]}|")
    return _finish(figure, path)


def plot_landscapes(landscapes: Mapping[str, Landscape], path: str | Path | None = None) -> Figure:
    """A row of maps for each objective: both coefficients and their two sums; red raises, blue lowers.

    Colours end at the 95th percentile of the absolute values, since some coefficients explode at an edge. The black
    line is 0.

    Args:
        landscapes: name → `coefficient_landscape`.
        path: also write a PNG there.

    Raises:
        ValueError: no landscapes.
    """
    figure, axes = _figure("landscapes", landscapes, len(landscapes), 4)
    titles = ("on log π(y+)", "on log π(y−)", "sum, y+ = y−", "sum on probabilities")
    for row, (name, found) in enumerate(landscapes.items()):
        x, y = found.pi_chosen.cpu().numpy(), found.pi_rejected.cpu().numpy()
        for panel, title, values in zip(axes[4 * row : 4 * row + 4], titles, found[2:]):
            most = max(float(values.abs().flatten().quantile(0.95)), 1e-12)
            z = values.T.cpu().numpy()
            mesh = panel.pcolormesh(x, y, z, cmap="RdBu_r", vmin=-most, vmax=most, shading="nearest")
            if (
                min(z.shape) > 1 and z.min() < -1e-12 and z.max() > 1e-12
            ):  # a 0 that rounding left isn't a change of sign
                panel.contour(x, y, z, levels=[0.0], colors="black", linewidths=0.8)
            figure.colorbar(mesh, ax=panel)
            panel.set_title(f"{name}: {title}", fontsize=9)
            panel.set_xlabel("π(y+)", fontsize=8)
            panel.set_ylabel("π(y−)", fontsize=8)
    return _finish(figure, path)


def plot_shifts(runs: Mapping[str, Shifts], path: str | Path | None = None) -> Figure:
    """The six panels of BNF Figure 3: distributions over the responses, and logit against log-likelihood shifts.

    Args:
        runs: name → `shifts`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 2, 3)
    titles = {
        "logp": "log-likelihood shift",
        "logit": "absolute logit shift",
        "": "logit against log-likelihood shift",
        "logp_mean": "log-likelihood shift per token",
        "logit_mean": "absolute logit shift per token",
        "gini": "Gini coefficient of the logit shifts",
    }
    for panel, (field, title) in zip(axes, titles.items()):
        for i, (name, found) in enumerate(runs.items()):
            if field:
                values = _ordered(getattr(found, field))
                share = torch.arange(1, len(values) + 1) / max(len(values), 1)
                panel.plot(values, share, drawstyle="steps-post", color=f"C{i}", label=name)
            else:
                panel.plot(found.logp.cpu(), found.logit.cpu(), ".", color=f"C{i}", alpha=0.4, label=name)
        _dress(panel, title, *((title, "share of responses") if field else ("Σ Δ log p", "Σ |Δz|")))
    return _finish(figure, path)


def plot_percentile_shares(
    shares: Mapping[str, Tensor], path: str | Path | None = None, *, title: str = "shifts in the baseline's bins"
) -> Figure:
    """How each model's token shifts fall into the baseline's percentile bins (BNF Figure 4).

    Args:
        shares: name → `percentile_shares`.
        path: also write a PNG there.
        title: of the panel.

    Raises:
        ValueError: no shares.
    """
    figure, axes = _figure("shares", shares, 1, 1)
    for i, (name, values) in enumerate(shares.items()):
        centres = (torch.arange(len(values)) + 0.5) * 100 / len(values)
        axes[0].plot(centres, values.cpu(), "o-", color=f"C{i}", markersize=3, label=name)
    _dress(axes[0], title, "percentile of the baseline", "share of tokens")
    return _finish(figure, path)


def plot_vocabulary_shift(runs: Mapping[str, VocabularyShift], path: str | Path | None = None) -> Figure:
    """Mean logit shifts in order, and the Lorenz curve of the absolute ones, whose bow is the Gini coefficient.

    Args:
        runs: name → `vocabulary_shift`.
        path: also write a PNG there.

    Raises:
        ValueError: no runs.
    """
    figure, axes = _figure("runs", runs, 1, 2)
    for i, (name, found) in enumerate(runs.items()):
        axes[0].plot(_ordered(found.mean), color=f"C{i}", label=name)
        size = _ordered(found.absolute)
        entries = torch.linspace(0, 1, len(size) + 1)
        shares = torch.cat([size.new_zeros(1), size.cumsum(0) / size.sum()]) if bool(size.any()) else entries
        axes[1].plot(entries, shares, color=f"C{i}", label=f"{name}: {float(found.gini):.3f}")
    axes[1].plot([0, 1], [0, 1], ":", color="grey")
    _dress(axes[0], "mean logit shift", "vocabulary entries, sorted", "mean Δz")
    _dress(axes[1], "Lorenz curve and Gini coefficient", "share of the vocabulary", "share of mean |Δz|")
    return _finish(figure, path)


def _ordered(values: Tensor) -> Tensor:
    values = values.reshape(-1)
    return values[~values.isnan()].sort().values.cpu()


def _figure(name: str, results: Mapping[str, Any], rows: int, columns: int) -> tuple[Figure, list[Any]]:
    if not results:
        raise ValueError(f"{name}: expected at least one, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        path = Path(path)
        place = path.with_name(path.name + ".tmp")
        figure.savefig(place, dpi=100, format="png")
        os.replace(place, path)
    return figure
