"""Broken rows and files: each ends in one line that names the file, and the row where it is one; none passes.

Seeded: `make test` takes a sample of what `--full` runs.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random

import covering
import datasets
import pytest
from test_tokens import CHATML, of

from rgpb import cli
from rgpb.train.rows import read_preferences, read_prompts
from rgpb.train.tokens import tokenise

FILES = ["empty", "blank", "gzip", "gzip bits", "parquet", "parquet head", "utf-16", "noise", "array"]
SEED, PARTS = 16, 4
SIZE = 5000 if covering.FULL else 100  # cases of a part


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def text(draw):
    return "".join(draw.choice("abc 12.,\n漢é") for _ in range(draw.randint(1, 12))) + "x"


def chat(draw):
    return [said("user", text(draw))]


def answer(draw):
    return [said("assistant", text(draw) + str(draw.random()))]


def good(draw, base):
    """A good row of that base."""
    if base == "pairs":
        return {"prompt": text(draw), "chosen": " " + text(draw), "rejected": text(draw)}
    if base == "chats":
        return {"prompt": chat(draw), "chosen": answer(draw), "rejected": answer(draw), "id": draw.random()}
    if base == "whole chats":
        prompt = chat(draw)
        return {"chosen": prompt + answer(draw), "rejected": copy.deepcopy(prompt) + answer(draw)}
    if base == "labelled":
        return {"prompt": text(draw), "completion": text(draw), "label": draw.choice([True, False, 0, 1])}
    if base == "rewarded":
        count = draw.randint(1, 4)
        scores = [draw.choice([draw.random(), draw.randint(-3, 3)]) for _ in range(count)]
        return {"prompt": text(draw), "completions": [text(draw) for _ in range(count)], "rewards": scores}
    return {"prompt": text(draw), "answers": [{"answer": text(draw), "rank": draw.randint(1, 7)} for _ in range(3)]}


TEXTS = {"pairs": ["prompt", "chosen", "rejected"], "labelled": ["prompt", "completion"], "rewarded": ["prompt"]}
TEXTS |= {"chats": ["prompt", "chosen", "rejected"], "whole chats": ["chosen", "rejected"], "answers": ["prompt"]}
KEYS = {**TEXTS, "labelled": ["prompt", "completion", "label"], "rewarded": ["prompt", "completions", "rewards"]}
KEYS["answers"] = ["prompt", "answers"]
NO_TEXT = [3, 0.5, True, {}, {"text": "x"}, [1], ["x"], [[]], [said("", "x")], [{"content": "x"}], [said("user", 3)],
           [said("user", None)], [said(1, "x")], [{"role": "user"}], "\ud800", [said("assistant", "a\udfff")],
           [said("assistant", [{"type": "image", "url": "x"}])], [said("assistant", ["x"])]]  # fmt: skip
NO_LABEL = ["yes", 2, 0.5, float("nan"), [], {}, "", -2, 1e999, [True]]
NO_REWARD = [True, "1", float("nan"), float("inf"), -float("inf"), [], {}, None, 10**400, 1e301]


def broken_row(draw, base):
    """(A row with one thing wrong, what that is)."""
    row = good(draw, base)
    kinds = ["drop", "null", "kind", "text", "record"] + ["empty", "empty"] * (base != "answers")
    kinds += {"labelled": ["label"] * 3, "rewarded": ["reward"] * 3, "answers": ["answer"] * 3}.get(base, [])
    kinds += ["roles", "parted"] if base == "whole chats" else ["opening"] if base == "chats" else []
    kind = draw.choice(kinds)
    key = draw.choice(KEYS[base])
    if kind == "drop":
        del row[key]
    elif kind == "null":
        row[key] = None
    elif kind == "text":
        key = draw.choice(TEXTS[base])
        row[key] = copy.deepcopy(draw.choice(NO_TEXT))
    elif kind == "kind":  # a chat among strings, or the other way round
        key = draw.choice(TEXTS[base])
        row[key] = "a string" if "chats" in base else answer(draw)
        if base == "chats" and key == "prompt":
            row["prompt"] = 7
    elif kind == "empty":
        key = draw.choice([k for k in TEXTS[base] if k != "prompt"] or ["completions"])
        row[key] = [] if "chats" in base else "" if key != "completions" else [*row["completions"][1:], ""]
    elif kind == "record":
        return draw.choice([[], [row], "row", 3, None, True, {}]), kind
    elif kind == "label":
        row["label"] = draw.choice(NO_LABEL)
    elif kind == "reward":
        row["rewards"][draw.randrange(len(row["rewards"]))] = draw.choice(NO_REWARD)
        if draw.random() < 0.3:
            row["rewards"] = draw.choice([[], 3, "x", {}, [*row["rewards"], 1.0]])
    elif kind == "answer":
        place = draw.choice(row["answers"])
        place[draw.choice(["answer", "rank"])] = draw.choice([None, [], {}, True])
    elif kind == "roles":
        row["chosen"][0]["role"] = row["chosen"][1]["role"] = "user"
    elif kind == "parted":
        row["rejected"][0]["content"] += "."
    elif kind == "opening":
        row["chosen"][0]["role"] = "user"
    return row, kind


def broken_line(draw, line):
    """A line that is no JSON object any more."""
    kind = draw.choice(["cut", "comma", "quotes", "behind", "twice", "bytes", "two", "number", "deep", "nul"])
    content = line.encode()
    if kind == "cut":
        content = content[: draw.randint(1, len(content) - 1)]
    elif kind == "comma":
        content = content[:-1] + b",}"
    elif kind == "quotes":
        content = content.replace(b'"', b"'")
    elif kind == "behind":
        content += draw.choice([b" x", b",", b"}", b"]", b" 1"])
    elif kind == "twice":
        content = content[:1] + b'"prompt": "x", "prompt": "y", ' + content[1:]
    elif kind == "bytes":
        place = draw.randrange(1, len(content))
        content = content[:place] + draw.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"]) + content[place:]
    elif kind == "two":
        content += content
    elif kind == "number":
        content = content[:1] + b'"n": ' + b"9" * 5000 + b", " + content[1:]
    elif kind == "deep":
        content = content[:1] + b'"n": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + content[1:]
    else:
        content = content[:1] + b"\x00" + content[1:]
    return content, kind


def refused(note, names, function, *arguments):
    """That it ends in one line, which holds one of these names."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011, PT012
        function(*arguments)
        pytest.fail(f"{note} passed")
    error, message = caught.value, str(caught.value)
    assert type(error) is ValueError
    assert "\n" not in message
    assert len(message) < 1000
    assert any(name in message for name in names), f"{note}: {message}"
    return message


