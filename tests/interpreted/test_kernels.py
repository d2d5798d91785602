"""Every kernel and flag in the interpreter against float64 in torch operations (another form), on small shapes.

Dimensions: C rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from rgpb.kernels import configs, triton_rows, triton_tiles
from rgpb.kernels.torch_rows import Epilogue, Statistics, Upstream

# V: off the blocks of 64 with several of them; exactly two blocks; less than one block; the smallest with another token
VOCABS = (150, 128, 9, 2)
EPILOGUES = list(itertools.product((False, True), (None, 2.5), (1.0, 0.3)))  # bias, soft-cap, scale
ACCURACY = {torch.float64: 1e-13, torch.float32: 1e-6}


def close(made, true, dtype, narrow=None):
    """To 1e-6 relative in float32, one rounding more in a narrow type."""
    rtol = ACCURACY[dtype] if narrow is None else 2 * torch.finfo(narrow).eps
    scale = true.double().abs()[true.isfinite()].max().item() if true.numel() else 0.0
    torch.testing.assert_close(made.double(), true.double(), rtol=rtol, atol=rtol * max(scale, 1e-30))


def dense(z, y, epilogue):
    """Statistics from materialised softmaxes, in float64, differentiable."""
    z = z if epilogue.bias is None else z + epilogue.bias.double()
    z = z * epilogue.scale
    if epilogue.softcap is not None:
        z = epilogue.softcap * torch.tanh(z / epilogue.softcap)
    here = torch.nn.functional.one_hot(y.clamp(min=0), z.shape[1]).bool() & (y >= 0)[:, None]
    others = z.masked_fill(here, -torch.inf)
    q = others.softmax(1)
    lse_other = others.logsumexp(1)
    h_o = lse_other - (q * z.masked_fill(here, 0)).sum(1)
    return Statistics(z.masked_fill(~here, 0).sum(1), lse_other, h_o), q


def epilogue_of(flags, vocab, dtype):
    bias, softcap, scale = flags
    return Epilogue(torch.randn(vocab).to(dtype) if bias else None, softcap, scale)


def upstream_of(rows, dtype, entropy):
    g = torch.randn(3, rows, dtype=torch.float64).to(dtype)
    return Upstream(g[0], g[1], g[2] if entropy else None)


@pytest.mark.parametrize("flags", EPILOGUES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_row_statistics_and_gradients(stored, vocab, entropy, flags):
    acc = torch.float64 if stored == torch.float64 else torch.float32
    z = (3 * torch.randn(3, vocab, dtype=torch.float64)).to(stored)
    y = torch.tensor([0, vocab - 1, vocab // 2])
    epilogue = epilogue_of(flags, vocab, acc)
    exact_z = z.double().requires_grad_()
    truth, q = dense(exact_z, y, epilogue)
    made, masses = triton_rows.statistics(z, y, epilogue, entropy, tile=64)
    for a, b in zip(made, truth if entropy else truth[:2]):
        close(a, b.detach(), acc)
    wanted = torch.nn.functional.pad(q.detach(), (0, -vocab % 64)).view(3, -1, 64).sum(-1)
    close(masses, wanted, acc)
    upstream = upstream_of(3, acc, entropy)
    (gradient,) = torch.autograd.grad(
        [t for t, g in zip(truth, upstream) if g is not None], exact_z, [g.double() for g in upstream if g is not None]
    )
    scores = Statistics(*(s.detach().to(acc) for s in truth))
    for narrow in (acc, torch.bfloat16, torch.float16) if stored == torch.float32 else (stored,):
        buffer = z.clone()
        out = buffer if narrow == stored else buffer.view(narrow)[:, :vocab]
        e, r = triton_rows.gradients_(buffer, y, scores, upstream, epilogue, out)
        d = e.double() if r is None else e.double() * r.double()[:, None]
        close(d, gradient, acc, None if narrow == acc else narrow)


@pytest.mark.parametrize("flags", EPILOGUES, ids=str)
@pytest.mark.parametrize("loss", triton_rows.TOKEN_LOSSES)
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_token_losses_in_one_launch(narrow, loss, flags):
    acc = torch.float64 if narrow == torch.float64 else torch.float32
    vocab, rows = 150, 5
    z = 3 * torch.randn(rows, vocab, dtype=acc)
    z[3, 7] += 30.0  # a confident token
    y = torch.tensor([0, 149, 80, 7, -1])
    epilogue = epilogue_of(flags, vocab, acc)
    weight = torch.tensor([0.5, -0.25, 1.0, -1.0, 1.0], dtype=acc)
    ref_lam = torch.randn(rows, dtype=torch.float64) - 3
    ref_lam[0] = 5.0
    ref = tuple(x.to(acc) for x in (torch.nn.functional.logsigmoid(ref_lam), ref_lam))
    ref_lam = ref[1].double()
    exact_z = z.double().requires_grad_()
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
    out = buffer.view(narrow)[:, :vocab]
    scores, made, d = triton_rows.token_loss_(
        buffer, y, loss, weight, ref if loss == "bnf" else None, epilogue, loss == "bnf", out
    )
    for a, b in zip(scores, truth if loss == "bnf" else truth[:2]):
        close(a[:4], b[:4].detach(), acc)
        assert a[4] == 0
    close(made[:4], value[:4].detach(), acc)
    assert made[4] == 0
    assert not d[4].any()
    close(d, gradient, acc, None if narrow == acc else narrow)


def tiles(entropy, rows, vocab, like, top):
    config = configs.TILES[configs.INTERPRETED]["score"][0]
    return triton_tiles.Partials.empty(like, -(-vocab // config.vocab), rows, like.dtype, top, entropy), config


@pytest.mark.parametrize("flags", EPILOGUES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", [(35, 150, 40), (3, 9, 7), (16, 128, 32)], ids=str)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tma", [False, True])
def test_tiles(tma, stored, shape, entropy, flags):
    """Score, weights and gradients; C, V and H off every tile, less than a tile, and on the tiles."""
    acc = torch.float64 if stored == torch.float64 else torch.float32
    rows, vocab, width = shape
    x, w = (2 * torch.randn(rows, width) / width**0.5).to(stored), torch.randn(vocab, width).to(stored)
    if tma and not triton_tiles.tma_ready(x, w):
        x, w = (torch.nn.functional.pad(t, (0, 8 - width % 8))[:, :width] for t in (x, w))  # rows of whole 16 bytes
    y = torch.randint(vocab, (rows,))
    y[-1] = -1
    epilogue = epilogue_of(flags, vocab, acc)
    exact_z = (x.double() @ w.double().T).requires_grad_()
    truth, q = dense(exact_z, y, epilogue)
    like = torch.empty(0, dtype=acc)
    partials, config = tiles(entropy, rows, vocab, like, top=True)
    config = config._replace(tma=tma)
    z_y = torch.zeros(rows, dtype=acc)
    triton_tiles.score(x, w, y, epilogue, z_y, partials, config=config)
    lse_other, h_o, _ = triton_tiles.merge(partials, None, entropy)
    for a, b in zip((z_y, lse_other, h_o) if entropy else (z_y, lse_other), truth):
        close(a, b.detach(), acc)
    close(
        triton_tiles.masses(partials, None, lse_other, 2),
        torch.nn.functional.pad(q.detach(), (0, -vocab % 128)).view(rows, -1, 128).sum(-1), acc,
    )  # fmt: skip

    shift = truth.lse_other.detach().to(acc) - 2
    partials, _ = tiles(entropy, rows, vocab, like, top=False)
    e = torch.empty(rows, vocab, dtype=stored)
    triton_tiles.score(x, w, y, epilogue, z_y, partials, shift, e, config=config)
    lse_other, h_o, total = triton_tiles.merge(partials, shift, entropy)
    close(lse_other, truth.lse_other.detach(), acc)
    if entropy:
        close(h_o, truth.h_o.detach(), acc)
    z = exact_z.detach() if epilogue.bias is None else exact_z.detach() + epilogue.bias.double()
    z = z * epilogue.scale
    j = epilogue.jacobian(z if epilogue.softcap is None else epilogue.softcap * torch.tanh(z / epilogue.softcap))
    close(e.double() / total.double()[:, None], q.detach() * j, acc, None if stored == acc else stored)

    upstream = upstream_of(rows, acc, entropy)
    given = [(t, g.double()) for t, g in zip(truth, upstream) if g is not None]
    (gradient,) = torch.autograd.grad([t for t, _ in given], exact_z, [g for _, g in given])
    scores = Statistics(*(s.detach().to(acc) for s in truth))
    r = triton_tiles.gradients(x, w, y, scores, upstream, epilogue, e, config=config)
    close(e.double() if r is None else e.double() * r[:, None], gradient, acc, None if stored == acc else stored)
