"""What goes with a loss: mean log-probabilities, perplexity, agility, implicit rewards.

Dimensions: B responses, G groups, K responses of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgpb.layout import Responses, pairs
from rgpb.objectives import Objective, best, reward_scale


def metrics(responses: Responses, spec: Objective, options: dict[str, Any]) -> dict[str, Tensor]:
    """What goes with every objective, as detached 0-d tensors; nan where a batch has no such response.

    The chosen of a group is the one with the highest reward, without rewards the first; all others are rejected.

    `logps/{chosen,rejected}`: mean Σ log p. `perplexity`: exp of minus a chosen response's mean token log-probability,
    averaged over responses. `agility/{chosen,rejected}`: mean e^{S̄}; `agility`: the difference (Tuan & Wang 2024, §6).
    With a reference, `rewards/{chosen,rejected,margins}`: β (S − R), and for pairs and groups `rewards/accuracies`, the
    part of (chosen, rejected) that are `ranked` rightly; β = 1 where the objective has none. Without labels,
    pairs or groups all responses count as chosen. With a `data_group` all are means over the responses of its ranks.
    """
    total, mean = (responses.logps(normalize).detach() for normalize in (False, True))
    count = responses.layout.tokens
    grouped = responses.group_size is not None and spec.unit == "group"
    if spec.unit == "pair":
        half = len(total) // 2
        good = torch.arange(len(total), device=total.device) < half
    elif grouped:
        first = best(responses)[:, None]
        good = torch.zeros_like(responses.groups(count), dtype=torch.bool).scatter(1, first, True)
        compared = (responses.groups(count) > 0).gather(1, first).expand_as(good).reshape(-1)
        good = good.view(-1)
    else:
        good = torch.ones_like(count, dtype=torch.bool) if responses.label is None else responses.label > 0
    good, bad = good & (count > 0), ~good & (count > 0)
    if grouped:
        bad = bad & compared

    def average(values: Tensor, which: Tensor) -> Tensor:
        summed, number = responses.total(values, which)
        return summed / number

    out = {"logps/chosen": average(total, good), "perplexity": average(torch.exp(-mean), good)}
    if spec.unit == "pair" or grouped or responses.label is not None:
        out["logps/rejected"] = average(total, bad)
        out |= {f"agility/{side}": average(mean.exp(), which) for side, which in (("chosen", good), ("rejected", bad))}
    if responses.ref is not None or responses.ref_sums is not None:
        reward = reward_scale(spec, options) * responses.log_ratios().detach()
        out["rewards/chosen"] = average(reward, good)
        ratio, size = responses.log_ratios().detach(), total.abs()
        if "logps/rejected" in out:
            out["rewards/rejected"] = average(reward, bad)
        if spec.unit == "pair":
            both = (count > 0).view(2, -1).all(0)
            out["rewards/accuracies"] = average(ranked(*pairs(ratio), *pairs(size)), both)
        elif grouped:
            ratios, sizes = responses.groups(ratio), responses.groups(size)
            right = ranked(ratios.gather(1, first), ratios, sizes.gather(1, first), sizes)
            out["rewards/accuracies"] = average(right.view(-1), bad)
    return {name: value.float() for name, value in with_differences(out).items()}


def ranked(chosen: Tensor, rejected: Tensor, chosen_size: Tensor, rejected_size: Tensor) -> Tensor:
    """1 where the chosen's score is higher, 0 where it is lower, ½ where they are one to float32's rounding; float64.

    Args:
        chosen, rejected: scores, of shapes that broadcast.
        chosen_size, rejected_size: of the numbers that they were computed from.
    """
    difference, noise = chosen - rejected, 1e-6 * (chosen_size + rejected_size)
    return torch.where(difference.abs() > noise, (difference > 0).double(), 0.5)


def with_differences(averages: dict[str, Any]) -> dict[str, Any]:
    """Averages over chosen and over rejected responses, and what is a difference of two such: so it is exact, however
    many batches they come from."""
    out = dict(averages)
    for name, kind in (("agility", "agility"), ("rewards/margins", "rewards")):
        if f"{kind}/chosen" in out and f"{kind}/rejected" in out:
            out[name] = out[f"{kind}/chosen"] - out[f"{kind}/rejected"]
    return out
