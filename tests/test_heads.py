"""Heads that aren't a plain `nn.Linear`, each against the model's own logits and their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import sharded
import torch
from test_hf import build, own_logps, padded, targets
from torch import Tensor, nn

import rgpb.hf as hf
from rgpb import LMHead, fused_loss, linear_logprob
from rgpb.engine.chunks import sizes
from rgpb.engine.plan import plan
from rgpb.head import HeadWeight, Quantised
from rgpb.hf.heads import view

IGNORE = -100
HEAD = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["lm_head"]}


def adapted(config: dict[str, Any], family: str = "llama", *more: dict[str, Any], **options: Any) -> Any:
    """A family's tiny model with an adapter for each config, so large that leaving one out shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, of tied weights
        model: Any = peft.get_peft_model(build(family), peft.LoraConfig(**HEAD | config), **options)
        for i, other in enumerate(more):
            model.add_adapter(f"more{i}", peft.LoraConfig(**HEAD | other))
    if more:
        model.base_model.set_adapter(["default", *(f"more{i}" for i in range(len(more)))])
    shake(model)
    return model.eval()


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif "lora_" in key or "modules_to_save" in key or "trainable_tokens" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_as_its_own(model: Any, batch: dict[str, Tensor], rtol: float = 1e-6, seed: int | None = None) -> None:
    """Log-probs, and the gradient of every parameter, are those of the model's own logits."""
    hf.attach(model)
    weights = torch.linspace(-1, 2, int((batch["labels"][:, 1:] != IGNORE).sum()))
    for _ in range(2):
        torch.manual_seed(0 if seed is None else seed)
        own = own_logps(model, batch)
        (own.float() * weights).sum().backward()
        expected = gradients_of(model)
        torch.manual_seed(0 if seed is None else seed)
        ours = hf.token_scores(model, batch).logp[targets(model, batch) != IGNORE]
        torch.testing.assert_close(ours.double(), own, rtol=rtol, atol=5 * rtol)
        (ours * weights).sum().backward()
        found = gradients_of(model)
        assert set(found) == set(expected)
        for key, gradient in expected.items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=max(5 * rtol * size, 1e-7), msg=key)
        # and the single pass
        loss = hf.loss(model, batch, "mle")
        loss.backward()
        single = gradients_of(model)
        target = targets(model, batch)
        if not model.training:
            scores = hf.token_scores(model, batch).logp.sum(1) / (target != IGNORE).sum(1).clamp(min=1)
            assert torch.isfinite(loss)
            assert set(single) == set(expected)
            (-scores.mean()).backward()
            for key, gradient in gradients_of(model).items():
                size = gradient.abs().max().item()
                torch.testing.assert_close(single[key], gradient, rtol=0, atol=max(10 * rtol * size, 1e-7), msg=key)


