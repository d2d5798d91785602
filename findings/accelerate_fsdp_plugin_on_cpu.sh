#!/usr/bin/env bash
# accelerate: on CPUs an FSDP plugin that is passed in is dropped, and the model is wrapped in DDP.
#
# Versions: accelerate 1.15.0, transformers 5.17.0, torch 2.13.0, numpy 2.3.5, Python 3.11; two processes on the CPU.
# A good guess: Accelerator(cpu=True, fsdp_plugin=…) shards the model, as torch's fully_shard() does on gloo, or
#   refuses.
# Seen: the state has no plugin, the distributed type is MULTI_CPU, and prepare() gives a
#   DistributedDataParallel with the whole model in each process. Nothing warns; a test of sharded code on CPUs tests
#   DDP.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check accelerate==1.15.0 transformers==5.17.0 numpy==2.3.5
cat > "$folder/plugin.py" <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    prepared = accelerator.prepare(torch.nn.Linear(8, 8))
kind = accelerator.distributed_type.value
held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in prepared.parameters())
warned = [str(w.message) for w in caught if "fsdp" in str(w.message).lower()]
by_hand = fully_shard(torch.nn.Linear(8, 8), mesh=init_device_mesh("cpu", (2,)))
part = sum(p.to_local().numel() for p in by_hand.parameters())
as_seen = kind == "MULTI_CPU" and type(prepared).__name__ == "DistributedDataParallel" and held == 72 and not warned
as_seen = as_seen and not hasattr(accelerator.state, "fsdp_plugin") and part == 36
if dist.get_rank() == 0:
    print(f"{kind}, {type(prepared).__name__}: {held} of 72 numbers in each process; by fully_shard {part}; {warned}")
    print("as seen before" if as_seen else "CHANGED")
dist.destroy_process_group()
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/plugin.py"
