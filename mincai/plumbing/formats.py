"""Other people's prompts and pairs: plain text, tables, HH-RLHF's, TRL's; and each into another.

    python -m mincai.plumbing.formats --source runs/tiny/comparisons.jsonl --out pairs.jsonl
    python -m mincai.plumbing.formats --source runs/tiny/revisions.jsonl --out completions.jsonl
    python -m mincai.plumbing.formats --source theirs.jsonl.gz --to mincai --out ours.jsonl

What is read, one format a file: JSONL, a JSON list, CSV, TSV or parquet, packed by gzip or not:

    read_prompts   {"id", "prompt", "kind", ...}                     mincai's own, given as they are
                   one prompt a line                                 plain text
                   {"prompt"} or another of QUESTION                 a question, or a conversation
                   {"chosen", "rejected"}                            HH-RLHF, TRL: before the answer
    read_pairs     {"prompt", "a_ids", "b_ids", "p_a", ...}          mincai's own, checked
                   {"chosen", "rejected"} as text                    HH-RLHF: two whole transcripts
                   {"prompt", "chosen", "rejected"} as text          TRL
                   the same as [{"role", "content"}, ...]            TRL; "prompt" may be absent

What is written (--to), one object a line; prompts are texts that end with "Assistant:":

    trl        {"prompt", "chosen", "rejected", "p_chosen", "margin"} of pairs, {"prompt",
               "completion"} of revisions, {"prompt"} of prompts. p_chosen is the label, the
               probability that chosen is better; margin is p_chosen less that of the other,
               2 * p_chosen - 1, or what the source says. TRL's RewardTrainer asks for scores that
               far apart if the column is there
    hh         {"chosen", "rejected"}, whole transcripts
    prompts    {"prompt"[, "kind", "category"]}, each once
    mincai     what read_prompts and read_pairs give as it is; of pairs {"prompt", "a", "b", "p_a"}

A format of rows is an entry in PROMPTS, PAIRS or SOURCES: its name in messages -> (whether a row is
of it, what to make of the row). The first that fits is taken; reader_of does it for files. A fault
in mincai's own rows, or in a file, stops the job; another's row that cannot be used is counted.

A conversation of several turns becomes one prompt, such that constitution.dialogue(prompt) is
"Human: first\\nAssistant: reply\\nHuman: second\\nAssistant:". Turns keep their newlines but no
blank line. A system message becomes the setting, on one line. Other people's labels are hard.
"""

import csv
import json
import os
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mincai import UserError
from mincai.constitution import conversation_of, dialogue
from mincai.plumbing import data, lock, output
from mincai.plumbing.cli import arg, run
from mincai.plumbing.distributed import tell
from mincai.plumbing.tokenizer import WORDS
from mincai.plumbing.turns import QUOTED, Unusable, asked, quote, transcript, turns_of


@dataclass(frozen=True)
class Config:
    source: str = arg("runs/tiny/comparisons.jsonl", "pairs, prompts or revisions, by its rows")
    out: str = arg("runs/tiny/pairs.jsonl", "JSONL to write")
    to: str = arg("trl", "its format", choices=("trl", "hh", "prompts", "mincai"))
    contrast: float = arg(0.05, "trl, hh: leave out labels nearer to 1/2, as train_pm.py", least=0)
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


# --- files ----------------------------------------------------------------------------------------

NO_ROWS = {  # how files begin that hold neither rows nor a prompt a line
    "a git-lfs pointer; fetch the file itself (git lfs pull)": rb"version https://git-lfs",
    "UTF-16 text; save it as UTF-8": rb"\xff\xfe|\xfe\xff",
    "no text; give JSONL, CSV or plain text": rb"(?s).*\x00",
    "HTML; download the data itself": rb"(?i)\s*<(!doctype|html|head|\?xml)",
    "YAML, or text behind a header of YAML; give one prompt a line": rb"---[ \t]*\r?\n",
    "a Markdown table; save it as CSV": rb"\s*\|.*\|\s*\n\s*\|[\s:|-]+\|",
}


