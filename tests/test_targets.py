"""Every kernel compiled for GPUs that needn't be there, and what the compilers made of it.

Each launch is recorded on CPU tensors, so what is compiled is what the launch functions would launch: the same flags,
configuration and alignment. What no compiler says, whether results are right, is for `tests/interpreted`.

Two translations matter per kernel: PTX or AMD assembly, and the machine code of ptxas, which allocates registers.

What was found stands in receipts.json (registers, bytes of stack and shared memory, and what was asserted), with a hash
of the kernels' sources and the version of Triton. Where both are the same, two kernels are compiled for a check of the
receipts; `--full` compiles all, `make receipts` also writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: an interpreting process can't compile", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton isn't importable: nothing compiles")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from rgpb.kernels import configs, triton_rows, triton_scale, triton_skipping, triton_tiles  # noqa: E402
from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream  # noqa: E402

# triton 3.9 announces another default of a later version
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

KIB = 1024
RECEIPTS = json.loads(Path(__file__).with_name("receipts.json").read_text(encoding="utf-8"))
JUDGED = triton.__version__ == RECEIPTS["triton"]  # another version brings another ptxas: its numbers aren't judged
SPOT = {"sm_90 gradients 0 plain", "gfx9 rows bnf"}  # compiled also without --full: a tile and a row kernel, two makers
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
JOBS = ("score", "weights", "gradients")

# A batch of 256 tokens, a head of 1024 × 512: no kernel is specialised on a size, only on 16 dividing it
C, V, H = 256, 1024, 512
SIZES = {
    "plain": (V, H),
    "flags": (V, H),
    "ragged": (1031, 528),  # no multiples of a block; rows of the operands still start at multiples of 16 bytes
    "padded": (1031, 512),  # the same in rows with room for 16 elements, as the engine's buffers have it
    "unaligned": (1031, 73),  # they don't: no TMA, no vectors
}

# Bytes of stack a thread may spill to, outside the matrix loop: without and with bias, soft-cap and entropy at once
SPILLS = {"plain": 96, "padded": 96, "ragged": 3 * KIB // 2, "flags": 3 * KIB}


class Device(NamedTuple):
    """A target, what its tensor cores' instruction is called, and what one multiprocessor has.

    Attributes:
        matrix: in the PTX or AMD assembly.
        machine: in the machine code, where the loop is looked for.
        program: bytes of shared memory that one program can have.
        shared: bytes of shared memory of a multiprocessor.
        reserved: bytes of it that each program costs besides its own.
    """

    target: GPUTarget
    matrix: str
    machine: str
    program: int
    shared: int
    reserved: int = KIB


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), "mma.sync.aligned", r"\bHMMA", 163 * KIB, 164 * KIB),
    "sm_90": Device(GPUTarget("cuda", 90, 32), "wgmma.mma_async", r"\bHGMMA", 227 * KIB, 228 * KIB),
    "sm_100": Device(GPUTarget("cuda", 100, 32), "tcgen05.mma", r"\bUTC\w*MMA", 227 * KIB, 228 * KIB),
    "sm_120": Device(GPUTarget("cuda", 120, 32), "mma.sync.aligned", r"\bHMMA", 99 * KIB, 100 * KIB),
    "gfx9": Device(GPUTarget("hip", "gfx942", 64), "v_mfma_f32", r"\bv_mfma", 64 * KIB, 64 * KIB, 0),
}


# -- launches → compiled kernels --------------------------------------------------------------------------------------


class Recorder:
    """In place of a kernel: keeps what it was launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def recorded(arch):
    """The launches of a block, none of them made, as on a device of `arch`."""
    launches = []
    with contextlib.ExitStack() as stack:
        for module in (triton_rows, triton_scale, triton_skipping, triton_tiles):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), launches)))
        rows = configs.ROWS.get(arch, configs.ROWS["default"])
        stack.enter_context(mock.patch.object(configs, "rows", return_value=rows))
        stack.enter_context(mock.patch.object(configs, "programs", lambda config, device: config.programs))
        yield launches


