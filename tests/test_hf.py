"""The transformers adapter against the models' own logits and losses, on tiny random models."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import rgpb.hf as hf
from rgpb import LMHead, Responses, TokenScores, fused_loss

V, H, IGNORE = 37, 16, -100  # V is a multiple of no tile


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SIZES = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | TOKENS | {"num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 3}
GPT2 = {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 32} | TOKENS
T5 = {
    "vocab_size": V,
    "d_model": H,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 2}
BART = {"vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
BART |= TOKENS | {"decoder_start_token_id": 2, "forced_eos_token_id": None}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"dim_model_base": 4}
MPT = {"vocab_size": V, "d_model": H, "n_layers": 2, "n_heads": 2, "logit_scale": 0.3}
MAMBA = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "state_size": 4}
GRIFFIN = GROUPED | {"logits_soft_cap": 1.5, "lru_width": H, "attention_window_size": 8}
GRIFFIN |= {"block_types": ["recurrent", "attention"]}

# name: (class of the config less "Config", class of the model, options), each with what it is here for
FAMILIES = {
    "llama": ("Llama", "LlamaForCausalLM", GROUPED),  # nothing special, untied
    "llama_tied": ("Llama", "LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", "MistralForCausalLM", GROUPED | {"sliding_window": 3}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", GEMMA | {"final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", GEMMA | {"final_logit_softcapping": 1.5}),
    "recurrent_gemma": ("RecurrentGemma", "RecurrentGemmaForCausalLM", GRIFFIN),  # a soft-cap by another name
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", SIZES | TOKENS),
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT2),  # learned positions, tied
    "gptj": ("GPTJ", "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),  # a bias
    "phi": ("Phi", "PhiForCausalLM", SIZES | TOKENS),  # a bias
    "cohere": ("Cohere", "CohereForCausalLM", GROUPED | {"logit_scale": 0.3}),
    "granite": ("Granite", "GraniteForCausalLM", GROUPED | {"logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAX", "HyperCLOVAXForCausalLM", GROUPED | {"logits_scaling": 3.0}),  # multiplies
    "mpt": ("Mpt", "MptForCausalLM", MPT),  # a scale that nothing reads
    "minicpm3": ("MiniCPM3", "MiniCPM3ForCausalLM", SIZES | TOKENS | MLA),  # divides x
    "mamba": ("Mamba", "MambaForCausalLM", MAMBA),  # casts x
    "t5": ("T5", "T5ForConditionalGeneration", T5),  # scales x by d_model^-½
    "t5_v1_1": ("T5", "T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),  # does not
    "umt5": ("UMT5", "UMT5ForConditionalGeneration", T5),  # scales, and has no name for it
    "bart": ("Bart", "BartForConditionalGeneration", BART),  # final_logits_bias
}
# Those with a feature that no other of them has, and the plain one
FAST = {"llama", "llama_tied", "recurrent_gemma", "gemma2", "phi", "cohere", "granite", "hyperclovax", "mpt"}
FAST |= {"minicpm3", "mamba", "t5", "t5_v1_1", "umt5", "bart"}
PACKABLE = ["llama", "mistral", "gemma2", "gpt_neox", "gpt2", "phi", "cohere"]


def full(*values: Any) -> Any:
    """A case of `make test-full` alone."""
    return pytest.param(*values, marks=pytest.mark.full)


EVERY = [name if name in FAST else full(name) for name in FAMILIES]


def build(name: str, untrained: bool = False, **more: object) -> PreTrainedModel:
    """A family's tiny model, its weights and biases so large that dropping one shows, unless untrained."""
    config_class, model_class, options = FAMILIES[name]
    config = getattr(transformers, config_class + "Config")(**(options | more))
    if name == "t5_v1_1":  # T5Config ties whatever it is told; checkpoints of this kind bring their own head
        config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    if untrained:
        return model
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in key and "A_log" not in key:
                parameter.normal_(0, 0.3)
            elif key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.5)
    return model


