"""One page that shows a run: a request followed through the loop, the loop's numbers, what came of it, how PPO went.

    python -m mincai.lab.report runs/tiny                            writes runs/tiny/report.html
    python -m mincai.lab.report runs/tiny --trail loop-0952          follows this request
    python -m mincai.lab.report runs/tiny --picture loop.svg         the loop with this run's numbers, as one drawing

Only files are read, no model. What is not there yet is left out, with the command that makes it. The page stands alone:
nothing is fetched, no script runs. It is written anew each time.
"""

import json
import math
import operator
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError, constitution
from mincai.lab import assess, claims, controls, page, probes, table, trails
from mincai.plumbing import data, output
from mincai.plumbing.cli import arg, run
from mincai.lab.page import Html, join, said, step, tag, text

WRITTEN = "Written by python -m mincai.lab.report"  # the page says so at its foot, the picture in its first line
NAMES = {"base": "base", "sft": "phase 1", "ppo": "PPO"}
WATCHED = {"attacks": "attacks that succeed", "evasive": "evasive refusals", "needless": "needless refusals",
           "helped": "ordinary requests helped"}
SEPARATE = {"attack_by_family": "Attack success by family", "attack_by_category": "Attack success by harm category",
            "helpful_by_family": "Ordinary requests helped, by wrapping"}  # get tables of their own
INSTRUMENTS = ("judge_train", "judge_held", "critic_train", "critic_held", "pm")
STAMPS = ("revisions.run.json", "sft/run.json", "comparisons.run.json", "pm/run.json", "ppo/run.json", "eval.json")
LABELS = ("p_a", "p_ab", "p_ba")  # of a comparison
MAKE = {"revisions.jsonl": "python -m mincai.critique --out {}/revisions.jsonl",
        "sft/run.json": "python train_sft.py --data {0}/revisions.jsonl --out {0}/sft",
        "pm/run.json": "python train_pm.py --init {0}/sft --pairs {0}/comparisons.jsonl --out {0}/pm",
        "comparisons.jsonl": "python -m mincai.feedback --model {0}/sft --out {0}/comparisons.jsonl",
        "ppo/metrics.jsonl": "python train_ppo.py --sft {0}/sft --pm {0}/pm --out {0}/ppo",
        **{name: f"python -m mincai.lab.evaluate {{}}{flag}" for name, flag in {
            "eval.json": "", "eval_samples.jsonl": "", "eval_deep.json": " --deep", "controls.json": " --controls",
            "claims.json": " --claims"}.items()}}


@dataclass(frozen=True)
class Config:
    out: str = arg("runs/tiny", "the run folder; gets report.html")
    constitution: str = arg(str(constitution.PATH), "the principles, to show their words")
    trail: str = arg("", "id of the request to follow (default: the first that shows the whole loop)")
    picture: str = arg("", "write the loop and PPO's curve to this SVG file instead of the page")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_file(self.picture or Path(self.out, "report.html"), mark=WRITTEN)



def read(folder: Path, name: str, *need) -> dict | list[dict] | None:
    """A file of the run: rows that have the keys of `need`, or an object; None if it is not there. UserError for a
    broken one."""
    path = folder / name
    if not path.exists():
        return None
    if path.suffix == ".jsonl":
        return data.read_jsonl(path, need)
    try:
        return dict(json.loads(path.read_bytes()).items())
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({error}); make it again") from None


def lacks(folder: Path, name: str) -> Html:
    command = MAKE[name].format(shlex.quote(str(folder)))
    return tag("p", f"No {name} yet; this makes it: ", tag("code", command), class_="caption")


def made(folder: Path, stage: str) -> tuple[dict, dict]:
    """(numbers, settings) that a training stage left in its run.json; empty if there is none."""
    found = read(folder, f"{stage}/run.json") or {}
    return found.get("metrics", {}), found.get("config", {})


# ---- one request ----

def asked(row: dict) -> Html:
    return join([said(row["setting"], "Setting") if row.get("setting") else "", said(row["prompt"], "Human")])


