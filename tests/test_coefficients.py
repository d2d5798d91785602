"""`coefficients`: weights with which a plain weighted cross-entropy has the gradient of every objective."""

from __future__ import annotations

import pytest
import torch
from engine_suite import NAMES, arguments, batch, ref_scores

from rgpb import OBJECTIVES, TokenScores, coefficients, fused_loss, linear_logprob, objective, reference

SHAPE = (6, 5, 29, 7)


def cross_entropy_gradients(weights, hidden, head, target):
    """Those of Σ w · (−log p) on dense logits."""
    logits = reference.logits(hidden, head).flatten(0, -2)
    losses = torch.nn.functional.cross_entropy(logits, target.flatten(), ignore_index=-100, reduction="none")
    return torch.autograd.grad((weights.detach().flatten() * losses).sum(), [hidden, head.weight])


def scored(name, hidden, head, target, **keywords):
    return linear_logprob(hidden, head, target, entropy=OBJECTIVES[name].entropy, **keywords)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_weighted_cross_entropy_has_the_objectives_gradient(name, reduction):
    hidden, head, target, ref_logits = batch(SHAPE)
    target[2] = -100  # a response without tokens
    ours, _ = arguments(name, ref_logits, target)
    loss = fused_loss(hidden, head, target, objective=name, reduction=reduction, **ours)
    wanted = torch.autograd.grad(loss.sum(), [hidden, head.weight])
    scores = scored(name, hidden, head, target)
    value, weights = coefficients(name, scores, target=target, reduction=reduction, **ours)
    torch.testing.assert_close(value, loss.detach())
    assert weights.shape == target.shape
    assert not weights.requires_grad
    assert not weights[target == -100].any()
    torch.testing.assert_close(cross_entropy_gradients(weights, hidden, head, target), wanted)
    if not OBJECTIVES[name].entropy:  # from log-probabilities alone the same, also in the shape of a packed batch
        flat = {n: x.flatten(0, 1) if n == "ref_logits" else x for n, x in ours.items()}
        if "ref" in ours:
            flat["ref"] = ours["ref"].flat()
        ends = torch.arange(SHAPE[0] + 1) * SHAPE[1]
        packed = coefficients(
            name, scores.logp.flatten(), target=target.flatten(), cu_seqlens=ends, reduction=reduction, **flat
        )
        torch.testing.assert_close(packed[0], value)
        torch.testing.assert_close(packed[1].view(target.shape), weights)


def test_documented_weights():
    """Of a sum and of DPO, by hand."""
    logp = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    ref = torch.tensor([-2.5, -3.0])
    loss, weights = coefficients("mle + 0.5*dpo", logp, ref=ref, **{"dpo.beta": 0.1})
    margin = torch.tensor(0.1 * (-0.5 + 0.5))
    pull = 0.5 * 0.1 * torch.sigmoid(-margin)
    torch.testing.assert_close(loss, 1.5 - 0.5 * torch.nn.functional.logsigmoid(margin))
    torch.testing.assert_close(weights, torch.stack([0.5 + pull.expand(2), -pull.expand(2)]))
    loss, weights, measured = coefficients("dpo", logp, ref=ref, return_metrics=True)
    assert measured["rewards/margins"] == 0
    assert loss.dtype == weights.dtype == torch.float32


def test_bnf_without_the_others_entropy():
    """Whole weights; of the loss what doesn't need it."""
    hidden, head, target, ref_logits = batch(SHAPE)
    ref, label = ref_scores(ref_logits, target), torch.tensor([1, -1, 1, 1, -1, 1])
    scores = scored("bnf", hidden, head, target)
    loss, weights = coefficients("bnf", scores, target=target, label=label, ref=ref)
    bare = scores._replace(other_entropy=None)
    part, same = coefficients("bnf", bare, target=target, label=label, ref=ref)
    from_logp, near = coefficients("bnf", scores.logp, target=target, label=label, ref=ref)
    torch.testing.assert_close(same, weights, rtol=0, atol=0)
    torch.testing.assert_close(near, weights)
    torch.testing.assert_close(from_logp, part)
    f = (scores.logp - ref.logp).clamp(max=0).exp()
    rest = torch.where(target == -100, 0.0, (1 - f) * scores.other_entropy).sum(1) / (target != -100).sum(1)
    torch.testing.assert_close(loss - part, (label * rest).mean().detach())
    summed = coefficients("bnf + 0.5*mle", bare, target=target, label=label, ref=ref)
    assert all(x.isfinite().all() for x in summed)


