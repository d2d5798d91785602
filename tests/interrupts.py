"""`rgpb train`, broken off at random moments of all its stages, and given again; a program for tests/test_train.py.

    python tests/interrupts.py MOMENTS SEED FLAG…

Prints a line of JSON for each moment. Everything is imported once; each start is a fork of that.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from training import SMALL

from rgpb import cli
from rgpb.train import command, config, folder, report, run, trainer  # noqa: F401

STAGES = {
    **dict.fromkeys(("read_preferences", "tokenise", "make_tokenizer"), "tokenising"),
    "_fill": "reference",
    **dict.fromkeys(("training_step", "evaluate"), "training"),
    **dict.fromkeys(("_save_checkpoint", "on_save", "save_model", "save_whole_folder"), "saving"),
    "write": "report",
}
KINDS = ("SIGKILL", "SIGINT", "full", "unwritable", "limited", "SIGTERM")


class Moment:
    """Counts Python calls by stage; at the one that is asked for it lets happen what it is told."""

    def __init__(self, stage: str = "", number: int = -1, happens: Any = None) -> None:
        self.stage, self.number, self.happens = stage, number, happens
        self.counts = dict.fromkeys(["other", *STAGES.values()], 0)
        self.within: list[tuple[FrameType, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            name = STAGES.get(frame.f_code.co_name)
            if name is not None and "rgpb" in frame.f_code.co_filename + str(frame.f_globals.get("__name__")):
                self.within.append((frame, name))
            now = self.within[-1][1] if self.within else "other"
            self.counts[now] += 1
            if now == self.stage and self.counts[now] == self.number:
                self.happens()
        elif event == "return" and self.within and self.within[-1][0] is frame:
            self.within.pop()


def start(flags: list[str], moment: Moment | None = None) -> tuple[int, str, Any]:
    """The command in a fork: its exit code, or minus the signal it died of; what it said on stderr; calls by stage, and
    modules that it has imported."""
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(pipes[0][1], 2)
            heed_permissions()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            sys.setprofile(moment)
            code = cli.main(["train", *flags])
        except BaseException:
            sys.setprofile(None)
            traceback.print_exc()
            code = 71
        finally:
            sys.setprofile(None)
            os.write(pipes[1][1], json.dumps([moment.counts if moment else {}, list(sys.modules)]).encode())
            sys.stderr.flush()
            os._exit(code)
    for _, theirs in pipes:
        os.close(theirs)
    said = ["", ""]
    for i in (1, 0):  # the longer first
        with open(pipes[i][0]) as pipe:
            said[i] = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said[0], json.loads(said[1] or "null")


def heed_permissions() -> None:
    """Take from root the right to write everywhere (CAP_DAC_OVERRIDE)."""
    if os.getuid() == 0:
        libc, head, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(head, sets)
        for i in range(3):
            sets[i] &= ~(1 << 1)
        libc.capset(head, sets)


def fill(output: Path) -> None:
    """Leave no byte free where the output has a file system of its own."""
    if output.is_mount():
        with open(output / "ballast.tmp", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
    else:
        limit()


def limit() -> None:
    """Let no file grow beyond its first byte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def lock(output: Path, mode: int) -> None:
    """All folders of a run with this mode."""
    for path in [output, *output.rglob("*")]:
        if path.is_dir():
            path.chmod(mode)


def ended(output: Path) -> dict[str, Any]:
    """What a run has come to."""
    apart = ("seconds", "peak_bytes")
    lines = [{k: v for k, v in line.items() if k not in apart} for line in report.read_metrics(output)]
    text = [line for line in (output / "report.md").read_text().splitlines() if "seconds" not in line]
    return {
        "weights": {
            name: x.numpy().tobytes().hex() for name, x in load_file(output / "model/model.safetensors").items()
        },
        "metrics": lines,
        "report": [line for line in text if "peak memory" not in line],
        "left": sorted(p.name for p in output.iterdir() if p.suffix == ".tmp" and p.name != "ballast.tmp"),
    }


def main(moments: int, seed: int, flags: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    config.BUILT_IN["tiny-llama"] = ("LlamaConfig", SMALL)
    report.plot = lambda runs, path: report.write_text(path, "a picture")
    place = Path(tempfile.mkdtemp(prefix="interrupts-"))
    draw = random.Random(seed)

    def given(name: str) -> tuple[Path, list[str]]:
        """A folder of its own, on a file system of its own where that can be had."""
        output = place / name
        output.mkdir()
        size = ["-t", "tmpfs", "-o", "size=16m", "tmpfs", str(output)]
        if os.getuid() == 0 and shutil.which("mount"):
            subprocess.run(["mount", *size], check=False, capture_output=True)
        return output, [*flags, "--output", str(output / "run"), "--ref-cache", str(output / "cache")]

    try:
        _, command_line = given("warm")
        code, said, (_, imported) = start(command_line)
        assert code == 0, said
        for name in imported:
            if name.partition(".")[0] in ("transformers", "accelerate", "matplotlib", "torch", "rich", "rgpb"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        output, command_line = given("whole")
        code, said, (counts, _) = start(command_line, Moment())
        assert code == 0, said
        whole = ended(output / "run")
        stages = [stage for stage in counts if counts[stage]]
        for number in range(moments):
            lap, place_in = divmod(number, len(KINDS))
            kind, stage = KINDS[place_in], stages[(place_in + lap + 3) % len(stages)]
            at = draw.randint(1, counts[stage] - counts[stage] // 50)  # it differs a little from start to start
            output, command_line = given(f"run-{number}")
            run_folder = output / "run"
            happens = {
                "SIGKILL": partial(signal.raise_signal, signal.SIGKILL),
                "SIGINT": partial(signal.raise_signal, signal.SIGINT),
                "SIGTERM": partial(signal.raise_signal, signal.SIGTERM),
                "full": partial(fill, output),
                "limited": limit,
                "unwritable": partial(lock, output, 0o555),
            }[kind]
            code, said, _ = start(command_line, Moment(stage, at, happens))
            (output / "ballast.tmp").unlink(missing_ok=True)
            lock(output, 0o777)
            again, then, _ = start(command_line)
            found = ended(run_folder) if again == 0 else {}
            same = [name for name in whole if found.get(name) == whole[name]]
            line = {"kind": kind, "stage": stage, "at": f"{at} of {counts[stage]}", "code": code, "said": said}
            print(json.dumps({**line, "again": again, "then": then, "same": same}), flush=True)
            if output.is_mount():
                subprocess.run(["umount", str(output)], check=False)
    finally:
        for path in place.iterdir():
            if path.is_mount():
                subprocess.run(["umount", str(path)], check=False)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
