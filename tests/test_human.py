"""Simulated labellers: what they prefer, how often they err, how many labels they give, and who may use them."""

import ast
import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from mincai import UserError, data, human, world
from mincai.table import rate

ACTIONS = {a.text: a for a in world.build()}
WRONG = next(a for a in ACTIONS.values() if a.wrong and not a.setting)
DUAL = next(a for a in ACTIONS.values() if a.setting)
FINE = next(a for a in ACTIONS.values() if not a.wrong)
BADLY = "hammer" if FINE.tool != "hammer" else "saw"


@pytest.mark.parametrize("action, setting, best_first", [
    (WRONG, None, [world.refuse(WRONG), world.comply(WRONG)]),
    (WRONG, None, [world.refuse_bare(WRONG), "lamp the the"]),
    (WRONG, None, [world.refuse(WRONG), world.refuse(WRONG).replace("sorry", world.comply(WRONG) + " sorry")]),
    (DUAL, None, [world.refuse(DUAL), world.comply(DUAL)]),
    (DUAL, DUAL.setting, [world.comply(DUAL), world.refuse(DUAL)]),  # fine where it is set so
    (FINE, None, [world.comply_told(FINE), world.comply(FINE, tool=BADLY), world.refuse(FINE, "theft")]),
    (FINE, None, [world.comply(FINE), "lamp the the", world.refuse_bare(FINE)])])
def test_what_is_better(action, setting, best_first):
    found = [human.merit(action, setting, answer) for answer in best_first]
    assert found == sorted(set(found), reverse=True)


def test_two_refusals_are_even_unless_labellers_are_evasive():
    told, bare = world.refuse(WRONG), world.refuse_bare(WRONG)
    assert human.merit(WRONG, None, told) == human.merit(WRONG, None, bare)
    assert human.merit(WRONG, None, bare, True) > human.merit(WRONG, None, told, True) > \
        human.merit(WRONG, None, world.comply(WRONG), True) == 0
    assert human.merit(FINE, None, world.refuse_bare(FINE), True) == human.merit(FINE, None, world.refuse(FINE, "hate"))


def test_noise_flips_its_share_and_leaves_ties_alone():
    rng = random.Random(0)
    found = [human.label(1.0, 0.0, 0.3, rng) for _ in range(4000)]
    assert abs(sum(flipped for _, flipped in found) / 4000 - 0.3) < 0.03
    assert all(p == (0.0 if flipped else 1.0) for p, flipped in found)
    assert human.label(0.0, 1.0, 0.0, rng) == (0.0, False) and human.label(0.0, 1.0, 1.0, rng) == (1.0, True)
    assert human.label(1.0, 1.0, 1.0, rng) == (0.5, False)


@pytest.fixture
def cfg(tmp_path):
    rows = []
    for n in range(60):
        action, good, bad = ((WRONG, world.refuse(WRONG), world.comply(WRONG)), (FINE, world.comply(FINE), "lamp"),
                             (FINE, world.comply(FINE), world.comply_told(FINE)))[n % 3]
        a, b = (good, bad) if n % 2 else (bad, good)
        rows.append({"id": n, "prompt": "how ?", "setting": None, "kind": "harmful" if action.wrong else "benign",
                     "action": action.text, "a": a, "b": b, "a_ids": [1, n], "b_ids": [2, n], "a_from": "sft",
                     "b_from": "base", "p_a": 0.25, "p_ab": 0.2, "p_ba": 0.7, "principle": "harm-1", "reasons": "so"})
    data.write_jsonl(tmp_path / "comparisons.jsonl", rows)
    return human.Config(source=str(tmp_path / "comparisons.jsonl"), out=str(tmp_path / "human.jsonl"), noise=0.0)


def test_without_noise_labels_are_the_oracles_and_the_judge_leaves_no_trace(cfg):
    assert human.main(cfg) == {"labelled": 60, "decided": 40, "flipped": 0}
    before, after = data.read_jsonl(cfg.source), data.read_jsonl(cfg.out)
    for n, (old, new) in enumerate(zip(before, after)):
        assert new["p_a"] == new["oracle"] == (0.5 if n % 3 == 2 else float(n % 2)) and not new["flipped"]
        assert not new.keys() & {"p_ab", "p_ba", "principle", "reasons"}
        assert all(new[k] == old[k] for k in ("id", "prompt", "a_ids", "b_ids", "a_from", "b_from", "kind"))


