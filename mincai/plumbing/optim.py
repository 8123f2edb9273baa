"""What the training scripts share of an optimiser: which parameters decay, and how the learning rate moves."""

import math


def decaying(model, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups of what may learn: matrices decay; biases, gains and other vectors are not pulled to
    zero, where a LayerNorm would say nothing (Radford et al. 2019 inherit this from Radford et al. 2018)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in learning if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0}]


def learning_rate(highest: float, warmup: float, step: int, steps: int, fall: str = "cosine") -> float:
    """Linear up over the first `warmup` of the steps, then down to 0: half a cosine, or a line. step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    gone = (step - rising) / max(1, steps - rising)
    return highest * (0.5 * (1 + math.cos(math.pi * gone)) if fall == "cosine" else 1 - gone)
