"""Every Python block of the documents runs, and says what it says it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rgpb import OBJECTIVES, linear_logprob

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md"))),
    )
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, capsys):
    names = {"torch": torch}
    if "model" in block:
        names.update(tiny_model())
    before = set(OBJECTIVES)
    try:
        exec(compile(block, "block", "exec"), names)
    finally:
        for name in set(OBJECTIVES) - before:
            del OBJECTIVES[name]
    if "nan everywhere" in block:
        printed = capsys.readouterr().out.split("tensor")[1:]
        assert printed[0].count("nan") == 6
        assert "nan" not in printed[1]


def tiny_model():
    """What the transformers example takes for granted."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    target = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    scores = linear_logprob(torch.randn(4, 6, 16), model.lm_head.weight.detach(), target)
    return {"model": model, "batch": batch, "ref_scores": scores}


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(name):
    place = (ROOT / name).parent
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (place / link).exists()]
    assert not missing


def test_every_objective_is_documented():
    rows = (ROOT / "docs" / "objectives.md").read_text()
    for name in OBJECTIVES:
        assert f"| `{name}` |" in rows


def test_predictions_are_the_plans():
    """docs/kernels.md prints what `plan` foretells, and not what it once foretold."""
    from rgpb.bench.plan import predictions

    assert predictions() in (ROOT / "docs" / "kernels.md").read_text()
