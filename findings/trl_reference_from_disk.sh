#!/usr/bin/env bash
# TRL: DPOTrainer's default reference is not a copy of the model that it is given.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: without ref_model the reference is the model as it is handed over, before the first step; an error
#   message of the trainer itself calls it a copy. The first loss is then log 2.
# Seen: the reference is read again from the folder that the model once came from. What was done to the model in
#   memory since (merged adapters, a stage of fine-tuning, new weights) is not in it, and nothing warns: the first
#   loss is not log 2, and the policy is held to the older weights.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/reference.py" <<'PYTHON'
import math
import sys
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

warnings.simplefilter("ignore")
folder = sys.argv[1]
words = {word: number for number, word in enumerate(["<end>", "<pad>", "one", "two", "three", "plus", "is"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder + "/model")

model = AutoModelForCausalLM.from_pretrained(folder + "/model")
with torch.no_grad():  # as a stage of fine-tuning would
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
handed_over = {name: value.clone() for name, value in model.state_dict().items()}
on_disk = AutoModelForCausalLM.from_pretrained(folder + "/model").state_dict()

rows = [{"prompt": "one plus one is", "chosen": " two", "rejected": " three"}] * 4
settings = DPOConfig(
    folder + "/run", use_cpu=True, bf16=False, max_steps=1, logging_steps=1, per_device_train_batch_size=4,
    report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
)
trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
is_copy = all(torch.equal(reference[name], value) for name, value in handed_over.items())
is_disk = all(torch.equal(reference[name], value) for name, value in on_disk.items())
trainer.train()
first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
print(f"the reference is the model that was handed over: {is_copy}; the one in the folder: {is_disk}")
print(f"first loss {first:.4f}, log 2 = {math.log(2):.4f}")
as_seen = is_disk and not is_copy and abs(first - math.log(2)) > 1e-3
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/reference.py" "$folder"
