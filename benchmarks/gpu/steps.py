"""Whole training steps of a 1B-class Llama: their time and memory, naive and fused.

Naive is what a user of plain transformers writes: the model's full logits, raised to float32, `log_softmax`, `gather`,
and the papers' equations over the tokens that count. It is spared what it can be spared: targets are shifted and not
the logits, and BNF's 1 − p is kept above float32's epsilon, without which one certain token makes its gradient NaN.

The learning rate is 0: AdamW does all its work and moves no weight, so every row sees the same model.

Dimensions: two responses of length T, n of their tokens count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from rgpb import hf
from rgpb.bench.contest import DTYPES
from rgpb.bench.measure import explain, interleaved, release
from rgpb.hf import IGNORE

from .journal import Journal, Settings, Task, single

BETA = 0.1  # of DPO, the library's default
LOSSES, IMPLS = ("bnf", "dpo"), ("naive", "fused")
EXACT_ROWS, ROW_SECONDS = 1024, 6.0
GRADIENT = {"bf16": 0.1, "fp32": 1e-3}  # what the norm of all gradients may be off: 16 layers round to 8 bits


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")  # fmt: skip
# Name and sizes, type of all numbers, tokens of a response that don't count, T. The toy only shows that it runs.
MODELS: dict[str, tuple[str, tuple[int, ...], str, int, tuple[int, ...]]] = {
    "cuda": ("Llama-3.2-1B", (128256, 2048, 8192, 16, 32, 8, 131072), "bf16", 128, (4096, 16384, 65536)),
    "cpu": ("tiny Llama", (257, 32, 48, 2, 4, 2, 64), "fp32", 3, (16, 33)),
}


def scored(loss: str, log_p: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """log p of the targets and, for BNF, Σ p_k log p_k over all other tokens k, p_k detached. [..., V] → [...]"""
    logp = log_p.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    if loss != "bnf":
        return logp, None
    return logp, (log_p.detach().exp() * log_p).sum(-1) - logp.detach().exp() * logp


def plain_loss(loss: str, logp: Tensor, others: Tensor | None, mask: Tensor, ref: Tensor) -> Tensor:
    """The papers' equations, as in `rgpb.bench.contest`, of the tokens that `mask` leaves. All [B, T], chosen before
    rejected → 0-d."""
    if loss == "dpo":
        chosen, rejected = ((logp - ref) * mask).sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()
    assert others is not None
    f_target = (logp.detach() - ref).exp().clamp(max=1)
    f_others = (1 - f_target) / (1 - logp.detach().exp()).clamp(min=torch.finfo(logp.dtype).eps)
    chosen, rejected = (((f_target * logp + f_others * others) * mask).sum(-1) / mask.sum(-1)).chunk(2)
    return -(chosen - rejected).mean() / 2


def optimizer_of(model: Any, fused: bool = False) -> torch.optim.AdamW:
    """AdamW of a learning rate of 0, with its states, which a step with gradients of 0 makes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=fused)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Llama:
    """Model, optimiser and the pair of one length, each made when first asked for, shared by all rows."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name, self.sizes, dtype, self.prompt, self.lengths = MODELS[settings.device]
        self.dtype = settings.dtype or dtype
        self.known: dict[Any, Any] = {}

    @cached_property
    def model(self) -> Any:
        """Random weights, made on the device; gradient checkpointing."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(zip(SIZES, self.sizes))
        config = LlamaConfig(**sizes, tie_word_embeddings=True)
        with torch.device(self.settings.device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype], attn_implementation="sdpa")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """Of all parameters."""
        return optimizer_of(self.model, fused=self.settings.device == "cuda")

    @torch.no_grad()
    def pair(self, length: int) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
        """input_ids and labels [2, T]; log π_ref: the policy's own with noise, so that BNF's ratio is capped for some,
        shifted so that DPO's β (Δ_w − Δ_l) is 1; and the losses from float32 logits made some rows at a time, not by
        this library. That of one length is held at a time."""
        if length not in self.known:
            self.known, device = {}, self.settings.device
            random = torch.Generator(device).manual_seed(length)
            ids = torch.randint(self.sizes[0], (2, length), generator=random, device=device)
            labels = ids.masked_fill(torch.arange(length, device=device) < self.prompt, IGNORE)
            target = hf.aligned_targets(labels)
            mask, weight = target != IGNORE, hf.read_head(self.model).weight.float()
            hidden = hf.hidden_states(self.model, ids).flatten(0, 1)
            rows = zip(hidden.split(EXACT_ROWS), target.flatten().split(EXACT_ROWS))
            found = [scored("bnf", F.linear(x.float(), weight).log_softmax(-1), y) for x, y in rows]
            logp, others = (torch.cat(parts).view(target.shape) for parts in zip(*found))  # type: ignore[arg-type]
            noise = 0.3 * torch.randn(logp.shape, generator=random, device=device) * mask
            shift = noise.new_tensor([[-5.0], [5.0]]) - noise.sum(1, keepdim=True)
            ref = ((logp + noise + shift / mask.sum(1, keepdim=True)) * mask).clamp(max=0)
            expected = {loss: plain_loss(loss, logp, others, mask, ref).item() for loss in LOSSES}
            self.known[length] = {"input_ids": ids, "labels": labels}, ref, expected
        return self.known[length]

    def graded(self, length: int, loss: str, impl: str) -> float:
        """The loss, and gradients in the parameters."""
        batch, ref, _ = self.pair(length)
        if impl == "naive":
            target = hf.aligned_targets(batch["labels"])
            log_p = self.model(input_ids=batch["input_ids"], use_cache=False).logits.float().log_softmax(-1)
            value = plain_loss(loss, *scored(loss, log_p, target), target != IGNORE, ref)
            del log_p  # the backward holds what it needs
        else:
            label = torch.tensor([True, False], device=ref.device) if loss == "bnf" else None
            value = hf.loss(self.model, batch, loss, ref=ref, label=label)
        value.backward()
        return value.item()

    def step(self, length: int, loss: str, impl: str) -> None:
        """Forward, backward and AdamW."""
        self.graded(length, loss, impl)
        self.optimizer.step()
        self.optimizer.zero_grad()


