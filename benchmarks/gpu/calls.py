"""Calls on LM heads, beside bare products, naive PyTorch and other libraries; the longest batch; tuning.

All who do a job are checked against float64 and weighed, and those that passed are timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rgpb.bench import contest
from rgpb.bench.contest import DTYPES, Batch, Case, Contestant, Job, Shape
from rgpb.bench.measure import alive, explain, release
from rgpb.bench.tune import SHAPE, sweep
from rgpb.engine.plan import DEFAULT_WORKSPACE

from .journal import Journal, Settings, Task, say, single
from .peers import JOBS, entries, kernels_for

Head = tuple[str, int, int, int, float | None]  # model, N, H, V, soft-cap

# N = 8192 first: if time is short, that is what there is.
LLAMA: tuple[Head, ...] = tuple(("Llama-3-8B", tokens, 4096, 128256, None) for tokens in (8192, 4096, 32768))
OTHERS: tuple[Head, ...] = (
    ("Qwen2.5-7B", 8192, 3584, 152064, None),
    ("Gemma-2-9B", 8192, 3584, 256000, 30.0),
    ("Pythia-2.8B", 8192, 2560, 50304, None),
)
# The second has eight times the flops of the first.
CPU: tuple[Head, ...] = (("small", 2048, 512, 32000, None), ("Llama-3.2-1B", 1024, 2048, 128256, None))
# Seconds after which no more rounds are begun: of a job, and of one kernel or step.
JOB_SECONDS, ROW_SECONDS = {"cuda": 40.0, "cpu": 200.0}, 4.0


def described(heads: tuple[Head, ...]) -> str:
    """The heads in one line."""
    return "; ".join(f"{name} N={n} H={h} V={v}" + (f" soft-cap {c:g}" if c else "") for name, n, h, v, c in heads)


# -- all contestants on a head -----------------------------------------------------------------------------------------


def tasks(journal: Journal, heads: tuple[Head, ...], dtype: str) -> Iterator[Task]:
    """A task for each job at each head, with a row for each contestant."""
    settings = journal.settings
    for name, tokens, width, vocab, softcap in settings.shapes or heads:
        case = Case(Shape(tokens, width, vocab), settings.dtype or dtype, settings.device, softcap, name)
        for job in JOBS:
            found = entries(job, settings.workspaces, settings.device)
            keyed = {key_of(case, job, one): one for one in found}
            yield Task(tuple(keyed), partial(job_rows, journal, case, job, keyed))
        del case
        release(settings.device)


def key_of(case: Case, job: Job, one: Contestant) -> str:
    """The key of a contestant's row."""
    parts = (case.title, case.shape, case.dtype, *job, one.impl, one.path, one.kernels, one.workspace, one.note)
    return " | ".join(str(part) for part in parts if part is not None)


def job_rows(
    journal: Journal, case: Case, job: Job, keyed: dict[str, Contestant], keys: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """The rows of those keys; naive PyTorch takes part in the rounds also where its row is there already."""
    ready = {}
    for key in keys:
        ready[key] = contest.prepared(case, job, keyed[key])
        say(f"checked: {key}: {ready[key].row.status}")
        if ready[key].row.status.startswith("error") and not alive(case.device):
            yield key, ready[key].row._asdict()  # the others haven't had their chance
            return
    naive_key, naive = next(iter(keyed.items()))
    there = naive_key not in ready and journal.rows.get(naive_key, {}).get("status") == "ok"
    rival = naive.make(case.batch, job)[0] if there else None
    settings = journal.settings
    raced = contest.race(case, [*ready.values()], settings.rounds, JOB_SECONDS[case.device], rival)
    yield from zip(ready, (row._asdict() for row in raced.rows))


# -- the longest batch -------------------------------------------------------------------------------------------------

STEP = 256  # tokens: pairs of responses of 128


def longest(journal: Journal) -> Iterator[Task]:
    """The most tokens that BNF with full gradients can take at once, for naive PyTorch and for the library."""
    settings = journal.settings
    name, _, width, vocab, _ = (settings.shapes or LLAMA)[0]
    head = (name, width, vocab)
    yield single(f"{head} | naive", partial(longest_row, settings, head, None, None))
    for kernels in kernels_for(settings.device):
        for workspace in settings.workspaces:
            make = partial(longest_row, settings, head, kernels, workspace)
            yield single(f"{head} | fused | {kernels} | {workspace}", make)


def longest_row(
    settings: Settings, head: tuple[str, int, int], kernels: str | None, workspace: int | None
) -> dict[str, Any]:
    """The largest N found, to within an eighth; `capped` where the search ended before memory did."""
    name, width, vocab = head
    row: dict[str, Any] = {
        "case": name, "width": width, "vocab": vocab, "loss": "bnf", "impl": "naive" if kernels is None else "fused",
        "kernels": kernels, "workspace": workspace, "status": "ok", "tokens": None, "capped": None, "path": None,
        "tries": {},
    }  # fmt: skip

    def fits(tokens: int) -> bool:
        try:
            batch = light_batch(Shape(tokens, width, vocab), settings.device)
            row["path"] = once(batch, kernels, workspace or DEFAULT_WORKSPACE)
            status = "ok"
        except Exception as error:
            status = explain(error)
        batch = None  # type: ignore[assignment]
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


def once(batch: Batch, kernels: str | None, workspace: int) -> str:
    """BNF forward and backward; the path that was taken."""
    job, path = Job("bnf", "full"), "full"
    if kernels is None:
        run, _ = contest.naive(batch, job)
    else:
        run, plan = contest.fused(batch, job, "auto", workspace, impl=kernels)
        path = plan.path
    value = run().value
    if not bool(value.isfinite()):
        raise ArithmeticError(f"loss {value.item()}")
    return path


def light_batch(shape: Shape, device: str) -> Batch:
    """Random inputs in bfloat16 without exact log-probabilities, made without larger temporaries."""
    tokens, width, vocab = shape
    length = contest.length_of(tokens)
    more: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(tokens // length, length, width, dtype=torch.bfloat16, **more).requires_grad_()
    weight = torch.randn(vocab, width, dtype=torch.bfloat16, **more).mul_(2 / width**0.5).requires_grad_()
    target = torch.randint(vocab, hidden.shape[:2], **more)
    ref = -20 * torch.rand(hidden.shape[:2], **more) - 1e-3
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(hidden, weight, target, label, ref, ref.new_zeros(0, 2), ref.new_zeros(0))


# -- tuning ------------------------------------------------------------------------------------------------------------


def tune(journal: Journal) -> Iterator[Task]:
    """The sweep of `rgpb tune`, of which nothing is kept, as one row that holds its rows."""
    settings = journal.settings
    shape, dtype = settings.shapes[0][1:4] if settings.shapes else SHAPE, DTYPES[settings.dtype or "bf16"]
    make = partial(sweep, settings.device, say, Shape(*shape), dtype, min(settings.rounds, 7))
    yield single("sweep", lambda: {"rows": make()}, {"status": "ok", "rows": []})


def tune_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of the sweep, or why there are none."""
    return {"table": [one for row in rows for one in row["rows"] or [{"status": row["status"]}]]}
