"""Memory that calls keep: the same results, bounded, given back, nobody else's."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rgpb import FusedLoss, LMHead, Workspace, fused, linear_logprob, logprob, validation
from rgpb.engine import workspace
from rgpb.engine.chunks import chunks
from rgpb.fused import bnf_loss, dpo_loss, mle_loss

B, T, V, H = 4, 16, 600, 32


@pytest.fixture
def given():
    hidden, weight = (2 * torch.randn(B, T, H)).requires_grad_(), torch.randn(V, H, requires_grad=True)
    target = torch.randint(V, (B, T))
    target[0, :5] = -100
    return hidden, weight, target


def step(given, workspace, **how):
    hidden, weight, target = given
    loss = dpo_loss(hidden, weight, target, ref=torch.full((B, T), -2.0), workspace=workspace, **how)
    return loss, *torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.parametrize("how", [{}, {"path": "two_pass"}, {"grad_tolerance": 0.1, "sort_vocab": True}], ids=str)
def test_calls_share_it_and_results_do_not_lie_in_it(given, how):
    kept = Workspace(1 << 20)
    expected = step(given, 1 << 20, **how)
    first = step(given, kept, **how)
    held = kept.held
    assert 0 < held <= kept.size
    before = [x.clone() for x in first]
    for block in kept._blocks.values():
        block.fill_(255)  # NaN, whatever the type
    again = step(given, kept, **how)
    assert kept.held == held
    for a, b, c, d in zip(first, before, again, expected):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        torch.testing.assert_close(a, d)


def test_it_is_bounded_and_given_back(given):
    kept = Workspace(200_000)
    for how in ({}, {"path": "two_pass"}, {"grad_tolerance": 0.1}):
        step(given, kept, **how)
        assert 0 < kept.held <= kept.size
    linear_logprob(*given, workspace=kept)
    assert kept.held <= kept.size
    kept.free()
    assert kept.held == 0
    assert not kept._orders


def test_the_one_that_is_entered_is_the_default(given):
    hidden, weight, target = given
    label, ref = torch.arange(B) % 2 == 0, torch.full((B, T), -2.0)
    with Workspace() as outer:
        with Workspace() as kept:
            bnf_loss(hidden, weight, target, label, ref=ref)
        assert kept.held
        assert not outer.held
        linear_logprob(hidden, weight, target, workspace=1 << 20)
        assert not outer.held
        linear_logprob(hidden, weight, target)
        assert outer.held


def test_a_large_block_of_an_earlier_call_counts():
    """What a call then lacks is its own, and isn't kept."""
    kept = Workspace(1000)
    with kept.using(torch.device("cpu")):
        kept.take("logits", (900,), torch.uint8, torch.device("cpu"))
    with kept.using(torch.device("cpu")):
        first = kept.take("logits", (100,), torch.uint8, torch.device("cpu"))
        second = kept.take("sum", (900,), torch.uint8, torch.device("cpu"))
        assert first.data_ptr() == next(iter(kept._blocks.values())).data_ptr()
        assert len(second) == 900
        assert kept.held == 900


def test_a_thread_enters_for_itself(given):
    """Nested entries come off in turn."""
    hidden, weight, target = given
    outer, inner, other = Workspace(), Workspace(), Workspace()
    with outer, inner, outer:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(other.__enter__).result()
            linear_logprob(hidden, weight, target)
        assert outer.held
        assert not other.held
        outer.free()
    with outer, inner:
        with outer:
            pass
        linear_logprob(hidden, weight, target)
    assert inner.held
    assert not outer.held


def test_it_is_not_freed_inside_a_call(given):
    kept = Workspace()
    with kept.using(given[0].device), pytest.raises(RuntimeError, match="between calls"):
        kept.free()
    kept.free()


def test_threads_do_not_meet_in_it(given):
    kept = Workspace()
    (_, *expected) = step(given, kept)
    with ThreadPoolExecutor(4) as threads:
        for _, *made in threads.map(lambda _: step(given, kept), range(40)):
            for a, b in zip(made, expected):
                assert torch.equal(a, b)


