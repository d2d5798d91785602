"""`rgpb doctor`: what is here, which kernels can run on it, whether they are right, and how fast the products are.

Every implementation that is available computes log-probabilities, BNF and DPO with their gradients on a small batch.
They are compared with `rgpb.reference` in float64 on the CPU, under the budget of `rgpb bench`.

Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

import rgpb
from rgpb.bench import contest
from rgpb.bench.contest import DTYPES, LOG_PROB, TOLERANCE, Batch, Job, Shape
from rgpb.bench.measure import Result, copy_rate, memory_of_machine, product_rate, version_of
from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.kernels import IMPLEMENTATIONS, cpp_rows, resolve_impl, why_not
from rgpb.kernels.devices import architecture
from rgpb.kernels.tuned import cpu_name

# Four responses of 65 tokens, two of them masked. V is off every tile and a little beyond one of 1024; H is no power of
# two, but its rows are multiples of 16 bytes, which tensor descriptors need.
SHAPE = Shape(260, 72, 1031)
INTERPRETED = Shape(20, 24, 131)  # Triton's interpreter is slow
PATHS = {"single": DEFAULT_WORKSPACE, "two_pass": 1 << 20}  # bytes: all tokens in one chunk, and in several
LOSSES = ("bnf", "dpo")
PACKAGES = ("torch", "triton", "transformers", "numpy", "rich")


class Check(NamedTuple):
    """What an implementation was off float64.

    Attributes:
        device, impl, dtype: of the run; dtype a key of `DTYPES`.
        errors: the log-probabilities', then each loss's and its gradients', of the worse path. Log-probabilities and
            losses: the largest error; gradients: the largest ‖error‖ / ‖gradient‖. Empty where nothing came out.
        seconds: that it took, without the oracle.
        status: "ok", "FAILED", or "error: …" and the exception.
    """

    device: str
    impl: str
    dtype: str
    errors: tuple[float, ...]
    seconds: float
    status: str


def devices() -> list[torch.device]:
    """The CPU and all GPUs."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def kernels(device: torch.device) -> list[str]:
    """The kernel sets that can run there."""
    return [impl for impl in IMPLEMENTATIONS[1:] if why_not(impl, device) is None]


@cache
def problem(shape: Shape, dtype: torch.dtype) -> tuple[Batch, dict[str, Result]]:
    """A batch on the CPU, two of its positions masked, and the exact answer for each loss.

    Only the last response is a rejected one: values of as many of both kinds cancel, and errors of theirs with them.
    """
    batch = contest.make_batch(shape, dtype, "cpu")
    batch.label.fill_(1)[-1] = -1
    batch.target[0, :2] = -100
    batch.logp[0, :2] = 0
    return batch, {loss: contest.exact(batch, Job(loss, "full")) for loss in (*LOSSES, LOG_PROB)}


def self_check(device: torch.device, impl: str, dtype: str) -> Check:
    """Run an implementation, forward and backward, and compare.

    Args:
        device: a CPU or CUDA device.
        impl: of `kernels(device)`.
        dtype: a key of `DTYPES`.

    Returns:
        A `Check`. An exception of the kernels is one that failed.
    """
    on_cpu, truths = problem(INTERPRETED if _interpreted(device, impl) else SHAPE, DTYPES[dtype])
    most_value, most_gradient = TOLERANCE["fused", DTYPES[dtype]]
    found: list[float] = []
    start = time.perf_counter()
    try:
        batch = on_cpu.to(device)
        scores, _ = contest.fused(batch, Job(LOG_PROB, "forward"), "forward", DEFAULT_WORKSPACE, impl=impl)
        found.append(contest.errors(_to_cpu(scores()), truths[LOG_PROB])[0])
        for loss in LOSSES:
            runs = [contest.fused(batch, Job(loss, "full"), path, size, impl=impl)[0] for path, size in PATHS.items()]
            errors = [contest.errors(_to_cpu(run()), truths[loss]) for run in runs]
            found += [_worst([value for value, _, _ in errors]), _worst([gradient for *_, gradient in errors])]
        most = [most_value, *[most_value, most_gradient] * len(LOSSES)]
        status = "ok" if all(error <= limit for error, limit in zip(found, most)) else "FAILED"  # a NaN fails, too
    except Exception as error:  # whatever a compiler, a driver or a kernel can raise is a finding
        found, status = [], f"error: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return Check(str(device), impl, dtype, tuple(found), time.perf_counter() - start, status)