def padded(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three responses of 7, 5 and 3 tokens, right-padded; the prompt is the first 2; the last has 1 label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]])
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, V, (3, 6), generator=generator)
        labels = labels.masked_fill(torch.arange(6) >= torch.tensor([[6], [2], [4]]), IGNORE)
    else:
        labels = ids.masked_fill(~mask | (torch.arange(7) < 2), IGNORE)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def own_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the labels, in the labels' order, from the model's own logits."""
    logits, labels = model(**batch, use_cache=False).logits.double(), batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORE
    return logits.log_softmax(-1)[keep].gather(1, labels[keep][:, None])[:, 0]


def targets(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    return labels if model.config.is_encoder_decoder else hf.aligned_targets(labels, batch.get("cu_seqlens"))


@pytest.mark.parametrize("name", EVERY)
def test_log_probs_and_gradients_are_those_of_the_model_itself(name: str) -> None:
    model = build(name)
    batch = padded(model)
    target = targets(model, batch)
    scores = hf.token_scores(model, batch)
    assert scores.logp.shape == target.shape
    kept = scores.logp[target != IGNORE]
    torch.testing.assert_close(kept.double(), own_logps(model, batch), rtol=1e-5, atol=1e-5)
    assert (scores.logp[target == IGNORE] == 0).all()

    (-kept.mean()).backward()
    ours = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(**batch, use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert ours[key] is None, key
            continue
        size = parameter.grad.abs().max().item()
        assert ours[key] is not None, key
        torch.testing.assert_close(ours[key], parameter.grad, rtol=0, atol=max(1e-4 * size, 1e-7), msg=key)
    assert model.get_output_embeddings().weight.grad.abs().max() > 0


def test_nested_text_config() -> None:
    small = GEMMA | {"final_logit_softcapping": 1.5}
    config = transformers.T5GemmaConfig(encoder=small, decoder=small, **TOKENS, vocab_size=V)
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight, 0, 0.5)
    head = LMHead.from_model(model)
    assert head.softcap == 1.5
    batch = padded(model)
    kept = hf.token_scores(model, batch).logp[batch["labels"] != IGNORE]
    torch.testing.assert_close(kept.double(), own_logps(model, batch), rtol=1e-5, atol=1e-5)


def test_the_head_is_read_not_copied() -> None:
    for name in ("llama", "llama_tied", "t5", "t5_v1_1"):
        model = build(name)
        head = LMHead.from_model(model)
        assert head.weight is model.lm_head.weight
        assert (head.weight is model.get_input_embeddings().weight) == (name in ("llama_tied", "t5"))
    assert LMHead.from_model(build("phi")).bias is not None
    assert LMHead.from_model(build("t5")).scale == H**-0.5
    assert LMHead.from_model(build("t5_v1_1")).scale == 1
    assert LMHead.from_model(build("granite")).scale == pytest.approx(1 / 3)
    bart = build("bart")
    torch.testing.assert_close(LMHead.from_model(bart).bias, bart.final_logits_bias[0])


def test_no_logits_are_formed() -> None:
    """Past the checks, the head's module gives the model logits of no position."""
    for name in ("llama", "t5", "bart"):
        model = build(name)
        batch = padded(model)
        sizes: list[int] = []
        model.get_output_embeddings().register_forward_hook(lambda *call, sizes=sizes: sizes.append(call[2].numel()))
        hf.attach(model)
        sizes.clear()
        hf.token_scores(model, batch).logp.sum().backward()
        assert sizes == [0]


