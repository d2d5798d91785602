"""Preference rows → token ids → padded or packed batches.

Dimensions: R responses, U units (groups, pairs or single responses), W responses of a unit (K, 2 or 1), B responses of
a batch, T padded length, N packed length.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from rgpb.hf import IGNORE
from rgpb.train.config import EVAL_SAMPLE, EVAL_SPLIT
from rgpb.train.layouts import Preferences, Row, Text, common, described, shown
from rgpb.train.rows import GROUPS, pair_up

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer learnt from `texts`, with end and padding tokens.

    Args:
        texts: any strings.
        vocab_size: at most this many tokens. 258 gives bytes alone.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        ValueError: a `vocab_size` below 258 (256 bytes and two special tokens).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size: expected at least {len(alphabet) + 2}, got {vocab_size}")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learner, eos_token=END, pad_token=PAD)


def texts_of(preferences: Preferences) -> Iterator[str]:
    """Every prompt and response, to learn a tokenizer from.

    Raises:
        ValueError: chats, which need a tokenizer with a chat template.
    """
    for row in preferences.rows:
        for text in (row.prompt, *row.completions):
            if not isinstance(text, str):
                raise ValueError(
                    f"{row.where}: expected strings, since the tokenizer of a new model has no chat template; got a "
                    "chat (--model takes a folder whose tokenizer has one)"
                )
            yield text


class RefScores(NamedTuple):
    """Reference scores of all responses' tokens, one response after the other.

    Attributes:
        logp, log_odds: float32 [Σ completion tokens].
        starts: int64 [R + 1], where each response begins.
    """

    logp: Tensor
    log_odds: Tensor
    starts: Tensor


class Response(NamedTuple):
    """One response of a batch.

    Attributes:
        tokens: int64 [n], prompt and completion.
        prompt: tokens of the prompt, ≥ 1.
        label: preferred or not.
        ref: log p and log-odds of the completion's tokens under the reference, float32 [n − prompt] each, or None.
        reward: of a response of a group, higher is better; else None.
        mismatch: the same prompt with the completion of another one, where the objective wants that; else None.
        targets: which tokens are trained on, bool [n]; None: all of the completion.
    """

    tokens: Tensor
    prompt: int
    label: bool
    ref: tuple[Tensor, Tensor] | None
    reward: float | None = None
    mismatch: Response | None = None
    targets: Tensor | None = None


class PreferenceDataset(Dataset[tuple[Response, ...]]):
    """Tokenised units; item i is the tuple of its W responses: one, (chosen, rejected), or a group, the best first.

    Attributes:
        tokens: int32, all responses end to end, each with its prompt in front.
        starts: int64 [R + 1].
        prompts: int64 [R], prompt tokens of each response.
        units: int64 [U, W], responses of each unit; −1 fills up a group of fewer than W, which may be none.
        labels: bool [U, W]. Of a group the best.
        counts: what became of the rows: `rows`, `units`, `responses`, and what was left out or cut, by reason.
        ref: reference scores, or None until `with_ref`.
        rewards: float64 [U, W] of groups, else None.
        mismatches: from `mismatched`, or None.
        targets: bool, as `tokens`: which are trained on; None: those of all completions.
    """

    def __init__(
        self,
        tokens: Tensor,
        starts: Tensor,
        prompts: Tensor,
        units: Tensor,
        labels: Tensor,
        counts: dict[str, int],
        ref: RefScores | None = None,
        rewards: Tensor | None = None,
        mismatches: PreferenceDataset | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.tokens, self.starts, self.prompts = tokens, starts, prompts
        self.units, self.labels, self.counts, self.ref = units, labels, counts, ref
        self.rewards, self.mismatches, self.targets = rewards, mismatches, targets

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> tuple[Response, ...]:
        units, labels = self.units[index].tolist(), self.labels[index].tolist()
        rewards = [None] * len(units) if self.rewards is None else self.rewards[index].tolist()
        made: list[Response] = []
        for r, label, reward in zip(units, labels, rewards):
            if r < 0:  # one token that predicts nothing
                ref = None if self.ref is None else (torch.zeros(0), torch.zeros(0))
                made.append(Response(self.tokens[:1].long(), 1, False, ref, 0.0))
            else:
                mismatch = None if self.mismatches is None else self.mismatches.response(r)
                made.append(self.response(r, label)._replace(reward=reward, mismatch=mismatch))
        return tuple(made)

    def response(self, r: int, label: bool = True) -> Response:
        """Response r by itself."""
        whole = slice(int(self.starts[r]), int(self.starts[r + 1]))
        tokens, ref = self.tokens[whole].long(), None
        if self.ref is not None:
            own = slice(int(self.ref.starts[r]), int(self.ref.starts[r + 1]))
            ref = (self.ref.logp[own], self.ref.log_odds[own])
        targets = None if self.targets is None else self.targets[whole]
        return Response(tokens, int(self.prompts[r]), label, ref, targets=targets)

    def lengths(self) -> Tensor:
        """Tokens of each response, prompt included, int64 [R]."""
        return self.starts.diff()

    def completion_starts(self) -> Tensor:
        """Where each response's completion begins when the completions stand end to end, int64 [R + 1]."""
        return torch.nn.functional.pad((self.lengths() - self.prompts).cumsum(0), (1, 0))

    def with_ref(self, ref: RefScores) -> PreferenceDataset:
        """The same units with reference scores.

        Raises:
            ValueError: scores that aren't those of these responses.
        """
        expected = self.completion_starts()
        if not torch.equal(ref.starts, expected) or len(ref.logp) != int(expected[-1]):
            raise ValueError(f"ref: expected scores of {int(expected[-1])} tokens, got {len(ref.logp)}")
        return self._with(ref=ref)

    def preferred(self) -> PreferenceDataset:
        """Each preferred response once and by itself, for maximum likelihood. The others are counted as left out.

        Raises:
            ValueError: there is none.
        """
        chosen = self.units[self.labels].unique()
        if not len(chosen):
            raise ValueError(f"data: expected a preferred response to fine-tune on, got {len(self)} dispreferred ones")
        left = int((self.units.unique() >= 0).sum()) - len(chosen)
        counts = {**self.counts, "units": len(chosen), "responses": len(chosen), "left out as dispreferred": left}
        every = torch.ones(len(chosen), 1, dtype=torch.bool)
        return self._with(units=chosen[:, None], labels=every, counts=counts, rewards=None, mismatches=None)

    def mismatched(self, max_length: int) -> PreferenceDataset:
        """Each response's prompt with the completion of the next response that has another prompt, [R, 1].

        Raises:
            ValueError: all prompts are the same.
        """
        ends = self.starts.tolist()
        both = [
            (tuple(self.tokens[a : a + n].tolist()), self.tokens[a + n : b].tolist())
            for a, b, n in zip(ends, ends[1:], self.prompts.tolist())
        ]
        if len({prompt for prompt, _ in both}) == 1:
            raise ValueError(
                "data: expected responses to two prompts at least, to put completions behind other prompts; got one "
                "(kto does without with --loss-option z0=0)"
            )
        following = len(both) * [0]  # the nearest response behind it with another prompt, cyclically
        place = next(r for r in range(len(both)) if both[r][0] != both[-1][0])
        for r in reversed(range(len(both))):
            following[r] = place
            if both[r][0] != both[r - 1][0]:
                place = r
        tokens, starts, targets = array("i"), [0], []
        for r, (prompt, _) in enumerate(both):
            tokens.extend([*prompt, *both[following[r]][1]][:max_length])
            starts.append(len(tokens))
            if self.targets is not None:
                a, b = ends[following[r]] + int(self.prompts[following[r]]), ends[following[r] + 1]
                targets.append(torch.nn.functional.pad(self.targets[a:b], (len(prompt), 0))[:max_length])
        count, responses = {"responses": len(both)}, torch.arange(len(both))[:, None]
        return PreferenceDataset(
            torch.tensor(tokens, dtype=torch.int32), torch.tensor(starts), self.prompts, responses,
            torch.ones_like(responses, dtype=torch.bool), count, targets=torch.cat(targets) if targets else None,
        )  # fmt: skip

    def first(self, count: int) -> PreferenceDataset:
        """The first `count` units."""
        return self._some(slice(count))

    def split(self, part: float | None, seed: int) -> tuple[PreferenceDataset, PreferenceDataset]:
        """Units to train on, and those of `held_out` prompts; where none is held out, all of them twice."""
        firsts = self.units[:, 0].tolist()
        keys = [self.tokens[s : s + n].numpy().tobytes() for s, n in zip(self.starts.tolist(), self.prompts.tolist())]
        out = torch.tensor(held_out([keys[r] for r in firsts], part, seed))
        if not out.any():
            return self, self
        trained = self._some(~out)
        trained.counts["units held out"] = int(out.sum())
        return trained, self._some(out)

    def _some(self, which: slice | Tensor) -> PreferenceDataset:
        """These units, in their order."""
        units, labels = self.units[which], self.labels[which]
        counts = {**self.counts, "units": len(units), "responses": int((units.unique() >= 0).sum())}
        rewards = None if self.rewards is None else self.rewards[which]
        return self._with(units=units, labels=labels, counts=counts, rewards=rewards)

    def without_tied_best(self) -> PreferenceDataset:
        """Groups without the responses as good as their best: for objectives that take all others for worse."""
        assert self.rewards is not None
        tied = (self.rewards == self.rewards[:, :1]) & (self.units >= 0)
        tied[:, 0] = False
        left = int(tied.sum())
        counts = {
            **self.counts, "responses": self.counts["responses"] - left, "responses left out, as good as the best": left
        }  # fmt: skip
        return self._with(units=self.units.masked_fill(tied, -1), counts=counts)

    def _with(self, **changes: Any) -> PreferenceDataset:
        return PreferenceDataset(**{**vars(self), **changes})

    def fingerprint(self) -> str:
        """Hex digest of the tokens and where responses and prompts begin: what reference scores depend on."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.starts, self.prompts, *([] if self.targets is None else [self.targets])):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


class Encoded(NamedTuple):
    """A prompt and a response as token ids.

    Attributes:
        ids: all of them.
        start: where the response begins.
        targets: which of the tokens are trained on; None: all from `start`.
    """

    ids: list[int]
    start: int
    targets: list[bool] | None = None


def tokenise(
    preferences: Preferences,
    tokenizer: Any,
    *,
    pairing: str = "best-worst",
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation_side: str = "left",
) -> PreferenceDataset:
    """Token ids of all units.

    Chats: prompt and response have the ids of `apply_chat_template(messages, tokenize=True)`, and nothing is added: how
    a turn ends is the template's. The response begins behind the ids of the prompt with the generation prompt; where
    these don't come first, at the token with the first letter behind their text; where the template writes a
    generation prompt that isn't there when a response follows, behind what both have. A template with
    `{% generation %}` says which tokens of the response are trained on; else all, the template's own end included.

    Strings: the ids of `tokenizer(prompt)`, those that the completion has in the midst of a text, and the end token
    unless the completion ends with it. So the boundary depends on neither side, and a tokenizer that puts a space in
    front of texts puts none between them. An empty prompt without any token is the end token.

    Where the longest of a row's responses and its prompt are longer than `max_length` together, the prompt is cut for
    all of them, to `max_prompt_length` or what the longest response leaves, whichever is more; then each response loses
    what is beyond `max_length`, its end token first. Of a string the tokenizer's own tokens at either side stay, of a
    chat everything but text of messages, none of it the system's: what is cut is letters, and the template writes
    the rest anew. Where nothing of a response is left, the whole unit is left out.

    Args:
        preferences: of any form.
        tokenizer: of transformers, with an end token; for chats also a chat template.
        pairing: see `pair_up`.
        max_length: tokens of prompt and completion together, ≥ 2.
        max_prompt_length: default: half of `max_length`.
        truncation_side: where prompts are cut, "left" or "right".

    Raises:
        ValueError: a tokenizer without end token or chat template; a chat template that fails, that changes the prompt
            when the response follows, or that doesn't show a tool's call or the tools; lengths that don't fit; data of
            which no unit is left.
    """
    limit = prompt_limit(tokenizer, max_length, max_prompt_length)
    units, tied = pair_up(preferences, pairing)
    used = sorted({(row, completion) for row, completions in units for completion in completions})
    place = {response: r for r, response in enumerate(used)}
    wanted: dict[int, list[int]] = {}
    for row, completion in used:
        wanted.setdefault(row, []).append(completion)

    seen = Counter[str]()
    tokens, starts, lengths, targets = array("i"), [0], [], bytearray()
    made = _encoded(preferences.rows, wanted, tokenizer, limit, max_length, truncation_side, seen)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for row, encoded in zip(wanted, made):
        seen["rows with an empty prompt"] += is_empty(preferences.rows[row].prompt)
        for ids, start, of in encoded:
            seen["responses cut to max_length"] += start < max_length < len(ids)
            seen["responses that nothing ends, as the chat template writes them"] += special.isdisjoint(ids[start:])
            tokens.extend(ids[:max_length])
            targets.extend((bytes(start) + b"\x01" * (len(ids) - start) if of is None else bytes(of))[:max_length])
            starts.append(len(tokens))
            lengths.append(min(start, max_length))
    kept = [(row, cs) for row, cs in units if all(lengths[place[row, c]] < max_length for c in cs)]

    def ids_of(row: int, c: int) -> Any:
        r = place[row, c]
        return tokens[starts[r] : starts[r + 1]]

    alike = sum(len(cs) > 1 and all(ids_of(row, c) == ids_of(row, cs[0]) for c in cs[1:]) for row, cs in kept)
    single, width = preferences.form == "labelled", max((len(responses) for _, responses in kept), default=1)
    good = sum(preferences.rows[row].rewards[0] > 0 for row, _ in kept)
    counts = {
        "rows": len(preferences.rows),
        f"rows read as {preferences.layout}": len(preferences.rows),
        **{f"columns left unread ({', '.join(some)})": len(some) for some in [preferences.unread] if some},
        "units": len(kept),
        "responses": len({(row, c) for row, responses in kept for c in responses}),
        "rows left out, all rewards equal": tied,
        "units left out, prompt fills max_length": len(units) - len(kept),
        "responses cut to max_length": 0,
        "prompts cut": 0,
        "units of equal responses": alike,
        "units of the only label": len(kept) if single and good in (0, len(kept)) else 0,
        **preferences.notes,
        **seen,
    }
    if not kept:
        raise ValueError(f"{preferences.source}: expected something to train on, got nothing; {counts}")
    rewards = None
    if pairing == GROUPS:
        of_kept = [[preferences.rows[row].rewards[c] for c in responses] for row, responses in kept]
        rewards = torch.tensor([r + [0.0] * (width - len(r)) for r in of_kept], dtype=torch.float64)
    first = [True] + [False] * (width - 1)
    gaps = torch.frombuffer(targets, dtype=torch.uint8).bool()
    prompts = torch.tensor(lengths)
    return PreferenceDataset(
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(starts),
        prompts,
        torch.tensor([[place[row, c] for c in cs] + [-1] * (width - len(cs)) for row, cs in kept]),
        torch.tensor([[preferences.rows[row].rewards[0] > 0] if single else first for row, _ in kept]),
        counts,
        rewards=rewards,
        targets=None if int(gaps.sum()) == len(gaps) - int(prompts.sum()) else gaps,
    )


# How counts begin of what happened to data that its author may not expect, and what they are parts of
AFFECTED = {
    "rows left out": "rows",
    "rows with ": "rows",
    "prompts cut": "rows",
    "prompts left out": "rows",
    "units left out": "units",
    "units of ": "units",
    "responses cut": "responses",
    "responses left out": "responses",
}

# How those begin whose count the whole lacks
GONE = ("units left out", "responses left out", "rows left out, an empty response")


def check_counts(source: str, counts: Mapping[str, int], but: Sequence[str] = ()) -> None:
    """Refuse data of which most was cut, left out, or is otherwise not what it seems.

    Args:
        source: the data's path.
        counts: of a `PreferenceDataset`.
        but: names of counts that are no reason.

    Raises:
        ValueError: one thing affects more than half of the rows, units or responses.
    """
    for name, count in counts.items():
        of = next((of for begin, of in AFFECTED.items() if name.startswith(begin)), None)
        if of is None or name in but:
            continue
        total = counts[of] + (count if name.startswith(GONE) else 0)
        if 2 * count > total:
            raise ValueError(
                f"{source}: expected at most half of the {of} affected, got {name}: {count} of {total} "
                "(--allow goes on all the same)"
            )


def held_out(prompts: Sequence[Hashable], part: float | None, seed: int) -> list[bool]:
    """Which rows are held out: all of some prompts, drawn from the seed.

    Args:
        prompts: of each row.
        part: of the prompts; None: `EVAL_SPLIT` of them, `EVAL_SAMPLE` at most, and none where that is less than two.

    Raises:
        ValueError: a part that leaves one of the two sides without a prompt.
    """
    different = list(dict.fromkeys(prompts))
    if part is None:
        count = min(EVAL_SAMPLE, int(EVAL_SPLIT * len(different)))
        count = count if count > 1 else 0
    else:
        count = round(part * len(different))
        if part and not 0 < count < len(different):
            raise ValueError(
                f"eval_split: expected a part with a prompt at least on either side, got {part} of {len(different)}"
            )
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    taken = {different[i] for i in order[:count].tolist()}
    return [prompt in taken for prompt in prompts]


def pad_of(tokenizer: Any) -> int:
    """The token that fills up padded rows: the tokenizer's, or its end token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prompt_limit(tokenizer: Any, max_length: int, max_prompt_length: int | None) -> int:
    """Tokens a prompt may have where it has to be cut: `max_prompt_length`, or half of `max_length`.

    Raises:
        ValueError: lengths that leave no room, or a tokenizer without end token.
    """
    limit = max_length // 2 if max_prompt_length is None else max_prompt_length
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    if limit < 1:
        raise ValueError(f"max_prompt_length: expected at least 1, got {limit}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with an end-of-sequence token, got none")
    return limit


