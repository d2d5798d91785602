"""Each kernel alone against its roofline, and where the time of whole calls goes.

A kernel is first compared with float64 torch operations on the same inputs. Then it is timed in the same rounds as its
ceilings: a copy that reads and writes as many bytes together, and for kernels with a matrix product the library's own
of the same [C, H] and [H, V] with float32 results. Bytes are counted as in docs/kernels.md (for the C++ kernels
docs/cpu.md): what a kernel can't do without, so that an implementation in several passes shows a smaller share. A
share above 1 is no error where more is read than written. A call that is shorter than `LEAST_SECONDS` is repeated back
to back within one timed run and its time divided, as its ceilings are; what fits a cache comes from there for both, and
the shortest kernels are as long as their launch.

Kernels that work in place run on their own output from the second time on, so that no copy is timed with them. No
instruction depends on a logit; denormal numbers, which slow a CPU down, and infinite ones don't come up: dlogits taken
for logits give a flat distribution, whose dlogits have the size that they had, and 16-bit ones leave the second half of
a row's bytes as it was. After the last round the buffer is checked for that, and where it doesn't hold there is no
time.

A profile is one call under torch's profiler after a first one. On a GPU it has the device's own times, without the
host's: from the start of the first kernel to the end of the last, idle between them. On a CPU it has the operations'
own times; Python and autograd are the idle part.

Dimensions: C rows of a chunk, H hidden size, V vocabulary, T tiles of it.
"""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rgpb.bench import tune
from rgpb.bench.cases import DTYPES, EXACT_ROWS, LOG_PROB, TOLERANCE, Shape
from rgpb.bench.measure import interleaved, quantiles
from rgpb.engine.chunked import mm, spans
from rgpb.engine.plan import MASS_TILE, MAX_ROWS, RATES, Rates, gemm_dtype
from rgpb.kernels import architecture, cpp_rows, torch_rows
from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream
from rgpb.logprob import resolve_impl, why_not

from .device import light_batch
from .heads import CPU, LLAMA, ratio, timed
from .journal import Settings, Task, explain, release
from .lineup import Case, Job, Run, kernels_for, ours

Head = tuple[str, int, int, int, float | None]  # model, N, H, V, soft-cap

# C of the row kernels: a chunk in a small and in a large workspace; and of the tile kernels.
ROWS = {"cuda": (1024, 8192), "cpu": (MAX_ROWS["cpu"],)}
TILE_ROWS = {"cuda": 4096, "cpu": MAX_ROWS["cpu"]}
HEADS: dict[str, Head] = {"cuda": LLAMA[0], "cpu": CPU[1]}
PROFILED: dict[str, Head] = {"cuda": LLAMA[0], "cpu": CPU[0]}
TOKEN_LOSSES = ("nll", "bnf", "unlikelihood")
# A timed run lasts so long at the least, or has so many calls.
LEAST_SECONDS, MOST_CALLS = 1e-3, 100


# -- inputs and answers ------------------------------------------------------------------------------------------------


