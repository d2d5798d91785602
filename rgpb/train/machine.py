"""The device of a run, and the memory that it takes there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rgpb.train.config import TrainConfig


def device_of(config: TrainConfig) -> torch.device:
    """A GPU where there is one, unless `cpu` is set."""
    return torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")


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


def check_devices(config: TrainConfig) -> None:
    """Refuse several processes or GPUs.

    Raises:
        ValueError: more than one of either.
    """
    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), 0 if config.cpu else torch.cuda.device_count()
    if processes > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, got {processes}")
    if gpus > 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: expected one visible GPU, got {gpus}")
