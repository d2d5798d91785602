"""The oracle against numbers worked out by hand, and against the theorems of the papers it transcribes.

With an identity matrix for a head the hidden states *are* the logits, and their gradient is ∂L/∂z.
"""

from __future__ import annotations

import math

import pytest
import torch

from rgpb import reference
from rgpb.head import LMHead
from rgpb.reference import LOSSES, bnf, bnf_as_printed, dynamic_target, token_scores

NEEDS_REF = {"bnf", "dpo", "ipo"}
EXACT = {"rtol": 0, "atol": 1e-12}


def log_rows(*rows):
    """Logits [n, 3] whose softmax is `rows`, each shifted by another constant."""
    return torch.tensor(rows, dtype=torch.float64).log() + torch.arange(len(rows))[:, None]


def eye(v=3, dtype=torch.float64):
    return torch.eye(v, dtype=dtype)


def batch(seed=0, b=4, t=5, h=6, v=11, dtype=torch.float64):
    """A padded batch in which row 1 has holes and row 2 no token; its reference is another random model."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(shape, generator=g, dtype=dtype) for shape in ((b, t, h), (v, h)))
    target = torch.randint(v, (b, t), generator=g)
    target[1, ::2] = -100
    target[2] = -100
    return hidden, weight, target, 2 * torch.randn(b, t, v, generator=g, dtype=dtype)


def extras(name, ref_logits):
    """The reference and labels that the loss of this name asks for."""
    given = {"ref_logits": ref_logits} if name in NEEDS_REF else {}
    return given | ({"label": torch.tensor([True, False, True, False])} if name == "bnf" else {})


# Chosen: tokens of probability ½ and ¼, under the reference ¼ and ½; the third position is masked.
# Rejected: ⅛, ½ and ¼, under the reference ½, ½ and ¼.
CHOSEN = [[0.5, 0.3, 0.2], [0.25, 0.6, 0.15], [0.1, 0.1, 0.8]]
REJECTED = [[0.7, 0.125, 0.175], [0.5, 0.2, 0.3], [0.5, 0.25, 0.25]]
HIDDEN = torch.stack([log_rows(*CHOSEN), log_rows(*REJECTED)])
TARGET = torch.tensor([[0, 0, -100], [1, 0, 2]])
REF = torch.tensor([[0.25, 0.5, 9.0], [0.5, 0.5, 0.25]], dtype=torch.float64).log()
S_W, S_L = math.log(1 / 8), math.log(1 / 64)
D_W, D_L = 0.0, math.log(1 / 4)
REST_L = math.log(7 / 8) + math.log(1 / 2) + math.log(3 / 4)  # Σ log(1 − p) over the rejected


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mle", {}, (-S_W / 2 - S_L / 3) / 2),
        ("mle", {"length_normalize": False}, (-S_W - S_L) / 2),
        ("nll_pll", {}, -S_W / 2 + S_L / 3),
        ("nll_pll", {"length_normalize": False}, -math.log(8)),
        ("unlikelihood", {}, -S_W / 2 - REST_L / 3),
        ("unlikelihood", {"alpha": 0.3}, -S_W / 2 - 0.3 * REST_L / 3),
        ("exmate", {}, -S_W / 2 + 1 / 4),
        ("exmate", {"beta": 0.5, "length_normalize": False}, -S_W + 0.5 / 64),
        ("dpo", {}, -log_sigmoid(0.1 * (D_W - D_L))),
        ("dpo", {"beta": 2.0}, math.log(17 / 16)),  # σ(2 log 4) = 16/17
        ("dpo", {"beta": 2.0, "label_smoothing": 0.25}, math.log(17 / 16) * 0.75 + math.log(17) * 0.25),
        ("ipo", {}, (D_W / 2 - D_L / 3 - 5) ** 2),
        ("ipo", {"tau": 0.25, "length_normalize": False}, (D_W - D_L - 2) ** 2),
        ("simpo", {}, -log_sigmoid(2 * (S_W / 2 - S_L / 3) - 0.5)),
        ("simpo", {"beta": 1.0, "gamma": 0.0}, -log_sigmoid(S_W / 2 - S_L / 3)),
    ],
)
def test_by_hand(name, options, expected):
    ref = {"ref": REF} if name in NEEDS_REF else {}
    loss = LOSSES[name](HIDDEN, eye(), TARGET, **ref, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", ["bnf", "bnf_as_printed"])
def test_bnf_by_hand(name):
    """Chosen: f = (1, 0, 0), p being above the reference, then (½, ½/¾ · .6, ½/¾ · .15).

    Rejected: f_y = ¼ and ¾/⅞ of the others' p, then twice one-hot, p being the reference's.
    """
    first = math.log(0.5)
    second = 0.5 * math.log(0.25) + 0.4 * math.log(0.6) + 0.1 * math.log(0.15)
    others = 0.75 / 0.875 * (0.7 * math.log(0.7) + 0.175 * math.log(0.175))
    rejected = (0.25 * math.log(0.125) + others + math.log(0.5) + math.log(0.25)) / 3
    loss = getattr(reference, name)
    for label in (torch.tensor([True, False]), torch.tensor([1, -1])):
        values = loss(HIDDEN, eye(), TARGET, ref=REF, label=label, reduction="none")
        assert values.tolist() == pytest.approx([-(first + second) / 2, rejected], abs=1e-14)


def test_token_scores_by_hand():
    """The second token of the chosen response; the head adds 2 · ½ to each logit."""
    head = LMHead(eye() / 2, torch.full((3,), 0.5, dtype=torch.float64), scale=2.0)
    scores = token_scores(HIDDEN, head, TARGET)
    expected = {
        "logp": math.log(0.25),
        "log_odds": math.log(1 / 3),
        "lse": 2.0,  # `log_rows` shifts the second row by 1
        "entropy": -sum(p * math.log(p) for p in CHOSEN[1]),
        "other_entropy": -sum(q * math.log(q) for q in (0.8, 0.2)),
    }
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name][0, 1].item() == pytest.approx(value, abs=1e-14)
        assert scores[name][0, 2].item() == 0.0, f"{name} at a masked position"


def test_log_odds_of_a_saturated_token():
    """40 above two others: 1 − p = 2e⁻⁴⁰ is far below float64's rounding of p, and λ is still right."""
    z = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    log_odds = token_scores(z, eye(), torch.tensor([0]))["log_odds"]
    assert log_odds.item() == pytest.approx(40 - math.log(2), rel=1e-15, abs=0)


