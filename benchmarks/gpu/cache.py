"""Kernels compiled where there is no GPU, for a run on one: `python -m benchmarks.gpu.cache --arch 90 --out DIR`.

The launches of the first run (its checks, `correct`, the heads, `tune`) are made on CPU tensors as on a GPU of that
architecture, at small sizes that Triton specialises alike: multiples of 16, and not. Each is handed to Triton's own
launch, which stops before it launches, so the keys are those that a launch on the GPU looks up. What comes out is
`DIR/sm_90.tgz`; `--unpack DIR/sm_90.tgz` puts it into TRITON_CACHE_DIR, at whatever path that is.
`--list` only counts.

A cache is for one version of Triton, one of Python (whose build of Triton is another), and these sources.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime import cache as triton_cache
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from rgpb import fused_loss, linear_logprob, reference, validation
from rgpb import kernels as sets
from rgpb.bench import contest, tune
from rgpb.bench.contest import Shape
from rgpb.engine import chunks
from rgpb.kernels import configs, matmul, tuned
from rgpb.kernels.devices import nearest

from .journal import say
from .peers import JOBS, entries

MODULES = [import_module(f"rgpb.kernels.{m.name}") for m in iter_modules(sets.__path__) if m.name.startswith("triton_")]
SETS = ("triton", "tiled")
CPU = torch.device("cpu")
VOCABS = (1024, 1027)  # a vocabulary that 16 divides, and one that it doesn't
WORKSPACES = (1 << 20, 64 << 20)  # bytes: several chunks, and one
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Absent:
    """In place of Triton's driver: a GPU that isn't there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Recorder:
    """In place of a kernel: keeps one launch of each that Triton would compile."""

    def __init__(self, kernel: Any, found: dict[Any, Launch]):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            def hook(*, key: Any, **known: Any) -> bool:
                self.found.setdefault((self.kernel.__name__, str(key)), (self.kernel, kept(args), kwargs))
                return True  # nothing is compiled here

            with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
                self.kernel.warmup(*args, grid=grid, **kwargs)
            for x in args:  # results are numbers, whatever they are
                if torch.is_tensor(x) and x.is_floating_point() and x.dim() < 2:
                    x.zero_()

        return launch


