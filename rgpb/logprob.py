"""`linear_logprob`: hidden states and an LM head → per-token scores, without the logits.

The operator `rgpb::score` returns (z_y, lse_other, H_o); all of TokenScores is elementwise in these three, so its
gradient is autograd's. Its backward turns upstream gradients of the three into those of hidden, weight and bias.

Dimensions: P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgpb.engine import chunked
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.head import LMHead, as_head
from rgpb.kernels.torch_rows import Statistics, Upstream
from rgpb.layout import TokenScores

IMPLEMENTATIONS = ("auto", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    impl: str = "auto",
    workspace: int = DEFAULT_WORKSPACE,
) -> TokenScores:
    """Score each target token under softmax(head(hidden)), without the logits.

    Differentiable in `hidden`, the head's weight and its bias, for any upstream gradient on any of the scores; once: a
    second derivative is refused. Logits are formed and kept in float32 (float64 for float64 input) whatever the inputs'
    type.

    Args:
        hidden: [..., H] float64, float32, bfloat16 or float16; padded [B, T, H] or packed [N, H] alike.
        head: weight [V, H] of the same dtype and device, or an `LMHead`. Under autocast the dtypes may differ.
        target: int64 [...], the token that `hidden` at the same place predicts; or `ignore_index`.
        ignore_index: positions with this target cost nothing and score 0.
        entropy: also fill `entropy` and `other_entropy`.
        impl: "torch", or "auto", which takes the fastest that is available.
        workspace: bytes held at most beyond inputs, gradients and a few numbers per token; default 512 MiB.

    Returns:
        TokenScores of float32 (float64) tensors in the shape of `target`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, a target outside [0, V) other than `ignore_index`,
            hidden states that aren't finite, an unknown `impl`, or a `workspace` too small for one row.

    Source: the log-odds form is this library's; the pull-back is Lemma 4.1 of Tuan & Wang 2024 (arXiv 2408.16751).
    """
    head = check_inputs(hidden, head, target, impl, workspace)
    raw = raw_scores(hidden, head, target, ignore_index, entropy, entropy, workspace)
    return token_scores(*raw, mask=target != ignore_index, entropy=entropy)


def raw_scores(
    hidden: Tensor, head: LMHead, target: Tensor, ignore_index: int, entropy: bool, entropy_grad: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_y, lse_other, H_o) in the shape of `target`; H_o None unless asked for. Inputs are checked already."""
    keep = torch.is_grad_enabled() and hidden.requires_grad and not entropy_grad
    z_y, lse_other, h_o, _ = torch.ops.rgpb.score(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, target.reshape(-1), head.softcap, head.scale,
        ignore_index, entropy, keep, workspace, compute_dtype(hidden),
    )  # fmt: skip
    return z_y.view(target.shape), lse_other.view(target.shape), h_o.view(target.shape) if entropy else None


