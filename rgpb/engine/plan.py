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

`plan` says what a call costs, for its number of tokens. `chunks` says what fits the workspace whatever that number: the
door puts it into the `Call`, and no loop asks again.

Dimensions: N tokens, V vocabulary, H hidden size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from rgpb.engine.skipping import CHOICE_BYTES
from rgpb.kernels import cpp_rows, torch_rows, tuned
from rgpb.kernels.types import PAD

DEFAULT_WORKSPACE = 512 * 2**20
# What `workspace="auto"` takes at most of a GPU's memory, where half of what is free is more: enough for a single pass
# over some thousand rows of a vocabulary of 128 thousand.
MOST_WORKSPACE = 4 * 2**30

# Columns of logits that a CPU forms by one float32 product, for each thread: wider ones have been seen to take a tenth
# longer (docs/performance.md). At least MIN_COLUMNS, of which each tile's columns are a part.
COLUMNS = 512
MIN_COLUMNS = 1024
# Slices of a product with all rows at once aren't narrower: 8 tiles of 128 columns.
MIN_SLICE = 1024
# Rows of a chunk come in multiples of a product's tile, or the last of its tiles is mostly empty.
ROW_TILE = 128
# Columns whose softmax mass is kept together, where gradients may be skipped: narrow tiles leave out more. On a GPU two
# tiles of a product's result, or one of the tile kernels.
MASS_TILE = {"cpu": 256, "cuda": 256}
# At least so many rows of a chunk, where gradients may be skipped in memory that is kept: of a narrow tile only a few
# rows count. In new memory a chunk of that size would cost more than it saves.
MAX_SKIPPING = 4096
# Columns of one tile kernel's tile, at the least: there are so many partial statistics to a row.
PARTIAL_TILE = 64
# From this part of the tokens on in pairs or groups that a single pass sweeps twice, two passes are taken: 4 units,
# where it does 3 and this part of a fourth, and sums dW over its chunks besides.
MOST_TWICE = 0.75
# A slice of a 16-bit weight converted to float32, where the device has no mixed-precision product.
CONVERT_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}


PATHS = ("auto", "forward", "single", "frozen", "two_pass")
# Why there is no single pass where ranks share a head, or responses.
SHARDED = "the head is sharded: coefficients are known after all its ranks have scored"
UNREAD = "validate=False: how long responses are isn't read, and coefficients are known of all or of single tokens"
SPLIT = "sequence_group: coefficients are known after all ranks with tokens of a response have scored"
# More rows than any call has: what fits is then bounded by the workspace alone.
ANY = 1 << 62


Given = ParamSpec("Given")
Found = TypeVar("Found")


class remembered(Generic[Given, Found]):
    """A pure function whose results are kept; `anew`, and a compiler, which can't look into a cache, compute them."""

    def __init__(self, function: Callable[Given, Found]):
        self.anew = function
        self.kept: Any = lru_cache(1024)(function)

    def __call__(self, *args: Given.args, **keywords: Given.kwargs) -> Found:
        return (self.anew if torch.compiler.is_compiling() else self.kept)(*args, **keywords)


def auto_workspace(free: int) -> int:
    """Bytes that `workspace="auto"` takes of so many that a GPU has free: 512 MiB, or 1, 2 or 4 GiB in half of it."""
    size = MOST_WORKSPACE
    while size > DEFAULT_WORKSPACE and 2 * size > free:
        size //= 2
    return size


class Rates(NamedTuple):
    """What a GPU does in a second: flops of a 16-bit library product, of the tile kernels' products, bytes copied."""

    library: float
    tile: float
    copy: float


def _assumed(library: float, copy: float) -> Rates:
    """Tile kernels at three quarters of the library's rate: an assumption, until a GPU has run them."""
    return Rates(library, 0.75 * library, copy)


# Per architecture. sm_90: what PyTorch has been seen to reach on an H200; the others are nine tenths of what vendors
# print for copies and eight tenths for products (A100, B200, RTX 5090, MI300X).
RATES = {
    "sm_80": _assumed(250e12, 1.8e12),
    "sm_90": _assumed(788e12, 4.3e12),
    "sm_100": _assumed(1800e12, 7.2e12),
    "sm_120": _assumed(168e12, 1.6e12),
    "gfx9": _assumed(1045e12, 4.8e12),
}


