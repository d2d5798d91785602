#!/usr/bin/env bash
# TRL: with adapters that PEFT starts from parts of the weights (PiSSA, OLoRA), DPOTrainer has a wrong reference, or
# changes the policy when it is made; nothing says so.
#
# Versions: trl 1.16.0, peft 0.21.2, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, numpy 2.3.5,
#   Python 3.11; on a CPU.
# A good guess: a fresh adapter changes nothing. Before the first step policy and reference agree, so that DPO's loss is
#   log 2; and a trainer leaves the model as it is given.
# Seen: such an adapter takes a part of each weight over, so that what is left without it isn't the model (known to PEFT:
#   issue 2184). Given as peft_config, the reference is what is left: the loss before the first step isn't log 2.
#   Given as a PeftModel, TRL adds an adapter "ref" by the same configuration, which takes a part of the weights over
#   once more, and then gets the values of the first. Policy and reference agree and the loss is log 2, but both are
#   another function than the model that was given.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 peft==0.21.2 transformers==5.17.0 \
    accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
cat > "$folder/adapters.py" <<'PYTHON'
import math
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<end>", "two", "three", "four", "five", "plus", "is", "apples"]
text = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
text.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<end>")
data = Dataset.from_list(
    [
        {"prompt": "two plus two is", "chosen": " four", "rejected": " five apples"},
        {"prompt": "two plus three is", "chosen": " five", "rejected": " three apples"},
    ]
)
ids = torch.arange(2, 9)[None]


def tried(start, wrapped):
    """Loss before the first step, and the largest change of a logit by the trainer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    adapters = LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj", "v_proj", "down_proj"])
    with torch.no_grad():
        before = model(ids).logits
    settings = DPOConfig(
        f"{sys.argv[1]}/out", bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    given = {"model": get_peft_model(model, adapters)} if wrapped else {"model": model, "peft_config": adapters}
    trainer = DPOTrainer(
        args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **given
    )
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        return loss, (trainer.model.eval()(ids).logits - before).abs().max().item()


as_seen = True
for start in (True, "pissa", "olora"):
    for wrapped in (False, True):
        loss, change = tried(start, wrapped)
        print(f"{start}, {'a PeftModel' if wrapped else 'peft_config'}: loss {loss:.4f}, logits change by {change:.2g}")
        as_seen &= (abs(loss - math.log(2)) > 0.01) == (start is not True and not wrapped)
        as_seen &= (change > 0.01) == (start is not True and wrapped)
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" -W ignore "$folder/adapters.py" "$folder"
