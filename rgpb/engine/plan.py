"""What runs, in what chunks, at what cost: pure arithmetic on shapes.

One unit of work is a product of 2 · N · V · H flops. Naive PyTorch does 3 and keeps [N, V] tensors.

| path       | units | runs                                                                                          |
|------------|-------|-----------------------------------------------------------------------------------------------|
| `forward`  | 1     | no gradient is asked for                                                                      |
| `single`   | 3 (2) | gradients made while a chunk of logits is at hand (2: only one of hidden and weight needs one) |
| `frozen`   | 2     | head without gradient: the forward accumulates O = Σ q_k w_k, the backward only scales it       |
| `two_pass` | 4 (3) | `frozen`, then the logits again for dW, each slice of it finished at once                      |

Dimensions: N tokens, V vocabulary, H hidden size, C rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rgpb.kernels import torch_rows

DEFAULT_WORKSPACE = 512 * 2**20

# Rows of a chunk beyond which a product gains nothing. On a CPU a smaller chunk also stays closer to the caches.
MAX_ROWS = {"cpu": 512, "cuda": 1 << 20}
# Entries of the vocabulary in one finished slice of dW.
MAX_SLICE = {"cpu": 4096, "cuda": 16384}
# A slice of a 16-bit weight converted to float32, where the device has no mixed-precision product.
CONVERT_BYTES = 16 * 2**20


class Plan(NamedTuple):
    """The path of a call, why it was taken, and what it costs.

    Attributes:
        path: `forward`, `single`, `frozen` or `two_pass`.
        reason: one sentence.
        units: products of 2 · N · V · H flops, forward and backward together.
        rows: C, rows of logits held at a time.
        extra_bytes: held at most beyond inputs and gradients, tokens' own numbers (a few bytes each) aside.
        flops: units · 2 · N · V · H.
    """

    path: str
    reason: str
    units: int
    rows: int
    extra_bytes: int
    flops: int


class Sizes(NamedTuple):
    """Shapes and element types that decide the chunking.

    Attributes:
        vocab, width: V and H.
        acc: bytes of an accumulator and of a logit (4, or 8 for float64).
        gemm: bytes of an operand of the products.
        convert: whether the weight has to be converted for them.
        accumulate: whether a sum of dW over chunks needs a buffer of its own (16-bit weight).
        device_type: "cpu", "cuda", …
    """

    vocab: int
    width: int
    acc: int
    gemm: int
    convert: bool
    accumulate: bool
    device_type: str


def gemm_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Operands of the products: 16-bit on CUDA with float32 results, float32 elsewhere; float64 stays."""
    return dtype if dtype == torch.float64 or device_type == "cuda" else torch.float32


def sizes(vocab: int, width: int, weight_dtype: torch.dtype, compute_dtype: torch.dtype, device_type: str) -> Sizes:
    """`Sizes` of a head [vocab, width] used in `compute_dtype` (the autocast type, else that of the hidden states)."""
    gemm = gemm_dtype(device_type, compute_dtype)
    acc = 8 if weight_dtype == torch.float64 else 4
    return Sizes(vocab, width, acc, gemm.itemsize, gemm != weight_dtype, weight_dtype.itemsize < 4, device_type)


