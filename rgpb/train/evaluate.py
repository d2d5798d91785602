"""What an evaluation needs of a batch, and its averages over a whole set.

Dimensions: B responses of a batch, U units (groups, pairs or responses), W responses of a unit.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgpb import hf
from rgpb.hf import IGNORE
from rgpb.hf.batches import reference_of
from rgpb.layout import Responses
from rgpb.metrics import ranked, with_differences
from rgpb.objectives import Objective, option, reward_scale, unit_values
from rgpb.train.config import EVAL_SAMPLE, TrainConfig
from rgpb.train.files import write_json
from rgpb.train.machine import device_of
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.tokens import PreferenceDataset
from rgpb.validation import make_layout

# What evaluation without `eval_rows` takes at most, in operations by device: some twenty seconds'
BUDGET = {"cpu": 1.5e12, "cuda": 1.5e15}


def eval_rows(config: TrainConfig, folder: Path, model: nn.Module, data: PreferenceDataset) -> int:
    """How many units of `data` are evaluated on: `config.eval_rows`, or up to `EVAL_SAMPLE`, as many as `BUDGET` pays
    for and 8 at least. Kept in `run.json`, so that another device goes on with as many."""
    note = json.loads((folder / "run.json").read_text())
    if "eval_rows" not in note:
        tokens = data.lengths().double().mean().item() * data.units.shape[1]
        passes = 1 if config.check()[0].ref is None else 2
        each = 2 * sum(p.numel() for p in model.parameters()) * tokens * passes
        most = int(BUDGET[device_of(config).type] / each)
        note["eval_rows"] = config.eval_rows or max(8, min(EVAL_SAMPLE, most))
        write_json(folder / "run.json", note)
    return min(note["eval_rows"], len(data))


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `Collator` without what only the objective reads."""
    beside = ("label", "rewards", "ref_logp", "ref_log_odds", "mismatched")
    return {name: value for name, value in batch.items() if name not in beside}


def mismatched_options(spec: Objective, options: dict[str, Any]) -> list[str]:
    """The options that take Δ of mismatched completions and weren't given."""
    return [name for name in spec.mismatched if option(options, name) is None]


@torch.no_grad()
def mismatched_ratios(
    model: nn.Module, batch: dict[str, Any], spec: Objective, options: dict[str, Any], workspace: int | None
) -> dict[str, Tensor]:
    """Δ [B] of a batch's mismatched completions, for each of `mismatched_options`."""
    names = mismatched_options(spec, options)
    if not names or "mismatched" not in batch:
        return {}
    other = batch["mismatched"]
    ref, cu_seqlens, inputs = reference_of(other), other.get("cu_seqlens"), model_inputs(other)
    assert ref is not None  # `kto` has one
    logp = hf.token_scores(model, inputs, workspace=workspace).logp
    target = hf.aligned_targets(inputs["labels"], cu_seqlens).view(logp.shape)
    ratio = make_layout(target, cu_seqlens, IGNORE).sum((logp - ref.logp).reshape(-1))
    return dict.fromkeys(names, ratio)


def group_size_of(batch: dict[str, Tensor]) -> int | None:
    """K of a batch of groups, else None."""
    return batch["rewards"].shape[1] if "rewards" in batch else None


