"""What a run will take, told before it begins: rows, tokens, steps, time, memory, disk.

    python -m mincai --preset gpt2-full --plan

Counted for every stage from the settings and the prompts alone; no weights are needed. All counts
are at most: every answer at its full length, every pair different, nothing left out. Rows and steps
follow from the settings exactly, tokens of texts are estimated (LETTERS). The time is tokens by the
three rates of speed.py, measured on the device at hand.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import train_ppo
from mincai import UserError, constitution
from mincai.lab import english, speed
from mincai.plumbing import formats, memory
from mincai.tinyworld import pretrain, world
from mincai.plumbing.checkpoint import read_config
from mincai.plumbing.cli import number_bytes
from mincai.constitution import dialogue
from mincai.model import GPTConfig
from mincai.plumbing.planner import KINDS, load_shots
from mincai.lab.speed import Rates
from mincai.plumbing.weights import SHAPES

# Of a token. By GPT-2's vocabulary plain English has 4.3 and the encoded attacks 3.5; the tiny
# world has 3.6 by its own.
LETTERS = 4


@dataclass(frozen=True)
class Stage:
    """One row of the table; tokens, steps, and bytes."""
    name: str
    rows: int         # that it writes, or draws
    read: int = 0     # tokens read without learning from them
    written: int = 0  # tokens sampled
    learnt: int = 0   # tokens of forward and backward, counted once an epoch and a network
    steps: int = 0    # of an optimiser
    memory: int = 0   # bytes on the device at once
    disk: int = 0     # bytes of what it leaves


# --- what there is to read ------------------------------------------------------------------------

def shape_of(base: str, pretraining=None) -> GPTConfig:
    """The model's shape: of a folder, of a published name, or of what is to be pretrained."""
    if Path(base).is_dir():
        return read_config(base)
    if base in SHAPES:
        return SHAPES[base]
    if pretraining is None:
        raise UserError(f"{base}: no such folder, and not one of {', '.join(SHAPES)}; "
                        f"check the path or the name")
    p = pretraining
    return GPTConfig(p.ranks + 1, p.block_size, p.n_layer, p.n_head, p.n_embd)


def prompts_of(configs) -> tuple[list[dict], list[dict]]:
    """(prompts of training, of evaluation): read, or made as the stage that writes them will.

    configs: {title: config} of the run's stages.
    """
    drawn, tested = configs["critique and revise"].prompts, configs["evaluate"].prompts
    made = {}
    if "write the prompts" in configs:
        written = configs["write the prompts"]
        made = {str(Path(written.out) / f"{name}.jsonl"): rows
                for name, rows in english.read(written).items()}
    elif "pretrain the base" in configs and not Path(tested).exists():
        p = configs["pretrain the base"]
        files = pretrain.side_files(world.build(p.world, p.size), p.world, tests=p.tests)
        made = {str(Path(p.out) / name): rows for name, rows in files.items()}
    loop = made.get(drawn) or formats.loop_prompts(drawn)
    return loop, made.get(tested) or formats.read_prompts(tested)


def tokens(text: str) -> int:
    return math.ceil(len(text) / LETTERS)


def lengths(rows) -> list[int]:
    """Tokens of each prompt, with what stands around it."""
    return [tokens(dialogue(row["prompt"], row.get("setting"))) for row in rows]


def take(rows, kind: str, number: int) -> int:
    """How many prompts of this kind data.choose gives; 0 asks for all."""
    there = sum(row["kind"] == kind for row in rows)
    return min(number, there) if number else there


def mean(numbers) -> int:
    return math.ceil(sum(numbers) / max(1, len(numbers)))


def shots_of(cfg, reasons=True) -> dict[str, int]:
    """{kind: tokens of all worked examples}, of which as many go in front of a prompt as fit."""
    principles = constitution.load_constitution(cfg.constitution)
    shots = load_shots(cfg.fewshot, principles, getattr(cfg, "wording", "full"), reasons)
    return {kind: sum(map(tokens, shots.get(kind, ()))) for kind in KINDS}


