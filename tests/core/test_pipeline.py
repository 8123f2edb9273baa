"""python -m mincai from end to end with a model that has learnt nothing; and what a person can get
wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from compare_runs import compare

import mincai.__main__ as pipeline
import train_pm
import train_ppo
import train_sft
from mincai import UserError, constitution, critique, feedback
from mincai.lab import chat, evaluate, plan
from mincai.plumbing import checkpoint, cli, data, distributed
from mincai.plumbing.tokenizer import load_tokenizer

# What the stages would do with a small --scale, smaller still: time, not behaviour
# (a model of four steps revises and prefers by chance: sampled critiques, and labels near 1/2 kept)
LESS = {
    "critique and revise": dict(rounds=4, max_new=32, temperature=1.0),
    "preference model": dict(contrast=0.0, freeze=0),
    "AI feedback": dict(max_new=32, samples=64),
    "PPO": dict(batch_size=16, max_new=8),
    "evaluate": dict(judged=3, max_new=6),
}
HELD = {p.id for p in constitution.load_constitution() if p.split == "held"}


def shrunk(cfg):
    """The six stages with LESS to do; what joins them, paths and seeds, stays as it is."""
    return [
        (name, stage, dataclasses.replace(config, **LESS.get(name, {})))
        for name, stage, config in stages(cfg)
    ]


stages = pipeline.stages


def make_it_end(folder):
    """Turn a model that has learnt nothing towards the end of the line, so that what it writes ends
    at all."""
    model, tokenizer = checkpoint.load(folder), load_tokenizer(folder)
    with torch.no_grad():
        end = model.wte.weight[tokenizer.newline] + model.wte.weight[tokenizer.eot]
        model.ln_f.bias += 3 * end / end.norm()
    kept = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("config.json", "model.safetensors")
    }
    checkpoint.save(model, folder, kept | {"run.json": json.loads(kept["run.json"])})


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """(run folder, base folder, settings) of one whole run. Among its prompts are some of another
    split."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(tiny_base, folder / "base")
    make_it_end(folder / "base")
    rows = data.read_jsonl(folder / "base" / "prompts.jsonl")
    secret = [
        {**row, "id": f"secret-{i}", "prompt": f"secret {i} ?", "split": "eval"}
        for i, row in enumerate(rows[:900])
    ]
    data.write_jsonl(folder / "base" / "prompts.jsonl", secret + rows)
    test = data.read_jsonl(folder / "base" / "prompts_eval.jsonl")
    data.write_jsonl(folder / "base" / "prompts_eval.jsonl", test[::60])
    cfg = pipeline.Config(
        out=str(folder / "run"), base=str(folder / "base"), scale=0.01, device="cpu", threads=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stages", shrunk)
        pipeline.main(cfg)
    return folder / "run", folder / "base", cfg


def test_every_stage_leaves_what_it_says(run):
    out, base, _ = run
    for name in (
        "revisions.run.json",
        "comparisons.run.json",
        "sft/run.json",
        "pm/run.json",
        "ppo/run.json",
        "eval.json",
    ):
        stamp = json.loads((out / name).read_text())
        assert stamp["config"]["seed"] == stamp["seed"] == 0
        assert stamp.keys() >= {"torch", "device", "git", "mincai"}
    for stage in ("sft", "pm", "ppo"):
        assert {"config.json", "model.safetensors", "tokenizer.tiktoken", "metrics.jsonl"} <= {
            path.name for path in (out / stage).iterdir()
        }
        assert (out / stage / "tokenizer.tiktoken").read_bytes() == (
            base / "tokenizer.tiktoken"
        ).read_bytes()
    revisions, pairs = (
        data.read_jsonl(out / "revisions.jsonl"),
        data.read_jsonl(out / "comparisons.jsonl"),
    )
    assert len(revisions) == 8 + 8 and all(len(row["rounds"]) == 4 for row in revisions)
    assert [row["kind"] for row in revisions].count("harmful") == 8
    assert 0 < len(pairs) <= 16 * 8 and len({row["prompt_id"] for row in pairs}) > 1
    tested = data.read_jsonl(base / "prompts_eval.jsonl")
    assert len(data.read_jsonl(out / "eval_samples.jsonl")) == 3 * len(tested)
    log = data.read_jsonl(out / "ppo" / "metrics.jsonl")
    assert [row["update"] for row in log] == [0, 1, 2]
    assert {"dev_needless", "dev_evasive", "dev_quality"} <= log[0].keys() & log[-1].keys()
    result = json.loads((out / "eval.json").read_text())
    assert (
        list(result["stages"]) == ["base", "sft", "ppo"]
        and result["missing"] == []
        and "pm" in result
    )
    assert not [
        p for p in out.rglob("*") if p.name.startswith(".") or p.name.endswith((".tmp", ".partial"))
    ]


def test_the_plan_counts_what_the_stages_then_do(run):
    """Rows and steps to the number where the settings alone decide, and never fewer where models do
    as well."""
    out, base, cfg = run
    configs = {name: config for name, _, config in shrunk(cfg)}
    found = {stage.name: stage for stage in plan.stages(configs)}
    metrics = {
        name: json.loads((out / name / "run.json").read_text())["metrics"] for name in ("sft", "pm")
    }
    revisions = data.read_jsonl(out / "revisions.jsonl")
    assert found["critique and revise"].rows == len(revisions)
    assert found["evaluate"].rows == len(data.read_jsonl(out / "eval_samples.jsonl"))
    ppo = configs["PPO"]
    assert (
        found["PPO"].rows
        == data.read_jsonl(out / "ppo" / "metrics.jsonl")[-1]["episodes"]
        == ppo.updates * ppo.batch_size
    )
    sft, pm = configs["fine-tune on revisions"], configs["preference model"]
    assert (
        metrics["sft"]["steps"]
        == plan.training_steps(metrics["sft"]["rows"], sft.batch_size, sft.epochs)
        <= found["fine-tune on revisions"].steps
    )
    assert metrics["pm"]["steps"] == plan.training_steps(
        metrics["pm"]["pairs"], pm.batch_size, pm.epochs
    )
    pairs = len(data.read_jsonl(out / "comparisons.jsonl"))
    assert (
        pairs <= found["AI feedback"].rows
        and metrics["pm"]["pairs"] <= found["preference model"].rows
    )
    tokenizer = load_tokenizer(base)
    prompts = [row["prompt"] for row in data.read_jsonl(base / "prompts.jsonl")]
    told, real = (
        sum(map(plan.tokens, prompts)),
        sum(len(tokenizer.encode(text)) for text in prompts),
    )
    assert 0.7 < told / real < 1.3


def test_what_is_held_out_trains_nothing(run):
    out, base, _ = run
    splits = {row["id"]: row["split"] for row in data.read_jsonl(base / "prompts.jsonl")}
    revisions, pairs = (
        data.read_jsonl(out / "revisions.jsonl"),
        data.read_jsonl(out / "comparisons.jsonl"),
    )
    used = {row["id"] for row in revisions} | {row["prompt_id"] for row in pairs}
    assert {splits[i] for i in used} == {"loop"} and "eval" in splits.values()
    drawn = {r["principle"] for row in revisions for r in row["rounds"]} | {
        row["principle"] for row in pairs
    }
    assert len(drawn) > 10 and not drawn & HELD
    for name in ("revisions.jsonl", "comparisons.jsonl", "ppo/samples.jsonl"):
        assert "secret" not in (out / name).read_text()


def test_a_second_run_skips_everything(run, monkeypatch, capsys):
    out, _, cfg = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(pipeline, "stages", shrunk)
    pipeline.main(cfg)
    assert capsys.readouterr().out.count(" is there already") == 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_that_was_moved_with_its_base_is_there_already(run, tmp_path, monkeypatch, capsys):
    out, base, cfg = run
    shutil.copytree(out, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "run"), base=str(tmp_path / "base"))
    monkeypatch.setattr(pipeline, "stages", shrunk)
    pipeline.main(cfg)
    assert capsys.readouterr().out.count(" is there already") == 6
    rows = data.read_jsonl(tmp_path / "run" / "revisions.jsonl")
    data.write_jsonl(tmp_path / "run" / "revisions.jsonl", rows[1:])
    with pytest.raises(
        UserError, match=r"revisions.jsonl: is not as it was made, says revisions.run.json; "
    ):
        pipeline.main(cfg)


