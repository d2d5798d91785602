"""Small models with random weights, and one training loop for all scripts.

A batch is a padded one for `rgpb.hf` ([chosen; rejected] for pairs), with what the objective wants beside it: `label`
[B], `rewards` [G, K]. Batches are made once and gone through in rounds, so the reference scores each of them once.

Dimensions: B responses, T padded length.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from rgpb import hf
from rgpb.analysis import agility, make_responses, perplexity
from rgpb.layout import TokenScores
from rgpb.objectives import OBJECTIVES

IGNORE = -100
PAD, END = 0, 1  # token ids with that meaning in generated tasks; the text of both model families may start at 2
OPTIMISER = "AdamW, no weight decay, gradient norm clipped to 1, constant rate"  # of `train`, by default
BESIDE = ("label", "rewards")  # entries of a batch that go to the loss, not to the model

Batch = dict[str, Tensor]
Response = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of what follows it


def tiny_llama(vocab: int, seed: int, *, hidden: int = 64, layers: int = 2, positions: int = 512) -> PreTrainedModel:
    """A Llama with random weights and 4 heads; the same for the same seed.

    Args:
        vocab: size of the vocabulary.
        seed: of the weights.
        hidden: width, a multiple of 8.
        layers: how many.
        positions: the longest sequence.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=positions, pad_token_id=None, bos_token_id=None,
        eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_t5(vocab: int, seed: int, *, hidden: int = 64, layers: int = 2) -> PreTrainedModel:
    """An encoder–decoder (T5, gated, no dropout) with random weights and 4 heads; the same for the same seed.

    Args: as `tiny_llama`; `layers` in each stack.
    """
    torch.manual_seed(seed)
    config: Any = T5Config  # whose signature leaves out what all configs take
    config = config(
        vocab_size=vocab, d_model=hidden, d_kv=hidden // 4, d_ff=3 * hidden, num_layers=layers, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def padded(responses: Sequence[Response], *, encoder_decoder: bool = False, pad: int = PAD) -> Batch:
    """A batch for `rgpb.hf` of responses in the order given.

    Args:
        responses: token ids of prompt and completion. An empty completion has no target.
        encoder_decoder: the prompt goes to the encoder, the completion is what the decoder says.
        pad: fills up rows.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 [B, T]; labels of an encoder–decoder [B, T of completions].

    Raises:
        ValueError: no response.
    """
    if not responses:
        raise ValueError("responses: expected at least one, got none")

    def rows(columns: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(1, *map(len, columns))
        return torch.tensor([[*column, *[fill] * (width - len(column))] for column in columns])

    if encoder_decoder:
        inputs, labels = [list(p) for p, _ in responses], [list(c) for _, c in responses]
    else:
        inputs = [[*p, *c] for p, c in responses]
        labels = [[*[IGNORE] * len(p), *c] for p, c in responses]
    return {
        "input_ids": rows(inputs, pad),
        "attention_mask": rows([[1] * len(x) for x in inputs], 0),
        "labels": rows(labels, IGNORE),
    }


def pair_batches(
    pairs: Sequence[tuple[Response, Response]], size: int, seed: int, *, encoder_decoder: bool = False, pad: int = PAD
) -> list[Batch]:
    """Batches of `size` pairs, stacked [chosen; rejected], in an order drawn by `seed`; the last may be smaller.

    Each has a `label`, bool [B], besides.
    """
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


def inputs_of(batch: Batch) -> Batch:
    """What of a batch goes to the model."""
    return {name: value for name, value in batch.items() if name not in BESIDE}


@torch.no_grad()
def scores(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Token scores of a batch without gradient."""
    return hf.token_scores(model.eval(), inputs_of(batch))


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy, so that all methods start alike."""
    return copy.deepcopy(model)


def train(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    objective: Any,
    *,
    ref_model: PreTrainedModel | None = None,
    lr: float,
    steps: int,
    schedule: str = "constant",
    each: Callable[[int], None] | None = None,
    progress: str | None = None,
    **options: Any,
) -> list[float]:
    """AdamW (no weight decay, gradient norm clipped to 1) on the batches in turn, in place.

    Args:
        model: trained.
        batches: gone through in rounds.
        objective: a name, a weighted sum as text, or name → weight, as for `hf.loss`. `label` and `rewards` of a batch
            go to it where it needs them.
        ref_model: the reference; its scores are computed once a batch. Not asked where the objective needs none.
        lr: learning rate.
        steps: how many.
        schedule: "constant", or "cosine" down to a tenth.
        each: called after every step, with its number from 1.
        progress: a label; then a line on stderr shows how far it is.
        options: of the objective, and of `hf.loss` (`group_size`).

    Returns:
        The loss of each step.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule: expected 'constant' or 'cosine', got {schedule!r}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    needs = _needs(objective)
    references: dict[int, TokenScores] = {}
    losses = []
    for step in range(steps):
        at = step % len(batches)
        extra: dict[str, Any] = {name: batches[at][name] for name in BESIDE if name in needs and name in batches[at]}
        if ref_model is not None and "ref" in needs:
            if at not in references:
                references[at] = scores(ref_model, batches[at])
            extra["ref"] = references[at]
        model.train()
        loss = hf.loss(model, inputs_of(batches[at]), objective, **extra, **options)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if schedule == "cosine":
            factor = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / steps)).item()
            optimiser.param_groups[0]["lr"] = lr * factor
        optimiser.step()
        losses.append(loss.item())
        if progress is not None and ((step + 1) % 25 == 0 or step + 1 == steps):
            end = "\n" if step + 1 == steps else ""
            print(
                f"\r{progress}: step {step + 1}/{steps}, loss {losses[-1]:.3f}  ", end=end, file=sys.stderr, flush=True
            )
        if each is not None:
            each(step + 1)
    return losses


def _needs(objective: str | Mapping[str, float]) -> set[str]:
    """Which of ref, label and rewards an objective wants; of a sum, what any of its parts wants."""
    names = (part.split("*")[-1].strip() for part in objective.split("+")) if isinstance(objective, str) else objective
    specs = [OBJECTIVES[name] for name in names]
    found = {name for name in BESIDE if any(getattr(spec, name, False) for spec in specs)}
    return found | ({"ref"} if any(spec.ref for spec in specs) else set())


def best_rate(
    starts: Sequence[PreTrainedModel],
    batches: Sequence[Sequence[Batch]],
    valid: Batch,
    rates: Sequence[float],
    steps: int,
) -> float:
    """The learning rate at which `mle` ends with the lowest held-out log-perplexity, averaged over the seeds.

    The rule by which a script finds the one rate that it gives to all methods.

    Args:
        starts: a model per seed; left as they are.
        batches: of pairs, per seed; `mle` sees the chosen.
        valid: held out, of pairs.
        rates: to choose from.
        steps: of each run.
    """

    def final(rate: float) -> float:
        total = 0.0
        for start, its in zip(starts, batches):
            model = clone(start)
            train(model, [chosen_only(batch) for batch in its], "mle", lr=rate, steps=steps)
            total += math.log(evaluate(model, valid).perplexity)
        return total

    return min(rates, key=final)


class Measured(NamedTuple):
    """Of a batch; where it holds no pairs, all responses are chosen and what is of the rejected is nan.

    Attributes:
        perplexity: exp(−S̄) averaged over the chosen. Tuan & Wang 2024, §6.
        agility: mean e^{S̄} of the chosen less that of the rejected.
        chosen, rejected: mean Σ log p.
        accuracy: part of the pairs whose chosen has the higher S̄.
    """

    perplexity: float
    agility: float
    chosen: float
    rejected: float
    accuracy: float


def targets(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What `scores` of the same batch belong to, int64 [B, T]."""
    return batch["labels"] if model.config.is_encoder_decoder else hf.aligned_targets(batch["labels"])


def evaluate(model: PreTrainedModel, batch: Batch) -> Measured:
    """Perplexity, agility and likelihoods of a batch of pairs [chosen; rejected], or of chosen only (no `label`)."""
    responses = make_responses(scores(model, batch), targets(model, batch))
    total, each = responses.logps(), perplexity(responses)
    if "label" not in batch:
        nan = float("nan")
        return Measured(each.mean().item(), nan, total.mean().item(), nan, nan)
    half = len(total) // 2
    return Measured(
        each[:half].mean().item(),
        agility(responses).mean().item(),
        total[:half].mean().item(),
        total[half:].mean().item(),
        (each[:half] < each[half:]).double().mean().item(),
    )


ON_SEEN = ", on training pairs"
Method = tuple[Any, dict[str, Any]]  # what `train` takes as objective, and its options


def compare(
    starts: Sequence[PreTrainedModel],
    batches: Sequence[Sequence[Batch]],
    test: Batch,
    methods: Mapping[str, Method],
    *,
    lr: float,
    steps: int,
    progress: bool = False,
    seen: Sequence[Batch] = (),
) -> dict[str, list[Measured]]:
    """Each method from each start, which is its reference too; all with the same rate, steps and batches.

    Args:
        starts: a model per seed; left as they are.
        batches: of pairs, per seed. `mle` sees the chosen.
        test: held out, of pairs.
        methods: by the name they get in tables.
        lr, steps: of all.
        progress: show progress.
        seen: pairs of the training data, per seed; what is measured on them goes under the name and `ON_SEEN`.

    Returns:
        Name → what was measured at the end, per seed; "start" comes first, and what belongs to `seen` last.
    """
    found = {"start": [evaluate(start, test) for start in starts]}
    also = {f"start{ON_SEEN}": [evaluate(start, batch) for start, batch in zip(starts, seen)]}
    for name, (objective, options) in methods.items():
        found[name], also[f"{name}{ON_SEEN}"] = [], []
        for seed, (start, its) in enumerate(zip(starts, batches)):
            model = clone(start)
            read = [chosen_only(batch) for batch in its] if objective == "mle" else its
            label = f"{name}, seed {seed}" if progress else None
            train(model, read, objective, ref_model=start, lr=lr, steps=steps, progress=label, **options)
            found[name].append(evaluate(model, test))
            if seen:
                also[f"{name}{ON_SEEN}"].append(evaluate(model, seen[seed]))
    return found | also if seen else found


def column(found: Sequence[Measured], name: str) -> list[float]:
    """One quantity, per seed; "log perplexity" is the perplexity's logarithm, whose differences are ratios."""
    if name == "log perplexity":
        return [math.log(one.perplexity) for one in found]
    return [getattr(one, name) for one in found]
