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
    averaged over responses. `agility`: mean e^{S̄} of the chosen minus that of the rejected (Tuan & Wang 2024, §6).
    With a reference, `rewards/{chosen,rejected,margins}`: β (S − R), and for pairs and groups `rewards/accuracies`, the
    part of (chosen, rejected) in which the chosen's is higher; β = 1 where the objective has none. Without labels,
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
        out["agility"] = average(mean.exp(), good) - average(mean.exp(), bad)
    if responses.ref is not None or responses.ref_sums is not None:
        reward = reward_scale(spec, options) * responses.log_ratios().detach()
        out["rewards/chosen"] = average(reward, good)
        if "agility" in out:
            out["rewards/rejected"] = average(reward, bad)
            out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        if spec.unit == "pair":
            chosen, rejected = pairs(reward)
            both = sum(pairs(count)) > 0
            out["rewards/accuracies"] = average((chosen > rejected).double(), both)  # type: ignore[arg-type]
        elif grouped:
            chosen = responses.groups(reward).gather(1, first)
            out["rewards/accuracies"] = average((chosen > responses.groups(reward)).double().view(-1), bad)
    return {name: value.float() for name, value in out.items()}
