"""The losses: from hidden states and the LM head to the loss and its gradients; the logits never exist.

    from rgpb.fused import bnf_loss
    loss = bnf_loss(hidden, head, target, label, ref=ref_scores)

One function, `fused_loss`, serves all objectives; each `<name>_loss` is `fused_loss` with that objective and its
options.

Dimensions: B responses, T padded length, N packed length, V vocabulary, H hidden size, U units (responses, pairs or
groups), G groups, K responses of a group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rgpb.engine import skipping
from rgpb.engine.plan import DEFAULT_WORKSPACE, Plan
from rgpb.engine.single import encodable, encode_options
from rgpb.head import LMHead
from rgpb.layout import Layout, Responses, TokenScores, pairs, repeat, tokens_of_each
from rgpb.logprob import (
    check_inputs,
    compute_dtype,
    is_traced,
    linear_logprob,
    plan_call,
    raw_scores,
    resolve_impl,
    token_scores,
)
from rgpb.objectives import OBJECTIVES, Objective, is_registered, resolve, unit_values
from rgpb.objectives.registry import best, check_options, drawn, reward_scale

Reference = TokenScores | Tensor | tuple[Tensor, Tensor | LMHead]
REDUCTIONS = ("mean", "sum", "none")
HOW = ("impl", "engine", "grad_tolerance", "sort_vocab", "workspace")  # what changes how a loss is computed, not what


def fused_loss(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    objective: str | Callable[..., Tensor] | Mapping[str, float],
    label: Tensor | None = None,
    ref: Reference | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_metrics: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    grad_tolerance: float | str | None = None,
    sort_vocab: bool = False,
    workspace: int = DEFAULT_WORKSPACE,
    **options: Any,
) -> Any:
    """Any objective over the token scores, with gradients for hidden, weight and bias.

    Args:
        hidden: [B, T, H], or packed [N, H] with `cu_seqlens`. float64, float32, bfloat16 or float16.
        head: weight [V, H], or an `LMHead` (bias, soft-cap, scale).
        target: int64 [B, T] or [N]: the token that `hidden` at the same place predicts; `ignore_index` on prompt and
            padding. For an objective of pairs the responses are stacked `[chosen; rejected]`; for one of groups the K
            responses to a prompt are consecutive rows, of which one without any token takes no part.
        objective: a name in `rgpb.objectives.OBJECTIVES`; a weighted sum of them, {"mle": 1.0, "dpo": 0.5} or
            "mle + 0.5*dpo" (`rgpb.objectives.registry.weighted_sum`), at the cost of one; or a function of `Responses`
            that returns one value per response, pair or group.
        label: [B] bool, or ±1: preferred or not. For objectives that need it (bnf, kto, bco).
        ref: the reference model's scores, for objectives that compare with it: a `TokenScores` or per-token
            log-probabilities in the shape of `target`; `(ref_hidden, ref_head)` to be scored here without gradient; or,
            where sums are enough (dpo, swepo, …), [B] sums of log-probabilities (a tensor in the shape of a packed
            `target` is per token, also where N = B). A `TokenScores` is exact also for confident
            tokens; from a float32 log-probability of 0 nothing is known of 1 − p.
        group_size: K, 2 or more, for objectives of groups; default: from `rewards`.
        rewards: [G, K] numbers, higher is better, for objectives that need them (swepo, infonca, nca, multi_dpo). Those
            of responses without tokens aren't read.
        cu_seqlens: int32 or int64 [B+1], from 0 to N, not decreasing.
        ignore_index: positions with this target don't count.
        reduction: "mean" over units, "sum", or "none" for one value per unit.
        return_metrics: also return a dict of detached tensors, 0-d but for `skipped/bound` (`metrics`).
        impl, engine: who does the work and how; "auto" takes what is predicted to be fastest. See `linear_logprob`.
        grad_tolerance, sort_vocab: let the weight's gradient leave out what is provably small; see `linear_logprob`.
            The metrics `skipped/bound`, in the shape of `target`, and `skipped/share` are NaN until the backward has
            run (`rgpb.engine.skipping.Skipped`), and 0 where dW isn't asked for.
        workspace: bytes held at most beyond inputs and gradients; default 512 MiB.
        **options: the objective's own (`beta`, …); of a sum also `**{"dpo.beta": 0.2}` for one of its terms.

    Returns:
        The loss, float32 (float64 for float64 input), 0-d or [U]; with `return_metrics`, (loss, metrics).

    Raises:
        ValueError: as `linear_logprob`; and a missing or surplus `ref`, `label`, `group_size` or `rewards`, labels
            other than bool or ±1, rewards that aren't finite, a number of responses that pairs or groups don't divide,
            `cu_seqlens` that don't fit, an unknown objective, option or reduction.
    """
    head = check_inputs(hidden, head, target, impl, workspace)
    spec = resolve(objective)
    tolerance = skipping.check(grad_tolerance, sort_vocab, spec.entropy_grad, head.weight.dtype)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    options = check_options(spec, options)
    layout = make_layout(target, cu_seqlens, ignore_index)
    if spec.unit == "pair" and layout.responses % 2:
        raise ValueError(
            f"target: expected an even number of responses, stacked [chosen; rejected], for {spec.name}, "
            f"got {layout.responses}"
        )
    label = check_label(spec, label, layout.responses, hidden)
    group_size, reward = check_groups(spec, group_size, rewards, layout, hidden)
    ref_scores, ref_sums = reference_scores(spec, ref, hidden, target, layout, ignore_index, impl, workspace)
    most = {**(spec.options or {}), **options}.get("m")
    if spec.draw is not None and most != (group_size or 0) - 1:  # else all are taken
        with torch.no_grad():
            scores = linear_logprob(
                hidden, head, target, ignore_index=ignore_index, impl=impl, engine=engine, workspace=workspace
            )
            candidates = Responses(scores.flat(), ref_scores, ref_sums, label, layout, group_size, reward)
            keep = drawn(spec, candidates, options)
        # what wasn't drawn has no token any more, so it costs nothing, and a second draw has no choice
        target = torch.where(_of_response(keep, layout, target), target, ignore_index)
        layout = make_layout(target, cu_seqlens, ignore_index)
        ref_sums = None if ref_sums is None else torch.where(keep, ref_sums, 0.0)
        # all that is left is taken, so nothing is left to chance
        options |= {"sampler": "max"} if "sampler" in (spec.options or {}) else {}
    options = {name: value for name, value in options.items() if not isinstance(value, torch.Generator)}
    chosen = call_plan(
        hidden, head, spec, reduction, workspace, options, impl, engine, grad_tolerance, sort_vocab,
        tokens_of_units(spec, layout, group_size),
    )  # fmt: skip
    report = hidden.new_empty(0)
    if chosen.path == "single":
        loss, *raw = torch.ops.rgpb.single_pass(
            hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, target.reshape(-1),
            _lengths(layout, target), label,
            None if ref_scores is None else ref_scores.logp, None if ref_scores is None else ref_scores.log_odds,
            ref_sums, reward, group_size or 0, spec.name, encode_options(options), reduction == "mean", head.softcap,
            head.scale, ignore_index, workspace, compute_dtype(hidden), chosen.impl, chosen.engine,
            hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad,
        )[:4]  # fmt: skip
        z_y, lse_other, h_o = raw[0], raw[1], raw[2] if spec.entropy else None
    else:
        *raw, report = raw_scores(
            hidden,
            head,
            target,
            ignore_index,
            spec.entropy,
            spec.entropy_grad,
            chosen,
            tolerance,
            sort_vocab,
            workspace,
        )
        z_y, lse_other, h_o = (None if x is None else x.view(-1) for x in raw)  # type: ignore[assignment]
    if h_o is not None and not spec.entropy_grad:
        h_o = h_o.detach()
    responses = Responses(
        token_scores(z_y, lse_other, h_o, mask=layout.mask, entropy=False), ref_scores, ref_sums, label, layout,
        group_size, reward,
    )  # fmt: skip
    if chosen.path != "single":
        values = unit_values(spec, responses, options)
        if reduction != "none":
            values = values.mean() if reduction == "mean" and values.numel() else values.sum()
        loss = values.to(z_y.dtype)
    if not return_metrics:
        return loss
    with torch.no_grad():
        measured = metrics(responses, spec, options)
    if tolerance is not None:
        # without a second sweep for dW nothing is left out
        skipped = skipping.Skipped.read(report if len(report) else hidden.new_zeros(target.numel() + 1).float())
        measured |= {"skipped/bound": skipped.bound.view(target.shape), "skipped/share": skipped.share}
    return loss, measured


def metrics(responses: Responses, spec: Objective, options: dict[str, Any]) -> dict[str, Tensor]:
    """What goes with every objective, as detached 0-d tensors; nan where a batch has no such response.

    The chosen of a group is the one with the highest reward, without rewards the first; all others are rejected.

    `logps/{chosen,rejected}`: mean Σ log p. `perplexity`: exp of minus a chosen response's mean token log-probability,
    averaged over responses. `agility`: mean e^{S̄} of the chosen minus that of the rejected (Tuan & Wang 2024, §6).
    With a reference, `rewards/{chosen,rejected,margins}`: β (S − R), and for pairs and groups `rewards/accuracies`, the
    part of (chosen, rejected) in which the chosen's is higher; β = 1 where the objective has none. Without labels,
    pairs or groups all responses count as chosen.
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
        return torch.where(which, values, 0).sum() / which.sum()

    out = {"logps/chosen": average(total, good), "perplexity": average(torch.exp(-mean), good)}
    if spec.unit == "pair" or grouped or responses.label is not None:
        out["logps/rejected"] = average(total, bad)
        out["agility"] = average(mean.exp(), good) - average(mean.exp(), bad)
    if responses.ref_sums is not None:
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


