"""Phase 2: reinforcement learning from AI feedback (Bai et al. 2022, arXiv 2212.08073, section 4.1).

    python train_ppo.py --sft runs/tiny/sft --pm runs/tiny/pm --out runs/tiny/ppo

Each update: draw prompts; sample an answer to each at temperature 1; score it with the preference model;
pay -beta times the log-ratio to the fine-tuned model on every token (Ziegler et al. 2019, equation 2);
estimate advantages; take a few clipped steps (mincai/ppo.py). Four networks: the policy and its frozen
reference, both the fine-tuned model; the frozen preference model; and the critic, which starts as a copy of
it. Only prompts of the split "loop" are used, so that held-out prompts stay held out.

Prints a line of key numbers and three sampled answers with score, kl and total every --print-every updates,
and warns of what should never be seen: a negative KL update after update, or sampled log-probs that one
forward does not give back. Writes the policy's checkpoint folder with metrics.jsonl (one row an update),
samples.jsonl (the printed answers) and run.json beside the weights. A healthy run: first_ratio_error 0,
ratio_mean 1 +- 0.05, clipfrac below 0.2, approxkl below 0.02, explained rising above 0.3, kl rising slowly.
"""

import json
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from mincai import UserError, checkpoint, cli, data, ppo
from mincai.cli import arg
from mincai.constitution import dialogue
from mincai.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config:
    sft: str = arg("runs/tiny/sft", "checkpoint folder of the fine-tuned model, where the policy starts")
    pm: str = arg("runs/tiny/pm", "checkpoint folder of the preference model")
    prompts: str = arg("data/tiny/prompts.jsonl", "file of prompts; rows of the split 'loop' are used")
    out: str = arg("runs/tiny/ppo", "folder to write the trained policy to")
    updates: int = arg(12, "how many times answers are sampled and learned from")
    batch: int = arg(128, "answers in an update, one a prompt")
    benign_share: float = arg(0.5, "part of every batch that is drawn from prompts that are not harmful")
    max_new: int = arg(48, "longest answer in tokens")
    epochs: int = arg(2, "passes over one batch of answers")
    minibatches: int = arg(2, "optimiser steps in a pass")
    micro_batch: int = arg(64, "answers in one forward pass; lower it when memory is short")
    lr: float = arg(1e-4, "learning rate of the policy, falling in a line to 0 over the updates")
    critic_lr: float = arg(3e-4, "learning rate of the critic, falling likewise")
    critic_warmup: int = arg(1, "updates at the start in which only the critic learns")
    beta: float = arg(0.1, "price of a nat of KL to the fine-tuned model, in deviations of its score")
    kl_target: float = arg(0.0, "KL in nats an answer to steer to by changing beta; 0 leaves beta alone")
    kl_horizon: int = arg(10000, "answers over which beta is steered; longer is gentler")
    gamma: float = arg(1.0, "discount of later rewards")
    lam: float = arg(0.95, "GAE's lambda: 1 trusts the sampled rewards, 0 the critic")
    clip: float = arg(0.2, "how far from 1 the probability ratio is still rewarded")
    value_clip: float = arg(0.2, "how far a value may move from the old one in one update")
    max_norm: float = arg(1.0, "largest norm of each gradient")
    approx_kl_stop: float = arg(0.0, "leave a batch when the policy moved 1.5 times this in k2; 0 never does")
    missing_eos_penalty: float = arg(1.0, "taken from the score of an answer that does not end by itself")
    snapshots: int = arg(0, "write the policy to OUT/snapshots every so many updates; 0 never does")
    print_every: int = arg(5, "updates between printed samples")
    seed: int = arg(0, "of the prompts' order, the sampling and the minibatches")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "train anew though the output is there")
    LOOSE = ("out", "print_every", "device", "threads", "again")  # settings that do not make another policy


def check(cfg):
    """The number of answers in a forward pass; UserError for settings that cannot go together."""
    for name in ("updates", "batch", "max_new", "epochs", "minibatches", "micro_batch", "print_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give at least 1")
    if cfg.batch % cfg.minibatches:
        raise UserError(f"--batch {cfg.batch} is no multiple of --minibatches {cfg.minibatches}; make it one")
    if not 0 <= cfg.benign_share <= 1:
        raise UserError(f"--benign-share {cfg.benign_share}: give a number from 0 to 1")
    minibatch = cfg.batch // cfg.minibatches
    micro_batch = min(cfg.micro_batch, minibatch)
    if minibatch % micro_batch:  # else old and new log-probs would be computed in different slices
        raise UserError(f"--micro-batch {micro_batch} does not divide a minibatch of {minibatch} answers; "
                        "give a divisor")
    return micro_batch


