"""How fast, and how much memory: sampling, judging and learning on this machine.

    python -m mincai.lab.bench                          a table of many pieces of work
    python -m mincai.lab.bench --against transformers   ... and the same work there, by turns
    python -m mincai.lab.bench --against FOLDER         ... and in another checkout of mincai
    python -m mincai.lab.bench --model gpt2 --dtype bfloat16   one shape: steps, peak memory

Weights are random, of the shape asked for: speed does not depend on them. On a GPU it first checks
what only a GPU can tell: that replayed graphs draw the tokens that the CPU draws, and that bfloat16
log-probs are near those of float32. Times are the median of several repetitions after a first one
that is not counted, with the device waited for. "of the roofline" is the share of the speed that
the machine's bytes and matrix operations a second would allow, both as measured here in float32.
One thread's time is the processor's, which other work on the machine moves less than the wall's.

That takes a while. `rates` are three speeds in a few seconds (reading, writing, learning), by which
plan.py says what a run will take before it begins.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch

from mincai.lab import works
from mincai.lab.works import Work
from mincai.model import GPT, GPTConfig
from mincai.plumbing import cli, data, memory, output, weights, workers
from mincai.plumbing.cli import arg, precision
from mincai.plumbing.logprobs import answer_logp
from mincai.sample import generate

TINY = GPTConfig(vocab_size=1001, block_size=256, n_layer=4, n_head=4, n_embd=128)
SHAPES = {"tiny": TINY, **weights.SHAPES}
# A card to plan for where none is at hand, its operations and its bytes a second
CARD = "an A10 of 24 GB, by its data sheet, at 30% of its speed"
CARD_FLOPS, CARD_BYTES = 0.3 * 125e12, 0.3 * 600e9
GAP = "bfloat16 log-probs, largest difference"


@dataclass(frozen=True)
class Config:
    model: str = arg(
        "", f"only this shape: {', '.join(SHAPES)}; empty for the table", choices=("", *SHAPES)
    )
    against: str = arg("", "of the table: transformers, or the folder of another mincai")
    batch: int = arg(
        64,
        "(this and the next three: of one shape) rows sampled together, and answers of a PPO update",
        least=1,
    )
    micro_batch: int = arg(16, "rows of one training forward", least=1)
    prompt: int = arg(64, "tokens of a prompt", least=1)
    max_new: int = arg(48, "tokens of an answer", least=1)
    repeat: int = arg(5, "repetitions of each measurement", least=1)
    dtype: str = arg("float32", "of matrix products", choices=("float32", "bfloat16"))
    out: str = arg("", "JSON file to write, none if empty")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)


def median_seconds(work, repeat, device) -> float:
    """Seconds that work() takes, the median of `repeat` calls after one that is not counted."""
    return statistics.median([works.seconds(work, 0, device) for _ in range(repeat + 1)][1:])


# --- the table ------------------------------------------------------------------------------------


def rows(device) -> list[Work]:
    """What is timed: sampling by batch, what shares a prompt, learning; and how the time grows."""
    wide = (64, 256, 512) if device == "cuda" else (8, 32)
    return [
        *(Work("sampling", "tiny", batch, 32, 64) for batch in (1, 8, 32, 64)),
        *(Work("sampling", "gpt2", batch, 32, 16) for batch in wide),
        Work("one prompt", "tiny", 16, 128, 48),
        Work("one prompt", "gpt2", 16, 128, 16),
        Work("judging", "gpt2", 4, 970, header=780),
        Work("SFT step", "tiny", 32, 96),
        Work("PPO update", "tiny", 64, 32, 32),
        *(Work("sampling", "tiny", 8, 32, new) for new in (240, 480, 960)),
        *(Work("sampling", shape, 8, 32, 16) for shape in ("tiny", "256 wide", "512 wide")),
    ]


def compare(work: Work, mine, other, repeat: int) -> dict:
    """Seconds of the work by turns, medians after a first turn that is not counted."""
    here, there, lacks = [], [], None if other else "no peer"
    for _ in range(repeat + 1):
        here.append(mine(work))
        if not lacks:
            try:
                told = other(work)
            except NotImplementedError as error:
                told = str(error)
            lacks = told if isinstance(told, str) else None
            there.append(told)
    row = {"work": work.name, "seconds": statistics.median(here[1:])}
    row["tokens_per_s"] = work.tokens / row["seconds"]
    if lacks:
        return row | {"lacks": lacks}
    ratios = sorted(b / a for a, b in zip(here[1:], there[1:]))
    row |= {"peer_seconds": statistics.median(there[1:]), "ratio": statistics.median(ratios)}
    return row | {"least_ratio": ratios[0], "largest_ratio": ratios[-1]}


def table(cfg, threads, device) -> dict:
    """The table, printed row by row as it is measured."""
    how, found = (threads, device, cfg.dtype), []
    with works.peer(cfg.against, how) as other:
        workers.use(threads)
        torch.set_num_threads(threads)
        bandwidth, rate = works.ceilings(threads, device)
        print(f"bench: {bandwidth / 1e9:.1f} GB/s read, {rate / 1e9:,.0f} GFLOP/s in float32")
        print(f"{'':58} {'ms':>8} {'tokens/s':>9} {'of the roofline':>16}")
        mine = works.clock(works.in_mincai, *how)
        for work in rows(device):
            row = compare(work, mine, other, cfg.repeat)
            row["of_roofline"] = works.least_seconds(work, bandwidth, rate) / row["seconds"]
            found.append(row)
            told = f"{row['seconds'] * 1e3:8,.1f} {row['tokens_per_s']:9,.0f} {row['of_roofline']:16.0%}"
            if "ratio" in row:
                told += "  {ratio:.2f}x ({least_ratio:.2f} to {largest_ratio:.2f})".format(**row)
            elif other:
                told += f"  lacking there: {row['lacks']}"
            print(f"{work.name:58} {told}", flush=True)
    return {"bytes_per_s": bandwidth, "operations_per_s": rate, "rows": found}


# --- whole steps, at full size --------------------------------------------------------------------


def check_gpu(config) -> dict[str, float]:
    """What a GPU must agree on with the CPU; AssertionError where it does not."""
    torch.manual_seed(0)
    model = GPT(config)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in (5, 9, 17, 3)]

    def draw():
        generator = torch.Generator().manual_seed(1)
        return generate(model, prompts, 24, {1}, generator=generator).lists()

    here = draw()
    logp = answer_logp(model, prompts, here)
    model.cuda()
    assert draw() == here, "graphs on the GPU draw other tokens than the CPU"
    with precision("cuda", "bfloat16"):
        low = answer_logp(model, prompts, here)
        draw()  # captures under autocast as well
    gap = max(float((a - b).abs().max()) for a, b in zip(logp, low))
    assert gap < 0.1, f"bfloat16 log-probs are {gap:.3f} off"
    return {GAP: gap}


def sizes(cfg: Config) -> dict:
    """Of a PPO update, as memory.plan asks for them."""
    tokens = dict(length=cfg.prompt + cfg.max_new, answer=cfg.max_new)
    rows = dict(batch=cfg.batch, micro_batch=cfg.micro_batch)
    return tokens | rows | dict(dtype=cfg.dtype)


def measure(config, cfg, threads, device) -> dict[str, float]:
    """{what: tokens a second}, of sampled tokens for sampling, else of all tokens that a step
    reads."""
    shape = (config.n_layer, config.n_head, config.n_embd, config.vocab_size)
    answers, length = (shape, cfg.batch, cfg.prompt, cfg.max_new), cfg.prompt + cfg.max_new
    row, found = (shape, cfg.micro_batch, length), {}
    works_of = {
        "sampling": Work("sampling", *answers),
        "SFT step": Work("SFT step", *row, masked=0),
        "logits, there and back": Work("logits", *row),
        "preference step": Work("preference step", shape, 2 * cfg.micro_batch, length),
        "PPO update": Work("PPO update", *answers, micro=cfg.micro_batch, epochs=1),
    }
    for name, work in works_of.items():
        # a clock of its own: what the one before held is let go
        mine = works.clock(works.in_mincai, threads, device, cfg.dtype)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = work.tokens if name == "sampling" else work.rows * length
        found[name] = tokens / compare(work, mine, None, cfg.repeat)["seconds"]
        if device == "cuda":
            found[f"{name}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


# --- three rates, for a plan ----------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Tokens a second, and where the numbers come from."""

    read: float
    written: float
    learnt: float
    source: str

    def seconds(self, work) -> float:
        """work: anything that counts its tokens as read, written and learnt."""
        return work.read / self.read + work.written / self.written + work.learnt / self.learnt


