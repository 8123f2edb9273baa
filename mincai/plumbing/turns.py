"""Conversations of several turns, from transcripts or lists of messages: lists of (role, text), the
roles being Setting, Human and Assistant. Knows no files; formats.py reads those.

What one person wrote stays one turn: a line of it that looks like a turn is quoted with "> ".
"""

import re


class Unusable(Exception):
    """Why a row cannot be used. It is left out and counted, and its file is read on."""


ROLES = {
    **dict.fromkeys(("human", "user"), "Human"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "Assistant"),
    "system": "Setting",
}
MARKER = re.compile(r"\n\n(Human|Assistant):")
# What constitution.dialogue writes. HH-RLHF has a blank line before "Assistant:" and does not match
DIALOGUE = re.compile(r"(?:Setting: (.*?)\n)?Human: (.*[^\n])\nAssistant:", re.DOTALL)
OWN_MARKER = re.compile(r"\n(Human|Assistant):")
BEGINS = re.compile(r"\s*(Human|Assistant):|Setting: .*\nHuman:")  # as transcripts do
FORGED = re.compile(r"\n(?=(?:Human|Assistant|Setting):)")
QUOTED = re.compile(r"\n> (?:Human|Assistant|Setting):")


def quote(text: str) -> str:
    """The text, such that no line after its first can be taken for a turn."""
    return FORGED.sub("\n> ", text)


def turns_of(value) -> list[tuple[str, str]]:
    """Turns, at least one, of a text (a transcript, or else a question), or of one message or more."""
    if isinstance(value, str):
        ours = DIALOGUE.fullmatch(value)
        if ours:
            _, *parts = OWN_MARKER.split(f"\nHuman: {ours[2]}")
        else:  # text before the first marker, role, text, role, ...
            before, *parts = MARKER.split("\n\n" + value.lstrip())
            if before or not parts:  # what begins without a marker was written by one person
                return [("Human", value)]
        setting = [("Setting", ours[1])] if ours and ours[1] else []
        return [*setting, *zip(parts[::2], parts[1::2], strict=True)]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise Unusable('not a conversation; write text, or a list of {"role", "content"}')
    return [_turn(message) for message in messages]


def _turn(message):
    message = message if isinstance(message, dict) else {}
    role = str(message.get("role", message.get("from"))).lower()
    text = message.get("content", message.get("value"))
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        parts = [part.get("text") for part in text]
        if not all(isinstance(part, str) for part in parts):
            raise Unusable("a message with a part that is no text")
        text = "\n".join(parts)
    if role not in ROLES:
        raise Unusable(f"a message of role {role:.20}, which is not known")
    if not isinstance(text, (str, type(None))):
        raise Unusable("a message that is no text")
    return ROLES[role], text or ""


def transcript(prompt, side, system="") -> list[tuple[str, str]]:
    """All turns of a conversation: those of `side` (an answer alone, or whole), in front of them
    those of the prompt that it does not repeat. system: what another column says of the setting."""
    turns = [] if side is None else _side(side, prompt is not None)
    if prompt is not None:
        turns = _joined(turns_of(prompt), turns)
    if not system or not turns:
        return turns
    if turns[0][0] != "Setting":
        return [("Setting", system), *turns]
    if turns[0][1].split() != system.split():
        raise Unusable("two system messages that differ")
    return turns


def _side(side, has_prompt):
    if not isinstance(side, str) or BEGINS.match(side):
        return turns_of(side)
    if not has_prompt:
        raise Unusable("text stands before the first turn; begin with Human: and the question")
    if "\n\nHuman:" in side:
        raise Unusable("a Human: turn follows the answer")
    return [("Assistant", side)]


def _joined(before, turns):
    """The turns of a prompt, then those of a side that are not among them."""
    if before[-1][0] == "Assistant" and not before[-1][1].strip():
        before = before[:-1]  # the bare "Assistant:" that a prompt may end with
    first, then = ([(role, text.split()) for role, text in some] for some in (before, turns))
    blank = not any(words for _, words in first)
    if blank and then and then[0][0] != "Assistant":
        return turns
    if any(then[i : i + len(first)] == first for i in range(len(then) - len(first) + 1)):
        return turns  # it repeats the whole prompt
    shared = next(n for n in range(len(first), -1, -1) if first[len(first) - n :] == then[:n])
    if not shared and then and first[-1][0] == "Human" and then[0][0] != "Assistant":
        raise Unusable("a side neither repeats the prompt nor answers it")
    return [*before, *turns[shared:]]


def asked(turns) -> dict:
    """{"prompt"[, "setting"]} of the turns before an answer; the prompt is empty if all are."""
    setting = ""
    if turns and turns[0][0] == "Setting":
        setting, turns = " ".join(turns[0][1].split()), turns[1:]
    if not turns or turns[0][0] != "Human":
        raise Unusable("no human turn before the first answer")
    if "Setting" in dict(turns):
        raise Unusable("a system message after the first turn")
    texts = [quote(re.sub(r"\n\s*\n", "\n", text.strip())) for _, text in turns]
    # no space after a bare colon
    lines = [f"{role}: {text}".rstrip() for (role, _), text in zip(turns, texts, strict=True)]
    prompt = "\n".join(lines).removeprefix("Human:").removeprefix(" ") if any(texts) else ""
    return {"prompt": prompt, "setting": setting} if setting else {"prompt": prompt}
