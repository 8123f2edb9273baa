#!/usr/bin/env bash
# One would guess: compute_transition_scores gives the log-probability of each token that generate made, so
# the sum of a row is that of its answer, also where other rows of the batch are longer. With beams it is so:
# what follows the end of a row is 0 there.
# What happens: without beams (sampling, greedy) the padding behind the end is scored as if the model had
# gone on and said it. With top_k the padding is often among the tokens that were cut off: the sum is -inf.
# Seen with transformers 5.24.0 (4.57.6 does the same), torch 2.13.0, on 2026-11-29.
# Why it matters: a KL, PPO's log-probabilities or a choice among n answers made of such sums charge an
# answer for having ended before its neighbours. The same answer gets another number in another batch, and
# the largest sum is that of a long one. Alone, or where all end together, each is right, so a small check
# passes. Set to 0 what comes after the first end.
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
torch.set_num_threads(1)
torch.manual_seed(0)
END, LENGTH = 0, 10
model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                                   bos_token_id=END, eos_token_id=END, pad_token_id=END,
                                   initializer_range=0.3)).eval()
prompts = torch.tensor([[a, b] for a in range(1, 5) for b in range(1, 5)])


def answered(**how):
    torch.manual_seed(1)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH,
                          output_scores=True, return_dict_in_generate=True, **how)


def by_forward(sequences):
    """log p of each token of the answers, and which tokens are the answer: up to the first end."""
    with torch.no_grad():
        logp = model(sequences).logits[:, 1:-1].log_softmax(-1)
    tokens = sequences[:, 2:]
    ended = (tokens == END).cumsum(1)
    return logp.gather(-1, tokens[..., None])[..., 0], (ended == 0) | ((ended == 1) & (tokens == END))


beams = answered(num_beams=3, length_penalty=0.0)
scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
_, answer = by_forward(beams.sequences)
short = ~answer.all(1)
print(f"  beams: {int(short.sum())} of {len(prompts)} answers end early; what follows their end is"
      f" {scores[~answer].abs().max():.1f} everywhere")
assert short.any() and not short.all() and (scores[~answer] == 0).all()
assert torch.allclose(scores.sum(1), beams.sequences_scores, atol=1e-4)

for name, how in (("greedy", dict(do_sample=False)), ("sampled", dict(do_sample=True, top_k=0)),
                  ("sampled, top_k=4", dict(do_sample=True, top_k=4))):
    made = answered(**how)
    scores = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    logp, answer = by_forward(made.sequences)
    short = ~answer.all(1)
    right = scores.where(answer, 0.0).sum(1)
    print(f"  {name}: {int(short.sum())} of {len(prompts)} answers end early")
    shown = torch.cat([short.nonzero()[:2, 0], (~short).nonzero()[:1, 0]])
    for row in shown.tolist():
        print(f"    answer of {int(answer[row].sum()):2} tokens: log p expected {right[row]:8.3f},"
              f" found {scores[row].sum():8.3f}")
    assert short.any() and not short.all()
    if "top_k" not in name:
        assert torch.allclose(right, (logp * answer).sum(1), atol=1e-3)
        assert (scores.sum(1) - right)[short].max() < -0.1
    else:
        behind = scores[~answer]
        print(f"    of {behind.numel()} places behind the end, -inf are {int((behind == -torch.inf).sum())}")
        assert (behind == -torch.inf).any() and right.isfinite().all()
    assert torch.allclose(scores.sum(1)[~short], right[~short])
    if name == "sampled":
        best = [int(answer[total.argmax()].sum()) for total in (right, scores.sum(1))]
        print(f"    the likeliest answer has {best[0]} tokens, the one with the largest sum {best[1]}")
        assert best[0] < best[1]
PY
"$dir/venv/bin/python" "$dir/check.py"
echo "ok: compute_transition_scores is 0 behind the end for beams, and scores the padding otherwise"
