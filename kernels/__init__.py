"""Kernel sets: what happens between, or inside, the matrix products. Installed as `rgpb.kernels`.

A set serves a chunk of rows against the head (`types.Chunk`) through one interface, `KernelSet`. The engine forms no
logit and knows no loss; a set knows no objective but the token-wise losses that it has in its own language.

| `impl`   | module         | logits                          | runs on                                    |
|----------|----------------|---------------------------------|--------------------------------------------|
| `torch`  | `torch_rows`   | float32 chunks, library product | any device                                 |
| `cpp`    | `cpp_rows`     | the same                        | CPUs, where `csrc/` was built               |
| `triton` | `triton_rows`  | the same                        | CUDA and ROCm                              |
| `tiled`  | `triton_tiles` | in registers only               | CUDA and ROCm                              |

`tests/kernel_suite.py` holds every set to the same results, against float64.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from rgpb.kernels import cpp_rows
from rgpb.kernels.types import Chunk, Counting, Statistics, TokenTerms, Upstream, Weighed

IMPLEMENTATIONS = ("auto", "triton", "tiled", "cpp", "torch")
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SETS = {
    "torch": ("torch_rows", "TorchRows"),
    "cpp": ("cpp_rows", "CppRows"),
    "triton": ("triton_rows", "TritonRows"),
    "tiled": ("triton_tiles", "Tiles"),
}


class KernelSet(Protocol):
    """What a kernel set does for a chunk of C rows. D = ∂L/∂(X Wᵀ) = diag(r) E; r is None where it is all 1.

    Attributes:
        token_losses: names of the token-wise losses that `token_loss` has, of `types.TOKEN_LOSSES`.
    """

    token_losses: tuple[str, ...]

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        """(statistics, masses): each row's softmax mass over the other tokens per `mass_tile` columns, [C, T]."""

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        """`score`, and what `pull_back` turns into gradients of the same chunk once the coefficients are known."""

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor | None]:
        """(E, r) of the chunk weighed last; `upstream` without g_ho."""

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        """(E, r) from known statistics: logits again, also for a slice of the vocabulary."""

    def counting(self, active: Tensor, tile: int) -> Counting | None:
        """The products of skipping, where `active` [C, T] says which tiles count; None where the set has no kernels for
        them."""

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:
        """(statistics, loss of each token [C], E, r) in one launch."""


@cache
def kernel_set(impl: str) -> KernelSet:
    """The set of that name, of `SETS`; its module is imported when it is first asked for."""
    module, name = SETS[impl]
    return getattr(import_module(f"rgpb.kernels.{module}"), name)()


def why_not(impl: str, device: torch.device) -> str | None:
    """What keeps the kernel set `impl` from serving tensors on `device`; None where it can."""
    if impl in ("triton", "tiled"):
        if not HAS_TRITON:
            return "the package triton isn't installed"
        if device.type != "cuda" and not INTERPRETED:
            return f"Triton has no kernels for the device {device.type} (TRITON_INTERPRET=1 interprets them, for tests)"
    if impl == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels are for CPUs, not for the device {device.type}"
        return cpp_rows.missing()
    return None


def _tiles_measured(device: torch.device) -> bool:
    """Whether `rgpb tune` has timed the tile kernels on a GPU of this name; a compiler can't ask."""
    if torch.compiler.is_compiling():
        return False
    configs = import_module("rgpb.kernels.configs")
    return configs.tiles_measured(device)


def resolve_impl(impl: str, device: torch.device) -> tuple[str, ...]:
    """The kernel sets that a plan may choose from: for "auto" those that are there, fastest first; else the named one.
    The tile kernels are among them where `rgpb tune` has measured them.

    Raises:
        ValueError: a set that can't serve this device, with the reason.
    """
    if impl == "auto":
        if device.type == "cuda":
            if why_not("triton", device) is not None:
                return ("torch",)
            return ("triton", "tiled") if _tiles_measured(device) else ("triton",)
        return ("cpp",) if why_not("cpp", device) is None else ("torch",)
    reason = why_not(impl, device)
    if reason:
        *some, last = (repr(other) for other in IMPLEMENTATIONS if other == "auto" or why_not(other, device) is None)
        raise ValueError(f"impl: expected {', '.join(some)} or {last}, since {reason}; got {impl!r}")
    return (impl,)
