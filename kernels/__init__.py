"""Row and tile kernels: what happens between the matrix products.

Installed as `rgpb.kernels`. `torch_rows` runs anywhere; `cpp_rows` is the Python side of `csrc/`, for CPUs, where that
was built; the modules named `triton_…` need Triton and a GPU.
"""

from __future__ import annotations

import torch


def architecture(device: torch.device) -> str | None:
    """ "sm_80", "sm_90", "sm_100", "sm_120" or "gfx9"; the nearest for a GPU that is none of them, None for no GPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "gfx9"
    major = torch.cuda.get_device_properties(device).major  # which torch.compile takes for a constant
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, "sm_80")
