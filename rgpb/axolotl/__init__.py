"""axolotl trains with this package's losses: a plug-in, and the loss in the configuration.

    plugins: [rgpb.axolotl.Plugin]
    rl: dpo  # pairs; or kto: single responses with a label
    rgpb_objective: bnf  # or a weighted sum, {dpo: 1.0, mle: 0.2}
    rgpb_options: {}  # such as {beta: 0.1}

Data, reference, adapters and loop are axolotl's; loss and metrics are those of `rgpb.hf.loss`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`Plugin`, whose base class is axolotl's: only that needs axolotl."""
    if name != "Plugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rgpb.axolotl.plugin import Plugin

    return Plugin
