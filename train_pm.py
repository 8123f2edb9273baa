"""Phase 2: a preference model on AI labels (Bai et al. 2022, arXiv 2212.08073, section 4.1).

    python train_pm.py --init runs/tiny/sft --pairs runs/tiny/comparisons.jsonl --out runs/tiny/pm
    python train_pm.py --pairs runs/x/comparisons.jsonl,helpful.jsonl --weights 1,0.5     AI and human labels

The transformer of the fine-tuned model gets a linear read-out; the score of an answer is the number at its last
token, the end of text (Stiennon et al. 2020). Two answers' scores make a probability, sigmoid(score_a - score_b)
(Bradley & Terry 1952), and the loss is its cross-entropy with the judge's soft label p_a.
The answers are the token ids that were sampled; nothing is decoded and encoded again. People's labels (HH-RLHF's
pairs, or TRL's) mix in as files of their own: the paper took harmlessness from the model and helpfulness from people.
A pair that does not fit the context, or whose answers are the same, is dropped and counted.

At the end the scores are shifted and scaled so that fresh answers of the fine-tuned model, to prompts that PPO will
use, have mean 0 and standard deviation 1, and frozen so (Ziegler et al. 2019, section 2.1): beta and the penalties
of PPO then mean the same in every run. No answer moves above another, but the difference of two scores is then no
log-odds any more.

Prints, for pairs of prompts it was not trained on: how often it prefers the answer that the judge prefers,
its loss beside the least that these soft labels allow, its calibration error, and how much its score goes
with length.
"""

import json
import math
import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mincai import UserError, model
from mincai.plumbing import checkpoint, cli, data, distributed, formats, memory, optim, output
from mincai.plumbing.cli import arg
from mincai.constitution import dialogue
from mincai.plumbing.logprobs import answer_scores
from mincai.losses import calibration_error, preference_loss
from mincai.sample import generate_batched
from mincai.plumbing.weights import common_tokenizer, resolve

NORMALISED, ANSWER = 256, 96  # fresh answers that the scores are scaled on, and tokens of each at most


@dataclass(frozen=True)
class Config:
    init: str = arg("runs/tiny/sft", "checkpoint folder of the fine-tuned model, whose answers are compared")
    pairs: tuple[str, ...] = arg(("runs/tiny/comparisons.jsonl",), "files of pairs: comparisons, HH-RLHF's, or TRL's")
    weights: tuple[float, ...] = arg((), "how often each file is read in an epoch, 0.5 for half; none: once")
    prompts: str = arg("data/tiny/prompts.jsonl", "prompts to scale scores on, PPO's; none: those of the pairs")
    out: str = arg("runs/tiny/pm", "folder to write the preference model to")
    epochs: int = arg(4, "how often every pair is seen")
    lr: float = arg(1e-3, "highest learning rate of AdamW")
    warmup: float = arg(0.05, "part of the steps in which the learning rate rises, before a line to 0")
    batch_size: int = arg(16, "pairs in one optimiser step")
    micro_batch: int = arg(0, "pairs in one forward pass; lower it when memory is short, 0 takes the whole batch")
    contrast: float = arg(0.05, "leave out pairs whose label is nearer to 1/2: the judge was undecided; 0 keeps all")
    clamp: float = arg(0.0, "keep labels within clamp and 1 - clamp, e.g. 0.4 for a too sure judge; 0: off")
    hard: bool = arg(False, "round the labels to 0 and 1 (the paper found this much worse)")
    weight_decay: float = arg(0.01, "AdamW's weight decay, on matrices only")
    clip: float = arg(1.0, "largest norm of the gradient")
    freeze: int = arg(2, "blocks from the bottom, embeddings with them, that stay as they are; 0 trains all")
    holdout: float = arg(0.1, "part of the prompts kept out of training to measure on")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    compile: bool = arg(False, "compile the network first; pays on a GPU and long runs")
    seed: int = arg(0, "of the head, of the order of pairs and of the held-out prompts")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "train anew though the output is there")
    LOOSE = ("out", "device", "threads", "again")  # settings that do not make another model

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_folder(self.out, checkpoint.FILES)


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: str    # the conversation up to "Assistant:"
    a: array       # token ids of conversation + answer (A), end-of-text included, as data.compact keeps them
    b: array
    start: int     # how many of these tokens are the conversation
    p_a: float     # the judge's probability that (A) is better
    file: int = 0  # which of --pairs it comes from


