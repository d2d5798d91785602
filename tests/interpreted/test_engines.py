"""Both engines through the Triton kernels in the interpreter, as `tests/test_engine.py` has them in torch.

16-bit operands are multiplied as on CUDA: float32 results, emulated here. Flags are covered by pairs of values.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from covering import covering
from engine_suite import (
    HEADS,
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
from skipping_suite import check_rows
from triton.runtime import interpreter

from rgpb import OBJECTIVES, LMHead, TokenScores, fused_loss, linear_logprob, reference
from rgpb.bench.measure import Result, peak_memory
from rgpb.engine import chunks as chunking
from rgpb.engine.call import Tensors
from rgpb.fused import bnf_loss, dpo_loss
from rgpb.kernels import matmul, triton_scale
from rgpb.validation import How, make_call

IMPLS = ("triton", "tiled")
SHAPE = (3, 5, 141, 24)  # several blocks and tiles along V, two tiles of rows, H off the tile of 16


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Products of 16-bit operands with results of any dtype."""

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype
        wide = a.double() @ b.double()
        out.copy_(out + wide if accumulate else wide)

    monkeypatch.setattr(chunking, "gemm_dtype", lambda device_type, weight, compute, impl: compute)
    monkeypatch.setattr(matmul, "mm", product)


@pytest.mark.parametrize(
    ("name", "path", "head", "impl"),
    covering(2, name=("nll_pll", "unlikelihood", "bnf", "dpo", "swepo"), path=PATHS, head=HEADS, impl=IMPLS),
)
def test_float64_paths_equal_the_oracle(name, path, head, impl):
    hidden, lm_head, target, ref_logits = batch((4, 3, *SHAPE[2:]), head=head)
    ours, oracle = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, lm_head, target, impl=impl, **ours)
    exact, exact_gradients = oracle_in(torch.float64, name, hidden, lm_head, target, oracle)
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)
    for gradient, truth in zip(gradients, exact_gradients):
        torch.testing.assert_close(gradient, 1.5 * truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "path", "head"), covering(1, name=("bnf", "dpo"), path=PATHS, head=HEADS))
def test_one_sweep_equals_the_oracle(apart, name, path, head):
    """The row kernels' weights, in float64."""
    test_float64_paths_equal_the_oracle(name, path, head, "triton")


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOW = {"dtype": ("float32", "bfloat16"), "impl": IMPLS, "path": PATHS, "name": ("bnf", "dpo")}
FLOAT16 = {"dtype": ("float16",), "impl": ("triton",), "path": PATHS, "name": ("bnf",)}  # tiles refuse it


@pytest.mark.parametrize(("dtype", "impl", "path", "name"), covering(2, **HOW) + covering(2, **FLOAT16))
def test_precision_is_within_the_budget(as_on_cuda, dtype, impl, path, name):
    dtype = FLOATS[dtype]
    hidden, head, target, ref_logits = batch((4, *SHAPE[1:]), dtype)
    ours, oracle = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, head, target, impl=impl, **ours)
    exact, exact_gradients = oracle_in(torch.float64, name, hidden, head, target, oracle)
    naive, naive_gradients = oracle_in(dtype, name, hidden, head, target, oracle)
    terms, _ = oracle_in(torch.float64, name, hidden, head, target, oracle, reduction="none")
    assert_in_budget(loss, naive, exact, torch.float32, scale=terms.abs().max().item())
    for gradient, rough, truth in zip(gradients, naive_gradients, exact_gradients):
        assert gradient.dtype == dtype
        assert_in_budget(gradient, 1.5 * rough, 1.5 * truth, dtype)


def test_float16_gradients_are_not_for_tiles(as_on_cuda):
    hidden, head, target, _ = batch(SHAPE, torch.float16)
    with pytest.raises(ValueError, match=r"impl: expected another for float16 gradients"):
        run_path("single", "mle", hidden, head, target, impl="tiled")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_log_probs_of_any_dtype_are_right_to_1e_5(as_on_cuda, dtype, impl):
    hidden, head, target, _ = batch((2, 9, 307, 40), dtype, head="bias")
    h, w, b = (x.detach() for x in leaves(hidden, head))
    scores = linear_logprob(h, LMHead(w, b), target, entropy=True, impl=impl)
    exact = reference.token_scores(h.double(), LMHead(w.double(), b.double()), target)
    for field in ("logp", "log_odds", "lse", "entropy", "other_entropy"):
        assert (getattr(scores, field).double() - exact[field]).abs().max() <= 1e-5, field


