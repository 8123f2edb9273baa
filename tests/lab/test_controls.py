"""Controls: one cause taken away and nothing else, on the same prompts, once; and how much of the
gain is left."""

import dataclasses
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train_pm
import train_ppo
import train_sft
from mincai import UserError, critique, feedback
from mincai.lab import controls, evaluate, measure
from mincai.lab.table import as_text, rate
from mincai.plumbing import checkpoint, data, progress
from mincai.plumbing.tokenizer import load_tokenizer
from mincai.tinyworld import world

ACTIONS = {a.text: a for a in world.build()}


@pytest.fixture(scope="module")
def few_samples():
    """Fewer fresh answers to scale scores on and to look at: time, not behaviour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pm, "NORMALISED", 8)
        patch.setattr(train_ppo, "LOOKED_AT", 4)
        yield


@pytest.fixture(scope="module")
def cfg(tiny_base, tmp_path_factory, few_samples):
    """A finished run of the smallest size: revisions and labels written by hand, models trained for
    a step."""
    out = tmp_path_factory.mktemp("controls") / "run"
    tokenizer, prompts = load_tokenizer(tiny_base), str(tiny_base / "prompts.jsonl")
    rows = [r for r in data.read_jsonl(prompts) if not r.get("setting")]
    rows = [r for kind in ("harmful", "benign") for r in [r for r in rows if r["kind"] == kind][:5]]
    here = dict(device="cpu", threads=1)
    revisions, comparisons = [], []
    for n, r in enumerate(rows):
        action = ACTIONS[r["action"]]
        first, good = (
            world.say(action, "whole"),
            world.say(action, "reasoned" if action.wrong else "told"),
        )
        rounds = [
            {
                "round": 1,
                "principle": "harm-1",
                "critique": "so",
                "revision": good,
                "outcome": "revised",
            }
        ]
        revisions.append(
            {**r, "original": first, "revision": good, "changed": True, "rounds": rounds}
        )
        ids = [tokenizer.encode(" " + text) + [tokenizer.eot] for text in (good, first)]
        comparisons.append(
            {
                **r,
                "prompt_id": r["id"],
                "a": good,
                "b": first,
                "a_ids": ids[0],
                "b_ids": ids[1],
                "p_a": 0.9 - 0.01 * n,
            }
        )
    for path, content, made in (
        (
            out / "revisions.jsonl",
            revisions,
            critique.Config(
                model=str(tiny_base),
                prompts=prompts,
                harmful=2,
                helpful=2,
                rounds=1,
                max_new=6,
                **here,
            ),
        ),
        (
            out / "comparisons.jsonl",
            comparisons,
            feedback.Config(
                judge=str(tiny_base),
                prompts=prompts,
                harmful=2,
                helpful=2,
                samples=3,
                max_new=6,
                **here,
            ),
        ),
    ):
        data.write_jsonl(path, content)
        data.write_json(data.sidecar(path), data.stamp(made))
    train_sft.main(
        train_sft.Config(
            model=str(tiny_base),
            data=(str(out / "revisions.jsonl"),),
            out=str(out / "sft"),
            epochs=1,
            **here,
        )
    )
    train_pm.main(
        train_pm.Config(
            model=str(out / "sft"),
            pairs=(str(out / "comparisons.jsonl"),),
            out=str(out / "pm"),
            epochs=1,
            freeze=0,
            **here,
        )
    )
    train_ppo.main(
        train_ppo.Config(
            model=str(out / "sft"),
            pm=str(out / "pm"),
            prompts=prompts,
            out=str(out / "ppo"),
            updates=1,
            batch_size=4,
            max_new=4,
            epochs=1,
            minibatches=1,
            micro_batch=4,
            **here,
        )
    )
    every = data.read_jsonl(tiny_base / "prompts_eval.jsonl")
    data.write_jsonl(
        out / "prompts_eval.jsonl",
        [
            r
            for split, step in (("eval", 90), ("eval-twin", 120))
            for r in [r for r in every if r["split"] == split][::step]
        ],
    )
    dev = data.read_jsonl(tiny_base / "prompts_dev.jsonl")
    data.write_jsonl(
        out / "prompts_dev.jsonl", [r for r in dev if r["split"].startswith("eval")][::60]
    )
    return evaluate.Config(
        out=str(out),
        base=str(tiny_base),
        prompts=str(out / "prompts_eval.jsonl"),
        max_new=6,
        **here,
    )


@pytest.fixture
def opened(cfg):
    return measure.open_run(cfg, "cpu")


@pytest.fixture(scope="module")
def result(cfg):
    return controls.main(measure.open_run(cfg, "cpu"))


def settings(*parts):
    made = json.loads(parts[0].joinpath(*parts[1:]).read_text())["config"]
    return {
        k: v
        for k, v in made.items()
        if k not in ("out", "again", "model", "init", "pairs", "pm", "sft", "base")
    }


def test_every_control_is_made_and_measured_on_the_same_prompts(opened, result):
    rows, n = {r["name"]: r for r in result["rows"]}, Counter(r["split"] for r in opened.rows)
    assert list(rows) == [
        "phase 1",
        "full",
        "no labels",
        "no labels, turned",
        "shuffled",
        "inverted",
        "length",
        "human, careful",
        "human, hurried",
        "human, no phase 1",
        "no critique",
        "no theft",
        "beta 0",
        "beta 0.8",
        "beta 0, long",
    ]
    for name, row in rows.items():
        if "failed" in row:
            continue
        assert (row["attack_success"]["n"], row["helpful"]["n"]) == (n["eval"], n["eval-twin"])
        answers = data.read_jsonl(opened.out / "controls" / name / "answers.jsonl")
        assert [a["id"] for a in answers] == [r["id"] for r in opened.rows]
        assert row["attack_success"] == rate(a["complied"] for a in answers if a["split"] == "eval")
    assert not {
        "phase 1",
        "full",
        "no labels",
        "shuffled",
        "inverted",
        "length",
        "beta 0, long",
    } & {name for name, row in rows.items() if "failed" in row}
    assert json.loads((opened.out / "controls.json").read_text()) == result
    text = as_text(controls.tables(result))
    assert all(name in text for name in rows) and "quality at the end" in text


def test_one_thing_is_changed_and_nothing_else(opened, result):
    own, root = (
        {s: settings(opened.out, s, "run.json") for s in ("pm", "ppo")},
        opened.out / "controls",
    )
    assert settings(root, "no labels", "pm", "run.json") == {**own["pm"], "epochs": 0}
    for name in ("shuffled", "inverted", "length"):
        assert settings(root, name, "pm", "run.json") == own["pm"]
        assert settings(root, name, "ppo", "run.json") == own["ppo"]
    assert settings(root, "beta 0, long", "ppo", "run.json") == {
        **own["ppo"],
        "beta": 0.0,
        "updates": 4,
    }
    mine, ran = (
        settings(opened.out, "revisions.run.json"),
        settings(root, "no critique", "revisions.run.json"),
    )
    assert ran == {**mine, "direct": True}
    curve = next(r for r in result["rows"] if r["name"] == "beta 0, long")["curve"]
    assert [point["update"] for point in curve] == [0, 4] and curve[-1]["score"] is not None


def test_a_read_out_that_is_turned_scores_the_opposite(opened, result):
    ids = torch.arange(12).view(2, 6)
    plain, turned = (
        checkpoint.load(opened.out / "controls" / name / "pm", scalar=True)(ids)
        for name in ("no labels", "no labels, turned")
    )
    assert plain.std() > 0.01 and torch.equal(turned, -plain)
    stamp = json.loads((opened.out / "controls/no labels, turned/pm/run.json").read_text())
    assert stamp["turned"] and stamp["config"]["epochs"] == 0


def test_labels_by_hand():
    rows = [
        {"p_a": p, "a_ids": [1] * n, "b_ids": [1, 1]}
        for p, n in ((0.9, 3), (0.2, 2), (0.5, 1), (0.7, 4))
    ]
    rng = random.Random(1)
    assert [r["p_a"] for r in controls.inverted(rows, rng)] == pytest.approx([0.1, 0.8, 0.5, 0.3])
    assert [r["p_a"] for r in controls.longer(rows, rng)] == [1.0, 0.5, 0.0, 1.0]
    dealt = [r["p_a"] for r in controls.shuffled(rows * 20, rng)]
    assert sorted(dealt) == sorted(r["p_a"] for r in rows * 20) and dealt != [
        r["p_a"] for r in rows * 20
    ]
    assert [r["p_a"] for r in rows] == [0.9, 0.2, 0.5, 0.7]


def measured(over_refusal, explained, helpful):
    return {
        name: {"rate": value}
        for name, value in (
            ("over_refusal", over_refusal),
            ("explained", explained),
            ("helpful", helpful),
        )
    }


def test_what_is_kept_of_a_gain_by_hand():
    start, full = measured(0.6, 0.2, 0.3), measured(0.0, 0.9, 0.8)
    assert controls.gain_kept(full, start, full) == pytest.approx(1)
    assert controls.gain_kept(start, start, full) == pytest.approx(0)
    assert controls.gain_kept(measured(0.3, 0.2, 0.3), start, full) == pytest.approx(1 / 6)
    assert controls.gain_kept(measured(0.6, 0.2, 0.05), start, full) == pytest.approx(-1 / 6)
    assert controls.gain_kept(start, start, measured(0.59, 0.21, 0.3)) is None  # no gain to keep


def test_done_work_is_kept_and_other_files_are_an_error(cfg, opened, result, capsys):
    marker = opened.out / "controls" / "shuffled" / "made.json"
    before = marker.stat().st_mtime_ns
    assert controls.main(opened)["rows"] == result["rows"] and marker.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--again"):
        controls.main(measure.open_run(dataclasses.replace(cfg, seed=9), "cpu"))


def test_half_a_run_is_refused_in_a_line(cfg, tmp_path):
    with pytest.raises(
        UserError, match=r"revisions.run.json: is not there; controls need a whole run"
    ):
        controls.main(measure.open_run(dataclasses.replace(cfg, out=str(tmp_path)), "cpu"))


def test_a_control_that_failed_leaves_no_progress_behind(tmp_path, monkeypatch):
    def fail(opened, cfgs, control, folder):
        cfg = controls.train_pm.Config(out=str(folder / "pm"))
        progress.Training(cfg, {}, {"net": torch.nn.Linear(2, 2)}, []).step({"step": 1})
        assert (folder / "pm.progress").is_dir()
        raise UserError("all answers score the same")

    monkeypatch.setattr(controls, "make", fail)
    opened = SimpleNamespace(out=tmp_path)
    row = controls.finished(opened, {}, controls.Control("shuffled", "labels dealt out"))
    assert row["failed"] == "all answers score the same"
    names = {path.name for path in (tmp_path / "controls" / "shuffled").iterdir()}
    assert names == {"answers.jsonl", "made.json"}
