#!/usr/bin/env bash
# One would guess: with left padding and the attention_mask given, GPT-2's forward scores the tokens of
# generate with the very log-probabilities that they were sampled with.
# What happens: generate counts positions from the mask, so padding changes nothing there. A plain
# model(input_ids, attention_mask=mask) uses the mask for attention alone and counts positions from the
# first pad: each row with padding gets other position embeddings and other logits, without a warning.
# The longest row of a batch has no padding and is right, so a check with one prompt sees nothing.
# Seen with transformers 5.24.0 (4.57.1 does the same), torch 2.13.0, on 2026-11-28.
# Why it matters: PPO samples by generate and computes its log-probabilities, values and KL by forward.
# Before any update the ratio new / old is then far from 1 for all the shorter prompts. Giving
# position_ids = mask.cumsum(-1) - 1, clamped at 0, makes the two agree.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0

cat > "$dir/check.py" <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                   bos_token_id=0, eos_token_id=0, pad_token_id=0,
                                   initializer_range=0.2)).eval()
prompts = [torch.randint(1, 100, (length,)) for length in (10, 7, 3)]
ids = torch.stack([torch.cat([torch.zeros(10 - len(p), dtype=torch.long), p]) for p in prompts])
mask = torch.stack([torch.arange(10) >= 10 - len(p) for p in prompts]).long()


def logp(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(1)


with torch.no_grad():
    made = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=5,
                          suppress_tokens=[0], output_logits=True, return_dict_in_generate=True)
    answers = made.sequences[:, 10:]
    mask = torch.cat([mask, torch.ones_like(answers)], 1)
    sampled = logp(torch.stack(made.logits, 1), answers)
    plain = logp(model(made.sequences, attention_mask=mask).logits[:, 9:-1], answers)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counted = logp(model(made.sequences, attention_mask=mask, position_ids=positions).logits[:, 9:-1], answers)
    alone = torch.cat([logp(model(torch.cat([p, a])[None]).logits[:, len(p) - 1:-1], a[None])
                       for p, a in zip(prompts, answers)])

for row, p in enumerate(prompts):
    print(f"  prompt of {len(p):2} tokens: log p of the answer when sampled {sampled[row]:9.4f}, alone"
          f" {alone[row]:9.4f}, by forward with the mask {plain[row]:9.4f}, with position_ids"
          f" {counted[row]:9.4f}; ratio expected 1, found {(plain - sampled)[row].exp():.4g}")
assert torch.allclose(sampled, alone, atol=1e-3) and torch.allclose(sampled, counted, atol=1e-3)
assert abs(plain[0] - sampled[0]) < 1e-3 and (plain - sampled)[1:].abs().min() > 0.1
PY
"$dir/venv/bin/python" "$dir/check.py"
echo "ok: generate counts positions from the mask, forward does not"
