"""The row kernels in C++ (`csrc/`), for CPUs: float64, float32 and bfloat16 storage, float32 (float64) arithmetic.

Their operators are registered when this module is imported, and take the widest vectors that the processor has. The
formulas are those of `torch_rows`; a row is read from memory once, and the rest happens in the core's own cache. A
negative target lies in another slice of the vocabulary (z_y is 0 then); `token_loss_` ignores such a row: zeros come
out.

Dimensions: C rows of the buffer, V vocabulary (or a slice of it), T tiles of it.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from rgpb.kernels import matmul
from rgpb.kernels.rows import RowSet
from rgpb.kernels.torch_rows import from_weights_
from rgpb.kernels.types import (
    PAD,
    TOKEN_LOSSES,
    Chunk,
    Epilogue,
    Statistics,
    TokenTerms,
    Upstream,
    Weighed,
    acc_dtype,
    inside,
)

NAME = "_cpp.so"
HUGE_PAGE = 2**21
HOW = "reinstall rgpb where there is a C++ compiler, by `pip install --no-build-isolation`"
SOURCES = Path(__file__).parents[1] / "csrc"  # there in a checkout, where the library can be older than they are


def _load() -> str | None:
    """Register the operators; why that can't be done, or None."""
    library = Path(__file__).with_name(NAME)
    if not library.exists():
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
    if MISSING is None and x.nbytes >= HUGE_PAGE and x.device.type == "cpu":
        torch.ops.rgpb.huge_pages(x)
    return x


def statistics(
    z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool, tile: int | None = None
) -> tuple[Statistics, Tensor | None]:
    """(z_y, lse_other, H_o) of each row; nothing is changed. As `triton_rows.statistics`, but that a negative target
    doesn't rule the row out."""
    found, masses, _ = _sweep(z_CV, target_C, epilogue, entropy, tile, None)
    return found, masses


def statistics_(
    z_CV: Tensor,
    target_C: Tensor,
    epilogue: Epilogue,
    entropy: bool,
    out: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Statistics, Tensor | None, Tensor]:
    """(statistics, masses, Σ E_k [C]); products become weights J_k E_k, 0 at the target, in place or in `out`. As
    `torch_rows.statistics_`, but that weights in `out` aren't normalised."""
    return _sweep(z_CV, target_C, epilogue, entropy, tile, z_CV if out is None else out)


def _sweep(
    z_CV: Tensor, target_C: Tensor, epilogue: Epilogue, entropy: bool, tile: int | None, weights: Tensor | None
) -> tuple[Statistics, Tensor | None, Tensor]:
    dtype, (rows, columns) = acc_dtype(z_CV.dtype), z_CV.shape
    masses = None if tile is None else z_CV.new_empty(rows, -(-columns // tile), dtype=dtype)
    z_y, lse_other, total, h_o = (z_CV.new_empty(rows, dtype=dtype) for _ in range(4))
    found = Statistics(z_y, lse_other, h_o if entropy else None)
    torch.ops.rgpb.row_statistics(
        z_CV, target_C.contiguous(), *_dense(epilogue), *found, masses, tile or 0, weights, total
    )  # fmt: skip
    return found, masses, total


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
    z_CV: Tensor, target_C: Tensor, terms: TokenTerms, epilogue: Epilogue, out: Tensor | None = None
) -> tuple[Statistics, Tensor, Tensor, None]:
    """Raw products → (statistics, loss of each token, dlogits, None), in place or in `out`. As
    `triton_rows.token_loss_`."""
    out = z_CV if out is None else out
    z_y, lse_other, value, h_o = (z_CV.new_empty(z_CV.shape[0], dtype=acc_dtype(z_CV.dtype)) for _ in range(4))
    found = Statistics(z_y, lse_other, h_o if terms.entropy else None)
    ref_logp, ref_lam = (None, None) if terms.ref is None else (x.contiguous() for x in terms.ref)
    torch.ops.rgpb.row_token_loss(
        z_CV, target_C.contiguous(), *_dense(epilogue), terms.loss, terms.factor.contiguous(), ref_logp, ref_lam,
        *found, value, out,
    )  # fmt: skip
    return found, value, out, None


def _dense(epilogue: Epilogue) -> tuple[Tensor | None, float | None, float]:
    bias = None if epilogue.bias is None else epilogue.bias.contiguous()
    return bias, epilogue.softcap, epilogue.scale


class CppRows(RowSet):
    """The kernel set of the C++ kernels."""

    token_losses = TOKEN_LOSSES

    def score(self, chunk: Chunk, entropy: bool, mass_tile: int | None = None) -> tuple[Statistics, Tensor | None]:
        """Without masses nobody asks for these logits again: they are formed a slice of the vocabulary at a time, still
        in the cache when it is swept, in the first bytes of the buffer."""
        if mass_tile is not None or chunk.vocab <= chunk.buffer.shape[1]:
            return statistics(self.logits(chunk), chunk.y, chunk.epilogue, entropy, mass_tile)
        running, rows = begin(chunk.x), len(chunk.x)
        for part, weight in chunk.slices():
            stride = min(len(weight) + PAD, chunk.buffer.shape[1])
            z = chunk.buffer.view(-1)[: rows * stride].view(rows, stride)[:, : len(weight)]
            matmul.mm(chunk.x, weight.t(), z)
            add_slice_(running, z, inside(chunk.y, part), chunk.epilogue.slice(part.start, part.stop), entropy)
        return end(running, entropy, chunk.buffer.dtype), None

    def weigh(
        self, chunk: Chunk, entropy: bool, mass_tile: int | None = None
    ) -> tuple[Statistics, Tensor | None, Weighed]:
        z, out = self.logits(chunk), self.narrow(chunk)
        found, masses, total = statistics_(z, chunk.y, chunk.epilogue, entropy, out, mass_tile)
        return found, masses, Weighed(z if out is None else out, total)

    def pull_back(
        self, chunk: Chunk, weighed: Weighed, statistics: Statistics, upstream: Upstream
    ) -> tuple[Tensor, Tensor]:
        return from_weights_(chunk, weighed, statistics, upstream)

    def gradients(self, chunk: Chunk, statistics: Statistics, upstream: Upstream) -> tuple[Tensor, None]:
        z = self.logits(chunk)
        return gradients_(z, chunk.y, statistics, upstream, chunk.epilogue, self.narrow(chunk))

    def token_loss(self, chunk: Chunk, terms: TokenTerms) -> tuple[Statistics, Tensor, Tensor, Tensor | None]:
        return token_loss_(self.logits(chunk), chunk.y, terms, chunk.epilogue, self.narrow(chunk))
