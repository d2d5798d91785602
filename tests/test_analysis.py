"""`rgpb.analysis` against closed forms, finite differences and materialised logits, all in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rgpb import OBJECTIVES, LMHead, TokenScores, analysis, linear_logprob, pairs, reference

H, V = 5, 23  # V: no multiple of anything
GRID = torch.tensor([0.02, 0.2, 0.45, 0.7, 0.98], dtype=torch.float64)
PAIRWISE = [name for name, spec in OBJECTIVES.items() if spec.unit in ("response", "pair")]
# nothing in them is detached, so that the gradient is the slope of the value
SMOOTH = [name for name in PAIRWISE if name != "bnf" and OBJECTIVES[name].couples != "batch"]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def random_head(seed=0, h=H):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(V, h, generator=g).double(), torch.randn(V, generator=g).double()
    return LMHead(weight, bias, softcap=4.0, scale=0.7)


def batch(lengths=((2, 5), (1, 4), (0, 3), (3, 3)), seed=0):
    """Pairs (0, 2) and (1, 3), padded; `lengths`: first token and number of tokens of each response."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(lengths), 8, H, generator=g).double()
    ids = torch.randint(V, (len(lengths), 8), generator=g)
    target = torch.full_like(ids, -100)
    for row, (first, n) in enumerate(lengths):
        target[row, first : first + n] = ids[row, first : first + n]
    return hidden, target


def packed(hidden, target):
    """The same responses without their last two positions, one after another."""
    cut = [6, 8, 6, 8]
    rows = [(hidden[i, :n], target[i, :n]) for i, n in enumerate(cut)]
    bounds = torch.tensor([0, *cut]).cumsum(0)
    return torch.cat([h for h, _ in rows]), torch.cat([t for _, t in rows]), bounds


def scored(hidden, head, target):
    return linear_logprob(hidden, head, target, entropy=True)


def pair_batch():
    hidden, target = batch()
    target[3, 4] = -100  # a gap inside a response
    return hidden, target


class TestResponses:
    def test_perplexity_agility_information(self):
        hidden, target = pair_batch()
        head = random_head()
        r = analysis.make_responses(scored(hidden, head, target), target)
        logp = reference.logits(hidden, head).log_softmax(-1)
        rows = [logp[i, t >= 0].gather(1, t[t >= 0, None]).squeeze(1) for i, t in enumerate(target)]
        close(analysis.perplexity(r), [math.exp(-row.mean()) for row in rows])
        expected = [rows[i].mean().exp() - rows[i + 2].mean().exp() for i in range(2)]
        close(analysis.agility(r), expected)
        found = analysis.information_difference(r)
        close(found.probability, expected)
        close(found.log_probability, [rows[i].mean() - rows[i + 2].mean() for i in range(2)])
        sums = analysis.information_difference(r, length_normalize=False)
        close(sums.log_probability, [rows[i].sum() - rows[i + 2].sum() for i in range(2)])
        close(sums.probability, [rows[i].sum().exp() - rows[i + 2].sum().exp() for i in range(2)], 1e-15)
        assert found.steps.shape == (2, 5)
        for pair in range(2):
            w, l = rows[pair].exp(), rows[pair + 2].exp()
            n = min(len(w), len(l))
            close(found.steps[pair, :n], w[:n] - l[:n])
            assert found.steps[pair, n:].isnan().all()

    def test_packed_is_padded(self):
        hidden, target = batch()
        head = random_head()
        flat, flat_target, bounds = packed(hidden, target)
        a = analysis.make_responses(scored(hidden, head, target), target)
        b = analysis.make_responses(scored(flat, head, flat_target), flat_target, cu_seqlens=bounds)
        close(analysis.perplexity(a)[1:], analysis.perplexity(b)[1:])
        close(analysis.information_difference(a).steps[1, :3], analysis.information_difference(b).steps[1, :3])

    def test_no_token_is_nan_not_certain(self):
        hidden, target = batch()
        target[2] = -100
        r = analysis.make_responses(scored(hidden, random_head(), target), target)
        assert analysis.perplexity(r).isnan().tolist() == [False, False, True, False]
        assert analysis.agility(r).isnan().tolist() == [True, False]
        assert analysis.information_difference(r, length_normalize=False).steps[0].isnan().all()

    def test_refused(self):
        hidden, target = batch()
        scores = scored(hidden, random_head(), target)
        with pytest.raises(ValueError, match=r"label: expected \[B=4\] of bool or ±1"):
            analysis.make_responses(scores, target, label=torch.tensor([1, 2, 1, 1]))
        with pytest.raises(ValueError, match=r"rewards: expected shape \[G, K\] for 4 responses, got \[1, 3\]"):
            analysis.make_responses(scores, target, rewards=torch.ones(1, 3))
        with pytest.raises(ValueError, match="target: expected groups of 3 responses, got 4"):
            analysis.make_responses(scores, target, group_size=3)
        with pytest.raises(ValueError, match=r"ref\.logp: expected \[4, 8\] as target, got \[4, 7\]"):
            analysis.make_responses(scores, target, ref=TokenScores(*(x[:, :7] for x in scores)))
        with pytest.raises(ValueError, match="scores: expected TokenScores, got torch"):
            analysis.make_responses(scores.logp, target)
        odd = analysis.make_responses(TokenScores(*(x[:3] for x in scores)), target[:3])
        for function in (analysis.agility, analysis.information_difference):
            with pytest.raises(ValueError, match="responses: expected an even number"):
                function(odd)
        with pytest.raises(ValueError, match="responses: expected an even number"):
            analysis.coefficients("exmate", odd)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


