#!/usr/bin/env bash
# TRL: what DPOTrainer stores of the reference is kept for another cut, and made anew for another beta.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: precompute_ref_log_probs=True keeps the reference's log-probabilities beside the data. They depend on
#   model, tokens and cut, not on beta: another beta finds them, another max_length doesn't.
# Seen: the other way round. With truncation_mode="keep_end" a second run with a smaller max_length takes the sums of
#   the longer responses, without a word: the first loss, of a policy that is the reference, is not log 2. With the
#   default "keep_start" a second run that differs in beta alone scores the whole data again.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/stored.py" <<'PYTHON'
import json
import math
import sys
import warnings

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

warnings.simplefilter("ignore")
folder = sys.argv[1]
words = {word: number for number, word in enumerate(["<end>", "<pad>", "one", "two", "three", "four", "plus", "is"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder + "/model")
rows = [{"prompt": "one plus one is", "chosen": " two two two two", "rejected": " three four three four"}] * 4
with open(folder + "/rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


class Counting(DPOTrainer):
    """Counts batches that the reference scores."""

    scored = 0

    def compute_ref_log_probs(self, model, inputs):
        self.scored += 1
        return super().compute_ref_log_probs(model, inputs)


def run(**settings):
    """The first loss, and how many batches the reference has scored."""
    args = DPOConfig(
        folder + "/run", use_cpu=True, bf16=False, max_steps=1, logging_steps=1, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        precompute_ref_log_probs=True, **settings,
    )
    data = load_dataset("json", data_files=folder + "/rows.jsonl", split="train", cache_dir=folder + "/cache")
    model = AutoModelForCausalLM.from_pretrained(folder + "/model")
    trainer = Counting(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), trainer.scored


whole, first = run(truncation_mode="keep_end", max_length=16)
cut, second = run(truncation_mode="keep_end", max_length=3)
print(f"keep_end: first loss {whole:.4f} with max_length=16, {cut:.4f} with 3, log 2 = {math.log(2):.4f}")
print(f"batches that the reference scored: {first}, then {second}")
_, third = run(beta=0.1)
_, fourth = run(beta=0.2)
_, fifth = run(beta=0.2)
print(f"keep_start, with beta 0.1, 0.2 and 0.2 again: {third}, {fourth}, {fifth}")
as_seen = (first, second, third, fourth, fifth) == (1, 0, 1, 1, 0)
as_seen = as_seen and abs(whole - math.log(2)) < 1e-4 and abs(cut - math.log(2)) > 1e-2
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/stored.py" "$folder"
