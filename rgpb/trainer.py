"""The trainer: transformers' Trainer with the loss taken from hidden states and head, its checkpoints and its metrics.

A `Stage` is one objective in one folder: `metrics.jsonl`, `checkpoint-*`, `model`, `result.json`.

Dimensions: B responses of a batch, U units (groups, pairs or responses), W responses of a unit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from rgpb import hf, report
from rgpb.data import (
    IGNORE,
    Collator,
    PreferenceDataset,
    RefScores,
    reference_of,
)
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.fused import make_layout
from rgpb.layout import Responses
from rgpb.objectives import Objective, RunningMean, unit_values
from rgpb.objectives import units as units_of
from rgpb.objectives.registry import option, reward_scale

if TYPE_CHECKING:
    from rgpb.train import TrainConfig


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
        train_set: Any,
        eval_set: PreferenceDataset,
        epochs: float,
        steps: int | None,
        lr: float | None,
        measure: Callable[[Any], dict[str, float]] = lambda model: {},
    ) -> dict[str, Any]:
        """Train from the last complete checkpoint, or from the start; save the model; write and return the result.

        Args:
            train_set: a `PreferenceDataset`, or `rgpb.online.Rollouts`, whose policy the model becomes.
            measure: metrics of the model that each evaluation adds.
        """
        if self.result.exists():
            return {**json.loads(self.result.read_text()), "resumed": None}
        config = self.config
        self.folder.mkdir(exist_ok=True)
        batches = math.ceil(len(train_set) / config.batch_size)
        total = steps or math.ceil(epochs * math.ceil(batches / config.grad_accum))
        checkpoint = self._last_checkpoint()
        done = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        reset_peak(device_of(config))
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
            use_cpu=device_of(config).type == "cpu",
            seed=config.seed,
            logging_steps=config.log_steps,
            logging_nan_inf_filter=False,
            eval_strategy="no" if config.eval_steps is None else "steps",
            eval_steps=config.eval_steps,
            save_steps=config.save_steps,
            save_total_limit=config.keep_checkpoints,
            dataloader_pin_memory=device_of(config).type == "cuda",
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
        trainer.measure = measure
        if hasattr(train_set, "policy"):
            train_set.policy, train_set.log = trainer.model, trainer.add
        if checkpoint is None:
            self.metrics.unlink(missing_ok=True)
            trainer.evaluate()
        else:
            trainer.restore(checkpoint)
        if done < total:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            loaded = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)
            trainer.model = moved(loaded, device_of(config))
            trainer.state.global_step, trainer.state.epoch = done, done / math.ceil(batches / config.grad_accum)
        records = report.read_metrics(self.folder)
        if not any(r["split"] == "eval" and r["step"] == total for r in records):
            trainer.evaluate()
            records = report.read_metrics(self.folder)
        trained: Any = trainer.model
        save_whole_folder(self.folder / "model", trained.save_pretrained, tokenizer.save_pretrained)
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
        write_json(self.result, result)
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
        # averages over the whole run that the objective compares with, unless they were given as numbers
        self.running = {name: RunningMean() for name in stage.spec.running if option(stage.options, name) is None}
        self.measure: Callable[[Any], dict[str, float]] = lambda model: {}
        self.remove_callback(PrinterCallback)
        self.add_callback(_Checkpoints(self))
        if stage.config.progress:
            self.add_callback(_Bar(stage.title))

    def units(self, batch: dict[str, Tensor]) -> int:
        """What the loss of a batch is a mean over: its groups, its pairs, or its responses."""
        return units_of(self.stage.spec, len(batch["label"]), group_size_of(batch))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's own order; that of the units themselves where the data is made on the way."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data) if hasattr(data, "policy") else super()._get_train_sampler(train_dataset)

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
                **group_arguments(spec, inputs),
                **{**mismatched_ratios(model, inputs, spec, self.stage), **self.stage.options, **self.running},
            )
        there = present_of(inputs)
        good, bad = (label & there).sum(), (~label & there).sum()
        weights = {"chosen": good, "perplexity": good, "rejected": bad}
        self.add("loss", loss.detach() / units, units)
        for name, value in metrics.items():
            self.add(name, value, weights.get(name.rpartition("/")[2], units))
        loss = loss / (num_items_in_batch or units)
        return (loss, {}) if return_outputs else loss

    def add(self, name: str, value: Tensor | float, weight: float | Tensor) -> None:
        """Into the averages of the next log; a batch without such responses (nan) counts for nothing."""
        value = torch.as_tensor(value).double()
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
            "logged": getattr(self.train_dataset, "logged", None),
            "running": {name: [float(mean.mean), float(mean.count)] for name, mean in self.running.items()},
        }

    def restore(self, checkpoint: Path) -> None:
        """Metrics as they were at a checkpoint."""
        progress = json.loads((checkpoint / "progress.json").read_text())
        save_whole_file(self.stage.metrics, lambda place: shutil.copyfile(checkpoint / "metrics.jsonl", place))
        self._sums = progress["sums"]
        self._started = time.monotonic() - progress["seconds"]
        self._peak = progress["peak_bytes"]
        if progress["logged"] is not None:
            self.train_dataset.logged = progress["logged"]  # type: ignore[union-attr]
        for name, (mean, count) in progress["running"].items():
            self.running[name].mean.fill_(mean)
            self.running[name].count.fill_(count)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the whole evaluation set, exact averages over its responses (see `summarise`)."""
        data: PreferenceDataset = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[assignment]
        model: Any = self.model
        stage, parts, training = self.stage, [], model.training
        options = {**stage.options, **{n: float(mean.mean) for n, mean in self.running.items() if mean.count}}
        if "generator" in (stage.spec.options or {}):  # the same draws at every evaluation
            options["generator"] = torch.Generator().manual_seed(stage.config.seed)
        model.eval()
        for inputs in self.get_eval_dataloader(data):  # type: ignore[arg-type]
            batch = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                estimated = mismatched_ratios(model, batch, stage.spec, stage)
                columns = score_batch(model, batch, stage.spec, {**estimated, **options}, stage.config.workspace)
            count = len(batch["label"]) // data.units.shape[1]
            # a group's responses are consecutive, a pair's half a batch apart
            grouped = data.rewards is not None
            shaped = {n: c.view(count, -1) if grouped else c.view(-1, count).T for n, c in columns.items()}
            parts.append(shaped)
        model.train(training)
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        metrics = {**summarise(whole, stage.spec, stage.options), **self.measure(model)}
        self._record("eval", metrics)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `Collator` without what only the objective reads."""
    beside = ("label", "rewards", "ref_logp", "ref_log_odds", "mismatched")
    return {name: value for name, value in batch.items() if name not in beside}


@torch.no_grad()
def mismatched_ratios(model: nn.Module, batch: dict[str, Any], spec: Objective, stage: Stage) -> dict[str, Tensor]:
    """Δ [B] of a batch's mismatched completions, for the options that take it and weren't given."""
    names = [name for name in spec.mismatched if option(stage.options, name) is None]
    if not names or "mismatched" not in batch:
        return {}
    other = batch["mismatched"]
    ref, cu_seqlens, inputs = reference_of(other), other.get("cu_seqlens"), model_inputs(other)
    assert ref is not None  # `kto` has one
    logp = hf.token_scores(model, inputs, workspace=stage.config.workspace).logp
    target = hf.aligned_targets(inputs["labels"], cu_seqlens).view(logp.shape)
    ratio = make_layout(target, cu_seqlens, IGNORE).sum((logp - ref.logp).reshape(-1))
    return dict.fromkeys(names, ratio)


def present_of(batch: dict[str, Tensor]) -> Tensor:
    """Which responses of a batch have tokens, bool [B]."""
    labels, cu_seqlens = batch["labels"], batch.get("cu_seqlens")
    target = hf.aligned_targets(labels, cu_seqlens)
    return make_layout(target if cu_seqlens is None else target[0], cu_seqlens, IGNORE).tokens > 0


def group_size_of(batch: dict[str, Tensor]) -> int | None:
    """K of a batch of groups, else None."""
    return batch["rewards"].shape[1] if "rewards" in batch else None


def group_arguments(spec: Objective, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What `fused_loss` takes of a batch of groups."""
    if spec.unit != "group":
        return {}
    return {"group_size": group_size_of(batch), "rewards": batch["rewards"] if spec.rewards else None}


