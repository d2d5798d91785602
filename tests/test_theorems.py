"""What the papers prove of their objectives, as properties of the library's losses and gradients in float64.

With an identity matrix for a head the hidden states are the logits and their gradient is ∂L/∂z. Where a statement
doesn't hold as printed, its test says so and tests the form that holds.

Dimensions: B responses, T positions, V vocabulary, G groups of K responses.
S = Σ log π_θ, Δ = S − Σ log π_ref, S̄ = S/n; λ the log-odds of a token, log p/(1 − p).
RGPB: Tuan & Wang 2024 (arXiv 2408.16751). BNF: "As Simple as Fine-tuning: LLM Alignment via Bidirectional Negative
Feedback Loss" (ICLR 2025). SWEPO: arXiv 2412.04628. MC-PO: arXiv 2502.04567.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rgpb import OBJECTIVES, fused_loss, reference

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 5))])


def close(got, expected):
    torch.testing.assert_close(got, expected, **EXACT)


def gradient(objective, z: Tensor, target: Tensor, /, **given) -> tuple[Tensor, Tensor]:
    """The values [U] and ∂(their sum)/∂z [B, T, V]."""
    z = z.detach().clone().requires_grad_()
    eye = torch.eye(z.shape[-1], dtype=z.dtype)
    values = fused_loss(z, eye, target, objective=objective, reduction="none", **given)
    values.sum().backward()
    return values.detach(), z.grad


def free(objective, delta: Tensor, /, **given) -> tuple[Tensor, Tensor]:
    """The values [U] and ∂(their sum)/∂Δ [B] for any given Δ [B].

    One token per response, at log p = −400: 1 − p is 1 in float64, so ∂L/∂z_y is ∂L/∂Δ.
    """
    z = torch.tensor([-400.0, 0.0], dtype=torch.float64).expand(len(delta), 1, 2)
    target = torch.zeros(len(delta), 1, dtype=torch.int64)
    values, dz = gradient(objective, z, target, ref=-400 - delta.double()[:, None], **given)
    return values, dz[:, 0, 0]


def tokens(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p [B, T, V], the one-hot targets [B, T, V] (0 where masked), and λ [B, T]."""
    onehot = torch.nn.functional.one_hot(target.clamp(min=0), z.shape[-1]).double() * (target >= 0)[..., None]
    others = z.masked_fill(onehot > 0, -torch.inf).logsumexp(-1)
    return z.softmax(-1), onehot, (z * onehot).sum(-1) - others


def coefficients(dz: Tensor, z: Tensor, target: Tensor) -> Tensor:
    """g [B, T] of dz = g (onehot − p), which is asserted."""
    p, onehot, log_odds = tokens(z, target)
    direction = torch.where(onehot > 0, torch.sigmoid(-log_odds)[..., None], -p) * (target >= 0)[..., None]
    g = (dz * onehot).sum(-1) / (direction * onehot).sum(-1).clamp(min=1e-300)
    close(dz, g[..., None] * direction)
    return g


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int, lengths=(4, 4), v=6, scale=2.0):
    """Logits [2, T, V], targets with y+ ≠ y− at the first position, which has one context for both; ref [2, T]."""
    z = scale * rand(seed, 2, max(lengths), v)
    z[1, 0] = z[0, 0]
    target = torch.randint(v, z.shape[:2], generator=torch.Generator().manual_seed(seed))
    target[1, 0] = (target[0, 0] + 1) % v
    for row, n in enumerate(lengths):
        target[row, n:] = -100
    return z, target, -rand(seed + 99, *target.shape).abs()


def ascent(objective, z: Tensor, target: Tensor, **given) -> Tensor:
    """−∂L/∂z at the first position, summed over the two responses that share its logits. [V]"""
    _, dz = gradient(objective, z, target, **given)
    return -dz[:, 0].sum(0)


# -- RGPB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_rgpb_lemma_4_1_gradient_is_a_coefficient_times_onehot_minus_softmax(name):
    """Of every objective; and it is the gradient that autograd finds through dense logits."""
    spec = OBJECTIVES[name]
    z, ref_z = rand(1, 8, 3, 7), rand(2, 8, 3, 7)
    target = torch.randint(7, (8, 3), generator=torch.Generator().manual_seed(3))
    target[0, 1] = target[5, 2] = -100
    ref = ref_z.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    options = {
        "slic": {"delta": 9.0},  # not flat
        "rdpo": {"alpha": 0.3},
        "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        "mc_po": {"m": 3},  # all negatives, so that nothing depends on the draw
    }.get(name, {})
    given = {}
    if spec.ref:
        given["ref"] = ref
    if spec.label:
        given["label"] = torch.tensor([1, -1, -1, 1, 1, -1, 1, 1])
    if spec.unit == "group":
        given["group_size"] = 4
    if spec.rewards:
        given["rewards"] = rand(4, 2, 4)
    _, dz = gradient(name, z, target, **given, **options)
    g = coefficients(dz, z, target)
    assert (g != 0).any()

    if name == "mc_po":
        options = {"drawn": [[1, 2, 3]] * 2}
    dense = z.clone().requires_grad_()
    reference.LOSSES[name](dense, torch.eye(7, dtype=z.dtype), target, reduction="sum", **given, **options).backward()
    close(dz, dense.grad)


