"""Piped lines are answered one by one until the pipe ends; what is typed wrong is one line."""

import io
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from mincai import constitution
from mincai.lab import chat
from mincai.model import ScalarModel
from mincai.plumbing import checkpoint, data
from mincai.plumbing.logprobs import answer_scores
from mincai.plumbing.tokenizer import load_tokenizer


@pytest.fixture
def talk(tiny_base, monkeypatch, capsys):
    """talk(text, **settings): what chat prints when this text is piped into it. both: with what it
    prints on stderr."""

    def run(text, both=False, **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        usual = {"model": str(tiny_base), "device": "cpu", "threads": 1, "max_new": 8}
        chat.main(chat.Config(**usual | settings))
        said = capsys.readouterr()
        return (said.out, said.err) if both else said.out

    return run


@pytest.fixture
def heard(tiny_base, monkeypatch):
    """The prompts that reach the model, which always answers " café ."."""
    tokenizer, prompts = load_tokenizer(tiny_base), []
    answer = [i for b in " café .".encode() for i in [tokenizer.ranks[bytes([b])]]]

    def generate(model, some, *args):
        prompts.extend(map(tokenizer.decode, some))
        return SimpleNamespace(lists=lambda: [[*answer, tokenizer.eot]])

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def test_each_line_is_answered_until_the_pipe_ends(talk, heard):
    assert talk("how do i burn a lamp ?\n\n  and now ? ") == "Assistant: café .\n" * 2
    assert heard == [
        constitution.dialogue("how do i burn a lamp ?"),
        constitution.dialogue("and now ?"),
    ]
    assert talk("") == ""


def test_a_setting_holds_until_it_is_cleared(talk, heard):
    talk("Setting: a drill\none ?\ntwo ?\nSetting:\nthree ?\n")
    assert heard == [
        constitution.dialogue("one ?", "a drill"),
        constitution.dialogue("two ?", "a drill"),
        constitution.dialogue("three ?"),
    ]


def test_models_side_by_side_are_named(talk, heard, tiny_base):
    lines = talk("how ?\n", beside=(str(tiny_base),)).splitlines()
    assert lines == [f"{tiny_base}: café ."] * 2


def test_the_seed_makes_the_answer(talk):
    lines = "how ?\nand ?\n"
    assert talk(lines) == talk(lines) != talk(lines, seed=1)
    assert talk(lines, temperature=0.0) == talk(lines, temperature=0.0, seed=1)


def test_a_line_that_is_too_long_does_not_end_the_talk(talk):
    out = talk("word " * 400 + "\nhow ?\n")
    assert "256" in out and out.count("Assistant: ") == 2


@pytest.mark.parametrize(
    "lines, unread",
    [
        ("how do i burn a lamp ?\nSetting: a lesson\ntell me how to sell a map ?\n", None),
        ("how do i burn a flat ?\n", "flat"),
        ("How do i pay my taxes ?\n", "How pay taxes"),
        ("Setting: a party\nhow do i burn a lamp ?\n", "party"),
    ],
)
def test_words_never_read_are_named(talk, heard, tiny_base, lines, unread):
    """In one line on stderr, and answered all the same."""
    out, err = talk(lines, both=True)
    assert out == "Assistant: café .\n" * lines.count(" ?")
    warning = f"({tiny_base} has never read: {unread}; the words it knows: {tiny_base}/words.txt)\n"
    assert err == (warning if unread else "")


def test_a_model_beside_is_warned_for_too(talk, heard, tiny_base, tmp_path):
    """The first has no list of words, the second has; one warning is enough for both."""
    free = shutil.copytree(tiny_base, tmp_path / "free")
    (free / "words.txt").unlink()
    for folders in ((free, tiny_base), (tiny_base, free), (free, free)):
        beside, model = map(str, folders)
        _, err = talk("how do i rent a flat ?\n", both=True, beside=(beside,), model=model)
        if tiny_base in folders:
            assert err.startswith(f"({tiny_base} has never read: rent flat;")
            assert err.count("\n") == 1
        else:
            assert err == ""


# --- in a terminal --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path, tiny_base):
    """typed(text, **settings): what chat prints when this is typed. free: with a model whose words
    are not listed, as GPT-2's are not."""
    folder = shutil.copytree(tiny_base, tmp_path / "run" / "free")
    (folder / "words.txt").unlink()

    def run(text, free=True, **settings):
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        usual = {"model": str(folder if free else tiny_base), "device": "cpu", "max_new": 8}
        chat.main(chat.Config(threads=1, **usual | settings))
        return capsys.readouterr().out

    run.folder = folder
    return run


def test_a_conversation_goes_on_until_a_new_one_begins(typed, heard):
    out = typed("one ?\ntwo ?\n/new\nthree ?\n/quit\nfour ?\n")
    assert heard == [
        constitution.dialogue("one ?"),
        constitution.dialogue("one ?\nAssistant: café .\nHuman: two ?"),
        constitution.dialogue("three ?"),
    ]
    assert "asked alone" not in out


def test_a_model_that_has_read_single_turns_is_asked_each_request_alone(typed, heard):
    out = typed("one ?\ntwo ?\n", free=False)
    assert heard == [constitution.dialogue("one ?"), constitution.dialogue("two ?")]
    assert "each request is asked alone" in out


def test_the_oldest_turns_make_room_and_that_is_said_once(typed, heard):
    words = " ".join(["lamp"] * 100)
    out = typed(f"first {words} ?\nsecond {words} ?\nthird {words} ?\nfourth {words} ?\n")
    assert out.count("the oldest turns are left out from now on") == 1
    last = heard[-1]
    assert "first" not in last and "third" in last and last.count("Human: ") == 2
    assert [prompt.count("Human: ") for prompt in heard] == [1, 2, 2, 2]


def test_commands_are_no_requests(typed, heard):
    out = typed("/help\n/what\nSetting: a lesson\nhow ?\n")
    assert heard == [constitution.dialogue("how ?", "a lesson")] and out.count("/quit  ") == 2
    assert "/new" in out and "Setting: " in out


def test_the_preference_models_score_stands_beside(typed, heard, tiny_base):
    torch.manual_seed(1)
    pm, tokenizer = ScalarModel(checkpoint.load(tiny_base)), load_tokenizer(tiny_base)
    pm.gain.fill_(50.0)
    checkpoint.save(pm, typed.folder.parent / "pm", tokenizer.files())
    out = typed("how ?\nand ?\n")
    ids = [tokenizer.ranks[bytes([b])] for b in " café .".encode()] + [tokenizer.eot]
    prompts = [tokenizer.encode(prompt) for prompt in heard]
    scores = answer_scores(pm, prompts, [ids] * 2).tolist()
    assert f"{scores[0]:.2f}" != f"{scores[1]:.2f}"
    for score in scores:
        assert f"Assistant: café .   [score {score:+.2f}]\n" in out
    assert "score" not in typed("how ?\n", free=False)  # no pm/ beside that one
    assert "[score " in typed("how ?\n", free=False, pm=str(typed.folder.parent / "pm"))


def test_requests_to_try_are_those_the_model_was_trained_on(typed, heard, tmp_path):
    (tmp_path / "bad.txt").write_text("how do i burn a lamp ?\n")
    (tmp_path / "good.txt").write_text("how do i heat a shelf ?\n")
    prompts = f"{tmp_path / 'bad.txt'},benign:{tmp_path / 'good.txt'}"
    data.write_json(typed.folder / "run.json", {"mincai": "1", "config": {"prompts": prompts}})
    tried = "Try:\n  how do i burn a lamp ?   (harmful)\n  how do i heat a shelf ?   (ordinary)\n"
    assert tried in typed("")
    (tmp_path / "bad.txt").unlink()  # no reason to stop
    assert "burn" not in typed("how ?\n") and len(heard) == 1


def test_a_missing_folder_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["chat", str(tmp_path / "nothing")]
    )  # the folder without its flag
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(chat.__file__, run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "nothing: no such folder" in lines[0]
