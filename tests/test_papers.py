"""The papers' claims: the table, how a verdict comes about, what is kept and resumed, and claims from end to end."""

import gzip
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from benchmarks.papers import judge, models, on_groups, on_pairs, outcomes, real, report, tokens, upper
from benchmarks.papers.__main__ import main
from benchmarks.papers.claims import CLAIMS, ON_REAL, PAPERS, TRIALS, WORLDS, parse
from benchmarks.papers.judge import FAILS, HOLDS, OPEN, VERDICTS, Above, Slope, decide, differences, every
from rgpb.train.tokens import train_tokenizer

ROOT = Path(__file__).parents[1]
BY_NAME = {claim.name: claim for claim in CLAIMS}
QUICK = ["--quick", "--seeds", "2", "--quiet", "--out"]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_a_difference_counts_beyond_two_standard_errors(values):
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    expected = OPEN if abs(mean) <= 2 * error else HOLDS if mean > 0 else FAILS
    assert decide(values) == expected
    assert decide([-x for x in values]) == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[expected]


def test_decide_at_the_edges():
    assert decide([5.0]) == OPEN  # one seed has no spread
    assert decide([0.0, 0.0, 0.0]) == OPEN
    assert decide([1.0, 1.0]) == HOLDS
    assert decide([math.inf, 1.0]) == HOLDS
    assert decide([math.inf, -1.0]) == OPEN
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="differences: expected one number per seed"):
            decide(bad)


def test_every_part_has_to_hold():
    assert every([HOLDS, HOLDS]) == HOLDS
    assert every([HOLDS, OPEN]) == OPEN
    assert every([OPEN, FAILS, HOLDS]) == FAILS
    for bad in ([], ["maybe"]):
        with pytest.raises(ValueError, match="verdicts: expected"):
            every(bad)


def test_differences_of_collapsed_runs():
    assert differences([math.inf, 3.0], [math.inf, 1.0]) == [0.0, 2.0]
    with pytest.raises(ValueError, match="b: expected 1 values"):
        differences([1.0], [1.0, 2.0])


def test_above_is_judged_by_seed():
    values = {"p": {"A": [3.0, 5.0, 4.0], "B": [1.0, 2.0, 3.0], "C": [-2.0, -2.5, -1.5]}}
    assert Above("p", "A", "B").judge(values) == ("p, A less B", "+2 ± 0.58", HOLDS)
    assert Above("p", "B", "A").judge(values).verdict == FAILS
    assert Above("p", "A", "B", by=2.0).judge(values).verdict == OPEN
    assert Above("p", "", "C", by=1.0).judge(values) == ("p, C", "-2 ± 0.29", HOLDS)  # C < −1
    assert Above("p", "C", by=-1.0).judge(values).verdict == FAILS  # C > −1


def test_a_difference_of_pairs_has_the_error_of_seeds_and_of_pairs():
    gaps = [[1.0, 3.0], [2.0, 6.0]]  # two seeds, two pairs: means 2 and 4 by seed, 1.5 and 4.5 by pair
    mean, error = judge.estimate(gaps)
    assert (mean, error) == pytest.approx((3.0, math.hypot(1.0, 1.5)))
    assert decide(gaps) == OPEN
    assert decide([[x + 1 for x in one] for one in gaps]) == HOLDS
    assert decide([[-x - 1 for x in one] for one in gaps]) == FAILS
    assert decide(gaps[:1]) == OPEN
    values = {"p": {"A": [[4.0, 8.0], [7.0, 9.0]], "B": [[3.0, 5.0], [5.0, 3.0]]}}
    assert Above("p", "A", "B").judge(values) == ("p, A less B", "+3 ± 1.8 [5.1]", OPEN)
    assert Above("p", "A", "B", by=-1.0).judge(values).verdict == HOLDS
    assert Above("p", "", "A", by=-12.0).judge(values).verdict == HOLDS  # A < 12


def test_a_slope_is_judged_by_its_interval():
    def curve(power):
        return {f"k = {k}": [c * k**power * (1 + 0.02 * (-1) ** k) for c in (1.0, 2.0)] for k in (1, 2, 3, 8)}

    slope, error = judge.fit_slope(curve(-0.5))
    assert slope == pytest.approx(-0.5, abs=2 * error)
    assert 0 < error < 0.05
    values = {"half": curve(-0.5), "none": curve(0.0), "floor": {"k = 1": [1.0, -1.0]}}
    assert Slope("half", -0.5).judge(values).verdict == HOLDS
    assert Slope("none", -0.5).judge(values).verdict == FAILS
    assert Slope("none", 0.0).judge(values).verdict == OPEN
    assert Slope("half", -0.5, "floor").judge(values).verdict == FAILS


