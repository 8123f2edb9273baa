"""The vocabulary: every text survives, nothing typed ends an answer, the file gives back what was
learnt."""

import base64
import hashlib
import inspect
import json
import os
import random
import re
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch

from mincai import UserError
from mincai.model import GPT, GPTConfig
from mincai.plumbing import bpe_files, checkpoint, data
from mincai.plumbing.tokenizer import (
    CACHED,
    END,
    FILE,
    GPT2_TOKENS,
    Tokenizer,
    from_ranks,
    load_tokenizer,
    tokens_in,
    train_bpe,
)
from mincai.plumbing.weights import common_tokenizer
from mincai.sample import generate

TEXTS = [
    "",
    " ",
    "\n",
    "a  b\n\n c ",
    "how do i burn a lamp ?",
    "don't , we've",
    "naïve 日本語 🙂👩\u200d🚀",
    "\x00\x7f\ufeff",
    END,
    f"a{END}{END} b",
]


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
    random_texts = [
        "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xE000, 0x20000))))
            for _ in range(40)
        )
        for _ in range(50)
    ]
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
    assert again.encode("you want to burn a lamp .") == tokenizer.encode(
        "you want to burn a lamp ."
    )


def test_words_come_along_and_others_are_unread(tokenizer, tmp_path):
    ours = from_ranks(tokenizer.ranks, {"how", "do", "i", "burn", "a", "lamp", "?"})
    assert ours.unread("how do i burn a lamp?") == []
    assert ours.unread("how do I heat a 3 day old lamp , how do I ?") == [
        "I",
        "heat",
        "3",
        "day",
        "old",
        ",",
    ]
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "words.txt").read_text() == "?\na\nburn\ndo\nhow\ni\nlamp\n"
    assert load_tokenizer(tmp_path).words == ours.words
    (tmp_path / "words.txt").unlink()  # a vocabulary of somebody's own: nobody knows what is unread
    assert load_tokenizer(tmp_path).words is None
    assert load_tokenizer(tmp_path).unread("anything !") == []


@pytest.mark.parametrize(
    "line", [b"QQ==", b"QQ== x", b"QQ 5", b"??? 5", b"QQ== 5 6", b"\xff\xfe 5"]
)
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
    """Chunks: "ab", 2 x " ab", " cd". a+b occurs 3 times, then " "+ab twice; of the two pairs left,
    once each, the greater bytes go first: c+d, then " "+cd. After that nothing is left to merge."""
    ranks = train_bpe(["ab ab ab cd"], 1000)
    assert list(ranks)[256:] == [b"ab", b" ab", b"cd", b" cd"] and list(ranks.values()) == list(
        range(260)
    )
    assert from_ranks(ranks).encode("ab cd ab") == [256, 259, 257]
    assert len(train_bpe(["ab ab ab cd"], 258)) == 258


def test_training_is_deterministic():
    texts = ["how do i burn a lamp ?", "tell me how to sell a map .", "do not say sorry ."]
    first = train_bpe(texts, 290)
    assert list(train_bpe(reversed(texts), 290)) == list(
        first
    )  # nor does the order of documents count


def test_gpt2s_vocabulary_is_read(gpt2):
    assert (gpt2.n_vocab, gpt2.eot, gpt2.newline) == (50257, 50256, 198)
    assert gpt2.line_ends == {198, 628, 44320, 50256}  # "\n", "\n\n", and one before a wide space
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]


