"""A DPO step in a trainer, side by side: `python -m benchmarks.trainer_step --out DIR [--model MODEL] [--layers N]`.

One Llama of SmolLM2-135M's sizes with random weights, or MODEL, a folder or a GGUF file; the same pairs of random
tokens, or of --pairs, for all; reference log-probabilities are computed before, so that a step is the policy's. Who
takes part: TRL's DPOTrainer with its own fused head, and with the library's (`rgpb.trl.accelerate`); Liger's fused DPO
loss on the model's hidden states, with π_ref = 1, since it takes no log-probabilities; naive PyTorch; and, with DPO and
with BNF, `rgpb.trl.PreferenceTrainer` and `rgpb.hf.loss`, also with `grad_tolerance="auto"` and with a `Workspace` that
is kept.

The whole step is forward, backward and AdamW, whose learning rate is 0, so that all see one model: they hold the same
parameters. The loss part is the same code on a model whose layers are replaced by their result: from hidden states to
the gradients of hidden states and head. It is checked against float64, and whoever fails is not timed. Both are timed
in interleaved rounds. The peak is that of a whole step in a process of its own: its resident memory at the worst
moment, with all that it has loaded.

Dimensions: B responses, chosen before rejected, T tokens of each, V vocabulary, H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks.gpu.steps import BETA, SIZES, optimizer_of, plain_loss, scored, tolerance
from benchmarks.skipping import rows_of
from rgpb import Workspace, hf
from rgpb.arguments import argument, positive
from rgpb.bench.contest import DTYPES, TOLERANCE, Batch, Job, errors, exact, finished
from rgpb.bench.measure import Result, explain, interleaved, provenance, version_of
from rgpb.bench.tables import free_table, save
from rgpb.hf import IGNORE
from rgpb.train.machine import peak_bytes, reset_peak
from rgpb.train.models import load_pretrained, load_tokenizer
from rgpb.train.tokens import train_tokenizer

SMOLLM2 = (49152, 576, 1536, 30, 9, 3, 8192)  # of `SIZES`
FIRST = "TRL's DPOTrainer"  # the others are compared with it

Run = Callable[[], Tensor]


class Pairs(NamedTuple):
    """The data of a step.

    Attributes:
        ids: int64 [B, T]; a pair shares its first token, which is the prompt.
        ref: float32 [B, T], log π_ref of the token behind each position, and 0 at the last.
    """

    ids: Tensor
    ref: Tensor


# -- who takes part: from model and pairs to what runs forward and backward, and returns the loss ----------------------


def naive(model: Any, pairs: Pairs, loss: str) -> Run:
    """All logits, in float32."""
    target = hf.aligned_targets(pairs.ids)

    def run() -> Tensor:
        log_p = model(input_ids=pairs.ids, use_cache=False).logits.float().log_softmax(-1)
        value = plain_loss(loss, *scored(loss, log_p, target), target != IGNORE, pairs.ref)
        del log_p  # the backward holds what it needs
        value.backward()
        return value.detach()

    return run


def fused(model: Any, pairs: Pairs, loss: str, **how: Any) -> Run:
    """`rgpb.hf.loss`."""
    batch = {"input_ids": pairs.ids, "labels": pairs.ids}
    label = torch.arange(len(pairs.ids)) < len(pairs.ids) // 2 if loss == "bnf" else None
    ref = pairs.ref if loss == "bnf" else pairs.ref.sum(1)

    def run() -> Tensor:
        value = hf.loss(model, batch, loss, label=label, ref=ref, **how)
        value.backward()
        return value.detach()

    return run


def liger(model: Any, pairs: Pairs, loss: str, **how: Any) -> Run:
    """`LigerFusedLinearDPOLoss` without a reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, **how)

    def run() -> Tensor:
        hidden = model.model(input_ids=pairs.ids, use_cache=False).last_hidden_state[:, :-1]
        value = module(model.lm_head.weight, hidden, pairs.ids[:, 1:].clone())[0]
        value.backward()
        return value.detach()

    return run


def trl(model: Any, pairs: Pairs, loss: str, accelerated: bool = False) -> Run:
    """`DPOTrainer`; `accelerated`: with the library's head in place of its own."""
    from trl import DPOTrainer

    import rgpb.trl

    sums = (side.sum(1).tolist() for side in pairs.ref.chunk(2))
    refs = [{"ref_chosen_logps": one, "ref_rejected_logps": other} for one, other in zip(*sums)]
    run = training(DPOTrainer, model, pairs, "sigmoid", refs)

    def fast() -> Tensor:
        with rgpb.trl.accelerate():
            return run()

    return fast if accelerated else run


