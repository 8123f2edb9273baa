#!/usr/bin/env bash
# One would guess: attn_implementation picks a faster kernel and no other model: "sdpa", the default,
# agrees with "eager" for every GPT2Config, as it does for the plain one.
# What happens: in transformers 4.57.1 two fields of GPT2Config, scale_attn_by_inverse_layer_idx and
# scale_attn_weights, work under "eager" alone. Under "sdpa" both are ignored without a warning, and
# the very same weights give other logits. In 5.24.0 both ways agree, so it is the upgrade that changes
# what such a checkpoint says under the default setting.
# Seen with transformers 4.57.1 and 5.24.0, torch 2.13.0, on 2026-11-28.
# Why it matters: a GPT-2 trained with these fields is another model under 4.57.1's default; one trained
# there never had the scales and is another model in 5. A loader written from scratch that honours the
# config agrees with one of the two only, so compare it with "eager".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"

cat > "$dir/check.py" <<'PY'
import sys
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

folder, ignored = sys.argv[1], sys.argv[2] == "ignored"
transformers.utils.logging.disable_progress_bar()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
ids = torch.randint(1, 100, (1, 20))
for number, fields in enumerate(({}, {"scale_attn_by_inverse_layer_idx": True},
                                 {"scale_attn_weights": False})):
    path = f"{folder}/model{number}"
    if ignored:                                            # the first run makes the checkpoints
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=4, n_head=2,
                                   bos_token_id=0, eos_token_id=0, initializer_range=0.3,
                                   **fields)).save_pretrained(path)
    logits = {}
    with torch.no_grad():
        for way in ("default", "sdpa", "eager"):
            more = {} if way == "default" else {"attn_implementation": way}
            logits[way] = GPT2LMHeadModel.from_pretrained(path, **more).eval()(ids).logits
    assert torch.equal(logits["default"], logits["sdpa"])
    apart = (logits["sdpa"] - logits["eager"]).abs().max().item()
    print(f"  {str(fields or 'plain'):43} sdpa against eager: expected below 0.001, found {apart:.6f}")
    assert (apart > 0.5) if fields and ignored else (apart < 1e-3)
    if not ignored:
        before = torch.load(path + ".pt")
        apart = (logits["default"] - before).abs().max().item()
        print(f"  {'':43} default of 4.57.1 against default of {transformers.__version__}: {apart:.6f}")
        assert (apart > 0.5) if fields else (apart < 1e-3)
    torch.save(logits["default"], path + ".pt")
PY

"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==4.57.1
"$dir/venv/bin/python" "$dir/check.py" "$dir" ignored
"$dir/venv/bin/pip" install -qq --disable-pip-version-check transformers==5.24.0
"$dir/venv/bin/python" "$dir/check.py" "$dir" honoured
echo "ok: 4.57.1 forgets GPT-2's attention scales under its default attention, 5.24.0 does not"
