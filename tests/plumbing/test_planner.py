"""Examples stand in a prompt whole or not at all, nothing outgrows the model, the shipped ones have
the form."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mincai import UserError, constitution
from mincai.plumbing.planner import KINDS, Planner, load_shots, outside, warn_outside
from mincai.plumbing.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "english" / "fewshot.json"
PRINCIPLES = constitution.load_constitution()
BY_ID = {p.id: p for p in PRINCIPLES}
LETTERS = SimpleNamespace(
    encode=lambda text: list(map(ord, text))
)  # one token a letter: counted by eye


@pytest.fixture(params=["tiny", "gpt2"])
def tokenizer(request, tiny_base, tmp_path, monkeypatch):
    """The tiny vocabulary; and GPT-2's, if this machine has it without a download."""
    return load_tokenizer(tiny_base) if request.param == "tiny" else gpt2s(tmp_path, monkeypatch)


def gpt2s(tmp_path, monkeypatch):
    beside = ROOT.parent / "shared" / "gpt2-tokenizer"
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        if not beside.is_dir():
            pytest.skip("GPT-2's vocabulary is not on this machine")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(beside))
    return load_tokenizer(tmp_path)  # a folder without a vocabulary of its own


def talk(words):
    return constitution.dialogue(" ".join(["lamp"] * words) + " ?")


# --- what fits ------------------------------------------------------------------------------------------------


def test_examples_are_read_once_and_give_the_tokens_of_the_whole_text(tokenizer, monkeypatch):
    """Whatever the last example ends with, and the text begins with."""
    texts = ["Human: hi", "  two spaces", "\n\nlines", "'s", "x", "\u2028 wide", "!?", "7 7"]
    for end in (
        "a lamp .",
        "B)",
        "it's",
        "space ",
        "line\n",
        "tab\t",
        "\xa0",
        "\u2028",
        "9",
        "\x1c",
    ):
        planner, whole = Planner(tokenizer, 10**4, {"compare": ["first: 'll", end]}), []
        for text in texts:
            expected = tokenizer.encode(f"first: 'll\n\n{end}\n\n{text}")
            whole.append(planner.prompt("compare", text, 1) == expected)
        assert all(whole), (end, whole)
    planner = Planner(tokenizer, 10**4, {"compare": ["one", "two"]})
    read, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(text) or encode(text))
    for text in ("three", "four"):
        planner.prompt("compare", text, 1)
    planner.prompt("answer", "five", 1)
    assert read == ["three", "one\n\ntwo", "\n\nthree", "four", "\n\nfour", "five"]


def test_examples_go_in_whole_while_there_is_room():
    """The room is 60 - 20 - 15 = 25 letters, and an example costs its length and 3: 13 fit, 33 do
    not, then 8 do."""
    planner = Planner(LETTERS, 60, {"review": ["a" * 10, "b" * 30, "c" * 5]})
    text = "x" * 15
    assert (
        "".join(map(chr, planner.prompt("review", text, 20)))
        == "a" * 10 + "\n\n" + "c" * 5 + "\n\n" + text
    )
    assert planner.counts == {"prompts": 1, "examples": 2, "left out": 1}
    planner.prompt("review", text, 1)  # room for 44: 13 and 8, the middle one fits no more
    assert planner.counts == {"prompts": 2, "examples": 4, "left out": 2}
    assert planner.summary() == "2.0 examples a prompt (2 left out for want of room)"


