#!/usr/bin/env bash
# torch on a CPU: in bfloat16, the gradient of an embedding's row stops growing after 256 uses of the row.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11.
# A good guess: a row's gradient is the sum over the places that use the row, rounded once to bfloat16, as the gradient
#   of a bias or of a broadcast tensor is, and that of index_select. So 5,000 places of gradient 1 make 4,992.
# Seen: embedding, embedding_bag and indexing with a tensor add place by place, each time rounded to the gradient's type.
#   At 256, 256 + 1 rounds to 256 again: 5,000 places make 256 (float16: 2,048). Of a token that comes often in a batch
#   most of the gradient is lost; of a tied head only the embedding's part. x[ids] and x.index_select(0, ids) differ.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/rows.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

USES = 5000
IDS = torch.zeros(USES, dtype=torch.long)  # all of the first row
WAYS = {
    "embedding": lambda w: F.embedding(IDS, w),
    "embedding_bag": lambda w: F.embedding_bag(IDS[None], w, mode="sum"),
    "w[ids]": lambda w: w[IDS],
    "index_select": lambda w: w.index_select(0, IDS),
    "expand": lambda w: w[:1].expand(USES, -1),
    "a bias": lambda w: F.linear(torch.ones(USES, 8, dtype=w.dtype), torch.ones(8, 8, dtype=w.dtype), w[0]),
}
EXPECTED = {
    torch.bfloat16: {"embedding": 256, "embedding_bag": 256, "w[ids]": 256},  # else the sum, rounded once
    torch.float16: {"embedding": 2048, "embedding_bag": 2048, "w[ids]": 2048},
    torch.float32: {},
}
as_seen = True
for dtype, stopped in EXPECTED.items():
    once = torch.tensor(float(USES)).to(dtype).item()
    for name, way in WAYS.items():
        w = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
        way(w).sum().backward()
        gradient = w.grad[0, 0].item()
        print(f"{dtype}, {name}: {gradient:.0f}, the sum rounded once {once:.0f}")
        as_seen &= gradient == stopped.get(name, once)
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/rows.py"
