"""Training on preference data: `rgpb train`.

    data → tokens → (fine-tuning on the preferred) → reference scores, once → training → checkpoints, metrics, report

Everything of a run lies in its output folder:

    run.json                 the settings; another run with other settings is refused
    metrics.jsonl            one line per log: "split" train or eval
    checkpoint-<step>/       model, optimizer, random states, metrics so far, and `progress.json`, written last:
                             a checkpoint without it is incomplete and not used
    ref-<hash>.safetensors   reference scores of every response token, by hash of reference model and tokens
    tokenizer/               where it was learnt from the data
    sft/                     the fine-tuning stage, a run of its own
    model/                   the trained model and its tokenizer
    result.json, report.md, report.png

The same command again goes on after the last complete checkpoint, and ends with the same weights as a run that was
never interrupted (bitwise on a CPU).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from rgpb import hf, report
from rgpb.data import (
    IGNORE,
    PAIRINGS,
    Collator,
    PreferenceDataset,
    Preferences,
    RefScores,
    read_preferences,
    reference_of,
    texts_of,
    tokenise,
    train_tokenizer,
)
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.fused import make_layout
from rgpb.layout import Responses, TokenScores
from rgpb.objectives import OBJECTIVES, Objective, unit_values

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

# What a run writes, and `overwrite` removes.
OWN = (
    *("run.json", "result.json", "metrics.jsonl", "report.md", "report.png", "tokenizer", "sft", "model"),
    *("checkpoint-*", "ref-*.safetensors"),
)


def _option(default: Any, help: str, **extra: Any) -> Any:
    """A field with what its flag on the command line needs."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Each is a flag of `rgpb train` by the same name."""

    data: str = field(metadata={"help": "preference data: JSON lines (also gzipped), Parquet, or a saved dataset"})
    output: str = field(metadata={"help": "folder of the run"})
    eval_data: str | None = _option(None, f"held-out data; default: the first {EVAL_SAMPLE} units of --data")
    loss: str = _option("bnf", "objective", choices="objectives")
    loss_option: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "an option of the objective, such as beta=0.2; repeatable"}
    )
    pairing: str = _option("best-worst", "which of K rewarded responses to compare", choices=PAIRINGS)
    model: str = _option("tiny-llama", f"folder of a model, or a new one with its own tokenizer: {', '.join(BUILT_IN)}")
    ref_model: str | None = _option(None, "folder of the reference model; default: the model before training")
    vocab_size: int = _option(1024, "of the tokenizer that a new model gets")
    sft_epochs: float = _option(0.0, "first fine-tune that long on the preferred responses; that is then the reference")
    sft_lr: float | None = _option(None, "learning rate of the fine-tuning; default: --lr")
    epochs: float = _option(1.0, "passes over the data")
    steps: int | None = _option(None, "optimizer steps, instead of --epochs")
    batch_size: int = _option(8, "pairs, or responses of unpaired data, in a batch")
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
    workspace: int = _option(DEFAULT_WORKSPACE, "bytes the loss may hold beyond its inputs and gradients")
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
        if self.loss not in OBJECTIVES:
            raise ValueError(f"loss: expected one of {sorted(OBJECTIVES)}, got {self.loss!r}")
        spec = OBJECTIVES[self.loss]
        if spec.unit not in ("pair", "response"):
            raise ValueError(f"loss: expected an objective of pairs or responses, got {self.loss} of {spec.unit}s")
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing: expected one of {PAIRINGS}, got {self.pairing!r}")
        for name in (
            "batch_size",
            "grad_accum",
            "log_steps",
            "save_steps",
            "keep_checkpoints",
            "workspace",
            "vocab_size",
        ):
            _expect(name, getattr(self, name), "a positive whole number", lambda x: isinstance(x, int) and x > 0)
        for name in ("steps", "eval_steps", "max_prompt_length"):
            _expect(name, getattr(self, name), "a positive whole number", lambda x: x is None or int(x) == x > 0)
        for name in ("epochs", "lr"):
            _expect(name, getattr(self, name), "a positive number", lambda x: 0 < x < math.inf)
        _expect("sft_lr", self.sft_lr, "a positive number", lambda x: x is None or 0 < x < math.inf)
        for name in ("sft_epochs", "weight_decay", "max_grad_norm"):
            _expect(name, getattr(self, name), "0 or more", lambda x: 0 <= x < math.inf)
        _expect("warmup", self.warmup, "a part of the steps, from 0 to 1", lambda x: 0 <= x <= 1)
        _expect("max_length", self.max_length, "at least 2", lambda x: x >= 2)
        if spec.ref is None and self.ref_model is not None:
            raise ValueError(f"ref_model: expected none, since {self.loss} has no reference; got {self.ref_model!r}")
        if not self.sft_epochs and self.sft_lr is not None:
            raise ValueError(f"sft_lr: expected none without sft_epochs, got {self.sft_lr}")
        return spec, check_options(spec, self.loss_option)


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
        if kind in (int, float) and number and math.isfinite(value) and kind(value) == value:
            checked[key] = kind(value)
        elif kind in (bool, str) and isinstance(value, kind):
            checked[key] = value
        else:
            raise ValueError(f"loss_option: expected {key} to be a {kind.__name__} for {spec.name}, got {value!r}")
    return checked


