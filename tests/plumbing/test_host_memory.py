"""What waits on the host stays small: compact pairs and prompts, rows written as they come."""

import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_presets import vocabulary  # noqa: F401

import train_pm
from mincai import constitution, feedback
from mincai.plumbing import data
from mincai.plumbing.planner import Planner
from mincai.plumbing.tokenizer import from_ranks

BYTES = from_ranks({bytes([b]): b for b in range(256)})


def held_by(work):
    """(what work() gives, bytes that it still holds, bytes at the worst moment)."""
    tracemalloc.start()
    try:
        found = work()
        return found, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_a_pair_waits_in_little_memory(tmp_path):
    """200 tokens a side and all that a comparison says beside them; tokens take 1,600 bytes."""

    def row(n):
        a, b = ([n % 200 + more] * 60 + list(range(40)) + [256] for more in (1, 2))
        return {
            "prompt": f"q{n // 8} " + "w" * 97,
            "a": BYTES.decode(a),
            "b": BYTES.decode(b),
            "reasons": "r" * 2_600,
            "p_a": 0.7,
            "a_ids": a,
            "b_ids": b,
        }

    data.write_jsonl(tmp_path / "pairs.jsonl", map(row, range(800)))
    (pairs, dropped), held, worst = held_by(
        lambda: train_pm.read_pairs(tmp_path / "pairs.jsonl", BYTES, 512)
    )
    assert len(pairs) == 800 and not +dropped
    assert held < 800 * 2_500 and worst < held + 200_000, (
        held / 800,
        worst - held,
    )  # never the whole file
    assert (
        list(pairs[3].a) == BYTES.encode(pairs[3].prompt) + row(3)["a_ids"]
        and list(pairs[3].b)[-1] == 256
    )
    assert pairs[0].prompt is pairs[7].prompt != pairs[8].prompt


def test_the_judges_prompts_wait_in_little_memory(monkeypatch):
    """300 prompts of more than 700 tokens; as Python's integers they would hold megabytes."""
    worst, words, asked = [], "word " * 60, "Human: " + "is it so " * 40

    def next_logp(model, prompts, ids, batch_size, journal=None):
        assert all(len(prompt) > 700 for prompt in prompts)
        worst.append(tracemalloc.get_traced_memory()[0])
        return torch.zeros(len(prompts), 2)

    monkeypatch.setattr(feedback, "next_logp", next_logp)
    planner = Planner(BYTES, 4_000, {"compare": ["x" * 100]})
    tracemalloc.start()
    try:
        heads = [constitution.compare(asked, words, words, "be kind .") for _ in range(300)]
        found, _ = feedback.judge_once(None, planner, heads, reasons=False)
    finally:
        tracemalloc.stop()
    assert found == [0.5] * 300 and worst[0] < 300 * (1_100 * 4 + 3_000), worst[0] / 300


def rows(prompt, number):
    return [{"name": f"{prompt}{n}", "p_a": 0.75} for n in range(number)]


def test_rows_are_handed_on_before_the_next_prompts_are_worked_on(monkeypatch):
    worked, totals = [], Counter()

    def compare_rows(cfg, some, *_):
        worked.append(some)
        return [row for prompt in some for row in rows(prompt, 2)], 0.5 * len(worked)

    monkeypatch.setattr(feedback, "compare_rows", compare_rows)
    monkeypatch.setattr(feedback, "PROMPTS", 2)
    models = feedback.Models(None, None, Planner(BYTES, 10), None)
    found = feedback.comparisons(None, list("abcde"), [], models, None, totals)
    first = [next(found) for _ in range(4)]
    assert worked == [["a", "b"]] and [row["name"] for row in first] == ["a0", "a1", "b0", "b1"]
    rest = list(found)
    assert [row["name"] for row in rest] == ["c0", "c1", "d0", "d1", "e0", "e1"]
    assert [row["id"] for row in first + rest] == [f"pair-{n:05d}" for n in range(10)]
    assert worked == [["a", "b"], ["c", "d"], ["e"]]
    assert totals["pairs"] == 10 and totals["contrast"] == 2.5
    assert (
        totals["same_slot"] == 4 * 0.5 + 4 * 1.0 + 2 * 1.5
    )  # each part's share weighs as many pairs as it has


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pm", "feedback"])
def test_two_hundred_thousand_comparisons_in_two_gigabytes(vocabulary, stage):  # noqa: F811
    """python -m pytest -m slow tests/plumbing/test_host_memory.py: ten minutes."""
    script = Path(__file__).with_name("host_memory.py")
    ran = subprocess.run(
        [sys.executable, script, stage, "200000"], capture_output=True, text=True, check=True
    )
    told = ran.stdout.splitlines()[-1]
    assert int(told.split()[1]) >= 200_000 and float(told.split("peak ")[1].split(" GB")[0]) < 2, (
        told
    )
