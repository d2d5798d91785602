#!/usr/bin/env bash
# Triton's interpreter: a product of bfloat16 tiles is not what any GPU gives, and nothing says so.
#
# Versions: triton 3.6.0, torch 2.13.0, numpy 2.3.5, Python 3.11.
# A good guess: TRITON_INTERPRET=1 runs a kernel "as on the GPU, on the CPU", so tl.dot of two bfloat16 tiles with a
#   float32 accumulator is right to rounding (float16 and float32 tiles are); or the interpreter refuses the type.
# Seen: numbers that have nothing to do with the product, without a warning. bfloat16 is held as 16-bit integers, and
#   these are multiplied.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check triton==3.6.0 numpy==2.3.5
cat > "$folder/product.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


torch.manual_seed(0)
off = {}
for dtype in (torch.float16, torch.bfloat16):
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, 16)
    off[dtype] = ((out - a.float() @ b.float()).abs().max() / (a.float() @ b.float()).abs().max()).item()
    print(f"{dtype}: largest error over the largest entry {off[dtype]:.3g}")
as_seen = off[torch.float16] < 1e-3 and not off[torch.bfloat16] < 1
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/product.py"