def read_pairs(path, tokenizer, limit, file=0):
    """(pairs, Counter of those left out, by reason). Of a row nothing is kept but what is learnt from."""
    pairs, dropped, texts = [], Counter(), {}
    for row in formats.read_pairs(path, tokenizer, dropped):
        text = dialogue(row["prompt"], row.get("setting"))
        text = texts.setdefault(text, text)  # one string for all pairs of a prompt
        prompt = tokenizer.encode(text)
        if row["a_ids"] == row["b_ids"]:
            dropped["equal answers"] += 1  # the scores cancel: nothing to learn
        elif len(prompt) + max(len(row["a_ids"]), len(row["b_ids"])) > limit:
            dropped["too long"] += 1  # cutting the end would move the score off the token it is read at
        else:
            a, b = data.compact(prompt + row["a_ids"]), data.compact(prompt + row["b_ids"])
            pairs.append(Pair(text, a, b, len(prompt), float(row["p_a"]), file))
    return pairs, dropped


def epoch_rows(pairs, weights, generator):
    """Row numbers of one epoch: those of file f weights[f] times over, the last part of a time drawn by lot."""
    rows = []
    for file in sorted({pair.file for pair in pairs}):
        mine = [i for i, pair in enumerate(pairs) if pair.file == file]
        whole, part = divmod(weights[file], 1) if weights else (1, 0)
        rows += mine * int(whole)
        if part:
            some = torch.randperm(len(mine), generator=generator)[:round(part * len(mine))]
            rows += [mine[i] for i in some.tolist()]
    return rows


def scores_of(pm, pairs, device):
    """Scores (B,) of the answers (A) and of the answers (B), from one forward over both."""
    ids, valid = data.right_pad([p.a for p in pairs] + [p.b for p in pairs], device)  # (2B, T)
    last = valid.sum(1) - 1  # found by the mask: an id cannot tell padding from text
    scores = pm(ids).gather(1, last[:, None]).squeeze(1)  # (2B,): right padding needs no mask
    return scores[:len(pairs)], scores[len(pairs):]


@torch.no_grad()
def all_scores(pm, pairs, batch_size, device):
    """Scores (N,) of (A) and (N,) of (B), on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: max(len(pairs[i].a), len(pairs[i].b)))
    a, b = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for i in range(0, len(order), batch_size):
        rows = order[i:i + batch_size]
        score_a, score_b = scores_of(pm, [pairs[j] for j in rows], device)
        a[rows], b[rows] = score_a.cpu(), score_b.cpu()
    return a, b


def correlation(x, y):
    """Pearson's r; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return float(x @ y / scale) if scale > 0 else 0.0


def measure(pm, pairs, batch_size, device):
    """What the scores say of these pairs, against the judge's labels as they are, not clamped."""
    a, b = all_scores(pm, pairs, batch_size, device)
    p_a = torch.tensor([p.p_a for p in pairs])
    loss, _ = preference_loss(a, b, p_a)
    sure = p_a != 0.5  # of an even label neither answer is the right one
    lengths = torch.tensor([float(len(ids) - p.start) for p in pairs for ids in (p.a, p.b)])
    gap = torch.tensor([float(len(p.a) - len(p.b)) for p in pairs])  # the baselines that need no model
    shorter = torch.where(gap == 0, 0.5, ((gap < 0) == (p_a > 0.5)).float())[sure]
    entropy = -(torch.xlogy(p_a, p_a) + torch.xlogy(1 - p_a, 1 - p_a)).mean()
    return {"loss": float(loss), "loss_floor": float(entropy),  # no score can do better on soft labels
            # equal scores are half right
            "accuracy": float((1 + (a - b).sign() * (p_a - 0.5).sign())[sure].mean() / 2) if sure.any() else 0.5,
            "shorter": float(shorter.mean()) if sure.any() else 0.5,
            "longer": float(1 - shorter.mean()) if sure.any() else 0.5,
            "calibration_error": calibration_error(torch.sigmoid(a - b), p_a),
            "length_correlation": correlation(torch.stack([a, b], 1).flatten(), lengths)}


