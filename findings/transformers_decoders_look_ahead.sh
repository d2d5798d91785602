#!/usr/bin/env bash
# transformers: five causal LMs attend to later tokens.
#
# Versions: transformers 5.17.0, torch 2.13.0, numpy 2.3.5, Python 3.11.
# A good guess: logits at a position don't change with the tokens behind it. MegatronBertForCausalLM and its relatives
#   say "If you want to use it as a standalone, add is_decoder=True"; Doge is a decoder and has no such setting.
# Seen: with is_decoder=True, logits of MegatronBert, BigBird, RemBert and RoFormer change with the last token at every
#   position; those of Bert don't. Doge's don't with attn_implementation="eager" and do with "sdpa", its default, where
#   no row is padded. So a loss is that of tokens which the model has seen.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 numpy==2.3.5
cat > "$folder/ahead.py" <<'PYTHON'
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 32, "initializer_range": 0.1}
ids = torch.arange(5, 11)[None]
other = ids.clone()
other[0, -1] += 1


def change(model, config):
    """Of the logits before the last token, by this one."""
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **options)).eval()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        one, two = (model(tokens, attention_mask=mask).logits[:, :-1] for tokens in (ids, other))
    return (one - two).abs().max().item()


as_seen, options = True, {"is_decoder": True}
for family in ("Bert", "MegatronBert", "BigBird", "RemBert", "RoFormer"):
    moved = change(f"{family}{'LMHeadModel' if family == 'Bert' else 'ForCausalLM'}", f"{family}Config")
    print(f"{family} with is_decoder=True: earlier logits change by {moved:.2g}")
    as_seen &= (moved > 1e-3) == (family != "Bert")
for attention in ("eager", "sdpa"):
    options = {"num_key_value_heads": 4, "attn_implementation": attention}
    moved = change("DogeForCausalLM", "DogeConfig")
    print(f"Doge with {attention} attention: earlier logits change by {moved:.2g}")
    as_seen &= (moved > 1e-3) == (attention == "sdpa")
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/ahead.py"
