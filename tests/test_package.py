"""The package as it is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from rgpb.kernels import cpp_rows

ROOT = Path(__file__).parents[1]


def run(*command, **keywords):
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, **keywords).stdout


def test_import_brings_in_nothing_heavy():
    loaded = run("-c", "import sys, rgpb, rgpb.fused; print(*sys.modules)").split()
    assert "rgpb.kernels.torch_rows" in loaded
    heavy = {"transformers", "datasets", "accelerate", "matplotlib", "triton", "torch._dynamo"}
    assert heavy & set(loaded) == set()


@pytest.fixture
def source(tmp_path):
    """The sources as a clone has them."""
    place = tmp_path / "source"
    kept_out = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "runs", "__pycache__", ".*_cache", "*.so")
    shutil.copytree(ROOT, place, ignore=kept_out)
    return place


def packed(source, out, kind):
    """An sdist or a wheel of sources, as pip and `build` make them."""
    out.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return out / run("-c", program, cwd=source).splitlines()[-1]


@pytest.mark.full  # compiles the C++ kernels, twice
def test_wheel_and_sdist_are_the_same_bits_again(source, tmp_path, monkeypatch):
    """From sources in another folder, of another age; the wheel from the sdist. SOURCE_DATE_EPOCH says when."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    one, again = packed(source, tmp_path / "one", "sdist"), tmp_path / "again" / "source"
    shutil.copytree(source, again, ignore=shutil.ignore_patterns("*.egg-info"))
    for path in again.rglob("*"):
        os.utime(path, (10**9, 10**9))
    assert packed(again, tmp_path / "two", "sdist").read_bytes() == one.read_bytes()
    with tarfile.open(one) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    first, second = (packed(place, tmp_path / place.name, "wheel") for place in (again, unpacked))
    assert first.name == second.name == f"rgpb-0.1.0-py3-none-{first.name.partition('none-')[2]}"
    with zipfile.ZipFile(first) as here, zipfile.ZipFile(second) as there:
        assert {n: here.getinfo(n).CRC for n in here.namelist()} == {n: there.getinfo(n).CRC for n in there.namelist()}
    assert first.read_bytes() == second.read_bytes()


def test_sdist_has_what_a_wheel_is_made_of(source, tmp_path):
    with tarfile.open(packed(source, tmp_path / "out", "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [source / folder for folder in ("rgpb", "kernels", "csrc")]
    needed = {str(path.relative_to(source)) for folder in folders for path in folder.rglob("*.*")}
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"} <= names


@pytest.mark.skipif(cpp_rows.missing() is not None, reason=str(cpp_rows.missing()))
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_is_of_no_python():
    """So one wheel serves them all."""
    (library,) = Path(cpp_rows.__file__).parent.glob("_cpp*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert any("torch" in name for name in names)
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


@pytest.mark.full  # compiles the C++ kernels
def test_wheel_holds_the_kernels_inside_the_package(source, tmp_path):
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("rgpb-0.1.0-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = "import rgpb, rgpb.kernels.cpp_rows as rows; print(rows.__file__, rows.missing(), sep='|')"
    where, missing = (
        run("-c", program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")}).strip().split("|")
    )
    assert Path(where) == tmp_path / "installed" / "rgpb" / "kernels" / "cpp_rows.py"
    assert missing == "None"
    for name in ("py.typed", "fused.pyi"):
        assert (tmp_path / "installed" / "rgpb" / name).exists(), name


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
BUILD = "import sys; sys.argv = ['setup.py', '-q', 'bdist_wheel', '-d', {!r}]; exec(open('setup.py').read())"


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        pytest.param(WITHOUT_TORCH, {}, "no torch here; install torch first", id="no torch", marks=pytest.mark.full),
        pytest.param("", {"CC": "false", "CXX": "false"}, "the compiler failed", id="no compiler"),
    ],
)
def test_without_torch_or_a_compiler_the_rest_is_installed(source, tmp_path, before, environment, reason):
    """One line says what is left out and why; the package works, and says the same when it is asked."""
    made = subprocess.run(
        [sys.executable, "-c", before + BUILD.format(str(tmp_path))], cwd=source, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    said = [line for line in made.stderr.splitlines() if line.startswith("rgpb: installing without the C++ kernels")]
    assert len(said) == 1
    assert reason in said[0]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith(".so")]
        assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"rgpb"}
        archive.extractall(tmp_path / "installed")
    program = (
        "import torch; from rgpb.fused import mle_loss\n"
        "given = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)\n"
        "print(mle_loss(*given).isfinite().item())\n"
        "try: mle_loss(*given, impl='cpp')\n"
        "except ValueError as error: print(error)"
    )
    fine, refused = run("-c", program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")}).splitlines()
    assert fine == "True"
    assert "impl: expected 'auto' or 'torch', since the C++ kernels weren't built" in refused
    assert refused.endswith("got 'cpp'")


@pytest.mark.skipif(cpp_rows.missing() is not None, reason=str(cpp_rows.missing()))
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_instructions_stay_in_their_own_functions():
    """What runs on every processor has no wider vectors than every processor."""
    (library,) = Path(cpp_rows.__file__).parent.glob("_cpp*.so")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    wide = {"%zmm": set(), "%ymm": set()}
    name = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.partition("<")[2][:-2]
        for register, users in wide.items():
            if register in line:
                users.add(name)
    assert any("avx512" in name for name in wide["%zmm"])
    assert any("avx2" in name for name in wide["%ymm"])
    assert not [name for name in wide["%zmm"] if "rgpb::avx512" not in name]
    assert not [name for name in wide["%ymm"] if "rgpb::avx512" not in name and "rgpb::avx2" not in name]


def test_kernels_for_another_torch_are_refused(monkeypatch):
    """They are compiled against one version's C++, and another's may differ where nothing shows."""
    if cpp_rows.missing():
        pytest.skip(cpp_rows.missing())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    reason = cpp_rows._load()
    assert "were built for torch" in reason
    assert "and this is 2.99.0: reinstall rgpb" in reason


def test_kernels_of_other_sources_are_refused(monkeypatch, tmp_path):
    """In a checkout, where new sources come without a build."""
    if cpp_rows.missing():
        pytest.skip(cpp_rows.missing())
    assert cpp_rows.SOURCES == ROOT / "csrc"
    assert cpp_rows._load() is None
    shutil.copytree(cpp_rows.SOURCES, tmp_path / "csrc")
    (tmp_path / "csrc" / "rows.h").write_text("// newer\n")
    monkeypatch.setattr(cpp_rows, "SOURCES", tmp_path / "csrc")
    assert "were built from other sources than those in" in cpp_rows._load()


def test_a_broken_library_is_refused(monkeypatch, tmp_path):
    """With the linker's own reason; the package goes on without it."""
    (tmp_path / cpp_rows.NAME).write_bytes(b"")
    monkeypatch.setattr(cpp_rows, "__file__", str(tmp_path / "cpp_rows.py"))
    assert "the C++ kernels can't be loaded (" in cpp_rows._load()
    assert "file too short" in cpp_rows._load()
