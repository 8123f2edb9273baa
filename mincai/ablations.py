"""What each part of the loop is worth: the run again with one thing changed, and the same held-out prompts for all.

    python -m mincai.evaluate runs/tiny --ablations

Each is made from RUN's files with RUN's settings in RUN/ablations/<name>/, cheap ones first, and skipped if finished.

- base, full, sft: the run's own stages (phase 1's variants are compared with sft, others with full); greedy: its mode.
- revisions-k: fine-tuned on what stood after k rounds of revision (Bai et al. 2022, 2212.08073, figure 5).
- direct: revisions without a critique (their figure 7). The base model has read no such text, so it may fail.
- principles-n: phase 1 under n principles, one a target in turn, harm and help first (their figure 6); 75 has the
  held-out ones too, and all training principles are what sft had.
- hard: labels rounded to 0 and 1. untrained: a preference model that has seen no label. share-p: p%
  of the comparisons are on ordinary requests, with equal totals.
- best-of-n: no PPO, but the best of n SFT samples by the preference model; hot: sampled as the comparisons were.
- rlhf-*: the same comparisons, labelled by simulated people (human.py) in the judge's place. HH-RLHF knows no phase 1:
  it starts from a model that helps with everything, so rlhf-base starts from the base model. But that never refuses,
  and PPO can only strengthen what is sampled; so the others start from RUN/sft, as AI labels do.
One sample a prompt, and one seed: intervals tell how well a rate is known on these prompts, not what a seed changes.
"""

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import train_pm
import train_ppo
import train_sft
from mincai import UserError, constitution, critique, data, elo, feedback, human, measure, output, red_team, world
from mincai.checkpoint import load
from mincai.sample import generate_batched
from mincai.table import percent, rate

OUTPUTS = {"critique": (critique.Config, "revisions.jsonl"), "sft": (train_sft.Config, "sft"),
           "feedback": (feedback.Config, "comparisons.jsonl"), "pm": (train_pm.Config, "pm"),
           "ppo": (train_ppo.Config, "ppo")}
PHASE1, PHASE2 = ("critique", "sft"), ("sft", "feedback", "pm", "ppo")  # what a variant of either needs of RUN
GENERAL = ("harm", "help", "reasons", "truth", "conduct")  # targets of principles that are no category of harm
SHARES, PRINCIPLES, BEST_OF = (0, 25, 50, 75, 100), (1, 4, 19), 16
ROWS = ("answers", "revisions", "comparisons", "human", "pairs")
WRITTEN = ("made.json", "constitution.json",  # by a variant, beside its checkpoints
           *(f"{rows}.{kind}" for rows in ROWS for kind in ("jsonl", "run.json")))
KEPT = ("id", "split", "attack", "category", "prompt", "answer", "complied", "right", "refused", "true_reason")


@dataclass(frozen=True)
class Work:
    opened: measure.Run
    cfgs: dict        # stage -> the Config that RUN's output was made with, made smaller by `scale`
    rows: list[dict]  # the prompts that every variant answers
    scale: float

    def place(self, name: str) -> Path:
        """An output in RUN, or the base model."""
        return Path(self.opened.cfg.base) if name == "base" else self.opened.out / name


@dataclass(frozen=True)
class Variant:
    name: str
    what: str
    against: str   # the row that it is compared with, "sft" or "full"; "" for none
    make: partial  # its folder -> its answers, graded


def recorded(opened: measure.Run, scale: float) -> dict:
    """The settings of each of RUN's stages that is there, for this machine and the places its files have now."""
    found = {}
    for stage, (Config, name) in OUTPUTS.items():
        path = opened.out / name
        side = data.sidecar(path) if path.suffix else path / "run.json"
        if not (path.exists() and side.exists()):
            continue
        try:
            made = measure.BEFORE.get(stage, {}) | json.loads(side.read_text(encoding="utf-8"))["config"]
            cfg = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in made.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{side}: does not record the settings of that stage ({error}); make it again") from None
        here = {"device": torch.device(opened.device).type, "threads": getattr(opened.cfg, "threads", 0),
                "again": False, "constitution": str(opened.cfg.constitution)}
        if "prompts" in made and not Path(made["prompts"]).exists():  # moved: they lie beside the held-out prompts
            here["prompts"] = str(Path(opened.cfg.prompts).with_name(Path(made["prompts"]).name))
        here |= {k: max(least, round(made[k] * scale)) for k, least in (("harmful", 4), ("helpful", 4), ("updates", 2),
                                                                        ("epochs", 1)) if scale < 1 and made.get(k)}
        found[stage] = replace(cfg, **{k: v for k, v in here.items() if k in made})
    return found


