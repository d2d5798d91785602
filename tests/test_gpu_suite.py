"""`python -m benchmarks.gpu` on a CPU, at tiny shapes: what it checks, what it records, and that it goes on."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ isn't installed

from benchmarks.gpu import correct, device, heads, journal, language, lineup, skipping
from benchmarks.gpu.__main__ import PARTS, main, parse_case
from rgpb import LMHead, bench, reference
from rgpb.bench import cases, report
from rgpb.bench.cases import LOG_PROB, Result, Shape
from rgpb.kernels import why_not

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="expects Triton to be refused on a CPU"
)

# V off every tile; compilers and a second workspace take too long here
OPTIONS = ("--device", "cpu", "--rounds", 1, "--workspace", "1MiB", "--cap", 64)
WITHOUT = ("--without", r"compiled \|")
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


def test_heads(tmp_path, capsys):
    assert suite(tmp_path, "llama", *WITHOUT) == 0
    made, keys = content(tmp_path, "llama")
    rows = [report.Row(**row) for row in made["rows"]]
    assert len(rows) == len(keys) == len({*keys})
    jobs = {(row.loss, row.path) for row in rows if row.impl == "naive"}
    assert jobs == {(job.loss, job.kind) for job in lineup.JOBS}
    assert {row.status for row in rows if row.kernels == "torch" or row.impl in ("naive", "gemm")} == {"ok"}
    for row in rows:
        assert (row.seconds is None) == (row.status != "ok")
        assert (row.kernels is not None) == (row.impl == "fused")
        if row.status == "ok" and row.impl != "gemm":
            assert row.seconds_20 <= row.seconds <= row.seconds_80
            assert row.over_floor > 0
            assert row.peak_bytes > 0
            assert (row.over_naive is None) == (row.impl == "naive")
            assert row.value_error is not None
    assert {row.kernels for row in rows} == {None, "cpp", "torch"}  # Triton's are for a GPU
    assert all(served(row.status) for row in rows if row.kernels == "cpp")
    for impl, module in (("Liger", "liger_kernel"), ("CCE", "cut_cross_entropy"), ("TRL", "trl")):
        statuses = {row.status for row in rows if row.impl == impl}
        assert statuses == {f"not installed: {module}"} or journal.installed(module)
    assert {"capability", "driver"} & set(made["provenance"]) == set()
    assert {"torch", "triton", "commit", "date", "rounds"} <= set(made["provenance"])
    assert {point["loss"] for point in made["points"]} == {"bnf"}
    shown = rendered(tmp_path / "llama.json", capsys)
    assert shown.startswith("**tiny: N = 64, H = 32, V = 257, bf16**")
    assert "| bnf single | fused, torch, 1 MiB | " in shown
    assert shown.count("\n| ") == 2 + len(rows)
    assert (tmp_path / "llama.png").read_bytes().startswith(b"\x89PNG")


def test_the_heads_in_another_dtype(tmp_path):
    assert suite(tmp_path, "llama", "--dtype", "fp32", "--only", r"bnf \| full \| (naive|.*torch)") == 0
    rows = [report.Row(**row) for row in content(tmp_path, "llama")[0]["rows"]]
    assert {(row.dtype, row.status) for row in rows} == {("fp32", "ok")}
    assert max(row.gradient_error_relative for row in rows) < 1e-5


def test_a_soft_cap(tmp_path):
    """The case is another, and who has no soft-cap says so."""
    only = ("--only", r"(bnf|mle).*(naive|torch|F\.linear)")
    assert suite(tmp_path, "others", *only, shape="capped=64,32,257,2") == 0
    rows = [report.Row(**row) for row in content(tmp_path, "others")[0]["rows"]]
    assert {row.case for row in rows} == {"capped, soft-cap 2"}
    assert {row.status for row in rows if row.kernels == "torch" or row.impl == "naive"} == {"ok"}
    without = {row.status for row in rows if row.impl == "F.linear_cross_entropy"}
    assert all(status.startswith(("refused: ", "not installed: ")) for status in without)


def test_ceilings(tmp_path, capsys):
    assert suite(tmp_path, "ceilings") == 0
    made, _ = content(tmp_path, "ceilings")
    rates = {row["what"]: row["rate"] for row in made["rows"] if row["status"] == "ok"}
    assert {"copy, bytes/s", "product bf16, flop/s", "product fp32, flop/s"} <= set(rates)
    assert min(rates.values()) > 0
    assert "| copy, bytes/s | " in rendered(tmp_path / "ceilings.json", capsys)


def test_correct(tmp_path, capsys):
    """Trimmed to two losses, and the scores; no Triton on a CPU."""
    assert suite(tmp_path, "correct", "--only", r"(bnf|nll_pll|scores).* torch", shape="tiny=16,8,67") == 0
    made, _ = content(tmp_path, "correct")
    statuses = {(row["loss"], row["path"], row["dtype"], row["head"]): row["status"] for row in made["rows"]}
    assert len(statuses) == 3 * 3 * (2 * 4 + 2)
    assert set(statuses.values()) == {"ok", "plan: two_pass"}
    assert {key[1:3] for key, status in statuses.items() if status != "ok"} == {("single", "fp16")}
    assert all(row["same_twice"] for row in made["rows"] if row["status"] == "ok")
    shown = rendered(tmp_path / "correct.json", capsys)
    assert "| torch | two_pass | bf16 | 6 | 6 | 0 | " in shown


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
        assert row["units"] == (3 if row["tolerance"] is None else pytest.approx(4 - 2 * row["share"]))
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
    assert suite(tmp_path, "ceilings") == 0
    path = tmp_path / "ceilings.jsonl"
    path.write_text(path.read_text().replace('"device": "CPU"', '"device": "NVIDIA H200"'))
    assert suite(tmp_path, "ceilings") == 2
    message = "ceilings: not run: out: expected results of CPU, got those of NVIDIA H200 in "
    assert message in capsys.readouterr().err


def test_processes_share_a_part(tmp_path):
    """Each does its own rows; their lines one after the other are a journal in which nothing is left."""
    only = ("--only", r"plain \| bnf .* \| torch$")
    for share in range(3):
        assert suite(tmp_path / str(share), "correct", *only, "--share", f"{share}/3") == 0
    lines = [(tmp_path / str(share) / "correct.jsonl").read_text() for share in range(3)]
    assert all(lines)
    (tmp_path / "correct.jsonl").write_text("".join(lines))
    assert suite(tmp_path, "correct", *only) == 0
    made, keys = content(tmp_path, "correct")
    assert (tmp_path / "correct.jsonl").read_text() == "".join(lines)  # nothing was run again
    assert suite(tmp_path / "whole", "correct", *only) == 0
    assert {*keys} == {*content(tmp_path / "whole", "correct")[1]}
    assert len(made["rows"]) == len(keys)
    for bad in ("3/3", "1", "-1/2"):
        with pytest.raises(SystemExit):
            suite(tmp_path, "correct", f"--share={bad}")


def test_a_part_whose_modules_are_missing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.steps", None)
    assert suite(tmp_path, "steps", "--part", "ceilings") == 2
    assert (tmp_path / "ceilings.json").exists()  # the others are run
    assert "steps: not run, as it needs what `pip install rgpb[hf]` brings" in capsys.readouterr().err


def test_too_little_text_is_known_before_the_training(tmp_path, capsys):
    text = write_sources(tmp_path / "text")
    assert suite(tmp_path, "trained", "--text", text, *TRAINED, shape="text=65536,32,400") == 2
    assert re.search(r"text: expected 512 held-out pieces of more than 128 tokens, got \d+", capsys.readouterr().err)
    assert not (tmp_path / "language-model").exists()


def test_the_text_that_is_read(tmp_path):
    folder = write_sources(tmp_path)
    corpus = language.read_corpus((folder,), 1 << 20)
    assert not any("never" in text for text in [*corpus.train, *corpus.held_out])
    assert all(len(text) < 2 * language.PIECE and text.startswith(("def", "    ", "\n")) for text in corpus.train)
    names = [{text.partition("function_")[2].partition("_")[0] for text in part} for part in corpus[:2]]
    assert names[1]
    assert not names[0] & names[1]  # a file is in one part
    assert language.read_corpus((folder,), 1 << 20) == corpus
    total = sum(path.stat().st_size for _, path in language.files((folder,)))
    half = language.read_corpus((folder,), total // 2)
    assert 0.2 * total < sum(map(len, [*half.train, *half.held_out])) < 0.8 * total
    with pytest.raises(ValueError, match="text: expected files, or folders with .py"):
        language.read_corpus((tmp_path / "nowhere",), 100)
    with pytest.raises(ValueError, match="got 1 files with .* pieces to train on and"):
        language.read_corpus((folder / "package" / "module_3.py",), 1 << 20)


def test_a_head_that_is_no_weight_alone_is_refused(tmp_path, monkeypatch):
    text = write_sources(tmp_path / "text")
    assert trained(tmp_path, text=text) == 0
    start = tmp_path / "language-model" / "start"
    read_head = language.read_head
    monkeypatch.setattr(language, "read_head", lambda model: read_head(model)._replace(softcap=30.0))
    with pytest.raises(ValueError, match="model: expected a head of a weight alone, got LlamaForCausalLM's"):
        language.states_batch(start, start, ["x" * 5000], 8, "cpu")


def test_tune_stores_the_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "tune_row", lambda settings: {"status": "ok", "rows": [{"kernel": "rows", "ms": 1.5}]})
    assert suite(tmp_path, "tune") == 0
    assert "| kernel | ms |\n| --- | --- |\n| rows | 1.5 |" in capsys.readouterr().out


# -- on a CPU, all who do a job in the same rounds ---------------------------------------------------------------------

TOGETHER = ("--only", r"mle \| full \| (naive|F.cross|fused \| single \| torch)")


def test_the_cpu_part(tmp_path, capsys):
    assert suite(tmp_path, "cpu", *WITHOUT) == 0
    made, keys = content(tmp_path, "cpu")
    rows = [report.Row(**row) for row in made["rows"]]
    assert len(rows) == len(keys) == len({*keys})
    assert {row.dtype for row in rows} == {"fp32"}
    order = list(dict.fromkeys((row.loss, cases.naive_path(row.path)) for row in rows if row.impl != "gemm"))
    assert order == [(job.loss, job.kind) for job in lineup.JOBS]  # a job's rows stand together
    assert {row.status for row in rows if row.kernels == "torch" or row.impl in ("naive", "gemm")} == {"ok"}
    assert all(served(row.status) for row in rows if row.kernels == "cpp")
    for row in rows:
        assert (row.seconds is None) == (row.status != "ok")
        if row.status == "ok" and row.impl != "gemm":
            assert row.seconds_20 <= row.seconds <= row.seconds_80
            assert row.over_floor > 0
            assert row.rounds == 1
            assert (row.over_naive is None) == (row.impl == "naive")
    shown = rendered(tmp_path / "cpu.json", capsys)
    assert shown.startswith("**tiny: N = 64, H = 32, V = 257, fp32**")
    assert shown.count("\n| ") == 2 + len(rows)


def test_who_comes_later_runs_beside_naive(tmp_path):
    """Its row is there, and stays as it is."""
    assert suite(tmp_path, "cpu", "--only", r"mle \| full \| naive") == 0
    first = content(tmp_path, "cpu")[0]["rows"]
    assert suite(tmp_path, "cpu", *TOGETHER) == 0
    rows = content(tmp_path, "cpu")[0]["rows"]
    assert [row["impl"] for row in rows] == ["naive", "fused", "F.cross_entropy"]
    assert rows[:1] == first
    assert all(row["over_naive"] > 0 for row in rows[1:])


def test_a_job_is_done_or_left_as_a_whole(tmp_path, capsys):
    only = ("--only", r"(mle|bnf) \| full \| (naive|fused \| single \| torch)")
    assert suite(tmp_path, "cpu", *only, "--minutes", 0) == 3
    made, keys = content(tmp_path, "cpu")
    assert (len(keys), made["left"]) == (2, 2)
    assert {row["loss"] for row in made["rows"]} == {"bnf"}
    assert suite(tmp_path, "cpu", *only) == 0
    assert len(content(tmp_path, "cpu")[1]) == 4


def test_one_that_fails_in_the_rounds_takes_no_other_along(tmp_path, monkeypatch, capsys):
    """Then each is timed by itself; so far this one had come through."""
    cross_entropy = lineup.cross_entropy

    def tires(case, job, raised):
        run, calls = cross_entropy(case, job, raised)[0], []

        def tired():
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("no more")
            return run()

        return tired, None

    monkeypatch.setattr(lineup, "cross_entropy", tires)
    assert suite(tmp_path, "cpu", *TOGETHER) == 0
    rows = {row["impl"]: row for row in content(tmp_path, "cpu")[0]["rows"]}
    assert {impl: row["status"] for impl, row in rows.items()} == {
        "naive": "ok", "fused": "ok", "F.cross_entropy": "error: RuntimeError: no more",
    }  # fmt: skip
    assert rows["fused"]["over_naive"] > 0
    assert "one by one: error: RuntimeError: no more" in capsys.readouterr().err


def test_rounds_of_a_job_end_with_the_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "JOB_SECONDS", 0.0)
    assert suite(tmp_path, "cpu", *TOGETHER, "--rounds", 9) == 0
    assert {row["rounds"] for row in content(tmp_path, "cpu")[0]["rows"]} == {heads.LEAST_ROUNDS}


# -- no speed for a wrong result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_no_time_for_a_wrong_result(wrong, tmp_path, monkeypatch):
    graded = lineup.graded

    def broken(value, *inputs):
        value, gradients = graded(value, *inputs)
        if wrong == "gradient":
            return Result(value, (gradients[0], *(g * 1.5 for g in gradients[1:])))
        return Result(value + (0.5 if wrong == "value" else torch.nan), gradients)

    monkeypatch.setattr(lineup, "graded", broken)
    assert suite(tmp_path, "llama", "--only", r"mle \| full \| (naive|fused \| single \| torch)") == 1
    rows = [report.Row(**row) for row in content(tmp_path, "llama")[0]["rows"]]
    assert [row.impl for row in rows] == ["naive", "fused"]
    for row in rows:
        assert row.status == "FAILED"
        assert row.seconds is row.over_floor is row.over_naive is row.peak_bytes is None


def test_a_contestant_that_raises_has_its_reason(tmp_path, monkeypatch):
    """Others may fail as they like; an exception in this library that is no refusal counts as a failure."""

    def raises(*arguments, **keywords):
        raise RuntimeError("first line\n| second")

    monkeypatch.setattr(lineup, "cross_entropy", raises)
    only = ("--only", r"mle \| full \| (naive|F.cross|fused \| single \| torch)")
    assert suite(tmp_path / "a", "llama", *only) == 0
    assert content(tmp_path / "a", "llama")[0]["rows"][-1]["status"] == "error: RuntimeError: first line / second"
    monkeypatch.setattr(lineup, "fused_loss", raises)
    monkeypatch.setattr(lineup, "keywords", lambda kernels: {"impl": "torch"})
    assert suite(tmp_path / "b", "llama", *only) == 1


def test_statuses_of_exceptions():
    assert journal.explain(torch.OutOfMemoryError("x")) == "out of memory"
    assert journal.explain(ModuleNotFoundError("No module named 'x'", name="x")) == "not installed: x"
    assert journal.explain(ValueError("impl: expected\na GPU")) == "refused: impl: expected a GPU"
    assert journal.explain(TypeError("x")) == "error: TypeError: x"


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    only = ("--only", r"mle \| full \| (naive|F.cross)|products")
    assert suite(tmp_path, "llama", *only, "--minutes", 0) == 3  # one row, always
    made, keys = content(tmp_path, "llama")
    assert (len(keys), made["left"]) == (1, 6)
    assert "6 rows don't fit into 0 minutes" in capsys.readouterr().err
    assert suite(tmp_path, "llama", *only) == 0
    made, keys = content(tmp_path, "llama")
    assert (len(keys), made["left"], len(made["rows"])) == (7, 0, 7)
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
    log = journal.Journal(tmp_path, "part")
    log.add("there", {"status": "not installed: json"}, {})
    log.add("absent", {"status": "not installed: no_such_module"}, {})
    log.add("done", {"status": "refused: x"}, {})
    log = journal.Journal(tmp_path, "part")
    assert [log.done(key) for key in ("there", "absent", "done", "new")] == [False, True, True, False]


def test_a_broken_device_ends_the_run(tmp_path, monkeypatch):
    """The row that broke it is on record, and the next run does the rest."""
    monkeypatch.setattr(journal, "alive", lambda device: False)
    with pytest.raises(SystemExit, match="3"):
        suite(tmp_path, "ceilings")
    assert len(content(tmp_path, "ceilings")[0]["rows"]) == 1


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_answer_in_float64(softcap):
    """The sum over responses or pairs is the whole batch; masked positions, bias and soft-cap included."""
    x = correct.make_inputs((4, 7, 61, 8), "fp32", "bias", "cpu")
    head = x.head._replace(softcap=softcap)
    leaves = [p.detach().double().requires_grad_() for p in (x.hidden, head.weight, head.bias)]
    for loss in ("bnf", "dpo", "mle", "swepo"):
        formula, rewards = reference.LOSSES[loss], lineup.rewards_of(loss, x.target)
        ref, label = x.ref if formula.needs_ref else None, x.label if formula.needs_label else None
        size = None if rewards is None else 2
        exact_head = LMHead(leaves[1], leaves[2], softcap)
        whole = formula(leaves[0], exact_head, x.target, ref=ref, label=label, rewards=rewards, group_size=size)
        found = lineup.exact(loss, x.hidden, head, x.target, x.ref, x.label)
        torch.testing.assert_close(found.value, whole.detach())
        for one, other in zip(found.gradients, torch.autograd.grad(whole, leaves)):
            torch.testing.assert_close(one, other)


def test_a_loss_of_log_probabilities_alone():
    case = lineup.make_case("x", Shape(32, 8, 61), None, torch.float64, "cpu")
    log_p = cases.log_probs(*case.inputs("full"))
    for loss in ("dpo", "mle"):
        ours = lineup.loss_of(case.batch.logp, loss, case.batch)
        torch.testing.assert_close(ours, cases.NAIVE[loss](log_p, case.batch))


def test_a_capped_case_has_its_own_scores():
    plain, capped = (lineup.make_case("x", Shape(32, 8, 61), cap, torch.float32, "cpu") for cap in (None, 2.0))
    head = LMHead(capped.batch.weight.double(), softcap=2.0)
    logp = reference.token_scores(capped.batch.hidden.double(), head, capped.batch.target)["logp"]
    torch.testing.assert_close(capped.batch.logp, logp.detach())
    assert (capped.batch.logp - plain.batch.logp).abs().max() > 0.1
    above = capped.batch.logp > capped.batch.ref  # BNF's ratio is capped for some
    assert 0.2 < above.double().mean() < 0.8


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "bf16"), ("cpu", "fp32"), ("cpu", "bf16")])
def test_who_takes_part(device, dtype):
    """Naive first; every implementation of the device on every path; nobody twice."""
    kernels = {"cuda": {"torch", "triton chunked", "triton tiled"}, "cpu": {"cpp", "torch"}}[device]
    for job in lineup.JOBS:
        naive, *others = lineup.entries(job, (1, 2), device, dtype)
        assert naive.impl == "naive"
        ours = {(entry.path, entry.kernels, entry.workspace) for entry in others if entry.impl == "fused"}
        assert ours == {(path, name, w) for path in lineup.PATHS[job.kind] for name in kernels for w in (1, 2)}
        names = [(entry.impl, entry.path, entry.kernels, entry.workspace, entry.note) for entry in (naive, *others)]
        assert len(names) == len({*names})
    whose = {entry.impl for job in lineup.JOBS for entry in lineup.entries(job, (1,), device, dtype)}
    known = {"naive", "compiled", "fused", "F.cross_entropy", "F.linear_cross_entropy", "Liger", "CCE", "TRL"}
    assert whose == known | ({"quack"} if device == "cuda" else set())
    assert {job.loss for job in lineup.JOBS} == {"bnf", "dpo", "mle", LOG_PROB}


def test_the_peaked_batch_is_peaked():
    batch = skipping.peaked_batch(Shape(256, 64, 997), "cpu")
    assert batch.logp.exp().median() > 0.9
    assert (batch.logp < -1).any()
    most = batch.target.flatten().bincount().max()
    assert most > 10  # 256 tokens of 997 words


@pytest.mark.parametrize(("room", "cap"), [(10_000, 1 << 20), (4096, 1 << 20), (1000, 1 << 20), (7, 64), (99, 64)])
def test_the_search_ends_within_an_eighth(room, cap):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        assert tokens % 2 == 0
        return tokens <= room

    found = device.search(fits, cap)
    assert found <= room
    assert found == cap or room - found <= max(found / 8, 2)
    assert len(tried) == len({*tried})


def test_nothing_fits():
    assert device.search(lambda tokens: False, 64) is None


def test_rounds_end_with_the_seconds(monkeypatch):
    settings = journal.Settings("cpu", rounds=7)
    assert heads.timed({"a": lambda: None}, settings)[1] == 7
    monkeypatch.setattr(heads, "ROW_SECONDS", 0.0)
    assert heads.timed({"a": lambda: None}, settings)[1] == heads.LEAST_ROUNDS


# -- the command -------------------------------------------------------------------------------------------------------


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
