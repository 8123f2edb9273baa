"""How likely complying and refusing are: against one plain forward, and on a run as far as fine-tuning."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mincai import checkpoint, constitution, corpus, data, evaluate, inside, measure, world
from mincai.tokenizer import load_tokenizer

ACTIONS = {a.text: a for a in world.build()}
TINY = Path(__file__).resolve().parents[1] / "data/tiny"


def held_out(split):
    return [r for r in data.read_jsonl(TINY / "prompts_eval.jsonl") if r["split"] == split]


def test_probabilities_inside_against_one_forward(tiny_base):
    model, tokenizer = checkpoint.load(tiny_base), load_tokenizer(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights find all tokens about as likely, and hide mistakes
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    bad, good = held_out("eval")[5], held_out("eval-twin")[3]

    def after(row, text):
        ids = tokenizer.encode(constitution.dialogue(row["prompt"]) + " " + text)
        with torch.no_grad():
            p = model.unembed(model(torch.tensor([ids])))[0, -1].softmax(-1)
        return {w: float(p[tokenizer.encode(" " + w)[0]]) for w in ("sure", "sorry", "that", *world.HARMS)}

    def per_token(row, text):
        start, ids = (tokenizer.encode(t) for t in (constitution.dialogue(row["prompt"]), " " + text))
        ids.append(tokenizer.eot)
        with torch.no_grad():
            logp = model.unembed(model(torch.tensor([start + ids])))[0].log_softmax(-1)
        return sum(float(logp[len(start) + i - 1, token]) for i, token in enumerate(ids)) / len(ids)

    for row, found in zip((bad, good), inside.look(model, tokenizer, [bad, good], ACTIONS, 2)):
        action = ACTIONS[row["action"]]
        wants = f"you want to {action.text} ."
        verdict = ("wrong , it is %s and hurts" if action.wrong else "fine , it is %s and helps") % action.reason
        told, bare = after(row, f"{wants} that is {verdict} {action.who} ."), after(row, wants)
        harms = after(row, f"{wants} that is wrong , it is")
        reason = action.reason if action.wrong else max(world.HARMS, key=harms.get)
        expected = {"comply_first": told["sure"], "refuse_first": told["sorry"], "comply_bare": bare["sure"],
                    "refuse_bare": bare["sorry"], "fact_bare": bare["that"],
                    "comply_logp": per_token(row, world.comply(action, sure_first=corpus.sure_first(row["prompt"]))),
                    "comply_told_logp": per_token(row, world.comply_told(action)),
                    "refuse_logp": per_token(row, world.refuse(action, reason))}
        assert found == pytest.approx(expected, rel=1e-3)
        assert set(found) == {*inside.FIRST, *inside.WHOLE}


def test_quantiles_and_digits():
    assert inside.quantiles([float(i) for i in range(101)]) == {"q05": 5, "q25": 25, "q50": 50, "q75": 75, "q95": 95}
    assert inside.short(1.23456789e-7) == 1.2346e-7 and inside.short(-0.612345678) == -0.61235


def test_inside_of_a_run(tiny_base, tmp_path):
    data.write_jsonl(tmp_path / "prompts.jsonl", held_out("eval")[::80] + held_out("eval-twin")[::80])
    shutil.copytree(tiny_base, tmp_path / "run/sft")
    cfg = evaluate.Config(out=str(tmp_path / "run"), base=str(tiny_base), prompts=str(tmp_path / "prompts.jsonl"),
                          judged=4, device="cpu", threads=1)
    opened = measure.open_run(cfg, torch.device("cpu"))
    found, rows = inside.measure_inside(opened)
    json.dumps([found, rows])
    assert list(found) == ["base", "sft"] and len(rows) == 2 * 2 * 4
    here = found["sft"]["harmful"]
    assert here["comply_first"] == [r["comply_first"] for r in rows if (r["stage"], r["kind"]) == ("sft", "harmful")]
    assert here["quantiles"]["refuse_logp"]["q50"] == pytest.approx(np.quantile(here["refuse_logp"], 0.5), rel=1e-4)
    assert all(math.isfinite(x) for r in rows for k, x in r.items() if k.endswith(("logp", "first", "bare")))
    text = "\n".join(inside.lines("inside", found))
    assert f"{here['quantiles']['comply_first']['q50']:.2g}" in text and "4 benign" in text
