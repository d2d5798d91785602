"""Preference data: what is read, what is refused and how, and where tokens, labels and reference scores end up."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys

import datasets
import pyarrow
import pytest
import torch
from tokenizers import processors

from rgpb.hf.batches import reference_of
from rgpb.train.rows import pair_up, read_preferences, read_prompts
from rgpb.train.tokens import Collator, RefScores, texts_of, tokenise, train_tokenizer

PAIR = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
LABELLED = {"prompt": "2 + 2 =", "completion": " 4", "label": True}
REWARDED = {"prompt": "q", "completions": [" b", " a", " c", " b2"], "rewards": [0.5, 1.0, 0.0, 0.5], "models": ["x"]}
CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [{"role": "assistant", "content": "hello"}],
    "rejected": [{"role": "assistant", "content": "go"}],
}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer():
    return train_tokenizer(["2 + 2 = 4 and so on"], 258)  # 258: bytes alone, so lengths are those of the texts


class TestRead:
    @pytest.mark.parametrize(
        ("row", "form", "completions", "rewards"),
        [
            (PAIR, "pairs", (" 4", " 5"), (1.0, 0.0)),
            (LABELLED, "labelled", (" 4",), (1.0,)),
            ({**LABELLED, "label": 0}, "labelled", (" 4",), (-1.0,)),
            ({**LABELLED, "label": -1}, "labelled", (" 4",), (-1.0,)),
            (REWARDED, "rewarded", (" b", " a", " c", " b2"), (0.5, 1.0, 0.0, 0.5)),
            (CHAT, "pairs", (CHAT["chosen"], CHAT["rejected"]), (1.0, 0.0)),
        ],
    )
    def test_forms(self, tmp_path, row, form, completions, rewards):
        path = write(tmp_path / "d.jsonl", row, "", row)  # a blank line is no row
        found = read_preferences(path)
        assert (found.form, len(found.rows)) == (form, 2)
        assert found.rows[1] == (f"{path}:3", row["prompt"], completions, rewards, None)

    def test_texts_that_look_like_dates_stay_texts(self, tmp_path):
        """Here `datasets` reads dates: findings/datasets_texts_become_dates.sh."""
        dates = {**PAIR, "chosen": "2020-01-01", "rejected": "2020-01-01T00:00:00"}
        found = read_preferences(write(tmp_path / "d.jsonl", dates, dates))
        assert found.rows[1].completions == ("2020-01-01", "2020-01-01T00:00:00")

    def test_gzip_is_told_by_content(self, tmp_path):
        path = tmp_path / "d.jsonl"
        path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
        assert read_preferences(path).rows[0].completions == (" 4", " 5")

    def test_saved_dataset_and_parquet(self, tmp_path):
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list([REWARDED, REWARDED])
        table.save_to_disk(tmp_path / "saved")
        table.to_parquet(tmp_path / "d.parquet")
        for path in (tmp_path / "saved", tmp_path / "d.parquet"):
            row = read_preferences(path).rows[1]
            assert row.where == f"{path}:2"
            assert row.rewards == (0.5, 1.0, 0.0, 0.5)

    @pytest.mark.parametrize(
        ("rows", "line", "message"),
        [
            ([PAIR, "{bad"], 2, "expected one JSON object, got '{bad'"),
            ([PAIR, "[1, 2]"], 2, r"expected an object with the keys .* got \[1, 2\]"),
            ([{"prompt": "p", "chosen": "c"}], 1, "expected the keys of one form .*, got chosen, prompt"),
            ([{**PAIR, "rejected": None}], 1, r"expected the keys of .* rejected \(null\)"),
            ([{**PAIR, **LABELLED}], 1, "expected the keys of one form"),
            ([PAIR, {**PAIR, "prompt": 3}], 2, "prompt: expected a string or a list .*, got 3"),
            ([{**PAIR, "chosen": ""}], 1, "chosen: expected some text, got ''"),
            ([{**LABELLED, "label": "yes"}], 1, "label: expected true, false, 0, 1, -1, good or bad, got 'yes'"),
            ([{**LABELLED, "label": 2}], 1, "label: expected .* got 2"),
            ([{**REWARDED, "rewards": [1.0]}], 1, "rewards: expected 4, one per completion, got 1"),
            ([{**REWARDED, "completions": []}], 1, r"completions: expected a list of at least one, got \[\]"),
            ([{**REWARDED, "rewards": [1, 2, 3, True]}], 1, r"rewards\[3\]: expected a finite number, got True"),
            ([{**REWARDED, "completions": [" b", " a", "", " d"]}], 1, r"completions\[2\]: expected some text"),
            ([PAIR, LABELLED], 2, "expected a row of pairs, as in .*:1, got a row of labelled"),
            ([PAIR, CHAT], 2, "expected a row of pairs, as in .*:1, got a row of pairs, as chats"),
            ([{**CHAT, "chosen": "hello"}], 1, "chosen: expected a chat as the prompt is, got a string"),
            ([{**CHAT, "chosen": []}], 1, r"chosen: expected some text, got \[\]"),
            ([{**CHAT, "prompt": [{"role": "user"}]}], 1, "prompt: expected a string or a list of"),
            ([], 1, "expected at least one row of preferences, got an empty file"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, rows, line, message):
        path = write(tmp_path / "d.jsonl", *rows)
        with pytest.raises(ValueError, match=rf"d\.jsonl:{line}: {message}"):
            read_preferences(path)

    def test_bytes_that_are_no_text(self, tmp_path):
        path = tmp_path / "d.jsonl"
        path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
        with pytest.raises(ValueError, match=r"d\.jsonl:2: expected UTF-8, got the bytes b'\\xff"):
            read_preferences(path)

    def test_gzip_cut_short(self, tmp_path):
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 50)[:-12])
        with pytest.raises(ValueError, match=r"d\.jsonl\.gz:1: expected a complete gzip file"):
            read_preferences(path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "d.jsonl.zst",
                b"\x28\xb5\x2f\xfd..",
                r"data: expected JSON, .* got Zstandard in .*d\.jsonl\.zst' \(zstd -d",
            ),
            ("d.bz2", bz2.compress(b"{}"), r"got bzip2 in .* \(bunzip2"),
            ("d.xz", lzma.compress(b"{}"), r"got xz in .* \(unxz"),
            ("d.zip", b"PK\x03\x04..", r"got ZIP in .* \(unzip"),
            ("d.csv", b"prompt,chosen,rejected\n", r"d\.csv:1: expected one JSON object, .*from_csv makes"),
            ("d.TSV", b"prompt\tchosen\n", r"d\.TSV:1: expected one JSON object, .*from_csv makes"),
        ],
    )
    def test_files_of_other_kinds_name_the_way(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_preferences(tmp_path / name)

    def test_a_pipe_would_lose_its_first_rows(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for read in (read_preferences, read_prompts):
            with pytest.raises(ValueError, match=r"data: expected a file or folder, got .*pipe', a pipe or device"):
                read(tmp_path / "pipe")

    def test_no_file_and_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="data: expected a file or folder, got .*nothing"):
            read_preferences(tmp_path / "nothing")
        with pytest.raises(ValueError, match="data: expected a Parquet file, or a folder saved by datasets"):
            read_preferences(tmp_path)


def said(role, content):
    return {"role": role, "content": content}


Q, A, B = said("user", "q?"), said("assistant", "a"), said("assistant", "b")
TURNS = [said("system", "s"), Q, A, said("user", "and?")]
# The layouts of known sets, with made-up texts: (form, prompt, responses, rewards) of each
KNOWN = {
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: I am", "rejected": "\n\nHuman: q\n\nAssistant: I was"},
        ("pairs", "\n\nHuman: q\n\nAssistant:", (" I am", " I was"), (1, 0)),
    ),
    "ultrafeedback of trl": (
        {"chosen": [*TURNS, A], "rejected": [*TURNS, B], "score_chosen": 8.0, "score_rejected": 3.0},
        ("pairs", TURNS, ([A], [B]), (1, 0)),
    ),
    "ultrafeedback binarized": (
        {"prompt": "q?", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "prompt_id": "x"},
        ("pairs", [Q], ([A], [B]), (1, 0)),
    ),
    "ultrafeedback": (
        {"instruction": "q", "models": ["m", "n"], "source": "x", "correct_answers": ["None"], "completions": [
            {"response": "a", "overall_score": 7.5, "model": "m"}, {"response": "b", "overall_score": 8}]},
        ("rewarded", "q", ("a", "b"), (7.5, 8)),
    ),
    "orca": (
        {"system": "s", "question": "q?", "chosen": "a", "rejected": "b"},
        ("pairs", [said("system", "s"), Q], ([A], [B]), (1, 0)),
    ),
    "orca without a system": (
        {"system": "", "input": "q?", "chosen": "a", "rejected": "b", "x": [9]}, ("pairs", [Q], ([A], [B]), (1, 0)),
    ),
    "capybara": (
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, ("pairs", [Q], ([A], [B]), (1, 0)),
    ),
    "a string and answers": ({"prompt": "q?", "chosen": [A], "rejected": [B]}, ("pairs", [Q], ([A], [B]), (1, 0))),
    "messages and answers": ({"messages": TURNS, "chosen": [A], "rejected": [B]}, ("pairs", TURNS, ([A], [B]), (1, 0))),
    "messages and strings": ({"messages": TURNS, "chosen": "a", "rejected": "b"}, ("pairs", TURNS, ([A], [B]), (1, 0))),
    "messages that are the chosen": (
        {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, ("pairs", [Q], ([A], [B]), (1, 0)),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q?"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        ("pairs", [Q], ([A], [B]), (1, 0)),
    ),
    "openai": (
        {"input": {"messages": TURNS, "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        ("pairs", TURNS, ([A], [B]), (1, 0)),
    ),
    "stack-exchange-paired": (
        {"question": "q", "response_j": "a", "response_k": "b", "date": "x"}, ("pairs", "q", ("a", "b"), (1, 0)),
    ),
    "shp": (
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 3, "score_B": 5},
        ("pairs", "q", ("a", "b"), (0, 1)),
    ),
    "pku-saferlhf": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
        ("pairs", "q", ("a", "b"), (0, 1)),
    ),
    "helpsteer2 preference": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
        ("pairs", "q", ("a", "b"), (1, 0)),
    ),
    "helpsteer3": (
        {"context": [Q], "response1": "a", "response2": "b", "overall_preference": 0, "domain": "x"},
        ("pairs", [Q], ([A], [B]), (0, 0)),
    ),
    "webgpt": (
        {"question": {"full_text": "q", "id": 1}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5},
        ("pairs", "q", ("a", "b"), (-0.5, 0.5)),
    ),
    "summaries": (
        {"info": {"post": "q", "title": "t"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
        ("pairs", "q", ("a", "b"), (0, 1)),
    ),
    "arena": (
        {"conversation_a": [Q, A], "conversation_b": [Q, B], "winner": "model_b", "model_a": "m", "model_b": "n"},
        ("pairs", [Q], ([A], [B]), (0, 1)),
    ),
    "nectar": (
        {"prompt": "Human: q Assistant: ", "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}]},
        ("rewarded", "Human: q Assistant: ", ("a", "b"), (-2, -1)),
    ),
    "responses and scores": (
        {"prompt": [Q], "responses": [[A], [B]], "scores": [1, 2]}, ("rewarded", [Q], ([A], [B]), (1, 2)),
    ),
    "helpsteer": (
        {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4}, ("rewarded", "q", ("a", "a"), (3, 3)),
    ),
    "messages and a score": ({"messages": [Q, A], "score": 0.5}, ("rewarded", [Q], ([A], [A]), (0.5, 0.5))),
    "kto-mix": ({"prompt": [Q], "completion": [A], "label": False}, ("labelled", [Q], ([A],), (-1,))),
    "messages and a label": ({"messages": [*TURNS, A], "label": "good"}, ("labelled", TURNS, ([A],), (1,))),
    "a response and a label": ({"prompt": "q", "response": "a", "label": "Bad"}, ("labelled", "q", ("a",), (-1,))),
}  # fmt: skip


class TestLayouts:
    @pytest.mark.parametrize("name", KNOWN)
    def test_known_sets(self, tmp_path, name):
        record, (form, prompt, completions, rewards) = KNOWN[name]
        path = write(tmp_path / "d.jsonl", record, record)
        found = read_preferences(path)
        assert (found.form, found.rows[0][1:4]) == (form, (prompt, completions, rewards))
        assert len(found.rows) == (1 if len(completions) > 1 and completions[0] == completions[1] else 2)
        assert all(key in record for key in found.layout.removesuffix(" as chats").split(", "))
        assert read_prompts(path).rows[0].prompt == prompt

    @pytest.mark.parametrize("save", ["parquet", "arrow", "stream", "saved"])
    def test_known_sets_in_tables(self, tmp_path, save):
        """Also with a column of pictures, whose bytes are none."""
        for name, (record, _) in KNOWN.items():
            wanted = read_preferences(write(tmp_path / "d.jsonl", record, record))
            table = datasets.Dataset.from_list([record, record])
            table = table.add_column("picture", [{"bytes": b"no picture", "path": None}] * 2)
            table = table.cast_column("picture", datasets.Image()).with_format("numpy")
            path = tmp_path / name
            if save == "saved":
                table.save_to_disk(path)
            elif save == "parquet":
                table.to_parquet(path)
            else:
                made = pyarrow.ipc.new_file if save == "arrow" else pyarrow.ipc.new_stream
                with made(str(path), table.data.table.schema) as sink:
                    sink.write_table(table.data.table)
            found = read_preferences(path)
            assert [row[1:] for row in found.rows] == [row[1:] for row in wanted.rows], name
            assert "picture" in found.unread

    def test_what_is_null_in_a_turn_is_not_there(self, tmp_path):
        """Beside content: as in tables, where every turn has the keys of all."""
        nulls = {"tool_calls": None, "name": None}
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
        row = {"prompt": [{**Q, **nulls}], "chosen": [{**call, "name": None}], "rejected": [{**B, **nulls}]}
        found = read_preferences(write(tmp_path / "d.jsonl", row)).rows[0]
        assert (found.prompt, found.completions) == ([Q], ([call], [B]))

    def test_a_prompt_that_stands_in_the_responses_too(self, tmp_path):
        twice = {"prompt": "Q: 2\nA:", "chosen": "Q: 2\nA: 4", "rejected": "Q: 2\nA: 5"}
        once = {"prompt": "", "chosen": "4", "rejected": "5"}
        found = read_preferences(write(tmp_path / "d.jsonl", twice, PAIR, {**PAIR, "chosen": "2 + 2 is"}, once))
        assert found.notes == {"rows with responses that begin with the prompt": 1}

    def test_a_mark_in_front_of_an_array(self, tmp_path):
        (tmp_path / "d.json").write_text(json.dumps([PAIR, PAIR]), encoding="utf-8-sig")
        assert len(read_preferences(tmp_path / "d.json").rows) == 2

    def test_tables_say_nothing_of_keys_that_a_turn_has_not(self, tmp_path):
        call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
        row = {"prompt": [Q], "chosen": [call], "rejected": [B]}
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "d")
        assert read_preferences(tmp_path / "d").rows[0].completions == ([call], [B])

    def test_arrays_and_shards(self, tmp_path):
        array = tmp_path / "d.json"
        array.write_text(json.dumps([PAIR, PAIR], indent=1))
        lines = [4 * i + 2 + i for i in range(2)]
        assert [row.where for row in read_preferences(array).rows] == [f"{array}:{line}" for line in lines]
        shards = tmp_path / "shards"
        shards.mkdir()
        for i in range(2):
            datasets.Dataset.from_list([PAIR]).to_parquet(shards / f"train-{i:05d}-of-00002.parquet")
        wheres = [row.where for row in read_preferences(shards).rows]
        assert wheres == [f"{shards}/train-{i:05d}-of-00002.parquet:1" for i in range(2)]
        (shards / "train-00001-of-00002.parquet").unlink()
        with pytest.raises(ValueError, match="expected 2 shards in .*, got 1"):
            read_preferences(shards)
        twice = shards / "train-00000-of-00002-0123456789abcdef.parquet"
        datasets.Dataset.from_list([PAIR]).to_parquet(twice)
        with pytest.raises(ValueError, match="expected each shard once in .*, got several numbered 0"):
            read_preferences(shards)
        twice.unlink()
        (shards / "train-00001-of-00002.jsonl.zst").touch()
        with pytest.raises(ValueError, match="expected the shards of one file in"):
            read_preferences(shards)
        (shards / "train-00001-of-00002.jsonl.zst").unlink()
        write(shards / "test.jsonl", PAIR)
        with pytest.raises(ValueError, match="expected the shards of one file in"):
            read_preferences(shards)

    @pytest.mark.parametrize("save", ["to_parquet", "save_to_disk"])
    @pytest.mark.parametrize(
        ("names", "labels"), [(["desirable", "undesirable"], (0, 1)), (["0", "1"], (1, 0)), (["-1", "1"], (1, 0))]
    )
    def test_classes_of_a_table_are_their_names(self, tmp_path, names, labels, save):
        """Whose numbers may say the opposite."""
        table = datasets.Dataset.from_list([{**LABELLED, "label": label} for label in labels])
        table = table.cast_column("label", datasets.ClassLabel(names=names))
        getattr(table, save)(tmp_path / "d")
        assert [row.rewards for row in read_preferences(tmp_path / "d").rows] == [(1.0,), (-1.0,)]

    def test_classes_that_say_nothing_are_refused(self, tmp_path):
        table = datasets.Dataset.from_list([{**LABELLED, "label": 1}])
        table.cast_column("label", datasets.ClassLabel(names=["negative", "positive"])).to_parquet(tmp_path / "d")
        with pytest.raises(ValueError, match="d:1: label: expected .*, got 'positive'"):
            read_preferences(tmp_path / "d")

    def test_one_split(self, tmp_path):
        table = datasets.Dataset.from_list([PAIR])
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "one")
        assert len(read_preferences(tmp_path / "one").rows) == 1
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
        with pytest.raises(ValueError, match=r"expected one split of .*, got \['test', 'train'\]"):
            read_preferences(tmp_path / "two")

    def test_without_datasets(self, tmp_path, monkeypatch):
        datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "d")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r'expected datasets to be installed.*pip install "rgpb\[hf\]"'):
            read_preferences(tmp_path / "d")

    @pytest.mark.parametrize(
        ("texts", "prompt"),
        [
            (("The answer is 12", "The answer is 13"), "The answer is"),
            (("2+2=4", "2+2=5"), "2+2="),
            (("Q: x\nA: yes", "Q: x\nA: no"), "Q: x\nA:"),
            (("Q\nyes", "Q\nno"), "Q\n"),
            (("say yes", "say yes, sir"), "say"),
            (("say yes", "say yes"), "say"),
            (("yes", "no"), ""),
            (("same", "same"), ""),
        ],
    )
    def test_the_prompt_of_two_texts(self, tmp_path, texts, prompt):
        row = read_preferences(write(tmp_path / "d.jsonl", {"chosen": texts[0], "rejected": texts[1]})).rows[0]
        assert row.prompt == prompt
        assert tuple(row.prompt + text for text in row.completions) == texts
        assert all(row.completions)

    def test_an_answer_of_nothing_is_left_out_and_counted(self, tmp_path):
        nothing = {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}
        found = read_preferences(write(tmp_path / "d.jsonl", nothing, KNOWN["hh-rlhf"][0]))
        assert ([row.where[-1] for row in found.rows], found.notes) == (["2"], {"rows left out, an empty response": 1})
        with pytest.raises(ValueError, match=r"d\.jsonl:1: .*got none with some text in each response"):
            read_preferences(write(tmp_path / "d.jsonl", nothing))

    def test_the_prompt_of_two_chats(self, tmp_path):
        same = read_preferences(write(tmp_path / "d.jsonl", {"chosen": [Q, A], "rejected": [Q, A]})).rows[0]
        assert (same.prompt, same.completions) == ([Q], ([A], [A]))
        longer = read_preferences(write(tmp_path / "d.jsonl", {"chosen": [Q, A], "rejected": [Q, A, Q, B]})).rows[0]
        assert (longer.prompt, longer.completions) == ([Q], ([A], [A, Q, B]))

    @pytest.mark.parametrize(
        ("rows", "line", "message"),
        [
            (
                [{"chosen": [Q, A], "rejected": [said("user", "x"), B]}],
                1,
                "chosen: expected a chat whose first turns are",
            ),
            (
                [{"chosen": [Q, A], "rejected": [said("system", "x"), Q]}],
                1,
                "chosen: expected a chat whose first turns",
            ),
            (
                [{"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]}],
                1,
                "prompt: expected the text of a turn with which",
            ),
            (
                [{"prompt": [Q], "chosen": [said("user", "x"), A], "rejected": [B]}],
                1,
                "chosen: expected a response, or",
            ),
            ([{"chosen": "a", "rejected": [Q, B]}], 1, "rejected: expected a string as chosen is, got a chat"),
            (
                [PAIR, {"chosen": "a", "rejected": "b"}],
                2,
                "expected the keys prompt, chosen, rejected, as in .*:1, got",
            ),
            (
                [{**LABELLED, "label": label} for label in (1, 0, -1)],
                3,
                "label: expected two values, got -1 beside 1 in",
            ),
            (
                [{**LABELLED, "label": label} for label in ("+1", "0", "-1")],
                3,
                "label: expected two values, got '-1' beside 1 in",
            ),
            (
                [{**KNOWN["arena"][0], "winner": "b"}],
                1,
                "winner: expected one of 'model_a', 'model_b', 'tie', .*got 'b'",
            ),
            ([{"messages": [Q], "label": True}], 1, "messages: expected a chat whose first turns are the prompt and"),
            ([{"messages": [A], "label": True}], 1, "messages: expected a chat whose first turns are the prompt and"),
            ([{"prompt": "q", "answers": [{"answer": "a"}]}], 1, r"answers\[0\]: expected an object with the key rank"),
            ([{"prompt": "p", "completions": ["a"], "labels": [True]}], 1, "expected the keys of one form"),
            ([{**PAIR, "prompt": None}], 1, r"expected the keys of one form .* prompt \(null\)"),
            (['{"prompt": "a", "prompt": "b"}'], 1, "expected each key once, got 'prompt' twice"),
            (['[{"prompt": 1},', '  {"a": 1}', " oops"], 1, "expected the keys of one form"),
            (["[", json.dumps(PAIR), " oops]"], 3, "expected a JSON array of objects, got 'oops]"),
            (["[", json.dumps(PAIR) + ","], 3, "expected a JSON array of objects, got ''"),
            (["[", json.dumps(PAIR) + "]", "more"], 3, "expected a JSON array of objects, got 'more"),
        ],
    )
    def test_refused(self, tmp_path, rows, line, message):
        with pytest.raises(ValueError, match=rf"d\.jsonl:{line}: {message}"):
            read_preferences(write(tmp_path / "d.jsonl", *rows))


class TestPrompts:
    @pytest.mark.parametrize("row", [PAIR, LABELLED, REWARDED, CHAT, {"prompt": "q"}, {"prompt": "", "rewards": "?"}])
    def test_rows_of_any_form(self, tmp_path, row):
        path = write(tmp_path / "d.jsonl", row, "", {"prompt": row["prompt"], "other": None})
        found = read_prompts(path)
        assert (found.source, found.form) == (str(path), "prompts")
        assert found.rows == [(f"{path}:{line}", row["prompt"], (), (), None) for line in (1, 3)]

    @pytest.mark.parametrize(
        ("rows", "line", "message"),
        [
            ([PAIR, "{bad"], 2, "expected one JSON object, got '{bad'"),
            ([PAIR, "[1, 2]"], 2, r"expected an object with the key prompt, got \[1, 2\]"),
            ([PAIR, {"chosen": "c"}], 2, "expected an object with the key prompt, got {'chosen': 'c'}"),
            ([{"prompt": None}], 1, "expected an object with the key prompt, got {'prompt': None}"),
            ([PAIR, {"prompt": 3}], 2, "prompt: expected a string or a list .*, got 3"),
            ([{"prompt": []}], 1, r"prompt: expected some text, got \[\]"),
            ([PAIR, CHAT], 2, r"prompt: expected a string, as in .*d\.jsonl:1, got a chat"),
            ([CHAT, PAIR], 2, r"prompt: expected a chat, as in .*d\.jsonl:1, got a string"),
            ([], 1, "expected at least one prompt, got an empty file"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, rows, line, message):
        path = write(tmp_path / "d.jsonl", *rows)
        with pytest.raises(ValueError, match=rf"d\.jsonl:{line}: {message}"):
            read_prompts(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="data: expected a file or folder, got .*nothing"):
            read_prompts(tmp_path / "nothing")


class TestPairing:
    @pytest.mark.parametrize(
        ("pairing", "units"),
        [
            ("best-worst", [(0, (1, 2))]),
            ("best-each", [(0, (1, 0)), (0, (1, 2)), (0, (1, 3))]),
            ("all", [(0, (0, 2)), (0, (1, 0)), (0, (1, 2)), (0, (1, 3)), (0, (3, 2))]),
            ("groups", [(0, (1, 0, 3, 2))]),  # the best first; the two with 0.5 as they stand in the file
        ],
    )
    def test_rewarded(self, tmp_path, pairing, units):
        tied = {**REWARDED, "rewards": [0.5] * 4}
        found = read_preferences(write(tmp_path / "d.jsonl", REWARDED, tied))
        assert pair_up(found, pairing) == (units, 1)

    def test_unknown(self, tmp_path):
        found = read_preferences(write(tmp_path / "d.jsonl", PAIR))
        with pytest.raises(ValueError, match="pairing: expected one of .*, got 'none'"):
            pair_up(found, "none")

    def test_groups(self, tmp_path):
        alone = {**REWARDED, "completions": [" a"], "rewards": [1.0]}  # nothing to compare with
        found = read_preferences(write(tmp_path / "d.jsonl", alone, REWARDED))
        assert pair_up(found, "groups") == ([(1, (1, 0, 3, 2))], 1)
        pairs = read_preferences(write(tmp_path / "p.jsonl", PAIR, PAIR))
        assert pair_up(pairs, "groups") == ([(0, (0, 1)), (1, (0, 1))], 0)
        labelled = read_preferences(write(tmp_path / "l.jsonl", LABELLED))
        with pytest.raises(ValueError, match=r"l\.jsonl:1: expected pairs or rewarded completions, got labelled"):
            pair_up(labelled, "groups")


class TestTokens:
    def data(self, tmp_path, tokenizer, *rows, **options):
        return tokenise(read_preferences(write(tmp_path / "d.jsonl", *rows)), tokenizer, **options)

    def test_prompt_and_completion_stand_end_to_end(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer, PAIR)
        chosen, rejected = data[0]
        assert tokenizer.decode(chosen.tokens) == "2 + 2 = 4<|endoftext|>"
        assert tokenizer.decode(rejected.tokens[rejected.prompt :]) == " 5<|endoftext|>"
        assert (chosen.label, rejected.label, chosen.prompt) == (True, False, 7)

    def test_prompt_keeps_its_end_and_response_its_beginning(self, tmp_path, tokenizer):
        row = {"prompt": "0123456789", "chosen": "abcdefgh", "rejected": "xy"}
        data = self.data(tmp_path, tokenizer, row, max_length=8, max_prompt_length=3)
        chosen, rejected = data[0]
        assert tokenizer.decode(chosen.tokens) == "789abcde"  # cut, so it has no end
        assert tokenizer.decode(rejected.tokens) == "789xy<|endoftext|>"
        assert data.counts["responses cut to max_length"] == 1

    def test_what_is_truncated_away_is_counted(self, tmp_path, tokenizer):
        long = {**PAIR, "prompt": "0123456789"}
        data = self.data(tmp_path, tokenizer, long, PAIR, max_length=10, max_prompt_length=10)
        assert len(data) == 1
        assert data.counts["units left out, prompt fills max_length"] == 1
        assert tokenizer.decode(data[0][0].tokens).startswith("2 + 2")
        with pytest.raises(ValueError, match="expected something to train on, got nothing"):
            self.data(tmp_path, tokenizer, long, max_length=10, max_prompt_length=10)

    def test_shared_responses_are_tokenised_once(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer, REWARDED, pairing="best-each")
        assert (len(data), len(data.lengths())) == (3, 4)
        assert [tokenizer.decode(data[i][0].tokens[1:-1]) for i in range(3)] == [" a"] * 3
        assert [tokenizer.decode(r.tokens[1:-1]) for (r,) in data.preferred()] == [" a"]

    def test_beginning_of_sequence(self, tmp_path):
        tokenizer = train_tokenizer(["abc"], 258)
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = ("<s>", tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
        row = {"prompt": "0123456789", "chosen": "a", "rejected": "b"}
        chosen, _ = self.data(tmp_path, tokenizer, row, max_length=6, max_prompt_length=4)[0]
        assert tokenizer.decode(chosen.tokens) == "<s>789a<|endoftext|>"

    def test_empty_prompt_still_predicts_the_first_token(self, tmp_path, tokenizer):
        chosen, _ = self.data(tmp_path, tokenizer, {**PAIR, "prompt": ""})[0]
        assert tokenizer.decode(chosen.tokens) == "<|endoftext|> 4<|endoftext|>"

    def test_chats_follow_the_template(self, tmp_path, tokenizer):
        tokenizer.chat_template = TEMPLATE
        chosen, _ = self.data(tmp_path, tokenizer, CHAT)[0]
        text = "[user]hi<|endoftext|>\n[assistant]hello<|endoftext|>\n"  # ends by itself: no second end token
        assert tokenizer.decode(chosen.tokens) == text
        assert tokenizer.decode(chosen.tokens[chosen.prompt :]) == "hello<|endoftext|>\n"

    def test_chats_need_a_template_that_keeps_the_prompt(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected strings, since the tokenizer has no chat template"):
            self.data(tmp_path, tokenizer, CHAT)
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected strings, since .* new model has no .*--model"):
            list(texts_of(read_preferences(tmp_path / "d.jsonl")))
        tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected a chat template that leaves the prompt as it is"):
            self.data(tmp_path, tokenizer, CHAT)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 1}, "max_length: expected at least 2, got 1"),
            ({"max_prompt_length": 0}, "max_prompt_length: expected at least 1, got 0"),
        ],
    )
    def test_lengths(self, tmp_path, tokenizer, options, message):
        with pytest.raises(ValueError, match=message):
            self.data(tmp_path, tokenizer, PAIR, **options)

    def test_tokenizer(self, tmp_path, tokenizer):
        assert tokenizer.decode(tokenizer("né 37+45\n")["input_ids"]) == "né 37+45\n"
        assert len(train_tokenizer(["abcabcabc " * 9], 270)) <= 270
        with pytest.raises(ValueError, match="vocab_size: expected at least 258, got 100"):
            train_tokenizer(["a"], 100)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="tokenizer: expected one with an end-of-sequence token"):
            self.data(tmp_path, tokenizer, PAIR)

    def test_labelled_rows_are_single_responses(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer, LABELLED, {**LABELLED, "label": False})
        assert data.units.shape[1] == 1
        assert [r.label for (r,) in data] == [True, False]
        assert data.preferred().counts["left out as dispreferred"] == 1
        assert len(data.first(1)) == 1
        with pytest.raises(ValueError, match="data: expected a preferred response to fine-tune on, got 1 dispreferred"):
            self.data(tmp_path, tokenizer, {**LABELLED, "label": False}).preferred()

    def test_fingerprint_follows_the_tokens(self, tmp_path, tokenizer):
        one, same, other = (
            self.data(tmp_path, tokenizer, row).fingerprint()
            for row in (PAIR, {**PAIR, "x": 1}, {**PAIR, "chosen": "4"})
        )
        assert one == same != other


class TestBatches:
    def data(self, tmp_path, tokenizer):
        rows = (PAIR, {"prompt": "1 + 12 =", "chosen": " 13 !", "rejected": " 3"})
        return tokenise(read_preferences(write(tmp_path / "d.jsonl", *rows)), tokenizer)

    def test_padded(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer)
        batch = Collator(tokenizer.pad_token_id)([data[0], data[1]])
        texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        end = "<|endoftext|>"
        assert texts == [f"2 + 2 = 4{end}", f"1 + 12 = 13 !{end}", f"2 + 2 = 5{end}", f"1 + 12 = 3{end}"]
        assert batch["label"].tolist() == [True, True, False, False]
        scored = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
        assert scored == [f" 4{end}", f" 13 !{end}", f" 5{end}", f" 3{end}"]
        assert (batch["labels"] >= 0).sum(1).tolist() == [3, 6, 3, 3]

    def test_packed_has_the_same_tokens_without_padding(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer)
        padded, packed = (Collator(tokenizer.pad_token_id, packing)([data[0], data[1]]) for packing in (False, True))
        kept = padded["attention_mask"].bool()
        for name in ("input_ids", "labels"):
            assert packed[name].tolist() == [padded[name][kept].tolist()]
        assert packed["cu_seqlens"].tolist() == [0, 10, 24, 34, 45]
        assert packed["position_ids"][0, 8:12].tolist() == [8, 9, 0, 1]

    @pytest.mark.parametrize("packing", [False, True])
    def test_reference_scores_stand_where_they_are_predicted(self, tmp_path, tokenizer, packing):
        data = self.data(tmp_path, tokenizer)
        starts = data.completion_starts()
        logp = -1.0 - torch.arange(int(starts[-1]))
        data = data.with_ref(RefScores(logp, 2 * logp, starts))
        batch = Collator(tokenizer.pad_token_id, packing)([data[1], data[0]])
        ref = reference_of(batch)
        labels = batch["labels"][0] if packing else batch["labels"]
        assert torch.equal(ref.logp != 0, (labels != -100).roll(-1, -1))  # each one position before its label
        # Responses as stacked: row 1's chosen, row 0's chosen, then the rejected; numbered in file order.
        order = [2, 0, 3, 1]
        assert ref.logp[ref.logp != 0].tolist() == torch.cat([logp[starts[r] : starts[r + 1]] for r in order]).tolist()
        assert torch.equal(ref.log_odds, 2 * ref.logp)

    def test_reference_of_other_responses(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer)
        with pytest.raises(ValueError, match="ref: expected scores of 15 tokens, got 3"):
            data.with_ref(RefScores(torch.zeros(3), torch.zeros(3), torch.tensor([0, 1, 2, 3])))
        assert reference_of(Collator(0)([data[0]])) is None


THREE = {"prompt": "1 +", "completions": [" 20", " 3", " 400"], "rewards": [-1, 2.5, -1]}
TWO = {"prompt": "x", "completions": [" b", " a"], "rewards": [0, 1]}
TIED = {"prompt": "no", "completions": [" c", " d"], "rewards": [1, 1]}


class TestGroups:
    """Rows of four, of two and of three responses, and one that has nothing to tell them apart."""

    def data(self, tmp_path, tokenizer, *rows, **options):
        found = read_preferences(write(tmp_path / "d.jsonl", *(rows or (REWARDED, TWO, TIED, THREE))))
        return tokenise(found, tokenizer, pairing="groups", **options)

    def test_units(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer)
        assert data.units.tolist() == [[1, 0, 3, 2], [5, 4, -1, -1], [7, 6, 8, -1]]
        assert data.rewards.tolist() == [[1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [2.5, -1.0, -1.0, 0.0]]
        assert data.rewards.dtype == torch.float64
        assert data.labels.tolist() == [[True, False, False, False]] * 3
        wanted = {"rows": 4, "units": 3, "responses": 9, "rows left out, all rewards equal": 1}
        assert wanted.items() <= data.counts.items()
        texts = [[tokenizer.decode(r.tokens[r.prompt :])[:-13] for r in unit] for unit in data]
        assert texts == [[" a", " b", " b2", " c"], [" a", " b", "", ""], [" 3", " 20", " 400", ""]]
        assert [[r.reward for r in unit] for unit in data] == data.rewards.tolist()
        with pytest.raises(ValueError, match="expected something to train on, got nothing"):
            self.data(tmp_path, tokenizer, TIED)

    def test_first_and_preferred(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer)
        two = data.first(2)
        assert (len(two), two.rewards.shape, two.counts["responses"]) == (2, (2, 4), 6)
        best = data.preferred()
        assert [tokenizer.decode(r.tokens[r.prompt :])[:-13] for (r,) in best] == [" a", " a", " 3"]
        assert (best.rewards, best.counts["left out as dispreferred"]) == (None, 6)
        assert all(r.reward is None for (r,) in best)

    def test_a_pair_is_a_group_of_two(self, tmp_path, tokenizer):
        data = self.data(tmp_path, tokenizer, PAIR, PAIR)
        assert (data.units.tolist(), data.rewards.tolist()) == ([[0, 1], [2, 3]], [[1.0, 0.0]] * 2)

    def test_prompts_that_fill_max_length_take_their_group_along(self, tmp_path, tokenizer):
        long = {**THREE, "prompt": "0123456789"}
        data = self.data(tmp_path, tokenizer, long, TWO, max_length=8, max_prompt_length=8)
        assert data.counts["units left out, prompt fills max_length"] == 1
        assert data.units.shape == (1, 2)  # the widest of those that stay

    @pytest.mark.parametrize("packing", [False, True])
    def test_batch(self, tmp_path, tokenizer, packing):
        data = self.data(tmp_path, tokenizer)
        starts = data.completion_starts()
        logp = -1.0 - torch.arange(int(starts[-1]))
        data = data.with_ref(RefScores(logp, 2 * logp, starts))
        batch = Collator(tokenizer.pad_token_id, packing)([data[2], data[1]])
        assert batch["rewards"].tolist() == data.rewards[[2, 1]].tolist()
        assert batch["label"].tolist() == [True, False, False, False] * 2
        ref = reference_of(batch)
        if packing:
            bounds = batch["cu_seqlens"].tolist()
            rows = list(map(slice, bounds[:-1], bounds[1:]))
            ids, labels, scores = batch["input_ids"][0], batch["labels"][0], ref.logp
            assert batch["position_ids"][0].tolist() == [i for row in rows for i in range(row.stop - row.start)]
        else:
            rows, (ids, labels), scores = range(8), (batch["input_ids"], batch["labels"]), ref.logp
        end = "<|endoftext|>"
        texts = [tokenizer.decode(labels[row][labels[row] >= 0]) for row in rows]
        assert texts == [f" 3{end}", f" 20{end}", f" 400{end}", "", f" a{end}", f" b{end}", "", ""]
        for row, r in zip(rows, [7, 6, 8, -1, 5, 4, -1, -1]):
            found = scores[row]
            wanted = logp[starts[r] : starts[r + 1]].tolist() if r >= 0 else []
            assert found[found != 0].tolist() == wanted
            # each where its token is predicted; one who takes no part has a token, but none that counts
            assert torch.equal(found != 0, (labels[row] != -100).roll(-1))
            if r < 0:
                assert not (labels[row] >= 0).any()
                assert len(ids[row]) >= 1
        assert torch.equal(ref.log_odds, 2 * ref.logp)


def test_groups_without_what_is_as_good_as_the_best(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        {"prompt": "a", "completions": ["w", "x", "y"], "rewards": [1, 0, 1]},
        {"prompt": "b", "completions": ["w", "x"], "rewards": [0, 1]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = tokenise(read_preferences(path), train_tokenizer(["a"], 258), pairing="groups")
    assert (groups.units >= 0).tolist() == [[True, True, True], [True, True, False]]
    strict = groups.without_tied_best()
    assert (strict.units >= 0).tolist() == [[True, False, True], [True, True, False]]
    assert strict.counts["responses left out, as good as the best"] == 1
    assert strict.rewards.tolist() == groups.rewards.tolist()
