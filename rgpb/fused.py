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
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgpb.engine.call import Tensors
from rgpb.engine.shards import scored as scored_by
from rgpb.engine.skipping import Skipped
from rgpb.engine.sweeps import loss as single_pass
from rgpb.engine.workspace import Workspace
from rgpb.head import LMHead
from rgpb.layout import Layout, Responses, TokenScores, repeat, token_scores
from rgpb.logprob import linear_logprob
from rgpb.metrics import metrics
from rgpb.objectives import OBJECTIVES, Objective, check_options, drawn, resolve, unit_values
from rgpb.objectives.registry import RESERVED, units
from rgpb.parallel import all_sum, from_first, gradient_times, ranks_of
from rgpb.validation import (
    Checks,
    check_groups,
    check_how,
    check_ignore_index,
    check_inputs,
    check_label,
    check_ranks,
    check_scores,
    check_units,
    make_call,
    make_layout,
    reference_scores,
    tokens_of_units,
)
from rgpb.validation import (
    Reference as Reference,  # public from here, also for type checkers
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# what changes how a loss is computed, not what
HOW = ("impl", "engine", "path", "grad_tolerance", "tolerance_per", "sort_vocab", "workspace", "validate")


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
    data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "mean",
    return_metrics: bool = False,
    impl: str = "auto",
    engine: str | None = None,
    path: str = "auto",
    grad_tolerance: float | str | None = None,
    tolerance_per: str = "response",
    sort_vocab: bool | None = None,
    workspace: int | str | Workspace | None = None,
    validate: bool = True,
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
        cu_seqlens: int32 or int64 [B+1], from 0 to N, not decreasing. With a `data_group` B may be 0.
        data_group: a process group of R ranks that hold other responses of the same batch, any number of them or none.
            What an objective takes from the batch (kto, bco) and the metrics are over all of them. The mean over the
            ranks, which DDP and FSDP take of gradients, is then the loss of all units together: with "mean" a rank's
            value is R / (units of all ranks) · Σ over its own, with "sum" R · Σ; with "none" each value is as it is.
        sequence_group: a process group of ranks that hold other tokens of the same responses, in the order of the
            ranks: `hidden`, `target` and per-token `ref` are the rank's own, cut anywhere (a rank may have no token of
            a response), all else is the same on each. `target` is shifted before it is cut. The value is the same on
            all of them; each one's gradient is that of its own tokens, times the number of ranks, so that the mean over
            all ranks of both groups is the gradient of the whole. Where gradients are summed over this group, divide
            by it.
        ignore_index: positions with this target don't count.
        temperature: T above 0: all probabilities are those of softmax(z / T), z the logits with soft-cap and scale, as
            where completions were sampled at T. A `(ref_hidden, ref_head)` is scored at the same T; scores that are
            given should be.
        reduction: "mean" over units, "sum", or "none" for one value per unit.
        return_metrics: also return a dict of detached tensors, 0-d but for `skipped/bound` (`metrics`).
        impl: the kernel set; "auto" takes what is predicted to be fastest. See `linear_logprob`.
        engine: deprecated, see `linear_logprob`.
        path: "auto", or the one path that is wanted, for tests and benchmarks; see `linear_logprob`.
        grad_tolerance: let the gradients leave out what is provably small: of each row of ∂L/∂logits, in the L1 norm,
            at most this share of the largest coefficient in the same response; "auto": as much as one rounding of the
            gradients' dtype hides. Default None: nothing is left out. Where coefficients aren't known in the forward
            (two passes, `rgpb.engine.plan`) it is of the row's own coefficient. The metrics `skipped/bound`, in the
            shape of `target`, and `skipped/share` say what was left out (`rgpb.engine.skipping.Skipped`).
        tolerance_per: "response", or "row": of the row's own coefficient always, which is stricter.
        sort_vocab: with `grad_tolerance`, take the vocabulary in an estimated order by which more is left out. Default
            None: where a `Workspace` keeps the order between calls.
        workspace: bytes held at most beyond inputs and gradients, whatever the number of tokens: a number, or a text
            such as "64MiB"; or a `Workspace`, whose memory is kept between calls; or "auto" (default): 512 MiB, on a
            GPU the largest of 1, 2 and 4 GiB that is at most half of what is free. Chunks, and with them rounding,
            depend on it: give a size where runs on a GPU have to agree bitwise. Ranks that share a head or a response
            take 512 MiB.
        validate: see `linear_logprob`. Pairs and groups then take two passes.
        **options: the objective's own (`beta`, …); of a sum also `**{"dpo.beta": 0.2}` for one of its terms.

    Returns:
        The loss, float32 (float64 for float64 input), 0-d or [U]; with `return_metrics`, (loss, metrics).

    Raises:
        ValueError: as `linear_logprob`; and a missing or surplus `ref`, `label`, `group_size` or `rewards`, labels
            other than bool or ±1, rewards that aren't finite, a number of responses that pairs or groups don't divide,
            `cu_seqlens` that don't fit, a group that isn't this rank's, an unknown objective, option or reduction.
    """
    given, head = head, check_inputs(hidden, head, target, temperature)
    how = check_how(
        hidden.device, impl, engine, path, grad_tolerance, sort_vocab, workspace, tolerance_per,
        shared=head.shard is not None or sequence_group is not None, validate=validate,
    )  # fmt: skip
    ignore_index = check_ignore_index(ignore_index)
    spec = resolve(objective)
    options = check_options(spec, options)
    check_ranks(data_group, sequence_group)
    scored = partial(
        linear_logprob,
        ignore_index=ignore_index,
        temperature=temperature,
        impl=how.impl,
        workspace=workspace,
        validate=validate,
    )
    layout = make_layout(target, cu_seqlens, ignore_index, sequence_group, data_group is not None, validate)
    check_units(spec, layout, reduction)
    checks = Checks(validate)
    label = check_label(spec, label, layout.responses, hidden, checks)
    group_size, reward = check_groups(spec, group_size, rewards, layout, hidden, checks)
    ref_scores, ref_sums = reference_scores(spec, ref, hidden, target, layout, scored, checks)
    responses = Responses(None, ref_scores, ref_sums, label, layout, group_size, reward, data_group)  # type: ignore[arg-type]
    if _draws(spec, options, group_size):
        checks.read()
        with torch.no_grad():
            candidates = scored(hidden, given, target).flat()
        keep = drawn(spec, responses._replace(policy=candidates), options)
        for group in (None if head.shard is None else head.shard.group, sequence_group):
            keep = from_first(keep, group)  # ranks with the same responses draw the same
        target, options, responses = _only_drawn(spec, keep, target, ignore_index, options, responses)
        layout = responses.layout
    options = {name: value for name, value in options.items() if not isinstance(value, torch.Generator)}
    # over the ranks of a batch, a mean is a sum whose factor comes after
    reduced = "sum" if reduction == "mean" and data_group is not None else reduction
    call = make_call(
        hidden, head, how, ignore_index, spec=spec, options=options, reduction=reduced, group_size=group_size,
        unit_tokens=tokens_of_units(spec, layout, group_size, checks), split=sequence_group is not None,
    )._replace(scored=return_metrics)  # fmt: skip
    report = hidden.new_empty(0)
    if call.path == "single":
        made = single_pass(_loss_tensors(hidden, head, target, responses), call)
        value, statistics, report = made.loss, made[1:4], made.report  # statistics only with `return_metrics`
    else:
        found = scored_by(hidden, head, target, call, spec.entropy_grad)
        value, statistics, report = None, found[:3], found.report
    z_y, lse_other, h_o = statistics[0], statistics[1], statistics[2] if spec.entropy else None
    if value is None or return_metrics:
        responses = responses._replace(policy=token_scores(z_y, lse_other, h_o, mask=layout.mask, entropy=False))
    count = units(spec, layout.responses, group_size)
    if value is None:
        values = unit_values(spec, responses, options)
        count = values.numel()
        value = _reduced(values, reduced).to(z_y.dtype)
    if data_group is not None and reduction != "none":
        value = value * _share(value, count, reduction, data_group)
    value = gradient_times(value, ranks_of(sequence_group))
    if not return_metrics:
        return value
    with torch.no_grad():
        measured = metrics(responses, spec, options)
    if grad_tolerance is not None:
        # nothing is left out where no gradient is asked for
        skipped = Skipped.read(report if len(report) else hidden.new_zeros(target.numel() + 1).float())
        measured |= {"skipped/bound": skipped.bound.view(target.shape), "skipped/share": skipped.share}
    return value, measured


def _share(value: Tensor, units: int, reduction: str, data_group: ProcessGroup) -> Tensor | int:
    """What a rank's sum of values is multiplied by, so that the ranks' mean is the mean or sum of all units."""
    ranks = ranks_of(data_group)
    return ranks / all_sum(value.new_tensor(float(units)), data_group).clamp(min=1) if reduction == "mean" else ranks


@torch.inference_mode(False)  # where scores may come from; it has no autograd
def coefficients(
    objective: str | Callable[..., Tensor] | Mapping[str, float],
    scores: TokenScores | Tensor,
    *,
    target: Tensor | None = None,
    label: Tensor | None = None,
    ref: TokenScores | Tensor | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_metrics: bool = False,
    **options: Any,
) -> Any:
    """The loss and the weight of each token, for a system that can only train on weighted cross-entropy.

    w_t = −∂L/∂log p_t. With the weights held fixed, Σ_t w_t · (−log p_t) has the same gradient as the objective, but
    only at the model that gave the scores: score and weigh anew before each step.

    The weights of a loss of log(1 − p) (unlikelihood, sequence_unlikelihood, orpo) grow as p / (1 − p) on tokens that
    are nearly certain. The cross-entropy multiplies them by its own 1 − p: where that rounds to 0, the gradient is 0.
    Weights beyond the range of their type are cut to it.

    Args:
        objective: as `fused_loss` takes it.
        scores: of the policy, [B, T], or packed [N] with `cu_seqlens`: a `TokenScores`, or log-probabilities. A
            `TokenScores` is exact also for confident tokens. Detached.
        target: int64 in the shape of `scores`. Only where it is `ignore_index` is read; default: all tokens count.
        label, ref, group_size, rewards, cu_seqlens, ignore_index: as `fused_loss` takes them, without `(ref_hidden,
            ref_head)`.
        reduction: "mean" over units, "sum", or "none" for one value per unit, with the weights of their sum.
        return_metrics: also return the metrics of `fused_loss`.
        **options: the objective's own.

    Returns:
        (loss, weights), or (loss, weights, metrics), all detached. loss: 0-d or [U]; weights: in the shape of `scores`,
        0 where masked; both float32 (float64 for float64 scores). `bnf` without `other_entropy` in the scores has
        exact weights, but its loss is that with H_o = 0: less by the mean of label · (1 − f) · H_o.

    Raises:
        ValueError: as `fused_loss`; an objective whose gradient isn't one of log p alone (of the entropy, or of the
            logsumexp), or one that needs `other_entropy` where there is none.
    """
    spec = resolve(objective)
    options = check_options(spec, options)
    ignore_index = check_ignore_index(ignore_index)
    logp = scores.logp if isinstance(scores, TokenScores) else scores
    if not isinstance(logp, Tensor):
        raise ValueError(f"scores: expected TokenScores or a tensor of log-probabilities, got {type(scores).__name__}")
    if target is None:
        target = torch.full_like(logp, ignore_index + 1, dtype=torch.int64)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target: expected dtype int64 (of a mask, torch.where(mask, 0, {ignore_index})), got {got}")
    if spec.entropy_grad:
        raise ValueError(
            f"objective: expected one whose gradient is that of log p alone, got {spec.name}, which also moves the "
            "entropy; use fused_loss"
        )
    checks = Checks()
    policy = check_scores("scores", scores, target != ignore_index, logp, checks).flat().detached()
    layout = make_layout(target, cu_seqlens, ignore_index)
    check_units(spec, layout, reduction)
    label = check_label(spec, label, layout.responses, logp, checks)
    group_size, reward = check_groups(spec, group_size, rewards, layout, logp, checks)
    ref_scores, ref_sums = reference_scores(spec, ref, logp, target, layout, None, checks)
    checks.read()
    mask = target.reshape(-1) != ignore_index
    with torch.enable_grad():
        known = [
            torch.where(mask, x.double(), 0.0).requires_grad_() for x in (policy.logp, policy.log_odds, policy.lse)
        ]
        seen = TokenScores(known[0], known[1], known[2], None, _other_entropy(spec, policy, mask))
        responses = Responses(seen, ref_scores, ref_sums, label, layout, group_size, reward)
        if _draws(spec, options, group_size):
            candidates = TokenScores(*(None if x is None else x.detach() for x in seen))  # type: ignore[arg-type]
            keep = drawn(spec, responses._replace(policy=candidates), options)
            _, options, responses = _only_drawn(spec, keep, target, ignore_index, options, responses)
        value = _reduced(unit_values(spec, responses, options), reduction)
        slopes = [torch.zeros_like(x) for x in known[:2]]
        if value.requires_grad:
            *found, of_lse = torch.autograd.grad(value.sum(), known, allow_unused=True)
            if of_lse is not None:
                raise ValueError(
                    f"objective: expected one whose gradient is that of log p alone, got {spec.name}, which also moves "
                    "the logsumexp; use fused_loss"
                )
            slopes = [zero if x is None else x for x, zero in zip(found, slopes)]
    of_logp, of_odds = slopes
    # where log p moves by 1, λ moves by 1 / (1 − p) = 1 + e^λ; 0 times that is 0 also where it is infinite
    weights = -of_logp - torch.where(of_odds == 0, 0.0, of_odds * (1 + known[1].detach().exp()))
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).max
    weights = torch.where(mask, weights, 0.0).clamp(-limit, limit).to(dtype).view(target.shape)
    if not return_metrics:
        return value.detach().to(dtype), weights
    with torch.no_grad():
        return value.detach().to(dtype), weights, metrics(responses, spec, options)


def _other_entropy(spec: Objective, policy: TokenScores, mask: Tensor) -> Tensor | None:
    """H_o of the scores where the objective asks for it. For bnf, whose gradient doesn't, 0 will do. float64 [P]"""
    if not spec.entropy:
        return None
    if policy.other_entropy is not None:
        return torch.where(mask, policy.other_entropy.double(), 0.0)
    if {part.name for part, _ in spec.parts or ((spec, 1.0),) if part.entropy} != {"bnf"}:
        raise ValueError(
            f"scores: expected other_entropy for {spec.name}, got None; score with linear_logprob(…, entropy=True)"
        )
    return torch.zeros_like(mask, dtype=torch.float64)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    """[U] → 0-d, or as it is for "none"."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" and values.numel() else values.sum()


def _draws(spec: Objective, options: dict[str, Any], group_size: int | None) -> bool:
    """Whether some of the responses will be left out."""
    return spec.draw is not None and {**(spec.options or {}), **options}.get("m") != (group_size or 0) - 1


def _only_drawn(
    spec: Objective, keep: Tensor, target: Tensor, ignore_index: int, options: dict[str, Any], responses: Responses
) -> tuple[Tensor, dict[str, Any], Responses]:
    """The same without what the objective doesn't draw: that has no token any more, so it costs nothing.

    keep: the responses that it draws, bool [B].
    """
    layout, sums = responses.layout, responses.ref_sums
    kept = _of_response(keep, layout, target)
    mask = kept.reshape(-1) if layout.mask is None else layout.mask & kept.reshape(-1)
    layout = layout._replace(tokens=torch.where(keep, layout.tokens, 0), mask=mask)
    # a second draw has no choice, so nothing is left to chance
    options = {**options, **({"sampler": "max"} if "sampler" in (spec.options or {}) else {})}
    sums = None if sums is None else torch.where(keep, sums, 0.0)
    return torch.where(kept, target, ignore_index), options, responses._replace(ref_sums=sums, layout=layout)


def _loss_tensors(hidden: Tensor, head: LMHead, target: Tensor, responses: Responses) -> Tensors:
    """What the single pass takes."""
    ref = responses.ref
    return Tensors.of(
        hidden, head, target, tokens=responses.layout.tokens, label=responses.label, rewards=responses.rewards,
        ref_logp=None if ref is None else ref.logp, ref_log_odds=None if ref is None else ref.log_odds,
        ref_sums=responses.ref_sums,
    )  # fmt: skip


def _of_response(values: Tensor, layout: Layout, target: Tensor) -> Tensor:
    """Each response's value at all its positions. [B] → the shape of `target`."""
    if layout.lengths is None:
        return values[:, None].expand_as(target)
    return repeat(values, layout.lengths, len(target))


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
            if "label" in keywords:
                raise TypeError(f"{name}_loss() got multiple values for argument 'label'")
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
    others = ("cu_seqlens", "data_group", "sequence_group", "ignore_index", "temperature", "reduction")
    keywords += [shared[n] for n in (*others, "return_metrics", *HOW)]
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
        ValueError: an unknown objective or option, or a value out of its range.
    """

    def __init__(self, objective: str | Callable[..., Tensor] | Mapping[str, float], **options: Any):
        super().__init__()
        self.objective, self.options = objective, options
        spec = resolve(objective)
        check_options(spec, {name: x for name, x in options.items() if name not in RESERVED})
        self.name = spec.name
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
