"""The trainer: transformers' Trainer with the loss taken from hidden states and head, its checkpoints and its metrics.

A `Stage` is one objective in one folder: `metrics.jsonl`, `checkpoint-*`, `model`, `result.json`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from rgpb import hf
from rgpb.hf.batches import present_of, reference_of
from rgpb.objectives import Objective, RunningMean, option
from rgpb.train.config import TrainConfig
from rgpb.train.evaluate import (
    evaluate_set,
    group_arguments,
    mismatched_ratios,
    model_inputs,
)
from rgpb.train.files import naming, save_whole_file, save_whole_folder, write_json
from rgpb.train.folder import drop_checkpoints, last_checkpoint, step_of
from rgpb.train.machine import device_of, peak_bytes, reset_peak
from rgpb.train.models import rehearse, save_model
from rgpb.train.order import FILLER, Order, loader
from rgpb.train.parallel import load_state, load_trainers, replicated, save_state, whole_state
from rgpb.train.progress import Lines, bar, duration, say
from rgpb.train.ranks import ALONE, Ranks
from rgpb.train.report import read_metrics
from rgpb.train.signals import Hold, act
from rgpb.train.teacher import References
from rgpb.train.tokens import Collator, PreferenceDataset, pad_of


class Stage:
    """One objective, one folder of checkpoints and metrics.

    Args:
        folder: where everything of it goes.
        config: the run's settings.
        spec, options: the objective and its options.
        title: for the progress bar.
        ranks: who share the work.

    Attributes:
        dtype: of the weights when they are saved.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, spec: Objective, options: dict[str, Any], title: str,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.spec, self.options, self.title = folder, config, spec, options, title
        self.ranks, self.dtype = ranks, torch.float32
        self.metrics = folder / "metrics.jsonl"
        self.result = folder / "result.json"

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        train_set: Any,
        eval_set: PreferenceDataset,
        *,
        epochs: float,
        steps: int | None = None,
        lr: float | None = None,
        measure: Callable[[Any], dict[str, float]] = lambda model: {},
        references: References | None = None,
    ) -> dict[str, Any]:
        """Train from the last complete checkpoint, or from the start; save the model; write and return the result.

        Args:
            model: on its device, in PEFT where it has adapters; of several ranks' models each is the same or a part.
            train_set: a `PreferenceDataset`, or `rgpb.train.online.Rollouts`, whose policy the model becomes.
            epochs: passes over the data, unless `steps` says how many optimizer steps.
            lr: peak learning rate; default: the run's.
            measure: metrics of the model that each evaluation adds.
            references: where both sets' reference scores come from.

        Raises:
            ValueError: a model, tokenizer or folder that couldn't be saved at the end.
            FloatingPointError: a loss or gradient that isn't finite; the step isn't taken.
        """
        config, ranks = self.config, self.ranks
        finished = ranks.by_first(lambda: json.loads(self.result.read_text()) if self.result.exists() else None)
        if finished is not None:
            return {**finished, "resumed": None}
        self.folder.mkdir(exist_ok=True)
        per_epoch = steps_of(config, len(train_set), 1.0)
        total = steps_of(config, len(train_set), epochs, steps)
        checkpoint = ranks.by_first(lambda: last_checkpoint(self.folder))
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
        trainer.measure, trainer.references = measure, references
        if done < total:
            ranks.by_first(lambda: rehearse(self.folder, trainer.model, tokenizer, config.keep_checkpoints))
        if hasattr(train_set, "policy"):
            train_set.policy, train_set.log = trainer.model, trainer.add
        if checkpoint is None:
            ranks.by_first(lambda: self.metrics.unlink(missing_ok=True))
            trainer.evaluate()
        else:
            if config.progress:
                say(f"{self.title}: going on from step {done} of {total}")
            trainer.restore(checkpoint)
        if done < total:
            with trainer.hold:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if number := max(ranks.gather(trainer.hold.number)):
                last = trainer.state.global_step
                act(number, f"stopped after step {last} of {total}, which is saved")
        else:
            trainer.load_weights(str(checkpoint))
            trainer.state.global_step, trainer.state.epoch = done, done / per_epoch
        ranks.doing = "the end"
        records = ranks.by_first(lambda: read_metrics(self.folder))
        if not any(r["split"] == "eval" and r["step"] == total for r in records):
            trainer.evaluate()
            records = ranks.by_first(lambda: read_metrics(self.folder))
        trained: Any = trainer.model
        state = whole_state(trained, ranks)

        def save(place: Path) -> None:
            save_model(place, trained, state, self.dtype)

        ranks.by_first(lambda: save_whole_folder(self.folder / "model", save, tokenizer.save_pretrained))
        evaluations = [record for record in records if record["split"] == "eval"]
        result = {
            "objective": self.spec.name,
            "options": self.options,
            "steps": total,
            "seconds": records[-1]["seconds"],
            "peak_bytes": max(record["peak_bytes"] for record in records),
            "counts": train_set.whole_counts() if hasattr(train_set, "policy") else train_set.counts,
            "eval_counts": eval_set.counts,
            "before": evaluations[0],
            "after": evaluations[-1],
        }
        ranks.by_first(lambda: write_json(self.result, result))
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
            warmup_steps=min(math.ceil(config.warmup * total), total - 1),  # lr is 0 at the first of them
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
            save_total_limit=None,  # `_Checkpoints` drops old ones, once the new one is complete
            average_tokens_across_devices=False,  # `compute_loss` does it, by units
            dataloader_pin_memory=device_of(config).type == "cuda",
            dataloader_num_workers=0,
            remove_unused_columns=False,
            report_to=config.report_to if config.report_to and self.folder == Path(config.output) else "none",
            run_name=self.folder.name,
            disable_tqdm=True,  # `_Bar` is shown instead
            ddp_backend=None if self.ranks.alone or device_of(config).type == "cuda" else "gloo",
        )