@SEEDS
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_rgpb_eq_7_dpo_coefficient(seed, beta):
    """∓β σ(−m) on every token of the chosen and of the rejected."""
    z, target, ref = pair(seed, (4, 3))
    _, dz = gradient("dpo", z, target, ref=ref, beta=beta)
    delta = ((z.log_softmax(-1) * tokens(z, target)[1]).sum(-1) - ref * (target >= 0)).sum(-1)
    c = beta * torch.sigmoid(-beta * (delta[0] - delta[1]))
    close(coefficients(dz, z, target), torch.stack([-c, c])[:, None] * (target >= 0))


@SEEDS
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_rgpb_eq_8_unlikelihood_coefficient(seed, alpha):
    """−1/n on the chosen, α e^λ / n on the rejected."""
    z, target, _ = pair(seed, (4, 3))
    _, dz = gradient("unlikelihood", z, target, alpha=alpha)
    _, _, log_odds = tokens(z, target)
    expected = torch.stack([torch.full_like(log_odds[0], -1 / 4), alpha * log_odds[1].exp() / 3])
    close(coefficients(dz, z, target), expected * (target >= 0))


@SEEDS
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("length_normalize", [True, False])
def test_rgpb_eq_9_exmate_coefficient(seed, beta, length_normalize):
    """−1/n on the chosen, β e^{S̄} / n on the rejected; −1 and β e^S without the lengths."""
    z, target, _ = pair(seed, (4, 3), scale=0.5)
    _, dz = gradient("exmate", z, target, beta=beta, length_normalize=length_normalize)
    n_w, n_l = (4, 3) if length_normalize else (1, 1)
    logp = (z.log_softmax(-1) * tokens(z, target)[1]).sum((-1, -2))[1]
    expected = torch.stack([torch.tensor(-1 / n_w, dtype=z.dtype), beta * (logp / n_l).exp() / n_l])
    close(coefficients(dz, z, target), expected[:, None] * (target >= 0))


@SEEDS
def test_rgpb_eq_12_and_19_dpo_only_moves_probability_from_one_token_to_the_other(seed):
    """In one context: +c on y+, −c on y−, nothing on the other tokens."""
    z, target, ref = pair(seed)
    moved = ascent("dpo", z, target, ref=ref)
    up, down = target[:, 0].tolist()
    assert moved[up] > 0
    close(moved[down], -moved[up])
    close(moved.index_fill(0, torch.tensor([up, down]), 0.0), torch.zeros(6, dtype=z.dtype))


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_rgpb_eq_12_dpo_coefficient_is_bounded_by_beta_and_vanishes_as_the_margin_grows(beta):
    margin = torch.linspace(-30, 30, 121, dtype=torch.float64)
    _, grad = free("dpo", torch.cat([margin, torch.zeros_like(margin)]) / beta, beta=beta)
    chosen, rejected = grad[:121], grad[121:]
    close(rejected, -chosen)
    assert (rejected > 0).all()
    assert (rejected < beta).all()
    assert (rejected.diff() < 0).all()
    assert rejected[0] > 0.999 * beta
    assert rejected[-1] < 1e-12 * beta


@SEEDS
@pytest.mark.parametrize("name", ["unlikelihood", "exmate"])
def test_rgpb_eq_15_and_18_signs(name, seed):
    """Never down on y+, never up on y−."""
    z, target, _ = pair(seed)
    moved = ascent(name, z, target)
    assert moved[target[0, 0]] > 0
    assert moved[target[1, 0]] < 0


@SEEDS
def test_rgpb_eq_15_unlikelihood_in_one_context(seed):
    """α = 1: (1 − p_{y+} + e^λ p_{y+}) / n on y+ and −2 p_{y−} / n on y−."""
    z, target, _ = pair(seed)
    p, _, log_odds = tokens(z, target)
    (up, down), p, odds = target[:, 0].tolist(), p[0, 0], log_odds[1, 0].exp()
    moved = ascent("unlikelihood", z, target)
    close(moved[up], (1 - p[up] + odds * p[up]) / 4)
    close(moved[down], -2 * p[down] / 4)


def test_rgpb_eq_15_unlikelihood_coefficient_explodes_but_not_its_gradient_on_the_logits():
    """The factor e^λ of ∇ log p grows without bound as p → 1. The paper says so of the gradient itself; on the logits
    (onehot − p) takes as much away: Σ_k |∂L/∂z_k| = 2αp/n never exceeds 2α/n."""
    log_odds = torch.arange(1.0, 31.0, dtype=torch.float64)
    z = torch.stack([log_odds, torch.zeros_like(log_odds)], -1)[:, None]
    z = torch.cat([torch.zeros_like(z), z])
    target = torch.zeros(60, 1, dtype=torch.int64)
    _, dz = gradient("unlikelihood", z, target)
    g = dz[30:, 0, 0] / torch.sigmoid(-log_odds)
    close(g, log_odds.exp())
    assert g[-1] > 1e13
    close(dz[30:, 0].abs().sum(-1), 2 * torch.sigmoid(log_odds))


