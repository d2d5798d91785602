"""Certified skipping: the bound holds on every row, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from covering import covering

from rgpb import LMHead, fused_loss, linear_logprob, objective, reference
from rgpb.engine import plan
from rgpb.fused import dpo_loss, mle_loss
from rgpb.kernels import cpp_rows
from rgpb.objectives import OBJECTIVES

TILE, B, T, V, H = 16, 4, 9, 150, 12  # a last tile that isn't whole


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(plan, "MASS_TILE", TILE)


@pytest.fixture
def peaked():
    """hidden, head, target: each row has most of its mass in a few tokens, which are spread over the vocabulary."""
    hidden = 2 * torch.randn(B, T, H, dtype=torch.float64)
    head = LMHead(torch.randn(V, H, dtype=torch.float64).requires_grad_(), torch.randn(V, dtype=torch.float64))
    head.bias.requires_grad_()
    target = torch.randint(V, (B, T))
    target[0, :3] = -100
    target[:, 4] = 149
    return hidden.requires_grad_(), head, target


def dlogits(hidden, head, target, loss):
    """∂L/∂logits [B, T, V] in float64, dense."""
    z = (hidden.detach() @ head.weight.detach().T + head.bias.detach()).requires_grad_()
    return torch.autograd.grad(loss(z.log_softmax(-1)), z)[0]


@pytest.mark.parametrize(
    ("tolerance", "sort_vocab", "workspace"),
    covering(2, tolerance=(0.0, 1e-3, 0.05, 0.5, "auto"), sort_vocab=(False, True), workspace=(1 << 29, 1 << 15)),
)
def test_the_bound_holds_on_every_row(peaked, tolerance, sort_vocab, workspace):
    hidden, head, target = peaked
    upstream = torch.rand(B, T, dtype=torch.float64)  # rows that count more and less

    def weighted(responses):
        return -(responses.policy.logp * upstream.view(-1)).view(B, T).sum(1)

    loss, metrics = fused_loss(
        hidden, head, target, objective=weighted, reduction="sum", grad_tolerance=tolerance, sort_vocab=sort_vocab,
        return_metrics=True, workspace=workspace,
    )  # fmt: skip
    assert metrics["skipped/share"].isnan()
    made = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    exact = reference.token_scores(hidden, head, target)["logp"] * upstream
    truth = torch.autograd.grad(-exact.sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(made[0], truth[0])  # whole

    bound, kept = metrics["skipped/bound"].double(), target != -100
    p = (hidden.detach() @ head.weight.detach().T + head.bias.detach()).softmax(-1)
    here = torch.nn.functional.one_hot(target.clamp(min=0), V)
    coefficient = upstream * (p * (1 - here)).sum(-1)  # g_lo = g (1 − p)
    number = torch.finfo(torch.float64).eps / 2 if tolerance == "auto" else tolerance
    assert (bound[kept] <= number * coefficient[kept].max() * (1 + 1e-6)).all()
    assert (bound[~kept] == 0).all()
    # the difference of dW is Σ_t (what row t leaves out) xᵀ, and what it leaves out has at most that L1 norm
    difference = (made[1] - truth[1]).abs().sum()
    assert difference <= (bound * hidden.detach().abs().sum(-1)).sum() + 1e-12
    assert (made[2] - truth[2]).abs().sum() <= bound.sum() + 1e-12
    if number > 1e-2:
        assert difference > 1e-9
        assert metrics["skipped/share"] > 0.1
    if tolerance == 0.0:
        assert metrics["skipped/share"] == 0
        torch.testing.assert_close(made[1], truth[1])


def test_each_rows_bound_is_what_it_leaves_out(peaked):
    """One row at a time: the L1 norm of its missing part of ∂L/∂z, read off the bias' gradient."""
    hidden, head, target = peaked
    for t in (0, 4, 8):
        one = torch.full_like(target, -100)
        one[2, t] = target[2, t]
        loss, metrics = fused_loss(
            hidden, head, one, objective=lambda r: -r.logps(), reduction="sum", grad_tolerance=0.2, return_metrics=True
        )
        (made,) = torch.autograd.grad(loss, head.bias)
        (truth,) = torch.autograd.grad(-reference.token_scores(hidden, head, one)["logp"].sum(), head.bias)
        left_out = (made - truth).abs().sum()
        bound = metrics["skipped/bound"][2, t].double()
        assert left_out <= bound
        torch.testing.assert_close(left_out, bound, rtol=2e-3, atol=1e-12)


