"""Kills every stage at many moments and goes on each time: python tests/core/kills.py [kills a stage]

A stage runs once undisturbed, in a process of its own, and its events are counted: lines of a
journal, rows of metrics, states, renames. Then it runs again and again in one folder, each run
killed (SIGKILL) at an event some way on: half-way through the writing of it, just before or just
after, until one run comes to the end. Rows and weights have to be those of the undisturbed run, to
the bit, and nothing else may lie about. Prints a table; exit code 1 where something differs.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import safetensors.torch
from compare_runs import content

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_pm  # noqa: E402
import train_ppo  # noqa: E402
import train_sft  # noqa: E402
from mincai import critique, feedback  # noqa: E402
from mincai.plumbing import progress  # noqa: E402
from mincai.tinyworld import pretrain  # noqa: E402

TINY = str(ROOT / "data" / "tiny")
FEW = dict(device="cpu", threads=1, batch_size=8)
SMALL = [(train_pm, "NORMALISED", 8), (train_ppo, "LOOKED_AT", 8)]  # answers that are measured
SMALL += [(pretrain, "capability", lambda *_, **__: {"fact": 0.5})]


def stages(made: Path, out: Path) -> dict:
    """{name: (main, config, output)}: small, each on what the undisturbed ones before it made."""
    sft, pm = str(made / "sft"), str(made / "pm")
    asks = dict(model=TINY, harmful=12, helpful=6, rounds=2, max_new=96)
    judges = dict(model=sft, judge=TINY, harmful=4, helpful=4, samples=3, pairs=2, max_new=96)
    learns = dict(model=sft, pairs=(str(made / "comparisons.jsonl"),), contrast=0.0)
    acts = dict(model=sft, pm=pm, updates=4, max_new=24, micro_batch=4, kl_target=1.0)
    reads = dict(tokens=8 * 2 * 256, n_layer=1, n_head=2, n_embd=32, check_every=3)
    found = {
        "pretrain": (pretrain, reads | {"batch_size": 2}, "base"),
        "critique": (critique, asks, "revisions.jsonl"),
        "train_sft": (train_sft, dict(model=TINY, data=(str(made / "revisions.jsonl"),)), "sft"),
        "feedback": (feedback, judges, "comparisons.jsonl"),
        "train_pm": (train_pm, learns, "pm"),
        "train_ppo": (train_ppo, acts, "ppo"),
    }
    return {
        name: (module.main, module.Config(out=str(out / where), **FEW | flags), out / where)
        for name, (module, flags, where) in found.items()
    }


class Events:
    """Counts what is written down, and at a chosen event kills this process."""

    def __init__(self, kill_at: int, how: str):
        self.count, self.kill_at, self.how = 0, kill_at, how

    def around(self, half, whole):
        """Do `whole`, an event; at the chosen one die before it, in `half` of it, or after it."""
        self.count += 1
        if self.count != self.kill_at:
            return whole()
        if self.how == "middle":
            half()
        elif self.how == "after":
            whole()
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        """Journals, metrics, states and renames count from now on."""
        replace, save, rename = os.replace, safetensors.torch.save_file, Path.rename
        add, row = progress.Journal.add, progress.Training.add

        def cut(file, line):
            file.write(line[: len(line) // 2])
            file.flush()

        def save_half(tensors, path, *args, **how):
            def half():
                save(tensors, path, *args, **how)
                os.truncate(path, os.path.getsize(path) // 2)

            self.around(half, lambda: save(tensors, path, *args, **how))

        os.replace = lambda a, b: self.around(lambda: None, lambda: replace(a, b))
        Path.rename = lambda a, b: self.around(lambda: None, lambda: rename(a, b))
        progress.save_file = save_half
        progress.Journal.add = lambda journal, items, results: self.around(
            lambda: cut(journal.file, b'{"call": 0, "items": [0, 1], "results": [[1, 2'),
            lambda: add(journal, items, results),
        )
        progress.Training.add = lambda training, some: self.around(
            lambda: cut(training.file, b'{"step": 1, "loss": 2.0'), lambda: row(training, some)
        )


def run(main, cfg, kill_at=0, how="") -> tuple[int, int]:
    """(exit code, events seen) of this stage in a process of its own; -9 if it was killed."""
    context = multiprocessing.get_context("fork")
    seen = context.Value("i", 0)

    def work():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        progress.SAVE_EVERY, progress.SHARE = 0.0, float("inf")  # a state at every step
        for module, name, number in SMALL:
            setattr(module, name, number)
        events = Events(kill_at, how)
        events.install()
        main(cfg)
        seen.value = events.count

    process = context.Process(target=work)
    process.start()
    process.join()
    return process.exitcode, seen.value


def contents(path: Path) -> dict:
    """{file: what is in it} of an output, without what says when and where it was made."""
    files = [path, progress_free(path)] if path.is_file() else sorted(path.rglob("*"))
    kinds = (".json", ".jsonl", ".safetensors")
    return {f.name: content(f) for f in files if f.is_file() and f.suffix in kinds}


def progress_free(path):
    """The stamp of a file of rows."""
    return path.with_suffix(".run.json")


def torment(main, cfg, output, number, rng) -> tuple[int, int]:
    """(kills, runs that went on) until the stage has come to its end; RuntimeError where a run
    fails by itself. number: about how many kills."""
    folder, kills, went_on = output.parent, 0, 0
    total = run(main, cfg)[1]
    want = contents(output)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    step = max(1, total // max(1, number))
    for k in range(10 * number):
        how = ("before", "middle", "after")[k % 3]
        went_on += os.path.exists(progress.place(output) / "run.json")
        # the last ones are let through: the events of the end are fewer than the steps before it
        code, _ = run(main, cfg, rng.randint(1, 2 * step) if kills < number else 0, how)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RuntimeError(f"exit code {code} after {kills} kills")
        kills += 1
    if code != 0:
        raise RuntimeError("it never came to its end")
    if contents(output) != want:
        raise RuntimeError(f"other bits after {kills} kills")
    expected = {output.name} | ({progress_free(output).name} if output.suffix else set())
    left = {path.name for path in folder.iterdir()} - expected
    if left:
        raise RuntimeError(f"left behind: {sorted(left)}")
    return kills, went_on


def main(number: int) -> int:
    """Prints the table; the number of kills, or -1 where something differs."""
    total, fine = 0, True
    with tempfile.TemporaryDirectory() as folder:
        made, tried = Path(folder, "made"), Path(folder, "tried")
        print(f"{'stage':10} {'kills':>5} {'went on':>8}  same bits")
        for name, (stage, cfg, _) in stages(made, made).items():
            if name != "pretrain":
                assert run(stage, cfg)[0] == 0, name
            out = tried / name
            out.mkdir(parents=True)
            stage, cfg, output = stages(made, out)[name]
            kills, went_on = 0, 0
            try:
                while kills < number:
                    rng = random.Random(f"{name} {kills}")
                    some = torment(stage, cfg, output, number - kills, rng)
                    shutil.rmtree(out)
                    out.mkdir()
                    kills, went_on = kills + some[0], went_on + some[1]
                told = "yes"
            except RuntimeError as error:
                told, fine = f"no: {error}", False
            total += kills
            print(f"{name:10} {kills:5} {went_on:8}  {told}", flush=True)
    return total if fine else -1


if __name__ == "__main__":
    found = main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
    print(f"{found} kills" if found > 0 else "something differs")
    sys.exit(found < 0)
