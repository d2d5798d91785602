"""The upper layers of a real model: what is below them is frozen, so it is run once over all texts and kept on disk.

A unit is a prompt with its completions, two of a pair (chosen first) or more of a group. They stand in one row, prompt
first, and no completion sees another: the prompt is worked on once. Units that are trained on together are one row too.

The head is the embedding (tied), and what the embedding feeds is frozen, so the head is frozen as well. Trained are the
last layers and the norm after them.

Dimensions: N positions of a row, M tokens of its completions, R completions, H hidden size.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rgpb
from rgpb.analysis import shifts
from rgpb.layout import TokenScores
from rgpb.objectives import OBJECTIVES
from rgpb.train.files import save_whole_file

from .models import LOG, descend

ROW = 1024  # positions of a row where nothing is trained, about
SCORES = ("logp", "log_odds", "lse", "entropy", "other_entropy")
SHARES = torch.linspace(0, 1, 101, dtype=torch.float64)  # at which quantiles of the tokens' shifts are kept


class Unit(NamedTuple):
    """A prompt and its completions, as token ids; `rewards` of groups, empty for pairs."""

    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]


class Known(NamedTuple):
    """A unit, its hidden states below the trained layers [N, H], and the start's scores of its tokens, [M]."""

    unit: Unit
    hidden: Tensor
    ref: TokenScores


class Row(NamedTuple):
    """Units side by side: [N] or [M] over the row, `bounds` [R + 1] of the completions among the M tokens.

    `places` [M] is where the hidden state stands that predicts each token, `taken` where its scores stand among the M
    of the whole units, one unit after another.
    """

    ids: Tensor
    used: Tensor  # which positions of the whole units are here, bool
    positions: Tensor
    mask: Tensor  # bool [1, 1, N, N]
    places: Tensor
    targets: Tensor
    taken: Tensor
    bounds: Tensor
    sides: list[int]  # of each completion, its place in its unit


def pack(units: Sequence[Unit], which: Sequence[Sequence[int]], *, stacked: bool = False) -> Row:
    """A row of units with those completions each that `which` names, at least one.

    Completions come unit by unit, or `stacked`: the first of each unit, then the second of each.
    """
    ids: list[int] = []
    used: list[bool] = []
    positions: list[int] = []
    of_unit: list[int] = []
    of_side: list[int] = []
    found: list[tuple[int, int, list[int], list[int], list[int]]] = []
    before = 0  # tokens of completions of earlier units
    for number, (unit, sides) in enumerate(zip(units, which)):
        first, end = len(ids), len(unit.prompt)
        starts = [before, *accumulate((len(one) for one in unit.completions), initial=before)][1:]
        ids += unit.prompt
        used += [True] * end + [k in sides for k, one in enumerate(unit.completions) for _ in one]
        positions += range(end)
        of_side += [-1] * end
        for k in sorted(sides):
            one, at = unit.completions[k], len(ids)
            ids += one
            positions += range(end, end + len(one))
            of_side += [k] * len(one)
            places = [first + end - 1, *range(at, at + len(one) - 1)]
            found.append((list(sides).index(k), k, places, one, [*range(starts[k], starts[k] + len(one))]))
        of_unit += [number] * (len(ids) - first)
        before = starts[-1]
    if stacked:
        found.sort(key=lambda its: its[0])  # stable: units stay in their order
    unit_of, side_of, order = torch.tensor(of_unit), torch.tensor(of_side), torch.arange(len(ids))
    sees = (side_of[None] == -1) | (side_of[None] == side_of[:, None])
    mask = sees & (unit_of[None] == unit_of[:, None]) & (order[None] <= order[:, None])
    return Row(
        ids=torch.tensor(ids),
        used=torch.tensor(used),
        positions=torch.tensor(positions),
        mask=mask[None, None],
        places=torch.tensor([x for its in found for x in its[2]]),
        targets=torch.tensor([x for its in found for x in its[3]]),
        taken=torch.tensor([x for its in found for x in its[4]]),
        bounds=torch.tensor([0, *accumulate(len(its[3]) for its in found)]),
        sides=[its[1] for its in found],
    )


