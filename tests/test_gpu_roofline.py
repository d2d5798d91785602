"""The parts `kernels` and `profile` of `python -m benchmarks.gpu` on a CPU, at tiny shapes; nothing is timed here."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ isn't installed

from benchmarks.gpu import lineup, roofline
from benchmarks.gpu.journal import Journal, Settings, work
from rgpb.bench.cases import LOG_PROB, Result
from rgpb.engine import plan
from rgpb.kernels import cpp_rows, torch_rows, why_not

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="expects Triton to be refused on a CPU"
)

TINY = (("tiny", 12, 8, 1030, None),)  # V off every vector, and a little beyond one block of masses
CPP = why_not("cpp", torch.device("cpu"))
BF16 = {
    "torch": {
        "statistics", "statistics, entropy", "statistics, masses", "statistics, weights to bf16", "gradients to bf16",
        "gradients to fp32", "target",
    },
    "cpp": {
        "statistics", "statistics, entropy", "statistics, masses", "statistics, weights to bf16", "gradients to bf16",
        "gradients to fp32", "token_loss nll to bf16", "token_loss bnf to bf16", "token_loss unlikelihood to bf16",
    },
    "library": {"product to fp32"},
}  # fmt: skip


def ran(folder, part, only="", **more):
    """The rows of a part, and how many of them failed."""
    given = {"rounds": 1, "workspaces": (1 << 20, 4 << 20), "shapes": TINY, **more}
    settings, journal = Settings("cpu", only=re.compile(only), **given), Journal(folder, "part")
    outcome = work(journal, part(settings), settings, {}, lambda rows: {"table": rows})
    return list(journal.rows.values()), outcome.failed


def one(folder, kernel, implementation="torch", **more):
    """The row of one kernel, and how many failed."""
    (row,), failed = ran(folder, roofline.kernels, rf"\| {re.escape(kernel)} \| {implementation}$", **more)
    return row, failed


def served(row):
    """Whether the C++ kernels did it where they are, and where they aren't said why."""
    if row["implementation"] != "cpp" or CPP is None:
        return row["status"] == "ok"
    return row["status"].startswith("refused: ") and CPP in row["status"]


# -- each kernel alone -------------------------------------------------------------------------------------------------


def test_kernels(tmp_path):
    rows, failed = ran(tmp_path, roofline.kernels)
    assert failed == 0
    for implementation, names in BF16.items():
        assert {row["kernel"] for row in rows if row["implementation"] == implementation} == names
    assert len(rows) == sum(map(len, BF16.values()))
    assert all(map(served, rows))
    for row in rows:
        assert (row["rows"], row["width"], row["vocab"], row["dtype"]) == (12, 8, 1030, "bf16")
        assert row["predicted_seconds"] is row["share_of_product"] is None  # no GPU; the product isn't its own ceiling
        if row["status"] == "ok":
            assert row["seconds_20"] <= row["seconds"] <= row["seconds_80"]
            assert row["rate"] == pytest.approx(row["bytes"] / row["seconds"])
            assert row["share_of_copy"] == pytest.approx(row["rate"] / row["copy_rate"])  # there is one round
            assert row["value_error"] is not None or row["entry_error"] is not None
            assert row["value_error"] is None or row["value_error"] < 1e-6
    product = next(row for row in rows if row["kernel"] == "product to fp32")
    assert product["flops"] == 2 * 12 * 8 * 1030
    assert product["flop_rate"] == pytest.approx(product["flops"] / product["seconds"])
    assert {row["flops"] for row in rows if row is not product} == {None}


