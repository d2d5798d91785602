"""What every test of the engine needs: problems, the oracle's answer, paths, and the error budget.

Budget: twice the error that naive PyTorch makes in the same dtype on the same inputs, plus one rounding of the
    largest entry.
"""

from __future__ import annotations

import torch

from rgpb import OBJECTIVES, LMHead, TokenScores, fused_loss, reference
from rgpb.kernels import cpp_rows

NAMES = sorted(reference.LOSSES)
IMPLS = ("torch", "cpp") if cpp_rows.missing() is None else ("torch",)  # `test_rows.py` says why there is no "cpp"

# N tokens as [B, T], V, H, each with its reason
SHAPES = {
    "V and H off every tile": (4, 7, 131, 13),
    "H = 1": (2, 5, 17, 1),
    "one token": (2, 1, 9, 4),
    "V = 2, the smallest with another token": (2, 6, 2, 3),
}
HEADS = {"plain": (False, None, 1.0), "bias": (True, None, 1.0), "soft-cap and scale": (True, 2.5, 0.3)}


def batch(shape, dtype=torch.float64, head="plain", masked=True):
    """hidden, head, target and reference scores; values are exact in `dtype`, leaves require a gradient."""
    B, T, V, H = shape
    bias, softcap, scale = HEADS[head]

    def leaf(*size):
        return torch.randn(*size).to(dtype).requires_grad_()

    hidden, weight = leaf(B, T, H), leaf(V, H)
    target = torch.randint(V, (B, T))
    if masked and T > 2:
        target[0, :2] = -100
        target[-1, -1] = -100
    lm_head = LMHead(weight, leaf(V) if bias else None, softcap, scale)
    ref_logits = reference.logits(torch.randn(B, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64))
    return hidden, lm_head, target, ref_logits


def ref_scores(ref_logits, target):
    """Exact TokenScores of given reference logits."""
    y = target.clamp(min=0)[..., None]
    others = ref_logits.scatter(-1, y, -torch.inf).logsumexp(-1)
    log_odds = ref_logits.gather(-1, y)[..., 0] - others
    return TokenScores(torch.nn.functional.logsigmoid(log_odds), log_odds, torch.zeros_like(log_odds))


def arguments(name, ref_logits, target):
    """(for the engine, for the oracle): reference, labels, groups and rewards where the objective needs them."""
    spec, ours, oracle = OBJECTIVES[name], {}, {}
    if spec.unit == "group":
        size = 3 if len(target) % 3 == 0 else 2
        oracle["group_size"] = ours["group_size"] = size
        if spec.rewards:
            oracle["rewards"] = ours["rewards"] = torch.randn(len(target) // size, size)
        if name == "mc_po":  # all of them; what is drawn otherwise has a test of its own
            ours["m"], oracle["drawn"] = size - 1, [range(1, size)] * (len(target) // size)
    if spec.ref:
        ours["ref"], oracle["ref_logits"] = ref_scores(ref_logits, target), ref_logits
    if spec.label:
        ours["label"] = oracle["label"] = torch.arange(len(target)) % 2 * 2 - 1
    return ours, oracle


def leaves(hidden, head):
    return [x for x in (hidden, head.weight, head.bias) if x is not None]


def oracle_in(dtype, name, hidden, head, target, oracle, **options):
    """The oracle's loss and gradients with every tensor in `dtype`."""
    h, w, *b = (x.detach().to(dtype).requires_grad_() for x in leaves(hidden, head))
    head = LMHead(w, b[0] if b else None, head.softcap, head.scale)
    oracle = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in oracle.items()}
    loss = reference.LOSSES[name](h, head, target, **oracle, **options)
    return loss, torch.autograd.grad(loss.sum(), [h, w, *b])


def assert_in_budget(ours, naive, exact, dtype, scale=0.0):
    """|ours − exact| ≤ 2 |naive − exact| + one rounding, in the maximum norm. `scale`: of what cancels in `exact`."""
    exact = exact.detach().double()
    error, allowed = ((x.detach().double() - exact).abs().max().item() for x in (ours, naive))
    rounding = torch.finfo(dtype).eps * max(exact.abs().max().item(), scale, torch.finfo(torch.float32).tiny)
    assert error <= 2 * allowed + rounding, f"error {error:.2e}, naive {allowed:.2e}, rounding {rounding:.2e}"


# how to get each path of the engine: (keywords, factor of the upstream gradient); the small workspace makes many chunks
def small(shape, dtype=torch.float64):
    _, _, V, H = shape
    size = 8 if dtype == torch.float64 else 4
    return size * (5 * V + 6 * H) * 2 + (0 if size == 8 or dtype == torch.float32 else V * (H + 1) * 4 + V * H * 8)


PATHS = ("single", "single in chunks", "two_pass", "two_pass in chunks", "frozen")


def run_path(path, name, hidden, head, target, **keywords):
    """The loss and its gradients (of a frozen head none) on one path. A single pass sweeps those pairs and groups
    twice that are longer than a chunk."""
    if "chunks" in path:
        keywords["workspace"] = small((*target.shape, *head.weight.shape), hidden.dtype)
    if path == "frozen":
        head = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    # what couples the whole batch, and float16, take two passes
    if path != "frozen" and OBJECTIVES[name].couples != "batch" and hidden.dtype != torch.float16:
        keywords["path"] = path.partition(" ")[0]
    loss = fused_loss(hidden, head, target, objective=name, **keywords)
    wanted = [x for x in leaves(hidden, head) if x.requires_grad]
    return loss, torch.autograd.grad(loss * 1.5, wanted)