class Upper(nn.Module):
    """The last `count` layers of a Llama and its last norm: copies, to be trained."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.layers = deepcopy(model.model.layers[-count:])
        self.norm = deepcopy(model.model.norm)
        self.rotary = model.model.rotary_emb

    def forward(self, hidden: Tensor, row: Row) -> Tensor:
        """What the head turns into logits, for the tokens of the row's completions. [N, H] → [M, H]"""
        x, positions = hidden[None], row.positions[None]
        turned = self.rotary(x, position_ids=positions)
        for layer in self.layers:
            x = layer(x, attention_mask=row.mask, position_ids=positions, position_embeddings=turned)
        return self.norm(x[0, row.places])


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has a lock; another may have it. With `wait` until it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def below(model: Any, count: int, row: Row) -> Tensor:
    """Hidden states of a row under all but the last `count` layers. [N, H]"""
    x, positions = model.model.embed_tokens(row.ids)[None], row.positions[None]
    turned = model.model.rotary_emb(x, position_ids=positions)
    for layer in model.model.layers[:-count]:
        x = layer(x, attention_mask=row.mask, position_ids=positions, position_embeddings=turned)
    return x[0]


def whole(units: Sequence[Unit]) -> list[range]:
    """All completions of each."""
    return [range(len(unit.completions)) for unit in units]


def rows_of(units: Sequence[Unit]) -> Iterator[range]:
    """Units that fit a row together."""
    first, size = 0, 0
    for at, unit in enumerate(units):
        size += len(unit.prompt) + sum(map(len, unit.completions))
        if size >= ROW or at == len(units) - 1:
            yield range(first, at + 1)
            first, size = at + 1, 0


@torch.no_grad()
def remember(model: Any, head: rgpb.LMHead, count: int, units: Sequence[Unit], folder: Path) -> list[Known]:
    """Hidden states and reference scores of units, from `folder` or put there; what stands there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    upper, known = Upper(model, count), []
    rows = [[units[i] for i in places] for places in rows_of(units)]
    for wait in (False, True):  # what another process is at comes last
        for number, some in enumerate(rows):
            path = folder / f"{number:04d}.pt"
            if path.exists():
                continue
            with claimed(path.with_suffix(".lock"), wait=wait) as mine:
                if mine and not path.exists():
                    row = pack(some, whole(some))
                    hidden = below(model, count, row)
                    ref = score(upper, head, hidden, row)
                    kept = {"ids": row.ids, "targets": row.targets, "hidden": hidden, **ref._asdict()}
                    save_whole_file(path, partial(torch.save, kept))
                    LOG.info("%s: %d of %d rows below the trained layers", folder.name, number + 1, len(rows))
    for number, some in enumerate(rows):
        path, row = folder / f"{number:04d}.pt", pack(some, whole(some))
        kept = torch.load(path, weights_only=True)
        if not torch.equal(kept["ids"], row.ids) or not torch.equal(kept["targets"], row.targets):
            raise ValueError(f"work: expected the hidden states of these texts in {path}, got others; remove {folder}")
        at = token = 0
        for unit in some:
            n, m = len(unit.prompt) + sum(map(len, unit.completions)), sum(map(len, unit.completions))
            ref = TokenScores(*(kept[name][token : token + m] for name in SCORES))
            known.append(Known(unit, kept["hidden"][at : at + n], ref))
            at, token = at + n, token + m
    return known


def score(upper: Upper, head: rgpb.LMHead, hidden: Tensor, row: Row, entropy: bool = True) -> TokenScores:
    """Scores of a row's completions."""
    return rgpb.linear_logprob(upper(hidden, row), head, row.targets, entropy=entropy)


