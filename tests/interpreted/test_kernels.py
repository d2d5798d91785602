"""Every kernel and flag in the interpreter against float64 in torch operations (another form), on small shapes.

The row kernels: `row_suite.py`, the same as for torch's and the C++ ones. Dimensions: C rows, V vocabulary, H hidden
size.
"""

from __future__ import annotations

import pytest
import torch
from covering import covering
from kernel_suite import *  # noqa: F403
from row_suite import *  # noqa: F403
from row_suite import FLAGS, NARROW, Implementation, close, dense, epilogue_of, upstream_of

from rgpb.kernels import configs, triton_rows, triton_skipping, triton_tiles
from rgpb.kernels.types import Epilogue, Statistics, TokenTerms, Upstream


def weights(z, target, epilogue, entropy, out):
    """Apart, then copied to where the suite wants them."""
    out = z if out is None else out
    e = torch.full(out.shape, torch.nan, dtype=out.dtype)
    found, total, _ = triton_rows.weights(z, target, epilogue, entropy, e)
    out.copy_(e)
    return found, total


@pytest.fixture
def rows():
    return Implementation(
        triton_rows.statistics, triton_rows.gradients_, triton_rows.token_loss_, weights,
        (torch.float64, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
    )  # fmt: skip


@pytest.fixture(params=["triton", "triton, apart", "tiled"])
def impl(request):
    """A kernel set, for `kernel_suite.py`."""
    name, _, apart = request.param.partition(", ")
    if apart:
        request.getfixturevalue("apart")
    return name


# What a sweep that doesn't know the maximum can meet: the logits of a row, of which the first is the target's.
ODD_ROWS = {
    "as any": lambda z: z,
    "the largest in the last block": lambda z: z.index_fill(0, torch.tensor([148]), 70.0),
    "1e4 apart": lambda z: z.mul(1e4).round(),
    "all mass on the target": lambda z: z.index_fill(0, torch.tensor([0]), 120.0),
    "a target far below": lambda z: z.index_fill(0, torch.tensor([0]), -120.0),
    "a target that is impossible": lambda z: z.index_fill(0, torch.tensor([0]), -torch.inf),
    "two others": lambda z: torch.cat([z[:1], torch.tensor([-90.0, -95.0]), torch.full((148,), -torch.inf)]),
    "no other token": lambda z: z.index_fill(0, torch.arange(1, 151), -torch.inf),
    "ignored": lambda z: z,
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 77, 150])
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_sweep_of_odd_rows(narrow, place):
    """Statistics, and D = diag(r) E with one rounding of each entry; the target in any block, room behind the rows."""
    acc, vocab, room = torch.promote_types(narrow, torch.float32), 151, 160
    z = torch.stack([make(3 * torch.randn(vocab)).roll(place) for make in ODD_ROWS.values()]).to(acc)
    count = len(z)
    y = torch.full((count,), place)
    y[-1] = -1
    exact = z.double()
    here = torch.nn.functional.one_hot(torch.tensor(place), vocab).bool()
    others = exact.masked_fill(here, -torch.inf)
    lse_other, q = others.logsumexp(1), others.softmax(1).nan_to_num()
    h_o = torch.where(lse_other > -torch.inf, -(q * q.log().clamp(min=-1e3)).sum(1), 0)
    epilogue = Epilogue(None, None, 1.0)
    buffer, out = (torch.full((count, room), torch.nan, dtype=t) for t in (acc, narrow))
    buffer[:, :vocab] = z
    given = buffer[:, :vocab], y, epilogue

    def check(scores, d, g_zy, g_lo):
        """To the rounding of a logit, which shifts all entries of a row alike, and of the entry itself."""
        assert torch.equal(scores.z_y[:-1], z[:-1, place])
        torch.testing.assert_close(
            scores.lse_other[:-1].double(), lse_other[:-1], rtol=4 * torch.finfo(acc).eps, atol=1e-6
        )
        torch.testing.assert_close(scores.h_o[:-1].double(), h_o[:-1], rtol=1e-5, atol=2e-6)
        assert not any(x[-1] for x in scores)
        wanted = q * g_lo.double()[:, None]
        wanted[:, place] = torch.where(lse_other > -torch.inf, g_zy.double(), 0)
        wanted[-1] = 0
        largest = others[:-1].amax(1).clamp(-1e5, 1e5).abs()
        size = (largest[:, None] + q[:-1].log().clamp(min=-200).abs()) * torch.finfo(acc).eps
        off = (d.double() - wanted)[:-1].abs()
        rounding = torch.finfo(narrow).eps / 2 if narrow == torch.bfloat16 else 4 * torch.finfo(acc).eps
        assert (off <= (rounding + 4 * size + 4 * torch.finfo(acc).eps) * wanted[:-1].abs() + 1e-36).all()
        assert not d[-1].any()

    scores, total, _ = triton_rows.weights(*given, True, out[:, :vocab], room)
    upstream = Upstream(*torch.randn(2, count, dtype=acc))
    upstream.g_zy[-2] = upstream.g_zy[-1] = 0
    r = torch.where(total > 0, upstream.g_lo / total, 0)
    factor = triton_rows.with_target_(out[:, :vocab], y, r, upstream.g_zy, total)
    check(scores, out[:, :vocab].double() * factor.double()[:, None], *upstream[:2])
    out.fill_(torch.nan)
    weight = torch.rand(count, dtype=acc)
    scores, value, e, r = triton_rows.token_loss_(
        *given[:2], TokenTerms("nll", weight, None, True), epilogue, out[:, :vocab], room
    )
    lam = exact[:, place] - lse_other
    slope = -weight.double() * torch.sigmoid(-lam)
    check(scores, e.double() * r.double()[:, None], slope, -slope)
    torch.testing.assert_close(
        value[:-1].double(), (-weight.double() * torch.nn.functional.logsigmoid(lam))[:-1], rtol=1e-6, atol=1e-6
    )


