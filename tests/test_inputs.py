"""Bad input: a ValueError that names the argument, what was expected and what came, before any work."""

from __future__ import annotations

import math
import re

import pytest
import torch

from rgpb import OBJECTIVES, FusedLoss, LMHead, TokenScores, fused_loss, linear_logprob, objective, pairs
from rgpb.fused import bnf_loss, dpo_loss, mle_loss, swepo_loss

B, T, V, H = 4, 3, 7, 5


def good():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    target = torch.randint(V, (B, T))
    scores = linear_logprob(hidden.detach(), weight.detach() * 0.5, target)
    return {"hidden": hidden, "head": weight, "target": target, "ref": scores, "label": torch.tensor([1, 1, -1, -1])}


def label_of(values):
    return {"label": torch.tensor(values)}


def nan_hidden():
    hidden = torch.randn(B, T, H)
    hidden[1, 2, 3] = torch.nan
    return {"hidden": hidden}


def other_mask():
    given = good()
    target = given["target"].clone()
    target[1, 1] = -100
    return {**given, "ref": linear_logprob(given["hidden"].detach(), given["head"].detach(), target)}


CASES = {
    "hidden size": (
        lambda: {"hidden": torch.randn(B, T, H + 1)},
        r"hidden: expected shape \[\.\.\., H=5\].*got \[4, 3, 6\]",
    ),
    "hidden dtype": (
        lambda: {"hidden": torch.ones(B, T, H, dtype=torch.int64)},
        "hidden: expected dtype float64, float32",
    ),
    "weight rank": (lambda: {"head": torch.randn(H)}, r"head\.weight: expected shape \[V, H\].*got \[5\]"),
    "empty vocabulary": (lambda: {"head": torch.randn(0, H)}, r"head\.weight: expected .*got \[0, 5\]"),
    "weight dtype": (
        lambda: {"head": torch.randn(V, H, dtype=torch.float64)},
        r"head\.weight: expected the dtype of hidden, torch\.float32 .* got torch\.float64",
    ),
    "weight device": (
        lambda: {"head": torch.randn(V, H, device="meta")},
        r"head\.weight: expected device cpu as hidden, got meta",
    ),
    "bias": (
        lambda: {"head": LMHead(torch.randn(V, H), torch.randn(V + 1))},
        r"head\.bias: expected shape \[V=7\] and dtype torch.float32, got \[8\]",
    ),
    "softcap": (
        lambda: {"head": LMHead(torch.randn(V, H), softcap=0.0)},
        r"head\.softcap: expected a positive number \(1e-30 to 1e30\) or None, got 0\.0",
    ),
    "target shape": (
        lambda: {"target": torch.zeros(B, T + 1, dtype=torch.int64)},
        r"target: expected shape \[4, 3\].*got \[4, 4\]",
    ),
    "target dtype": (
        lambda: {"target": torch.zeros(B, T, dtype=torch.int32)},
        r"target: expected dtype int64, got torch\.int32",
    ),
    "target too large": (
        lambda: {"target": torch.tensor([[0, 1, V], *[[0] * T] * (B - 1)])},
        r"target: expected values in \[0, 7\) or ignore_index=-100, got 7 at flat position 2",
    ),
    "target negative": (
        lambda: {"target": torch.full((B, T), -1)},
        r"target: expected values in \[0, 7\).*got -1 at flat position 0",
    ),
    "NaN hidden": (nan_hidden, r"hidden: expected finite values, got NaN or infinity at flat position 5"),
    "label missing": (lambda: {"label": None}, r"label: expected \[B=4\] bool or ±1 for bnf, got None"),
    "label shape": (lambda: label_of([1, -1]), r"label: expected shape \[B=4\], got \[2\]"),
    "label values": (lambda: label_of([1, 0, 1, 0]), r"label: expected bool or values of ±1, got \[0, 0\]"),
    "label strange": (
        lambda: label_of([1.0, float("nan"), 1.0, 1.0]),
        r"label: expected bool or values of ±1, got \[nan\]",
    ),
    "ref missing": (lambda: {"ref": None}, "ref: expected the reference's scores for bnf, got None"),
    "ref sums": (
        lambda: {"ref": torch.randn(B)},
        r"ref: expected scores per token, \[4, 3\], for bnf, got one sum per response, \[4\]",
    ),
    "ref shape": (lambda: {"ref": torch.randn(B, T + 1)}, r"ref: expected a floating-point tensor of shape \[4, 3\]"),
    "ref type": (lambda: {"ref": "model"}, "ref: expected TokenScores, a tensor.* got str"),
    "ref head": (
        lambda: {"ref": (torch.randn(B, T, H), torch.randn(V, H + 1))},
        r"hidden: expected shape \[\.\.\., H=6\]",
    ),
    "target list": (lambda: {"target": [[0] * T] * B}, "target: expected a tensor, got list"),
    "label device": (
        lambda: {"label": torch.ones(B, dtype=torch.bool, device="meta")},
        "label: expected device cpu as hidden, got meta",
    ),
    "label list": (lambda: {"label": [1, 1, -1, -1]}, "label: expected a tensor, got list"),
    "head module": (
        lambda: {"head": torch.nn.Linear(H, V)},
        r"head: expected a weight \[V, H\] or an LMHead, got Linear",
    ),
    "validate": (lambda: {"validate": 0}, "validate: expected True or False, got 0"),
    "validate and a tolerance": (
        lambda: {"validate": False, "grad_tolerance": 0.1},
        "grad_tolerance: expected None with validate=False, .* got 0.1",
    ),
    "workspace text": (
        lambda: {"workspace": "64 parsecs"},
        r"workspace: expected bytes, as 2\*\*29 or '512MiB', a Workspace or 'auto', got '64 parsecs'",
    ),
    "softcap infinite": (
        lambda: {"head": LMHead(torch.randn(V, H), softcap=float("inf"))},
        r"head\.softcap: expected a positive number \(1e-30 to 1e30\) or None, got inf",
    ),
    "scale": (
        lambda: {"head": LMHead(torch.randn(V, H), scale=float("nan"))},
        r"head\.scale: expected a finite number, got nan",
    ),
    "temperature": (lambda: {"temperature": 0.0}, r"temperature: expected a positive finite number, got 0\.0"),
    "temperature infinite": (
        lambda: {"temperature": math.inf},
        "temperature: expected a positive finite number, got inf",
    ),
    "temperature text": (lambda: {"temperature": "1"}, "temperature: expected a positive finite number, got '1'"),
    "temperature tiny": (
        lambda: {"temperature": 1e-29, "head": LMHead(torch.randn(V, H), softcap=30.0)},
        r"temperature: expected one that leaves the head's scale .*, got 1e-29 with scale=1\.0 and softcap=30\.0",
    ),
    "ref NaN": (lambda: {"ref": torch.full((B, T), torch.nan)}, "ref: expected a log-probability, at most 0.* got nan"),
    "ref NLL": (lambda: {"ref": torch.full((B, T), 2.0)}, "ref: expected a log-probability, at most 0.* got 2"),
    "ref of another mask": (other_mask, r"ref\.logp: expected a log-probability, .* at flat position 4"),
    "reduction": (lambda: {"reduction": "avg"}, r"reduction: expected one of \('mean', 'sum', 'none'\), got 'avg'"),
    "impl": (lambda: {"impl": "cuda"}, "impl: expected one of .* got 'cuda'"),
    "workspace": (lambda: {"workspace": 10}, "workspace: expected at least .* got 10"),
    "workspace sign": (lambda: {"workspace": -1}, "workspace: expected a positive whole number of bytes, got -1"),
    "option": (lambda: {"beta": 0.1}, r"options of bnf: expected a subset of \[\], got \['beta'\]"),
    "flat without cu_seqlens": (
        lambda: {"hidden": torch.randn(T, H), "target": torch.zeros(T, dtype=torch.int64)},
        r"target: expected shape \[B, T\], or \[N\] with cu_seqlens, got \[3\]",
    ),
    "padded with cu_seqlens": (
        lambda: {"cu_seqlens": torch.tensor([0, 3])},
        r"target: expected packed shape \[N\] together with cu_seqlens, got \[4, 3\]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bnf_refuses(case):
    change, message = CASES[case]
    arguments = {**good(), **change()}
    with pytest.raises(ValueError, match=message):
        bnf_loss(
            arguments.pop("hidden"), arguments.pop("head"), arguments.pop("target"), arguments.pop("label"), **arguments
        )


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 1, 6], "cu_seqlens: expected not decreasing from 0 to N=6"),
        ([0, 2, 5], "cu_seqlens: expected not decreasing from 0 to N=6"),
        ([1, 2, 6], "cu_seqlens: expected not decreasing from 0 to N=6"),
        ([0], r"cu_seqlens: expected int32 or int64 of shape \[B\+1\]"),
        ([0.0, 6.0], r"cu_seqlens: expected int32 or int64 of shape \[B\+1\], got torch.float32"),
    ],
)
def test_packed_offsets(offsets, message):
    hidden, target = torch.randn(6, H), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        mle_loss(hidden, torch.randn(V, H), target, cu_seqlens=torch.tensor(offsets))