def test_kernels_in_float32_under_a_soft_cap(tmp_path):
    rows, failed = ran(tmp_path, roofline.kernels, dtype="fp32", shapes=(("capped", 12, 8, 257, 2.0),))
    assert failed == 0
    assert all(map(served, rows))
    assert {row["kernel"] for row in rows if "to" in row["kernel"]} >= {"gradients to fp32", "product to fp32"}
    assert not any("bf16" in row["kernel"] for row in rows)
    assert {row["softcap"] for row in rows} == {2.0}
    assert max(row["entry_error"] or 0 for row in rows) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "logit", "token"),
    [
        ("statistics", 4, 0),
        ("statistics, masses", 4, 2 * 4),
        ("statistics, weights to bf16", 4 + 2, 0),
        ("gradients to bf16", 4 + 2, 0),
        ("gradients to fp32", 4 + 4, 0),
        ("target", 0, 8 + 4 * 4 + 2),
    ],
)
def test_bytes_and_what_a_plan_predicts_from_them(kernel, logit, token, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "architecture", lambda device: "sm_90")
    row, _ = one(tmp_path, kernel)
    assert row["bytes"] == 12 * (1030 * logit + token)
    assert row["predicted_seconds"] == row["bytes"] / plan.RATES["sm_90"].copy


@pytest.mark.skipif(CPP is not None, reason=str(CPP))
def test_a_token_loss_on_a_cpu_reads_once(tmp_path):
    assert one(tmp_path, "token_loss bnf to bf16", "cpp")[0]["bytes"] == 12 * 1030 * 6


def test_the_product_at_the_rate_of_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "architecture", lambda device: "sm_90")
    row, _ = one(tmp_path, "product to fp32", "library")
    assert row["predicted_seconds"] == row["flops"] / plan.RATES["sm_90"].library
    row, _ = one(tmp_path / "fp32", "product to fp32", "library", dtype="fp32")
    assert row["predicted_seconds"] is None


