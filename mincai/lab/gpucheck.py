"""What only a GPU can tell, in one command of under ten minutes: run it where a card is at hand.

    python -m mincai.lab.gpucheck

Four things, and their numbers with the card's name, date and commit at the end of
docs/BENCHMARKS.md:

1. CUDA graphs draw the tokens that the CPU draws, and bfloat16 log-probs are near float32's;
2. the tiny run, stage by stage: time and peak memory beside what plan.py and memory.py had said;
3. PPO in bfloat16 learns as in float32: score and KL of both, from the same checkpoints;
4. speeds and peak memory at GPT-2's shape, with random weights (bench.py).
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

import mincai.__main__ as pipeline
import train_ppo
from mincai import UserError, shipped
from mincai.lab import bench, plan
from mincai.plumbing import cli, data, memory, output
from mincai.plumbing.cli import arg

TYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    out: str = arg("runs/gpucheck", "folder for the tiny run, its PPO runs and gpucheck.json")
    notes: str = arg("docs/BENCHMARKS.md", "file to append the numbers to; empty for none")
    base: str = arg(shipped("tiny"), "the tiny model")
    model: str = arg("gpt2", f"shape to time with random weights: {', '.join(bench.SHAPES)}")
    seeds: int = arg(2, "runs of PPO in each type", least=1)
    scale: float = arg(1.0, "share of the tiny run's prompts and updates", least=1e-6)
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)


def run_stages(cfg, todo) -> list[dict]:
    """One row a stage of the run: seconds and peak bytes, as measured and as planned. todo: (name,
    stage, its config) of each."""
    planned = plan.stages({name: config for name, _, config in todo})
    rates = bench.rates(plan.shape_of(cfg.base), "cuda", "float32")
    rows = []
    for (name, stage, config), plans in zip(todo, planned, strict=True):
        print(f"\ngpucheck: {name}", flush=True)
        torch.cuda.reset_peak_memory_stats()
        started = time.time()
        stage(config)
        row = {"stage": name, "seconds": time.time() - started}
        row |= {"seconds planned": rates.seconds(plans), "peak planned": plans.memory}
        rows.append(row | {"peak": torch.cuda.max_memory_allocated()})
    return rows


def ppo_curves(cfg, usual) -> dict[str, list[dict]]:
    """{type: one {"score", "kl"} a seed, lists over the updates}, from the run's sft/ and pm/.
    usual: the config of its PPO."""
    found = {dtype: [] for dtype in TYPES}
    for dtype, seed in itertools.product(TYPES, range(cfg.seeds)):
        out = Path(cfg.out, f"ppo-{dtype}-{seed}")
        train_ppo.main(dataclasses.replace(usual, out=str(out), dtype=dtype, seed=seed))
        rows = data.read_jsonl(out / "metrics.jsonl")
        keys = {"score": "score", "kl": "kl_exact"}
        found[dtype].append({name: [row[key] for row in rows] for name, key in keys.items()})
    return found


def compare_curves(curves) -> dict[str, float]:
    """Of each type the mean score and KL over the last quarter of the updates; the largest gap
    between the two mean score curves; and between two seeds of one type, to hold it against."""
    found, means, spreads = {}, [], []
    for dtype, runs in curves.items():
        for name in ("score", "kl"):
            ends = [value for run in runs for value in run[name][-max(1, len(run[name]) // 4) :]]
            found[f"{dtype} {name}"] = fmean(ends)
        by_update = list(zip(*(run["score"] for run in runs)))
        means.append(map(fmean, by_update))
        spreads += [max(scores) - min(scores) for scores in by_update]
    found["gap between types"] = max(abs(a - b) for a, b in zip(*means))
    return found | {"gap between seeds": max(spreads)}


def time_shape(cfg) -> dict[str, float]:
    """bench.py's numbers at this shape in bfloat16, and what memory.py says of its PPO update."""
    how = dict(threads=cfg.threads, dtype="bfloat16", device="cuda", repeat=3)
    settings = bench.Config(model=cfg.model, **how)
    planned = memory.plan("ppo", bench.SHAPES[cfg.model], **bench.sizes(settings))
    return bench.main(settings) | {"PPO update: planned GB": memory.needed(planned) / 1e9}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown, an empty one before them."""
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def section(result, model) -> str:
    """What main found as a section of docs/BENCHMARKS.md."""
    gap, compared = result["checked"][bench.GAP], result["compared"]
    stages, speeds = [], []
    for row in result["stages"]:
        times = [f"{row['seconds']:.0f} s", plan.duration(row["seconds planned"])]
        peaks = [f"{row[name] / 1e6:,.0f} MB" for name in ("peak", "peak planned")]
        stages.append([row["stage"], *times, *peaks])
    for name, value in result["shape"].items():
        if name != bench.GAP:  # told above
            shown = f"{value:,.1f} GB" if name.endswith("GB") else f"{value:,.0f} tokens/s"
            speeds.append([name, shown])
    ends = [[d, f"{compared[f'{d} score']:+.3f}", f"{compared[f'{d} kl']:.3f}"] for d in TYPES]
    lines = [
        "",
        f"## {result['device']}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m mincai.lab.gpucheck`, commit {result['git']}, torch {result['torch']}. Graphs "
        f"draw the CPU's tokens. Log-probs in bfloat16 differ from float32's by {gap:.3f} at most.",
        *table(["the tiny run", "time", "planned", "peak memory", "planned"], stages),
        *table(["PPO on it, last quarter", "score", "KL, nats an answer"], ends),
        "",
        f"The two mean score curves are {compared['gap between types']:.3f} apart at most, two "
        f"seeds of one type {compared['gap between seeds']:.3f}.",
        *table([f"{model}'s shape, bfloat16", ""], speeds),
    ]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict:
    if not torch.cuda.is_available():
        advice = "this measures what only a GPU can tell; run it where there is one"
        raise UserError(f"PyTorch sees no GPU here, and {advice}")
    started, out = time.time(), Path(cfg.out, "gpucheck.json")
    output.check_file(out)
    if cfg.notes and not Path(cfg.notes).is_file():
        advice = "run it in the project's folder, or give --notes ''"
        raise UserError(f"{cfg.notes}: no such file to append to; {advice}")
    cli.set_threads(cfg.threads)
    settings = dict(base=cfg.base, scale=cfg.scale, threads=cfg.threads, device="cuda", again=True)
    todo = pipeline.stages(pipeline.Config(out=str(Path(cfg.out, "run")), **settings))
    usual = next(config for name, _, config in todo if name == "PPO")
    result = data.stamp(cfg, device=torch.cuda.get_device_name())
    result["checked"] = bench.check_gpu(bench.TINY)
    result["stages"] = run_stages(cfg, todo)
    result["curves"] = ppo_curves(cfg, usual)
    result["compared"] = compare_curves(result["curves"])
    result["shape"] = time_shape(cfg)
    result["seconds"] = time.time() - started
    data.write_json(out, result)
    text = section(result, cfg.model)
    print(text)
    if cfg.notes:
        with open(cfg.notes, "a", encoding="utf-8") as file:
            file.write(text)
    print(f"gpucheck: all of it in {result['seconds']:.0f} s -> {out} {cfg.notes}")
    return result


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
