"""One file that shows a whole run: what was measured, how it trained, and single prompts from request to last answer.

    python -m mincai.report runs/tiny

Reads what the other stages left in the run folder and writes report.html there: a page that stands alone, with nothing
to fetch. What is not there is left out with a line that says how to make it. Trails, token probabilities and
the answers on them are sampled when the page is written, by the seed; every other figure is read from a file.
"""

import datetime
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError, output, page, sections, trails
from mincai.claims import UNITS
from mincai.cli import arg, pick_device, run, set_threads
from mincai.page import NAMES, STAGES, percent, read_json, read_rows

WRITTEN = "Written by python -m mincai.report"  # every page says so at its foot
VERDICTS = {"reproduced": "good", "not": "bad", "partly": "", "not testable": ""}  # and the looks of their chips
SECTIONS = ("keywords", "context", "general", "inside", "judge", "conflict", "pm_more", "goodhart", "elo")


@dataclass(frozen=True)
class Config:
    out: str = arg("runs/tiny", "the run folder; gets report.html")
    base: str = arg("", "the model that the run started from (default: what eval.json says, or data/tiny)")
    prompts: str = arg("", "held-out prompts (default: what eval.json says)")
    constitution: str = arg("", "the principles (default: what eval.json says)")
    trails: int = arg(36, "prompts to follow through the loop")
    strips: int = arg(4, "held-out prompts to show token by token")
    failures: int = arg(6, "failed answers to show of each kind")
    models: bool = arg(True, "open the models; without, trails have no final answers and no tokens are shown")
    seed: int = arg(0, "seed of what is drawn")
    batch_size: int = arg(128, "rows sampled together")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")


# ---- the top of the page ----

def header(out: Path, found: dict | None, titles: dict[str, str]) -> str:
    stamp = []
    if found:
        day = datetime.date.fromtimestamp((out / "eval.json").stat().st_mtime).isoformat()
        settings = found.get("config", {})
        stamp = [("seed", found.get("seed")), ("measured", found.get("date", day)), ("device", found.get("device")),
                 ("torch", found.get("torch")), ("commit", str(found.get("git") or "unknown")[:12]),
                 ("base model", settings.get("base")), ("prompts", settings.get("prompts"))]
    links = "".join(f'<a href="#{anchor}">{page.esc(title)}</a>' for anchor, title in titles.items())
    return (f'<header><p class="eyebrow">Constitutional AI, one run</p><h1>{page.esc(out.resolve().name)}</h1>'
            '<p class="lead">A language model that complies with everything revises itself under written principles, '
            "then is trained by its own judgements. This page shows what came of it, on requests that no stage "
            'trained on, and follows single prompts all the way through.</p><p class="stamp">'
            + "".join(f"<span>{page.esc(k)} <b>{page.esc(v)}</b></span>" for k, v in stamp) + "</p>"
            + headline(found, f"python -m mincai.evaluate {out}") + f"<nav>{links}</nav></header>")


def headline(found: dict | None, again: str) -> str:
    stages, numbers = (found or {}).get("stages", {}), (found or {}).get("headline", {})
    attack, cards = sections.across(stages, "attack_success"), []
    if not attack:
        return page.note("No headline numbers: eval.json is not there, or has no attack success.", again)
    for key, label, more in (
            ("sft_removed_attack_success_seen", "harmful outputs removed by phase 1",
             "of the base model's, on attack families seen in training"),
            ("ppo_removed_attack_success", "removed after both phases", "of the base model's, on all families"),
            ("ppo_help_kept", "help kept after both phases", "as a share of the base model's right answers")):
        if key in numbers:
            cards.append(page.card(label, percent(numbers[key]), more))
    parts = [(s, percent(r["rate"]), f"{NAMES[s]}, {r['k']} of {r['n']}; 95% interval {100 * r['low']:.1f} to "
              f"{100 * r['high']:.1f}") for s, r in attack.items()]
    return f'<div class="cards">{page.triple("attacks that succeed", parts)}{"".join(cards)}</div>'


