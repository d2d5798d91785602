"""DPO in an accelerate loop, with gradient accumulation; also `accelerate launch examples/accelerate_loop.py --bf16 1`.

`prepare` wraps the model; the loss goes through that wrapper, so mixed precision and DDP act on it.
`--fsdp 1`: FSDP2, on several GPUs; elsewhere accelerate ignores the plugin, so it is refused.
"""

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from common import arguments, load, pairs, stacked
from torch.optim import AdamW
from torch.utils.data import DataLoader

from rgpb import hf


def main(args):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if args.fsdp else None
    precision = "bf16" if args.bf16 else "no"
    accelerator = Accelerator(
        mixed_precision=precision, fsdp_plugin=plugin, gradient_accumulation_steps=args.accumulate,
        cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    if args.fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(f"fsdp: expected several GPUs, got {accelerator.distributed_type.value}")
    model, tokenizer = load(args.model)
    reference = load(args.model)[0].requires_grad_(False).to(accelerator.device)
    hf.attach(model)  # checks the head while it is whole
    data = DataLoader(pairs(), batch_size=args.batch, collate_fn=lambda rows: stacked(rows, tokenizer), drop_last=True)
    model, optimizer, data = accelerator.prepare(model, AdamW(model.parameters(), lr=args.lr), data)
    losses = []
    while len(losses) < args.steps * args.accumulate:
        for batch in data:
            with accelerator.accumulate(model), accelerator.autocast():
                loss = hf.loss(model, batch, "dpo", ref=reference, beta=0.1)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"DPO: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
    return losses, accelerator.unwrap_model(model)


if __name__ == "__main__":
    losses, model = main(arguments(accumulate=2, batch=4, bf16=0, fsdp=0))
