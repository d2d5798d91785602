"""Real processes for tests of several ranks: torch.distributed on gloo, started once and kept for many tests.

    def work(scale): ...                    # at the top of a module that can be imported
    results = ranks(2)(work, 3.0)           # in a test, by the fixture of tests/conftest.py; one result per rank

An error on any rank is raised with the traceback of each rank that failed; a rank that doesn't answer is named.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from typing import Any

PATIENCE = 300.0  # seconds until a rank that says nothing counts as hung


class Ranks:
    """`world` processes that wait for functions to call."""

    def __init__(self, world: int):
        self.world = world
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs, sys.path), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Any, *args: Any, **keywords: Any) -> list[Any]:
        """What `function(*args, **keywords)` returns on each rank."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args, keywords))
        answers, deadline = [], time.monotonic() + PATIENCE
        for pipe in self.pipes:
            try:
                said = (
                    pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else (False, "no answer: it hangs")
                )
            except EOFError:
                said = (False, "the process died")
            answers.append(said)
        failed = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(answers) if not fine]
        if failed:
            self.close()
            raise RuntimeError("\n".join(failed))
        return [what for _, what in answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, store: str, pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    here, of = str(rank), str(world)
    os.environ.update(RANK=here, LOCAL_RANK=here, WORLD_SIZE=of, LOCAL_WORLD_SIZE=of, OMP_NUM_THREADS="1")
    import importlib
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while True:
        try:
            module, name, args, keywords = pipe.recv()
        except EOFError:
            return
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            torch.manual_seed(0)
            answer = True, function(*args, **keywords)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
