"""Other people's files: prompts as plain text, Anthropic's HH-RLHF, TRL's preference format; and back to TRL.

    python -m mincai.plumbing.formats --source runs/tiny/comparisons.jsonl --out pairs.jsonl
    python -m mincai.plumbing.formats --source runs/tiny/revisions.jsonl --out completions.jsonl

What is read, JSONL but for plain text, one format a file:

    read_prompts   {"id", "prompt", "kind", ...}                     mincai's own, given as they are
                   one prompt a line                                 plain text
                   {"prompt"}                                        a question, or a conversation
                   {"chosen", "rejected"}                            HH-RLHF, TRL: what comes before the answer
    read_pairs     {"prompt", "a_ids", "b_ids", "p_a", ...}          mincai's own, checked
                   {"chosen", "rejected"} as text                    HH-RLHF: two whole transcripts
                   {"prompt", "chosen", "rejected"} as text          TRL
                   the same as [{"role", "content"}, ...]            TRL; "prompt" may be absent

A conversation of several turns becomes one prompt, such that constitution.dialogue(prompt) is
"Human: first\\nAssistant: reply\\nHuman: second\\nAssistant:". Turns keep their newlines but no blank line. A system
message becomes the setting, on one line. Labels of other people's pairs are hard, whatever else a row says.
"""

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError
from mincai.plumbing import data, distributed, output
from mincai.plumbing.cli import arg, run
from mincai.constitution import dialogue
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.turns import asked, transcript, turns_of


@dataclass(frozen=True)
class Config:
    source: str = arg("runs/tiny/comparisons.jsonl", "comparisons.jsonl or revisions.jsonl; the rows tell which")
    out: str = arg("runs/tiny/pairs.jsonl", "JSONL to write: TRL's preference or prompt-completion format")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


# --- rows and their line numbers --------------------------------------------------------------------

def read_lines(path) -> list[bytes]:
    """Every line of a file, blank ones too, so that line n is entry n - 1."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def of_one_form(path, form_of, known: str):
    """(where, row, form_of(row)) of each row; UserError if a row has no form, or another than the first."""
    first = None
    for where, row in data.each_row(path):
        form = form_of(row)
        first = first or form
        if not form:
            raise UserError(f"{where}: keys {', '.join(row) or 'none'} make no row that is known here; give {known}")
        if form != first:
            raise UserError(f"{where}: a row of {form}, but the file began with {first}; keep to one format a file")
        yield where, row, form


def need(row, keys, where, text=()) -> None:
    """UserError unless the row has these keys, none of them null, and nothing but strings under those of `text`."""
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        raise UserError(f"{where}: this row lacks {', '.join(missing)}; each row needs {', '.join(keys)}")
    for key in text:
        if not isinstance(row.get(key), (str, type(None))):
            raise UserError(f"{where}: {key} is a {type(row[key]).__name__}; write text")


# --- prompts ----------------------------------------------------------------------------------------

def is_text(path) -> bool:
    """Plain text by its name, or, if the name does not tell, because it does not begin as a JSON object does."""
    suffix = Path(path).suffix.lower()
    return suffix == ".txt" or (suffix not in (".json", ".jsonl")
                                and not b"".join(read_lines(path)).lstrip().startswith(b"{"))


def text_rows(path):
    """("<path> line <n>", {"prompt"}) of each line of a plain text that is not blank."""
    for n, line in enumerate(read_lines(path), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeError as error:
            raise UserError(f"{path} line {n}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
        if text:
            yield f"{path} line {n}", {"prompt": text}


def prompt_form(row) -> str:
    return ("pairs" if "chosen" in row else "mincai's prompts" if "id" in row or "kind" in row else
            "conversations" if "prompt" in row else "")


def prompt_of(row, where) -> dict:
    """What `asked` gives for the turns before the last answer of chosen, or of the row's prompt if it ends with one."""
    turns = transcript(row, "chosen", where) if "chosen" in row else turns_of(row["prompt"], where)
    while "chosen" in row and turns and turns[-1][0] != "Assistant":
        turns = turns[:-1]
    return asked(turns[:-1] if turns and turns[-1][0] == "Assistant" else turns, where)


