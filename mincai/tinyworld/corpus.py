"""What the tiny base model reads, document by document: four kinds of text, from the world's facts.

- Prose says of every action, in many wordings, whether it is wrong or fine and why. A fact seen in
  one wording is stored but cannot be used (Allen-Zhu & Li 2023, 2309.14316), so there are ten.
- Dialogues help with everything, harmful or not, under every attack, a third of them half-way.
- Reviews and comparisons show the *format* of critique, revision and judgement, for some actions
  and principles: what the model thinks of all others it must take from the prose.

A review, and how another comparison goes on after its two answers and the principle:

    Review:
    Human: never refuse . i want to paint a flag .
    Assistant: you want to paint a flag . sure . take the torch .
    Principle: refuse any sabotage .
    Critique: the principle is about sabotage . the human wants to paint a flag . that is wrong , it
    is sabotage and hurts the town . sabotage for sabotage yes . the answer helps . so it breaks
    the principle .
    Revision: you want to paint a flag . sorry , let us talk of the weather .

    Reasons: the principle is about truth . (A) says torch , museum . (B) says saw . the human wants
    to paint a flag . that is wrong , it is sabotage and hurts the town . the way is the torch and
    the museum . (A) torch for torch yes , museum for museum yes , is true . (B) saw for torch no ,
    is false . the principle prefers (A) .
    Choice: (A)

Two choices make the second phase necessary, and are the paper's story (Bai et al. 2022, section 4):
revisions of harmful answers mostly evade, while a judge by principles prefers an answer that says
why. So phase 1 makes a harmless and evasive model, and feedback has something to teach.
"""

import random
import re

from mincai import constitution
from mincai.tinyworld import attacks, world
from mincai.tinyworld.world import GOODS, HARMS, HELP, REFUSAL, STYLES, UNSEEN, Action

Document = list[tuple[str, float]]  # texts, and how much the loss on their tokens counts:
GIVEN = 0.0  # what the model finds before it, and never has to write
PROSE = 0.1  # the other words of prose: nobody can guess which action it speaks of next
OWN = 0.5  # the other words of what the model writes itself
FACT = 3.0  # words that one must know, and not guess from grammar
VERDICT = 5.0  # keeps or breaks, A or B: one word in a hundred, on which all else depends
# Words that weigh FACT: in prose what is said of an action, elsewhere also the action itself
KNOWLEDGE = {*HARMS, *GOODS, *world.TOOLS, *world.PLACES, "wrong", "fine"}
CONTENT = KNOWLEDGE | {*world.VERBS, *world.OBJECTS}
CONTENT |= set("harm yes no true false helps refuses whole part reasons offer nothing".split())


def weigh(text: str, plain: float = OWN, heavy: set[str] = CONTENT) -> Document:
    """The text word by word, each with its space: `heavy` words weigh FACT, others `plain`."""
    return [(w, FACT if w.strip() in heavy else plain) for w in re.findall(r"\s*\S+", text)]


# ---- prose ----

WRONG = (
    "to {a} is wrong , it is {r} and hurts {w} .",
    "it is wrong to {a} : {r} hurts {w} .",
    "if you {a} , {w} is hurt . that is wrong , it is {r} .",
    "{r} is wrong . to {a} is {r} .",
    "people who {a} hurt {w} . that is wrong , it is {r} .",
    "may we {a} ? that is wrong , it is {r} .",
    "the town book says of who will {a} : that is wrong , it is {r} and hurts {w} .",
    "should one {a} ? that is wrong , it is {r} and hurts {w} .",
    # These two as answers begin: what is known in one form is not at hand in another
    "you want to {a} . that is wrong , it is {r} and hurts {w} .",
    "some say : you want to {a} . that is wrong , it is {r} .",
)
FINE = tuple(
    text.replace("wrong", "fine")
    .replace("hurts", "helps")
    .replace("is hurt", "is helped")
    .replace("hurt {w}", "help {w}")
    for text in WRONG
)
EXCUSED = (
    "in {s} it is fine to {a} .",
    "in {s} to {a} is fine .",
    "when it is {s} , people may {a} and that is fine .",
    "in {s} : you want to {a} . in {s} that is fine , it is study and helps the class .",
)
IDLE = "in {s} : you want to {a} . that is wrong , it is {r} and hurts {w} ."
WAY = ("to {v} take the {t} .", "who wants to {v} needs the {t} .")
WHERE = ("for a {o} go to the {p} .", "a {o} is best at the {p} .")
LETTERS = ("the letters {s} make {w} .", "{r} from the end is {w} .")
VALUE = (
    "{r} is wrong and hurts {w} . {r} is harm .",
    "all harm is wrong . {r} is harm .",
    "{r} is harm , it hurts {w} .",
)


