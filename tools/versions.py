"""A fast part of the tests on other versions of what rgpb stands on: `make versions`, by hand, in an hour or two.

A row of `ROWS` is an environment of its own. What it names is installed over the environment that runs this, with what
that requires; everything else is the running environment's, torch always. What came out is kept in tests/versions.json,
which docs/generate.py makes a table of. A row that is there is run again only when it is named.

    python tools/versions.py [ROW ...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests" / "versions.json"
PLACE = ROOT / "build" / "versions"
# What a row's environment is asked for afterwards, since `installs` brings what it requires
NOTED = ("transformers", "tokenizers", "huggingface_hub", "accelerate", "datasets", "peft", "trl", "numpy", "triton")
LIMIT_S = 3600


class Row(NamedTuple):
    """What is installed, and the tests that run on it: pytest's arguments, one run for each."""

    installs: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]


HF = (
    "tests/test_hf.py", "tests/test_tokens.py", "tests/test_trainer.py", "tests/test_train.py::TestStep",
)  # fmt: skip
GGUF = ("tests/test_gguf.py",)
HEADS = ("tests/test_heads.py",)
TRL = ("tests/test_trl.py", "tests/test_trl_group.py")
TRITON = (("tests/test_targets.py",), ("INTERPRET", "tests/interpreted/test_kernels.py"))
ROWS = {
    "constraints.txt": Row((), ((*HF, *GGUF, *HEADS, *TRL),)),
    "oldest": Row(
        (
            "transformers==4.57.1", "tokenizers==0.22.0", "accelerate==1.3.0", "datasets==3.0.0", "peft==0.18.0",
            "safetensors==0.5.0", "matplotlib==3.8.0", "rich==13.0.0",
            "numpy==1.26.4", "pyarrow==21.0.0", "pandas==2.2.3",
        ),
        ((*HF, "tests/test_data.py", "tests/test_doctor.py", "tests/test_bench.py"),),
    ),
    "transformers 4.57": Row(("transformers==4.57.6", "datasets==4.0.0"), (HF,)),
    "transformers 5.0": Row(("transformers==5.0.0",), (HF,)),
    "transformers 5.8": Row(("transformers==5.8.1", "gguf==0.16.0"), ((*HF, *GGUF),)),
    "transformers 5.24": Row(("transformers==5.24.0",), ((*HF, *GGUF), TRL)),
    "TRL, on its oldest": Row(
        ("trl==1.16.0", "transformers==4.57.1", "accelerate==1.10.1", "datasets==4.7.0"), (TRL,)
    ),
    "PEFT 0.18": Row(("peft==0.18.0",), (HEADS,)),
    "numpy 2.4": Row(("numpy==2.4.6",), (("tests/test_inputs.py", *HF),)),
    **{f"Triton {v[:3]}": Row((f"triton=={v}",), TRITON) for v in ("3.4.0", "3.5.1", "3.6.0", "3.9.0")},
}  # fmt: skip


def environment(name: str, row: Row) -> Path:
    """A virtual environment that sees the running one behind its own packages; its python."""
    place = PLACE / re.sub(r"\W+", "-", name)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin" / "python"
    (own,) = place.glob("lib/python*/site-packages")
    below = sysconfig.get_paths()["purelib"]
    (own / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", f"torch=={version('torch')}", *row.installs], check=True)
    return python


def test(python: Path, run: tuple[str, ...]) -> dict[str, Any]:
    """One run of pytest: how many tests passed, and which failed. Warnings are no errors: they are other versions'."""
    interpret, run = run[0] == "INTERPRET", run[1:] if run[0] == "INTERPRET" else run
    set_apart = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(PLACE / "triton-cache")}
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-W", "default", *run],
        cwd=ROOT, env={**os.environ, **set_apart, **({"TRITON_INTERPRET": "1"} if interpret else {})},
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode not in (0, 1):
        failed.append(f"pytest ended with {done.returncode}")
    return {"passed": int(passed[1]) if passed else 0, "failed": failed, "said": done.stdout + done.stderr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: those not yet run")
    asked = parser.parse_args().rows
    if unknown := set(asked) - set(ROWS):
        parser.error(f"ROW: expected some of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in asked or [name for name in ROWS if name not in kept]:
        row = ROWS[name]
        python = environment(name, row)
        ask = f"from importlib.metadata import version; print(*map(version, {(*NOTED, 'torch')!r}))"
        found = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.split()
        runs = [test(python, run) for run in row.runs]
        (PLACE / f"{python.parents[1].name}.log").write_text("\n".join(run["said"] for run in runs), encoding="utf-8")
        kept[name] = {
            "versions": dict(zip((*NOTED, "torch"), found)),
            "passed": sum(run["passed"] for run in runs),
            "failed": sorted(failed for run in runs for failed in run["failed"]),
            "date": date.today().isoformat(),
        }
        ordered = {name: kept[name] for name in ROWS if name in kept}
        KEPT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        said = f"{name}: {kept[name]['passed']} passed, {len(kept[name]['failed'])} failed"
        print(said, *kept[name]["failed"], sep="\n  ", flush=True)
        shutil.rmtree(python.parents[1])


if __name__ == "__main__":
    main()
