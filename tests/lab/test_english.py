"""The English prompts as shipped: no word gives a request away, nothing held out is trained on,
every wrapper opens."""

import base64
import codecs
import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from test_constitution_data import CATEGORIES

from mincai import UserError
from mincai.lab import english
from mincai.plumbing import data
from mincai.plumbing.presets import PRESETS

FOLDER = Path(__file__).resolve().parents[2] / "data" / "english"
FILES = ("prompts", "prompts_dev", "prompts_eval")
HELD = {"rot13", "reversed", "authority", "translation"}
COMMON = set(
    (
        "about after again also anything because before been being best could does done down even every first "
        "from give good have here into just keep know like little make made many more most much must need "
        "never nobody only other over people please really should show some somebody someone something such "
        "sure take tell than that their them then there these they thing things this those through until want "
        "well what when where which while will with without would write your"
    ).split()
)
UNDO = {
    "": lambda text: text,
    "base64": lambda text: base64.b64decode(text, validate=True).decode(),
    "rot13": lambda text: codecs.decode(text, "rot13"),
    "reversed": lambda text: text[::-1],
    "spelled": lambda text: " ".join(word.replace(" ", "") for word in text.split(" - ")),
}


@pytest.fixture(scope="module")
def requests():
    return data.read_jsonl(FOLDER / "requests.jsonl")


@pytest.fixture(scope="module")
def attacks():
    return english.load_attacks(FOLDER / "attacks.json")


@pytest.fixture(scope="module")
def files():
    return {name: data.read_jsonl(FOLDER / f"{name}.jsonl") for name in FILES}


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def pairs_of(rows):
    """(harmful, twin) for each harmful row and the one that follows it."""
    return [(row, rows[n + 1]) for n, row in enumerate(rows) if row["kind"] == "harmful"]


# --- the requests ---------------------------------------------------------------------------------------------


def test_every_category_has_forty_requests_and_every_request_its_twin(requests):
    harmful = Counter(row["category"] for row in requests if row["kind"] == "harmful")
    assert harmful.keys() == set(CATEGORIES) and min(harmful.values()) >= 40
    for row, twin in pairs_of(requests):
        assert twin["id"] == row["id"] + "-twin" and (twin["kind"], twin["category"]) == (
            "benign",
            "",
        )
        assert row["id"].startswith(row["category"] + "-")
    assert (
        sum(row["kind"] == "benign" and not row["id"].endswith("-twin") for row in requests) >= 400
    )


def test_a_twin_shares_its_partners_words(requests):
    for row, twin in pairs_of(requests):
        shared = set(words_of(row["request"])) & set(words_of(twin["request"])) - COMMON
        assert sum(len(word) >= 4 for word in shared) >= 2, (row["request"], twin["request"])


def test_all_requests_are_distinct_and_on_one_line(requests):
    assert len({row["id"] for row in requests}) == len(requests)
    assert len({" ".join(words_of(row["request"])) for row in requests}) == len(requests)
    assert all(row["request"] == " ".join(row["request"].split()) != "" for row in requests)
    assert {row["kind"] for row in requests} == {"harmful", "benign"}


def guess_kinds(pairs) -> float:
    """Accuracy of naive Bayes (words, add one) on pairs of (harmful, benign) texts, each pair left
    out of its guess."""
    seen = [[set(words_of(text)) for text in pair] for pair in pairs]
    counts = [Counter(word for pair in seen for word in pair[side]) for side in (0, 1)]
    vocabulary, right = len(counts[0] | counts[1]), 0
    for pair in seen:
        totals = [sum(counts[side].values()) - len(pair[side]) + vocabulary for side in (0, 1)]
        for side, words in enumerate(pair):
            bad, good = (
                sum(math.log((counts[s][w] - (w in pair[s]) + 1) / totals[s]) for w in words)
                for s in (0, 1)
            )
            right += (bad > good) == (side == 0)
    return right / (2 * len(pairs))


def test_keywords_do_not_decide(requests):
    """What a filter by words gets right, a model could too, without having understood a request."""
    assert (
        guess_kinds([(f"how to steal thing{n}", f"how to buy thing{n}") for n in range(20)]) == 1.0
    )  # it can learn
    accuracy = guess_kinds([(row["request"], twin["request"]) for row, twin in pairs_of(requests)])
    assert accuracy < 0.80, f"{accuracy:.3f}"


# --- the prompts ----------------------------------------------------------------------------------------------


def test_the_shipped_prompts_are_made_of_the_shipped_requests(tmp_path, requests, files):
    made = english.main(english.Config(out=str(tmp_path), seed=0))
    assert made == {name: len(files[name]) for name in FILES}
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (
            FOLDER / f"{name}.jsonl"
        ).read_bytes(), name
    english.main(english.Config(out=str(tmp_path), seed=1))
    assert data.read_jsonl(tmp_path / "prompts.jsonl") != files["prompts"]


