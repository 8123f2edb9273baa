"""Where results go. Nothing is removed or replaced that mincai did not write.

A checkpoint folder says in its run.json that mincai made it ("mincai": the version) and what it
wrote there ("files"). Only these files are ever touched; whatever else lies in the folder stays. A
file of rows is vouched for by its sidecar, rows.jsonl by rows.run.json; any other JSON file by its
own key "mincai". What is there without such a word is refused, and --again changes nothing about
that. A stage asks before it works, by its Config's `check_out`, and not when hours are spent. The
model card alone is left out instead, where a person has one of their own.

A checkpoint is put together apart and gets its name when it is whole: in OUT.partial beside OUT, or
in OUT/.partial where OUT is there already. Links to folders and to files are followed, never
replaced. A path that begins with ~ is refused: the shell expands it where it stands alone (--out
~/x), and what it leaves as it is (--out=~/x) would be another place for every user.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
import uuid
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

import mincai
from mincai import UserError
from mincai.plumbing import lock

PATIENCE = 2  # seconds
CARD = "README.md"  # for people, who may write their own or change ours; theirs is kept
# What may lie in a folder that is no checkpoint yet
BESIDE = (".partial", ".progress", lock.INSIDE, CARD)
LIST = "partial.json"  # of a folder that is not whole yet: what is to be in it, as in run.json
ANOTHER = "give another --out"
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.[0-9a-f]{16}\.tmp")
MEND = "move it away, or " + ANOTHER
IN_THE_WAY = "is in the way, and mincai did not write it"


@contextlib.contextmanager
def writing(path, advice=ANOTHER):
    """Turn what writing to the path raises into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells of a full disk in words of its own
        number = re.search(r"os error (\d+)", str(error))
        why = getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else error)
        raise UserError(f"{path}: cannot be written ({why}); {advice}") from None


# --- may it be written? ---------------------------------------------------------------------------


def check_folder(folder, names) -> None:
    """UserError unless a checkpoint of these files (names within the folder) can be written here:
    the folder is absent, empty, or one that mincai made."""
    real = _target(folder)
    if os.path.exists(real) and not real.is_dir():
        raise UserError(f"{folder}: is a file; give a folder to save the model in")
    if real.is_dir():
        own = _own(real)
        if not own and any(p.name not in BESIDE for p in real.iterdir()):
            told = "holds files, but no run.json that says mincai wrote them; give a new folder"
            raise UserError(f"{folder}: {told}")
        _refuse_strangers(real, own.union(names), own, MEND)
    work = partial(real)
    if not os.path.lexists(work):
        _target(work)
        return
    if work.is_symlink() or not work.is_dir():
        raise UserError(f"{work}: {IN_THE_WAY}; {MEND}")
    files = [path for path in work.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(work).as_posix() for path in files}
    _refuse_strangers(work, names, _left(work) | temporaries(work) | {LIST}, MEND)


def check_file(path, voucher=None, mark: str = "") -> None:
    """UserError unless this file can be written: it is absent, or mincai wrote it. voucher: the
    JSON file that says so, if not the file itself. mark: what a text that is no JSON says so by."""
    real = _target(path)
    if not os.path.exists(real):
        return
    if not real.is_file():
        what = "a folder" if real.is_dir() else "a pipe, a socket or a device"
        raise UserError(f"{path}: is {what}; give a file")
    if not (mark.encode() in real.read_bytes() if mark else stamp_of(voucher or real)):
        raise UserError(f"{path}: is there, and nothing says that mincai wrote it; {MEND}")


def check_rows(path) -> None:
    """The same for a JSONL file and its sidecar."""
    _target(path)
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{path}: is to hold rows; give a name that ends in .jsonl")
    check_file(path, sidecar(path))
    check_file(sidecar(path))


def check_beside(folder, *names) -> None:
    """The same for files in a run folder, the first of which, a JSON file, vouches for them all."""
    _target(folder)
    for name in names:
        check_file(Path(folder, name), Path(folder, names[0]))


def sidecar(path) -> Path:
    """Where the stamp of a JSONL file is kept: runs/x/pairs.jsonl -> runs/x/pairs.run.json."""
    return Path(path).with_suffix(".run.json")