def test_loss_is_fused_loss_on_the_same_batch() -> None:
    model, reference = build("gpt2"), build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    batch = padded(model)
    batch = {name: torch.cat([value, value.roll(1, 0)])[:4] for name, value in batch.items()}  # two pairs
    with torch.no_grad():
        ref = hf.token_scores(reference, batch)
    target = hf.aligned_targets(batch["labels"])
    own, other = hf.token_scores(model, batch).logp.sum(1), ref.logp.sum(1)
    margin = 0.2 * ((own - other)[:2] - (own - other)[2:])
    expected = -nn.functional.logsigmoid(margin).mean()
    result, metrics = hf.loss(model, batch, "dpo", ref=ref, beta=0.2, return_metrics=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rewards/margins"].item() == pytest.approx(margin.mean().item(), rel=1e-4)

    reference.train()  # dropout must not reach the reference's scores
    by_model = hf.loss(model, batch, "dpo", ref=reference, beta=0.2)
    torch.testing.assert_close(by_model, expected, rtol=1e-5, atol=1e-6)
    by_model.backward()
    assert reference.training
    assert all(p.grad is None for p in reference.parameters())
    assert all(p.grad is not None for p in model.parameters())

    def mean_surprise(responses: Responses) -> Tensor:
        return -responses.logps(length_normalize=True)

    chosen = hf.loss(model, batch, mean_surprise)
    lengths = (target != IGNORE).sum(1)
    torch.testing.assert_close(chosen, -(own / lengths).mean(), rtol=1e-5, atol=1e-6)
    labelled = hf.loss(model, batch, label=torch.tensor([1, -1, 1, -1]), ref=ref)  # bnf by default
    assert labelled.dim() == 0


# --- groups


def grouped(model: PreTrainedModel, sizes: tuple[int, ...], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Groups of 4 of which the first `sizes[g]` take part; completions of `lengths` tokens in turn, prompts of 2."""
    generator = torch.Generator().manual_seed(3)
    count, width = 4 * len(sizes), 2 + max(lengths)
    n = torch.tensor([lengths[b % len(lengths)] if b % 4 < sizes[b // 4] else 0 for b in range(count)])
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, V, (count, max(lengths)), generator=generator)
        labels = labels.masked_fill(torch.arange(max(lengths)) >= n[:, None], IGNORE)
        ids, mask = torch.randint(3, V, (count, 5), generator=generator), torch.arange(5) < 2 + n[:, None]
    else:
        ids, mask = torch.randint(3, V, (count, width), generator=generator), torch.arange(width) < 2 + n[:, None]
        labels = ids.masked_fill(~mask | (torch.arange(width) < 2), IGNORE)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for key, expected in other[1].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(one[1][key], expected, rtol=0, atol=max(2e-4 * size, 1e-7), msg=key)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# unequal groups, among them one of 2 and, in the second case, one that nobody is left of
UNEQUAL = [((4, 2, 3), (5, 1, 3)), ((3, 0, 4), (2, 4, 1, 3))]


@pytest.mark.parametrize(
    ("sizes", "lengths", "m"),
    [
        (*UNEQUAL[0], 2),
        (*UNEQUAL[1], 1),
        *(full(*UNEQUAL[i], m) for i, m in ((0, 1), (0, 3), (1, 2), (1, 3))),
    ],
)
def test_drawing_before_the_model_changes_nothing(sizes: tuple[int, ...], lengths: tuple[int, ...], m: int) -> None:
    """mc_po on the drawn responses alone, padded and packed, against `fused_loss` on all hidden states."""
    model = build("llama")
    batch = grouped(model, sizes, lengths)
    packed = hf.pack(batch)
    with torch.no_grad():
        ref = hf.token_scores(build("gpt2"), batch)
    options = {"ref": ref, "group_size": 4, "beta": 0.5, "m": m}
    target = hf.aligned_targets(batch["labels"])
    whole = fused_loss(
        hf.hidden_states(model, batch["input_ids"], batch["attention_mask"]), hf.read_head(model), target,
        objective="mc_po", generator=seeded(), **options,
    )  # fmt: skip
    expected = (whole, gradients(model, whole))
    assert expected[0] > 0
    padded_loss = hf.loss(model, batch, "mc_po", generator=seeded(), **options)
    assert_same((padded_loss, gradients(model, padded_loss)), expected)
    kept = batch["attention_mask"].bool()
    options["ref"] = TokenScores(*(score[kept] for score in ref[:3]))
    packed_loss = hf.loss(model, packed, "mc_po", generator=seeded(), **options)
    assert_same((packed_loss, gradients(model, packed_loss)), expected)


def test_references_of_every_kind_are_drawn_along() -> None:
    model, reference = build("llama"), build("gpt2")
    batch = grouped(model, (4, 2, 3), (5, 1, 3))
    with torch.no_grad():
        scores = hf.token_scores(reference, batch)
        hidden = hf.hidden_states(reference, batch["input_ids"], batch["attention_mask"])
    results = []
    for ref in (scores, scores.logp, scores.logp.sum(1), reference, (hidden, hf.read_head(reference))):
        loss, metrics = hf.loss(
            model, batch, "mc_po", ref=ref, group_size=4, m=2, beta=0.5, generator=seeded(), return_metrics=True
        )
        results.append((loss, gradients(model, loss)))
        assert metrics["rewards/chosen"].isfinite()
    for result in results[1:]:
        assert_same(result, results[0])
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_only_the_drawn_responses_are_differentiated(packing: bool) -> None:
    model = build("llama").train()
    batch = grouped(model, (4, 4), (3,))
    given = hf.pack(batch) if packing else batch
    hf.token_scores(model, given)  # with its checks
    seen: list[tuple[bool, int, bool]] = []

    def count(module: nn.Module, args: object, keywords: dict[str, Tensor], out: object) -> None:
        ids = keywords["input_ids"]
        seen.append((torch.is_grad_enabled(), ids.numel() // 5, module.training))

    model.model.register_forward_hook(count, with_kwargs=True)
    keywords = {"ref": torch.zeros(8), "group_size": 4}
    for m, rows in ((1, 4), (2, 6), (3, 8)):
        seen.clear()
        hf.loss(model, given, "mc_po", m=m, generator=seeded(), **keywords).backward()
        assert seen == [(False, 8, False), (True, rows, True)]
    seen.clear()
    hf.loss(model, given, "rnce", **keywords)
    assert seen == [(True, 8, True)]
    assert set(given) == set(hf.pack(batch) if packing else batch)  # what was handed in is as it was


def test_samplers_through_the_model() -> None:
    """`max` and `min` are told apart by the model's own scores; without a choice to make all samplers agree."""
    model = build("llama")
    batch = grouped(model, (4, 4), (3, 4))
    own = hf.token_scores(model, batch).logp.double().sum(1).view(2, 4)

    def loss(sampler: str, m: int) -> float:
        options = {"ref": torch.zeros(8), "group_size": 4, "beta": 0.3, "sampler": sampler, "m": m}
        return hf.loss(model, batch, "mc_po", generator=seeded(), **options).item()

    for sampler, pick in (("max", own[:, 1:].max(1).values), ("min", own[:, 1:].min(1).values)):
        assert loss(sampler, 1) == pytest.approx(-nn.functional.logsigmoid(0.3 * (own[:, 0] - pick)).mean().item())
    every = -(0.3 * own).log_softmax(1)[:, 0].mean().item()
    assert [loss(sampler, 3) for sampler in ("mc", "max", "min", "random")] == pytest.approx([every] * 4, rel=1e-5)


FEWER = [((2, 2), 3), ((1, 1), 1), *(full(*case) for case in (((2, 2), 2), ((0, 0), 1), ((0, 0), 3)))]


@pytest.mark.parametrize(("sizes", "m"), FEWER)
def test_a_batch_with_fewer_to_draw_than_asked(sizes: tuple[int, ...], m: int) -> None:
    """What is there is taken; where there is nothing to compare, the loss is 0 and so is its gradient."""
    model = build("llama")
    batch = grouped(model, sizes, (3, 4))
    options = {"ref": torch.zeros(8), "group_size": 4}
    expected = hf.loss(model, batch, "rnce", **options)
    assert (expected == 0) == (max(sizes) < 2)
    for given in (batch, hf.pack(batch)):
        loss = hf.loss(model, given, "mc_po", m=m, **options)
        assert_same(
            (loss, gradients(model, loss)), (expected, gradients(model, hf.loss(model, batch, "rnce", **options)))
        )


def test_what_groups_refuse() -> None:
    model = build("llama")
    batch = grouped(model, (4, 4), (3,))
    ref = torch.zeros(8)
    with pytest.raises(
        ValueError, match="group_size: expected the responses per group, 2 or more, for mc_po, got None"
    ):
        hf.loss(model, batch, "mc_po", ref=ref)
    with pytest.raises(ValueError, match="target: expected groups of 3 responses, got 8 responses"):
        hf.loss(model, batch, "mc_po", ref=ref, group_size=3)
    with pytest.raises(ValueError, match="m: expected a whole number from 1 to 3, the candidates of a group, got 4"):
        hf.loss(model, batch, "mc_po", ref=ref, group_size=4, m=4)
    with pytest.raises(ValueError, match="ref: expected the reference's scores for mc_po, got None"):
        hf.loss(model, batch, "mc_po", group_size=4)
    with pytest.raises(ValueError, match="expected sampler to be .*, got 'best'"):
        hf.loss(model, batch, "mc_po", ref=ref, group_size=4, sampler="best")
    with pytest.raises(ValueError, match=r"rewards: expected shape \[G, K\] for 8 responses, got \[3, 4\]"):
        hf.loss(model, batch, "swepo", ref=ref, rewards=torch.zeros(3, 4))


@pytest.mark.parametrize("objective", ["swepo", "mc_po"])
def test_groups_of_an_encoder_decoder(objective: str) -> None:
    model = build("t5")
    batch = grouped(model, (4, 2, 3), (5, 1, 3))
    rewards = torch.tensor([[3.0, 2, 1, 0], [1, 0, 9, 9], [2, 0, 1, -9]]) / 10
    own = hf.token_scores(model, batch).logp.double().sum(1).view(3, 4)
    ref = own.detach().roll(1, 1) - 0.1
    present = (batch["labels"] != IGNORE).any(1).view(3, 4)
    scores = torch.where(present, 0.2 * (own - ref), -torch.inf)
    if objective == "swepo":
        kept = torch.where(present, rewards, 0.0).double()
        d = kept - kept.sum(1, keepdim=True) / present.sum(1, keepdim=True)
        d = torch.where(present, d, 0.0)
        wanted = (scores + d.square()).logsumexp(1) - (scores + d.square()).masked_fill(d <= 0, -torch.inf).logsumexp(1)
        given = {"rewards": rewards}
    else:  # as many as there are, so that nothing is left to chance
        wanted, given = scores.logsumexp(1) - scores[:, 0], {"group_size": 4, "m": 3, "generator": seeded()}
    expected = (wanted.mean().float(), gradients(model, wanted.mean()))
    loss = hf.loss(model, batch, objective, ref=ref.reshape(-1).float(), beta=0.2, **given)
    assert_same((loss, gradients(model, loss)), expected)


# --- the check


@pytest.mark.parametrize("name", EVERY)
def test_check_head_passes_and_leaves_no_trace(name: str) -> None:
    model = build(name).train()
    frozen = model.get_input_embeddings().eval()
    flags = {key: module.training for key, module in model.named_modules()}
    grads: list[bool] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    hf.check_head(model)
    handle.remove()
    assert set(grads) == {False}
    assert flags == {key: module.training for key, module in model.named_modules()}
    assert not frozen.training
    assert not head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "forgotten", "options"),
    [
        ("cohere", "_MULTIPLIERS", {}),
        ("granite", "_DIVISORS", {}),
        ("gemma2", "_SOFTCAPS", {}),
        # logits far below the cap: only the scaled-up half of the check can see this one
        ("gemma2", "_SOFTCAPS", {"final_logit_softcapping": 30.0, "untrained": True, "initializer_range": 2e-3}),
    ],
)
def test_a_forgotten_soft_cap_or_scale_is_caught(
    name: str, forgotten: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, **options)
    monkeypatch.setattr("rgpb.head." + forgotten, ())
    with pytest.raises(ValueError, match=rf"family {name}\) does more .* differ by up to [\d.e-]+"):
        hf.token_scores(model, padded(model))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_an_unknown_head_is_caught() -> None:
    class Louder(transformers.LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.001
            return out

    config = transformers.LlamaConfig(**GROUPED)
    with pytest.raises(ValueError, match=r"Louder \(family llama\) does more"):
        hf.check_head(Louder(config))
    bert = transformers.BertConfig(**SIZES, is_decoder=True)  # a transform between the two belongs to the hidden states
    hf.check_head(transformers.BertLMHeadModel(bert))


def test_heads_that_are_not_plainly_linear_are_refused() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

    class Quantised(nn.Linear):
        pass

    heads: list[tuple[nn.Module | None, str]] = [
        (Adapted(nn.Linear(H, V)), r"got \S+\.Adapted"),
        (Quantised(H, V), r"got \S+\.Quantised"),
        (nn.Linear(H, V, device="meta"), "on meta"),
        (None, r"got builtins\.NoneType"),
    ]
    for head, found in heads:
        model = build("llama")
        model.lm_head = head
        with pytest.raises(ValueError, match=f"head of LlamaForCausalLM.*{found}"):
            LMHead.from_model(model)
    with pytest.raises(ValueError, match=r"head of LlamaModel.*got builtins\.NoneType"):
        LMHead.from_model(build("llama").model)
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel, wrapped or not, got Sequential"):
        hf.check_head(nn.Sequential(build("llama")))


# --- targets and packing


def test_aligned_targets() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [IGNORE, 1, 2, IGNORE]])
    assert hf.aligned_targets(labels).tolist() == [[6, 7, 8, IGNORE], [1, 2, IGNORE, IGNORE]]
    row = torch.tensor([[1, 2, 3, 4, 5, 6]])
    # responses of 0, 2, 1, 0, 3 and 0 tokens
    bounds = torch.tensor([0, 0, 2, 3, 3, 6, 6], dtype=torch.int32)
    assert hf.aligned_targets(row, bounds).tolist() == [[2, IGNORE, IGNORE, 5, 6, IGNORE]]
    assert hf.aligned_targets(row, torch.tensor([0, 6]), ignore_index=-1).tolist() == [[2, 3, 4, 5, 6, -1]]
    with pytest.raises(ValueError, match=r"labels: expected \[B, T\].*\(6,\)"):
        hf.aligned_targets(row[0])
    for wrong in ([0, 5], [1, 6], [0, 4, 3, 6], [0]):
        with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to N = 6"):
            hf.aligned_targets(row, torch.tensor(wrong))
    with pytest.raises(ValueError, match="cu_seqlens: expected int32 or int64"):
        hf.aligned_targets(labels, torch.tensor([0, 4, 8]))


