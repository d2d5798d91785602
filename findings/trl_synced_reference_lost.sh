#!/usr/bin/env bash
# TRL: a reference that sync_ref_model has moved is in no checkpoint.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, Python 3.11; on a CPU.
# A good guess: a run of DPOTrainer that goes on from a checkpoint goes on as if it had not been interrupted.
# Seen: so it does with a fixed reference. With sync_ref_model=True the reference is again the one from the start, so
#   all losses after the checkpoint are others, and nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0
cat > "$folder/sync.py" <<'PYTHON'
import copy
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
start = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape))
rows = [{"prompt": f"{a} plus {b} is", "chosen": " two", "rejected": " three"} for a in ("one", "two") for b in words]


def losses(name, resumed, **settings):
    """Of the last three steps of six; of a resumed run those after its checkpoint."""
    args = DPOConfig(
        f"{folder}/{name}", use_cpu=True, bf16=False, max_steps=6, save_steps=3, logging_steps=1, learning_rate=1e-2,
        report_to=[], gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=2, **settings,
    )
    trainer = DPOTrainer(
        copy.deepcopy(start), copy.deepcopy(start), args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-3" if resumed else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-3:]


apart = {}
for name, settings in {"fixed": {}, "synced": {"sync_ref_model": True, "ref_model_sync_steps": 2}}.items():
    whole, resumed = losses(name, False, **settings), losses(name, True, **settings)
    apart[name] = max(abs(a - b) for a, b in zip(whole, resumed, strict=True))
    print(name, "steps 4 to 6:", [round(x, 4) for x in whole], "resumed:", [round(x, 4) for x in resumed])
as_seen = apart["fixed"] < 1e-5 and apart["synced"] > 1e-2
print("as seen before" if as_seen else "CHANGED")
sys.exit(0 if as_seen else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/sync.py" "$folder"
