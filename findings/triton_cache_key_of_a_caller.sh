#!/usr/bin/env bash
# Triton: the key that a kernel is kept by on disk depends on which kernels came before it in the process.
#
# Versions: triton 3.6.0, Python 3.11; no GPU and no torch needed. triton 3.9.0 has one key.
# A good guess: the same sources, the same arguments and the same target give the same key, so that what one process has
#   compiled is found by the next, and a cache can be filled ahead.
# Seen: of a kernel that calls a function with a global constant, the key holds that constant only if the function was
#   hashed before, for another kernel, say. So it has two keys, by the order of the first launches, and is compiled
#   twice. Hashing the functions first (function.cache_key) gives one.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/keys.py" <<'PYTHON'
import sys

import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)


@triton.jit
def times(x):
    return x * FACTOR


@triton.jit
def first(x_ptr):
    tl.store(x_ptr, times(tl.load(x_ptr)))


@triton.jit
def second(x_ptr):
    tl.store(x_ptr, times(tl.load(x_ptr)) + 1)


for name in sys.argv[1:]:
    key = globals()[name].cache_key
print(key)
PYTHON
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps triton==3.6.0
key() { "$folder/venv/bin/python" "$folder/keys.py" "$@"; }
alone=$(key second)
after=$(key first second)
helped=$(key times second)
echo "alone ${alone:0:12}, after another kernel ${after:0:12}, function hashed first ${helped:0:12}"
[ "$alone" = "$(key second)" ] && [ "$alone" != "$after" ] && [ "$helped" = "$(key times first second)" ]
