"""What runs, in what chunks, at what cost: pure arithmetic on shapes.

One unit of work is a product of 2 · N · V · H flops. Naive PyTorch does 3 and keeps [N, V] tensors.

| path       | units | runs                                                                                          |
|------------|-------|-----------------------------------------------------------------------------------------------|
| `forward`  | 1     | no gradient is asked for                                                                      |
| `single`   | 3 (2) | gradients made while a chunk of logits is at hand (2 if the hidden states need none)          |
| `frozen`   | 2     | head without gradient: the forward accumulates O = Σ q_k w_k, the backward only scales it       |
| `two_pass` | 4 (3) | `frozen`, then the logits again for dW, each slice of it finished at once                      |

Where only a few columns beside a frozen weight have a gradient (LoRA on the head), `single` is 2 units, `two_pass` 3.

Every kernel set runs each path. `torch`, `cpp` and `triton` form float32 logits by library products into a buffer, and
run row kernels over it; `tiled` (Triton) holds logits in registers only, and writes exp(z − shift) or dlogits in the
products' own dtype.

What fits the workspace is in `engine.chunks`, what a device does in a second in `engine.rates`.

Dimensions: N tokens, V vocabulary, H hidden size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rgpb.engine.chunks import (
    Sizes,
    convert_rows,
    formed_seconds,
    mass_tile,
    remembered,
    row_chunk,
    single_chunk,
    slice_chunk,
)
from rgpb.engine.rates import (
    DLOGITS_ISSUES,
    RATES,
    SOFTCAP_ISSUES,
    STATISTICS_ISSUES,
    WEIGHTS_ISSUES,
    Rates,
    product_seconds,
)

DEFAULT_WORKSPACE = 512 * 2**20
# What `workspace="auto"` takes at most of a GPU's memory, where half of what is free is more: enough for a single pass
# over some thousand rows of a vocabulary of 128 thousand.
MOST_WORKSPACE = 4 * 2**30
# From this part of the tokens on in pairs or groups that a single pass sweeps twice, two passes are taken: 4 units,
# where it does 3 and this part of a fourth, and sums dW over its chunks besides.
MOST_TWICE = 0.75


PATHS = ("auto", "forward", "single", "frozen", "two_pass")
# Why there is no single pass where ranks share a head, or responses.
SHARDED = "the head is sharded: coefficients are known after all its ranks have scored"
UNREAD = "validate=False: how long responses are isn't read, and coefficients are known of all or of single tokens"
SPLIT = "sequence_group: coefficients are known after all ranks with tokens of a response have scored"


def auto_workspace(free: int) -> int:
    """Bytes that `workspace="auto"` takes of so many that a GPU has free: 512 MiB, or 1, 2 or 4 GiB in half of it."""
    size = MOST_WORKSPACE
    while size > DEFAULT_WORKSPACE and 2 * size > free:
        size //= 2
    return size


class Plan(NamedTuple):
    """The path of a call, why it was taken, and what it costs.

    Attributes:
        path: `forward`, `single`, `frozen` or `two_pass`.
        reason: one sentence.
        units: products of 2 · N · V · H flops, forward and backward together.
        rows: C, rows of logits held at a time.
        together: K, rows whose E is multiplied at once; C where it lies over the logits.
        extra_bytes: held at most beyond inputs and gradients, tokens' own numbers (a few bytes each) aside.
        flops: units · 2 · N · V · H.
        impl: the kernel set, "torch", "cpp", "triton" or "tiled".
        seconds: predicted from `RATES`; None where there are none.
    """

    path: str
    reason: str
    units: int
    rows: int
    together: int
    extra_bytes: int
    flops: int
    impl: str = "torch"
    seconds: float | None = None


class Request(NamedTuple):
    """What is asked of a call, besides its shapes.

    Attributes:
        tokens: N, at most; masked ones are compacted away before the first product.
        hidden_grad, weight_grad: which gradients will be asked for.
        couples: what the objective couples: "token", "pair" or "group" (known before the whole batch is scored) or
            "batch".
        scalar: whether the result is reduced to one number, so that coefficients are known up to a common factor.
        half: whether the gradients are float16: the upstream factor (a loss scale) then has to come before the
            rounding.
        entropy_grad: whether the gradient of the entropy is asked for.
        skipping: whether gradients may leave out what is under a tolerance.
        sort_vocab: whether the vocabulary is put in order for that.
        kept: whether a `Workspace` keeps the memory.
        split: why coefficients aren't known before other ranks have scored; "" where they are.
        unit_tokens: gives the tokens of each pair or group, where it can be known, and is asked only where they decide:
            in a single pass those longer than a chunk take a sweep more.
        path: of `PATHS`; "auto" for the cheapest that fits.
        workspace: bytes.
    """

    tokens: int
    hidden_grad: bool = True
    weight_grad: bool = True
    couples: str = "batch"
    scalar: bool = True
    half: bool = False
    entropy_grad: bool = False
    skipping: bool = False
    sort_vocab: bool = False
    kept: bool = False
    split: str = ""
    unit_tokens: Callable[[], Sequence[int]] | None = None
    path: str = "auto"
    workspace: int = DEFAULT_WORKSPACE


class Traffic(NamedTuple):
    """Bytes that a rank of a sharded head gives to all-reduces.

    Attributes:
        scores: in the forward: [N] of the largest logsumexp; [2, N], with entropy [3, N], of what is summed.
        hidden: in the backward: dX [N, H].
    """

    scores: int
    hidden: int


def shard_traffic(tokens: int, width: int, acc: int, entropy: bool, hidden_grad: bool = True) -> Traffic:
    """What travels for N tokens, in accumulators of `acc` bytes; H = `width`."""
    return Traffic((3 + entropy) * tokens * acc, hidden_grad * tokens * width * acc)


def shard_held(tokens: int, width: int, acc: int) -> int:
    """Bytes that a sharded head takes beyond a whole one: X and dX [N, H] in accumulators, of tokens that count."""
    return 2 * tokens * width * acc


def ring_reduced(size: int, ranks: int) -> int:
    """Bytes that each rank sends where `size` bytes are all-reduced in a ring: R − 1 parts of R, twice."""
    return 2 * ring_gathered(size, ranks)


def ring_gathered(size: int, ranks: int) -> int:
    """The same where `size` bytes in all are gathered from the ranks, or reduced and scattered to them."""
    return size * (ranks - 1) // ranks


def plan(
    tokens: int, head: Sizes, impls: tuple[str, ...] = (), *, unit_tokens: Callable[[], Sequence[int]] | None = None,
    **asked: Any,
) -> Plan:  # fmt: skip
    """The cheapest path that fits the workspace, on the kernel set that is predicted to be fastest.

    Args:
        tokens: N, at most.
        head: from `sizes`.
        impls: kernel sets to choose from, in order of preference where times can't be predicted; default: the head's.
        unit_tokens, asked: the rest of a `Request`, by name.

    Raises:
        ValueError: `workspace` is too small for a single row, or the path or the only kernel set can't serve the
            request.
    """
    made = _fastest(tokens, head, impls, **asked)
    if unit_tokens is None or made.path != "single" or made.together >= tokens:
        return made
    return _fastest.anew(tokens, head, impls, unit_tokens=unit_tokens, **asked)


@remembered
def _fastest(tokens: int, head: Sizes, impls: tuple[str, ...], **asked: Any) -> Plan:
    """`plan`; whatever is not known of the units makes no path faster."""
    request = Request(tokens, **asked)
    if request.couples not in ("token", "pair", "group", "batch"):
        raise ValueError(f"couples: expected 'token', 'pair', 'group' or 'batch', got {request.couples!r}")
    if request.skipping:
        head = head.skipping(request.sort_vocab, request.kept)
    made, refused = [], []
    for impl in impls or (head.impl,):
        candidate = of_impl(head, impl)
        why = _not_tiled(candidate, request)
        try:
            if why:
                raise ValueError(f"impl: {why}, got 'tiled'")
            made.append(_plan(candidate, request))
        except ValueError as error:
            refused.append(error)
    if not made:
        raise refused[0]
    # without rates nothing is predicted, and float32 and float64 have none: no tensor core takes them unrounded
    return min(made, key=lambda p: p.seconds) if all(p.seconds for p in made) else made[0]  # type: ignore[arg-type, return-value]


def of_impl(head: Sizes, impl: str) -> Sizes:
    """`Sizes` of the same head on another kernel set of the same device."""
    if impl == head.impl:
        return head
    convert = head.convert or (impl == "tiled" and head.strided)
    return head._replace(impl=impl, convert=convert)


def _plan(head: Sizes, request: Request) -> Plan:
    """`plan` on the kernel set of `head`."""
    tokens, workspace = request.tokens, request.workspace
    hidden_grad, weight_grad = request.hidden_grad, request.weight_grad
    gradient = hidden_grad or weight_grad
    rows, together, held = row_chunk(head, workspace, tokens, score_only=not gradient)
    unit = 2 * tokens * head.vocab * head.width

    def made(path: str, reason: str, units: int, rows: int, together: int, held: int) -> Plan:
        if request.path not in ("auto", path):
            raise ValueError(f"path: expected 'auto' or {path!r}, since {reason}; got {request.path!r}")
        seconds = _seconds(head, path, units, tokens, (rows, together), workspace)
        return Plan(path, reason, units, rows, together, held, units * unit, head.impl, seconds)

    if not gradient:
        return made("forward", "no gradient is asked for", 1, rows, together, held)
    if request.entropy_grad:
        units = 1 + 2 * hidden_grad + (1 + head.dw) * weight_grad
        held = max(held, slice_chunk(head, workspace, tokens)[-1]) if weight_grad else held
        path = "two_pass" if weight_grad else "frozen"
        return made(path, "the gradient of the entropy needs the logits again", units, rows, together, held)
    why = _not_single(head, request)
    if not weight_grad and (request.path == "frozen" or why is not None or not request.skipping):
        why = "the head has no gradient: the forward accumulates that of the hidden states"
        return made("frozen", why, 2, rows, together, held)
    both = max(held, slice_chunk(head, workspace, tokens)[-1])
    dw = int(head.dw and weight_grad)
    two_pass_units = 2 + hidden_grad + dw
    if why is not None or request.path == "two_pass":
        return made("two_pass", why or "it was asked for", two_pass_units, rows, together, both)
    sweep = single_chunk(head, workspace, tokens)
    why = f"coefficients are known chunk by chunk (couples a {request.couples})"
    if request.path != "auto" or not weight_grad:
        return made("single", why, 1 + hidden_grad + dw, *sweep)
    single, twice = made("single", why, 1 + hidden_grad + dw, *sweep), 0.0
    two_pass = made("two_pass", "the sum of dW over many chunks would cost more", two_pass_units, rows, together, both)
    if single.together < tokens and request.unit_tokens is not None:
        twice, longest = _swept_twice(head, workspace, request.unit_tokens())
        if twice >= MOST_TWICE:
            longer = f"longer than a single pass's chunk of {longest:,} rows"
            reason = f"most tokens are in a {request.couples} {longer}, which would be swept twice"
            return two_pass._replace(reason=reason)
    seconds = _seconds(head, "single", single.units + twice, tokens, sweep[:2], workspace)
    return two_pass if (two_pass.seconds or 0) < (seconds or 0) else single


def _not_single(head: Sizes, request: Request) -> str | None:
    """Why gradients can't be made in the forward, or None where they can."""
    if request.split:
        return request.split
    if request.couples == "batch":
        return "the objective may couple the whole batch"
    if not request.scalar:
        return "reduction='none': the upstream gradient of each result is not known in the forward"
    if request.half:
        return "float16 gradients: the loss scale has to come before the rounding"
    try:
        single_chunk(head, request.workspace, request.tokens)
    except ValueError:
        size = head.vocab * (head.summed + 1) * 4
        return f"the float32 sum of dW doesn't fit the workspace, of which it takes {size / 2**20:,.0f} MiB"
    return None


