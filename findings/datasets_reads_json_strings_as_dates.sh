#!/usr/bin/env bash
# One would guess: a JSON string stays a string. load_dataset("json") of rows of texts gives the texts,
# as Dataset.from_list of the same rows does, and to_json writes them back.
# What happens: where every value of a column looks like 2024-05-01 or 2024-05-01 10:00:00, the column
# becomes timestamps (datetime objects), each column for itself; one other string in it, and all stay as
# they are. Naming the type, Value("string"), does not keep the text: the date is read first and then
# spelt as 2024-05-01 00:00:00. to_json of dates writes whole numbers, milliseconds since 1970.
# Seen with datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, on 2026-11-28.
# Why it matters: answers and references of questions for a date ("when?") are such columns. A formatted
# prompt says 2024-05-01 00:00:00, an exact match with the policy's text never holds, so the reward is 0,
# and one side of a pair can be dates while the other is text. Which rows are in a file decides it: the
# same row is text in the whole and a date in a part. Dataset.from_list and parquet keep the texts.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 \
    pyarrow==26.0.1 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import datetime
import json
import sys
import datasets
import pyarrow
from datasets import Dataset, Features, Value, load_dataset

folder = sys.argv[1]
print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
whole = [{"prompt": "when?", "chosen": "2024-05-01", "rejected": "2023-05-01"},
         {"prompt": "and then?", "chosen": "2024-06-01 10:30:00", "rejected": "I do not know."}]


def back(name, rows, **how):
    path = f"{folder}/{name}.jsonl"
    with open(path, "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=path, split="train", cache_dir=folder + "/cache", **how)


text = Features({key: Value("string") for key in whole[0]})
for name, rows, dated in (("whole", whole, ["chosen"]), ("its first row", whole[:1], ["chosen", "rejected"])):
    found = back(name.replace(" ", "-"), rows)
    print(f"  {name}: expected {rows[0]}\n    found {found[0]}")
    for key in rows[0]:
        kind = datetime.datetime if key in dated else str
        assert all(isinstance(row[key], kind) for row in found), key
    assert f"{found[0]['chosen']}" == "2024-05-01 00:00:00"
    found.to_json(folder + "/back.jsonl")
    with open(folder + "/back.jsonl") as lines:
        again = json.loads(next(lines))
    print(f"    written by to_json: {again}")
    assert again["chosen"] == 1714521600000
    told = back(f"told-{len(rows)}", rows, features=text)
    print(f"    as Value('string'): {told[0]}")
    assert told[0]["chosen"] == "2024-05-01 00:00:00"
    Dataset.from_list(rows).to_parquet(folder + "/kept.parquet")
    kept = load_dataset("parquet", data_files=folder + "/kept.parquet", split="train", cache_dir=folder + "/cache")
    assert list(Dataset.from_list(rows)) == list(kept) == rows
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir"
echo "ok: a column of JSON strings that all look like dates is read as timestamps and written as numbers"
