"""Talk with a model of any stage, or with several side by side.

    python -m mincai.lab.chat runs/tiny/ppo
    python -m mincai.lab.chat runs/tiny/ppo --beside data/tiny,runs/tiny/sft

Each line is one request, answered on its own. A line "Setting: a lesson" sets the operator's line for what follows,
"Setting:" alone clears it. End with Ctrl-D. The tiny model knows a few hundred words; a warning
names the others.
"""

import sys
from dataclasses import dataclass

import torch

from mincai import UserError, constitution
from mincai.plumbing.checkpoint import load
from mincai.plumbing.cli import arg, pick_device, run, set_threads
from mincai.sample import stream
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.weights import common_tokenizer, resolve


@dataclass(frozen=True)
class Config:
    model: str = arg("runs/tiny/ppo", "the model's folder; also given without the flag")
    beside: tuple[str, ...] = arg((), "more folders, answering the same requests")
    temperature: float = arg(0.7, "0 always takes the likeliest token")
    max_new: int = arg(80, "tokens of an answer at most")
    seed: int = arg(0, "seed of the samples")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")


def say(model, tokenizer, conversation: str, cfg: Config, generator) -> None:
    """Print the answer as it is sampled. Bytes of an unfinished character wait for the rest of it."""
    shown, ids = "", []
    prompt = tokenizer.encode(conversation)
    for token in stream(model, prompt, cfg.max_new, {tokenizer.eot}, cfg.temperature, generator):
        ids.append(token)
        text = tokenizer.decode(ids).removeprefix(" ")
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(flush=True)


def warn_unread(models, conversation: str) -> None:
    """One line on stderr if a model has not read all words of the conversation: what it says then
    means little."""
    for folder, _, tokenizer in models:
        if unread := tokenizer.unread(conversation):
            print(f"({folder} has never read: {' '.join(unread)}; the words it knows: "
                  f"{folder}/{WORDS})", file=sys.stderr)
            return


def main(cfg: Config) -> None:
    set_threads(cfg.threads or 1)  # one row at a time: a second thread only waits
    device = pick_device(cfg.device)
    folders = (*cfg.beside, cfg.model)
    models = [(name, load(folder, device), common_tokenizer(folder))
              for name, folder in zip(folders, map(resolve, folders))]
    generator = torch.Generator().manual_seed(cfg.seed)
    width, setting = max(map(len, folders)), None
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
            warn_unread(models, constitution.dialogue(line, setting))
            for folder, model, tokenizer in models:
                print(f"{folder:>{width}}: " if len(models) > 1 else "Assistant: ", end="", flush=True)
                try:
                    say(model, tokenizer, constitution.dialogue(line, setting), cfg, generator)
                except UserError as error:
                    print(f"({error})")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # `mincai.lab.chat FOLDER` is `--model FOLDER`
        sys.argv.insert(1, "--model")
    run(main, Config, __doc__)
