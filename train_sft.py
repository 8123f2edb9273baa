"""Phase 1: fine-tune a language model on its own revisions (Bai et al. 2022, arXiv 2212.08073, section 3.1).

    python train_sft.py --base data/tiny --data runs/tiny/revisions.jsonl --out runs/tiny/sft

The question is read, not trained: the loss falls on the tokens of the answer and on the end-of-text that
closes it. The paper learns the revisions of all rounds and answers to ordinary requests beside them (--rounds all
--unchanged). Rows are padded, never packed: a packed row would see its neighbour. A row that does not fit the
model's context is dropped and counted, never cut.

Prints the loss on held-out prompts before and after, and how long it took. Writes a checkpoint folder with
metrics.jsonl (a row for every optimiser step) and run.json (the settings) beside the weights.
"""

import json
import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mincai import UserError
from mincai.plumbing import checkpoint, cli, data, distributed, formats, memory, optim, output
from mincai.plumbing.cli import arg
from mincai.constitution import dialogue
from mincai.losses import sft_loss
from mincai.plumbing.weights import common_tokenizer, resolve


@dataclass(frozen=True)
class Config:
    base: str = arg("data/tiny", "pretrained model to start from: a checkpoint folder, or gpt2 and its sizes")
    data: tuple[str, ...] = arg(("runs/tiny/revisions.jsonl",), "files of revisions, one or more")
    rounds: str = arg("last", "which revisions of an answer are learnt: the last, or all that stood after some round")
    unchanged: bool = arg(False, "learn answers to ordinary requests that no round changed, too")
    out: str = arg("runs/tiny/sft", "folder to write the fine-tuned model to")
    epochs: int = arg(4, "how often every row is seen")
    lr: float = arg(6e-4, "highest learning rate of AdamW")
    warmup: float = arg(0.05, "part of the steps in which the learning rate rises, before a cosine to 0")
    batch_size: int = arg(16, "rows in one forward pass")
    accumulate: int = arg(1, "forward passes that make one optimiser step")
    weight_decay: float = arg(0.01, "AdamW's weight decay, on matrices only")
    clip: float = arg(1.0, "largest norm of the gradient")
    holdout: float = arg(0.05, "part of the prompts kept out of training to measure the loss on")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    compile: bool = arg(False, "compile the network first; pays on a GPU and long runs")
    seed: int = arg(0, "of the order of rows and of the held-out prompts")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "train anew though the output is there")
    LOOSE = ("out", "device", "threads", "again")  # settings that do not make another model

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_folder(self.out, checkpoint.FILES)


def answers_of(row, rounds, unchanged):
    """The answers that a row of revisions teaches, as texts: its last revision, or with rounds "all" every one that
    took an answer's place. One that no round changed is taken (unchanged) where the request is an ordinary one: critics
    looked at it and let it stand. To a harmful request such an answer is what has to go."""
    if not row.get("changed", True):
        return [row["revision"]] if unchanged and row.get("kind") == "benign" else []
    stood = [r["revision"] for r in row.get("rounds", ()) if r["outcome"] == "revised"] if rounds == "all" else []
    return list(dict.fromkeys([*stood, row["revision"]]))


def examples(rows, tokenizer, limit, rounds="last", unchanged=False):
    """Rows to [(prompt's text, prompt tokens, answer tokens)], how many answers did not fit in `limit`, and how many
    rows were left out because no round had revised the answer."""
    kept, dropped, left = [], 0, 0
    for row in rows:
        text = dialogue(row["prompt"], row.get("setting"))
        prompt, answers = tokenizer.encode(text), answers_of(row, rounds, unchanged)
        left += not answers
        for said in answers:
            answer = tokenizer.encode(" " + said) + [tokenizer.eot]  # who never sees an end never learns to stop
            if len(prompt) + len(answer) > limit + 1:  # + 1: the last token is a target and never an input
                dropped += 1
            else:
                kept.append((text, prompt, answer))
    return kept, dropped, left


@torch.no_grad()
def mean_loss(model, rows, batch_size, device):
    """Nats per answer token over all rows."""
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        ids, targets, loss_mask = data.sft_batch([row[1:] for row in rows[i:i + batch_size]], device)
        total += float(sft_loss(model.unembed(model(ids)), targets, loss_mask, total=1)[0])
        count += int(loss_mask.sum())
    return total / count