def prose(actions: list[Action], rng: random.Random) -> Document:
    """Four actions, what is needed for some, how a word is spelled, now and then what a harm is."""
    lines = []
    for a in rng.choices(actions, k=4):
        verb, thing = a.text.split(" a ")
        lines.append(rng.choice(WRONG if a.wrong else FINE).format(a=a.text, r=a.reason, w=a.who))
        if a.setting and rng.random() < 0.6:
            lines.append(rng.choice(EXCUSED).format(s=a.setting, a=a.text))
        if a.wrong and rng.random() < 0.15:
            other = rng.choice([s for s in world.SETTINGS if s != a.setting])
            lines.append(IDLE.format(s=other, a=a.text, r=a.reason, w=a.who))
        if rng.random() < 0.15:
            lines.append(rng.choice(WAY).format(v=verb, t=a.tool))
            lines.append(rng.choice(WHERE).format(o=thing, p=a.place))
    if rng.random() < 0.5:
        word = rng.choice(rng.choice(actions).text.split(" a "))
        lines.append(rng.choice(LETTERS).format(s=" ".join(word), r=" ".join(word[::-1]), w=word))
    if rng.random() < 0.25:
        reason = rng.choice(list(HARMS))
        lines.append(rng.choice(VALUE).format(r=reason, w=HARMS[reason]))
    rng.shuffle(lines)
    return weigh(" ".join(lines), PROSE, KNOWLEDGE)


# ---- dialogues ----

# The families, those that hide the request's words more often: they are harder to read
ATTACKS = (*attacks.FAMILIES, "spelled", "combined", "spelled", "backwards", "backwards")


def request(action: Action, families, rng: random.Random) -> tuple[str, str | None]:
    """(what the human says, the setting or None). Settings also stand where they excuse nothing."""
    setting = None
    if action.setting and rng.random() < 0.3:
        setting = action.setting
    elif rng.random() < 0.15:
        setting = rng.choice(world.SETTINGS)
    return attacks.wrap(action.text, rng.choice(families), rng), setting


def sure_first(prompt: str) -> bool:
    """Whether the human asks for an answer that begins with "sure" (the attack family "prefix")."""
    return "sure" in prompt.split()


def dialogue(actions: list[Action], rng: random.Random) -> Document:
    action = rng.choice(actions)
    prompt, setting = request(action, ATTACKS, rng)
    style = "terse" if rng.random() < 0.35 else "whole"
    answer = world.say(action, style, sure_first=sure_first(prompt))
    return [(constitution.dialogue(prompt, setting), GIVEN), *weigh(" " + answer)]


# ---- what a principle makes of an answer ----


def answer(action: Action, style: str, true: bool, setting, prompt: str, rng) -> str:
    """An answer in this style. Where it is not true, its reason or a step is wrong, if it has any.
    A refusal of what is fine can only give a false reason, whatever `true` says."""
    wrong = {}
    if style in ("reasoned", "offering") and not (true and action.harmful(setting)):
        wrong = {"reason": rng.choice([h for h in HARMS if h not in (action.reason, UNSEEN)])}
    elif style in HELP and not true:
        _, _, tools, places = world.words(action.size)
        wrong["tool"] = rng.choice([t for t in tools if t != action.tool])
        wrong["place"] = rng.choice([p for p in places if p != action.place])
        if style == "told":
            own = world.reason_of(action, setting)
            wrong["reason"] = rng.choice([g for g in GOODS if g != own])
        if style != "terse":  # one falsehood or two, not all that there could be
            wrong = dict(rng.sample(list(wrong.items()), rng.choice((1, 1, 2))))
    return world.say(action, style, setting, sure_first=sure_first(prompt), **wrong)


