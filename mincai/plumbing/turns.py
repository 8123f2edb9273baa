"""Conversations of several turns, from transcripts or lists of messages: lists of (role, text), the roles being
Setting, Human and Assistant. Knows no files; formats.py reads those.
"""

import re

from mincai import UserError

ROLES = {"user": "Human", "assistant": "Assistant", "system": "Setting"}
MARKER = re.compile(r"\n\n(Human|Assistant):")
# What constitution.dialogue writes. A blank line before "Assistant:" is HH-RLHF's way and does not match.
DIALOGUE = re.compile(r"(?:Setting: (.*?)\n)?Human: (.*[^\n])\nAssistant:", re.DOTALL)


def turns_of(value, where) -> list[tuple[str, str]]:
    """Turns of a text (a transcript of either style, or else a single question), or of a list of messages."""
    if isinstance(value, str):
        if match := DIALOGUE.fullmatch(value):
            return [("Setting", match[1])] * bool(match[1]) + [("Human", match[2])]
        before, *parts = MARKER.split("\n\n" + value.lstrip())  # text before the first marker, role, text, ...
        if parts and before.strip():
            raise UserError(f"{where}: text stands before the first turn; begin with Human: and the question")
        return list(zip(parts[::2], parts[1::2])) or [("Human", value)]
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: not a conversation; write text, or a list of {{"role", "content"}}')
    for message in value:
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in list(ROLES):  # a list, for a role may be no hashable value
            raise UserError(f"{where}: a message needs a role ({', '.join(ROLES)}) and its content as text")
    return [(ROLES[message["role"]], message["content"]) for message in value]


def before_answer(prompt, where) -> list[tuple[str, str]]:
    """Turns of a prompt, without the bare "Assistant:" that it may end with."""
    turns = turns_of(prompt, f"{where}, prompt")
    return turns[:-1] if turns[-1][0] == "Assistant" and not turns[-1][1].strip() else turns


def transcript(row, key, where) -> list[tuple[str, str]]:
    """All turns of one side of a pair, those of the row's prompt in front where the side does not repeat them."""
    prompt = row.get("prompt")
    if prompt is not None and isinstance(row[key], str):
        return [*before_answer(prompt, where), ("Assistant", row[key])]
    turns = turns_of(row[key], f"{where}, {key}")
    return [*before_answer(prompt, where), *turns] if prompt is not None and turns[0][0] == "Assistant" else turns


def asked(turns, where) -> dict:
    """{"prompt"} of the turns before an answer, with "setting" if they have one. The prompt is empty if all are."""
    setting, turns = (turns[0][1], turns[1:]) if turns and turns[0][0] == "Setting" else ("", turns)
    if not turns or turns[0][0] != "Human" or any(role == "Setting" for role, _ in turns):
        raise UserError(f"{where}: needs a human turn, then an answer; only one system message may stand in front")
    texts = [re.sub(r"\n\s*\n", "\n", text.strip()) for _, text in turns]
    lines = [f"{role}: {text}".rstrip() for (role, _), text in zip(turns, texts)]  # no space after a bare colon
    prompt = "\n".join(lines).removeprefix("Human:").removeprefix(" ") if any(texts) else ""
    return {"prompt": prompt, **({"setting": " ".join(setting.split())} if setting.strip() else {})}