@SEEDS
@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2), (1, 4)])
def test_rgpb_eq_18_exmate_coefficient_is_bounded_by_beta_over_n(seed, beta, lengths):
    z, target, _ = pair(seed, lengths, scale=8.0)
    z[1] += 20 * tokens(z, target)[1][1]  # a rejected response as probable as can be
    _, dz = gradient("exmate", z, target, beta=beta)
    n = lengths[1]
    assert (dz[1].abs() <= beta / n).all()
    assert dz[1].abs().sum(-1).max() <= 2 * beta / n
    assert (coefficients(dz, z, target)[1, :n] <= beta / n * (1 + 1e-6)).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_rgpb_eq_20_unlikelihood_moves_the_other_tokens_by_odds_minus_one(alpha):
    """p_k (α e^λ − 1)/n: down for p_{y−} < 1/(1 + α), 0 there, up above, when even y+ has to share."""
    for log_odds in (-2.0, 0.0, 2.0):
        z = torch.zeros(2, 1, 4, dtype=torch.float64)
        z[:, 0, 1] = log_odds - math.log(alpha) + math.log(3)
        moved = ascent("unlikelihood", z, torch.tensor([[0], [1]]), alpha=alpha)
        p = z[0, 0].softmax(0)
        close(moved[2:], p[2:] * (math.exp(log_odds) - 1))


@SEEDS
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_rgpb_eq_21_exmate_takes_from_the_other_tokens(seed, beta):
    """p_k (β e^{S̄} − 1)/n < 0 for β ≤ 1 and responses of one length, as the paper's time steps have it."""
    z, target, _ = pair(seed)
    s = (z.log_softmax(-1) * tokens(z, target)[1]).sum((-1, -2))[1] / 4
    others = [k for k in range(6) if k not in target[:, 0].tolist()]
    moved = ascent("exmate", z, target, beta=beta)[others]
    close(moved, z[0, 0].softmax(0)[others] * (beta * s.exp() - 1) / 4)
    assert (moved < 0).all()


@SEEDS
def test_rgpb_eq_22_dpo_cancels_where_tokens_and_contexts_agree(seed):
    """With other contexts, but the same token, what is left is c (p_l − p_w)."""
    z, target, ref = pair(seed)
    target[1, 0] = target[0, 0]
    close(ascent("dpo", z, target, ref=ref), torch.zeros(6, dtype=z.dtype))

    z[1, 0] = rand(seed + 7, 6)
    _, dz = gradient("dpo", z, target, ref=ref)
    p, c = z.softmax(-1), coefficients(dz, z, target)[1, 0]
    close(-dz[:, 0].sum(0), c * (p[1, 0] - p[0, 0]))
    assert c > 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_rgpb_eq_23_unlikelihood_turns_against_a_shared_token(alpha):
    """(1 − α e^λ)(onehot − p): up below p = 1/(1 + α), down above. The coefficient goes to −∞ with λ, the gradient on
    the logits to −α: the printed explosion is the coefficient's."""
    log_odds = torch.arange(-8.0, 20.0, dtype=torch.float64) - math.log(alpha)
    z = torch.stack([log_odds, torch.zeros_like(log_odds)], -1)[:, None].repeat(2, 1, 1)
    _, dz = gradient("unlikelihood", z, torch.zeros(len(z), 1, dtype=torch.int64), alpha=alpha)
    moved = -dz.view(2, -1, 2).sum(0)[:, 0]
    close(moved, (1 - alpha * log_odds.exp()) / (1 + log_odds.exp()))
    assert (moved > -alpha).all()
    assert (moved < 1).all()


@SEEDS
@pytest.mark.parametrize("beta", [0.5, 0.999])
def test_rgpb_eq_24_exmate_stays_positive_on_a_shared_token(seed, beta):
    """For β < 1: (1 − β e^{S̄}) / n with responses of one length, and 1 − β e^S with any lengths."""
    for lengths, length_normalize in (((4, 4), True), ((4, 2), False), ((2, 4), False), ((1, 4), True)):
        z, target, _ = pair(seed, lengths)
        target[1, 0] = target[0, 0]
        z[1] += 20 * tokens(z, target)[1][1] * torch.arange(4)[:, None].clamp(max=1)  # e^S̄ is near p of the first
        moved = ascent("exmate", z, target, beta=beta, length_normalize=length_normalize)
        assert moved[target[0, 0]] > 0, (lengths, length_normalize)


def test_rgpb_eq_24_fails_for_a_shorter_rejected_response_when_normalised_by_length():
    """1/n_w − β e^{S̄_l}/n_l turns negative for a probable y_l with n_l < n_w: the paper's time steps have one n."""
    z = torch.zeros(2, 4, 2, dtype=torch.float64)
    z[1, 0, 0] = z[0, 0, 0] = 3.0
    target = torch.tensor([[0, 0, 0, 0], [0, -100, -100, -100]])
    expected = 1 / 4 - 0.9 * torch.sigmoid(torch.tensor(3.0)).item()
    moved = ascent("exmate", z, target, beta=0.9)[0].item()
    assert moved == pytest.approx(expected / (1 + math.exp(3)), rel=1e-6)
    assert moved < 0


# -- BNF --------------------------------------------------------------------------------------------------------------


