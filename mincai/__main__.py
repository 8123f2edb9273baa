"""The whole of Constitutional AI, one stage after the other, into one run folder.

    python -m mincai                     the tiny world: CPU, nothing to download, three to six minutes
    python -m mincai --out runs/seed1 --seed 1
    python -m mincai --preset gpt2       GPT-2's weights and English prompts, on one GPU (see presets.py)
    torchrun --nproc-per-node 4 -m mincai --preset gpt2       the same on four
    python -m mincai --preset gpt2-full  40,000 attacks to evaluate on, 200,000 comparisons to learn from
    python -m mincai --preset gpt2-full --plan     rows, tokens, time, memory and disk of each stage, and no more

A stage whose output is there, made with the same settings, is skipped. To change more than these flags, run a stage
alone: python -m mincai.critique, train_sft.py, python -m mincai.feedback, train_pm.py, train_ppo.py,
python -m mincai.lab.evaluate; each tells its flags with --help.
"""

import os
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
from mincai import UserError, critique, feedback  # noqa: E402
from mincai.lab import assess, english, evaluate, measure, plan  # noqa: E402
from mincai.plumbing import distributed, formats  # noqa: E402
from mincai.tinyworld import pretrain  # noqa: E402
from mincai.plumbing.cli import arg, check_choice, pick_device, run, set_threads  # noqa: E402
from mincai.plumbing.presets import PRESETS  # noqa: E402
from mincai.plumbing.tokenizer import load_tokenizer  # noqa: E402
from mincai.plumbing.weights import resolve  # noqa: E402


@dataclass(frozen=True)
class Config:
    preset: str = arg("tiny", f"which settings: {', '.join(PRESETS)}")
    out: str = arg("", "the run folder (default: runs/ and the preset's name)")
    base: str = arg("", "the pretrained model: a folder, or gpt2 and its sizes (default: the preset's)")
    prompts: str = arg("", "folder with prompts.jsonl and prompts_eval.jsonl (default: the preset's), or files to "
                           "train on: FILE,benign:FILE, as mincai.plumbing.formats reads them")
    only: str = arg("", "use these principle ids or targets only, commas between")
    without: str = arg("", "leave out these principle ids or targets, for instance theft,harm,conduct")
    scale: float = arg(1.0, "share of the prompts and updates to use; small for a quick look")
    seed: int = arg(0, "seed of everything")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")
    again: bool = arg(False, "make every stage anew")
    plan: bool = arg(False, "say what every stage will take, in rows, tokens, time, memory and disk, and stop")


def stages(cfg: Config) -> list[tuple[str, object, object]]:
    """(name, main, its config) of each stage, in order."""
    check_choice("preset", cfg.preset, tuple(PRESETS))
    preset = PRESETS[cfg.preset]
    out, base = Path(cfg.out or f"runs/{cfg.preset}"), cfg.base or preset.base
    folder = out / "prompts" if preset.write else Path(preset.prompts or base)
    drawn_from = str(folder / "prompts.jsonl")
    if cfg.prompts and os.path.isdir(cfg.prompts):
        folder, drawn_from = Path(cfg.prompts), str(Path(cfg.prompts) / "prompts.jsonl")
    elif cfg.prompts:  # files of one's own to train on; what is held out stays
        drawn_from = cfg.prompts
    common = dict(seed=cfg.seed, device=cfg.device, threads=cfg.threads, again=cfg.again)
    drawn = dict(prompts=drawn_from, only=cfg.only, without=cfg.without, **common)

    def scaled(Stage, name, *fields):
        """The preset's flags for a stage, with these counts scaled; 0, which means all, stays."""
        flags = getattr(preset, name)
        for field in fields:
            number = flags.get(field, getattr(Stage, field))
            flags = flags | {field: max(8 if field != "updates" else 2, round(number * cfg.scale)) if number else 0}
        if cfg.scale < 1 and preset.english:  # "all" of the English prompts is a number too
            flags = {k: max(8, round(800 * cfg.scale)) if k in ("harmful", "helpful", "number") and v == 0 else v
                     for k, v in flags.items()}
        return flags

    todo = []
    if preset.write and folder == out / "prompts":
        todo.append(("write the prompts", english.main, english.Config(
            folder=preset.prompts, out=str(folder), **scaled(english.Config, "write", "attacks"))))
    if preset.world and not cfg.base:
        todo.append(("pretrain the base", pretrain.main, pretrain.Config(
            out=base, device=cfg.device, threads=cfg.threads, **preset.world)))
    todo += [
        ("critique and revise", critique.main, critique.Config(
            model=base, out=str(out / "revisions.jsonl"), **drawn,
            **scaled(critique.Config, "critique", "harmful", "helpful"))),
        ("fine-tune on revisions", train_sft.main, train_sft.Config(
            base=base, data=(str(out / "revisions.jsonl"),), out=str(out / "sft"), **common, **preset.sft)),
        ("AI feedback", feedback.main, feedback.Config(
            model=str(out / "sft"), judge=base, out=str(out / "comparisons.jsonl"), **drawn,
            **scaled(feedback.Config, "feedback", "harmful", "helpful"))),
        ("preference model", train_pm.main, train_pm.Config(
            init=str(out / "sft"), pairs=(str(out / "comparisons.jsonl"),), prompts=drawn["prompts"],
            out=str(out / "pm"), **common, **preset.pm)),
        ("PPO", train_ppo.main, train_ppo.Config(
            sft=str(out / "sft"), pm=str(out / "pm"), prompts=drawn["prompts"], out=str(out / "ppo"), **common,
            **scaled(train_ppo.Config, "ppo", "updates"))),
    ]
    grade = assess if preset.english else evaluate
    todo.append(("evaluate", grade.main, grade.Config(
        out=str(out), base=base, prompts=str(folder / "prompts_eval.jsonl"), **common,
        **(scaled(assess.Config, "evaluate", "number") if preset.english else preset.evaluate))))
    return todo