def test_pack() -> None:
    batch = {
        "input_ids": torch.tensor([[9, 8, 0], [0, 7, 6], [5, 0, 0]]),  # padded right, left and right
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]),
        "labels": torch.tensor([[IGNORE, 8, IGNORE], [IGNORE, 7, 6], [5, IGNORE, IGNORE]]),
        "chosen": torch.tensor([True, False, True]),
    }
    packed = hf.pack(batch)
    assert set(packed) == {"input_ids", "labels", "chosen", "cu_seqlens", "position_ids"}
    assert packed["input_ids"].tolist() == [[9, 8, 7, 6, 5]]
    assert packed["labels"].tolist() == [[IGNORE, 8, 7, 6, 5]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 0]]
    assert packed["cu_seqlens"].tolist() == [0, 2, 4, 5]
    assert packed["cu_seqlens"].dtype == torch.int32
    with pytest.raises(ValueError, match="batch: expected input_ids and attention_mask"):
        hf.pack({"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        case if case in (("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager")) else full(*case)
        for case in itertools.product(PACKABLE, ("sdpa", "eager"))
    ],
)
def test_packed_equals_padded(name: str, attention: str) -> None:
    model = build(name, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    batch = padded(model)
    packed = hf.pack(batch)
    if name == "llama":
        del packed["position_ids"]  # filled in
    one, other = hf.token_scores(model, batch), hf.token_scores(model, packed)
    assert other.logp.shape == (15,)
    kept, kept_packed = targets(model, batch) != IGNORE, targets(model, packed)[0] != IGNORE
    assert kept.sum() == 4 + 2 + 0 + 1 + 2  # 5, 3 and 1 labels: none is lost or gained at a border
    torch.testing.assert_close(other.logp[kept_packed], one.logp[kept], rtol=1e-5, atol=1e-5)
    label = torch.tensor([True, False, True])
    losses = [
        hf.loss(model, x, "bnf", label=label, ref=s.logp.detach() + 0.1) for x, s in ((batch, one), (packed, other))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", full("gemma2")])
def test_left_padding_equals_right_padding_or_is_refused(name: str) -> None:
    """By models that count positions from the row's start; with position ids also by these."""
    model = build(name, **({"attn_pdrop": 0.3, "resid_pdrop": 0.3} if name == "gpt2" else {}))
    batch = padded(model)
    lengths = batch["attention_mask"].sum(1).tolist()
    left = {key: torch.stack([x.roll(7 - n) for x, n in zip(rows, lengths)]) for key, rows in batch.items()}
    given = left | {"position_ids": (left["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    expected = hf.token_scores(model, batch).logp.sum(1)
    torch.testing.assert_close(hf.token_scores(model, given).logp.sum(1), expected, rtol=1e-5, atol=1e-5)
    if name == "gpt2":
        with pytest.raises(
            ValueError, match="attention_mask: expected padding on the right, or position_ids, since GPT2"
        ):
            hf.token_scores(model, left)
    else:
        torch.testing.assert_close(hf.token_scores(model, left).logp.sum(1), expected, rtol=1e-5, atol=1e-5)


def test_padding_is_tried_in_the_precision_of_a_forward_that_brings_its_own() -> None:
    """accelerate wraps a model's forward in autocast; its rounding is no sign of what padding or neighbours do."""
    model = build("llama", initializer_range=0.2)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    batch = padded(model)
    lengths = batch["attention_mask"].sum(1).tolist()
    left = {key: torch.stack([x.roll(7 - n) for x, n in zip(rows, lengths)]) for key, rows in batch.items()}
    expected = hf.token_scores(model, batch).logp.sum(1)
    for given in (left, hf.pack(batch)):
        scores = hf.token_scores(model, given).logp
        found = scores.sum(1) if given is left else torch.stack([part.sum() for part in scores.split(lengths)])
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_flattening_collator_feeds_packed_batches() -> None:
    model = build("llama")
    batch = padded(model)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [{key: batch[key][i, :n].tolist() for key in ("input_ids", "labels")} for i, n in enumerate(lengths)]
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(rows)
    kept = targets(model, batch) != IGNORE
    scores = hf.token_scores(model, flat)
    expected = hf.token_scores(model, batch).logp[kept]
    torch.testing.assert_close(scores.logp[scores.logp != 0], expected, rtol=1e-5, atol=1e-5)


def test_what_would_mix_packed_responses_is_refused() -> None:
    llama = build("llama")
    packed = hf.pack(padded(llama))
    with pytest.raises(ValueError, match="attention_mask: expected none in a packed batch"):
        hf.token_scores(llama, packed | {"attention_mask": torch.ones(1, 15, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"position_ids: expected .* restarting from 0"):
        hf.token_scores(llama, packed | {"position_ids": torch.arange(15)[None]})
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to N = 15"):
        hf.token_scores(llama, packed | {"cu_seqlens": torch.tensor([0, 7, 12])})
    for name in ("mamba", "recurrent_gemma"):  # a state that runs on through the row
        with pytest.raises(ValueError, match=rf"family {name}\).*does not keep packed responses apart"):
            hf.token_scores(build(name), packed)
    t5 = build("t5")
    with pytest.raises(ValueError, match="cu_seqlens: expected a causal LM"):
        hf.token_scores(t5, padded(t5) | {"cu_seqlens": torch.tensor([0, 21])})
    small = GROUPED | {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}
    for limits in ({"attention_chunk_size": 14}, {"attention_chunk_size": 15, "floor_scale": 15}):
        chunked = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**small, **limits))
        with pytest.raises(ValueError, match="rows of at most 14 tokens, .* attends within chunks of the packed row"):
            hf.token_scores(chunked, packed)
    whole = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**small, attention_chunk_size=15)).eval()
    batch = padded(whole)
    kept, kept_packed = targets(whole, batch) != IGNORE, targets(whole, packed)[0] != IGNORE
    scores = hf.token_scores(whole, packed).logp[kept_packed]
    torch.testing.assert_close(scores, hf.token_scores(whole, batch).logp[kept], rtol=1e-5, atol=1e-5)


def test_a_faint_leak_and_a_wrong_position_are_seen() -> None:
    """Each is out of reach of the other's comparison: 1e-4 is near rounding, and a position leaks nothing."""

    def smear(_module: nn.Module, _args: object, out: transformers.modeling_outputs.BaseModelOutput) -> None:
        out.last_hidden_state = out.last_hidden_state + 1e-4 * out.last_hidden_state.cumsum(1)

    leaky, displaced = build("llama"), build("gpt2")
    leaky.model.register_forward_hook(smear)
    displaced.transformer.wpe.register_forward_pre_hook(lambda _, x: torch.arange(x[0].shape[-1])[None])
    for model in (leaky, displaced):
        hf.token_scores(model, padded(model))
        with pytest.raises(ValueError, match="does not keep packed responses apart"):
            hf.token_scores(model, hf.pack(padded(model)))


# --- inputs


def test_batches_that_do_not_fit_are_refused() -> None:
    llama, t5, bart = build("llama"), build("t5"), build("bart")
    batch = padded(llama)
    with pytest.raises(ValueError, match=r"batch: expected input_ids .* got \{'input_ids': \[3, 7\]\}"):
        hf.token_scores(llama, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"labels: expected \(3, 7\).*got \(3, 6\)"):
        hf.token_scores(llama, batch | {"labels": batch["labels"][:, 1:]})
    for model in (t5, bart):
        with pytest.raises(ValueError, match="decoder_input_ids: expected them, or labels"):
            hf.hidden_states(model, batch["input_ids"])
    bare = type("Bare", (type(bart),), {"prepare_decoder_input_ids_from_labels": None})
    config = copy.deepcopy(bart.config)
    config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"Bare .*can't shift labels"):
        hf.hidden_states(bare(config), batch["input_ids"], labels=batch["labels"])


def test_labels_that_a_forward_shifts_itself() -> None:
    """As its module does, where that is what the forward does."""

    class Bare(transformers.BartForConditionalGeneration):
        prepare_decoder_input_ids_from_labels = None

    class Mirrored(Bare):
        def forward(self, labels: Tensor | None = None, **given: Any) -> Any:
            return super().forward(labels=None if labels is None else labels.flip(1), **given)

    model = build("bart")
    batch = padded(model)
    bare, mirrored = (kind(model.config).eval() for kind in (Bare, Mirrored))
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(hf.token_scores(bare, batch).logp, hf.token_scores(model, batch).logp)
    with pytest.raises(ValueError, match=r"Mirrored .* shifts labels in a way of its own"):
        hf.token_scores(mirrored, batch)
    with pytest.raises(ValueError, match=r"Mirrored .* shifts labels in a way of its own"):
        hf.attach(Mirrored(model.config))


def test_decoder_inputs_given_or_shifted() -> None:
    for name in ("t5", "bart"):
        model = build(name)
        batch = padded(model)
        ids = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        mask = (torch.arange(6) < 5).long().expand(3, 6)
        given = batch | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        own = own_logps(model, given)
        kept = hf.token_scores(model, given).logp[batch["labels"] != IGNORE]
        torch.testing.assert_close(kept.double(), own, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_and_autocast() -> None:
    """Mamba hands its head float32 hidden states when the head holds bfloat16, and casts them there."""
    for name in ("llama", "mamba"):
        model = build(name)
        batch = padded(model)
        exact = own_logps(model, batch)
        kept = targets(model, batch) != IGNORE
        with torch.autocast("cpu", torch.bfloat16):
            mixed = hf.token_scores(model, batch).logp[kept]
        low = build(name).bfloat16()
        assert hf.hidden_states(low, batch["input_ids"]).dtype == torch.bfloat16
        rounded = hf.token_scores(low, batch).logp[kept]
        with torch.autocast("cpu", torch.bfloat16):
            own_mixed = own_logps(model, batch)
        # twice what the model's own logits lose to the same rounding, or a little where that is luckily small
        for ours, own in ((mixed, own_mixed), (rounded, own_logps(low, batch))):
            assert (ours - exact).abs().max() <= 2 * (own - exact).abs().max() + 0.02
            assert ours.dtype == torch.float32


def test_adapters_inside_the_model_take_part() -> None:
    model = build("llama")
    plain = hf.token_scores(model, padded(model)).logp.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    scores = hf.token_scores(adapted, padded(model)).logp
    assert (scores - plain).abs().max() > 1e-4
    scores.sum().backward()
    trained = [key for key, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert {key.split(".")[-3] for key in trained} == {"lora_A", "lora_B"}
    with torch.no_grad():
        base = hf.loss(adapted, padded(model), "kto", label=torch.tensor([True, False, True]), ref="base")
        same = hf.loss(adapted, padded(model), "kto", label=torch.tensor([True, False, True]), ref=plain)
    torch.testing.assert_close(base, same)
    moved = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    with pytest.raises(ValueError, match="ref: expected adapters without which .* got init_lora_weights='pissa'"):
        hf.loss(moved, padded(model), "kto", label=torch.tensor([True, False, True]), ref="base")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt learning"):
        hf.token_scores(peft.get_peft_model(build("llama"), prompts), padded(model))


def test_adapters_that_act_in_the_forward_of_peft_alone() -> None:
    """aLoRA's offsets and `adapter_names` are set there. The logits of the PEFT model itself decide."""
    model = build("llama")
    batch = padded(model)
    token = int(batch["input_ids"][0, 3])
    batch["input_ids"][:, 2] = token
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "k_proj"]}
    for more in ({"alora_invocation_tokens": [token]}, {}):
        adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(**options, **more)).eval()
        names: dict[str, Any] = {}
        if not more:
            adapted.add_adapter("two", peft.LoraConfig(**options))
            names = {"adapter_names": ["default", "__base__", "two"]}
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0, 0.5)
            own = own_logps(adapted, batch | names)
            scores = hf.token_scores(adapted, batch | names).logp
        torch.testing.assert_close(scores[targets(model, batch) != IGNORE], own.float(), rtol=0, atol=2e-5)


