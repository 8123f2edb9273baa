"""Several processes that sample draw apart: each as if the others were not there, and none what
another drew."""

import base64

import pytest
import torch

from mincai import critique, feedback
from mincai.model import GPT, GPTConfig
from mincai.plumbing import checkpoint, data, distributed


@pytest.fixture
def world(tmp_path):
    """A random model on bytes that ends its answers, and prompts of both kinds."""
    torch.manual_seed(0)
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16))
    model.ln_f.bias.data = (
        8 * model.wte.weight.data[256] / model.wte.weight.data[256].norm()
    )  # likes the end of text
    checkpoint.save(model, tmp_path / "base", extra={"tokenizer.tiktoken": ranks})
    data.write_jsonl(
        tmp_path / "prompts.jsonl",
        [
            {
                "id": f"p{i}",
                "prompt": f"q{i}",
                "kind": ("benign", "harmful")[i % 2],
                "split": "loop",
            }
            for i in range(8)
        ],
    )
    return tmp_path


def rows_of(stage, world, monkeypatch, rank):
    """The rows that a process of this rank makes of *all* prompts; nothing is handed to another."""
    for name, fake in (
        ("rank", lambda: rank),
        ("share", lambda items: items),
        ("merge", lambda items: items),
        ("total", lambda x: x),
        ("world", lambda: 2),
        ("is_main", lambda: True),
        ("barrier", lambda: None),
    ):
        monkeypatch.setattr(distributed, name, fake)
    out, common = (
        world / f"{stage}-{rank}.jsonl",
        dict(
            prompts=str(world / "prompts.jsonl"),
            max_new=8,
            device="cpu",
            threads=1,
            harmful=4,
            helpful=4,
        ),
    )
    if stage == "critique":
        critique.main(
            critique.Config(
                model=str(world / "base"), out=str(out), responses=1, rounds=2, **common
            )
        )
    else:
        feedback.main(
            feedback.Config(
                model=str(world / "base"),
                judge=str(world / "base"),
                out=str(out),
                samples=8,
                base_samples=0,
                pairs=0,
                reasons=False,
                **common,
            )
        )
    return data.read_jsonl(out)


@pytest.mark.parametrize("stage", ["critique", "feedback"])
def test_two_processes_draw_apart(world, monkeypatch, stage):
    first, second = (rows_of(stage, world, monkeypatch, rank) for rank in (0, 1))
    if stage == "critique":
        answers = [{(r["id"], r["original"]) for r in rows} for rows in (first, second)]
        drawn = [[x["principle"] for r in rows for x in r["rounds"]] for rows in (first, second)]
    else:  # all pairs are kept, so that all samples are seen
        answers = [
            {(r["prompt_id"], r[side]) for r in rows for side in "ab"} for rows in (first, second)
        ]
        drawn = [[r["principle"] for r in rows] for rows in (first, second)]
    assert {name for name, _ in answers[0]} & {
        name for name, _ in answers[1]
    }  # to the same prompts
    assert len(answers[0] & answers[1]) < len(answers[0]) / 2
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("stage", ["critique", "feedback"])
def test_a_rank_draws_the_same_twice(world, monkeypatch, stage):
    first = rows_of(stage, world, monkeypatch, 1)
    (world / f"{stage}-1.jsonl").unlink()
    assert rows_of(stage, world, monkeypatch, 1) == first
