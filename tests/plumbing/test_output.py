"""What a person has stays: every output beside, over and under files that mincai did not write."""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import mincai.__main__ as pipeline
import train_pm
import train_ppo
import train_sft
from mincai import UserError, critique, feedback
from mincai.lab import assess, bench, english, evaluate, report
from mincai.model import GPT
from mincai.plumbing import checkpoint, data, formats, output
from mincai.tinyworld import pretrain

NAMES = ("run.json", "config.json", "model.safetensors", "metrics.jsonl")


def content(folder):
    """{path: bytes, None for a folder, where a link leads} of all that lies in a folder."""
    return {
        p.relative_to(folder).as_posix(): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(Path(folder).rglob("*"))
    }


def make(folder, stamp=None, **files):
    """A small checkpoint as output.py makes one: file name, without its end, -> content."""
    files = {name + (".json" if name == "config" else ".txt"): text for name, text in files.items()}
    work = output.begin(folder, files)
    for name, text in files.items():
        (work / name).write_text(text)
    output.finish(work, folder, stamp or {"config": {}})


def refused(call, *words):
    """Refused in one line that has these words."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    for word in words:
        assert str(word) in line, line


# --- checkpoint folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "gpt2"}', "train.py": "print()"},  # another program's
        {"config.json": "{}", "run.json": '{"config": {}, "seed": 0}'},  # and its own run.json
        {"config.json": "{}", "run.json": '["mincai"]'},
        {"notes.txt": "mine"},
        {".hidden": ""},
        {"config.json": "{}", "run.json": '{"mincai": "0", "files": ["../thesis.txt"]}'},
        {"config.json": "{}", "run.json": '{"mincai": "0", "files": ["/etc/hosts"]}'},
        {"config.json": "{}", "run.json": '{"mincai": "0", "files": "config.json"}'},
        {
            "config.json": "{}",
            "model.safetensors.index.json": "{}",
            "model-00001-of-00002.safetensors": "w",
        },
        {"sub/inner.txt": "a folder within"},
    ],
)
def test_a_folder_of_somebody_elses_is_refused(tiny_gpt, tmp_path, files):
    (tmp_path / "thesis.txt").write_text("years of work")
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = content(tmp_path)
    for call in (
        lambda: output.check_folder(tmp_path / "out", NAMES),
        lambda: checkpoint.save(tiny_gpt, tmp_path / "out"),
    ):
        refused(call, tmp_path / "out", "give a new folder")
    assert content(tmp_path) == before


def test_what_mincai_did_not_write_stays_in_its_folder(tmp_path):
    out = tmp_path / "out"
    make(out, config="1", old="1", both="1")
    (out / "notes.txt").write_text("mine")
    (out / "sub").mkdir()
    make(out, config="2", both="2", new="2")
    listed = json.loads((out / "run.json").read_text())["files"]
    assert listed == ["both.txt", "config.json", "new.txt", "run.json"]
    (out / "run.json").unlink()
    assert content(tmp_path) == {
        "out": None,
        "out/both.txt": b"2",
        "out/config.json": b"2",
        "out/new.txt": b"2",
        "out/sub": None,
        "out/notes.txt": b"mine",
    }


def test_a_file_in_the_way_is_refused_before_work(tmp_path):
    """It lies in a folder of mincai's, under a name that is to be written, and is on no list."""
    out = tmp_path / "out"
    make(out, config="1")
    (out / "metrics.jsonl").write_text("mine")
    refused(lambda: output.check_folder(out, NAMES), out / "metrics.jsonl", "did not write it")
    assert (out / "metrics.jsonl").read_text() == "mine"
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    refused(lambda: output.check_folder(out, NAMES), out / "metrics.jsonl")
    (out / "snapshots").write_text("mine")
    refused(lambda: output.check_folder(out, ["snapshots/u001/config.json"]), out / "snapshots")