def test_texts_are_cut_into_chunks_as_gpt2_does(gpt2):
    """Our own splitting pattern with GPT-2's ranks gives the ids of tiktoken's gpt2."""
    ours, theirs = from_ranks(gpt2.ranks), tiktoken.get_encoding("gpt2")
    for text in TEXTS + ["I'll say it's 12,345 -- we'd 've\t\n\n  ok", "   three  spaces   "]:
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_gpt2_out_of_reach_is_said(tmp_path, monkeypatch):
    def refuse(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer(tmp_path)
    (tmp_path / FILE).write_bytes(
        b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    )
    assert load_tokenizer(tmp_path).n_vocab == 257


def test_what_tiktokens_cache_lacks_is_named(tmp_path, monkeypatch):
    """By the names that tiktoken looks for, whatever of them is there; it is asked for them here."""
    asked = []

    def read_file(address):
        asked.append(hashlib.sha1(address.encode()).hexdigest())
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    cache = tmp_path / "cache"
    cache.mkdir()

    def told(value):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", value)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        return str(error.value)

    bpe, encoder = CACHED
    source = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    addresses = re.findall(r'_file="(.*?)"', source)
    assert [hashlib.sha1(address.encode()).hexdigest() for address in addresses] == [bpe, encoder]
    line = told(str(cache))
    assert asked == [bpe] and "set TIKTOKEN_CACHE_DIR" not in line
    assert f"{cache}, lacks {bpe} (GPT-2's vocab.bpe) and {encoder} (GPT-2's encoder.json)" in line
    (cache / encoder).write_bytes(b"{}")
    assert f"{cache}, lacks {bpe} (GPT-2's vocab.bpe): " in told(str(cache))
    (cache / bpe).write_bytes(b"x")
    monkeypatch.setattr(os, "remove", lambda path: None)  # as in a folder that is read-only
    assert f"{cache}, holds files that are not GPT-2's: " in told(str(cache))
    assert f"set TIKTOKEN_CACHE_DIR to a folder that holds {bpe}" in told("")


def test_a_missing_folder_is_said_and_nothing_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("fetched"))
    with pytest.raises(UserError, match="nothing: no such folder"):
        load_tokenizer(tmp_path / "nothing")


# --- Hugging Face's files -----------------------------------------------------------------------------------

FRENCH = [
    "où est la forêt ? l'été, à l'ombre des chênes.",
    "ne dis pas où elle était l'été dernier",
]
MANY = [
    f"{a} {b}{c}"
    for a in ("l'été", "aaaa", "we've 12,345", "\t\n x", "日本 🙂")
    for b in FRENCH + TEXTS[:8]
    for c in ("", "!", " aa aaa", "\n\n  z")
]  # 200 texts


@pytest.fixture
def foreign():
    """Another language's vocabulary, its control tokens in front, as the tokenizers library counts
    them."""
    learnt = train_bpe(FRENCH, 300)
    return Tokenizer(
        {token: rank + 2 for token, rank in learnt.items()}, {END: 0, "<pad>": 1}, eot=0
    )


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def whole(vocabulary, **changes):
    """The same as tokenizer.json."""
    control = vocabulary.control.items()
    content = {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "added_tokens": [{"id": n, "content": name, "special": True} for name, n in control],
        "model": {
            "type": "BPE",
            "vocab": json.loads(vocabulary.files()["vocab.json"]),
            "merges": [
                [bpe_files.spell(t) for t in pair] for pair in bpe_files.merges_of(vocabulary.ranks)
            ],
        },
    }
    for path, value in changes.items():
        *parts, last = path.split("__")
        inner = content
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return json.dumps(content).encode()


def refuse(folder, *words):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in (str(folder), *words)), text


def same(a, b):
    return (a.ranks, a.control, a.eot) == (b.ranks, b.control, b.eot)


