#!/usr/bin/env bash
# FSDP: a forward under no_grad between backward and the optimizer's step makes the next forward use the old weights.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; FSDP1 and FSDP2, two processes on the CPU.
# A good guess: a forward under no_grad, to log a score, say, changes nothing. The losses of the training are the same
#   with it and without.
# Seen: the outermost unit stays gathered after its forward, as nothing follows that would free it. The step changes
#   the shards, and the next forward takes the gathered weights from before it, without a warning: the second loss is
#   the first once more. In FSDP2, reshard() after the extra forward helps, and so does reshard_after_forward=True for
#   the outermost unit, where the default is False. Its documentation names reshard() for who changes weights between
#   forward and backward, which isn't this.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/losses.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard


def train(wrap, extra, reshard=False):
    torch.manual_seed(0)
    model = wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, losses = torch.ones(2, 4), []
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        if extra:
            with torch.no_grad():
                model(x)
        if reshard:
            model.reshard()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def fsdp1(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    def fsdp2(model):
        return fully_shard(model, mesh=mesh)

    def fsdp2_freed(model):
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)

    plain = train(fsdp2, extra=False)
    rows = {
        "FSDP1": train(fsdp1, extra=False),
        "FSDP1, extra forward": train(fsdp1, extra=True),
        "FSDP2": plain,
        "FSDP2, extra forward": train(fsdp2, extra=True),
        "FSDP2, extra forward, then reshard()": train(fsdp2, extra=True, reshard=True),
        "FSDP2, extra forward, reshard_after_forward=True": train(fsdp2_freed, extra=True),
    }
    right = all(abs(a - b) < 1e-6 for name in list(rows)[:1] + list(rows)[4:] for a, b in zip(rows[name], plain))
    stale = all(rows[name][1] == rows[name][0] > 100 * plain[1] for name in list(rows) if name.endswith("forward"))
    as_seen = right and stale
    if rank == 0:
        for name, losses in rows.items():
            print(f"{name}: losses " + ", ".join(f"{loss:.3g}" for loss in losses))
        print("as seen before" if as_seen else "this has changed")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if as_seen else 1)


if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
PYTHON
"$folder/venv/bin/python" "$folder/losses.py" "$folder/store"
