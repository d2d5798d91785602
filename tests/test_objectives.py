"""The objectives themselves: coefficients in closed form, groups, drawing, weighted sums, running means, and one more
from outside the package."""

from __future__ import annotations

import gc
import inspect
import math
from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rgpb import OBJECTIVES, FusedLoss, Layout, Responses, TokenScores, fused_loss, linear_logprob, objective, reference
from rgpb import fused as public
from rgpb.engine.coefficients import pack_units
from rgpb.fused import bco_loss, dpo_loss, kto_loss, mc_po_loss, mle_loss, rnce_loss, swepo_loss
from rgpb.head import LMHead
from rgpb.objectives import (
    Between,
    RunningMean,
    check_options,
    describe_options,
    draw_negatives,
    parse_sum,
    resolve,
    reward_scale,
    unit_values,
)
from rgpb.objectives.pairs import mean_complement
from rgpb.objectives.registry import RESERVED
from rgpb.validation import How, plan_call

LENGTHS = [3, 5, 2, 4, 1, 6]  # tokens of six responses: three pairs, two groups of three


def responses(seed=0, lengths=LENGTHS, group_size=3, scale=1.0):
    """Scores of the policy, which require a gradient in log p, and of a reference; rewards; labels +, −, +, …"""
    random = torch.Generator().manual_seed(seed)
    tokens, n = sum(lengths), torch.tensor(lengths)

    def scores():
        odds = scale * torch.randn(tokens, generator=random, dtype=torch.float64)
        return TokenScores(F.logsigmoid(odds), odds, torch.ones_like(odds))

    odds = scores().log_odds.requires_grad_()
    policy, ref = (
        TokenScores(F.logsigmoid(odds), odds, torch.ones_like(odds), other_entropy=torch.ones_like(odds)),
        scores(),
    )
    layout = Layout(len(n), n, n, None)
    label = torch.tensor([1.0, -1.0] * (len(n) // 2), dtype=torch.float64)
    rewards = torch.randn(len(n), generator=random, dtype=torch.float64)
    return odds, Responses(policy, ref, layout.sum(ref.logp), label, layout, group_size, rewards)


def coefficients(name, **options):
    """−∂ Σ L / ∂ log p of every token [P], and the responses: dλ = (1 − p) d log p."""
    odds, seen = responses()
    values = unit_values(OBJECTIVES[name], seen, options)
    (g,) = torch.autograd.grad(values.sum(), odds)
    return -g / torch.sigmoid(-odds.detach()), seen


def of_tokens(per_response):
    return torch.repeat_interleave(per_response, torch.tensor(LENGTHS))


def halves(chosen, rejected):
    return torch.cat([chosen.expand(3), rejected.expand(3)])


# What docs/objectives.md says of each: −∂L/∂ℓ of a token, from the sums. D = Δ, n tokens, S̄ = s.
def closed(name, seen):
    delta, n = seen.log_ratios().detach(), seen.n
    s, total = seen.logps(True).detach(), seen.logps().detach()
    b, sig, one = 0.1, torch.sigmoid, torch.ones(3, dtype=torch.float64)
    m, odds = b * (delta[:3] - delta[3:]), torch.logit(s.exp())
    groups = (b * delta).view(2, 3)
    wanted, r = seen.rewards.view(2, 3).softmax(1), seen.rewards.view(2, 3)
    if name == "bnf":
        odds = seen.policy.log_odds.detach() - seen.ref.log_odds
        return of_tokens(seen.label / n) * odds.clamp(max=0).exp()
    if name == "unlikelihood":
        e = seen.policy.log_odds.detach().exp()
        return of_tokens(halves(one, -one) / n) * torch.where(of_tokens(halves(one, -one)) > 0, 1.0, e)
    d = r - r.mean(1, keepdim=True)
    u = groups + d.square()
    multi = torch.zeros(2, 3, dtype=torch.float64)
    for g in range(2):
        best = int(r[g].argmax())
        for j in range(3):
            if j != best:
                multi[g, best] += b * sig(groups[g, j] - groups[g, best]) / 2
                multi[g, j] -= b * sig(groups[g, j] - groups[g, best]) / 2
    known = {
        "mle": lambda: 1 / n,
        "nll_pll": lambda: halves(one, -one) / n,
        "sequence_unlikelihood": lambda: halves(one, -total[3:].exp() / (1 - total[3:].exp())),
        "exmate": lambda: halves(one, -s[3:].exp()) / n,
        "dpo": lambda: b * halves(sig(-m), -sig(-m)),
        "ipo": lambda: -2 * halves(one, -one) / n * (delta[:3] / n[:3] - delta[3:] / n[3:] - 5).repeat(2),
        "slic": lambda: halves(one, -one) * (1 - total[:3] + total[3:] > 0).repeat(2),
        "simpo": lambda: 2 * halves(one, -one) / n * sig(-2 * (s[:3] - s[3:]) + 0.5).repeat(2),
        "cpo": lambda: b * halves(one, -one) * sig(-b * (total[:3] - total[3:])).repeat(2) + halves(one, 0 * one) / n,
        "orpo": lambda: (
            0.1 * halves(one, -one) / n / (1 - s.exp()) * sig(odds[3:] - odds[:3]).repeat(2)
            + halves(one, 0 * one) / n
        ),
        "rdpo": lambda: b * halves(one, -one) * sig(-m - 0.01 * (n[:3] - n[3:])).repeat(2),
        "rpo": lambda: b * halves(one, -one) * sig(-m).repeat(2) + halves(one, 0 * one) / n,
        "exo": lambda: -b * halves(one, -one) * (sig(m) * sig(-m) * (m - math.log(999.0))).repeat(2),
        "sppo": lambda: -2 * halves(delta[:3] - 5, delta[3:] + 5),
        "nca_pair": lambda: halves(b * (1 - 1.5 * sig(b * delta[:3])), -b / 2 * sig(b * delta[3:])),
        "apo_zero": lambda: b * halves(one, -one) * sig(b * delta) * sig(-b * delta),
        "apo_down": lambda: halves(
            b * (sig(m) * sig(-m) - sig(b * delta[:3]) * sig(-b * delta[:3])), -b * sig(m) * sig(-m)
        ),
        "bco": lambda: seen.label * b * sig(-seen.label * b * (delta - delta.mean())),
        "kto": lambda: (lambda v: seen.label * b * sig(v) * sig(-v))(b * (delta - delta.mean().clamp(min=0))),
        "infonca": lambda: b * (wanted - groups.softmax(1)).view(-1),
        "nca": lambda: b * (wanted * sig(-groups) - sig(groups) / 3).view(-1),
        "swepo": lambda: b * (u.masked_fill(d <= 0, -torch.inf).softmax(1) - u.softmax(1)).view(-1),
        "rnce": lambda: b * (torch.eye(3)[0] - groups.softmax(1)).view(-1),
        "mc_po": lambda: b * (torch.eye(3)[0] - groups.softmax(1)).view(-1),
        "multi_dpo": lambda: multi.view(-1),
    }  # fmt: skip
    return of_tokens(known[name]())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_documented_coefficients(name):
    made, seen = coefficients(name, **({"m": 2} if name == "mc_po" else {}))
    torch.testing.assert_close(made, closed(name, seen), rtol=1e-9, atol=1e-12)


def test_each_objective_has_its_public_function():
    for name, spec in OBJECTIVES.items():
        function = getattr(public, f"{name}_loss")
        shown = inspect.signature(function).parameters
        assert ("ref" in shown) == (spec.ref is not None)
        assert ("label" in shown) == spec.label
        assert ("rewards" in shown) == spec.rewards
        assert ("group_size" in shown) == (spec.unit == "group")
        assert set(spec.options) <= set(shown)
        assert inspect.getdoc(spec.function) in inspect.getdoc(function)


# -- groups ------------------------------------------------------------------------------------------------------------

GROUPS = sorted(name for name, spec in OBJECTIVES.items() if spec.unit == "group")


def batch(B, T=5, V=31, H=7, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()
    target = torch.randint(V, (B, T))
    ref = linear_logprob(torch.randn(B, T, H).to(dtype), torch.randn(V, H).to(dtype), target)
    return hidden, weight, target, ref


def group_arguments(name, groups, size, seed=0):
    random = torch.Generator().manual_seed(seed)
    if OBJECTIVES[name].rewards:
        return {"rewards": torch.randn(groups, size, generator=random, dtype=torch.float64)}
    return {"group_size": size}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_group_filled_up_is_the_smaller_group(name, reduction):
    """An empty response anywhere in it changes neither value nor gradient, whatever its reward."""
    hidden, weight, target, ref = batch(4)
    options = {"m": 1, "sampler": "max"} if name == "mc_po" else {}
    given = group_arguments(name, 2, 2)
    small = fused_loss(hidden, weight, target, objective=name, ref=ref, reduction=reduction, **given, **options)
    order = torch.tensor([0, 2, 1, 2, 3, 2])  # row 2 stands for the empty ones
    empty = torch.tensor([False, True, False, False, False, True])
    wide = torch.where(empty[:, None], -100, target[torch.tensor([0, 2, 1, 2, 3, 2])])
    if "rewards" in given:
        r = given["rewards"]
        nan = torch.nan
        given = {"rewards": torch.tensor([[r[0, 0], nan, r[0, 1]], [r[1, 0], r[1, 1], nan]])}
    else:
        given = {"group_size": 3}
    filled = fused_loss(
        hidden[order], weight, wide, objective=name, ref=TokenScores(*(x[order] for x in ref[:3])), reduction=reduction,
        **given, **options,
    )  # fmt: skip
    torch.testing.assert_close(filled, small, rtol=1e-12, atol=1e-12)
    wanted = (hidden, weight)
    for a, b in zip(torch.autograd.grad(filled.sum(), wanted), torch.autograd.grad(small.sum(), wanted)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_with_nothing_to_compare_is_exactly_zero(name):
    """One response alone; none at all; all rewards alike."""
    hidden, weight, target, ref = batch(9)
    target[1:3] = -100
    target[3:6] = -100
    given = group_arguments(name, 3, 3)
    if "rewards" in given:
        given["rewards"][2] = 0.3
    values = fused_loss(hidden, weight, target, objective=name, ref=ref, reduction="none", **given)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
    assert values[1] == 0
    assert not gradients[0][3:6].any()
    if name in ("swepo", "rnce", "mc_po", "multi_dpo"):
        assert values[0] == 0
        assert not gradients[0][:3].any()
    if name in ("swepo", "multi_dpo"):
        assert values[2] == 0
        assert not gradients[0][6:].any()


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "mc_po"])
def test_single_pass_for_groups_that_fit_the_chunk(name):
    """The plan takes it, in chunks of whole groups; two passes where no group fits the chunk."""
    hidden, weight, target, ref = batch(12, T=6)
    target[4, 2:] = -100
    target[7] = -100
    given = group_arguments(name, 4, 3)
    spec, wanted = OBJECTIVES[name], (hidden, weight)
    plan, _ = plan_call(hidden, LMHead(weight), How(), spec=spec)
    assert (plan.path, plan.units) == ("single", 3)
    two = fused_loss(hidden, weight, target, objective=name, ref=ref, reduction="none", **given).mean()
    expected = torch.autograd.grad(two, wanted)
    row = 8 * (31 + 2 * 7)
    for rows in (200, 40, 20, 9, 2):  # one chunk; several groups; one group; less than one; two rows
        workspace = 8 * 31 * 8 + rows * row
        how = {"path": "single"} if rows == 9 else {}  # although no group fits
        one = fused_loss(hidden, weight, target, objective=name, ref=ref, workspace=workspace, **how, **given)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(one, wanted), expected):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_units_are_packed_whole():
    count = [3, 1, 2, 0, 4, 1]
    assert list(pack_units(count, [0], 2, 5)) == [(0, 1), (1, 2), (2, 3)]  # 4, 2, 5 tokens
    assert list(pack_units(count, [0], 2, 6)) == [(0, 2), (2, 3)]
    assert list(pack_units(count, [0, 3], 1, 6)) == [(0, 1), (1, 2), (2, 3)]  # pairs of 3, 5, 3 tokens
    assert list(pack_units(count, [0], 3, 1)) == [(0, 1), (1, 2)]
    assert list(pack_units([0] * 4, [0], 2, 9)) == []


def test_groups_with_metrics():
    hidden, weight, target, ref = batch(6)
    rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.7]])
    _, metrics = swepo_loss(hidden, weight, target, ref=ref, rewards=rewards, beta=0.5, return_metrics=True)
    reward = 0.5 * (linear_logprob(hidden, weight, target).logp - ref.logp).sum(1)
    best, rest = reward[[1, 5]], reward[[0, 2, 3, 4]]
    others = [(1, 0), (1, 2), (5, 3), (5, 4)]
    expected = {
        "rewards/chosen": best.mean(),
        "rewards/rejected": rest.mean(),
        "rewards/margins": best.mean() - rest.mean(),
        "rewards/accuracies": torch.tensor([float(reward[i] > reward[j]) for i, j in others]).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach().float())


