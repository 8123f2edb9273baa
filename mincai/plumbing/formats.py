"""Other people's prompts and pairs: plain text, Anthropic's HH-RLHF, TRL's; and back to TRL.

    python -m mincai.plumbing.formats --source runs/tiny/comparisons.jsonl --out pairs.jsonl
    python -m mincai.plumbing.formats --source runs/tiny/revisions.jsonl --out completions.jsonl

What is read, JSONL but for plain text, one format a file:

    read_prompts   {"id", "prompt", "kind", ...}                     mincai's own, given as they are
                   one prompt a line                                 plain text
                   {"prompt"}                                        a question, or a conversation
                   {"chosen", "rejected"}                            HH-RLHF, TRL: before the answer
    read_pairs     {"prompt", "a_ids", "b_ids", "p_a", ...}          mincai's own, checked
                   {"chosen", "rejected"} as text                    HH-RLHF: two whole transcripts
                   {"prompt", "chosen", "rejected"} as text          TRL
                   the same as [{"role", "content"}, ...]            TRL; "prompt" may be absent

A format of rows is an entry in PROMPTS, PAIRS or EXPORTS: its name in messages -> (whether a row is
of it, what to make of the row). The first that fits is taken.

A conversation of several turns becomes one prompt, such that constitution.dialogue(prompt) is
"Human: first\\nAssistant: reply\\nHuman: second\\nAssistant:". Turns keep their newlines but no
blank line. A system message becomes the setting, on one line. Other people's labels are hard.
"""

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError
from mincai.constitution import dialogue
from mincai.plumbing import data, distributed, output
from mincai.plumbing.cli import arg, run
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.turns import asked, transcript, turns_of


@dataclass(frozen=True)
class Config:
    source: str = arg("runs/tiny/comparisons.jsonl", "comparisons or revisions, by its rows")
    out: str = arg("runs/tiny/pairs.jsonl", "JSONL to write: TRL's preferences, or completions")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


# --- rows -----------------------------------------------------------------------------------------


def read_rows(path, formats: dict, known: str):
    """("<path> line <n>", the format's name, what it makes of the row) of each row; UserError if a
    row is of no format, or not of the first one's. known: the formats in words."""
    first = None
    for where, row in data.each_row(path):
        name = next((name for name, (fits, _) in formats.items() if fits(row)), None)
        first = first or name
        if name is None:
            keys = ", ".join(row) or "none"
            raise UserError(f"{where}: keys {keys} make no row that is known here; give {known}")
        if name != first:
            told = f"a row of {name}, but the file began with {first}; keep to one format a file"
            raise UserError(f"{where}: {told}")
        yield where, name, formats[name][1](row, where)


def need(row, keys, where, text=()) -> None:
    """UserError unless the row has these keys, none null, and nothing but strings under `text`."""
    missing = ", ".join(key for key in keys if row.get(key) is None)
    if missing:
        raise UserError(f"{where}: this row lacks {missing}; each row needs {', '.join(keys)}")
    for key in text:
        if not isinstance(row.get(key), (str, type(None))):
            raise UserError(f"{where}: {key} is a {type(row[key]).__name__}; write text")


# --- prompts --------------------------------------------------------------------------------------


def is_text(path) -> bool:
    """Plain text by its name, or, if that does not tell, for it begins as no JSON object does."""
    suffix = Path(path).suffix.lower()
    if suffix in (".txt", ".json", ".jsonl"):
        return suffix == ".txt"
    _, first = next(data.each_line(path), ("", ""))
    return not first.lstrip().startswith("{")


def text_rows(path):
    """As read_rows, of a plain text: each line that is not blank is a question, whatever it says."""
    for where, line in data.each_line(path):
        if line.strip():
            yield where, "lines", {"prompt": line.strip()}


def before_the_answer(row, where):
    """{"prompt"[, "setting"]} of a pair, by the conversation that `chosen` answers."""
    turns = transcript(row, "chosen", where)
    while turns and turns[-1][0] != "Assistant":
        turns = turns[:-1]
    return asked(turns[:-1], where)


def own_prompt(row, where):
    """The row, checked."""
    texts = ("prompt", "kind", "setting", "category", "attack")
    need(row, ("id", "prompt", "kind"), where, text=texts)
    if row["kind"] not in ("harmful", "benign"):
        raise UserError(f"{where}: kind is {row['kind']!r}; give harmful or benign")
    return row


def question(row, where):
    """{"prompt"[, "setting"]} of a conversation, without the answer that it may end with."""
    turns = turns_of(row["prompt"], where)
    return asked(turns[:-1] if turns[-1][0] == "Assistant" else turns, where)


