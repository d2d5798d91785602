#!/usr/bin/env bash
# transformers: forward takes a misspelt key of a batch without a word, and the padding then counts.
#
# Versions: transformers 5.17.0, torch 2.13.0, numpy 2.3.5, Python 3.11.
# A good guess: model(**batch) with a key that no part of the model knows ends in a TypeError. Llama's
#   forward declares its further keywords with the closed list TransformersKwargs, and generate() refuses the same key.
# Seen: the key is dropped, without a warning. With attention_masc for attention_mask, the logits are those without any
#   mask, so that a sequence attends to the padding before it. In Llama and in GPT-2.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 numpy==2.3.5
cat > "$folder/key.py" <<'PYTHON'
import sys
import warnings

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

warnings.simplefilter("error")
torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.5,
)
gpt2 = GPT2Config(
    vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5, bos_token_id=0, eos_token_id=0
)
ids = torch.randint(64, (1, 6))
mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
as_seen = True
for model in (LlamaForCausalLM(llama).eval(), GPT2LMHeadModel(gpt2).eval()):
    with torch.no_grad():
        right, misspelt, unmasked = (
            model(ids, **batch).logits[:, 3:] for batch in ({"attention_mask": mask}, {"attention_masc": mask}, {})
        )
    change = (misspelt - right).abs().max().item()
    refused = False
    try:
        model.generate(ids, attention_masc=mask, max_new_tokens=1)
    except ValueError as error:
        refused = "attention_masc" in str(error)
    print(
        f"{type(model).__name__}: logits change by up to {change:.2g}, equal to those without a mask: "
        f"{torch.equal(misspelt, unmasked)}; generate() refuses the key: {refused}"
    )
    as_seen &= change > 1e-3 and torch.equal(misspelt, unmasked) and refused
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/key.py"
