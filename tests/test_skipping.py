"""Certified skipping: the bound holds on every row, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from engine_suite import IMPLS, NAMES, arguments
from skipping_suite import TILE, B, H, T, V, check_rows, peaked

from rgpb import OBJECTIVES, LMHead, Workspace, fused_loss, linear_logprob, objective, reference
from rgpb.engine import chunks, skipping
from rgpb.fused import dpo_loss, mle_loss
from rgpb.kernels import cpp_rows


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(chunks.MASS_TILE, "cpu", TILE)


SINGLE = [name for name in NAMES if OBJECTIVES[name].couples != "batch"]
small = 1 << 15  # bytes: a few rows at a time, and pairs and groups that are swept twice


@pytest.mark.parametrize(
    ("name", "impl", "how", "tolerance", "sort_vocab", "workspace"),
    covering(
        2, name=SINGLE, impl=IMPLS, how=("response", "row", "two_pass"), tolerance=(0.0, 1e-3, 0.05, 0.5),
        sort_vocab=(False, True), workspace=(1 << 29, small),
    ),
)  # fmt: skip
def test_the_bound_holds_on_every_row(name, impl, how, tolerance, sort_vocab, workspace):
    more = {"path": "two_pass"} if how == "two_pass" else {"tolerance_per": how}
    metrics, largest = check_rows(
        name, tolerance, impl=impl, sort_vocab=sort_vocab, workspace=workspace, **more
    )  # fmt: skip
    if tolerance == 0.5:
        assert largest > 1e-9
        assert metrics["skipped/share"] > 0.1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sort_vocab", [False, True])
def test_scores_with_any_upstream_gradient(impl, sort_vocab):
    """Of the row's own coefficient, since others aren't known; a second backward gives the same."""
    hidden, head, target, _ = peaked()
    upstream = torch.rand(B, T, dtype=torch.float64)
    upstream[1] = 0

    def weighted(responses):
        return -(responses.policy.logp * upstream.view(-1)).view(B, T).sum(1)

    loss, metrics = fused_loss(
        hidden, head, target, objective=weighted, reduction="sum", grad_tolerance=0.1, sort_vocab=sort_vocab,
        return_metrics=True, impl=impl,
    )  # fmt: skip
    assert metrics["skipped/share"].isnan()
    wanted = [hidden, head.weight, head.bias]
    made, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(made, again):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    exact = reference.token_scores(hidden, head, target)["logp"] * upstream
    truth = torch.autograd.grad(-exact.sum(), wanted)
    bound = metrics["skipped/bound"].double()
    p = (hidden.detach() @ head.weight.detach().T + head.bias.detach()).softmax(-1)
    own = upstream * (1 - p.gather(-1, target.clamp(min=0)[..., None])[..., 0])
    assert (bound <= 0.1 * own * (1 + 1e-6)).all()
    assert (bound[1] == 0).all()
    assert metrics["skipped/share"] > 0.1
    assert 1e-9 < (made[2] - truth[2]).abs().sum() <= bound.sum()
    widest = head.weight.detach().norm(dim=1).max()
    assert ((made[0] - truth[0]).norm(dim=-1) <= bound * widest + 1e-12).all()


def test_a_long_response_loses_no_more_than_a_short_one():
    """The coefficient of a token is 1/|y|: against the batch's largest, a long response would be left out whole."""
    torch.manual_seed(3)
    hidden, head, target, _ = peaked()
    flat = torch.full((B, T), -100)
    flat[0, 0], flat[1], flat[2:] = target[0, 0].clamp(min=0), target[1].clamp(min=0), -100
    cu = torch.tensor([0, 1, B * T])
    losses, gradients = {}, {}
    for tolerance in (None, 0.2):
        losses[tolerance], _metrics = mle_loss(
            hidden.view(-1, H), head, target.clamp(min=0).view(-1), cu_seqlens=cu, grad_tolerance=tolerance,
            return_metrics=True,
        )  # fmt: skip
        gradients[tolerance] = torch.autograd.grad(losses[tolerance], hidden)[0].view(-1, H)
    lost = (gradients[0.2] - gradients[None])[1:].norm() / gradients[None][1:].norm()
    assert 0 < lost < 0.2


