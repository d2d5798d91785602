"""`linear_logprob`: hidden states and an LM head → per-token scores, without the logits.

The operator `rgpb::score` returns (z_y, lse_other, H_o); all of TokenScores is elementwise in these three, so its
gradient is autograd's. Its backward turns upstream gradients of the three into those of hidden, weight and bias.

Dimensions: P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgpb.engine import chunked, skipping
from rgpb.engine.plan import DEFAULT_WORKSPACE, ENGINES, MASS_TILE, Plan, plan, sizes
from rgpb.head import LMHead, as_head
from rgpb.kernels import architecture, cpp_rows
from rgpb.kernels.torch_rows import Statistics, Upstream
from rgpb.layout import TokenScores

IMPLEMENTATIONS = ("auto", "triton", "cpp", "torch")
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    grad_tolerance: float | str | None = None,
    sort_vocab: bool = False,
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
        impl: who does the row work: "triton" (CUDA and ROCm), "cpp" (CPUs, where it was built), "torch", or "auto": the
            first of these that is there.
        engine: "chunked" (library products, row kernels), "tiled" (Triton kernels that never write a logit), or "auto":
            whichever `rgpb.engine.plan` predicts to be faster.
        grad_tolerance: lets the weight's gradient leave out what is provably small: of ∂L/∂logits at most this share of
            the batch's largest coefficient, in the L1 norm of each row. "auto": one rounding unit of the weight's
            dtype. Default None: nothing is left out. The gradient of `hidden` stays whole. See `rgpb.engine.skipping`.
        sort_vocab: with `grad_tolerance`, order the vocabulary by its estimated mass first, so that what can be left
            out lies together.
        workspace: bytes held at most beyond inputs, gradients and a few numbers per token (with `grad_tolerance` also a
            number per 1024 entries of the vocabulary, with `sort_vocab` a few per entry); default 512 MiB.

    Returns:
        TokenScores of float32 (float64) tensors in the shape of `target`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, a target outside [0, V) other than `ignore_index`,
            hidden states that aren't finite, an `impl` or `engine` that is unknown or can't serve the request, a
            `grad_tolerance` with `entropy` (whose gradient has no such bound), or a `workspace` too small for one row.

    Source: the log-odds form is this library's; the pull-back is Lemma 4.1 of Tuan & Wang 2024 (arXiv 2408.16751).
    """
    head = check_inputs(hidden, head, target, impl, workspace)
    tolerance = skipping.check(grad_tolerance, sort_vocab, entropy, head.weight.dtype)
    impl = resolve_impl(impl, hidden.device)
    chosen = plan_call(
        hidden, head, impl, engine, workspace,
        entropy_grad=entropy, skipping=tolerance is not None, sort_vocab=sort_vocab,
    )  # fmt: skip
    z_y, lse_other, h_o, _ = raw_scores(
        hidden, head, target, ignore_index, entropy, entropy, chosen, tolerance, sort_vocab, workspace
    )
    return token_scores(z_y, lse_other, h_o, mask=target != ignore_index, entropy=entropy)