def ask_of(cfg, use: str) -> int:
    """Tokens of a principle, of all of them the mean."""
    principles = constitution.load_constitution(cfg.constitution)
    return mean([tokens(p.asks(use, cfg.wording)) for p in principles])


# --- the stages: from a config and what comes in to a Stage ---------------------------------------

def training_steps(rows: int, batch_size: int, epochs: int, accumulate=1) -> int:
    """Optimiser steps over `rows` rows, as train_sft and train_pm count them."""
    return epochs * math.ceil(math.ceil(rows / batch_size) / accumulate)


def dialogues(shape, loop, max_new: int) -> tuple[int, int]:
    """Tokens of a prompt and its answer: the mean, and the longest."""
    prompts = lengths(loop)
    return mean(prompts) + max_new, min(shape.block_size, max(prompts) + max_new)


def _sampling(cfg, shape, **more):
    size = number_bytes(getattr(cfg, "dtype", "float32"))
    return memory.needed(memory.plan("sample", shape, batch=cfg.batch_size, length=shape.block_size,
                                     dtype_bytes=size, cache_bytes=size, **more))


def _jsonl(rows: int, text: int, ids=0) -> int:
    """Bytes of rows with so many tokens as text, and so many as numbers; 400 are keys and names."""
    return rows * (400 + LETTERS * text + 7 * ids)


def critique(cfg, shape, loop) -> Stage:
    prompt, shots, room = mean(lengths(loop)), shots_of(cfg), shape.block_size - cfg.max_new
    ask = ask_of(cfg, "critique")
    rows = take(loop, "harmful", cfg.harmful) * cfg.responses + take(loop, "benign", cfg.helpful)
    first = min(room, shots["answer"] + prompt)
    review = min(room, shots["review"] + prompt + cfg.max_new + ask)
    revision = min(room, shots["review"] + prompt + 2 * cfg.max_new + ask)
    each = 1 + cfg.rounds * (1 if cfg.direct else 2)  # texts written
    read = first + cfg.rounds * (revision if cfg.direct else review + revision)
    return Stage("critique and revise", rows, rows * read, rows * each * cfg.max_new,
                 memory=_sampling(cfg, shape),
                 disk=_jsonl(rows, prompt + each * cfg.max_new + cfg.rounds * 40))


def sft(cfg, shape, loop, rows: int, max_new: int) -> Stage:
    """rows: of revisions; max_new: tokens of an answer at most."""
    train, (each, longest) = round(rows * (1 - cfg.holdout)), dialogues(shape, loop, max_new)
    found = memory.plan("sft", shape, batch=cfg.batch_size, length=longest,
                        dtype_bytes=number_bytes(cfg.dtype))
    return Stage("fine-tune on revisions", train, learnt=cfg.epochs * train * each,
                 steps=training_steps(train, cfg.batch_size, cfg.epochs, cfg.accumulate),
                 memory=memory.needed(found), disk=4 * memory.parameters(shape))


def feedback(cfg, shape, loop) -> Stage:
    prompt, shots = mean(lengths(loop)), shots_of(cfg, cfg.reasons)
    ask = ask_of(cfg, "compare")
    prompts = take(loop, "harmful", cfg.harmful) + take(loop, "benign", cfg.helpful)
    answers = cfg.samples + cfg.base_samples
    pairs = prompts * min(cfg.pairs or math.inf, math.comb(answers, 2))
    judged, reasons = pairs * cfg.ensemble * 2, cfg.max_new if cfg.reasons else 0  # both orders
    compare = min(shape.block_size - max(1, reasons),
                  shots["compare"] + prompt + 2 * cfg.max_new + ask)
    return Stage("AI feedback", pairs, prompts * prompt + judged * compare,
                 prompts * answers * cfg.max_new + judged * reasons,
                 memory=_sampling(cfg, shape, models=2, reads_on=cfg.reasons),
                 disk=_jsonl(pairs, prompt + 2 * cfg.max_new + reasons, ids=2 * cfg.max_new))


