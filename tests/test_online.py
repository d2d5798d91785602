"""Online training: reward functions, sampling, rounds and their files, learning, interrupted runs, refusals."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rgpb import cli, hf
from rgpb.hf.batches import reference_of
from rgpb.objectives import resolve
from rgpb.train import TrainConfig, report, train
from rgpb.train import config as settings_module
from rgpb.train.evaluate import group_arguments, model_inputs
from rgpb.train.models import make_model
from rgpb.train.online import Rollouts, units_from
from rgpb.train.rewards import load_reward
from rgpb.train.rows import read_prompts
from rgpb.train.tokens import Collator, train_tokenizer, turn_end
from rgpb.train.trainer import PreferenceTrainer

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS = ["1:", "two words:", "", "3:", "a longer one than all others:", "4:"]
CHAT = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model, smaller, and no pictures."""
    monkeypatch.setitem(settings_module.BUILT_IN, "tiny-llama", ("LlamaConfig", SMALL))
    monkeypatch.setattr(report, "plot", lambda runs, path: None)


def full(*values: Any) -> Any:
    """A case of `make test-full` alone."""
    return pytest.param(*values, marks=pytest.mark.full)


def ascii_share(prompts: list[Any], completions: list[str]) -> list[float]:
    """The part of the characters that are ASCII: half of those of an untrained model of bytes."""
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]


async def later(prompts: list[Any], completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def alike(prompts: list[Any], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def paired(text: str) -> dict[str, str]:
    """Settings of "dpo best-random"; the pairing may be left out."""
    loss, _, pairing = text.partition(" ")
    return {"loss": loss, **({"pairing": pairing} if pairing else {})}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def config(data: str, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"loss": "mc_po", "online": True, "steps": 6, "refresh": 2, "batch_size": 2, "lr": 1e-2}
    settings |= {"vocab_size": 258, "log_steps": 2, "cpu": True, "max_length": 24, "max_new_tokens": 6}
    return TrainConfig(data=data, output=str(output), progress=False, **{**settings, **changes})


OFFLINE: dict[str, Any] = {"online": False, "refresh": 16, "max_new_tokens": None}


def records(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what differs from run to run."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_bytes")} for r in report.read_metrics(folder)]