def prompt_tokens(
    rows: Sequence[Row], tokenizer: Any, keep: int, side: str = "left"
) -> tuple[list[list[int] | None], int]:
    """Token ids of prompts, as in front of a response in `tokenise`, cut to at most `keep` tokens.

    Returns:
        The ids of each, None of one that can't be cut to that; and how many were cut.
    """
    made: list[list[int] | None] = []
    cut = 0
    for row, ids in zip(rows, _prompts(rows, tokenizer)):
        if len(ids) > keep:
            row, ids = _cut(row, ids, tokenizer, keep, side)
            cut += len(ids) <= keep
        made.append(ids if len(ids) <= keep else None)
    return made, cut


def turn_end(row: Row, tokenizer: Any) -> int | None:
    """The special token that the template writes first behind what an assistant says to this prompt; None: there is
    none, or the row is of strings.

    Raises:
        ValueError: a template that fails.
    """
    if isinstance(row.prompt, str):
        return None
    texts = [_rendered(row, tokenizer, [*row.prompt, {"role": "assistant", "content": said}]) for said in ("A", "B")]
    tail = texts[0][len(texts[0]) - common(*(text[::-1] for text in texts)) :]
    ids = _ids(tokenizer, [tail], [row.where])[0]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return ids[0] if ids and ids[0] in special else None


