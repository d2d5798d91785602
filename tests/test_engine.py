"""The engine's paths against the dense float64 oracle, under a budget taken from the data (`engine_suite.py`).

Flags are covered by pairs of values (`covering.py`); the kernels' own are in `test_rows.py`, by triples.
"""

from __future__ import annotations

import math

import pytest
import torch
from counting import counted
from covering import covering
from engine_suite import (
    HEADS,
    IMPLS,
    NAMES,
    PATHS,
    SHAPES,
    arguments,
    assert_in_budget,
    batch,
    leaves,
    oracle_in,
    ref_scores,
    run_path,
    small,
)

from rgpb import OBJECTIVES, LMHead, TokenScores, Workspace, fused_loss, linear_logprob, objective, reference
from rgpb.engine.chunks import chunks, single_chunk, sizes
from rgpb.engine.plan import plan, predicted_seconds
from rgpb.engine.products import chunk_spans, even_spans
from rgpb.engine.rates import PRODUCT_TILES, RATES, wave_efficiency
from rgpb.fused import bnf_loss, dpo_loss, mle_loss
from rgpb.kernels import cpp_rows, matmul
from rgpb.validation import Checks, How, make_layout, plan_call, tokens_of_units

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
impls = pytest.mark.parametrize("impl", IMPLS)


# what a kernel has inside comes by triples: it stands between the paths and the flags of the kernel
TOKEN_WISE = [name for name in NAMES if OBJECTIVES[name].terms is not None]
OTHERS = [name for name in NAMES if name not in TOKEN_WISE]


@pytest.mark.parametrize(
    ("name", "path", "head", "impl"),
    covering(3, name=TOKEN_WISE, path=PATHS, head=HEADS, impl=IMPLS)
    + covering(2, name=OTHERS, path=PATHS, head=HEADS, impl=IMPLS),
)
def test_float64_paths_equal_the_oracle(name, path, head, impl):
    hidden, lm_head, target, ref_logits = batch((6, 7, 131, 13), head=head)  # three pairs, two groups of three
    ours, oracle = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, lm_head, target, impl=impl, **ours)
    exact, exact_gradients = oracle_in(torch.float64, name, hidden, lm_head, target, oracle)
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)
    for gradient, truth in zip(gradients, exact_gradients):
        torch.testing.assert_close(gradient, 1.5 * truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "dtype", "path", "shape", "impl"),
    covering(2, name=("bnf", "dpo"), dtype=FLOATS, path=PATHS, shape=SHAPES, impl=IMPLS),
)
def test_precision_is_within_the_budget(name, dtype, path, shape, impl):
    hidden, head, target, ref_logits = batch(SHAPES[shape], dtype)
    ours, oracle = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, head, target, impl=impl, **ours)
    exact, exact_gradients = oracle_in(torch.float64, name, hidden, head, target, oracle)
    naive, naive_gradients = oracle_in(dtype, name, hidden, head, target, oracle)
    assert loss.dtype == torch.float32
    terms, _ = oracle_in(torch.float64, name, hidden, head, target, oracle, reduction="none")
    assert_in_budget(loss, naive, exact, torch.float32, scale=terms.abs().max().item())
    for gradient, rough, truth in zip(gradients, naive_gradients, exact_gradients):
        assert gradient.dtype == dtype
        assert_in_budget(gradient, 1.5 * rough, 1.5 * truth, dtype)


@impls
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_probs_of_any_dtype_are_right_to_1e_5(dtype, impl):
    hidden, head, target, _ = batch((4, 9, 1009, 67), dtype, head="bias")
    scores = linear_logprob(hidden, head, target, entropy=True, impl=impl)
    h, w, b = (x.detach().double() for x in leaves(hidden, head))
    exact = reference.token_scores(h, LMHead(w, b), target)
    for field in ("logp", "log_odds", "lse", "entropy", "other_entropy"):
        ours = getattr(scores, field)
        assert ours.dtype == torch.float32
        assert (ours.double() - exact[field]).abs().max() <= 1e-5, field


@pytest.mark.parametrize(
    ("dtype", "head", "impl"),
    covering(2, dtype=(torch.float64, torch.float32, torch.bfloat16), head=HEADS, impl=IMPLS),
)
def test_scores_of_a_vocabulary_in_slices(dtype, head, impl):
    """Several slices of the vocabulary, targets in each, a slice in which nothing is possible, chunks of rows."""
    shape = (4, 9, 4 * 1024 + 5, 7)
    hidden, head, target, _ = batch(shape, dtype, head=head)
    target[-1, :5] = torch.tensor([0, 1023, 1024, 2047, 4100])
    bias = torch.zeros(shape[2]) if head.bias is None else head.bias.detach().float()
    bias[2048:3072] = -1e4  # the oracle has no 0 · ∞
    bias[target.clamp(min=0)] = 0.25
    head = head._replace(bias=bias.to(dtype))
    ruled_out = head._replace(bias=torch.where(head.bias < -9e3, -torch.inf, head.bias))
    h, w, b = (x.detach().double() for x in leaves(hidden, head))
    exact = reference.token_scores(h, LMHead(w, b, head.softcap, head.scale), target)
    for workspace in (1 << 29, 1 << 18):
        with torch.no_grad():
            scores, impossible = (
                linear_logprob(hidden, h, target, entropy=True, workspace=workspace, impl=impl)
                for h in (head, ruled_out)
            )
        for field in ("logp", "log_odds", "lse", "entropy", "other_entropy"):
            torch.testing.assert_close(
                getattr(scores, field).double(), exact[field], rtol=1e-6, atol=1e-5 if dtype != torch.float64 else 1e-11
            )
            if head.softcap is None:
                torch.testing.assert_close(getattr(impossible, field), getattr(scores, field), rtol=0, atol=1e-5)