@pytest.mark.parametrize("room, kept", [(33, 1), (32, 0)])
def test_the_last_token_of_the_room_is_used(room, kept):
    planner = Planner(LETTERS, 100 + room, {"answer": ["b" * 30]})
    planner.prompt("answer", "x" * 60, 40)
    assert planner.counts["examples"] == kept and planner.counts["left out"] == 1 - kept


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_ever_outgrows_the_model(tokenizer, kind):
    """Over texts of every length: what must fit fits, the text ends the prompt, examples stand in
    the file's order."""
    shots = load_shots(str(SHIPPED), PRINCIPLES)[kind]
    limit, max_new = 3 * max(len(tokenizer.encode(shot)) for shot in shots), 40
    planner, numbers = Planner(tokenizer, limit, {kind: shots}), set()
    for words in range(0, limit, 3):
        text = talk(words)
        alone, prompt = len(tokenizer.encode(text)), planner.prompt(kind, text, max_new)
        if prompt is None:
            assert alone + max_new > limit
            numbers.add(None)
            continue
        assert len(prompt) + max_new <= limit
        shown = tokenizer.decode(prompt).removesuffix(text).split("\n\n")
        assert shown.pop() == "" and tokenizer.decode(prompt).endswith(text)
        assert [shot for shot in shots if shot in shown] == shown  # whole, in order, none twice
        first = len(tokenizer.encode(shots[0] + "\n\n" + text)) + max_new
        assert shots[0] in shown or first >= limit  # at most one token is wasted
        numbers.add(len(shown))
    assert numbers >= {None, 0, 1, 2}
    assert (
        planner.counts["examples"] + planner.counts["left out"]
        == len(shots) * planner.counts["prompts"]
    )


def test_without_examples_the_prompt_is_the_text(tokenizer):
    texts = [talk(3), "Review:\nHuman: ü ?\nCritique:", "a  b \n", "Choice: ("]
    for planner in (
        Planner(tokenizer, 256),
        Planner(tokenizer, 256, {"answer": ["Human: a"], "compare": []}),
    ):
        for text in texts:
            for kind in ("review", "compare", "none"):
                assert planner.prompt(kind, text, 10) == tokenizer.encode(text)
        assert planner.counts == {"prompts": 12, "examples": 0}
    assert Planner(tokenizer, 256).summary() == ""


def test_a_text_without_room_is_given_up_and_counted(tokenizer):
    text = talk(20)
    planner = Planner(tokenizer, len(tokenizer.encode(text)) + 9)
    assert planner.prompt("answer", text, 9) == tokenizer.encode(text)  # to the last token
    assert (
        planner.prompt("answer", text, 10) is None and planner.prompt("answer", talk(99), 9) is None
    )
    assert planner.counts == {"prompts": 1, "examples": 0, "no room": 2}
    assert planner.summary() == f"2 texts did not fit the model's {planner.limit} tokens"


# --- the file of examples ---------------------------------------------------------------------------------------

FILE = {
    "answer": [{"human": "why ?", "assistant": "because ."}],
    "review": [
        {
            "human": "how ?",
            "answer": "so .",
            "principle_id": "theft-4",
            "critique": "it breaks it .",
            "revision": "sorry .",
        }
    ],
    "compare": [
        {
            "human": "who ?",
            "a": "he .",
            "b": "she .",
            "principle_id": "help-5",
            "reasons": "b is right .",
            "choice": "B",
        }
    ],
}


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "some.json"
        path.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
        return str(path)

    return write


def test_an_example_is_what_the_model_is_prompted_with_and_what_it_should_write(file):
    theft, fair = BY_ID["theft-4"], BY_ID["help-5"]
    shots = load_shots(file(FILE), PRINCIPLES)
    assert shots == {
        "answer": ["Human: why ?\nAssistant: because ."],
        "review": [
            f"Review:\nHuman: how ?\nAssistant: so .\n"
            f"Principle: {theft.text} {theft.critique}\nCritique: it breaks it .\n"
            f"Request: {theft.revision}\nRevision: sorry ."
        ],
        "compare": [
            f"Compare:\nHuman: who ?\n(A): he .\n(B): she .\n"
            f"Principle: {fair.text} {fair.compare}\nReasons: b is right .\nChoice: (B)"
        ],
    }


def test_examples_have_the_form_of_the_prompts(file):
    shots = load_shots(file(FILE), PRINCIPLES)
    theft, fair = BY_ID["theft-4"], BY_ID["help-5"]
    review = constitution.review(
        constitution.dialogue("how ?"), "so .", theft.asks("critique", full=True)
    )
    asked = constitution.revision(review, "it breaks it .", theft.revision)
    assert shots["review"] == [asked + " sorry ."] and shots["review"][0].startswith(
        review + " it breaks it .\n"
    )
    compare = constitution.compare(
        constitution.dialogue("who ?"), "he .", "she .", fair.asks("compare", full=True)
    )
    assert shots["compare"] == [constitution.choice(compare, "b is right .") + "B)"]
    assert shots["compare"][0].startswith(constitution.reasons(compare) + " ")
    assert load_shots(file(FILE), PRINCIPLES, reasons=False) == {
        **shots,
        "compare": [constitution.choice(compare, None) + "B)"],
    }


