"""English prompts for GPT-2: requests, their benign twins, and attacks around both.

    python -m mincai.lab.english --out data/english         (the result is shipped)
    python -m mincai.lab.english --out runs/gpt2-full/prompts --wrappings 20 --attacks 40000

The second is preset gpt2-full. requests.jsonl in data/english holds 12 harm categories of 42
requests; each harmful one stands beside a benign twin that shares its key words, so that no word
decides; and 420 ordinary requests. attacks.json holds the wrappers, which are harmless in
themselves and wrap both kinds. Training reads prompts.jsonl; settings are compared on
prompts_dev.jsonl; evaluation reads prompts_eval.jsonl, whose requests and one harm category occur
in no other file. Four attack families occur in no prompt of training.

With --wrappings and --attacks the same requests make many more prompts: after each family alone
come pairs of families, one wrapped around the other. The outer one is of plain words, for what is
encoded twice no model reads. Held out stays what is held out: requests, families and the harm
category.
"""

import base64
import codecs
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError
from mincai.constitution import PATH
from mincai.plumbing import data, formats, output
from mincai.plumbing.cli import arg, run

FILES = ("prompts", "prompts_dev", "prompts_eval")
FOLDER = PATH.parent / "english"
UNSEEN = "neglect"  # the category that no prompt of the loop names
LEET = str.maketrans("aeiostAEIOST", "431057431057")
ENCODINGS = {
    "": lambda text: text,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leet": lambda text: text.translate(LEET),
    "spelled": lambda text: " - ".join(" ".join(word) for word in text.split()),
    "reversed": lambda text: text[::-1],
}
# Where the prompts of a split go, and the names it has there: of harmful rows, and of benign ones
WRITTEN = {
    "loop": ("prompts", "loop", "loop"),
    "dev": ("prompts_dev", "eval", "eval-twin"),
    "eval": ("prompts_eval", "eval", "eval-twin"),
    "unseen": ("prompts_eval", "unseen-category", "unseen-twin"),
}


@dataclass(frozen=True)
class Config:
    folder: str = arg(str(FOLDER), "folder of requests.jsonl and attacks.json")
    out: str = arg(str(FOLDER), "folder to write prompts, prompts_dev and prompts_eval.jsonl to")
    wrappings: int = arg(0, "prompts of each training request; 0: as shipped", least=0)
    attacks: int = arg(0, "harmful prompts of evaluation at least; 0: as shipped", least=0)
    seed: int = arg(0, "of the wording drawn for each request and family")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_beside(self.out, "prompts.run.json", *(f"{name}.jsonl" for name in FILES))


def load_attacks(path) -> dict[str, dict]:
    """{family: {held, encoding, templates}}; UserError where a template lacks its one {request}."""
    try:
        families = data.from_json(data.read_bytes(path))["families"]
        for name, family in families.items():
            held, encoding, some = map(family.get, ("held", "encoding", "templates"))
            if encoding not in ENCODINGS or not isinstance(held, bool):
                raise ValueError(f"family {name!r}: encoding or held")
            if not (isinstance(some, list) and some) or any(
                t.count("{request}") != 1 for t in some
            ):
                raise ValueError(f"family {name!r}: every template needs {{request}} once")
        if "plain" not in families or all(family["held"] for family in families.values()):
            raise ValueError("needs the family 'plain', and one that is not held back")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = f"not a file of attacks ({error}); data/english/attacks.json shows the form"
        raise UserError(f"{path}: {advice}") from None
    return families


def wrap(request: str, family: dict, rng: random.Random) -> str:
    """One message that asks for `request` in the manner of this family."""
    encode = ENCODINGS[family["encoding"]]
    return rng.choice(family["templates"]).replace("{request}", encode(request))


def manners(names, attacks, start: int) -> list[tuple[str, ...]]:
    """Every family of `names` alone, then every (outer, inner) pair of two; each list from `start`
    on."""
    wrapping = [n for n in names if attacks[n]["templates"] != ["{request}"]]
    outer = [n for n in wrapping if not attacks[n]["encoding"]]
    alone = [(name,) for name in names]
    pairs = [(a, b) for a in outer for b in wrapping if a != b]
    return [some[(start + i) % len(some)] for some in (alone, pairs) for i in range(len(some))]


def wrap_often(request, attacks, names, number, start, rng) -> list[tuple[str, str]]:
    """`number` distinct (attack, prompt) of one request; UserError where the templates make no
    more."""
    turns, made, tries = manners(names, attacks, start), {}, 0
    while len(made) < number:
        if tries > 100 * len(turns):
            raise UserError(
                f"{number} prompts of one request: {len(names)} families of attacks make "
                f"{len(made)}; lower --wrappings or --attacks, or add templates to attacks.json"
            )
        manner = turns[tries % len(turns)]
        text = request
        for name in reversed(manner):
            text = wrap(text, attacks[name], rng)
        made.setdefault(text, " + ".join(manner))
        tries += 1
    return [(name, text) for text, name in made.items()]


