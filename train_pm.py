"""Phase 2: a preference model on AI labels (Bai et al. 2022, arXiv 2212.08073, section 4.1).

    python train_pm.py --model runs/tiny/sft --pairs runs/tiny/comparisons.jsonl --out runs/tiny/pm
    python train_pm.py --pairs runs/x/comparisons.jsonl,helpful.jsonl        AI and human labels

The transformer of the fine-tuned model gets a linear read-out; the score of an answer is the number
at its last token, the end of text (Stiennon et al. 2020). Two answers' scores make a probability,
sigmoid(score_a - score_b) (Bradley & Terry 1952), and the loss is its cross-entropy with the
judge's soft label p_a. The answers are the token ids that were sampled; nothing is decoded and
encoded again. People's labels (HH-RLHF's pairs, or TRL's) mix in as files of their own: the paper
took harmlessness from the model and helpfulness from people. A pair that does not fit the context,
or whose answers are the same, is dropped and counted.

At the end the scores are shifted and scaled so that fresh answers of the fine-tuned model, to
prompts that PPO will use, have mean 0 and standard deviation 1, and frozen so (Ziegler et al. 2019,
section 2.1): beta and the penalties of PPO then mean the same in every run. No answer moves above
another, but the difference of two scores is then no log-odds any more.

Prints, for pairs of prompts it was not trained on: how often it prefers the answer that the judge
prefers, its loss beside the least that these soft labels allow, its calibration error, and how much
its score goes with length.
"""

import math
import random
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from mincai import UserError, model, shipped
from mincai.constitution import conversation_of
from mincai.losses import preference_loss
from mincai.plumbing import cli, data, distributed, formats, health, optim, workers
from mincai.plumbing.cli import arg
from mincai.plumbing.logprobs import answer_scores, pair_scores
from mincai.plumbing.stage import Settings, begin
from mincai.sample import generate_batched

WARMUP = 0.05  # part of the steps in which the learning rate rises, before a line to 0
HOLDOUT = 0.1  # part of the prompts kept out of training to measure on
NORMALISED, ANSWER = 256, 96  # fresh answers to scale scores on, and their tokens at most


@dataclass(frozen=True)
class Config(Settings):
    model: str = arg("runs/tiny/sft", "the fine-tuned model, whose answers are compared")
    pairs: tuple[str, ...] = arg(
        ("runs/tiny/comparisons.jsonl",), "files: comparisons, HH-RLHF's, TRL's"
    )
    prompts: str = arg(
        shipped("tiny/prompts.jsonl"), "to scale scores on, PPO's; none: those of the pairs"
    )
    epochs: int = arg(2, "how often every pair is seen", least=0)
    lr: float = arg(1e-3, "highest learning rate of AdamW", least=0)
    batch_size: int = arg(16, "pairs in one optimiser step", least=1)
    micro_batch: int = arg(0, "most pairs in a forward; fewer need less memory; 0: all", least=0)
    contrast: float = arg(0.05, "leave out labels nearer to 1/2: the judge was undecided", least=0)
    freeze: int = arg(
        2, "blocks from the bottom, and embeddings, that stay as they are; 0: none", least=0
    )
    out: str = arg("runs/tiny/pm", "folder to write the preference model to")


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: str  # the conversation up to "Assistant:"
    a: array  # token ids of conversation and answer (A), end of text included; see data.compact
    b: array
    start: int  # how many of these tokens are the conversation
    p_a: float  # the judge's probability that (A) is better


def read_pairs(path, tokenizer, limit):
    """(pairs, Counter of those left out, by reason). Of a row nothing is kept but what is learnt
    from."""
    pairs, dropped, texts = [], Counter(), {}
    for row in formats.read_pairs(path, tokenizer, dropped):
        text = conversation_of(row)
        text = texts.setdefault(text, text)  # one string for all pairs of a prompt
        prompt = tokenizer.encode(text)
        if row["a_ids"] == row["b_ids"]:
            dropped["equal answers"] += 1  # the scores cancel: nothing to learn
        elif len(prompt) + max(len(row["a_ids"]), len(row["b_ids"])) > limit:
            # Cutting the end would move the score off the token it is read at
            dropped["too long"] += 1
        else:
            a, b = data.compact(prompt + row["a_ids"]), data.compact(prompt + row["b_ids"])
            pairs.append(Pair(text, a, b, len(prompt), float(row["p_a"])))
    return pairs, dropped