def bnf(seed: int, label: int, scale=3.0):
    """values, dz, z, target, ref [40, 2] for 40 responses of two tokens, and f [40, 2, V] from Eq. 6 by its letter."""
    z, ref_z = scale * rand(seed, 40, 2, 7), scale * rand(seed + 50, 40, 2, 7)
    target = torch.randint(7, (40, 2), generator=torch.Generator().manual_seed(seed))
    p, onehot, _ = tokens(z, target)
    ref = (ref_z.log_softmax(-1) * onehot).sum(-1)
    p_y = (p * onehot).sum(-1)
    f_y = (p_y / ref.exp()).clamp(max=1)
    f = onehot * f_y[..., None] + (1 - onehot) * p * ((1 - f_y) / (1 - p_y))[..., None]
    values, dz = gradient("bnf", z, target, ref=ref, label=torch.full((40,), label))
    return values, dz, z, target, ref, f


LABELS = pytest.mark.parametrize("label", [1, -1])


@LABELS
@SEEDS
def test_bnf_eq_4_value(seed, label):
    values, _, z, _, _, f = bnf(seed, label)
    close(values, -label * (f * z.log_softmax(-1)).sum((-1, -2)) / 2)


@LABELS
@SEEDS
def test_bnf_eq_6_the_dynamic_target_in_the_gradient_is_a_distribution(seed, label):
    """f = p − label · n · ∂L/∂z (Eq. 8): non-negative, of sum 1, capped ratio on the target, proportional elsewhere."""
    _, dz, z, target, ref, _ = bnf(seed, label)
    p, onehot, _ = tokens(z, target)
    f = p - label * 2 * dz
    assert (f > -1e-12).all()
    close(f.sum(-1), torch.ones_like(ref))
    p_y = (p * onehot).sum(-1)
    close((f * onehot).sum(-1), torch.minimum(p_y / ref.exp(), torch.ones_like(p_y)))
    shares = f * (1 - onehot) / (p * (1 - onehot)).clamp(min=1e-300)
    f_y = (f * onehot).sum(-1)
    close(shares * (1 - p_y)[..., None], (1 - f_y)[..., None] * (1 - onehot))


@LABELS
@SEEDS
def test_bnf_eq_5_is_maximum_likelihood_above_the_reference(seed, label):
    """π_θ ≥ π_ref everywhere: f is one-hot, and value and gradient are those of ± the mean log-probability."""
    _, _, z, target, _, _ = bnf(seed, label)
    ref = torch.full(target.shape, -60.0, dtype=torch.float64)
    values, dz = gradient("bnf", z, target, ref=ref, label=torch.full((40,), label))
    nll, dnll = gradient("mle", z, target)
    close(values, label * nll)
    close(dz, label * dnll)


@LABELS
@SEEDS
def test_bnf_eq_7_chain_rule_has_no_minus_sign(seed, label):
    """∇_θ L = Σ ∂L/∂z ∇_θ z. Eq. 7 prints a minus before the sum that Eq. 4's own minus has used up already."""
    _, dz, z, target, ref, _ = bnf(seed, label)
    weight = torch.eye(7, dtype=z.dtype, requires_grad=True)
    fused_loss(z, weight, target, objective="bnf", ref=ref, label=torch.full((40,), label), reduction="sum").backward()
    close(weight.grad, torch.einsum("btv,bth->vh", dz, z))


@LABELS
@SEEDS
def test_bnf_eq_8_gradient_is_softmax_minus_dynamic_target(seed, label):
    _, dz, z, _, _, f = bnf(seed, label)
    close(dz, label * (z.softmax(-1) - f) / 2)


@LABELS
@SEEDS
def test_bnf_eq_9_gradient_on_the_target(seed, label):
    """Both cases. The right side is printed with label(y) and without a modulus, so for label −1 its sign is off."""
    _, dz, z, target, ref, _ = bnf(seed, label)
    p, onehot, _ = tokens(z, target)
    p_y, p_ref = (p * onehot).sum(-1), ref.exp()
    below = p_y < p_ref
    assert 10 < below.sum() < 70, "both cases should occur"
    close((dz * onehot).sum(-1).abs(), torch.where(below, p_y * (1 - p_ref) / p_ref, 1 - p_y) / 2)


@pytest.mark.parametrize("p_ref", [0.05, 0.5, 0.9])
def test_bnf_eq_9_negative_feedback_has_its_only_maximum_at_the_reference(p_ref):
    p = torch.cat([torch.linspace(0.001, p_ref, 50), torch.linspace(p_ref, 0.999, 50)]).double()
    p[49] = p[50] = p_ref
    z = torch.stack([p.log(), torch.log1p(-p)], -1)[:, None]
    target = torch.zeros(100, 1, dtype=torch.int64)
    ref = torch.full((100, 1), math.log(p_ref), dtype=torch.float64)
    _, dz = gradient("bnf", z, target, ref=ref, label=-torch.ones(100))
    size = dz[:, 0, 0].abs()
    assert (size[:50].diff() > 0).all()
    assert (size[50:].diff() < 0).all()
    close(size[49:51], torch.full((2,), 1 - p_ref, dtype=torch.float64))
    close(size[:50], p[:50] * (1 - p_ref) / p_ref)  # linear, down to 0