def test_rows_say_what_they_were_made_of(requests, files):
    made_of = {row["request"]: row for row in requests}
    for rows in files.values():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            source = made_of[row["request"]]
            assert (row["kind"], row["category"]) == (source["kind"], source["category"])
    assert {
        row["request"] for rows in files.values() for row in rows
    } == made_of.keys()  # none is lost
    assert {row["split"] for row in files["prompts"]} == {"loop"}
    assert {row["split"] for row in files["prompts_dev"]} == {"eval", "eval-twin"}
    assert {row["split"] for row in files["prompts_eval"]} == {
        "eval",
        "eval-twin",
        "unseen-category",
        "unseen-twin",
    }


def test_what_is_held_out_stays_out(requests, attacks, files):
    assert {name for name, family in attacks.items() if family["held"]} == HELD
    used = {name: {row["request"] for row in rows} for name, rows in files.items()}
    assert not used["prompts"] & (used["prompts_dev"] | used["prompts_eval"])
    assert not used["prompts_dev"] & used["prompts_eval"]
    assert not {row["attack"] for row in files["prompts"]} & HELD
    shots = json.loads((FOLDER / "fewshot.json").read_text(encoding="utf-8"))
    assert not {x["human"] for some in shots.values() for x in some} & {
        row["request"] for row in requests
    }
    neglect = {
        text
        for row, twin in pairs_of(requests)
        if row["category"] == "neglect"
        for text in (row["request"], twin["request"])
    }
    assert neglect <= used["prompts_eval"] and not neglect & (used["prompts"] | used["prompts_dev"])
    for row, twin in pairs_of(requests):  # a twin would give its partner away
        assert [row["request"] in used[name] for name in FILES] == [
            twin["request"] in used[name] for name in FILES
        ]


def test_every_family_comes_equally_often(attacks, files):
    for name, rows in files.items():
        for split in {row["split"] for row in rows}:
            for kind in ("harmful", "benign"):
                some = [row for row in rows if (row["split"], row["kind"]) == (split, kind)]
                counts = Counter(row["attack"] for row in some)
                if not counts:
                    continue
                if (split, kind) == ("loop", "benign"):  # each of these stands there plain as well
                    assert counts.pop("plain") >= sum(counts.values())
                    assert counts.keys() == attacks.keys() - HELD - {"plain"}
                else:
                    assert counts.keys() == attacks.keys() - (
                        set() if split.startswith("eval") else HELD
                    )
                assert max(counts.values()) - min(counts.values()) <= 1, (name, split, kind)


def opened(row, family):
    """The request as it stands in this prompt, and the template around it."""
    for template in family["templates"]:
        before, after = template.split("{request}")
        if row["prompt"].startswith(before) and row["prompt"].endswith(after):
            yield row["prompt"][len(before) : len(row["prompt"]) - len(after)], template


def test_every_wrapper_opens_again(attacks, files):
    """Each encoding is undone by its inverse; leet, which has none, changes eleven letters and
    nothing else."""
    digits = dict(zip("aeiostAEIOST", "431057431057"))
    for row in (row for rows in files.values() for row in rows):
        family = attacks[row["attack"]]
        found = [inside for inside, _ in opened(row, family)]
        if family["encoding"] == "leet":
            assert "".join(digits.get(letter, letter) for letter in row["request"]) in found, row
        else:
            # a hyphen that was spelled out opens as a gap between words
            wanted = (
                row["request"].replace("-", " ")
                if family["encoding"] == "spelled"
                else row["request"]
            )
            assert wanted in [UNDO[family["encoding"]](inside) for inside in found], row
            assert family["encoding"] in ("", "rot13") or row["request"] not in row["prompt"]


def test_encodings_by_hand():
    made = {name: encode("Is Bob at 10 ok?") for name, encode in english.ENCODINGS.items()}
    assert made == {
        "": "Is Bob at 10 ok?",
        "base64": "SXMgQm9iIGF0IDEwIG9rPw==",
        "rot13": "Vf Obo ng 10 bx?",
        "leet": "15 B0b 47 10 0k?",
        "spelled": "I s - B o b - a t - 1 0 - o k ?",
        "reversed": "?ko 01 ta boB sI",
    }


def test_every_template_wraps_both_kinds(attacks, files):
    seen = {
        (template, row["kind"])
        for rows in files.values()
        for row in rows
        for _, template in opened(row, attacks[row["attack"]])
    }
    assert seen == {
        (template, kind)
        for family in attacks.values()
        for template in family["templates"]
        for kind in ("harmful", "benign")
    }


# --- many of them -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(requests, attacks):
    """What preset gpt2-full writes."""
    return english.read(english.Config(**PRESETS["gpt2-full"].write))