def _encoded(
    rows: Sequence[Row], wanted: Mapping[int, list[int]], tokenizer: Any, limit: int, max_length: int, side: str,
    counts: Counter[str],
) -> Iterator[list[Encoded]]:  # fmt: skip
    """The responses of each of these rows, with their prompts cut where that has to be."""
    order = list(wanted)
    for first in range(0, len(order), PART):
        part = [(rows[r], wanted[r]) for r in order[first : first + PART]]
        for (row, which), encoded in zip(part, _together(part, tokenizer, counts)):
            longest = max(len(ids) - start for ids, start, _ in encoded)
            start = max(start for _, start, _ in encoded)
            if start + longest > max_length and start > (keep := max(limit, max_length - longest)):
                if isinstance(row.prompt, str):
                    ids = _cut(row, encoded[0].ids[:start], tokenizer, keep, side)[1]
                    cut = [Encoded(ids + whole[start:], len(ids)) for whole, _, _ in encoded]
                else:
                    shorter, ids = _cut(row, encoded[0].ids[:start], tokenizer, keep, side)
                    cut = _together([(shorter, which)], tokenizer, Counter())[0] if len(ids) <= keep else encoded
                counts["prompts cut"] += max(s for _, s, _ in cut) < start
                encoded = cut
            yield encoded