def parquet_rows(path, file):
    """("<path> row <n>", row) of a parquet file."""
    try:
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path} row {n}", row) for n, row in enumerate(rows, 1))
    except ImportError:
        told = "is parquet, which only pyarrow reads; install it, or save the rows as JSONL"
        raise UserError(f"{path}: {told}") from None
    except ValueError as error:  # pyarrow's errors
        raise UserError(f"{path}: broken parquet ({str(error).splitlines()[0]})") from None


def table_rows(path, file):
    """The same of CSV or TSV, by its first line's names, each with the line that it begins on."""
    lines = (line for _, line in data.decoded(file, path))
    first = next(lines, "")
    csv.field_size_limit(1 << 30)  # a field may hold a whole conversation
    reader = csv.reader(chain([first], lines), delimiter=max(",\t;", key=first.count), strict=True)
    names, end = None, 0
    try:
        for fields in reader:
            where, end = f"{path} line {end + 1}", reader.line_num
            if not any(map(str.strip, fields)):
                continue
            if not names:
                names = list(map(str.strip, fields))
                for name in filter(None, names):
                    if names.count(name) > 1:
                        raise UserError(f"{where}: two columns are called {name}; rename one")
            elif len(fields) != len(names):
                yield where, Unusable(f"{len(fields)} fields under a header of {len(names)}")
            else:
                yield where, dict(zip(names, fields))
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise UserError(f"{where}: not CSV ({error}); check the quotes") from None


def list_rows(path, file):
    """The same of one JSON list; a text in it is a prompt."""
    try:
        rows = data.flat_json(file.read())  # each row is looked at
    except ValueError as error:
        raise UserError(f"{path}: not a JSON list ({error})") from None
    for n, row in enumerate(rows, 1):
        row = {"prompt": row} if isinstance(row, str) else row
        yield f"{path} row {n}", data.parse_row(json.dumps(row), f"{path} row {n}")


def text_rows(path, file):
    """Each line that is not blank is a question, whatever it says."""
    for where, line in data.each_line(path, file):
        yield where, {"line": line.strip()}


def reader_of(suffix, head):
    """The function that reads the rows of a file with this suffix and these first bytes."""
    if head.startswith(b"PAR1"):
        return parquet_rows
    if suffix in (".csv", ".tsv"):
        return table_rows
    if suffix == ".txt":
        return text_rows
    if re.match(rb'\s*\[\s*[{"]', head):
        return list_rows
    return data.each_row if suffix in (".json", ".jsonl") or re.match(rb"\s*{", head) else text_rows


def file_rows(path):
    """("<path> line <n>", row, or an Unusable) of each row of a file, whatever its kind."""
    suffix = Path(str(path).removesuffix(".gz")).suffix.lower()
    with data.opened(path) as file:
        head = file.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf")
        read = reader_of(suffix, head)
        if suffix in (".yaml", ".yml", ".xml", ".html", ".htm"):
            raise UserError(f"{path}: {suffix} is not read; give JSONL, CSV or plain text")
        for what, begins in NO_ROWS.items():
            if read is not parquet_rows and re.match(begins, head):
                raise UserError(f"{path}: is {what}")
        yield from read(path, file=file)


# --- rows -----------------------------------------------------------------------------------------

TIED = "no preference"  # a row that is left out without a fault


def read_rows(path, formats: dict, known: str, dropped: Counter):
    """("<path> line <n>", the format's name, what it makes of the row) of each row; None for a row
    that cannot be used, which `dropped` counts by reason. known: the formats in words. UserError if
    a row is of no format, or not of the first one's; at the end, if fewer than half are left."""
    first, count, left = None, 0, defaultdict(list)
    for count, (where, row) in enumerate(file_rows(path), 1):  # noqa: B007, read at the end
        name = found = None
        try:
            if isinstance(row, Unusable):
                raise row
            name = next((name for name, (fits, _) in formats.items() if fits(row)), None)
            first = first or name
            if name is None:
                told = f"keys {', '.join(row) or 'none':.200} make no row that is known here"
                raise UserError(f"{where}: {told}; give {known}")
            if name != first:
                told = f"a row of {name}, but the file began with {first}"
                raise UserError(f"{where}: {told}; keep to one format a file")
            found = formats[name][1](row, where)
        except Unusable as why:
            left[str(why)].append(where)
        yield where, name, found
    tell_left(path, count, left)
    dropped.update({why: len(places) for why, places in left.items()})