def pm(cfg, shape, loop, pairs: int, max_new: int) -> Stage:
    train, (each, longest) = round(pairs * (1 - cfg.holdout)), dialogues(shape, loop, max_new)
    found = memory.plan("pm", shape, batch=cfg.batch_size, length=longest,
                        micro_batch=cfg.micro_batch or cfg.batch_size,
                        dtype_bytes=number_bytes(cfg.dtype))
    return Stage("preference model", train, read=2 * (pairs - train) * each,
                 learnt=cfg.epochs * train * 2 * each,
                 steps=training_steps(train, cfg.batch_size, cfg.epochs),
                 memory=memory.needed(found), disk=4 * memory.parameters(shape))


def ppo(cfg, shape, loop) -> Stage:
    """Policy, reference, critic and preference model read all answers; policy and critic learn.
    Two looks at the policy, before and after, have answers of their own."""
    rows, size, (each, longest) = (cfg.updates * cfg.batch, number_bytes(cfg.dtype),
                                   dialogues(shape, loop, cfg.max_new))
    batch = min(cfg.batch, train_ppo.LOOKED_AT)
    answers = rows + 2 * (train_ppo.LOOKED_AT // batch * batch)
    kept = 1 + (cfg.updates // cfg.snapshots if cfg.snapshots else 0)
    found = memory.plan("ppo", shape, batch=cfg.batch, answer=cfg.max_new, length=longest,
                        micro_batch=min(cfg.micro_batch, cfg.batch // cfg.minibatches),
                        dtype_bytes=size, cache_bytes=size)
    return Stage("PPO", rows, answers * (5 * each - cfg.max_new), answers * cfg.max_new,
                 2 * cfg.epochs * rows * each, cfg.updates * cfg.epochs * cfg.minibatches,
                 memory.needed(found), disk=4 * kept * memory.parameters(shape))


def assess(cfg, shape, tested) -> Stage:
    """Three stages answer; all are scored and read thrice; two are judged against the base, in both
    orders."""
    rows = [r for r in tested if r.get("split", "").startswith(("eval", "unseen"))]
    number = sum(take(rows, kind, cfg.number) for kind in ("harmful", "benign"))
    prompt, shots, room = mean(lengths(rows)), shots_of(cfg), shape.block_size - cfg.max_new
    answered = min(room, shots["answer"] + prompt) + 2 * prompt + 3 * (3 * prompt + cfg.max_new)
    judged, each = 2 * 2 * number, min(room, shots["compare"] + prompt + 2 * cfg.max_new + 40)
    return Stage("evaluate", 3 * number, number * answered + judged * each,
                 (3 * number + judged) * cfg.max_new,
                 memory=_sampling(cfg, shape, models=3, reads_on=True),
                 disk=_jsonl(3 * number, 2 * prompt + cfg.max_new))


def evaluate(cfg, shape, tested) -> Stage:
    """Three stages answer, sampled and greedily, and their likeliest compliance is read. The judge is
    put to `judged` pairs twice, in both orders, and the critic twice, on two kinds of principles."""
    rows, prompt = len(tested), mean(lengths(tested))
    measured = cfg.judged * (2 * 2 + 2 * 2)
    return Stage("evaluate", 3 * rows, 9 * rows * prompt + measured * 2 * prompt,
                 (6 * rows + measured) * cfg.max_new, memory=_sampling(cfg, shape),
                 disk=_jsonl(3 * rows, 2 * prompt + cfg.max_new))


def pretraining(cfg, shape) -> Stage:
    steps = cfg.tokens // (cfg.batch_size * cfg.block_size)
    found = memory.plan("sft", shape, batch=cfg.batch_size, length=cfg.block_size,
                        dtype_bytes=number_bytes(cfg.dtype))
    rows = steps * cfg.batch_size
    return Stage("pretrain the base", rows, learnt=rows * cfg.block_size, steps=steps,
                 memory=memory.needed(found), disk=4 * memory.parameters(shape))


def stages(configs) -> list[Stage]:
    """The plan of a run. configs: {title: config} of its stages, in order, as __main__ has them."""
    get, found = configs.get, []
    shape = shape_of(configs["evaluate"].base, get("pretrain the base"))
    loop, tested = prompts_of(configs)
    if get("write the prompts"):
        rows = loop + tested
        found.append(Stage("write the prompts", len(rows),
                           disk=_jsonl(len(rows), 2 * mean(lengths(rows)))))
    if get("pretrain the base"):
        found.append(pretraining(get("pretrain the base"), shape))
    revised, judged = get("critique and revise"), get("AI feedback")
    found.append(critique(revised, shape, loop))
    tuned = get("fine-tune on revisions")
    learnt = found[-1].rows * (revised.rounds if tuned.rounds == "all" else 1)
    found.append(sft(tuned, shape, loop, learnt, revised.max_new))
    found.append(feedback(judged, shape, loop))
    found.append(pm(get("preference model"), shape, loop, found[-1].rows, judged.max_new))
    found.append(ppo(get("PPO"), shape, loop))
    graded = assess if hasattr(get("evaluate"), "fewshot") else evaluate
    return [*found, graded(get("evaluate"), shape, tested)]


# --- the table ------------------------------------------------------------------------------------

def duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(number: int) -> str:
    if not number:
        return "-"
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _count(number: int) -> str:
    if not number:
        return "-"
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number:,}"


def table(found: list[Stage], rates: list[Rates]) -> str:
    """The plan as text, one line a stage. rates: here, and of speed.CARD if that is to be told."""
    columns = dict(zip(("time here", "on a card"), rates))
    head = ["stage", "rows", "read", "written", "learnt", "steps", *columns, "memory", "disk"]
    lines = [head]
    for s in found:
        times = [duration(r.seconds(s)) for r in columns.values()]
        lines.append([s.name, *map(_count, (s.rows, s.read, s.written, s.learnt, s.steps)), *times,
                      _bytes(s.memory), _bytes(s.disk)])
    sums = [sum(getattr(s, name) for s in found) for name in ("read", "written", "learnt", "steps")]
    times = [duration(total(found, r)) for r in columns.values()]
    lines.append(["all of it", "", *map(_count, sums), *times, _bytes(max(s.memory for s in found)),
                  _bytes(sum(s.disk for s in found))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))])
            for name, *cells in lines]
    text.insert(-1, "-" * len(text[0]))
    told = [f"{name}: {r.source}: {r.read:,.0f} tokens/s read, {r.written:,.0f} written, "
            f"{r.learnt:,.0f} learnt from" for name, r in columns.items()]
    told.append(f"Counts are at most: answers at full length, nothing left out. "
                f"A token is {LETTERS} letters.")
    return "\n".join([*text, "", *told])


def total(found: list[Stage], rates: Rates) -> float:
    """Seconds of the whole run."""
    return sum(map(rates.seconds, found))


def _rates(configs, device: str) -> Rates:
    shape = shape_of(configs["evaluate"].base, configs.get("pretrain the base"))
    return speed.measure(shape, device, configs["PPO"].dtype)


def describe(configs, device: str, card: bool) -> str:
    """The whole plan as text; `card`: where there is no GPU, say beside it what one would take."""
    rates, judge = [_rates(configs, device)], configs["AI feedback"]
    if card and device == "cpu":
        shape = shape_of(judge.judge, configs.get("pretrain the base"))
        rates.append(speed.stated(shape, judge.batch_size))
    return table(stages(configs), rates)


def warning(configs, preset: str) -> str:
    """One line for a run that begins on a CPU with a preset that is made for a GPU."""
    rates = _rates(configs, "cpu")
    return (f"preset {preset} is made for a GPU; on this CPU it takes up to "
            f"{duration(total(stages(configs), rates))} (estimated; --plan tells more)")