def tasks(journal: Journal) -> Iterator[Task]:
    """One training step of one pair at each length, with each loss, naive and fused. `--shape` has no say."""
    llama = Llama(journal.settings)
    for length in llama.lengths:
        for loss in LOSSES:
            for impl in IMPLS:
                key = f"{llama.name} | {llama.dtype} | {length} | {loss} | "
                naive = partial(journal.rows.get, key + "naive", {})
                yield single(key + impl, partial(row_of, llama, length, loss, impl, naive))


def row_of(llama: Llama, length: int, loss: str, impl: str, naive: Any) -> dict[str, Any]:
    """A step: checked, then timed. peak_bytes: all that is held at once; base_bytes: weights and optimiser states.

    Right means: the loss is off that of float32 logits by no more than `tolerance`; and where naive ran, the norm of
    all gradients is off naive's by no more than `GRADIENT` of it. over_naive: of the medians, of different rounds.
    """
    device = llama.settings.device
    row: dict[str, Any] = {
        "model": llama.name, "dtype": llama.dtype, "length": length, "tokens": 2 * length, "loss": loss,
        "impl": impl, "status": "ok", "value": None, "expected": None, "gradient_norm": None, "seconds": None,
        "seconds_20": None, "seconds_80": None, "steps": None, "tokens_per_second": None, "peak_bytes": None,
        "base_bytes": None, "over_naive": None,
    }  # fmt: skip
    try:
        states = [x for state in llama.optimizer.state.values() for x in state.values()]
        row["base_bytes"] = sum(x.nbytes for x in (*llama.model.parameters(), *states))
        row["expected"] = llama.pair(length)[2][loss]
        row["value"] = llama.graded(length, loss, impl)
        row["gradient_norm"] = torch.nn.utils.get_total_norm([p.grad for p in llama.model.parameters()]).item()
        beside = naive() if impl == "fused" and naive().get("status") == "ok" else row
        off = abs(row["value"] - row["expected"]), abs(row["gradient_norm"] / beside["gradient_norm"] - 1)
        counted = length - llama.prompt
        if off[0] <= tolerance(loss, impl, llama.dtype, counted) and off[1] <= GRADIENT[llama.dtype]:  # a NaN isn't
            llama.optimizer.zero_grad()
            release(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            runs = {"this": partial(llama.step, length, loss, impl)}
            times = interleaved(runs, llama.settings.rounds, device, ROW_SECONDS)
            row |= dict(zip(("seconds", "seconds_20", "seconds_80"), times.quantiles("this"))) | {"steps": times.rounds}
            row["tokens_per_second"] = row["tokens"] / row["seconds"]
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
            if beside is not row:
                row["over_naive"] = row["seconds"] / beside["seconds"]
        else:
            row["status"] = "FAILED"
    except Exception as error:
        row["status"] = explain(error)
    if row["status"] in ("ok", "out of memory"):
        llama.model.zero_grad()
    else:  # the model may hold a NaN
        for name in ("optimizer", "model"):
            llama.__dict__.pop(name, None)
        llama.known = {}
    release(device)  # outside the handler: the traceback holds what the step held
    return row


def tolerance(loss: str, impl: str, dtype: str, counted: int) -> float:
    """What a loss may be off the one from float32 logits: 1e-4 a token, and for naive in bfloat16, which rounds its
    logits to 8 bits, 2⁻⁷. BNF has the mean of the tokens; DPO β times a sum of 2n, whose error grows with the root."""
    one = max(1e-4, torch.finfo(DTYPES[dtype]).eps) if impl == "naive" else 1e-4
    return one if loss == "bnf" else one * max(1.0, BETA * (2 * counted) ** 0.5)