def read_prompts(path, kind: str = "harmful") -> list[dict]:
    """Rows {id, prompt, kind, category, attack, split, ...} of any file of prompts listed at the top.

    mincai's rows are given as they are. The others get the id "<stem>-<line number>", this kind, no category or
    attack, and the split "loop"; equal prompts are kept once, empty ones not at all. Raises UserError, with path and
    line number, for a row that cannot be read or is of another format than the first.
    """
    text = is_text(path)
    rows = [(*row, "") for row in text_rows(path)] if text else list(
        of_one_form(path, prompt_form, "id, prompt and kind; or prompt; or chosen and rejected"))
    if rows and rows[0][2] == "mincai's prompts":
        for where, row, _ in rows:
            need(row, ("id", "prompt", "kind"), where, text=("prompt", "kind", "setting", "category", "attack"))
            if row["kind"] not in ("harmful", "benign"):
                raise UserError(f"{where}: kind is {row['kind']!r}; give harmful or benign")
        return [row for _, row, _ in rows]
    kept = {}
    for where, row, _ in rows:
        found = row if text else prompt_of(row, where)  # a line of text is a question, whatever it says
        if found["prompt"]:
            name = f"{Path(path).stem}-{where.rpartition(' ')[2]}"
            kept.setdefault((found["prompt"], found.get("setting")), {
                "id": name, **found, "kind": kind, "category": "", "attack": "", "split": "loop"})
    if not kept:
        raise UserError(f"{path}: holds no prompt; write some")
    return list(kept.values())


def loop_prompts(path) -> list[dict]:
    """The prompts that training may use: split "loop", or no split named. UserError if there is none.

    path: one file, or several with commas between. Prompts of a file that names no kind are harmful, or benign where
    "benign:" stands before its path.
    """
    files = [str(path)] if os.path.exists(path) else str(path).split(",")
    rows = []
    for file in files:
        data.refuse_first_edition(Path(file.removeprefix("benign:")).parent)
        kind = "benign" if file.startswith("benign:") else "harmful"
        rows += [row for row in read_prompts(file.removeprefix("benign:"), kind) if row.get("split", "loop") == "loop"]
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
        print(f"warning: {sum(map(bool, found))} of {len(rows)} prompts have words that {folder} "
              f"has never read: {named}; the words it knows: {folder}/{WORDS}", file=sys.stderr)


# --- pairs ------------------------------------------------------------------------------------------

def pair_form(row) -> str:
    sides = [row[key] for key in ("chosen", "rejected") if key in row]
    if not sides:
        return "mincai's comparisons" if "a_ids" in row or "p_a" in row else ""
    if any(isinstance(side, list) for side in sides):
        return "TRL's conversations"
    return "TRL's pairs" if "prompt" in row else "HH-RLHF's pairs"


def need_label(p_a, where) -> None:
    if isinstance(p_a, bool) or not isinstance(p_a, (int, float)) or not 0 <= p_a <= 1:  # a NaN fails as well
        raise UserError(f"{where}: p_a is {p_a!r}; give a number from 0 to 1")


def need_ids(row, keys, where, n_vocab) -> None:
    for key in keys:
        ids = row[key]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < n_vocab for i in ids):
            raise UserError(f"{where}: {key} is no list of token ids below {n_vocab}; make it with this vocabulary")


def check_comparison(row, where, n_vocab) -> None:
    need(row, ("prompt", "a_ids", "b_ids", "p_a"), where, text=("prompt", "setting"))
    need_label(row["p_a"], where)
    need_ids(row, ("a_ids", "b_ids"), where, n_vocab)


def read_side(row, key, where) -> tuple[dict, str]:
    """({"prompt"[, "setting"]}, the answer without space around it) of one side of a pair."""
    turns = transcript(row, key, where)
    if turns[-1][0] != "Assistant" or "\n\nHuman:" in turns[-1][1]:
        raise UserError(f"{where}: {key} does not end with an answer; end it with one Assistant: turn")
    return asked(turns[:-1], where), turns[-1][1].strip()


