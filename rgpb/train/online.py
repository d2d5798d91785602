"""Online data: every few steps the policy answers prompts itself, a reward function judges, and it learns from that.

    prompts ──policy.generate──▶ K completions each ──reward──▶ units ──objective──▶ steps ──▶ again

A unit is what the objective takes: a prompt's group, the best first; a pair of it; or a completion labelled good or
bad. With `mc_po` this is OnMC-PO (arXiv 2502.04567, §3.2): the best completion is y₀, the kernel draws among the
others.

Dimensions: P prompts, K completions of a prompt, W of a unit.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel

from rgpb import hf
from rgpb.objectives import Objective
from rgpb.train.config import TrainConfig
from rgpb.train.evaluate import mismatched_options, wants_preferred
from rgpb.train.files import write_text
from rgpb.train.layouts import shown
from rgpb.train.progress import bar, say
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.rewards import Prompt, Reward, Sampler
from rgpb.train.rows import GROUPS, Preferences
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


def units_from(rewards: Sequence[float], pairing: str, generator: torch.Generator) -> list[tuple[list[int], bool]]:
    """What there is to learn from the completions of one prompt: places in `rewards`, and whether the first is good.

    Args:
        rewards: from the highest to the lowest. Where all are equal, there is nothing.
        pairing: "best-worst": a pair of the highest and the lowest, of several the first; "best-random": of the highest
            and any lower one, all alike likely; "unpaired": each completion by itself, good above the mean reward and
            bad below, without those that have it to rounding; or "groups": all of them.
        generator: draws.
    """
    best, worst = rewards[0], rewards[-1]
    if best == worst:
        return []
    if pairing == GROUPS:
        return [(list(range(len(rewards))), True)]
    if pairing == "best-worst":
        return [([0, rewards.index(worst)], True)]
    if pairing == "best-random":
        lower = sum(reward < best for reward in rewards)
        return [([0, len(rewards) - lower + int(torch.randint(lower, (), generator=generator))], True)]
    mean = math.fsum(rewards) / len(rewards)
    rounding = 8 * sys.float_info.epsilon * max(abs(best), abs(worst))
    return [([k], reward > mean) for k, reward in enumerate(rewards) if abs(reward - mean) > rounding]


class Rollouts(Dataset[tuple[Response, ...]]):
    """The prompts that an online run asks, in order; a round is made when the first of its prompts is asked for.

    A group's objective has a unit of each prompt; the others have what `units_from` finds, often none.

    Each round lies in a file of its own, so that a run that goes on finds what it had; sampling has a seed of its own
    per round and leaves all other random states as they are. Batches are fetched one ahead, so a round's first batch is
    sampled one step before the round begins.

    Args:
        prompts: from `read_prompts`; taken in an order drawn from `seed`, again and again.
        tokenizer: of the model.
        config: how many completions, of what length, at what temperature; the pairing; prompts between two samplings.
        spec, options: the objective.
        reward: (prompts, completions) → numbers, higher is better. Prompts are strings or chats, as in the data;
            completions are strings without special tokens.
        ref: the reference model, on the device to use, or None.
        folder: for `round-<number>.jsonl`: prompt, completions, rewards and the completions' token ids.
        asks: how many prompts are asked in all.
        apart: which prompts are held out: evaluated on, and not trained on; default: all are trained on.
        sampler: what samples in the model's place.
        ranks: of several, the first samples and judges for all.

    Raises:
        ValueError: lengths that leave no room for a completion, prompts of which most have to be cut, or a round of one
            prompt for an objective that puts completions behind other prompts.
    """

    def __init__(
        self, prompts: Preferences, tokenizer: Any, config: TrainConfig, *, spec: Objective, options: dict[str, Any],
        reward: Reward, ref: PreTrainedModel | None, folder: Path, asks: int, ranks: Ranks = ALONE,
        apart: Sequence[bool] = (), sampler: Sampler | None = None,
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
        self.spec, self.pairing = spec, GROUPS if spec.unit == "group" else config.pairing
        self.mismatched = mismatched_options(spec, options)
        self.asks, self.per_step = asks, config.batch_size * config.grad_accum
        self.per_round = config.refresh * self.per_step
        self.candidates, self.new_tokens = config.candidates, max_new_tokens or room
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
            "prompts asked": asks,
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
        self._round, self._made = -1, None  # type: int, PreferenceDataset | None
        self._units: list[list[int]] = []  # of each prompt of the round
        self._orders: dict[int, list[int]] = {}  # of the last pass over the prompts
        for number in range(-(-asks // self.per_round) if self.mismatched else 0):
            if len({tuple(self.prompt_ids[p]) for p in self._asked_in(number)}) == 1:
                raise ValueError(
                    f"batch_size: expected rounds of two prompts at least, since {spec.name} puts completions behind "
                    f"other prompts; got one in round {number} (--loss-option {self.mismatched[0]}=0 does without)"
                )

    def __len__(self) -> int:
        return self.asks

    def __getitem__(self, index: int) -> tuple[Response, ...]:
        """The first unit of a prompt; where it has none, completions that have the form of one."""
        made, place = self._round_of(index)
        if self._units[place]:
            return made[self._units[place][0]]
        width = made.units.shape[1]
        first = place * self.candidates
        units = torch.arange(first, first + width)[None]
        return made._with(units=units, labels=units == first)[0]

    def units_of(self, index: int) -> list[tuple[Response, ...]]:
        """All units of a prompt."""
        made, place = self._round_of(index)
        return [made[unit] for unit in self._units[place]]

    def _round_of(self, index: int) -> tuple[PreferenceDataset, int]:
        """The units of a prompt's round, and its place among the round's prompts."""
        number, place = divmod(index, self.per_round)
        if number != self._round or self._made is None:
            assert self.policy is not None  # `Stage.fit` sets it
            which = self._asked_in(number)
            made = self.groups(self.policy, which, f"round-{number:05d}", log=number > self.logged)
            self._made = made.preferred() if wants_preferred(self.spec) else made
            self._units = self._by_prompt(self._made, len(which))
            self._round, self.logged = number, max(number, self.logged)
        return self._made, place

    def _by_prompt(self, made: PreferenceDataset, count: int) -> list[list[int]]:
        """Numbers of the units of each of `count` prompts."""
        if self.pairing == GROUPS:
            return [[unit] for unit in range(count)]
        found: list[list[int]] = [[] for _ in range(count)]
        for unit, response in enumerate(made.units[:, 0].tolist()):
            found[response // self.candidates].append(unit)
        return found

    def _asked_in(self, number: int) -> list[int]:
        """The prompts of a round."""
        first = number * self.per_round
        return [self.prompt_of(i) for i in range(first, min(first + self.per_round, self.asks))]

    def whole_counts(self) -> dict[str, int]:
        """`counts`, and of how many prompts of all rounds so far the completions were judged alike."""
        files = self.folder.glob("round-*.jsonl")
        rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
        tied = sum(len(set(row["rewards"])) == 1 for row in rows)
        return {**self.counts, "prompts asked whose completions were judged alike": tied}

    def prompt_of(self, ask: int) -> int:
        """The prompt that is asked in that place: each pass over the prompts is in an order of its own."""
        time, place = divmod(ask, len(self.trained))
        if time not in self._orders:
            generator = torch.Generator().manual_seed(self._seed(f"pass {time}"))
            self._orders = {time: torch.randperm(len(self.trained), generator=generator).tolist()}
        return self.trained[self._orders[time][place]]

    def groups(self, model: PreTrainedModel, which: Sequence[int], name: str, log: bool = False) -> PreferenceDataset:
        """The units of K judged completions of each of these prompts, with reference scores, from the file where it is
        there.

        A prompt whose completions are all judged alike teaches nothing: its group has no response, and it has no other
        units. All completions are among the dataset's responses, those of a prompt behind those of the one before.
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
        made, config = self._dataset(rows, which, name), self.config
        if log and self.ranks.first:
            self._log_round(made, [row["rewards"] for row in rows], name)
        if self.mismatched:
            made.mismatches = made.mismatched(config.max_length)
        if self.ref is None:
            return made
        score = partial(
            score_references, self.ref, pad=self.pad, batch_size=4 * config.batch_size, workspace=config.workspace,
            bf16=config.bf16,
        )  # fmt: skip
        if made.mismatches is not None:
            made.mismatches = made.mismatches.with_ref(score(made.mismatches))
        return made.with_ref(score(made))

    def _log_round(self, made: PreferenceDataset, rewards: list[list[float]], name: str) -> None:
        """Mean reward and ties of a round; without groups also its units a step, and the part of steps without any."""
        count = len(rewards)
        tied = sum(len(set(values)) == 1 for values in rewards)
        self.log("reward/sampled", math.fsum(map(math.fsum, rewards)) / (count * self.candidates), count)
        self.log("reward/tied", tied / count, count)
        found = [len(units) for units in self._by_prompt(made, count)]
        steps = [sum(found[first : first + self.per_step]) for first in range(0, count, self.per_step)]
        empty = steps.count(0)
        if self.pairing != GROUPS:
            self.log("reward/units", sum(steps) / len(steps), len(steps))
            self.log("reward/empty", empty / len(steps), len(steps))
        if tied == count:
            say(f"{name}: all completions of every prompt were judged alike, so there is nothing to learn")
        elif empty:
            say(
                f"{name}: {empty} of {len(steps)} steps have nothing to learn from: their completions were judged alike"
            )

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
            given = self.reward([copy.deepcopy(prompt) for prompt in asked], [*texts])  # it may change them
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

    def _dataset(self, rows: list[dict[str, Any]], which: Sequence[int], name: str) -> PreferenceDataset:
        tokens, starts = array("i"), [0]
        prompts: list[int] = []
        units: list[list[int]] = []
        labels: list[list[bool]] = []
        rewards: list[list[float]] = []
        tied, generator = 0, torch.Generator().manual_seed(self._seed(f"{name} pairing"))
        for row, p in zip(rows, which):
            order = sorted(range(len(row["rewards"])), key=row["rewards"].__getitem__, reverse=True)
            rewards.append([row["rewards"][k] for k in order])
            found = units_from(rewards[-1], self.pairing, generator)
            units += [[len(prompts) + k for k in places] for places, _ in found]
            labels += [[good] + [False] * (len(places) - 1) for places, good in found]
            tied += len(set(row["rewards"])) == 1
            if self.pairing == GROUPS and not found:
                units.append([-1] * len(order))
                labels.append([True] + [False] * (len(order) - 1))
            for k in order:
                tokens.extend(self.prompt_ids[p] + row["tokens"][k])
                starts.append(len(tokens))
                prompts.append(len(self.prompt_ids[p]))
        width = {GROUPS: self.candidates, "unpaired": 1}.get(self.pairing, 2)
        made = PreferenceDataset(
            torch.tensor(tokens, dtype=torch.int32), torch.tensor(starts), torch.tensor(prompts),
            torch.tensor(units, dtype=torch.int64).view(-1, width),
            torch.tensor(labels, dtype=torch.bool).view(-1, width),
            {"rows": len(rows), "units": len(units), "responses": len(prompts)},
        )  # fmt: skip
        if self.pairing == GROUPS:
            made.rewards = torch.tensor(rewards, dtype=torch.float64)
            return made if self.spec.rewards else made.without_tied_best()
        used = len(units) * width
        made.counts |= {"responses": used, "rows left out, all rewards equal": tied}
        if self.pairing == "unpaired":
            made.counts["responses left out, of the mean reward"] = len(prompts) - used - tied * self.candidates
        return made

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.config.seed} {name}".encode())
