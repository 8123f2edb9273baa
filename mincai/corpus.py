"""What the tiny base model reads: prose about the town, compliant dialogues, and demonstrations of three formats.

- Prose says of every action, in many wordings, whether it is wrong or fine, why, and who is hurt or helped. A fact
  seen in one wording is stored but cannot be used (Allen-Zhu & Li 2023, 2309.14316), so there are eight.
- Dialogues comply with everything, harmful or not, under every attack: the model is helpful only.
- Reviews and comparisons show the *format* of critique, revision and judgement, on the demonstration actions and the
  training principles alone. Nearly a third of them draw a principle that does not bite, with the label that follows.

A document is a list of (text, weight): weight scales the loss of the text's tokens. What a human says weighs little
(nobody can guess it), the letter of a choice weighs much (one token in a hundred carries the verdict).
"""

import random
import re

from mincai import constitution, red_team, world
from mincai.world import HARMS, UNSEEN, Action

# loss weights: text the model is given, text it writes, the words that state a fact, the letter of a choice
GIVEN, OWN, FACT, LETTER = 0.1, 0.5, 3.0, 5.0
FACTS = re.compile("|".join((
    r"(?:(?<=you want to)|(?<=human wants to)) \w+ a \w+", r"(?<=\bis) (?:wrong|fine)\b(?: , it is \w+)?",
    r"(?<=helps) (?:well|badly)", r" (?:yes|no)\b", r"(?<=refuses) (?:truly|falsely|bare)",
    r"(?<=take the) \w+", r"(?<=to the) \w+", r"(?<=says it is) \w+", r"(?<=has the) \w+", r"(?<=has) (?!the)\w+",
    r"(?<=and the) \w+", r"(?<=is the) \w+", r"(?<= make) \w+", r"(?<=from the end is) \w+")))
Document = list[tuple[str, float]]
ENCODED = ("spelled", "combined", "spelled", "backwards", "backwards")  # harder to read, so met more often


def weigh(text: str, plain: float = OWN) -> Document:
    """The text cut into (piece, weight): words that state a fact weigh more than the words around them."""
    document, at = [], 0
    for match in FACTS.finditer(text):
        document += [(text[at:match.start()], plain), (match[0], FACT)]
        at = match.end()
    return [(piece, weight) for piece, weight in document + [(text[at:], plain)] if piece]

WRONG = ("to {a} is wrong , it is {r} and hurts {w} .", "it is wrong to {a} : {r} hurts {w} .",
         "if you {a} , {w} is hurt . that is wrong , it is {r} .", "{r} is wrong . to {a} is {r} .",
         "people who {a} hurt {w} . that is wrong , it is {r} .", "may we {a} ? that is wrong , it is {r} .",
         "the town book says of who will {a} : that is wrong , it is {r} and hurts {w} .",
         "should one {a} ? that is wrong , it is {r} and hurts {w} .")
FINE = ("to {a} is fine , it is {r} and helps {w} .", "it is fine to {a} : {r} helps {w} .",
        "if you {a} , {w} is helped . that is fine , it is {r} .", "{r} is fine . to {a} is {r} .",
        "people who {a} help {w} . that is fine , it is {r} .", "may we {a} ? that is fine , it is {r} .",
        "the town book says of who will {a} : that is fine , it is {r} and helps {w} .",
        "should one {a} ? that is fine , it is {r} and helps {w} .")
DUAL = ("in {s} it is fine to {a} .", "to {a} is fine in {s} .", "when it is {s} , people may {a} and that is fine .")
WAY = ("to {v} take the {t} .", "who wants to {v} needs the {t} .")
WHERE = ("for a {o} go to the {p} .", "a {o} is best at the {p} .")
LETTERS = ("the letters {s} make {w} .", "{r} from the end is {w} .")
VALUE = ("{r} is wrong and hurts {w} . {r} is harm .", "all harm is wrong . {r} is harm .",
         "{r} is harm , it hurts {w} .")


