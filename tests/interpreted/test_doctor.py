"""`rgpb doctor` on the Triton kernels: right ones pass in both sets, wrong ones don't."""

from __future__ import annotations

import pytest
import torch

from rgpb.bench import doctor
from rgpb.kernels import triton_rows, triton_tiles

CPU = torch.device("cpu")
WRONG = {
    "triton, statistics": (triton_rows, "statistics", lambda made, given: made[0].lse_other.add_(2e-3)),
    "triton, gradients": (triton_rows, "gradients_", lambda made, given: made[0][:, -1].mul_(1.5)),
    "triton, token loss": (triton_rows, "token_loss_", lambda made, given: made[1].mul_(1.01)),
    "tiled, target": (triton_tiles, "with_target_", lambda made, given: made[-1:].mul_(1.01)),
    "tiled, gradients": (triton_tiles, "gradients", lambda made, given: given[6][:, -1].mul_(1.5)),
    "tiled, merge": (triton_tiles, "merge", lambda made, given: made[0].add_(2e-3)),
}


SPOT = ("triton, gradients", "tiled, target", "tiled, merge")  # the others only with --full
REST = [pytest.param(*rest, marks=pytest.mark.full) for rest in (("triton", "fp32"), ("tiled", "bf16"))]


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("triton", "bf16"), ("tiled", "fp32"), *REST],
)
def test_right_kernels_pass(impl, dtype):
    check = doctor.self_check(CPU, impl, dtype)
    assert check.status == "ok", check


@pytest.mark.parametrize(
    "name", [name if name in SPOT else pytest.param(name, marks=pytest.mark.full) for name in WRONG]
)
def test_a_wrong_kernel_fails(name, monkeypatch):
    module, kernel, change = WRONG[name]
    right = getattr(module, kernel)

    def wrong(*arguments, **keywords):
        made = right(*arguments, **keywords)
        change(made, arguments)
        return made

    monkeypatch.setattr(module, kernel, wrong)
    assert doctor.self_check(CPU, name.partition(",")[0], "fp32").status == "FAILED"
