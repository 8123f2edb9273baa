"""What the run would be without its causes: the loop again with one of them taken away, on the same
held-out prompts.

    python -m mincai.lab.evaluate runs/tiny --controls

Each control is made from RUN's own files with RUN's own settings in RUN/controls/<name>/, and
skipped if it is there. A gain that is due to what the loop says it is due to has to go when that is
taken away. `kept` is the part of PPO's gain over phase 1 that is left, the mean over needless
refusals, true reasons and help: 1 is all of it, 0 none.

`controls` lists them. "human, no phase 1" is how reinforcement learning from human feedback began,
from a model that helps with everything. "beta 0, long" shows what PPO does to answers while their
score rises: reward over-optimisation (Gao et al. 2023, 2210.10760). One sample a prompt, and one
seed: intervals tell how well a rate is known on these prompts, not what a seed changes.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import train_pm
import train_ppo
import train_sft
from mincai import UserError, critique, feedback
from mincai.lab import human, measure
from mincai.lab.table import Table, as_text, rate
from mincai.plumbing import data, output
from mincai.plumbing.checkpoint import load, save

LEFT_OUT = "theft"  # the category that "no theft" knows nothing of
STAGES = {  # a stage's module, its output, and its settings that name places: inputs, by their outputs
    "critique": (critique, "revisions.jsonl", {"model": "base"}),
    "sft": (train_sft, "sft", {"model": "base", "data": ("revisions.jsonl",)}),
    "feedback": (feedback, "comparisons.jsonl", {"model": "sft", "judge": "base"}),
    "pm": (train_pm, "pm", {"model": "sft", "pairs": ("comparisons.jsonl",)}),
    "ppo": (train_ppo, "ppo", {"model": "sft", "pm": "pm"}),
}
COLUMNS = {
    "attack_success": "attack success",
    "explained": "true reasons",
    "helpful": "help, whole",
    "over_refusal": "needless refusal",
}
# Files that a control may write beside the folders of its models
FILES = [f"{name}.{end}" for name in ("revisions", "comparisons") for end in ("jsonl", "run.json")]
FILES += ["made.json", "answers.jsonl"]
# Principles on reasons speak of harm too: help with harm has no reason in their eyes
WITHOUT = {"without": f"{LEFT_OUT},harm,conduct,reasons"}


@dataclass(frozen=True)
class Control:
    """A run in which some stages are made anew with other settings, in their order; what is not
    made is RUN's."""

    name: str
    what: str
    anew: dict = field(default_factory=dict)  # stage -> settings that are not RUN's
    labels: Callable | None = None  # (RUN's comparisons, random.Random) -> those to learn from
    turned: bool = False  # the preference model's score with its sign turned
    policy: str = "ppo"  # what is measured
    start: str = "sft"  # what preference model and policy start from


def recorded(opened: measure.Run) -> dict:
    """Stage -> the Config that RUN's output was made with, for this machine and the places its
    files have now."""
    own, found = opened.cfg, {}
    here = dict(device=str(opened.device), threads=own.threads, again=False)
    here["constitution"] = str(own.constitution)
    for stage, (module, name, _) in STAGES.items():
        place = opened.out / name
        side = data.sidecar(place) if place.suffix else place / "run.json"
        if not side.exists():
            why = f"is not there; controls need a whole run: python -m mincai --out {opened.out}"
            raise UserError(f"{side}: {why}")
        try:
            made = dict(measure.read_object(side)["config"])
            made |= {key: tuple(value) for key, value in made.items() if isinstance(value, list)}
            if "prompts" in made and not Path(made["prompts"]).exists():
                # They were moved, and lie beside the held-out ones
                made["prompts"] = str(Path(own.prompts).with_name(Path(made["prompts"]).name))
            found[stage] = module.Config(**made | {k: v for k, v in here.items() if k in made})
        except (ValueError, KeyError, TypeError) as error:
            why = f"does not record the settings of that stage ({error}); make it again"
            raise UserError(f"{side}: {why}") from None
    return found


def shuffled(rows: list[dict], rng: random.Random) -> list[dict]:
    labels = rng.sample([r["p_a"] for r in rows], len(rows))
    return [{**r, "p_a": p} for r, p in zip(rows, labels)]


def inverted(rows: list[dict], rng: random.Random) -> list[dict]:
    return [{**r, "p_a": 1 - r["p_a"]} for r in rows]


def longer(rows: list[dict], rng: random.Random) -> list[dict]:
    more = [len(r["a_ids"]) - len(r["b_ids"]) for r in rows]
    return [{**r, "p_a": 0.5 if n == 0 else float(n > 0)} for r, n in zip(rows, more)]


