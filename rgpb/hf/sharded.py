"""Parts of a head that are DTensors inside its module's forward: gathered where FSDP holds them, a rank's own
rows where tensor parallelism splits the vocabulary.

A module's own FSDP unit has gathered its parameters by then, and they are plain tensors. What FSDP holds in the unit of
another module (a weight tied to an embedding that is a unit of its own) is still sharded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rgpb.head import described
from rgpb.hf.wrappers import FSDP2, classes
from rgpb.parallel import VocabShard


def gathered(x: Any, model: nn.Module) -> Any:
    """`x` whole where it is a DTensor that FSDP holds; anything else as it is.

    Its gradient is summed over the ranks by what gathers it, and FSDP averages: so it is divided by their number.

    Raises:
        ValueError: a part that tensor parallelism splits, or a parameter that ZeRO-3 has not gathered.
    """
    if getattr(x, "ds_id", None) is not None and x.numel() == 0 and x.ds_numel:
        raise ValueError(
            f"model: expected the head of {described(model)} gathered in its forward, got a part that ZeRO-3 "
            "holds on other ranks: adapters on the head are not served there; leave the head out of target_modules, or "
            "take ZeRO-2"
        )
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    unit = _unit_of(x, model)
    if unit is not None:
        whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
        if whole.requires_grad:
            ranks = x.device_mesh.size()
            whole.register_hook(lambda gradient: gradient / ranks)
        return whole if unit.param_dtype is None else whole.to(unit.param_dtype)
    placements = tuple(x.placements)
    if all(isinstance(placement, Replicate) for placement in placements):
        return x.to_local()
    kind = "its vocabulary split" if placements == (Shard(0),) else f"a DTensor placed as {placements}"
    raise ValueError(
        f"model: expected the head of {described(model)} whole on each rank, or a plain linear one whose vocabulary is "
        f"split over one dimension of a mesh, got {kind} on {x.device_mesh}; leave the head out of the parallel plan, "
        "or adapters out of the head"
    )


def vocab_shard(weight: Any, model: nn.Module) -> VocabShard | None:
    """Which rows a rank has of a weight [V, H] that tensor parallelism splits by rows; None for any other."""
    if not hasattr(weight, "full_tensor") or _unit_of(weight, model) is not None:
        return None
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    if mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        return None
    ranks, vocab = mesh.size(), weight.shape[0]
    each = -(-vocab // ranks)  # as `torch.chunk`, whose parts DTensor's are
    if each * (ranks - 1) >= vocab:
        raise ValueError(
            f"model: expected rows of the head of {described(model)} for each of {ranks} ranks, got {vocab} rows in "
            f"parts of {each}"
        )
    return VocabShard(mesh.get_group(), each * mesh.get_local_rank(), vocab)


def whole_input(x: Any) -> Tensor:
    """A head's input as each rank has it whole; the gradient that it gets is whole, too."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Replicate

    replicated = [Replicate()] * x.device_mesh.ndim
    return x.redistribute(placements=replicated).to_local(grad_placements=replicated)


def placed_as(x: Any, logits: Tensor) -> Tensor:
    """A rank's logits, where the input of the head was a DTensor as the head would give them: split by columns."""
    if not hasattr(x, "full_tensor"):
        return logits
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(logits, x.device_mesh, [Shard(-1)] * x.device_mesh.ndim, run_check=False)


def whole_output(x: Any) -> Tensor:
    """Logits as each rank has them."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _unit_of(x: Tensor, model: nn.Module) -> Any:
    """What FSDP2 keeps of a parameter it has sharded, or None where it isn't FSDP's."""
    for module in model.modules():
        if FSDP2 not in classes(module):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in () if group is None else group.fsdp_params:
                if parameter.sharded_param is x:
                    return parameter
    return None
