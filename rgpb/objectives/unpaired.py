"""Objectives of single responses that are compared with the average of a batch.

S = Σ log π_θ, R = Σ log π_ref, Δ = S − R of a response; σ the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgpb.layout import Responses
from rgpb.objectives.registry import objective


class RunningMean(nn.Module):
    """The mean of all values of all calls so far, as a module, so that `state_dict` keeps it.

    In evaluation mode it only gives the mean. It stays float64 when a model that it is part of is cast.

    >>> delta = RunningMean()
    >>> float(delta(torch.tensor([1.0, 3.0]))), float(delta(torch.tensor([8.0])))
    (2.0, 4.0)
    """

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, values: Tensor) -> Tensor:
        """Take more values in, in training mode, and return the mean: of these where there were none before.

        [n] → 0-d, float64.
        """
        self.mean, self.count = self.mean.to(values.device), self.count.to(values.device)
        count = self.count + values.numel()
        mean = self.mean + (values.double() - self.mean).sum() / count.clamp(min=1)
        if self.training:
            self.mean.copy_(mean)
            self.count.copy_(count)
        return torch.where(self.count > 0, self.mean, mean)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self


@objective(couples="batch", ref="sums", label=True, running=("delta",))
def bco(responses: Responses, *, beta: float = 0.1, delta: RunningMean | float | None = None) -> Tensor:
    """−log σ(label · (βΔ − δ)), δ the mean of βΔ, detached. [B]

    δ: None takes the mean over the batch's responses that have tokens; a `RunningMean` takes the batch in and gives the
    mean of all so far, as the paper does; a number is taken as it is.

    Jung et al. 2024 (BCO); MC-PO (arXiv 2502.04567), Table 5.
    """
    reward = beta * responses.log_ratios()
    return -F.logsigmoid(_labels(responses) * (reward - _baseline("delta", delta, reward, responses)))


@objective(couples="batch", ref="sums", label=True, mismatched=("z0",))
def kto(
    responses: Responses,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z0: Tensor | RunningMean | float | None = None,
) -> Tensor:
    """w · (1 − σ(label · β (Δ − z₀))), w by the label; z₀ ≥ 0 estimates KL(π_θ ‖ π_ref), detached. [B]

    z₀: None takes the mean Δ of the batch; a tensor holds Δ of completions put after prompts they don't belong to, any
    shape, and its mean is taken (the paper's estimate); a `RunningMean` takes the batch in and gives the mean Δ of all
    so far. All three at least 0. A number is taken as it is.

    Ethayarajh et al. 2024 (KTO), Eq. 8.
    """
    ratio, label = responses.log_ratios(), _labels(responses)
    if isinstance(z0, Tensor):
        if not z0.numel() or not (torch.compiler.is_compiling() or bool(z0.isfinite().all())):
            raise ValueError(f"z0: expected finite numbers, at least one, got others among {z0.numel()}")
        baseline = z0.detach().double().mean().clamp(min=0)
    else:
        baseline = _baseline("z0", z0, ratio, responses)
        baseline = baseline if isinstance(z0, float | int) else baseline.clamp(min=0)
    weight = desirable_weight * (label > 0).double() + undesirable_weight * (label < 0).double()
    return weight * torch.sigmoid(-label * beta * (ratio - baseline))


def _labels(responses: Responses) -> Tensor:
    if responses.label is None:
        raise ValueError("label: expected the labels of the responses, got None")
    return responses.label


def _baseline(name: str, given: RunningMean | float | None, values: Tensor, responses: Responses) -> Tensor:
    """What single responses are compared with, 0-d and without gradient."""
    if isinstance(given, float | int) and not isinstance(given, bool) and math.isfinite(given):
        return values.new_tensor(float(given))
    known = values.detach()[responses.present]
    if isinstance(given, RunningMean):
        return given(known)
    if given is not None:
        raise ValueError(f"{name}: expected a finite number, a RunningMean or None, got {given!r}")
    return known.sum() / max(known.numel(), 1)
