#!/usr/bin/env bash
# torch.distributed.nn.functional.all_reduce: the gradient through MAX, MIN or PRODUCT is wrong, and nothing says so.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; two processes on the CPU.
# A good guess: this is the all_reduce that can be differentiated, and it takes an op. So for MAX the gradient goes to
#   the rank that holds the maximum, and the ranks' gradients add up there; or the op is refused.
# Seen: backward reduces the incoming gradients with the same op. For MAX every rank gets the largest of them, whether
#   it holds the maximum or not; for PRODUCT, their product. The function warns that it is deprecated, not of this; the
#   one it names instead refuses any op but the sum in its backward.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/gradient.py" <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import _functional_collectives
from torch.distributed.nn.functional import all_reduce

VALUES = torch.tensor([[1.0, 4.0], [3.0, 2.0]])  # of each rank
FACTORS = torch.tensor([[1.0, 1.0], [2.0, -5.0]])  # of each rank's part of the loss
OPS = {  # the op, and the same in one process
    "MAX": (dist.ReduceOp.MAX, lambda x: x.amax(0)),
    "MIN": (dist.ReduceOp.MIN, lambda x: x.amin(0)),
    "PRODUCT": (dist.ReduceOp.PRODUCT, lambda x: x.prod(0)),
    "SUM": (dist.ReduceOp.SUM, lambda x: x.sum(0)),
}


def main(rank, store):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    right = {}
    for name, (op, alone) in OPS.items():
        x = VALUES[rank].clone().requires_grad_()
        (all_reduce(x, op=op) * FACTORS[rank]).sum().backward()
        both = VALUES.clone().requires_grad_()
        (alone(both) * FACTORS).sum().backward()
        gradients = [torch.empty(2) for _ in range(2)]
        dist.all_gather(gradients, x.grad)
        seen = torch.stack(gradients)
        right[name] = torch.equal(seen, both.grad)
        if rank == 0:
            print(f"{name}: gradients of the ranks {seen.tolist()}, of one process {both.grad.tolist()}")
    refused = False
    try:
        x = VALUES[rank].clone().requires_grad_()
        _functional_collectives.all_reduce(x, "max", dist.group.WORLD).sum().backward()
    except RuntimeError as error:
        refused = "only supports 'sum'" in str(error)
    as_seen = refused and right == {"MAX": False, "MIN": False, "PRODUCT": False, "SUM": True}
    if rank == 0:
        print(f"the function named instead refuses max: {refused}")
        print("as seen before" if as_seen else "this has changed")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if as_seen else 1)


if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
PYTHON
"$folder/venv/bin/python" "$folder/gradient.py" "$folder/store"
