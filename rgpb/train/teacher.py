"""Reference scores: of every response token, once, kept by what they depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.train.config import TrainConfig
from rgpb.train.files import save_whole_file
from rgpb.train.machine import device_of, moved
from rgpb.train.models import check_tokens, reference_model
from rgpb.train.tokens import Collator, PreferenceDataset, RefScores


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
) -> RefScores:
    """Scores of every completion token under `model`, longest responses first: memory is short at once, or never.

    Args:
        model: a causal LM, on the device to use.
        data: tokenised responses.
        pad: token that fills up padded rows.
        batch_size: responses at a time.
        workspace, bf16, progress: as in `TrainConfig`.

    Returns:
        float32, on the CPU.
    """
    starts = data.completion_starts()
    logp = torch.zeros(int(starts[-1]))
    log_odds = torch.zeros_like(logp)
    lengths = data.lengths()
    order = lengths.argsort(descending=True, stable=True)
    order = order[(lengths > data.prompts)[order]]
    collate, device = Collator(pad), hf.read_head(model).weight.device
    model.eval()
    bar = tqdm(total=len(order), desc="reference", unit="response", disable=not progress)
    with bar, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for part in order.split(batch_size):
            batch = collate([(data.response(r),) for r in part.tolist()])
            del batch["label"]
            scores = hf.token_scores(model, {k: v.to(device) for k, v in batch.items()}, workspace=workspace)
            for name, flat in (("logp", logp), ("log_odds", log_odds)):
                rows = getattr(scores, name).float().cpu()
                for row, r in zip(rows, part.tolist()):
                    flat[starts[r] : starts[r + 1]] = row[int(data.prompts[r]) - 1 : int(lengths[r]) - 1]
            bar.update(len(part))
    return RefScores(logp, log_odds, starts)


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
    model: PreTrainedModel,
    pad: int,
    train_set: PreferenceDataset,
    eval_set: PreferenceDataset,
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Both sets, and their mismatches, with reference scores, from the cache where they are there."""
    ref = reference_model(config) or model
    if config.ref_model is not None:
        check_tokens(ref, config.ref_model, (train_set, eval_set))
    device = device_of(config)
    weights = weights_fingerprint(ref)
    known: dict[int, RefScores] = {}  # by the tokens' identity: the evaluation set may be a part of the training set

    def scored(data: PreferenceDataset) -> PreferenceDataset:
        if data.mismatches is not None:
            data.mismatches = scored(data.mismatches)
        if id(data.tokens) in known:
            return data.with_ref(known[id(data.tokens)])
        key = hashlib.sha256(f"{weights} {data.fingerprint()} {config.bf16} {device.type}".encode()).hexdigest()[:16]
        cache = folder / f"ref-{key}.safetensors"
        if cache.exists():
            ref_scores = RefScores(**load_file(cache))
        else:
            ref_scores = score_references(
                moved(ref, device),
                data,
                pad=pad,
                batch_size=4 * config.batch_size,
                workspace=config.workspace,
                bf16=config.bf16,
                progress=config.progress,
            )
            save_whole_file(cache, lambda path, scores=ref_scores: save_file(scores._asdict(), path))  # type: ignore[misc]
        known[id(data.tokens)] = ref_scores
        return data.with_ref(ref_scores)

    return scored(train_set), scored(eval_set)
