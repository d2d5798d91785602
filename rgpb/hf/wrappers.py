"""What stands around a transformers model: wrappers of one process and of many, down to the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rgpb.head import described

_FSDP1 = "fully_sharded_data_parallel.FullyShardedDataParallel"
FSDP2 = "torch.distributed.fsdp.FSDPModule"
_FSDP = {FSDP2, f"torch.distributed.fsdp.{_FSDP1}"}
# Where a wrapper keeps what it wraps, by the wrapper's class
_INNER = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    f"torch.distributed.fsdp.{_FSDP1}": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
_SYNCHRONISED = {name for name in _INNER if name.endswith(("DistributedDataParallel", "DeepSpeedEngine"))}
# PEFT's init_lora_weights that change the weights beside the adapter: the two are the model, neither is alone
MOVING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PARTS = "torch.nn.parallel.data_parallel.DataParallel"
_CLASSES: dict[type, frozenset[str]] = {}  # torch.compile warns of functools.cache


def classes(module: object) -> frozenset[str]:
    """Names of a module's class and of those above it, so that nothing has to be imported to know it."""
    kind = type(module)
    if kind not in _CLASSES:
        _CLASSES[kind] = frozenset(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return _CLASSES[kind]


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """A model and every module in it, without the names that `modules()` makes; one in two places comes twice."""
    left = [model]
    while left:
        yield (at := left.pop())
        left += [module for module in at._modules.values() if module is not None]


def inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, or None."""
    known = classes(module)
    return next((getattr(module, place) for name, place in _INNER.items() if name in known), None)


def innermost(module: nn.Module) -> nn.Module:
    """What stands inside all wrappers of a module."""
    inside = inner(module)
    return module if inside is None else innermost(inside)


def around(model: nn.Module) -> Iterator[nn.Module]:
    """A model and what stands inside it, from the outermost wrapper to the transformers model."""
    at: Any = model
    while at is not None:
        yield at
        at = at.get_base_model() if hasattr(at, "get_base_model") else inner(at)


def base_of(model: nn.Module, argument: str = "model") -> PreTrainedModel:
    """The transformers model inside all wrappers. PEFT's adapters live inside its modules, save for prompt learning.

    Raises:
        ValueError: no transformers model inside, DataParallel, or PEFT's prompt learning.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{argument}: expected a transformers model, got {type(model).__name__}")
    for at in around(model):
        if _PARTS in classes(at):
            raise ValueError(
                f"{argument}: expected one process for each device (DistributedDataParallel), got DataParallel, whose "
                "replicas live for one forward"
            )
        if getattr(getattr(at, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(f"{argument}: expected adapters inside the model, got PEFT's prompt learning")
        last = at
    if not isinstance(last, PreTrainedModel):
        raise ValueError(f"{argument}: expected a transformers PreTrainedModel, wrapped or not, got {described(last)}")
    return last


def check_reference(model: nn.Module, ref: nn.Module) -> None:
    """Refuse the model that is trained, whatever is wrapped around either, as its own reference.

    Raises:
        ValueError: the same model, or no transformers model.
    """
    if base_of(ref, "ref") is base_of(model):
        raise ValueError(
            "ref: expected a model of its own, got the one that is trained: log-ratios would be 0. Take a "
            "copy.deepcopy(model) from before training, or 'base' for the model without its PEFT adapters"
        )


def check_adapters(configs: Iterable[Any], name: str) -> None:
    """Refuse adapters that took a part of the weights over as they were made, and would again for a copy of them.

    Raises:
        ValueError: a configuration of PEFT with such a start.
    """
    for config in configs:
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(MOVING):
            raise ValueError(
                f"{name}: expected adapters without which the model is what it was before, got init_lora_weights="
                f"{start!r}, which moves a part of the weights into them; take another, or a reference model of its own"
            )


def sharded_by(model: nn.Module) -> str | None:
    """What holds parts of the parameters on other ranks between forwards: "FSDP", "ZeRO-3", or None."""
    found = list(parts(model))
    if any(not _FSDP.isdisjoint(classes(module)) for module in found):
        return "FSDP"
    zero3 = any(hasattr(parameter, "ds_id") for module in found for parameter in module._parameters.values())
    return "ZeRO-3" if zero3 else None


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Around a forward: where it is one without gradients, FSDP's parameters are parts again afterwards.

    FSDP leaves its outermost unit whole after a forward, for the backward to come. If none comes, the next forward
    takes these weights again, though an optimizer may have stepped since.
    """
    yield
    if torch.is_grad_enabled():
        return
    for module in parts(model):
        known: Any = module
        if FSDP2 in classes(module):
            known.reshard()
        elif f"torch.distributed.fsdp.{_FSDP1}" in classes(module) and known._handle is not None:
            from torch.distributed.fsdp._runtime_utils import _reshard

            if known._handle.uses_sharded_strategy and not known._handle.needs_unshard():
                _reshard(known, known._handle, True)


def is_bare_replica(model: nn.Module) -> bool:
    """Whether several processes run, and nothing around this model or in it keeps its parameters the same."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if torch.distributed.get_world_size() == 1 or not trained or sharded_by(model) is not None:
        return False
    wrapped = any(_SYNCHRONISED & classes(at) for at in around(model))
    return not wrapped and not any(hasattr(parameter, "device_mesh") for parameter in trained)


def batch_group(model: nn.Module) -> Any:
    """The process group over which what stands around a model, or in it, averages gradients; None where nothing does.

    Raises:
        ValueError: several groups that together aren't all ranks.
    """
    groups: dict[Any, int] = {}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for at in (*around(model), *base_of(model).modules()):
        known, found = classes(at), list[Any]()
        if FSDP2 in known:
            for unit in at._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator, union-attr]
                found += [getattr(unit.mesh_info, f"{name}_process_group", None) for name in ("shard", "replicate")]
        elif any(name in known for name in _INNER):
            found = [getattr(at, name, None) for name in ("process_group", "_inter_node_pg", "data_parallel_group")]
        groups |= {group: torch.distributed.get_world_size(group) for group in found if group is not None}
    several = {group: size for group, size in groups.items() if size > 1} or groups
    if len(several) < 2:
        return next(iter(several), None)
    if math.prod(several.values()) == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    raise ValueError(
        f"model: expected gradients averaged over one group of ranks, or over all, got groups of "
        f"{list(several.values())}; name the ranks of the batch: data_group="
    )
