"""BNF on single responses, each good or bad by itself: no pairs, and more of one kind than of the other."""

import torch
from common import arguments, collate, load, pairs

from rgpb import hf


def main(args):
    model, tokenizer = load(args.model)
    rows = [(prompt, good, True) for prompt, good, _ in pairs()] + [(prompt, bad, False) for prompt, _, bad in pairs(6)]
    batch = collate([(prompt, response) for prompt, response, _ in rows], tokenizer)
    label = torch.tensor([good for _, _, good in rows])
    with torch.no_grad():
        ref = hf.token_scores(model, batch)  # of the model before training, once
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    margins = []
    for _ in range(args.steps):
        loss, metrics = hf.loss(model, batch, "bnf", label=label, ref=ref, return_metrics=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margins.append(metrics["rewards/margins"].item())
    return margins


if __name__ == "__main__":
    margins = main(arguments())
    print(f"BNF: reward of good less that of bad responses {margins[0]:.2f} → {margins[-1]:.2f}")
