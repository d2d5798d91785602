"""`rgpb plan`: what a call will run, why, and what it costs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch

from rgpb.bench.cases import naive_bytes
from rgpb.engine.plan import ENGINES, RATES, Plan, Sizes, plan, sizes
from rgpb.objectives import resolve

GPUS = {"a100": "sm_80", "h200": "sm_90", "b200": "sm_100", "rtx5090": "sm_120", "mi300x": "gfx9"}
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
    parser.add_argument("--loss", type=argument(resolve), default="bnf", help="or a sum; default %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default %(default)s")
    parser.add_argument("--device-type", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="for the time; default %(default)s")
    parser.add_argument("--impl", choices=("triton", "torch"), help="default: triton on cuda, torch on cpu")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="default %(default)s")
    parser.add_argument("--skipping", action="store_true", help="with a grad_tolerance")
    parser.add_argument("--frozen-head", action="store_true", help="the head has no gradient, as with LoRA")
    parser.add_argument("--workspace", type=argument(parse_bytes), default="512MiB", help="default %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: `workspace` is too small for one row, or the engine can't serve the request.
    """
    a, spec, dtype = arguments, arguments.loss, DTYPES[arguments.dtype]
    cuda = a.device_type == "cuda"
    head = sizes(
        a.vocab, a.hidden, dtype, dtype, a.device_type, a.impl or ("triton" if cuda else "torch"),
        arch=GPUS[a.gpu] if cuda else None,
    )  # fmt: skip
    chosen = plan(
        a.tokens, head, weight_grad=not a.frozen_head, couples=spec.couples, half=dtype == torch.float16,
        entropy_grad=spec.entropy_grad, skipping=a.skipping, engine=a.engine, workspace=a.workspace,
    )  # fmt: skip
    naive, units = naive_bytes(a.tokens, a.vocab, dtype.itemsize), 2 if a.frozen_head else 3
    print(f"call    {spec.name}, {a.dtype}, on a {a.device_type} device")
    print(f"path    {chosen.path}: {chosen.reason}")
    print(f"engine  {chosen.engine}, kernels in {chosen.impl}")
    print(f"work    {chosen.units} × 2·N·V·H = {chosen.flops / 1e12:,.3g} TFLOP; naive PyTorch does {units} ×")
    if chosen.seconds is not None:
        floor = products_seconds(chosen, head)
        print(
            f"time    {chosen.seconds * 1e3:,.1f} ms predicted for {a.gpu}, {chosen.seconds / floor:.2f} × the bare "
            f"products' {floor * 1e3:,.1f} ms; from ceilings, not measured"
        )
    else:
        print("time    not predicted: there are rates for 16-bit products on a GPU only")
    if a.skipping and chosen.path == "two_pass":
        print("        as if nothing could be left out; less half of it, times the share that is")
    print(f"chunks  up to {chosen.rows:,} of {a.tokens:,} rows at a time")
    print(f"memory  {_mebibytes(chosen.extra_bytes)} beyond inputs and gradients, {_mebibytes(a.workspace)} allowed")
    print(
        f"naive   {_mebibytes(naive)}: 3·N·V float32 numbers; {naive / chosen.extra_bytes:,.1f} times the memory above"
    )
    return 0


def products_seconds(chosen: Plan, head: Sizes) -> float:
    """The bare products of a plan at the library's rate on the architecture of `head`."""
    assert head.arch is not None
    return chosen.flops / RATES[head.arch].library


HEADS = {
    "Llama-3-8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-2-9B": (3584, 256000),
    "Pythia-2.8B": (2560, 50304),
}


def predictions(gpu: str = "h200", tokens: int = 8192) -> str:
    """A Markdown table: what each path is predicted to take for the heads of `HEADS`, bf16, on both engines."""
    lines = [
        "| head | job, workspace | bare products | chunked | tiled |",
        "|---|---|---:|---:|---:|",
    ]
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("token-wise loss, 4 GiB", {"couples": "token", "workspace": 4 << 30}),
        ("token-wise loss, 512 MiB", {"couples": "token"}),
        ("any loss, 512 MiB", {"couples": "batch"}),
        ("frozen head, 512 MiB", {"weight_grad": False}),
        ("log-probabilities, 512 MiB", {"weight_grad": False, "hidden_grad": False}),
    ]
    for name, (width, vocab) in HEADS.items():
        for job, request in jobs:
            cells = []
            for engine in ("chunked", "tiled"):
                head = sizes(vocab, width, torch.bfloat16, torch.bfloat16, "cuda", "triton", arch=GPUS[gpu])
                made = plan(tokens, head, engine=engine, **request)
                assert made.seconds is not None
                floor = products_seconds(made, head)
                cells.append(f"{made.path}, {made.seconds * 1e3:.1f} ms, {made.seconds / floor:.2f} × {made.units}U")
            unit = 2e3 * tokens * vocab * width / RATES[GPUS[gpu]].library
            lines.append(f"| {name} | {job} | U = {unit:.1f} ms | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
