"""`rgpb bench` and `rgpb plan`: the counters count what they say, and no speed is shown for a wrong result."""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rgpb import OBJECTIVES, LMHead, bench, linear_logprob
from rgpb.bench import contest, measure, tables, tune
from rgpb.bench import plan as plan_command
from rgpb.bench.contest import DTYPES, LOG_PROB, NAIVE, PATHS, Case, Contestant, Floor, Job, Shape, make_batch
from rgpb.bench.measure import Result, interleaved, peak_memory, quantiles
from rgpb.cli import main
from rgpb.engine import chunks as chunking
from rgpb.engine.chunks import tuned_limits
from rgpb.fused import dpo_loss
from rgpb.kernels import cpp_rows, tuned

MIB = 2**20
TINY = Shape(32, 8, 128)
# N = 128 tokens in float32 chunks far smaller than N: 8192 logits are 32 KiB a row
SMALL = Shape(256, 16, 8192)


def command(*arguments):
    """The exit code of `rgpb` with these arguments."""
    parser = argparse.ArgumentParser(prog="rgpb")
    subparsers = parser.add_subparsers(required=True)
    bench.add_parser(subparsers)
    plan_command.add_parser(subparsers)
    parsed = parser.parse_args([str(a) for a in arguments])
    return parsed.run(parsed)


# -- memory ------------------------------------------------------------------------------------------------------------


