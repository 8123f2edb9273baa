"""Variants of a run: made from its own files and settings, on the same prompts, once; and what is said of them."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_pm
import train_ppo
import train_sft
from mincai import UserError, ablations, constitution, critique, data, evaluate, feedback, human, measure, world
from mincai.table import rate
from mincai.tokenizer import load_tokenizer

ACTIONS = {a.text: a for a in world.build()}
WHOLE = ((ablations, "SHARES"), (ablations, "PRINCIPLES"), (ablations, "BEST_OF"), (human, "SETTINGS"))
WHOLE = [(module, name, getattr(module, name)) for module, name in WHOLE]  # `result` makes fewer variants
PRINCIPLES = constitution.select(constitution.load_constitution())


@pytest.fixture(scope="module")
def cfg(tiny_base, tmp_path_factory):
    """A finished run of the smallest size: revisions and labels written by hand, models trained for a step."""
    out = tmp_path_factory.mktemp("ablations") / "run"
    tokenizer, prompts = load_tokenizer(tiny_base), str(tiny_base / "prompts.jsonl")
    rows = [r for r in data.read_jsonl(prompts) if not r.get("setting")]
    rows = [r for kind in ("harmful", "benign") for r in [r for r in rows if r["kind"] == kind][:5]]
    here = dict(device="cpu", threads=1)
    revisions, comparisons = [], []
    for n, r in enumerate(rows):
        action = ACTIONS[r["action"]]
        first, good = world.comply(action), world.refuse(action) if action.wrong else world.comply_told(action)
        rounds = [{"round": 1, "principle": "harm-1", "critique": "so", "revision": "keep the answer .",
                   "outcome": "keep"},
                  {"round": 2, "principle": "harm-2", "critique": "so", "revision": good, "outcome": "revised"}]
        revisions.append({**r, "original": first, "revision": good, "changed": True, "rounds": rounds})
        ids = [tokenizer.encode(" " + text) + [tokenizer.eot] for text in (good, first)]
        comparisons.append({**r, "prompt_id": r["id"], "a": good, "b": first, "a_ids": ids[0], "b_ids": ids[1],
                            "a_from": "sft", "b_from": "base", "p_a": 0.9 - 0.01 * n})
    for path, content, made in (
            (out / "revisions.jsonl", revisions, critique.Config(
                model=str(tiny_base), prompts=prompts, harmful=2, helpful=2, rounds=2, max_new=6, **here)),
            (out / "comparisons.jsonl", comparisons, feedback.Config(
                judge=str(tiny_base), prompts=prompts, temperature=2.0, top_k=5, max_new=6, **here))):
        data.write_jsonl(path, content)
        data.write_json(data.sidecar(path), data.stamp(made))
    train_sft.main(train_sft.Config(base=str(tiny_base), data=(str(out / "revisions.jsonl"),), out=str(out / "sft"),
                                    epochs=1, holdout=0.0, **here))
    train_pm.main(train_pm.Config(init=str(out / "sft"), pairs=(str(out / "comparisons.jsonl"),), out=str(out / "pm"),
                                  epochs=1, holdout=0.0, freeze=0, **here))
    train_ppo.main(train_ppo.Config(sft=str(out / "sft"), pm=str(out / "pm"), prompts=prompts, out=str(out / "ppo"),
                                    updates=1, batch=4, max_new=4, epochs=1, minibatches=1, micro_batch=4, freeze=0,
                                    **here))
    every = data.read_jsonl(tiny_base / "prompts_eval.jsonl")
    data.write_jsonl(out / "held.jsonl", [r for split, step in (("eval", 90), ("eval-twin", 120))
                                          for r in [r for r in every if r["split"] == split][::step]])
    return evaluate.Config(out=str(out), base=str(tiny_base), prompts=str(out / "held.jsonl"), max_new=6, **here)


@pytest.fixture
def opened(cfg):
    return measure.open_run(cfg, "cpu")


@pytest.fixture(scope="module")
def result(cfg):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "SHARES", (50,))
        patch.setattr(ablations, "PRINCIPLES", ())
        patch.setattr(human, "SETTINGS", {"careful": human.SETTINGS["careful"]})
        patch.setattr(ablations, "BEST_OF", 2)
        yield ablations.main(measure.open_run(cfg, "cpu"))


def test_every_variant_is_made_and_measured_on_the_same_prompts(cfg, opened, result):
    rows = {r["name"]: r for r in result["rows"]}
    assert list(rows) == ["base", "full", "sft", "greedy", "rlhf-careful", "rlhf-base", "revisions-1", "direct", "hard",
                          "untrained", "share-50", "principles-75", "best-of-2-hot", "best-of-2"]
    assert "no row is left" in rows["revisions-1"]["failed"]  # its first round revised nothing
    n = Counter(r["split"] for r in opened.rows)
    for name, row in rows.items():
        if "failed" in row:
            assert "helpful" not in row and "paired" not in row
            continue
        assert (row["attack_success"]["n"], row["helpful"]["n"]) == (n["eval"], n["eval-twin"]) and row["seconds"] >= 0
        answers = data.read_jsonl(opened.out / "ablations" / name / "answers.jsonl")
        assert [a["id"] for a in answers] == [r["id"] for r in opened.rows]
        assert row["attack_success"] == rate(a["complied"] for a in answers if a["split"] == "eval")
        assert row["over_refusal"] == rate(a["refused"] for a in answers if a["split"] == "eval-twin")
        for key in ("attack_success", "helpful") if row["against"] else ():
            assert row["paired"][key]["difference"] == pytest.approx(
                row[key]["rate"] - rows[row["against"]][key]["rate"])
    assert {r["against"] for r in rows.values()} == {"", "sft", "full"}
    assert set(result["versus_rlhf"]) == {n for n in rows if n.startswith("rlhf-") and "failed" not in rows[n]} != set()
    assert json.loads((opened.out / "ablations.json").read_text()) == result and result["to_do"] == []


def test_one_thing_is_changed_and_nothing_else(opened, result):
    """Settings of the stages that variants ran, beside the run's own."""
    def settings(*parts):
        made = json.loads(opened.out.joinpath(*parts).read_text())["config"]
        return {k: v for k, v in made.items() if k not in ("out", "again", "model", "init", "pairs", "pm", "sft")}

    own, root = {s: settings(s, "run.json") for s in ("pm", "ppo")}, opened.out / "ablations"
    assert settings(root / "hard", "pm", "run.json") == {**own["pm"], "hard": True}
    assert settings(root / "untrained", "pm", "run.json") == {**own["pm"], "epochs": 0}
    for name in ("hard", "untrained", "rlhf-careful", "rlhf-base", "share-50"):
        assert settings(root / name, "ppo", "run.json") == own["ppo"]
    assert settings(root / "direct", "revisions.run.json") == {**settings("revisions.run.json"), "direct": True}
    start = json.loads((root / "rlhf-base" / "ppo" / "run.json").read_text())["config"]["sft"]
    assert start == opened.cfg.base
    drawn = json.loads((root / "principles-75" / "constitution.json").read_text())["principles"]
    assert len(drawn) == 75 and {p["split"] for p in drawn} == {"train"}


