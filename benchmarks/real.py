"""A real model on real pairs: `python -m benchmarks.real --model FILE.gguf --pairs PAIRS --out DIR`, as `make real`.

The model, a GGUF file or a folder, is put into a folder; `rgpb train` aligns it with BNF on short pairs of PAIRS. Then
a table, a picture and report.md say what that did on held-out pairs, and show completions before and after.

PAIRS is JSON Lines, also gzipped, in the layout of HH-RLHF: `chosen` and `rejected` are the answers to `prompt`, or
without one whole transcripts that differ in the last answer. Transcripts ("Human: … Assistant: …") become chats.

A command that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.skipping import rows_of
from rgpb import cli
from rgpb.arguments import argument, positive
from rgpb.bench.measure import provenance
from rgpb.bench.tables import free_table, save
from rgpb.train.files import save_whole_folder, write_text
from rgpb.train.models import load_pretrained, load_tokenizer
from rgpb.train.report import read_metrics

SHOWN = 5
RANKED = {"rewards/accuracies": "reward", "logps/accuracies": "likelihood per token"}
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(text: str) -> list[dict[str, str]] | None:
    """A transcript as a chat; None for one that isn't turn by turn of Human and Assistant."""
    before, *parts = TURN.split(text)
    turns = [{"role": ROLES[name], "content": said.strip()} for name, said in zip(parts[::2], parts[1::2])]
    in_turn = all(turn["role"] == ("user", "assistant")[at % 2] and turn["content"] for at, turn in enumerate(turns))
    return turns if turns and in_turn and not before.strip() else None


def chats(pairs: Path, longest: int) -> Iterator[dict[str, Any]]:
    """Pairs of one question and two different answers, of at most so many characters each."""
    for row in rows_of(pairs):
        prompt = row.get("prompt", "")
        sides = [messages(prompt + row[side]) for side in ("chosen", "rejected")]
        if None in sides or sides[0] == sides[1]:
            continue
        (*asked, chosen), (*same, rejected) = sides  # type: ignore[misc]
        fits = all(len(turn["content"]) <= longest for turn in (*asked, chosen, rejected))
        if len(asked) == 1 and asked == same and chosen["role"] == "assistant" and fits:
            yield {"prompt": asked, "chosen": [chosen], "rejected": [rejected]}


def split(pairs: Path, place: Path, held: int, count: int, longest: int) -> None:
    """held.jsonl, of the first pairs, and train.jsonl, of the next ones, with none of their questions."""
    every = list(chats(pairs, longest))
    asked = {row["prompt"][0]["content"] for row in every[:held]}
    parts = {"held": every[:held]}
    parts["train"] = [row for row in every[held:] if row["prompt"][0]["content"] not in asked][:count]
    if len(parts["train"]) < count:
        raise ValueError(
            f"pairs: expected {held + count} of one question each, up to {longest} characters, "
            f"got {len(every)} in {pairs}; take fewer with --held and --train"
        )
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_text(place / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def completions(folder: Path, prompts: list[list[dict[str, str]]], tokens: int) -> list[str]:
    """What a model answers, greedily."""
    model: Any = load_pretrained(folder, torch.float32)
    tokenizer = load_tokenizer(folder)
    made = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=tokens)
        made.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return made


def error(part: float, count: int) -> float:
    """The standard error of a part of so many pairs."""
    return math.sqrt(part * (1 - part) / count)


def rows_of_table(before: dict[str, float], after: dict[str, float], count: int) -> list[dict[str, str]]:
    """What training did to the held-out pairs."""
    table = []
    for name, text in RANKED.items():
        parts = [f"{part:.3f} ± {error(part, count):.3f}" for part in (before[name], after[name])]
        parts[0] = "0.5, all tied" if name == "rewards/accuracies" else parts[0]  # it is its own reference
        table.append({"held-out pairs": f"chosen has the higher {text}", "before": parts[0], "after": parts[1]})
    for side in ("chosen", "rejected"):
        was, now = (metrics[f"logps/{side}"] for metrics in (before, after))
        change = f"{now:.2f} ({now - was:+.2f})"
        table.append({"held-out pairs": f"log-likelihood of {side}, mean", "before": f"{was:.2f}", "after": change})
    for name in ("loss", "perplexity"):
        table.append({"held-out pairs": name, "before": f"{before[name]:.4g}", "after": f"{after[name]:.4g}"})
    return table


