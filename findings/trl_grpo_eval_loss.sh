#!/usr/bin/env bash
# TRL: GRPOTrainer's eval_loss counts the last batch by prompts, the others by completions.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: eval_loss is the mean of the batches' losses, each by its number of completions.
# Seen: the last batch counts by the remainder of the number of prompts, though a batch holds the completions of several
#   for each. With 6 prompts, 2 completions of each and batches of 8 it has 4 completions and counts as 6.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/grpo.py" <<'PYTHON'
import sys
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

warnings.simplefilter("ignore")
folder = sys.argv[1]
words = {word: number for number, word in enumerate(["<end>", "<pad>", "one", "two", "three", "plus", "is"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape))
rows = [{"prompt": prompt} for prompt in ("one plus", "two plus", "three plus", "one is", "two is", "three is")]


class Watching(GRPOTrainer):
    """Gives each batch a loss that is known, and keeps how many completions it has."""

    sizes = []

    def _compute_loss(self, model, inputs):
        self.sizes.append(len(inputs["completion_ids"]))
        return torch.tensor(float(len(self.sizes)))


args = GRPOConfig(
    folder + "/run", use_cpu=True, bf16=False, per_device_train_batch_size=8, per_device_eval_batch_size=8,
    num_generations=2, max_completion_length=4, report_to=[], gradient_checkpointing=False, disable_tqdm=True,
)
data = Dataset.from_list(rows)
trainer = Watching(
    model, lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], args, train_dataset=data,
    eval_dataset=data, processing_class=tokenizer,
)
found = trainer.evaluate()["eval_loss"]
sizes = Watching.sizes
mean = sum(size * loss for loss, size in enumerate(sizes, 1)) / sum(sizes)
print(f"batches of {sizes} completions with the losses 1 and 2: eval_loss {found:.4f}; their mean is {mean:.4f}")
as_seen = sizes == [8, 4] and abs(found - (8 * 1 + 6 * 2) / 14) < 1e-6
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/grpo.py" "$folder"
