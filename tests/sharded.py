"""Heads that FSDP holds in a unit other than the head's own; on the ranks of tests/ranks.py, by tests/test_heads.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
import wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate

from rgpb import hf
from rgpb.bench.measure import Result, peak_memory
from rgpb.engine.chunks import sizes
from rgpb.engine.plan import plan, shard_held
from rgpb.objectives import resolve


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
    if HOW[how][1] is not None:
        loss.backward()
        inputs = {key: x for key, x in batch.items() if key not in ("ref", "number")}
        loss = hf.loss(model, inputs, "bnf", label=batch["number"][:, 0] % 3 != 0, ref="base")
    loss.backward()
    value = loss.detach()
    if world is not None:
        dist.all_reduce(value)
        value = value / world
    return value.item(), gradients_of(model)


# How a plan splits the vocabulary, and what its head gives: logits that every rank has whole, a rank's own, a DTensor
PLANS = ("gathered", "own", "dtensor", "transformers", "with_fsdp")


def tensor_parallel(how: str, objective: str, ranks: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step with the vocabulary split over the ranks, or in one process."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model: Any = wrapped.model_of()
    if how == "transformers":  # whose plan takes what the ranks divide
        torch.manual_seed(3)
        model.lm_head = nn.Linear(wrapped.H, 64)
    run = wrapped.Run(objective=objective)
    batch = wrapped.batch_of(wrapped.OBJECTIVES[objective]["unit"])
    part = slice(0, wrapped.UNITS)
    if ranks:
        world = dist.get_world_size()
        if how == "with_fsdp":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("fsdp", "tp"))
            over, each = mesh["tp"], wrapped.UNITS // (world // 2)
            first = mesh["fsdp"].get_local_rank() * each
            part = slice(first, first + each)
        else:
            over = init_device_mesh("cpu", (world,))
        if how == "transformers":
            from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

            style = ALL_PARALLEL_STYLES["colwise_gather_output"]
            for name in ("weight", "bias"):
                style.shard_param(model.lm_head, name, over)
            style.install_forward(model.lm_head, over)
        else:
            placed = Shard(-1) if how == "own" else Replicate()
            parallelize_module(
                model, over, {"lm_head": ColwiseParallel(output_layouts=placed, use_local_output=how != "dtensor")}
            )
        hf.attach(model)
        if how == "with_fsdp":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["fsdp"])
            fully_shard(model, mesh=mesh["fsdp"])
    loss = wrapped.loss_of(model, wrapped.share(batch, part), run)
    loss.backward()
    value = loss.detach()
    if ranks and how == "with_fsdp":
        dist.all_reduce(value, group=mesh["fsdp"].get_group())
        value = value / mesh["fsdp"].size()
    return value.item(), gradients_of(model)


def drawn_alike() -> float:
    """A loss whose negatives are drawn at random, with the vocabulary split over ranks that draw differently."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model: Any = wrapped.model_of()
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"lm_head": ColwiseParallel()})
    batch = wrapped.share(wrapped.batch_of(wrapped.K), slice(0, wrapped.UNITS))
    inputs = {key: x for key, x in batch.items() if key not in ("ref", "number")}
    torch.manual_seed(dist.get_rank())
    options = {"ref": batch["ref"], "group_size": wrapped.K, "m": 1, "sampler": "random"}
    losses = [hf.loss(model, inputs, "mc_po", **options) for _ in range(3)]
    sum(losses).backward()
    return sum(losses).item()


def held(how: str, workspace: int) -> tuple[int, int]:
    """Bytes that the head's step holds at its worst, within the second step of a model of 24 layers, and its plan's.

    The peak of forward, backward and AdamW beyond parameters, gradients and AdamW's states; less the peak of the same
    step where the model's own logits of one position take the place of the loss. Activations, and what FSDP2 gathers
    and has not yet scattered, are in both.

    how: "fsdp2", a unit for each layer and the head whole for its step; "tp", V / R of its rows on each of R ranks.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    vocab, width, world = 1 << 16, 64, dist.get_world_size()
    shape = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 24}
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wrapped.SIZES | shape))
    mesh = init_device_mesh("cpu", (world,))
    if how == "tp":
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    hf.attach(model)
    if how == "fsdp2":
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(vocab, (1, 513))
    batch, label = {"input_ids": ids, "labels": ids}, torch.tensor([True])

    def step(score: Callable[[], Tensor]) -> Result:
        loss = score()
        loss.backward()
        optimizer.step()
        made = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        optimizer.zero_grad()
        return Result(loss.detach(), tuple(g.to_local() if hasattr(g, "to_local") else g for g in made))

    ours, rest = (
        peak_memory(partial(step, score), "cpu").extra
        for score in (
            lambda: hf.loss(model, batch, "bnf", label=label, ref=torch.full(ids.shape, -3.0), workspace=workspace),
            lambda: model(input_ids=ids, logits_to_keep=1).logits.sum(),
        )
    )
    tokens, rows = ids.numel() - 1, vocab // world if how == "tp" else vocab
    own = sizes(rows, width, torch.float32, torch.float32, "cpu", "cpp")
    planned = plan(
        tokens, own, ("cpp", "torch"), couples=resolve("bnf").couples, workspace=workspace,
        path="two_pass" if how == "tp" else "auto",
    )  # fmt: skip
    return ours - rest, planned.extra_bytes + shard_held(tokens, width, 4) * (how == "tp")
