"""The plan of a run: counted by hand where numbers are small; every preset without weights."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from pretend_gpu import pretend

import mincai.__main__ as pipeline
import train_pm
import train_ppo
import train_sft
from mincai import UserError, constitution, critique, feedback
from mincai.lab import assess, bench, evaluate, plan
from mincai.model import GPTConfig
from mincai.plumbing import data, memory
from mincai.plumbing.presets import PRESETS
from mincai.plumbing.weights import SHAPES
from mincai.tinyworld import pretrain

SHAPE = GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=2, n_embd=8)
# "Human: " and "\nAssistant:" are 18 letters, so these dialogues have 40 letters: 10 tokens
LOOP = [
    {"id": str(n), "prompt": "x" * 22, "kind": kind}
    for n, kind in enumerate(("harmful", "harmful", "benign"))
]


@pytest.fixture
def principles(tmp_path):
    """A constitution of principles of 20 letters: 5 tokens."""
    path = tmp_path / "constitution.json"
    some = [dataclasses.replace(p, tiny="k" * 20) for p in constitution.load_constitution()]
    data.write_json(path, {"principles": list(map(dataclasses.asdict, some))})
    return str(path)


@pytest.fixture
def slow(monkeypatch):
    """A machine of known rates, in place of one that is measured."""
    rates = bench.Rates(read=100, written=10, learnt=50, source="made up")
    monkeypatch.setattr(bench, "rates", lambda *_: rates)
    return rates


# --- by hand --------------------------------------------------------------------------------------


def test_critiques_by_hand(principles):
    """Five answers, each with two rounds of critique and revision: 25 texts of at most 10 tokens. A
    review is read with its answer and principle (10 + 10 + 5), a revision with the critique as
    well."""
    cfg = critique.Config(
        harmful=2,
        helpful=0,
        responses=2,
        rounds=2,
        max_new=10,
        batch_size=4,
        constitution=principles,
    )
    found = plan.critique(cfg, SHAPE, LOOP)
    assert (found.rows, found.written, found.steps, found.learnt) == (5, 25 * 10, 0, 0)
    assert found.read == 5 * (10 + 2 * (25 + 35))
    assert found.memory == memory.needed(memory.plan("sample", SHAPE, batch=4, length=64))
    fewer = plan.critique(dataclasses.replace(cfg, harmful=1, direct=True), SHAPE, LOOP)
    assert (fewer.rows, fewer.written, fewer.read) == (3, 3 * 3 * 10, 3 * (10 + 2 * 35))


def test_examples_fill_no_more_than_the_context(principles):
    cfg = critique.Config(
        harmful=2,
        helpful=1,
        responses=1,
        rounds=1,
        max_new=10,
        batch_size=4,
        constitution=principles,
        fewshot=str(constitution.PATH.parent / "english" / "fewshot.json"),
    )
    assert plan.critique(cfg, SHAPE, LOOP).read == 3 * 3 * (64 - 10)


def test_feedback_by_hand(principles):
    """Three prompts, four samples, one the judge's: six pairs each. Two principles and two orders
    judge a pair 4 times."""
    cfg = feedback.Config(
        harmful=0,
        helpful=0,
        samples=3,
        base_samples=1,
        pairs=0,
        ensemble=2,
        max_new=8,
        batch_size=4,
        constitution=principles,
    )
    found = plan.feedback(cfg, SHAPE, LOOP)
    assert found.rows == 3 * 6 and found.written == 3 * 4 * 8 + 18 * 4 * 8
    assert found.read == 3 * 10 + 18 * 4 * (10 + 2 * 8 + 5)
    fewer = plan.feedback(dataclasses.replace(cfg, pairs=2, reasons=False), SHAPE, LOOP)
    assert fewer.rows == 3 * 2 and fewer.written == 3 * 4 * 8


def test_training_by_hand(monkeypatch):
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.5)
    sft = plan.sft(train_sft.Config(epochs=3, batch_size=4), SHAPE, LOOP, 20, max_new=6)
    assert (sft.rows, sft.steps, sft.learnt) == (10, 3 * 3, 3 * 10 * 16)  # 10 rows: 3 steps
    pm = plan.pm(train_pm.Config(epochs=2, batch_size=4), SHAPE, LOOP, 10, max_new=6)
    assert (pm.rows, pm.steps, pm.learnt) == (9, 2 * 3, 2 * 9 * 2 * 16)
    assert sft.disk == 4 * memory.parameters(SHAPE)
    ppo = plan.ppo(
        train_ppo.Config(updates=5, batch_size=8, epochs=3, minibatches=2, max_new=6),
        SHAPE,
        LOOP,
    )
    assert (ppo.rows, ppo.steps) == (40, 5 * 3 * 2)
    looks = 2 * 128  # answers before and after
    assert (ppo.written, ppo.learnt) == ((40 + looks) * 6, 2 * 3 * 40 * 16)
    assert ppo.read == (40 + looks) * (10 + 4 * 16)
    assert ppo.disk == 4 * memory.parameters(SHAPE)


def test_evaluations_count_the_rows_they_answer():
    rows = [{**LOOP[0], "split": split} for split in ("eval", "eval", "unseen-category", "loop")]
    assert plan.assess(assess.Config(), SHAPES["gpt2"], rows).rows == 3 * 3
    assert plan.assess(assess.Config(number=1), SHAPES["gpt2"], rows).rows == 3
    found = plan.evaluate(evaluate.Config(judged=10, max_new=5), SHAPE, rows)
    assert found.rows == 3 * 4 and found.written == (2 * 3 * 4 + 10 * 8) * 5  # each answered twice


def test_time_is_tokens_by_rates(slow):
    stage = plan.Stage("x", 1, read=200, written=30, learnt=25)
    assert slow.seconds(stage) == 2 + 3 + 0.5 and plan.total([stage, stage], slow) == 11


@pytest.mark.parametrize(
    "seconds, told",
    [
        (3, "3 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (601, "10 min"),
        (5_400, "1.5 hours"),
        (86_400, "24 hours"),
        (129_600, "1.5 days"),
        (8_640_000, "100 days"),
    ],
)
def test_durations_are_told_in_a_fitting_unit(seconds, told):
    assert plan.duration(seconds) == told


def test_a_card_that_is_not_at_hand():
    """124,439,808 parameters: 2 operations each forward, 6 to learn; every token drawn by 100 rows
    reads the weights."""
    found = bench.stated(SHAPES["gpt2"], rows=100)
    assert found.read == pytest.approx(37.5e12 / 248_879_616) and found.learnt == pytest.approx(
        found.read / 3
    )
    assert found.written == pytest.approx(100 * 180e9 / 248_879_616)
    assert (
        bench.stated(SHAPES["gpt2"], rows=10_000).written == found.read
    )  # then the operations are what it waits for


# --- measured -------------------------------------------------------------------------------------


def test_rates_of_a_deep_model_are_those_of_its_blocks(monkeypatch):
    """A clock that goes by the blocks that were run: 1 + blocks seconds a call."""
    depths, real = [], bench.GPT
    monkeypatch.setattr(bench, "GPT", lambda config: depths.append(config.n_layer) or real(config))
    monkeypatch.setattr(
        bench, "median_seconds", lambda work, repeat, device: work() is None or 1.0 + depths[-1]
    )
    shape = GPTConfig(vocab_size=50, block_size=64, n_layer=12, n_head=2, n_embd=8)
    found = bench.rates(shape, "cpu", "bfloat16")
    assert depths == [1, 3] and "float32" in found.source
    tokens = 64 * 64  # rows, and positions as far as there are any
    assert found.read == pytest.approx(tokens / 13) and found.learnt == pytest.approx(
        tokens / 13 / 3
    )
    assert found.written == pytest.approx(64 * 16 / 13)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rates_are_measured_on_the_device_at_hand(monkeypatch, device):
    pretended = device == "cuda" and not torch.cuda.is_available()
    with pretend(monkeypatch) if pretended else nullcontext():
        found = bench.rates(SHAPE, device, "bfloat16")
    assert min(found.read, found.written, found.learnt) > 10 and found.learnt < found.read
    assert ("bfloat16" in found.source) == (device == "cuda")


# --- the presets ----------------------------------------------------------------------------------


def configs_of(preset, **more):
    stages = pipeline.stages(pipeline.Config(preset=preset, **more))
    return {name: config for name, _, config in stages}


def plan_of(preset, **more):
    return {stage.name: stage for stage in plan.stages(configs_of(preset, **more))}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned_without_weights(name):
    found = plan_of(name)
    assert list(found) == [title for title, *_ in pipeline.stages(pipeline.Config(preset=name))]
    assert all(stage.rows > 0 and stage.disk > 0 for stage in found.values())
    assert (
        found["PPO"].steps
        and found["preference model"].steps
        and found["fine-tune on revisions"].steps
    )
    if name in ("small", "gpt2-full"):
        assert found["AI feedback"].rows >= 200_000 and found["evaluate"].rows >= 3 * 40_000
    scaled = plan_of(name, scale=0.01)
    assert scaled["AI feedback"].rows < found["AI feedback"].rows


def test_the_small_presets_base_is_planned_before_it_is_there(tmp_path, monkeypatch):
    small = PRESETS["small"]
    monkeypatch.setitem(
        pipeline.PRESETS, "small", dataclasses.replace(small, base=str(tmp_path / "none"))
    )
    found, world = plan_of("small")["pretrain the base"], small.world
    assert (
        found.steps == 250_000_000 // (128 * pretrain.Config.block_size)
        and found.learnt <= world["tokens"]
    )
    loop, _ = plan.prompts_of(configs_of("small"))  # and no rows that no stage reads
    assert {row["split"] for row in loop} == {"loop"}


def test_an_unknown_model_is_an_error():
    with pytest.raises(UserError, match="gpt3: no such folder, and not one of gpt2"):
        plan.shape_of("gpt3")


# --- on the command line --------------------------------------------------------------------------


def test_the_plan_is_printed_and_nothing_is_done(tmp_path, slow, capsys):
    pipeline.main(
        pipeline.Config(
            preset="gpt2-full", out=str(tmp_path / "run"), device="cpu", threads=1, plan=True
        )
    )
    told = capsys.readouterr().out.splitlines()
    assert list(tmp_path.iterdir()) == []
    names = [title for title, *_ in pipeline.stages(pipeline.Config(preset="gpt2-full"))]
    assert [line.split("  ")[0] for line in told[2:9]] == names and told[9].startswith("all of it")
    assert len({len(line) for line in told[1:10]}) == 1 and max(map(len, told)) <= 130
    head, total = (" ".join(line.split()) for line in (told[1], told[9]))
    assert head == "rows read written learnt steps time here on a card memory disk"
    assert total.endswith(("GB", "MB")) and " days " in total
    assert any(
        line.startswith("time here: made up: 100 tokens/s read, 10 written") for line in told
    )
    assert any(line.startswith("on a card: an A10") for line in told)
    # 124,439,808 parameters of 4 bytes, two networks with two moments each, an old and a new state
    assert told[-1] == "while PPO trains, its state takes up to 6.0 GB more disk"


def test_a_preset_for_gpus_says_on_a_cpu_what_it_would_take(tmp_path, slow, monkeypatch, capsys):
    """Before it begins; here it ends there, for its weights are not on this machine."""

    def none(_):
        raise UserError("no weights")

    monkeypatch.setattr(pipeline, "resolve", none)
    with pytest.raises(UserError, match="no weights"):
        pipeline.main(
            pipeline.Config(preset="gpt2", out=str(tmp_path / "run"), device="cpu", threads=1)
        )
    told = capsys.readouterr().out
    configs = {name: config for name, _, config in pipeline.stages(pipeline.Config(preset="gpt2"))}
    days = plan.duration(plan.total(plan.stages(configs), slow))
    assert days.endswith("days") and f"on this CPU it takes up to {days}" in told
    with pytest.raises(UserError, match="no weights"):
        pipeline.main(pipeline.Config(out=str(tmp_path / "run"), device="cpu", threads=1))
    assert "on this CPU" not in capsys.readouterr().out  # the tiny one is made for it
