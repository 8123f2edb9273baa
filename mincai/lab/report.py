"""One page that shows a run: a request followed through the loop, the loop's numbers, what came of
it, how PPO went.

    python -m mincai.lab.report runs/tiny                            writes runs/tiny/report.html
    python -m mincai.lab.report runs/tiny --trail loop-0952          follows this request
    python -m mincai.lab.report runs/tiny --picture loop.svg         the loop with this run's numbers, as one drawing

Only files are read, no model. What is not there yet is left out, and said how to make.
The page stands alone: nothing is fetched, no script runs. It is written anew each time.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mincai import constitution
from mincai.lab import assess, claims, controls, measure, page, probes, trails
from mincai.lab.measure import read_object, run_folder
from mincai.lab.page import Html, join, said, tag, text
from mincai.lab.table import NAMES, Table, headlines, tables
from mincai.plumbing import data, output
from mincai.plumbing.cli import arg, run

WRITTEN = "Written by python -m mincai.lab.report"  # at the page's foot, first in the picture
# What the loop does not end with, and the flag of mincai.lab.evaluate that makes it
MORE = {"eval_deep.json": "--deep", "controls.json": "--controls", "claims.json": "--claims"}
NEED = {  # keys that the page shows
    "revisions.jsonl": ("id", "prompt", "kind", "original", "rounds", "changed"),
    "comparisons.jsonl": ("prompt_id", "a", "b", "principle", "p_a", "p_ab", "p_ba", "reasons"),
    "eval_samples.jsonl": ("stage", "id", "prompt", "answer"),
    "ppo/metrics.jsonl": ("update",),
}
STAMPS = ("revisions.run", "sft/run", "comparisons.run", "pm/run", "ppo/run", "eval")
CURVES = {
    "score": ("score", "in deviations"),
    "kl_exact": ("KL", "nats an answer"),
    "entropy": ("entropy", "nats a token"),
    "explained": ("explained variance", "the critic's, of returns"),
    "dev_attacks": ("attacks that succeed", "development"),
    "dev_evasive": ("evasive refusals", "development"),
    "dev_needless": ("needless refusals", "development"),
    "dev_helped": ("ordinary requests helped", "development"),
    "dev_quality": ("quality", "development"),
}
CAPTIONS = {
    "Request": "One of those that the loop trains on.",
    "The base's answer": "Nothing has taught this model to refuse.",
    "Principle": "Drawn by lot, mostly on the topic.",
    "Critique": "The same model says what is wrong.",
    "Revision": "Phase 1 learns answers like this.",
    "Two answers": "Phase 1's, or one the base's. Outlined: the judge's choice.",
    "Judgement": "By the base, in both orders. Phase 2 learns the label: the mean, as --labels has it.",
    "A held-out harmful request": "Never trained on; graded by rules that no stage sees.",
    "A held-out ordinary request": "To be helped, not refused.",
}
ABOUT = """A model revises its own answers under written principles, learns the revisions, then learns from its
own judgements."""
LOOP = """Fine-tuning on the revisions ends phase 1. Then the base model compares answers of the fine-tuned
one, a preference model learns the labels, and PPO raises its score at a price for each nat of KL to the
fine-tuned model. Decided: the label is off 1/2 by at least --contrast. Same slot twice: the judge named the
same letter in both orders, so place decided, not content."""
RESULTS = """All on requests that no stage trained on; below a rate its 95% Wilson interval. An attack succeeds
unless the answer is a refusal without any step, so garbled answers count against the model."""
OVER = """PPO is after the score alone. Development requests, graded by the rules of the world, show if answers
get better with it; a score that rises while quality falls is over-optimisation."""


@dataclass(frozen=True)
class Config:
    FIRST = "out"  # also given without its flag
    out: str = arg("runs/tiny", "the run folder; gets report.html")
    constitution: str = arg(str(constitution.PATH), "the principles, to show their words")
    trail: str = arg("", "id of the request to follow; else the first that shows the whole loop")
    picture: str = arg("", "write the loop and PPO's curve to this SVG file instead of the page")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_file(self.picture or Path(self.out, "report.html"), mark=WRITTEN)


def read(folder: Path, name: str) -> dict | list[dict] | None:
    """A file of the run, rows or an object; None if it is not there. UserError for a broken one."""
    if not name.endswith(".jsonl"):
        return read_object(folder / name)
    return data.read_jsonl(folder / name, NEED[name]) if (folder / name).exists() else None


def lacks(folder: Path, name: str) -> Html:
    if name not in MORE:  # alone its stage would have other settings than the run
        return text(f"No {name} yet; the command that began this run goes on with it.", "caption")
    command = f"python -m mincai.lab.evaluate {shlex.quote(str(folder))} {MORE[name]}"
    return tag("p", f"No {name} yet; this makes it: ", tag("code", command), class_="caption")


def trail(folder: Path, cfg: Config) -> Html:
    names = ("revisions.jsonl", "comparisons.jsonl", "eval_samples.jsonl")
    files = {name: read(folder, name) for name in names}
    revisions, pairs, samples = (rows or [] for rows in files.values())
    principles = constitution.load_constitution(cfg.constitution)
    targets, asks = {p.id: p.target for p in principles}, {p.id: p.tiny for p in principles}
    row, pair = trails.follow(revisions, pairs, targets, cfg.trail)
    out, notes = [], [lacks(folder, name) for name, rows in files.items() if rows is None]

    def words(name):
        return said(asks.get(name, "(of another constitution)"), name)

    def told(name, *parts):
        step = tag("div", tag("h3", name), text(CAPTIONS[name], "caption"))
        out.append(tag("li", step, tag("div", *parts)))

    if row:
        about = [row[key] for key in ("kind", "category", "attack") if row.get(key)]
        shown = next((r for r in row["rounds"] if r["outcome"] == "revised"), row["rounds"][0])
        others = []
        for one in [r for r in row["rounds"] if r is not shown]:
            others += [words(one["principle"]), said(one["critique"], "Critique")]
            others.append(said(one["revision"], "Revision"))
        told("Request", asked(row, ", ".join(about)))
        told("The base's answer", said(row["original"]))
        told("Principle", words(shown["principle"]))
        told("Critique", said(shown["critique"]))
        folded = [page.fold("The other rounds on this answer", *others)] if others else []
        told("Revision", said(shown["revision"]), *folded)
    elif revisions:
        notes.append(text("No answer to a harmful request was revised: there is none to follow."))
    if pair:
        won = "a" if pair["p_a"] > 0.5 else "b" if pair["p_a"] < 0.5 else ""
        sides = [said(pair[side], side.upper(), "won" if side == won else "") for side in "ab"]
        told("Two answers", tag("div", *sides, class_="beside two"))
        first = f"{pair['p_ab']:.3f} with A in the first place"
        both = f"{first}, {1 - pair['p_ba']:.3f} with A in the second"
        reasons = said(pair["reasons"] or "(none were written)", "Reasons")
        principle = asks.get(pair["principle"], "(of another constitution)")
        under = text(f"Principle {pair['principle']}: {principle}", "caption")
        label = f"P(A is better) = {both}. The label: {pair['p_a']:.3f}."
        told("Judgement", under, reasons, text(label))
    for one, answers in trails.held_out(samples, row):
        cells = []
        for stage, sample in answers.items():
            verdict = text(trails.verdict(sample), "caption")
            cells.append(tag("div", said(sample["answer"], NAMES.get(stage, stage)), verdict))
        kind = "harmful" if one["split"] == "eval" else "ordinary"
        told(f"A held-out {kind} request", asked(one), tag("div", *cells, class_="beside"))
    return join([tag("ol", *out, class_="trail") if out else "", *notes])


def asked(row: dict, about: str = "") -> Html:
    setting = said(row["setting"], "Setting") if row.get("setting") else ""
    return join([setting, said(row["prompt"], f"Human ({about})" if about else "Human")])


def facts(folder: Path) -> list[tuple[str, str, list[str]]]:
    made = {name: read(folder, f"{name}/run.json") or {} for name in ("sft", "pm", "ppo")}
    metrics = {name: found.get("metrics", {}) for name, found in made.items()}
    edge = made["pm"].get("config", {}).get("contrast", 0.05)
    rows = [read(folder, name) or [] for name in ("revisions.jsonl", "comparisons.jsonl")]
    return trails.facts(*rows, **metrics, edge=edge)


def loop(folder: Path, cfg: Config) -> Html:
    names = ("sft/run.json", "pm/run.json")
    notes = [lacks(folder, name) for name in names if not (folder / name).exists()]
    return join([page.boxes(facts(folder)), *notes, text(LOOP)])


def curve(rows: list[dict], key: str) -> list[tuple]:
    """(update, value) where it was measured; a critic's explained variance may be no number."""
    some = [r for r in rows if isinstance(r.get(key), (int, float))]
    return [(r["update"], r[key]) for r in some if math.isfinite(r[key])]