class TestGradientDifference:
    @pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
    @pytest.mark.parametrize("rows", [1, 3, 100])
    def test_is_that_of_the_logits(self, order, rows, monkeypatch):
        monkeypatch.setattr("rgpb.analysis.numbers.SLICE", 7)  # doesn't divide V
        hidden, target = batch()
        head = random_head()
        found = analysis.gradient_difference(hidden, head, target, order=order, workspace=rows * 4 * V * 8)
        p = reference.logits(hidden, head).softmax(-1)
        for pair in range(2):
            w, l = target[pair] >= 0, target[pair + 2] >= 0
            n = min(int(w.sum()), int(l.sum()))
            p_w, p_l, y_w, y_l = p[pair, w][:n], p[pair + 2, l][:n], target[pair, w][:n], target[pair + 2, l][:n]
            close(found.softmax[pair, :n], (p_w - p_l).norm(order, dim=1))
            g_w, g_l = F.one_hot(y_w, V) - p_w, F.one_hot(y_l, V) - p_l
            close(found.output[pair, :n], (g_w - g_l).norm(order, dim=1))
            assert found.same_target[pair].tolist() == [*(y_w == y_l).tolist(), *[False] * (5 - n)]
            assert found.softmax[pair, n:].isnan().all()
            assert found.output[pair, n:].isnan().all()
            close(found.pairs[pair], (p_w - p_l).norm(order, dim=1).mean())

    def test_is_the_distance_of_two_gradients_of_log_p(self):
        """Definition 4.2 by autograd, on logits that are leaves."""
        z = torch.randn(2, V).double().requires_grad_()
        target = torch.tensor([[3], [8]])
        logp = z.log_softmax(-1).gather(1, target)
        (g,) = torch.autograd.grad(logp.sum(), z)
        found = analysis.gradient_difference(z.detach()[:, None], torch.eye(V).double(), target, order=2)
        close(found.output[0], [(g[0] - g[1]).norm()])

    def test_same_context_and_token_differ_by_nothing(self):
        hidden, target = batch(((1, 3), (1, 3)))
        found = analysis.gradient_difference(
            torch.cat([hidden[:1], hidden[:1]]), random_head(), torch.cat([target[:1], target[:1]])
        )
        assert not found.softmax.any()
        assert not found.output.any()
        assert found.same_target.all()

    def test_packed(self):
        hidden, target = batch()
        flat, flat_target, bounds = packed(hidden, target)
        target[0, 6:], target[2, 6:] = -100, -100  # what `packed` left out
        a = analysis.gradient_difference(hidden, random_head(), target)
        b = analysis.gradient_difference(flat, random_head(), flat_target, cu_seqlens=bounds)
        for x, y in zip(a, b):
            close(x.double(), y.double())

    def test_sixteen_bits_are_summed_in_thirty_two(self):
        hidden, target = batch()
        half, head = hidden.bfloat16(), random_head().weight.bfloat16()
        found = analysis.gradient_difference(half, head, target)
        exact = analysis.gradient_difference(half.double(), head.double(), target)
        assert found.softmax.dtype == torch.float32
        close(found.softmax, exact.softmax.float(), 1e-5)

    def test_no_common_step(self):
        hidden, target = batch()
        target[2] = -100
        found = analysis.gradient_difference(hidden, random_head(), target)
        assert found.pairs.isnan().tolist() == [True, False]

    def test_refused(self):
        hidden, target = batch()
        for change, message in (
            ({"order": 0.5}, "order: expected at least 1, got 0.5"),
            ({"target": target.clamp(max=V) + V * (target > 0)}, r"target: expected -100 or 0 … 22, got"),
            ({"hidden": hidden[..., :3]}, r"hidden: expected shape \[\.\.\., H=5\]"),
        ):
            arguments = {"hidden": hidden, "head": random_head(), "target": target, **change}
            with pytest.raises(ValueError, match=message):
                analysis.gradient_difference(**arguments)
        with pytest.raises(ValueError, match="target: expected an even number"):
            analysis.gradient_difference(hidden[:3], random_head(), target[:3])


