"""One run at a time for one output: the second is refused in a line, and no lock outlives its run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import mincai.__main__ as pipeline
from mincai import UserError
from mincai.lab import assess
from mincai.plumbing import checkpoint, data, distributed, formats, lock, stage
from mincai.plumbing.lock import Held, alone

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import os, sys, time
from mincai.plumbing.lock import Held
held = [Held(path) for path in sys.argv[2:]]
if sys.argv[1] == "fork":
    if os.fork():
        time.sleep(60)
    held = None  # the child drops what it has inherited
    os.kill(os.getppid(), 9)
print("holds", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def other():
    """other(paths...): another process that holds them, and its number; how="fork": it has been
    killed, and the process that it forked lives on."""
    started = []

    def start(*paths, how=""):
        command = [sys.executable, "-c", HOLDS, how, *map(str, paths)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said, number = process.stdout.readline().split()
        assert said == "holds"
        started.extend({process.pid, int(number)})
        process.number = int(number)
        return process

    yield start
    for number in started:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass


def refused(call, path, process=None):
    with pytest.raises(UserError) as caught:
        call()
    who = f"another run (process {process.number})" if process else "another run"
    assert (
        str(caught.value) == f"{path}: {who} is writing it; wait for its end, or give another --out"
    )


def test_a_place_is_held_once_and_leaves_nothing(tmp_path, other):
    out = tmp_path / "run" / "new" / "rows.jsonl"
    process = other(out)
    refused(lambda: Held(out), out, process)
    (tmp_path / "link").symlink_to("run")
    linked = tmp_path / "link" / "new" / "rows.jsonl"
    refused(lambda: Held(linked), linked, process)
    with alone(tmp_path / "run" / "new" / "other.jsonl", tmp_path / "run"):
        pass  # other outputs of one folder may be made together
    process.kill()
    process.wait()
    assert [p.name for p in out.parent.iterdir()] == [".rows.jsonl.lock"]  # it was killed
    with alone(out):
        refused_by = subprocess.run(
            [sys.executable, "-c", HOLDS, "", str(out)], cwd=ROOT, capture_output=True, text=True
        )
        assert f"another run (process {os.getpid()}) is writing it" in refused_by.stderr
        with alone(out):  # the loop holds what its stages hold
            pass
        assert list(out.parent.iterdir())
    assert not list(out.parent.iterdir())


def test_folders_that_a_lock_needed_go_with_it(tmp_path):
    with alone(tmp_path / "a" / "b" / "c", tmp_path / "a" / "d"):
        assert (tmp_path / "a" / "b" / ".c.lock").exists()
    assert not list(tmp_path.iterdir())
    held = Held(tmp_path / "a" / "b")
    del held  # a stage that ended with an error
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_left_over_holds_nothing(tmp_path, other):
    process = other(tmp_path / "out", how="fork")
    process.wait()
    os.kill(process.number, 0)  # the forked one is alive
    with alone(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_folder_was_moved_away_takes_no_other_with_it(tmp_path, other):
    out = tmp_path / "run" / "out"
    with alone(out):
        (tmp_path / "run").rename(tmp_path / "moved")
        process = other(out)
    refused(lambda: Held(out), out, process)


def test_what_is_no_lock_stays(tmp_path):
    place = tmp_path / ".out.lock"
    for content in ("mine", "mincai, and mine"):
        place.write_text(content)
        with pytest.raises(UserError, match=f"{place}: is in the way, and mincai did not write it"):
            Held(tmp_path / "out")
        assert place.read_text() == content
    place.unlink()
    for make in (place.mkdir, lambda: place.symlink_to("gone"), lambda: os.mkfifo(place)):
        make()
        with pytest.raises(UserError, match=f"{place}: "):
            Held(tmp_path / "out")
        place.rmdir() if place.is_dir() else place.unlink()
    assert not list(tmp_path.iterdir())


def test_a_folder_beside_which_nothing_may_be_written_holds_its_lock(
    tmp_path, tiny_gpt, monkeypatch
):
    out, access = tmp_path / "out", os.access
    monkeypatch.setattr(os, "access", lambda p, how: Path(p) != tmp_path and access(p, how))
    out.mkdir()
    with alone(out):
        assert [p.name for p in out.iterdir()] == [".lock"]
        checkpoint.save(tiny_gpt, out)  # it is nobody else's file
        checkpoint.save(tiny_gpt, out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "run.json"]


@dataclass(frozen=True)
class Rows(stage.Settings):
    out: str = "rows.jsonl"

    def check_out(self):
        pass


def test_a_stage_begins_alone_unless_its_work_is_done(tmp_path, other, capsys, monkeypatch):
    cfg = Rows(device="cpu", threads=1, out=str(tmp_path / "rows.jsonl"))
    process = other(cfg.out)
    refused(lambda: stage.begin("test", cfg), cfg.out, process)
    with monkeypatch.context() as patch:  # of several processes of one run the first one asks
        patch.setattr(distributed, "is_main", lambda: False)
        assert stage.begin("test", cfg)
    data.write_jsonl(cfg.out, [{"id": 1}])
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg))
    assert stage.begin("test", cfg) is None
    process.kill()
    process.wait()
    again = Rows(**vars(cfg) | {"again": True})
    begun = stage.begin("test", again)
    assert (tmp_path / ".rows.jsonl.lock").exists()
    begun.save_rows([{"id": 2}], dict)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.run.json"]
    assert stage.begin("test", cfg) is None


def test_a_stage_that_writes_into_a_run_holds_what_it_makes(tmp_path, other):
    (tmp_path / "run").mkdir()
    cfg = assess.Config(device="cpu", threads=1, out=str(tmp_path / "run"))
    process = other(cfg.result)
    refused(lambda: stage.begin("assess", cfg), cfg.result, process)


def test_what_another_run_made_meanwhile_is_not_made_again(tmp_path, monkeypatch, capsys):
    cfg, done = Rows(device="cpu", threads=1, out=str(tmp_path / "rows.jsonl")), [True, False]
    monkeypatch.setattr(data, "done", lambda *_: done.pop())
    assert stage.begin("test", cfg) is None and not done
    assert "made meanwhile" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_loop_holds_its_folder_and_all_that_it_writes_there(tmp_path, other, monkeypatch):
    run, began = tmp_path / "run", []
    cfg = pipeline.Config(out=str(run), device="cpu", threads=1)
    stages = pipeline.stages

    def begin(config, *_):
        began.append(sorted(p.name for p in run.iterdir()))

    monkeypatch.setattr(pipeline, "stages", lambda cfg: [(n, begin, c) for n, _, c in stages(cfg)])
    for out in (run, run / "sft", run / "comparisons.jsonl", run / "eval.json"):
        process = other(out)
        refused(lambda: pipeline.main(cfg), out, process)
        process.kill()
        process.wait()
    assert not began
    pipeline.main(cfg)
    names = ("comparisons.jsonl", "eval.json", "pm", "ppo", "revisions.jsonl", "sft")
    assert began[0] == [f".{name}.lock" for name in names]
    assert not list(run.iterdir())


def test_an_export_is_held(tmp_path, other):
    row = {"prompt": "q", "a": "x", "b": "y", "p_a": 0.9}
    data.write_jsonl(tmp_path / "comparisons.jsonl", [row])
    cfg = formats.Config(source=str(tmp_path / "comparisons.jsonl"), out=str(tmp_path / "o.jsonl"))
    process = other(cfg.out)
    refused(lambda: formats.main(cfg), cfg.out, process)


def test_without_locks_of_the_system_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with alone(tmp_path / "new" / "out"):
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_seeds_started_together_in_one_folder(tmp_path):
    command = [sys.executable, "-m", "mincai", "--out", str(tmp_path / "r"), "--scale", "0.01"]
    how = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen([*command, "--seed", str(seed)], **how) for seed in (0, 1)]
    while all(run.poll() is None for run in runs):
        time.sleep(0.1)
    (second,) = [run for run in runs if run.returncode is not None]
    (first,) = [run for run in runs if run is not second]
    assert second.returncode == 2
    line = second.stderr.read().splitlines()[-1]
    told = f"{tmp_path / 'r'}: another run (process {first.pid}) is writing it"
    assert line.startswith(f"mincai: error: {told}")
    first.send_signal(signal.SIGTERM)
    assert "ended by SIGTERM" in first.communicate()[1] and first.returncode == 128 + 15
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".lock")]
