"""The benchmark measures what it says on a CPU; what only a GPU can tell is left to a GPU."""

import json
import math
from pathlib import Path

import pytest
import torch

import mincai
from mincai import UserError
from mincai.lab import bench, works
from mincai.lab.works import Work

HERE = Path(mincai.__file__).parents[1]
SOME = [  # one of each kind, as small as it can be
    Work("sampling", "tiny", 2, 8, 3),
    Work("one prompt", "tiny", 3, 8, 3),
    Work("judging", "tiny", 2, 80, header=70),
    Work("SFT step", "tiny", 2, 50),
    Work("PPO update", "tiny", 2, 8, 3),
]


def test_every_step_is_timed(tmp_path):
    found = bench.main(
        bench.Config(
            model="tiny",
            batch=4,
            micro_batch=2,
            prompt=8,
            max_new=4,
            repeat=1,
            device="cpu",
            threads=1,
            out=str(tmp_path / "bench.json"),
        )
    )
    assert set(found) == {
        "sampling",
        "SFT step",
        "logits, there and back",
        "preference step",
        "PPO update",
    }
    assert all(number > 10 for number in found.values())
    assert "tokens" not in found and (tmp_path / "bench.json").exists()


def test_one_shape_on_one_thread_goes_by_the_processors_time(monkeypatch):
    """As the table does: seconds are asked for with the number of threads, which decides it."""
    asked = []
    monkeypatch.setattr(works, "seconds", lambda *how: asked.append(how[1:]) or 0.5)
    some = dict(batch=4, micro_batch=2, prompt=8, max_new=4, repeat=1, device="cpu", threads=1)
    found = bench.main(bench.Config(model="tiny", **some))
    assert set(asked) == {(1, "cpu")} and len(asked) == 2 * len(found)
    assert found["sampling"] == 4 * 4 / 0.5 and found["PPO update"] == 4 * (8 + 4) / 0.5


def test_the_median_leaves_the_first_out():
    turns = []
    seconds = bench.median_seconds(lambda: turns.append(1), 3, "cpu")
    assert len(turns) == 4 and 0 <= seconds < 0.1


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bench, "rows", lambda device: SOME)
    monkeypatch.setattr(works, "ceilings", lambda *_: (1e10, 1e11))


def settings(against, out=""):
    return bench.Config(against=against, repeat=1, threads=1, device="cpu", out=str(out))


def test_the_table_beside_another_checkout(few, tmp_path, capsys):
    """By turns with a process that has this very checkout, so nothing is lacking there."""
    found = bench.main(settings(str(HERE), tmp_path / "bench.json"))
    assert [row["work"] for row in found["rows"]] == [work.name for work in SOME]
    for row, work in zip(found["rows"], SOME):
        assert row["tokens_per_s"] == work.tokens / row["seconds"] > 1
        assert row["least_ratio"] <= row["ratio"] <= row["largest_ratio"], row
        assert 0.05 < row["ratio"] < 20 and 0 < row["of_roofline"] < 1
    assert json.loads((tmp_path / "bench.json").read_text())["found"] == found
    told = capsys.readouterr().out
    assert "10.0 GB/s read, 100 GFLOP/s" in told and SOME[2].name in told
    assert SOME[2].name == "judging, tiny, 2 x 80 tokens, 70 of them shared"


def test_what_an_older_checkout_lacks_is_told(few, tmp_path, capsys):
    """One that can sample, and do nothing else in the way of today."""
    package = tmp_path / "mincai"
    package.mkdir()
    for name in ("__init__", "losses", "ppo"):
        (package / f"{name}.py").touch()
    model = "import dataclasses\n\nScalarModel = None\nGPTConfig = lambda *_: None\n\n"
    model += "class GPT:\n    def __init__(self, _): pass\n    def to(self, _): return self\n"
    (package / "model.py").write_text(model + "    def parameters(self): raise TypeError('old')\n")
    (package / "sample.py").write_text("def generate(*_, n): sum(range(100_000))\n")
    found = bench.main(settings(str(tmp_path)))["rows"]
    assert ["ratio" in row for row in found] == [True, True, False, False, False]
    assert "No module named 'mincai.logprobs'" in found[2]["lacks"]
    assert "lacking there: old" in capsys.readouterr().out


def test_the_table_beside_transformers(few, capsys):
    pytest.importorskip("transformers")
    found = bench.main(settings("transformers"))["rows"]
    assert ["ratio" in row for row in found] == [True] * 4 + [False]
    assert "lacking there: transformers has no PPO" in capsys.readouterr().out


def test_without_transformers_it_is_timed_alone(few, capsys, monkeypatch):
    monkeypatch.setattr(works.importlib.util, "find_spec", lambda _: None)
    found = bench.main(settings("transformers"))["rows"]
    assert not any("ratio" in row for row in found)
    assert "transformers is not installed" in capsys.readouterr().out


def test_a_folder_without_mincai_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkout of mincai there; give the folder of one"):
        bench.main(settings(str(tmp_path)))


def test_the_roofline_by_hand(monkeypatch):
    """One layer, 2 channels, 3 words: 12 * 4 + 13 * 2 = 74 numbers in the block, 6 in the head."""
    monkeypatch.setitem(works.SHAPES, "hand", (1, 1, 2, 3))
    work = Work("sampling", "hand", rows=5, prompt=4, new=3)
    # bytes: weights once, keys and values of 5 rows (2 numbers each a column) at 2 and 5.5 columns
    reads = [4 * (74 + 6 + 2 * 5 * 2 * context) for context in (2, 5.5)]
    does = [2 * (5 * 4 * (74 + 2 * 4) + 5 * 6), 2 * (5 * (74 + 2 * 11) + 5 * 6)]
    assert math.isclose(works.least_seconds(work, 1, math.inf), reads[0] + 2 * reads[1])
    assert math.isclose(works.least_seconds(work, math.inf, 1), does[0] + 2 * does[1])
    assert works.least_seconds(Work("one prompt", "hand", 5, 4, 3), math.inf, 1) < sum(does)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_with_the_cpu():
    assert bench.check_gpu(bench.TINY)
