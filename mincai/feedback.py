"""Phase 2, first half: the model's own preferences. Sample, pair, judge by a principle, keep the soft label.

    python -m mincai.feedback --model runs/tiny/sft --out runs/tiny/comparisons.jsonl

The SFT model answers each prompt 16 times. Pairs of different answers go to the judge, the
pretrained model, with one principle drawn for each pair: it describes both answers, then chooses, and its log-probs of
"A" and "B" are the label (Bai et al. 2022, section 4.1). Both orders are judged and averaged, because small judges
prefer a slot (Lee et al. 2023, 2309.00267). A judge is any function (conversations, a, b, principles) -> Verdicts.
"""

import itertools
import random
import time
from dataclasses import dataclass

import torch

from mincai import UserError, constitution, data
from mincai.checkpoint import load
from mincai.cli import arg, pick_device, run, set_threads
from mincai.sample import generate_batched, next_logp
from mincai.tokenizer import load_tokenizer


ORDINARY = ("help", "truth")  # what answers without a harm category are judged by: is it helpful, is it true


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again", "batch_size")
    model: str = arg("runs/tiny/sft", "the model whose answers are compared")
    judge: str = arg("data/tiny", "the model that judges; the pretrained one, as in the paper")
    prompts: str = arg("data/tiny/prompts.jsonl", "JSONL of prompts; rows of split 'loop' are used")
    constitution: str = arg(str(constitution.PATH), "the principles")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets")
    aim: float = arg(0.8, "share of draws from principles on the prompt's own category (on help and truth, if none)")
    harmful: int = arg(150, "adversarial prompts, the attack families in turn; 0 for all")
    helpful: int = arg(250, "ordinary prompts; 0 for all")
    samples: int = arg(16, "answers of the model to each prompt")
    temperature: float = arg(2.0, "of these answers; a nearly certain model needs more than 1 to differ from itself")
    top_k: int = arg(5, "each token is one of the k likeliest; keeps hot samples readable, 0 for all")
    base_samples: int = arg(2, "answers of the judge's own model beside them, so that pairs differ; 0 for none")
    pairs: int = arg(6, "pairs of different answers kept of each prompt at most; 0 for all")
    reasons: bool = arg(True, "the judge describes both answers before it chooses")
    clamp: float = arg(0.0, "keep labels within [clamp, 1 - clamp]; the paper's 40-60%% is 0.4")
    max_new: int = arg(104, "tokens of an answer or of the judge's reasons at most")
    out: str = arg("runs/tiny/comparisons.jsonl", "JSONL to write")
    seed: int = arg(0, "seed of the draws and samples")
    batch_size: int = arg(128, "rows sampled together")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "replace an output that exists")


@dataclass(frozen=True)
class Verdicts:
    """One entry a pair. p_a = (p_ab + 1 - p_ba) / 2 where p_ab is P(first slot) with a first, p_ba with b first."""
    p_a: list[float]
    p_ab: list[float]
    p_ba: list[float]
    reasons: list[str]  # written with a first; empty strings without reasons
    same_slot: float    # share of pairs in which the same slot won in both orders: position bias


def judge_once(model, tokenizer, conversations, a, b, principles, *, reasons=True, max_new=80, batch_size=128,
               desc=None) -> tuple[list[float], list[str]]:
    """P(the first slot) with a in the first slot, normalised over the two letters, and the reasons written."""
    heads = [constitution.compare(*row) for row in zip(conversations, a, b, principles)]
    written: list[str | None] = [None] * len(heads)
    if reasons:
        prompts = [tokenizer.encode(constitution.reasons(head)) for head in heads]
        texts = generate_batched(model, prompts, max_new, {tokenizer.eot, tokenizer.newline}, batch_size,
                                 temperature=0.0, desc=desc)
        written = [constitution.clean(tokenizer.decode(ids)) for ids in texts]
    prompts = [tokenizer.encode(constitution.choice(head, text)) for head, text in zip(heads, written)]
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]
    logp = next_logp(model, prompts, letters, batch_size)  # (N, 2)
    return torch.softmax(logp, dim=1)[:, 0].tolist(), [text or "" for text in written]


def judge(model, tokenizer, conversations, a, b, principles, **settings) -> Verdicts:
    """Both orders, averaged: swapping a and b turns p_a into 1 - p_a exactly.

    conversations: as constitution.dialogue gives them; a, b: answers as text; principles: their short texts.
    """
    p_ab, reasons = judge_once(model, tokenizer, conversations, a, b, principles, **settings)
    p_ba, _ = judge_once(model, tokenizer, conversations, b, a, principles, **settings)
    p_a = [(x + (1 - y)) / 2 for x, y in zip(p_ab, p_ba)]
    same = sum((x > 0.5) == (y > 0.5) for x, y in zip(p_ab, p_ba)) / max(1, len(p_ab))
    return Verdicts(p_a, p_ab, p_ba, reasons, same)


