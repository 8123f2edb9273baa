"""Talk with a model of any stage, or with several side by side.

    python -m mincai.lab.chat runs/tiny/ppo
    python -m mincai.lab.chat runs/tiny/ppo --beside data/tiny,runs/tiny/sft

Each line is one request, answered on its own. A line "Setting: a lesson" sets the operator's line
for what follows, "Setting:" alone clears it. End with Ctrl-D. The tiny model knows a few hundred
words; a warning names the others.
"""

import sys
from dataclasses import dataclass

import torch

from mincai import UserError, constitution
from mincai.plumbing.checkpoint import load
from mincai.plumbing.cli import arg, pick_device, run, set_threads
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.weights import common_tokenizer, resolve
from mincai.sample import generate


@dataclass(frozen=True)
class Config:
    FIRST = "model"  # also given without its flag
    model: str = arg("runs/tiny/ppo", "the model's folder")
    beside: tuple[str, ...] = arg((), "more folders, answering the same requests")
    temperature: float = arg(0.7, "0 always takes the likeliest token", least=0)
    max_new: int = arg(80, "tokens of an answer at most", least=1)
    seed: int = arg(0, "seed of the samples")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)


def answer(model, tokenizer, conversation: str, cfg: Config, generator) -> str:
    """What the model answers, or in brackets why it cannot."""
    prompts, stop = [tokenizer.encode(conversation)], {tokenizer.eot}
    try:
        found = generate(model, prompts, cfg.max_new, stop, cfg.temperature, generator)
    except UserError as error:
        return f"({error})"
    return tokenizer.decode(found.lists()[0]).removeprefix(" ")


def warn_unread(models, conversation: str) -> None:
    """One line on stderr if a model has not read all words of the conversation: what it says then
    means little."""
    for folder, _, tokenizer in models:
        unread = tokenizer.unread(conversation)
        if unread:
            told = f"{' '.join(unread)}; the words it knows: {folder}/{WORDS}"
            print(f"({folder} has never read: {told})", file=sys.stderr)
            return


def main(cfg: Config) -> None:
    set_threads(cfg.threads or 1)  # one row at a time: a second thread only waits
    device = pick_device(cfg.device)
    models = []
    for name in (*cfg.beside, cfg.model):
        folder = resolve(name)
        models.append((name, load(folder, device), common_tokenizer(folder)))
    generator = torch.Generator().manual_seed(cfg.seed)
    width, setting = max(len(name) for name, *_ in models), None
    if sys.stdin.isatty():
        print("One request a line, for instance: how do i burn a lamp ?   Ctrl-D ends.")
    while True:
        try:
            line = input("Human: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line.startswith("Setting:"):
            setting = line.removeprefix("Setting:").strip() or None
        elif line:
            conversation = constitution.dialogue(line, setting)
            warn_unread(models, conversation)
            for folder, model, tokenizer in models:
                name = f"{folder:>{width}}" if len(models) > 1 else "Assistant"
                said = answer(model, tokenizer, conversation, cfg, generator)
                print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
