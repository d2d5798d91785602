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
    """What the loss of this name asks for beside four responses: reference, labels, or two groups."""
    loss = LOSSES[name]
    given = {
        "ref_logits": (loss.needs_ref, ref_logits),
        "label": (loss.needs_label, torch.tensor([True, False, True, False])),
        "group_size": (loss.unit == "group", 2),
        "rewards": (loss.needs_rewards, torch.tensor([[1.0, 0.0], [0.0, 1.0]])),
        "drawn": (loss.needs_drawn, [[1], [1]]),
        "delta": (name == "slic", 99.0),  # so that the hinge isn't flat
    }
    return {argument: value for argument, (needed, value) in given.items() if needed}


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
    ref = {"ref": REF} if LOSSES[name].needs_ref else {}
    loss = LOSSES[name](HIDDEN, eye(), TARGET, **ref, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


# For Δ_w = log 2 and Δ_l = −log 4, so Δ_w − Δ_l = log 8
REF_HALF = torch.tensor([[0.125, 0.5, 9.0], [0.5, 0.5, 0.25]], dtype=torch.float64).log()
LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sequence_unlikelihood", {}, math.log(8) - math.log(63 / 64)),
        ("sequence_unlikelihood", {"alpha": 0.3}, math.log(8) - 0.3 * math.log(63 / 64)),
        ("sequence_unlikelihood", {"length_normalize": True}, math.log(8) / 2 - math.log(3 / 4)),  # e^{S̄_l} is ¼
        ("slic", {}, 0.0),  # 1 − log 8 is negative
        ("slic", {"delta": 3.0}, 3 - math.log(8)),
        ("slic", {"delta": 2.0, "lam": 0.5}, math.log(8) / 4),
        ("cpo", {}, -log_sigmoid(0.1 * math.log(8)) + math.log(8) / 2),
        ("cpo", {"beta": 1.0, "gamma": LOG2, "lam": 0.5}, math.log(5 / 4) + math.log(8) / 4),  # σ(log 8 − log 2) = 4/5
        ("cpo", {"beta": 2.0, "lam": 0.0, "length_normalize": True}, math.log(3 / 2)),  # S̄_w − S̄_l = ½ log 2
        ("orpo", {}, math.log(8) / 2 - 0.1 * math.log(3 / (2 + 8**0.5))),  # odds 1/(√8 − 1) and ⅓
        ("orpo", {"lam": 2.0}, math.log(8) / 2 - 2 * math.log(3 / (2 + 8**0.5))),
        ("rdpo", {}, -log_sigmoid(0.1 * math.log(8) - 0.01)),
        ("rdpo", {"beta": 1.0, "alpha": LOG2}, math.log(5 / 4)),
        ("rpo", {}, -log_sigmoid(0.1 * math.log(8)) + math.log(8) / 2),
        ("rpo", {"beta": 1.0, "lam": 0.5}, math.log(9 / 8) + math.log(8) / 4),
        ("exo", {"beta": 1 / 3, "epsilon": 0.25}, 2 / 3 * math.log(8 / 9) + 1 / 3 * math.log(4 / 3)),
        ("exo", {"beta": 1 / 3}, 2 / 3 * math.log(2 / 3 / 0.999) + 1 / 3 * math.log(1 / 3 / 0.001)),
        ("sppo", {}, (LOG2 - 5) ** 2 + (5 - math.log(4)) ** 2),
        ("sppo", {"beta": 0.25}, (LOG2 - 2) ** 2 + (2 - math.log(4)) ** 2),
        ("nca_pair", {"beta": 1.0}, math.log(3 / 2) + math.log(3) / 2 + math.log(5 / 4) / 2),
        ("nca_pair", {}, -log_sigmoid(LOG2 / 10) - (log_sigmoid(-LOG2 / 10) + log_sigmoid(LOG2 / 5)) / 2),
        ("apo_zero", {"beta": 1.0}, 1 / 3 + 1 / 5),
        ("apo_zero", {"beta": 2.0}, 1 / 5 + 1 / 17),
        ("apo_down", {"beta": 1.0}, 2 / 3 + 1 / 9),
        ("apo_down", {"beta": 2.0}, 4 / 5 + 1 / 65),
    ],
)
def test_pairs_by_hand(name, options, expected):
    ref = {"ref": REF_HALF} if LOSSES[name].needs_ref else {}
    loss = LOSSES[name](HIDDEN, eye(), TARGET, **ref, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("bco", {"beta": 1.0}, [math.log1p(2**-1.5)] * 2),  # δ = −½ log 2, and both are 1.5 log 2 from it
        ("bco", {"beta": 1.0, "delta": LOG2}, [LOG2, math.log(9 / 8)]),
        ("bco", {}, [-log_sigmoid(0.15 * LOG2)] * 2),
        ("kto", {"beta": 1.0}, [1 / 3, 1 / 5]),  # the mean is negative, so z₀ = 0
        ("kto", {"beta": 1.0, "desirable_weight": 1.3, "undesirable_weight": 0.7}, [1.3 / 3, 0.7 / 5]),
        ("kto", {"beta": 1.0, "z0": torch.tensor([[2 * LOG2, 0.0]], dtype=torch.float64)}, [1 / 2, 1 / 9]),
        ("kto", {"beta": 1.0, "z0": torch.tensor([-2 * LOG2, 0.0], dtype=torch.float64)}, [1 / 3, 1 / 5]),
        ("kto", {"beta": 1.0, "z0": -LOG2}, [1 / 5, 1 / 3]),
        ("kto", {"beta": 2.0, "z0": LOG2}, [1 / 2, 1 / 65]),
    ],
)
def test_unpaired_by_hand(name, options, expected):
    """An empty third response counts neither in the mean nor in its value."""
    hidden = torch.cat([HIDDEN, torch.full_like(HIDDEN[:1], math.nan)])
    target = torch.cat([TARGET, torch.full_like(TARGET[:1], -100)])
    ref = torch.cat([REF_HALF, torch.full_like(REF[:1], math.nan)])
    values = LOSSES[name](hidden, eye(), target, ref=ref, label=torch.tensor([1, -1, 1]), reduction="none", **options)
    assert values.tolist() == pytest.approx([*expected, 0.0], abs=1e-14)


