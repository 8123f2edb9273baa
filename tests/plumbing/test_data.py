"""Files that are whole or absent, batches whose masks are right, settings that a result can be
traced to."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from mincai import UserError
from mincai.plumbing import data, distributed, output

# --- files ---


def test_jsonl_round_trip_keeps_every_character(tmp_path):
    rows = [
        {"id": 1, "text": "two\nlines, a tab\t, \u2028 and é, 漢, 🙂"},
        {"id": 2, "ids": [1, 2]},
    ]
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    data.write_jsonl(path, rows)
    assert data.read_jsonl(path, need=("id",)) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]  # no temporary file stays


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert data.read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"[1]", "list, not an object"),
        (b"3", "int, not an object"),
        (b'{"b": 1}', "lacks a"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        data.read_jsonl(path, need=("a",))
    assert f"{path} line 3: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no rows"):
        data.read_jsonl(path)


def test_json_that_cannot_be_walked_or_written_is_none():
    for text in ("[" * 101 + "]" * 101, b'{"a":' * 101 + b"1" + b"}" * 101, "[" * 10**5):
        with pytest.raises(ValueError, match="nested too deeply"):
            data.from_json(text)
    for text in ("9" * 5_000, '"\\ud800"', b'{"a": "\\udc00 x"}', "{", b"\xff"):
        with pytest.raises(ValueError):
            data.from_json(text)
    deepest = "[" * 100 + "]" * 100
    assert json.dumps(data.from_json(deepest)) == deepest
    many = [[n] for n in range(200)]
    assert data.from_json(json.dumps(many).encode()) == many
    assert data.from_json('"\\ud83d\\ude00"') == "\U0001f600"


def test_a_message_is_one_line_whatever_a_file_says():
    assert str(UserError("a\nb\r\nc\u2028d")) == "a b c d"


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        data.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_jsonl(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """Guards the rename: a stage that dies half-way leaves no file that the next stage takes for
    whole."""
    path = tmp_path / "rows.jsonl"
    data.write_jsonl(path, [{"old": True}])

    def rows():
        yield {"new": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_jsonl(path, rows())
    assert data.read_jsonl(path) == [{"old": True}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        data.write_json(tmp_path / "file" / "x.json", {})


# --- batches ---


def test_right_pad_by_hand():
    ids, valid = data.right_pad([[5, 6, 7], [8], []])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]] and ids.dtype == torch.long
    assert valid.tolist() == [[True, True, True], [True, False, False], [False, False, False]]


def test_sft_batch_by_hand():
    """Guards the shift: the first answer token counts, the last prompt token does not, padding
    never does."""
    inputs, targets, mask = data.sft_batch([([1, 2, 3], [4, 9]), ([5], [6, 7, 9]), ([1, 2], [9])])
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 7, 9], [1, 2, 9, 0]]
    assert targets.tolist() == [[2, 3, 4, 9], [6, 7, 9, 0], [2, 9, 0, 0]]
    assert targets[mask].tolist() == [4, 9, 6, 7, 9, 9]
    assert mask.long().tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]]


def test_a_padding_id_inside_a_row_is_an_ordinary_token():
    """Guards against masks recomputed from id 0, which is a real token of the vocabulary."""
    _, targets, mask = data.sft_batch([([0], [0, 0]), ([1], [2])])
    assert mask.tolist() == [[True, True], [True, False]]
    assert targets[mask].tolist() == [0, 0, 2]


LENGTHS = torch.randint(1, 200, (301,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("size", [8, 50, 500])
def test_length_batches_hold_every_row_once_and_keep_to_the_limit(size):
    batches = data.length_batches(LENGTHS, size, torch.Generator().manual_seed(1))
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    assert sorted(map(len, batches))[1:] == [size] * (len(LENGTHS) // size)
    assert max(map(len, batches)) <= size


def test_length_batches_waste_little_and_come_in_no_order_of_length():
    batches = data.length_batches(LENGTHS, batch_size=8, generator=torch.Generator().manual_seed(1))
    padded = sum(len(b) * max(LENGTHS[i] for i in b) for b in batches)
    assert padded < 1.25 * sum(LENGTHS)  # rows in file order would give about 1.8
    means = [sum(LENGTHS[i] for i in b) / len(b) for b in batches]
    ups = sum(a < b for a, b in zip(means, means[1:]))
    assert 0.25 < ups / (len(means) - 1) < 0.75


@pytest.mark.parametrize(
    "number, size, rank, world, want, pieces",
    [
        (5, 0, 0, 1, [([0, 1, 2, 3, 4], True)], 1),
        (5, 9, 0, 1, [([0, 1, 2, 3, 4], True)], 1),
        (5, 2, 0, 1, [([0, 1], True), ([2, 3], True), ([4], True)], 1),
        (5, 1, 1, 2, [([1], True), ([3], True)], 1),
        (5, 0, 0, 2, [([0, 2, 4], True)], 1),
        (5, 2, 0, 2, [([0, 2], True), ([4], True)], 1),
        (1, 2, 0, 2, [([0], True)], 1),
        (1, 2, 1, 2, [([0], False)], 1),
        (1, 0, 1, 2, [([0], False)], 1),
        (5, 0, 0, 1, [([0, 1, 2], True), ([3, 4], True)], 2),
        (5, 9, 1, 2, [([1], True), ([3], True)], 2),
        (5, 2, 0, 1, [([0, 1], True), ([2, 3], True), ([4], True)], 2),
        (1, 0, 0, 1, [([0], True)], 2),
        (1, 0, 1, 2, [([0], False)], 2),
    ],
)
def test_micro_batches_by_hand(monkeypatch, number, size, rank, world, want, pieces):
    """A process without rows has one that does not count."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)
    assert data.micro_batches(list(range(number)), size, pieces) == want


