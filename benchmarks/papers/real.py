"""The papers' claims on a real model: `python -m benchmarks.papers.real --model FILE --work DIR --hh-rlhf DIR …`.

SmolLM2-135M-Instruct, its last layers and norm trained, on HH-RLHF's pairs and AlpacaEval's groups of rated answers. A
run is one line of smollm2.jsonl: a method at a learning rate with a seed. First each method is run with one seed at
each rate, then with the other seeds at its best. Runs that have their lines are skipped, so an interrupted command
goes on where it was. Two commands at once share the runs. What stays the same between runs, hidden states below the
trained layers, is computed once and kept in `--work`.

Verdicts are computed from all lines when docs/claims.md is written (`python -m benchmarks.papers`).
"""

import argparse
import json
import logging
import math
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rgpb
from benchmarks.real import messages
from benchmarks.skipping import rows_of as json_rows
from rgpb import hf
from rgpb.arguments import argument, positive
from rgpb.bench.measure import provenance
from rgpb.train.files import save_whole_file, write_text
from rgpb.train.models import load_pretrained, load_tokenizer

# isort: off
from .models import LOG, Method
from .on_pairs import FOUR, MOVERS, RATIOS
from .outcomes import RATES, REAL, SEEDS, Line, Lines, best_rate, runs_of
from .report import RESULTS
from .upper import Batch, Known, Unit, Upper, batch, claimed, likelihoods, measure, remember, train
from .worlds import need

LAYERS = 3
PROMPT, REPLY, ANSWER = 96, 64, 48  # tokens: of a prompt at most; a reply's (an answer's) beginning
PAIRS, GROUPS = 6, 3  # of a step
TRAINED, FROM = {"pairs": 240, "groups": 120}, {"pairs": 320, "groups": 180}  # units of a run, drawn from so many
VALID, TEST = {"pairs": 40, "groups": 40}, {"pairs": 80, "groups": 80}
OWN = 48  # held-out prompts that the start answers itself
SHOWN = 4  # answers of a group: those to learn from are drawn by the seed


class World:
    """The model and its texts. `data` as of the other worlds; `quick` makes all of it tiny."""

    def __init__(self, model: Path, data: Mapping[str, Path], work: Path, quick: bool = False) -> None:
        self.path, self.data, self.work, self.quick = model, data, work, quick

    @cached_property
    def model(self) -> Any:
        return load_pretrained(self.path, torch.float32).eval().requires_grad_(False)

    @cached_property
    def head(self) -> rgpb.LMHead:
        return hf.read_head(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def layers(self) -> int:
        return 1 if self.quick else LAYERS

    def prompt(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]

    def reply(self, text: str, length: int) -> list[int]:
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id][:length]

    def texts(self, kind: str) -> list[Unit]:
        """All "pairs" or "groups" whose prompts are short enough, each prompt once; groups with the best first."""
        found: dict[tuple[int, ...], Unit] = {}
        if kind == "pairs":
            for row in json_rows(need(self.data, "hh_rlhf") / "train.jsonl.gz"):
                sides = [messages(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
                if None in sides or sides[0] == sides[1]:
                    continue
                (*asked, chosen), (*same, rejected) = sides  # type: ignore[misc]
                replies = [self.reply(turn["content"], REPLY) for turn in (chosen, rejected)]
                if asked == same and len(ids := self.prompt(asked)) <= PROMPT and replies[0] != replies[1]:
                    found.setdefault(tuple(ids), Unit(ids, replies, []))
        else:
            for row in json_rows(need(self.data, "alpaca_eval")):
                ids = self.prompt([{"role": "user", "content": row["prompt"]}])
                order = sorted(range(len(row["rewards"])), key=lambda k: -row["rewards"][k])
                answers = [self.reply(row["completions"][k], ANSWER) for k in order]
                if len(ids) <= PROMPT and all(answers):
                    found.setdefault(tuple(ids), Unit(ids, answers, [10 * row["rewards"][k] for k in order]))
        units = list(found.values())
        random.Random(0).shuffle(units)
        return units

    def parts(self, kind: str) -> dict[str, list[Unit]]:
        """Test, validation and training units; of held-out groups `SHOWN` answers, drawn once."""
        units, sizes = self.texts(kind), [TEST[kind], VALID[kind], FROM[kind]]
        sizes = [4, 4, 8] if self.quick else sizes
        if len(units) < sum(sizes):
            raise ValueError(f"{kind}: expected {sum(sizes)} with prompts of up to {PROMPT} tokens, got {len(units)}")
        ends = [sum(sizes[:i]) for i in range(4)]
        parts = {name: units[a:b] for name, a, b in zip(("test", "valid", "train"), ends, ends[1:])}
        if kind == "groups":
            draw = random.Random(1)
            for name in ("test", "valid"):
                picks = [sorted(draw.sample(range(len(unit.completions)), SHOWN)) for unit in parts[name]]
                parts[name] = [
                    Unit(unit.prompt, [unit.completions[k] for k in its], [unit.rewards[k] for k in its])
                    for unit, its in zip(parts[name], picks)
                ]
        return parts

    @torch.no_grad()
    def answered(self, units: Sequence[Unit]) -> list[Unit]:
        """The start's own greedy answers to the prompts of units, kept in `work`."""
        asked = zlib.crc32(json.dumps([unit.prompt for unit in units]).encode())
        path = self.work / f"own-{asked:08x}.json"
        with claimed(self.work / "locks" / "own", wait=True):
            if not path.exists():
                answers, end = [], self.tokenizer.eos_token_id
                for at in range(0, len(units), 16):  # prompts end together: they are filled on the left
                    prompts = [unit.prompt for unit in units[at : at + 16]]
                    fill = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
                    ids = torch.tensor([[end] * n + prompt for n, prompt in zip(fill, prompts)])
                    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(fill, prompts)])
                    out = self.model.generate(
                        ids, attention_mask=mask, max_new_tokens=4 if self.quick else ANSWER, do_sample=False,
                        eos_token_id=end, pad_token_id=end,
                    )[:, ids.shape[1] :].tolist()  # fmt: skip
                    answers += [[*row[: row.index(end)], end] if end in row else row for row in out]
                    LOG.info("own answers: %d of %d", len(answers), len(units))
                self.work.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(answers))
        return [Unit(unit.prompt, [its], []) for unit, its in zip(units, json.loads(path.read_text(encoding="utf-8")))]

    @cached_property
    def pairs(self) -> dict[str, list[Known]]:
        parts = self.parts("pairs")
        known = self.known("pairs", parts)
        return {**known, **self.known("pairs", {"own": self.answered(parts["test"][:OWN])})}

    @cached_property
    def groups(self) -> dict[str, list[Known]]:
        return self.known("groups", self.parts("groups"))

    def known(self, kind: str, parts: Mapping[str, list[Unit]]) -> dict[str, list[Known]]:
        folder = self.work / f"{kind}, {self.layers} layers"
        return {
            name: remember(self.model, self.head, self.layers, units, folder / name)
            for name, units in reversed(list(parts.items()))
        }


