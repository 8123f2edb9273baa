"""Files that were damaged or put together wrongly, thousands of them: each is read rightly, or
refused in one line that names it, at once."""

import collections
import csv
import gzip
import hashlib
import io
import json
import math
import os
import random
import signal
import socket
import struct
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import train_sft
from mincai import UserError, constitution
from mincai.lab import assess, english, evaluate, measure, play, report, table
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import bpe_files, checkpoint, data, formats, planner, stage
from mincai.plumbing.tokenizer import END, from_ranks, load_tokenizer, train_bpe

SECONDS = 5  # that one file may take at most, on a machine that does much else


# --- what is damaged ------------------------------------------------------------------------------

ODD = (None, True, False, 0, 1, -1, 2.5, 1e308, -1e-320, math.nan, math.inf, 2**31, 2**63, 10**30)
ODD += (10**400, "", " ", "x", "0", "a\nb", "\ud800", "\0", "é" * 300, [], {}, [[]], [{}], [None])
ODD += ({"": ""}, ["x"], [1], {"x": 1}, {"role": "user", "content": "x"}, "Human: a\nAssistant:")
DEEP = b"[" * 5_000 + b"]" * 5_000, b'{"a":' * 3_000 + b"1" + b"}" * 3_000, b"[" * 100_000
DEEP += (b'{"prompt":' + b"[" * 150 + b"]" * 150 + b"}",)
SNIPPETS = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b"'", b"{", b"}", b"[", b"]", b",")
SNIPPETS += (b"NaN", b"-Infinity", b"1e999", b"9" * 5_000, b"null", b"\\ud800", b"\\u0000", b"\t")
SNIPPETS += (
    b"\n\n",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\x00",
    b"PAR1",
    b"\n\nHuman: ",
    b"---\n",
    b"\x80",
)


def damage_bytes(content: bytes, rng) -> bytes:
    """One or a few bytes, or a piece, otherwise."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        a, b = sorted(rng.randrange(len(found) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 40, 10**6)))
        how = rng.randrange(7)
        if how == 0 and a < len(found):
            found[a] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[a:b] = b""
        elif how == 2:
            found[a:a] = rng.choice(SNIPPETS)
        elif how == 3:
            found[a:a] = found[a:b]
        elif how == 4:
            del found[a:]
        elif how == 5:
            found[a:b] = rng.randbytes(b - a if b - a < 100 else 8)
        else:
            found[a:b] = rng.choice(SNIPPETS)
    return bytes(found)


def damage_value(value, rng):
    """A JSON value with one part of it otherwise: replaced, gone, called otherwise, twice."""
    places = []

    def walk(one):
        for key in one if isinstance(one, dict) else range(len(one)):
            places.append((one, key))
            if isinstance(one[key], (dict, list)):
                walk(one[key])

    value = json.loads(json.dumps(value))
    walk(value if isinstance(value, (dict, list)) else [])
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    inside, key = places[rng.randrange(min(len(places), rng.choice((10, 100, 10**6))))]
    how = rng.randrange(6)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(("", "x", "prompt", "id", str(key) + " "))] = inside.pop(key)
    elif how == 2:
        other, name = rng.choice(places)
        inside[key] = other[name] if name in other or isinstance(name, int) else None
        if isinstance(inside[key], (dict, list)):
            inside[key] = json.loads(json.dumps(rng.choice(ODD[:26]), default=str))
    else:
        inside[key] = rng.choice(ODD)
    return value


def dumped(value) -> bytes:
    """JSON as Python writes it: NaN, halves of pairs and numbers of any length included."""
    return json.dumps(value, ensure_ascii=True).encode()


def damage_json(content: bytes, rng) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    if rng.random() < 0.05:
        return rng.choice(DEEP)
    return dumped(damage_value(json.loads(content), rng))


def damage_lines(content: bytes, rng) -> bytes:
    """JSONL: one line or several, or bytes of it."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, len(lines)))):
        n = rng.randrange(len(lines))
        if rng.random() < 0.05:
            lines[n] = rng.choice(DEEP)
        elif lines[n].startswith(b"{"):
            try:
                lines[n] = dumped(damage_value(json.loads(lines[n]), rng))
            except (ValueError, RecursionError):
                pass
    return b"\n".join(lines)


