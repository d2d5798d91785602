"""Scores where the head is sharded: each rank sweeps the rows of the head that it has, then the ranks merge.

A token whose target lies on another rank is scored against this rank's row 0 in its place: its logit z_0 and the
logsumexp of the others give that of all rows. With l_r a rank's logsumexp, the target left out, and E_r the entropy of
the same tokens:

    m = max_r l_r        s_r = e^{l_r − m}        S = Σ_r s_r
    lse_other = m + log S        H_o = log S − Σ_r s_r (l_r − m − E_r) / S

so one all-reduce MAX, without gradient, and one SUM of [s_r, z_y, s_r (l_r − m − E_r)]. All ranks compute the same loss
from these, so a rank's own part of the SUM has the gradient of the SUM. dW and db are a rank's own; dX = Σ_r D_r W_r is
a third all-reduce, in the backward.

Dimensions: P positions, N of them not ignored, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgpb.engine.call import Call, Tensors
from rgpb.engine.sweeps import Scored, checked_rows, score
from rgpb.head import LMHead
from rgpb.kernels.types import acc_dtype
from rgpb.layout import token_scores
from rgpb.parallel import VocabShard, all_max, all_sum, entering

OWN_IGNORE = -100  # no row of a rank's own


def scored(hidden: Tensor, head: LMHead, target: Tensor, call: Call, entropy_grad: bool) -> Scored:
    """The statistics of each position, differentiable in hidden, weight and bias; H_o only with `entropy_grad`.

    With a shard the first three are those of the whole head. hidden [..., H], target [...]
    """
    tensors = Tensors.of(hidden, head, target)
    if head.shard is not None:
        return _of_shards(tensors, call, entropy_grad, head.shard)
    found = score(tensors, call)
    return found if entropy_grad else found._replace(h_o=found.h_o.detach())


def _of_shards(tensors: Tensors, call: Call, entropy_grad: bool, shard: VocabShard) -> Scored:
    hidden, weight, target = tensors.need("hidden", "weight", "target")
    kept, _ = checked_rows(hidden, target, shard.vocab, call.ignore_index)
    target = target if kept.index is None else target[kept.index]
    own = target - shard.start
    mine = (own >= 0) & (own < len(weight))
    found = score(
        tensors._replace(
            hidden=entering(hidden, kept.index, acc_dtype(call.weight_dtype(weight)), shard.group),
            target=torch.where(mine, own, 0),
        ),
        call._replace(ignore_index=OWN_IGNORE),
    )
    if not entropy_grad:
        found = found._replace(h_o=found.h_o.detach())
    merged = _merged(found, mine, call.entropy, shard) if kept.count else list(found[: 2 + call.entropy])
    if kept.index is not None:
        merged = [x.new_zeros(len(hidden)).index_copy(0, kept.index, x) for x in merged]
    return found._replace(**dict(zip(Scored._fields, merged)))


def _merged(found: Scored, mine: Tensor, entropy: bool, shard: VocabShard) -> list[Tensor]:
    """z_y, lse_other and with `entropy` H_o of the whole head, from a rank's own.

    mine: whether this rank has the target, bool [N].
    """
    z, lse_other = found.z_y, found.lse_other
    possible = mine | (z > -torch.inf) | (lse_other > -torch.inf)  # a bias may rule all rows out
    whole = token_scores(
        torch.where(possible, z, 0), lse_other, found.h_o if entropy else None, mask=None, entropy=entropy
    )
    lse = torch.where(mine, lse_other, torch.where(possible, whole.lse, -torch.inf))
    top = all_max(lse, shard.group)
    top = torch.where(top == -torch.inf, 0, top)
    shifted = lse - top
    share = shifted.exp()
    parts = [share, torch.where(mine, z, 0)]
    if whole.entropy is not None:
        excess = torch.where(share > 0, shifted, 0) - torch.where(mine, found.h_o, whole.entropy)
        parts.append(share * excess if found.h_o.requires_grad else (share * excess).detach())
    total, z_y, *mean = all_sum(torch.stack(parts), shard.group)
    some = total > 0
    total = torch.where(some, total, 1)
    merged = [z_y, torch.where(some, top + total.log(), -torch.inf)]
    for of_others in mean:
        h_o = torch.where(some, total.log() - of_others / total, 0)
        merged.append(h_o if found.h_o.requires_grad else h_o.detach())
    return merged