def test_groups_of_a_function_of_ones_own():
    hidden, weight, target, ref = batch(6)

    def spread(seen):
        return seen.groups(seen.log_ratios()).var(1) * seen.groups(seen.rewards).sum(1)

    rewards = torch.rand(2, 3)
    values = fused_loss(hidden, weight, target, objective=spread, ref=ref, rewards=rewards, reduction="none")
    ratio = (linear_logprob(hidden, weight, target).logp - ref.logp).sum(1).view(2, 3)
    torch.testing.assert_close(values, ratio.var(1) * rewards.double().sum(1))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("swepo", {}, r"rewards: expected \[G, K\] numbers for swepo, got None"),
        ("rnce", {}, "group_size: expected the responses per group, 2 or more, for rnce, got None"),
        ("rnce", {"group_size": 4}, "target: expected groups of 4 responses, got 6 responses"),
        ("rnce", {"group_size": 1}, "group_size: expected a whole number, 2 or more, got 1"),
        ("rnce", {"group_size": 3.0}, "group_size: expected a whole number, 2 or more, got 3.0"),
        ("rnce", {"rewards": torch.rand(2, 3)}, "rewards: expected None, since rnce has no use for them"),
        ("dpo", {"group_size": 2}, "group_size: expected None, since dpo compares no groups, got 2"),
        ("swepo", {"rewards": torch.rand(6)}, r"rewards: expected shape \[G, K\] for 6 responses, got \[6\]"),
        ("swepo", {"rewards": torch.rand(2, 2)}, r"rewards: expected shape \[G, K\] for 6 responses, got \[2, 2\]"),
        ("swepo", {"rewards": torch.rand(2, 3), "group_size": 2}, "for 6 responses in groups of 2"),
        ("swepo", {"rewards": [[1.0, 2.0]]}, "rewards: expected a tensor of real numbers, got list"),
        ("swepo", {"rewards": torch.tensor([[torch.nan, 0, 1]] * 2)}, "rewards: expected finite numbers, got nan"),
        ("mc_po", {"group_size": 3, "m": 3}, "m: expected a whole number from 1 to 2, the .* of a group, got 3"),
        ("dpo", {"beta": 0}, "options of dpo: expected beta to be a number above 0, got 0.0"),
    ],
)  # fmt: skip
def test_refusals(name, given, message):
    hidden, weight, target, ref = batch(6)
    with pytest.raises(ValueError, match=message):
        fused_loss(hidden, weight, target, objective=name, ref=ref, **given)


