"""What each stage answers to prompts of one's own: a file of rows and a page, side by side.

    python -m mincai.lab.answers runs/tiny --prompts mine.txt,benign:good.txt

`python -m mincai --prompts ...` ends with it. answers.jsonl has of each prompt the base's answer,
phase 1's and PPO's; answers.html shows them. Nothing grades them: the loop has trained on these
very prompts, and no oracle knows them. Reading them is what the page is for.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from mincai import constitution, shipped
from mincai.lab import page
from mincai.lab.assess import answers_of, open_models
from mincai.lab.measure import models_of, run_folder
from mincai.lab.page import said, tag, text
from mincai.lab.table import NAMES
from mincai.plumbing import data, formats, output, progress
from mincai.plumbing.cli import arg, run
from mincai.plumbing.stage import Settings, begin

WRITTEN = "Written by python -m mincai.lab.answers"
KINDS = {"harmful": "Harmful requests", "benign": "Ordinary requests"}
ABOUT = """The loop trained on these requests, and nothing grades the answers: read them. What it does on
requests that it has not trained on is measured on the held-out ones, in eval.json."""


@dataclass(frozen=True)
class Config(Settings):
    FIRST = "out"  # also given without its flag
    LOOSE = (*Settings.LOOSE, "batch_size")
    out: str = arg("runs/tiny", "the run folder; gets answers.jsonl and answers.html")
    base: str = arg(shipped("tiny"), "the model it started from: a folder, or gpt2 and its sizes")
    prompts: str = arg(shipped("tiny/prompts.jsonl"), "the prompts: FILE,benign:FILE")
    constitution: str = arg(str(constitution.PATH), "the principles, for the examples' ids")
    fewshot: str = arg("", "examples that the base is shown; none for the tiny world")
    most: int = arg(500, "prompts of each kind, the families in turn; 0 for all", least=0)
    temperature: float = arg(1.0, "of the answers; 0 is greedy", least=0)
    max_new: int = arg(104, "tokens of an answer at most", least=1)
    batch_size: int = arg(64, "rows sampled together", least=1)

    @property
    def result(self) -> str:
        return str(Path(self.out, "answers.jsonl"))

    def reads(self) -> dict:
        """What answers, beside what the flags name."""
        return models_of(self.out)

    def check_out(self):
        output.check_rows(Path(self.out, "answers.jsonl"))
        output.check_file(Path(self.out, "answers.html"), mark=WRITTEN)


def build(rows: list[dict], title: str, temperature: float, unread=lambda row: []) -> str:
    """The page. rows: as answers.jsonl has them. unread: words of a row that the model does not
    know."""
    stages, sections = [s for s in NAMES if s in rows[0]], []
    for kind, name in KINDS.items():
        shown = []
        for row in [row for row in rows if row["kind"] == kind]:
            new = unread(row)
            told = f"The model has never read: {' '.join(new)}. Its answers mean little."
            cells = [said(row[stage] or "(nothing)", NAMES[stage]) for stage in stages]
            setting = text(f"Setting: {row['setting']}", "caption") if row["setting"] else ""
            about = [setting, text(told, "caption") if new else ""]
            beside = tag("div", *cells, class_="beside")
            shown.append(tag("article", tag("h3", row["prompt"]), *about, beside))
        if shown:
            sections.append((kind, f"{name} ({len(shown):,})", page.join(shown)))
    how = f"One sample each at temperature {temperature:g}." if temperature else "The likeliest."
    return page.document(title, f"{ABOUT} {how}", sections, WRITTEN)


def main(cfg: Config) -> list[dict]:
    out, path = run_folder(cfg.out), Path(cfg.out, "answers.jsonl")
    cfg.check_out()
    made = data.done(path, cfg, cfg.again)
    if made and (out / "answers.html").exists():
        progress.forget(cfg)
        print(f"answers: {path} is there already, skipped")
        return data.read_jsonl(path)
    begun, rng = begin("answers", cfg), random.Random(cfg.seed)
    every = formats.loop_prompts(cfg.prompts)
    chosen = {id(row) for kind in KINDS for row in data.choose(every, kind, cfg.most, rng)}
    asked = [row for row in every if id(row) in chosen]  # in the files' order
    models, planner = open_models(begun)
    keys = ("id", "prompt", "setting", "kind")
    rows = [{key: row.get(key) for key in keys} for row in asked]
    journal, stages = begun.journal(), [stage for stage in NAMES if stage in models]
    with begun.precision():
        for stage in stages:
            answers = answers_of(stage, begun.load(models[stage]), planner, asked, cfg, journal)
            for row, answer in zip(rows, answers):
                row[stage] = answer

    def unread(row):
        return planner.tokenizer.unread(constitution.conversation_of(row))

    def finish():
        title = f"Your prompts, answered: {out.resolve().name}"
        html = build(rows, title, cfg.temperature, unread)
        output.write_file(out / "answers.html", [html])  # before the stamp, which says all is there
        more = dict(missing=[s for s in NAMES if s not in stages], left_out=len(every) - len(rows))
        return data.stamp(cfg, inputs=begun.inputs, seconds=round(begun.seconds()), **more)

    data.write_stamped(output.sidecar(path), {path.name: rows}, finish)
    progress.clear(cfg)
    left = f" of {len(every):,} (--most 0 for all)" if len(rows) < len(every) else ""
    told = "; ".join(filter(None, (f"{len(rows):,} prompts{left}", planner.summary())))
    begun.say(f"{told}; {begun.seconds():.0f} s -> {path}, {out / 'answers.html'}")
    return rows


if __name__ == "__main__":
    run(main, Config, __doc__)
