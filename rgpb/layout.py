"""Tokens → responses → pairs or groups: how a flat run of token scores is grouped, and what an objective sees of it.

Dimensions: P token positions (masked ones included), B responses, U units (responses, pairs or groups), G groups, K
responses of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rgpb.parallel import all_max, all_sum, sum_before

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenScores(NamedTuple):
    """Per-token statistics of the target token, float32 (float64 for float64 input), in the shape of `target`.

    Masked positions hold 0 everywhere.

    Attributes:
        logp: log p, the log-probability of the target.
        log_odds: λ = log(p / (1 − p)). Exact for confident tokens, where log(1 − p) taken from a float32 log p is not:
            log p = logsigmoid(λ) and log(1 − p) = logsigmoid(−λ).
        lse: logsumexp of the logits.
        entropy: entropy of the whole distribution, or None when it was not asked for.
        other_entropy: entropy of the distribution over the other tokens, p_k / (1 − p) for k ≠ target, or None.
    """

    logp: Tensor
    log_odds: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    other_entropy: Tensor | None = None

    def detached(self) -> TokenScores:
        """The same without gradient."""
        return TokenScores(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def flat(self) -> TokenScores:
        """The same with one dimension, [P]: what `Responses` holds."""
        return TokenScores(*(None if x is None else x.reshape(-1) for x in self))  # type: ignore[arg-type]


def token_scores(
    z_y: Tensor, lse_other: Tensor, h_o: Tensor | None, *, mask: Tensor | None, entropy: bool
) -> TokenScores:
    """TokenScores from the three statistics, all of one shape; 0 where `mask` is False."""

    def shown(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0)

    # a token without others is certain, and no logit moves that
    log_odds = torch.where(lse_other == -torch.inf, torch.inf, z_y - lse_other)
    whole = None
    if entropy and h_o is not None:
        bounded = log_odds.clamp(-800, 800)  # beyond, the two-way part is 0 also in float64
        two_way = F.softplus(-bounded) * torch.sigmoid(bounded) + F.softplus(bounded) * torch.sigmoid(-bounded)
        whole = shown(two_way + torch.sigmoid(-log_odds) * h_o)
    return TokenScores(
        logp=shown(F.logsigmoid(log_odds)),
        log_odds=shown(log_odds),
        lse=shown(torch.logaddexp(z_y, lse_other)),
        entropy=whole,
        other_entropy=None if h_o is None else shown(h_o),
    )


class Layout(NamedTuple):
    """Which token positions belong to which response. Each response's positions are contiguous.

    Attributes:
        responses: B.
        lengths: int64 [B], positions per response, or None where all are equally long (a padded [B, T] batch).
        tokens: int64 [B], unmasked tokens of the *whole* response. A layout may cover only a part of the
            positions (a chunk); `mean` still divides by the whole count, so partial means add up.
        mask: bool [P], True on positions that count, or None where all do.
        group: the ranks that hold other positions of the same responses, in the order of these; or None. Sums are over
            all of them, and `tokens` counts all.
        positions: what `lengths` are known to add up to, or None: then each sum reads them back to see.
    """

    responses: int
    lengths: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    group: ProcessGroup | None = None
    positions: int | None = None

    def sum(self, per_token: Tensor) -> Tensor:
        """Σ over each response's unmasked tokens. [P] → float64 [B]."""
        values = per_token.double() if self.mask is None else torch.where(self.mask, per_token.double(), 0.0)
        if self.lengths is None:
            sums = values.view(self.responses, len(values) // max(self.responses, 1)).sum(1)
        else:
            sums = sum_of_each(values, self.lengths, self.positions)
        return all_sum(sums, self.group)

    def mean(self, per_token: Tensor) -> Tensor:
        """`sum` over the whole response's token count; 0 for a response without tokens. [P] → float64 [B]."""
        return self.sum(per_token) / self.tokens.clamp(min=1)


class Responses(NamedTuple):
    """What an objective sees: token scores of policy and reference, their grouping, and the labels.

    Attributes:
        policy: token scores under the policy, flat [P].
        ref: token scores under the reference, flat [P], or None.
        ref_sums: float64 [B], Σ log π_ref of each response, where only that is known of the reference, or None.
        label: float64 [B], +1 preferred and −1 dispreferred, or None.
        layout: the grouping of the P positions.
        group_size: K where responses come in groups, consecutive rows, else None.
        rewards: float64 [B], one of each response, or None. 0 for responses without tokens.
        data_group: the ranks that hold other responses of the batch, or None.
    """

    policy: TokenScores
    ref: TokenScores | None
    ref_sums: Tensor | None
    label: Tensor | None
    layout: Layout
    group_size: int | None = None
    rewards: Tensor | None = None
    data_group: ProcessGroup | None = None

    @property
    def n(self) -> Tensor:
        """Number of unmasked tokens, float64 [B]; a response without tokens counts as 1, so it can be divided by."""
        return self.layout.tokens.clamp(min=1).double()

    @property
    def present(self) -> Tensor:
        """Whether a response has any token, bool [B]. One without takes no part in its group."""
        return self.layout.tokens > 0

    def groups(self, per_response: Tensor) -> Tensor:
        """[B] → [G, K]."""
        if self.group_size is None:
            raise ValueError(
                "group_size: expected the responses per group, since this objective compares them; got None"
            )
        return per_response.view(-1, self.group_size)

    def sum(self, per_token: Tensor) -> Tensor:
        """Σ over each response's tokens. [P] → float64 [B]."""
        return self.layout.sum(per_token)

    def mean(self, per_token: Tensor) -> Tensor:
        """Mean over each response's tokens, 0 where there are none. [P] → float64 [B]."""
        return self.layout.mean(per_token)

    def logps(self, length_normalize: bool = False) -> Tensor:
        """S = Σ log p, or its mean over the tokens. float64 [B]."""
        return self.mean(self.policy.logp) if length_normalize else self.sum(self.policy.logp)

    def log_complement(self) -> Tensor:
        """log(1 − e^S), the log-probability of any other response. float64 [B].

        Whatever isn't this response leaves it at exactly one token: 1 − e^S = Σ_t (1 − p_t) Π_{u<t} p_u. So it is right
        to the last digit also where S rounds to 0. −∞, without gradient, where every p is 1 and where there are no
        tokens.
        """
        # e⁻⁸⁰⁰ is 0 in float64, and one impossible token must not swallow the sums of others
        logp = self.policy.logp.double().clamp(min=-800)
        rest = F.logsigmoid(-self.policy.log_odds.double())
        layout, counts = self.layout, rest > -torch.inf
        if not layout.responses:
            return self.logps()
        if layout.mask is not None:
            logp, counts = torch.where(layout.mask, logp, 0.0), counts & layout.mask
        width = len(logp) // max(layout.responses, 1)
        lengths = torch.full_like(layout.tokens, width) if layout.lengths is None else layout.lengths
        known = len(logp) if layout.lengths is None else layout.positions
        upto = logp.cumsum(0)
        start = F.pad(upto, (1, 0))[(lengths.cumsum(0) - lengths)]
        if layout.group is not None:
            start = start - sum_before(sum_of_each(logp, lengths, known), layout.group)
        left = torch.where(counts, upto - logp - repeat(start, lengths, len(logp)) + rest, -torch.inf)
        unsafe = known == len(logp)
        most = torch.segment_reduce(left.detach(), "max", lengths=lengths, axis=0, initial=-torch.inf, unsafe=unsafe)
        most = all_max(most, layout.group)
        some = most > -torch.inf
        most = torch.where(some, most, 0.0)
        parts = torch.where(counts, left - repeat(most, lengths, len(logp)), -torch.inf).exp()
        total = torch.where(some, all_sum(sum_of_each(parts, lengths, known), layout.group), 1.0)
        sure = torch.where(some, most + total.log(), -torch.inf)
        # of an unlikely response the parts sum to nearly 1, and their rounding is more than e^S
        whole = self.logps()
        return torch.where(whole < -1, torch.log1p(-whole.clamp(max=-1).exp()), sure)

    def total(self, values: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum and number of the values in the whole batch, of all its ranks; float64 0-d, without gradient.

        Args:
            values: any shape, one or none of each response.
            which: bool in that shape, the values that count; default: all.
        """
        values = values.detach().double()
        which = torch.ones_like(values, dtype=torch.bool) if which is None else which
        total, count = all_sum(torch.stack([torch.where(which, values, 0.0).sum(), which.sum()]), self.data_group)
        return total, count

    def log_ratios(self, length_normalize: bool = False) -> Tensor:
        """Δ = Σ log π_θ − Σ log π_ref, or that per token. float64 [B]."""
        ref = self.sum(self.ref.logp) if self.ref is not None else self.ref_sums
        if ref is None:
            raise ValueError("ref: expected reference scores, since this objective compares with a reference; got None")
        delta = self.sum(self.policy.logp) - ref
        return delta / self.n if length_normalize else delta


def sum_of_each(values: Tensor, lengths: Tensor, known: int | None = None) -> Tensor:
    """Sums of consecutive runs of the given lengths: [P], [B] → [B]. Deterministic on every device.

    known: what the lengths add up to. Where that isn't P, they are read back and checked: two waits for a GPU.
    """
    if not len(lengths):
        return values.sum().expand(0)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=known == len(values))


def repeat(per_response: Tensor, lengths: Tensor, positions: int) -> Tensor:
    """Each response's value at all its positions. [B], int64 [B] → [P]"""
    return torch.repeat_interleave(per_response, lengths, output_size=positions)


def tokens_of_each(mask: Tensor, lengths: Tensor, known: int | None = None) -> Tensor:
    """Unmasked tokens of each response: bool [P], int64 [B] → int64 [B]. `known` as in `sum_of_each`."""
    return sum_of_each(mask.double(), lengths, known).long()


def pairs(per_response: Tensor) -> tuple[Tensor, Tensor]:
    """Split [2P] values of responses stacked `[chosen; rejected]` into chosen [P] and rejected [P]."""
    half = per_response.shape[0] // 2
    return per_response[:half], per_response[half:]
