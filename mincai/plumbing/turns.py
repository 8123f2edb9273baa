"""Conversations of several turns, from transcripts or lists of messages: lists of (role, text), the
roles being Setting, Human and Assistant. Knows no files; formats.py reads those.
"""

import re

from mincai import UserError

ROLES = {"user": "Human", "assistant": "Assistant", "system": "Setting"}
MARKER = re.compile(r"\n\n(Human|Assistant):")
# What constitution.dialogue writes. HH-RLHF has a blank line before "Assistant:" and does not match
DIALOGUE = re.compile(r"(?:Setting: (.*?)\n)?Human: (.*[^\n])\nAssistant:", re.DOTALL)


def turns_of(value, where) -> list[tuple[str, str]]:
    """Turns, at least one, of a text (a transcript of either style, or else a question), or of a
    list of messages."""
    if isinstance(value, str):
        ours = DIALOGUE.fullmatch(value)
        if ours:
            return [("Setting", ours[1])] * bool(ours[1]) + [("Human", ours[2])]
        # text before the first marker, role, text, role, ...
        before, *parts = MARKER.split("\n\n" + value.lstrip())
        if parts and before.strip():
            told = "text stands before the first turn; begin with Human: and the question"
            raise UserError(f"{where}: {told}")
        return list(zip(parts[::2], parts[1::2], strict=True)) or [("Human", value)]
    if not isinstance(value, list) or not value:
        told = 'not a conversation; write text, or a list of {"role", "content"}'
        raise UserError(f"{where}: {told}")
    return [_turn(message, where) for message in value]


def _turn(message, where):
    message = message if isinstance(message, dict) else {}
    role, text = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        told = f"a message needs a role ({', '.join(ROLES)}) and its content as text"
        raise UserError(f"{where}: {told}")
    return ROLES[role], text


def transcript(row, key, where) -> list[tuple[str, str]]:
    """All turns of one side of a pair, those of the prompt in front if it does not repeat them."""
    prompt, side = row.get("prompt"), row[key]
    alone = prompt is not None and isinstance(side, str)  # an answer and no more
    turns = [("Assistant", side)] if alone else turns_of(side, f"{where}, {key}")
    if prompt is None or turns[0][0] != "Assistant":
        return turns
    before = turns_of(prompt, f"{where}, prompt")
    if before[-1][0] == "Assistant" and not before[-1][1].strip():
        before.pop()  # the bare "Assistant:" that a prompt may end with
    return [*before, *turns]


def asked(turns, where) -> dict:
    """{"prompt"[, "setting"]} of the turns before an answer; the prompt is empty if all are."""
    setting = ""
    if turns and turns[0][0] == "Setting":
        setting, turns = " ".join(turns[0][1].split()), turns[1:]
    if not turns or turns[0][0] != "Human" or "Setting" in dict(turns):
        told = "needs a human turn, then an answer; only one system message may stand in front"
        raise UserError(f"{where}: {told}")
    texts = [re.sub(r"\n\s*\n", "\n", text.strip()) for _, text in turns]
    # no space after a bare colon
    lines = [f"{role}: {text}".rstrip() for (role, _), text in zip(turns, texts, strict=True)]
    prompt = "\n".join(lines).removeprefix("Human:").removeprefix(" ") if any(texts) else ""
    return {"prompt": prompt, "setting": setting} if setting else {"prompt": prompt}
