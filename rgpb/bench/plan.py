"""`rgpb plan`: what a call will run, why, and what it costs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch

from rgpb.bench.cases import naive_bytes
from rgpb.engine.plan import plan, sizes
from rgpb.objectives import OBJECTIVES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Bytes from a text such as 512MiB, 1.5GiB or 1000000.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * BYTES.get(match[2].lower(), 0)) if match else 0
    if size < 1:
        raise ValueError(f"expected bytes, as 512MiB, 4GiB or 1000000, got {text!r}")
    return size


def positive(text: str) -> int:
    """An integer of at least 1.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise ValueError(f"expected a positive integer, got {text!r}")
    return int(text)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which then shows the message of its `ValueError`."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `plan`."""
    parser = subparsers.add_parser("plan", help=__doc__, description=__doc__)
    for name, text in (("tokens", "N, response tokens"), ("hidden", "H"), ("vocab", "V")):
        parser.add_argument(f"--{name}", type=argument(positive), required=True, help=text)
    parser.add_argument("--loss", choices=sorted(OBJECTIVES), default="bnf")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default %(default)s")
    parser.add_argument("--device-type", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    parser.add_argument("--frozen-head", action="store_true", help="the head has no gradient, as with LoRA")
    parser.add_argument("--workspace", type=argument(parse_bytes), default="512MiB", help="default %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: `workspace` is too small for one row.
    """
    a, spec, dtype = arguments, OBJECTIVES[arguments.loss], DTYPES[arguments.dtype]
    chosen = plan(
        a.tokens, sizes(a.vocab, a.hidden, dtype, dtype, a.device_type), weight_grad=not a.frozen_head,
        couples=spec.couples, half=dtype == torch.float16, entropy_grad=spec.entropy_grad, workspace=a.workspace,
    )  # fmt: skip
    naive, units = naive_bytes(a.tokens, a.vocab, dtype.itemsize), 2 if a.frozen_head else 3
    print(f"call    {spec.name}, {a.dtype}, on a {a.device_type} device")
    print(f"path    {chosen.path}: {chosen.reason}")
    print(f"work    {chosen.units} × 2·N·V·H = {chosen.flops / 1e12:,.3g} TFLOP; naive PyTorch does {units} ×")
    print(f"chunks  up to {chosen.rows:,} of {a.tokens:,} rows of logits at a time")
    print(f"memory  {_mebibytes(chosen.extra_bytes)} beyond inputs and gradients, {_mebibytes(a.workspace)} allowed")
    print(
        f"naive   {_mebibytes(naive)}: 3·N·V float32 numbers; {naive / chosen.extra_bytes:,.1f} times the memory above"
    )
    return 0


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