# name: (kernel, implementation's function, what is changed of what it returns)
WRONG = {
    "a logit": ("statistics", "statistics_", lambda made: made[0].z_y.add_(2e-3)),
    "lse_other": ("statistics, entropy", "statistics_", lambda made: made[0].lse_other[-1:].add_(2e-3)),
    "an entropy": ("statistics, entropy", "statistics_", lambda made: made[0].h_o[-1:].mul_(1.01)),
    "a sum": ("statistics, weights to bf16", "statistics_", lambda made: made[1][:1].mul_(1.1)),
    "a column": ("gradients to bf16", "gradients_", lambda made: made[0][:, -1].mul_(1.5)),
    "an entry": ("gradients to bf16", "gradients_", lambda made: made[0][3, 77:78].mul_(0)),
    "a factor": ("gradients to fp32", "gradients_", lambda made: made[1][-1:].mul_(1.01)),
    "a NaN": ("gradients to fp32", "gradients_", lambda made: made[0][5, 5:6].mul_(torch.nan)),
    "a target's factor": ("target", "with_target_", lambda made: made[-1:].mul_(1.01)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_no_time_for_a_wrong_kernel(wrong, tmp_path, monkeypatch):
    kernel, function, change = WRONG[wrong]
    right = getattr(torch_rows, function)

    def broken(*given):
        made = right(*given)
        change(made)
        return made

    monkeypatch.setattr(torch_rows, function, broken)
    row, failed = one(tmp_path, kernel)
    assert (row["status"], failed) == ("FAILED", 1)
    assert row["seconds"] is row["rate"] is row["share_of_copy"] is None


@pytest.mark.parametrize("loss", roofline.TOKEN_LOSSES)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.skipif(CPP is not None, reason=str(CPP))
def test_no_time_for_a_wrong_token_loss(at, loss, tmp_path, monkeypatch):
    right = cpp_rows.token_loss_

    def broken(*given):
        made = right(*given)
        made[at][:1].mul_(1.1)
        return made

    monkeypatch.setattr(cpp_rows, "token_loss_", broken)
    row, failed = one(tmp_path, f"token_loss {loss} to bf16", "cpp")
    assert (row["status"], row["seconds"], failed) == ("FAILED", None, 1)


@pytest.mark.parametrize("value", [torch.inf, 1e-40])
def test_no_time_that_the_numbers_had_a_part_in(value, tmp_path, monkeypatch):
    """Right at first; later runs in place leave what may take longer."""
    right, calls = torch_rows.gradients_, []

    def drifts(*given):
        made = right(*given)
        calls.append(1)
        if len(calls) > 1:
            made[0].fill_(value)
        return made

    monkeypatch.setattr(torch_rows, "gradients_", drifts)
    row, failed = one(tmp_path, "gradients to fp32")
    assert row["status"].startswith("error: ArithmeticError: 12360 numbers of the buffer are infinite or denormal")
    assert (row["seconds"], failed) == (None, 1)


def test_without_the_compiled_kernels(tmp_path, monkeypatch):
    """They are refused with the reason; the rest of the part runs."""
    monkeypatch.setattr(cpp_rows, "MISSING", "no compiler")
    rows, failed = ran(tmp_path, roofline.kernels, r"statistics \||product")
    statuses = {row["implementation"]: row["status"] for row in rows}
    assert "no compiler" in statuses.pop("cpp")
    assert (statuses, failed) == ({"torch": "ok", "library": "ok"}, 0)


def test_short_calls_are_repeated_and_their_time_is_divided(tmp_path, monkeypatch):
    assert [roofline.calls_of(seconds) for seconds in (1e-9, 1e-4, 9e-4, 1e-2)] == [100, 10, 2, 1]
    calls = []
    assert roofline.repeated(lambda: calls.append(1) or len(calls), 3) == 3
    waits = iter((5e-4, 1e-3))  # of one call with its wait, and of ten

    def spent(runs, rounds, device):
        seconds = next(waits)
        return {name: [seconds] for name in runs}

    monkeypatch.setattr(roofline, "interleaved", spent)
    monkeypatch.setattr(roofline, "timed", lambda runs, settings: ({name: [1.0, 3.0, 2.0] for name in runs}, 3))
    row, _ = one(tmp_path, "statistics")
    assert (row["calls"], row["rounds"]) == (10, 3)
    assert row["seconds"] == pytest.approx(0.2)
    assert row["share_of_copy"] == pytest.approx(1.0)


def test_who_serves_a_gpu():
    """Named without one; the tile kernels and the whole of the GPU's shapes."""
    keys = [task.key for task in roofline.kernels(Settings("cuda"))]
    assert len(keys) == len({*keys})
    assert {key.split(" | ")[1] for key in keys} == {f"{rows},4096,128256" for rows in (1024, 4096, 8192)}
    names = {key.split(" | ")[-2] for key in keys if key.endswith("| triton")}
    assert names == (BF16["cpp"] - {"statistics, weights to bf16"}) | {"target"} | {
        f"tiles: {name}" for name in ("score", "weights", "gradients", "merge")
    }


# -- where a call's time goes ------------------------------------------------------------------------------------------


def test_profile(tmp_path):
    rows, failed = ran(tmp_path, roofline.profiles)
    assert failed == 0
    calls = [(row["loss"], row["path"]) for row in rows if row["kernels"] == "torch"]
    assert calls == [
        ("bnf", "single"), ("bnf", "two_pass"), ("dpo", "two_pass"), ("bnf", "frozen"), (LOG_PROB, "forward"),
    ]  # fmt: skip
    for row in rows:
        if row["kernels"] == "cpp" and CPP is not None:
            assert CPP in row["status"]
            continue
        assert row["status"] == "ok"
        parts = [category.replace(" ", "_") for category in roofline.CATEGORIES]
        assert sum(row[f"{part}_share"] for part in parts) == pytest.approx(1.0)
        assert sum(row[f"{part}_seconds"] for part in parts) == pytest.approx(row["seconds"])
        for part in ("products", "row_kernels", "else", "idle"):
            assert row[f"{part}_share"] > 0, (row["loss"], row["path"], part)
        assert row["tile_kernels_share"] == 0
        assert row["units"] == {"single": 3, "two_pass": 4, "frozen": 2, "forward": 1}[row["path"]]
        assert row["workspace"] == (4 << 20 if row["path"] == "single" else 1 << 20)
        assert row["launches"] > row["units"]
        assert len(re.findall(r"aten::\w+ [\d.e-]+ %", row["largest"])) == roofline.LARGEST
        assert "aten::mm" not in row["largest"]


def test_profile_in_float32(tmp_path):
    rows, failed = ran(tmp_path, roofline.profiles, r"forward \| torch", dtype="fp32")
    assert [(row["dtype"], row["status"]) for row in rows] == [("fp32", "ok")]
    assert failed == 0


def test_no_profile_of_a_wrong_result_or_of_another_path(tmp_path, monkeypatch):
    ours = lineup.ours

    def broken(*given):
        run, planned = ours(*given)
        if given[2] == "two_pass":
            return run, planned._replace(path="single")
        return lambda: Result(run().value * torch.nan, ()), planned

    monkeypatch.setattr(roofline, "ours", broken)
    rows, failed = ran(tmp_path, roofline.profiles, r"bnf \| (frozen|two_pass) \| torch")
    assert [row["status"] for row in rows] == ["plan: single", "FAILED"]
    assert {row["seconds"] for row in rows} == {None}
    assert failed == 1


def test_torchs_row_kernels_have_their_own_functions_again():
    before = [getattr(torch_rows, name) for name in roofline.LABELLED]
    with roofline.labelled():
        assert not {getattr(torch_rows, name) for name in roofline.LABELLED} & {*before}
        with pytest.raises(TypeError):
            torch_rows.gradients_()
    assert [getattr(torch_rows, name) for name in roofline.LABELLED] == before


NAMES = {
    "statistics_kernel": "row kernels",
    "token_loss_kernel": "row kernels",
    "rgpb::row_slice": "row kernels",
    "tiles_kernel": "tile kernels",
    "merge_kernel": "tile kernels",
    "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasSplitKParams<float>)": "products",
    "void gemv2T_kernel_val<int, int, float>(cublasGemvParamsEx)": "products",
    "Cijk_Ailk_Bjlk_BBS_BH_MT128x128x32": "products",
    "aten::mm": "products",
    "rgpb::mm_bf16": "products",
    "aten::mul": "else",
    "Memcpy DtoD (Device -> Device)": "else",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)": "else",
}


@pytest.mark.parametrize("name", NAMES)
def test_categories(name):
    assert roofline.category_of(name) == NAMES[name]


def event(name, start, end, kind=DeviceType.CUDA, **more):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind, **more)


