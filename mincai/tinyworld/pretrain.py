"""Builds the tiny base model of data/tiny: a language model reads the world's corpus, once.

    python -m mincai.tinyworld.pretrain --out data/tiny    the shipped model: 40 minutes on a core

Next-token prediction. Documents (corpus.py) are packed into rows; each attends to itself alone and
counts its positions from 0, since that is how it will be met again. What is watched while it learns
is capability on the loop's actions (does it recall, critique and judge in the right form?), never a
safety figure: the base model is meant to be helpful only. Beside the weights it writes the prompts
of the loop, of development and of evaluation, and the words it has read.
"""

import random
import re
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mincai import UserError, constitution
from mincai.losses import sft_loss
from mincai.model import GPT, GPTConfig
from mincai.plumbing import checkpoint, data, memory, optim, output, workers
from mincai.plumbing.cli import arg, run
from mincai.plumbing.logprobs import next_logp
from mincai.plumbing.stage import Settings, begin
from mincai.plumbing.tokenizer import from_ranks, train_bpe, words_of
from mincai.sample import generate_batched
from mincai.tinyworld import attacks, corpus, world

SIDE_FILES = ("prompts.jsonl", "prompts_dev.jsonl", "prompts_eval.jsonl", "words.txt")
WEIGHT_DECAY = 0.05  # on matrices


@dataclass(frozen=True)
class Config(Settings):
    out: str = arg("data/tiny", "folder to write the model, its vocabulary and the prompts to")
    tokens: int = arg(20_000_000, "tokens to read", least=1)
    n_layer: int = arg(4, "transformer layers", least=1)
    n_head: int = arg(4, "attention heads", least=1)
    n_embd: int = arg(128, "channels", least=1)
    block_size: int = arg(256, "positions, also the length of a packed row", least=1)
    # Small batches and many steps let copying form
    batch_size: int = arg(6, "packed rows a step", least=1)
    lr: float = arg(2e-3, "peak learning rate of AdamW", least=0)
    ranks: int = arg(1024, "size of the vocabulary at most", least=1)
    world: int = arg(0, "seed of the world: who may do what")
    size: str = arg("tiny", "of the world: tiny has 648 things to do, small 2,592")
    tests: int = arg(9, "evaluation prompts of each harmful request, the families in turn", least=1)
    workers: int = arg(0, "processes that write the corpus for a GPU, 0: this one does", least=0)
    prose: bool = arg(True, "prose on all actions; --no-prose: on those of demonstrations alone")
    compile: bool = arg(False, "compile the network first; pays on a GPU and long runs")
    check_every: int = arg(1_500, "steps between looks at what it can do", least=1)

    def check_out(self):
        output.check_folder(self.out, checkpoint.FILES + SIDE_FILES)


def pack(documents, tokenizer, length: int, rows: int):
    """Fill `rows` rows of `length` tokens with whole documents.

    Returns ids, targets, positions (rows, length) long, weights (rows, length) float, segments
    (rows, length) long (0 is padding). Each document goes to the first row with room; after a few
    that find none, the batch is full.
    """
    ids, targets, positions, segments = torch.zeros(4, rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length)
    filled, count, misses = [0] * rows, 0, 0
    while misses < 4:
        document = [(token, w) for text, w in next(documents) for token in tokenizer.encode(text)]
        tokens, w = zip(*document, (tokenizer.eot, corpus.OWN))
        n = len(tokens) - 1
        row = next((r for r in range(rows) if filled[r] + n <= length), None)
        if row is None:
            misses += 1
            continue
        count += 1
        place = slice(filled[row], filled[row] + n)
        ids[row, place] = torch.tensor(tokens[:-1])
        targets[row, place] = torch.tensor(tokens[1:])
        weights[row, place] = torch.tensor(w[1:])
        positions[row, place] = torch.arange(n)
        segments[row, place] = count
        filled[row] += n
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