def test_pairs_need_an_even_number_of_responses():
    given = good()
    with pytest.raises(ValueError, match=r"target: expected an even number of responses.* for dpo, got 3"):
        dpo_loss(given["hidden"][:3], given["head"], given["target"][:3], ref=torch.zeros(3, T))


def test_surplus_arguments():
    given = good()
    tensors = given["hidden"], given["head"], given["target"]
    with pytest.raises(ValueError, match="ref: expected None, since mle has no reference"):
        mle_loss(*tensors, ref=given["ref"])
    with pytest.raises(ValueError, match="label: expected None, since dpo has no use for it"):
        dpo_loss(*tensors, ref=given["ref"], label=given["label"])
    with pytest.raises(TypeError, match="mle_loss\\(\\) takes 3 positional arguments but 4 were given"):
        mle_loss(*tensors, given["label"])


def test_masked_rows_may_hold_anything():
    given = good()
    hidden, target = given["hidden"].detach().clone(), given["target"].clone()
    target[1, 2] = -100
    clean = mle_loss(hidden, given["head"], target)
    hidden[1, 2] = torch.nan
    assert mle_loss(hidden, given["head"], target) == clean
    weight = given["head"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(mle_loss(hidden, weight, target), weight)
    assert torch.isfinite(gradient).all()


def test_unknown_objective_and_registration():
    with pytest.raises(ValueError, match=r"objective: expected a function or one of \['apo_down', .* got 'nope'"):
        FusedLoss("nope")
    with pytest.raises(ValueError, match="couples: expected one of .* got 'prompt'"):
        objective(couples="prompt")
    with pytest.raises(ValueError, match="unit: expected 'group' with rewards or draw, got 'pair'"):
        objective(couples="pair", rewards=True)
    with pytest.raises(ValueError, match="name: expected an identifier, got 'my-loss'"):
        objective("my-loss")(lambda responses: responses.logps())
    with pytest.raises(ValueError, match="name: expected a name that isn't taken, got 'dpo'"):
        objective("dpo")(lambda responses: responses.logps())
    with pytest.raises(ValueError, match="unit: expected 'pair' with couples='pair', got 'response'"):
        objective(couples="pair", unit="response")
    with pytest.raises(ValueError, match="ref: expected 'tokens' or None with couples='token'"):
        objective(couples="token", ref="sums")
    with pytest.raises(ValueError, match=r"options: expected names that `fused_loss` doesn't have, got \['ref'\]"):

        @objective
        def mine(responses, *, ref=1.0):
            return responses.logps()


def test_registering_again_replaces():
    given = good()
    try:
        for factor in (1.0, 2.0):

            @objective
            def of_this_test(responses, *, factor=factor):
                return -factor * responses.logps()

        twice = fused_loss(given["hidden"], given["head"], given["target"], objective="of_this_test")
        once = mle_loss(given["hidden"], given["head"], given["target"], length_normalize=False)
        torch.testing.assert_close(twice, 2 * once)
        total = fused_loss(given["hidden"], given["head"], given["target"], objective="of_this_test + 0.5*mle")
        again = objective("of_this_test")(lambda responses: responses.logps())
        assert again is not None
        changed = fused_loss(given["hidden"], given["head"], given["target"], objective="of_this_test + 0.5*mle")
        torch.testing.assert_close(total - changed, twice + once, rtol=1e-5, atol=1e-5)
    finally:
        del OBJECTIVES["of_this_test"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: r.logps().sum(),
        lambda r: r.logps()[:3],
        lambda r: r.logps()[:, None],
        lambda r: r.policy.logp,
        lambda r: None,
    ],
)
def test_an_objective_returns_one_value_per_response_or_pair(wrong):
    given = good()
    with pytest.raises(ValueError, match=r"objective: expected <lambda> to return \(4,\) or \(2,\) values, got"):
        fused_loss(given["hidden"], given["head"], given["target"], objective=wrong, reduction="none")


