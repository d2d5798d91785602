"""Steps of training on several ranks, each way to wrap a model, beside one process on all of the data.

Run on the ranks of tests/ranks.py by tests/test_wrapped.py. Dimensions: B responses, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from rgpb import hf

V, H, K, IGNORE = 61, 32, 3, -100  # V is a multiple of no number of ranks
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "bnf": {"objective": "bnf", "unit": 1},
    "dpo": {"objective": "dpo", "unit": 2, "beta": 0.5},
    "sum": {"objective": {"dpo": 1.0, "mle": 0.3}, "unit": 2, "beta": 0.5},
    "swepo": {"objective": "swepo", "unit": K, "beta": 0.5},
    "mc_po": {"objective": "mc_po", "unit": K, "beta": 0.5, "m": 1, "sampler": "max"},
    "kto": {"objective": "kto", "unit": 1, "beta": 0.5},
}
WRAPPERS = (
    "ddp",
    "ddp_static",
    "ddp_unused",
    "fsdp1",
    "fsdp2",
    "fsdp2_layers",
    "fsdp2_norm",
    "fsdp2_head",
    "fsdp2_tied",
)
WRAPPERS += ("zero2", "zero3")


def model_of(tied: bool = False) -> transformers.LlamaForCausalLM:
    """The same on every rank."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def batch_of(units: int, unit: int, empty: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Responses of uneven lengths, unit by unit [units, unit, T]; those of the units `empty` have no token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (units, unit, 9), generator=generator)
    lengths = torch.randint(4, 10, (units, unit, 1), generator=generator)
    mask = torch.arange(9) < lengths
    labels = ids.masked_fill(~mask | (torch.arange(9) < 3), IGNORE)
    labels[list(empty)] = IGNORE
    ref = -3 * torch.rand((units, unit, 9), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels, "ref": ref}


def share(batch: dict[str, Tensor], part: slice, unit: int) -> dict[str, Tensor]:
    """The units `part`, stacked as the objective wants: pairs `[chosen; rejected]`, groups in a row. [B, T]"""
    return {k: (x[part].transpose(0, 1) if unit == 2 else x[part]).reshape(-1, x.shape[-1]) for k, x in batch.items()}


def parts_of(units: int, world: int) -> list[slice]:
    """An even share for each rank."""
    each = units // world
    return [slice(rank * each, (rank + 1) * each) for rank in range(world)]


def loss_of(model: Any, batch: dict[str, Tensor], named: dict[str, Any], first: int) -> Any:
    """`first`: the number of the batch's first response, which decides labels and rewards."""
    options = {k: v for k, v in named.items() if k not in ("objective", "unit")}
    unit, count = named["unit"], len(batch["labels"])
    batch = dict(batch)
    if named["objective"] != "mle":
        options["ref"] = batch.pop("ref")
    if unit == 1:
        options["label"] = torch.arange(first, first + count) % 3 != 0
    if named["objective"] == "swepo":
        options["rewards"] = torch.arange(first, first + count).float().mul(1.7).sin().view(-1, unit)
    if named["objective"] == "mc_po":
        options["group_size"] = unit
    return hf.loss(model, batch, named["objective"], **options)


def wrap(how: str | None, bf16: bool = False) -> tuple[Any, Any]:
    """The model and what the wrapper makes of it."""
    model = model_of(tied=how == "fsdp2_tied")
    hf.attach(model)
    if how is None:
        return model, model
    if how.startswith("ddp"):
        from torch.nn.parallel import DistributedDataParallel

        return model, DistributedDataParallel(
            model, static_graph=how == "ddp_static", find_unused_parameters=how == "ddp_unused"
        )
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        precision = MixedPrecision(torch.bfloat16, torch.float32, torch.float32) if bf16 else None
        policy = ModuleWrapPolicy({type(model.model.layers[0]), nn.Linear} if bf16 else {type(model.model.layers[0])})
        return model, FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, mixed_precision=precision,
            device_id=torch.device("cpu"),
        )  # fmt: skip
    if how.startswith("fsdp2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        if how != "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        if how == "fsdp2_norm":
            fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy)
        if how == "fsdp2_head":
            fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model, model
    raise ValueError(how)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def names_of(model: nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        yield name.replace("_fsdp_wrapped_module.", "").removeprefix("module."), parameter


def gradients_of(model: Any, wrapped: Any) -> dict[str, Tensor]:
    """Whole gradients, by the bare model's names."""
    if type(wrapped).__name__ == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            return {name: p.grad.float().clone() for name, p in names_of(wrapped)}
    return {name: whole(p.grad).float().clone() for name, p in names_of(model)}


def weights_of(model: Any, wrapped: Any) -> dict[str, Tensor]:
    if type(wrapped).__name__ == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(wrapped):
            return {name: p.detach().clone() for name, p in names_of(wrapped)}
    return {name: whole(p.detach()).clone() for name, p in names_of(model)}


def train(
    how: str | None, named: dict[str, Any], batch: dict[str, Tensor], parts: list[slice], steps: int = 5,
    bf16: bool = False,
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """The first step's loss and gradients, and the weights after so many steps of AdamW; on the first rank alone."""
    model, wrapped = wrap(how, bf16)
    rank = dist.get_rank() if how else 0
    part = parts[rank]
    own = share(batch, part, named["unit"])
    first = part.start * named["unit"]
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(wrapped, own, named, first)
        loss.backward()
        if step == 0:
            gradients = gradients_of(model, wrapped)
            losses.append(loss.detach())
        optimizer.step()
    value = losses[0]
    if how:
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    weights = weights_of(model, wrapped)
    return (value.item(), gradients, weights) if rank == 0 else (0.0, {}, {})
