"""Puts one fault at a time into a copy of the sources and runs the tests that should notice: `make mutations`.

    python tests/mutations.py [--tree DIR] [--table FILE] [--only TEXT] [--check]

The faults stand in mutations.toml. A fault is *killed* by the first test file that fails; it *survives* if all files of
its area pass. The table has one line a fault and is continued where it ends; `--check` only looks for each text.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tomllib

DATA = Path(__file__).with_name("mutations.toml")
TIMEOUT = 1800  # seconds a test file may take: a fault can make a loop endless


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="checkout whose tests are tried")
    parser.add_argument("--table", type=Path, default=Path("runs/mutations.tsv"))
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--check", action="store_true", help="only check that each fault's text is found once")
    given = parser.parse_args()
    data = tomllib.loads(DATA.read_text())
    faults = [fault for fault in data["mutation"] if given.only in fault["breaks"]]
    tree = given.tree.resolve()
    places = find_all(tree, data["areas"], faults)
    if given.check:
        print(f"{len(faults)} faults, each found once")
        return
    given.table.parent.mkdir(parents=True, exist_ok=True)
    done = {line.split("\t")[0] for line in given.table.read_text().splitlines()} if given.table.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(tree, Path(folder))
        for fault in faults:
            if fault["breaks"] in done:
                continue
            start = time.monotonic()
            verdict = judge(tree, copy, places[fault["breaks"]], fault, data["areas"][fault["area"]]["tests"])
            with given.table.open("a") as table:
                table.write(f"{fault['breaks']}\t{verdict}\t{time.monotonic() - start:.0f} s\n")
            print(fault["breaks"], verdict, sep=": ", flush=True)
    lines = [line.split("\t")[1] for line in given.table.read_text().splitlines()]
    killed, unknown = (sum(line.startswith(word) for line in lines) for word in ("killed", "can't tell"))
    print(f"{killed} killed, {len(lines) - killed - unknown} survived, {unknown} can't be told here")


def find_all(tree: Path, areas: dict[str, Any], faults: list[dict[str, str]]) -> dict[str, Path]:
    """The file of each fault, relative to the tree; all that aren't found exactly once are listed."""
    places, wrong = {}, []
    for fault in faults:
        files = sorted(path for pattern in areas[fault["area"]]["files"] for path in tree.glob(pattern))
        found = [path for path in files if path.is_file() and path.suffix != ".so" for _ in spots(path, fault)]
        if len(found) == 1:
            places[fault["breaks"]] = found[0].relative_to(tree)
        else:
            wrong.append(f"{fault['breaks']}: expected once, found {len(found)} times: {fault['old']}")
    if wrong:
        sys.exit("\n".join(wrong))
    return places


def spots(path: Path, fault: dict[str, str]) -> list[int]:
    """Where `old` begins in a file, from the first `near` on."""
    text = path.read_text()
    start = text.find(fault.get("near", ""))
    return [match.start() for match in re.finditer(re.escape(fault["old"]), text) if match.start() >= start >= 0]


def copy_of(tree: Path, folder: Path) -> Path:
    """The sources and tests, importable from there: `rgpb.kernels` is a folder beside `rgpb`."""
    names = [
        name
        for name in ("rgpb", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
        if (tree / name).exists()
    ]
    for name in names:
        shutil.copytree(tree / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "constraints.txt"):
        shutil.copy(tree / name, folder)
    (folder / "rgpb" / "kernels").symlink_to("../kernels")
    return folder


def judge(tree: Path, copy: Path, place: Path, fault: dict[str, str], tests: list[str]) -> str:
    """ "killed by …", "survived" or "can't tell: …"; the copy is as it was afterwards."""
    python = str(tree / ".venv" / "bin" / "python")
    if fault.get("needs") == "bf16":
        asked = "from rgpb.kernels import cpp_rows; print(cpp_rows.BF16_PRODUCTS)"
        if "True" not in run([python, "-c", asked], copy).stdout:
            return "can't tell: no bfloat16 instructions"
    path = copy / place
    text = path.read_text()
    (at,) = spots(path, fault)
    libraries = list((copy / "kernels").glob("_cpp*.so"))
    kept = [(library, library.read_bytes()) for library in libraries] if fault["area"] == "cpp" else []
    path.write_text(text[:at] + fault["new"] + text[at + len(fault["old"]) :])
    try:
        if fault["area"] == "cpp":
            for library in libraries:
                library.unlink()
            built = run([python, "setup.py", "-q", "build_ext", "--inplace"], copy, CXXFLAGS="-O1")
            if not list((copy / "kernels").glob("_cpp*.so")):
                sys.exit(f"{fault['breaks']}: doesn't compile\n{built.stdout}")
        for name in tests:
            interpret = {"TRITON_INTERPRET": "1"} if name.startswith("interpreted/") else {}
            command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{name}"]
            try:
                made = run(command, copy, **interpret)
            except subprocess.TimeoutExpired:
                return f"killed by {name}: no end"
            if made.returncode == 1:
                failed = re.findall(r"^FAILED (.+?)(?: - |$)", made.stdout, re.MULTILINE)
                return f"killed by {failed[0] if failed else name}"
            if made.returncode not in (0, 5):  # 5: all is deselected
                return f"killed by {name}: can't be collected or run, {made.returncode}"
        return "survived"
    finally:
        path.write_text(text)
        for library, content in kept:
            library.write_bytes(content)


def run(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
    )  # fmt: skip


if __name__ == "__main__":
    main()
