"""What a run will take, told before it begins: rows, tokens, steps, time, memory, disk.

    python -m mincai --preset gpt2-full --plan

Counted for every stage from the settings and the prompts alone; no weights are needed. All counts
are at most: every answer at its full length, every pair different, nothing left out. Rows and steps
follow from the settings exactly, tokens of texts are estimated (LETTERS). The time is tokens by the
three rates of bench.py, measured on the device at hand.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import train_pm
import train_ppo
import train_sft
from mincai import UserError, constitution
from mincai.constitution import conversation_of
from mincai.lab import bench, english
from mincai.lab.bench import Rates
from mincai.lab.table import Table, as_text
from mincai.model import GPTConfig
from mincai.plumbing import formats, memory
from mincai.plumbing.checkpoint import read_config
from mincai.plumbing.planner import KINDS, load_shots
from mincai.plumbing.weights import SHAPES
from mincai.tinyworld import pretrain, world

# Of a token. By GPT-2's vocabulary plain English has 4.3 and the encoded attacks 3.5; the tiny
# world has 3.6 by its own.
LETTERS = 4


@dataclass(frozen=True)
class Stage:
    """One row of the table; tokens, steps, and bytes."""

    name: str
    rows: int  # that it writes, or draws
    read: int = 0  # tokens read without learning from them
    written: int = 0  # tokens sampled
    learnt: int = 0  # tokens of forward and backward, counted once an epoch and a network
    steps: int = 0  # of an optimiser
    memory: int = 0  # bytes on the device at once
    disk: int = 0  # bytes of what it leaves


# --- what there is to read ------------------------------------------------------------------------


def shape_of(base: str, pretraining=None) -> GPTConfig:
    """The model's shape: of a folder, of a published name, or of what is to be pretrained."""
    if Path(base).is_dir():
        return read_config(base)
    if base in SHAPES:
        return SHAPES[base]
    if pretraining is None:
        known = f"no such folder, and not one of {', '.join(SHAPES)}"
        raise UserError(f"{base}: {known}; check the path or the name")
    p = pretraining
    return GPTConfig(p.ranks + 1, p.block_size, p.n_layer, p.n_head, p.n_embd)


def _shape(configs) -> GPTConfig:
    """Of a run's models. configs, here and below: {title: config} of its stages."""
    return shape_of(configs["evaluate"].base, configs.get("pretrain the base"))


def prompts_of(configs) -> tuple[list[dict], list[dict]]:
    """(prompts of training, of evaluation): read, or made as the stage that writes them will."""
    drawn, tested = configs["critique and revise"].prompts, configs["evaluate"].prompts
    stage, files = configs.get("pretrain the base"), {}
    if "write the prompts" in configs:
        stage = configs["write the prompts"]
        files = english.read(stage)
    elif stage and not Path(tested).exists():
        files = pretrain.side_files(world.build(stage.world, stage.size), stage.world, stage.tests)
    made = {str(Path(stage.out, f"{name}.jsonl")): rows for name, rows in files.items()}
    if drawn in made:
        loop = [row for row in made[drawn] if row["split"] == "loop"]
    else:
        loop = formats.loop_prompts(drawn)
    return loop, made.get(tested) or formats.read_prompts(tested)


def tokens(text: str) -> int:
    return math.ceil(len(text) / LETTERS)


def lengths(rows) -> list[int]:
    """Tokens of each prompt, with what stands around it."""
    return [tokens(conversation_of(row)) for row in rows]


def mean(numbers) -> int:
    return math.ceil(sum(numbers) / max(1, len(numbers)))


def take(rows, kind: str, number: int) -> int:
    """How many prompts of this kind data.choose gives; 0 asks for all."""
    there = sum(row["kind"] == kind for row in rows)
    return min(number, there) if number else there


def shots_of(cfg, reasons=True) -> dict[str, int]:
    """{kind: tokens of all worked examples}, of which as many go in front of a prompt as fit."""
    principles = constitution.load_constitution(cfg.constitution)
    shots = load_shots(cfg.fewshot, principles, reasons)
    return {kind: sum(map(tokens, shots.get(kind, ()))) for kind in KINDS}


