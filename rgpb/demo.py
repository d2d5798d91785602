"""`rgpb demo`: a small model that often drops the carry is taught by pairs of answers that differ in a digit or two.

    noisy answers ──mle──▶ one model that is more often wrong than right ──BNF, DPO, NLL+PLL──▶ three models

All three start from that model, which is their reference too, and see the same pairs in the same order. Everything runs
through `rgpb.train`, as on real data.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgpb import fused_loss, reference
from rgpb.bench.measure import Result, peak_memory
from rgpb.hf import IGNORE
from rgpb.train import TrainConfig, report, train
from rgpb.train.rows import read_preferences
from rgpb.train.tokens import Collator, tokenise

METHODS = {"bnf": "BNF", "dpo": "DPO", "nll_pll": "NLL+PLL"}
NOISY, PAIRS, TEST = 6400, 1920, 300  # sums to learn from with mistakes, to compare answers of, and held out
WRONG = 0.65  # part of the noisy answers that have the mistake
LENGTHS: dict[str, Any] = {"max_length": 64, "max_prompt_length": 16}
STEP = {"responses": 8, "tokens": 128, "width": 256, "vocab": 32000}  # of the step that is timed


def arithmetic_pairs(n: int, seed: int) -> list[dict[str, str]]:
    """Sums of two numbers of two digits, worked out digit by digit, and the same with a wrong tens digit.

    {"prompt": "37+45=", "chosen": "7+5=12,3+4+1=08,082", "rejected": "7+5=12,3+4+1=07,072"}

    The wrong one forgets a carry, or adds one that isn't there. It then carries on rightly from the wrong digit, so the
    two differ in one digit of the working and the same digit of the result.

    Args:
        n: how many, from 1 to 7000. No two have the same prompt.
        seed: another one gives other sums in another order.

    Raises:
        ValueError: `n` out of range.
    """
    if not 1 <= n <= 7000:
        raise ValueError(f"n: expected 1 to 7000, got {n}")
    drawn = list(range(90 * 90))
    random.Random(seed).shuffle(drawn)
    pairs: list[dict[str, str]] = []
    for number in drawn:
        a, b = 10 + number // 90, 10 + number % 90
        carry = (a % 10 + b % 10) // 10
        tens = a // 10 + b // 10 + carry
        wrong = tens - 1 if carry else tens + 1
        if tens // 10 == wrong // 10:  # else both digits of the tens would differ
            pairs.append({"prompt": f"{a}+{b}=", "chosen": _worked(a, b, tens), "rejected": _worked(a, b, wrong)})
        if len(pairs) == n:
            break
    return pairs


def _worked(a: int, b: int, tens: int) -> str:
    ones = a % 10 + b % 10
    carry, last = divmod(ones, 10)
    return f"{a % 10}+{b % 10}={ones:02d},{a // 10}+{b // 10}+{carry}={tens:02d},{tens:02d}{last}"


def write_rows(path: str | Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSON lines; returns the path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def exact_answers(folder: str | Path, data: str | Path) -> tuple[float, float]:
    """Part of the prompts that a model answers exactly as the chosen, and as the rejected, response.

    Greedy decoding gives a text exactly where each of its tokens, the end token too, is the most likely one after those
    before it. So one forward over the texts is enough.

    Args:
        folder: of a model and its tokenizer.
        data: a file of pairs.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = tokenise(read_preferences(data), tokenizer, **LENGTHS)
    batch = Collator(tokenizer.pad_token_id)([pairs[i] for i in range(len(pairs))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    best, target = logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    exact = ((best == target) | (target == IGNORE)).all(1).float()
    chosen, rejected = exact.view(2, -1).mean(1).tolist()
    return chosen, rejected


def one_step(seed: int = 0) -> str:
    """Time and memory of one BNF step, forward and backward, fused and with full logits, as a sentence.

    Raises:
        RuntimeError: the two disagree on loss or gradients.
    """
    b, t, h, v = STEP.values()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, t, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * h**-0.5
    target = torch.randint(v, (b, t), generator=generator)
    ref = torch.log_softmax(hidden @ weight.T, -1).gather(2, target[..., None])[..., 0]
    ref += 0.5 * torch.randn(b, t, generator=generator)
    ref.clamp_(max=-0.01)
    label = torch.arange(b) < b // 2

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return fused_loss(x, w, target, objective="bnf", label=label, ref=ref)

    def naive(x: Tensor, w: Tensor) -> Tensor:
        return reference.bnf(x, w, target, ref=ref, label=label)

    found, spent = {}, {}
    for name, loss in (("fused", fused), ("naive", naive)):
        found[name], *spent[name] = _measured(loss, hidden, weight)
    for one, other in zip(found["fused"], found["naive"]):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item()):
            raise RuntimeError("the fused BNF step and the one with full logits disagree")
    (fast, small), (slow, large) = spent["fused"], spent["naive"]
    memory = f"{small / 2**20:.0f} MiB instead of {large / 2**20:.0f} MiB beyond its inputs"
    return (
        f"One BNF step on {b * t} tokens, {v} words and width {h}, fused instead of plain PyTorch with full logits, "
        f"same loss and gradients: {fast:.2f} s instead of {slow:.2f} s, {memory}."
    )


def _measured(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor
) -> tuple[tuple[Tensor, ...], float, int]:
    """(loss and gradients), seconds of the fastest of four calls, and peak bytes as torch's allocator counts them."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def run() -> Result:
        value = loss(x, w)
        return Result(value.detach(), torch.autograd.grad(value, (x, w)))

    seconds = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        made = run()
        seconds = min(seconds, time.perf_counter() - start)
    return (made.value, *made.gradients), seconds, peak_memory(run, "cpu").peak


def demo(output: str | Path, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Run the whole comparison; `output` gets `report.md`, `report.png` and a folder per model.

    Args:
        output: a new folder, or that of an earlier, perhaps interrupted, demo.
        seed: of data, weights and order.
        progress: show progress.

    Returns:
        `before` and, by method, `right` and `wrong`: parts of held-out sums answered exactly so; `summary` and `step`:
        the sentences below the table.

    Raises:
        ValueError: a folder with something else in it.
    """
    started, output = time.monotonic(), Path(output)
    if output.exists() and any(output.iterdir()) and not (output / "pairs.jsonl").exists():
        raise ValueError(f"output: expected a new folder or that of an earlier demo, got {output} with other files")
    output.mkdir(parents=True, exist_ok=True)
    rows = arithmetic_pairs(NOISY + TEST, seed)
    test, rest = write_rows(output / "test.jsonl", rows[:TEST]), rows[TEST:]
    pairs = write_rows(output / "pairs.jsonl", rest[:PAIRS])
    coin = random.Random(seed)
    answers = [(row["prompt"], row["rejected" if coin.random() < WRONG else "chosen"]) for row in rest]
    noisy = write_rows(
        output / "noisy.jsonl", [{"prompt": prompt, "completion": answer, "label": True} for prompt, answer in answers]
    )
    common: dict[str, Any] = {"eval_data": test, "seed": seed, "progress": progress, "cpu": True, **LENGTHS}
    start = output / "start" / "model"
    train(
        TrainConfig(
            data=noisy, output=str(output / "start"), loss="mle", model="nano-llama", vocab_size=258, epochs=4.0,
            batch_size=64, lr=4e-3, schedule="cosine", eval_steps=100, **common,
        )
    )  # fmt: skip
    before = exact_answers(start, test)
    right, wrong = {}, {}
    for loss, name in METHODS.items():
        train(
            TrainConfig(
                data=pairs, output=str(output / loss), loss=loss, model=str(start), batch_size=32, lr=1e-4,
                eval_steps=10, **common,
            )
        )  # fmt: skip
        right[name], wrong[name] = exact_answers(output / loss / "model", test)
    runs = {name: output / loss for loss, name in METHODS.items()}
    records = {name: report.read_metrics(folder) for name, folder in runs.items()}
    extra = {
        f"held-out sums answered {how} (change in points)": {
            name: f"{a[name]:.1%} ({100 * (a[name] - b):+.1f})" for name in runs
        }
        for how, a, b in (("rightly", right, before[0]), ("with the dropped or false carry", wrong, before[1]))
    }
    summary, step = summarise(records, right, before[0]), one_step(seed)
    report.compare(runs, output, extra, f"{summary}\n\n{step}")
    report.show(report.comparison(records, extra), "three losses, one start, the same pairs")
    print(f"{summary}\n{step}\n{time.monotonic() - started:.0f} s; report: {output / 'report.md'}")
    return {"before": before, "right": right, "wrong": wrong, "summary": summary, "step": step}


def summarise(records: dict[str, list[dict[str, Any]]], right: dict[str, float], before: float) -> str:
    """What the numbers show, in a sentence.

    Args:
        records: metrics of each method's run.
        right: part of held-out sums answered rightly by each.
        before: the same before training.
    """
    order = sorted(right, key=lambda name: -right[name])
    accuracies = ", ".join(f"{name} {right[name]:.0%}" for name in order)
    shifts = {name: next(x.change for x in report.lines(records[name]) if x.name == "logps/chosen") for name in order}
    changed = ", ".join(f"{name} {report.number(shifts[name], sign=True)}" for name in order)
    down = [name for name in order if (shifts[name] or 0) < 0]
    fate = f"right answers became less likely with {' and with '.join(down) or 'none'}"
    steps = records[order[0]][-1]["step"]
    return (
        f"After {steps} steps on the same pairs the held-out sums answered rightly went from {before:.0%} to: "
        f"{accuracies}; the log-likelihood of right answers changed by: {changed}: {fate}. One regime, not a ranking: "
        "at other learning rates the three come out alike, or all collapse."
    )


def add_parser(subparsers: Any) -> None:
    """`rgpb demo`."""
    parser = subparsers.add_parser("demo", help="compare three losses on arithmetic pairs, in a few minutes")
    parser.add_argument("--output", required=True, help="folder for data, models and report")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="don't show progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    demo(arguments.output, arguments.seed, not arguments.quiet)
    return 0