def tiles(entropy, rows, vocab, like, top, wide):
    config = configs.TILES[configs.INTERPRETED]["score"][0]
    config = config._replace(vocab=256) if wide else config  # whose halves have statistics of their own
    return triton_tiles.Partials.empty(like, config.parts(vocab), rows, like.dtype, top, entropy), config


# C, V, H, each with its reason
SHAPES = {"off every tile, two groups": (35, 150, 24), "less than a tile": (3, 9, 7), "on the tiles": (16, 128, 32)}


@pytest.mark.parametrize(
    ("tma", "wide", "stored", "shape", "entropy", "bias", "softcap", "scale"),
    covering(3, tma=(False, True), wide=(False, True), stored=NARROW, shape=SHAPES, entropy=(False, True), **FLAGS),
)
def test_tiles(tma, wide, stored, shape, entropy, bias, softcap, scale):
    """Score, weights and gradients."""
    acc = torch.float64 if stored == torch.float64 else torch.float32
    rows, vocab, width = SHAPES[shape]
    x, w = (2 * torch.randn(rows, width) / width**0.5).to(stored), torch.randn(vocab, width).to(stored)
    if tma and not triton_tiles.tma_ready(x, w):
        x, w = (torch.nn.functional.pad(t, (0, 8 - width % 8))[:, :width] for t in (x, w))  # rows of whole 16 bytes
    y = torch.randint(vocab, (rows,))
    y[-1] = -1
    epilogue = epilogue_of(bias, softcap, scale, vocab, acc)
    exact_z = (x.double() @ w.double().T).requires_grad_()
    truth, q = dense(exact_z, y, epilogue)
    like = torch.empty(0, dtype=acc)
    partials, config = tiles(entropy, rows, vocab, like, True, wide)
    config = config._replace(tma=tma)
    z_y = torch.zeros(rows, dtype=acc)
    triton_tiles.score(x, w, y, epilogue, z_y, partials, config=config)
    lse_other, h_o, _ = triton_tiles.merge(partials, None, entropy)
    for a, b in zip((z_y, lse_other, h_o) if entropy else (z_y, lse_other), truth):
        close(a, b.detach(), acc)
    close(
        triton_tiles.masses(partials, None, lse_other, 256 // config.part),
        torch.nn.functional.pad(q.detach(), (0, -vocab % 256)).view(rows, -1, 256).sum(-1), acc,
    )  # fmt: skip

    shift = truth.lse_other.detach().to(acc) - 2
    partials, _ = tiles(entropy, rows, vocab, like, False, wide)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge_of_more_tiles_than_a_block(dtype):
    """130 tiles are three blocks, with the largest maximum in the last and tiles without a possible token between."""
    tiles, rows = 130, 3
    top = torch.randn(tiles, rows, dtype=dtype) * 5 + torch.arange(tiles)[:, None] / 10
    total = torch.rand(tiles, rows, dtype=dtype) + 0.1
    mean = -torch.rand(tiles, rows, dtype=dtype)
    total[40:50] = mean[40:50] = 0
    lse_other, h_o, whole = triton_tiles.merge(triton_tiles.Partials(top, total, mean), None, True)
    t, s, m = (x.double() for x in (top, total, mean))
    most = t.masked_fill(s == 0, -torch.inf).amax(0)
    weight = torch.where(s > 0, (t - most).exp(), 0)
    wanted = (weight * s).sum(0)
    close(lse_other, most + wanted.log(), dtype)
    close(whole, wanted, dtype)
    close(h_o, wanted.log() - (weight * (m + (t - most) * s)).sum(0) / wanted, dtype)


@pytest.mark.parametrize(
    ("stored", "add", "ordered", "factored", "placed", "strided"),
    covering(
        2, stored=NARROW, add=(False, True), ordered=(False, True),
        factored=(False, True), placed=(False, True), strided=(False, True),
    ),
)  # fmt: skip
def test_products_of_what_counts(stored, add, ordered, factored, placed, strided):
    """dX and dW of a random mask: tiles for no row and for all, rows without a tile, padding that is NaN."""
    rows, vocab, width, tile = 37, 300, 37, 128  # three blocks of rows, a last tile and a last step that aren't whole
    acc = torch.float64 if stored == torch.float64 else torch.float32
    made = torch.float32 if stored == torch.bfloat16 else stored
    e = torch.full((rows, 304), torch.nan, dtype=stored)[:, :vocab].copy_(torch.randn(rows, vocab))
    x, w = torch.randn(rows, width).to(stored), torch.randn(vocab, width).to(stored)
    if strided:
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    active = torch.rand(rows, 3) < torch.linspace(0, 1, rows)[:, None]
    active[:, 1], active[3] = torch.arange(rows) > 30, True
    order, places = torch.randperm(vocab), torch.randperm(50)[:rows]
    r = torch.randn(rows, dtype=acc) if factored else None
    counting = triton_skipping.Counting(active.clone(), tile)

    wide = e.double() * active.repeat_interleave(tile, 1)[:, :vocab]
    dw = torch.randn(vocab, width).to(made)
    exact = wide.t() @ x.double()
    wanted = dw.double().clone() if add else torch.zeros(vocab, width, dtype=torch.float64)
    wanted[order if ordered else slice(None)] += exact
    counting.head(e, [x], [dw], order if ordered else None, 304, add)
    close(dw, wanted, acc, None if made == acc else made)

    taken = active.sum(1).argsort(descending=True, stable=True)
    for some in taken.split(16):  # what counts for one of them is taken by all
        active[some] = active[some].any(0)
    wide = e.double() * active.repeat_interleave(tile, 1)[:, :vocab]
    exact = wide @ w.double()[order if ordered else slice(None)] * (1 if r is None else r.double()[:, None])
    dx = torch.randn(50, width).to(made)
    at = places if placed else slice(0, rows)
    wanted = dx.double().clone()
    wanted[at] = exact + wanted[at] * add
    counting.hidden(e, w, dx, r, places if placed else None, order if ordered else None, add)
    close(dx, wanted, acc, None if made == acc else made)