def group_arguments(spec: Objective, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What `fused_loss` takes of a batch of groups."""
    if spec.unit != "group":
        return {}
    return {"group_size": group_size_of(batch), "rewards": batch["rewards"] if spec.rewards else None}


def score_batch(
    model: nn.Module, batch: dict[str, Tensor], spec: Objective, options: dict[str, Any], workspace: int | None
) -> dict[str, Tensor]:
    """Everything evaluation needs of a batch of `Collator`, from one sweep over the vocabulary.

    Returns:
        On the CPU, per response [B]: `label`, `present` (it has tokens), `sum` and `mean` of its tokens'
        log-probabilities, and with a reference `ratio`, the sum less the reference's; `value` of the objective, one per
        unit.
    """
    label, ref, cu_seqlens = batch["label"], reference_of(batch), batch.get("cu_seqlens")
    inputs = model_inputs(batch)
    scores = hf.token_scores(model, inputs, entropy=spec.entropy, workspace=workspace)
    target = hf.aligned_targets(inputs["labels"], cu_seqlens).view(scores.logp.shape)
    layout = make_layout(target, cu_seqlens, IGNORE)
    flat = None if ref is None else ref.flat()
    responses = Responses(
        policy=scores.flat(),
        ref=flat,
        ref_sums=None if flat is None else layout.sum(flat.logp),
        label=label.double() * 2 - 1 if spec.label else None,
        layout=layout,
        group_size=group_size_of(batch),
        rewards=batch["rewards"].view(-1) if spec.rewards else None,
    )
    out = {
        "label": label,
        "present": responses.present,
        "sum": responses.logps(),
        "mean": responses.logps(length_normalize=True),
    }
    if flat is not None:
        out["ratio"] = responses.log_ratios()
    out["value"] = unit_values(spec, responses, options)
    return {name: value.cpu() for name, value in out.items()}


@torch.no_grad()
def evaluate_set(
    model: nn.Module,
    data: PreferenceDataset,
    spec: Objective,
    options: dict[str, Any],
    config: TrainConfig,
    *,
    collate: Callable[[Sequence[Any]], dict[str, Tensor]],
    prepare: Callable[[dict[str, Tensor]], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], int]:
    """Averages over a whole set (see `summarise`), and how many tokens it took on this rank, padding included. The loss
    of a set without any unit isn't a number.

    Ranks take whole batches in turn, so each is what it is in one process.

    Args:
        model: on its device, in evaluation.
        data: with reference scores where the objective has a reference.
        collate, prepare: a `Collator`, and what brings its batch to the model's device.
    """
    parts: list[tuple[int, dict[str, Tensor]]] = []
    size, tokens = config.batch_size, 0
    firsts = range(0, len(data), size)
    for number in range(ranks.rank, len(firsts) + ranks.rank, ranks.world):
        first = firsts[min(number, len(firsts) - 1)]  # beyond the last: once more the last, which counts for nothing
        batch = prepare(collate([data[i] for i in range(first, min(first + size, len(data)))]))
        drawn: dict[str, Any] = {}
        if "generator" in (spec.options or {}):  # the same draws at every evaluation
            seed = zlib.crc32(f"{config.seed} evaluation {number}".encode())
            drawn["generator"] = torch.Generator().manual_seed(seed)
        with autocast():
            estimated = mismatched_ratios(model, batch, spec, options, config.workspace)
            columns = score_batch(model, batch, spec, {**estimated, **options, **drawn}, config.workspace)
        count = len(batch["label"]) // data.units.shape[1]
        also: Any = batch.get("mismatched")
        tokens += batch["input_ids"].numel() + (0 if also is None else also["input_ids"].numel())
        # a group's responses are consecutive, a pair's half a batch apart
        grouped = data.rewards is not None
        shaped = {n: c.view(count, -1) if grouped else c.view(-1, count).T for n, c in columns.items()}
        if number < len(firsts):
            parts.append((number, shaped))
    if not firsts:
        return {"loss": math.nan}, 0
    found = [part for _, part in sorted(itertools.chain(*ranks.gather(parts)), key=lambda part: part[0])]
    whole = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return summarise(whole, spec, options), tokens


def summarise(columns: dict[str, Tensor], spec: Objective, options: dict[str, Any]) -> dict[str, float]:
    """Averages over an evaluation set, by the names that `fused_loss` gives them.

    `logps/accuracies` is this library's own: the part of pairs (of a group: of the best with each other) whose chosen
    response has the higher mean log-probability. It needs no reference.

    Args:
        columns: as `score_batch` returns them, [U, W] each (`value` of pairs and groups [U, 1]): column 0 is the
            chosen.
        spec, options: the objective. One without labels and pairs (mle) is averaged over the preferred responses.
    """
    label, present, total, mean = (columns[name] for name in ("label", "present", "sum", "mean"))
    paired, value = label.shape[1] > 1, columns["value"]
    out = {"loss": (value[label] if wants_preferred(spec) else value).mean()}
    good, bad = label & present, ~label & present
    sides = {"chosen": good, "rejected": bad}
    out.update({f"logps/{side}": total[which].mean() for side, which in sides.items()})
    if paired:
        out["logps/accuracies"] = _ranked(mean, mean.abs(), present)
    out["perplexity"] = mean[good].neg().exp().mean()
    out.update({f"agility/{side}": mean[which].exp().mean() for side, which in sides.items()})
    if "ratio" in columns:
        reward = reward_scale(spec, options) * columns["ratio"]
        out.update({f"rewards/{side}": reward[which].mean() for side, which in sides.items()})
        if paired:
            out["rewards/accuracies"] = _ranked(columns["ratio"], total.abs(), present)
    whole = with_differences(out)
    return {name: value.item() for name, value in whole.items() if not value.isnan() or name == "loss"}


def _ranked(score: Tensor, size: Tensor, present: Tensor) -> Tensor:
    """Part of the pairs of a unit's first response with another that are `ranked` rightly.

    Args:
        score: [U, W], computed from numbers as large as `size` [U, W].
        present: which responses there are, bool [U, W].
    """
    right = ranked(score[:, :1], score[:, 1:], size[:, :1], size[:, 1:])
    return right[present[:, :1] & present[:, 1:]].mean()


def wants_preferred(spec: Objective) -> bool:
    """Objectives that can't tell good from bad (mle) are trained on the preferred responses."""
    return spec.unit == "response" and not spec.label