Maker = Callable[[int], Batch]


class Trial(NamedTuple):
    """A method and what it is given: `feed` draws a seed's training units into batches; `then` follows that method."""

    kind: str
    method: Method
    feed: Callable[[Sequence[Known], int], tuple[Maker, int]]
    then: str = ""


def drawn(known: Sequence[Known], seed: int, kind: str) -> list[Known]:
    """A seed's training units, in its order."""
    count = TRAINED[kind] * len(known) // FROM[kind] if len(known) < FROM[kind] else TRAINED[kind]
    return random.Random(seed).sample(list(known), max(count, 4))


def both(known: Sequence[Known], seed: int, sides: Sequence[int] = (0, 1)) -> tuple[Maker, int]:
    """Batches of pairs, [chosen; rejected], or of one side of each."""
    some = drawn(known, seed, "pairs")
    steps = math.ceil(len(some) / PAIRS)

    def make(step: int) -> Batch:
        its = some[PAIRS * step : PAIRS * (step + 1)]
        return batch(its, [sides] * len(its), stacked=True)

    return make, steps


def parted(known: Sequence[Known], seed: int, ratio: float) -> tuple[Maker, int]:
    """Batches of single responses of the same pairs, of which a part, `ratio`, is whole; others lost one."""
    some, rng = drawn(known, seed, "pairs"), random.Random(seed)
    whole = set(rng.sample(range(len(some)), round(ratio * len(some))))
    single = [(i, k) for i in range(len(some)) for k in ((0, 1) if i in whole else (rng.randrange(2),))]
    rng.shuffle(single)
    steps = math.ceil(len(single) / (2 * PAIRS))

    def make(step: int) -> Batch:
        sides: dict[int, list[int]] = {}
        for i, k in single[2 * PAIRS * step : 2 * PAIRS * (step + 1)]:
            sides.setdefault(i, []).append(k)
        return batch([some[i] for i in sides], list(sides.values()))

    return make, steps


