#!/usr/bin/env bash
# One would guess: save_file of safetensors.numpy stores the values of an array, or refuses it as
# safetensors.torch does with a transposed tensor. numpy's own save keeps them, whatever the strides.
# What happens: safetensors 0.8.0 writes the memory of a transposed (Fortran-ordered, dense) array
# under the shape of the transpose. It loads without a word, with the right shape and dtype, and the
# values are in the wrong places. 0.7.0 wrote the same array rightly.
# Seen with safetensors 0.8.0 and 0.7.0, numpy 2.4.6, on 2026-11-28.
# Why it matters: GPT-2's layers keep their weights as (in, out) and nn.Linear as (out, in), so whoever
# converts one into the other writes W.T. A square one (attn.c_proj) passes every check of shapes, and
# the model talks nonsense. np.ascontiguousarray(W.T) is the cure.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"

cat > "$dir/check.py" <<'PY'
import io
import sys
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

kept = sys.argv[2] == "kept"
path = sys.argv[1] + "/w.safetensors"
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
conv1d = np.arange(9, dtype=np.float32).reshape(3, 3)      # stored (in, out)
linear = conv1d.T                                          # wanted (out, in)

memory = io.BytesIO()
np.save(memory, linear)
memory.seek(0)
assert np.array_equal(np.load(memory), linear)

save_file({"w": linear}, path)
back = load_file(path)["w"]
print("  expected:", linear.tolist())
print("  loaded:  ", back.tolist())
assert back.shape == linear.shape and back.dtype == linear.dtype
assert np.array_equal(back, linear) == kept
if not kept:
    assert np.array_equal(back, conv1d)                    # the transpose is undone

save_file({"w": np.ascontiguousarray(linear)}, path)
assert np.array_equal(load_file(path)["w"], linear)
print("  through ascontiguousarray: as expected")
PY

for version in "0.7.0 kept" "0.8.0 scrambled"; do
    set -- $version
    "$dir/venv/bin/pip" install -qq --disable-pip-version-check "safetensors==$1" numpy==2.4.6
    "$dir/venv/bin/python" "$dir/check.py" "$dir" "$2"
done
echo "ok: 0.7.0 keeps the values of a transposed array, 0.8.0 does not"