def tell_left(path, count, left) -> None:
    """One line of a file's rows that are left out; UserError if none or fewer than half remain."""
    if not left:
        return
    remaining = count - sum(map(len, left.values()))
    reasons = []
    for why, places in left.items():
        named = ", ".join(place.removeprefix(f"{path} ") for place in places[:3])
        reasons.append(f"{len(places)} {why} ({named}{', ...' * (len(places) > 3)})")
    told = f"{count - remaining} of {count} rows left out: {'; '.join(reasons)}"
    if not remaining or 2 * remaining < count - len(left.get(TIED, ())):
        why, places = next(iter(left.items()))
        raise UserError(f"{places[0]}: {why}; too few rows are left: {told}")
    tell(f"warning: {path}: {told}")


def refuse(flaws: dict[str, bool]) -> None:
    """Unusable for the first of these flaws that is there."""
    for flaw, is_there in flaws.items():
        if is_there:
            raise Unusable(flaw)


def column(row, names) -> str | None:
    """The row's key that is one of these names, in any case; rather one that holds something."""
    keys = {key.lower(): key for key in row}
    found = [keys[name] for name in names if name in keys]
    return next((key for key in found if row[key] not in (None, "")), (found or [None])[0])


def need(row, keys, where, text=()) -> None:
    """UserError unless the row has these keys, none null, and nothing but strings under `text`."""
    missing = ", ".join(key for key in keys if row.get(key) is None)
    if missing:
        raise UserError(f"{where}: this row lacks {missing}; each row needs {', '.join(keys)}")
    for key in text:
        if not isinstance(row.get(key), (str, type(None))):
            raise UserError(f"{where}: {key} is a {type(row[key]).__name__}; write text")


def need_rounds(row, where) -> None:
    """UserError unless a revision's rounds, if it has any, are as mincai.critique writes them."""
    rounds = row.get("rounds", [])
    for one in rounds if isinstance(rounds, list) else [None]:
        texts = [one.get(key) for key in ("revision", "outcome")] if isinstance(one, dict) else [0]
        if not all(isinstance(text, str) for text in texts):
            told = "rounds is no list of objects with the texts revision and outcome"
            raise UserError(f"{where}: {told}; write what mincai.critique writes")


# --- prompts --------------------------------------------------------------------------------------