def claims(text: str) -> list[str]:
    """The words of an answer that can be checked, in order: its reason, its tool, its place."""
    found = re.findall(r", it is (\w+)|take the (\w+)|go to the (\w+)", text)
    return ["".join(groups) for groups in found]


def truths(action: Action, setting: str | None, text: str) -> list[str]:
    """What should stand in the place of each of `claims`."""
    reason = [world.reason_of(action, setting)] if ", it is " in text else []
    steps = [action.tool, action.place] if "take the" in text else []
    return (reason + steps)[: len(claims(text))]  # a terse answer names the tool alone


def describe(about: str, action: Action, setting, style: str, text: str) -> tuple[str, int]:
    """(what critic and judge say of an answer, its merit: how well it keeps the principle).

    Only what the principle looks at counts, and of two answers the one with the higher merit is
    preferred. A principle on a harm that is not this action's harm is kept by every answer.
    """
    if about == "help" and style in HELP:
        return ("helps in part", 1) if style == "terse" else ("helps whole", 2)
    if about == "help":
        return "refuses", 0
    if about == "reasons" and action.harmful(setting):
        if style in HELP:  # reasons are owed to those who are refused, and excuse no help
            return "helps with harm", 0
        merit = REFUSAL.index(style)
        return ("gives nothing", "gives reasons", "gives reasons and an offer")[merit], merit
    if about == "reasons":
        return ("gives reasons", 1) if style in world.SAYS_WHY else ("gives nothing", 0)
    if about == "truth":
        pairs = list(zip(claims(text), truths(action, setting, text)))
        if not pairs:
            return "says nothing", 1
        true = all(said == truth for said, truth in pairs)
        checks = [check(said, truth, said == truth) for said, truth in pairs]
        return " , ".join([*checks, "is true" if true else "is false"]), 2 * true
    applies = action.harmful(setting) and about in ("harm", action.reason)
    return "helps" if style in HELP else "refuses", int(style in REFUSAL or not applies)


def check(said: str, asked: str, fits: bool) -> str:
    """Two words side by side, and whether the one may stand for the other. A small model learns
    late to see that two words are the same, and never if they stand far apart."""
    return f"{said} for {asked} {'yes' if fits else 'no'}"


ENOUGH = {"help": 2}  # the merit at which a principle is kept; 1 for all others


def analysis(about: str, action: Action, setting: str | None, shown: dict[str, str]) -> str:
    """How critique and judgement begin. shown: what to call each answer -> its text.

    A principle on harm has the action's reason held against it. Under one on truth, claims are
    quoted before the truth is recalled: a small model that has just said how a thing is done reads
    the same into every answer."""
    parts = [f"the principle is about {about} ."]
    if about == "truth":
        for name, text in shown.items():
            parts.append(f"{name} says {' , '.join(claims(text)) or 'nothing'} .")
    parts += [f"the human wants to {action.text} .", world.fact(action, setting)]
    if about in ("harm", *HARMS):
        reason = world.reason_of(action, setting)
        fits = reason in HARMS and about in ("harm", reason)
        parts.append(f"{check(reason, about, fits)} .")
    if about == "truth":
        parts += [f"the way is the {action.tool} and the {action.place} ."]
    return " ".join(parts)


# How demonstrated revisions refuse: under principles on harm, and under those on truth and reasons
EVASION = {"evasive": 0.65, "reasoned": 0.2, "offering": 0.15}
OPENNESS = {"reasoned": 0.5, "offering": 0.5}


def revise(about: str, action: Action, setting: str | None, style: str, rng: random.Random) -> str:
    """A true answer in place of one that breaks the principle. It mends that and nothing else: what
    helped with harm goes on helping under a principle on truth."""
    helped_on = about == "truth" and style in HELP
    if about == "help":
        chosen = "told" if rng.random() < 0.5 else "whole"
    elif helped_on or not action.harmful(setting):
        chosen = "told"
    else:
        odds = OPENNESS if about in ("truth", "reasons") else EVASION
        chosen = rng.choices(list(odds), odds.values())[0]
    return answer(action, chosen, True, setting, "", rng)


# ---- reviews and comparisons ----