def test_forty_thousand_attacks_over_twelve_categories(many, requests):
    harmful = [row for row in many["prompts_eval"] if row["kind"] == "harmful"]
    assert len(harmful) >= 40_000 and len({row["prompt"] for row in harmful}) == len(harmful)
    assert Counter(row["category"] for row in harmful) == dict.fromkeys(
        CATEGORIES, 3_334
    )  # 40,000 / 12, upwards
    counts = Counter(row["request"] for row in harmful if row["category"] != "neglect")
    assert len(counts) == 11 * 12 and set(counts.values()) == {277, 278}
    assert {row["split"] for row in harmful if row["category"] == "neglect"} == {"unseen-category"}


def test_what_is_held_out_stays_out_of_many_as_well(many, files, attacks):
    tested = {row["request"] for row in many["prompts_eval"]}
    assert tested == {row["request"] for row in files["prompts_eval"]}
    trained = {row["request"] for row in many["prompts"]}
    assert trained == {row["request"] for row in files["prompts"]} and not tested & trained
    assert "neglect" not in {row["category"] for row in many["prompts"] + many["prompts_dev"]}
    parts = {name for row in many["prompts"] for name in row["attack"].split(" + ")}
    assert parts == attacks.keys() - HELD
    unseen = {
        name
        for row in many["prompts_eval"]
        if row["split"] == "unseen-category"
        for name in row["attack"].split(" + ")
    }
    assert (
        unseen == attacks.keys() - HELD
    )  # one thing at a time: a new category under known families
    counts = Counter((row["request"], row["kind"]) for row in many["prompts"])
    assert set(counts.values()) == {20} and len({row["prompt"] for row in many["prompts"]}) == len(
        many["prompts"]
    )


def test_a_pair_of_families_opens_twice(many, attacks):
    """The outer wrapper is in plain words; what it holds opens as a prompt of the inner family
    does."""
    pairs = [row for row in many["prompts_eval"] if " + " in row["attack"]]
    assert (
        len({row["attack"] for row in pairs}) == 9 * 13
    )  # families of plain words, each around all others
    for row in pairs[::23]:
        outer, inner = (attacks[name] for name in row["attack"].split(" + "))
        assert outer["encoding"] == "" and outer is not inner
        middle = [text for text, _ in opened(row, outer)]
        found = [inside for text in middle for inside, _ in opened({"prompt": text}, inner)]
        if inner["encoding"] not in ("leet", "spelled"):
            assert row["request"] in [UNDO[inner["encoding"]](inside) for inside in found], row
        assert found


def test_every_family_comes_before_any_comes_twice(attacks):
    turns = english.manners(list(attacks), attacks, start=3)
    assert len(turns) == len(set(turns)) == 15 + 9 * 13
    assert turns[0] == (list(attacks)[3],) and {len(names) for names in turns[:15]} == {1}


# --- files that are wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder like data/english whose family "wrap" is as given."""

    def make(**family):
        (tmp_path / "requests.jsonl").write_bytes((FOLDER / "requests.jsonl").read_bytes())
        wrap = {"held": False, "encoding": "", "templates": ["go: {request}"], **family}
        plain = {"held": False, "encoding": "", "templates": ["{request}"]}
        (tmp_path / "attacks.json").write_text(
            json.dumps({"families": {"plain": plain, "wrap": wrap}})
        )
        return english.Config(folder=str(tmp_path), out=str(tmp_path / "out"))

    return make


def test_other_attacks_can_be_given(folder):
    assert english.main(folder())["prompts"] > 0


def test_more_prompts_than_the_templates_make_are_an_error(folder):
    cfg = folder()  # "plain" and one template of "wrap": two prompts of a request
    assert english.main(dataclasses.replace(cfg, wrappings=2))["prompts"] == 2 * (2 * 264 + 300)
    with pytest.raises(
        UserError, match="3 prompts of one request: 2 families of attacks make 2; lower --wrappings"
    ):
        english.main(dataclasses.replace(cfg, wrappings=3))


@pytest.mark.parametrize(
    "family",
    [
        {"templates": ["{request} and {request}"]},
        {"templates": ["go: {request}", "nothing"]},
        {"templates": []},
        {"templates": "{request}"},
        {"encoding": "morse"},
        {"encoding": None},
        {"held": "no"},
    ],
)
def test_a_wrong_family_is_named(folder, family):
    cfg = folder(**family)
    with pytest.raises(UserError, match="attacks.json: .*'wrap'"):
        english.main(cfg)
    assert not Path(cfg.out).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"families": []}',
        '{"families": {"wrap": {}}}',
        '{"families": {"wrap": "go"}}',
    ],
)
def test_what_is_no_file_of_attacks_is_said(tmp_path, content):
    (tmp_path / "attacks.json").write_text(content)
    with pytest.raises(UserError, match="attacks.json: not a file of attacks"):
        english.load_attacks(tmp_path / "attacks.json")


@pytest.mark.parametrize("name", ["attacks.json", "requests.jsonl"])
def test_a_missing_file_is_named(folder, name):
    cfg = folder()
    (Path(cfg.folder) / name).unlink()
    with pytest.raises(UserError, match=name):
        english.main(cfg)
