"""Training on preference data: `rgpb train`.

    data → tokens → (fine-tuning on the preferred) → reference scores, once → training → checkpoints, metrics, report

Everything of a run lies in its output folder:

    run.json                 the settings; another run with other settings is refused
    metrics.jsonl            one line per log: "split" train or eval
    checkpoint-<step>/       model, optimizer, random states, metrics so far, and `progress.json`, written last:
                             a checkpoint without it is incomplete and not used
    ref-<hash>.safetensors   reference scores of every response token, by hash of reference model and tokens
    tokenizer/               where it was learnt from the data
    rollouts/                with `--online`: what was sampled, judged and trained on, round by round
    sft/                     the fine-tuning stage, a run of its own
    model/                   the trained model and its tokenizer
    result.json, report.md, report.png

The same command again goes on after the last complete checkpoint, and ends with the same weights as a run that was
never interrupted (bitwise on a CPU).
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rgpb import hf, online, report
from rgpb.arguments import argument, parse_bytes
from rgpb.data import (
    GROUPS,
    PAIRINGS,
    PreferenceDataset,
    Preferences,
    RefScores,
    prompt_limit,
    read_preferences,
    read_prompts,
    texts_of,
    tokenise,
    train_tokenizer,
)
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.objectives import OBJECTIVES, Objective, resolve
from rgpb.objectives.registry import option, parse_sum
from rgpb.trainer import (
    Stage,
    device_of,
    moved,
    save_whole_file,
    save_whole_folder,
    score_references,
    wants_preferred,
    weights_fingerprint,
    write_json,
)

EVAL_SAMPLE = 200  # units of the training data evaluated on where there is no evaluation data

BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "nano-llama": (
        "LlamaConfig",
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "tiny-llama": (
        "LlamaConfig",
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "tiny-pythia": (
        "GPTNeoXConfig",
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
}

# What may change between an interrupted run and the one that goes on: nothing that results depend on.
FREE = ("output", "data", "eval_data", "save_steps", "keep_checkpoints", "overwrite", "progress")

# What has a meaning with `online` alone.
ONLINE = ("reward", "candidates", "refresh", "temperature", "max_new_tokens")

# What a run writes, and `overwrite` removes.
OWN = (
    *("run.json", "result.json", "metrics.jsonl", "report.md", "report.png", "tokenizer", "rollouts", "sft", "model"),
    *("checkpoint-*", "ref-*.safetensors"),
)


def _option(default: Any, help: str, **extra: Any) -> Any:
    """A field with what its flag on the command line needs."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Each is a flag of `rgpb train` by the same name; `--quiet` is `progress=False`.

    >>> TrainConfig(data="pairs.jsonl", output="runs/dpo", loss="dpo", loss_option={"beta": 0.2}, progress=False).loss
    'dpo'
    """

    data: str = field(metadata={"help": "preference data: JSON lines (also gzipped), Parquet, or a saved dataset"})
    output: str = field(metadata={"help": "folder of the run"})
    eval_data: str | None = _option(None, f"held-out data; default: the first {EVAL_SAMPLE} units of --data")
    loss: str = _option("bnf", "objective, or a weighted sum such as mle+0.5*dpo")
    loss_option: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "an option of the objective, such as beta=0.2; repeatable"}
    )
    pairing: str = _option(
        "best-worst", "which of K rewarded responses to compare; objectives of groups take all", choices=PAIRINGS
    )
    model: str = _option("tiny-llama", f"folder of a model, or a new one with its own tokenizer: {', '.join(BUILT_IN)}")
    ref_model: str | None = _option(None, "folder of the reference model; default: the model before training")
    vocab_size: int = _option(1024, "of the tokenizer that a new model gets")
    online: bool = _option(False, "sample completions from the model, judge them by --reward, and train on those")
    reward: str | None = _option(None, "with --online: FILE.py:FUNCTION or MODULE:FUNCTION of (prompts, completions)")
    candidates: int = _option(4, "with --online: completions sampled for a prompt")
    refresh: int = _option(16, "with --online: optimizer steps between two samplings")
    temperature: float = _option(1.0, "with --online: of sampling")
    max_new_tokens: int | None = _option(None, "with --online: of a completion; default: what --max-length leaves")
    sft_epochs: float = _option(0.0, "first fine-tune that long on the preferred responses; that is then the reference")
    sft_lr: float | None = _option(None, "learning rate of the fine-tuning; default: --lr")
    epochs: float = _option(1.0, "passes over the data")
    steps: int | None = _option(None, "optimizer steps, instead of --epochs")
    batch_size: int = _option(8, "groups, pairs, or responses of unpaired data, in a batch")
    grad_accum: int = _option(1, "batches per optimizer step")
    lr: float = _option(1e-5, "peak learning rate")
    warmup: float = _option(0.1, "part of the steps over which it rises")
    schedule: str = _option("linear", "how it falls", choices=("linear", "cosine", "constant"))
    weight_decay: float = _option(0.0, "AdamW's")
    max_grad_norm: float = _option(1.0, "gradients are clipped to it; 0: not at all")
    max_length: int = _option(1024, "tokens of prompt and response")
    max_prompt_length: int | None = _option(None, "of it at most for the prompt, whose end is kept; default: half")
    packing: bool = _option(False, "put responses end to end instead of padding them")
    bf16: bool = _option(False, "bfloat16 autocast; weights stay float32")
    gradient_checkpointing: bool = _option(False, "recompute the backbone's activations instead of keeping them")
    cpu: bool = _option(False, "don't use a GPU")
    workspace: int = _option(
        DEFAULT_WORKSPACE, "bytes the loss may hold beyond its inputs and gradients: 512MiB", type=argument(parse_bytes)
    )
    seed: int = _option(0, "of the weights of a new model, the order of the data and dropout")
    log_steps: int = _option(10, "steps between two lines of metrics")
    eval_steps: int | None = _option(None, "steps between two evaluations; default: only before and after")
    save_steps: int = _option(500, "steps between two checkpoints")
    keep_checkpoints: int = _option(2, "checkpoints kept")
    overwrite: bool = _option(False, "start anew where --output holds another run")
    progress: bool = _option(True, "show progress", negative="quiet", negative_help="don't show progress")

    def check(self) -> tuple[Objective, dict[str, Any]]:
        """The objective and its options, after checking everything that can be checked without reading anything.

        Raises:
            ValueError: an unknown name, or a number out of range.
        """
        try:
            spec = resolve(self.loss)
        except ValueError as error:
            raise ValueError(f"loss: {str(error).removeprefix('objective: ')}") from None
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing: expected one of {PAIRINGS}, got {self.pairing!r}")
        if spec.unit == "group" and self.pairing != "best-worst":
            raise ValueError(f"pairing: expected none, since {self.loss} takes whole groups; got {self.pairing!r}")
        for name in (
            "batch_size",
            "grad_accum",
            "log_steps",
            "save_steps",
            "keep_checkpoints",
            "workspace",
            "vocab_size",
            "refresh",
        ):
            _expect(name, getattr(self, name), "a positive whole number", lambda x: isinstance(x, int) and x > 0)
        for name in ("steps", "eval_steps", "max_prompt_length", "max_new_tokens"):
            _expect(name, getattr(self, name), "a positive whole number", lambda x: x is None or int(x) == x > 0)
        for name in ("epochs", "lr", "temperature"):
            _expect(name, getattr(self, name), "a positive number", lambda x: 0 < x < math.inf)
        _expect("sft_lr", self.sft_lr, "a positive number", lambda x: x is None or 0 < x < math.inf)
        for name in ("sft_epochs", "weight_decay", "max_grad_norm"):
            _expect(name, getattr(self, name), "0 or more", lambda x: 0 <= x < math.inf)
        _expect("warmup", self.warmup, "a part of the steps, from 0 to 1", lambda x: 0 <= x <= 1)
        _expect("max_length", self.max_length, "at least 2", lambda x: x >= 2)
        if spec.ref is None and self.ref_model is not None:
            raise ValueError(f"ref_model: expected none, since {self.loss} has no reference; got {self.ref_model!r}")
        _expect("candidates", self.candidates, "a whole number, 2 or more", lambda x: isinstance(x, int) and x >= 2)
        if self.online and spec.unit != "group":
            groups = sorted(name for name, known in OBJECTIVES.items() if known.unit == "group")
            raise ValueError(f"loss: expected one of groups with online, of {groups}, got {self.loss!r}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ONLINE and not self.online and value != entry.default:
                raise ValueError(f"{entry.name}: expected none without online, got {value!r}")
        if self.online and self.sft_epochs:
            raise ValueError(f"sft_epochs: expected 0 with online, which has prompts alone; got {self.sft_epochs}")
        if not self.sft_epochs and self.sft_lr is not None:
            raise ValueError(f"sft_lr: expected none without sft_epochs, got {self.sft_lr}")
        options = check_options(spec, self.loss_option)
        if self.online and options.get("m", 1) >= self.candidates:
            raise ValueError(f"loss_option: expected m of less than {self.candidates} candidates, got {options['m']}")
        return spec, options


def _expect(name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_options(spec: Objective, options: dict[str, Any]) -> dict[str, Any]:
    """The objective's options with their types, numbers given for numbers.

    Raises:
        ValueError: an option it doesn't have, or a value of another type.
    """
    known = spec.options or {}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"loss_option: expected one of {sorted(known)} for {spec.name}, got {key!r}")
        kind = type(known[key])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if known[key] is None and number and math.isfinite(value) and key.rpartition(".")[2] != "generator":
            checked[key] = float(value)
        elif kind in (int, float) and number and math.isfinite(value) and kind(value) == value:
            checked[key] = kind(value)
        elif kind in (bool, str) and isinstance(value, kind):
            checked[key] = value
        else:
            wanted = "float" if known[key] is None else kind.__name__
            if key.rpartition(".")[2] == "generator":
                raise ValueError(f"loss_option: expected none of {key}, which --seed stands for, got {value!r}")
            raise ValueError(f"loss_option: expected {key} to be a {wanted} for {spec.name}, got {value!r}")
    return checked


# -- the run ---------------------------------------------------------------------------------------------------------


def train(config: TrainConfig, *, reward: online.Reward | None = None) -> dict[str, Any]:
    """Run `config`, or go on with it, or, where it is finished, only write its report again.

    Args:
        reward: with `online`, the reward function itself, in place of the name in `config.reward`:
            (prompts, completions) → as many numbers, higher is better.

    Returns:
        What `result.json` holds: `steps`, `seconds`, `peak_bytes`, `counts` of the data, and the evaluations `before`
        and `after`. Besides, `resumed` is the step this call started from, None for a run that was finished already.

    Raises:
        ValueError: settings, data, model or output folder that can't be used. Data is read and checked before any work.
    """
    spec, options = config.check()
    transformers.utils.logging.disable_progress_bar()  # one bar at a time: this module's own
    judge = _reward(config, reward)
    preferences = _read(config.data, spec, config.online)
    held_out = None if config.eval_data is None else _read(config.eval_data, spec, config.online)
    family = _family(config)
    _check_devices(config)
    folder = Path(config.output)
    _open(folder, config, preferences, held_out, judge)
    result_file = folder / "result.json"
    if result_file.exists():
        report.write(folder)
        return {**json.loads(result_file.read_text()), "resumed": None}

    tokenizer = _tokenizer(config, family, folder, preferences)
    how: dict[str, Any] = {
        "pairing": GROUPS if spec.unit == "group" else config.pairing,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
    }
    model = _model(config, family, tokenizer)
    hf.check_head(model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if judge is not None:
        result = _train_online(config, spec, options, folder, preferences, held_out, tokenizer, model, pad, judge)
        report.write(folder)
        return result

    def tokenised(data: Preferences) -> PreferenceDataset:
        made = tokenise(data, tokenizer, **how)
        if spec.unit == "group" and not spec.rewards:
            made = made.without_tied_best()
        if any(option(options, name) is None for name in spec.mismatched):
            made.mismatches = made.mismatched(config.max_length)
        return made

    train_set = tokenised(preferences)
    eval_set = train_set.first(EVAL_SAMPLE) if held_out is None else tokenised(held_out)
    _check_tokens(model, config.model, (train_set, eval_set))
    if config.progress:
        for name, data in (("training", train_set), ("evaluation", eval_set)):
            print(f"{name} data: {report.counted(data.counts)}")
    if config.sft_epochs:
        stage = Stage(folder / "sft", config, OBJECTIVES["mle"], {}, "fine-tuning")
        stage.fit(model, tokenizer, pad, train_set.preferred(), eval_set, config.sft_epochs, None, config.sft_lr)
        del model
        gc.collect()  # Trainer and its callbacks hold each other, and the model on the GPU
        model = AutoModelForCausalLM.from_pretrained(folder / "sft" / "model", dtype=torch.float32)
    if spec.ref is not None:
        train_set, eval_set = _with_reference(config, folder, model, pad, train_set, eval_set)
    if wants_preferred(spec):
        train_set = train_set.preferred()
    stage = Stage(folder, config, spec, options, f"training with {spec.name}")
    result = stage.fit(model, tokenizer, pad, train_set, eval_set, config.epochs, config.steps, None)
    report.write(folder)
    return result


def _reward(config: TrainConfig, given: online.Reward | None) -> online.Reward | None:
    """The reward function of an online run."""
    if not config.online:
        if given is not None:
            raise ValueError("reward: expected none without online, got a function")
        return None
    if (config.reward is None) == (given is None):
        got = "none" if given is None else "both"
        raise ValueError(f"reward: expected a function, or its name in the settings, with online; got {got}")
    return given or online.load_reward(config.reward or "")


def _train_online(
    config: TrainConfig, spec: Objective, options: dict[str, Any], folder: Path, prompts: Preferences,
    held_out: Preferences | None, tokenizer: Any, model: PreTrainedModel, pad: int, reward: online.Reward,
) -> dict[str, Any]:  # fmt: skip
    """Sampling, judging and training in turn; evaluated on groups sampled once, before the first step."""
    ref = None
    if spec.ref is not None:
        ref = _ref_model(config) or copy.deepcopy(model)
        ref.requires_grad_(False)
    count, per_step = len(prompts.rows), config.batch_size * config.grad_accum
    longest = prompt_limit(tokenizer, config.max_length, config.max_prompt_length)
    longest = longest + config.max_new_tokens if config.max_new_tokens else config.max_length
    for its, name in ((model, config.model), (ref, config.ref_model or config.model)):
        if its is not None:
            _check_sizes(its, name, hf.read_head(model).weight.shape[0] - 1, longest)
    steps = config.steps or math.ceil(config.epochs * math.ceil(count / per_step))
    common: dict[str, Any] = {
        "reward": reward, "ref": None if ref is None else moved(ref, device_of(config)), "folder": folder / "rollouts",
        "candidates": config.candidates, "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length, "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature, "pad": pad, "batch_size": config.batch_size,
        "workspace": config.workspace, "bf16": config.bf16, "seed": config.seed, "progress": config.progress,
        "ties": spec.rewards,
    }  # fmt: skip
    data = online.Rollouts(
        prompts, tokenizer, units=steps * per_step, per_round=config.refresh * per_step, **common
    )  # fmt: skip
    asked = data if held_out is None else online.Rollouts(held_out, tokenizer, units=1, per_round=1, **common)
    some = range(min(EVAL_SAMPLE, len(asked.asked)))
    evaluated = asked.groups(moved(model, device_of(config)), some, "evaluation")
    stage = Stage(folder, config, spec, options, f"training online with {spec.name}")
    return stage.fit(
        model, tokenizer, pad, data, evaluated, config.epochs, steps, None,
        measure=lambda policy: {"reward/sampled": asked.mean_reward(policy, some)},
    )  # fmt: skip


def _ref_model(config: TrainConfig) -> PreTrainedModel | None:
    if config.ref_model is None:
        return None
    return AutoModelForCausalLM.from_pretrained(config.ref_model, dtype=torch.float32, local_files_only=True)


def _read(path: str, spec: Objective, prompts: bool) -> Preferences:
    if prompts:
        return read_prompts(path)
    preferences = read_preferences(path)
    if spec.unit != "response" and preferences.form == "labelled":
        raise ValueError(
            f"{path}:1: expected pairs (chosen, rejected) or rewarded completions, since {spec.name} compares "
            "responses; got rows of one labelled response"
        )
    return preferences


def _check_devices(config: TrainConfig) -> None:
    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), 0 if config.cpu else torch.cuda.device_count()
    if processes > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, got {processes}")
    if gpus > 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: expected one visible GPU, got {gpus}")


def _family(config: TrainConfig) -> str | None:
    """The built-in configuration's name, or None for a folder."""
    for name, folder in (("model", config.model), ("ref_model", config.ref_model)):
        if name == "model" and folder in BUILT_IN and not Path(folder).is_dir():
            continue
        if folder is not None and not (Path(folder) / "config.json").is_file():
            built_in = f", or one of {sorted(BUILT_IN)}" if name == "model" else ""
            raise ValueError(f"{name}: expected a folder with a config.json{built_in}, got {folder!r}")
    return None if Path(config.model).is_dir() else config.model


