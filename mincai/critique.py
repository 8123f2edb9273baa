"""Phase 1 of Constitutional AI: respond -> critique -> revise, several rounds, by one model, under drawn principles.

    python -m mincai.critique --out runs/tiny/revisions.jsonl

The base model answers adversarial and ordinary prompts, several times each, at temperature 1. In every round a
principle is drawn, the model writes a critique of the answer that stands and then a revision; a round starts from a
fresh conversation, so context does not pile up (Bai et al. 2022, 2212.08073, section 3.1). A revision may say that the
answer stands. Nothing here judges but the model. Every original, critique and revision is kept in the output.
"""

import random
import re
import time
from collections import Counter
from dataclasses import dataclass

import torch

from mincai import UserError, constitution
from mincai.plumbing import data, distributed, formats, memory, output
from mincai.plumbing.checkpoint import load, read_config
from mincai.plumbing.cli import arg, check_choice, number_bytes, pick_device, precision, run, set_threads
from mincai.plumbing.planner import Planner, load_shots
from mincai.sample import generate_batched
from mincai.plumbing.weights import common_tokenizer, resolve


ORDINARY = ("help", "reasons")  # what an answer without a harm category is aimed at: it should help, and say why


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again", "batch_size")
    model: str = arg("data/tiny", "the model that answers, criticises and revises: a folder, or gpt2 and its sizes")
    prompts: str = arg("data/tiny/prompts.jsonl", "prompts: JSONL (rows of split 'loop'), text, or HH-RLHF's format")
    constitution: str = arg(str(constitution.PATH), "the principles")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets")
    aim: float = arg(0.6, "share of draws from principles on the prompt's own category (on help and reasons, if none)")
    harmful: int = arg(640, "adversarial prompts, the attack families in turn; 0 for all")
    helpful: int = arg(480, "ordinary prompts; 0 for all")
    responses: int = arg(1, "answers sampled to each adversarial prompt, at temperature 1")
    fewshot: str = arg("", "file of worked examples to put in front of every prompt, e.g. data/english/fewshot.json")
    wording: str = arg("tiny", "principles in their tiny or their full words")
    rounds: int = arg(4, "critiques and revisions of each answer, each under its own principle")
    direct: bool = arg(False, "revise without a critique first; to compare with, as the paper's figure 7 does")
    temperature: float = arg(0.0, "of critiques and revisions, 0 is greedy; copying suffers at 1")
    max_new: int = arg(104, "tokens of a critique or an answer at most")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    out: str = arg("runs/tiny/revisions.jsonl", "JSONL to write")
    seed: int = arg(0, "seed of the draws and samples")
    batch_size: int = arg(128, "rows sampled together")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


# What opens a part of the prompts, or closes a critique; no answer does
NOT_ANSWERS = re.compile(r"the principle is|\([ab]\)"
                         r"|(critique|revision|review|human|assistant|request|principle|choice) *:"
                         r"|.*\b(breaks|keeps|break|keep) (this|the) principle\b", re.IGNORECASE | re.DOTALL)


def words(text: str) -> list[str]:
    """A text's words alone, for comparing: neither case nor punctuation makes two texts different."""
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


def write(model, planner, kind, texts, stop, cfg, generator, desc, temperature=None) -> list[list[int]]:
    """What the model writes after each text; nothing where the text leaves no room: one must not end the whole job."""
    prompts = [planner.prompt(kind, text, cfg.max_new) for text in texts]
    fits = [i for i, prompt in enumerate(prompts) if prompt is not None]
    if not fits:
        return [[] for _ in texts]
    found = generate_batched(model, [prompts[i] for i in fits], cfg.max_new, stop, cfg.batch_size,
                             cfg.temperature if temperature is None else temperature, generator=generator, desc=desc)
    found = dict(zip(fits, found))
    return [found.get(i, []) for i in range(len(texts))]


def critique_rounds(model, planner, items, principles, cfg, rng, generator, direct=False) -> Counter:
    """Adds to each item (a dict with conversation, original, category) its `rounds` and its final `revision`.

    direct: no critique goes before a revision; the rounds' critiques are then empty texts.
    """
    counts, tokenizer = Counter(), planner.tokenizer
    stop = {tokenizer.eot, tokenizer.newline}
    for item in items:
        item["revision"], item["rounds"] = item["original"], []
    for number in range(cfg.rounds):
        drawn = [constitution.draw(principles, (item["category"],) if item["category"] else ORDINARY, cfg.aim, rng)
                 for item in items]
        reviews = [constitution.review(item["conversation"], item["revision"], p.asks("critique", cfg.wording))
                   for item, p in zip(items, drawn)]
        critiques = [[]] * len(items) if direct else write(model, planner, "review", reviews, stop, cfg, generator,
                                                           f"round {number + 1}: critiques")
        texts = [constitution.clean(tokenizer.decode(c)) for c in critiques]
        requests = [p.revision if cfg.wording == "full" else "" for p in drawn]
        asked = (list(map(constitution.direct, reviews, requests)) if direct else
                 list(map(constitution.revision, reviews, texts, requests)))
        revisions = write(model, planner, "review", asked, stop, cfg, generator, f"round {number + 1}: revisions")
        for item, principle, text, said, ids in zip(items, drawn, texts, critiques, revisions):
            revision = constitution.clean(tokenizer.decode(ids))
            why = rejected(revision, item["revision"], text)
            if not ids or not said and not direct:
                why = "no room"
            elif not direct and (not text or said[-1] not in stop):  # from half a critique nothing follows
                why = "critique cut off" if text else "critique empty"
            elif ids[-1] not in stop:
                why = "cut off"
            counts[why or "revised"] += 1
            item["rounds"].append({"round": number + 1, "principle": principle.id, "critique": text,
                                   "revision": revision, "outcome": why or "revised"})
            if not why:
                item["revision"] = revision
    return counts


