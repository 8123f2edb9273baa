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
STATES = ("well", "told", "badly", "truly", "falsely", "bare")


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
        return "badly" if not g.right else "told" if "that is" in answer else "well"
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
        a, b = (corpus.merit(about, action, setting, read_state(action, text), text)
                for text in (fields["(A)"], fields["(B)"]))
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
        answer, revised = fields["Assistant"], fields["Revision"]
        kept = corpus.merit(about, action, setting, read_state(action, answer), answer)
        assert fields["Critique"].endswith(f"so it {'keeps' if kept else 'breaks'} the principle .")
        assert (revised == constitution.KEEP) == bool(kept), text
        if not kept:  # and a revision mends what it was written for
            assert corpus.merit(about, action, setting, read_state(action, revised), revised) == 1, text


def test_many_principles_do_not_bite(texts):
    """A principle about harm on something fine, or about another category: an answer cannot break it."""
    idle = 0
    for text in texts["Review"]:
        action, setting, about, _ = parts(text)
        about_harm = about == "harm" or about in world.HARMS
        idle += about_harm and not (action.harmful(setting) and about in ("harm", action.reason))
    assert 0.25 < idle / len(texts["Review"]) < 0.6


OTHER = next(h for h in world.HARMS if h != WRONG.reason)


def shown(action, setting):
    """An answer of every state, as text."""
    return {"well": world.comply(action), "told": world.comply_told(action, setting),
            "badly": world.comply(action, tool="spoon" if action.tool != "spoon" else "saw"),
            "truly": world.refuse(action), "falsely": world.refuse(action, OTHER),
            "bare": world.refuse_bare(action)}


@pytest.mark.parametrize("about, action, setting, keeps", [
    ("help", FINE, None, "110000"), ("help", WRONG, None, "110000"),
    ("truth", FINE, None, "110101"), ("truth", WRONG, None, "110101"),
    ("reasons", FINE, None, "010110"), ("reasons", WRONG, None, "010110"),
    ("harm", FINE, None, "111111"), ("harm", WRONG, None, "000111"), ("harm", WRONG, WRONG.setting, "111111"),
    (WRONG.reason, WRONG, None, "000111"), (WRONG.reason, WRONG, WRONG.setting, "111111"),
    (WRONG.reason, FINE, None, "111111"), (OTHER, WRONG, None, "111111")])
def test_merit_by_hand(about, action, setting, keeps):
    """One digit a state: well, told, badly, truly, falsely, bare."""
    texts = shown(action, setting)
    assert "".join(str(corpus.merit(about, action, setting, s, texts[s])) for s in STATES) == keeps


def test_describe_and_quote_by_hand():
    six = ["helps"] * 3 + ["refuses"] * 3
    why, bare = "with reasons", "bare"
    texts = shown(WRONG, None)
    tool = "spoon" if WRONG.tool != "spoon" else "saw"  # the wrong step of `badly`
    right = f"has the {WRONG.tool} yes and the {WRONG.place} yes , helps well"
    badly = f"has the {tool} no and the {WRONG.place} yes , helps badly"
    reasons = [f"has {WRONG.reason} yes , refuses truly", f"has {OTHER} no , refuses falsely"]
    want = {"truth": [(right,), (right,), (badly,), *((text,) for text in reasons), ("refuses bare",)],
            "help": [(right,), (right,), (badly,)] + [("refuses",)] * 3,
            "reasons": list(zip(six, (bare, why, bare, why, why, bare))),
            "harm": list(zip(six, [""] * 6)), "theft": list(zip(six, [""] * 6))}
    want = {about: [" ".join(words).strip() for words in some] for about, some in want.items()}
    assert {about: [corpus.describe(about, WRONG, s, texts[s]) for s in STATES] for about in want} == want
    steps = [f"says take the {t} and go to the {WRONG.place}" for t in (WRONG.tool, WRONG.tool, tool)]
    said = steps + [f"says it is {WRONG.reason}", f"says it is {OTHER}", "says sorry"]
    assert [corpus.quote(texts[s]) for s in STATES] == said


def test_quotes_are_what_the_slot_says(texts):
    """In its words, and before the action is named: nothing but the answer itself tells what they are."""
    quoted = 0
    for text in texts["Compare"]:
        fields = parts(text)[-1]
        if "Reasons" in fields:
            quotes, after = fields["Reasons"].split(" the human wants to ")
            for slot in "AB":
                said = re.search(rf"\({slot}\) (.*?) \.", quotes)[1]
                steps = re.search(r"take the (\w+) \. then go to the (\w+)", fields[f"({slot})"])
                assert ("take the" in said) == bool(steps) and (not steps or re.findall(r"the (\w+)", said) == list(
                    steps.groups())), text
                quoted += f"({slot}) has" in after and "helps badly" in re.search(rf"\({slot}\) (.*?) \.", after)[1]
    assert quoted > 400  # wrong steps are met often enough to be read


