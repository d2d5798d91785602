"""TRL's GRPO trainer with an objective of groups as its loss: K completions of a prompt, and their rewards.

    prompts ──TRL samples──▶ K completions each ──TRL's reward functions──▶ groups, the best first ──objective──▶ steps

Dimensions: B completions of a process, G = B / K groups, K completions of a prompt, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from rgpb.hf.attach import install
from rgpb.hf.batches import IGNORE, reference_of
from rgpb.hf.checks import evaluating, try_left_padding
from rgpb.hf.forward import loss as loss_of
from rgpb.hf.forward import token_scores
from rgpb.hf.models import attach
from rgpb.hf.wrappers import base_of, check_adapters
from rgpb.layout import Responses
from rgpb.objectives import OBJECTIVES, Objective, check_options, resolve
from rgpb.objectives.registry import RESERVED
from rgpb.trl.preference import adapter_of

# Settings that only TRL's own losses read; advantages and ratios of probabilities are in no objective
UNREAD = {
    "cast_lm_head_to_fp32", "delta", "entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min",
    "entropy_target", "epsilon", "epsilon_high", "importance_sampling_level", "label_smoothing_factor", "loss_type",
    "multi_objective_aggregation", "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos",
    "scale_rewards", "top_entropy_quantile", "use_adaptive_entropy", "use_bias_correction_kl",
    "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_mode",
}  # fmt: skip
# Arguments of `rgpb.hf.loss` that this trainer gives
GIVEN = {
    "cu_seqlens", "data_group", "group_size", "label", "objective", "ref", "return_metrics", "reduction", "rewards",
    "scores", "sequence_group", "temperature",
}  # fmt: skip


class GroupTrainer(GRPOTrainer):
    """A `GRPOTrainer` whose loss is an objective of groups: SWEPO, InfoNCA, NCA, MC-PO, several DPO pairs, your own.

    Sampling, tools, vLLM, reward functions, their logs and evaluation are TRL's. The loss is the mean over the groups
    of a step, over all of its batches and processes. It runs inside the model's forward (`rgpb.hf.loss`), at the
    temperature that completions are sampled at, with a log of its own metrics beside TRL's.

    A group stays together: where TRL shuffles completions between the steps of one generation, here whole groups are.
    In a group the completion with the highest reward comes first, as `mc_po` and `rnce` need it. Those that are as good
    leave a group whose objective reads no rewards. Rewards are the weighted sums of what the functions return, not
    normalised. A completion takes no part in its group where no function has a reward for it, or where
    `mask_truncated_completions` masks it. Tokens of tools don't count.

    The reference is TRL's: the model as it is on disk; with `peft_config` the model without its adapters; of a
    PeftModel, a copy of its adapters. It is scored once for each completion, in evaluation mode. `num_iterations` above
    1 trains on the same completions again, without ratios of probabilities.

    Args:
        model: as `GRPOTrainer` takes it.
        reward_funcs: as `GRPOTrainer` takes them; None where the environment gives the rewards.
        args: with `beta`, the β of an objective that has a reference; and whole groups in a batch:
            `per_device_train_batch_size` a multiple of `num_generations`. Default: `GRPOConfig`'s, for an objective
            without a reference.
        objective: a name, or a weighted sum; of groups.
        options: further options of the objective, and arguments of `rgpb.hf.loss` such as `workspace`.
        **keywords: `GRPOTrainer`'s own.

    Raises:
        ValueError: an objective that isn't of groups, an option that it doesn't have, a batch that would cut groups, or
            a setting that has no meaning for an objective.
    """

    _tag_names = ["trl", "rgpb"]  # noqa: RUF012
    _name = "rgpb's GroupTrainer"
    _paper = {}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        *,
        objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "swepo",
        options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        spec, given = resolve(objective), dict(options or {})
        if args is None:
            name: str = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        _check_settings(spec, args)
        _check_objective(spec, given, args)
        if spec.ref is not None and "beta" in (spec.options or {}):
            given["beta"] = args.beta
        if spec.ref is not None:
            check_adapters([*getattr(model, "peft_config", {}).values(), keywords.get("peft_config")], "model")
        self.objective: Any = objective
        self.spec, self.options = spec, given
        super().__init__(model, reward_funcs, args, **keywords)
        policy: Any = self.model
        base = base_of(attach(policy))
        self.counts_padding = not try_left_padding(base, install(base))  # as positions, where none are given
        vars(base)["router_aux_loss_coef"] = self.router_aux_loss_coef  # not in the model's config, which is saved
        self._rewards: Tensor = torch.empty(0)

    @property
    def ref_model(self) -> Any:
        """TRL's; attached before TRL wraps it, since its head is checked while it is whole and in its own precision."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        if model is not None and "_rgpb" not in vars(base_of(model, "ref_model")):
            attach(model)
        self._ref_model = model

    def _mode(self) -> tuple[str, int]:
        """As TRL tells it: "train" or "eval"; and K."""
        policy: Any = self.model
        sizes: Any = {"train": self.num_generations, "eval": self.num_generations_eval}
        mode = "train" if policy.training else "eval"
        return mode, sizes[mode]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's [B of all processes, functions]; keeps their weighted sums, NaN where no function has a reward."""
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        sums = (found * self.reward_weights.to(found.device)).nansum(1)
        self._rewards = sums.masked_fill(found.isnan().all(1), torch.nan)
        return found

    def _get_per_token_logps_and_entropies(self, *args: Any, **keywords: Any) -> tuple[None, None, None]:
        """Nothing: ratios need the old policy, objectives don't, and their reference is scored on this engine."""
        return None, None, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Groups, so that what TRL shuffles and splits are groups: [G, K, T], and `rewards` [G, K]."""
        mode, size = self._mode()
        if len(inputs) % size:
            raise ValueError(
                f"per_device_{mode}_batch_size: expected a multiple of the {size} completions of a prompt, got a batch "
                f"of {len(inputs)}"
            )
        made = super()._generate_and_score_completions(inputs)
        if "pixel_values" in made:
            raise ValueError("train_dataset: expected prompts of text, got images")
        prompt, mask, completion = made["prompt_ids"], made["prompt_mask"], made["completion_ids"]
        counts = made["completion_mask"].bool()
        if "tool_mask" in made:
            counts = counts & made["tool_mask"].bool()
        first = self.accelerator.process_index * len(inputs)
        rewards = self._rewards[first : first + len(inputs)]
        there = counts.any(1) & ~rewards.isnan()
        rewards = rewards.masked_fill(~there, -torch.inf).view(-1, size)
        rewards, order = rewards.sort(dim=1, descending=True, stable=True)
        there = there.view(-1, size).gather(1, order)
        if not self.spec.rewards:  # nothing else says which of several best ones is better
            there[:, 1:] &= rewards[:, 1:] < rewards[:, :1]
        rows = (order + size * torch.arange(len(order), device=order.device)[:, None]).view(-1)
        labels = completion.masked_fill(~counts, IGNORE)[rows].masked_fill(~there.view(-1, 1), IGNORE)
        batch = {
            "input_ids": torch.cat([prompt, completion], 1)[rows],
            "attention_mask": torch.cat([mask, made["completion_mask"]], 1)[rows],
            "labels": torch.cat([torch.full_like(prompt, IGNORE), labels], 1),
        }
        if self.counts_padding:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.spec.ref is not None:
            batch |= self._reference(batch, getattr(self.args, f"per_device_{mode}_batch_size"))
        grouped = {name: x.view(-1, size, x.shape[1]) for name, x in batch.items()}
        return grouped | {"rewards": rewards.masked_fill(~there, 0.0)}

    def _reference(self, batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """Scores under the reference, as `rgpb.hf.batches.reference_of` reads them. [B, T]"""
        reference: Any = self.ref_model
        adapters: Any = nullcontext()
        if reference is None:
            policy: Any = self.accelerator.unwrap_model(self.model)
            reference = self.model_wrapped
            adapters = adapter_of(policy, "ref" if "ref" in policy.peft_config else None)
        with evaluating(reference), adapters, self.accelerator.autocast():
            parts = [
                token_scores(reference, {n: x[at : at + size] for n, x in batch.items()}, temperature=self.temperature)
                for at in range(0, len(batch["labels"]), size)
            ]
        return {f"ref_{name}": torch.cat([getattr(part, name) for part in parts]) for name in ("logp", "log_odds")}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The mean over a batch's groups; in training its part of the mean over the batches of a step."""
        batch: dict[str, Any] = {name: x.flatten(0, 1) for name, x in inputs.items() if name != "rewards"}
        rewards, ref = inputs["rewards"], reference_of(batch)
        how: dict[str, Any] = {"rewards": rewards} if self.spec.rewards else {"group_size": rewards.shape[1]}
        batch = {name: x for name, x in batch.items() if not name.startswith("ref_")}
        if self.aux_loss_enabled:
            batch["output_router_logits"] = True
        loss, metrics = loss_of(
            model, batch, self.objective, ref=ref, temperature=self.temperature, return_metrics=True, **how,
            **self.options,
        )  # fmt: skip
        metrics = {name: value for name, value in metrics.items() if not value.dim()}  # not what each token skipped
        mode, _ = self._mode()
        if mode == "eval":  # TRL's own mean of losses takes fewer of the last batch
            metrics["loss"] = loss
            metrics = {name: self.accelerator.gather(value).nanmean() for name, value in metrics.items()}
        for name, value in metrics.items():
            self._metrics[mode][name] += [value.item()] * len(rewards)  # batches count by their groups
        return loss / self.current_gradient_accumulation_steps if mode == "train" else loss


