"""What fits a workspace, whatever the number of tokens: pure arithmetic on shapes.

The door puts `chunks` into the `Call`, and no loop asks again.

Dimensions: N tokens, V vocabulary, H hidden size, C rows of logits that are formed at a time, K rows whose E is
multiplied at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from rgpb.engine.rates import CACHED, RATES, Rates, product_seconds
from rgpb.engine.skipping import CHOICE_BYTES
from rgpb.kernels import cpp_rows, torch_rows, tuned
from rgpb.kernels.types import ALIGNED, PAD, aligned

# Columns of logits that a CPU forms by one float32 product, for each thread: wider ones have been seen to take a tenth
# longer (docs/performance.md). At least MIN_COLUMNS, of which each tile's columns are a part.
COLUMNS = 512
MIN_COLUMNS = 1024
# Slices of a product with all rows at once aren't narrower: 8 tiles of 128 columns.
MIN_SLICE = 1024
# On a GPU rows come in multiples of a product's tile, or the last of its tiles is mostly empty.
ROW_TILE = 128
# Rows of float32 logits formed at a time, at most, where E is kept apart: more don't make that product faster.
MOST_LOGITS = 1024
# So many multiples of ROW_TILE below the most that fits are looked at for one that fills the multiprocessors.
WAVES_TRIED = 16
# Columns whose softmax mass is kept together, where gradients may be skipped: narrow tiles leave out more. On a GPU two
# tiles of a product's result, or one of the tile kernels.
MASS_TILE = {"cpu": 256, "cuda": 256}
# At least so many rows of a chunk, where gradients may be skipped in memory that is kept: of a narrow tile only a few
# rows count. In new memory a chunk of that size would cost more than it saves.
MAX_SKIPPING = 4096
# Columns of one tile kernel's tile, at the least: there are so many partial statistics to a row.
PARTIAL_TILE = 64
# A slice of a 16-bit weight converted to float32, where the device has no mixed-precision product.
CONVERT_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
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
        sweeps: (C, K) of a sweep over all of V, preferred ones first: C rows of logits are formed at a time, and the E
            of K rows is multiplied at once. All but the last are for calls of at most K rows. The last of a single
            pass with a 16-bit head fits beside a float32 sum of dW.
        scored_rows: C where nothing is pulled back.
        slices: (columns, C, K) of a sweep that finishes dW slice by slice, widest slices first.
        apart: whether E is kept apart from the logits, in the operands' type; else it lies over them, and K is C.
        weighs: whether a sweep leaves weights apart, so that E needs no logits once coefficients are known.
        even: whether chunks are of about equal length; else all but the last are full.
        converted: rows of the weight converted to the operands' dtype at a time; 0 where none has to be.
        columns: of logits formed by one product.
        room: length of a row of the buffer of logits.
        pad: elements between the rows of a slice of logits; 0 where these come in multiples of `ALIGNED`.
        picked: columns whose rows are picked at a time, where tiles may be skipped.
        sample_rows: rows that an order of the vocabulary may be estimated from; 0 where none is asked for.
    """

    sweeps: tuple[tuple[int, int], ...]
    scored_rows: int
    slices: tuple[tuple[int, int, int], ...]
    apart: bool
    weighs: bool
    even: bool
    converted: int
    columns: int
    room: int
    pad: int
    picked: int
    sample_rows: int

    def sweep_for(self, tokens: int) -> tuple[int, int]:
        """(C, K) of a sweep over so many rows."""
        chunk, together = _first_that_holds(self.sweeps, tokens)
        return min(chunk, tokens), min(together, tokens)

    def slice_for(self, tokens: int) -> tuple[int, int, int]:
        """The widest slice whose sweep takes all rows at once, else the narrowest: (columns, C, K)."""
        columns, chunk, together = _first_that_holds(self.slices, tokens)
        return columns, min(chunk, tokens), min(together, tokens)


Each = TypeVar("Each", bound=tuple[int, ...])


