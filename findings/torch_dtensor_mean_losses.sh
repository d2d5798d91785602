#!/usr/bin/env bash
# DTensor: means of losses over sharded tensors have wrong gradients or wrong values, and nothing says so.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; two processes on the CPU.
# A good guess: a DTensor is computed with as one tensor. So losses of tensors that are sharded by rows, and their
#   gradients, are those of one process.
# Seen, with the mean over rows that are sharded evenly on two ranks:
#   - mse_loss, huber_loss, smooth_l1_loss and soft_margin_loss have the right value and twice the gradient (four times
#     on four ranks). l1_loss and binary_cross_entropy_with_logits have the right one.
#   - cross_entropy with rows that ignore_index leaves out, or with weights of the classes, is the mean of the ranks'
#     means, though a rank has fewer rows that count (NaN where one has none). Its gradient is that of the right loss,
#     so the value isn't what is trained.
#   Sums are right, and so is all of a replicated DTensor.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/means.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 8, 6, generator=generator)
IDS = torch.randint(6, (8,), generator=generator)
SOME = IDS.clone()
SOME[1:4] = -100  # three of the first rank's four rows
WEIGHTS = torch.rand(6, generator=generator)

LOSSES = {  # loss, its other arguments
    "mse_loss": (F.mse_loss, [Y]),
    "huber_loss": (F.huber_loss, [Y]),
    "smooth_l1_loss": (F.smooth_l1_loss, [Y]),
    "soft_margin_loss": (F.soft_margin_loss, [Y.sign()]),
    "l1_loss": (F.l1_loss, [Y]),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, [(Y > 0).float()]),
    "cross_entropy": (F.cross_entropy, [IDS]),
    "cross_entropy, rows ignored": (F.cross_entropy, [SOME]),
    "cross_entropy, weights": (F.cross_entropy, [IDS, WEIGHTS]),
    "mse_loss, sum": (lambda x, y: F.mse_loss(x, y, reduction="sum"), [Y]),
    "cross_entropy, rows ignored, sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), [SOME]),
}
TWICE = {"mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss"}
OFF = {"cross_entropy, rows ignored", "cross_entropy, weights"}


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    as_seen = True
    for placement in (Shard(0), Replicate()):
        for name, (loss, others) in LOSSES.items():
            alone = X.clone().requires_grad_()
            expected = loss(alone, *others)
            expected.backward()
            x = distribute_tensor(X, mesh, [placement]).requires_grad_()
            placed = [distribute_tensor(y, mesh, [Replicate() if y is WEIGHTS else placement]) for y in others]
            seen = loss(x, *placed)
            seen.backward()
            value, gradient = seen.full_tensor(), x.grad.full_tensor()
            factor = 2 if name in TWICE and placement == Shard(0) else 1
            off = (value - expected).abs().item() / expected.abs().item()
            as_seen &= (off > 0.001) == (name in OFF and placement == Shard(0))
            as_seen &= torch.allclose(gradient, factor * alone.grad, atol=1e-6)
            if rank == 0 and placement == Shard(0):
                times = (gradient.norm() / alone.grad.norm()).item()
                print(f"{name}: {value:.4f}, in one process {expected:.4f}; gradient {times:.3f} times that")
    if rank == 0:
        print("as seen before" if as_seen else "this has changed")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if as_seen else 1)


if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/means.py" "$folder/store"
