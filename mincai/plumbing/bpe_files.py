"""A byte-level BPE vocabulary in Hugging Face's files: read, checked, and written.

vocab.json ({token: id}) with merges.txt (two tokens a line, those to merge first on top), or both
in tokenizer.json. Their tokens are spelt with one printable character a byte (Radford et al. 2019,
encoder.py). They say which two tokens make a third; tiktoken merges any two that do, lowest id
first. Both give the same ids on every text if each token's pair is what merging its bytes by lower
ids ends with, and that is checked for every token.
"""

import json
import math
import re
from pathlib import Path

from mincai import UserError
from mincai.plumbing.data import read_bytes, read_object

WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
ADDED, SETTINGS = "added_tokens.json", "tokenizer_config.json"
WRITTEN = (VOCABULARY, MERGES, SETTINGS, "generation_config.json")
OTHERS = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model")
ONLY = "only byte-level BPE with GPT-2's pre-tokenisation can be read"
AGAIN = "get the vocabulary's files again, all of one model"
# What tokenizer.json has to say, by its part; a value that is left out counts as the first here
BPE = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
PIECES = {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)}
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELT = {byte: chr(byte) for byte in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTES = {character: byte for byte, character in SPELT.items()}
# A byte that no text in UTF-8 has, so every vocabulary has a token that no text needs. Padding by
# the end of text would hide the one that counts: reward heads look for the last token that is not
# padding, and trainers leave padding out of the loss
PADDING = 0xFF


def spell(token: bytes) -> str:
    return "".join(SPELT[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]] | None:
    """The pair that makes each token of several bytes, in the order of their ids; None where some
    token cannot be made of two others of lower ids."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            i = made.index(min(made))  # the leftmost of the lowest
            if made[i] >= rank:
                return None
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def there(folder) -> list[str]:
    """Which files of a vocabulary lie in the folder, the one that says most first."""
    names = (WHOLE, VOCABULARY, MERGES, *OTHERS)
    return [name for name in names if Path(folder, name).exists()]


def read(folder) -> tuple[dict[bytes, int], dict[str, int]] | None:
    """The vocabulary beside a model's weights: ({bytes: id}, {name of a control token: id}). None
    where the folder holds none; UserError for one that cannot be read exactly."""
    names = there(folder)
    if not names:
        return None
    path = Path(folder, VOCABULARY if names[0] == MERGES else names[0])
    if path.name in OTHERS:
        raise UserError(f"{path}: another kind of vocabulary; {ONLY}")
    try:
        return _check(path, *(_read_whole(path) if path.name == WHOLE else _read_parts(path)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not in the form that transformers writes; {AGAIN}") from None


def _read_whole(path):
    content = read_object(path)
    model, pieces = content.get("model"), content.get("pre_tokenizer")
    for name, part, known in (("model", model, BPE), ("pre_tokenizer", pieces, PIECES)):
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} is {part!r}; {ONLY}")
        for key, values in known.items():
            if part.get(key, values[0]) not in values:
                raise UserError(f"{path}: {name}'s {key} is {part[key]!r}; {ONLY}")
    if content.get("normalizer") is not None:
        raise UserError(f"{path}: has a normalizer; {ONLY}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return model.get("vocab", {}), merges, added


def _read_parts(path):
    vocabulary = read_object(path)
    content = read_bytes(path.with_name(MERGES), "it belongs beside " + VOCABULARY)
    lines = content.decode(errors="replace").split("\n")
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    if merges and merges[0][0] == "#version:":
        del merges[0]
    # what was added to it, as older and newer versions of transformers write it
    beside = [path.with_name(name) for name in (ADDED, SETTINGS)]
    added, settings = (read_object(file) if file.exists() else {} for file in beside)
    if settings.get("add_prefix_space"):
        raise UserError(f"{beside[1]}: add_prefix_space is true; {ONLY}")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(number)
    return vocabulary, merges, added


def _check(path, vocabulary, merges, added):
    """The files' content as `read` gives it."""

    def need(right, told):
        if not right:
            raise UserError(f"{path}: {told}; {AGAIN}")

    made = {"".join(pair) for pair in merges}
    ranks, control = {}, dict(added)
    padding = control.get(SPELT[PADDING])
    if padding is not None and padding == vocabulary.get(SPELT[PADDING]):
        del control[SPELT[PADDING]]  # a byte like any other to us
    for token, number in vocabulary.items():
        if token in made or len(token) == 1 and token in BYTES:
            need(all(c in BYTES for c in token), f"{token!r} is not spelt as GPT-2 spells bytes")
            ranks[bytes(BYTES[c] for c in token)] = number
        elif token not in added:
            # so that a merges.txt that was cut off is noticed
            need(re.fullmatch(r"<.*>|\[.*\]", token), f"no merge makes the token {token!r}")
            control[token] = number
    numbers = [*ranks.values(), *control.values()]
    whole = all(type(number) is int for number in numbers)
    counted = whole and sorted(numbers) == list(range(len(numbers)))
    need(counted, "ids must count from 0, without gaps and each for one token")
    need(all(bytes([b]) in ranks for b in range(256)), "it must hold all 256 single bytes")
    derived = [[spell(left), spell(right)] for left, right in merges_of(ranks) or ()]
    need(derived == merges, "the merges are not those that follow from the order of the ids")
    return ranks, control


def write(ranks: dict[bytes, int], control: dict[str, int], eot: int) -> dict[str, bytes]:
    """The vocabulary in the files that transformers' AutoTokenizer and pipeline open, by name.
    Empty where they could not give the same ids on every text."""
    merges = merges_of(ranks)
    if merges is None:
        return {}
    end = next(name for name, number in control.items() if number == eot)
    padding = ranks[bytes([PADDING])]
    vocabulary = {spell(token): number for token, number in ranks.items()} | control
    vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    plain = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    added = (*control.items(), (SPELT[PADDING], padding))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # typed text never gives a control token
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
        "pad_token": SPELT[PADDING],
        "added_tokens_decoder": {str(number): {"content": x} | plain for x, number in added},
    }
    generation = {
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        "pad_token_id": padding,
        # as every stage draws: from all tokens, where the libraries' own default is the 50 likeliest
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    lines = ["#version: 0.2", *(f"{spell(left)} {spell(right)}" for left, right in merges)]
    whole = json.dumps(vocabulary, ensure_ascii=False)
    indented = [json.dumps(x, ensure_ascii=False, indent=2) for x in (settings, generation)]
    texts = zip(WRITTEN, (whole, "\n".join(lines), *indented), strict=True)
    return {name: f"{text}\n".encode() for name, text in texts}