def damage_table(content: bytes, rng) -> bytes:
    if rng.random() < 0.5:
        return damage_bytes(content, rng)
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(("", "x", '"', "a\nb", "\0", "1e999", "prompt", "é"))
    if rng.random() < 0.3:
        row.append("x")
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def damage_gzip(content: bytes, rng) -> bytes:
    if rng.random() < 0.5:
        return damage_bytes(content, rng)
    return gzip.compress(damage_lines(gzip.decompress(content), rng), 1)


def damage_weights(content: bytes, rng) -> bytes:
    """A safetensors file: its header, its numbers, or any bytes."""
    if rng.random() < 0.2:
        return damage_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if rng.random() < 0.5:
        number = rng.choice((math.nan, math.inf, -3e38, 3e38, 1e9, 1e-45))
        place = 4 * rng.randrange(len(body) // 4)
        body[place : place + 4] = struct.pack("<f", number)
    elif rng.random() < 0.5:
        names = [name for name in header if name != "__metadata__"]
        tensor = header[rng.choice(names)]
        tensor["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "C64"))
        if rng.random() < 0.5:  # the bytes fit
            for name in names:
                header[name]["dtype"] = rng.choice(("I32", "U32", "F32"))
    else:
        header = damage_value(header, rng)
    text = dumped(header)
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", size) + text + bytes(body)


# --- what reads it --------------------------------------------------------------------------------


@dataclass
class Case:
    """A reader. files: {name: (sound content, what damages it)}; one of them is damaged at a
    time. read: opens the folder, and checks what it has got."""

    files: dict
    read: object
    named: object = None  # what a refusal has to name; the file or its folder if None


def is_text(*values):
    for value in values:
        assert isinstance(value, str), value
        value.encode()


def read_model(folder, scalar=False, new_head=False):
    model = checkpoint.load(folder, scalar=scalar, new_head=new_head)
    tokenizer = load_tokenizer(folder)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]]).clamp(max=tokenizer.n_vocab - 1)
        out = model(ids)
        out = out if scalar else model.unembed(out)
    out = out[torch.isfinite(out) | (out == -math.inf)] if not scalar else out
    assert out.numel() and not torch.isnan(out).any()
    ids = tokenizer.encode("the cat 1 é")
    assert tokenizer.decode(ids) == "the cat 1 é" and tokenizer.eot not in ids


