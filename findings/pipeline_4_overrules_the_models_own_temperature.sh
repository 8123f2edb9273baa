#!/usr/bin/env bash
# One would guess: generation_config.json beside a model says how it samples, so generate and
# pipeline("text-generation") draw from one distribution; the pipeline's own defaults (temperature 0.7)
# fill in what that file leaves out. A comment in its source says so, and for top_k it is true.
# What happens: in transformers 4.57.6 the pipeline samples at 0.7 whatever temperature the file gives,
# and samples even where the file says do_sample false; generate honours both. In 5.24.0 the file wins
# in the pipeline too, so an upgrade changes the texts of one model under one line of code.
# Seen with transformers 4.57.6 and 5.24.0, torch 2.13.0, on 2026-11-28.
# Why it matters: samples taken by the pipeline to judge a policy (rate of harm, diversity, best of n) are
# sharper than what RL trained and what generate shows, and their log-probabilities at temperature 1 are
# not those that they were drawn with. Giving temperature= in the call works in both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"

cat > "$dir/check.py" <<'PY'
import json
import sys
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

folder, overruled = sys.argv[1] + "/model", sys.argv[2] == "overruled"
transformers.utils.logging.disable_progress_bar()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "a", "b", "c"])}, unk_token="<eos>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=8, n_layer=1, n_head=1,
                                   bos_token_id=0, eos_token_id=0))
model.save_pretrained(folder)
seen = []


def sampled_with(self, *args, **more):
    given = more["generation_config"]
    seen.append((given.do_sample, given.temperature, given.top_k))
    return original(self, *args, **more)


original, GPT2LMHeadModel._sample = GPT2LMHeadModel._sample, sampled_with
for file in ({"do_sample": True, "temperature": 1.5, "top_k": 3}, {"do_sample": True, "temperature": 1.0},
             {"do_sample": False}):
    with open(folder + "/generation_config.json", "w") as out:
        json.dump({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **file}, out)
    write = pipeline("text-generation", model=folder, device="cpu")
    ids = torch.tensor([[1, 2]])
    wanted = (file["do_sample"], file.get("temperature", 1.0), file.get("top_k", 50))
    seen.clear()
    GPT2LMHeadModel.from_pretrained(folder).generate(ids, max_new_tokens=2)
    write("a b", max_new_tokens=2)
    by_generate, by_pipeline = seen
    write("a b", max_new_tokens=2, do_sample=True, temperature=0.9)
    print(f"  file {file}\n    (do_sample, temperature, top_k): expected twice {wanted}, found by generate"
          f" {by_generate}, by pipeline {by_pipeline}")
    assert by_generate == wanted and seen[-1][1] == 0.9
    assert by_pipeline == ((True, 0.7, wanted[2]) if overruled else wanted)
PY

for version in "4.57.6 overruled" "5.24.0 honoured"; do
    set -- $version
    "$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 "transformers==$1"
    "$dir/venv/bin/python" "$dir/check.py" "$dir" "$2"
done
echo "ok: 4.57.6's pipeline overrules the temperature and do_sample of generation_config.json, 5.24.0's does not"