def odds(p):
    return p / (1 - p)


class TestCurves:
    """Closed forms, with q the reference's probability and one token each."""

    q = 0.3

    def curves(self, name, **options):
        return analysis.likelihood_curves(name, GRID, ref=self.q, **options)

    def test_bnf_is_equation_9(self):
        for curve, label in zip(self.curves("bnf"), (1, -1)):
            size = torch.where(self.q > GRID, GRID * (1 - self.q) / self.q, 1 - GRID)
            close(curve.logit, -label * size)
            close(curve.logp, -label * torch.minimum(odds(GRID) / odds(self.q), torch.ones(()).double()))

    def test_nll_pll(self):
        chosen, rejected = self.curves("nll_pll")
        close(chosen.logit, GRID - 1)
        close(rejected.logit, 1 - GRID)
        close(rejected.prob, 1 / GRID)

    def test_mle_knows_no_rejected(self):
        chosen, rejected = self.curves("mle")
        assert rejected is None
        close(chosen.loss, -GRID.log())
        close(chosen.logp, torch.full_like(GRID, -1))

    def test_unlikelihood_explodes_only_in_log_p(self):
        _, rejected = self.curves("unlikelihood", alpha=0.7)
        close(rejected.logp, 0.7 * odds(GRID))
        close(rejected.logit, 0.7 * GRID)

    def test_dpo_with_a_partner(self):
        chosen, rejected = self.curves("dpo", beta=0.4, partner=0.6)
        close(chosen.logp, -0.4 * torch.sigmoid(-0.4 * (GRID.log() - math.log(0.6))))
        close(rejected.logp, 0.4 * torch.sigmoid(-0.4 * (math.log(0.6) - GRID.log())))

    def test_exmate(self):
        _, rejected = self.curves("exmate", beta=0.8)
        close(rejected.logp, 0.8 * GRID)
        close(rejected.prob, torch.full_like(GRID, 0.8))

    @pytest.mark.parametrize("name", SMOOTH)
    def test_derivatives_are_slopes_of_the_loss(self, name):
        step = 1e-6
        chosen, rejected = analysis.likelihood_curves(name, GRID, ref=0.35, partner=0.25)
        up, down = (analysis.likelihood_curves(name, GRID + e, ref=0.35, partner=0.25) for e in (step, -step))
        for curve, a, b in ((chosen, up[0], down[0]), (rejected, up[1], down[1])):
            if curve is not None:
                close(curve.prob, (a.loss - b.loss) / (2 * step), 1e-6)
                close(curve.logp, curve.prob * GRID)
                close(curve.logit, curve.logp * (1 - GRID))

    def test_an_objective_of_your_own_that_reads_everything(self):
        def own(responses, *, weight=2.0):
            scores = responses.policy
            value = responses.mean(scores.log_odds.square() + weight * scores.lse + scores.logp)
            w, l = pairs(value)
            return w - l + (0 if responses.label is None else responses.label.sum())

        # λ = z and lse = softplus(z) where the others' logsumexp is 0
        chosen, rejected = analysis.likelihood_curves(own, GRID, weight=3.0)
        z = GRID.logit()
        slope = 2 * z + 3 * GRID + (1 - GRID)
        close(chosen.logit, slope)
        close(rejected.logit, -slope)

    def test_each_point_is_its_own_batch(self):
        def centred(responses):
            s = responses.logps()
            return responses.label * (s - s.detach().mean()).square()

        whole = analysis.likelihood_curves(centred, GRID, partner=0.4)
        close(whole.chosen.logp, GRID.log() - math.log(0.4))
        close(whole.rejected.logp, -(GRID.log() - math.log(0.4)))

    def test_kto_with_a_number_for_its_baseline(self):
        curves = self.curves("kto", beta=0.5, z0=0.2, desirable_weight=2.0)
        s = torch.sigmoid(0.5 * (GRID.log() - math.log(self.q) - 0.2))
        close(curves.chosen.logp, -2.0 * 0.5 * s * (1 - s))
        close(curves.rejected.logp, 0.5 * s * (1 - s))

    def test_no_gradient_is_zero(self):
        curves = analysis.likelihood_curves(lambda r: r.logps().detach(), GRID)
        assert not curves.chosen.logp.any()

    def test_refused(self):
        for arguments, message in (
            (("dpo", torch.tensor([0.5, 1.0])), r"probability: expected probabilities inside \(0, 1\), got 1.0"),
            (("dpo", 0.5), "probability: expected a tensor of one dimension, not empty, got float"),
            (("nothing", GRID), "objective: expected a function or one of"),
        ):
            with pytest.raises(ValueError, match=message):
                analysis.likelihood_curves(*arguments)
        with pytest.raises(ValueError, match=r"options of dpo: expected a subset of .* got \['tau'\]"):
            analysis.likelihood_curves("dpo", GRID, tau=1.0)
        with pytest.raises(ValueError, match=r"ref: expected a probability inside \(0, 1\), got 0"):
            analysis.likelihood_curves("dpo", GRID, ref=0.0, partner=0.5)
        with pytest.raises(ValueError, match=r"partner: expected probabilities inside \(0, 1\), got 1"):
            analysis.likelihood_curves("dpo", GRID, partner=1.0)

    def test_groups_are_refused_by_name(self):
        groups = [name for name, spec in OBJECTIVES.items() if spec.unit == "group"]
        assert len(groups) >= 6
        for name in groups:
            for function, grid in (
                (analysis.likelihood_curves, (GRID,)),
                (analysis.coefficient_landscape, (GRID, GRID)),
            ):
                with pytest.raises(ValueError, match=f"got {name}, which is one of groups"):
                    function(name, *grid)