def loop(out: Path, cfg: Config, found: dict | None, revisions: list[dict], comparisons: list[dict]) -> str:
    """The two phases as boxes, with this run's numbers."""
    stages = (found or {}).get("stages", {})

    def attack(stage):
        r = sections.across(stages, "attack_success").get(stage)
        return f"{percent(r['rate'])} of attacks succeed" if r else "not evaluated"

    def last(name, *keys):
        rows = read_rows(out / name / "metrics.jsonl")
        return [page.plain(rows[-1].get(key)) if rows else "?" for key in keys] + [len(rows)]

    first = second = ""
    if revisions:
        kinds = {row["id"]: row["kind"] for row in revisions}
        rounds = [step for row in revisions for step in row["rounds"]]
        kept = sum(bool(row["changed"]) for row in revisions)
        harmful = sum(kind == "harmful" for kind in kinds.values())
        loss, steps = last("sft", "loss")
        first = page.steps("Phase 1: critique and revise", [
            ("prompts", f"{len(kinds):,}", f"{harmful:,} harmful, {len(kinds) - harmful:,} ordinary; "
             f"{len(revisions):,} answers", "base"),
            ("critiques", f"{len(rounds):,}", "each under a principle drawn at random", ""),
            ("revisions made", f"{sum(s['outcome'] == 'revised' for s in rounds):,}", "the others keep the answer", ""),
            ("answers kept to learn from", f"{kept:,}", f"{percent(kept / len(revisions))} were revised at least once",
             ""),
            ("fine-tuned model", "SFT", f"{steps:,} steps, loss {loss}; {attack('sft')}", "sft")])
    if comparisons:
        settings = (read_json(out / "pm" / "run.json") or {}).get("config", {})
        edge = settings.get("contrast", 0.05)
        decided = sum(abs(row["p_a"] - 0.5) >= edge for row in comparisons)
        accuracy = (found or {}).get("pm", {}).get("accuracy")
        kl, score, updates = last("ppo", "kl_exact", "score")
        second = page.steps("Phase 2: AI feedback and PPO", [
            ("comparisons", f"{len(comparisons):,}", f"on {len({row['prompt_id'] for row in comparisons}):,} prompts, "
             "judged in both orders", ""),
            ("decided", percent(decided / len(comparisons)), f"{decided:,} with a label at least {edge} off 1/2", ""),
            ("preference model", percent(accuracy["rate"]) if accuracy else "?", "right on held-out pairs", ""),
            ("PPO updates", f"{updates:,}", f"KL {kl} nats an answer, score {score}", ""),
            ("final model", "PPO", attack("ppo"), "ppo")])
    lacks = "".join(page.note(f"No {name} ({out / name}.jsonl).", f"python -m mincai.{command}") for name, rows, command
                    in (("revisions", revisions, "critique"), ("comparisons", comparisons, "feedback")) if not rows)
    return first + second + lacks


def claims(found: dict | None, out: Path) -> str:
    """Each claim as a line with its verdict, which opens to its tests; a bare table for a file without tests."""
    if not found or not found.get("claims"):
        return page.note("No table of claims (claims.json).", f"python -m mincai.evaluate {out} --claims")
    head, lines = ["claim", "paper", "measured", "n", "seeds", "verdict", "note"], ""
    if not all(row.get("tests") for row in found["claims"]):
        return page.table(head, [[row.get(key) for key in head] for row in found["claims"]], (0, 1, 2, 6), VERDICTS)
    for row in found["claims"]:
        tests, of_paper = [], f"The paper {row['paper']}" if row.get("paper") else ""
        for t in row["tests"]:
            show, first = UNITS[t["unit"]].format, t["first"] or {}
            spread = f" ({show(t['min'])} to {show(t['max'])})" if len(t["values"]) > 1 else ""
            low = first.get("low")
            tests.append([t["name"].strip(), t["want"] and f"{t['want']} {show(t['line'])}{'*' * t['ours']}",
                          show(t["mean"]) + spread if t["values"] else "not measured",
                          "" if low is None else f"{show(low)} to {show(first['high'])}", first.get("n"), t["verdict"]])
        body = page.table(["figure", "the line", "mean over seeds (range)", "95%, first run", "n", ""], tests,
                          chips=VERDICTS)
        lines += page.fold(row["claim"], page.chip(row["verdict"], VERDICTS.get(row["verdict"], "")),
                           page.paragraph(of_paper) + body + page.paragraph(row.get("note") or "", "soft"))
    seeds = ", ".join(map(str, found.get("seeds", [])))
    return page.paragraph(f"Seeds {seeds}. {found.get('rule', '')}", "soft") + lines


