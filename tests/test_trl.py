"""TRL's trainers on this library's engine, beside TRL's own."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import trl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils
from trl_trainers import LOSSES, MARKS, SIZES, make, trainer_of

import rgpb.trl as own
from rgpb.trl import head

pytestmark = MARKS
parts = pytest.fixture(scope="module")(make)

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def expected(hidden, weight, bias, target, temperature, softcap, scale):
    """Float64, from whole logits."""
    z = scale * (hidden.double() @ weight.double().T + (0 if bias is None else bias.double()))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(1)
    p = logp.exp()
    found = logp.gather(1, target[:, None]).squeeze(1), -(p * logp).sum(1), (p * p).sum(1).log(), z.mean(1)
    return (*found, z.argmax(1) == target)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_all_outputs_and_their_gradients(softcap, scale, with_bias, monkeypatch):
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 40 * 64)  # several slices
    hidden, weight = torch.randn(40, 16), torch.randn(203, 16)
    bias = torch.randn(203) if with_bias else None
    given = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    target = torch.where(torch.arange(40) % 2 == 0, (hidden @ weight.T).argmax(1), torch.randint(203, (40,)))
    call = hidden, weight, bias, target, 0.7
    ours = head.LogProbs.apply(*call, 64, softcap, scale, ALL)
    theirs = expected(*call, softcap, scale)
    for name, a, b in zip(ALL, ours, theirs):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-5, rtol=1e-5, msg=name)
    assert 0 < int(ours[4].sum()) < 40
    upstream = torch.randn(2, 40)
    ours, theirs = (
        torch.autograd.grad((upstream[0] * x[0]).sum() + (upstream[1] * x[1]).sum(), given) for x in (ours, theirs)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_of_equals_the_first_is_the_top():
    weight = torch.ones(6, 4)
    found = head.LogProbs.apply(torch.ones(3, 4), weight, None, torch.tensor([0, 1, 5]), 1.0, 64, None, 1.0, ALL)
    assert found[4].tolist() == [True, False, False]


def test_no_position_with_a_label():
    found = head.LogProbs.apply(torch.ones(0, 4), torch.ones(6, 4), None, torch.ones(0, dtype=torch.long), 1.0, 64)
    assert found[0].shape == (0,)
    assert found[1:] == (None,) * 4


@pytest.mark.parametrize("case", ["shifted", "frozen head", "no label"])
def test_through_the_models_forward(case):
    """Labels that are shifted already, a head without a gradient, and no position with a label: as TRL's own."""
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, **SIZES))
        utils.add_fused_lm_head(model, outputs=ALL)
        model.lm_head.weight.requires_grad_(case != "frozen head")
        ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
        labels = ids.masked_fill(torch.arange(7) < 3, -100) if case != "no label" else torch.full_like(ids, -100)
        with own.accelerate() if fast else nullcontext():
            given = {"shift_labels" if case == "shifted" else "labels": labels}
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), fused_lm_head=True, **given)
        (found.log_probs.sum() + 0.1 * found.entropy.sum()).backward()
        assert (model.lm_head.weight.grad is None) == (case == "frozen head")
        results.append((found, [p.grad for p in model.parameters() if p.grad is not None]))
    (theirs, grads), (ours, others) = results
    for name in ALL:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-6, rtol=1e-5, msg=name)
    assert len(grads) == len(others) > 5
    for a, b in zip(grads, others):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_it_is_undone():
    before = utils._ChunkedLogProbFunction, utils._use_triton
    outer = own.accelerate()
    inside = utils._ChunkedLogProbFunction
    assert inside is not before[0]
    with pytest.raises(KeyError), own.accelerate():
        raise KeyError
    assert utils._ChunkedLogProbFunction is inside
    outer.undo()
    outer.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    first, second = own.accelerate(), own.accelerate()
    first.undo()
    assert utils._ChunkedLogProbFunction is inside
    second.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0.0", None])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError, match=rf"trl: expected >=1.16,<1.17, got {found or 'none'}: pip install"):
        own.check_version(found)
    own.check_version("1.16.3")
    own.check_version("1.16rc1")


def test_parts_of_zero3_are_refused():
    weight = torch.nn.Parameter(torch.ones(6, 4))
    weight.ds_id = 1
    with pytest.raises(ValueError, match=r"model: expected a head that is whole .* ZeRO-3"):
        head.LogProbs.apply(torch.ones(3, 4), weight, None, torch.tensor([0, 1, 5]), 1.0, 64)