def test_the_stages_hand_on_what_they_were_given():
    cfg = pipeline.Config(
        out="x", base="b", without="theft,help", seed=7, device="cpu", threads=3, again=True
    )
    configs = {name: config for name, _, config in stages(cfg)}
    for config in configs.values():
        assert (config.seed, config.device, config.threads, config.again) == (7, "cpu", 3, True)
    for name in ("critique and revise", "AI feedback"):
        assert configs[name].without == "theft,help"
        assert configs[name].prompts == str(Path("b/prompts.jsonl"))
    assert configs["evaluate"].prompts == str(Path("b/prompts_eval.jsonl"))
    read = {
        value
        for config in configs.values()
        for name, value in vars(config).items()
        if name in ("model", "judge", "pairs", "pm", "base") and isinstance(value, str)
    }
    read |= set(configs["fine-tune on revisions"].data)
    written = {config.out for config in configs.values()} | {"b"}
    assert read <= written  # every stage reads what another wrote
    defaults = dict((name, config) for name, _, config in stages(pipeline.Config()))
    assert defaults["PPO"].updates == train_ppo.Config().updates and defaults[
        "AI feedback"
    ].harmful == (feedback.Config().harmful)


def test_what_the_last_stages_cannot_share_is_told_before_the_first(monkeypatch, tmp_path):
    cfg = pipeline.Config(out=str(tmp_path / "run"))
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="64 answers cannot be shared evenly among 3 processes"):
        pipeline.check(cfg, stages(cfg))


