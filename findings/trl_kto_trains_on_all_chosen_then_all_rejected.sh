#!/usr/bin/env bash
# One would guess: TRL's KTOTrainer, given pairs, makes two rows of each and trains on batches in which
# chosen and rejected answers are mixed, since its loss weighs the one against the other.
# What happens: pairs are split 1,000 at a time, the chosen of all of them first, then their rejected, and
# the rows are read in that order: KTO takes its KL from neighbours, so the sampler is "sequential" and any
# other is refused. Up to 1,000 pairs, the first half of an epoch has chosen answers alone and the second
# half rejected ones alone. Shuffling the pairs beforehand does not change it. There is no warning; the log
# only lacks rewards/margins, which is left out where a batch has one kind.
# Seen with TRL 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0, on 2026-11-29.
# Why it matters: the KL, which KTO compares each reward with, is taken from the answers of the same batch:
# with one kind in it the two move together. Below, the loss stays at 0.500 from the first step to the last,
# and the same pairs give two thirds of the margin that mixed rows give. Call unpair_preference_dataset and
# shuffle its rows before the trainer gets them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 trl==1.16.0 \
    transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0

cat > "$dir/check.py" <<'PY'
import contextlib
import io
import itertools
import sys
import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

print(f"TRL {trl.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__},"
      f" torch {torch.__version__}")
torch.set_num_threads(1)
vocab = ["<eos>", "<pad>"] + [f"{kind}{i}" for kind in "qa" for i in range(16)] + "I say yes no to".split()
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
pairs = Dataset.from_list([{"prompt": f"q{i % 16} q{i * 7 % 16}", "chosen": f" I say yes to a{i % 16}",
                            "rejected": f" I say no to a{i % 16}"} for i in range(96)])


def fresh():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(vocab), n_positions=16, n_embd=32, n_layer=1, n_head=2,
                                      bos_token_id=0, eos_token_id=0, pad_token_id=1, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def logp(model, kind):
    ids = torch.tensor([tokenizer(row["prompt"] + row[kind] + " <eos>")["input_ids"] for row in pairs])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)
    return scores[:, 1:-1].gather(-1, ids[:, 2:, None]).sum((1, 2)).mean().item()


def trained(name, rows):
    model = fresh()
    args = KTOConfig(sys.argv[1] + "/out", per_device_train_batch_size=8, num_train_epochs=1,
                     learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
                     bf16=False, disable_tqdm=True)
    trainer = KTOTrainer(model, ref_model=fresh(), args=args, processing_class=tokenizer, train_dataset=rows)
    batches = [[bool(label) for label in batch["label"]] for batch in trainer.get_train_dataloader()]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    model.eval()
    rise = {kind: logp(model, kind) - logp(fresh(), kind) for kind in ("chosen", "rejected")}
    margin = rise["chosen"] - rise["rejected"]
    print(f"  {name}\n    batches: {' '.join(''.join('-+'[label] for label in batch) for batch in batches)}")
    print("    loss of each step:", " ".join(f"{log['loss']:.3f}" for log in logs))
    print("    kl of each step:", " ".join(f"{log['kl']:.2f}" for log in logs))
    print(f"    steps with rewards/margins in the log: {sum('rewards/margins' in log for log in logs)} of"
          f" {len(logs)}; learnt: log p of the chosen less that of the rejected rose by {margin:.2f}")
    assert len(batches) == len(logs) == 24
    return batches, logs, margin


print("  + is a chosen answer, - a rejected one; expected: mixed batches")
rows = unpair_preference_dataset(pairs).shuffle(seed=0)
mixed, logs, right = trained("rows unpaired and shuffled by hand", rows)
assert all(len(set(batch)) == 2 for batch in mixed) and logs[-1]["loss"] < 0.47
for name, rows in (("pairs", pairs), ("pairs shuffled", pairs.shuffle(seed=0))):
    batches, logs, margin = trained(name, rows)
    assert batches == [[True] * 8] * 12 + [[False] * 8] * 12
    assert not any("rewards/margins" in log for log in logs)
    assert all(abs(log["loss"] - 0.5) < 5e-3 for log in logs)
    assert 0 < margin < 0.8 * right
many = unpair_preference_dataset(Dataset.from_list([pairs[0]] * 2500))["label"]
runs = [len(list(run)) for _, run in itertools.groupby(many)]
print(f"  2500 pairs unpaired: runs of one kind, {runs} rows long")
assert runs == [1000, 1000, 1000, 1000, 500, 500]
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir" 2> "$dir/err" || { cat "$dir/err" >&2; exit 1; }
echo "ok: KTOTrainer reads the chosen answers of 1,000 pairs before the first of their rejected ones"