def test_an_own_function_with_a_taken_name():
    given = good()

    def mle(responses):
        return -responses.log_ratios()

    loss = fused_loss(given["hidden"], given["head"], given["target"], objective=mle, ref=given["ref"])
    own = linear_logprob(given["hidden"], given["head"], given["target"]).logp - given["ref"].logp
    torch.testing.assert_close(loss, -own.sum(1).mean())


def test_strange_options_and_strides():
    import numpy

    given = good()
    hidden, head, target, ref = (given[k] for k in ("hidden", "head", "target", "ref"))
    plain = dpo_loss(hidden, head, target, ref=ref, beta=0.25)
    assert dpo_loss(hidden, head, target, ref=ref, beta=numpy.float64(0.25)) == plain
    strided = target.t().contiguous().t()
    assert dpo_loss(hidden, head, strided, ref=ref, beta=0.25) == plain


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_responses(reduction):
    given = good()
    loss = dpo_loss(given["hidden"][:0], given["head"], given["target"][:0], ref=torch.zeros(0, T), reduction=reduction)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), given["head"])[0].any()


def test_the_ways_to_give_a_reference_agree():
    given = good()
    hidden, head, target, scores, label = (given[k] for k in ("hidden", "head", "target", "ref", "label"))
    pair = (hidden.detach(), head.detach() * 0.5)
    for other in (scores.logp, pair):
        torch.testing.assert_close(
            bnf_loss(hidden, head, target, label, ref=other), bnf_loss(hidden, head, target, label, ref=scores)
        )
    for other in (scores.logp, scores.logp.sum(1), pair):
        torch.testing.assert_close(
            dpo_loss(hidden, head, target, ref=other), dpo_loss(hidden, head, target, ref=scores)
        )
    as_bool = bnf_loss(hidden, head, target, label > 0, ref=scores)
    assert as_bool == bnf_loss(hidden, head, target, label, ref=scores)