@pytest.mark.parametrize("name", ["mle", "dpo", "swepo"])
@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_heads_skip_in_one_pass(name, impl):
    """1 + (1 − s) units; and where coefficients aren't known, the sum O leaves out the same."""
    hidden, head, target, ref = peaked()
    frozen = LMHead(head.weight.detach(), head.bias.detach())
    ours, _ = arguments(name, ref, target)
    (truth,) = torch.autograd.grad(fused_loss(hidden, head, target, objective=name, **ours), hidden)
    widest = frozen.weight.norm(dim=1).max()
    for path in ("single", "frozen"):
        loss, metrics = fused_loss(
            hidden, frozen, target, objective=name, grad_tolerance=0.2, path=path, impl=impl, return_metrics=True,
            **ours,
        )  # fmt: skip
        (made,) = torch.autograd.grad(loss, hidden)
        bound = metrics["skipped/bound"].double()
        assert metrics["skipped/share"] > 0.1
        assert (made - truth).abs().max() > 1e-9
        assert ((made - truth).norm(dim=-1) <= bound * widest + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [1 << 29, 1 << 16])
def test_narrow_types(dtype, workspace):
    """16-bit heads in one chunk and in several; in an order, and not."""
    hidden, head, target, _ = peaked(dtype, bias=False)
    exact = torch.autograd.grad(mle_loss(hidden.double(), head.weight.double(), target), [hidden, head.weight])
    for sort_vocab in (False, True):
        for tolerance in (0.0, 0.1):
            loss, metrics = mle_loss(
                hidden, head, target, grad_tolerance=tolerance, sort_vocab=sort_vocab, workspace=workspace,
                return_metrics=True,
            )  # fmt: skip
            made = torch.autograd.grad(loss, [hidden, head.weight])
            bound = metrics["skipped/bound"].double()
            allowed = (
                (bound * hidden.detach().double().norm(dim=-1)).sum(),
                bound.norm() * head.weight.detach().norm(dim=1).max(),
            )
            for a, b, most in zip(made, exact, reversed(allowed)):
                rounding = 16 * torch.finfo(dtype).eps * b.double().norm()
                assert (a.double() - b.double()).norm() <= most + rounding


def test_an_order_gathers_what_is_skipped():
    """A few tokens, spread over the vocabulary, have nearly all mass: in order, all but their tiles are left out."""
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