def score_batch(
    model: nn.Module, batch: dict[str, Tensor], spec: Objective, options: dict[str, Any], workspace: int
) -> dict[str, Tensor]:
    """Everything evaluation needs of a batch of `Collator`, from one sweep over the vocabulary.

    Returns:
        On the CPU, per response [B]: `label`, `present` (it has tokens), `sum` and `mean` of its tokens'
        log-probabilities, and with a reference `ratio`, the sum less the reference's; `value` of the objective, one per
        unit.
    """
    label, ref, cu_seqlens = batch["label"], reference_of(batch), batch.get("cu_seqlens")
    inputs = model_inputs(batch)
    scores = hf.token_scores(model, inputs, entropy=spec.entropy, workspace=workspace)
    target = hf.aligned_targets(inputs["labels"], cu_seqlens).view(scores.logp.shape)
    layout = make_layout(target, cu_seqlens, IGNORE)
    flat = None if ref is None else ref.flat()
    responses = Responses(
        policy=scores.flat(),
        ref=flat,
        ref_sums=None if flat is None else layout.sum(flat.logp),
        label=label.double() * 2 - 1 if spec.label else None,
        layout=layout,
        group_size=group_size_of(batch),
        rewards=batch["rewards"].view(-1) if spec.rewards else None,
    )
    out = {
        "label": label,
        "present": responses.present,
        "sum": responses.logps(),
        "mean": responses.logps(length_normalize=True),
    }
    if flat is not None:
        out["ratio"] = responses.log_ratios()
    out["value"] = unit_values(spec, responses, options)
    return {name: value.cpu() for name, value in out.items()}


