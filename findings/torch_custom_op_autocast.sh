#!/usr/bin/env bash
# torch.library: under autocast, a custom operator computes in another precision in eager mode than under torch.compile.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; on a CPU.
# A good guess: an operator's own products have one precision, whoever calls it: that of its arguments, since no
#   register_autocast asks for another one. Or autocast reaches into it, then also when the call is compiled.
# Seen: in eager mode autocast reaches into the operator, so products of its float32 arguments are rounded to bfloat16.
#   Under torch.compile (backend aot_eager here, so nothing is fused or reordered) they aren't. The backward that
#   register_autograd names is in float32 both times, so in eager mode it is that of another function.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/precision.py" <<'PYTHON'
import sys

import torch
from torch import Tensor

seen = {}  # dtypes of products, in the order of forward and backward


def product(place: str, a: Tensor, b: Tensor) -> Tensor:
    c = a @ b
    seen[place] = c.dtype
    return c.float()


@torch.library.custom_op("small::product", mutates_args=())
def forward(a: Tensor, b: Tensor) -> Tensor:
    return product("forward", a, b)


@forward.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("small::product_backward", mutates_args=())
def backward(upstream: Tensor, b: Tensor) -> Tensor:
    return product("backward", upstream, b.T)


@backward.register_fake
def _(upstream, b):
    return upstream.new_empty(upstream.shape[0], b.shape[0])


def setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


forward.register_autograd(lambda ctx, upstream: (backward(upstream, *ctx.saved_tensors), None), setup_context=setup)

torch.manual_seed(0)
A, B = torch.randn(8, 64), torch.randn(64, 8)
exact = A.double() @ B.double()


def loss(a):
    return forward(a, B)


dtypes, errors = {}, {}
for name, call in (("eager", loss), ("compiled", torch.compile(loss, backend="aot_eager", fullgraph=True))):
    a = A.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(a)
    out.sum().backward()
    dtypes[name], errors[name] = dict(seen), (out - exact).abs().max().item()
    print(f"{name}: dtypes of the products {dtypes[name]}; largest error of a result {errors[name]:.2g}")
as_seen = dtypes == {
    "eager": {"forward": torch.bfloat16, "backward": torch.float32},
    "compiled": {"forward": torch.float32, "backward": torch.float32},
}
as_seen &= errors["eager"] > 1e-2 and errors["compiled"] < 1e-4
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/precision.py"
