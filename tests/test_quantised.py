"""Quantised heads, against their layers' own logits. Needs torchao and bitsandbytes: `make full-quantised`."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from test_heads import IGNORE, assert_as_its_own, peak_of, shake
from test_hf import H, build, own_logps, padded, targets
from torch import Tensor, nn

import rgpb.hf as hf
from rgpb import LMHead, linear_logprob
from rgpb.engine.stored import rows_of
from rgpb.hf.heads import view

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs, at import
    import bitsandbytes as bnb
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

FORMATS = ["int8", "int8_groups", "int4", "int4_groups", "nf4", "fp4", "nf4_nested"]
CONFIGS: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(),
    "int8_groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
    "int4_groups": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
}


def quantise_(model: Any, name: str) -> None:
    """The head alone."""
    head = model.get_output_embeddings()
    vocab, width = head.weight.shape
    if name in CONFIGS:
        quantize_(model, CONFIGS[name], filter_fn=lambda module, _: module is head)
        return
    options: dict[str, Any] = {"quant_type": name[:3], "compress_statistics": name.endswith("nested")}
    made = bnb.nn.Linear4bit(width, vocab, bias=head.bias is not None, compute_dtype=head.weight.dtype, **options)
    made.weight = bnb.nn.Params4bit(head.weight.data.clone(), requires_grad=False, **options)
    made.bias = head.bias
    model.set_output_embeddings(made.to("cpu").train(model.training))


def small(family: str = "llama") -> Any:
    """Whose hidden size is a block of bitsandbytes."""
    return build(family, hidden_size=64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_quantised_heads(name: str, family: str) -> None:
    model = small(family)
    quantise_(model, name)
    model.get_output_embeddings().requires_grad_(False)
    batch = padded(model)
    hf.attach(model)
    assert_as_its_own(model, batch)
    low = small(family).bfloat16()
    quantise_(low, name)
    exact, keep = own_logps(small(family).double(), batch), targets(low, batch) != IGNORE
    ours, own = hf.token_scores(low, batch).logp[keep], own_logps(low, batch)
    assert (ours - exact).abs().max() <= 1.1 * (own - exact).abs().max() + 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_what_the_library_makes_of_them(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = small().to(dtype)
        quantise_(model, name)
        head = model.get_output_embeddings()
        held = view(head, model)
        rows = torch.cat(list(rows_of(held.weight, 7)))
        if name.startswith("int"):
            whole: Tensor = head.weight.dequantize()
        else:
            whole = bnb.functional.dequantize_4bit(head.weight.data, head.weight.quant_state)
        assert rows.dtype == dtype
        assert (rows == whole).all(), (rows - whole).abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_lora_on_a_quantised_head(name: str) -> None:
    model = small()
    quantise_(model, name)
    model.is_loaded_in_4bit = name[1:3] == "f4" or name[:3] == "fp4"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["lm_head", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it can't be merged
        adapted = peft.get_peft_model(model, config).eval()
    shake(adapted)
    assert_as_its_own(adapted, padded(model), rtol=4e-6)  # through layers whose gradients are sums of larger terms


def test_the_weight_is_never_whole() -> None:
    vocab, width = 32000, 512
    model = nn.Sequential(nn.Linear(width, vocab, bias=False))
    quantize_(model, Int8WeightOnlyConfig())
    head: Any = model[0]
    held = view(head, build("llama"))
    x, target = torch.randn(64, width, requires_grad=True), torch.randint(vocab, (64,))
    with torch.profiler.profile(profile_memory=True) as record:
        linear_logprob(x, LMHead(held.weight), target, workspace=32 << 20).logp.sum().backward()
    assert peak_of(record) < 40 << 20 < vocab * width * 4


def test_quantised_hidden_states_are_refused() -> None:
    model = small()
    quantise_(model, "dynamic")
    with pytest.raises(
        ValueError, match="expected weight-only quantisation of the head.*Int8Tensor with act_quant_kwargs"
    ):
        hf.token_scores(model, padded(model))


def test_what_bitsandbytes_has_that_is_refused() -> None:
    model = small()
    model.lm_head = bnb.nn.Linear8bitLt(64, 37, bias=False, has_fp16_weights=False).to("cpu")
    with pytest.raises(ValueError, match="Linear8bitLt, which quantises the hidden states.*llm_int8_skip_modules"):
        hf.token_scores(model, padded(model))
    model = build("llama")
    quantise_(model, "nf4")
    with pytest.raises(ValueError, match=rf"a hidden size that blocks of 64 divide .* got {H} in bitsandbytes"):
        hf.token_scores(model, padded(model))


def test_codes_that_an_evaluation_packs_anew_are_kept_as_they_are() -> None:
    """On CPUs that have the instructions; what it leaves behind is rounded."""
    model = build("llama", hidden_size=64, vocab_size=96)
    quantise_(model, "nf4")
    head = model.lm_head
    head.support_avx512bf16_for_cpu = True
    hf.attach(model)
    assert not head.support_avx512bf16_for_cpu
    head.weight.data, head.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        head.weight.data, head.weight.quant_state
    )
    with pytest.raises(ValueError, match="an evaluation on a CPU has packed anew and rounded; load the model again"):
        hf.token_scores(model, padded(model))
