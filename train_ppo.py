"""Phase 2: reinforcement learning from AI feedback (Bai et al. 2022, arXiv 2212.08073, section 4.1).

    python train_ppo.py --sft runs/tiny/sft --pm runs/tiny/pm --out runs/tiny/ppo

Each update: draw prompts; sample an answer to each at temperature 1; score it with the preference model;
pay -beta times the log-ratio to the fine-tuned model on every token (Ziegler et al. 2019, equation 2);
estimate advantages; take a few clipped steps (mincai/ppo.py). Four networks: the policy and its frozen
reference, both the fine-tuned model; the frozen preference model; and the critic, which starts as a copy of
it. Only prompts of the split "loop" are used, so that held-out prompts stay held out.

Prints a line of key numbers and three sampled answers every --print-every updates, and warns of what should never be
seen. Writes the policy's checkpoint folder with metrics.jsonl (one row an update), samples.jsonl (the printed answers)
and run.json beside the weights. A healthy run: first_ratio_error 0, ratio_mean 1 +- 0.05, clipfrac below 0.2,
approxkl below 0.02, explained rising above 0.3, kl rising slowly.

What was gained is measured apart, because two updates answer different prompts: before the first
update and after the last, the policy answers the same prompts with the same random numbers (`look`).
The last line and run.json (score_before, score_after) hold these.

The score is what PPO is after, so it cannot tell whether answers get better. A caller who has
something that can gives it as main(cfg, watch): watch(policy) -> {name: number}, called before the
first update, every --print-every updates and after the last. The numbers are printed, and stand in
metrics.jsonl as dev_<name>; those from before the first update in a row of their own, update 0.
Nothing is learnt from them. One named quality (higher is better) is held against the score.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from tqdm import tqdm

from mincai import UserError, model, ppo
from mincai.plumbing import checkpoint, cli, data, distributed, formats, memory, output
from mincai.plumbing.cli import arg
from mincai.constitution import dialogue
from mincai.plumbing.health import nothing_learnt, show_samples, warnings
from mincai.plumbing.weights import common_tokenizer, resolve

LOOKED_AT = 128  # answers in a look at the policy, every other one to a harmful prompt


@dataclass(frozen=True)
class Config:
    sft: str = arg("runs/tiny/sft", "checkpoint folder of the fine-tuned model, where the policy starts")
    pm: str = arg("runs/tiny/pm", "checkpoint folder of the preference model")
    prompts: str = arg("data/tiny/prompts.jsonl", "file of prompts; rows of the split 'loop' are used")
    out: str = arg("runs/tiny/ppo", "folder to write the trained policy to")
    updates: int = arg(16, "how many times answers are sampled and learned from")
    batch: int = arg(128, "answers in an update, one a prompt")
    benign_share: float = arg(0.5, "part of every batch that is drawn from prompts that are not harmful")
    max_new: int = arg(48, "longest answer in tokens")
    epochs: int = arg(2, "passes over one batch of answers")
    minibatches: int = arg(2, "optimiser steps in a pass")
    micro_batch: int = arg(64, "answers in one forward pass; lower it when memory is short")
    lr: float = arg(2e-4, "learning rate of the policy, falling in a line to 0 over the updates")
    critic_lr: float = arg(3e-4, "learning rate of the critic, falling likewise")
    freeze: int = arg(0, "blocks of the policy from the bottom, embeddings with them, that stay as they are; 0: none")
    critic_warmup: int = arg(1, "updates at the start in which only the critic learns")
    warmup: int = arg(1, "updates, a network's first ones, in which its learning rate rises")
    beta: float = arg(0.2, "price of a nat of KL to the fine-tuned model, in deviations of its score")
    kl_target: float = arg(0.0, "KL in nats an answer to steer to by changing beta; 0 leaves beta alone")
    kl_horizon: int = arg(10000, "answers over which beta is steered; longer is gentler")
    gamma: float = arg(1.0, "discount of later rewards")
    lam: float = arg(0.95, "GAE's lambda: 1 trusts the sampled rewards, 0 the critic")
    clip: float = arg(0.2, "how far from 1 the probability ratio is still rewarded")
    value_clip: float = arg(0.2, "how far a value may move in one update, in deviations of the score")
    max_norm: float = arg(1.0, "largest norm of each gradient")
    approx_kl_stop: float = arg(0.0, "leave a batch when the policy moved 1.5 times this in k2; 0 never does")
    missing_eos_penalty: float = arg(1.0, "taken from the score of an answer that does not end by itself")
    snapshots: int = arg(4, "write the policy to OUT/snapshots every so many updates; 0 never does")
    print_every: int = arg(4, "updates between printed samples")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    compile: bool = arg(False, "compile policy and critic first; pays on a GPU and long runs")
    seed: int = arg(0, "of the prompts' order, the sampling and the minibatches")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "train anew though the output is there")
    LOOSE = ("out", "print_every", "device", "threads", "again")  # settings that do not make another policy

    def outputs(self):
        """The files that are written to `out`."""
        at = range(self.snapshots, self.updates + 1, self.snapshots) if self.snapshots else ()
        names = ("config.json", "model.safetensors", "tokenizer.tiktoken")
        return [*checkpoint.FILES, "samples.jsonl",
                *(f"snapshots/u{u:03d}/{name}" for u in at for name in names)]

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_folder(self.out, self.outputs())


def check(cfg):
    """The number of answers in a forward pass; UserError for settings that cannot go together."""
    for name in ("updates", "batch", "max_new", "epochs", "minibatches", "micro_batch", "print_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give at least 1")
    if cfg.batch % cfg.minibatches:
        raise UserError(f"--batch {cfg.batch} is no multiple of --minibatches {cfg.minibatches}; make it one")
    if not 0 <= cfg.benign_share <= 1:
        raise UserError(f"--benign-share {cfg.benign_share}: give a number from 0 to 1")
    if cfg.batch // cfg.minibatches % distributed.world():
        raise UserError(f"a minibatch of {cfg.batch // cfg.minibatches} answers cannot be shared evenly among "
                        f"{distributed.world()} processes; change --batch or --minibatches")
    minibatch = cfg.batch // cfg.minibatches // distributed.world()
    micro_batch = min(cfg.micro_batch, minibatch)
    if minibatch % micro_batch:  # else old and new log-probs would be computed in different slices
        raise UserError(f"--micro-batch {micro_batch} does not divide a minibatch of {minibatch} answers; "
                        "give a divisor")
    return micro_batch


def read_prompts(cfg, tokenizer, limit):
    """(token lists of harmful prompts, of the others, how many left no room for an answer)."""
    pools, dropped = {True: [], False: []}, 0
    rows = formats.loop_prompts(cfg.prompts)
    formats.warn_unread(rows, tokenizer, cfg.sft)
    for row in rows:
        ids = tokenizer.encode(dialogue(row["prompt"], row.get("setting")))
        if len(ids) + cfg.max_new > limit:
            dropped += 1
        else:
            pools[row["kind"] == "harmful"].append(ids)
    for harmful, share in ((True, 1 - cfg.benign_share), (False, cfg.benign_share)):
        if round(cfg.batch * share) and not pools[harmful]:
            kind = "harmful" if harmful else "benign"
            raise UserError(f"{cfg.prompts}: no {kind} prompt of the split 'loop' fits ({dropped} too long "
                            f"for {limit} tokens with --max-new); add some (--prompts FILE,benign:FILE) or change "
                            f"--benign-share")
    return pools[True], pools[False], dropped


def shuffled(rows, generator):
    """The rows for ever, each once in every round, every round in a new order."""
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def learning_rate(cfg, top, u, first):
    """The rate at update u, counted from 1, of a network that learns from update `first` on.

    It rises in a line over --warmup updates: Adam's first steps are as long as any, but go by a scale
    of the gradient that is known from a few minibatches only. And it falls in a line to 0 at the end.
    """
    rise = min(1.0, max(0, u - first + 1) / (cfg.warmup + 1))
    return top * rise * (1 - (u - 1) / cfg.updates)


def same_prompts(cfg, harmful, benign):
    """What `look` asks: the same prompts in every run, as many as fill batches of --batch or LOOKED_AT."""
    turns = [shuffled(some, torch.Generator().manual_seed(0)) for some in (harmful, benign) if some]
    size = min(cfg.batch, LOOKED_AT)
    return [next(turns[i % len(turns)]) for i in range(LOOKED_AT // size * size)]


def look(cfg, policy, ref, critic, prompts, score_fn, **settings) -> dict:
    """What the policy answers to these prompts, with the same random numbers in every call: mean and
    deviation of the score, KL to the reference (nats an answer), and the share that ended by itself."""
    generator, parts = torch.Generator(ref.device).manual_seed(0), []
    for i in range(0, len(prompts), cfg.batch):
        batch = ppo.rollout(policy, ref, critic, prompts[i:i + cfg.batch], max_new=cfg.max_new,
                            generator=generator, **settings)
        scores, ended = ppo.score(batch, score_fn, stop=settings["stop"], missing_eos_penalty=0.0)
        parts.append((scores, torch.where(batch.mask, batch.kl, 0.0).sum(1), ended.float()))
    scores, kl, ended = (torch.cat(part) for part in zip(*parts))
    return {"score": float(scores.mean()), "score_std": float(scores.std(unbiased=False)),
            "kl": float(kl.mean()), "eos": float(ended.mean())}


def main(cfg: Config, watch=None) -> dict:
    if data.done(cfg.out, cfg, cfg.again):
        print(f"train_ppo: {cfg.out} is there already, made with these settings (--again to redo)")
        return {"skipped": True}
    cfg.check_out()
    start = time.time()
    cli.set_threads(cfg.threads)
    device = distributed.start(cli.pick_device(cfg.device))
    micro_batch = check(cfg)
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)  # of prompts and minibatches
    sampling = torch.Generator(device).manual_seed(cfg.seed + 1)  # another stream than the order's
    sft = resolve(cfg.sft)
    configs = checkpoint.read_config(sft), checkpoint.read_config(cfg.pm)
    if configs[0].vocab_size != configs[1].vocab_size:
        raise UserError(f"{cfg.pm} has {configs[1].vocab_size} tokens, {cfg.sft} has {configs[0].vocab_size}; train "
                        f"the preference model from the same model")
    tokenizer = common_tokenizer(sft, cfg.pm)
    harmful, benign, dropped = read_prompts(cfg, tokenizer, min(config.block_size for config in configs))
    memory.announce("ppo", configs[0], device, "--micro-batch, --batch or --max-new",
                    length=max(map(len, harmful + benign)) + cfg.max_new,
                    batch=cfg.batch // distributed.world(), answer=cfg.max_new, micro_batch=micro_batch,
                    dtype_bytes=cli.number_bytes(cfg.dtype), cache_bytes=cli.number_bytes(cfg.dtype))
    policy, ref = checkpoint.load(sft, device), checkpoint.load(sft, device).requires_grad_(False)
    pm, critic = (checkpoint.load(cfg.pm, device, scalar=True) for _ in range(2))
    pm.requires_grad_(False)
    model.freeze(policy, cfg.freeze)  # a few rare samples teach; whatever else they move is what the model knows
    draw_harmful, draw_benign = (shuffled(some, order) for some in (harmful, benign))
    n_benign, stop = round(cfg.batch * cfg.benign_share), {tokenizer.eot}
    files = {**tokenizer.files(), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    score_fn = ppo.preference_score(pm, micro_batch)
    fused = policy.device.type == "cuda"
    # eps 1e-5 as in Ziegler et al. and most PPO since; weight decay would pull the policy off its reference
    learning = [p for p in policy.parameters() if p.requires_grad]
    policy_optimizer = torch.optim.Adam(learning, lr=cfg.lr, eps=1e-5, fused=fused)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=cfg.critic_lr, eps=1e-5, fused=fused)
    policy_net, critic_net = (distributed.wrap(torch.compile(m) if cfg.compile else m) for m in (policy, critic))
    say = tqdm.write if distributed.is_main() else lambda _: None
    say(f"train_ppo: {len(harmful)} harmful and {len(benign)} other prompts, {dropped} too long; "
          f"{cfg.updates} updates of {cfg.batch} answers on {device}")
    distributed.barrier()  # all have looked at the place before it changes
    if distributed.is_main():
        work = output.begin(cfg.out, cfg.outputs())  # where snapshots wait until all is made
    beta, log, shown, same = cfg.beta, [], [], same_prompts(cfg, harmful, benign)
    precision = partial(cli.precision, device, cfg.dtype)

    def measured():
        """Where the policy stands: its answers to the same prompts."""
        with precision():
            return look(cfg, policy_net, ref, critic_net, same, score_fn, stop=stop, micro_batch=micro_batch)

    def watched():
        """What the caller's watch says; on one process, which the others wait for."""
        if watch is None or not distributed.is_main():
            return {}
        with torch.no_grad(), precision():
            return {f"dev_{name}": float(number) for name, number in watch(policy).items()}

    def in_words(row, *names):
        return "  ".join(f"{name} {row[name]:.3f}" for name in (*names, *(k for k in row if k.startswith("dev_"))))

    before, dev = measured(), watched()
    if dev:
        log.append({"update": 0, **dev})
        say(f"update 0: {in_words(dev)}")

    # --- the loop ---
    bar = tqdm(range(1, cfg.updates + 1), desc="ppo", unit="update", disable=distributed.disable_bar())
    for u in bar:
        tick = time.time()
        prompts = [*islice(draw_harmful, cfg.batch - n_benign), *islice(draw_benign, n_benign)]
        prompts = [prompts[i] for i in torch.randperm(cfg.batch, generator=order).tolist()]  # mix minibatches
        with precision():
            batch = ppo.rollout(policy_net, ref, critic_net, prompts, max_new=cfg.max_new, stop=stop,
                                micro_batch=micro_batch, generator=sampling)
            scores, ended = ppo.score(batch, score_fn, stop=stop, missing_eos_penalty=cfg.missing_eos_penalty)
        adv, returns = ppo.advantages(batch, scores, beta=beta, gamma=cfg.gamma, lam=cfg.lam)
        if u == 1:
            raw = scores + cfg.missing_eos_penalty * ~ended
            mean, deviation = float(raw.mean()), float(raw.std(unbiased=False))
            say(f"update 1: fresh answers score {mean:+.2f}, deviation {deviation:.2f}; "
                f"the preference model was scaled to 0 and 1 on such answers")
        lr = learning_rate(cfg, cfg.lr, u, first=cfg.critic_warmup + 1)
        critic_lr = learning_rate(cfg, cfg.critic_lr, u, first=1)
        for optimizer, rate in ((policy_optimizer, lr), (critic_optimizer, critic_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate
        try:
            metrics = ppo.update(
                policy_net, critic_net, policy_optimizer, critic_optimizer, batch, adv, returns,
                epochs=cfg.epochs, minibatches=cfg.minibatches, micro_batch=micro_batch, clip=cfg.clip,
                value_clip=cfg.value_clip, max_norm=cfg.max_norm, generator=order,
                approx_kl_stop=cfg.approx_kl_stop, train_policy=u > cfg.critic_warmup,
                precision=precision)
        except UserError as error:
            raise UserError(f"update {u} of {cfg.updates}, {error}") from None
        row = {"update": u, **ppo.diagnostics(batch, scores, ended, returns, beta=beta), **metrics,
               "lr": lr, "critic_lr": critic_lr, "episodes": u * cfg.batch,
               "episodes_per_s": cfg.batch / (time.time() - tick)}
        due = u % cfg.print_every == 0 or u == cfg.updates
        log.append(row | watched() if due else row)
        bar.set_postfix(score=f"{row['score']:+.2f}", kl=f"{row['kl_exact']:.2f}", eos=f"{row['eos']:.2f}")
        lines = warnings(log, gap=1e-3 if cfg.dtype == "float32" else 0.3)
        if due:
            lines.append(f"update {u}: " + in_words(log[-1], "score", "kl_exact", "beta", "entropy", "length", "eos",
                                                    "explained", "clipfrac"))
            shown += [{"update": u, **row} for row in ppo.examples(batch, scores, beta, tokenizer.decode)]
            lines += show_samples(shown[-3:])
        say("\n".join(lines)) if lines else None
        if cfg.kl_target > 0:  # Ziegler et al. 2019, equation 4: beta moves gently
            error = min(max(row["kl"] / cfg.kl_target - 1, -0.2), 0.2)
            beta *= 1 + error * cfg.batch / cfg.kl_horizon
        if cfg.snapshots and u % cfg.snapshots == 0 and distributed.is_main():
            checkpoint.write(policy, work / "snapshots" / f"u{u:03d}", files)

    # --- what came of it ---
    after = measured()
    gain = (after["score"] - before["score"]) / max(before["score_std"], 1e-8)
    result = {**log[-1], "score_before": before["score"], "score_after": after["score"], "score_gain": gain,
              "kl_after": after["kl"], "eos_before": before["eos"], "eos_after": after["eos"],
              "updates": cfg.updates, "seconds": time.time() - start}
    if distributed.is_main():
        checkpoint.save(policy, cfg.out, extra={
            **files, "run.json": data.stamp(cfg, metrics=result),
            "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in log),
            "samples.jsonl": "".join(json.dumps(r) + "\n" for r in shown)}, work=work)
        print(f"train_ppo: wrote {cfg.out} in {result['seconds']:.0f} s: {cfg.updates} updates; score of "
              f"fresh samples on the same {len(same)} prompts: {before['score']:+.3f} -> {after['score']:+.3f} "
              f"({gain:+.2f} deviations), KL to the fine-tuned model {after['kl']:.2f} nats an answer, ended by "
              f"themselves {before['eos']:.0%} -> {after['eos']:.0%}")
        for line in nothing_learnt(gain):
            print(line)
    distributed.barrier()
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