def raw_scores(
    hidden: Tensor, head: LMHead, target: Tensor, ignore_index: int, entropy: bool, entropy_grad: bool, chosen: Plan,
    tolerance: float | None, sort_vocab: bool, workspace: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(z_y, lse_other, H_o) in the shape of `target`, H_o None unless asked for, and what the backward reports of
    skipping (`skipping.Skipped.read`). Inputs are checked already."""
    keep = torch.is_grad_enabled() and hidden.requires_grad and not entropy_grad
    skip = tolerance is not None and chosen.path == "two_pass"
    z_y, lse_other, h_o, *_, report = torch.ops.rgpb.score(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, target.reshape(-1), head.softcap, head.scale,
        ignore_index, workspace, compute_dtype(hidden), chosen.impl, chosen.engine, entropy, keep,
        tolerance if skip else None, sort_vocab and skip,
    )  # fmt: skip
    shape = target.shape
    return z_y.view(shape), lse_other.view(shape), h_o.view(shape) if entropy else None, report


def plan_call(
    hidden: Tensor, head: LMHead, impl: str, engine: str, workspace: int, **request: Any
) -> Plan:  # fmt: skip
    """What will run for these tensors; `impl` is resolved already, `request` goes to `rgpb.engine.plan.plan`."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    vocab, width = head.weight.shape
    grad, bias = torch.is_grad_enabled(), head.bias
    dtype = compute_dtype(hidden)
    shape = sizes(
        vocab, width, head.weight.dtype, dtype, hidden.device.type, impl, arch=architecture(hidden.device)
    )  # fmt: skip
    return plan(
        hidden.numel() // width,
        shape,
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and (head.weight.requires_grad or (bias is not None and bias.requires_grad)),
        half=torch.float16 in (hidden.dtype, head.weight.dtype, dtype),
        engine=engine,
        workspace=workspace,
        **request,
    )


def why_not(impl: str, device: torch.device) -> str | None:
    """What keeps the implementation "triton", "cpp" or "torch" from serving tensors on `device`; None where it can."""
    if impl == "triton":
        if not HAS_TRITON:
            return "the package triton isn't installed"
        if device.type != "cuda" and not INTERPRETED:
            return f"Triton has no kernels for the device {device.type} (TRITON_INTERPRET=1 interprets them, for tests)"
    if impl == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels are for CPUs, not for the device {device.type}"
        return cpp_rows.missing()
    return None


def resolve_impl(impl: str, device: torch.device) -> str:
    """ "auto" → the fastest that is there; a named one that isn't is refused.

    Raises:
        ValueError: an implementation that can't serve this device, with the reason.
    """
    if impl == "auto":
        best = "triton" if device.type == "cuda" else "cpp"
        return best if why_not(best, device) is None else "torch"
    reason = why_not(impl, device)
    if reason:
        *some, last = (repr(other) for other in IMPLEMENTATIONS if other == "auto" or why_not(other, device) is None)
        raise ValueError(f"impl: expected {', '.join(some)} or {last}, since {reason}; got {impl!r}")
    return impl


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
    if head.softcap is not None and not 1e-30 < head.softcap < 1e30:
        raise ValueError(f"head.softcap: expected a positive number (1e-30 to 1e30) or None, got {head.softcap}")
    if not isinstance(head.scale, float | int) or not abs(head.scale) < 1e30:
        raise ValueError(f"head.scale: expected a finite number, got {head.scale}")
    if not isinstance(workspace, int) or workspace <= 0:
        raise ValueError(f"workspace: expected a positive whole number of bytes, got {workspace}")
    return head


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rgpb::score", mutates_args=())
def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None, scale: float,
    ignore_index: int, workspace: int, compute_dtype: torch.dtype, impl: str, engine: str, entropy: bool,
    accumulate: bool, tolerance: float | None, sort_vocab: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`chunked.Scored`, and room for the report of `skipping`: NaN, until a backward fills it in."""
    problem = chunked.Problem(
        hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine
    )
    skip = tolerance is not None
    with problem.running():
        scored = chunked.score(problem, entropy, accumulate, skip, sort_vocab)
    return *scored, hidden.new_full((len(target) + 1 if skip else 0,), torch.nan, dtype=torch.float32)  # type: ignore[return-value]


@_score.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine, entropy,
    accumulate, tolerance, sort_vocab,
):  # fmt: skip
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    positions, nothing, skip = target.shape, (0,), tolerance is not None
    tiles = -(-weight.shape[0] // MASS_TILE)
    return (
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions, dtype=acc),
        hidden.new_empty(positions if entropy else nothing, dtype=acc),
        torch.empty_like(hidden) if accumulate else hidden.new_empty(nothing),
        hidden.new_empty((*positions, tiles) if skip else nothing, dtype=acc),
        target.new_empty(weight.shape[0] if sort_vocab else 0),
        hidden.new_empty((positions[0] + 1) if skip else 0, dtype=torch.float32),
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
    with problem.running():
        chunked.finish_hidden_(problem, accumulated, z_y, g_zy, g_lo)


@torch.library.custom_op("rgpb::pull_back", mutates_args=("report",))
def _pull_back(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None, scale: float,
    ignore_index: int, workspace: int, compute_dtype: torch.dtype, impl: str, engine: str,
    z_y: Tensor, lse_other: Tensor, h_o: Tensor | None, g_zy: Tensor, g_lo: Tensor, g_ho: Tensor | None,
    need_hidden: bool, need_weight: bool, need_bias: bool,
    masses: Tensor, order: Tensor, tolerance: float | None, report: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias from recomputed logits; empty where not needed.

    With a tolerance `report` gets the bound of each position and the share of tiles that were skipped.
    """
    problem = chunked.Problem(
        hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine
    )
    statistics, upstream = Statistics(z_y, lse_other, h_o), Upstream(g_zy, g_lo, g_ho)
    dhidden, dweight, dbias = hidden.new_empty(0), None, None
    with problem.running():
        if need_hidden:
            dhidden = chunked.hidden_gradient(problem, statistics, upstream)
        if need_weight or need_bias:
            if len(order):
                problem = problem.ordered(order)
            rows_of = None
            if tolerance is not None:
                rows_of = skipping.choose(problem, masses, statistics, upstream, tolerance, report)
            dweight, dbias = chunked.head_gradient(problem, statistics, upstream, need_weight, need_bias, rows_of)
    return dhidden, weight.new_empty(0) if dweight is None else dweight, weight.new_empty(0) if dbias is None else dbias


@_pull_back.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, softcap, scale, ignore_index, workspace, compute_dtype, impl, engine, z_y, lse_other,
    h_o, g_zy, g_lo, g_ho, need_hidden, need_weight, need_bias, masses, order, tolerance, report,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias else weight.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    z_y, lse_other, h_o, accumulated, *skipped = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(accumulated, *skipped, *([] if ctx.options[7] else [h_o]))
    # The sum O becomes dX in place, so it is held once and given away; a second backward recomputes.
    ctx.accumulated = [accumulated] if ctx.options[8] else []
    masses, order, ctx.report = skipped
    ctx.save_for_backward(hidden, weight, bias, target, z_y, lse_other, h_o, masses, order)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler records the operations: what was returned must then not change in place."""
    return type(x) not in (Tensor, nn.Parameter)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rgpb: second derivatives are not available (create_graph=True was given); "
            "use rgpb.reference for a dense form that has them"
        )


def _backward(ctx: Any, g_zy: Tensor | None, g_lo: Tensor | None, g_ho: Tensor | None, *_: None) -> tuple[Any, ...]:
    refuse_double_backward()
    hidden, weight, bias, target, z_y, lse_other, h_o, masses, order = ctx.saved_tensors
    *options, entropy, _, tolerance, _ = ctx.options
    softcap, scale, ignore_index, workspace = options[:4]
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
        report = ctx.report.clone() if is_traced(ctx.report) else ctx.report  # there it can't be filled in later
        recomputed = torch.ops.rgpb.pull_back(
            hidden, weight, bias, target, *options, z_y, lse_other, h_o if entropy else None, g_zy, g_lo, g_ho,
            need_hidden, need_weight, need_bias, masses, order, tolerance, report,
        )  # fmt: skip
    made = [r if need else None for r, need in zip(recomputed, (need_hidden, need_weight, need_bias))]
    return made[0] if dhidden is None else dhidden, made[1], made[2], *[None] * 12


_score.register_autograd(_backward, setup_context=_setup)