@pytest.mark.skipif(dist.is_initialized(), reason="this process has a group already")
def test_a_head_that_trl_gathers_is_refused():
    """Of one that FSDP2 holds in parts, TRL's gradient is wrong: findings/trl_fused_head_fsdp2.sh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])).full_tensor()
        call = None, torch.tensor([0, 1, 5]), 1.0, 64
        with pytest.raises(ValueError, match="model: expected a head that FSDP2 holds whole in the forward, got one"):
            head.LogProbs.apply(torch.ones(3, 4), weight, *call)
        head.LogProbs.apply(torch.ones(3, 4), weight.detach(), *call)  # without a gradient it is right
    finally:
        dist.destroy_process_group()


def test_mixed_types():
    """float32 hidden states over a bfloat16 head, as `cast_lm_head_to_fp32` gives; and both under autocast."""
    hidden, weight = (torch.randn(n, 16).bfloat16() for n in (12, 203))  # whether operands are rounded is no matter
    hidden, weight = hidden.float().requires_grad_(), weight.requires_grad_()
    target, outputs = torch.randint(203, (12,)), (*ALL,)
    ours = head.LogProbs.apply(hidden, weight, None, target, 1.0, 64, None, 1.0, outputs)
    theirs = expected(hidden, weight, None, target, 1.0, None, 1.0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-5, rtol=1e-5)
    ours[0].sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.LogProbs.apply(hidden, wide, None, target, 1.0, 64, None, 1.0, outputs)
    theirs = expected(hidden, wide, None, target, 1.0, None, 1.0)
    torch.testing.assert_close(ours[0], theirs[0].float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours[3], theirs[3].float(), atol=2e-5, rtol=1e-5)  # of a bfloat16 mean 1e-3


def test_the_fifteen_losses_of_dpo(parts, tmp_path):
    trainer = trainer_of(parts, tmp_path, label_smoothing=0.1, use_weighting=False)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for loss_type in LOSSES:
        trainer.loss_types = [loss_type]
        results = []
        for fast in (False, True):
            trainer.model.zero_grad()
            trainer._metrics["train"].clear()
            trainer._total_train_tokens = 0
            trainer.model.train()
            patched = own.accelerate() if fast else None
            try:
                loss = trainer.compute_loss(trainer.model, batch)
            finally:
                if patched is not None:
                    patched.undo()
            loss.backward()
            metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
            results.append((loss.detach(), [p.grad.clone() for p in trainer.model.parameters()], metrics))
        (a, grads, metrics), (b, others, found) = results
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=loss_type)
        for x, y in zip(grads, others):
            assert float((x - y).abs().max()) <= 1e-6 * max(1.0, float(x.abs().max())), loss_type
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            assert math.isclose(found[name], value, rel_tol=1e-4, abs_tol=1e-5), (loss_type, name)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DPOTrainer", {}),
        pytest.param("DPOTrainer", {"use_weighting": True}, marks=pytest.mark.full),
        pytest.param("SFTTrainer", {}, marks=pytest.mark.full),
        pytest.param("KTOTrainer", {}, marks=pytest.mark.full),
    ],
)
def test_twenty_steps(parts, tmp_path, kind, settings):
    """Losses and weights, step by step, beside TRL's own."""
    tokenizer, model, data = parts
    if kind == "SFTTrainer":
        parts = tokenizer, model, data.remove_columns("rejected").rename_column("chosen", "completion")
    results = []
    for fast in (False, True):
        trainer = trainer_of(parts, tmp_path / str(fast), getattr(trl, kind), max_steps=20, **settings)
        patched = own.accelerate() if fast else None
        try:
            trainer.train()
        finally:
            if patched is not None:
                patched.undo()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        results.append((losses, [p.detach() for p in trainer.model.parameters()]))
    assert len(results[0][0]) == 20
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.full
def test_two_steps_of_grpo(parts, tmp_path):
    """Losses, KL, entropy and weights beside TRL's own; the reference is the model as it was saved.

    Plain steps: Adam's first ones divide a gradient of rounding errors by its own size.
    """
    tokenizer, model, data = parts
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results = []
    for fast in (False, True):
        args = trl.GRPOConfig(
            str(tmp_path / str(fast)), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
            beta=0.1, temperature=0.8, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
            gradient_checkpointing=False, optim="sgd", learning_rate=0.1, disable_tqdm=True, max_steps=2,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            LlamaForCausalLM.from_pretrained(tmp_path / "model"), args=args, processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(place) for place, _ in enumerate(completions)],
            train_dataset=data.select_columns("prompt"),
        )  # fmt: skip
        with own.accelerate() if fast else nullcontext():
            trainer.train()
        steps = [
            [line[name] for name in ("loss", "kl", "entropy", "reward", "grad_norm")]
            for line in trainer.state.log_history
            if "loss" in line
        ]
        results.append((steps, [p.detach() for p in trainer.model.parameters()]))
    (steps, weights), (found, others) = results
    assert len(steps) == 2
    assert steps[1][1] > 0  # the second step is off the reference
    torch.testing.assert_close(torch.tensor(found), torch.tensor(steps), atol=1e-6, rtol=1e-6)
    for a, b in zip(weights, others):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters()))
