"""`python -m benchmarks.gpu` on a CPU, at tiny shapes: what it checks, what it records, and that it goes on."""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import shutil
import signal as signals
import subprocess
import sys
import tarfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import test_gpu
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ isn't installed

from benchmarks import language, longest, trainer_step
from benchmarks.gpu import calls, journal, peers, skipping
from benchmarks.gpu.__main__ import PARTS, main, parse_case
from rgpb import LMHead, bench, hf, reference
from rgpb.bench import contest, tables
from rgpb.bench.contest import LOG_PROB, SCORES, Shape, kind_of, make_batch
from rgpb.bench.measure import Result
from rgpb.kernels import why_not

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="expects Triton to be refused on a CPU"
)

# V off every tile; compilers and a second workspace take too long here
needs_bash = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and coreutils")
OPTIONS = ("--device", "cpu", "--rounds", 1, "--workspace", "1MiB", "--cap", 64)
CPP = why_not("cpp", torch.device("cpu"))


def suite(folder, part, *more, shape="tiny=64,32,257"):
    return main([str(a) for a in (*OPTIONS, "--shape", shape, "--out", folder, "--part", part, *more)])


def content(folder, part):
    """The JSON of a part and the keys of its lines."""
    lines = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
    return json.loads((folder / f"{part}.json").read_text()), [line["key"] for line in lines if "key" in line]


def served(status):
    """Whether the C++ kernels did it where they are, and where they aren't said why."""
    return status == "ok" if CPP is None else status.startswith("refused: ") and CPP in status


def rendered(path, capsys):
    """What `rgpb bench --render` prints."""
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["bench", "--render", str(path)])
    capsys.readouterr()
    assert arguments.run(arguments) == 0
    return capsys.readouterr().out


# -- parts -------------------------------------------------------------------------------------------------------------


def test_calls(tmp_path, capsys):
    """All who do a job stand together, each beside bare products and naive PyTorch; who isn't installed says so."""
    assert suite(tmp_path, "cpu", "--without", r"compiled \|") == 0
    made, keys = content(tmp_path, "cpu")
    rows = tables.read(tmp_path / "cpu.json").rows
    assert len(rows) == len(keys) == len({*keys})
    assert {row.dtype for row in rows} == {"fp32"}
    assert [*dict.fromkeys((row.loss, kind_of(row.path)) for row in rows)] == [*peers.JOBS]
    assert {row.status for row in rows if row.kernels == "torch" or row.impl == "naive"} == {"ok"}
    assert {row.kernels for row in rows} == {None, "cpp", "torch"}  # Triton's are for a GPU
    assert all(served(row.status) for row in rows if row.kernels == "cpp")
    for row in rows:
        assert (row.seconds is None) == (row.status != "ok")
        if row.status == "ok":
            assert row.seconds_20 <= row.seconds <= row.seconds_80
            assert row.over_floor > 0
            assert row.peak_bytes > 0
            assert row.value_error is not None
            assert row.rounds == 1
            assert (row.over_naive is None) == (row.impl == "naive")
    for impl, module in (("Liger", "liger_kernel"), ("CCE", "cut_cross_entropy"), ("TRL", "trl")):
        statuses = {row.status for row in rows if row.impl == impl}
        assert statuses == {f"not installed: {module}"} or journal.installed(module)
    assert {"torch", "triton", "commit", "date", "rounds"} <= set(made["provenance"])
    shown = rendered(tmp_path / "cpu.json", capsys)
    assert shown.startswith("**tiny: N = 64, H = 32, V = 257, fp32**")
    assert shown.count("\n| ") == 2 + len(rows)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_soft_cap_in_bfloat16(tmp_path):
    """The case is another, and who has no soft-cap says so."""
    only = ("--only", r"(bnf|mle).*(naive|torch|F\.linear)")
    assert suite(tmp_path, "others", *only, shape="capped=64,32,257,2") == 0
    rows = tables.read(tmp_path / "others.json").rows
    assert {(row.case, row.dtype) for row in rows} == {("capped, soft-cap 2", "bf16")}
    assert {row.status for row in rows if row.kernels == "torch" or row.impl == "naive"} == {"ok"}
    without = {row.status for row in rows if row.impl == "F.linear_cross_entropy"}
    assert all(status.startswith(("refused: ", "not installed: ")) for status in without)


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_no_time_for_a_wrong_result(wrong, tmp_path, monkeypatch):
    graded = contest.graded

    def broken(value, *inputs):
        value, gradients = graded(value, *inputs)
        if wrong == "gradient":
            return Result(value, (gradients[0], *(g * 1.5 for g in gradients[1:])))
        return Result(value + (0.5 if wrong == "value" else torch.nan), gradients)

    monkeypatch.setattr(contest, "graded", broken)
    assert suite(tmp_path, "llama", "--only", r"mle \| full \| (naive|fused \| single \| torch)") == 1
    rows = tables.read(tmp_path / "llama.json").rows
    assert [(row.impl, row.status) for row in rows] == [("naive", "FAILED"), ("fused", "FAILED")]
    assert {(row.seconds, row.over_floor, row.over_naive, row.peak_bytes) for row in rows} == {(None,) * 4}