class Plan(NamedTuple):
    """The path of a call, why it was taken, and what it costs.

    Attributes:
        path: `forward`, `single`, `frozen` or `two_pass`.
        reason: one sentence.
        units: products of 2 · N · V · H flops, forward and backward together.
        rows: C, rows of logits held at a time.
        extra_bytes: held at most beyond inputs and gradients, tokens' own numbers (a few bytes each) aside.
        flops: units · 2 · N · V · H.
        impl: the kernel set, "torch", "cpp", "triton" or "tiled".
        seconds: predicted from `RATES`; None where there are none.
    """

    path: str
    reason: str
    units: int
    rows: int
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


class Limits(NamedTuple):
    """Sizes beyond which a product gains nothing. On a CPU smaller ones also stay closer to the caches.

    Attributes:
        rows: of a chunk.
        scored: the same where nothing is pulled back, and a chunk is as wide as `columns`.
        columns: of logits that are formed by one float32 or float64 product.
        slice: entries of the vocabulary in one finished slice of dW.
    """

    rows: int
    scored: int
    columns: int
    slice: int


GPU_LIMITS = Limits(1 << 20, 1 << 20, 1 << 62, 16384)


def cpu_limits() -> Limits:
    """Those of this CPU and so many threads: what `rgpb tune` has kept, or what was found on two threads."""
    if torch.compiler.is_compiling():  # which doesn't know the threads
        return Limits(512, 2048, MIN_COLUMNS, 2048)
    threads = torch.get_num_threads()
    return tuned_limits(threads) or untuned_limits(threads)


