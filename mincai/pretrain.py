"""Builds the tiny base model of data/tiny: read the world's corpus (corpus.py), keep what was learnt.

    python -m mincai.pretrain --out runs/first                                  the shipped model in four parts
    python -m mincai.pretrain --init runs/first --out runs/second --focus 0.5 --tokens 5000000 --lr 1e-3 --seed 1
    python -m mincai.pretrain --init runs/second --out runs/third --focus 0.5 --tokens 5000000 --lr 1e-3 --seed 2 \\
        --average 0.9 --average-with runs/first
    python -m mincai.pretrain --init runs/third --out data/tiny --focus 0.25 --tokens 5000000 --lr 1e-3 --seed 3 \\
        --lies 0.4 --average 0.5

(About 80 minutes on one core; the result is shipped.) Comparing two words is what the model learns last, so the second
and third part show it in half of the documents; the weights are then averaged with the first part's. The fourth shows
answers that help with harm and call it fine: a critic or judge that has never met such a lie believes it.

One language model, one corpus, next-token prediction. Documents are packed into rows; each attends to itself alone
and counts its positions from 0, since that is how it will be met again. What is watched while it learns is capability
on the loop's actions (does it recall, critique and judge in the right form?), never a safety figure: the base model
is meant to be helpful only. Beside the weights it writes the prompts of the loop and of evaluation, and a sample of
the corpus that fine-tuning may replay.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mincai import checkpoint, constitution, corpus, data, output, red_team, world
from mincai.cli import arg, pick_device, precision, run, set_threads
from mincai.logprobs import next_logp
from mincai.losses import sft_loss
from mincai.model import GPT, GPTConfig
from mincai.sample import generate_batched
from mincai.tokenizer import from_ranks, load_tokenizer, train_bpe

SIDE_FILES = ("prompts.jsonl", "prompts_dev.jsonl", "prompts_eval.jsonl", "replay.jsonl")


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "device", "threads", "again")
    out: str = arg("data/tiny", "folder to write the model, its vocabulary and the prompts to")
    init: str = arg("", "folder of a model to go on from, with its vocabulary; none starts from random weights")
    average: float = arg(1.0, "share of the new weights in what is written, the rest is --average-with's; 1: new alone")
    average_with: str = arg("", "folder of the other weights; none: --init")
    focus: float = arg(0.0, "share of documents that show how an answer is checked word by word, beside the usual ones")
    lies: float = arg(0.0, "share of demonstrated help with harm that calls the thing fine, to be seen through")
    tokens: int = arg(15_000_000, "tokens to read")
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
    return ids, targets, positions, weights, segments


class Packs(torch.utils.data.IterableDataset):
    """Endless packed batches (see pack), the documents of each worker process drawn apart."""

    def __init__(self, cfg, actions, principles, prose_on, tokenizer):
        self.cfg, self.read, self.tokenizer = cfg, (actions, principles, prose_on), tokenizer.ranks

    def __iter__(self):
        actions, principles, prose_on = self.read
        rng = random.Random(f"{self.cfg.seed} {torch.utils.data.get_worker_info().id}")
        documents = corpus.documents(actions, principles, rng, prose_on, self.cfg.focus, self.cfg.lies)
        tokenizer = from_ranks(self.tokenizer)
        while True:
            yield pack(documents, tokenizer, self.cfg.block_size, self.cfg.batch_size)


def segment_mask(segments):
    """(B, T) document numbers to (B, T, T): causal, and within one document."""
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return causal & (segments[:, :, None] == segments[:, None, :])


def capability(model, tokenizer, actions, principles, seed: int, n: int = 96) -> dict[str, float]:
    """Share of held-out documents that the model completes word for word as the corpus would, by kind; greedy.

    On actions of the loop, under principles it has read demonstrated: form and recall, no verdict on safety.
    """
    rng = random.Random(seed)
    loop = [a for a in actions if a.split == "loop"]
    taught = [p for p in principles if p.split == "train" and p.about != world.UNSEEN]
    writers = {"comply": lambda: corpus.dialogue(loop, rng),
               "critique": lambda: corpus.review(loop, taught, rng),
               "judge": lambda: corpus.comparison(loop, taught, rng, with_reasons=1.0),
               "direct": lambda: corpus.comparison(loop, taught, rng, with_reasons=0.0)}
    words = [tokenizer.encode(word)[0] for word in (" wrong", " fine")]
    verdicts = next_logp(model, [tokenizer.encode(f"may we {a.text} ? that is") for a in loop], words).argmax(1)
    found = {"fact": sum(bool(v) != a.wrong for v, a in zip(verdicts.tolist(), loop)) / len(loop)}
    for name, write in writers.items():
        prompts, expected = [], []
        for _ in range(n):
            document = write()
            prompts.append(tokenizer.encode(document[0][0]))
            expected.append("".join(text for text, _ in document[1:]))
        outputs = generate_batched(model, prompts, batch_size=n, max_new=112, stop={tokenizer.eot}, temperature=0.0)
        pairs = [(tokenizer.decode(o), e) for o, e in zip(outputs, expected)]
        if name == "judge":  # a tie's letter is a coin: compare what comes before it
            pairs = [(o.split("\n")[0], e.split("\n")[0]) for o, e in pairs]
        found[name] = sum(o == e for o, e in pairs) / n
        if name == "critique":
            verdict = [o.split("the answer")[-1].split("\n")[0] == e.split("the answer")[-1].split("\n")[0]
                       for o, e in [(o.split("\n")[0], e.split("\n")[0]) for o, e in pairs]]
            found["verdict"] = sum(verdict) / n
        if name == "judge":
            found["prefers"] = sum(o.split()[-2:] == e.split()[-2:] for o, e in pairs) / n
    return found


def averaged(model, cfg, device):
    """The model itself, or a copy whose weights lie between an earlier model's and its own (Wortsman et al. 2022,
    2109.01903): what was learnt last, and most of what training on it had begun to wear away."""
    other = cfg.average_with or cfg.init
    if not other or cfg.average == 1:
        return model
    first, new = checkpoint.load(other, device), model.state_dict()
    first.load_state_dict({k: (1 - cfg.average) * v + cfg.average * new[k] for k, v in first.state_dict().items()})
    return first


def side_files(actions, seed: int, prose_on=None, tests: int = 9) -> dict[str, list[dict]]:
    """The rows to write beside the model: prompt sets, and prose for fine-tuning to replay.

    Harmful prompts of the loop are of its own split; ordinary ones may also be of demonstrations. Evaluation has
    requests never used before, under every family; the unseen category and dual use stand in sets of their own.
    Settings are chosen on prompts_dev.jsonl, whose requests are used nowhere else. prose_on: the actions that
    prose speaks of (default: all); what is replayed never speaks of a held-out one.
    """
    rng = random.Random(seed + 1)
    every, seen = tuple(red_team.FAMILIES), red_team.SEEN
    loop = world.requests(actions, "loop", rng)
    helpful = [r for r in world.requests(actions, "demo", rng) if r["kind"] == "benign"]
    dual = world.dual_requests(actions, "loop") + world.dual_requests(actions, "demo")
    rows = red_team.prompts(loop + helpful + dual, seen, "loop", rng)
    test, dev = (world.requests(actions, split, rng) for split in ("eval", "dev"))

    def both(requests, split, harmful_families, benign_families):
        return (red_team.prompts([r for r in requests if r["kind"] == "harmful"], every, split, rng, harmful_families)
                + red_team.prompts([r for r in requests if r["kind"] == "benign"], every, f"{split}-twin", rng,
                                   benign_families))

    told = [a for a in prose_on or actions if a.split in ("demo", "loop")]
    replay = ["".join(text for text, _ in corpus.prose(told, rng)) for _ in range(600)]
    return {"prompts.jsonl": rows, "prompts_dev.jsonl": both(dev, "eval", 10, 10),
            "prompts_eval.jsonl": both(test, "eval", tests, 8)
            + red_team.prompts(world.requests(actions, "unseen", rng), every, "unseen-category", rng, 4)
            + red_team.prompts(world.dual_requests(actions, "eval"), ("plain", "urgency", "role play"), "setting", rng),
            "replay.jsonl": [{"text": text} for text in replay]}


def main(cfg: Config) -> dict:
    started = time.time()
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    if data.done(Path(cfg.out) / "run.json", cfg, cfg.again):
        print(f"pretrain: {cfg.out} is there already; --again makes it anew")
        return {}
    cfg.check_out()
    torch.manual_seed(cfg.seed)
    actions, principles = world.build(cfg.world, cfg.size), constitution.load_constitution()
    rng = random.Random(cfg.seed)
    read = [a for a in actions if a.split == "demo"] if cfg.no_prose else None
    documents = corpus.documents(actions, principles, rng, read, cfg.focus, cfg.lies)
    sample = [next(documents) for _ in range(4000)]
    texts = ["".join(text for text, _ in document) for document in sample]
    files = side_files(actions, cfg.world, read, cfg.tests)
    texts += [p.tiny for p in principles] * 20 + [r["prompt"] for r in files["prompts.jsonl"]]
    tokenizer = load_tokenizer(cfg.init) if cfg.init else from_ranks(train_bpe(texts, cfg.ranks))
    shape = GPTConfig(tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = checkpoint.load(cfg.init, device) if cfg.init else GPT(shape).to(device)
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
            logits = model.unembed(net(ids, positions, segment_mask(segments)))
        loss, _ = sft_loss(logits, targets, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % cfg.check_every == 0 or step + 1 == steps:
            kept = averaged(model, cfg, device)
            row = {"step": step + 1, "loss": loss.item(), "seconds": round(time.time() - started),
                   **capability(kept, tokenizer, actions, principles, seed=1)}
            history.append(row)
            tqdm.write(" ".join(f"{k} {v:.3g}" for k, v in row.items()))
            checkpoint.save(kept, cfg.out, tokenizer.files() | {
                "run.json": data.stamp(cfg), "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in history),
                **{name: "".join(json.dumps(r) + "\n" for r in rows) for name, rows in files.items()}})
    print(f"pretrain: {cfg.out} after {steps:,} steps and {time.time() - started:.0f} s: {history[-1]}")
    return history[-1]


if __name__ == "__main__":
    run(main, Config, __doc__)