OWN = "mincai's prompts"
PROMPTS = {
    "pairs": (lambda row: "chosen" in row, before_the_answer),
    OWN: (lambda row: "id" in row or "kind" in row, own_prompt),
    "conversations": (lambda row: "prompt" in row, question),
}


def read_prompts(path, kind: str = "harmful") -> list[dict]:
    """Rows {id, prompt, kind, category, attack, split, ...} of any file of prompts listed above.

    mincai's rows are given as they are. The others get the id "<stem>-<line number>", this kind, no
    category or attack, and the split "loop"; equal prompts are kept once, empty ones not at all.
    Raises UserError, with path and line number, for a row that cannot be read or is of another
    format than the first.
    """
    known = "id, prompt and kind; or prompt; or chosen and rejected"
    found = list(text_rows(path) if is_text(path) else read_rows(path, PROMPTS, known))
    if any(name == OWN for _, name, _ in found):
        return [row for _, _, row in found]
    common, kept = {"kind": kind, "category": "", "attack": "", "split": "loop"}, {}
    for where, _, row in found:
        if row["prompt"]:
            name, same = where.rpartition(" ")[2], (row["prompt"], row.get("setting"))
            kept.setdefault(same, {"id": f"{Path(path).stem}-{name}", **row, **common})
    if not kept:
        raise UserError(f"{path}: holds no prompt; write some")
    return list(kept.values())


def loop_prompts(path) -> list[dict]:
    """The prompts that training may use: split "loop", or no split named. UserError without any.

    path: one file, or several with commas between. Prompts of a file that names no kind are
    harmful, or benign where "benign:" stands before its path.
    """
    rows = []
    for file in [str(path)] if os.path.exists(path) else str(path).split(","):
        kind = "benign" if file.startswith("benign:") else "harmful"
        file = file.removeprefix("benign:")
        data.refuse_first_edition(Path(file).parent)
        rows += [row for row in read_prompts(file, kind) if row.get("split", "loop") == "loop"]
    if not rows:
        raise UserError(f"{path}: no row has split 'loop'; the other splits are for evaluation")
    return rows


def warn_unread(rows, tokenizer, folder) -> None:
    """One line on stderr if prompts have words that the model in this folder has never read: what
    comes of them means little. Silent for a model whose words are not listed."""
    found = [tokenizer.unread(dialogue(row["prompt"], row.get("setting"))) for row in rows]
    unread = list(dict.fromkeys(word for some in found for word in some))
    if unread and distributed.is_main():
        named = " ".join(unread[:8] + ["..."] * (len(unread) > 8))
        told = f"{sum(map(bool, found))} of {len(rows)} prompts have words that {folder}"
        listed = f"the words it knows: {folder}/{WORDS}"
        print(f"warning: {told} has never read: {named}; {listed}", file=sys.stderr)


# --- pairs ----------------------------------------------------------------------------------------


def need_label(p_a, where) -> None:
    number = isinstance(p_a, (int, float)) and not isinstance(p_a, bool)
    if not number or not 0 <= p_a <= 1:  # a NaN fails as well
        raise UserError(f"{where}: p_a is {p_a!r}; give a number from 0 to 1")


def own_pair(row, where):
    """The row, checked but for its ids, which only a vocabulary can tell right from wrong."""
    need(row, ("prompt", "a_ids", "b_ids", "p_a"), where, text=("prompt", "setting"))
    need_label(row["p_a"], where)
    return row


def need_ids(row, where, n_vocab) -> None:
    for key in ("a_ids", "b_ids"):
        ids = row[key] if isinstance(row[key], list) else []
        if not ids or not all(type(i) is int and 0 <= i < n_vocab for i in ids):
            told = f"no list of token ids below {n_vocab}; make it with this vocabulary"
            raise UserError(f"{where}: {key} is {told}")


def both_sides(row, where):
    """[(question, answer)] of chosen and rejected: {"prompt"[, "setting"]}, and stripped text."""
    need(row, ("chosen", "rejected"), where)
    sides = []
    for key in ("chosen", "rejected"):
        *turns, (role, answer) = transcript(row, key, where)
        if role != "Assistant" or "\n\nHuman:" in answer:
            told = f"{key} does not end with an answer; end it with one Assistant: turn"
            raise UserError(f"{where}: {told}")
        sides.append((asked(turns, where), answer.strip()))
    return sides


def either(row):
    """The sides that a row of somebody else's has."""
    return [row[key] for key in ("chosen", "rejected") if key in row]