@pytest.mark.parametrize("name", ["bco", "kto"])
def test_shift_is_detached(name):
    """Two responses to one token, one label: ∂L/∂Δ is that of the formula with the shift as a constant."""
    p = torch.tensor([[[0.5, 0.5]], [[0.8, 0.2]]], dtype=torch.float64)
    hidden = p.log().requires_grad_()
    ref = torch.full((2, 1), math.log(0.4), dtype=torch.float64)
    target = torch.zeros(2, 1, dtype=torch.int64)
    LOSSES[name](hidden, eye(2), target, ref=ref, label=torch.ones(2), beta=1.0, reduction="sum").backward()
    shift = (math.log(5 / 4) + math.log(2)) / 2
    for i, (delta, p_y) in enumerate(((math.log(5 / 4), 0.5), (math.log(2), 0.8))):
        q = 1 / (1 + math.exp(shift - delta))
        slope = q - 1 if name == "bco" else -q * (1 - q)
        assert hidden.grad[i, 0].tolist() == pytest.approx([slope * (1 - p_y), -slope * (1 - p_y)], abs=1e-14)


# Two groups of one-token responses, Δ = log 2, 0 and −log 2; in the first an empty response stands between them.
# In the second the fourth repeats the first.
GROUP_P = [0.5, 0.25, 0.9, 0.125, 0.5, 0.25, 0.125, 0.5]
GROUP_HIDDEN = torch.tensor([[[p, 1 - p]] for p in GROUP_P], dtype=torch.float64).log()
GROUP_TARGET = torch.tensor([0, 0, -100, 0, 0, 0, 0, 0])[:, None]
GROUP_REF = torch.full((8, 1), math.log(0.25), dtype=torch.float64)
NAN = math.nan