@impls
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, -1e4])
def test_what_all_logits_have_in_common_costs_the_entropy_nothing(offset, impl):
    """Logits that are exact in float32, in several slices: an offset changes no entropy and no gradient of it."""
    hidden = torch.zeros(1, 24, 4)
    hidden[..., 0], hidden[..., 1] = 1.0, torch.randint(-4, 5, (24,)).float()
    weight = torch.zeros(2500, 4)
    weight[:, 0], weight[:, 1] = offset, torch.randint(-2, 3, (2500,)) * 0.5
    target = torch.randint(2500, (1, 24))
    with torch.no_grad():
        scores = linear_logprob(hidden, weight, target, entropy=True, impl=impl)
    exact = reference.token_scores(hidden.double(), weight.double(), target)
    for field in ("entropy", "other_entropy"):
        assert (getattr(scores, field).double() - exact[field]).abs().max() < 2e-6, field


@impls
@pytest.mark.parametrize("head", [(1.0, 1e9, None), (-1.0, 1e9, None), (1.0, 1.0, 1e12), (1.0, 0.0, None)], ids=str)
def test_logits_whose_rounding_is_larger_than_one(head, impl):
    """The largest logit times scale is rounded as all others are, so that nothing lies above it."""
    size, scale, softcap = head
    hidden, weight = size * torch.randn(1, 6, 8), torch.randn(50, 8)
    if softcap is not None:
        hidden = hidden * 1e10
    target = torch.zeros(1, 6, dtype=torch.int64)
    lm_head = LMHead(weight.requires_grad_(), None, softcap, scale)
    scores = linear_logprob(hidden, lm_head, target, entropy=True, impl=impl)
    exact = reference.token_scores(hidden.double(), LMHead(weight.double(), None, softcap, scale), target)
    torch.testing.assert_close(scores.logp.double(), exact["logp"], rtol=1e-5, atol=1e-6)
    assert (scores.other_entropy >= -1e-6).all()
    loss = mle_loss(hidden, lm_head, target, impl=impl)
    torch.testing.assert_close(loss.double(), -exact["logp"].mean(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


LAYOUTS = {
    "as it is": lambda x: x,
    "columns dense": lambda x: x.t().contiguous().t(),
    "neither dense": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows with room": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize(
    ("hidden_layout", "weight_layout", "path", "dtype", "impl"),
    covering(
        2, hidden_layout=LAYOUTS, weight_layout=LAYOUTS, path=("single", "two_pass", "two_pass in chunks"),
        dtype=FLOATS[:2], impl=IMPLS,
    ),
)  # fmt: skip
def test_tensors_may_lie_in_memory_as_they_like(hidden_layout, weight_layout, path, dtype, impl):
    hidden, head, target, _ = batch((1, 40, 71, 10), dtype, masked=False)
    ours = LAYOUTS[hidden_layout](hidden.detach()[0]).requires_grad_()
    weight = LAYOUTS[weight_layout](head.weight.detach()).requires_grad_()
    for rows in (target, torch.where(torch.arange(40) == 3, -100, target)):
        results = []
        for h, w in ((hidden, head.weight), (ours[None], weight)):
            _, gradients = run_path(path, "mle", h, LMHead(w), rows, impl=impl)
            results.append(gradients)
        rounding = torch.finfo(dtype).eps
        for made, wanted in zip(*results):
            torch.testing.assert_close(made, wanted, rtol=4 * rounding, atol=16 * rounding * wanted.abs().max().item())


@impls
def test_log_probs_of_large_logits_are_right_to_their_rounding(impl):
    """float32 logits of size 200 have a spacing of 1.5e-5; nothing beyond a few of those is added."""
    hidden, head, target, _ = batch((4, 9, 1009, 64), torch.float32)
    hidden = hidden.detach() * 5
    h, w = hidden.double(), head.weight.detach().double()
    assert 150 < reference.logits(h, w).abs().max() < 400
    ours = linear_logprob(hidden, head, target, impl=impl).logp
    assert (ours.double() - reference.token_scores(h, w, target)["logp"]).abs().max() < 1e-4


@impls
@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_every_score(head, impl):
    """gradcheck, with the entropy's gradient, non-uniform and stride-0 upstream gradients, in many chunks."""
    shape = (2, 4, 7, 3)
    hidden, lm_head, target, _ = batch(shape, head=head)

    def scores(h, w, *b):
        made = linear_logprob(
            h,
            LMHead(w, b[0] if b else None, lm_head.softcap, lm_head.scale),
            target,
            entropy=True,
            workspace=small(shape),
            impl=impl,
        )
        return tuple(made)

    inputs = leaves(hidden, lm_head)
    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True)
    uniform = linear_logprob(hidden, lm_head, target).logp.sum()  # expands one number: stride 0
    same = (linear_logprob(hidden, lm_head, target).logp * torch.ones(2, 4, dtype=torch.float64)).sum()
    for a, b in zip(torch.autograd.grad(uniform, inputs), torch.autograd.grad(same, inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reduction", "impl"),
    covering(2, name=("bnf", "dpo", "unlikelihood"), reduction=("mean", "sum", "none"), impl=IMPLS),
)
def test_reductions_and_nonuniform_upstream(name, reduction, impl):
    hidden, head, target, ref_logits = batch((6, 5, 19, 4))
    ours, oracle = arguments(name, ref_logits, target)
    loss = fused_loss(hidden, head, target, objective=name, reduction=reduction, impl=impl, **ours)
    exact = reference.LOSSES[name](hidden, head, target, reduction=reduction, **oracle)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(loss)
    made = torch.autograd.grad(loss, leaves(hidden, head), upstream)
    for a, b in zip(made, torch.autograd.grad(exact, leaves(hidden, head), upstream)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_packed_equals_padded():
    hidden, head, target, ref_logits = batch((4, 6, 23, 5))
    lengths = [6, 2, 0, 5]
    keep = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    target = torch.where(keep, target, -100)
    offsets = torch.tensor([0, 6, 8, 8, 13], dtype=torch.int32)
    ref = ref_scores(ref_logits, target)
    packed_ref = TokenScores(ref.logp[keep], ref.log_odds[keep], ref.lse[keep])
    label = torch.tensor([True, False, True, False])
    for name in ("bnf", "dpo", "mle", "unlikelihood", "swepo"):
        spec = OBJECTIVES[name]
        extra = {"label": label} if spec.label else {}
        extra |= {"rewards": torch.tensor([[0.0, 1.0], [1.0, 0.0]])} if spec.rewards else {}
        ours = fused_loss(
            hidden[keep], head, target[keep], objective=name, cu_seqlens=offsets, **extra,
            **({"ref": packed_ref} if spec.ref else {}),
        )  # fmt: skip
        padded = fused_loss(hidden, head, target, objective=name, **extra, **({"ref": ref} if spec.ref else {}))
        torch.testing.assert_close(ours, padded, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_asked_for():
    hidden, head, target, _ = batch((2, 5, 11, 4), head="bias")
    frozen_hidden = mle_loss(hidden.detach(), head, target)
    weight, bias = torch.autograd.grad(frozen_hidden, [head.weight, head.bias])
    whole = torch.autograd.grad(mle_loss(hidden, head, target), [hidden, head.weight, head.bias])
    torch.testing.assert_close(weight, whole[1])
    torch.testing.assert_close(bias, whole[2])
    (only_hidden,) = torch.autograd.grad(
        mle_loss(hidden, LMHead(head.weight.detach(), head.bias.detach()), target), hidden
    )
    torch.testing.assert_close(only_hidden, whole[0])
    only_bias = mle_loss(hidden.detach(), LMHead(head.weight.detach(), head.bias), target)
    torch.testing.assert_close(torch.autograd.grad(only_bias, head.bias)[0], whole[2])


def test_backward_twice_gives_the_same():
    hidden, head, target, ref_logits = batch((4, 5, 11, 4))
    ref = ref_scores(ref_logits, target)
    for reduction in ("mean", "none"):  # single pass, two pass
        loss = dpo_loss(hidden, head, target, ref=ref, reduction=reduction).sum() * 3
        first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(loss, [hidden, head.weight])):
            torch.testing.assert_close(a, b)


@impls
@pytest.mark.parametrize("head", HEADS)
def test_temperature_divides_the_logits(head, impl):
    """Behind the soft-cap; a reference's head has the same temperature and a soft-cap of its own."""
    hidden, lm_head, target, _ = batch((6, 7, 131, 13), head=head)
    ref_hidden, ref_head, _, _ = batch((6, 7, 131, 13), head="soft-cap and scale")
    z = reference.logits(hidden, lm_head) / 0.6
    scores = linear_logprob(hidden, lm_head, target, temperature=0.6, impl=impl)
    mask, y = target != -100, target.clamp(min=0)[..., None]
    wanted = torch.where(mask, z.log_softmax(-1).gather(-1, y)[..., 0], 0.0)
    torch.testing.assert_close(scores.logp, wanted, rtol=1e-9, atol=1e-9)
    ref_logits = reference.logits(ref_hidden, ref_head).detach() / 0.6
    for name, options in (("dpo", {}), ("bnf", {"label": torch.arange(6) % 2 * 2 - 1})):
        loss = fused_loss(
            hidden, lm_head, target, objective=name, ref=(ref_hidden, ref_head), temperature=0.6, impl=impl, **options
        )
        exact = reference.LOSSES[name](hidden, lm_head, target, ref_logits=ref_logits, temperature=0.6, **options)
        torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)
        found, truth = (torch.autograd.grad(x, leaves(hidden, lm_head)) for x in (loss, exact))
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_temperature_of_what_is_drawn():
    """Candidates are scored at it once, not twice."""
    hidden, head, target, ref_logits = batch((6, 7, 131, 13), head="soft-cap and scale")
    given = {"ref": ref_scores(ref_logits, target), "group_size": 3, "temperature": 0.05}
    loss = fused_loss(hidden, head, target, objective="mc_po", sampler="max", beta=5.0, **given)
    cold = LMHead(head.weight, head.bias, head.softcap / 0.05, head.scale / 0.05)
    same = fused_loss(hidden, cold, target, objective="mc_po", sampler="max", beta=5.0, **{**given, "temperature": 1})
    torch.testing.assert_close(loss, same, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_refused():
    hidden, head, target, _ = batch((2, 3, 7, 4))
    for loss in (mle_loss(hidden, head, target), linear_logprob(hidden, head, target).logp.sum()):
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_upstream_gradients_at_once_are_refused(reduction):
    hidden, head, target, _ = batch((2, 3, 7, 4))
    loss = mle_loss(hidden, head, target, reduction=reduction)
    (truth,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
    several = torch.ones(5, *loss.shape, dtype=loss.dtype)
    for ask in (
        lambda: torch.autograd.grad(loss, hidden, several, retain_graph=True, is_grads_batched=True),
        lambda: torch.func.vmap(lambda g: torch.autograd.grad(loss, hidden, g, retain_graph=True)[0])(several),
    ):
        with pytest.raises(RuntimeError, match="several gradients at once are not available"):
            ask()
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), hidden)[0], truth)


@pytest.mark.parametrize("name", ["mle", "dpo"])
def test_where_hooks_for_saved_tensors_are_disabled(name):
    hidden, head, target, ref_logits = batch((2, 3, 7, 4))
    ours, oracle = arguments(name, ref_logits, target)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        loss = fused_loss(hidden, head, target, objective=name, **ours)
    _, truth = oracle_in(torch.float64, name, hidden, head, target, oracle)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(hidden, head)), truth)