class Exact:
    """Some rows in float64: materialised softmaxes, and gradients of the raw products by autograd."""

    def __init__(self, raw: Tensor, y: Tensor, softcap: float | None):
        self.raw = raw.requires_grad_()
        z = self.raw if softcap is None else softcap * torch.tanh(self.raw / softcap)
        self.here = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)
        self.z, others = z.masked_fill(self.here, 0), z.masked_fill(self.here, -torch.inf)
        self.z_y, self.lse_other = z.gather(1, y[:, None])[:, 0], others.logsumexp(1)
        self.q = others.softmax(1)

    @property
    def h_o(self) -> Tensor:
        """The entropy of the other tokens."""
        return self.lse_other - (self.q * self.z).sum(1)

    def masses(self, tile: int) -> Tensor:
        """Softmax mass over the other tokens of each `tile` columns."""
        return F.pad(self.q, (0, -self.q.shape[1] % tile)).view(len(self.q), -1, tile).sum(-1)

    def gradient(self, *of: tuple[Tensor, Tensor]) -> Tensor:
        """Of the raw products, for upstream gradients of some of the rest."""
        return torch.autograd.grad([x for x, _ in of], self.raw, [g.double() for _, g in of])[0]

    def token_loss(self, loss: str, weight: Tensor, ref_lam: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token, and what has its gradient."""
        weight, ref_lam, lam = weight.double(), ref_lam.double(), self.z_y - self.lse_other
        log_p, log_not_p = F.logsigmoid(lam), F.logsigmoid(-lam)
        if loss == "nll":
            return -weight * log_p, -weight * log_p
        if loss == "unlikelihood":
            value = torch.where(weight > 0, -weight * log_p, weight * log_not_p)
            return value, value
        f = torch.exp((log_p - F.logsigmoid(ref_lam)).clamp(max=0))
        value = -weight * (f * log_p + (1 - f) * (log_not_p - self.h_o))
        return value, -weight * torch.exp((lam - ref_lam).clamp(max=0)).detach() * log_p


class Chunk(ABC):
    """C rows, and what a kernel is given beside logits or operands. Each is made when it is first asked for."""

    def __init__(self, head: Head, rows: int, settings: Settings):
        self.name, _, self.width, self.vocab, self.softcap = head
        self.rows, self.settings, self.dtype_name = rows, settings, settings.dtype or "bf16"
        self.dtype, self.device = DTYPES[self.dtype_name], torch.device(settings.device)
        self.epilogue = Epilogue(None, self.softcap, 1.0)

    def key(self, kernel: str, implementation: str) -> str:
        """Of a row."""
        title = self.name if self.softcap is None else f"{self.name}, soft-cap {self.softcap:g}"
        shape = Shape(self.rows, self.width, self.vocab)
        return f"{title} | {shape} | {self.dtype_name} | {kernel} | {implementation}"

    @cached_property
    def random(self) -> torch.Generator:
        """For the row kernels' inputs."""
        return torch.Generator(self.device).manual_seed(0)

    @cached_property
    def y(self) -> Tensor:
        """The targets."""
        return torch.randint(self.vocab, (self.rows,), generator=self.random, device=self.device)

    @cached_property
    def weight(self) -> Tensor:
        """Factor of each token's loss: every other one is rejected."""
        return 1.0 - 2 * (torch.arange(self.rows, device=self.device) % 2)

    @cached_property
    def scores(self) -> Statistics:
        """The true statistics, in float32."""
        made = torch.empty(2, self.rows, device=self.device)
        for part in self.parts():
            true = self.exact(part)
            made[:, part] = torch.stack([true.z_y, true.lse_other]).detach().float()
        return Statistics(made[0], made[1], None)

    @cached_property
    def ref(self) -> tuple[Tensor, Tensor]:
        """(log p, log-odds) of a reference that is a little better or worse."""
        noise = torch.randn(self.rows, generator=self.random, device=self.device)
        lam = self.scores.z_y - self.scores.lse_other + 0.3 * noise
        return F.logsigmoid(lam), lam

    @cached_property
    def upstream(self) -> Upstream:
        """Coefficients near ±1."""
        factor = 0.5 + torch.rand(self.rows, generator=self.random, device=self.device)
        return Upstream(-factor * self.weight, self.weight)

    def parts(self) -> Iterator[slice]:
        """The rows in blocks that float64 has room for."""
        return spans(self.rows, EXACT_ROWS)

    def exact(self, part: slice) -> Exact:
        """Some rows in float64."""
        return Exact(self.raw(part), self.y[part], self.softcap)

    @abstractmethod
    def raw(self, part: slice) -> Tensor:
        """Raw products in float64."""

    def room(self, impl: str) -> int:
        """Length of a row of a buffer, as the engines have it."""
        return -(-self.vocab // 16) * 16 if impl == "triton" else self.vocab

    def buffer(self, impl: str, dtype: torch.dtype) -> Tensor:
        """[C, V] whose rows are `room` long, and 0 there: 16-bit results of that lie on bytes of logits."""
        return torch.zeros(self.rows, self.room(impl), dtype=dtype, device=self.device)[:, : self.vocab]


class Logits(Chunk):
    """What the row kernels are given: raw products with standard deviation 2, in float32."""

    @cached_property
    def z(self) -> Tensor:
        """To be copied before a kernel changes it."""
        made = torch.empty(self.rows, self.vocab, device=self.device)
        return made.normal_(0, 2, generator=self.random)

    def raw(self, part: slice) -> Tensor:
        return self.z[part].double()

    def filled(self, impl: str) -> Tensor:
        """A buffer with the logits."""
        return self.buffer(impl, torch.float32).copy_(self.z)


class Operands(Chunk):
    """What the tile kernels and the library's product are given."""

    @cached_property
    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """x [C, H], w [V, H], y [C], those of `rgpb tune`."""
        return tune._inputs(Shape(self.rows, self.width, self.vocab), self.dtype, self.device)

    @cached_property
    def y(self) -> Tensor:
        return self.made[2]

    def raw(self, part: slice) -> Tensor:
        x, w, _ = self.made
        return x[part].double() @ w.double().T

    @cached_property
    def product(self) -> Kernel:
        """The library's product with float32 results."""
        impl = "cpp" if self.device.type == "cpu" and cpp_rows.missing() is None else "torch"
        x, w = (t.to(gemm_dtype(self.device.type, self.dtype, self.dtype, impl)) for t in self.made[:2])
        z = self.buffer("torch", torch.float32)

        def run() -> Tensor:
            mm(x, w.t(), z)
            return z

        return Kernel(
            run,
            lambda made, part: [(made[part], self.raw(part))],
            moved=x.nbytes + w.nbytes + z.nbytes,
            predicted=lambda rates: self.flops / rates.library,
            flops=self.flops,
        )

    @property
    def flops(self) -> int:
        """Of one product."""
        return 2 * self.rows * self.width * self.vocab


class Kernel(NamedTuple):
    """A kernel on buffers that exist.

    Attributes:
        run: one call.
        pairs: what it made and what is true, for some rows: vectors [C] and matrices [C, V] or [C, T].
        moved: bytes read and written, at the least.
        predicted: seconds from the rates that plans are made with; nothing is assumed to overlap.
        flops: of its matrix product.
        rounded: the type of the matrices that it makes.
        buffer: float32, of a kernel that works in place.
        config: the configuration, as text.
    """

    run: Callable[[], Any]
    pairs: Callable[[Any, slice], list[tuple[Tensor, Tensor]]]
    moved: int
    predicted: Callable[[Rates], float]
    flops: int | None = None
    rounded: torch.dtype = torch.float32
    buffer: Tensor | None = None
    config: str | None = None


# -- row kernels -------------------------------------------------------------------------------------------------------


def implementations(device: str) -> tuple[str, ...]:
    """Of the row kernels: those made for the device, and Triton's where they are interpreted."""
    if device == "cuda":
        return ("triton",)
    return ("cpp", "torch", *(["triton"] if why_not("triton", torch.device(device)) is None else []))


def row_kernels(impl: str, dtype: str) -> dict[str, Callable[[Logits], Kernel]]:
    """What an implementation has, by name; `dtype` is that of the operands, and so of what is written for products."""
    found: dict[str, Callable[[Logits], Kernel]] = {
        "statistics": partial(statistics, impl),
        "statistics, entropy": partial(statistics, impl, entropy=True),
        "statistics, masses": partial(statistics, impl, tile=MASS_TILE),
    }
    if impl != "triton":  # whose weights are the tile kernel's
        found[f"statistics, weights to {dtype}"] = partial(weights, impl)
    for out in dict.fromkeys((dtype, "fp32")):
        found[f"gradients to {out}"] = partial(gradients, impl, DTYPES[out])
    if impl != "torch":  # which takes a token-wise loss in three steps
        for loss in TOKEN_LOSSES:
            found[f"token_loss {loss} to {dtype}"] = partial(token_loss, impl, loss)
    if impl != "cpp":  # which leaves the target to torch's
        found["target"] = partial(target, impl)
    return found


def module_of(impl: str) -> Any:
    """The module of the row kernels."""
    return import_module(f"rgpb.kernels.{impl}_rows")


def row_config(impl: str, device: torch.device) -> str | None:
    """The configuration of the row kernels, or the instruction set."""
    if impl == "triton":
        return tune._text(import_module("rgpb.kernels.configs").rows(device))
    return cpp_rows.describe() if impl == "cpp" else None


def narrow(z_CV: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Results over the first half of each row's bytes; None for float32, which are in place."""
    return None if dtype == torch.float32 else z_CV.view(dtype)[:, : z_CV.shape[1]]


def row_kernel(chunk: Logits, impl: str, moved: int, run: Any, pairs: Any, **more: Any) -> Kernel:
    """A kernel without products."""
    config = more.pop("config", row_config(impl, chunk.device))
    return Kernel(run, pairs, moved, lambda rates: moved / rates.copy, config=config, **more)


def statistics(impl: str, chunk: Logits, entropy: bool = False, tile: int | None = None) -> Kernel:
    """z_y, lse_other, H_o; and masses, with the pass over these. Torch's leaves weights in place of the logits."""
    module, z, y, epilogue = module_of(impl), chunk.filled(impl), chunk.y, chunk.epilogue
    masses = z.new_empty(chunk.rows, -(-chunk.vocab // tile)) if tile is not None else None

    def run() -> tuple[Statistics, Tensor | None]:
        if impl == "torch":
            return module.statistics_(z, y, epilogue, entropy, None, masses, tile or 0, False)[0], masses
        return module.statistics(z, y, epilogue, entropy, tile, chunk.room(impl))

    def pairs(made: tuple[Statistics, Tensor | None], part: slice) -> list[tuple[Tensor, Tensor]]:
        scores, true = made[0].at(part), chunk.exact(part)
        found = [(scores.z_y, true.z_y), (scores.lse_other, true.lse_other)]
        found += [] if scores.h_o is None else [(scores.h_o, true.h_o)]
        return found + ([] if made[1] is None or tile is None else [(made[1][part], true.masses(tile))])

    moved = z.nbytes + (0 if masses is None else masses.nbytes)
    more = {"config": f"block_vocab={tile}"} if impl == "triton" and tile is not None else {}
    return row_kernel(chunk, impl, moved, run, pairs, buffer=z if impl == "torch" else None, **more)


def weights(impl: str, chunk: Logits) -> Kernel:
    """Statistics, and the weights that the gradients of a single sweep are made of."""
    module, z = module_of(impl), chunk.filled(impl)
    out = narrow(z, chunk.dtype)
    e = z if out is None else out

    def run() -> tuple[Statistics, Tensor]:
        return module.statistics_(z, chunk.y, chunk.epilogue, False, out, None, 0, True)

    def pairs(made: tuple[Statistics, Tensor], part: slice) -> list[tuple[Tensor, Tensor]]:
        scores, total, true = made[0].at(part), made[1][part], chunk.exact(part)
        q = true.gradient((true.lse_other, torch.ones_like(true.lse_other)))
        return [
            (scores.z_y, true.z_y), (scores.lse_other, true.lse_other), (e[part].double() / total[:, None], q)
        ]  # fmt: skip

    return row_kernel(chunk, impl, z.nbytes + e.nbytes, run, pairs, rounded=e.dtype, buffer=z)


def gradients(impl: str, dtype: torch.dtype, chunk: Logits) -> Kernel:
    """dlogits from known statistics, in place or narrower over the same bytes."""
    module, z, scores, upstream = module_of(impl), chunk.filled(impl), chunk.scores, chunk.upstream
    out = narrow(z, dtype)

    def run() -> tuple[Tensor, Tensor | None]:
        return module.gradients_(z, chunk.y, scores, upstream, chunk.epilogue, out, chunk.room(impl))

    def pairs(made: tuple[Tensor, Tensor | None], part: slice) -> list[tuple[Tensor, Tensor]]:
        return [dlogits(made, chunk, part)]

    moved = z.nbytes + (z if out is None else out).nbytes
    return row_kernel(chunk, impl, moved, run, pairs, rounded=dtype, buffer=z)


def dlogits(made: tuple[Tensor, Tensor | None], chunk: Chunk, part: slice) -> tuple[Tensor, Tensor]:
    """Some rows of D = diag(r) E, and what they should be."""
    (e, r), true, g = made, chunk.exact(part), chunk.upstream.at(part)
    d = e[part].double() if r is None else e[part].double() * r[part, None]
    return d, true.gradient((true.z_y, g.g_zy), (true.lse_other, g.g_lo))


def token_loss(impl: str, loss: str, chunk: Logits) -> Kernel:
    """Statistics, a token-wise loss and its dlogits."""
    module, z, weight, ref = module_of(impl), chunk.filled(impl), chunk.weight, chunk.ref
    out, entropy = narrow(z, chunk.dtype), loss == "bnf"
    given = ref if loss == "bnf" else None

    def run() -> tuple[Statistics, Tensor, Tensor]:
        return module.token_loss_(
            z, chunk.y, loss, weight, given, chunk.epilogue, entropy, out, chunk.room(impl)
        )  # fmt: skip

    def pairs(made: tuple[Statistics, Tensor, Tensor], part: slice) -> list[tuple[Tensor, Tensor]]:
        scores, true = made[0].at(part), chunk.exact(part)
        value, objective = true.token_loss(loss, weight[part], ref[1][part])
        d = true.gradient((objective, torch.ones_like(objective)))
        return [
            (scores.z_y, true.z_y), (scores.lse_other, true.lse_other), (made[1][part], value), (made[2][part], d)
        ]  # fmt: skip

    # a row stays in a core's own cache between the sweeps, but not in a multiprocessor's
    moved = z.nbytes * (2 if impl == "triton" else 1) + (z if out is None else out).nbytes
    return row_kernel(chunk, impl, moved, run, pairs, rounded=chunk.dtype, buffer=z)


def target(impl: str, chunk: Logits) -> Kernel:
    """The target's entry of weights, which hold anything here."""
    module, y, weight = module_of(impl), chunk.y, chunk.weight
    e = chunk.buffer(impl, chunk.dtype).copy_(chunk.z)
    total = 1 + torch.rand(chunk.rows, generator=chunk.random, device=chunk.device)
    given = (weight / total, -weight, *([total] if impl == "triton" else []))

    def run() -> Tensor:
        return module.with_target_(e, y, *given)

    def pairs(made: Tensor, part: slice) -> list[tuple[Tensor, Tensor]]:
        true = chunk.z[part].to(e.dtype).double().scatter(1, y[part, None], -total[part, None].double())
        return [(made[part], weight[part].double() / total[part]), (e[part], true)]

    moved = chunk.rows * (8 + 4 * 4 + e.itemsize)  # the target; r, ∂L/∂z_y, Σ E and the factor; its entry
    return row_kernel(chunk, impl, moved, run, pairs, rounded=e.dtype)


# -- tile kernels ------------------------------------------------------------------------------------------------------


def tile_kernels() -> dict[str, Callable[[Operands], Kernel]]:
    """By the names that their configurations have, and what folds their partial statistics."""
    return {
        "score": score, "weights": partial(score, keep=True), "gradients": tile_gradients, "merge": merge,
    }  # fmt: skip


def tile_kernel(chunk: Operands, config: Any, written: list[Tensor], e: Tensor | None, run: Any, pairs: Any) -> Kernel:
    """A kernel with a product: operands are read once, by our count, and E is what a plan counts beside the product."""
    x, w, _ = chunk.made
    stored = 0 if e is None else e.nbytes
    return Kernel(
        run,
        pairs,
        moved=x.nbytes + w.nbytes + stored + sum(t.nbytes for t in written),
        predicted=lambda rates: chunk.flops / rates.tile + stored / rates.copy,
        flops=chunk.flops,
        rounded=chunk.dtype,
        config=tune._text(config),
    )


def score(chunk: Operands, keep: bool = False) -> Kernel:
    """Partial statistics; `keep`: relative to a shift, and the weights."""
    from rgpb.kernels import configs, triton_tiles

    (x, w, y), rows = chunk.made, chunk.rows
    config = configs.tile("weights" if keep else "score", x.device, x.dtype)
    shift = chunk.scores.lse_other if keep else None
    partials = triton_tiles.Partials.empty(x, -(-chunk.vocab // config.vocab), rows, torch.float32, not keep, False)
    e, z_y = chunk.buffer("triton", x.dtype) if keep else None, torch.empty_like(partials.total[0])

    def run() -> None:
        triton_tiles.score(x, w, y, chunk.epilogue, z_y, partials, shift, e, chunk.room("triton"))

    def pairs(made: None, part: slice) -> list[tuple[Tensor, Tensor]]:
        true, total = chunk.exact(part), partials.total[:, part].double()
        top = total.new_zeros(()) if partials.top is None else partials.top[:, part].double()
        lse_other = (top + total.log()).logsumexp(0)
        if e is None or shift is None:
            return [(z_y[part], true.z_y), (lse_other, true.lse_other)]
        relative = torch.exp(true.lse_other.detach() - shift[part])
        return [
            (z_y[part], true.z_y), (lse_other + shift[part], true.lse_other),
            (e[part], true.gradient((true.lse_other, relative))),
        ]  # fmt: skip

    return tile_kernel(chunk, config, [x for x in partials if x is not None], e, run, pairs)


def tile_gradients(chunk: Operands) -> Kernel:
    """dlogits from known statistics."""
    from rgpb.kernels import configs, triton_tiles

    (x, w, y), scores, upstream = chunk.made, chunk.scores, chunk.upstream
    config, e = configs.tile("gradients", x.device, x.dtype), chunk.buffer("triton", x.dtype)

    def run() -> tuple[Tensor, Tensor | None]:
        return e, triton_tiles.gradients(x, w, y, scores, upstream, chunk.epilogue, e, chunk.room("triton"))

    def pairs(made: tuple[Tensor, Tensor | None], part: slice) -> list[tuple[Tensor, Tensor]]:
        return [dlogits(made, chunk, part)]

    return tile_kernel(chunk, config, [], e, run, pairs)


def merge(chunk: Operands) -> Kernel:
    """Partial statistics of all tiles → lse_other; random ones, as many as the score kernel leaves."""
    from rgpb.kernels import configs, triton_tiles

    tiles = -(-chunk.vocab // configs.tile("score", chunk.device, chunk.dtype).vocab)
    top, total = (
        torch.rand(tiles, chunk.rows, generator=chunk.random, device=chunk.device).add_(x) for x in (8.0, 0.5)
    )
    partials = triton_tiles.Partials(top, total, None)

    def pairs(made: tuple[Tensor, Tensor | None, Tensor], part: slice) -> list[tuple[Tensor, Tensor]]:
        true = (top[:, part].double() + total[:, part].double().log()).logsumexp(0)
        return [(made[0][part], true), (made[2][part].double().log(), true - top[:, part].amax(0).double())]

    moved = top.nbytes + total.nbytes + 2 * 4 * chunk.rows
    return Kernel(
        lambda: triton_tiles.merge(partials, None, False), pairs, moved, lambda rates: moved / rates.copy
    )  # fmt: skip


# -- rows of kernels ---------------------------------------------------------------------------------------------------


def kernels(settings: Settings) -> Iterator[Task]:
    """A row for each kernel; N of a shape in place of these is C of all."""
    head: Head = settings.shapes[0] if settings.shapes else HEADS[settings.device]
    some = implementations(settings.device)
    for rows in (head[1],) if settings.shapes else ROWS[settings.device]:
        logits = Logits(head, rows, settings)
        for impl in some:
            for name, make in row_kernels(impl, logits.dtype_name).items():
                yield Task(logits.key(name, impl), partial(kernel_row, logits, name, impl, make))
        del logits
        release(settings.device)
    operands = Operands(head, head[1] if settings.shapes else TILE_ROWS[settings.device], settings)
    name = "product to fp32"
    yield Task(operands.key(name, "library"), partial(kernel_row, operands, name, "library", lambda x: x.product))
    for name, make_tiles in tile_kernels().items() if "triton" in some else ():
        name = f"tiles: {name}"
        yield Task(operands.key(name, "triton"), partial(kernel_row, operands, name, "triton", make_tiles))


def kernel_row(chunk: Any, name: str, implementation: str, make: Callable[[Any], Kernel]) -> dict[str, Any]:
    """One kernel: checked, and if it passed timed.

    value_error: the largest of statistics and losses, over 1 + their size; entry_error: of entries of a matrix, over
    their size and the mean size in their row. rate: of bytes; shares: medians of the rounds' ratios.
    """
    row: dict[str, Any] = {
        "kernel": name, "implementation": implementation, "case": chunk.name, "softcap": chunk.softcap,
        "rows": chunk.rows, "width": chunk.width, "vocab": chunk.vocab, "dtype": chunk.dtype_name, "status": "ok",
        "config": None, "value_error": None, "entry_error": None, "bytes": None, "flops": None, "seconds": None,
        "seconds_20": None, "seconds_80": None, "predicted_seconds": None, "rate": None, "copy_rate": None,
        "share_of_copy": None, "flop_rate": None, "product_rate": None, "share_of_product": None, "calls": None,
        "rounds": None,
    }  # fmt: skip
    try:
        if implementation != "library":
            resolve_impl(implementation, chunk.device)
        kernel = make(chunk)
        arch = architecture(chunk.device)
        row |= {"config": kernel.config, "bytes": kernel.moved, "flops": kernel.flops}
        if arch is not None and (kernel.flops is None or chunk.dtype.itemsize == 2):  # the rates are of 16-bit products
            row["predicted_seconds"] = kernel.predicted(RATES[arch])
        row["value_error"], row["entry_error"] = errors(chunk, kernel)
        value, entry = TOLERANCE["fused", torch.float32][0], TOLERANCE["fused", kernel.rounded][1]
        limits = (("value_error", value), ("entry_error", entry))
        if not all(row[error] is None or row[error] <= most for error, most in limits):  # a NaN fails, too
            return row | {"status": "FAILED"}
        return row | times(chunk, kernel)
    except Exception as error:
        status = explain(error)
    return row | {"status": status}


def errors(chunk: Chunk, kernel: Kernel) -> tuple[float | None, float | None]:
    """The largest errors of vectors and of matrices, NaN where one is; None where there are none of these."""
    made = kernel.run()
    worst: dict[int, Tensor] = {}
    for part in chunk.parts():
        for found, true in kernel.pairs(made, part):
            true, size = true.detach(), true.detach().abs()
            scale = size + (1 if size.ndim == 1 else size.mean(1, keepdim=True))
            error = ((found.double() - true).abs() / scale).amax()
            worst[true.ndim] = torch.maximum(worst.get(true.ndim, error), error)
    value, entry = (worst[ndim].item() if ndim in worst else None for ndim in (1, 2))
    return value, entry


def times(chunk: Chunk, kernel: Kernel) -> dict[str, Any]:
    """Seconds, rates, and shares of the ceilings in the same rounds.

    Raises:
        ArithmeticError: numbers in the buffer of a kernel that works in place that could have slowed it down.
    """
    device = chunk.settings.device
    release(device)
    runs: dict[str, Callable[[], object]] = {"this": kernel.run, "copy": copy_of(kernel.moved, chunk.device)}
    if isinstance(chunk, Operands) and kernel.flops is not None and kernel.run is not chunk.product.run:
        runs["product"] = chunk.product.run
    once = {name: seconds[0] for name, seconds in interleaved(runs, 1, device).items()}
    short: dict[Any, Callable[[], object]] = {
        n: partial(repeated, runs[n], 10) for n in runs if once[n] < LEAST_SECONDS
    }
    once |= {name: seconds[0] / 10 for name, seconds in interleaved(short, 1, device).items()}  # without its own wait
    calls = {name: calls_of(seconds) for name, seconds in once.items()}
    several: dict[Any, Callable[[], object]] = {n: partial(repeated, run, calls[n]) for n, run in runs.items()}
    spent, rounds = timed(several, chunk.settings)
    each = {name: [s / calls[name] for s in seconds] for name, seconds in spent.items()}
    if kernel.buffer is not None:
        check_normal(chunk, kernel.buffer)
    found: dict[str, Any] = dict(zip(("seconds", "seconds_20", "seconds_80"), quantiles(each["this"])))
    found |= {"rate": kernel.moved / found["seconds"], "copy_rate": kernel.moved / quantiles(each["copy"])[0]}
    found |= {"share_of_copy": ratio(each["copy"], each["this"]), "calls": calls["this"], "rounds": rounds}
    if kernel.flops is not None:
        found["flop_rate"] = kernel.flops / found["seconds"]
    if kernel.flops is not None and "product" in each:
        found["product_rate"] = kernel.flops / quantiles(each["product"])[0]
        found["share_of_product"] = ratio(each["product"], each["this"])
    return found


def copy_of(moved: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes so many bytes together."""
    source = torch.randint(256, (max(moved // 2, 1),), dtype=torch.uint8, device=device)
    return partial(torch.ones_like(source).copy_, source)


def calls_of(seconds: float) -> int:
    """How many calls a timed run has."""
    return max(1, min(MOST_CALLS, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))


def repeated(run: Callable[[], object], calls: int) -> object:
    """The result of the last."""
    for _ in range(calls - 1):
        run()
    return run()


def check_normal(chunk: Chunk, buffer: Tensor) -> None:
    """Refuse a time that infinite or denormal numbers could have had a part in; a target's 0 in 16 bits, beside another
    number, is a denormal one in float32.

    Raises:
        ArithmeticError: there are some.
    """
    odd, tiny = 0, torch.finfo(buffer.dtype).tiny
    for part in chunk.parts():
        z = buffer[part]
        odd += int((~z.isfinite() | ((z != 0) & (z.abs() < tiny))).sum())
    if odd > chunk.rows:
        raise ArithmeticError(f"{odd} numbers of the buffer are infinite or denormal after runs in place")


# -- where a call's time goes ------------------------------------------------------------------------------------------

CATEGORIES = ("products", "row kernels", "tile kernels", "else", "idle")
# Our kernels by their functions' names, or as operators; the library's products as cuBLAS, CUTLASS and hipBLASLt name
# them, or as operators.
NAMES = {
    "row kernels": re.compile(r"^(statistics|gradients|token_loss|target)_kernel|^rgpb::row_"),
    "tile kernels": re.compile(r"^(tiles|merge)_kernel"),
    "products": re.compile(
        r"gemm|gemv|nvjet|cutlass|xmma|cublas|\bCijk_|^rgpb::mm_bf16$|^aten::(addmm|mm|addmv|mv|baddbmm|bmm)$",
        re.IGNORECASE,
    ),
}
# Torch's row kernels are operations that others use, too: on a CPU they are known by the function that calls them. On a
# GPU the device's own record doesn't say that; there they are in "else".
LABEL, LABELLED = "rgpb.kernels.torch_rows", ("statistics_", "gradients_", "with_target_")
OPERATORS = re.compile(r"^aten::|^rgpb::(row_|mm_bf16$|huge_pages$)")  # the others are Python and autograd around them
WAITS = re.compile(r"^(Context|Stream|Event) (Sync|Wait)")  # of the device's record: nothing runs there for them
LARGEST = 5

# (job, path): each with the smallest workspace, a single pass with the largest
PARTS = (
    (Job("bnf", "full"), "single"),
    (Job("bnf", "full"), "two_pass"),
    (Job("dpo", "full"), "two_pass"),
    (Job("bnf", "frozen"), "frozen"),
    (Job(LOG_PROB, "forward"), "forward"),
)


class Spent(NamedTuple):
    """Time of a call: (name, category, seconds) of each launch or operation, and of nothing."""

    launches: list[tuple[str, str, float]]
    idle: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.idle + sum(seconds for _, _, seconds in self.launches)

    def of(self, category: str) -> float:
        """Seconds of a category."""
        if category == "idle":
            return self.idle
        return sum(seconds for _, kind, seconds in self.launches if kind == category)

    def largest(self, category: str) -> str:
        """Who has the most of it, with their shares of the whole."""
        by_name: dict[str, float] = {}
        for name, kind, seconds in self.launches:
            if kind == category:
                by_name[name] = by_name.get(name, 0.0) + seconds
        most = sorted(by_name.items(), key=lambda item: -item[1])[:LARGEST]
        return "; ".join(f"{shortened(name)} {100 * seconds / self.seconds:.2g} %" for name, seconds in most)


class Setting:
    """The head, and its batch when it is first asked for."""

    def __init__(self, head: Head, settings: Settings):
        self.name, *sizes, self.softcap = head
        self.shape, self.settings = Shape(*sizes), settings  # type: ignore[arg-type]
        self.dtype = settings.dtype or "bf16"

    @cached_property
    def case(self) -> Case:
        """Random inputs; nobody asks for the exact answer."""
        batch = light_batch(self.shape, self.settings.device)
        hidden, weight = (x.detach().to(DTYPES[self.dtype]).requires_grad_() for x in (batch.hidden, batch.weight))
        return Case(self.name, self.shape, self.softcap, batch._replace(hidden=hidden, weight=weight))


def profiles(settings: Settings) -> Iterator[Task]:
    """A row for each call and implementation."""
    setting = Setting(settings.shapes[0] if settings.shapes else PROFILED[settings.device], settings)
    for job, path in PARTS:
        workspace = (max if path == "single" else min)(settings.workspaces)
        for name in kernels_for(settings.device):
            parts = (setting.name, setting.shape, setting.dtype, job.loss, path, name, workspace)
            yield Task(" | ".join(map(str, parts)), partial(profile_row, setting, job, path, name, workspace))


def profile_row(setting: Setting, job: Job, path: str, kernels: str, workspace: int) -> dict[str, Any]:
    """One call: seconds and shares of each category, and who has the most of what is neither kernels nor products."""
    row: dict[str, Any] = {
        "loss": job.loss, "path": path, "kernels": kernels, "workspace": workspace, "case": setting.name,
        "dtype": setting.dtype, **setting.shape._asdict(), "units": None, "status": "ok", "seconds": None,
    }  # fmt: skip
    for category in CATEGORIES:
        row |= {f"{category.replace(' ', '_')}_{what}": None for what in ("seconds", "share")}
    row |= {"launches": None, "largest": None}
    try:
        run, plan = ours(setting.case, job, path, kernels, workspace)
        row["units"] = plan.units
        if plan.path != path:
            return row | {"status": f"plan: {plan.path}"}
        made = run()
        if not all(bool(x.isfinite().all()) for x in (made.value, *made.gradients)):
            return row | {"status": "FAILED"}
        del made
        spent = profiled(run, setting.settings.device)
        for category in CATEGORIES:
            name, seconds = category.replace(" ", "_"), spent.of(category)
            row |= {f"{name}_seconds": seconds, f"{name}_share": seconds / spent.seconds}
        return row | {
            "seconds": spent.seconds, "launches": len(spent.launches), "largest": spent.largest("else"),
        }  # fmt: skip
    except Exception as error:
        status = explain(error)
    return row | {"status": status}


def profiled(run: Run, device: str) -> Spent:
    """One call, which has run before.

    Raises:
        ValueError: the profiler sees nothing of the device.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            torch.cuda.synchronize()
        return on_device(recorded.events())
    with labelled(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    return on_cpu(recorded.events(), wall)


def on_device(events: Any) -> Spent:
    """From the device's record, in which a kernel may begin before the one ahead has ended: that time is counted once.

    Raises:
        ValueError: it is empty.
    """
    seen = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type != DeviceType.CPU
        and not getattr(event, "is_user_annotation", False)
        and not WAITS.search(event.name)
    )
    if not seen:
        raise ValueError("profile: expected the device's kernels in the profiler's record, got none of them")
    launches, idle, until = [], 0.0, seen[0][0]
    for start, end, name in seen:
        idle += max(start - until, 0.0)
        launches.append((name, category_of(name), max(end - max(start, until), 0.0) / 1e6))
        until = max(until, end)
    return Spent(launches, idle / 1e6)


def on_cpu(events: Any, wall: float) -> Spent:
    """From the operations' own times; the operators run one after the other."""
    launches = []
    for event in events:
        if OPERATORS.search(event.name):
            kind = category_of(event.name)
            if kind == "else" and under_label(event):
                kind = "row kernels"
            launches.append((event.name, kind, event.self_cpu_time_total / 1e6))
    return Spent(launches, max(wall - sum(seconds for _, _, seconds in launches), 0.0))


def category_of(name: str) -> str:
    """Of a kernel or operator."""
    return next((kind for kind, pattern in NAMES.items() if pattern.search(name)), "else")


def under_label(event: Any) -> bool:
    """Whether torch's row kernels called it."""
    while event is not None and event.name != LABEL:
        event = event.cpu_parent
    return event is not None


@contextmanager
def labelled() -> Iterator[None]:
    """What torch's row kernels call stands under a name of theirs in the profiler's record."""
    functions = {name: getattr(torch_rows, name) for name in LABELLED}

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with record_function(LABEL):
                return function(*arguments, **keywords)

        return call

    for name, function in functions.items():
        setattr(torch_rows, name, named(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(torch_rows, name, function)


def shortened(name: str) -> str:
    """A kernel's name without its namespaces and the types of its arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\b(at|native|std|c10)::|^void ", "", name)
    name = re.sub(r"\(.*", "", name) if "(" in name and not name.startswith("Mem") else name
    return name if len(name) <= 80 else f"{name[:79]}…"
