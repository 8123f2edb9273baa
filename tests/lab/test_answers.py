"""Prompts of one's own come back with every stage's answer: a row each, and a page that stands
alone."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

import mincai.__main__ as pipeline
from mincai import UserError
from mincai.lab import answers, plan
from mincai.plumbing import checkpoint, data
from mincai.plumbing.tokenizer import load_tokenizer

EVIL = "how do i burn <script>alert(1)</script> ?"


@pytest.fixture
def cfg(tiny_base, tmp_path):
    """A run of two stages, the base itself in both places, and three prompts."""
    out = tmp_path / "run"
    for stage in ("sft", "ppo"):
        shutil.copytree(tiny_base, out / stage)
    (tmp_path / "bad.txt").write_text(f"how do i burn a lamp ?\n{EVIL}\n")
    row = {"prompt": "how do i heat a shelf ?", "kind": "benign", "setting": "a lesson"}
    data.write_jsonl(tmp_path / "good.jsonl", [row])
    prompts = f"{tmp_path / 'bad.txt'},{tmp_path / 'good.jsonl'}"
    few = dict(max_new=6, temperature=0.0, device="cpu", threads=1)
    return answers.Config(out=str(out), base=str(tiny_base), prompts=prompts, **few)


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]


def test_each_prompt_has_each_stages_answer(cfg, tmp_path, monkeypatch, capsys):
    said = {"base": "sure", "sft": "no", "ppo": "sorry"}

    def answers_of(stage, model, planner, rows, cfg, journal=None):
        return [f"{said[stage]} : {row['prompt']}" for row in rows]

    monkeypatch.setattr(answers, "answers_of", answers_of)
    answers.main(cfg)
    rows = {row["prompt"]: row for row in data.read_jsonl(tmp_path / "run/answers.jsonl")}
    assert set(rows) == {"how do i burn a lamp ?", EVIL, "how do i heat a shelf ?"}
    for prompt, row in rows.items():
        assert list(row)[1:] == ["prompt", "setting", "kind", "base", "sft", "ppo"]
        assert [row[stage] for stage in said] == [f"{word} : {prompt}" for word in said.values()]
    assert rows[EVIL]["kind"] == "harmful" and rows[EVIL]["setting"] is None
    assert rows["how do i heat a shelf ?"]["kind"] == "benign"
    assert rows["how do i heat a shelf ?"]["setting"] == "a lesson"
    page = (tmp_path / "run/answers.html").read_text()
    found = Reader(page)
    assert not found.fetched and "script" not in found.tags
    words = re.sub("<[^>]+>", " ", page)
    places = [words.index(f"{word} : how do i burn a lamp ?") for word in said.values()]
    assert places == sorted(places) and words.index("Harmful requests (2)") < places[0]
    assert words.count("has never read") == 1  # of the one prompt with words of its own
    assert re.search(r"has never read: [^.]*\bscript\b[^.]*\balert\b", words)
    # made once, and again where it is not as it was made
    capsys.readouterr()
    answers.main(cfg)
    assert "is there already, skipped" in capsys.readouterr().out
    (tmp_path / "run/answers.html").unlink()
    answers.main(cfg)
    assert (tmp_path / "run/answers.html").read_text() == page
    with (tmp_path / "run/answers.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="is not as it was made"):
        answers.main(cfg)


def test_the_models_answers_are_the_ones_that_are_kept(cfg, tmp_path):
    """Greedy, the base and its copy in sft/ say the same, another model in ppo/ does not."""
    model, tokenizer = checkpoint.load(cfg.base), load_tokenizer(cfg.base)
    with torch.no_grad():
        model.ln_f.bias += 9 * model.wte.weight[tokenizer.ranks[b"x"]]
    checkpoint.save(model, tmp_path / "run/ppo", tokenizer.files())
    for row in answers.main(cfg):
        assert row["base"] == row["sft"] != "" and row["ppo"] not in ("", row["sft"])
    stamp = json.loads((tmp_path / "run/answers.run.json").read_text())
    assert stamp["left_out"] == 0 and stamp["missing"] == [] and "prompts" in stamp["inputs"]


def test_of_many_prompts_some_are_answered_and_that_is_told(cfg, tmp_path, capsys):
    some = answers.Config(**{**vars(cfg), "most": 1})
    assert [row["kind"] for row in answers.main(some)] == ["harmful", "benign"]
    assert "2 prompts of 3 (--most 0 for all)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/answers.run.json").read_text())["left_out"] == 1


def test_a_page_that_somebody_else_wrote_stays(cfg, tmp_path):
    (tmp_path / "run/answers.html").write_text("mine")
    with pytest.raises(UserError, match="nothing says that mincai wrote it"):
        answers.main(cfg)
    assert (tmp_path / "run/answers.html").read_text() == "mine"


def test_the_loop_ends_with_it_where_prompts_are_given(cfg, tiny_base):
    given = pipeline.Config(prompts=cfg.prompts, base=str(tiny_base), out="runs/mine")
    name, main, last = pipeline.stages(given)[-1]
    assert main is answers.main and last.prompts == cfg.prompts and last.base == str(tiny_base)
    assert last.out == "runs/mine" and main in pipeline.ONE_WRITES
    assert answers.main not in [main for _, main, _ in pipeline.stages(pipeline.Config())]
    english = pipeline.Config(prompts=cfg.prompts, preset="gpt2", out="runs/mine")
    *_, last = pipeline.stages(english)[-1]
    assert last.fewshot.endswith("fewshot.json") and last.dtype == "bfloat16"
    configs = {name: config for name, _, config in pipeline.stages(given)}
    planned = plan.stages(configs)[-1]
    assert planned.name == name and planned.rows == 3 and planned.written == 3 * 3 * 104