@LABELS
@SEEDS
def test_bnf_appendix_a_4_the_other_tokens_move_as_much_as_the_target(seed, label):
    _, dz, z, target, _, _ = bnf(seed, label)
    onehot = tokens(z, target)[1]
    at_target, elsewhere = (dz * onehot).sum(-1), dz * (1 - onehot)
    close(elsewhere.abs().sum(-1), at_target.abs())
    assert (at_target * label < 0).all()
    assert (elsewhere * label >= 0).all()


@LABELS
@SEEDS
def test_bnf_coefficient_is_the_capped_ratio_of_odds(seed, label):
    """Eq. 8 and 6 in closed form: −label/n · min(1, e^{λ − λ_ref})."""
    _, dz, z, target, ref, _ = bnf(seed, label)
    log_odds = tokens(z, target)[2]
    ratio = (log_odds - (ref - torch.log(-torch.expm1(ref)))).exp().clamp(max=1)
    torch.testing.assert_close(coefficients(dz, z, target), -label * ratio / 2, rtol=1e-8, atol=1e-12)


# -- SWEPO and InfoNCA ------------------------------------------------------------------------------------------------


def group(seed: int, k=6):
    """Δ [K] and rewards [1, K]."""
    return 4 * rand(seed, k), 2 * rand(seed + 31, 1, k)


def swepo_probabilities(delta: Tensor, rewards: Tensor, beta: float, alpha: float, p: float):
    """P and P+ [K] from weights e^{α|d|^p} as factors (SWEPO Eq. 9–10, 16–17, 27), and the mask of Y+."""
    d = rewards[0] - rewards.mean()
    weighted = torch.exp(alpha * d.abs() ** p) * torch.exp(beta * delta)
    positive = d > 0
    return weighted / weighted.sum(), positive * weighted / weighted[positive].sum(), positive


WEIGHTS = pytest.mark.parametrize(("alpha", "p"), [(1.0, 2), (0.5, 1), (0.7, 0), (0.0, 2)])


@WEIGHTS
@SEEDS
def test_swepo_eq_11_and_15_weighting_shifts_the_logits(seed, alpha, p):
    delta, rewards = group(seed)
    values, _ = free("swepo", delta, rewards=rewards, group_size=6, beta=0.5, alpha=alpha, p=p)
    probability, _, positive = swepo_probabilities(delta, rewards, 0.5, alpha, p)
    close(values, -probability[positive].sum().log()[None])


@SEEDS
def test_swepo_eq_16_power_zero_is_unweighted(seed):
    delta, rewards = group(seed)
    by_power, unweighted = (
        free("swepo", delta, rewards=rewards, group_size=6, alpha=alpha, p=p) for alpha, p in ((3.0, 0), (0.0, 2))
    )
    for got, expected in zip(by_power, unweighted):
        close(got, expected)


@WEIGHTS
@SEEDS
def test_swepo_lemma_5_3_gradient_on_the_scores(seed, alpha, p):
    """P_k − P+_k 1[k ∈ Y+], times β for ∂s/∂Δ."""
    delta, rewards = group(seed)
    _, grad = free("swepo", delta, rewards=rewards, group_size=6, beta=0.5, alpha=alpha, p=p)
    probability, among_positive, positive = swepo_probabilities(delta, rewards, 0.5, alpha, p)
    close(grad, 0.5 * (probability - among_positive))
    close(grad.sum(), torch.zeros((), dtype=grad.dtype))
    assert (grad[positive] < 0).all()
    assert (grad[~positive] > 0).all()


@SEEDS
def test_swepo_lemma_c_3_and_corollary_c_4_raise_every_positive_and_lower_every_negative(seed):
    """∂L/∂π_k = β (P_k − P+_k 1[k ∈ Y+]) / π_k, here for responses of one token from two."""
    _, rewards = group(seed)
    z, ref = rand(seed, 6, 1, 2), -rand(seed + 8, 6).abs()
    _, dz = gradient(
        "swepo", z, torch.zeros(6, 1, dtype=torch.int64), ref=ref[:, None], rewards=rewards, group_size=6, beta=0.5
    )
    policy = z.softmax(-1)[:, 0, 0]
    by_policy = dz[:, 0, 0] / (policy * (1 - policy))  # ∂π/∂z_y = π(1 − π)
    probability, among_positive, positive = swepo_probabilities(policy.log() - ref, rewards, 0.5, 1.0, 2)
    close(by_policy, 0.5 * (probability - among_positive) / policy)
    assert (by_policy[positive] < 0).all()
    assert (by_policy[~positive] > 0).all()


