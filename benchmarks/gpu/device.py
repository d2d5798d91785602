"""The parts beside the heads: what the device can do, the longest batch that fits, certified skipping, tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rgpb import reference
from rgpb.bench import cases
from rgpb.bench.cases import TOLERANCE, Batch, Result, Shape
from rgpb.bench.measure import quantiles
from rgpb.fused import fused_loss
from rgpb.objectives import OBJECTIVES

from .heads import ratio, timed
from .journal import ABSENT, Settings, Task, explain, installed, release, say
from .lineup import Case, Job, exact, graded, kernels_for, keywords, naive, plan_of

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
    yield Task("naive", partial(longest_row, settings, head, None, None))
    for kernels in kernels_for(settings.device):
        for workspace in settings.workspaces:
            yield Task(f"fused | {kernels} | {workspace}", partial(longest_row, settings, head, kernels, workspace))


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
        path = plan_of(hidden, head, "bnf", "mean", workspace or 512 * 2**20, how).path
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


# -- certified skipping ------------------------------------------------------------------------------------------------

TOLERANCES: tuple[float | str, ...] = (1e-5, 1e-4, 1e-3, 1e-2, "auto")


def peaked_batch(shape: Shape, device: str, seed: int = 0) -> Batch:
    """A head that has been trained, in outline: Zipf-distributed words, most of them predicted with confidence.

    The logit of word k is log frequency + a little noise; that of the target is 2 … 18 above. A common direction of the
    states carries the frequencies, a target's own row the confidence. Words are in random order, as in a vocabulary
    that wasn't sorted. In bfloat16.
    """
    tokens, width, vocab = shape
    length = max(t for t in range(1, cases.LONGEST_RESPONSE + 1) if tokens % (2 * t) == 0)
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    rank = torch.randperm(vocab, generator=random, device=device) + 1.0
    common = torch.nn.functional.normalize(normal(width), dim=0)
    weight = normal(vocab, width) / width**0.5 - rank.log()[:, None] * common / 4
    target = torch.multinomial(1 / rank, tokens, replacement=True, generator=random)
    confidence = 2 + 16 * torch.rand(tokens, 1, generator=random, device=device)
    own = weight[target] - (weight[target] @ common)[:, None] * common
    hidden = 4 * common + confidence * torch.nn.functional.normalize(own, dim=1) + 0.5 * normal(tokens, width)
    hidden, weight = (x.bfloat16().contiguous() for x in (hidden.view(-1, length, width), weight))
    target = target.view(-1, length)
    rows = zip(hidden.flatten(0, 1).split(cases.EXACT_ROWS), target.flatten().split(cases.EXACT_ROWS))
    exact_weight = weight.double()
    found = [reference.logits(x.double(), exact_weight).log_softmax(-1).gather(-1, y[:, None])[:, 0] for x, y in rows]
    logp = torch.cat(found).view(target.shape)
    ref = (logp + 0.3 * normal(*target.shape)).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, label, ref, ref.new_zeros(0, 2), logp)


class Peaked:
    """The batch, the answers in float64, and the library's own without skipping; each made when first asked for."""

    def __init__(self, shape: Shape, settings: Settings):
        self.shape, self.settings = shape, settings
        self.known: dict[Any, Result] = {}

    @cached_property
    def batch(self) -> Batch:
        """The inputs."""
        return peaked_batch(self.shape, self.settings.device)

    def truth(self, loss: str) -> Result:
        """In float64."""
        b = self.batch
        return self._kept((loss,), lambda: exact(loss, b.hidden, cases.LMHead(b.weight), b.target, b.ref, b.label))

    def plain(self, loss: str, kernels: str) -> Result:
        """Without skipping."""
        return self._kept((loss, kernels), lambda: self.call(loss, kernels)[0])

    def _kept(self, key: tuple[str, ...], make: Callable[[], Result]) -> Result:
        if key not in self.known:
            self.known = {other: value for other, value in self.known.items() if other == key[:1]}
            self.known[key] = make()
        return self.known[key]

    def call(self, loss: str, kernels: str, **more: Any) -> tuple[Result, Tensor | None, float | None]:
        """Value and gradients; of what was skipped each row's bound [N], and its share."""
        b, spec = self.batch, OBJECTIVES[loss]
        value, metrics = fused_loss(
            b.hidden, b.weight, b.target, objective=loss, label=b.label if spec.label else None,
            ref=None if spec.ref is None else b.ref, workspace=self.settings.workspaces[0], return_metrics=True,
            **keywords(kernels), **more,
        )  # fmt: skip
        made = graded(value, b.hidden, b.weight)
        if not more:
            return made, None, None
        return made, metrics["skipped/bound"].flatten(), float(metrics["skipped/share"])  # NaN before the backward