def source(kernel, args, kwargs):
    """What Triton would compile for a launch, and with which options."""
    options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
    named = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
    values = kernel.signature.bind(*args, **named).arguments
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned, anew = False, not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (anew and type(value) is int and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        else:
            assert type(value) is int, f"{parameter.name}: expected a tensor, None or an int, got {value!r}"
            signature[parameter.name], aligned = "i32", value % 16 == 0
        if aligned and anew and not parameter.do_not_specialize_on_alignment:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def loops(assembly):
    """The bodies of all loops: from a label to a jump back to it. PTX, AMD assembly, or nvdisasm's output."""
    lines, labels, bodies = [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"\s*([.$]L\w+):", line):
            labels[label[1]] = len(lines)
        lines.append(line)
        if re.search(r"\b(bra|BRA|s_branch|s_cbranch)", line):
            bodies += [lines[labels[to] :] for to in re.findall(r"[.$]L\w+", line) if to in labels]
    return bodies


def innermost(assembly, pattern):
    """The shortest loop with an instruction like `pattern` in it; [] if there is none."""
    found = [body for body in loops(assembly) if any(re.search(pattern, line) for line in body)]
    return min(found, key=len, default=[])


class Compiled(NamedTuple):
    """A kernel of 32 · warps (AMD: 64 · warps) threads.

    Attributes:
        assembly: PTX, or AMD assembly.
        machine: the same again on AMD; else what nvdisasm prints.
        stack: bytes a thread spills to.
    """

    ir: str
    assembly: str
    machine: str
    warps: int
    shared: int
    registers: int
    stack: int


def compiled(arch, launches, tmp_path):
    """The only launch, compiled for `arch`."""
    ((kernel, args, kwargs),) = launches
    made, options = source(kernel, args, kwargs)
    out = triton.compile(made, target=DEVICES[arch].target, options=options)
    common = {"ir": out.asm["ttir"], "warps": options["num_warps"], "shared": out.metadata.shared}
    if "amdgcn" in out.asm:
        text = out.asm["amdgcn"]
        registers, stack, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
            for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        return Compiled(assembly=text, machine=text, registers=registers, stack=stack + 4 * spilled, **common)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(out.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(
        assembly=out.asm["ptx"], machine=tool("nvdisasm", "-c", cubin), registers=registers, stack=stack, **common
    )


def tool(name, *args):
    done = subprocess.run([BIN / name, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# -- receipts ---------------------------------------------------------------------------------------------------------


def sources():
    """A hash of all that decides how a kernel is compiled, but for Triton."""
    texts = [path.read_bytes() for path in sorted(Path(configs.__file__).parent.glob("*.py"))]
    return sha256(b"".join(text for text in texts if b"@triton.jit" in text or b"TILES" in text)).hexdigest()[:16]


def case(name, *values):
    """A kernel to compile, by the name of its receipt; all but two only with --full."""
    return pytest.param(name, *values, id=name, marks=[] if name in SPOT else [pytest.mark.full])


@pytest.fixture
def receipt(request, record_property):
    """Takes a kernel and what was found to hold of it; it has to be what the receipt says."""

    def compare(name, kernel, *facts):
        made = {"registers": kernel.registers, "stack": kernel.stack, "shared": kernel.shared, "facts": [*facts]}
        record_property("receipt", (name, made))
        if JUDGED and not request.config.getoption("--write-receipts"):
            assert made == RECEIPTS["kernels"].get(name), f"{name}: the receipt differs; see `make receipts`"

    return compare


@pytest.mark.skipif(not JUDGED, reason=f"the receipts are of triton {RECEIPTS['triton']}")
def test_receipts_are_of_these_kernels(request):
    if request.config.getoption("--write-receipts"):
        return
    assert RECEIPTS["sources"] == sources(), "the kernels have changed since tests/receipts.json: run `make receipts`"
    cases = [*tile_cases(), *wide_cases(), *skipping_cases(), *row_cases()]
    assert set(RECEIPTS["kernels"]) == {given.values[0] for given in cases}, "run `make receipts`"


# -- what is asked of each --------------------------------------------------------------------------------------------


def fits(kernel, arch, programs):
    """`programs` of them have room on a multiprocessor: shared memory and registers."""
    device = DEVICES[arch]
    assert kernel.shared <= device.program
    assert programs * (kernel.shared + device.reserved) <= device.shared
    allocated = -(-kernel.registers // 8) * 8
    if arch == "gfx9":  # four SIMDs, 512 registers of 64 lanes each
        assert -(-programs * kernel.warps // 4) * allocated <= 512
    else:
        assert programs * kernel.warps * 32 * allocated <= 65536


def addresses_are_wide(kernel):
    """Strides are 32-bit arguments where they fit; no product with one may be."""
    body = kernel.ir.split("tt.func", 1)[1].split("\n", 1)[1]
    uses = [line.strip() for line in body.splitlines() if re.search(r"%stride_\w+", line)]
    narrow = [line for line in uses if not re.search(r"arith\.extsi %stride_\w+ : i32 to i64", line)]
    assert not narrow, narrow


def masks_are_not_added(kernel):
    """Two of them have room for one bit: findings/triton_sum_of_masks.sh."""
    added = re.findall(r"arith\.addi [^\n]*[x ]i1\b[^\n]*", kernel.ir)
    assert not added, added


def sums_are_wide(kernel):
    """No 16-bit numbers are added, as a sum over a tile of them would do: findings/triton_sum_in_16_bits.sh."""
    narrow = re.findall(r"arith\.addf [^\n:]*: (?:tensor<[^>\n]*x)?b?f16\b", kernel.ir)
    assert not narrow, narrow


@triton.jit
def sum_kernel(x_ptr, out_ptr):
    triton.language.store(out_ptr, triton.language.sum(triton.language.load(x_ptr + triton.language.arange(0, 16))))


@triton.jit
def double_kernel(x_ptr, out_ptr):
    x = triton.language.load(x_ptr + triton.language.arange(0, 16))
    triton.language.store(out_ptr + triton.language.arange(0, 16), x + x)


@pytest.mark.parametrize("kernel", [sum_kernel, double_kernel])
@pytest.mark.parametrize(("dtype", "wide"), [("fp32", True), ("bf16", False), ("fp16", False)])
def test_sums_that_are_not_wide_are_seen(kernel, dtype, wide):
    made = ASTSource(kernel, {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}, {})
    seen = SimpleNamespace(ir=triton.compile(made, target=DEVICES["sm_90"].target).asm["ttir"])
    with contextlib.nullcontext() if wide else pytest.raises(AssertionError, match="arith.addf"):
        sums_are_wide(seen)


def vectorised(kernel, arch):
    """Some loads take 16 bytes a thread."""
    assert re.search(r"global_load_dwordx4" if arch == "gfx9" else r"ld\.global\S*\.v4\.b32", kernel.assembly)


def stores_wait(kernel, arch):
    """In the loop that rewrites a row with narrower numbers: all loads, a barrier, all stores."""
    pattern = r"\b(ld|st)\.global|\b(bar)(?:rier)?\.sync"
    if arch == "gfx9":
        pattern = r"\bglobal_(load|store)_|\bs_(barrier)\b"
    letters = {"ld": "L", "load": "L", "st": "S", "store": "S", "bar": "B", "barrier": "B"}
    orders = []
    for body in loops(kernel.assembly):
        found = [match for line in body if (match := re.search(pattern, line))]
        orders.append("".join(letters[match[1] or match[2]] for match in found))
    rewriting = [order for order in orders if "L" in order and "S" in order]
    assert len(rewriting) == 1, orders
    assert re.fullmatch("L+B+S+", rewriting[0]), rewriting


# -- tile kernels -----------------------------------------------------------------------------------------------------


def tile_launch(arch, job, config, variant, dtype=torch.bfloat16):
    """One of the three jobs; flags: bias, soft-cap, scale and entropy."""
    vocab, width = SIZES[variant]
    flags = variant == "flags"
    x, w = (torch.empty(n, width, dtype=dtype) for n in (C, vocab))
    target = torch.zeros(C, dtype=torch.int64)
    acc = torch.promote_types(dtype, torch.float32)
    a, b, c, d, e = torch.ones(5, C, dtype=acc)
    epilogue = Epilogue(torch.ones(vocab, dtype=acc), 30.0, 0.5) if flags else Epilogue(None, None, 1.0)
    room = -(-vocab // 16) * 16 if variant == "padded" else vocab
    out = torch.empty(C, room, dtype=dtype)[:, :vocab]
    with recorded(arch) as launches:
        if job == "gradients":
            scores, upstream = Statistics(a, b, c if flags else None), Upstream(d, e, c if flags else None)
            triton_tiles.gradients(x, w, target, scores, upstream, epilogue, out, room, config=config)
        else:
            partials = triton_tiles.Partials.empty(a, config.parts(vocab), C, acc, job == "score", flags)
            weights = {} if job == "score" else {"shift": b, "out": out}
            triton_tiles.score(x, w, target, epilogue, c, partials, room=room, config=config, **weights)
    return launches


def tile_cases():
    """(name, arch, job, index into the table, variant): all of the first, the others as they come most often."""

    def made(*values):
        return case(" ".join(map(str, values)), *values)

    for arch in DEVICES:
        for job in JOBS:
            for variant in ("plain", "flags", "ragged", "padded"):
                yield made(arch, job, 0, variant)
            if job == "score":  # the matrix loop is that of the other jobs
                yield made(arch, job, 0, "unaligned")
            if arch == "sm_90":
                for index in range(1, len(configs.TILES[arch][job])):
                    yield made(arch, job, index, "plain")


@pytest.mark.parametrize(("name", "arch", "job", "index", "variant"), list(tile_cases()))
def test_tile_kernel(name, arch, job, index, variant, tmp_path, receipt):
    device, config = DEVICES[arch], configs.TILES[arch][job][index]
    kernel = compiled(arch, tile_launch(arch, job, config, variant), tmp_path)
    assert device.matrix in kernel.assembly
    assert ("cp.async.bulk.tensor" in kernel.assembly) == (config.tma and variant != "unaligned")
    assert kernel.shared <= device.program
    addresses_are_wide(kernel)
    masks_are_not_added(kernel)
    sums_are_wide(kernel)
    loop = innermost(kernel.machine, device.machine)
    assert loop, "no loop around the matrix instructions"
    facts = ["matrix instructions", "TMA" if "cp.async.bulk.tensor" in kernel.assembly else "no TMA", "wide addresses"]
    if variant == "unaligned":  # operands come two bytes at a time, through registers: right, and slow
        receipt(name, kernel, *facts)
        return
    assert not [line for line in loop if re.search(r"\bLDL|\bscratch_load", line)], "reloads spills in the matrix loop"
    if variant == "padded" and job != "score" and arch != "gfx9":
        assert re.search(r"st\.global\S*\.v4", kernel.assembly), "no stores of 16 bytes"
        facts.append("16-byte stores")
    if JUDGED:
        fits(kernel, arch, config.programs)
        first = arch == "sm_90" and index == 0 and variant in ("plain", "padded")
        assert kernel.stack <= (0 if arch == "gfx9" or first else SPILLS[variant])
    receipt(name, kernel, *facts, "no spills in the matrix loop", f"room for {config.programs}", "stack")


def wide_cases():
    for dtype in (torch.float32, torch.float64):
        for job in JOBS:
            yield case(f"sm_90 {job} wide {TYPES[dtype]}", dtype, job)


@pytest.mark.parametrize(("name", "dtype", "job"), list(wide_cases()))
def test_tile_kernel_with_wide_operands(name, dtype, job, tmp_path, receipt):
    """No tensor core rounds float32 operands to tf32, and 48 KiB are what every architecture has."""
    kernel = compiled("sm_90", tile_launch("sm_90", job, configs.WIDE, "plain", dtype), tmp_path)
    assert "tf32" not in kernel.assembly
    assert kernel.shared <= 48 * KIB
    addresses_are_wide(kernel)
    masks_are_not_added(kernel)
    sums_are_wide(kernel)
    fits(kernel, "sm_90", configs.WIDE.programs)
    if JUDGED:
        assert kernel.stack == 0
    receipt(name, kernel, "no tf32", "48 KiB", "wide addresses", f"room for {configs.WIDE.programs}", "no stack")


# -- the products of skipping -----------------------------------------------------------------------------------------


def skipping_launch(arch, job, variant, dtype=torch.bfloat16):
    """plain: results as they are stored. sum: float32 sums that are added to, in an order of the vocabulary, off every
    block in padded rows."""
    more = variant == "sum"
    vocab = 1031 if more else V
    e = torch.empty(C, -(-vocab // 16) * 16, dtype=dtype)[:, :vocab]
    x, w = torch.empty(C, H, dtype=dtype), torch.empty(vocab, H, dtype=dtype)
    counting = triton_skipping.Counting(torch.ones(C, -(-vocab // 256), dtype=torch.bool), 256)
    order = torch.arange(vocab) if more else None
    out = [torch.empty(n, H, dtype=torch.float32 if more else dtype) for n in (C, vocab)]

    def tile(job, device, dtype):
        return configs.TILES[arch][job][0] if dtype.itemsize == 2 else configs.WIDE

    with recorded(arch) as launches, mock.patch.object(configs, "tile", tile):
        if job == "hidden":
            counting.hidden(e, w, out[0], torch.ones(C), torch.arange(C) if more else None, order, more)
        else:
            counting.head(e, [x], out[1:], order, e.stride(0), more)
    return launches[:1] if job == "list" else launches[1:]


def skipping_cases():
    for arch in DEVICES:
        for job in ("hidden", "head"):
            for variant in ("plain", "sum"):
                yield case(f"{arch} {job} {variant}", arch, job, variant)
        yield case(f"{arch} list", arch, "list", "plain")


@pytest.mark.parametrize(("name", "arch", "job", "variant"), list(skipping_cases()))
def test_skipping_kernel(name, arch, job, variant, tmp_path, receipt):
    device, kernel = DEVICES[arch], compiled(arch, skipping_launch(arch, job, variant), tmp_path)
    addresses_are_wide(kernel)
    masks_are_not_added(kernel)
    sums_are_wide(kernel)
    if job == "list":
        receipt(name, kernel, "wide addresses")
        return
    assert device.matrix in kernel.assembly
    loop = innermost(kernel.machine, device.machine)
    assert loop, "no loop around the matrix instructions"
    assert not [line for line in loop if re.search(r"\b(LDL|STL)|\bscratch_", line)], "spills in the matrix loop"
    facts = ["matrix instructions", "wide addresses", "no spills in the matrix loop", "room for 1"]
    fits(kernel, arch, 1)
    if arch != "gfx9":
        assert not re.search(r"\bLDG\.E\.U?[SU](8|16)\b", "\n".join(loop)), "operands come in narrow loads"
        assert re.search(r"\bLDGSTS\S*\.128\b", "\n".join(loop)), "no operand goes to shared memory 16 bytes at a time"
        facts.append("16-byte copies")
    if arch == "sm_90":  # four products of 64 × 256 × 16 take 512 cycles, 8 warps issue 2 instructions a cycle at most
        count = sum(bool(re.search(r"/\*[0-9a-f]{4}\*/", line)) for line in loop)
        assert count <= 220, count
        facts.append("220 instructions")
    if JUDGED:
        assert kernel.stack <= (0 if variant == "plain" else 512)
    receipt(name, kernel, *facts, "stack")


def test_tables_are_complete():
    """Every architecture has every job, its first choice fits what shares the key, and descriptors are where TMA is."""
    for arch in DEVICES:
        assert set(configs.TILES[arch]) == {*JOBS, "hidden", "head"}
        for job, candidates in configs.TILES[arch].items():
            assert len(set(candidates)) == len(candidates), (arch, job)
            for config in candidates:
                assert not config.tma or arch in ("sm_90", "sm_100", "sm_120")
                if (
                    arch == "sm_80" and job in JOBS
                ):  # sm_86 and sm_89: 99 KiB a program; Triton keeps one buffer less than stages
                    buffers = (config.rows + config.vocab) * config.width * 2 * (config.stages - 1)
                    assert buffers <= 99 * KIB, (job, config)


# -- the kernel that scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.full) for arch in ("sm_80", "gfx9"))])
def test_the_kernel_that_scales(arch, tmp_path):
    """Vectors, and nothing of the gradient is read before the number is."""
    with recorded(arch) as launches:
        triton_scale.scale_(torch.empty(1031, 73, dtype=torch.bfloat16), torch.ones(()))
    kernel = compiled(arch, launches, tmp_path)
    assert kernel.stack == 0
    if arch == "gfx9":
        assert re.search(r"\w+_load_dwordx4", kernel.assembly), set(re.findall(r"\w+_load_\w+", kernel.assembly))
    else:
        vectorised(kernel, arch)
        first = kernel.assembly.index("ld.global")
        assert kernel.assembly.index("bra", first) < kernel.assembly.index("ld.global", first + 1)


# -- row kernels ------------------------------------------------------------------------------------------------------


def row_launch(arch, name, flags, vocab=V):
    """float32 logits; weights as bfloat16 apart from them, dlogits over the first half of each row's bytes. flags: as
    for the tiles. Rows have room to a multiple of 16."""
    room = -(-vocab // 16) * 16
    z, apart = (torch.empty(8, room, dtype=dtype)[:, :vocab] for dtype in (torch.float32, torch.bfloat16))
    narrow = z.view(torch.bfloat16)[:, :vocab]
    target = torch.zeros(8, dtype=torch.int64)
    a, b, c, d = torch.ones(4, 8)
    epilogue = Epilogue(torch.ones(vocab), 30.0, 0.5) if flags is True else Epilogue(None, CAPS.get(flags), 1.0)
    entropy, flags = flags in (True, "entropy", "soft-cap, entropy"), flags is True
    with recorded(arch) as launches:
        if name == "statistics":
            triton_rows.statistics(z, target, epilogue, entropy, None, room)
        elif name == "weights":
            triton_rows.weights(z, target, epilogue, entropy, apart, room)
        elif name == "masses":
            triton_rows.masses(z, target, Statistics(a, b, None), epilogue, 1024, room)
        elif name in ("gradients", "gradients_wide"):
            scores, upstream = Statistics(a, b, c if entropy else None), Upstream(a, b, d if entropy else None)
            out = narrow if name == "gradients" else None
            triton_rows.gradients_(z, target, scores, upstream, epilogue, out, room)
        elif name == "target":
            triton_rows.with_target_(apart, target, a, b, c)
        elif name == "merge":
            partials = triton_tiles.Partials.empty(a, 16, C, torch.float32, top=True, entropy=flags)
            triton_tiles.merge(partials, a if flags else None, flags)
        else:
            loss, _, over = name.partition(" ")
            ref = (a, b) if loss == "bnf" else None
            out, terms = narrow if over else apart, TokenTerms(loss, c, ref, loss == "bnf" or entropy)
            triton_rows.token_loss_(z, target, terms, epilogue, out, room)
    return launches


CAPS = {"soft-cap": 30.0, "soft-cap, entropy": 30.0}


ROW_CASES = [
    *(("statistics", False), ("statistics", True), ("weights", False), ("weights", True), ("masses", False)),
    *(("gradients", False), ("gradients", True), ("gradients_wide", False)),
    *((loss, False) for loss in triton_rows.TOKEN_LOSSES),
    *(("bnf", True), ("bnf over", False), ("target", False), ("merge", False), ("merge", True)),
]


def row_cases():
    for arch in DEVICES:
        for job, flags in ROW_CASES:
            yield case(f"{arch} rows {job}" + " flags" * flags, arch, job, flags)


@pytest.mark.parametrize(("name", "arch", "job", "flags"), list(row_cases()))
def test_row_kernel(name, arch, job, flags, tmp_path, receipt):
    kernel = compiled(arch, row_launch(arch, job, flags), tmp_path)
    addresses_are_wide(kernel)
    masks_are_not_added(kernel)
    sums_are_wide(kernel)
    facts = ["wide addresses"]
    if job not in ("target", "merge"):  # a column of partial sums has no length that could be relied on
        vectorised(kernel, arch)
        facts.append("vectors")
    if job in ("gradients", "bnf over"):
        stores_wait(kernel, arch)
        facts.append("stores wait")
    if JUDGED:
        fits(kernel, arch, 2)  # what covers the latency of memory
        assert kernel.stack <= 16
    receipt(name, kernel, *facts, "room for 2", "stack")


# Instructions of a sweep's loop for each 16 columns, at most, in sm_90's machine code
SWEEPS = {
    "statistics": {"plain": 160, "entropy": 200, "soft-cap": 330, "soft-cap, entropy": 370},
    "weights": {"plain": 170, "entropy": 270, "soft-cap": 370, "soft-cap, entropy": 480},
    "gradients": {"plain": 110, "entropy": 160, "soft-cap": 300, "soft-cap, entropy": 370},
    "nll": {"plain": 170, "soft-cap": 370},
    "bnf": {"entropy": 270, "soft-cap, entropy": 480},
}
FAST = ("weights", "plain")


def sweep_cases():
    for job, variants in SWEEPS.items():
        for variant, most in variants.items():
            marks = [] if (job, variant) == FAST else [pytest.mark.full]
            yield pytest.param(job, variant, most, id=f"{job} {variant}", marks=marks)


@pytest.mark.skipif(not JUDGED, reason=f"instructions are counted for triton {RECEIPTS['triton']}")
@pytest.mark.parametrize(("job", "variant", "most"), list(sweep_cases()))
def test_threads_of_a_sweep_meet_nowhere(job, variant, most, tmp_path):
    """No barrier, but where results go over the logits; no shuffle, no spill; 16 bytes at a time, few instructions."""
    kernel = compiled("sm_90", row_launch("sm_90", job, variant, vocab=32003), tmp_path)
    assert kernel.stack == 0
    bodies = [[line for line in body if re.search(r"/\*[0-9a-f]{4,}\*/ .*;", line)] for body in loops(kernel.machine)]
    bodies = [body for body in bodies if any("LDG" in line for line in body)]
    inner = [body for body in bodies if not any(len(other) < len(body) and set(other) < set(body) for other in bodies)]
    assert len(inner) == 1
    block = 4096 if job in ("statistics", "gradients") else 2048
    text = "\n".join(inner[0])
    assert len(re.findall(r"\bBAR\b", text)) == (job == "gradients")
    assert not re.search(r"\bSHFL|\bLDL|\bSTL|\bLDS|\bSTS", text)
    assert re.findall(r"\b(?:LDG|STG)\S*", text) == [x for x in re.findall(r"\b(?:LDG|STG)\S*", text) if ".128" in x]
    assert len(re.findall(r"\bLDG", text)) == block // (32 * 4 * kernel.warps)
    assert len(inner[0]) * 16 * 32 * kernel.warps <= most * block


@pytest.mark.parametrize("job", [*SWEEPS, "masses", "target"])
def test_one_kernel_serves_every_vocabulary(job):
    """Models' and odd ones, with rows padded to 16 columns, and wherever the vectors of a chunk's rows begin."""
    made = set()
    for vocab in (32000, 32003, 50257, 50304, 128256, 151936, 256000):
        ((kernel, args, kwargs),) = row_launch("sm_90", job, False, vocab)
        off = [x.new_empty(len(x) + 1)[1:] if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in args]
        for given in (args, off):
            of, options = source(kernel, given, kwargs)
            made.add(repr((of.signature, of.constants, of.attrs, options)))
    assert len(made) == 1
