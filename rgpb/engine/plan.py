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
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from rgpb.engine.skipping import CHOICE_BYTES
from rgpb.kernels import cpp_rows, torch_rows, tuned
from rgpb.kernels.types import ALIGNED, PAD, aligned

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
# On a GPU rows come in multiples of a product's tile, or the last of its tiles is mostly empty.
ROW_TILE = 128
# Tiles of the library's 16-bit products, and the part of its rate that each reaches. [128 × 256] needs 48 bytes a cycle
# of the L2 cache's 64 at a multiprocessor's full rate; [128 × 128] needs all 64: its part is an assumption.
PRODUCT_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.85}
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
    """What a device does.

    Attributes:
        library, tile: flops a second of a 16-bit library product, and of the tile kernels' products.
        copy: bytes copied in a second.
        multiprocessors: that take tiles of products; 0 where these don't come in waves.
        clock: cycles a second of a multiprocessor, which issues four instructions of 32 threads in each.
        cache: bytes of the L2 cache.
    """

    library: float
    tile: float
    copy: float
    multiprocessors: int = 0
    clock: float = 0.0
    cache: int = 0


def _assumed(library: float, copy: float, multiprocessors: int, clock: float, cache: int) -> Rates:
    """Tile kernels at three quarters of the library's rate: an assumption, until a GPU has run them."""
    return Rates(library, 0.75 * library, copy, multiprocessors, clock, cache * 2**20)


# Per architecture. sm_90: what PyTorch has been seen to reach on an H200; the others are nine tenths of what vendors
# print for copies and eight tenths for products (A100, B200, RTX 5090, MI300X).
RATES = {
    "sm_80": _assumed(250e12, 1.8e12, 108, 1.41e9, 40),
    "sm_90": _assumed(788e12, 4.3e12, 132, 1.98e9, 50),
    "sm_100": _assumed(1800e12, 7.2e12, 148, 1.85e9, 126),
    "sm_120": _assumed(168e12, 1.6e12, 170, 2.4e9, 96),
    "gfx9": _assumed(1045e12, 4.8e12, 304, 2.1e9, 256),
}

# What is written and read again while it takes at most half of the L2 cache passes at so many times the rate of copies:
# an assumption.
CACHED = 1.5

# Instructions that a thread issues for a logit in the row kernels, in machine code for sm_90 (docs/kernels.md): in a
# sweep for statistics, one that writes weights as well, one that writes dlogits; and what a soft-cap adds.
STATISTICS_ISSUES, WEIGHTS_ISSUES, DLOGITS_ISSUES, SOFTCAP_ISSUES = 11.4, 16.1, 6.1, 12.3


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
            raise ValueError(
                f"workspace: expected at least {self.fixed + row + scratch} bytes "
                f"(one row of {self.columns} logits and its scratch), got {workspace}"
            )
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
        made = _formed_seconds(s, rates, together, chunk, s.vocab)
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
    tiles.sort(key=lambda chunk: _formed_seconds(s, rates, chunk, chunk, held.columns) / chunk)
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
        made = _formed_seconds(s, rates, together, chunk, columns)
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


def tile_waves(rows: int, columns: int, tile: tuple[int, int], multiprocessors: int) -> int:
    """How often all multiprocessors take a tile of a [rows, columns] result."""
    return -(-(-(-rows // tile[0]) * -(-columns // tile[1])) // multiprocessors)


def wave_efficiency(rows: int, columns: int, multiprocessors: int) -> float:
    """The part of a library product's rate that is left where its tiles don't fill all multiprocessors, or hang over
    the edge: the best of `PRODUCT_TILES`."""
    if not multiprocessors:
        return 1.0
    return max(
        rate * rows * columns / (tile_waves(rows, columns, tile, multiprocessors) * multiprocessors * tile[0] * tile[1])
        for tile, rate in PRODUCT_TILES.items()
    )


def product_seconds(rates: Rates, rows: int, columns: int, inner: int, itemsize: int) -> float:
    """A library product [rows, inner] × [inner, columns]: its flops in waves of tiles, or its operands' bytes."""
    if not rows * columns * inner:
        return 0.0
    flops = 2 * rows * columns * inner / rates.library / wave_efficiency(rows, columns, rates.multiprocessors)
    return max(flops, itemsize * inner * (rows + columns) / rates.copy) if rates.multiprocessors else flops


def _formed_seconds(s: Sizes, rates: Rates, rows: int, chunk: int, columns: int) -> float:
    """The products that form logits of `rows` rows, so many at a time, and what these take to be written and read once
    in the accumulators' type."""
    whole, rest = divmod(rows, chunk)
    one = product_seconds(rates, chunk, columns, s.width, s.gemm)
    made = whole * one + product_seconds(rates, rest, columns, s.width, s.gemm)
    cached = CACHED if 2 * chunk * columns * s.acc <= rates.cache else 1.0
    return made + (s.impl != "tiled") * 2 * s.acc * rows * columns / rates.copy / cached


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
    tile = mass_tile(head.device_type)
    if request.skipping and 0 < convert_rows(head, request.workspace) < min(tile, head.vocab):
        return f"expected another, since the workspace doesn't hold {tile} converted rows of the weight"
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
        products = _formed_seconds(head, rates, tokens, chunk, head.vocab) + logits * _row_seconds(head, rates, path)
        if again:
            products += head.vocab / columns * _formed_seconds(head, rates, tokens, some, columns)
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
