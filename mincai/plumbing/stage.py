"""How every stage of the loop begins and ends. What it does stands in between, in its own file.

stage = begin("train_sft", cfg)
if stage is None:
    return {"skipped": True}
(folder,), tokenizer, (config,) = stage.open(cfg.model)
stage.plan_memory("sft", config, "--micro-batch", batch=16, length=256)
...
stage.save_model(model, tokenizer, metrics, log)
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from mincai import Diverged
from mincai.plumbing import card, checkpoint, cli, data, distributed, lock, memory, output, progress
from mincai.plumbing.cli import arg
from mincai.plumbing.weights import common_tokenizer, resolve


@dataclass(frozen=True)
class Settings:
    """The flags that every stage has. Its own Config adds the others, `out` among them."""

    LOOSE = ("out", "device", "threads", "again")  # settings that do not make another result
    seed: int = arg(0, "seed of everything that is drawn")
    dtype: str = arg("float32", "of matrix products", choices=("float32", "bfloat16"))
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)
    again: bool = arg(False, "make the output anew though it is there")

    @property
    def result(self) -> str:
        """What the stage makes, a file or a folder; `out`, but for those that write into a run."""
        return self.out

    def check_out(self):
        """UserError unless the output, a checkpoint's folder, may be written."""
        output.check_folder(self.out, checkpoint.FILES)


@dataclass(frozen=True)
class Stage:
    """A stage that has begun."""

    name: str
    cfg: Settings
    device: str
    threads: int
    started: float
    inputs: dict  # of what it reads: files may change while it works
    hold: lock.Held | None = None  # the output, held until it is there or the stage is dropped

    def say(self, text: str) -> None:
        """Print above any progress bar, once however many processes there are."""
        if distributed.is_main():
            tqdm.write(f"{self.name}: {text}")

    def warn(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(f"  WARNING: {text}")

    def seconds(self) -> float:
        return time.time() - self.started

    def precision(self):
        """A context for forward passes; see cli.precision."""
        return cli.precision(self.device, self.cfg.dtype)

    def open(self, *models: str):
        """(folders, the vocabulary they share, their shapes); fetches a published model."""
        folders = [resolve(model) for model in models]
        return folders, common_tokenizer(*folders), [checkpoint.read_config(f) for f in folders]

    def load(self, folder, **how):
        """See checkpoint.load."""
        return checkpoint.load(folder, self.device, **how)

    def plan_memory(self, kind: str, config, flags: str, **sizes) -> None:
        """Tell what memory this takes, before any is taken; see memory.announce."""
        memory.announce(kind, config, self.device, flags, dtype=self.cfg.dtype, **sizes)

    def journal(self) -> progress.Journal:
        """Where what is sampled is written down as it comes, and found again by a later run."""
        found = progress.Journal(self.cfg, self.inputs)
        if found.held:
            self.say(f"goes on with what {found.path.parent} holds")
        return found

    def training(self, notes=None, **parts) -> progress.Training:
        """The state of a training, set to where an earlier run was stopped; see there."""
        found = progress.Training(self.cfg, self.inputs, parts, [] if notes is None else notes)
        if found.steps:
            self.say(f"goes on after step {found.steps}, from {found.path.parent}")
        return found

    def save_rows(self, rows, stamp) -> None:
        """Write the output, a JSONL file, and its sidecar; the processes go through rows together.
        stamp: a function that gives what the sidecar records besides, when all rows are there."""
        if distributed.is_main():

            def made():
                return data.stamp(self.cfg, inputs=self.inputs, **stamp())

            out = Path(self.cfg.out)
            data.write_stamped(data.sidecar(out), {out.name: rows}, made)
            progress.clear(self.cfg)
            self.hold.release()
        else:
            for _ in rows:
                pass

    def save_model(self, model, tokenizer, metrics: dict, log, finished=True, **more) -> None:
        """Write the output, a checkpoint's folder, with `log` (rows) as metrics.jsonl. finished:
        False for a model that a later run is to make again. more: {name: rows} of other JSONL."""
        if not distributed.is_main():
            return
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                told = f"{name} holds NaN or infinity after training; nothing is written"
                raise Diverged(f"{self.name}: {told}; lower --lr")
        stamp = data.stamp(self.cfg, inputs=self.inputs, metrics=metrics)
        stamp |= {} if finished else {"unfinished": True}
        extra = tokenizer.files() | tokenizer.special() | {"run.json": stamp}
        if not output.is_foreign(self.cfg.out, output.CARD):
            few_words = tokenizer.words is not None
            extra[output.CARD] = card.written(self.name, self.cfg, stamp, few_words)
        for name, rows in {"metrics": log, **more}.items():
            extra[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        checkpoint.save(model, self.cfg.out, extra)
        if finished:
            progress.clear(self.cfg)
            self.hold.release()


def begin(name: str, cfg: Settings) -> Stage | None:
    """Check the settings, join the other processes, choose device and threads, look at the output:
    None where it is there already, made with these settings. UserError for settings that cannot be,
    and for an output that may not be written, or that another run is writing."""
    started = time.time()
    cli.check(cfg)
    threads = cli.set_threads(cfg.threads)
    device = distributed.start(cli.pick_device(cfg.device))
    stage = Stage(name, cfg, device, threads, started, data.inputs(cfg))
    if data.done(cfg.out, cfg, cfg.again):
        progress.forget(cfg)
        stage.say(f"{cfg.out} is there already, made with these settings (--again to redo)")
        return None
    cfg.check_out()
    if distributed.is_main():
        stage = replace(stage, hold=lock.Held(cfg.result))
        if distributed.world() == 1 and data.done(cfg.out, cfg, cfg.again):
            stage.say(f"{cfg.out} has been made meanwhile")
            return None
    progress.check(cfg)
    torch.manual_seed(cfg.seed)
    return stage
