"""mincai: Constitutional AI from scratch. Start at README.md, then read constitution.py."""

from pathlib import Path

__version__ = "0.1.0"
DATA = Path(__file__).resolve().parent.parent / "data"  # what is shipped, and weights once fetched


class UserError(Exception):
    """A mistake that a person can mend: shown as one line on stderr, exit code 2."""

    code = 2


class Diverged(UserError):
    """Numbers went wrong while a stage ran: what was there before it stays, exit code 1."""

    code = 1
