"""The report: one file that stands alone, says what is missing, escapes what models wrote, shows the files' numbers."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from mincai import UserError, checkpoint, constitution, data, evaluate, figures, page, report, sections, trails, world
from mincai.model import ScalarModel
from mincai.table import rate
from mincai.tokenizer import load_tokenizer

EVIL = '<img src=x onerror="alert(1)"> & \'more\''
VOID = {"meta", "br", "img", "input", "wbr", "use", "path", "stop"}
HALF, STAGES = rate([True, False]), ("base", "sft", "ppo")
ACTIONS = {a.text: a for a in world.build()}


class Reader(HTMLParser):
    """Collects tags and what they would fetch; `open` must be empty at the end."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.ids, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.fetched += [v for k, v in attrs if k in ("src", "srcset", "data", "poster", "xlink:href")]
        (self.links if tag in ("a", "use") else self.fetched).extend([found["href"]] if "href" in found else [])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes another"


def revision(number, kind="harmful", changed=True):
    return {"id": f"loop-{number}", "prompt": f"how do i burn a lamp ? {number} {EVIL}", "setting": None, "kind": kind,
            "category": "theft" if kind == "harmful" else "", "attack": "plain", "action": next(iter(ACTIONS)),
            "original": "sure .", "revision": "sorry .", "changed": changed,
            "rounds": [{"round": 1, "principle": "theft-1", "critique": f"it breaks {EVIL}", "revision": "sorry .",
                        "outcome": "revised" if changed else "keep"}]}


def comparison(number, p_a, name="pair"):
    return {"id": f"{name}-{number}", "prompt_id": f"loop-{number}", "prompt": "how ?", "a": f"{name} a", "b": "b",
            "principle": "theft-1", "reasons": f"(A) refuses {EVIL}", "p_a": p_a}


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run folder, report Config) of a run whose models have learnt nothing but whose files are all there."""
    out = tmp_path_factory.mktemp("report") / "run"
    for stage in ("sft", "ppo"):
        shutil.copytree(tiny_base, out / stage)
    torch.manual_seed(0)
    checkpoint.save(ScalarModel(checkpoint.load(tiny_base)), out / "pm")
    rows = [r for split in ("eval", "eval-twin", "unseen-category", "setting") for r in
            [r for r in data.read_jsonl(tiny_base / "prompts_eval.jsonl") if r["split"] == split][::60]]
    data.write_jsonl(out / "prompts.jsonl", rows)
    evaluate.main(evaluate.Config(out=str(out), base=str(tiny_base), prompts=str(out / "prompts.jsonl"), judged=3,
                                  max_new=6, device="cpu", threads=1))
    data.write_jsonl(out / "revisions.jsonl", [revision(i, "benign" if i % 2 else "harmful", i != 3) for i in range(6)])
    data.write_jsonl(out / "comparisons.jsonl", [comparison(i, 0.9 if i < 2 else 0.51) for i in range(6)])
    for name, key in (("sft", "step"), ("pm", "step"), ("ppo", "update")):
        data.write_jsonl(out / name / "metrics.jsonl", [
            {key: i, "loss": 1 / i, "accuracy": 0.5, "score": 0.1 * i, "kl_exact": 0.01 * i, "entropy": 0.2,
             "clipfrac": 0.0} for i in range(1, 4)])
    return out, report.Config(out=str(out), trails=4, strips=1, failures=2, device="cpu", threads=1)


@pytest.fixture(scope="module")
def text(finished):
    return report.main(finished[1]).read_text(encoding="utf-8")


def test_the_page_is_one_file_that_fetches_nothing(text):
    found = Reader(text)
    assert found.open == found.fetched == []
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(found.ids) == len(set(found.ids)), "two elements share an id"
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not {"link", "iframe", "object", "embed"} & set(found.tags)
    assert text.count("<script") == 1 and "prefers-color-scheme:dark" in text


def test_what_models_wrote_is_escaped(text):
    assert "<img" not in text and "onerror=\"" not in text
    assert text.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; &#x27;more&#x27;") >= 3 * 4


def test_the_headline_is_the_files(finished, text):
    found = json.loads((finished[0] / "eval.json").read_text())
    top = text[:text.index('id="loop"')]
    for stage in STAGES:
        r = found["stages"][stage]["attack_success"]
        assert f'<div class="big {stage}">{100 * r["rate"]:.1f}%</div>' in top and f"{r['k']} of {r['n']}" in top
    assert f"{100 * found['headline']['ppo_help_kept']:.1f}%" in top
    assert str(found["git"] or "unknown")[:12] in top and "seed <b>0</b>" in top and found["device"] in top


def test_the_loop_has_the_runs_numbers(finished, text):
    part = re.sub("<[^>]+>", " ", text[text.index('id="loop"'):text.index('id="claims"')])
    for words in ("prompts 6 3 harmful, 3 ordinary; 6 answers", "critiques 6", "revisions made 5",
                  "kept to learn from 5 83.3%", "3 steps, loss 0.333", "comparisons 6", "decided 33.3% 2 with",
                  "PPO updates 3 KL 0.03 nats"):
        assert words in re.sub(r"\s+", " ", part), words


def test_trails_go_all_the_way(text):
    some = re.findall(r'<details class="trail" data-kind="(\w+)".*?</details>', text, re.S)
    assert sorted(some) == ["benign", "benign", "harmful", "harmful"]
    one = next(re.finditer(r'<details class="trail".*?</details>', text, re.S))[0]
    principle = next(p.tiny for p in constitution.load_constitution() if p.id == "theft-1")
    order = ["first response", f"{principle} (theft-1)", "critique", "revision", "answer A", "reasons", "A is better",
             "base</dt>", "SFT</dt>", "PPO</dt>"]
    places = [one.index(words) for words in order]
    assert places == sorted(places) and one.count("preference score") == 3
    assert "training prompts" in re.sub(r"\s+", " ", text)


def test_a_report_is_the_same_twice(finished, text, monkeypatch):
    """But for the drawings, which test_figures.py sees to."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "picture", lambda *_, **__: "")
    assert report.build(finished[1], "cpu") == re.sub("<svg.*?</svg>", "", text, flags=re.S)


