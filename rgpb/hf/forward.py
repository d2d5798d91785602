"""Token scores and losses of a batch under a model.

Dimensions: B responses, T positions of a padded batch, N of a packed one, G groups, K responses of a group.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rgpb.fused import fused_loss
from rgpb.head import LMHead, described
from rgpb.hf.attach import Attached, Results, Step, install
from rgpb.hf.batches import IGNORE, aligned_targets, check_keys, packed_bounds, rows_of, shapes_of
from rgpb.hf.checks import (
    check_ahead,
    check_head,
    check_left_padded,
    check_offloaded,
    check_packed,
    evaluating,
    head_inside,
)
from rgpb.hf.models import model_inputs
from rgpb.hf.wrappers import (
    around,
    base_of,
    batch_group,
    check_adapters,
    check_reference,
    is_bare_replica,
    resharding,
)
from rgpb.layout import Responses, TokenScores, repeat
from rgpb.logprob import linear_logprob
from rgpb.objectives import Objective, check_options, drawn, resolve
from rgpb.parallel import from_first
from rgpb.validation import Checks, Reference, check_groups, make_layout, reference_scores


def token_scores(model: nn.Module, batch: Mapping[str, Any], *, entropy: bool = False, **options: Any) -> TokenScores:
    """`linear_logprob` of a batch's labels under a transformers model.

    Args:
        model: a transformers causal LM, an encoder–decoder with text input, or what wraps one: PEFT, DDP, FSDP,
            DeepSpeed, `torch.compile`. It is called as it comes, and attached (`attach`) where it isn't yet; what FSDP
            or ZeRO-3 wraps has to be attached before.
        batch: padded or packed, as at the top of `rgpb.hf`. Keys that the model's forward doesn't take are refused.
        entropy: also compute the entropies.
        options: `impl`, `workspace` and whatever else `linear_logprob` takes.

    Returns:
        Scores in the shape of `labels` ([N] when packed), 0 where they don't count. A causal LM's stand one
        position before the label they belong to.

    Raises:
        ValueError: a batch that does not fit together, or a family that is not supported.
    """
    call = _Call(model, batch)

    def run(hidden: Tensor, head: LMHead) -> Results:
        scores = linear_logprob(hidden, head, call.flat_target.to(hidden.device), entropy=entropy, **options)
        return Results(tensors=tuple(x for x in scores if x is not None))

    scores = TokenScores(*(call(run).tensors or ()))
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _latest[call.base] = (weakref.ref(scores.logp), _version(call.base))
    return scores


def loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "bnf",
    *,
    label: Tensor | None = None,
    ref: Reference | nn.Module | str | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    data_group: Any = "auto",
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
        ref: whatever `fused_loss` takes, best the `token_scores` of the same batch under the reference, computed once;
            or another model, run here in evaluation mode without gradients; or "base", for `model` without its PEFT
            adapters.
        group_size, rewards: K, and [G, K], for the objectives of groups.
        data_group: the ranks that hold other responses of the batch, as for `fused_loss`; "auto" takes those over which
            DDP, FSDP or DeepSpeed around the model averages gradients, so that training is that of one process on all
            of the batch; without gradients none, so that one rank may evaluate by itself. None treats each rank's batch
            as one of its own.
        options: the objective's own, and those of `fused_loss` (`reduction`, `return_metrics`, `impl`, `engine`, …).

    Returns:
        What `fused_loss` returns: the loss, or (loss, metrics).

    Raises:
        ValueError: as for `token_scores` and `fused_loss`; `model` itself as its reference, wrapped or not; and "base"
            with adapters that took a part of the weights over as they were made (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    """
    how: dict[str, Any] = {name: options[name] for name in ("impl", "workspace", "temperature") if name in options}
    if isinstance(ref, str) and ref != "base":
        raise ValueError(f"ref: expected scores, a model or 'base', got {ref!r}")
    if isinstance(ref, str | nn.Module):
        ref = _reference(model, ref, batch, how)
    spec = resolve(objective)
    if spec.draw is not None and options.get("sequence_group") is None:  # parts of responses are drawn by fused_loss
        batch, ref, group_size, rewards = _drawn(model, batch, spec, ref, group_size, rewards, options, how)
    call = _Call(model, batch)
    if isinstance(ref, TokenScores) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_of_itself(call.base, ref)
    call.check_replicas()
    if isinstance(data_group, str):
        if data_group != "auto":
            raise ValueError(f"data_group: expected a process group, None or 'auto', got {data_group!r}")
        data_group = _batch_group(model, options.get("sequence_group")) if torch.is_grad_enabled() else None
    metrics: dict[str, Tensor] | None = None

    def run(hidden: Tensor, head: LMHead) -> Results:
        nonlocal metrics
        there = partial(_on, hidden.device)
        value = fused_loss(
            hidden, head, there(call.flat_target), objective=objective, label=there(label), ref=there(ref),
            cu_seqlens=there(call.cu_seqlens), group_size=group_size, rewards=there(rewards),
            data_group=data_group, **options,
        )  # fmt: skip
        if options.get("return_metrics"):
            value, metrics = value
        return Results(loss=value)

    results = call(run)
    value = results.loss
    assert value is not None
    if results.aux_loss is not None:
        value = value + call.auxiliary(results.aux_loss, options.get("reduction", "mean"))
    return value if metrics is None else (value, metrics)


