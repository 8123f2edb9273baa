"""mincai: Constitutional AI from scratch. Start at README.md, then read constitution.py."""

import sys
from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = (PACKAGE.parent / "train_sft.py").is_file()  # else installed: all lies in the package
# What is shipped, and weights once fetched
DATA = PACKAGE.parent / "data" if CHECKOUT else PACKAGE / "data"
SCRIPTS = PACKAGE.parent if CHECKOUT else PACKAGE / "scripts"  # the three training scripts
if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))


def shipped(name: str) -> str:
    """Where a shipped file or folder lies, as a flag's default: short in a checkout."""
    return f"data/{name}" if CHECKOUT else str(DATA / name)


class UserError(Exception):
    """A mistake that a person can mend: shown as one line on stderr, exit code 2."""

    code = 2

    def __init__(self, told):
        super().__init__(" ".join(str(told).splitlines()))  # a file's own words may be several


class Diverged(UserError):
    """Numbers went wrong while a stage ran: what was there before it stays, exit code 1."""

    code = 1
