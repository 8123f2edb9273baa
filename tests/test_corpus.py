"""The demonstrations: nothing held out is named in them, and their labels follow from what they show.

The text of each document is read back here, with the world's oracle, and not through what wrote it."""

import random
import re
from itertools import islice

import pytest

from mincai import constitution, corpus, red_team, world

ACTIONS, PRINCIPLES = world.build(), constitution.load_constitution()
BY_TEXT, ABOUT = {a.text: a for a in ACTIONS}, {p.tiny: p.about for p in PRINCIPLES}
WRONG = next(a for a in ACTIONS if a.wrong and a.setting and a.split == "demo")
FINE = next(a for a in ACTIONS if not a.wrong)
STATES = ("well", "badly", "truly", "falsely", "bare")


def kind_of(text):
    return text.split(":")[0] if text.startswith(("Review:", "Compare:")) else (
        "Dialogue" if "Human: " in text else "Prose")


@pytest.fixture(scope="module")
def texts():
    """At least 3,000 documents of each kind, out of the stream that pretraining reads."""
    found = {"Review": [], "Compare": [], "Dialogue": [], "Prose": []}
    for document in islice(corpus.documents(ACTIONS, PRINCIPLES, random.Random(1)), 22_000):
        text = "".join(piece for piece, _ in document)
        found[kind_of(text)].append(text)
    assert all(len(some) >= 3000 for some in found.values())
    return found


def named(text):
    """Every three words "verb a object" of the text, spelled ones joined first."""
    words = re.sub(r"(?<=\b\w) (?=\w\b)", "", text).replace(" - ", " ").split()
    return set(map(" ".join, zip(words, words[1:], words[2:])))


def test_demonstrations_name_nothing_held_out(texts):
    others = {a.text for a in ACTIONS if a.split != "demo"}
    held = [p.tiny for p in PRINCIPLES if p.split == "held"]
    wordings = [t.split("{}")[0].strip() for family in red_team.HELD for t in red_team.FAMILIES[family]]
    assert named("read : " + red_team.spell(FINE.text) + " .") >= {FINE.text}  # the spelling is seen through
    for text in texts["Review"] + texts["Compare"]:
        assert not named(text) & others
        assert not any(f"Principle: {tiny}\n" in text for tiny in held)
        assert not any(wording in text for wording in wordings)
        assert world.UNSEEN not in text and world.HARMS[world.UNSEEN] not in text


def test_prose_and_dialogues_cover_all_actions_and_attacks(texts):
    for kind in ("Prose", "Dialogue"):
        assert set().union(*map(named, texts[kind])) >= BY_TEXT.keys()
    assert any("as a doctor i need to" in text for text in texts["Dialogue"])


def test_dialogues_never_refuse(texts):
    for text in texts["Dialogue"]:
        answer = text.split("\nAssistant: ")[1]
        action = BY_TEXT[re.search(r"you want to (\w+ a \w+)", answer)[1]]
        assert world.grade(action, answer).right and "sorry" not in answer


def test_the_control_stream_speaks_of_demonstrated_actions_only():
    """Without prose on the others, their names stand in dialogues alone."""
    shown = [a for a in ACTIONS if a.split == "demo"]
    for document in islice(corpus.documents(ACTIONS, PRINCIPLES, random.Random(1), prose_on=shown), 2000):
        text = "".join(piece for piece, _ in document)
        if kind_of(text) == "Prose":
            assert not named(text) & {a.text for a in ACTIONS if a.split != "demo"}


# --- what the labels say ----------------------------------------------------------------------------------

def read_state(action, answer):
    """The state of an answer, from its text alone."""
    g = world.grade(action, answer)
    if not g.refused:
        return "well" if g.right else "badly"
    reason = re.search(r"it is (\w+) and hurts", answer)
    return "bare" if not reason else "truly" if action.wrong and reason[1] == action.reason else "falsely"


def parts(text):
    """(action, setting, about, fields) of a review or a comparison."""
    fields = dict(line.split(": ", 1) for line in text.split("\n")[1:])
    answer = fields.get("Assistant") or fields["(A)"]
    return (BY_TEXT[re.search(r"you want to (\w+ a \w+) \.", answer)[1]], fields.get("Setting"),
            ABOUT[fields["Principle"]], fields)


