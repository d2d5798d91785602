"""What axolotl loads: it adds the configuration's keys, and names the trainer."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from rgpb.axolotl.settings import TRAINERS


class Plugin(BasePlugin):
    """`plugins: [rgpb.axolotl.Plugin]`."""

    def get_input_args(self) -> str:
        """The class of the keys, by name."""
        return "rgpb.axolotl.settings.RgpbArgs"

    def register(self, cfg: Any) -> None:
        """Names the trainer of a configuration that lists the plug-in, before it is checked.

        Through `trainer_cls`, not `get_trainer_cls`: to a class from there axolotl's builder of RL trainers gives no
        model.
        """
        if not any(str(name).startswith("rgpb.axolotl") for name in cfg.get("plugins") or []):
            return
        if cfg.get("rgpb_objective") is None:
            raise ValueError(
                "rgpb_objective: expected a loss, such as bnf or dpo, beside rgpb.axolotl.Plugin; got none"
            )
        given = cfg.get("trainer_cls")
        if given and not given.startswith("rgpb.axolotl."):
            raise ValueError(f"trainer_cls: expected none beside rgpb.axolotl.Plugin, got {given}")
        cfg["trainer_cls"] = f"rgpb.axolotl.trainers.{TRAINERS.get(cfg.get('rl'), 'DPOTrainer')}"
