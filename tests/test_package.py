"""The package as it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command, **keywords):
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, **keywords).stdout


def test_import_brings_in_nothing_heavy():
    loaded = run("-c", "import sys, rgpb, rgpb.fused; print(*sys.modules)").split()
    assert "rgpb.kernels.torch_rows" in loaded
    assert not {"transformers", "datasets", "accelerate", "matplotlib", "triton", "torch._dynamo"} & set(loaded)


def test_wheel_holds_the_kernels_inside_the_package(tmp_path):
    source = tmp_path / "source"
    kept_out = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=kept_out)
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
        archive.extractall(tmp_path / "installed")
    assert {name for name in top if not name.endswith(".dist-info")} == {"rgpb"}
    program = "import rgpb, rgpb.kernels.torch_rows as rows; print(rows.__file__)"
    where = run("-c", program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")})
    assert Path(where.strip()) == tmp_path / "installed" / "rgpb" / "kernels" / "torch_rows.py"