def ask_of(cfg, use: str) -> int:
    """Tokens of a principle, of all of them the mean."""
    principles = constitution.load_constitution(cfg.constitution)
    return mean([tokens(p.asks(use, bool(cfg.fewshot))) for p in principles])


# --- the stages: from a config and what comes in to a Stage ---------------------------------------


def training_steps(rows: int, batch_size: int, epochs: int) -> int:
    """Optimiser steps over `rows` rows, as train_sft and train_pm count them."""
    return epochs * math.ceil(rows / batch_size)


def dialogues(shape, loop, max_new: int) -> tuple[int, int]:
    """Tokens of a prompt and its answer: the mean, and the longest."""
    prompts = lengths(loop)
    return mean(prompts) + max_new, min(shape.block_size, max(prompts) + max_new)


def _memory(stage: str, cfg, shape, **sizes) -> int:
    """Bytes on the device at once. stage, sizes: as memory.plan asks for them."""
    dtype = getattr(cfg, "dtype", "float32")
    return memory.needed(memory.plan(stage, shape, dtype=dtype, **sizes))


def _weights(shape) -> int:
    """Bytes of a model on disk."""
    return 4 * memory.parameters(shape)


def _jsonl(rows: int, text: int, ids=0) -> int:
    """Bytes of rows with so many tokens as text, and so many as numbers; 400 are keys and names."""
    return rows * (400 + LETTERS * text + 7 * ids)


def _sampling(
    name: str, cfg, shape, rows: int, read: int, written: int, disk: int, **more
) -> Stage:
    """A stage that samples and judges. more: as memory.plan asks for it."""
    sizes = dict(batch=cfg.batch_size, length=shape.block_size, **more)
    needed = _memory("sample", cfg, shape, **sizes)
    return Stage(name, rows, read, written, memory=needed, disk=disk)


def critique(cfg, shape, loop) -> Stage:
    prompt, shots, room = mean(lengths(loop)), shots_of(cfg), shape.block_size - cfg.max_new
    rows = take(loop, "harmful", cfg.harmful) * cfg.responses + take(loop, "benign", cfg.helpful)
    review = shots["review"] + prompt + cfg.max_new + ask_of(cfg, "critique")
    revision = min(room, review + cfg.max_new)  # the critique is read as well
    round_read = revision if cfg.direct else min(room, review) + revision
    read = rows * (min(room, shots["answer"] + prompt) + cfg.rounds * round_read)
    written = (1 + cfg.rounds * (1 if cfg.direct else 2)) * cfg.max_new
    disk = _jsonl(rows, prompt + written + cfg.rounds * 40)
    return _sampling("critique and revise", cfg, shape, rows, read, rows * written, disk)


def _fitting(name: str, kind: str, cfg, shape, rows: int, side: tuple[int, int]) -> Stage:
    """Learning from `rows` rows, of two sides each if kind is "pm". side: tokens of one, the mean
    and the longest."""
    each, longest = side
    learnt = cfg.epochs * rows * each * (2 if kind == "pm" else 1)
    micro = cfg.micro_batch or cfg.batch_size
    needed = _memory(kind, cfg, shape, batch=cfg.batch_size, micro_batch=micro, length=longest)
    steps = training_steps(rows, cfg.batch_size, cfg.epochs)
    return Stage(name, rows, learnt=learnt, steps=steps, memory=needed, disk=_weights(shape))


def sft(cfg, shape, loop, rows: int, max_new: int) -> Stage:
    """rows: of revisions; max_new: tokens of an answer at most."""
    train, side = round(rows * (1 - train_sft.HOLDOUT)), dialogues(shape, loop, max_new)
    return _fitting("fine-tune on revisions", "sft", cfg, shape, train, side)


