"""What `mkdocs build` does beside rendering the pages of this folder (mkdocs.yml).

* Formulas between dollars become MathML, which browsers draw by themselves: no script, nothing from the network.
* `contributing.md` shows the repository's CONTRIBUTING.md.
* A link to a file outside this folder (a result, a script) leads to a copy of it on the site, under `source/`.
"""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
NAME = r"<m[io]>(?:log|min|max)</m[io]>"
APART = (re.compile(rf"({NAME})(?!<mo[^>]*>&#x00028;)"), re.compile(rf"(</mi>|&#x00029;</mo>)(?={NAME})"))
LINK = re.compile(r"\]\(([^)#\s]+)")
SHOWN = {"contributing.md": "CONTRIBUTING.md"}  # page of this folder → the file of the root that it shows
TEXT = (".md", ".py", ".json")


def text_of(page: str) -> str:
    """The Markdown of a page of this folder, with links as they are written in this folder."""
    source = SHOWN.get(page)
    if source is None:
        return (ROOT / "docs" / page).read_text(encoding="utf-8")

    def moved(match: re.Match[str]) -> str:
        link = match[1]
        if "://" in link:
            return match[0]
        return f"]({link.removeprefix('docs/')}" if link.startswith("docs/") else f"](../{link}"

    return LINK.sub(moved, (ROOT / source).read_text(encoding="utf-8"))


def place(link: str) -> str | None:
    """Where on the site a link to a file outside this folder leads; None for other links.

    A link to a file that is not there stays as it is, and fails the build.
    """
    path = link.removeprefix("../")
    pages = {shown: page for page, shown in SHOWN.items()}
    if path in pages:
        return pages[path]
    if path == link or not (ROOT / path).is_file():
        return None
    return f"source/{path}" + (".txt" if PurePosixPath(path).suffix in TEXT else "")  # shown as it is written


def on_files(files: Files, config: Any) -> Files:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for link in sorted(set(LINK.findall(text_of(page.name)))):
            name = place(link)
            if name is not None and name.startswith("source/") and name not in files.src_uris:
                content = (ROOT / link.removeprefix("../")).read_bytes()
                files.append(File.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        return f"]({place(match[1]) or match[1]}"

    return LINK.sub(led, text_of(name) if name in SHOWN else markdown)


def on_page_content(content: str, **_: Any) -> str:
    def drawn(match: re.Match[str]) -> str:
        drawing = convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")
        for apart in APART:  # as TeX sets a function's name
            drawing = apart.sub(r'\1<mspace width="0.17em"/>', drawing)
        return drawing

    return FORMULA.sub(drawn, content)
