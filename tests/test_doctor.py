"""`rgpb doctor`: what it says of this machine is so, and a kernel that is wrong doesn't pass."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from rgpb import kernels
from rgpb.bench import doctor, measure
from rgpb.cli import main
from rgpb.kernels import cpp_rows, torch_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def quick(monkeypatch):
    """Rates that take no time; only PyTorch's operations are checked."""
    monkeypatch.setattr(doctor, "product_rate", lambda dtype, device: 123e9)
    monkeypatch.setattr(doctor, "copy_rate", lambda device: 45e9)
    monkeypatch.setattr(doctor, "kernels", lambda device: ["torch"])
    monkeypatch.setattr(doctor, "devices", lambda: [CPU])


def lines_of(capsys):
    """What was printed, each line's words."""
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_all_is_well(capsys, monkeypatch):
    """As it is called: every implementation that is here, and rates that are measured."""
    assert main(["doctor"]) == 0
    lines = lines_of(capsys)
    here = [impl for device in doctor.devices() for impl in doctor.kernels(device)]
    checks = [line for line in lines if line[-1:] == ["ok"]]
    assert [line[1:3] for line in checks] == [[impl, dtype] for impl in here for dtype in doctor.DTYPES]
    for line in checks:
        assert all(0 < float(error) < 1e-2 for error in line[3:8])
        assert float(line[8]) < 60
    (rates,) = [line for line in lines if line[:1] == ["cpu"] and len(line) == 4 and line[1] not in ("auto", "cpp")]
    assert all(float(rate.replace(",", "")) > 0 for rate in rates[1:])
    assert " ".join(lines[-1]).startswith(f"All is well: {len(checks)} of {len(checks)} checks passed")


# kernel, and what is done to its result in place: a little everywhere, or much in one place
WRONG = {
    "torch, statistics": (torch_rows, "statistics_", lambda made: made[0].lse_other.add_(2e-3)),
    "torch, NaN": (torch_rows, "statistics_", lambda made: made[0].lse_other[-1:].fill_(math.nan)),
    "torch, gradients": (torch_rows, "gradients_", lambda made: made[0][:, -1].mul_(1.5)),
    "torch, target": (torch_rows, "with_target_", lambda made: made[-1:].mul_(1.01)),
    "cpp, statistics": (cpp_rows, "statistics_", lambda made: made[0].lse_other.add_(2e-3)),
    "cpp, gradients": (cpp_rows, "gradients_", lambda made: made[0][:, -1].mul_(1.5)),
    "cpp, token loss": (cpp_rows, "token_loss_", lambda made: made[1].mul_(1.01)),
    "cpp, its gradients": (cpp_rows, "token_loss_", lambda made: made[2][:, -1].mul_(1.5)),
}


def spoil(monkeypatch, module, kernel, change):
    right = getattr(module, kernel)

    def wrong(*arguments, **keywords):
        made = right(*arguments, **keywords)
        change(made)
        return made

    monkeypatch.setattr(module, kernel, wrong)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails(name, monkeypatch):
    impl = name.partition(",")[0]
    if impl == "cpp" and cpp_rows.missing() is not None:
        pytest.skip(cpp_rows.missing())
    assert doctor.self_check(CPU, impl, "fp32").status == "ok"
    spoil(monkeypatch, *WRONG[name])
    assert doctor.self_check(CPU, impl, "fp32").status == "FAILED"


def test_a_failed_check_is_the_exit_code(quick, capsys, monkeypatch):
    spoil(monkeypatch, *WRONG["torch, statistics"])
    assert main(["doctor"]) == 1
    lines = lines_of(capsys)
    assert [line[-1] for line in lines if line[:2] == ["cpu", "torch"] and len(line) > 3] == ["FAILED"] * 2
    assert " ".join(lines[-1]) == "NOT well: 2 of 2 checks failed: cpu torch fp32, cpu torch bf16"


def test_an_exception_is_a_finding(quick, capsys, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("no such instruction\nand a trace")

    monkeypatch.setattr(torch_rows, "gradients_", raises)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("error: RuntimeError: no such instruction") == 2
    assert "and a trace" not in shown
    assert "NOT well: 2 of 2 checks failed: cpu torch fp32, cpu torch bf16" in shown


def test_what_can_run_where(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(cpp_rows, "missing", lambda: None)
    assert doctor.kernels(CPU) == ["cpp", "torch"]
    assert doctor.kernels(CUDA) == ["triton", "tiled", "torch"]
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(cpp_rows, "missing", lambda: "a reason")
    assert doctor.kernels(CPU) == doctor.kernels(CUDA) == ["torch"]


@pytest.mark.parametrize("with_rich", [True, False])
def test_why_the_others_cannot_run(with_rich, quick, capsys, monkeypatch):
    if with_rich:
        pytest.importorskip("rich")
    else:
        for name in ("rich.box", "rich.console", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(cpp_rows, "missing", lambda: "they weren't built for [this] torch")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "cpu auto takes torch" in words
    assert "cpu triton no: Triton has no kernels for the device cpu" in words or "isn't installed" in words
    assert "cpu cpp no: they weren't built for [this] torch" in words
    assert "cpu torch yes" in words
    assert f"torch {torch.__version__}" in words
    assert "cpu 123 123 45.0" in words
    assert 'impl="auto" takes torch on cpu' in words
    assert ("─" in shown) == with_rich
    monkeypatch.setattr(cpp_rows, "missing", lambda: None)
    monkeypatch.setattr(cpp_rows, "describe", lambda: "avx512")
    assert main(["doctor"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "cpu auto takes cpp" in words
    assert "cpu cpp yes, avx512" in words


def test_only_torch_is_needed():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'numpy', 'triton', 'transformers', 'matplotlib')))\n"
        "from rgpb.bench import doctor; from rgpb.cli import main\n"
        "doctor.product_rate = doctor.copy_rate = lambda *_: 1e9\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cpu     triton  no: the package triton isn't installed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("All is well: ")


# -- rates -------------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that only work moves: `rate` flops or bytes a second."""

    def __init__(self, monkeypatch, rate):
        self.now, self.rate, self.rows = 0.0, rate, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def mm(self, a, b, out):
        self.rows.append(len(a))
        self.now += 2 * len(a) * a.shape[1] * b.shape[1] / self.rate


@pytest.mark.parametrize(("rate", "most"), [(1e12, 512), (1e10, 64), (1e6, 16)])
def test_rate_of_products(rate, most, monkeypatch):
    """The full size where there is time for it, else what there is time for; never more than one call too many."""
    machine = Machine(monkeypatch, rate)
    monkeypatch.setattr(torch, "mm", machine.mm)
    assert measure.product_rate(torch.float32, "cpu", 0.3) == pytest.approx(rate)
    assert machine.rows[-1] == most
    one = 2 * 16 * 1024 * 8192 / rate
    assert machine.now <= max(2 * one, 0.3 + one + 2 * most * 1024 * 8192 / rate)


@pytest.mark.parametrize("fresh", [False, True])
def test_rate_of_copies_counts_what_is_read_and_written(fresh, monkeypatch):
    machine = Machine(monkeypatch, 1e9)

    def copied(x, *_):
        machine.now += 2 * x.nbytes / machine.rate

    monkeypatch.setattr(torch.Tensor, "clone" if fresh else "copy_", copied)
    assert measure.copy_rate("cpu", fresh=fresh) == pytest.approx(1e9)
