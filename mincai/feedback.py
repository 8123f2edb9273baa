"""Phase 2, first half: the model's own preferences. Sample, pair, judge by a principle, keep the soft label.

    python -m mincai.feedback --model runs/tiny/sft --out runs/tiny/comparisons.jsonl

The SFT model answers each prompt 16 times at temperature 1, and the judge's own model once: it says what the tuned one
hardly says any more, and pairs with it are decided more often. Pairs of different answers go to the judge, the
pretrained model, with one principle drawn for each pair: it describes both, then chooses, and its log-probs of "A" and
"B" are the label (Bai et al. 2022, section 4.1). Both orders are judged and averaged, because small judges prefer a
slot (Lee et al. 2023, 2309.00267). With --ensemble n, n principles are drawn for each pair and their labels
averaged, which the paper found steadier. A judge is any function (conversations, a, b, principles) -> Verdicts.
"""

import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch

from mincai import UserError, constitution
from mincai.plumbing import data, distributed, formats, memory, output
from mincai.plumbing.checkpoint import load, read_config
from mincai.plumbing.cli import arg, check_choice, number_bytes, pick_device, precision, run, set_threads
from mincai.plumbing.logprobs import next_logp
from mincai.plumbing.planner import Planner, load_shots
from mincai.sample import generate_batched
from mincai.plumbing.weights import common_tokenizer, resolve


PROMPTS = 512  # worked on together by each process: the memory that is needed is theirs, however many there are
# What answers are judged by: those to an ordinary request, and beside their own category those to a harmful one
ORDINARY, HARMFUL = ("help", "truth"), ("harm", "reasons")


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again", "batch_size")
    model: str = arg("runs/tiny/sft", "the model whose answers are compared")
    judge: str = arg("data/tiny", "the model that judges, a folder or gpt2 and its sizes; pretrained, as in the paper")
    prompts: str = arg("data/tiny/prompts.jsonl", "prompts: JSONL (rows of split 'loop'), text, or HH-RLHF's format")
    constitution: str = arg(str(constitution.PATH), "the principles")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets")
    aim: float = arg(0.8, "share of draws from principles on the prompt's own category (on help and truth, if none)")
    harmful: int = arg(320, "adversarial prompts, the attack families in turn; 0 for all")
    helpful: int = arg(320, "ordinary prompts; 0 for all")
    samples: int = arg(16, "answers of the model to each prompt")
    base_samples: int = arg(1, "answers of the judge's own model beside them: what the tuned one hardly says; 0: none")
    temperature: float = arg(1.0, "of the samples")
    top_k: int = arg(0, "each of their tokens is one of the k likeliest; 0 for all")
    pairs: int = arg(6, "pairs of different answers kept of each prompt at most; 0 for all")
    ensemble: int = arg(1, "principles drawn for each pair, their labels averaged; 16 in the paper")
    reasons: bool = arg(True, "the judge describes both answers before it chooses")
    labels: str = arg("soft", "soft: the judge's probability; hard: 0 or 1; clamped: kept within [clamp, 1 - clamp]")
    clamp: float = arg(0.4, "with clamped labels; 0.4 is the paper's 40-60%")
    fewshot: str = arg("", "file of worked examples to put in front of what the judge reads; none is zero-shot")
    wording: str = arg("tiny", "principles in their tiny or their full words")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    max_new: int = arg(104, "tokens of an answer or of the judge's reasons at most")
    out: str = arg("runs/tiny/comparisons.jsonl", "JSONL to write")
    seed: int = arg(0, "seed of the draws and samples")
    batch_size: int = arg(64, "rows sampled together")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


@dataclass(frozen=True)
class Verdicts:
    """One entry a pair. p_a = (p_ab + 1 - p_ba) / 2 where p_ab is P(first slot) with a first, p_ba with b first.
    A pair that left the judge no room has p_a None."""
    p_a: list[float | None]
    p_ab: list[float | None]
    p_ba: list[float | None]
    reasons: list[str]  # written with a first; empty strings without reasons
    same_slot: float    # share of pairs in which the same slot won in both orders: position bias