def test_a_file_that_appears_meanwhile_is_kept_and_so_is_the_checkpoint(tmp_path):
    out = tmp_path / "out"
    make(out, config="1")
    work = output.begin(out, ["config.json", "late.txt"])
    for name in ("config.json", "late.txt"):
        (work / name).write_text("new")
    (out / "late.txt").write_text("mine")
    refused(lambda: output.finish(work, out, {}), out / "late.txt", f"the checkpoint is in {work}")
    assert (out / "late.txt").read_text() == "mine" and (out / "config.json").read_text() == "1"
    assert (work / "late.txt").read_text() == "new"


def test_a_run_stopped_at_any_step_loses_nothing_and_is_run_again(tmp_path, monkeypatch):
    """Old, new, or neither: never a mixture that passes for whole."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        run: int

    steps = 0
    for there in (True, False):
        for stop in range(1, 20):
            out, calls = tmp_path / f"{there}-{stop}", []
            if there:
                make(out, data.stamp(Config(1)), config="1", weights="1", old="1")
                (out / "notes.txt").write_text("mine")

            def counted(real):
                def call(*args, **kwargs):
                    calls.append(args)
                    if len(calls) == stop:
                        raise KeyboardInterrupt
                    return real(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                for place, name in (
                    (os, "replace"),
                    (Path, "unlink"),
                    (Path, "rename"),
                    (Path, "rmdir"),
                ):
                    patch.setattr(place, name, counted(getattr(place, name)))
                try:
                    make(out, data.stamp(Config(2)), config="2", weights="2", added="2")
                    stopped = False
                except KeyboardInterrupt:
                    stopped = True
            steps += stopped
            assert not there or (out / "notes.txt").read_text() == "mine"
            if (out / "config.json").exists():
                weights = (out / "weights.txt").read_text()
                assert weights == (out / "config.json").read_text()
                if (out / "run.json").exists():
                    stamp = json.loads((out / "run.json").read_text())
                    assert stamp["config"] == {"run": int(weights)}
            elif out.exists():
                assert not data.done(out, Config(2))
            make(out, data.stamp(Config(3)), config="3", weights="3")  # with nothing done by hand
            names = {"config.json", "run.json", "weights.txt"} | ({"notes.txt"} if there else set())
            assert {p.name for p in out.iterdir()} == names
            assert (out / "weights.txt").read_text() == "3" and data.done(out, Config(3))
            assert not out.with_name(out.name + ".partial").exists()
    assert steps > 12


def test_a_reader_meets_the_old_checkpoint_or_the_new_one(tiny_gpt, tmp_path, monkeypatch):
    """Whenever it comes while one is replaced; and a run that was stopped there is not waited for
    without end."""
    out, replace, found, readers = tmp_path / "m", os.replace, [], []

    def model(value, n_layer):
        with torch.no_grad():
            made = GPT(dataclasses.replace(tiny_gpt.config, n_layer=n_layer))
            for parameter in made.parameters():
                parameter.fill_(value)
        return made

    def read():
        try:
            read = checkpoint.load(out)
            values = (
                float(x) for p in read.parameters() for x in (p.detach().min(), p.detach().max())
            )
            found.append({read.config.n_layer, *values})
        except UserError as error:
            found.append(error)

    def slow(*names):
        readers.append(threading.Thread(target=read))
        readers[-1].start()
        time.sleep(0.01)
        replace(*names)

    checkpoint.save(model(1, 1), out, {"metrics.jsonl": "{}"})
    monkeypatch.setattr(os, "replace", slow)
    for n in (2, 1):
        checkpoint.save(model(n, n), out, {"metrics.jsonl": "{}"})
    for reader in readers:
        reader.join()
    assert len(found) == 14 and {1.0} in found and {2.0} in found
    assert all(one in ({1.0}, {2.0}) for one in found), found

    def stopped(old, new):
        if Path(new).name == "config.json" and Path(new).parent == out:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stopped)
    monkeypatch.setattr(output, "PATIENCE", 0.05)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(model(3, 3), out)
    refused(lambda: checkpoint.load(out), out / "config.json", "no such file")


def test_new_names_and_weights_are_flushed_to_the_disk(tmp_path, monkeypatch):
    """A folder's entries too: a power cut would take the new name back."""
    flushed, real = set(), os.fsync

    def fsync(number):
        flushed.add(os.fstat(number).st_ino)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    output.write_file(tmp_path / "rows" / "a.jsonl", ["{}"])
    assert {p.stat().st_ino for p in (tmp_path / "rows", tmp_path / "rows" / "a.jsonl")} <= flushed
    for _ in range(2):  # a folder that is new, and one that is there
        flushed.clear()
        make(tmp_path / "models" / "m", config="1", weights="1")
        some = ["m/weights.txt", "m/config.json", "m/run.json", "m" if _ else ""]
        assert {(tmp_path / "models" / name).stat().st_ino for name in some} <= flushed


