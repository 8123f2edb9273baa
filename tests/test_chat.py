"""Piped lines are answered one by one until the pipe ends; what is typed wrong is one line."""

import io
import runpy
import sys

import pytest

from mincai import chat, constitution
from mincai.tokenizer import load_tokenizer


@pytest.fixture
def talk(tiny_base, monkeypatch, capsys):
    """talk(text, **settings): what chat prints when this text is piped into it."""
    def run(text, **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        usual = {"model": str(tiny_base), "device": "cpu", "threads": 1, "max_new": 8}
        chat.main(chat.Config(**usual | settings))
        return capsys.readouterr().out
    return run


@pytest.fixture
def heard(tiny_base, monkeypatch):
    """The prompts that reach the model, which always answers " café ." byte by byte."""
    tokenizer, prompts = load_tokenizer(tiny_base), []
    answer = [i for b in " café .".encode() for i in [tokenizer.ranks[bytes([b])]]]

    def stream(model, prompt, *args):
        prompts.append(tokenizer.decode(prompt))
        return iter(answer)
    monkeypatch.setattr(chat, "stream", stream)
    return prompts


def test_each_line_is_answered_until_the_pipe_ends(talk, heard):
    assert talk("how do i burn a lamp ?\n\n  and now ? ") == "Assistant: café .\n" * 2
    assert heard == [constitution.dialogue("how do i burn a lamp ?"), constitution.dialogue("and now ?")]
    assert talk("") == ""


def test_a_setting_holds_until_it_is_cleared(talk, heard):
    talk("Setting: a drill\none ?\ntwo ?\nSetting:\nthree ?\n")
    assert heard == [constitution.dialogue("one ?", "a drill"), constitution.dialogue("two ?", "a drill"),
                     constitution.dialogue("three ?")]


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


def test_a_missing_folder_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path / "nothing")])  # the folder without its flag
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(chat.__file__, run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "nothing: no such folder" in lines[0]
