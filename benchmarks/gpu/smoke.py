"""What has to be right before anything is timed: a row for each check, "ok" or "FAILED". Each part is a process of its
own in `first_run.sh`, so that what hangs or breaks the device takes no other along.

Dimensions: C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rgpb.bench import contest, doctor, tune
from rgpb.bench.contest import DTYPES, SCORES, Case, Job, Shape
from rgpb.bench.measure import release
from rgpb.kernels import configs, matmul, resolve_impl
from rgpb.kernels.types import Statistics, TokenTerms, Upstream

from .journal import Journal, Task, single
from .peers import entries

SETS = ("triton", "tiled")
# Llama's head, and a vocabulary that nothing divides
PRODUCTS = {"cuda": (Shape(1024, 4096, 128256), Shape(1000, 4096, 32003)), "cpu": (Shape(16, 8, 48), Shape(24, 8, 37))}
ROWS = {
    "cuda": tuple(Shape(2048 if V < 200_000 else 300, 64, V) for V in (32000, 32003, 50257, 128256, 256000)),
    "cpu": (Shape(2, 16, 259),),
}
TILES = {"cuda": (Shape(2000, 4096, 32003), Shape(2048, 4096, 32768)), "cpu": (Shape(20, 24, 141),)}
WHOLE = {"cuda": Shape(2048, 4096, 128256), "cpu": Shape(4, 8, 70)}
REPEATS = {"cuda": 10, "cpu": 2}
ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # ‖error‖ / ‖result‖ of a product


def dtype_of(journal: Journal) -> torch.dtype:
    """Of operands: bfloat16, on a CPU float32, whose products the interpreter has right."""
    return DTYPES[journal.settings.dtype or ("bf16" if journal.settings.device == "cuda" else "fp32")]


def checked(key: str, check: Callable[[], tuple[float, float]]) -> Task:
    """A row of what something is off, and the most that it may be."""

    def row() -> dict[str, Any]:
        off, most = check()
        return {"status": "ok" if off <= most else "FAILED", "off": off, "most": most}  # a NaN fails, too

    return single(key, row, {"check": key, "status": "ok", "off": None, "most": None})


def off(made: Tensor, truth: Tensor) -> float:
    """‖error‖ / ‖truth‖."""
    return ((made.double() - truth).norm() / truth.norm()).item()


def differing(one: Tensor, other: Tensor) -> float:
    """Entries whose bits differ."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return float((one.contiguous().view(kind) != other.contiguous().view(kind)).sum().item())


# -- products ----------------------------------------------------------------------------------------------------------


def products(journal: Journal) -> Iterator[Task]:
    """`matmul.mm` as the engine calls it, with every type of result, also added to one; eight rows against float64."""
    device, dtype = journal.settings.device, dtype_of(journal)
    for shape in PRODUCTS[device]:
        for name in ("X Wᵀ", "E W", "Eᵀ X", "Eᵀ X, 16 bits", "Eᵀ X, added", "Eᵀ 1"):
            yield checked(f"{name} | {shape}", partial(product, name, shape, dtype, device))
        release(device)


