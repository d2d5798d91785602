"""`rgpb train` on several ranks beside one process: weights, metrics, checkpoints, deaths, refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import training
from safetensors.torch import load_file
from training import write
from transformers import AutoModelForCausalLM

from rgpb.demo import arithmetic_pairs
from rgpb.train import TrainConfig, report, train
from rgpb.train import config as settings_module
from rgpb.train.machine import check_devices
from rgpb.train.order import Order, _Shares
from rgpb.train.ranks import Ranks, _meet

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed"),
    # of DDP, of checkpoints of plain tensors, of PEFT's enums: as in any run of theirs
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

ROUNDING = 2e-6  # after a few steps, of weights near 0.1: some roundings of float32


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """The built-in model, smaller, and no pictures; on the ranks `training.run` does that."""
    monkeypatch.setitem(settings_module.BUILT_IN, "tiny-llama", ("LlamaConfig", training.SMALL))
    monkeypatch.setattr(report, "plot", lambda runs, path: None)


@pytest.fixture
def data(tmp_path):
    """13 units: with batches of 4 the last has one, and so none for the second of two ranks."""
    return write(tmp_path / "pairs.jsonl", arithmetic_pairs(13, seed=1))


@pytest.fixture
def groups(tmp_path):
    """14 units of 2 to 4 responses."""
    rows = [{"prompt": f"{i}:", "completions": [f"{7 * i + k}" for k in range(2 + i % 3)]} for i in range(14)]
    return write(tmp_path / "groups.jsonl", [{**row, "rewards": [*range(len(row["completions"]))]} for row in rows])


@pytest.fixture
def base(data, tmp_path):
    """A model's folder."""
    train(training.config(data, tmp_path / "base", steps=1))
    return tmp_path / "base" / "model"


def full(*values):
    """A case of `make test-full` alone."""
    return pytest.param(*values, marks=pytest.mark.full)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