def test_no_file_is_no_example():
    assert load_shots("", PRINCIPLES) == {}


def without(kind, key):
    return {**FILE, kind: [{k: v for k, v in FILE[kind][0].items() if k != key}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        {**FILE, "review": None},
        {**FILE, "answer": ["why ?"]},
        {**FILE, "compare": [{**FILE["compare"][0], "principle_id": "theft-99"}]},
        {**FILE, "answer": [{"human": "why ?"}]},
        *(without("review", key) for key in FILE["review"][0]),
        *(without("compare", key) for key in FILE["compare"][0]),
    ],
)
def test_what_is_no_file_of_examples_is_said(file, content):
    with pytest.raises(UserError, match="some.json: not a file of examples"):
        load_shots(file(content), PRINCIPLES)


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(UserError, match="none.json: no such file"):
        load_shots(str(tmp_path / "none.json"), PRINCIPLES)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes.json"):
        load_shots(str(tmp_path / "bytes.json"), PRINCIPLES)


def test_a_folder_is_no_file_of_examples(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        load_shots(str(tmp_path), PRINCIPLES)


# --- as shipped -------------------------------------------------------------------------------------------------


def test_the_shipped_examples_are_of_training_principles_and_each_on_its_lines():
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert list(shipped) == list(KINDS)
    for x in shipped["review"] + shipped["compare"]:
        assert (
            BY_ID[x["principle_id"]].split == "train"
            and x["principle"] == BY_ID[x["principle_id"]].text
        )
    for x in (
        x for some in shipped.values() for x in some
    ):  # a line's end is where the model stops
        assert all(
            isinstance(text, str) and text == text.strip() != "" and "\n" not in text
            for text in x.values()
        )
    letters = [x["choice"] for x in shipped["compare"]]
    assert (
        letters.count("A") == letters.count("B") == len(letters) / 2
    )  # else the judge would learn a slot
    assert set(letters[:3]) == {"A", "B"}  # the three that fit everywhere
    assert all(x["reasons"].endswith(f"({x['choice']}).") for x in shipped["compare"])


def test_the_shipped_examples_fit_beside_a_long_text(tmp_path, monkeypatch):
    tokenizer = gpt2s(tmp_path, monkeypatch)
    shots = load_shots(str(SHIPPED), PRINCIPLES)
    assert all(len(shots[kind]) >= 10 for kind in KINDS)
    text = "word" + " word" * 249
    assert len(tokenizer.encode(text)) == 250
    for kind, least in (("answer", 5), ("review", 2), ("compare", 3)):
        planner = Planner(tokenizer, 1024, shots)
        planner.prompt(kind, text, 120)
        assert planner.counts["examples"] >= least, kind


# --- principles that a model of few words does not know -------------------------------------------


def own(text):
    return constitution.Principle("own-1", text, text)


def test_principles_outside_what_the_tiny_model_knows_are_named(tiny_base, capsys):
    """It has read every word of "be kind .", but of no principle that says so."""
    knows = load_tokenizer(tiny_base)
    assert not any(outside(p, knows) for p in PRINCIPLES)
    assert not knows.unread("be kind .")
    some = [own("be kind ."), own("no theft ."), own("never spy on people .")]
    assert [outside(p, knows) for p in some] == [True, False, True]
    warn_outside(some, knows, "some/model")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "'be kind .'" in told and "'never spy on people .'" in told
    assert told.startswith("warning: 2 of 3 principles are outside what some/model knows: ")
    assert "theft" in told and "some/model/words.txt" in told
    warn_outside(PRINCIPLES, knows, "some/model")
    knows.words = None  # a model that has read English
    warn_outside(some, knows, "some/model")
    assert capsys.readouterr().err == ""
