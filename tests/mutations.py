"""Puts one fault at a time into a copy of the sources and runs the tests that should notice: `make mutations`.

    python tests/mutations.py [--tree DIR] [--table FILE] [--only TEXT] [--check]

The faults stand in mutations.toml. A fault is *killed* by the first test file that fails; it *survives* if all files of
its area pass. The table has one line a fault and is continued where it ends; `--check` only looks for each text.
Python 3.11 or newer.

Tests run in children of this process, which has imported PyTorch already, so that a fault takes seconds. First the
unchanged copy has to pass each area's first file, or half a minute of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch  # noqa: F401 for the children, too; but no triton, which reads TRITON_INTERPRET when it is imported

DATA = Path(__file__).with_name("mutations.toml")
TIMEOUT = 1800  # seconds a test file may take: a fault can make a loop endless
CONTROL = 30  # seconds for which the unchanged copy is tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="checkout whose tests are tried")
    parser.add_argument("--table", type=Path, default=Path("runs/mutations.tsv"))
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--check", action="store_true", help="only check that each fault's text is found once")
    given = parser.parse_args()
    data = tomllib.loads(DATA.read_text())
    faults = [fault for fault in data["mutation"] if given.only in fault["breaks"]]
    faults.sort(key=lambda fault: fault["area"] == "cpp")  # each takes a build
    tree = given.tree.resolve()

    def tests_of(fault: dict[str, Any]) -> list[str]:
        return fault.get("tests", data["areas"][fault["area"]]["tests"])

    places = find_all(tree, data["areas"], faults)
    if given.check:
        print(f"{len(faults)} faults, each found once")
        return
    given.table.parent.mkdir(parents=True, exist_ok=True)
    done = {line.split("\t")[0] for line in given.table.read_text().splitlines()} if given.table.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(tree, Path(folder))
        faults = [fault for fault in faults if fault["breaks"] not in done]
        for name in sorted({tests_of(fault)[0] for fault in faults}):
            code, said = outcome(copy, name, CONTROL)
            if code:
                sys.exit(f"{name} fails without any fault\n{said}")
        for fault in faults:
            start = time.monotonic()
            verdict = judge(copy, places[fault["breaks"]], fault, tests_of(fault))
            with given.table.open("a") as table:
                table.write(f"{fault['breaks']}\t{verdict}\t{time.monotonic() - start:.0f} s\n")
            print(fault["breaks"], verdict, sep=": ", flush=True)
    lines = [line.split("\t")[1] for line in given.table.read_text().splitlines()]
    killed, unknown = (sum(line.startswith(word) for line in lines) for word in ("killed", "can't tell"))
    print(f"{killed} killed, {len(lines) - killed - unknown} survived, {unknown} can't be told here")


def find_all(tree: Path, areas: dict[str, Any], faults: list[dict[str, Any]]) -> dict[str, Path]:
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


def spots(path: Path, fault: dict[str, Any]) -> list[int]:
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


def judge(copy: Path, place: Path, fault: dict[str, Any], tests: list[str]) -> str:
    """ "killed by …", "survived" or "can't tell: …"; the copy is as it was afterwards."""
    if fault.get("needs") == "bf16" and in_child(lambda: 1 - has_bf16(), copy)[0]:
        return "can't tell: no bfloat16 instructions"
    path = copy / place
    text = path.read_text()
    (at,) = spots(path, fault)
    libraries = list((copy / "kernels").glob("_cpp*.so"))
    kept = [(library, library.read_bytes()) for library in libraries] if fault["area"] == "cpp" else []
    path.write_text(text[:at] + fault["new"] + text[at + len(fault["old"]) :])
    try:
        if fault["area"] == "cpp":
            build(copy, libraries, fault["breaks"])
        for name in tests:
            code, said = outcome(copy, name)
            if code is None:
                return f"killed by {name}: no end"
            if code == 1:
                failed = re.findall(r"^FAILED (.+?)(?: - |$)", said, re.MULTILINE)
                return f"killed by {failed[0] if failed else name}"
            if code not in (0, 5):  # 5: all is deselected
                return f"killed by {name}: can't be collected or run, {code}"
        return "survived"
    finally:
        path.write_text(text)
        for library, content in kept:
            library.write_bytes(content)


def outcome(copy: Path, name: str, timeout: int = TIMEOUT) -> tuple[int | None, str]:
    """`in_child` of one test file, up to its first failure."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return in_child(lambda: pytest.main([*options, *f"tests/{name}".split()]), copy, name, timeout)


def has_bf16() -> bool:
    from rgpb.kernels import cpp_rows

    return cpp_rows.BF16_PRODUCTS


def build(copy: Path, libraries: list[Path], name: str) -> None:
    for library in libraries:
        library.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    said = subprocess.run(command, cwd=copy, env={**os.environ, "CXXFLAGS": "-O1"}, capture_output=True, text=True)
    if not list((copy / "kernels").glob("_cpp*.so")):
        sys.exit(f"{name}: doesn't compile\n{said.stdout}{said.stderr}")


def in_child(work: Callable[[], int], folder: Path, name: str = "", timeout: int = TIMEOUT) -> tuple[int | None, str]:
    """(exit code, or None if it took too long; what it printed) of `work` in a child, in that folder."""
    output = folder / "output.txt"
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(folder)
            sys.path[:0] = [str(folder), str(folder / "tests")]
            sys.dont_write_bytecode = True
            os.environ.update({"COLUMNS": "200", "TRITON_INTERPRET": str(int(name.startswith("interpreted/")))})
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = int(work())
        finally:
            sys.stdout.flush()
            os._exit(code)
    for _ in range(timeout * 10):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), output.read_text()
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


if __name__ == "__main__":
    main()