# -- the run ---------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> dict[str, Any]:
    """Run `config`, or go on with it, or, where it is finished, only write its report again.

    Returns:
        What `result.json` holds: `steps`, `seconds`, `peak_bytes`, `counts` of the data, and the evaluations `before`
        and `after`. Besides, `resumed` is the step this call started from, None for a run that was finished already.

    Raises:
        ValueError: settings, data, model or output folder that can't be used. Data is read and checked before any work.
    """
    spec, options = config.check()
    transformers.utils.logging.disable_progress_bar()  # one bar at a time: this module's own
    preferences = _read(config.data, spec)
    held_out = None if config.eval_data is None else _read(config.eval_data, spec)
    family = _family(config)
    _check_devices(config)
    folder = Path(config.output)
    _open(folder, config, preferences, held_out)
    result_file = folder / "result.json"
    if result_file.exists():
        report.write(folder)
        return {**json.loads(result_file.read_text()), "resumed": None}

    tokenizer = _tokenizer(config, family, folder, preferences)
    lengths: dict[str, Any] = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    train_set = tokenise(preferences, tokenizer, pairing=config.pairing, **lengths)
    eval_set = train_set.first(EVAL_SAMPLE)
    if held_out is not None:
        eval_set = tokenise(held_out, tokenizer, pairing=config.pairing, **lengths)
    model = _model(config, family, tokenizer)
    _check_tokens(model, config.model, (train_set, eval_set))
    hf.check_head(model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

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
    if _wants_preferred(spec):
        train_set = train_set.preferred()
    stage = Stage(folder, config, spec, options, f"training with {spec.name}")
    result = stage.fit(model, tokenizer, pad, train_set, eval_set, config.epochs, config.steps, None)
    report.write(folder)
    return result


def _wants_preferred(spec: Objective) -> bool:
    """Objectives that can't tell good from bad (mle) are trained on the preferred responses."""
    return spec.unit == "response" and not spec.label


def _read(path: str, spec: Objective) -> Preferences:
    preferences = read_preferences(path)
    if spec.unit == "pair" and preferences.form == "labelled":
        raise ValueError(
            f"{path}:1: expected pairs (chosen, rejected) or rewarded completions, since {spec.name} compares two "
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


def _open(folder: Path, config: TrainConfig, preferences: Preferences, held_out: Preferences | None) -> None:
    """Make the folder, or check that it holds the same run."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["data"] = _file_hash(preferences)
    settings["eval_data"] = None if held_out is None else _file_hash(held_out)
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
        earlier = json.loads(note.read_text())["settings"]
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
    _write_json(note, {"settings": settings, "sources": sources, "versions": versions})


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
        _save_folder(place, tokenizer.save_pretrained)
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
    vocab, longest = hf.read_head(model).weight.shape[0], getattr(model.config, "max_position_embeddings", None)
    for data in sets:
        if int(data.tokens.max()) >= vocab:
            raise ValueError(f"model: expected a vocabulary for token {int(data.tokens.max())}, got {vocab} in {name}")
        if longest is not None and int(data.lengths().max()) > longest:
            raise ValueError(
                f"max_length: expected at most {longest}, the positions of {name}; got {data.lengths().max()}"
            )


# -- reference -------------------------------------------------------------------------------------------------------


def _with_reference(
    config: TrainConfig,
    folder: Path,
    model: PreTrainedModel,
    pad: int,
    train_set: PreferenceDataset,
    eval_set: PreferenceDataset,
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Both sets with reference scores, from the cache where they are there."""
    ref, name = model, config.model
    if config.ref_model is not None:
        name = config.ref_model
        ref = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True)
        _check_tokens(ref, name, (train_set, eval_set))
    device = _device(config)
    weights = weights_fingerprint(ref)
    scored: list[PreferenceDataset] = []
    for data in (train_set, eval_set):
        if data.tokens is train_set.tokens and scored and scored[0].ref is not None:
            scored.append(data.with_ref(scored[0].ref))
            continue
        key = hashlib.sha256(f"{weights} {data.fingerprint()} {config.bf16} {device.type}".encode()).hexdigest()[:16]
        cache = folder / f"ref-{key}.safetensors"
        if cache.exists():
            ref_scores = RefScores(**load_file(cache))
        else:
            ref_scores = score_references(
                _moved(ref, device),
                data,
                pad=pad,
                batch_size=4 * config.batch_size,
                workspace=config.workspace,
                bf16=config.bf16,
                progress=config.progress,
            )
            _save_file(cache, lambda path, scores=ref_scores: save_file(scores._asdict(), path))  # type: ignore[misc]
        scored.append(data.with_ref(ref_scores))
    return scored[0], scored[1]


@torch.no_grad()
def score_references(
    model: PreTrainedModel,
    data: PreferenceDataset,
    *,
    pad: int,
    batch_size: int,
    workspace: int = DEFAULT_WORKSPACE,
    bf16: bool = False,
    progress: bool = False,
) -> RefScores:
    """Scores of every completion token under `model`, longest responses first: memory is short at once, or never.

    Args:
        model: a causal LM, on the device to use.
        data: tokenised responses.
        pad: token that fills up padded rows.
        batch_size: responses at a time.
        workspace, bf16, progress: as in `TrainConfig`.

    Returns:
        float32, on the CPU.
    """
    starts = data.completion_starts()
    logp = torch.zeros(int(starts[-1]))
    log_odds = torch.zeros_like(logp)
    lengths = data.lengths()
    order = lengths.argsort(descending=True, stable=True)
    order = order[(lengths > data.prompts)[order]]
    collate, device = Collator(pad), hf.read_head(model).weight.device
    model.eval()
    bar = tqdm(total=len(order), desc="reference", unit="response", disable=not progress)
    with bar, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for part in order.split(batch_size):
            batch = collate([(data.response(r),) for r in part.tolist()])
            del batch["label"]
            scores = hf.token_scores(model, {k: v.to(device) for k, v in batch.items()}, workspace=workspace)
            for name, flat in (("logp", logp), ("log_odds", log_odds)):
                rows = getattr(scores, name).float().cpu()
                for row, r in zip(rows, part.tolist()):
                    flat[starts[r] : starts[r + 1]] = row[int(data.prompts[r]) - 1 : int(lengths[r]) - 1]
            bar.update(len(part))
    return RefScores(logp, log_odds, starts)


def weights_fingerprint(model: nn.Module) -> str:
    """Hex digest of names, types, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- one stage -------------------------------------------------------------------------------------------------------


class Stage:
    """One objective, one folder of checkpoints and metrics.

    Args:
        folder: where everything of it goes.
        config: the run's settings.
        spec, options: the objective and its options.
        title: for the progress bar.
    """

    def __init__(self, folder: Path, config: TrainConfig, spec: Objective, options: dict[str, Any], title: str) -> None:
        self.folder, self.config, self.spec, self.options, self.title = folder, config, spec, options, title
        self.metrics = folder / "metrics.jsonl"
        self.result = folder / "result.json"

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        pad: int,
        train_set: PreferenceDataset,
        eval_set: PreferenceDataset,
        epochs: float,
        steps: int | None,
        lr: float | None,
    ) -> dict[str, Any]:
        """Train from the last complete checkpoint, or from the start; save the model; write and return the result."""
        if self.result.exists():
            return {**json.loads(self.result.read_text()), "resumed": None}
        config = self.config
        self.folder.mkdir(exist_ok=True)
        batches = math.ceil(len(train_set) / config.batch_size)
        total = steps or math.ceil(epochs * math.ceil(batches / config.grad_accum))
        checkpoint = self._last_checkpoint()
        done = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        reset_peak(_device(config))
        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder),
            max_steps=total,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.grad_accum,
            learning_rate=lr or config.lr,
            warmup_steps=math.ceil(config.warmup * total),
            lr_scheduler_type=config.schedule,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            gradient_checkpointing=config.gradient_checkpointing,
            use_cpu=_device(config).type == "cpu",
            seed=config.seed,
            logging_steps=config.log_steps,
            logging_nan_inf_filter=False,
            eval_strategy="no" if config.eval_steps is None else "steps",
            eval_steps=config.eval_steps,
            save_steps=config.save_steps,
            save_total_limit=config.keep_checkpoints,
            dataloader_pin_memory=_device(config).type == "cuda",
            dataloader_num_workers=0,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,  # `_Bar` is shown instead
        )
        trainer = PreferenceTrainer(
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=Collator(pad, config.packing),
            stage=self,
        )
        if checkpoint is None:
            self.metrics.unlink(missing_ok=True)
            trainer.evaluate()
        else:
            trainer.restore(checkpoint)
        if done < total:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            loaded = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)
            trainer.model = _moved(loaded, _device(config))
            trainer.state.global_step, trainer.state.epoch = done, done / math.ceil(batches / config.grad_accum)
        records = report.read_metrics(self.folder)
        if not any(r["split"] == "eval" and r["step"] == total for r in records):
            trainer.evaluate()
            records = report.read_metrics(self.folder)
        trained: Any = trainer.model
        _save_folder(self.folder / "model", trained.save_pretrained, tokenizer.save_pretrained)
        evaluations = [record for record in records if record["split"] == "eval"]
        result = {
            "objective": self.spec.name,
            "options": self.options,
            "steps": total,
            "seconds": records[-1]["seconds"],
            "peak_bytes": max(record["peak_bytes"] for record in records),
            "counts": train_set.counts,
            "eval_counts": eval_set.counts,
            "before": evaluations[0],
            "after": evaluations[-1],
        }
        _write_json(self.result, result)
        return {**result, "resumed": done}

    def _last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Incomplete ones, from an interrupted save, are removed."""
        complete = []
        for path in self.folder.glob("checkpoint-*"):
            if (path / "progress.json").exists():
                complete.append(path)
            else:
                shutil.rmtree(path)
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class PreferenceTrainer(Trainer):
    """transformers' Trainer with the loss taken from hidden states and head, and evaluation likewise.

    A step's loss is the mean over all units of its batches, so gradient accumulation gives what one batch would.

    Args:
        stage: objective, options and where metrics go.
        **keywords: Trainer's own.
    """

    def __init__(self, *, stage: Stage, **keywords: Any) -> None:
        super().__init__(**keywords)
        # Trainer then leaves it to `compute_loss` to divide by what `get_batch_samples` counted.
        self.model_accepts_loss_kwargs = True
        self.stage = stage
        self._sums: dict[str, list[Any]] = {}  # name → [Σ weight · value, Σ weight] since the last log
        self._started, self._peak = time.monotonic(), 0
        self.remove_callback(PrinterCallback)
        self.add_callback(_Checkpoints(self))
        if stage.config.progress:
            self.add_callback(_Bar(stage.title))

    def units(self, batch: dict[str, Tensor]) -> int:
        """What the loss of a batch is a mean over: its pairs, or its responses."""
        return len(batch["label"]) // (2 if self.stage.spec.unit == "pair" else 1)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step, and the number of their units."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(self.units(batch) for batch in batches)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ of the batch's values over the number of units in the whole step."""
        spec, label, units = self.stage.spec, inputs["label"], self.units(inputs)
        with self.accelerator.autocast():
            loss, metrics = hf.loss(
                model,
                model_inputs(inputs),
                spec.name,
                label=label if spec.label else None,
                ref=reference_of(inputs),
                reduction="sum",
                return_metrics=True,
                workspace=self.stage.config.workspace,
                **self.stage.options,
            )
        good = units if spec.unit == "pair" else label.sum()
        weights = {"chosen": good, "perplexity": good, "rejected": len(label) - good}
        self._add("loss", loss.detach() / units, units)
        for name, value in metrics.items():
            self._add(name, value, weights.get(name.rpartition("/")[2], units))
        loss = loss / (num_items_in_batch or units)
        return (loss, {}) if return_outputs else loss

    def _add(self, name: str, value: Tensor, weight: float | Tensor) -> None:
        """Into the averages of the next log; a batch without such responses (nan) counts for nothing."""
        value = value.double()
        missing = value.isnan() & (name != "loss")
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + torch.where(missing, 0.0, weight * value)
        entry[1] = entry[1] + torch.where(missing, 0.0, weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs, with the averages since the last one."""
        if "loss" in logs:
            logs.update({name: float(total) / float(weight) for name, (total, weight) in self._sums.items() if weight})
            self._sums = {}
            self._record("train", logs)
        super().log(logs, start_time)

    def _record(self, split: str, values: dict[str, float]) -> None:
        self._peak = max(self._peak, peak_bytes(self.args.device))
        record = {
            "split": split,
            "step": self.state.global_step,
            "epoch": self.state.epoch or 0.0,
            **values,
            "seconds": time.monotonic() - self._started,
            "peak_bytes": self._peak,
            "device": self.args.device.type,
        }
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.stage.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs beside Trainer's own files."""
        return {
            "step": self.state.global_step,
            "sums": {name: [float(x) for x in entry] for name, entry in self._sums.items()},
            "seconds": time.monotonic() - self._started,
            "peak_bytes": self._peak,
        }

    def restore(self, checkpoint: Path) -> None:
        """Metrics as they were at a checkpoint."""
        progress = json.loads((checkpoint / "progress.json").read_text())
        _save_file(self.stage.metrics, lambda place: shutil.copyfile(checkpoint / "metrics.jsonl", place))
        self._sums = progress["sums"]
        self._started = time.monotonic() - progress["seconds"]
        self._peak = progress["peak_bytes"]

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the whole evaluation set, exact averages over its responses (see `summarise`)."""
        data: PreferenceDataset = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[assignment]
        model: Any = self.model
        stage, parts, training = self.stage, [], model.training
        model.eval()
        for inputs in self.get_eval_dataloader(data):  # type: ignore[arg-type]
            batch = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                columns = score_batch(model, batch, stage.spec, stage.options, stage.config.workspace)
            width = data.units.shape[1]
            parts.append({name: column.view(-1, len(batch["label"]) // width).T for name, column in columns.items()})
        model.train(training)
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        metrics = summarise(whole, stage.spec, stage.options)
        self._record("eval", metrics)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `Collator` without what only the objective reads."""
    return {name: value for name, value in batch.items() if name not in ("label", "ref_logp", "ref_log_odds")}


def score_batch(
    model: nn.Module, batch: dict[str, Tensor], spec: Objective, options: dict[str, Any], workspace: int
) -> dict[str, Tensor]:
    """Everything evaluation needs of a batch of `Collator`, from one sweep over the vocabulary.

    Returns:
        On the CPU, per response [B]: `label`, `sum` and `mean` of its tokens' log-probabilities, and with a reference
        `ratio`, the sum less the reference's; `value` of the objective, [B], or [B / 2] for pairs.
    """
    label, ref, cu_seqlens = batch["label"], reference_of(batch), batch.get("cu_seqlens")
    inputs = model_inputs(batch)
    scores = hf.token_scores(model, inputs, entropy=spec.entropy, workspace=workspace)
    target = hf.aligned_targets(inputs["labels"], cu_seqlens).view(scores.logp.shape)
    layout = make_layout(target, cu_seqlens, IGNORE)
    flat = None if ref is None else _flat(ref)
    responses = Responses(
        policy=_flat(scores),
        ref=flat,
        ref_sums=None if flat is None else layout.sum(flat.logp),
        label=label.double() * 2 - 1 if spec.label else None,
        layout=layout,
    )
    out = {"label": label, "sum": responses.logps(), "mean": responses.logps(length_normalize=True)}
    if flat is not None:
        out["ratio"] = responses.log_ratios()
    out["value"] = unit_values(spec, responses, options)
    return {name: value.cpu() for name, value in out.items()}


def _flat(scores: TokenScores) -> TokenScores:
    return TokenScores(*(None if x is None else x.reshape(-1) for x in scores))  # type: ignore[arg-type]


def summarise(columns: dict[str, Tensor], spec: Objective, options: dict[str, Any]) -> dict[str, float]:
    """Averages over an evaluation set, by the names that `fused_loss` gives them.

    `logps/accuracies` is this library's own: the part of pairs whose chosen response has the higher mean
    log-probability. It needs no reference.

    Args:
        columns: as `score_batch` returns them, [U, W] each (`value` of pairs [U, 1]): column 0 of a pair is the chosen.
        spec, options: the objective. One without labels and pairs (mle) is averaged over the preferred responses.
    """
    label, total, mean = columns["label"], columns["sum"], columns["mean"]
    paired, value = label.shape[1] == 2, columns["value"]
    out = {"loss": (value[label] if _wants_preferred(spec) else value).mean()}
    sides = {"chosen": label, "rejected": ~label}
    out.update({f"logps/{side}": total[which].mean() for side, which in sides.items()})
    if paired:
        out["logps/accuracies"] = _ranked(mean, mean.abs())
    out["perplexity"] = mean[label].neg().exp().mean()
    out["agility"] = mean[label].exp().mean() - mean[~label].exp().mean()
    if "ratio" in columns:
        reward = {**(spec.options or {}), **options}.get("beta", 1.0) * columns["ratio"]
        out.update({f"rewards/{side}": reward[which].mean() for side, which in sides.items()})
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        if paired:
            out["rewards/accuracies"] = _ranked(columns["ratio"], total.abs())
    return {name: value.item() for name, value in out.items() if not value.isnan() or name == "loss"}


def _ranked(score: Tensor, size: Tensor) -> Tensor:
    """Part of the pairs whose chosen response scores higher; a difference within float32's rounding counts half.

    Args:
        score: [U, 2], computed from numbers as large as `size` [U, 2].
    """
    difference, noise = score[:, 0] - score[:, 1], 1e-6 * size.sum(1)
    return torch.where(difference.abs() > noise, (difference > 0).double(), 0.5).mean()


class _Checkpoints(TrainerCallback):
    """Writes `progress.json` into a checkpoint when all else is in it."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copyfile(self.trainer.stage.metrics, folder / "metrics.jsonl")
        _write_json(folder / "progress.json", self.trainer.progress())


class _Bar(TrainerCallback):
    """One bar over the steps, with the last metrics behind it."""

    SHOWN = ("loss", "eval_loss", "eval_perplexity", "eval_agility")

    def __init__(self, title: str) -> None:
        self.title, self.shown, self.bar = title, {}, None  # type: ignore[var-annotated]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(desc=self.title, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.shown.update({name: f"{logs[name]:.3g}" for name in self.SHOWN if name in logs})
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


# -- machine and files -----------------------------------------------------------------------------------------------


def _device(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    module: nn.Module = model
    module.to(device)
    return model


def reset_peak(device: torch.device) -> bool:
    """Start measuring peak memory anew; False where that can't be done: on a CPU it takes Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`, or since the process began where that returns False: on a GPU that of the tensors, on a
    CPU that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows, where nothing else here is missing

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write_json(path: Path, value: Any) -> None:
    _save_file(path, lambda place: place.write_text(json.dumps(value, indent=1) + "\n"))


def _save_file(path: Path, save: Callable[[Path], Any]) -> None:
    """All of the file or none."""
    place = path.with_suffix(path.suffix + ".tmp")
    save(place)
    os.replace(place, path)


def _save_folder(path: Path, *saves: Callable[[Path], Any]) -> None:
    """All of the folder or none."""
    place = path.with_suffix(".tmp")
    for old in (place, path):
        if old.exists():
            shutil.rmtree(old)
    for save in saves:
        save(place)
    os.replace(place, path)


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
            type={"int": int, "float": float}.get(kind.partition(" ")[0], str),
            choices=sorted(OBJECTIVES) if choices == "objectives" else choices,
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