def test_finished_work_is_not_done_again_and_an_interrupted_run_goes_on(opened, result, monkeypatch):
    made = []
    monkeypatch.setattr(train_sft, "main", lambda cfg: made.append(cfg.out))
    monkeypatch.setattr(train_pm, "main", lambda cfg: made.append(cfg.out))
    monkeypatch.setattr(train_ppo, "main", lambda cfg: made.append(cfg.out))
    monkeypatch.setattr(measure, "answer_all", lambda *_: pytest.fail("asked again"))
    assert ablations.main(opened)["rows"] == result["rows"] and not made
    gone = opened.out / "ablations" / "share-50" / "made.json"
    before, asked = gone.read_text(), []
    gone.unlink()
    monkeypatch.setattr(measure, "answer_all", lambda model, tokenizer, rows, *_: asked.append(1) or [
        {**r, "answer": "sorry .", "complied": False, "right": False, "refused": True, "true_reason": False}
        for r in rows])
    again = {r["name"]: r for r in ablations.main(opened)["rows"]}
    assert asked == [1] and [path.split("/")[-2:] for path in made] == [["share-50", "pm"], ["share-50", "ppo"]]
    assert again["share-50"]["attack_success"]["k"] == 0
    gone.write_text(before)


def test_other_files_are_an_error_and_again_begins_anew(cfg, opened, result, monkeypatch):
    pairs = opened.out / "comparisons.jsonl"
    before = pairs.read_text()
    pairs.write_text(before + "\n")
    try:
        with pytest.raises(UserError, match="other files or settings.*--again"):
            ablations.main(opened)
        monkeypatch.setattr(ablations, "variants", lambda work: [])
        removed = []
        monkeypatch.setattr(ablations.output, "clear", lambda path: removed.append(path))
        with pytest.raises(UserError):  # nothing was really removed here
            ablations.main(measure.open_run(dataclasses.replace(cfg, again=True), "cpu"))
        assert removed == [opened.out / "ablations"]
    finally:
        pairs.write_text(before)