def some_prompts(cfg, pairs, tokenizer, limit):
    """Token lists of NORMALISED prompts that PPO will draw from, as many harmful ones as others; without a file of
    prompts, those of the pairs."""
    if not cfg.prompts:
        texts = list(dict.fromkeys(pair.prompt for pair in pairs))[:NORMALISED]
    else:
        rows, rng = formats.loop_prompts(cfg.prompts), random.Random(cfg.seed)
        rows = [row for kind in ("harmful", "benign") for row in data.choose(rows, kind, NORMALISED // 2, rng)]
        texts = [dialogue(row["prompt"], row.get("setting")) for row in rows]
    room = min(ANSWER, limit // 2)
    prompts = [prompt for prompt in map(tokenizer.encode, texts) if len(prompt) + room <= limit]
    if not prompts:
        raise UserError(f"{cfg.prompts or ', '.join(cfg.pairs)}: no prompt leaves room for an answer of {room} tokens "
                        f"in the model's {limit}, so scores cannot be scaled; give shorter ones (--prompts)")
    return prompts


def normalise(pm, sampler, prompts, eot, batch_size, generator):
    """Set gain and shift so that fresh answers of `sampler`, one to each prompt at temperature 1 as PPO will draw them,
    score 0 on average with standard deviation 1. Returns both as they were."""
    pm.gain.fill_(1.0)
    pm.shift.fill_(0.0)
    room = min(ANSWER, sampler.config.block_size // 2)
    found = generate_batched(sampler, prompts, room, {eot}, batch_size, generator=generator, desc="fresh answers")
    scores = answer_scores(pm, prompts, found, batch_size)
    std = scores.std(unbiased=False)
    if not std > 0:
        raise UserError(f"{len(found)} fresh answers all have the same score; look at the labels p_a, or raise --lr")
    pm.gain.fill_(1 / std)
    pm.shift.fill_(-scores.mean() / std)
    return float(scores.mean()), float(std)


def step(net, optimizer, batch, cfg, device) -> dict:
    """One optimiser step on a list of pairs, shared among the processes and cut into micro-batches; its metrics.

    Every part's mean loss weighs as many pairs as it has, so that the sum is the mean over the whole batch.
    """
    mine, size = distributed.share(batch), cfg.micro_batch or len(batch)
    parts = [(mine[i:i + size], len(mine[i:i + size]) / len(batch)) for i in range(0, len(mine), size)]
    parts = parts or [(batch[:1], 0.0)]  # a process without a row still takes part in summing gradients
    metrics = Counter()
    for k, (part, share) in enumerate(parts):
        with distributed.no_sync(net, last=k == len(parts) - 1):
            with cli.precision(device, cfg.dtype):
                score_a, score_b = scores_of(net, part, device)
            p_a = torch.tensor([pair.p_a for pair in part], device=device).clamp(cfg.clamp, 1 - cfg.clamp)
            if cfg.hard:
                p_a = torch.where(p_a == 0.5, p_a, (p_a > 0.5).float())  # an even label stays even
            loss, found = preference_loss(score_a, score_b, p_a)
            (loss * share * distributed.scale()).backward()
        for name, value in found.items():
            metrics[name] += float(value) * share
    metrics = {name: distributed.total(value) for name, value in metrics.items()}
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def main(cfg: Config) -> dict:
    if data.done(cfg.out, cfg, cfg.again):
        print(f"train_pm: {cfg.out} is there already, made with these settings (--again to redo)")
        return {"skipped": True}
    cfg.check_out()
    if not 0 <= cfg.clamp < 0.5:
        raise UserError(f"--clamp {cfg.clamp}: give a number from 0 (off) to below 0.5")
    if cfg.weights and (len(cfg.weights) != len(cfg.pairs) or min(cfg.weights) < 0):
        raise UserError(f"--weights {','.join(map(str, cfg.weights))}: give one number, 0 or more, for each of the "
                        f"{len(cfg.pairs)} files of --pairs")
    start = time.time()
    cli.set_threads(cfg.threads)
    device = distributed.start(cli.pick_device(cfg.device))
    torch.manual_seed(cfg.seed)  # the head's first weights
    shuffle = torch.Generator().manual_seed(cfg.seed)
    init = resolve(cfg.init)
    tokenizer, config = common_tokenizer(init), checkpoint.read_config(init)

    # --- data ---
    pairs, dropped = [], Counter()
    for file, path in enumerate(cfg.pairs):
        some, left_out = read_pairs(path, tokenizer, config.block_size, file)
        pairs, dropped = pairs + some, dropped + left_out
    dropped["undecided"] = sum(abs(p.p_a - 0.5) < cfg.contrast for p in pairs)
    pairs = [p for p in pairs if abs(p.p_a - 0.5) >= cfg.contrast]
    train, held = data.split(pairs, [p.prompt for p in pairs], cfg.holdout, cfg.seed)
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none left out"
    if not train:
        raise UserError(f"{', '.join(cfg.pairs)}: no pair is left to train on ({told}, {len(held)} held out); judge "
                        f"more, or lower --holdout or --contrast")
    prompts = some_prompts(cfg, pairs, tokenizer, config.block_size)
    longest = max(max(len(p.a), len(p.b)) for p in train)
    memory.announce("pm", config, device, "--micro-batch", batch=cfg.batch_size, length=longest,
                    micro_batch=cfg.micro_batch or cfg.batch_size, dtype_bytes=cli.number_bytes(cfg.dtype))
    pm = checkpoint.load(init, device, scalar=True)
    every = [max(len(p.a), len(p.b)) for p in train]
    per_epoch = math.ceil(len(epoch_rows(train, cfg.weights, torch.Generator())) / cfg.batch_size)
    steps = cfg.epochs * per_epoch
    if distributed.is_main():
        print(f"train_pm: {len(train)} pairs to train on, {len(held)} held out, {told}; {steps} steps on {device}")
    model.freeze(pm.gpt, cfg.freeze)  # what it knows sits low; with few pairs, reading it beats learning it anew
    optimizer = torch.optim.AdamW(optim.decaying(pm, cfg.weight_decay), cfg.lr, betas=(0.9, 0.95),
                                  fused=pm.gpt.device.type == "cuda")
    net = distributed.wrap(torch.compile(pm) if cfg.compile else pm)
    log = []

    # --- the loop ---
    bar = tqdm(total=steps, desc="pm", unit="step", disable=distributed.disable_bar())
    for epoch in range(cfg.epochs):
        rows = epoch_rows(train, cfg.weights, shuffle)
        for batch in data.length_batches([every[i] for i in rows], batch_size=cfg.batch_size, generator=shuffle):
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(cfg.lr, cfg.warmup, len(log), steps, fall="line")
            metrics = step(net, optimizer, [train[rows[i]] for i in batch], cfg, device)
            log.append({"step": len(log) + 1, "epoch": epoch + 1, **metrics, "lr": optimizer.param_groups[0]["lr"]})
            bar.update()
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
    bar.close()

    # --- what came of it; measured before normalising, while a difference of scores is still a log-odds ---
    size = 2 * (cfg.micro_batch or cfg.batch_size)
    with cli.precision(device, cfg.dtype):
        found = measure(pm, held, size, device) if held else {}
        sampler = checkpoint.load(init, device)
        mean, std = normalise(pm, sampler, prompts, tokenizer.eot, size, torch.Generator().manual_seed(cfg.seed + 1))
    result = {f"val_{k}": v for k, v in found.items()} | dict(
        train_loss=log[-1]["loss"] if log else None, score_mean=mean, score_std=std, pairs=len(train),
        held=len(held), dropped=dict(dropped), steps=steps, seconds=time.time() - start)
    if distributed.is_main():
        checkpoint.save(pm, cfg.out, extra={
            **tokenizer.files(), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
            "run.json": data.stamp(cfg, metrics=result),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in log)})
        told = ("held out: accuracy {accuracy:.3f}, always the shorter {shorter:.3f}, the longer {longer:.3f}; loss "
                "{loss:.3f} (least possible {loss_floor:.3f}), calibration error {calibration_error:.3f}, correlation "
                "with length {length_correlation:+.2f}").format(**found) if held else "nothing held out"
        print(f"train_pm: wrote {cfg.out} in {result['seconds']:.0f} s: {steps} steps; {told}")
        if held and found["accuracy"] <= max(found["shorter"], found["longer"]):
            print("  WARNING: that is no better than choosing by length alone, and PPO would learn just that; look at "
                  "the labels, or give more of them")
        if dropped["undecided"] > 3 * len(pairs):  # half are usual: answers often share what a principle looks at
            print(f"  WARNING: the judge was undecided on {dropped['undecided']} pairs and decided on {len(pairs)}: "
                  f"most answers are alike to it; try other principles, or another judge")
    distributed.barrier()
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
