"""What `python -m benchmarks.gpu --verdict` makes of results: those of a tiny run on a CPU, and made-up rows."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ isn't installed

from benchmarks.gpu import verdict
from benchmarks.gpu.__main__ import main
from rgpb.bench.tables import Row
from rgpb.engine.rates import RATES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="expects Triton to be refused on a CPU"
)


def row(loss, path, impl, **more):
    """A row of the part `llama` at its first shape, on the faster engine in the default workspace."""
    units = {"single": 3, "two_pass": 4, "frozen": 2, "forward": 1}.get(path, 3)
    known = {
        "case": "Llama-3-8B", "kernels": "tiled" if impl == "fused" else None, "seconds": 0.04,
        "over_floor": 1.1, "over_naive": 0.5, "value_error": 1e-6, "extra_bytes": 500_000_000,
        "planned_bytes": 510_000_000, "planned_seconds": 0.05, "workspace": 512 << 20 if impl == "fused" else None,
    }  # fmt: skip
    return Row(loss, path, impl, "bf16", 8192, 4096, 128256, units, **{**known, **more})._asdict()


def written(folder, **parts):
    folder.mkdir(exist_ok=True)
    for part, rows in parts.items():
        content = {"part": part, "provenance": {"capability": "9.0"}, "rows": rows}
        (folder / f"{part}.json").write_text(json.dumps(content))
    return verdict.read(folder)


def line(results, start):
    """The aim whose text begins like this."""
    return next(found for found in verdict.aims(results) if found["aim"].startswith(start))


ROWS = (
    row("bnf", "single", "fused", workspace=4 << 30, over_floor=1.2, seconds=0.03),
    row("bnf", "single", "fused", workspace=4 << 30, over_floor=1.14, seconds=0.035, kernels="triton"),
    row("bnf", "single", "fused", workspace=4 << 30, over_floor=0.5, status="FAILED", kernels="torch"),
    row("bnf", "two_pass", "fused", over_floor=1.3),
    row("bnf", "full", "naive", seconds=0.06),
    row("bnf", "full", "compiled", seconds=0.025),
    row("log-prob", "forward", "fused", value_error=2e-5),
    row("log-prob", "forward", "fused", value_error=1e-5, kernels="torch"),
    {**row("bnf", "two_pass", "fused", over_floor=0.9, extra_bytes=601_000_000), "tokens": 32768},
)


def test_aims_and_what_came(tmp_path):
    results = written(tmp_path, llama=ROWS)
    single = line(results, "BNF, 4 GiB")
    assert (single["measured"], single["of"], single["verdict"]) == ("1.14", "triton, N = 8192", "reached")
    assert line(results, "BNF, 512 MiB")["measured"] == "1.3"  # that of N = 8192
    assert line(results, "BNF, 512 MiB")["verdict"] == "missed"
    assert line(results, "BNF over the fastest other")["measured"] == "1.2"
    assert line(results, "BNF over the fastest other")["of"] == "tiled, N = 8192"
    assert line(results, "log-probabilities, error")["measured"] == "2e-05"
    assert line(results, "extra memory")["of"] == "tiled, N = 32768"
    assert line(results, "extra memory")["verdict"] == "missed"
    assert line(results, "DPO")["verdict"] == "no right row of it in llama"
    assert line(results, "BNF with skipping")["verdict"] == "no right row of it in trained"


def test_aims_are_about_one_shape(tmp_path):
    """That of N = 8192, whatever ran first and even where it failed; of another model the first there is."""
    first = {**row("bnf", "two_pass", "fused", over_floor=1.01), "tokens": 32768}
    failed = row("bnf", "two_pass", "fused", status="FAILED", seconds=None, over_floor=None)
    results = written(tmp_path, llama=[first, failed])
    assert line(results, "extra memory")["measured"] == "500"
    assert line(results, "BNF, 512 MiB")["verdict"] == "no right row of it in llama"
    assert any(shown == "## Aims, Llama-3-8B, N = 8192" for shown in verdict.lines(results))
    other = written(tmp_path, llama=[{**first, "case": "mine"}])
    assert line(other, "BNF, 512 MiB")["measured"] == "1.01"
    assert "## Aims, mine, N = 32768" in verdict.lines(other)


def test_numbers_that_are_missing(tmp_path):
    bare = {"extra_bytes": None, "value_error": None, "seconds": None, "over_floor": None, "planned_bytes": None}
    results = written(
        tmp_path, llama=[row("bnf", "single", "fused", **bare), row("log-prob", "forward", "fused", **bare)]
    )
    assert [*verdict.lines(results)] == ["* llama: 2 of 2 rows right; capability 9.0"]


def test_skipping_counts_the_last_stage(tmp_path):
    known = {
        "loss": "bnf",
        "kernels": "torch",
        "tolerance": "auto",
        "status": "ok",
        "tokens": 8,
        "width": 4,
        "vocab": 9,
    }
    known["perplexity"] = 7.25
    stages = [{**known, "steps": 0, "units": 2.0}, {**known, "steps": 8, "units": 3.1}]
    others = [{**known, "steps": 8, "units": 2.0, "loss": "mle"}, {**known, "steps": 8, "units": 2.0, "tolerance": 0.1}]
    results = written(tmp_path, trained=[*stages, *others, {**known, "steps": 8, "units": 3.0, "kernels": "cpp"}])
    assert line(results, "BNF with skipping")["measured"] == "3"
    assert line(results, "BNF with skipping")["of"] == "cpp, N = 8"
    own = written(tmp_path / "own", trained=[{**known, "units": 2.4}])  # a model that was there
    assert line(own, "BNF with skipping")["verdict"] == "reached"


def test_predictions_beside_measurements(tmp_path):
    kernel = {
        "kernel": "rows: statistics", "tokens": 1024, "seconds": 2e-3, "predicted_seconds": 1e-3, "flops": None,
        "share_of_copy": 0.8, "share_of_product": None, "copy_rate": 3e12, "status": "ok",
    }  # fmt: skip
    product = {**kernel, "kernel": "product", "flops": 1e12, "copy_rate": 2e12}
    rates = [
        {"ceiling": "copy", "status": "ok", "rate": 3e12, "assumed": RATES["sm_90"].copy},
        {"ceiling": "bf16 → fp32", "status": "FAILED", "rate": None, "assumed": RATES["sm_90"].library},
    ]
    results = written(tmp_path, llama=ROWS, kernels=[kernel, product, {**kernel, "status": "FAILED"}], ceilings=rates)
    assert verdict.ceilings(results) == [
        {"ceiling": "copy", "measured, T/s": 3.0, "plans assume, T/s": RATES["sm_90"].copy / 1e12}
    ]
    assert verdict.kernels(results)[0]["predicted ms"] == 1.0
    calls = verdict.calls(results)
    assert len(calls) == 6  # what failed isn't among them
    assert calls[0]["ms"] == pytest.approx(30)
    assert calls[0]["predicted ms"] == pytest.approx(50)
    best = [(found["who"], found["setting"]) for found in verdict.peers(results) if found["job"] == "bnf, full"]
    assert best[:3] == [("compiled", ""), ("fused", "tiled, single, 4,096 MiB"), ("naive", "")]


def test_bars_of_one_card(tmp_path):
    """In milliseconds, for the GPU that they are about; a prediction is one for all."""
    scores = row("scores", "two_pass", "fused", seconds=0.052)
    results = written(tmp_path, llama=[*ROWS, scores])
    assert line(results, "BNF on an H100")["measured"] == "30"
    assert line(results, "scores with gradients")["verdict"] == "missed"
    assert line(results, "a call over")["measured"] == "1.04"
    other = results._replace(provenance={"llama": {"capability": "8.0"}})
    assert not [found for found in verdict.aims(other) if "H100" in found["aim"]]
    assert line(other, "a call over")["verdict"] == "reached"


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "parts.tsv").write_text(
        "tiles\t124\t9\t8\t0\ntiles\t0\t2\t8\t1\ntune\t9\t2\t8\t1\nsteps\tno time\t0\t0\t0\n"
    )
    bad = {"check": "E W | 8,8,8", "status": "FAILED", "off": 0.5, "most": 1e-4}
    results = written(tmp_path, products=[bad, {**bad, "status": "ok"}])
    assert [(found["part"], found["ended"]) for found in verdict.parts(results)] == [
        ("tiles", "ok"), ("tune", "MEMORY IS MISUSED"), ("steps", "NO TIME WAS LEFT"),
    ]  # fmt: skip
    (found,) = verdict.wrong(results)
    assert (found["part"], found["row"], found["error"]) == ("products", "E W | 8,8,8 0.5 0.0001", 0.5)
    (tmp_path / "products.json").unlink()
    assert any("NO TIME" in shown for shown in verdict.lines(verdict.read(tmp_path)))  # no part came to an end


def test_the_command(tmp_path, capsys):
    sizes = ("--device", "cpu", "--rounds", "1", "--workspace", "512MiB", "--shape", "tiny=64,32,257")
    only = ("--only", r"bnf \| full \| (naive|.*torch)|log-prob.*torch")
    assert main(["--out", str(tmp_path), *sizes, "--part", "llama", "--part", "cpu", *only]) == 0
    capsys.readouterr()
    assert main(["--out", str(tmp_path), "--verdict"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## Aims, tiny, N = 64\n")
    assert re.search(r"\n\* cpu: \d+ of \d+ rows right; device CPU, .* commit .*\n\* llama: ", shown)
    assert "predicted ms" not in shown  # there are no rates for a CPU
    assert "| log-probabilities, error | 1e-05 | " in shown
    assert "| tiny | 64 | bnf single | torch | 512 | " in shown
    assert "no right row of it in trained" in shown
    assert "## Kernels" not in shown
    for content, message in (("{}", "KeyError"), ("[", "JSONDecodeError")):
        (tmp_path / "llama.json").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            main(["--out", str(tmp_path), "--verdict"])
        error = capsys.readouterr().err
        assert "--out: expected the JSON of a part" in error
        assert message in error
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "none"), "--verdict"])
    assert "--out: expected a folder with the JSON of parts" in capsys.readouterr().err
