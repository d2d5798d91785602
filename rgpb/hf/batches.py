"""Batches: targets aligned with hidden states, padded or packed; some of the responses of a batch.

Dimensions: B responses, T positions of a padded batch, N of a packed one, R responses taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from rgpb.head import described
from rgpb.hf.wrappers import around
from rgpb.layout import TokenScores, repeat
from rgpb.objectives.registry import suggest
from rgpb.validation import make_layout

IGNORE = -100
_OTHER = {"self", "args", "kwargs"}
_KEYWORDS: dict[type, frozenset[str]] = {}  # torch.compile warns of functools.cache


def aligned_targets(labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Shift a causal LM's labels: target[:, t] = labels[:, t + 1] is what the hidden state at t predicts.

    The last position of every row, or of every response of a packed row, predicts nothing and gets
    `ignore_index`. An encoder–decoder's labels are aligned already: its decoder's inputs were shifted.

    Args:
        labels: int64 [B, T], or [1, N] when packed.
        cu_seqlens: int32 or int64 [B + 1], the packed responses' first positions and N, or None.
        ignore_index: the label of positions that don't count.

    Returns:
        int64 in the shape of `labels`.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [B, T], or [1, N] when packed, got shape {tuple(labels.shape)}")
    target = torch.full_like(labels, ignore_index)
    target[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, labels)
        target[:, cu_seqlens[1:].long() - 1] = ignore_index  # an empty response repeats the end before it
    return target


def pack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch without its padding: the responses end to end in one row.

    Args:
        batch: with `input_ids` and `attention_mask`, both [B, T]. Padding may be on either side.

    Returns:
        Every [B, T] tensor of the batch as [1, N], except the mask, which is gone; `position_ids` [1, N] that
        restart at each response; `cu_seqlens` int32 [B + 1]. What has another shape stays as it is.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    fitting = isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape
    if ids is None or mask is None or not fitting or ids.dim() != 2:
        raise ValueError(f"batch: expected input_ids and attention_mask, both [B, T], got {shapes_of(batch)}")
    kept = mask.bool()
    packed = {
        name: value[kept][None] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    packed["cu_seqlens"] = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed["position_ids"] = restarting_positions(packed["cu_seqlens"])
    return packed


def from_trl(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of TRL's DPO or KTO collator, as at the top of `rgpb.hf`.

    Args:
        batch: `input_ids`, `attention_mask` and `completion_mask`, which says what counts, each [B, T]; what else the
            model takes; `label` [B] of single responses; the reference's sums, where they are precomputed. What TRL
            has for its estimate of the KL (`KL_…`) is left out.

    Returns:
        `labels` [B, T] in place of the mask, `label` [B] also of pairs, and `ref_logp` [B].

    Raises:
        ValueError: no `completion_mask`.
    """
    if "completion_mask" not in batch:
        raise ValueError(f"batch: expected TRL's completion_mask, got {', '.join(map(repr, batch)) or 'nothing'}")
    out = {name: value for name, value in batch.items() if not name.startswith(("KL_", "ref_", "completion_mask"))}
    out["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
    size = len(out["labels"])
    if "label" not in batch:
        out["label"] = torch.arange(size) < size // 2
    if "ref_chosen_logps" in batch:
        out["ref_logp"] = torch.cat((batch["ref_chosen_logps"], batch["ref_rejected_logps"]))
    elif "ref_logps" in batch:
        out["ref_logp"] = batch["ref_logps"]
    return out


def _keywords(module: nn.Module) -> frozenset[str]:
    """What the forward of a module takes by name; one that hands everything on takes what its parent's does."""
    kind = type(module)
    if kind not in _KEYWORDS:
        owners = [vars(owner) for owner in kind.__mro__ if owner is not nn.Module]
        forwards = [own["forward"] for own in owners if "forward" in own]
        _KEYWORDS[kind] = frozenset(name for f in forwards for name in inspect.signature(f).parameters) - _OTHER
    return _KEYWORDS[kind]


def check_keys(inputs: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse what no forward on the way to the model's takes: transformers swallows it without a word."""
    known: set[str] = set()
    for at in around(model):
        known |= _keywords(at)
        known |= set(getattr(at, "special_peft_forward_args", ()))
    known |= set(TransformersKwargs.__annotations__)
    if "logits_to_keep" in inputs:
        raise ValueError("batch: expected no logits_to_keep, since the labels say what counts; got it")
    unknown = [name for name in inputs if name not in known and name != "use_cache"]
    if unknown:
        near = "".join(suggest(name, known) for name in unknown[:1])
        raise ValueError(
            f"batch: expected keys that the forward of {described(model)} takes, "
            f"got {', '.join(map(repr, unknown))}{near}"
        )


def rows_of(batch: Mapping[str, Any], rows: Tensor, count: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Some of the `count` responses of a batch, in the order of `rows` [R]; what isn't a tensor of it stays."""
    if cu_seqlens is None:
        return {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
            for name, value in batch.items()
        }
    lengths = cu_seqlens.long().diff()[rows]
    ends = lengths.cumsum(0)
    places = torch.arange(int(ends[-1]), device=rows.device)
    places = places - repeat(ends - lengths - cu_seqlens.long()[rows], lengths, len(places))
    tokens = int(cu_seqlens[-1])
    out = {
        name: value[..., places] if isinstance(value, Tensor) and value.ndim and value.shape[-1] == tokens else value
        for name, value in batch.items()
    }
    for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        if name in out:
            out[name] = nn.functional.pad(ends, (1, 0)).to(cu_seqlens.dtype)
    return out


def check_bounds(cu_seqlens: Tensor, row: Tensor) -> None:
    """Refuse bounds that don't cut the row [1, N] into responses."""
    ints = (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in ints or row.dim() != 2 or row.shape[0] != 1:
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} beside {tuple(row.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 or int64 [B + 1] beside labels [1, N], got {found}")
    bounds, total = cu_seqlens.tolist(), row.shape[1]
    if not total or bounds[:1] != [0] or bounds[-1] != total or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to N = {total}, got {bounds}")


def bounds_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Bounds of a flattened row [1, N] that says them by the restarts of its positions alone; else None. [B + 1]"""
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or batch.get("attention_mask") is not None:
        return None
    starts = positions[0] == 0
    if len(positions) != 1 or int(starts.sum()) < 2:
        return None
    return nn.functional.pad(starts.nonzero().squeeze(1), (0, 1), value=positions.shape[1])


def packed_bounds(batch: Mapping[str, Any]) -> Tensor | None:
    """Bounds of a packed batch, whichever way it says them; None of a padded one. [B + 1]"""
    for name in ("cu_seqlens", "cu_seq_lens_q"):  # the second is DataCollatorWithFlattening's
        if batch.get(name) is not None:
            return batch[name]
    return bounds_of(batch)


def responses_of(batch: Mapping[str, Any]) -> int:
    """B, padded or packed."""
    cu_seqlens = packed_bounds(batch)
    return len(batch["input_ids"] if cu_seqlens is None else cu_seqlens[1:])


def present_of(batch: Mapping[str, Any]) -> Tensor:
    """Which responses of a batch have tokens, bool [B]."""
    cu_seqlens = packed_bounds(batch)
    shifted = batch.get("shift_labels")
    target = aligned_targets(batch["labels"], cu_seqlens) if shifted is None else shifted
    return make_layout(target if cu_seqlens is None else target[0], cu_seqlens, IGNORE).tokens > 0


def reference_of(batch: Mapping[str, Tensor]) -> TokenScores | None:
    """The reference scores per token in a batch, or None."""
    if "ref_logp" not in batch:
        return None
    logp = batch["ref_logp"]
    return TokenScores(logp, batch["ref_log_odds"], torch.zeros_like(logp))


def restarting_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions within each packed response, int64 [1, N]."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    return (torch.arange(len(starts), device=starts.device) - starts)[None]


def shapes_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(x.shape) if isinstance(x, Tensor) else described(x) for name, x in batch.items()}
