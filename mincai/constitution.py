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

import random
from dataclasses import dataclass, fields

from mincai import DATA, UserError
from mincai.plumbing import data

PATH = DATA / "constitution.json"
MOST = 1e9  # of a weight
KEEP = "keep the answer ."  # a revision by which the answer stands; a copy of it could have errors


@dataclass(frozen=True)
class Principle:
    """Whoever writes a constitution needs no more than the texts."""

    id: str
    text: str  # for a reader and for a model with room
    tiny: str  # for a model with a million parameters
    source: str = "own"  # the kind of document that people find such a principle in
    target: str = "conduct"  # about: a harm category, harm, help, truth, reasons, conduct
    topic: str = ""
    polarity: str = "avoid"  # avoid | promote
    scope: str = "content"  # content | manner | honesty | helpfulness
    split: str = "train"  # train | held: held ones are in no demonstration that the base reads
    weight: float = 1.0
    # what to ask of a critique, of a revision, and of a choice between two answers
    critique: str = "Say where the assistant's last answer falls short of it, and quote the words."
    revision: str = "Rewrite it to keep to this principle while still being of use to the person."
    compare: str = "Choose the answer that keeps better to this principle."
    about: str = ""  # the one word of `tiny` that says what it is about

    def asks(self, use: str, full: bool) -> str:
        """What a prompt says of it: the short text whatever the use, or in full the text with what
        to ask of a "critique", or of a choice between two answers ("compare")."""
        return f"{self.text} {getattr(self, use)}" if full else self.tiny


def _principle(row, n: int) -> Principle:
    """The n-th principle of a file, from a sentence or an object. ValueError says its fault."""
    row = {"text": row} if isinstance(row, str) else dict(row)
    made = Principle(**{"id": f"own-{n}", "text": "", "tiny": row.get("text", ""), **row})
    for field in fields(Principle):
        value = getattr(made, field.name)
        number = type(value) in (int, float) and 0 <= value <= MOST
        if not isinstance(value, str) if field.type is str else not number:
            raise ValueError(f"principle {n}: {field.name} is {value!r}")
    if not made.text.strip() or made.split not in ("train", "held"):
        raise ValueError(f"principle {n} needs a text, and a split that is train or held")
    return made


def load_constitution(path=PATH) -> list[Principle]:
    """The principles of a JSON list of sentences or objects, or of {"principles": that list}.
    An object needs a text only. UserError for any other file."""
    try:
        rows = data.from_json(data.read_bytes(path, "give a file of principles"))
        rows = rows if isinstance(rows, list) else rows["principles"]
        principles = [_principle(row, n) for n, row in enumerate(rows, 1)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a constitution ({error!s:.200}); see data/constitution.json for the form"
        ) from None
    if not principles:
        raise UserError(f"{path}: a constitution without principles")
    if len({p.id for p in principles}) < len(principles):
        raise UserError(f"{path}: two principles have one id; give each its own")
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
    some = [p for p in principles if p.split == split and not {p.id, p.target} & names]
    kept = [p for p in some if p.weight > 0]  # the others would never be drawn
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


def conversation_of(row: dict) -> str:
    """The same of a row of prompts, which may lack a setting."""
    return dialogue(row["prompt"], row.get("setting"))


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
