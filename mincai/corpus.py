"""What the tiny base model reads, document by document: four kinds of text, written from the world's facts.

- Prose says of every action, in many wordings, whether it is wrong or fine and why. A fact seen in one wording is
  stored but cannot be used (Allen-Zhu & Li 2023, 2309.14316), so there are eight.
- Dialogues help with everything, harmful or not, under every attack, often with half of what would help.
- Reviews and comparisons show the *format* of critique, revision and judgement, on the demonstration actions and the
  training principles alone: what the model thinks of other actions it must take from the prose.

Two choices here make the second phase necessary, and both are the paper's story (Bai et al. 2022, section 4): what
revisions of harmful answers mostly do is to evade ("sorry , let us talk of the weather ."), while a judge by principles
prefers an answer that says why. So phase 1 makes a harmless and evasive model, and feedback has something to teach.

A document is a list of (text, weight); the weight scales the loss of the text's tokens.
"""

import random
import re

from mincai import constitution, red_team, world
from mincai.world import GOODS, HARMS, HELP, REFUSAL, STYLES, UNSEEN, Action

Document = list[tuple[str, float]]
# How much a word's loss counts: what the model is given to read, the words of prose (nobody can guess which action
# comes next), what it writes itself, words that carry a fact, and the one word in a hundred that carries the verdict.
GIVEN, PROSE, OWN, FACT, LETTER = 0.0, 0.1, 0.5, 3.0, 5.0
VERDICTS = {*HARMS, *GOODS, *world.TOOLS, *world.MORE_TOOLS, *world.PLACES, *world.MORE_PLACES, "wrong", "fine"}
CONTENT = VERDICTS | {*world.VERBS, *world.MORE_VERBS, *world.OBJECTS, *world.MORE_OBJECTS, "harm", "yes", "no", "true",
                      "false", "helps", "refuses", "whole", "part", "reasons", "offer", "nothing"}


def weigh(text: str, plain: float = OWN, facts=CONTENT) -> Document:
    """The text word by word, each with its space: `facts` weigh FACT, all others `plain`."""
    return [(word, FACT if word.strip() in facts else plain) for word in re.findall(r"\s*\S+", text)]


# ---- prose ----

WRONG = ("to {a} is wrong , it is {r} and hurts {w} .", "it is wrong to {a} : {r} hurts {w} .",
         "if you {a} , {w} is hurt . that is wrong , it is {r} .", "{r} is wrong . to {a} is {r} .",
         "people who {a} hurt {w} . that is wrong , it is {r} .", "may we {a} ? that is wrong , it is {r} .",
         "the town book says of who will {a} : that is wrong , it is {r} and hurts {w} .",
         "should one {a} ? that is wrong , it is {r} and hurts {w} .")
FINE = tuple(text.replace("wrong", "fine").replace("hurts", "helps").replace("is hurt", "is helped").replace(
    "hurt {w}", "help {w}") for text in WRONG)
EXCUSED = ("in {s} it is fine to {a} .", "to {a} is fine in {s} .", "when it is {s} , people may {a} and that is fine .")
WAY = ("to {v} take the {t} .", "who wants to {v} needs the {t} .")
WHERE = ("for a {o} go to the {p} .", "a {o} is best at the {p} .")
LETTERS = ("the letters {s} make {w} .", "{r} from the end is {w} .")
VALUE = ("{r} is wrong and hurts {w} . {r} is harm .", "all harm is wrong . {r} is harm .",
         "{r} is harm , it hurts {w} .")


def prose(actions: list[Action], rng: random.Random) -> Document:
    """Four actions, what is needed for some, how some word is spelled, now and then what a harm is."""
    lines = []
    for a in rng.choices(actions, k=4):
        verb, thing = a.text.split(" a ")
        lines.append(rng.choice(WRONG if a.wrong else FINE).format(a=a.text, r=a.reason, w=a.who))
        if a.setting and rng.random() < 0.6:
            lines.append(rng.choice(EXCUSED).format(s=a.setting, a=a.text))
        if rng.random() < 0.15:
            lines += [rng.choice(WAY).format(v=verb, t=a.tool), rng.choice(WHERE).format(o=thing, p=a.place)]
    if rng.random() < 0.5:
        word = rng.choice(rng.choice(actions).text.split(" a "))
        lines.append(rng.choice(LETTERS).format(s=" ".join(word), r=" ".join(reversed(word)), w=word))
    if rng.random() < 0.25:
        reason = rng.choice(list(HARMS))
        lines.append(rng.choice(VALUE).format(r=reason, w=HARMS[reason]))
    rng.shuffle(lines)
    return weigh(" ".join(lines), PROSE, VERDICTS)


# ---- dialogues ----

ENCODED = ("spelled", "combined", "spelled", "backwards", "backwards")  # harder to read, so met more often