def main(cfg: Config) -> None:
    started = time.time()
    todo, preset = stages(cfg), PRESETS[cfg.preset]
    configs = {name: config for name, _, config in todo}
    if cfg.plan:
        set_threads(cfg.threads)
        print(plan.describe(configs, pick_device(cfg.device), card=bool(preset.memory)))
        return
    threads, device = set_threads(cfg.threads), distributed.start(pick_device(cfg.device))
    say = print if distributed.is_main() else lambda *_, **__: None
    base, out = todo[-1][2].base, todo[-1][2].out
    say(f"mincai: {base} -> {out}, seed {cfg.seed}, {device}, {threads} threads"
        + (f"; preset {cfg.preset} needs {preset.memory}" if preset.memory else ""))
    for _, _, config in todo:
        config.check_out()  # before the first stage, not when the last one begins
    distributed.barrier()  # all have looked before one writes
    if preset.memory and device == "cpu" and distributed.is_main():
        print(f"mincai: {plan.warning(configs, cfg.preset)}", flush=True)
    made = Path(out) / "sft"  # of an older world, perhaps: its stages would be skipped as done
    if not cfg.again and made.is_dir() and os.path.isdir(base) and (
            load_tokenizer(made).ranks != load_tokenizer(base).ranks):
        raise UserError(f"{out}: is a run from another base than {base}, with another vocabulary; "
                        f"give another --out, or add --again to make it anew")
    if todo[0][1] is not pretrain.main:
        resolve(base)  # before an hour's work, not after it
    if todo[0][1] is critique.main or cfg.prompts:  # else the prompts are still to be made, of both kinds
        drawn_from = next(config.prompts for _, stage, config in todo if stage is critique.main)
        kinds = {row["kind"] for row in formats.loop_prompts(drawn_from)}
        if len(kinds) < 2:
            raise UserError(f"{drawn_from}: all prompts are {kinds.pop()}, and PPO needs both kinds; give "
                            f"--prompts FILE,benign:FILE")
    for number, (name, stage, config) in enumerate(todo, 1):
        say(f"\n[{number}/{len(todo)}] {name}", flush=True)
        if distributed.is_main() or stage not in (english.main, pretrain.main, evaluate.main, assess.main):
            if stage is train_ppo.main and not preset.english:
                stage(config, measure.watcher(todo[-1][2]))
            else:
                stage(config)  # one process writes or measures, the others wait for it
        distributed.barrier()
    say(f"\nmincai: all of it in {time.time() - started:.0f} s. Talk with it: python -m mincai.lab.chat {out}/ppo "
        f"--beside {base},{out}/sft")
    distributed.stop()


if __name__ == "__main__":
    run(main, Config, __doc__)
