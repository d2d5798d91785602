"""torch's row kernels and the C++ ones on every instruction set of this machine, and what the C++ ones add."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from cuda_products import CudaProducts
from kernel_suite import *  # noqa: F403
from row_suite import *  # noqa: F403
from row_suite import Implementation, close, dense

from rgpb.kernels import cpp_rows, devices, matmul, torch_rows
from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream

WIDE = (torch.float64, torch.float32)
SETS = torch.ops.rgpb.cpp_available() if cpp_rows.missing() is None else []
cpp = pytest.mark.skipif(cpp_rows.missing() is not None, reason=str(cpp_rows.missing()))
bf16 = pytest.mark.skipif(not cpp_rows.BF16_PRODUCTS, reason="no bfloat16 instructions here, or no C++ kernels")


def torch_statistics(z, target, epilogue, entropy, tile):
    masses = z.new_empty(len(z), -(-z.shape[1] // tile))
    return torch_rows.statistics_(z, target, epilogue, entropy, None, masses, tile)[0], masses


def cpp_weights(z, target, epilogue, entropy, out):
    statistics, _, total = cpp_rows.statistics_(z, target, epilogue, entropy, out)
    return statistics, total


IMPLEMENTATIONS = {
    "torch": Implementation(
        torch_statistics, torch_rows.gradients_, None, torch_rows.statistics_, WIDE, (torch.bfloat16, torch.float16)
    ),
    "cpp": Implementation(
        cpp_rows.statistics, cpp_rows.gradients_, cpp_rows.token_loss_, cpp_weights,
        (*WIDE, torch.bfloat16), (torch.bfloat16,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "much"), [(torch.float32, 1e14), (torch.float16, 1e3)], ids=str)
def test_the_targets_entry_where_nothing_is_read(dtype, much, kind, monkeypatch):
    """A GPU isn't asked whether a target dwarfs the others: rows where it does, doesn't, lies elsewhere, is all."""
    monkeypatch.setattr(devices, "kind", lambda device: kind)
    e = torch.full((4, 12), 0.5, dtype=dtype)
    y, r, g_y = torch.tensor([2, 3, -1, 4]), torch.tensor([1e-3, 0.5, 2.0, 0.0]), torch.tensor([much, -3.0, 0.0, -1.0])
    wanted = (e[:, :9] * r[:, None]).double()
    wanted[[0, 3]] = 0
    wanted[0, 2], wanted[1, 3], wanted[3, 4] = much, -3.0, -1.0
    r = torch_rows.with_target_(e[:, :9], y, r, g_y)
    torch.testing.assert_close(e[:, :9].double() * r.double()[:, None], wanted, rtol=1e-6, atol=0)
    assert (e[:, 9:] == 0.5).all()  # what lies behind the rows


@pytest.fixture(params=["torch", "cpp"])
def impl(request):
    """A kernel set, for `kernel_suite.py`."""
    if request.param == "cpp" and cpp_rows.missing():
        pytest.skip(cpp_rows.missing())
    return request.param


@pytest.fixture(params=["torch", *(f"cpp {name}" for name in SETS)])
def rows(request):
    """The implementation, with the instruction set in use for as long as the test runs."""
    name, _, instructions = request.param.partition(" ")
    if name == "torch":
        yield IMPLEMENTATIONS[name]
        return
    before = torch.ops.rgpb.cpp_use(instructions)
    yield IMPLEMENTATIONS[name]
    torch.ops.rgpb.cpp_use(before)


@pytest.mark.parametrize("vocab", [3000, 2049, 1024])
def test_sums_over_many_blocks(rows, vocab):
    """More than a block of the sums, with the target at each end of one; a tile longer than a block."""
    z, epilogue = 3 * torch.randn(6, vocab), Epilogue(None, None, 1.0)
    y = torch.tensor([0, 1023, 1024 % vocab, 1025 % vocab, vocab - 1, vocab // 2])
    truth, q = dense(z.double(), y, epilogue)
    for tile in (64, 1024, 2048):
        made, masses = rows.statistics(z.clone(), y, epilogue, True, tile)
        for a, b in zip(made, truth):
            close(a, b, torch.float32)
        close(masses, torch.nn.functional.pad(q, (0, -vocab % tile)).view(6, -1, tile).sum(-1), torch.float32)


def test_rows_of_a_larger_buffer(rows):
    """Rows with room behind them, which stays as it was."""
    whole = torch.full((4, 200), 7.0)
    z, y, epilogue = whole[:, :150], torch.tensor([0, 149, 3, 4]), Epilogue(None, None, 1.0)
    z.normal_()
    truth, _ = dense(z.double(), y, epilogue)
    made, _ = rows.weights(z, y, epilogue, False, None)
    close(made.lse_other, truth.lse_other, torch.float32)
    assert (whole[:, 150:] == 7).all()


@cpp
def test_the_widest_instructions_are_taken():
    assert cpp_rows.describe() == SETS[0]
    assert SETS[-1] == "baseline"
    with pytest.raises(ValueError, match="name: expected an instruction set of this processor, got 'mmx'"):
        torch.ops.rgpb.cpp_use("mmx")


@cpp
def test_the_same_bits_on_any_number_of_threads():
    z, y, epilogue = torch.randn(37, 1500), torch.randint(1500, (37,)), Epilogue(None, None, 1.0)
    weight, ref = torch.randn(37), (torch.full((37,), -7.0), torch.full((37,), -7.0))
    runs = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        runs.append(cpp_rows.token_loss_(z.clone(), y, TokenTerms("bnf", weight, ref, True), epilogue))
    torch.set_num_threads(1)
    for scores, value, d, _ in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*scores, value, d), (*runs[0][0], *runs[0][1:3])))


@cpp
def test_statistics_alone_change_nothing():
    z = torch.randn(3, 150)
    before = z.clone()
    cpp_rows.statistics(z, torch.tensor([0, 1, 2]), Epilogue(None, None, 1.0), True)
    assert torch.equal(z, before)


@cpp
@pytest.mark.compile
def test_operators_pass_opcheck():
    ops = torch.ops.rgpb
    z, y, none = torch.randn(3, 50), torch.tensor([4, -1, 49]), None
    column = lambda: torch.zeros(3)  # noqa: E731
    torch.library.opcheck(ops.row_statistics, (z.clone(), y, none, 2.5, 1.0, column(), column(), column(),
                          torch.zeros(3, 4), 16, torch.zeros(3, 50), column()))  # fmt: skip
    torch.library.opcheck(ops.row_slice, (z.clone(), y, none, none, 1.0, True, cpp_rows.begin(z)))
    torch.library.opcheck(ops.row_gradients, (z.clone(), y, torch.randn(50), none, 1.0, column(), column(), column(),
                          column(), column(), torch.zeros(3, 50)))  # fmt: skip
    torch.library.opcheck(ops.row_token_loss, (z.clone(), y, none, none, 1.0, "bnf", column(), column(), column(),
                          column(), column(), column(), column(), torch.zeros(3, 50)))  # fmt: skip


@cpp
def test_bad_arguments_are_refused():
    z, y, epilogue = torch.randn(3, 50), torch.tensor([0, 1, 2]), Epilogue(None, None, 1.0)
    cases = [
        ("target: expected columns below 50, got 50", {"target_C": torch.tensor([0, 50, 2])}),
        ("target: expected a dense CPU vector of 3 Long", {"target_C": torch.tensor([0, 1])}),
        ("z: expected a CPU tensor", {"z_CV": z.t()}),
        ("z: expected float64, float32 or bfloat16", {"z_CV": z.half()}),
        ("bias: expected a dense CPU vector of 50 Float", {"epilogue": Epilogue(torch.zeros(49), None, 1.0)}),
        ("bias: expected a dense CPU vector of 50 Float", {"epilogue": Epilogue(torch.zeros(50).double(), None, 1.0)}),
    ]
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            cpp_rows.statistics(**{"z_CV": z, "target_C": y, "epilogue": epilogue, "entropy": False, **wrong})
    columns = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"masses: expected a dense \[C, ceil\(V / tile\)\]"):
        torch.ops.rgpb.row_statistics(z, y, None, None, 1.0, *columns, None, z[:, :0].clone(), 2**63 - 1, None, None)
    with pytest.raises(ValueError, match="running: expected a dense float64 CPU tensor"):
        cpp_rows.add_slice_(torch.zeros(3, 4), z, y, epilogue, False)
    with pytest.raises(ValueError, match="loss: expected nll, unlikelihood or bnf, got 'dpo'"):
        cpp_rows.token_loss_(z.clone(), y, TokenTerms("dpo", torch.ones(3), None, False), epilogue)
    with pytest.raises(ValueError, match="loss: bnf needs"):
        cpp_rows.token_loss_(z.clone(), y, TokenTerms("bnf", torch.ones(3), None, False), epilogue)
    with pytest.raises(ValueError, match="g_lo: expected a dense CPU vector of 3 Float"):
        cpp_rows.gradients_(z, y, Statistics(*torch.zeros(2, 3), None),
                            Upstream(torch.zeros(3), torch.zeros(3).double()), epilogue)  # fmt: skip


# M, N, K: one of each; off every block; K odd and over more than one block; K of one block exactly
PRODUCTS = [(1, 1, 1), (130, 70, 515), (1100, 300, 33), (33, 300, 512), (300, 65, 3), (3, 7, 1025)]


@bf16
@pytest.mark.parametrize(
    ("shape", "first", "second", "accumulate"),
    covering(3, shape=PRODUCTS, first=("rows", "columns"), second=("rows", "columns"), accumulate=(False, True)),
)
def test_bfloat16_products_with_float32_results(shape, first, second, accumulate):
    """Each operand lies in rows, with room behind them, or in columns."""
    m, n, k = shape

    def operand(rows, width, lies):
        if lies == "columns":
            return torch.randn(width, rows).bfloat16().t()
        return torch.randn(rows, 2 * width).bfloat16()[:, :width]

    a, b = operand(m, k, first), operand(k, n, second)
    whole = torch.randn(m, n + 3)
    out = whole[:, :n]
    truth = a.double() @ b.double() + (out.double() if accumulate else 0)
    if not accumulate:
        out.fill_(torch.nan)
    behind = whole[:, n:].clone()
    torch.ops.rgpb.mm_bf16(a, b, out, accumulate)
    size = (a.double().abs() @ b.double().abs()).max()
    assert (out - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * max(size, 1)
    assert torch.equal(whole[:, n:], behind)
    if not accumulate:
        rounded = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
        torch.ops.rgpb.mm_bf16(a, b, rounded, False)
        assert torch.equal(rounded, out.bfloat16())


@bf16
def test_bfloat16_products_are_the_same_bits_on_any_number_of_threads():
    a, b = torch.randn(300, 600).bfloat16(), torch.randn(600, 100).bfloat16()
    for left in (a, a.t().contiguous().t()):
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(torch.empty(300, 100))
            torch.ops.rgpb.mm_bf16(left, b, made[-1], False)
        torch.set_num_threads(1)
        assert torch.equal(*made)


@bf16
def test_bfloat16_products_refuse_what_they_cannot_do():
    a, b, out = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.zeros(3, 5)
    for wrong, message in (
        ((a, b.t(), out), r"expected \[M, K\], \[K, N\] and \[M, N\]"),
        ((a.float(), b, out), "expected bfloat16 operands and a float32 result"),
        ((a, b, out.t().contiguous().t()), "expected a result of unit stride along N"),
        ((a, b, torch.zeros(30).as_strided((3, 5), (3, 1))), "rows that don't overlap"),
        ((torch.randn(3, 8).bfloat16()[:, ::2], b, out), "a: expected rows or columns of unit stride"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.rgpb.mm_bf16(*wrong, False)
    with pytest.raises(ValueError, match="not accumulated"):
        torch.ops.rgpb.mm_bf16(a, b, out.bfloat16(), True)
    empty = torch.ones(3, 5)
    torch.ops.rgpb.mm_bf16(torch.zeros(3, 0).bfloat16(), torch.zeros(0, 5).bfloat16(), empty, False)
    assert not empty.any()


@pytest.mark.parametrize("one_dtype", [False, True], ids=["torch 2.10", "torch 2.8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_that_only_cuda_has(monkeypatch, one_dtype, transposed):
    """With the refusals of the overloads in either version of torch, and the check which of them is there."""
    monkeypatch.setattr(devices, "kind", lambda device: "cuda")
    a, b, total = torch.randn(9, 5).half(), torch.randn(5, 7).half(), torch.randn(9, 7)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    exact = a.float() @ b.float()
    monkeypatch.setattr(matmul, "ADDED_BYTES", 4 * 7 * 4)  # four rows at a time
    matmul.adds_wide.cache_clear()
    with CudaProducts(one_dtype) as products:
        assert matmul.adds_wide(a.device, a.dtype) != one_dtype
        products.made.clear()
        made = torch.empty(9, 7)
        matmul.mm(a, b, made)
        summed = total.clone()
        matmul.mm(a, b, summed, accumulate=True)
    matmul.adds_wide.cache_clear()
    torch.testing.assert_close(made, exact)
    torch.testing.assert_close(summed, total + exact)
    assert products.made == [("mm", 9), *([("mm", 4), ("mm", 4), ("mm", 1)] if one_dtype else [("addmm", 9)])]