def test_focus_shows_checks_and_no_focus_changes_nothing():
    """Without it the documents are those of before: the shipped model's first part can be made again."""
    streams = [["".join(piece for piece, _ in document) for document in islice(
        corpus.documents(ACTIONS, PRINCIPLES, random.Random(1), focus=focus), 2000)] for focus in (0.0, 0.5)]
    assert streams[0][0] == "".join(piece for piece, _ in next(corpus.documents(ACTIONS, PRINCIPLES, random.Random(1))))
    shares = [sum("the principle is about help" in text or "the principle is about truth" in text for text in stream)
              / len(stream) for stream in streams]
    assert shares[0] < 0.25 and shares[1] > 0.5
    held = [p.tiny for p in PRINCIPLES if p.split == "held"]
    others = {a.text for a in ACTIONS if a.split != "demo"}
    shown = [text for text in streams[1] if kind_of(text) in ("Review", "Compare")]
    assert not any(named(text) & others or any(f"Principle: {tiny}\n" in text for tiny in held) for text in shown)


def test_a_lie_calls_a_wrong_thing_fine_and_helps():
    for seed in range(20):
        text = corpus.answer(WRONG, "lie", None, "how ?", random.Random(seed))
        assert "that is fine" in text and "that is wrong" not in text and world.grade(WRONG, text).right
        assert corpus.quote(text) == corpus.quote(world.comply(WRONG))  # what it says of right and wrong is not quoted
    merits = {about: corpus.merit(about, WRONG, None, "lie", text) for about in (
        "help", "truth", "reasons", "harm", WRONG.reason, OTHER)}
    assert merits == {"help": 1, "truth": 0, "reasons": 1, "harm": 0, WRONG.reason: 0, OTHER: 1}
    assert corpus.describe("harm", WRONG, "lie", text) == "helps"


def test_lies_are_seen_through_and_none_changes_nothing():
    """A share of demonstrations shows them; what critique and judge go on to say is the truth."""
    streams = [["".join(piece for piece, _ in document) for document in islice(
        corpus.documents(ACTIONS, PRINCIPLES, random.Random(1), **more), 3000)] for more in ({}, {"lies": 0.0},
                                                                                            {"lies": 0.5})]
    assert streams[0] == streams[1]
    found = [0, 0, 0]
    for number, stream in enumerate(streams):
        for text in stream:
            if kind_of(text) not in ("Review", "Compare"):
                continue
            action, setting, about, fields = parts(text)
            lied = [fields[k] for k in ("Assistant", "(A)", "(B)") if action.harmful(setting)
                    and "that is fine" in fields.get(k, "")]
            found[number] += bool(lied)
            if lied and about in ("harm", action.reason):
                assert "that is wrong" in fields.get("Critique", fields.get("Reasons", "that is wrong"))
                assert fields.get("Revision", world.refuse(action)) == world.refuse(action)
    assert found[0] == found[1] == 0 and found[2] > 50


@pytest.mark.parametrize("about, action, setting, state, helps", [
    ("harm", WRONG, None, "well", False), ("harm", WRONG, None, "badly", False),
    ("truth", WRONG, None, "falsely", False), ("truth", WRONG, None, "badly", True),
    ("reasons", WRONG, None, "bare", False), ("reasons", WRONG, None, "well", True),
    ("help", WRONG, None, "truly", True), ("reasons", FINE, None, "bare", True),
    ("truth", FINE, None, "falsely", True), ("reasons", WRONG, WRONG.setting, "bare", True)])
def test_revise_by_hand(about, action, setting, state, helps):
    """A revision mends what its principle is about, no more: asked for reasons, a helper gives reasons."""
    revised = corpus.revise(about, action, setting, state)
    assert revised == (world.comply_told(action, setting) if helps else world.refuse(action))


@pytest.mark.parametrize("action, state", [(action, state) for action in (WRONG, FINE) for state in STATES
                                           if action.wrong or state != "truly"])  # nothing true is against it
def test_answers_are_what_they_are_called(action, state):
    for seed in range(20):
        assert read_state(action, corpus.answer(action, state, None, "how ?", random.Random(seed))) == state


def test_a_told_answer_speaks_of_its_setting():
    assert "that is wrong" in corpus.answer(WRONG, "told", None, "how ?", random.Random(0))
    assert "that is fine" in corpus.answer(WRONG, "told", WRONG.setting, "how ?", random.Random(0))


def test_weighing_loses_no_text(texts):
    for text in texts["Prose"][:500] + texts["Review"][:200] + ["", "that is wrong , it is theft", " to the"]:
        assert "".join(piece for piece, _ in corpus.weigh(text)) == text
    heavy = [piece.strip() for piece, weight in corpus.weigh("may we go ? that is wrong , it is theft and so")
             if weight == corpus.FACT]
    assert heavy == ["wrong , it is theft"]
