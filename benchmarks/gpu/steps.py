"""The parts of whole training steps: their time and memory with a 1B-class model, and whether the curves agree.

In both, naive is what a user of plain transformers writes: the model's full logits, raised to float32, `log_softmax`,
`gather`, and the papers' equations over the tokens that count. It is spared what it can be spared: targets are shifted
and not the logits, so that no copy of these is made, and BNF's 1 − p is kept above float32's epsilon, without which
one certain token makes its gradient NaN.

Dimensions: B responses of length T, n of their tokens count, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from rgpb import hf
from rgpb.bench.cases import DTYPES
from rgpb.bench.measure import quantiles
from rgpb.demo import arithmetic_pairs
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.hf import IGNORE

from .journal import Journal, Settings, Task, explain, release
from .lineup import KERNELS, plan_of

BETA = 0.1  # of DPO, the library's default
IMPLS = ("naive", "fused")  # naive first: fused is compared with it


# -- naive PyTorch, and the library ------------------------------------------------------------------------------------


def loss_value(model: Any, batch: dict[str, Tensor], loss: str, impl: str, ref: Any = None) -> Tensor:
    """The loss of a batch, pairs stacked [chosen; rejected]; `ref`: log π_ref [B, T], for "fused" anything it takes."""
    if impl == "naive":
        target = hf.aligned_targets(batch["labels"])
        return plain_loss(loss, *scored(loss, log_probs(model, batch), target), target != IGNORE, ref)
    more: dict[str, Any] = {} if loss == "mle" else {"ref": ref}
    if loss == "bnf":
        more["label"] = preferred(batch["labels"])
    return hf.loss(model, batch, loss, **more)


def log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B, T, V], float32; nobody holds the logits any longer."""
    return model(input_ids=batch["input_ids"], use_cache=False).logits.float().log_softmax(-1)


