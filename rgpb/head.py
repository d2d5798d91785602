"""The LM head as one value: everything that turns a hidden state into logits.

Dimensions: V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class LMHead(NamedTuple):
    """z = scale · (W x + bias), then z ← softcap · tanh(z / softcap) where a soft-cap is set.

    Args:
        weight: [V, H], float64, float32, bfloat16 or float16.
        bias: [V] in the dtype of `weight`, or None.
        softcap: final logit soft-cap (Gemma-2: 30.0), a positive number, or None.
        scale: multiplier of the logits before the soft-cap (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`,
            T5's d_model^-½ where the embeddings are tied).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def from_model(cls, model: nn.Module) -> LMHead:
        """A transformers model's head, as `rgpb.hf.read_head` reads it. The weight is the parameter itself.

        Raises:
            ValueError: the head is missing, wrapped (LoRA), quantised, sharded or not on a real device.
        """
        from rgpb.hf import read_head  # here, so that `import rgpb` doesn't import transformers

        return read_head(model)


def as_head(head: Tensor | LMHead) -> LMHead:
    """A bare weight [V, H] is a head without bias, soft-cap or scale."""
    if isinstance(head, LMHead | Tensor):
        return head if isinstance(head, LMHead) else LMHead(head)
    raise ValueError(f"head: expected a weight [V, H] or an LMHead, got {type(head).__name__}")