def token_scores(
    z_y: Tensor, lse_other: Tensor, h_o: Tensor | None, *, mask: Tensor | None, entropy: bool
) -> TokenScores:
    """TokenScores from the three statistics, all of one shape; 0 where `mask` is False."""

    def shown(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0)

    # a token without others is certain, and no logit moves that
    log_odds = torch.where(lse_other == -torch.inf, torch.inf, z_y - lse_other)
    whole = None
    if entropy and h_o is not None:
        bounded = log_odds.clamp(-800, 800)  # beyond, the two-way part is 0 also in float64
        two_way = F.softplus(-bounded) * torch.sigmoid(bounded) + F.softplus(bounded) * torch.sigmoid(-bounded)
        whole = shown(two_way + torch.sigmoid(-log_odds) * h_o)
    return TokenScores(
        logp=shown(F.logsigmoid(log_odds)),
        log_odds=shown(log_odds),
        lse=shown(torch.logaddexp(z_y, lse_other)),
        entropy=whole,
        other_entropy=None if h_o is None else shown(h_o),
    )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The operands' type of the products: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    if hidden.dtype == torch.float64:  # autocast leaves it alone
        return hidden.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def check_inputs(hidden: Tensor, head: Tensor | LMHead, target: Tensor, impl: str, workspace: int) -> LMHead:
    """The door: everything that can be refused from shapes, dtypes and devices alone."""
    head = as_head(head)
    weight, bias = head.weight, head.bias
    for name, given in (("hidden", hidden), ("head.weight", weight), ("target", target)):
        if not isinstance(given, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: expected dtype float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"head.weight: expected shape [V, H] with V, H ≥ 1, got {list(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape [..., H={weight.shape[1]}] to match head.weight, got {list(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target: expected shape {list(hidden.shape[:-1])} (hidden's without H), got {list(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected dtype int64, got {target.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"head.bias: expected shape [V={weight.shape[0]}] and dtype {weight.dtype}, "
            f"got {list(bias.shape)} {bias.dtype}"
        )
    if weight.dtype != hidden.dtype and (
        not torch.is_autocast_enabled(hidden.device.type) or torch.float64 in (weight.dtype, hidden.dtype)
    ):
        raise ValueError(
            f"head.weight: expected the dtype of hidden, {hidden.dtype} (they may differ under autocast), "
            f"got {weight.dtype}"
        )
    for name, tensor in (("head.weight", weight), ("target", target), ("head.bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {tensor.device}")
    if head.softcap is not None and not 0 < head.softcap < 1e30:
        raise ValueError(f"head.softcap: expected a positive number or None, got {head.softcap}")
    if not isinstance(head.scale, float | int) or not abs(head.scale) < 1e30:
        raise ValueError(f"head.scale: expected a finite number, got {head.scale}")
    if not isinstance(workspace, int) or workspace <= 0:
        raise ValueError(f"workspace: expected a positive whole number of bytes, got {workspace}")
    return head


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rgpb::score", mutates_args=())
def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None, scale: float,
    ignore_index: int, entropy: bool, accumulate: bool, workspace: int, compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(z_y, lse_other, H_o, O) of `chunked.score`."""
    problem = chunked.Problem(hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked.score(problem, entropy, accumulate)


@_score.register_fake
def _(hidden, weight, bias, target, softcap, scale, ignore_index, entropy, accumulate, workspace, compute_dtype):  # type: ignore[no-untyped-def]
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    positions, nothing = target.shape, (0,)
    return (
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions if entropy else nothing, dtype=acc),
        torch.empty_like(hidden) if accumulate else hidden.new_empty(nothing),
    )


@torch.library.custom_op("rgpb::finish_hidden_", mutates_args=("accumulated",))
def _finish_hidden_(
    accumulated: Tensor, weight: Tensor, target: Tensor, z_y: Tensor, g_zy: Tensor, g_lo: Tensor,
    softcap: float | None, scale: float, ignore_index: int, workspace: int,
) -> None:  # fmt: skip
    """O → dX in place."""
    problem = chunked.Problem(
        accumulated, weight, None, target, softcap, scale, ignore_index, workspace, accumulated.dtype
    )
    with torch.autocast(weight.device.type, enabled=False):
        chunked.finish_hidden_(problem, accumulated, z_y, g_zy, g_lo)


@torch.library.custom_op("rgpb::pull_back", mutates_args=())
def _pull_back(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_y: Tensor, lse_other: Tensor,
    h_o: Tensor | None, g_zy: Tensor, g_lo: Tensor, g_ho: Tensor | None, softcap: float | None, scale: float,
    ignore_index: int, workspace: int, compute_dtype: torch.dtype, need_hidden: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias from recomputed logits; empty where not needed."""
    problem = chunked.Problem(hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype)
    statistics, upstream = Statistics(z_y, lse_other, h_o), Upstream(g_zy, g_lo, g_ho)
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden = chunked.hidden_gradient(problem, statistics, upstream) if need_hidden else hidden.new_empty(0)
        dweight, dbias = (
            chunked.head_gradient(problem, statistics, upstream, need_weight, need_bias)
            if need_weight or need_bias
            else (None, None)
        )
    return dhidden, weight.new_empty(0) if dweight is None else dweight, weight.new_empty(0) if dbias is None else dbias


@_pull_back.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, z_y, lse_other, h_o, g_zy, g_lo, g_ho, softcap, scale, ignore_index, workspace,
    compute_dtype, need_hidden, need_weight, need_bias,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias else weight.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    z_y, lse_other, h_o, accumulated = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(accumulated)
    # The sum O becomes dX in place, so it is held once and given away; a second backward recomputes.
    ctx.accumulated = [accumulated] if ctx.options[4] else []
    ctx.save_for_backward(hidden, weight, bias, target, z_y, lse_other, h_o)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler records the operations: what was returned must then not change in place."""
    return type(x) not in (Tensor, nn.Parameter)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rgpb: second derivatives are not available (create_graph=True was given); "
            "use rgpb.reference for a dense form that has them"
        )


def _backward(ctx: Any, g_zy: Tensor | None, g_lo: Tensor | None, g_ho: Tensor | None, _: None) -> tuple[Any, ...]:
    refuse_double_backward()
    hidden, weight, bias, target, z_y, lse_other, h_o = ctx.saved_tensors
    softcap, scale, ignore_index, entropy, _, workspace, dtype = ctx.options
    g_zy, g_lo = (torch.zeros_like(z_y) if g is None else g.contiguous() for g in (g_zy, g_lo))
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    dhidden = None
    if need_hidden and g_ho is None and ctx.accumulated:
        dhidden = ctx.accumulated.pop()
        if is_traced(dhidden):
            dhidden = dhidden.clone()
        torch.ops.rgpb.finish_hidden_(dhidden, weight, target, z_y, g_zy, g_lo, softcap, scale, ignore_index, workspace)
        need_hidden = False
    recomputed: tuple[Any, ...] = (None, None, None)
    if need_hidden or need_weight or need_bias:
        recomputed = torch.ops.rgpb.pull_back(
            hidden, weight, bias, target, z_y, lse_other, h_o if entropy else None, g_zy, g_lo, g_ho, softcap, scale,
            ignore_index, workspace, dtype, need_hidden, need_weight, need_bias,
        )  # fmt: skip
    made = [r if need else None for r, need in zip(recomputed, (need_hidden, need_weight, need_bias))]
    return made[0] if dhidden is None else dhidden, made[1], made[2], *[None] * 8


_score.register_autograd(_backward, setup_context=_setup)