def test_length_batches_differ_by_seed_only():
    def make(seed):
        return data.length_batches(
            LENGTHS, batch_size=8, generator=torch.Generator().manual_seed(seed)
        )

    assert make(1) == make(1)
    assert {frozenset(b) for b in make(1)} != {frozenset(b) for b in make(2)}
    assert data.length_batches([], batch_size=8, generator=torch.Generator()) == []


# --- how a file was made ---


@dataclass(frozen=True)
class Config:
    out: str = "runs/x"
    seed: int = 7
    lr: float = 1e-3
    kinds: tuple[str, ...] = ("a", "b")
    device: str = "cpu"
    again: bool = False
    LOOSE = ("out", "device")


def test_stamp_is_json_and_complete():
    stamp = json.loads(json.dumps(data.stamp(Config(), rows=3)))
    assert stamp["config"]["kinds"] == ["a", "b"]
    assert (stamp["seed"], stamp["device"], stamp["rows"]) == (7, "cpu", 3)
    assert stamp["torch"] == torch.__version__
    assert {"git", "threads", "mincai"} <= set(stamp)


def test_done_for_a_checkpoint_folder(tmp_path):
    folder = tmp_path / "sft"
    assert not data.done(folder, Config())  # not there yet
    data.write_json(folder / "run.json", data.stamp(Config()))
    for path in (folder, folder / "run.json"):
        assert data.done(path, Config())
        assert data.done(path, Config(out="elsewhere", device="cuda", again=True))  # loose ones
        assert not data.done(path, Config(), again=True)


def test_done_for_rows_needs_both_the_file_and_its_sidecar(tmp_path):
    path = tmp_path / "pairs.jsonl"
    assert not data.done(path, Config())
    data.write_json(data.sidecar(path), data.stamp(Config()))
    assert not data.done(path, Config())  # a stamp alone vouches for nothing
    data.write_jsonl(path, [{"a": 1}])
    assert data.done(path, Config())
    assert data.sidecar(path) == tmp_path / "pairs.run.json"


def test_done_names_the_first_setting_that_differs(tmp_path):
    path = tmp_path / "eval.json"
    data.write_json(path, {"rate": 0.5, **data.stamp(Config())})
    assert data.done(path, Config())
    with pytest.raises(
        UserError, match=r"eval.json: was made with --lr 0.001, now it is 0.1; .*--again"
    ):
        data.done(path, Config(lr=0.1))
    with pytest.raises(UserError, match=r"--kinds \['a', 'b'\], now it is \['a'\]"):
        data.done(path, Config(kinds=("a",)))
    assert not data.done(path, Config(lr=0.1), again=True)


