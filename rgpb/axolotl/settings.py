"""The keys that the plug-in adds to axolotl's configuration, and their check. Nothing here needs axolotl."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator

from rgpb.objectives import check_options, resolve

TRAINERS = {"dpo": "DPOTrainer", "kto": "KTOTrainer"}  # by axolotl's `rl`
# What belongs to axolotl's own losses, or would cut sequences apart.
OTHERS = (
    "rl_beta", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing", "dpo_use_weighting", "dpo_ld_alpha",
    "dpo_padding_free", "dpo_use_liger_kernel", "kto_desirable_weight", "kto_undesirable_weight",
)  # fmt: skip
BESIDE = ("grad_tolerance", "impl", "temperature", "tolerance_per", "workspace")  # options of every loss


class RgpbArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration.

    Attributes:
        rgpb_objective: a loss by name, or a weighted sum of several.
        rgpb_options: the loss's options, and `grad_tolerance`, `impl`, `temperature`, `tolerance_per`, `workspace`.

    Raises:
        ValueError: an unknown loss or option, one that `rl` has no data for, or a setting of axolotl's own losses.
    """

    rgpb_objective: str | dict[str, float] | None = None
    rgpb_options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        """Before anything is loaded."""
        if data.get("rgpb_objective") is None:
            if data.get("rgpb_options"):
                raise ValueError("rgpb_objective: expected a loss beside rgpb_options, got none")
            return data
        spec, rl = resolve(data["rgpb_objective"]), data.get("rl")
        if rl not in TRAINERS:
            raise ValueError(f"rl: expected dpo or kto beside rgpb_objective, got {rl}")
        if spec.unit == "group" or (rl == "kto" and spec.unit == "pair"):
            wanted = "pairs or single responses" if rl == "dpo" else "single responses"
            raise ValueError(f"rgpb_objective: expected a loss of {wanted} with rl: {rl}, got {spec.name}")
        if spec.unit == "response" and not all(part.label for part, _ in spec.parts or ((spec, 1.0),)):
            raise ValueError(f"rgpb_objective: expected a loss that tells good from bad responses, got {spec.name}")
        for name in OTHERS:
            if data.get(name):
                raise ValueError(f"{name}: expected none beside rgpb_objective, got {data[name]}; see rgpb_options")
        if (data.get("context_parallel_size") or 1) > 1:
            raise ValueError(f"context_parallel_size: expected 1, got {data['context_parallel_size']}")
        if data.get("precompute_ref_log_probs") and spec.ref == "tokens":
            raise ValueError(f"precompute_ref_log_probs: {spec.name} needs scores of tokens, and TRL keeps sums")
        check_options(spec, {k: v for k, v in (data.get("rgpb_options") or {}).items() if k not in BESIDE})
        return data
