"""Reference scores: of every response token that a run takes, ahead of the step that needs it, cached by block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import rgpb
from rgpb import hf
from rgpb.kernels import tuned
from rgpb.train.adapters import without_adapters
from rgpb.train.config import TrainConfig
from rgpb.train.files import naming
from rgpb.train.machine import device_of
from rgpb.train.parallel import at_rest
from rgpb.train.progress import Lines, bar
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.tokens import Collator, PreferenceDataset, RefScores

AHEAD = 16  # batches of a block, once it has grown to that: the first step waits for its own batch alone


@torch.no_grad()
def score_references(
    model: PreTrainedModel,
    data: PreferenceDataset,
    *,
    pad: int,
    batch_size: int,
    workspace: int | None = None,
    bf16: bool = False,
    progress: tqdm[Any] | Lines | None = None,
    ranks: Ranks = ALONE,
    responses: Sequence[int] | None = None,
) -> RefScores:
    """Scores of every completion token under `model`, longest responses first: memory is short at once, or never.

    Batches are the same on any number of ranks, which take them in turn.

    Args:
        model: a causal LM, on the device to use.
        data: tokenised responses.
        pad: token that fills up padded rows.
        batch_size: responses at a time.
        workspace, bf16: as in `TrainConfig`.
        progress: a bar that counts responses.
        ranks: who share the work.
        responses: numbers of those to score; default: all.

    Returns:
        float32, on the CPU: the completions of `responses` end to end, in their order.
    """
    which = torch.arange(len(data.prompts)) if responses is None else torch.tensor(responses, dtype=torch.int64)
    lengths, prompts = data.lengths()[which], data.prompts[which]
    starts = nn.functional.pad((lengths - prompts).cumsum(0), (1, 0))
    flats = {name: torch.zeros(int(starts[-1])) for name in ("logp", "log_odds")}
    order = lengths.argsort(descending=True, stable=True)
    batches = order[(lengths > prompts)[order]].split(batch_size)
    collate, device = Collator(pad), next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with hf.evaluating(model), autocast:
        for first in range(0, len(batches) if len(batches[0]) else 0, ranks.world):
            mine = first + ranks.rank  # beyond the last: once more the last, so that all ranks run the model
            places = batches[min(mine, len(batches) - 1)].tolist()
            batch = collate([(data.response(int(which[p])),) for p in places])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            scores = hf.token_scores(model, inputs, workspace=workspace)
            for name, flat in flats.items():
                for row, p in zip(getattr(scores, name).float().cpu(), places if mine < len(batches) else ()):
                    flat[starts[p] : starts[p + 1]] = row[int(prompts[p]) - 1 : int(lengths[p]) - 1]
            if progress is not None:
                progress.update(sum(len(x) for x in batches[first : first + ranks.world]))
    ranks.add_up(list(flats.values()))  # 0 where another rank has them
    return RefScores(flats["logp"], flats["log_odds"], starts)


def weights_digest(model: nn.Module) -> str:
    """Hex digest of names, types, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module, weights: str) -> str:
    """Hex digest of a model's settings and its `weights_digest`."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    apart = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k not in apart}
    return hashlib.sha256(json.dumps([kept, weights], sort_keys=True, default=str).encode()).hexdigest()


def cache_folder(config: TrainConfig) -> Path:
    """Where blocks of scores lie: `config.ref_cache`, or `rgpb/references` in the user's cache folder.

    Raises:
        ValueError: neither, for a user without a home.
    """
    if config.ref_cache is not None:
        return Path(config.ref_cache)
    if (place := tuned.folder()) is None:
        raise ValueError("ref_cache: expected a folder for reference scores, since this user has no home; got none")
    return place / "references"


class References:
    """Scores of the responses of training and evaluation, filled in block by block.

    A block has the responses that some batches need and no batch before them. Its scores depend on the reference and
    on its own tokens alone, so they are bitwise the same on any number of ranks, after an interruption, and in another
    run; its file is named after just that.

    Args:
        config: the run's settings.
        weights: fingerprint of the reference.
        pad: token that fills up padded rows.
        ranks: who share the work.

    Attributes:
        model: the reference, whole or sharded; with adapters it is the model without them. None: everything is cached.
    """

    def __init__(self, config: TrainConfig, weights: str, pad: int, ranks: Ranks = ALONE) -> None:
        self.config, self.pad, self.ranks, self.folder = config, pad, ranks, cache_folder(config)
        packages = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        self.origin = " ".join([weights, rgpb.__version__, *packages, str(config.bf16), device_of(config).type])
        self.model: Any = None
        self._blocks: list[tuple[PreferenceDataset, list[int]]] = []
        self._tables: dict[int, tuple[PreferenceDataset, Tensor]] = {}  # by the tokens' identity: each response's block
        self._filled: set[int] = set()

    def plan(self, data: PreferenceDataset, batches: Iterable[Sequence[int]], first: int = AHEAD) -> PreferenceDataset:
        """Make the blocks of some batches of units; those of an earlier call come before them.

        Args:
            data: it may share its tokens with what was planned before.
            batches: numbers of units.
            first: how many batches the first block has. They double up to `AHEAD`.

        Returns:
            The data with scores, nan until `ready` has filled them in.
        """
        known = self._tables.get(id(data.tokens))
        if known is None:
            if data.mismatches is not None:
                data.mismatches = _unscored(data.mismatches)
            known = self._tables[id(data.tokens)] = (_unscored(data), torch.full((len(data.prompts),), -1))
        source, block_of = known
        for group in _growing(batches, first):
            wanted = torch.cat([data.units[list(batch)].reshape(-1) for batch in group]).tolist()
            block = [r for r in dict.fromkeys(wanted) if r >= 0 and block_of[r] < 0]
            if block:
                block_of[block] = len(self._blocks)
                self._blocks.append((source, block))
        data.mismatches = source.mismatches
        assert source.ref is not None
        return data.with_ref(source.ref)

    def missing(self) -> int:
        """How many responses of the plan are in no file. For all ranks."""
        return self.ranks.by_first(
            lambda: sum(len(block) for n, (_, block) in enumerate(self._blocks) if not self._file(n).exists())
        )

    def ready(self, data: PreferenceDataset | None = None, units: Sequence[int] | None = None) -> None:
        """Fill in the scores of these units' blocks (default: of all there are). For all ranks alike."""
        if data is None:
            wanted = set(range(len(self._blocks)))
        else:
            block_of = self._tables[id(data.tokens)][1]
            responses = data.units if units is None else data.units[list(units)]
            wanted = set(block_of[responses[responses >= 0]].tolist())
        wanted -= self._filled
        if not wanted:
            return
        doing, self.ranks.doing = self.ranks.doing, "the reference scores"
        total = sum(len(self._blocks[n][1]) for n in wanted)
        with bar(total, "reference", "response", leave=False, quiet=not self.config.progress) as done:
            for number in sorted(wanted):
                self._fill(number, done)
                self._filled.add(number)
        self.ranks.doing = doing
        if len(self._filled) == len(self._blocks):
            self.model = None  # free its memory

    def _fill(self, number: int, done: tqdm[Any] | Lines) -> None:
        (data, block), ranks = self._blocks[number], self.ranks
        file = self._file(number) if ranks.first else Path()
        found = ranks.by_first(lambda: _read(file))
        if found is None:
            found = self._scored(data, block, done)
            if ranks.first:
                file.parent.mkdir(parents=True, exist_ok=True)
                place = file.with_suffix(f".{os.getpid()}.tmp")  # runs may share the folder
                with naming(file):
                    save_file(found, place)
                    os.replace(place, file)
        else:
            done.update(len(block))
        for each, prefix in ((data, ""), (data.mismatches, "mismatched_")):
            if each is not None:
                assert each.ref is not None
                starts = each.ref.starts
                place_of = torch.cat([torch.arange(int(starts[r]), int(starts[r + 1])) for r in block])
                for name in ("logp", "log_odds"):
                    values = found.get(prefix + name)
                    if values is None or values.shape != place_of.shape or values.dtype != torch.float32:
                        got = "none" if values is None else f"{list(values.shape)} of {values.dtype}"
                        wanted = f"{len(place_of)} numbers {prefix}{name}"
                        raise ValueError(f"ref_cache: expected {wanted} in {self._file(number)}, got {got}; remove it")
                    getattr(each.ref, name)[place_of] = values

    def _scored(self, data: PreferenceDataset, block: list[int], done: tqdm[Any] | Lines) -> dict[str, Tensor]:
        config, made = self.config, dict[str, Tensor]()
        if self.model is None:
            raise ValueError(f"ref_cache: expected the scores that were in {self.folder} at the start, got fewer")
        options: dict[str, Any] = {"pad": self.pad, "batch_size": 4 * config.batch_size, "workspace": config.workspace}
        with without_adapters(self.model):
            for each, prefix in ((data, ""), (data.mismatches, "mismatched_")):
                if each is not None:
                    scores = score_references(
                        self.model, each, bf16=config.bf16, progress=None if prefix else done, ranks=self.ranks,
                        responses=block, **options,
                    )  # fmt: skip
                    made |= {f"{prefix}logp": scores.logp, f"{prefix}log_odds": scores.log_odds}
        at_rest(self.model)
        return made

    def _file(self, number: int) -> Path:
        data, block = self._blocks[number]
        digest = hashlib.sha256(f"{self.origin} {4 * self.config.batch_size}".encode())
        for each in (data, data.mismatches):
            if each is not None:
                for r in block:
                    digest.update(f"{each.prompts[r]} {each.starts[r + 1] - each.starts[r]} ".encode())
                    whole = slice(int(each.starts[r]), int(each.starts[r + 1]))
                    digest.update(each.tokens[whole].numpy().data)
                    if each.targets is not None:  # others have no score
                        digest.update(each.targets[whole].numpy().data)
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"


def _unscored(data: PreferenceDataset) -> PreferenceDataset:
    starts = data.completion_starts()
    logp, log_odds = torch.full((2, int(starts[-1])), torch.nan)
    return data.with_ref(RefScores(logp, log_odds, starts))


def _growing(batches: Iterable[Sequence[int]], first: int) -> Iterator[list[Sequence[int]]]:
    """Groups of consecutive batches that end at 1, 2, 4, … times `first` while they are below `AHEAD`, and at each
    multiple of that."""
    group: list[Sequence[int]] = []
    for number, batch in enumerate(batches, 1):
        group.append(batch)
        if number % AHEAD == 0 or (number < AHEAD and number % first == 0 and (number // first).bit_count() == 1):
            yield group
            group = []
    if group:
        yield group


def _read(file: Path) -> dict[str, Tensor] | None:
    """A block's scores, or None.

    Raises:
        ValueError: a file that isn't whole.
    """
    if not file.exists():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"ref_cache: expected a whole file, got {file} ({error}); remove it") from None