HH = "HH-RLHF's pairs"
PAIRS = {
    "TRL's conversations": (lambda row: any(isinstance(x, list) for x in either(row)), both_sides),
    "TRL's pairs": (lambda row: either(row) and "prompt" in row, both_sides),
    HH: (either, both_sides),
    "mincai's comparisons": (lambda row: "a_ids" in row or "p_a" in row, own_pair),
}


def read_pairs(path, tokenizer, dropped: Counter):
    """Rows of any file of pairs listed above, one by one; `dropped` counts those left out.

    Rows have prompt, a_ids, b_ids (" " + answer and the end-of-text id), p_a, `from` (path and
    line), and setting if there is one; mincai's own also keep what else they hold. The sides of the
    others are drawn by lot, seeded by the file's name. Dropped are pairs with an empty prompt or
    answer and, of HH-RLHF, those whose conversations part before the last turn. Raises UserError,
    with path and line number, for all other faults.
    """
    lot = random.Random(Path(path).name)
    known = "chosen and rejected; or prompt, a_ids, b_ids and p_a"
    for where, name, found in read_rows(path, PAIRS, known):
        if isinstance(found, dict):  # mincai's own
            need_ids(found, where, tokenizer.n_vocab)
            yield {**found, "from": where}
            continue
        (asked_of, chosen), (other, rejected) = found
        first = lot.random() < 0.5  # else the better answer would always be (A)
        if asked_of != other and name != HH:
            told = "chosen and rejected differ before the last turn; make them one conversation"
            raise UserError(f"{where}: {told}")
        flaws = {
            "conversations differ": asked_of != other,
            "empty prompt": not asked_of["prompt"],
            "empty answer": not chosen or not rejected,
        }
        if any(flaws.values()):
            dropped[next(flaw for flaw, is_there in flaws.items() if is_there)] += 1
            continue
        answers = (chosen, rejected) if first else (rejected, chosen)
        a, b = ([*tokenizer.encode(f" {answer}"), tokenizer.eot] for answer in answers)
        yield {**asked_of, "a_ids": a, "b_ids": b, "p_a": float(first), "from": where}


# --- export ---------------------------------------------------------------------------------------


def comparison(row, where) -> tuple[dict, str]:
    """(a comparison in TRL's format, why it is to be left out or "")."""
    need(row, ("prompt", "a", "b"), where, text=("prompt", "a", "b", "setting"))
    need_label(row["p_a"], where)
    p, a, b = row["p_a"], row["a"].strip(), row["b"].strip()
    chosen, rejected = (a, b) if p > 0.5 else (b, a)
    pair = {"chosen": f" {chosen}", "rejected": f" {rejected}", "p_chosen": max(p, 1 - p)}
    why = "undecided" if p == 0.5 else "" if a and b else "empty answer"
    return {"prompt": dialogue(row["prompt"], row.get("setting")), **pair}, why


def revision(row, where) -> tuple[dict, str]:
    """The same for a revision, as a prompt and its completion."""
    need(row, ("prompt", "revision"), where, text=("prompt", "revision", "setting"))
    prompt = dialogue(row["prompt"], row.get("setting"))
    why = "" if row.get("changed") is True else "not changed"
    return {"prompt": prompt, "completion": " " + row["revision"].strip()}, why


EXPORTS = {
    "comparisons": (lambda row: "p_a" in row, comparison),
    "revisions": (lambda row: "revision" in row, revision),
}


def main(cfg: Config) -> dict:
    cfg.check_out()
    source, out = Path(cfg.source), Path(cfg.out)
    if out.exists() and (not cfg.again or out.resolve() == source.resolve()):
        told = "is there already; give another --out, or add --again if it is not the source"
        raise UserError(f"{cfg.out}: {told}")
    known = "the rows of comparisons.jsonl or revisions.jsonl"
    found = list(read_rows(cfg.source, EXPORTS, known))
    form = found[0][1]
    written = [row for _, _, (row, why) in found if not why]
    left = Counter(why for _, _, (_, why) in found if why)
    told = ", ".join(f"{count} {why}" for why, count in left.items()) or "none"
    if not written:
        raise UserError(f"{cfg.source}: no row is left to write ({told}); make more of them")
    data.write_jsonl(cfg.out, written)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, form=form))
    counts = f"{len(written)} of {len(found)} {form} in TRL's format"
    print(f"formats: {counts}; left out: {told} -> {cfg.out}")
    return {"written": len(written), **left}


if __name__ == "__main__":
    run(main, Config, __doc__)
