"""The bridge from dataclass to flags: what is typed is what the program gets, and a mistake exits 2."""

from dataclasses import dataclass

import pytest
import torch

from mincai import UserError
from mincai.plumbing import cli


@dataclass(frozen=True)
class Config:
    steps: int = cli.arg(10, "updates")
    learning_rate: float = cli.arg(1e-3, "100% of Adam's step")  # argparse formats help, hence the %
    out: str = cli.arg("runs/x", "folder")
    again: bool = cli.arg(False, "make anew")
    shuffle: bool = cli.arg(True, "random order")
    seeds: tuple[int, ...] = cli.arg((1, 2), "seeds")
    kinds: tuple[str, ...] = cli.arg((), "kinds")


def test_no_flags_gives_the_defaults():
    assert cli.parse(Config, []) == Config()


def test_every_type_of_field_is_read():
    cfg = cli.parse(Config, ["--steps", "3", "--learning-rate", "5e-2", "--out", "a b", "--again",
                             "--no-shuffle", "--seeds", "4,5,6", "--kinds", "sft, ppo"])
    assert cfg == Config(steps=3, learning_rate=0.05, out="a b", again=True, shuffle=False, seeds=(4, 5, 6),
                         kinds=("sft", "ppo"))
    assert cli.parse(Config, ["--seeds", ""]).seeds == ()


@pytest.mark.parametrize("argv", [["--stepz", "3"], ["--step", "3"], ["--learning_rate", "1"], ["stray"],
                                  ["--steps", "3.5"], ["--seeds", "1,x"], ["--steps"], ["--again", "yes"]])
def test_misspelt_abbreviated_or_wrong_exits_2(argv, capsys):
    """`--step` guards allow_abbrev=False: with it on, a typo silently sets another flag."""
    with pytest.raises(SystemExit) as exit:
        cli.parse(Config, argv)
    assert exit.value.code == 2
    assert "error" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.parse(Config, ["--help"], "what it does")
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("what it does", "--steps INT updates (default: 10)", "100% of Adam's step (default: 0.001)",
                 "--shuffle, --no-shuffle random order (default: True)", "(default: 1,2)", "(default: none)"):
        assert text in shown
    assert shown.count("(default:") == 7  # once for each field


def test_a_field_without_default_must_be_given():
    @dataclass(frozen=True)
    class Needs:
        name: str
    assert cli.parse(Needs, ["--name", "x"]).name == "x"
    with pytest.raises(SystemExit):
        cli.parse(Needs, [])


def test_a_type_that_no_flag_can_carry_is_a_mistake_of_the_programmer():
    @dataclass(frozen=True)
    class Odd:
        table: dict = cli.arg(None, "")
    with pytest.raises(TypeError, match="table"):
        cli.parse(Odd, [])


def test_run_calls_main_with_the_config():
    seen = []
    cli.run(seen.append, Config, argv=["--steps", "7"])
    assert seen == [Config(steps=7)]


def test_run_turns_a_user_error_into_one_line_and_exit_2(capsys):
    def main(cfg):
        raise UserError("x.jsonl: no such file")
    with pytest.raises(SystemExit) as exit:
        cli.run(main, Config, argv=[])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "mincai: error: x.jsonl: no such file\n"


def test_run_turns_ctrl_c_into_130():
    def main(cfg):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as exit:
        cli.run(main, Config, argv=[])
    assert exit.value.code == 130


def test_run_hides_no_bug():
    def main(cfg):
        raise ValueError("a bug")
    with pytest.raises(ValueError):
        cli.run(main, Config, argv=[])


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert cli.set_threads(3) == 3 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert cli.set_threads(0) == 1 == torch.get_num_threads()
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert cli.set_threads(0) in (1, 2)
        with pytest.raises(UserError, match="--threads -1"):
            cli.set_threads(-1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gpu", [False, True])
def test_device(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert cli.pick_device("cpu") == "cpu"
    assert cli.pick_device("auto") == ("cuda" if gpu else "cpu")
    with pytest.raises(UserError, match="--device tpu"):
        cli.pick_device("tpu")
    if gpu:
        assert cli.pick_device("cuda") == "cuda"
    else:
        with pytest.raises(UserError, match="no GPU"):
            cli.pick_device("cuda")


@dataclass(frozen=True)
class Numbers:
    batch_size: int = cli.arg(4, "rows")
    lr: float = cli.arg(0.1, "rate")
    clip: float = cli.arg(1.0, "norm")
    holdout: float = cli.arg(0.1, "share")
    seed: int = cli.arg(0, "any number")


@pytest.mark.parametrize("flag, value, asked", [
    ("--batch-size", "0", "of 1 or more"), ("--batch-size", "-3", "of 1 or more"), ("--lr", "-1", "of 0 or more"),
    ("--lr", "nan", "of 0 or more"), ("--clip", "0", "above 0"), ("--holdout", "1.5", "from 0 to 1"),
    ("--holdout", "-0.1", "from 0 to 1")])
def test_a_number_out_of_range_exits_2(flag, value, asked, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.parse(Numbers, [f"{flag}={value}"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and f"argument {flag}: {value}" in told and told.endswith(f"; give a number {asked}")


def test_numbers_in_range_are_taken():
    assert cli.parse(Numbers, ["--batch-size", "1", "--lr", "0", "--holdout", "1", "--seed", "-1"]) == Numbers(
        1, 0.0, 1.0, 1.0, -1)
