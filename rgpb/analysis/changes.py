"""Changes from one model to another on the same responses.

Dimensions: P token positions (masked ones included), B responses, V vocabulary, H hidden size.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from rgpb.analysis.numbers import IGNORE, SLICE, by_step, flattened, logits_of, result_dtype, shown
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.engine.workspace import check_size
from rgpb.head import LMHead
from rgpb.layout import TokenScores
from rgpb.validation import check_inputs, make_layout


def gini(values: Tensor) -> Tensor:
    """Gini coefficient over the last dimension: Σ_ij abs(x_i − x_j) / (2 N Σ_i x_i). float64 [..., N] → [...].

    0: all equal (also where all are 0); 1 − 1/N: one has everything. Gini 1912; BNF §5.3.

    Raises:
        ValueError: no value, or one that is negative or not finite.
    """
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values: expected shape [..., N] with N ≥ 1, got {list(values.shape)}")
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError("values: expected finite numbers of at least 0, got others")
    return _gini(values.double(), torch.full(values.shape[:-1], values.shape[-1], device=values.device))


class Shifts(NamedTuple):
    """What changed on the same responses from one model to another: the six panels of BNF Figure 3. All float64.

    Attributes:
        logp: [B], change of Σ log p.
        logp_mean: [B], per token; NaN for a response without tokens.
        logit: [B], Σ_t abs(change of z_y), z_y the logit of the response's own token.
        logit_mean: [B], per token; NaN likewise.
        gini: [B], Gini coefficient of abs(change of z_y) over the response's tokens; NaN likewise.
        token_logp, token_logit: [P], the changes of each position, with sign; NaN at masked positions.
    """

    logp: Tensor
    logp_mean: Tensor
    logit: Tensor
    logit_mean: Tensor
    gini: Tensor
    token_logp: Tensor
    token_logit: Tensor


def shifts(
    before: TokenScores,
    after: TokenScores,
    target: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Shifts:
    """Shifts of the log-likelihood and of the tokens' logits, and how evenly the latter spread over a response.

    BNF §5.3 compares policy and reference on generated responses. Of the logits it looks at the tokens of the response
    (its Gini coefficient tells whether a shift comes from many tokens or few); z_y = log p + lse, so token scores are
    enough and no logit is formed. For the whole vocabulary: `vocabulary_shift`.

    Args:
        before, after: scores of the same `target` under two models, in its shape.
        target: int64 [B, T], or packed [N] with `cu_seqlens`; `ignore_index` on prompt and padding.

    Raises:
        ValueError: shapes that don't fit, or scores whose `lse` is 0 throughout (they came from log-probabilities).
    """
    layout = make_layout(target, cu_seqlens, ignore_index)
    flat = {name: flattened(name, scores, target) for name, scores in (("before", before), ("after", after))}
    for name, scores in flat.items():
        if bool((scores.logp != 0).any()) and not bool((scores.lse != 0).any()):
            raise ValueError(f"{name}.lse: expected the logsumexp of the logits, got 0 throughout")
    old, new = flat["before"], flat["after"]
    logp = new.logp.double() - old.logp.double()
    logit = logp + (new.lse.double() - old.lse.double())
    size, tokens = logit.abs(), layout.tokens
    sizes = by_step(size, layout)

    def defined(per_response: Tensor) -> Tensor:
        return torch.where(tokens > 0, per_response, torch.nan)

    def masked(per_token: Tensor) -> Tensor:
        return per_token if layout.mask is None else torch.where(layout.mask, per_token, torch.nan)

    return Shifts(
        logp=layout.sum(logp),
        logp_mean=defined(layout.mean(logp)),
        logit=layout.sum(size),
        logit_mean=defined(layout.mean(size)),
        gini=defined(_gini(sizes.nan_to_num(0.0), tokens)),
        token_logp=masked(logp),
        token_logit=masked(logit),
    )


def percentile_shares(values: Tensor, baseline: Tensor, *, bins: int = 10) -> Tensor:
    """The share of `values` in each percentile bin of `baseline`: BNF Figure 4. float64 [bins], summing to 1.

    1 / bins everywhere: spread as the baseline; more at both ends: more polarised. A value outside the baseline's range
    counts in the bin at its end, one on an edge above it; NaN (a masked token of `Shifts.token_logp`) doesn't count.

    Args:
        values, baseline: any shapes, such as `Shifts.token_logp` of two models that came from one.

    Raises:
        ValueError: no value that isn't NaN, or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    found = []
    for name, given in (("values", values), ("baseline", baseline)):
        x = given.detach().double().reshape(-1)
        x = x[~x.isnan()]
        if not len(x):
            raise ValueError(f"{name}: expected at least one number, got {shown(given)}")
        found.append(x)
    x, base = found[0], found[1].sort().values
    # numpy's "linear" quantiles; torch.quantile refuses more than 16M elements
    at = torch.arange(1, bins, dtype=torch.float64, device=x.device) * (len(base) - 1) / bins
    low, high = base[at.floor().long()], base[at.ceil().long()]
    edges = torch.lerp(low, high, at - at.floor())
    which = torch.searchsorted(edges, x, right=True)
    return (which[:, None] == torch.arange(bins, device=x.device)).double().mean(0)


