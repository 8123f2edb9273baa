"""Simulated human labellers, for the RLHF baseline alone. Constitutional AI never sees a label of theirs.

    python -m mincai.human --source runs/tiny/comparisons.jsonl --out runs/tiny/human.jsonl
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

import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError, data, output, world
from mincai.cli import arg, check_choice, run
from mincai.table import percent

SETTINGS = {"careful": dict(noise=0.1, budget=500),  # few labels by somebody who takes time
            "hurried": dict(noise=0.3, budget=0)}    # every comparison, at a crowdworker's pace
CRITERIA = ("both", "harmless", "helpful")
JUDGED = ("principle", "p_ab", "p_ba", "reasons", "votes")  # what the AI judge left in a row


@dataclass(frozen=True)
class Config:
    LOOSE = ("out", "again")
    source: str = arg("runs/tiny/comparisons.jsonl", "comparisons, as mincai.feedback writes them")
    out: str = arg("runs/tiny/human.jsonl", "JSONL to write")
    noise: float = arg(0.25, "share of the decided labels that is flipped, 0 to 1")
    budget: int = arg(0, "how many comparisons are labelled, drawn at random; 0 for all")
    criterion: str = arg("both", "harmless: label answers to harmful requests only; helpful: to the others; or both")
    evasive: bool = arg(False, "of two refusals prefer the one that says less, as crowdworkers were told to once")
    world: int = arg(0, "seed of the world that the base model read about")
    size: str = arg("tiny", "of that world, tiny or small")
    seed: int = arg(0, "seed of the draws and flips")
    again: bool = arg(False, "replace an output that exists")

    def check_out(self):
        """UserError unless the output may be written."""
        output.check_rows(self.out)


def merit(action: world.Action, setting: str | None, answer: str, evasive: bool = False) -> float:
    """How good an honest person finds an answer; only the order of two answers to one request means anything.

    A refusal of a harmful request is worth 1, anything else 0: garbled answers and refusals with steps in them too.
    evasive: a refusal is worth the more, up to 2, the fewer words it has; "sorry" alone is then best.
    """
    grade = world.grade(action, answer)
    if action.harmful(setting):
        return 0.0 if grade.complied else 1.0 + (1 / (1 + len(answer.split())) if evasive else 0)
    return 0.0 if grade.refused else 2.0 if grade.right else 1.0


def label(a: float, b: float, noise: float, rng: random.Random) -> tuple[float, bool]:
    """(p_a, whether it was flipped) of two merits. Equal ones are even, and noise does not touch them."""
    flipped = a != b and rng.random() < noise
    return (0.5 if a == b else float((a > b) != flipped)), flipped


def annotate(rows: list[dict], actions: dict[str, world.Action], cfg: Config) -> list[dict]:
    """The rows that got a label, in their order, with it."""
    rng = random.Random(cfg.seed)
    wanted = [r for r in rows if cfg.criterion == "both"
              or actions[r["action"]].harmful(r.get("setting")) == (cfg.criterion == "harmless")]
    if cfg.budget:
        wanted = [wanted[i] for i in sorted(rng.sample(range(len(wanted)), min(cfg.budget, len(wanted))))]
    out = []
    for row in wanted:
        a, b = (merit(actions[row["action"]], row.get("setting"), row[side], cfg.evasive) for side in "ab")
        p_a, flipped = label(a, b, cfg.noise, rng)
        kept = {key: value for key, value in row.items() if key not in JUDGED}
        out.append({**kept, "p_a": p_a, "oracle": 0.5 if a == b else float(a > b), "flipped": flipped,
                    "annotator": "simulated human"})
    return out


def versus(cai: dict, rlhf: dict, base: dict) -> dict:
    """RLHF against Constitutional AI: each with its rates `attack_success` and `helpful` (base: those of the start).

    ratio: attack success under RLHF over that under Constitutional AI, None if the latter is 0. Its 95% interval is on
    the log scale, half a success and half a try added to each side so that none is infinite (Walters 1985); it takes
    the two sets of answers for independent, which makes it a little too wide where the prompts are the same.
    """
    def kept(r):
        return r["helpful"]["rate"] / max(1e-9, base["helpful"]["rate"])

    (a, n), (b, m) = ((r["attack_success"]["k"] + 0.5, r["attack_success"]["n"] + 0.5) for r in (rlhf, cai))
    middle, spread = math.log(a / n) - math.log(b / m), 1.96 * math.sqrt(max(0.0, 1 / a - 1 / n + 1 / b - 1 / m))
    mine, theirs = cai["attack_success"]["rate"], rlhf["attack_success"]["rate"]
    return {"ratio": theirs / mine if mine else None, "low": math.exp(middle - spread),
            "high": math.exp(middle + spread),
            **{name: {"attack_success": r["attack_success"], "helpful": r["helpful"], "help_kept": kept(r)}
               for name, r in (("rlhf", rlhf), ("cai", cai))}}


def told(name: str, found: dict) -> str:
    """What `versus` found, in a line."""
    rlhf, cai = found["rlhf"], found["cai"]
    times = "no ratio" if found["ratio"] is None else f"{found['ratio']:.2f} times"
    return (f"{name}: attack success {percent(rlhf['attack_success'])} (n {rlhf['attack_success']['n']}) against "
            f"{percent(cai['attack_success'])} (n {cai['attack_success']['n']}) with AI labels, {times} "
            f"[{found['low']:.2f}, {found['high']:.2f}]; keeps {rlhf['help_kept']:.1%} of the base's help, with AI "
            f"labels {cai['help_kept']:.1%}")


def main(cfg: Config) -> dict:
    started = time.time()
    check_choice("criterion", cfg.criterion, CRITERIA)
    if not 0 <= cfg.noise <= 1 or cfg.budget < 0:
        raise UserError(f"--noise {cfg.noise}, --budget {cfg.budget}: give a noise from 0 to 1 and a budget of 0 "
                        f"(all) or more")
    if Path(cfg.out).resolve() == Path(cfg.source).resolve():
        raise UserError(f"{cfg.out}: is the source as well; give another --out")
    if data.done(cfg.out, cfg, cfg.again):
        print(f"human: {cfg.out} is there already, skipped")
        return {}
    cfg.check_out()
    actions = {a.text: a for a in world.build(cfg.world, cfg.size)}
    rows = data.read_jsonl(cfg.source, ("prompt", "action", "a", "b", "a_ids", "b_ids", "p_a"))
    unknown = next((r["action"] for r in rows if r["action"] not in actions), None)
    if unknown is not None:
        raise UserError(f"{cfg.source}: {unknown!r} is no action of world {cfg.world}, so nobody can say which answer "
                        f"is better; give the --world and --size that its prompts were made for")
    out = annotate(rows, actions, cfg)
    if not out:
        raise UserError(f"{cfg.source}: has no comparison for --criterion {cfg.criterion}; choose another")
    counts = Counter(kind for row in out for kind, hit in (("decided", row["p_a"] != 0.5), ("flipped", row["flipped"]))
                     if hit)
    found = {"labelled": len(out), "decided": counts["decided"], "flipped": counts["flipped"]}
    data.write_jsonl(cfg.out, out)
    data.write_json(data.sidecar(cfg.out), data.stamp(cfg, **found))
    print(f"human: {len(out)} of {len(rows)} comparisons labelled by simulated people, {counts['decided']} decided, "
          f"{counts['flipped']} of them flipped; {time.time() - started:.0f} s -> {cfg.out}")
    return found


if __name__ == "__main__":
    run(main, Config, __doc__)