# --- what a person can get wrong --------------------------------------------------------------------------

STAGES = {
    "critique": critique,
    "feedback": feedback,
    "train_sft": train_sft,
    "train_pm": train_pm,
    "train_ppo": train_ppo,
    "evaluate": evaluate,
    "chat": chat,
}
MODEL = {
    "critique": "--model",
    "feedback": "--judge",
    "train_sft": "--model",
    "train_pm": "--model",
    "train_ppo": "--model",
    "evaluate": "--base",
    "chat": "--model",
}
ROWS = {
    "critique": "--prompts",
    "feedback": "--prompts",
    "train_sft": "--data",
    "train_pm": "--pairs",
    "train_ppo": "--prompts",
    "evaluate": "--prompts",
}


@pytest.fixture
def fails(run, tmp_path, capsys):
    """fails(stage, flags...): what a stage that must stop with exit code 2 says on stderr; files of
    `run`."""
    out, base, _ = run
    files = {
        "critique": ["--model", base, "--prompts", base / "prompts.jsonl"],
        "feedback": ["--model", out / "sft", "--judge", base, "--prompts", base / "prompts.jsonl"],
        "train_sft": ["--model", base, "--data", out / "revisions.jsonl"],
        "train_pm": ["--model", out / "sft", "--pairs", out / "comparisons.jsonl"],
        "train_ppo": [
            "--model",
            out / "sft",
            "--pm",
            out / "pm",
            "--prompts",
            base / "prompts.jsonl",
        ],
        "evaluate": ["--base", base, "--prompts", base / "prompts_eval.jsonl"],
        "chat": ["--model", base],
    }
    outputs = {"critique": tmp_path / "r.jsonl", "feedback": tmp_path / "c.jsonl"}
    (tmp_path / "evaluate").mkdir()

    def stop(stage, *flags):
        argv = [*files[stage], "--device", "cpu", "--threads", "1"]
        argv += [] if stage == "chat" else ["--out", outputs.get(stage, tmp_path / stage)]
        with pytest.raises(SystemExit) as stopped:
            cli.run(
                STAGES[stage].main,
                STAGES[stage].Config,
                argv=[str(part) for part in [*argv, *flags]],
            )
        err = capsys.readouterr().err
        lines = [
            line for line in err.splitlines() if line and "prompt/s" not in line
        ]  # no progress bars
        assert stopped.value.code == 2 and not any("Traceback" in line for line in lines)
        if "unrecognized" not in lines[-1]:  # argparse shows the usage first
            assert len(lines) == 1 and lines[0].startswith("mincai: error: "), lines
        return lines[-1]

    return stop


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_flag_and_a_missing_model(fails, stage):
    assert "--sed" in fails(stage, "--sed", "1")
    assert "nowhere: no such folder" in fails(stage, MODEL[stage], "nowhere")