def test_kernels(tmp_path):
    """Triton's are refused on a CPU, and interpreted in tests/interpreted; the library's product is the library's."""
    assert suite(tmp_path, "kernels") == 0
    product, *others = content(tmp_path, "kernels")[0]["rows"]
    assert product["kernel"] == "product"
    assert (product["status"], product["flops"]) == ("ok", 2 * 64 * 32 * 257)
    assert product["bytes"] == 2 * 32 * (64 + 257) + 4 * 64 * 257
    assert product["share_of_copy"] > 0
    assert all(row["status"].startswith("refused: impl: ") and row["seconds"] is None for row in others)


STEPS = ("--only", " 16 ")


def test_steps(tmp_path):
    assert suite(tmp_path, "steps", *STEPS) == 0
    rows = content(tmp_path, "steps")[0]["rows"]
    assert [(row["loss"], row["impl"]) for row in rows] == [
        (loss, impl) for loss in ("bnf", "dpo") for impl in ("naive", "fused")
    ]
    for row, naive in zip(rows, [rows[0], rows[0], rows[2], rows[2]]):
        assert row["status"] == "ok"
        assert row["value"] == pytest.approx(row["expected"], abs=1e-5)
        assert row["gradient_norm"] == pytest.approx(naive["gradient_norm"], rel=1e-4)
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["over_naive"] == (None if row is naive else row["seconds"] / naive["seconds"])
    assert suite(tmp_path, "steps", *STEPS) == 0  # nothing more to do
    assert content(tmp_path, "steps")[0]["rows"] == rows


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_no_time_for_a_wrong_step(wrong, tmp_path, monkeypatch):
    """And the next row has a model without its NaN."""
    right = hf.loss

    def broken(model, batch, loss, **more):
        value = right(model, batch, loss, **more)
        if loss == "dpo":
            return value
        if wrong == "gradient":
            return 1.01 * value - 0.01 * value.detach()
        return value * torch.nan if wrong == "nan" else value + 1e-3

    monkeypatch.setattr(hf, "loss", broken)
    assert suite(tmp_path, "steps", *STEPS) == 1
    rows = content(tmp_path, "steps")[0]["rows"]
    assert [row["status"] for row in rows] == ["ok", "FAILED", "ok", "ok"]
    assert rows[1]["seconds"] is rows[1]["over_naive"] is None


def test_longest(tmp_path, capsys):
    assert suite(tmp_path, "longest") == 0
    made, _ = content(tmp_path, "longest")
    for row in made["rows"]:
        if row["impl"] == "naive" or row["kernels"] == "torch":
            assert (row["tokens"], row["capped"], row["status"]) == (64, True, "ok")
        else:
            assert served(row["status"])
            assert row["tokens"] == (64 if CPP is None else None)
    assert "| tiny | 32 | 257 | bnf | naive | " in rendered(tmp_path / "longest.json", capsys)


def test_skip(tmp_path, capsys):
    assert suite(tmp_path, "skip", "--only", r"bnf \| torch \| (None|0.01)") == 0
    made, _ = content(tmp_path, "skip")
    plain, *others = made["rows"]
    assert plain["status"] == "ok"
    assert plain["seconds"] > 0
    for row in others:  # a version without skipping, or an implementation without it, refuses
        assert row["status"] == "ok" or row["status"].startswith("refused: ")
        assert row["status"] != "ok" or (0 <= row["share"] <= 1 and row["off"] is not None)
    assert "| bnf | torch |" in rendered(tmp_path / "skip.json", capsys)


def write_sources(folder, count=120):
    """Files of nonsense that is easy to learn, and one in a folder of tests."""
    for at in range(count):
        lines = [f"def function_{at}_{line}(x):\n    return x + {line % 7}\n" for line in range(30)]
        (folder / "package").mkdir(parents=True, exist_ok=True)
        (folder / "package" / f"module_{at}.py").write_text("\n".join(lines))
    (folder / "package" / "tests").mkdir()
    (folder / "package" / "tests" / "test_module.py").write_text("never to be read\n" * 100)
    return folder


TRAINED = ("--steps", 8, "--only", r"mle \| torch \| (None|auto)")


def trained(folder, *more, text):
    return suite(folder, "trained", "--text", text, *TRAINED, *more, shape="text=64,32,400")