def feedback(cfg, shape, loop) -> Stage:
    prompt, shots = mean(lengths(loop)), shots_of(cfg, cfg.reasons)
    prompts = take(loop, "harmful", cfg.harmful) + take(loop, "benign", cfg.helpful)
    answers = cfg.samples + cfg.base_samples
    pairs = prompts * min(cfg.pairs or math.inf, math.comb(answers, 2))
    judged, reasons = pairs * cfg.ensemble * 2, cfg.max_new if cfg.reasons else 0  # both orders
    compare = shots["compare"] + prompt + 2 * cfg.max_new + ask_of(cfg, "compare")
    read = prompts * prompt + judged * min(shape.block_size - max(1, reasons), compare)
    written = prompts * answers * cfg.max_new + judged * reasons
    disk = _jsonl(pairs, prompt + 2 * cfg.max_new + reasons, ids=2 * cfg.max_new)
    counts = (pairs, read, written, disk)
    return _sampling("AI feedback", cfg, shape, *counts, models=2, reads_on=cfg.reasons)


def pm(cfg, shape, loop, pairs: int, max_new: int) -> Stage:
    train, side = round(pairs * (1 - train_pm.HOLDOUT)), dialogues(shape, loop, max_new)
    learning = _fitting("preference model", "pm", cfg, shape, train, side)
    return replace(learning, read=2 * (pairs - train) * side[0])