class TestLandscapes:
    columns = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)

    def landscape(self, name, **options):
        found = analysis.coefficient_landscape(name, GRID, self.columns, **options)
        assert found.total.shape == (5, 7)
        close(found.total, found.chosen + found.rejected)
        close(found.total_probability, found.chosen / GRID[:, None] + found.rejected / self.columns)
        return found

    def test_dpo(self):
        found = self.landscape("dpo", beta=0.5)
        size = 0.5 * torch.sigmoid(-0.5 * (GRID[:, None].log() - self.columns.log()))
        close(found.chosen, size)
        close(found.rejected, -size)
        assert size.max() < 0.5  # bounded by β

    def test_dpo_cancels_on_a_shared_token(self):
        """RGPB §5.2, Eq. 22."""
        found = self.landscape("dpo")
        assert found.total.abs().max() < 1e-15
        assert torch.equal(found.total_probability.sign(), (self.columns - GRID[:, None]).sign())
        same = analysis.coefficient_landscape("dpo", GRID, GRID)
        assert same.total_probability.diagonal().abs().max() < 1e-13

    def test_exmate_stays_positive(self):
        """RGPB §5.2, Eq. 24: for β < 1, and of π+ alone."""
        found = self.landscape("exmate", beta=0.9)
        close(found.rejected, (-0.9 * self.columns).expand(5, 7))
        assert (found.total > 0).all()
        assert (found.total_probability > 0).all()
        close(found.total_probability, (1 / GRID[:, None] - 0.9).expand(5, 7))
        assert (self.landscape("exmate", beta=2.0).total_probability < 0).any()

    def test_unlikelihood_explodes(self):
        """RGPB §5.2, Eq. 23."""
        found = self.landscape("unlikelihood", alpha=1.5)
        close(found.total_probability, 1 / GRID[:, None] - 1.5 / (1 - self.columns))
        close(found.rejected, (-1.5 * odds(self.columns)).expand(5, 7))

    def test_labels(self):
        found = self.landscape("bnf", ref=0.4)
        close(found.chosen, (odds(GRID) / odds(0.4)).clamp(max=1)[:, None].expand(5, 7))
        close(found.rejected, -(odds(self.columns) / odds(0.4)).clamp(max=1).expand(5, 7))

    @pytest.mark.parametrize("name", [n for n in PAIRWISE if n != "mle"])
    def test_agrees_with_the_curves(self, name):
        """The landscape's row and column through the partner."""
        found = analysis.coefficient_landscape(name, GRID, GRID, ref=0.35)
        for i, held in enumerate(GRID.tolist()):
            curves = analysis.likelihood_curves(name, GRID, ref=0.35, partner=held)
            close(found.chosen[:, i], -curves.chosen.logp)
            close(found.rejected[i], -curves.rejected.logp)

    def test_refused(self):
        with pytest.raises(ValueError, match="objective: expected one that tells chosen from rejected, got mle"):
            analysis.coefficient_landscape("mle", GRID, GRID)
        with pytest.raises(ValueError, match="pi_rejected: expected probabilities inside"):
            analysis.coefficient_landscape("dpo", GRID, -GRID)