def respond(model, planner, items, cfg, generator) -> tuple[list[dict], Counter]:
    """Gives each item its `original`, sampled at temperature 1; items without an answer are left out, and counted."""
    tokenizer = planner.tokenizer
    stop = {tokenizer.eot, tokenizer.newline}
    answers = write(model, planner, "answer", [item["conversation"] for item in items], stop, cfg, generator,
                    "answers", temperature=1.0)
    kept, dropped = [], Counter()
    for item, ids in zip(items, answers):
        item["original"] = constitution.clean(tokenizer.decode(ids))
        why = "no room" if not ids else "" if item["original"] else "empty"
        dropped[why] += bool(why)
        kept += [] if why else [item]
    return kept, +dropped


def main(cfg: Config) -> dict:
    started = time.time()
    check_choice("wording", cfg.wording, constitution.WORDINGS)
    threads, device = set_threads(cfg.threads), distributed.start(pick_device(cfg.device))
    if data.done(cfg.out, cfg, cfg.again):
        print(f"critique: {cfg.out} is there already, skipped")
        return {}
    cfg.check_out()
    seed = cfg.seed + 1000 * distributed.rank()  # ranks draw apart, the first of them as one process would
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(seed)
    every = constitution.load_constitution(cfg.constitution)
    principles = constitution.select(every, cfg.only, cfg.without)
    rows = formats.loop_prompts(cfg.prompts)
    folder = resolve(cfg.model)
    config = read_config(folder)
    memory.announce("sample", config, device, "--batch-size or --max-new", batch=cfg.batch_size,
                    length=config.block_size, dtype_bytes=number_bytes(cfg.dtype), cache_bytes=number_bytes(cfg.dtype))
    tokenizer, model = common_tokenizer(folder), load(folder, device)
    formats.warn_unread(rows, tokenizer, cfg.model)
    planner = Planner(tokenizer, model.config.block_size, load_shots(cfg.fewshot, every, cfg.wording))
    chosen = data.choose(rows, "harmful", cfg.harmful, rng) * cfg.responses
    chosen += data.choose(rows, "benign", cfg.helpful, rng)
    items = [{"id": r["id"], "prompt": r["prompt"], "setting": r.get("setting"), "kind": r["kind"],
              "category": r.get("category", ""), "attack": r.get("attack", ""), "action": r.get("action", ""),
              "conversation": constitution.dialogue(r["prompt"], r.get("setting"))} for r in chosen]
    if distributed.rank():
        rng.seed(seed)
    with precision(device, cfg.dtype):
        items, dropped = respond(model, planner, distributed.share(items), cfg, generator)
        outcomes = critique_rounds(model, planner, items, principles, cfg, rng, generator, cfg.direct)
    for item in items:
        del item["conversation"]
        item["changed"] = item["revision"] != item["original"]
    items, outcomes, dropped = (distributed.merge(x) for x in (items, outcomes, dropped))
    planner.counts = distributed.merge(planner.counts)
    harmful = [item for item in items if item["kind"] == "harmful"]
    changed = sum(item["changed"] for item in harmful)
    if not items:
        raise UserError(f"{folder}: gave no answer to any of {len(chosen)} prompts ({dict(dropped)}; it reads at "
                        f"most {config.block_size} tokens)")
    if distributed.is_main():
        data.write_jsonl(cfg.out, items)
        data.write_json(data.sidecar(cfg.out), data.stamp(cfg, outcomes=dict(outcomes), dropped=dict(dropped),
                                                          planner=dict(planner.counts)))
        told = "".join(f"; {clause}" for clause in (f"answers dropped: {dict(dropped)}" if dropped else "",
                                                    planner.summary()) if clause)
        print(f"critique: {len(items)} answers, {cfg.rounds} rounds; {changed} of {len(harmful)} answers to "
              f"adversarial prompts revised; outcomes {dict(outcomes)}{told}; {time.time() - started:.0f} s on "
              f"{threads} threads -> {cfg.out}")
    distributed.barrier()  # the next stage reads what the first rank wrote
    return {"items": len(items), "harmful": len(harmful), "changed": changed, **outcomes}


if __name__ == "__main__":
    run(main, Config, __doc__)
