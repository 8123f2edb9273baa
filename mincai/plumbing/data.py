"""Rows on disk and batches in memory: JSONL in and out, padding, and the record of how a file was
made.

Every stage reads whole files and writes whole files. A file is written under a temporary name and
then renamed, so a file that exists is complete. What a stage that was stopped had done lies beside
it, under another name (progress.py).

Masks are bool and named after what True means. Shapes: B rows of the batch, T tokens.
"""

import dataclasses
import errno
import functools
import gzip
import json
import math
import os
import random
import subprocess
import zlib
from array import array
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import mincai
from mincai import UserError
from mincai.plumbing import distributed, output
from mincai.plumbing.output import sidecar, write_json

DEEPEST = 100  # levels of JSON

# --- files ----------------------------------------------------------------------------------------


@contextmanager
def readable(path, advice="check the path, or run the stage that writes it"):
    """Turn what reading a file raises into a UserError; no pipe is waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a pipe, a socket or a device"
        raise UserError(f"{path}: cannot be read ({what}, no file); {advice}")
    try:
        yield
    except OSError as error:
        # safetensors tells a file that may not be read like one that is missing, with no strerror
        if isinstance(error, FileNotFoundError) and not os.path.exists(path):
            raise UserError(f"{path}: no such file; {advice}") from None
        denied = os.path.exists(path) and not os.access(path, os.R_OK)
        reason = os.strerror(errno.EACCES) if denied else error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); {advice}") from None


@contextmanager
def opened(path):
    """A file's bytes, unpacked where they begin as gzip's do. UserError if they cannot be read."""
    try:
        with readable(path), open(path, "rb") as file:
            yield gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: gzip that is cut short or broken ({error})") from None


def read_bytes(path, advice="get the file again") -> bytes:
    """A whole file, or UserError."""
    with readable(path, advice):
        return Path(path).read_bytes()


def flat_json(text):
    """What a JSON text says; ValueError for what cannot be read, or is nested so deeply that
    whoever walks through it would run out of stack."""
    text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [found] if text.count("[") + text.count("{") > DEEPEST else []
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [x for some in inner for x in some if isinstance(x, (dict, list))]
    if level:
        raise ValueError("nested too deeply")
    return found


def from_json(text):
    """The same, with ValueError also for an escaped half of a surrogate pair."""
    found = flat_json(text)
    if ("\\u" if isinstance(text, str) else b"\\u") in text:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def read_object(path, advice="get the file again") -> dict:
    """The one object in a JSON file; UserError for any other content. advice: if it is missing."""
    try:
        content = from_json(read_bytes(path, advice))
    except ValueError:  # JSON's and UTF-8's errors
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not JSON of one object; get the file again")
    return content


def decoded(file, path):
    """(line number, line) of an open file of text; UserError where it is not UTF-8."""
    for n, line in enumerate(file, 1):
        try:
            # some editors begin with a mark
            yield n, (line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line).decode("utf-8")
        except UnicodeError as error:
            told = f"not UTF-8 text ({error.reason}); save the file as UTF-8"
            raise UserError(f"{path} line {n}: {told}") from None


def each_line(path, file=None):
    """("<path> line <n>", line) of each line that is not blank of a text file, opened or not."""
    with nullcontext(file) if file else opened(path) as lines:
        yield from ((f"{path} line {n}", line) for n, line in decoded(lines, path) if line.strip())


def parse_row(line, where, need=()):
    """One line to a dict that has all the keys of `need`."""
    try:
        row = from_json(line)
    except UnicodeError as error:
        told = f"not UTF-8 text ({error.reason}); save the file as UTF-8"
        raise UserError(f"{where}: {told}") from None
    except json.JSONDecodeError as error:
        told = f"not JSON ({error.msg}, column {error.colno}); one object a line"
        raise UserError(f"{where}: {told}") from None
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{where}: {error}; write one flat object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
    missing = ", ".join(key for key in need if key not in row)
    if missing:
        raise UserError(f"{where}: this row lacks {missing}; each row needs {', '.join(need)}")
    return row


def each_row(path, need=(), file=None):
    """("<path> line <n>", row) of each row of a JSONL file, read as they are asked for.

    A row is a dict with the keys of `need`. Blank lines are no rows, but count as lines. Raises
    UserError, with path and line number, for a line that is no JSON object, lacks a key or is not
    UTF-8; and for a file that is missing or holds no row.
    """
    row = None
    for where, line in each_line(path, file):
        row = parse_row(line, where, need)
        yield where, row
    if row is None:
        advice = "write some, or remove it and run the stage that makes it"
        raise UserError(f"{path}: holds no rows; {advice}")


def read_jsonl(path, need=()):
    """All rows of a JSONL file, as each_row gives them."""
    return [row for _, row in each_row(path, need)]


def write_jsonl(path, rows, before=None):
    """Rows, an iterable of dicts, to a file, one JSON object a line; see output.write_file."""
    output.write_file(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows), before)


def write_stamped(path, files: dict, stamp) -> dict:
    """JSONL files, {name: rows}, and the JSON file at `path` that vouches for them; its content.

    stamp: a function that gives its content when all rows are there. The old stamp goes before new
    rows get their name: a run that is stopped in between leaves one that says so, and is made anew.
    """

    def mark():
        write_json(path, {"mincai": mincai.__version__, "unfinished": True})

    hashes = {}
    for name, rows in files.items():
        write_jsonl(Path(path).with_name(name), rows, mark)
        hashes[name] = output.sha256(Path(path).with_name(name))
    found = {**stamp(), "sha256": hashes}
    write_json(path, found)
    return found


# --- batches --------------------------------------------------------------------------------------


def right_pad(rows, device=None):
    """Token lists to (ids (B, T) long, valid (B, T) bool); T is the longest row, padding id 0."""
    lengths = torch.tensor([len(row) for row in rows])
    assert len(rows) and lengths.max() > 0, f"nothing to pad: {len(rows)} rows"
    valid = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    ids = torch.zeros(valid.shape, dtype=torch.long)
    ids[valid] = torch.tensor([token for row in rows for token in row])  # both run row by row
    return ids.to(device), valid.to(device)


def compact(ids) -> array:
    """Token ids in four bytes each, where a list takes up to 36: for the many that wait."""
    return array("I", ids)


def sft_batch(rows, device=None):
    """(prompt tokens, answer tokens) pairs to (inputs, targets, loss_mask), each (B, T-1).

    Target t is the token after input t. loss_mask is True where that target belongs to the answer:
    the first answer token is predicted from the last prompt token, so it counts; prompt and padding
    never do. Rows are padded on the right, where a causal model needs no attention mask.
    """
    assert all(prompt for prompt, _ in rows), "an empty prompt: nothing predicts the first token"
    ids, valid = right_pad([prompt + answer for prompt, answer in rows], device)  # (B, T)
    starts = torch.tensor([len(prompt) for prompt, _ in rows], device=device)  # first answer column
    columns = torch.arange(ids.shape[1], device=device)
    answer_mask = valid & (columns >= starts[:, None])  # (B, T)
    return ids[:, :-1], ids[:, 1:], answer_mask[:, 1:]


def split(rows, prompts, share, seed):
    """(training rows, held-out rows): all rows of one of `prompts`, one a row, lie on one side."""
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    held = set(names[: math.ceil(share * len(names))] if len(names) > 1 else [])
    sides = [], []
    for row, prompt in zip(rows, prompts):
        sides[prompt in held].append(row)
    return sides


def length_batches(lengths, batch_size, generator):
    """Row lengths to shuffled lists of batch_size row numbers, each once, like lengths together.

    Lengths are jittered by +-10% before sorting: rows meet other neighbours in every epoch, at the
    price of a little padding.
    """
    jitter = 0.9 + 0.2 * torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    order = (torch.tensor(lengths, dtype=torch.float64) * jitter).argsort().tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def every_batch(epochs, lengths, batch_size, generator) -> list[tuple[int, list]]:
    """(epoch, counted from 1; row numbers) of each batch of a training; see length_batches."""
    every = range(1, epochs + 1)
    return [(e, batch) for e in every for batch in length_batches(lengths, batch_size, generator)]


def micro_batches(batch: list, size: int, pieces=1) -> list[tuple[list, bool]]:
    """This process's rows of a batch in `pieces` lists, more where one would have over `size` rows
    (0: any number), and whether they count. A process without a row still takes part in summing
    gradients, with one that does not."""
    mine = distributed.share(batch)
    even = max(1, math.ceil(len(mine) / pieces))
    size = min(size or even, even)
    parts = [(mine[i : i + size], True) for i in range(0, len(mine), size)]
    return parts or [(batch[:1], False)]


# --- how a file was made --------------------------------------------------------------------------


def _git_commit():
    """The commit of the checkout this file lies in, or None; '-dirty' if tracked files changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a commit found further up would not be ours
        return None
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    how = dict(cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=10)
    try:
        return subprocess.check_output(command, **how).strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def inputs(config) -> dict:
    """{setting: SHA-256 of each file} of the settings that name files or checkpoints which are
    there: what a result is made of, wherever that lies. What LOOSE names is not, nor the output.
    What a config reads besides, its `reads` says, {name: path}."""
    out, loose = getattr(config, "out", ""), getattr(type(config), "LOOSE", ())
    paths = {name: x for name, x in vars(config).items() if name not in loose}
    paths |= config.reads() if hasattr(config, "reads") else {}
    found = {name: _content(x) for name, x in paths.items() if not _same_place(x, out)}
    return {name: content for name, content in found.items() if content}