def product(name: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """What one of them is off. Rows of [C, V] buffers lie apart, as the engine's do."""
    C, H, V = shape
    random = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(n, H, generator=random, device=device).to(dtype) for n in (C, V))
    buffer = torch.full((C, -(-V // 16) * 16), torch.nan, device=device)[:, :V]
    e = buffer if dtype == torch.float32 else buffer.view(dtype)[:, :V]
    e.copy_(torch.rand(C, V, generator=random, device=device))
    if name == "X Wᵀ":
        matmul.mm(x, w.t(), buffer.fill_(torch.nan))
        return off(buffer[:8], x[:8].double() @ w.double().t()), ROUNDED[torch.float32]
    if name == "E W":
        dx = torch.full((C, H), torch.nan, dtype=dtype, device=device)
        matmul.mm(e, w, dx)
        return off(dx[:8], e[:8].double() @ w.double()), ROUNDED[dtype]
    out = torch.full((V, H), torch.nan, dtype=dtype if name == "Eᵀ X, 16 bits" else torch.float32, device=device)
    if name == "Eᵀ 1":
        x, out = torch.ones(C, 1, dtype=dtype, device=device), out[:, :1].contiguous()
    truth = e[:, :8].double().t() @ x.double()
    if name == "Eᵀ X, added":
        out.fill_(1)
        truth += 1
    matmul.mm(e.t(), x, out, accumulate=name == "Eᵀ X, added")
    return off(out[:8], truth), ROUNDED[out.dtype]


# -- kernels -----------------------------------------------------------------------------------------------------------


def rows(journal: Journal) -> Iterator[Task]:
    """Each row kernel against torch; and narrow results over the logits' own bytes, bit by bit those beside them."""
    device = journal.settings.device
    resolve_impl("triton", torch.device(device))
    for shape in ROWS[device]:
        given = tune.Inputs(shape, torch.bfloat16, torch.device(device))
        for name in [name for name in tune.KERNELS if name.startswith("rows")]:
            yield checked(f"{name} | {shape}", partial(kernel_error, given, name, None))
        for loss in ("gradients", "nll", "unlikelihood", "bnf"):
            yield checked(f"narrow {loss} | {shape}", partial(narrow, given, loss, REPEATS[device]))
        del given
        release(device)


def tiles(journal: Journal) -> Iterator[Task]:
    """Each tile kernel in each configuration against torch; and twice the same bits."""
    device = journal.settings.device
    arch = configs.arch(torch.device(device))
    for shape in TILES[device]:
        given = tune.Inputs(shape, dtype_of(journal), torch.device(device))
        for job in [name for name in tune.KERNELS if name in configs.TILES[arch]]:
            for config in configs.TILES[arch][job]:
                text = " ".join(map(str, config))
                yield checked(f"{job} | {text} | {shape}", partial(kernel_error, given, job, config))
                yield checked(f"{job} twice | {text} | {shape}", partial(twice, given, job, config))
        del given
        release(device)


def kernel_error(given: tune.Inputs, name: str, config: Any) -> tuple[float, float]:
    """As `rgpb tune` has it."""
    return tune.error_of(tune.KERNELS[name](given), config), tune.TOLERANCE[given.dtype]


def twice(given: tune.Inputs, name: str, config: Any) -> tuple[float, float]:
    """Bits that differ between two launches."""
    kernel = tune.KERNELS[name](given)
    results = (kernel.run(config) for _ in range(2))
    first, again = ([x.clone() for x in ((made,) if isinstance(made, Tensor) else made)] for made in results)
    return max(differing(*both) for both in zip(first, again)), 0.0


def narrow(given: tune.Inputs, loss: str, repeats: int) -> tuple[float, float]:
    """Bits that differ between 16-bit results over the first half of each row's bytes, and elsewhere; of a token-wise
    loss, which sweeps another way elsewhere, from one launch to the next."""
    from rgpb.kernels import triton_rows

    def run(z: Tensor, out: Tensor) -> Tensor:
        if loss == "gradients":
            scores = Statistics(given.z_y, given.lse_other, None)
            upstream = Upstream(-given.one, given.one)
            return triton_rows.gradients_(z, given.y, scores, upstream, tune.PLAIN, out, given.room)[0]
        ref = (-given.one, given.one) if loss == "bnf" else None
        return triton_rows.token_loss_(
            z, given.y, TokenTerms(loss, given.one, ref, loss == "bnf"), tune.PLAIN, out, given.room
        )[2]

    def over() -> Tensor:
        z = given.buffer(torch.float32).copy_(given.z)
        return run(z, z.view(given.dtype)[:, : z.shape[1]])

    expected = run(given.z, given.buffer(given.dtype)) if loss == "gradients" else over()
    return max(differing(over(), expected) for _ in range(repeats)), 0.0


# -- whole calls -------------------------------------------------------------------------------------------------------


def whole(journal: Journal) -> Iterator[Task]:
    """`rgpb doctor`'s checks; the losses on Llama's head against float64; and twice the same bits."""
    device, dtype = journal.settings.device, "bf16" if dtype_of(journal) == torch.bfloat16 else "fp32"
    for impl in SETS:
        yield checked(f"doctor | {impl} | {dtype}", partial(diagnosed, device, impl, dtype))
    case = Case(WHOLE[device], dtype, device, name="smoke")
    for loss in ("bnf", "dpo", SCORES):
        for one in entries(Job(loss, "full"), journal.settings.workspaces, "cuda"):
            if one.kernels in SETS:
                key = f"{loss} | {one.path} | {one.kernels} | {one.workspace}"
                yield single(key, partial(called, case, Job(loss, "full"), one))


def diagnosed(device: str, impl: str, dtype: str) -> tuple[float, float]:
    """The worst of a check's errors in units of what it may be."""
    check = doctor.self_check(torch.device(device), impl, dtype)
    if check.status not in ("ok", "FAILED"):
        raise RuntimeError(check.status)
    return float(check.status != "ok"), 0.0


def called(case: Case, job: Job, one: contest.Contestant) -> dict[str, Any]:
    """A contestant's row, with "FAILED" where a second call gives other bits."""
    ready = contest.prepared(case, job, one)
    if ready.run is None:
        return ready.row._asdict()
    first, second = ready.run(), ready.run()
    pairs = zip((first.value, *first.gradients), (second.value, *second.gradients))
    same = all(torch.equal(a, b) for a, b in pairs)
    return ready.row._asdict() | ({} if same else {"status": "FAILED: other bits in a second call"})