TIED = {"trainable_token_indices": [3, 4, 9], "target_modules": ["q_proj"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted({}),
    "lora_all": lambda: adapted({"target_modules": ["q_proj", "lm_head"]}),
    "rslora": lambda: adapted({"use_rslora": True}),
    "lora_tied": lambda: adapted({}, "llama_tied"),
    "lora_bias_of_the_head": lambda: adapted({"bias": "lora_only"}, "phi"),
    "lora_bias": lambda: adapted({"lora_bias": True}, "phi"),
    "soft-cap": lambda: adapted({}, "gemma2"),
    "scale": lambda: adapted({}, "granite"),
    "two": lambda: adapted({}, "llama", {"r": 3}),
    "two_one_elsewhere": lambda: adapted({}, "llama", {"target_modules": ["q_proj"]}),
    "dora": lambda: adapted({"use_dora": True}),
    "dora_phi": lambda: adapted({"use_dora": True, "bias": "lora_only"}, "phi"),
    "dora_after_lora": lambda: adapted({}, "phi", {"use_dora": True}),
    "lora_after_dora": lambda: adapted({"use_dora": True}, "phi", {"r": 3}),
    "two_doras": lambda: adapted({"use_dora": True}, "phi", {"use_dora": True, "r": 3}),
    "saved": lambda: adapted({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved_tied": lambda: adapted({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "llama_tied"),
    "saved_and_embedding_tied": lambda: adapted(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "llama_tied"
    ),
    "lora_and_embedding_tied": lambda: adapted(
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "llama_tied"
    ),
    "tokens": lambda: adapted({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4, 9]}}),
    "tokens_of_both_tied": lambda: adapted(TIED, "llama_tied"),
    "tokens_of_the_embedding": lambda: adapted(TIED),
    "tokens_without_the_bias": lambda: adapted(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}, "phi"
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_on_the_head(name: str) -> None:
    model = ADAPTERS[name]()
    batch = padded(model.get_base_model())
    assert_as_its_own(model, batch)
    label = torch.tensor([True, False, True])
    with model.disable_adapter(), torch.no_grad():
        base = own_logps(model, batch)
        scores = hf.token_scores(model, batch)
    keep = targets(model, batch) != IGNORE
    torch.testing.assert_close(scores.logp[keep].double(), base, rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        one, other = (hf.loss(model, batch, "kto", label=label, ref=ref, beta=0.5) for ref in ("base", scores))
        assert (hf.token_scores(model, batch).logp[keep] - base).abs().max() > 1e-3
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["lora", "lora_bias", "two", "dora", "tokens"])
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_merged_adapters(name: str) -> None:
    model = ADAPTERS[name]()
    batch = padded(model.get_base_model())
    expected = own_logps(model, batch)
    model.merge_adapter()
    scores = hf.token_scores(model, batch).logp[targets(model, batch) != IGNORE]
    torch.testing.assert_close(scores.double(), own_logps(model, batch), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.disable_adapter():  # which unmerges
        scores = hf.token_scores(model, batch).logp[targets(model, batch) != IGNORE]
        torch.testing.assert_close(scores.double(), own_logps(model, batch), rtol=1e-6, atol=1e-5)


def test_dropout_on_the_way_to_a_is_the_layer_s_own() -> None:
    model = adapted({"lora_dropout": 0.5}).train()
    assert_as_its_own(model, padded(model.get_base_model()), seed=7)
    batch = padded(model.get_base_model())
    one, other = (hf.token_scores(model, batch).logp for _ in range(2))
    assert (one - other).abs().max() > 1e-2
    dora = adapted({"lora_dropout": 0.5, "use_dora": True})
    assert_as_its_own(dora, batch)
    with pytest.raises(ValueError, match="expected lora_dropout=0 with DoRA on the head of LlamaForCausalLM.*got 0.5"):
        hf.token_scores(dora.train(), batch)


@pytest.mark.parametrize("name", ["lora", "two", "dora", "saved", "tokens"])
def test_sixteen_bits_and_autocast(name: str) -> None:
    """Adapters are float32 beside a bfloat16 model, as PEFT has them."""
    exact = ADAPTERS[name]().double()
    batch = padded(exact.get_base_model())
    true, keep = own_logps(exact, batch), targets(exact, batch) != IGNORE
    (-true.sum()).backward()
    wanted = gradients_of(exact)
    low = ADAPTERS[name]()
    for key, parameter in low.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.bfloat16()
    for model, dtype in ((ADAPTERS[name](), torch.bfloat16), (low, None)):
        results = []
        for score in (own_logps, lambda m, b: hf.token_scores(m, b).logp[keep]):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logp = score(model, batch)
            (-logp.sum()).backward()
            results.append((logp.detach(), gradients_of(model)))
        own, ours = ((logp - true).abs().max().item() for logp, _ in results)
        assert ours <= 2 * own + 0.02
        for key, gradient in wanted.items():
            own, ours = ((g[key].double() - gradient).abs().max() for _, g in results)
            assert ours <= 2 * own + 0.01 * gradient.abs().max(), key


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (peft.LoHaConfig(r=2, target_modules=["lm_head"]), "peft.tuners.loha"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "peft.tuners.ia3"),
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["lm_head"]), "peft.tuners.oft"),
        (peft.VeraConfig(r=2, target_modules=["lm_head"]), "peft.tuners.vera"),
        (peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10), "peft.tuners.adalora"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_tuners_are_refused_by_name(config: Any, found: str) -> None:
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match=rf"expected LoRA, .* got {found}.*; leave the head out of its target_modules"):
        hf.token_scores(model, padded(model.get_base_model()))


