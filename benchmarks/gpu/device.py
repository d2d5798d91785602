"""The parts beside the heads: what the device can do, the longest batch that fits, tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rgpb.bench import cases
from rgpb.bench.cases import Batch, Shape
from rgpb.bench.measure import quantiles
from rgpb.fused import fused_loss

from .heads import timed
from .journal import ABSENT, Settings, Task, explain, installed, release, say
from .lineup import Case, Job, graded, kernels_for, keywords, naive, plan_of

# Bytes of a copied buffer, and n of the n × n × n products; on a CPU as much as shows that it runs.
SIZES = {"cuda": (2 * 2**30, 8192), "cpu": (2**20, 256)}
LLAMA = ("Llama-3-8B", 8192, 4096, 128256, None)


# -- ceilings ----------------------------------------------------------------------------------------------------------


def ceilings(settings: Settings) -> Iterator[Task]:
    """Copy bandwidth and the rates of the products that the library is made of."""
    yield Task("copy", partial(copy_row, settings))
    for name, dtype, out in (
        ("bf16", torch.bfloat16, None),
        ("bf16, float32 output", torch.bfloat16, torch.float32),
        ("fp16, float32 output", torch.float16, torch.float32),
        ("fp32", torch.float32, None),
    ):
        yield Task(f"product, {name}", partial(product_row, settings, name, dtype, out))


def ceiling(what: str, size: int, settings: Settings, amount: float, run: Callable[[], object]) -> dict[str, Any]:
    """A row with `amount` per second."""
    times, rounds = timed({what: run}, settings)
    median, low, high = quantiles(times[what])
    seconds = {"seconds": median, "seconds_20": low, "seconds_80": high}
    return {"what": what, "size": size, "status": "ok", "rate": amount / median, **seconds, "rounds": rounds}


def copy_row(settings: Settings) -> dict[str, Any]:
    """Bytes read and written per second by a copy on the device."""
    size = SIZES[settings.device][0]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    copy = torch.empty_like(source)
    copy.copy_(source)
    if not torch.equal(copy, source):
        return {"what": "copy, bytes/s", "size": size, "status": "FAILED", "rate": None}
    return ceiling("copy, bytes/s", size, settings, 2.0 * size, lambda: copy.copy_(source))


def product_row(settings: Settings, name: str, dtype: torch.dtype, out: torch.dtype | None) -> dict[str, Any]:
    """Flops per second of n × n × n on random data; a few rows are compared with float64 first."""
    n, what = SIZES[settings.device][1], f"product {name}, flop/s"
    a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    more: dict[str, Any] = {} if out is None else {"out_dtype": out}
    try:
        made = torch.mm(a, b, **more)
        true = a[:16].double() @ b.double()
        off = ((made[:16].double() - true).norm() / true.norm()).item()
        if not off <= (1e-5 if made.dtype == torch.float32 else 1e-2):
            return {"what": what, "size": n, "status": "FAILED", "rate": None}
        row = ceiling(what, n, settings, 2.0 * n**3, lambda: torch.mm(a, b, **more))
    except Exception as error:
        # a product with another type of output has no CPU form
        refused = isinstance(error, NotImplementedError | RuntimeError) and settings.device == "cpu"
        status = f"refused: {' '.join(str(error).split())[:200]}" if refused else explain(error)
        return {"what": what, "size": n, "status": status, "rate": None}
    return row


# -- the longest batch -------------------------------------------------------------------------------------------------

STEP = 256  # tokens: pairs of responses of 128


def longest(settings: Settings) -> Iterator[Task]:
    """The most tokens that BNF with full gradients can take at once, for naive PyTorch and for the library."""
    name, _, width, vocab, softcap = settings.shapes[0] if settings.shapes else LLAMA
    head = (name, width, vocab, softcap)
    yield Task(f"{head} | naive", partial(longest_row, settings, head, None, None))
    for kernels in kernels_for(settings.device):
        for workspace in settings.workspaces:
            yield Task(
                f"{head} | fused | {kernels} | {workspace}", partial(longest_row, settings, head, kernels, workspace)
            )


def longest_row(
    settings: Settings, head: tuple[str, int, int, float | None], kernels: str | None, workspace: int | None
) -> dict[str, Any]:
    """The largest N found, to within an eighth; `capped` where the search ended before memory did."""
    name, width, vocab, softcap = head
    row: dict[str, Any] = {
        "case": name, "width": width, "vocab": vocab, "loss": "bnf", "impl": "naive" if kernels is None else "fused",
        "kernels": kernels, "workspace": workspace, "status": "ok", "tokens": None, "capped": None, "path": None,
        "tries": {},
    }  # fmt: skip

    def fits(tokens: int) -> bool:
        try:
            row["path"] = once(settings, Shape(tokens, width, vocab), softcap, kernels, workspace)
            status = "ok"
        except Exception as error:
            status = explain(error)
        release(settings.device)
        row["tries"][str(tokens)] = status
        say(f"longest: {row['impl']} {kernels or ''} N = {tokens}: {status}")
        if status not in ("ok", "out of memory"):
            raise RuntimeError(status)
        return status == "ok"

    try:
        tokens = search(fits, settings.cap)
    except RuntimeError as error:
        return row | {"status": str(error)}
    return row | {"tokens": tokens, "capped": tokens is not None and 2 * tokens > settings.cap}


def search(fits: Callable[[int], bool], cap: int, start: int = 4096) -> int | None:
    """The largest N that fits, doubling from `start` while it does, then bisecting to within an eighth; at most `cap`.

    None if not even 2 tokens fit.
    """
    most, too_many, tokens = 0, None, min(start, cap)
    while tokens <= cap and not (most and too_many):
        if fits(tokens):
            most, tokens = tokens, 2 * tokens
        else:
            too_many = tokens
            if tokens <= 2:
                break
            tokens = max(2, tokens // 4 * 2)
    while too_many is not None and most and too_many - most > max(most // 8, 2):
        step = STEP if too_many - most > 2 * STEP else 2
        middle = (most + too_many) // 2 // step * step
        if fits(middle):
            most = middle
        else:
            too_many = middle
    return most or None


def once(settings: Settings, shape: Shape, softcap: float | None, kernels: str | None, workspace: int | None) -> str:
    """One forward and backward at this size; the path that was taken. Inputs and all are gone afterwards."""
    case = Case("longest", shape, softcap, light_batch(shape, settings.device))
    job = Job("bnf", "full")
    if kernels is None:
        naive(case, job)[0]()
        path = "full"
    else:
        hidden, weight = case.inputs("full")
        head, how = cases.LMHead(weight, softcap=softcap), keywords(kernels)
        more: dict[str, Any] = {} if workspace is None else {"workspace": workspace}
        path = plan_of(hidden, head, case.batch.target, "bnf", "mean", workspace or 512 * 2**20, how).path
        label, ref = case.batch.label, case.batch.ref
        value = fused_loss(hidden, head, case.batch.target, objective="bnf", label=label, ref=ref, **more, **how)
        made = graded(value, hidden, weight)
        if not bool(made.value.isfinite()):
            raise ArithmeticError(f"loss {made.value.item()}")
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return path


def light_batch(shape: Shape, device: str) -> Batch:
    """Random inputs in bfloat16 without exact log-probabilities, made without larger temporaries."""
    tokens, width, vocab = shape
    length = max(t for t in range(1, cases.LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)
    random = torch.Generator(device).manual_seed(0)
    more: dict[str, Any] = {"generator": random, "device": device}
    hidden = torch.randn(tokens // length, length, width, dtype=torch.bfloat16, **more)
    weight = torch.randn(vocab, width, dtype=torch.bfloat16, **more).mul_(2 / width**0.5)
    target = torch.randint(vocab, hidden.shape[:2], **more)
    ref = -20 * torch.rand(hidden.shape[:2], **more) - 1e-3
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(
        hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, ref.new_zeros(0, 2), ref.new_zeros(0)
    )


# -- tuning ------------------------------------------------------------------------------------------------------------


def tune(settings: Settings) -> Iterator[Task]:
    """The sweep of the kernels' configurations, as one row that holds its rows."""
    yield Task("sweep", partial(tune_row, settings))


def tune_row(settings: Settings) -> dict[str, Any]:
    """`rgpb.bench.tune.sweep` on this device."""
    if not installed("rgpb.bench.tune"):
        return {"status": f"{ABSENT}rgpb.bench.tune", "rows": []}
    try:
        from rgpb.bench.tune import sweep

        return {"status": "ok", "rows": [plain(row) for row in sweep(settings.device, progress=say)]}
    except Exception as error:
        return {"status": explain(error), "rows": []}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with text for what JSON doesn't know."""
    known = (str, int, float, bool, type(None))
    return {str(name): value if isinstance(value, known) else str(value) for name, value in row.items()}


def tune_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of the sweep, or why there are none."""
    return {"table": [one for row in rows for one in row["rows"] or [{"status": row["status"]}]]}