RANGED = [(spec, option) for spec in OBJECTIVES.values() for (option,) in spec.declared.values() if option.ranges]
# Tried of every number: those that its range leaves out are refused
NUMBERS = (-1e300, -1.0, -1e-9, 0.0, 1e-9, 0.25, 0.49999, 0.5, 0.7, 1.0, 2.0, 1e300)
RANGES = {
    "beta": lambda x: x > 0,
    "tau": lambda x: x > 0,
    "label_smoothing": lambda x: 0 <= x < 0.5,
    "epsilon": lambda x: 0 < x < 0.5,
    "m": lambda x: x >= 1,
}


def test_values_out_of_range_are_refused():
    """Without β or τ there is nothing left to learn from; `exmate`'s β is a weight, and may be 0."""
    assert len(RANGED) > 40
    for spec, option in RANGED:
        name = f"options of {spec.name}: expected {option.name} to be "
        if isinstance(option.default, str):
            for value in option.ranges[0].values:
                assert check_options(spec, {option.name: value}) == {option.name: value}
            with pytest.raises(ValueError, match=name + "'.*, got 'x'"):
                check_options(spec, {option.name: "x"})
            continue
        holds = RANGES.get(option.name if spec.name != "exmate" else "", lambda x: x >= 0)
        for value in NUMBERS:
            if option.type is int and value != int(value):
                continue
            if holds(value):
                (checked,) = check_options(spec, {option.name: value}).values()
                assert (type(checked), checked) == (option.type, value)
            else:
                with pytest.raises(ValueError, match=rf"{name}a .*, got -?\d"):
                    check_options(spec, {option.name: value})


def test_every_number_of_the_package_has_a_range():
    free = {
        f"{spec.name}.{option.name}"
        for spec in OBJECTIVES.values()
        for (option,) in spec.declared.values()
        if option.type in (int, float, str) and not option.ranges
    }
    assert not free