def test_cells_of_the_table():
    assert parse("p / q: A@ > 0 / B by -1/2", "0.1") == [
        Above(quantity, "A at 0.1", less, -0.5, "0.1") for quantity in "pq" for less in ("", "B")
    ]
    assert parse("bias, a ~ -0.5, floor; p: 0 > A") == [Slope("bias, a", -0.5, "floor"), Above("p", "", "A")]
    assert parse("") == []
    with pytest.raises(ValueError, match=r"claims\.tsv: expected"):
        parse("p: A")


def test_the_table_is_complete():
    assert len(BY_NAME) == len(CLAIMS) == 38
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)
    assert {claim.world for claim in CLAIMS} == set(WORLDS)
    assert {claim.trial for claim in CLAIMS} == set(TRIALS)
    assert all(claim.parts and claim.text and claim.place for claim in CLAIMS)


def test_results_are_complete_and_docs_are_made_of_them():
    kept = report.load(report.RESULTS)
    assert list(kept) == list(BY_NAME)
    for name, its in kept.items():
        assert its["verdict"] == every([part["verdict"] for part in its["parts"]]), name
        assert its["values"], name
        assert its["provenance"]["commit"], name
        for part in its["parts"]:
            assert part["told"], name
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == report.page(report.RESULTS)
    held, failed, undecided = (sum(its["verdict"] == verdict for its in kept.values()) for verdict in VERDICTS)
    front = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8").splitlines()[2]
    assert front == f"**{held} hold, {failed} do not hold, {undecided} can't be decided at this size.**"


def test_what_is_kept_and_drawn(tmp_path):
    claim = BY_NAME["swepo_weighting"]
    names = {"SWEPO, p = 0": [1.0, 1.0], "SWEPO, p = 1": [math.inf, 3.0], "SWEPO, p = 2": [2.0, 3.0]}
    made = report.record(claim, {"expected reward": names}, {"seeds": 2})
    report.save(tmp_path, [made])
    report.save(
        tmp_path,
        [
            report.record(
                BY_NAME["swepo_positives"],
                {"expected reward": {**names, "SWEPO, one against all, p = 0": [0.0, 0.1]}},
                {"seeds": outcomes.SEEDS},
            )
        ],
    )
    kept = report.load(tmp_path)
    assert list(kept) == ["swepo_positives", "swepo_weighting"]  # in the table's order
    its = kept["swepo_weighting"]
    assert its["verdict"] == HOLDS
    assert its["values"]["expected reward"]["SWEPO, p = 1"] == ["inf", 3.0]
    assert its["parts"][0]["told"][1] == ["expected reward, SWEPO, p = 2 less SWEPO, p = 0", "+1.5 ± 0.5", HOLDS]
    assert its["provenance"]["torch"] == torch.__version__
    text = report.page(tmp_path)
    assert "**2 hold, 0 do not hold, 0 can't be decided at this size.**" in text
    assert "expected reward, SWEPO, p = 2 less SWEPO, p = 0: +1.5 ± 0.5" in text
    assert "| 2 seeds.<br>expected reward, SWEPO, p = 1 less" in text
    assert f"{outcomes.SEEDS} seeds." not in text  # only where it isn't the usual number
    report.render(tmp_path, tmp_path / "pictures")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"{name}.png" for name in kept}
    (tmp_path / report.FILE).write_text(json.dumps({**its, "verdict": "surely"}), encoding="utf-8")
    with pytest.raises(ValueError, match="out: expected a claim and its verdict in line 1"):
        report.load(tmp_path)


def test_command_runs_skips_and_refuses(tmp_path, capsys):
    """Two claims that are tried together, end to end: no training, then a second time."""
    arguments = [*QUICK, str(tmp_path), "--only"]
    assert main([*arguments, "swepo_bias"]) == 0
    first = (tmp_path / report.FILE).read_text(encoding="utf-8")
    assert list(report.load(tmp_path)) == ["swepo_bias", "swepo_bias_sample"]
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == report.page(tmp_path)
    assert main([*arguments, "bias"]) == 0
    assert "bias in distribution: done" in capsys.readouterr().err
    assert main([*arguments, "distribution", "--again"]) == 0
    again = (tmp_path / report.FILE).read_text(encoding="utf-8")
    for one, other in zip(first.splitlines(), again.splitlines()):
        assert json.loads(one)["values"] == json.loads(other)["values"]  # same seeds, same numbers
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "rgpb_recipe"])
    assert "--hh-rlhf: expected the path of this data set, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "nonsense"])
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(CLAIMS)


