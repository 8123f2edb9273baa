"""Phase 2: reinforcement learning from AI feedback (Bai et al. 2022, arXiv 2212.08073, section
4.1).

    python train_ppo.py --model runs/tiny/sft --pm runs/tiny/pm --out runs/tiny/ppo

Each update: draw prompts; sample an answer to each at temperature 1; score it with the preference
model; pay -beta times the log-ratio to the fine-tuned model on every token (Ziegler et al. 2019,
equation 2); estimate advantages; take a few clipped steps (mincai/ppo.py). Four networks: the
policy and its frozen reference, both the fine-tuned model; the frozen preference model; and the
critic, which starts as a copy of it. Only prompts of the split "loop" are used, half of them
harmful, so that held-out prompts stay held out.

Prints key numbers and three sampled answers every PRINT_EVERY updates (a long run thirty times in
all), and warns of what should never be seen. Writes the policy's checkpoint folder: beside weights
metrics.jsonl (one row an update), samples.jsonl (what was printed) and run.json. A healthy run:
first_ratio_error 0, ratio_mean 1 +- 0.05, clipfrac below 0.2, approxkl below 0.02, explained rising
above 0.3, kl rising slowly.

What was gained is measured apart, because two updates answer different prompts: before the first
update and after the last, the policy answers the same prompts with the same random numbers
(`look`). The last line and run.json (score_before, score_after) hold these.

The score is what PPO is after, so it cannot tell whether answers get better. A caller who has
something that can gives it as main(cfg, watch): watch(policy) -> {name: number}, called before the
first update, whenever samples are printed, and after the last. The numbers are printed, and stand
in metrics.jsonl as dev_<name>; those from before the first update in a row of their own, update 0.
Nothing is learnt from them. One named quality (higher is better) is held against the score.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from tqdm import tqdm

from mincai import Diverged, UserError, ppo, shipped
from mincai.constitution import conversation_of
from mincai.plumbing import cli, distributed, formats
from mincai.plumbing.cli import arg
from mincai.plumbing.health import examples, nothing_learnt, show_samples, warnings
from mincai.plumbing.stage import Settings, begin

GAMMA = 1.0  # discount of later rewards
LAM = 0.95  # GAE's lambda: 1 trusts sampled rewards, 0 the critic
MISSING_EOS = 1.0  # taken from the score of an answer that does not end by itself
KL_HORIZON = 10_000  # answers over which beta is steered to --kl-target
PRINT_EVERY = 4  # updates between printed samples, or a thirtieth of all
LOOKED_AT = 128  # answers in a look at the policy, every other one to a harmful prompt


@dataclass(frozen=True)
class Config(Settings):
    model: str = arg("runs/tiny/sft", "the fine-tuned model, where the policy starts")
    pm: str = arg("runs/tiny/pm", "the preference model")
    prompts: str = arg(
        shipped("tiny/prompts.jsonl"), "file of prompts; rows of the split 'loop' are used"
    )
    updates: int = arg(16, "how many times answers are sampled and learnt from", least=1)
    batch_size: int = arg(128, "answers in an update, one a prompt", least=1)
    max_new: int = arg(48, "longest answer in tokens", least=1)
    epochs: int = arg(2, "passes over one batch of answers", least=1)
    minibatches: int = arg(2, "optimiser steps in a pass", least=1)
    micro_batch: int = arg(64, "answers in one forward pass, fewer need less memory", least=1)
    lr: float = arg(2e-4, "learning rate of the policy, falling to 0 over the updates", least=0)
    critic_lr: float = arg(3e-4, "learning rate of the critic, falling likewise", least=0)
    warmup: int = arg(
        1, "first updates: rates rise, and at the very start the critic alone learns", least=0
    )
    beta: float = arg(0.2, "price of a nat of KL to the start, in deviations of the score", least=0)
    kl_target: float = arg(
        0.0, "nats an answer to steer to by changing beta; 0 leaves beta", least=0
    )
    clip: float = arg(0.2, "how far a ratio from 1, a value from its old one may move", least=1e-6)
    out: str = arg("runs/tiny/ppo", "folder to write the trained policy to")


def check(cfg) -> int:
    """The number of answers in a forward pass; UserError for settings that cannot go together."""
    if cfg.batch_size % cfg.minibatches:
        raise UserError(
            f"--batch-size {cfg.batch_size} is no multiple of --minibatches {cfg.minibatches}; make it one"
        )
    if cfg.kl_target and not cfg.beta:
        raise UserError("--kl-target is steered to by changing --beta, and 0 stays 0; raise --beta")
    minibatch, others = divmod(cfg.batch_size // cfg.minibatches, distributed.world())
    if others:
        raise UserError(
            f"a minibatch of {cfg.batch_size // cfg.minibatches} answers cannot be shared evenly among "
            f"{distributed.world()} processes; change --batch-size or --minibatches"
        )
    micro_batch = min(cfg.micro_batch, minibatch)
    if minibatch % micro_batch:  # else old and new log-probs would be computed in different slices
        raise UserError(
            f"--micro-batch {micro_batch} does not divide a minibatch of {minibatch} answers; give a divisor"
        )
    return micro_batch


def read_prompts(cfg, tokenizer, limit) -> tuple[list, list, int]:
    """(token lists of harmful prompts, of the others, how many left no room for an answer)."""
    pools, dropped = {"harmful": [], "benign": []}, 0
    rows = formats.loop_prompts(cfg.prompts)
    formats.warn_unread(rows, tokenizer, cfg.model)
    for row in rows:
        ids = tokenizer.encode(conversation_of(row))
        if len(ids) + cfg.max_new > limit:
            dropped += 1
        else:
            pools["harmful" if row["kind"] == "harmful" else "benign"].append(ids)
    for kind, pool in pools.items():
        if not pool:
            raise UserError(
                f"{cfg.prompts}: no {kind} prompt of the split 'loop' fits ({dropped} too long for {limit} "
                f"tokens with --max-new); add some (--prompts FILE,benign:FILE)"
            )
    return pools["harmful"], pools["benign"], dropped


def shuffled(rows, generator):
    """The rows for ever, each once in every round, every round in a new order."""
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def learning_rate(cfg, top, u, first):
    """The rate at update u, counted from 1, of a network that learns from update `first` on.

    It rises in a line over --warmup updates: Adam's first steps are as long as any, but go by a
    scale of the gradient that is known from a few minibatches only. And it falls in a line to 0 at
    the end.
    """
    rise = min(1.0, max(0, u - first + 1) / (cfg.warmup + 1))
    return top * rise * (1 - (u - 1) / cfg.updates)


def next_beta(cfg, log) -> float:
    """The price of KL in the next update, after these rows of metrics. With --kl-target it moves
    gently (Ziegler et al. 2019, equation 4)."""
    last = log[-1] if log else {}
    if not cfg.kl_target or "beta" not in last:
        return cfg.beta
    error = min(max(last["kl"] / cfg.kl_target - 1, -0.2), 0.2)
    return last["beta"] * (1 + error * cfg.batch_size / KL_HORIZON)


def same_prompts(cfg, harmful, benign):
    """What `look` asks: the same prompts in every run, as many as fill batches of --batch-size or
    LOOKED_AT."""
    turns = [shuffled(some, torch.Generator().manual_seed(0)) for some in (harmful, benign)]
    size = min(cfg.batch_size, LOOKED_AT)
    return [next(turns[i % 2]) for i in range(LOOKED_AT // size * size)]


def look(nets, prompts, score_fn, batch_size, **settings) -> dict:
    """What the policy answers to these prompts, with the same random numbers in every call: mean
    and deviation of the score, KL to the reference (nats an answer), and the share that ended by
    itself.

    nets: policy, reference and critic. settings: those of ppo.rollout.
    """
    generator, parts = torch.Generator(nets[1].device).manual_seed(0), []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        batch = ppo.rollout(*nets, some, generator=generator, **settings)
        scores, ended = ppo.score(batch, score_fn, stop=settings["stop"], missing_eos_penalty=0.0)
        parts.append((scores, torch.where(batch.mask, batch.kl, 0.0).sum(1), ended.float()))
    scores, kl, ended = (torch.cat(part) for part in zip(*parts))
    found = {"score": scores.mean(), "score_std": scores.std(unbiased=False)}
    found |= {"kl": kl.mean(), "eos": ended.mean()}
    return {name: float(number) for name, number in found.items()}


def in_words(row, *names):
    names += tuple(name for name in row if name.startswith("dev_"))
    return "  ".join(f"{name} {row[name]:.3f}" for name in names)


def main(cfg: Config, watch=None) -> dict:
    stage = begin("train_ppo", cfg)
    if stage is None:
        return {"skipped": True}
    micro_batch = check(cfg)
    order = torch.Generator().manual_seed(cfg.seed)  # of prompts and minibatches
    # Another stream than the order's
    sampling = torch.Generator(stage.device).manual_seed(cfg.seed + 1)
    (folder, pm_folder), tokenizer, configs = stage.open(cfg.model, cfg.pm)
    if configs[0].vocab_size != configs[1].vocab_size:
        raise UserError(
            f"{cfg.pm} has {configs[1].vocab_size} tokens, {cfg.model} has {configs[0].vocab_size}; train the "
            f"preference model from the same model"
        )
    limit = min(config.block_size for config in configs)
    harmful, benign, dropped = read_prompts(cfg, tokenizer, limit)
    sizes = dict(batch=cfg.batch_size // distributed.world(), micro_batch=micro_batch)
    sizes |= dict(length=max(map(len, harmful + benign)) + cfg.max_new, answer=cfg.max_new)
    stage.plan_memory("ppo", configs[0], "--micro-batch, --batch-size or --max-new", **sizes)
    policy, ref = stage.load(folder), stage.load(folder).requires_grad_(False)
    pm, critic = (stage.load(pm_folder, scalar=True) for _ in range(2))
    score_fn, stop = ppo.preference_score(pm.requires_grad_(False), micro_batch), {tokenizer.eot}
    # eps 1e-5 as in Ziegler et al. and most PPO since; weight decay would pull the policy off its
    # reference
    adam = partial(torch.optim.Adam, eps=1e-5, fused=True)
    policy_learner, critic_learner = (
        ppo.Learner(distributed.wrap(net), adam(net.parameters())) for net in (policy, critic)
    )
    nets = policy_learner.net, ref, critic_learner.net
    settings = dict(max_new=cfg.max_new, stop=stop, micro_batch=micro_batch)
    steps = dict(epochs=cfg.epochs, minibatches=cfg.minibatches, micro_batch=micro_batch)
    how = ppo.Steps(**steps, clip=cfg.clip, value_clip=cfg.clip, precision=stage.precision)
    stage.say(
        f"{len(harmful)} harmful and {len(benign)} other prompts, {dropped} too long; {cfg.updates} updates of "
        f"{cfg.batch_size} answers on {stage.device}"
    )
    if dropped > len(harmful + benign):
        stage.warn("most prompts are too long for the model; lower --max-new, or give shorter ones")
    turns = shuffled(harmful, order), shuffled(benign, order)
    same, shown = same_prompts(cfg, harmful, benign), []

    def measured():
        """Where the policy stands: its answers to the same prompts."""
        with stage.precision():
            return look(nets, same, score_fn, cfg.batch_size, **settings)

    def watched():
        """What the caller's watch says; on one process, which the others wait for."""
        if watch is None or not distributed.is_main():
            return {}
        with torch.no_grad(), stage.precision():
            return {f"dev_{name}": float(number) for name, number in watch(policy).items()}

    before = measured()
    parts = dict(policy=policy, critic=critic, sampling=sampling)
    parts |= dict(adam=policy_learner.optimizer, critic_adam=critic_learner.optimizer)
    kept = stage.training(notes=shown, **parts)  # the networks may be a stopped run's from here on
    log = kept.log
    if not log and (dev := watched()):
        kept.add({"update": 0, **dev})
        stage.say(f"update 0: {in_words(dev)}")

    # --- the loop ---
    bar = tqdm(range(1, cfg.updates + 1), desc="ppo", disable=not distributed.is_main())
    for u in bar:
        tick = time.time()
        n_benign = round(cfg.batch_size / 2)
        prompts = [*islice(turns[0], cfg.batch_size - n_benign), *islice(turns[1], n_benign)]
        mixed = torch.randperm(cfg.batch_size, generator=order)  # both kinds in each minibatch
        prompts = [prompts[i] for i in mixed.tolist()]
        if u <= kept.steps:  # learnt from before a stop: drawn again for what is drawn next
            list(ppo.orders(cfg.batch_size, cfg.epochs, order))
            continue
        beta = next_beta(cfg, log)
        with stage.precision():
            batch = ppo.rollout(*nets, prompts, generator=sampling, **settings)
            scores, ended = ppo.score(batch, score_fn, stop=stop, missing_eos_penalty=MISSING_EOS)
        adv, returns = ppo.advantages(batch, scores, beta=beta, gamma=GAMMA, lam=LAM)
        if u == 1:
            raw = scores + MISSING_EOS * ~ended
            stage.say(
                f"update 1: fresh answers score {float(raw.mean()):+.2f}, deviation "
                f"{float(raw.std(unbiased=False)):.2f}; the preference model was scaled to 0 and 1 on such answers"
            )
        lr = learning_rate(cfg, cfg.lr, u, first=cfg.warmup + 1)
        critic_lr = learning_rate(cfg, cfg.critic_lr, u, first=1)
        for learner, rate in ((policy_learner, lr), (critic_learner, critic_lr)):
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
        how = replace(how, train_policy=u > cfg.warmup)
        try:
            metrics = ppo.update(policy_learner, critic_learner, batch, adv, returns, how, order)
        except Diverged as error:
            raise Diverged(f"train_ppo, update {u} of {cfg.updates}, {error}") from None
        row = {"update": u, **ppo.diagnostics(batch, scores, ended, returns, beta=beta), **metrics}
        row |= {"lr": lr, "critic_lr": critic_lr, "episodes": u * cfg.batch_size}
        row["episodes_per_s"] = cfg.batch_size / (time.time() - tick)
        due = u % max(PRINT_EVERY, cfg.updates // 30) == 0 or u == cfg.updates
        row |= watched() if due else {}
        bar.set_postfix(score=f"{row['score']:+.2f}", kl=f"{row['kl_exact']:.2f}")
        for line in warnings([*log, row], gap=1e-3 if cfg.dtype == "float32" else 0.3):
            stage.warn(line)
        if due:
            names = "score", "kl_exact", "beta", "entropy", "length", "eos", "explained", "clipfrac"
            some = examples(batch, scores, beta, tokenizer.decode)
            shown += [{"update": u, **sample} for sample in some]
            lines = [f"update {u}: {in_words(row, *names)}", *show_samples(some)]
            stage.say("\n".join(lines))
        kept.step(row)

    # --- what came of it ---
    after = measured()
    gain = (after["score"] - before["score"]) / max(before["score_std"], 1e-8)
    result = {**log[-1], "score_before": before["score"], "score_after": after["score"]}
    result |= {"score_gain": gain, "kl_after": after["kl"], "updates": cfg.updates}
    result |= {"eos_before": before["eos"], "eos_after": after["eos"], "seconds": stage.seconds()}
    stage.save_model(policy, tokenizer, result, log, samples=shown)
    stage.say(
        f"wrote {cfg.out} in {result['seconds']:.0f} s: {cfg.updates} updates; score of fresh samples on the same "
        f"{len(same)} prompts: {before['score']:+.3f} -> {after['score']:+.3f} ({gain:+.2f} deviations), KL to the "
        f"fine-tuned model {after['kl']:.2f} nats an answer, ended by themselves {before['eos']:.0%} -> "
        f"{after['eos']:.0%}"
    )
    for line in nothing_learnt(gain):
        stage.warn(line)
    distributed.barrier()
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
