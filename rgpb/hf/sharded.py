"""Parts of a head that are DTensors inside its module's forward: gathered where FSDP holds them, else told apart.

A module's own FSDP unit has gathered its parameters by then, and they are plain tensors. What FSDP holds in the unit of
another module (a weight tied to an embedding that is a unit of its own) is still sharded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rgpb.head import described
from rgpb.hf.wrappers import classes

_FSDP2 = "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule"


def gathered(x: Any, model: nn.Module) -> Any:
    """`x` whole where it is a DTensor that FSDP holds; anything else as it is.

    Its gradient is summed over the ranks by what gathers it, and FSDP averages: so it is divided by their number.

    Raises:
        ValueError: a DTensor of tensor parallelism, or a parameter that ZeRO-3 has not gathered.
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
    if x.device_mesh.ndim == 1 and placements == (Shard(0),):
        # here: the local rows and where they start, as a vocabulary-parallel LMHead
        kind = "a head whose vocabulary is split over the ranks of tensor parallelism"
    elif all(isinstance(placement, Replicate) for placement in placements):
        kind = "a replicated DTensor"
    else:
        kind = f"a DTensor placed as {placements}"
    raise ValueError(
        f"model: expected the whole head of {described(model)} on each rank, got {kind} on {x.device_mesh}; leave the "
        "head out of the parallel plan"
    )


def _unit_of(x: Tensor, model: nn.Module) -> Any:
    """What FSDP2 keeps of a parameter it has sharded, or None where it isn't FSDP's."""
    for module in model.modules():
        if not {_FSDP2, "torch.distributed.fsdp.FSDPModule"} & classes(module):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in () if group is None else group.fsdp_params:
                if parameter.sharded_param is x:
                    return parameter
    return None
