"""LoRA on the head, too: the head's weight is never copied and has no gradient; its adapter has one.

The loop is that of `lora_frozen_head.py`; only the modules that get adapters are others."""

from common import arguments
from lora_frozen_head import main

if __name__ == "__main__":
    losses, model = main(arguments(rank=8, lr=1e-2), targets=["q_proj", "v_proj", "lm_head"])
    print(f"DPO: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