@pytest.mark.parametrize(
    ("head", "impl"),
    [
        ("bias", "triton"),
        ("soft-cap and scale", "tiled"),
        pytest.param("bias", "tiled", marks=pytest.mark.full),
        pytest.param("soft-cap and scale", "triton", marks=pytest.mark.full),
    ],
)
def test_gradients_of_every_score(head, impl):
    """gradcheck, with the entropy's gradient, in many chunks."""
    shape = (2, 3, 7, 3)
    hidden, lm_head, target, _ = batch(shape, head=head)

    def scores(h, w, *b):
        head = LMHead(w, b[0] if b else None, lm_head.softcap, lm_head.scale)
        return tuple(linear_logprob(h, head, target, entropy=True, impl=impl, workspace=small(shape)))

    assert torch.autograd.gradcheck(scores, leaves(hidden, lm_head), fast_mode=True)


@pytest.mark.compile
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.full), "tiled"])
def test_operators_pass_opcheck(impl):
    hidden, head, target, _ = batch((1, 6, 70, 4))
    h, how = hidden.detach().view(6, 4).requires_grad_(), How(impl, workspace=1 << 20)
    tensors = Tensors.of(h, head, target)._replace(hidden=h)  # a leaf
    torch.library.opcheck(torch.ops.rgpb.score, tensors.pack(make_call(h, head, how, -100)._replace(accumulate=False)))
    static = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others compare, and NaN ≠ NaN
    skip = make_call(h, head, how._replace(grad_tolerance=0.1, sort_vocab=True), -100)._replace(accumulate=False)
    plain = tensors._replace(hidden=h.detach(), weight=head.weight.detach())
    torch.library.opcheck(torch.ops.rgpb.score, plain.pack(skip), test_utils=static)
    call = make_call(h, head, how, -100, spec=OBJECTIVES["mle"])
    torch.library.opcheck(torch.ops.rgpb.loss, tensors._replace(tokens=(target != -100).sum(1)).pack(call))


def test_the_loss_in_the_kernel_equals_the_objective(monkeypatch):
    """Every objective with `terms`, against its own function on the same kernels, in chunks."""
    named = {name: spec for name, spec in OBJECTIVES.items() if spec.terms is not None}
    assert set(named) == {"mle", "nll_pll", "unlikelihood", "bnf"}
    shape = (4, 3, 70, 6)
    hidden, head, target, ref_logits = batch(shape, head="bias")
    for name, spec in named.items():
        options = {"length_normalize": False} if "length_normalize" in spec.options else {}
        options |= {"alpha": 0.3} if "alpha" in spec.options else {}
        ours, _ = arguments(name, ref_logits, target)
        runs = []
        for known in (spec, spec._replace(terms=None)):
            monkeypatch.setitem(OBJECTIVES, name, known)
            loss = fused_loss(
                hidden, head, target, objective=name, impl="triton", workspace=small(shape), **ours,
                **options,
            )  # fmt: skip
            runs.append([loss, *torch.autograd.grad(loss, leaves(hidden, head))])
        for a, b in zip(*runs):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("margin", "path", "impl"), covering(2, margin=(0.0, 30.0, 200.0), path=PATHS, impl=IMPLS))