def test_options_that_are_refused():
    for name, given, message in (
        ("mc_po", {"m": "2"}, "options of mc_po: expected m to be a whole number, got '2'"),
        ("mc_po", {"m": True}, "options of mc_po: expected m to be a whole number, got True"),
        ("mc_po", {"m": 1.5}, "options of mc_po: expected m to be a whole number, got 1.5"),
        ("mc_po", {"m": 0}, "options of mc_po: expected m to be a whole number of at least 1, got 0"),
        ("mc_po", {"generator": 3}, "options of mc_po: expected generator to be a torch.Generator or None, got 3"),
        ("mc_po", {"sampler": "Min"}, "sampler to be 'mc', 'max', 'min' or 'random', got 'Min'; did you mean 'min'[?]"),
        ("dpo", {"beta": math.nan}, "options of dpo: expected beta to be a finite number, got nan"),
        ("dpo", {"beta": 10**400}, "options of dpo: expected beta to be a finite number, got 1000"),
        ("dpo", {"beta": "0.1"}, "options of dpo: expected beta to be a finite number, got '0.1'"),
        ("dpo", {"beta": None}, "options of dpo: expected beta to be a finite number, got None"),
        ("dpo", {"beta": -1}, "options of dpo: expected beta to be a number above 0, got -1.0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing to be a number of at least 0 and below 0.5, got 0.5"),
        ("dpo", {"betta": 1}, r"options of dpo: expected a subset of .*, got \['betta'\]; did you mean 'beta'[?]"),
        ("ipo", {"length_normalize": 1}, "options of ipo: expected length_normalize to be a bool, got 1"),
        ("kto", {"z0": "x"}, "expected z0 to be a torch.Tensor, a RunningMean, a finite number or None, got 'x'"),
        ("bco", {"delta": True}, "of bco: expected delta to be a RunningMean, a finite number or None, got True"),
        ("bco", {"delta": torch.ones(1)}, "delta to be a RunningMean, a finite number or None, got Tensor"),
        ("mle + dpo", {"dpo.beta": 0}, r"options of 1.0\*mle \+ 1.0\*dpo: expected dpo.beta to be a number above 0"),
        ("exmate + dpo", {"beta": 0}, "expected beta to be a number above 0, got 0.0"),  # exmate alone would take it
        ("mle + dpo", {"dpo.betta": 1}, "got .'dpo.betta'.; did you mean 'dpo.beta'[?]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_options(resolve(name), given)


def test_options_in_words():
    assert describe_options(OBJECTIVES["dpo"]) == [
        ("beta", "float", "0.1", "a number above 0"),
        ("label_smoothing", "float", "0.0", "a number of at least 0 and below 0.5"),
    ]
    assert describe_options(OBJECTIVES["mc_po"])[1:] == [
        ("sampler", "str", "'mc'", "'mc', 'max', 'min' or 'random'"),
        ("m", "int", "1", "a whole number of at least 1"),
        ("generator", "Generator | None", "None", ""),
    ]
    assert describe_options(OBJECTIVES["kto"])[-1] == ("z0", "Tensor | RunningMean | float | None", "None", "")
    assert describe_options(resolve("exmate + dpo"))[:2] == [
        ("exmate.beta", "float", "1.0", "a number of at least 0"),
        ("beta", "float", "1.0", "a number of at least 0 and a number above 0"),
    ]
    assert describe_options(resolve(lambda seen, *, x: seen.logps())) == []


def test_names_that_are_nearly_right():
    for wrong, right in (("DPO", "dpo"), ("mle + exmatte", "exmate"), ({"simpo2": 1.0}, "simpo")):
        with pytest.raises(ValueError, match=f"got .*; did you mean '{right}'[?]"):
            resolve(wrong)
    with pytest.raises(ValueError, match="got 'zzz'$"):
        resolve("zzz")


def test_ranges_of_ones_own():
    """Declared with the option, or an object with `text` and `holds`; and what can't be read is said."""

    class Odd:
        text = "that is odd"

        def holds(self, value):
            return value % 2 == 1

    def ranged_of_this_test(seen, *, gain: Annotated[float, Between(0, 1, "(]"), "note"] = 1, k: Odd = 1, free=None):
        return gain * seen.logps()

    ranged_of_this_test.__annotations__["k"] = Annotated[int, Odd()]
    try:
        objective(ranged_of_this_test)
        spec = OBJECTIVES["ranged_of_this_test"]
        assert check_options(spec, {"gain": 0.5, "k": 3.0, "free": "x"}) == {"gain": 0.5, "k": 3, "free": "x"}
        for name, value, wanted in (
            ("gain", 0, "a number above 0 and of at most 1, got 0.0"),
            ("gain", 1.01, "a number above 0 and of at most 1"),
            ("k", 2, "a whole number that is odd, got 2"),
            ("k", 2.5, "a whole number, got 2.5"),
        ):
            with pytest.raises(ValueError, match=f"options of ranged_of_this_test: expected {name} to be {wanted}"):
                check_options(spec, {name: value})
        ranged_of_this_test.__kwdefaults__["gain"] = 2.0
        with pytest.raises(ValueError, match="expected a default of gain in its range, a number above 0 .*, got 2.0"):
            objective(ranged_of_this_test)
        ranged_of_this_test.__annotations__ = {"gain": "Annotated[float, Nowhere()]", "free": "Nowhere"}
        with pytest.raises(ValueError, match="annotation of gain whose names stand in its module, .*'Nowhere'"):
            objective(ranged_of_this_test)
    finally:
        del OBJECTIVES["ranged_of_this_test"]
    for wrong, message in (({"low": 1, "high": 1}, "high: expected"), ({"low": 0, "high": 1, "ends": "[["}, "ends:")):
        with pytest.raises(ValueError, match=message):
            Between(**wrong)


def test_the_reserved_names_are_those_of_fused_loss():
    shown = set(inspect.signature(fused_loss).parameters) - {"options"}
    assert shown <= RESERVED
    assert RESERVED - shown == {"scores"}  # of `coefficients`


def test_references_as_sums():
    """Those of responses without tokens aren't read; what can't be a log-probability is refused."""
    hidden, weight, target, ref = batch(4)
    target[2] = -100
    sums = ref.logp.sum(1)
    exact = dpo_loss(hidden, weight, target, ref=TokenScores(*(torch.where(target < 0, 0.0, x) for x in ref[:3])))
    for unread in (float(sums[2]), math.nan, 7.0):
        sums[2] = unread
        torch.testing.assert_close(dpo_loss(hidden, weight, target, ref=sums), exact)
    for wrong in (math.nan, 0.5):
        with pytest.raises(ValueError, match="ref: expected a log-probability, at most 0, wherever"):
            dpo_loss(hidden, weight, target, ref=torch.where(torch.arange(4) == 1, wrong, sums))
    with pytest.raises(ValueError, match="ref.logp: expected a tensor, got NoneType"):
        dpo_loss(hidden, weight, target, ref=TokenScores(None, ref.log_odds, ref.lse))


def test_a_packed_reference_of_as_many_tokens_as_responses_is_per_token():
    hidden, weight, _, _ = batch(4, T=1)
    target, cu = torch.randint(31, (4,)), torch.tensor([0, 2, 2, 3, 4])
    ref = linear_logprob(torch.randn(4, 7, dtype=torch.float64), torch.randn(31, 7, dtype=torch.float64), target)
    given = {"cu_seqlens": cu, "reduction": "none"}
    scores, logp = (dpo_loss(hidden.view(4, 7), weight, target, ref=r, **given) for r in (ref, ref.logp))
    torch.testing.assert_close(logp, scores)


def test_metrics_leave_out_a_group_whose_first_response_is_absent():
    hidden, weight, target, ref = batch(6)
    whole = rnce_loss(
        hidden[3:], weight, target[3:], ref=TokenScores(*(x[3:] for x in ref[:3])), group_size=3, return_metrics=True
    )[1]
    target[0] = -100
    made = rnce_loss(hidden, weight, target, ref=ref, group_size=3, return_metrics=True)[1]
    torch.testing.assert_close(made, whole)


@pytest.fixture
def extremes_of_this_test():
    """The name of a group objective that draws the best and the worst by reward."""

    def best_and_worst(seen, options):
        rewards = seen.groups(seen.rewards)
        keep = torch.zeros_like(rewards, dtype=torch.bool)
        return keep.scatter(1, torch.stack([rewards.argmax(1), rewards.argmin(1)], 1), True).view(-1)

    @objective(couples="group", ref="sums", rewards=True, draw=best_and_worst)
    def extremes_of_this_test(seen, *, beta=0.1):
        scores = beta * seen.groups(torch.where(seen.present, seen.log_ratios(), 0.0))
        rewards = seen.groups(torch.where(seen.present, seen.rewards, torch.nan))
        worst, best = (rewards.nan_to_num(fill).sort(1).indices[:, i] for fill, i in ((9.0, 0), (-9.0, -1)))
        return -F.logsigmoid(scores.gather(1, best[:, None]) - scores.gather(1, worst[:, None]))[:, 0]

    yield "extremes_of_this_test"
    del OBJECTIVES["extremes_of_this_test"]


def test_a_draw_of_ones_own(extremes_of_this_test):
    """With rewards; and one of the wrong shape."""
    hidden, weight, target, ref = batch(6)
    rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.7]])
    made = fused_loss(hidden, weight, target, objective=extremes_of_this_test, ref=ref, rewards=rewards)
    order = torch.tensor([1, 5, 0, 4])
    pairs = dpo_loss(hidden[order], weight, target[order], ref=TokenScores(*(x[order] for x in ref[:3])))
    torch.testing.assert_close(made, pairs)
    wrong = OBJECTIVES[extremes_of_this_test]._replace(draw=lambda seen, options: True)
    OBJECTIVES[extremes_of_this_test] = wrong
    with pytest.raises(ValueError, match=r"draw: expected bool \[6\] of extremes_of_this_test, got bool"):
        fused_loss(hidden, weight, target, objective=extremes_of_this_test, ref=ref, rewards=rewards)


