"""The kernels on a real GPU, against float64: `pytest -m gpu`. Needs torch and Triton, nothing else of this folder."""

from __future__ import annotations

import itertools

import pytest
import torch

from rgpb import OBJECTIVES, LMHead, fused_loss, linear_logprob, reference
from rgpb.bench import doctor
from rgpb.bench.contest import Shape
from rgpb.bench.measure import Result, peak_memory
from rgpb.cli import main
from rgpb.fused import bnf_loss

pytestmark = pytest.mark.gpu

IMPLS = ("torch", "triton", "tiled")
# B, T, V, H off every tile; H·2 bytes is a multiple of 16, so tensor descriptors are used where there are any
SHAPE = (4, 33, 1031, 72)
CHUNKED = (8, 128, 32003, 256)  # in 96 MiB two chunks or more, and slices of the vocabulary
SKIPPED, TOLERANCES = (4, 64, 8200, 64), (0.0, 0.05)
WORKSPACE = 96 << 20
HEADS = {"plain": (False, None, 1.0), "bias": (True, None, 1.0), "soft-cap and scale": (True, 5.0, 0.7)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATHS = ("single", "two_pass", "frozen", "forward")
# The kernels' own losses, and one of each way to couple tokens: the engine knows no more of a loss
LOSSES = ("mle", "nll_pll", "unlikelihood", "bnf", "exmate", "dpo", "ipo", "swepo")
# Of a loss, relative where it is above 1; of the norm of a gradient
VALUE, GRADIENT = 1e-4, {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


@pytest.fixture(autouse=True)
def as_users_have_it():
    """cuBLAS refuses deterministic algorithms without a variable of its own; that isn't what is tested."""
    torch.use_deterministic_algorithms(False)


def batch(shape, dtype, head):
    """hidden, head, target on the GPU: logits of standard deviation 2 before scale and soft-cap; some are masked."""
    B, T, V, H = shape
    bias, softcap, scale = HEADS[head]
    random = torch.Generator().manual_seed(0)

    def leaf(*size, std=1.0):
        return (torch.randn(*size, generator=random) * std).to(DTYPES[dtype]).cuda().requires_grad_()

    hidden, weight = leaf(B, T, H), leaf(V, H, std=2 / H**0.5)
    target = torch.randint(V, (B, T), generator=random)
    target[0, :2] = target[-1, -1] = -100
    return hidden, LMHead(weight, leaf(V) if bias else None, softcap, scale), target.cuda()


def leaves(hidden, head):
    return [x for x in (hidden, head.weight, head.bias) if x is not None]


def in_float64(hidden, head):
    """The same leaves."""
    hidden, weight, *bias = (x.detach().double().requires_grad_() for x in leaves(hidden, head))
    return hidden, LMHead(weight, bias[0] if bias else None, head.softcap, head.scale)


def off(made, truth):
    """‖error‖ / ‖truth‖."""
    return ((made.double() - truth).norm() / truth.norm()).item()


def given_for(loss, hidden, head, target):
    """Reference, labels, rewards: for the library, and for the oracle."""
    spec, exact = OBJECTIVES[loss], in_float64(hidden, head)
    ours, oracle = {}, {}
    if spec.ref:
        logp = reference.token_scores(*exact, target)["logp"].detach()
        noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)).to(logp.device)
        ours["ref"] = oracle["ref"] = (logp + 0.3 * noise).clamp(max=-1e-3).float()
    if spec.label:
        ours["label"] = oracle["label"] = 1.0 - 2 * (torch.arange(len(target), device=target.device) % 2)
    if spec.rewards:
        ours["rewards"] = oracle["rewards"] = torch.linspace(0, 3, len(target), device=target.device).view(-1, 2)
        oracle["group_size"] = 2
    return ours, oracle


def cases():
    """Every (impl, path, dtype); heads, losses and shapes go round, so that each meets each of these."""
    heads, losses, shapes = (itertools.cycle(x) for x in (HEADS, LOSSES, (SHAPE, SHAPE, CHUNKED, SHAPE)))
    for impl, path, dtype in itertools.product(IMPLS, PATHS, DTYPES):
        if dtype == "fp32":
            next(heads)  # or each type would meet the same ones on every path
        if impl == "tiled" and dtype == "fp16" and path != "forward":
            continue  # refused by name
        for _ in range(2):
            yield impl, path, dtype, next(heads), next(losses), next(shapes)
        next(losses)  # out of step with the rest


def graded(impl, path, dtype, loss, hidden, head, target, given, scale):
    """[loss, gradients of scale · loss that the path makes]"""
    if path in ("frozen", "forward"):
        bias = None if head.bias is None else head.bias.detach()
        head = head._replace(weight=head.weight.detach(), bias=bias)
    hidden = hidden.detach() if path == "forward" else hidden
    wanted = [x for x in leaves(hidden, head) if x.requires_grad]
    asked = "auto" if dtype == "fp16" else path  # whose gradients take two passes
    value = fused_loss(hidden, head, target, objective=loss, path=asked, impl=impl, workspace=WORKSPACE, **given)
    return [value.detach(), *(torch.autograd.grad(value * scale, wanted) if wanted else ())]


