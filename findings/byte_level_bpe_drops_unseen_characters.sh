#!/usr/bin/env bash
# One would guess: a byte-level BPE, as GPT-2's, starts from the 256 bytes, so it can encode any text and
# decode(encode(text)) == text, whatever it was trained on.
# What happens: in tokenizers the ByteLevel pre-tokenizer only renames the bytes, and BpeTrainer's
# alphabet is the bytes it meets in the training text. A byte it never met has no token, and as GPT-2
# has no unknown token, encode drops it without a word: "2+2=4" becomes the empty list.
# Seen with tokenizers 0.23.3, on 2026-11-28.
# Why it matters: one trains a vocabulary on one text and preference data or users bring another; digits,
# capitals or signs are missing from prompts and answers, and two answers that differ only there become
# the same tokens under other labels. initial_alphabet=ByteLevel.alphabet() is what makes it GPT-2's.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check tokenizers==0.23.3

cat > "$dir/check.py" <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

print(f"tokenizers {tokenizers.__version__}")
corpus = ["the cat sat on the mat and the dog sat there too"] * 20


def trained(**more):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"], **more))
    return tokenizer


plain, whole = trained(), trained(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
for text, left in (("the cat sat", "the cat sat"), ("2+2=4", ""), ("The cat ate 2, not 3!", "he cat ate  not "),
                   ("no cat: 4 to 1", "no cat  to "), ("no cat: 1 to 4", "no cat  to ")):
    found, kept = (t.decode(t.encode(text).ids) for t in (plain, whole))
    print(f"  expected {text!r:25} found {found!r:22} with the whole alphabet {kept!r}")
    assert found == left and kept == text
assert plain.encode("2+2=4").ids == []
assert plain.encode("no cat: 4 to 1").ids == plain.encode("no cat: 1 to 4").ids
PY
"$dir/venv/bin/python" "$dir/check.py"
echo "ok: a byte-level BPE trained without an initial alphabet drops the bytes that it never met"