def request(action: Action, families, rng: random.Random) -> tuple[str, str | None]:
    """(what the human says, the conversation's setting or None): settings also stand where they excuse nothing."""
    setting = action.setting if action.setting and rng.random() < 0.3 else (
        rng.choice(world.SETTINGS) if rng.random() < 0.15 else None)
    return red_team.wrap(action.text, rng.choice(families), rng), setting


def sure_first(prompt: str) -> bool:
    return "sure" in prompt.split()


def dialogue(actions: list[Action], rng: random.Random) -> Document:
    action = rng.choice(actions)
    prompt, setting = request(action, (*red_team.FAMILIES, *ENCODED), rng)
    style = "terse" if rng.random() < 0.35 else "whole"
    answer = world.say(action, style, sure_first=sure_first(prompt))
    return [(constitution.dialogue(prompt, setting), GIVEN), *weigh(" " + answer)]


# ---- what a principle makes of an answer ----

def answer(action: Action, style: str, true: bool, setting: str | None, prompt: str, rng: random.Random) -> str:
    """An answer in this style. Where it is not true, the reason or a step is wrong, if the style has any. A refusal of
    a fine thing has no true reason to give."""
    wrong = {}
    if style in ("reasoned", "offering") and not (true and action.harmful(setting)):
        wrong = {"reason": rng.choice([h for h in HARMS if h not in (action.reason, UNSEEN)])}
    elif style in HELP and not true:
        _, _, tools, places = world.words(action.size)
        wrong = {"tool": rng.choice([t for t in tools if t != action.tool]),
                 "place": rng.choice([p for p in places if p != action.place])}
        if style == "told":
            wrong["reason"] = rng.choice([g for g in GOODS if g != world.reason_of(action, setting)])
        if style != "terse":  # one falsehood is enough
            wrong = dict(rng.sample(list(wrong.items()), rng.choice((1, 1, 2))))
    return world.say(action, style, setting, topic=rng.choice(world.TOPICS), sure_first=sure_first(prompt), **wrong)


def claims(text: str) -> list[str]:
    """What there is to check in an answer: its reason, its steps."""
    return [word for found in re.findall(r", it is (\w+)|take the (\w+)|go to the (\w+)", text) for word in found if word]


def truths(action: Action, setting: str | None, text: str) -> list[str]:
    """What should stand in the place of each of `claims`."""
    reason = [world.reason_of(action, setting)] if ", it is " in text else []
    return (reason + [action.tool, action.place] if "take the" in text else reason)[:len(claims(text))]


def describe(about: str, action: Action, setting: str | None, style: str, text: str) -> tuple[str, int]:
    """(what critic and judge say of an answer, how well it keeps the principle): only what the principle looks at.
    A principle on harm that does not apply is kept by every answer."""
    word = "helps" if style in HELP else "refuses"
    if about == "help":
        return {"terse": ("helps in part", 1), "whole": ("helps whole", 2), "told": ("helps whole", 2)}.get(
            style, (word, 0))
    if about == "reasons":
        return {"told": ("gives reasons", 1), "reasoned": ("gives reasons", 1),
                "offering": ("gives reasons and an offer", 2)}.get(style, ("gives nothing", 0))
    if about == "truth":
        pairs = list(zip(claims(text), truths(action, setting, text)))
        true = all(said == truth for said, truth in pairs)
        return " , ".join([*(check(*pair) for pair in pairs), f"is {'true' if true else 'false'}"]), int(true)
    bites = action.harmful(setting) and about in ("harm", action.reason)
    return word, int(not bites or style in REFUSAL)


def check(said: str, asked: str, same: bool | None = None) -> str:
    """Two words side by side, and whether the one may stand for the other. A small model learns late to see that two
    words are the same, and never if they stand far apart."""
    return f"{said} for {asked} {'yes' if (said == asked if same is None else same) else 'no'}"


ENOUGH = {"help": 2}  # what an answer must reach to keep a principle; 1 for all others


def analysis(about: str, action: Action, setting: str | None, shown: dict[str, str]) -> str:
    """How critique and judgement begin. shown: what to call each answer -> its text. Under a principle on harm, the
    action's reason is held against it. Under one on truth, what the answers claim is quoted before the truth is
    recalled: a small model that has just said how a thing is done reads the same into every answer."""
    parts = [f"the principle is about {about} ."]
    if about == "truth":
        parts += [f"{name} says {' , '.join(claims(text)) or 'nothing'} ." for name, text in shown.items()]
    parts += [f"the human wants to {action.text} .", world.fact(action, setting)]
    if about in ("harm", *HARMS):
        reason = world.reason_of(action, setting)
        parts += [f"{check(reason, about, reason in HARMS and about in ('harm', reason))} ."]
    if about == "truth":
        parts += [f"the way is the {action.tool} and the {action.place} ."]
    return " ".join(parts)


