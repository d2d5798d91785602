"""What every implementation of the row kernels has to do, against float64 in torch operations (another form).

`test_rows.py` runs it on torch's and the C++ kernels, `interpreted/test_kernels.py` on Triton's in the interpreter.
Each gives a fixture `rows`, an `Implementation`. Flags are covered by triples of values (`covering.py`).

Dimensions: C rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from covering import covering

from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream

# V: off the blocks of 64 with several of them; exactly two blocks; less than one block; the smallest with another token
VOCABS = (150, 128, 9, 2)
FLAGS = {"bias": (False, True), "softcap": (None, 2.5), "scale": (1.0, 0.3)}
NARROW = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of results; logits in float32, or float64
ACCURACY = {torch.float64: 1e-13, torch.float32: 1e-6}


class Implementation(NamedTuple):
    """A set of row kernels.

    Attributes:
        statistics: (z, target, epilogue, entropy, tile) → (Statistics, masses); z may hold anything afterwards.
        gradients_: as `torch_rows.gradients_`.
        token_loss_: as `triton_rows.token_loss_`, or None where such a loss takes three steps.
        weights: (z, target, epilogue, entropy, out) → (Statistics, Σ E), E in place or in `out`; or None.
        stored, narrow: types of a buffer, and of narrower results over a float32 one's bytes.
    """

    statistics: Callable
    gradients_: Callable
    token_loss_: Callable | None
    weights: Callable | None
    stored: tuple[torch.dtype, ...]
    narrow: tuple[torch.dtype, ...]


def close(made, true, dtype, narrow=None):
    """To 1e-6 relative in float32, one rounding more in a narrow type."""
    rtol = ACCURACY[dtype] if narrow is None else 2 * torch.finfo(narrow).eps
    scale = true.double().abs()[true.isfinite()].max().item() if true.numel() else 0.0
    torch.testing.assert_close(made.double(), true.double(), rtol=rtol, atol=rtol * max(scale, 1e-30))


def dense(z, y, epilogue):
    """Statistics from materialised softmaxes, in float64, differentiable."""
    z = logits(z, epilogue)
    here = torch.nn.functional.one_hot(y.clamp(min=0), z.shape[1]).bool() & (y >= 0)[:, None]
    others = z.masked_fill(here, -torch.inf)
    q = others.softmax(1)
    lse_other = others.logsumexp(1)
    h_o = lse_other - (q * z.masked_fill(here, 0)).sum(1)
    return Statistics(z.masked_fill(~here, 0).sum(1), lse_other, h_o), q


def logits(z, epilogue):
    """z ← cap · tanh(scale · (z + b) / cap)."""
    z = z if epilogue.bias is None else z + epilogue.bias.double()
    z = z * epilogue.scale
    return z if epilogue.softcap is None else epilogue.softcap * torch.tanh(z / epilogue.softcap)


def epilogue_of(bias, softcap, scale, vocab, dtype):
    return Epilogue(torch.randn(vocab).to(dtype) if bias else None, softcap, scale)


def upstream_of(rows, dtype, entropy):
    g = torch.randn(3, rows, dtype=torch.float64).to(dtype)
    return Upstream(g[0], g[1], g[2] if entropy else None)


def acc_of(stored):
    return torch.float64 if stored == torch.float64 else torch.float32


@pytest.mark.parametrize(
    ("stored", "vocab", "entropy", "bias", "softcap", "scale"),
    covering(3, stored=NARROW[:3], vocab=VOCABS, entropy=(False, True), **FLAGS),
)
def test_row_statistics_and_gradients(rows, stored, vocab, entropy, bias, softcap, scale):
    if stored not in rows.stored:
        pytest.skip(f"this implementation has no buffers of {stored}")
    acc = acc_of(stored)
    z = (3 * torch.randn(3, vocab, dtype=torch.float64)).to(stored)
    y = torch.tensor([0, vocab - 1, vocab // 2])
    epilogue = epilogue_of(bias, softcap, scale, vocab, acc)
    exact_z = z.double().clone().requires_grad_()
    truth, q = dense(exact_z, y, epilogue)
    made, masses = rows.statistics(z.clone(), y, epilogue, entropy, 64)
    for a, b in zip(made, truth if entropy else truth[:2]):
        close(a, b.detach(), acc)
    wanted = torch.nn.functional.pad(q.detach(), (0, -vocab % 64)).view(3, -1, 64).sum(-1)
    close(masses, wanted, acc)
    upstream = upstream_of(3, acc, entropy)
    (gradient,) = torch.autograd.grad(
        [t for t, g in zip(truth, upstream) if g is not None], exact_z, [g.double() for g in upstream if g is not None]
    )
    scores = Statistics(*(s.detach().to(acc) for s in truth))
    for narrow in (acc, *rows.narrow) if stored == torch.float32 else (stored,):
        buffer = z.clone()
        out = None if narrow == stored else buffer.view(narrow)[:, :vocab]
        e, r = rows.gradients_(buffer, y, scores, upstream, epilogue, out)
        d = e.double() if r is None else e.double() * r.double()[:, None]
        close(d, gradient, acc, None if narrow == acc else narrow)


@pytest.mark.parametrize(
    ("narrow", "entropy", "bias", "softcap", "scale"),
    covering(3, narrow=NARROW[:3], entropy=(False, True), **FLAGS),
)
def test_weights_and_their_sum(rows, narrow, entropy, bias, softcap, scale):
    """D = diag(r) E with E the weights left by the sweep for statistics, r = g / Σ E."""
    if rows.weights is None:
        pytest.skip("this implementation makes gradients in a sweep of their own")
    if narrow not in (*rows.narrow, torch.float64, torch.float32):
        pytest.skip(f"this implementation has no {narrow} over float32")
    acc, vocab = acc_of(narrow), 150
    z = 3 * torch.randn(3, vocab, dtype=acc)
    y = torch.tensor([0, 149, 80])
    epilogue = epilogue_of(bias, softcap, scale, vocab, acc)
    exact_z = z.double().clone().requires_grad_()
    truth, _ = dense(exact_z, y, epilogue)
    (gradient,) = torch.autograd.grad(truth.lse_other.sum(), exact_z)
    buffer = z.clone()
    out = None if narrow == acc else buffer.view(narrow)[:, :vocab]
    made, total = rows.weights(buffer, y, epilogue, entropy, out)
    for a, b in zip(made, truth if entropy else truth[:2]):
        close(a, b.detach(), acc)
    e = buffer if out is None else out
    close(e.double() / total.double()[:, None], gradient, acc, None if narrow == acc else narrow)
    assert not e[torch.arange(3), y].any()


@pytest.mark.parametrize(
    ("narrow", "apart", "loss", "bias", "softcap", "scale"),
    covering(3, narrow=NARROW, apart=(False, True), loss=("nll", "unlikelihood", "bnf"), **FLAGS),
)
def test_token_losses_in_one_launch(rows, narrow, apart, loss, bias, softcap, scale):
    if rows.token_loss_ is None:
        pytest.skip("this implementation takes a token-wise loss in three steps")
    if narrow not in (*rows.narrow, torch.float64, torch.float32):
        pytest.skip(f"this implementation has no {narrow} over float32")
    acc = acc_of(narrow)
    vocab, count = 150, 5
    z = 3 * torch.randn(count, vocab, dtype=acc)
    z[3, 7] += 30.0  # a confident token
    y = torch.tensor([0, 149, 80, 7, -1])
    epilogue = epilogue_of(bias, softcap, scale, vocab, acc)
    weight = torch.tensor([0.5, -0.25, 1.0, -1.0, 1.0], dtype=acc)
    ref_lam = torch.randn(count, dtype=torch.float64) - 3
    ref_lam[0] = 5.0
    ref = tuple(x.to(acc) for x in (torch.nn.functional.logsigmoid(ref_lam), ref_lam))
    ref_lam = ref[1].double()
    exact_z = z.double().clone().requires_grad_()
    truth, _ = dense(exact_z, y, epilogue)
    lam = truth.z_y - truth.lse_other
    log_p, log_not_p = torch.nn.functional.logsigmoid(lam), torch.nn.functional.logsigmoid(-lam)
    if loss == "nll":
        value = objective = -weight.double() * log_p
    elif loss == "unlikelihood":
        value = objective = torch.where(weight > 0, -weight * log_p, weight * log_not_p)
    else:
        f = torch.exp((log_p - torch.nn.functional.logsigmoid(ref_lam)).clamp(max=0)).detach()
        value = -weight * (f * log_p + (1 - f) * (log_not_p - truth.h_o))
        objective = -weight * torch.exp((lam - ref_lam).clamp(max=0)).detach() * log_p
    (gradient,) = torch.autograd.grad(objective[:4].sum(), exact_z)
    buffer = z.clone()
    out = None if narrow == acc else buffer.view(narrow)[:, :vocab]
    if apart:
        out = torch.full((count, vocab), torch.nan, dtype=narrow)
    scores, made, e, r = rows.token_loss_(
        buffer, y, TokenTerms(loss, weight, ref if loss == "bnf" else None, loss == "bnf"), epilogue, out
    )
    d = e.double() if r is None else e.double() * r.double()[:, None]
    for a, b in zip(scores, truth if loss == "bnf" else truth[:2]):
        close(a[:4], b[:4].detach(), acc)
        assert a[4] == 0
    close(made[:4], value[:4].detach(), acc)
    assert made[4] == 0
    assert not d[4].any()
    close(d, gradient, acc, None if narrow == acc else narrow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_target_in_another_slice(rows, dtype):
    """A negative target: nothing of the row is the target's."""
    z, y, epilogue = torch.randn(2, 70, dtype=dtype), torch.tensor([-1, 5]), Epilogue(None, None, 1.0)
    scores = Statistics(z[:, 5].clone(), z.logsumexp(1), None)
    upstream = Upstream(*torch.randn(2, 2, dtype=dtype))
    wanted = upstream.g_lo[:, None] * (z - scores.lse_other[:, None]).exp()
    wanted[1, 5] = upstream.g_zy[1]
    e, r = rows.gradients_(z.clone(), y, scores, upstream, epilogue)
    close(e if r is None else e * r[:, None], wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_target_that_dwarfs_the_others(rows, dtype):
    """Coefficients of the others of 1e-30 of the target's, and of none at all; then no gradient at all."""
    z, y = torch.randn(3, 70, dtype=dtype), torch.tensor([0, 5, 69])
    epilogue, upstream = Epilogue(None, None, 1.0), Upstream(*torch.tensor([[1, 1, 0], [1e-30, 0, 0]], dtype=dtype))
    made, _ = rows.statistics(z.clone(), y, epilogue, False, 64)
    e, r = rows.gradients_(z.clone(), y, made, upstream, epilogue)
    close(e if r is None else e * r[:, None], torch.nn.functional.one_hot(y, 70) * upstream.g_zy[:, None], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_rows_far_from_zero(rows, dtype, size):
    """Statistics follow a shift of all logits, which changes no gradient; and one that ends every other token."""
    z, y, epilogue = (
        torch.randn(3, 70, dtype=dtype).round(decimals=2),
        torch.tensor([0, 3, 69]),
        Epilogue(None, None, 1.0),
    )
    z = z + size if abs(size) < 1e10 else z.index_fill(1, torch.tensor([3]), size)
    truth, q = dense(z.double(), y, epilogue)
    made, _ = rows.statistics(z.clone(), y, epilogue, True, 64)
    close(made.z_y, truth.z_y, dtype)
    close(made.lse_other, truth.lse_other, dtype)
    e, r = rows.gradients_(z.clone(), y, made, Upstream(*torch.ones(2, 3, dtype=dtype)), epilogue)
    wanted = q.index_put((torch.arange(3), y), torch.ones((), dtype=q.dtype))
    rounding = abs(size) * torch.finfo(dtype).eps if abs(size) < 1e10 else 0.0  # of the statistics themselves
    off = ((e if r is None else e * r[:, None]).double() - wanted).abs().max()
    assert off <= ACCURACY[dtype] + 2 * rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_impossible_tokens(rows, dtype):
    """Tokens that the bias rules out have no part in anything."""
    z, y, bias = torch.randn(2, 70, dtype=dtype), torch.tensor([1, 4]), torch.zeros(70, dtype=dtype)
    bias[5:] = -torch.inf
    made, _ = rows.statistics(z.clone(), y, Epilogue(bias, None, 1.0), True, 64)
    truth, _ = dense(z[:, :5].double(), y, Epilogue(None, None, 1.0))
    for a, b in zip(made, truth):
        close(a, b, dtype)
    upstream = Upstream(*torch.ones(3, 2, dtype=dtype))
    e, r = rows.gradients_(z.clone(), y, made, upstream, Epilogue(bias, None, 1.0))
    d = e if r is None else e * r[:, None]
    assert not d[:, 5:].any()
    assert d.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_without_others(rows, dtype):
    """Where no other token is possible the target is certain, and no logit moves that."""
    z, y, bias = torch.randn(1, 70, dtype=dtype), torch.tensor([1]), torch.full((70,), -torch.inf, dtype=dtype)
    bias[1] = 0
    epilogue = Epilogue(bias, None, 1.0)
    made, masses = rows.statistics(z.clone(), y, epilogue, True, 64)
    assert made.z_y == z[0, 1]
    assert made.lse_other == -torch.inf
    assert made.h_o == 0
    assert not masses.any()
    upstream = Upstream(*torch.tensor([[0.0], [1.0], [1.0]], dtype=dtype))
    e, r = rows.gradients_(z.clone(), y, made, upstream, epilogue)
    assert not (e if r is None else e * r[:, None]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_nan_shows(rows, dtype):
    z, y, epilogue = torch.randn(2, 70, dtype=dtype), torch.tensor([3, 3]), Epilogue(None, None, 1.0)
    z[0, 20] = torch.nan
    made, _ = rows.statistics(z.clone(), y, epilogue, False, 64)
    assert made.lse_other.isnan().tolist() == [True, False]
    e, _ = rows.gradients_(z.clone(), y, made, Upstream(*torch.ones(2, 2, dtype=dtype)), epilogue)
    assert e[0].isnan().any()
    assert e[1].isfinite().all()