def _interpreted(device: torch.device, impl: str) -> bool:
    return impl in ("triton", "tiled") and device.type == "cpu"


def _to_cpu(made: Result) -> Result:
    return Result(made.value.cpu(), tuple(x.cpu() for x in made.gradients))


def _worst(values: list[float]) -> float:
    """The largest, NaN where one is."""
    return torch.tensor(values, dtype=torch.float64).amax().item()


# -- what is printed ---------------------------------------------------------------------------------------------------


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        lines = [header, *rows] if any(header) else rows
        widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
        print(f"\n{title}")
        for line in lines:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    table = Table(title=title, box=SIMPLE, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row, style="red" if row[-1] in ("FAILED", "error") else None)
    console = Console(markup=False, highlight=False, emoji=False)
    console.width = max(console.width, 110)  # a narrow terminal wraps lines, no number is cut
    console.print(table)


def _described(device: torch.device) -> tuple[str, str, str]:
    """(name, model, what it has)."""
    if device.type == "cpu":
        memory = memory_of_machine()
        has = [f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
        return "cpu", cpu_name(), ", ".join(has + ([] if memory is None else [_gibibytes(memory)]))
    properties = torch.cuda.get_device_properties(device)
    exact = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    near = architecture(device)
    taken = "" if exact == near else f" (configurations and rates of {near})"
    return str(device), properties.name, f"{exact}{taken}, {_gibibytes(properties.total_memory)}"


def _versions() -> list[tuple[str, str]]:
    found = [(package, version_of(package) or "not installed") for package in PACKAGES]
    return [("rgpb", rgpb.__version__), ("python", platform.python_version()), *found]


def _availability(device: torch.device) -> list[tuple[str, str, str]]:
    rows = [(str(device), "auto", f"takes {' or '.join(resolve_impl('auto', device))}")]
    for impl in IMPLEMENTATIONS[1:]:
        reason = why_not(impl, device)
        if reason is not None:
            here = f"no: {reason}"
        elif impl == "cpp":
            here = f"yes, {cpp_rows.describe()}"
        else:
            here = "yes, interpreted" if _interpreted(device, impl) else "yes"
        rows.append((str(device), impl, here))
    return rows


def _cells(check: Check) -> tuple[str, ...]:
    errors = [f"{error:.0e}" for error in check.errors] or [""] * (1 + 2 * len(LOSSES))
    return *check[:3], *errors, f"{check.seconds:.2f}", check.status.partition(":")[0]


def _rates(device: torch.device) -> tuple[str, ...]:
    try:
        products = [f"{product_rate(dtype, device) / 1e9:,.0f}" for dtype in DTYPES.values()]
        return str(device), *products, f"{copy_rate(device) / 1e9:,.1f}"
    except RuntimeError as error:  # a GPU that others have filled
        return str(device), "", "", f"not measured: {type(error).__name__}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `doctor`."""
    text = "devices, versions, which kernels can run here, whether they are right, how fast products are"
    subparsers.add_parser("doctor", help=text, description=__doc__).set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is here and check it. 1 if a check failed."""
    found = devices()
    show("Devices", ("", "", ""), [_described(device) for device in found])
    show("Versions", ("", ""), _versions())
    show("Kernels", ("device", "impl", "here"), [row for device in found for row in _availability(device)])
    checks = [self_check(device, impl, dtype) for device in found for impl in kernels(device) for dtype in DTYPES]
    losses = [name for loss in LOSSES for name in (loss, "gradient")]
    header = ("device", "impl", "type", LOG_PROB, *losses, "s", "")
    show("Errors against float64 (gradients: relative)", header, [_cells(check) for check in checks])
    show(
        "Rates",
        ("device", *(f"{dtype}, GFLOP/s" for dtype in DTYPES), "copies, GB/s"),
        [_rates(device) for device in found],
    )
    failed = [check for check in checks if check.status != "ok"]
    if failed:
        for check in failed:
            if check.status != "FAILED":
                print(f"{' '.join(check[:3])}: {check.status}")
        names = ", ".join(" ".join(check[:3]) for check in failed)
        print(f"NOT well: {len(failed)} of {len(checks)} checks failed: {names}")
        return 1
    taken = ", ".join(f"{' or '.join(resolve_impl('auto', device))} on {device}" for device in found)
    slower = "; without the C++ kernels, which are faster: see above" if cpp_rows.missing() else ""
    print(f'All is well: {len(checks)} of {len(checks)} checks passed; impl="auto" takes {taken}{slower}')
    return 0