def differ(one: Path, other: Path) -> float:
    """The largest difference of the weights of two runs."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_metrics(one: Path, other: Path, rel: float = 1e-4, abs: float = 2e-5) -> None:
    """The same lines, with the same numbers to rounding; rewards are small differences of sums near −100."""
    first, second = report.read_metrics(one), report.read_metrics(other)
    assert [(r["split"], r["step"], r.keys()) for r in first] == [(r["split"], r["step"], r.keys()) for r in second]
    for a, b in zip(first, second):
        for name in a.keys() - {"split", "device", "seconds", "peak_bytes"}:
            expected = None if a[name] is None else pytest.approx(a[name], rel=rel, abs=abs)
            assert b[name] == expected, (a["split"], a["step"], name)


def one_and_several(ranks: Any, tmp_path: Path, cases: dict[str, TrainConfig]) -> None:
    """Run "one" here and the others on two ranks."""
    train(cases["one"])
    others = [case for name, case in cases.items() if name != "one"]
    for case, result in zip(others, ranks(2)(training.run, others)[0]):
        assert isinstance(result, dict), (case.parallel, result)


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_signal_to_one_rank_stops_all_behind_the_same_step(ranks, data, tmp_path, parallel):
    """All save that step, and go on from it to the weights of a run that nothing happened to."""
    settings = training.config(data, tmp_path / "told", parallel=parallel)
    found = ranks(2)(training.run, [settings], told=2)
    assert found == 2 * [["KeyboardInterrupt: stopped after step 3 of 5, which is saved"]]
    (result,) = ranks(2)(training.run, [settings])[0]
    assert result["resumed"] == 3
    ranks(2)(training.run, [training.config(data, tmp_path / "whole", parallel=parallel)])
    assert differ(tmp_path / "whole", tmp_path / "told") == 0


class TestSameAsOneProcess:
    @pytest.mark.parametrize("loss", [full("bnf"), "kto", full("dpo"), full("bco"), full("mle + 0.5*dpo")])
    def test_losses(self, ranks, data, tmp_path, loss):
        """kto's z₀ and bco's mean are those of the batch of all ranks; the last batch has a unit for one rank alone."""
        settings: dict[str, Any] = {"loss": loss, "steps": 5, "eval_steps": 2}
        cases = {
            name: training.config(data, tmp_path / name, **settings, parallel=how)
            for name, how in (("one", None), ("ddp", "ddp"), ("fsdp2", "fsdp2"))
        }
        one_and_several(ranks, tmp_path, cases)
        for name in ("ddp", "fsdp2"):
            assert differ(tmp_path / "one", tmp_path / name) < ROUNDING
            assert_metrics(tmp_path / "one", tmp_path / name)
            note = json.loads((tmp_path / name / "run.json").read_text())
            assert (note["processes"], note["parallel"]) == (2, name)
            assert note["precision"] == {"parameters": "float32", "autocast": None, "reductions": "float32"}
        assert json.loads((tmp_path / "one" / "run.json").read_text())["precision"]["reductions"] is None

    @pytest.mark.parametrize(
        ("loss", "changes"),
        [
            full("dpo", {"grad_accum": 3, "steps": 4}),
            full("bnf", {"packing": True}),
            full("dpo", {"gradient_checkpointing": True}),
            full("dpo", {"sft_epochs": 1.0}),
            full("swepo", {"batch_size": 3}),
        ],
    )
    def test_settings(self, ranks, data, groups, tmp_path, loss, changes):
        path = groups if loss == "swepo" else data
        cases = {
            name: training.config(path, tmp_path / name, **{"loss": loss, "parallel": how, **changes})
            for name, how in (("one", None), ("ddp", "ddp"), ("fsdp2", "fsdp2"))
        }
        one_and_several(ranks, tmp_path, cases)
        for name in ("ddp", "fsdp2"):
            assert differ(tmp_path / "one", tmp_path / name) < 5 * ROUNDING
            if loss != "swepo":  # of uneven groups agility is no sum over units
                assert_metrics(tmp_path / "one", tmp_path / name)

    @pytest.mark.full
    def test_adapters(self, ranks, data, base, tmp_path):
        """The reference is the model without them; `merged` is what model and adapters compute."""
        settings: dict[str, Any] = {"model": str(base), "lora_r": 2, "lora_target": "q_proj,down_proj", "lr": 1e-2}
        cases = {
            name: training.config(data, tmp_path / name, **settings, parallel=how, merge=name == "fsdp2")
            for name, how in (("one", None), ("ddp", "ddp"), ("fsdp2", "fsdp2"))
        }
        one_and_several(ranks, tmp_path, cases)
        for name in ("ddp", "fsdp2"):
            assert differ(tmp_path / "one", tmp_path / name) < 10 * ROUNDING
            assert_metrics(tmp_path / "one", tmp_path / name)
        made = weights(tmp_path / "one")
        assert {name.split(".")[-3] for name in made} == {"q_proj", "down_proj"}
        assert any(x.abs().max() > 1e-3 for name, x in made.items() if "lora_B" in name)
        from peft import PeftModel

        plain, merged = (AutoModelForCausalLM.from_pretrained(p) for p in (base, tmp_path / "fsdp2" / "merged"))
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "fsdp2" / "model"))
        ids = torch.arange(5)[None]
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("changes", [full({"dtype": "bf16"}), full({"bf16": True})])
    def test_bfloat16(self, ranks, data, tmp_path, changes):
        """As close as two roundings of bfloat16; saved in the dtype of what it came from."""
        cases = {
            name: training.config(data, tmp_path / name, **changes, parallel=how, lr=1e-3)
            for name, how in (("one", None), ("ddp", "ddp"), ("fsdp2", "fsdp2"))
        }
        one_and_several(ranks, tmp_path, cases)
        kept = "bfloat16" if "dtype" in changes else "float32"
        for name, reduced in (("ddp", kept), ("fsdp2", "float32")):
            assert differ(tmp_path / "one", tmp_path / name) < 5e-3
            assert_metrics(tmp_path / "one", tmp_path / name, rel=0.5)
            assert {x.dtype for x in weights(tmp_path / name).values()} == {torch.float32}
            assert json.loads((tmp_path / name / "model" / "config.json").read_text())["dtype"] == "float32"
            precision = json.loads((tmp_path / name / "run.json").read_text())["precision"]
            autocast = "bfloat16" if "bf16" in changes else None
            assert precision == {"parameters": kept, "autocast": autocast, "reductions": reduced}

    @pytest.mark.full
    @pytest.mark.parametrize(
        ("loss", "pairing"), [("swepo", "best-worst"), ("dpo", "best-random"), ("kto", "unpaired"), ("bco", "unpaired")]
    )
    def test_online(self, ranks, tmp_path, loss, pairing):
        """Rank 0 samples and judges. In some steps one rank has no pair, in some neither."""
        path = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}:"} for i in range(5)])
        (tmp_path / "judge.py").write_text(
            "def score(prompts, texts):\n    return [len(t.strip()) * (p > '2') for p, t in zip(prompts, texts)]\n"
        )
        settings: dict[str, Any] = {"loss": loss, "pairing": pairing, "online": True, "refresh": 2, "batch_size": 2}
        settings |= {"max_new_tokens": 5, "max_length": 24, "weight_decay": 0.1, "steps": 10}
        settings["reward"] = f"{tmp_path / 'judge.py'}:score"
        cases = {name: training.config(path, tmp_path / name, **settings) for name in ("one", "ddp")}
        one_and_several(ranks, tmp_path, cases)
        assert differ(tmp_path / "one", tmp_path / "ddp") < ROUNDING
        one, two = (sorted((tmp_path / name / "rollouts").iterdir()) for name in ("one", "ddp"))
        assert [p.read_text() for p in one] == [p.read_text() for p in two]
        if loss != "swepo":
            assert_metrics(tmp_path / "one", tmp_path / "ddp")
            rows = [json.loads(line) for p in one if "round" in p.name for line in p.read_text().splitlines()]
            pairs = [len({*row["rewards"]}) > 1 for row in rows]
            assert {*zip(pairs[::2], pairs[1::2])} >= {(False, False), (True, True)}
            assert {*zip(pairs[::2], pairs[1::2])} & {(False, True), (True, False)}

    @pytest.mark.full
    def test_draws(self, ranks, groups, tmp_path):
        """What mc_po draws is another on every rank, and the same whatever keeps the ranks together."""
        both = [
            training.config(groups, tmp_path / how, loss="mc_po", parallel=how, batch_size=3)
            for how in ("ddp", "fsdp2")
        ]
        ranks(2)(training.run, both)
        assert differ(tmp_path / "ddp", tmp_path / "fsdp2") < ROUNDING

    def test_every_unit_is_seen_once(self):
        """The shares of all ranks, one after the other, are the batches of one process."""
        whole = list(Order(13, 4, 7))
        assert sorted(unit for batch in whole for unit in batch) == list(range(13))
        for world in (2, 3, 4):
            asked: list[Any] = []
            ranks = [_Shares(list(range(13)), asked.append, Ranks(rank, world)) for rank in range(world)]
            for batch in whole:
                shares = [units for units, counts in (rank.__getitems__(batch) for rank in ranks) if counts]
                assert [unit for share in shares for unit in share] == batch
                sizes = [*map(len, shares)] + [0] * (world - len(shares))
                assert max(sizes) - min(sizes) <= 1
            assert asked == [batch for batch in whole for _ in ranks]


class TestCheckpoints:
    SETTINGS: dict[str, Any] = {"loss": "bco", "steps": 7, "save_steps": 2, "log_steps": 3, "grad_accum": 2}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            full((2, "ddp"), (2, "ddp")),
            ((2, "fsdp2"), (1, None)),
            full((1, None), (2, "fsdp2")),
            full((2, "fsdp2"), (2, "fsdp2")),
            full((2, "ddp"), (1, None)),
            full((1, None), (2, "ddp")),
            full((2, "ddp"), (2, "fsdp2")),
            full((2, "fsdp2"), (4, "fsdp2")),
            full((4, "ddp"), (2, "ddp")),
        ],
    )
    def test_broken_off(self, ranks, data, tmp_path, before, after):
        """Bitwise on the same ranks, to rounding on others; metrics too."""

        def go(world: int, how: str | None, folder: str, stop: int | None = None) -> Any:
            case = training.config(data, tmp_path / folder, **self.SETTINGS, parallel=how)
            return (training.run([case], stop) if world == 1 else ranks(world)(training.run, [case], stop)[0])[0]

        go(*before, "whole")
        assert go(*before, "cut", stop=5).startswith("KeyboardInterrupt")
        assert go(*after, "cut")["resumed"] == 4
        found = differ(tmp_path / "whole", tmp_path / "cut")
        assert found == 0 if before == after else found < ROUNDING
        assert_metrics(tmp_path / "whole", tmp_path / "cut")
        kept = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
        assert kept == ["checkpoint-6", "checkpoint-7"]

    @pytest.mark.full
    def test_of_adapters(self, ranks, data, base, tmp_path):
        settings: dict[str, Any] = {"model": str(base), "lora_r": 2, "save_steps": 2}
        for name, first, second in (("a", "ddp", "fsdp2"), ("b", None, "ddp"), ("c", "fsdp2", None)):
            whole = training.config(data, tmp_path / f"whole-{name}", **settings, parallel=first)
            for case, how, stop in ((whole, first, None), (None, first, 3), (None, second, None)):
                each = case or training.config(data, tmp_path / f"cut-{name}", **settings, parallel=how)
                ran = training.run([each], stop) if how is None else ranks(2)(training.run, [each], stop)[0]
                assert isinstance(ran[0], dict) == (stop is None), ran
            assert differ(tmp_path / f"whole-{name}", tmp_path / f"cut-{name}") < 10 * ROUNDING

    def test_reference_scores_go_on(self, ranks, data, tmp_path):
        """Blocks are kept as they are made; the scores are those of one process, bitwise."""
        settings: dict[str, Any] = {"steps": 5, "batch_size": 2, "eval_rows": 2}
        case = training.config(data, tmp_path / "two", **settings, ref_cache=str(tmp_path / "cache-two"))
        train(training.config(data, tmp_path / "one", **settings, ref_cache=str(tmp_path / "cache-one")))
        begun = ranks(2)(training.blocks, case)
        assert begun[0] == begun[1]
        assert begun[0][2] == begun[0][3]  # the third again, but neither of those before it
        one, two = ({f.name: load_file(f) for f in (tmp_path / f"cache-{name}").iterdir()} for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert len(begun[0]) == len(one) + 1
        assert all(torch.equal(one[file][name], two[file][name]) for file in one for name in one[file])


PATHS = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import training
"""
PROGRAM = f"""{PATHS}
training.prepare_torchrun()
from rgpb.cli import main
sys.exit(main(sys.argv[1:]))
"""