def call_plan(
    hidden: Tensor, head: LMHead, spec: Objective, reduction: str, workspace: int, options: dict[str, Any],
    impl: str = "auto", engine: str = "auto", grad_tolerance: float | str | None = None, sort_vocab: bool = False,
    unit_tokens: Callable[[], Sequence[int]] | None = None,
) -> Plan:  # fmt: skip
    """What `fused_loss` will run for these arguments, with `tokens_of_units` of its target."""
    registered = is_registered(spec) and encodable(options)
    return plan_call(
        hidden, head, resolve_impl(impl, hidden.device), engine, workspace,
        couples=spec.couples if registered else "batch", scalar=reduction != "none", entropy_grad=spec.entropy_grad,
        skipping=grad_tolerance is not None, sort_vocab=sort_vocab, unit_tokens=unit_tokens,
    )  # fmt: skip


def tokens_of_units(spec: Objective, layout: Layout, group_size: int | None) -> Callable[[], list[int]] | None:
    """What gives the tokens of each pair or group, reading them from the device when it is first asked; None where the
    objective couples something else, or tensors have no values yet."""
    count = layout.tokens
    if spec.couples not in ("pair", "group") or torch.compiler.is_compiling() or is_traced(count):
        return None
    members = count.view(2, -1) if spec.unit == "pair" else count.view(-1, group_size or 1).t()
    return cache(lambda: members.sum(0).tolist())