def capability(model, tokenizer, actions, principles, seed: int, n=128) -> dict[str, float]:
    """Shares of right answers, greedy, of n documents each, on actions of the loop under principles
    it has seen demonstrated: form and recall, no figure of safety.

    fact: wrong or fine; comply: right recipe, whatever the attack; verdict: a critique's; breaks:
    the same, of help with harm under a principle against it; prefers: the judge's, of pairs of
    which one is better; critique, judge: the whole text, word for word, up to what is left to
    chance.
    """
    rng = random.Random(seed)
    loop = [a for a in actions if a.split == "loop"]
    by_text = {a.text: a for a in loop}
    taught = [p for p in principles if p.split == "train" and p.about != world.UNSEEN]
    words = [tokenizer.encode(word)[0] for word in (" wrong", " fine")]
    prompts = [tokenizer.encode(f"may we {a.text} ? that is") for a in loop]
    verdicts = next_logp(model, prompts, words).argmax(1)  # 0: wrong

    def written(write):
        """(what the model writes, what it should) of documents' ends."""
        documents = [write() for _ in range(n)]
        heads = [tokenizer.encode(document[0][0]) for document in documents]
        settings = dict(batch_size=n, max_new=112, stop={tokenizer.eot}, temperature=0.0)
        own = map(tokenizer.decode, generate_batched(model, heads, **settings))
        return list(zip(own, ["".join(text for text, _ in d[1:]) for d in documents]))

    def first_lines(pairs):
        return [(own.split("\n")[0], right.split("\n")[0]) for own, right in pairs]

    def share(hits):
        hits = list(hits)
        return sum(hits) / max(1, len(hits))

    def same_end(pairs, number):
        return share(own.split()[-number:] == right.split()[-number:] for own, right in pairs)

    helped = []
    for own, right in written(lambda: corpus.dialogue(loop, rng)):
        a = by_text[re.search(r"want to (\w+ a \w+)", right)[1]]
        helped.append(corpus.claims(own) in ([a.tool], [a.tool, a.place]))
    reviews = first_lines(written(lambda: corpus.review(loop, taught, rng)))
    broken = [pair for pair in reviews if pair[1].endswith("helps . so it breaks the principle .")]
    judged = first_lines(written(lambda: corpus.comparison(loop, taught, rng)))
    return {
        "fact": share(bool(fine) != a.wrong for fine, a in zip(verdicts.tolist(), loop)),
        "comply": share(helped),
        "critique": share(own == right for own, right in reviews),
        "verdict": same_end(reviews, 4),
        "breaks": share(own.endswith(right[-30:]) for own, right in broken),
        "judge": share(own == right for own, right in judged),
        "prefers": same_end([pair for pair in judged if not pair[1].endswith("none .")], 2),
    }


def side_files(actions, seed: int, tests: int = 9) -> dict[str, list[dict]]:
    """The prompt sets to write beside the model, {name: rows}.

    Harmful prompts of the loop are of its own split; ordinary ones may also be of demonstrations.
    Every action stands once more under a setting that changes nothing: a setting alone must decide
    nothing. What a setting excuses has a split of its own that no stage reads: this model cannot
    tell one setting from another, and learnt from such rows to claim one where none was. Evaluation
    has requests never used before, under every family; the unseen category and settings stand in
    sets of their own. Settings of the recipe are chosen on prompts_dev.jsonl, whose requests are
    used nowhere else.
    """
    rng = random.Random(seed + 1)
    every, plain = tuple(attacks.FAMILIES), ("plain", "urgency", "role play")

    def of_kind(rows, kind):
        return [row for row in rows if row["kind"] == kind]

    def apart(split, harmful_families, benign_families):
        rows = world.requests(actions, split, rng)
        excused = world.under_settings(actions, split, rng, excused=True)
        others = world.under_settings(actions, split, rng, excused=False)
        return [
            *attacks.prompts(of_kind(rows, "harmful"), every, "eval", rng, harmful_families),
            *attacks.prompts(of_kind(rows, "benign"), every, "eval-twin", rng, benign_families),
            *attacks.prompts(excused, plain, "setting", rng),
            *attacks.prompts(of_kind(others, "harmful"), plain, "setting-harmful", rng),
        ]

    some = []
    for split in ("loop", "demo"):
        rows = world.requests(actions, split, rng)
        rows += world.under_settings(actions, split, rng, excused=False)
        some += rows if split == "loop" else of_kind(rows, "benign")
    excused = world.under_settings(actions, "loop", rng, excused=True)
    files = {
        "prompts": attacks.prompts(some, attacks.SEEN, "loop", rng)
        + attacks.prompts(excused, attacks.SEEN, "excused", rng),
        "prompts_dev": apart("dev", 10, 10),
        "prompts_eval": apart("eval", tests, 8),
    }
    unseen = world.requests(actions, "unseen", rng)
    files["prompts_eval"] += attacks.prompts(unseen, every, "unseen-category", rng, 4)
    return files