@pytest.mark.full
def test_skipping_on_a_trained_model(tmp_path, capsys):
    text = write_sources(tmp_path / "text")
    assert trained(tmp_path, text=text) == 0
    made, keys = content(tmp_path, "trained")
    assert {row["status"] for row in made["rows"]} == {"ok"}
    assert [row["steps"] for row in made["rows"]] == [steps for steps in (0, 2, 4, 6, 8) for _ in range(3)]
    perplexities = [row["perplexity"] for row in made["rows"][::3]]
    assert perplexities[-1] < perplexities[0]
    for row in made["rows"]:
        assert (row["tokens"], row["width"], row["vocab"]) == (64, 32, row["vocab"])
        assert 258 <= row["vocab"] <= 400
        all_of, left_out = {"single": (3, 2), "two_pass": (4, 3)}[row["path"]]
        assert row["units"] == pytest.approx(all_of - left_out * (row["share"] or 0))
        assert row["tolerance"] is None or row["off"] <= row["certified"] + 1e-6
    assert "| 0 | " in rendered(tmp_path / "trained.json", capsys)
    model = tmp_path / "language-model" / "run" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    assert trained(tmp_path, text=text) == 0
    assert (model.stat().st_mtime_ns, content(tmp_path, "trained")[1]) == (before, keys)
    assert "15 rows, 0 of them new, 0 failed, 0 left" in capsys.readouterr().err
    assert trained(tmp_path, "--steps", 16, text=text) == 2
    assert "trained: not run: out: expected a model of this text and scale" in capsys.readouterr().err
    moved = tmp_path / "moved"  # with its model, which isn't trained again
    shutil.copytree(tmp_path / "language-model", moved / "language-model")
    assert trained(moved, "--only", r"after 8 .* mle \| torch \| None", text=text) == 0
    assert content(moved, "trained")[0]["rows"][0]["perplexity"] == perplexities[-1]
    other = tmp_path / "other"  # a model that is there, on other text
    assert trained(other, "--model", tmp_path, text=text / "package") == 2
    message = f"model: expected a folder with a transformers model and its tokenizer, got {tmp_path} ("
    assert message in capsys.readouterr().err
    assert trained(other, "--model", model.parent, text=text / "package") == 0
    row = content(other, "trained")[0]["rows"][0]
    assert "steps" not in row
    assert row["perplexity"] < perplexities[0]


def test_rows_of_another_device_are_no_rows_of_this_one(tmp_path, capsys):
    assert suite(tmp_path, "kernels") == 0
    path = tmp_path / "kernels.jsonl"
    path.write_text(path.read_text().replace('"device": "CPU"', '"device": "NVIDIA H200"'))
    assert suite(tmp_path, "kernels") == 2
    message = "kernels: not run: out: expected results of CPU, got those of NVIDIA H200 in "
    assert message in capsys.readouterr().err


def test_a_part_whose_modules_are_missing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.steps", None)
    assert suite(tmp_path, "steps", "--part", "kernels") == 2
    assert (tmp_path / "kernels.json").exists()  # the others are run
    assert "steps: not run, as it needs what `pip install rgpb[hf]` brings" in capsys.readouterr().err


def test_too_little_text_is_known_before_the_training(tmp_path, capsys):
    text = write_sources(tmp_path / "text")
    assert suite(tmp_path, "trained", "--text", text, *TRAINED, shape="text=65536,32,400") == 2
    assert re.search(r"text: expected 512 held-out pieces of more than 128 tokens, got \d+", capsys.readouterr().err)
    assert not (tmp_path / "language-model").exists()