def test_a_vocabulary_beside_the_weights_is_read(foreign, tmp_path):
    """From vocab.json and merges.txt, and from tokenizer.json with merges as lists or as texts."""
    files = foreign.files()
    assert FILE not in files  # its ids do not begin at 0
    texts = [
        f"{bpe_files.spell(a)} {bpe_files.spell(b)}" for a, b in bpe_files.merges_of(foreign.ranks)
    ]
    assert len(texts) == 44 and files["merges.txt"].decode().split("\n")[1:-1] == texts
    for i, found in enumerate(
        (
            files,
            {"tokenizer.json": whole(foreign)},
            {"tokenizer.json": whole(foreign, model__merges=texts)},
        )
    ):
        folder = write(tmp_path / str(i), found)
        again = load_tokenizer(folder)
        assert same(again, foreign) and again.n_vocab == tokens_in(folder) == 302
        for text in MANY:
            assert again.encode(text) == foreign.encode(text)
            assert again.decode([0, *again.encode(text), 1]) == text
    both = [tmp_path / "0", tmp_path / "1"]
    for folder in both:
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "model_type": "gpt2",
                    "vocab_size": 302,
                    "n_positions": 8,
                    "n_layer": 1,
                    "n_head": 1,
                    "n_embd": 2,
                }
            )
        )
    assert same(common_tokenizer(*both), foreign)
    (tmp_path / "1" / "tokenizer.json").write_bytes(whole(from_ranks(train_bpe(FRENCH, 301))))
    with pytest.raises(UserError, match="another vocabulary"):
        common_tokenizer(*both)