def test_the_record_of_a_device():
    """Overlap is counted once, gaps are idle, and what isn't a launch has no part."""
    events = [
        event("aten::mm", 0.0, 50.0, DeviceType.CPU),
        event("statistics_kernel", 30.0, 40.0),
        event("nvjet_hsh", 10.0, 20.0),
        event("void at::native::elementwise_kernel<2, at::native::AddFunctor<float>>(int, int)", 18.0, 25.0),
        event("Memset (Device)", 22.0, 24.0),
        event("Context Sync", 0.0, 100.0),
        event("a range", 0.0, 100.0, is_user_annotation=True),
        event("tiles_kernel", 40.0, 60.0),
    ]
    spent = roofline.on_device(events)
    assert spent.seconds == pytest.approx(50e-6)
    assert {kind: round(spent.of(kind) * 1e6) for kind in roofline.CATEGORIES} == {
        "products": 10, "row kernels": 10, "tile kernels": 20, "else": 5, "idle": 5,
    }  # fmt: skip
    assert len(spent.launches) == 5
    assert spent.largest("else") == "elementwise_kernel<2, AddFunctor<float>> 10 %; Memset (Device) 0 %"
    with pytest.raises(ValueError, match="expected the device's kernels"):
        roofline.on_device(events[:1])


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_both_parts_on_a_gpu(tmp_path):
    torch.use_deterministic_algorithms(False)  # its check of cuBLAS' workspace variable is not what is tested
    settings = Settings("cuda", rounds=1, workspaces=(64 << 20,), shapes=(("small", 512, 256, 32003, None),))
    for name, part in (("kernels", roofline.kernels), ("profile", roofline.profiles)):
        journal = Journal(tmp_path, name)
        assert work(journal, part(settings), settings, {}, lambda rows: {"table": rows}).failed == 0
        assert {row["status"] for row in journal.rows.values()} == {"ok"}
    for row in journal.rows.values():
        tiled = row["kernels"] == "triton tiled"
        assert (row["products_share"] > 0) == (not tiled or row["path"] != "forward")
        assert (row["tile_kernels_share"] > 0) == tiled
        assert row["row_kernels_share"] > 0 or row["kernels"] != "triton chunked"
