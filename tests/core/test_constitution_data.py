"""Checks on data/constitution.json: size, matrix of targets and sources, splits and tiny forms."""

import json
from collections import Counter
from pathlib import Path

import pytest

CATEGORIES = [
    "violence",
    "sabotage",
    "recklessness",
    "intrusion",
    "fraud",
    "theft",
    "spying",
    "hate",
    "slander",
    "rumour",
    "quackery",
    "neglect",
]
ROWS = {**{c: 4 for c in CATEGORIES}, "harm": 8, "help": 6, "truth": 5, "reasons": 5, "conduct": 3}
COLUMNS = {
    "human rights": 12,
    "platform terms": 7,
    "dialogue rules": 11,
    "cross-cultural": 5,
    "general harmlessness": 12,
    "AI conduct": 8,
    "public input": 6,
    "helpful and honest": 14,
}
# Sources of each target, as the digits of S1..S8 in the order of COLUMNS.
MATRIX = {
    "violence": "1358",
    "sabotage": "1256",
    "recklessness": "1358",
    "intrusion": "2568",
    "fraud": "1258",
    "theft": "1258",
    "spying": "1237",
    "hate": "1134",
    "slander": "1345",
    "rumour": "1237",
    "quackery": "3338",
    "neglect": "1245",
    "harm": "14455566",
    "help": "778888",
    "truth": "36788",
    "reasons": "35788",
    "conduct": "666",
}
HELD = {**{c: 1 for c in CATEGORIES}, "harm": 2, "help": 2, "truth": 1, "reasons": 1, "conduct": 1}
ABOUT = set(CATEGORIES) | {"harm", "help", "truth", "reasons"}
KEYS = [
    "id",
    "source",
    "target",
    "topic",
    "polarity",
    "scope",
    "split",
    "weight",
    "text",
    "critique",
    "revision",
    "compare",
    "tiny",
    "about",
]
PLAIN_WORDS = set(
    "never avoid refuse stay clear of choose the answer that is free from keeps away a good does not "
    "lead to any people may be safe always want more least most with for in and it we value seek "
    "prefer best gives right open plain kind say says fair care against protect all no us you your "
    "our must should first rule : , .".split()
)


@pytest.fixture(scope="module")
def principles():
    path = Path(__file__).resolve().parents[2] / "data" / "constitution.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["version"] == 1
    return data["principles"]


def test_size_and_uniqueness(principles):
    assert len(principles) == 75
    for key in ("id", "topic", "text", "critique", "revision", "compare", "tiny"):
        assert len({p[key] for p in principles}) == 75, key


def test_matrix(principles):
    assert Counter(p["target"] for p in principles) == ROWS
    assert Counter(p["source"] for p in principles) == COLUMNS
    digit = {source: str(i) for i, source in enumerate(COLUMNS, 1)}
    for target, want in MATRIX.items():
        got = sorted(digit[p["source"]] for p in principles if p["target"] == target)
        assert "".join(got) == want, target


def test_held_split(principles):
    assert {p["split"] for p in principles} == {"train", "held"}
    held = Counter(p["target"] for p in principles if p["split"] == "held")
    assert held == HELD and sum(held.values()) == 19


def test_fields(principles):
    for p in principles:
        assert list(p) == KEYS, p["id"]
        assert p["weight"] == 1.0
        assert all(isinstance(p[k], str) and p[k].strip() for k in KEYS if k != "weight"), p["id"]
        assert p["id"].rsplit("-", 1)[0] == p["target"]
        assert p["polarity"] in {"avoid", "promote"}
        assert p["scope"] in {"content", "manner", "honesty", "helpfulness"}
        assert 2 <= len(p["topic"].split()) <= 5, p["topic"]
        assert p["compare"].startswith(("Choose the answer that ", "Which answer ")), p["id"]


def test_tiny_forms(principles):
    for p in principles:
        words = p["tiny"].split()
        assert [w for w in words if w in ABOUT] == [p["about"]], p["tiny"]
        assert words[-1] == "." and len(words) <= 10, p["tiny"]
        assert set(words) - {p["about"]} <= PLAIN_WORDS, p["tiny"]
        if p["target"] != "conduct":
            assert p["about"] == p["target"]
    conduct = Counter(p["about"] for p in principles if p["target"] == "conduct")
    assert conduct == {"harm": 2, "truth": 1}