def together(known: Sequence[Known], seed: int, pick: str = "all") -> tuple[Maker, int]:
    """Batches of groups: four answers of each, "all" of them or as a pair the best and a "random" one or the "worst";
    or all "six"."""
    some, rng = drawn(known, seed, "groups"), random.Random(seed)
    which = [sorted(rng.sample(range(len(its.unit.completions)), SHOWN)) for its in some]
    if pick == "six":
        which = [[*range(len(its.unit.completions))] for its in some]
    if pick in ("random", "worst"):
        which = [[its[0], its[-1] if pick == "worst" else rng.choice(its[1:])] for its in which]
    steps = math.ceil(len(some) / GROUPS)

    def make(step: int) -> Batch:
        place = slice(GROUPS * step, GROUPS * (step + 1))
        return batch(some[place], which[place], stacked=pick in ("random", "worst"))

    return make, steps


def _pair(method: Method, sides: Sequence[int] = (0, 1), then: str = "") -> Trial:
    return Trial("pairs", method, partial(both, sides=sides), then)


def _group(objective: str, pick: str = "all", **options: Any) -> Trial:
    return Trial("groups", (objective, options), partial(together, pick=pick))


TRIALS: dict[str, Trial] = {  # in the order in which they are run
    "BNF": _pair(MOVERS["BNF"]),
    "DPO": _pair(MOVERS["DPO"]),
    "NLL+PLL": _pair(("nll_pll", {})),
    "SimPO": _pair(MOVERS["SimPO"]),
    "IPO": _pair(MOVERS["IPO"]),
    **{f"{ratio:.0%}": Trial("pairs", ("bnf", {}), partial(parted, ratio=ratio)) for ratio in RATIOS if ratio < 1},
    "SWEPO, p = 1": _group("swepo", p=1),
    "InfoNCA": _group("infonca"),
    "DPO, best and random": _group("dpo", "random"),
    "SWEPO, p = 0": _group("swepo", p=0),
    "NCA": _group("nca"),
    "DPO, best and worst": _group("dpo", "worst"),
    "SWEPO, p = 2": _group("swepo", p=2),
    "SWEPO, one against all, p = 0": _group("swepo", p=0, mode="one_vs_all"),
    "MLE": _pair(FOUR["MLE"], (0,)),
    "ExMATE": _pair(FOUR["ExMATE"]),
    "unlikelihood": _pair(FOUR["unlikelihood"]),
    "MLE, then DPO": _pair(FOUR["DPO"], then="MLE"),
    "ExMATE, then DPO": _pair(FOUR["DPO"], then="ExMATE"),
    "MLE, then ExMATE": _pair(FOUR["ExMATE"], then="MLE"),
    **{
        f"MC-PO, {sampler}": _group("mc_po", "six", sampler=sampler, beta=0.1)
        for sampler in ("mc", "random", "max", "min")
    },
}


class Run(NamedTuple):
    """A line of the results."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.rate:g}, seed {self.seed}"


def planned(method: str, seeds: int, lines: Lines) -> list[Run]:
    """The runs of a method that are known by now."""
    best = best_rate(method, lines)
    sweep = [Run(method, rate, 0) for rate in RATES]
    return sweep + ([Run(method, best, seed) for seed in range(1, seeds)] if best is not None else [])


def left(methods: Sequence[str], seeds: int, lines: Lines) -> Iterator[tuple[Run, float | None]]:
    """The runs that can be done now, and the learning rate of the stage before each, if there is one."""
    for method in methods:
        before = TRIALS[method].then
        first = best_rate(before, lines) if before else None
        for run in planned(method, seeds, lines):
            if run not in lines and (not before or (before, first, run.seed) in lines):
                yield run, first


def carry_out(world: World, run: Run, first: float | None) -> dict[str, Any]:
    """Train and measure; `first` is the learning rate of the stage before, whose layers are in `work`."""
    trial, start = TRIALS[run.method], time.monotonic()
    known = getattr(world, trial.kind)
    upper, reference = Upper(world.model, world.layers), None
    upper.requires_grad_(True)
    if first is not None:
        state = torch.load(stored(world, Run(trial.then, first, run.seed)), weights_only=True)
        upper.load_state_dict(state)
        reference = Upper(world.model, world.layers)
        reference.load_state_dict(state)
    objective, given = trial.method
    options = {**given, "generator": torch.Generator().manual_seed(run.seed)} if objective == "mc_po" else dict(given)
    if objective == "mc_po":
        options["group_size"] = len(known["train"][0].unit.completions)
    make, steps = trial.feed(known["train"], run.seed)
    steps = min(2, steps) if world.quick else steps
    losses = train(upper, world.head, make, objective, rate=run.rate, steps=steps, reference=reference, **options)
    if any(other.then == run.method for other in TRIALS.values()):
        save_whole_file(stored(world, run), partial(torch.save, upper.state_dict()))
    parts = ("test", "own", "valid") if run.seed == 0 else ("test", "own")
    measured = {name: measure(upper, world.head, known[name]) for name in parts if name in known}
    save_whole_file(shifts_of(world, run), partial(torch.save, measured["test"][1]))
    found: dict[str, Any] = {**run._asdict(), "steps": steps, "losses": [losses[0], losses[-1]]}
    found |= {name: numbers for name, (numbers, _) in measured.items()}
    return {**found, "seconds": round(time.monotonic() - start), "provenance": provenance("cpu")}


def stored(world: World, run: Run) -> Path:
    """Where the layers after a run are, if another stage follows it."""
    return _place(world, "layers", run)


def shifts_of(world: World, run: Run) -> Path:
    """Where the shift of log p of each held-out token is."""
    return _place(world, "shifts", run)


def _place(world: World, folder: str, run: Run) -> Path:
    (world.work / folder).mkdir(parents=True, exist_ok=True)
    return world.work / folder / f"{run.name}.pt"


def start_of(world: World, kind: str) -> dict[str, Any]:
    """The line that the others are read with: the start's likelihoods, and the rewards of groups."""
    known = getattr(world, kind)
    found = {name: likelihoods(known[name]) for name in ("test", "own", "valid") if name in known}
    for name in found if kind == "groups" else ():
        found[name]["rewards"] = [round(x, 4) for its in known[name] for x in its.unit.rewards]
    settings = {
        "model": world.path.name, "layers": world.layers, "prompt": PROMPT,
        "reply": REPLY if kind == "pairs" else ANSWER, "units": TRAINED[kind], "drawn from": FROM[kind],
        "answers": 2 if kind == "pairs" else SHOWN,
    }  # fmt: skip
    return {"method": f"start of {kind}", "rate": 0.0, "seed": 0, **found, "settings": settings}