def launch(tmp_path: Path, world: int, *flags: str, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
    """`rgpb train` under torchrun; with restarts under its agent alone, which forks the ranks."""
    program = tmp_path / "program.py"
    program.write_text(f"{PATHS}training.launch({world}, {restarts}, sys.argv[1:])" if restarts else PROGRAM)
    torchrun = () if restarts else ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
    command = (sys.executable, *torchrun, str(program), "train", *flags)
    return subprocess.Popen(
        [*command, "--cpu", "--quiet", "--vocab-size=258", "--lr=3e-3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class TestDeaths:
    """A rank that is killed, wherever it is, costs the steps since the last checkpoint."""

    FLAGS = (
        "--loss=dpo",
        "--steps=40",
        "--eval-rows=200",
        "--batch-size=4",
        "--save-steps=2",
        "--log-steps=5",
        "--timeout=60",
    )

    def case(self, data, folder, parallel):
        return training.config(data, folder, steps=40, save_steps=2, log_steps=5, parallel=parallel)

    @pytest.mark.full
    def test_killed_in_a_save(self, ranks, data, tmp_path):
        """Rank 1 before it writes its part, while rank 0 does. The run goes on elsewhere."""
        process = launch(
            tmp_path, 2, "--output", str(tmp_path / "cut"), "--data", data, *self.FLAGS, RGPB_TEST_KILL="save 4"
        )
        assert ranks(2)(training.run, [self.case(data, tmp_path / "whole", "ddp")])[0][0]["resumed"] == 0
        _, error = process.communicate(timeout=200)
        assert process.returncode != 0, error
        assert "Signal 9 (SIGKILL)" in error
        assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*") if path.suffix != ".tmp"] == [
            "checkpoint-2"
        ]
        assert ranks(2)(training.run, [self.case(data, tmp_path / "cut", "ddp")])[0][0]["resumed"] == 2
        assert differ(tmp_path / "whole", tmp_path / "cut") == 0
        assert_metrics(tmp_path / "whole", tmp_path / "cut", rel=0, abs=0)
        assert not list((tmp_path / "cut").glob("*.tmp"))

    @pytest.mark.full
    @pytest.mark.parametrize(("parallel", "seed"), [("ddp", 0), ("fsdp2", 1)])
    def test_killed_at_ten_moments(self, ranks, data, tmp_path, parallel, seed):
        """In a save, in its rename, or up to a fifth of a second after a step began; torchrun's agent starts anew each
        time, and no start fails by itself: there is one for each death."""
        assert isinstance(ranks(2)(training.run, [self.case(data, tmp_path / "whole", parallel)])[0][0], dict)
        random = Random(seed)
        moments = [f"step {2 * i + 2} {random.uniform(0, 0.2):.3f}" for i in range(10)]
        moments[2], moments[5] = "save 6", "rename 12"
        process = launch(
            tmp_path, 2, "--output", str(tmp_path / "cut"), "--data", data, *self.FLAGS, "--parallel", parallel,
            restarts=10, RGPB_TEST_KILL=",".join(moments),
        )  # fmt: skip
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error
        assert re.findall("killed: (.*)", error) == moments
        assert differ(tmp_path / "whole", tmp_path / "cut") == 0
        assert_metrics(tmp_path / "whole", tmp_path / "cut", rel=0, abs=0)
        assert not list((tmp_path / "cut").glob("*.tmp"))

    def test_a_start_knows_nothing_of_earlier_ones(self, monkeypatch):
        """In one store, as torchrun keeps it over its restarts."""
        left, world, calls = torch.distributed.HashStore(), 3, itertools.count()

        def joined(*_: Any, **__: Any) -> Any:
            return iter([(left, next(calls) % world, world)])

        monkeypatch.setattr(torch.distributed, "rendezvous", joined)
        for start in range(3):
            with ThreadPoolExecutor(world) as pool:
                stores = [store for store, _, _ in pool.map(_meet, [20.0] * world)]
            assert not any(store.check(["address"]) for store in stores)
            stores[0].set("address", str(start))
            assert {store.get("address") for store in stores} == {str(start).encode()}
        with pytest.raises(RuntimeError, match="ranks 1, 2 missing at the start: silent for 0.2 s"):
            _meet(0.2)

    @pytest.mark.full
    def test_a_silent_rank_is_named(self, data, tmp_path):
        flags = ("--data", data, "--output", str(tmp_path / "run"), *self.FLAGS[:-1], "--timeout=30")
        process = launch(tmp_path, 2, *flags, RGPB_TEST_KILL="hang 3")
        _, error = process.communicate(timeout=200)
        assert process.returncode != 0
        assert "rgpb: error: rank 1 missing in step 4: gone, or silent for 30 s (--timeout)" in error
        assert error.count("rgpb: error") == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "environment", "message"),
        [
            ({"parallel": "ddp"}, {}, "parallel: expected none in one process .*, got 'ddp'"),
            ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE: expected RANK, .* beside it, as torchrun sets them; got 2 alone"),
            ({"batch_size": 1}, {"WORLD_SIZE": "2", "RANK": "0"}, "batch_size: expected .* each of 2 processes, got 1"),
            (
                {},
                {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
                "ACCELERATE_USE_FSDP: expected none, .* got 'true'",
            ),
            (
                {},
                {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
                "ACCELERATE_MIXED_PRECISION: expected 'no', as --bf16 says, got 'bf16'",
            ),
            ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED: expected none, .* got 'true'"),
            ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION: expected 'no', .* got 'fp16'"),
        ],
    )
    def test_processes(self, data, tmp_path, monkeypatch, changes, environment, message):
        if len(environment) > 1:
            environment = {**dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0"), **environment}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message):
            check_devices(training.config(data, tmp_path / "run", **changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"parallel": "tp"}, r"parallel: expected one of \('ddp', 'fsdp2'\), got 'tp'"),
            ({"timeout": 0.0}, "timeout: expected a positive number, got 0.0"),
            ({"dtype": "float16"}, r"dtype: expected one of \('float32', 'bf16'\), got 'float16'"),
            ({"dtype": "bf16", "bf16": True}, "bf16: expected False with dtype='bf16'"),
            ({"lora_r": 4}, "lora_r: expected a folder as model, .* got 'tiny-llama', a new model"),
            ({"merge": True}, "merge: expected none without lora_r, got True"),
            ({"lora_target": "x"}, "lora_target: expected none without lora_r, got 'x'"),
            (
                {"online": True, "loss": "swepo", "parallel": "fsdp2"},
                "parallel: expected ddp with online, .* got 'fsdp2'",
            ),
            ({"online": True, "loss": "swepo", "lora_r": 2, "model": "."}, "lora_r: expected none with online, got 2"),
        ],
    )
    def test_settings(self, data, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            training.config(data, tmp_path / "run", **changes).check()

    def test_adapters(self, data, base, tmp_path):
        settings: dict[str, Any] = {"model": str(base), "lora_r": 2}
        with pytest.raises(ValueError, match=r"lora_target: expected modules of .*, got 'nope'"):
            train(training.config(data, tmp_path / "a", **settings, lora_target="nope"))

    @pytest.mark.full
    def test_bad_input_is_reported_once(self, data, tmp_path):
        """By rank 0, before any rank waits for another."""
        process = launch(tmp_path, 2, "--data", data, "--output", str(tmp_path / "run"), "--loss=nope", "--timeout=3")
        _, error = process.communicate(timeout=200)
        assert process.returncode != 0
        assert len(re.findall("rgpb: error: ", error)) == 1
        assert re.search(r"rgpb: error: (rank 1: )?loss: expected a function or one of", error)  # who comes first
        assert not (tmp_path / "run").exists()