@pytest.mark.parametrize("models", [True, False])
def test_an_empty_run_says_what_to_run(tmp_path, models):
    (tmp_path / "bare").mkdir()
    text = report.build(report.Config(out=str(tmp_path / "bare"), base=str(tmp_path / "none"), models=models), "cpu")
    assert Reader(text).open == []
    for command in ("mincai.evaluate", "mincai.critique", "mincai.feedback", "train_sft.py", "train_pm.py",
                    "train_ppo.py"):
        assert f"python {'' if command.endswith('.py') else '-m '}{command}" in text, command
    for flag in ("claims", "ablations", "deep"):
        assert f"python -m mincai.evaluate {tmp_path / 'bare'} --{flag}" in text
    assert ("no such folder" in text) == models and ("--no-models" in text) != models


def test_without_matplotlib_the_page_is_written(finished, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.build(report.Config(**{**vars(finished[1]), "models": False}), "cpu")
    assert "pip install matplotlib" in text and "<svg" not in text and "attacks that succeed" in text


def test_faults_of_a_person(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        report.main(report.Config(out=str(tmp_path / "nowhere")))
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(UserError, match="eval.json: not JSON"):
        report.build(report.Config(out=str(tmp_path)), "cpu")


# ---- what is drawn ----

def test_token_probabilities_are_the_models(tiny_base):
    row = next(r for r in data.read_jsonl(tiny_base / "prompts_eval.jsonl") if r["split"] == "eval")
    model, tokenizer = checkpoint.load(tiny_base), load_tokenizer(tiny_base)
    opened = SimpleNamespace(split=lambda _: [row], tokenizer=tokenizer, actions=ACTIONS, folders={"base": tiny_base},
                             model=lambda _: model)
    found = trails.strips(opened, 3, 0)
    assert len(found) == 1 and found[0]["prompt"] == row["prompt"]
    tokens = found[0]["answers"]["refusing"]["base"]
    assert "".join(t for t, _ in tokens) == " " + world.refuse(ACTIONS[row["action"]]) + "(end)"
    ids = tokenizer.encode(constitution.dialogue(row["prompt"]))
    for text, p in tokens[:4]:
        with torch.no_grad():
            probabilities = model.unembed(model(torch.tensor([ids]))).softmax(-1)[0, -1]
        ids += tokenizer.encode(text)
        assert p == pytest.approx(float(probabilities[ids[-1]]), rel=1e-3)


def test_trails_are_drawn_by_the_seed_half_of_each_kind():
    rows = [revision(i, "benign" if i >= 15 else "harmful") for i in range(30) for _ in range(2)]
    pairs = [comparison(i, p, name) for name, p in (("weak", 0.6), ("strong", 0.1), ("later", 0.8)) for i in range(30)]
    found = trails.choose(rows, pairs, 8, 0)
    ids = [t["revision"]["id"] for t in found]
    assert len(set(ids)) == 8 and sum(t["revision"]["kind"] == "benign" for t in found) == 4
    assert all(t["comparison"]["a"] == "strong a" and t["comparison"]["prompt_id"] == i for t, i in zip(found, ids))
    again, other = ([t["revision"]["id"] for t in trails.choose(rows, pairs, 8, seed)] for seed in (0, 1))
    assert again == ids and other != ids
    assert trails.choose(rows, [], 3, 0)[0]["comparison"] is None, "a run may stop after phase 1"


def test_failures_by_hand():
    def sample(split, stage="ppo", **more):
        return {"stage": stage, "split": split, "complied": False, "refused": False, "right": False, **more}
    rows = [sample("eval", complied=True), sample("eval", refused=True), sample("unseen-category", complied=True),
            sample("eval-twin", refused=True), sample("eval-twin", right=True), sample("eval-twin"),
            sample("eval-twin"), sample("eval", "sft", complied=True)]
    found = trails.failures(rows, "ppo", 1, 0)
    assert [(f["total"], f["of"], len(f["shown"])) for f in found.values()] == [(2, 3, 1), (1, 4, 1), (2, 4, 1)]


# ---- parts of a page ----

def test_tables_and_maps_by_hand():
    r = {"k": 1, "n": 4, "rate": 0.25, "low": 0.046, "high": 0.699}
    text = page.rates([("name <b>", {"base": r, "sft": rate([])}), ("other", {"ppo": 0.5})])
    assert "name &lt;b&gt;" in text and "25.0%<small>4.6–69.9</small>" in text
    assert ">none<" in text and ">0.5<" in text
    heat = page.heat({"theft": {"base": r, "sft": 1.0}}, ["base", "sft", "ppo"])
    assert '--v:0.500' in heat and 'class="hi"' in heat and ">25</td>" in heat and heat.count("<td></td>") == 1


def test_colour_is_even_in_the_log_of_the_probability():
    assert [page.surprise(p) for p in (1.0, 0.1, 1e-4, 1e-5, 1e-9, 0.0)] == pytest.approx([0, 0.2, 0.8, 1, 1, 1])
    strip = page.strip("p", "what", {"base": [(" a", 0.5), (" <", 0.25)]})
    assert "whole: 0.12" in strip and 'title="&lt;: p = 0.25"' in strip and f"--v:{math.log10(2) / 5:.3f}" in strip


@pytest.mark.parametrize("value, shown", [
    (HALF, "50.0% [9.5, 90.5]"), (rate([]), "none"), (True, "yes"), (None, ""), (0.123456, "0.123"), (1234, "1234"),
    ([0, 1], "0, 1"), ({"a": 0.5}, "a 0.5"), ("text", "text")])
def test_any_value_has_a_short_form(value, shown):
    assert page.plain(value) == shown


def test_the_opposite_of_a_rate():
    assert page.turned(rate([True] * 3 + [False] * 7)) == pytest.approx(rate([True] * 7 + [False] * 3))


def test_english_runs_show_whatever_rates_they_have():
    found = {"stages": {s: {"harmful": {"refuses": HALF, "score": 1.0}} for s in STAGES}}
    assert "harmful: refuses" in sections.attacks(found, "x") and "50.0%" in sections.attacks(found, "x")


def test_claims_of_any_form():
    row = {"claim": EVIL, "paper": "Figure 5", "measured": HALF, "n": 2, "seeds": [0, 1], "verdict": "reproduced"}
    text = report.claims({"claims": [row, {"claim": "bare"}]}, "run")
    assert "<img" not in text and "50.0% [9.5, 90.5]" in text and ">bare<" in text
    assert 'class="chip good">reproduced' in text
    first = {"value": 0.94, "low": 0.92, "high": 0.96, "n": 693}
    test = {"name": "x", "unit": "%", "want": "at least", "line": 0.89, "ours": True, "values": [0.94, 0.9],
            "mean": 0.92, "min": 0.9, "max": 0.94, "first": first, "verdict": "partly"}
    bare = test | {"values": [], "first": None, "verdict": "not testable"}
    text = report.claims({"claims": [{**row, "tests": [test, bare]}], "seeds": [0, 1], "rule": "so"}, "run")
    for words in ("&lt;img", "at least 89.0%*", "92.0% (90.0% to 94.0%)", "92.0% to 96.0%", "693", "not measured"):
        assert words in text, words


BINS = [{"low": 0.1 * i, "high": 0.1 * i + 0.1, "n": i, "predicted": 0.1 * i, "observed": 0.1 * i} for i in range(10)]
MORE = {  # every section's file, each with a number that must be found on the page
    "keywords": ({"contrast": {"sft": {"both_right": {**HALF, "rate": 0.111}}}, "rephrased": {"sft": {"helpful": HALF}},
                  "bag_of_words": {"accuracy": HALF, "contrast_both_right": HALF, "n_train": 7}}, "11.1%"),
    "context": ({"claimed": {"ppo": {"helpful": HALF, "refused": {**HALF, "rate": 0.122}}}}, "12.2%"),
    "general": ({"seed": 0, "config": {}, "base": {"composed_held": {**HALF, "rate": 0.133}}}, "13.3%"),
    "inside": ({"base": {"harmful": {"comply_first": [0.1, 0.2]}}}, "Harmful requests: complying"),
    "judge": ({"accuracy": {**HALF, "rate": 0.144}, "brier": 0.1, "reliability": BINS, "by_principle": {"theft-1": {
        "about": "theft", "split": "train", "accuracy": {**HALF, "rate": 0.155}, "mean_p": 0.5}},
        "agreement": {"ids": ["theft", "help"], "matrix": [[1.0, 0.17], [0.17, 1.0]]}}, "15.5%"),
    "conflict": ({"pairs": 3, "label": {"helpfulness": 0.321}, "pm_margin": {"values": [-1.0, 2.0]},
                  "pm_prefers_refusal": HALF, "policy": {"ppo": {"refused": HALF}}}, "0.321"),
    "pm_more": ({"by_margin": [{"low": 0, "high": 1, "n": 2, "accuracy": HALF}], "reliability": BINS, "length": {
        "correlation": 0.456, "points": [[1, 2.0], [3, 4.0]]}, "probes": {"empty": {"mean": -0.77,
        "beats_good": HALF}}, "boundary": {"near": {"n": 1, "mean_abs_margin": 0.5}},
        "by_kind": {"k": {"accuracy": HALF, "mean_margin": 1}}}, "-0.77"),
    "goodhart": ({"best_of_n": [{"n": n, "kl": n, "score": n, "harmless": HALF, "helpful": HALF} for n in (1, 16)],
                  "ppo": {"beta=0.1": [{"update": u, "score": 1, "kl": u, "harmless": HALF, "helpful": HALF,
                                        "length": 3, "boilerplate": 0.1, "distinct": 0.2} for u in (1, 2)]}},
                 "PPO, beta=0.1"),
    "elo": ({"snapshots": ["base", "ppo"], "pairs": 987, **{k: {s: {"elo": 1, "low": 0, "high": 2} for s in (
        "base", "ppo")} for k in ("harmlessness", "helpfulness")}}, "From 987 pairs")}


def test_every_sections_file_is_shown(finished, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figures, "picture", lambda draw, *values, name, label, **settings: draw(
        figure.Figure().subplots(), *values, **settings) or "<svg></svg>")  # drawn, but not written: that takes long
    (out := tmp_path / "run").mkdir()
    shutil.copy(finished[0] / "eval.json", out)
    for name, (found, _) in MORE.items():
        data.write_json(out / f"eval_{name}.json", found)
    data.write_json(tmp_path / "ablations.json", {"rows": [
        {"name": "hard", "what": "", "helpful": {**HALF, "rate": 0.166}, "seconds": 5.0, "against": "sft",
         "paired": {"helpful": {"difference": -0.1, "low": -0.2, "high": 0.0}}},
        *({"name": f"share-{p}", "helpful": HALF, "attack_success": HALF} for p in (100, 0)),
        {"name": "share-50", "failed": "no pair"}, {"name": "x", "failed": "no revision"}]})
    text = report.build(report.Config(out=str(out), models=False), "cpu")
    assert Reader(text).open == []
    for name, (_, words) in MORE.items():
        assert words in text and f"(eval_{name}.json)" not in text, name
    assert "16.6%" in text and "-10.0 [-20.0, +0.0] to sft" in text and "no revision" in text
    assert "No ablations" not in text
    assert "Help against harmlessness" in text and "All of them: helpful, by score" in text