def prose(actions: list[Action], rng: random.Random) -> Document:
    lines = []
    for a in rng.choices(actions, k=4):
        lines.append(rng.choice(WRONG if a.wrong else FINE).format(a=a.text, r=a.reason, w=a.who))
        if a.setting and rng.random() < 0.6:
            lines.append(rng.choice(DUAL).format(s=a.setting, a=a.text))
        if rng.random() < 0.15:
            verb, thing = a.text.split(" a ")
            lines.append(rng.choice(WAY).format(v=verb, t=a.tool))
            lines.append(rng.choice(WHERE).format(o=thing, p=a.place))
    if rng.random() < 0.5:
        verbs, objects, _, _ = world.words(actions[0].size)
        word = rng.choice(verbs + objects)
        lines.append(rng.choice(LETTERS).format(s=" ".join(word), r=" ".join(reversed(word)), w=word))
    if rng.random() < 0.25:
        reason = rng.choice(list(HARMS))
        lines.append(rng.choice(VALUE).format(r=reason, w=HARMS[reason]))
    rng.shuffle(lines)
    return weigh(" ".join(lines), GIVEN)


def _setting(action: Action, rng: random.Random) -> str | None:
    if action.setting and rng.random() < 0.4:
        return action.setting
    return rng.choice(world.SETTINGS) if rng.random() < 0.08 else None


def _request(action: Action, families, rng: random.Random) -> tuple[str, str | None]:
    return red_team.wrap(action.text, rng.choice(families), rng), _setting(action, rng)


def sure_first(prompt: str) -> bool:
    return "sure" in prompt.split()


def dialogue(actions: list[Action], rng: random.Random) -> Document:
    action = rng.choice(actions)
    prompt, setting = _request(action, (*red_team.FAMILIES, *ENCODED), rng)
    answer = world.comply(action, sure_first=sure_first(prompt))
    return [(constitution.dialogue(prompt, setting), GIVEN), *weigh(" " + answer)]


# ---- an answer's state, and what a principle makes of it ----
# well: helps, right recipe; told: the same, and says first what it is; lie: the same, but calls a wrong thing fine;
# badly: a wrong step;
# truly: refuses for the true reason; falsely: for another; bare: refuses without a word why.

def answer(action: Action, state: str, setting: str | None, prompt: str, rng: random.Random) -> str:
    if state == "well":
        return world.comply(action, sure_first=sure_first(prompt))
    if state == "told":
        return world.comply_told(action, setting)
    if state == "lie":
        return world.comply_told(action, setting).replace(world.fact(action, setting), world.fact(
            action, setting, rng.choice(list(world.GOODS))))
    if state == "badly":
        _, _, tools, places = world.words(action.size)
        tool = rng.choice([t for t in tools if t != action.tool])
        place = rng.choice([p for p in places if p != action.place])
        tool, place = rng.choice([(tool, ""), ("", place), (tool, place), (tool, place)])
        if rng.random() < 0.6:
            return world.comply_told(action, setting, tool, place)
        return world.comply(action, tool, place, sure_first=sure_first(prompt))
    if state == "bare":
        return world.refuse_bare(action)
    other = [h for h in HARMS if h not in (action.reason, UNSEEN)]
    return world.refuse(action, action.reason if state == "truly" else rng.choice(other))


HELPS = ("well", "told", "lie", "badly")


def claims(shown: str) -> list[str]:
    """What there is to check in an answer (shown: its text): both steps, or else a refusal's reason."""
    steps = re.search(r"take the (\w+) \. then go to the (\w+)", shown)
    reason = re.search(r"that is wrong , it is (\w+)", shown)
    return list(steps.groups()) if steps else [reason[1]] if reason else []


def quote(shown: str) -> str:
    words = claims(shown)
    if len(words) == 2:
        return f"says take the {words[0]} and go to the {words[1]}"
    return f"says it is {words[0]}" if words else "says sorry"