def test_the_text_that_is_read(tmp_path):
    folder = write_sources(tmp_path)
    train, held_out, digest = language.read_corpus((folder,), 1 << 20)
    assert not any("never" in text for text in [*train, *held_out])
    assert all(len(text) < 2 * language.PIECE and text.startswith(("def", "    ", "\n")) for text in train)
    names = [{text.partition("function_")[2].partition("_")[0] for text in part} for part in (train, held_out)]
    assert names[1]
    assert not names[0] & names[1]  # a file is in one part
    assert language.read_corpus((folder,), 1 << 20) == (train, held_out, digest)
    total = sum(path.stat().st_size for _, path in language.files((folder,)))
    train, held_out, _ = language.read_corpus((folder,), total // 2)
    assert 0.2 * total < sum(map(len, [*train, *held_out])) < 0.8 * total
    with pytest.raises(ValueError, match="text: expected files, or folders with .py"):
        language.read_corpus((tmp_path / "nowhere",), 100)
    with pytest.raises(ValueError, match="got 1 files with .* pieces to train on and"):
        language.read_corpus((folder / "package" / "module_3.py",), 1 << 20)


def test_who_comes_later_runs_beside_naive(tmp_path):
    """Its row is there, and stays as it is."""
    assert suite(tmp_path, "cpu", "--only", r"mle \| full \| naive") == 0
    first = content(tmp_path, "cpu")[0]["rows"]
    assert suite(tmp_path, "cpu", "--only", r"mle \| full \| (naive|fused \| single \| torch)") == 0
    rows = content(tmp_path, "cpu")[0]["rows"]
    assert [row["impl"] for row in rows] == ["naive", "fused"]
    assert rows[:1] == first
    assert rows[1]["over_naive"] > 0


def test_a_job_is_done_or_left_as_a_whole(tmp_path, capsys):
    only = ("--only", r"(mle|bnf) \| full \| (naive|fused \| single \| torch)")
    assert suite(tmp_path, "cpu", *only, "--minutes", 0) == 3
    made, keys = content(tmp_path, "cpu")
    assert (len(keys), made["left"]) == (2, 2)
    assert {row["loss"] for row in made["rows"]} == {"bnf"}
    assert suite(tmp_path, "cpu", *only) == 0
    assert len(content(tmp_path, "cpu")[1]) == 4


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    only = ("--only", r"(mle|dpo|bnf) \| full \| naive")
    assert suite(tmp_path, "llama", *only, "--minutes", 0) == 3  # one job, always
    made, keys = content(tmp_path, "llama")
    assert (len(keys), made["left"]) == (1, 2)
    assert "2 rows don't fit into 0 minutes" in capsys.readouterr().err
    assert suite(tmp_path, "llama", *only) == 0
    made, keys = content(tmp_path, "llama")
    assert (len(keys), made["left"], len(made["rows"])) == (3, 0, 3)
    assert [run["first_row"] for run in made["runs"]] == [0, 1]

    path = tmp_path / "llama.jsonl"
    whole = path.read_bytes()
    assert suite(tmp_path, "llama", *only) == 0  # nothing more to do
    assert path.read_bytes() == whole

    path.write_bytes(whole[:-20])  # killed while it wrote
    assert suite(tmp_path, "llama", *only) == 0
    made, again = content(tmp_path, "llama")
    assert again == keys
    assert made["rows"][-1]["status"] == "ok"


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "llama.jsonl").write_text("{}\n")
    assert suite(tmp_path, "llama") == 2
    assert "llama.jsonl, line 1: expected a row of this suite" in capsys.readouterr().err


def test_what_was_installed_since_is_run(tmp_path):
    log = journal.Journal(tmp_path, "part", journal.Settings("cpu"))
    log.add("there", {"status": "not installed: json"}, {})
    log.add("absent", {"status": "not installed: no_such_module"}, {})
    log.add("done", {"status": "refused: x"}, {})
    log = journal.Journal(tmp_path, "part", journal.Settings("cpu"))
    assert [log.done(key) for key in ("there", "absent", "done", "new")] == [False, True, True, False]


def test_a_broken_device_ends_the_run(tmp_path, monkeypatch):
    """The row that broke it is on record, and the next run does the rest."""
    monkeypatch.setattr(journal, "alive", lambda device: False)
    with pytest.raises(SystemExit, match="3"):
        suite(tmp_path, "kernels")
    assert len(content(tmp_path, "kernels")[0]["rows"]) == 1


def test_a_loss_of_log_probabilities_alone():
    batch = make_batch(Shape(32, 8, 61), torch.float64, "cpu")
    log_p = contest.log_probs(*batch.inputs("full"))
    for loss in ("dpo", "mle"):
        torch.testing.assert_close(peers.loss_of(batch.logp, loss, batch), contest.NAIVE[loss](log_p, batch))


def test_scores_with_a_gradient_for_each_token():
    batch, job = make_batch(Shape(32, 8, 61), torch.float64, "cpu"), contest.Job(SCORES, "full")
    truth = contest.exact(batch, job)
    assert truth.value == pytest.approx(contest.weighed(batch.logp, batch).item())
    assert truth.value.abs() > 1e-3
    run, plan = contest.fused(batch, job, "single", 1 << 20, impl="torch")
    assert plan.path == "two_pass"  # whose coefficients come from outside
    others = [peers.trl_head(batch, job)[0]] if journal.installed("trl") else []
    for made in [one() for one in (run, contest.naive(batch, job)[0], *others)]:
        assert max(contest.errors(made, truth)) < 1e-6