@impls
@pytest.mark.parametrize(("lengths", "path"), [((12, 24, 13), "single"), ((4, 28, 3), "two_pass")], ids=str)
def test_pairs_longer_than_the_chunk(lengths, path, impl):
    """Where most tokens are in such pairs two passes are taken; a single pass sweeps one that is too long twice."""
    hidden, head, target, ref_logits = batch((6, 15, 31, 5), masked=False)
    for pair, length in enumerate(lengths):
        target[pair, (length + 1) // 2 :] = target[pair + 3, length // 2 :] = -100
    ref, spec = ref_scores(ref_logits, target), OBJECTIVES["dpo"]
    head_sizes = sizes(31, 5, torch.float64, torch.float64, "cpu", impl)
    workspace = next(w for w in range(1 << 10, 1 << 16, 8) if fits(head_sizes, w, 90) == 16)
    counts = tokens_of_units(spec, make_layout(target, None, -100), None, Checks())
    assert counts() == [*lengths]
    chosen, _ = plan_call(hidden, head, How(impl, workspace=workspace), spec=spec, unit_tokens=counts)
    assert chosen.path == path
    assert ("in a pair longer than a single pass's chunk of 16 rows" in chosen.reason) == (path == "two_pass")
    whole, chunked = (dpo_loss(hidden, head, target, ref=ref, workspace=w, impl=impl) for w in (1 << 29, workspace))
    torch.testing.assert_close(whole, chunked)
    assert ["rgpb_loss" in x.grad_fn.name() for x in (whole, chunked)] == [True, path == "single"]
    for a, b in zip(*(torch.autograd.grad(x, [hidden, head.weight]) for x in (whole, chunked))):
        torch.testing.assert_close(a, b)


def test_lengths_are_asked_for_only_where_they_decide():
    """Reading them is a synchronisation on a GPU. What doesn't fit one chunk of padded rows may be one of the kept."""
    llama = sizes(128256, 4096, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_90")

    def never():
        raise AssertionError("asked")

    for request in (
        {"weight_grad": False}, {"scalar": False}, {"half": True}, {"workspace": 512 << 20}, {"couples": "batch"},
        {"hidden_grad": False, "weight_grad": False},
    ):  # fmt: skip
        plan(32768, llama, **{"couples": "pair", "workspace": 4 << 30, "unit_tokens": never, **request})
    plan(4096, llama, couples="pair", workspace=4 << 30, unit_tokens=never)  # all is one chunk
    few, many = (
        plan(32768, llama, couples="pair", workspace=4 << 30, unit_tokens=lambda n=n: [n]) for n in (8000, 16000)
    )
    assert "longer than" not in few.reason
    assert many.reason.startswith("most tokens are in a pair longer than a single pass's chunk of ")


def fits(head, workspace, tokens):
    try:
        return single_chunk(head, workspace, tokens)[0]
    except ValueError:
        return 0


@impls
def test_bitwise_the_same_again(impl):
    hidden, head, target, ref_logits = batch((4, 50, 211, 16), torch.float32)
    ref = ref_scores(ref_logits, target)
    runs = []
    for _ in range(2):
        loss = bnf_loss(hidden, head, target, torch.tensor([1, -1, 1, -1]), ref=ref, workspace=1 << 16, impl=impl)
        runs.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@impls
@pytest.mark.parametrize("path", ["single", "two_pass", "frozen"])
def test_rows_of_the_head_with_a_large_part_in_common(path, impl):
    """Σ q_k w_k − w_y nearly cancels then; rounding the sum to 16 bits first would lose it."""
    dtype = torch.bfloat16
    hidden, head, target, _ = batch((2, 8, 61, 16), dtype, masked=False)
    weight = (0.2 * head.weight.detach().float() + 6 * torch.randn(16)).to(dtype).requires_grad_()
    hidden = (0.1 * hidden.detach()).requires_grad_()
    _, gradients = run_path(path, "mle", hidden, LMHead(weight), target, impl=impl)
    _, truth = oracle_in(torch.float64, "mle", hidden, LMHead(weight), target, {})
    error = (gradients[0].double() / 1.5 - truth[0]).norm() / truth[0].norm()
    if impl == "cpp" and cpp_rows.BF16_PRODUCTS:  # q is rounded to an operand then, as it is on a GPU
        _, naive = oracle_in(dtype, "mle", hidden, LMHead(weight), target, {})
        assert error < 0.5 * (naive[0].double() - truth[0]).norm() / truth[0].norm()
    else:
        assert error < 3 * torch.finfo(dtype).eps


def test_parts_of_a_token_objective_with_a_reference_add_up():
    hidden, head, target, ref_logits = batch((4, 9, 23, 5))
    ref = ref_scores(ref_logits, target)
    objective("ratio_of_this_test", couples="token", ref="tokens")(lambda r: -r.log_ratios())
    try:
        whole, parts = (
            fused_loss(hidden, head, target, objective="ratio_of_this_test", ref=ref, workspace=w)
            for w in (1 << 29, small((4, 9, 23, 5)))
        )
        torch.testing.assert_close(whole, parts)
    finally:
        del OBJECTIVES["ratio_of_this_test"]


@impls
def test_bnf_of_an_impossible_token_is_finite(impl):
    hidden, head, target, ref_logits = batch((2, 3, 11, 4), head="bias", masked=False)
    bias = head.bias.detach().clone()
    bias[target[0, 0]] = -torch.inf
    label = torch.tensor([1, -1])
    ref = ref_scores(ref_logits, target)
    loss = bnf_loss(hidden, LMHead(head.weight, bias), target, label, ref=ref, impl=impl)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, head.weight)[0]).all()


