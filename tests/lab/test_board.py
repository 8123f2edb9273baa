import json
import sys
import types

import pytest

from mincai import UserError
from mincai.lab import board
from mincai.plumbing import progress


@pytest.fixture
def written(monkeypatch):
    """What SummaryWriter is given: (folder, name, value, step)."""
    found = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder.rsplit("/", 1)[1]

        def add_scalar(self, *what):
            found.append((self.folder, *what))

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return found


def lines(path, *rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + end)


def test_finished_stages_and_the_one_that_goes_on(tmp_path, written):
    lines(tmp_path / "sft" / "metrics.jsonl", {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2})
    going = progress.place(tmp_path / "ppo") / "metrics.jsonl"
    rows = {"update": 0, "dev_helped": 0.5}, {"update": 1, "score": float("nan"), "kl": 0.25}
    lines(going, *rows, end='\n{"update": 2, "sc')
    assert board.main(board.Config(run=str(tmp_path), to=str(tmp_path / "logs"))) == 4
    assert written == [
        ("sft", "loss", 2.5, 1),
        ("sft", "loss", 2, 2),
        ("ppo", "dev_helped", 0.5, 0),
        ("ppo", "kl", 0.25, 1),
    ]


def test_it_follows_a_training_until_ctrl_c(tmp_path, written, monkeypatch):
    path, looks = tmp_path / "pm" / "metrics.jsonl", []
    lines(path, {"step": 1, "loss": 3})

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        lines(path, {"step": 1, "loss": 3}, {"step": 2, "loss": 1})

    monkeypatch.setattr(board.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        board.main(board.Config(run=str(tmp_path), to=str(tmp_path / "logs"), follow=True))
    assert written == [("pm", "loss", 3, 1), ("pm", "loss", 1, 2)]


def test_without_the_package_or_the_run_it_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such run folder"):
        board.main(board.Config(run=str(tmp_path / "none")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        board.main(board.Config(run=str(tmp_path)))
