"""FSDP2: each process holds a part of every layer. `torchrun --nproc-per-node 2 examples/fsdp2.py`"""

import os

import torch
import torch.distributed as dist
from common import arguments, load, pairs, stacked
from torch.distributed.fsdp import fully_shard

from rgpb import hf


def main(args):
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    model, tokenizer = load(args.model)
    model = model.to(device)
    batch = stacked(pairs()[rank::world], tokenizer)  # each process has its own pairs
    batch = {name: value.to(device) for name, value in batch.items()}
    hf.attach(model)  # checks the head, while it is whole
    with torch.no_grad():
        ref = hf.token_scores(model, batch)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)  # after fully_shard, which makes other parameters
    losses = []
    for _ in range(args.steps):
        loss = hf.loss(model, batch, "dpo", ref=ref, beta=0.1)  # its mean over the ranks is the loss of all pairs
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


if __name__ == "__main__":
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    os.environ.update(one if "RANK" not in os.environ else {})  # without torchrun: one process
    losses = main(arguments())
    if dist.get_rank() == 0:
        print(f"DPO: {losses[0]:.3f} (log 2) → {losses[-1]:.3f}")
    dist.destroy_process_group()