def draw(
    records: list[dict[str, Any]], before: dict[str, float], after: dict[str, float], count: int, path: Path
) -> None:
    """Accuracies with standard errors, shifts of the likelihood, and the loss of the training batches."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    right, shifts, losses = figure.subplots(1, 3)
    for at, (label, metrics) in enumerate((("before", before), ("after", after))):
        parts = [metrics[name] for name in RANKED]
        errors = [error(part, count) for part in parts]
        errors[0] *= at  # before, all rewards are tied
        right.bar([x + 0.4 * at for x in range(len(parts))], parts, 0.38, yerr=errors, capsize=4, label=label)
    right.set_xticks([x + 0.2 for x in range(len(RANKED))], [f"by {text}" for text in RANKED.values()])
    right.axhline(0.5, color="gray", lw=0.8)
    right.set_ylim(0, 1)
    right.set_ylabel("held-out pairs ranked rightly")
    right.legend(frameon=False)
    sides = ("chosen", "rejected")
    shifts.bar(sides, [after[f"logps/{side}"] - before[f"logps/{side}"] for side in sides], 0.5, color=["C2", "C3"])
    shifts.axhline(0, color="black", lw=0.8)
    shifts.set_ylabel("change of the log-likelihood, nats")
    points = [(record["step"], record["loss"]) for record in records if record["split"] == "train"]
    losses.plot(*zip(*points), marker="o", ms=3)
    losses.set_xlabel("optimizer step")
    losses.set_ylabel("loss of training batches")
    losses.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run, its data, and what it shows")
    for name, default, text in (
        ("train", 160, "pairs"), ("held", 100, "pairs held out"), ("characters", 300, "of a message at most"),
        ("batch", 8, "pairs of a step"), ("tokens", 60, "of a completion at most"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help=f"{text}; default %(default)s")
    parser.add_argument("--lr", type=float, default=1e-5)
    a = parser.parse_args(given)
    base, run = a.out / "base", a.out / "bnf"
    split(a.pairs, a.out, a.held, a.train, a.characters)
    if not base.exists():
        model, tokenizer = load_pretrained(a.model, torch.float32), load_tokenizer(a.model)
        save_whole_folder(base, model.save_pretrained, tokenizer.save_pretrained)
        del model
    settings = {
        "data": a.out / "train.jsonl", "eval-data": a.out / "held.jsonl", "eval-rows": a.held, "model": base,
        "output": run, "loss": "bnf", "epochs": 1, "batch-size": a.batch, "lr": a.lr, "max-length": 512,
        "log-steps": 2, "save-steps": 5, "keep-checkpoints": 1,
    }  # fmt: skip
    command = ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value))), "--cpu"]
    print(f"$ rgpb {' '.join(command)}", flush=True)
    if code := cli.main(command):
        return code
    report(a, base, run, " ".join(command))
    return 0


def report(a: argparse.Namespace, base: Path, run: Path, command: str) -> None:
    """Everything that is shown: numbers as results.json and results.png, with the completions as report.md."""
    result = json.loads((run / "result.json").read_text())
    before, after, count = result["before"], result["after"], result["eval_counts"]["units"]
    held = [json.loads(line) for line in (a.out / "held.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in held[:SHOWN]]
    said = [completions(folder, prompts, a.tokens) for folder in (base, run / "model")]
    table = rows_of_table(before, after, count)
    texts = [
        {"question": prompt[0]["content"], "before": one, "after": other} for prompt, one, other in zip(prompts, *said)
    ]
    lines = [*free_table(table), "", f"{count} pairs held out, {result['steps']} steps.", "", *free_table(texts)]
    print("\n".join(lines))
    facts = provenance(
        "cpu", model=a.model.name, pairs=a.pairs.name, command=f"rgpb {command}", held_out=count,
        seconds=round(result["seconds"]), peak_bytes=result["peak_bytes"],
    )  # fmt: skip
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table})
    draw(read_metrics(run), before, after, count, a.out / "results.png")
    write_text(a.out / "report.md", "\n".join([f"# {a.model.name}, BNF", "", *lines, "", "![](results.png)", ""]))


if __name__ == "__main__":
    sys.exit(main())