def rates(shape: GPTConfig, device: str, dtype: str) -> Rates:
    """Those of a model of this shape with random weights, here: forward, and sampling.

    Learning counts as three times a forward with its logits (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1). Of a deep model one and three blocks are timed, and the others count as much. A
    CPU is timed in float32: products in bfloat16 are slower there, a hundredfold on some.
    """

    def shortest(work):  # of two calls, for what else the machine does only adds to them
        return min(median_seconds(work, 1, device) for _ in range(2))

    started, slow = time.time(), device == "cpu" and memory.parameters(shape) > 5e6
    dtype = dtype if device == "cuda" else "float32"
    depths = (1, 3) if shape.n_layer > 4 else (shape.n_layer,)
    rows, length, new = (8, 32, 4) if slow else (64, 96, 16)
    length, new = min(length, shape.block_size), min(new, shape.block_size - 1)
    timed = []  # of each depth: seconds a token read, written, learnt from
    for depth in depths:
        model = GPT(dataclasses.replace(shape, n_layer=depth)).to(device)
        workers.fit(model)
        ids = torch.randint(shape.vocab_size, (rows, length), device=device)
        prompts = ids[:, :1].tolist()
        with torch.no_grad(), precision(device, dtype):
            read = shortest(lambda: model(ids)) / ids.numel()
            learn = 3 * shortest(lambda: model.unembed(model(ids))) / ids.numel()
            write = shortest(lambda: generate(model, prompts, new, set())) / (rows * new)
        timed.append((read, write, learn))
    more = (shape.n_layer - depths[0]) / max(1, depths[-1] - depths[0])
    whole = [first + more * max(0.0, last - first) for first, last in zip(timed[0], timed[-1])]
    name = f"this CPU with {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    took = time.time() - started
    source = f"measured on {name}, {dtype}, random weights, in {took:.0f} s"
    return Rates(*(1 / seconds for seconds in whole), source)


