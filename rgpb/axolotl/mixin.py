"""A mixin for the trainers of the TRL that axolotl pins, whose fused head `rgpb.trl` doesn't know. Nothing here needs
axolotl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from rgpb.hf import PreferenceMixin
from rgpb.hf.batches import from_trl
from rgpb.layout import Responses


class TRLMixin(PreferenceMixin):
    """`PreferenceMixin` in front of TRL's DPOTrainer or KTOTrainer: their data and their reference, any loss.

    The reference is the trainer's: its `ref_model`, else the model without its adapters, else what it precomputed.

    Args:
        *args: the trainer's own.
        objective, options: as for `PreferenceMixin`.
        **keywords: the trainer's own.

    Raises:
        ValueError: an adapter that the trainer keeps a copy of as the reference.
    """

    def __init__(
        self, *args: Any, objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "bnf",
        options: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, objective=objective, options=options, **keywords)
        adapters = getattr(self.model, "peft_config", {})
        if "ref" in adapters:
            raise ValueError(
                "model: expected one without adapters, beside peft_config; got a PEFT model, of whose adapter TRL "
                "keeps a copy as the reference; merge it into the model first"
            )
        if self.spec.ref is None:
            self.ref_model = None  # TRL makes one for every loss
        elif self.ref_model is not None:
            self.ref = self.ref_model
        elif adapters:
            self.ref = "base"
        stored = bool(getattr(self.args, "precompute_ref_log_probs", False))
        self.data_collator = partial(_translated, self.data_collator, stored)


def _translated(collate: Callable[[list[Any]], Mapping[str, Any]], stored: bool, rows: list[Any]) -> dict[str, Any]:
    """A batch of TRL's collator; sums of a reference that the dataset has count only where they are asked for."""
    batch = from_trl(collate(rows))
    return batch if stored else {name: x for name, x in batch.items() if name != "ref_logp"}