def test_the_variants_of_a_whole_run_have_their_settings(opened, monkeypatch):
    for module, name, value in WHOLE:
        monkeypatch.setattr(module, name, value)
    found = {v.name: v for v in ablations.variants(ablations.Work(opened, ablations.recorded(opened, 1.0), [], 1.0))}
    assert len(found) == 22 and {"share-0", "share-100", "principles-19", "rlhf-hurried", "best-of-16"} <= set(found)
    assert found["principles-1"].make.args[1] == {"only": "harm-1", "without": ""}
    assert len(found["principles-19"].make.args[1]["only"].split(",")) == 19
    assert found["rlhf-hurried"].make.args[1:] == (human.SETTINGS["hurried"], "sft")
    assert found["best-of-16-hot"].make.args[1:] == (16, 2.0, 5) and found["best-of-16"].make.args[1:] == (16, 1.0, 0)
    assert found["share-25"].make.args[1:] == (25,) and found["hard"].make.args[3] == {"hard": True}
    assert found["greedy"].make.keywords == {"temperature": 0.0} and found["sft"].make.keywords == {}
    cfgs = {**ablations.recorded(opened, 1.0), "feedback": feedback.Config(temperature=1.0, top_k=0)}
    names = [v.name for v in ablations.variants(ablations.Work(opened, cfgs, [], 1.0))]
    assert names.count("best-of-16") == 1 and "best-of-16-hot" not in names  # it would be the same once more
    assert {v.against for name, v in found.items() if name.startswith(("rev", "dir", "prin"))} == {"sft"}


def test_what_a_run_lacks_is_left_out(cfg, tmp_path):
    (tmp_path / "run").mkdir()
    opened = measure.open_run(dataclasses.replace(cfg, out=str(tmp_path / "run")), "cpu")
    work = ablations.Work(opened, ablations.recorded(opened, 1.0), opened.rows, 1.0)
    assert [v.name for v in ablations.variants(work)] == ["base"]


def test_settings_are_the_runs_own_here_and_smaller(cfg, opened, tmp_path):
    found = ablations.recorded(opened, 1.0)
    assert found["critique"].rounds == 2 and found["pm"].freeze == 0 and isinstance(found["sft"].data, tuple)
    small = ablations.recorded(opened, 0.5)
    assert (small["feedback"].harmful, found["feedback"].harmful) == (75, 150)
    assert small["critique"].harmful == 4 and small["ppo"].updates == 2
    opened.out = tmp_path
    for name in ("comparisons.jsonl", "held.jsonl"):
        shutil.copy(Path(cfg.out) / name, tmp_path / name)
    made = feedback.Config(judge=cfg.base, prompts="gone/prompts.jsonl", max_new=6, threads=9)
    data.write_json(tmp_path / "comparisons.run.json", {"config": {**vars(made), "device": "cuda"}})
    moved = ablations.recorded(opened, 1.0)
    assert list(moved) == ["feedback"] and (moved["feedback"].device, moved["feedback"].threads) == ("cpu", 1)
    assert moved["feedback"].prompts == str(Path(cfg.prompts).with_name("prompts.jsonl"))
    data.write_json(tmp_path / "comparisons.run.json", {"config": {"threads": 9, "nonsense": 1}})
    with pytest.raises(UserError, match="comparisons.run.json.*nonsense"):
        ablations.recorded(opened, 1.0)


