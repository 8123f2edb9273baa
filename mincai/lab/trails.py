"""What the report shows of a run's rows: one request followed through the loop, and the loop's
numbers.

A trail is not picked by hand, and not drawn either: it is the first of its kind in the files. Data
only; report.py makes it markup.
"""

from mincai import UserError

STEPS = ("prompts", "critiques, revisions", "fine-tuning", "comparisons", "preference model", "PPO")
DECIDED = 0.9  # how sure the judge has to be in both orders for a comparison to be an example


def decided(pair: dict) -> float:
    """How sure the judge was, in [0.5, 1], of the answer that it preferred in both orders; 0 if in
    each another."""
    a_first, a_second = pair["p_ab"], 1 - pair["p_ba"]
    agree = (a_first > 0.5) == (a_second > 0.5)
    return max(min(a_first, a_second), min(1 - a_first, 1 - a_second)) if agree else 0.0


def follow(revisions: list[dict], comparisons: list[dict], targets: dict, wanted="") -> tuple:
    """(row of revisions, row of comparisons or None): a harmful request whose answer was revised,
    and the comparison on it that shows most. ({}, None) where no harmful answer was revised.

    Shown is, of a request's comparisons, one under a principle on its own category or on reasons,
    decided in both orders; of the requests, the first that has such a one, else the one that comes
    nearest. targets: a principle's id to what it is about. wanted: a prompt's id, to follow that
    one, whatever came of it; UserError if it is not there.
    """

    def worth(row):
        if row is None:
            return False, -1.0
        fits = targets.get(row["principle"]) in (row.get("category"), "reasons")
        return fits, min(DECIDED, decided(row))

    pairs = {}
    for row in comparisons:
        pairs[row["prompt_id"]] = max(pairs.get(row["prompt_id"]), row, key=worth)
    shown = [r for r in revisions if r["kind"] == "harmful" and r["changed"]]
    some = [r for r in revisions if r["id"] == wanted] if wanted else shown
    if wanted and not some:
        why = "no request of this id was criticised; revisions.jsonl has the ids"
        raise UserError(f"--trail {wanted}: {why}")
    # max takes the first of those that are even
    best = max(some, key=lambda row: worth(pairs.get(row["id"])), default={})
    return best, pairs.get(best.get("id"))


def held_out(samples: list[dict], like: dict) -> list[tuple[dict, dict]]:
    """[(a row, {stage: its sample})] for one harmful and one ordinary request that no stage trained
    on.

    like: a row of revisions. The harmful one has its category and its attack family if there is
    such a one, else its category, else it is the first; the ordinary one has its attack family,
    else it is the first.
    """
    found = []
    for split in ("eval", "eval-twin"):
        rows = [s for s in samples if s.get("split") == split]
        if rows:
            alike = ("category", "attack")
            best = max(rows, key=lambda row: [row.get(key) == like.get(key) for key in alike])
            found.append((best, {s["stage"]: s for s in rows if s["id"] == best["id"]}))
    return found


def verdict(sample: dict) -> str:
    """What the oracle says of an answer (of English ones, what their phrases say), in a few
    words."""
    if "complied" not in sample:
        said = {True: "refuses, by its phrases", False: "does not refuse"}
        return said.get(sample.get("refuses"), "")
    if sample["kind"] != "harmful":
        if sample["refused"]:
            return "refuses needlessly"
        helps = "helps, whole and right"
        return helps if sample["right"] else "answers, but not whole or not right"
    if sample["complied"]:
        return "complies, or is garbled"
    offer = " and a true offer" if sample["true_offer"] else ""
    if sample["true_reason"]:
        return f"refuses with the true reason{offer}"
    return f"refuses {'evasively' if sample['evasive'] else 'without the true reason'}{offer}"


def facts(revisions, comparisons, sft: dict, pm: dict, ppo: dict, edge: float) -> list[tuple]:
    """(stage, its number, two lines on it) of the prompts and the five stages that learn from them.

    sft, pm, ppo: the metrics of their run.json, empty where they were not trained; edge: how far
    off 1/2 a label is to be if the preference model learns it.
    """
    found = dict.fromkeys(STEPS, ("not yet", []))

    def tell(stage, number, *lines):
        found[stage] = (number, list(lines))

    if revisions:
        kinds = {r["id"]: r["kind"] for r in revisions}
        harmful = sum(kind == "harmful" for kind in kinds.values())
        ordinary = len(kinds) - harmful
        tell("prompts", f"{len(kinds):,}", f"{harmful:,} harmful,", f"{ordinary:,} ordinary")
        revised = [r["outcome"] == "revised" for row in revisions for r in row["rounds"]]
        stand = f"{len(revised) - sum(revised):,} let stand"
        tell("critiques, revisions", f"{len(revised):,}", f"{sum(revised):,} revised,", stand)
    if sft:
        loss = f"{shown(sft['val_before'])} → {shown(sft['val_after'])}"
        tell("fine-tuning", loss, "loss a token, held out,", f"{sft['rows']:,} revisions learnt")
    if comparisons:
        n = len(comparisons)
        off = sum(abs(r["p_a"] - 0.5) >= edge for r in comparisons) / n
        same = sum((r["p_ab"] > 0.5) == (r["p_ba"] > 0.5) for r in comparisons) / n
        tell("comparisons", f"{n:,}", f"{off:.0%} decided,", f"{same:.0%} same slot twice")
    if pm:
        right, held = shown(pm.get("val_accuracy"), ".1%"), f"right of {pm['held']:,} held out,"
        tell("preference model", right, held, f"{pm['pairs']:,} pairs learnt")
    if ppo:
        score = f"{ppo['score_before']:+.2f} → {ppo['score_after']:+.2f}"
        nats = f"KL {ppo['kl_after']:.2f} nats an answer"
        tell("PPO", score, "score, in deviations,", nats)
    return [(stage, *told) for stage, told in found.items()]


def shown(value: float | None, form: str = ".2f") -> str:
    """A figure, or a dash where nothing was held out to measure it on."""
    return "–" if value is None else format(value, form)
