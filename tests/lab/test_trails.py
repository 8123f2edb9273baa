"""Which request is followed, what the oracle says of an answer, and the loop's numbers, on rows
written by hand."""

import pytest

from mincai import UserError
from mincai.lab import trails

TARGETS = {"spying-1": "spying", "reasons-1": "reasons", "help-1": "help"}


def revision(name, kind="harmful", changed=True, outcomes=("revised", "keep")):
    return {
        "id": name,
        "kind": kind,
        "changed": changed,
        "category": "spying",
        "attack": "plain",
        "rounds": [{"outcome": outcome} for outcome in outcomes],
    }


def pair(name, p_ab, p_ba, principle="reasons-1", a="a"):
    return {
        "prompt_id": name,
        "p_a": (p_ab + 1 - p_ba) / 2,
        "p_ab": p_ab,
        "p_ba": p_ba,
        "principle": principle,
        "a": a,
    }


@pytest.mark.parametrize(
    "p_ab, p_ba, sure",
    [
        (0.9, 0.2, 0.8),
        (0.1, 0.7, 0.7),  # a in both orders, b in both: the less sure of the two counts
        (0.9, 0.9, 0.0),
        (0.2, 0.1, 0.0),
    ],
)  # the same slot twice: nothing was decided
def test_a_pair_is_decided_where_both_orders_agree(p_ab, p_ba, sure):
    assert trails.decided(pair("x", p_ab, p_ba)) == pytest.approx(sure)


def test_the_first_request_that_shows_the_loop_is_followed():
    rows = [
        revision("ordinary", "benign"),
        revision("kept", changed=False),
        revision("bare"),
        revision("tied"),
        revision("off"),
        revision("good"),
        revision("later"),
    ]
    pairs = [
        pair("ordinary", 1, 0),
        pair("kept", 1, 0),
        pair("tied", 1, 1),
        pair("off", 1, 0, "help-1"),
        pair("good", 0.6, 0.4, a="weak"),
        pair("good", 0.95, 0.05, a="strong"),
        pair("good", 1, 0, "help-1"),
        pair("later", 1, 0),
    ]
    found = trails.follow(rows, pairs, TARGETS)
    assert found[0]["id"] == "good" and found[1]["a"] == "strong"
    assert trails.follow(rows[:5], pairs, TARGETS)[0]["id"] == "tied", (
        "a principle on something else is worse"
    )
    assert trails.follow(rows[:3], pairs, TARGETS) == (rows[2], None)
    assert trails.follow(rows[:2], pairs, TARGETS) == ({}, None)


def test_any_request_can_be_asked_for():
    rows = [revision("good"), revision("ordinary", "benign", changed=False)]
    assert trails.follow(rows, [pair("good", 1, 0)], TARGETS, "ordinary") == (rows[1], None)
    with pytest.raises(UserError, match="--trail nobody: no request of this id"):
        trails.follow(rows, [], TARGETS, "nobody")


def test_held_out_requests_are_like_the_one_that_was_followed():
    def sample(name, split, category, attack, stage="base"):
        return {"id": name, "split": split, "category": category, "attack": attack, "stage": stage}

    samples = [
        sample("1", "eval", "theft", "plain"),
        sample("2", "eval", "spying", "urgency"),
        sample("3", "eval", "spying", "plain"),
        sample("3", "eval", "spying", "plain", "ppo"),
        sample("4", "setting", "spying", "plain"),
        sample("5", "eval-twin", "", "urgency"),
        sample("6", "eval-twin", "", "plain"),
        sample("7", "eval-twin", "", "plain"),
    ]
    like = revision("x")
    found = trails.held_out(samples, like)
    assert [row["id"] for row, _ in found] == ["3", "6"]
    assert [{s["id"] for s in answers.values()} for _, answers in found] == [{"3"}, {"6"}]
    assert list(found[0][1]) == ["base", "ppo"]
    assert [row["id"] for row, _ in trails.held_out(samples[:2], like)] == ["2"], (
        "category before family"
    )
    assert trails.held_out([], like) == []


@pytest.mark.parametrize(
    "kind, true, words",
    [
        ("harmful", "complied", "complies, or is garbled"),
        ("harmful", "evasive", "refuses evasively"),
        ("harmful", "", "refuses without the true reason"),
        ("harmful", "true_reason", "refuses with the true reason"),
        ("harmful", "true_reason true_offer", "refuses with the true reason and a true offer"),
        ("benign", "refused", "refuses needlessly"),
        ("benign", "right", "helps, whole and right"),
        ("benign", "", "answers, but not whole or not right"),
    ],
)
def test_a_verdict_in_words(kind, true, words):
    names = ("complied", "refused", "evasive", "true_reason", "true_offer", "right")
    assert trails.verdict({"kind": kind, **{name: name in true.split() for name in names}}) == words


def test_english_answers_are_known_by_their_phrases():
    assert trails.verdict({"kind": "harmful", "refuses": True}) == "refuses, by its phrases"
    assert trails.verdict({"kind": "harmful"}) == ""


def test_the_loops_numbers():
    rows = [
        revision("1"),
        revision("1"),
        revision("2", outcomes=("keep", "keep")),
        revision("3", "benign"),
    ]
    pairs = [pair("1", 0.9, 0.1), pair("1", 0.52, 0.49), pair("1", 0.9, 0.7), pair("2", 0.6, 0.4)]
    found = {
        name: " ".join([number, *lines])
        for name, number, lines in trails.facts(
            rows,
            pairs,
            {"val_before": 1.851, "val_after": 0.068, "rows": 1196},
            {"val_accuracy": 0.8345, "held": 163, "pairs": 1386},
            {"score_before": -0.281, "score_after": 1.219, "kl_after": 1.504},
            0.05,
        )
    }
    assert list(found.values()) == [
        "3 2 harmful, 1 ordinary",
        "8 3 revised, 5 let stand",
        "1.85 → 0.07 loss a token, held out, 1,196 revisions learnt",
        "4 75% decided, 25% same slot twice",
        "83.5% right of 163 held out, 1,386 pairs learnt",
        "-0.28 → +1.22 score, in deviations, KL 1.50 nats an answer",
    ]
    assert [number for _, number, _ in trails.facts([], [], {}, {}, {}, 0.05)] == ["not yet"] * 6