@pytest.mark.parametrize("stage", ROWS)
def test_rows_that_cannot_be_read(fails, stage, tmp_path):
    path = tmp_path / "rows.jsonl"
    for content, words in (
        ("", "no rows"),
        ("\n \n", "no rows"),
        ('{"id": 1}', "line 1"),
        ("[]", "line 1"),
    ):
        path.write_text(content)
        assert words in fails(stage, ROWS[stage], path), content
    keys = "id prompt kind category attack action split revision a_ids b_ids p_a".split()
    good = json.dumps(
        dict.fromkeys(keys, "x") | {"kind": "harmful", "p_a": 0.5, "a_ids": [1], "b_ids": [2]}
    )
    path.write_text(good + "\n" + good[:40] + "\n")
    assert "rows.jsonl line 2: not JSON" in fails(stage, ROWS[stage], path)
    path.unlink()
    assert "no such file" in fails(stage, ROWS[stage], path)


@pytest.mark.parametrize("stage", ["critique", "feedback", "evaluate", "train_sft", "train_ppo"])
def test_a_prompt_longer_than_the_context(fails, stage, tmp_path, run):
    rows = data.read_jsonl(run[1] / "prompts_eval.jsonl")
    rows = [r for r in rows if r["split"].startswith("eval")]
    split = {} if stage == "evaluate" else {"split": "loop"}
    rows = [{**r, "prompt": "word " * 500, "revision": "x", **split} for r in rows]
    data.write_jsonl(tmp_path / "rows.jsonl", rows)
    line = fails(stage, ROWS[stage], tmp_path / "rows.jsonl")
    if stage == "train_sft":
        assert f"{len(rows)} too long" in line
    else:
        assert "256" in line and "too long" in line or "at most 256" in line


@pytest.mark.parametrize("stage", MODEL)
def test_weights_that_do_not_fit_or_were_cut_short(fails, stage, tmp_path, run):
    broken = tmp_path / "broken"
    shutil.copytree(run[1], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    line = fails(stage, MODEL[stage], broken)
    assert "wte.weight" in line and "(7, 32)" in line or "7 rows" in line or "has 7" in line
    (broken / "config.json").write_text(json.dumps(config))
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "safetensors" in fails(stage, MODEL[stage], broken)


@pytest.mark.parametrize("stage", ROWS)
def test_an_output_made_with_other_settings(fails, stage, run):
    out = {"critique": "revisions.jsonl", "feedback": "comparisons.jsonl", "evaluate": ""}
    out = out.get(stage, stage.removeprefix("train_"))
    line = fails(stage, "--out", run[0] / out, "--seed", "5")
    assert "--again" in line and "was made with" in line


@pytest.mark.parametrize("stage", ["critique", "feedback"])
def test_a_principle_that_is_not_there(fails, stage):
    assert "is called thefts; targets: " in fails(stage, "--without", "theft,thefts")


def test_runs_are_compared_by_their_figures_alone(run, tmp_path):
    """compare_runs.py: another place and time is the same run; a figure, a row or a weight is
    not."""
    shutil.copytree(run[0], tmp_path / "same")
    stamp = json.loads((tmp_path / "same" / "eval.json").read_text())
    stamp["config"]["out"], stamp["seconds"] = "elsewhere", 1.0
    (tmp_path / "same" / "eval.json").write_text(json.dumps(stamp))
    assert compare(run[0], tmp_path / "same") == []
    stamp["stages"]["ppo"]["quality"] += 1e-9
    (tmp_path / "same" / "eval.json").write_text(json.dumps(stamp))
    (tmp_path / "same" / "comparisons.jsonl").unlink()
    model = checkpoint.load(tmp_path / "same" / "ppo")
    model.ln_f.bias.data[0] += 1e-6
    checkpoint.save(model, tmp_path / "same" / "ppo")
    assert compare(run[0], tmp_path / "same")[:2] == ["comparisons.jsonl", "eval.json"]
    assert "ppo/model.safetensors" in compare(run[0], tmp_path / "same")