EVASION = {"evasive": 0.65, "reasoned": 0.2, "offering": 0.15}  # how demonstrated revisions refuse
OPENNESS = {"reasoned": 0.5, "offering": 0.5}


def revise(about: str, action: Action, setting: str | None, style: str, rng: random.Random) -> str:
    """A revision of an answer that breaks the principle: it mends that, and nothing else."""
    if about == "help" or not action.harmful(setting) or about in ("truth", "reasons") and style in HELP:
        chosen = "told" if about != "help" or rng.random() < 0.5 else "whole"
    else:
        odds = OPENNESS if about in ("truth", "reasons") else EVASION
        chosen = rng.choices(list(odds), odds.values())[0]
    return answer(action, chosen, True, setting, "", rng)


# ---- reviews and comparisons ----

def principle_for(principles, action: Action, rng: random.Random):
    """A third of the draws do not apply: another harm than the action's, or any harm on a fine action. Without them
    every principle would act like "be harmless"."""
    kind = rng.choices(("own", "harm", "other", "help", "truth", "reasons"),
                       (24, 12, 22, 12, 16, 14) if action.wrong else (0, 8, 20, 28, 22, 22))[0]
    about = {"own": [action.reason], "other": [h for h in HARMS if h not in (action.reason, UNSEEN)]}.get(kind, [kind])
    return rng.choice([p for p in principles if p.about in about])


def draw_answer(about: str, action: Action, setting, prompt: str, rng: random.Random) -> tuple[str, str]:
    """(style, text) of an answer to be looked at; under a principle on truth half of them are false."""
    style = rng.choice(STYLES if about != "truth" else (*HELP, *HELP, *REFUSAL))
    true = rng.random() < (0.5 if about == "truth" else 0.8)
    return style, answer(action, style, true, setting, prompt, rng)


def review(actions: list[Action], principles, rng: random.Random) -> Document:
    action = rng.choice(actions)
    principle = principle_for(principles, action, rng)
    prompt, setting = request(action, red_team.SEEN, rng)
    about = principle.about
    style, text = draw_answer(about, action, setting, prompt, rng)
    said, merit = describe(about, action, setting, style, text)
    keeps = merit >= ENOUGH.get(about, 1)
    head = constitution.review(constitution.dialogue(prompt, setting), text, principle.tiny)
    critique = f" {analysis(about, action, setting, {'the answer': text})} the answer {said} . so it"
    revision = constitution.KEEP if keeps else revise(about, action, setting, style, rng)
    return [(head, GIVEN), *weigh(critique), (" keeps" if keeps else " breaks", LETTER),
            *weigh(f" the principle .\nRevision: {revision}")]


def comparison(actions: list[Action], principles, rng: random.Random) -> Document:
    action = rng.choice(actions)
    principle = principle_for(principles, action, rng)
    prompt, setting = request(action, red_team.SEEN, rng)
    about = principle.about
    for _ in range(3):  # two answers at random are often equally good, and a tie teaches least
        (style_a, a), (style_b, b) = (draw_answer(about, action, setting, prompt, rng) for _ in "AB")
        (said_a, merit_a), (said_b, merit_b) = (describe(about, action, setting, *some)
                                                for some in ((style_a, a), (style_b, b)))
        if merit_a != merit_b:
            break
    letter = rng.choice("AB") if merit_a == merit_b else "AB"[merit_b > merit_a]
    prefers = "none" if merit_a == merit_b else f"({letter})"
    head = constitution.reasons(constitution.compare(constitution.dialogue(prompt, setting), a, b, principle.tiny))
    reasons = (f" {analysis(about, action, setting, {'(A)': a, '(B)': b})} (A) {said_a} . (B) {said_b} . the principle "
               "prefers")
    return [(head, GIVEN), *weigh(reasons), (f" {prefers}", LETTER), (" .\nChoice: (", OWN), (letter, LETTER),
            (")", OWN)]


SHARES = {"prose": 0.28, "dialogue": 0.27, "review": 0.18, "comparison": 0.27}  # of documents


def documents(actions: list[Action], principles, rng: random.Random, prose_on=None):
    """Endless documents. Demonstrations use the actions of split `demo` and the principles of split `train` only.
    prose_on: the actions that prose speaks of (default: all)."""
    shown = [a for a in actions if a.split == "demo"]
    taught = [p for p in principles if p.split == "train" and p.about != UNSEEN]
    write = {"prose": lambda: prose(prose_on or actions, rng), "dialogue": lambda: dialogue(actions, rng),
             "review": lambda: review(shown, taught, rng), "comparison": lambda: comparison(shown, taught, rng)}
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        yield write[rng.choices(kinds, weights)[0]]()
