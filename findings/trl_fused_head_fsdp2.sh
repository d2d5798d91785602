#!/usr/bin/env bash
# TRL: under FSDP2, the fused LM head gives a head that is a unit of its own a wrong gradient, and nothing says so.
#
# Versions: trl 1.16.0, transformers 5.17.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0, numpy 2.3.5, Python 3.11;
#   two processes on the CPU.
# A good guess: fused_lm_head=True gives the gradients that the model's own loss gives, however fully_shard() cuts the
#   model into units. It gathers a sharded head by itself, so that case is meant to work.
# Seen: where the head is a unit of its own, all other gradients are right, but each rank's rows of the head's gradient
#   come from its own part of the batch alone; they aren't averaged over the ranks. The fused head gathers the weight
#   with full_tensor() outside of the unit's forward, and doesn't say that the gradient is a partial one. With the head
#   in the outermost unit, or in one unit with the last norm, the gradient is right.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.17.0 accelerate==1.15.0 \
    datasets==5.2.0 numpy==2.3.5
cat > "$folder/head.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

HEAD = "lm_head.weight"


def build():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model)
    return model


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * rank : 2 * rank + 2]
    alone = {}  # gradients of one process on the whole batch
    for fused in (False, True):
        model = build()
        model(mine, labels=mine, fused_lm_head=fused).loss.backward()
        part = model.lm_head.weight.grad.clone()
        model.zero_grad()
        model(ids, labels=ids, fused_lm_head=fused).loss.backward()
        alone[fused] = {name: p.grad for name, p in model.named_parameters()}
    as_seen = all(off(alone[True][name], alone[False][name]) < 1e-5 for name in alone[False])
    for unit in ("outermost unit", "unit with the norm", "unit of its own"):
        for fused in (False, True):
            model = build()
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            if unit == "unit with the norm":
                fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
            if unit == "unit of its own":
                fully_shard(model.lm_head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model(mine, labels=mine, fused_lm_head=fused).loss.backward()
            errors = {name: off(p.grad.full_tensor(), alone[False][name]) for name, p in model.named_parameters()}
            head, rest = errors.pop(HEAD), max(errors.values())
            own_rows = off(model.lm_head.weight.grad.to_local(), part.chunk(2)[rank])
            if rank == 0:
                loss = "fused head" if fused else "the model's own loss"
                print(f"head in the {unit}, {loss}: gradient of the head off by {head:.2g}, of the rest by {rest:.2g}")
            if fused and unit == "unit of its own":
                if rank == 0:
                    print(f"    off this rank's part of the batch alone by {own_rows:.2g}")
                as_seen &= head > 0.1 and own_rows < 1e-5
            else:
                as_seen &= head < 1e-5
            as_seen &= rest < 1e-5
    if rank == 0:
        print("as seen before" if as_seen else "this has changed")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if as_seen else 1)


if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
PYTHON
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" "$folder/head.py" "$folder/store"