def controls(opened: measure.Run, cfgs: dict) -> list[Control]:
    """cfgs: the settings of RUN's stages."""

    def people(some):
        return lambda rows, _: human.annotate(rows, opened.actions, opened.cfg.seed, **some)

    again, unlabelled = {"pm": {}, "ppo": {}}, {"pm": {"epochs": 0}, "ppo": {}}
    direct = {"critique": {"direct": True}, "sft": {}}
    unwritten = {"critique": WITHOUT, "sft": {}, "feedback": WITHOUT, **again}
    price = f"PPO at this price of KL, not {cfgs['ppo'].beta:g}"
    free, dear = ({"beta": beta, "kl_target": 0.0} for beta in (0.0, 0.8))  # and stay so
    long = free | {"updates": 4 * cfgs["ppo"].updates}
    found = [
        Control("phase 1", "the run before PPO", policy="sft"),
        Control("full", "the run itself"),
        Control("no labels", "a preference model that has seen no comparison", unlabelled),
        Control(
            "no labels, turned",
            "the same, its scores with the sign turned",
            unlabelled,
            turned=True,
        ),
        Control("shuffled", "the judge's labels dealt out at random", again, shuffled),
        Control("inverted", "the worse answer called the better one", again, inverted),
        Control("length", "the longer answer called the better one", again, longer),
    ]
    for name, some in human.SETTINGS.items():
        what = f"{some['budget'] or 'all'} labels of simulated people, {some['noise']:.0%} flipped"
        found.append(Control(f"human, {name}", what, again, people(some)))
    what, careful = "the first of these from the base model", people(human.SETTINGS["careful"])
    return found + [
        Control("human, no phase 1", what, again, careful, start="base"),
        Control("no critique", "phase 1 on revisions without a critique", direct, policy="sft"),
        Control(
            f"no {LEFT_OUT}", f"no principle on {LEFT_OUT}, harm, conduct or reasons", unwritten
        ),
        Control("beta 0", price, {"ppo": free}),
        Control("beta 0.8", price, {"ppo": dear}),
        Control("beta 0, long", "no price of KL and four times the updates", {"ppo": long}),
    ]


def turn(folder: Path) -> None:
    """Turns the sign of a preference model's score."""
    pm, weights = load(folder, scalar=True), ("model.safetensors", "config.json", "run.json")
    others = {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in weights}
    for number in (pm.gain, pm.shift):
        number.neg_()
    stamp = measure.read_object(folder / "run.json")
    save(pm, folder, others | {"run.json": stamp | {"turned": True}})


def make(opened: measure.Run, cfgs: dict, control: Control, folder: Path) -> str:
    """Makes anew what the control asks for, in this folder; the place of its policy."""

    def place(name):
        """What the control has of its own, else what RUN has."""
        if isinstance(name, tuple):
            return tuple(map(place, name))
        name = control.start if name == "sft" else name
        if name == "base":
            return str(opened.cfg.base)
        return str(folder / name if (folder / name).exists() else opened.out / name)

    if control.labels:
        rows = data.read_jsonl(opened.out / "comparisons.jsonl")
        rows = control.labels(rows, random.Random(cfgs["pm"].seed))
        data.write_jsonl(folder / "comparisons.jsonl", rows)
    for stage, settings in control.anew.items():
        module, name, inputs = STAGES[stage]
        settings = {flag: place(x) for flag, x in inputs.items()} | settings
        cfg = replace(cfgs[stage], out=str(folder / name), **settings)
        watch = [measure.watcher(opened.cfg)] if stage == "ppo" else []
        module.main(cfg, *watch)
        if stage == "pm" and control.turned:
            turn(folder / name)
    return place(control.policy)


def curve(folder: Path) -> list[dict]:
    """What PPO did, where it ran, at the updates at which development requests were answered."""
    path = folder / "ppo" / "metrics.jsonl"
    log = data.read_jsonl(path) if path.exists() else []
    names = {"update": "update", "score": "score", "kl": "kl_exact", "quality": "dev_quality"}
    watched = [row for row in log if "dev_quality" in row]
    return [{name: row.get(key) for name, key in names.items()} for row in watched]


def stands_on(opened: measure.Run, cfgs: dict) -> dict:
    """Settings, and hashes of files: with other ones the controls would be others."""
    places = {name: opened.out / name for _, name, _ in STAGES.values()}
    places["base"] = Path(opened.cfg.base)
    found = {"seed": opened.cfg.seed}
    for stage, cfg in cfgs.items():
        found[stage] = {k: v for k, v in vars(cfg).items() if k not in ("again", *cfg.LOOSE)}
    for name, path in places.items():
        found[f"file {name}"] = output.sha256(path / "model.safetensors" if path.is_dir() else path)
    return json.loads(json.dumps(found))