@pytest.mark.parametrize("part", range(PARTS))
def test_broken_rows(tmp_path, part):
    draw, path = random.Random(f"{SEED} rows {part}"), tmp_path / "d.jsonl"
    for case in range(SIZE):
        base = draw.choice(list(KEYS))
        rows = [json.dumps(good(draw, base)).encode() for _ in range(draw.randint(2, 4))]
        place = draw.randrange(len(rows))
        if draw.random() < 0.6:
            row, kind = broken_row(draw, base)
            rows[place] = json.dumps(row).encode()
        else:
            rows[place], kind = broken_line(draw, rows[place].decode())
        packed = draw.random()
        array = packed > 0.9 and b"\n" not in rows[place]
        content = b"[" + b",\n".join(rows) + b"]" if array else b"\n".join(rows) + b"\n" * draw.randint(0, 2)
        path.write_bytes(gzip.compress(content, 1) if packed < 0.1 else content)
        lines = [f"d.jsonl:{place + 1 + extra}: " for extra in range(2 if array else 1)]
        if kind in ("drop", "null", "kind", "record", "text") and place == 0:  # the next row is said to differ from it
            lines += [f", as in {path}:1, got", "d.jsonl:2: expected a JSON array"]
        refused(f"case {case}: {base}, {kind}: {rows[place][:200]!r}", lines, read_preferences, path)


