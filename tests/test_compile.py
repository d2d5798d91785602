"""The operators as PyTorch sees them: schemas, fakes, autograd registration, torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from rgpb import LMHead, TokenScores, fused_loss, linear_logprob
from rgpb.fused import bnf_loss, dpo_loss, mle_loss

B, T, H, V = 4, 6, 8, 13


@pytest.fixture
def given():
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((B, T, H), (V, H), (V,)))
    target = torch.randint(V, (B, T))
    target[0, :2] = -100
    return hidden, weight, bias, target, linear_logprob(torch.randn(B, T, H), weight.detach(), target)


def bnf(hidden, weight, bias, target, ref):
    label = torch.tensor([True, True, False, False])
    return 3 * bnf_loss(2 * hidden, LMHead(weight, bias, 5.0, 0.5), target, label, ref=ref)


def dpo_each(hidden, weight, bias, target, ref):
    return dpo_loss(hidden, LMHead(weight, bias), target, ref=ref, beta=0.3, reduction="none").sum()


def dpo_with_metrics(hidden, weight, bias, target, ref):
    loss, metrics = dpo_loss(hidden, LMHead(weight, bias), target, ref=ref, return_metrics=True)
    return loss + 0 * metrics["rewards/margins"]


def dpo_packed(hidden, weight, bias, target, ref):
    flat = TokenScores(*(x.view(-1) for x in ref[:3]))
    offsets = torch.tensor([0, 5, 9, 17, 24])
    return dpo_loss(hidden.view(-1, H), LMHead(weight, bias), target.view(-1), ref=flat, cu_seqlens=offsets)


def scores_with_entropy(hidden, weight, bias, target, ref):
    scores = linear_logprob(hidden, LMHead(weight, bias), target, entropy=True)
    return scores.logp.sum() + scores.entropy.sum()


def own_function(hidden, weight, bias, target, ref):
    return fused_loss(hidden, LMHead(weight, bias), target, objective=lambda responses: responses.logps().square())


@pytest.mark.compile
@pytest.mark.parametrize("step", [bnf, dpo_each, dpo_with_metrics, dpo_packed, scores_with_entropy, own_function])
def test_compiles_in_one_graph(given, step):
    wanted = given[:3]
    eager = step(*given)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted)):
        torch.testing.assert_close(a, b)


@pytest.mark.compile
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside PyTorch's own inductor
@pytest.mark.parametrize("step", [bnf, dpo_each])
def test_compiles_with_inductor(given, step):
    torch.use_deterministic_algorithms(False)  # its fill of empty tensors is not what is compiled
    wanted = given[:3]
    eager = step(*given)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)(*given)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted)):
        torch.testing.assert_close(a, b)


@pytest.mark.compile
def test_operators_pass_opcheck(given):
    hidden, weight, bias, target, ref = given
    flat, y = hidden.detach().view(-1, H).requires_grad_(), target.view(-1)
    how = (5.0, 0.5, -100, 1 << 20, torch.float32, "torch", "chunked")
    opcheck(torch.ops.rgpb.score, (flat, weight, bias, y, *how, True, True, None, False))
    label, lengths = torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), torch.full((B,), T)
    for name, extra in (
        ("bnf", (label, ref.logp.view(-1), ref.log_odds.view(-1), None, None, 0)),
        ("dpo", (None, None, None, ref.logp.sum(1).double(), None, 0)),
        ("swepo", (None, None, None, ref.logp.sum(1).double(), torch.arange(B).double(), 2)),
        ("1.0*mle + 0.5*dpo", (None, None, None, ref.logp.sum(1).double(), None, 0)),
    ):
        arguments = (flat, weight, bias, y, lengths, *extra, name, "", True, *how, True, True, True)
        opcheck(torch.ops.rgpb.single_pass, arguments)
    plain = (flat.detach(), weight.detach(), bias.detach(), y, *how)
    z_y, lse_other, h_o, *_ = torch.ops.rgpb.score(*plain, True, False, None, False)
    g = torch.randn(3, B * T)
    nothing = (torch.empty(0), torch.empty(0, dtype=torch.int64), None, torch.empty(0))
    opcheck(torch.ops.rgpb.pull_back, (*plain, z_y, lse_other, h_o, *g, True, True, True, *nothing))
    static = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others compare, and NaN ≠ NaN
    opcheck(torch.ops.rgpb.score, (*plain, False, False, 0.1, True), test_utils=static)
    masses, order, report = torch.ops.rgpb.score(*plain, False, False, 0.1, True)[4:]
    skipping = (*plain, z_y, lse_other, None, *g[:2], None, False, True, True, masses, order, 0.1, report)
    opcheck(torch.ops.rgpb.pull_back, skipping)
    opcheck(torch.ops.rgpb.finish_hidden_, (torch.randn(B * T, H), weight.detach(), y, z_y, *g[:2], *how[:4]))


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_runs_the_region_once_more(given, selective):
    """The single pass's own small autograd must not go through the checkpoint's hooks, chunk by chunk."""
    from torch.utils import checkpoint

    hidden, weight, _, target, _ = given
    runs = []

    def region(hidden, weight):
        runs.append(None)
        return mle_loss(torch.tanh(hidden), weight, target, workspace=2000)

    options = {}
    if selective:
        save = checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        options["context_fn"] = lambda: checkpoint.create_selective_checkpoint_contexts(lambda *a, **k: save)
    loss = checkpoint.checkpoint(region, hidden, weight, use_reentrant=False, **options)
    assert len(runs) == 1
    made = torch.autograd.grad(loss, [hidden, weight])
    assert len(runs) == 2
    for a, b in zip(made, torch.autograd.grad(region(hidden, weight), [hidden, weight])):
        torch.testing.assert_close(a, b)


def test_small_autograd_works_under_a_dispatch_mode(given):
    """Selective checkpointing and flop counters are such modes; the single pass uses autograd inside an operator."""
    from torch.utils.flop_counter import FlopCounterMode

    eager = bnf(*given)
    with FlopCounterMode(display=False):
        counted = bnf(*given)
    torch.testing.assert_close(counted, eager, rtol=0, atol=0)