def test_sums_from_end_to_end(tmp_path):
    """Models are trained, and each claim of the trial gets its line, from values of all its methods."""
    assert main([*QUICK, str(tmp_path), "--only", "bnf_unpaired"]) == 0
    kept = report.load(tmp_path)
    assert list(kept) == ["bnf_pairing_ratio", "bnf_unpaired"]
    values = kept["bnf_unpaired"]["values"]["log p of chosen"]
    assert list(values) == ["start", "0%", "25%", "50%", "100%"]
    assert all(len(seeds) == 2 and seeds != values["start"] for name, seeds in values.items() if name != "start")


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "trial"), sorted({(c.world, c.trial) for c in CLAIMS if c.world not in ("hh_rlhf", "alpaca_eval")})
)
def test_every_claim_without_a_data_set_runs(tmp_path, world, trial):
    claims = [claim for claim in CLAIMS if (claim.world, claim.trial) == (world, trial)]
    assert main([*QUICK, str(tmp_path), "--only", *(claim.name for claim in claims)]) == 0
    assert set(report.load(tmp_path)) == {claim.name for claim in claims}


def test_small_models_learn_and_are_measured():
    pairs = [((([2, 3], [4, 5, 1])), ([2, 3], [6, 1])), (([3, 2], [5, 1]), ([3, 2], [7, 7, 1]))]
    for encoder_decoder, make in ((False, models.tiny_llama), (True, models.tiny_t5)):
        model, twin = (make(8, 0, quick=True) for _ in range(2))
        (batch,) = models.pair_batches(pairs, 2, 0, encoder_decoder=encoder_decoder)
        before = models.evaluate(model, batch)
        assert models.evaluate(twin, batch) == before
        seen = [models.chosen_only(batch)]
        losses = models.train(model, seen, "mle", lr=1e-2, steps=20)
        after = models.evaluate(model, batch)
        assert losses[-1] < losses[0]
        assert after["perplexity"] < before["perplexity"]
        assert after["agility"] > before["agility"]
        assert models.train(twin, seen, "mle", lr=1e-2, steps=20) == losses


def test_measured_against_the_models_own_logits():
    model = models.tiny_llama(9, 0, quick=True)
    pairs = [(([2, 3], [4, 5, 1]), ([2, 3], [6, 1])), (([3], [5, 1]), ([3], [7, 7, 8, 1]))]
    batch = models.padded([p[0] for p in pairs] + [p[1] for p in pairs])
    means, totals = [], []
    for prompt, reply in [p[0] for p in pairs] + [p[1] for p in pairs]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0].double().log_softmax(-1)
        per_token = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(reply)]
        means.append(fmean(per_token))
        totals.append(sum(per_token))
    probabilities = [math.exp(x) for x in means]
    perplexity = fmean(math.exp(-x) for x in means[:2])
    assert models.evaluate(model, batch) == pytest.approx(
        {
            "perplexity": perplexity,
            "log perplexity": math.log(perplexity),
            "agility": fmean(probabilities[:2]) - fmean(probabilities[2:]),
            "log p of chosen": fmean(totals[:2]),
            "log p of rejected": fmean(totals[2:]),
            "accuracy": fmean(float(a > b) for a, b in zip(means[:2], means[2:])),
        },
        rel=1e-5,
    )


def test_shifts_are_those_of_the_models_own_logits():
    model, reference = (models.tiny_llama(9, seed, quick=True) for seed in (0, 1))
    pairs = (([2, 3], [4, 5, 1]), ([3], [5, 6, 7, 8]))
    batch = models.padded(pairs)
    found, tokens = on_pairs.moved(model, reference, batch, batch)
    likelihood, logit, shifts = [], [], []
    with torch.no_grad():
        for prompt, reply in pairs:
            new, old = (
                m(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1] for m in (model, reference)
            )
            at = torch.arange(len(reply)), torch.tensor(reply)
            shift = (new.log_softmax(-1) - old.log_softmax(-1))[at]
            likelihood.append(shift.sum().abs().item())
            logit.append((new - old)[at].abs().mean().item())
            shifts.append(shift)
    assert found["abs. shift of log p per answer"] == pytest.approx(fmean(likelihood), rel=1e-4)
    assert found["abs. logit shift per token"] == pytest.approx(fmean(logit), rel=1e-4)
    torch.testing.assert_close(tokens[~tokens.isnan()].float(), torch.cat(shifts), rtol=1e-4, atol=1e-5)
    values = torch.arange(100.0)
    assert on_pairs.outer(values, values) == pytest.approx(0.2)
    assert on_pairs.outer(values.clamp(20, 80), values) == 0.0


