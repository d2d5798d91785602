"""The part `kernels` of `python -m benchmarks.gpu` on the Triton kernels: right ones pass, wrong ones get no time."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ isn't installed

from benchmarks.gpu import kernels
from benchmarks.gpu.journal import Journal, Settings, work
from rgpb.bench import tune
from rgpb.bench.contest import Shape
from rgpb.engine.rates import RATES
from rgpb.kernels import triton_rows, triton_tiles

C, H, V = 2, 16, 70  # off the blocks and tiles
ROWS = {name for name in tune.KERNELS if name.startswith("rows")}


def ran(folder, only, **more):
    """The rows of Triton's kernels, by name, and how many of them failed."""
    given = {"rounds": 1, "shapes": (("tiny", C, H, V, None),), "only": re.compile(rf"\| ({only})$"), **more}
    journal = Journal(folder, "part", Settings("cpu", **given))
    failed = work(journal, kernels.tasks(journal), {}, lambda rows: {"table": rows}).failed
    return {row["kernel"]: row for row in journal.rows.values()}, failed


def test_right_kernels_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "architecture", lambda device: "sm_90")
    rows, failed = ran(tmp_path, ".*")
    assert {*rows} == {"product", *tune.KERNELS}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert failed == 0
    rates, flops, operands, tiles = RATES["sm_90"], 2 * C * H * V, 2 * (C + V) * H, -(-V // 64)
    bytes_of = {
        "score": operands + 8 * tiles * C, "weights": operands + 2 * C * V, "gradients": operands + 2 * C * V,
        "rows": 6 * C * V, "rows: bnf": 6 * C * V, "rows: gradients": 6 * C * V, "rows: statistics": 4 * C * V,
        "rows: statistics with entropy": 4 * C * V, "product": operands + 4 * C * V,
    }  # fmt: skip
    for name, row in rows.items():
        assert row["bytes"] == bytes_of[name], name
        assert row["seconds"] > 0
        assert row["flops"] == (None if name in ROWS else flops)
        assert (row["share_of_product"] is None) == (name in ROWS or name == "product")
        stored = 2 * C * V / rates.copy if name in ("weights", "gradients") else 0
        expected = flops / (rates.library if name == "product" else rates.tile) + stored
        assert row["predicted_seconds"] == pytest.approx(row["bytes"] / rates.copy if name in ROWS else expected)


@pytest.mark.full
def test_right_in_float32():
    given = tune.Inputs(Shape(C, H, V), torch.float32, torch.device("cpu"))
    assert max(tune.error_of(make(given), None) for make in tune.KERNELS.values()) < 1e-5


# kernel, module, function, what is changed of what it returns or was given
WRONG = [
    ("rows: statistics", triton_rows, "statistics", lambda made, given: made[0].lse_other[-1:].add_(1)),
    ("rows: statistics with entropy", triton_rows, "statistics", lambda made, given: made[0].h_o[-1:].mul_(1.1)),
    ("rows: gradients", triton_rows, "gradients_", lambda made, given: made[0].mul_(1.1)),
    ("rows", triton_rows, "token_loss_", lambda made, given: made[2][:, -40:].mul_(4)),
    ("rows: bnf", triton_rows, "token_loss_", lambda made, given: made[2].mul_(torch.nan)),
    ("score", triton_tiles, "merge", lambda made, given: made[0][-1:].add_(1)),
    ("weights", triton_tiles, "score", lambda made, given: given[7].mul_(1.1)),
    ("gradients", triton_tiles, "gradients", lambda made, given: given[6].mul_(1.1)),
]


@pytest.mark.parametrize(("kernel", "module", "function", "change"), WRONG, ids=[case[0] for case in WRONG])
def test_no_time_for_a_wrong_kernel(kernel, module, function, change, tmp_path, monkeypatch):
    right = getattr(module, function)

    def wrong(*given, **more):
        made = right(*given, **more)
        change(made, given)
        return made

    monkeypatch.setattr(module, function, wrong)
    rows, failed = ran(tmp_path, kernel)
    assert (rows[kernel]["status"], failed) == ("FAILED", 1)
    assert rows[kernel]["seconds"] is None