def test_unknown_keys_of_a_batch_are_refused() -> None:
    model = build("llama")
    batch = padded(model)
    batch["attention_masc"] = batch.pop("attention_mask")
    with pytest.raises(ValueError, match=r"got 'attention_masc'; did you mean 'attention_mask'\?"):
        hf.token_scores(model, batch)


def test_the_router_loss_is_added_as_the_model_does() -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, **more)).eval()
    batch = padded(model)
    own = model(**batch)
    loss = hf.loss(model, batch, {"mle": 1.0}, length_normalize=False)
    tokens = (targets(model, batch) != IGNORE).sum()
    ours = (loss - 0.1 * own.aux_loss) * len(batch["labels"]) / tokens + 0.1 * own.aux_loss
    torch.testing.assert_close(ours, own.loss)
    loss.backward()
    gate = next(parameter for key, parameter in model.named_parameters() if "gate.weight" in key)
    assert gate.grad is not None
    assert gate.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"reduction: expected 'mean'.*got 'none'"):
        hf.loss(model, batch, "mle", reduction="none")


def test_adalora_adds_its_own_term() -> None:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_r": 3, "target_r": 2}
    model = build("llama")
    adapted = peft.get_peft_model(model, peft.AdaLoraConfig(**options, total_step=10, orth_reg_weight=0.7))
    batch = padded(model)
    own = adapted(**batch).loss
    plain = model(**batch).loss
    assert own - plain > 0.01
    tokens = (targets(model, batch) != IGNORE).sum()
    loss = hf.loss(adapted, batch, "mle", length_normalize=False)
    without = hf.loss(model, batch, "mle", length_normalize=False)
    torch.testing.assert_close(without * len(batch["labels"]) / tokens, plain)
    torch.testing.assert_close(loss - without, own - plain)