def _together(part: Sequence[tuple[Row, list[int]]], tokenizer: Any, counts: Counter[str]) -> list[list[Encoded]]:
    """Rows with the responses that are wanted of them, uncut."""
    prompts = _prompts([row for row, _ in part], tokenizer)
    responses = [(row, row.completions[c]) for row, which in part for c in which]
    if isinstance(part[0][0].prompt, str):
        end = tokenizer.eos_token_id
        follow = iter(following(tokenizer, [str(text) for _, text in responses], [row.where for row, _ in responses]))
        made = [[next(follow) for _ in which] for _, which in part]
        return [
            [Encoded(ids + (own if own[-1:] == [end] else [*own, end]), len(ids)) for own in completions]
            for ids, completions in zip(prompts, made)
        ]
    chats = [(row, [*row.prompt, *text]) for row, text in responses if isinstance(text, list)]  # type: ignore[list-item]
    lost = {(row.where, what) for row, chat in chats for what in _left_out(row, tokenizer, chat)}
    counts.update(f"rows with {what} left out by the template" for _, what in sorted(lost))
    found = _chat_ids(chats, tokenizer)
    for (row, text), (_, marks) in zip(responses, found):
        _check_says(row, tokenizer, text)
        roles = {turn["role"] for turn in text if isinstance(turn, dict)} if marks is None else set()
        counts.update(f"responses with turns of {role}, trained on" for role in roles - {"assistant", "model"})
    each = iter(found)
    return [
        [_placed(row, tokenizer, ids, row.completions[c], *next(each)) for c in which]
        for (row, which), ids in zip(part, prompts)
    ]


