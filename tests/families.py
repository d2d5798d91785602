"""Every causal LM, encoder–decoder and image-text class of transformers, made tiny from its own config.

A config's numbers are replaced by what their names say they are (`SIZES`), in all configs inside it too. What names
can't say is in `SPECIAL`. What a config derives from other numbers it derives anew.

Dimensions: V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

V = 97  # prime: a multiple of no tile
KINDS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")

# Name of a number in a config → the number in a tiny one; the first that matches. 0 and 1 stay, and so do numbers
# up to 8, but for those that others must agree with (`AGREEING`).
SIZES: list[tuple[str, int]] = [
    (r"vocab_size|num_embeddings$", V),
    (r"kernel", 3),
    (r"interval|_period$|_pattern$|_step$|every_n", 2),
    (r"_offset$|first_k_dense|n_groups?$|num_groups|topk_group|shared_experts|num_dense_layers|mlp_layers", 1),
    (r"experts_per_tok|top_?k|moe_k$", 2),
    (r"experts$", 4),
    (r"layers?$|^depth$|_depth$|num_blocks$", 2),
    (r"kv_.*heads?$|key_(value_)?heads?$", 2),
    (r"heads?$", 4),
    (r"head_dim|d_kv|head_size|rotary_dim|lora_rank|state_size|d_state|_rank$|dt_", 8),
    (r"max_.*position|n_positions|n_ctx|max_.*len|context_length|block_size|num_position", 64),
    (r"window|local_attention|chunk", 4),
    (r"image_size|input_size|crop_size", 16),
    (r"patch_size|stride|tokens_per_image|image_seq", 8),
    (r"hidden_size|d_model|n_embd|embed|dim$|width$|channels$", 32),
    (r"intermediate|ffn|d_ff|n_inner|d_inner|mlp|feed_?forward", 48),
    (r"", 16),
]
AGREEING = r"_dim$|hidden_size|vocab|heads?$|layers$|experts|top_?k|moe_k|per_tok|groups?$"
FLOATS = {
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.3,
    "output_multiplier": 0.3,
    "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 3.0,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# Where a config has None, and a model needs a number
FILLED = {"head_dim": 8, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1}
FILLED |= {"num_experts_per_tok": 2, "num_experts": 4, "top_k_experts": 2}


def _rope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}


_SECTIONED = ("Glm4v", "GlmOcr", "PaddleOCR", "Qwen2VL", "Qwen2_5_VL", "HunYuanVL", "Qwen2_5Omni")
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}
_FEW_FILTERS = {"num_filters": 2, "depths": [1] * 7}
_MIXED = ["sliding_attention", "full_attention"]
# By the name of a config's class: what its numbers can't say
SPECIAL: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": {"<image>": V - 1}},
    "ChameleonVQVAEConfig": {"channel_multiplier": [1, 1]},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _rope([1, 1, 2])}},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _rope([2, 1, 1])},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiaDecoderConfig": {"num_channels": 9},
    "Emu3Config": {"vocabulary_map": {"<image>": V - 1, "<|extra_200|>": V - 2}},
    "Emu3VQVAEConfig": {"channel_multiplier": [1, 1]},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 16], "rope_parameters": _rope([1, 1, 2])},
    "Florence2VisionConfig": {"embed_dim": (8,) * 4, "num_heads": (2,) * 4, "num_groups": (2,) * 4, "depths": (1,) * 4},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_hidden_layers": 4, "layer_types": _MIXED * 2, "num_kv_shared_layers": 2},
    "Gemma4TextConfig": {"global_head_dim": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "DiffusionGemmaTextConfig": {"global_head_dim": 8, "moe_intermediate_size": 16},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 2},
    "JanusVQVAEConfig": {"channel_multiplier": (1, 1)},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    **{f"{name}TextConfig": {"rope_parameters": _rope([1, 1, 2])} for name in _SECTIONED},
    "Glm4vMoeTextConfig": {"rope_parameters": _rope([1, 1, 2]) | {"partial_rotary_factor": 1.0}},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": V - 20},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": V - 20},
    "MoonshineStreamingConfig": {"num_key_value_heads": 2},
    "ReformerConfig": {"axial_pos_embds": False, "attn_layers": ["local", "local"]} | _NO_DROPOUT,
    "SpeechT5Config": {"conv_dim": (8,) * 7},
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
    "Step3p7TextConfig": {"sliding_window": 4},
    "UdopConfig": {"relative_attention_num_buckets": 32},
    **{f"VibeVoiceAcousticTokenizer{name}Config": _FEW_FILTERS for name in ("", "Encoder", "Decoder")},
    "VibeVoiceDiffusionHeadConfig": {"latent_size": 32},
    "XLMConfig": {"causal": True},
    "XmodConfig": {"default_language": "en_XX"},
    "xLSTMConfig": {"chunk_size": 64, "max_inference_chunksize": 64},
    "ZambaConfig": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"]},
}
# Configs that have no parts of their own to begin with
_BERT_DECODER = {"is_decoder": True, "add_cross_attention": True}
_NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "EncoderDecoderConfig": {"encoder": ("BertConfig", {}), "decoder": ("BertConfig", _BERT_DECODER)},
    "SpeechEncoderDecoderConfig": {"encoder": ("Wav2Vec2Config", {}), "decoder": ("BertConfig", _BERT_DECODER)},
    "VisionEncoderDecoderConfig": {"encoder": ("ViTConfig", {}), "decoder": ("BertConfig", _BERT_DECODER)},
    "Gemma4AssistantConfig": {"text_config": ("Gemma4TextConfig", _NO_LAYER_INPUT)},
    "Gemma4UnifiedAssistantConfig": {"text_config": ("Gemma4UnifiedTextConfig", {})},
    "DiffusionGemmaConfig": {"vision_config": ("Gemma4VisionConfig", {})},
    "Granite4VisionConfig": {"text_config": ("Granite4VisionTextConfig", {})},
}


def classes() -> dict[str, list[str]]:
    """Name of each class → the kinds it is of."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            for name in [names] if isinstance(names, str) else names:
                kinds = found.setdefault(name, [])
                if kind not in kinds:
                    kinds.append(kind)
    return dict(sorted(found.items()))


