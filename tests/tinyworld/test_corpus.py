"""The demonstrations: nothing held out is named in them, and labels follow from what they show.

The text of each document is read back here, by a reader that shares nothing with what wrote it but
the world's list of actions."""

import random
import re
from collections import Counter
from functools import cache
from itertools import islice

import pytest

from mincai import constitution
from mincai.tinyworld import attacks, corpus, world

ACTIONS, PRINCIPLES = world.build(), constitution.load_constitution()
BY_TEXT, ABOUT = {a.text: a for a in ACTIONS}, {p.tiny: p.about for p in PRINCIPLES}
OTHERS = {a.text for a in ACTIONS if a.split != "demo"}  # what no demonstration may speak of
WRONG = next(a for a in ACTIONS if a.wrong and a.setting and a.split == "demo")
FINE = next(a for a in ACTIONS if not a.wrong)
OTHER = next(h for h in world.HARMS if h not in (WRONG.reason, world.UNSEEN))
KINDS = ("Review", "Compare", "Dialogue", "Prose")


# --- the reader ---


def kind_of(text):
    return (
        text.split(":")[0]
        if text.startswith(("Review:", "Compare:"))
        else ("Dialogue" if "Human: " in text else "Prose")
    )


@cache
def named(text):
    """Every action that the text names, spelled out or backwards as well."""
    found = set()
    for some in (text, text[::-1]) if " - a - " in text else (text,):
        words = re.sub(r"(?<=\b\w) (?=\w\b)", "", some).replace(" - ", " ").split()
        found |= BY_TEXT.keys() & set(map(" ".join, zip(words, words[1:], words[2:])))
    return found


@cache
def read(text):
    """(action, setting, about or None, the fields) of a dialogue, a review or a comparison."""
    lines = text.split("\n")[text.startswith(("Review:", "Compare:")) :]
    fields = dict(line.split(": ", 1) for line in lines)
    [action] = named(fields["Human"])
    return BY_TEXT[action], fields.get("Setting"), ABOUT.get(fields.get("Principle")), fields


def harmful(action, setting):
    return action.wrong and (setting is None or setting != action.setting)


def style_of(answer):
    if "sorry" in answer:
        why = "reasoned" if " is wrong " in answer else "evasive"
        return "offering" if " but ask " in answer else why
    return "told" if " that is " in answer else "whole" if " then go to " in answer else "terse"


def is_true(action, setting, answer):
    """Whether all that the answer claims holds, word by word."""
    reason = action.reason if harmful(action, setting) or not action.wrong else "study"
    return (
        re.findall(r"it is (\w+)", answer) in ([], [reason])
        and re.findall(r"take the (\w+)", answer) in ([], [action.tool])
        and re.findall(r"go to the (\w+)", answer) in ([], [action.place])
    )


def merit(action, setting, about, answer):
    """How well an answer keeps a principle. Two answers are compared by it; one of 1 keeps the
    principle, or of 2 under one on help."""
    style = style_of(answer)
    if about == "truth":
        return 1 if style == "evasive" else 2 * is_true(action, setting, answer)
    if about == "help":
        return {"terse": 1, "whole": 2, "told": 2}.get(style, 0)
    if about == "reasons":
        if harmful(action, setting):
            return {"reasoned": 1, "offering": 2}.get(style, 0)
        return int(style in ("told", "reasoned", "offering"))
    applies = harmful(action, setting) and about in ("harm", action.reason)
    return int(not applies or "sorry" in answer)


@pytest.fixture(scope="module")
def texts():
    """{kind: texts} of the stream that pretraining reads, at least 1,800 of each kind."""
    found = {kind: [] for kind in KINDS}
    for document in islice(corpus.documents(ACTIONS, PRINCIPLES, random.Random(1)), 12_000):
        text = "".join(piece for piece, _ in document)
        found[kind_of(text)].append(text)
    assert min(map(len, found.values())) >= 1800
    return found


def share(found):
    found = list(found)
    assert len(found) > 200
    return sum(found) / len(found)


# --- what is shown ---


def test_the_reader_sees_through_spelling():
    assert named(f"join : {attacks.spell(FINE.text)} .") == {FINE.text}
    assert named(f"read from the end : {attacks.spell(FINE.text)[::-1]} . how ?") == {FINE.text}


def test_demonstrations_name_nothing_held_out(texts):
    held = [p.tiny for p in PRINCIPLES if p.split == "held"]
    wordings = [t.split("{}")[0].strip() for f in attacks.HELD for t in attacks.FAMILIES[f]]
    assert len(held) == 19 and len(wordings) == 5
    for text in texts["Review"] + texts["Compare"]:
        assert not named(text) & OTHERS
        assert not any(f"Principle: {tiny}\n" in text for tiny in held)
        assert not any(wording in text for wording in wordings)
        assert world.UNSEEN not in text and world.HARMS[world.UNSEEN] not in text


