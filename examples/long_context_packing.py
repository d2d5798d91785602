"""Long responses of unequal length, packed end to end without padding, with gradient checkpointing.

What the loss holds beyond inputs and gradients is bounded by `workspace`, however long the responses are.
"""

import torch
from common import arguments, load, stacked

from rgpb import hf


def main(args):
    model, tokenizer = load(args.model)
    model.gradient_checkpointing_enable()
    rows = [(f"count to {n}:", " up" * n, " down" * (n // 2)) for n in (args.words, args.words // 3, args.words // 10)]
    padded = stacked(rows, tokenizer)
    batch = hf.pack(padded)
    print(f"{padded['input_ids'].numel()} tokens with padding, {batch['input_ids'].numel()} without")
    with torch.no_grad():
        ref = hf.token_scores(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model.train()
    losses = []
    for _ in range(args.steps):
        loss = hf.loss(model, batch, "dpo", ref=ref, beta=0.1, workspace=args.workspace)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main(arguments(words=60, steps=4, workspace=2**29))
    print(f"DPO: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
