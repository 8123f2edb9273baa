"""The whole of Constitutional AI, one stage after the other, into one run folder.

    python -m mincai                     the tiny world: CPU, nothing to download, three to six minutes
    python -m mincai --out runs/seed1 --seed 1
    python -m mincai --preset gpt2       GPT-2's weights and English prompts, on one GPU (see presets.py)
    torchrun --nproc-per-node 4 -m mincai --preset gpt2       the same on four
    python -m mincai --preset gpt2-full  40,000 attacks to evaluate on, 250,000 comparisons to learn from
    python -m mincai --preset gpt2-full --plan     rows, tokens, time, memory and disk of each stage, and no more

A stage whose output is there, made with the same settings, is skipped; one that was stopped goes
on. To change more than these flags, run a stage alone: python -m mincai.critique, train_sft.py,
python -m mincai.feedback, train_pm.py, train_ppo.py, python -m mincai.lab.evaluate; each tells its
flags with --help.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import train_pm
import train_ppo
import train_sft
from mincai import UserError, constitution, critique, feedback
from mincai.lab import answers, assess, english, evaluate, measure, plan
from mincai.plumbing import cli, distributed, formats, lock
from mincai.plumbing.cli import arg
from mincai.plumbing.presets import PRESETS
from mincai.plumbing.tokenizer import load_tokenizer
from mincai.plumbing.weights import resolve
from mincai.tinyworld import pretrain


@dataclass(frozen=True)
class Config:
    preset: str = arg("tiny", "which settings", choices=tuple(PRESETS))
    out: str = arg("", "the run folder; none: runs/ and the preset's name")
    base: str = arg("", "the pretrained model: a folder, or gpt2 and its sizes; none: the preset's")
    prompts: str = arg(
        "", "folder with prompts.jsonl and prompts_eval.jsonl, or FILE,benign:FILE to train on"
    )
    constitution: str = arg("", "file of principles; none: those that are shipped")
    without: str = arg("", "leave out these principle ids or targets, commas between")
    scale: float = arg(1.0, "share of prompts and updates; small for a quick look", least=1e-6)
    seed: int = arg(0, "seed of everything")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)
    again: bool = arg(False, "make every stage anew")
    plan: bool = arg(False, "say what rows, time and memory each stage takes, and stop")


# Stages of one process, for which the others wait
ONE_WRITES = (english.main, pretrain.main, evaluate.main, assess.main, answers.main)
SCALED = ("harmful", "helpful", "attacks", "number", "updates")  # flags that --scale multiplies
ALL_ENGLISH = 800  # prompts, about: what 0 stands for, where a share of all is asked for


def stages(cfg: Config) -> list[tuple[str, object, object]]:
    """(name, main, its config) of each stage, in order."""
    cli.check(cfg)
    preset = PRESETS[cfg.preset]
    out, base = Path(cfg.out or f"runs/{cfg.preset}"), cfg.base or preset.base
    folder = out / "prompts" if preset.write else Path(preset.prompts or base)
    if cfg.prompts and os.path.isdir(cfg.prompts):
        folder = Path(cfg.prompts)
    train_on = str(folder / "prompts.jsonl")
    if cfg.prompts and not os.path.isdir(cfg.prompts):  # files of one's own; what is held out stays
        train_on = cfg.prompts
    revisions, comparisons = str(out / "revisions.jsonl"), str(out / "comparisons.jsonl")
    sft, pm = str(out / "sft"), str(out / "pm")

    todo = []

    def add(name, module, flags, **more):
        """A stage with the preset's flags, counts scaled, and those that the run gives."""
        every = {flag: field.default for flag, field in module.Config.__dataclass_fields__.items()}
        for flag in set(SCALED) & set(every):
            number = flags.get(flag, every[flag])
            if number == 0 and preset.english and cfg.scale < 1:
                number = ALL_ENGLISH
            if number:
                least = 2 if flag == "updates" else 8
                flags = flags | {flag: max(least, round(number * cfg.scale))}
        shared = dict(seed=cfg.seed, device=cfg.device, threads=cfg.threads, again=cfg.again)
        shared = {flag: value for flag, value in shared.items() if flag in every}
        todo.append((name, module.main, module.Config(**shared | flags | more)))

    if preset.write and folder == out / "prompts":
        where = dict(folder=preset.prompts, out=str(folder))
        add("write the prompts", english, preset.write, seed=0, **where)
    if preset.world and not cfg.base:
        add("pretrain the base", pretrain, preset.world, out=base, seed=0, again=False)
    principles = dict(constitution=cfg.constitution or str(constitution.PATH))
    drawn = dict(prompts=train_on, without=cfg.without, **principles)
    add("critique and revise", critique, preset.critique, model=base, out=revisions, **drawn)
    add("fine-tune on revisions", train_sft, preset.sft, model=base, data=(revisions,), out=sft)
    add("AI feedback", feedback, preset.feedback, model=sft, judge=base, out=comparisons, **drawn)
    scaled_on = dict(pairs=(comparisons,), prompts=train_on)
    add("preference model", train_pm, preset.pm, model=sft, out=pm, **scaled_on)
    add("PPO", train_ppo, preset.ppo, model=sft, pm=pm, prompts=train_on, out=str(out / "ppo"))
    held_out = dict(
        base=base, prompts=str(folder / "prompts_eval.jsonl"), out=str(out), **principles
    )
    add("evaluate", assess if preset.english else evaluate, preset.evaluate, **held_out)
    if cfg.prompts:
        shared = answers.Config.__dataclass_fields__
        sampling = {flag: value for flag, value in preset.evaluate.items() if flag in shared}
        where = dict(base=base, prompts=train_on, out=str(out), **principles)
        add("answer your prompts", answers, sampling, **where)
    return todo


