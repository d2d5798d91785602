"""Objectives of single responses.

`<name>_terms` says the same loss to a kernel that computes it token by token in the launch that sweeps the logits.

p = π_θ of a token, λ its log-odds, n the number of tokens of a response, S = Σ log π_θ, R = Σ log π_ref, Δ = S − R,
S̄ = S / n; σ the sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgpb.layout import Responses
from rgpb.objectives.ranges import NonNegative, Positive
from rgpb.objectives.registry import objective


def per_token(tokens: Tensor, length_normalize: bool) -> Tensor:
    """Each response's factor of a sum over its tokens: 1 / n, or 1. int64 [B] → float64 [B]"""
    n = tokens.clamp(min=1).double()
    return 1 / n if length_normalize else torch.ones_like(n)


def mle_terms(tokens: Tensor, label: Tensor | None, *, length_normalize: bool = True) -> tuple[str, Tensor]:
    return "nll", per_token(tokens, length_normalize)


def bnf_terms(tokens: Tensor, label: Tensor | None) -> tuple[str, Tensor]:
    assert label is not None  # checked at the door
    return "bnf", label / tokens.clamp(min=1)


@objective(couples="token", terms=mle_terms)
def mle(responses: Responses, *, length_normalize: bool = True) -> Tensor:
    """Maximum likelihood: −S̄, or −S. [B]

    Tuan & Wang 2024 (arXiv 2408.16751), Eq. 2–3; supervised fine-tuning.
    """
    return -responses.logps(length_normalize)


@objective(couples="token", ref="tokens", label=True, entropy=True, terms=bnf_terms)
def bnf(responses: Responses) -> Tensor:
    """Bidirectional negative feedback: −(label / n) Σ_t Σ_k f_k log p_k with the dynamic target distribution f. [B]

    BNF (ICLR 2025), Eq. 4 and 6: f_y = min(p / p_ref, 1), f_k = (1 − f_y) p_k / (1 − p) elsewhere, detached. In
    closed form

        Σ_k f_k log p_k = f_y log p + (1 − f_y)(log(1 − p) − H_o),   its gradient on the logits c · (onehot − p),
        c = (f_y − p) / (1 − p) = min(1, exp(λ − λ_ref)),

    so f never has to exist: the coefficient c is the ratio of odds, capped at 1.
    """
    scores, ref = responses.policy, responses.ref
    if ref is None or scores.other_entropy is None or responses.label is None:
        raise ValueError("bnf: expected reference scores, labels and other_entropy; got None for one of them")
    log_odds = scores.log_odds.detach()
    c = torch.where(log_odds >= ref.log_odds, 1.0, torch.exp(log_odds - ref.log_odds))
    f_others = -torch.expm1((scores.logp.detach() - ref.logp).clamp(max=0))
    others = torch.where(f_others > 0, f_others * (F.logsigmoid(-log_odds) - scores.other_entropy.detach()), 0.0)
    own = torch.where(f_others < 1, (1 - f_others) * scores.logp.detach(), 0.0)
    descent = torch.where(c > 0, c * scores.logp, 0.0)
    return -responses.label * responses.mean(descent + (own + others - descent).detach())


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
        values = values.double()
        return self.take(values.sum(), values.new_tensor(float(values.numel())))

    @torch.no_grad()
    def take(self, total: Tensor, number: Tensor) -> Tensor:
        """The same of values of which the sum and the number are known. 0-d, float64"""
        self.mean, self.count = self.mean.to(total.device), self.count.to(total.device)
        count = self.count + number
        mean = self.mean + (total - number * self.mean) / count.clamp(min=1)
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
def bco(
    responses: Responses, *, beta: Annotated[float, Positive()] = 0.1, delta: RunningMean | float | None = None
) -> Tensor:
    """−log σ(label · (βΔ − δ)), δ the mean of βΔ, detached. [B]

    δ: None takes the mean over the batch's responses that have tokens; a `RunningMean` takes the batch in and gives the
    mean of all so far, as the paper does; a number is taken as it is.

    Jung et al. 2024 (BCO); MC-PO (arXiv 2502.04567), Table 5.
    """
    reward = beta * responses.log_ratios()
    return -F.logsigmoid(_labels(responses) * (reward - _baseline(delta, reward, responses)))


@objective(couples="batch", ref="sums", label=True, mismatched=("z0",))
def kto(
    responses: Responses,
    *,
    beta: Annotated[float, Positive()] = 0.1,
    desirable_weight: Annotated[float, NonNegative()] = 1.0,
    undesirable_weight: Annotated[float, NonNegative()] = 1.0,
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
        total, number = responses.total(z0)
        baseline = total / number
        if not (torch.compiler.is_compiling() or bool(baseline.isfinite())):
            raise ValueError(f"z0: expected finite numbers, at least one, got others among {z0.numel()}")
        baseline = baseline.clamp(min=0)
    else:
        baseline = _baseline(z0, ratio, responses)
        baseline = baseline if isinstance(z0, float | int) else baseline.clamp(min=0)  # a number is taken as it is
    weight = desirable_weight * (label > 0).double() + undesirable_weight * (label < 0).double()
    return weight * torch.sigmoid(-label * beta * (ratio - baseline))


def _labels(responses: Responses) -> Tensor:
    if responses.label is None:
        raise ValueError("label: expected the labels of the responses, got None")
    return responses.label


def _baseline(given: RunningMean | float | None, values: Tensor, responses: Responses) -> Tensor:
    """What single responses are compared with, 0-d and without gradient."""
    if isinstance(given, float | int):
        return values.new_tensor(float(given))
    total, number = responses.total(values, responses.present)
    return total / number.clamp(min=1) if given is None else given.take(total, number)