# By model: its latest scores without gradient, and the state of the weights they are of; and the state in which a loss
# had such scores as its reference. A state is the number of changes so far.
_latest: WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], int]] = WeakKeyDictionary()
_own: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _version(model: nn.Module) -> int:
    return sum(p._version for p in model.parameters() if p.requires_grad and not p.is_inference())


def _warn_of_itself(model: nn.Module, ref: TokenScores) -> None:
    """Where the reference is the model of this very step for the second time, and the model has changed between."""
    scores, version = _latest.get(model, (lambda: None, -1))
    if scores() is not ref.logp or version != _version(model):
        return
    if _own.setdefault(model, version) not in (version, -1):
        _own[model] = -1  # said once
        warnings.warn(
            "ref: these are once more the scores of the model that is trained, as it is in this step, though it has "
            "changed since: log-ratios are 0 at every step. Score the reference once, before training",
            stacklevel=3,
        )


def _batch_group(model: nn.Module, sequence_group: Any) -> Any:
    """The ranks that have other responses, of those over which gradients are averaged."""
    group = batch_group(model)
    if group is None or sequence_group is None:
        return group
    ranks, parts = (set(torch.distributed.get_process_group_ranks(g)) for g in (group, sequence_group))
    if ranks <= parts:
        return None
    if ranks & parts == {torch.distributed.get_rank()}:
        return group
    raise ValueError(
        f"data_group: expected it named with a sequence_group, since gradients are averaged over ranks of both, "
        f"{sorted(ranks)} with {sorted(parts)}; got 'auto'"
    )


def _reference(model: nn.Module, ref: nn.Module | str, batch: Mapping[str, Any], how: dict[str, Any]) -> TokenScores:
    """Scores of the batch under a reference model, or under the model without its adapters."""
    if isinstance(ref, nn.Module):
        check_reference(model, ref)
        with evaluating(ref):
            return token_scores(ref, batch, **how)
    adapted: Any = next((at for at in around(model) if hasattr(at, "disable_adapter")), None)
    if adapted is None:
        raise ValueError(f"ref: expected a PEFT model to go with 'base', got {described(model)}")
    check_adapters(adapted.peft_config.values(), "ref")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with evaluating(model), adapted.disable_adapter():
            return token_scores(model, batch, **how)
    finally:  # PEFT lets all active adapters train again, also those that were frozen
        for parameter in trained:
            parameter.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _on(device: torch.device, value: Any) -> Any:
    """Tensors of the batch where the head is, which may be on another device than the model's first layers."""
    if isinstance(value, TokenScores):
        return TokenScores(*(_on(device, x) for x in value))
    return value.to(device) if isinstance(value, Tensor) else value


def _drawn(
    model: nn.Module, batch: Mapping[str, Any], spec: Objective, ref: Any, group_size: int | None,
    rewards: Tensor | None, options: dict[str, Any], how: dict[str, Any],
) -> tuple[Mapping[str, Any], Tensor | TokenScores | None, int, Tensor | None]:  # fmt: skip
    """Batch, reference scores, group size and rewards of what `spec.draw` takes; `options` lose their generator."""
    call = _Call(model, batch)
    with evaluating(model):
        held: list[LMHead] = []

        def run(hidden: Tensor, head: LMHead) -> Results:
            held.append(head)
            return Results(tensors=linear_logprob(hidden, head, call.flat_target.to(hidden.device), **how)[:3])

        found = TokenScores(*(call(run).tensors or ()))
        scores, device = found.flat(), found.logp.device
        target, cu_seqlens = call.flat_target.to(device), _on(device, call.cu_seqlens)
        ref, rewards, batch = _on(device, ref), _on(device, rewards), {n: _on(device, x) for n, x in batch.items()}
        layout = make_layout(target, cu_seqlens, IGNORE)
        checks, score = Checks(), partial(linear_logprob, **how)
        size, reward = check_groups(spec, group_size, rewards, layout, found.logp, checks)
        ref_scores, ref_sums = reference_scores(spec, ref, found.logp, target, layout, score, checks)
        checks.read()
        own = check_options(spec, {name: x for name, x in options.items() if name in (spec.options or {})})
        keep = drawn(spec, Responses(scores, ref_scores, ref_sums, None, layout, size, reward), own)
        if held[0].shard is not None:
            keep = from_first(keep, held[0].shard.group)  # ranks with the same responses draw the same
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