def line(method, rate, seed, shift, **more):
    part = {"shift": shift, "logit": [0.5] * len(shift), "gini": [0.2] * len(shift)}
    return {"method": method, "rate": rate, "seed": seed, "test": part, "own": part, **more}


def test_numbers_of_the_real_model_are_those_of_the_best_rate():
    """Two held-out pairs, [chosen, rejected] each; BNF's best rate is the second, DPO isn't through its rates."""
    quantiles = {"quantiles": [k / 100 for k in range(101)]}
    rated = {name: {"valid": {"shift": shift}} for name, shift in (("good", [4.0, 1.0]), ("bad", [1.0, 4.0]))}
    lines = [line("BNF", rate, 0, [9.0] * 4, **rated["bad"]) for rate in outcomes.RATES]
    lines[1] = line("BNF", outcomes.RATES[1], 0, [2.0, -4.0, -1.0, -1.0], **rated["good"])
    lines.append(line("BNF", outcomes.RATES[1], 1, [0.0, 0.0, 4.0, 1.0]))
    lines.append(line("DPO", outcomes.RATES[0], 0, [9.0] * 4, **rated["good"]))
    both = {"logp": [-8.0, -8.0, -4.0, -6.0], "tokens": [4, 2, 2, 2]}
    start = {"test": both, "own": both, "valid": {"tokens": [4, 2]}, "settings": {"answers": 2}}
    lines.append({"method": "start of pairs", "rate": 0.0, "seed": 0, **start})
    for one in lines[:-1]:
        one["test"] = {**one["test"], **quantiles}
    known = {(its["method"], its["rate"], its["seed"]): its for its in lines}
    assert outcomes.best_rate("DPO", known) is None
    assert outcomes.numbers(known, 3) == {}
    found = outcomes.numbers(known, 2)
    assert all(list(methods) == ["BNF"] for methods in found.values())
    told = {name: methods["BNF"] for name, methods in found.items()}
    assert told["change of log p of chosen"] == [[2.0, -1.0], [0.0, 4.0]]
    assert told["change of log p of rejected"] == [[-4.0, -1.0], [0.0, 1.0]]
    assert told["accuracy by Δ per token"] == [[1.0, 0.5], [0.5, 1.0]]
    assert told["accuracy by likelihood per token"] == [[1.0, 1.0], [1.0, 1.0]]
    assert told["log perplexity"] == [[1.5, 2.5], [2.0, 0.0]]
    assert told["agility"][0] == pytest.approx([math.exp(-1.5) - math.exp(-6), math.exp(-2.5) - math.exp(-3.5)])
    assert told["abs. shift of log p per token"][0] == [0.5, 2.0, 0.5, 0.5]
    assert told["abs. logit shift per answer"][0] == [2.0, 1.0, 1.0, 1.0]
    claim = outcomes.OnReal("", parse("change of log p of chosen: BNF > 0 by -9"), parse("agility: BNF / DPO > 0"))
    its = outcomes.outcome(claim, known)
    assert (its.verdict, its.seeds, [one.what for one in its.beside]) == (HOLDS, 2, ["agility, BNF"])
    assert outcomes.outcome(claim._replace(parts=parse("agility: DPO > BNF")), known) == outcomes.Outcome()
    more = claim._replace(parts=[*claim.parts, *parse("agility: DPO > BNF")])
    assert outcomes.outcome(more, known) == outcomes.Outcome()  # it may hold yet
    third = {**known, ("BNF", outcomes.RATES[1], 2): {**lines[1], "seed": 2}}  # with more seeds they are all taken
    assert (outcomes.outcome(claim, third).seeds, outcomes.outcome(claim, third).most) == (3, 3)
    apart = {**third, **{("IPO", rate, 0): {**lines[0], "method": "IPO"} for rate in outcomes.RATES}}
    apart |= {("IPO", outcomes.RATES[0], 1): {**lines[0], "method": "IPO", "seed": 1}}
    both = claim._replace(parts=[*claim.parts, *parse("change of log p of chosen: IPO > 0")])
    assert (outcomes.outcome(both, apart).seeds, outcomes.outcome(both, apart).most) == (2, 3)
    assert outcomes.outcome(claim, third).told[0].number == "1 ± 0.6 [1.7]"  # by seed ½, 2, ½; by pair 4/3, 2/3
    fails = more._replace(parts=[*parse("change of log p of chosen: BNF > 0 by 9"), *more.parts])
    assert outcomes.outcome(fails, known).verdict == FAILS