def steps_of(config: TrainConfig, units: int, epochs: float, steps: int | None = None) -> int:
    """Optimizer steps of a run."""
    return steps or math.ceil(epochs * math.ceil(math.ceil(units / config.batch_size) / config.grad_accum))


class PreferenceTrainer(hf.PreferenceMixin, Trainer):
    """A Trainer with the loss taken from hidden states and head, and evaluation likewise.

    Of several ranks each has its share of every batch.

    The order of the data is Trainer's own of one process; on several ranks accelerate's sampler would repeat units to
    fill up the last batches. Random states are a function of seed, step and rank, so a checkpoint needs none.

    Args:
        stage: objective, options and where metrics go.
        **keywords: Trainer's own.
    """

    def __init__(self, *, stage: Stage, **keywords: Any) -> None:
        self.stage, self.ranks = stage, stage.ranks
        super().__init__(objective=stage.spec.name, options=stage.options, **keywords)
        self._started, self._peak = time.monotonic(), 0
        self._step: tuple[Tensor | float, int] = (0.0, 0)  # sum of the losses of this step, and of how many units
        # averages over the whole run that the objective compares with, unless they were given as numbers
        self.running = {
            name: SharedMean(self.ranks) for name in stage.spec.running if option(stage.options, name) is None
        }
        self.measure: Callable[[Any], dict[str, float]] = lambda model: {}
        self.references: References | None = None
        self._good = ""  # the last finite loss, as text
        # seconds and tokens of the last evaluation; seconds a step, where an earlier start has measured it
        self._evaluated, self._pace = (0.0, 0), None  # type: tuple[float, int], float | None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(
                    stage.folder / "tensorboard"
                )  # else an evaluation before training has ./runs
        self.hold, self.stopping = Hold(), False  # whether all ranks know that one was told to stop
        self.remove_callback(PrinterCallback)
        self.add_callback(_Stop(self))
        self.add_callback(_Checkpoints(self))
        if stage.config.progress and self.ranks.first:
            self.add_callback(_Bar(self, stage.title))

    def units(self, batch: Mapping[str, Any]) -> int:
        """What the loss of a batch is a mean over: its groups, its pairs, or its responses."""
        if bool(batch.get(FILLER, False)):
            return 0
        return super().units(batch)

    def total(self, count: int) -> int:
        return self.ranks.total(count)

    def gather(self, value: Any) -> list[Any]:
        return self.ranks.gather(value)

    def get_train_dataloader(self) -> Any:
        """This rank's share of the batches, with reference scores. Data that is made on the way comes as it is."""
        data: Any = self.train_dataset
        config, references = self.stage.config, self.references
        order = Order(len(data), config.batch_size, None if hasattr(data, "policy") else config.seed)

        def ready(units: Sequence[int]) -> None:
            if references is not None:
                references.ready(data, units)

        collate: Any = self.data_collator
        return loader(data, collate, order, ready, self.ranks, self.args.device)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Trainer's own, or with DDP or FSDP2 around the model, and the optimizer over what that leaves."""
        if self.ranks.alone:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        wrapped = self.model_wrapped = replicated(self._bare, self.args.device)
        self.create_optimizer()
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        handler: Any = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = train_dataloader
        return wrapped, train_dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step, and the number of their units on all ranks; 1 where there is none: `_get_grad_norm`
        sees to it that such a step isn't taken."""
        step = self.state.global_step
        self.ranks.doing = f"step {step + 1}"
        batches, units = super().get_batch_samples(epoch_iterator, num_batches, device)
        torch.manual_seed(zlib.crc32(f"{self.args.seed} step {step} rank {self.ranks.rank}".encode()))
        return batches, max(units, 1)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: `get_batch_samples` seeds each step, and Trainer would put a checkpoint's state over that."""

    def objective_loss(
        self, model: nn.Module, inputs: dict[str, Any], reduction: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        stage, spec, label, units = self.stage, self.stage.spec, inputs["label"], self.units(inputs)
        inputs = {name: value for name, value in inputs.items() if name != FILLER}
        for mean in self.running.values():
            mean.counts = units > 0
        with self.accelerator.autocast():
            estimated = mismatched_ratios(model, inputs, spec, stage.options, stage.config.workspace)
            shared = {name: self.ranks_values(x if units else x[:0]) for name, x in estimated.items()}
            estimated = {name: x if len(x) else estimated[name] for name, x in shared.items()}
            loss, metrics = hf.loss(
                model,
                model_inputs(inputs),
                spec.name,
                label=label if spec.label else None,
                ref=reference_of(inputs),
                reduction=reduction,
                data_group=None,  # ranks share what the batch couples through `running` and `estimated`
                return_metrics=True,
                workspace=stage.config.workspace,
                **group_arguments(spec, inputs),
                **{**estimated, **stage.options, **self.running},
            )
        if not units:
            return 0 * loss, {}
        self._step = (self._step[0] + loss.detach(), self._step[1] + units)
        self.add("loss", loss.detach() / units, units)
        return loss * self.ranks.world, metrics  # gradients are averaged over ranks

    def weights_of(self, inputs: dict[str, Any], units: int) -> dict[str, Any]:
        label, there = inputs["label"], present_of(inputs)
        good, bad = (label & there).sum(), (~label & there).sum()
        weights = {"chosen": good, "perplexity": good, "rejected": bad}
        return weights | ({"accuracies": bad} if self.spec.unit == "group" else {})  # of the best with each other

    def ranks_values(self, values: Tensor) -> Tensor:
        """Of all ranks, one rank after the other."""
        return values if self.ranks.alone else torch.cat(self.ranks.gather(values.cpu())).to(values.device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's own, or where nothing is clipped the norm that would be. A step that isn't finite is not taken, and
        one without any unit leaves the weights and the optimizer's state as they are."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        total, weight = self._step
        found = self.ranks.gather((float(total), weight, self.hold.number))
        loss, size = math.fsum(part[0] for part in found), sum(part[1] for part in found)
        self.stopping = any(number for *_, number in found)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise FloatingPointError(self._diverged(loss / (size or 1), float(norm)))
        self._step = (0.0, 0)
        if size:
            self._good = f"{loss / size:.4g} in step {self.state.global_step + 1}"
        else:
            model.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient
        return norm

    def _diverged(self, loss: float, norm: float) -> str:
        last = last_checkpoint(self.stage.folder)
        kept = "there is no checkpoint yet" if last is None else f"{last.name} is as it was"
        return (
            f"training diverged in step {self.state.global_step + 1}: loss {loss:.4g}, gradient of norm {norm:.4g}; "
            f"the last good loss was {self._good or 'none'}; the step was not taken, and {kept}. Try a lower --lr than "
            f"{self.args.learning_rate:g}, --max-grad-norm 1, or without --bf16 and --dtype bf16"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs, with the averages since the last one; without any unit there is no loss."""
        if "loss" in logs:
            logs.update({"loss": math.nan, **self.averages()})
            self._record("train", logs)
        super(hf.PreferenceMixin, self).log(logs, start_time)

    def _record(self, split: str, values: dict[str, float]) -> None:
        self._peak = max(self._peak, *self.ranks.gather(peak_bytes(self.args.device)))
        if not self.ranks.first:
            return
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
        with naming(self.stage.metrics), open(self.stage.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def left(self, step: float | None = None) -> tuple[float, str]:
        """Seconds until the end, by seconds a step; and in words.

        Args:
            step: default: what an earlier start has measured, or three times the forward pass, whose speed is that of
                the last evaluation, and a fourth for references that are yet to score. 0: unknown, as online.
        """
        steps, every = self.state.max_steps - self.state.global_step, self.stage.config.eval_steps
        evaluations = max(1, math.ceil(steps / every)) if every else 1
        seconds, tokens = self._evaluated
        if step is None:
            step = self._pace
        data: Any = self.train_dataset
        if step is None and tokens and not hasattr(data, "policy"):
            each = data.lengths().double().mean().item() * data.units.shape[1] * (1 if data.mismatches is None else 2)
            units = min(self.args.train_batch_size * self.args.gradient_accumulation_steps, len(data))
            passes = 4 if self.references is not None and self.references.model is not None else 3
            step = passes * each * units * seconds / (tokens * self.ranks.world)
        whole = steps * step + evaluations * seconds if step else 0.0
        each_step, several = duration(step or 0.0), "s" if evaluations > 1 else ""
        return whole, f"{steps} steps, {each_step} each, and {evaluations} evaluation{several}: {duration(whole)}"

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs beside Trainer's own files."""
        return {
            "step": self.state.global_step,
            "sums": self.whole_sums(),
            "seconds": time.monotonic() - self._started,
            "peak_bytes": self._peak,
            "logged": getattr(self.train_dataset, "logged", None),
            "running": {name: [float(mean.mean), float(mean.count)] for name, mean in self.running.items()},
        }

    def restore(self, checkpoint: Path) -> None:
        """Metrics as they were at a checkpoint."""
        progress = json.loads((checkpoint / "progress.json").read_text())
        if self.ranks.first:
            save_whole_file(self.stage.metrics, lambda place: shutil.copyfile(checkpoint / "metrics.jsonl", place))
        self._sums = progress["sums"] if self.ranks.first else {}
        self._started = time.monotonic() - progress["seconds"]
        self._pace = progress["seconds"] / progress["step"]
        self._peak = progress["peak_bytes"]
        if progress["logged"] is not None:
            self.train_dataset.logged = progress["logged"]  # type: ignore[union-attr]
        for name, (mean, count) in progress["running"].items():
            self.running[name].mean.fill_(mean)
            self.running[name].count.fill_(count)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own; of several ranks a folder that gets its name when all of them have written theirs."""
        if self.ranks.alone:
            with naming(self.stage.folder / f"checkpoint-{self.state.global_step}"):
                super()._save_checkpoint(model, trial)
            return
        folder, ranks = self.stage.folder / f"checkpoint-{self.state.global_step}", self.ranks
        place = folder.with_suffix(".tmp")
        ranks.doing = f"the checkpoint of step {self.state.global_step}"
        ranks.by_first(lambda: _emptied(place))
        save_state(place / "dcp", self._bare, self.optimizer, ranks)
        progress = self.progress()

        def complete() -> None:
            torch.save(self.lr_scheduler.state_dict(), place / "scheduler.pt")  # type: ignore[union-attr]
            self.state.save_to_json(str(place / "trainer_state.json"))
            shutil.copyfile(self.stage.metrics, place / "metrics.jsonl")
            write_json(place / "progress.json", progress)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(place, folder)
            drop_checkpoints(self.stage.folder, self.stage.config.keep_checkpoints)

        ranks.by_first(complete)

    @property
    def _bare(self) -> Any:
        """The model without DDP."""
        return self.model

    def load_weights(self, checkpoint: str) -> None:
        """The model alone, as it was at a checkpoint of any number of ranks."""
        if (Path(checkpoint) / "dcp").exists():
            load_state(Path(checkpoint) / "dcp", self._bare, None, self.ranks)
        elif self.ranks.alone:
            super()._load_from_checkpoint(checkpoint)
        else:
            load_trainers(Path(checkpoint), self._bare, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's own, where the checkpoint and this run are of one process; else it comes with the optimizer."""
        if self.ranks.alone and not (Path(resume_from_checkpoint) / "dcp").exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's own, where the checkpoint and this run are of one process; else by the parameters' names."""
        place = None if checkpoint is None else Path(checkpoint)
        if place is None or (self.ranks.alone and not (place / "dcp").exists()):
            return super()._load_optimizer_and_scheduler(checkpoint)
        if (place / "dcp").exists():
            load_state(place / "dcp", self._bare, self.optimizer, self.ranks)
        else:
            load_trainers(place, self._bare, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(place / "scheduler.pt", weights_only=True))  # type: ignore[union-attr]

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the whole evaluation set, exact averages over its responses (see `evaluate_set`)."""
        data: PreferenceDataset = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[assignment]
        model: Any = self.model
        stage, training = self.stage, model.training
        self.ranks.doing = f"the evaluation after step {self.state.global_step}"
        if self.references is not None:
            self.references.ready(data)
        options = {**stage.options, **{n: float(mean.mean) for n, mean in self.running.items() if mean.count}}
        model.eval()
        begun = time.monotonic()
        metrics, tokens = evaluate_set(
            model, data, stage.spec, options, stage.config, collate=self.data_collator,  # type: ignore[arg-type]
            prepare=self._prepare_inputs, autocast=self.accelerator.autocast, ranks=self.ranks,
        )  # fmt: skip
        model.train(training)
        self._evaluated = time.monotonic() - begun, tokens
        metrics = {**metrics, **self.measure(model)}
        self._record("eval", metrics)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named


class SharedMean(RunningMean):
    """The mean of all ranks' values; `counts` says whether this rank's own do."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks, self.counts = ranks, True

    def take(self, total: Tensor, number: Tensor) -> Tensor:
        if not self.counts:
            total, number = torch.zeros_like(total), torch.zeros_like(number)
        if not self.ranks.alone:
            found = self.ranks.gather((float(total), float(number)))
            total = total.new_tensor(math.fsum(total for total, _ in found))
            number = number.new_tensor(math.fsum(number for _, number in found))
        return super().take(total, number)


def _emptied(place: Path) -> None:
    """A new folder, in the place of what an interrupted save has left."""
    if place.exists():
        shutil.rmtree(place)
    place.mkdir()


class _Stop(TrainerCallback):
    """Saves and ends the training behind the step in which a signal came; of several ranks, at the same step of all."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping or (self.trainer.ranks.alone and self.trainer.hold.number):
            control.should_save = control.should_training_stop = True


class _Checkpoints(TrainerCallback):
    """Writes `progress.json` into a checkpoint of one process when all else is in it."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.ranks.alone:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copyfile(self.trainer.stage.metrics, folder / "metrics.jsonl")
        write_json(folder / "progress.json", self.trainer.progress())
        drop_checkpoints(self.trainer.stage.folder, self.trainer.stage.config.keep_checkpoints)


class _Bar(TrainerCallback):
    """One bar over the steps, with the last metrics behind it."""

    SHOWN = ("loss", "eval_loss", "eval_perplexity", "eval_agility")
    MEASURED = 3  # steps until the estimate is made anew; the first is not among them

    def __init__(self, trainer: PreferenceTrainer, title: str) -> None:
        self.trainer, self.title = trainer, title
        self.shown: dict[str, str] = {}
        self.bar: tqdm[Any] | Lines | None = None
        self.marks: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        whole, text = self.trainer.left()
        if whole:
            print(f"estimate: {text}", flush=True)
        self.bar = bar(state.max_steps, self.title, "step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append(time.monotonic())
        if len(self.marks) == self.MEASURED and state.global_step < state.max_steps:
            each = (self.marks[-1] - self.marks[0]) / (self.MEASURED - 1)
            say(f"as measured: {self.trainer.left(each)[1]}")
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.shown.update({name: f"{logs[name]:.3g}" for name in self.SHOWN if name in logs})
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