@pytest.mark.parametrize(("impl", "path", "dtype", "head", "loss", "shape"), [*cases()], ids=str)
def test_losses(impl, path, dtype, head, loss, shape):
    """Right on every path, and the same bits twice."""
    hidden, lm_head, target = batch(shape, dtype, head)
    ours, oracle = given_for(loss, hidden, lm_head, target)
    exact = in_float64(hidden, lm_head)
    truth = reference.LOSSES[loss](*exact, target, **oracle)
    wanted = leaves(*exact)[: {"frozen": 1, "forward": 0}.get(path)]
    true = torch.autograd.grad(truth, wanted) if wanted else ()
    scale = 2.0**8 / max(g.abs().max().item() for g in true) if dtype == "fp16" and true else 1.5
    runs = [graded(impl, path, dtype, loss, hidden, lm_head, target, ours, scale) for _ in range(2)]
    assert abs(runs[0][0].item() - truth.item()) <= VALUE * max(1.0, abs(truth.item()))
    assert len(runs[0]) == 1 + {"frozen": 1, "forward": 0}.get(path, 2 + (lm_head.bias is not None))
    for gradient, exact_gradient in zip(runs[0][1:], true):
        assert off(gradient, exact_gradient * scale) <= GRADIENT[dtype]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


SCORED = [*zip(IMPLS, DTYPES), *zip(IMPLS, ("bf16", "fp16", "fp32"))]


@pytest.mark.parametrize("shape", [SHAPE, CHUNKED], ids=str)
@pytest.mark.parametrize(("impl", "dtype"), SCORED, ids=str)
def test_scores(impl, dtype, shape):
    """Right to 1e-5 (of float16 states 1e-4), with the gradient through all of them, and the same bits twice."""
    hidden, head, target = batch(shape, dtype, "bias")
    exact = in_float64(hidden, head)
    truth = reference.token_scores(*exact, target)
    fields = ("logp", "log_odds", "entropy")
    differentiable = impl != "tiled" or dtype != "fp16"
    true = torch.autograd.grad(sum(truth[name].sum() for name in fields), leaves(*exact))
    runs = []
    for _ in range(2):
        made = linear_logprob(hidden, head, target, entropy=True, impl=impl, workspace=WORKSPACE)
        total = sum(getattr(made, name).sum() for name in fields)
        gradients = torch.autograd.grad(total, leaves(hidden, head)) if differentiable else ()
        runs.append([*(getattr(made, name).detach() for name in fields), *gradients])
    for made, name in zip(runs[0], fields):
        limit = 1e-5 if name == "logp" and dtype != "fp16" else 1e-4
        assert (made.double() - truth[name])[target >= 0].abs().max() <= limit, name
    for gradient, exact_gradient in zip(runs[0][3:], true):
        assert off(gradient, exact_gradient) <= GRADIENT[dtype]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("impl", IMPLS, ids=str)
@pytest.mark.parametrize("path", ["single", "two_pass", "frozen"])
def test_memory_stays_inside_the_workspace(path, impl):
    hidden, head, target = batch((8, 512, 32000, 256), "bf16", "plain")
    head = head._replace(weight=head.weight.detach()) if path == "frozen" else head
    wanted = [hidden] if path == "frozen" else [hidden, head.weight]

    def run():
        value = fused_loss(hidden, head, target, objective="mle", path=path, workspace=WORKSPACE, impl=impl)
        return Result(value.detach(), torch.autograd.grad(value, wanted))

    # a few numbers per token; O beside dX's cast
    assert peak_memory(run, "cuda").extra <= WORKSPACE + 64 * target.numel() + hidden.nbytes


@pytest.mark.parametrize("impl", ["triton", "tiled"])
def test_skipping(impl):
    hidden, head, target = batch(SKIPPED, "fp32", "plain")
    how = {"impl": impl, "return_metrics": True}
    whole, part = (fused_loss(hidden, head, target, objective="mle", grad_tolerance=t, **how) for t in TOLERANCES)
    exact, made = (torch.autograd.grad(loss, head.weight)[0] for loss, _ in (whole, part))
    assert 0 < part[1]["skipped/share"] < 1
    limit = (part[1]["skipped/bound"] * hidden.detach().abs().sum(-1)).sum() * 1.001 + 1e-4
    assert (exact - made).abs().sum() <= limit


def test_doctor_checks_every_kernel_set(capsys):
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    checks = [line[1] for line in lines if line[:1] == ["cuda:0"] and line[-1:] == ["ok"]]
    assert checks == [impl for impl in doctor.kernels(torch.device("cuda", 0)) for _ in doctor.DTYPES]


def test_every_kernel_that_is_tuned_and_timed():
    from rgpb.bench import tune

    given = tune.Inputs(Shape(512, 256, 32003), torch.bfloat16, torch.device("cuda"))
    errors = {name: tune.error_of(make(given), None) for name, make in tune.KERNELS.items()}
    assert max(errors.values()) <= tune.TOLERANCE[torch.bfloat16], errors


def test_bnf_on_long_responses_twice():
    """Several chunks and slices: the order in which they add up is fixed."""
    hidden, head, target = batch(CHUNKED, "bf16", "plain")
    label, ref = (
        torch.tensor([True, False] * 4, device="cuda"),
        linear_logprob(hidden.detach(), head.weight.detach(), target),
    )
    losses = [bnf_loss(hidden, head, target, label, ref=ref, workspace=64 << 20) for _ in range(2)]
    for a, b in zip(*(torch.autograd.grad(loss, [hidden, head.weight]) for loss in losses)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", ["bnf", "dpo", "swepo"])
def test_a_graph_gives_the_bits_of_a_call_twice(loss):
    """Captured without reads, and replayed on what its inputs hold by then."""
    hidden, head, target = batch(SHAPE, "bf16", "plain")
    ours, _ = given_for(loss, hidden, head, target)

    def run():
        value = fused_loss(hidden, head, target, objective=loss, workspace=WORKSPACE, validate=False, **ours)
        return [value.detach(), *torch.autograd.grad(value, leaves(hidden, head))]

    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            hidden.mul_(0.9)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))