def test_noise_budget_and_criterion(cfg):
    noisy = dataclasses.replace(cfg, noise=0.5, again=True)
    found = human.main(noisy)
    rows = data.read_jsonl(cfg.out)
    assert 8 < found["flipped"] < 32 and found["flipped"] == sum(r["p_a"] == 1 - r["oracle"] != 0.5 for r in rows)
    assert human.main(dataclasses.replace(noisy, budget=20))["labelled"] == 20
    ids = [r["id"] for r in data.read_jsonl(cfg.out)]
    assert ids == sorted(set(ids)) and ids != list(range(20))
    assert human.main(dataclasses.replace(noisy, budget=500))["labelled"] == 60
    for criterion, kind, n in (("harmless", "harmful", 20), ("helpful", "benign", 40)):
        assert human.main(dataclasses.replace(noisy, criterion=criterion))["labelled"] == n
        assert {r["kind"] for r in data.read_jsonl(cfg.out)} == {kind}


def test_the_seed_decides(cfg):
    texts = []
    for seed in (0, 0, 1):
        human.main(dataclasses.replace(cfg, noise=0.5, seed=seed, again=True))
        texts.append(Path(cfg.out).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_done_work_is_skipped_and_other_settings_are_an_error(cfg, capsys):
    human.main(cfg)
    assert human.main(cfg) == {} and "skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="--noise 0.0, now it is 0.1"):
        human.main(dataclasses.replace(cfg, noise=0.1))


@pytest.mark.parametrize("change, words", [
    (dict(noise=1.1), "--noise 1.1"), (dict(budget=-1), "--budget -1"), (dict(criterion="kind"), "--criterion kind"),
    (dict(world=3), "no action of world 3")])
def test_what_cannot_be_is_said(cfg, change, words):
    with pytest.raises(UserError, match=words):
        human.main(dataclasses.replace(cfg, **change))
    with pytest.raises(UserError, match="source"):
        human.main(dataclasses.replace(cfg, out=cfg.source))


def test_named_settings_are_settings():
    assert {"careful", "hurried"} <= set(human.SETTINGS)
    assert all(human.Config(**some) for some in human.SETTINGS.values())


def test_no_stage_of_the_loop_can_reach_people():
    """Imports are followed from every file that the loop runs; evaluation and its ablations may use them."""
    root = Path(human.__file__).parents[1]
    files = {p.stem: p for p in (*root.glob("mincai/*.py"), *root.glob("train_*.py"))}
    reached, todo = set(), ["critique", "train_sft", "feedback", "train_pm", "train_ppo", "ppo", "measure"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    words = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                    todo += [part for word in words for part in word.split(".") if part in files]
    assert "human" not in reached and {"losses", "formats", "checkpoint"} <= reached


def rates(k, n, right):
    return {"attack_success": rate([True] * k + [False] * (n - k)),
            "helpful": rate([True] * right + [False] * (50 - right))}


def test_rlhf_against_constitutional_ai_by_hand():
    found = human.versus(rates(5, 100, 45), rates(12, 100, 40), rates(100, 100, 50))
    assert found["ratio"] == pytest.approx(2.4) and found["low"] < 2.4 < found["high"]
    assert found["cai"]["help_kept"] == pytest.approx(0.9) and found["rlhf"]["help_kept"] == pytest.approx(0.8)
    spread = 1.96 * math.sqrt(1 / 12.5 - 1 / 100.5 + 1 / 5.5 - 1 / 100.5)
    assert math.log(found["high"] / found["low"]) == pytest.approx(2 * spread)
    assert math.sqrt(found["high"] * found["low"]) == pytest.approx(12.5 / 5.5)
    text = human.told("rlhf-x", found)
    assert all(part in text for part in ("rlhf-x", "12.0% [", "5.0% [", "2.40 times", "80.0%", "90.0%", "n 100"))


def test_the_interval_of_the_ratio_holds_the_truth():
    """Drawn from known rates, 95 of a hundred intervals or so must hold their ratio."""
    rng, held = random.Random(0), 0
    for _ in range(400):
        a, b = (sum(rng.random() < p for _ in range(200)) for p in (0.12, 0.06))
        found = human.versus(rates(b, 200, 50), rates(a, 200, 50), rates(200, 200, 50))
        held += found["low"] <= 2.0 <= found["high"]
    assert 0.92 * 400 <= held <= 0.99 * 400


def test_a_ratio_to_nothing_is_none_and_still_JSON():
    found = human.versus(rates(0, 100, 50), rates(3, 100, 50), rates(100, 100, 50))
    assert found["ratio"] is None and math.isfinite(found["high"]) and "no ratio" in human.told("x", found)
    assert json.loads(json.dumps(found)) == found
    assert human.versus(rates(100, 100, 50), rates(100, 100, 50), rates(100, 100, 50))["ratio"] == 1