def test_confident_tokens_and_rows_that_rise_above_their_first_tile(margin, path, impl):
    """A logit far above the first tile's maximum: the tiled engine takes such a chunk again."""
    hidden, head, target, ref_logits = batch((2, 4, 141, 6), torch.float32)
    weight = head.weight.detach().clone()
    weight[100] = margin * hidden.detach().view(-1, 6).sign()[0] / hidden.detach().view(-1, 6)[0].abs().sum()
    head = LMHead(weight.requires_grad_())
    target[0, 0] = 100
    ours, oracle = arguments("bnf", ref_logits, target)
    loss, gradients = run_path(path, "bnf", hidden, head, target, impl=impl, **ours)
    exact, truth = oracle_in(torch.float64, "bnf", hidden, head, target, oracle)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, truth):
        torch.testing.assert_close(a.double(), 1.5 * b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_tokens_and_masked_rows(impl):
    how = {"impl": impl}
    hidden, head, target, _ = batch((2, 5, 141, 4), head="bias")
    bias = head.bias.detach().clone()
    bias[:70] = -torch.inf  # the whole first tile and more
    target = torch.where(target >= 0, target.clamp(min=70), target)
    ours = linear_logprob(hidden, LMHead(head.weight, bias), target, entropy=True, **how)
    exact = linear_logprob(
        hidden, LMHead(head.weight[70:], bias[70:]), torch.where(target >= 0, target - 70, target), entropy=True
    )
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b)
    made = torch.autograd.grad(ours.logp.sum() + ours.entropy.sum(), [hidden, head.weight])
    truth = torch.autograd.grad(exact.logp.sum() + exact.entropy.sum(), [hidden, head.weight])
    for a, b in zip(made, truth):
        torch.testing.assert_close(a, b)
    hidden, head, target, ref_logits = batch((2, 3, 9, 4))
    masked = torch.full_like(target, -100)
    loss = dpo_loss(hidden, head, masked, ref=ref_scores(ref_logits, masked), **how)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [hidden, head.weight]))


@pytest.mark.parametrize(
    ("vocab", "name", "path", "impl"), covering(2, vocab=(1, 2), name=("bnf", "dpo"), path=PATHS, impl=IMPLS)
)
def test_tiny_vocabularies(vocab, name, path, impl):
    hidden, head, target, ref_logits = batch((2, 3, vocab, 4))
    ours, oracle = arguments(name, ref_logits, target)
    loss, gradients = run_path(path, name, hidden, head, target, impl=impl, **ours)
    if vocab == 1:
        assert torch.isfinite(loss)
        assert not any(g.any() for g in gradients)
        return
    exact, truth = oracle_in(torch.float64, name, hidden, head, target, oracle)
    torch.testing.assert_close(loss, exact)
    for a, b in zip(gradients, truth):
        torch.testing.assert_close(a, 1.5 * b)


@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_the_same_again(impl):
    hidden, head, target, ref_logits = batch((2, 9, 141, 16), torch.float32)
    ref = ref_scores(ref_logits, target)
    runs = []
    for _ in range(2):
        loss = bnf_loss(hidden, head, target, torch.tensor([1, -1]), ref=ref, impl=impl, workspace=1 << 16)
        runs.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [SHAPES["one token"], SHAPES["H = 1"]], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_small_shapes(shape, impl):
    hidden, head, target, ref_logits = batch(shape)
    ours, oracle = arguments("bnf", ref_logits, target)
    loss, gradients = run_path("single", "bnf", hidden, head, target, impl=impl, **ours)
    exact, truth = oracle_in(torch.float64, "bnf", hidden, head, target, oracle)
    torch.testing.assert_close(loss, exact)
    for a, b in zip(gradients, truth):
        torch.testing.assert_close(a, 1.5 * b)


SKIPPING = {"impl": IMPLS, "path": ("single", "two_pass"), "name": ("mle", "dpo")}


@pytest.mark.parametrize(("impl", "path", "name"), covering(2, **SKIPPING))
def test_skipping_is_certified(monkeypatch, impl, path, name):
    """As `tests/test_skipping.py` does in torch; the masses come from the Triton kernels here."""
    monkeypatch.setitem(chunking.MASS_TILE, "cpu", 64)
    sort_vocab = name == "dpo"
    metrics, largest = check_rows(name, 0.3, impl=impl, sort_vocab=sort_vocab, path=path, shape=(6, 5, 300, 32))
    assert 0.1 < metrics["skipped/share"] < 1
    assert largest > 1e-9


LONG = """
import torch
from rgpb.kernels import triton_rows
from rgpb.kernels.types import Epilogue
stride = 1_200_000_000
z = torch.empty(2 * stride + 256, dtype=torch.bfloat16).as_strided((3, 256), (stride, 1))  # 5 GB, hardly any touched
assert 2 * stride > 2**31
row = z[2].normal_()
scores, _ = triton_rows.statistics(z, torch.tensor([-1, -1, 7]), Epilogue(None, None, 1.0), False)
assert torch.allclose(scores.z_y[2], row[7].float())
others = row.float().clone()
others[7] = -torch.inf
assert torch.allclose(scores.lse_other[2], others.logsumexp(0))
"""


