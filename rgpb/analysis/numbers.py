"""Numbers of responses under one model: perplexity, agility, differences between preferred and dispreferred.

Dimensions: P token positions (masked ones included), B responses, B/2 pairs stacked `[chosen; rejected]`, T steps of
the longest response, V vocabulary, H hidden size.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.engine.workspace import check_size
from rgpb.head import LMHead, as_head
from rgpb.layout import Layout, Responses, TokenScores, pairs
from rgpb.objectives import Objective
from rgpb.validation import Checks, check_groups, check_inputs, make_layout

IGNORE = -100
SLICE = 1 << 14  # vocabulary entries whose weights are converted, or logits summed, at once
UNKNOWN = Objective("", lambda responses: responses.logps())  # one that may ask for anything


def make_responses(
    scores: TokenScores,
    target: Tensor,
    *,
    ref: TokenScores | None = None,
    label: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Responses:
    """Group a model's token scores into responses, detached.

    Args:
        scores: of `linear_logprob` or `rgpb.hf.token_scores`, in the shape of `target`; with `entropy=True` for
            objectives that read it (bnf).
        target: int64 [B, T], or packed [N] with `cu_seqlens`; `ignore_index` on prompt and padding.
        ref: the reference's scores in the same shape, or None.
        label: [B] bool or ±1, or None.
        rewards: [G, K], for objectives of groups that need them, or None.
        group_size: K, for objectives of groups without rewards.
        cu_seqlens: int32 or int64 [B+1], bounds of the packed responses.

    Raises:
        ValueError: shapes that don't fit, labels other than bool or ±1, or rewards that aren't finite.
    """
    layout = make_layout(target, cu_seqlens, ignore_index)
    flat = flattened("scores", scores, target)
    unscored = (flat.logp == 0) & (flat.log_odds == 0) & (flat.lse == 0)
    if layout.mask is not None and bool((layout.mask & unscored).any()):
        at = int((layout.mask & unscored).nonzero()[0])
        raise ValueError(
            f"target: expected {ignore_index} where nothing was scored, got a token at flat position {at}; the scores "
            "of a causal LM's batch stand at `rgpb.hf.aligned_targets(labels)`"
        )
    flat_ref = None if ref is None else flattened("ref", ref, target)
    if label is not None:
        signs = label.double() * 2 - 1 if label.dtype == torch.bool else label.double()
        if signs.shape != (layout.responses,) or not bool((signs.abs() == 1).all()):
            raise ValueError(f"label: expected [B={layout.responses}] of bool or ±1, got {shown(label)}")
        label = signs
    if rewards is not None or group_size is not None:
        checks = Checks()
        group_size, rewards = check_groups(UNKNOWN, group_size, rewards, layout, scores.logp, checks)
        checks.read()
    sums = None if flat_ref is None else layout.sum(flat_ref.logp)
    return Responses(flat, flat_ref, sums, label, layout, group_size, rewards)


def perplexity(responses: Responses) -> Tensor:
    """exp(−S̄), S̄ the mean token log-probability; NaN for a response without tokens. float64 [B]. RGPB §6."""
    return torch.exp(-_mean_logp(responses))


def agility(responses: Responses) -> Tensor:
    """e^{S̄_w} − e^{S̄_l}, S̄ the mean token log-probability; NaN where either has no token. float64 [B/2]. RGPB §6.

    Raises:
        ValueError: an odd number of responses.
    """
    chosen, rejected = split_pairs("responses", _mean_logp(responses).exp())
    return chosen - rejected


class InformationDifference(NamedTuple):
    """How much more probability mass the preferred response has than the dispreferred.

    Attributes:
        probability: float64 [B/2], in (−1, 1).
        log_probability: float64 [B/2], the same of logarithms.
        steps: float64 [B/2, T], p(y_w,t) − p(y_l,t) at the t-th token of each; NaN where either has ended.
    """

    probability: Tensor
    log_probability: Tensor
    steps: Tensor


def information_difference(responses: Responses, *, length_normalize: bool = True) -> InformationDifference:
    """π(y_w) − π(y_l), and the same of log π.

    RGPB Definition 4.1 is a difference of probability masses of y+ and y−, aggregated over the steps, and §6 identifies
    agility with it. So the mass of a response is e^{S̄} here (`probability` is then `agility`), which doesn't vanish
    with the length; `length_normalize=False` takes e^S. The difference of logarithms is what DPO's coefficient depends
    on, and still tells responses apart whose masses are all nearly 0.

    Args:
        responses: pairs, stacked `[chosen; rejected]`.

    Raises:
        ValueError: an odd number of responses.
    """
    logp = _mean_logp(responses) if length_normalize else responses.logps().detach()
    chosen, rejected = split_pairs("responses", logp)
    w, l = pairs(by_step(responses.policy.logp.detach().double().exp(), responses.layout))
    return InformationDifference(chosen.exp() - rejected.exp(), chosen - rejected, w - l)


class GradientDifference(NamedTuple):
    """Distances between the output gradients of a pair at the same step; NaN where either response has ended.

    Attributes:
        softmax: [B/2, T], ‖p_w − p_l‖.
        output: [B/2, T], ‖(onehot(y_w) − p_w) − (onehot(y_l) − p_l)‖: the two gradients of log p on the logits.
        same_target: bool [B/2, T], y_w = y_l at that step; False past the end.
        pairs: [B/2], mean of `softmax` over the steps; NaN for a pair without a common step.
    """

    softmax: Tensor
    output: Tensor
    same_target: Tensor
    pairs: Tensor


@torch.no_grad()
def gradient_difference(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    order: float = 1.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
    workspace: int = DEFAULT_WORKSPACE,
) -> GradientDifference:
    """How far apart the gradients are that the two responses of a pair send into the logits, step by step.

    RGPB Definition 4.2 is the p-norm of the difference of two gradients at one step. By Lemma 4.1 it comes from the
    softmax distributions and from whether the targets are the same, and the paper goes on with the softmax part;
    `softmax` is that, `output` is both. The norm is over the vocabulary, so this needs logits: those of a chunk of
    steps at a time.

    Args:
        hidden: [B, T, H], or packed [N, H] with `cu_seqlens`; pairs stacked `[chosen; rejected]`.
        head: weight [V, H] or an `LMHead`.
        target: int64 [B, T] or [N]; step t is a response's t-th position whose target isn't `ignore_index`.
        order: p of the norm, ≥ 1 (`math.inf` for the largest entry). 1 is twice the total variation, so at most 2.
        workspace: bytes of logits held at most; at least one step is taken at a time.

    Returns:
        float32 tensors (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or targets that don't fit, an odd number of responses, or order < 1.
    """
    check_size(workspace)
    head = check_inputs(hidden, head, target)
    if not order >= 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    _check_range(target, len(head.weight), ignore_index)
    places = _places(make_layout(target, cu_seqlens, ignore_index), target.numel())
    w, l = split_pairs("target", places)
    flat, y = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    both = (w >= 0) & (l >= 0)
    at_w, at_l = w[both], l[both]
    dtype = result_dtype(hidden)
    softmax, output = flat.new_empty(2, len(at_w), dtype=dtype)
    rows = max(1, workspace // (4 * len(head.weight) * dtype.itemsize))  # a difference, logits and two temporaries
    for start in range(0, len(at_w), rows):
        part = slice(start, start + rows)
        i, j = at_w[part], at_l[part]
        difference = logits_of(flat[i], head, dtype).softmax(-1)
        difference -= logits_of(flat[j], head, dtype).softmax(-1)
        softmax[part] = torch.linalg.vector_norm(difference, order, -1)
        row = torch.arange(len(i), device=y.device)
        difference[row, y[i]] -= 1
        difference[row, y[j]] += 1
        output[part] = torch.linalg.vector_norm(difference, order, -1)

    def stepwise(values: Tensor) -> Tensor:
        return values.new_full(both.shape, torch.nan).masked_scatter(both, values)

    same = both.masked_scatter(both, y[at_w] == y[at_l])
    whole = stepwise(softmax)
    return GradientDifference(whole, stepwise(output), same, whole.nanmean(1))


def shown(x: object) -> str:
    """Dtype and shape of a tensor, else the type, for messages."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def flattened(name: str, scores: TokenScores, target: Tensor) -> TokenScores:
    """Scores as [P], detached; refused where they aren't in the shape of `target`."""
    if not isinstance(scores, TokenScores):
        raise ValueError(f"{name}: expected TokenScores, got {shown(scores)}")
    for field, values in zip(scores._fields, scores):
        if values is not None and values.shape != target.shape:
            raise ValueError(f"{name}.{field}: expected {list(target.shape)} as target, got {list(values.shape)}")
    return TokenScores(*(None if x is None else x.detach().reshape(-1) for x in scores))  # type: ignore[arg-type]


def split_pairs(name: str, per_response: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected of [B]; refused where B is odd."""
    if len(per_response) % 2:
        raise ValueError(
            f"{name}: expected an even number of responses, stacked [chosen; rejected], got {len(per_response)}"
        )
    return pairs(per_response)


def _mean_logp(responses: Responses) -> Tensor:
    """S̄, NaN for a response without tokens. [B]"""
    return torch.where(responses.layout.tokens > 0, responses.logps(length_normalize=True).detach(), torch.nan)


def _places(layout: Layout, positions: int) -> Tensor:
    """The position of each response's t-th unmasked token, −1 past its end. int64 [B, T]."""
    device, count = layout.tokens.device, layout.tokens
    lengths = layout.lengths
    if lengths is None:
        lengths = torch.full_like(count, positions // max(layout.responses, 1))
    owner = torch.repeat_interleave(torch.arange(layout.responses, device=device), lengths)
    where = torch.arange(positions, device=device)
    if layout.mask is not None:
        where, owner = where[layout.mask], owner[layout.mask]
    step = torch.arange(len(where), device=device) - (count.cumsum(0) - count)[owner]
    places = torch.full((layout.responses, int(count.max()) if len(count) else 0), -1, device=device)
    places[owner, step] = where
    return places


def by_step(values: Tensor, layout: Layout) -> Tensor:
    """[P] → [B, T], NaN past a response's end."""
    places = _places(layout, len(values))
    if not len(values):
        return values.new_full(places.shape, torch.nan)
    return torch.where(places >= 0, values[places.clamp(min=0)], torch.nan)


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def logits_of(x: Tensor, head: LMHead, dtype: torch.dtype) -> Tensor:
    """[C, H] → [C, V] in `dtype`; the weight is converted a slice at a time."""
    weight, bias, softcap, scale, shard = as_head(head)
    if shard is not None:
        raise ValueError(f"head.shard: expected None, a whole head, got {shard}")
    z = x.new_empty(len(x), len(weight), dtype=dtype)
    for first in range(0, len(weight), SLICE):
        part = slice(first, first + SLICE)
        z[:, part] = x.to(dtype) @ weight[part].to(dtype).T
    if bias is not None:
        z += bias
    z *= scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    outside = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
    if len(outside):
        raise ValueError(f"target: expected {ignore_index} or 0 … {vocab - 1}, got {int(outside[0])}")