def test_a_capped_case_has_its_own_scores():
    plain, capped = (make_batch(Shape(32, 8, 61), torch.float32, "cpu", softcap=cap) for cap in (None, 2.0))
    head = LMHead(capped.weight.double(), softcap=2.0)
    logp = reference.token_scores(capped.hidden.double(), head, capped.target)["logp"]
    torch.testing.assert_close(capped.logp, logp.detach())
    assert (capped.logp - plain.logp).abs().max() > 0.1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_who_takes_part(device):
    """Naive first; every implementation of the device on every path; nobody twice."""
    kernels = {"cuda": {"torch", "triton", "tiled"}, "cpu": {"cpp", "torch"}}[device]
    whose = set()
    for job in peers.JOBS:
        found = peers.entries(job, (1, 2), device)
        assert found[0].impl == "naive"
        ours = {(entry.path, entry.kernels, entry.workspace) for entry in found if entry.impl == "fused"}
        paths = ("two_pass",) if job.loss == SCORES else peers.PATHS[job.kind]
        assert ours == {(path, name, w) for path in paths for name in kernels for w in (1, 2)}
        names = [(entry.impl, entry.path, entry.kernels, entry.workspace, entry.note) for entry in found]
        assert len(names) == len({*names})
        whose |= {entry.impl for entry in found}
    assert whose == {"naive", "compiled", "fused", "F.linear_cross_entropy", "Liger", "CCE", "TRL"}
    assert {job.loss for job in peers.JOBS} == {"bnf", "dpo", "mle", LOG_PROB, SCORES}


def test_a_dead_device_takes_no_other_along(tmp_path, monkeypatch):
    """Who broke it is on record; the rest of its job is left for the next run."""

    def breaks(*arguments, **more):
        monkeypatch.setattr(calls, "alive", lambda device: False)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(contest, "fused", breaks)
    log = journal.Journal(tmp_path, "part", journal.Settings("cpu", rounds=1, workspaces=(1 << 20,)))
    task = next(iter(calls.tasks(log, (("tiny", 16, 8, 61, None),), "fp32")))
    made = list(task.run(list(task.keys)))
    assert [row["status"] for _, row in made] == ["error: RuntimeError: an illegal memory access"]
    assert " | fused | single | " in made[0][0]


def test_the_peaked_batch_is_peaked():
    batch = skipping.peaked_batch(Shape(256, 64, 997), "cpu")
    assert batch.logp.exp().median() > 0.9
    assert (batch.logp < -1).any()
    most = batch.target.flatten().bincount().max()
    assert most > 10  # 256 tokens of 997 words


# -- the first run -----------------------------------------------------------------------------------------------------

FIRST_RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "first_run.sh"
FILES = {"results.tgz", "log.txt", "profile.txt", "verdict.md"}


def first_run(folder, *arguments, python, **variables):
    """The script as a process: dry, or with the tools in the folder of `python`, as on a GPU."""
    clean = {name: value for name, value in os.environ.items() if name not in ("DRY", "OUT", "PY", "TRITON_CACHE_DIR")}
    clean["PATH"] = f"{Path(python).parent}:{clean['PATH']}"
    variables = {"DRY": "1", "OUT": str(folder), "PY": str(python), "TMPDIR": str(folder.parent), **variables}
    command = ["bash", str(FIRST_RUN), *map(str, arguments)]
    with (folder.parent / "said.txt").open("w") as said:
        return subprocess.Popen(command, env=clean | variables, stdout=said, stderr=subprocess.STDOUT)


def parts_of(folder):
    """How each part ended, by the packed results."""
    with tarfile.open(folder / "results.tgz") as tar:
        lines = tar.extractfile("res/parts.tsv").read().decode().splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


@pytest.fixture
def python(tmp_path):
    """In place of Python: does nothing; `kernels` hangs, `tune` fails, and so does the verdict."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
case "$*" in
  -c*) exit ${UNFIT:-0} ;;
  *--verdict*) exit 1 ;;
esac
[ -n "$BROKEN" ] && exit 7
case "$*" in
  *"--part kernels"*) exec sleep 20 ;;
  *"--part tune"*) exit 7 ;;
esac
""")
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ -n "$NO_GPU" ] || echo NVIDIA RTX 4090, 8.9\n')
    for tool in ("ncu", "compute-sanitizer"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 0\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    return stub


@needs_bash
@pytest.mark.parametrize("dry", ["", pytest.param("1", marks=pytest.mark.full)])
def test_the_first_run_takes_no_part_along(dry, tmp_path, python):
    """One that hangs is killed at the end of its budget; without a verdict its place says how parts ended."""
    out = tmp_path / "out"
    assert first_run(out, 16, python=python, RESERVE="2", DRY=dry).wait(100) == 0
    assert {path.name for path in out.iterdir()} == FILES
    ended = parts_of(out)
    assert (ended.pop("kernels"), ended.pop("tune")) == ("124", "7")
    assert {*ended.values()} == {"0"}
    assert {*ended} == {
        "products", "rows", "tiles", "whole", "precompile", "ceilings", "llama", "profile", "steps",
        *(f"correct-{share}" for share in range(2 if dry else 8)),
    }  # fmt: skip
    assert ("on dry (sm_90)" if dry else "on nvidia-rtx-4090 (sm_89)") in (out / "log.txt").read_text()
    assert re.search(r"didn't come to its verdict.*tune\t7\t", (out / "verdict.md").read_text(), re.DOTALL)
    assert "end; no verdict came" in (out / "log.txt").read_text()


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("soon",), {}, "SECONDS: expected a whole number, got soon"),
        ((16, "third"), {}, "expected first or second, got third"),
        ((16,), {"NO_GPU": "1"}, "nvidia-smi: expected the name of a GPU, got none; DRY=1 runs on a CPU"),
        ((16,), {"UNFIT": "1"}, "PY: expected a Python with pytest, torch and triton, got "),
    ],
)
def test_what_a_first_run_refuses(arguments, variables, message, tmp_path, python):
    assert first_run(tmp_path / "out", *arguments, python=python, DRY="", **variables).wait(100) == 2
    assert message in (tmp_path / "said.txt").read_text()