class TestCoefficients:
    def responses(self, label=None, ref=True):
        hidden, target = batch()
        theirs = scored(hidden, random_head(7), target) if ref else None
        return analysis.make_responses(scored(hidden, random_head(), target), target, ref=theirs, label=label), target

    def test_exmate_is_bounded_by_beta_over_n(self):
        r, target = self.responses(ref=False)
        found = analysis.coefficients("exmate", r, beta=0.6)
        mean, n = r.logps(length_normalize=True), r.n
        expected = torch.cat([1 / n[:2], -0.6 / n[2:] * mean[2:].exp()])
        close(found.logp.view(target.shape), torch.where(target >= 0, expected[:, None], 0.0))
        close(found.logit, (found.logp * (1 - found.probability)).nan_to_num(0.0))
        assert found.probability.view(target.shape).isnan().equal(target < 0)

    def test_dpo(self):
        r, target = self.responses()
        found = analysis.coefficients("dpo", r, beta=0.2)
        w, l = pairs(0.2 * r.log_ratios())
        size = 0.2 * torch.sigmoid(l - w)
        close(found.logp.view(target.shape), torch.where(target >= 0, torch.cat([size, -size])[:, None], 0.0))
        close(found.loss, -F.logsigmoid(w - l))

    def test_unlikelihood_is_the_odds(self):
        r, target = self.responses(ref=False)
        found = analysis.coefficients("unlikelihood", r).logp.view(target.shape)
        expected = -r.policy.log_odds.exp().view(target.shape) / r.n[:, None]
        close(found[2:], torch.where(target >= 0, expected, 0.0)[2:])

    def test_bnf_is_the_ratio_of_odds(self):
        label = torch.tensor([True, False, False, True])
        r, target = self.responses(label)
        found = analysis.coefficients("bnf", r).logp.view(target.shape)
        c = (r.policy.log_odds - r.ref.log_odds).exp().clamp(max=1).view(target.shape)
        expected = (label.double() * 2 - 1)[:, None] * c / r.n[:, None]
        close(found, torch.where(target >= 0, expected, 0.0))

    @pytest.mark.parametrize("name", ["dpo", "unlikelihood", "bnf"])
    def test_times_onehot_minus_softmax_is_the_gradient(self, name):
        """RGPB Lemma 4.1, against autograd on materialised logits: −∂L/∂z of every entry."""
        hidden, target = batch()
        label = torch.tensor([True, True, False, False])
        r, _ = self.responses(label if name == "bnf" else None, ref=name != "unlikelihood")
        x = reference.logits(hidden, random_head()).requires_grad_()
        keywords = {} if name == "unlikelihood" else {"ref_logits": reference.logits(hidden, random_head(7))}
        if name == "bnf":
            keywords["label"] = label
        loss = reference.LOSSES[name](x, torch.eye(V).double(), target, reduction="sum", **keywords)
        (g,) = torch.autograd.grad(loss, x)
        found = analysis.coefficients(name, r)
        onehot = F.one_hot(target.clamp(min=0), V)
        close(-g, found.logp.view(*target.shape, 1) * (onehot - x.detach().softmax(-1)))
        close(-g.gather(-1, target.clamp(min=0)[..., None]).view(-1) * (target >= 0).view(-1), found.logit)

    def test_groups(self):
        """∂/∂Δ_k of InfoNCA: β (softmax(βΔ) − softmax(r / τ))_k, the same for every token of the response."""
        hidden, target = batch()
        rewards = torch.tensor([[1.0, 0.5, 0.0, 2.0]])
        theirs = scored(hidden, random_head(7), target)
        r = analysis.make_responses(scored(hidden, random_head(), target), target, ref=theirs, rewards=rewards)
        found = analysis.coefficients("infonca", r, beta=0.3, tau=0.5).logp.view(target.shape)
        pull = 0.3 * ((rewards[0].double() / 0.5).softmax(0) - (0.3 * r.log_ratios()).softmax(0))
        close(found, torch.where(target >= 0, pull[:, None], 0.0))

    def test_a_group_of_two_is_a_pair(self):
        """MC-PO Eq. 7 with one negative is DPO; groups are consecutive rows, pairs are stacked."""
        r, target = self.responses()
        as_groups = [0, 2, 1, 3]
        hidden, _ = batch()
        ours, theirs = (
            TokenScores(*(x[as_groups] for x in scored(hidden, random_head(seed), target))) for seed in (0, 7)
        )
        groups = analysis.make_responses(ours, target[as_groups], ref=theirs, group_size=2)
        found = analysis.coefficients("rnce", groups).logp.view(target.shape)
        close(found, analysis.coefficients("dpo", r).logp.view(target.shape)[as_groups])

    def test_weighted_sum(self):
        r, target = self.responses()
        n = r.n[:, None] * (target >= 0)
        dpo = analysis.coefficients("dpo", r, beta=0.2).logp.view(target.shape)
        expected = 0.5 * dpo + torch.where((torch.arange(4) < 2)[:, None] & (n > 0), 1 / n, 0.0)
        for total in ("mle + 0.5*dpo", {"mle": 1.0, "dpo": 0.5}):
            close(analysis.coefficients(total, r, **{"dpo.beta": 0.2}).logp.view(target.shape), expected)
        curve = analysis.likelihood_curves("mle + 0.5*dpo", GRID, ref=0.3, beta=0.2).chosen
        close(curve.logp, -1 - 0.1 * torch.sigmoid(-0.2 * (GRID.log() - math.log(0.3))))
        found = analysis.coefficient_landscape("mle + 0.5*dpo", GRID, GRID)
        close(found.total, torch.ones(5, 5))  # dpo's part cancels

    @pytest.mark.parametrize(("name", "missing"), [("dpo", "ref"), ("kto", "ref|label"), ("rnce", "group_size|ref")])
    def test_what_is_missing_is_named(self, name, missing):
        r, _ = self.responses(ref=False)
        with pytest.raises(ValueError, match=rf"^({missing}): expected"):
            analysis.coefficients(name, r)

    def test_a_certain_token_keeps_its_coefficient(self):
        """1 − p underflows: nothing is divided by it unless the loss reads the log-odds."""
        certain = TokenScores(*(torch.tensor([[x], [x]], dtype=torch.float64) for x in (0.0, 900.0, 900.0)))
        r = analysis.make_responses(certain, torch.zeros(2, 1, dtype=torch.int64))
        close(analysis.coefficients("exmate", r, beta=0.5).logp, [1.0, -0.5])
        found = analysis.coefficients("unlikelihood", r)
        assert found.logp.tolist() == [1.0, -math.inf]
        close(found.logit, [0.0, -1.0])