def ask(work: Work, policy: Path, folder: Path, **changes) -> list[dict]:
    """Every prompt answered once by this policy, and graded. Nothing has to be made, so `folder` is not used."""
    model, cfg = load(policy, work.opened.device), replace(work.opened.cfg, **changes)
    return measure.answer_all(model, work.opened.tokenizer, work.rows, work.opened.actions, cfg, "answers")


def tuned(work: Work, revisions: Path, folder: Path) -> list[dict]:
    out = str(folder / "sft")
    train_sft.main(replace(work.cfgs["sft"], base=str(work.place("base")), data=(str(revisions),), out=out))
    return ask(work, out, folder)


def reinforced(work: Work, pairs: Path, start: str, changes: dict, folder: Path) -> list[dict]:
    """Preference model, with these settings changed, and PPO on these pairs, from RUN/sft or from the base model."""
    start, pm, out = str(work.place(start)), str(folder / "pm"), str(folder / "ppo")
    train_pm.main(replace(work.cfgs["pm"], init=start, pairs=(str(pairs),), weights=(), out=pm, **changes))
    train_ppo.main(replace(work.cfgs["ppo"], sft=start, pm=pm, out=out))
    return ask(work, out, folder)


def truncated(rows: list[dict], rounds: int) -> list[dict]:
    """Revisions as they stood after the first `rounds` rounds."""
    out = []
    for row in rows:
        stood = [row["original"]] + [r["revision"] for r in row["rounds"][:rounds] if r["outcome"] == "revised"]
        out.append({**row, "rounds": row["rounds"][:rounds], "revision": stood[-1], "changed": stood[-1] != stood[0]})
    return out


def fewer_rounds(work: Work, rounds: int, folder: Path) -> list[dict]:
    data.write_jsonl(folder / "revisions.jsonl", truncated(data.read_jsonl(work.place("revisions.jsonl")), rounds))
    return tuned(work, folder / "revisions.jsonl", folder)


def revised_anew(work: Work, settings: dict, folder: Path) -> list[dict]:
    """Phase 1 with other settings of the critique stage. With "every" the held-out principles are used as well, which
    nothing here is measured under."""
    out, changes = folder / "revisions.jsonl", dict(settings)
    if changes.pop("every", False):
        rows = [dict(asdict(p), split="train") for p in work.opened.principles]
        changes |= dict(constitution=str(folder / "constitution.json"), only="", without="")
        data.write_json(changes["constitution"], {"principles": rows})
    critique.main(replace(work.cfgs["critique"], model=str(work.place("base")), out=str(out), **changes))
    return tuned(work, out, folder)


def nested(principles, number: int) -> list:
    """`number` principles, one a target in turn, general targets first; a smaller number's are among a larger one's."""
    targets = [*GENERAL, *sorted({p.target for p in principles} - {*GENERAL})]
    turns = [[p for p in principles if p.target == target] for target in targets]
    return [some[i] for i in range(len(principles)) for some in turns if i < len(some)][:number]


def with_people(work: Work, settings: dict, start: str, folder: Path) -> list[dict]:
    """RUN's comparisons, labelled by simulated people."""
    cfg, out = work.opened.cfg, folder / "human.jsonl"
    human.main(human.Config(source=str(work.place("comparisons.jsonl")), out=str(out), world=cfg.world, size=cfg.size,
                            seed=cfg.seed, **settings))
    return reinforced(work, out, start, {}, folder)


def mixed(rows: list[dict], share: float, rng: random.Random) -> list[dict]:
    """Comparisons of which `share` are on ordinary requests, as many whatever the share, prompt by prompt."""
    place = {prompt: rng.random() for prompt in sorted({r["prompt_id"] for r in rows})}
    rows = sorted(rows, key=lambda r: place[r["prompt_id"]])
    harmful, benign = ([r for r in rows if r["kind"] == kind] for kind in ("harmful", "benign"))
    total = min(len(harmful), len(benign))
    return harmful[:total - round(share * total)] + benign[:round(share * total)]


def with_share(work: Work, share: int, folder: Path) -> list[dict]:
    rows = data.read_jsonl(work.place("comparisons.jsonl"))
    data.write_jsonl(folder / "pairs.jsonl", mixed(rows, share / 100, random.Random(work.cfgs["feedback"].seed)))
    return reinforced(work, folder / "pairs.jsonl", "sft", {}, folder)