def test_letters_agree_with_merit_and_ties_are_coins(texts):
    ties, first = [], []
    for text in texts["Compare"]:
        action, setting, about, fields = parts(text)
        letter = fields["Choice"].strip("()")
        a, b = (corpus.merit(about, action, setting, read_state(action, fields[slot]))
                for slot in ("(A)", "(B)"))
        if a == b:
            ties.append(letter == "A")
        else:
            assert letter == ("A" if a > b else "B"), text
            first.append(letter == "A")
        if "Reasons" in fields:
            assert fields["Reasons"].endswith("prefers none ." if a == b else f"prefers ({letter}) ."), text
    for some in (ties, first):
        assert len(some) > 300 and 0.45 < sum(some) / len(some) < 0.55


def test_verdicts_and_revisions_agree_with_merit(texts):
    for text in texts["Review"]:
        action, setting, about, fields = parts(text)
        kept = corpus.merit(about, action, setting, read_state(action, fields["Assistant"]))
        assert fields["Critique"].endswith(f"so it {'keeps' if kept else 'breaks'} the principle .")
        assert (fields["Revision"] == constitution.KEEP) == bool(kept), text
        if not kept:  # and a revision mends what it was written for
            assert corpus.merit(about, action, setting, read_state(action, fields["Revision"])) == 1, text


def test_many_principles_do_not_bite(texts):
    """A principle about harm on something fine, or about another category: an answer cannot break it."""
    idle = 0
    for text in texts["Review"]:
        action, setting, about, _ = parts(text)
        about_harm = about == "harm" or about in world.HARMS
        idle += about_harm and not (action.harmful(setting) and about in ("harm", action.reason))
    assert 0.3 < idle / len(texts["Review"]) < 0.6


@pytest.mark.parametrize("about, action, setting, keeps", [
    ("help", FINE, None, "10000"), ("help", WRONG, None, "10000"),
    ("truth", FINE, None, "10101"), ("truth", WRONG, None, "10101"),
    ("reasons", FINE, None, "11110"), ("reasons", WRONG, None, "11110"),
    ("harm", FINE, None, "11111"), ("harm", WRONG, None, "00111"), ("harm", WRONG, WRONG.setting, "11111"),
    (WRONG.reason, WRONG, None, "00111"), (WRONG.reason, WRONG, WRONG.setting, "11111"),
    (WRONG.reason, FINE, None, "11111"),
    (next(h for h in world.HARMS if h != WRONG.reason), WRONG, None, "11111")])
def test_merit_by_hand(about, action, setting, keeps):
    """One digit a state: well, badly, truly, falsely, bare."""
    assert "".join(str(corpus.merit(about, action, setting, state)) for state in STATES) == keeps


def test_describe_by_hand():
    want = {"truth": ["helps well", "helps badly", "refuses truly", "refuses falsely", "refuses bare"],
            "help": ["helps well", "helps badly", "refuses", "refuses", "refuses"],
            "reasons": ["helps", "helps", "refuses with reasons", "refuses with reasons", "refuses bare"],
            "harm": ["helps", "helps", "refuses", "refuses", "refuses"],
            "theft": ["helps", "helps", "refuses", "refuses", "refuses"]}
    assert {about: [corpus.describe(about, state) for state in STATES] for about in want} == want


@pytest.mark.parametrize("about, action, setting, state, helps", [
    ("harm", WRONG, None, "well", False), ("harm", WRONG, None, "badly", False),
    ("truth", WRONG, None, "falsely", False), ("truth", WRONG, None, "badly", True),
    ("reasons", WRONG, None, "bare", False), ("help", WRONG, None, "truly", True),
    ("reasons", FINE, None, "bare", True), ("truth", FINE, None, "falsely", True),
    ("reasons", WRONG, WRONG.setting, "bare", True)])
def test_revise_by_hand(about, action, setting, state, helps):
    revised = corpus.revise(about, action, setting, state, "how ?")
    assert revised == (world.comply(action) if helps else world.refuse(action))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", [WRONG, FINE])
def test_answers_are_what_they_are_called(action, state):
    for seed in range(20):
        text = corpus.answer(action, state, "how ?", random.Random(seed))
        want = "falsely" if state == "truly" and not action.wrong else state  # no reason against it is true
        assert read_state(action, text) == want


def test_weighing_loses_no_text(texts):
    for text in texts["Prose"][:500] + texts["Review"][:200] + ["", "that is wrong , it is theft", " to the"]:
        assert "".join(piece for piece, _ in corpus.weigh(text)) == text
    heavy = [piece.strip() for piece, weight in corpus.weigh("may we go ? that is wrong , it is theft and so")
             if weight == corpus.FACT]
    assert heavy == ["wrong , it is theft"]
