"""Preference data: what is read, what is refused and how, and where tokens, labels and reference scores end up."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
import torch
from tokenizers import processors

from rgpb.train.rows import pair_up, read_preferences, read_prompts
from rgpb.train.tokens import Collator, RefScores, reference_of, texts_of, tokenise, train_tokenizer

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

    def test_no_file_and_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="data: expected a file or folder, got .*nothing"):
            read_preferences(tmp_path / "nothing")
        with pytest.raises(ValueError, match="data: expected a Parquet file, or a folder saved by datasets"):
            read_preferences(tmp_path)


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
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected strings, since a tokenizer learnt here"):
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