QUESTION = ("prompt", "messages", "conversations", "conversation", "goal", "question")
QUESTION += ("instruction", "text", "request", "input", "behavior", "query")
SYSTEM = ("system", "system_prompt", "setting")
CATEGORY = ("category", "semanticcategory", "harm_category", "risk_category", "topic")
LABEL = ("kind", "label", "type", "class", "safety", "prompt_label", "prompt_harm_label")
LABEL += ("harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "is_toxic", "safe", "is_safe")
LABEL += ("benign", "is_benign")
KINDS = {
    **dict.fromkeys(("harmful", "unsafe", "toxic", "malicious"), "harmful"),
    **dict.fromkeys(("benign", "safe", "harmless", "unharmful"), "benign"),
}


def kind_of(name: str, value) -> str | None:
    """What a column says of a prompt: harmful, benign or nothing. A yes counts if its name does."""
    value, said = str(value).strip().lower(), KINDS.get(name.lower().removeprefix("is_"))
    if said and value in ("0", "0.0", "false", "no"):
        return "benign" if said == "harmful" else "harmful"
    return said if said and value in ("1", "1.0", "true", "yes") else KINDS.get(value)


def conversation(row, side=None):
    """(turns of what a row asks and of one side of it, the columns they were read from)."""
    asks, system = column(row, QUESTION), column(row, SYSTEM)
    prompt, used = row.get(asks), [name for name in (asks, system) if name]
    more = column(row, ("input",)) if asks and asks.lower() == "instruction" else None
    if more and isinstance(row[more], str) and isinstance(prompt, str):  # Alpaca's rows
        prompt, used = f"{prompt}\n{row[more]}".strip(), [*used, more]
    setting = row.get(system) or ""
    if not isinstance(setting, str):
        raise Unusable(f"{system} is a {type(setting).__name__}; write text")
    return transcript(prompt, side, setting), used


def before_the_answer(turns):
    """{"prompt"[, "setting"]} of a conversation, without the answer that it may end with."""
    found = asked(turns[:-1] if turns[-1][0] == "Assistant" else turns)
    if not found["prompt"]:
        raise Unusable("empty prompt")
    return found


def pairs_prompt(row, where):
    """The prompt of a pair, by the conversation that its better side answers."""
    return before_the_answer(conversation(row, need_sides(row)[0])[0])


def question(row, where):
    """A prompt; its kind and category, if columns say so; and `read`, what was taken for what."""
    turns, used = conversation(row)
    if not turns:
        raise Unusable("empty prompt")
    found, category = before_the_answer(turns), column(row, CATEGORY)
    kinds = {key: kind_of(key, row[key]) for key in row if key.lower() in LABEL}
    label = next((key for key, kind in kinds.items() if kind), None)
    told = [f"prompt from {' and '.join(used)}"]
    if label:
        found["kind"] = kinds[label]
        told.append(f"kind from {label}")
    if category and isinstance(row[category], str):
        found["category"] = row[category]
        told.append(f"category from {category}")
        used.append(category)
    unread = [key for key in row if key and key not in (*used, label)]
    found["read"] = ", ".join(told) + (f"; not read: {', '.join(unread)}" if unread else "")
    return found


def own_prompt(row, where):
    """The row, checked."""
    texts = ("prompt", "kind", "setting", "category", "attack", "action", "split")
    need(row, ("id", "prompt", "kind"), where, text=texts)
    if not isinstance(row["id"], (str, int)):
        raise UserError(f"{where}: id is a {type(row['id']).__name__}; write text or a number")
    if row["kind"] not in ("harmful", "benign"):
        raise UserError(f"{where}: kind is {row['kind']!r}; give harmful or benign")
    return row


OWN = "mincai's prompts"
PROMPTS = {
    "pairs": (lambda row: any(sides(row)), pairs_prompt),
    OWN: (lambda row: {"id", "prompt", "kind"} <= row.keys(), own_prompt),
    "lines": (lambda row: row.keys() == {"line"}, lambda row, where: {"prompt": row["line"]}),
    "questions": (lambda row: column(row, QUESTION), question),
}


def read_prompts(path, kind: str = "") -> list[dict]:
    """Rows {id, prompt, kind, category, attack, split, ...} of any file of prompts listed above.

    mincai's rows are given as they are. The others get the id "<stem>-<line number>", this kind or
    else their label's or else harmful, their category, no attack, and the split "loop"; equal
    prompts are kept once. What was made of them is told in a line. Raises UserError, with path and
    line number, for a file that cannot be read.
    """
    known = "id, prompt and kind; or a prompt; or chosen and rejected"
    found = [each for each in read_rows(path, PROMPTS, known, Counter()) if each[2]]
    if any(name == OWN for _, name, _ in found):
        return [row for _, _, row in found]
    common, prompts, readings = {"category": "", "attack": "", "split": "loop"}, {}, Counter()
    for where, _, row in found:
        if (read := row.pop("read", "prompt from prompt")) != "prompt from prompt":
            readings[read] += 1
        row["kind"] = kind or row.get("kind", "harmful")
        name, same = where.rpartition(" ")[2], (row["prompt"], row.get("setting"))
        prompts.setdefault(same, {"id": f"{Path(path).stem}-{name}", **common, **row})
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write some")
    kinds = Counter(row["kind"] for row in prompts.values())
    if readings:
        told = " | ".join(f"{count} rows: {read}" for read, count in readings.most_common(3))
        counts = " and ".join(f"{count} {name}" for name, count in kinds.items())
        tell(f"{path}: {counts} prompts, {len(found) - len(prompts)} repeated; {told}")
    tell_quoted(path, [row["prompt"] for row in prompts.values()])
    return list(prompts.values())


def tell_quoted(path, texts) -> None:
    """One line if some of these texts have lines that were quoted."""
    count = sum(bool(QUOTED.search(text)) for text in texts)
    if count:
        tell(f"{path}: {count} texts had a line like a turn of its own, now quoted with '> '")


def loop_prompts(path) -> list[dict]:
    """The prompts that training may use: split "loop", or no split named. UserError without any.
    path: one file, or several with commas between. Other people's prompts are benign where
    "benign:" stands before a path, else what a label says, else harmful."""
    rows = []
    for named in [str(path)] if os.path.exists(path) else str(path).split(","):
        file = named.removeprefix("benign:")
        data.refuse_first_edition(Path(file).parent)
        found = read_prompts(file, "benign" if file != named else "")
        rows += [row for row in found if row.get("split", "loop") == "loop"]
    if not rows:
        raise UserError(f"{path}: no row has split 'loop'; the other splits are for evaluation")
    return rows


def warn_unread(rows, tokenizer, folder) -> None:
    """One line on stderr if prompts have words that a model of few words has never read: what comes
    of them means little."""
    found = [tokenizer.unread(conversation_of(row)) for row in rows]
    unread = list(dict.fromkeys(word for some in found for word in some))
    if unread:
        named = " ".join(unread[:8] + ["..."] * (len(unread) > 8))
        told = f"{sum(map(bool, found))} of {len(rows)} prompts have words that {folder}"
        listed = f"the words it knows: {folder}/{WORDS}"
        tell(f"warning: {told} has never read: {named}; {listed}")


# --- pairs ----------------------------------------------------------------------------------------


def need_label(p_a, where) -> None:
    if type(p_a) not in (int, float) or not 0 <= p_a <= 1:  # a NaN fails as well
        raise UserError(f"{where}: p_a is {p_a!r}; give a number from 0 to 1")


def own_pair(row, where):
    """The row, checked but for its ids, which take a vocabulary. Without ids the texts count."""
    texts = () if "a_ids" in row or "b_ids" in row or "a" not in row else ("a", "b")
    sides = texts or ("a_ids", "b_ids")
    need(row, ("prompt", *sides, "p_a"), where, text=("prompt", "setting", *texts))
    need_label(row["p_a"], where)
    return row


def need_ids(row, where, tokenizer) -> None:
    """UserError unless the row's ids are tokens of this vocabulary, and those of its texts."""
    for key in ("a_ids", "b_ids"):
        ids, text = row[key] if isinstance(row[key], list) else [], row.get(key[0])
        if not ids or not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            told = f"no list of token ids below {tokenizer.n_vocab}; make it with this vocabulary"
            raise UserError(f"{where}: {key} is {told}")
        said = text.strip() if isinstance(text, str) else ""
        if said and said != tokenizer.decode(ids).strip():
            told = f"not what {key[0]} says in this vocabulary; leave the ids out to have it read"
            raise UserError(f"{where}: {key} is {told}")


SIDES = ("chosen", "rejected"), ("response_chosen", "response_rejected")
SIDES += (("chosen_response", "rejected_response"),)
SCORES = ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")
SCORES += (("chosen_rating", "rejected_rating"),)


def sides(row) -> list:
    """The columns of the better and the worse answer, None for one that is not there."""
    found = [[column(row, (name,)) for name in names] for names in SIDES]
    return next((some for some in found if any(some)), [None, None])


def need_sides(row) -> list:
    """What these columns hold."""
    found = [row.get(key) for key in sides(row)]
    for name, side in zip(("chosen", "rejected"), found):
        if side is None:
            raise Unusable(f"no {name} side")
    return found


def is_tied(row) -> bool:
    """Whether a margin, or two scores, say that neither side is better."""
    try:
        gaps = [float(row["margin"])] if row.get("margin") not in (None, "") else []
        gaps += [float(row[a]) - float(row[b]) for a, b in SCORES if a in row and b in row]
    except (TypeError, ValueError):  # no number, no word on it
        return False
    return 0 in gaps


def both_sides(row, where):
    """({"prompt"[, "setting"]}, the better answer, the worse one), stripped; Unusable for flaws."""
    found = []
    for name, side in zip(("chosen", "rejected"), need_sides(row)):
        *turns, (role, answer) = conversation(row, side)[0]
        if role != "Assistant":
            raise Unusable(f"{name} ends with the {'human' if role == 'Human' else 'setting'}")
        found.append((asked(turns), quote(answer.strip())))
    (prompt, chosen), (other, rejected) = found
    refuse({"conversations differ": prompt != other, "empty prompt": not prompt["prompt"]})
    refuse({"empty answer": not chosen or not rejected, "equal answers": chosen == rejected})
    refuse({TIED: is_tied(row)})
    return prompt, chosen, rejected


def is_pair(row):
    return any(sides(row))


def is_messages(row):
    return any(isinstance(row.get(key), (list, dict)) for key in sides(row))


PAIRS = {
    "TRL's conversations": (is_messages, both_sides),
    "TRL's pairs": (lambda row: is_pair(row) and column(row, QUESTION), both_sides),
    "HH-RLHF's pairs": (is_pair, both_sides),
    "mincai's comparisons": (lambda row: "a_ids" in row or "p_a" in row, own_pair),
}


def read_pairs(path, tokenizer, dropped: Counter):
    """Rows of any file of pairs listed above, one by one; `dropped` counts those left out.

    Rows have prompt, a_ids, b_ids (" " + answer and the end-of-text id), p_a, `from` (path and
    line), and setting if there is one; mincai's own also keep what else they hold. The sides of the
    others are drawn by lot, seeded by the file's name. Raises UserError, with path and line number,
    for a fault in mincai's own rows, and as read_rows does.
    """

    def ids(answer):
        return [*tokenizer.encode(f" {answer}"), tokenizer.eot]

    lot, texts = random.Random(Path(path).name), []
    known = "chosen and rejected; or prompt, a_ids, b_ids and p_a"
    for where, _, found in read_rows(path, PAIRS, known, dropped):
        if isinstance(found, dict):  # mincai's own
            if "a_ids" not in found:
                found = found | {f"{x}_ids": ids(found[x].strip()) for x in "ab"}
            need_ids(found, where, tokenizer)
            yield {**found, "from": where}
            continue
        first = lot.random() < 0.5  # else the better answer would always be (A)
        if not found:
            continue
        prompt, *answers = found
        texts += [text for text in (prompt["prompt"], *answers) if QUOTED.search(text)]
        a, b = map(ids, answers if first else answers[::-1])
        yield {**prompt, "a_ids": a, "b_ids": b, "p_a": float(first), "from": where}
    tell_quoted(path, texts)


# --- conversion -----------------------------------------------------------------------------------


def comparison(row, where) -> dict:
    """A comparison of ours as it is, with both answers as text."""
    need(row, ("prompt", "a", "b"), where, text=("prompt", "a", "b", "setting"))
    need_label(row["p_a"], where)
    return row


def revision(row, where) -> dict:
    need(row, ("prompt", "revision"), where, text=("prompt", "revision", "setting"))
    return row


def foreign_pair(row, where) -> dict:
    """Somebody else's pair as a comparison. Lots are drawn, else the better would always be (A)."""
    prompt, *answers = both_sides(row, where)
    name, margin = f"pair-{where.rpartition(' ')[2]}", row.get("margin")
    first = random.Random(name).random() < 0.5
    a, b = answers if first else answers[::-1]
    more = {"margin": margin} if type(margin) in (int, float) else {}
    return {"id": name, **prompt, "a": a, "b": b, "p_a": float(first), **more}


SOURCES = {
    "comparisons": (lambda row: "p_a" in row, comparison),
    "revisions": (lambda row: "revision" in row, revision),
    **{name: (fits, foreign_pair) for name, (fits, make) in PAIRS.items() if make is both_sides},
}


def ranked(row, contrast) -> tuple[str, str, float]:
    """(the better answer, the worse one, the label's probability that it is); Unusable where the
    label does not say, as train_pm.py leaves it out, and where nothing can be told apart."""
    p, a, b = row["p_a"], row["a"].strip(), row["b"].strip()
    undecided = p == 0.5 or abs(p - 0.5) < contrast
    refuse({"undecided": undecided, "empty answer": not a or not b, "equal answers": a == b})
    return (a, b, p) if p > 0.5 else (b, a, 1 - p)


def as_trl(row, cfg):
    asks = {"prompt": conversation_of(row)}
    if "revision" in row:
        if not row.get("changed", True):
            raise Unusable("not changed")
        return asks | {"completion": " " + row["revision"].strip()}
    chosen, rejected, p = ranked(row, cfg.contrast)
    asks |= {"chosen": f" {chosen}", "rejected": f" {rejected}"}
    return asks | {"p_chosen": p, "margin": row.get("margin", 2 * p - 1)}


def as_hh(row, cfg):
    chosen, rejected, _ = ranked(row, cfg.contrast)
    if row.get("setting"):
        raise Unusable("has a setting, which HH-RLHF's transcripts cannot hold")
    turns = turns_of(dialogue(row["prompt"]))
    before = "".join(f"\n\n{role}: {text.strip()}" for role, text in turns) + "\n\nAssistant: "
    return {"chosen": before + quote(chosen), "rejected": before + quote(rejected)}


def as_prompt(row, cfg):
    known = {key: row[key] for key in ("kind", "category") if row.get(key)}
    return {"prompt": conversation_of(row), **known}


WRITTEN = {  # --to -> (in words, what makes a row of it)
    "trl": ("TRL's format", as_trl),
    "hh": ("HH-RLHF's format", as_hh),
    "prompts": ("prompts alone", as_prompt),
    "mincai": ("mincai's format", lambda row, cfg: row),
}


def source_rows(cfg, dropped) -> tuple[str, list]:
    """(what the source holds, its rows: pairs, revisions or prompts)."""
    path = cfg.source.removeprefix("benign:")
    _, first = next(file_rows(path), ("", {}))
    if isinstance(first, dict) and not any(fits(first) for fits, _ in SOURCES.values()):
        return "prompts", read_prompts(path, "benign" if cfg.source.startswith("benign:") else "")
    known = "pairs, prompts, or the rows of comparisons.jsonl or revisions.jsonl"
    found = list(read_rows(path, SOURCES, known, dropped))
    return next(form for _, form, _ in found if form), [row for *_, row in found if row]


def main(cfg: Config) -> dict:
    cfg.check_out()
    source, out = Path(cfg.source), Path(cfg.out)
    if out.exists() and (not cfg.again or out.resolve() == source.resolve()):
        told = "is there already; give another --out, or add --again if it is not the source"
        raise UserError(f"{cfg.out}: {told}")
    left, written = Counter(), {}
    form, rows = source_rows(cfg, left)
    to = "prompts" if form == "prompts" and cfg.to == "trl" else cfg.to  # what TRL has for them
    words, make = WRITTEN[to]
    if form == "prompts" and to == "hh" or form == "revisions" and to in ("hh", "mincai"):
        told = f"{form} are no pairs of answers, which {words} holds"
        raise UserError(f"{cfg.source}: {told}; give another --to")
    count = len(rows) + sum(left.values())
    for number, row in enumerate(rows):
        try:
            made = make(row, cfg)
        except Unusable as why:
            left[str(why)] += 1
            continue
        key = made["prompt"] if to == "prompts" else number
        left["repeated"] += key in written
        written.setdefault(key, made)
    left = +left
    told = ", ".join(f"{count} {why}" for why, count in left.items()) or "none"
    if not written:
        raise UserError(f"{cfg.source}: no row is left to write ({told}); make more of them")
    with lock.alone(cfg.out):
        data.write_jsonl(cfg.out, written.values())
        data.write_json(data.sidecar(cfg.out), data.stamp(cfg, form=form))
    print(f"formats: {len(written)} of {count} {form} in {words}; left out: {told} -> {cfg.out}")
    return {"written": len(written), **left}


if __name__ == "__main__":
    run(main, Config, __doc__)