def _content(value):
    """Hashes, spaces between, of all that a setting names: a path, several, or FILE,benign:FILE.
    "" where one is neither a file nor a checkpoint's folder."""
    if isinstance(value, str):
        value = [value] if os.path.exists(value) else value.split(",")
    hashes = []
    for part in map(str, value if isinstance(value, (list, tuple)) else ()):
        kind = "benign:" if part.startswith("benign:") else ""
        files = _files(part.removeprefix(kind))
        if not files:
            return ""
        for file in files:
            state = file.stat()
            hashes.append(kind + _sha256(file.resolve(), state.st_size, state.st_mtime_ns))
    return " ".join(hashes)


def _files(path):
    """The file, or those of a checkpoint that decide what comes out; none for any other place."""
    if os.path.isfile(path):
        return [Path(path)]
    if not os.path.isfile(os.path.join(path, "config.json")):
        return []
    weights = Path(path, "model.safetensors")
    shards = [weights] if weights.exists() else sorted(Path(path).glob("*.safetensors"))
    files = [Path(path, "config.json"), *shards, Path(path, "tokenizer.tiktoken")]
    return [file for file in files if file.is_file()]  # GPT-2's own vocabulary is no file


@functools.cache  # large weights, which several stages read, while size and time stay
def _sha256(path, size, changed):
    with readable(path):
        return output.sha256(path)