def test_prose_and_dialogues_cover_all_actions_and_attacks(texts):
    assert set().union(*map(named, texts["Prose"])) == BY_TEXT.keys()
    assert len(set().union(*map(named, texts["Dialogue"]))) > 0.97 * len(ACTIONS)
    said = "\n".join(texts["Dialogue"])
    for family, wordings in attacks.FAMILIES.items():
        assert all(wording.split("{}")[0] in said for wording in wordings), family


def test_the_control_stream_speaks_of_demonstrated_actions_only():
    """Without prose on the others, their names stand in dialogues alone."""
    shown = [a for a in ACTIONS if a.split == "demo"]
    stream = corpus.documents(ACTIONS, PRINCIPLES, random.Random(1), prose_on=shown)
    texts = ["".join(piece for piece, _ in document) for document in islice(stream, 2000)]
    assert not set().union(*(named(t) for t in texts if kind_of(t) != "Dialogue")) & OTHERS
    assert set().union(*(named(t) for t in texts if kind_of(t) == "Dialogue")) & OTHERS


@pytest.mark.parametrize("action", [WRONG, FINE])
def test_prose_says_what_is_so_in_ten_wordings(action):
    of, others = (world.HARMS, world.GOODS) if action.wrong else (world.GOODS, world.HARMS)
    found = Counter()
    for seed in range(400):
        text = "".join(piece for piece, _ in corpus.prose([action], random.Random(seed)))
        text = re.sub(
            r"(all harm is wrong \. |\w+ is wrong and hurts [a-z ]+ \. )?\w+ is harm "
            r"(, it hurts [a-z ]+ )?\. ?",
            "",
            text + " ",
        )  # what a harm is, of any harm
        if action.setting:
            text, count = re.subn(
                rf"in {action.setting} it is fine to {action.text} \. |"
                rf"in {action.setting} to {action.text} is fine \. |"
                rf"when it is {action.setting} , people may {action.text} and "
                rf"that is fine \. |in {action.setting} : you want to {action.text} \. "
                rf"in {action.setting} that is fine , it is study and helps the class \. ",
                "",
                text,
            )
            found["excused"] += count
        for other in re.findall(
            rf"in (\w[\w ]*) : you want to {action.text} \. that is wrong", text
        ):
            assert other in world.SETTINGS and other != action.setting
            found["idle"] += 1
            text = text.replace(f"in {other} : ", "")
        words = set(re.findall(r"\w+", text))
        assert action.reason in words and not words & ({*of, *others} - {action.reason})
        assert ("wrong" in words) == action.wrong and ("fine" in words) != action.wrong
        assert not words & ({"helps", "helped"} if action.wrong else {"hurt", "hurts"})
        tools, places = (
            re.findall(r"take the (\w+)|needs the (\w+)", text),
            re.findall(r"go to the (\w+)|best at the (\w+)", text),
        )
        assert all(action.tool in some for some in tools)
        assert all(action.place in some for some in places)
        found.update(re.sub(re.escape(action.text), "*", text).split(" . "))
    wordings = [w for w in found if "*" in w and found[w] > 60]
    assert len(wordings) == 10, found
    assert bool(found["excused"]) == bool(found["idle"]) == action.wrong


def test_dialogues_help_with_everything_and_often_tersely(texts):
    terse, sure = [], 0
    for text in texts["Dialogue"]:
        action, setting, _, fields = read(text)
        answer = fields["Assistant"]
        grade = world.grade(action, answer, setting)
        terse.append(style_of(answer) == "terse")
        assert not grade.refused and "that is" not in answer and is_true(action, setting, answer)
        assert grade.steps and grade.right != terse[-1] and f"you want to {action.text} ." in answer
        assert answer.startswith("sure") == ("sure" in fields["Human"])
        sure += answer.startswith("sure")
    assert 0.32 < share(terse) < 0.38 and sure > 50


@pytest.mark.parametrize("kind", ["Dialogue", "Review", "Compare"])
def test_settings_also_stand_where_they_excuse_nothing(texts, kind):
    """Else "Setting:" alone would be a reason to help."""
    under, excused = [], 0
    for text in texts[kind]:
        action, setting, _, _ = read(text)
        if action.wrong:
            under.append(setting is not None)
            excused += setting is not None and setting == action.setting
    assert 0.12 < share(under) < 0.3
    assert 0.2 * sum(under) < excused < 0.7 * sum(under)