def finished(opened: measure.Run, cfgs: dict, control: Control) -> dict:
    """A control's row of controls.json; it is made if it is not there. One that cannot be made (no
    revision stands, all answers score the same) is a result as well: why it failed."""
    folder, started, answers = opened.out / "controls" / control.name, time.time(), []
    if not (folder / "made.json").exists():
        try:
            policy = load(make(opened, cfgs, control, folder), opened.device)
            answers = measure.answer_all(opened, policy, opened.split("eval", "eval-twin"))
            made = {"curve": curve(folder)}
        except UserError as error:
            made = {"failed": str(error)}
            for left in folder.glob("*.progress"):  # with which nobody goes on
                output.clear(left)
        data.write_jsonl(folder / "answers.jsonl", answers)
        data.write_json(folder / "made.json", {"seconds": round(time.time() - started), **made})
    row = {"name": control.name, "what": control.what, **measure.read_object(folder / "made.json")}
    return row if "failed" in row else row | rates(data.read_jsonl(folder / "answers.jsonl"))


def rates(answers: list[dict]) -> dict:
    found, sides = measure.summarise(answers), ([], [])
    for answer in [a for a in answers if a["split"] == "eval"]:
        sides[answer["category"] == LEFT_OUT].append(answer["complied"])
    row = {key: found[key] for key in (*COLUMNS, "quality")}
    return row | {"attack_left_out": rate(sides[True]), "attack_others": rate(sides[False])}


def gain_kept(row: dict, start: dict, full: dict) -> float | None:
    """The mean part of full's gain over start that this row has; a gain of less than 2 points is
    not asked for."""
    parts = []
    for key in ("over_refusal", "explained", "helpful"):
        mine, first, last = (r[key]["rate"] for r in (row, start, full))
        if abs(last - first) > 0.02:
            parts.append((mine - first) / (last - first))
    return sum(parts) / len(parts) if parts else None


def main(opened: measure.Run) -> dict:
    """Makes and measures what is not there yet; the content of RUN/controls.json, written after
    every control. cfg.again makes all of them anew."""
    root, cfgs = opened.out / "controls", recorded(opened)
    todo, settings, known = controls(opened, cfgs), stands_on(opened, cfgs), root / "run.json"
    if opened.cfg.again and known.exists():
        output.clear(root)
    if known.exists() and measure.read_object(known)["stands_on"] != settings:
        why = f"was made from other files or settings than {opened.out} has now; add --again"
        raise UserError(f"{root}: {why}")
    names = [f"{c.name}/{name}" for c in todo for name in FILES]
    data.write_json(known, data.stamp(opened.cfg, stands_on=settings, files=["run.json", *names]))
    found = data.stamp(opened.cfg, rows=[])
    for number, control in enumerate(todo, 1):
        print(f"\n[control {number}/{len(todo)}] {control.name}: {control.what}", flush=True)
        row = finished(opened, cfgs, control)
        found["rows"].append(row)
        if number > 2 and "failed" not in row:
            row["kept"] = gain_kept(row, *found["rows"][:2])
        data.write_json(opened.out / "controls.json", found)
    print(as_text(tables(found)))
    return found


def tables(found: dict) -> list[Table]:
    """controls.json: the controls, PPO at other prices of KL, and what could not be made; those
    that have rows."""
    rows, curves, failed = [], [], []
    for row in found["rows"]:
        if "failed" in row:
            failed.append([row["name"], row["failed"]])
            continue
        kept = "" if row.get("kept") is None else f"{row['kept']:.0%}"
        quality = f"{row['quality']:.1%}"
        rows.append([row["name"], *(row[key] for key in COLUMNS), quality, kept])
        if row["name"] == f"no {LEFT_OUT}":
            rows.append([f"  on {LEFT_OUT}", row["attack_left_out"]])
            rows.append(["  on all else", row["attack_others"]])
        if row["name"].startswith("beta") and row.get("curve"):
            last, best = row["curve"][-1], max(row["curve"], key=lambda point: point["quality"])
            cells = [f"{best['quality']:.1%}", best["update"], f"{last['quality']:.1%}"]
            curves.append([row["name"], *cells, f"{last['score']:+.2f}", f"{last['kl']:.1f}"])
    over = ["best quality", "at update", "quality at the end", "score", "KL, nats"]
    some = [
        Table("One cause taken away", [*COLUMNS.values(), "quality", "kept"], rows),
        Table("PPO at other prices of KL: quality on development requests", over, curves),
        Table("Could not be made", ["why"], failed),
    ]
    return [table for table in some if table.rows]