def test_swepo_lemma_5_6_descent_drives_the_negatives_to_zero():
    """On free scores, five groups at once. No finite point is stationary, since every negative has P_k > 0 for a
    gradient; along the descent Σ P over Y− and the loss go to 0, and only in that limit does the gradient of the
    positives vanish.

    The sentence after Lemma C.2's gradient has a negative's score grow under a positive gradient; descent lowers it.
    """
    delta, rewards = (torch.cat(x) for x in zip(*(group(seed) for seed in range(5))))
    rewards = rewards / 2
    d = rewards - rewards.mean(1, keepdim=True)
    positive = d > 0
    losses, negatives = [], []
    for _ in range(50):
        values, grad = free("swepo", delta, rewards=rewards, group_size=6, beta=1.0)
        probability = (delta.view(5, 6) + d.square()).softmax(1)
        assert (grad.view(5, 6)[~positive] > 0).all()
        losses.append(values)
        negatives.append(probability.masked_fill(positive, 0).amax(1))
        delta = delta - 8 * grad
    assert (torch.stack(losses).diff(dim=0) < 0).all()
    assert (negatives[-1] < (negatives[0] / 2).clamp(max=0.02)).all()
    assert (losses[-1] < 0.02).all()
    far = torch.where(positive.view(-1), delta, -45.0)
    values, grad = free("swepo", far, rewards=rewards, group_size=6, beta=1.0)
    assert (values < 1e-12).all()
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (3, 1)])
def test_swepo_lemma_d_3_update_of_equal_positives(m, n):
    """m positives at s+, n negatives at s−: s+ gains (η/m) · n w− e^{s−} / (m w+ e^{s+} + n w− e^{s−})."""
    rewards = torch.tensor([[float(n)] * m + [-float(m)] * n], dtype=torch.float64)  # mean 0
    for s_plus, s_minus in ((0.0, 0.0), (1.5, -0.5)):
        delta = torch.tensor([s_plus] * m + [s_minus] * n, dtype=torch.float64)
        _, grad = free("swepo", delta, rewards=rewards, group_size=m + n, beta=1.0, alpha=0.3, p=1)
        up, down = m * math.exp(0.3 * n + s_plus), n * math.exp(0.3 * m + s_minus)
        close(-grad[:m], torch.full((m,), down / (up + down) / m, dtype=torch.float64))
        close(-grad[m:], torch.full((n,), -down / (up + down) / n, dtype=torch.float64))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3)])
def test_swepo_corollary_d_4_linear_growth_is_only_an_upper_bound(m, n):
    """The first step from zero scores is as stated; taken as constant, the step overestimates every later score."""
    rewards = torch.tensor([[float(n)] * m + [-float(m)] * n], dtype=torch.float64)
    delta = torch.zeros(m + n, dtype=torch.float64)
    first = 0.5 * n / (m + n) / m  # η = ½, weights all 1
    scores = []
    for _ in range(5):
        delta = delta - 0.5 * free("swepo", delta, rewards=rewards, group_size=m + n, beta=1.0, alpha=0.0)[1]
        scores.append(delta[0].item())
    assert scores[0] == pytest.approx(first, rel=1e-12)
    assert all(score < step * first for step, score in enumerate(scores[1:], 2))


@pytest.mark.parametrize("tau", [0.5, 2.0])
@SEEDS
def test_infonca_lemma_c_1_gradient(seed, tau):
    """softmax(βΔ) − softmax(r/τ), times β for ∂s/∂Δ."""
    delta, rewards = group(seed)
    _, grad = free("infonca", delta, rewards=rewards, group_size=6, beta=0.5, tau=tau)
    close(grad, 0.5 * ((0.5 * delta).softmax(0) - (rewards[0] / tau).softmax(0)))


@pytest.mark.parametrize("tau", [0.5, 2.0])
@SEEDS
def test_infonca_theorem_5_4_is_stationary_exactly_where_the_distributions_agree(seed, tau):
    """βΔ = r/τ + const, and nowhere else: any other direction than the constant leaves a gradient."""
    delta, rewards = group(seed)
    matched = (rewards[0] / tau + 1.7) / 0.5
    _, grad = free("infonca", matched, rewards=rewards, group_size=6, beta=0.5, tau=tau)
    close(grad, torch.zeros_like(grad))
    for away in (0.01, 1.0):
        _, grad = free("infonca", matched + away * delta, rewards=rewards, group_size=6, beta=0.5, tau=tau)
        assert grad.abs().max() > 1e-4 * away
        assert (grad * delta).sum() > 0, "downhill is back: the stationary set is the minimum"


# -- MC-PO ------------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("m", [1, 2, 5])
def test_mcpo_lemma_3_1_rnce_has_the_gradient_of_one_step_of_contrastive_divergence(seed, m):
    """Eq. 8 with the expectation over the M + 1 samples, weighted by softmax(βΔ): β (softmax − e_0)."""
    delta = 3 * rand(seed, m + 1)
    values, grad = free("rnce", delta, group_size=m + 1, beta=0.7)
    weights = (0.7 * delta).softmax(0)
    expected = 0.7 * weights
    expected[0] -= 0.7
    close(grad, expected)
    close(values, -weights[:1].log())


@SEEDS
@pytest.mark.parametrize("name", ["rnce", "mc_po"])
def test_mcpo_lemma_3_2_gradient_for_one_negative(name, seed):
    """∓β σ(βΔ_1 − βΔ_0): the larger, the harder the negative."""
    easy, hard = delta = 3 * rand(seed, 2)
    _, grad = free(name, delta, group_size=2, beta=0.7)
    c = 0.7 * torch.sigmoid(0.7 * (hard - easy))
    close(grad, torch.stack([-c, c]))
    _, harder = free(name, delta + torch.tensor([0.0, 1.0]), group_size=2, beta=0.7)
    assert harder[1] > grad[1]


