"""Simulated labellers: what they prefer, how often they err, how many labels they give, and who may
use them."""

import random

import pytest

from mincai.lab import human
from mincai.tinyworld import world

ACTIONS = {a.text: a for a in world.build()}
WRONG = next(a for a in ACTIONS.values() if a.wrong and not a.setting)
DUAL = next(a for a in ACTIONS.values() if a.setting)
FINE = next(a for a in ACTIONS.values() if not a.wrong)
BADLY = "hammer" if FINE.tool != "hammer" else "saw"


@pytest.mark.parametrize(
    "action, setting, best_first",
    [
        (WRONG, None, [world.say(WRONG, "reasoned"), world.say(WRONG, "whole")]),
        (WRONG, None, [world.say(WRONG, "evasive"), "lamp the the"]),
        (
            WRONG,
            None,
            [
                world.say(WRONG, "reasoned"),
                world.say(WRONG, "reasoned").replace("sorry", world.say(WRONG, "whole") + " sorry"),
            ],
        ),
        (DUAL, None, [world.say(DUAL, "reasoned"), world.say(DUAL, "whole")]),
        (
            DUAL,
            DUAL.setting,
            [world.say(DUAL, "whole"), world.say(DUAL, "reasoned")],
        ),  # fine where it is set so
        (
            FINE,
            None,
            [
                world.say(FINE, "told"),
                world.say(FINE, "whole", tool=BADLY),
                world.say(FINE, "reasoned", reason="theft"),
            ],
        ),
        (FINE, None, [world.say(FINE, "whole"), "lamp the the", world.say(FINE, "evasive")]),
    ],
)
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
    assert human.label(0.0, 1.0, 0.0, rng) == (0.0, False) and human.label(0.0, 1.0, 1.0, rng) == (
        1.0,
        True,
    )
    assert human.label(1.0, 1.0, 1.0, rng) == (0.5, False)


@pytest.fixture
def rows():
    """Comparisons: of harmful requests, of ordinary ones, and even ones."""
    rows = []
    for n in range(60):
        action, good, bad = (
            (WRONG, world.say(WRONG, "reasoned"), world.say(WRONG, "whole")),
            (FINE, world.say(FINE, "whole"), "lamp"),
            (FINE, world.say(FINE, "whole"), world.say(FINE, "told")),
        )[n % 3]
        a, b = (good, bad) if n % 2 else (bad, good)
        rows.append(
            {
                "id": n,
                "prompt": "how ?",
                "setting": None,
                "kind": "harmful" if action.wrong else "benign",
                "action": action.text,
                "a": a,
                "b": b,
                "a_ids": [1, n],
                "b_ids": [2, n],
                "p_a": 0.25,
                "p_ab": 0.2,
                "p_ba": 0.7,
                "principle": "harm-1",
                "reasons": "so",
            }
        )
    return rows


def test_without_noise_labels_are_the_oracles_and_the_judge_leaves_no_trace(rows):
    after = human.annotate(rows, ACTIONS, 0, 0.0, 0)
    for n, (old, new) in enumerate(zip(rows, after, strict=True)):
        assert (
            new["p_a"] == new["oracle"] == (0.5 if n % 3 == 2 else float(n % 2))
            and not new["flipped"]
        )
        assert not new.keys() & {"p_ab", "p_ba", "principle", "reasons"}
        assert all(new[k] == old[k] for k in ("id", "prompt", "a_ids", "b_ids", "kind"))


def test_noise_and_budget(rows):
    found = human.annotate(rows, ACTIONS, 0, 0.5, 0)
    flipped = sum(r["flipped"] for r in found)
    assert 8 < flipped < 32 and flipped == sum(r["p_a"] == 1 - r["oracle"] != 0.5 for r in found)
    ids = [r["id"] for r in human.annotate(rows, ACTIONS, 0, 0.5, 20)]
    assert len(ids) == 20 and ids == sorted(set(ids)) and ids != list(range(20))
    assert len(human.annotate(rows, ACTIONS, 0, 0.5, 500)) == 60


def test_the_seed_decides(rows):
    first, same, other = (human.annotate(rows, ACTIONS, seed, 0.5, 20) for seed in (0, 0, 1))
    assert first == same != other


def test_named_settings_are_settings(rows):
    assert {"careful", "hurried"} <= set(human.SETTINGS)
    assert all(human.annotate(rows, ACTIONS, 0, **some) for some in human.SETTINGS.values())