def check(cfg, todo) -> None:
    """UserError for what would stop the run later: said before an hour's work, not after it."""
    configs = {name: config for name, _, config in todo}
    base, out = configs["evaluate"].base, configs["evaluate"].out
    train_ppo.check(configs["PPO"])  # its batches may not be for as many processes
    for config in configs.values():
        config.check_out()
    distributed.barrier()  # all have looked before one writes
    made = Path(out) / "sft"  # of an older world, perhaps: its stages would be skipped as done
    if not cfg.again and made.is_dir() and os.path.isdir(base):
        if load_tokenizer(made).ranks != load_tokenizer(base).ranks:
            raise UserError(
                f"{out}: is a run from another base than {base}, with another vocabulary; give another --out, or "
                f"add --again to make it anew"
            )
    if "pretrain the base" not in configs:
        resolve(base)
    # else prompts are still to be made, of both kinds
    if todo[0][1] is critique.main or cfg.prompts:
        prompts = configs["critique and revise"].prompts
        kinds = {row["kind"] for row in formats.loop_prompts(prompts)}
        if len(kinds) < 2:
            raise UserError(
                f"{prompts}: all prompts are {kinds.pop()}, and PPO needs both kinds; give --prompts "
                f"FILE,benign:FILE"
            )


def main(cfg: Config) -> None:
    started = time.time()
    todo, preset = stages(cfg), PRESETS[cfg.preset]
    configs = {name: config for name, _, config in todo}
    threads = cli.set_threads(cfg.threads)
    if cfg.plan:
        print(plan.describe(configs, cli.pick_device(cfg.device), card=bool(preset.memory)))
        return
    device = distributed.start(cli.pick_device(cfg.device))
    base, out = configs["evaluate"].base, configs["evaluate"].out

    def say(text):
        if distributed.is_main():
            print(text, flush=True)

    needs = f"; preset {cfg.preset} needs {preset.memory}" if preset.memory else ""
    say(f"mincai: {base} -> {out}, seed {cfg.seed}, {device}, {threads} threads{needs}")
    if preset.memory and device == "cpu" and distributed.is_main():
        say(f"mincai: {plan.warning(configs, cfg.preset)}")
    check(cfg, todo)
    # what lies outside, a base, other runs may use meanwhile: its stage holds it alone
    results = [getattr(config, "result", config.out) for config in configs.values()]
    written = [result for result in results if Path(out) in Path(result).parents]
    with lock.alone(*[out, *written] if distributed.is_main() else []):
        for number, (name, stage, config) in enumerate(todo, 1):
            say(f"\n[{number}/{len(todo)}] {name}")
            if stage is train_ppo.main and not preset.english:
                stage(config, measure.watcher(configs["evaluate"]))
            elif stage not in ONE_WRITES:
                stage(config)
            elif distributed.is_main():
                with distributed.single():
                    stage(config)
            distributed.barrier()
    say(
        f"\nmincai: all of it in {time.time() - started:.0f} s. Talk with it: python -m mincai.lab.chat "
        f"{out}/ppo --beside {base},{out}/sft"
    )
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