def scored(loss: str, log_p: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """log p of the targets and, for BNF, Σ p_k log p_k over all other tokens k, p_k detached. [..., V] → [...]"""
    logp = log_p.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    if loss != "bnf":
        return logp, None
    return logp, (log_p.detach().exp() * log_p).sum(-1) - logp.detach().exp() * logp


def plain_loss(loss: str, logp: Tensor, others: Tensor | None, mask: Tensor, ref: Tensor | None) -> Tensor:
    """The papers' equations, as in `rgpb.bench.cases`, of the tokens that `mask` leaves. All [B, T] → 0-d."""

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum(-1) / mask.sum(-1)

    if loss == "mle":
        return -mean(logp).mean()
    assert ref is not None
    if loss == "dpo":
        chosen, rejected = ((logp - ref) * mask).sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()
    assert others is not None
    f_target = (logp.detach() - ref).exp().clamp(max=1)
    f_others = (1 - f_target) / (1 - logp.detach().exp()).clamp(min=torch.finfo(logp.dtype).eps)
    label = 2.0 * preferred(logp) - 1
    return -(label * mean(f_target * logp + f_others * others)).mean()


def preferred(responses: Tensor) -> Tensor:
    """The first half of the responses is chosen. [B, …] → bool [B]"""
    return torch.arange(len(responses), device=responses.device) < len(responses) // 2


def make_llama(sizes: dict[str, Any], dtype: torch.dtype, device: str, attention: str, seed: int) -> Any:
    """A Llama with random weights, made on the device, ready to be trained."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype, attn_implementation=attention)
    return model.train()


# -- steps: time and memory --------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What is trained, and on what.

    Attributes:
        name: of the model whose sizes these are.
        sizes: for its config.
        dtype: of weights, gradients and optimiser states.
        prompt: tokens of each response that don't count.
        lengths: T, one pair each.
    """

    name: str
    sizes: dict[str, Any]
    dtype: str
    prompt: int
    lengths: tuple[int, ...]


MODELS = {
    "cuda": Model(
        "Llama-3.2-1B",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
        "bf16", 128, (4096, 16384, 65536),
    ),
    "cpu": Model(  # as much as shows that it runs
        "tiny Llama",
        {
            "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
        "fp32", 3, (16, 33),
    ),
}  # fmt: skip
LOSSES = ("bnf", "dpo")
EXACT_ROWS = 1024
# Timing of one row ends after so many seconds, or `Settings.rounds` steps, but not before this many.
ROW_SECONDS, LEAST_STEPS = 6.0, 3
GRADIENT = {"bf16": 0.1, "fp32": 1e-3}  # what all gradients together may be off, in norm: 16 layers round to 8 bits


class Pair(NamedTuple):
    """A chosen and a rejected response of one length, and what their losses are.

    Attributes:
        batch: input_ids and labels [2, T].
        ref: float32 log π_ref [2, T], where each label is predicted.
        expected: the losses, from float32 logits of the model's own hidden states.
        counted: n.
    """

    batch: dict[str, Tensor]
    ref: Tensor
    expected: dict[str, float]
    counted: int


class Llama:
    """The model, its optimiser and the pair of one length; each made when first asked for, shared by all rows.

    The learning rate is 0: AdamW does all its work and moves no weight, so every row sees the same model.
    """

    def __init__(self, settings: Settings):
        self.settings, self.made = settings, MODELS[settings.device]
        self.dtype = settings.dtype or self.made.dtype
        self.known: dict[int, Pair] = {}
        self.truth: dict[tuple[int, str], list[Tensor]] = {}

    @cached_property
    def model(self) -> Any:
        """With gradient checkpointing."""
        model = make_llama(self.made.sizes, DTYPES[self.dtype], self.settings.device, "sdpa", 0)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """With its states, which a step with gradients of 0 makes."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=self.settings.device == "cuda")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def pair(self, length: int) -> Pair:
        """That of one length is held at a time."""
        if length not in self.known:
            self.known.clear()
            self.known[length] = make_pair(self.model, length, self.made.prompt)
        return self.known[length]

    def graded(self, length: int, loss: str, impl: str) -> Tensor:
        """The loss, and gradients in the parameters."""
        pair = self.pair(length)
        value = loss_value(self.model, pair.batch, loss, impl, pair.ref)
        value.backward()
        return value.detach()

    def true_gradients(self, length: int, loss: str) -> list[Tensor]:
        """Of the parameters, from float32 logits made some rows at a time and made again in the backward, by no means
        of this library; in the host's memory, of one length and loss at a time."""
        if (length, loss) not in self.truth:
            self.truth.clear()
            pair = self.pair(length)
            target = hf.aligned_targets(pair.batch["labels"])
            hidden = hf.hidden_states(self.model, pair.batch["input_ids"]).flatten(0, 1)
            weight = hf.read_head(self.model).weight.float()
            rows = zip(hidden.split(EXACT_ROWS), target.flatten().split(EXACT_ROWS))
            found = [checkpoint(scored_rows, loss, x, weight, y, use_reentrant=False) for x, y in rows]
            logp = torch.cat([part[0] for part in found]).view(target.shape)
            others = torch.cat([part[1] for part in found]).view(target.shape) if loss == "bnf" else None
            value = plain_loss(loss, logp, others, target != IGNORE, pair.ref)
            gradients = torch.autograd.grad(value, [*self.model.parameters()])
            self.truth[length, loss] = [g.cpu() for g in gradients]
        return self.truth[length, loss]

    def gradient_error(self, length: int, loss: str) -> float:
        """‖error‖ / ‖gradient‖ of all parameters' gradients together."""
        off = size = 0.0
        for parameter, true in zip(self.model.parameters(), self.true_gradients(length, loss)):
            true = true.to(parameter.device).float()
            off += (parameter.grad.float() - true).square().sum(dtype=torch.float64).item()
            size += true.square().sum(dtype=torch.float64).item()
        return (off / size) ** 0.5

    def update(self) -> None:
        """The rest of a step: gradients are gone afterwards."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tidy(self, status: str) -> None:
        """Free what a row left; after anything but "ok" and "out of memory" also the model, which may hold NaN."""
        if status not in ("ok", "out of memory"):
            self.known.clear()
            self.truth.clear()
            for name in ("optimizer", "model"):
                self.__dict__.pop(name, None)
        elif "model" in self.__dict__:
            self.model.zero_grad()
        with suppress(RuntimeError):  # of a device that doesn't answer any more: `work` finds out
            release(self.settings.device)


def scored_rows(loss: str, x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """`scored`, of states [C, H] and a float32 head."""
    return scored(loss, F.linear(x.float(), weight).log_softmax(-1), y)


def make_pair(model: Any, length: int, prompt: int) -> Pair:
    """Random tokens, scored in float32 some rows at a time, by no means of this library.

    The reference's log-probabilities are the policy's own and noise, which caps BNF's ratio for some tokens. Its sums
    are 5 below the policy's for the chosen response and 5 above for the rejected, so DPO's β (Δ_w − Δ_l) is 1.
    """
    device, vocab = model.device, model.config.vocab_size
    random = torch.Generator(device).manual_seed(length)
    ids = torch.randint(vocab, (2, length), generator=random, device=device)
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    batch, target = {"input_ids": ids, "labels": labels}, hf.aligned_targets(labels)
    mask = target != IGNORE
    with hf.evaluating(model):
        hidden = hf.hidden_states(model, ids).flatten(0, 1)
        weight = hf.read_head(model).weight.float()
        rows = zip(hidden.split(EXACT_ROWS), target.flatten().split(EXACT_ROWS))
        found = [scored_rows("bnf", x, weight, y) for x, y in rows]
        logp, others = (torch.cat(parts).view(target.shape) for parts in zip(*found))  # type: ignore[arg-type]
        noise = 0.3 * torch.randn(target.shape, generator=random, device=device) * mask
        shift = noise.new_tensor([[-5.0], [5.0]]) - noise.sum(1, keepdim=True)
        ref = ((logp + noise + shift / mask.sum(1, keepdim=True)) * mask).clamp(max=0)
        expected = {loss: plain_loss(loss, logp, others, mask, ref).item() for loss in LOSSES}
    return Pair(batch, ref, expected, int(mask[0].sum()))


def tasks(journal: Journal, settings: Settings) -> Iterator[Task]:
    """One training step of one pair at each length, with each loss, naive and fused. `settings.shapes` has no say."""
    llama = Llama(settings)
    for length in llama.made.lengths:
        for loss in LOSSES:
            for impl in IMPLS:
                yield Task(step_key(llama, length, loss, impl), partial(step_row, journal, llama, length, loss, impl))
    llama.tidy("done")


def step_key(llama: Llama, length: int, loss: str, impl: str) -> str:
    """The key of a row."""
    return f"{llama.made.name} | {llama.dtype} | {length} | {loss} | {impl}"


def step_row(journal: Journal, llama: Llama, length: int, loss: str, impl: str) -> dict[str, Any]:
    """Forward, backward and AdamW: checked, then timed.

    Right means, of the first step: the loss is off that of float32 logits by no more than `tolerance`, the gradients
    off those by no more than `GRADIENT`; and where naive ran, fused is off naive's loss by no more than its tolerance.

    expected: the loss from float32 logits. base_bytes: weights and optimiser states, held before the step. peak_bytes:
    the most that was held during one, all of that included. over_naive: ratio of the medians, which no round has
    in common.
    """
    row: dict[str, Any] = {
        "model": llama.made.name, "parameters": None, "dtype": llama.dtype, "length": length, "tokens": 2 * length,
        "loss": loss, "impl": impl, "path": None, "kernels": None,
        "workspace": DEFAULT_WORKSPACE if impl == "fused" else None, "status": "ok", "value": None, "expected": None,
        "gradient_error": None, "seconds": None, "seconds_20": None, "seconds_80": None, "steps": None,
        "tokens_per_second": None, "peak_bytes": None, "base_bytes": None, "over_naive": None,
    }  # fmt: skip
    naive = journal.rows.get(step_key(llama, length, loss, "naive"), {}) if impl == "fused" else {}
    try:
        fill(row, llama, naive if naive.get("status") == "ok" else None)
    except Exception as error:
        row["status"] = explain(error)
    llama.tidy(row["status"])  # outside the handler: the traceback holds what the step held
    return row


def fill(row: dict[str, Any], llama: Llama, naive: dict[str, Any] | None) -> None:
    """Run a row's steps: the first is checked, the others are timed."""
    length, loss, impl, device = row["length"], row["loss"], row["impl"], llama.settings.device
    states = [x for state in llama.optimizer.state.values() for x in state.values()]
    row["parameters"] = sum(p.numel() for p in llama.model.parameters())
    row["base_bytes"] = sum(x.nbytes for x in (*llama.model.parameters(), *states))
    pair = llama.pair(length)
    if impl == "fused":
        row["path"], row["kernels"] = taken(llama, pair, loss)
    row["expected"] = pair.expected[loss]
    row["value"] = llama.graded(length, loss, impl).item()
    row["gradient_error"] = llama.gradient_error(length, loss)
    if not right(row, pair.counted, naive):
        row["status"] = "FAILED"
        return
    llama.update()
    release(device)
    llama.graded(length, loss, impl)  # the allocator's cache is empty now
    llama.update()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < LEAST_STEPS or (len(times) < llama.settings.rounds and sum(times) < ROW_SECONDS):
        start = time.perf_counter()
        llama.graded(length, loss, impl)
        llama.update()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    row |= dict(zip(("seconds", "seconds_20", "seconds_80"), quantiles(times)))
    row |= {"steps": len(times), "tokens_per_second": row["tokens"] / row["seconds"]}
    if naive is not None:
        row["over_naive"] = row["seconds"] / naive["seconds"]


def right(row: dict[str, Any], counted: int, naive: dict[str, Any] | None) -> bool:
    """Whether the first step's loss and gradients are what `step_row` says; a NaN isn't."""
    off = abs(row["value"] - row["expected"])
    fine = off <= tolerance(row["loss"], row["impl"], row["dtype"], counted)
    fine = fine and row["gradient_error"] <= GRADIENT[row["dtype"]]
    if naive is None:
        return fine
    off = abs(row["value"] - naive["value"])
    return fine and off <= tolerance(row["loss"], "naive", row["dtype"], counted)


def tolerance(loss: str, impl: str, dtype: str, counted: int) -> float:
    """What a loss may be off the one from float32 logits: 1e-4 a token, and for naive in bfloat16 2⁻⁷.

    Naive rounds its logits to 8 bits, so a log-probability of a random model, whose logits are below 4, is off by up to
    2⁻⁷ and mostly by a fourth of that. BNF has the mean of the tokens; DPO β times a sum of 2n, in which such errors,
    as often up as down, grow with the square root.
    """
    one = max(1e-4, torch.finfo(DTYPES[dtype]).eps) if impl == "naive" else 1e-4
    return one if loss == "bnf" else one * max(1.0, BETA * (2 * counted) ** 0.5)


def taken(llama: Llama, pair: Pair, loss: str) -> tuple[str, str]:
    """The path and, as in `KERNELS`, the kernels that the library takes by itself."""
    head, target = hf.read_head(llama.model), hf.aligned_targets(pair.batch["labels"])
    hidden = head.weight.new_empty(()).expand(*target.shape, head.weight.shape[1]).requires_grad_()
    plan = plan_of(hidden, head, target, loss, "mean", DEFAULT_WORKSPACE, {})
    names = (name for name, (impl, engine) in KERNELS.items() if impl == plan.impl and engine in (None, plan.engine))
    return plan.path, next(names)


# -- training: curves --------------------------------------------------------------------------------------------------


class Course(NamedTuple):
    """A small model and its training.

    Attributes:
        sizes: for its config.
        steps: of training.
        pairs: in a batch.
        data: pairs to train on; held: pairs held out.
        lr: highest learning rate, for each loss; risen to within `WARMUP` steps, then held.
    """

    sizes: dict[str, Any]
    steps: int
    pairs: int
    data: int
    held: int
    lr: dict[str, float]


# V is a prime, off every tile.
COURSES = {
    "cuda": Course(
        {
            "vocab_size": 32003, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "max_position_embeddings": 32, "tie_word_embeddings": True,
        },
        300, 64, 4096, 256, {"mle": 1e-3, "bnf": 5e-5, "dpo": 5e-5},
    ),
    "cpu": Course(
        {
            "vocab_size": 2749, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
        },
        6, 4, 16, 4, {"mle": 1e-2, "bnf": 1e-3, "dpo": 1e-3},
    ),
}  # fmt: skip
SEEDS = (0, 1, 2)
PRECISIONS = {"naive": "fp32", "fused": "bf16"}
SIGNS = "0123456789+=,."  # those of the sums, and "." to fill up
WARMUP, SMOOTH = 20, 20  # steps


class School:
    """The texts, and the last seed's float32 model after `mle`; each made when first asked for.

    A text's characters are taken by threes, and each three has a word of the vocabulary, drawn once for all: so a few
    of many words occur, anywhere among them, as in a real vocabulary of which a domain has its part.
    """

    def __init__(self, settings: Settings):
        self.settings, self.course = settings, COURSES[settings.device]
        self.known: dict[int, tuple[list[float], Any]] = {}

    @cached_property
    def words(self) -> tuple[Tensor, int]:
        """Tokens of all pairs, int64 [2, pairs, T], chosen first; how many of them are the prompt's."""
        course, device = self.course, self.settings.device
        pairs = arithmetic_pairs(course.data + course.held, 0)
        table = torch.randperm(course.sizes["vocab_size"], generator=torch.Generator().manual_seed(0))
        prompt = len(pairs[0]["prompt"])  # 6, of all; the answers' 19 are filled up to 21

        def tokens(text: str) -> list[int]:
            places = [SIGNS.index(sign) for sign in text.ljust(-(-len(text) // 3) * 3, ".")]
            return [table[a + 14 * (b + 14 * c)].item() for a, b, c in zip(*(places[i::3] for i in range(3)))]  # type: ignore[misc]

        texts = [[tokens(pair["prompt"] + pair[which]) for pair in pairs] for which in ("chosen", "rejected")]
        return torch.tensor(texts, device=device), prompt // 3

    def batch(self, loss: str, rows: Tensor) -> dict[str, Tensor]:
        """Those pairs, stacked [chosen; rejected]; for `mle` only the chosen."""
        words, prompt = self.words
        ids = words[: 1 if loss == "mle" else 2, rows].flatten(0, 1)
        labels = ids.clone()
        labels[:, :prompt] = IGNORE
        return {"input_ids": ids, "labels": labels}

    def order(self, seed: int) -> Tensor:
        """The pairs of each step, int64 [steps, pairs]: the data again and again, each time in another order."""
        course, random = self.course, torch.Generator().manual_seed(seed)
        needed = course.steps * course.pairs
        passes = [torch.randperm(course.data, generator=random) for _ in range(-(-needed // course.data))]
        return torch.cat(passes)[:needed].view(course.steps, course.pairs).to(self.settings.device)

    def start(self, seed: int) -> tuple[list[float], Any]:
        """The curve of naive `mle` in float32, and the model after it."""
        if seed not in self.known:
            self.known.clear()
            self.known[seed] = self.train("mle", seed, "naive")
        return self.known[seed]

    def train(self, loss: str, seed: int, impl: str) -> tuple[list[float], Any]:
        """The curve, and the trained model: `mle` from random weights, the others from `start`, their reference.

        The curve ends with a NaN where a loss or a gradient isn't finite.
        """
        course = self.course
        model, teacher = self.new(seed), None
        if loss != "mle":
            teacher = self.start(seed)[1]
            model.load_state_dict(teacher.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr[loss])
        curve: list[float] = []
        for step, rows in enumerate(self.order(seed)):
            optimizer.param_groups[0]["lr"] = course.lr[loss] * min(1.0, (step + 1) / WARMUP)
            batch = self.batch(loss, rows)
            ref = None if teacher is None else self.reference(teacher, batch, impl)
            with self.autocast(impl):
                value = loss_value(model, batch, loss, impl, ref)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            curve.append(round(value.item(), 6) if norm.isfinite() else math.nan)
            if not math.isfinite(curve[-1]):
                break
            optimizer.step()
            optimizer.zero_grad()
        return curve, model

    def new(self, seed: int) -> Any:
        """Random weights. Attention is "eager": its backward adds up in one order."""
        return make_llama(self.course.sizes, torch.float32, self.settings.device, "eager", seed)

    def autocast(self, impl: str) -> torch.autocast:
        """bfloat16 for the library."""
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=PRECISIONS[impl] == "bf16")

    def reference(self, teacher: Any, batch: dict[str, Tensor], impl: str) -> Any:
        """The teacher's scores, made by the means of whoever asks."""
        with hf.evaluating(teacher), self.autocast(impl):
            if impl == "fused":
                return hf.token_scores(teacher, batch)
            return scored("dpo", log_probs(teacher, batch), hf.aligned_targets(batch["labels"]))[0]

    def examine(self, model: Any, loss: str, seed: int) -> float:
        """The loss of the pairs held out, naive in float32 whoever trained the model."""
        course = self.course
        batch = self.batch(loss, torch.arange(course.data, course.data + course.held, device=self.settings.device))
        ref = None if loss == "mle" else self.reference(self.start(seed)[1], batch, "naive")
        with hf.evaluating(model):
            return loss_value(model, batch, loss, "naive", ref).item()


def training(journal: Journal, settings: Settings) -> Iterator[Task]:
    """The same training, fused in bfloat16 (autocast, float32 weights) and naive in float32: do the curves agree?

    A seed gives the weights and the order of the pairs, the same for both. `mle` learns the chosen answers of
    `rgpb.demo`'s sums; `bnf` and `dpo` go on from the model that naive `mle` in float32 has made, with the pairs.
    """
    school = School(settings)
    for seed in SEEDS:
        for loss in ("mle", *LOSSES):
            for impl in IMPLS:
                yield Task(f"{loss} | {seed} | {impl}-{PRECISIONS[impl]}", partial(curve_row, school, loss, seed, impl))
    del school
    release(settings.device)


def curve_row(school: School, loss: str, seed: int, impl: str) -> dict[str, Any]:
    """One training: the loss of each step, and of the held-out pairs at the end; "FAILED" where one isn't finite."""
    row: dict[str, Any] = {
        "loss": loss, "seed": seed, "impl": impl, "precision": PRECISIONS[impl], "vocab": None, "steps": None,
        "status": "ok", "eval": None, "curve": [],
    }  # fmt: skip
    try:
        is_start = (loss, impl) == ("mle", "naive")
        row["curve"], model = school.start(seed) if is_start else school.train(loss, seed, impl)
        row |= {"vocab": model.config.vocab_size, "steps": len(row["curve"])}
        row["eval"] = round(school.examine(model, loss, seed), 6)
        if not math.isfinite(row["curve"][-1]) or not math.isfinite(row["eval"]):
            row["status"] = "FAILED"
    except Exception as error:
        row["status"] = explain(error)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far fused and naive are apart, beside how far seeds are: a line for each loss, of seeds that both finished.

    seed_std: standard deviation of naive's loss over the seeds, mean over the steps. difference: |fused − naive| of the
    same seed and step, mean; largest_smoothed: its largest after means of `SMOOTH` steps. inside: part of the so
    smoothed steps at which fused's mean over the seeds lies within naive's range over the seeds, and naive's within
    fused's. eval, naive_eval, eval_std: the held-out loss, mean over the seeds, and naive's deviation over these.
    """
    return {"table": [compared(loss, rows) for loss in dict.fromkeys(row["loss"] for row in rows)]}


def compared(loss: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of a loss."""
    ok = {(row["impl"], row["seed"]): row for row in rows if (row["loss"], row["status"]) == (loss, "ok")}
    seeds = sorted(seed for impl, seed in ok if impl == "naive" and ("fused", seed) in ok)
    failed = sum(row["status"] != "ok" for row in rows if row["loss"] == loss)
    line: dict[str, Any] = {
        "loss": loss, "seeds": len(seeds), "failed": failed, "steps": None, "seed_std": None, "difference": None,
        "largest_smoothed": None, "inside": None, "eval": None, "naive_eval": None, "eval_std": None,
    }  # fmt: skip
    if not seeds:
        return line
    fused, naive = (
        torch.tensor([ok[impl, seed]["curve"] for seed in seeds]).double() for impl in ("fused", "naive")
    )  # [seeds, steps]
    of_eval, naive_eval = (torch.tensor([ok[impl, seed]["eval"] for seed in seeds]) for impl in ("fused", "naive"))
    line |= {
        "steps": naive.shape[1],
        "difference": (fused - naive).abs().mean().item(),
        "largest_smoothed": smooth(fused - naive).abs().max().item(),
        "eval": of_eval.mean().item(),
        "naive_eval": naive_eval.mean().item(),
    }
    if len(seeds) > 1:
        a, b = smooth(fused), smooth(naive)
        line["inside"] = (within(a, b) & within(b, a)).double().mean().item()
        line |= {"seed_std": naive.std(0).mean().item(), "eval_std": naive_eval.std().item()}
    return line


def smooth(curves: Tensor) -> Tensor:
    """Means of `SMOOTH` steps that follow each other, or of all there are. [..., steps] → [..., fewer]"""
    return curves.unfold(-1, min(SMOOTH, curves.shape[-1]), 1).mean(-1)


def within(curves: Tensor, others: Tensor) -> Tensor:
    """Where the mean of the curves lies in the range of the others. [seeds, steps] → bool [steps]"""
    mean = curves.mean(0)
    return (others.amin(0) <= mean) & (mean <= others.amax(0))