def _target(path) -> Path:
    """Where this path leads, links followed. UserError if nothing could be written there."""
    text = os.fspath(path)
    if not text:
        raise UserError("--out is empty; say where to write")
    if text.startswith("~"):
        raise UserError(f"{text}: begins with ~, which only the shell expands; write the path out")
    real = Path(os.path.realpath(text))
    if os.path.lexists(text) and not os.path.exists(real):
        raise UserError(f"{text}: is a link that leads nowhere; mend it, or give another --out")
    above = next(path for path in (*real.parents, real) if os.path.exists(path))
    where = real if os.path.isdir(real) else above
    with writing(text):
        if not os.path.isdir(where):
            raise NotADirectoryError(0, f"{where} is a file")
        if not os.access(where, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(0, os.strerror(errno.EACCES))
        # a folder that is still to be made can have too long a name as well
        for name in real.relative_to(above).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(above / name)
    return real


# --- whose is it? ---------------------------------------------------------------------------------


def stamp_of(path):
    """The content of a JSON file that mincai wrote, a dict; None for any other, and for none."""
    try:
        found = json.loads(Path(path).read_bytes()) if os.path.isfile(path) else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "mincai" in found else None


def _listed(path, key="files"):
    """The names of files that a stamp lists, a set; none if there is no stamp, or one leads out."""
    names = (stamp_of(path) or {}).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return set()
    paths = [PurePosixPath(name) for name in names]
    outside = any(path.is_absolute() or ".." in path.parts for path in paths)
    return set() if outside else {str(path) for path in paths}


def _own(folder):
    """What mincai wrote in a checkpoint's folder, a set of names. A run that was stopped while it
    replaced one has left .partial to say so. A card that a person has changed is not ours."""
    own = _listed(folder / "run.json") | _listed(folder / ".partial" / LIST, "replaces")
    hashes = (stamp_of(folder / "run.json") or {}).get("sha256")
    made = hashes.get(CARD) if isinstance(hashes, dict) else None
    changed = made and (folder / CARD).is_file() and sha256(folder / CARD) != made
    return own - {CARD} if changed else own


def _left(work):
    """What mincai wrote in a folder that did not get its name, a set of names."""
    return _listed(work / LIST) or _listed(work / "run.json")


def temporaries(folder) -> set[str]:
    """Names of files that a killed run was writing here, see write_file."""
    return {path.name for path in Path(folder).glob(".*.tmp") if TEMPORARY.fullmatch(path.name)}


def _stranger(folder, name, own):
    """What stands in the place of this file or a folder above it and is not mincai's; or None."""
    for step in [*_inner([name]), name]:
        path = folder / step
        expected = name in own and path.is_file() if step == name else path.is_dir()
        if os.path.lexists(path) and (path.is_symlink() or not expected):
            return path
    return None


def is_foreign(folder, name) -> bool:
    """Whether a checkpoint's folder has something of this name that mincai did not write so."""
    real = Path(os.path.realpath(folder))
    return _stranger(real, name, _own(real)) is not None


def _inner(names):
    """The folders on the way to these files, sorted: each after the one that holds it."""
    return sorted({str(p) for name in names for p in PurePosixPath(name).parents if p.name})


def _refuse_strangers(folder, names, own, mend):
    for name in sorted(names):
        if path := _stranger(folder, name, own):
            raise UserError(f"{path}: {IN_THE_WAY}; {mend}")


# --- writing --------------------------------------------------------------------------------------


def sha256(path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def write_file(path, texts, before=None) -> None:
    """Strings to a file, whole or not at all: under another name first, then flushed to the disk.
    Replaces a file that is there: whether it may is what check_file answers. A link is followed.
    before: called when all is on the disk, before the file gets its name."""
    real = Path(os.path.realpath(path))
    # nobody else's, and short enough; by its beginning the next one finds what a killed one has left
    name = hashlib.sha256(os.fsencode(real.name)).hexdigest()[:16]
    temporary = real.with_name(f".{name}.{uuid.uuid4().hex[:16]}.tmp")
    with writing(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        for left in real.parent.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            try:
                file.writelines(texts)
                file.flush()
                os.fsync(file.fileno())
                if before:
                    before()
                os.replace(temporary, real)
            except BaseException:  # Ctrl-C included
                temporary.unlink()
                raise
    flush(real.parent)


def write_json(path, obj):
    """One JSON document, indented for people; whole or not at all."""
    write_file(path, [json.dumps(obj, ensure_ascii=False, indent=2) + "\n"])


def flush(path):
    """A file's bytes, or a folder's names, to the disk, lest a power cut takes them back."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def partial(folder) -> Path:
    """Where a checkpoint is put together: inside a folder that is there, else beside its place."""
    real = Path(os.path.realpath(folder))
    return real / ".partial" if real.is_dir() else real.with_name(f"{real.name}.partial")


def begin(folder, names) -> Path:
    """A folder to put these files in until `finish`. What a stopped run has left there goes."""
    check_folder(folder, names)
    work = partial(folder)
    with writing(work):
        if work.is_dir():
            _remove(work, _left(work) | temporaries(work))
        work.mkdir(parents=True, exist_ok=True)
    with _discarded(work):
        _write_list(work, names, _own(Path(os.path.realpath(folder))))
    return work


@contextlib.contextmanager
def _discarded(work):
    """What `begin` started goes again where it cannot be written: the disk may be full."""
    try:
        yield
    except UserError:
        with contextlib.suppress(OSError):
            _remove(work, _left(work) | {LIST})
        raise


def fill(work, files: dict, write=lambda work: None) -> None:
    """Write {name: bytes or str}, and what `write` does, where `begin` says; all or nothing."""
    with _discarded(work), writing(work):
        write(work)
        for name, content in files.items():
            content = content.encode("utf-8") if isinstance(content, str) else content
            (work / name).write_bytes(content)


def finish(work, folder, stamp: dict) -> None:
    """Give what `begin` started the folder's name, with the stamp as run.json. UserError if that
    cannot be: the checkpoint is then in `work`, and the message says so.

    A folder that was not there appears whole. In one that was, the older files that have no
    successor go, and the new ones take their names, config.json and run.json last: without these
    two nothing loads the folder or takes it for done, and the same command ends a stopped run.
    """
    real = Path(os.path.realpath(folder))
    names = {name for name in _left(work) if (work / name).is_file()} | {"run.json"}
    made = sorted(names - {"run.json"})
    for name in made:
        flush(work / name)
    stamp = {"mincai": mincai.__version__, **stamp, "files": sorted(names)}
    stamp["sha256"] = {name: sha256(work / name) for name in made}
    with _discarded(work):
        write_json(work / "run.json", stamp)
    with writing(folder, f"what it lacks is in {work}"):
        if not os.path.lexists(real):
            (work / LIST).unlink()
            work.rename(real)
            flush(real.parent)
            return
        own = _own(real)
        _refuse_strangers(real, names, own, f"the checkpoint is in {work}")
        _write_list(work, names, names | own)
        _remove(real, {"run.json"})
        _remove(real, own - names | {"config.json"})
        for some in (names - {"config.json", "run.json"}, names & {"config.json"}, {"run.json"}):
            for name in sorted(some):
                (real / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(work / name, real / name)
            for inner in (*_inner(some), ""):
                flush(real / inner)
        _remove(work, names | {LIST})


def steady(folder, read):
    """What `read`, a function, gives of a checkpoint that may be replaced meanwhile: it waits for
    the milliseconds that this takes, and reads again if it has met files of two checkpoints."""
    while True:
        before = _settled(folder)
        try:
            found = read()
            if _settled(folder) == before:
                return found
        except UserError:
            if _settled(folder) == before:
                raise


def _settled(folder):
    """What changes with the checkpoint in a folder, when none is on its way there: `finish` moves
    the new stamp last, long after the old one has gone. One that was stopped is not waited for."""
    stamp, until = Path(folder, "run.json"), time.time() + PATIENCE
    while True:
        try:
            found = os.stat(stamp)
            return found.st_ino, found.st_mtime_ns
        except OSError:
            if time.time() > until or not Path(folder, ".partial", "run.json").exists():
                return None
        time.sleep(0.005)


def clear(folder) -> None:
    """Remove the files that this folder's run.json lists, and those that one below it does."""
    if not _listed(Path(folder, "run.json")):
        raise UserError(f"{folder}: its run.json does not list what mincai wrote there; {MEND}")
    for path in sorted(Path(folder).rglob("run.json"), reverse=True):
        _remove(path.parent, _listed(path))


def _write_list(work, names, replaces):
    """replaces: what in the folder that this will be, or go into, mincai wrote."""
    listed = {"mincai": mincai.__version__, "files": sorted({*names, "run.json"})}
    listed["replaces"] = sorted(replaces)
    write_file(work / LIST, [json.dumps(listed, indent=2) + "\n"])


def _remove(folder, names):
    """These files of mincai's, and the folders that are empty without them. The lists go last: a
    folder that is half removed still says whose it is."""
    for name in sorted(names, key=lambda name: (name in ("run.json", LIST), name)):
        if not _stranger(folder, name, {name}):
            (folder / name).unlink(missing_ok=True)
    for inner in [*reversed(_inner(names)), ""]:
        with contextlib.suppress(OSError):  # it stays where it is not empty
            (folder / inner).rmdir()