def test_logits_bias_scale_softcap():
    head = LMHead(torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]), softcap=3.0, scale=0.5)
    expected = [3 * math.tanh(0.5 * 7 / 3), 3 * math.tanh(0.5 * -3 / 3)]
    z = reference.logits(torch.tensor([[[3.0]]]), head)
    assert z.shape == (1, 1, 2)
    assert z.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def bnf_gradient(label, loss=bnf, scale=3.0):
    """∂L/∂z [40, 7] for 40 responses of one token, then z, y, its one-hot, and the scores of both models."""
    g = torch.Generator().manual_seed(1)
    z, ref_z = (scale * torch.randn(40, 1, 7, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randint(7, (40, 1), generator=g)
    z.requires_grad_()
    labels = torch.full((40,), label)
    loss(z, eye(7), y, ref_logits=ref_z, label=labels, reduction="sum").backward()
    scores, ref = (token_scores(x.detach(), eye(7), y) for x in (z, ref_z))
    onehot = torch.nn.functional.one_hot(y[:, 0], 7).double()
    return z.grad[:, 0], z.detach()[:, 0], y[:, 0], onehot, scores, ref


def test_dynamic_target_is_a_distribution():
    """BNF Eq. 6 and Appendix A.2; saturated tokens (scale 60) included."""
    for scale in (3.0, 60.0):
        _, z, y, _, _, ref = bnf_gradient(1, scale=scale)
        rest = torch.nn.functional.logsigmoid(-ref["log_odds"][:, 0])
        f = dynamic_target(z, y, ref["logp"][:, 0], rest)
        assert not f.requires_grad
        assert (f >= 0).all()
        torch.testing.assert_close(f.sum(1), torch.ones_like(f[:, 0]), **EXACT)


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("loss", [bnf, bnf_as_printed])
def test_bnf_gradients(loss, label):
    """BNF Eq. 8, Eq. 9, Appendix A.4 and the closed form c · (p − onehot) on the logits."""
    grad, z, y, onehot, scores, ref = bnf_gradient(label, loss)
    p, p_y, p_ref = z.softmax(1), scores["logp"][:, 0].exp(), ref["logp"][:, 0].exp()
    below = p_y < p_ref
    assert 5 < below.sum() < 35, "both cases of Eq. 9 should occur"

    f = reference.dynamic_target_as_printed(z, y, ref["logp"][:, 0])
    torch.testing.assert_close(grad, label * (p - f), **EXACT)  # Eq. 8
    at_target = (grad * onehot).sum(1)
    eq9 = torch.where(below, p_y * (1 - p_ref) / p_ref, 1 - p_y)
    torch.testing.assert_close(at_target.abs(), eq9, **EXACT)
    torch.testing.assert_close((grad * (1 - onehot)).abs().sum(1), at_target.abs(), **EXACT)  # A.4
    c = (scores["log_odds"] - ref["log_odds"]).exp().clamp(max=1)
    torch.testing.assert_close(grad, label * c * (p - onehot), **EXACT)


def test_saturated_token_spoils_only_the_printed_form():
    """Margin 20 in float32, where 1 − p rounds to 0. `bnf`: float64's gradient. Printed: NaN all over dW."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 20.0]]])
    x_ref = torch.tensor([[[0.5, 0.2], [0.3, 21.0]]])
    y, label = torch.tensor([[0, 1]]), torch.tensor([True])
    grads = {}
    for loss, dtype in ((bnf, torch.float64), (bnf, torch.float32), (bnf_as_printed, torch.float32)):
        weight = eye(2, dtype).requires_grad_()
        value = loss(x.to(dtype), weight, y, ref_logits=x_ref.to(dtype), label=label)
        value.backward()
        assert value.dtype == dtype
        grads[loss.__name__, dtype] = weight.grad
    assert grads["bnf_as_printed", torch.float32].isnan().all()
    torch.testing.assert_close(grads["bnf", torch.float32].double(), grads["bnf", torch.float64], rtol=1e-6, atol=1e-6)
    robust = bnf(x, eye(2, torch.float32), y, ref=torch.tensor([[-0.55, 0.0]]), label=label)
    assert robust.isfinite(), "a reference log-prob that has rounded to 0"


def test_saturated_pair_keeps_the_ratio_of_odds():
    """Margins 30 and 31: 1 − p has three digits left in float64, and the others' c = 1/e is still exact."""
    z = torch.tensor([[[30.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    ref = z.detach() + torch.tensor([1.0, 0.0, 0.0])
    bnf(z, eye(), torch.tensor([[0]]), ref_logits=ref, label=torch.tensor([1])).backward()
    assert z.grad[0, 0, 1].item() == pytest.approx(math.exp(-31), rel=1e-12, abs=0)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_equals_padded(name):
    """Value and gradient, with holes and a response without tokens; masked rows hold NaN, so none is read."""
    hidden, weight, target, ref_logits = batch()
    keep = [5, 4, 0, 3]  # positions that each response brings along; row 1's holes stay in
    target[3, 3:] = -100
    hidden[target == -100] = float("nan")
    ref_logits[target == -100] = float("nan")
    rows = torch.arange(5) < torch.tensor(keep)[:, None]
    cu_seqlens = torch.tensor([0, *torch.tensor(keep).cumsum(0).tolist()], dtype=torch.int32)
    results = []
    for packed in (False, True):
        w = weight.clone().requires_grad_()
        pick = (lambda x: x[rows]) if packed else (lambda x: x)
        values = LOSSES[name](
            pick(hidden),
            w,
            pick(target),
            **extras(name, pick(ref_logits)),
            cu_seqlens=cu_seqlens if packed else None,
            reduction="none",
        )
        values.sum().backward()
        results.append((values.detach(), w.grad))
    assert len(results[0][0]) == (4 if name in ("mle", "bnf") else 2)
    assert results[0][1].abs().sum() > 0
    for padded, packed in zip(*results):
        torch.testing.assert_close(packed, padded, **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_no_token(name):
    """A batch without any token gives 0 and a gradient of 0; beside others, only the empty unit is 0."""
    hidden, weight, target, ref_logits = batch()
    hidden.requires_grad_()
    loss = LOSSES[name](hidden, weight, torch.full_like(target, -100), **extras(name, ref_logits))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()

    target[0] = -100  # pair 0 is responses 0 and 2, both empty now
    values = LOSSES[name](hidden, weight, target, **extras(name, ref_logits), reduction="none")
    assert values[0].item() == 0.0
    assert values[1].item() != 0.0
    for reduction in ("mean", "sum"):
        reduced = LOSSES[name](hidden, weight, target, **extras(name, ref_logits), reduction=reduction)
        torch.testing.assert_close(reduced, getattr(values, reduction)())


def test_half_empty_pair():
    """An empty rejected response has log π = 0: ExMATE adds β · e⁰, the others nothing."""
    target = torch.tensor([[0, 0, -100], [-100] * 3])
    nll = -S_W / 2
    for name, expected in {"nll_pll": nll, "unlikelihood": nll, "exmate": nll + 1}.items():
        assert LOSSES[name](HIDDEN, eye(), target).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dpo", {}, "ref: expected one of ref and ref_logits for dpo, got None"),
        ("dpo", {"ref": REF[:, :1]}, r"ref: expected the shape of target, \[2, 3\], got \[2, 1\]"),
        ("mle", {"ref": REF}, "ref: expected no reference for mle, got"),
        ("bnf", {"ref": REF}, r"label: expected labels \[B\] for bnf, got None"),
        ("bnf", {"ref": REF, "label": torch.tensor([1, 0])}, r"label: expected \[2\] of bool or ±1"),
        ("mle", {"reduction": "max"}, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
        ("mle", {"target": TARGET + 3}, r"target: expected -100 or 0 … 2, got \[3\]"),
        ("mle", {"target": TARGET.int()}, "target: expected int64, got torch.int32"),
        ("mle", {"cu_seqlens": torch.tensor([0, 2])}, r"target: expected \[N\] beside cu_seqlens"),
        ("mle", {"head": eye().float()}, "hidden: expected the head's torch.float32, got torch.float64"),
        ("simpo", {"hidden": HIDDEN[:1], "target": TARGET[:1]}, "target: expected chosen and rejected"),
    ],
)
def test_bad_input(name, change, message):
    given = {"hidden": HIDDEN, "head": eye(), "target": TARGET} | change
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**given)


@pytest.mark.parametrize("ends", [[0, 4, 3, 6], [1, 6], [0, 5], [0], []])
def test_bad_cu_seqlens(ends):
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to 6"):
        LOSSES["mle"](HIDDEN.flatten(0, 1), eye(), TARGET.flatten(), cu_seqlens=torch.tensor(ends, dtype=torch.int32))
