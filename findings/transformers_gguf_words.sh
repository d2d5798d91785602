#!/usr/bin/env bash
# transformers: a tokenizer read from a Llama's GGUF file splits text into words as GPT-2 does, whatever the file says.
#
# Versions: transformers 5.17.0, gguf 0.19.0, tokenizers 0.23.3, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: the file names how words are split (tokenizer.ggml.pre), and the tokenizer does that, as the programs do
#   that such files are made for. llama-bpe is Llama 3's way: at most three digits are a word, and punctuation takes the
#   line ends behind it along. smollm is SmolLM2's: each digit is a word.
# Seen: files that differ in this name alone give the same tokenizer, which is right for gpt-2. With the others, numbers
#   and line ends become tokens that the model hasn't seen there in its training. Nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0 tokenizers==0.23.3
cat > "$folder/words.py" <<'PYTHON'
import sys
from pathlib import Path

from gguf import GGUFWriter
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
LINE = "Ċ"  # as GPT-2 writes the byte of a line's end
MERGES = ["1 2", "12 3", "123 4", f"{LINE} {LINE}", f": {LINE}{LINE}"]
TOKENS = ["<start>", "<stop>", *"12345:", LINE, *(merge.replace(" ", "") for merge in MERGES)]
TEXT = "1234:\n\n5"
RIGHT = {
    "gpt-2": ["1234", ":", LINE, LINE, "5"],
    "smollm": ["1", "2", "3", "4", ":", LINE * 2, "5"],
    "llama-bpe": ["123", "4", f":{LINE}{LINE}", "5"],
}


def tokens_of(words):
    writer = GGUFWriter(folder / "small.gguf", "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 2 + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="small.gguf").tokenize(TEXT)


as_seen = True
print(f"tokens of {TEXT!r}")
for words, right in RIGHT.items():
    tokens = tokens_of(words)
    print(f"{words}: {tokens}, expected {right}")
    as_seen &= tokens == RIGHT["gpt-2"]
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/words.py" "$folder"
