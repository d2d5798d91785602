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

from rgpb.kernels import configs, triton_rows, triton_tiles
from rgpb.kernels.types import Statistics


@pytest.fixture
def rows():
    return Implementation(
        triton_rows.statistics, triton_rows.gradients_, triton_rows.token_loss_, None,
        (torch.float64, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
    )  # fmt: skip


@pytest.fixture(params=["triton", "tiled"])
def impl(request):
    """A kernel set, for `kernel_suite.py`."""
    return request.param


def tiles(entropy, rows, vocab, like, top):
    config = configs.TILES[configs.INTERPRETED]["score"][0]
    return triton_tiles.Partials.empty(like, -(-vocab // config.vocab), rows, like.dtype, top, entropy), config


# C, V, H, each with its reason
SHAPES = {"off every tile, two groups": (35, 150, 24), "less than a tile": (3, 9, 7), "on the tiles": (16, 128, 32)}


@pytest.mark.parametrize(
    ("tma", "stored", "shape", "entropy", "bias", "softcap", "scale"),
    covering(3, tma=(False, True), stored=NARROW, shape=SHAPES, entropy=(False, True), **FLAGS),
)
def test_tiles(tma, stored, shape, entropy, bias, softcap, scale):
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
