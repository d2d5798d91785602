"""The part `kernels` of `python -m benchmarks.gpu` on the Triton kernels: right ones pass, wrong ones get no time."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ isn't installed

from benchmarks.gpu import roofline
from benchmarks.gpu.journal import Journal, Settings, work
from rgpb.engine import plan
from rgpb.kernels import triton_rows, triton_tiles

ROWS = {"statistics", "statistics, entropy", "statistics, masses", "gradients to fp32", "target"}
TILES = {"tiles: score", "tiles: weights", "tiles: gradients", "tiles: merge"}
C, H, V = 2, 16, 70  # off the blocks and tiles; one token of each sign
MASSES = 64  # columns whose mass is kept together, so that there are several


def ran(folder, only, softcap=None, **more):
    """The rows of Triton's kernels, by name, and how many of them failed."""
    shapes = (("tiny", C, H, V, softcap),)
    settings = Settings("cpu", rounds=1, shapes=shapes, only=re.compile(rf"\| ({only}) \| triton$"), **more)
    journal = Journal(folder, "part")
    failed = work(journal, roofline.kernels(settings), settings, {}, lambda rows: {"table": rows}).failed
    return {row["kernel"]: row for row in journal.rows.values()}, failed


@pytest.mark.parametrize(("dtype", "softcap"), [("bf16", None), ("fp32", 2.0)])
def test_right_kernels_pass(dtype, softcap, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(roofline, "MASS_TILE", MASSES)
    rows, failed = ran(tmp_path, ".*", softcap, dtype=dtype)
    losses = {f"token_loss {loss} to {dtype}" for loss in roofline.TOKEN_LOSSES}
    assert {*rows} == ROWS | TILES | losses | {f"gradients to {dtype}"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert failed == 0
    rates, size = plan.RATES["sm_90"], {"bf16": 2, "fp32": 4}[dtype]
    operands, flops, tiles = (C + V) * H * size, 2 * C * H * V, -(-V // 64)
    bytes_of = {
        "statistics": 4 * C * V,
        "statistics, masses": 4 * C * V + 4 * C * 2,
        f"gradients to {dtype}": (4 + size) * C * V,
        "token_loss bnf to " + dtype: (8 + size) * C * V,
        "tiles: score": operands + 2 * 4 * tiles * C,
        "tiles: weights": operands + size * C * V + 4 * tiles * C,
        "tiles: gradients": operands + size * C * V,
        "tiles: merge": 2 * 4 * tiles * C + 2 * 4 * C,
    }
    for name, row in rows.items():
        assert row["bytes"] == bytes_of.get(name, row["bytes"]), name
        products = name in TILES - {"tiles: merge"}
        assert row["flops"] == (flops if products else None)
        assert (row["share_of_product"] is not None) == products
        assert row["seconds"] > 0
        if not products:
            assert row["predicted_seconds"] == row["bytes"] / rates.copy
        elif dtype == "bf16":
            stored = 0 if name == "tiles: score" else 2 * C * V / rates.copy
            assert row["predicted_seconds"] == pytest.approx(flops / rates.tile + stored)
        else:
            assert row["predicted_seconds"] is None
    assert rows["statistics"]["config"] == "block_vocab=64 warps=1"
    assert rows["statistics, masses"]["config"] == f"block_vocab={MASSES}"
    assert rows["tiles: score"]["config"].startswith("rows=16 vocab=64 width=16 ")


# name: (kernel, module, function, what is changed of what it returns or was given)
WRONG = {
    "statistics": ("statistics, masses", triton_rows, "statistics", lambda made, given: made[1][-1:].mul_(1.01)),
    "gradients": ("gradients to bf16", triton_rows, "gradients_", lambda made, given: made[0][:, -1].mul_(1.5)),
    "token loss": ("token_loss bnf to bf16", triton_rows, "token_loss_", lambda made, given: made[1][:1].mul_(1.1)),
    "target": ("target", triton_rows, "with_target_", lambda made, given: given[0][:, -1].mul_(1.5)),
    "score": ("tiles: score", triton_tiles, "score", lambda made, given: given[5].total.mul_(1.01)),
    "weights": ("tiles: weights", triton_tiles, "score", lambda made, given: given[7][:, -1].mul_(1.5)),
    "tiles": ("tiles: gradients", triton_tiles, "gradients", lambda made, given: given[6][:, -1].mul_(1.5)),
    "merge": ("tiles: merge", triton_tiles, "merge", lambda made, given: made[0].add_(2e-3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_time_for_a_wrong_kernel(name, tmp_path, monkeypatch):
    kernel, module, function, change = WRONG[name]
    right = getattr(module, function)

    def wrong(*given, **more):
        made = right(*given, **more)
        change(made, given)
        return made

    monkeypatch.setattr(module, function, wrong)
    rows, failed = ran(tmp_path, kernel)
    assert (rows[kernel]["status"], failed) == ("FAILED", 1)
    assert rows[kernel]["seconds"] is None


def test_the_profiles_names_are_the_kernels():
    """Those that a GPU's record is searched for."""
    for kind, module in (("row kernels", triton_rows), ("tile kernels", triton_tiles)):
        names = [name for name in vars(module) if name.endswith("_kernel")]
        assert len(names) == {"row kernels": 4, "tile kernels": 2}[kind]
        assert {roofline.category_of(name) for name in names} == {kind}