def test_own_objectives_from_outside():
    """A bare function, and a registered one: same value; the registered one is allowed the single pass."""
    from rgpb.objectives import resolve
    from rgpb.validation import How, plan_call

    def hinge(responses, *, delta=1.0):
        chosen, rejected = pairs(responses.logps(length_normalize=True))
        return (delta - chosen + rejected).clamp(min=0)

    given = good()
    hidden, head, target = given["hidden"], given["head"], given["target"]
    bare = fused_loss(hidden, head, target, objective=hinge, delta=2.0)
    assert plan_call(hidden, LMHead(head), How(), spec=resolve(hinge))[0].path == "two_pass"
    objective("hinge_of_this_test", couples="pair")(hinge)
    try:
        named = fused_loss(hidden, head, target, objective="hinge_of_this_test", delta=2.0)
        assert plan_call(hidden, LMHead(head), How(), spec=resolve(hinge))[0].path == "single"
        torch.testing.assert_close(named, bare)
        for a, b in zip(*(torch.autograd.grad(x, [hidden, head]) for x in (named, bare))):
            torch.testing.assert_close(a, b)
    finally:
        del OBJECTIVES["hinge_of_this_test"]


def test_module_and_metrics():
    given = good()
    hidden, head, target, scores = (given[k] for k in ("hidden", "head", "target", "ref"))
    module = FusedLoss("dpo", beta=0.3, return_metrics=True)
    loss, metrics = module(hidden, head, target, ref=scores)
    assert loss == dpo_loss(hidden, head, target, ref=scores, beta=0.3)
    assert repr(module) == "FusedLoss('dpo', beta=0.3, return_metrics=True)"
    logps = linear_logprob(hidden, head, target).logp.detach().double().sum(1)
    delta = 0.3 * (logps - scores.logp.double().sum(1))
    expected = {
        "logps/chosen": logps[:2].mean(),
        "logps/rejected": logps[2:].mean(),
        "rewards/chosen": delta[:2].mean(),
        "rewards/rejected": delta[2:].mean(),
        "rewards/margins": (delta[:2] - delta[2:]).mean(),
        "rewards/accuracies": (delta[:2] > delta[2:]).double().mean(),
        "perplexity": (-logps[:2] / T).exp().mean(),
        "agility": ((logps[:2] / T).exp() - (logps[2:] / T).exp()).mean(),
        "agility/chosen": (logps[:2] / T).exp().mean(),
        "agility/rejected": (logps[2:] / T).exp().mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.float(), msg=name)
        assert not metrics[name].requires_grad