PART = 1000  # rows that are tokenised at a time
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def is_empty(prompt: Text) -> bool:
    """Whether a prompt says nothing."""
    if isinstance(prompt, str):
        return not prompt
    return not any(_said(turn) or any(turn[key] for key in turn.keys() - {"role", "content"}) for turn in prompt)


def _said(turn: dict[str, Any]) -> str:
    """The text of a message."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _prompts(rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    """Token ids of whole prompts, chats with the generation prompt; never none."""
    places = [row.where for row in rows]
    if rows and not isinstance(rows[0].prompt, str):
        return [ids for ids, _ in _chat_ids([(row, row.prompt) for row in rows], tokenizer, prompt=True)]  # type: ignore[misc]
    every = _ids(tokenizer, [str(row.prompt) for row in rows], places, add_special_tokens=True)
    return [ids or [tokenizer.eos_token_id] for ids in every]


def _chat_ids(
    chats: Sequence[tuple[Row, list[dict[str, Any]]]], tokenizer: Any, prompt: bool = False
) -> list[tuple[list[int], list[int] | None]]:
    """Token ids of chats by the template; of whole ones also which of them it says that the assistant wrote."""
    made: list[tuple[list[int], list[int] | None]] = []
    marked = [not prompt and _marks(tokenizer, row) for row, _ in chats]
    if _is_own(tokenizer) and not any(marked):
        texts = [_rendered(row, tokenizer, chat, prompt) for row, chat in chats]
        return [(ids, None) for ids in _ids(tokenizer, texts, [row.where for row, _ in chats])]
    for (row, chat), marks in zip(chats, marked):
        if marks and _is_own(tokenizer):
            made.append(_marked_ids(row, tokenizer, chat))
        elif marks:
            out = _rendered(row, tokenizer, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            made.append((list(out["input_ids"]), list(out["assistant_masks"])))
        else:
            made.append((list(_rendered(row, tokenizer, chat, prompt, tokenize=True, return_dict=False)), None))
    return made


def _marked_ids(row: Row, tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and which of them have a letter of what the template marks as the assistant's.

    transformers' own mask ends at a part that begins with a letter of no token, and goes on to the end of the chat
    behind one that ends with such: spaces, for tokenizers that drop them, or leave them out of the offsets.
    """
    template = {**tokenizer.special_tokens_map, **(row.template or {})}
    text = _rendered(row, tokenizer, chat)
    source = tokenizer.get_chat_template(tools=template.get("tools"))
    # (texts, of each the first and last letter of what is marked)
    rendered: Any = render_jinja_template([chat], chat_template=source, return_assistant_tokens_mask=True, **template)
    spans = rendered[1][0]
    found = _with_offsets(row, tokenizer, text)
    marks, before = [], 0
    for start, end in found["offset_mapping"]:
        first = start if start < end else before  # a token of spaces alone
        marks.append(int(any(first < stop and begin < end for begin, stop in spans)))
        before = end
    return found["input_ids"], marks


