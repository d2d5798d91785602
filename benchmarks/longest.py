"""The longest pair within a limit of memory: `python -m benchmarks.longest --model MODEL --limit 8GiB --out DIR`.

One step (forward, backward, AdamW) on one pair, two responses of L tokens, with gradient checkpointing, in float32,
with DPO and with BNF: naive PyTorch, TRL's DPOTrainer with its own fused head (which has no BNF), `rgpb.hf.loss`, and
that with LoRA in all layers. Reference log-probabilities are given. MODEL is a folder or a GGUF file.

Each try is a whole step in a process of its own, which is ended once it has had more than the limit resident, by the
kernel's own count; all that the process has loaded counts. glibc is told to give back what is freed (`GLIBC`): by
itself it keeps blocks of up to 32 MiB (`findings/torch_checkpoint_resident_memory.sh`). Beyond the last of --lengths
attention is within windows of that many tokens, without work that grows with L².

Tries, DPO first, are kept as they end: the same command goes on where it ended. The picture has the peaks over L.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu.steps import optimizer_of
from benchmarks.trainer_step import Pairs, Run, Setting, apart, fused, naive, trl, whole_step
from rgpb.arguments import argument, parse_bytes, positive
from rgpb.bench.measure import provenance, version_of
from rgpb.bench.tables import free_table, save
from rgpb.train.machine import peak_bytes, reset_peak
from rgpb.train.models import load_pretrained

STEP = 256  # L is a multiple of it
GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # blocks from 1 MiB on are mapped, and unmapped when they are freed
WAYS: dict[str, Callable[[Any, Pairs, str], Run]] = {
    "naive": naive, "TRL's DPOTrainer": trl, "rgpb": fused, "rgpb, LoRA": fused,
}  # fmt: skip
JOBS = tuple((way, loss) for loss in ("dpo", "bnf") for way in WAYS if loss == "dpo" or way != "TRL's DPOTrainer")
CPU = torch.device("cpu")


class Try(NamedTuple):
    """A try and its end.

    Attributes:
        status: "ok", "over the limit", or an error.
        peak: bytes resident at the worst moment, or None where it wasn't ok.
    """

    way: str
    loss: str
    length: int
    status: str = ""
    peak: int | None = None
    before: int | None = None
    seconds: float | None = None


def within(window: int, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **how: Any) -> Any:
    """Causal attention among so many tokens at a time."""
    parts = zip(*(x.split(window, dim=2) for x in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **how)[0] for q, k, v in parts], dim=1), None


def attempt(setting: Setting, window: int, one: Try) -> tuple[int, int]:
    """(bytes resident before the step, at its worst moment)."""
    AttentionInterface.register("windows", partial(within, window))
    AttentionMaskInterface.register("windows", lambda *_, **__: None)
    model = setting.model()
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, one.length))
    ids[1, 0] = ids[0, 0]
    ref = -20 * torch.rand(ids.shape) - 1e-3
    ref[:, -1] = 0
    if "LoRA" in one.way:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    run, optimizer = WAYS[one.way](model, Pairs(ids, ref), one.loss), optimizer_of(model)
    reset_peak(CPU)
    before = peak_bytes(CPU)
    whole_step(run, optimizer)
    return before, peak_bytes(CPU)


def next_try(way: str, loss: str, tries: Sequence[Try], a: argparse.Namespace) -> Try | None:
    """What to try next of a job, or None where all is known.

    First `a.lengths`. Then one that is predicted from a line through the two longest that passed, until a length passes
    and the next multiple of `STEP` doesn't.
    """
    mine = [one for one in tries if (one.way, one.loss) == (way, loss)]
    if any(one.status not in ("ok", "over the limit") for one in mine):
        return None
    wanted = partial(Try, way, loss)
    passed, best, worst = known(mine, a.cap)
    for length in a.lengths:
        if length < worst and length not in passed:
            return wanted(length)
    if worst - best <= STEP:
        return None
    guess = (best + worst) // 2
    if len(passed) > 1:
        line: float = predicted(passed, a.limit)
        line = best + 0.9 * (line - best) if line > 2 * best else line  # a far one rather short: it makes the next
        guess = int(line) if line < worst else guess
    return wanted(min(max(guess // STEP * STEP, best + STEP), worst - STEP))


def known(mine: Sequence[Try], cap: int) -> tuple[dict[int, int], int, int]:
    """(peaks of the lengths that passed, the longest of them or 0, the shortest that is too long or beyond the cap)."""
    worst = min((one.length for one in mine if over(one)), default=cap + STEP)
    passed = {one.length: one.peak for one in mine if one.peak and one.length < worst}
    return passed, max(passed, default=0), worst


def predicted(passed: dict[int, int], limit: int) -> int:
    """Where the line through the two longest that passed meets the limit."""
    (x, low), (y, high) = sorted(passed.items())[-2:]
    return int(y + (limit - high) * (y - x) / max(1, high - low))


def over(one: Try) -> bool:
    return one.status == "over the limit"


def row_of(way: str, loss: str, tries: Sequence[Try], a: argparse.Namespace) -> dict[str, Any]:
    """What is known of a job: the longest that `fits` by now, which is the `longest` once the next is too long or the
    cap is reached; and what the line through the last two says."""
    mine = [one for one in tries if (one.way, one.loss) == (way, loss)]
    passed, best, worst = known(mine, a.cap)
    wrong = [one.status for one in mine if one.status not in ("ok", "over the limit")]
    base = [one.before for one in mine if one.before]
    return {
        "way": way,
        "loss": loss,
        "longest": best if best and worst - best <= STEP else None,
        "fits": best or None,
        "too long": worst if worst <= a.cap else None,
        "capped": best >= a.cap,
        "by the line": predicted(passed, a.limit) if len(passed) > 1 else None,
        "peak, MiB": round(passed[best] / 2**20) if best else None,
        "before, MiB": round(min(base) / 2**20) if base else None,
        "status": wrong[0] if wrong else "ok",
    }


def draw(tries: Sequence[Try], limit: int, path: Path) -> None:
    """Peaks over L, a cross where it was over the limit."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, loss in zip(figure.subplots(1, 2, sharey=True), ("dpo", "bnf")):
        for colour, way in zip(("tab:gray", "tab:orange", "tab:blue", "tab:green"), WAYS):
            mine = sorted((one for one in tries if (one.way, one.loss) == (way, loss)), key=lambda one: one.length)
            passed = [(one.length, (one.peak or 0) / 2**30) for one in mine if one.peak]
            if passed:
                axes.plot(*zip(*passed), "o-", color=colour, label=way)
            for one in mine:
                if over(one):
                    axes.plot(one.length, limit / 2**30, "x", color=colour)
        axes.axhline(limit / 2**30, color="black", lw=0.8, ls="--")
        axes.set_title(loss.upper())
        axes.set_xlabel("tokens of each response")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GiB resident at the worst moment of a step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    """Try, and after each try write the table, with its provenance, and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longest", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder or a GGUF file")
    parser.add_argument("--limit", type=argument(parse_bytes), default="8GiB", help="bytes resident; default 8GiB")
    parser.add_argument("--lengths", type=argument(positive), nargs="+", default=(2048, 4096))
    parser.add_argument("--cap", type=argument(positive), default=65536, help="L where the search ends; default 65536")
    parser.add_argument("--minutes", type=float, default=25, help="no try is begun after; default %(default)s")
    parser.add_argument("--threads", type=argument(positive), default=2, help="default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for tries.jsonl, results.json and results.png")
    a = parser.parse_args(given)
    a.lengths = tuple(sorted(a.lengths))
    a.out.mkdir(parents=True, exist_ok=True)
    kept, start = a.out / "tries.jsonl", time.monotonic()
    lines = kept.read_text().splitlines() if kept.exists() else []
    settings = {"model": a.model.name, "limit": a.limit, "window": a.lengths[-1], **GLIBC}
    os.environ.update(GLIBC)  # of the processes that it starts
    if lines and json.loads(lines[0]) != settings:
        raise SystemExit(f"out: expected a new folder, or one of the same settings, got {a.out} of {lines[0]}")
    tries = [Try(**json.loads(line)) for line in lines[1:]]
    if not lines:
        kept.write_text(json.dumps(settings) + "\n")
    torch.set_num_threads(a.threads)
    facts = provenance(
        "cpu", model=a.model.name, limit=a.limit, cap=a.cap, window=a.lengths[-1], **GLIBC, trl=version_of("trl"),
        transformers=version_of("transformers"), peft=version_of("peft"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        load_pretrained(a.model, torch.float32).save_pretrained(folder)
        while True:
            wanted = [one for job in JOBS if (one := next_try(*job, tries, a)) is not None]
            if not wanted or time.monotonic() - start > 60 * a.minutes:
                break
            one = min(wanted, key=lambda one: (one.loss != "dpo", one.length))
            attention = "sdpa" if one.length <= a.lengths[-1] else "windows"
            setting = Setting(Path(folder), "fp32", True, a.threads, attention)
            began = time.monotonic()
            status, made = apart(partial(attempt, setting, a.lengths[-1], one), a.limit)
            if status == "ok" and made[1] > a.limit:
                status, made = "over the limit", None
            before, peak = made or (None, None)
            one = one._replace(status=status, peak=peak, before=before, seconds=round(time.monotonic() - began, 1))
            tries.append(one)
            with kept.open("a") as file:
                file.write(json.dumps(one._asdict()) + "\n")
            print(", ".join(f"{name} {value}" for name, value in one._asdict().items()), flush=True)
            report(tries, facts, a)
    print("\n".join(report(tries, facts, a)))


def report(tries: Sequence[Try], facts: dict[str, Any], a: argparse.Namespace) -> list[str]:
    """Write results.json and results.png; lines of the table."""
    table = [row_of(*job, tries, a) for job in JOBS]
    content = {"provenance": facts, "rows": [], "points": [], "table": table}
    save(a.out / "results.json", content | {"tries": [one._asdict() for one in tries]})
    draw(tries, a.limit, a.out / "results.png")
    return free_table(table)


if __name__ == "__main__":
    main()
