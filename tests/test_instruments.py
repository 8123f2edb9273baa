"""Judge, conflict and preference model measured: sums against hand and brute force, made-up verdicts, a whole run."""

import json
import random
from collections import Counter

import pytest
import torch

from mincai import checkpoint, data, evaluate, feedback, instruments, measure, world
from mincai.model import ScalarModel
from mincai.table import rate

ACTIONS = {a.text: a for a in world.build()}


# ---- sums ----

def test_reliability_by_hand():
    found = instruments.reliability([0.05, 0.31, 0.39, 1.0, 0.95], [False, True, False, True, True])
    assert [b["n"] for b in found] == [1, 0, 0, 2, 0, 0, 0, 0, 0, 2]
    assert found[3] == pytest.approx({"low": 0.3, "high": 0.4, "n": 2, "predicted": 0.35, "observed": 0.5})
    assert found[1]["predicted"] is None and found[9]["observed"] == 1.0


def test_accuracy_by_size_of_margin():
    """Ten margins, wrong (negative) exactly where they are small."""
    found = instruments.by_size([0.1, -0.2, 5.0, -0.3, 4.0, 3.0, 2.0, 2.5, -0.4, 1.0], bins=5)
    assert [b["n"] for b in found] == [2] * 5
    assert [b["accuracy"]["k"] for b in found] == [1, 0, 2, 2, 2]
    assert (found[0]["low"], found[0]["high"], found[4]["low"], found[4]["high"]) == (0.1, 0.2, 4.0, 5.0)
    assert len(instruments.by_size([1.0, 2.0])) == 2, "no empty bins"


def test_correlation_by_hand():
    assert instruments.correlation([(1, 2.0), (2, 4.0), (3, 6.0)]) == pytest.approx(1)
    assert instruments.correlation([(1, 1.0), (2, 0.0), (3, 1.0)]) == pytest.approx(0)
    assert instruments.correlation([(1, 2.0), (1, 3.0)]) is None and instruments.correlation([]) is None


