"""A run from its settings to its report."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from rgpb import hf
from rgpb.objectives import OBJECTIVES, Objective
from rgpb.train.adapters import save_merged, with_adapters
from rgpb.train.config import EVAL_SAMPLE, TrainConfig
from rgpb.train.evaluate import eval_rows, mismatched_options, wants_preferred
from rgpb.train.files import save_whole_folder, write_failure
from rgpb.train.folder import check_origin, open_run
from rgpb.train.machine import check_devices, device_of, moved, parallel_of
from rgpb.train.models import (
    check_sizes,
    check_tokens,
    family_of,
    fetched,
    load_model,
    make_model,
    make_tokenizer,
    reference_model,
    saved_dtype,
)
from rgpb.train.online import Rollouts
from rgpb.train.order import Order
from rgpb.train.parallel import shard
from rgpb.train.ranks import ElsewhereError, Ranks, open_ranks, own_rank
from rgpb.train.report import counted
from rgpb.train.report import write as write_report
from rgpb.train.rewards import Reward, Sampler, reward_of, sampler_of
from rgpb.train.rows import GROUPS, Preferences, read_preferences, read_prompts
from rgpb.train.teacher import References, weights_digest, weights_fingerprint
from rgpb.train.tokens import PreferenceDataset, check_counts, pad_of, tokenise
from rgpb.train.tokens import held_out as held_out_of
from rgpb.train.trainer import Stage, steps_of


def train(config: TrainConfig, *, reward: Reward | None = None, sampler: Sampler | None = None) -> dict[str, Any]:
    """Run `config`, or go on with it, or, where it is finished, only write its report again.

    Args:
        reward: with `online`, the reward function itself, in place of the name in `config.reward`:
            (prompts, completions) → as many numbers, higher is better.
        sampler: with `online`, what samples in the model's place, as `config.sampler` names it: (prompts, K, model) →
            for each prompt K completions, as strings or as token ids. A prompt has `text` and `tokens`.

    Returns:
        What `result.json` holds: `steps`, `seconds`, `peak_bytes`, `counts` of the data, and the evaluations `before`
        and `after`. Besides, `resumed` is the step this call started from, None for a run that was finished already.

    Raises:
        ValueError: settings, data, model or output folder that can't be used. Data is read and checked before any work.
    """
    spec, options = config.check()
    config = replace(config, progress=config.progress and own_rank() == 0)
    transformers.utils.logging.disable_progress_bar()  # one bar at a time: this module's own
    reward, sampler = reward_of(config, reward), sampler_of(config, sampler)
    preferences = read_for(config.data, spec, config.online)
    held_out = None if config.eval_data is None else read_for(config.eval_data, spec, config.online)
    config = fetched(config)
    family = family_of(config)
    check_devices(config)
    folder = Path(config.output)
    if own_rank() == 0:
        open_run(folder, config, preferences, held_out, reward, sampler)
    ranks = open_ranks(device_of(config), config.timeout)
    try:
        return _run(config, spec, options, ranks, family, preferences, held_out, reward, sampler)
    except Exception as error:
        failure: Any = None if isinstance(error, ValueError | ElsewhereError) else write_failure(error)
        if failure is None or failure is error:
            error.ranks = ranks  # type: ignore[attr-defined]
            raise
        failure.ranks = ranks
        raise failure from error


def _run(
    config: TrainConfig, spec: Objective, options: dict[str, Any], ranks: Ranks, family: str | None,
    preferences: Preferences, held_out: Preferences | None, reward: Reward | None, sampler: Sampler | None,
) -> dict[str, Any]:  # fmt: skip
    """What is left once the settings, the data and the folder are known to be good."""
    folder, title = Path(config.output), f"training {'online ' if config.online else ''}with {spec.name}"
    stage = Stage(folder, config, spec, options, title, ranks)
    stage.dtype = saved_dtype(config, family)
    done = ranks.by_first(lambda: json.loads(stage.result.read_text()) if stage.result.exists() else None)
    if done is not None:
        if config.merge:
            base = stage.folder / "sft" / "model" if config.sft_epochs else Path(config.model)
            _merge(stage, base, make_tokenizer(config, family, folder, preferences))
        if ranks.first:
            write_report(folder)
        return {**done, "resumed": None}
    ranks.by_first(lambda: _made(make_tokenizer(config, family, folder, preferences)))
    tokenizer = make_tokenizer(config, family, folder, preferences)
    if reward is None:
        result = _on_data(stage, family, tokenizer, preferences, held_out)
    else:
        result = _on_rollouts(stage, family, tokenizer, preferences, held_out, reward, sampler)
    if ranks.first:
        write_report(folder)
    return result


def _made(value: Any) -> bool:
    """That it is there, for the other ranks."""
    return value is not None


def tokenised(
    config: TrainConfig, spec: Objective, options: dict[str, Any], tokenizer: Any, data: Preferences
) -> PreferenceDataset:
    """The units that the objective takes.

    Raises:
        ValueError: as `tokenise` and `check_counts`.
    """
    made = tokenise(
        data,
        tokenizer,
        pairing=GROUPS if spec.unit == "group" else config.pairing,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation_side=config.truncation_side,
    )
    if spec.unit == "group" and not spec.rewards:
        made = made.without_tied_best()
    if not config.allow:
        check_counts(data.source, made.counts, () if spec.label else ("units of the only label",))
    if mismatched_options(spec, options):
        made.mismatches = made.mismatched(config.max_length)
    return made


def _on_data(
    stage: Stage, family: str | None, tokenizer: Any, preferences: Preferences, held_out: Preferences | None
) -> dict[str, Any]:
    """Tokens, fine-tuning, reference scores, training."""
    config, spec, options, ranks = stage.config, stage.spec, stage.options, stage.ranks

    made = partial(tokenised, config, spec, options, tokenizer)
    train_set = made(preferences)
    if held_out is None:
        train_set, eval_set = train_set.split(config.eval_split, config.seed)
    else:
        eval_set = made(held_out)
    model: Any = make_model(config, family, tokenizer)
    hf.check_head(model)
    check_tokens(model, config.model, (train_set, eval_set))
    eval_set = eval_set.first(ranks.by_first(lambda: eval_rows(config, stage.folder, model, eval_set)))
    if config.progress:
        for name, data in (("training", train_set), ("evaluation", eval_set)):
            print(f"{name} data: {counted(data.counts)}", flush=True)
    tokens = f"{train_set.fingerprint()} {eval_set.fingerprint()}"
    ranks.by_first(lambda: check_origin(stage.folder, **{"tokenizer's tokens": tokens}))
    base = Path(config.model)
    if config.sft_epochs:
        tuning = Stage(stage.folder / "sft", config, OBJECTIVES["mle"], {}, "fine-tuning", ranks)
        tuning.dtype, base = stage.dtype, tuning.folder / "model"
        model = _placed(stage, model)
        tuning.fit(model, tokenizer, train_set.preferred(), eval_set, epochs=config.sft_epochs, lr=config.sft_lr)
        del model
        gc.collect()  # Trainer and its callbacks hold each other, and the model on the GPU
        model = load_model(config, base)
    if wants_preferred(spec):
        train_set = train_set.preferred()
    references = None
    if config.lora_r is not None:
        whole = weights_digest(model)
        ranks.by_first(lambda: check_origin(stage.folder, **{"weights under the adapters": whole}))
    if spec.ref is None:
        model = _placed(stage, with_adapters(config, model))
    else:
        ref: Any = reference_model(config)
        if ref is not None:
            check_tokens(ref, str(config.ref_model), (train_set, eval_set))
        teacher = model if ref is None else ref
        weights = weights_digest(teacher)
        ranks.by_first(lambda: check_origin(stage.folder, **{"reference's weights": weights}))
        references = References(config, weights_fingerprint(teacher, weights), pad_of(tokenizer), ranks)
        steps = steps_of(config, len(train_set), config.epochs, config.steps)
        order = Order(len(train_set), config.batch_size, config.seed)
        eval_set = references.plan(eval_set, Order(len(eval_set), config.batch_size, None))
        train_set = references.plan(train_set, order.first(steps * config.grad_accum), first=1)
        missing = references.missing()
        if missing and ref is None and config.lora_r is None and not config.precompute_ref:
            ref = copy.deepcopy(model)
        model = _placed(stage, with_adapters(config, model))
        if missing:
            references.model = model if ref is None else _placed(stage, ref.requires_grad_(False))
        del ref
        if config.precompute_ref:
            references.ready()
        gc.collect()
    result = stage.fit(
        model, tokenizer, train_set, eval_set, epochs=config.epochs, steps=config.steps, references=references
    )
    _merge(stage, base, tokenizer)
    return result


def _merge(stage: Stage, base: Path, tokenizer: Any) -> None:
    """With `merge`: the model with the adapters added in, unless it is there."""
    place, ranks = stage.folder / "merged", stage.ranks
    if stage.config.merge and not ranks.by_first(place.exists):
        merged = partial(save_merged, base, stage.folder / "model", dtype=stage.dtype)
        ranks.by_first(lambda: save_whole_folder(place, merged, tokenizer.save_pretrained))


def _placed(stage: Stage, model: Any) -> Any:
    """The model on its device, in parts where the run wants that."""
    device = device_of(stage.config)
    if parallel_of(stage.config) == "fsdp2":
        return shard(model, stage.ranks, device)
    return moved(model, device)


def _on_rollouts(
    stage: Stage, family: str | None, tokenizer: Any, prompts: Preferences, held_out: Preferences | None,
    reward: Reward, sampler: Sampler | None,
) -> dict[str, Any]:  # fmt: skip
    """Sampling, judging and training in turn; evaluated on what was sampled once, before the first step."""
    config, spec, ranks = stage.config, stage.spec, stage.ranks
    model, ref = make_model(config, family, tokenizer), None
    hf.check_head(model)
    if spec.ref is not None:
        ref = reference_model(config) or copy.deepcopy(model)
        ref.requires_grad_(False)
    keys = [json.dumps([row.prompt, row.template]) for row in prompts.rows]
    apart = held_out_of(keys, config.eval_split if held_out is None else 0.0, config.seed)
    count, per_step = len(keys) - sum(apart), config.batch_size * config.grad_accum
    steps = config.steps or math.ceil(config.epochs * math.ceil(count / per_step))
    ref = None if ref is None else moved(ref, device_of(config))
    common: dict[str, Any] = {"spec": spec, "options": stage.options, "reward": reward, "ref": ref}
    common |= {"folder": stage.folder / "rollouts", "ranks": ranks, "sampler": sampler}
    data = Rollouts(prompts, tokenizer, config, asks=steps * per_step, apart=apart, **common)
    asked = data if held_out is None else Rollouts(held_out, tokenizer, config, asks=0, **common)
    for its, name in ((model, config.model), (ref, config.ref_model or config.model)):
        if its is not None:
            check_sizes(its, name, hf.read_head(model).weight.shape[0] - 1, max(data.longest, asked.longest))
    tokens = json.dumps([data.prompt_ids, asked.prompt_ids]).encode()
    digests = {"tokenizer's tokens": hashlib.sha256(tokens).hexdigest()}
    if ref is not None:
        digests["reference's weights"] = weights_digest(ref)
    ranks.by_first(lambda: check_origin(stage.folder, **digests))
    if config.progress:
        for kind, rollouts in (("training", data), *((("evaluation", asked),) if asked is not data else ())):
            print(f"{kind} prompts: {counted(rollouts.counts)}", flush=True)
    some = asked.evaluated[: config.eval_rows or EVAL_SAMPLE]
    evaluated = asked.groups(moved(model, device_of(config)), some, "evaluation")

    def measure(policy: PreTrainedModel) -> dict[str, float]:
        return {"reward/sampled": asked.mean_reward(policy, some)}

    return stage.fit(model, tokenizer, data, evaluated, epochs=config.epochs, steps=steps, measure=measure)


def read_for(path: str, spec: Objective, prompts: bool) -> Preferences:
    """A file's preferences, or its prompts alone.

    Raises:
        ValueError: a file that can't be read, or of which the objective can't use the form.
    """
    if prompts:
        return read_prompts(path)
    preferences = read_preferences(path)
    if spec.unit != "response" and preferences.form == "labelled":
        raise ValueError(
            f"{path}:1: expected pairs (chosen, rejected) or rewarded completions, since {spec.name} compares "
            "responses; got rows of one labelled response"
        )
    return preferences