def skip(settings: Settings) -> Iterator[Task]:
    """What a tolerance on the gradient saves, what it costs, and what sorting the vocabulary adds."""
    name, *sizes, _ = settings.shapes[0] if settings.shapes else LLAMA
    peaked = Peaked(Shape(*sizes), settings)  # type: ignore[arg-type]
    for loss in ("bnf", "mle"):
        for kernels in kernels_for(settings.device):
            for tolerance in (None, *TOLERANCES):
                for sort in (False, True) if tolerance is not None else (False,):
                    key = f"{name} | {peaked.shape} | {loss} | {kernels} | {tolerance} | sorted={sort}"
                    yield Task(key, partial(skip_row, peaked, loss, kernels, tolerance, sort))


def skip_row(peaked: Peaked, loss: str, kernels: str, tolerance: float | str | None, sort: bool) -> dict[str, Any]:
    """One tolerance: the share skipped, its bound, the error that it made, and the time.

    A row of ∂L/∂logits lacks at most `bound` in the L1 norm, so dW lacks at most Σ bound ‖x‖ in the Frobenius norm.
    Right means: dX off float64 by its usual tolerance; dW by that and no more than Σ bound ‖x‖ beside it, and off the
    dW without skipping by no more than Σ bound ‖x‖ and the roundings of both.

    bound: the largest of a row. certified: Σ bound ‖x‖; off: the difference from no skipping; both over ‖dW‖.
    """
    row: dict[str, Any] = {
        "loss": loss, "kernels": kernels, "tolerance": tolerance, "sorted": sort, "status": "ok", "path": None,
        "share": None, "bound": None, "certified": None, "off": None, "off_largest": None, "value_error": None,
        "dX_error": None, "dW_error": None, "seconds": None, "seconds_20": None, "seconds_80": None,
        "over_none": None,
    }  # fmt: skip
    more: dict[str, Any] = {} if tolerance is None else {"grad_tolerance": tolerance, "sort_vocab": sort}
    try:
        b, workspace = peaked.batch, peaked.settings.workspaces[0]
        how = {**keywords(kernels), **more}
        row["path"] = plan_of(b.hidden, cases.LMHead(b.weight), loss, "mean", workspace, how).path
        made, bound, row["share"] = peaked.call(loss, kernels, **more)
        truth = peaked.truth(loss)
        size = truth.gradients[1].norm()
        row["value_error"], _, row["dX_error"] = cases.errors(made._replace(gradients=made.gradients[:1]), truth)
        row["dW_error"] = off_by(made.gradients[1], truth.gradients[1])[0] / size.item()
        value_most, most = TOLERANCE["fused", torch.bfloat16]
        fine, certified = row["value_error"] <= value_most and row["dX_error"] <= most, 0.0
        if bound is not None:
            certified = ((bound.double() * b.hidden.detach().double().flatten(0, 1).norm(dim=1)).sum() / size).item()
            off, largest = off_by(made.gradients[1], peaked.plain(loss, kernels).gradients[1])
            row |= {"bound": bound.max().item(), "certified": certified, "off": off / size.item()}
            row["off_largest"] = largest
            fine = fine and row["off"] <= certified + 2 * torch.finfo(torch.bfloat16).eps
        del made
        if not (fine and row["dW_error"] <= most + certified):
            return row | {"status": "FAILED"}
        release(peaked.settings.device)
        runs: dict[Any, Callable[[], object]] = {"this": partial(peaked.call, loss, kernels, **more)}
        if more:
            runs["none"] = partial(peaked.call, loss, kernels)
        times, _ = timed(runs, peaked.settings)
        row |= dict(zip(("seconds", "seconds_20", "seconds_80"), quantiles(times["this"])))
        if more:
            row["over_none"] = ratio(times["this"], times["none"])
        return row
    except Exception as error:
        status = explain(error)
    return row | {"status": status}


def off_by(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The Frobenius norm and the largest entry of the difference."""
    difference = one.double() - other.double()
    return difference.norm().item(), difference.abs().max().item()


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
