"""The trainer: transformers' Trainer with the loss taken from hidden states and head, its checkpoints and its metrics.

A `Stage` is one objective in one folder: `metrics.jsonl`, `checkpoint-*`, `model`, `result.json`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from rgpb import hf
from rgpb.objectives import Objective, RunningMean, option
from rgpb.objectives import units as units_of
from rgpb.train.config import TrainConfig
from rgpb.train.evaluate import (
    group_arguments,
    group_size_of,
    mismatched_ratios,
    model_inputs,
    present_of,
    score_batch,
    summarise,
)
from rgpb.train.files import save_whole_file, save_whole_folder, write_json
from rgpb.train.folder import last_checkpoint, step_of
from rgpb.train.machine import device_of, moved, peak_bytes, reset_peak
from rgpb.train.report import read_metrics
from rgpb.train.tokens import Collator, PreferenceDataset, pad_of, reference_of


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
        train_set: Any,
        eval_set: PreferenceDataset,
        *,
        epochs: float,
        steps: int | None = None,
        lr: float | None = None,
        measure: Callable[[Any], dict[str, float]] = lambda model: {},
    ) -> dict[str, Any]:
        """Train from the last complete checkpoint, or from the start; save the model; write and return the result.

        Args:
            train_set: a `PreferenceDataset`, or `rgpb.train.online.Rollouts`, whose policy the model becomes.
            epochs: passes over the data, unless `steps` says how many optimizer steps.
            lr: peak learning rate; default: the run's.
            measure: metrics of the model that each evaluation adds.
        """
        if self.result.exists():
            return {**json.loads(self.result.read_text()), "resumed": None}
        config = self.config
        self.folder.mkdir(exist_ok=True)
        per_epoch = math.ceil(math.ceil(len(train_set) / config.batch_size) / config.grad_accum)
        total = steps or math.ceil(epochs * per_epoch)
        checkpoint = last_checkpoint(self.folder)
        done = 0 if checkpoint is None else step_of(checkpoint)
        reset_peak(device_of(config))
        trainer = PreferenceTrainer(
            model=model,
            args=self._arguments(total, lr or config.lr),
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=Collator(pad_of(tokenizer), config.packing),
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
            trainer.state.global_step, trainer.state.epoch = done, done / per_epoch
        records = read_metrics(self.folder)
        if not any(r["split"] == "eval" and r["step"] == total for r in records):
            trainer.evaluate()
            records = read_metrics(self.folder)
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

    def _arguments(self, total: int, lr: float) -> transformers.TrainingArguments:
        """The settings as Trainer takes them; `total` optimizer steps."""
        config = self.config
        return transformers.TrainingArguments(
            output_dir=str(self.folder),
            max_steps=total,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.grad_accum,
            learning_rate=lr,
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
        stage, spec, label, units = self.stage, self.stage.spec, inputs["label"], self.units(inputs)
        with self.accelerator.autocast():
            estimated = mismatched_ratios(model, inputs, spec, stage.options, stage.config.workspace)
            loss, metrics = hf.loss(
                model,
                model_inputs(inputs),
                spec.name,
                label=label if spec.label else None,
                ref=reference_of(inputs),
                reduction="sum",
                return_metrics=True,
                workspace=stage.config.workspace,
                **group_arguments(spec, inputs),
                **{**estimated, **stage.options, **self.running},
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
                estimated = mismatched_ratios(model, batch, stage.spec, stage.options, stage.config.workspace)
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
