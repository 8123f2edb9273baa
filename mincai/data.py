"""Rows on disk and batches in memory: JSONL in and out, padding, and the record of how a file was made.

Every stage reads whole files and writes whole files. A file is written under a temporary name and then
renamed, so a file that exists is complete, and a stage that was stopped leaves nothing half-written under it.

Masks are bool and named after what True means. Shapes: B rows of the batch, T tokens.
"""

import dataclasses
import json
import math
import os
import random
import subprocess
from pathlib import Path

import torch

import mincai
from mincai import UserError


# --- files ------------------------------------------------------------------------------------------

def _read_bytes(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def _write_atomic(path, lines):
    """Write strings to a temporary sibling, flush it to the disk, and only then give it its name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from None
    finally:
        if temporary.exists():  # only if something above failed, Ctrl-C included
            temporary.unlink()


def _row(line, where, need):
    """One line of bytes to a dict that has all the keys of `need`."""
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # an escaped half of a surrogate pair is JSON, but no text that UTF-8 can hold
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; write one flat object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
    missing = [key for key in need if key not in row]
    if missing:
        raise UserError(f"{where}: this row lacks {', '.join(missing)}; each row needs {', '.join(need)}")
    return row


def read_jsonl(path, need=()):
    """All rows of a JSONL file, each a dict with the keys of `need`. Blank lines do not count.

    Raises UserError, with path and line number, for a line that is no JSON object, lacks a key or is not
    UTF-8; and for a file that is missing or holds no row.
    """
    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors begin with this mark
    rows = [_row(line, f"{path} line {n}", need) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no rows; write some, or remove it and run the stage that makes it")
    return rows


def write_jsonl(path, rows):
    """Rows (an iterable of dicts) to a file, one JSON object a line; whole or not at all."""
    _write_atomic(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path, obj):
    """One JSON document, indented for people; whole or not at all."""
    _write_atomic(path, [json.dumps(obj, ensure_ascii=False, indent=2) + "\n"])


# --- batches ----------------------------------------------------------------------------------------

def right_pad(rows, device=None):
    """Token lists to (ids (B, T) long, valid (B, T) bool); T is the longest row, padding is id 0."""
    lengths = torch.tensor([len(row) for row in rows])
    assert len(rows) and lengths.max() > 0, f"nothing to pad: {len(rows)} rows"
    valid = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    ids = torch.zeros(valid.shape, dtype=torch.long)
    ids[valid] = torch.tensor([token for row in rows for token in row])  # both run row by row
    return ids.to(device), valid.to(device)


def sft_batch(rows, device=None):
    """(prompt tokens, answer tokens) pairs to (inputs, targets, loss_mask), each (B, T-1).

    Target t is the token after input t. loss_mask is True where that target belongs to the answer: the first
    answer token is predicted from the last prompt token, so it counts; prompt and padding never do. Rows are
    padded on the right, where a causal model needs no attention mask.
    """
    assert all(prompt for prompt, _ in rows), "an empty prompt: nothing predicts the first token"
    ids, valid = right_pad([prompt + answer for prompt, answer in rows], device)  # (B, T)
    starts = torch.tensor([len(prompt) for prompt, _ in rows], device=device)  # first answer column
    columns = torch.arange(ids.shape[1], device=device)
    answer_mask = valid & (columns >= starts[:, None])  # (B, T)
    return ids[:, :-1], ids[:, 1:], answer_mask[:, 1:]


def split(rows, prompts, share, seed):
    """(training rows, held-out rows), by prompt (one for each row): all rows of one prompt lie on one side."""
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    held = set(names[:math.ceil(share * len(names))] if len(names) > 1 else [])
    return ([row for row, prompt in zip(rows, prompts) if prompt not in held],
            [row for row, prompt in zip(rows, prompts) if prompt in held])


def length_batches(lengths, *, batch_size=0, batch_tokens=0, generator):
    """Row lengths to lists of row numbers: every row once, lists shuffled, like lengths together.

    Give batch_size (rows in a list) or batch_tokens (rows * longest row, padding included; a longer row goes
    alone). Lengths are jittered by +-10% before sorting: rows meet other neighbours in every epoch, at the
    price of a little padding.
    """
    assert (batch_size > 0) != (batch_tokens > 0), (batch_size, batch_tokens)
    jitter = 0.9 + 0.2 * torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    order = (torch.tensor(lengths, dtype=torch.float64) * jitter).argsort().tolist()
    batches, longest = [], 0
    for i in order:
        new = not batches or (len(batches[-1]) == batch_size if batch_size else
                              (len(batches[-1]) + 1) * max(longest, lengths[i]) > batch_tokens)
        if new:
            batches.append([])
            longest = 0
        batches[-1].append(i)
        longest = max(longest, lengths[i])
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# --- how a file was made ----------------------------------------------------------------------------

def _git_commit():
    """The commit of the checkout this file lies in, '-dirty' added if tracked files were changed, or None."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a commit found further up would not be ours
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return ran.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def stamp(config, **more):
    """What a result needs beside it to be made again: a JSON-able dict, with `more` added to it."""
    device = getattr(config, "device", "cpu")
    if device != "cpu":  # "auto" and "cuda" say little; the card's name says what was measured
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"config": dataclasses.asdict(config), "seed": getattr(config, "seed", None), "git": _git_commit(),
            "torch": torch.__version__, "device": device, "threads": torch.get_num_threads(),
            "mincai": mincai.__version__, **more}


