#!/usr/bin/env bash
# One would guess: safetensors' save_model, made for models that share tensors, and from_pretrained are
# inverse: of GPT-2's embedding and head, one matrix, one name is kept, and the other is tied to it.
# What happens: the name it keeps is lm_head.weight, the first by the alphabet. transformers 4.57.6 ties the
# head to the embedding, which the file lacks: it reports no missing key and gives a model whose embedding
# lies on the meta device, which fails at the first forward. 5.24.0 opens the language model rightly; but in
# both, GPT2Model and GPT2ForSequenceClassification, which have no head, get a random embedding.
# Seen with safetensors 0.8.0, transformers 4.57.6 and 5.24.0, torch 2.13.0, on 2026-11-28.
# Why it matters: a reward model or critic started from such a checkpoint has learnt nothing of its words;
# the warning that the new score head is random is expected there, and the embedding is one more name in
# it. Save with save_pretrained, or rename lm_head.weight to transformer.wte.weight.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"${PYTHON:-python3}" -m venv "$dir/venv"

cat > "$dir/check.py" <<'PY'
import sys
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

version_5 = sys.argv[2] == "5"
transformers.utils.logging.disable_progress_bar()
print(f"safetensors {safetensors.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                                   bos_token_id=0, eos_token_id=0, num_labels=1)).eval()
ids = torch.arange(10)[None]
folders = {way: f"{sys.argv[1]}/{sys.argv[2]}-{way}" for way in ("save_pretrained", "save_model", "renamed")}
model.save_pretrained(folders["save_pretrained"])
for way in ("save_model", "renamed"):
    model.config.save_pretrained(folders[way])
save_model(model, folders["save_model"] + "/model.safetensors", metadata={"format": "pt"})
tensors = load_file(folders["save_model"] + "/model.safetensors")
assert "lm_head.weight" in tensors and "transformer.wte.weight" not in tensors
tensors["transformer.wte.weight"] = tensors.pop("lm_head.weight")
save_file(tensors, folders["renamed"] + "/model.safetensors", metadata={"format": "pt"})

for way, folder in folders.items():
    for kind in (GPT2LMHeadModel, GPT2Model, GPT2ForSequenceClassification):
        opened, told = kind.from_pretrained(folder, output_loading_info=True)
        wte = getattr(opened, "transformer", opened).wte.weight
        meta = wte.device.type == "meta"
        same = not meta and torch.equal(wte, model.transformer.wte.weight)
        found = "on the meta device" if meta else "the one that was saved" if same else "random"
        print(f"  {way:15} {kind.__name__:29} embedding expected the one that was saved, found {found};"
              f" missing keys told: {sorted(told['missing_keys'])}")
        if way != "save_model":
            assert same
        elif kind is GPT2LMHeadModel:
            assert (same if version_5 else meta) and not told["missing_keys"]
            if version_5:
                assert torch.equal(opened.eval()(ids).logits, model(ids).logits)
        else:
            assert not same and not meta
PY

for version in 4.57.6 5.24.0; do
    "$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
        "transformers==$version"
    "$dir/venv/bin/python" "$dir/check.py" "$dir" "${version%%.*}"
done
echo "ok: GPT-2 saved by save_model opens without its embedding in 4.57.6, and without a head in 5.24.0 too"
