#!/usr/bin/env bash
# PEFT: trainable_token_indices on an output head drops the head's bias, so logits change before anything is trained.
#
# Versions: peft 0.21.2, transformers 5.17.0, torch 2.13.0, numpy 2.3.5, Python 3.11.
# A good guess: a fresh adapter changes nothing, as a fresh LoRA does, and after training a merged model is the same
#   function as the one that was trained.
# Seen: while the adapter is active, a linear head with a bias (Phi's, for one) is computed without it. The logits of
#   all tokens are off by the bias, without a warning. Disabling the adapter or merging it brings the bias back, so
#   what was trained isn't what is saved by a merge. Reported to PEFT as issue 3649.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.17.0 numpy==2.3.5
cat > "$folder/bias.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

ids = torch.arange(16).reshape(2, 8)


def logits_with(**adapter):
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )
    base = PhiForCausalLM(config).eval()
    bias = torch.randn(64)
    base.lm_head.bias.data.copy_(bias)
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], **adapter)).eval()
        fresh = model(ids).logits
        with model.disable_adapter():
            disabled = model(ids).logits
        model.merge_adapter()
        merged = model(ids).logits
    return before, bias, {"fresh": fresh, "disabled": disabled, "merged": merged}


def off(a, b):
    return (a - b).abs().max().item()


before, _, lora = logits_with()
lora = {name: off(logits, before) for name, logits in lora.items()}
before, bias, seen = logits_with(trainable_token_indices={"lm_head": [5]})
tokens = {name: off(logits, before) for name, logits in seen.items()}
rest = off(seen["fresh"] + bias, before)
print("largest change of a logit, LoRA alone:", ", ".join(f"{name} {x:.2g}" for name, x in lora.items()))
print("with trainable_token_indices:", ", ".join(f"{name} {x:.2g}" for name, x in tokens.items()))
print(f"fresh, with the bias added again: {rest:.2g}")
small = 1e-4
as_seen = max(*lora.values(), tokens["disabled"], tokens["merged"], rest) < small and tokens["fresh"] > 1
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" "$folder/bias.py"
