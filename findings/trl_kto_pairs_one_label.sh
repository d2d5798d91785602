#!/usr/bin/env bash
# TRL: of pairs KTOTrainer makes batches of one label, all chosen ones first.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: KTOTrainer takes pairs, too, as desirable and undesirable completions; batches have both.
# Seen: pairs are taken apart a thousand at a time, all chosen ones and then all rejected ones, and "kto" goes through
#   the data in order (another order is refused). So a thousand chosen completions train before the first rejected one:
#   no batch has both labels, and nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/kto.py" <<'PYTHON'
import sys
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer

warnings.simplefilter("ignore")
folder = sys.argv[1]
words = {word: number for number, word in enumerate(["<end>", "<pad>", "one", "two", "three", "plus", "is"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)) for _ in range(2))
rows = [{"prompt": "one plus one is", "chosen": " two", "rejected": " three"}] * 12


class Watching(KTOTrainer):
    """Keeps the labels of each batch."""

    batches = []

    def compute_loss(self, model, inputs, *rest, **more):
        self.batches.append([bool(label) for label in inputs["label"]])
        return super().compute_loss(model, inputs, *rest, **more)


args = KTOConfig(
    folder + "/run", use_cpu=True, bf16=False, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1,
    report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
)
trainer = Watching(model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
trainer.train()
for labels in Watching.batches:
    print(labels)
as_seen = Watching.batches == [[True] * 4] * 3 + [[False] * 4] * 3
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/kto.py" "$folder"
