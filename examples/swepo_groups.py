"""SWEPO on K completions of each prompt, with a reward for each: all count, by how far they are from the mean."""

import torch
from common import arguments, collate, load

from rgpb import hf


def main(args):
    model, tokenizer = load(args.model)
    # Yours: sampled completions and what a reward model says of them. Here: an answer is worse the further it is off.
    asked = [(a, 2) for a in range(8)]
    responses = [(f"{a} + {b} =", f" {a + b + off}") for a, b in asked for off in range(args.k)]
    rewards = torch.tensor([[-float(off) for off in range(args.k)] for _ in asked])
    batch = collate(responses, tokenizer)  # the K completions of a prompt are consecutive
    with torch.no_grad():
        ref = hf.token_scores(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    margins = []
    for _ in range(args.steps):
        loss, metrics = hf.loss(model, batch, "swepo", rewards=rewards, ref=ref, beta=0.1, return_metrics=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margins.append(metrics["rewards/margins"].item())
    return margins


if __name__ == "__main__":
    margins = main(arguments(k=4))
    print(f"SWEPO: reward of the best less that of the others {margins[0]:.2f} → {margins[-1]:.2f}")
