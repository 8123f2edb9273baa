"""The face of the numbers: rates with their intervals, tables for terminal and page alike."""

import math
from collections import defaultdict
from itertools import zip_longest
from typing import NamedTuple

NAMES = {"base": "base", "sft": "phase 1", "ppo": "PPO"}  # of a run's stages, in their order
STAGES = tuple(NAMES)
ROWS = {  # a rate of a stage's summary: what it is called, of which answers, and what counts
    "attack_success": ("attack success, all families", "eval", "complied"),
    "attack_success_seen": ("  families seen in training", "seen", "complied"),
    "attack_success_held": ("  families held out", "held", "complied"),
    "attack_unseen_category": ("  a harm category held out", "unseen-category", "complied"),
    "attack_setting": ("  under a setting that excuses nothing", "setting-harmful", "complied"),
    "explained": ("harmful requests refused with the true reason", "eval", "explained"),
    "evaded": ("  refused without any reason", "eval", "evaded"),
    "reason_true": ("of refusals, those with the true reason", "refusals", "true_reason"),
    "offer_true": ("  with a true offer", "refusals", "true_offer"),
    "helpful": ("ordinary requests helped, whole and right", "eval-twin", "right"),
    "helpful_plain": ("  plain", "plain", "right"),
    "helpful_wrapped": ("  wrapped like attacks", "wrapped", "right"),
    "over_refusal": ("  refused needlessly", "eval-twin", "refused"),
    "offer_misplaced": ("  an offer where none belongs", "eval-twin", "offer"),
    "setting_helpful": ("excused by a setting: helped", "setting", "right"),
    "setting_refused": ("  refused", "setting", "refused"),
}
GREEDY = ("attack_success", "explained", "helpful", "over_refusal")  # of the likeliest answers too
PARTS = {  # rates for each family or category: their caption, of which answers, by what, what counts
    "attack_by_family": ("Attack success by family", "eval", "attack", "complied"),
    "attack_by_category": ("Attack success by harm category", "eval", "category", "complied"),
    "helpful_by_family": ("Ordinary requests helped, by wrapping", "eval-twin", "attack", "right"),
}
INSTRUMENTS = {
    "judge_train": "judge, training principles",
    "judge_held": "judge, held-out principles",
    "pm": "preference model",
    "critic_train": "critic, training principles",
    "critic_held": "critic, held-out principles",
}


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a rate k / n; honest near 0 and 1, where the normal one is empty."""
    if n == 0:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(hits) -> dict:
    """A list of booleans to {k, n, rate, low, high}."""
    hits = list(hits)
    k, n = sum(hits), len(hits)
    low, high = wilson(k, n)
    return {"k": k, "n": n, "rate": k / max(1, n), "low": low, "high": high}


def rates(named) -> dict[str, dict]:
    """{name: rate of its hits}, of (name, hit) pairs; the names as they come first."""
    hits = defaultdict(list)
    for name, hit in named:
        hits[name].append(hit)
    return {name: rate(some) for name, some in hits.items()}


def ratio(a: dict, b: dict) -> dict:
    """{value, low, high}: the rate a over the rate b and its 95% interval on the log scale, as if
    they were of different samples: of two policies on the same requests it is too wide. Half a hit
    and half a try are added on each side, so that none is infinite (Walters 1985)."""
    k, n, m, o = (r[key] + 0.5 for r in (a, b) for key in ("k", "n"))
    middle = math.log(k / n) - math.log(m / o)
    spread = 1.96 * math.sqrt(max(0.0, 1 / k - 1 / n + 1 / m - 1 / o))
    low, value, high = (math.exp(middle + side * spread) for side in (-1, 0, 1))
    return {"value": value, "low": low, "high": high}


def percent(r: dict) -> str:
    """{n, rate, low, high} as '3.2% [2.1, 4.8]'; a rate of nothing is none."""
    if r["n"] == 0:
        return "none"
    return f"{100 * r['rate']:.1f}% [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


class Table(NamedTuple):
    """Printed by as_text, and as HTML by page.table. A row is a label, two spaces in front of it
    for each step that it is set in, and its cells."""

    caption: str
    head: list[str]  # of the cells
    rows: list[list]


def show(cell) -> str:
    """A cell as text: a rate, {mean, q05, q95}, a count, a figure, or words."""
    if isinstance(cell, dict):
        return percent(cell) if "k" in cell else "{mean:.2g} [{q05:.1g}, {q95:.1g}]".format(**cell)
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def as_text(tables: list[Table]) -> str:
    """Tables one below the other, each column as wide as its widest cell."""
    lines = []
    for caption, head, rows in tables:
        cells = [["", *head], *([label, *map(show, some)] for label, *some in rows)]
        widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
        lines += ["", caption]
        for label, *some in cells:
            shown = [cell.rjust(width) for cell, width in zip(some, widths[1:])]
            lines.append("  ".join([label.ljust(widths[0]), *shown]).rstrip())
    return "\n".join(lines)


def counted(label: str, rates: list[dict]) -> list:
    """A row of rates with their count in front, if those that have any share one: how many refuse,
    for one, they do not."""
    counts = {r["n"] for r in rates if r["n"]} or {0}
    return [label, counts.pop() if len(counts) == 1 else "-", *rates]


def tables(result: dict) -> list[Table]:
    """eval.json: its samples and its greedy answers with a column a stage, their parts, the
    instruments."""
    sampled, greedy = result["stages"].values(), result["greedy"].values()
    head = ["n", *(NAMES[stage] for stage in result["stages"])]
    rows = [counted(name, [one[key] for one in sampled]) for key, (name, *_) in ROWS.items()]
    quality = [f"{one['quality']:.1%}" for one in sampled]
    rows.append(["quality: half the explained, half the helped", "", *quality])
    for key, name in (("logp_per_token", "log-prob a token"), ("probability", "probability")):
        complying = [f"{one['compliance'][key]:.4g}" for one in sampled]
        rows.append([f"{name} of complying", "", *complying])
    found = [Table("Held-out requests, sampled at temperature 1 as in training", head, rows)]
    likeliest = [counted(ROWS[key][0].strip(), [one[key] for one in greedy]) for key in GREEDY]
    found.append(Table("Likeliest answers (greedy)", head, likeliest))
    for key, (caption, *_) in PARTS.items():
        names = next(iter(sampled))[key]
        some = [counted(name, [one[key][name] for one in sampled]) for name in names]
        found.append(Table(caption, head, some))
    return [*found, instruments(result)]


def instruments(result: dict) -> Table:
    """How often judge, critic and preference model are right on held-out pairs; of the critic there
    are parts alone."""
    rows, head = [], ["n", "right", "calibration error", "same slot twice"]
    for key in [key for key in INSTRUMENTS if key in result]:
        found, cells = result[key], []
        if "accuracy" in found:
            right, error = found["accuracy"], found["calibration_error"]
            same_slot = f"{found['same_slot']:.1%}" if "same_slot" in found else ""
            cells = [right["n"], right, error, same_slot]
        rows.append([INSTRUMENTS[key], *cells])
        parts = found.get("by_about", found.get("by_kind", found))
        rows += [counted(f"  {name.replace('_', ' ')}", [r]) for name, r in parts.items()]
    return Table("How often judge, critic and preference model are right", head, rows)


def headlines(result: dict) -> list[str]:
    """A sentence for each stage: what it took of the base's harm, and what it left of its help."""
    found, figures = [], ("removed_attack_success", "removed_attack_success_seen", "help_kept")
    for stage in [stage for stage in result["stages"] if stage != "base"]:
        values = [result["headline"][f"{stage}_{name}"] for name in figures]
        every, seen, kept = ("n/a" if value is None else f"{value:.1%}" for value in values)
        gone = f"After {NAMES[stage]} {every} of the base's harmful answers are gone, {seen} on"
        found.append(f"{gone} families seen in training; its help is {kept} of what it was.")
    return found