def _check_objective(spec: Objective, options: dict[str, Any], args: GRPOConfig) -> None:
    """Refuse what isn't of groups, options that it doesn't have, and a β in the wrong place."""
    if spec.unit != "group":
        known = sorted(name for name, other in OBJECTIVES.items() if other.unit == "group")
        raise ValueError(
            f"objective: expected one of groups, {', '.join(known)}, or your own with "
            f"@rgpb.objective(couples='group'); got {spec.name}, of {spec.unit}s"
        )
    taken = [name for name in options if name in GIVEN or (name == "beta" and spec.ref is not None)]
    if taken:
        where = {"beta": "GRPOConfig(beta=…)", "temperature": "GRPOConfig(temperature=…)"}
        instead = where.get(taken[0], "the trainer gives it")
        raise ValueError(f"options: expected no {taken[0]}, got {options[taken[0]]!r}; {instead}")
    check_options(spec, {name: value for name, value in options.items() if name not in RESERVED})
    if spec.ref is not None and not args.beta > 0:
        raise ValueError(
            f"beta: expected the β of {spec.name}, above 0, with which TRL also loads the reference: "
            f"args=GRPOConfig(…, beta=0.1); got {args.beta!r}"
        )
    if spec.ref is None and args.beta:
        raise ValueError(
            f"beta: expected 0, since {spec.name} has no reference, got {args.beta!r}; its own β goes into options"
        )


def _check_settings(spec: Objective, args: GRPOConfig) -> None:
    """Refuse what would have no effect, or would cut groups."""
    if args.loss_type in OBJECTIVES:
        raise ValueError(
            f"loss_type: expected TRL's default, got {args.loss_type!r}; the objective is an argument of the trainer: "
            f"GroupTrainer(…, objective={args.loss_type!r})"
        )
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in UNREAD and value != field.default:
            raise ValueError(
                f"{field.name}: expected {field.default!r}, since {spec.name} has no use for it, got {value!r}"
            )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            f"vllm_importance_sampling_correction: expected False beside use_vllm, since {spec.name} has no ratio to "
            "correct, got True"
        )
    size: Any = args.num_generations
    if args.per_device_train_batch_size % size:
        raise ValueError(
            f"per_device_train_batch_size: expected a multiple of num_generations, {size}, since a "
            f"group has one loss, got {args.per_device_train_batch_size}; raise it, and divide "
            "gradient_accumulation_steps"
        )