def judge_once(model, planner, conversations, a, b, principles, *, reasons=True, max_new=80, batch_size=128,
               desc=None) -> tuple[list[float | None], list[str]]:
    """P(the first slot) with a in the first slot, normalised over the two letters, and the reasons written."""
    tokenizer = planner.tokenizer
    heads = [constitution.compare(*row) for row in zip(conversations, a, b, principles)]
    asks, room = (constitution.reasons, max_new + 8) if reasons else (constitution.choice, 1)  # + 8: CHOICE follows
    prompts = [planner.prompt("compare", asks(head), room) for head in heads]
    prompts = [prompt and data.compact(prompt) for prompt in prompts]
    fits = [i for i, prompt in enumerate(prompts) if prompt is not None]
    prompts, written = [prompts[i] for i in fits], [""] * len(heads)
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]
    if reasons:  # the letter is read off the cache that the reasons were written with
        texts, logp = generate_batched(model, prompts, max_new, {tokenizer.eot, tokenizer.newline}, batch_size,
                                       temperature=0.0, desc=desc, then=tokenizer.encode(constitution.CHOICE),
                                       of=letters)
        for i, ids in zip(fits, texts):
            written[i] = constitution.clean(tokenizer.decode(ids))
    else:
        logp = next_logp(model, prompts, letters, batch_size)  # (N, 2), like the other
    p = dict(zip(fits, torch.softmax(logp, dim=1)[:, 0].tolist()))
    return [p.get(i) for i in range(len(heads))], written


def judge(model, planner, conversations, a, b, principles, **settings) -> Verdicts:
    """Both orders, averaged: swapping a and b turns p_a into 1 - p_a exactly.

    planner: makes the prompts, with or without examples; conversations: as constitution.dialogue gives them; a, b:
    answers as text; principles: what they ask, as text.
    """
    p_ab, reasons = judge_once(model, planner, conversations, a, b, principles, **settings)
    p_ba, _ = judge_once(model, planner, conversations, b, a, principles, **settings)
    p_a = [None if None in (x, y) else (x + (1 - y)) / 2 for x, y in zip(p_ab, p_ba)]
    both = [(x, y) for x, y in zip(p_ab, p_ba) if None not in (x, y)]
    same = sum((x > 0.5) == (y > 0.5) for x, y in both) / max(1, len(both))
    return Verdicts(p_a, p_ab, p_ba, reasons, same)


def label(p: float, labels: str, clamp: float) -> float:
    """The judge's probability as the label that is kept: soft as it is, hard 0 or 1 (an even one stays even), or
    clamped to [clamp, 1 - clamp]."""
    if labels == "hard":
        return p if p == 0.5 else float(p > 0.5)
    return min(max(p, clamp), 1 - clamp) if labels == "clamped" else p


LEFT_OUT = ("answers cut off or empty", "prompts too long")


def left_out(planner) -> str:
    """One clause on what was left out; empty where there is nothing to say."""
    return ", ".join(f"{planner.counts[why]} {why}" for why in LEFT_OUT if planner.counts[why])


def make_pairs(answers: list[tuple[int, ...]], number: int, rng: random.Random) -> list[tuple]:
    """answers: the token ids of one prompt's answers. Up to `number` pairs of different answers, in random order and
    with sides drawn by lot; an answer that was sampled often is drawn often."""
    pairs = [(x, y) for x, y in itertools.combinations(answers, 2) if x != y]
    rng.shuffle(pairs)
    seen, kept = set(), []
    for x, y in pairs:
        if frozenset((x, y)) not in seen:
            seen.add(frozenset((x, y)))
            kept.append((x, y) if rng.random() < 0.5 else (y, x))
    return kept[:number or len(kept)]