def known_peak():
    """Holds 3 MiB, then 2 + 4, then 4 + 1; the last, a gradient, is there before the 4."""
    a, b = torch.ones(MIB // 4), torch.ones(2 * MIB // 4)
    gradient = a + 1
    del a
    c = torch.ones(4 * MIB // 4)
    del b
    return Result(c[:1].clone(), (gradient,))


def test_peak_of_a_known_function():
    peak, extra = peak_memory(known_peak, "cpu")
    assert peak == 7 * MIB  # b, c, gradient
    assert extra == 6 * MIB  # b, c


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/clear_refs")
def test_peak_agrees_with_the_kernel():
    """Blocks of over 32 MiB are mapped and unmapped one by one, so the process's high-water mark shows them."""
    size = 40 * MIB

    def run():
        a = torch.ones(size // 4)
        b = a * 2
        del a
        return Result(b + 1, ())

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    counted = peak_memory(run, "cpu").peak
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    assert counted == pytest.approx(2 * size, abs=100)  # and a scalar
    assert abs(status("VmHWM") - before - counted) < 4 * MIB


def pairwise(*cases, full):
    """These cases, which cover every pair of values; the rest of the product is marked."""
    return [*cases, *(pytest.param(*rest, marks=pytest.mark.full) for rest in full if rest not in cases)]


EVERY = [(loss, path, dtype) for loss in NAIVE for path in PATHS[:3] for dtype in DTYPES]
EVERY += [(LOG_PROB, "forward", dtype) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("loss", "path", "dtype"),
    pairwise(
        ("bnf", "single", "fp32"), ("dpo", "two_pass", "fp32"), ("swepo", "single", "bf16"),
        ("mle", "frozen", "bf16"), ("bnf", "two_pass", "bf16"), (LOG_PROB, "forward", "bf16"), full=EVERY,
    ),
)  # fmt: skip
def test_memory_does_not_grow_with_the_tokens(loss, path, dtype):
    """Twice the tokens: naive holds twice as much; the library the same but for a few numbers per token."""
    job = Job(loss, contest.kind_of(path))
    # holds the float32 sum of dW and a part of N's logits; scores alone take less
    workspace = MIB // 4 if path == "forward" else 2 * MIB
    extra = {}
    for tokens in (SMALL.tokens, 2 * SMALL.tokens):
        batch = make_batch(SMALL._replace(tokens=tokens), DTYPES[dtype], "cpu")
        ours, plan = contest.fused(batch, job, path, workspace, impl="auto")
        assert plan.path == path
        assert plan.rows < SMALL.tokens
        naive, _ = contest.naive(batch, job)
        extra[tokens] = peak_memory(ours, "cpu").extra, peak_memory(naive, "cpu").extra
        foretold = plan_command.naive_bytes(tokens, SMALL.vocab, DTYPES[dtype].itemsize, gradient=path != "forward")
        assert extra[tokens][1] == pytest.approx(foretold, rel=0.01)
        assert extra[tokens][0] <= plan.extra_bytes + 256 * tokens
        assert plan.extra_bytes <= workspace
    (once, naive_once), (twice, naive_twice) = extra.values()
    assert twice - once <= 256 * SMALL.tokens  # numbers per token; one row of logits has 32768 bytes
    assert naive_twice > 1.9 * naive_once


@pytest.mark.parametrize(("dtype", "entropy"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_the_workspace_bounds_what_scores_hold(dtype, entropy):
    """Many slices of the vocabulary: what is kept of each doesn't add up."""
    workspace, tokens = 2 * MIB, 600
    hidden, weight = torch.randn(tokens, 16).to(dtype), torch.randn(64000, 16).to(dtype)
    target = torch.randint(64000, (tokens,))
    target[0] = -100

    def run():
        scores = linear_logprob(hidden, weight, target, entropy=entropy, workspace=workspace)
        return Result(scores.logp, ())

    assert peak_memory(run, "cpu").extra <= workspace + 256 * tokens


SIDES = (512, 64, None, False)  # the [rows, H] sides outweigh the logits
ENTROPY = (512, 64, None, True)  # the entropy's own sweeps
CAPPED = (16, 16384, 2.0, False)  # the soft-cap's temporaries outweigh all else


@pytest.mark.parametrize(
    ("path", "form", "dtype"),
    pairwise(
        ("single", CAPPED, torch.bfloat16), ("two_pass", CAPPED, torch.float32), ("frozen", SIDES, torch.bfloat16),
        ("two_pass", SIDES, torch.float32), ("single", ENTROPY, torch.bfloat16),
        full=[
            (path, form, dtype)
            for path in PATHS[:3] for form in (SIDES, ENTROPY, CAPPED) for dtype in (torch.float32, torch.bfloat16)
        ],
    ),
)  # fmt: skip
def test_the_workspace_bounds_what_is_held(path, form, dtype):
    """Odd shapes, and one masked token, so that rows are gathered."""
    width, vocab, softcap, entropy = form
    workspace, tokens = 8 * MIB, 6000 if vocab < 100 else 600
    hidden = torch.randn(2, tokens // 2, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(path != "frozen")
    target = torch.randint(vocab, hidden.shape[:2])
    target[0, 0] = -100

    def run():
        head = LMHead(weight, softcap=softcap)
        if entropy:
            scores = linear_logprob(hidden, head, target, entropy=True, workspace=workspace)
            value = scores.logp.sum() + scores.entropy.sum()
        else:
            reduction = "none" if path == "two_pass" else "mean"
            value = dpo_loss(hidden, head, target, ref=torch.zeros(2), reduction=reduction, workspace=workspace).sum()
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        return Result(value.detach(), torch.autograd.grad(value, wanted))

    assert peak_memory(run, "cpu").extra <= workspace + 256 * tokens


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("loss", NAIVE)
def test_naive_equals_the_oracle(loss, softcap):
    """Sign and scale of the formulas; in float64, so that nothing but the formula can differ."""
    batch = make_batch(TINY, torch.float64, "cpu", softcap=softcap)
    truth = contest.exact(batch, Job(loss, "full"))
    assert max(contest.errors(contest.naive(batch, Job(loss, "full"))[0](), truth)) < 1e-12
    frozen = contest.naive(batch, Job(loss, "frozen"))[0]()
    assert len(frozen.gradients) == len(contest.exact(batch, Job(loss, "frozen")).gradients) == 1
    assert max(contest.errors(frozen, truth)) < 1e-12


def test_bnf_batch_has_tokens_on_both_sides_of_the_cap():
    batch = make_batch(TINY, torch.float32, "cpu")
    above = batch.logp > batch.ref
    assert 0.2 < above.double().mean() < 0.8


@pytest.mark.parametrize("units", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [512, 12])
def test_floor_does_so_many_products(units, rows, monkeypatch):
    monkeypatch.setitem(contest.FLOOR_ROWS, "cpu", rows)  # 12: the last chunk of 32 is a smaller one
    batch = make_batch(TINY, torch.float64, "cpu")
    floor = Floor(batch)
    with FlopCounterMode(display=False) as counter:
        floor.run(units)
    assert counter.get_total_flops() == units * 2 * TINY.tokens * TINY.width * TINY.vocab
    x, weight = floor.x, floor.weight
    if units >= 2:
        torch.testing.assert_close(floor.dx, x @ weight.t() @ weight)
    if units >= 3:
        torch.testing.assert_close(floor.dweight, (x @ weight.t()).t() @ x)


def test_every_run_once_a_round():
    """In another order each time, but the same in every call; the first round warms up and isn't counted."""
    orders = []
    for _ in range(2):
        calls = []
        times = interleaved({name: partial(calls.append, name) for name in "abc"}, 9, "cpu")
        assert len(calls) == 30
        assert ({len(seconds) for seconds in times.seconds.values()}, times.rounds) == ({9}, 9)
        orders.append([tuple(calls[i : i + 3]) for i in range(0, 30, 3)])
    assert orders[0] == orders[1]
    assert {tuple(sorted(order)) for order in orders[0]} == {tuple("abc")}
    assert len(set(orders[0])) > 3  # so no run always follows the same one


class Clock:
    """One that only the runs move."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def takes(self, seconds):
        def run():
            self.now += seconds
            self.calls += 1

        return run


def test_times_ratios_and_how_often(monkeypatch):
    """A short run is repeated and its time divided; the budget bounds the rounds, but not below the least."""
    clock = Clock(monkeypatch)
    times = interleaved({"a": clock.takes(1.0), "b": clock.takes(0.25)}, 5, "cpu")
    assert (times.quantiles("a"), times.over("b", "a"), times.calls) == ([1.0] * 3, 0.25, {"a": 1, "b": 1})
    short = interleaved({"a": clock.takes(1e-3), "b": clock.takes(1e-6)}, 2, "cpu", shortest=1e-3)
    assert (short.calls, short.seconds["b"]) == ({"a": 1, "b": measure.MOST_CALLS}, pytest.approx([1e-6] * 2))
    clock.calls = 0
    assert interleaved({"a": clock.takes(1.0)}, 50, "cpu", budget=8.0).rounds == 8
    assert clock.calls == 9
    assert interleaved({"a": clock.takes(1.0)}, 50, "cpu", budget=0.0).rounds == measure.LEAST_ROUNDS
    assert interleaved({"a": clock.takes(1.0)}, 1, "cpu", budget=0.0).rounds == 1


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx([3.5, 2.0, 5.0])


# -- the commands ------------------------------------------------------------------------------------------------------


def test_bench_writes_and_renders(tmp_path, capsys):
    sizes = ["--shape", "32,8,128", "--loss", "bnf,dpo", "--repeats", 2]
    assert command("bench", *sizes, "--threads", 1, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "cpu", "cores", "threads", "torch", "triton", "rgpb", "date", "commit"} <= set(
        content["provenance"]
    )
    rows = tables.read(tmp_path / "results.json").rows
    assert None not in [value for row in content["rows"] for value in row.values()]
    # 2 losses × (3 floors, 2 naive, 3 fused), log-prob: floor, naive, fused
    assert len(rows) == 2 * 8 + 3
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        assert row.seconds_20 <= row.seconds <= row.seconds_80
        if row.impl != "gemm":
            assert row.over_floor > 0
            assert row.peak_bytes >= row.extra_bytes > 0
            assert row.value_error is not None
        assert (row.over_naive is not None) == (row.impl == "fused")
    assert {p["tokens"] for p in content["points"]} == {4, 8, 16, 32}
    first = (tmp_path / "results.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    (tmp_path / "results.png").unlink()
    assert command("bench", "--render", tmp_path / "results.json") == 0
    rendered = capsys.readouterr().out
    assert rendered.count("\n| ") == 2 + len(rows)  # two lines of heading
    for row in rows:
        assert "| " + " | ".join(tables.cells(row)) + " |" in rendered
        assert tables.cells(row)[2] in shown
    assert (tmp_path / "results.png").exists()


def test_memory_that_is_kept(tmp_path):
    sizes = ["--shape", "16,8,128", "--loss", "bnf", "--path", "single", "--repeats", 1, "--threads", 1]
    assert command("bench", *sizes, "--keep", "--out", tmp_path) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["provenance"]["kept"]
    assert content["points"] == []
    (ours,) = (row for row in content["rows"] if row["impl"] == "fused")
    assert ours["status"] == "ok"
    assert ours["extra_bytes"] < 16 * 128 * 4


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_no_speed_for_a_wrong_result(wrong, tmp_path, capsys, monkeypatch):
    fused = contest.fused

    def broken(batch, job, path, *more, **how):
        right, plan = fused(batch, job, path, *more, **how)

        def run():
            value, gradients = right()
            if wrong == "gradient":
                return Result(value, (gradients[0], gradients[1] * 1.01))
            return Result(value + (0.01 if wrong == "value" else torch.nan), gradients)

        return (run if path == "single" else right), plan

    monkeypatch.setattr(contest, "fused", broken)
    monkeypatch.setattr(tables, "plot", lambda report, path: None)
    arguments = ("--shape", "32,8,128", "--repeats", 1, "--loss", "mle", "--path", "single,two_pass", "--threads", 1)
    assert command("bench", *arguments, "--out", tmp_path) == 1
    rows = {row.path: row for row in tables.read(tmp_path / "results.json").rows}
    assert rows["single"].status == "FAILED"
    assert rows["single"].seconds is rows["single"].over_floor is rows["single"].over_naive is None
    assert rows["two_pass"].seconds > 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "single" in line]
    assert "FAILED" in line
    assert "U" not in line


def test_a_path_that_the_plan_does_not_take(tmp_path, capsys, monkeypatch):
    """In bfloat16 a small workspace doesn't hold the float32 sum of dW: no row may claim a single pass."""
    monkeypatch.setattr(tables, "plot", lambda report, path: None)
    arguments = ("--shape", "64,64,512", "--dtype", "bf16", "--loss", "bnf", "--path", "single", "--threads", 1)
    how = ("--impl", "torch", "--workspace", "150KiB")
    assert command("bench", *arguments, "--repeats", 1, *how, "--out", tmp_path) == 0
    (row,) = [row for row in tables.read(tmp_path / "results.json").rows if row.impl == "fused"]
    assert row.status == "plan: two_pass"
    assert row.seconds is None
    assert "the float32 sum of dW doesn't fit" in capsys.readouterr().err


def racers(*runs):
    """Naive PyTorch's part is the first's."""
    return [
        Contestant(impl, "full", 3, lambda batch, job, run=run: (run, None))
        for impl, run in zip(("naive", "b", "c"), runs)
    ]


def test_one_that_fails_in_the_rounds_takes_no_other_along():
    """Then each is timed by itself beside naive; what raises in its check has its reason, and no time."""
    case, job, calls = Case(TINY, "fp32", "cpu"), Job("mle", "full"), []
    right = contest.naive(case.batch, job)[0]

    def tires():
        calls.append(1)
        if len(calls) > 3:  # checked, and weighed in two runs
            raise RuntimeError("first line\n| second")
        return right()

    def raises():
        raise ValueError("softcap: expected none")

    ready = [contest.prepared(case, job, one) for one in racers(right, tires, raises)]
    assert [one.row.status for one in ready] == ["ok", "ok", "refused: softcap: expected none"]
    rows = contest.race(case, ready, 2).rows
    assert [row.status for row in rows] == ["ok", "error: RuntimeError: first line / second", ready[2].row.status]
    assert [row.seconds is None for row in rows] == [False, True, True]
    calls.clear()
    rows = contest.race(case, [contest.prepared(case, job, one) for one in racers(right, right, raises)], 2).rows
    assert rows[0].over_naive is None
    assert rows[1].over_naive > 0
    (alone,) = contest.race(case, [contest.prepared(case, job, racers(right, right)[1])], 2, rival=right).rows
    assert alone.over_naive > 0  # its row may be there already
    assert alone.over_floor > 0


def test_statuses_of_exceptions():
    assert measure.explain(torch.OutOfMemoryError("x")) == "out of memory"
    assert measure.explain(ModuleNotFoundError("No module named 'x'", name="x")) == "not installed: x"
    assert measure.explain(ValueError("impl: expected\na GPU")) == "refused: impl: expected a GPU"
    assert measure.explain(TypeError("x")) == "error: TypeError: x"
    statuses = {"ok": False, "FAILED": True, "out of memory": False, "error: x": True, "refused: x": False}
    assert {status: measure.failed({"status": status}) for status in statuses} == statuses
    assert not measure.failed({"status": "error: x", "impl": "theirs"})  # others may fail as they like


def test_a_picture_of_time_and_memory(tmp_path, monkeypatch):
    """Bars are milliseconds and MiB: two passes, which take longer, are longer than one; naive's line is naive's."""
    from matplotlib.figure import Figure

    def row(path, impl, seconds, extra):
        return tables.Row(
            "bnf", path, impl, "fp32", 64, 8, 128, 3, seconds=seconds, seconds_20=seconds, seconds_80=seconds,
            over_floor=1.0, extra_bytes=extra * MIB,
        )  # fmt: skip

    rows = [row("single", "fused", 1.2, 8), row("two_pass", "fused", 1.5, 4), row("full", "naive", 1.6, 99)]
    rows += [row("1U", "gemm", 0.1, 1), row("single", "fused", None, 1)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    tables.plot(tables.Report({}, rows, rows[:1]), tmp_path / "x.png")
    left, middle = drawn[0].axes  # one N: nothing over it
    assert [bar.get_width() for bar in left.patches] == [1600, 1200, 1500]
    assert [bar.get_width() for bar in middle.patches] == [99, 8, 4]
    for axes, reference in ((left, 1600), (middle, 99)):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [set(line.get_xdata()) for line in dashed] == [{reference}]
        assert axes.get_xlabel()
        assert "MiB" in axes.get_xlabel() or "ms" in axes.get_xlabel()
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["naive PyTorch", "rgpb", "naive PyTorch at the same job"]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'rgpb\[bench\]'"):
        command("bench")


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    """An installed copy may lie in somebody else's repository."""
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.provenance("cpu")["commit"] is None


def test_plan_prints_path_reason_and_memory(capsys):
    arguments = ("--tokens", 8192, "--hidden", 4096, "--vocab", 128256)
    assert command("plan", *arguments, "--loss", "bnf", "--workspace", "512MiB") == 0
    small = capsys.readouterr().out
    assert "two_pass: the float32 sum of dW doesn't fit the workspace" in small
    assert "512.0 MiB allowed" in small
    assert 'remedy  workspace="auto", here 4,096 MiB: single, ' in small
    assert "12,024.0 MiB" in small  # 3 · 8192 · 128256 · 4 bytes
    assert command("plan", *arguments, "--loss", "bnf") == 0
    auto = capsys.readouterr().out
    assert "single: " in auto
    assert "4,096.0 MiB allowed" in auto
    assert "remedy" not in auto
    assert command("plan", *arguments, "--frozen-head") == 0
    assert f"2 × 2·N·V·H = {4 * 8192 * 4096 * 128256 / 1e12:.1f} TFLOP" in capsys.readouterr().out
    with pytest.raises(ValueError, match="workspace: expected at least"):
        command("plan", *arguments, "--workspace", "1KiB")


def plan_of(capsys, *arguments):
    """The lines that `rgpb plan` prints, by their first word; what follows a line without one belongs to it."""
    assert command("plan", "--tokens", 8192, *arguments) == 0
    found, name = {}, None
    for line in capsys.readouterr().out.splitlines():
        name = line[:8].strip() or name
        found[name] = [*found.get(name, []), line[8:]]
    return found


LLAMA = ("--hidden", 4096, "--vocab", 128256)


def test_pairs_that_fit_no_chunk(capsys, monkeypatch):
    """What a call with such pairs is told, too."""
    set_rates(monkeypatch)
    call = ("--hidden", 512, "--vocab", 32000, "--dtype", "fp32", "--device-type", "cpu", "--impl", "torch")
    call = (*call, "--workspace", "48MiB", "--loss", "dpo")
    assert plan_of(capsys, *call)["path"][0].startswith("single: ")
    assert plan_of(capsys, *call, "--unit-tokens", 64)["path"][0].startswith("single: ")
    path = plan_of(capsys, *call, "--unit-tokens", 4096)["path"][0]
    assert path.startswith("two_pass: most tokens are in a pair longer than a single pass's chunk of ")
    for more, message in (
        (("--unit-tokens", 8193), "unit-tokens: expected at most the 8192 of --tokens, got 8193"),
        (("--unit-tokens", 64, "--loss", "bnf"), "unit-tokens: expected a loss that couples pairs or groups, got bnf"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of(capsys, *call, *more)


def test_a_model_by_its_name(capsys):
    named, given = plan_of(capsys, "--model", "Llama-3-8B"), plan_of(capsys, *LLAMA)
    assert named.pop("head") == ["Llama-3-8B: H = 4096, V = 128256, 1,002.0 MiB"]
    assert given.pop("head") == ["H = 4096, V = 128256, 1,002.0 MiB"]
    assert named == given
    assert plan_of(capsys, "--model", "gemma-2-9b")["head"][0].endswith("1,750.0 MiB, logits soft-capped at 30")
    assert {name.lower() for name in plan_command.PREDICTED} <= set(plan_command.HEADS)
    assert all(name == name.lower() for name in plan_command.HEADS)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"hidden_size": 64, "vocab_size": 1000}, (64, 1000, None)),
        ({"n_embd": 64, "vocab_size": 1000}, (64, 1000, None)),  # GPT-2
        ({"hidden_size": 64, "vocab_size": 1000, "final_logit_softcapping": 30.0}, (64, 1000, 30.0)),
        ({"hidden_size": 7, "text_config": {"hidden_size": 64, "vocab_size": 1000}}, (64, 1000, None)),
        ({"vocab_size": 1000, "text_config": {"hidden_size": 64}}, (64, 1000, None)),
    ],
)
def test_a_model_by_its_folder(config, head, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_command.head_of(str(tmp_path)) == head
    assert plan_of(capsys, "--model", tmp_path)["head"][0].startswith(f"{tmp_path}: H = 64, V = 1000, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"model: expected a name that .* or a folder with a config.json, got '.*no'"),
        ("{", "model: expected JSON in .*config.json, got "),
        ("[]", "model: expected a positive integer hidden_size in .*, got None"),
        ('{"hidden_size": 64}', "model: expected a positive integer vocab_size in .*, got None"),
        ('{"hidden_size": "64", "vocab_size": 9}', "model: expected a positive integer hidden_size in .*, got '64'"),
        ('{"hidden_size": 64, "vocab_size": 0}', "model: expected a positive integer vocab_size in .*, got 0"),
    ],
)
def test_folders_that_describe_no_head(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        command("plan", "--tokens", 8, "--model", tmp_path if text is not None else tmp_path / "no")


def test_a_near_name_is_suggested():
    with pytest.raises(ValueError, match=r"as llama-3-8b, .*, got 'llama3-8b'"):
        command("plan", "--tokens", 8, "--model", "llama3-8b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model: expected either --model, or both --hidden and --vocab, got none of these"),
        (("--hidden", 8), "both --hidden and --vocab, got --hidden 8"),
        (("--model", "gpt2", "--vocab", 8), "both --hidden and --vocab, got --model gpt2 --vocab 8"),
        (("--model", "gpt2", *LLAMA), "got --model gpt2 --hidden 4096 --vocab 128256"),
        (
            ("--model", "gpt2", "--device-type", "cpu", "--gpu", "a100"),
            "gpu: expected no --gpu beside --device-type cpu, got 'a100'",
        ),
        (
            ("--model", "gpt2", "--impl", "cpp"),
            "impl: expected 'triton' or 'torch', since .* not for .* cuda; got 'cpp'",
        ),
        (("--model", "gpt2", "--impl", "triton", "--device-type", "cpu"), "impl: expected .*; got 'triton'"),
    ],
)
def test_requests_that_contradict_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        command("plan", "--tokens", 8192, *arguments)


def test_bad_plans_exit_with_2(capsys):
    assert main(["plan", "--tokens", "8", "--hidden", "8"]) == 2
    assert capsys.readouterr().err.startswith("rgpb: error: model: expected either --model, or both")


def test_time_of_the_naive_form_on_a_gpu(capsys):
    """Its products at the library's rate, its passes at that of copies; times below 10 s are in ms."""
    unit, logits = 2 * 8192 * 4096 * 128256 / 788e12, 8192 * 128256 / 4.3e12
    for arguments, units, moved in (
        (("--loss", "bnf"), 3, 82),
        (("--loss", "dpo"), 3, 38),
        (("--loss", "dpo", "--frozen-head"), 2, 38),
    ):
        foretold = (units * unit + moved * logits) * 1e3
        line = plan_of(capsys, *LLAMA, *arguments)["naive"][1]
        assert line.startswith(f"{foretold:,.1f} ms predicted, ")
        assert line.endswith(f"{units} × 2·N·V·H at the library's rate, {moved}·N·V bytes at that of copies")
    foretold = (3 * 2 * 8192 * 3584 * 256000 / 788e12 + (38 + 26) * 8192 * 256000 / 4.3e12) * 1e3
    capped = plan_of(capsys, "--model", "gemma-2-9b", "--loss", "dpo")["naive"]
    assert capped[1].startswith(f"{foretold:,.1f} ms predicted, ")  # 13 passes of 2 bytes for the soft-cap
    assert capped[0].startswith(f"{8192 * 256000 * 14 / MIB:,.1f} MiB: 3·N·V float32 numbers, and the N·V of tanh; ")
    assert plan_of(capsys, *LLAMA, "--dtype", "fp32")["naive"][1:] == []  # no rates for these products


def test_a_head_on_several_ranks(capsys):
    """What a rank holds, and what it sends in a ring; beside the whole head on each."""
    assert command("plan", "--tp", 8, "--fsdp", 64, "--model", "llama-3-405b") == 0
    capsys.readouterr()
    head, states = 16384 * 128256 * 2 / MIB, 8192 * 16384 * 4 / MIB
    shown = plan_of(capsys, "--tp", 8, "--fsdp", 64, "--model", "llama-3-405b", "--loss", "dpo")
    assert shown["ranks"] == ["512: 8 hold the head together, 16,032 rows each, and have the same tokens"]
    assert shown["holds"][0].startswith(
        f"{head / 8:,.1f} MiB of the head, and as much for its gradient; between steps "
    )
    assert shown["holds"][0].endswith(f"{head / 512:,.1f} MiB each; {2 * states:,.1f} MiB for X and dX in float32")
    scores = 2 * 7 / 8 * 3 * 8192 * 4 / MIB
    assert shown["sends"] == [
        f"{head / 8 * 63 / 64:,.1f} MiB for the head from 64 ranks, and as much for its gradient",
        f"{scores:,.1f} MiB for the scores and {2 * 7 / 8 * states:,.1f} MiB for dX, summed over 8 ranks",
    ]
    assert shown["beside"][1].startswith(f"sends {head * 511 / 512:,.1f} MiB, ")
    assert shown["path"][0].startswith("two_pass: the head is sharded")
    frozen = plan_of(capsys, "--fsdp", 64, *LLAMA, "--frozen-head")
    assert frozen["ranks"] == ["64"]
    assert frozen["sends"] == [f"{4096 * 128256 * 2 / MIB * 63 / 64:,.1f} MiB for the head from 64 ranks"]
    with pytest.raises(ValueError, match="tp: expected at most the 4 rows of the head, got 5"):
        command("plan", "--tp", 5, "--hidden", 8, "--vocab", 4)


def test_an_h100_is_an_h200_with_slower_copies_and_less_memory(capsys):
    h100, h200 = (plan_of(capsys, *LLAMA, "--gpu", gpu) for gpu in ("H100", "h200"))
    ours, naive = (
        [float(re.match(r"([\d.]+) ms predicted", shown[line][at])[1]) for shown in (h100, h200)]
        for line, at in (("time", 0), ("naive", 1))
    )
    products, copies = 3 * 2 * 8192 * 4096 * 128256 / 788e9, 82 * 8192 * 128256 / 4.3e9
    assert naive == pytest.approx([products + copies / 0.7, products + copies], abs=0.06)
    between = ours[1] - products  # with what waves lose, which is the same on both
    assert ours[1] < ours[0] < products + between / 0.7
    assert [len(shown["time"]) for shown in (h100, h200)] == [1, 1]
    assert " of the h100's 80.0 GiB; " in h100["fits"][0]
    assert " of the h200's 141.0 GiB; " in h200["fits"][0]


def test_whether_it_fits(capsys, monkeypatch):
    """Weight and hidden states with their gradients, and what is held beyond; a frozen head has no gradient."""
    weight, states = 4096 * 128256 * 2, 8192 * 4096 * 2
    gib = 2**30
    naive = (2 * weight + 2 * states + 12 * 8192 * 128256) / gib
    shown = plan_of(capsys, *LLAMA, "--gpu", "rtx5090")["fits"][0]
    assert shown.startswith("yes, ")
    assert shown.endswith(f" of the rtx5090's 32.0 GiB; naive yes, {naive:.1f} GiB")
    frozen = plan_of(capsys, *LLAMA, "--gpu", "rtx5090", "--frozen-head")["fits"][0]
    assert frozen.endswith(f"naive yes, {naive - weight / gib:.1f} GiB")
    assert command("plan", "--tokens", 65536, *LLAMA, "--gpu", "h100") == 0
    assert " of the h100's 80.0 GiB; naive NO, " in capsys.readouterr().out
    assert command("plan", "--tokens", 131072, *LLAMA, "--gpu", "rtx5090", "--workspace", "60GiB") == 0
    assert "fits    NO, " in capsys.readouterr().out
    set_rates(monkeypatch)
    monkeypatch.setattr(plan_command, "memory_of_machine", lambda: 4 * gib)
    assert " of this machine's 4.0 GiB; naive NO" in plan_of(capsys, *LLAMA, "--device-type", "cpu")["fits"][0]
    monkeypatch.setattr(plan_command, "memory_of_machine", lambda: None)
    unknown = plan_of(capsys, *LLAMA, "--device-type", "cpu")["fits"][0]
    assert unknown.startswith("not known, ")
    assert "this machine doesn't say how much it has" in unknown


def set_rates(monkeypatch):
    """100 GFLOP/s, twice that in 16 bits; 20 GB/s copied, a quarter of it into new memory."""
    rates = {torch.float32: 1e11, torch.bfloat16: 2e11, torch.float16: 2e11}
    monkeypatch.setattr(plan_command, "product_rate", lambda dtype, device, result=None: rates[dtype])
    monkeypatch.setattr(plan_command, "copy_rate", lambda device, fresh=False: 5e9 if fresh else 2e10)


@pytest.mark.parametrize(
    ("dtype", "impl", "native"),
    [("fp32", "torch", False), ("bf16", "torch", False), ("bf16", "cpp", False), ("bf16", "cpp", True)],
)
def test_time_on_this_cpu(dtype, impl, native, capsys, monkeypatch):
    """`native`: whether there are products of bfloat16 operands with float32 results."""
    set_rates(monkeypatch)
    monkeypatch.setattr(cpp_rows, "missing", lambda: None)
    monkeypatch.setattr(cpp_rows, "BF16_PRODUCTS", native)
    N, H, V = 8192, 512, 32000
    head = ("--hidden", H, "--vocab", V, "--dtype", dtype, "--impl", impl)
    shown = plan_of(capsys, *head, "--loss", "dpo", "--device-type", "cpu")
    chunks = -(-N // int(shown["chunks"][0].split()[2]))
    assert chunks == N // 512
    assert shown["path"][0].startswith("single: ")
    products = 3 * 2 * N * H * V / (2e11 if native else 1e11)
    # logits written, read, read and written again; dW read and written, but for the first time
    moved = (14 if native else 16) * N * V + 4 * (2 * chunks - 1) * H * V
    if dtype == "bf16":  # the sum of dW read and rounded; the weight raised for each chunk's logits and dX
        moved += 6 * H * V + (0 if native else 2 * chunks * 6 * H * V)
    assert shown["time"][0].startswith(f"{(products + moved / 2e10) * 1e3:,.1f} ms predicted for this CPU, ")
    assert f"from {200 if native else 100} GFLOP/s measured now" in shown["time"][0]
    assert shown["time"][1].startswith(f"{'bfloat16' if native else 'float32'} products; naive's in ")
    naive = 3 * 2 * N * H * V / (1e11 if dtype == "fp32" else 2e11) + (28 if dtype == "fp32" else 38) * N * V / 5e9
    assert shown["naive"][1].startswith(f"{naive * 1e3:,.1f} ms predicted, ")


def test_the_readme_shows_what_plan_prints(capsys):
    """Each console block of the documents that shows `rgpb plan` for a GPU."""
    root = Path(__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    blocks = [block for text in texts for block in re.findall(r"```\n\$ rgpb (plan .*?)```", text, re.DOTALL)]
    assert blocks
    for block in blocks:
        called, _, shown = block.partition("\n")
        assert main(called.split()) == 0
        assert capsys.readouterr().out == shown


class Moved(TorchDispatchMode):
    """Bytes that operations read and write in tensors of `size` elements. Products: only what they write."""

    VIEWS = ("view", "_unsafe_view", "t", "detach", "expand", "unsqueeze", "squeeze")
    FEW = ("gather", "scatter_add", "scatter_add_")  # touch one element of a row
    WRITE = ("mm", "new_zeros", "zeros_like", "empty_like")

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        name = operation._schema.name.partition("::")[2]
        if name not in self.VIEWS + self.FEW:
            read = {} if name in self.WRITE else {id(x): x for x in tree_leaves((args, kwargs))}
            for x in (*read.values(), *tree_leaves(made)):
                whole = isinstance(x, torch.Tensor) and x.numel() == self.size
                if whole and x.untyped_storage().nbytes() >= x.nbytes:  # not a few numbers expanded
                    self.bytes += x.nbytes
        return made


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("loss", ["bnf", "dpo", *(pytest.param(x, marks=pytest.mark.full) for x in ("swepo", "mle"))])
def test_what_the_naive_form_moves_and_holds(loss, dtype, softcap):
    capped, entropy = softcap is not None, OBJECTIVES[loss].entropy
    size = SMALL.tokens * SMALL.vocab
    run, _ = contest.naive(make_batch(SMALL, dtype, "cpu", softcap=softcap), Job(loss, "full"))
    with Moved(size) as moved:
        run()
    assert moved.bytes == size * plan_command.naive_moved(dtype.itemsize, entropy, capped)
    held = plan_command.naive_bytes(SMALL.tokens, SMALL.vocab, dtype.itemsize, softcap=capped)
    assert peak_memory(run, "cpu").extra == pytest.approx(held, rel=0.01)


def test_sizes_are_parsed():
    texts = {"512MiB": 512 * MIB, "4GiB": 4 << 30, "1.5 kib": 1536, "2MB": 2_000_000, "77": 77, "1b": 1}
    assert {text: plan_command.parse_bytes(text) for text in texts} == texts
    for text in ("", "MiB", "-1", "0", "0.1B", "5 parsecs", "1e3"):
        with pytest.raises(ValueError, match="expected bytes, as 512MiB"):
            plan_command.parse_bytes(text)
    assert bench.parse_shape("2048,512,32000") == Shape(2048, 512, 32000)
    for text in ("", "1,2", "3,4,5", "0,1,1", "2,x,1"):
        with pytest.raises(ValueError, match="expected N,H,V with N even"):
            bench.parse_shape(text)


@pytest.mark.parametrize("arguments", [("--dtype", "fp8"), ("--loss", "bnf,x"), ("--path", ""), ("--repeats", "0")])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command("bench", *arguments)
    assert "expected" in capsys.readouterr().err


def test_a_cpu_is_tuned_and_the_choice_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chunking, "tuned_limits", tuned_limits)
    monkeypatch.setattr(tune, "CPU_SHAPE", Shape(64, 16, 2048))
    monkeypatch.setattr(tune, "GAIN", 2.0)  # whatever is fastest is taken
    slow = {("rows", 128), ("scored", 512)}

    def timed(runs, rounds, device):
        field = next(f for f, values, *_ in tune.CPU_CANDIDATES if {*values} <= {*runs})
        for run in runs.values():
            run()
        return measure.Times({x: [1.0 if (field, x) in slow else 9.0] for x in runs}, dict.fromkeys(runs, 1), 1)

    monkeypatch.setattr(tune, "interleaved", timed)
    for known in (tuned_limits, tuned._known):
        known.cache_clear()
    before = chunking.cpu_limits()
    rows = [s.limits.rows for s in (chunking.sizes(4096, 64, torch.float32, torch.float32, "cpu"),)]
    assert main(["tune"]) == 0
    assert f"kept in {tmp_path / 'rgpb' / 'tuned.json'}" in capsys.readouterr().out
    assert (before.rows, before.scored, rows) == (512, 2048, [512])
    after = chunking.sizes(4096, 64, torch.float32, torch.float32, "cpu")
    assert (after.limits.rows, after.limits.scored) == (128, 512)
    assert chunking.chunks(after, 1 << 30, "single").sweep_for(1000) == (128, 128)
    tuned.file().write_text(json.dumps({chunking.cpu_key(torch.get_num_threads()): [1]}))
    for known in (tuned_limits, tuned._known):
        known.cache_clear()
    with pytest.raises(ValueError, match="tuned choices: expected a file of `rgpb tune`"):
        chunking.cpu_limits()
    for known in (tuned_limits, tuned._known):
        known.cache_clear()
