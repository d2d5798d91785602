#!/usr/bin/env bash
# transformers: the mask of the assistant's tokens is wrong where its part begins or ends with a space.
#
# Versions: transformers 5.17.0, tokenizers 0.23.3, Python 3.11; no torch.
# A good guess: return_assistant_tokens_mask=True marks the tokens between {% generation %} and {% endgeneration %}.
# Seen: with a tokenizer that counts a space to no token (byte-level with trim_offsets=True, the default), a part that
#   begins with a space is not marked, nor is any part behind it; and one that ends with a space is marked up to the
#   end of the chat, what the user says next included. Nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/mask.py" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.post_processor = processors.ByteLevel(trim_offsets=True)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "A:{% generation %}{{ m.content }}{% endgeneration %};"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
)


def marked(*answers):
    chat = []
    for answer in answers:
        chat += [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    out = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    return "".join(t for t, m in zip(tokens, out["assistant_masks"]) if m).replace("Ġ", " ")


seen = {answers: marked(*answers) for answers in (("one", "two"), (" one", "two"), ("one ", "two"))}
for answers, text in seen.items():
    print(f"answers {answers}: marked {text!r}")
as_seen = list(seen.values()) == ["onetwo", "", "one ;U:q;A:two;"]
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/mask.py"
