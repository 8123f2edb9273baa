"""Phase 1 of Constitutional AI: respond -> critique -> revise, several rounds, by one model, under drawn principles.

    python -m mincai.critique --out runs/tiny/revisions.jsonl

The base model answers adversarial and ordinary prompts, several times each, at temperature 1. In every round a
principle is drawn, the model writes a critique of the answer that stands and then a revision; a round starts from a
fresh conversation, so context does not pile up (Bai et al. 2022, 2212.08073, section 3.1). A revision may say that the
answer stands. Nothing here judges but the model. Every original, critique and revision is kept in the output.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass

import torch

from mincai import UserError, constitution, data
from mincai.checkpoint import load
from mincai.cli import arg, pick_device, run, set_threads
from mincai.sample import generate_batched
from mincai.tokenizer import load_tokenizer


ORDINARY = ("help", "reasons")  # what an answer without a harm category is aimed at: it should help, and say why


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again", "batch_size")
    model: str = arg("data/tiny", "the model that answers, criticises and revises")
    prompts: str = arg("data/tiny/prompts.jsonl", "JSONL of prompts; rows of split 'loop' are used")
    constitution: str = arg(str(constitution.PATH), "the principles")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets")
    aim: float = arg(0.6, "share of draws from principles on the prompt's own category (on help and reasons, if none)")
    harmful: int = arg(320, "adversarial prompts, the attack families in turn; 0 for all")
    helpful: int = arg(320, "ordinary prompts; 0 for all")
    responses: int = arg(2, "answers sampled to each adversarial prompt, at temperature 1")
    rounds: int = arg(4, "critiques and revisions of each answer, each under its own principle")
    temperature: float = arg(0.0, "of critiques and revisions, 0 is greedy; copying suffers at 1")
    max_new: int = arg(104, "tokens of a critique or an answer at most")
    out: str = arg("runs/tiny/revisions.jsonl", "JSONL to write")
    seed: int = arg(0, "seed of the draws and samples")
    batch_size: int = arg(128, "rows sampled together")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "replace an output that exists")


def rejected(revision: str, original: str) -> str:
    """Why a revision cannot stand ("" if it can): a matter of form alone."""
    if not revision:
        return "empty"
    if revision == original:
        return "same as the answer"
    if revision.startswith(("the principle is", "Critique", "Review", "Human")):
        return "not an answer"
    return ""


def critique_rounds(model, tokenizer, items, principles, cfg, rng, generator) -> Counter:
    """Adds to each item (a dict with conversation, original, category) its `rounds` and its final `revision`."""
    counts = Counter()

    def write(texts, desc):
        prompts = [tokenizer.encode(text) for text in texts]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) + cfg.max_new <= model.config.block_size]
        found = generate_batched(model, [prompts[i] for i in fits], cfg.max_new, {tokenizer.eot, tokenizer.newline},
                                 cfg.batch_size, cfg.temperature, generator=generator, desc=desc)
        found = dict(zip(fits, found))
        return [found.get(i, []) for i in range(len(texts))]  # one rambling answer must not end the whole job

    for item in items:
        item["revision"], item["rounds"] = item["original"], []
    for number in range(cfg.rounds):
        drawn = [constitution.draw(principles, (item["category"],) if item["category"] else ORDINARY, cfg.aim, rng)
                 for item in items]
        reviews = [constitution.review(item["conversation"], item["revision"], p.tiny) for item, p in zip(items, drawn)]
        critiques = write(reviews, f"round {number + 1}: critiques")
        texts = [constitution.clean(tokenizer.decode(c)) for c in critiques]
        revisions = write([constitution.revision(r, t) for r, t in zip(reviews, texts)],
                          f"round {number + 1}: revisions")
        for item, principle, text, ids in zip(items, drawn, texts, revisions):
            revision = constitution.clean(tokenizer.decode(ids))
            whole = bool(ids) and ids[-1] in (tokenizer.eot, tokenizer.newline)
            why = "keep" if revision == constitution.KEEP else rejected(revision, item["revision"])
            if not whole:
                why = "cut off" if ids else "no room"
            counts[why or "revised"] += 1
            item["rounds"].append({"round": number + 1, "principle": principle.id, "critique": text,
                                   "revision": revision, "outcome": why or "revised"})
            if not why:
                item["revision"] = revision
    return counts


def main(cfg: Config) -> dict:
    started = time.time()
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    if data.done(cfg.out, cfg, cfg.again):
        print(f"critique: {cfg.out} is there already, skipped")
        return {}
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    principles = constitution.select(constitution.load_constitution(cfg.constitution), cfg.only, cfg.without)
    rows = [r for r in data.read_jsonl(cfg.prompts, ("id", "prompt", "kind")) if r.get("split", "loop") == "loop"]
    if not rows:
        raise UserError(f"{cfg.prompts}: no row has split 'loop'; the other splits are for evaluation")
    model, tokenizer = load(cfg.model, device), load_tokenizer(cfg.model)
    chosen = data.choose(rows, "harmful", cfg.harmful, rng) * cfg.responses
    chosen += data.choose(rows, "benign", cfg.helpful, rng)
    items = [{"id": r["id"], "prompt": r["prompt"], "setting": r.get("setting"), "kind": r["kind"],
              "category": r.get("category", ""), "attack": r.get("attack", ""), "action": r.get("action", ""),
              "conversation": constitution.dialogue(r["prompt"], r.get("setting"))} for r in chosen]
    prompts = [tokenizer.encode(item["conversation"]) for item in items]
    stop = {tokenizer.eot, tokenizer.newline}
    answers = generate_batched(model, prompts, cfg.max_new, stop, cfg.batch_size, generator=generator, desc="answers")
    for item, ids in zip(items, answers):
        item["original"] = constitution.clean(tokenizer.decode(ids))
    counts = critique_rounds(model, tokenizer, items, principles, cfg, rng, generator)
    for item in items:
        del item["conversation"]
        item["changed"] = item["revision"] != item["original"]
    data.write_jsonl(cfg.out, items)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, outcomes=dict(counts)))
    harmful = [item for item in items if item["kind"] == "harmful"]
    changed = sum(item["changed"] for item in harmful)
    print(f"critique: {len(items)} answers, {cfg.rounds} rounds; {changed} of {len(harmful)} answers to adversarial "
          f"prompts revised; outcomes {dict(counts)}; {time.time() - started:.0f} s on {threads} threads -> {cfg.out}")
    return {"items": len(items), "harmful": len(harmful), "changed": changed, **counts}


if __name__ == "__main__":
    run(main, Config, __doc__)
