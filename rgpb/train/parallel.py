"""A model on several ranks: whole on each (DDP) or in parts (FSDP2), and its state from and to a checkpoint.

A checkpoint's `dcp/` holds model and optimizer by the parameters' names, in torch.distributed.checkpoint's format, so
it is read on any number of ranks, under any `--parallel`. The contents of that format, `.metadata`, are a pickle, and
torch runs whatever one names; here it names classes of `CONTENTS`, or is refused.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.hf.wrappers import base_of, sharded_by
from rgpb.train.ranks import Ranks

TRAINED = states.StateDictOptions(ignore_frozen_params=True)
# By module: records, paths, and torch's names of types and layouts
CONTENTS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    **{module: {"PosixPath", "WindowsPath"} for module in ("pathlib", "pathlib._local")},
}  # fmt: skip


def shard(model: Any, ranks: Ranks, device: torch.device) -> Any:
    """Keep a part of each parameter on each rank, by FSDP2; gradients are averaged in float32. In place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    hf.attach(model)
    mesh = init_device_mesh(device.type, (ranks.world,))
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    blocks = set(getattr(base_of(model), "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, **how)
    return fully_shard(model, **how)


def replicated(model: Any, device: torch.device) -> nn.Module:
    """The model in DDP, unless it is sharded already."""
    if sharded_by(model) is not None:
        at_rest(model)
        return model
    from torch.nn.parallel import DistributedDataParallel

    hf.attach(model)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def at_rest(model: nn.Module) -> None:
    """Let a sharded model hold each rank's part alone. FSDP2's root keeps its whole parameters after a forward that no
    backward follows; an optimizer that asks then gets those, and steps what the model never reads again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Contents(pickle.Unpickler):
    """Reads a checkpoint's `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in CONTENTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's own, whose pickle of contents can run nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        place = Path(self.path) / ".metadata"
        with place.open("rb") as file:
            try:
                contents: Metadata = Contents(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{place}: expected the records of a checkpoint alone, got {error}") from error
        contents.storage_meta = contents.storage_meta or StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents


class Planner(dcp.DefaultLoadPlanner):
    """torch's own, which unpickles numbers and strings freely: here only what was read with `weights_only` first."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        copy = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


def save_state(place: Path, model: nn.Module, optimizer: Any, ranks: Ranks) -> None:
    """Model and optimizer of all ranks into a folder. Of a model with adapters, these alone."""
    with _quiet():
        dcp.save(_state(model, optimizer), checkpoint_id=place, process_group=ranks.group, no_dist=ranks.alone)


def load_state(place: Path, model: nn.Module, optimizer: Any | None, ranks: Ranks) -> None:
    """What `save_state` has saved, on however many ranks. In place.

    Args:
        optimizer: None loads the model alone.
    """
    with _quiet():
        state = _state(model, optimizer)
        reader = Reader(place)
        reader.read_metadata()  # what is wrong with it is said here: torch would wrap it, once for each rank
        dcp.load(state, storage_reader=reader, planner=Planner(), process_group=ranks.group, no_dist=ranks.alone)
        states.set_model_state_dict(model, state["model"], options=states.StateDictOptions(strict=False))
        if optimizer is not None:
            states.set_optimizer_state_dict(model, _bare(optimizer), state["optimizer"], options=TRAINED)


def load_trainers(checkpoint: Path, model: nn.Module, optimizer: Any | None) -> None:
    """The checkpoint of a run of one process, as Trainer saves it, on several ranks. In place."""
    whole: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        whole.update(load_file(file))
    if (checkpoint / "adapter_config.json").exists():
        whole = {re.sub(r"\.(lora_\w+)\.weight$", r".\1.default.weight", name): x for name, x in whole.items()}
    full = states.StateDictOptions(full_state_dict=True, strict=False)
    states.set_model_state_dict(model, dict(whole), options=full)
    if optimizer is None:
        return
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[name_of[id(p)] for p in group["params"]] for group in _bare(optimizer).param_groups]
    names = [name for group in groups for name in group]
    named: dict[str, Any] = {
        "state": {names[number]: values for number, values in saved["state"].items()},
        "param_groups": [{**old, "params": own} for old, own in zip(saved["param_groups"], groups)],
    }
    states.set_optimizer_state_dict(
        model, _bare(optimizer), named, options=states.StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )


def whole_state(model: PreTrainedModel, ranks: Ranks) -> dict[str, Tensor] | None:
    """All parameters on rank 0, as `save_pretrained` takes them; None: the model itself has them. For all ranks."""
    if ranks.alone or sharded_by(model) is None:
        return None
    at_rest(model)
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: Any = states.get_model_state_dict(model, options=options)
    return whole


def _state(model: nn.Module, optimizer: Any | None) -> dict[str, Any]:
    at_rest(model)
    state: dict[str, Any] = {"model": states.get_model_state_dict(model, options=TRAINED)}
    if optimizer is not None:
        state["optimizer"] = states.get_optimizer_state_dict(model, _bare(optimizer), options=TRAINED)
    return state


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of one process, and of its own use of what it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