def test_rows_are_spread_over_actions():
    rows = [{"id": i, "action": "abc"[i // 10]} for i in range(30)]
    found = instruments.spread(rows, 7, random.Random(0))
    assert sorted(Counter(r["action"] for r in found).values()) == [2, 2, 3]
    assert len({r["id"] for r in found}) == 7 and len(instruments.spread(rows, 99, random.Random(0))) == 30


def test_agreement_against_brute_force():
    """Two principles of a target vote; a mean within 0.1 of 1/2 is no choice."""
    p = {"help": [[1.0, 0.9], [0.2, 0.8], [0.9, 0.9], [0.1, 0.3]], "harm": [[0.0], [0.0], [1.0], [0.45]]}
    rows = [{"about": about, "pair": n, "p_a": x} for about, some in p.items() for n, xs in enumerate(some) for x in xs]
    found = instruments.agreement(rows)
    assert found["ids"] == ["harm", "help"] and found["pairs"] == 4
    assert found["matrix"] == [[pytest.approx((3 + 0.5) / 4), pytest.approx((0 + 0.5 + 1 + 0.5) / 4)],
                               [pytest.approx((0 + 0.5 + 1 + 0.5) / 4), pytest.approx((3 + 0.5) / 4)]]
    assert found["decided"] == [[3, 2], [2, 3]]


def test_judged_pairs_by_hand():
    """One right and sure, one wrong with the same slot ahead, one undecided that counts as wrong, one without room."""
    rows = [{"p_a": p, "p_ab": ab, "p_ba": ba, "a_better": better} for p, ab, ba, better in (
        (0.9, 0.9, 0.1, True), (0.6, 0.8, 0.6, False), (0.5, 0.9, 0.9, True), (0.5, None, None, False))]
    found = instruments.judged_well(rows)
    assert (found["accuracy"]["k"], found["accuracy"]["n"]) == (1, 4)
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.25 + 0.25) / 4)
    assert found["same_slot"] == pytest.approx(2 / 3)


# ---- a whole run, tiny ----

@pytest.fixture
def opened(tiny_base, tmp_path):
    every = data.read_jsonl(tiny_base / "prompts_eval.jsonl")
    dual = [r for r in every if ACTIONS[r["action"]].setting and r["split"] == "eval"]
    rows = dual[:2] + [r for split, n in (("eval", 8), ("eval-twin", 6), ("unseen-category", 3), ("setting", 2))
                       for r in [r for r in every if r["split"] == split and r not in dual[:2]][:n * 7:7]]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "run"
    checkpoint.save(checkpoint.load(tiny_base), out / "sft")
    checkpoint.save(ScalarModel(checkpoint.load(tiny_base)), out / "pm")
    cfg = evaluate.Config(out=str(out), base=str(tiny_base), prompts=str(tmp_path / "prompts.jsonl"), judged=4,
                          max_new=3, device="cpu", threads=1)
    return measure.open_run(cfg, torch.device("cpu"))


def oracle(monkeypatch, prefers):
    """The judge is replaced: p_a is what prefers(principle's words, a, b) says, in both orders."""
    def judge(model, planner, conversations, a, b, principles, **_):
        p = [prefers(*some) for some in zip(principles, a, b)]
        return feedback.Verdicts(p, p, [1 - x for x in p], [""] * len(p), 0.0)

    monkeypatch.setattr(feedback, "judge", judge)


def test_the_fixed_pairs_cover_requests_and_states(opened):
    pairs = instruments.fixed_pairs(opened, 16, random.Random(0))
    assert Counter(p["row"]["kind"] for p in pairs) == {"harmful": 13, "benign": 3}
    assert {s for p in pairs for s in p["states"]} == {"well", "told", "badly", "truly", "falsely", "bare"}
    seen = {r["category"] for r in opened.split("eval", "unseen-category")}
    mine = [p["row"]["category"] for p in pairs if p["row"]["kind"] == "harmful"]
    assert set(mine[:len(seen)]) == seen, "each category comes before any comes twice"
    for pair in pairs:  # a helps more: where only one of the two has steps, it is a
        assert "first take" in pair["a"] or "first take" not in pair["b"]
    assert {tuple(s) for s in instruments.OPPOSED} == {(a, b) for a in ("told", "well", "badly")
                                                       for b in ("truly", "bare", "falsely")}


def test_a_principle_decides_only_where_it_bites(opened):
    row = next(r for r in opened.split("eval"))
    told, truly, bare = instruments.texts_of(opened, [row] * 3, ("told", "truly", "bare"), random.Random(0))
    pair = {"row": row, "a": told, "b": truly, "states": ["told", "truly"]}
    other = next(h for h in world.HARMS if h != row["category"])
    found = {about: instruments.a_better(opened, pair, about)
             for about in ("help", "harm", row["category"], other, "truth", "reasons")}
    assert found == {"help": True, "harm": False, row["category"]: False, other: None, "truth": None, "reasons": None}
    pair = {"row": row, "a": told, "b": bare, "states": ["told", "bare"]}
    assert instruments.a_better(opened, pair, "reasons") is True


def test_a_judge_that_knows_the_oracle_is_always_right(opened, monkeypatch):
    """Help principles take the answer with steps, all others the one without: right wherever those decide by it."""
    about = {p.tiny: p.about for p in opened.principles}
    steps = lambda text: "first take" in text  # noqa: E731
    oracle(monkeypatch, lambda words, a, b: 0.5 if steps(a) == steps(b) else
           1.0 if steps(a) == (about[words] == "help") else 0.0)
    found, rows = instruments.measure_judge_more(opened)
    assert len(rows) == 4 + 4 * 75 and len(found["by_principle"]) == 75
    for principle in opened.principles:
        r, mine = found["by_principle"][principle.id], [x for x in rows if x["principle"] == principle.id
                                                        and x["set"] == "fixed"]
        assert r["mean_p"] == pytest.approx(sum(x["p_a"] for x in mine) / 4)
        assert r["accuracy"]["n"] == sum(x["a_better"] is not None for x in mine)
        if principle.about == "harm" or principle.about in world.HARMS:
            assert r["mean_p"] == 0.0 and r["accuracy"]["k"] == r["accuracy"]["n"] <= 3
    matrix, ids = found["agreement"]["matrix"], found["agreement"]["ids"]
    assert len(ids) == 16 and matrix[ids.index("help")][ids.index("harm")] == 0.0
    assert matrix[ids.index("truth")][ids.index("harm")] == 1.0
    drawn = [r for r in rows if r["set"] == "drawn"]
    assert found["accuracy"] == rate(r["p_a"] != 0.5 and (r["p_a"] > 0.5) == r["a_better"] for r in drawn)
    assert sum(b["n"] for b in found["reliability"]) == 4
    assert sum(r["accuracy"]["n"] for r in found["by_about"].values()) == 4


def test_conflict_knows_who_asks_for_what(opened, monkeypatch):
    """A judge that is asked for help wants help (0.9), and refusal (0.2) under every other principle."""
    about = {p.tiny: p.about for p in opened.principles}
    oracle(monkeypatch, lambda words, a, b: 0.9 if about[words] == "help" else 0.2)
    monkeypatch.setattr(measure, "pm_scores", lambda pm, tokenizer, rows, texts, size: [
        2.5 if "sorry" in text else 1.0 for text in texts])
    samples = [{**r, "stage": stage, "refused": stage == "sft"} for stage in ("base", "sft")
               for r in opened.split("eval")]
    data.write_jsonl(opened.out / "eval_samples.jsonl", samples)
    found, rows = instruments.measure_conflict(opened)
    drawn = [r for r in rows if r["label"] == "mixture"]
    helps = sum(r["about"] == "help" for r in drawn)
    assert found["pairs"] == len(drawn) == 4 and found["aim"] == feedback.Config().aim
    assert found["label"] == pytest.approx({"helpfulness": 0.9, "harmlessness": 0.2,
                                            "mixture": (0.9 * helps + 0.2 * (4 - helps)) / 4})
    assert all("first take" in r["a"] and "sorry" in r["b"] and r["split"] == "train" for r in rows)
    assert all(r["about"] in ("harm", r["category"]) for r in rows if r["label"] == "harmlessness")
    assert found["pm_margin"] == {"mean": 1.5, "low": 1.5, "high": 1.5, "values": [1.5] * 4}
    assert found["pm_prefers_refusal"]["k"] == 4
    assert {s: r["refused"]["k"] for s, r in found["policy"].items()} == {"base": 0, "sft": 4}
    assert any("refusal ahead by +1.50" in line for line in instruments.lines("conflict", found))


def test_probes_and_margins_of_a_preference_model_that_likes_long_answers(opened, monkeypatch):
    """It scores by the number of words: then length explains it all, and empty answers never win."""
    monkeypatch.setattr(measure, "pm_scores", lambda pm, tokenizer, rows, texts, size: [
        float(len(text.split())) for text in texts])
    monkeypatch.setattr(measure, "answer_all", lambda model, tokenizer, rows, actions, cfg, desc: [
        {**r, "answer": "word " * (n + 1), "refused": n % 2 > 0, "tokens": 2 * n} for n, r in enumerate(rows)])
    found, rows = instruments.measure_pm_more(opened)
    assert list(found["by_kind"]) == list(instruments.PM_KINDS)
    for kind, r in found["by_kind"].items():
        mine = [x["margin"] for x in rows if x["part"] == "pair" and x["kind"] == kind]
        assert r["accuracy"]["n"] == len(mine) > 0 and r["mean_margin"] == pytest.approx(sum(mine) / len(mine))
    assert found["by_kind"]["harmful: reasons over none"]["accuracy"]["rate"] == 1.0
    assert found["by_kind"]["harmful: refusal over compliance"]["accuracy"]["rate"] == 0.0
    assert found["probes"]["empty"]["beats_good"]["k"] == 0 and found["probes"]["empty"]["mean"] == 0
    assert found["probes"]["gibberish"]["mean"] == found["probes"]["gibberish"]["good"], "as many words"
    assert found["length"]["correlation"] == pytest.approx(1) and found["length"]["stage"] == "sft"
    both = [b["n"] for b in found["reliability"]]
    assert both[:4] == both[:5:-1] and sum(both) == 2 * sum(r["accuracy"]["n"] for r in found["by_kind"].values())
    near = [r for r in rows if r["part"] == "boundary" and r["where"] == "near"]
    assert found["boundary"]["near"]["n"] == len(near) == 4
    assert found["boundary"]["near"]["mean_abs_margin"] == pytest.approx(sum(abs(r["margin"]) for r in near) / 4)
    action = {r["id"]: opened.actions[r["action"]] for r in opened.rows}
    assert all(action[r["prompt_id"]].setting for r in near)


def test_no_probe_is_a_good_answer(opened):
    """Graded by the oracle, none of them helps with its request or refuses it for the true reason."""
    for n, row in enumerate(opened.split("eval", "eval-twin")):
        action = opened.actions[row["action"]]
        state = "truly" if row["kind"] == "harmful" else "told"
        good, = instruments.texts_of(opened, [row], [state], random.Random(n))
        probes = instruments.probe_texts(opened, row, good, ["lamp", "barn", "is"], n % 2 > 0, random.Random(n))
        assert list(probes) == ["empty", "repeated", "boilerplate", "gibberish", "other answer"]
        assert all(action.text not in text for name, text in probes.items() if name not in ("repeated", "empty"))
        assert good not in probes.values() and len(set(probes["repeated"].split(" . "))) <= 2
        clause = probes["repeated"].split(" .")[0]
        assert clause + " ." in good and probes["repeated"].count(clause) >= 3
        assert not any(world.grade(action, text).right and row["kind"] == "benign" and name != "other answer"
                       for name, text in probes.items())


def test_end_to_end_with_models_that_have_learnt_nothing(opened):
    """Real judge, real preference model, real samples; every number is JSON and is shown."""
    parts = {"judge": instruments.measure_judge_more, "conflict": instruments.measure_conflict,
             "pm_more": instruments.measure_pm_more}
    opened.principles = opened.principles[::15]
    for section, measured in parts.items():
        found, rows = measured(opened)
        assert rows and json.loads(json.dumps([found, rows], allow_nan=False)) == [found, rows]
        assert all(isinstance(line, str) for line in instruments.lines(section, found))
    assert set(found["probes"]["empty"]) == {"mean", "good", "beats_good", "harmful", "benign"}


def test_what_is_missing_is_left_out(opened):
    opened.out.joinpath("pm").rename(opened.out / "away")
    assert instruments.measure_pm_more(opened) == ({}, []) and instruments.lines("pm_more", {}) == []
    opened.principles = [p for p in opened.principles if p.about == world.UNSEEN]
    found, _ = instruments.measure_judge_more(opened)
    assert "accuracy" not in found and len(found["by_principle"]) == 4
    found, _ = instruments.measure_conflict(opened)
    assert "pm_margin" not in found and list(found["label"]) == ["mixture"] and list(found["policy"]) == ["base", "sft"]
    opened.principles = []
    found, rows = instruments.measure_conflict(opened)
    assert found["label"] == {} and rows == [] and instruments.lines("conflict", found)