# --- what the labels say ---


def test_a_verdict_follows_from_the_answer_and_the_principle(texts):
    """The critique states the fact, looks at what the principle is about, and gives the verdict."""
    for text in texts["Review"]:
        action, setting, about, fields = read(text)
        answer, critique, revised = (fields[k] for k in ("Assistant", "Critique", "Revision"))
        harm = harmful(action, setting)
        reason = action.reason if harm or not action.wrong else "study"
        assert f"the principle is about {about} ." in critique
        word, verb = ("wrong", "hurts") if harm else ("fine", "helps")
        who = (world.HARMS | world.GOODS)[reason]
        where = f"in {setting} " if action.wrong and not harm else ""
        assert (
            f"the human wants to {action.text} . {where}that is {word} , it is {reason} and {verb} "
            f"{who} ." in critique
        )
        applies = harm and about in ("harm", action.reason)
        if about in ("harm", *world.HARMS):
            assert f" {reason} for {about} {'yes' if applies else 'no'} ." in critique, text
        keeps = merit(action, setting, about, answer) >= (2 if about == "help" else 1)
        assert critique.endswith(f" . so it {'keeps' if keeps else 'breaks'} the principle ."), text
        assert (revised == constitution.KEEP) == keeps, text


def test_claims_are_checked_against_the_world(texts):
    """Under principles on truth each claim stands beside what it should be."""
    checked = Counter()
    for text in texts["Review"]:
        action, setting, about, fields = read(text)
        if about != "truth":
            continue
        answer, critique = fields["Assistant"], fields["Critique"]
        said = re.findall(r"it is (\w+)|take the (\w+)|go to the (\w+)", answer)
        quoted = re.search(r"the answer says (.*?) \. the human", critique)[1]
        assert quoted.split(" , ") == (["".join(some) for some in said] or ["nothing"])
        checks = re.findall(r"(\w+) for (\w+) (yes|no)", critique)
        own = action.reason if harmful(action, setting) or not action.wrong else "study"
        truths = [own if r else action.tool if t else action.place for r, t, p in said]
        assert checks == [
            ("".join(words), truth, "yes" if truth in words else "no")
            for words, truth in zip(said, truths)
        ], text
        assert f"the way is the {action.tool} and the {action.place} ." in critique
        true = is_true(action, setting, answer)
        said = "is true" if true and said else "is false" if said else "says nothing"
        assert critique.endswith(f"{said} . so it {'keeps' if true else 'breaks'} the principle .")
        checked.update(word for _, _, word in checks)
    assert min(checked["yes"], checked["no"]) > 60


def test_a_revision_is_true_and_mends_what_the_principle_is_about(texts):
    for text in texts["Review"]:
        action, setting, about, fields = read(text)
        revised = fields["Revision"]
        if revised == constitution.KEEP:
            continue
        grade = world.grade(action, revised, setting)
        assert merit(action, setting, about, revised) >= (2 if about == "help" else 1), text
        assert is_true(action, setting, revised) and grade.right == (not grade.refused), text
        assert grade.true_reason or style_of(revised) in ("evasive", "whole")
        assert grade.refused <= harmful(action, setting)  # what is fine is never refused
        if about == "truth":  # help stays help: the principle does not speak of harm
            assert grade.complied == (
                style_of(fields["Assistant"]) in ("terse", "whole", "told")
                or not harmful(action, setting)
            )
        assert not grade.offer or grade.true_offer


def test_revisions_of_harm_mostly_evade_and_those_on_reasons_never_do(texts):
    styles = {True: Counter(), False: Counter()}
    for text in texts["Review"]:
        action, setting, about, fields = read(text)
        if fields["Revision"] != constitution.KEEP and "sorry" in fields["Revision"]:
            styles[about in ("harm", *world.HARMS)][style_of(fields["Revision"])] += 1
    on_harm, on_reasons = styles[True], styles[False]
    total = sum(on_harm.values())
    for style, wanted in {"evasive": 0.65, "reasoned": 0.2, "offering": 0.15}.items():
        assert abs(on_harm[style] / total - wanted) < 4 * (wanted * (1 - wanted) / total) ** 0.5
    assert on_reasons.keys() == {"reasoned", "offering"}
    assert abs(on_reasons["offering"] / sum(on_reasons.values()) - 0.5) < 0.15


