"""Reference scores: of every response token, once, kept by what they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.train.adapters import without_adapters
from rgpb.train.config import TrainConfig
from rgpb.train.files import save_whole_file
from rgpb.train.machine import device_of
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.tokens import Collator, PreferenceDataset, RefScores

PART = 256  # batches between two savings of what is computed so far


@torch.no_grad()
def score_references(
    model: PreTrainedModel,
    data: PreferenceDataset,
    *,
    pad: int,
    batch_size: int,
    workspace: int = DEFAULT_WORKSPACE,
    bf16: bool = False,
    progress: bool = False,
    ranks: Ranks = ALONE,
    cache: Path | None = None,
) -> RefScores:
    """Scores of every completion token under `model`, longest responses first: memory is short at once, or never.

    Batches are the same on any number of ranks, which take them in turn.

    Args:
        model: a causal LM, on the device to use.
        data: tokenised responses.
        pad: token that fills up padded rows.
        batch_size: responses at a time.
        workspace, bf16, progress: as in `TrainConfig`.
        ranks: who share the work.
        cache: file beside which parts are kept, so that an interrupted call goes on; None: nowhere.

    Returns:
        float32, on the CPU.
    """
    starts = data.completion_starts()
    logp = torch.zeros(int(starts[-1]))
    log_odds = torch.zeros_like(logp)
    lengths = data.lengths()
    order = lengths.argsort(descending=True, stable=True)
    order = order[(lengths > data.prompts)[order]]
    collate, device = Collator(pad), next(model.parameters()).device
    model.eval()
    bar = tqdm(total=len(order), desc="reference", unit="response", disable=not progress)
    flats = {"logp": logp, "log_odds": log_odds}
    batches = order.split(batch_size)
    parts = [batches[i : i + PART] for i in range(0, len(batches), PART)]
    with bar, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for number, part in enumerate(parts):
            kept = None if cache is None or len(parts) == 1 else _part(cache, number)
            places = [torch.arange(int(starts[r]), int(starts[r + 1])) for r in torch.cat(part).tolist()]
            place = torch.cat(places)
            if kept is not None and ranks.by_first(kept.exists):
                for name, found in load_file(kept).items():
                    flats[name][place] = found
                bar.update(len(places))
                continue
            for first in range(0, len(part), ranks.world):
                mine = first + ranks.rank  # beyond the last: once more the last, so that all ranks run the model
                responses = part[min(mine, len(part) - 1)].tolist()
                batch = collate([(data.response(r),) for r in responses])
                del batch["label"]
                scores = hf.token_scores(model, {k: v.to(device) for k, v in batch.items()}, workspace=workspace)
                for name, flat in flats.items():
                    for row, r in zip(getattr(scores, name).float().cpu(), responses if mine < len(part) else ()):
                        flat[starts[r] : starts[r + 1]] = row[int(data.prompts[r]) - 1 : int(lengths[r]) - 1]
                bar.update(sum(len(x) for x in part[first : first + ranks.world]))
            values = {name: flat[place] for name, flat in flats.items()}  # 0 where another rank has them
            ranks.add_up(list(values.values()))
            for name, flat in flats.items():
                flat[place] = values[name]
            if kept is not None and ranks.first:
                save_whole_file(kept, partial(save_file, values))
    return RefScores(logp, log_odds, starts)


def _part(cache: Path, number: int) -> Path:
    """Where a part of the scores is kept until all are there."""
    return cache.with_name(f"{cache.stem}-part-{number:05d}{cache.suffix}")


def weights_fingerprint(model: nn.Module) -> str:
    """Hex digest of names, types, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_reference(
    config: TrainConfig,
    folder: Path,
    ref: PreTrainedModel,
    weights: str,
    pad: int,
    sets: Sequence[PreferenceDataset],
    ranks: Ranks = ALONE,
) -> list[PreferenceDataset]:
    """The sets, and their mismatches, with reference scores, from the cache where they are there.

    Args:
        ref: the reference, whole or sharded; with adapters it is the model without them.
        weights: its fingerprint.
        sets: of units.
    """
    device, ranks.doing = device_of(config), "the reference scores"
    known: dict[int, RefScores] = {}  # by the tokens' identity: the evaluation set may be a part of the training set

    def scored(data: PreferenceDataset) -> PreferenceDataset:
        if data.mismatches is not None:
            data.mismatches = scored(data.mismatches)
        if id(data.tokens) in known:
            return data.with_ref(known[id(data.tokens)])
        key = hashlib.sha256(f"{weights} {data.fingerprint()} {config.bf16} {device.type}".encode()).hexdigest()[:16]
        cache = folder / f"ref-{key}.safetensors"
        if ranks.by_first(cache.exists):
            ref_scores = RefScores(**load_file(cache))
        else:
            with without_adapters(ref):
                ref_scores = score_references(
                    ref,
                    data,
                    pad=pad,
                    batch_size=4 * config.batch_size,
                    workspace=config.workspace,
                    bf16=config.bf16,
                    progress=config.progress,
                    ranks=ranks,
                    cache=cache,
                )
            if ranks.first:
                save_whole_file(cache, partial(save_file, ref_scores._asdict()))
                for part in folder.glob(f"{cache.stem}-part-*"):
                    part.unlink()
        known[id(data.tokens)] = ref_scores
        return data.with_ref(ref_scores)

    return [scored(data) for data in sets]
