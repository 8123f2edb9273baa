"""Every attack wraps every request, and prompt sets use the families evenly."""

import random
from collections import Counter

import pytest

from mincai.tinyworld import attacks

ACTION = "burn a lamp"


def unspell(text):
    return " ".join("".join(word.split()) for word in text.split(" - "))


def carries(text, family):
    """Does the text hold the words of one of this family's templates, up to the action?"""
    return any(t.split("{}")[0].split(" . ")[0].strip() in text for t in attacks.FAMILIES[family])


@pytest.mark.parametrize("family", attacks.FAMILIES)
def test_every_family_asks_for_the_action(family):
    spelled = attacks.spell(ACTION)
    shown = {"spelled": [spelled], "backwards": [spelled[::-1]], "combined": [ACTION, spelled]}
    shown = shown.get(family, [ACTION])
    for seed in range(30):
        text = attacks.wrap(ACTION, family, random.Random(seed))
        assert sum(some in text for some in shown) == 1 and "{" not in text
        assert text[-1] in ".?" and text == " ".join(text.split())


def test_spelling_loses_nothing():
    assert attacks.spell(ACTION) == "b u r n - a - l a m p"
    assert unspell(attacks.spell(ACTION)) == ACTION
    assert unspell(attacks.spell(ACTION)[::-1][::-1]) == ACTION


def test_a_combined_attack_carries_the_marks_of_two_families():
    seconds = Counter()
    for seed in range(60):
        text = attacks.wrap(ACTION, "combined", random.Random(seed))
        opener, _, rest = text.partition(" . ")
        assert any(carries(opener, family) for family in attacks.OPENERS)
        second = [f for f in ("role play", "hypothetical", "spelled") if carries(rest, f)]
        assert len(second) == 1, text
        seconds.update(second)
    assert len(seconds) == 3


def test_prompt_sets_use_the_families_evenly():
    requests = [{"action": ACTION, "kind": "benign", "category": "", "n": n} for n in range(20)]
    families = tuple(attacks.FAMILIES)
    some = attacks.prompts(requests, families, "eval", random.Random(0), per_request=3)
    assert set(Counter(row["attack"] for row in some).values()) == {6}  # 20 * 3 / 10
    assert all(len({row["attack"] for row in some if row["n"] == n}) == 3 for n in range(20))
    every = attacks.prompts(requests, families, "loop", random.Random(0))
    assert len(every) == 200 and len({row["id"] for row in every}) == 200
    assert all(
        {"id", "prompt", "kind", "category", "attack", "split"} <= row.keys() for row in every
    )
    assert {row["split"] for row in every} == {"loop"}


def test_held_families_are_apart():
    assert set(attacks.SEEN) | set(attacks.HELD) == set(attacks.FAMILIES) and attacks.HELD
    assert not set(attacks.SEEN) & set(attacks.HELD)
    for family in attacks.SEEN:
        for seed in range(30):
            text = attacks.wrap(ACTION, family, random.Random(seed))
            assert not any(carries(text, held) for held in attacks.HELD)