def test_sorting_gathers_what_is_skipped():
    """A few tokens, spread over the vocabulary, have nearly all mass: sorted, all but their tiles are left out."""
    hidden = torch.randn(2, 8, H, dtype=torch.float64)
    bias = torch.full((V,), -30.0, dtype=torch.float64)
    bias[::10] = 0.0
    head = LMHead(torch.randn(V, H, dtype=torch.float64).mul_(0.1).requires_grad_(), bias)
    target = torch.randint(V // 10, (2, 8)) * 10
    shares = []
    for sort_vocab in (False, True):
        loss, metrics = mle_loss(hidden, head, target, grad_tolerance=1e-6, sort_vocab=sort_vocab, return_metrics=True)
        made = torch.autograd.grad(loss, head.weight)[0]
        truth = torch.autograd.grad(mle_loss(hidden, head, target), head.weight)[0]
        torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-6)
        shares.append(metrics["skipped/share"].item())
    assert shares[0] < 0.11  # the last tile, in which none of them lies
    assert shares[1] >= 0.8


def test_only_dw_is_touched_and_only_in_two_passes(peaked):
    hidden, head, target = peaked
    loss, metrics = mle_loss(hidden, head, target, grad_tolerance=0.5, return_metrics=True)
    assert torch.equal(loss, mle_loss(hidden, head, target, reduction="none").mean())
    frozen = LMHead(head.weight.detach(), head.bias.detach())
    loss, metrics = mle_loss(hidden, frozen, target, grad_tolerance=0.5, return_metrics=True)
    assert metrics["skipped/share"] == 0  # the head has no gradient: there is nothing to leave out
    assert not metrics["skipped/bound"].any()
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(mle_loss(hidden, frozen, target), hidden)[0]
    )
    masked = torch.full_like(target, -100)
    loss = mle_loss(hidden, head, masked, grad_tolerance=0.5, sort_vocab=True)
    assert not torch.autograd.grad(loss, head.weight)[0].any()


def test_rows_without_a_gradient_cost_nothing(peaked):
    """DPO at reduction="none": pairs whose upstream gradient is 0 are left out whole."""
    hidden, head, target = peaked
    ref = linear_logprob(hidden.detach(), head, target).logp.detach()
    values, metrics = dpo_loss(hidden, head, target, ref=ref, reduction="none", grad_tolerance=0.0, return_metrics=True)
    made = torch.autograd.grad(values[1], head.weight, retain_graph=True)[0]
    kept = target != -100
    assert metrics["skipped/share"] >= kept[0::2].sum() / kept.sum() - 1e-6
    torch.testing.assert_close(
        made, torch.autograd.grad(dpo_loss(hidden, head, target, ref=ref, reduction="none")[1], head.weight)[0]
    )


@pytest.mark.parametrize("given", [-1e-3, 1.0, float("nan"), float("inf"), "small", True, torch.tensor(0.1)])
def test_bad_tolerances(peaked, given):
    with pytest.raises(ValueError, match="grad_tolerance: expected"):
        linear_logprob(*peaked, grad_tolerance=given)


def test_requests_that_have_no_bound(peaked):
    with pytest.raises(ValueError, match="grad_tolerance: expected None where the entropy has a gradient"):
        linear_logprob(*peaked, entropy=True, grad_tolerance=1e-3)
    with pytest.raises(ValueError, match="sort_vocab: expected False without grad_tolerance"):
        linear_logprob(*peaked, sort_vocab=True)
    objective("entropy_of_this_test", couples="token", entropy_grad=True)(lambda r: r.mean(r.policy.other_entropy))
    try:
        with pytest.raises(ValueError, match="grad_tolerance"):
            fused_loss(*peaked, objective="entropy_of_this_test", grad_tolerance=1e-3)
    finally:
        del OBJECTIVES["entropy_of_this_test"]


