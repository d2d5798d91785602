"""The LM head as one value: everything that turns a hidden state into logits.

Dimensions: V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rgpb.parallel import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# As configs call them: Gemma, RecurrentGemma, xLSTM; Cohere, Falcon-H1, Muse; Granite and MiniCPM-3, Inkling.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# d_model^-½ where the embeddings are tied; the last three say so by `scale_decoder_outputs` in transformers 5
_TIED_SCALE = ("umt5", "switch_transformers", "udop", "t5", "longt5", "pop2piano")


class Quantised(NamedTuple):
    """How a quantised weight is held, beside its codes.

    Attributes:
        format: of `rgpb.engine.stored.FORMATS`.
        dtype: what the products take, as if the weight were of it.
        width: H.
        scales: [V, groups of a row].
        zeros: [V, groups] or None; the table of values [16] where the format has one.
        rounded: what the values are rounded to before that, where the layer itself does so.
    """

    format: str
    dtype: torch.dtype
    width: int
    scales: Tensor
    zeros: Tensor | None = None
    rounded: torch.dtype | None = None

    @property
    def named(self) -> tuple[str, str, str]:
        """Format, dtype and what values are rounded to, by name."""
        dtype, rounded = ("" if x is None else str(x).removeprefix("torch.") for x in (self.dtype, self.rounded))
        return self.format, dtype, rounded


class HeadWeight(NamedTuple):
    """A weight [W, more] that isn't one tensor of floats: columns beside W, or W quantised.

    It goes with hidden states of H + r columns. Slices of it are put together when they are multiplied; it never exists
    as a whole, and neither does a gradient of what is frozen.

    Attributes:
        base: W [V, H] in floats, or its codes [V, …] where it is quantised.
        more: [V, r] in W's dtype, or None.
        quantised: how the codes are read, or None.
    """

    base: Tensor
    more: Tensor | None = None
    quantised: Quantised | None = None

    @property
    def width(self) -> int:
        """H, without the columns of `more`."""
        return self.base.shape[1] if self.quantised is None else self.quantised.width

    @property
    def shape(self) -> torch.Size:
        """[V, H + r]."""
        return torch.Size((self.base.shape[0], self.width + (0 if self.more is None else self.more.shape[1])))

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype if self.quantised is None else self.quantised.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def requires_grad(self) -> bool:
        """Whether any of it does."""
        return self.trained > 0

    @property
    def trained(self) -> int:
        """Columns that ask for a gradient."""
        more = 0 if self.more is None or not self.more.requires_grad else self.more.shape[1]
        return more + (self.width if self.base.requires_grad else 0)


class LMHead(NamedTuple):
    """z = scale · (W x + bias), then z ← softcap · tanh(z / softcap) where a soft-cap is set.

    Args:
        weight: [V, H], float64, float32, bfloat16 or float16; or a `HeadWeight`.
        bias: [V] in the dtype of `weight`, or None.
        softcap: final logit soft-cap (Gemma-2: 30.0), a positive number, or None.
        scale: multiplier of the logits before the soft-cap (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`,
            T5's d_model^-½ where the embeddings are tied).
        shard: where the ranks of a group hold the rows of the head together, which of them are this rank's
            (`rgpb.parallel.VocabShard`); `weight` and `bias` are then those rows. All ranks of the group have the same
            hidden states and targets.
    """

    weight: Any
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    shard: VocabShard | None = None

    @classmethod
    def from_model(cls, model: nn.Module) -> LMHead:
        """A transformers model's head, as `read_head` reads it. The weight is the parameter itself.

        Raises:
            ValueError: the head is missing, wrapped (LoRA), quantised, sharded or not on a real device.
        """
        return read_head(model)


def as_head(head: Tensor | LMHead) -> LMHead:
    """A bare weight [V, H] is a head without bias, soft-cap or scale."""
    if isinstance(head, LMHead | Tensor):
        return head if isinstance(head, LMHead) else LMHead(head)
    raise ValueError(f"head: expected a weight [V, H] or an LMHead, got {type(head).__name__}")


def read_head(model: nn.Module) -> LMHead:
    """Weight, bias, soft-cap and scale of a transformers model's head; the same as `LMHead.from_model`.

    The weight is the model's parameter itself, so gradients reach it, tied or not. Soft-cap and scale come
    from the config, by the names that the families in transformers use. A family with a name of its own for
    them, or with a head that does something else besides, passes here and fails in `check_head`.

    Args:
        model: a transformers model with a plain linear LM head, or a PEFT model around one.

    Raises:
        ValueError: the head is missing, wrapped (LoRA), quantised, sharded or not on a real device; or soft-cap or
            scale are those of a text model inside another model, which may ignore them.
    """
    model = unwrap(model)
    linear, name = model.get_output_embeddings(), described(model)
    # A subclass of Linear or of Parameter means an adapted, quantised or sharded head: its weight is not W.
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        found, weight = f"{type(linear).__module__}.{described(linear)}", getattr(linear, "weight", None)
        held = "" if weight is None else f" with a weight of type {type(weight).__name__}"
        raise ValueError(f"model: expected a plain nn.Linear as head of {name}, got {found}{held}")
    weight, bias = linear.weight, linear.bias
    if weight.dtype not in FLOATS or weight.dim() != 2 or weight.is_meta:
        found = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"model: expected a float weight [V, H] on a device as head of {name}, got {found}")
    final = getattr(model, "final_logits_bias", None)  # BART and its relatives: a buffer [1, V]
    if final is not None:
        final = final.to(weight).view(-1)
        bias = final if bias is None else bias + final
    scaling, config = declared_scaling(model), model.config
    if scaling != (None, 1.0) and config.get_text_config() is not config and not config.is_encoder_decoder:
        raise ValueError(
            f"model: expected soft-cap and scale in the config of {name} itself, got them in that of its text model, "
            "which may ignore them inside another; rgpb.hf.read_head(model) finds out"
        )
    return LMHead(weight, bias, *scaling)


def declared_scaling(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft-cap and scale as the config of a model, or of its text model, has them."""
    config = model.config.get_text_config()
    caps = (getattr(config, attribute, None) for attribute in _SOFTCAPS)
    return next((cap for cap in caps if cap is not None), None), _scale(config)


def _scale(config: Any) -> float:
    """What multiplies x or W x. Before or after makes no difference: where it is x, the head has no bias."""
    family = config.model_type
    if getattr(config, "scale_decoder_outputs", family in _TIED_SCALE and config.tie_word_embeddings):
        return config.d_model**-0.5
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        factor = getattr(config, name, None)
        if factor is not None and family != "mpt":  # whose `logit_scale` is in the config and nowhere else
            scale *= 1 / factor if name in _DIVISORS and family != "hyperclovax" else factor
    return scale


def unwrap(model: nn.Module, argument: str = "model") -> PreTrainedModel:
    """The transformers model itself. PEFT's adapters live inside its modules, save for prompt learning.

    Raises:
        ValueError: no transformers model, one in a wrapper that isn't PEFT's, or PEFT's prompt learning.
    """
    wrapper: Any = model
    inner: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{argument}: expected adapters inside the model, got PEFT's prompt learning")
    # by name, so that `import rgpb` doesn't import transformers
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(inner).__mro__}
    if "transformers.PreTrainedModel" not in bases:
        raise ValueError(
            f"{argument}: expected a bare transformers PreTrainedModel, got {described(inner)} "
            "(compile the training step or the backbone, not the model; take it out of DDP or FSDP)"
        )
    return inner


def described(thing: object) -> str:
    """Class and, where it has one, family, for messages."""
    family = getattr(getattr(thing, "config", None), "model_type", None)
    return type(thing).__name__ if family is None else f"{type(thing).__name__} (family {family})"