@pytest.mark.full
def test_a_draw_of_ones_own_through_a_model(extremes_of_this_test):
    from transformers import LlamaConfig, LlamaForCausalLM

    from rgpb import hf

    rewards, order = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.7]]), torch.tensor([1, 5, 0, 4])
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).double()
    ids = torch.randint(31, (6, 5))
    padded = {"position_ids": torch.arange(5)[None], "input_ids": ids, "labels": ids}
    made = hf.loss(model, padded, extremes_of_this_test, ref=torch.zeros(6), rewards=rewards)
    chosen = {"input_ids": ids[order], "labels": ids[order]}
    torch.testing.assert_close(made, hf.loss(model, chosen, "dpo", ref=torch.zeros(4)))


def test_a_function_of_ones_own_can_be_registered_anew():
    """As a notebook's cell does, also after it was imported from a file; the package's own names stay."""
    try:
        for factor, module in ((1.0, "a_file"), (2.0, "__main__")):

            def anew_of_this_test(seen, factor=factor):
                return factor * seen.logps()

            anew_of_this_test.__module__ = module
            objective(anew_of_this_test)
        hidden, weight, target, _ = batch(2)
        made = fused_loss(hidden, weight, target, objective="anew_of_this_test")
        torch.testing.assert_close(made, -2 * mle_loss(hidden, weight, target, length_normalize=False))
        with pytest.raises(ValueError, match="name: expected a name that isn't taken, got 'mle'"):
            objective("mle")(anew_of_this_test)
    finally:
        del OBJECTIVES["anew_of_this_test"]


