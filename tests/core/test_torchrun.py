"""The three training scripts and the sampling, as torchrun starts them: two processes do what one
does.

Two processes share every batch, and their loss curves are those of one process with the whole
batch, up to rounding.
"""

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_pm
import train_ppo
import train_sft
from mincai import critique
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import checkpoint, data, distributed

ROOT = Path(__file__).resolve().parents[2]
EOT = 256
QUIET = dict(device="cpu", threads=1)


def prepare(folder):
    """A random model of two layers on bytes, a preference model, and rows for every script; 7 rows,
    5 pairs: odd."""
    torch.manual_seed(0)
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    config = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=32)
    checkpoint.save(GPT(config), folder / "base", extra={"tokenizer.tiktoken": ranks})
    checkpoint.save(ScalarModel(GPT(config)), folder / "pm", extra={"tokenizer.tiktoken": ranks})
    data.write_jsonl(
        folder / "revisions.jsonl",
        [{"prompt": f"q{i} ?", "revision": "no " * (1 + i % 4)} for i in range(7)],
    )
    data.write_jsonl(
        folder / "comparisons.jsonl",
        [
            {
                "prompt": f"q{i}",
                "a_ids": [97 + i, 121, EOT],
                "b_ids": [98 + i, EOT],
                "p_a": 0.2 + 0.6 * (i % 2),
            }
            for i in range(5)
        ],
    )
    data.write_jsonl(
        folder / "prompts.jsonl",
        [
            {
                "id": f"p{i}",
                "prompt": f"q{i}",
                "kind": ("benign", "harmful")[i % 2],
                "split": "loop",
            }
            for i in range(6)
        ],
    )


def run_all(folder, out):
    """Every script once, into folder/out; of 7 rows, 6 a step, the second process has none of the
    last."""
    base, here = str(folder / "base"), folder / out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "HOLDOUT", 0.0)
        patch.setattr(train_pm, "HOLDOUT", 0.0)
        patch.setattr(train_ppo, "PRINT_EVERY", 1)
        train_sft.main(
            train_sft.Config(
                model=base,
                data=(str(folder / "revisions.jsonl"),),
                out=str(here / "sft"),
                epochs=2,
                batch_size=6,
                micro_batch=2,
                **QUIET,
            )
        )
        train_pm.main(
            train_pm.Config(
                model=base,
                pairs=(str(folder / "comparisons.jsonl"),),
                prompts="",
                epochs=2,
                out=str(here / "pm"),
                batch_size=4,
                micro_batch=1,
                freeze=1,
                **QUIET,
            )
        )
        train_ppo.main(
            train_ppo.Config(
                model=base,
                pm=str(folder / "pm"),
                prompts=str(folder / "prompts.jsonl"),
                updates=3,
                out=str(here / "ppo"),
                batch_size=8,
                minibatches=2,
                micro_batch=2,
                max_new=5,
                lr=1e-3,
                warmup=1,
                **QUIET,
            )
        )
        critique.main(
            critique.Config(
                model=base,
                prompts=str(folder / "prompts.jsonl"),
                out=str(here / "revisions.jsonl"),
                harmful=3,
                helpful=2,
                responses=1,
                rounds=1,
                max_new=8,
                **QUIET,
            )
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, with `one` made by this process and `two` by two of them."""
    folder = tmp_path_factory.mktemp("torchrun")
    prepare(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    run_all(folder, "one")
    said = [process.communicate(timeout=170) for process in started]
    assert [process.returncode for process in started] == [0, 0], (
        said[0][1][-2000:] + said[1][1][-2000:]
    )
    return folder, [out for out, _ in said]


def curve(path, *names):
    return [[json.loads(line)[name] for name in names] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "stage, names",
    [
        ("sft", ("loss", "tokens", "grad_norm")),
        ("pm", ("loss", "accuracy", "grad_norm")),
        (
            "ppo",
            (
                "score",
                "kl_exact",
                "pg_loss",
                "vf_loss",
                "entropy",
                "grad_norm",
                "critic_grad_norm",
                "length",
                "first_ratio_error",
            ),
        ),
    ],
)
def test_the_curves_are_those_of_one_process(runs, stage, names):
    folder, _ = runs
    one, two = (
        torch.tensor(curve(folder / run / stage / "metrics.jsonl", *names))
        for run in ("one", "two")
    )
    assert len(one) >= 3 and one.std() > 0
    torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["sft", "pm", "ppo"])
def test_the_weights_are_those_of_one_process(runs, stage):
    folder, _ = runs
    one, two = (
        checkpoint.load(folder / run / stage, scalar=stage == "pm").state_dict()
        for run in ("one", "two")
    )
    for name in one:
        if stage == "pm" and name in ("gpt.ln_f.bias", "score.bias"):
            continue  # they cancel in a difference of scores: their gradient is rounding, which Adam blows up
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


def test_sampling_is_shared_and_written_once(runs):
    folder, _ = runs
    rows = data.read_jsonl(folder / "two" / "revisions.jsonl")
    assert sorted(r["id"] for r in rows) == sorted(
        r["id"] for r in data.read_jsonl(folder / "one" / "revisions.jsonl")
    )
    assert len(rows) == 5 and all(len(r["rounds"]) == 1 for r in rows)


def test_only_the_first_process_speaks(runs):
    _, (first, second) = runs
    assert "train_sft: wrote" in first and "train_ppo: wrote" in first and second == ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]), "two")
    distributed.stop()