def test_where_a_checkpoint_is_put_together(tmp_path):
    """Never in a folder that somebody else has under that name."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    before = content(tmp_path)
    refused(lambda: make(out, config="1"), work / "notes.txt", "did not write it")
    assert content(tmp_path) == before
    (work / "notes.txt").unlink()
    make(out, config="1")  # an empty one is as good as none
    for link in (tmp_path, "nowhere"):
        (out / ".partial").symlink_to(link)
        refused(lambda: make(out, config="2"), out / ".partial")
        (out / ".partial").unlink()
    (out / ".partial").write_text("mine")
    refused(lambda: make(out, config="2"), out / ".partial")
    assert (out / ".partial").read_text() == "mine" and (out / "config.json").read_text() == "1"


def test_what_a_stopped_run_left_goes_and_nothing_else(tmp_path):
    out, names = tmp_path / "out", ["config.json", "snapshots/u004/config.json"]
    work = output.begin(out, names)
    (work / "snapshots/u004").mkdir(parents=True)
    (work / "snapshots/u004/config.json").write_text("{}")
    (work / "snapshots/u004/notes.txt").write_text("mine")
    refused(lambda: output.begin(out, names), work / "snapshots/u004/notes.txt")
    (work / "snapshots/u004/notes.txt").unlink()
    work = output.begin(out, ["config.json"])
    assert [p.name for p in work.iterdir()] == [output.LIST]


def test_clear_removes_what_is_listed_below_a_folder(tmp_path):
    root = tmp_path / "controls"
    make(root / "one" / "sft", config="1")
    (root / "one" / "made.json").write_text("{}")
    (root / "one" / "notes.txt").write_text("mine")
    (root / "theirs").mkdir()
    (root / "theirs" / "run.json").write_text("{}")
    refused(lambda: output.clear(root), root, "does not list")
    listed = ["run.json", "one/made.json", "one/pairs.jsonl"]
    data.write_json(root / "run.json", {"mincai": "0", "files": listed})
    output.clear(root)
    assert sorted(content(root)) == ["one", "one/notes.txt", "theirs", "theirs/run.json"]


# --- a disk without room --------------------------------------------------------------------------


@contextlib.contextmanager
def room(size):
    """No file can grow beyond this, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_without_room_leaves_all_as_it_was(there, tiny_gpt, tmp_path):
    out, told = tmp_path / "new" / "m", set()
    extra = {"metrics.jsonl": "{}\n" * 100_000, "run.json": {"config": {}, "long": "x" * 400_000}}
    if there:
        checkpoint.save(tiny_gpt, out, extra)
        (out / "notes.txt").write_text("mine")
    before = content(tmp_path)
    for size in (0, 10, 50, 200, 1_000, 100_000, 250_000, 350_000):
        with room(size), pytest.raises(UserError) as caught:
            checkpoint.save(tiny_gpt, out, extra)
        line = str(caught.value)
        assert line.endswith("cannot be written (File too large); give another --out"), line
        told.add(Path(line.partition(":")[0]).name)
        assert content(tmp_path) == before
    work = ".partial" if there else "m.partial"  # there, the list holds more
    assert told == {".m.lock", "partial.json", work, "run.json"}
    checkpoint.save(tiny_gpt, out, extra)