@pytest.mark.parametrize("m", [1, 2, 3])
@SEEDS
def test_mcpo_proposition_3_3_gradient_of_log_z_is_unbiased(seed, m):
    """All 4^(M+1) draws of y_0 ~ p_θ and y_i ~ μ, over the four responses of two tokens from a vocabulary of two.

    rnce + βΔ_0 is log Ẑ + log(M + 1). Drawing y_0 from μ, the expectation is another.
    """
    beta = 0.7
    theta = (2 * rand(seed, 3, 2)).requires_grad_()  # logits at the start, after token 0, after token 1
    responses = torch.tensor(list(itertools.product((0, 1), repeat=2)))
    contexts = torch.stack([torch.zeros(4, dtype=torch.int64), 1 + responses[:, 0]], 1)
    ref = rand(seed + 10, 3, 2).log_softmax(-1)[contexts, responses]
    mu = (2 * rand(seed + 20, 4)).softmax(0)
    delta = (theta.log_softmax(-1)[contexts, responses] - ref).sum(1)
    log_z = (mu.log() + beta * delta).logsumexp(0)
    (truth,) = torch.autograd.grad(log_z, theta, retain_graph=True)
    p_theta = (mu.log() + beta * delta - log_z).exp().detach()

    draws = torch.tensor(list(itertools.product(range(4), repeat=m + 1)))
    rows = draws.flatten()
    values = fused_loss(
        theta[contexts[rows]],
        torch.eye(2, dtype=theta.dtype),
        responses[rows],
        objective="rnce",
        ref=ref[rows],
        group_size=m + 1,
        beta=beta,
        reduction="none",
    )
    log_z_hat = values + beta * delta[draws[:, 0]]
    estimates = {}
    for name, first in (("p_theta", p_theta), ("mu", mu)):
        probability = first[draws[:, 0]] * mu[draws[:, 1:]].prod(1)
        close(probability.sum(), torch.ones_like(probability[0]))
        (estimates[name],) = torch.autograd.grad((probability * log_z_hat).sum(), theta, retain_graph=True)
    close(estimates["p_theta"], truth)
    assert (estimates["mu"] - truth).abs().max() > 1e-3


def draws_of(sampler: str, delta: list[float], m: int, groups: int) -> Tensor:
    """Which rows took part in the loss, bool [G, K]: those with a gradient."""
    k = len(delta)
    generator = torch.Generator().manual_seed(5)
    scores = torch.tensor(delta, dtype=torch.float64).repeat(groups)
    _, grad = free("mc_po", scores, group_size=k, beta=0.5, sampler=sampler, m=m, generator=generator)
    return grad.view(groups, k) != 0


def frequencies_agree(counts: Tensor, probability: Tensor) -> bool:
    """Each within 4.5 standard deviations."""
    n = counts.sum()
    return bool(((counts / n - probability).abs() < 4.5 * (probability * (1 - probability) / n).sqrt()).all())


@pytest.mark.parametrize("sampler", ["mc", "random"])
def test_mcpo_algorithm_1_draws_in_proportion_to_the_reward(sampler):
    """∝ e^{βΔ} over the negatives ("random": equally). Algorithm 1 also prints w_0 for y_0 itself; a pair (y_0, y_0)
    has no gradient, so y_0 is left out of the draw here."""
    delta = [1.0, 2.0, 0.0, -3.0]
    taken = draws_of(sampler, delta, 1, 3000)
    assert taken[:, 0].all()
    assert (taken.sum(1) == 2).all()
    weights = (0.5 * torch.tensor(delta[1:]).double()).softmax(0)
    expected = weights if sampler == "mc" else torch.full_like(weights, 1 / 3)
    counts = taken[:, 1:].sum(0).double()
    assert frequencies_agree(counts, expected)
    assert not frequencies_agree(counts, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))


def test_mcpo_algorithm_1_draws_without_replacement():
    """Two of three: the pair {i, j} has w_i w_j / (1 − w_i) + w_j w_i / (1 − w_j)."""
    delta = [1.0, 2.0, 0.0, -3.0]
    taken = draws_of("mc", delta, 2, 3000)
    assert (taken.sum(1) == 3).all()
    w = (0.5 * torch.tensor(delta[1:]).double()).softmax(0)
    left_out = [w[i] * w[j] * (1 / (1 - w[i]) + 1 / (1 - w[j])) for i, j in ((1, 2), (0, 2), (0, 1))]
    assert frequencies_agree((~taken[:, 1:]).sum(0).double(), torch.stack(left_out))


@pytest.mark.parametrize(("sampler", "m", "rows"), [("max", 1, [1]), ("max", 2, [1, 2]), ("min", 1, [3])])
def test_mcpo_section_5_3_max_and_min_variants(sampler, m, rows):
    taken = draws_of(sampler, [1.0, 2.0, 0.0, -3.0], m, 3)
    assert taken.tolist() == [[i in (0, *rows) for i in range(4)]] * 3


# -- objectives that are one another ----------------------------------------------------------------------------------

TWO = {"rewards": torch.tensor([[1.0, -0.5]] * 5, dtype=torch.float64), "group_size": 2}


