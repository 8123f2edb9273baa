"""Simulated human labellers, for the RLHF baseline alone. Constitutional AI never sees a label of theirs.

    python -m mincai.lab.human --source runs/tiny/comparisons.jsonl --out runs/tiny/human.jsonl
    python train_pm.py --pairs runs/tiny/human.jsonl --out runs/tiny/pm-human

What Constitutional AI is compared with is reinforcement learning from *human* feedback (Bai et al. 2022, 2204.05862).
There are no people here, so the world's oracle plays them, through a noisy annotator with a budget: of two answers to
a harmful request it prefers the refusal; to any other the right recipe to a wrong one, and that to a refusal. Then a
share of its labels is flipped: people agree with each other on such pairs in two cases of three or so. This is the one
place where the oracle labels anything that trains, and no stage of the loop imports this file: a test sees to it.

Reads a file as mincai.feedback writes it, and writes the labelled rows: `p_a` is 1 or 0, or 0.5 where the two are as
good as each other (train_pm.py leaves those out); what the AI judge said is dropped. `oracle` and `flipped` tell what
the annotator would have said without noise; nothing that trains reads them.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError
from mincai.lab.measure import gradable
from mincai.plumbing import data, output
from mincai.plumbing.cli import arg, run
from mincai.tinyworld import world

SETTINGS = {
    "careful": dict(noise=0.1, budget=500),  # few labels by somebody who takes time
    "hurried": dict(noise=0.3, budget=0),  # every comparison, at a crowdworker's pace
}
JUDGED = ("principle", "p_ab", "p_ba", "reasons", "votes")  # what the AI judge left in a row


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "again")
    source: str = arg("runs/tiny/comparisons.jsonl", "comparisons, as mincai.feedback writes them")
    out: str = arg("runs/tiny/human.jsonl", "JSONL to write")
    noise: float = arg(0.25, "share of the decided labels that is flipped, 0 to 1", least=0, most=1)
    budget: int = arg(0, "how many comparisons are labelled, drawn at random; 0 for all", least=0)
    world: int = arg(0, "seed of the world that the base model read about")
    size: str = arg("tiny", "of that world, tiny or small")
    seed: int = arg(0, "seed of the draws and flips")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


def merit(action: world.Action, setting: str | None, answer: str) -> float:
    """How good an honest person finds an answer; only the order of two answers to one request means anything.

    A refusal of a harmful request is worth 1, whatever it says, anything else 0: garbled answers and refusals with
    steps in them too. So people teach to refuse, and not to explain: nobody asked them to.
    """
    grade = world.grade(action, answer)
    if action.harmful(setting):
        return float(not grade.complied)
    if grade.refused:
        return 0.0
    return 2.0 if grade.right else 1.0


def label(a: float, b: float, noise: float, rng: random.Random) -> tuple[float, bool]:
    """(p_a, whether it was flipped) of two merits. Equal ones are even, and noise does not touch them."""
    flipped = a != b and rng.random() < noise
    return (0.5 if a == b else float((a > b) != flipped)), flipped


def annotate(rows: list[dict], actions: dict[str, world.Action], cfg: Config) -> list[dict]:
    """The rows that got a label, in their order, with it."""
    rng = random.Random(cfg.seed)
    wanted = sorted(rng.sample(range(len(rows)), min(cfg.budget or len(rows), len(rows))))
    out = []
    for row in (rows[i] for i in wanted):
        a, b = (merit(actions[row["action"]], row.get("setting"), row[side]) for side in "ab")
        p_a, flipped = label(a, b, cfg.noise, rng)
        made = {"p_a": p_a, "oracle": 1 - p_a if flipped else p_a, "flipped": flipped}
        kept = {key: value for key, value in row.items() if key not in JUDGED}
        out.append({**kept, **made, "annotator": "simulated human"})
    return out


def main(cfg: Config) -> dict:
    started = time.time()
    if not 0 <= cfg.noise <= 1 or cfg.budget < 0:
        mend = "give a noise from 0 to 1 and a budget of 0 (all) or more"
        raise UserError(f"--noise {cfg.noise}, --budget {cfg.budget}: {mend}")
    if Path(cfg.out).resolve() == Path(cfg.source).resolve():
        raise UserError(f"{cfg.out}: is the source as well; give another --out")
    if data.done(cfg.out, cfg, cfg.again):
        print(f"human: {cfg.out} is there already, skipped")
        return {}
    cfg.check_out()
    need = ("prompt", "action", "a", "b", "a_ids", "b_ids", "p_a")
    rows, actions = gradable(cfg.source, cfg, need)
    out = annotate(rows, actions, cfg)
    decided, flipped = sum(r["p_a"] != 0.5 for r in out), sum(r["flipped"] for r in out)
    found = {"labelled": len(out), "decided": decided, "flipped": flipped}
    data.write_jsonl(cfg.out, out)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, **found))
    print(
        f"human: {len(out)} of {len(rows)} comparisons labelled by simulated people, {decided} "
        f"decided, {flipped} of them flipped; {time.time() - started:.0f} s -> {cfg.out}"
    )
    return found


if __name__ == "__main__":
    run(main, Config, __doc__)
