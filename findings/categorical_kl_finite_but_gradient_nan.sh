#!/usr/bin/env bash
# One would guess: where torch.distributions gives a finite KL of two Categoricals whose tokens are
# masked by -inf (top-k, forbidden words), the loss can be trained on: log_prob and entropy can.
# What happens: kl_divergence sets the terms of the masked tokens to 0 and its value is right, but the
# way back goes through -inf minus -inf: the gradient is NaN for all the tokens, also the open ones.
# Neither a mask that is the same on both sides nor a weight of 0 in front of the KL helps. The entropy
# of the same two distributions, and the KL with the trained one on the right, have finite gradients.
# Seen with torch 2.13.0, on 2026-11-28.
# Why it matters: KL(policy || reference) is RLHF's penalty. The logged KL looks healthy at the first
# update and every weight is NaN after it; clip_grad_norm_ with its usual settings does not stop it.
# Masking by torch.finfo(dtype).min in place of -inf gives the same value and a right gradient.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import torch
from torch.distributions import Categorical, kl_divergence

print(f"torch {torch.__version__}")
torch.manual_seed(0)
hidden, reference = torch.randn(4, 8), torch.randn(4, 10)
masked = torch.zeros(10, dtype=torch.bool)
masked[7:] = True


def update(name, loss, fill, nan):
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 10)
    policy = Categorical(logits=head(hidden).masked_fill(masked, fill))
    other = Categorical(logits=reference.masked_fill(masked, fill))
    value = loss(policy, other).mean()
    value.backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    gradient = head.weight.grad.clone()
    torch.optim.AdamW(head.parameters(), lr=1e-3).step()
    weights = sum(int(p.isnan().sum()) for p in head.parameters())
    print(f"  {name:38} value {value.item():7.4f}, weights that are NaN after one update: expected 0,"
          f" found {weights} of 90")
    assert value.isfinite() and weights == (90 if nan else 0)
    return value.item(), gradient


inf, least = float("-inf"), torch.finfo(torch.float32).min
update("log_prob of an open token, -inf", lambda p, q: -p.log_prob(torch.tensor(2)), inf, nan=False)
update("entropy, -inf", lambda p, q: p.entropy(), inf, nan=False)
update("KL(reference || policy), -inf", lambda p, q: kl_divergence(q, p), inf, nan=False)
update("0 * KL(policy || reference), -inf", lambda p, q: 0 * kl_divergence(p, q), inf, nan=True)
bad, _ = update("KL(policy || reference), -inf", kl_divergence, inf, nan=True)
good, gradient = update("KL(policy || reference), finfo.min", kl_divergence, least, nan=False)
assert abs(bad - good) < 1e-6

# the gradient under finfo.min is that of the open tokens alone
torch.manual_seed(1)
head = torch.nn.Linear(8, 10)
logp, logq = head(hidden)[:, :7].log_softmax(-1), reference[:, :7].log_softmax(-1)
(logp.exp() * (logp - logq)).sum(-1).mean().backward()
torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
assert torch.allclose(gradient, head.weight.grad, atol=1e-6)
PY
"$dir/venv/bin/python" "$dir/check.py"
echo "ok: the KL of two masked Categoricals is finite and right, and its gradient is NaN"
