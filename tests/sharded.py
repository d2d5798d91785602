"""Heads that FSDP holds in a unit other than the head's own; on the ranks of tests/ranks.py, by tests/test_heads.py."""

from __future__ import annotations

from typing import Any

import peft
import torch
import torch.distributed as dist
import wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rgpb import hf


def tied_unit(model: Any, mesh: Any) -> None:
    """Embedding and head in one unit, as FSDP wants them where they are tied."""
    fully_shard([model.model.embed_tokens, model.lm_head], mesh=mesh)


def saved_unit(model: Any, mesh: Any) -> None:
    """The copy inside PEFT's wrapper, whose forward, and with it FSDP's hooks, the head's replaces."""
    fully_shard(model.lm_head.modules_to_save["default"], mesh=mesh)


def lora_units(model: Any, mesh: Any) -> None:
    """W, A and B in units of their own."""
    for part in (model.lm_head.base_layer, model.lm_head.lora_A["default"], model.lm_head.lora_B["default"]):
        fully_shard(part, mesh=mesh)


HOW: dict[str, tuple[Any, dict[str, Any] | None, bool]] = {
    "tied": (tied_unit, None, True),
    "saved": (saved_unit, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "lora": (lora_units, {"target_modules": ["q_proj", "lm_head"]}, False),
    "lora_root": (lambda model, mesh: None, {"target_modules": ["q_proj", "lm_head"]}, False),
    "tokens": (
        lambda model, mesh: None, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}, False
    ),
}  # fmt: skip


def model_of(how: str) -> tuple[Any, Any]:
    """(transformers model, what trains), the same on every rank."""
    _, config, tied = HOW[how]
    base = wrapped.model_of(tied)
    model: Any = base
    if config is not None:
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **config))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "modules_to_save" in key or "trainable_tokens" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return base, model


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: wrapped.whole(p.grad).clone() for key, p in model.named_parameters() if p.grad is not None}


def step(how: str, units: int, world: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch: on this rank's share of it, or, without ranks, on all of it."""
    torch.manual_seed(0)
    base, model = model_of(how)
    hf.attach(model)
    part = slice(0, units)
    if world is not None:
        part = wrapped.parts_of(units, world)[dist.get_rank()]
        mesh = init_device_mesh("cpu", (world,))
        HOW[how][0](base, mesh)
        fully_shard(base, mesh=mesh)
    named = wrapped.OBJECTIVES["bnf"]
    batch = wrapped.share(wrapped.batch_of(units, 1), part, 1)
    loss = wrapped.loss_of(model, batch, named, part.start)
    if HOW[how][1] is not None:
        loss.backward()
        options = {"label": torch.arange(part.start, part.stop) % 3 != 0, "ref": "base"}
        loss = hf.loss(model, {k: x for k, x in batch.items() if k != "ref"}, "bnf", **options)
    loss.backward()
    value = loss.detach()
    if world is not None:
        dist.all_reduce(value)
        value = value / world
    return value.item(), gradients_of(model)


def tensor_parallel(how: str) -> str:
    """What is said of a head in a tensor-parallel plan."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = wrapped.model_of()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = Shard(-1) if how == "sharded" else Replicate()
    plan = {"lm_head": ColwiseParallel(output_layouts=placed, use_local_output=how != "dtensor")}
    parallelize_module(model, mesh, plan)
    try:
        hf.token_scores(model, {k: x[0] for k, x in wrapped.batch_of(2, 1).items() if k != "ref"})
    except ValueError as error:
        return str(error)
    return "nothing"
