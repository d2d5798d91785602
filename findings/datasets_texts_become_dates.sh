#!/usr/bin/env bash
# datasets: load_dataset("json") makes dates of texts, if all texts of a column look like dates.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, numpy 2.3.5, Python 3.11.
# A good guess: JSON says what is a text. A column of strings stays one of strings, as numbers in quotes do; so preference
#   pairs read the same whether their answers are dates or not.
# Seen: a column whose texts all look like dates or times is one of timestamps, and its rows hold datetime objects. The
#   text is lost: "2020-01-01" and "2020-01-01T00:00:00" in it become the same. With features= that ask for strings,
#   the rows hold strings, but both are "2020-01-01 00:00:00". With one text of another kind in the column, or by
#   Dataset.from_list, all stay as they are. Nothing warns.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 numpy==2.3.5
cat > "$folder/dates.py" <<'PYTHON'
import json
import sys
from datetime import datetime
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset

folder = Path(sys.argv[1])
ROWS = [
    {"prompt": "When did it open?", "chosen": "2020-01-01", "rejected": "2020-01-01T00:00:00", "number": "12"},
    {"prompt": "And when did it close?", "chosen": "2021-05-06", "rejected": "2021-05-06T10:00:00Z", "number": "13"},
]


def read(name, rows, **how):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"), **how)


def kinds(data):
    return {name: feature.dtype for name, feature in data.features.items()}


texts = dict.fromkeys(ROWS[0], "string")
found = read("dates", ROWS)
more = read("more", [*ROWS, dict.fromkeys(ROWS[0], "I don't know")])
given = read("given", ROWS, features=Features({name: Value("string") for name in ROWS[0]}))
print("read:", kinds(found), found[0])
print("with a row more:", kinds(more))
print("with features=:", kinds(given), given[0])
print("from_list:", kinds(Dataset.from_list(ROWS)))
as_seen = kinds(found) == texts | {"chosen": "timestamp[s]", "rejected": "timestamp[s]"}
as_seen &= found[0]["chosen"] == found[0]["rejected"] == datetime(2020, 1, 1)
as_seen &= kinds(more) == kinds(given) == kinds(Dataset.from_list(ROWS)) == texts
as_seen &= given[0]["chosen"] == given[0]["rejected"] == "2020-01-01 00:00:00"
as_seen &= more.to_list()[:2] == Dataset.from_list(ROWS).to_list() == ROWS
print("as seen before" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PYTHON
HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" "$folder/dates.py" "$folder"