def make_pairs(answers: list[tuple[tuple[int, ...], str]], number: int, rng: random.Random):
    """answers: (token ids, source) of one prompt. Up to `number` pairs of different answers, in random order and
    with sides drawn by lot; an answer that was sampled often is drawn often."""
    pairs = [(x, y) for x, y in itertools.combinations(answers, 2) if x[0] != y[0]]
    rng.shuffle(pairs)
    seen, kept = set(), []
    for x, y in pairs:
        if frozenset((x[0], y[0])) not in seen:
            seen.add(frozenset((x[0], y[0])))
            kept.append((x, y) if rng.random() < 0.5 else (y, x))
    return kept[:number or len(kept)]


def main(cfg: Config) -> dict:
    started = time.time()
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    if data.done(cfg.out, cfg, cfg.again):
        print(f"feedback: {cfg.out} is there already, skipped")
        return {}
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed + 1)
    principles = constitution.select(constitution.load_constitution(cfg.constitution), cfg.only, cfg.without)
    rows = [r for r in data.read_jsonl(cfg.prompts, ("id", "prompt", "kind")) if r.get("split", "loop") == "loop"]
    if not rows:
        raise UserError(f"{cfg.prompts}: no row has split 'loop'; the other splits are for evaluation")
    rows = data.choose(rows, "harmful", cfg.harmful, rng) + data.choose(rows, "benign", cfg.helpful, rng)
    tokenizer = load_tokenizer(cfg.judge)
    conversations = [constitution.dialogue(r["prompt"], r.get("setting")) for r in rows]
    prompts = [tokenizer.encode(text) for text in conversations]
    model, judging = load(cfg.model, device), load(cfg.judge, device)
    stop = {tokenizer.eot}
    answers = [[] for _ in rows]
    for source, sampler, n in (("sft", model, cfg.samples), ("base", judging, cfg.base_samples)):
        if n:
            heat = (cfg.temperature, cfg.top_k) if source == "sft" else (1.0, 0)
            found = generate_batched(sampler, prompts, cfg.max_new, stop, cfg.batch_size, *heat, generator=generator,
                                     n=n, desc=f"answers of {source}")
            for i, ids in enumerate(found):
                if ids[-1] == tokenizer.eot and len(ids) > 1:  # an answer that never ends is no candidate
                    answers[i // n].append((tuple(ids), source))
    pairs = [(i, *pair) for i, some in enumerate(answers) for pair in make_pairs(some, cfg.pairs, rng)]
    targets = [(row["category"],) if row.get("category") else ORDINARY for row in rows]
    drawn = [constitution.draw(principles, targets[i], cfg.aim, rng) for i, _, _ in pairs]
    texts = [[constitution.clean(tokenizer.decode(side[0])) for side in pair[1:]] for pair in pairs]
    heads = [constitution.compare(conversations[i], *t, p.tiny) for (i, _, _), t, p in zip(pairs, texts, drawn)]
    needed = [len(tokenizer.encode(constitution.choice(head, ""))) + cfg.max_new for head in heads]
    fits = [k for k, n in enumerate(needed) if n <= judging.config.block_size]  # two rambling answers may be too long
    pairs, drawn, texts = ([some[k] for k in fits] for some in (pairs, drawn, texts))
    if not pairs:
        raise UserError(f"{cfg.model}: no prompt got two different answers that end and that the judge has room for, "
                        f"so there is nothing to compare; raise --samples or --max-new")
    verdicts = judge(judging, tokenizer, [conversations[i] for i, _, _ in pairs], [t[0] for t in texts],
                     [t[1] for t in texts], [p.tiny for p in drawn], reasons=cfg.reasons, max_new=cfg.max_new,
                     batch_size=cfg.batch_size, desc="judging")
    out = []
    for (i, a, b), principle, (text_a, text_b), p, p_ab, p_ba, why in zip(
            pairs, drawn, texts, verdicts.p_a, verdicts.p_ab, verdicts.p_ba, verdicts.reasons):
        row = rows[i]
        out.append({"id": f"pair-{len(out):05d}", "prompt_id": row["id"], "prompt": row["prompt"],
                    "setting": row.get("setting"), "kind": row["kind"], "category": row.get("category", ""),
                    "attack": row.get("attack", ""), "action": row.get("action", ""), "a": text_a, "b": text_b,
                    "a_ids": list(a[0]), "b_ids": list(b[0]), "a_from": a[1], "b_from": b[1],
                    "principle": principle.id, "p_a": min(max(p, cfg.clamp), 1 - cfg.clamp), "p_ab": p_ab,
                    "p_ba": p_ba, "reasons": why})
    contrast = sum(abs(row["p_a"] - 0.5) for row in out) / len(out)
    data.write_jsonl(cfg.out, out)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, same_slot=verdicts.same_slot, contrast=contrast))
    print(f"feedback: {len(out)} comparisons of {len(rows)} prompts, mean |p - 1/2| {contrast:.2f}, same slot in both "
          f"orders {verdicts.same_slot:.1%}; {time.time() - started:.0f} s on {threads} threads -> {cfg.out}")
    return {"pairs": len(out), "contrast": contrast, "same_slot": verdicts.same_slot}


if __name__ == "__main__":
    run(main, Config, __doc__)