def test_what_changes_later_is_checked_again() -> None:
    model = build("llama")
    batch = padded(model)
    before = hf.token_scores(model, batch).logp
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    scores = hf.token_scores(model, batch).logp
    torch.testing.assert_close(scores[targets(model, batch) != IGNORE], own_logps(model, batch).float())
    hook.remove()
    hook = model.lm_head.register_forward_hook(lambda _, args, z: z * 1.5)  # changes logits, which nobody would see
    with pytest.raises(ValueError, match="does more"):
        hf.token_scores(model, batch)
    hook.remove()
    torch.testing.assert_close(hf.token_scores(model, batch).logp, before)
    model.config.final_logit_softcapping = 0.5  # read by nothing in Llama
    torch.testing.assert_close(hf.token_scores(model, batch).logp, before)


def test_copies_and_pickles_of_an_attached_model() -> None:
    model = build("llama")
    batch = padded(model)
    hf.attach(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (model, copied, loaded):
        scores = hf.token_scores(other, batch).logp
        torch.testing.assert_close(scores[targets(other, batch) != IGNORE], own_logps(other, batch).float())
    assert inspect.signature(model.forward) == inspect.signature(build("llama").forward)


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}


def paligemma() -> PreTrainedModel:
    capped = transformers.Gemma2Config(**GROUPED | {"num_key_value_heads": 2}, head_dim=8, final_logit_softcapping=1.5)
    vision = transformers.SiglipVisionConfig(**VISION)
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(text_config=capped, vision_config=vision, projection_dim=H)
    )