def test_rows_without_room_leave_all_as_they_were(tmp_path):
    path = tmp_path / "new" / "eval.json"
    rows = {"eval_samples.jsonl": [{"n": n} for n in range(1000)]}
    for size in (0, 10, 500, 2_000):
        with room(size):
            refused(lambda: data.write_stamped(path, rows, dict), "cannot be written (File too")
        assert not list(path.parent.iterdir())
        path.parent.rmdir()
    data.write_stamped(path, rows, dict)
    before = content(tmp_path)
    for size in (0, 10, 500, 2_000):
        with room(size):
            refused(lambda: data.write_stamped(path, rows, dict), "cannot be written (File too")
        assert content(tmp_path) == before
    (tmp_path / "run").mkdir()
    with room(100):
        refused(
            lambda: report.main(report.Config(out=str(tmp_path / "run"))), "report.html: cannot be"
        )
    assert not list((tmp_path / "run").iterdir())


# --- links ----------------------------------------------------------------------------------------


def test_a_link_to_a_folder_is_followed(tiny_gpt, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for _ in range(2):
        checkpoint.save(tiny_gpt, tmp_path / "out")
        assert os.readlink(tmp_path / "out") == "disk"
        assert {p.name for p in (tmp_path / "disk").iterdir()} == {
            "config.json",
            "model.safetensors",
            "run.json",
        }
        assert {p.name for p in tmp_path.iterdir()} == {"disk", "out"}


def test_a_link_within_a_checkpoint_is_somebody_elses(tmp_path):
    make(tmp_path / "out", config="1", weights="1")
    (tmp_path / "far").write_text("mine")
    (tmp_path / "out/weights.txt").unlink()
    (tmp_path / "out/weights.txt").symlink_to("../far")
    before = content(tmp_path)
    out = tmp_path / "out"
    refused(lambda: make(out, config="2", weights="2"), out / "weights.txt")
    assert content(tmp_path) == before
    (out / "snapshots").symlink_to(tmp_path)
    refused(lambda: output.check_folder(out, ["snapshots/far"]), out / "snapshots")


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/rows.jsonl").write_text("old")
    (tmp_path / "rows.jsonl").symlink_to("far/rows.jsonl")
    refused(lambda: output.check_rows(tmp_path / "rows.jsonl"), "nothing says that mincai wrote it")
    data.write_json(tmp_path / "rows.run.json", {"mincai": "0"})
    output.check_rows(tmp_path / "rows.jsonl")
    data.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert (tmp_path / "rows.jsonl").is_symlink()
    assert data.read_jsonl(tmp_path / "far/rows.jsonl") == [{"a": 1}]
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["rows.jsonl"]


def check_folder(path):
    output.check_folder(path, NAMES)


@pytest.mark.parametrize("check", [check_folder, output.check_rows, output.check_file])
def test_a_link_that_leads_nowhere_is_refused(check, tmp_path):
    link = tmp_path / "x.jsonl"
    link.symlink_to("gone")
    refused(lambda: check(link), link, "leads nowhere")
    assert os.readlink(link) == "gone" and not (tmp_path / "gone").exists()


# --- names and places -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check, end", [(check_folder, ""), (output.check_rows, ".jsonl"), (output.check_file, ".json")]
)
def test_places_that_cannot_be_written(check, end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    refused(lambda: check(""), "--out is empty")
    for name in (f"~/x{end}", f"~someone/x{end}", f"~{end}"):
        refused(lambda: check(name), name, "~", "write the path out")
    for name in ("n" * 300 + end, "n" * 300 + f"/x{end}", f"new/{'é' * 150}/x{end}"):
        refused(lambda: check(name), name, "File name too long")
    refused(lambda: check(f"file/x{end}"), "file is a file")
    refused(lambda: check(f"file/y/x{end}"), "file is a file")
    assert content(tmp_path) == {"file": b"mine"}
    check(f"new/folder/x{end}")
    assert not Path("new").exists()  # looking makes nothing
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    refused(lambda: check(f"new/x{end}"), "Permission denied")


def test_names_that_fit_but_whose_companions_do_not(tmp_path):
    """255 bytes are a name's most: OUT.partial and the sidecar are longer than OUT."""
    refused(lambda: output.check_folder(tmp_path / ("n" * 250), NAMES), "File name too long")
    refused(lambda: output.check_rows(tmp_path / ("n" * 248 + ".jsonl")), "File name too long")
    (tmp_path / ("n" * 250)).mkdir()
    make(tmp_path / ("n" * 250), config="1")
    data.write_json(tmp_path / ("m" * 250 + ".json"), {})  # its temporary name is short


def test_the_folder_that_one_stands_in(tiny_gpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_gpt, ".")  # empty
    inode = os.stat(".").st_ino
    Path("notes.txt").write_text("mine")
    checkpoint.save(tiny_gpt, ".")
    assert os.stat(tmp_path).st_ino == inode and Path("notes.txt").read_text() == "mine"
    checkpoint.load(".")
    Path("run.json").unlink()
    before = content(tmp_path)
    refused(lambda: checkpoint.save(tiny_gpt, "."), "give a new folder")
    assert content(tmp_path) == before


def test_a_folder_where_a_file_belongs_and_the_reverse(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    refused(lambda: output.check_rows(tmp_path / "x.jsonl"), "is a folder")
    refused(lambda: output.check_rows(tmp_path), "ends in .jsonl")
    refused(lambda: output.check_rows(tmp_path / "rows.txt"), "ends in .jsonl")
    (tmp_path / "file").write_text("mine")
    refused(lambda: output.check_folder(tmp_path / "file", NAMES), "is a file")


def test_a_temporary_name_is_nobody_elses(tmp_path):
    (tmp_path / f".rows.jsonl.{os.getpid()}.tmp").write_text("mine")
    for name in (".sft.new", ".sft.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = content(tmp_path)
    data.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    make(tmp_path / "sft", config="1")
    make(tmp_path / "sft", config="2")
    assert {k: v for k, v in content(tmp_path).items() if k in before} == before


# --- every command --------------------------------------------------------------------------------

FOLDERS = {
    "train_sft": train_sft,
    "train_pm": train_pm,
    "train_ppo": train_ppo,
    "pretrain": pretrain,
}
ROWS = {"critique": critique, "feedback": feedback, "formats": formats}
BESIDE = {
    "evaluate": (evaluate, "eval.json", {}),
    "samples": (evaluate, "eval_samples.jsonl", {}),
    "scores": (evaluate, "eval_pm.jsonl", {}),
    "sections": (evaluate, "eval_deep.json", {"deep": True}),
    "section rows": (evaluate, "eval_deep.jsonl", {"deep": True}),
    "controls": (evaluate, "controls.json", {"controls": True}),
    "variants": (evaluate, "controls/notes.txt", {"controls": True}),
    "claims": (evaluate, "claims.json", {"claims": True}),
    "assess": (assess, "eval.json", {}),
    "assess's samples": (assess, "eval_samples.jsonl", {}),
    "report": (report, "report.html", {}),
    "english": (english, "prompts_dev.jsonl", {}),
    "english's stamp": (english, "prompts.run.json", {}),
}


def config(module, out, **settings):
    known = {field.name for field in dataclasses.fields(module.Config)}
    common = {k: v for k, v in dict(device="cpu", threads=1, again=True).items() if k in known}
    return module.Config(out=str(out), **common | settings)


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_stage_that_writes_a_folder_refuses_before_it_works(stage, tmp_path, monkeypatch):
    """Even with --again."""

    def never(_):
        raise AssertionError("it began")

    monkeypatch.setattr(torch, "manual_seed", never)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/config.json").write_text('{"model_type": "gpt2"}')
    Path("out/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    before, main = content(tmp_path), FOLDERS[stage].main
    for out, words in (
        ("out", "give a new folder"),
        (".", "give a new folder"),
        ("", "--out is empty"),
        ("~/out", "begins with ~"),
        ("file", "is a file"),
        ("file/x", "is a file"),
        ("n" * 300, "too long"),
    ):
        refused(lambda: main(config(FOLDERS[stage], out)), words)
    assert content(tmp_path) == before


@pytest.mark.parametrize("stage", ROWS)
def test_a_stage_that_writes_rows_refuses_before_it_works(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text('{"text": "mine"}\n')
    Path("other.run.json").write_text('{"lap": 1}')
    before, main = content(tmp_path), ROWS[stage].main
    for out, words in (
        ("notes.jsonl", "nothing says that mincai wrote it"),
        ("other.jsonl", "other.run.json"),
        (".", "ends in .jsonl"),
        ("", "--out is empty"),
        ("~/x.jsonl", "begins with ~"),
        ("notes.jsonl/x.jsonl", "is a file"),
        ("n" * 300 + ".jsonl", "too long"),
    ):
        refused(lambda: main(config(ROWS[stage], out)), words)
    assert content(tmp_path) == before


@pytest.mark.parametrize("what", BESIDE)
def test_files_in_a_run_folder_that_mincai_did_not_write(what, tmp_path, monkeypatch):
    module, name, settings = BESIDE[what]
    monkeypatch.chdir(tmp_path)
    Path("run", name).parent.mkdir(parents=True)
    Path("run", name).write_text('{"mine": 1}')
    before = content(tmp_path)
    place = f"run/{name.removesuffix('/notes.txt')}: "
    refused(lambda: module.main(config(module, "run", **settings)), place)
    assert content(tmp_path) == before


def test_the_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)  # it is not reached
    (tmp_path / "bench.json").write_text('{"mine": 1}')
    refused(lambda: bench.main(config(bench, tmp_path / "bench.json")), "nothing says")
    assert (tmp_path / "bench.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["ppo/notes.txt", "eval.json", "comparisons.jsonl", "sft"])
def test_the_whole_loop_looks_at_every_place_before_its_first_stage(name, tmp_path, monkeypatch):
    def never(_):
        raise AssertionError("a stage began")

    stages = pipeline.stages
    monkeypatch.setattr(pipeline, "stages", lambda cfg: [(n, never, c) for n, _, c in stages(cfg)])
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("mine")
    before = content(tmp_path)
    cfg = pipeline.Config(out=str(run), device="cpu", threads=1, again=True)
    refused(lambda: pipeline.main(cfg), run / name.removesuffix("/notes.txt"))
    assert content(tmp_path) == before


def test_a_page_of_ours_is_made_again(tmp_path):
    """By the sentence at its foot, which every page has."""
    (tmp_path / "report.html").write_text(f"<p>{report.WRITTEN} runs/tiny, seed 0.</p>")
    report.main(report.Config(out=str(tmp_path)))
    assert "<html" in (tmp_path / "report.html").read_text()
    report.main(report.Config(out=str(tmp_path)))


def test_what_is_shipped_can_be_made_again(tmp_path):
    for module, folder in ((english, "english"), (pretrain, "tiny")):
        shutil.copytree(Path(english.FOLDER).parent / folder, tmp_path / folder)
        module.Config(out=str(tmp_path / folder)).check_out()


def test_what_a_killed_writing_has_left_goes_with_the_next_one(tmp_path, monkeypatch):
    path, other = tmp_path / "a.json", tmp_path / "b.json"

    def cut(file):
        """As after SIGKILL: nothing that follows is done, not even the clearing up."""
        monkeypatch.setattr(output.Path, "unlink", lambda *_, **__: None)
        raise KeyboardInterrupt

    for target in (path, other):
        with monkeypatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
            output.write_file(target, ["{}"], before=lambda: cut(target))
    assert len(output.temporaries(tmp_path)) == 2
    (tmp_path / ".notes.tmp").write_text("mine")
    output.write_file(path, ["{}"])
    assert path.read_text() == "{}" and len(output.temporaries(tmp_path)) == 1
    assert (tmp_path / ".notes.tmp").read_text() == "mine"


def test_a_checkpoint_that_was_killed_at_its_first_file_is_begun_anew(tmp_path):
    work = output.partial(tmp_path / "m")
    work.mkdir()
    (work / f".{16 * '0'}.{16 * 'f'}.tmp").write_text("{")
    output.check_folder(tmp_path / "m", ["a"])
    assert output.begin(tmp_path / "m", ["a"]) == work
    assert [path.name for path in work.iterdir()] == ["partial.json"]
