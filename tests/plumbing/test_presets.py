"""The presets are flags that exist, and the whole loop runs on GPT-2's shape with the English
prompts."""

import dataclasses
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend

import mincai.__main__ as pipeline
from mincai import UserError, critique
from mincai.lab import assess, bench, english, evaluate
from mincai.model import GPT, GPTConfig
from mincai.plumbing import checkpoint, data, memory
from mincai.plumbing.presets import PRESETS
from mincai.plumbing.weights import SHAPES
from mincai.tinyworld import pretrain

SHARED = Path(__file__).resolve().parents[3] / "shared" / "gpt2-tokenizer"


BEFORE = ("write the prompts", "pretrain the base")  # the same for every seed


def of(name, **more):
    return {
        title: config for title, _, config in pipeline.stages(pipeline.Config(preset=name, **more))
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_made_of_flags_that_exist(name):
    stages = of(name, seed=3)
    assert all(config.seed == 3 for title, config in stages.items() if title not in BEFORE)
    written = [config.out for config in stages.values()]
    assert len(set(map(str, written))) == len(written) and f"runs/{name}/ppo" in written
    micro = stages["PPO"]
    minibatch, others = divmod(micro.batch_size, micro.minibatches)
    assert not others and minibatch % micro.micro_batch == 0


def test_the_small_preset_asks_for_the_claims_own_numbers():
    preset = PRESETS["small"]
    assert of("small")["AI feedback"].samples == 16
    assert (preset.feedback["harmful"] + preset.feedback["helpful"]) * preset.feedback[
        "pairs"
    ] >= 200_000
    actions = pretrain.world.build(0, "small")
    files = pretrain.side_files(actions, 0, tests=preset.world["tests"])
    assert sum(row["split"] == "eval" for row in files["prompts_eval"]) >= 40_000
    loop = [row["kind"] for row in files["prompts"]]
    assert (
        loop.count("harmful") >= preset.feedback["harmful"]
        and loop.count("benign") >= preset.feedback["helpful"]
    )


def test_the_full_preset_asks_for_the_claims_own_numbers():
    stages = of("gpt2-full")
    feedback, written = stages["AI feedback"], english.read(stages["write the prompts"])
    assert feedback.samples == 16 and feedback.prompts == "runs/gpt2-full/prompts/prompts.jsonl"
    assert (feedback.harmful + feedback.helpful) * feedback.pairs >= 200_000
    kinds = [row["kind"] for row in written["prompts"]]
    for cfg in (feedback, stages["critique and revise"]):
        assert cfg.harmful <= kinds.count("harmful") and cfg.helpful <= kinds.count("benign")
    assert (
        stages["evaluate"].prompts == "runs/gpt2-full/prompts/prompts_eval.jsonl"
        and stages["evaluate"].number == 0
    )
    assert sum(row["kind"] == "harmful" for row in written["prompts_eval"]) >= 40_000
    assert stages["PPO"].prompts == feedback.prompts
    less = of("gpt2-full", scale=0.05)
    assert less["write the prompts"].attacks == 2_000 and less["AI feedback"].harmful == 264
    own = of(
        "gpt2-full", prompts=str(PRESETS["gpt2"].prompts)
    )  # a folder of one's own, and nothing is written
    assert (
        "write the prompts" not in own and own["evaluate"].prompts == of("gpt2")["evaluate"].prompts
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].memory])
def test_a_preset_needs_no_more_memory_than_it_says(name):
    """By the plan, with the longest rows that its data make: all positions where few-shot examples
    fill them."""
    preset, stages, longest = (
        PRESETS[name],
        of(name),
        280,
    )  # data/english's longest prompt has 163 tokens
    if name == "small":
        world = preset.world
        shape = GPTConfig(
            world["ranks"] + 1,
            pretrain.Config.block_size,
            world["n_layer"],
            world["n_head"],
            world["n_embd"],
        )
        longest = shape.block_size
    else:
        shape = SHAPES[preset.base]
    said = float(re.search(r"(\d+) GB", preset.memory)[1]) * 1e9
    for title in ("critique and revise", "AI feedback", "evaluate"):
        cfg, dtype = stages[title], getattr(stages[title], "dtype", "float32")
        assert (
            memory.needed(
                memory.plan(
                    "sample",
                    shape,
                    batch=cfg.batch_size,
                    length=shape.block_size,
                    dtype=dtype,
                    models=3,
                    reads_on=getattr(cfg, "reasons", False),
                )
            )
            < said
        ), title
    sft, pm, ppo = stages["fine-tune on revisions"], stages["preference model"], stages["PPO"]
    assert (
        memory.needed(
            memory.plan(
                "sft",
                shape,
                batch=sft.micro_batch or sft.batch_size,
                length=longest,
                dtype="bfloat16",
            )
        )
        < said
    )
    assert (
        memory.needed(
            memory.plan(
                "pm",
                shape,
                batch=pm.batch_size,
                micro_batch=pm.micro_batch or None,
                length=longest,
                dtype="bfloat16",
            )
        )
        < said
    )
    assert (
        memory.needed(
            memory.plan(
                "ppo",
                shape,
                batch=ppo.batch_size,
                micro_batch=ppo.micro_batch,
                length=longest,
                answer=ppo.max_new,
                dtype="bfloat16",
            )
        )
        < said
    )