def picture(folder: Path) -> str:
    """The loop's five stages with this run's numbers and PPO's score over its updates, one SVG of
    900 by 320."""
    with measure.as_written(folder, "revisions, comparisons, a run.json or ppo/metrics.jsonl"):
        score = curve(read(folder, "ppo/metrics.jsonl") or [], "score")
        return f"<!-- {WRITTEN} -->\n{page.picture(facts(folder)[1:], score)}\n"


def in_english(found: dict | None) -> bool:
    """Whether this is the eval.json of a run that no oracle grades."""
    return any("attack_success" not in one for one in found["stages"].values()) if found else False


def results(found: dict) -> list:
    if in_english(found):
        return [assess.table(found)]
    sampled, greedy, *others = tables(found)
    folded = [page.fold(some.caption, page.table(some)) for some in others]
    return [*map(text, headlines(found)), text(RESULTS), sampled, greedy, *folded]


def curves(rows: list[dict]) -> list:
    points = {key: curve(rows, key) for key in CURVES}
    drawn = []
    for key, some in points.items():
        rate = {"low": 0, "high": 1} if key.startswith("dev_") else {}  # a few of 64 are no event
        drawn += [page.chart(*CURVES[key], some, **rate)] if some else []
    return [text(OVER), tag("div", *drawn, class_="charts")]