class _Call:
    """A batch on its way through a model: what the forward takes, and the targets of its head.

    Attributes:
        inputs: of the model's forward.
        target: int64 [B, T], or [1, N] where packed.
        cu_seqlens: [B + 1] where packed, else None.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]):
        self.model, self.base = model, base_of(model)
        self.attached: Attached = install(self.base)
        self.scaling = check_head(self.base, self.attached)
        check_offloaded(self.base)
        inputs = dict(batch)
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        shifted = inputs.pop("shift_labels", None)
        wanted = shifted if labels is None else labels
        if not isinstance(ids, Tensor) or not isinstance(wanted, Tensor) or ids.dim() != 2:
            raise ValueError(f"batch: expected input_ids [B, T] and labels [B, T], got {shapes_of(batch)}")
        if not ids.numel():
            raise ValueError(
                f"input_ids: expected at least one row, got {list(ids.shape)}, which transformers doesn't take; a rank "
                f"that has nothing gives a row whose labels are all {IGNORE}"
            )
        self.cu_seqlens = packed_bounds(inputs)
        inputs.pop("cu_seqlens", None)  # the others are the model's
        if self.cu_seqlens is not None:
            check_packed(self.base, inputs, self.cu_seqlens, self.attached)
        else:
            check_left_padded(self.base, inputs, self.attached)
        check_ahead(self.base, inputs, self.attached)
        if shifted is not None:
            self.target = shifted
        else:
            self.target = wanted if self.base.config.is_encoder_decoder else aligned_targets(wanted, self.cu_seqlens)
        self.inputs = {"use_cache": False, **model_inputs(self.base, self.attached, inputs)}
        check_keys(self.inputs, model)

    @property
    def flat_target(self) -> Tensor:
        """[B, T], or [N] where packed."""
        return self.target if self.cu_seqlens is None else self.target[0]

    def __call__(self, run: Callable[[Tensor, LMHead], Results]) -> Results:
        """Through whatever wraps the model, with `run` of hidden states and head in the head's place."""

        def inside(module: nn.Module, hidden: Tensor) -> Results:
            hidden, head = head_inside(self.base, module, hidden, self.scaling)
            if self.target.shape != hidden.shape[:-1]:
                expected, found = tuple(hidden.shape[:-1]), tuple(self.target.shape)
                raise ValueError(f"labels: expected {expected}, the shape of the hidden states, got {found}")
            return run(hidden if self.cu_seqlens is None else hidden[0], head)

        with resharding(self.model):
            return self.model(**self.inputs, rgpb=Step(inside))

    def check_replicas(self) -> None:
        """Refuse to train replicas that nothing keeps together."""
        if torch.is_grad_enabled() and not self.attached.sync_elsewhere and is_bare_replica(self.model):
            raise ValueError(
                f"model: expected what averages gradients over {torch.distributed.get_world_size()} processes (DDP, "
                f"FSDP, DeepSpeed) around {described(self.base)}, got the bare model; if you average them yourself, "
                "say so: rgpb.hf.attach(model, sync_elsewhere=True)"
            )

    def auxiliary(self, aux_loss: Tensor, reduction: str) -> Tensor:
        """The model's own auxiliary loss, weighted as its forward weights it."""
        weight = getattr(self.base.config.get_text_config(), "router_aux_loss_coef", None)
        weight = getattr(self.base, "router_aux_loss_coef", weight)
        if weight is None or reduction != "mean":
            raise ValueError(
                f"reduction: expected 'mean' and a router_aux_loss_coef with the router loss of "
                f"{described(self.base)}, got {reduction!r} and {weight}; output_router_logits=False drops that loss"
            )
        return weight * aux_loss