def convert_rows(s: Sizes, workspace: int) -> int:
    """Rows of the weight converted at a time, 0 where no conversion is needed."""
    return min(s.vocab, max(1, min(CONVERT_BYTES, workspace // 8) // (s.width * s.gemm))) if s.convert else 0


def row_chunk(s: Sizes, workspace: int, tokens: int, accumulator: bool = False) -> tuple[int, int]:
    """(C, bytes held) of a sweep that takes all of V for C rows at a time.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    fixed = convert_rows(s, workspace) * s.width * (s.gemm + s.acc * s.accumulate)
    if accumulator:
        fixed += s.vocab * (s.width + 1) * 4
    row = s.vocab * s.acc + _row_sides(s)
    most = min(tokens, MAX_ROWS.get(s.device_type, MAX_ROWS["cuda"]))
    return _rows_that_fit(workspace, fixed, row, s.vocab * s.acc, most, s)


def _rows_that_fit(workspace: int, fixed: int, row: int, logits: int, most: int, s: Sizes) -> tuple[int, int]:
    """(rows, bytes held), at most `most` rows. `row`: bytes of one row, `logits` of them with four scratch blocks."""
    vocab = logits // s.acc
    block = torch_rows.block_rows(vocab, s.acc, s.device_type)
    rows = (workspace - fixed) // (row + 4 * logits)
    if rows > block:
        rows = (workspace - fixed - 4 * block * logits) // row
    if rows < 1:
        raise ValueError(
            f"workspace: expected at least {fixed + row + 4 * logits} bytes "
            f"(one row of {vocab} logits and its scratch), got {workspace}"
        )
    rows = min(rows, most)
    return rows, fixed + rows * row + 4 * min(rows, block) * logits


def _row_sides(s: Sizes) -> int:
    """Bytes of one row on the [C, H] sides: gathered, converted, times its factor, and a result."""
    return s.width * (4 + 2 * s.gemm + s.acc)


def single_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int]:
    """`row_chunk` of a single pass: with a float32 sum of dW where the weight is 16-bit and one chunk isn't all.

    Raises:
        ValueError: `workspace` doesn't hold one row, and that sum where it is needed.
    """
    rows, held = row_chunk(s, workspace, tokens)
    return row_chunk(s, workspace, tokens, accumulator=True) if s.accumulate and rows < tokens else (rows, held)


def slice_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int, int]:
    """(rows, slice, bytes held) of a sweep that finishes dW for a slice of V over all rows at a time."""
    column = s.width * (s.gemm * s.convert + s.acc * s.accumulate)
    step = min(s.vocab, MAX_SLICE.get(s.device_type, MAX_SLICE["cuda"]))
    if column:
        step = max(1, min(step, workspace // 2 // column))
    while step > 1 and workspace - step * column < step * s.acc * 5 + _row_sides(s):
        step = -(-step // 2)
    row = step * s.acc + _row_sides(s)
    rows, held = _rows_that_fit(workspace, step * column, row, step * s.acc, max(tokens, 1), s)
    return rows, step, held


def plan(
    tokens: int,
    head: Sizes,
    *,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    couples: str = "batch",
    scalar: bool = True,
    half: bool = False,
    entropy_grad: bool = False,
    workspace: int = DEFAULT_WORKSPACE,
) -> Plan:
    """The cheapest path that fits the workspace.

    Args:
        tokens: N, at most; masked ones are compacted away before the first product.
        head: from `sizes`.
        hidden_grad, weight_grad: which gradients will be asked for.
        couples: what the objective couples: "token" or "pair" (known before the whole batch is scored) or
            "batch".
        scalar: whether the result is reduced to one number, so that coefficients are known up to a common factor.
        half: whether the gradients are float16: the upstream factor (a loss scale) then has to come before the
            rounding.
        entropy_grad: whether the gradient of the entropy is asked for.
        workspace: bytes.

    Raises:
        ValueError: `workspace` is too small for a single row.
    """
    rows, held = row_chunk(head, workspace, tokens)
    unit = 2 * tokens * head.vocab * head.width

    def made(path: str, reason: str, units: int, rows: int, held: int) -> Plan:
        return Plan(path, reason, units, rows, held, units * unit)

    if not (hidden_grad or weight_grad):
        return made("forward", "no gradient is asked for", 1, rows, held)
    if entropy_grad:
        units = 1 + 2 * hidden_grad + 2 * weight_grad
        held = max(held, slice_chunk(head, workspace, tokens)[2]) if weight_grad else held
        path = "two_pass" if weight_grad else "frozen"
        return made(path, "the gradient of the entropy needs the logits again", units, rows, held)
    if not weight_grad:
        return made(
            "frozen", "the head has no gradient: the forward accumulates that of the hidden states", 2, rows, held
        )
    why = _not_single(head, couples, scalar, half, workspace, tokens)
    if why is None:
        rows, held = single_chunk(head, workspace, tokens)
        return made(
            "single", f"coefficients are known chunk by chunk (couples a {couples})", 2 + hidden_grad, rows, held
        )
    held = max(held, slice_chunk(head, workspace, tokens)[2])
    return made("two_pass", why, 3 + hidden_grad, rows, held)


def _not_single(head: Sizes, couples: str, scalar: bool, half: bool, workspace: int, tokens: int) -> str | None:
    """Why gradients can't be made in the forward, or None where they can."""
    if couples == "batch":
        return "the objective may couple the whole batch"
    if not scalar:
        return "reduction='none': the upstream gradient of each result is not known in the forward"
    if half:
        return "float16 gradients: the loss scale has to come before the rounding"
    try:
        single_chunk(head, workspace, tokens)
    except ValueError:
        return "the float32 sum of dW doesn't fit the workspace"
    return None
