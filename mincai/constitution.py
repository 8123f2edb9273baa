"""The principles, and every sentence that a model is ever prompted with. Knows no tensor.

Three documents are all that the loop needs, each ending where the model goes on:

    Human: ...            Review:                  Compare:
    Assistant:            Human: ...               Human: ...
                          Assistant: ...           (A): ...
                          Principle: ...           (B): ...
                          Critique:                Principle: ...
                                                   Reasons:

A prompt ends right after a colon, never with a space: GPT-2's vocabulary writes " word" with its
space as one token, so a trailing space would leave the model a context it has never read. For the
same reason an option's letter is scored inside its bracket: "Choice: (" is followed by "A" or "B",
one token each in both vocabularies.
"""

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from mincai import DATA, UserError

PATH = DATA / "constitution.json"
KEEP = "keep the answer ."  # a revision that says: the answer stands. Copying it out would only add errors.


@dataclass(frozen=True)
class Principle:
    id: str
    source: str  # the kind of document that people find such a principle in
    target: str  # what it is about: a harm category, harm, help, truth, reasons, conduct
    topic: str
    polarity: str  # avoid | promote
    scope: str  # content | manner | honesty | helpfulness
    split: str  # train | held: held principles occur in no demonstration that the base model reads
    weight: float
    text: str  # for a reader and for a model with room
    critique: str  # what to ask of a critique
    revision: str  # what to ask of a revision
    compare: str  # what to ask of a choice between two answers
    tiny: str  # for a model with a million parameters
    about: str  # the one word of `tiny` that says what it is about

    def asks(self, use: str, full: bool) -> str:
        """What a prompt says of it: the short text whatever the use, or in full the text with what
        to ask of a "critique", or of a choice between two answers ("compare")."""
        return f"{self.text} {getattr(self, use)}" if full else self.tiny


OWN = {  # what a principle is that says no more of itself than its text
    "source": "own",
    "target": "conduct",
    "topic": "",
    "polarity": "avoid",
    "scope": "content",
    "split": "train",
    "weight": 1.0,
    "critique": "Say where the assistant's last answer falls short of this, and quote the words.",
    "revision": "Rewrite it to keep to this principle while still being of use to the person.",
    "compare": "Choose the answer that keeps better to this principle.",
    "about": "",
}


def principle(row, n: int) -> Principle:
    """A principle from a sentence or an object, the n-th of its file. ValueError says its fault."""
    row = {"text": row} if isinstance(row, str) else dict(row)
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"principle {n} lacks a text")
    found = Principle(**{"id": f"own-{n}", **OWN, "tiny": row["text"], **row})
    for field in fields(Principle):
        value = getattr(found, field.name)
        if not isinstance(value, str) if field.type is str else not 0 <= value < math.inf:
            raise ValueError(f"principle {n}: {field.name} is {value!r}")
    if found.split not in ("train", "held"):
        raise ValueError(f"principle {n}: split is {found.split!r}; give train or held")
    return found


def load_constitution(path=PATH) -> list[Principle]:
    """The principles of a JSON list of sentences or objects, or of {"principles": that list}.
    Fields that an object does not have are as in OWN. UserError for any other file."""
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = rows if isinstance(rows, list) else rows["principles"]
        principles = [principle(row, n) for n, row in enumerate(rows, 1)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such constitution") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a constitution ({error}); see data/constitution.json for the form"
        ) from None
    if not principles:
        raise UserError(f"{path}: a constitution without principles")
    twice = [id for id, count in Counter(p.id for p in principles).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two principles are called {twice[0]}; give each its own id")
    return principles


def select(principles, without: str = "", split: str = "train") -> list[Principle]:
    """The principles of a split whose id and target are not in `without` (commas between).

    Everything that trains draws from split `train`; the held ones are for measuring.
    """
    names = {name.strip() for name in without.split(",") if name.strip()}
    targets = sorted({p.target for p in principles})
    unknown = names - {p.id for p in principles} - set(targets)
    if unknown:
        raise UserError(
            f"no principle or target is called {', '.join(sorted(unknown))}; targets: {', '.join(targets)}"
        )
    kept = [p for p in principles if p.split == split and not {p.id, p.target} & names]
    if not kept:
        raise UserError("no principle is left of the constitution; loosen --without")
    return kept


def held(principles) -> list[Principle]:
    """The principles that only measure; the shipped ones where a constitution holds none back."""
    some = [p for p in principles if p.split == "held"]
    return some or select(load_constitution(), split="held")


def draw(principles, targets: tuple[str, ...], aim: float, rng: random.Random) -> Principle:
    """One principle at random. With probability `aim` from those written about one of `targets` (a
    prompt's own harm category, or what an ordinary answer should be), else from all of them by
    weight.

    A red team is sorted by category; aiming is how a constitution of 75 principles is brought to
    bear in a few rounds on a prompt that only some of them speak of. Whether the principle applies,
    the model decides.
    """
    near = [p for p in principles if p.target in targets]
    pool = near if near and rng.random() < aim else principles
    return rng.choices(pool, [p.weight for p in pool])[0]


def dialogue(prompt: str, setting: str | None = None) -> str:
    """The conversation up to where the assistant speaks. A setting is the operator's line, above
    the human's."""
    return (f"Setting: {setting}\n" if setting else "") + f"Human: {prompt}\nAssistant:"


def review(conversation: str, answer: str, principle: str) -> str:
    """conversation: as `dialogue` gives it. Ends where the critique begins."""
    return f"Review:\n{conversation} {answer}\nPrinciple: {principle}\nCritique:"


def revision(review_text: str, critique: str, request: str = "") -> str:
    """The review and its critique, up to where the revision begins. request: what to ask of it, if
    there is room."""
    return (
        f"{review_text} {critique}\n" + (f"Request: {request}\n" if request else "") + "Revision:"
    )


def direct(review_text: str, request: str = "") -> str:
    """The review up to where a revision begins that no critique went before."""
    text = review_text.removesuffix("Critique:")
    return text + (f"Request: {request}\n" if request else "") + "Revision:"


def compare(conversation: str, a: str, b: str, principle: str) -> str:
    """Two answers side by side, up to the principle; `reasons` and `choice` go on from there."""
    human = conversation.removesuffix("\nAssistant:")
    return f"Compare:\n{human}\n(A): {a}\n(B): {b}\nPrinciple: {principle}\n"


CHOICE = "\nChoice: ("  # what comes after a judge's reasons


def reasons(compare_text: str) -> str:
    return f"{compare_text}Reasons:"


def choice(compare_text: str, reasons_text: str | None = None) -> str:
    """Up to the bracket that the letter follows, with or without the judge's own reasons."""
    return compare_text + (
        f"Reasons: {reasons_text}" + CHOICE if reasons_text is not None else CHOICE[1:]
    )


def clean(text: str) -> str:
    """What a model wrote on one line, without the space in front and the line's end."""
    return text.strip()