@pytest.mark.parametrize(
    ("name", "options", "rewards", "expected"),
    [
        # softmax(r) = (2, 4, 1)/7 and softmax(βΔ) = (4, 2, 1)/7; then uniform over (4, 2, 1, 4)/11
        ("infonca", {"beta": 1.0}, [LOG2, 2 * LOG2, NAN, 0.0, 0.0, 0.0, 0.0, 0.0],
         [-(2 * math.log(4 / 7) + 4 * math.log(2 / 7) + math.log(1 / 7)) / 7, math.log(11) - 5 / 4 * LOG2]),
        ("infonca", {"beta": 1.0, "tau": 0.5}, [LOG2 / 2, LOG2, NAN, 0.0, 0.0, 0.0, 0.0, 0.0],
         [-(2 * math.log(4 / 7) + 4 * math.log(2 / 7) + math.log(1 / 7)) / 7, math.log(11) - 5 / 4 * LOG2]),
        # σ(βΔ) = (2/3, 1/2, 1/3)
        ("nca", {"beta": 1.0}, [LOG2, 2 * LOG2, NAN, 0.0, 5.0, 5.0, 5.0, 5.0],
         [(2 * math.log(3 / 2) + 4 * LOG2 + math.log(3)) / 7 + math.log(9) / 3,
          (math.log(27 / 2) + math.log(27)) / 4]),
        ("nca", {"beta": 1.0, "tau": 0.5}, [LOG2 / 2, LOG2, NAN, 0.0, 5.0, 5.0, 5.0, 5.0],
         [(2 * math.log(3 / 2) + 4 * LOG2 + math.log(3)) / 7 + math.log(9) / 3,
          (math.log(27 / 2) + math.log(27)) / 4]),
        # d = (0, 1, −1): Y+ is the second; weights 2, 1·2, ½·2. Then no positive
        ("swepo", {"beta": 1.0, "alpha": LOG2}, [1.0, 2.0, NAN, 0.0, 3.0, 3.0, 3.0, 3.0], [math.log(5 / 2), 0.0]),
        ("swepo", {"beta": 1.0, "p": 0}, [1.0, 2.0, NAN, 0.0, 3.0, 3.0, 3.0, 3.0], [math.log(7 / 2), 0.0]),
        # d = (1, 1, −2), weights 4, 2, ½·4 or ½·16; then d = (−½, −½, −½, 1½), weights 2·√2, √2, ½·√2, 2·√8
        ("swepo", {"beta": 1.0, "alpha": LOG2, "p": 1}, [3.0, 3.0, NAN, 0.0, 0.0, 0.0, 0.0, 2.0],
         [math.log(8 / 6), math.log(7.5 / 4)]),
        ("swepo", {"beta": 1.0, "alpha": LOG2}, [3.0, 3.0, NAN, 0.0, 0.0, 0.0, 0.0, 0.0], [math.log(14 / 6), 0.0]),
        ("swepo", {"beta": 1.0, "alpha": LOG2, "p": 1, "mode": "one_vs_all"},
         [3.0, 3.0, NAN, 0.0, 1.0, 1.0, 1.0, 1.0], [math.log(8 / 4), 0.0]),
        ("rnce", {"beta": 1.0}, None, [math.log(7 / 4), math.log(11 / 4)]),
        ("rnce", {"beta": 2.0}, None, [math.log(21 / 16), math.log(37 / 16)]),
        # the best is the second: σ = 1/3 and 2/3 against the others, and 4/5 for (first, last)
        ("multi_dpo", {"beta": 1.0}, [1.0, 2.0, NAN, 0.0, 3.0, 3.0, 3.0, 3.0], [-math.log(2 / 9) / 2, 0.0]),
        ("multi_dpo", {"beta": 1.0, "pairing": "all"}, [1.0, 2.0, NAN, 0.0, 3.0, 0.0, 3.0, 3.0],
         [-math.log(8 / 45) / 3, -math.log(2 / 3 * 1 / 3 * 2 / 3) / 3]),
        ("multi_dpo", {"beta": 1.0, "label_smoothing": 0.25}, [1.0, 0.0, NAN, 1.0, 3.0, 3.0, 3.0, 3.0],
         [-0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3), 0.0]),
    ],
)  # fmt: skip
def test_groups_by_hand(name, options, rewards, expected):
    given = {} if rewards is None else {"rewards": torch.tensor(rewards, dtype=torch.float64).view(2, 4)}
    values = LOSSES[name](
        GROUP_HIDDEN, eye(2), GROUP_TARGET, ref=GROUP_REF, group_size=4, reduction="none", **given, **options
    )
    assert values.tolist() == pytest.approx(expected, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([[1], [2]], [math.log(3 / 2), math.log(5 / 4)]),
        ([[3], [3]], [math.log(5 / 4), math.log(2)]),
        ([[1, 3], [1, 3]], [math.log(7 / 4), math.log(5 / 2)]),
        ([[2], []], [0.0, 0.0]),  # an empty response, and nothing drawn: y₀ alone
    ],
)
def test_mc_po_by_hand(drawn, expected):
    given = {"ref": GROUP_REF, "group_size": 4, "drawn": drawn, "beta": 1.0, "reduction": "none"}
    assert LOSSES["mc_po"](GROUP_HIDDEN, eye(2), GROUP_TARGET, **given).tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", ["rnce", "mc_po", "swepo", "multi_dpo"])
def test_group_without_contrast(name):
    """An empty y₀, or equal rewards: exactly 0, and no gradient from this group."""
    target = GROUP_TARGET.clone()
    given = {"rewards": torch.tensor([[1.0] * 4, [0.0, 1.0, 2.0, 3.0]])}
    if name in ("rnce", "mc_po"):
        target[0] = -100
        given = {"drawn": [[1, 3], [1, 2]]} if name == "mc_po" else {}
    hidden = GROUP_HIDDEN.clone().requires_grad_()
    values = LOSSES[name](hidden, eye(2), target, ref=GROUP_REF, group_size=4, reduction="none", **given)
    values.sum().backward()
    assert values[0].item() == 0.0
    assert values[1].item() > 0
    assert not hidden.grad[:4].any()
    assert hidden.grad[4:7].all()