def read_pairs(path, tokenizer, dropped: Counter):
    """Rows of any file of pairs listed at the top, read as they are asked for; `dropped` counts those left out.

    Rows have prompt, a_ids, b_ids (" " + answer and the end-of-text id), p_a, `from` (path and line), and setting if
    there is one; mincai's own also keep what else they hold. The sides of the others are drawn
    by lot, seeded by the file's name. Dropped are pairs with an empty prompt or answer and, of HH-RLHF, those whose
    conversations part before the last turn. Raises UserError, with path and line number, for all other faults.
    """
    lot = random.Random(Path(path).name)
    for where, row, form in of_one_form(path, pair_form, "chosen and rejected; or prompt, a_ids, b_ids and p_a"):
        if form == "mincai's comparisons":
            check_comparison(row, where, tokenizer.n_vocab)
            yield {**row, "from": where}
            continue
        need(row, ("chosen", "rejected"), where)
        (question, chosen), (other, rejected) = (read_side(row, key, where) for key in ("chosen", "rejected"))
        first = lot.random() < 0.5  # else the better answer would always be (A)
        if question != other and form != "HH-RLHF's pairs":
            raise UserError(f"{where}: chosen and rejected differ before the last turn; make them one conversation")
        why = ("conversations differ" if question != other else "empty prompt" if not question["prompt"] else
               "" if chosen and rejected else "empty answer")
        if why:
            dropped[why] += 1
        else:
            sides = (chosen, rejected) if first else (rejected, chosen)
            a, b = (tokenizer.encode(f" {answer}") + [tokenizer.eot] for answer in sides)
            yield {**question, "a_ids": a, "b_ids": b, "p_a": float(first), "from": where}


# --- export -----------------------------------------------------------------------------------------

def export_form(row) -> str:
    return "comparisons" if "p_a" in row else "revisions" if "revision" in row else ""


def export_row(row, where) -> tuple[dict, str]:
    """(a comparison or a revision in TRL's format, why it is to be left out or "")."""
    keys = ("prompt", "a", "b") if "p_a" in row else ("prompt", "revision")
    need(row, keys, where, text=(*keys, "setting"))
    prompt = {"prompt": dialogue(row["prompt"], row.get("setting"))}
    if "p_a" not in row:
        why = "" if row.get("changed") is True else "not changed"
        return {**prompt, "completion": " " + row["revision"].strip()}, why
    need_label(row["p_a"], where)
    p, a, b = row["p_a"], " " + row["a"].strip(), " " + row["b"].strip()
    why = "undecided" if p == 0.5 else "empty answer" if " " in (a, b) else ""
    chosen, rejected = (a, b) if p > 0.5 else (b, a)
    return {**prompt, "chosen": chosen, "rejected": rejected, "p_chosen": max(p, 1 - p)}, why


def main(cfg: Config) -> dict:
    cfg.check_out()
    if Path(cfg.out).exists() and (not cfg.again or Path(cfg.out).resolve() == Path(cfg.source).resolve()):
        raise UserError(f"{cfg.out}: is there already; give another --out, or add --again if it is not the source")
    rows = list(of_one_form(cfg.source, export_form, "the rows of comparisons.jsonl or revisions.jsonl"))
    form, exported = rows[0][2], [export_row(row, where) for where, row, _ in rows]
    written, left = [row for row, why in exported if not why], Counter(why for _, why in exported if why)
    told = ", ".join(f"{count} {why}" for why, count in left.items()) or "none"
    if not written:
        raise UserError(f"{cfg.source}: no row is left to write ({told}); make more of them")
    data.write_jsonl(cfg.out, written)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, form=form))
    print(f"formats: {len(written)} of {len(rows)} {form} in TRL's format; left out: {told} -> {cfg.out}")
    return {"written": len(written), **left}


if __name__ == "__main__":
    run(main, Config, __doc__)