def test_registrations_that_are_refused():
    from functools import partial

    for wrong, message in (
        (lambda seen, *, target=1.0: seen.logps(), r"options: expected names .* got \['target'\]"),
        (lambda seen, **more: seen.logps(), r"options: expected each by its name, got \*args or \*\*keywords"),
        (partial(lambda seen, x: seen.logps(), x=1), "name: expected one for a function without"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(wrong)


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_loss_of_what_was_drawn(m):
    """The same as `rnce` of the drawn rows alone, gradients too; and the rest of the rows have none."""
    hidden, weight, target, ref = batch(8)
    options = {"m": m, "beta": 0.4}
    loss = mc_po_loss(
        hidden, weight, target, ref=ref, group_size=4, generator=torch.Generator().manual_seed(5), **options
    )
    made = torch.autograd.grad(loss, (hidden, weight))
    scores = linear_logprob(hidden.detach(), weight.detach(), target)
    flat = TokenScores(*(x.reshape(-1) for x in scores[:3]))
    n = torch.full((8,), 5)
    seen = Responses(flat, None, ref.logp.sum(1), None, Layout(8, None, n, None), 4)
    keep = draw_negatives(seen, {"generator": torch.Generator().manual_seed(5), **options})
    rows = keep.nonzero().view(-1)
    assert len(rows) == 2 * (m + 1)
    again = rnce_loss(
        hidden[rows], weight, target[rows], ref=TokenScores(*(x[rows] for x in ref[:3])), group_size=m + 1, beta=0.4
    )
    torch.testing.assert_close(loss, again, rtol=1e-12, atol=0)
    for a, b in zip(made, torch.autograd.grad(again, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert not made[0][~keep].any()


def test_what_was_not_drawn_is_no_negative():
    """Also where the objective is called by itself, on all candidates."""
    _, seen = responses(lengths=[3, 5, 2, 4, 1, 6, 2, 2], group_size=4)
    options = {"beta": 0.5, "m": 2, "sampler": "max"}
    values = OBJECTIVES["mc_po"].function(seen, **options)
    keep = seen.groups(draw_negatives(seen, options))
    ratios = 0.5 * seen.groups(seen.log_ratios())
    wanted = [-(its[kept].log_softmax(0)[0]) for its, kept in zip(ratios, keep)]
    assert keep.sum(1).tolist() == [3, 3]
    torch.testing.assert_close(values, torch.stack(wanted))
    with pytest.raises(ValueError, match="m: expected a whole number from 1 to 3, the candidates of a group, got 0"):
        OBJECTIVES["mc_po"].function(seen, m=0)


def test_drawing_with_a_generator_leaves_the_global_state_alone():
    hidden, weight, target, ref = batch(6)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for m in (1, 2):
        generator = torch.Generator().manual_seed(1)
        mc_po_loss(hidden, weight, target, ref=ref, group_size=3, m=m, generator=generator).backward()
    assert torch.equal(before, torch.get_rng_state())


def test_drawing_inside_activation_checkpointing():
    """torch's own generators are put back for the recomputation; one that is given would draw others."""
    hidden, weight, target, ref = batch(40)
    found = {}
    for checkpointed in (False, True):
        for own in (False, True):
            torch.manual_seed(3)
            generator = torch.Generator().manual_seed(3) if own else None
            x = hidden.detach().clone().requires_grad_()

            def loss(x, generator=generator):
                return mc_po_loss(x.sin(), weight, target, ref=ref, group_size=4, m=1, generator=generator)

            value = checkpoint(loss, x, use_reentrant=False) if checkpointed else loss(x)
            if checkpointed and own:
                with pytest.raises(ValueError, match="generator: expected none inside activation checkpointing"):
                    value.backward()
                continue
            value.backward()
            found[checkpointed, own] = x.grad
    torch.testing.assert_close(found[True, False], found[False, False])


def test_drawing_is_seeded_and_moves():
    hidden, weight, target, ref = batch(40)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return mc_po_loss(hidden, weight, target, ref=ref, group_size=4, generator=generator, reduction="none")

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(3)
    first = mc_po_loss(hidden, weight, target, ref=ref, group_size=4, reduction="none")
    second = mc_po_loss(hidden, weight, target, ref=ref, group_size=4, reduction="none")
    assert not torch.equal(first, second)  # torch's own generator goes on


@pytest.mark.parametrize("packed", [False, True])
def test_one_response_leaves_the_others_alone(packed):
    """log(1 − e^S) is a scan over all tokens: an impossible token of one response must not reach the next."""
    hidden, weight, *_ = batch(4)
    target = torch.randint(1, 31, (4, 5))
    target[0, 2] = 0  # the only response with that token
    for low in (-1e9, -1e20, -math.inf, torch.finfo(torch.float64).min):
        bias = torch.zeros(31, dtype=torch.float64)
        bias[0] = low
        for name in ("sequence_unlikelihood", "orpo"):
            rows = torch.tensor([1, 3])
            alone = fused_loss(hidden[rows], LMHead(weight, bias), target[rows], objective=name, reduction="none")
            given = {"cu_seqlens": torch.tensor([0, 5, 10, 15, 20])} if packed else {}
            x, y = (hidden.view(20, -1), target.view(20)) if packed else (hidden, target)
            both = fused_loss(x, LMHead(weight, bias), y, objective=name, reduction="none", **given)
            torch.testing.assert_close(both[1:], alone, rtol=1e-10, atol=1e-12)
            made = torch.autograd.grad(both[1], (hidden, weight))
            for a, b in zip(made, torch.autograd.grad(alone, (hidden, weight))):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("margin", [0.5, 12.0, 60.0, 300.0])
def test_the_complement_of_a_response_is_per_token(margin):
    """Tokens of one p have that mean, so log(1 − e^S̄) is log(1 − p), also where S rounds to 0."""
    _, seen = responses()
    odds = torch.full_like(seen.policy.log_odds, margin)
    seen = seen._replace(policy=TokenScores(F.logsigmoid(odds), odds, torch.ones_like(odds)))
    wanted = F.logsigmoid(odds.new_tensor(-margin)).expand(len(LENGTHS))
    torch.testing.assert_close(mean_complement(seen), wanted, rtol=1e-9, atol=0)


def test_an_impossible_rejected_token_costs_nothing():
    """p = 0 on the rejected: the margin is infinite, the loss 0, and both have no gradient there."""
    hidden, weight, target, ref = batch(4)
    target = torch.randint(1, 31, (4, 5))
    target[2, 2] = 0  # rejected of the first pair
    bias = torch.zeros(31, dtype=torch.float64)
    bias[0] = -math.inf
    for name in ("dpo", "rdpo", "exo"):
        values = fused_loss(hidden, LMHead(weight, bias), target, objective=name, ref=ref, reduction="none")
        assert values.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(values.sum(), (hidden, weight)))
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    target = target[[2, 0, 1, 3]]
    for name in ("multi_dpo", "swepo"):
        values = fused_loss(
            hidden, LMHead(weight, bias), target, objective=name, ref=ref, rewards=rewards, reduction="none"
        )
        assert values.isfinite().all()
        assert values[0] == 0


def test_extreme_rewards_are_finite():
    hidden, weight, target, ref = batch(3)
    for rewards in ([1e160, -1e160, 0.0], [1e308, -1e308, 0.0], [-3e30, -4e30, 0.0]):
        given = {"ref": ref, "rewards": torch.tensor([rewards], dtype=torch.float64)}
        for loss, options in (
            (swepo_loss, {}),
            (swepo_loss, {"alpha": 0.0}),
            (public.infonca_loss, {"tau": 0.1}),
            (public.nca_loss, {"tau": 1e-31}),
        ):
            value = loss(hidden, weight, target, **given, **options)
            assert value.isfinite()
            assert value.abs() < 1e13
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, (hidden, weight)))
    target[2] = -100  # without tokens its reward doesn't matter
    given = {"ref": ref, "rewards": torch.tensor([[-3e30, -4e30, 0.0]], dtype=torch.float64)}
    small = {"ref": TokenScores(*(x[:2] for x in ref[:3])), "rewards": given["rewards"][:, :2]}
    torch.testing.assert_close(
        public.infonca_loss(hidden, weight, target, **given),
        public.infonca_loss(hidden[:2], weight, target[:2], **small),
    )


# -- weighted sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sum_is_the_sum(reduction):
    hidden, weight, target, ref = batch(6)
    wanted = (hidden, weight)
    whole = fused_loss(
        hidden, weight, target, objective={"exmate": 2.0, "dpo": 0.5, "mle": 0.25}, ref=ref, reduction=reduction,
        **{"dpo.beta": 0.3, "exmate.beta": 0.7},
    )  # fmt: skip
    parts = (
        2 * public.exmate_loss(hidden, weight, target, beta=0.7, reduction=reduction)
        + 0.5 * dpo_loss(hidden, weight, target, ref=ref, beta=0.3, reduction=reduction)
        + 0.25 * mle_loss(hidden[:3], weight, target[:3], reduction=reduction)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(whole.sum(), wanted), torch.autograd.grad(parts.sum(), wanted)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_papers_recipes_are_sums():
    """RPO is DPO with SFT (MC-PO, Table 5); DPO, SLiC with λ and CPO likewise."""
    hidden, weight, target, ref = batch(6)
    for name, recipe, given in (
        ("rpo", "dpo + 0.7*mle", {"ref": ref}),
        ("cpo", "cpo + 0.7*mle", {}),
        ("slic", "slic + 0.7*mle", {}),
    ):
        whole = fused_loss(hidden, weight, target, objective=name, lam=0.7, **given)
        bare = {f"{name}.lam": 0.0} if name != "rpo" else {}
        torch.testing.assert_close(fused_loss(hidden, weight, target, objective=recipe, **given, **bare), whole)


def test_a_sum_costs_one_sweep():
    hidden, weight, *_ = batch(6)
    for name, units in (("mle + 0.5*dpo", 3), ("mle + bnf", 3), ("mle + 0.5*swepo", 3), ("mle + kto", 4)):
        assert plan_call(hidden, LMHead(weight), How(), spec=resolve(name))[0].units == units


def test_sums_beside_groups_labels_and_pairs():
    hidden, weight, target, ref = batch(6)
    rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.7]])
    best = torch.tensor([1, 5])
    made = fused_loss(hidden, weight, target, objective="mle + 0.5*swepo", ref=ref, rewards=rewards)
    expected = mle_loss(hidden[best], weight, target[best]) + 0.5 * swepo_loss(
        hidden, weight, target, ref=ref, rewards=rewards
    )
    torch.testing.assert_close(made, expected)
    made = fused_loss(hidden, weight, target, objective="mle + rnce", ref=ref, group_size=3)
    first = mle_loss(hidden[[0, 3]], weight, target[[0, 3]]) + rnce_loss(hidden, weight, target, ref=ref, group_size=3)
    torch.testing.assert_close(made, first)

    label = torch.tensor([True, False, True, True, False, False])
    made = fused_loss(hidden, weight, target, objective="mle + bnf", ref=ref, label=label, reduction="none")
    bnf = public.bnf_loss(hidden, weight, target, label, ref=ref, reduction="none")
    mle = mle_loss(hidden, weight, target, reduction="none")
    torch.testing.assert_close(made, bnf + torch.where(label, mle, 0.0))

    made = fused_loss(hidden, weight, target, objective="bnf + dpo", ref=ref)
    sides = torch.tensor([1, 1, 1, -1, -1, -1])
    expected = public.bnf_loss(hidden, weight, target, sides, ref=ref) + dpo_loss(hidden, weight, target, ref=ref)
    torch.testing.assert_close(made, expected)