@pytest.mark.parametrize("length_normalize", [True, False])
def test_complement_of_a_nearly_certain_response(length_normalize):
    """Two tokens of odds e^40 : 1, where S rounds to 0: 1 − e^S is 2e⁻⁴⁰, and half that for S̄."""
    hidden = torch.tensor([[[0.0, 0.0]] * 2, [[40.0, 0.0]] * 2], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, 2, dtype=torch.int64)
    loss = LOSSES["sequence_unlikelihood"](hidden, eye(2), target, length_normalize=length_normalize)
    rejected = math.log(2) * (not length_normalize) - 40
    assert loss.item() == pytest.approx(math.log(2) * (1 if length_normalize else 2) - rejected, rel=1e-14)
    loss.backward()
    # d log(1 − e^S)/dz = −e^S (1 − p)/(1 − e^S), to be multiplied by n⁻¹ for S̄: ½ per token either way
    assert hidden.grad[1].flatten().tolist() == pytest.approx([0.5, -0.5] * 2, rel=1e-12)
    odds = LOSSES["orpo"](hidden, eye(2), target, lam=1.0)  # log odds 0 and 40
    assert odds.item() == pytest.approx(math.log(2) + 40, rel=1e-14)


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite(name, scale):
    """Up to tokens whose probability underflows or rounds to 1."""
    hidden, weight, target, ref_logits = batch()
    hidden = (scale * hidden).requires_grad_()
    loss = LOSSES[name](hidden, weight, target, **extras(name, ref_logits))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert hidden.grad.any() or scale > 1, "at first nothing is saturated"


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
    assert len(results[0][0]) == (2 if LOSSES[name].unit in ("pair", "group") else 4)
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

    target[0] = -100  # pair 0 is responses 0 and 2, both empty now; so is group 0 once they are neighbours
    if LOSSES[name].unit == "group":
        hidden, target, ref_logits = (x[[0, 2, 1, 3]] for x in (hidden, target, ref_logits))
    values = LOSSES[name](hidden, weight, target, **extras(name, ref_logits), reduction="none")
    assert values[0].item() == 0.0
    assert values[1].item() != 0.0
    for reduction in ("mean", "sum"):
        reduced = LOSSES[name](hidden, weight, target, **extras(name, ref_logits), reduction=reduction)
        torch.testing.assert_close(reduced, getattr(values, reduction)())


def test_half_empty_pair():
    """An empty rejected response has log π = 0: ExMATE adds β · e⁰, these others nothing."""
    target = torch.tensor([[0, 0, -100], [-100] * 3])
    nll = -S_W / 2
    nothing_added = dict.fromkeys(("nll_pll", "unlikelihood", "orpo"), nll)
    for name, expected in (nothing_added | {"sequence_unlikelihood": 2 * nll, "exmate": nll + 1}).items():
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
        ("kto", {"ref": REF}, r"label: expected labels \[B\] for kto, got None"),
        ("mle", {"group_size": 2}, "group_size: expected None for mle, got 2"),
        ("dpo", {"ref": REF, "rewards": REF}, "rewards: expected None for dpo, got"),
        ("rnce", {"ref": REF}, "group_size: expected the size K of a group for rnce, got None"),
        ("rnce", {"ref": REF, "group_size": 3}, "group_size: expected a divisor of the 2 responses, got 3"),
        ("rnce", {"ref": REF, "group_size": 0}, "group_size: expected a divisor of the 2 responses, got 0"),
        ("rnce", {"ref": REF, "group_size": 2, "rewards": REF}, "rewards: expected None for rnce, got"),
        ("nca", {"ref": REF, "group_size": 2}, r"rewards: expected rewards \[G, K\] for nca, got None"),
        ("nca", {"ref": REF, "group_size": 2, "rewards": torch.zeros(2)}, r"expected \[G, K\] = \[1, 2\], got \[2\]"),
        (
            "nca",
            {"ref": REF, "group_size": 2, "rewards": torch.tensor([[0.0, math.nan]])},
            "rewards: expected finite values where a response has tokens",
        ),
        (
            "swepo",
            {"ref": REF, "group_size": 2, "rewards": torch.zeros(1, 2), "mode": "best"},
            "mode: expected 'above_mean' or 'one_vs_all', got 'best'",
        ),
        (
            "multi_dpo",
            {"ref": REF, "group_size": 2, "rewards": torch.zeros(1, 2), "pairing": "worst"},
            "pairing: expected 'best' or 'all', got 'worst'",
        ),
        ("mc_po", {"ref": REF, "group_size": 2}, "drawn: expected the drawn rows of each group for mc_po, got None"),
        ("mc_po", {"ref": REF, "group_size": 2, "drawn": [[0]]}, "drawn: expected rows 1 … 1 for each of 1 groups"),
        ("mc_po", {"ref": REF, "group_size": 2, "drawn": [[1], [1]]}, "drawn: expected rows 1 … 1 for each of 1"),
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