@SEEDS
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rnce", {"group_size": 2}),  # MC-PO Eq. 7 with M = 1
        ("mc_po", {"group_size": 2, "m": 1}),
        ("swepo", {**TWO, "alpha": 0.0}),  # SWEPO Eq. 25; with two responses |d| is one, so any weights are equal
        ("swepo", {**TWO, "alpha": 2.0, "p": 1}),
        ("swepo", {**TWO, "mode": "one_vs_all"}),
        ("multi_dpo", {**TWO, "pairing": "best"}),  # SWEPO Appendix E
        ("multi_dpo", {**TWO, "pairing": "all"}),
    ],
)
def test_mcpo_eq_7_and_swepo_eq_25_are_dpo_for_two_responses(name, given, seed):
    w, l = 5 * rand(seed, 2, 5)
    values, grad = free(name, torch.stack([w, l], 1).flatten(), beta=0.4, **given)
    dpo, dpo_grad = free("dpo", torch.cat([w, l]), beta=0.4)
    close(values, dpo)
    close(grad.view(5, 2).T.flatten(), dpo_grad)


@SEEDS
def test_infonca_eq_23_at_small_temperature_is_rnce_with_the_best_first(seed):
    delta = 3 * rand(seed, 8)
    rewards = torch.tensor([[3.0, 2.0, 0.0, 1.0], [5.0, 1.0, 4.0, 4.0]], dtype=torch.float64)
    cold = free("infonca", delta, rewards=rewards, group_size=4, beta=0.4, tau=1e-3)
    for got, expected in zip(cold, free("rnce", delta, group_size=4, beta=0.4)):
        close(got, expected)
    warm, _ = free("infonca", delta, rewards=rewards, group_size=4, beta=0.4, tau=1.0)
    assert (warm - cold[0]).abs().min() > 1e-3


@SEEDS
def test_mcpo_table_5_nca_is_the_group_objective_of_two_at_small_temperature(seed):
    w, l = 5 * rand(seed, 2, 5)
    values, grad = free("nca", torch.stack([w, l], 1).flatten(), beta=0.4, tau=1e-3, **TWO)
    pair_values, pair_grad = free("nca_pair", torch.cat([w, l]), beta=0.4)
    close(values, pair_values)
    close(grad.view(5, 2).T.flatten(), pair_grad)


@SEEDS
def test_mcpo_eq_7_is_swepo_one_against_all_without_weights(seed):
    """Eq. 11 with Y+ = {y_0} is RNCE."""
    delta = 3 * rand(seed, 8)
    rewards = torch.tensor([[3.0, 2.0, 0.0, 1.0], [5.0, 1.0, 4.0, 4.0]], dtype=torch.float64)
    ours = free("swepo", delta, rewards=rewards, group_size=4, alpha=0.0, mode="one_vs_all")
    for got, expected in zip(ours, free("rnce", delta, group_size=4)):
        close(got, expected)


@SEEDS
@pytest.mark.parametrize(
    ("name", "options", "other", "its"),
    [
        ("rdpo", {"alpha": 0.0}, "dpo", {}),
        ("rpo", {"lam": 0.0}, "dpo", {}),
        ("cpo", {"beta": 2.0, "gamma": 0.5, "lam": 0.0, "length_normalize": True}, "simpo", {}),
    ],
)
def test_mcpo_table_5_limits(name, options, other, its, seed):
    z, target, ref = pair(seed, (4, 3))
    values, dz = gradient(name, z, target, **({"ref": ref} if OBJECTIVES[name].ref else {}), **options)
    expected, other_dz = gradient(other, z, target, **({"ref": ref} if OBJECTIVES[other].ref else {}), **its)
    close(values, expected)
    close(dz, other_dz)


# -- minima and bounds of single objectives ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "minimum", "value"),
    [
        ("ipo", {"tau": 0.2}, (1.5, -1.0), 0.0),  # any two Δ that differ by 1/(2τ)
        ("sppo", {"beta": 0.25}, (2.0, -2.0), 0.0),
        ("exo", {"beta": 0.5, "epsilon": 0.1}, (math.log(9) + 3.0, 3.0 - math.log(9)), 0.0),  # σ(m) = 1 − ε
        ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, (math.log(9), -math.log(9)), None),  # the same margin
    ],
)
def test_bnf_table_2_and_exo_eq_16_minima(name, options, minimum, value):
    """No gradient there, and a higher value to either side."""
    delta = torch.tensor(minimum, dtype=torch.float64)
    here, grad = free(name, delta, **options)
    assert grad.abs().max() < 1e-10
    if value is not None:
        assert here.item() == pytest.approx(value, abs=1e-12)
    for step in (-0.3, 0.3):
        assert free(name, delta + torch.tensor([step, 0.0]), **options)[0] > here + 1e-4


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("name", ["kto", "bco"])
def test_mcpo_table_5_unpaired_coefficients_are_bounded(name, label):
    """Toward the label everywhere. KTO's is w β σ(x) σ(−x), largest (w β/4) at z₀; BCO's β σ(−x), below β, falling."""
    delta = torch.linspace(-20, 20, 81, dtype=torch.float64)
    labels = torch.full((81,), label)
    shift = {"z0": 2.0, "desirable_weight": 1.5, "undesirable_weight": 1.5} if name == "kto" else {"delta": 0.6}
    _, grad = free(name, delta, label=labels, beta=0.3, **shift)
    x = label * 0.3 * (delta - 2.0)
    size = 1.5 * torch.sigmoid(x) * torch.sigmoid(-x) if name == "kto" else torch.sigmoid(-x)
    close(grad, -label * 0.3 * size)
    assert (grad * label < 0).all()
    if name == "kto":
        assert delta[grad.abs().argmax()] == 2.0
