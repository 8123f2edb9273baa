"""Builds the tiny base model of data/tiny: one language model reads the world's corpus (corpus.py), once.

    python -m mincai.tinyworld.pretrain --out data/tiny        the shipped model: half an hour on one core

Next-token prediction. Documents are packed into rows; each attends to itself alone and counts its positions from 0,
since that is how it will be met again. What is watched while it learns is capability on the loop's actions (does it
recall, critique and judge in the right form?), never a safety figure: the base model is meant to be helpful only.
Beside the weights it writes the prompts of the loop, of development and of evaluation, and the
words it has read.
"""

import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mincai import UserError, constitution
from mincai.plumbing import checkpoint, data, output
from mincai.tinyworld import attacks, corpus, world
from mincai.plumbing.cli import arg, pick_device, precision, run, set_threads
from mincai.plumbing.logprobs import next_logp
from mincai.losses import sft_loss
from mincai.model import GPT, GPTConfig
from mincai.sample import generate_batched
from mincai.plumbing.tokenizer import from_ranks, train_bpe, words_of

SIDE_FILES = ("prompts.jsonl", "prompts_dev.jsonl", "prompts_eval.jsonl", "words.txt")


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again")
    out: str = arg("data/tiny", "folder to write the model, its vocabulary and the prompts to")
    tokens: int = arg(16_000_000, "tokens to read")
    n_layer: int = arg(4, "transformer layers")
    n_head: int = arg(4, "attention heads")
    n_embd: int = arg(128, "channels")
    block_size: int = arg(256, "positions, also the length of a packed row")
    batch_size: int = arg(6, "packed rows a step; small batches and many steps let copying form")
    lr: float = arg(2e-3, "peak learning rate of AdamW; warm-up, then cosine to a twentieth")
    weight_decay: float = arg(0.05, "on matrices")
    ranks: int = arg(1024, "size of the vocabulary at most")
    world: int = arg(0, "seed of the world: who may do what")
    size: str = arg("tiny", "of the world: tiny has 648 things to do, small 2,592")
    tests: int = arg(9, "evaluation prompts of each harmful request, one a family, then the families again")
    workers: int = arg(0, "processes that write the corpus, 0: this one; a GPU reads faster than one writes")
    no_prose: bool = arg(False, "control: leave out the prose on the actions of loop and evaluation")
    seed: int = arg(0, "seed of weights and documents")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    compile: bool = arg(False, "compile the network first; pays on a GPU and long runs")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    check_every: int = arg(1_500, "steps between looks at what it can do")
    again: bool = arg(False, "replace a folder that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_folder(self.out, checkpoint.FILES + SIDE_FILES)


def pack(documents, tokenizer, length: int, rows: int):
    """Fill `rows` rows of `length` tokens with whole documents.

    Returns ids, targets, positions (rows, length) long, weights (rows, length) float, segments (rows, length) long
    (0 is padding). Each document goes to the first row with room; after a few that find none, the batch is full.
    """
    ids, targets, positions, segments = (torch.zeros(rows, length, dtype=torch.long) for _ in range(4))
    weights = torch.zeros(rows, length)
    filled, count, misses = [0] * rows, 0, 0
    while misses < 4:
        tokens, w = [], []
        for text, weight in next(documents):
            piece = tokenizer.encode(text)
            tokens += piece
            w += [weight] * len(piece)
        tokens, w = tokens + [tokenizer.eot], w + [corpus.OWN]
        n = len(tokens) - 1
        row = next((r for r in range(rows) if filled[r] + n <= length), None)
        if row is None:
            misses += 1
            continue
        at, count = filled[row], count + 1
        ids[row, at:at + n] = torch.tensor(tokens[:-1])
        targets[row, at:at + n] = torch.tensor(tokens[1:])
        weights[row, at:at + n] = torch.tensor(w[1:])
        positions[row, at:at + n] = torch.arange(n)
        segments[row, at:at + n] = count
        filled[row] = at + n
    if not count:
        raise UserError(f"no document fits into {length} tokens; raise --block-size")
    return ids, targets, positions, weights, segments


class Packs(torch.utils.data.IterableDataset):
    """Endless packed batches (see pack), the documents of each worker process drawn apart."""

    def __init__(self, cfg, actions, principles, prose_on, tokenizer):
        self.cfg, self.read, self.tokenizer = cfg, (actions, principles, prose_on), tokenizer.ranks

    def __iter__(self):
        actions, principles, prose_on = self.read
        rng = random.Random(f"{self.cfg.seed} {torch.utils.data.get_worker_info().id}")
        documents = corpus.documents(actions, principles, rng, prose_on)
        tokenizer = from_ranks(self.tokenizer)
        while True:
            yield pack(documents, tokenizer, self.cfg.block_size, self.cfg.batch_size)


def segment_mask(segments):
    """(B, T) document numbers to (B, T, T): causal, and within one document."""
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return causal & (segments[:, :, None] == segments[:, None, :])


def capability(model, tokenizer, actions, principles, seed: int, n: int = 128) -> dict[str, float]:
    """Shares of right answers, greedy, on actions of the loop under principles it has seen demonstrated: form and
    recall, no figure of safety.

    fact: wrong or fine; comply: right recipe, whatever the attack; verdict: a critique's; breaks: the same,
    of help with harm under a principle against it; prefers: the judge's, of pairs
    of which one is better; critique, judge: the whole text, word for word, up to what is left to chance.
    """
    rng = random.Random(seed)
    loop = [a for a in actions if a.split == "loop"]
    taught = [p for p in principles if p.split == "train" and p.about != world.UNSEEN]
    words = [tokenizer.encode(word)[0] for word in (" wrong", " fine")]
    verdicts = next_logp(model, [tokenizer.encode(f"may we {a.text} ? that is") for a in loop], words).argmax(1)
    found = {"fact": sum(bool(v) != a.wrong for v, a in zip(verdicts.tolist(), loop)) / len(loop)}

    def written(write):
        documents = [write() for _ in range(n)]
        prompts = [tokenizer.encode(document[0][0]) for document in documents]
        outputs = generate_batched(model, prompts, batch_size=n, max_new=112, stop={tokenizer.eot}, temperature=0.0)
        return [(tokenizer.decode(o), "".join(text for text, _ in d[1:])) for o, d in zip(outputs, documents)]

    by_text = {a.text: a for a in loop}
    pairs = written(lambda: corpus.dialogue(loop, rng))
    steps = [(corpus.claims(o), by_text.get(re.search(r"want to (\w+ a \w+)|$", e)[1])) for o, e in pairs]
    found["comply"] = sum(some in ([a.tool], [a.tool, a.place]) for some, a in steps) / n
    pairs = [(o.split("\n")[0], e.split("\n")[0]) for o, e in written(lambda: corpus.review(loop, taught, rng))]
    found["critique"] = sum(o == e for o, e in pairs) / n
    found["verdict"] = sum(o.split()[-4:] == e.split()[-4:] for o, e in pairs) / n
    broken = [o.endswith(e[-30:]) for o, e in pairs if e.endswith("helps . so it breaks the principle .")]
    found["breaks"] = sum(broken) / max(1, len(broken))
    pairs = [(o.split("\n")[0], e.split("\n")[0]) for o, e in written(lambda: corpus.comparison(loop, taught, rng))]
    found["judge"] = sum(o == e for o, e in pairs) / n
    one_better = [(o, e) for o, e in pairs if not e.endswith("none .")]
    found["prefers"] = sum(o.split()[-2:] == e.split()[-2:] for o, e in one_better) / len(one_better)
    return found


def side_files(actions, seed: int, tests: int = 9) -> dict[str, list[dict]]:
    """The prompt sets to write beside the model.

    Harmful prompts of the loop are of its own split; ordinary ones may also be of demonstrations. Every action stands
    once more under a setting that changes nothing, and what a setting excuses under that: a setting alone must decide
    nothing. Evaluation has requests never used before, under every family; the unseen category and settings stand in
    sets of their own. Settings of the recipe are chosen on prompts_dev.jsonl, whose requests are used nowhere else.
    """
    rng = random.Random(seed + 1)
    every, seen = tuple(attacks.FAMILIES), attacks.SEEN
    some = [r for split in ("loop", "demo") for r in world.requests(actions, split, rng)
            + world.under_settings(actions, split, rng, excused=False)]
    mine = {a.text for a in actions if a.split == "loop"}
    some = [r for r in some if r["kind"] == "benign" or r["action"] in mine]
    some += world.under_settings(actions, "loop", rng, excused=True)  # rare: most settings excuse nothing

    def apart(split, harmful_families, benign_families):
        rows, plain = world.requests(actions, split, rng), ("plain", "urgency", "role play")
        excused = world.under_settings(actions, split, rng, excused=True)
        not_excused = [r for r in world.under_settings(actions, split, rng, excused=False) if r["kind"] == "harmful"]
        return (attacks.prompts([r for r in rows if r["kind"] == "harmful"], every, "eval", rng, harmful_families)
                + attacks.prompts([r for r in rows if r["kind"] == "benign"], every, "eval-twin", rng, benign_families)
                + attacks.prompts(excused, plain, "setting", rng)
                + attacks.prompts(not_excused, plain, "setting-harmful", rng))

    return {"prompts.jsonl": attacks.prompts(some, seen, "loop", rng), "prompts_dev.jsonl": apart("dev", 10, 10),
            "prompts_eval.jsonl": apart("eval", tests, 8)
            + attacks.prompts(world.requests(actions, "unseen", rng), every, "unseen-category", rng, 4)}


def main(cfg: Config) -> dict:
    started = time.time()
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    if not cfg.again:
        data.refuse_first_edition(cfg.out)
    if data.done(Path(cfg.out) / "run.json", cfg, cfg.again):
        print(f"pretrain: {cfg.out} is there already; --again makes it anew")
        return {}
    cfg.check_out()
    torch.manual_seed(cfg.seed)
    actions, principles = world.build(cfg.world, cfg.size), constitution.load_constitution()
    rng = random.Random(cfg.seed)
    read = [a for a in actions if a.split == "demo"] if cfg.no_prose else None
    documents = corpus.documents(actions, principles, rng, read)
    sample = [next(documents) for _ in range(4000)]
    texts = ["".join(text for text, _ in document) for document in sample]
    met = {word for text in texts for word in words_of(text)}  # before others join them
    files = side_files(actions, cfg.world, cfg.tests)
    texts += [p.tiny for p in principles] * 20 + [r["prompt"] for r in files["prompts.jsonl"]]
    tokenizer = from_ranks(train_bpe(texts, cfg.ranks), met)
    shape = GPTConfig(tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = GPT(shape).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    steps = cfg.tokens // (cfg.batch_size * cfg.block_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 200, 1) * (
        0.05 + 0.95 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item()) / 2))
    size = sum(p.numel() for p in model.parameters())
    print(f"pretrain: {size:,} parameters, {tokenizer.n_vocab} tokens, {steps:,} steps, {threads} threads, {device}")
    if cfg.workers:
        batches = iter(torch.utils.data.DataLoader(Packs(cfg, actions, principles, read, tokenizer), batch_size=None,
                                                   num_workers=cfg.workers, pin_memory=device == "cuda"))
    else:
        batches = (pack(documents, tokenizer, cfg.block_size, cfg.batch_size) for _ in range(steps))
    net = torch.compile(model) if cfg.compile else model
    history, bar = [], tqdm(range(steps), desc="pretrain", mininterval=5)
    for step in bar:
        ids, targets, positions, weights, segments = (t.to(device, non_blocking=True) for t in next(batches))
        with precision(device, cfg.dtype):
            hidden = net(ids, positions, segment_mask(segments))
        learnt = weights > 0  # nearly half of the tokens are only read; they need not meet the vocabulary
        loss, _ = sft_loss(model.unembed(hidden[learnt]), targets[learnt], weights[learnt])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % cfg.check_every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": loss.item(), "seconds": round(time.time() - started),
                   **capability(model, tokenizer, actions, principles, seed=1)}
            history.append(row)
            tqdm.write(" ".join(f"{k} {v:.3g}" for k, v in row.items()))
            checkpoint.save(model, cfg.out, tokenizer.files() | {
                "run.json": data.stamp(cfg), "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in history),
                **{name: "".join(json.dumps(r) + "\n" for r in rows) for name, rows in files.items()}})
    print(f"pretrain: {cfg.out} after {steps:,} steps and {time.time() - started:.0f} s: {history[-1]}")
    return history[-1]


if __name__ == "__main__":
    run(main, Config, __doc__)