def _terms(loss: str) -> list[str]:
    """Names of the objectives in a loss."""
    return [loss] if loss in OBJECTIVES else [*parse_sum(loss)]


def _source(function: Any) -> str | None:
    """Digest of the text of a function that isn't this package's; None where it is, or can't be read."""
    if getattr(function, "__module__", "").startswith("rgpb."):
        return None
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def _open(
    folder: Path, config: TrainConfig, preferences: Preferences, held_out: Preferences | None,
    judge: online.Reward | None,
) -> None:  # fmt: skip
    """Make the folder, or check that it holds the same run."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["data"] = _file_hash(preferences)
    settings["eval_data"] = None if held_out is None else _file_hash(held_out)
    settings["loss"] = resolve(config.loss).name
    if judge is not None:
        place = (
            getattr(judge, "__module__", "") if config.reward is None else Path(config.reward).name.partition(":")[0]
        )
        settings["reward"] = f"{place}:{getattr(judge, '__qualname__', type(judge).__name__)}"
    functions = {name: _source(OBJECTIVES[name].function) for name in _terms(config.loss)}
    if any(functions.values()):
        settings["functions"] = functions
    for name in ("model", "ref_model"):
        if settings[name] is not None and Path(settings[name]).is_dir():
            settings[name] = str(Path(settings[name]).resolve())
    note = folder / "run.json"
    found = [] if not folder.exists() else [path for path in folder.iterdir() if path.suffix != ".tmp"]
    if found and not note.exists():
        raise ValueError(
            f"output: expected a new or empty folder or one of an earlier run, got {folder} with other files"
        )
    own = [path for path in found if any(path.match(pattern) for pattern in OWN)]
    if config.overwrite or not any(path.name not in ("run.json", "tokenizer") for path in own):
        for path in own:  # a run that got no further than its settings binds nobody
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        noted = json.loads(note.read_text())
        earlier = noted["settings"]
        if judge is not None and noted.get("reward source") != _source(judge):
            print(f"reward: {settings['reward']} has changed since this run began; what it judged so far stays")
        differing = [
            f"{name} is {earlier.get(name)!r} there and {value!r} now"
            for name, value in settings.items()
            if earlier.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"output: expected the settings of the run in {folder}, got others: {'; '.join(differing)} "
                "(take another --output, or --overwrite to start anew)"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    sources = {"data": str(config.data), "eval_data": config.eval_data}
    content: dict[str, Any] = {"settings": settings, "sources": sources, "versions": versions}
    if judge is not None:
        content["reward source"] = _source(judge)
    write_json(note, content)


def _file_hash(preferences: Preferences) -> str:
    """Digest of what was read: the same rows from another place are the same data."""
    digest = hashlib.sha256(preferences.form.encode())
    for row in preferences.rows:
        digest.update(json.dumps(row[1:]).encode())
    return digest.hexdigest()[:16]


def _tokenizer(config: TrainConfig, family: str | None, folder: Path, preferences: Preferences) -> Any:
    if family is None:
        return AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    place = folder / "tokenizer"
    if not place.exists():
        tokenizer = train_tokenizer(texts_of(preferences), config.vocab_size)
        save_whole_folder(place, tokenizer.save_pretrained)
    return AutoTokenizer.from_pretrained(place, local_files_only=True)


def _model(config: TrainConfig, family: str | None, tokenizer: Any) -> PreTrainedModel:
    if family is None:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, local_files_only=True)
    kind, sizes = BUILT_IN[family]
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = max(2048, config.max_length)
    made = getattr(transformers, kind)(vocab_size=len(tokenizer), max_position_embeddings=length, **sizes, **tokens)
    transformers.set_seed(config.seed)
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def _check_tokens(model: PreTrainedModel, name: str, sets: Sequence[PreferenceDataset]) -> None:
    for data in sets:
        _check_sizes(model, name, int(data.tokens.max()), int(data.lengths().max()))


def _check_sizes(model: PreTrainedModel, name: str, token: int, length: int) -> None:
    """Refuse a model without that token or so many positions."""
    vocab, longest = hf.read_head(model).weight.shape[0], getattr(model.config, "max_position_embeddings", None)
    if token >= vocab:
        raise ValueError(f"model: expected a vocabulary for token {token}, got {vocab} in {name}")
    if longest is not None and length > longest:
        raise ValueError(f"max_length: expected at most {longest}, the positions of {name}; got {length}")


# -- reference -------------------------------------------------------------------------------------------------------


def _with_reference(
    config: TrainConfig,
    folder: Path,
    model: PreTrainedModel,
    pad: int,
    train_set: PreferenceDataset,
    eval_set: PreferenceDataset,
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Both sets, and their mismatches, with reference scores, from the cache where they are there."""
    ref = _ref_model(config) or model
    if config.ref_model is not None:
        _check_tokens(ref, config.ref_model, (train_set, eval_set))
    device = device_of(config)
    weights = weights_fingerprint(ref)
    known: dict[int, RefScores] = {}  # by the tokens' identity: the evaluation set may be a part of the training set

    def scored(data: PreferenceDataset) -> PreferenceDataset:
        if data.mismatches is not None:
            data.mismatches = scored(data.mismatches)
        if id(data.tokens) in known:
            return data.with_ref(known[id(data.tokens)])
        key = hashlib.sha256(f"{weights} {data.fingerprint()} {config.bf16} {device.type}".encode()).hexdigest()[:16]
        cache = folder / f"ref-{key}.safetensors"
        if cache.exists():
            ref_scores = RefScores(**load_file(cache))
        else:
            ref_scores = score_references(
                moved(ref, device),
                data,
                pad=pad,
                batch_size=4 * config.batch_size,
                workspace=config.workspace,
                bf16=config.bf16,
                progress=config.progress,
            )
            save_whole_file(cache, lambda path, scores=ref_scores: save_file(scores._asdict(), path))  # type: ignore[misc]
        known[id(data.tokens)] = ref_scores
        return data.with_ref(ref_scores)

    return scored(train_set), scored(eval_set)


