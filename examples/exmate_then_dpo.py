"""Two stages: ExMATE, which needs no reference, then DPO against the model that ExMATE has made."""

import torch
from common import arguments, load, pairs, stacked

from rgpb import hf


def train(model, batch, objective, args, **given):
    """Steps on one batch; the metrics of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    history = []
    for _ in range(args.steps):
        loss, metrics = hf.loss(model, batch, objective, return_metrics=True, **given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in metrics.items()} | {"loss": loss.item()})
    return history


def main(args):
    model, tokenizer = load(args.model)
    batch = stacked(pairs(), tokenizer)
    first = train(model, batch, "exmate", args)
    with torch.no_grad():
        ref = hf.token_scores(model, batch)  # the reference is the model between the stages
    second = train(model, batch, "dpo", args, ref=ref, beta=0.1)
    print(f"ExMATE: perplexity of the chosen {first[0]['perplexity']:.1f} → {first[-1]['perplexity']:.1f}")
    print(f"DPO: {second[0]['loss']:.3f} (log 2) → {second[-1]['loss']:.3f}")
    return [entry["rewards/margins"] for entry in second]


if __name__ == "__main__":
    margins = main(arguments())