def test_done_notices_settings_that_came_or_went(tmp_path):
    path = tmp_path / "run.json"
    config = data.stamp(Config())["config"]
    del config["seed"]
    data.write_json(path, {"config": config})
    with pytest.raises(UserError, match="--seed nothing, now it is 7"):
        data.done(path, Config())
    data.write_json(path, {"config": {**config, "seed": 7, "old_flag": 1}})
    with pytest.raises(UserError, match="--old-flag 1, now it is nothing"):
        data.done(path, Config())


def test_done_takes_two_ways_to_write_one_path_for_one(tmp_path, monkeypatch):
    """The whole loop records full paths; a stage run alone is given short ones."""

    @dataclass(frozen=True)
    class Reads:
        base: str = "model"

    path = tmp_path / "run.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    data.write_json(path, {"config": {"base": str(tmp_path / "model")}})
    assert data.done(path, Reads())
    for base in ("other", "absent", ""):
        with pytest.raises(UserError, match="--base"):
            data.done(path, Reads(base))


def test_what_nothing_vouches_for_is_not_done(tmp_path):
    """Whether it may be replaced is another question, and output.py's."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path in (
        tmp_path,
        *(tmp_path / name for name in ("run.json", "rows.jsonl", "n" * 300)),
        "",
    ):
        assert not data.done(path, Config())


@pytest.mark.parametrize("content", ["", "[1]", '{"config": 3}', "{}"])
def test_done_with_an_unreadable_stamp(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="does not record any settings"):
        data.done(tmp_path, Config())


# --- what it was made of, and what it vouches for ---


@dataclass(frozen=True)
class Reads:
    base: str = "model"
    prompts: str = "bad.jsonl,benign:good.jsonl"
    pairs: tuple[str, ...] = ("pairs.jsonl",)
    name: str = "gpt2"
    notes: str = "notes.txt"
    out: str = "out"
    LOOSE = ("out", "notes")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with all that Reads names, to work in."""
    here = tmp_path / "here"
    for folder in ("model", "out"):
        (here / folder).mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.tiktoken", "run.json"):
            (here / folder / name).write_text(f"{name} of {folder}")
    for name in ("bad.jsonl", "good.jsonl", "pairs.jsonl", "notes.txt"):
        (here / name).write_text(name)
    monkeypatch.chdir(here)
    return here


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_stamp_holds_the_hashes_of_what_settings_name(here):
    found = data.stamp(Reads())["inputs"]
    assert found.keys() == {"base", "prompts", "pairs"}
    assert found["pairs"] == sha256(here / "pairs.jsonl")
    assert found["prompts"] == f"{sha256(here / 'bad.jsonl')} benign:{sha256(here / 'good.jsonl')}"
    names = ("config.json", "model.safetensors", "tokenizer.tiktoken")
    assert found["base"].split() == [sha256(here / "model" / name) for name in names]
    assert (
        data.stamp(Reads("out", "absent,bad.jsonl", ()))["inputs"] == {}
    )  # the output is no input
    (here / "model" / "model.safetensors").rename(
        here / "model" / "model-00001-of-00001.safetensors"
    )
    assert data.inputs(Reads())["base"] == found["base"]  # shards