def trail(folder: Path, cfg: Config) -> Html:
    revisions = read(folder, "revisions.jsonl", "id", "prompt", "kind", "original", "rounds", "changed")
    pairs = read(folder, "comparisons.jsonl", "prompt_id", "a", "b", "principle", *LABELS, "reasons")
    samples = read(folder, "eval_samples.jsonl", "stage", "id", "prompt", "answer")
    principles = {p.id: p for p in constitution.load_constitution(cfg.constitution)}

    def words(name):
        return said(principles[name].tiny if name in principles else "(of another constitution)", name)

    found = trails.follow(revisions or [], pairs or [], {k: p.target for k, p in principles.items()}, cfg.trail)
    row, pair, out = (found or {}).get("revision", {}), (found or {}).get("pair"), []
    if row:
        shown = next((r for r in row["rounds"] if r["outcome"] == "revised"), row["rounds"][0])
        others = [join([words(r["principle"]), said(r["critique"], "Critique"), said(r["revision"], "Revision")])
                  for r in row["rounds"] if r is not shown]
        about = ", ".join(row[key] for key in ("kind", "category", "attack") if row.get(key))
        out += [step("Request", f"One of the prompts that the loop trains on ({about}).", asked(row)),
                step("The base's answer", "The pretrained model answers; nothing has taught it to refuse.",
                     said(row["original"])),
                step("Principle", "Drawn by lot, most often from those on what the request is about.",
                     words(shown["principle"])),
                step("Critique", "The same model reads all three and says what is wrong.", said(shown["critique"])),
                step("Revision", "Then it writes the answer anew. Phase 1 fine-tunes it on such revisions.",
                     said(shown["revision"]), page.fold("The other rounds on this answer", *others) if others else "")]
    if pair:
        sides = [said(pair[s], s.upper(), "won" if (pair["p_a"] > 0.5) == (s == "a") else "") for s in "ab"]
        out += [step("Two answers", "The fine-tuned model answers the request several times; its samples are compared "
                     "two by two. Outlined: the judge's choice.", tag("div", *sides, class_="beside two")),
                step("Judgement", "The base model, as judge, describes both answers under another principle and names "
                     "a letter. Its mean probability in both orders is the label that phase 2 learns from.",
                     words(pair["principle"]), said(pair["reasons"] or "(none were written)", "Reasons"),
                     text(f"P(A is better) = {pair['p_a']:.3f}: {pair['p_ab']:.3f} with A in the first place, "
                          f"{1 - pair['p_ba']:.3f} with A in the second."))]
    for one, answers in trails.held_out(samples or [], row):
        cells = [tag("div", said(a["answer"], NAMES.get(stage, stage)), text(trails.verdict(a), "caption"))
                 for stage, a in answers.items()]
        kind, caption = ("harmful", "No stage trained on it. A sample of each stage, graded by the rules of the world, "
                         "which none sees.") if one["split"] == "eval" else ("ordinary", "To be helped, not refused.")
        out.append(step(f"A held-out {kind} request", caption, asked(one), tag("div", *cells, class_="beside")))
    notes = [lacks(folder, name) for rows, name in (
        (revisions, "revisions.jsonl"), (pairs, "comparisons.jsonl"), (samples, "eval_samples.jsonl")) if rows is None]
    if revisions and not found:
        notes.append(text("No answer to a harmful request was revised, so there is none to follow."))
    return join([tag("ol", *out, class_="trail") if out else "", *notes])


# ---- the loop with its numbers ----

def facts(folder: Path) -> list[tuple[str, str, list[str]]]:
    (sft, _), (pm, settings), (ppo, _) = (made(folder, stage) for stage in ("sft", "pm", "ppo"))
    return trails.facts(read(folder, "revisions.jsonl", "id", "kind", "rounds") or [],
                        read(folder, "comparisons.jsonl", *LABELS) or [], sft, pm, ppo,
                        settings.get("contrast", 0.05))


def loop(folder: Path, cfg: Config) -> Html:
    notes = [lacks(folder, name) for name in ("sft/run.json", "pm/run.json") if not (folder / name).exists()]
    return join([page.boxes(facts(folder)), *notes, text(
        "Fine-tuning on the revisions ends phase 1. Then the base model compares answers of the fine-tuned one, a "
        "preference model learns the labels, and PPO raises its score at a price for each nat of KL to the fine-tuned "
        "model. Decided: the label is off 1/2 by at least --contrast. Same slot twice: the judge named the same letter "
        "in both orders, so place decided, not content.")])


def curve(folder: Path, key: str) -> list[tuple]:
    rows = read(folder, "ppo/metrics.jsonl", "update") or []
    return [(r["update"], r[key]) for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]


def picture(folder) -> str:
    """The loop's five stages with this run's numbers and PPO's score over its updates, one SVG of 900 by 320."""
    return f"<!-- {WRITTEN} -->\n" + page.picture(facts(Path(folder))[1:], curve(Path(folder), "score")) + "\n"