def _with_offsets(row: Row, tokenizer: Any, text: str) -> Any:
    """Token ids of a chat's text, with the letters of each."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{row.where}: expected a fast tokenizer, to find the response in its chat; got a slow one")
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _is_own(tokenizer: Any) -> bool:
    """Whether a chat's ids are those of its text: some classes tokenise chats in another way."""
    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


def _marks(tokenizer: Any, row: Row) -> bool:
    """Whether the template says what the assistant wrote."""
    text = getattr(tokenizer, "chat_template", None) and tokenizer.get_chat_template(
        tools=(row.template or {}).get("tools")
    )
    return isinstance(text, str) and GENERATION.search(text) is not None


def _rendered(
    row: Row, tokenizer: Any, chat: list[dict[str, Any]], prompt: bool = False, tokenize: bool = False, **more: Any
) -> Any:
    """A chat by the tokenizer's template, of a prompt with the generation prompt.

    Raises:
        ValueError: a tokenizer without template, or one that fails.
    """
    if getattr(tokenizer, "chat_template", None) is None and _is_own(tokenizer):
        raise ValueError(f"{row.where}: expected strings, since the tokenizer has no chat template; got a chat")
    try:
        return tokenizer.apply_chat_template(
            chat, tokenize=tokenize, add_generation_prompt=prompt, **more, **(row.template or {})
        )
    except Exception as error:  # whatever a template does
        silent = any(turn.get("content") is None for turn in chat)
        remedy = ' (a message has no content: some templates want "" there)' if silent else ""
        raise ValueError(
            f"{row.where}: expected a chat that the template takes, got {described(error)}{remedy}"
        ) from error


def _placed(
    row: Row, tokenizer: Any, prompt: list[int], completion: Text, ids: list[int], marks: list[int] | None
) -> Encoded:
    """Where the response is in the ids of prompt and response."""
    runs = [] if marks is None else [i for i, mark in enumerate(marks) if mark and not (i and marks[i - 1])]
    turns = sum(turn.get("role") == "assistant" for turn in (*row.prompt, *completion) if isinstance(turn, dict))
    own = sum(turn.get("role") == "assistant" for turn in completion if isinstance(turn, dict))
    if ids[: len(prompt)] == prompt:
        start = len(prompt)
    else:
        start = _behind_text(row, tokenizer, completion, ids)
        if marks is not None and len(runs) == turns and own:
            start = runs[-own]
    start = max(start, 1)  # nothing predicts the first token
    if marks is None and start < len(ids):
        return Encoded(ids, start)
    targets = [bool(mark) and i >= start for i, mark in enumerate(marks or [])]
    if not any(targets):
        raise ValueError(f"{row.where}: expected a chat template that writes the response, got nothing of it")
    return Encoded(ids, targets.index(True), targets)


def _behind_text(row: Row, tokenizer: Any, completion: Text, ids: list[int]) -> int:
    """The first token with a letter behind the text of the prompt."""
    chat: list[dict[str, Any]] = [*row.prompt, *completion]  # type: ignore[list-item]
    prompt: list[dict[str, Any]] = row.prompt  # type: ignore[assignment]
    whole, asked, bare = (
        _rendered(row, tokenizer, turns, asks) for turns, asks in ((chat, False), (prompt, True), (prompt, False))
    )
    shared = common(whole, asked)
    if shared < len(bare) or not whole.startswith(bare):
        before, after = (shown(text[max(shared - 20, 0) :][:40]) for text in (asked, whole))
        raise ValueError(
            f"{row.where}: expected a chat template that leaves the prompt as it is when the response follows; "
            f"got {before} before and {after} after"
        )
    offsets = _with_offsets(row, tokenizer, whole)["offset_mapping"]
    return next((i for i, (_, end) in enumerate(offsets) if end > shared), len(ids))