# -- command line ----------------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> None:
    """`rgpb train`: one flag per field of `TrainConfig`."""
    parser = subparsers.add_parser("train", help="train a model on preference data")
    for entry in fields(TrainConfig):
        add_flag(parser, entry)
    parser.set_defaults(run=run)


def add_flag(parser: argparse.ArgumentParser, entry: Any) -> None:
    """The flag of one field."""
    flag, meta, kind = "--" + entry.name.replace("_", "-"), entry.metadata, str(entry.type)
    required, choices = entry.default is MISSING and not kind.startswith("dict"), meta.get("choices")
    keywords: dict[str, Any] = {"help": meta["help"], "dest": entry.name}
    if meta.get("negative"):
        parser.add_argument(
            "--" + meta["negative"], action="store_false", **{**keywords, "help": meta["negative_help"]}
        )
    elif kind == "bool":
        parser.add_argument(flag, action="store_true", **keywords)
    elif kind.startswith("dict"):
        parser.add_argument(flag, action="append", default=[], metavar="KEY=VALUE", **keywords)
    else:
        shown = "" if required or entry.default is None else f" (default: {entry.default})"
        parser.add_argument(
            flag,
            type=meta.get("type") or {"int": int, "float": float}.get(kind.partition(" ")[0], str),
            choices=choices,
            required=required,
            default=None if required else entry.default,
            **{**keywords, "help": meta["help"] + shown},
        )


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """["beta=0.2", "length_normalize=false"] → {"beta": 0.2, "length_normalize": False}.

    Raises:
        ValueError: no `=`, or no name before it.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"loss_option: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = {"true": True, "false": False}.get(text.lower(), text)
            options[key] = options[key] if isinstance(options[key], bool) else float(text)
        except ValueError:
            options[key] = text
    return options


def run(arguments: argparse.Namespace) -> int:
    """The command: train, then show what came out."""
    values = {entry.name: getattr(arguments, entry.name) for entry in fields(TrainConfig)}
    values["loss_option"] = parse_options(values["loss_option"])
    config = TrainConfig(**values)
    result = train(config)
    if result["resumed"] is None:
        print(f"{config.output} is finished already; wrote its report again")
    elif result["resumed"]:
        print(f"went on after step {result['resumed']}")
    report.show(report.table(report.read_metrics(config.output)), title=f"{config.loss}: {result['steps']} steps")
    print(f"report: {Path(config.output) / 'report.md'}, model: {Path(config.output) / 'model'}")
    return 0
