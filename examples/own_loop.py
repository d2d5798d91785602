"""Your own training loop on a transformers model: DPO and likelihood in one sum, on packed batches.

The reference is the model before training, scored once for every batch. A reference that is scored inside the loop
from the same model would be the policy itself: the DPO loss would stay at log 2.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rgpb import hf

torch.manual_seed(0)
sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))  # yours: AutoModelForCausalLM.from_pretrained


def encode(text):  # yours: your tokenizer
    return [3 + byte for byte in text.encode()]


def collate(rows):
    """[chosen; rejected], padded on the right; labels −100 on prompt and padding, not shifted."""
    responses = [(prompt, chosen) for prompt, chosen, _ in rows] + [(prompt, rejected) for prompt, _, rejected in rows]
    tokens = [(encode(prompt), [*encode(answer), 2]) for prompt, answer in responses]
    longest = max(len(prompt) + len(answer) for prompt, answer in tokens)
    input_ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (prompt, answer) in enumerate(tokens):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer)
        attention_mask[row, :length] = 1
        labels[row, len(prompt) : length] = torch.tensor(answer)
    return hf.pack({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})


rows = [(f"{a} + {b} =", f" {a + b}", f" {a + b + 1}") for a in range(4) for b in range(4)]
batches = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
with torch.no_grad():
    references = [hf.token_scores(model, batch) for batch in batches]  # once, before the first step


@torch.no_grad()
def dpo_alone():
    return sum(hf.loss(model, batch, "dpo", ref=ref).item() for batch, ref in zip(batches, references)) / len(batches)


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = [dpo_alone()]
for _ in range(12):
    for batch, ref in zip(batches, references):
        total, metrics = hf.loss(model, batch, {"dpo": 1.0, "mle": 0.05}, ref=ref, beta=0.1, return_metrics=True)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(dpo_alone())
print(f"DPO alone: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
print({name: round(value.item(), 3) for name, value in metrics.items()})