def test_autocast_leaves_float64_alone():
    hidden, head, target, _ = batch((2, 5, 31, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logprob(hidden, head, target).logp.dtype == torch.float64


@impls
def test_autocast_scores_as_the_weight_is(impl):
    hidden, head, target, _ = batch((2, 5, 31, 8), torch.float32)
    exact = linear_logprob(hidden.bfloat16().float(), head, target, impl=impl).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logprob(hidden.bfloat16(), head, target, impl=impl).logp
        same = linear_logprob(hidden, head, target, impl=impl).logp
    torch.testing.assert_close(mixed, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(same, linear_logprob(hidden, head, target, impl=impl).logp, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(mixed.sum(), head.weight)
    assert gradient.dtype == torch.float32


@impls
@pytest.mark.parametrize("workspace", [1 << 29, small((1, 4096, 11, 4))], ids=["whole", "in chunks"])
def test_a_row_that_many_targets_share_gets_all_of_its_gradient(workspace, impl):
    """Of 16 bits, 256 + 1 is 256: findings/torch_embedding_gradient_bf16.sh."""
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight, target = torch.zeros(11, 4, dtype=torch.bfloat16, requires_grad=True), torch.zeros(4096, dtype=torch.int64)
    linear_logprob(hidden, weight, target, impl=impl, workspace=workspace).logp.sum().backward()
    expected = torch.full((11, 4), -4096 / 11)
    expected[0] += 4096
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-8, atol=0)


# the C++ kernels have no float16
SIXTEEN = {"float16 torch": (torch.float16, "torch"), **{f"bfloat16 {i}": (torch.bfloat16, i) for i in IMPLS}}


@pytest.mark.parametrize(("how", "path", "head"), covering(2, how=SIXTEEN, path=PATHS, head=HEADS))
def test_sixteen_bit_operands_as_on_cuda(monkeypatch, how, path, head):
    """16-bit dlogits in the logits' own bytes and float32 results, as on CUDA; the products are emulated here."""
    dtype, impl = SIXTEEN[how]
    from rgpb.engine import chunks as chunking

    def emulated(a, b, out, accumulate=False):
        assert a.dtype == b.dtype == dtype
        product = (a.float() @ b.float()).to(out.dtype)
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(chunking, "gemm_dtype", lambda device_type, weight, compute, impl: compute)
    monkeypatch.setattr(matmul, "mm", emulated)
    hidden, lm_head, target, ref_logits = batch(SHAPES["V and H off every tile"], dtype, head)
    ours, oracle = arguments("bnf", ref_logits, target)
    loss, gradients = run_path(path, "bnf", hidden, lm_head, target, impl=impl, **ours)
    exact, exact_gradients = oracle_in(torch.float64, "bnf", hidden, lm_head, target, oracle)
    assert abs(loss - exact) < 1e-5
    _, naive_gradients = oracle_in(dtype, "bnf", hidden, lm_head, target, oracle)
    for gradient, rough, truth in zip(gradients, naive_gradients, exact_gradients):
        assert_in_budget(gradient, 1.5 * rough, 1.5 * truth, dtype)


@impls
@pytest.mark.parametrize("workspace", [1 << 29, small(SHAPES["V and H off every tile"])], ids=["whole", "in chunks"])
@pytest.mark.parametrize("name", ["mle", "nll_pll", "unlikelihood", "bnf", "dpo", "simpo", "swepo", "kto"])
def test_without_validation_the_results_are_the_same(name, workspace, impl):
    """Ignored positions are computed, and count as little."""
    hidden, head, target, ref_logits = batch(SHAPES["V and H off every tile"], head="bias")
    ours, _ = arguments(name, ref_logits, target)
    runs = []
    for validate in (True, False):
        loss, metrics = fused_loss(
            hidden, head, target, objective=name, impl=impl, workspace=workspace, validate=validate,
            return_metrics=True, **ours,
        )  # fmt: skip
        runs.append([loss, *metrics.values(), *torch.autograd.grad(loss, leaves(hidden, head))])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


def test_without_validation_no_memory_is_kept():
    """A graph that is replayed would write into what others hold by then."""
    hidden, head, target, _ = batch(SHAPES["V and H off every tile"])
    held = []
    for validate in (False, True):
        with Workspace() as kept:
            fused_loss(hidden, head, target, objective="mle", validate=validate)
        held.append(kept.held > 0)
    assert held == [False, True]


@impls
def test_scores_without_validation_are_the_same(impl):
    hidden, head, target, _ = batch(SHAPES["V and H off every tile"], head="bias")
    runs = []
    for validate in (True, False):
        scores = linear_logprob(hidden, head, target, impl=impl, entropy=True, validate=validate)
        total = sum(x.sin().sum() for x in scores)
        runs.append([*scores, *torch.autograd.grad(total, leaves(hidden, head))])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["single", "two_pass"])
@pytest.mark.parametrize("one_dtype", [False, True], ids=["torch 2.10", "torch 2.8"])
def test_sums_of_products_whether_or_not_cuda_adds_them(monkeypatch, path, one_dtype):
    """float32 sums over chunks of 16-bit operands: by `addmm`, or by `mm` and an addition, a few rows at a time."""
    shape = *_, V, H = (4, 30, 131, 13)
    hidden, head, target, ref_logits = batch(shape, torch.bfloat16, "bias")
    ours, oracle = arguments("bnf", ref_logits, target)
    monkeypatch.setattr(matmul, "ADDED_BYTES", 50 * shape[-1] * 4)
    workspace = small(shape, torch.bfloat16) - V * H * 8  # without what converted slices take
    with counted(monkeypatch, one_dtype=one_dtype) as found:
        _, gradients = run_path(path, "bnf", hidden, head, target, impl="torch", workspace=workspace, **ours)
    assert found.launches.count("mm") > 3, found  # several chunks
    assert ("addmm" in found.launches) != one_dtype, found
    _, exact = oracle_in(torch.float64, "bnf", hidden, head, target, oracle)
    _, naive = oracle_in(torch.bfloat16, "bnf", hidden, head, target, oracle)
    for gradient, rough, truth in zip(gradients, naive, exact):
        assert_in_budget(gradient, 1.5 * rough, 1.5 * truth, torch.bfloat16)


# -- adversarial values -----------------------------------------------------------------------------------------------


def confident(margin, dtype):
    """One hidden unit that drives the target's logit `margin` above all others together."""
    V = 50
    weight = torch.zeros(V, 2, dtype=dtype)
    weight[3, 0] = 1.0
    weight[:, 1] = torch.linspace(-0.5, 0.5, V).to(dtype)
    hidden = torch.tensor([[margin + math.log(V), 0.25]] * 4, dtype=dtype).view(2, 2, 2)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.full((2, 2), 3)


# 1 − p in float32 is whole; has no digit left; is below the least number; e^margin overflows also in float64
@pytest.mark.parametrize(("name", "margin", "impl"), covering(2, name=NAMES, margin=(0.0, 17.0, 80.0, 1e4), impl=IMPLS))
def test_confident_tokens(name, margin, impl):
    """p → 1: log(1 − p) down to −1e4, where a float32 log p knows nothing of it."""
    hidden, weight, target = confident(margin, torch.float32)
    ref_logits = reference.logits(hidden.detach().double() * 0.9, weight.detach().double())
    ours, oracle = arguments(name, ref_logits, target)
    loss = fused_loss(hidden, weight, target, objective=name, impl=impl, **ours)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    exact, exact_gradients = oracle_in(torch.float64, name, hidden, LMHead(weight), target, oracle)
    assert all(g.isfinite().all() for g in (loss, *gradients))
    if name == "orpo" and margin > 700:  # float64 itself has no e⁻⁷⁴⁶ for the oracle's odds; here they are equal
        torch.testing.assert_close(loss.double(), 0.1 * exact.new_tensor(2).log())
        return
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for gradient, truth in zip(gradients, exact_gradients):
        # what cancels between the responses: a coefficient (1 / β of sppo) times 1 − p, or for the odds ratio λ itself
        cancels = 0.1 if name == "orpo" else (10 if name == "sppo" else 1) / (1 + math.exp(min(margin, 700)))
        size = max(truth.abs().max().item(), cancels * hidden.abs().max().item())
        # the oracle's own p − onehot is off by 1e-16 for each token
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-6 * size + 1e-15)


@impls
def test_log_odds_of_a_saturated_token_are_exact(impl):
    hidden, weight, target = confident(40.0, torch.float32)
    scores = linear_logprob(hidden, weight, target, impl=impl)
    exact = reference.token_scores(hidden.detach().double(), weight.detach().double(), target)["log_odds"]
    assert scores.logp.abs().max() < 1e-15
    torch.testing.assert_close(scores.log_odds.double(), exact, rtol=1e-6, atol=0)


@impls
def test_underflowing_policy_and_reference(impl):
    """log p and log π_ref far below what exp can show (−103 in float32): the ratio of odds is still there."""
    hidden, head, target, _ = batch((2, 3, 11, 4), torch.float32)
    shifted = head.weight.detach().clone()
    shifted[0] = 200 * hidden.detach().view(-1, 4).mean(0)
    hidden = (torch.ones(2, 3, 4) * hidden.detach().view(-1, 4).mean(0)).requires_grad_()
    weight, target = shifted.requires_grad_(), torch.full((2, 3), 5)
    policy = linear_logprob(hidden, weight, target, impl=impl).logp
    ref = policy.detach() + torch.tensor([[0.5, -0.5, 0.0], [1.0, -1.0, 2.0]])
    label = torch.tensor([1, -1])
    loss = bnf_loss(hidden, weight, target, label, ref=ref, impl=impl)
    gradient = torch.autograd.grad(loss, weight)[0]
    exact, (_, truth) = oracle_in(
        torch.float64, "bnf", hidden, LMHead(weight), target, {"ref": ref.double(), "label": label}
    )
    assert policy.max() < -40
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item())