def read_prompts(cfg, tokenizer, limit):
    """(token lists of harmful prompts, of the others, how many left no room for an answer)."""
    pools, dropped = {True: [], False: []}, 0
    for row in data.read_jsonl(cfg.prompts, need=("prompt", "kind", "split")):
        if row["split"] == "loop":
            ids = tokenizer.encode(dialogue(row["prompt"], row.get("setting")))
            if len(ids) + cfg.max_new > limit:
                dropped += 1
            else:
                pools[row["kind"] == "harmful"].append(ids)
    for harmful, share in ((True, 1 - cfg.benign_share), (False, cfg.benign_share)):
        if round(cfg.batch * share) and not pools[harmful]:
            kind = "harmful" if harmful else "benign"
            raise UserError(f"{cfg.prompts}: no {kind} prompt of the split 'loop' fits ({dropped} too long "
                            f"for {limit} tokens with --max-new); add some or change --benign-share")
    return pools[True], pools[False], dropped


def shuffled(rows, generator):
    """The rows for ever, each once in every round, every round in a new order."""
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def show(batch, scores, beta, tokenizer, update):
    """Three answers of the batch as printable rows; samples are the debugger."""
    k1 = torch.where(batch.mask, batch.logp - batch.ref_logp, 0.0).sum(1)
    rows = []
    for i in torch.linspace(0, len(scores) - 1, min(3, len(scores))).long().tolist():
        prompt = batch.ids[i, :batch.start][batch.valid[i, :batch.start]].tolist()
        answer = batch.ids[i, batch.start:][batch.mask[i]].tolist()
        row = {"update": update, "prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer),
               "score": float(scores[i]), "kl": float(k1[i]), "total": float(scores[i] - beta * k1[i])}
        tqdm.write(f"  score {row['score']:+.2f}  kl {row['kl']:+.2f}  total {row['total']:+.2f}  | "
                   f"{row['prompt']}{row['answer']}".replace("\n", " / "))
        rows.append(row)
    return rows


def warn(row, negative):
    """Say it when two parts of the code disagree; returns for how many updates on end the KL was negative."""
    negative = negative + 1 if row["kl"] < -0.05 and row["kl_k3"] > 1e-6 else 0
    if negative >= 3:
        tqdm.write(f"  WARNING: KL to the reference is negative for {negative} updates ({row['kl']:.3f}): "
                   "answers are not drawn from the distribution that is scored")
    if row["sampling_gap"] > 1e-3:  # rounding in float32 stays below 1e-4
        tqdm.write(f"  WARNING: sampled log-probs are {row['sampling_gap']:.3f} off those of one forward")
    if row["first_ratio_error"] > 1e-3:
        tqdm.write(f"  WARNING: the first minibatch's ratio is off 1 by {row['first_ratio_error']:.4f}")
    return negative