@pytest.mark.parametrize("margin", [12.0, 40.0, 300.0])
@pytest.mark.parametrize("name", NAMES)
def test_confident_tokens(name, margin):
    """Finite in float32; where float32 knows 1 − p, also right."""
    generator = torch.Generator().manual_seed(0)
    log_odds = margin + torch.rand(6, 4, generator=generator, dtype=torch.float64)
    exact = TokenScores(torch.nn.functional.logsigmoid(log_odds), log_odds, torch.ones_like(log_odds))
    exact = exact._replace(other_entropy=torch.ones_like(log_odds))
    target = torch.zeros(6, 4, dtype=torch.int64)
    target[1, 2] = -100
    ours, _ = arguments(name, torch.randn(6, 4, 9, generator=generator, dtype=torch.float64), target)
    single = TokenScores(*(None if x is None else x.float() for x in exact))
    for scores in (exact, single, single.logp):
        loss, weights = coefficients(name, scores, target=target, **ours)
        assert weights.isfinite().all()
        assert not loss.isnan()
        assert weights[1, 2] == 0
    if margin < 80:
        wanted, made = (coefficients(name, scores, target=target, **ours)[1] for scores in (exact, single))
        torch.testing.assert_close(made.double(), wanted, rtol=2e-4, atol=1e-6)


def test_in_inference_mode():
    """Where scores are usually made."""
    hidden, head, target, _ = batch(SHAPE)
    with torch.inference_mode():
        scores, ref = (linear_logprob(hidden * x, head, target, entropy=True) for x in (1.0, 0.9))
        label = torch.arange(6) % 2 == 0
        inside = coefficients("bnf", scores, target=target, label=label, ref=ref)
    outside = coefficients("bnf", scores, target=target, label=label, ref=ref)
    with torch.no_grad():
        torch.testing.assert_close(coefficients("bnf", scores, target=target, label=label, ref=ref), outside)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("packed", [False, True])
def test_no_response_and_no_token(packed):
    shape, more = ((4,), {"cu_seqlens": torch.tensor([0, 1, 4])}) if packed else ((2, 2), {})
    loss, weights = coefficients("simpo", torch.zeros(shape), target=torch.full(shape, -100), **more)
    assert loss == 0
    assert not weights.any()
    if not packed:
        loss, weights = coefficients("mle", torch.zeros(0, 3), reduction="none")
        assert loss.shape == (0,)
        assert weights.shape == (0, 3)


def test_what_is_drawn_has_the_weights():
    logp, ref = -torch.rand(6, 4) - 0.5, torch.full((6,), -4.0)
    generator = torch.Generator().manual_seed(3)
    _, weights = coefficients("mc_po", logp, ref=ref, group_size=3, m=1, generator=generator)
    assert (weights.view(2, 3, 4) != 0).all(2).sum(1).tolist() == [2, 2]
    assert (weights.view(2, 3, 4)[:, 0] > 0).all()


LOGP = torch.full((4, 3), -1.0)


@pytest.fixture
def own():
    @objective(couples="token", entropy_grad=True)
    def certain_of_this_test(responses):
        return responses.mean(responses.policy.other_entropy)

    @objective(couples="token", entropy=True)
    def watching_of_this_test(responses):
        return -responses.mean(responses.policy.logp * responses.policy.other_entropy.detach())

    yield
    del OBJECTIVES["certain_of_this_test"], OBJECTIVES["watching_of_this_test"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("certain_of_this_test", {}, "objective: expected one .* certain_of_this_test, which also moves the entropy"),
        ("watching_of_this_test", {}, "scores: expected other_entropy for watching_of_this_test, got None; score with"),
        (lambda r: r.mean(r.policy.lse), {}, "objective: expected one .* which also moves the logsumexp"),
        ("mle", {"scores": [1.0]}, "scores: expected TokenScores or a tensor of log-probabilities, got list"),
        ("mle", {"scores": LOGP + 2}, "scores: expected a log-probability, at most 0, .* got 1 at flat position 0"),
        ("mle", {"scores": TokenScores(*[LOGP * 0] * 3)}, "scores.logp: expected a log-probability, .* got nan"),
        ("mle", {"scores": LOGP[0]}, r"target: expected shape \[B, T\], or \[N\] with cu_seqlens, got \[3\]"),
        ("mle", {"target": LOGP < 0}, r"target: expected dtype int64 \(of a mask, torch.where\(mask, 0, -100\)\), got"),
        ("mle", {"target": LOGP[:2].long()}, r"scores: expected a floating-point tensor of shape \[2, 3\]"),
        ("mle", {"label": torch.ones(4)}, "label: expected None, since mle has no use for it"),
        ("dpo", {}, "ref: expected the reference's scores for dpo, got None"),
        ("dpo", {"ref": (LOGP, LOGP)}, "ref: expected TokenScores, a tensor of log-probabilities, got tuple"),
        ("bnf", {"ref": LOGP}, r"label: expected \[B=4\] bool or ±1 for bnf, got None"),
        ("simpo", {"scores": LOGP[:3]}, "target: expected an even number of responses"),
        ("simpo", {"beta": -1}, "options of simpo: expected beta to be a number above 0"),
        ("simpo", {"reduction": "total"}, "reduction: expected one of"),
        ("swepo", {"ref": LOGP}, r"rewards: expected \[G, K\] numbers for swepo, got None"),
    ],
)  # fmt: skip
def test_refusals(own, name, given, message):
    scores = given.pop("scores", LOGP)
    with pytest.raises(ValueError, match=message):
        coefficients(name, scores, **given)
