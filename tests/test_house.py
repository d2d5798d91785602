"""The house keeps its shape: imports go down its floors, never in a circle, and no argument list grows long."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; what a module imports, also inside a function, lies on its own floor or below.
FLOORS = (
    ("rgpb.kernels", "rgpb.arguments"),
    ("rgpb.parallel",),
    ("rgpb.head", "rgpb.layout"),
    ("rgpb.objectives",),
    ("rgpb.engine",),
    ("rgpb.validation",),
    ("rgpb.metrics", "rgpb.logprob", "rgpb.fused", "rgpb"),
    ("rgpb.reference", "rgpb.analysis", "rgpb.hf", "rgpb.trl", "rgpb.axolotl"),
    ("rgpb.train", "rgpb.bench"),
    ("rgpb.cli", "rgpb.demo"),
    ("benchmarks",),
)
MOST_ARGUMENTS = 10  # that aren't tensors


def modules():
    """{name: path} of every module of the library and its benchmarks."""
    found = {}
    for folder, package in (("rgpb", "rgpb"), ("kernels", "rgpb.kernels"), ("benchmarks", "benchmarks")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports(name, path, known):
    """The modules of the house that a file imports, at its top, in a function or for its types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*name.split(".")[: None if path.name == "__init__.py" else -1]]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in known else source)
    return {name for name in found if name in known}


def floor(module):
    """The number of a module's floor: that of the longest name that it starts with."""
    fitting = [
        (len(name), n) for n, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")
    ]
    return max(fitting)[1]


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports(name, path, known) - {name} for name, path in known.items()}


def test_no_imports_in_a_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_imports_go_down_the_floors(graph):
    upward = [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, others in graph.items()
        for other in others
        if floor(other) > floor(name)
    ]
    assert not upward, "\n".join(upward)


def test_the_graph_is_read(graph):
    """That the two tests above have something to look at."""
    assert "rgpb.engine.sweeps" in graph["rgpb.fused"]
    assert "rgpb.kernels.types" in graph["rgpb.engine.sweeps"]
    assert floor("rgpb.kernels.types") < floor("rgpb.engine.sweeps") < floor("rgpb.fused") < floor("rgpb.hf")


def test_argument_lists_are_short():
    """Of operators, launches and everything else in engine and kernels: what isn't a tensor travels in a value."""
    long = []
    for name, path in modules().items():
        if not name.startswith(("rgpb.engine", "rgpb.kernels", "rgpb.validation")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            plain = [a.arg for a in arguments if a.annotation is None or "Tensor" not in ast.unparse(a.annotation)]
            if len(plain) > MOST_ARGUMENTS:
                long.append(f"{name}.{node.name}: {plain}")
    assert not long, "\n".join(long)
