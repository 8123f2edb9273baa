#!/usr/bin/env bash
# One would guess: transformers' Trainer divides each loss by gradient_accumulation_steps, as it always
# did, so 4 steps of 2 rows give the gradient of 1 step of 8 rows, also with an own compute_loss.
# What happens: where the model's forward takes **kwargs (GPT2LMHeadModel does) and the batch has
# "labels", the Trainer counts tokens, hands over num_items_in_batch and does NOT divide: it takes for
# granted that compute_loss has. An own loss that returns a mean gets 4 times the gradient, silently.
# Seen with transformers 5.24.0 (4.57.1 does the same), torch 2.13.0, on 2026-11-28.
# Why it matters: an own preference or weighted loss on GPT-2 trains with a gradient N times as large
# (under clipping: at the clip at every step), and the log shows a loss N times as high. Setting
# model_accepts_loss_kwargs = False on the trainer brings the division back.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    transformers==5.24.0 accelerate==1.15.0

cat > "$dir/check.py" <<'PY'
import contextlib
import io
import sys
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
                    eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
torch.manual_seed(1)
rows = [{k: torch.randint(0, 50, (8,)) for k in ("input_ids", "labels")} for _ in range(8)]


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, inputs["labels"][:, 1:, None])
        return -logp.mean()


class OwnLossDivided(OwnLoss):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def one_update(kind, rows_at_once, steps):
    torch.manual_seed(0)
    args = TrainingArguments(sys.argv[1] + "/out", per_device_train_batch_size=rows_at_once,
                             gradient_accumulation_steps=steps, max_steps=1, logging_steps=1,
                             max_grad_norm=1e9, report_to=[], use_cpu=True, disable_tqdm=True,
                             save_strategy="no")
    trainer = kind(GPT2LMHeadModel(config), args, train_dataset=rows)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    log = trainer.state.log_history[0]
    return float(log["loss"]), float(log["grad_norm"])


for kind, factor in ((Trainer, 1), (OwnLoss, 4), (OwnLossDivided, 1)):
    whole, parts = one_update(kind, 8, 1), one_update(kind, 2, 4)
    print(f"{kind.__name__:15} 1 x 8 rows: loss {whole[0]:7.4f}, norm of the gradient {whole[1]:.4f};"
          f"  4 x 2 rows: loss {parts[0]:7.4f}, norm {parts[1]:.4f};  expected 1 time,"
          f" found {parts[1] / whole[1]:.2f} times")
    assert abs(parts[1] / whole[1] - factor) < 1e-3 and abs(parts[0] / whole[0] - factor) < 1e-3
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir"
echo "ok: an own mean loss is not divided by the number of accumulated steps"
