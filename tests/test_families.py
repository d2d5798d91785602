"""Every class of transformers that can be made tiny, against its own logits and its own gradients.

Right, or refused by name (`REFUSED`), or it can't be made here (`CANNOT`): a class that is in no table has to be right.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import V
from torch import Tensor
from transformers import PreTrainedModel

import rgpb.hf as hf

IGNORE = -100


def _words(text: str) -> list[str]:
    return text.split()


def _named(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(_words(names), reason)


REFUSED = {
    # images, sound or boxes with every call
    **_named(
        "runs on input_ids.* alone, which its check gives it",
        "Blip2ForConditionalGeneration CanaryForConditionalGeneration CohereAsrForConditionalGeneration "
        "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM IdeficsForVisionText2Text "
        "InstructBlipForConditionalGeneration InstructBlipVideoForConditionalGeneration "
        "Kosmos2ForConditionalGeneration MoonshineForConditionalGeneration MoonshineStreamingForConditionalGeneration "
        "Pix2StructForConditionalGeneration SeamlessM4TForSpeechToText SeamlessM4Tv2ForSpeechToText "
        "Speech2TextForConditionalGeneration SpeechEncoderDecoderModel SpeechT5ForSpeechToText "
        "UdopForConditionalGeneration VisionEncoderDecoderModel VoxtralRealtimeForConditionalGeneration "
        "WhisperForConditionalGeneration",
    ),
    **_named(
        "expected an LM head, got none",
        "BlipForConditionalGeneration DiaForConditionalGeneration PI0ForConditionalGeneration",
    ),
    # several streams of tokens, or none
    **_named(
        "expected one embedding of tokens",
        "KyutaiSpeechToTextForConditionalGeneration MusicgenForCausalLM MusicgenMelodyForCausalLM "
        "PPFormulaNetForConditionalGeneration",
    ),
    # causal by name
    **_named(
        "attends to earlier tokens alone",
        "BigBirdForCausalLM CpmAntForCausalLM DiffusionGemmaForBlockDiffusion DogeForCausalLM MegatronBertForCausalLM "
        "RemBertForCausalLM RoFormerForCausalLM XLNetLMHeadModel",
    ),
    "FSMTForConditionalGeneration": "expected a plain nn.Linear as head",  # an embedding
    **_named(
        "expected logits", "ProphetNetForCausalLM ProphetNetForConditionalGeneration"
    ),  # of several tokens at once
}
CANNOT = {
    **_named(
        "its vision tower is the library timm's",
        "FastVlmForConditionalGeneration Gemma3nForConditionalGeneration PerceptionLMForConditionalGeneration",
    ),
    "InklingForConditionalGeneration": "it asks for scipy",
}
# Each with a feature that no other of them has, and no family of tests/test_hf.py
COVERING = {
    "AyaVisionForConditionalGeneration",  # a scale in the text model's config, which it ignores
    "BlenderbotForConditionalGeneration",  # shifts labels itself; a bias that is a buffer
    "EncoderDecoderModel",  # masks the decoder's padding where it shifts labels
    "FalconH1ForCausalLM",  # a scale by a name of its own
    "Florence2ForConditionalGeneration",  # shifts labels with ids of its text model
    "Gemma4ForConditionalGeneration",  # a cap in the text model's config, which it applies
    "GptOssForCausalLM",  # a mixture of experts
    "InklingForCausalLM",  # a divisor by a name of its own, of the head's input
    "Llama4ForConditionalGeneration",  # a whole causal LM inside
    "M2M100ForConditionalGeneration",  # shifts labels itself
    "MBartForConditionalGeneration",  # begins with the last label
    "MllamaForConditionalGeneration",  # rows of the embedding that the head hasn't
    "MuseGlimmerForConditionalGeneration",  # cap and multiplier
    "PaliGemmaForConditionalGeneration",  # looks ahead in the prompt, as token types say
    "ReformerModelWithLMHead",  # a head of 2 H columns; gradients in training alone
    "RobertaForCausalLM",  # a head inside a head, with two names for one bias
    "RwkvForCausalLM",  # no attention
    "SeamlessM4TForTextToText",  # shifts labels itself, although a part of its module has a method
    "XLMWithLMHeadModel",  # a head inside an adaptive one
    "xLSTMForCausalLM",  # takes no mask
}
# Models that take any text model
OPEN = _words(
    "AudioFlamingo3 AyaVision Cohere2Vision Cosmos3Omni DeepseekVL DeepseekVLHybrid Exaone4_5_ FunAsrNano Glm46V "
    "GlmAsr GotOcr2 GraniteSpeech GraniteSpeechPlus Idefics3 InternVL Janus Kimi_K25 Lfm2Vl LightOnOcr Llava LlavaNext "
    "LlavaNextVideo LlavaOnevision MiniCPMV4_6 Mistral3 MusicFlamingo Ovis2 QianfanOCR Qwen2Audio Qwen3ASR SmolVLM "
    "VibeVoice VibeVoiceAsr VideoLlama3 VideoLlava VipLlava Voxtral"
)


def _every() -> list[Any]:
    names = [name for name in families.classes() if name not in CANNOT]
    return [name if name in COVERING else pytest.param(name, marks=pytest.mark.full) for name in names]


def batch_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three responses of 8, 6 and 5 tokens, right-padded, behind prompts of 2; or of 6, 2 and 4 labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V // 2, (3, 8), generator=generator)
    mask = torch.arange(8) < torch.tensor([[8], [6], [5]])
    labels = ids.masked_fill(~mask | (torch.arange(8) < 2), IGNORE)
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, V // 2, (3, 6), generator=generator)
        labels = labels.masked_fill(torch.arange(6) >= torch.tensor([[6], [2], [4]]), IGNORE)
    batch = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        del batch["attention_mask"]
    if model.config.model_type == "paligemma":
        batch["token_type_ids"] = (torch.arange(8) > 1).long().expand(3, 8)
    return batch


def own_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the labels from the model's own logits, with decoder inputs as its own forward makes them."""
    given, labels = {key: value.clone() for key, value in batch.items()}, batch["labels"]
    if not model.config.is_encoder_decoder:
        del given["labels"]
    logits = model(**given, use_cache=False).logits.double()
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORE
    return logits.log_softmax(-1)[keep].gather(1, labels[keep][:, None])[:, 0]