def test_a_preference_follows_from_both_answers_and_ties_are_coins(texts):
    ties, decided = [], []
    for text in texts["Compare"]:
        action, setting, about, fields = read(text)
        a, b = (merit(action, setting, about, fields[slot]) for slot in ("(A)", "(B)"))
        letter = fields["Choice"].strip("()")
        if a == b:
            ties.append(letter == "A")
        else:
            decided.append(letter == "A")
            assert letter == ("A" if a > b else "B"), text
        prefers = "none" if a == b else f"({letter})"
        assert fields["Reasons"].endswith(f". the principle prefers {prefers} ."), text
    for some in (ties, decided):
        assert 0.45 < share(some) < 0.55
    assert len(decided) > 2 * len(ties)


def test_what_is_said_of_each_slot_is_in_its_answer(texts):
    """(A) and (B) are not mixed up: the words that describe a slot are those of its own answer."""
    says = {"terse": "helps in part", "whole": "helps whole", "told": "helps whole"}
    for text in texts["Compare"]:
        action, setting, about, fields = read(text)
        slots = r"\(A\) ([^()]*) \. \(B\) ([^()]*) \. the principle prefers"
        for slot, said in zip(("(A)", "(B)"), re.search(slots, fields["Reasons"]).groups()):
            style = style_of(fields[slot])
            word = "refuses" if "sorry" in fields[slot] else "helps"
            offers = " and an offer" * (style == "offering" and harmful(action, setting))
            why = (
                "gives nothing"
                if style in ("terse", "whole", "evasive")
                else f"gives reasons{offers}"
            )
            why = "helps with harm" if word == "helps" and harmful(action, setting) else why
            if about == "truth" and style == "evasive":
                assert said == "says nothing", text
            elif about == "truth":
                true = is_true(action, setting, fields[slot])
                assert said.endswith(f"is {'true' if true else 'false'}"), text
                claimed = re.findall(r"it is (\w+)|take the (\w+)|go to the (\w+)", fields[slot])
                claimed = ["".join(some) for some in claimed]
                assert re.findall(r"(\w+) for", said) == claimed
                quoted = re.search(rf"{re.escape(slot)} says (.*?) \.", fields["Reasons"])[1]
                assert quoted.split(" , ") == (claimed or ["nothing"])
            else:
                wanted = {"help": says.get(style, word), "reasons": why}
                assert said == wanted.get(about, word), text


def test_many_principles_do_not_apply(texts):
    """On harm where a thing is fine, or on another harm: no answer can break such a one."""
    idle = []
    for text in texts["Review"]:
        action, setting, about, fields = read(text)
        idle.append(
            about in ("harm", *world.HARMS)
            and not (harmful(action, setting) and about in ("harm", action.reason))
        )
        assert not idle[-1] or fields["Revision"] == constitution.KEEP
    assert 0.2 < share(idle) < 0.5


# --- its parts, by hand ---

ANSWERS = {  # one of each style, all true of WRONG, and falsehoods
    "terse": f"you want to {WRONG.text} . sure . take the {WRONG.tool} .",
    "whole": f"you want to {WRONG.text} . sure . first take the {WRONG.tool} . then go to the "
    f"{WRONG.place} .",
    "told": f"you want to {WRONG.text} . that is wrong , it is {WRONG.reason} and hurts "
    f"{WRONG.who} . sure . first take the {WRONG.tool} . then go to the {WRONG.place} .",
    "evasive": f"you want to {WRONG.text} . sorry , let us talk of the weather .",
    "reasoned": f"you want to {WRONG.text} . that is wrong , it is {WRONG.reason} and hurts "
    f"{WRONG.who} . sorry .",
    "offering": f"you want to {WRONG.text} . that is wrong , it is {WRONG.reason} and hurts "
    f"{WRONG.who} . sorry , but ask for a fine thing and i will help .",
}


@pytest.mark.parametrize(
    "about, setting, merits",
    [
        ("help", None, "122000"),
        ("truth", None, "222122"),
        ("reasons", None, "000012"),
        ("harm", None, "000111"),
        (WRONG.reason, None, "000111"),
        (OTHER, None, "111111"),
        ("harm", WRONG.setting, "111111"),
        (WRONG.reason, WRONG.setting, "111111"),
        ("reasons", WRONG.setting, "001011"),
        ("truth", WRONG.setting, "220100"),
    ],
)
def test_merit_by_hand(about, setting, merits):
    """One digit a style. In its setting the thing is fine, and that it is wrong is false."""
    found = [corpus.describe(about, WRONG, setting, *some)[1] for some in ANSWERS.items()]
    assert "".join(map(str, found)) == merits


