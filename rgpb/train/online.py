"""Online data: every few steps the policy answers prompts itself, a reward function judges, and it learns from that.

    prompts ──policy.generate──▶ K completions each ──reward──▶ groups, the best first ──objective──▶ steps ──▶ again

With `mc_po` this is OnMC-PO (arXiv 2502.04567, §3.2): the best completion is y₀, the kernel draws among the others.

Dimensions: P prompts, K completions of a prompt.
"""

from __future__ import annotations

import json
import math
import operator
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel

from rgpb import hf
from rgpb.train.config import TrainConfig
from rgpb.train.files import write_text
from rgpb.train.layouts import shown
from rgpb.train.progress import bar, say
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.rewards import Prompt, Reward, Sampler
from rgpb.train.rows import Preferences
from rgpb.train.teacher import score_references
from rgpb.train.tokens import (
    PreferenceDataset,
    Response,
    check_counts,
    following,
    is_empty,
    pad_of,
    prompt_limit,
    prompt_tokens,
    turn_end,
)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own settings of generation (penalties, beams, …): samples are from its distribution."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class Rollouts(Dataset[tuple[Response, ...]]):
    """The units of an online run, in order; those of a round are made when the first of them is asked for.

    Each round lies in a file of its own, so that a run that goes on finds what it had; sampling has a seed of its own
    per round and leaves all other random states as they are. Batches are fetched one ahead, so a round's first batch is
    sampled one step before the round begins.

    Args:
        prompts: from `read_prompts`; taken in an order drawn from `seed`, again and again.
        tokenizer: of the model.
        config: how many completions, of what length, at what temperature; units between two samplings.
        reward: (prompts, completions) → numbers, higher is better. Prompts are strings or chats, as in the data;
            completions are strings without special tokens.
        ref: the reference model, on the device to use, or None.
        folder: for `round-<number>.jsonl`: prompt, completions, rewards and the completions' token ids.
        units: how many there are in all.
        apart: which prompts are held out: evaluated on, and not trained on; default: all are trained on.
        sampler: what samples in the model's place.
        ties: whether completions that are as good as the best stay in its group: the objective has to know rewards.
        ranks: of several, the first samples and judges for all.

    Raises:
        ValueError: lengths that leave no room for a completion, or prompts of which most have to be cut.
    """

    def __init__(
        self, prompts: Preferences, tokenizer: Any, config: TrainConfig, *, reward: Reward, ref: PreTrainedModel | None,
        folder: Path, units: int, ties: bool, ranks: Ranks = ALONE, apart: Sequence[bool] = (),
        sampler: Sampler | None = None,
    ) -> None:  # fmt: skip
        max_length, max_new_tokens = config.max_length, config.max_new_tokens
        limit = prompt_limit(tokenizer, max_length, config.max_prompt_length)
        room = max_length - limit
        if room < 1:
            raise ValueError(f"max_prompt_length: expected less than max_length={max_length}, got {limit}")
        if max_new_tokens is not None and max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens: expected 1 to {room}, what max_length={max_length} leaves beside {limit} of the "
                f"prompt, got {max_new_tokens}"
            )
        self.tokenizer, self.config, self.reward, self.ref, self.folder = tokenizer, config, reward, ref, folder
        self.ranks, self.sampler = ranks, sampler
        self.units, self.per_round = units, config.refresh * config.batch_size * config.grad_accum
        self.candidates, self.new_tokens, self.ties = config.candidates, max_new_tokens or room, ties
        self.pad = pad_of(tokenizer)
        ids, cut = prompt_tokens(prompts.rows, tokenizer, max_length - self.new_tokens, config.truncation_side)
        kept = [(row, tokens) for row, tokens in zip(prompts.rows, ids) if tokens is not None]
        self.asked, self.prompt_ids = [row.prompt for row, _ in kept], [tokens for _, tokens in kept]
        self.where = [row.where for row, _ in kept]
        out = [there for there, tokens in zip(apart or [False] * len(ids), ids) if tokens is not None]
        self.trained = [p for p, there in enumerate(out) if not there]
        self.evaluated = [p for p, there in enumerate(out) if there] if any(apart) else self.trained
        self.counts = {
            "rows": len(prompts.rows),
            f"rows read as {prompts.layout}": len(prompts.rows),
            "units": units,
            "prompts cut": cut,
            "prompts left out, no text to cut off": len(ids) - len(kept),
            "rows with an empty prompt": sum(map(is_empty, self.asked)),
            "prompts held out": sum(out),
        }
        if not (self.trained and self.evaluated):
            raise ValueError(f"{prompts.source}: expected prompts that leave room for a completion, got {self.counts}")
        if not config.allow:
            check_counts(prompts.source, self.counts)
        self.longest = max(map(len, self.prompt_ids)) + self.new_tokens
        self.turn_end = turn_end(kept[0][0], tokenizer)
        self.policy: PreTrainedModel | None = None
        self.log: Callable[[str, float, int], None] = lambda name, value, weight: None
        self.logged = -1  # the last round whose rewards were logged; a checkpoint keeps it
        self._round, self._groups = -1, None  # type: int, PreferenceDataset | None
        self._orders: dict[int, list[int]] = {}  # of the last pass over the prompts

    def __len__(self) -> int:
        return self.units

    def __getitem__(self, index: int) -> tuple[Response, ...]:
        number, place = divmod(index, self.per_round)
        if number != self._round or self._groups is None:
            assert self.policy is not None  # `Stage.fit` sets it
            first = number * self.per_round
            which = [self.prompt_of(i) for i in range(first, min(first + self.per_round, self.units))]
            self._groups = self.groups(self.policy, which, f"round-{number:05d}", log=number > self.logged)
            self._round, self.logged = number, max(number, self.logged)
        return self._groups[place]

    def prompt_of(self, unit: int) -> int:
        """The prompt of a unit: each pass over the prompts is in an order of its own."""
        time, place = divmod(unit, len(self.trained))
        if time not in self._orders:
            generator = torch.Generator().manual_seed(self._seed(f"pass {time}"))
            self._orders = {time: torch.randperm(len(self.trained), generator=generator).tolist()}
        return self.trained[self._orders[time][place]]

    def groups(self, model: PreTrainedModel, which: Sequence[int], name: str, log: bool = False) -> PreferenceDataset:
        """K judged completions of each of these prompts, with reference scores, from the file where it is there.

        A prompt whose completions are all judged alike teaches nothing: its group has no response.
        """
        file = self.folder / f"{name}.jsonl"

        def made_or_kept() -> list[dict[str, Any]]:
            if file.exists():
                return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            rows = self.judged(model, which, name, self.candidates)
            self.folder.mkdir(exist_ok=True)
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
            return rows

        rows = self.ranks.by_first(made_or_kept)
        values = [row["rewards"] for row in rows]
        if log and self.ranks.first:
            self.log("reward/sampled", math.fsum(map(math.fsum, values)) / (len(values) * self.candidates), len(values))
            tied = sum(len(set(v)) == 1 for v in values)
            self.log("reward/tied", tied / len(values), len(values))
            if tied == len(values):
                say(f"{name}: all completions of every prompt were judged alike, so there is nothing to learn")
        made = self._dataset(rows, which)
        if self.ref is None:
            return made
        config = self.config
        scores = score_references(
            self.ref, made, pad=self.pad, batch_size=4 * config.batch_size, workspace=config.workspace, bf16=config.bf16
        )
        return made.with_ref(scores)

    def judged(self, model: PreTrainedModel, which: Sequence[int], name: str, count: int) -> list[dict[str, Any]]:
        """Completions of each of these prompts with their rewards, as rows of a file.

        Raises:
            ValueError: a reward function that doesn't return one finite number per completion.
        """
        if self.sampler is None:
            sampled = self.sample(model, [self.prompt_ids[p] for p in which], self._seed(name), count)
        else:
            sampled = self.elsewhere(self.sampler, model, which, name, count)
        texts = self.tokenizer.batch_decode(sampled, skip_special_tokens=True)
        asked = [self.asked[p] for p in which for _ in range(count)]
        try:
            given = self.reward(asked, texts)
        except Exception as error:
            kind = type(error).__name__
            raise RuntimeError(
                f"reward: the function raised {kind} on {count} completions each of {self.named(which)}, in {name}; "
                "rounds judged so far are kept"
            ) from error
        cause: Exception | None = None
        try:
            if isinstance(given, str | dict):
                raise TypeError("not a sequence of numbers")
            values = [float(value) for value in given]
            wrong = [value for value in values if not math.isfinite(value)]
            got = f"{len(values)} numbers for {self.named(which)}" if len(values) != len(texts) else ""
            if wrong and not got:
                got = f"{wrong[0]} for {self.where[which[values.index(wrong[0]) // count]]}"
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            values, got, cause = [], f"{type(given).__name__} ({error}) for {self.named(which)}", error
        if got:
            raise ValueError(f"reward: expected {len(texts)} finite numbers, one per completion, got {got}") from cause
        return [
            {
                "prompt": self.asked[p],
                "completions": texts[i * count : (i + 1) * count],
                "rewards": values[i * count : (i + 1) * count],
                "tokens": sampled[i * count : (i + 1) * count],
            }
            for i, p in enumerate(which)
        ]

    def elsewhere(
        self, sampler: Sampler, model: PreTrainedModel, which: Sequence[int], name: str, count: int
    ) -> list[list[int]]:
        """What the sampler answers, as `sample` gives it. A text has ended, so the token that ends one comes behind it;
        what is longer than a completion may be loses its end.

        Raises:
            ValueError: a sampler that doesn't return `count` completions of each prompt, or tokens that there aren't.
        """
        asked = [Prompt(self.asked[p], self.prompt_ids[p]) for p in which]
        vocab = hf.read_head(model).weight.shape[0]
        try:
            with torch.random.fork_rng(), hf.evaluating(model), torch.no_grad():
                given = sampler(asked, count, model)
        except Exception as error:
            raise RuntimeError(
                f"sampler: the function raised {type(error).__name__} on {count} completions each of "
                f"{self.named(which)}, in {name}; rounds sampled so far are kept"
            ) from error
        wrong = f"sampler: expected {count} completions of each of {len(asked)} prompts, strings or lists of token ids"
        listed = isinstance(given, Sequence) and not isinstance(given, str)
        if not listed or len(given) != len(asked):
            raise ValueError(f"{wrong}; got {f'{len(given)} lists' if listed else type(given).__name__}")
        made = []
        ends = self.ends(model)
        for p, completions in zip(which, given):
            if not isinstance(completions, Sequence) or isinstance(completions, str) or len(completions) != count:
                raise ValueError(f"{wrong}; got {shown(completions)} for {self.where[p]}")
            for completion in completions:
                if isinstance(completion, str):
                    (ids,) = following(self.tokenizer, [completion], [self.where[p]])
                    ids = ids if ids and ids[-1] in ends else [*ids, self.end]
                else:
                    try:
                        ids = [operator.index(token) for token in completion]
                    except TypeError:
                        ids = []
                    if not ids or not 0 <= min(ids) <= max(ids) < vocab:
                        raise ValueError(f"{wrong} below {vocab}; got {shown(completion)} for {self.where[p]}")
                stop = next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))
                made.append(ids[: min(stop, self.new_tokens)])
        return made

    @property
    def end(self) -> int:
        """The token behind a completion that has ended: the template's end of a turn, or the tokenizer's end."""
        return self.tokenizer.eos_token_id if self.turn_end is None else self.turn_end

    def named(self, which: Sequence[int]) -> str:
        """The rows of these prompts, as file and line."""
        rows = [self.where[p] for p in which]
        return ", ".join(rows[:3]) + (f" and {len(rows) - 3} others" if len(rows) > 3 else "")

    def mean_reward(self, model: PreTrainedModel, which: Sequence[int]) -> float:
        """Of one completion of each of these prompts, sampled anew with the same seed each time."""
        rows = self.ranks.by_first(lambda: self.judged(model, which, "evaluation", 1))
        return math.fsum(row["rewards"][0] for row in rows) / len(rows)

    def ends(self, model: PreTrainedModel) -> set[int]:
        """Tokens that end a completion: the model's own settings', the tokenizer's, and how a template ends a turn."""
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        several = own if isinstance(own, list) else [own]
        return {int(end) for end in (*several, self.tokenizer.eos_token_id, self.turn_end) if end is not None}

    @torch.no_grad()
    def sample(self, model: PreTrainedModel, prompts: list[list[int]], seed: int, count: int) -> list[list[int]]:
        """`count` completions of each prompt from the model's own distribution at the temperature: token ids, with the
        token that ended it where one came, [P · count]."""
        device, config = hf.read_head(model).weight.device, self.config
        pad = min(self.pad, max(map(max, prompts)))  # masked: any token that the model has
        ends, made = self.ends(model), []
        cuda = [device] if device.type == "cuda" else []
        done = bar(len(prompts), "sampling", "prompt", leave=False, quiet=not config.progress)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16)
        with done, torch.random.fork_rng(devices=cuda), hf.evaluating(model), autocast, _plain_generation(model):
            torch.manual_seed(seed)
            for first in range(0, len(prompts), config.batch_size):
                part = prompts[first : first + config.batch_size]
                width = max(map(len, part))
                ids = torch.tensor([[pad] * (width - len(p)) + p for p in part], device=device)
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=config.temperature, top_k=0,
                    top_p=1.0, num_return_sequences=count, max_new_tokens=self.new_tokens, pad_token_id=pad,
                    eos_token_id=sorted(ends),
                )  # fmt: skip
                for new in out[:, width:].tolist():
                    stop = next((i for i, token in enumerate(new, 1) if token in ends), len(new))
                    made.append(new[:stop])
                done.update(len(part))
        return made

    def _dataset(self, rows: list[dict[str, Any]], which: Sequence[int]) -> PreferenceDataset:
        tokens, starts = array("i"), [0]
        prompts: list[int] = []
        units: list[list[int]] = []
        rewards: list[list[float]] = []
        for row, p in zip(rows, which):
            order = sorted(range(len(row["rewards"])), key=row["rewards"].__getitem__, reverse=True)
            tied = len(set(row["rewards"])) == 1
            units.append([-1 if tied else len(prompts) + k for k in range(len(order))])
            rewards.append([row["rewards"][k] for k in order])
            for k in order:
                tokens.extend(self.prompt_ids[p] + row["tokens"][k])
                starts.append(len(tokens))
                prompts.append(len(self.prompt_ids[p]))
        labels = torch.zeros(len(units), self.candidates, dtype=torch.bool)
        labels[:, 0] = True
        counts = {"rows": len(rows), "units": len(units), "responses": len(prompts)}
        made = PreferenceDataset(
            torch.tensor(tokens, dtype=torch.int32), torch.tensor(starts), torch.tensor(prompts), torch.tensor(units),
            labels, counts, rewards=torch.tensor(rewards, dtype=torch.float64),
        )  # fmt: skip
        return made if self.ties else made.without_tied_best()

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.config.seed} {name}".encode())