def test_multimodal_models_that_ignore_their_text_model_s_scaling() -> None:
    scaled = transformers.GraniteConfig(**GROUPED | {"num_key_value_heads": 2}, logits_scaling=8.0)
    llava = transformers.LlavaConfig(text_config=scaled, vision_config=transformers.SiglipVisionConfig(**VISION))
    for model in (paligemma(), transformers.LlavaForConditionalGeneration(llava)):
        with torch.no_grad():
            model.eval().get_output_embeddings().weight.normal_(0, 0.5)
        batch = padded(model)
        if "token_type_ids" in inspect.signature(model.forward).parameters:
            with pytest.raises(ValueError, match=r"attends to earlier tokens alone, .* token_type_ids in the batch"):
                hf.token_scores(model, batch)
            batch["token_type_ids"] = (torch.arange(7) > 1).long().expand(3, 7)
        ours = hf.token_scores(model, batch).logp[targets(model, batch) != IGNORE]
        torch.testing.assert_close(ours, own_logps(model, batch).float())
        with pytest.raises(ValueError, match=r"which may ignore them inside another; rgpb.hf.read_head\(model\)"):
            LMHead.from_model(model)


def test_a_model_that_looks_ahead_where_it_is_given_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PaliGemma does in transformers 4, whatever the token types."""
    model = paligemma()
    batch = padded(model) | {"token_type_ids": torch.ones(3, 7, dtype=torch.long)}
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"transformers: expected 5 or later for PaliGemmaFor.*, got 4\.57\.6"):
        hf.token_scores(model, batch)


def test_forwards_that_are_wrapped_after_attaching() -> None:
    """Of the model and of its head, by what shows nothing of what it wraps."""
    model = build("llama")
    batch = padded(model)
    before, own = hf.token_scores(model, batch).logp, own_logps(model, batch)
    for module in (model, model.lm_head):
        forward = module.forward
        module.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
    torch.testing.assert_close(hf.token_scores(model, batch).logp, before)
    torch.testing.assert_close(own_logps(model, batch), own)


def test_models_that_share_the_module_of_their_head() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    other.lm_head = model.lm_head
    batch = padded(model)
    for one in (model, other, model):
        scores = hf.token_scores(one, batch).logp
        torch.testing.assert_close(scores[targets(one, batch) != IGNORE], own_logps(one, batch).float())


def test_a_copied_head_is_the_head_alone() -> None:
    model = build("llama")
    hf.attach(model)
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(model.lm_head, file)
    torch.save(build("llama").lm_head, plain)
    assert file.tell() < 2 * plain.tell()
    assert sum(p.numel() for p in copy.deepcopy(model.lm_head).parameters()) == V * H


def test_hooks_of_the_whole_model_are_seen() -> None:
    model = build("llama")
    hf.token_scores(model, padded(model))
    model.register_forward_hook(lambda _, args, output: output)
    hf.token_scores(model, padded(model))  # changes nothing

    def louder(_: nn.Module, args: object, output: Any) -> Any:
        if output.logits is not None and output.logits.numel():
            output.logits = output.logits * 2
        return output

    model.register_forward_hook(louder)
    with pytest.raises(ValueError, match="does more"):
        hf.token_scores(model, padded(model))


def test_frozen_adapters_stay_frozen() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            parameter.requires_grad_(False)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    batch = padded(model.get_base_model())
    hf.loss(model, batch, "kto", label=torch.tensor([True, False, True]), ref="base").backward()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trained)


def test_a_forward_that_hands_everything_on() -> None:
    class Mine(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Mine(transformers.LlamaConfig(**GROUPED))
    hf.token_scores(model, padded(model))


def test_scores_made_in_inference_mode() -> None:
    model = build("llama")
    batch = padded(model)
    with torch.inference_mode():
        ref = hf.token_scores(model, batch)
    hf.loss(model, batch, "kto", label=torch.tensor([True, False, True]), ref=ref).backward()


def test_a_reference_that_is_the_policy_of_every_step() -> None:
    """A warning, once, in the second step; none where the reference was scored before training."""
    model = build("llama")
    batch = {key: value.repeat_interleave(2, 0)[:4] for key, value in padded(model).items()}
    for inside in (False, True):
        optimizer, said = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(4):
            if inside or not step:
                with torch.no_grad():
                    ref = hf.token_scores(model, batch)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                hf.loss(model, batch, "dpo", ref=ref).backward()
            said.append([str(w.message) for w in caught])
            optimizer.step()
            optimizer.zero_grad()
        assert [len(messages) for messages in said] == ([1, 0, 0, 0] if inside else [0, 0, 0, 0]), said
        if inside:
            assert said[0][0].startswith("ref: these are once more the scores of the model that is trained")


def test_a_model_is_not_its_own_reference() -> None:
    model = build("llama")
    batch = {key: value.repeat_interleave(2, 0)[:4] for key, value in padded(model).items()}
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    cases = [
        (model, model),
        (model, torch.compile(model, backend="eager")),
        (adapted, adapted.get_base_model()),
        (adapted, adapted),
    ]
    for trained, ref in cases:
        with pytest.raises(ValueError, match="ref: expected a model of its own, got the one that is trained"):
            hf.loss(trained, batch, "dpo", ref=ref)
    hf.loss(model, batch, "dpo", ref=copy.deepcopy(model))


def test_a_flattened_row_without_bounds() -> None:
    """As DataCollatorWithFlattening makes it: the restarts of the positions are the bounds."""
    model = build("llama")
    batch = hf.pack(padded(model))
    expected = hf.loss(model, batch, "mle")
    bare = {key: value for key, value in batch.items() if key != "cu_seqlens"}
    torch.testing.assert_close(hf.loss(model, bare, "mle"), expected)
    with pytest.raises(ValueError, match="expected no logits_to_keep"):
        hf.token_scores(model, padded(model) | {"logits_to_keep": 3})


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile itself reads
@pytest.mark.parametrize("whole", [True, full(False)])
def test_compiled_models_run_compiled(whole: bool) -> None:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any, graphs: list[int] = graphs) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model = build("llama")
    expected = hf.token_scores(model, padded(model))
    compiled: Any = model
    if whole:
        compiled = torch.compile(model, backend=count)
    else:
        model.compile(backend=count)
    for _ in range(3):
        scores = hf.token_scores(compiled, padded(model))
    torch.testing.assert_close(scores.logp, expected.logp)
    assert max(graphs) > 50, graphs  # the layers, not scraps of them
    assert len(graphs) <= 6, graphs  # and once


def test_documented_example() -> None:
    assert doctest.testmod(hf).failed == 0
    assert doctest.testmod(hf).attempted > 0