def candidates(cfg, rows, model, judging, planner, generator) -> list[list[tuple[int, ...]]]:
    """The token ids of every whole answer to each row: the model's samples, and the judge's own model's. An answer that
    never ends is none."""
    tokenizer, answers = planner.tokenizer, [[] for _ in rows]
    conversations = [constitution.dialogue(r["prompt"], r.get("setting")) for r in rows]
    for sampler, n, shown in ((model, cfg.samples, False), (judging, cfg.base_samples, bool(planner.shots))):
        prompts = [planner.prompt("answer", text, cfg.max_new) if shown else tokenizer.encode(text)
                   for text in conversations]
        room = sampler.config.block_size - cfg.max_new
        fits = [i for i, prompt in enumerate(prompts) if prompt is not None and len(prompt) <= room]
        planner.counts["prompts too long"] += len(prompts) - len(fits) if sampler is model else 0
        stop = {tokenizer.eot, tokenizer.newline} if shown else {tokenizer.eot}
        found = generate_batched(sampler, [prompts[i] for i in fits], cfg.max_new, stop, cfg.batch_size,
                                 cfg.temperature, cfg.top_k, generator=generator, n=n,
                                 desc="answers") if n and fits else []
        for number, ids in enumerate(found):
            if ids[-1] in stop and len(ids) > 1:
                answers[fits[number // n]].append((*ids[:-1], tokenizer.eot))
            else:
                planner.counts["answers cut off or empty"] += 1
    return answers


def compare_rows(cfg, rows, principles, model, judging, planner, rng, generator) -> tuple[list[dict], float]:
    """The rows of the output for these prompts, and the share of pairs won by the same slot in both orders."""
    tokenizer = planner.tokenizer
    answers = candidates(cfg, rows, model, judging, planner, generator)
    pairs = [(i, *pair) for i, some in enumerate(answers) for pair in make_pairs(some, cfg.pairs, rng)]
    targets = [(row["category"], *HARMFUL) if row.get("category") else ORDINARY for row in rows]
    drawn = []
    for number in range(cfg.ensemble):
        drawn.append([constitution.draw(principles, targets[i], cfg.aim, rng) for i, _, _ in pairs])
        for k, (i, _, _) in enumerate(pairs):  # a principle votes once on a pair; rarely there are too few of them
            for _ in range(20 if number else 0):
                if all(drawn[number][k].id != some[k].id for some in drawn[:number]):
                    break
                drawn[number][k] = constitution.draw(principles, targets[i], cfg.aim / 2, rng)
    conversations = [constitution.dialogue(rows[i]["prompt"], rows[i].get("setting")) for i, _, _ in pairs]
    texts = [[constitution.clean(tokenizer.decode(side)) for side in pair[1:]] for pair in pairs]
    votes = [judge(judging, planner, conversations, [t[0] for t in texts], [t[1] for t in texts],
                   [p.asks("compare", cfg.wording) for p in some], reasons=cfg.reasons, max_new=cfg.max_new,
                   batch_size=cfg.batch_size, desc="judging") for some in drawn] if pairs else []
    out = []
    for k, ((i, a, b), (text_a, text_b)) in enumerate(zip(pairs, texts)):
        voted = [(some[k].id, vote) for some, vote in zip(drawn, votes) if vote.p_a[k] is not None]
        if not voted:
            continue  # two rambling answers may be too long for the judge; the planner has counted them
        row, p, (principle, first) = rows[i], [vote.p_a[k] for _, vote in voted], voted[0]
        out.append({"prompt_id": row["id"], "prompt": row["prompt"], "setting": row.get("setting"),
                    "kind": row["kind"], "category": row.get("category", ""), "attack": row.get("attack", ""),
                    "action": row.get("action", ""), "a": text_a, "b": text_b, "a_ids": list(a),
                    "b_ids": list(b), "principle": principle,
                    "p_a": label(sum(p) / len(p), cfg.labels, cfg.clamp), "p_ab": first.p_ab[k],
                    "p_ba": first.p_ba[k], "reasons": first.reasons[k]})
        if cfg.ensemble > 1:
            out[-1]["votes"] = {name: vote.p_a[k] for name, vote in voted}
    return out, sum(vote.same_slot for vote in votes) / max(1, len(votes))


def comparisons(cfg, rows, principles, model, judging, planner, rng, generator, totals):
    """The rows of the output one by one, of PROMPTS prompts after another; totals gets their sums.

    All processes have to go through it together: each does its share of the prompts, all get all rows. UserError at
    its end if there was no row, so that none of them writes an empty file.
    """
    size = PROMPTS * distributed.world()
    for first in range(0, len(rows), size):
        mine = distributed.share(rows[first:first + size])
        some, same_slot = compare_rows(cfg, mine, principles, model, judging, planner, rng, generator)
        totals["same_slot"] += distributed.total(same_slot * len(some))
        for row in distributed.merge(some):
            yield {"id": f"pair-{totals['pairs']:05d}", **row}
            totals["pairs"] += 1
            totals["contrast"] += abs(row["p_a"] - 0.5)
    planner.counts = distributed.merge(planner.counts)
    if not totals["pairs"]:
        raise UserError(f"{cfg.model}: no prompt got two different answers that end and that the judge has room for, "
                        f"so there is nothing to compare (models read at most {judging.config.block_size} tokens; "
                        f"left out: {left_out(planner) or 'none'}); raise --samples, or change --max-new")


def main(cfg: Config) -> dict:
    started = time.time()
    check_choice("labels", cfg.labels, ("soft", "hard", "clamped"))
    check_choice("wording", cfg.wording, constitution.WORDINGS)
    if not 0 <= cfg.clamp < 0.5 or cfg.ensemble < 1:
        raise UserError(f"--clamp {cfg.clamp}, --ensemble {cfg.ensemble}: give a clamp from 0 up to 0.5, and at least "
                        f"one principle")
    threads, device = set_threads(cfg.threads), distributed.start(pick_device(cfg.device))
    if data.done(cfg.out, cfg, cfg.again):
        print(f"feedback: {cfg.out} is there already, skipped")
        return {}
    cfg.check_out()
    seed = cfg.seed + 1000 * distributed.rank()
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(seed + 1)
    every = constitution.load_constitution(cfg.constitution)
    principles = constitution.select(every, cfg.only, cfg.without)
    rows = formats.loop_prompts(cfg.prompts)
    rows = data.choose(rows, "harmful", cfg.harmful, rng) + data.choose(rows, "benign", cfg.helpful, rng)
    judge_folder = resolve(cfg.judge)
    config = read_config(judge_folder)
    memory.announce("sample", config, device, "--batch-size or --max-new", batch=cfg.batch_size,
                    length=config.block_size, dtype_bytes=number_bytes(cfg.dtype), cache_bytes=number_bytes(cfg.dtype),
                    models=2, reads_on=cfg.reasons)
    model_folder = resolve(cfg.model)
    tokenizer = common_tokenizer(judge_folder, model_folder)
    formats.warn_unread(rows, tokenizer, cfg.model)
    model, judging = load(model_folder, device), load(judge_folder, device)
    planner = Planner(tokenizer, judging.config.block_size, load_shots(cfg.fewshot, every, cfg.wording, cfg.reasons))
    if distributed.rank():
        rng.seed(seed)
    totals = Counter()
    with precision(device, cfg.dtype):
        found = comparisons(cfg, rows, principles, model, judging, planner, rng, generator, totals)
        if distributed.is_main():
            data.write_jsonl(cfg.out, found)
        else:
            for _ in found:
                pass
    same_slot, contrast = (totals[name] / totals["pairs"] for name in ("same_slot", "contrast"))
    if distributed.is_main():
        data.write_json(data.sidecar(cfg.out), data.stamp(cfg, same_slot=same_slot, contrast=contrast,
                                                          planner=dict(planner.counts)))
        told = "".join(f"; {some}" for some in (planner.summary(), left_out(planner)) if some)
        print(f"feedback: {totals['pairs']} comparisons of {len(rows)} prompts, mean |p - 1/2| {contrast:.2f}, "
              f"same slot in both orders {same_slot:.1%}{told}; {time.time() - started:.0f} s on {threads} threads -> "
              f"{cfg.out}")
    distributed.barrier()
    return {"pairs": totals["pairs"], "contrast": contrast, "same_slot": same_slot}


if __name__ == "__main__":
    run(main, Config, __doc__)