def test_what_acts_on_the_head_from_the_batch_is_refused() -> None:
    model = adapted({}, "llama", {})
    batch = padded(model.get_base_model())
    with pytest.raises(ValueError, match="nothing that acts on the head itself, got adapter_names"):
        hf.token_scores(model, batch | {"adapter_names": ["default", "__base__", "more0"]})
    token = int(batch["input_ids"][0, 3])
    alora = adapted({"alora_invocation_tokens": [token]})
    with pytest.raises(ValueError, match=r"expected plain LoRA or DoRA .*ALoraLinearVariant"):
        hf.token_scores(alora, batch)


def test_a_frozen_weight_gets_no_gradient_and_lora_no_copy() -> None:
    model = adapted({})
    head = model.get_base_model().get_output_embeddings()
    held = view(head, model.get_base_model())
    assert held.weight.base.data_ptr() == head.base_layer.weight.data_ptr()
    assert held.weight.more is head.lora_B["default"].weight
    assert not held.weight.base.requires_grad
    vocab, width, r = 32000, 512, 16
    peaks = {}
    for how in ("columns", "copied"):
        torch.manual_seed(0)
        w, b = torch.randn(vocab, width) * 0.1, (torch.randn(vocab, r) * 0.1).requires_grad_()
        x = torch.randn(64, width + r, requires_grad=True)
        target = torch.randint(vocab, (64,))
        with torch.profiler.profile(profile_memory=True) as record:
            weight: Any = HeadWeight(w, b) if how == "columns" else torch.cat([w, b], 1)
            linear_logprob(x, LMHead(weight), target, workspace=32 << 20).logp.sum().backward()
        peaks[how] = peak_of(record)
    assert peaks["columns"] < 40 << 20  # the workspace, and gradients of x and B
    assert peaks["copied"] > 2 * vocab * (width + r) * 4  # [W, B], and all of its gradient


def peak_of(record: Any) -> int:
    """Bytes held at most, of what was allocated while it recorded."""
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", ["auto", "two_pass"])
def test_columns_beside_a_weight_and_codes_are_the_whole_weight(impl: str, dtype: torch.dtype, path: str) -> None:
    """On every path, in chunks too, with W frozen, trained or quantised."""
    torch.manual_seed(0)
    vocab, width, r = 2111, 48, 5
    target = torch.randint(vocab, (8, 7))
    target[:, :2] = IGNORE
    codes, scales = torch.randint(-127, 128, (vocab, width), dtype=torch.int8), torch.rand(vocab, 3, dtype=dtype) / 99
    floats = (codes.view(vocab, 3, -1) * scales[:, :, None]).view(vocab, width)
    b, bias = (torch.randn(vocab, n, dtype=dtype) * 0.3 for n in (r, 1))
    bias = bias[:, 0].requires_grad_()
    x = torch.randn(8, 7, width + r, dtype=dtype, requires_grad=True)
    b.requires_grad_()
    ref = torch.full((8, 7), -3.0, dtype=dtype)
    for trained, how in ((False, None), (True, None), (False, Quantised("integers", dtype, width, scales))):
        w = floats.clone().requires_grad_(trained)
        for objective, workspace, more in (
            ("dpo", 1 << 29, {}),
            ("dpo", 1 << 21, {}),
            ("bnf", 1 << 21, {}),
            ("dpo", 1 << 29, {"grad_tolerance": 0.0, "sort_vocab": True}),
            ("entropy", 1 << 21, {}),
        ):
            results = []
            for weight in (HeadWeight(codes if how else w, b, how), torch.cat([w, b], 1)):
                head = LMHead(weight, bias, 30.0, 0.7)
                options: dict[str, Any] = {"impl": impl, "workspace": workspace, **more}
                if objective == "entropy":
                    found = linear_logprob(x, head, target, entropy=True, **options)
                    value = found.logp.sum() + found.entropy.sum()
                else:
                    label = torch.arange(8) % 3 > 0 if objective == "bnf" else None
                    options |= {"objective": objective, "label": label, "ref": ref, "path": path}
                    value = fused_loss(x, head, target, **options)
                value.backward()
                results.append([value.detach(), *(p.grad for p in (x, b, bias, w))])
                for p in (x, b, bias, w):
                    p.grad = None
            for ours, whole in zip(*results):
                if ours is not None:
                    size, eps = whole.abs().max().item(), torch.finfo(dtype).eps
                    torch.testing.assert_close(ours, whole, rtol=0, atol=32 * eps * size)


