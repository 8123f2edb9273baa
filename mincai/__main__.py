"""The whole of Constitutional AI, one stage after the other, into one run folder.

    python -m mincai                     the tiny world: CPU, nothing to download, about five minutes
    python -m mincai --out runs/seed1 --seed 1

A stage whose output is there, made with the same settings, is skipped. To change more than these flags, run a stage
alone: python -m mincai.critique, train_sft.py, python -m mincai.feedback, train_pm.py, train_ppo.py,
python -m mincai.evaluate; each tells its flags with --help.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the three training scripts stand at the top level
    sys.path.insert(0, str(ROOT))

import train_pm  # noqa: E402
import train_ppo  # noqa: E402
import train_sft  # noqa: E402
from mincai import critique, evaluate, feedback  # noqa: E402
from mincai.cli import arg, pick_device, run, set_threads  # noqa: E402


@dataclass(frozen=True)
class Config:
    out: str = arg("runs/tiny", "the run folder")
    base: str = arg(str(ROOT / "data" / "tiny"), "the pretrained model, with prompts.jsonl and prompts_eval.jsonl")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets, for instance theft,harm,conduct")
    scale: float = arg(1.0, "share of the prompts and updates to use; small for a quick look")
    seed: int = arg(0, "seed of everything")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "make every stage anew")


def stages(cfg: Config) -> list[tuple[str, object, object]]:
    """(name, main, its config) of each stage, in order."""
    out, base = Path(cfg.out), Path(cfg.base)
    common = dict(seed=cfg.seed, device=cfg.device, threads=cfg.threads, again=cfg.again)
    drawn = dict(prompts=str(base / "prompts.jsonl"), only=cfg.only, without=cfg.without, **common)

    def part(number):
        return max(8, round(number * cfg.scale))

    critic, judged, ppo = critique.Config(), feedback.Config(), train_ppo.Config()
    return [
        ("critique and revise", critique.main, critique.Config(
            model=str(base), out=str(out / "revisions.jsonl"), harmful=part(critic.harmful),
            helpful=part(critic.helpful), **drawn)),
        ("fine-tune on revisions", train_sft.main, train_sft.Config(
            base=str(base), data=(str(out / "revisions.jsonl"),), out=str(out / "sft"), **common)),
        ("AI feedback", feedback.main, feedback.Config(
            model=str(out / "sft"), judge=str(base), out=str(out / "comparisons.jsonl"), harmful=part(judged.harmful),
            helpful=part(judged.helpful), **drawn)),
        ("preference model", train_pm.main, train_pm.Config(
            init=str(out / "sft"), pairs=str(out / "comparisons.jsonl"), out=str(out / "pm"), **common)),
        ("PPO", train_ppo.main, train_ppo.Config(
            sft=str(out / "sft"), pm=str(out / "pm"), prompts=str(base / "prompts.jsonl"), out=str(out / "ppo"),
            updates=max(2, round(ppo.updates * cfg.scale)), **common)),
        ("evaluate", evaluate.main, evaluate.Config(
            out=str(out), base=str(base), prompts=str(base / "prompts_eval.jsonl"), **common)),
    ]


def main(cfg: Config) -> None:
    started = time.time()
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    print(f"mincai: {cfg.base} -> {cfg.out}, seed {cfg.seed}, {device}, {threads} threads")
    todo = stages(cfg)
    for number, (name, stage, config) in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {name}", flush=True)
        stage(config)
    print(f"\nmincai: all of it in {time.time() - started:.0f} s. Talk with it: python -m mincai.chat {cfg.out}/ppo "
          f"--beside {cfg.base},{cfg.out}/sft")


if __name__ == "__main__":
    run(main, Config, __doc__)