def stated(shape: GPTConfig, rows: int) -> Rates:
    """Rates of CARD in bfloat16: 2 operations a parameter and token forward, 6 with backward
    (Kaplan et al. 2020); one token of `rows` answers at once reads all weights, 2 bytes each."""
    numbers = memory.parameters(shape)
    forward, written = CARD_FLOPS / (2 * numbers), rows * CARD_BYTES / (2 * numbers)
    return Rates(forward, min(forward, written), forward / 3, CARD)


def main(cfg: Config) -> dict:
    if cfg.out:
        output.check_file(cfg.out)
    threads, device = cli.set_threads(cfg.threads), cli.pick_device(cfg.device)
    found = check_gpu(TINY) if device == "cuda" else {}
    if cfg.model:
        config = SHAPES[cfg.model]
        memory.announce("ppo", config, device, "--batch or --micro-batch", **sizes(cfg))
        found |= measure(config, cfg, threads, device)
        what = f"{memory.parameters(config):,} parameters"
    else:
        found |= table(cfg, threads, device)
        what = "the table"
    stamp = data.stamp(cfg, found=found)
    where = f"{cfg.dtype}, {stamp['device']}, {threads} threads, torch {torch.__version__}"
    print(f"bench: {what}, {where}")
    for name, number in found.items() if cfg.model else ():
        told = f"{number:12,.3f}" if name == GAP or "GB" in name else f"{number:12,.0f} tokens/s"
        print(f"  {name:42} {told}")
    if cfg.out:
        data.write_json(cfg.out, stamp)
    return found


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