def main(cfg: Config) -> dict:
    if data.done(cfg.out, cfg, cfg.again):
        print(f"train_ppo: {cfg.out} is there already, made with these settings (--again to redo)")
        return {"skipped": True}
    micro_batch = check(cfg)
    start = time.time()
    device, _ = cli.pick_device(cfg.device), cli.set_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)  # of prompts and minibatches
    sampling = torch.Generator(device).manual_seed(cfg.seed + 1)  # another stream than the order's
    tokenizer = load_tokenizer(cfg.sft)
    policy, ref = checkpoint.load(cfg.sft, device), checkpoint.load(cfg.sft, device).requires_grad_(False)
    pm, critic = (checkpoint.load(cfg.pm, device, scalar=True) for _ in range(2))
    pm.requires_grad_(False)
    if pm.gpt.config.vocab_size != policy.config.vocab_size:
        raise UserError(f"{cfg.pm} has {pm.gpt.config.vocab_size} tokens, {cfg.sft} has "
                        f"{policy.config.vocab_size}; train the preference model from the same model")
    limit = min(policy.config.block_size, pm.gpt.config.block_size)
    harmful, benign, dropped = read_prompts(cfg, tokenizer, limit)
    draw_harmful, draw_benign = shuffled(harmful, order), shuffled(benign, order)
    n_benign, stop = round(cfg.batch * cfg.benign_share), {tokenizer.eot}
    files = {**tokenizer.files(), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    score_fn = ppo.preference_score(pm, micro_batch)
    # eps 1e-5 as in Ziegler et al. and most PPO since; weight decay would pull the policy off its reference
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr, eps=1e-5)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=cfg.critic_lr, eps=1e-5)
    print(f"train_ppo: {len(harmful)} harmful and {len(benign)} other prompts, {dropped} too long; "
          f"{cfg.updates} updates of {cfg.batch} answers on {device}")
    work = Path(f"{cfg.out}.partial")  # snapshots wait here until the whole output is there
    beta, log, shown, negative = cfg.beta, [], [], 0

    # --- the loop ---
    bar = tqdm(range(1, cfg.updates + 1), desc="ppo", unit="update")
    for u in bar:
        tick = time.time()
        prompts = [*islice(draw_harmful, cfg.batch - n_benign), *islice(draw_benign, n_benign)]
        prompts = [prompts[i] for i in torch.randperm(cfg.batch, generator=order).tolist()]  # mix minibatches
        batch = ppo.rollout(policy, ref, critic, prompts, max_new=cfg.max_new, stop=stop,
                            micro_batch=micro_batch, generator=sampling)
        scores, ended = ppo.score(batch, score_fn, stop=stop, missing_eos_penalty=cfg.missing_eos_penalty)
        adv, returns = ppo.advantages(batch, scores, beta=beta, gamma=cfg.gamma, lam=cfg.lam)
        left = 1 - (u - 1) / cfg.updates
        for optimizer, lr in ((policy_optimizer, cfg.lr), (critic_optimizer, cfg.critic_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * left
        metrics = ppo.update(policy, critic, policy_optimizer, critic_optimizer, batch, adv, returns,
                             epochs=cfg.epochs, minibatches=cfg.minibatches, micro_batch=micro_batch,
                             clip=cfg.clip, value_clip=cfg.value_clip, max_norm=cfg.max_norm, generator=order,
                             approx_kl_stop=cfg.approx_kl_stop, train_policy=u > cfg.critic_warmup)
        row = {"update": u, **ppo.diagnostics(batch, scores, ended, returns, beta=beta), **metrics,
               "lr": cfg.lr * left, "episodes": u * cfg.batch,
               "episodes_per_s": cfg.batch / (time.time() - tick)}
        log.append(row)
        bar.set_postfix(score=f"{row['score']:+.2f}", kl=f"{row['kl_exact']:.2f}", eos=f"{row['eos']:.2f}")
        negative = warn(row, negative)
        if u % cfg.print_every == 0 or u == cfg.updates:
            tqdm.write(f"update {u}: " + "  ".join(f"{name} {row[name]:.3f}" for name in (
                "score", "kl_exact", "beta", "entropy", "length", "eos", "explained", "clipfrac")))
            shown += show(batch, scores, beta, tokenizer, u)
        if cfg.kl_target > 0:  # Ziegler et al. 2019, equation 4: beta moves gently
            error = min(max(row["kl"] / cfg.kl_target - 1, -0.2), 0.2)
            beta *= 1 + error * cfg.batch / cfg.kl_horizon
        if cfg.snapshots and u % cfg.snapshots == 0:
            checkpoint.save(policy, work / "snapshots" / f"u{u:03d}", extra=files)

    # --- what came of it ---
    first, last = log[0], log[-1]
    result = {**{k: v for k, v in last.items() if k != "update"}, "score_first": first["score"],
              "updates": cfg.updates, "seconds": time.time() - start}
    checkpoint.save(policy, cfg.out, extra={
        **files, "run.json": data.stamp(cfg, metrics=result),
        "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in log),
        "samples.jsonl": "".join(json.dumps(r) + "\n" for r in shown)})
    if cfg.snapshots and (work / "snapshots").exists():
        os.replace(work / "snapshots", Path(cfg.out) / "snapshots")
        work.rmdir()
    print(f"train_ppo: wrote {cfg.out} in {result['seconds']:.0f} s: {cfg.updates} updates, score "
          f"{first['score']:+.3f} -> {last['score']:+.3f}, KL to the fine-tuned model "
          f"{last['kl_exact']:.2f} nats an answer, {last['eos']:.0%} ended by themselves")
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
