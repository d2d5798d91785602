"""`rgpb tune`: time what the kernels' speed depends on, on this machine, and keep the fastest.

On a GPU these are the configurations of the Triton kernels: each candidate of `rgpb.kernels.configs` is first compared
with torch's float32 answer on the same inputs, and only what agrees is timed. On a CPU they are the sizes of the
products (`rgpb.engine.chunks.Limits`), for the number of threads at hand; about a minute. What is chosen goes into
`rgpb.kernels.tuned.file()`, which later processes read first: their results differ from earlier ones by rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.bench.contest import LOG_PROB, Job, Shape, fused, kind_of, make_batch
from rgpb.bench.measure import interleaved
from rgpb.engine import chunks
from rgpb.engine.chunks import Limits
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.kernels import tuned
from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream

SHAPE = Shape(2048, 4096, 32768)  # rows of a chunk of a large head; a quarter of its vocabulary says as much
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest entry
PLAIN = Epilogue(None, None, 1.0)


class Kernel(NamedTuple):
    """A Triton kernel on buffers that exist; nothing is overwritten that a second call reads.

    Attributes:
        run: one call with a configuration, None for the one that launches take, and its main result, or (E, r) with
            diag(r) E.
        truth: what that should be, float32.
        moved: bytes read and written, counted as in docs/kernels.md: what a kernel can't do without.
        stored: of them, what a plan counts beside the product of a kernel that has one.
        product: whether it has one.
    """

    run: Callable[[Any], Tensor | tuple[Tensor, Tensor]]
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

    tiles = configs.tile("score", given.x.device, given.dtype).parts(given.shape.vocab)
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
    """The sweep and the loss: dlogits, for float16 in a second sweep."""
    from rgpb.kernels import triton_rows

    e, lam = given.buffer(given.dtype), given.z_y - given.lse_other
    lam_ref = lam + given.noise
    ref = (torch.nn.functional.logsigmoid(lam_ref), lam_ref) if loss == "bnf" else None

    def run(config: Any) -> Tensor | tuple[Tensor, Tensor]:
        terms = TokenTerms(loss, given.one, ref, loss == "bnf")
        _, _, made, r = triton_rows.token_loss_(given.z, given.y, terms, PLAIN, e, given.room, config=config)
        return made if r is None else (made, r)

    g = torch.sigmoid(-lam) if ref is None else torch.sigmoid(-lam) * (lam - lam_ref).clamp(max=0).exp()
    sweeps = 2 if given.dtype == torch.float16 else 1
    return Kernel(run, given.dlogits(g[:, None]), given.z.numel() * (4 * sweeps + e.itemsize))


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

    return Partials.empty(given.z, config.parts(given.shape.vocab), given.shape.tokens, torch.float32, with_top, False)


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
    made = kernel.run(config)
    result = made.float() if isinstance(made, Tensor) else made[0] * made[1][:, None]
    return ((result - kernel.truth).abs().max() / kernel.truth.abs().max()).item()


def _checked(name: str, kernel: Kernel, config: Any, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": name, "config": _text(config), "dtype": str(dtype), "shape": str(shape)}
    try:
        error = error_of(kernel, config)
    except Exception as refusal:  # a configuration that this GPU can't launch is a result, too
        return row | {"status": f"{type(refusal).__name__}: {str(refusal).partition(chr(10))[0]}"}
    return row | {"status": "ok" if error <= TOLERANCE[dtype] else "FAILED", "error": error}


def _text(config: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


CPU_SHAPE = Shape(2048, 512, 8192)
# What is tried of each of `Limits`, and the job that is timed; one field after the other, each with the best so far.
CPU_CANDIDATES: list[tuple[str, tuple[int, ...], str, str]] = [
    ("columns", (1024, 2048, 4096, 8192), "bnf", "single"),
    ("rows", (128, 256, 512, 1024), "bnf", "single"),
    ("scored", (512, 1024, 2048), LOG_PROB, "forward"),
    ("slice", (1024, 2048, 4096), "dpo", "two_pass"),
]
# So much faster than what is there, at least: less is noise.
GAIN = 0.97


@contextmanager
def limits_of(limits: Limits) -> Iterator[None]:
    """Calls inside go by these limits."""
    there = chunks.tuned_limits
    chunks.tuned_limits = lambda threads: limits  # type: ignore[assignment]
    try:
        yield
    finally:
        chunks.tuned_limits = there


def sweep_cpu(
    progress: Callable[[str], object] = print, shape: Shape = CPU_SHAPE, rounds: int = 5, keep: bool = False
) -> tuple[Limits, list[dict[str, Any]]]:
    """Time the sizes of float32 products on this CPU, with the threads at hand.

    Args:
        keep: for later processes.

    Returns:
        The best limits, and one dict per candidate: limit, value, milliseconds (median), chosen.
    """
    threads, batch = torch.get_num_threads(), make_batch(shape, torch.float32, "cpu")
    best, rows = chunks.untuned_limits(threads), []

    def timed(run: Callable[[], object], limits: Limits) -> None:
        with limits_of(limits):
            run()

    for field, values, loss, path in CPU_CANDIDATES:
        there = getattr(best, field)
        run, _ = fused(batch, Job(loss, kind_of(path)), path, DEFAULT_WORKSPACE, impl="auto")
        runs = {x: partial(timed, run, best._replace(**{field: x})) for x in sorted({*values, there})}
        times = interleaved(runs, rounds, "cpu")
        fastest = min(runs, key=lambda x: times.over(x, there))
        chosen = fastest if times.over(fastest, there) < GAIN else there
        best = best._replace(**{field: chosen})
        for x in runs:
            rows.append({"limit": field, "value": x, "ms": times.quantiles(x)[0] * 1e3, "chosen": x == chosen})
            progress(f"{field} {x}: {rows[-1]['ms']:.1f} ms, {times.over(x, there):.3f} of {there}'s time")
    if keep:
        tuned.keep(chunks.cpu_key(threads), best)
        chunks.tuned_limits.cache_clear()
    return best, rows


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `tune`."""
    parser = subparsers.add_parser("tune", help="time the kernels' sizes on this machine", description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="on a GPU; default %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune on the current CUDA device, or without one on the CPU. 1 if a configuration gave a wrong result."""
    if not torch.cuda.is_available():
        best, _ = sweep_cpu(shape=CPU_SHAPE, keep=True)
        print(f"{tuned.cpu_name()}, {torch.get_num_threads()} threads: {_text(best)}\nkept in {tuned.file()}")
        return 0

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    rows = sweep(torch.device("cuda", torch.cuda.current_device()), dtype=dtype, keep=True)
    for row in rows:
        if row.get("chosen"):
            print(f"{row['kernel']}: {row['config']}, {row['ms']:.3f} ms")
    print(f"kept in {tuned.file()}")
    return int(any(row["status"] == "FAILED" for row in rows))
