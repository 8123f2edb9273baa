"""Phase 1 of Constitutional AI: respond -> critique -> revise, several rounds, by one model, under
drawn principles.

    python -m mincai.critique --out runs/tiny/revisions.jsonl

The base model answers adversarial prompts, --responses times each, and ordinary ones at temperature
1. In every round a principle is drawn, the model writes a critique of the answer that stands and
then a revision; a round starts from a fresh conversation, so context does not pile up (Bai et al.
2022, 2212.08073, section 3.1). A revision may say that the answer stands. Nothing here judges but
the model. Every original, critique and revision is kept in the output.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

import torch

from mincai import UserError, constitution, shipped
from mincai.plumbing import data, distributed, formats, output
from mincai.plumbing.cli import arg, run
from mincai.plumbing.planner import Planner, load_shots, warn_outside
from mincai.plumbing.stage import Settings, begin
from mincai.sample import generate_batched

# Share of draws from principles on a harmful prompt's own category, or on harm if it names none; and
# on these for an ordinary one
AIM = 0.8
ORDINARY = ("help", "reasons")  # an ordinary answer should help, and say why


@dataclass(frozen=True)
class Config(Settings):
    LOOSE = (*Settings.LOOSE, "batch_size")
    model: str = arg(shipped("tiny"), "the model that does it all: a folder, or gpt2 and its sizes")
    prompts: str = arg(
        shipped("tiny/prompts.jsonl"), "JSONL (rows of split 'loop'), text, or HH-RLHF's"
    )
    constitution: str = arg(str(constitution.PATH), "the principles")
    without: str = arg("", "leave out these principle ids or targets, commas between")
    fewshot: str = arg("", "file of worked examples to show; principles then stand in full words")
    harmful: int = arg(640, "adversarial prompts, the families in turn; 0 for all", least=0)
    helpful: int = arg(480, "ordinary prompts; 0 for all", least=0)
    responses: int = arg(1, "answers sampled to each adversarial prompt, at temperature 1", least=1)
    rounds: int = arg(2, "critiques and revisions of an answer, each by its principle", least=1)
    direct: bool = arg(False, "revise without a critique first; to compare with (paper, figure 7)")
    temperature: float = arg(1.0, "of critiques and revisions, 0: greedy", least=0)
    max_new: int = arg(104, "tokens of a critique or an answer at most", least=1)
    batch_size: int = arg(128, "rows sampled together", least=1)
    out: str = arg("runs/tiny/revisions.jsonl", "JSONL to write")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


# What opens a part of the prompts, or closes a critique; no answer does
NOT_ANSWERS = re.compile(
    r"the principle is|\([ab]\)"
    r"|(critique|revision|review|human|assistant|request|principle|choice) *:"
    r"|.*\b(breaks|keeps|break|keep) (this|the) principle\b",
    re.IGNORECASE | re.DOTALL,
)


def words(text: str) -> list[str]:
    """A text's words alone, for comparing: neither case nor punctuation makes two texts
    different."""
    return re.findall(r"\w+", text.lower())


def rejected(revision: str, original: str, critique: str = "") -> str:
    """Why a revision does not take the answer's place ("" if it does): a matter of form alone."""
    if not words(revision):
        return "empty"
    if words(revision) == words(constitution.KEEP):
        return "keep"
    if words(revision) == words(original):
        return "same as the answer"
    if NOT_ANSWERS.match(revision) or words(revision) == words(critique):
        return "not an answer"
    return ""


@dataclass(frozen=True)
class Writer:
    """The model with all that it needs to write, one line after each prompt."""

    model: torch.nn.Module
    planner: Planner
    cfg: Config
    generator: torch.Generator
    journal: object = None  # see plumbing/progress.py

    @property
    def stop(self) -> set[int]:
        return self.planner.tokenizer.line_ends

    def write(self, kind, texts, temperature, desc) -> tuple[list[list[int]], list[str]]:
        """Token ids and text of what it writes after each text; nothing where a text leaves no
        room, for one must not end the whole job. kind: of the worked examples that go in front."""
        prompts = [self.planner.prompt(kind, text, self.cfg.max_new) for text in texts]
        fits = [i for i, prompt in enumerate(prompts) if prompt is not None]
        written = [[] for _ in texts]
        if fits:
            some = [prompts[i] for i in fits]
            how = dict(temperature=temperature, generator=self.generator, journal=self.journal)
            how |= dict(batch_size=self.cfg.batch_size, desc=desc)
            found = generate_batched(self.model, some, self.cfg.max_new, self.stop, **how)
            for i, ids in zip(fits, found):
                written[i] = ids
        return written, [constitution.clean(self.planner.tokenizer.decode(ids)) for ids in written]


def respond(writer, items) -> tuple[list[dict], Counter]:
    """Gives each item its `original`, sampled at temperature 1; those without an answer are left
    out, and counted."""
    conversations = [item["conversation"] for item in items]
    kept, dropped = [], Counter()
    for item, ids, text in zip(items, *writer.write("answer", conversations, 1.0, "answers")):
        item["original"] = text
        if text:
            kept.append(item)
        else:
            dropped["empty" if ids else "no room"] += 1
    return kept, dropped


def outcome(writer, critique, revision, original, direct) -> str:
    """What becomes of a revision: "revised", or why it does not take the answer's place. critique,
    revision: (token ids, text)."""
    (said, text), (ids, revised) = critique, revision
    if not ids or not said and not direct:
        return "no room"
    if not direct and not text:
        return "critique empty"
    if not direct and said[-1] not in writer.stop:  # from half a critique nothing follows
        return "critique cut off"
    if ids[-1] not in writer.stop:
        return "cut off"
    return rejected(revised, original, text) or "revised"