def summarise(columns: dict[str, Tensor], spec: Objective, options: dict[str, Any]) -> dict[str, float]:
    """Averages over an evaluation set, by the names that `fused_loss` gives them.

    `logps/accuracies` is this library's own: the part of pairs (of a group: of the best with each other) whose chosen
    response has the higher mean log-probability. It needs no reference.

    Args:
        columns: as `score_batch` returns them, [U, W] each (`value` of pairs and groups [U, 1]): column 0 is the
            chosen.
        spec, options: the objective. One without labels and pairs (mle) is averaged over the preferred responses.
    """
    label, present, total, mean = (columns[name] for name in ("label", "present", "sum", "mean"))
    paired, value = label.shape[1] > 1, columns["value"]
    out = {"loss": (value[label] if wants_preferred(spec) else value).mean()}
    good, bad = label & present, ~label & present
    sides = {"chosen": good, "rejected": bad}
    out.update({f"logps/{side}": total[which].mean() for side, which in sides.items()})
    if paired:
        out["logps/accuracies"] = _ranked(mean, mean.abs(), present)
    out["perplexity"] = mean[good].neg().exp().mean()
    out["agility"] = mean[good].exp().mean() - mean[bad].exp().mean()
    if "ratio" in columns:
        reward = reward_scale(spec, options) * columns["ratio"]
        out.update({f"rewards/{side}": reward[which].mean() for side, which in sides.items()})
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        if paired:
            out["rewards/accuracies"] = _ranked(columns["ratio"], total.abs(), present)
    return {name: value.item() for name, value in out.items() if not value.isnan() or name == "loss"}


def _ranked(score: Tensor, size: Tensor, present: Tensor) -> Tensor:
    """Part of the pairs of a unit's first response with another whose first scores higher; a difference within
    float32's rounding counts half.

    Args:
        score: [U, W], computed from numbers as large as `size` [U, W].
        present: which responses there are, bool [U, W].
    """
    difference, noise = score[:, :1] - score[:, 1:], 1e-6 * (size[:, :1] + size[:, 1:])
    right = torch.where(difference.abs() > noise, (difference > 0).double(), 0.5)
    return right[present[:, :1] & present[:, 1:]].mean()


class _Checkpoints(TrainerCallback):
    """Writes `progress.json` into a checkpoint when all else is in it."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copyfile(self.trainer.stage.metrics, folder / "metrics.jsonl")
        write_json(folder / "progress.json", self.trainer.progress())


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


def device_of(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
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


def write_json(path: Path, value: Any) -> None:
    save_whole_file(path, lambda place: place.write_text(json.dumps(value, indent=1) + "\n"))


def save_whole_file(path: Path, save: Callable[[Path], Any]) -> None:
    """All of the file or none."""
    place = path.with_suffix(path.suffix + ".tmp")
    save(place)
    os.replace(place, path)


def save_whole_folder(path: Path, *saves: Callable[[Path], Any]) -> None:
    """All of the folder or none."""
    place = path.with_suffix(".tmp")
    for old in (place, path):
        if old.exists():
            shutil.rmtree(old)
    for save in saves:
        save(place)
    os.replace(place, path)


# -- reference scores ------------------------------------------------------------------------------------------------


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


def wants_preferred(spec: Objective) -> bool:
    """Objectives that can't tell good from bad (mle) are trained on the preferred responses."""
    return spec.unit == "response" and not spec.label
