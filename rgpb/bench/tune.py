"""`rgpb tune`: time the Triton kernels' configurations on this GPU and keep the fastest.

Each candidate of `rgpb.kernels.configs` is first compared with torch's float32 answer on the same inputs; only what
agrees is timed. The chosen ones go into `configs.tuned_file()`, which launches read before the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.bench.contest import Shape
from rgpb.bench.measure import interleaved
from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream

SHAPE = Shape(2048, 4096, 32768)  # rows of a chunk of a large head; a quarter of its vocabulary says as much
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest entry
PLAIN = Epilogue(None, None, 1.0)


class Kernel(NamedTuple):
    """A Triton kernel on buffers that exist; nothing is overwritten that a second call reads.

    Attributes:
        run: one call with a configuration, None for the one that launches take, and its main result.
        truth: what that should be, float32.
        moved: bytes read and written, counted as in docs/kernels.md: what a kernel can't do without.
        stored: of them, what a plan counts beside the product of a kernel that has one.
        product: whether it has one.
    """

    run: Callable[[Any], Tensor]
    truth: Tensor
    moved: int
    stored: int = 0
    product: bool = False


class Inputs:
    """Rows of a chunk with all that the kernels are given, and what they should make of it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        random = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=device)

        C, H, V = shape
        self.shape, self.dtype = shape, dtype
        self.x, self.w = normal(C, H).to(dtype), normal(V, H).mul_(2 / H**0.5).to(dtype)
        self.y = torch.randint(V, (C,), generator=random, device=device)
        self.room = -(-V // 16) * 16  # of a row, as in the engine's buffers
        self.z = self.buffer(torch.float32)
        torch.mm(self.x.float(), self.w.float().t(), out=self.z)
        others = self.z.scatter(1, self.y[:, None], -torch.inf)
        self.z_y, self.lse_other = self.z.gather(1, self.y[:, None])[:, 0], others.logsumexp(1)
        self.q = others.sub_(self.lse_other[:, None]).exp_()
        self.one, self.noise = torch.ones_like(self.z_y), 0.3 * normal(C)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """[C, V] with the engine's room between rows."""
        made = torch.zeros(self.shape.tokens, self.room, dtype=dtype, device=self.x.device)
        return made[:, : self.shape.vocab]

    def dlogits(self, g: Tensor | float) -> Tensor:
        """g (q − onehot)."""
        return self.q.scatter(1, self.y[:, None], -1.0).mul_(g)


def score(given: Inputs) -> Kernel:
    """Partial statistics of each tile; `lse_other`, folded by torch."""
    from rgpb.kernels import configs, triton_tiles

    z_y = torch.empty_like(given.z_y)

    def run(config: Any) -> Tensor:
        partials = _partials(given, config or configs.tile("score", given.x.device, given.dtype), True)
        triton_tiles.score(given.x, given.w, given.y, PLAIN, z_y, partials, None, None, given.room, config=config)
        return triton_tiles.merge(partials, None, False)[0]

    tiles = -(-given.shape.vocab // configs.tile("score", given.x.device, given.dtype).vocab)
    return Kernel(run, given.lse_other, _operands(given) + 8 * tiles * given.shape.tokens, product=True)


def weights(given: Inputs) -> Kernel:
    """exp(z − shift), here the softmax over the other tokens."""
    from rgpb.kernels import configs, triton_tiles

    z_y, e = torch.empty_like(given.z_y), given.buffer(given.dtype)

    def run(config: Any) -> Tensor:
        partials = _partials(given, config or configs.tile("weights", given.x.device, given.dtype), False)
        triton_tiles.score(
            given.x, given.w, given.y, PLAIN, z_y, partials, given.lse_other, e, given.room, config=config
        )
        return e

    stored = e.numel() * e.itemsize
    return Kernel(run, given.q, _operands(given) + stored, stored, product=True)


def tile_gradients(given: Inputs) -> Kernel:
    """dlogits from known statistics."""
    from rgpb.kernels import triton_tiles

    e, scores = given.buffer(given.dtype), Statistics(given.z_y, given.lse_other, None)

    def run(config: Any) -> Tensor:
        upstream = Upstream(-given.one, given.one)
        triton_tiles.gradients(
            given.x, given.w, given.y, scores, upstream, PLAIN, e, given.room, config=config
        )  # fmt: skip
        return e

    stored = e.numel() * e.itemsize
    return Kernel(run, given.dlogits(1.0), _operands(given) + stored, stored, product=True)


def statistics(given: Inputs, entropy: bool = False) -> Kernel:
    """The sweep of a row of logits: `lse_other`, or the entropy of the other tokens."""
    from rgpb.kernels import triton_rows

    def run(config: Any) -> Tensor:
        made = triton_rows.statistics(given.z, given.y, PLAIN, entropy, None, given.room)[0]
        return made.h_o if entropy and made.h_o is not None else made.lse_other

    truth = given.lse_other - (given.q * given.z).sum(1) if entropy else given.lse_other
    return Kernel(run, truth, 4 * given.z.numel())


def gradients(given: Inputs) -> Kernel:
    """dlogits from known statistics."""
    from rgpb.kernels import triton_rows

    e, scores = given.buffer(given.dtype), Statistics(given.z_y, given.lse_other, None)

    def run(config: Any) -> Tensor:
        upstream = Upstream(-given.one, given.one)
        return triton_rows.gradients_(given.z, given.y, scores, upstream, PLAIN, e, given.room)[0]

    return Kernel(run, given.dlogits(1.0), given.z.numel() * (4 + e.itemsize))


def token_loss(given: Inputs, loss: str = "nll") -> Kernel:
    """Both sweeps and the loss between them: dlogits."""
    from rgpb.kernels import triton_rows

    e, lam = given.buffer(given.dtype), given.z_y - given.lse_other
    lam_ref = lam + given.noise
    ref = (torch.nn.functional.logsigmoid(lam_ref), lam_ref) if loss == "bnf" else None

    def run(config: Any) -> Tensor:
        terms = TokenTerms(loss, given.one, ref, loss == "bnf")
        return triton_rows.token_loss_(given.z, given.y, terms, PLAIN, e, given.room, config=config)[2]

    g = torch.sigmoid(-lam) if ref is None else torch.sigmoid(-lam) * (lam - lam_ref).clamp(max=0).exp()
    return Kernel(run, given.dlogits(g[:, None]), given.z.numel() * (8 + e.itemsize))


# `rgpb tune` sweeps the first four; the row kernels have one configuration in common.
KERNELS: dict[str, Callable[[Inputs], Kernel]] = {
    "score": score,
    "weights": weights,
    "gradients": tile_gradients,
    "rows": token_loss,
    "rows: statistics": statistics,
    "rows: statistics with entropy": partial(statistics, entropy=True),
    "rows: gradients": gradients,
    "rows: bnf": partial(token_loss, loss="bnf"),
}


def _operands(given: Inputs) -> int:
    return given.x.nbytes + given.w.nbytes


def _partials(given: Inputs, config: Any, with_top: bool) -> Any:
    from rgpb.kernels.triton_tiles import Partials

    tiles = -(-given.shape.vocab // config.vocab)
    return Partials.empty(given.z, tiles, given.shape.tokens, torch.float32, with_top, False)


def sweep(
    device: torch.device | str, progress: Callable[[str], object] = print, shape: Shape = SHAPE,
    dtype: torch.dtype = torch.bfloat16, rounds: int = 7, keep: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time all candidates; the fastest of each kernel is marked `chosen`, and kept for later launches with `keep`.

    Returns:
        One dict per kernel and candidate: kernel, configuration, dtype, shape, status, milliseconds (median, 20 % and
        80 %), rate (TFLOP/s of a tile kernel, GB/s of a row kernel), chosen.
    """
    from rgpb.kernels import configs

    device = torch.device(device)
    tiles, rows = configs.TILES[configs.arch(device)], []
    row_configs = configs.row_candidates() if device.type == "cuda" else [configs.rows(device)]
    given = Inputs(shape, dtype, device)
    for name in ("score", "weights", "gradients", "rows"):
        kernel, candidates = KERNELS[name](given), row_configs if name == "rows" else tiles[name]
        made = [_checked(name, kernel, config, shape, dtype) for config in candidates]
        good = {at: partial(kernel.run, config) for at, config in enumerate(candidates) if made[at]["status"] == "ok"}
        times = interleaved(good, rounds, device.type)
        for at in good:
            median, low, high = times.quantiles(at)
            made[at] |= {"ms": median * 1e3, "ms_20": low * 1e3, "ms_80": high * 1e3}
            flops = 2.0 * shape.tokens * shape.width * shape.vocab
            made[at]["rate"] = flops / median / 1e12 if kernel.product else kernel.moved / median / 1e9
        if good:
            best = min(good, key=lambda at: made[at]["ms"])
            made[best]["chosen"] = True
            if keep:
                configs.keep(device, name, "" if name == "rows" else str(dtype), candidates[best])
        for row in made:
            progress(f"{row['kernel']} {row['config']}: " + (f"{row['ms']:.3f} ms" if "ms" in row else row["status"]))
        rows += made
    return rows


def error_of(kernel: Kernel, config: Any) -> float:
    """The largest error, over the largest entry."""
    return ((kernel.run(config).float() - kernel.truth).abs().max() / kernel.truth.abs().max()).item()


def _checked(name: str, kernel: Kernel, config: Any, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": name, "config": _text(config), "dtype": str(dtype), "shape": str(shape)}
    try:
        error = error_of(kernel, config)
    except Exception as refusal:  # a configuration that this GPU can't launch is a result, too
        return row | {"status": f"{type(refusal).__name__}: {str(refusal).partition(chr(10))[0]}"}
    return row | {"status": "ok" if error <= TOLERANCE[dtype] else "FAILED", "error": error}


def _text(config: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `tune`."""
    parser = subparsers.add_parser("tune", help="time the kernels' configurations on this GPU", description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="default %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune on the current CUDA device. 1 if a configuration gave a wrong result.

    Raises:
        ValueError: no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("device: expected a GPU to tune for, got torch.cuda.is_available() = False")
    from rgpb.kernels import configs

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    rows = sweep(torch.device("cuda", torch.cuda.current_device()), dtype=dtype, keep=True)
    for row in rows:
        if row.get("chosen"):
            print(f"{row['kernel']}: {row['config']}, {row['ms']:.3f} ms")
    print(f"kept in {configs.tuned_file()}")
    return int(any(row["status"] == "FAILED" for row in rows))
