"""The one interface of every kernel set, `rgpb.kernels.KernelSet`, against float64 in torch operations.

`test_rows.py` runs it on torch's and the C++ kernels, `interpreted/test_kernels.py` on Triton's row and tile kernels in
the interpreter; each gives a fixture `impl`. What a set's own functions do with odd values: `row_suite.py`.

Dimensions: C rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from covering import covering
from row_suite import close, dense, epilogue_of

from rgpb import LMHead
from rgpb.engine.products import HeadSlices, Problem, Products
from rgpb.kernels.types import Statistics, TokenTerms, Upstream
from rgpb.validation import How, make_call

# C and V off every tile and block, H off the tile of 16; masses of 128 columns; parts that end inside the last tile
C, V, H, MASS, STEP = 19, 150, 24, 128, 128


class Given:
    """A chunk of a set, and what is true of it."""

    def __init__(self, impl, dtype, flags, columns):
        self.x = (2 * torch.randn(C, H, dtype=torch.float64)).to(dtype)
        self.w = (torch.randn(V, H, dtype=torch.float64) / H**0.5).to(dtype)
        self.y = torch.randint(V, (C,))
        self.epilogue = epilogue_of(*HEADS[flags], V, dtype)
        head = LMHead(self.w, self.epilogue.bias, self.epilogue.softcap, self.epilogue.scale)
        self.x.requires_grad_()
        self.w.requires_grad_()
        call = make_call(self.x, head, How(impl, "two_pass", workspace=1 << 24), -100)
        self.problem = Problem(self.x.detach(), self.w.detach(), head.bias, self.y, call)
        products = Products(self.problem, C)
        self.set = products.set
        self.chunk = products.chunk(slice(0, C))
        if columns:
            parts = partial(products.parts, columns)
            self.chunk = self.chunk._replace(step=columns, parts=parts, slices=parts)
        self.z = (self.x.detach().double() @ self.w.detach().double().T).requires_grad_()
        self.truth, self.q = dense(self.z, self.y, self.epilogue)
        self.statistics = Statistics(*(s.detach().to(dtype) for s in self.truth))

    def gradient(self, upstream):
        """∂L/∂(X Wᵀ), float64."""
        given = [(t, g.double()) for t, g in zip(self.truth, upstream) if g is not None]
        return torch.autograd.grad([t for t, _ in given], self.z, [g for _, g in given], retain_graph=True)[0]


def product(e, r):
    return e.double() if r is None else e.double() * r.double()[:, None]


def upstream_of(dtype, entropy):
    g = torch.randn(3, C, dtype=torch.float64).to(dtype)
    return Upstream(g[0], g[1], g[2] if entropy else None)


HEADS = {"bare": (False, None, 1.0), "bias, soft-cap and scale": (True, 2.5, 0.3)}
GIVEN = {"dtype": (torch.float64, torch.float32), "flags": HEADS}
# columns: the head in one part, or in several
EACH = pytest.mark.parametrize(("dtype", "flags", "columns"), covering(2, **GIVEN, columns=(0, STEP)))


@EACH
def test_score_and_masses(impl, dtype, flags, columns):
    given = Given(impl, dtype, flags, columns)
    for entropy in (False, True):
        for tile in (None, MASS):
            made, masses = given.set.score(given.chunk, entropy, tile)
            assert (made.h_o is None) == (not entropy)
            for a, b in zip(made, given.truth):
                if a is not None:
                    close(a, b.detach(), dtype)
            if tile is not None:
                wanted = torch.nn.functional.pad(given.q.detach(), (0, -V % tile)).view(C, -1, tile).sum(-1)
                close(masses, wanted, dtype)


@EACH
def test_weigh_and_pull_back(impl, dtype, flags, columns):
    given = Given(impl, dtype, flags, columns)
    made, masses, weighed = given.set.weigh(given.chunk, True, MASS)
    for a, b in zip(made, given.truth):
        close(a, b.detach(), dtype)
    close(masses.sum(1), torch.ones(C).double(), dtype)
    upstream = upstream_of(dtype, False)
    close(product(*given.set.pull_back(given.chunk, weighed, made, upstream)), given.gradient(upstream), dtype)


@EACH
def test_gradients_of_known_statistics(impl, dtype, flags, columns):
    given = Given(impl, dtype, flags, columns)
    for entropy in (False, True):
        upstream = upstream_of(dtype, entropy)
        e, r = given.set.gradients(given.chunk, given.statistics, upstream)
        close(product(e, r), given.gradient(upstream), dtype)


@pytest.mark.parametrize(("dtype", "flags"), covering(1, **GIVEN))
def test_gradients_of_a_slice(impl, dtype, flags):
    """Columns 100 … 149 of the vocabulary: most targets lie elsewhere."""
    given, part = Given(impl, dtype, flags, 0), slice(100, 149)
    slices = HeadSlices(given.problem, part.stop - part.start, C, C)
    upstream = upstream_of(dtype, True)
    chunk = slices.chunk(given.problem.hidden, given.y, part, given.problem.weight[part])
    e, r = given.set.gradients(chunk, given.statistics, upstream)
    close(product(e, r), given.gradient(upstream)[:, part], dtype)


@pytest.mark.parametrize(("dtype", "flags"), covering(1, **GIVEN))
def test_token_losses(impl, dtype, flags):
    """Those that the set has; the others are refused by name."""
    given = Given(impl, dtype, flags, 0)
    factor = torch.randn(C, dtype=torch.float64).to(dtype)
    for loss in ("nll", "unlikelihood"):
        terms = TokenTerms(loss, factor, None, False)
        if loss not in given.set.token_losses:
            with pytest.raises(ValueError, match="loss: expected one of"):
                given.set.token_loss(given.chunk, terms)
            continue
        made, value, e, r = given.set.token_loss(given.chunk, terms)
        lam = given.truth.z_y - given.truth.lse_other
        up, down = -torch.nn.functional.logsigmoid(lam), -torch.nn.functional.logsigmoid(-lam)
        wanted = factor * up if loss == "nll" else torch.where(factor > 0, factor * up, -factor * down)
        close(value, wanted.detach(), dtype)
        close(product(e, r), torch.autograd.grad(wanted.sum(), given.z, retain_graph=True)[0], dtype)
        close(made.lse_other, given.truth.lse_other.detach(), dtype)
