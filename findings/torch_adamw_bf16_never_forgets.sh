#!/usr/bin/env bash
# torch: AdamW on bfloat16 parameters never forgets a large gradient, in none of its implementations.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; on a CPU.
# A good guess: with the default β₂ = 0.999 a gradient counts a third after 1,000 steps, a two-hundredth after 5,000. The
#   fused implementation computes in float32, so at least there.
# Seen: the second moment is held in bfloat16, where 0.999 v rounds to v again. After one gradient of 1 and 5,000 of
#   0.001 it is what it was after the first, to the bit. In float32 it is 130 times smaller, so steps are 11 times
#   longer. The loop, foreach and fused agree. With β₂ = 0.99 it decays. An average of weights with decay 0.999
#   (swa_utils) stops in the same way, a quarter of the way to weights that have stayed at 1.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/moments.py" <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = 5000


def moments(dtype, beta2, **how):
    """The second moment after one gradient of 1, and after many of 0.001."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, beta2), **how)
    found = []
    for count, gradient in ((1, 1.0), (STEPS, 0.001)):
        for _ in range(count):
            weight.grad = torch.full((4,), gradient, dtype=dtype)
            optimizer.step()
        found.append(optimizer.state[weight]["exp_avg_sq"][0].item())
    return found


def averaged(dtype):
    model = torch.nn.Linear(2, 2, dtype=dtype)
    torch.nn.init.zeros_(model.weight)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)
    torch.nn.init.ones_(model.weight)
    for _ in range(2 * STEPS):
        average.update_parameters(model)
    return average.module.weight[0, 0].item()


as_seen = True
for name, how in (("loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
    for dtype in (torch.bfloat16, torch.float32):
        for beta2 in (0.999, 0.99):
            first, last = moments(dtype, beta2, **how)
            print(f"{name}, {dtype}, β₂ = {beta2}: {first:.3g} after the large gradient, {last:.3g} in the end")
            as_seen &= (last == first) == (dtype == torch.bfloat16 and beta2 == 0.999)
            as_seen &= last == first or last < first / 10
averages = {dtype: averaged(dtype) for dtype in (torch.bfloat16, torch.float32)}
print("average of weights that were 0 once and then 1:", averages)
as_seen &= averages[torch.bfloat16] == 0.25 and averages[torch.float32] > 0.99
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/moments.py"