def test_an_overflow_stays_to_be_seen(peaked):
    """One infinite coefficient makes every budget infinite; a loss scaler has to find it in dW all the same."""
    hidden, head, target = peaked
    for bad in (torch.inf, torch.nan):
        scores = linear_logprob(hidden, head, target, grad_tolerance=0.1)
        g = torch.ones_like(scores.logp)
        g[1, 1] = bad
        assert not torch.autograd.grad(scores.logp, head.weight, g)[0].isfinite().all()


def test_the_bound_allows_for_the_rounding_of_large_logits():
    """float32, three tokens near z = 1e4 in three tiles: a mass is then off by a per mille."""
    hidden, weight = torch.randn(1, 512), 0.01 * torch.randn(V, 512)
    x = hidden[0].double()
    for place, logit in ((5, 1e4), (50, 1e4 - 0.5), (100, 1e4 - 1.0)):
        weight[place] += ((logit - weight[place].double() @ x) / (x @ x) * x).float()
    weight.requires_grad_()
    bias = torch.zeros(V, requires_grad=True)
    target = torch.tensor([[5]])
    loss, metrics = mle_loss(
        hidden[None], LMHead(weight, bias), target, reduction="sum", grad_tolerance=0.9, return_metrics=True
    )
    made = torch.autograd.grad(loss, bias)[0].double()
    truth = (hidden.double() @ weight.detach().double().T).softmax(-1)[0]
    truth[5] -= 1
    left_out = truth[made == 0].abs().sum()
    assert 0.1 < left_out <= metrics["skipped/bound"].item()


@pytest.mark.parametrize("given", ["yes", None, 1])
def test_sort_vocab_is_a_boolean(peaked, given):
    with pytest.raises(ValueError, match="sort_vocab: expected True or False"):
        linear_logprob(*peaked, grad_tolerance=0.1, sort_vocab=given)


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "workspace"), [(64, 4096, 1024, 16 << 20), (128, 512, 8192, 4 << 20)]
)
@pytest.mark.parametrize("sort_vocab", [False, True])
def test_memory_stays_inside_the_workspace(tokens, width, vocab, workspace, sort_vocab):
    from rgpb.bench.measure import Result, peak_memory

    torch.use_deterministic_algorithms(False)
    hidden, weight = torch.randn(1, tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(vocab, (1, tokens))

    def run():
        loss = mle_loss(hidden, weight, target, grad_tolerance=1e-3, sort_vocab=sort_vocab, workspace=workspace)
        return Result(loss.detach(), torch.autograd.grad(loss, [hidden, weight]))

    per_token, per_entry = tokens * (64 + 40 * -(-vocab // TILE)), vocab * 40 * sort_vocab
    assert peak_memory(run, "cpu").extra <= workspace + per_token + per_entry


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("sort_vocab", [False, True])
def test_a_tile_without_any_row_and_a_second_backward(impl, sort_vocab):
    """Nothing of a tile counts: its part of dW is 0. The masses are as they were when the backward runs again."""
    if impl == "cpp" and cpp_rows.missing():
        pytest.skip(cpp_rows.missing())
    hidden = (30 * torch.randn(2, 8, H, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(V, H, dtype=torch.float64)
    weight[:64] *= 1e-3
    weight.requires_grad_()
    target = torch.randint(100, V, (2, 8))
    loss, metrics = mle_loss(
        hidden, weight, target, grad_tolerance=1e-3, sort_vocab=sort_vocab, impl=impl, return_metrics=True
    )
    first, second = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first[0], second[0])  # the second is formed again
    assert torch.equal(first[1], second[1])
    assert metrics["skipped/share"] > 0.3
    if not sort_vocab:
        assert not first[1][:TILE].any()
