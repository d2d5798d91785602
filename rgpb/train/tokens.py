"""Preference rows → token ids → padded or packed batches.

Dimensions: R responses, U units (groups, pairs or single responses), W responses of a unit (K, 2 or 1), B responses of
a batch, T padded length, N packed length.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from rgpb.hf import IGNORE
from rgpb.layout import TokenScores
from rgpb.train.rows import GROUPS, Preferences, Row, pair_up, shown

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
                    f"{row.where}: expected strings, since a tokenizer learnt here has no chat template; got a chat"
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
    """

    tokens: Tensor
    prompt: int
    label: bool
    ref: tuple[Tensor, Tensor] | None
    reward: float | None = None
    mismatch: Response | None = None


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
    ) -> None:
        self.tokens, self.starts, self.prompts = tokens, starts, prompts
        self.units, self.labels, self.counts, self.ref = units, labels, counts, ref
        self.rewards, self.mismatches = rewards, mismatches

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
        tokens = self.tokens[self.starts[r] : self.starts[r + 1]].long()
        ref = None
        if self.ref is not None:
            own = slice(int(self.ref.starts[r]), int(self.ref.starts[r + 1]))
            ref = (self.ref.logp[own], self.ref.log_odds[own])
        return Response(tokens, int(self.prompts[r]), label, ref)

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
        """Each preferred response once and by itself, for maximum likelihood. The others are counted as left out."""
        chosen = self.units[self.labels].unique()
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
        tokens, starts = array("i"), [0]
        for r, (prompt, _) in enumerate(both):
            tokens.extend([*prompt, *both[following[r]][1]][:max_length])
            starts.append(len(tokens))
        count, responses = {"responses": len(both)}, torch.arange(len(both))[:, None]
        return PreferenceDataset(
            torch.tensor(tokens, dtype=torch.int32), torch.tensor(starts), self.prompts, responses,
            torch.ones_like(responses, dtype=torch.bool), count,
        )  # fmt: skip

    def first(self, count: int) -> PreferenceDataset:
        """The first `count` units."""
        units, labels = self.units[:count], self.labels[:count]
        counts = {**self.counts, "units": len(units), "responses": int((units.unique() >= 0).sum())}
        rewards = None if self.rewards is None else self.rewards[:count]
        return self._with(units=units, labels=labels, counts=counts, rewards=rewards)

    def without_tied_best(self) -> PreferenceDataset:
        """Groups without the responses as good as their best: for objectives that take all others for worse."""
        assert self.rewards is not None
        tied = (self.rewards == self.rewards[:, :1]) & (self.units >= 0)
        tied[:, 0] = False
        counts = {**self.counts, "responses left out, as good as the best": int(tied.sum())}
        return self._with(units=self.units.masked_fill(tied, -1), counts=counts)

    def _with(self, **changes: Any) -> PreferenceDataset:
        return PreferenceDataset(**{**vars(self), **changes})

    def fingerprint(self) -> str:
        """Hex digest of the tokens and where responses and prompts begin: what reference scores depend on."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.starts, self.prompts):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def tokenise(
    preferences: Preferences,
    tokenizer: Any,
    *,
    pairing: str = "best-worst",
    max_length: int = 1024,
    max_prompt_length: int | None = None,
) -> PreferenceDataset:
    """Token ids of all units.

    Prompt and completion are tokenised separately, so the boundary doesn't depend on the completion; the prompt gets
    the beginning-of-sequence token where the tokenizer adds one, the completion the end token. A prompt longer than
    `max_prompt_length` loses its beginning, then a response beyond `max_length` its end (with the end token). Where
    nothing of the completion is left, the whole unit is left out and counted.

    Args:
        preferences: of any form.
        tokenizer: of transformers, with an end token; for chats also a chat template.
        pairing: see `pair_up`.
        max_length: tokens of prompt and completion together, ≥ 2.
        max_prompt_length: default: half of `max_length`.

    Raises:
        ValueError: a tokenizer without end token or chat template, a chat template whose text of the prompt changes
            with the response, lengths that don't fit, or data of which no unit is left.
    """
    limit = prompt_limit(tokenizer, max_length, max_prompt_length)
    units, tied = pair_up(preferences, pairing)
    used = sorted({(row, completion) for row, completions in units for completion in completions})
    place = {response: r for r, response in enumerate(used)}
    rows = sorted({row for row, _ in used})
    prompts, completions = _texts(preferences, rows, used, tokenizer)
    end = tokenizer.eos_token_id
    prompt_ids = dict(zip(rows, prompt_tokens(prompts, tokenizer, limit)))

    tokens, starts, lengths, cut = array("i"), [0], [], 0
    for (row, _), ids in zip(used, _ids(tokenizer, completions)):
        prompt = prompt_ids[row]
        whole = prompt + (ids if end in ids[-2:] else [*ids, end])  # a template may end in the end token and a newline
        cut += len(prompt) < max_length < len(whole)
        tokens.extend(whole[:max_length])
        starts.append(len(tokens))
        lengths.append(min(len(prompt), max_length))
    kept = [(row, responses) for row, responses in units if len(prompt_ids[row]) < max_length]
    counts = {
        "rows": len(preferences.rows),
        "units": len(kept),
        "responses": len({(row, c) for row, responses in kept for c in responses}),
        "rows left out, all rewards equal": tied,
        "units left out, prompt fills max_length": len(units) - len(kept),
        "responses cut to max_length": cut,
    }
    if not kept:
        raise ValueError(f"{preferences.source}: expected something to train on, got nothing; {counts}")
    single, width = preferences.form == "labelled", max(len(responses) for _, responses in kept)
    rewards = None
    if pairing == GROUPS:
        of = [[preferences.rows[row].rewards[c] for c in responses] for row, responses in kept]
        rewards = torch.tensor([r + [0.0] * (width - len(r)) for r in of], dtype=torch.float64)
    first = [True] + [False] * (width - 1)
    return PreferenceDataset(
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(starts),
        torch.tensor(lengths),
        torch.tensor([[place[row, c] for c in cs] + [-1] * (width - len(cs)) for row, cs in kept]),
        torch.tensor([[preferences.rows[row].rewards[0] > 0] if single else first for row, _ in kept]),
        counts,
        rewards=rewards,
    )


def pad_of(tokenizer: Any) -> int:
    """The token that fills up padded rows: the tokenizer's, or its end token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prompt_limit(tokenizer: Any, max_length: int, max_prompt_length: int | None) -> int:
    """Tokens a prompt may have: `max_prompt_length`, or half of `max_length`.

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


def prompt_tokens(texts: list[str], tokenizer: Any, limit: int) -> list[list[int]]:
    """Token ids of prompts: their last `limit`, behind the beginning token where there is one; never none."""
    head = _beginning(tokenizer)
    room = limit - len(head)
    return [
        (head + ids[-room:] if room > 0 else ids[-limit:]) or head or [tokenizer.eos_token_id]
        for ids in _ids(tokenizer, texts)
    ]


def prompt_text(row: Row, tokenizer: Any) -> str:
    """A row's prompt as a string, a chat by the tokenizer's template.

    Raises:
        ValueError: a chat, and a tokenizer without template.
    """
    if isinstance(row.prompt, str):
        return row.prompt
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{row.where}: expected strings, since the tokenizer has no chat template; got a chat")
    return tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)


def _texts(
    preferences: Preferences, rows: Sequence[int], used: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[str], list[str]]:
    """Prompts and completions as strings, chats by the tokenizer's template."""
    prompts = {r: prompt_text(preferences.rows[r], tokenizer) for r in rows}
    completions = []
    for r, c in used:
        row = preferences.rows[r]
        completion = row.completions[c]
        if isinstance(completion, str) or isinstance(row.prompt, str):
            completions.append(str(completion))
            continue
        whole = tokenizer.apply_chat_template([*row.prompt, *completion], tokenize=False)
        if not whole.startswith(prompts[r]):
            raise ValueError(
                f"{row.where}: expected a chat template that leaves the prompt as it is when the response follows; "
                f"got {shown(prompts[r][-40:])} before and {shown(whole[: len(prompts[r])][-40:])} after"
            )
        completions.append(whole[len(prompts[r]) :])
    return list(prompts.values()), completions


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _beginning(tokenizer: Any) -> list[int]:
    """[bos] where the tokenizer puts it in front of a text, else []."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


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
            columns["labels"].append(labels)
            if response.ref is not None:
                for name, values in zip(("ref_logp", "ref_log_odds"), response.ref):
                    whole = torch.zeros(len(labels))
                    whole[response.prompt - 1 : -1] = values
                    columns.setdefault(name, []).append(whole)
        fill = {"input_ids": self.pad, "labels": IGNORE}
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


def reference_of(batch: dict[str, Tensor]) -> TokenScores | None:
    """The reference scores in a batch of `Collator`, or None."""
    if "ref_logp" not in batch:
        return None
    logp = batch["ref_logp"]
    return TokenScores(logp, batch["ref_log_odds"], torch.zeros_like(logp))