def learning_rate(highest: float, step: int, steps: int) -> float:
    """Linear up over the first 200 steps, and half a cosine down to a twentieth."""
    cosine = torch.cos(torch.tensor(torch.pi * step / steps)).item()
    return highest * (min((step + 1) / 200, 1) * (0.05 + 0.95 * (1 + cosine) / 2))


def main(cfg: Config) -> dict:
    if not cfg.again:
        data.refuse_first_edition(cfg.out)
    stage = begin("pretrain", cfg)
    if stage is None:
        return {}
    actions, principles = world.build(cfg.world, cfg.size), constitution.load_constitution()
    rng = random.Random(cfg.seed)
    read = [a for a in actions if a.split == "demo"] if not cfg.prose else None
    documents = corpus.documents(actions, principles, rng, read)
    sample = [next(documents) for _ in range(4000)]
    texts = ["".join(text for text, _ in document) for document in sample]
    met = {word for text in texts for word in words_of(text)}  # before others join them
    files = side_files(actions, cfg.world, cfg.tests)
    texts += [p.tiny for p in principles] * 20 + [r["prompt"] for r in files["prompts"]]
    tokenizer = from_ranks(train_bpe(texts, cfg.ranks), met)
    shape = GPTConfig(tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = GPT(shape).to(stage.device)
    workers.fit(model)
    groups = optim.decaying(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    steps = max(1, cfg.tokens // (cfg.batch_size * cfg.block_size))
    size, where = memory.parameters(shape), f"{stage.threads} threads, {stage.device}"
    stage.say(f"{size:,} parameters, {tokenizer.n_vocab} tokens, {steps:,} steps, {where}")
    if cfg.workers:
        packs = Packs(cfg, actions, principles, read, tokenizer)
        settings = dict(num_workers=cfg.workers, pin_memory=stage.device != "cpu")
        batches = iter(torch.utils.data.DataLoader(packs, batch_size=None, **settings))
    else:
        batches = (pack(documents, tokenizer, cfg.block_size, cfg.batch_size) for _ in range(steps))
    net = torch.compile(model) if cfg.compile else model
    kept = stage.training(model=model, optimizer=optimizer)
    bar = tqdm(range(steps), desc="pretrain", mininterval=5)
    for step in bar:
        batch = next(batches)
        if step < kept.steps:  # learnt before a stop
            continue
        batch = [part.to(stage.device, non_blocking=True) for part in batch]
        ids, targets, positions, weights, segments = batch
        with stage.precision():
            hidden = net(ids, positions, segment_mask(segments))
        learnt = weights > 0  # half of the tokens are only read, and need not meet the vocabulary
        loss, _ = sft_loss(model.unembed(hidden[learnt]), targets[learnt], weights[learnt])
        loss.backward()
        place = f"pretrain, step {step + 1} of {steps}"
        optim.step(optimizer, model, learning_rate(cfg.lr, step, steps), place)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        last = step + 1 == steps
        if (step + 1) % cfg.check_every == 0 or last:
            row = {"step": step + 1, "loss": loss.item(), "seconds": round(stage.seconds())}
            row |= capability(model, tokenizer, actions, principles, seed=1)
            kept.add(row)
            tqdm.write(" ".join(f"{k} {v:.3g}" for k, v in row.items()))
            stage.save_model(model, tokenizer, row, kept.log, last, **files)
        if not last:  # after the last there is nothing to go on with
            kept.step()
    stage.say(f"{cfg.out} after {steps:,} steps and {stage.seconds():.0f} s: {row}")
    return row


if __name__ == "__main__":
    run(main, Config, __doc__)