def untuned_limits(threads: int) -> Limits:
    """Those of any CPU."""
    return Limits(512, 2048, max(MIN_COLUMNS, COLUMNS * threads) // MIN_COLUMNS * MIN_COLUMNS, 2048)


@cache
def tuned_limits(threads: int) -> Limits | None:
    """What `rgpb tune` has kept."""
    return tuned.read(Limits, cpu_key(threads))


def cpu_key(threads: int) -> str:
    """What limits are kept by."""
    return f"{tuned.cpu_name()}, {threads} threads, torch {torch.__version__}"


class Chunks(NamedTuple):
    """What the loops hold at a time: what fits the workspace, whatever the number of tokens.

    Attributes:
        rows: of a sweep over all of V.
        scored_rows: the same where nothing is pulled back.
        summed_rows: the same beside a float32 sum of dW, for a single pass of several chunks with a 16-bit head.
        slices: (columns, rows) of a sweep that finishes dW slice by slice, widest slices first.
        converted: rows of the weight converted to the operands' dtype at a time; 0 where none has to be.
        columns: of logits formed by one product.
        room: length of a row of the buffer of logits.
        pad: elements between the rows of a slice of logits.
        picked: columns whose rows are picked at a time, where tiles may be skipped.
        sample_rows: rows that an order of the vocabulary may be estimated from; 0 where none is asked for.
    """

    rows: int
    scored_rows: int
    summed_rows: int
    slices: tuple[tuple[int, int], ...]
    converted: int
    columns: int
    room: int
    pad: int
    picked: int
    sample_rows: int

    def single_rows(self, tokens: int) -> int:
        """Rows of a single pass's chunk: beside a sum of dW where one chunk isn't all."""
        return self.rows if tokens <= self.rows else self.summed_rows

    def slice_for(self, tokens: int) -> tuple[int, int]:
        """The widest slice whose sweep takes all rows at once, else the narrowest: (columns, rows)."""
        return next((each for each in self.slices if each[1] >= tokens), self.slices[-1])


class Sizes(NamedTuple):
    """Shapes and element types that decide the chunking.

    Attributes:
        vocab, width: V and H.
        acc: bytes of an accumulator and of a logit (4, or 8 for float64).
        gemm: bytes of an operand of the products.
        convert: whether the weight has to be converted for them.
        accumulate: whether a sum of dW over chunks needs a buffer of its own (16-bit weight).
        device_type: "cpu", "cuda", …
        impl: the kernel set, "torch", "cpp", "triton" or "tiled".
        arch: key in `RATES`, or None.
        factored: whether rows have factors that are applied to the [C, H] sides, which takes float32 copies of them.
        ordered: whether the vocabulary is taken in another order.
        limits: of this device.
        strided: whether the weight has no unit stride along H, as the tile kernels need it.
        tile: columns of a tile that is skipped, or not; 0 where nothing is.
        kept: whether the memory of a call that skips is kept from earlier ones.
        trained: columns of the weight that have a gradient, where the weight is put together of several tensors (LoRA's
            columns beside a frozen W, codes and scales); None where it is one tensor. Slices of it are put together
            like converted ones.
    """

    vocab: int
    width: int
    acc: int
    gemm: int
    convert: bool
    accumulate: bool
    device_type: str
    impl: str = "torch"
    arch: str | None = None
    factored: bool = True
    ordered: bool = False
    limits: Limits = GPU_LIMITS
    strided: bool = False
    tile: int = 0
    kept: bool = False
    trained: int | None = None

    @property
    def columns(self) -> int:
        """Of logits that are formed by one product; V but for float32 and float64 products on a CPU."""
        return min(self.vocab, self.limits.columns)

    @property
    def summed(self) -> int:
        """Columns of the head's gradient."""
        return self.width if self.trained is None else self.trained

    @property
    def summing(self) -> bool:
        """Whether several chunks of a single pass sum dW in a buffer of its own."""
        return self.accumulate or self.ordered

    @property
    def dw(self) -> int:
        """Units of the product that makes it: a few columns count for nothing."""
        return int(2 * self.summed > self.width)

    @property
    def sliced(self) -> bool:
        """Whether logits that are only scored are held a slice of the vocabulary at a time."""
        return self.impl == "cpp"

    @property
    def pad(self) -> int:
        """Elements between the rows of a slice of logits."""
        return PAD if self.device_type == "cpu" else 0

    def skipping(self, ordered: bool, kept: bool) -> Sizes:
        """The same where tiles may be skipped; `ordered`: with the vocabulary in another order, its rows are gathered
        and those of dW scattered."""
        tile = mass_tile(self.device_type)
        return self._replace(tile=tile, kept=kept, convert=self.convert or ordered, ordered=ordered)

    @property
    def logit(self) -> int:
        """Bytes of an element of the [C, V] buffer."""
        return self.gemm if self.impl == "tiled" else self.acc

    @property
    def room(self) -> int:
        """Length of a row of that buffer: V, for Triton rounded up so that all rows start alike."""
        return -(-self.vocab // 16) * 16 if self.impl in ("triton", "tiled") else self.vocab

    @property
    def scratch(self) -> int:
        """Blocks of logits beside that buffer: what torch's row operations pass through."""
        return 4 if self.impl == "torch" else 0


def gemm_dtype(device_type: str, weight: torch.dtype, compute: torch.dtype, impl: str) -> torch.dtype:
    """Operands of the products. 16-bit ones need float32 results: on CUDA, and with the C++ kernels for a bfloat16
    weight on a CPU that has the instructions. Elsewhere slices of them are converted to float32; float64 stays."""
    native = impl == "cpp" and weight == compute == torch.bfloat16 and cpp_rows.BF16_PRODUCTS
    return compute if compute == torch.float64 or device_type == "cuda" or native else torch.float32


def mass_tile(device_type: str) -> int:
    """Columns of a tile of the vocabulary that is left out, or not, for a row."""
    return MASS_TILE.get(device_type, MASS_TILE["cuda"])


def sizes(
    vocab: int,
    width: int,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device_type: str,
    impl: str = "torch",
    arch: str | None = None,
    strided: bool = False,
    trained: int | None = None,
) -> Sizes:
    """`Sizes` of a head [vocab, width] used in `compute_dtype` (the autocast type, else that of the hidden states)."""
    gemm = gemm_dtype(device_type, weight_dtype, compute_dtype, impl)
    acc = 8 if weight_dtype == torch.float64 else 4
    convert = gemm != weight_dtype or (strided and impl == "tiled") or trained is not None
    factored = impl != "triton" or convert or gemm == torch.float16
    limits = cpu_limits() if device_type == "cpu" else GPU_LIMITS
    if impl == "tiled":
        limits = limits._replace(columns=vocab)
    return Sizes(
        vocab, width, acc, gemm.itemsize, convert, weight_dtype.itemsize < 4, device_type, impl, arch, factored,
        limits=limits, strided=strided, trained=trained,
    )  # fmt: skip


def convert_rows(s: Sizes, workspace: int) -> int:
    """Rows of the weight converted at a time, 0 where no conversion is needed."""
    if not s.convert:
        return 0
    rows = max(1, min(CONVERT_BYTES.get(s.device_type, CONVERT_BYTES["cuda"]), workspace // 8) // (s.width * s.gemm))
    tile = mass_tile(s.device_type)
    return min(s.vocab, rows if rows < tile else rows // tile * tile)


def picked_columns(s: Sizes, workspace: int) -> int:
    """Columns whose rows are picked at a time, where tiles may be skipped: whole tiles, one at least."""
    if not s.tile:
        return 0
    fit = workspace // 8 // (s.width * (s.gemm + s.acc))
    return min(s.vocab, max(1, min(fit, MIN_COLUMNS) // s.tile) * s.tile)


def row_chunk(
    s: Sizes, workspace: int, tokens: int, accumulator: bool = False, score_only: bool = False
) -> tuple[int, int]:
    """(C, bytes held) of a sweep that takes all of V for C rows at a time; `score_only`: nothing is pulled back.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    fixed = convert_rows(s, workspace) * (s.width * s.gemm + s.summed * s.acc * s.accumulate)
    if accumulator:
        fixed += s.vocab * (s.summed + 1) * s.acc
    logits = s.room * s.logit
    row = logits + _row_sides(s)
    if s.impl == "tiled":
        logits = 0 if score_only else logits
        row = logits + _row_sides(s) + 3 * s.acc * -(-s.vocab // PARTIAL_TILE)
    most = min(tokens, s.limits.rows)
    if s.tile:
        picked = picked_columns(s, workspace)
        fixed += picked * s.width * (s.gemm + s.acc)
        row += -(-s.vocab // s.tile) * CHOICE_BYTES + picked * s.gemm + s.width * (s.gemm + 2 * s.acc)
        most = max(most, min(tokens, MAX_SKIPPING * s.kept))
    if score_only and s.sliced:
        row = (s.columns + PAD) * s.acc + _row_sides(s)
        most = min(tokens, s.limits.scored)
    return _rows_that_fit(workspace, fixed, row, s.vocab, most, s)


def _rows_that_fit(workspace: int, fixed: int, row: int, vocab: int, most: int, s: Sizes) -> tuple[int, int]:
    """(rows, bytes held), at most `most` rows of `row` bytes each, with the scratch blocks of `vocab` columns."""
    block = torch_rows.block_rows(vocab, s.acc, s.device_type)
    scratch = s.scratch * vocab * s.acc
    rows = (workspace - fixed) // (row + scratch)
    if rows > block:
        rows = (workspace - fixed - block * scratch) // row
    if rows < 1:
        raise ValueError(
            f"workspace: expected at least {fixed + row + scratch} bytes "
            f"(one row of {vocab} logits and its scratch), got {workspace}"
        )
    rows = min(rows, most)
    if s.device_type != "cpu" and ROW_TILE < rows < most < s.limits.rows:
        chunks = -(-most // (rows // ROW_TILE * ROW_TILE))
        rows = -(-most // (chunks * ROW_TILE)) * ROW_TILE  # chunks of equal length
    return rows, fixed + rows * row + min(rows, block) * scratch


def _row_sides(s: Sizes) -> int:
    """Bytes of one row on the [C, H] sides: gathered, converted, times its factor, and a result."""
    return s.width * (4 + 2 * s.gemm + s.acc if s.factored else 2 * s.gemm)


def single_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int]:
    """`row_chunk` of a single pass: with a sum of dW where one chunk isn't all and the head is 16-bit, or in an order.

    Raises:
        ValueError: `workspace` doesn't hold one row, and that sum where it is needed.
    """
    rows, held = row_chunk(s, workspace, tokens)
    several = s.summing and rows < tokens
    return row_chunk(s, workspace, tokens, accumulator=True) if several else (rows, held)


def slice_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int, int]:
    """(rows, slice, bytes held) of a sweep that finishes dW for a slice of V over all rows at a time.

    On a GPU slices are as wide as they can be with all rows in one chunk: then the product itself is the finished dW.
    Otherwise, and on a CPU, a slice of it is summed over chunks of rows.
    """
    for step in _wide_slices(s):
        rows, held = _slice_rows(s, workspace, step, tokens)
        if rows >= tokens > 0:
            return rows, step, held
    step, row, column = _narrow_slice(s, workspace)
    rows, held = _rows_that_fit(workspace, step * column, row, step, max(tokens, 1), s)
    return rows, step, held


def _wide_slices(s: Sizes) -> Iterator[int]:
    """Slices to try on a GPU, from the widest."""
    step = min(s.vocab, s.limits.slice)
    while s.device_type != "cpu":
        yield step
        if step <= MIN_SLICE:
            return
        step = max(MIN_SLICE, step // 2)


def _slice_rows(s: Sizes, workspace: int, step: int, tokens: int) -> tuple[int, int]:
    """(rows, bytes held) beside a slice of dW that is the product itself; (0, 0) where not one row fits."""
    column = s.width * s.gemm * s.convert + s.summed * s.acc * s.ordered
    try:
        return _rows_that_fit(workspace, step * column, step * s.logit + _row_sides(s), step, max(tokens, 1), s)
    except ValueError:
        return 0, 0


def _narrow_slice(s: Sizes, workspace: int) -> tuple[int, int, int]:
    """(columns, bytes of a row, bytes of a column) where a slice of dW is summed over chunks of rows."""
    step = min(s.vocab, s.limits.slice)
    step = step if s.device_type == "cpu" else min(step, MIN_SLICE)
    column = s.width * s.gemm * s.convert + s.summed * s.acc * (s.accumulate or s.ordered)
    if column:
        step = max(1, min(step, workspace // 2 // column))
    sides = _row_sides(s) + s.pad * s.logit
    while step > 1 and workspace - step * column < step * (s.logit + s.scratch * s.acc) + sides:
        step = -(-step // 2)
    return step, step * s.logit + sides, column


@remembered
def chunks(s: Sizes, workspace: int, path: str) -> Chunks:
    """What the loops of `path` hold at a time, for any number of tokens.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    sample = 0
    if s.ordered:
        sample, _ = row_chunk(s._replace(impl="torch", ordered=False), workspace, ANY)
    scored, _ = row_chunk(s, workspace, ANY, score_only=True)
    rows = scored if path == "forward" else row_chunk(s, workspace, ANY)[0]
    summed = rows
    if path == "single" and s.summing:
        try:
            summed, _ = row_chunk(s, workspace, ANY, accumulator=True)
        except ValueError:
            summed = 0  # the plan takes a single pass for what fits one chunk
    slices: list[tuple[int, int]] = []
    if path == "two_pass":
        slices = [(step, rows) for step in _wide_slices(s) if (rows := _slice_rows(s, workspace, step, ANY)[0])]
        step, row, column = _narrow_slice(s, workspace)
        slices.append((step, _rows_that_fit(workspace, step * column, row, step, ANY, s)[0]))
    picked = picked_columns(s, workspace)
    converted = convert_rows(s, workspace)
    return Chunks(rows, scored, summed, tuple(slices), converted, s.columns, s.room, s.pad, picked, sample)


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
    if unit_tokens is None or made.path != "single" or made.rows >= tokens:
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
    return head._replace(impl=impl, convert=convert, factored=impl != "triton" or head.factored)


def _plan(head: Sizes, request: Request) -> Plan:
    """`plan` on the kernel set of `head`."""
    tokens, workspace = request.tokens, request.workspace
    hidden_grad, weight_grad = request.hidden_grad, request.weight_grad
    gradient = hidden_grad or weight_grad
    rows, held = row_chunk(head, workspace, tokens, score_only=not gradient)
    unit = 2 * tokens * head.vocab * head.width

    def made(path: str, reason: str, units: int, rows: int, held: int) -> Plan:
        if request.path not in ("auto", path):
            raise ValueError(f"path: expected 'auto' or {path!r}, since {reason}; got {request.path!r}")
        seconds = _seconds(head, path, units, tokens, rows, workspace)
        return Plan(path, reason, units, rows, held, units * unit, head.impl, seconds)

    if not gradient:
        return made("forward", "no gradient is asked for", 1, rows, held)
    if request.entropy_grad:
        units = 1 + 2 * hidden_grad + (1 + head.dw) * weight_grad
        held = max(held, slice_chunk(head, workspace, tokens)[2]) if weight_grad else held
        path = "two_pass" if weight_grad else "frozen"
        return made(path, "the gradient of the entropy needs the logits again", units, rows, held)
    why = _not_single(head, request)
    if not weight_grad and (request.path == "frozen" or why is not None or not request.skipping):
        return made(
            "frozen", "the head has no gradient: the forward accumulates that of the hidden states", 2, rows, held
        )
    both = max(held, slice_chunk(head, workspace, tokens)[2])
    dw = int(head.dw and weight_grad)
    two_pass_units = 2 + hidden_grad + dw
    if why is not None or request.path == "two_pass":
        return made("two_pass", why or "it was asked for", two_pass_units, rows, both)
    single_rows, single_held = single_chunk(head, workspace, tokens)
    why = f"coefficients are known chunk by chunk (couples a {request.couples})"
    if request.path != "auto" or not weight_grad:
        return made("single", why, 1 + hidden_grad + dw, single_rows, single_held)
    single, twice = made("single", why, 1 + hidden_grad + dw, single_rows, single_held), 0.0
    two_pass = made("two_pass", "the sum of dW over many chunks would cost more", two_pass_units, rows, both)
    if single_rows < tokens and request.unit_tokens is not None:
        twice, longest = _swept_twice(head, workspace, request.unit_tokens())
        if twice >= MOST_TWICE:
            longer = f"longer than a single pass's chunk of {longest:,} rows"
            reason = f"most tokens are in a {request.couples} {longer}, which would be swept twice"
            return two_pass._replace(reason=reason)
    seconds = _seconds(head, "single", single.units + twice, tokens, single.rows, workspace)
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
    rows, _ = single_chunk(head, workspace, max(total, 1))
    return sum(count for count in unit_tokens if count > rows) / max(total, 1), rows


def _not_tiled(head: Sizes, request: Request) -> str | None:
    """What the tile kernels lack for this request, or None."""
    if head.impl != "tiled":
        return None
    if request.half and (request.hidden_grad or request.weight_grad):
        return (
            "expected another for float16 gradients, whose range is too narrow for weights before they are normalised"
        )
    tile = mass_tile(head.device_type)
    if request.skipping and 0 < convert_rows(head, request.workspace) < min(tile, head.vocab):
        return f"expected another, since the workspace doesn't hold {tile} converted rows of the weight"
    return None


def _seconds(head: Sizes, path: str, units: float, tokens: int, rows: int, workspace: int) -> float | None:
    """`predicted_seconds` where there are rates: for 16-bit products on a GPU."""
    if head.arch is None or head.gemm != 2:
        return None
    return predicted_seconds(head, RATES[head.arch], path, units, tokens, rows, workspace)


def predicted_seconds(
    head: Sizes, rates: Rates, path: str, units: float, tokens: int, rows: int, workspace: int
) -> float:  # fmt: skip
    """Products at their rates, and what passes through memory between them; nothing is assumed to overlap."""
    sweeps = {"two_pass": 2}.get(path, 1)  # how often logits are formed
    unit, logits = 2 * tokens * head.vocab * head.width, tokens * head.vocab
    if head.impl == "tiled":
        moved = 0 if path == "forward" else sweeps * head.gemm  # E written
        products = unit * (sweeps / rates.tile + (units - sweeps) / rates.library)
    else:  # logits written and read for statistics; then read again, and D written
        first = 2 * head.acc + (0 if path == "forward" else head.acc + head.gemm)
        moved = first + (sweeps - 1) * (2 * head.acc + head.gemm)
        products = unit * units / rates.library
    if path == "two_pass":
        rows = slice_chunk(head, workspace, tokens)[0]
    chunks = max(1, -(-tokens // max(rows, 1))) if path in ("single", "two_pass") else 1
    # written by the first chunk, read and written by the others; then read, and written in 16 bits
    sums = 0 if chunks == 1 else head.vocab * head.summed * (4 * (2 * chunks - 1) + (4 + 2) * head.accumulate)
    return products + (logits * moved + sums) / rates.copy