@impls
def test_reference_at_minus_120(impl):
    hidden, head, target, _ = batch((2, 3, 11, 4), torch.float32)
    label, ref = torch.tensor([1, -1]), torch.full((2, 3), -120.0)
    loss = bnf_loss(hidden, head, target, label, ref=ref, impl=impl)
    exact, gradients = oracle_in(torch.float64, "bnf", hidden, head, target, {"ref": ref.double(), "label": label})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    made = torch.autograd.grad(loss, [hidden, head.weight])
    for a, b in zip(made, gradients):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@impls
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size, impl):
    """Logits at ±1e4, also in whole rows (a shift of all logits changes nothing but the last bits)."""
    hidden, head, target, _ = batch((2, 5, 23, 4), head="bias")
    shifted = LMHead(head.weight, (head.bias.detach() + size).requires_grad_())
    a, b = (linear_logprob(hidden, h, target, entropy=True, impl=impl) for h in (head, shifted))
    torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-8)
    torch.testing.assert_close(a.entropy, b.entropy, rtol=0, atol=1e-8)
    spread = linear_logprob(hidden * size, head, target, impl=impl)
    exact = reference.token_scores(hidden * size, head, target)
    torch.testing.assert_close(spread.log_odds, exact["log_odds"], rtol=1e-12, atol=1e-9)
    gradient = torch.autograd.grad(mle_loss(hidden * size, head, target, impl=impl), hidden)[0]
    truth = torch.autograd.grad(reference.mle(hidden * size, head, target), hidden)[0]
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-6)