def critique_rounds(writer, items, principles, rng) -> Counter:
    """Adds to each item (a dict with conversation, original, category) its `rounds` and its final
    `revision`.

    With --direct no critique goes before a revision; the rounds' critiques are then empty texts.
    """
    cfg, full, counts = writer.cfg, writer.planner.full, Counter()
    for item in items:
        item["revision"], item["rounds"] = item["original"], []
    for number in range(1, cfg.rounds + 1):
        drawn, reviews = [], []
        for item in items:
            harmful = item.get("kind") != "benign"
            targets = (item["category"] or "harm",) if harmful else ORDINARY
            principle = constitution.draw(principles, targets, AIM, rng)
            said = principle.asks("critique", full)
            drawn.append(principle)
            reviews.append(constitution.review(item["conversation"], item["revision"], said))
        requests = [principle.revision if full else "" for principle in drawn]
        if cfg.direct:
            critiques = [[]] * len(items), [""] * len(items)
            asked = map(constitution.direct, reviews, requests)
        else:
            desc = f"round {number}: critiques"
            critiques = writer.write("review", reviews, cfg.temperature, desc)
            asked = map(constitution.revision, reviews, critiques[1], requests)
        desc = f"round {number}: revisions"
        revisions = writer.write("review", list(asked), cfg.temperature, desc)
        written = zip(zip(*critiques), zip(*revisions))
        for item, principle, (critique, revision) in zip(items, drawn, written):
            found = outcome(writer, critique, revision, item["revision"], cfg.direct)
            counts[found] += 1
            row = {"round": number, "principle": principle.id, "critique": critique[1]}
            item["rounds"].append(row | {"revision": revision[1], "outcome": found})
            if found == "revised":
                item["revision"] = revision[1]
    return counts


# What is kept of a prompt's row, and what stands where it has none
KEPT = {"setting": None, "kind": None, "category": "", "attack": "", "action": ""}


# What to do where most revisions come to nothing for one of these reasons
LONGER, OTHER = "raise --max-new", "the model may not know the form: give it examples (--fewshot)"
WANTING = {"critique cut off": LONGER, "cut off": LONGER, "no room": "lower --max-new"}
WANTING |= dict.fromkeys(("critique empty", "empty", "not an answer"), OTHER)


def main(cfg: Config) -> dict:
    stage = begin("critique", cfg)
    if stage is None:
        return {"skipped": True}
    # processes draw apart, the first of them as one process would
    seed = cfg.seed + 1000 * distributed.rank()
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(seed)
    every = constitution.load_constitution(cfg.constitution)
    principles = constitution.select(every, cfg.without)
    rows = formats.loop_prompts(cfg.prompts)
    (folder,), tokenizer, (config,) = stage.open(cfg.model)
    sizes = dict(batch=cfg.batch_size, length=config.block_size)
    stage.plan_memory("sample", config, "--batch-size", **sizes)
    formats.warn_unread(rows, tokenizer, cfg.model)
    warn_outside(principles, tokenizer, cfg.model)
    planner = Planner(tokenizer, config.block_size, load_shots(cfg.fewshot, every))
    writer = Writer(stage.load(folder), planner, cfg, generator, stage.journal())
    chosen = data.choose(rows, "harmful", cfg.harmful, rng) * cfg.responses
    chosen += data.choose(rows, "benign", cfg.helpful, rng)
    items = []
    for row in chosen:
        item = {"id": row["id"], "prompt": row["prompt"]}
        item |= {key: row.get(key, default) for key, default in KEPT.items()}
        item["conversation"] = constitution.conversation_of(row)
        items.append(item)
    if distributed.rank():
        rng.seed(seed)
    with stage.precision():
        items, dropped = respond(writer, distributed.share(items))
        outcomes = critique_rounds(writer, items, principles, rng)
    for item in items:
        del item["conversation"]
        item["changed"] = item["revision"] != item["original"]
    items, outcomes, dropped = (distributed.merge(x) for x in (items, outcomes, dropped))
    planner.counts = distributed.merge(planner.counts)
    if not items:
        raise UserError(
            f"{folder}: gave no answer to any of {len(chosen)} prompts ({dict(dropped)}; it reads at "
            f"most {config.block_size} tokens)"
        )
    counts = dict(outcomes=dict(outcomes), dropped=dict(dropped), planner=dict(planner.counts))
    stage.save_rows(items, lambda: counts)
    harmful = [item for item in items if item["kind"] == "harmful"]
    changed = sum(item["changed"] for item in harmful)
    told = f"; answers dropped: {dict(dropped)}" if dropped else ""
    told += f"; {planner.summary()}" if planner.summary() else ""
    stage.say(
        f"{len(items)} answers, {cfg.rounds} rounds; {changed} of {len(harmful)} answers to adversarial "
        f"prompts revised; outcomes {dict(outcomes)}{told}; {stage.seconds():.0f} s on {stage.threads} "
        f"threads -> {cfg.out}"
    )
    for why, count in outcomes.items():
        if why in WANTING and 2 * count > sum(outcomes.values()):
            stage.warn(
                f"most revisions came to nothing, {count} for this reason: {why}; {WANTING[why]}"
            )
    distributed.barrier()  # the next stage reads what the first process wrote
    return {"items": len(items), "harmful": len(harmful), "changed": changed, **outcomes}


if __name__ == "__main__":
    run(main, Config, __doc__)