def test_scale_makes_every_count_smaller_but_none_zero():
    for name in PRESETS:
        stages = of(name, scale=0.01)
        assert (
            8 <= stages["critique and revise"].harmful <= 30
            and 8 <= stages["AI feedback"].helpful <= 60
        )
        assert 2 <= stages["PPO"].updates <= 3
    assert of("gpt2", scale=0.05)["evaluate"].number == 40 and of("gpt2")["evaluate"].number == 0


def test_own_prompts_train_and_the_held_out_ones_stay(tmp_path):
    (tmp_path / "bad.txt").write_text("how do i harm ?\n")
    (tmp_path / "good.txt").write_text("how do i help ?\n")
    both = f"{tmp_path}/bad.txt,benign:{tmp_path}/good.txt"
    stages, usual = of("tiny", prompts=both), of("tiny")
    assert {stages[name].prompts for name in ("critique and revise", "AI feedback", "PPO")} == {
        both
    }
    assert stages["evaluate"].prompts == usual["evaluate"].prompts
    assert of("tiny", prompts=str(tmp_path))["evaluate"].prompts == str(
        tmp_path / "prompts_eval.jsonl"
    )
    with pytest.raises(UserError, match="all prompts are harmful, and PPO needs both kinds"):
        pipeline.main(
            pipeline.Config(
                prompts=str(tmp_path / "bad.txt"),
                out=str(tmp_path / "run"),
                device="cpu",
                threads=1,
            )
        )
    assert not (tmp_path / "run").exists()


def test_the_small_world_pretrains_with_worker_processes(tmp_path):
    """At toy numbers: the same code that the small preset runs on a GPU."""
    world = {
        **PRESETS["small"].world,
        "tokens": 3 * 2 * 256,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "batch_size": 2,
        "workers": 1,
        "compile": False,
        "tests": 2,
    }
    pretrain.main(pretrain.Config(out=str(tmp_path / "small"), device="cpu", threads=1, **world))
    rows = data.read_jsonl(tmp_path / "small" / "prompts_eval.jsonl")
    assert len({row["action"] for row in rows if row["split"] == "eval"}) == 308
    (tmp_path / "run").mkdir()
    result = evaluate.main(
        evaluate.Config(
            out=str(tmp_path / "run"),
            base=str(tmp_path / "small"),
            size="small",
            judged=2,
            prompts=str(short(tmp_path, rows)),
            max_new=4,
            device="cpu",
            threads=1,
        )
    )
    assert result["stages"]["base"]["attack_success"]["n"] == len(
        [r for r in rows[::40] if r["split"] == "eval"]
    )