# ---- single prompts ----

def token_strips(opened, cfg: Config, why: str) -> str:
    if opened is None:
        return page.note(f"Not shown: {why}.")
    out = page.paragraph("The same answer put into each model's mouth: a complying one as the base model gives it, and "
                         "a refusal with its true reason. The stronger the colour, the less likely that model was to "
                         "say this token next. Held-out harmful prompts, drawn at random.") + page.strip_legend()
    for row in trails.strips(opened, cfg.strips, cfg.seed):
        for i, (what, stages) in enumerate(row["answers"].items()):
            out += page.strip("" if i else row["prompt"], f"{row['attack']}; {what} answer", stages)
    return out


def trail(item: dict) -> str:
    row, pair, parts = item["revision"], item["comparison"], [("Phase 1",)]
    if row.get("setting"):
        parts.append(("setting", row["setting"]))
    parts.append(("first response", row["original"], "base"))
    for step in row["rounds"]:
        parts += [(f"round {step['round']}: principle", step["principle"]), ("critique", step["critique"]),
                  ("revision", step["revision"])]
    parts.append(("what SFT learnt from" if row["changed"] else "end, left out: no change", row["revision"], "sft"))
    if pair:
        parts += [("Phase 2: the most decided comparison on this prompt",), ("answer A", pair["a"]),
                  ("answer B", pair["b"]), ("principle", pair["principle"]), ("reasons", pair.get("reasons") or "none"),
                  ("A is better", f"p = {pair['p_a']:.4f}")]
    if item.get("answers"):
        parts.append(("What each stage answers now",))
        for stage, a in item["answers"].items():
            score = "" if a["score"] is None else f"; preference score {a['score']:+.2f}"
            parts.append((NAMES[stage], a["text"], stage, a["verdict"] + score))
    tags = [row["kind"], *([row["category"]] if row.get("category") else []), row.get("attack") or "plain"]
    return page.trail(row["kind"], row["prompt"], tags, parts)


def browse(opened, cfg: Config, revisions, comparisons, texts: dict[str, str], why: str) -> str:
    if not revisions:
        return page.note("No trails (revisions.jsonl).", "python -m mincai.critique")
    chosen = trails.choose(revisions, comparisons, cfg.trails, cfg.seed)
    for item in chosen:  # a principle is better read than its name
        for step in [*item["revision"]["rounds"], *filter(None, [item["comparison"]])]:
            step["principle"] = f"{texts.get(step['principle'], '')} ({step['principle']})".strip()
    out = page.paragraph(f"{len(chosen)} prompts of the loop, drawn at random with seed {cfg.seed}. These are training "
                         "prompts: the models have seen them, so what they answer here is no measurement.")
    if opened is None:
        out += page.note(f"Without the stages' answers: {why}.")
    else:
        trails.answer(opened, chosen)
        out += page.paragraph("Answers at the end of a trail are sampled now. The difference of two preference scores "
                              "on one prompt is the log-odds of the first being better.", "soft")
    kinds = sorted({item["revision"]["kind"] for item in chosen})
    return out + page.filters(kinds) + "".join(map(trail, chosen))