def test_what_the_real_model_showed_is_of_its_runs():
    """The numbers that docs/which-loss.md and the notes tell beside the verdicts, anew from all runs."""
    runs = outcomes.runs_of(report.RESULTS)
    units: dict[str, dict[str, list]] = {}  # of each method at its best rate, with all its seeds
    for method in dict.fromkeys(name for name, _, _ in runs if not name.startswith("start")):
        best = outcomes.best_rate(method, runs)
        its = [run for (name, rate, _), run in runs.items() if (name, rate) == (method, best)]
        for run in its:
            for name, values in {**outcomes.of_units(run, runs), "rate": [best]}.items():
                units.setdefault(name, {}).setdefault(method, []).append(values)
    text = (ROOT / "docs" / "which-loss.md").read_text(encoding="utf-8")
    notes = (report.RESULTS / "smollm2.txt").read_text(encoding="utf-8")

    def told(values, places=1):
        mean, error = judge.estimate(values)
        return f"{mean:.{places}f} ± {error:.{places}f}"

    chosen, rejected = units["change of log p of chosen"], units["change of log p of rejected"]
    paired = [chosen[name] for name in chosen if "then" not in name]
    assert min(judge.estimate(values)[0] for values in paired) > 0
    assert all(mean > -error for mean, error in (judge.estimate(rejected[name]) for name in rejected))
    dpo, bnf, mle = (told(chosen[name]) for name in ("DPO", "BNF", "MLE"))
    assert f"DPO raised them by {dpo} nats, BNF by {bnf}, MLE by {mle}." in text
    falls = [told(judge.differences(its["MLE"], its["MLE, then DPO"])) for its in (chosen, rejected)]
    assert f"After MLE, DPO lowered both, by {falls[0]} and {falls[1]}." in text
    ranked = [
        fmean(
            (a > b) + (a == b) / 2 for ours, theirs in zip(chosen[name], rejected[name]) for a, b in zip(ours, theirs)
        )
        for name in chosen
    ]
    lengths = runs["start of pairs", 0.0, 0]["test"]["tokens"]
    shorter = fmean((a < b) + (a == b) / 2 for a, b in zip(lengths[::2], lengths[1::2]))
    assert f"Δ ranks {100 * min(ranked):.0f} to {100 * max(ranked):.0f} % of 80 others" in text
    assert f"“the shorter is better” would rank {100 * shorter:.0f} %" in text
    assert f"with {fmean(lengths[::2]):.0f} tokens against {fmean(lengths[1::2]):.0f}" in notes
    assert max(fmean(map(fmean, its)) for its in units["accuracy by Δ per token"].values()) < shorter
    order = {name: judge.estimate(its) for name, its in units["accuracy of the order"].items()}
    others = {"DPO, best and random": 64, "MC-PO, max": 62, "MC-PO, min": 61, "SWEPO, p = 2": 59}
    assert {name: round(100 * order[name][0]) for name in others} == others
    rest = [order[name] for name in order if name not in others]
    assert {round(100 * mean) for mean, _ in rest} == {67, 68}
    assert all(0.02 < error < 0.04 for _, error in rest)
    entropy = units["log perplexity"]
    cost = told(judge.differences(entropy["MLE, then DPO"], entropy["MLE"]), 3)
    gain = told(judge.differences(entropy["MLE"], entropy["MLE, then ExMATE"]), 2)
    assert f"**After MLE, DPO costs likelihood**: {cost} nats per token" in text
    assert f"the chosen gain {gain};" in text
    top = sum(its[0] == [max(outcomes.RATES)] for its in units["rate"].values())
    assert f"the highest for {top} of {len(units['rate'])} methods" in notes


def test_the_score_of_a_learning_rate():
    pairs = {"valid": {"tokens": [4, 2, 2, 2]}, "settings": {"answers": 2}}
    run = {"valid": {"shift": [2.0, -3.0, 1.0, 1.0]}, "own": {}}
    assert outcomes.score("MLE", run, pairs) == pytest.approx((0.5 + 0.5) / 2)
    expected = (math.log(1 / (1 + math.exp(-0.5))) + math.log(0.5)) / 2
    assert outcomes.score("BNF", run, pairs) == pytest.approx(expected)
    groups = {"valid": {"rewards": [1.0, 3.0, 3.0, 2.0, 2.0, 2.0]}, "settings": {"answers": 3}}
    run = {"valid": {"shift": [0.0, 5.0, -2.0, 1.0, 2.0, 3.0]}}
    gaps = [5.0, -2.0]  # of the first group; in the second nothing is better
    assert outcomes.score("SWEPO, p = 1", run, groups) == pytest.approx(
        fmean(-math.log1p(math.exp(-0.1 * x)) for x in gaps)
    )