def test_ties_count_half():
    """In pairs and groups; also what differs by rounding alone."""
    given = good()
    hidden, head, target = (given[k] for k in ("hidden", "head", "target"))
    own = linear_logprob(hidden, head, target).logp.detach()
    lower = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]  # Δ is 0, +, 0, 0: a tie, and a pair that is ranked rightly
    for nudge in (0.0, 1e-8):
        ref = own - lower - nudge * torch.arange(4)[:, None]
        assert dpo_loss(hidden, head, target, ref=ref, return_metrics=True)[1]["rewards/accuracies"] == 0.75
        rewards = torch.tensor([[1.0, 0.0, 0.5, 0.2]])
        _, groups = swepo_loss(hidden, head, target, ref=ref, rewards=rewards, return_metrics=True)
        assert groups["rewards/accuracies"] == pytest.approx(1 / 3)  # the best is below one, and as good as two


def test_token_scores_without_entropy():
    given = good()
    scores = linear_logprob(given["hidden"], given["head"], given["target"])
    assert isinstance(scores, TokenScores)
    assert scores.entropy is None
    assert scores.other_entropy is None


def test_documented_signatures_show_what_is_needed():
    import inspect

    assert list(inspect.signature(bnf_loss).parameters)[:5] == ["hidden", "head", "target", "label", "ref"]
    assert inspect.signature(dpo_loss).parameters["beta"].default == 0.1
    assert "ref" not in inspect.signature(mle_loss).parameters
    assert re.search(r"Eq\. 4 and 6", bnf_loss.__doc__ or "")


def test_options_that_are_equal_but_not_the_same():
    """True is 1 and −0.0 is 0.0 to a dictionary; a call tells them apart."""

    @objective("told_apart", couples="pair")
    def told_apart(responses, *, mode=None, x=0.0):
        chosen, rejected = pairs(responses.logps())
        return (rejected - chosen) * (10 if mode is True else 1) * math.copysign(1.0, x)

    given = good()
    try:
        for first, second in (({"mode": 1}, {"mode": True}), ({"x": 0.0}, {"x": -0.0})):
            for options in (first, second):
                one, two = (
                    fused_loss(given["hidden"], given["head"], given["target"], objective=kind, path=path, **options)
                    for kind, path in (("told_apart", "single"), (told_apart, "two_pass"))
                )
                torch.testing.assert_close(one, two)
    finally:
        del OBJECTIVES["told_apart"]