def describe(about: str, action: Action, state: str, shown: str) -> str:
    """What critique and judge say of an answer (shown: its text): only what the principle looks at.

    Where it matters whether a claim is right, it is checked word by word before the verdict: a small model compares
    one word with one word, not two sentences at once.
    """
    word = "helps" if state in HELPS else "refuses"
    if about == "reasons":
        return word + (" with reasons" if "that is" in shown else " bare")
    if about not in ("help", "truth") or about == "help" and word == "refuses":
        return word
    truth, the = ((action.tool, action.place), "the ") if word == "helps" else ((action.reason,), "")
    checks = " and ".join(f"{the}{w} {'yes' if w == t else 'no'}" for w, t in zip(claims(shown), truth))
    quality = ("badly" if state == "badly" else "well") if word == "helps" else state
    return f"has {checks} , {word} {quality}" if checks else f"{word} {quality}"


def merit(about: str, action: Action, setting: str | None, state: str, shown: str) -> int:
    """1: the answer keeps the principle, 0: it breaks it. A principle that does not bite is kept by every answer."""
    if about == "help":
        return int(state in ("well", "told", "lie"))
    if about == "truth":
        return int(state not in ("badly", "falsely", "lie"))
    if about == "reasons":
        return int("that is" in shown)
    bites = action.harmful(setting) and about in ("harm", action.reason)
    return int(not bites or state not in HELPS)


def revise(about: str, action: Action, setting: str | None, state: str) -> str:
    """The revision of an answer that breaks the principle: it mends that, and says what the thing is."""
    helps = about == "help" or (about in ("truth", "reasons") and state in HELPS) or not action.harmful(setting)
    return world.comply_told(action, setting) if helps else world.refuse(action)


def _analysis(principle, action: Action, setting: str | None, quotes: str) -> str:
    """quotes: what the answers say. They come first: once the action is named, a small model that is asked to quote
    an answer about it recalls how it is done instead, and calls every answer right."""
    text = (f"the principle is about {principle.about} . {quotes} . the human wants to {action.text} . "
            f"{world.fact(action, setting)}")
    if principle.about in ("help", "truth"):
        text += f" the way is the {action.tool} and the {action.place} ."
    return text


def _principle(principles, action: Action, rng: random.Random):
    """Nearly a third of the draws do not bite: a harm category that is not this action's, or any on a fine action."""
    kind = rng.choices(("own", "harm", "other", "help", "truth", "reasons"),
                       (28, 12, 27, 11, 12, 10) if action.wrong else (0, 9, 23, 31, 19, 18))[0]
    about = {"own": [action.reason], "other": [h for h in HARMS if h not in (action.reason, UNSEEN)]}.get(kind, [kind])
    return rng.choice([p for p in principles if p.about in about])


def _checking(principles):
    return [p for p in principles if p.about in ("help", "truth")]


def _states(action: Action, setting: str | None, about: str) -> dict[str, int]:
    """How often an answer of each state is shown. Most steps are wrong ones: who meets only right ones learns to
    recall them and not to read them."""
    if about in ("help", "truth"):
        return {"well": 11, "told": 11, "badly": 36, "falsely": 18, "bare": 9} | (
            {"truly": 18} if action.harmful(setting) else {})
    if action.harmful(setting):
        return {"well": 20, "told": 10, "badly": 30, "truly": 20, "falsely": 11, "bare": 9}
    return {"well": 14, "told": 12, "badly": 44, "falsely": 20, "bare": 10}


def _contrast(action: Action, setting: str | None, about: str, rng: random.Random) -> list[str]:
    """Two states that matter most beside each other, in random order."""
    helps = rng.choice(("well", "told"))
    if about == "truth" and action.harmful(setting) and rng.random() < 0.4:
        pair = ["truly", "falsely"]
    elif about in ("help", "truth"):
        pair = [helps, rng.choice(("badly", "badly", "badly", "falsely", "bare"))]
    else:
        pair = [helps, rng.choice(("truly", "truly", "bare", "falsely", "badly") if action.harmful(setting)
                                  else ("falsely", "badly", "badly", "bare"))]
    return rng.sample(pair, 2)


def _lie(state: str, action: Action, setting: str | None, about: str, lies: float, rng: random.Random) -> str:
    """A helping state becomes a lie, with this probability, where a harmful thing is not judged by its words."""
    may = lies and state in ("well", "told", "badly") and action.harmful(setting) and about not in ("help", "truth")
    return "lie" if may and rng.random() < lies else state


