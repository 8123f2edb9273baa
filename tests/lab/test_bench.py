"""The benchmark measures what it says on a CPU; what only a GPU can tell is left to a GPU."""

import pytest
import torch

from mincai.lab import bench


def test_every_step_is_timed(tmp_path):
    found = bench.main(
        bench.Config(
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


def test_the_median_leaves_the_first_out():
    turns = []
    seconds = bench.median_seconds(lambda: turns.append(1), 3, "cpu")
    assert len(turns) == 4 and 0 <= seconds < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_with_the_cpu():
    assert bench.check_gpu(bench.TINY)