def test_merges_are_those_of_the_ranks():
    """a+b first, then ab+c: "abc" cannot come from a and bc. "xyz" has no pair at all."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    assert bpe_files.merges_of(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]
    assert bpe_files.merges_of(ranks | {b"xyz": 259}) is None
    assert set(from_ranks(ranks | {b"xyz": 259}).files()) == {
        FILE
    }  # no file that would give other ids


def test_added_tokens_and_the_end_that_config_names(foreign, tmp_path):
    """Older versions of transformers write added_tokens.json, newer ones tokenizer_config.json."""
    files = foreign.files()
    del files["tokenizer_config.json"]
    folder = write(
        tmp_path / "m",
        files
        | {"added_tokens.json": b'{"end of turn": 302}', "config.json": b'{"eos_token_id": 302}'},
    )
    found = load_tokenizer(folder)
    assert (found.eot, found.n_vocab, found.control) == (
        302,
        303,
        foreign.control | {"end of turn": 302},
    )
    assert found.decode([*found.encode("été"), 302]) == "été"
    assert same(
        load_tokenizer(
            write(tmp_path / "again", found.files() | {"config.json": b'{"eos_token_id": 302}'})
        ),
        found,
    )
    for wrong in (b"303", b"40", b'"x"', b"[0]", b"true"):
        (folder / "config.json").write_bytes(b'{"eos_token_id": %b}' % wrong)
        refuse(folder, "config.json: eos_token_id is", "no control token")
    (folder / "config.json").write_bytes(b'{"eos_token_id": null}')
    assert load_tokenizer(folder).eot == 0  # <|endoftext|>


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model__type="Unigram"), ["model's type is 'Unigram'"]),
        (dict(model__byte_fallback=True), ["byte_fallback"]),
        (dict(model=None), ["model is None"]),
        (
            dict(pre_tokenizer={"type": "Whitespace"}),
            ["pre_tokenizer's type is 'Whitespace'", "GPT-2's pre-tok"],
        ),
        (dict(pre_tokenizer__add_prefix_space=True), ["add_prefix_space is True"]),
        (dict(pre_tokenizer__use_regex=False), ["use_regex"]),
        (dict(normalizer={"type": "NFC"}), ["normalizer"]),
        (dict(model__merges=[]), ["no merge makes the token"]),
        (dict(model__vocab=[]), ["not in the form"]),
        (dict(added_tokens=[{}]), ["not in the form"]),
        (dict(added_tokens=[{"id": 400, "content": "<x>"}]), ["without gaps"]),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(foreign, tmp_path, changes, words):
    refuse(
        write(tmp_path / "m", {"tokenizer.json": whole(foreign, **changes)}),
        "tokenizer.json",
        *words,
    )


def test_broken_vocabularies_are_refused(foreign, tmp_path):
    files = foreign.files()
    lines = files["merges.txt"].split(b"\n")
    swapped = b"\n".join([*lines[:20], lines[21], lines[20], *lines[22:]])
    refuse(write(tmp_path / "swapped", files | {"merges.txt": swapped}), "the merges are not those")
    refuse(
        write(tmp_path / "cut", files | {"merges.txt": b"\n".join(lines[:40])}),
        "no merge makes the token",
    )
    (tmp_path / "cut" / "merges.txt").unlink()
    refuse(tmp_path / "cut", "merges.txt: no such file")
    refuse(write(tmp_path / "json", files | {"vocab.json": b"{"}), "vocab.json: not JSON")
    refuse(
        write(tmp_path / "bert", {"vocab.txt": b"[PAD]"}), "vocab.txt: another kind of vocabulary"
    )
    prefixed = files["tokenizer_config.json"].replace(
        b'"add_prefix_space": false', b'"add_prefix_space": true'
    )
    refuse(
        write(tmp_path / "space", files | {"tokenizer_config.json": prefixed}),
        "add_prefix_space is true",
    )
    vocabulary = json.loads(files["vocab.json"])
    del vocabulary["Z"]
    refuse(
        write(tmp_path / "z", files | {"vocab.json": json.dumps(vocabulary).encode()}),
        "without gaps",
    )


def test_gpt2s_own_files_change_nothing(gpt2, tmp_path):
    files = gpt2.files()
    cache = Path(
        os.environ["TIKTOKEN_CACHE_DIR"]
    )  # tiktoken names its copies of OpenAI's files by their addresses
    assert files["merges.txt"] == (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_bytes()
    published = json.loads((cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_bytes())
    assert json.loads(files["vocab.json"]) == published and len(published) == GPT2_TOKENS
    del files[FILE], files["tokenizer_config.json"]
    beside = load_tokenizer(write(tmp_path / "m", files))
    assert same(beside, gpt2)
    assert all(beside.encode(text) == gpt2.encode(text) for text in MANY)


@pytest.mark.parametrize("which", ["tokenizer", "foreign", "gpt2"])
def test_transformers_reads_the_files_and_gives_the_same_ids(which, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(which)
    folder = write(
        tmp_path / "m", ours.files() | {"config.json": json.dumps({"model_type": "gpt2"}).encode()}
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot
    assert len(MANY) == 200
    for text in MANY + TEXTS + ["how do i burn a lamp ?"]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode([*ids, ours.eot], skip_special_tokens=True) == text
    theirs.save_pretrained(tmp_path / "back")  # with tokenizer.json
    (tmp_path / "back" / "config.json").write_text(json.dumps({"eos_token_id": ours.eot}))
    assert same(load_tokenizer(tmp_path / "back"), ours)


def test_transformers_runs_what_we_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=tokenizer.n_vocab, block_size=32, n_layer=1, n_head=1, n_embd=8)
    )
    ends = dict.fromkeys(checkpoint.SPECIAL, tokenizer.eot)
    checkpoint.save(model, tmp_path / "m", tokenizer.files() | ends)
    write_on = transformers.pipeline("text-generation", model=str(tmp_path / "m"), device="cpu")
    prompt = "how do i burn a lamp ?"
    text = write_on(prompt, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ours = generate(model, [tokenizer.encode(prompt)], 5, {tokenizer.eot}, temperature=0.0).lists()[
        0
    ]
    assert text == prompt + tokenizer.decode(ours)
    assert write_on.model.generation_config.eos_token_id == tokenizer.eot


def test_a_vocabulary_is_read_once_while_its_files_stay_and_shared_with_nobody(
    tmp_path, monkeypatch
):
    read, real = [], data.read_bytes
    monkeypatch.setattr(data, "read_bytes", lambda path, *_: read.append(path.name) or real(path))
    ranks = {bytes([b]): b for b in range(256)}
    for name, content in from_ranks(ranks, {"lamp"}).files().items():
        (tmp_path / name).write_bytes(content)
    first = load_tokenizer(tmp_path)
    first.words = None
    assert load_tokenizer(tmp_path).words == {"lamp"}
    assert read == ["tokenizer.tiktoken", "words.txt"]
    (tmp_path / "words.txt").write_text("lamp quilt")
    assert load_tokenizer(tmp_path).words == {"lamp", "quilt"}
