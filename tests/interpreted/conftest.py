"""Triton's interpreter in place of a GPU: kernels run on CPU tensors, program after program.

It truncates float32 → bfloat16 and multiplies bfloat16 as integers; both are mended here (round to nearest even, and
operands raised to float32, as tensor cores take them). What it can't see: races, barriers, reads out of bounds, and
everything the compiler rejects; `tests/test_targets.py` compiles the kernels for that.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted: expected TRITON_INTERPRET=1 in the environment, as `make test` sets it")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from rgpb.kernels import triton_rows


def to_bfloat16(values):
    """float array → uint16 array of bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_float32(handle):
    """The values of a handle; bfloat16 is held as its bits."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """bfloat16 as the hardware has it."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(values, source, target, rounding):
        if source in (tl.float32, tl.float64) and target == tl.bfloat16:
            return to_bfloat16(values)
        return convert(values, source, target, rounding)

    def product(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(to_float32(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


@pytest.fixture
def apart(monkeypatch):
    """The row kernels' results don't lie over the logits, whatever their type."""

    def elsewhere(chunk):
        room = torch.full((len(chunk.buffer), chunk.room), torch.nan, dtype=chunk.x.dtype)
        return room[:, : chunk.vocab]

    monkeypatch.setattr(triton_rows.TritonRows, "narrow", staticmethod(elsewhere))


def pytest_configure(config):
    for message in (
        "Conversion of an array with ndim > 0",
        "overflow encountered",
        "invalid value encountered",
        "divide by zero",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")  # numpy's, inside the interpreter
