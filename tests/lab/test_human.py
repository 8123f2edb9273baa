"""Simulated labellers: what they prefer, how often they err, how many labels they give, and who may use them."""

import dataclasses
import random
from pathlib import Path

import pytest

from mincai import UserError
from mincai.lab import human
from mincai.plumbing import data
from mincai.tinyworld import world

ACTIONS = {a.text: a for a in world.build()}
WRONG = next(a for a in ACTIONS.values() if a.wrong and not a.setting)
DUAL = next(a for a in ACTIONS.values() if a.setting)
FINE = next(a for a in ACTIONS.values() if not a.wrong)
BADLY = "hammer" if FINE.tool != "hammer" else "saw"


@pytest.mark.parametrize("action, setting, best_first", [
    (WRONG, None, [world.say(WRONG, "reasoned"), world.say(WRONG, "whole")]),
    (WRONG, None, [world.say(WRONG, "evasive"), "lamp the the"]),
    (WRONG, None, [world.say(WRONG, "reasoned"),
                   world.say(WRONG, "reasoned").replace("sorry", world.say(WRONG, "whole") + " sorry")]),
    (DUAL, None, [world.say(DUAL, "reasoned"), world.say(DUAL, "whole")]),
    (DUAL, DUAL.setting, [world.say(DUAL, "whole"), world.say(DUAL, "reasoned")]),  # fine where it is set so
    (FINE, None, [world.say(FINE, "told"), world.say(FINE, "whole", tool=BADLY),
                  world.say(FINE, "reasoned", reason="theft")]),
    (FINE, None, [world.say(FINE, "whole"), "lamp the the", world.say(FINE, "evasive")])])
def test_what_is_better(action, setting, best_first):
    found = [human.merit(action, setting, answer) for answer in best_first]
    assert found == sorted(set(found), reverse=True)


def test_a_refusal_is_as_good_as_another_and_half_of_help_as_wrong_help():
    assert len({human.merit(WRONG, None, world.say(WRONG, style)) for style in world.REFUSAL}) == 1
    terse, wrong = world.say(FINE, "terse"), world.say(FINE, "whole", tool=BADLY)
    assert human.merit(FINE, None, terse) == human.merit(FINE, None, wrong) == 1.0


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
        action, good, bad = ((WRONG, world.say(WRONG, "reasoned"), world.say(WRONG, "whole")),
                             (FINE, world.say(FINE, "whole"), "lamp"),
                             (FINE, world.say(FINE, "whole"), world.say(FINE, "told")))[n % 3]
        a, b = (good, bad) if n % 2 else (bad, good)
        rows.append({"id": n, "prompt": "how ?", "setting": None, "kind": "harmful" if action.wrong else "benign",
                     "action": action.text, "a": a, "b": b, "a_ids": [1, n], "b_ids": [2, n],
                     "p_a": 0.25, "p_ab": 0.2, "p_ba": 0.7, "principle": "harm-1", "reasons": "so"})
    data.write_jsonl(tmp_path / "comparisons.jsonl", rows)
    return human.Config(source=str(tmp_path / "comparisons.jsonl"), out=str(tmp_path / "human.jsonl"), noise=0.0)


def test_without_noise_labels_are_the_oracles_and_the_judge_leaves_no_trace(cfg):
    assert human.main(cfg) == {"labelled": 60, "decided": 40, "flipped": 0}
    before, after = data.read_jsonl(cfg.source), data.read_jsonl(cfg.out)
    for n, (old, new) in enumerate(zip(before, after)):
        assert new["p_a"] == new["oracle"] == (0.5 if n % 3 == 2 else float(n % 2)) and not new["flipped"]
        assert not new.keys() & {"p_ab", "p_ba", "principle", "reasons"}
        assert all(new[k] == old[k] for k in ("id", "prompt", "a_ids", "b_ids", "kind"))


def test_noise_and_budget(cfg):
    noisy = dataclasses.replace(cfg, noise=0.5, again=True)
    found = human.main(noisy)
    rows = data.read_jsonl(cfg.out)
    assert 8 < found["flipped"] < 32 and found["flipped"] == sum(r["p_a"] == 1 - r["oracle"] != 0.5 for r in rows)
    assert human.main(dataclasses.replace(noisy, budget=20))["labelled"] == 20
    ids = [r["id"] for r in data.read_jsonl(cfg.out)]
    assert ids == sorted(set(ids)) and ids != list(range(20))
    assert human.main(dataclasses.replace(noisy, budget=500))["labelled"] == 60


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
    (dict(noise=1.1), "--noise 1.1"), (dict(budget=-1), "--budget -1"),
    (dict(world=3), "no action of world 3")])
def test_what_cannot_be_is_said(cfg, change, words):
    with pytest.raises(UserError, match=words):
        human.main(dataclasses.replace(cfg, **change))
    with pytest.raises(UserError, match="source"):
        human.main(dataclasses.replace(cfg, out=cfg.source))


def test_named_settings_are_settings():
    assert {"careful", "hurried"} <= set(human.SETTINGS)
    assert all(human.Config(**some) for some in human.SETTINGS.values())
