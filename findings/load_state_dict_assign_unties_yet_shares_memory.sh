#!/usr/bin/env bash
# One would guess: load_state_dict(assign=True), made for models built on the meta device, leaves a tied
# head tied: torch.save keeps shared memory shared, and without assign the tie stays.
# What happens: each name gets a Parameter of its own over the one memory. Equal values and an equal
# data_ptr() say "tied", and a write to one shows in the other, yet parameters() counts the matrix
# twice, each half gets only its own part of the gradient, and AdamW updates the one memory twice a
# step: the weights move by 2 * lr where lr is the bound, and decay twice.
# Seen with torch 2.13.0, on 2026-11-28.
# Why it matters: GPT-2's embedding and head are such a pair. Loaded like this it samples as before, a
# test for a shared data_ptr() passes, and fine-tuning or PPO trains its largest matrix at twice the
# rate, with a norm of the gradient (so a clip) that is not the model's. Tie it again after loading.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/check.py" <<'PY'
import sys
import torch
from torch import nn

path = sys.argv[1] + "/tied.pt"
print(f"torch {torch.__version__}")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.lm_head = nn.Linear(8, 50, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        return self.lm_head(self.wte(ids))


torch.manual_seed(0)
torch.save(Tied().state_dict(), path)
ids, targets = torch.randint(0, 50, (64,)), torch.randint(0, 50, (64,))


def load(how):
    if how == "copied":
        model = Tied()
        model.load_state_dict(torch.load(path))
    else:
        with torch.device("meta"):
            model = Tied()
        assert model.lm_head.weight is model.wte.weight
        model.load_state_dict(torch.load(path), assign=True)
        if how == "assigned, tied again":
            model.lm_head.weight = model.wte.weight
    return model


def seen(how):
    model = load(how)
    head, wte = model.lm_head.weight, model.wte.weight
    assert torch.equal(head, wte) and head.data_ptr() == wte.data_ptr()    # "it is tied"
    before = wte.detach().clone()
    nn.functional.cross_entropy(model(ids), targets).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    moved = (wte.detach() - before).abs().max().item()
    count = sum(p.numel() for p in model.parameters())
    print(f"  {how:21} one memory: True, parameters: {count}, norm of the gradient: {norm:.4f},"
          f" largest move of AdamW at lr 0.001: {moved:.6f}")
    return count, norm, moved


right = seen("copied")
wrong = seen("assigned")
again = seen("assigned, tied again")
print("  expected: three equal lines")
assert right[0] == 400 and abs(right[2] - 1e-3) < 1e-5
assert wrong[0] == 800 and wrong[2] > 1.9e-3 and abs(wrong[1] - right[1]) > 1e-2
assert again[0] == 400 and abs(again[1] - right[1]) < 1e-5 and abs(again[2] - right[2]) < 1e-6
PY
"$dir/venv/bin/python" "$dir/check.py" "$dir"
echo "ok: assign=True makes two parameters over one memory, and AdamW updates it twice"
