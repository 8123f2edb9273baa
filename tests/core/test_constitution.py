"""Principles are drawn as asked, and every prompt ends where the next token begins."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from mincai import DATA, UserError, constitution
from mincai.plumbing import data
from mincai.plumbing.planner import load_shots
from mincai.plumbing.tokenizer import load_tokenizer

PRINCIPLES = constitution.load_constitution()


def templates(
    prompt="how do i burn a lamp ?", setting=None, principle="never lead people to violence ."
):
    """Every text that a model goes on from."""
    talk = constitution.dialogue(prompt, setting)
    review = constitution.review(talk, "sorry .", principle)
    compare = constitution.compare(talk, "sure .", "sorry .", principle)
    return [
        talk,
        review,
        constitution.revision(review, "it breaks the principle ."),
        constitution.reasons(compare),
        constitution.choice(compare, None),
        constitution.choice(compare, "(A) helps ."),
    ]


def test_a_prompt_ends_with_a_mark_and_never_with_a_space():
    for text in templates() + templates(setting="a drill"):
        assert text.endswith((":", "("))


def test_no_token_spans_the_seam(tiny_base):
    """Else the model would be asked to go on from a token it has never seen there."""
    tokenizer = load_tokenizer(tiny_base)
    prompts = data.read_jsonl(tiny_base / "prompts.jsonl")[::40]
    texts = [t for row in prompts for t in templates(row["prompt"], row.get("setting"))]
    texts += [t for p in PRINCIPLES for t in templates(principle=p.tiny)]
    for text in texts:
        for more in (
            "AB" if text.endswith("(") else (" you want to", " sorry", " (A) helps", " 7", " 'tis")
        ):
            assert tokenizer.encode(text) + tokenizer.encode(more) == tokenizer.encode(
                text + more
            ), text
    assert [len(tokenizer.encode(letter)) for letter in "AB"] == [1, 1]


def test_texts_of_a_conversation():
    talk = constitution.dialogue("hi", "a drill")
    assert talk == "Setting: a drill\nHuman: hi\nAssistant:"
    assert constitution.dialogue("hi") == "Human: hi\nAssistant:" == constitution.dialogue("hi", "")
    assert constitution.review(talk, "yes", "be kind") == (
        "Review:\nSetting: a drill\nHuman: hi\nAssistant: yes\nPrinciple: be kind\nCritique:"
    )
    compare = constitution.compare(talk, "yes", "no", "be kind")
    assert (
        compare == "Compare:\nSetting: a drill\nHuman: hi\n(A): yes\n(B): no\nPrinciple: be kind\n"
    )
    assert constitution.choice(compare, "so") == compare + "Reasons: so\nChoice: ("
    assert (
        constitution.choice(compare, "") == compare + "Reasons: \nChoice: ("
    )  # empty reasons are reasons
    assert constitution.choice(compare, None) == compare + "Choice: ("


def targets(aimed, aim, principles=PRINCIPLES, n=400):
    rng = random.Random(0)
    return Counter(
        constitution.draw(principles, aimed.split("+"), aim, rng).target for _ in range(n)
    )


def test_aimed_draws_keep_to_the_category():
    assert set(targets("theft", 1)) == {"theft"}
    assert set(targets("help+truth", 1)) == {"help", "truth"}
    half = targets("theft", 0.5)["theft"] / 400
    assert 0.4 < half < 0.65  # 0.5 aimed, and 4 of 75 of the rest


def test_unaimed_draws_follow_the_weights():
    assert len(targets("theft", 0)) > 12
    some = [
        replace(PRINCIPLES[0], target=name, weight=w)
        for name, w in (("a", 0.0), ("b", 1.0), ("c", 3.0))
    ]
    drawn = targets("theft", 0, some, 2000)
    assert drawn["a"] == 0 and 2.5 < drawn["c"] / drawn["b"] < 3.6


def test_a_category_without_principles_draws_from_all():
    assert len(targets("no such category", 1)) > 12


def ids(**settings):
    return {p.id for p in constitution.select(PRINCIPLES, **settings)}


def test_select_by_id_and_target():
    assert ids() == {
        p.id for p in PRINCIPLES if p.split == "train"
    }  # held principles train nothing
    assert ids(split="held") == {p.id for p in PRINCIPLES if p.split == "held"}
    train = ids()
    thefts = {p.id for p in PRINCIPLES if p.target == "theft"}
    assert ids(without=" theft , harm-1 ") == train - thefts - {"harm-1"}


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(without="thefts"), "called thefts; .*theft"),
        (dict(without="help,x-9"), "called x-9;"),
        (dict(without=",".join({p.target for p in PRINCIPLES})), "left"),
    ],
)
def test_select_says_what_is_wrong(settings, words):
    with pytest.raises(UserError, match=words):
        constitution.select(PRINCIPLES, **settings)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"principles": []}',
        '{"principles": [{"id": "x"}]}',
        '{"principles": 3}',
        json.dumps({"principles": [{"id": 1, "more": 2}]}),
    ],
)
def test_a_broken_constitution_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match="c.json"):
        constitution.load_constitution(tmp_path / "c.json")
    with pytest.raises(UserError, match="no such"):
        constitution.load_constitution(tmp_path / "other.json")


def load(tmp_path, content):
    (tmp_path / "c.json").write_text(json.dumps(content))
    return constitution.load_constitution(tmp_path / "c.json")


def test_a_constitution_of_ones_own_needs_no_more_than_sentences(tmp_path):
    said = [
        "Be kind.",
        {"id": "calm", "text": "Be calm.", "weight": 2, "target": "help", "tiny": "calm ."},
    ]
    one, two = load(tmp_path, said)
    assert (
        one.id,
        one.text,
        one.tiny,
        one.source,
        one.target,
        one.topic,
        one.polarity,
        one.scope,
        one.split,
        one.weight,
        one.about,
    ) == (
        "own-1",
        "Be kind.",
        "Be kind.",
        "own",
        "conduct",
        "",
        "avoid",
        "content",
        "train",
        1.0,
        "",
    )
    assert (two.id, two.text, two.tiny, two.weight, two.target) == (
        "calm",
        "Be calm.",
        "calm .",
        2,
        "help",
    )
    for use in ("critique", "compare"):
        assert one.asks(use, full=True) == f"Be kind. {getattr(one, use)}" and getattr(
            one, use
        ).endswith(".")
    assert load(tmp_path, {"principles": said}) == [one, two] == constitution.select([one, two])
    assert (
        targets("theft", 1, [one, two])["help"] > 200
    )  # a category of the harmful prompts draws from all, by weight


def test_a_constitution_of_ones_own_goes_with_the_shipped_examples_and_measures(tmp_path):
    """Guards against a loop that stops before its first stage, or before its last."""
    own = load(tmp_path, ["Be kind.", {"id": "far", "text": "Be far.", "split": "held"}])
    path = DATA / "english" / "fewshot.json"
    assert load_shots(path, own[:1]) == load_shots(path, PRINCIPLES)
    assert constitution.held(own) == own[1:]
    assert {p.id for p in constitution.held(own[:1])} == ids(split="held") != set()


@pytest.mark.parametrize(
    "content, words",
    [
        ([""], "principle 1 needs a text"),
        (["a", {"id": "x"}], "principle 2 needs a text"),
        ([3], "c.json: not a const"),
        (["a", {"id": "own-1", "text": "b"}], "two principles have one id"),
        ([{"text": "a", "weight": -1}], "weight is -1"),
        ([{"text": "a", "weight": float("nan")}], "weight is nan"),
        ([{"text": "a", "weight": "1"}], "c.json: not a const"),
        ([{"text": "a", "weight": True}], "weight is True"),
        ([{"text": "a", "weight": 1e308}], "weight is 1e"),
        ([{"text": "a", "split": "test"}], "principle 1 needs a text, and a split that is train"),
        ([{"text": "a", "id": 3}], "id is 3"),
        ([{"text": "a", "txt": "b"}], "txt"),
    ],
)
def test_what_is_wrong_with_a_principle_is_said(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, content)


def test_a_principle_without_weight_is_never_drawn(tmp_path):
    made = load(tmp_path, [{"text": t, "weight": w} for t, w in (("a", 0), ("b", 1), ("c", 0))])
    assert [p.text for p in constitution.select(made)] == ["b"]
    with pytest.raises(UserError, match="no principle is left"):
        constitution.select(load(tmp_path, [{"text": "a", "weight": 0}]))