def test_numbers_of_other_kinds():
    """numpy's are taken for what they are; what is no number is refused by name."""
    import numpy

    given = good()
    hidden, weight, target = given["hidden"], given["head"], given["target"]
    plain = mle_loss(hidden, LMHead(weight, None, 30.0, 0.5), target)
    head = LMHead(weight, None, numpy.float32(30.0), numpy.float64(0.5))
    assert mle_loss(hidden, head, target, ignore_index=numpy.int64(-100)) == plain
    for wrong in ("30", True):
        with pytest.raises(ValueError, match=r"head\.softcap: expected a positive number"):
            mle_loss(hidden, LMHead(weight, softcap=wrong), target)
    with pytest.raises(ValueError, match="ignore_index: expected a whole number, got 'a'"):
        mle_loss(hidden, weight, target, ignore_index="a")


def test_the_old_engine_argument():
    """The same result, and a warning that points at the caller; what contradicts `impl` is refused."""
    given = good()
    tensors = given["hidden"], given["head"], given["target"]
    for loss in (mle_loss, linear_logprob):
        with pytest.warns(DeprecationWarning, match="engine='chunked' is deprecated") as warned:
            made = loss(*tensors, engine="chunked")
        assert warned[0].filename == __file__
        torch.testing.assert_close(made, loss(*tensors))
    with pytest.raises(ValueError, match="engine: expected 'chunked' with impl='torch'"):
        mle_loss(*tensors, impl="torch", engine="tiled")
    with pytest.raises(ValueError, match="path: expected 'auto' or 'single'"):
        mle_loss(*tensors, path="frozen")
    with pytest.raises(ValueError, match="options of dpo: expected .*did you mean 'beta'"):
        FusedLoss("dpo", bta=0.1)


def dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


torchs_own = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "dual tensors": dual,
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
}


@torchs_own
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("name", ["hidden", "head.weight", "head.bias"])
def test_forward_mode_and_transforms_are_refused(how, name):
    """The first would give a derivative of 0 without a word; `torch.func` would speak of setup_context."""
    hidden, weight, bias, target = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V), torch.randint(V, (B, T))

    def scores(x):
        given = {"hidden": hidden, "head.weight": weight, "head.bias": bias, name: x}
        return linear_logprob(given["hidden"], LMHead(given["head.weight"], given["head.bias"]), target).logp.sum()

    with pytest.raises(ValueError, match=f"{name}: expected a tensor without tangent, .* or rgpb.reference"):
        TRANSFORMS[how](scores, {"hidden": hidden, "head.weight": weight, "head.bias": bias}[name])


@pytest.mark.parametrize("name", ["target", "ref", "label", "rewards"])
def test_other_tensors_inside_transforms_are_refused(name):
    hidden, weight, target = torch.randn(B, T, H), torch.randn(V, H), torch.randint(V, (B, T))
    given = {"ref": -torch.rand(B, T), "label": torch.tensor([1, 1, -1, -1]), "rewards": torch.randn(2, 2)}
    takes = {"target": "mle", "ref": "dpo", "label": "bnf", "rewards": "swepo"}[name]
    keywords = {key: given[key] for key in {"bnf": ("ref", "label"), "swepo": ("ref", "rewards")}.get(takes, ())}

    def loss(x):
        y, more = (x, {}) if name == "target" else (target, {name: x})
        return fused_loss(hidden, weight, y, objective=takes, **{**keywords, **more})

    x = target if name == "target" else given[name]
    with pytest.raises(ValueError, match=f"{name}: expected a tensor without tangent, .* or rgpb.reference"):
        torch.func.vmap(loss)(torch.stack([x, x]))


@torchs_own
def test_beside_forward_mode():
    """What has no tangent is served there."""
    hidden, weight, target = torch.randn(B, T, H), torch.randn(V, H), torch.randint(V, (B, T))
    wanted = linear_logprob(hidden, weight, target).logp.sum()
    value, slope = torch.func.jvp(
        lambda x: x * linear_logprob(hidden, weight, target).logp.sum(), (torch.tensor(2.0),), (torch.tensor(1.0),)
    )
    torch.testing.assert_close((value, slope), (2 * wanted, wanted))
    with pytest.raises(ValueError, match="hidden: expected a tensor without tangent"):
        dual(lambda x: dpo_loss(x, weight, target, ref=torch.zeros(B)), hidden)