def best_of(work: Work, number: int, temperature: float, top_k: int, folder: Path) -> list[dict]:
    """Of `number` samples of RUN/sft to each prompt the one with the highest score."""
    opened, tokenizer, cfg = work.opened, work.opened.tokenizer, work.opened.cfg
    prompts = [tokenizer.encode(constitution.dialogue(r["prompt"], r.get("setting"))) for r in work.rows]
    found = generate_batched(opened.model("sft"), prompts, cfg.max_new, {tokenizer.eot}, cfg.batch_size, temperature,
                             top_k, torch.Generator().manual_seed(cfg.seed + 7), number, "samples")
    pairs = sorted({(i // number, constitution.clean(tokenizer.decode(ids))) for i, ids in enumerate(found)})
    scores = measure.pm_scores(opened.pm(), tokenizer, [work.rows[i] for i, _ in pairs], [text for _, text in pairs],
                               cfg.batch_size)  # most samples are alike, so each is scored once
    best = {i: text for _, (i, text) in sorted(zip(scores, pairs))}  # the last stays
    return [{**row, "answer": best[i], "complied": (g := world.grade(opened.actions[row["action"]], best[i])).complied,
             **vars(g)} for i, row in enumerate(work.rows)]


def variants(work: Work) -> list[Variant]:
    """All that RUN has the stages for: what the claims ask for, then the cheap ones first."""
    critic, drawn = (work.cfgs.get(s, OUTPUTS[s][0]()) for s in ("critique", "feedback"))
    usable = constitution.select(work.opened.principles, critic.only, critic.without)
    every, n, out = len(work.opened.principles), max(2, round(BEST_OF * work.scale)), []

    def add(name, what, against, needs, make, *args, **more):
        if set(needs) <= set(work.cfgs):
            out.append(Variant(name, what, against, partial(make, work, *args, **more)))

    add("base", "the base model", "", (), ask, work.place("base"))
    add("full", "both phases: the run itself", "", ("ppo",), ask, work.place("ppo"))
    add("sft", "phase 1 alone", "full", ("sft",), ask, work.place("sft"))
    add("greedy", "phase 1 alone, its likeliest tokens", "full", ("sft",), ask, work.place("sft"), temperature=0.0)
    for name, start in (*((name, "sft") for name in human.SETTINGS), ("careful", "base")):
        noise, budget = human.SETTINGS[name]["noise"], human.SETTINGS[name]["budget"] or "all"
        add(f"rlhf-{name if start == 'sft' else start}", f"from {start}, human labels in the AI's place: {budget} "
            f"comparisons, {noise:.0%} flipped", "full", PHASE2, with_people, human.SETTINGS[name], start)
    for k in range(1, critic.rounds):
        add(f"revisions-{k}", f"phase 1 on {k} of {critic.rounds} rounds of revision", "sft", PHASE1, fewer_rounds, k)
    add("direct", "phase 1 on revisions without critiques", "sft", PHASE1, revised_anew, dict(direct=True))
    for name, what, changes in (("hard", "preference model on labels rounded to 0 and 1", dict(hard=True)),
                                ("untrained", "preference model that has seen no label", dict(epochs=0))):
        add(name, what, "full", PHASE2, reinforced, work.place("comparisons.jsonl"), "sft", changes)
    for p in SHARES:
        add(f"share-{p}", f"{p}% of the comparisons on ordinary requests", "full", PHASE2, with_share, p)
    for k in (k for k in PRINCIPLES if k < len(usable)):
        add(f"principles-{k}", f"phase 1 under {k} of {len(usable)} training principles", "sft", PHASE1, revised_anew,
            dict(only=",".join(p.id for p in nested(usable, k)), without=""))
    add(f"principles-{every}", "phase 1 under all, held-out ones too", "sft", PHASE1, revised_anew, dict(every=True))
    for (heat, k), name in {(drawn.temperature, drawn.top_k): "-hot", (work.opened.cfg.temperature, 0): ""}.items():
        add(f"best-of-{n}{name}", f"no PPO: best of {n} SFT samples at temperature {heat:g}", "full", ("sft", "pm"),
            best_of, n, heat, k)
    return out


def stands_on(work: Work) -> dict:
    """Settings, and hashes of files: with other ones the variants would be others."""
    cfg, files = work.opened.cfg, {name: work.place(name) for name in ("base", *(name for _, name in OUTPUTS.values()))}
    files = {name: f / "model.safetensors" if f.is_dir() else f for name, f in files.items()}
    found = {s: {k: v for k, v in vars(c).items() if k not in ("again", *c.LOOSE)} for s, c in work.cfgs.items()}
    found |= {f"file {k}": hashlib.sha256(f.read_bytes()).hexdigest() for k, f in files.items() if f.exists()}
    found |= {k: getattr(cfg, k) for k in ("temperature", "max_new", "seed", "batch_size", "world", "size")}
    return json.loads(json.dumps({**found, "prompts": [r["id"] for r in work.rows], "scale": work.scale}))


def finished(folder: Path, variant: Variant) -> tuple[list[dict], dict]:
    """(answers, {"seconds"[, "failed"]}) of a variant, made if they are not there. One that cannot be made (no revision
    stands, all answers score the same) is a result as well: no answers, and why."""
    started, answers, failed = time.time(), [], {}
    if not (folder / "made.json").exists():
        try:
            answers = variant.make(folder)
        except UserError as error:
            failed = {"failed": str(error)}
        data.write_jsonl(folder / "answers.jsonl", [{k: row[k] for k in KEPT} for row in answers])
        data.write_json(folder / "made.json", {"seconds": round(time.time() - started), **failed})
    made = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    return ([] if "failed" in made else data.read_jsonl(folder / "answers.jsonl", KEPT)), made


def rates(mine: list[dict], others: list[dict]) -> dict:
    """Of a variant's answers; and the paired differences from another's, if there are any."""
    harmful = [a for a in mine if a["split"] == "eval"]
    found = {"attack_success": rate(a["complied"] for a in harmful),
             "attack_success_held": rate(a["complied"] for a in harmful if a["attack"] in red_team.HELD),
             "reason_true": rate(a["true_reason"] for a in harmful if a["refused"]),
             **{name: rate(a[key] for a in mine if a["split"] == "eval-twin")
                for name, key in (("helpful", "right"), ("over_refusal", "refused"))}}
    both = {name: [[a[key] for a in some if a["split"] == split] for some in (mine, others)] for name, split, key in (
        ("attack_success", "eval", "complied"), ("helpful", "eval-twin", "right"))}
    return found | ({"paired": {name: elo.paired(*pair) for name, pair in both.items()}} if others else {})


def main(opened: measure.Run, scale: float = 1.0) -> dict:
    """Makes and measures what is not there yet; the content of RUN/ablations.json, written after every variant.
    scale: share of prompts, updates and epochs, for a quick look and for tests. cfg.again makes all variants anew.
    """
    root, step = opened.out / "ablations", max(1, round(1 / scale))
    rows = [r for split in ("eval", "eval-twin") for r in opened.split(split)[::step]]
    work = Work(opened, recorded(opened, scale), rows, scale)
    todo, settings, known, answers = variants(work), stands_on(work), root / "run.json", {}
    if getattr(opened.cfg, "again", False) and known.exists():
        output.clear(root)
    if known.exists() and json.loads(known.read_text(encoding="utf-8"))["stands_on"] != settings:
        raise UserError(f"{root}: was made from other files or settings than {opened.out} has now; add --again")
    names = [f"{v.name}/{name}" for v in todo for name in WRITTEN]
    data.write_json(known, data.stamp(opened.cfg, stands_on=settings, files=["run.json", *names]))
    found = {**data.stamp(opened.cfg), "scale": scale, "prompts": len(rows), "rows": [], "versus_rlhf": {}}
    for number, variant in enumerate(todo, 1):
        print(f"\n[ablation {number}/{len(todo)}] {variant.name}: {variant.what}", flush=True)
        answers[variant.name], made = finished(root / variant.name, variant)
        row = {"name": variant.name, "what": variant.what, "against": variant.against, **made}
        if answers[variant.name]:
            row |= rates(answers[variant.name], answers.get(variant.against, []))
        found["rows"].append(row)
        by_name = {r["name"]: r for r in found["rows"] if "helpful" in r}
        if variant.name.startswith("rlhf-") and {variant.name, "full"} <= set(by_name):
            found["versus_rlhf"][variant.name] = human.versus(by_name["full"], row, by_name["base"])
        data.write_json(opened.out / "ablations.json", found | {"to_do": [v.name for v in todo[number:]]})
    print("\n".join(lines("ablations", found)))
    return found | {"to_do": []}


def lines(section: str, found: dict) -> list[str]:
    """The table, and what came of the comparison with RLHF."""
    out = ["", f"{'ablation':14}" + "".join(f" {h:>21}" for h in (
        "attack success", "help right", "needless refusal", "attacks, difference", "help, difference"))]
    for row in found["rows"]:
        cells = [percent(row[k]) for k in ("attack_success", "helpful", "over_refusal") if k in row] + [
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * r[k] for k in ("difference", "low", "high")))
            for r in row.get("paired", {}).values()] or [row["failed"]]
        out.append(f"{row['name']:14} " + " ".join(f"{c:>21}" for c in cells)
                   + (f" to {row['against']}" if "paired" in row else ""))
    return out + [human.told(name, r) for name, r in found["versus_rlhf"].items()]