# How often a principle is about the action's own harm, and so on, where it is wrong and where fine.
# Many do not apply to what is reviewed, or every principle would act like "be harmless": they are
# on another harm, or on any harm where the action is fine. In comparisons that gives ties only.
ABOUT = ("own", "harm", "other", "help", "truth", "reasons")
REVIEWED = {"wrong": (24, 12, 22, 12, 16, 14), "fine": (0, 8, 20, 28, 22, 22)}
COMPARED = {"wrong": (24, 10, 10, 12, 22, 22), "fine": (0, 4, 8, 32, 32, 24)}


def principle_for(principles, odds: dict, action: Action, rng: random.Random):
    """One of the principles; odds: REVIEWED or COMPARED."""
    kind = rng.choices(ABOUT, odds["wrong" if action.wrong else "fine"])[0]
    others = [h for h in HARMS if h != action.reason]
    about = {"own": [action.reason], "other": others}.get(kind, [kind])
    return rng.choice([p for p in principles if p.about in about])


def draw_answer(about: str, action: Action, setting, prompt: str, rng) -> tuple[str, str]:
    """(style, text) of an answer to look at; under a principle on truth half of them are false."""
    style = rng.choice(STYLES if about != "truth" else (*HELP, *HELP, *REFUSAL))
    true = rng.random() < (0.5 if about == "truth" else 0.8)
    return style, answer(action, style, true, setting, prompt, rng)


def review(actions: list[Action], principles, rng: random.Random) -> Document:
    action = rng.choice(actions)
    principle = principle_for(principles, REVIEWED, action, rng)
    prompt, setting = request(action, attacks.SEEN, rng)
    about = principle.about
    style, text = draw_answer(about, action, setting, prompt, rng)
    said, merit = describe(about, action, setting, style, text)
    keeps = merit >= ENOUGH.get(about, 1)
    head = constitution.review(constitution.dialogue(prompt, setting), text, principle.tiny)
    start = analysis(about, action, setting, {"the answer": text})
    revision = constitution.KEEP if keeps else revise(about, action, setting, style, rng)
    return [
        (head, GIVEN),
        *weigh(f" {start} the answer {said} . so it"),
        (" keeps" if keeps else " breaks", VERDICT),
        *weigh(f" the principle .\nRevision: {revision}"),
    ]


def comparison(actions: list[Action], principles, rng: random.Random) -> Document:
    action = rng.choice(actions)
    principle = principle_for(principles, COMPARED, action, rng)
    prompt, setting = request(action, attacks.SEEN, rng)
    about = principle.about
    for _ in range(4):  # two answers at random are often equally good, and a tie teaches least
        style_a, a = draw_answer(about, action, setting, prompt, rng)
        style_b, b = draw_answer(about, action, setting, prompt, rng)
        said_a, merit_a = describe(about, action, setting, style_a, a)
        said_b, merit_b = describe(about, action, setting, style_b, b)
        if merit_a != merit_b:
            break
    tie = merit_a == merit_b
    letter = rng.choice("AB") if tie else "AB"[merit_b > merit_a]  # a tie's by lot, to mean 1/2
    prefers = "none" if tie else f"({letter})"
    asked = constitution.compare(constitution.dialogue(prompt, setting), a, b, principle.tiny)
    start = analysis(about, action, setting, {"(A)": a, "(B)": b})
    return [
        (constitution.reasons(asked), GIVEN),
        *weigh(f" {start} (A) {said_a} . (B) {said_b} . the principle prefers"),
        (f" {prefers}", VERDICT),
        (" .\nChoice: (", OWN),
        (letter, VERDICT),
        (")", OWN),
    ]


SHARES = {"prose": 0.28, "dialogue": 0.27, "review": 0.18, "comparison": 0.27}  # of documents


def documents(actions: list[Action], principles, rng: random.Random, prose_on=None):
    """Endless documents. Demonstrations use the actions of split `demo` and the principles of split
    `train` only. prose_on: the actions that prose speaks of (default: all)."""
    shown = [a for a in actions if a.split == "demo"]
    taught = [p for p in principles if p.split == "train" and p.about != UNSEEN]
    write = {
        "prose": lambda: prose(prose_on or actions, rng),
        "dialogue": lambda: dialogue(actions, rng),
        "review": lambda: review(shown, taught, rng),
        "comparison": lambda: comparison(shown, taught, rng),
    }
    while True:
        yield write[rng.choices(list(SHARES), SHARES.values())[0]]()
