"""What kind of device tensors lie on."""

from __future__ import annotations

import torch


def kind(device: torch.device) -> str:
    """ "cpu", "cuda", …: what the engine goes by where a CPU is served another way than a GPU.

    Tests put "cuda" in its place, to see on a CPU what a GPU would be given (`tests/counting.py`).
    """
    return device.type


def architecture(device: torch.device) -> str | None:
    """ "sm_80", "sm_90", "sm_100", "sm_120" or "gfx9"; the nearest for a GPU that is none of them, None for no GPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "gfx9"
    return nearest(torch.cuda.get_device_properties(device).major)  # which torch.compile takes for a constant


def nearest(major: int) -> str:
    """The architecture of an NVIDIA GPU by the first number of its compute capability."""
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, "sm_80")