def stamp(config, **more):
    """What a result needs beside it to be made again: a JSON-able dict, with `more` added to it."""
    device = getattr(config, "device", "cpu")
    if device != "cpu":  # "auto" and "cuda" say little; the card's name says what was measured
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "config": dataclasses.asdict(config),
        "inputs": inputs(config),
        "seed": getattr(config, "seed", None),
        "git": _git_commit(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "mincai": mincai.__version__,
        **more,
    }


def done(path, config, again=False):
    """True if the output is there, made with these settings; False if it is still to be made.

    path: a checkpoint's folder or its run.json, a JSONL file (its stamp is then its sidecar), or
    any JSON file that holds its own stamp. Write the output first, its stamp last: the stamp
    vouches for the output. Settings named in the config class's LOOSE (a tuple of field names:
    where it ran, not what it computed) may differ, and so may `again`. A path may be another one if
    what lies there is the same. Raises UserError if the output was made with other settings or
    inputs, if it is no longer as it was made, or if nothing says how it was made. Whether it may be
    replaced is for output.py to say.
    """
    if again or not os.path.exists(path):  # unlike Path.exists, this is False for too long a name
        return False
    path = Path(path)
    settings = path / "run.json" if path.is_dir() else path
    settings = sidecar(path) if path.suffix == ".jsonl" else settings
    if not os.path.exists(settings):
        return False
    try:
        found = from_json(read_bytes(settings))
        if "config" not in found and found["unfinished"]:  # stopped before rows had their stamp
            return False
        old = dict(found["config"].items())
        made_of, made = (dict(found.get(key, {})) for key in ("inputs", "sha256"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{settings}: does not record any settings; give another --out") from None
    # as JSON gives it back: tuples become lists
    new = json.loads(json.dumps(dataclasses.asdict(config)))
    absent, loose = object(), {"again", *getattr(type(config), "LOOSE", ())}
    advice = "give another --out, or add --again to make it anew"
    for name in [name for name in new | old if name not in loose]:
        was, now = old.get(name, absent), new.get(name, absent)
        same = was == now or _same_place(was, now)
        content = _content(now) if name in made_of else ""
        if not (content == made_of[name] if content else same):
            was, now = ("nothing" if value is absent else repr(value) for value in (was, now))
            since = "which has changed since" if same else f"now it is {now}"
            told = f"was made with --{name.replace('_', '-')} {was}, {since}"
            raise UserError(f"{settings}: {told}; {advice}")
    now = inputs(config)
    others = {name for name in now | made_of if name not in new}  # what a config reads besides
    for name in sorted(others) if others & made_of.keys() else ():
        if now.get(name) != made_of.get(name):
            told = "has changed" if name in made_of else "has come"
            told = told if name in now else "is gone"
            raise UserError(f"{settings}: {name} {told} since it was made; {advice}")
    if found.get("unfinished"):
        return False
    for name, content in made.items():
        if name == output.CARD:  # a person may change it
            continue
        file = settings.parent / name
        if not file.is_file() or output.sha256(file) != content:
            told = "is not as it was made" if file.exists() else "is gone"
            raise UserError(f"{file}: {told}, says {settings.name}; {advice}")
    return True


def _same_place(a, b):
    """Two ways to write the path of one file or folder that is there."""
    paths = isinstance(a, str) and isinstance(b, str)
    return paths and os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def refuse_first_edition(folder) -> None:
    """UserError if this folder is a tiny world of the first edition: its answers and prompts are
    others than those that stages and evaluation know now. No other folder is concerned."""
    config = (output.stamp_of(Path(folder, "run.json")) or {}).get("config")
    if isinstance(config, dict) and {"world", "focus"} <= config.keys():  # only it had a focus
        told = "is a tiny world of the first edition, which mincai no longer reads"
        anew = f"make it anew: python -m mincai.tinyworld.pretrain --out {folder} --again"
        raise UserError(f"{folder}: {told}; use the data/tiny of this version, or {anew}")


# --- prompts --------------------------------------------------------------------------------------


def choose(rows, kind: str, number: int, rng) -> list[dict]:
    """`number` prompts of a kind (all, if 0), taken from the attack families in turn."""
    families = {}
    for row in rows:
        if row["kind"] == kind:
            families.setdefault(row.get("attack", ""), []).append(row)
    for some in families.values():
        rng.shuffle(some)
    longest = max(map(len, families.values()), default=0)
    turns = [some[i] for i in range(longest) for some in families.values() if i < len(some)]
    return turns[: number or len(turns)]