def test_a_call_that_fails_leaves_it_free(given):
    hidden, weight, target = given
    kept = Workspace()
    with pytest.raises(ValueError, match="target: expected values in"):
        linear_logprob(hidden, weight, target + V, workspace=kept)
    step(given, kept)
    assert kept.held


def test_a_copy_has_memory_of_its_own(given):
    kept = Workspace(1 << 20)
    step(given, kept)
    module = copy.deepcopy(FusedLoss("dpo", workspace=kept))
    for other in (module.options["workspace"], pickle.loads(pickle.dumps(kept))):
        assert other.key != kept.key
        assert (other.size, other.held) == (kept.size, 0)


@pytest.mark.compile
def test_compiled_without_a_break(given):
    kept = Workspace()

    def loss(hidden, weight):
        target, ref = given[2], torch.full((B, T), -2.0)
        return dpo_loss(hidden, weight, target, ref=ref, workspace=kept, grad_tolerance=0.05)

    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(*given[:2])
    for a, b in zip(torch.autograd.grad(value, given[:2]), torch.autograd.grad(loss(*given[:2]), given[:2])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [0, -1, True, "1GiB", 1.5, None])
def test_bad_sizes(size, given):
    with pytest.raises(ValueError, match=f"size: expected a positive whole number of bytes, got {size}"):
        Workspace(size)
    if not isinstance(size, str | None):
        with pytest.raises(ValueError, match=f"workspace: expected a positive whole number of bytes,.* got {size}"):
            step(given, size)


@pytest.mark.parametrize("how", [{}, {"impl": "torch"}, {"grad_tolerance": 0.1, "sort_vocab": True}], ids=str)
def test_the_size_that_a_refusal_names_is_enough(how, given):
    """Also where what is held beside a row grows with the workspace: converted slices of a 16-bit weight."""
    given = [x.detach().bfloat16().requires_grad_() for x in given[:2]] + [given[2]]
    with pytest.raises(ValueError, match="workspace: expected at least .* got 1$") as refused:
        step(given, 1, **how)
    named = int(str(refused.value).split("at least ")[1].split()[0])
    with pytest.raises(ValueError, match=f"workspace: expected at least {named} bytes"):
        step(given, named - 1, **how)
    step(given, named, **how)


@pytest.mark.compile
def test_sizes_as_texts(given):
    """At every door as the number of bytes, also inside torch.compile."""
    hidden, weight, target = given
    how = validation.check_how(hidden.device, "auto", None, "auto", None, None, "1.5 MiB")
    assert how == validation.check_how(hidden.device, "auto", None, "auto", None, None, 3 << 19)
    with pytest.raises(ValueError, match="workspace: expected at least .* got 10"):
        linear_logprob(hidden, weight, target, workspace="10")

    def loss(hidden, weight):
        return dpo_loss(hidden, weight, target, ref=torch.full((B, T), -2.0), workspace="64KiB")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight), step(given, 1 << 16)[0])


GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "taken"),
    [(0, GIB // 2), (GIB, GIB // 2), (2 * GIB, GIB), (7 * GIB, 2 * GIB), (8 * GIB, 4 * GIB), (99 * GIB, 4 * GIB)],
)
def test_what_is_free_on_a_gpu(free, taken, monkeypatch):
    """Half of it at most, in powers of two, so that chunks seldom change; less than 512 MiB never."""
    monkeypatch.setattr(workspace, "free_bytes", lambda device: free)
    gpu = torch.device("cuda")
    assert workspace.settled(None, gpu) == workspace.settled("auto", gpu) == (taken, 0)
    assert workspace.settled("auto", gpu, shared=True) == (GIB // 2, 0)  # ranks with other chunks would wait forever
    assert workspace.settled(123, gpu) == (123, 0)
    with Workspace(64) as kept:
        assert workspace.settled(None, gpu) == (64, kept.key)


def test_what_is_free_counts_what_pytorch_keeps(monkeypatch):
    for name, value in {
        "is_available": True,
        "memory_reserved": 5,
        "memory_allocated": 3,
        "mem_get_info": (7, 9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    assert workspace.free_bytes(torch.device("cuda")) == 9
    assert workspace.free_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize("shard", [None, "some"])
def test_ranks_that_share_a_head_are_asked_nothing(given, monkeypatch, shard):
    hidden, weight, target = given
    seen = []

    def noted(*arguments, shared, **_):
        seen.append(shared)
        raise KeyError

    for module in (fused, logprob):
        monkeypatch.setattr(module, "check_inputs", lambda *_: LMHead(weight, shard=shard))
        monkeypatch.setattr(module, "check_how", noted)
    for call, more in ((linear_logprob, {}), (mle_loss, {}), (mle_loss, {"sequence_group": "some"})):
        with pytest.raises(KeyError):
            call(hidden, weight, target, **more)
    assert seen == [shard is not None, shard is not None, True]


def test_a_call_asks_what_is_free(given, monkeypatch):
    monkeypatch.setattr(workspace, "free_bytes", lambda device: 1 << 40)
    rows = []
    monkeypatch.setattr(validation, "chunks", lambda shape, size, path: rows.append(size) or chunks(shape, size, path))
    step(given, "auto")
    linear_logprob(*given)
    assert rows == [4 * GIB, 4 * GIB]


def test_the_memory_of_a_gradient_that_nobody_holds_is_taken_again():
    torch.use_deterministic_algorithms(False)
    hidden, weight, target = torch.randn(2, 5, 8), torch.randn(300, 8, requires_grad=True), torch.randint(300, (2, 5))
    kept = Workspace(1 << 20, gradients=True)

    def step(workspace=kept):
        mle_loss(hidden, weight, target, workspace=workspace).backward()
        return weight.grad.data_ptr()

    first = step()
    held, right = kept.held, weight.grad.clone()
    weight.grad = None
    assert kept.held == held + right.nbytes
    assert step() == first
    torch.testing.assert_close(weight.grad, right, rtol=0, atol=0)
    view, weight.grad = weight.grad[1:], None  # somebody still looks at a part of it
    assert step() != first
    torch.testing.assert_close(view, right[1:], rtol=0, atol=0)
    assert step() == weight.grad.data_ptr()  # accumulated
    torch.testing.assert_close(weight.grad, 2 * right)
    array, weight.grad = weight.grad.numpy(), None
    again = step()
    assert again != array.ctypes.data
    shared, weight.grad = weight.grad, None
    shared.share_memory_()
    assert step() != shared.data_ptr()
    torch.testing.assert_close(shared, right, rtol=0, atol=0)
    weight.grad = None
    first, storage = step(), weight.grad.untyped_storage()  # held as such, without a tensor
    weight.grad = None
    assert step() != first
    del storage
    weight.grad = None
    kept.free()
    assert kept.held == 0
    plain = Workspace(1 << 20)
    step(plain)
    assert not plain._given


def test_the_memory_of_a_gradient_comes_on_top_of_the_size():
    """It takes no room from the buffers, also where these grow."""
    weight = torch.randn(5000, 64, requires_grad=True)
    kept = Workspace(weight.nbytes // 2, gradients=True)
    for length in (2, 4, 4):
        mle_loss(torch.randn(1, length, 64), weight, torch.randint(5000, (1, length)), workspace=kept).backward()
        weight.grad = None
    assert kept.held >= weight.nbytes + 4 * 5000 * 4


def test_orders_do_not_pile_up(given):
    """As with a tolerance that changes from step to step."""
    kept = Workspace(1 << 20)
    for place in range(12):
        step(given, kept, grad_tolerance=0.1 + place / 100)
    assert len(kept._orders) == workspace.ORDERS
    assert next(reversed(kept._orders))[-1] == 0.1 + 11 / 100