def _left_out(row: Row, tokenizer: Any, chat: list[dict[str, Any]]) -> list[str]:
    """What the template shows nothing of: things beside role and content, turns of neither user nor assistant.

    Raises:
        ValueError: of tools, of a call, or of parts as they are, nothing is shown.
    """
    beside = {
        key
        for turn in chat
        for key, x in turn.items()
        if x not in (None, "", [], {}) and key not in ("role", "content")
    }
    parts = [turn["content"] for turn in chat if isinstance(turn.get("content"), list)]
    others = {turn["role"] for turn in chat if turn.get("content")} - {"user", "assistant", "model"}
    if not beside and not parts and not row.template and not others:
        return []
    whole = _rendered(row, tokenizer, chat)
    for part in parts:
        if str(part) in whole:
            got = f"one that writes {shown(part)}"
            raise ValueError(f"{row.where}: expected a chat template that takes lists of parts, got {got}")

    def alike(of: Row, turns: list[dict[str, Any]]) -> bool:
        try:
            return bool(_rendered(of, tokenizer, turns) == whole)
        except ValueError:
            return False

    def same(of: Row, without: set[str], role: str = "") -> bool:
        turns = [{k: value for k, value in turn.items() if k not in without} for turn in chat if turn["role"] != role]
        return alike(of, turns)

    spelt = [{**turn, "content": "None"} if turn.get("content", "") is None else turn for turn in chat]
    if spelt != chat and alike(row, spelt):
        raise ValueError(
            f"{row.where}: content: expected a chat template that takes null, got one that writes None; give an empty "
            "string instead"
        )

    bare = None if row.template is None else {key: x for key, x in row.template.items() if key != "tools"}
    for key, lost in (
        ("tool_calls", "tool_calls" in beside and same(row, {"tool_calls"})),
        ("tools", bare is not None and bare != row.template and same(row._replace(template=bare), set())),
    ):
        if lost:
            raise ValueError(f"{row.where}: {key}: expected a chat template that shows them, got one that does not")
    for place, turn in enumerate(chat):
        calls = turn.get("tool_calls")
        calls = calls if isinstance(calls, list) else []
        for n in range(len(calls)):
            if alike(row, [*chat[:place], {**turn, "tool_calls": calls[:n] + calls[n + 1 :]}, *chat[place + 1 :]]):
                raise ValueError(
                    f"{row.where}: tool_calls: expected a chat template that shows them, got one that leaves out "
                    f"{shown(calls[n])}"
                )
    unseen = [f"{key} of messages" for key in sorted(beside) if same(row, {key})]
    talking = [turn if not turn.get("tool_calls") else {**turn, "content": ""} for turn in chat]
    if any(_said(turn) and turn.get("tool_calls") for turn in chat) and alike(row, talking):
        unseen.append("content beside tool_calls")
    return unseen + [f"turns of {role}" for role in sorted(others) if same(row, set(), role)]


def _check_says(row: Row, tokenizer: Any, completion: Text) -> None:
    """Refuse a response of which the template shows nothing but who speaks."""
    turns: list[dict[str, Any]] = [turn for turn in completion if isinstance(turn, dict)]
    if any(_said(turn).strip() for turn in turns):
        return
    nothing = [{"role": turn["role"], "content": ""} for turn in turns]
    prompt: list[dict[str, Any]] = row.prompt  # type: ignore[assignment]
    if _rendered(row, tokenizer, [*prompt, *turns]) == _rendered(row, tokenizer, [*prompt, *nothing]):
        raise ValueError(f"{row.where}: expected a response with something that the template shows, got {shown(turns)}")


def _cut(row: Row, ids: list[int], tokenizer: Any, keep: int, side: str) -> tuple[Row, list[int]]:
    """A prompt without as much of its text, from that side, as makes it `keep` tokens long, or as there is."""
    if isinstance(row.prompt, str):
        inner = _ids(tokenizer, [row.prompt], [row.where])[0]
        before = next((i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner), None)
        if before is None:
            raise ValueError(
                f"{row.where}: prompt: expected at most {keep} tokens, since this one can't be cut; got {len(ids)}"
            )
        head, tail = ids[:before], ids[before + len(inner) :]
        room = max(keep - len(head) - len(tail), 0)
        left = inner[len(inner) - room :] if side == "left" else inner[:room]
        return row, head + left + tail
    texts = [turn.get("content") for turn in row.prompt if isinstance(turn, dict)]
    keeps = [turn["role"] in ("system", "developer") for turn in row.prompt if isinstance(turn, dict)]
    lengths = [len(text) if isinstance(text, str) and not whole else 0 for text, whole in zip(texts, keeps)]

    def without(letters: int) -> tuple[Row, list[int]]:
        turns: list[dict[str, Any]] = [dict(turn) for turn in row.prompt]  # type: ignore[arg-type]
        order = range(len(turns)) if side == "left" else reversed(range(len(turns)))
        for i in order:
            gone = min(letters, lengths[i])
            if gone:
                text = turns[i]["content"]
                turns[i]["content"] = text[gone:] if side == "left" else text[: len(text) - gone]
                letters -= gone
        shorter = row._replace(prompt=turns)
        return shorter, _prompts([shorter], tokenizer)[0]

    low, high = 0, sum(lengths)
    best = without(high)
    while len(best[1]) <= keep and high - low > 1:
        middle = (low + high) // 2
        tried = without(middle)
        if len(tried[1]) <= keep:
            best, high = tried, middle
        else:
            low = middle
    return best


