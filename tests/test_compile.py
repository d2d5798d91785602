"""The operators as PyTorch sees them: schemas, fakes, autograd registration, torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from rgpb import LMHead, TokenScores, fused_loss, linear_logprob
from rgpb.engine.call import Call, Tensors
from rgpb.engine.sweeps import Scored
from rgpb.fused import bnf_loss, dpo_loss, mle_loss
from rgpb.objectives import resolve
from rgpb.validation import How, make_call

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
def test_autocast_does_not_reach_into_the_operators(given):
    """Else eager and compiled calls differ: findings/torch_custom_op_autocast.sh."""
    exact = bnf(*given)
    wanted = torch.autograd.grad(exact, given[:3])
    torch._dynamo.reset()
    for step in (bnf, torch.compile(bnf, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(*given)
        torch.testing.assert_close(loss, exact)
        for a, b in zip(torch.autograd.grad(loss, given[:3]), wanted):
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
    head = LMHead(weight, bias, 5.0, 0.5)
    rows, how = B * T, How(impl="torch", workspace=1 << 20)
    tensors = Tensors.of(hidden, head, target)
    tensors = tensors._replace(hidden=tensors.hidden.detach().requires_grad_())  # a leaf
    opcheck(torch.ops.rgpb.score, tensors.pack(make_call(hidden, head, how, -100, entropy=True)))
    label, sums = torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), ref.logp.sum(1).double()
    for name, extra, size in (
        ("bnf", {"label": label, "ref_logp": ref.logp.view(-1), "ref_log_odds": ref.log_odds.view(-1)}, None),
        ("dpo", {"ref_sums": sums}, None),
        ("swepo", {"ref_sums": sums, "rewards": torch.arange(B).double()}, 2),
        ("1.0*mle + 0.5*dpo", {"ref_sums": sums}, None),
    ):
        spec = resolve(name)
        call = make_call(hidden, head, how, -100, spec=spec, group_size=size)
        assert call.path == "single"
        opcheck(torch.ops.rgpb.loss, tensors._replace(tokens=(target != -100).sum(1), **extra).pack(call))
    plain = Tensors(*(None if x is None else x.detach() for x in tensors))
    call = make_call(hidden, head, how, -100, entropy=True)._replace(needs=(True, True, True))
    found = Scored(*torch.ops.rgpb.score(*plain.pack(call)))
    g_zy, g_lo, g_ho = torch.randn(3, rows)
    known = plain._replace(z_y=found.z_y, lse_other=found.lse_other, g_zy=g_zy, g_lo=g_lo)
    opcheck(torch.ops.rgpb.pull_back, known._replace(h_o=found.h_o, g_ho=g_ho).pack(call))
    opcheck(torch.ops.rgpb.finish_hidden_, (torch.randn(rows, H), *known._replace(hidden=None).pack(call)))
    skip = make_call(hidden, head, how._replace(grad_tolerance=0.1, sort_vocab=True), -100)._replace(accumulate=False)
    static = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others compare, and NaN ≠ NaN
    opcheck(torch.ops.rgpb.score, plain.pack(skip), test_utils=static)
    found = Scored(*torch.ops.rgpb.score(*plain.pack(skip)))
    skip = skip._replace(needs=(False, True, True))
    opcheck(torch.ops.rgpb.pull_back, known._replace(active=found.active, order=found.order).pack(skip))
    call = make_call(hidden, head, how._replace(grad_tolerance=0.1, sort_vocab=True), -100, spec=resolve("mle"))
    opcheck(torch.ops.rgpb.loss, tensors._replace(tokens=(target != -100).sum(1)).pack(call))


def test_a_call_says_of_itself_what_it_is(given):
    hidden, weight, bias, _, _ = given
    how = How(impl="torch", grad_tolerance="auto")
    for spec, options in ((resolve("dpo"), {"beta": 0.25}), (None, {})):
        call = make_call(hidden, LMHead(weight, bias, 30.0, 1e-3), how, -100, spec=spec, options=options)
        assert Call.parse(call.encode()) == call
        assert "'softcap': 30.0" in call.encode()


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


def options_of_dpo(
    hidden, weight, target, beta=0.1, softcap=None, scale=1.0, ignore_index=-100, workspace=1 << 20, temperature=1.0
):
    ref = torch.full(target.shape, -2.0)
    head = LMHead(weight, None, softcap, scale)
    how = {"ignore_index": ignore_index, "workspace": workspace, "temperature": temperature}
    return dpo_loss(hidden, head, target, ref=ref, beta=beta, **how)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_forward_mode_is_refused_of_what_is_compiled(given):
    """Also where it was compiled before, and where the compiler sees the transform itself."""
    hidden, weight, target = given[0].detach(), given[1].detach(), given[3]
    step, tangent = lambda x: linear_logprob(x, weight, target).logp.sum(), torch.ones_like(hidden)
    compiled = torch.compile(step, backend="eager")
    compiled(hidden)
    inside = torch.compile(lambda x: torch.func.jvp(step, (x,), (tangent,)), backend="eager")
    for forward in (lambda: torch.func.jvp(compiled, (hidden,), (tangent,)), lambda: inside(hidden)):
        with pytest.raises(ValueError, match="hidden: expected a tensor without tangent"):
            forward()


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.compile
@pytest.mark.parametrize(
    "given",
    [
        [(), ()],
        [(0.1,), (0.2,), (0.35,)],
        full([(0.1, 30.0), (0.1, 20.0), (0.1, 15.5)]),
        full([(0.1, None, 0.5, -1, 1 << 20), (0.1, None, 0.25, -7, 1 << 21), (0.1, None, 0.125, -3, 1 << 19)]),
        full([(0.1, 30.0, 1.0, -100, 1 << 20, t) for t in (0.9, 0.8, 0.7)]),
    ],
    ids=["shapes", "beta", "softcap", "scale, ignore_index, workspace", "temperature"],
)
def test_a_compiler_takes_what_changes_from_call_to_call(given):
    """What it has a symbol for becomes a number in the call's text."""
    torch._dynamo.reset()
    dynamic = True if given[0] == () else None
    compiled = torch.compile(options_of_dpo, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length, more in enumerate(given, 5):
        vocab = 13 if dynamic is None else 12 + length
        hidden, weight = torch.randn(4, length, H), torch.randn(vocab, H, requires_grad=True)
        target = torch.randint(vocab, (4, length))
        made, wanted = (step(hidden, weight, target, *more) for step in (compiled, options_of_dpo))
        torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(torch.autograd.grad(made, weight), torch.autograd.grad(wanted, weight))


@pytest.mark.parametrize("step", [bnf, dpo_each])
def test_whoever_looks_at_operators_sees_them(given, step):
    """Elsewhere the same functions run without the dispatcher."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    direct = step(*given)
    found = torch.autograd.grad(direct, given[:3])
    with Seen():
        dispatched = step(*given)
        same = torch.autograd.grad(dispatched, given[:3])
    assert {"rgpb::loss"} & {*names} if step is bnf else {"rgpb::score", "rgpb::pull_back"} <= {*names}
    torch.testing.assert_close((dispatched, *same), (direct, *found), rtol=0, atol=0)