def some_prompts(cfg, pairs, tokenizer, limit):
    """Token lists of NORMALISED prompts that PPO will draw from, as many harmful ones as others;
    without a file of prompts, those of the pairs."""
    rng = random.Random(cfg.seed)
    if not cfg.prompts:
        texts = list(dict.fromkeys(pair.prompt for pair in pairs))
        rng.shuffle(texts)  # else all would be harmful, whose pairs come first
        texts = texts[:NORMALISED]
    else:
        rows = formats.loop_prompts(cfg.prompts)
        kinds = [data.choose(rows, kind, NORMALISED // 2, rng) for kind in ("harmful", "benign")]
        texts = [conversation_of(row) for rows in kinds for row in rows]
    room = min(ANSWER, limit // 2)
    prompts = [prompt for prompt in map(tokenizer.encode, texts) if len(prompt) + room <= limit]
    if not prompts:
        raise UserError(
            f"{cfg.prompts or ', '.join(cfg.pairs)}: no prompt leaves room for an answer of {room} tokens "
            f"in the model's {limit}, so scores cannot be scaled; give shorter ones (--prompts)"
        )
    return prompts


def normalise(pm, sampler, prompts, eot, batch_size, generator):
    """Set gain and shift so that fresh answers of `sampler`, one to each prompt at temperature 1 as
    PPO will draw them, score 0 on average with standard deviation 1. Returns mean and deviation as
    they were."""
    pm.gain.fill_(1.0)
    pm.shift.fill_(0.0)
    room = min(ANSWER, sampler.config.block_size // 2)
    how = dict(generator=generator, desc="fresh answers")
    found = generate_batched(sampler, prompts, room, {eot}, batch_size, **how)
    scores = answer_scores(pm, prompts, found, batch_size)
    std = scores.std(unbiased=False)
    if not std > 0:
        raise UserError(
            f"{len(found)} fresh answers all have the same score; look at the labels p_a, or raise --lr"
        )
    pm.gain.fill_(1 / std)
    pm.shift.fill_(-scores.mean() / std)
    return float(scores.mean()), float(std)


def loss_of(net, number, pairs, counts):
    """preference_loss of these pairs: loss and metrics. A part's mean weighs as many of the batch's
    `number` pairs as it has, so that the sum is the mean over the whole batch."""
    score_a, score_b = pair_scores(net, pairs)
    p_a = torch.tensor([pair.p_a for pair in pairs], device=score_a.device)
    loss, found = preference_loss(score_a, score_b, p_a)
    share = counts * len(pairs) / number
    return loss * share, {name: value * share for name, value in found.items()}


def step(net, optimizer, batch, lr, cfg, stage, place) -> dict:
    """One optimiser step on a list of pairs, shared among the processes and cut into micro-batches;
    its metrics."""
    gpt, loss = distributed.bare(net).gpt, partial(loss_of, net, len(batch))
    metrics = workers.add_up(gpt, net, batch, cfg.micro_batch, loss, stage.precision)
    return metrics | {"grad_norm": optim.step(optimizer, net, lr, place)}


def main(cfg: Config) -> dict:
    stage = begin("train_pm", cfg)
    if stage is None:
        return {"skipped": True}
    shuffle = torch.Generator().manual_seed(cfg.seed)
    (folder,), tokenizer, (config,) = stage.open(cfg.model)

    # --- data ---
    pairs, dropped = [], Counter()
    for path in cfg.pairs:  # a file that is named twice is read twice an epoch
        some, left_out = read_pairs(path, tokenizer, config.block_size)
        pairs, dropped = pairs + some, dropped + left_out
    dropped["undecided"] = sum(abs(p.p_a - 0.5) < cfg.contrast for p in pairs)
    pairs = [p for p in pairs if abs(p.p_a - 0.5) >= cfg.contrast]
    train, held = data.split(pairs, [p.prompt for p in pairs], HOLDOUT, cfg.seed)
    told = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none left out"
    if not train:
        raise UserError(
            f"{', '.join(cfg.pairs) or '--pairs'}: no pair is left to train on ({told}); judge more, or lower "
            f"--contrast"
        )
    prompts = some_prompts(cfg, pairs, tokenizer, config.block_size)
    lengths = [max(len(p.a), len(p.b)) for p in train]
    size = cfg.micro_batch or cfg.batch_size
    mine = math.ceil(cfg.batch_size / distributed.world())
    sizes = dict(batch=mine, micro_batch=cfg.micro_batch, length=max(lengths))
    stage.plan_memory("pm", config, "--micro-batch", **sizes)
    pm = stage.load(folder, scalar=True, new_head=True)
    steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    stage.say(
        f"{len(train)} pairs to train on, {len(held)} held out, {told}; {steps} steps on {stage.device}"
    )
    # What it knows sits low; with few pairs, reading it beats learning it anew
    model.freeze(pm.gpt, cfg.freeze)
    optimizer = optim.adamw(pm, cfg.lr)
    net = distributed.wrap(pm)
    kept = stage.training(model=pm, optimizer=optimizer)
    todo = data.every_batch(cfg.epochs, lengths, cfg.batch_size, shuffle)

    # --- the loop ---
    bar = tqdm(todo[kept.steps :], desc="pm", unit="step", disable=not distributed.is_main())
    for epoch, batch in bar:
        lr = optim.learning_rate(cfg.lr, WARMUP, kept.steps, steps, fall="line")
        rows, number = [train[i] for i in batch], kept.steps + 1
        place = f"train_pm, step {number} of {steps}"
        metrics = step(net, optimizer, rows, lr, cfg, stage, place)
        kept.step({"step": number, "epoch": epoch, **metrics, "lr": lr})
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")

    # --- what came of it, while a difference of scores is still a log-odds ---
    with stage.precision():
        found = health.measure_pairs(pm, held, 2 * size) if held else {}
        generator = torch.Generator().manual_seed(cfg.seed + 1)
        sampler = stage.load(folder)
        mean, std = normalise(pm, sampler, prompts, tokenizer.eot, 2 * size, generator)
    result = {f"val_{k}": v for k, v in found.items()}
    result["train_loss"] = kept.log[-1]["loss"] if kept.log else None
    result |= {"score_mean": mean, "score_std": std}
    result |= {"pairs": len(train), "held": len(held), "dropped": dict(dropped), "steps": steps}
    result["seconds"] = stage.seconds()
    stage.save_model(pm, tokenizer, result, kept.log)
    told = "nothing held out"
    if held:
        told = (
            "held out: accuracy {accuracy:.3f}, always the shorter {shorter:.3f}, the longer {longer:.3f}; loss "
            "{loss:.3f} (least possible {loss_floor:.3f}), calibration error {calibration_error:.3f}, correlation "
            "with length {length_correlation:+.2f}"
        ).format(**found)
    stage.say(f"wrote {cfg.out} in {result['seconds']:.0f} s: {steps} steps; {told}")
    if held and found["accuracy"] <= max(found["shorter"], found["longer"]):
        stage.warn(
            "that is no better than choosing by length alone, and PPO would learn just that; look at the labels, "
            "or give more of them"
        )
    # Half are usual: answers often share what a principle looks at
    if dropped["undecided"] > 3 * len(pairs):
        stage.warn(
            f"the judge was undecided on {dropped['undecided']} pairs and decided on {len(pairs)}: most answers "
            f"are alike to it; try other principles, or another judge"
        )
    distributed.barrier()
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
