"""Phase 1: fine-tune a language model on its own revisions (Bai et al. 2022, arXiv 2212.08073,
section 3.1).

    python train_sft.py --model data/tiny --data runs/tiny/revisions.jsonl --out runs/tiny/sft

The question is read, not trained: the loss falls on the tokens of the answer and on the end-of-text
that closes it. Learnt is the last revision of every answer that some round changed. With --learn
all, as in the paper, it is the revisions of all rounds, and beside them the answers to ordinary
requests that no round changed. Rows are padded, never packed: a packed row would see its neighbour.
A row that does not fit the model's context is dropped and counted, never cut.

Prints the loss on held-out prompts before and after, and how long it took. Writes a checkpoint
folder with metrics.jsonl (a row for every optimiser step) and run.json (the settings) beside the
weights.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from mincai import UserError, shipped
from mincai.constitution import conversation_of
from mincai.losses import sft_loss
from mincai.plumbing import cli, data, distributed, formats, optim, workers
from mincai.plumbing.cli import arg
from mincai.plumbing.stage import Settings, begin

WARMUP = 0.05  # part of the steps in which the learning rate rises, before a cosine to 0
HOLDOUT = 0.05  # part of the prompts kept out of training to measure the loss on


@dataclass(frozen=True)
class Config(Settings):
    model: str = arg(
        shipped("tiny"), "pretrained model to start from: a folder, or gpt2 and its sizes"
    )
    data: tuple[str, ...] = arg(("runs/tiny/revisions.jsonl",), "files of revisions, one or more")
    learn: str = arg("last", "which revisions of an answer, as said above", choices=("last", "all"))
    epochs: int = arg(4, "how often every row is seen", least=0)
    lr: float = arg(6e-4, "highest learning rate of AdamW", least=0)
    batch_size: int = arg(16, "rows in one optimiser step", least=1)
    micro_batch: int = arg(0, "most rows in a forward; fewer need less memory; 0: all", least=0)
    out: str = arg("runs/tiny/sft", "folder to write the fine-tuned model to")


def answers_of(row, learn) -> list[str]:
    """The answers that a row of revisions teaches. To a harmful request an answer that no round
    changed is what has to go; to an ordinary one it is fine: critics looked at it and let it
    stand."""
    if not row.get("changed", True):
        return [row["revision"]] if learn == "all" and row.get("kind") == "benign" else []
    rounds = row.get("rounds", ()) if learn == "all" else ()
    stood = [r["revision"] for r in rounds if r["outcome"] == "revised"]
    return list(dict.fromkeys([*stood, row["revision"]]))


def read(cfg, tokenizer, limit) -> tuple[list, Counter]:
    """[(prompt's text, prompt tokens, answer tokens)], and how many were left out, by reason."""
    kept, dropped = [], Counter()
    for where, row in (pair for path in cfg.data for pair in data.each_row(path)):
        formats.need(row, ("prompt", "revision"), where, text=("prompt", "revision", "setting"))
        if not row["revision"].strip():
            raise UserError(
                f"{where}: the revision is empty; write an answer, or leave the row out"
            )
        if cfg.learn == "all":
            formats.need_rounds(row, where)
        text = conversation_of(row)
        prompt, answers = tokenizer.encode(text), answers_of(row, cfg.learn)
        dropped["never revised"] += not answers
        for said in answers:
            # Who sees no end never learns to stop
            answer = [*tokenizer.encode(" " + said.strip()), tokenizer.eot]
            if len(prompt) + len(answer) - 1 > limit:  # the last token is a target, never an input
                dropped["too long"] += 1
            else:
                kept.append((text, prompt, answer))
    return kept, dropped


def loss_of(net, total, rows, counts=True):
    """sft_loss of (prompt tokens, answer tokens) rows: loss and metrics, over `total` tokens. Only
    what predicts an answer's token goes all the way up and meets the vocabulary."""
    model, start = distributed.bare(net), min(len(prompt) for prompt, _ in rows) - 1
    ids, targets, loss_mask = data.sft_batch(rows, model.device)  # (B, T-1) each
    loss_mask = loss_mask & counts
    hidden = net(ids, start=start)[loss_mask[:, start:]]  # (N, C)
    return sft_loss(model.unembed(hidden), targets[loss_mask], loss_mask[loss_mask], total)


def tokens_of(rows) -> int:
    return sum(len(answer) for _, answer in rows)


@torch.no_grad()
def mean_loss(model, rows, batch_size):
    """Nats per answer token over all rows; None without rows."""
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    total = sum(float(loss_of(model, 1, part)[0]) for part in parts)
    return total / tokens_of(rows) if rows else None


def main(cfg: Config) -> dict:
    stage = begin("train_sft", cfg)
    if stage is None:
        return {"skipped": True}
    shuffle = torch.Generator().manual_seed(cfg.seed)
    (folder,), tokenizer, (config,) = stage.open(cfg.model)

    # --- data ---
    rows, dropped = read(cfg, tokenizer, config.block_size)
    sides = data.split(rows, [row[0] for row in rows], HOLDOUT, cfg.seed)
    train, held = ([row[1:] for row in side] for side in sides)  # (prompt, answer)
    told = f"{dropped['never revised']} never revised, {dropped['too long']} too long"
    if not train:
        raise UserError(
            f"{', '.join(cfg.data) or '--data'}: no row is left to train on ({told} for the model); revise more prompts"
        )
    lengths = [len(prompt) + len(answer) for prompt, answer in train]
    steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    stage.say(
        f"{len(train)} rows to train on, {len(held)} held out, {told}; {steps} steps on {stage.device}"
    )

    if dropped["too long"] > len(rows):
        stage.warn("most answers are too long for the model, and what is left may be a poor choice")

    mine = math.ceil(cfg.batch_size / distributed.world())
    sizes = dict(batch=mine, micro_batch=cfg.micro_batch, length=max(lengths))
    stage.plan_memory("sft", config, "--micro-batch", **sizes)
    model = stage.load(folder)
    optimizer = optim.adamw(model, cfg.lr)
    with stage.precision():
        before = mean_loss(model, held, cfg.micro_batch or cfg.batch_size)
    net = distributed.wrap(model)
    kept = stage.training(model=model, optimizer=optimizer)
    todo = data.every_batch(cfg.epochs, lengths, cfg.batch_size, shuffle)

    # --- the loop ---
    bar = tqdm(todo[kept.steps :], desc="sft", unit="step", disable=not distributed.is_main())
    for epoch, batch in bar:
        rows = [train[i] for i in batch]
        # one divisor for the whole step: a mean of means would weigh the tokens of short
        # answers more
        total = tokens_of(rows)
        loss = partial(loss_of, net, total)
        found = workers.add_up(model, net, rows, cfg.micro_batch, loss, stage.precision)
        step = kept.steps + 1
        lr = optim.learning_rate(cfg.lr, WARMUP, kept.steps, steps)
        place = f"train_sft, step {step} of {steps}"
        norm = optim.step(optimizer, model, lr, place)
        row = {"step": step, "epoch": epoch, **found, "tokens": total, "grad_norm": norm, "lr": lr}
        kept.step(row)
        bar.set_postfix(loss=f"{row['loss']:.3f}")

    # --- what came of it ---
    with stage.precision():
        after = mean_loss(model, held, cfg.micro_batch or cfg.batch_size)
    metrics = {"loss": kept.log[-1]["loss"] if kept.log else None}
    metrics |= {"val_before": before, "val_after": after}
    metrics |= {"rows": len(train), "held": len(held), "dropped": dict(dropped), "steps": steps}
    metrics["seconds"] = stage.seconds()
    stage.save_model(model, tokenizer, metrics, kept.log)
    told = f"held-out loss {before:.3f} -> {after:.3f} nats a token" if held else "nothing held out"
    stage.say(f"wrote {cfg.out} in {metrics['seconds']:.0f} s: {steps} steps, {told}")
    distributed.barrier()
    return metrics


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
