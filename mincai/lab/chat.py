"""Talk with a model of any stage, or with several side by side.

    python -m mincai.lab.chat runs/tiny/ppo
    python -m mincai.lab.chat runs/tiny/ppo --beside data/tiny,runs/tiny/sft

In a terminal a conversation goes on, as far as the model has room; `/help` tells the commands. The
tiny model has read conversations of one turn only: it is asked each request alone, and so is any
model where lines are piped in. It knows a few hundred words; a warning names the others. In a run
folder the preference model's score stands beside each answer.
"""

import contextlib
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mincai import DATA, UserError, constitution
from mincai.plumbing import data, formats, turns
from mincai.plumbing.checkpoint import load
from mincai.plumbing.cli import arg, pick_device, run, set_threads
from mincai.plumbing.logprobs import answer_scores
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.weights import common_tokenizer, resolve
from mincai.sample import generate

HELP = """  Setting: a lesson   the operator's line, for what follows; "Setting:" alone clears it
  /new                begin a new conversation
  /quit               end, as Ctrl-D does"""


@dataclass(frozen=True)
class Config:
    FIRST = "model"  # also given without its flag
    model: str = arg("runs/tiny/ppo", "the model's folder")
    beside: tuple[str, ...] = arg((), "more folders, answering the same requests")
    pm: str = arg("", "the preference model to score answers with; none: pm/ beside the model")
    temperature: float = arg(0.7, "0 always takes the likeliest token", least=0)
    max_new: int = arg(80, "tokens of an answer at most", least=1)
    seed: int = arg(0, "seed of the samples")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)


@dataclass
class Speaker:
    """A model that answers, and what was said to it and by it so far."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    pm: torch.nn.Module | None
    goes_on: bool  # whether earlier turns stand before a request
    said: list[tuple[str, str]] = field(default_factory=list)  # (role, text) of earlier turns
    told: bool = False  # that earlier turns had no room

    def conversation(self, request: str, setting: str | None, room: int) -> str:
        """The turns so far, without the oldest ones that have no room, and the request."""
        while True:
            prompt = turns.asked([*self.said, ("Human", request)])["prompt"]
            text = constitution.dialogue(prompt, setting)
            if not self.said or len(self.tokenizer.encode(text)) <= room:
                return text
            if not self.told:
                print(f"({self.name} has no more room: the oldest turns are left out from now on)")
            self.said, self.told = self.said[2:], True

    def answer(self, request: str, setting, cfg: Config, generator) -> str:
        """What the model answers, and its score; or in brackets why it cannot."""
        room, eot = self.model.config.block_size - cfg.max_new, self.tokenizer.eot
        prompt = self.tokenizer.encode(self.conversation(request, setting, room))
        try:
            found = generate(self.model, [prompt], cfg.max_new, {eot}, cfg.temperature, generator)
        except UserError as error:
            return f"({error})"
        (ids,) = found.lists()
        text = self.tokenizer.decode(ids).removeprefix(" ")
        if self.goes_on and text.strip():
            self.said += [("Human", request), ("Assistant", text)]
        if self.pm is None or ids[-1] != eot:  # it has read no answer that was cut off
            return text
        return f"{text}   [score {float(answer_scores(self.pm, [prompt], [ids])):+.2f}]"


def open_speakers(cfg: Config, in_terminal: bool) -> list[Speaker]:
    device, found = pick_device(cfg.device), []
    beside = Path(cfg.model).parent / "pm"
    path = cfg.pm or (str(beside) if beside.is_dir() else "")
    pm, its = (load(path, device, scalar=True), common_tokenizer(path)) if path else (None, None)
    for name in (*cfg.beside, cfg.model):
        folder = resolve(name)
        model, tokenizer = load(folder, device), common_tokenizer(folder)
        scores = pm if its and its.ranks == tokenizer.ranks else None
        found.append(Speaker(name, model, tokenizer, scores, in_terminal and not tokenizer.words))
    return found


def suggestions(cfg: Config, tokenizer) -> list[str]:
    """Four requests to try: of those that the model was trained on, where its run.json names them
    and they are there, else of those that are shipped for its kind."""
    shipped = DATA / ("english" if tokenizer.words is None else "tiny") / "prompts.jsonl"
    found, rng = [], random.Random(cfg.seed)
    with contextlib.suppress(UserError):
        made = data.read_object(Path(cfg.model, "run.json")).get("config", {})
        rows = formats.loop_prompts(made.get("prompts", shipped))
        for kind, name in (("harmful", "harmful"), ("benign", "ordinary")):
            some = [row for row in rows if row["kind"] == kind]
            some = [row for row in some if row.get("attack") == "plain"] or some
            some = rng.sample(some, min(2, len(some)))
            found += [f"{row['prompt']}   ({name})" for row in some]
    return found


def warn_unread(speakers, request: str, setting) -> None:
    """One line on stderr if a model has not read all words of what it is asked: what it says then
    means little."""
    for speaker in speakers:
        unread = speaker.tokenizer.unread(constitution.dialogue(request, setting))
        if unread:
            told = f"{' '.join(unread)}; the words it knows: {speaker.name}/{WORDS}"
            print(f"({speaker.name} has never read: {told})", file=sys.stderr)
            return


def main(cfg: Config) -> None:
    set_threads(cfg.threads or 1)  # one row at a time: a second thread only waits
    in_terminal = sys.stdin.isatty()
    speakers = open_speakers(cfg, in_terminal)
    generator = torch.Generator().manual_seed(cfg.seed)
    width, setting = max(len(speaker.name) for speaker in speakers), None
    if in_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys, and earlier lines
        print("One request a line; /help tells more, /quit ends.")
        if not any(speaker.goes_on for speaker in speakers):
            print("The model has read conversations of one turn only: each request is asked alone.")
        if any(speaker.pm for speaker in speakers):
            print("The score beside an answer is the preference model's, in deviations.")
        print("Try:", *suggestions(cfg, speakers[-1].tokenizer), sep="\n  ")
    while True:
        try:
            line = input("Human: " if in_terminal else "").strip()
        except EOFError:
            return
        command = line if line.startswith("/") and " " not in line else ""
        if command == "/quit":
            return
        if command == "/new":
            for speaker in speakers:
                speaker.said = []
        elif command:
            print(HELP)
        elif line.startswith("Setting:"):
            setting = line.removeprefix("Setting:").strip() or None
        elif line:
            warn_unread(speakers, line, setting)
            for speaker in speakers:
                name = f"{speaker.name:>{width}}" if len(speakers) > 1 else "Assistant"
                print(f"{name}: {speaker.answer(line, setting, cfg, generator)}", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
