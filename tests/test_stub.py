"""The stub of the losses: up to date, and what a type checker says of right and wrong calls."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rgpb import OBJECTIVES, fused

ROOT = Path(__file__).parent.parent
STUB = ROOT / "rgpb" / "fused.pyi"


def test_the_stub_is_up_to_date():
    found = importlib.util.spec_from_file_location("stub_of_this_test", ROOT / "tools" / "stub.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.text() == STUB.read_text(encoding="utf-8"), "run `python tools/stub.py`"
    assert (ROOT / "rgpb" / "py.typed").exists()


def test_the_stub_has_each_loss_as_it_is_at_run_time():
    """Names, order, kinds and defaults, three times: for each result."""
    functions = [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    for name in ("fused_loss", *(f"{name}_loss" for name in OBJECTIVES)):
        shown = inspect.signature(getattr(fused, name)).parameters.values()
        made = [node for node in functions if node.name == name]
        assert len(made) == 3, name
        for node in made:
            scope: dict[str, object] = {}
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.kwarg])):
                argument.annotation = None
            exec(ast.unparse(node), scope)
            stubbed = inspect.signature(scope[name]).parameters.values()
            for ours, theirs in zip(stubbed, shown, strict=True):
                assert (ours.name, ours.kind) == (theirs.name, theirs.kind), name
                if ours.name != "return_metrics":
                    assert ours.default == theirs.default, (name, ours.name)


# A line with `# wrong: WORDS` is one that mypy refuses with those words; of all others it says nothing.
PROGRAM = """
from typing import Any
import torch
from torch import Tensor, nn
from rgpb import LMHead, TokenScores, fused_loss
from rgpb.fused import FusedLoss, Reference, bnf_loss, dpo_loss, kto_loss, mc_po_loss, mle_loss, swepo_loss
from rgpb.objectives import RunningMean

def right(x: Tensor, head: LMHead, y: Tensor, label: Tensor, ref: TokenScores, rewards: Tensor, flag: bool) -> Tensor:
    loss: Tensor = bnf_loss(x, head, y, label, ref=ref)
    loss = dpo_loss(x, head.weight, y, ref=(x, head), beta=1, label_smoothing=0.1, reduction="sum")
    loss, metrics = dpo_loss(x, head, y, ref=ref.logp, return_metrics=True)
    margin: Tensor = metrics["rewards/margins"]
    either: Tensor | tuple[Tensor, dict[str, Tensor]] = mle_loss(x, head, y, return_metrics=flag)
    loss = swepo_loss(x, head, y, ref=ref, rewards=rewards, p=1, mode="one_vs_all", group_size=3)
    loss = mc_po_loss(x, head, y, ref=ref, group_size=4, sampler="max", generator=torch.Generator())
    loss = kto_loss(x, head, y, label, ref=ref, z0=RunningMean(), impl="torch", workspace=1 << 20)
    of_terms: dict[str, Any] = {"dpo.beta": 0.2}
    loss, metrics = fused_loss(x, head, y, objective={"mle": 1.0, "dpo": 2}, ref=ref, return_metrics=True, **of_terms)
    module: nn.Module = FusedLoss("dpo", beta=0.2)
    return fused_loss(x, head, y, objective="mle + dpo", ref=ref) + margin + loss

def wrong(x: Tensor, head: LMHead, y: Tensor, label: Tensor, ref: Reference) -> None:
    bnf_loss(x, head, y, ref=ref)  # wrong: No overload
    bnf_loss(x, head, y, label, ref=ref, beta=0.1)  # wrong: No overload
    dpo_loss(x, head, y)  # wrong: No overload
    dpo_loss(x, head, y, ref=None)  # wrong: No overload
    dpo_loss(x, head, y, ref=ref, beta="0.1")  # wrong: No overload
    dpo_loss(x, head, y, ref=ref, betta=0.1)  # wrong: No overload
    mle_loss(x, head, y, ref=ref)  # wrong: No overload
    mle_loss(x, head, y, None, True)  # wrong: No overload
    mc_po_loss(x, head, y, ref=ref, group_size=4, sampler="best")  # wrong: No overload
    loss: Tensor = mle_loss(x, head, y, return_metrics=True)  # wrong: Incompatible types in assignment
    mle_loss(x, head, y, return_metrics=True).backward()  # wrong: has no attribute "backward"
"""


@pytest.mark.full
def test_what_a_type_checker_says(tmp_path):
    """Besides, the source that the stub stands before is checked, since mypy otherwise never looks at it."""
    program, source = tmp_path / "program.py", tmp_path / "source_of_fused.py"
    program.write_text(PROGRAM)
    source.write_text((ROOT / "rgpb" / "fused.py").read_text(encoding="utf-8"))
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(program), str(source)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert "Traceback" not in said.stderr, said.stderr
    errors = re.findall(r"^(.*?):(\d+): error: (.*)$", said.stdout, re.MULTILINE)
    assert not [error for error in errors if not error[0].endswith("program.py")], said.stdout
    by_line: dict[int, str] = {}
    for _, line, text in errors:
        by_line[int(line)] = by_line.get(int(line), "") + text
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        _, _, wanted = line.partition("# wrong: ")
        assert bool(by_line.get(number)) == bool(wanted), f"{line}\n{said.stdout}"
        assert wanted in by_line.get(number, ""), f"{line}\n{said.stdout}"
