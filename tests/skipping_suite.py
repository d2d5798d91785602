"""Certified skipping, row by row, for every kernel set (`test_skipping.py`, `interpreted/test_engines.py`).

With orthogonal rows of hidden states each row of ∂L/∂logits can be read off dW: D = dW X⁺. So what a call leaves out of
each row is known exactly, and its bound can be held to it.
"""

from __future__ import annotations

import torch
from engine_suite import arguments, oracle_in

from rgpb import LMHead, fused_loss, reference
from rgpb.engine.skipping import largest_of_response

TILE = 16
SHAPE = B, T, V, H = 6, 5, 150, 32  # three pairs, two groups of three; a last tile that isn't whole


def peaked(dtype=torch.float64, bias=True, shape=SHAPE):
    """hidden [B, T, H] with orthogonal rows, head, target, reference logits: each row has most of its mass in a few
    tokens, which are spread over the vocabulary."""
    B, T, V, H = shape
    rows = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0][: B * T]
    hidden = (10 * rows).view(B, T, H).to(dtype).requires_grad_()
    head = LMHead(
        torch.randn(V, H, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_() if bias else None,
    )
    target = torch.randint(V, (B, T))
    target[0, :3] = -100
    target[:, 4] = V - 1
    ref = reference.logits(torch.randn(B, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64))
    return hidden, head, target, ref


def rows_of(dweight, hidden):
    """D [P, V] from dW."""
    x = hidden.detach().double().flatten(0, 1)
    return (x @ dweight.double().T) / x.square().sum(1, keepdim=True)


def check_rows(name, tolerance, shape=SHAPE, **how):
    """Loss, gradients and bound of an objective against the float64 oracle. Returns the metrics, and the most that a
    row left out."""
    B, T, V, H = shape
    hidden, head, target, ref = peaked(shape=shape)
    ours, oracle = arguments(name, ref, target)
    loss, metrics = fused_loss(
        hidden, head, target, objective=name, grad_tolerance=tolerance, return_metrics=True, **ours, **how
    )
    dx, dw, db = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    exact, (dx_true, dw_true, _db_true) = oracle_in(torch.float64, name, hidden, head, target, oracle)
    torch.testing.assert_close(loss, exact)
    made, true, kept = rows_of(dw, hidden), rows_of(dw_true, hidden), (target != -100).view(-1)
    bound = metrics["skipped/bound"].double().view(-1)
    left_out = (made - true).abs().sum(1)
    assert (left_out <= bound + 1e-12).all()
    assert (bound[~kept] == 0).all()
    # what a row leaves out lies in whole tiles: there the gradient is 0, elsewhere exact
    assert ((made - true).abs() < 1e-9).logical_or(made.abs() < 1e-9).all()
    # the largest coefficient of the row, or of its response: g_lo is what all other tokens have together
    here = torch.nn.functional.one_hot(target.clamp(min=0), V).view(-1, V).bool()
    g = torch.where(here, 0, true).sum(1).abs()
    lengths = torch.full((B,), T) if how.get("tolerance_per", "response") == "response" and not two_pass(how) else None
    assert (bound <= tolerance * largest_of_response(g, lengths) * (1 + 1e-6) + 1e-15).all()
    # dX leaves out no more than dW: of a tile that counts for most rows it takes all; the norms are bounded as said
    torch.testing.assert_close(db, made.sum(0))
    widest = head.weight.detach().norm(dim=1).max()
    assert ((dx.view(-1, H) - made @ head.weight.detach()).norm(dim=1) <= bound * widest + 1e-9).all()
    assert ((dx - dx_true).view(-1, H).norm(dim=1) <= bound * widest + 1e-12).all()
    most = (bound * hidden.detach().view(-1, H).norm(dim=1)).sum() + 1e-12 * dw_true.norm()
    assert (dw - dw_true).norm() <= most
    return metrics, left_out.max().item()


def two_pass(how):
    return how.get("path") == "two_pass"