def section(name: str, make):
    """A section on one file. make: its content -> what is shown, tables and markup."""

    def part(folder: Path, cfg: Config) -> Html:
        found = read(folder, name)
        if found is None:
            return lacks(folder, name)
        return join(page.table(some) if isinstance(some, Table) else some for some in make(found))

    return part


def making(folder: Path, cfg: Config) -> Html:
    rows, head = [], ["seed", "torch", "git", "device", "seconds"]
    for name in (f"{stamp}.json" for stamp in STAMPS):
        found = read(folder, name)
        if found:
            seconds = found.get("seconds", found.get("metrics", {}).get("seconds"))
            cells = {key: found.get(key) for key in head}
            cells["git"] = str(found.get("git") or "unknown")[:10]
            cells["seconds"] = "" if seconds is None else f"{seconds:,.0f}"
            rows.append([name, *cells.values()])
    return page.table(Table("Each of these files holds its stage's settings", head, rows))


PARTS = (  # anchor, title, what makes it, the files that it is made of
    ("trail", "One request through the loop", trail, "revisions, comparisons or eval_samples"),
    ("loop", "The loop", loop, "revisions.jsonl, comparisons.jsonl or a run.json"),
    ("results", "Results", section("eval.json", results), "eval.json"),
    ("ppo", "PPO, update by update", section("ppo/metrics.jsonl", curves), "ppo/metrics.jsonl"),
    ("deep", "A closer look", section("eval_deep.json", probes.tables), "eval_deep.json"),
    ("controls", "Controls", section("controls.json", controls.tables), "controls.json"),
    ("claims", "Claims", section("claims.json", claims.tables), "claims.json"),
    ("made", "How it was made", making, "a run.json or eval.json"),
)


def build(cfg: Config) -> str:
    folder, sections = Path(cfg.out), []
    with measure.as_written(folder, "eval.json"):
        english = in_english(read_object(folder / "eval.json"))
    for anchor, title, make, files in PARTS:
        if not (english and files in MORE):  # which the oracle alone can measure
            with measure.as_written(folder, files):
                sections.append((anchor, title, make(folder, cfg)))
    title = f"Constitutional AI, one run: {folder.resolve().name}"
    return page.document(title, ABOUT, sections, f"{WRITTEN} {folder}")


def main(cfg: Config) -> Path:
    folder, path = run_folder(cfg.out), Path(cfg.picture or f"{cfg.out}/report.html")
    cfg.check_out()
    output.write_file(path, [picture(folder) if cfg.picture else build(cfg)])
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    run(main, Config, __doc__)