def results(folder: Path, cfg: Config) -> Html:
    found = read(folder, "eval.json")
    if found is None:
        return lacks(folder, "eval.json")
    stages = found["stages"]
    if any("attack_success" not in one for one in stages.values()):  # an English run, which no oracle grades
        return page.pre(assess.report(found).splitlines())
    head, first = ["", *(NAMES.get(s, s) for s in stages)], next(iter(stages.values()))

    def rates(which: dict, rows) -> list[list]:
        return [[name, *(page.share(pick(one)) for one in which.values())] for name, pick in rows]

    plain = [(name, operator.itemgetter(key)) for key, name in table.ROWS if key not in SEPARATE]
    likeliest = [(dict(table.ROWS)[key], operator.itemgetter(key)) for key in table.GREEDY]
    quality = ["quality: half explained, half helped", *(f"{100 * one['quality']:.1f}%" for one in stages.values())]
    share = found["headline"]
    out = [text(f"After {NAMES[s]} {share[f'{s}_removed_attack_success']:.1%} of the base's harmful answers are gone, "
                f"and its help is {share[f'{s}_help_kept']:.1%} of what it was.") for s in stages if s != "base"]
    out += [text("All on requests that no stage trained on; below a rate its 95% Wilson interval. An attack succeeds "
                 "unless the answer is a refusal without any step, so garbled answers count against the model."),
            page.table(head, rates(stages, plain) + [quality], "Sampled at temperature 1, as in training"),
            page.table(head, rates(found["greedy"], likeliest), "Likeliest answers (greedy)")]
    for key, name in SEPARATE.items():
        parts = [(part, lambda one, key=key, part=part: one[key][part]) for part in first[key]]
        out.append(page.fold(name, page.table(head, rates(stages, parts), name)))
    right = [[f"{name}: {part}".replace("_", " "), page.share(r), r["n"]] for name in INSTRUMENTS if name in found
             for part, r in found[name].items() if part in ("accuracy", "applies", "does_not_apply")]
    return join([*out, page.fold("How often judge, critic and preference model are right",
                                 page.table(["", "right", "n"], right, "On held-out pairs"))])


def curves(folder: Path, cfg: Config) -> Html:
    rows = read(folder, "ppo/metrics.jsonl", "update")
    if rows is None:
        return lacks(folder, "ppo/metrics.jsonl")
    watched = list(dict.fromkeys(key for row in rows for key in row if key.startswith("dev_")))
    names = [("score", "score", "in deviations"), ("kl_exact", "KL", "nats an answer"), ("entropy", "entropy",
             "nats a token"), ("explained", "explained variance", "the critic's, of returns"),
             *((key, WATCHED.get(key[4:], key[4:]), "development") for key in watched)]
    drawn = [page.chart(name, unit, curve(folder, key)) for key, name, unit in names if curve(folder, key)]
    return join([text("PPO is after the score alone. Development requests, graded by the rules of the world, show if "
                      "answers get better with it; a score that rises while quality falls is over-optimisation."),
                 tag("div", *drawn, class_="charts")])


def told(name: str, lines):
    """A section of a file that its own module knows how to print."""
    def part(folder: Path, cfg: Config) -> Html:
        found = read(folder, name)
        return lacks(folder, name) if found is None else page.pre(lines(found))
    return part


def making(folder: Path, cfg: Config) -> Html:
    rows = []
    for name in STAMPS:
        if found := read(folder, name):
            seconds = found.get("seconds", found.get("metrics", {}).get("seconds"))
            rows.append([name, found.get("seed"), found.get("torch"), str(found.get("git") or "unknown")[:10],
                         found.get("device"), "" if seconds is None else f"{seconds:,.0f}"])
    return join([text("Each of these files holds its stage's settings."), page.table(
        ["settings", "seed", "torch", "git", "device", "seconds"], rows, "Stages that are there")])


PARTS = (("trail", "One request through the loop", trail, "revisions.jsonl, comparisons.jsonl or eval_samples.jsonl"),
         ("loop", "The loop", loop, "revisions.jsonl, comparisons.jsonl or a run.json"),
         ("results", "Results", results, "eval.json"), ("ppo", "PPO, update by update", curves, "ppo/metrics.jsonl"),
         ("deep", "A closer look", told("eval_deep.json", probes.lines), "eval_deep.json"),
         ("controls", "Controls", told("controls.json", controls.lines), "controls.json"),
         ("claims", "Claims", told("claims.json", claims.lines), "claims.json"),
         ("made", "How it was made", making, "a run.json or eval.json"))


def build(cfg: Config) -> str:
    folder, parts = Path(cfg.out), []
    for anchor, title, make, files in PARTS:
        try:
            parts.append(tag("section", tag("h2", title, id=anchor), make(folder, cfg)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{folder}: {files} is not as this version writes it ({error!r}); make it again") from None
    links, name = [tag("a", title, href=f"#{anchor}") for anchor, title, *_ in PARTS], folder.resolve().name
    return page.document(f"{name}: Constitutional AI, one run", tag("h1", f"Constitutional AI, one run: {name}"), text(
        "A model that complies with everything criticises and revises its own answers under written principles, learns "
        "the revisions, then learns from its own judgements."), tag("nav", *links), *parts,
        tag("footer", f"{WRITTEN} {folder}"))


def main(cfg: Config) -> Path:
    folder, path = Path(cfg.out), Path(cfg.picture or f"{cfg.out}/report.html")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; make it with: python -m mincai --out {folder}")
    cfg.check_out()
    output.write_file(path, [picture(folder) if cfg.picture else build(cfg)])
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # `mincai.lab.report runs/x` is `--out runs/x`
        sys.argv.insert(1, "--out")
    run(main, Config, __doc__)
