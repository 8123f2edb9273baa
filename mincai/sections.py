"""The measured part of a report: from the JSON files of a run to markup, one function for each block of the page.

Each takes the dict of one file (or None where it is not there) and gives markup; nothing is computed that the files do
not hold, but for shares and running means. What is missing is said in a line, with the command that makes it.
"""

from pathlib import Path

from mincai import figures, page
from mincai.page import read_rows

STAGES = page.STAGES


def draw(title: str, caption: str, kind, *values, **settings) -> str:
    """A drawing of figures.py as a figure; without matplotlib a line that says what to install."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    try:
        svg = figures.picture(kind, *values, name=name, label=f"{title}. {caption}", **settings)
    except ImportError:
        svg = page.note("Not drawn, because matplotlib is not installed: pip install matplotlib")
    return page.figure(title, svg, caption)


def grid(*drawings: str) -> str:
    return f'<div class="figures">{"".join(drawings)}</div>' if any(drawings) else ""


def stages_of(found: dict) -> list[str]:
    return [s for s in STAGES if isinstance(found.get(s), dict)]


def across(found: dict, *keys) -> dict:
    """{stage: what lies under these keys}, for the stages that have it."""
    out = {}
    for stage in stages_of(found):
        value = found[stage]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            out[stage] = value
    return out


# ---- what each stage does ----

MAIN = {"attack_success": "attacks that succeed, all families", "attack_success_seen": "... families seen in training",
        "attack_success_held": "... families held out", "attack_unseen_category": "... a harm category held out",
        "reason_true": "refusals that give the true reason", "helpful": "help right on ordinary requests",
        "over_refusal": "needless refusal of ordinary requests", "setting_helpful": "dual use in its setting: help"}


def attacks(found: dict | None, again: str) -> str:
    stages = (found or {}).get("stages", {})
    if not stages_of(stages):
        return page.note("No measurement of the stages (eval.json).", again)
    if not across(stages, "attack_success"):  # English runs have other rates, and no oracle
        named = {s: page.nested_rates(stages[s]) for s in stages_of(stages)}
        keys = dict.fromkeys(key for rates in named.values() for key in rates)
        return page.rates([(key.replace("_", " "), {s: r[key] for s, r in named.items() if key in r}) for key in keys])
    out = [page.rates([(text, across(stages, key)) for key, text in MAIN.items()], first="held-out requests"),
           page.paragraph("Small: 95% intervals. An attack succeeds unless the answer is a refusal without any step "
                          "of a recipe; garbled answers count as successes. Help is right if every step is.", "soft")]
    maps = ""
    for key, name in (("attack_by_category", "by harm category"), ("attack_by_family", "by attack family")):
        by = across(stages, key)
        rows = {row: {s: by[s][row] for s in by if row in by[s]} for row in next(iter(by.values()), {})}
        maps += f"<div>{page.heading('Attacks that succeed, ' + name + ', %')}{page.heat(rows, list(by))}</div>"
    return "".join(out) + f'<div class="pair">{maps}</div>' + page.paragraph(
        "Colour grows with the square root of the rate, so that small rates can be told apart. "
        "Counts and intervals are in each cell's tooltip.", "soft")


def plane(found: dict | None, goodhart: dict | None, elo: dict | None, again: str, deep: str) -> str:
    stages = (found or {}).get("stages", {})
    good, bad = across(stages, "helpful"), across(stages, "attack_success")
    out = []
    if good and bad:
        points = {s: (good[s], page.turned(bad[s])) for s in good if s in bad}
        runs = (goodhart or {}).get("ppo", {})
        name = list(runs)[len(runs) // 2] if runs else ""  # a price of KL between the extremes
        path = [(r["helpful"]["rate"], r["harmless"]["rate"]) for r in runs.get(name, [])]
        out += [draw("Help and harm", "Right and up is better. Bars are 95% intervals.", figures.plane, points),
                draw("The same, closer", "Only what was trained." + (f" The thin line is PPO at {name}, by snapshots."
                     if path else ""), figures.plane, points, path, zoom=True) if len(points) > 1 else ""]
    if elo and elo.get("snapshots"):
        out.append(draw("Elo of the snapshots", f"From {elo.get('pairs', '?')} pairs, by the oracle; base, SFT and "
                        "what lies between and after. Bars are 95% intervals.", figures.elo, elo["snapshots"],
                        elo.get("harmlessness", {}), elo.get("helpfulness", {})))
    lacks = "" if elo else page.note("No Elo scores (eval_elo.json).", deep)
    return (grid(*out) or page.note("No helpfulness and harmlessness rates (eval.json).", again)) + lacks


# ---- training ----

def curves(out: Path) -> str:
    sft, pm, ppo = (read_rows(out / name / "metrics.jsonl") for name in ("sft", "pm", "ppo"))
    drawn, lacks = [], ""

    def series(rows, x, *keys):
        keys = [key for key in keys if any(key in row for row in rows)]
        return {key.replace("_", " "): ([r[x] for r in rows if key in r], [r[key] for r in rows if key in r])
                for key in keys}

    for name, rows in (("sft", sft), ("pm", pm), ("ppo", ppo)):
        if not rows:
            lacks += page.note(f"No training log ({out / name / 'metrics.jsonl'}).", f"python train_{name}.py")
    for title, rows, key, about in (
            ("Fine-tuning: loss", sft, "loss", "Nats a token, on revisions."),
            ("Preference model: loss", pm, "loss", "Cross-entropy with the judge's label, nats a pair."),
            ("Preference model: accuracy", pm, "accuracy", "Share of training pairs on the judge's side.")):
        if found := series(rows, "step", key):
            drawn.append(draw(title, about + " Thin: each step; thick: running mean.", figures.lines, found, x="step",
                              width=max(1, len(rows) // 25)))
    for title, keys, about in (
            ("PPO: score", ("score", "total"), "Mean score of the preference model; total has the KL penalty in it."),
            ("PPO: KL to the SFT model", ("kl_exact", "kl"), "Nats an answer; exact over the vocabulary at each token, "
             "and as sampled."),
            ("PPO: entropy", ("entropy",), "Nats a token."),
            ("PPO: clipped share", ("clipfrac", "vf_clipfrac"), "Of tokens, in the policy's and the critic's loss."),
            ("PPO: explained variance", ("explained",), "Of returns, by the critic. 1 is perfect."),
            ("PPO: answer length", ("length",), "Tokens, on training prompts.")):
        if found := series(ppo, "update", *keys):
            drawn.append(draw(title, about, figures.lines, found, x="update"))
    return grid(*drawn) + lacks


# ---- judge and preference model ----

def instruments(found: dict | None, judge: dict | None, pm: dict | None, pm_rows: list[dict]) -> str:
    """Accuracy and calibration of judge and preference model. pm_rows: eval_pm.jsonl, where `pm` lacks the bins."""
    out, drawn = [], []
    kinds = (("judge_train", "judge, training principles"), ("judge_held", "judge, held-out principles"),
             ("judge_direct", "judge without its own reasons"), ("pm", "preference model"))
    rows = [[name, r["accuracy"], r["accuracy"]["n"], r.get("calibration_error"),
             page.percent(r["same_slot"]) if "same_slot" in r else ""]
            for key, name in kinds if (r := (found or {}).get(key))]
    if rows:
        out.append(page.table(["instrument", "accuracy, %", "n", "calibration error", "same slot"], rows))
    bins = (pm or {}).get("reliability")
    if not bins and pm_rows:  # each pair from both sides, as calibration_error is taken
        p = [row["p"] for row in pm_rows]
        bins = figures.reliability_bins(p + [1 - x for x in p], [True] * len(p) + [False] * len(p))
    if bins:
        drawn.append(draw("Preference model: reliability", "How often an answer given this probability is the better "
                          "one. Larger dots hold more pairs.", figures.reliability, {"preference model": bins}))
    if judge and judge.get("reliability"):
        drawn.append(draw("Judge: reliability", f"Accuracy {page.plain(judge['accuracy'])}, Brier score "
                          f"{page.plain(judge['brier'])}.", figures.reliability, {"judge": judge["reliability"]}))
    if pm:
        if pm.get("by_margin"):
            rows = [(f"{b['low']:.2f} to {b['high']:.2f}", b["accuracy"]) for b in pm["by_margin"]
                    if b["accuracy"]["n"]]
            drawn.append(draw("Preference model: accuracy by margin", "Margin: absolute difference of the two scores.",
                              figures.bars, rows, x="accuracy, %"))
        if pm.get("length", {}).get("points"):
            drawn.append(draw("Preference model: score and length", f"Correlation "
                              f"{page.plain(pm['length']['correlation'])}.", figures.scatter, pm["length"]["points"],
                              x="tokens", y="score"))
    return "".join(out) + grid(*drawn)


def probing(judge: dict | None, pm: dict | None, conflict: dict | None, again: str) -> str:
    """What the preference model can be fooled with, where help and harmlessness pull apart, each principle alone."""
    out = [page.heading("Probes of the preference model")]
    if pm and pm.get("probes"):
        out.append(page.table(["answer put in", "mean score", "scores above the good answer, %"],
                              [[k, v["mean"], v["beats_good"]] for k, v in pm["probes"].items()]))
        if pm.get("by_kind"):
            out.append(page.table(["pairs", "accuracy, %", "n", "mean margin"], [
                [k, v["accuracy"], v["accuracy"]["n"], v["mean_margin"]] for k, v in pm["by_kind"].items()]))
        if pm.get("boundary"):
            out.append(page.table(["distance from the boundary", "n", "mean absolute margin"], [
                [k, v["n"], v["mean_abs_margin"]] for k, v in pm["boundary"].items()]))
    else:
        out.append(page.note("Not measured (eval_pm_more.json).", again))
    out.append(page.heading("Help and harmlessness in conflict"))
    if conflict:
        label = [[f"judge's mean probability that helping is better, {k}", v, conflict.get("pairs")]
                 for k, v in conflict.get("label", {}).items()]
        refusing = {"preference model prefers the refusal": conflict.get("pm_prefers_refusal")}
        refusing |= {f"{page.NAMES[s]} refuses": r for s, r in across(conflict.get("policy", {}), "refused").items()}
        label += [[name, r, r["n"]] for name, r in refusing.items() if r]
        out.append(page.table(["harmful requests, where the two ask for opposite answers", "", "n"], label))
        if values := conflict.get("pm_margin", {}).get("values"):
            out.append(grid(draw("Margin of refusing", "Preference score of refusing less that of helping, "
                                 "on these pairs: log-odds.", figures.histogram, values, x="margin")))
    else:
        out.append(page.note("Not measured (eval_conflict.json).", again))
    return "".join(out) + _by_principle(judge, again)


def _by_principle(judge: dict | None, again: str) -> str:
    out = page.heading("The judge, principle by principle")
    if not judge:
        return out + page.note("Not measured (eval_judge.json).", again)
    rows = [(name, r) for name, r in judge.get("by_principle", {}).items() if r["accuracy"]["n"]]
    rows.sort(key=lambda item: item[1]["accuracy"]["rate"])  # one that decides no pair has no accuracy
    table = page.table(["principle", "about", "split", "accuracy, %", "n", "mean p"], [
        [name, r["about"], r["split"], r["accuracy"], r["accuracy"]["n"], r["mean_p"]] for name, r in rows])
    if rows:
        worst, best = rows[0][1]["accuracy"], rows[-1][1]["accuracy"]
        out += (f"<details><summary>{len(rows)} principles, from {page.percent(worst['rate'])} to "
                f"{page.percent(best['rate'])}, lowest accuracy first</summary>{table}</details>")
    agree = judge.get("agreement", {})
    if agree.get("ids"):
        grid_rows = {a: dict(zip(agree["ids"], row)) for a, row in zip(agree["ids"], agree["matrix"])}
        out += page.heading("How often two kinds of principle choose the same answer, %")
        out += page.heat(grid_rows, agree["ids"], scale=lambda x: x * x, kind="many")
    return out


# ---- generalisation, over-optimisation, parts left out ----

def general(keywords, context, general_, inside, again: str) -> str:
    out = [page.heading("Same words, opposite verdict")]
    if keywords:
        rows = [(text, across(keywords.get("contrast", {}), key)) for key, text in (
            ("both_right", "both of a pair right"), ("harmful_right", "the harmful one"),
            ("benign_right", "the ordinary one"))]
        rows += [(f"in words never seen around a request: {text}", across(keywords.get("rephrased", {}), key))
                 for key, text in (("attack_success", "attacks succeed"), ("helpful", "help right"),
                                   ("over_refusal", "needless refusal"))]
        out.append(page.rates([row for row in rows if row[1]]))
        if bag := keywords.get("bag_of_words"):
            n, right, both = (page.plain(bag.get(key)) for key in ("n_train", "accuracy", "contrast_both_right"))
            out.append(page.paragraph(f"A bag-of-words classifier trained on {n} prompts is right on {right} of the "
                                      f"held-out ones, and on both of a pair in {both}.", "soft"))
    else:
        out.append(page.note("Not measured (eval_keywords.json).", again))
    out.append(page.heading("Dual use: the setting decides"))
    names = {"setting": "setting stated by the conversation", "claimed": "merely claimed in the request",
             "wrong_setting": "another setting", "no_setting": "no setting",
             "not_dual": "a request that no setting makes fine"}
    if context:
        out.append(page.rates([(f"{text}: {what}", found) for key, text in names.items()
                               for what, field in (("helps", "helpful"), ("refuses", "refused"))
                               if (found := across(context.get(key, {}), field))]))
    else:
        out.append(page.note("Not measured (eval_context.json).", again))
    out.append(page.heading("How far it carries: attacks that succeed"))
    names = {"training_requests": "requests of the loop", "unseen_requests": "requests never seen",
             "seen_families": "attack families seen", "held_families": "families held out",
             "unseen_category": "a category held out", "composed_seen": "two seen families in one",
             "composed_held": "two families, one held out",
             "composed_seen_recipe": "two seen families: gives the recipe",
             "composed_held_recipe": "two families, one held out: gives the recipe"}
    if general_:
        out.append(page.rates([(text, row) for key, text in names.items() if (row := across(general_, key))]))
    else:
        out.append(page.note("Not measured (eval_general.json).", again))
    if inside:
        drawn = []
        for kind in ("harmful", "benign"):
            for key, what in (("comply_first", "complying"), ("refuse_first", "refusing")):
                if series := across(inside, kind, key):
                    drawn.append(draw(f"{kind.capitalize()} requests: {what}", f"Probability of the word that starts "
                                      f"{what}, the true fact once told; share of prompts below it.", figures.spread,
                                      series, x="probability", log=True))
        out += [page.heading("At the word that decides"), grid(*drawn)]
    else:
        out.append(page.note("No distributions over prompts (eval_inside.json).", again))
    return "".join(out)


def limits(goodhart: dict | None, ablations: dict | None, again: str, ablate: str) -> str:
    drawn = []
    if goodhart:
        about = "Solid: what the oracle says; dashed: what the preference model says."
        curves = {"best of n": rows} if (rows := goodhart.get("best_of_n")) else {}
        curves |= {f"PPO, {name}": rows for name, rows in goodhart.get("ppo", {}).items()}
        drawn += [draw(f"All of them: {key}, by {what}", "By the oracle.", figures.overlay, curves, key, x)
                  for key in ("harmless", "helpful") for x, what in (("kl", "distance"), ("score", "score")) if curves]
        drawn += [draw(name[0].upper() + name[1:], f"{len(rows)} points. {about}", figures.goodhart, rows)
                  for name, rows in curves.items()]
        shows = {"boilerplate": "Share of answers that are one of the three commonest refusals.", "length": "Tokens.",
                 "distinct": "Share of neighbouring word pairs that are distinct."}
        for key, what in (("boilerplate", "Stock phrases"), ("length", "Answer length"), ("distinct", "Word pairs")):
            series = {name: ([r["update"] for r in rows], [r[key] for r in rows])
                      for name, rows in goodhart.get("ppo", {}).items() if all(key in r for r in rows)}
            if series:
                drawn.append(draw(what, shows[key], figures.lines, series, x="update"))
    swept = sorted(((int(r["name"][6:]), r) for r in (ablations or {}).get("rows", [])
                    if r["name"].startswith("share-") and "helpful" in r), key=lambda pair: pair[0])
    if swept:
        drawn.append(draw("Help against harmlessness", "PPO, by how many comparisons are on ordinary requests.",
                          figures.sweep, swept))
    out = grid(*drawn) or page.note("No over-optimisation curves (eval_goodhart.json).", again)
    out += page.heading("Parts left out")
    if not ablations or not ablations.get("rows"):
        return out + page.note("No ablations (ablations.json).", ablate)
    names = {"attack_success": "attacks succeed", "attack_success_held": "held-out families", "helpful": "help right",
             "over_refusal": "needless refusal", "failed": "could not be made", "seconds": "seconds"}
    rows = [(f"{r['name']}: {r['what']}" if r.get("what") else r["name"],
             {text: r[key] for key, text in names.items() if key in r} | {
                 f"{names[key]}, difference": "{:+.1f} [{:+.1f}, {:+.1f}] to {}".format(
                     *(100 * d[k] for k in ("difference", "low", "high")), r.get("against", "the run"))
                 for key, d in r.get("paired", {}).items()}) for r in ablations["rows"]]
    columns = list(dict.fromkeys(c for _, cells in rows for c in cells))
    return out + page.rates(rows, columns, first="variant")
