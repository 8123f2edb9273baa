"""mincai: Constitutional AI from scratch. Start at README.md, then read constitution.py."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that a person can mend: shown as one line on stderr, exit code 2."""
