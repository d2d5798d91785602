"""LoRA in the layers of a model, its head frozen: the reference is the model without its adapters, so no copy is held.

The head has no gradient then, which saves a third of the work of the loss."""

import torch
from common import arguments, load, pairs, stacked
from peft import LoraConfig, get_peft_model

from rgpb import hf


def main(args, targets="all-linear"):
    model, tokenizer = load(args.model)
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters)
    batch = stacked(pairs(), tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    losses = []
    for _ in range(args.steps):
        loss = hf.loss(model, batch, "dpo", ref="base", beta=0.1)  # "base": the same model without its adapters
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main(arguments(rank=8, lr=1e-2))
    print(f"DPO: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