def _ids(tokenizer: Any, texts: list[str], places: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text.

    Raises:
        ValueError: a text that the tokenizer fails at, with its place.
    """
    try:
        return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []
    except Exception as error:
        if len(texts) > 1:
            return [_ids(tokenizer, [text], [where], add_special_tokens)[0] for text, where in zip(texts, places)]
        got = described(error)
        raise ValueError(f"{places[0]}: expected a text that the tokenizer takes, got {got}") from error


ANCHORS = (
    "\n",
    ".",
    "a",
    "1",
    "|",
    "é",
)  # what a completion may stand behind, to see what it is in the midst of a text


def following(tokenizer: Any, texts: list[str], places: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in the midst of another one: without the space that some tokenizers put in front of texts.

    Raises:
        ValueError: a text that grows together with whatever it stands behind.
    """
    made = _ids(tokenizer, texts, places)
    alone = {text: _ids(tokenizer, [text], ["tokenizer"])[0] for text in (*ANCHORS, "e", "A", "x")}

    def behind(anchor: str, text: str, where: str) -> list[int] | None:
        head = alone[anchor]
        both = _ids(tokenizer, [anchor + text], [where])[0]
        return both[len(head) :] if both[: len(head)] == head else None

    if all(behind(".", text, "tokenizer") in (None, alone[text]) for text in ("a", "e", "A", "x", "1")):
        return made
    for i, text in enumerate(texts):
        found = next((ids for anchor in ANCHORS if (ids := behind(anchor, text, places[i])) is not None), None)
        if found is None:
            raise ValueError(f"{places[i]}: expected a response that can follow a prompt, got {shown(text)}")
        made[i] = found
    return made


class Collator:
    """Units → a batch for `rgpb.hf`: all first responses of the units, then all second ones ([chosen; rejected]); of
    groups those of the first, then those of the second, and so on.

    Padded on the right: `input_ids`, `attention_mask`, `labels`, int64 [B, T]. Packed: `input_ids`, `labels`,
    `position_ids` [1, N] and `cu_seqlens` int32 [B + 1]. Labels are −100 on prompt and padding and not shifted. Always
    `label` bool [B]; with reference scores `ref_logp` and `ref_log_odds` float32, [B, T] or [N], aligned to the shifted
    targets: 0 where those don't count; of groups `rewards` float64 [G, K]; where responses have one, `mismatched`, such
    a batch of their mismatches.

    Args:
        pad: the token that fills up padded rows.
        packing: whether to pack.
    """

    def __init__(self, pad: int, packing: bool = False) -> None:
        self.pad, self.packing = pad, packing

    def __call__(self, units: Sequence[tuple[Response, ...]]) -> dict[str, Tensor]:
        responses = [unit[w] for w in range(len(units[0])) for unit in units]
        extra: dict[str, Tensor] = {}
        if responses[0].reward is not None:
            responses = [response for unit in units for response in unit]
            extra["rewards"] = torch.tensor([[r.reward for r in unit] for unit in units], dtype=torch.float64)
        columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": []}
        for response in responses:
            columns["input_ids"].append(response.tokens)
            labels = response.tokens.clone()
            labels[: response.prompt] = IGNORE
            if response.targets is not None:
                labels[~response.targets] = IGNORE
            columns["labels"].append(labels)
            if response.ref is not None:
                for name, values in zip(("ref_logp", "ref_log_odds"), response.ref):
                    whole = torch.zeros(len(labels))
                    whole[response.prompt - 1 : -1] = values
                    columns.setdefault(name, []).append(whole)
        # masked, so any token will do: one that the model has, which needn't have the tokenizer's own
        pad = min(self.pad, max(int(response.tokens.max()) for response in responses))
        fill = {"input_ids": pad, "labels": IGNORE}
        others = [(response.mismatch,) for response in responses if response.mismatch is not None]
        if others:
            extra["mismatched"] = self(others)  # type: ignore[assignment]
        extra["label"] = torch.tensor([response.label for response in responses])
        lengths = torch.tensor([len(response.tokens) for response in responses])
        if not self.packing:
            pad_sequence = torch.nn.utils.rnn.pad_sequence
            batch = {name: pad_sequence(c, True, float(fill.get(name, 0))) for name, c in columns.items()}
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            return {**batch, "attention_mask": mask, **extra}
        flat = {name: torch.cat(column) for name, column in columns.items()}
        packed = {name: values[None] if name in fill else values for name, values in flat.items()}
        packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
        packed["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return {**packed, **extra}