def failed(out: Path, cfg: Config) -> str:
    samples = read_rows(out / "eval_samples.jsonl")
    stage = next((s for s in reversed(STAGES) if any(row["stage"] == s for row in samples)), None)
    if stage is None or "complied" not in samples[0]:
        return page.note("No graded answers (eval_samples.jsonl).", f"python -m mincai.evaluate {out}")
    blocks = ""
    for kind, some in trails.failures(samples, stage, cfg.failures, cfg.seed).items():
        items = "".join(f'<li><p>{page.esc(s["prompt"])}</p><p class="{stage}">{page.esc(s["answer"])}</p>'
                        f'{page.chip(s["attack"])} {page.chip(s["category"]) if s["category"] else ""}</li>'
                        for s in some["shown"])
        blocks += (f"<div>{page.heading(NAMES[stage] + ' ' + kind)}<p class='soft'>{len(some['shown'])} of "
                   f"{some['total']} such answers, of {some['of']} prompts.</p><ul>{items}</ul></div>")
    return page.paragraph(f"Held-out prompts. Drawn at random with seed {cfg.seed}, not picked by hand.") + \
        f'<div class="fails">{blocks}</div>'


# ---- the whole ----

def build(cfg: Config, device) -> str:
    out = Path(cfg.out)
    again, found = f"python -m mincai.evaluate {out}", read_json(out / "eval.json")
    deep = f"{again} --deep"
    more = {name: read_json(out / f"eval_{name}.json") for name in SECTIONS}
    ablations = read_json(out / "ablations.json") or read_json(out.parent / "ablations.json")
    revisions, comparisons = read_rows(out / "revisions.jsonl"), read_rows(out / "comparisons.jsonl")
    opened, why, texts = None, "models were not to be opened (--no-models)", {}
    if cfg.models:
        try:
            opened = trails.open_models(cfg, (found or {}).get("config", {}), device)
            texts = {p.id: p.tiny for p in opened.principles}
        except UserError as error:
            why = str(error)
    body = [("loop", "The loop", loop(out, cfg, found, revisions, comparisons)),
            ("claims", "What is claimed", claims(read_json(out / "claims.json"), out)),
            ("attacks", "What gets through", sections.attacks(found, again)),
            ("plane", "Help and harm", sections.plane(found, more["goodhart"], more["elo"], again, deep)),
            ("general", "How far it carries", sections.general(
                more["keywords"], more["context"], more["general"], more["inside"], deep)),
            ("tokens", "Token by token", token_strips(opened, cfg, why)),
            ("judging", "Judge and preference model", sections.instruments(
                found, more["judge"], more["pm_more"], read_rows(out / "eval_pm.jsonl")) + sections.probing(
                more["judge"], more["pm_more"], more["conflict"], deep)),
            ("training", "Training", sections.curves(out)),
            ("limits", "Optimised too far, and parts left out", sections.limits(
                more["goodhart"], ablations, deep, f"{again} --ablations")),
            ("trails", "Prompts, all the way through", browse(opened, cfg, revisions, comparisons, texts, why)),
            ("failures", "What still goes wrong", failed(out, cfg))]
    titles = {anchor: title for anchor, title, _ in body}
    foot = page.paragraph(f"{WRITTEN} {out}, seed {cfg.seed}. Rates come with 95% Wilson "
                          "intervals." + (" The world is made up: no recipe here does any harm."
                                        if "world" in (found or {}).get("config", {}) else ""), "soft")
    return page.document(f"{out.resolve().name}: Constitutional AI, one run", header(out, found, titles),
                         *(page.section(*block) for block in body), f"<footer>{foot}</footer>")


def main(cfg: Config) -> Path:
    started, out = time.time(), Path(cfg.out)
    if not out.is_dir():
        raise UserError(f"{out}: no such run folder; make it with: python -m mincai --out {out}")
    path = out / "report.html"
    output.check_file(path, mark=WRITTEN)
    set_threads(cfg.threads)
    output.write_file(path, [build(cfg, pick_device(cfg.device))])
    print(f"report: {path.stat().st_size / 1e6:.1f} MB in {time.time() - started:.0f} s -> {path}")
    return path


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # `mincai.report runs/x` is `--out runs/x`
        sys.argv.insert(1, "--out")
    run(main, Config, __doc__)
