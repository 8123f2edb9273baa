"""The README keeps its length and tells the truth about files: their line counts, and that commands
exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVENING = re.findall(r"^\d+\. `([\w/.]+)` \((\d+)", README, re.MULTILINE)


def lines_of(path):
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_it_is_short_and_narrow():
    assert len(README.split()) <= 1500
    assert [line for line in README.splitlines() if len(line) > 100] == []


def test_the_evening_is_ten_files_of_the_length_it_says():
    assert len(EVENING) == 10 and all(lines_of(path) == int(count) for path, count in EVENING), {
        path: lines_of(path) for path, _ in EVENING
    }
    assert sum(lines_of(path) for path, _ in EVENING) <= 2700


def test_files_and_modules_that_are_named_are_there():
    documents = [README, *(p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md"))]
    for text in documents:
        for module in re.findall(r"python -m\s+mincai\.([\w.]+)", text):
            assert (
                (ROOT / "mincai" / Path(*module.rstrip(".").split(".")))
                .with_suffix(".py")
                .is_file()
            ), module
        for path in re.findall(
            r"\b((?:mincai|tests|data|docs)/[\w/]+\.(?:py|md|jsonl|json)\b)", text
        ):
            assert (ROOT / path).is_file(), path