def rounds(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of each round's file."""
    files = sorted((folder / "rollouts").glob("round-*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def untrained(seed: int = 0, **more: Any) -> PreTrainedModel:
    """A small model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    more = {"eos_token_id": 0, **more}  # as the tokenizer's
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, **SMALL, **more)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.5)
    return model


def rollouts(path: Path, prompts: list[Any] = PROMPTS, **changes: Any) -> Rollouts:
    tokenizer = train_tokenizer(["abc"], 258)
    tokenizer.chat_template = TEMPLATE
    given: dict[str, Any] = {"reward": ascii_share, "ref": None, "folder": path / "rollouts", "asks": 6}
    given |= {"sampler": None, "options": {}, "spec": resolve(changes.get("loss", "swepo"))}
    given |= {name: changes.pop(name) for name in given if name in changes}
    settings = {"refresh": 3, "max_length": 40, "max_new_tokens": 5, "batch_size": 4, **changes}
    asked = write(path / "asked.jsonl", [{"prompt": prompt} for prompt in prompts])
    return Rollouts(read_prompts(asked), tokenizer, config(asked, path, **settings), **given)


class TestReward:
    def test_of_a_file_and_of_a_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "def score(prompts, completions):\n    return [len(p) + len(c) for p, c in zip(prompts, completions)]\n"
        file = tmp_path / "my_rewards.py"
        file.write_text(code)
        assert load_reward(f"{file}:score")(["ab"], ["cde"]) == [5]
        package = tmp_path / "package_of_rewards"
        package.mkdir()
        (package / "short.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert load_reward("package_of_rewards.short:score")(["ab"], [""]) == [2]
        assert load_reward("statistics:fmean") is __import__("statistics").fmean

    def test_a_file_may_hold_a_dataclass(self, tmp_path: Path) -> None:
        """Which looks its own module up by name."""
        code = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Judge:\n"
        code += "    x: float = 2.0\n\n\ndef score(prompts, completions):\n    return [Judge().x] * len(completions)\n"
        (tmp_path / "judge.py").write_text(code)
        assert load_reward(f"{tmp_path / 'judge.py'}:score")(["a", "b"], ["", ""]) == [2.0, 2.0]

    def test_a_file_that_raises_is_named_with_its_line(self, tmp_path: Path) -> None:
        (tmp_path / "judge.py").write_text("import json\njson.loads('')\n")
        with pytest.raises(
            ValueError, match=r"reward: expected a module .*judge\.py' \(JSONDecodeError: .*, in .*:\d+\)"
        ):
            load_reward(f"{tmp_path / 'judge.py'}:score")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("json", "expected FILE.py:FUNCTION or MODULE:FUNCTION, got 'json'"),
            ("json:", "expected FILE.py:FUNCTION or MODULE:FUNCTION, got 'json:'"),
            (":f", "expected FILE.py:FUNCTION or MODULE:FUNCTION, got ':f'"),
            ("nowhere.py:f", "expected a file, got 'nowhere.py', which does not exist"),
            ("no_such_module:f", r"expected a module that can be imported, got 'no_such_module' \(No module"),
            (".relative:f", "expected a module that can be imported, got '.relative'"),
            ("json:nothing", "expected a function 'nothing' in json, got NoneType"),
            ("math:pi", "expected a function 'pi' in math, got float"),
        ],
    )
    def test_refused(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"reward: {message}"):
            load_reward(name)


class TestSampling:
    def test_it_has_a_random_state_of_its_own(self, tmp_path: Path) -> None:
        data, model = rollouts(tmp_path), untrained().train()
        torch.manual_seed(5)
        before, python = torch.random.get_rng_state(), random.getstate()
        one = data.sample(model, data.prompt_ids, seed=3, count=2)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert random.getstate() == python
        assert all(module.training for module in model.modules())
        torch.manual_seed(6)
        assert data.sample(model, data.prompt_ids, seed=3, count=2) == one
        assert data.sample(model, data.prompt_ids, seed=4, count=2) != one

    def test_dropout_is_off(self, tmp_path: Path) -> None:
        data = rollouts(tmp_path)
        one, other = (
            data.sample(untrained(attention_dropout=p).train(), data.prompt_ids, seed=3, count=4) for p in (0.0, 0.9)
        )
        assert one == other

    @pytest.mark.parametrize("same", [False, True])
    def test_completions_stop_at_the_end_token(self, tmp_path: Path, same: bool) -> None:
        """Also where the end token is what fills up rows."""
        data = rollouts(tmp_path, max_new_tokens=20, temperature=3.0, batch_size=6)
        end = data.tokenizer.eos_token_id
        data.pad = end if same else data.pad
        model = untrained()
        with torch.no_grad():  # likelier, so that some stop at once and some never
            model.lm_head.weight[end] += 1.5 * model.model.norm.weight.sign() * model.lm_head.weight.mean(0).sign()
        made = data.sample(model, data.prompt_ids * 4, seed=0, count=4)
        assert len(made) == 4 * 4 * len(PROMPTS)
        assert all(new.index(end) == len(new) - 1 if end in new else len(new) == 20 for new in made)
        ended = sum(end in new for new in made)
        assert 5 < ended < len(made) - 5
        assert any(len(new) < 10 for new in made)

    @pytest.mark.parametrize("own", [None, 7, [7, 9]])
    def test_completions_stop_at_every_end_there_is(self, tmp_path: Path, own: Any) -> None:
        """The model's settings', the tokenizer's, and how the template ends a turn: here "<|im_end|>"."""
        data = rollouts(tmp_path, prompts=[CHAT], max_new_tokens=20, temperature=3.0, max_length=60)
        data.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        data.tokenizer.chat_template = TEMPLATE.replace("<|endoftext|>", "<|im_end|>")
        row = read_prompts(write(tmp_path / "chat.jsonl", [{"prompt": CHAT}])).rows[0]
        data.turn_end = turn_end(row, data.tokenizer)
        assert data.turn_end == 258
        data.turn_end = 200  # one that the model has
        model: Any = untrained(eos_token_id=own)
        ends = {0, 200, *(own if isinstance(own, list) else [] if own is None else [own])}
        made = data.sample(model, data.prompt_ids * 40, seed=0, count=4)
        assert data.ends(model) == ends
        for new in made:
            assert not ends & set(new[:-1])
            assert new[-1] in ends or len(new) == 20
        assert {new[-1] for new in made if len(new) < 20} == ends

    def test_padding_on_the_left_changes_nothing(self, tmp_path: Path) -> None:
        """So cold that the likeliest token is drawn: prompts of 1 to 20 tokens in one batch, alone, and greedily."""
        model: Any = untrained()
        alone, together = (rollouts(tmp_path, temperature=1e-6, batch_size=size) for size in (1, 6))
        ids = together.prompt_ids
        assert len({len(prompt) for prompt in ids}) > 3
        found = [data.sample(model, ids, seed=0, count=1) for data in (alone, together)]
        assert found[0] == found[1]
        for prompt, new in zip(ids, found[0]):
            row = torch.tensor([prompt])
            options = {"attention_mask": torch.ones_like(row), "do_sample": False, "max_new_tokens": 5}
            greedy = model.generate(row, pad_token_id=together.pad, **options)[0, len(prompt) :].tolist()
            assert new == greedy[: len(new)]

    def test_it_follows_the_models_own_distribution(self, tmp_path: Path) -> None:
        """Frequencies of the first token at temperature 2 against the softmax, and nothing cut off."""
        data, model = rollouts(tmp_path, prompts=["x:"], temperature=2.0, max_new_tokens=1), untrained()
        with torch.no_grad():
            expected = (model(torch.tensor([data.prompt_ids[0]])).logits[0, -1].double() / 2).softmax(0)
        made = torch.tensor(data.sample(model, data.prompt_ids, seed=0, count=20000))[:, 0]
        found = torch.bincount(made, minlength=258) / 20000
        assert (found - expected).abs().max() < 5 * (expected.max() / 20000).sqrt()
        assert (found > 0).sum() > 100

    @pytest.mark.parametrize("setting", [{"repetition_penalty": 9.0}, {"min_p": 0.9}, {"num_beams": 2}])
    def test_what_the_folder_says_of_generation_does_not_count(self, tmp_path: Path, setting: dict[str, Any]) -> None:
        """Many models come with a repetition penalty or the like: those aren't samples of the policy."""
        data, plain, bent = rollouts(tmp_path, max_new_tokens=12), untrained(), untrained()
        bent.generation_config.update(**setting)
        one, other = (data.sample(model, data.prompt_ids, seed=0, count=6) for model in (plain, bent))
        assert one == other


class TestSampler:
    def judged(self, path: Path, sampler: Any, prompts: list[Any] = PROMPTS) -> list[dict[str, Any]]:
        """Rows of the first two prompts, two completions each."""
        self.made = rollouts(path, prompts, sampler=sampler)
        return self.made.judged(untrained(), [0, 1], "round-00000", 2)

    def test_texts_are_ended_and_cut(self, tmp_path: Path) -> None:
        """As if the model had said them; the sampler sees the texts and tokens of prompts, and the model at rest."""
        seen = []

        def sampler(prompts: Any, count: int, model: Any) -> Any:
            seen.extend([*prompts, count, model.training, torch.is_grad_enabled()])
            return [["ab", "longer than that"], ["", "c<|endoftext|>and more"]]

        rows = self.judged(tmp_path, sampler)
        tokenizer, end = self.made.tokenizer, self.made.tokenizer.eos_token_id
        ids = [tokenizer(text)["input_ids"] for text in ("ab", "longer than that", "c")]
        assert [row["tokens"] for row in rows] == [[[*ids[0], end], ids[1][:5]], [[end], [*ids[2], end]]]
        assert [row["completions"] for row in rows] == [["ab", "longe"], ["", "c"]]
        assert seen == [*((p, tokenizer(p)["input_ids"]) for p in PROMPTS[:2]), 2, False, False]

    def test_tokens_stand_as_they_are(self, tmp_path: Path) -> None:
        given = [[torch.tensor([70, 71]), [72]], [[73, 0, 74], [75] * 9]]
        rows = self.judged(tmp_path, lambda prompts, count, model: given)
        assert [row["tokens"] for row in rows] == [[[70, 71], [72]], [[73, 0], [75] * 5]]

    def test_chats_end_as_the_template_ends_a_turn(self, tmp_path: Path) -> None:
        rows = self.judged(tmp_path, lambda prompts, count, model: [["a", "b"]] * 2, [CHAT, CHAT])
        assert self.made.end == self.made.turn_end
        assert all(tokens[-1] == self.made.turn_end for row in rows for tokens in row["tokens"])

    @pytest.mark.parametrize(
        ("given", "got"),
        [
            ([["a", "b"]], "got 1 lists"),
            ("ab", "got str"),
            (None, "got NoneType"),
            ([["a"], ["a", "b"]], r"got \['a'\] for .*asked.jsonl:1"),
            ([["a", "b"], "ab"], "got 'ab' for .*asked.jsonl:2"),
            ([["a", [258]], ["a", "b"]], r"below 258; got \[258\] for"),
            ([["a", []], ["a", "b"]], r"below 258; got \[\] for"),
            ([["a", [0.5]], ["a", "b"]], r"below 258; got \[0.5\] for"),
            ([["a", 7], ["a", "b"]], "below 258; got 7 for"),
        ],
    )
    def test_another_answer_is_refused(self, tmp_path: Path, given: Any, got: str) -> None:
        with pytest.raises(ValueError, match=rf"sampler: expected 2 completions of each of 2 prompts, .*{got}"):
            self.judged(tmp_path, lambda prompts, count, model: given)

    def test_what_it_raises_names_the_rows(self, tmp_path: Path) -> None:
        def fails(prompts: Any, count: int, model: Any) -> Any:
            raise OSError("gone")

        with pytest.raises(
            RuntimeError, match=r"sampler: the function raised OSError on 2 .* of .*asked\.jsonl:1, .*:2"
        ):
            self.judged(tmp_path, fails)

    def test_a_run_of_the_command(self, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Trained on what the file's function says; the same file goes on, another one is another run."""
        code = (
            "def {}(prompts, count, model):\n    return [[p.text + 'a' * k for k in range(count)] for p in prompts]\n"
        )
        code += "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
        for name in ("mine", "other"):
            (tmp_path / f"{name}.py").write_text(code.format(name))
        flags = ["--online", "--data", data, "--output", str(tmp_path / "run"), "--loss=swepo", "--vocab-size=258"]
        flags += ["--steps=1", "--max-length=80", "--cpu", f"--reward={tmp_path}/mine.py:score"]
        assert cli.main(["train", *flags, f"--sampler={tmp_path}/mine.py:mine"]) == 0
        assert "training online with swepo: step 1 of 1" in capsys.readouterr().err
        ((row, *_),) = rounds(tmp_path / "run")
        assert row["completions"] == [row["prompt"] + "a" * k for k in range(4)]
        assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["sampler"] == "mine.py:mine"
        assert cli.main(["train", *flags, f"--sampler={tmp_path}/other.py:other"]) == 2
        assert "sampler is 'mine.py:mine' there and 'other.py:other' now" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "sampler", "message"),
        [
            (
                {"sampler": "x.py:y", "temperature": 0.5},
                None,
                "temperature: expected none with sampler, which has its own",
            ),
            ({"sampler": "x.py:y"}, None, "sampler: expected a file, got 'x.py', which does not exist"),
            ({"sampler": "x.py:y"}, alike, "sampler: expected none beside the one named in the settings"),
            ({}, alike, r"sampler: expected a function of \(prompts, count, model\), got another"),
            ({**OFFLINE, "sampler": "x.py:y"}, None, "sampler: expected none without online, got 'x.py:y'"),
        ],
    )
    def test_refused(self, data: str, tmp_path: Path, changes: Any, sampler: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(config(data, tmp_path / "run", **changes), reward=ascii_share, sampler=sampler)


class TestGroups:
    def test_the_best_stands_first_and_keeps_its_tokens(self, tmp_path: Path) -> None:
        data, model = rollouts(tmp_path), untrained()
        made: Any = data.groups(model, [1, 3], "some")
        rows = [json.loads(line) for line in (tmp_path / "rollouts" / "some.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [PROMPTS[1], PROMPTS[3]]
        for row, unit, p in zip(rows, made, (1, 3)):
            assert row["completions"] == data.tokenizer.batch_decode(row["tokens"], skip_special_tokens=True)
            assert row["rewards"] == ascii_share([], row["completions"])
            order = sorted(range(4), key=lambda k: -row["rewards"][k])
            assert [r.reward for r in unit] == [row["rewards"][k] for k in order]
            assert [r.label for r in unit] == [True, False, False, False]
            for response, k in zip(unit, order):
                assert response.tokens.tolist() == data.prompt_ids[p] + row["tokens"][k]
                assert response.prompt == len(data.prompt_ids[p])
        again = data.groups(untrained(seed=1), [1, 3], "some")  # from the file, whatever the model is now
        assert again.fingerprint() == made.fingerprint()

    def test_reference_scores_are_those_of_the_reference(self, tmp_path: Path) -> None:
        policy, ref = untrained(), untrained(seed=1)
        made: Any = rollouts(tmp_path, ref=ref).groups(policy, range(6), "some")
        for response in (r for unit in made for r in unit):
            with torch.no_grad():
                logits = ref(response.tokens[None]).logits[0].double()
            own = logits.log_softmax(-1)[:-1].gather(1, response.tokens[1:, None])[:, 0]
            assert response.ref is not None
            torch.testing.assert_close(response.ref[0].double(), own[response.prompt - 1 :], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("loss", ["mc_po", "swepo"])
    def test_one_judged_all_alike_contributes_nothing(self, tmp_path: Path, loss: str, packing: bool) -> None:
        """Nor does it make the others' share smaller than that of a unit."""

        def reward(prompts: list[str], completions: list[str]) -> list[float]:
            return [0.5 if p == "1:" else float(i % 4 == 2) for i, p in enumerate(prompts)]

        model = untrained()
        made: Any = rollouts(tmp_path, loss=loss, reward=reward, ref=untrained(seed=1)).groups(model, [0, 1, 3], "some")
        assert [len({r.reward for r in unit}) for unit in made] == [1, 2, 2]
        assert [sum(len(r.tokens) > r.prompt for r in unit) for unit in made] == [0, 4, 4]
        spec = resolve(loss)
        options = {"m": 3} if loss == "mc_po" else {}

        def values(units: list[int]) -> Tensor:
            batch = Collator(257, packing)([made[i] for i in units])
            given = {**group_arguments(spec, batch), **options, "ref": reference_of(batch), "reduction": "none"}
            return hf.loss(model, model_inputs(batch), loss, **given)

        whole = values([0, 1, 2])
        assert whole[0] == 0
        assert (whole[1:] > 0).all()
        torch.testing.assert_close(whole[1:], values([1, 2]), rtol=1e-4, atol=1e-5)

    def test_chats(self, tmp_path: Path) -> None:
        seen: list[Any] = []

        def reward(prompts: list[Any], completions: list[str]) -> list[float]:
            seen.extend(prompts)
            return ascii_share(prompts, completions)

        data = rollouts(tmp_path, prompts=[CHAT, CHAT], reward=reward)
        assert data.tokenizer.decode(data.prompt_ids[0]) == "[user]hi<|endoftext|>\n[assistant]"
        data.groups(untrained(), [0, 1], "some")
        assert seen == [CHAT] * 8

    def test_long_prompts_keep_their_end_and_empty_ones_have_a_token(self, tmp_path: Path) -> None:
        data = rollouts(tmp_path, prompts=["0123456789" * 4, ""], max_length=12, max_prompt_length=4)
        assert data.tokenizer.batch_decode(data.prompt_ids) == ["3456789", "<|endoftext|>"]
        assert {"prompts cut": 1, "rows with an empty prompt": 1}.items() <= data.counts.items()
        assert data.new_tokens == 5
        assert rollouts(tmp_path, max_length=12, max_prompt_length=4, max_new_tokens=None).new_tokens == 8

    @pytest.mark.parametrize(
        ("returned", "got"),
        [
            ([1.0], "expected 24 finite numbers, one per completion, got 1 numbers for .* and 3 others"),
            ([], "got 0 numbers"),
            ([0.0] * 23 + [math.nan], r"expected 24 finite numbers, one per completion, got nan for \S+:\d+$"),
            ([math.inf] * 24, "got inf"),
            (None, "expected 24 finite numbers"),
            ([None] * 24, "expected 24 finite numbers"),
            (["good"] * 24, "expected 24 finite numbers"),
        ],
    )
    def test_a_reward_of_another_kind(self, tmp_path: Path, returned: Any, got: str) -> None:
        data = rollouts(tmp_path, reward=lambda prompts, completions: returned)
        with pytest.raises(ValueError, match=f"reward: .*{got}"):
            data.groups(untrained(), range(6), "some")
        assert not (tmp_path / "rollouts").exists()

    def test_a_reward_may_change_what_it_is_given(self, tmp_path: Path) -> None:
        seen = []

        def reward(prompts: list[Any], completions: list[str]) -> list[int]:
            for prompt, completion in zip(prompts, completions):
                prompt.append({"role": "assistant", "content": completion})
                seen.append(len(prompt))
            completions[:] = [""] * len(completions)
            return [*range(len(completions))]

        data = rollouts(tmp_path, prompts=[CHAT], reward=reward)
        (row,) = [data.judged(untrained(), [0], "some", 3) for _ in range(2)][1]
        assert seen == [2] * 6
        assert row["prompt"] == CHAT
        assert row["completions"] == data.tokenizer.batch_decode(row["tokens"], skip_special_tokens=True) != [""] * 3

    def test_rewards_may_be_a_tensor(self, tmp_path: Path) -> None:
        data = rollouts(tmp_path, reward=lambda prompts, completions: torch.arange(len(completions)))
        made: Any = data.groups(untrained(), [0], "some")
        assert made.rewards.tolist() == [[3.0, 2.0, 1.0, 0.0]]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_new_tokens": 21}, "max_new_tokens: expected 1 to 20, .*beside 20 of the prompt, got 21"),
            ({"max_prompt_length": 40}, "expected .* max_length=40"),
            ({"max_prompt_length": 50, "max_new_tokens": None}, "expected .* max_length=40"),
            ({"max_length": 1}, "max_length: expected at least 2, got 1"),
        ],
    )
    def test_no_room_for_completions(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            rollouts(tmp_path, **changes)


class TestPairings:
    """Two of six prompts are judged all alike; the others have three rewards, and one of two completions."""

    REWARDS: ClassVar = {p: [1.5, 0.5, 3.0, 0.5] for p in PROMPTS} | dict.fromkeys(("1:", "3:"), [2.0] * 4)
    TEXTS = ("ab", "c d e", "", "fgh")  # an empty completion is the end token

    @classmethod
    def answers(cls, prompts: list[Any], count: int, model: Any) -> list[list[str]]:
        return [list(cls.TEXTS)[:count] for _ in prompts]

    @classmethod
    def judge(cls, prompts: list[Any], completions: list[str]) -> list[float]:
        return [cls.REWARDS[p][cls.TEXTS.index(c)] for p, c in zip(prompts, completions)]

    @pytest.mark.parametrize(
        ("pairing", "rewards", "units"),
        [
            ("best-worst", [3, 2, 1, 1], [([0, 2], True)]),
            ("best-worst", [3, 3, 3, 1], [([0, 3], True)]),
            ("best-random", [3, 3, 1], [([0, 2], True)]),
            ("unpaired", [4, 2, 1, 1], [([0], True), ([2], False), ([3], False)]),
            ("unpaired", [0.3, 0.2, 0.1], [([0], True), ([2], False)]),  # whose mean is no 0.2 in float64
            ("unpaired", [1, 0, 0, 0], [([0], True), ([1], False), ([2], False), ([3], False)]),
            *((pairing, [0.1] * 3, []) for pairing in ("best-worst", "best-random", "unpaired", "groups")),
        ],
    )
    def test_units(self, pairing: str, rewards: list[float], units: Any) -> None:
        assert units_from(rewards, pairing, torch.Generator()) == units

    def test_a_random_pair_has_any_lower_one(self) -> None:
        """None that is as good as the best; each as often."""
        draw = torch.Generator().manual_seed(0)
        drawn = [units_from([5.0, 5.0, 3.0, 3.0, 1.0], "best-random", draw) for _ in range(600)]
        places = [place for ((pair, good),) in drawn for place in pair[1:] if good and pair[0] == 0]
        assert len(places) == 600
        assert {place: pytest.approx(200, abs=50) for place in (2, 3, 4)} == {p: places.count(p) for p in {*places}}

    def test_a_pair_and_what_is_left_out(self, tmp_path: Path) -> None:
        """The best stands first, with its own tokens and reference scores."""
        policy, ref = untrained(), untrained(seed=1)
        data = rollouts(tmp_path, loss="dpo", reward=self.judge, sampler=self.answers, ref=ref)
        made: Any = data.groups(policy, [0, 1, 3], "some")
        ids = [data.tokenizer(text)["input_ids"] + [data.tokenizer.eos_token_id] for text in self.TEXTS]
        ((chosen, rejected),) = made
        assert [r.tokens.tolist() for r in (chosen, rejected)] == [data.prompt_ids[1] + ids[k][:5] for k in (2, 1)]
        assert [(r.label, r.reward) for r in (chosen, rejected)] == [(True, None), (False, None)]
        for response in (chosen, rejected):
            with torch.no_grad():
                own = ref(response.tokens[None]).logits[0, :-1].double().log_softmax(-1)
            own = own.gather(1, response.tokens[1:, None])[response.prompt - 1 :, 0]
            assert response.ref is not None
            torch.testing.assert_close(response.ref[0].double(), own, rtol=1e-4, atol=1e-4)
        assert made.counts == {"rows": 3, "units": 1, "responses": 2, "rows left out, all rewards equal": 2}
        single: Any = rollouts(tmp_path, loss="bnf", pairing="unpaired", reward=self.judge, sampler=self.answers)
        made = single.groups(policy, [0, 1, 3], "others")
        assert [(r.tokens[r.prompt :].tolist(), r.label) for (r,) in made] == [
            (ids[k][:5], good) for k, good in ((2, True), (0, True), (1, False), (3, False))
        ]

    @pytest.mark.parametrize(
        ("loss", "options"),
        [
            ("bnf unpaired", {}),
            full("dpo", {}),
            full("bnf", {}),
            full("mle", {}),
            full("simpo best-worst", {}),
            full("kto unpaired", {"z0": 0.0}),
        ],
    )
    def test_steps_are_those_of_the_same_rows_in_a_file(
        self, data: str, tmp_path: Path, loss: str, options: dict[str, Any]
    ) -> None:
        """Batches of one prompt, six a step, of which two have nothing; against one batch of all units there are."""
        common: dict[str, Any] = {"steps": 3, "lr": 1e-3, "loss_option": options, "max_length": 40, "warmup": 0.0}
        settings = {"batch_size": 1, "grad_accum": 6, "refresh": 1, **common, **paired(loss)}
        online = train(config(data, tmp_path / "online", **settings), reward=self.judge, sampler=self.answers)
        texts = [text or "<|endoftext|>" for text in self.TEXTS]  # a file's aren't empty
        rows = [{"prompt": p, "completions": texts, "rewards": rewards} for p, rewards in self.REWARDS.items()]
        count = 4
        if "unpaired" in loss:
            each = [
                (row["prompt"], *of) for row in rows for of in zip(texts, row["rewards"]) if len({*row["rewards"]}) > 1
            ]
            rows = [{"prompt": p, "completion": c, "label": reward > 1.375} for p, c, reward in each]
            count = len(rows)
        path = write(tmp_path / "rows.jsonl", rows)
        settings = {**OFFLINE, **common, "loss": paired(loss)["loss"], "batch_size": count, "allow": True}
        offline = train(config(path, tmp_path / "offline", **settings))
        one, other = (weights(tmp_path / name) for name in ("online", "offline"))
        start = make_model(config(data, tmp_path / "x"), "tiny-llama", train_tokenizer(["abc"], 258)).state_dict()
        moved = max((value - start[name]).abs().max() for name, value in one.items())
        assert moved > 1e-3
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)
        for name in ("loss", "logps/chosen", "agility"):
            assert online["after"][name] == pytest.approx(offline["after"][name], rel=1e-4, abs=1e-6)
        assert online["eval_counts"]["units"] == offline["eval_counts"]["units"] == count

    def test_a_step_without_a_pair_is_not_taken(
        self, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Weights and AdamW's state stay, momentum and decay or not; the learning rate and the next steps go on."""
        settings: dict[str, Any] = {"loss": "bco", "steps": 12, "batch_size": 1, "refresh": 6, "log_steps": 1}
        settings |= {"save_steps": 1, "keep_checkpoints": 12, "weight_decay": 0.1, "warmup": 0.0, "max_length": 40}
        result = train(config(data, tmp_path / "run", **settings), reward=self.judge, sampler=self.answers)
        asked = [row["prompt"] for each in rounds(tmp_path / "run") for row in each]
        assert sorted(asked) == sorted(2 * PROMPTS)
        saved = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 13)]
        states = [
            torch.load(tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
            for step in range(1, 13)
        ]
        for prompt, *around in zip(asked[1:], saved, saved[1:], states, states[1:]):
            before, after, *moments = around
            same = all(torch.equal(value, after[name]) for name, value in before.items())
            steps = [[float(state["step"]) for state in each.values()] for each in moments]
            assert same == (steps[0] == steps[1]) == (prompt in ("1:", "3:"))
        scheduler = torch.load(tmp_path / "run" / "checkpoint-12" / "scheduler.pt", weights_only=True)
        assert scheduler["last_epoch"] == 12
        trained = [r for r in records(tmp_path / "run") if r["split"] == "train"]
        assert [r["loss"] is None for r in trained] == [prompt in ("1:", "3:") for prompt in asked]
        sums = {n: sum(r.get(n, 0) for r in trained) for n in ("reward/tied", "reward/units", "reward/empty")}
        assert sums == {n: pytest.approx(2 * x) for n, x in zip(sums, (1 / 3, 2 / 3, 1 / 3))}
        assert result["counts"]["prompts asked whose completions were judged alike"] == 4
        assert "round-00001: 2 of 6 steps have nothing to learn from" in capsys.readouterr().out
        progress = json.loads((tmp_path / "run" / "checkpoint-12" / "progress.json").read_text())
        assert progress["running"]["delta"][1] == 2 * 2 * 4  # bco's mean is over the pairs that there are

    def test_nothing_but_ties(self, data: str, tmp_path: Path) -> None:
        """There is no loss to report, and nothing is learnt."""
        settings = config(data, tmp_path / "run", loss="dpo", steps=2, weight_decay=0.1)
        result = train(settings, reward=alike)
        assert (result["before"]["loss"], result["after"]["loss"]) == (None, None)
        assert result["before"]["reward/sampled"] == 1
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        start = make_model(settings, "tiny-llama", tokenizer).state_dict()
        assert all(torch.equal(value, start[name]) for name, value in weights(tmp_path / "run").items())
        assert "| loss | – | – | – |" in (tmp_path / "run" / "report.md").read_text()

    def test_mismatched_completions_have_other_prompts(self, tmp_path: Path) -> None:
        """Of kto, with reference scores, also where a prompt has no unit."""
        ref = untrained(seed=1)
        given: dict[str, Any] = {"loss": "kto", "reward": self.judge, "sampler": self.answers, "ref": ref}
        data = rollouts(tmp_path, **given)
        data.policy = untrained()
        asked = [data.asked[data.prompt_of(i)] for i in range(6)]
        for place, prompt in enumerate(asked):
            units = data.units_of(place)
            assert len(units) == (prompt not in ("1:", "3:"))
            for response in data[place]:
                other = response.mismatch
                assert other is not None
                assert other.tokens[: other.prompt].tolist() == data.prompt_ids[data.prompt_of(place)]
                assert other.ref is not None
                assert len(other.ref[0]) == len(other.tokens) - other.prompt > 0
                assert other.ref[0].isfinite().all()


class TestRun:
    @pytest.mark.parametrize(
        "loss", ["mc_po", full("swepo"), full("dpo"), full("bnf"), full("bnf unpaired"), full("simpo best-random")]
    )
    def test_the_reward_rises(self, data: str, tmp_path: Path, loss: str) -> None:
        settings = {"steps": 32, "batch_size": 6, "candidates": 8, "lr": 3e-2, "schedule": "constant"}
        result = train(config(data, tmp_path / "run", **settings, **paired(loss)), reward=ascii_share)
        before, after = (result[name]["reward/sampled"] for name in ("before", "after"))
        assert after > before + 0.15
        sampled = [sum(map(sum, (r["rewards"] for r in rows))) / (8 * len(rows)) for rows in rounds(tmp_path / "run")]
        assert len(sampled) == 16
        assert sampled[-1] > sampled[0] + 0.15

    def test_files_of_rounds_and_their_metrics(self, data: str, tmp_path: Path) -> None:
        """7 steps of 2 batches of 2 in rounds of 3 steps; 28 of 6 prompts are four passes and a part."""
        settings = {"steps": 7, "refresh": 3, "grad_accum": 2, "candidates": 3, "log_steps": 7, "lr": 1e-3}
        result = train(config(data, tmp_path / "run", **settings), reward=ascii_share)
        found = rounds(tmp_path / "run")
        assert [len(rows) for rows in found] == [12, 12, 4]
        asked = [row["prompt"] for rows in found for row in rows]
        passes = [asked[i : i + 6] for i in range(0, 24, 6)]
        assert all(sorted(each) == sorted(PROMPTS) for each in passes)
        assert len({tuple(each) for each in passes}) > 1
        rows = [row for each in found for row in each]
        assert all(len(row["completions"]) == len(row["tokens"]) == 3 for row in rows)
        (trained,) = (r for r in records(tmp_path / "run") if r["split"] == "train")
        assert trained["reward/sampled"] == pytest.approx(sum(sum(row["rewards"]) for row in rows) / (3 * 28))
        assert trained["reward/tied"] == pytest.approx(sum(len(set(row["rewards"])) == 1 for row in rows) / 28)
        tied = sum(len(set(row["rewards"])) == 1 for row in rows)
        counts = {"rows": 6, "prompts asked": 28, "prompts cut": 1}
        counts["prompts asked whose completions were judged alike"] = tied
        assert counts.items() <= result["counts"].items()
        evaluated = (tmp_path / "run" / "rollouts" / "evaluation.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in evaluated] == PROMPTS

    def test_rounds_are_sampled_when_they_begin(
        self, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the policy as it is then; batches are fetched one ahead, so one step before a round's first."""
        calls: list[tuple[int, int, int]] = []
        moved: list[float] = []
        done = [0]
        sample, compute = Rollouts.sample, PreferenceTrainer.compute_loss

        def spy(self: Rollouts, model: Any, prompts: list[list[int]], seed: int, count: int) -> Any:
            calls.append((done[0], len(prompts), count))
            moved.append(model.get_output_embeddings().weight.double().sum().item())
            return sample(self, model, prompts, seed, count)

        def counted(self: PreferenceTrainer, *arguments: Any, **keywords: Any) -> Any:
            done[0] += 1
            return compute(self, *arguments, **keywords)

        monkeypatch.setattr(Rollouts, "sample", spy)
        monkeypatch.setattr(PreferenceTrainer, "compute_loss", counted)
        train(config(data, tmp_path / "run", steps=8, refresh=3, candidates=3, eval_steps=4), reward=ascii_share)
        # groups to evaluate on, then one completion of each prompt at every evaluation
        assert [call for call in calls if call[1:] != (6, 3)] == [(0, 6, 1), (4, 6, 1), (5, 4, 3), (8, 6, 1)]
        assert [call for call in calls if call[2] == 3] == [(0, 6, 3), (0, 6, 3), (2, 6, 3), (5, 4, 3)]
        of_rounds = [value for value, call in zip(moved, calls) if call[2] == 3]
        assert of_rounds[0] == of_rounds[1]
        assert len(set(of_rounds)) == 3

    def test_held_out_prompts(self, data: str, tmp_path: Path) -> None:
        other = write(tmp_path / "other.jsonl", [{"prompt": "9:", "chosen": "x"}, {"prompt": "8:"}])
        result = train(config(data, tmp_path / "run", eval_data=other, steps=1), reward=ascii_share)
        rows = (tmp_path / "run" / "rollouts" / "evaluation.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in rows] == ["9:", "8:"]
        assert result["eval_counts"]["units"] == 2

    def test_a_part_is_held_out(self, data: str, tmp_path: Path) -> None:
        """A prompt that is evaluated on is in no round."""
        result = train(config(data, tmp_path / "run", eval_split=0.34, steps=4), reward=ascii_share)
        rows = (tmp_path / "run" / "rollouts" / "evaluation.jsonl").read_text().splitlines()
        evaluated = [json.loads(line)["prompt"] for line in rows]
        trained = {row["prompt"] for each in rounds(tmp_path / "run") for row in each}
        assert (len(evaluated), len(trained)) == (2, 4)
        assert not trained & {*evaluated}
        assert result["counts"]["prompts held out"] == 2

    @pytest.mark.parametrize("loss", ["mc_po", full("swepo"), full("multi_dpo"), full("infonca")])
    def test_nothing_is_learnt_from_what_is_judged_all_alike(self, data: str, tmp_path: Path, loss: str) -> None:
        settings = config(data, tmp_path / "run", loss=loss, save_steps=1, keep_checkpoints=9)
        result = train(settings, reward=alike)
        assert (result["before"]["loss"], result["after"]["loss"]) == (0, 0)
        assert records(tmp_path / "run")[1]["reward/tied"] == 1
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        start = make_model(settings, "tiny-llama", tokenizer).state_dict()
        trained = weights(tmp_path / "run")
        assert all(torch.equal(value, start[name]) for name, value in trained.items())

    @pytest.mark.parametrize(
        "changes",
        [
            full({"candidates": 2, "batch_size": 1, "grad_accum": 3, "max_new_tokens": 1}),
            {"candidates": 6, "batch_size": 1, "loss_option": {"m": 5}, "packing": True},
            full({"candidates": 5, "batch_size": 3, "loss": "infonca", "packing": True, "max_new_tokens": None}),
            full({"candidates": 3, "loss": "swepo", "gradient_checkpointing": True, "max_prompt_length": 1}),
            full({"candidates": 4, "loss": "rnce", "bf16": True, "refresh": 99}),
            full({"candidates": 2, "loss": "dpo", "pairing": "best-random", "packing": True, "max_new_tokens": 1}),
            full({"loss": "kto", "pairing": "unpaired", "batch_size": 1, "grad_accum": 3, "max_new_tokens": 1}),
            full({"loss": "mle + 0.5*dpo", "gradient_checkpointing": True, "refresh": 1}),
            full({"candidates": 3, "loss": "bnf", "pairing": "unpaired", "packing": True, "bf16": True}),
        ],
    )
    def test_odd_sizes(self, data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
        """Two completions of one token are often one and the same."""
        result = train(config(data, tmp_path / "run", **changes), reward=ascii_share)
        assert result["steps"] == 6
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())

    def test_a_model_of_a_folder_with_chats(self, tmp_path: Path) -> None:
        """Whose end token also fills up rows."""
        tokenizer = train_tokenizer(["abc"], 258)
        tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, None
        tokenizer.save_pretrained(tmp_path / "model")
        untrained().save_pretrained(tmp_path / "model")
        path = write(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": c}]} for c in "abc"])
        settings = {"model": str(tmp_path / "model"), "max_length": 60, "max_prompt_length": 50, "steps": 4}
        result = train(config(path, tmp_path / "run", **settings), reward=ascii_share)
        assert result["steps"] == 4
        assert rounds(tmp_path / "run")[0][0]["prompt"][0]["role"] == "user"


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a loss, made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("whole")
    path = write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def of(loss: str) -> Path:
        if loss not in made:
            made[loss] = folder / loss
            train(config(path, made[loss], **paired(loss), **TestInterrupted.SETTINGS), reward=ascii_share)
        return made[loss]

    return of


class TestInterrupted:
    SETTINGS: ClassVar = {"steps": 9, "refresh": 3, "save_steps": 2, "log_steps": 3, "eval_steps": 4, "candidates": 3}

    def same(self, one: Path, other: Path) -> None:
        assert {p.name: p.read_bytes() for p in (one / "rollouts").iterdir()} == {
            p.name: p.read_bytes() for p in (other / "rollouts").iterdir()
        }
        cut, whole = weights(one), weights(other)
        assert all(torch.equal(cut[name], value) for name, value in whole.items())

    def cut(
        self, data: str, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, loss: str = "mc_po"
    ) -> dict[str, Any]:
        """A run that fails in a step, and goes on with another random state."""
        compute = PreferenceTrainer.compute_loss

        def fails(self: PreferenceTrainer, *arguments: Any, **keywords: Any) -> Any:
            if self.state.global_step == step:
                raise Stopped
            return compute(self, *arguments, **keywords)

        settings = config(data, folder, **paired(loss), **self.SETTINGS)
        with monkeypatch.context() as patched:
            patched.setattr(PreferenceTrainer, "compute_loss", fails)
            with pytest.raises(Stopped):
                train(settings, reward=ascii_share)
        torch.manual_seed(77)
        return train(settings, reward=ascii_share)

    # before a checkpoint, within a round, where a round has just been sampled
    @pytest.mark.parametrize(
        ("loss", "step"),
        [
            *(("mc_po", 3), ("dpo best-random", 5)),
            *(full(*case) for case in (("mc_po", 1), ("swepo", 5), ("mc_po", 6), ("swepo", 7))),
            *(full(*case) for case in (("dpo best-random", 3), ("bco unpaired", 6), ("kto unpaired", 7))),
        ],
    )
    def test_in_a_step(
        self,
        data: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        whole: Callable[[str], Path],
        loss: str,
        step: int,
    ) -> None:
        """A round whose rewards were counted before the checkpoint isn't counted again after it."""
        result = self.cut(data, tmp_path / "cut", monkeypatch, step, loss)
        assert result["resumed"] == step // 2 * 2
        self.same(tmp_path / "cut", whole(loss))
        assert records(tmp_path / "cut") == records(whole(loss))

    @pytest.mark.parametrize("call", [3, full(1), full(4)])
    def test_while_judging(self, data: str, tmp_path: Path, whole: Callable[[str], Path], call: int) -> None:
        """A judge that fails: before anything is there, in the first round, in the second."""
        calls = [0]

        def judge(prompts: list[Any], completions: list[str]) -> list[float]:
            calls[0] += 1
            if calls[0] == call:
                raise Stopped
            return ascii_share(prompts, completions)

        settings = config(data, tmp_path / "cut", **self.SETTINGS)
        with pytest.raises(RuntimeError, match=r"raised Stopped on \d completions? each of \S+:\d+, .*, in \w+"):
            train(settings, reward=judge)
        torch.manual_seed(77)
        train(settings, reward=judge)
        self.same(tmp_path / "cut", whole("mc_po"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "reward", "message"),
        [
            ({}, None, "reward: expected a function, or its name in the settings, with online; got none"),
            ({"reward": "math:fsum"}, ascii_share, "reward: expected a function, .* with online; got both"),
            ({**OFFLINE, "reward": "math:fsum"}, None, "reward: expected none without online, got 'math:fsum'"),
            (OFFLINE, ascii_share, "reward: expected none without online, got a function"),
            ({}, later, "reward: expected a function, got a coroutine function"),
            (
                {},
                lambda completions, **more: [],
                r"reward: expected a function of \(prompts, completions\), got another",
            ),
            ({**OFFLINE, "refresh": 3}, None, "refresh: expected none without online, got 3"),
            (
                {"loss": "dpo", "pairing": "best-each"},
                ascii_share,
                "pairing: expected one of .*'best-random', .* with onl",
            ),
            (
                {"loss": "dpo", "pairing": "all"},
                ascii_share,
                r"with online, got 'all' \(objectives of groups compare all",
            ),
            (
                {**OFFLINE, "loss": "bnf", "pairing": "unpaired"},
                None,
                r"pairing: .*'all'\) without online, got 'unpaired'",
            ),
            (
                {**OFFLINE, "loss": "dpo", "pairing": "best-random"},
                None,
                "pairing: .* without online, got 'best-random'; or give --online",
            ),
            (
                {"loss": "mle + dpo", "pairing": "unpaired"},
                ascii_share,
                r"pairing: expected best-worst or best-random, since mle \+ dpo compares two responses; got 'unpaired'",
            ),
            (
                {"loss": "kto", "pairing": "unpaired", "steps": 3, "batch_size": 1},
                ascii_share,
                r"batch_size: expected rounds of two prompts .* got one in round 1 \(--loss-option z0=0 does without\)",
            ),
            ({"sft_epochs": 1.0}, ascii_share, "sft_epochs: expected 0 with online, which has prompts alone; got 1.0"),
            ({"candidates": 1}, ascii_share, "candidates: expected a whole number, 2 or more, got 1"),
            ({"refresh": 0}, ascii_share, "refresh: expected a positive whole number, got 0"),
            ({"temperature": 0.0}, ascii_share, "temperature: expected a positive number, got 0.0"),
            ({"max_new_tokens": 13}, ascii_share, "max_new_tokens: expected 1 to 12, .* got 13"),
            ({"max_new_tokens": 0}, ascii_share, "max_new_tokens: expected a positive whole number, got 0"),
            ({"pairing": "all"}, ascii_share, "pairing: expected none, since mc_po takes whole groups; got 'all'"),
            (
                {"pairing": "unpaired"},
                ascii_share,
                "pairing: expected none, since mc_po takes whole groups; got 'unpai",
            ),
            ({"loss_option": {"m": 4}}, ascii_share, "loss_option: expected m from 1 to 3, .* got 4"),
        ],
    )
    def test_settings(self, data: str, tmp_path: Path, changes: dict[str, Any], reward: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(config(data, tmp_path / "run", **changes), reward=reward)
        assert not list(tmp_path.glob("run/checkpoint*"))

    def test_prompts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", [{"prompt": "a"}, {"text": "b"}])
        with pytest.raises(ValueError, match=r"d\.jsonl:2: expected an object with the key prompt, got"):
            train(config(path, tmp_path / "run"), reward=ascii_share)
        chats = write(tmp_path / "c.jsonl", [{"prompt": CHAT}])
        with pytest.raises(ValueError, match=r"c\.jsonl:1: expected strings, .* no chat template; got a chat"):
            train(config(chats, tmp_path / "run"), reward=ascii_share)

    def test_models_that_do_not_fit(self, data: str, tmp_path: Path) -> None:
        """Too few positions for what may be sampled; a reference without some of the tokens."""
        tokenizer = train_tokenizer(["abc"], 258)
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2}
        kinds: dict[str, Any] = {"short": {"vocab_size": 258, "n_positions": 8}, "few": {"vocab_size": 100}}
        for name, more in kinds.items():
            made = AutoModelForCausalLM.from_config(GPT2Config(**sizes, **more))
            made.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="max_length: expected at most 8, the positions of .*short"):
            train(config(data, tmp_path / "one", model=str(tmp_path / "short")), reward=ascii_share)
        with pytest.raises(ValueError, match="model: expected a vocabulary for token .*, got 100 in .*few"):
            train(config(data, tmp_path / "two", ref_model=str(tmp_path / "few")), reward=ascii_share)


def test_the_command(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judge.py").write_text(
        "def length(prompts, completions):\n    return [len(text) / 10 for text in completions]\n"
    )
    flags = ["train", "--data", data, "--output", str(tmp_path / "run"), "--online", "--loss=mc_po", "--quiet", "--cpu"]
    flags += [f"--reward={tmp_path / 'judge.py'}:length", "--candidates=3", "--refresh=2", "--steps=3", "--seed=4"]
    flags += ["--batch-size=2", "--vocab-size=258", "--max-length=20", "--max-new-tokens=7", "--temperature=0.9"]
    assert cli.main([*flags, "--loss-option=m=2"]) == 0
    assert "mean reward of" in capsys.readouterr().out
    assert [len(rows) for rows in rounds(tmp_path / "run")] == [4, 2]
    row = rounds(tmp_path / "run")[0][0]
    assert row["rewards"] == [len(text) / 10 for text in row["completions"]]
    after = records(tmp_path / "run")[-1]
    assert f"| {after['reward/sampled']:.4g} |" in (tmp_path / "run" / "report.md").read_text()
    assert cli.main([*flags, "--loss-option=m=2"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert cli.main([*flags, "--loss-option=m=2", "--candidates=4"]) == 2
    assert "candidates is 3 there and 4 now" in capsys.readouterr().err
    assert cli.main([*flags, "--reward=nowhere.py:f"]) == 2
    assert "rgpb: error: reward: expected a file, got 'nowhere.py'" in capsys.readouterr().err
    assert cli.main([*flags, "--loss-option=m=2", "--overwrite", "--steps=1"]) == 0
    assert [len(rows) for rows in rounds(tmp_path / "run")] == [2]


class TestJudges:
    def test_another_function_is_refused_and_a_mended_one_goes_on(
        self, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, calls = tmp_path / "judge.py", "def f(p, c):\n    return [len(x) for x in c]\n"
        settings = {"steps": 4, "refresh": 2, "save_steps": 1}
        file.write_text(calls.replace("return", "assert len(p) != 8\n    return"))  # 2 prompts, 4 completions: a round
        with pytest.raises(
            RuntimeError, match=r"raised AssertionError on 4 completions each of \S+:\d+, .*, in round-00000"
        ):
            train(config(data, tmp_path / "run", reward=f"{file}:f", batch_size=1, **settings))
        file.write_text(f"{calls}\n\ndef g(p, c):\n    return [-len(x) for x in c]\n")
        train(config(data, tmp_path / "run", reward=f"{file}:f", batch_size=1, **settings))
        assert "reward: judge.py:f has changed since this run began" in capsys.readouterr().out
        with pytest.raises(ValueError, match="output: .*reward is 'judge.py:f' there and 'judge.py:g' now"):
            train(config(data, tmp_path / "run", reward=f"{file}:g", batch_size=1, **settings))

    def test_functions_are_told_apart(self, data: str, tmp_path: Path) -> None:
        def other(prompts: list[Any], completions: list[str]) -> list[float]:
            return [-value for value in ascii_share(prompts, completions)]

        settings = config(data, tmp_path / "run", steps=1)
        train(settings, reward=ascii_share)
        with pytest.raises(ValueError, match="output: .*reward is '.*ascii_share' there and '.*other' now"):
            train(settings, reward=other)

    def test_what_is_as_good_as_the_best_is_no_negative(self, data: str, tmp_path: Path) -> None:
        """Rewards of 0 and 1: with mc_po a group keeps one of the best, with swepo all of them."""

        def even(prompts: list[Any], completions: list[str]) -> list[float]:
            return [float(i % 4 != 0) for i in range(len(completions))]

        for loss, there in (("mc_po", 2), ("swepo", 4)):
            run = tmp_path / loss
            made: list[list[int]] = []
            whole = Rollouts.groups

            def groups(self: Any, *given: Any, whole: Any = whole, made: Any = made, **more: Any) -> Any:
                out = whole(self, *given, **more)
                made.append((out.units >= 0).sum(1).tolist())
                return out

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Rollouts, "groups", groups)
                train(config(data, run, loss=loss, steps=1), reward=even)
            assert {count for counts in made for count in counts} == {there}

    def test_a_file_without_its_ending(self, data: str, tmp_path: Path) -> None:
        (tmp_path / "judge.py").write_text("def f(p, c):\n    return [0.0] * len(c)\n")
        with pytest.raises(ValueError, match=r"reward: expected a file with its ending, .*judge\.py:f"):
            load_reward(f"{tmp_path / 'judge'}:f")
