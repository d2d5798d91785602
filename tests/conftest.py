"""Shared settings: one thread for tiny tensors, deterministic, memory from `torch.empty` poisoned with NaN.

What isn't asked for is deselected: tests marked `full` without `--full`, tests marked `gpu` without `-m gpu` or a GPU,
tests marked `real` without `-m real`, tests marked `deepspeed` without DeepSpeed.
`pytest -m gpu` runs in a bare checkout, on a machine that has torch, triton and pytest alone.
"""

import json
import os
import sys
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

import covering
import pytest
import torch

ROOT = Path(__file__).parents[1]


class Kernels:
    """Finds `rgpb.kernels` where the package isn't installed: the folder stands beside `rgpb`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "rgpb.kernels":
            place = ROOT / "kernels"
            return spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])


sys.meta_path.append(Kernels)  # the last to be asked: an installed package comes first

torch.set_num_threads(1)

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]  # a process of its own
if find_spec("torchao") is None or find_spec("bitsandbytes") is None:
    collect_ignore.append("test_quantised.py")  # `make full-quantised` has them on the path


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Deterministic algorithms fill uninitialised memory with NaN, so that an element nobody wrote shows. Nothing is
    as somebody tuned it here."""
    from rgpb.engine import chunks, plan

    monkeypatch.setattr(chunks, "tuned_limits", lambda threads: None)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    for planned in (chunks.chunks, plan._fastest):  # by constants that the test may have changed
        planned.kept.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is cached for a user is cached for these tests alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ranks(own_cache):
    """`ranks(n)`: n processes of torch.distributed (tests/ranks.py), the same ones for all tests of a worker."""
    from ranks import Ranks

    pools = {}

    def of(world):
        if world not in pools or not pools[world].alive:
            pools[world] = Ranks(world)
        return pools[world]

    yield of
    for pool in pools.values():
        pool.close()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the tests marked full; whole products of parameters")
    parser.addoption("--share", metavar="I/N", help="of N processes side by side the tests of number I, from 0")
    parser.addoption("--write-receipts", action="store_true", help="keep what test_targets.py finds: `make receipts`")


def pytest_configure(config):
    covering.FULL = config.getoption("--full")


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu` files without such tests aren't imported: what they import needn't be there."""
    if config.getoption("-m") == "gpu" and collection_path.match("test_*.py"):
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


NO_GPU = "-m gpu: there is no GPU that torch can use here, so every test is deselected and nothing was checked"


def pytest_report_header(config):
    rows = "whole products" if covering.FULL else f"covering arrays, seed {covering.SEED}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [f"parameters: {rows}; {gpu}"]
    return lines + [NO_GPU] * (config.getoption("-m") == "gpu" and not torch.cuda.is_available())


def pytest_collection_modifyitems(config, items):
    left_out = set()
    if not config.getoption("--full"):
        left_out.add("full")
    if "gpu" not in config.getoption("-m") or not torch.cuda.is_available():
        left_out.add("gpu")
    if "real" not in config.getoption("-m"):
        left_out.add("real")
    if find_spec("deepspeed") is None:
        left_out.add("deepspeed")
    dropped = [item for item in items if left_out.intersection(mark.name for mark in item.iter_markers())]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
    if share := config.getoption("--share"):
        at, processes = map(int, share.split("/"))
        items[:] = items[at::processes]


def pytest_terminal_summary(terminalreporter, config):
    """That there is no GPU; and the receipts of all compiled kernels into one file, unless a test failed. Here, since
    workers can't do that."""
    if config.getoption("-m") == "gpu" and not torch.cuda.is_available():
        terminalreporter.write_line(NO_GPU)  # also with -q, which has no header
    stats = terminalreporter.stats
    if not config.getoption("--write-receipts") or stats.get("failed") or stats.get("error"):
        return
    import test_targets

    found = [p for report in stats.get("passed", ()) for p in report.user_properties if p[0] == "receipt"]
    lines = [f"  {json.dumps(name)}: {json.dumps(made)}" for _, (name, made) in sorted(found, key=lambda p: p[1][0])]
    head = f'{{"triton": "{test_targets.triton.__version__}", "sources": "{test_targets.sources()}", "kernels": {{'
    Path(test_targets.__file__).with_name("receipts.json").write_text(head + "\n" + ",\n".join(lines) + "\n}}\n")
    terminalreporter.write_line(f"tests/receipts.json: {len(lines)} kernels")
