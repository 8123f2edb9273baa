#!/usr/bin/env bash
# One would guess: tokenizer.pad_token = "!" (GPT-2 has no token for padding; "!", its id 0, or another
# that is there already is taken) says which id pads, and nothing about texts. A tokenizer that was saved
# and opened again gives the ids that it gave before.
# What happens: in the process that set it the ids of texts do not change. save_pretrained writes the word
# as a special token, and special tokens are cut out of a text before the merges: opened again, the same
# tokenizer merges nothing with it any more. " !!" was one id and is three after, and decode with
# skip_special_tokens drops the word from texts.
# Seen with transformers 4.57.6 and 5.24.0, torch not needed, on 2026-11-28.
# Why it matters: a policy or reward model is trained in one process and served from its folder in
# another, with other tokens for the very texts that it was trained on: no error, no warning, and the
# vocabulary has the same size. A test that saves and loads without such a text passes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"${PYTHON:-python3}" -m venv "$dir/venv"

cat > "$dir/check.py" <<'PY'
import sys
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}")
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(["stop it ! no !! do not do this !! why not"] * 50, trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>"], show_progress=False))


def opened(padding):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()),
                                        eos_token="<|endoftext|>")
    if padding:
        tokenizer.pad_token = padding
    return tokenizer


def saved_and_opened(tokenizer):
    folder = f"{sys.argv[1]}/{transformers.__version__}-{tokenizer.pad_token_id}"
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


texts = ["stop it", "stop it !", "no !!"]
plain = [opened(None)(text)["input_ids"] for text in texts]
for padding, changes in (("<|endoftext|>", False), ("!", True)):
    tokenizer = opened(padding)
    again = saved_and_opened(tokenizer)
    assert len(again) == len(tokenizer) == len(opened(None))
    assert again.pad_token_id == tokenizer.pad_token_id
    print(f"  pad_token {padding!r}, id {tokenizer.pad_token_id}")
    for number, text in enumerate(texts):
        before, after = tokenizer(text)["input_ids"], again(text)["input_ids"]
        kept = [t.decode(ids, skip_special_tokens=True) for t, ids in ((tokenizer, before), (again, after))]
        print(f"    {text!r:12} ids {before}, expected again after saving, found {after}; decoded {kept}")
        assert before == plain[number] and kept[0] == text
        assert (after == before) == (not changes or "!" not in text)
        assert kept[1] == (text if not changes else text.replace("!", ""))
PY

for version in 4.57.6 5.24.0; do
    "$dir/venv/bin/pip" install -qq --disable-pip-version-check "transformers==$version" numpy==2.4.6
    "$dir/venv/bin/python" "$dir/check.py" "$dir"
done
echo "ok: a pad_token that is a word of the vocabulary changes the ids of texts once the tokenizer is saved"
