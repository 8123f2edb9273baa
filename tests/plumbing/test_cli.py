"""The bridge from dataclass to flags: what is typed is what the program gets, and a mistake exits
2."""

import errno
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mincai import Diverged, UserError
from mincai.model import GPT, GPTConfig
from mincai.plumbing import cli, workers


@dataclass(frozen=True)
class Config:
    steps: int = cli.arg(10, "updates")
    learning_rate: float = cli.arg(
        1e-3, "100% of Adam's step"
    )  # argparse formats help, hence the %
    out: str = cli.arg("runs/x", "folder")
    again: bool = cli.arg(False, "make anew")
    shuffle: bool = cli.arg(True, "random order")
    seeds: tuple[str, ...] = cli.arg(("1", "2"), "seeds")
    kinds: tuple[str, ...] = cli.arg((), "kinds")


def test_no_flags_gives_the_defaults():
    assert cli.parse(Config, []) == Config()


def test_every_type_of_field_is_read():
    cfg = cli.parse(
        Config,
        [
            "--steps",
            "3",
            "--learning-rate",
            "5e-2",
            "--out",
            "a b",
            "--again",
            "--no-shuffle",
            "--seeds",
            "4,5,6",
            "--kinds",
            "sft, ppo",
        ],
    )
    assert cfg == Config(
        steps=3,
        learning_rate=0.05,
        out="a b",
        again=True,
        shuffle=False,
        seeds=("4", "5", "6"),
        kinds=("sft", "ppo"),
    )
    assert cli.parse(Config, ["--seeds", ""]).seeds == ()


@pytest.mark.parametrize(
    "argv",
    [
        ["--stepz", "3"],
        ["--step", "3"],
        ["--learning_rate", "1"],
        ["stray"],
        ["--steps", "3.5"],
        ["--steps"],
        ["--again", "yes"],
    ],
)
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
    for text in (
        "what it does",
        "--steps INT updates (default: 10)",
        "100% of Adam's step (default: 0.001)",
        "--shuffle, --no-shuffle random order (default: True)",
        "(default: 1,2)",
        "(default: none)",
    ):
        assert text in shown
    assert shown.count("(default:") == 7  # once for each field


def test_a_type_that_no_flag_can_carry_is_a_mistake_of_the_programmer():
    @dataclass(frozen=True)
    class Odd:
        table: dict = cli.arg(None, "")

    with pytest.raises(TypeError, match="table"):
        cli.parse(Odd, [])

    @dataclass(frozen=True)
    class Negative:
        no_prose: bool = cli.arg(False, "")  # --no-prose would say False

    with pytest.raises(TypeError, match="no_prose"):
        cli.parse(Negative, [])


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_run_tells_of_a_full_disk_in_one_line():
    """Also where it is only what is printed that finds no room."""
    code = "from mincai.plumbing import cli; import dataclasses\n"
    code += "cli.run(print, dataclasses.make_dataclass('C', []))"
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    told = "what is printed, or a temporary file, cannot be written (No space left on device)"
    assert (ran.returncode, ran.stderr) == (2, f"mincai: error: {told}\n")

    def main(cfg):
        raise FileNotFoundError(errno.ENOENT, "a bug")

    with pytest.raises(FileNotFoundError):
        cli.run(main, Config, argv=[])


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


def test_threads_are_cores_for_small_models_and_threads_for_large_ones(monkeypatch):
    small, large = (GPT(GPTConfig(8, 8, 1, 1, width)) for width in (16, 264))
    try:
        assert cli.set_threads(3) == 3 and torch.get_num_threads() == 1
        assert (workers.number(small), workers.number(large)) == (3, 1)
        workers.fit(large)
        assert torch.get_num_threads() == 3
        workers.fit(small)
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert cli.set_threads(0) == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert 1 <= cli.set_threads(0) <= 8
    finally:
        workers.use(1)