@impls
def test_tokens_that_the_bias_rules_out(impl):
    """A padded vocabulary: entries at −inf have probability 0 and no gradient, also through the entropy."""
    hidden, head, target, _ = batch((2, 5, 13, 4), head="bias")
    bias = head.bias.detach().clone()
    bias[9:] = -torch.inf
    target = target.clamp(max=8)
    ours = linear_logprob(hidden, LMHead(head.weight, bias), target, entropy=True, impl=impl)
    small_head = LMHead(head.weight[:9].detach().requires_grad_(), bias[:9])
    exact = linear_logprob(hidden, small_head, target, entropy=True, impl=impl)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b)
    made = torch.autograd.grad(ours.logp.sum() + ours.entropy.sum(), [hidden, head.weight])
    truth = torch.autograd.grad(exact.logp.sum() + exact.entropy.sum(), [hidden, small_head.weight])
    torch.testing.assert_close(made[0], truth[0])
    torch.testing.assert_close(made[1][:9], truth[1])
    assert not made[1][9:].any()


@pytest.mark.parametrize(
    ("name", "dtype", "reduction", "impl"),
    covering(2, name=NAMES, dtype=FLOATS[:2], reduction=("mean", "none"), impl=IMPLS),
)
def test_all_masked_is_a_differentiable_zero(name, dtype, reduction, impl):
    hidden, head, target, ref_logits = batch((2, 3, 7, 4), dtype, head="bias")
    ours, _ = arguments(name, ref_logits, target)
    how = {"objective": name, "reduction": reduction, "impl": impl}
    loss = fused_loss(hidden, head, torch.full_like(target, -100), **how, **ours)
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), leaves(hidden, head)):
        assert not gradient.any()


