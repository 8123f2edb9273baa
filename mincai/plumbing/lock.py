"""One run at a time for one output: the second is refused before it works.

A lock is a hidden file beside the output that its process has locked: the system takes the lock
back when the process ends, however it ends. The file goes with it; a run that was killed leaves
one, which the next run of this output takes over and removes. Processes that are forked meanwhile
do not hold it (POSIX record locks are not inherited), so none can outlive its run.
"""

import contextlib
import errno
import os
import stat
import weakref
from pathlib import Path

from mincai import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs of one output go unnoticed there
    fcntl = None

INSIDE = ".lock"  # of a folder beside which nothing may be written
SIGN = b"mincai, process "
_held: dict[Path, list] = {}  # place -> [how often, descriptor, folders made for it]


class Held:
    """Nobody else writes to this path until release() is called, this object is gone, or the
    process. One process may hold a path several times: the loop does, and its stages."""

    def __init__(self, path):
        place = _place(path)
        if place not in _held:
            _held[place] = [0, *_take(place, path)]
        _held[place][0] += 1
        self.release = weakref.finalize(self, _leave, place, os.getpid())


@contextlib.contextmanager
def alone(*paths):
    """Holds all of these paths, or none."""
    held = []
    try:
        held += map(Held, paths)  # those before one that is refused are in the list
        yield
    finally:
        for one in reversed(held):
            one.release()


def _place(path):
    """Where the lock of an output lies, the same before the output is there and after."""
    real = Path(os.path.realpath(path))
    beside = not os.path.isdir(real) or os.access(real.parent, os.W_OK)
    return real.with_name(f".{real.name}{INSIDE}") if beside and real.name else real / INSIDE


def _take(place, path):
    """(the descriptor, locked; folders that were made for it)."""
    if not fcntl:
        return None, []
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        while True:
            number = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                if _lock(number, place, path):
                    return number, made
            except BaseException:
                os.close(number)
                raise
            os.close(number)
    except OSError as error:
        _remove(made)
        told = f"{place}: cannot be written ({error.strerror}); give another --out"
        raise UserError(told) from None


def _lock(number, place, path):
    """False if the file lost its name to a run that ended just now. UserError where another holds
    it, or where it is no lock."""
    told = os.read(number, 100)
    if not stat.S_ISREG(os.fstat(number).st_mode) or not told.startswith(SIGN[: len(told)]):
        told = "is in the way, and mincai did not write it; move it away, or give another --out"
        raise UserError(f"{place}: {told}")
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            who = told.removeprefix(SIGN).decode(errors="replace").strip()
            who = f"another run (process {who})" if who else "another run"
            advice = "wait for its end, or give another --out"
            raise UserError(f"{path}: {who} is writing it; {advice}") from None
        # else a file system without locks
    if not os.path.lexists(place) or not os.path.samestat(os.fstat(number), os.lstat(place)):
        return False
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, SIGN + b"%d\n" % os.getpid(), 0)
    except OSError:  # a full disk
        place.unlink()
        raise
    return True


def _leave(place, process):
    if process != os.getpid():  # a forked process, which holds nothing
        return
    held = _held[place]
    held[0] -= 1
    if not held[0]:
        del _held[place]
        _, number, made = held
        if number is not None:
            with contextlib.suppress(OSError):  # its folder may have been moved away
                if os.path.samestat(os.fstat(number), os.lstat(place)):
                    place.unlink()  # before others can lock it
            os.close(number)
            _remove(made)


def _remove(made):
    """The folders that were made for a lock, where nothing has come into them."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()