def ppo(cfg, shape, loop) -> Stage:
    """Policy, reference, critic and preference model read all answers; policy and critic learn.
    Two looks at the policy, before and after, have answers of their own."""
    rows, (each, longest) = cfg.updates * cfg.batch_size, dialogues(shape, loop, cfg.max_new)
    batch = min(cfg.batch_size, train_ppo.LOOKED_AT)
    answers = rows + 2 * (train_ppo.LOOKED_AT // batch * batch)
    learnt = 2 * cfg.epochs * rows * each
    tokens = (answers * (5 * each - cfg.max_new), answers * cfg.max_new, learnt)
    steps = cfg.updates * cfg.epochs * cfg.minibatches
    micro = min(cfg.micro_batch, cfg.batch_size // cfg.minibatches)
    sizes = dict(batch=cfg.batch_size, micro_batch=micro, answer=cfg.max_new, length=longest)
    needed = _memory("ppo", cfg, shape, **sizes)
    return Stage("PPO", rows, *tokens, steps, needed, _weights(shape))


def assess(cfg, shape, tested) -> Stage:
    """Three stages answer; all are scored and read thrice; two are judged against the base, in both
    orders."""
    rows = [r for r in tested if r.get("split", "").startswith(("eval", "unseen"))]
    number = sum(take(rows, kind, cfg.number) for kind in ("harmful", "benign"))
    prompt, shots, room = mean(lengths(rows)), shots_of(cfg), shape.block_size - cfg.max_new
    answered = min(room, shots["answer"] + prompt) + 2 * prompt + 3 * (3 * prompt + cfg.max_new)
    judged, each = 2 * 2 * number, min(room, shots["compare"] + prompt + 2 * cfg.max_new + 40)
    read, written = number * answered + judged * each, (3 * number + judged) * cfg.max_new
    counts = (3 * number, read, written, _jsonl(3 * number, 2 * prompt + cfg.max_new))
    return _sampling("evaluate", cfg, shape, *counts, models=3, reads_on=True)


def evaluate(cfg, shape, tested) -> Stage:
    """Three stages answer, sampled and greedily, and their likeliest compliance is read. The judge
    is put to `judged` pairs twice, in both orders, and the critic twice, on two kinds of
    principles."""
    rows, prompt = len(tested), mean(lengths(tested))
    measured = cfg.judged * (2 * 2 + 2 * 2)
    read, written = (9 * rows + 2 * measured) * prompt, (6 * rows + measured) * cfg.max_new
    disk = _jsonl(3 * rows, 2 * prompt + cfg.max_new)
    return _sampling("evaluate", cfg, shape, 3 * rows, read, written, disk)


def answers(cfg, shape, loop) -> Stage:
    """Three stages answer prompts of one's own; the base alone is shown examples."""
    number = sum(take(loop, kind, cfg.most) for kind in ("harmful", "benign"))
    prompt, room = mean(lengths(loop)), shape.block_size - cfg.max_new
    read = number * (min(room, shots_of(cfg)["answer"] + prompt) + 2 * prompt)
    written, disk = 3 * number * cfg.max_new, _jsonl(number, prompt + 3 * cfg.max_new)
    return _sampling("answer your prompts", cfg, shape, number, read, written, disk)


def pretraining(cfg, shape) -> Stage:
    steps = max(1, cfg.tokens // (cfg.batch_size * cfg.block_size))
    rows = steps * cfg.batch_size
    needed = _memory("sft", cfg, shape, batch=cfg.batch_size, length=cfg.block_size)
    work = dict(learnt=rows * cfg.block_size, steps=steps)
    return Stage("pretrain the base", rows, **work, memory=needed, disk=_weights(shape))


def stages(configs) -> list[Stage]:
    """The plan of a run, its stages in order, as __main__ has them."""
    shape, (loop, tested), found = _shape(configs), prompts_of(configs), []
    if "write the prompts" in configs:
        rows, text = len(loop + tested), 2 * mean(lengths(loop + tested))
        found.append(Stage("write the prompts", rows, disk=_jsonl(rows, text)))
    if "pretrain the base" in configs:
        found.append(pretraining(configs["pretrain the base"], shape))
    revising, tuning = configs["critique and revise"], configs["fine-tune on revisions"]
    judging, grading = configs["AI feedback"], configs["evaluate"]
    revised, judged = critique(revising, shape, loop), feedback(judging, shape, loop)
    rows = revised.rows * (revising.rounds if tuning.learn == "all" else 1)
    found += [revised, sft(tuning, shape, loop, rows, revising.max_new), judged]
    found.append(pm(configs["preference model"], shape, loop, judged.rows, judging.max_new))
    found.append(ppo(configs["PPO"], shape, loop))
    found.append((assess if hasattr(grading, "fewshot") else evaluate)(grading, shape, tested))
    if "answer your prompts" in configs:
        found.append(answers(configs["answer your prompts"], shape, loop))
    return found


# --- the table ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number:,}"


def whole(found: list[Stage]) -> Stage:
    """All stages as one row: sums, and the most memory; what they write is no sum of rows."""
    names = ("read", "written", "learnt", "steps", "disk")
    sums = {name: sum(getattr(stage, name) for stage in found) for name in names}
    return Stage("all of it", 0, memory=max(stage.memory for stage in found), **sums)


def total(found: list[Stage], rates: Rates) -> float:
    """Seconds of the whole run."""
    return rates.seconds(whole(found))


def describe(configs, device: str, card: bool) -> str:
    """The whole plan as text, one line a stage; `card`: where there is no GPU, say beside it what
    one would take."""
    shape, found = _shape(configs), stages(configs)
    columns = {"time here": bench.rates(shape, device, configs["PPO"].dtype)}
    if card and device == "cpu":
        columns["on a card"] = bench.stated(shape, configs["AI feedback"].batch_size)
    head, rows = ["rows", "read", "written", "learnt", "steps", *columns, "memory", "disk"], []
    for s in [*found, whole(found)]:
        counts = [_count(n) if n else "-" for n in (s.rows, s.read, s.written, s.learnt, s.steps)]
        times = [duration(rates.seconds(s)) for rates in columns.values()]
        sizes = [_bytes(n) if n else "-" for n in (s.memory, s.disk)]
        rows.append([s.name, *counts, *times, *sizes])
    at_most = "Counts are at most: answers at full length, nothing left out."
    caption = f"{at_most} A token is {LETTERS} letters."
    lines = [as_text([Table(caption, head, rows)]).lstrip("\n"), ""]
    for name, r in columns.items():
        read, written, learnt = (f"{each:,.0f}" for each in (r.read, r.written, r.learnt))
        speeds = f"{read} tokens/s read, {written} written, {learnt} learnt from"
        lines.append(f"{name}: {r.source}: {speeds}")
    # two networks, each with the optimiser's two moments; the new state is written beside the old
    state = _bytes(2 * 2 * 3 * _weights(shape))
    return "\n".join([*lines, f"while PPO trains, its state takes up to {state} more disk"])


def warning(configs, preset: str) -> str:
    """One line for a run that begins on a CPU with a preset that is made for a GPU."""
    rates = bench.rates(_shape(configs), "cpu", configs["PPO"].dtype)
    took = duration(total(stages(configs), rates))
    made_for = f"preset {preset} is made for a GPU"
    return f"{made_for}; on this CPU it takes up to {took} (estimated; --plan tells more)"
