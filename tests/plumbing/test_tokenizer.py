"""The vocabulary: every text survives, nothing typed ends an answer, the file gives back what was learnt."""

import base64
import os
import random
from pathlib import Path

import pytest
import tiktoken

from mincai import UserError
from mincai.plumbing.tokenizer import END, FILE, from_ranks, load_tokenizer, train_bpe

TEXTS = ["", " ", "\n", "a  b\n\n c ", "how do i burn a lamp ?", "don't , we've",
         "naïve 日本語 🙂👩\u200d🚀", "\x00\x7f\ufeff", END, f"a{END}{END} b"]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2's own vocabulary, if this machine has it without a download."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "gpt2-tokenizer"
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        if not beside.is_dir():
            pytest.skip("GPT-2's vocabulary is not on this machine")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(beside))
    return load_tokenizer(tmp_path)  # a folder without a vocabulary of its own


def test_every_text_survives(tokenizer):
    rng = random.Random(0)
    random_texts = ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xE000, 0x20000))))
                            for _ in range(40)) for _ in range(50)]
    for text in TEXTS + random_texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_text_never_gives_end_of_text(tokenizer):
    for text in TEXTS:
        assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.eot == tokenizer.n_vocab - 1 and len(tokenizer.encode(END)) > 1


def test_end_of_text_is_not_decoded(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a lamp"), tokenizer.eot]) == "a lamp"
    assert tokenizer.decode([tokenizer.newline]) == "\n"


def test_the_file_gives_back_the_vocabulary(tokenizer, tmp_path):
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    same = again.ranks == tokenizer.ranks
    assert same and (again.eot, again.newline) == (tokenizer.eot, tokenizer.newline)
    assert again.encode("you want to burn a lamp .") == tokenizer.encode("you want to burn a lamp .")


def test_words_come_along_and_others_are_unread(tokenizer, tmp_path):
    ours = from_ranks(tokenizer.ranks, {"how", "do", "i", "burn", "a", "lamp", "?"})
    assert ours.unread("how do i burn a lamp?") == []
    assert ours.unread("how do I heat a 3 day old lamp , how do I ?") == [
        "I", "heat", "3", "day", "old", ","]
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "words.txt").read_text() == "?\na\nburn\ndo\nhow\ni\nlamp\n"
    assert load_tokenizer(tmp_path).words == ours.words
    (tmp_path / "words.txt").unlink()  # a vocabulary of somebody's own: nobody knows what is unread
    assert load_tokenizer(tmp_path).words is None
    assert load_tokenizer(tmp_path).unread("anything !") == []


@pytest.mark.parametrize("line", [b"QQ==", b"QQ== x", b"QQ 5", b"??? 5", b"QQ== 5 6", b"\xff\xfe 5"])
def test_a_broken_line_is_named(tokenizer, tmp_path, line):
    lines = tokenizer.files()[FILE].splitlines()
    lines[2] = line
    (tmp_path / FILE).write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 3"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("number, line", [(65, b"QUI= 65"), (300, b"QUJD 9999")])
def test_missing_bytes_and_gaps_are_refused(tokenizer, tmp_path, number, line):
    """A single byte is replaced by two bytes under the same rank; a rank is left out."""
    lines = tokenizer.files()[FILE].splitlines()
    lines[number] = line
    (tmp_path / FILE).write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="256"):
        load_tokenizer(tmp_path)


def test_training_merges_the_most_frequent_pair_first():
    """Chunks: "ab", 2 x " ab", " cd". a+b occurs 3 times, then " "+ab twice; of the two pairs left, once
    each, the greater bytes go first: c+d, then " "+cd. After that nothing is left to merge."""
    ranks = train_bpe(["ab ab ab cd"], 1000)
    assert list(ranks)[256:] == [b"ab", b" ab", b"cd", b" cd"] and list(ranks.values()) == list(range(260))
    assert from_ranks(ranks).encode("ab cd ab") == [256, 259, 257]
    assert len(train_bpe(["ab ab ab cd"], 258)) == 258


def test_training_is_deterministic():
    texts = ["how do i burn a lamp ?", "tell me how to sell a map .", "do not say sorry ."]
    first = train_bpe(texts, 290)
    assert list(train_bpe(reversed(texts), 290)) == list(first)  # nor does the order of documents count


def test_gpt2s_vocabulary_is_read(gpt2):
    assert (gpt2.n_vocab, gpt2.eot, gpt2.newline) == (50257, 50256, 198) and gpt2.files() == {}
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]


def test_texts_are_cut_into_chunks_as_gpt2_does(gpt2):
    """Our own splitting pattern with GPT-2's ranks gives the ids of tiktoken's gpt2."""
    ours, theirs = from_ranks(gpt2.encoding._mergeable_ranks), tiktoken.get_encoding("gpt2")
    for text in TEXTS + ["I'll say it's 12,345 -- we'd 've\t\n\n  ok", "   three  spaces   "]:
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_gpt2_out_of_reach_is_said(tmp_path, monkeypatch):
    def refuse(name):
        raise OSError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer(tmp_path)
    (tmp_path / FILE).write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    assert load_tokenizer(tmp_path).n_vocab == 257


def test_a_missing_folder_is_said_and_nothing_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("fetched"))
    with pytest.raises(UserError, match="nothing: no such folder"):
        load_tokenizer(tmp_path / "nothing")