def read_vocabulary(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the cat 1 é")
    assert tokenizer.decode(ids) == "the cat 1 é" and max(*ids, tokenizer.eot) < tokenizer.n_vocab
    assert tokenizer.unread("cat") in ([], ["cat"])


def read_prompts(name, folder):
    with_split = formats.loop_prompts(str(folder / name))
    for row in with_split:
        is_text(row["prompt"], row["kind"], row.get("category") or "", row.get("attack") or "")
        is_text(row.get("setting") or "", row.get("action") or "", str(row["id"]))
        assert row["kind"] in ("harmful", "benign")
        constitution.dialogue(row["prompt"], row.get("setting")).encode()
    rng = random.Random(0)
    assert data.choose(with_split, "harmful", 2, rng) + data.choose(with_split, "benign", 2, rng)


TOKENIZER = from_ranks(train_bpe(["the cat sat on the mat , and the dog ran ."], 270))


def read_pairs(name, folder):
    dropped = collections.Counter()
    for row in formats.read_pairs(str(folder / name), TOKENIZER, dropped):
        is_text(row["prompt"], row.get("setting") or "")
        assert 0 <= row["p_a"] <= 1
        for ids in (row["a_ids"], row["b_ids"]):
            assert ids and all(type(i) is int and 0 <= i < TOKENIZER.n_vocab for i in ids)


def read_revisions(folder):
    cfg = train_sft.Config(data=(str(folder / "revisions.jsonl"),), learn="all")
    rows, _ = train_sft.read(cfg, TOKENIZER, 256)
    for text, *ids in rows:
        is_text(text)
        assert all(ids)


def read_constitution(folder):
    principles = constitution.load_constitution(folder / "constitution.json")
    chosen = constitution.select(principles)
    rng = random.Random(0)
    for _ in range(3):
        one = constitution.draw(chosen, ("harm",), 0.5, rng)
        is_text(one.text, one.tiny, one.id, one.target, one.asks("critique", True))


def read_shots(folder):
    shots = planner.load_shots(str(folder / "fewshot.json"), constitution.load_constitution())
    is_text(*(text for some in shots.values() for text in some))
    planner.Planner(TOKENIZER, 200, shots).prompt("review", "a", 10)


@dataclass(frozen=True)
class Made(stage.Settings):
    out: str = "m"
    lr: float = 0.5


def read_done(folder):
    cfg = Made(out=str(folder), device="cpu")
    assert data.done(folder, cfg) in (True, False)
    data.refuse_first_edition(folder)


def read_run(folder):
    """All that shows a run."""
    try:
        is_text(report.build(report.Config(out=str(folder))))
    finally:
        is_text(report.picture(folder))


def read_claims(folder):
    is_text(evaluate.claimed([folder])[1])
    evaluate.seed_of(folder)


def read_assessed(folder):
    is_text(str(report.build(report.Config(out=str(folder)))))


def read_held_out(folder):
    rows, actions = measure.gradable(str(folder / "prompts_eval.jsonl"), Actions)
    for row in rows:
        is_text(row["prompt"], row["attack"], row["category"], row["split"], row["kind"])
        assert row["action"] in actions
        constitution.dialogue(row["prompt"], row.get("setting"))


class Actions:
    world, size = 0, "tiny"


def read_play(folder):
    for row in play.requests_of(folder / "prompts.jsonl", "action"):
        is_text(row["text"], row["setting"])


def read_english(folder):
    cfg = english.Config(folder=str(folder))
    for rows in english.read(cfg).values():
        is_text(*(row["prompt"] for row in rows))


# --- sound files ----------------------------------------------------------------------------------


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def model_files():
    """{name: content} of two tiny models, with a head and without."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(TOKENIZER.n_vocab, 16, 2, 2, 8))
        return {kind: _saved(model) for kind, model in (("gpt", gpt), ("pm", ScalarModel(gpt)))}


def _saved(model):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        extra = TOKENIZER.files() | dict.fromkeys(checkpoint.SPECIAL, TOKENIZER.eot)
        out = Path(folder, "m")
        checkpoint.save(model, out, extra)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.json"}


def whole_tokenizer():
    """tokenizer.json as the tokenizers library writes it."""
    merges = [" ".join(map(bpe_files.spell, pair)) for pair in bpe_files.merges_of(TOKENIZER.ranks)]
    vocabulary = {bpe_files.spell(token): number for token, number in TOKENIZER.ranks.items()}
    model = {"type": "BPE", "vocab": vocabulary | {END: TOKENIZER.eot}, "merges": merges}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    added = [{"id": TOKENIZER.eot, "content": END, "special": True}]
    return json.dumps({"model": model, "pre_tokenizer": pieces, "added_tokens": added}).encode()


HH = "\n\nHuman: how do i {} ?\n\nAssistant:{}"


def pairs_in(form):
    rows = []
    for n in range(4):
        q, a, b = f"burn the mat {n} ?", " we do not", " with fire"
        rows.append(
            {
                "hh": {"chosen": HH.format(n, a), "rejected": HH.format(n, b)},
                "trl": {"prompt": q, "chosen": a, "rejected": b, "margin": 1.5},
                "chat": {
                    "prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": q}],
                    "chosen": [{"role": "assistant", "content": a}],
                    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": b}]}],
                },
                "own": {
                    **{"id": f"p{n}", "prompt": q, "setting": None, "kind": "harmful"},
                    **{"a_ids": [1, 2, TOKENIZER.eot], "b_ids": [3, TOKENIZER.eot], "p_a": 0.75},
                },
            }[form]
        )
    return rows


def own_prompts():
    return [
        {
            **{"id": f"loop-{n}", "prompt": f"how do i burn mat {n} ?", "split": "loop"},
            **{"kind": ("harmful", "benign")[n % 2], "category": "fire", "attack": "plain"},
            **{"action": "burn a mat", "setting": "a lesson" if n == 3 else None},
        }
        for n in range(6)
    ]


def chats():
    return [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(4)
    ]


def table_of(rows, delimiter=",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def revisions():
    rounds = [
        {
            "round": n,
            "principle": "own-1",
            "critique": "c",
            "revision": f"r {n}",
            "outcome": "revised",
        }
        for n in (1, 2)
    ]
    common = {"prompt": "burn it ?", "kind": "harmful", "category": "harm", "attack": "plain"}
    common |= {"setting": None, "original": "yes", "revision": "r 2", "rounds": rounds}
    return [{"id": f"loop-{n}", **common, "changed": True} for n in range(3)]


def summary(k):
    hits = [i < k for i in range(20)]
    parts = {key: {"plain": table.rate(hits), "urgency": table.rate([])} for key in table.PARTS}
    more = {"quality": 0.5, "compliance": {"logp_per_token": -1.5, "probability": 0.0625}}
    return {key: table.rate(hits) for key in table.ROWS} | parts | more


def run_files():
    """{name: (content, what damages it)} of a small run folder."""
    stages = {name: summary(k) for name, k in (("base", 19), ("sft", 9), ("ppo", 1))}
    head = {
        f"{s}_{name}": 0.5
        for s in ("sft", "ppo")
        for name in ("removed_attack_success", "removed_attack_success_seen", "help_kept")
    }
    instrument = {"accuracy": table.rate([True]), "calibration_error": 0.1, "same_slot": 0.2}
    instrument["by_about"] = {"theft": table.rate([True])}
    pairs = {"prompt_id": "loop-1", "a": "no", "b": "yes", "principle": "own-1", "p_a": 0.9}
    pairs |= {"p_ab": 0.9, "p_ba": 0.8, "reasons": "so", "kind": "harmful", "prompt": "burn it ?"}
    updates = [{"update": n, "score": 0.1 * n, "kl_exact": 0.5, "entropy": 1.0} for n in range(5)]
    made = {"mincai": "0", "config": {"contrast": 0.05}, "seconds": 3, "seed": 0}
    made["metrics"] = {"seconds": 2.5, "rows": 3, "steps": 2, "val_before": 2.0, "val_after": 1.0}
    made["metrics"] |= {"score_before": 0.0, "score_after": 1.0, "updates": 4, "score_gain": 1.0}
    made["metrics"] |= {"val_accuracy": 0.9, "pairs": 3, "held": 2, "kl_after": 2.0, "dropped": {}}
    names = {"revisions.jsonl": lines(*revisions()), "comparisons.jsonl": lines(pairs, pairs)}
    names["ppo/metrics.jsonl"] = lines(*updates)
    found = {name: (content, damage_lines) for name, content in names.items()}
    return {name: some for name, some in found.items()} | {
        "eval.json": (json.dumps(found_eval(stages, head, instrument)).encode(), damage_json),
        **{f"{s}/run.json": (json.dumps(made).encode(), damage_json) for s in ("sft", "pm", "ppo")},
    }


def found_eval(stages, head, instrument):
    found = {"mincai": "0", "config": {"seed": 0}, "seed": 0, "seconds": 3, "git": "abc"}
    found |= {"stages": stages, "greedy": stages, "headline": head, "judge_train": instrument}
    found["pm"] = instrument | {"by_kind": {"harmful": table.rate([True])}}
    return found | {"critic_train": {"catches": table.rate([True])}}


def assessed():
    kind = {"refuses": table.rate([True]), "score": 0.5, "wins": table.rate([True])}
    kind |= {"by_attack": {"plain": table.rate([True])}, "by_category": {}}
    kind |= {"unseen_category": table.rate([])}
    kind |= dict.fromkeys(assess.FIRST, -1.5)
    both = {"harmful": kind, "benign": kind}
    return {"stages": {"base": both, "sft": both}, "missing": []}


def cases() -> dict[str, Case]:
    models = model_files()
    gpt, pm = models["gpt"], models["pm"]
    kinds = {"config.json": damage_json, "model.safetensors": damage_weights}
    ours = {"tokenizer.tiktoken": damage_bytes}

    def of(files, damaging):
        """Of all these files those that are damaged."""
        return {name: (content, damaging.get(name)) for name, content in files.items()}

    hugging = {n: gpt[n] for n in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    hugging["config.json"] = gpt["config.json"]
    index = {"weight_map": dict.fromkeys(("a", "b"), "part-1.safetensors")}
    shards = {"config.json": gpt["config.json"], "part-1.safetensors": gpt["model.safetensors"]}
    shards |= {"tokenizer.tiktoken": gpt["tokenizer.tiktoken"]}
    shards["model.safetensors.index.json"] = json.dumps(index).encode()
    words = {"tokenizer.tiktoken": gpt["tokenizer.tiktoken"], "words.txt": b"the\ncat\nsat\n"}
    stamp = {"config": json.loads(json.dumps(vars(Made(out="m", device="cpu")))), "inputs": {}}
    stamp |= {
        "sha256": {"a.txt": hashlib.sha256(b"a").hexdigest()},
        "files": ["run.json", "a.txt"],
        "mincai": "0",
    }
    found = {
        "model": Case(of(gpt, kinds | ours), read_model),
        "preference model": Case(of(pm, kinds), partial(read_model, scalar=True)),
        "new head": Case(of(gpt, kinds), partial(read_model, scalar=True, new_head=True)),
        "shards": Case(of(shards, {"model.safetensors.index.json": damage_json}), read_model),
        "vocabulary": Case(
            of(words, {"tokenizer.tiktoken": damage_bytes, "words.txt": damage_bytes}),
            read_vocabulary,
        ),
        "vocab.json": Case(
            of(
                hugging,
                dict.fromkeys(("vocab.json", "tokenizer_config.json", "config.json"), damage_json)
                | {"merges.txt": damage_bytes},
            ),
            read_vocabulary,
        ),
        "tokenizer.json": Case(
            {
                "tokenizer.json": (whole_tokenizer(), damage_json),
                "config.json": (gpt["config.json"], None),
            },
            read_vocabulary,
        ),
        "english": Case(
            {
                "requests.jsonl": (requests(), damage_lines),
                "attacks.json": (attacks(), damage_json),
            },
            read_english,
        ),
        "play": Case({"prompts.jsonl": (lines(*own_prompts()), damage_lines)}, read_play),
        "constitution": Case(
            {"constitution.json": (small_law(), damage_json)},
            read_constitution,
        ),
        "examples": Case({"fewshot.json": (small_shots(), damage_json)}, read_shots),
        "revisions": Case({"revisions.jsonl": (lines(*revisions()), damage_lines)}, read_revisions),
        "stamp": Case(
            {"run.json": (json.dumps(stamp).encode(), damage_json), "a.txt": (b"a", None)},
            read_done,
        ),
        "held-out": Case({"prompts_eval.jsonl": (held_out(), damage_lines)}, read_held_out),
    }
    prompts = {
        "own.jsonl": (lines(*own_prompts()), damage_lines),
        "packed.jsonl.gz": (gzip.compress(lines(*own_prompts()), 1), damage_gzip),
        "list.json": (json.dumps(chats()).encode(), damage_json),
        "texts.json": (json.dumps(["how ?", "why ?"]).encode(), damage_json),
        "chats.jsonl": (lines(*chats()), damage_lines),
        "table.csv": (
            table_of([{"goal": f"burn {n}", "label": "unsafe"} for n in range(4)]),
            damage_table,
        ),
        "table.tsv": (
            table_of([{"text": f"b {n}", "safe": n % 2} for n in range(4)], "\t"),
            damage_table,
        ),
        "lines.txt": (b"how do i burn it ?\nand that ?\n", damage_bytes),
        "hh.jsonl": (lines(*pairs_in("hh")), damage_lines),
        "alpaca.jsonl": (
            lines({"instruction": "a", "input": "b"}, {"instruction": "c", "input": ""}),
            damage_lines,
        ),
    }
    for name, some in prompts.items():
        found[f"prompts, {name}"] = Case({name: some}, partial(read_prompts, name))
    for form in ("hh", "trl", "chat", "own"):
        some = {f"{form}.jsonl": (lines(*pairs_in(form)), damage_lines)}
        found[f"pairs, {form}"] = Case(some, partial(read_pairs, f"{form}.jsonl"))
    found["pairs, csv"] = Case(
        {"pairs.csv": (table_of(pairs_in("trl")), damage_table)}, partial(read_pairs, "pairs.csv")
    )
    found["run"] = Case(run_files(), read_run)
    found["claims"] = Case({"eval.json": run_files()["eval.json"]}, read_claims)
    found["assessed"] = Case(
        {"eval.json": (json.dumps(assessed()).encode(), damage_json)}, read_assessed
    )
    return found


def small_law():
    some = json.loads(constitution.PATH.read_bytes())
    some = some if isinstance(some, list) else some["principles"]
    return json.dumps(["Be kind.", *some[:3]]).encode()


def small_shots():
    whole = json.loads((constitution.PATH.parent / "english/fewshot.json").read_bytes())
    return json.dumps({kind: some[:2] for kind, some in whole.items()}).encode()


def requests():
    rows = [
        {"id": f"r{n}", "category": ("theft", "")[n % 2], "request": f"do {n}"} for n in range(4)
    ]
    return lines(*(row | {"kind": ("harmful", "benign")[n % 2]} for n, row in enumerate(rows)))


def attacks():
    common = {"held": False, "encoding": ""}
    names = ("plain", "urgency", "role", "quote")
    families = {name: common | {"templates": [f"{name}: {{request}}"]} for name in names}
    return json.dumps({"families": families}).encode()


def held_out():
    rows = (constitution.PATH.parent / "tiny/prompts_eval.jsonl").read_bytes().splitlines()
    return b"\n".join(rows[:5])


# --- the tests ------------------------------------------------------------------------------------


def laid_out(case, folder):
    for file, (content, _) in case.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


def faults_of(name, case, folder, rng, tries) -> list[str]:
    """What went wrong in so many tries, a line each; and how many were refused, counted in it."""
    found, damaged = [], [file for file, (_, how) in case.files.items() if how]
    laid_out(case, folder)
    case.read(folder)  # sound files are read
    for _ in range(tries):
        file = rng.choice(damaged)
        content, how = case.files[file]
        wrong = how(content, rng)
        (folder / file).write_bytes(wrong)
        started = time.perf_counter()
        try:
            case.read(folder)
        except UserError as error:
            line = str(error)
            if "\n" in line or len(line) > 2_000 or str(folder) not in line:
                found.append(f"{name}, {file}: said {line[:300]!r} of {wrong[:200]!r}")
        except Exception as error:
            tail = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(tail.filename).name}:{tail.lineno}"
            found.append(f"{name}, {file}: {error!r:.200} at {where} of {wrong[:300]!r}")
        if time.perf_counter() - started > SECONDS:
            found.append(f"{name}, {file}: took {time.perf_counter() - started:.0f} s")
        (folder / file).write_bytes(content)
    return found


@pytest.fixture(scope="module")
def sound():
    return cases()


NAMES = tuple(cases())


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_rightly_or_refused_in_a_line(name, sound, tmp_path, capsys):
    (tmp_path / "f").mkdir()
    assert not faults_of(name, sound[name], tmp_path / "f", random.Random(name), 15)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_what_is_no_file_is_refused_and_never_waited_for(sound, tmp_path, monkeypatch):
    """Where any input should be: a folder, a pipe that nobody writes to, a socket, a device."""

    def bound(path):
        with socket.socket(socket.AF_UNIX) as one:
            monkeypatch.chdir(path.parent)  # a socket's path has to be short
            one.bind(path.name)

    kinds = (Path.mkdir, os.mkfifo, bound, lambda path: path.symlink_to("/dev/zero"))
    seen, before = 0, signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    try:
        for number, (name, case) in enumerate(sound.items()):
            folder = tmp_path / str(number)
            laid_out(case, folder)
            for file, (content, how) in case.files.items():
                for make in kinds if how else ():
                    (folder / file).unlink()
                    make(folder / file)
                    signal.alarm(20)
                    with pytest.raises(UserError) as caught:
                        case.read(folder)
                    signal.alarm(0)
                    line, seen = str(caught.value), seen + 1
                    assert str(folder) in line and "\n" not in line, (name, file, line)
                    (folder / file).rmdir() if make is Path.mkdir else (folder / file).unlink()
                    (folder / file).write_bytes(content)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert seen > 150


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_damaged_files(name, sound, tmp_path, capsys):
    (tmp_path / "f").mkdir()
    faults = faults_of(name, sound[name], tmp_path / "f", random.Random(f"more {name}"), 400)
    capsys.readouterr()  # warnings of thousands of files
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
