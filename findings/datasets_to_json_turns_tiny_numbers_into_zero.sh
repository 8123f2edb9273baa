#!/usr/bin/env bash
# One would guess: Dataset.to_json writes floats as json.dumps does, so that they read back as they were;
# parquet and csv do so, and the values are 64-bit on both sides.
# What happens: it goes through pandas, which keeps 10 places after the point (not 10 digits). Anything
# under 5e-11 is written as 0.0 and 1.0 less a little becomes 1.0; NaN becomes null, which reads back
# as None. datasets documents no such loss and says nothing. to_json(double_precision=15) keeps 15
# places after the point, which still is 0.0 for 3e-16.
# Seen with datasets 5.0.1, pandas 3.1.1, pyarrow 26.0.1, on 2026-11-28.
# Why it matters: probabilities of tokens are often below 5e-11. Stored like this (reference policy,
# sampled answers, a label's confidence) their log is -inf, and one such token makes a KL, a ratio of
# PPO or DPO's loss infinite. Store log-probabilities, or use parquet.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check datasets==5.0.1 pandas==3.1.1 \
    pyarrow==26.0.1 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import json
import math
import sys
import datasets
import pandas
import pyarrow

folder = sys.argv[1]
print(f"datasets {datasets.__version__}, pandas {pandas.__version__}, pyarrow {pyarrow.__version__}")
values = [0.25, 1 / 3, 3.2e-11, 7.7e-9, 1 - 2e-11]
table = datasets.Dataset.from_dict({"prob": values + [float("nan")]})


def back(kind, path):
    return datasets.load_dataset(kind, data_files=path, split="train", cache_dir=folder + "/c")["prob"][:]


for kind in ("parquet", "csv", "json"):
    path = f"{folder}/probs.{kind}"
    getattr(table, "to_" + kind)(path)
    found = back(kind, path)
    print(f"  {kind:8} expected {values} and nan\n           found    {found}")
    if kind != "json":
        assert found[:5] == values
    else:
        assert found == [0.25, 0.3333333333, 0.0, 7.7e-09, 1.0, None]
with open(folder + "/probs.json") as lines:
    print("  written:", " ".join(line.strip() for line in lines))
assert json.loads(json.dumps(values)) == values
table.to_json(folder + "/more.json", double_precision=15)
more = back("json", folder + "/more.json")
print("  double_precision=15:", more)
assert more[2] == 3.2e-11 and more[1] != 1 / 3
assert math.log(values[2]) < -24
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir"
echo "ok: to_json keeps ten places after the point, and a small probability becomes 0"