def _swept_twice(head: Sizes, workspace: int, unit_tokens: Sequence[int]) -> tuple[float, int]:
    """The part of the tokens in pairs or groups that are longer than a single pass's chunk, and the rows of that."""
    total = sum(unit_tokens)
    chunk, together, _ = single_chunk(head, workspace, max(total, 1))
    rows = together if head.weighs else chunk
    return sum(count for count in unit_tokens if count > rows) / max(total, 1), rows


def _not_tiled(head: Sizes, request: Request) -> str | None:
    """What the tile kernels lack for this request, or None."""
    if head.impl != "tiled":
        return None
    if request.half and (request.hidden_grad or request.weight_grad):
        return (
            "expected another for float16 gradients, whose range is too narrow for weights before they are normalised"
        )
    rows = min(mass_tile(head.device_type), head.vocab)
    if request.skipping and 0 < convert_rows(head, request.workspace) < rows:
        return f"expected another, since the workspace doesn't hold {rows} converted rows of the weight"
    return None


def _seconds(
    head: Sizes, path: str, units: float, tokens: int, sweep: tuple[int, int], workspace: int
) -> float | None:  # fmt: skip
    """`predicted_seconds` where there are rates: for 16-bit products on a GPU."""
    if head.arch is None or head.gemm != 2:
        return None
    return predicted_seconds(head, RATES[head.arch], path, units, tokens, sweep, workspace)