def sidecar(path):
    """Where the stamp of a JSONL file is kept: runs/x/comparisons.jsonl -> runs/x/comparisons.run.json."""
    return Path(path).with_suffix(".run.json")


def done(path, config, again=False):
    """True if the output is there and was made with these settings; False if it is still to be made.

    path: a checkpoint's folder or its run.json, a JSONL file (its stamp is then its sidecar), or any JSON
    file that holds its own stamp. Write the output first, its stamp last: the stamp vouches for the output.
    Settings named in the config class's LOOSE (a tuple of field names: where it ran, not what it computed)
    may differ, and so may `again`. Raises UserError if the output was made with other settings, or if nothing
    says how it was made.
    """
    if again:
        return False
    path = Path(path)
    settings = sidecar(path) if path.suffix == ".jsonl" else path / "run.json" if path.is_dir() else path
    output = path if path.suffix == ".jsonl" else settings.with_name("model.safetensors")
    mend = "give another --out, or add --again to make it anew"
    if not settings.exists():
        if output.exists() and (path.suffix == ".jsonl" or settings.name == "run.json"):
            raise UserError(f"{output}: is there without {settings.name}, which says how it was made; {mend}")
        return False
    if path.suffix == ".jsonl" and not path.exists():
        return False
    try:
        old = json.loads(_read_bytes(settings))["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{settings}: does not record any settings; {mend}") from None
    new = json.loads(json.dumps(dataclasses.asdict(config)))  # as JSON gives it back: tuples become lists
    _compare(settings, dict(old), new, {"again", *getattr(type(config), "LOOSE", ())}, mend)
    return True


def _same_place(a, b):
    """Two ways to write the path of one file or folder that is there."""
    return isinstance(a, str) and isinstance(b, str) and bool(a and b) and Path(a).exists() and Path(b).exists() \
        and Path(a).resolve() == Path(b).resolve()


def _compare(path, old, new, loose, mend):
    absent = object()  # equal to no value
    for name in [*new, *(name for name in old if name not in new)]:
        was, now = old.get(name, absent), new.get(name, absent)
        if name not in loose and was != now and not _same_place(was, now):
            flag = "--" + name.replace("_", "-")
            was, now = ("nothing" if value is absent else repr(value) for value in (was, now))
            raise UserError(f"{path}: was made with {flag} {was}, now it is {now}; {mend}")


def refuse_first_edition(folder) -> None:
    """UserError if this folder is a tiny world of the first edition: its answers and prompts are
    others than those that stages and evaluation know now. No other folder is concerned."""
    try:
        config = json.loads((Path(folder) / "run.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(config, dict) and {"world", "focus"} <= config.keys():  # only it had a focus
        raise UserError(f"{folder}: is a tiny world of the first edition, which mincai no longer "
                        f"reads; use the data/tiny of this version, or make it anew: python -m "
                        f"mincai.pretrain --out {folder} --again")


# --- prompts ---------------------------------------------------------------------------------------

def choose(rows, kind: str, number: int, rng) -> list[dict]:
    """`number` prompts of a kind (all, if 0), taken from the attack families in turn so that all are present."""
    families = {}
    for row in rows:
        if row["kind"] == kind:
            families.setdefault(row.get("attack", ""), []).append(row)
    for some in families.values():
        rng.shuffle(some)
    longest = max(map(len, families.values()), default=0)
    turns = [some[i] for i in range(longest) for some in families.values() if i < len(some)]
    return turns[:number or len(turns)]