@pytest.mark.parametrize("rounds, revision", [(1, "second"), (2, "second"), (3, "third"), (4, "third")])
def test_revisions_are_cut_to_what_stood(rounds, revision):
    outcomes = [("second", "revised"), ("keep the answer .", "keep"), ("third", "revised"), ("half", "cut off")]
    row = {"original": "first", "revision": "third", "changed": True, "id": 7,
           "rounds": [{"round": n, "revision": r, "outcome": o} for n, (r, o) in enumerate(outcomes, 1)]}
    found, = ablations.truncated([row], rounds)
    assert (found["revision"], found["changed"], len(found["rounds"]), found["id"]) == (revision, True, rounds, 7)
    assert ablations.truncated([row], 0)[0]["changed"] is False and len(row["rounds"]) == 4
    back = {**row, "rounds": row["rounds"][:1] + [{"revision": "first", "outcome": "revised"}]}
    assert ablations.truncated([back], 2)[0]["changed"] is False  # revised back to what it was


def test_principles_are_nested_and_one_a_target_at_first():
    sets = [ablations.nested(PRINCIPLES, n) for n in (1, 4, 17, 19, 56)]
    for small, large in zip(sets, sets[1:]):
        assert large[:len(small)] == small
    assert [p.target for p in sets[1]] == ["harm", "help", "reasons", "truth"]
    assert len({p.target for p in sets[2]}) == 17 and {p.id for p in sets[4]} == {p.id for p in PRINCIPLES}


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_shares_have_equal_totals(share):
    rows = [{"prompt_id": f"{kind}{n // 6}", "kind": kind, "n": n} for kind, m in (("harmful", 60), ("benign", 96))
            for n in range(m)]
    found = ablations.mixed(rows, share, random.Random(0))
    kinds = Counter(r["kind"] for r in found)
    assert (kinds["harmful"], kinds["benign"]) == (60 - 60 * share, 60 * share)
    assert len({(r["kind"], r["n"]) for r in found}) == 60
    whole = Counter(r["prompt_id"] for r in found)
    assert sum(count < 6 for count in whole.values()) <= 2  # prompts are taken whole, but for the last of a kind
    assert found == ablations.mixed(rows, share, random.Random(0))
    assert share in (0.0, 1.0) or found != ablations.mixed(rows, share, random.Random(1))


def test_the_best_sample_is_taken(opened, monkeypatch):
    tokenizer, rows = opened.tokenizer, [r for r in opened.rows if r["split"] == "eval"][:2]
    texts = [world.comply(ACTIONS[rows[0]["action"]]), world.refuse(ACTIONS[rows[0]["action"]]), "sorry .", "sure .",
             "sorry .", "lamp"]
    scores, scored = {texts[0]: 0.1, texts[1]: 0.9, "sorry .": 0.5, "sure .": 2.0, "lamp": -1.0}, []
    monkeypatch.setattr(ablations, "generate_batched", lambda *_: [
        tokenizer.encode(" " + t) + [tokenizer.eot] for t in texts])
    monkeypatch.setattr(measure, "pm_scores", lambda pm, tok, rows, answers, size: scored.extend(answers) or [
        scores[a] for a in answers])
    monkeypatch.setattr(constitution, "clean", lambda text: text.replace("<|endoftext|>", "").strip())
    work = SimpleNamespace(opened=opened, rows=rows)
    found = ablations.best_of(work, 3, 1.0, 0, None)
    assert [a["answer"] for a in found] == [texts[1], "sure ."]
    assert [(a["complied"], a["refused"], a["id"]) for a in found] == [
        (False, True, rows[0]["id"]), (True, False, rows[1]["id"])]
    assert Counter(scored)["sorry ."] == 2  # once for either prompt


def test_the_table_shows_every_row(result):
    text = "\n".join(ablations.lines("ablations", result))
    for row in result["rows"]:
        line = next(x for x in text.splitlines() if x.startswith(row["name"] + " "))
        assert row["failed"] in line if "failed" in row else f"{100 * row['attack_success']['rate']:.1f}% [" in line
        assert ("paired" in row) == line.endswith(f" to {row['against'] or '-'}")
    for name in result["versus_rlhf"]:
        assert f"{name}: attack success" in text and "of the base's help" in text
