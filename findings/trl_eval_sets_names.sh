#!/usr/bin/env bash
# TRL: metrics of several evaluation sets lose the set's name, and only the last set's are left.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: with eval_dataset={"right": …, "wrong": …} evaluate() has eval_right_rewards/margins and
#   eval_wrong_rewards/margins, as it has eval_right_loss and eval_wrong_loss.
# Seen: DPOTrainer puts "eval_" before its own metrics whatever the set, so what evaluate() returns has one
#   eval_rewards/margins, the last set's, and metric_for_best_model can't name one of the others.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/sets.py" <<'PYTHON'
import sys
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

warnings.simplefilter("ignore")
folder = sys.argv[1]
words = {word: number for number, word in enumerate(["<end>", "<pad>", "one", "two", "three", "plus", "is"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)) for _ in range(2))
right = [{"prompt": "one plus one is", "chosen": " two", "rejected": " three"}] * 4
wrong = [{"prompt": "one plus one is", "chosen": " three", "rejected": " two"}] * 4
args = DPOConfig(
    folder + "/run", use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, disable_tqdm=True,
)
sets = {"right": Dataset.from_list(right), "wrong": Dataset.from_list(wrong)}
trainer = DPOTrainer(
    model, reference, args, train_dataset=sets["right"], eval_dataset=sets, processing_class=tokenizer
)
found = trainer.evaluate()
alone = trainer.evaluate("wrong", metric_key_prefix="eval")
name = "rewards/margins"
for key in sorted(found):
    if key.endswith(("loss", name)):
        print(f"{key}: {found[key]:.4f}")
print(f"of the second set alone: {alone['eval_' + name]:.4f}")
kept = {key for key in found if key.endswith(name)}
as_seen = kept == {"eval_" + name} and {"eval_right_loss", "eval_wrong_loss"} <= found.keys()
as_seen = as_seen and found["eval_" + name] == alone["eval_" + name] != 0
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/sets.py" "$folder"
