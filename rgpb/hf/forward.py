"""Token scores and losses of a batch under a model.

Dimensions: B responses, T positions of a padded batch, N of a packed one, G groups, K responses of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.fused import fused_loss
from rgpb.head import LMHead, read_head, unwrap
from rgpb.hf.batches import IGNORE, aligned_targets, rows_of, shapes_of
from rgpb.hf.checks import check_once, check_packed
from rgpb.hf.models import evaluating, hidden_states
from rgpb.layout import Responses, TokenScores, repeat
from rgpb.logprob import linear_logprob
from rgpb.objectives import Objective, check_options, drawn, resolve
from rgpb.validation import Reference, check_groups, make_layout, reference_scores


def token_scores(model: nn.Module, batch: Mapping[str, Any], *, entropy: bool = False, **options: Any) -> TokenScores:
    """`linear_logprob` of a batch's labels under a transformers model.

    Args:
        model: as for `hidden_states`. Its head is checked once (`check_head`), and so is, at the first packed
            batch, that the model keeps packed responses apart.
        batch: padded or packed, as at the top of `rgpb.hf`.
        entropy: also compute the entropies.
        options: `impl`, `workspace` and whatever else `linear_logprob` takes.

    Returns:
        Scores in the shape of `labels` ([N] when packed), 0 where they don't count. A causal LM's stand one
        position before the label they belong to.

    Raises:
        ValueError: a batch that does not fit together, or a family that is not supported.
    """
    hidden, head, target, _ = _forward(unwrap(model), batch)
    return linear_logprob(hidden, head, target, entropy=entropy, **options)


def loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "bnf",
    *,
    label: Tensor | None = None,
    ref: Reference | nn.Module | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    **options: Any,
) -> Any:
    """`fused_loss` of a batch under a transformers model.

    An objective that draws responses (mc_po) first scores all of them without gradient, in evaluation mode; only the
    drawn ones then pass through the model for the gradient.

    Args:
        model: as for `token_scores`.
        batch: padded or packed, as at the top of `rgpb.hf`. Pairs are stacked `[chosen; rejected]`, the responses of
            a group are consecutive.
        objective: a name, a weighted sum, or a function of `Responses`.
        label: [B], bool or ±1, for the objectives that take one.
        ref: a reference model, run here in evaluation mode without gradients, or whatever `fused_loss` takes:
            best the `token_scores` of the same batch under the reference, computed once.
        group_size, rewards: K, and [G, K], for the objectives of groups.
        options: the objective's own, and those of `fused_loss` (`reduction`, `return_metrics`, `impl`, `engine`, …).

    Returns:
        What `fused_loss` returns: the loss, or (loss, metrics).

    Raises:
        ValueError: as for `token_scores` and `fused_loss`.
    """
    if isinstance(ref, nn.Module):
        teacher = unwrap(ref, "ref")
        with evaluating(teacher):
            ref_hidden, ref_head, _, _ = _forward(teacher, batch)
        ref = (ref_hidden, ref_head)
    spec = resolve(objective)
    if spec.draw is not None:
        batch, ref, group_size, rewards = _drawn(unwrap(model), batch, spec, ref, group_size, rewards, options)
    hidden, head, target, cu_seqlens = _forward(unwrap(model), batch)
    inputs: dict[str, Any] = {"label": label, "ref": ref, "cu_seqlens": cu_seqlens}
    inputs.update(group_size=group_size, rewards=rewards)
    return fused_loss(hidden, head, target, objective=objective, **inputs, **options)


def _drawn(
    model: PreTrainedModel, batch: Mapping[str, Any], spec: Objective, ref: Any, group_size: int | None,
    rewards: Tensor | None, options: dict[str, Any],
) -> tuple[Mapping[str, Any], Tensor | TokenScores | None, int, Tensor | None]:  # fmt: skip
    """Batch, reference scores, group size and rewards of what `spec.draw` takes; `options` lose their generator."""
    with evaluating(model):
        hidden, head, target, cu_seqlens = _forward(model, batch)
        workspace = options.get("workspace", DEFAULT_WORKSPACE)
        score = partial(linear_logprob, impl=options.get("impl", "auto"), workspace=workspace)
        layout = make_layout(target, cu_seqlens, IGNORE)
        size, reward = check_groups(spec, group_size, rewards, layout, hidden)
        ref_scores, ref_sums = reference_scores(spec, ref, hidden, target, layout, IGNORE, score)
        scores = score(hidden, head, target).flat()
        own = check_options(spec, {name: x for name, x in options.items() if name in (spec.options or {})})
        keep = drawn(spec, Responses(scores, ref_scores, ref_sums, None, layout, size, reward), own)
    assert size is not None  # checked above
    most = max(2, int(keep.view(-1, size).sum(1).max()))
    # the drawn ones in their order, then, where a group has fewer, others that no longer count
    places = keep.view(-1, size).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    rows = (places + torch.arange(len(places), device=keep.device)[:, None] * size).view(-1)
    options.pop("generator", None)
    if "m" in (spec.options or {}):
        options["m"] = most - 1
    taken = rows_of(batch, rows, len(keep), cu_seqlens)
    dropped = ~keep[rows]
    if bool(dropped.any()):
        at = dropped[:, None]
        if cu_seqlens is not None:
            at = repeat(dropped, cu_seqlens.long().diff()[rows], taken["labels"].shape[1])[None]
        taken["labels"] = taken["labels"].masked_fill(at, IGNORE)
    kept_rewards = None if rewards is None else rewards.reshape(-1)[rows].view(-1, most)
    if ref_scores is None:
        return taken, None if ref_sums is None else ref_sums[rows], most, kept_rewards
    flat = {n: getattr(ref_scores, n).view(target.shape) for n in ("logp", "log_odds", "lse")}
    picked = rows_of(flat, rows, len(keep), cu_seqlens)
    return taken, TokenScores(**picked), most, kept_rewards


def _forward(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, LMHead, Tensor, Tensor | None]:
    """Hidden states [B, T, H], head, targets [B, T], None; when packed [N, H], head, [N], cu_seqlens."""
    inputs = dict(batch)
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    cu_seqlens = inputs.pop("cu_seqlens", inputs.get("cu_seq_lens_q"))  # latter: DataCollatorWithFlattening's
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2:
        raise ValueError(f"batch: expected input_ids [B, T] and labels [B, T], got {shapes_of(batch)}")
    check_once(model)
    if cu_seqlens is not None:
        check_packed(model, inputs, cu_seqlens)
    hidden = hidden_states(model, **inputs)
    target = labels if model.config.is_encoder_decoder else aligned_targets(labels, cu_seqlens)
    if target.shape != hidden.shape[:-1]:
        expected, found = tuple(hidden.shape[:-1]), tuple(labels.shape)
        raise ValueError(f"labels: expected {expected}, the shape of the hidden states, got {found}")
    if cu_seqlens is not None:
        hidden, target = hidden[0], target[0]
    return hidden, read_head(model), target, cu_seqlens