def _number(name: str, value: int) -> int:
    if value < 2 or (value <= 8 and not re.search(AGREEING, name)):
        return value
    return next(size for pattern, size in SIZES if re.search(pattern, name))


def shrunk(kind: type[PreTrainedConfig], tokens: dict[str, int], **more: Any) -> PreTrainedConfig:
    """A config of this class with small numbers.

    tokens: ids of special tokens by name, the same in all configs of a model; grows.
    """
    parts = {
        name: shrunk(getattr(transformers, part), tokens, **options).to_dict()
        for name, (part, options) in PARTS.get(kind.__name__, {}).items()
    }
    whole, given = kind(**copy.deepcopy(parts)), dict[str, Any]()
    names = {field.name for field in dataclasses.fields(kind)}
    if "kv_lora_rank" in names:  # latent attention: as many keys as queries
        given["num_key_value_heads"] = 4
    if whole.is_encoder_decoder:
        given["decoder_start_token_id"] = TOKENS["decoder_start_token_id"]
    special = parts | SPECIAL.get(kind.__name__, {}) | more
    for field in dataclasses.fields(kind):
        name, value = field.name, vars(whole).get(field.name)
        default = field.default
        if isinstance(value, PreTrainedConfig):
            if name not in special:
                given[name] = shrunk(type(value), tokens)
            continue
        if name in given:
            continue
        if name in FLOATS:
            given[name] = FLOATS[name]
        elif name in TOKENS:
            given[name] = TOKENS[name]
        elif re.search(r"_token_(id|index)$|_id$", name) and type(default) is int:
            given[name] = tokens.setdefault(name, V - 1 - len(tokens))
        elif type(default) is int:
            given[name] = _number(name, default)
        elif default is None and name in FILLED:
            given[name] = FILLED[name]
    return kind(**(given | special))


def tiny(name: str, text: str | None = None) -> PreTrainedModel:
    """A model of this class with random weights, its head's so large that leaving out a cap or a scale shows.

    text: class of the text model's config, where the class takes any.
    """
    kind: Any = getattr(transformers, name)
    more, tokens = dict[str, Any](), dict[str, int]()
    if classes()[name] == ["CAUSAL_LM"] and "is_decoder" in {f.name for f in dataclasses.fields(kind.config_class)}:
        more["is_decoder"] = True
    if text is not None:
        more["text_config"] = shrunk(getattr(transformers, text), tokens)
    config = shrunk(kind.config_class, tokens, **more)
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.normal_(0, 0.02)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            for parameter in head.parameters():
                parameter.normal_(0, 0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.5)
    return model
