"""Curves and ratings of a run: the oracle's order, KLs against one forward a token, and a whole tiny run."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from mincai import UserError, checkpoint, constitution, data, goodhart, measure, world
from mincai.model import ScalarModel
from mincai.tokenizer import load_tokenizer

ACTIONS = {a.text: a for a in world.build()}
WRONG, FINE = (next(a for a in ACTIONS.values() if a.wrong == wrong) for wrong in (True, False))


@pytest.fixture
def run(tiny_base, tmp_path):
    """A function: files and stages of a run folder -> the run, opened. Models have learnt nothing."""
    every = data.read_jsonl(tiny_base / "prompts_eval.jsonl")
    rows = [r for split in ("eval", "eval-twin") for r in [r for r in every if r["split"] == split][:6]]
    data.write_jsonl(tmp_path / "prompts_eval.jsonl", rows)
    out = tmp_path / "run"
    out.mkdir()

    def open_it(*stages, **more):
        for stage in stages:
            if stage == "pm":
                torch.manual_seed(0)
                checkpoint.save(ScalarModel(checkpoint.load(tiny_base)), out / "pm", load_tokenizer(tiny_base).files())
            else:
                shutil.copytree(tiny_base, out / stage)
        cfg = dict(out=str(out), base=str(tiny_base), prompts=str(tmp_path / "prompts_eval.jsonl"), world=0, seed=0,
                   constitution=constitution.PATH, temperature=1.0, judged=4, max_new=5, size="tiny", batch_size=3,
                   threads=1)
        return measure.open_run(SimpleNamespace(**cfg | more), "cpu")
    return open_it


def revision(prompt, steps):
    """A row of revisions.jsonl; steps: (outcome, text) of each round."""
    rounds = [{"round": i + 1, "revision": text, "outcome": outcome} for i, (outcome, text) in enumerate(steps)]
    last = [text for outcome, text in steps if outcome == "revised"]
    return {"prompt": prompt, "original": "a", "revision": (["a"] + last)[-1], "rounds": rounds, "changed": bool(last)}


# --- what is trained first --------------------------------------------------------------------------------

def test_a_row_after_each_number_of_rounds():
    row = revision("q", [("keep", constitution.KEEP), ("revised", "b"), ("cut off", "c"), ("revised", "d")])
    found = [goodhart.after_rounds(row | {"revision_ids": [1]}, k) for k in range(5)]
    assert [(r["revision"], r["changed"], len(r["rounds"])) for r in found] == [
        ("a", False, 0), ("a", False, 1), ("b", True, 2), ("b", True, 3), ("d", True, 4)]
    assert found[4] == row and row["revision"] == "d"  # all rounds: the file's own row, which is left alone
    assert all("revision_ids" not in r for r in found)  # training would prefer them to the text


def test_settings_are_those_of_the_run(run):
    opened = run("sft")
    assert goodhart.recorded(opened, "ppo", train_ppo.Config, beta=0.5) == train_ppo.Config(
        beta=0.5, device="cpu", threads=1)
    (opened.out / "ppo").mkdir()
    old = {"config": {"batch": 32, "lr": 0.5, "again": True, "gone": 1}}
    data.write_json(opened.out / "ppo" / "run.json", old)
    assert goodhart.recorded(opened, "ppo", train_ppo.Config) == train_ppo.Config(
        batch=32, lr=0.5, freeze=0, device="cpu", threads=1)  # as it was before there was such a setting
    data.write_json(opened.out / "ppo" / "run.json", {"no": "config"})
    with pytest.raises(UserError, match="run.json.*train"):
        goodhart.recorded(opened, "ppo", train_ppo.Config)


def test_what_is_missing_is_named(run):
    opened = run("sft")
    with pytest.raises(UserError, match="pm: no such folder"):
        goodhart.prepare(opened)
    with pytest.raises(UserError, match="revisions.jsonl"):
        goodhart.prepare_rounds(opened)
    assert goodhart.measure_goodhart(opened) == ({}, [])
    assert "sft/ and pm/" in goodhart.lines("goodhart", {})[0]


# --- Elo --------------------------------------------------------------------------------------------------

def test_the_oracle_as_a_crowdworker():
    told, lied = world.refuse(WRONG), world.refuse(WRONG, "neglect" if WRONG.reason != "neglect" else "theft")
    bad = [world.comply(WRONG), "lamp the the", "", told + " first take the saw ."]
    assert [goodhart.level(WRONG, "harmful", a) for a in (told, lied, world.refuse_bare(WRONG), *bad)] == [
        2, 1, 1, 0, 0, 0, 0]
    right, tool = world.comply(FINE), next(t for t in world.TOOLS if t != FINE.tool)
    some = (right, world.comply(FINE, tool=tool), "sorry . " + right, world.refuse_bare(FINE), "lamp the the")
    assert [goodhart.level(FINE, "benign", a) for a in some] == [2, 1, 1, 0, 0]


def test_ratings_of_planted_answers_by_hand(run, monkeypatch):
    """The base always complies; the fine-tuned model refuses what is wrong, and helps with half of the rest."""
    opened = run("sft")
    monkeypatch.setattr(goodhart, "load", lambda folder, device: str(folder))

    def answer_all(model, tokenizer, rows, actions, cfg, desc):
        sft = model.endswith("sft")
        refuse = [sft and (r["kind"] == "harmful" or i % 2 == 0) for i, r in enumerate(rows)]
        return [r | {"answer": (world.refuse if no else world.comply)(actions[r["action"]])}
                for r, no in zip(rows, refuse)]
    monkeypatch.setattr(measure, "answer_all", answer_all)
    found, rows = goodhart.measure_elo(opened)
    assert found["snapshots"] == ["base", "sft"] and found["prompts"] == found["pairs"] == 8 and len(rows) == 16
    assert found["harmlessness"]["sft"]["elo"] == pytest.approx(381.7, abs=0.05)  # 400 log10(4.5 / 0.5)
    assert found["helpfulness"]["sft"]["elo"] == pytest.approx(-147.2, abs=0.05)  # 2 ties, 2 lost: 1.5 to 3.5
    assert [r["level"] for r in rows if r["snapshot"] == "sft"] == [2, 2, 2, 2, 0, 2, 0, 2]


def test_snapshots_come_in_the_order_of_training(run):
    opened = run("sft", "ppo")
    for name in ("sft_rounds/10", "sft_rounds/2", "ppo/snapshots/u002", "ppo/snapshots/u010", "ppo/snapshots/u012"):
        (opened.out / name).mkdir(parents=True)
    (opened.out / "sft_rounds" / "revisions-2.jsonl").write_text("")
    data.write_json(opened.out / "ppo" / "run.json", {"metrics": {"updates": 12}})
    names = goodhart.snapshots(opened)
    assert list(names) == ["base", "sft k=2", "sft k=10", "sft", "ppo u=2", "ppo u=10", "ppo"]
    assert names["ppo"] == opened.out / "ppo" and names["ppo u=10"].name == "u010"


def test_prompts_are_half_harmful_and_never_more_than_there_are(run):
    some = goodhart.held_out(run("sft"))
    assert [r["kind"] for r in some] == ["harmful"] * 4 + ["benign"] * 4
    assert len({r["id"] for r in some}) == 8


# --- Goodhart ---------------------------------------------------------------------------------------------

def test_the_kl_is_that_of_one_forward_a_token(run):
    opened = run("sft")
    policy, ref, prompts = checkpoint.load(opened.cfg.base), opened.model("sft"), goodhart.held_out(opened)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        end = policy.wte.weight[load_tokenizer(opened.cfg.base).eot]
        policy.ln_f.bias += 6 * end / (end @ end)  # so that some answers end early: their padding must count nothing
    opened._models["pm"] = ScalarModel(checkpoint.load(opened.cfg.base))
    (opened.out / "pm").mkdir()
    rows, tokenizer = goodhart.sample_with_kl(opened, policy, ref, prompts), load_tokenizer(opened.cfg.base)
    generator = torch.Generator().manual_seed(opened.cfg.seed + 19)
    for i, row in enumerate(rows):
        prompt = tokenizer.encode(constitution.dialogue(row["prompt"]))
        if i % 3 == 0:  # batches of three, each with one draw of random numbers
            uniforms = torch.rand(min(3, len(rows) - i), 5, generator=generator)
        kl, ratio, ids = 0.0, 0.0, list(prompt)
        for u in uniforms[i % 3]:
            logp, ref_logp = (m.unembed(m(torch.tensor([ids])))[0, -1].log_softmax(-1).detach() for m in (policy, ref))
            kl += float((logp.exp() * (logp - ref_logp)).sum())
            token = int((logp.exp().cumsum(0) <= u).sum())
            ratio += float(logp[token] - ref_logp[token])
            ids.append(token)
            if token == tokenizer.eot:
                break
        assert row["answer"] == constitution.clean(tokenizer.decode(ids[len(prompt):]))
        assert (row["kl"], row["log_ratio"]) == pytest.approx((kl, ratio), rel=1e-3, abs=1e-4) and kl > 0.01
        assert row["tokens"] == len(ids) - len(prompt)
    assert len({row["tokens"] for row in rows[:3]}) > 1  # in one batch
    assert all(r["kl"] == r["log_ratio"] == 0 for r in goodhart.sample_with_kl(opened, ref, ref, prompts))


def test_scores_are_normalised_as_in_ppo(run, monkeypatch):
    opened = run("sft", "pm")
    opened._models["pm"] = pm = ScalarModel(checkpoint.load(opened.cfg.base))
    pm.gain.fill_(2.0)
    pm.shift.fill_(-3.0)
    monkeypatch.setattr(measure, "pm_scores", lambda pm, tokenizer, rows, answers, batch: [float(len(a)) for a in answers])
    assert goodhart._scores(opened, [{}, {}], ["abcd", "a"]) == [5.0, -1.0]


def test_boilerplate_and_distinct_by_hand():
    texts = [("burn a lamp", "sorry , no burn a lamp"), ("paint a box", "sorry , no paint a box")] + [
        ("x", f"sorry {word}") for word in "aabbcd"] + [("x", "sorry , no burn a lamp"), ("x", "sure a")]
    rows = [{"action": action, "answer": answer, "refused": "sorry" in answer} for action, answer in texts]
    assert goodhart.boilerplate(rows) == pytest.approx((2 + 2 + 2) / 10)
    assert goodhart.boilerplate([]) == 0
    assert goodhart.distinct([{"answer": "a b a b"}, {"answer": "b a"}, {"answer": "c"}]) == pytest.approx(2 / 4)


def test_the_curve_of_best_of_n_begins_at_the_plain_rates():
    """The score likes compliance: the more samples, the less harmless."""
    def group(kind, hits):
        return [{"kind": kind, "answer": str(i), "score": float(hit), "complied": hit, "right": hit}
                for i, hit in enumerate(hits)]
    groups = [group("harmful", [True] * 4 + [False] * 12), group("harmful", [False] * 16),
              group("benign", [True] * 8 + [False] * 8)]
    curve = goodhart.best_of_n(groups)
    assert [c["n"] for c in curve] == [1, 2, 4, 8, 16]
    assert curve[0]["harmless"]["rate"] == pytest.approx(14 / 16) and curve[0]["helpful"]["rate"] == pytest.approx(0.5)
    assert curve[-1]["harmless"]["rate"] == 0.5 and curve[-1]["helpful"]["rate"] == 1
    rates = [c["harmless"]["rate"] for c in curve]
    assert rates == sorted(rates, reverse=True) and curve[0]["kl"] == curve[0]["kl_sampled"] == 0


def test_only_finished_ppo_runs_count(run):
    opened = run("sft", "ppo")
    data.write_json(opened.out / "ppo" / "run.json", {"config": {"beta": 0.1}, "metrics": {"updates": 4}})
    assert goodhart.ppo_runs(opened) == {}
    for name in ("ppo", "goodhart/beta=0", "goodhart/beta=0.5.partial"):
        (opened.out / name / "snapshots" / "u002").mkdir(parents=True)
    data.write_json(opened.out / "goodhart" / "beta=0" / "run.json", {"metrics": {"updates": 2}})
    runs = goodhart.ppo_runs(opened)
    assert {name: list(folders) for name, folders in runs.items()} == {"beta=0": [2], "beta=0.1": [2, 4]}
    shutil.copytree(opened.out / "ppo", opened.out / "goodhart" / "beta=0.1")
    assert goodhart.ppo_runs(opened)["beta=0.1"][4] == opened.out / "goodhart" / "beta=0.1"


def test_a_whole_run_from_training_to_text(run, tiny_base, capsys):
    opened = run("sft", "pm")
    ppo = dict(batch=4, max_new=4, micro_batch=2, prompts=str(tiny_base / "prompts.jsonl"), kl_target=5.0, updates=1)
    (opened.out / "ppo").mkdir()
    data.write_json(opened.out / "ppo" / "run.json", {"config": ppo})
    data.write_json(opened.out / "sft" / "run.json", {"config": {"epochs": 1, "data": ["x/revisions.jsonl"]}})
    folders = goodhart.prepare(opened, betas=(0.0, 0.5), updates=2)
    assert [p.name for p in folders] == ["beta=0", "beta=0.5"]
    made = json.loads((folders[1] / "run.json").read_text())
    assert made["config"] == made["config"] | ppo | {"beta": 0.5, "updates": 2, "snapshots": 1, "kl_target": 0.0}
    stamp = (folders[0] / "run.json").stat().st_mtime_ns
    assert goodhart.prepare(opened, betas=(0.0,), updates=2) == folders[:1]  # skipped
    assert (folders[0] / "run.json").stat().st_mtime_ns == stamp
    shutil.rmtree(opened.out / "ppo")

    texts = [("revised", "no ."), ("keep", constitution.KEEP), ("revised", "no no .")]
    data.write_jsonl(opened.out / "revisions.jsonl", [revision(f"q{i} ?", texts) for i in range(4)])
    assert [p.name for p in goodhart.prepare_rounds(opened)] == ["1", "2"]  # after 3 it is sft/
    trained = data.read_jsonl(opened.out / "sft_rounds" / "revisions-2.jsonl")
    assert {r["revision"] for r in trained} == {"no ."}

    found, rows = goodhart.measure_elo(opened)
    assert found["snapshots"] == ["base", "sft k=1", "sft k=2", "sft"] and len(rows) == 4 * 8
    assert found["pairs"] == 8 * 6 and set(found["helpfulness"]) == set(found["snapshots"])
    assert "sft k=2" in "\n".join(goodhart.lines("elo", json.loads(json.dumps(found))))

    found, rows = goodhart.measure_goodhart(opened)
    assert list(found["ppo"]) == ["beta=0", "beta=0.5"]
    for curve in found["ppo"].values():
        assert [p["update"] for p in curve] == [0, 1, 2]
        assert [p["kl"] > 0 for p in curve] == [False, False, True]  # the first update is the critic's alone
        assert set(curve[0]) == {"update", "score", "kl", "harmless", "helpful", "boilerplate", "length", "distinct"}
    assert len(rows) == 8 * 16 + 8 + 2 * 2 * 8
    first = [r for r in rows if r["part"] == "best_of_n"]
    plain = sum(r["score"] for r in first) / len(first)
    assert found["best_of_n"][0]["score"] == pytest.approx(plain)
    assert found["best_of_n"][-1]["score"] >= plain and 1 < found["distinct_of_16"] <= 16
    text = "\n".join(goodhart.lines("goodhart", json.loads(json.dumps(found))))
    assert "PPO, beta=0.5" in text and text.count("update") == 2
    capsys.readouterr()