class TestGini:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [([1, 1, 1], 0), ([0, 0, 0, 1], 0.75), ([1, 2, 3, 4], 0.25), ([5], 0), ([0, 0], 0), ([3, 1], 0.25)],
    )
    def test_known(self, values, expected):
        close(analysis.gini(torch.tensor(values)), expected)

    def test_is_the_mean_difference(self):
        x = torch.rand(3, 11).double()
        expected = (x[:, :, None] - x[:, None]).abs().sum((1, 2)) / (2 * 11 * x.sum(1))
        close(analysis.gini(x), expected)
        close(analysis.gini(100 * x), expected)

    @pytest.mark.parametrize("values", [[-1.0, 2.0], [math.nan], [math.inf, 1.0], []])
    def test_refused(self, values):
        with pytest.raises(ValueError, match="values: expected"):
            analysis.gini(torch.tensor(values))


class TestShifts:
    def test_are_those_of_the_logits(self):
        hidden, target = batch()
        target[3] = -100
        moved = hidden + 0.3 * torch.randn_like(hidden)
        a, b = random_head(), random_head(7)
        found = analysis.shifts(scored(hidden, a, target), scored(moved, b, target), target)
        z_a, z_b = reference.logits(hidden, a), reference.logits(moved, b)
        for i in range(3):
            at = target[i] >= 0
            y = target[i][at][:, None]
            logit = (z_b - z_a)[i, at].gather(1, y).squeeze(1)
            logp = (z_b.log_softmax(-1) - z_a.log_softmax(-1))[i, at].gather(1, y).squeeze(1)
            close(found.logp[i], logp.sum())
            close(found.logp_mean[i], logp.mean())
            close(found.logit[i], logit.abs().sum())
            close(found.logit_mean[i], logit.abs().mean())
            close(found.gini[i], analysis.gini(logit.abs()))
            close(found.token_logp.view(target.shape)[i, at], logp)
            close(found.token_logit.view(target.shape)[i, at], logit)
        assert found.logp[3] == found.logit[3] == 0
        assert found.logp_mean[3].isnan()
        assert found.logit_mean[3].isnan()
        assert found.gini[3].isnan()
        assert found.token_logp.view(target.shape).isnan().equal(target < 0)

    def test_uniform_increase_moves_logits_and_no_likelihood(self):
        """What BNF §5.3 finds of BNF: a bias added to every entry."""
        hidden, target = batch()
        head = random_head()._replace(softcap=None, scale=1.0)
        after = head._replace(bias=head.bias + 2.0)
        found = analysis.shifts(scored(hidden, head, target), scored(hidden, after, target), target)
        close(found.logp, torch.zeros(4))
        close(found.logit_mean, torch.full((4,), 2.0))
        close(found.gini, torch.zeros(4))

    def test_refused(self):
        hidden, target = batch()
        scores = scored(hidden, random_head(), target)
        with pytest.raises(ValueError, match=r"before\.lse: expected the logsumexp of the logits, got 0 throughout"):
            analysis.shifts(scores._replace(lse=torch.zeros_like(scores.lse)), scores, target)
        with pytest.raises(ValueError, match=r"after\.logp: expected \[4, 8\] as target, got \[3, 8\]"):
            analysis.shifts(scores, TokenScores(*(x[:3] for x in scores)), target)


