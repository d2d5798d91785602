"""axolotl's trainers with the loss of the configuration; imported late, since axolotl patches what they use."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.core.trainers.trl import AxolotlKTOTrainer
from axolotl.integrations.base import PluginManager

from rgpb.axolotl.mixin import TRLMixin


def settings() -> dict[str, Any]:
    """Of the configuration that is in force: what `TRLMixin` takes."""
    cfg = PluginManager.get_instance().cfg
    objective = cfg.rgpb_objective
    return {
        "objective": objective if isinstance(objective, str) else dict(objective),
        "options": dict(cfg.rgpb_options or {}),
    }


class DPOTrainer(TRLMixin, AxolotlDPOTrainer):
    """Pairs."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **settings(), **keywords)


class KTOTrainer(TRLMixin, AxolotlKTOTrainer):
    """Single responses with a label."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **settings(), **keywords)
