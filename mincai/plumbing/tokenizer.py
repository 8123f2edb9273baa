"""Byte-level BPE through tiktoken: GPT-2's vocabulary, or a small one in tiktoken's rank format.

Text that a person wrote is always encoded as ordinary text, so a request that spells out the
end-of-text marker cannot end anything; control ids are appended by the code that needs them.
"""

import base64
import functools
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from mincai import UserError
from mincai.plumbing import bpe_files, data

FILE = "tokenizer.tiktoken"
WORDS = "words.txt"  # beside it: what a model of few words has read in pretraining, one word a line
FILES = (FILE, WORDS, *bpe_files.WRITTEN)
# GPT-2's way of cutting text into chunks before merging bytes (Radford et al. 2019, encoder.py)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_TOKENS = 50257
END = "<|endoftext|>"
CACHED = {  # names in tiktoken's cache: SHA-1 of where it gets them from
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "GPT-2's vocab.bpe",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "GPT-2's encoder.json",
}


class Tokenizer:
    """`encode`, `decode`, and ids that end something: `eot` (an answer), `newline` and all other
    `line_ends` (what was to be one line; GPT-2 has a token for two of them, too).

    ranks: {bytes: id}, what text is made of. control: {name: id} of all other tokens, `eot` among
    them. words: all that its model has read in pretraining, a set, where they are few.
    """

    def __init__(self, ranks: dict[bytes, int], control: dict[str, int], eot: int, words=None):
        self.ranks, self.control, self.eot, self.words = ranks, control, eot, words
        how = dict(pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=control)
        self.encoding = tiktoken.Encoding("mincai", **how)
        self.n_vocab = self.encoding.n_vocab
        self.silent = frozenset(control.values())
        self.newline = self.encode("\n")[-1]
        self.line_ends = {eot, *(number for token, number in ranks.items() if b"\n" in token)}

    def special(self) -> dict[str, int]:
        """What config.json says of ids, for other libraries to read."""
        padding = self.ranks[bytes([bpe_files.PADDING])]
        return {"bos_token_id": self.eot, "eos_token_id": self.eot, "pad_token_id": padding}

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of these ids; control tokens, end-of-text among them, are left out."""
        return self.encoding.decode([i for i in ids if i not in self.silent])

    def unread(self, text: str) -> list[str]:
        """Words of the text that are not in `words`, each once; none where none are listed."""
        if self.words is None:
            return []
        return [word for word in dict.fromkeys(words_of(text)) if word not in self.words]

    def files(self) -> dict[str, bytes]:
        """What to write beside a checkpoint so that `load_tokenizer` finds the vocabulary again."""
        files = bpe_files.write(self.ranks, self.control, self.eot)
        if self.control == {END: len(self.ranks)}:
            lines = [b"%b %d\n" % (base64.b64encode(x), rank) for x, rank in self.ranks.items()]
            files[FILE] = b"".join(lines)
        if self.words is not None:
            files[WORDS] = "".join(f"{word}\n" for word in sorted(self.words)).encode()
        return files


def words_of(text: str) -> list[str]:
    """What a text is cut into before merging, without the space in front: words, numbers, marks."""
    return [chunk.strip() for chunk in regex.findall(PATTERN, text) if chunk.strip()]


def from_ranks(ranks: dict[bytes, int], words: set[str] | None = None) -> Tokenizer:
    """The end-of-text id is the first one after the ranks."""
    return Tokenizer(ranks, {END: len(ranks)}, len(ranks), words)


def load_tokenizer(folder) -> Tokenizer:
    """The vocabulary in `folder`: tokenizer.tiktoken (each line: base64 of the bytes, a space, the
    rank), with words.txt if it is there; else Hugging Face's files (bpe_files.py); else GPT-2's."""
    path = Path(folder, FILE)
    if not path.parent.is_dir():  # a mistyped path must not fetch a vocabulary
        raise UserError(f"{folder}: no such folder; check the path, or run the stage that makes it")
    if not path.exists():
        ranks, control = bpe_files.read(folder) or _gpt2(path)
        return Tokenizer(ranks, control, _end(folder, control))
    states = [os.stat(file) for file in (path, path.with_name(WORDS)) if file.is_file()]
    told = tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)
    return from_ranks(*_read_once(path, told))


@functools.lru_cache(8)  # every stage and every model loaded asks for it; GPT-2's takes a while
def _read_once(path, states):
    """(ranks, words or None) of these files while they stay as they are."""
    ranks = {}
    for number, line in enumerate(data.read_bytes(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            told = "not a base64 token, a space and a rank"
            raise UserError(f"{path}, line {number}: {told}") from None
    missing = {bytes([b]) for b in range(256)} - ranks.keys()
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        told = "ranks must count from 0 without gaps and hold all 256 single bytes"
        raise UserError(f"{path}: {told}")
    listed = path.with_name(WORDS)
    words = data.read_bytes(listed).decode(errors="replace").split() if listed.exists() else None
    return ranks, None if words is None else frozenset(words)


def _gpt2(path):
    """GPT-2's vocabulary, as bpe_files.read gives others."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets its HTTP library's errors through
        told = f"is not there and GPT-2's vocabulary could not be fetched ({error!s:.90})"
        raise UserError(f"{path} {told}; {_advice(os.environ.get('TIKTOKEN_CACHE_DIR'))}") from None
    eot = encoding.eot_token
    return {encoding.decode_single_token_bytes(i): i for i in range(eot)}, {END: eot}


def _advice(cache):
    """What to do where tiktoken finds GPT-2's files neither in the folder `cache` nor outside."""
    names = [f"{name} ({what})" for name, what in CACHED.items()]
    beside = "or put GPT-2's vocab.json and merges.txt beside the weights"
    if not cache:
        return f"set TIKTOKEN_CACHE_DIR to a folder that holds {' and '.join(names)}, {beside}"
    lacks = [told for name, told in zip(CACHED, names) if not Path(cache, name).is_file()]
    wrong = f"lacks {' and '.join(lacks)}" if lacks else "holds files that are not GPT-2's"
    mend = "copy the cache of a machine on which tiktoken.get_encoding('gpt2') works"
    return f"TIKTOKEN_CACHE_DIR, {cache}, {wrong}: {mend}, {beside}"


def _end(folder, control):
    """The id that config.json says ends a text, or END's. UserError unless it is a control token:
    what can be typed must not end anything."""
    path = Path(folder, "config.json")
    content = data.read_object(path) if path.exists() else {}
    eot = content.get("eos_token_id")
    eot = control.get(END) if eot is None else eot
    if type(eot) is not int or eot not in control.values():
        told = f"eos_token_id is {eot}, which is no control token of the vocabulary"
        raise UserError(f"{path}: {told}; write the id of the token that ends a text")
    return eot


def tokens_in(folder) -> int:
    """How many ids have a token in what `load_tokenizer` finds; GPT-2's is not fetched for it."""
    own = Path(folder, FILE).exists() or bpe_files.there(folder)
    return load_tokenizer(folder).n_vocab if own else GPT2_TOKENS


def train_bpe(texts, n_ranks: int) -> dict[bytes, int]:
    """Merges learnt from texts (Sennrich et al. 2016): the most frequent neighbours, repeatedly."""
    chunks = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in sorted(chunks.items())]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n_ranks:
        pairs = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        # ties broken by bytes: same file every time
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return ranks