def test_sums_are_read():
    assert parse_sum("mle+dpo") == {"mle": 1.0, "dpo": 1.0}
    assert parse_sum(" 2*exmate + -1e-3*dpo+1e+2 * ipo") == {"exmate": 2.0, "dpo": -1e-3, "ipo": 100.0}
    assert parse_sum("mle - 0.5*dpo") == {"mle": 1.0, "dpo": -0.5}
    assert parse_sum("-mle+1E+1*dpo - -2*ipo") == {"mle": -1.0, "dpo": 10.0, "ipo": 2.0}
    assert resolve({"mle": 1, "dpo": 0.5}) is resolve("mle + 0.5*dpo") is resolve("mle+.5*dpo")
    for wrong, message in (
        ("mle + nope", "expected terms such as mle or 0.5[*]dpo"),
        ("mle + x*dpo", "expected terms such as mle"),
        ("mle + mle", "expected each name once, got 'mle' twice"),
        *((text, "expected terms such as mle") for text in ("mle +", "mle ++--dpo", "*dpo", "mle*2", "nan*dpo", "+")),
        ({}, "expected at least one name and its weight"),
        ({"nope": 1.0}, "expected names of .*, got 'nope'"),
        ({"mle": math.inf}, "expected a finite number as weight of mle, got inf"),
        ({"mle": "1"}, "expected a finite number as weight of mle, got '1'"),
        ("dpo + rnce", "expected pairs or groups in one sum, got both"),
        ("bnf + rnce", r"expected no labels beside groups, got \['bnf'\]"),
        ("mle + mc_po", "expected mc_po by itself, since it draws what to look at"),
        ({"mle": 10**400}, "expected a finite number as weight of mle"),
        ("mle - 0.5*dpo", "expected a weight of 0 or more for dpo, since .*, got -0.5"),
        ({"mle": -1}, "expected a weight of 0 or more for mle, since .*, got -1"),
    ):
        with pytest.raises(ValueError, match=f"objective: {message}"):
            resolve(wrong)


