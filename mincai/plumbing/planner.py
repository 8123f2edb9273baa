"""Few-shot prompts: which worked examples fit in front of this text, and how many were left out.

GPT-2 has never seen a critique, so it is shown some; the tiny model has read the formats and needs
none. A prompt and what the model is to write after it must fit its context together. Examples go in
whole, the first of the file before the others, until the room is used up; a text that does not fit
even alone is given up. Both are counted, and nothing is ever cut.
"""

from collections import Counter

from mincai import UserError, constitution
from mincai.plumbing import data, distributed
from mincai.plumbing.tokenizer import WORDS, words_of

KINDS = ("answer", "review", "compare")


class Planner:
    """Makes prompts of texts. shots: {kind: examples as whole texts}; limit: tokens it can read."""

    def __init__(self, tokenizer, limit: int, shots: dict[str, list[str]] | None = None):
        self.tokenizer, self.limit = tokenizer, limit
        # a model that needs examples reads plain English: principles in full words
        self.full = bool(shots)
        # + 1: two line ends may take a token each
        self.shots = {
            kind: [(text, len(tokenizer.encode(text + "\n\n")) + 1) for text in some]
            for kind, some in (shots or {}).items()
        }
        self.counts, self.heads = Counter(), {}  # heads: the ids of examples already read

    def prompt(self, kind: str, text: str, max_new: int) -> list[int] | None:
        """Token ids of the examples that fit, and the text; None if it alone leaves no room."""
        ids = self.tokenizer.encode(text)
        room = self.limit - max_new - len(ids)
        if room < 0:
            self.counts["no room"] += 1
            return None
        chosen = []
        for example, length in self.shots.get(kind, ()):
            if length <= room:
                chosen.append(example)
                room -= length
            else:
                self.counts["left out"] += 1
        self.counts["prompts"] += 1
        self.counts["examples"] += len(chosen)
        return self._behind("\n\n".join(chosen), text) if chosen else ids

    def _behind(self, head: str, text: str) -> list[int]:
        """The ids of `head`, an empty line and the text. Those of the head are made once: no token
        reaches from it into the line's end, which begins a chunk of its own (tokenizer.PATTERN)
        unless there is other white space before it."""
        if head[-1:].isspace():
            return self.tokenizer.encode(f"{head}\n\n{text}")
        if head not in self.heads:
            self.heads[head] = self.tokenizer.encode(head)
        return self.heads[head] + self.tokenizer.encode(f"\n\n{text}")

    def summary(self) -> str:
        """One clause for a stage's last line; empty where there is nothing to say."""
        told, counts = [], self.counts
        if self.full:
            each = counts["examples"] / max(1, counts["prompts"])
            left = f"{counts['left out']} left out for want of room"
            told.append(f"{each:.1f} examples a prompt ({left})")
        if counts["no room"]:
            told.append(f"{counts['no room']} texts did not fit the model's {self.limit} tokens")
        return ", ".join(told)


def outside(principle, tokenizer) -> bool:
    """Whether a principle has words that the model has never read, or none of those that say what
    the shipped principles are about. False for a model whose words are not listed."""
    if tokenizer.words is None:
        return False
    about = {p.about for p in constitution.load_constitution()}
    return bool(tokenizer.unread(principle.tiny)) or about.isdisjoint(words_of(principle.tiny))


def warn_outside(principles, tokenizer, folder) -> None:
    """One line on stderr if principles are outside what a model knows: it takes them for others."""
    some = [p for p in principles if outside(p, tokenizer)]
    if some:
        named = ", ".join([repr(p.tiny) for p in some[:3]] + ["..."] * (len(some) > 3))
        about = ", ".join(dict.fromkeys(p.about for p in constitution.load_constitution()))
        told = f"{len(some)} of {len(principles)} principles are outside what {folder} knows"
        mend = f"a 'tiny' has to name one of {about}, in the words of {folder}/{WORDS}"
        distributed.tell(f"warning: {told}: {named}; {mend}")


def load_shots(path: str, principles, reasons: bool = True) -> dict[str, list[str]]:
    """The examples of a few-shot file as texts in the form of the prompts; {} for an empty path.

    The file holds {"answer": [{human, assistant}],
    "review": [{human, answer, principle_id, critique, revision}],
    "compare": [{human, a, b, principle_id, reasons, choice}]}. reasons=False leaves the judge's
    reasons out. An id may also be of the shipped constitution: examples only show a form.
    """
    if not path:
        return {}
    by_id = {p.id: p for p in (*constitution.load_constitution(), *principles)}
    try:
        file = data.from_json(data.read_bytes(path, "give another --fewshot, or none"))
        return {kind: [_shot(kind, x, by_id, reasons) for x in file[kind]] for kind in KINDS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"not a file of examples ({error!r:.200}); see data/english/fewshot.json"
        raise UserError(f"{path}: {told}") from None


def _shot(kind, x, by_id, reasons) -> str:
    """One example as text."""
    if any(not isinstance(text, str) for text in x.values()):
        raise ValueError(f"{kind}: every field is a text")
    conversation = constitution.dialogue(x["human"])
    if kind == "answer":
        return f"{conversation} {x['assistant']}"
    principle = by_id[x["principle_id"]]
    asked = principle.asks("critique" if kind == "review" else "compare", full=True)
    if kind == "review":
        head = constitution.review(conversation, x["answer"], asked)
        return f"{constitution.revision(head, x['critique'], principle.revision)} {x['revision']}"
    if x["choice"] not in ("A", "B"):
        raise ValueError("compare: choice is A or B")
    head = constitution.compare(conversation, x["a"], x["b"], asked)
    return constitution.choice(head, x["reasons"] if reasons else None) + x["choice"] + ")"
