"""The row kernels in C++ (`csrc/`), for CPUs: float64, float32 and bfloat16 storage, float32 (float64) arithmetic.

Their operators are registered when this module is imported, and take the widest vectors that the processor has. The
formulas are those of `torch_rows`; a row is read from memory once, and the rest happens in the core's own cache. A
negative target lies in another slice of the vocabulary (z_y is 0 then); `token_loss_` ignores such a row: zeros come
out.

Dimensions: C rows of the buffer, V vocabulary (or a slice of it), T tiles of it.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream

NAME = "_cpp"
HOW = "reinstall rgpb where there is a C++ compiler, by `pip install --no-build-isolation`"
SOURCES = Path(__file__).parents[1] / "csrc"  # there in a checkout, where the library can be older than they are


def _load() -> str | None:
    """Register the operators; why that can't be done, or None."""
    places = [Path(__file__).with_name(NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    library = next((place for place in places if place.exists()), None)
    if library is None:
        return f"the C++ kernels weren't built: {HOW}"
    try:
        torch.ops.load_library(library)
        built_for, tag = torch.ops.rgpb.cpp_built_for(), torch.ops.rgpb.cpp_tag()
    except (OSError, AttributeError) as error:
        reason = error.__cause__ or error
        return f"the C++ kernels can't be loaded ({' '.join(str(reason).split())}): {HOW}"
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        return f"the C++ kernels were built for torch {built_for}, and this is {torch.__version__}: {HOW}"
    if SOURCES.is_dir() and tag != tag_of(SOURCES):
        return f"the C++ kernels were built from other sources than those in {SOURCES}: {HOW}"
    for name in ("row_statistics", "row_slice", "row_gradients", "row_token_loss", "mm_bf16"):
        torch.library.register_fake(f"rgpb::{name}", lambda *_: None)  # all results go into arguments
    return None


def tag_of(sources: Path) -> str:
    """What tells these sources from others; `setup.py` does the same."""
    return sha256(b"".join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest()[:12]


# Found out when this module is imported, so that torch.compile takes both for constants.
MISSING = _load()
# Whether bfloat16 operands are multiplied as they are, with float32 results.
BF16_PRODUCTS = MISSING is None and torch.ops.rgpb.has_bf16_products()


def missing() -> str | None:
    """Why the compiled library can't be used, or None where it can."""
    return MISSING


def describe() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline" (what every processor of this family has)."""
    return torch.ops.rgpb.cpp_use("")


def fresh(x: Tensor) -> Tensor:
    """`x`, just allocated and not yet touched: large ones get huge pages where the system has them."""
    if x.device.type == "cpu" and MISSING is None:
        torch.ops.rgpb.huge_pages(x)
    return x


def statistics(
    z_CV: Tensor,
    target_C: Tensor,
    epilogue: Epilogue,
    entropy: bool,
    tile: int | None = None,
    room: int | None = None,
) -> tuple[Statistics, Tensor | None]:
    """(z_y, lse_other, H_o) of each row; nothing is changed. As `triton_rows.statistics`; `room` isn't needed here, and
    a negative target doesn't rule the row out."""
    masses = None if tile is None else z_CV.new_empty(len(z_CV), -(-z_CV.shape[1] // tile), dtype=_acc(z_CV))
    return _statistics(z_CV, target_C, epilogue, entropy, masses, tile, None)[0], masses


def statistics_(
    z_CV: Tensor,
    target_C: Tensor,
    epilogue: Epilogue,
    entropy: bool,
    out: Tensor | None = None,
    masses: Tensor | None = None,
    tile: int = 0,
    keep: bool = True,
) -> tuple[Statistics, Tensor]:
    """The statistics, and Σ E_k [C]; with `keep` products become weights J_k E_k, 0 at the target, in place or in
    `out`. As `torch_rows.statistics_`, but that weights in `out` aren't normalised."""
    weights = (z_CV if out is None else out) if keep else None
    return _statistics(z_CV, target_C, epilogue, entropy, masses, tile, weights)


def _statistics(
    z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool, masses: Tensor | None, tile: int | None,
    weights: Tensor | None,
) -> tuple[Statistics, Tensor]:  # fmt: skip
    z_y, lse_other, total, h_o = (z_CV.new_empty(len(z_CV), dtype=_acc(z_CV)) for _ in range(4))
    found = Statistics(z_y, lse_other, h_o if entropy else None)
    torch.ops.rgpb.row_statistics(
        z_CV, target_C.contiguous(), *_dense(epilogue), *found, masses, tile or 0, weights, total
    )  # fmt: skip
    return found, total


def begin(x_CH: Tensor) -> Tensor:
    """Running statistics of C rows whose vocabulary comes in slices, for `add_slice_` and `end`: float64 [C, 4]."""
    running = x_CH.new_zeros(len(x_CH), 4, dtype=torch.float64)
    running[:, 0] = -torch.inf
    return running


def add_slice_(running_C4: Tensor, z_CS: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool) -> None:
    """Take in a slice: z_CS its raw products (nothing is changed), target_C columns of it, or −1."""
    torch.ops.rgpb.row_slice(z_CS, target_C.contiguous(), *_dense(epilogue), entropy, running_C4)


def end(running_C4: Tensor, entropy: bool, dtype: torch.dtype) -> Statistics:
    """The statistics of the rows, when all slices are in. Largest logit m, Σ = Σ exp(z − m), and of the slices' own
    sums e and entropies h: H_o = log Σ + (1 / Σ) Σ e (h − log e), which no common size of the logits enters."""
    top, total, mixed, z_y = running_C4.unbind(1)
    lse_other = (top + total.log()).to(dtype)
    h_o = torch.where(total == 0, 0, total.log() + mixed / total).to(dtype) if entropy else None
    return Statistics(z_y.to(dtype), lse_other, h_o)


def gradients_(
    z_CV: Tensor,
    target_C: Tensor,
    scores: Statistics,
    upstream: Upstream,
    epilogue: Epilogue,
    out: Tensor | None = None,
    room: int | None = None,
) -> tuple[Tensor, None]:
    """Raw products → (D, None), the dlogits themselves, in place or in `out`. As `triton_rows.gradients_`."""
    out = z_CV if out is None else out
    g_zy, g_lo, g_ho = (None if g is None else g.contiguous() for g in upstream)
    h_o = scores.h_o.contiguous() if g_ho is not None and scores.h_o is not None else None
    torch.ops.rgpb.row_gradients(
        z_CV, target_C.contiguous(), *_dense(epilogue), scores.lse_other.contiguous(), h_o, g_zy, g_lo, g_ho, out
    )
    return out, None


def token_loss_(
    z_CV: Tensor, target_C: Tensor, loss: str, weight_C: Tensor, ref: tuple[Tensor, Tensor] | None, epilogue: Epilogue,
    entropy: bool, out: Tensor | None = None, room: int | None = None,
) -> tuple[Statistics, Tensor, Tensor]:  # fmt: skip
    """Raw products → (statistics, loss of each token, dlogits), in place or in `out`. As `triton_rows.token_loss_`."""
    out = z_CV if out is None else out
    z_y, lse_other, value, h_o = (z_CV.new_empty(len(z_CV), dtype=_acc(z_CV)) for _ in range(4))
    found = Statistics(z_y, lse_other, h_o if entropy else None)
    ref_logp, ref_lam = (None, None) if ref is None else (x.contiguous() for x in ref)
    torch.ops.rgpb.row_token_loss(
        z_CV, target_C.contiguous(), *_dense(epilogue), loss, weight_C.contiguous(), ref_logp, ref_lam, *found, value,
        out,
    )  # fmt: skip
    return found, value, out


def _acc(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _dense(epilogue: Epilogue) -> tuple[Tensor | None, float | None, float]:
    bias = None if epilogue.bias is None else epilogue.bias.contiguous()
    return bias, epilogue.softcap, epilogue.scale