def predicted_seconds(
    head: Sizes, rates: Rates, path: str, units: float, tokens: int, sweep: tuple[int, int], workspace: int
) -> float:  # fmt: skip
    """Products at their rates, in waves, and what passes through memory between them; nothing is assumed to overlap.

    sweep: (C, K) of the sweep over all of V.
    """
    (chunk, together), logits = sweep, tokens * head.vocab
    again, dw = path == "two_pass", int(head.dw and path in ("single", "two_pass"))
    columns, some, whole = slice_chunk(head, workspace, tokens)[:3] if again else (head.vocab, chunk, together)
    if head.impl == "tiled":  # E written
        products = (1 + again) * 2 * logits * head.width / rates.tile
        products += (0 if path == "forward" else 1 + again) * logits * head.gemm / rates.copy
    else:
        products = formed_seconds(head, rates, tokens, chunk, head.vocab) + logits * _row_seconds(head, rates, path)
        if again:
            products += head.vocab / columns * formed_seconds(head, rates, tokens, some, columns)
    inner, rest = divmod(tokens, max(whole, 1))
    for rows, times in ((whole, inner), (rest, 1)):
        products += times * dw * head.vocab / columns * product_seconds(rates, columns, head.width, rows, head.gemm)
    inner, rest = divmod(tokens, max(together, 1))
    dx = inner * product_seconds(rates, together, head.width, head.vocab, head.gemm)
    dx += product_seconds(rates, rest, head.width, head.vocab, head.gemm)
    products += (units - 1 - again - dw) * dx
    parts = max(1, -(-tokens // max(whole, 1))) if path in ("single", "two_pass") else 1
    # written by the first chunk, read and written by the others; then read, and written in 16 bits
    sums = 0 if parts == 1 else head.vocab * head.summed * (4 * (2 * parts - 1) + (4 + 2) * head.accumulate)
    if path == "single" and head.impl not in ("triton", "tiled"):
        sums += 2 * head.gemm * head.vocab * head.summed * (head.device_type != "cpu")  # times the upstream gradient
    return products + sums / rates.copy


def _row_seconds(head: Sizes, rates: Rates, path: str) -> float:
    """What each logit takes in row kernels beyond being read once: bytes, or instructions where these take longer."""
    capped = SOFTCAP_ISSUES * head.softcap
    # bytes of a first read, further bytes, instructions
    weights = (head.acc, head.gemm, WEIGHTS_ISSUES + capped)
    statistics, dlogits = (head.acc, 0, STATISTICS_ISSUES + capped), (head.acc, head.gemm, DLOGITS_ISSUES + capped)
    kernels = [weights] if head.weighs and path != "forward" else [statistics]
    kernels += [] if path == "forward" or head.weighs else [(0, head.acc + head.gemm, DLOGITS_ISSUES + capped)]
    kernels += [dlogits] if path == "two_pass" else []
    issued = 4 * 32 * rates.clock * rates.multiprocessors
    return sum(
        max((first + more) / rates.copy, count / issued if issued else 0.0) - first / rates.copy
        for first, more, count in kernels
    )
