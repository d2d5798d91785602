#!/usr/bin/env bash
# Triton: tl.sum adds bfloat16 and float16 in 16 bits, while tl.max, which would lose nothing there, takes float32.
#
# Versions: triton 3.6.0, Python 3.11; no GPU and no torch needed.
# A good guess: a reduction of 16-bit floats is done in float32, as torch's sum does it and tl.dot adds its products; or
#   all reductions keep the type that they are given.
# Seen, in the code that is compiled: tl.sum adds in bfloat16 and in float16. tl.max compares in float32. tl.cumsum adds
#   bfloat16 in float32, but float16 in float16: the last of the running sums of a bfloat16 tile needn't be its sum.
#   (In triton 3.9.0, which isn't run here, tl.cumsum adds bfloat16 in bfloat16, too.)
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/reductions.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x_ptr, out_ptr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 1024)), axis=0))


@triton.jit
def running(x_ptr, out_ptr):
    n = tl.arange(0, 1024)
    tl.store(out_ptr + n, tl.cumsum(tl.load(x_ptr + n), axis=0))


@triton.jit
def highest(x_ptr, out_ptr):
    tl.store(out_ptr, tl.max(tl.load(x_ptr + tl.arange(0, 1024)), axis=0))


seen = {}
for kernel, operation in ((total, "addf"), (running, "addf"), (highest, "maxnumf")):
    for dtype in ("bf16", "fp16"):
        made = ASTSource(fn=kernel, signature={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}, constexprs={})
        code = triton.compile(made, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
        types = re.findall(rf"arith\.{operation} [^\n]*: (\w+)", code)
        print(f"{kernel.__name__} of {dtype}: {operation} in {', '.join(types)}")
        seen[kernel.__name__, dtype] = types
expected = {
    ("total", "bf16"): ["bf16"], ("total", "fp16"): ["f16"], ("running", "bf16"): ["f32"],
    ("running", "fp16"): ["f16"], ("highest", "bf16"): ["f32"], ("highest", "fp16"): ["f32"],
}  # fmt: skip
print("as seen before" if seen == expected else "this has changed")
sys.exit(0 if seen == expected else 1)
PYTHON
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps triton==3.6.0
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/reductions.py"