@needs_bash
def test_a_second_run_goes_on(tmp_path, python, capsys):
    """Where the first ended, with what failed; the verdict names it."""
    out = tmp_path / "out"
    assert first_run(out, 16, python=python, RESERVE="2").wait(100) == 0
    assert first_run(out, 14, "second", python=python, RESERVE="2").wait(100) == 0
    log = (out / "log.txt").read_text()
    assert "ncu: exit 0" in log
    assert "memcheck: exit 0" in log
    assert log.count("kernels: exit 124") == log.count("tune: exit 7") == 2
    assert log.count("llama: exit 0") == 1
    with tarfile.open(out / "results.tgz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert main(["--out", str(tmp_path / "unpacked" / "res"), "--verdict"]) == 0
    verdict = capsys.readouterr().out
    assert "| kernels | KILLED" in verdict
    assert "| tune | FAILED with 7 |" in verdict
    assert "| llama | ok |" in verdict


@pytest.mark.full
@needs_bash
def test_a_second_run_keeps_the_order_of_the_first(tmp_path, python):
    """What is checked comes before what is timed."""
    out = tmp_path / "out"
    assert first_run(out, 16, python=python, RESERVE="2", BROKEN="1").wait(100) == 0
    first = (out / "log.txt").read_text()
    assert first_run(out, 14, "second", python=python, RESERVE="2").wait(100) == 0
    both = [
        [name.partition("-")[0] for name in re.findall(r"\] (\S+): exit", log) if name not in ("ncu", "memcheck")]
        for log in (first, (out / "log.txt").read_text().removeprefix(first))
    ]
    checked = {"products", "rows", "tiles", "whole", "precompile"}
    orders = [[*dict.fromkeys("checked" if name in checked else name for name in names)] for names in both]
    assert orders[0] == ["checked", "ceilings", "kernels", "tune", "llama", "profile", "correct", "steps"]
    assert orders[1] == orders[0]
    assert {*both[0]} == {*both[1]} > checked


@needs_bash
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_a_first_run_that_is_killed_leaves_what_was_done(signal, tmp_path, python):
    process = first_run(tmp_path / "out", 40, python=python, RESERVE="10")
    verdict = tmp_path / "out" / "verdict.md"  # the last of the four
    for _ in range(300):
        if verdict.exists() and "ceilings\t0" in verdict.read_text():
            break
        time.sleep(0.1)
    process.send_signal(getattr(signals, signal))
    process.wait(10)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert parts_of(tmp_path / "out")["ceilings"] == "0"
    assert "ceilings\t0" in verdict.read_text()


@needs_bash
@pytest.mark.full
def test_the_first_run_dry(tmp_path):
    """Every part on a CPU, at tiny shapes, interpreted."""
    out = tmp_path / "out"
    assert first_run(out, 3000, python=sys.executable).wait(3000) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert {*parts_of(out).values()} == {"0"}, (out / "verdict.md").read_text()
    verdict = (out / "verdict.md").read_text()
    assert "What is wrong" not in verdict
    assert "## scores | auto | tiled" in (out / "profile.txt").read_text()


def test_the_cases_of_correct_meet_every_head():
    cases, named = [*test_gpu.cases()], (test_gpu.IMPLS, test_gpu.DTYPES, test_gpu.HEADS)
    heads = {(impl, dtype, head) for impl, _, dtype, head, _, _ in cases if (impl, dtype) != ("tiled", "fp16")}
    assert heads == {given for given in product(*named) if given[:2] != ("tiled", "fp16")}


@pytest.fixture
def cache():
    """What compiles without a GPU."""
    pytest.importorskip("triton")
    from benchmarks.gpu import cache

    return cache


def test_the_launches_that_a_cache_is_made_of(cache):
    """Every kind of kernel, for a GPU that isn't there; and nothing is left of that GPU."""
    found = cache.launches(90, ("llama",))
    kernels = {"statistics_kernel", "gradients_kernel", "token_loss_kernel", "tiles_kernel", "merge_kernel"}
    assert kernels <= {kernel.__name__ for kernel, _, _ in found}
    assert any(isinstance(x, cache.TensorDescriptor) for _, args, _ in found for x in args)
    assert why_not("triton", torch.device("cpu"))


@pytest.mark.full
def test_a_cache_made_without_a_gpu(tmp_path):
    """The second time nothing is compiled, nor after it was packed and put elsewhere."""

    def made(*arguments, where=None):
        more = {} if where is None else {"TRITON_CACHE_DIR": str(where)}
        command = [sys.executable, "-m", "benchmarks.gpu.cache", *map(str, arguments)]
        root = Path(__file__).parents[1]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | more, cwd=root
        ).stdout

    given = ("--arch", 90, "--only", "llama", "--processes", 2)
    first = made(*given, "--out", tmp_path)
    known = re.match(r"sm_90: (\d+) kernels, \1 compiled, 0 refused", first)
    assert known, first
    assert f"{known[1]} kernels, 0 compiled, 0 refused" in made(*given, "--out", tmp_path)
    shutil.move(tmp_path / "sm_90", tmp_path / "gone")
    elsewhere = tmp_path / "elsewhere"
    assert made("--unpack", tmp_path / "sm_90.tgz", where=elsewhere) == f"{known[1]} kernels\n"
    assert f"{known[1]} kernels, 0 compiled, 0 refused" in made(*given, where=elsewhere)


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_correct_compiles_few_kernels(capability, cache):
    assert 20 < len(cache.launches(capability, ("correct",))) <= 90


