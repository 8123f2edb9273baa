#!/usr/bin/env bash
# One would guess: Categorical(probs=logits.softmax(-1)) and Categorical(logits=logits) are one distribution,
# up to rounding: the text of torch's class says that they are normalised and no more.
# What happens: made from probs, it samples from them as they are, and its log-probabilities are those of
# probs clamped below at the dtype's eps. In bfloat16 that is 1/128: each token that is rarer has the one
# log-probability -4.84, with a gradient of exactly 0, and of a vocabulary like GPT-2's all but at most 128
# tokens are rarer. The entropy cannot exceed 4.84 (10.3 is right below), and the KL of two flat policies
# is 0. In float32 the floor is 1.2e-7, so -15.94. Nothing warns, and the check of the arguments passes.
# Seen with torch 2.13.0, on 2026-11-29.
# Why it matters: top-k and top-p yield probabilities, so samplers and PPO's loops are often written with
# probs, and models open in bfloat16. The ratio new / old of such a token is 1 whatever the update did, its
# gradient is 0, and an entropy or a KL in the log looks calm. Use logits, best as float32.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import math
import torch
from torch.distributions import Categorical, kl_divergence

print(f"torch {torch.__version__}")
torch.set_num_threads(1)
torch.manual_seed(0)
WORDS = 50257
# two unlike policies, rounded to bfloat16 here so that both dtypes below describe the same ones
policy, other = torch.randn(2, WORDS).bfloat16()

for dtype, wrong in ((torch.float32, False), (torch.bfloat16, True)):
    new, old = policy.to(dtype), other.to(dtype)
    right = Categorical(logits=new), Categorical(logits=old)
    found = Categorical(probs=new.softmax(-1)), Categorical(probs=old.softmax(-1))
    logits = new.clone().requires_grad_()
    tokens = Categorical(probs=logits.softmax(-1)).sample((500,))
    logp = Categorical(probs=logits.softmax(-1)).log_prob(tokens)
    logp.float().sum().backward()
    numbers = {
        "entropy": (right[0].entropy(), found[0].entropy()),
        "KL(policy || other)": (kl_divergence(*right), kl_divergence(*found)),
        "log p of the tokens drawn: mean": (right[0].log_prob(tokens).mean(), logp.mean()),
        "log p of the tokens drawn: least": (right[0].log_prob(tokens).min(), logp.min()),
    }
    print(f"  {dtype}, {WORDS} tokens")
    for name, (expected, value) in numbers.items():
        print(f"    {name:34} from logits {expected.item():8.4f}, from probs {value.item():8.4f}")
        assert (abs(expected - value) < 0.05 * abs(expected) + 1e-3) == (not wrong)
    gradient = logits.grad.abs().max().item()
    print(f"    largest gradient of the sum of their log p, from probs {gradient:.4f}")
    assert (gradient == 0) == wrong and (len(logp.unique()) == 1) == wrong
    if wrong:
        assert abs(logp[0].item() - math.log(1 / 128)) < 0.02 and kl_divergence(*found) == 0

# float32: a rare token that has become a hundred times as likely
before = torch.zeros(100)
before[7] = -26.0
logp = []
for logits in (before, before + 4.605 * torch.eye(100)[7]):
    logits = logits.requires_grad_()
    for made in (Categorical(logits=logits), Categorical(probs=logits.softmax(-1))):
        logp.append(made.log_prob(torch.tensor(7)))
ratio = (logp[2] - logp[0]).exp().item(), (logp[3] - logp[1]).exp().item()
gradient = torch.autograd.grad(logp[3], logits)[0].abs().max().item()
print(f"  torch.float32, a token of p = {logp[0].exp().item():.1e} becomes 100 times as likely: log p"
      f" {logp[0].item():.2f}, from probs {logp[1].item():.2f}; ratio {ratio[0]:.1f}, from probs {ratio[1]:.1f},"
      f" with a gradient of {gradient:.1f}")
assert abs(ratio[0] - 100) < 0.5 and ratio[1] == 1 and gradient == 0 and abs(logp[1] + 15.942) < 1e-2
PY
"$dir/venv/bin/python" "$dir/check.py"
echo "ok: Categorical(probs=...) gives each token rarer than eps the log-probability of eps, and no gradient"
