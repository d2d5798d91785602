"""`linear_logprob`: hidden states and an LM head → per-token scores, without the logits.

The operator `rgpb::score` returns (z_y, lse_other, H_o); all of TokenScores is elementwise in these three, so its
gradient is autograd's. Its backward turns upstream gradients of the three into those of hidden, weight and bias.

Dimensions: P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from rgpb.engine.shards import scored
from rgpb.engine.workspace import Workspace
from rgpb.head import LMHead
from rgpb.layout import TokenScores, token_scores
from rgpb.validation import check_how, check_ignore_index, check_inputs, make_call


def linear_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
    engine: str | None = None,
    path: str = "auto",
    grad_tolerance: float | str | None = None,
    sort_vocab: bool | None = None,
    workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> TokenScores:
    """Score each target token under softmax(head(hidden) / temperature), without the logits.

    Differentiable in `hidden`, the head's weight and its bias, for any upstream gradient on any of the scores; once: a
    second derivative is refused. Logits are formed and kept in float32 (float64 for float64 input) whatever the inputs'
    type.

    Args:
        hidden: [..., H] float64, float32, bfloat16 or float16; padded [B, T, H] or packed [N, H] alike.
        head: weight [V, H] of the same dtype and device, or an `LMHead`. Under autocast the dtypes may differ. With
            `LMHead(shard=…)` the head lies on several ranks, which all give the same hidden states and targets.
        target: int64 [...], the token that `hidden` at the same place predicts; or `ignore_index`.
        ignore_index: positions with this target cost nothing and score 0.
        temperature: T above 0: the scores are those of softmax(z / T), z the logits with soft-cap and scale. It costs
            nothing.
        entropy: also fill `entropy` and `other_entropy`.
        impl: the kernel set. "triton": library products, and row kernels over chunks of float32 logits (CUDA and ROCm);
            "tiled": Triton kernels that never write a logit (the same); "cpp": as "triton", for CPUs, where it was
            built; "torch": the same in plain operations, anywhere; "auto" (default): on a GPU "triton" (or "tiled"
            where `rgpb tune` has timed it and the plan predicts it to be faster), on a CPU "cpp", else "torch".
        engine: deprecated. "tiled" is impl="tiled" now, "chunked" any other.
        path: "auto" (default), or the one path that is wanted, for tests and benchmarks: "forward", "single", "frozen"
            or "two_pass" (`rgpb.engine.plan`). One that can't serve the call is refused.
        grad_tolerance: lets the gradients leave out what is provably small: of each row of ∂L/∂logits at most this
            share, in the L1 norm, of the row's own coefficient. "auto": as much as one rounding of the gradients' dtype
            hides. Default None: nothing is left out. See `rgpb.engine.skipping`.
        sort_vocab: with `grad_tolerance`, take the vocabulary in an estimated order, by which tokens that are probable
            together lie together, so that more is left out. Default None: where a `Workspace` keeps the order between
            calls.
        workspace: bytes held at most beyond inputs, gradients and a few numbers per token (with `grad_tolerance` also a
            byte per 256 entries of the vocabulary, with `sort_vocab` a few per entry): a number, or a text such as
            "64MiB"; or a `Workspace`, whose memory is kept between calls; or "auto" (default): 512 MiB, and on a GPU
            the largest of 1, 2 and 4 GiB that is at most half of what is free. See `fused_loss`.
        validate: False for a call that never waits for the device, as a CUDA graph asks for. What tensors hold is then
            not checked: it is up to the caller that targets are in range, hidden states and reference scores finite
            also where `target` is ignored, and `cu_seqlens`, labels and rewards as they should be. Ignored positions
            are computed like others, and count as little. The kernel sets are the others than "tiled", and "auto" is
            512 MiB.

    Returns:
        TokenScores of float32 (float64) tensors in the shape of `target`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, a target outside [0, V) other than `ignore_index`,
            hidden states that aren't finite, a `temperature` that isn't positive, an `impl` or `path` that is
            unknown or can't serve the request, a `grad_tolerance` with `entropy` (whose gradient has no such bound) or
            with a sharded head, `validate=False` with any of these, a `workspace` too small for one row, or a call
            inside forward mode or a transform of `torch.func`.

    Source: the log-odds form is this library's; the pull-back is Lemma 4.1 of Tuan & Wang 2024 (arXiv 2408.16751).
    """
    head = check_inputs(hidden, head, target, temperature)
    shared = head.shard is not None
    how = check_how(
        hidden.device, impl, engine, path, grad_tolerance, sort_vocab, workspace, shared=shared, validate=validate
    )
    ignore_index = check_ignore_index(ignore_index)
    call = make_call(hidden, head, how, ignore_index, entropy=entropy)
    found = scored(hidden, head, target, call, entropy)
    h_o = found.h_o if entropy else None
    scores = token_scores(found.z_y, found.lse_other, h_o, mask=target.reshape(-1) != ignore_index, entropy=entropy)
    return TokenScores(*(None if x is None else x.view(target.shape) for x in scores))  # type: ignore[arg-type]