@pytest.mark.parametrize(("room", "cap"), [(10_000, 1 << 20), (4096, 1 << 20), (1000, 1 << 20), (7, 64), (99, 64)])
def test_the_search_ends_within_an_eighth(room, cap):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        assert tokens % 2 == 0
        return tokens <= room

    found = calls.search(fits, cap)
    assert found <= room
    assert found == cap or room - found <= max(found / 8, 2)
    assert len(tried) == len({*tried})


def test_nothing_fits():
    assert calls.search(lambda tokens: False, 64) is None


def test_the_device_chooses_parts_and_workspaces(tmp_path, monkeypatch):
    ran = []

    def record(name, folder, settings):
        ran.append((name, settings.workspaces, settings.dtype))
        return journal.Outcome(0, 0)

    monkeypatch.setattr("benchmarks.gpu.__main__.run_part", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["--device", "cpu", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert ran == [("cpu", (512 * 2**20, 16 * 2**20), None)]
    ran.clear()
    assert main(["--out", str(tmp_path), "--dtype", "fp32"]) == 0
    assert {name for name, _, _ in ran} == {*PARTS} - {"cpu"}
    assert {(spaces, dtype) for _, spaces, dtype in ran} == {((512 * 2**20, 4 * 2**30), "fp32")}


def test_list_and_arguments(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)
    assert parse_case("a=2,3,4") == ("a", 2, 3, 4, None)
    assert parse_case("a=2,3,4,30") == ("a", 2, 3, 4, 30.0)
    for text in ("2,3,4", "a=3,4,5", "a=2,3", "a=2,3,4,x", "=2,3,4"):
        with pytest.raises(ValueError, match="expected N"):
            parse_case(text)
    for wrong in (["--part", "x"], ["--minutes", "-1"], ["--only", "("], [], ["--out", "x", "--shape", "a=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


def test_products_of_a_cpu(tmp_path, capsys, monkeypatch):
    """The table behind the plan's constants: each product in each shape, with what it ran on."""
    from benchmarks import products

    sizes = ["--width", "8", "--vocab", "5000", "--tokens", "64", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["products", *sizes, "--out", str(tmp_path)])
    products.main()
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["provenance"]["vocab"] == 5000
    found = {(row["product"], row["columns"], row["pad"]) for row in content["table"] if "columns" in row}
    assert {("logits", 1024, 0), ("logits", 5000, 0), ("dX", 5000, 0), ("slices of dW", 2048, 16)} <= found
    assert all(row["gflops"] > 0 for row in content["table"] if "rows" in row)
    assert sum(row["GB/s"] > 0 for row in content["table"] if "GB/s" in row) == 3
    calls = {row["product"]: row for row in content["table"] if "row kernels, %" in row}
    assert {"bnf single", "dpo two_pass", "log-prob forward"} <= set(calls)
    assert all(0 < row["row kernels, %"] + row["products, %"] <= 100 for row in calls.values())
    assert "slices of dW" in capsys.readouterr().out


def test_products_in_slices_are_the_products():
    from benchmarks import products

    x, weight = torch.randn(5, 8), torch.randn(70, 8)
    z, dweight = torch.empty(5, 70), torch.empty(70, 8)
    products.logits(x, weight, z, 16)
    torch.testing.assert_close(z, x @ weight.T)
    products.slices(x, weight, torch.empty(5, 40)[:, :32], dweight)
    torch.testing.assert_close(dweight, (x @ weight.T).T @ x)


def test_small_calls_and_growth(tmp_path, capsys, monkeypatch):
    from benchmarks import calls, growth

    monkeypatch.setattr(calls, "SHAPES", (Shape(8, 4, 32),))
    monkeypatch.setattr(growth, "SHAPES", {"N": [Shape(n, 8, 128) for n in (8, 16)], "V": [Shape(8, 8, 128)]})
    for program, more in ((calls, ["--threads", "1"]), (growth, ["--threads", "1", "--workspace", "16"])):
        monkeypatch.setattr("sys.argv", ["x", "--rounds", "1", *more, "--out", str(tmp_path / program.__name__)])
        program.main()
    small, grown = (json.loads(path.read_text())["table"] for path in sorted(tmp_path.glob("*/results.json")))
    assert [row["call"] for row in small] == ["BNF step", "scores"]
    assert all(row["rgpb"] > 0 and row["over"] > 0 for row in small)
    assert [(row["grows"], row["N"]) for row in grown] == [("N", 8), ("N", 16), ("V", 8)]
    assert all(row["over the products"] > 0 for row in grown)
    assert (tmp_path / "benchmarks.growth" / "results.png").stat().st_size > 0


TINY = (320, 32, 48, 2, 4, 2, 64)


def in_place(work, limit=None):
    """`apart`, in this process."""
    return trainer_step.Ended("ok", work())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
def test_a_trainers_step(tmp_path, monkeypatch):
    """Who is right is timed, whole and from its hidden states; who isn't has a row that says so."""
    monkeypatch.setattr(trainer_step, "SMOLLM2", TINY)
    monkeypatch.setattr(trainer_step, "apart", in_place)
    wrong = trainer_step.Way("dpo", lambda model, pairs, loss: trainer_step.naive(model, pairs._replace(ref=0), loss))
    monkeypatch.setitem(trainer_step.WAYS, "naive, wrong", wrong)
    only = "TRL|accelerate|naive|bnf$|loss, dpo, kept, auto"
    sizes = ["--rounds", "1", "--batch", "2", "--length", "8", "--threads", "1"]
    trainer_step.main(["--only", only, *sizes, "--out", str(tmp_path)])
    rows = {row["way"]: row for row in json.loads((tmp_path / "results.json").read_text())["table"]}
    assert rows.pop("naive, wrong")["status"] == "FAILED"
    assert len(rows) == 7
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["gradient off"] < 1e-5
        assert min(row["step, ms"], row["loss part, ms"], row["step over TRL"], row["peak, MiB"]) > 0


@pytest.mark.full
def test_the_longest_pair(tmp_path, monkeypatch):
    """Up to the cap, where nothing is over the limit; the same command has nothing more to try."""
    monkeypatch.setattr(longest, "STEP", 8)
    for name in longest.GLIBC:  # given to the processes that try
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(longest, "apart", in_place)
    monkeypatch.setattr(longest, "JOBS", (("naive", "dpo"), ("rgpb, LoRA", "bnf")))
    trainer_step.random_model(None, TINY).save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--lengths", "8", "16", "--cap", "32", "--threads", "1"]
    for _ in range(2):
        longest.main([*given, "--out", str(tmp_path)])
        made = json.loads((tmp_path / "results.json").read_text())
        assert [(row["longest"], row["capped"]) for row in made["table"]] == [(32, True)] * 2
        assert {one["status"] for one in made["tries"]} == {"ok"}
        assert len(made["tries"]) == 8
        assert all(os.environ[name] == value == made["provenance"][name] for name, value in longest.GLIBC.items())
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.parametrize("most", [900, 2300, 5000, 21000, 70000])
def test_the_search_for_the_longest_pair(most):
    """It ends at the last multiple of 256 that fits."""
    a = argparse.Namespace(lengths=(2048, 4096), cap=65536, limit=8 * 2**30)
    each = (a.limit - 2**31) // most
    tries = []
    while (one := longest.next_try("rgpb", "dpo", tries, a)) is not None:
        assert one.length % 256 == 0
        peak = 2**31 + each * one.length
        over = peak > a.limit
        tries.append(one._replace(status="over the limit" if over else "ok", peak=None if over else peak))
    row = longest.row_of("rgpb", "dpo", tries, a)
    assert row["longest"] == min(most // 256 * 256, a.cap)
    assert row["capped"] == (most > a.cap)
    assert len(tries) == len(set(tries)) <= 12


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_process_is_ended_over_its_limit():
    times = partial(partial, operator.mul, b"x")
    assert trainer_step.apart(times(3), 2**31) == ("ok", b"xxx")
    assert trainer_step.apart(times(2**32), 2**30) == ("over the limit", None)
    assert trainer_step.apart(times(None)).status.startswith("error: TypeError")