@pytest.mark.parametrize("gpu", [False, True])
def test_device(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert cli.pick_device("cpu") == "cpu"
    assert cli.pick_device("auto") == ("cuda" if gpu else "cpu")
    if gpu:
        assert cli.pick_device("cuda") == "cuda"
    else:
        with pytest.raises(UserError, match="no GPU"):
            cli.pick_device("cuda")


@dataclass(frozen=True)
class Numbers:
    FIRST = "out"
    batch_size: int = cli.arg(4, "rows", least=1)
    lr: float = cli.arg(0.1, "rate", least=0)
    clip: float = cli.arg(1.0, "norm", least=1e-6)
    holdout: float = cli.arg(0.1, "share", least=0, most=1)
    seed: int = cli.arg(0, "any number")
    labels: str = cli.arg("soft", "kind", choices=("soft", "hard", "clamped"))
    out: str = cli.arg("runs/x", "folder")


NAMES = {"--" + name.replace("_", "-"): name for name in Numbers.__dataclass_fields__}


@pytest.mark.parametrize(
    "flag, value, asked",
    [
        ("--batch-size", "0", "of 1 or more"),
        ("--batch-size", "-3", "of 1 or more"),
        ("--lr", "-1", "of 0 or more"),
        ("--lr", "nan", "of 0 or more"),
        ("--clip", "0", "above 0"),
        ("--holdout", "1.5", "from 0 to 1"),
        ("--holdout", "-0.1", "from 0 to 1"),
        ("--seed", "9223372036854775808", "nearer to 0, of 18 digits at most"),
        ("--seed", "-9223372036854775808", "nearer to 0, of 18 digits at most"),
    ],
)
def test_a_number_out_of_range_exits_2(flag, value, asked, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.parse(Numbers, [f"{flag}={value}"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    value = type(getattr(Numbers, NAMES[flag]))(value)
    assert exit.value.code == 2 and told.endswith(f"argument {flag} {value}: give a number {asked}")
    with pytest.raises(UserError) as error:  # a Config that is made in code is checked by its stage
        cli.check(Numbers(**{NAMES[flag]: value}))
    assert str(error.value) == f"{flag} {value}: give a number {asked}"


def test_numbers_in_range_are_taken():
    assert cli.parse(
        Numbers, ["--batch-size", "1", "--lr", "0", "--holdout", "1", "--seed", "-1"]
    ) == Numbers(1, 0.0, 1.0, 1.0, -1)


def test_bounds_go_with_the_field_and_not_with_its_name():
    @dataclass(frozen=True)
    class Free:
        batch_size: int = cli.arg(0, "")
        lr: float = 0.0

    assert cli.parse(Free, ["--batch-size", "-3", "--lr", "-1"]) == Free(-3, -1.0)


def test_one_of_the_choices_has_to_be_chosen(capsys):
    assert cli.parse(Numbers, ["--labels", "clamped"]).labels == "clamped"
    with pytest.raises(SystemExit) as exit:
        cli.parse(Numbers, ["--labels", "firm"])
    told = "--labels firm: choose soft, hard or clamped"
    assert exit.value.code == 2 and capsys.readouterr().err.endswith(f"error: argument {told}\n")
    with pytest.raises(UserError) as error:
        cli.check(Numbers(labels="firm"))
    assert str(error.value) == told


def test_the_first_field_may_be_given_without_its_flag(capsys):
    assert cli.parse(Numbers, ["runs/y", "--lr", "1"]) == Numbers(lr=1.0, out="runs/y")
    assert cli.parse(Numbers, ["--lr", "1", "--out", "runs/y"]) == Numbers(lr=1.0, out="runs/y")
    with pytest.raises(SystemExit):
        cli.parse(Numbers, ["--lr", "1", "runs/y"])  # first or not at all
    assert "unrecognized arguments: runs/y" in capsys.readouterr().err


def test_help_shows_choices_and_ones_own_flags_first(capsys):
    @dataclass(frozen=True)
    class Base:
        seed: int = cli.arg(0, "of all")

    @dataclass(frozen=True)
    class Own(Base):
        kind: str = cli.arg("a", "which", choices=("a", "b"))

    with pytest.raises(SystemExit):
        cli.parse(Own, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "which: a | b (default: a)" in shown and shown.index("--kind STR") < shown.index(
        "--seed INT"
    )


def test_numbers_that_went_wrong_exit_1(capsys):
    def main(cfg):
        raise Diverged("train_sft, step 3 of 4: the gradient's norm is nan")

    with pytest.raises(SystemExit) as exit:
        cli.run(main, Config, argv=[])
    assert exit.value.code == 1 and "step 3 of 4" in capsys.readouterr().err


ENDS = """
import os, signal, sys, time
from dataclasses import dataclass
from mincai.plumbing import cli

@dataclass(frozen=True)
class Config:
    kind: str = cli.arg("", "what happens")

def main(cfg):
    if cfg.kind == "pipe":
        for n in range(100_000):
            print(n)
    os.kill(os.getpid(), getattr(signal, cfg.kind))
    time.sleep(5)

cli.run(main, Config)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_is_a_line_and_its_exit_code(name):
    ran = subprocess.run(
        [sys.executable, "-c", ENDS, "--kind", name], capture_output=True, text=True
    )
    word = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert ran.returncode == 128 + getattr(signal, name)
    assert ran.stderr.strip() == f"mincai: {word}; what is done is kept, the same command goes on"


def test_who_reads_only_the_head_gets_no_traceback():
    ran = subprocess.Popen(
        [sys.executable, "-c", ENDS, "--kind", "pipe"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert ran.stdout.readline() == b"0\n"
    ran.stdout.close()
    assert ran.stderr.read() == b"" and ran.wait() == 128 + signal.SIGPIPE
