"""What a stage has done so far: one that was stopped goes on from there, and ends with the same
bits.

While a stage works, a folder lies beside its output: sft.progress for sft, revisions.progress for
revisions.jsonl. It holds

    run.json             settings, hashes of the inputs, number of processes: with others a run
                         is refused, or with --again begins anew
    chunks-0.jsonl       what was sampled, a line for every chunk of rows (Journal)
    state.safetensors    weights, optimisers and generators of a training (Training)
    metrics.jsonl        a row for each of its steps, as they come

and goes when the output has its name. Sampling and training are what takes hours, and are taken
up where they were; all that lies between is computed again, from the same seeds.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mincai import UserError
from mincai.plumbing import data, distributed, lock, output

# A training's state is saved this often (seconds), or less often where saving takes more than a
# fiftieth of the time
SAVE_EVERY, SHARE = 60.0, 1 / 50


def place(result) -> Path:
    """Where this output's progress is kept: beside it, or inside where nothing may be beside it."""
    real = Path(os.path.realpath(result))
    name = real.stem if real.suffix in (".json", ".jsonl") else real.name
    inside = real.is_dir() and not os.access(real.parent, os.W_OK)
    return real / ".progress" if inside else real.with_name(f"{name}.progress")


def _files(processes):
    chunks = [f"chunks-{i}.jsonl" for i in range(processes)]
    return ["run.json", "state.safetensors", "state.new", "metrics.jsonl", *chunks]


def check(cfg) -> None:
    """Look at what an earlier run has left. UserError where it was begun with other settings,
    inputs or processes, unless cfg.again: then it goes, as where nothing was saved yet."""
    folder, world = place(cfg.result), distributed.world()
    stale = os.path.lexists(folder)
    if os.path.isdir(folder) and set(os.listdir(folder)) <= output.temporaries(folder):
        stale = False  # stopped before it had its run.json, which is written again
    saved = [folder / name for name in _files(world) if name.startswith(("state.s", "chunks"))]
    if stale and any(path.is_file() and path.stat().st_size for path in saved):
        try:
            begun = (output.stamp_of(folder / "run.json") or {}).get("processes")
            if begun != world:  # each of which draws its own
                told = f"was begun by {begun} processes, and now there are {world}"
                raise UserError(f"{folder}: {told}; start as many, or add --again to begin anew")
            data.done(folder, cfg)
            stale = False
        except UserError:
            if not cfg.again:
                raise
    distributed.barrier()  # all have looked, before one of them writes there
    if stale:
        clear(cfg)


def clear(cfg) -> None:
    """Remove what was kept of this stage, if anything was."""
    folder = place(cfg.result)
    if distributed.is_main() and os.path.lexists(folder):
        output.clear(folder)


def forget(cfg) -> None:
    """The same where the output is there, unless another run is making it anew just now, or has
    begun to with other settings and may go on."""
    if distributed.is_main() and os.path.lexists(place(cfg.result)):
        with contextlib.suppress(UserError), lock.alone(cfg.result):
            data.done(place(cfg.result), cfg)
            clear(cfg)


def _begin(cfg, inputs) -> Path:
    """The folder of this stage's progress, made if it is not there."""
    folder, world = place(cfg.result), distributed.world()
    if distributed.is_main() and not (folder / "run.json").exists():
        stamp = data.stamp(cfg, inputs=inputs, processes=world, unfinished=True)
        data.write_json(folder / "run.json", stamp | {"files": _files(world)})
    distributed.barrier()
    return folder


class Journal:
    """Results in a file, chunk by chunk, of calls that come in the same order in every run. A line
    that was cut short is dropped, with all after it."""

    def __init__(self, cfg, inputs):
        self.path = _begin(cfg, inputs) / f"chunks-{distributed.rank()}.jsonl"
        with output.writing(self.path):
            self.file = open(self.path, "a+b")
        self.held = self.file.tell() > 0  # whether an earlier run has left something
        self.file.seek(0)
        # the call that goes on; a line of a later one, and where it stands
        self.call, self.line, self.at = -1, None, 0

    def begin(self) -> dict:
        """{item: result} of what an earlier run has left of the call that now begins."""
        self.call += 1
        found = {}
        while (line := self.line or self._read()) and line["call"] == self.call:
            found.update(zip(line["items"], line["results"]))
            line = self.line = None
        self.line = line
        return found

    def _read(self):
        self.at, line = self.file.tell(), self.file.readline()
        try:
            if line.endswith(b"\n"):
                return json.loads(line)
        except ValueError:
            pass
        self.file.truncate(self.at)
        return None

    def add(self, items: list[int], results: list) -> None:
        """Write down what came of these items of the call; results are what JSON can hold."""
        if self.line is not None:  # calls come otherwise now: mincai itself has changed
            self.file.truncate(self.at)
            self.line = None
        line = {"call": self.call, "items": items, "results": results}
        with output.writing(self.path):
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