class VocabularyShift(NamedTuple):
    """Change of every vocabulary entry's logit, over tokens.

    Attributes:
        mean: float64 [V], mean over the tokens of the change of z_k.
        absolute: float64 [V], mean of its absolute value.
        gini: float64 0-d, Gini coefficient of `absolute`: 0 where all entries shift alike.
        tokens: how many tokens.
    """

    mean: Tensor
    absolute: Tensor
    gini: Tensor
    tokens: int


@torch.no_grad()
def vocabulary_shift(
    hidden_before: Tensor,
    head_before: Tensor | LMHead,
    hidden_after: Tensor,
    head_after: Tensor | LMHead,
    target: Tensor,
    *,
    ignore_index: int = IGNORE,
    workspace: int = DEFAULT_WORKSPACE,
) -> VocabularyShift:
    """How the logits of the whole vocabulary moved between two models, averaged over the tokens of `target`.

    BNF §5.3's logit shift for every entry instead of the response's own tokens. Sums per entry are accumulated over
    chunks of tokens and slices of the vocabulary, so logits never exist as [tokens, V].

    Args:
        hidden_before, hidden_after: [..., H] of the two models (their H may differ) at the same places.
        head_before, head_after: weight [V, H] or an `LMHead`, over one vocabulary.
        target: int64 [...]; places with `ignore_index` don't count. Otherwise its values aren't read.
        workspace: bytes of logits held at most.

    Raises:
        ValueError: shapes, dtypes or vocabularies that don't fit, or no token.
    """
    (old, old_head), (new, new_head) = (
        (hidden, _checked(hidden, head, target, workspace, side))
        for hidden, head, side in ((hidden_before, head_before, "before"), (hidden_after, head_after, "after"))
    )
    vocab = len(old_head.weight)
    if len(new_head.weight) != vocab:
        raise ValueError(f"head_after: expected the vocabulary of head_before, {vocab}, got {len(new_head.weight)}")
    where = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    if not len(where):
        raise ValueError("target: expected at least one token that isn't ignored, got none")
    dtype = torch.promote_types(result_dtype(old), result_dtype(new))
    flat = [hidden.reshape(-1, hidden.shape[-1]) for hidden in (old, new)]
    columns = min(vocab, SLICE)
    rows = max(1, workspace // (4 * columns * dtype.itemsize))  # two chunks of logits and two temporaries
    total, absolute = torch.zeros(2, vocab, dtype=torch.float64, device=old.device)
    for start in range(0, len(where), rows):
        at = where[start : start + rows]
        x_old, x_new = (x[at] for x in flat)
        for first in range(0, vocab, columns):
            part = slice(first, first + columns)
            change = logits_of(x_new, _slice(new_head, part), dtype) - logits_of(x_old, _slice(old_head, part), dtype)
            total[part] += change.sum(0, dtype=torch.float64)
            absolute[part] += change.abs_().sum(0, dtype=torch.float64)
    total, absolute = total / len(where), absolute / len(where)
    return VocabularyShift(total, absolute, gini(absolute), len(where))


def _gini(values: Tensor, count: Tensor) -> Tensor:
    """Gini coefficient of `count` values of each row, the rest of which is 0. [..., N], [...] → [...]."""
    ordered, n = values.sort(-1).values, values.shape[-1]
    # the zeros that only fill a row come first, and weigh nothing wherever they stand
    rank = torch.arange(1, n + 1, device=values.device, dtype=values.dtype) - (n - count)[..., None]
    weight = 2 * rank - count[..., None] - 1
    total = ordered.sum(-1)
    return torch.where(total > 0, (weight * ordered).sum(-1) / (count * total), 0.0)


def _slice(head: LMHead, part: slice) -> LMHead:
    return head._replace(weight=head.weight[part], bias=None if head.bias is None else head.bias[part])


def _checked(hidden: Tensor, head: Tensor | LMHead, target: Tensor, workspace: int, side: str) -> LMHead:
    """`check_inputs`, whose messages name the arguments of that side."""
    try:
        check_size(workspace)
        return check_inputs(hidden, head, target)
    except ValueError as error:
        text = re.sub(r"\b(hidden|head)\b", rf"\1_{side}", str(error))
        raise ValueError(text) from None
