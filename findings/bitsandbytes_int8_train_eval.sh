#!/usr/bin/env bash
# bitsandbytes: on a CPU, Linear8bitLt is one function in training mode and another in evaluation mode.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0, numpy 2.3.5, Python 3.11; on a CPU.
# A good guess: train() and eval() change layers with dropout or running statistics. A linear layer has neither, so its
#   output is the same, or differs by rounding.
# Seen: in training mode the weight is dequantised and multiplied by the input as it is; in evaluation the input is
#   quantised to 8 bits, too. The two differ by more than the quantised weight differs from the original one, and more
#   with an outlier in the input. A loss or a log-probability under eval() isn't the one that was trained; a ratio of
#   the two isn't 1 for equal weights. The source says that it's for speed; the layer's docstring doesn't.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check bitsandbytes==0.50.2 numpy==2.3.5
cat > "$folder/modes.py" <<'PYTHON'
import sys

import torch
from bitsandbytes.nn import Linear8bitLt

torch.manual_seed(0)
full = torch.nn.Linear(256, 64)
layer = Linear8bitLt(256, 64, has_fp16_weights=False)
layer.load_state_dict(full.state_dict())
layer = layer.to("cpu")  # quantises
normal = torch.randn(32, 256).half()
outlier = normal.clone()
outlier[:, 3] = 40


def off(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


as_seen = True
with torch.no_grad():
    for name, x in (("a normal input", normal), ("one large column", outlier)):
        train, eval_, again = layer.train()(x), layer.eval()(x), layer.train()(x)
        weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
        dequantised = torch.nn.functional.linear(x.float(), weight, layer.bias.float())
        to_dequantised, modes, to_full = off(train, dequantised), off(eval_, train), off(train, full(x.float()))
        print(
            f"{name}: training mode off its dequantised weight by {to_dequantised:.2g}, off the original layer by "
            f"{to_full:.2g}; evaluation off training by {modes:.2g}"
        )
        as_seen &= torch.equal(train, again) and to_dequantised < 1e-3 and modes > to_full
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/modes.py"