def test_contexts_are_told_apart_by_the_order():
    """Two kinds of rows with a vocabulary each, dealt out alternately: in order, no tile is shared."""
    kinds = torch.arange(V) % 2
    z = torch.where(kinds[None] == torch.tensor([[0], [1]] * 8), 0.0, -20.0) + 0.1 * torch.randn(16, V)
    order = skipping.order_by_logits(z.double(), TILE)
    assert torch.equal(order.sort()[0], torch.arange(V))
    tiles = kinds[order[: V // TILE * TILE]].view(-1, TILE).double().mean(1)
    assert ((tiles == 0) | (tiles == 1)).sum() >= len(tiles) - 1  # V isn't whole in tiles: one may be mixed


def test_a_workspace_keeps_its_order():
    hidden, head, target, _ = peaked()
    kept = Workspace()
    shares = []
    for _ in range(3):
        _, metrics = mle_loss(hidden, head, target, grad_tolerance=0.1, workspace=kept, return_metrics=True)
        shares.append(metrics["skipped/share"].item())
    assert shares[0] == shares[1] == shares[2]
    (order,) = kept._orders.values()
    assert order.kept == pytest.approx(1 - shares[0])
    before = order.order
    order.kept = 0.01  # now it keeps far more than at first: estimated anew by the next call
    mle_loss(hidden, head, target, grad_tolerance=0.1, workspace=kept)
    assert not kept._orders
    mle_loss(hidden, head, target, grad_tolerance=0.1, workspace=kept)
    assert torch.equal(next(iter(kept._orders.values())).order, before)


def test_flat_logits_pause_the_order():
    """Where nothing can be left out none is used, for a while; what comes out is exact."""
    hidden, head, target, _ = peaked()
    flat = LMHead(1e-3 * head.weight.detach().requires_grad_(), None)
    flat.weight.requires_grad_()
    kept = Workspace()
    exact = torch.autograd.grad(mle_loss(hidden, flat, target), [hidden, flat.weight])
    for _ in range(3):
        loss, metrics = mle_loss(hidden, flat, target, grad_tolerance=1e-3, workspace=kept, return_metrics=True)
        assert metrics["skipped/share"] == 0
        for a, b in zip(torch.autograd.grad(loss, [hidden, flat.weight]), exact):
            torch.testing.assert_close(a, b)
    assert next(iter(kept._orders.values())).pause > 0
    kept.free()
    mle_loss(hidden, flat, target, grad_tolerance=1e-3, workspace=kept)  # estimates, and finds that nothing is left out
    before = {name for name, _ in kept._blocks}
    kept._blocks.clear()
    mle_loss(hidden, flat, target, grad_tolerance=1e-3, workspace=kept)
    assert before == {"converted", "logits"}
    assert {name for name, _ in kept._blocks} == {"logits"}  # the weight is taken as it lies, without a copy


def test_nothing_to_leave_out():
    hidden, head, target, _ = peaked()
    masked = torch.full_like(target, -100)
    for how in ({}, {"sort_vocab": True}, {"path": "two_pass"}, {"workspace": Workspace()}):
        loss, metrics = mle_loss(hidden, head, masked, grad_tolerance=0.5, return_metrics=True, **how)
        assert not torch.autograd.grad(loss, head.weight)[0].any()
        assert not metrics["skipped/bound"].any()
    with torch.no_grad():
        _, metrics = mle_loss(hidden, head, target, grad_tolerance=0.5, return_metrics=True)
    assert metrics["skipped/share"] == 0


@pytest.mark.parametrize("path", ["single", "two_pass"])
@pytest.mark.parametrize("ignore_index", [0, V - 1, V, 10**9, -(2**63)])
def test_any_ignore_index_in_another_order(ignore_index, path):
    """One inside the vocabulary, whose place in the order is another target's; one beyond."""
    hidden, head, target, _ = peaked()
    target[target == ignore_index] = 1
    how = {"grad_tolerance": 0.3, "sort_vocab": True, "path": path}
    expected = mle_loss(hidden, head, target, **how)
    loss = mle_loss(hidden, head, torch.where(target == -100, ignore_index, target), ignore_index=ignore_index, **how)
    for a, b in zip(*(torch.autograd.grad(x, [hidden, head.weight]) for x in (loss, expected))):
        torch.testing.assert_close(a, b)


def test_rows_without_a_gradient_cost_nothing():
    """DPO at reduction="none": pairs whose upstream gradient is 0 are left out whole."""
    hidden, head, target, _ = peaked()
    ref = linear_logprob(hidden.detach(), head, target).logp.detach()
    values, metrics = dpo_loss(hidden, head, target, ref=ref, reduction="none", grad_tolerance=0.0, return_metrics=True)
    made = torch.autograd.grad(values[1], head.weight, retain_graph=True)[0]
    kept = target != -100
    assert metrics["skipped/share"] >= kept[0::3].sum() / kept.sum() - 1e-6
    torch.testing.assert_close(
        made, torch.autograd.grad(dpo_loss(hidden, head, target, ref=ref, reduction="none")[1], head.weight)[0]
    )


@pytest.mark.parametrize("given", [-1e-3, 1.0, float("nan"), float("inf"), "small", True, torch.tensor(0.1)])
def test_bad_tolerances(given):
    with pytest.raises(ValueError, match="grad_tolerance: expected"):
        linear_logprob(*peaked()[:3], grad_tolerance=given)


def test_bad_requests():
    hidden, head, target, _ = peaked()
    with pytest.raises(ValueError, match="grad_tolerance: expected None where the entropy has a gradient"):
        linear_logprob(hidden, head, target, entropy=True, grad_tolerance=1e-3)
    with pytest.raises(ValueError, match="sort_vocab: expected False without grad_tolerance"):
        linear_logprob(hidden, head, target, sort_vocab=True)
    with pytest.raises(ValueError, match="tolerance_per: expected 'response' or 'row', got 'batch'"):
        mle_loss(hidden, head, target, grad_tolerance=0.1, tolerance_per="batch")
    with pytest.raises(ValueError, match="tolerance_per: expected 'response' without grad_tolerance, got 'row'"):
        mle_loss(hidden, head, target, tolerance_per="row")
    for given in ("yes", 1):
        with pytest.raises(ValueError, match="sort_vocab: expected True, False or None"):
            linear_logprob(hidden, head, target, grad_tolerance=0.1, sort_vocab=given)
    objective("entropy_of_this_test", couples="token", entropy_grad=True)(lambda r: r.mean(r.policy.other_entropy))
    try:
        with pytest.raises(ValueError, match="grad_tolerance"):
            fused_loss(hidden, head, target, objective="entropy_of_this_test", grad_tolerance=1e-3)
    finally:
        del OBJECTIVES["entropy_of_this_test"]


def test_an_overflow_stays_to_be_seen():
    """One infinite coefficient makes every budget infinite; a loss scaler has to find it all the same."""
    hidden, head, target, _ = peaked()
    for bad in (torch.inf, torch.nan):
        scores = linear_logprob(hidden, head, target, grad_tolerance=0.1)
        g = torch.ones_like(scores.logp)
        g[1, 1] = bad
        for made in torch.autograd.grad(scores.logp, [hidden, head.weight], g):
            assert not made.isfinite().all()
        objective("overflow_of_this_test", couples="token")(lambda r, factor=bad: r.sum(r.policy.logp) * factor)
        try:
            loss = fused_loss(hidden, head, target, objective="overflow_of_this_test", grad_tolerance=0.1)
        finally:
            del OBJECTIVES["overflow_of_this_test"]
        for made in torch.autograd.grad(loss, [hidden, head.weight]):
            assert not made.isfinite().all()


def test_a_target_that_the_bias_rules_out():
    """Its loss is infinite, the gradient and the bound aren't."""
    hidden, head, target, _ = peaked()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[target[1, 1]] = -torch.inf
    _, metrics = mle_loss(hidden, LMHead(head.weight, bias), target, grad_tolerance=0.3, return_metrics=True)
    assert metrics["skipped/bound"].isfinite().all()


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


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "workspace"), [(64, 4096, 1024, 16 << 20), (128, 512, 8192, 4 << 20)]
)
@pytest.mark.parametrize("sort_vocab", [False, True])
@pytest.mark.parametrize("path", ["single", "two_pass"])
def test_memory_stays_inside_the_workspace(tokens, width, vocab, workspace, sort_vocab, path):
    from rgpb.bench.measure import Result, peak_memory

    torch.use_deterministic_algorithms(False)
    hidden, weight = torch.randn(1, tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(vocab, (1, tokens))

    def run():
        loss = mle_loss(
            hidden, weight, target, grad_tolerance=1e-3, sort_vocab=sort_vocab, workspace=workspace,
            path=path if path == "two_pass" else "auto",  # a sum of dW in an order may not fit
        )  # fmt: skip
        return Result(loss.detach(), torch.autograd.grad(loss, [hidden, weight]))

    per_token, per_entry = tokens * (64 + 2 * -(-vocab // TILE)), vocab * 40 * sort_vocab
    assert peak_memory(run, "cpu").extra <= workspace + per_token + per_entry


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("sort_vocab", [False, True])
@pytest.mark.parametrize("path", ["single", "two_pass"])
def test_a_tile_without_any_row_and_a_second_backward(impl, sort_vocab, path):
    """Nothing of a tile counts: its part of dW is 0."""
    if impl == "cpp" and cpp_rows.missing():
        pytest.skip(cpp_rows.missing())
    hidden = (30 * torch.randn(2, 8, H, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(V, H, dtype=torch.float64)
    weight[:64] *= 1e-3
    weight.requires_grad_()
    target = torch.randint(100, V, (2, 8))
    loss, metrics = mle_loss(
        hidden, weight, target, grad_tolerance=1e-3, sort_vocab=sort_vocab, impl=impl, path=path, return_metrics=True
    )
    first, second = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b)
    assert metrics["skipped/share"] > 0.3
    if not sort_vocab:
        assert not first[1][:TILE].any()