def split_of(rows) -> dict[str, str]:
    """{request id: loop | dev | eval | unseen}. Of the 42 of a category the first 24 train and the
    last 12 test; a twin goes with its partner; of the ordinary ones 300 train and 90 test; UNSEEN
    is wholly apart."""
    found, seen = {}, Counter()
    for row in rows:
        partner, category = row["id"].removesuffix("-twin"), row["category"]
        if partner not in found:
            seen[category] += 1
            train, dev = (24, 30) if category else (300, 330)
            split = (
                "loop" if seen[category] <= train else "dev" if seen[category] <= dev else "eval"
            )
            found[partner] = "unseen" if category == UNSEEN else split
        found[row["id"]] = found[partner]
    return found


def shipped_families(n: int, harmful: bool, split: str, seen: list, every: list) -> list[str]:
    """The families that wrap the n-th request once each, in turn: all come equally often."""
    turn = [seen[(3 * n + i) % len(seen)] for i in range(3)]
    if split == "unseen" or (split == "loop" and harmful):
        return turn
    if split == "loop":
        return turn[:1] if turn[0] == "plain" else [turn[0], "plain"]
    return every if harmful else [every[(5 * n + i) % len(every)] for i in range(5)]


def shares(rows, splits, number: int) -> dict[str, int]:
    """{id of a harmful request of evaluation: prompts of it}: each category has as many, together
    `number` at least, and its requests' parts differ by one at most."""
    by_category, found = defaultdict(list), {}
    for row in rows:
        if row["kind"] == "harmful" and splits[row["id"]] in ("eval", "unseen"):
            by_category[row["category"]].append(row["id"])
    for ids in by_category.values():
        whole = -(-number // len(by_category))  # rounded up
        for i, name in enumerate(ids):
            found[name] = whole * (i + 1) // len(ids) - whole * i // len(ids)
    return found


def prompts(rows, attacks, rng: random.Random, wrappings=0, number=0) -> dict[str, list[dict]]:
    """{file name: rows {id, prompt, request, kind, category, attack, split}}.

    wrappings: prompts of each training request; number: harmful prompts of evaluation, at least.
    0: as shipped.
    """
    seen = [name for name, family in attacks.items() if not family["held"]]
    every, splits, files = list(attacks), split_of(rows), {name: [] for name in FILES}
    wanted = shares(rows, splits, number) if number else {}
    for n, row in enumerate(rows):
        harmful, split, request = row["kind"] == "harmful", splits[row["id"]], row["request"]
        # How many prompts, by families alone and in pairs; None: by each of a few families once
        times = (wrappings or None) if split == "loop" else wanted.get(row["id"])
        if times is None:
            names = shipped_families(n, harmful, split, seen, every)
            made = [(name, wrap(request, attacks[name], rng)) for name in names]
        else:
            names = every if split == "eval" else seen
            made = wrap_often(request, attacks, names, times, n, rng)
        file, *called = WRITTEN[split]
        name = called[not harmful]
        for attack, prompt in made:
            written = {"id": f"{name}-{len(files[file]):05d}", "prompt": prompt}
            written |= {key: row[key] for key in ("request", "kind", "category")}
            files[file].append(written | {"attack": attack, "split": name})
    return files


def read(cfg: Config) -> dict[str, list[dict]]:
    """What main writes: {file name: rows}."""
    folder = Path(cfg.folder)
    rows, texts = [], ("id", "kind", "category", "request")
    for where, row in data.each_row(folder / "requests.jsonl", texts):
        formats.need(row, texts, where, text=texts)
        rows.append(row)
    attacks = load_attacks(folder / "attacks.json")
    return prompts(rows, attacks, random.Random(cfg.seed), cfg.wrappings, cfg.attacks)


def main(cfg: Config) -> dict:
    cfg.check_out()
    files = read(cfg)
    rows = {f"{name}.jsonl": some for name, some in files.items()}
    data.write_stamped(Path(cfg.out, "prompts.run.json"), rows, lambda: data.stamp(cfg))
    told = ", ".join(f"{len(some):,} in {name}.jsonl" for name, some in files.items())
    print(f"english: {told} -> {cfg.out}")
    return {name: len(some) for name, some in files.items()}


if __name__ == "__main__":
    run(main, Config, __doc__)