def test_numbers_of_groups_and_of_bins():
    start = {"test": {"rewards": [3.0, 2.0, 1.0, 5.0, 5.0, 0.0]}, "settings": {"answers": 3}}
    found = outcomes.of_groups({"test": {"shift": [1.0, 2.0, 0.0, 1.0, -1.0, 1.0]}}, start)
    assert found["accuracy of the order"] == pytest.approx([2 / 3, 1 / 4])
    assert found["reward of the answer with the highest Δ"] == [2.0, 5.0]
    even = [k / 100 for k in range(101)]
    assert outcomes.outer(even, even) == pytest.approx(0.2)
    assert outcomes.outer([0.5 + x / 2 for x in even], even) == pytest.approx(0.2)
    assert outcomes.outer([0.2 + x / 2 for x in even], even) == 0.0
    assert outcomes.outer([2 * x - 0.5 for x in even], even) == pytest.approx(0.6)


def test_every_claim_on_the_real_model_can_be_judged():
    """Each is one of the table, and its quantities and methods are there."""
    assert set(ON_REAL) <= set(BY_NAME)
    pairs = {"logp": [-1.0] * 4, "tokens": [1] * 4}
    part = {"shift": [1.0] * 4, "logit": [1.0] * 4, "gini": [1.0] * 4, "quantiles": [0.0, 1.0] * 50 + [1.0]}
    groups = {"test": {"rewards": [1.0] * 4}, "settings": {"answers": 2}}
    known = {
        "pairs": outcomes.of_pairs({"test": part, "own": part}, {"test": pairs, "own": pairs}),
        "groups": outcomes.of_groups({"test": part}, groups),
    }
    kinds = {name: set(found) for name, found in known.items()}
    for name, claim in ON_REAL.items():
        for one in (*claim.parts, *claim.beside):
            trials = [real.TRIALS[method] for method in (one.more, one.less) if method]
            assert trials, name
            assert all(one.quantity in {*kinds[trial.kind], outcomes.OUTER} for trial in trials), (name, one)


@pytest.fixture(scope="module")
def llama():
    return models.tiny_llama(50, 0).eval()


UNITS = [
    upper.Unit([2, 3, 4], [[5, 6, 7], [8, 9]], [2.0, 1.0]),
    upper.Unit([9, 8], [[7], [6, 5], [4, 3, 2]], [3.0, 2.0, 0.5]),
]


