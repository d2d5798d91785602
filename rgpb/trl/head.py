"""TRL's fused head on this library's engine, for any trainer that has one: DPO, KTO, SFT, GRPO, RLOO.

`trl.trainer.utils.add_fused_lm_head` calls one function for each batch's log-probabilities and their statistics. That
function is replaced, and nothing else of TRL: losses, metrics, data and references are its own.

Dimensions: N positions with a label, H hidden size, V vocabulary, S a slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.trainer import utils

from rgpb.head import LMHead
from rgpb.logprob import linear_logprob

# Bytes of a slice of logits, where a statistic needs all of them: the largest one, or the mean of soft-capped ones.
SLICE_BYTES = 64 * 2**20

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LogProbs:
    """What stands in for TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, chunk: int,
        softcap: float | None = None, scale: float = 1.0, outputs: tuple[str, ...] = (),
    ) -> Outputs:  # fmt: skip
        """Statistics of each target under softmax(softcap(scale · (h Wᵀ + b)) / temperature).

        Args:
            hidden: [N, H].
            weight, bias: [V, H], and [V] or None.
            target: int64 [N].
            chunk: TRL's; the engine chooses its own.
            outputs: of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", those that are wanted.

        Returns:
            float32 [N], or None where it isn't wanted: log p; entropy, as differentiable as log p; log Σ p²; the mean
            logit; and bool [N], whether the target is the most probable token, of equals the first.

        Raises:
            ValueError: a head that ZeRO-3 holds in parts, or one that TRL has gathered from FSDP2's parts.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "model: expected a head that is whole in the backward, got one that ZeRO-3 holds in parts; use "
                "rgpb.hf.loss, which runs inside the model's forward"
            )
        if type(weight.grad_fn).__name__ == "_ToTorchTensorBackward":
            raise ValueError(
                "model: expected a head that FSDP2 holds whole in the forward, got one that TRL gathers: its gradient "
                "would be of this rank's batch alone; leave the head to the outermost unit, or to that of the last norm"
            )
        if not torch.is_autocast_enabled(hidden.device.type) and weight.dtype != hidden.dtype:
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        head = LMHead(weight, bias, softcap, scale)
        found = linear_logprob(hidden, head, target, temperature=temperature, entropy="entropy" in outputs)
        squares = mean = top = None
        with torch.no_grad():
            states = hidden.detach()
            if "log_sum_sq_probs" in outputs:  # Σ p² = Σ exp(2z) / (Σ exp(z))²
                twice = linear_logprob(states, head, target, temperature=temperature / 2)
                squares = twice.lse - 2 * found.lse
            with torch.autocast(hidden.device.type, enabled=False):
                if "mean_logits" in outputs:
                    mean = _mean(states, head) / temperature
                if "is_top1" in outputs:
                    top = _is_top(states, head, target, found.log_odds)
        return found.logp, found.entropy, squares, mean, top


def _slices(states: Tensor, head: LMHead) -> Iterator[tuple[int, Tensor]]:
    """First token and logits [N, S] of each slice of the vocabulary, in float32, before any temperature."""
    weight: Any = head.weight
    step = max(1, SLICE_BYTES // (4 * max(1, len(states), weight.shape[1])))
    states = states.float()
    for start in range(0, len(weight), step):
        logits = states @ weight[start : start + step].float().T
        if head.bias is not None:
            logits += head.bias[start : start + step].float()
        logits *= head.scale
        yield start, logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _mean(states: Tensor, head: LMHead) -> Tensor:
    """Of the logits of each row. [N]"""
    weight: Any = head.weight
    if head.softcap is not None:
        total = torch.zeros(len(states), device=states.device)
        for _, logits in _slices(states, head):
            total += logits.sum(1)
        return total / len(weight)
    mean = states.float() @ weight.mean(0, dtype=torch.float32)
    return head.scale * (mean if head.bias is None else mean + head.bias.mean(dtype=torch.float32))


def _is_top(states: Tensor, head: LMHead, target: Tensor, log_odds: Tensor) -> Tensor:
    """Whether no token is more probable than the target, and none before it as probable. [N]"""
    top = log_odds > 0  # more than all others together
    open_ = (~top).nonzero().squeeze(1)
    if not len(open_):
        return top
    states, target = states[open_], target[open_]
    own = torch.empty(len(open_), device=states.device)
    before, after = torch.full_like(own, -torch.inf), torch.full_like(own, -torch.inf)
    for start, logits in _slices(states, head):
        at = target - start
        inside = (at >= 0) & (at < logits.shape[1])
        own[inside] = logits[inside].gather(1, at[inside, None]).squeeze(1)
        is_before = torch.arange(logits.shape[1], device=at.device) < at[:, None]
        before = torch.maximum(before, logits.masked_fill(~is_before, -torch.inf).amax(1))
        after = torch.maximum(after, logits.amax(1))
    top[open_] = (own > before) & (own >= after)
    return top


class accelerate:
    """Run the fused head of TRL's trainers on this library's engine, from now on.

    A plain call, or a context: `undo()`, or leaving the context, puts back what was there, once no other call is in
    force. It changes `trl.trainer.utils` for the whole process, whenever the trainers were made. Only positions with a
    label are scored, on a CPU, too, where TRL scores all.

    Logits are float32, where TRL rounds them to the hidden states' type. `entropy` and `log_sum_sq_probs` are sums over
    the whole vocabulary, as TRL's. `is_top1` costs a sweep over the logits of those targets that have at most half of
    the probability; `log_sum_sq_probs` one of all; the mean of soft-capped logits, one of all. What a trainer doesn't
    ask for costs nothing. Where the head's type isn't that of the hidden states (`cast_lm_head_to_fp32`), and nothing
    casts both, the whole weight is copied into theirs.

    >>> patched = accelerate()
    >>> patched.undo()
    """

    _before: ClassVar[dict[str, Any]] = {}
    _active: ClassVar[int] = 0

    def __init__(self) -> None:
        if not accelerate._active:
            self._before.update((name, getattr(utils, name)) for name in _PARTS)
            for name, part in _PARTS.items():
                setattr(utils, name, part)
        accelerate._active += 1
        self._undone = False

    def undo(self) -> None:
        """End this call's part, a second time nothing. The last one puts back what was there before the first."""
        if self._undone:
            return
        self._undone = True
        accelerate._active -= 1
        if not accelerate._active:
            for name, part in self._before.items():
                setattr(utils, name, part)

    def __enter__(self) -> accelerate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


# By name in `trl.trainer.utils`: the function; and whether positions without a label are left out.
_PARTS = {"_ChunkedLogProbFunction": LogProbs, "_use_triton": lambda device: True}
