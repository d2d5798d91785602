"""The scripts on the papers' claims: how a verdict comes about, what is written, and a quick run."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from benchmarks.papers import bnf_shifts, claim, models, rgpb_small_difference
from benchmarks.papers.__main__ import main
from benchmarks.papers.bnf_unpaired import masked
from benchmarks.papers.claim import VERDICTS, Claim, Finding, claims_table, decide, differences, every, read, write

ROOT = Path(__file__).parents[1]
FINDING = Finding(
    Claim("rgpb_recipe", "RGPB", "§6.4", "One | two."), VERDICTS[1], "It fell by 3.",
    [["", "perplexity"], ["MLE", "2.5 ± 0.1"]], {"seeds": 3, "rates": [1e-3], "model": {"width": 64}},
)  # fmt: skip


def figure():
    return claim.bars({"perplexity": {"MLE": [1.0, 2.0], "collapsed": [math.inf, 3.0]}})


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_a_difference_counts_beyond_two_standard_errors(values):
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    expected = VERDICTS[2] if abs(mean) <= 2 * error else VERDICTS[0 if mean > 0 else 1]
    assert decide(values) == expected
    flipped = {VERDICTS[0]: VERDICTS[1], VERDICTS[1]: VERDICTS[0], VERDICTS[2]: VERDICTS[2]}
    assert decide([-x for x in values]) == flipped[expected]


def test_decide_at_the_edges():
    assert decide([5.0]) == VERDICTS[2]  # one seed has no spread
    assert decide([0.0, 0.0, 0.0]) == VERDICTS[2]
    assert decide([1.0, 1.0]) == VERDICTS[0]
    assert decide([math.inf, 1.0]) == VERDICTS[0]
    assert decide([math.inf, -1.0]) == VERDICTS[2]
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="differences: expected one number per seed"):
            decide(bad)


def test_every_part_has_to_hold():
    holds, fails, open_ = VERDICTS
    assert every([holds, holds]) == holds
    assert every([holds, open_]) == open_
    assert every([open_, fails, holds]) == fails
    for bad in ([], ["maybe"]):
        with pytest.raises(ValueError, match="verdicts: expected"):
            every(bad)


def test_differences_of_collapsed_runs():
    assert differences([math.inf, 3.0], [math.inf, 1.0]) == [0.0, 2.0]
    with pytest.raises(ValueError, match="b: expected 1 values"):
        differences([1.0], [1.0, 2.0])


def test_write_and_read(tmp_path):
    other = FINDING._replace(claim=Claim("bnf_x", "BNF", "Table 6", "Three."))
    write(other, tmp_path, figure())
    write(FINDING, tmp_path, figure())
    assert read(tmp_path) == [FINDING, other]  # by paper
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in ("bnf_x", "rgpb_recipe") for suffix in ("json", "md", "png")
    )
    page = (tmp_path / "rgpb_recipe.md").read_text(encoding="utf-8")
    assert "**does not hold**: It fell by 3." in page
    assert "| MLE | 2.5 ± 0.1 |" in page
    assert '* model: {"width": 64}' in page
    provenance = json.loads((tmp_path / "bnf_x.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["torch"] == torch.__version__
    assert provenance["date"] in (tmp_path / "bnf_x.md").read_text(encoding="utf-8")


def test_what_write_and_read_refuse(tmp_path):
    with pytest.raises(ValueError, match="verdict: expected one of"):
        write(FINDING._replace(verdict="surely"), tmp_path, figure())
    with pytest.raises(ValueError, match="rows: expected rows of one length"):
        write(FINDING._replace(rows=[["a"], ["b", "c"]]), tmp_path, figure())
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="out: expected the JSON of a finding"):
        read(tmp_path)


def test_claims_table():
    table = claims_table([FINDING])
    (row,) = (line for line in table.splitlines() if "One" in line)
    results = "../benchmarks/results/papers/rgpb_recipe"
    links = f"[script](../benchmarks/papers/rgpb_recipe.py), [table]({results}.md), [picture]({results}.png)"
    assert row == rf"| One \| two. | RGPB §6.4 | **does not hold** | It fell by 3. | {links} |"


def test_docs_are_made_of_the_results():
    results = ROOT / "benchmarks" / "results" / "papers"
    findings, notes = read(results), (results / "notes.txt").read_text(encoding="utf-8").strip()
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == claims_table(findings, notes)
    scripted = {c.name for module in claim.modules().values() for c in module.CLAIMS}
    assert {finding.claim.name for finding in findings} <= scripted
    for finding in findings:
        assert finding.claim in [c for module in claim.modules().values() for c in module.CLAIMS]


def test_names_are_unique_and_papers_known():
    claims = [c for module in claim.modules().values() for c in module.CLAIMS]
    assert len({c.name for c in claims}) == len(claims)
    assert {c.paper for c in claims} <= set(claim.PAPERS)


def test_the_fastest_script(tmp_path):
    findings = rgpb_small_difference.run(tmp_path, {}, seeds=2, quick=True, progress=False)
    assert [finding.claim for finding in findings] == list(rgpb_small_difference.CLAIMS)
    assert sorted(read(tmp_path)) == sorted(findings)
    again = rgpb_small_difference.run(tmp_path / "again", {}, seeds=2, quick=True, progress=False)
    assert again == findings  # same seeds, same numbers


def test_command(tmp_path, capsys):
    write(FINDING, tmp_path / "out", figure())
    arguments = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs" / "claims.md")]
    second = FINDING._replace(claim=FINDING.claim._replace(name="rgpb_second_stage"))
    write(second, tmp_path / "out", figure())
    assert main([*arguments, "--only", "rgpb_recipe"]) == 0  # both claims of the script are there
    assert "rgpb_recipe: done" in capsys.readouterr().err
    assert (tmp_path / "docs" / "claims.md").read_text(encoding="utf-8") == claims_table(
        [FINDING, second], "", tmp_path / "out", tmp_path / "docs"
    )
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--only", "rgpb_recipe", "--again"])
    assert "--hh-rlhf: expected the path of this data set, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--only", "nonsense"])


def test_small_models_learn_and_are_measured():
    pairs = [((([2, 3], [4, 5, 1])), ([2, 3], [6, 1])), (([3, 2], [5, 1]), ([3, 2], [7, 7, 1]))]
    for encoder_decoder, make in ((False, models.tiny_llama), (True, models.tiny_t5)):
        model, twin = (make(8, 0, hidden=16, layers=1) for _ in range(2))
        (batch,) = models.pair_batches(pairs, 2, 0, encoder_decoder=encoder_decoder)
        before = models.evaluate(model, batch)
        assert models.evaluate(twin, batch) == before
        seen = [models.chosen_only(batch)]
        losses = models.train(model, seen, "mle", lr=1e-2, steps=20)
        after = models.evaluate(model, batch)
        assert losses[-1] < losses[0]
        assert after.perplexity < before.perplexity
        assert after.agility > before.agility
        again = models.train(twin, seen, "mle", lr=1e-2, steps=20)
        assert again == losses


def test_measured_against_the_models_own_logits():
    model = models.tiny_llama(9, 0, hidden=16, layers=1)
    pairs = [(([2, 3], [4, 5, 1]), ([2, 3], [6, 1])), (([3], [5, 1]), ([3], [7, 7, 8, 1]))]
    batch = {**models.padded([p[0] for p in pairs] + [p[1] for p in pairs]), "label": torch.arange(4) < 2}
    means, totals = [], []
    for prompt, reply in [p[0] for p in pairs] + [p[1] for p in pairs]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0].double().log_softmax(-1)
        per_token = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(reply)]
        means.append(fmean(per_token))
        totals.append(sum(per_token))
    found = models.evaluate(model, batch)
    probabilities = [math.exp(x) for x in means]
    expected = (
        fmean(math.exp(-x) for x in means[:2]), fmean(probabilities[:2]) - fmean(probabilities[2:]),
        fmean(totals[:2]), fmean(totals[2:]), fmean(float(a > b) for a, b in zip(means[:2], means[2:])),
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-5)


def test_shifts_are_those_of_the_models_own_logits():
    model, reference = (models.tiny_llama(9, seed, hidden=16, layers=1) for seed in (0, 1))
    batch = models.padded([([2, 3], [4, 5, 1]), ([3], [5, 6, 7, 8])])
    found = bnf_shifts.measure(model, reference, batch, batch)
    likelihood, logit, tokens = [], [], []
    with torch.no_grad():
        for prompt, reply in (([2, 3], [4, 5, 1]), ([3], [5, 6, 7, 8])):
            new, old = (
                m(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1] for m in (model, reference)
            )
            at = torch.arange(len(reply)), torch.tensor(reply)
            shift = (new.log_softmax(-1) - old.log_softmax(-1))[at]
            likelihood.append(shift.sum().abs().item())
            logit.append((new - old)[at].abs().mean().item())
            tokens.append(shift)
    assert found.likelihood == pytest.approx(fmean(likelihood), rel=1e-4)
    assert found.logit_per_token == pytest.approx(fmean(logit), rel=1e-4)
    torch.testing.assert_close(found.tokens[~found.tokens.isnan()].float(), torch.cat(tokens), rtol=1e-4, atol=1e-5)
    values = torch.arange(100.0)
    assert bnf_shifts.outer(values, values) == pytest.approx(0.2)
    assert bnf_shifts.outer(values.clamp(20, 80), values) == 0.0


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 40), (0.25, 50), (0.5, 60), (1.0, 80)])
def test_masking_leaves_one_of_each_pair(ratio, count):
    pairs = [(([i], [2 * i, 1]), ([i], [2 * i + 1, 1])) for i in range(2, 42)]
    batches = masked(pairs, ratio, 0)
    kept = [
        (row[0].item(), row[1].item(), label.item())
        for batch in batches
        for row, label in zip(batch["input_ids"], batch["label"])
    ]
    assert len(kept) == len(set(kept)) == count
    assert {prompt for prompt, _, _ in kept} == set(range(2, 42))
    assert all(label == (token % 2 == 0) for _, token, label in kept)
