"""How many tokens a second a model of some shape reads, writes and learns from.

Measured on this device, or stated for a card. bench.py times whole training steps at full size, and
takes its time; these few calls take seconds, so that plan.py can say what a run will take before it
begins. Weights are random.
"""

import dataclasses
import time
from dataclasses import dataclass

import torch

from mincai.plumbing import memory
from mincai.lab.bench import median_seconds
from mincai.plumbing.cli import precision
from mincai.model import GPT, GPTConfig
from mincai.sample import generate

# A card to plan for where none is at hand: operations and bytes a second
CARD = {"name": "an A10 of 24 GB, by its data sheet, at 30% of its speed",
        "flops": 0.3 * 125e12, "bytes": 0.3 * 600e9}


@dataclass(frozen=True)
class Rates:
    """Tokens a second, and where the numbers come from."""
    read: float
    written: float
    learnt: float
    source: str

    def seconds(self, work) -> float:
        """work: anything that counts its tokens as read, written and learnt."""
        return work.read / self.read + work.written / self.written + work.learnt / self.learnt


def least_seconds(work, device, repeat=2) -> float:
    """The shortest of a few calls, for what else the machine does only adds to them."""
    return min(median_seconds(work, 1, device) for _ in range(repeat))


def measure(shape: GPTConfig, device: str, dtype: str) -> Rates:
    """Rates of a model of this shape with random weights, here: forward, and sampling.

    Learning counts as three times a forward with its logits (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1). Of a deep model one and three blocks are timed, and the others count as much. A
    CPU is timed in float32: products in bfloat16 are slower there, a hundredfold on some.
    """
    started, slow = time.time(), device == "cpu" and memory.parameters(shape) > 5e6
    dtype = dtype if device == "cuda" else "float32"
    depths = (1, 3) if shape.n_layer > 4 else (shape.n_layer,)
    rows, length, new = (8, 32, 4) if slow else (64, 96, 16)
    length, new = min(length, shape.block_size), min(new, shape.block_size - 1)
    timed = []  # of each depth: seconds a token read, written, learnt from
    for depth in depths:
        model = GPT(dataclasses.replace(shape, n_layer=depth)).to(device)
        ids = torch.randint(shape.vocab_size, (rows, length), device=device)
        prompts = ids[:, :1].tolist()
        with torch.no_grad(), precision(device, dtype):
            read = least_seconds(lambda: model(ids), device) / ids.numel()
            logits = least_seconds(lambda: model.unembed(model(ids)), device) / ids.numel()
            write = least_seconds(lambda: generate(model, prompts, new, set()), device)
        timed.append((read, write / (rows * new), 3 * logits))
    more = (shape.n_layer - depths[0]) / max(1, depths[-1] - depths[0])
    whole = [first + more * max(0.0, last - first) for first, last in zip(timed[0], timed[-1])]
    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"this CPU with --threads {torch.get_num_threads()}")
    return Rates(*(1 / seconds for seconds in whole),
                 f"measured on {name}, {dtype}, random weights, in {time.time() - started:.0f} s")


def stated(shape: GPTConfig, rows: int) -> Rates:
    """Rates of CARD in bfloat16: 2 operations a parameter and token forward, 6 with backward
    (Kaplan et al. 2020); one token of `rows` answers at once reads all weights, 2 bytes each."""
    numbers = memory.parameters(shape)
    forward, written = CARD["flops"] / (2 * numbers), rows * CARD["bytes"] / (2 * numbers)
    return Rates(forward, min(forward, written), forward / 3, CARD["name"])
