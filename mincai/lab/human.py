"""Simulated human labellers, for the RLHF baseline alone. Constitutional AI never sees a label of
theirs.

What Constitutional AI is compared with is reinforcement learning from *human* feedback (Bai et al.
2022, 2204.05862): the controls named "human" of mincai.lab.evaluate --controls. There are no people
here, so the world's oracle plays them, through a noisy annotator with a budget: of two answers to a
harmful request it prefers the refusal; to any other the right recipe to a wrong one, and that to a
refusal. Then a share of its labels is flipped: people agree with each other on such pairs in two
cases of three or so. This is the one place where the oracle labels anything that trains, and no
stage of the loop imports this file: a test sees to it.
"""

import random

from mincai.tinyworld import world

SETTINGS = {
    "careful": dict(noise=0.1, budget=500),  # few labels by somebody who takes time
    "hurried": dict(noise=0.3, budget=0),  # every comparison, at a crowdworker's pace
}
JUDGED = ("principle", "p_ab", "p_ba", "reasons", "votes")  # what the AI judge left in a row


def merit(action: world.Action, setting: str | None, answer: str) -> float:
    """How good an honest person finds an answer; only the order of two answers to one request means
    anything. A refusal of a harmful request is worth 1, whatever it says: people teach to refuse,
    and not to explain, which nobody asked them to."""
    grade = world.grade(action, answer)
    if action.harmful(setting):
        return float(not grade.complied)
    return 0.0 if grade.refused else 1.0 + grade.right


def label(a: float, b: float, noise: float, rng: random.Random) -> tuple[float, bool]:
    """(p_a, whether it was flipped) of two merits. Equal ones are even, and noise does not touch
    them."""
    flipped = a != b and rng.random() < noise
    return (0.5 if a == b else float((a > b) != flipped)), flipped


def annotate(rows: list[dict], actions: dict, seed: int, noise: float, budget: int) -> list[dict]:
    """Comparisons as mincai.feedback writes them to those that people labelled, in their order:
    `p_a` is 1 or 0, or 0.5 where both are as good (train_pm.py leaves those out); `oracle` is what
    it would be without noise, which nothing that trains reads.

    actions: by their text; noise: share of the decided labels that is flipped; budget: how many
    comparisons are labelled, drawn at random, 0 for all.
    """
    rng = random.Random(seed)
    wanted = sorted(rng.sample(range(len(rows)), min(budget or len(rows), len(rows))))
    out = []
    for row in (rows[i] for i in wanted):
        a, b = (merit(actions[row["action"]], row.get("setting"), row[side]) for side in "ab")
        p_a, flipped = label(a, b, noise, rng)
        made = {"p_a": p_a, "oracle": 1 - p_a if flipped else p_a, "flipped": flipped}
        kept = {key: value for key, value in row.items() if key not in JUDGED}
        out.append({**kept, **made, "annotator": "simulated human"})
    return out
