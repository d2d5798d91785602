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
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for key, g in found.items()}


def step(how: str, world: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch: on this rank's share of it, or, without ranks, on all of it."""
    torch.manual_seed(0)
    base, model = model_of(how)
    hf.attach(model)
    each = wrapped.UNITS // (world or 1)
    first = 0
    if world is not None:
        first = dist.get_rank() * each
        mesh = init_device_mesh("cpu", (world,))
        HOW[how][0](base, mesh)
        fully_shard(base, mesh=mesh)
    batch = wrapped.share(wrapped.batch_of(1), slice(first, first + each))
    loss = wrapped.loss_of(model, batch, wrapped.Run(objective="bnf"))
    loss.backward()
    value = loss.detach()
    if HOW[how][1] is not None:
        inputs = {key: x for key, x in batch.items() if key not in ("ref", "number")}
        with torch.no_grad():
            value = value + hf.loss(model, inputs, "bnf", label=batch["number"][:, 0] % 3 != 0, ref="base")
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
        hf.token_scores(model, {k: x[0] for k, x in wrapped.batch_of(1).items() if k not in ("ref", "number")})
    except ValueError as error:
        return str(error)
    return "nothing"
