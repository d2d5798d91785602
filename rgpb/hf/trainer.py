"""A mixin for transformers' Trainer: its loss from hidden states and head, its steps those of one large batch.

Dimensions: B responses, T positions of a padded batch, N of a packed one, G groups, K responses of a group, U units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgpb.hf.batches import present_of, reference_of, responses_of
from rgpb.hf.forward import loss as loss_of
from rgpb.hf.models import attach
from rgpb.hf.wrappers import base_of, batch_group, check_reference
from rgpb.layout import Responses
from rgpb.metrics import with_differences
from rgpb.objectives import RunningMean, check_options, resolve
from rgpb.objectives import units as units_of
from rgpb.objectives.registry import RESERVED
from rgpb.parallel import all_sum

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput
else:
    Trainer = object

RUNNING = "running_means.pt"  # in a checkpoint
BESIDE = ("label", "rewards", "ref_logp", "ref_log_odds")  # keys of a batch that only the objective reads


class PreferenceMixin(Trainer):
    """What a `transformers.Trainer` needs to train with any objective: `class MyTrainer(hf.PreferenceMixin, Trainer)`.

    A step's loss is the mean over all units (pairs, responses or groups) of its batches, on all ranks. So gradient
    accumulation and several ranks give what one large batch would, also where batches have unequal numbers of units.
    What an objective takes from its batch (the z₀ of `kto`, the δ of `bco`) is still of one batch, of all ranks.

    Your collator makes batches as at the top of `rgpb.hf`: pairs stacked `[chosen; rejected]`, the responses of a group
    consecutive. Rows of the dataset reach it whole, whatever `remove_unused_columns` says. Beside the model's inputs a
    batch may have:

    * `label`: bool or ±1 [B], for objectives that take one.
    * `rewards`: [G, K], for objectives of groups.
    * `ref_logp`, `ref_log_odds`: precomputed reference scores, as `token_scores` returns them: in the shape of the
      labels, [N] when packed. `ref_logp` alone may be log-probabilities of tokens, or sums [B].

    The log has the metrics of `fused_loss`, averaged over the batches since the last one; evaluation has them under its
    prefix. There are no predictions, since there are no logits.

    Args:
        *args: Trainer's own.
        objective: a name, a weighted sum, or a function of `Responses`.
        ref: a reference model, or "base" for the model without its PEFT adapters; default None: none, or what the
            batches have.
        options: further arguments of `rgpb.hf.loss`: the objective's options, `group_size`, `temperature`,
            `workspace`, …. A `RunningMean` among them is saved with checkpoints.
        **keywords: Trainer's own.

    Raises:
        ValueError: an unknown objective, a head that isn't served, or a setting of Trainer's that would change the loss
            or take batches apart.
    """

    def __init__(
        self,
        *args: Any,
        objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "bnf",
        ref: nn.Module | str | None = None,
        options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        spec = resolve(objective)
        for name in ("label", "ref", "reduction", "return_metrics"):
            if name in (options or {}):
                raise ValueError(f"options: expected no {name}, which the trainer gives; got {sorted(options or {})}")
        if isinstance(ref, str) and ref != "base":
            raise ValueError(f"ref: expected a model, 'base' or None, got {ref!r}")
        check_options(spec, {name: value for name, value in (options or {}).items() if name not in RESERVED})
        super().__init__(*args, **keywords)
        # Trainer then leaves it to `compute_loss` to divide by what `get_batch_samples` counted.
        self.model_accepts_loss_kwargs = True
        self.spec, self.options = spec, dict(options or {})
        self.objective: Any = objective
        self._sums: dict[str, list[Any]] = {}  # name → [Σ weight · value, Σ weight] since the last log
        self._check_settings()
        trained: Any = self.model
        if "_rgpb" not in vars(base_of(trained)):
            attach(trained)
        if isinstance(ref, nn.Module):
            check_reference(trained, ref)
            ref = self.accelerator.prepare_model(ref.requires_grad_(False).eval(), evaluation_mode=True)
        self.ref: Any = ref

    def _check_settings(self) -> None:
        """Refuse what would change the loss without a word."""
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics: expected None, since there are no logits to compute any from")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: expected none beside an objective, got a function")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, since the objective is the loss; "
                f"got {self.args.label_smoothing_factor}"
            )
        parallel: Any = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
            raise ValueError(
                "parallelism_config: expected whole sequences on each rank, got context or sequence parallelism; call "
                "rgpb.hf.loss with a sequence_group in a loop of your own"
            )
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        dispatched = self.accelerator.dispatch_batches
        if self.args.world_size > 1 and (streamed if dispatched is None else dispatched):
            raise ValueError(
                "dispatch_batches: expected False where several processes train, since accelerate would cut a batch "
                "between its rows; accelerator_config={'dispatch_batches': False}"
            )

    @property
    def routed(self) -> bool:
        """Whether the model adds the loss of a router to its own."""
        model: Any = self.model
        return bool(getattr(base_of(model).config.get_text_config(), "output_router_logits", False))

    def units(self, batch: Mapping[str, Any]) -> int:
        """What the loss of a batch is a mean over: its groups, its pairs, or its responses."""
        size = batch["rewards"].shape[1] if "rewards" in batch else self.options.get("group_size")
        return units_of(self.spec, responses_of(batch), size)

    def total(self, count: int) -> int:
        """The sum over the ranks that have other batches."""
        group = batch_group(self.model_wrapped)
        return count if group is None else int(all_sum(torch.tensor(count, device=self.args.device), group))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step, and the number of their units on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.total(sum(self.units(batch) for batch in batches))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ of the batch's values over the number of units in the whole step, of all ranks; or their mean where no such
        number is given."""
        units, whole = self.units(inputs), num_items_in_batch is not None
        if whole and self.routed:  # its router's loss is a mean, to be weighted by the batch's share of the step
            loss, metrics = self.objective_loss(model, inputs, "mean")
            loss = loss * self.total(units)
        else:
            loss, metrics = self.objective_loss(model, inputs, "sum" if whole else "mean")
        if units:
            weights = self.weights_of(inputs, units)
            for name, value in metrics.items():
                if not value.dim():  # what was skipped at each token isn't logged
                    self.add(name, value, weights.get(name.rpartition("/")[2], units))
        if whole:
            loss = loss / num_items_in_batch
        elif units:
            self.add("loss", loss.detach(), units)
        return (loss, {}) if return_outputs else loss

    def objective_loss(
        self, model: nn.Module, inputs: dict[str, Any], reduction: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch; of several ranks such that the mean over them is the sum, or mean, over all."""
        given = {name: inputs[name] for name in BESIDE if name in inputs}
        batch = {name: value for name, value in inputs.items() if name not in BESIDE}
        ref: Any = None
        if self.spec.ref is not None and "ref_logp" in given:
            ref = reference_of(inputs) if "ref_log_odds" in given else given["ref_logp"]
        elif self.spec.ref is not None:
            ref = self.reference(model, batch)
        options = dict(self.options)
        if self.spec.rewards:
            options["rewards"] = given.get("rewards")
        elif self.spec.unit == "group" and "rewards" in given:
            options["group_size"] = given["rewards"].shape[1]
        for mean in self.running_means.values():
            mean.train(torch.is_grad_enabled())
        return loss_of(
            model,
            batch,
            self.objective,
            label=given.get("label") if self.spec.label else None,
            ref=ref,
            reduction=reduction,
            return_metrics=True,
            **options,
        )

    def reference(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """What `rgpb.hf.loss` takes as `ref` where the batch has no reference scores."""
        return self.ref

    def weights_of(self, inputs: dict[str, Any], units: int) -> dict[str, Any]:
        """How much a batch's metrics count in averages over batches, by the last part of their names; else `units`."""
        there, kind = present_of(inputs), self.spec.unit
        if self.spec.label:
            good = inputs["label"] > 0
        elif kind == "pair":
            good = torch.arange(len(there), device=there.device) < units
        else:
            good = torch.ones_like(there)
        if kind == "group":
            chosen = there.view(units, -1).any(1).sum()
            return {"chosen": chosen, "perplexity": chosen, "rejected": there.sum() - chosen} | {
                "accuracies": there.sum() - chosen
            }
        chosen, rejected = (good & there).sum(), (~good & there).sum()
        return {"chosen": chosen, "perplexity": chosen, "rejected": rejected}

    def add(self, name: str, value: Tensor | float, weight: float | Tensor) -> None:
        """Into the averages of the next log; a batch without such responses (nan) counts for nothing."""
        value = torch.as_tensor(value).double()
        missing = value.isnan() & (name != "loss")
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + torch.where(missing, 0.0, weight * value)
        entry[1] = entry[1] + torch.where(missing, 0.0, weight)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks."""
        if self.args.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def whole_sums(self) -> dict[str, list[float]]:
        """The sums since the last log, of all ranks."""
        whole: dict[str, list[float]] = {}
        for sums in self.gather({name: [float(x) for x in entry] for name, entry in self._sums.items()}):
            for name, (total, weight) in sums.items():
                entry = whole.setdefault(name, [0.0, 0.0])
                whole[name] = [entry[0] + total, entry[1] + weight]
        return whole

    def averages(self) -> dict[str, float]:
        """Of all ranks since the last call."""
        sums, self._sums = self.whole_sums(), {}
        return with_differences({name: total / weight for name, (total, weight) in sums.items() if weight})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs; with a training loss also the metrics since the last one."""
        if "loss" in logs:
            logs.update(self.averages())
        super().log(logs, start_time)

    @property
    def running_means(self) -> dict[str, RunningMean]:
        """The options that the batches change."""
        return {name: option for name, option in self.options.items() if isinstance(option, RunningMean)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.running_means and self.args.should_save:
            states = {name: mean.state_dict() for name, mean in self.running_means.items()}
            torch.save(states, os.path.join(output_dir, RUNNING))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.running_means:
            return
        path = os.path.join(checkpoint, RUNNING)
        states = torch.load(path, weights_only=True) if os.path.exists(path) else {}
        for name, mean in self.running_means.items():
            if name not in states:
                raise ValueError(f"options: expected the running mean {name} in {path}, got {sorted(states)}")
            mean.load_state_dict(states[name])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The mean loss of a batch; there are no logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Trainer's, with the loss and the metrics as means over all units."""
        kept, self._sums = self._sums, {}
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            assert output.metrics is not None
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.averages().items()})
        finally:
            self._sums = kept
        return output

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """All columns stay: what the collator needs isn't what the model's forward takes."""
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator
