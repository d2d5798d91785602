#!/usr/bin/env bash
# Triton: the sum of two masks is their "exclusive or" where a kernel is compiled, and their "or" in the interpreter.
#
# Versions: triton 3.6.0, torch 2.13.0, numpy 2.3.5, Python 3.11; no GPU: the compiled kernel is read.
# A good guess: a + b counts, as a * 5 and tl.sum do, which make int32 of masks; or it is "or", as torch and numpy have
#   it for booleans. Interpreter and compiler agree.
# Seen: the sum stays a mask of one bit. Where both are true, 1 + 1 overflows to 0 in the compiled kernel, while the
#   interpreter gives 1. No kernel gives 2, and a test under the interpreter doesn't notice.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check triton==3.6.0 numpy==2.3.5
cat > "$folder/masks.py" <<'PYTHON'
import re
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def count(out_ptr):
    """How many of two masks are true: n > 3 and n > 5, for n from 0 to 7."""
    n = tl.arange(0, 8)
    tl.store(out_ptr + n, ((n > 3) + (n > 5)).to(tl.int32))


@triton.jit
def folded(out_ptr):
    """The same of two masks that are true."""
    yes = tl.full([4], 1, tl.int32) > 0
    tl.store(out_ptr + tl.arange(0, 4), (yes + yes).to(tl.int32))


if sys.argv[1] == "interpreted":
    seen = torch.zeros(8, dtype=torch.int32)
    count[(1,)](seen)
    masks = (torch.arange(8) > 3) + (torch.arange(8) > 5)
    print("interpreted:", seen.tolist(), "torch:", masks.int().tolist())
    as_seen = seen.tolist() == masks.int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
else:
    target = GPUTarget("cuda", 90, 32)
    code = triton.compile(ASTSource(fn=count, signature={"out_ptr": "*i32"}, constexprs={}), target=target).asm["ttir"]
    sums = re.findall(r"arith\.(?:addi|xori|ori) [^\n]*xi1>", code)
    code = triton.compile(ASTSource(fn=folded, signature={"out_ptr": "*i32"}, constexprs={}), target=target).asm["ttir"]
    stored = re.findall(r"arith\.constant dense<(\w+)> : tensor<4xi32>", code)
    print("compiled: the sum is", *[re.sub(r"%\S+", "%", line) for line in sums])
    print("compiled: true + true is", *stored)
    as_seen = len(sums) == 1 and sums[0].startswith("arith.addi") and stored == ["0"]
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/masks.py" interpreted
"$folder/venv/bin/python" "$folder/masks.py" compiled