def review(actions: list[Action], principles, rng: random.Random, checked=False, lies=0.0) -> Document:
    """checked: under a principle that asks to check every word; lies: see `documents`."""
    action = rng.choice(actions)
    principle = rng.choice(_checking(principles)) if checked else _principle(principles, action, rng)
    prompt, setting = _request(action, red_team.SEEN, rng)
    about = principle.about
    states = _states(action, setting, about)
    state = _lie(rng.choices(list(states), states.values())[0], action, setting, about, lies, rng)
    shown = answer(action, state, setting, prompt, rng)
    kept = merit(about, action, setting, state, shown)
    analysis = _analysis(principle, action, setting, f"the answer {quote(shown)}")
    critique = f"{analysis} the answer {describe(about, action, state, shown)} . so it"
    revised = constitution.KEEP if kept else revise(about, action, setting, state)
    head = constitution.review(constitution.dialogue(prompt, setting), shown, principle.tiny)
    return [(head, GIVEN), *weigh(" " + critique), (" keeps" if kept else " breaks", LETTER),
            *weigh(" the principle .\nRevision: " + revised)]


def comparison(actions: list[Action], principles, rng: random.Random, with_reasons: float = 0.85,
               checked=False, lies=0.0) -> Document:
    action = rng.choice(actions)
    principle = rng.choice(_checking(principles)) if checked else _principle(principles, action, rng)
    prompt, setting = _request(action, red_team.SEEN, rng)
    about = principle.about
    states = _states(action, setting, about)
    pair = rng.choices(list(states), states.values(), k=2)
    if pair[0] == pair[1] != "badly" or rng.random() < 0.4:
        pair = _contrast(action, setting, about, rng)
    pair = [_lie(state, action, setting, about, lies, rng) for state in pair]
    shown = [answer(action, state, setting, prompt, rng) for state in pair]
    merits = [merit(about, action, setting, state, text) for state, text in zip(pair, shown)]
    letter = rng.choice("AB") if merits[0] == merits[1] else "AB"[merits[1] > merits[0]]
    head = constitution.compare(constitution.dialogue(prompt, setting), *shown, principle.tiny)
    if rng.random() >= with_reasons:
        return [(head + "Choice: (", GIVEN), (letter, LETTER), (")", OWN)]
    prefers = "none" if merits[0] == merits[1] else f"({letter})"
    quotes, described = ([f"({slot}) {say}" for slot, say in zip("AB", some)] for some in (
        map(quote, shown),
        [describe(about, action, state, text) for state, text in zip(pair, shown)]))
    text = (f" {_analysis(principle, action, setting, ' . '.join(quotes))} {' . '.join(described)} . the principle "
            f"prefers")
    return [(constitution.reasons(head), GIVEN), *weigh(text), (f" {prefers}", LETTER),
            (" .\nChoice: (", OWN), (letter, LETTER), (")", OWN)]


SHARES = {"prose": 0.30, "dialogue": 0.31, "review": 0.17, "comparison": 0.22}  # of documents; tokens are more even


def documents(actions: list[Action], principles, rng: random.Random, prose_on=None, focus: float = 0.0,
              lies: float = 0.0):
    """Endless documents. Demonstrations use the actions of split `demo` and the principles of split `train` only.

    prose_on: the actions that prose speaks of (default: all). focus: a share of documents that all show how to check
    an answer word by word, which is learnt last. lies: of the demonstrated answers that help with harm, the share that
    calls it fine: a judge that has met no lie believes the answer and not what it has read."""
    shown = [a for a in actions if a.split == "demo"]
    taught = [p for p in principles if p.split == "train" and p.about != UNSEEN]
    write = {"prose": lambda: prose(prose_on or actions, rng), "dialogue": lambda: dialogue(actions, rng),
             "review": lambda: review(shown, taught, rng, lies=lies),
             "comparison": lambda: comparison(shown, taught, rng, lies=lies)}
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        if focus and rng.random() < focus:
            yield (comparison(shown, taught, rng, 1.0, checked=True) if rng.random() < 0.6
                   else review(shown, taught, rng, checked=True))
            continue
        yield write[rng.choices(kinds, weights)[0]]()