class Training:
    """Rows of metrics as they come, and now and then the state of all that a training changes.

    parts: modules, optimisers and generators by name; they are set to what an earlier run has saved.
    steps and log say how far that is: the caller goes on after as many steps, and has to have drawn
    for those what it draws from other generators. notes: a list of JSON that is saved besides.
    """

    def __init__(self, cfg, inputs, parts: dict, notes: list):
        folder = _begin(cfg, inputs)
        self.parts, self.notes = parts, notes
        self.path, self.rows = folder / "state.safetensors", folder / "metrics.jsonl"
        self.steps, self.log = 0, []
        if self.path.exists():
            try:
                self._restore()
            except UserError:
                if not cfg.again:
                    raise
        distributed.barrier()  # all have read
        self.file = None
        if distributed.is_main():
            with output.writing(self.rows):
                self.file = open(self.rows, "ab+")
                self.file.seek(0)
                for _ in self.log:
                    self.file.readline()
                self.file.truncate(self.file.tell())  # behind the rows of the saved state
        self.saved, self.wait = time.monotonic(), SAVE_EVERY

    def _restore(self):
        try:
            with safe_open(self.path, "pt") as file:
                kept = {name: file.get_tensor(name) for name in file.keys()}
                reached = json.loads(file.metadata()["progress"])
            with open(self.rows, "rb") as rows:
                log = [json.loads(rows.readline()) for _ in range(reached["rows"])]
            for name, part in self.parts.items():
                drawn = isinstance(part, torch.Generator)
                if drawn and kept[f"{name}/state"].shape != part.get_state().shape:
                    raise ValueError("it was begun on another kind of device")
        except (OSError, SafetensorError, ValueError) as error:
            told = f"cannot be read ({error}); add --again to begin anew"
            raise UserError(f"{self.path.parent}: {told}") from None
        self.steps, self.log, self.notes[:] = reached["steps"], log, reached["notes"]
        for name, part in self.parts.items():
            _set(part, {k[len(name) + 1 :]: x for k, x in kept.items() if k.startswith(f"{name}/")})

    def add(self, row: dict) -> None:
        """A row of metrics that belongs to no step."""
        self.log.append(row)
        if self.file:
            with output.writing(self.rows):
                self.file.write(json.dumps(row).encode() + b"\n")
                self.file.flush()

    def step(self, row: dict | None = None) -> None:
        """One more step is done, with this row of metrics; save the state if it is time."""
        if row is not None:
            self.add(row)
        self.steps += 1
        started = time.monotonic()
        if started - self.saved < self.wait:
            return
        if distributed.is_main():
            self._save()
        self.saved = time.monotonic()
        self.wait = max(SAVE_EVERY, (self.saved - started) / SHARE)

    def _save(self):
        kept = {f"{name}/{k}": v for name, x in self.parts.items() for k, v in _get(x).items()}
        reached = {"steps": self.steps, "rows": len(self.log), "notes": self.notes}
        work = self.path.with_suffix(".new")
        with output.writing(self.path):
            os.fsync(self.file.fileno())
            save_file(kept, work, metadata={"progress": json.dumps(reached)})
            output.flush(work)
            os.replace(work, self.path)
            output.flush(work.parent)


def _get(part) -> dict:
    """{name: tensor on the CPU} of a module, an optimiser or a generator."""
    if isinstance(part, torch.Generator):
        return {"state": part.get_state()}
    if isinstance(part, torch.optim.Optimizer):
        states = part.state_dict()["state"].items()
        some = {f"{i}/{key}": value for i, state in states for key, value in state.items()}
    else:
        some = part.state_dict()
    return {name: value.detach().cpu().contiguous() for name, value in some.items()}


def _set(part, kept: dict) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(kept["state"])
    elif isinstance(part, torch.optim.Optimizer):
        states = {}
        for name, value in kept.items():
            i, key = name.split("/")
            states.setdefault(int(i), {})[key] = value
        part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})
    else:
        part.load_state_dict(kept)
