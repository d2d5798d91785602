"""Writes `rgpb/fused.pyi`, from which editors and type checkers know every loss with its own options and result.

    python tools/stub.py            write it
    python tools/stub.py --check    say what is out of date instead, and fail

Each `<name>_loss` gets the signature that it shows at run time: its options as their objective declares them, and the
keywords of `fused_loss`. Whatever else `rgpb/fused.py` defines without a leading underscore is there, too.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_origin

from rgpb import fused
from rgpb.objectives import OBJECTIVES, OneOf, Option
from rgpb.objectives.registry import is_built_in, type_text

SOURCE = Path(inspect.getfile(fused))
STUB = SOURCE.with_suffix(".pyi")
HEAD = '''"""What `python tools/stub.py` makes of rgpb/fused.py and the registered objectives; not to be edited."""

# fmt: off
# ruff: noqa: I001
'''
IMPORTS = """
import torch
from typing import Any, Literal, overload
from torch import Tensor
from torch.distributed import ProcessGroup
from rgpb.head import LMHead
from rgpb.objectives import RunningMean
"""
RESULTS = (  # of `return_metrics`
    ("Literal[False] = False", "Tensor"),
    ("Literal[True]", "tuple[Tensor, dict[str, Tensor]]"),
    ("bool", "Tensor | tuple[Tensor, dict[str, Tensor]]"),
)


def text() -> str:
    """The whole stub."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    blocks = [block for node in tree.body for block in of_node(node)]
    for name, spec in OBJECTIVES.items():
        if is_built_in(spec):
            options = {key: option for key, (option,) in (spec.declared or {}).items()}
            blocks.append(overloads(getattr(fused, f"{name}_loss"), options))
    body = "\n\n".join(blocks).replace("'", '"')
    return f"{HEAD}{imports(tree, body)}\n\n{body}\n"


def imports(tree: ast.Module, body: str) -> str:
    """Those of the source and of this file that the stub uses."""
    wanted = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    lines = []
    for node in (*tree.body, *ast.parse(IMPORTS).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in wanted]
            wanted -= {alias.asname or alias.name for alias in node.names}
            lines += [ast.unparse(node)] if node.names else []
    return "\n".join(lines)


def of_node(node: ast.stmt) -> Iterator[str]:
    """What the stub says of a statement of the source, but for the losses of single objectives."""
    match node:
        case ast.FunctionDef(name="fused_loss"):
            yield overloads(fused.fused_loss, {})
        case ast.FunctionDef(name=name) if not name.startswith("_"):
            yield signature(name, getattr(fused, name))
        case ast.ClassDef(name=name) if not name.startswith("_"):
            yield of_class(node)
        case ast.Assign(targets=[ast.Name(id=name)]) if not name.startswith("_") and not name.endswith("_loss"):
            yield of_constant(name, node)


def of_constant(name: str, node: ast.Assign) -> str:
    value = getattr(fused, name)
    if get_origin(value) in (Union, UnionType):  # the name of a type
        return ast.unparse(node)
    strings = isinstance(value, tuple) and all(isinstance(x, str) for x in value)
    return f"{name}: {'tuple[str, ...]' if strings else type(value).__name__}"


def of_class(node: ast.ClassDef) -> str:
    """Attributes that `__init__` sets, typed as its arguments of the same name, and methods."""
    made = getattr(fused, node.name)
    known = {p.name: annotation(p) for p in inspect.signature(made.__init__).parameters.values()}
    known |= {
        p.name: "dict[str, Any]"
        for p in inspect.signature(made.__init__).parameters.values()
        if p.kind is p.VAR_KEYWORD
    }
    lines = [f"class {node.name}({', '.join(map(ast.unparse, node.bases))}):"]
    for method in (x for x in node.body if isinstance(x, ast.FunctionDef)):
        if method.name == "__init__":
            stores = [x for x in ast.walk(method) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)]
            lines += [f"    {x.attr}: {known.get(x.attr, 'Any')}" for x in stores]
        if method.name == "__init__" or not method.name.startswith("_"):
            lines.append(textwrap.indent(signature(method.name, getattr(made, method.name)), "    "))
    return "\n".join(lines)


def overloads(function: Any, options: dict[str, Option]) -> str:
    """The function once for each result that `return_metrics` can make it have. What a loss needs isn't None."""
    shared, shown = (inspect.signature(x).parameters for x in (fused.fused_loss, function))
    needed = {
        name: annotation(parameter).removesuffix(" | None")
        for name, parameter in shown.items()
        if parameter.default is parameter.empty and name in shared and shared[name].default is None
    }
    return "\n".join(
        "@overload\n" + signature(function.__name__, function, options, {**needed, "return_metrics": given}, result)
        for given, result in RESULTS
    )


def signature(
    name: str, function: Any, options: dict[str, Option] | None = None, types: dict[str, str] | None = None,
    returns: str | None = None,
) -> str:  # fmt: skip
    """`def name(…) -> …: ...` of what the function shows at run time.

    Args:
        options: those that an objective declares.
        types: what goes after the names of some arguments.
        returns: default: what the function says.
    """
    shown = inspect.signature(function)
    parts = []
    for parameter in shown.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if parameter.name in (types or {}):
            parts.append(f"{parameter.name}: {(types or {})[parameter.name]}")
        else:
            parts.append(argument(parameter, (options or {}).get(parameter.name)))
    if returns is None:
        returns = "None" if shown.return_annotation is shown.empty else str(shown.return_annotation)
    return wrapped(f"def {name}(", parts, f") -> {returns}: ...")


def argument(parameter: inspect.Parameter, option: Option | None) -> str:
    """`name: type = default`."""
    stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
    kind = annotation(parameter)
    if option is not None:
        values = next((allowed.values for allowed in option.ranges if isinstance(allowed, OneOf)), None)
        kind = f"Literal{list(values)}" if values else type_text(option.type).replace("Generator", "torch.Generator")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{f': {kind}' if kind else ''}{default}"


def annotation(parameter: inspect.Parameter) -> str:
    """As it stands in the source, whose annotations are strings; "" where there is none."""
    return "" if parameter.annotation is parameter.empty else str(parameter.annotation)


def wrapped(head: str, parts: list[str], tail: str) -> str:
    """As few lines as will hold the arguments, of at most 116 characters: methods are indented."""
    if len(head + ", ".join(parts) + tail) <= 116:
        return head + ", ".join(parts) + tail
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]} {part},".strip()
        lines[-1:] = [longer] if len(longer) <= 112 or not lines[-1] else [lines[-1], f"{part},"]
    if parts[-1].startswith("*"):
        lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([head, *(f"    {line}" for line in lines), tail])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="say what is out of date, and fail")
    check = parser.parse_args().check
    there, made = STUB.read_text(encoding="utf-8") if STUB.exists() else "", text()
    if check:
        sys.stdout.writelines(difflib.unified_diff(there.splitlines(True), made.splitlines(True), str(STUB), "new"))
        return int(there != made)
    STUB.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
