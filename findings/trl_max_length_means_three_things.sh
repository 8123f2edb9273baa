#!/usr/bin/env bash
# One would guess: max_length cuts a row that is too long at its end, in each of TRL's trainers.
# What happens: three things, none with a warning. SFTTrainer cuts the end, and a row whose prompt fills
# max_length stays with not one token to learn. RewardTrainer throws the whole pair away. DPOTrainer
# keeps the END of prompt + answer (truncation_mode "keep_end"), after max_prompt_length was applied:
# a long answer loses its prompt and its own beginning, and its log-probability, without any prompt,
# is compared with that of the short answer, which still has it.
# Seen with TRL 0.24.0, transformers 4.57.1, datasets 5.0.1, torch 2.13.0, on 2026-11-28.
# Why it matters: the three stages of one run see different data for one file and one max_length. DPO's
# pairs of unequal length are no longer two answers to one prompt, and the reward model has not seen
# the long answers that PPO will ask it about. Filter by length before training, on one count.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 trl==0.24.0 \
    transformers==4.57.1 datasets==5.0.1 accelerate==1.15.0

cat > "$dir/check.py" <<'PY'
import sys
import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

print(f"TRL {trl.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__},"
      f" torch {torch.__version__}; max_length is 16")
vocab = ["<eos>", "<pad>"] + [f"{kind}{i}" for kind in "pab" for i in range(1, 31)]
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
config = GPT2Config(vocab_size=len(vocab), n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=1,
                    bos_token_id=0, eos_token_id=0, pad_token_id=1)


def text(kind, count):
    return " ".join(f"{kind}{i}" for i in range(1, count + 1))


# (length of the prompt, of the chosen answer, of the rejected answer); each answer ends with <eos>
sizes = {"short": (4, 4, 3), "long answer": (4, 27, 3), "long prompt": (25, 3, 2)}
pairs = [{"prompt": text("p", p), "chosen": " " + text("a", a), "rejected": " " + text("b", b)}
         for p, a, b in sizes.values()]
common = dict(output_dir=sys.argv[1] + "/out", max_length=16, report_to=[], use_cpu=True, bf16=False,
              disable_tqdm=True)


def show(trainer, name, row):
    print(f"  {trainer:13} {name:12} {row}")


sft = SFTTrainer(GPT2LMHeadModel(config), SFTConfig(**common), processing_class=tokenizer,
                 train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]}
                                                  for r in pairs]))
sft_rows = [tokenizer.decode(ids) for ids in sft.train_dataset["input_ids"]]
learnt = (sft.data_collator(list(sft.train_dataset))["labels"] != -100).sum(1).tolist()
for name, row, count in zip(sizes, sft_rows, learnt):
    show("SFTTrainer", name, f"{row}   tokens to learn: {count}")
assert sft_rows[1] == text("p", 4) + " " + text("a", 12) and sft_rows[2] == text("p", 16)
assert learnt == [5, 12, 0]

reward = RewardTrainer(GPT2ForSequenceClassification(config), RewardConfig(**common),
                       processing_class=tokenizer,
                       train_dataset=Dataset.from_list([{k: r["prompt"] + r[k] for k in ("chosen", "rejected")}
                                                        for r in pairs]))
left = [tokenizer.decode(ids) for ids in reward.train_dataset["chosen_input_ids"]]
show("RewardTrainer", "all", f"{len(left)} of {len(pairs)} pairs are left: {left}")
assert left == [text("p", 4) + " " + text("a", 4) + " <eos>"]

dpo = DPOTrainer(GPT2LMHeadModel(config), args=DPOConfig(max_prompt_length=8, **common),
                 processing_class=tokenizer, train_dataset=Dataset.from_list(pairs))
seen = []
dpo.model.register_forward_pre_hook(lambda _, args, more: seen.append(more.get("input_ids", *args[:1])),
                                    with_kwargs=True)
dpo.concatenated_forward(dpo.model, dpo.data_collator(list(dpo.train_dataset)))
rows = [tokenizer.decode([i for i in ids.tolist() if i != 1]) for ids in seen[0]]
for number, name in enumerate(sizes):
    show("DPOTrainer", name, f"chosen: {rows[number]}")
    show("", "", f"rejected: {rows[number + 3]}")
assert dpo.args.truncation_mode == "keep_end"
assert rows[1] == " ".join(f"a{i}" for i in range(13, 28)) + " <eos>"       # no prompt
assert rows[4] == text("p", 4) + " " + text("b", 3) + " <eos>"              # its rival has one
print("  expected of each: the long answer as", text("p", 4), text("a", 12))
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir" 2> "$dir/err" || { cat "$dir/err" >&2; exit 1; }
echo "ok: max_length cuts the end in SFT, drops the pair for the reward model, keeps the end in DPO"
