#!/usr/bin/env bash
# transformers: a tokenizer read from a Llama's GGUF file has the beginning token as its end token.
#
# Versions: transformers 5.17.0, gguf 0.19.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: special tokens are those that the file names (tokenizer.ggml.bos_token_id, eos_token_id,
#   padding_token_id), as they are for the model read from the same file: config.eos_token_id is right.
# Seen: eos_token is the token of bos_token_id, and pad_token is None. What appends the end token to a response, or
#   stops at tokenizer.eos_token_id, takes the token that begins a turn. Nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0
cat > "$folder/tokens.py" <<'PYTHON'
import sys
from pathlib import Path

from gguf import GGUFWriter
from transformers import AutoConfig, AutoTokenizer

folder = Path(sys.argv[1])
tokens = ["<unk>", "<start>", "<stop>", "<fill>", *"abcdefg", "ab", "cd"]
writer = GGUFWriter(folder / "small.gguf", "llama")
writer.add_name("small")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_types([3] * 4 + [1] * 9)
writer.add_token_merges(["a b", "c d"])
named = {"bos": "<start>", "eos": "<stop>", "pad": "<fill>"}
writer.add_bos_token_id(tokens.index(named["bos"]))
writer.add_eos_token_id(tokens.index(named["eos"]))
writer.add_pad_token_id(tokens.index(named["pad"]))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="small.gguf")
config = AutoConfig.from_pretrained(folder, gguf_file="small.gguf")
read = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
print("the file:", named)
print("the tokenizer:", read)
print("the model's config: eos =", tokens[config.eos_token_id])
as_seen = read == {"bos": "<start>", "eos": "<start>", "pad": None} and tokens[config.eos_token_id] == "<stop>"
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/tokens.py" "$folder"
