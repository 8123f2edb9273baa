"""Phase 2, first half: the model's own preferences. Sample, pair, judge by a principle, keep the
soft label.

    python -m mincai.feedback --model runs/tiny/sft --out runs/tiny/comparisons.jsonl

The SFT model answers each prompt 16 times at temperature 1, and the judge's own model once: it says
what the tuned one hardly says any more, and pairs with it are decided more often. Pairs of
different answers go to the judge, the pretrained model, with one principle drawn for each pair: it
describes both, then chooses, and its log-probs of "A" and "B" are the label (Bai et al. 2022,
section 4.1). Both orders are judged and averaged, because small judges prefer a slot (Lee et al.
2023, 2309.00267). With --ensemble n, n principles are drawn for each pair and their labels
averaged, which the paper found steadier. Another judge is another `judge`.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import torch

from mincai import Diverged, UserError, constitution, shipped
from mincai.plumbing import data, distributed, formats, output
from mincai.plumbing.cli import arg, run
from mincai.plumbing.logprobs import next_logp
from mincai.plumbing.planner import Planner, load_shots, warn_outside
from mincai.plumbing.stage import Settings, begin
from mincai.sample import generate_batched, generate_then

PROMPTS = 512  # worked on together by each process: the memory that is needed is theirs
# What answers are judged by: those to an ordinary request, and beside their own category those to a
# harmful one
ORDINARY, HARMFUL = ("help",), ("harm", "reasons")
AIM = 0.8  # share of draws from principles on these
CLAMP = 0.4  # labels within 40 and 60%, as in the paper, section 4.3


@dataclass(frozen=True)
class Config(Settings):
    LOOSE = (*Settings.LOOSE, "batch_size")
    model: str = arg("runs/tiny/sft", "the model whose answers are compared")
    judge: str = arg(
        shipped("tiny"), "the model that judges: pretrained, a folder, or gpt2 and its sizes"
    )
    prompts: str = arg(
        shipped("tiny/prompts.jsonl"), "JSONL (rows of split 'loop'), text, or HH-RLHF's"
    )
    constitution: str = arg(str(constitution.PATH), "the principles")
    without: str = arg("", "leave out these principle ids or targets, commas between")
    fewshot: str = arg("", "file of worked examples to show; principles then stand in full words")
    harmful: int = arg(480, "adversarial prompts, the families in turn; 0 for all", least=0)
    helpful: int = arg(480, "ordinary prompts; 0 for all", least=0)
    samples: int = arg(16, "answers of the model to each prompt, at temperature 1", least=1)
    base_samples: int = arg(1, "answers of the judge's own model beside them; 0: none", least=0)
    pairs: int = arg(
        6, "pairs of different answers kept of each prompt at most; 0 for all", least=0
    )
    ensemble: int = arg(1, "principles a pair, their labels averaged; 16 in the paper", least=1)
    reasons: bool = arg(True, "the judge describes both answers before it chooses")
    labels: str = arg("soft", "the judge's probability", choices=("soft", "hard", "clamped"))
    max_new: int = arg(104, "tokens of an answer or of the judge's reasons at most", least=1)
    batch_size: int = arg(64, "rows sampled together", least=1)
    out: str = arg("runs/tiny/comparisons.jsonl", "JSONL to write")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


@dataclass(frozen=True)
class Verdicts:
    """One entry a pair. p_a = (p_ab + 1 - p_ba) / 2 where p_ab is P(first slot) with a first, p_ba
    with b first. A pair that left the judge no room has p_a None."""

    p_a: list[float | None]
    p_ab: list[float | None]
    p_ba: list[float | None]
    reasons: list[str]  # written with a first; empty strings without reasons
    same_slot: float  # share of pairs in which the same slot won in both orders: position bias


def judge_once(
    model, planner, heads, *, reasons=True, max_new=80, batch_size=128, desc=None, journal=None
) -> tuple[list[float | None], list[str]]:
    """P(the first slot), normalised over the two letters, and the reasons written.

    heads: pairs with their principles, as constitution.compare gives them.
    """
    tokenizer = planner.tokenizer
    if reasons:  # the letter is read off the cache that the reasons were written with
        then = tokenizer.encode(constitution.CHOICE)
        room = max_new + len(then)
        prompts = [planner.prompt("compare", constitution.reasons(head), room) for head in heads]
    else:
        prompts = [planner.prompt("compare", constitution.choice(head), 1) for head in heads]
    fits = [i for i, prompt in enumerate(prompts) if prompt is not None]
    prompts, written = [data.compact(prompts[i]) for i in fits], [""] * len(heads)
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]
    if reasons:
        stop, how = tokenizer.line_ends, dict(desc=desc, journal=journal)
        texts, logp = generate_then(model, prompts, max_new, stop, batch_size, then, letters, **how)
        for i, ids in zip(fits, texts):
            written[i] = constitution.clean(tokenizer.decode(ids))
    else:
        logp = next_logp(model, prompts, letters, batch_size, journal)  # (N, 2), like the other
    if not torch.isfinite(logp).all():
        raise Diverged(
            "the judge's log-probs of (A) and (B) are no finite numbers; look at --judge"
        )
    p = dict(zip(fits, torch.softmax(logp, dim=1)[:, 0].tolist()))
    return [p.get(i) for i in range(len(heads))], written


def judge(model, planner, conversations, a, b, principles, **settings) -> Verdicts:
    """Both orders, averaged: swapping a and b turns p_a into 1 - p_a exactly.

    planner: makes the prompts, with or without examples; conversations: as constitution.dialogue
    gives them; a, b: answers as text; principles: what they ask, as text. settings: those of
    judge_once.
    """
    a_first = list(map(constitution.compare, conversations, a, b, principles))
    b_first = list(map(constitution.compare, conversations, b, a, principles))
    p_ab, reasons = judge_once(model, planner, a_first, **settings)
    p_ba, _ = judge_once(model, planner, b_first, **settings)
    p_a = [None if None in (x, y) else (x + (1 - y)) / 2 for x, y in zip(p_ab, p_ba)]
    both = [(x, y) for x, y in zip(p_ab, p_ba) if None not in (x, y)]
    same = sum((x > 0.5) == (y > 0.5) for x, y in both) / max(1, len(both))
    return Verdicts(p_a, p_ab, p_ba, reasons, same)


def label(p: float, labels: str) -> float:
    """The judge's probability as the label that is kept: soft as it is, hard 0 or 1 (an even one
    stays even), or clamped to [CLAMP, 1 - CLAMP]."""
    if labels == "hard":
        return p if p == 0.5 else float(p > 0.5)
    return min(max(p, CLAMP), 1 - CLAMP) if labels == "clamped" else p


def left_out(planner) -> str:
    """One clause on what was left out; empty where there is nothing to say."""
    reasons = ("answers cut off or empty", "prompts too long")
    return ", ".join(f"{planner.counts[why]} {why}" for why in reasons if planner.counts[why])


def make_pairs(answers: list[tuple[int, ...]], number: int, rng: random.Random) -> list[tuple]:
    """answers: the token ids of one prompt's answers. Up to `number` pairs of different answers, in
    random order and with sides drawn by lot; an answer that was sampled often is drawn often."""
    pairs = [(x, y) for x, y in itertools.combinations(answers, 2) if x != y]
    rng.shuffle(pairs)
    seen, kept = set(), []
    for x, y in pairs:
        if frozenset((x, y)) not in seen:
            seen.add(frozenset((x, y)))
            kept.append((x, y) if rng.random() < 0.5 else (y, x))
    return kept[: number or len(kept)]


@dataclass(frozen=True)
class Models:
    """Who answers and who judges, with what they need for it."""

    model: torch.nn.Module
    judge: torch.nn.Module
    planner: Planner
    generator: torch.Generator
    journal: object = None  # see plumbing/progress.py


def answers_of(sampler, n, conversations, models, cfg, shown) -> list[list[tuple[int, ...]]]:
    """The token ids of every whole answer out of n samples to each conversation. An answer that
    never ends is none.

    shown: worked examples go in front, and a line's end ends an answer, since they show it.
    """
    planner, tokenizer = models.planner, models.planner.tokenizer
    if shown:
        prompts = [planner.prompt("answer", text, cfg.max_new) for text in conversations]
    else:
        prompts = [tokenizer.encode(text) for text in conversations]
    room = sampler.config.block_size - cfg.max_new
    fits = [i for i, prompt in enumerate(prompts) if prompt is not None and len(prompt) <= room]
    if sampler is models.model:
        planner.counts["prompts too long"] += len(prompts) - len(fits)
    answers = [[] for _ in conversations]
    if not n or not fits:
        return answers
    stop = tokenizer.line_ends if shown else {tokenizer.eot}
    how = dict(generator=models.generator, n=n, desc="answers", journal=models.journal)
    prompts = [prompts[i] for i in fits]
    found = generate_batched(sampler, prompts, cfg.max_new, stop, cfg.batch_size, **how)
    for number, ids in enumerate(found):
        if ids[-1] in stop and len(ids) > 1:
            answers[fits[number // n]].append((*ids[:-1], tokenizer.eot))
        else:
            planner.counts["answers cut off or empty"] += 1
    return answers


def draw_principles(principles, targets, ensemble, rng) -> list:
    """`ensemble` principles for a pair. One votes once on a pair; rarely there are too few of
    them."""
    drawn = []
    for _ in range(ensemble):
        another = constitution.draw(principles, targets, AIM, rng)
        for _ in range(20):
            if all(another.id != principle.id for principle in drawn):
                break
            another = constitution.draw(principles, targets, AIM / 2, rng)
        drawn.append(another)
    return drawn


def compare_rows(cfg, rows, principles, models, rng) -> tuple[list[dict], float]:
    """The rows of the output for these prompts, and the share of pairs won by the same slot in both
    orders."""
    planner = models.planner
    asked = list(map(constitution.conversation_of, rows))
    mine = answers_of(models.model, cfg.samples, asked, models, cfg, False)
    others = answers_of(models.judge, cfg.base_samples, asked, models, cfg, planner.full)
    pairs, drawn = [], []  # (row, a, b), and the principles that it is judged by
    for row, some, more in zip(rows, mine, others):
        pairs += [(row, *pair) for pair in make_pairs(some + more, cfg.pairs, rng)]
    for row, _, _ in pairs:
        targets = ORDINARY if row["kind"] == "benign" else (row.get("category"), *HARMFUL)
        drawn.append(draw_principles(principles, targets, cfg.ensemble, rng))
    conversations = [constitution.conversation_of(row) for row, _, _ in pairs]
    texts = [
        [constitution.clean(planner.tokenizer.decode(side)) for side in two] for _, *two in pairs
    ]
    sides, votes, out = list(zip(*texts)), [], []
    how = dict(reasons=cfg.reasons, max_new=cfg.max_new, batch_size=cfg.batch_size, desc="judging")
    how["journal"] = models.journal
    for number in range(cfg.ensemble if pairs else 0):
        asks = [some[number].asks("compare", planner.full) for some in drawn]
        votes.append(judge(models.judge, planner, conversations, *sides, asks, **how))
    for k, ((row, a, b), (text_a, text_b)) in enumerate(zip(pairs, texts)):
        voted = {p.id: v for p, v in zip(drawn[k], votes) if v.p_a[k] is not None}
        if not voted:
            continue  # two rambling answers can be too long for the judge; the planner counted them
        p = [vote.p_a[k] for vote in voted.values()]
        principle, first = next(iter(voted.items()))
        found = {"prompt_id": row["id"], "prompt": row["prompt"], "setting": row.get("setting")}
        found |= {"kind": row["kind"], "category": row.get("category", "")}
        found |= {"attack": row.get("attack", ""), "action": row.get("action", "")}
        found |= {"a": text_a, "b": text_b, "a_ids": list(a), "b_ids": list(b)}
        found |= {"principle": principle, "p_a": label(sum(p) / len(p), cfg.labels)}
        found["p_ab"] = first.p_ab[k]
        found |= {"p_ba": first.p_ba[k], "reasons": first.reasons[k]}
        if cfg.ensemble > 1:
            found["votes"] = {name: vote.p_a[k] for name, vote in voted.items()}
        out.append(found)
    return out, sum(vote.same_slot for vote in votes) / max(1, len(votes))


def comparisons(cfg, rows, principles, models, rng, totals):
    """The rows of the output one by one, of PROMPTS prompts after another; totals gets their sums.

    All processes have to go through it together: each does its share of the prompts, all get all
    rows. UserError at its end if there was no row, so that none of them writes an empty file.
    """
    planner, size = models.planner, PROMPTS * distributed.world()
    for first in range(0, len(rows), size):
        mine = distributed.share(rows[first : first + size])
        some, same_slot = compare_rows(cfg, mine, principles, models, rng)
        totals["same_slot"] += distributed.total(same_slot * len(some))
        for row in distributed.merge(some):
            yield {"id": f"pair-{totals['pairs']:05d}", **row}
            totals["pairs"] += 1
            totals["contrast"] += abs(row["p_a"] - 0.5)
    planner.counts = distributed.merge(planner.counts)
    if not totals["pairs"]:
        raise UserError(
            f"{cfg.model}: no prompt got two different answers that end and that the judge has room for, so there "
            f"is nothing to compare (models read at most {models.judge.config.block_size} tokens; left out: "
            f"{left_out(planner) or 'none'}); raise --samples, or change --max-new"
        )


def main(cfg: Config) -> dict:
    stage = begin("feedback", cfg)
    if stage is None:
        return {"skipped": True}
    seed = cfg.seed + 1000 * distributed.rank()
    rng, generator = random.Random(cfg.seed), torch.Generator().manual_seed(seed + 1)
    every = constitution.load_constitution(cfg.constitution)
    principles = constitution.select(every, cfg.without)
    rows = formats.loop_prompts(cfg.prompts)
    harmful = data.choose(rows, "harmful", cfg.harmful, rng)
    rows = harmful + data.choose(rows, "benign", cfg.helpful, rng)
    folders, tokenizer, (config, _) = stage.open(cfg.judge, cfg.model)
    sizes = dict(batch=cfg.batch_size, length=config.block_size, models=2, reads_on=cfg.reasons)
    stage.plan_memory("sample", config, "--batch-size", **sizes)
    formats.warn_unread(rows, tokenizer, cfg.model)
    warn_outside(principles, tokenizer, cfg.model)
    judging, model = map(stage.load, folders)
    planner = Planner(tokenizer, config.block_size, load_shots(cfg.fewshot, every, cfg.reasons))
    models = Models(model, judging, planner, generator, stage.journal())
    if distributed.rank():
        rng.seed(seed)
    totals = Counter()

    def means():
        return {name: totals[name] / totals["pairs"] for name in ("same_slot", "contrast")}

    with stage.precision():
        found = comparisons(cfg, rows, principles, models, rng, totals)
        stage.save_rows(found, lambda: means() | {"planner": dict(planner.counts)})
    told = "".join(f"; {some}" for some in (planner.summary(), left_out(planner)) if some)
    stage.say(
        f"{totals['pairs']} comparisons of {len(rows)} prompts, mean |p - 1/2| {means()['contrast']:.2f}, same slot "
        f"in both orders {means()['same_slot']:.1%}{told}; {stage.seconds():.0f} s on {stage.threads} threads -> "
        f"{cfg.out}"
    )
    distributed.barrier()
    return {"pairs": totals["pairs"], **means()}


if __name__ == "__main__":
    run(main, Config, __doc__)
