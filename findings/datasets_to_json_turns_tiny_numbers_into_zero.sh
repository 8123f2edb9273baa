#!/usr/bin/env bash
# One would guess: Dataset.to_json writes floats as json.dumps does, so that they read back as they were;
# parquet and csv do so, and the values are 64-bit on both sides.
# What happens: it goes through pandas, which keeps 10 places after the point (not 10 digits). What lies
# between 1e-15 and 5e-11 is written as 0.0, 1.0 less a little becomes 1.0, 6e-11 becomes 1e-10; yet
# what is smaller still, as 1e-20, survives, so a look at the least value shows nothing. NaN becomes
# null and reads back as None. to_json(double_precision=15), the most there is, is closer, not exact.
# Seen with datasets 5.0.1, pandas 3.1.1, pyarrow 26.0.1, on 2026-11-28.
# Why it matters: probabilities of tokens are often as small as that. Stored like this (a reference
# policy, sampled answers) their log is -inf, and one such token makes a KL or a ratio of PPO infinite.
# Store log-probabilities, or use parquet.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check datasets==5.0.1 pandas==3.1.1 \
    pyarrow==26.0.1 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import json
import sys
import datasets
import pandas
import pyarrow

folder = sys.argv[1]
print(f"datasets {datasets.__version__}, pandas {pandas.__version__}, pyarrow {pyarrow.__version__}")
values = [0.25, 1 / 3, 7.7e-9, 6e-11, 3.2e-11, 2e-15, 1e-20, 1 - 2e-11]
table = datasets.Dataset.from_dict({"prob": values + [float("nan")]})


def back(kind, path):
    return datasets.load_dataset(kind, data_files=path, split="train", cache_dir=folder + "/c")["prob"][:]


for kind in ("parquet", "csv", "json"):
    path = f"{folder}/probs.{kind}"
    getattr(table, "to_" + kind)(path)
    found = back(kind, path)
    print(f"  {kind:8} expected {values} and nan\n           found    {found}")
    if kind != "json":
        assert found[:8] == values
    else:
        assert found == [0.25, 0.3333333333, 7.7e-9, 1e-10, 0.0, 0.0, 1e-20, 1.0, None]
with open(folder + "/probs.json") as lines:
    print("  written:", " ".join(line.strip() for line in lines))
assert json.loads(json.dumps(values)) == values
table.to_json(folder + "/more.json", double_precision=15)
more = back("json", folder + "/more.json")
print("  double_precision=15:", more)
assert more[4:7] == values[4:7] and more[1] != 1 / 3
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir"
echo "ok: to_json keeps ten places after the point, and a small probability becomes 0 while a smaller one is kept"