def make_layout(target: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Layout:
    """The grouping of a padded [B, T] or packed [N] target."""
    mask = target != ignore_index
    if cu_seqlens is None:
        if target.ndim != 2:
            raise ValueError(f"target: expected shape [B, T], or [N] with cu_seqlens, got {list(target.shape)}")
        return Layout(target.shape[0], None, mask.sum(1), mask.reshape(-1))
    if target.ndim != 1:
        raise ValueError(f"target: expected packed shape [N] together with cu_seqlens, got {list(target.shape)}")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 of shape [B+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != target.device:
        raise ValueError(f"cu_seqlens: expected device {target.device} as target, got {cu_seqlens.device}")
    lengths = cu_seqlens.long().diff()
    if not torch.compiler.is_compiling():
        ends = [int(cu_seqlens[0]), int(lengths.min()), int(cu_seqlens[-1])]
        if ends[0] != 0 or ends[1] < 0 or ends[2] != len(target):
            raise ValueError(
                f"cu_seqlens: expected not decreasing from 0 to N={len(target)}, "
                f"got {cu_seqlens.tolist()[:8]} … {ends[2]}"
            )
    return Layout(len(cu_seqlens) - 1, lengths, tokens_of_each(mask, lengths), mask)


def check_label(spec: Objective, label: Tensor | None, responses: int, hidden: Tensor) -> Tensor | None:
    """The label as float64 ±1 [B]."""
    if label is None:
        if spec.label:
            raise ValueError(f"label: expected [B={responses}] bool or ±1 for {spec.name}, got None")
        return None
    if not isinstance(label, Tensor):
        raise ValueError(f"label: expected a tensor, got {type(label).__name__}")
    if not spec.label and is_registered(spec):
        raise ValueError(f"label: expected None, since {spec.name} has no use for it, got {list(label.shape)}")
    if label.shape != (responses,):
        raise ValueError(f"label: expected shape [B={responses}], got {list(label.shape)}")
    if label.is_complex():
        raise ValueError(f"label: expected bool or values of ±1, got {label.dtype}")
    if label.device != hidden.device:
        raise ValueError(f"label: expected device {hidden.device} as hidden, got {label.device}")
    if label.dtype == torch.bool:
        return label.double() * 2 - 1
    if not torch.compiler.is_compiling() and not bool((label.abs() == 1).all()):
        raise ValueError(f"label: expected bool or values of ±1, got {label[label.abs() != 1][:4].tolist()}")
    return label.double()


def check_groups(
    spec: Objective, group_size: int | None, rewards: Tensor | None, layout: Layout, hidden: Tensor
) -> tuple[int | None, Tensor | None]:
    """(K, rewards as float64 [B] with 0 for responses without tokens)."""
    if spec.unit != "group" and is_registered(spec):
        for name, given in (("group_size", group_size), ("rewards", rewards)):
            if given is not None:
                raise ValueError(f"{name}: expected None, since {spec.name} compares no groups, got {given!r}")
        return None, None
    if spec.rewards and rewards is None:
        raise ValueError(f"rewards: expected [G, K] numbers for {spec.name}, got None")
    if rewards is not None:
        if not isinstance(rewards, Tensor) or rewards.is_complex():
            got = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(f"rewards: expected a tensor of real numbers, got {got}")
        if not spec.rewards and is_registered(spec):
            raise ValueError(
                f"rewards: expected None, since {spec.name} has no use for them, got {list(rewards.shape)}"
            )
        if rewards.ndim != 2 or rewards.numel() != layout.responses or group_size not in (None, rewards.shape[1]):
            of = f" in groups of {group_size}" if group_size else ""
            raise ValueError(
                f"rewards: expected shape [G, K] for {layout.responses} responses{of}, got {list(rewards.shape)}"
            )
        if rewards.device != hidden.device:
            raise ValueError(f"rewards: expected device {hidden.device} as hidden, got {rewards.device}")
        group_size = rewards.shape[1]
    if group_size is None:
        if spec.unit == "group":
            raise ValueError(f"group_size: expected the responses per group, 2 or more, for {spec.name}, got None")
        return None, None
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size: expected a whole number, 2 or more, got {group_size!r}")
    if layout.responses % group_size:
        raise ValueError(f"target: expected groups of {group_size} responses, got {layout.responses} responses")
    if rewards is None:
        return group_size, None
    reward = torch.where(layout.tokens > 0, rewards.reshape(-1).double(), 0.0)
    if not torch.compiler.is_compiling() and not bool(reward.isfinite().all()):
        at = int((~reward.isfinite()).nonzero()[0])
        raise ValueError(f"rewards: expected finite numbers, got {reward[at].item()} for response {at}")
    return group_size, reward


def reference_scores(
    spec: Objective, ref: Reference | None, hidden: Tensor, target: Tensor, layout: Layout, ignore_index: int,
    impl: str, workspace: int,
) -> tuple[TokenScores | None, Tensor | None]:  # fmt: skip
    """Per-token scores [P] of the reference (None where only sums came), and their sums, float64 [B]."""
    if ref is None:
        if spec.ref is not None:
            raise ValueError(f"ref: expected the reference's scores for {spec.name}, got None")
        return None, None
    if spec.ref is None and is_registered(spec):
        raise ValueError(f"ref: expected None, since {spec.name} has no reference, got {type(ref).__name__}")
    if isinstance(ref, Tensor):
        if ref.shape == (layout.responses,) and ref.shape != target.shape:
            if spec.ref == "tokens":
                raise ValueError(
                    f"ref: expected scores per token, {list(target.shape)}, for {spec.name}, "
                    f"got one sum per response, {list(ref.shape)}"
                )
            _check_ref("ref", ref, ref.shape, hidden)
            there = layout.tokens > 0
            _check_logp("ref", ref, there)
            return None, torch.where(there, ref.detach().double(), 0.0)
        _check_ref("ref", ref, target.shape, hidden)
        _check_logp("ref", ref, target != ignore_index)
        logp = ref.detach().clamp(max=0)  # what rounding left above 0; `_check_logp` refuses more
        # log(1 − p) from log p, each branch where it is exact
        complement = torch.where(logp > -0.693, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))
        scores = TokenScores(logp, logp - complement, torch.zeros_like(logp))
    elif isinstance(ref, TokenScores):
        scores = ref
        for name in ("logp", "log_odds"):
            _check_ref(f"ref.{name}", getattr(ref, name), target.shape, hidden)
        scored = (scores.logp != 0) | (scores.log_odds != 0) | (scores.lse != 0)
        _check_logp("ref.logp", torch.where(scored, scores.logp, torch.nan), target != ignore_index)
    elif isinstance(ref, tuple) and len(ref) == 2:
        with torch.no_grad():
            scores = linear_logprob(*ref, target, ignore_index=ignore_index, impl=impl, workspace=workspace)
    else:
        raise ValueError(
            "ref: expected TokenScores, a tensor of log-probabilities or (ref_hidden, ref_head), "
            f"got {type(ref).__name__}"
        )
    flat = TokenScores(
        *(scores.logp.detach().reshape(-1), scores.log_odds.detach().reshape(-1), scores.lse.detach().reshape(-1))
    )
    return flat, layout.sum(flat.logp)


def _check_logp(name: str, given: Tensor, mask: Tensor) -> None:
    """Log-probabilities wherever the mask says; NaN stands for a position that was never scored."""
    wrong = mask & ~(given <= 1e-3)
    if not torch.compiler.is_compiling() and bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        value = given.reshape(-1)[at].item()
        raise ValueError(
            f"{name}: expected a log-probability, at most 0, wherever target isn't ignored, "
            f"got {value:.4g} at flat position {at}"
        )


def _check_ref(name: str, given: Tensor, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != shape or not given.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor of shape {list(shape)}, got {given.dtype} {list(given.shape)}"
        )
    if given.device != hidden.device:
        raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {given.device}")


def _of_response(values: Tensor, layout: Layout, target: Tensor) -> Tensor:
    """Each response's value at all its positions. [B] → the shape of `target`."""
    if layout.lengths is None:
        return values[:, None].expand_as(target)
    return repeat(values, layout.lengths, len(target))


def _lengths(layout: Layout, target: Tensor) -> Tensor:
    if layout.lengths is not None:
        return layout.lengths
    return torch.full_like(layout.tokens, target.shape[1])


# -- one function per objective ---------------------------------------------------------------------------------------


def _loss(name: str) -> Callable[..., Any]:
    """`fused_loss` with that objective; the signature shows its options, `label` and `ref` only where of use."""
    spec = OBJECTIVES[name]

    def loss(hidden: Tensor, head: Tensor | LMHead, target: Tensor, *labels: Tensor, **keywords: Any) -> Any:
        if len(labels) > spec.label:
            raise TypeError(
                f"{name}_loss() takes {3 + spec.label} positional arguments but {3 + len(labels)} were given"
            )
        if labels:
            keywords["label"] = labels[0]
        return fused_loss(hidden, head, target, objective=name, **keywords)

    shared = inspect.signature(fused_loss).parameters
    tensors = [shared[n].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("hidden", "head", "target")]
    if spec.label:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        tensors.append(shared["label"].replace(kind=kind, default=inspect.Parameter.empty))
    keywords = [inspect.signature(spec.function).parameters[option] for option in spec.options or ()]
    required = [n for n, needed in (("ref", spec.ref is not None), ("rewards", spec.rewards)) if needed]
    if spec.unit == "group":
        required += [] if spec.rewards else ["group_size"]
        keywords += [shared["group_size"]] if spec.rewards else []
    keywords += [shared[n].replace(default=inspect.Parameter.empty) for n in required]
    keywords += [shared[n] for n in ("cu_seqlens", "ignore_index", "reduction", "return_metrics", *HOW)]
    loss.__name__ = loss.__qualname__ = f"{name}_loss"
    loss.__signature__ = inspect.Signature([*tensors, *keywords])  # type: ignore[attr-defined]
    loss.__doc__ = f"{inspect.getdoc(spec.function)}\n\nArguments, results and errors as `fused_loss`."
    return loss


mle_loss = _loss("mle")
nll_pll_loss = _loss("nll_pll")
unlikelihood_loss = _loss("unlikelihood")
bnf_loss = _loss("bnf")
exmate_loss = _loss("exmate")
sequence_unlikelihood_loss = _loss("sequence_unlikelihood")
dpo_loss = _loss("dpo")
ipo_loss = _loss("ipo")
slic_loss = _loss("slic")
simpo_loss = _loss("simpo")
cpo_loss = _loss("cpo")
orpo_loss = _loss("orpo")
rdpo_loss = _loss("rdpo")
rpo_loss = _loss("rpo")
exo_loss = _loss("exo")
sppo_loss = _loss("sppo")
nca_pair_loss = _loss("nca_pair")
apo_zero_loss = _loss("apo_zero")
apo_down_loss = _loss("apo_down")
bco_loss = _loss("bco")
kto_loss = _loss("kto")
infonca_loss = _loss("infonca")
nca_loss = _loss("nca")
swepo_loss = _loss("swepo")
rnce_loss = _loss("rnce")
mc_po_loss = _loss("mc_po")
multi_dpo_loss = _loss("multi_dpo")


class FusedLoss(nn.Module):
    """`fused_loss` as a module: `FusedLoss("dpo", beta=0.1)(hidden, head, target, ref=ref)`.

    Args:
        objective: a name, a sum or a function, as for `fused_loss`.
        **options: anything of `fused_loss` that stays the same from call to call, the objective's options among it. A
            `RunningMean` among them (bco's `delta`) is a submodule, so `state_dict` holds it.

    Raises:
        ValueError: an unknown objective.
    """

    def __init__(self, objective: str | Callable[..., Tensor] | Mapping[str, float], **options: Any):
        super().__init__()
        self.objective, self.options = objective, options
        self.name = resolve(objective).name
        modules = {name.replace(".", "_"): x for name, x in options.items() if isinstance(x, nn.Module)}
        if modules:
            self.running = nn.ModuleDict(modules)

    def forward(
        self, hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor | None = None, **keywords: Any
    ) -> Any:
        """See `fused_loss`."""
        return fused_loss(hidden, head, target, objective=self.objective, label=label, **{**self.options, **keywords})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.name), *(f"{key}={value!r}" for key, value in self.options.items())])