class TestPercentileShares:
    def test_of_itself_is_even(self):
        x = torch.randn(1000)
        close(analysis.percentile_shares(x, x), [0.1] * 10)

    def test_polarised_and_masked(self):
        base = torch.linspace(-1, 1, 101)
        values = torch.tensor([-5.0, -0.95, math.nan, 7.0, 0.05])
        close(analysis.percentile_shares(values, base, bins=5), [0.5, 0, 0.25, 0, 0.25])
        close(analysis.percentile_shares(base[50], base, bins=2), [0, 1])  # on the edge

    def test_edges_are_quantiles(self):
        base, x = torch.randn(37).double(), torch.randn(500).double()
        edges = torch.quantile(base, torch.arange(1, 4).double() / 4)
        expected = torch.histc(torch.bucketize(x, edges, right=True).double(), 4, 0, 3) / 500
        close(analysis.percentile_shares(x, base, bins=4), expected)

    def test_refused(self):
        with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
            analysis.percentile_shares(GRID, GRID, bins=0)
        with pytest.raises(ValueError, match="baseline: expected at least one number"):
            analysis.percentile_shares(GRID, torch.tensor([math.nan]))


class TestVocabularyShift:
    @pytest.mark.parametrize(("slice_", "rows"), [(7, 1), (7, 4), (100, 3), (100, 1000)])
    def test_is_that_of_the_logits(self, slice_, rows, monkeypatch):
        monkeypatch.setattr("rgpb.analysis.changes.SLICE", slice_)
        monkeypatch.setattr("rgpb.analysis.numbers.SLICE", slice_)
        hidden, target = batch()
        wider = torch.randn(4, 8, H + 2).double()  # another model may be wider
        a, b = random_head(), random_head(7, H + 2)
        found = analysis.vocabulary_shift(hidden, a, wider, b, target, workspace=rows * 4 * min(slice_, V) * 8)
        change = (reference.logits(wider, b) - reference.logits(hidden, a))[target >= 0]
        assert found.tokens == len(change) == 15
        close(found.mean, change.mean(0))
        close(found.absolute, change.abs().mean(0))
        close(found.gini, analysis.gini(change.abs().mean(0)))

    def test_float32_is_summed_in_float64(self):
        hidden, target = batch()
        a, b = random_head().weight, random_head(7).weight
        found = analysis.vocabulary_shift(hidden.float(), a.float(), hidden.float(), b.float(), target)
        assert found.mean.dtype == torch.float64
        close(found.mean, analysis.vocabulary_shift(hidden, a, hidden, b, target).mean, 1e-5)

    def test_refused(self):
        hidden, target = batch()
        head = random_head()
        for change, message in (
            (
                {"hidden_after": hidden[..., :3]},
                r"hidden_after: expected shape \[\.\.\., H=5\] to match head_after\.weight",
            ),
            ({"head_after": head.weight[:9]}, "head_after: expected the vocabulary of head_before, 23, got 9"),
            ({"target": torch.full_like(target, -100)}, "target: expected at least one token"),
            ({"workspace": 0}, "workspace: expected a positive"),
        ):
            arguments = {
                "hidden_before": hidden, "head_before": head, "hidden_after": hidden, "head_after": head,
                "target": target, **change,
            }  # fmt: skip
            with pytest.raises(ValueError, match=message):
                analysis.vocabulary_shift(**arguments)