def test_lora_on_a_frozen_head_costs_two_products() -> None:
    head = sizes(128256, 4112, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_90", trained=16)
    assert plan(8192, head, couples="token").units == 2
    assert plan(8192, head, path="two_pass").units == 3
    whole = sizes(128256, 4112, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch="sm_90")
    assert plan(8192, whole, couples="token").units == 4  # whose sum of dW doesn't fit beside it
    assert plan(8192, whole, path="two_pass").units == 4


# --- shards


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "how", [how if how in ("saved", "lora_root") else pytest.param(how, marks=pytest.mark.full) for how in sharded.HOW]
)
def test_heads_that_fsdp_holds_elsewhere(how: str, ranks: Any) -> None:
    """Gradients are the means over the ranks, as of one process on the whole batch."""
    expected = sharded.step(how, None)
    found = ranks(2)(sharded.step, how, 2)
    for value, gradients in found:
        assert value == pytest.approx(expected[0], rel=1e-6)
        assert set(gradients) == set(expected[1])
        for key, gradient in expected[1].items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=max(3e-6 * size, 1e-7), msg=key)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "objective",
    ["bnf", "dpo", *(pytest.param(name, marks=pytest.mark.full) for name in ("swepo", "mc_po", "kto", "sum"))],
)
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.full) if how == "with_fsdp" else how for how in sharded.PLANS]
)
def test_a_vocabulary_that_tensor_parallelism_splits(how: str, objective: str, ranks: Any) -> None:
    world = 4 if how == "with_fsdp" else 2
    value, expected = sharded.tensor_parallel(how, objective, False)
    for found, gradients in ranks(world)(sharded.tensor_parallel, how, objective, True):
        assert abs(found - value) <= 1e-6 * abs(value)
        assert set(gradients) == set(expected)
        for key, gradient in expected.items():
            assert (gradients[key] - gradient).norm() <= 2e-6 * gradient.norm(), key


@pytest.mark.xdist_group("ranks")
def test_ranks_of_a_split_head_draw_the_same(ranks: Any) -> None:
    one, other = ranks(2)(sharded.drawn_alike)
    assert one == other


@pytest.mark.full
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("workspace", [16, 64])
@pytest.mark.parametrize("how", ["fsdp2", "tp"])
def test_a_step_of_a_model_holds_what_the_plan_says(how: str, workspace: int, ranks: Any) -> None:
    """To within a tenth, on each rank; see `sharded.held`."""
    for held, planned in ranks(4)(sharded.held, how, workspace << 20):
        assert 0.9 * planned <= held <= 1.1 * planned


# --- offloaded


@pytest.mark.parametrize("how", ["cpu", "disk", "head"])
def test_offloaded_heads_are_scored_and_not_trained(how: str, tmp_path: Any) -> None:
    model: Any = build("llama")
    batch = padded(model)
    own, keep = own_logps(model, batch), targets(model, batch) != IGNORE
    (-own.sum()).backward()
    expected = gradients_of(model)
    if how == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        places = {"model": "cpu", "lm_head": "disk"}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        scores = hf.token_scores(model, batch).logp[keep]
    torch.testing.assert_close(scores.double(), own, rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match="got (model.embed_tokens|lm_head).weight and .* that accelerate offloads"):
        hf.loss(model, batch, "mle")
    if how == "head":  # frozen, it lets the layers train
        model.lm_head.requires_grad_(False)
        (-hf.token_scores(model, batch).logp[keep].sum()).backward()
        for key, gradient in gradients_of(model).items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(gradient, expected[key], rtol=0, atol=max(5e-6 * size, 1e-7), msg=key)
        assert model.model.layers[0].mlp.up_proj.weight.requires_grad