def append(path: Path, line: Line) -> None:
    """One more line, whole also beside another process that writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
    finally:
        os.close(place)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are left: 0, or 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="SmolLM2-135M-Instruct, a GGUF file or a folder; see `make real`")
    add("--work", type=Path, required=True, metavar="DIR", help="folder for what stays the same between runs")
    add("--hh-rlhf", type=Path, metavar="DIR", help="folder with train.jsonl.gz of HH-RLHF")
    add("--alpaca-eval", type=Path, metavar="FILE", help="JSON lines with prompt, completions and rewards")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results; default: the project's")
    add("--only", nargs="+", metavar="METHOD", choices=TRIALS, help=f"some of: {'; '.join(TRIALS)}")
    add("--seeds", type=argument(positive), default=SEEDS, help="runs at the best rate; default %(default)s")
    add("--minutes", type=float, default=math.inf, help="start no run after so many")
    add("--list", action="store_true", help="only print the runs, and which are done")
    add("--quick", action="store_true", help="few texts and steps, to see that everything runs")
    a = parser.parse_args(argv)
    if a.quick and a.out.resolve() == RESULTS:
        parser.error("--quick: expected another folder as --out, got the project's own")
    methods, path, began = a.only or list(TRIALS), a.out / REAL, time.monotonic()
    if a.list:
        lines = runs_of(a.out)
        for method in methods:
            runs = planned(method, a.seeds, lines)
            done = [run for run in runs if run in lines]
            print(f"{method}: {len(done)} of {len(RATES) + a.seeds - 1}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    data = {key: place for key, place in (("hh_rlhf", a.hh_rlhf), ("alpaca_eval", a.alpaca_eval)) if place is not None}
    world, locks = World(a.model, data, a.work, a.quick), a.work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        for run, first in left(methods, a.seeds, runs_of(a.out)):
            if (time.monotonic() - began) / 60 > a.minutes:
                LOG.info("no time left")
                return 0
            with claimed(locks / run.name) as mine:
                if not mine or run in runs_of(a.out):
                    continue
                try:
                    kind = TRIALS[run.method].kind
                    with claimed(locks / f"start of {kind}", wait=True):
                        if (f"start of {kind}", 0.0, 0) not in runs_of(a.out):
                            append(path, start_of(world, kind))
                    found = carry_out(world, run, first)
                except ValueError as error:
                    if not str(error).startswith("--"):
                        raise
                    parser.error(f"{run.method}: {error}")
                append(path, found)
            LOG.info("%s: %d s; %d lines", run.name, found["seconds"], len(runs_of(a.out)))
            break  # rates may have been decided: from the first method on
        else:
            return 0


if __name__ == "__main__":
    sys.exit(main())