def test_no_tokens_at_all():
    head = torch.randn(7, 4, requires_grad=True)
    hidden = torch.randn(0, 4, requires_grad=True)
    scores = linear_logprob(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert scores.logp.shape == (0,)
    empty = mle_loss(torch.randn(2, 0, 4, requires_grad=True), head, torch.zeros(2, 0, dtype=torch.int64))
    assert empty == 0
    assert not torch.autograd.grad(empty, head)[0].any()


@pytest.mark.parametrize(
    ("name", "shape", "reduction"), covering(2, name=NAMES, shape=((0, 3), (4, 0)), reduction=("mean", "none"))
)
def test_no_response_or_no_position(name, shape, reduction):
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    given, spec = {}, OBJECTIVES[name]
    if spec.ref:
        given["ref"] = TokenScores(*(torch.zeros(shape) for _ in range(3)))
    if spec.label:
        given["label"] = torch.ones(shape[0])
    if spec.unit == "group":
        given |= {"rewards": torch.zeros(shape[0] // 2, 2)} if spec.rewards else {"group_size": 2}
    loss = fused_loss(
        hidden, weight, torch.zeros(shape, dtype=torch.int64), objective=name, reduction=reduction, **given
    )
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))


@pytest.mark.parametrize(("name", "path", "impl"), covering(2, name=NAMES, path=PATHS, impl=IMPLS))
def test_a_vocabulary_of_one(name, path, impl):
    """V = 1: p = 1 whatever happens; log p is 0 and so is every gradient. Only log(1 − p) is −inf, as it should be."""
    hidden, head, target, ref_logits = batch((2, 3, 1, 4), masked=False)
    ours, _ = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, head, target, impl=impl, **ours)
    assert loss == torch.inf if name.endswith("unlikelihood") else torch.isfinite(loss)
    for gradient in gradients:
        assert not gradient.any()
    if name == "mle":
        assert not linear_logprob(hidden, head, target, entropy=True, impl=impl).entropy.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_no_preferred_or_no_rejected_response(sign):
    hidden, head, target, ref_logits = batch((3, 4, 9, 4))
    label = torch.full((3,), sign)
    loss, metrics = bnf_loss(hidden, head, target, label, ref=ref_scores(ref_logits, target), return_metrics=True)
    exact = reference.bnf(hidden, head, target, label=label, ref_logits=ref_logits)
    torch.testing.assert_close(loss, exact)
    assert math.isnan(metrics["logps/rejected" if sign > 0 else "logps/chosen"])


def test_a_target_that_dwarfs_the_others_in_float16(monkeypatch):
    """∂lse/∂z_y = p against ∂lse/∂z_k = p_k: a ratio of e²⁰ or e³⁰, and float16 ends at 65504."""
    from rgpb.engine import chunks as chunking

    def emulated(a, b, out, accumulate=False):
        product = (a.float() @ b.float()).to(out.dtype)
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(chunking, "gemm_dtype", lambda device_type, weight, compute, impl: compute)
    monkeypatch.setattr(matmul, "mm", emulated)
    for margin in (5.0, 20.0, 30.0):
        hidden, weight, target = confident(margin, torch.float16)
        made = torch.autograd.grad(linear_logprob(hidden, weight, target, impl="torch").lse.sum(), [hidden, weight])
        h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
        exact = torch.autograd.grad(reference.logits(h, w).logsumexp(-1).sum(), [h, w])
        for a, b in zip(made, exact):
            torch.testing.assert_close(a.double(), b, rtol=4e-3, atol=4e-3 * b.abs().max().item())


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_names_the_cheapest_path():
    head = sizes(32000, 512, torch.float32, torch.float32, "cpu")
    assert plan(2048, head, couples="token").path == "single"
    assert plan(2048, head, couples="token").units == 3
    assert plan(2048, head, couples="batch")[0::2] == ("two_pass", 4, *plan(2048, head, couples="batch")[4::2])
    assert plan(2048, head, couples="token", scalar=False).path == "two_pass"
    assert plan(2048, head, weight_grad=False).units == 2
    assert plan(2048, head, hidden_grad=False, weight_grad=False).units == 1
    llama = sizes(128256, 4096, torch.bfloat16, torch.bfloat16, "cuda")
    small_space, large_space = (plan(8192, llama, couples="token", workspace=w) for w in (512 << 20, 4 << 30))
    assert (small_space.path, large_space.path) == ("two_pass", "single")
    assert "sum of dW" in small_space.reason
    assert plan(8192, llama, couples="token", half=True, workspace=8 << 30).path == "two_pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_stays_inside_the_workspace_for_any_number_of_tokens(dtype, device):
    for vocab, width in ((32000, 512), (128256, 4096), (1, 1)):
        head = sizes(vocab, width, dtype, dtype, device)
        for couples in ("token", "batch"):
            held = {
                plan(tokens, head, couples=couples, workspace=64 << 20).extra_bytes for tokens in (1 << 14, 1 << 20)
            }
            assert max(held) <= 64 << 20