def test_a_sums_reward_is_that_of_its_first_term_with_one():
    spec = resolve("exmate + 0.5*dpo")
    assert reward_scale(spec, {}) == 0.1
    assert reward_scale(spec, {"exmate.beta": 3.0}) == 0.1
    assert reward_scale(spec, {"beta": 0.4}) == 0.4
    assert reward_scale(spec, {"dpo.beta": 0.2, "beta": 0.4}) == 0.2
    assert reward_scale(OBJECTIVES["mle"], {}) == 1.0
    hidden, weight, target, ref = batch(2)
    with pytest.raises(ValueError, match=r"options of .*: expected a subset of .*, got \['dpo.x'\]"):
        fused_loss(hidden, weight, target, objective=spec.name, ref=ref, **{"dpo.x": 1.0})


# -- what is estimated from the batch ----------------------------------------------------------------------------------


def test_a_running_mean_is_in_the_state():
    hidden, weight, target, ref = batch(6)
    label = torch.tensor([1, -1, 1, -1, 1, 1])
    loss = FusedLoss("bco", delta=RunningMean(), beta=0.5)
    reward = 0.5 * (linear_logprob(hidden, weight, target).logp - ref.logp).sum(1).detach()
    first = loss(hidden, weight, target, label, ref=ref)
    torch.testing.assert_close(first, bco_loss(hidden, weight, target, label, ref=ref, beta=0.5))
    part = TokenScores(*(x[:2] for x in ref[:3]))
    second = loss(hidden[:2], weight, target[:2], label[:2], ref=part)
    mean = torch.cat([reward, reward[:2]]).mean()
    torch.testing.assert_close(
        second, bco_loss(hidden[:2], weight, target[:2], label[:2], ref=part, beta=0.5, delta=float(mean))
    )
    loss.eval()
    loss(hidden, weight, target, label, ref=ref)  # only reads it
    loss.bfloat16()
    state = loss.state_dict()
    assert [x.dtype for x in state.values()] == [torch.float64] * 2
    assert int(loss.options["delta"].count) == 8
    loss.train()
    other = FusedLoss("bco", delta=RunningMean(), beta=0.5)
    other.load_state_dict(state)
    torch.testing.assert_close(
        other(hidden, weight, target, label, ref=ref), loss(hidden, weight, target, label, ref=ref)
    )


def test_estimates_have_no_gradient_and_leave_out_empty_responses():
    hidden, weight, target, ref = batch(6)
    target[2] = -100
    ref = TokenScores(*(torch.where(target == -100, 0.0, x) for x in ref[:3]))
    label = torch.tensor([1, -1, 1, -1, 1, 1])
    delta = (linear_logprob(hidden, weight, target).logp - ref.logp).sum(1).detach()
    there = torch.tensor([0, 1, 3, 4, 5])
    for loss, options in (
        (bco_loss, {"delta": float(0.1 * delta[there].mean())}),
        (kto_loss, {"z0": max(0.0, float(delta[there].mean()))}),
    ):
        estimated = loss(hidden, weight, target, label, ref=ref)
        fixed = loss(hidden, weight, target, label, ref=ref, **options)
        torch.testing.assert_close(estimated, fixed, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad(estimated, (hidden, weight)), torch.autograd.grad(fixed, (hidden, weight))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_kto_with_mismatched_completions_and_weights():
    hidden, weight, target, ref = batch(6)
    label = torch.tensor([1, -1, 1, -1, 1, 1])
    delta = (linear_logprob(hidden, weight, target).logp - ref.logp).sum(1).detach()
    for mismatched, z0 in ((torch.tensor([[0.5, 1.5]]), 1.0), (torch.tensor([-2.0]), 0.0)):
        made = kto_loss(
            hidden, weight, target, label, ref=ref, z0=mismatched, desirable_weight=2.0, undesirable_weight=0.5,
            reduction="none",
        )  # fmt: skip
        expected = torch.where(label > 0, 2.0, 0.5) * (1 - torch.sigmoid(label * 0.1 * (delta - z0)))
        torch.testing.assert_close(made, expected)


# -- one from outside the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [1 << 29, 6000])
def test_an_objective_is_one_function_and_one_line(workspace):
    """A group objective that the package doesn't have: value and gradients on its own path, in sums, with metrics."""

    @objective(couples="group", ref="sums", rewards=True)
    def pessimist_of_this_test(seen, *, beta=0.1):
        """The margin of the worst response over the mean, as a hinge. [G]"""
        scores = beta * seen.groups(seen.log_ratios())
        worst = scores.gather(1, seen.groups(seen.rewards).argmin(1, keepdim=True))[:, 0]
        return (1 + worst - scores.mean(1)).clamp(min=0)

    try:
        hidden, weight, target, ref = batch(6)
        rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.7]])
        given = {"ref": ref, "rewards": rewards, "workspace": workspace}
        loss, metrics = fused_loss(
            hidden, weight, target, objective="pessimist_of_this_test", return_metrics=True, beta=0.2, **given
        )
        z = reference.logits(hidden, weight)
        logp = z.log_softmax(-1).gather(-1, target[..., None])[..., 0].sum(1)
        scores = 0.2 * (logp - ref.logp.sum(1)).view(2, 3)
        dense = (1 + torch.stack([scores[0, 0], scores[1, 1]]) - scores.mean(1)).clamp(min=0).mean()
        torch.testing.assert_close(loss, dense)
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert "rewards/margins" in metrics
        both = fused_loss(hidden, weight, target, objective="mle + 2*pessimist_of_this_test", beta=0.2, **given)
        mle = mle_loss(hidden[[1, 5]], weight, target[[1, 5]])
        torch.testing.assert_close(both, mle + 2 * dense)
        # it may be something to be raised
        both = fused_loss(hidden, weight, target, objective="mle - 2*pessimist_of_this_test", beta=0.2, **given)
        torch.testing.assert_close(both, mle - 2 * dense)
    finally:
        del OBJECTIVES["pessimist_of_this_test"]


@pytest.mark.parametrize("path", ["single", "two_pass"])
def test_a_call_leaves_no_tensor_behind(path):
    """Also where the objective computes what no gradient comes to, as the scores that `mc_po` draws by."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    def call() -> None:
        hidden, weight = torch.randn(8, 5, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
        target = torch.randint(30, (8, 5))
        mc_po_loss(hidden, weight, target, ref=torch.zeros(8), group_size=4, m=3, path=path).backward()

    call()
    before = alive()
    call()
    assert alive() <= before