def kept(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without what they hold: tensors of the same type and alignment."""

    def small(x: Any) -> Any:
        if isinstance(x, TensorDescriptor) or not torch.is_tensor(x):
            return x
        return torch.empty(32, dtype=x.dtype)[x.data_ptr() % 16 // x.element_size() :]

    return tuple(map(small, args))


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[dict[Any, Launch]]:
    """The launches of a block, as on a GPU of that capability; library products are left out."""
    found: dict[Any, Launch] = {}
    key, sizes = nearest(capability // 10), chunks.sizes

    def on_gpu(*given: Any, **more: Any) -> chunks.Sizes:
        bound = signature(sizes).bind(*given, **more)
        bound.arguments |= {"device_type": "cuda", "arch": key}
        return sizes(*bound.args, **bound.kwargs)

    with contextlib.ExitStack() as stack:
        patch: Callable[..., Any] = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(driver, "_active", Absent(capability))
        for module in MODULES:
            for name in [name for name, x in vars(module).items() if name.endswith("_kernel") and hasattr(x, "warmup")]:
                patch(module, name, Recorder(getattr(module, name), found))
        patch(sets, "INTERPRETED", True)  # so that CPU tensors are served
        patch(configs, "arch", lambda device: key)
        patch(configs, "programs", lambda config, device: config.programs)
        patch(configs, "_key", lambda *names: "")
        patch(tuned, "read", lambda *names: None)
        patch(validation, "sizes", on_gpu)
        patch(validation, "mass_tile", lambda device_type: chunks.mass_tile("cuda"))
        patch(matmul, "mm", lambda *given, **more: None)
        for known in (configs.rows, configs.tile):
            known.cache_clear()
            stack.callback(known.cache_clear)
        yield found


# -- the launches ------------------------------------------------------------------------------------------------------


def of_tuning(capability: int) -> None:
    """`rgpb tune` with all candidates, the part `kernels`, and the checks of each kernel."""
    for vocab in VOCABS:
        given = tune.Inputs(Shape(64, 64, vocab), torch.bfloat16, CPU)
        for name, make in tune.KERNELS.items():
            kernel, tiles = make(given), configs.TILES[nearest(capability // 10)]
            for config in (None, *(tiles.get(name) or (configs.row_candidates() if name == "rows" else ()))):
                kernel.run(config)


def of_heads(capability: int) -> None:
    """The heads' jobs on each path, also with ignored positions, as training steps have them."""
    for ignored in (False, True):
        batch = contest.make_batch(Shape(256, 64, 2048), torch.bfloat16, "cpu")
        if ignored:
            batch.target[0, :3] = -100
        for job in JOBS:
            for one in entries(job, WORKSPACES, "cuda"):
                if one.kernels in SETS and not (ignored and job.kind != "full"):
                    one.make(batch, job)[0]()


def of_correct(capability: int) -> None:
    """The cases of tests/test_gpu.py that the first run takes, without their oracle."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    cases = import_module("test_gpu")
    scores = lambda hidden, head, target: {"logp": torch.zeros(target.shape).double()}  # noqa: E731
    with mock.patch.object(torch.Tensor, "cuda", lambda x: x), mock.patch.object(reference, "token_scores", scores):
        for impl, path, dtype, head, loss, shape in cases.cases():
            if impl in SETS and wanted(impl, dtype):
                hidden, lm_head, target = cases.batch(shape, dtype, head)
                given, _ = cases.given_for(loss, hidden, lm_head, target)
                cases.graded(impl, path, dtype, loss, hidden, lm_head, target, given, 1.0)
        for impl, dtype, shape in [(*pair, shape) for pair in cases.SCORED for shape in (cases.SHAPE, cases.CHUNKED)]:
            if impl in SETS and wanted(impl, dtype):
                hidden, lm_head, target = cases.batch(shape, dtype, "bias")
                made = linear_logprob(hidden, lm_head, target, entropy=True, impl=impl, workspace=cases.WORKSPACE)
                torch.stack([x.sum() for x in made if x is not None]).sum().backward()
        for impl, tolerance in ((impl, tolerance) for impl in SETS for tolerance in cases.TOLERANCES):
            hidden, lm_head, target = cases.batch(cases.SKIPPED, "fp32", "plain")
            fused_loss(hidden, lm_head, target, objective="mle", impl=impl, grad_tolerance=tolerance).backward()


def wanted(impl: str, dtype: str) -> bool:
    """Whether the first run checks it: bf16, and float32 with library products."""
    return dtype == "bf16" or (dtype == "fp32" and impl == "triton")


LAUNCHES = {"tune": of_tuning, "llama": of_heads, "correct": of_correct}


def launches(capability: int, which: Sequence[str] = tuple(LAUNCHES)) -> list[Launch]:
    """One launch of each kernel that is compiled for these parts of the first run."""
    with recorded(capability) as found:
        for name in which:
            LAUNCHES[name](capability)
    return [*found.values()]


# -- compiling, packing ------------------------------------------------------------------------------------------------

_queue: list[Launch] = []  # inherited by the processes that compile


def compile_one(at: int) -> tuple[int, str | None]:
    """(1 if it had to be compiled, else 0; what the compiler said against it) of a launch in `_queue`."""
    kernel, args, kwargs = _queue[at]
    made: list[bool] = []
    with mock.patch.object(knobs.compilation, "listener", lambda *, cache_hit, **known: made.append(not cache_hit)):
        try:
            compiled = kernel.warmup(*args, grid=(1,), **kwargs)
            if hasattr(nvidia, "make_launcher"):  # C, compiled for each signature: not in every version of Triton
                nvidia.CudaLauncher(compiled.src, compiled.metadata)
        except Exception as error:  # a candidate that this target can't have is a result of `tune`, too
            return sum(made), f"{kernel.__name__}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return sum(made), None


def fill(capability: int, which: Sequence[str] = tuple(LAUNCHES), processes: int = 1) -> tuple[int, int, list[str]]:
    """Compile into TRITON_CACHE_DIR what isn't there: (launches, compiled, refused). Ends with the GPU that isn't there
    as Triton's driver, so it wants a process of its own."""
    _queue[:] = launches(capability, which)
    driver.set_active(Absent(capability))
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(
        processes, without_libcuda, (folder,)
    ) as pool:  # fmt: skip
        found = pool.map(compile_one, range(len(_queue)), chunksize=1)
    return len(found), sum(made for made, _ in found), [why for _, why in found if why is not None]


def without_libcuda(folder: str) -> None:
    """Launchers are linked with the driver's library; one of that name with empty functions is enough for it."""
    stub = Path(folder) / str(os.getpid()) / "libcuda.so.1"
    stub.parent.mkdir()
    text = Path(nvidia.dirname, "driver.c").read_text() + Path(nvidia.__file__).read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", text)))
    stub.with_suffix(".c").write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    link = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([os.environ.get("CC", "cc"), *link, "-o", stub, stub.with_suffix(".c")], check=True)
    knobs.nvidia.libcuda_path = str(stub.parent)
    build._load_module_from_path = lambda name, path: mock.MagicMock()  # it is for where there is a GPU
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaUtils()


def pack(file: Path) -> None:
    """TRITON_CACHE_DIR without what only its readers want, and the key of this Triton."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "triton_key").write_text(triton_cache.triton_key())
        with tarfile.open(file.with_suffix(".new"), "w:gz") as tar:
            tar.add(Path(folder) / "triton_key", "triton_key")
            root = Path(knobs.cache.dir)
            for path in sorted(root.rglob("*")):
                if path.suffix in (".cubin", ".json", ".so"):
                    tar.add(path, path.relative_to(root))
    os.replace(file.with_suffix(".new"), file)


def unpack(file: Path) -> str:
    """Into TRITON_CACHE_DIR, whose files name each other by their paths; what came of it, in a sentence."""
    root = Path(knobs.cache.dir)
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        tar.extractall(root, filter="data")
    for path in root.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
    kernels = len([*root.glob("*/*.cubin")])
    if (root / "triton_key").read_text() != triton_cache.triton_key():
        return f"{kernels} kernels of another build of Triton or Python: none of them will be found"
    return f"{kernels} kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Fill and pack, or unpack."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cache", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, action="append", help="compute capability, as 90; again for more")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pack for another machine; default: TRITON_CACHE_DIR")
    parser.add_argument("--list", action="store_true", help="only count them")
    parser.add_argument("--only", choices=tuple(LAUNCHES), action="append", help="again for more; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="into TRITON_CACHE_DIR")
    a = parser.parse_args(argv)
    if a.unpack is not None:
        print(unpack(a.unpack))
        return 0
    torch.set_num_threads(1)
    which = a.only or tuple(LAUNCHES)
    for arch in a.arch or (80, 90, 100, 120):
        if a.list:
            print(f"sm_{arch}: {len(launches(arch, which))} kernels")
            continue
        if a.out is not None:
            a.out.mkdir(parents=True, exist_ok=True)
            knobs.cache.dir = str((a.out / f"sm_{arch}").absolute())
        known, made, refused = fill(arch, which, a.processes)
        if a.out is not None:
            pack(a.out / f"sm_{arch}.tgz")
        for why in refused:
            say(f"sm_{arch}: refused: {why}")
        print(f"sm_{arch}: {known} kernels, {made} compiled, {len(refused)} refused, in {knobs.cache.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