def _first_that_holds(each: Sequence[Each], tokens: int) -> Each:
    """The first of some (…, K) with K ≥ tokens, else the last."""
    return next((some for some in each if some[-1] >= tokens), each[-1])


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
        ordered: whether the vocabulary is taken in another order.
        limits: of this device.
        strided: whether the weight has no unit stride along H, as the tile kernels need it.
        tile: columns of a tile that is skipped, or not; 0 where nothing is.
        kept: whether the memory of a call that skips is kept from earlier ones.
        half: whether the operands of the products are float16.
        softcap: whether logits are soft-capped, which the row kernels' instructions are counted for.
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
    ordered: bool = False
    limits: Limits = GPU_LIMITS
    strided: bool = False
    tile: int = 0
    kept: bool = False
    trained: int | None = None
    softcap: bool = False
    half: bool = False

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
    def factored(self) -> bool:
        """Whether rows have factors that are applied to the [K, H] sides also where a sweep leaves no weights."""
        return self.impl != "triton" or self.convert or self.half

    @property
    def sliced(self) -> bool:
        """Whether logits that are only scored are held a slice of the vocabulary at a time."""
        return self.impl == "cpp"

    @property
    def aligned(self) -> bool:
        """Whether rows of the buffers start at multiples of `ALIGNED` elements."""
        return self.device_type != "cpu" or self.impl in ("triton", "tiled") or self.apart

    @property
    def pad(self) -> int:
        """Elements between the rows of a slice of logits; 0 where they are aligned."""
        return 0 if self.aligned else PAD

    @property
    def apart(self) -> bool:
        """Whether E is kept apart from its logits: 16-bit beside float32, and used by nothing but the products."""
        return self.gemm == 2 and self.impl in ("triton", "torch") and not self.tile

    @property
    def weighs(self) -> bool:
        """Whether a sweep leaves weights apart, so that E needs no logits once coefficients are known. The range of
        float16 is too narrow for the Triton kernels' weights, which aren't normalised."""
        return self.apart and not (self.impl == "triton" and self.half)

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
        """Length of a row of that buffer: V, on a GPU rounded up so that all rows start alike."""
        return aligned(self.vocab) if self.aligned else self.vocab

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
    softcap: bool = False,
) -> Sizes:
    """`Sizes` of a head [vocab, width] used in `compute_dtype` (the autocast type, else that of the hidden states)."""
    gemm = gemm_dtype(device_type, weight_dtype, compute_dtype, impl)
    acc = 8 if weight_dtype == torch.float64 else 4
    convert = gemm != weight_dtype or (strided and impl == "tiled") or trained is not None
    limits = cpu_limits() if device_type == "cpu" else GPU_LIMITS
    if impl == "tiled":
        limits = limits._replace(columns=vocab)
    return Sizes(
        vocab, width, acc, gemm.itemsize, convert, weight_dtype.itemsize < 4, device_type, impl, arch,
        limits=limits, strided=strided, trained=trained, softcap=softcap,
        half=gemm == torch.float16,
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


class TooSmall(ValueError):
    """A workspace of `got` bytes, which doesn't hold one row of `columns` logits; `least` bytes are what is known to be
    needed."""

    def __init__(self, least: int, columns: int, got: int):
        self.least, self.columns = least, columns
        super().__init__(
            f"workspace: expected at least {least} bytes (one row of {columns} logits and its scratch), got {got}"
        )


class Held(NamedTuple):
    """Bytes of a sweep: whatever its rows are, of each of the C rows of logits, of each of the K rows of E apart."""

    fixed: int
    logits: int
    kept: int
    columns: int

    def of(self, s: Sizes, chunk: int, together: int) -> int:
        """In all, with the scratch blocks of so many columns."""
        block = torch_rows.block_rows(self.columns, s.acc, s.device_type)
        scratch = min(chunk, block) * s.scratch * self.columns * s.acc
        return self.fixed + chunk * self.logits + together * self.kept + scratch

    def rows(self, s: Sizes, workspace: int, per_logits: int = 0) -> int:
        """The most rows of logits that fit, with `per_logits` rows of E apart for each.

        Raises:
            ValueError: none does.
        """
        block = torch_rows.block_rows(self.columns, s.acc, s.device_type)
        scratch, row = s.scratch * self.columns * s.acc, self.logits + per_logits * self.kept
        rows = (workspace - self.fixed) // (row + scratch)
        if rows > block:
            rows = (workspace - self.fixed - block * scratch) // row
        if rows < 1:
            raise TooSmall(self.fixed + row + scratch, self.columns, workspace)
        return rows


def sweep_bytes(s: Sizes, workspace: int, accumulator: bool = False, score_only: bool = False) -> Held:
    """Of a sweep over all of V; `score_only`: nothing is pulled back."""
    fixed = convert_rows(s, workspace) * (s.width * s.gemm + s.summed * s.acc * s.accumulate)
    if accumulator:
        fixed += s.vocab * (s.summed + 1) * s.acc
    logits, sides = s.room * s.logit, _row_sides(s)
    if s.device_type != "cpu" and score_only:
        sides = s.width * s.gemm
    if s.impl == "tiled":
        logits = (0 if score_only else logits) + 3 * s.acc * -(-s.vocab // PARTIAL_TILE)
    if s.tile:
        picked = picked_columns(s, workspace)
        fixed += picked * s.width * (s.gemm + s.acc)
        logits += -(-s.vocab // s.tile) * CHOICE_BYTES + picked * s.gemm + s.width * (s.gemm + 2 * s.acc)
    if score_only and s.sliced:
        logits = (s.columns + PAD) * s.acc
    if s.apart and not score_only:
        return Held(fixed, logits + s.width * s.gemm, s.room * s.gemm + sides, s.vocab)
    return Held(fixed, logits + sides, 0, s.vocab)


def _row_sides(s: Sizes, sliced: bool = False) -> int:
    """Bytes of one row on the [C, H] sides: gathered, converted, times its factor, and a result. `sliced`: of a sweep
    over slices of V, from known statistics."""
    if s.device_type == "cpu" and not s.apart:
        return s.width * (4 + 2 * s.gemm + s.acc if s.factored else 2 * s.gemm)
    factored = s.factored or (s.weighs and not sliced)  # weights leave one
    # a row of dX in accumulators, and of half as many rounded; or one of X gathered, and times its factor
    sides = max(s.acc + s.gemm // 2, 2 * s.gemm) if factored else s.gemm
    return s.width * (sides + s.gemm * (not s.apart))


def sweeps(
    s: Sizes, workspace: int, most: int = ANY, accumulator: bool = False, score_only: bool = False
) -> tuple[tuple[int, int], ...]:
    """(C, K) that fit, as `Chunks.sweeps` has them; `most`: rows of a chunk that a CPU gains from.

    Args:
        accumulator: whether the last is beside a float32 sum of dW. It is left out where that doesn't fit.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """

    def seconds(chunk: int, together: int) -> float:
        rates = RATES[s.arch or "sm_90"]
        made = formed_seconds(s, rates, together, chunk, s.vocab)
        if score_only:
            return made
        made += product_seconds(rates, together, s.width, s.vocab, s.gemm)
        if accumulator:
            made += product_seconds(rates, s.vocab, s.width, together, s.gemm) + 8 * s.vocab * s.summed / rates.copy
        return made

    held = sweep_bytes(s, workspace, False, score_only)
    found = _that_fit(s, workspace, held, most)
    try:
        beside = sweep_bytes(s, workspace, accumulator, score_only)
        return *found, _fastest_that_fits(s, _that_fit(s, workspace, beside, most), seconds)
    except ValueError:
        return found


def _that_fit(s: Sizes, workspace: int, held: Held, most: int) -> tuple[tuple[int, int], ...]:
    """(C, K) with the most K for each C, those that form logits fastest first; in place C is K."""
    if not held.kept:
        rows = min(held.rows(s, workspace), most)
        return ((rows, rows),)
    few = held.rows(s, workspace, 1)
    tiles = [chunk for chunk in range(MOST_LOGITS, 0, -ROW_TILE) if chunk <= few]
    rates = RATES[s.arch or "sm_90"]
    tiles.sort(key=lambda chunk: formed_seconds(s, rates, chunk, chunk, held.columns) / chunk)
    found: list[tuple[int, int]] = []
    for chunk in tiles or [max(1, few // 2)]:
        together = min((workspace - held.of(s, chunk, 0)) // held.kept, s.limits.rows)
        if not found or together > found[-1][1]:
            found.append((chunk, together))
    return tuple(found)


def _fastest_that_fits(
    s: Sizes, fitting: tuple[tuple[int, int], ...], seconds: Callable[[int, int], float]
) -> tuple[int, int]:
    """The (C, K) with the least time per row: whole tiles of rows, in waves that fill a GPU's multiprocessors."""
    if s.device_type == "cpu" and not s.apart:
        return fitting[-1]
    tried = []
    for chunk, most in fitting:
        top = most // ROW_TILE * ROW_TILE if most > ROW_TILE else most
        for together in range(top, max(0, top - WAVES_TRIED * ROW_TILE), -ROW_TILE):
            tried.append((together if chunk == most else min(chunk, together), together))
    return min(tried, key=lambda each: (seconds(*each) / each[1], -each[1], -each[0]))


def row_chunk(
    s: Sizes, workspace: int, tokens: int, accumulator: bool = False, score_only: bool = False
) -> tuple[int, int, int]:
    """(C, K, bytes held) of a sweep that takes all of V for C rows of logits and K rows of E at a time; `score_only`:
    nothing is pulled back; `accumulator`: dW is summed beside it, unless one K is all.

    Raises:
        ValueError: `workspace` doesn't hold one row, and that sum where it is needed.
    """
    most = min(tokens, s.limits.scored if score_only and s.sliced else s.limits.rows)
    if s.tile and not (score_only and s.sliced):
        most = max(most, min(tokens, MAX_SKIPPING * s.kept))
    fitting = sweeps(s, workspace, most, accumulator, score_only)
    chunk, together = (min(rows, tokens) for rows in _first_that_holds(fitting, tokens))
    beside = accumulator and together < tokens
    held = sweep_bytes(s, workspace, beside, score_only)
    if beside:
        held.rows(s, workspace, s.apart)  # raises
    return chunk, together, held.of(s, chunk, together)


def single_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int, int]:
    """`row_chunk` of a single pass: with a sum of dW where one chunk isn't all and the head is 16-bit, or in an order.

    Raises:
        ValueError: `workspace` doesn't hold one row, and that sum where it is needed.
    """
    return row_chunk(s, workspace, tokens, accumulator=s.summing)


def slice_chunk(s: Sizes, workspace: int, tokens: int) -> tuple[int, int, int, int]:
    """(columns, C, K, bytes held) of a sweep that finishes dW for a slice of V over all rows at a time.

    On a GPU slices are as wide as they can be with all rows in one product: then that is the finished dW. Otherwise,
    and on a CPU, a slice of it is summed over chunks of rows.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    fitting = slices(s, workspace, max(tokens, 1))
    columns, chunk, together = _first_that_holds(fitting, max(tokens, 1))
    chunk, together = min(chunk, max(tokens, 1)), min(together, max(tokens, 1))
    whole = columns in _wide_slices(s) and together >= tokens > 0
    return columns, chunk, together, _slice_bytes(s, columns, not whole).of(s, chunk, together)


def slices(s: Sizes, workspace: int, most: int = ANY) -> tuple[tuple[int, int, int], ...]:
    """(columns, C, K) that fit, as `Chunks.slices` has them.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    found: list[tuple[int, int, int]] = []
    for columns in _wide_slices(s):
        with suppress(ValueError):
            found.append((columns, *_that_fit(s, workspace, _slice_bytes(s, columns, False), most)[0]))
    columns = _narrow_slice(s, workspace)

    def seconds(chunk: int, together: int) -> float:
        rates = RATES[s.arch or "sm_90"]
        made = formed_seconds(s, rates, together, chunk, columns)
        return made + product_seconds(rates, columns, s.width, together, s.gemm)

    fitting = _that_fit(s, workspace, _slice_bytes(s, columns, True), most)
    return *found, (columns, *_fastest_that_fits(s, fitting, seconds))


def _wide_slices(s: Sizes) -> Iterator[int]:
    """Slices to try on a GPU, from the widest."""
    step = min(s.vocab, s.limits.slice)
    while s.device_type != "cpu":
        yield step
        if step <= MIN_SLICE:
            return
        step = max(MIN_SLICE, step // 2)


def _slice_bytes(s: Sizes, columns: int, summed: bool) -> Held:
    """Of a sweep over a slice of V; `summed`: whether dW of it is a sum over chunks, else the product itself."""
    sums = s.summed * s.acc * (s.ordered or (summed and s.accumulate))
    fixed = columns * (s.width * s.gemm * s.convert + sums)
    length = aligned(columns) if s.aligned else columns + s.pad * summed
    if s.apart:
        return Held(fixed, length * s.acc + s.width * s.gemm, length * s.gemm + _row_sides(s, sliced=True), columns)
    return Held(fixed, length * s.logit + _row_sides(s, sliced=True), 0, columns)


def _narrow_slice(s: Sizes, workspace: int) -> int:
    """Columns of a slice of dW that is summed over chunks of rows."""
    step = min(s.vocab, s.limits.slice)
    step = step if s.device_type == "cpu" else min(step, MIN_SLICE)
    column = _slice_bytes(s, 1, True).fixed
    if column:
        step = max(1, min(step, workspace // 2 // column))
    while step > 1:
        held = _slice_bytes(s, step, True)
        if held.of(s, 0, 0) + held.logits + held.kept + s.scratch * step * s.acc <= workspace:
            break
        step = -(-step // 2)
    return step if step < ALIGNED or not s.aligned or step == s.vocab else step // ALIGNED * ALIGNED


@remembered
def chunks(s: Sizes, workspace: int, path: str) -> Chunks:
    """What the loops of `path` hold at a time, for any number of tokens.

    Raises:
        ValueError: `workspace` doesn't hold one row.
    """
    sample = 0
    if s.ordered:
        sample = row_chunk(s._replace(impl="torch", ordered=False), workspace, ANY)[0]
    scored = row_chunk(s, workspace, ANY, score_only=True)[0]
    found: tuple[tuple[int, int], ...] = ((scored, scored),)
    if path != "forward":
        most = max(s.limits.rows, MAX_SKIPPING * s.kept) if s.tile else s.limits.rows
        found = sweeps(s, workspace, most, accumulator=path == "single" and s.summing)
    sliced = slices(s, workspace) if path == "two_pass" else ()
    picked = picked_columns(s, workspace)
    converted = convert_rows(s, workspace)
    even = s.device_type == "cpu" and not s.apart
    return Chunks(
        found, scored, sliced, s.apart and path != "forward", s.weighs, even, converted, s.columns, s.room, s.pad,
        picked, sample,
    )  # fmt: skip


def formed_seconds(s: Sizes, rates: Rates, rows: int, chunk: int, columns: int) -> float:
    """The products that form logits of `rows` rows, so many at a time, and what these take to be written and read once
    in the accumulators' type."""
    whole, rest = divmod(rows, chunk)
    one = product_seconds(rates, chunk, columns, s.width, s.gemm)
    made = whole * one + product_seconds(rates, rest, columns, s.width, s.gemm)
    cached = CACHED if 2 * chunk * columns * s.acc <= rates.cache else 1.0
    return made + (s.impl != "tiled") * 2 * s.acc * rows * columns / rates.copy / cached