@pytest.mark.parametrize(
    ("total", "most"), [(2048, 512), (520, 512), (1100, 512), (17, 3), (100, 99), (5, 512), (0, 5)]
)
def test_chunks_are_even(total, most):
    """As few as fit, none much shorter than the others: each reads all of the weight."""
    lengths = [part.stop - part.start for part in even_spans(total, most)]
    assert sum(lengths) == total
    assert len(lengths) == -(-total // most)
    assert max(lengths, default=0) <= most
    if most % 16 == 0 and lengths:
        assert max(lengths) - min(lengths) <= 16 * len(lengths)


LLAMA = sizes(128256, 4096, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_90")


@pytest.mark.parametrize(
    ("path", "workspace"), [("single", 4 << 30), *((path, 1 << n) for path in ("two_pass", "frozen") for n in (29, 31))]
)
def test_chunks_on_a_gpu_are_whole_tiles_in_full_waves(path, workspace):
    """Rows of logits, and of the E that is multiplied at once, but for the last of each."""
    held = chunks(LLAMA, workspace, path)
    for tokens in (8192, 8200, 20000):
        chunk, together = held.sweep_for(tokens)
        spans = list(chunk_spans(tokens, chunk, together, held.even))
        assert sum(span.stop - span.start for span in spans) == tokens
        assert all(span.start % 128 == 0 for span in spans)
        assert all(span.stop % 128 == 0 or span.stop == tokens for span in spans)
        if together < tokens:
            assert together % 128 == 0
            assert wave_efficiency(together, 4096, 132) >= 0.9
        assert wave_efficiency(chunk, 128256, 132) >= 0.9


def test_chunks_of_the_default_workspace():
    held = chunks(LLAMA, 512 << 20, "frozen")
    _, together = held.sweep_for(8192)
    assert [span.stop - span.start for span in chunk_spans(8192, together, together, held.even)] == [1024] * 8
    assert plan(8192, LLAMA, couples="token", workspace=4 << 30).together == 8192  # no float32 sum of dW
    assert plan(8192, LLAMA, couples="token", workspace=4 << 30).extra_bytes < 2.6 * 2**30


@pytest.mark.parametrize("impl", ["triton", "tiled", "torch"])
@pytest.mark.parametrize("workspace", [24 << 20, 512 << 20, 4 << 30])
@pytest.mark.parametrize("shape", [(128256, 4096), (32003, 512), (257, 16384)])
def test_what_a_gpu_holds_is_inside_the_workspace(shape, workspace, impl):
    """The buffers that a call's loops take, and what the plan says of it, whatever the number of tokens."""
    head = sizes(*shape, torch.bfloat16, torch.bfloat16, "cuda", impl, arch="sm_90")
    rows = -(-shape[0] // 16) * 16
    for tokens in (1, 100, 1000, 8192, 1 << 17):
        for request in ({"couples": "token"}, {"couples": "batch"}, {"weight_grad": False}):
            try:
                made = plan(tokens, head, workspace=workspace, **request)
            except ValueError:
                continue
            assert made.extra_bytes <= workspace
            held = chunks(head, workspace, made.path)
            assert held.sweep_for(tokens) == (made.rows, made.together)
            sum_of_dw = 4 * shape[0] * shape[1] * (made.path == "single" and made.together < tokens)
            taken = rows * (head.logit * made.rows + 2 * made.together * held.apart) + sum_of_dw
            assert taken <= made.extra_bytes
            if made.path == "two_pass":
                columns, chunk, together = held.slice_for(tokens)
                assert columns % 16 == 0 or columns == shape[0]
                assert columns * (head.logit * chunk + 2 * together * held.apart) <= workspace


def test_waves_of_products():
    """[128 × 256] tiles on 132 multiprocessors: 112, 128, 256 in two waves; smaller ones where these fill more."""
    assert wave_efficiency(1024, 4096, 132) == 128 / 132
    assert wave_efficiency(2048, 4096, 132) == 256 / 264
    assert wave_efficiency(896, 4096, 132) == 112 / 132
    assert wave_efficiency(512, 4096, 132) == PRODUCT_TILES[128, 128] * 128 / 132
    assert wave_efficiency(100, 4096, 132) < wave_efficiency(128, 4096, 132)
    assert wave_efficiency(100, 4096, 0) == 1


def test_predictions_count_what_moves():
    """Doubling a rate saves what goes at it, and no more."""
    rates, job = RATES["sm_90"], ("single", 3, 8192, (640, 8192), 4 << 30)
    whole = predicted_seconds(LLAMA, rates, *job)
    logits = 8192 * 128256
    saved = whole - predicted_seconds(LLAMA, rates._replace(copy=2 * rates.copy), *job)
    assert saved == pytest.approx(logits * 10 / rates.copy / 2)  # written, read, and 16 bits written
    saved = whole - predicted_seconds(LLAMA, rates._replace(library=2 * rates.library), *job)
    products = 3 * 2 * logits * 4096 / rates.library
    assert products < 2 * saved < 1.03 * products
    summed = predicted_seconds(LLAMA, rates, "single", 3, 8192, (640, 4096), 4 << 30) - whole
    assert summed == pytest.approx(128256 * 4096 * (4 * 3 + 6) / rates.copy, rel=0.1)
    slow = rates._replace(clock=rates.clock / 10)
    assert predicted_seconds(LLAMA._replace(softcap=True), slow, *job) > predicted_seconds(LLAMA, slow, *job) > whole


def test_on_a_gpu_the_plan_compares_times():
    """Path and engine are those with the least predicted time among those that fit."""
    pythia, llama = (
        sizes(vocab, width, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_90")
        for vocab, width in ((50304, 2560), (128256, 4096))
    )
    tight, wide = (plan(8192, pythia, ("triton", "tiled"), couples="token", workspace=w) for w in (1 << 30, 4 << 30))
    assert (tight.path, wide.path) == ("single", "single")
    many_chunks = plan(8192, pythia, couples="token")
    assert many_chunks.path == "two_pass"
    assert "sum of dW over many chunks" in many_chunks.reason
    for request in ({"couples": "token"}, {"weight_grad": False}, {"weight_grad": False, "hidden_grad": False}):
        each = [plan(8192, llama, (impl,), **request).seconds for impl in ("triton", "tiled")]
        assert plan(8192, llama, ("triton", "tiled"), **request).seconds == min(each)
    small_head = sizes(2, 4096, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_120")
    request = {"couples": "batch", "skipping": True, "workspace": 112_000}
    with pytest.raises(ValueError, match="workspace: expected at least"):
        plan(8192, small_head, ("tiled",), **request)
    assert (
        plan(8192, small_head, ("triton", "tiled"), **request).impl == "triton"
    )  # what fits, whatever the other lacks