PROMPTS = [None, 3, 0.5, True, {}, [], [1], [said("user", 3)], [{"content": "x"}], "\ud800", [said("", "x")]]


@pytest.mark.parametrize("part", range(PARTS))
def test_broken_prompts_files_and_templates(tmp_path, part, capsys):
    draw, path = random.Random(f"{SEED} files {part}"), tmp_path / "d.jsonl"
    small = SIZE // 10
    for _ in range(small):
        good_one, place = draw.choice(["p", [said("user", "p")]]), draw.randrange(3)
        rows = [{"prompt": good_one}] * 3
        rows[place] = draw.choice([{"prompt": draw.choice(PROMPTS)}, {}, [], 3, {"promt": "p"}])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = [f"d.jsonl:{place + 1}: ", *["d.jsonl:2: expected a JSON array"] * (place == 0)]
        refused(rows[place], names, read_prompts, path)

    stops = "{% if 'stop' in messages[0].content %}{{ raise_exception('no\nstop') }}{% endif %}"
    tokenizer = of("bytes", stops + CHATML)
    for _ in range(small):
        rows, place = [good(draw, "chats") for _ in range(3)], draw.randrange(3)
        rows[place]["prompt"][0]["content"] = "do stop"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        name = f"d.jsonl:{place + 1}: expected a chat that the template takes, got TemplateError: no stop"
        refused(rows[place], [name], tokenise, read_preferences(path), tokenizer)

    made = datasets.Dataset.from_list([good(draw, "pairs") for _ in range(20)])
    buffer = io.BytesIO()
    made.to_parquet(buffer)
    parquet, lines = buffer.getvalue(), "".join(json.dumps(row) + "\n" for row in made).encode()
    for case in range(small):
        file = tmp_path / f"f{case}"
        kind = draw.choice(FILES)
        packed = gzip.compress(lines, 1)
        content = {
            "empty": b"",
            "blank": b" \n\n  \n",
            "gzip": packed[: draw.randint(10, len(packed) - 1)],
            "gzip bits": packed[:10] + draw.randbytes(len(packed) - 10),
            "parquet": parquet[: draw.randint(4, len(parquet) - 1)],
            "parquet head": b"PAR1" + draw.randbytes(draw.randint(0, 300)),
            "utf-16": lines.decode().encode("utf-16"),
            "noise": b"\xfe" + draw.randbytes(draw.randint(1, 400)),
            "array": b"[" + lines.replace(b"\n", b",\n"),
        }[kind]
        file.write_bytes(content)
        message = refused(kind, [f"{file}:", repr(str(file))], read_preferences, file)
        if case < 3:
            capsys.readouterr()
            shown = ["train", "--data", str(file), "--output", str(tmp_path / "run"), "--model", "nano-llama", "--cpu"]
            assert cli.main(shown) == 2
            out = capsys.readouterr()
            assert out.err == f"rgpb: error: {message}\n"
            assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", range(2))
def test_odd_texts_are_none_broken(tmp_path, part):
    """They come back as they were."""
    draw, tokenizer = random.Random(f"{SEED} odd {part}"), of("bytes")
    odd = [
        "\x00",
        "\u200f",
        "\ufeff",
        "e\u0301",
        "👩\u200d👧",
        "\r\n",
        "\u2028",
        "\t",
        " ",
        "İ",
        "ﬁ",
        "{{ x }}",
        "{% raw",
    ]
    rows = []
    for _ in range(SIZE):
        texts = ["".join(draw.choices([*odd, "a", "é"], k=draw.randint(1, 8))) for _ in range(3)]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts)))
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows))
    for row, unit in zip(rows, tokenise(read_preferences(path), tokenizer)):
        for key, response in zip(("chosen", "rejected"), unit):
            halves = response.tokens[: response.prompt], response.tokens[response.prompt :]
            found = [tokenizer.decode(half) for half in halves]
            assert found == [row["prompt"], row[key] + "</s>"]