class Batch(NamedTuple):
    """What one step is trained on: a row, its hidden states, the start's scores, and what an objective may want."""

    row: Row
    hidden: Tensor
    ref: TokenScores
    label: Tensor  # bool [R]: the first of its unit
    rewards: Tensor | None  # [G, K] of groups of one size


def batch(known: Sequence[Known], which: Sequence[Sequence[int]], *, stacked: bool = False) -> Batch:
    """The batch of units with those completions each that `which` names."""
    row = pack([its.unit for its in known], which, stacked=stacked)
    hidden = torch.cat([its.hidden for its in known])[row.used]
    ref = TokenScores(*(torch.cat([getattr(its.ref, name) for its in known])[row.taken] for name in SCORES))
    rewards = [[its.unit.rewards[k] for k in sorted(sides)] for its, sides in zip(known, which) if its.unit.rewards]
    label = torch.tensor([side == 0 for side in row.sides])
    alike = not stacked and len({len(one) for one in rewards}) == 1
    return Batch(row, hidden, ref, label, torch.tensor(rewards) if alike else None)


def train(
    upper: Upper, head: rgpb.LMHead, make: Callable[[int], Batch], objective: str, *, rate: float, steps: int,
    reference: Upper | None = None, **options: Any,
) -> list[float]:  # fmt: skip
    """Train in place, on `make(step)` at each step; the reference is the start, or another. Returns the losses."""
    specs = [OBJECTIVES[part.split("*")[-1].strip()] for part in objective.split("+")]

    def loss_of(step: int) -> Tensor:
        its = make(step)
        extra = dict(options)
        if any(spec.ref for spec in specs):
            extra["ref"] = its.ref
            if reference is not None:
                with torch.no_grad():
                    extra["ref"] = score(reference, head, its.hidden, its.row)
        if any(spec.label for spec in specs):
            extra["label"] = its.label
        if any(spec.rewards for spec in specs):
            extra["rewards"] = its.rewards
        return rgpb.fused_loss(
            upper(its.hidden, its.row), head, its.row.targets, objective=objective, cu_seqlens=its.row.bounds, **extra
        )

    return descend(upper, loss_of, lr=rate, steps=steps, schedule="cosine")


@torch.no_grad()
def measure(upper: Upper, head: rgpb.LMHead, known: Sequence[Known]) -> tuple[dict[str, list[float]], Tensor]:
    """What moved from the start to `upper`, for each completion in turn: `shift` of Σ log p, mean absolute `logit`
    shift, its `gini` over the tokens, and the `quantiles` of all tokens' shifts of log p; and these themselves."""
    found: dict[str, list[float]] = {"shift": [], "logit": [], "gini": []}
    tokens = []
    for places in rows_of([its.unit for its in known]):
        some = [known[i] for i in places]
        its = batch(some, whole([one.unit for one in some]))
        moved = shifts(
            its.ref, score(upper, head, its.hidden, its.row, entropy=False), its.row.targets, cu_seqlens=its.row.bounds
        )
        for name, values in (("shift", moved.logp), ("logit", moved.logit_mean), ("gini", moved.gini)):
            found[name] += values.tolist()
        tokens.append(moved.token_logp)
    every = torch.cat(tokens)
    found["quantiles"] = every.quantile(SHARES).tolist()
    return {name: [round_(x) for x in values] for name, values in found.items()}, every.float()


def round_(x: float) -> float:
    """To five digits."""
    return float(f"{x:.5g}")


def likelihoods(known: Sequence[Known]) -> dict[str, list[float]]:
    """Of each completion in turn: the start's Σ log p, and the number of tokens."""
    found: dict[str, list[float]] = {"logp": [], "tokens": []}
    for its in known:
        lengths = [len(one) for one in its.unit.completions]
        found["logp"] += [round_(part.double().sum().item()) for part in its.ref.logp.split(lengths)]
        found["tokens"] += lengths
    return found
