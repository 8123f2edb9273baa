#!/usr/bin/env bash
# One would guess: TRL ends each answer with the id tokenizer.eos_token_id, and split_special_tokens=True
# (so that a prompt which spells <|endoftext|> cannot end anything) is about what people typed.
# What happens: TRL appends the eos_token to the answer as text and lets the tokenizer find it. With
# split_special_tokens it is cut into pieces like any word: the answer ends with ids for "<", "|", "end",
# ... and eos_token_id is in no row. Neither SFTTrainer, RewardTrainer nor DPOTrainer says a word.
# Seen with TRL 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0, on 2026-11-28.
# Why it matters: the policy learns to spell the marker and not to stop, and a reward model learns to be
# read at ">", where generation later gives it the real end. Open the tokenizer without
# split_special_tokens for training, and look at the last ids of a row before it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 trl==1.16.0 \
    transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0

cat > "$dir/check.py" <<'PY'
import sys
import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

print(f"TRL {trl.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__},"
      f" torch {torch.__version__}")
END = "<|endoftext|>"
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(["why not ? yes , do . no , stop ."] * 20, trainers.BpeTrainer(
    vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END, "<pad>"],
    show_progress=False))
rows = Dataset.from_list([{"prompt": "why not ?", "chosen": " no , stop .", "rejected": " yes , do ."}] * 2)
completions = Dataset.from_list([{"prompt": "why not ?", "completion": " no , stop ."}] * 2)
common = dict(output_dir=sys.argv[1] + "/out", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)


def models_for(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1, num_labels=1,
                        bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return GPT2LMHeadModel(config), GPT2ForSequenceClassification(config)


for split in (False, True):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token=END,
                                        pad_token="<pad>", split_special_tokens=split)
    policy, reward = models_for(tokenizer)
    how = dict(processing_class=tokenizer)
    sft = SFTTrainer(policy, args=SFTConfig(**common), train_dataset=completions, **how)
    pairs = RewardTrainer(reward, args=RewardConfig(**common), train_dataset=rows, **how)
    dpo = DPOTrainer(models_for(tokenizer)[0], ref_model=models_for(tokenizer)[0], args=DPOConfig(**common),
                     train_dataset=rows, **how)
    print(f"  split_special_tokens={split}, eos_token_id {tokenizer.eos_token_id}")
    for name, ids in (("SFTTrainer", sft.train_dataset[0]["input_ids"]),
                      ("RewardTrainer", pairs.train_dataset[0]["chosen_ids"]),
                      ("DPOTrainer", dpo.train_dataset[0]["chosen_ids"])):
        print(f"    {name:13} expected: ends with [{tokenizer.eos_token_id}], found: ends with {ids[-4:]},"
              f" which is {tokenizer.decode(ids[-4:])!r}")
        assert tokenizer.decode(ids).endswith(" no , stop ." + END)
        assert (ids[-1] == tokenizer.eos_token_id) == (tokenizer.eos_token_id in ids) == (not split)
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir" 2> "$dir/err" || { cat "$dir/err" >&2; exit 1; }
echo "ok: TRL appends the end of text as text, and split_special_tokens makes common words of it"