def test_logits_never_exist_at_once():
    """Of 400 tokens and 301 entries, the largest tensor is a chunk."""
    n, vocab, rows = 400, 301, 10
    hidden, weight = torch.randn(2, n // 2, H), torch.randn(vocab, H)
    target = torch.randint(vocab, (2, n // 2))
    workspace = rows * 4 * vocab * 4
    with Largest() as seen:
        analysis.gradient_difference(hidden, weight, target, workspace=workspace)
        analysis.vocabulary_shift(hidden, weight, hidden + 1, weight, target, workspace=workspace)
    assert seen.numel <= max(rows * vocab, hidden.numel() + 2 * H)


class TestPlots:
    """Each names its runs, returns a Figure, and writes a whole PNG or nothing."""

    def results(self):
        hidden, target = batch()
        old, new = (scored(hidden, random_head(seed), target) for seed in (0, 7))
        r = analysis.make_responses(new, target, ref=old)
        gradient = analysis.gradient_difference(hidden, random_head(), target)
        moved = analysis.shifts(old, new, target)
        vocabulary = analysis.vocabulary_shift(hidden, random_head(), hidden, random_head(7), target)
        shares = analysis.percentile_shares(moved.token_logp, moved.token_logp)
        curves = analysis.likelihood_curves("bnf", GRID)
        # name → argument of one run, and the lines of each panel for two runs
        return {
            "perplexity_agility": (r, [4]),
            "information_difference": (analysis.information_difference(r), [2, 2]),
            "gradient_difference": (gradient, [2, 2]),
            "coefficients": (analysis.coefficients("dpo", r), [2, 2]),
            "likelihood_curves": (curves, [2, 2]),
            "shifts": (moved, [2] * 6),
            "percentile_shares": (shares, [2]),
            "vocabulary_shift": (vocabulary, [2, 3]),
        }

    def test_lines_and_files(self, tmp_path):
        """Only one is written as a file: all go through the same last step."""
        for name, (result, lines) in self.results().items():
            path = tmp_path / f"{name}.png" if name == "percentile_shares" else None
            figure = getattr(analysis, f"plot_{name}")({"a": result, "b": result}, path)
            assert [len(axes.get_lines()) for axes in figure.axes] == lines, name
            legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
            assert [text[0] for text in legend] == ["a", "b"], name
        (file,) = tmp_path.iterdir()  # no part of a file left over
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    def test_every_plot_is_tested(self):
        plots = {name.removeprefix("plot_") for name in vars(analysis) if name.startswith("plot_")}
        assert plots == {*self.results(), "landscapes"}

    def test_landscapes(self):
        grid = torch.linspace(0.05, 0.95, 6)
        found = {name: analysis.coefficient_landscape(name, grid, grid[:4]) for name in ("dpo", "exmate")}
        figure = analysis.plot_landscapes(found)
        maps = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title() for axes in maps][::4] == ["dpo: on log π(y+)", "exmate: on log π(y+)"]
        drawn = maps[3].collections[0].get_array()  # rows are π(y−), columns π(y+)
        close(torch.as_tensor(drawn.reshape(4, 6).data), found["dpo"].total_probability.T)

    def test_drawn_is_the_size_of_the_derivative(self):
        curves = analysis.likelihood_curves("nll_pll", GRID)
        for derivative, expected in (("logit", 1 - GRID), ("logp", torch.ones(5)), ("prob", 1 / GRID)):
            figure = analysis.plot_likelihood_curves({"nll_pll": curves}, derivative=derivative)
            close(torch.as_tensor(figure.axes[1].get_lines()[0].get_ydata()), expected)
        mle = analysis.plot_likelihood_curves({"mle": analysis.likelihood_curves("mle", GRID)})
        assert [len(axes.get_lines()) for axes in mle.axes] == [1, 0]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        from matplotlib.figure import Figure

        path = tmp_path / "old.png"
        path.write_bytes(b"old")

        def fails(self, place, **_):
            place.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", fails)
        with pytest.raises(OSError, match="disk full"):
            analysis.plot_percentile_shares({"a": torch.full((10,), 0.1)}, path)
        assert path.read_bytes() == b"old"

    def test_refused(self):
        for name in [*self.results(), "landscapes"]:
            with pytest.raises(ValueError, match="expected at least one, got none"):
                getattr(analysis, f"plot_{name}")({})
        with pytest.raises(ValueError, match="derivative: expected one of .*, got 'slope'"):
            analysis.plot_likelihood_curves({"a": analysis.likelihood_curves("mle", GRID)}, derivative="slope")
