"""Whether two runs are the same to the bit: python tests/core/compare_runs.py runs/a runs/b

Compared are the evaluation's figures, the rows of every stage and the weights; not where and when
they were made, how long that took, and with what version.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

MADE = {
    "config",
    "seconds",
    "git",
    "torch",
    "device",
    "threads",
    "mincai",
    "files",
    "episodes_per_s",
}
MADE |= {"inputs", "sha256"}


def figures(value):
    """A JSON value without what says where, when and how it was made."""
    if isinstance(value, dict):
        return {key: figures(item) for key, item in value.items() if key not in MADE}
    return [figures(item) for item in value] if isinstance(value, list) else value


def content(path):
    if path.suffix == ".safetensors":
        found = {name: tensor.tolist() for name, tensor in load_file(path).items()}
        own = {name: found.pop(name) for name in [*found] if name.startswith("mincai.")}
        return found | {name.removeprefix("mincai."): value for name, value in own.items()}
    if path.suffix == ".jsonl":
        return [figures(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return figures(json.loads(path.read_text(encoding="utf-8")))


def compare(a, b) -> list[str]:
    """The files that differ, or that only one of the two runs has."""
    names = {p.relative_to(run) for run in (a, b) for p in Path(run).rglob("*") if p.is_file()}
    names = sorted(n for n in names if n.suffix in (".json", ".jsonl", ".safetensors"))
    both = [all(Path(run, name).is_file() for run in (a, b)) for name in names]
    return [
        str(name)
        for name, there in zip(names, both)
        if not there or content(Path(a, name)) != content(Path(b, name))
    ]


if __name__ == "__main__":
    found = compare(*map(Path, sys.argv[1:3]))
    print("\n".join(found) or "the same")
    sys.exit(bool(found))