def test_inputs_may_move_but_not_change(here):
    made = here / "made" / "run.json"
    data.write_json(made, data.stamp(Reads()))
    shutil.copytree(here, here.with_name("there"))
    moved = Reads(
        "../there/model", "../there/bad.jsonl,benign:../there/good.jsonl", ("../there/pairs.jsonl",)
    )
    assert data.done(made, Reads()) and data.done(made, moved)
    (here / "model" / "run.json").write_text("who made it is not what it is")
    assert data.done(made, Reads())
    with pytest.raises(
        UserError, match="--prompts 'bad.jsonl,benign:good.jsonl', now it is 'good.jsonl,benign:bad"
    ):
        data.done(made, replace(moved, prompts="good.jsonl,benign:bad.jsonl"))
    changes = {
        "model/model.safetensors": "--base 'model'",
        "good.jsonl": "--prompts 'bad.jsonl,benign:good.jsonl'",
        "pairs.jsonl": r"--pairs \['pairs.jsonl'\]",
    }
    for name, flag in changes.items():
        content = (here / name).read_bytes()
        (here / name).write_bytes(content + b".")
        with pytest.raises(
            UserError, match=rf"^{made}: was made with {flag}, which has changed since; .*--again"
        ):
            data.done(made, Reads())
        assert not data.done(made, Reads(), again=True)
        shutil.move(here / name, here / "away")
        if "/" not in name:
            assert data.done(made, Reads())  # a file that is gone: nothing says that it was another
        (here / name).write_bytes(content)
    old = data.stamp(Reads())
    del old["inputs"]  # as stamps were
    data.write_json(made, old)
    (here / "pairs.jsonl").write_text("another")
    assert data.done(made, Reads())
    with pytest.raises(UserError, match="--base 'model', now it is '../there/model'"):
        data.done(made, moved)


def test_a_file_is_hashed_once_while_size_and_time_stay(here, monkeypatch):
    read, real = [], data.output.sha256
    monkeypatch.setattr(data.output, "sha256", lambda path: read.append(path.name) or real(path))
    first = data.inputs(Reads())
    assert len(read) == 6 and data.inputs(Reads()) == first and len(read) == 6
    (here / "pairs.jsonl").write_text("longer than before")
    assert data.inputs(Reads())["pairs"] != first["pairs"] and read[6:] == ["pairs.jsonl"]


def test_what_a_stamp_vouches_for_must_be_as_it_was(tmp_path):
    path, files = tmp_path / "eval.json", {"a.jsonl": [{"n": 1}], "b.jsonl": [{"n": 2}]}
    data.write_stamped(path, files, lambda: data.stamp(Config(), rate=0.5))
    stamp = json.loads(path.read_text())
    assert (
        stamp["sha256"] == {name: sha256(tmp_path / name) for name in files}
        and stamp["rate"] == 0.5
    )
    assert data.done(path, Config())
    whole = (tmp_path / "b.jsonl").read_text()
    for content in (whole.replace("2", "3"), whole[:-3], ""):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(
            UserError,
            match=rf"^{tmp_path}/b.jsonl: is not as it was made, says eval.json; .*--again",
        ):
            data.done(path, Config())
        assert not data.done(path, Config(), again=True)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b.jsonl: is gone, says eval.json; .*--again"):
        data.done(path, Config())
    with pytest.raises(UserError, match="--lr"):
        data.done(path, Config(lr=0.1))


def test_rows_and_their_stamp_stopped_at_any_step_are_made_again(tmp_path, monkeypatch):
    """Never new rows under an old stamp; and a first run that was stopped leaves nothing that is
    refused."""
    real, stops = os.replace, 0
    for there in (True, False):
        for stop in range(1, 10):
            path, calls = tmp_path / f"{there}-{stop}" / "eval.json", []

            def write(seed):
                rows = {name: [{"seed": seed}] for name in ("a.jsonl", "b.jsonl")}
                data.write_stamped(path, rows, lambda: data.stamp(Config(seed=seed)))

            def killed(*names):
                calls.append(names)
                if len(calls) == stop:
                    raise KeyboardInterrupt
                real(*names)

            if there:
                write(0)
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", killed)
                try:
                    write(5)
                    continue
                except KeyboardInterrupt:
                    stops += 1
            if data.done(path, Config(seed=0)):
                assert there and "0" in (path.parent / "a.jsonl").read_text() and stop == 1
            output.check_beside(path.parent, "eval.json", "a.jsonl", "b.jsonl")
            write(0)
            assert data.done(path, Config(seed=0))
    assert stops == 10


def test_an_unfinished_stamp_is_not_done_but_its_settings_count(tmp_path):
    data.write_json(
        tmp_path / "run.json", data.stamp(Config(), unfinished=True, sha256={"gone": ""})
    )
    assert not data.done(tmp_path, Config())
    with pytest.raises(UserError, match="--lr"):
        data.done(tmp_path, Config(lr=0.1))