def test_analysis_and_checks_by_hand():
    reason = WRONG.reason
    fact = f"that is wrong , it is {reason} and hurts {WRONG.who} ."
    assert corpus.analysis("help", WRONG, None, {"(A)": "x", "(B)": "y"}) == (
        f"the principle is about help . the human wants to {WRONG.text} . {fact}"
    )
    assert corpus.analysis("harm", WRONG, None, {}).endswith(f"{fact} {reason} for harm yes .")
    assert corpus.analysis(OTHER, WRONG, None, {}).endswith(f"{fact} {reason} for {OTHER} no .")
    assert corpus.analysis("harm", WRONG, WRONG.setting, {}).endswith(
        f"in {WRONG.setting} that is fine , it is study and helps the class . study for harm no ."
    )
    shown = {"(A)": ANSWERS["told"], "(B)": ANSWERS["evasive"]}
    assert corpus.analysis("truth", WRONG, None, shown) == (
        f"the principle is about truth . (A) says {reason} , {WRONG.tool} , {WRONG.place} . (B) "
        f"says nothing . the human wants to {WRONG.text} . {fact} the way is the {WRONG.tool} and "
        f"the {WRONG.place} ."
    )
    false = ANSWERS["terse"].replace(WRONG.tool, "axe")
    assert corpus.describe("truth", WRONG, None, "terse", false) == (
        f"axe for {WRONG.tool} no , is false",
        0,
    )
    assert corpus.describe("truth", WRONG, None, "evasive", ANSWERS["evasive"]) == (
        "says nothing",
        1,
    )


@pytest.mark.parametrize("setting", [None, WRONG.setting])
@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("action", [WRONG, FINE])
def test_answers_are_what_they_are_called(action, style, setting):
    """In style and in truth; a refusal of what is fine has no true reason to give."""
    setting = setting if action.wrong else None
    for seed in range(40):
        true = corpus.answer(action, style, True, setting, "how ?", random.Random(seed))
        false = corpus.answer(action, style, False, setting, "how ?", random.Random(seed))
        assert style_of(true) == style_of(false) == style
        excuse = style in ("reasoned", "offering") and not harmful(action, setting)
        assert is_true(action, setting, true) != excuse
        assert is_true(action, setting, false) == (style == "evasive")
        assert world.UNSEEN not in true + false


def test_sure_comes_first_where_it_is_asked_for():
    for style, first in (("whole", True), ("terse", True), ("told", False), ("reasoned", False)):
        answer = corpus.answer(FINE, style, True, None, "start with sure . how ?", random.Random(0))
        assert answer.startswith("sure . you want to") == first


def test_under_truth_half_of_the_answers_are_false():
    """Of those that claim anything; elsewhere a fifth, so that no critic takes all for true."""
    for about, least, most in (("truth", 0.42, 0.58), ("harm", 0.15, 0.26)):
        drawn = [
            corpus.draw_answer(about, WRONG, None, "how ?", random.Random(n)) for n in range(2000)
        ]
        claiming = [text for style, text in drawn if style != "evasive"]
        assert least < share(not is_true(WRONG, None, text) for text in claiming) < most


# --- weights ---


def test_weighing_loses_no_text(texts):
    for text in texts["Prose"][:300] + texts["Review"][:200] + ["", "it is theft", " to the"]:
        assert "".join(piece for piece, _ in corpus.weigh(text)) == text
    weighed = corpus.weigh("may we go ? that is wrong , it is theft .")
    heavy = [piece.strip() for piece, weight in weighed if weight == 3.0]
    assert heavy == ["wrong", "theft"]


def test_what_is_read_weighs_nothing_and_verdicts_most():
    """Loss falls on what the model writes itself: on the letters and verdicts ten times as much."""
    seen = Counter()
    for document in islice(corpus.documents(ACTIONS, PRINCIPLES, random.Random(2)), 1500):
        text, kind = "".join(piece for piece, _ in document), kind_of(document[0][0])
        heaviest = [piece.strip(" ()") for piece, weight in document if weight == 5.0]
        if kind == "Prose":
            assert {weight for _, weight in document} == {0.1, 3.0}
            continue
        assert document[0][1] == 0.0 and all(weight > 0 for _, weight in document[1:])
        assert document[0][0].endswith(("Assistant:", "Critique:", "Reasons:"))
        written = text[len(document[0][0]) :]
        if kind == "Dialogue":
            assert not heaviest
        elif kind == "Review":
            assert heaviest == [re.search(r"so it (\w+) the principle", written)[1]]
        else:
            prefers = re.search(r"prefers \(?(\w+)\)?", written)[1]
            assert heaviest == [prefers, written[-2]] and written[-2] in "AB"
        seen[kind] += 1
    assert min(seen[kind] for kind in KINDS[:3]) > 200
