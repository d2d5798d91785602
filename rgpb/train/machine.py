"""The device of a run, and the memory that it takes there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rgpb.train.config import TrainConfig
from rgpb.train.ranks import processes


def device_of(config: TrainConfig) -> torch.device:
    """A GPU where there is one, unless `cpu` is set: of several processes each has its own."""
    if not torch.cuda.is_available() or config.cpu:
        return torch.device("cpu")
    return torch.device("cuda") if processes() == 1 else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, on that device."""
    module: nn.Module = model
    module.to(device)
    return model


def reset_peak(device: torch.device) -> bool:
    """Start measuring peak memory anew; False where that can't be done: on a CPU it takes Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`, or since the process began where that returns False: on a GPU that of the tensors, on a
    CPU that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows, where nothing else here is missing

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parallel_of(config: TrainConfig) -> str | None:
    """How several processes share the model; None for one."""
    return (config.parallel or "ddp") if processes() > 1 else None


def precision_of(config: TrainConfig) -> dict[str, str | None]:
    """What parameters are held in, what autocast computes in, and what gradients are averaged in."""
    parameters = "bfloat16" if config.dtype == "bf16" else "float32"
    averaged = {None: None, "ddp": parameters, "fsdp2": "float32"}[parallel_of(config)]
    return {"parameters": parameters, "autocast": "bfloat16" if config.bf16 else None, "reductions": averaged}


def check_devices(config: TrainConfig) -> None:
    """Refuse processes and devices that don't fit together, before any of them waits for another.

    Raises:
        ValueError: several GPUs for one process, fewer GPUs than processes, a launcher that says too little or other
            than the settings.
    """
    world, gpus = processes(), 0 if config.cpu else torch.cuda.device_count()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise ValueError(f"{name}: expected none, since --parallel says how; got {os.environ[name]!r}")
    asked, own = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "bf16" if config.bf16 else "no"
    if asked not in ("no", own):
        raise ValueError(f"ACCELERATE_MIXED_PRECISION: expected {own!r}, as --bf16 says, got {asked!r}")
    if world == 1:
        if config.parallel is not None:
            raise ValueError(f"parallel: expected none in one process (torchrun starts more), got {config.parallel!r}")
        if gpus > 1:
            raise ValueError(f"CUDA_VISIBLE_DEVICES: expected one visible GPU for one process, got {gpus}")
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in needed if name not in os.environ]
    if absent and not torch.distributed.is_initialized():
        raise ValueError(
            f"WORLD_SIZE: expected {', '.join(absent)} beside it, as torchrun sets them; got {world} alone"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: expected a GPU for each of {local} processes, got {gpus}")
    if config.batch_size < world:
        raise ValueError(f"batch_size: expected at least a unit for each of {world} processes, got {config.batch_size}")
    if not hasattr(transformers.Trainer, "_prepare_for_training"):
        raise ValueError(f"transformers: expected 5 or later for several processes, got {transformers.__version__}")