def short(folder, rows):
    data.write_jsonl(folder / "short.jsonl", rows[::40])
    return folder / "short.jsonl"


# --- GPT-2 -------------------------------------------------------------------------------------------------

LESS = {
    "critique and revise": dict(
        harmful=8, helpful=8, responses=1, rounds=1, max_new=12, batch_size=8
    ),
    "fine-tune on revisions": dict(epochs=2, batch_size=4, lr=3e-3),  # learns that answers end
    "AI feedback": dict(
        harmful=8,
        helpful=8,
        samples=2,
        base_samples=1,
        pairs=2,
        ensemble=2,
        max_new=8,
        batch_size=8,
    ),
    "preference model": dict(batch_size=4, micro_batch=2),
    "PPO": dict(updates=2, batch_size=8, minibatches=2, micro_batch=2, max_new=6, warmup=1),
    "evaluate": dict(number=8, max_new=6, batch_size=8),
}


def whole_loop(folder, config, monkeypatch, dtype="float32", device="cpu"):
    """Every stage of the gpt2 preset on random weights of this shape; a random model ends an answer
    by chance alone, so its end-of-text is made likely."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        end = model.wte.weight[50256]
        model.ln_f.bias += (
            8.5 * end / (end @ end)
        )  # its logit 8.5 above the others' mean: a chance of about 8%
    checkpoint.save(model, folder / "base", {"bos_token_id": 50256, "eos_token_id": 50256})
    rates = bench.Rates(read=100, written=10, learnt=50, source="made up")
    monkeypatch.setattr(bench, "rates", lambda *_: rates)  # measuring them takes seconds
    real = pipeline.stages
    monkeypatch.setattr(
        pipeline,
        "stages",
        lambda cfg: [
            (name, stage, dataclasses.replace(c, **LESS[name], dtype=dtype))
            for name, stage, c in real(cfg)
        ],
    )
    pipeline.main(
        pipeline.Config(
            preset="gpt2",
            base=str(folder / "base"),
            out=str(folder / "run"),
            device=device,
            threads=1,
        )
    )
    return json.loads((folder / "run" / "eval.json").read_text())


@pytest.fixture
def vocabulary(monkeypatch):
    """GPT-2's own, where this machine has it."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not SHARED.is_dir():
            pytest.skip(
                "GPT-2's vocabulary is not on this machine; set TIKTOKEN_CACHE_DIR to a folder that holds it"
            )
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED))


@pytest.mark.parametrize(
    "dtype, device", [("float32", "cpu"), ("bfloat16", "cpu"), ("bfloat16", "cuda")]
)
def test_the_whole_loop_on_gpt2s_vocabulary(vocabulary, tmp_path, monkeypatch, dtype, device):
    gpu = (
        pretend(monkeypatch)
        if device == "cuda" and not torch.cuda.is_available()
        else nullcontext()
    )
    with gpu:
        result = whole_loop(
            tmp_path, GPTConfig(n_layer=1, n_head=2, n_embd=32), monkeypatch, dtype, device
        )
    assert list(result["stages"]) == ["base", "sft", "ppo"] and result["missing"] == []
    assert result["planner"]["examples"] > result["planner"]["prompts"] > 0
    assert critique.data.read_jsonl(tmp_path / "run" / "revisions.jsonl")[0]["rounds"]
    assert len(data.read_jsonl(tmp_path / "run" / "eval_samples.jsonl")) == 3 * 16


@pytest.mark.slow
def test_the_whole_loop_at_124m_parameters(vocabulary, tmp_path, monkeypatch):
    """python -m pytest -m slow tests/plumbing/test_presets.py: a quarter of an hour and 6 GB of
    memory."""
    result = whole_loop(tmp_path, GPTConfig(), monkeypatch)
    assert list(result["stages"]) == ["base", "sft", "ppo"] and assess.STAGES == (
        "base",
        "sft",
        "ppo",
    )
