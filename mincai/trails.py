"""What a report shows of single prompts: whole trails through the loop, token probabilities, and answers that failed.

Everything is drawn at random by a seed, never picked by hand. Data only; page.py makes it markup.
"""

import math
import random
from types import SimpleNamespace

from mincai import constitution, corpus, measure, world
from mincai.logprobs import answer_logp

# For a run that was never evaluated; otherwise eval.json says what it was measured with.
DEFAULTS = {"base": "data/tiny", "prompts": "data/tiny/prompts_eval.jsonl", "constitution": str(constitution.PATH),
            "temperature": 1.0, "judged": 240, "max_new": 104, "world": 0, "size": "tiny"}


def open_models(cfg, settings: dict, device) -> measure.Run:
    """The run with the settings that it was evaluated with; cfg's own base, prompts, constitution, where given, win.
    Raises UserError where models, prompts or the tiny world are not there."""
    known = {k: settings.get(k, default) for k, default in DEFAULTS.items()}
    known |= {k: getattr(cfg, k) for k in ("base", "prompts", "constitution") if getattr(cfg, k)}
    return measure.open_run(SimpleNamespace(out=cfg.out, seed=cfg.seed, batch_size=cfg.batch_size, **known), device)


# ---- token by token ----

def strips(opened: measure.Run, number: int, seed: int) -> list[dict]:
    """For `number` held-out harmful prompts, of different attack families as far as there are: {"prompt", "attack",
    "answers": {what: {stage: [(token's text, probability), ...]}}}.

    Two answers to each prompt, the same for all stages: the base model's own complying one, and a refusal with its
    true reason. The last token is the end of the text.
    """
    rng, families = random.Random(seed), {}
    for row in rng.sample(opened.split("eval"), len(opened.split("eval"))):
        families.setdefault(row["attack"], []).append(row)
    rounds = [some[i] for i in range(number) for some in families.values() if i < len(some)][:number]
    tokenizer, out = opened.tokenizer, []
    for row in rounds:
        action = opened.actions[row["action"]]
        texts = {"complying": world.comply(action, sure_first=corpus.sure_first(row["prompt"])),
                 "refusing": world.refuse(action)}
        prompt = tokenizer.encode(constitution.dialogue(row["prompt"], row.get("setting")))
        answers = {what: tokenizer.encode(" " + text) + [tokenizer.eot] for what, text in texts.items()}
        found = {what: {} for what in texts}
        for stage in opened.folders:
            logps = answer_logp(opened.model(stage), [prompt] * len(answers), list(answers.values()))
            for (what, ids), logp in zip(answers.items(), logps):
                words = ["(end)" if i == tokenizer.eot else tokenizer.decode([i]) for i in ids]
                found[what][stage] = [(w, math.exp(x)) for w, x in zip(words, logp.tolist())]
        out.append({"prompt": row["prompt"], "attack": row["attack"], "answers": found})
    return out


# ---- trails ----

def choose(revisions: list[dict], comparisons: list[dict], number: int, seed: int) -> list[dict]:
    """`number` prompts that went through both phases, half of them harmful as far as there are, at random:
    {"revision": row, "comparison": row or None}. Of the judged pairs on a prompt the most decided is shown."""
    by_prompt = {}
    for row in comparisons:
        held = by_prompt.get(row["prompt_id"])
        if held is None or abs(row["p_a"] - 0.5) > abs(held["p_a"] - 0.5):
            by_prompt[row["prompt_id"]] = row
    rng, kinds, seen = random.Random(seed), {}, set()
    for row in rng.sample(revisions, len(revisions)):
        if row["id"] not in seen and (row["id"] in by_prompt or not by_prompt):
            seen.add(row["id"])
            kinds.setdefault(row["kind"], []).append(row)
    turns = [some[i] for i in range(number) for _, some in sorted(kinds.items()) if i < len(some)][:number]
    return [{"revision": row, "comparison": by_prompt.get(row["id"])} for row in turns]


def answer(opened: measure.Run, chosen: list[dict]) -> None:
    """Adds to each trail "answers": {stage: {"text", "verdict", "score"}}, sampled now, where the world knows its
    action. Scores are the preference model's; the difference of two on one prompt is a log-odds. Changes `chosen`."""
    some = [t for t in chosen if t["revision"].get("action") in opened.actions]
    if not some:
        return
    rows = [{k: t["revision"].get(k) for k in ("prompt", "setting", "action", "kind")} for t in some]
    for stage in opened.folders:
        graded = measure.answer_all(opened.model(stage), opened.tokenizer, rows, opened.actions, opened.cfg,
                                    f"trails, answers of {stage}")
        scores = [None] * len(rows)
        if opened.pm() is not None:
            scores = measure.pm_scores(opened.pm(), opened.tokenizer, rows, [g["answer"] for g in graded],
                                       opened.cfg.batch_size)
        for t, g, score in zip(some, graded, scores):
            t.setdefault("answers", {})[stage] = {"text": g["answer"], "verdict": verdict(g), "score": score}


def verdict(graded: dict) -> str:
    """One or two words of the oracle on an answer."""
    if graded["refused"]:
        return "refuses, true reason" if graded["true_reason"] else "refuses"
    return "helps, right" if graded["right"] else "complies, wrong or garbled"


# ---- failures ----

def failures(samples: list[dict], stage: str, number: int, seed: int) -> dict[str, dict]:
    """What went wrong in a stage's held-out answers: kind -> {"total", "of", "shown": rows drawn by the seed}."""
    mine = [s for s in samples if s["stage"] == stage]
    harmful = [s for s in mine if s["split"] in ("eval", "unseen-category")]
    twins = [s for s in mine if s["split"] == "eval-twin"]
    kinds = {"complied with a harmful request": (harmful, lambda s: s["complied"]),
             "refused an ordinary request": (twins, lambda s: s["refused"]),
             "answered, but with a wrong recipe": (twins, lambda s: not s["refused"] and not s["right"])}
    rng, out = random.Random(seed), {}
    for name, (rows, hit) in kinds.items():
        some = [s for s in rows if hit(s)]
        out[name] = {"total": len(some), "of": len(rows), "shown": rng.sample(some, min(number, len(some)))}
    return out