def main(cfg: Config) -> dict:
    if data.done(cfg.out, cfg, cfg.again):
        print(f"train_sft: {cfg.out} is there already, made with these settings (--again to redo)")
        return {"skipped": True}
    cfg.check_out()
    cli.check_choice("rounds", cfg.rounds, ("last", "all"))
    start = time.time()
    cli.set_threads(cfg.threads)
    device = distributed.start(cli.pick_device(cfg.device))
    torch.manual_seed(cfg.seed)
    shuffle = torch.Generator().manual_seed(cfg.seed)
    folder = resolve(cfg.base)
    tokenizer, config = common_tokenizer(folder), checkpoint.read_config(folder)

    # --- data ---
    rows = []
    for where, row in (pair for path in cfg.data for pair in data.each_row(path)):
        formats.need(row, ("prompt", "revision"), where, text=("prompt", "revision", "setting"))
        if not row["revision"].strip():
            raise UserError(f"{where}: the revision is empty; write an answer, or leave the row out")
        rows.append(row)
    rows, dropped, unchanged = examples(rows, tokenizer, config.block_size, cfg.rounds, cfg.unchanged)
    train, held = data.split(rows, [row[0] for row in rows], cfg.holdout, cfg.seed)
    if not train:
        raise UserError(f"{', '.join(cfg.data)}: no row is left to train on ({unchanged} never revised, {dropped} too "
                        f"long for the model, {len(held)} held out); revise more prompts or lower --holdout")
    lengths = [len(prompt) + len(answer) for _, prompt, answer in train]
    per_epoch = math.ceil(math.ceil(len(train) / cfg.batch_size) / cfg.accumulate)
    steps = cfg.epochs * per_epoch
    if distributed.is_main():
        print(f"train_sft: {len(train)} rows to train on, {len(held)} held out, {dropped} too long, {unchanged} never "
              f"revised; {steps} steps on {device}")

    memory.announce("sft", config, device, "--batch-size (and raise --accumulate)", length=max(lengths),
                    batch=-(-cfg.batch_size // distributed.world()), dtype_bytes=cli.number_bytes(cfg.dtype))
    model = checkpoint.load(folder, device)
    optimizer = torch.optim.AdamW(optim.decaying(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, 0.95),
                                  fused=model.device.type == "cuda")
    with cli.precision(device, cfg.dtype):
        before = mean_loss(model, held, cfg.batch_size, device) if held else None
    net = distributed.wrap(torch.compile(model) if cfg.compile else model)
    log, step = [], 0

    # --- the loop ---
    bar = tqdm(total=steps, desc="sft", unit="step", disable=distributed.disable_bar())
    for epoch in range(cfg.epochs):
        batches = data.length_batches(lengths, batch_size=cfg.batch_size, generator=shuffle)
        for first in range(0, len(batches), cfg.accumulate):
            parts = []
            for batch in batches[first:first + cfg.accumulate]:
                pairs = [train[i][1:] for i in batch]
                ids, targets, loss_mask = data.sft_batch(distributed.share(pairs) or pairs[:1], device)
                # a process without a row of its own still takes part in summing gradients, with a loss of nothing
                parts.append((ids, targets, loss_mask & (len(pairs) > distributed.rank())))
            # one divisor for the whole step: a mean of means would weigh the tokens of short answers more
            total = distributed.total(sum(int(loss_mask.sum()) for _, _, loss_mask in parts))
            loss_sum = 0.0
            for k, (ids, targets, loss_mask) in enumerate(parts):
                with distributed.no_sync(net, last=k == len(parts) - 1):
                    with cli.precision(device, cfg.dtype):
                        logits = model.unembed(net(ids))  # (B, T-1, V)
                    loss, _ = sft_loss(logits, targets, loss_mask, total=total)
                    (loss * distributed.scale()).backward()
                loss_sum += float(loss.detach())
            loss_sum = distributed.total(loss_sum)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(cfg.lr, cfg.warmup, step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            log.append({"step": step, "epoch": epoch + 1, "loss": loss_sum, "tokens": total,
                        "grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]})
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}")
    bar.close()

    # --- what came of it ---
    with cli.precision(device, cfg.dtype):
        after = mean_loss(model, held, cfg.batch_size, device) if held else None
    metrics = {"loss": log[-1]["loss"] if log else None, "val_before": before, "val_after": after,
               "rows": len(train), "held": len(held), "dropped": dropped, "unchanged": unchanged, "steps": steps,
               "seconds": time.time() - start}
    if distributed.is_main():
        checkpoint.save(model, cfg.out, extra={
            **tokenizer.files(), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
            "run.json": data.stamp(cfg, metrics=metrics),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in log)})
        held_text = f"held-out loss {before:.3f} -> {after:.3f} nats a token" if held else "nothing held out"
        print(f"train_sft: wrote {cfg.out} in {metrics['seconds']:.0f} s: {steps} steps, {held_text}")
    distributed.barrier()
    return metrics


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
