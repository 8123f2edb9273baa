"""What the training scripts share of an optimiser: which parameters decay, and how its rate
moves."""

import math

import torch

from mincai import Diverged

WEIGHT_DECAY = 0.01  # on matrices alone
MAX_NORM = 1.0  # the largest norm of a gradient


def decaying(model, weight_decay: float) -> list[dict]:
    """Parameter groups of what may learn: matrices decay; biases, gains and other vectors are not
    pulled to zero, where a LayerNorm would say nothing (Radford et al. 2019 inherit this from
    Radford et al. 2018)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model, lr: float) -> torch.optim.AdamW:
    """The optimiser of fine-tuning and of the preference model."""
    groups = decaying(model, WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(highest: float, warmup: float, step: int, steps: int, fall="cosine") -> float:
    """Linear up over the first `warmup` of the steps, then down to 0: half a cosine, or a line.
    step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    gone = (step - rising) / max(1, steps - rising)
    return highest * (0.5 * (1 + math.cos(math.pi * gone)) if fall == "cosine" else 1 - gone)


def step(optimizer, model, lr: float, place: str) -> float:
    """One step at this rate, the gradient cut to MAX_NORM and then forgotten; its norm before that.
    Diverged, and no step, where that is no finite number. place: of the step, for the message."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
    if not math.isfinite(norm):  # cut to its length it would be NaN, in every weight
        raise Diverged(f"{place}: the gradient's norm is {norm}; lower --lr, or look at the rows")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