def test_offsets_beyond_32_bits():
    """In a process of its own: an address computed in 32 bits would be somewhere else and kill it."""
    made = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


def test_tuning_checks_times_and_keeps(tmp_path, monkeypatch):
    from rgpb.bench import tune
    from rgpb.bench.contest import Shape
    from rgpb.kernels import configs, tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile = configs.TILES[configs.INTERPRETED]["score"]
    monkeypatch.setitem(configs.TILES[configs.INTERPRETED], "score", [*tile, tile[0]._replace(vocab=32)])
    said = []
    rows = tune.sweep("cpu", said.append, Shape(5, 24, 70), torch.float32, rounds=1, keep=True)
    assert [row["kernel"] for row in rows] == ["score", "score", "weights", "gradients", "rows"]
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows)
    assert sum(row.get("chosen", False) for row in rows) == 4
    assert len(said) == 5
    monkeypatch.setattr(configs, "interpreted", lambda: False)  # as launches on a GPU read it
    monkeypatch.setattr(
        configs,
        "_key",
        lambda device, kernel, dtype: (
            f"interpreter, triton {configs.triton.__version__}, {kernel}" + (f", {dtype}" if dtype else "")
        ),
    )
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    for cached in (tuned._known, configs.rows, configs.tile):
        cached.cache_clear()
    assert configs.rows(torch.device("cpu")) == configs.ROWS[configs.INTERPRETED]
    tuned.file().write_text(f'{{"{configs._key(None, "rows", "")}": [1]}}')
    tuned._known.cache_clear()
    configs.rows.cache_clear()
    with pytest.raises(ValueError, match="tuned choices: expected a file of `rgpb tune`"):
        configs.rows(torch.device("cpu"))
    for cached in (tuned._known, configs.rows, configs.tile):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("rise", "path", "impl"),
    covering(2, rise=(36.0, 38.0, 45.0, 59.0, 61.0), path=("single", "two_pass", "frozen"), impl=IMPLS),
)
def test_rows_that_rise_above_their_first_tile_keep_the_others(rise, path, impl):
    """The largest two logits lie `rise` above the first tile; the target of the second row is neither."""
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    weight = torch.zeros(141, 1)
    weight[100:102] = rise
    head, target = LMHead(weight.requires_grad_()), torch.tensor([[100, 3]])
    _, gradients = run_path(path, "mle", hidden, head, target, impl=impl)
    _, truth = oracle_in(torch.float64, "mle", hidden, head, target, {})
    for a, b in zip(gradients, truth):
        torch.testing.assert_close(a.double(), 1.5 * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("others", [-100.0, -120.0])
def test_a_first_tile_without_a_possible_token(others, impl):
    hidden, weight = torch.ones(1, 1, 1, requires_grad=True), torch.zeros(141, 1, requires_grad=True)
    bias = torch.full((141,), others)
    bias[:64] = -torch.inf
    head, target = LMHead(weight, bias), torch.tensor([[100]])
    loss, gradients = run_path("single", "mle", hidden, head, target, impl=impl)
    exact, truth = oracle_in(torch.float64, "mle", hidden, LMHead(weight, bias), target, {})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for a, b in zip(gradients, truth):
        torch.testing.assert_close(a.double(), 1.5 * b.nan_to_num(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    """Targets, biases, references, hidden states and weights whose elements don't lie side by side."""
    hidden, head, target, ref_logits = batch((3, 4, 70, 6), head="bias")
    ref = ref_scores(ref_logits, target)

    def every_second(x):
        wide = torch.full((*x.shape, 2), 7, dtype=x.dtype)
        wide[..., 0] = x.detach()
        return wide[..., 0]

    label, offsets = torch.tensor([1, -1, 1]), torch.tensor([0, 4, 8, 12])
    flat = [hidden.detach().view(12, 6), head.weight.detach(), head.bias.detach(), target.view(-1)]
    packed = TokenScores(ref.logp.view(-1), ref.log_odds.view(-1), ref.lse.view(-1))
    runs = []
    for change in (lambda x: x, every_second):
        h, w, b, y = (change(x) for x in flat)
        h, w = h.requires_grad_(), w.requires_grad_()
        loss = bnf_loss(
            h, LMHead(w, b), y, label, ref=TokenScores(*(change(x) for x in packed[:3])), cu_seqlens=offsets,
            impl=impl,
        )  # fmt: skip
        scores = linear_logprob(h, LMHead(w, b), y, impl=impl)
        made = scores.lse + scores.logp
        runs.append([loss, made, *torch.autograd.grad(loss, [h, w]), *torch.autograd.grad(made.sum(), [h, w])])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)
    transposed = flat[1].t().contiguous().t()
    uniform = flat[2][:1].expand(70)
    made = linear_logprob(flat[0], LMHead(transposed, uniform), flat[3][:1].expand(12), impl=impl)
    exact = reference.token_scores(flat[0], LMHead(flat[1], uniform), flat[3][:1].expand(12))
    torch.testing.assert_close(made.logp, exact["logp"])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vocabulary_of_one(impl):
    """No logit moves its certain token."""
    hidden, head, target, _ = batch((2, 3, 1, 4))
    runs = []
    for how in ("torch", impl):
        loss = fused_loss(hidden, head, target, objective="unlikelihood", impl=how)
        runs.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_in_the_weight_shows_everywhere(impl):
    hidden, head, target, _ = batch((2, 5, 70, 4), masked=False)
    weight = head.weight.detach().clone()
    weight[30] = torch.nan
    weight.requires_grad_()
    loss = fused_loss(hidden, weight, target, objective="mle", impl=impl, reduction="none").sum()
    assert loss.isnan()
    assert torch.autograd.grad(loss, weight)[0].isnan().all()


def test_skipping_with_a_sorted_vocabulary_on_a_head_of_any_width(monkeypatch):
    """Slices of the gathered weight are whole tiles of masses."""
    hidden, head, target, _ = batch((1, 3, 2100, 40), torch.float32, masked=False)
    monkeypatch.setattr(chunking, "CONVERT_BYTES", {"cpu": 1500 * 40 * 4, "cuda": 0})
    how = {"impl": "tiled", "return_metrics": True, "sort_vocab": True}
    runs = []
    for tolerance in (0.0, 0.3):
        loss, metrics = fused_loss(hidden, head, target, objective="mle", grad_tolerance=tolerance, **how)
        runs.append(torch.autograd.grad(loss, head.weight)[0])
    assert metrics["skipped/share"] > 0
    torch.testing.assert_close(
        runs[0], torch.autograd.grad(fused_loss(hidden, head, target, objective="mle"), head.weight)[0]
    )


# -- E apart from the logits ------------------------------------------------------------------------------------------


def wide(x):
    """16-bit values as float64 in memory that torch doesn't count."""
    if x.dtype == torch.bfloat16:
        return (x.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.numpy().astype(np.float64)


@pytest.fixture
def products(as_on_cuda, monkeypatch):
    """What is multiplied: (a, b, out, accumulate) of each product, the first three without their data."""
    made = []

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype
        seen = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b, out))
        made.append((*seen, accumulate))
        result = torch.from_numpy(wide(a) @ wide(b) + (wide(out) if accumulate else 0))
        for rows in range(0, len(out), 8):  # as it is rounded, a few rows are there twice
            out[rows : rows + 8] = result[rows : rows + 8]

    monkeypatch.setattr(matmul, "mm", product)
    return made


def leading(x):
    """Elements from a row (column) of a matrix to the next, or 0 for a vector."""
    return 0 if 1 in x.shape else x.stride(0) if x.stride(1) == 1 else x.stride(1)


APART = {"path": ("single", "two_pass", "frozen"), "name": ("bnf", "dpo"), "impl": ("triton", "torch")}


@pytest.mark.parametrize(("path", "name", "impl"), covering(2, **APART))
def test_e_of_several_chunks_is_multiplied_at_once(products, path, name, impl):
    """Chunks, products, sums of dW and leading dimensions, in memory for a few rows; V is odd, some rows are gathered.
    The results are those of float64 within the budget."""
    B, T, V, H = 2, 40, 77, 24
    hidden, head, target, ref_logits = batch((B, T, V, H), torch.bfloat16)
    head = LMHead(head.weight.detach().requires_grad_(path != "frozen"))
    ours, oracle = arguments(name, ref_logits, target)
    workspace = (80 * 4 * 6 + 80 * 2 * 16 + H * 10 * 16) + (V * (H + 1) * 4 if path == "single" else 0)
    workspace += 8 * V * 4 * 4 if impl == "torch" else 0  # its scratch
    how = {"impl": impl, "workspace": workspace, "path": path, **ours}
    loss = fused_loss(hidden, head, target, objective=name, **how)
    wanted = [x for x in (hidden, head.weight) if x.requires_grad]
    gradients = torch.autograd.grad(1.5 * loss, wanted)

    N = int((target != -100).sum())
    shape = chunking.sizes(V, H, torch.bfloat16, torch.bfloat16, "cpu", impl)
    C, K = chunking.chunks(shape, workspace, path).sweep_for(N)
    assert 1 < C < K < N, (C, K, N)
    for a, b, out, _ in products:
        assert all(leading(x) % 8 == 0 for x in (a, b)), (a.shape, a.stride(), b.shape, b.stride())
        assert leading(out) % (8 if out.dtype == torch.bfloat16 else 4) == 0
    logits = [len(a) for a, b, out, _ in products if a.shape[1] == H and out.shape[1] == V]
    hidden_rows = [len(a) for a, b, *_ in products if a.shape[1] == V]
    sums = [(a.shape[1], accumulate) for a, b, _, accumulate in products if len(a) == V]
    assert max(logits) == C
    if name == "bnf" or path != "single":
        assert hidden_rows == [K] * (N // K) + [N % K] * (N % K > 0)
    assert sum(hidden_rows) == N
    if path == "single":
        assert [rows for rows, _ in sums] == hidden_rows
        assert [accumulate for _, accumulate in sums] == [False] + [True] * (len(sums) - 1)

    naive, rough = oracle_in(torch.bfloat16, name, hidden, head, target, oracle)
    exact, truth = oracle_in(torch.float64, name, hidden, head, target, oracle)
    terms, _ = oracle_in(torch.float64, name, hidden, head, target, oracle, reduction="none")
    assert_in_budget(loss, naive, exact, torch.float32, scale=terms.abs().max().item())
    for gradient, a, b in zip(gradients, rough, truth):
        assert_in_budget(gradient, 1.5 * a, 1.5 * b, torch.bfloat16)


@pytest.mark.parametrize(("path", "name", "impl"), covering(2, **{**APART, "impl": ("torch",)}))
def test_the_workspace_bounds_what_is_held_with_e_apart(products, path, name, impl):
    shape = B, T, V, H = (4, 60, 1013, 16)  # one row of logits has 4 kB
    hidden, head, target, ref_logits = batch(shape, torch.bfloat16)
    head = LMHead(head.weight.detach().requires_grad_(path != "frozen"))
    ours, _ = arguments(name, ref_logits, target)
    workspace = 2**18 + (V * (H + 1) * 4 if path == "single" else 0)

    def run():
        loss = fused_loss(hidden, head, target, objective=name, impl=impl, workspace=workspace, path=path, **ours)
        return Result(loss.detach(), torch.autograd.grad(loss, [x for x in (hidden, head.weight) if x.requires_grad]))

    assert peak_memory(run, "cpu").extra <= workspace + 256 * B * T


def test_an_upstream_gradient_of_one_touches_nothing(monkeypatch):
    stored = []
    store = interpreter.InterpreterBuilder.create_masked_store
    plain = interpreter.InterpreterBuilder.create_store

    def noted(function):
        def call(self, *arguments):
            stored.append(1)
            return function(self, *arguments)

        return call

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted(store))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_store", noted(plain))
    wide, narrow = torch.float64, torch.bfloat16
    for shape, dtype in (((90, 100), torch.float32), ((100, 90), narrow), ((7,), wide), ((0, 3), wide)):
        x = torch.randn(shape).to(dtype)
        for given in (x, x.t() if x.ndim == 2 else x):
            stored.clear()
            made = triton_scale.scale_(given.clone(), torch.ones(()))
            assert not stored
            assert torch.equal(made, given)
            made = triton_scale.scale_(given.clone(), torch.tensor(-1.5))
            assert bool(stored) == bool(x.numel())
            assert torch.equal(made, given * -1.5)
    assert triton_scale.scale_(torch.ones(3), torch.tensor(torch.nan)).isnan().all()