def preference(model: Any, pairs: Pairs, loss: str, **options: Any) -> Run:
    """`rgpb.trl.PreferenceTrainer`."""
    from rgpb.trl import PreferenceTrainer

    logp = pairs.ref[:, :-1].double()
    sides = [(a.tolist(), b.tolist()) for a, b in zip(logp, logp - (-logp.expm1()).log())]
    names = [f"ref_{side}_{score}" for side in ("chosen", "rejected") for score in ("logp", "log_odds")]
    refs = [dict(zip(names, (*one, *other))) for one, other in zip(sides, sides[len(sides) // 2 :])]
    return training(PreferenceTrainer, model, pairs, loss, refs, options=options)


def training(kind: Any, model: Any, pairs: Pairs, loss: str, refs: list[dict[str, Any]], **more: Any) -> Run:
    """A trainer's `training_step` on a batch of its collator, with a reference that is there: `refs`, of each pair."""
    import datasets
    from trl import DPOConfig

    datasets.disable_progress_bars()
    given = type("Given", (kind,), {"_precompute_ref_logps": lambda self, dataset, name, batch_size: dataset})
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder, loss_type=[loss], beta=BETA, precompute_ref_log_probs=True, max_length=None, use_cpu=True,
            gradient_checkpointing=False, bf16=False, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = given(
            model, args=args, processing_class=train_tokenizer(["a"], 258), **more,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    chosen, rejected = (side.tolist() for side in pairs.ids.chunk(2))
    batch = trainer.data_collator([
        {"prompt_ids": one[:1], "chosen_ids": one[1:], "rejected_ids": other[1:], **ref}
        for one, other, ref in zip(chosen, rejected, refs)
    ])  # fmt: skip

    def run() -> Tensor:
        return trainer.training_step(trainer.model, batch)

    return run


class Way(NamedTuple):
    """Who takes part: its loss, what makes its run, and whether it is scored against π_ref = 1."""

    loss: str
    make: Callable[[Any, Pairs, str], Run]
    without_ref: bool = False


OURS: dict[str, Callable[[], dict[str, Any]]] = {
    "": dict,
    ", auto": partial(dict, grad_tolerance="auto"),
    ", kept": lambda: {"workspace": Workspace()},
    ", kept, auto": lambda: {"workspace": Workspace(), "grad_tolerance": "auto"},
}
WAYS = {
    FIRST: Way("dpo", trl),
    "rgpb.trl.accelerate()": Way("dpo", partial(trl, accelerated=True)),
    "Liger, 1 pair at a time": Way("dpo", liger, without_ref=True),
    "Liger, 4 pairs at a time": Way("dpo", partial(liger, chunk_size=4), without_ref=True),
}
for _loss in ("dpo", "bnf"):
    WAYS[f"naive, {_loss}"] = Way(_loss, naive)
    for _name, _how in OURS.items():
        WAYS[f"rgpb.hf.loss, {_loss}{_name}"] = Way(_loss, partial(fused, **_how()))
    for _name in ("", ", kept, auto"):
        WAYS[f"rgpb.trl.PreferenceTrainer, {_loss}{_name}"] = Way(_loss, partial(preference, **OURS[_name]()))


# -- the model and its twins -------------------------------------------------------------------------------------------


def twin_of(model: Any) -> Any:
    """A copy that holds the same parameters: what one contestant does to its modules, no other sees."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Fixed(nn.Module):
    """In the place of a model's layers: their result, whatever comes in."""

    def __init__(self, states: Tensor, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.states, self.embed_tokens = states, embed_tokens

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        whole = input_ids.shape == self.states.shape[:2]
        states: Any = self.states if whole else self.states[: len(input_ids), : input_ids.shape[1]]
        return BaseModelOutputWithPast(last_hidden_state=states)


def loss_part(model: Any, states: Tensor, way: Way, pairs: Pairs) -> Callable[[], Result]:
    """From hidden states [B, T, H] to the loss and the gradients of hidden states and head."""
    twin, hidden = twin_of(model), states.clone().requires_grad_()
    twin.model = Fixed(hidden, twin.model.embed_tokens)
    run, weight = way.make(twin, pairs, way.loss), twin.lm_head.weight

    def part() -> Result:
        value = run()
        gradients: Any = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        return Result(value, gradients)

    return part


def whole_step(run: Run, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward and optimiser."""
    value = run()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


# -- a process of its own ----------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How a process makes the model: of which folder, in what dtype (of `DTYPES`), and whether with checkpointing."""

    folder: Path
    dtype: str
    checkpointing: bool
    threads: int
    attention: str = "sdpa"

    def model(self) -> Any:
        torch.set_num_threads(self.threads)
        model: Any = load_pretrained(self.folder, DTYPES[self.dtype])
        model.set_attn_implementation(self.attention)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()


class Ended(NamedTuple):
    """What became of a process: "ok", "over the limit", or why it ended; what its work returned, or None."""

    status: str
    made: Any


def apart(work: Callable[[], Any], limit: int | None = None) -> Ended:
    """Do `work` in a fresh process, and end it when it has had more than `limit` bytes resident.

    What counts is the kernel's own peak (VmHWM of Linux), read ten times a second: no excess is missed, though it may
    last so long.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while not ours.poll(0.1):
            if limit is not None and _peak_of(process.pid) > limit:
                process.kill()
                return Ended("over the limit", None)
        return Ended(*ours.recv())
    except EOFError:
        process.join()
        return Ended(f"ended with {process.exitcode}", None)
    finally:
        ours.close()
        process.join()


def _work(work: Callable[[], Any], answer: Any) -> None:
    try:
        ended = "ok", work()
    except Exception as error:
        ended = explain(error), None
    answer.send(ended)


def _peak_of(process: int | None) -> int:
    """Bytes resident at its worst moment; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def weigh(setting: Setting, data: Path, name: str) -> int:
    """The most that the process held during one step."""
    model, way = setting.model(), WAYS[name]
    run, optimizer = way.make(model, Pairs(**torch.load(data, weights_only=True)), way.loss), optimizer_of(model)
    reset_peak(torch.device("cpu"))
    whole_step(run, optimizer)
    return peak_bytes(torch.device("cpu"))


# -- the race ----------------------------------------------------------------------------------------------------------


def random_model(layers: int | None, sizes: tuple[int, ...] | None = None) -> Any:
    """A Llama with random weights, tied."""
    given: dict[str, Any] = dict(zip(SIZES, sizes or SMOLLM2)) | ({"num_hidden_layers": layers} if layers else {})
    return LlamaForCausalLM(LlamaConfig(**given, tie_word_embeddings=True))


def tokens(a: argparse.Namespace, vocab: int) -> Tensor:
    """[B, T]: of the chosen texts end to end, then of the rejected; or random."""
    count = a.batch * a.length
    if a.pairs is None:
        ids = torch.randint(vocab, (2 * a.batch, a.length))
    else:
        tokenizer, sides = load_tokenizer(a.model), ([], [])  # type: tuple[Any, tuple[list[int], list[int]]]
        for row in rows_of(a.pairs):
            for side, name in zip(sides, ("chosen", "rejected")):
                side += tokenizer(row.get("prompt", "") + row[name])["input_ids"]
            if min(map(len, sides)) >= count:
                break
        if min(map(len, sides)) < count:
            raise ValueError(f"pairs: expected {count} tokens of each side, got {min(map(len, sides))} in {a.pairs}")
        ids = torch.tensor([side[:count] for side in sides]).view(-1, a.length)
    ids[a.batch :, 0] = ids[: a.batch, 0]
    return ids


def case_of(model: Any, ids: Tensor) -> tuple[Tensor, Batch]:
    """The last hidden states [B, T, H], and the loss part as `rgpb bench` has it."""
    with torch.no_grad():
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state.detach()
        weight = model.lm_head.weight.detach().clone()
    batch = finished(states[:, :-1].contiguous(), weight, ids[:, 1:], torch.Generator().manual_seed(0))
    label = torch.ones(len(ids))
    label[len(ids) // 2 :] = -1
    return states, batch._replace(label=label)


def checked(name: str, made: Result, truth: Result, dtype: str) -> dict[str, Any]:
    """Status, error of the loss and, over its norm, of a gradient; "FAILED" where one is too large."""
    impl, counted = "fused" if "rgpb" in name else "naive", made.gradients[0].shape[1] - 1
    value, _, gradient = errors(Result(made.value, (made.gradients[0][:, :-1], made.gradients[1])), truth)
    right = value <= tolerance(WAYS[name].loss, impl, dtype, counted) and gradient <= TOLERANCE[impl, DTYPES[dtype]][1]
    off = {"value off": value, "gradient off": gradient}
    return {"status": "ok" if right else "FAILED"} | {
        what: float(f"{x:.1e}") if math.isfinite(x) else None for what, x in off.items()
    }


def race(model: Any, names: list[str], ids: Tensor, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """A row for each way: status, milliseconds, peak, and all that over the first one's."""
    states, batch = case_of(model, ids)
    pairs, optimizer = Pairs(ids, F.pad(batch.ref, (0, 1))), optimizer_of(model)
    table: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], Result]] = {}
    steps: dict[str, Callable[[], float]] = {}
    truths: dict[tuple[str, bool], Result] = {}
    for name in names:
        way = WAYS[name]
        if (way.loss, way.without_ref) not in truths:
            seen = batch._replace(ref=torch.zeros_like(batch.ref)) if way.without_ref else batch
            truths[way.loss, way.without_ref] = exact(seen, Job(way.loss, "full"))
        row: dict[str, Any] = {"way": name, "loss": way.loss}
        try:
            part = loss_part(model, states, way, pairs)
            row |= checked(name, part(), truths[way.loss, way.without_ref], setting.dtype)
            if row["status"] == "ok":
                steps[name] = partial(whole_step, way.make(twin_of(model), pairs, way.loss), optimizer)
                parts[name] = part
        except Exception as error:
            row["status"] = explain(error)
            optimizer.zero_grad()
        table.append(row)
        print(f"{name}: {row['status']}", flush=True)
    torch.save(pairs._asdict(), setting.folder / "pairs.pt")
    for row in table:
        if row["status"] == "ok":
            status, peak = apart(partial(weigh, setting, setting.folder / "pairs.pt", row["way"]))
            row["status"], row["peak"] = status, peak
    timed: dict[str, Mapping[str, Callable[[], object]]] = {"step": steps, "loss part": parts}
    for what, runs in timed.items():
        times = interleaved(runs, rounds, "cpu")
        for row in table:
            if row["way"] in runs:
                row[f"{what}, ms"] = round(1e3 * times.quantiles(row["way"])[0], 1)
                row[f"{what} over TRL"] = round(times.over(row["way"], FIRST), 3) if FIRST in runs else None
    first = next((row["peak"] for row in table if row["way"] == FIRST and row.get("peak")), None)
    for row in table:
        if row.get("peak"):
            row["peak, MiB"] = round(row.pop("peak") / 2**20)
            row["peak over TRL"] = round(row["peak, MiB"] * 2**20 / first, 3) if first else None
    return table


def main(given: list[str] | None = None) -> None:
    """Measure, print the table, and write it with its provenance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_step", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder or a GGUF file; default: random weights")
    parser.add_argument("--pairs", type=Path, help="JSON Lines with chosen and rejected; default: random tokens")
    parser.add_argument("--layers", type=argument(positive), help="of the random model; default 30")
    for name, default in (("batch", 4), ("length", 512), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=argument(positive), default=default, help="default %(default)s")
    parser.add_argument("--dtype", choices=(*DTYPES,), default="fp32", help="of weights and states; default fp32")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="default: with")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="some of them by name")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    a = parser.parse_args(given)
    if a.pairs is not None and a.model is None:
        parser.error("pairs: expected a model with a tokenizer beside them, got none")
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    names = [name for name in WAYS if a.only.search(name)]
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(a.layers) if a.model is None else load_pretrained(a.model, torch.float32)
        ids = tokens(a, model.config.vocab_size)
        model.save_pretrained(folder)
        setting = Setting(Path(folder), a.dtype, a.checkpointing, a.threads)
        table = race(setting.model(), names, ids, setting, a.rounds)
    facts = provenance(
        "cpu", model="random" if a.model is None else a.model.name, layers=model.config.num_hidden_layers,
        pairs="random" if a.pairs is None else a.pairs.name, batch=a.batch, length=a.length, dtype=a.dtype,
        checkpointing=a.checkpointing, rounds=a.rounds, trl=version_of("trl"), transformers=version_of("transformers"),
        liger=version_of("liger-kernel"),
    )  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    save(a.out / "results.json", {"provenance": facts, "rows": [], "points": [], "table": table})
    print("\n".join(free_table(table)))


if __name__ == "__main__":
    main()
