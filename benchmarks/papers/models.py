"""Small models with random weights, one training loop, and what is measured of a model.

A batch is a padded one for `rgpb.hf` ([chosen; rejected] for pairs), with what the objective wants beside it: `label`
[B], `rewards` [G, K]. Batches are made once and gone through in rounds, so the reference scores each of them once.

Dimensions: B responses, T padded length.
"""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from rgpb import hf
from rgpb.analysis import agility, make_responses, perplexity
from rgpb.layout import TokenScores
from rgpb.objectives import OBJECTIVES

from .judge import Values

IGNORE = -100
PAD, END = 0, 1  # token ids with that meaning in generated tasks; the text of both model families may start at 2
BESIDE = ("label", "rewards")  # entries of a batch that go to the loss, not to the model
LOG = logging.getLogger("benchmarks.papers")

Batch = dict[str, Tensor]
Response = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of what follows it
Pair = tuple[Response, Response]  # chosen and rejected
Method = tuple[str, dict[str, Any]]  # an objective or a weighted sum, and its options


def tiny_llama(vocab: int, seed: int, quick: bool = False) -> PreTrainedModel:
    """A Llama with random weights, two layers of width 64, or one of 16 to be `quick`; the same for the same seed."""
    torch.manual_seed(seed)
    width, layers = (16, 1) if quick else (64, 2)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, pad_token_id=None, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_t5(vocab: int, seed: int, quick: bool = False) -> PreTrainedModel:
    """An encoder–decoder (T5, gated, no dropout), otherwise as `tiny_llama`, with as many layers in each stack."""
    torch.manual_seed(seed)
    width, layers = (16, 1) if quick else (64, 2)
    config: Any = T5Config  # whose signature leaves out what all configs take
    config = config(
        vocab_size=vocab, d_model=width, d_kv=width // 4, d_ff=3 * width, num_layers=layers, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def padded(responses: Sequence[Response], *, encoder_decoder: bool = False, pad: int = PAD) -> Batch:
    """A batch for `rgpb.hf` of responses in the order given: `input_ids`, `attention_mask`, `labels`, int64 [B, T].

    Of an encoder–decoder, the prompt goes to the encoder, and labels are [B, T of completions].
    """

    def rows(columns: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(1, *map(len, columns))
        return torch.tensor([[*column, *[fill] * (width - len(column))] for column in columns])

    inputs = [list(p) if encoder_decoder else [*p, *c] for p, c in responses]
    labels = [list(c) if encoder_decoder else [*[IGNORE] * len(p), *c] for p, c in responses]
    mask = [[1] * len(x) for x in inputs]
    return {"input_ids": rows(inputs, pad), "attention_mask": rows(mask, 0), "labels": rows(labels, IGNORE)}


def pair_batches(
    pairs: Sequence[Pair], size: int, seed: int, *, encoder_decoder: bool = False, pad: int = PAD
) -> list[Batch]:
    """Batches of `size` pairs, [chosen; rejected] and `label`, in an order drawn by `seed`; the last may be smaller."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    batches = []
    for at in range(0, len(order), size):
        chosen, rejected = zip(*(pairs[i] for i in order[at : at + size]))
        batch = padded([*chosen, *rejected], encoder_decoder=encoder_decoder, pad=pad)
        batches.append({**batch, "label": torch.arange(2 * len(chosen)) < len(chosen)})
    return batches


def chosen_only(batch: Batch) -> Batch:
    """The first half of a batch of pairs: what `mle` learns from."""
    return {name: value[: len(value) // 2] for name, value in batch.items()}


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in BESIDE}


@torch.no_grad()
def scores(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Token scores of a batch without gradient."""
    return hf.token_scores(model.eval(), _inputs(batch))


def targets(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What `scores` of the same batch belong to, int64 [B, T]."""
    return batch["labels"] if model.config.is_encoder_decoder else hf.aligned_targets(batch["labels"])


def descend(
    model: nn.Module, loss_of: Callable[[int], Tensor], *, lr: float, steps: int, schedule: str = "constant"
) -> list[float]:
    """AdamW (no weight decay, gradient norm clipped to 1) on the loss of each step, in place; returns the losses.

    The schedule is "constant", or "cosine" down to a tenth.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        model.train()
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if schedule == "cosine":
            factor = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / steps)).item()
            optimiser.param_groups[0]["lr"] = lr * factor
        optimiser.step()
        losses.append(loss.item())
    return losses


def train(
    model: PreTrainedModel, batches: Sequence[Batch], objective: str, *, ref_model: PreTrainedModel | None = None,
    lr: float, steps: int, schedule: str = "constant", **options: Any,
) -> list[float]:  # fmt: skip
    """`descend` on the batches in turn. `ref_model` is the reference, `options` the objective's and `group_size`."""
    specs = [OBJECTIVES[part.split("*")[-1].strip()] for part in objective.split("+")]
    wanted = [name for name in BESIDE if any(getattr(spec, name) for spec in specs)]
    references: dict[int, TokenScores] = {}

    def loss_of(step: int) -> Tensor:
        at = step % len(batches)
        extra: dict[str, Any] = {name: batches[at][name] for name in wanted if name in batches[at]}
        if ref_model is not None and any(spec.ref for spec in specs):
            if at not in references:
                references[at] = scores(ref_model, batches[at])
            extra["ref"] = references[at]
        return hf.loss(model, _inputs(batches[at]), objective, **extra, **options)

    losses = descend(model, loss_of, lr=lr, steps=steps, schedule=schedule)
    LOG.info("%s at %g: %d steps, last loss %.3f", objective, lr, steps, losses[-1])
    return losses


def evaluate(model: PreTrainedModel, batch: Batch) -> dict[str, float]:
    """Of pairs [chosen; rejected] perplexity, agility (Tuan & Wang 2024, §6), likelihoods and accuracy by S̄; means."""
    responses = make_responses(scores(model, batch), targets(model, batch))
    (chosen, rejected), (good, bad) = responses.logps().chunk(2), perplexity(responses).chunk(2)
    found = {
        "perplexity": good,
        "agility": agility(responses),
        "log p of chosen": chosen,
        "log p of rejected": rejected,
    }
    means = {name: values.mean().item() for name, values in {**found, "accuracy": (good < bad).double()}.items()}
    return {**means, "log perplexity": math.log(means["perplexity"])}


def add(values: Values, method: str, measured: Mapping[str, float]) -> None:
    """Append what was measured of one seed."""
    for quantity, value in measured.items():
        values.setdefault(quantity, {}).setdefault(method, []).append(value)
