"""`rgpb tune`: time the Triton kernels' configurations on this GPU and keep the fastest.

Each candidate of `rgpb.kernels.configs` is first compared with torch's float32 answer on the same inputs; only what
agrees is timed. The chosen ones go into `configs.tuned_file()`, which launches read before the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rgpb.bench.contest import Shape
from rgpb.bench.measure import interleaved
from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream

SHAPE = Shape(2048, 4096, 32768)  # rows of a chunk of a large head; a quarter of its vocabulary says as much
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest entry
PLAIN = Epilogue(None, None, 1.0)


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
    rows: list[dict[str, Any]] = []
    key = configs.arch(device)
    x, w, y = _inputs(shape, dtype, device)
    z = (x.float() @ w.float().T).contiguous()
    jobs: dict[str, tuple[Any, list[Any], Callable[[Any], Tensor], Tensor, float]] = {}
    for kernel in ("score", "weights", "gradients"):
        run, truth = _tile_job(kernel, x, w, y, z)
        jobs[kernel] = (dtype, configs.TILES[key][kernel], run, truth, 2.0 * shape.tokens * shape.width * shape.vocab)
    moved = z.numel() * (4 + 4 + dtype.itemsize)  # read twice, written narrow once
    run, truth = _row_job(y, z, dtype)
    row_configs = configs.row_candidates() if device.type == "cuda" else [configs.rows(device)]
    jobs["rows"] = ("", row_configs, run, truth, moved)
    for kernel, (kind, candidates, run, truth, work) in jobs.items():
        made = [_checked(kernel, config, run, truth, shape, dtype) for config in candidates]
        good = {at: partial(run, config) for at, config in enumerate(candidates) if made[at]["status"] == "ok"}
        times = interleaved(good, rounds, device.type)
        for at in good:
            median, low, high = times.quantiles(at)
            made[at] |= {"ms": median * 1e3, "ms_20": low * 1e3, "ms_80": high * 1e3}
            made[at]["rate"] = work / median / (1e9 if kernel == "rows" else 1e12)
        if good:
            best = min(good, key=lambda at: made[at]["ms"])
            made[best]["chosen"] = True
            if keep:
                configs.keep(device, kernel, str(kind), candidates[best])
        for row in made:
            progress(f"{row['kernel']} {row['config']}: " + (f"{row['ms']:.3f} ms" if "ms" in row else row["status"]))
        rows += made
    return rows


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    x, w = normal(shape.tokens, shape.width).to(dtype), normal(shape.vocab, shape.width).mul_(2 / shape.width**0.5)
    return x, w.to(dtype), torch.randint(shape.vocab, (shape.tokens,), generator=random, device=device)


def _tile_job(kernel: str, x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> tuple[Callable[[Any], Tensor], Tensor]:
    """A tile kernel as a function of its configuration, and what it should give."""
    from rgpb.kernels import triton_tiles
    from rgpb.kernels.triton_tiles import Partials

    out = torch.empty(len(x), len(w), dtype=x.dtype, device=x.device)
    others = z.scatter(1, y[:, None], -torch.inf)
    lse_other = others.logsumexp(1)
    one = torch.ones_like(lse_other)
    z_y = torch.empty_like(lse_other)

    def score(config: Any, shift: Tensor | None, e: Tensor | None) -> Partials:
        tiles = -(-len(w) // config.vocab)
        partials = Partials.empty(z, tiles, len(x), torch.float32, shift is None, False)
        triton_tiles.score(x, w, y, PLAIN, z_y, partials, shift, e, config=config)
        return partials

    def scored(config: Any) -> Tensor:
        return triton_tiles.merge(score(config, None, None), None, False)[0]

    def weights(config: Any) -> Tensor:
        score(config, lse_other, out)
        return out

    def gradients(config: Any) -> Tensor:
        scores = Statistics(z_y, lse_other, None)
        triton_tiles.gradients(x, w, y, scores, Upstream(-one, one), PLAIN, out, config=config)
        return out

    q = (others - lse_other[:, None]).exp()
    if kernel == "score":
        return scored, lse_other
    return (weights, q) if kernel == "weights" else (gradients, q.scatter(1, y[:, None], -1.0))


def _row_job(y: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Callable[[Any], Tensor], Tensor]:
    """The row kernel with the token-wise loss, and the dlogits it should give; logits aren't overwritten."""
    from rgpb.kernels import triton_rows

    weight, out = z.new_ones(len(z)), torch.empty(z.shape, dtype=dtype, device=z.device)

    def run(config: Any) -> Tensor:
        return triton_rows.token_loss_(z, y, "nll", weight, None, PLAIN, False, out, config=config)[2]

    return run, z.softmax(1).scatter_add(1, y[:, None], -z.new_ones(len(z), 1))


def _checked(
    kernel: str, config: Any, run: Callable[[Any], Tensor], truth: Tensor, shape: Shape, dtype: torch.dtype
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"kernel": kernel, "config": _text(config), "dtype": str(dtype), "shape": str(shape)}
    try:
        made = run(config).float()
    except Exception as refusal:  # a configuration that this GPU can't launch is a result, too
        return row | {"status": f"{type(refusal).__name__}: {str(refusal).partition(chr(10))[0]}"}
    error = ((made - truth).abs().max() / truth.abs().max()).item()
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