def scored_alone(model, prompt, completion):
    with torch.no_grad():
        logp = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return logp[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


@pytest.mark.parametrize(
    ("which", "stacked", "expected"),
    [
        ([(0, 1), (0, 1, 2)], False, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]),
        ([(0, 1), (0, 2)], True, [(0, 0), (1, 0), (0, 1), (1, 2)]),
        ([(1, 0), (2, 1)], True, [(0, 1), (1, 2), (0, 0), (1, 1)]),
        ([(1,), (2,)], False, [(0, 1), (1, 2)]),
    ],
)
def test_a_row_scores_each_completion_as_if_alone(llama, tmp_path, which, stacked, expected):
    head = real.hf.read_head(llama)
    known = upper.remember(llama, head, 1, UNITS, tmp_path)
    its = upper.batch(known, which, stacked=stacked)
    with torch.no_grad():
        scores = upper.score(upper.Upper(llama, 1), head, its.hidden, its.row)
    torch.testing.assert_close(scores.logp, its.ref.logp)
    alone = [scored_alone(llama, UNITS[u].prompt, UNITS[u].completions[k]) for u, k in expected]
    torch.testing.assert_close(scores.logp, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert its.row.bounds.diff().tolist() == [len(x) for x in alone]
    assert its.row.sides == [k for _, k in expected]
    if not stacked and len(which[0]) == len(which[1]):
        assert its.rewards.tolist() == [[1.0], [0.5]]


def test_what_lies_below_is_computed_once(llama, tmp_path, monkeypatch):
    head = real.hf.read_head(llama)
    first = upper.remember(llama, head, 1, UNITS, tmp_path)
    monkeypatch.setattr(upper, "below", None)
    for one, other in zip(first, upper.remember(llama, head, 1, UNITS, tmp_path)):
        torch.testing.assert_close(one.hidden, other.hidden)
    with pytest.raises(ValueError, match="work: expected the hidden states of these texts"):
        upper.remember(llama, head, 1, UNITS[:1], tmp_path)


def test_training_the_upper_layers_moves_what_is_measured(llama, tmp_path):
    head = real.hf.read_head(llama)
    known = upper.remember(llama, head, 1, UNITS, tmp_path)
    above = upper.Upper(llama, 1)
    found, moved = upper.measure(above, head, known)
    assert found["shift"] == pytest.approx([0.0] * 5, abs=1e-4)
    its = upper.batch(known, [(0, 1), (0, 1)], stacked=True)
    losses = upper.train(above, head, lambda step: its, "dpo", rate=1e-2, steps=5)
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-1] < losses[0]
    found, moved = upper.measure(above, head, known)
    chosen, rejected = (found["shift"][0] + found["shift"][2], found["shift"][1] + found["shift"][3])
    assert chosen > rejected
    lengths = [len(one) for unit in UNITS for one in unit.completions]
    assert [x.sum().item() for x in moved.split(lengths)] == pytest.approx(found["shift"], rel=1e-3)
    alone = scored_alone(llama, *UNITS[1][:1], UNITS[1].completions[2]).sum().item()
    assert upper.likelihoods(known)["logp"][4] == pytest.approx(alone, rel=1e-3)
    assert upper.likelihoods(known)["tokens"] == lengths


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a tiny Llama, its tokenizer, pairs and groups."""
    folder = tmp_path_factory.mktemp("real")
    rows = [
        {"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": f" yes, {i}", "rejected": f" no{'!' * (i % 3)}"}
        for i in range(20)
    ]
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    groups = [
        {"prompt": f"{i}?", "completions": list("abcdef"), "rewards": [k / 8 for k in range(6)]} for i in range(20)
    ]
    (folder / "groups.jsonl").write_text("\n".join(map(json.dumps, groups)), encoding="utf-8")
    tokenizer = train_tokenizer(["yes no"], 258)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    models.tiny_llama(258, 0, quick=True).save_pretrained(folder / "model")
    return folder


def test_the_real_model_from_end_to_end(texts, tmp_path, capsys):
    """Every rate, then the best one with the other seed; a second command finds nothing left to do."""
    out = tmp_path / "out"
    arguments = ["--quick", "--model", str(texts / "model"), "--work", str(tmp_path / "work"), "--out", str(out)]
    data = ["--hh-rlhf", str(texts), "--alpaca-eval", str(texts / "groups.jsonl"), "--seeds", "2"]
    only = ["--only", "BNF", "MC-PO, mc"]
    assert real.main([*arguments, *data, *only, "--minutes", "0"]) == 0
    assert outcomes.runs_of(out) == {}
    assert real.main([*arguments, *data, *only]) == 0
    lines = outcomes.runs_of(out)
    for method in ("BNF", "MC-PO, mc"):
        best = outcomes.best_rate(method, lines)
        assert {(rate, seed) for name, rate, seed in lines if name == method} == {
            *((rate, 0) for rate in outcomes.RATES),
            (best, 1),
        }
    assert {name for name, _, _ in lines} == {"start of pairs", "start of groups", "BNF", "MC-PO, mc"}
    numbers = outcomes.numbers(lines, 2)
    assert (
        len(numbers["change of log p of chosen"]["BNF"][0])
        == len(numbers["accuracy of the order"]["MC-PO, mc"][0])
        == 4
    )
    assert real.main([*arguments, *data, *only]) == 0
    assert outcomes.runs_of(out) == lines
    assert real.main([*arguments, *only, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["BNF: 4 of 6", "MC-PO, mc: 4 of 6"]
    for bad, message in (
        (["--out", str(report.RESULTS)], "--quick: expected another folder"),
        ([], "--hh-rlhf: expected"),
    ):
        with pytest.raises(SystemExit, match="2"):
            real.main([*arguments, *bad, "--only", "DPO"])
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_tokens_of_the_real_model_from_end_to_end(texts, tmp_path):
    """What was trained is kept: the second time it is only counted and drawn, alike."""
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--pictures", str(tmp_path / "pictures")]
    arguments = ["--quick", "--model", str(texts / "model"), "--hh-rlhf", str(texts), *folders]
    assert tokens.main(arguments) == 0
    first = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert set(first["tokens"]) == set(tokens.TRAINED)
    seen = first["tokens"]["DPO"]["seen"]
    assert sum(row["tokens"] for row in seen["by probability"]) == sum(row["tokens"] for row in seen["by place"])
    assert sum(row["tokens"] for row in seen["by place"]) == seen["tokens"] > 0
    assert len(list((tmp_path / "pictures").glob("smollm2-*.png"))) == 3
    kept = sorted((tmp_path / "work" / "tokens").iterdir())
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert tokens.main(arguments) == 0
    again = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert again["tokens"] == first["tokens"]
    assert [path.stat().st_mtime_ns for path in kept] == stamps


def test_what_the_printed_formula_does_to_confident_tokens():
    """Log-odds of 0, 12 and 20, a little above the reference's: the last has a float32 log p of 0."""

    def score_of(odds):
        odds = torch.tensor(odds)
        zero = torch.zeros(len(odds))
        return upper.TokenScores(torch.nn.functional.logsigmoid(odds), odds, zero, zero, zero)

    policy, ref = score_of([-0.5, 12.0, 20.0]), score_of([0.0, 12.5, 20.0])
    wrong, exact = tokens.printed(policy, ref)
    torch.testing.assert_close(exact, torch.tensor([-0.5, -0.5, 0.0], dtype=torch.float64).exp())
    assert wrong.isfinite().tolist() == [True, True, False]
    assert wrong[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    found = tokens.sure(policy, ref, torch.tensor([0, 1, 3]))
    assert found["float32"]["responses without a finite gradient"] == 0.5
    assert [row["tokens"] for row in found["float32"]["rows"]] == [1, 0, 0, 1, 0, 1]
    assert [row["not finite"] for row in found["float32"]["rows"]] == [0, 0, 0, 0, 0, 1]
    assert [row["not finite"] for row in found["bfloat16"]["rows"]] == [0, 0, 0, 1, 0, 1]
    assert found["float32"]["rows"][3]["median error"] < 0.02
    rows = tokens.by(torch.tensor([-1.0, 3.0, 5.0]), torch.tensor([0.1, 0.2, 1.0]), (0.0, 0.5, 0.9, 1.0))
    assert [row["tokens"] for row in rows] == [2, 0, 1]
    assert (rows[0]["mean"], rows[0]["falling"], rows[2]["mean"]) == (1.0, 0.5, 5.0)


@pytest.mark.full
def test_every_method_on_the_real_model_runs(texts, tmp_path):
    arguments = ["--quick", "--model", str(texts / "model"), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    data = ["--hh-rlhf", str(texts), "--alpaca-eval", str(texts / "groups.jsonl"), "--seeds", "2"]
    assert real.main([*arguments, *data]) == 0
    lines = outcomes.runs_of(tmp_path)
    assert all(outcomes.outcome(claim, lines).seeds == 2 for claim in ON_REAL.values())


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 12), (0.5, 18), (1.0, 24)])
def test_partners_are_lost_on_the_real_model(monkeypatch, ratio, count):
    monkeypatch.setitem(real.TRAINED, "pairs", 12)
    monkeypatch.setitem(real.FROM, "pairs", 12)
    monkeypatch.setattr(real, "batch", lambda known, which: [(i, k) for i, its in zip(known, which) for k in its])
    make, steps = real.parted(range(12), 0, ratio)
    found = [one for step in range(steps) for one in make(step)]
    assert len(found) == len(set(found)) == count
    assert {i for i, _ in found} == set(range(12))


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 40), (0.25, 50), (0.5, 60), (1.0, 80)])
def test_masking_leaves_one_of_each_pair(ratio, count):
    pairs = [(([i], [2 * i, 1]), ([i], [2 * i + 1, 1])) for i in range(2, 42)]
    kept = [
        (row[0].item(), row[1].item(), label.item())
        for batch in on_pairs.masked(pairs, ratio, 0)
        for row, label in zip(batch["input_ids"], batch["label"])
    ]
    assert len(kept) == len(set(kept)) == count
    assert {prompt for prompt, _, _ in kept} == set(range(2, 42))
    assert all(label == (token % 2 == 0) for _, token, label in kept)


def test_switching_exchanges_two_different_symbols():
    answers = torch.arange(len(on_groups.ANSWERS))
    switched = on_groups.switch(answers, torch.Generator().manual_seed(0))
    before, after = on_groups.ANSWERS[answers], on_groups.ANSWERS[switched]
    torch.testing.assert_close(before.sort(1).values, after.sort(1).values)
    one_symbol = (before == before[:, :1]).all(1)
    assert torch.equal((before != after).sum(1), torch.where(one_symbol, 0, 2))