def compare(model: PreTrainedModel) -> None:
    batch = batch_for(model)
    with torch.no_grad():
        scores = hf.token_scores(model, batch).logp
    hf.loss(model, batch, "mle", length_normalize=False, reduction="sum").backward()
    ours = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    own = own_logps(model, batch)
    (-own.sum()).backward()
    target = batch["labels"] if model.config.is_encoder_decoder else hf.aligned_targets(batch["labels"])
    torch.testing.assert_close(scores[target != IGNORE].double(), own.detach(), rtol=1e-5, atol=1e-5)
    assert (scores[target == IGNORE] == 0).all()
    theirs = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.numel()}
    largest = max(grad.abs().max().item() for grad in theirs.values())
    assert model.get_output_embeddings().weight.grad.abs().max() > 0
    for key, parameter in model.named_parameters():
        grad, our = (torch.zeros_like(parameter) if x is None else x for x in (theirs.get(key), ours[key]))
        size = grad.abs().max().item() if key in theirs else 0.0
        torch.testing.assert_close(our, grad, rtol=0, atol=2e-4 * size + 1e-6 * largest, msg=key)


@pytest.mark.filterwarnings("ignore")  # of the libraries, on 300 classes
@pytest.mark.parametrize("name", _every())
def test_every_class_is_right_or_refused_by_name(name: str) -> None:
    model = families.tiny(name)
    if name.startswith("Reformer"):
        model.train()
    if name not in REFUSED:
        compare(model)
        return
    with pytest.raises(ValueError, match=REFUSED[name]):
        hf.token_scores(model, batch_for(model))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["Gemma2Config", "GraniteConfig"])
@pytest.mark.parametrize("name", OPEN)
def test_models_around_a_text_model_with_a_cap_or_a_scale(name: str, text: str) -> None:
    """Most ignore it, and some apply it: so do the scores."""
    compare(families.tiny(f"{name}ForConditionalGeneration", text))


def test_the_documented_numbers() -> None:
    """A class of a table is one that transformers has, and docs/integrate.md counts them."""
    every = set(families.classes())
    assert every >= {*REFUSED, *CANNOT, *COVERING}
    text = (Path(__file__).parents[1] / "docs" / "integrate.md").read_text(encoding="utf-8")
    right = len(every) - len(REFUSED) - len(CANNOT)
    assert f"{right} of the {len(every)} classes" in text, (right, len(every))
    assert f"{len(REFUSED)} are refused by name, and {len(CANNOT)} can't be made" in text, (len(REFUSED), len(CANNOT))
