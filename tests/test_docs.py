"""The documents do what they say: every block of code runs, every computed part is up to date, every link leads on.

A comment above a block of code says how it is run: `<!-- test: full -->` only with `--full`,
`<!-- test: skip, REASON -->` never, `<!-- test: file NAME -->` is written to a file and not run. All others run in the
fast tests, in the order of the page, in one namespace and one empty folder.
"""

from __future__ import annotations

import ast
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rgpb import OBJECTIVES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

FENCE = re.compile(r"(?:^<!-- test: (.+?) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("python", "bash")


class Block(NamedTuple):
    where: str
    mark: str
    language: str
    code: str


def blocks(name: str) -> list[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        Block(f"{name}:{text[: match.start(3)].count(chr(10)) + 1}", match[1] or "", match[2], match[3])
        for match in FENCE.finditer(text)
    ]


PAGES = [name for name in generate.DOCUMENTS if blocks(name)]


def run_page(name: str, full: bool) -> dict[str, Any]:
    """All blocks of a page in the working folder; what they leave in their namespace."""
    names: dict[str, Any] = {"__name__": "page"}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks(name):
        if block.mark.startswith("file "):
            Path(block.mark.removeprefix("file ")).write_text(block.code, encoding="utf-8")
        elif block.mark.startswith("skip") or (block.mark == "full" and not full):
            continue
        elif block.language == "python":
            exec(compile(block.code, block.where, "exec"), names)
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert not done.returncode, f"{block.where}\n{done.stdout}\n{done.stderr}"
    return names


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """An own folder, and no objective of a page left behind."""
    monkeypatch.chdir(tmp_path)
    before = set(OBJECTIVES)
    yield
    for name in set(OBJECTIVES) - before:
        del OBJECTIVES[name]


def loss_moves(names: dict[str, Any], printed: str) -> None:
    """The reference is not the policy of the same step: the loss leaves log 2."""
    assert names["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert names["losses"][-1] < 0.9 * math.log(2)


def trains_and_evaluates(names: dict[str, Any], printed: str) -> None:
    """The loop's loss moves, and so does that of the trainer's own evaluation."""
    loss_moves(names, printed)
    assert names["trainer"].state.global_step == 3
    assert 0 < names["after"] < names["before"] < math.inf


def first_is_nan(names: dict[str, Any], printed: str) -> None:
    naive, ours = printed.split("tensor")[1:3]
    assert naive.count("nan") == 6
    assert "nan" not in ours


SHOWN = {"README.md": loss_moves, "docs/integrate.md": trains_and_evaluates, "docs/numerics.md": first_is_nan}


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name, capsys):
    names = run_page(name, full=False)
    if name in SHOWN:
        SHOWN[name](names, capsys.readouterr().out)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PAGES if any(block.mark == "full" for block in blocks(name))])
def test_whole_page_runs(name):
    run_page(name, full=True)


@pytest.mark.parametrize("name", PAGES)
def test_marks_are_known(name):
    for block in blocks(name):
        assert block.mark in ("", "full") or re.match(r"file \S+$|skip, \w+", block.mark), block.where
        assert block.language in RUN or block.mark.startswith("file "), f"{block.where}: nothing runs {block.language}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_runs(path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [str(path)])
    names = runpy.run_path(str(path), run_name="__main__")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert said
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert f"`{path.name}`" in (path.parent / "README.md").read_text(encoding="utf-8")
    if "margins" in names:
        assert names["margins"][-1] > max(0.1, names["margins"][0])
    if "losses" in names:
        loss_moves(names, capsys.readouterr().out)


@pytest.mark.parametrize("name", generate.DOCUMENTS)
def test_computed_parts_are_up_to_date(name):
    assert generate.generated(name) == (ROOT / name).read_text(encoding="utf-8"), "run `python docs/generate.py`"


def anchors(text: str) -> set[str]:
    """What the headings of a document are called in links, on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()) for heading in headings
    }


@pytest.mark.parametrize("name", sorted({*generate.DOCUMENTS, "CHANGELOG.md"}))
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        place = (ROOT / name).parent / path if path else ROOT / name
        if not place.exists() or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            missing.append(link)
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_objective_is_documented():
    rows = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name in OBJECTIVES:
        mine = [row for row in rows.splitlines() if row.startswith(f"| `{name}` |")]
        # value, coefficient, source; options, needs, couples
        assert len([row for row in mine if row.count("|") == 5]) == 2, name


def test_every_source_is_in_the_bibliography():
    listed = (ROOT / "docs" / "bibliography.md").read_text(encoding="utf-8")
    named, numbers = set(), set()
    for path in (ROOT / "rgpb").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"[A-Z][\w’']+(?: et al\.| & [A-Z]\w+) \d{4}", text))
        numbers |= set(re.findall(r"arXiv (\d{4}\.\d{5})", text))
    assert len(named) > 15
    assert len(numbers) >= 3
    assert not [name for name in named if name not in listed]
    assert not [number for number in numbers if f"https://arxiv.org/abs/{number}" not in listed]


def test_every_finding_has_its_line():
    page = (ROOT / "docs" / "surprises.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(\.\./findings/([\w.]+)\)", page)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "findings").iterdir())
    tests = re.findall(r"\[(tests/[\w/.]+)\]\(\.\./\1\)", page)
    assert len(tests) > 10
    assert not [name for name in tests if not (ROOT / name).is_file()]


@pytest.mark.full
def test_site_builds_and_asks_nothing_of_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert len(pages) > 12
    for text in pages.values():
        assert not re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//", text)
        assert not re.findall(r"<link\b[^>]*rel=\"?(?:stylesheet|preconnect|preload)[^>]*href=\"?(?:https?:)?//", text)
    assert "<math" in pages["how-it-works.html"]
    assert 'class="arithmatex"' not in "".join(pages.values())
    assert "rgpb.fused.fused_loss" in pages["api.html"]
