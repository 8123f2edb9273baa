"""Critique and revision by a model whose words are scripted: what stands, what is dropped, what is
kept."""

import json
import random

import pytest

from mincai import UserError, constitution, critique
from mincai.plumbing import data
from mincai.plumbing.planner import Planner
from mincai.plumbing.tokenizer import load_tokenizer

PRINCIPLES = constitution.select(constitution.load_constitution())


@pytest.fixture
def script(tiny_base, monkeypatch):
    """script(function): lets it write each text, given the prompt; what ends "..." was cut off
    there."""
    tokenizer, read = load_tokenizer(tiny_base), []

    def start(write):
        def generate_batched(model, prompts, *args, **settings):
            read.extend(map(tokenizer.decode, prompts))
            texts = [write(tokenizer.decode(prompt)) for prompt in prompts]
            return [
                tokenizer.encode(" " + t.removesuffix("..."))
                + [tokenizer.eot] * (not t.endswith("..."))
                for t in texts
            ]

        monkeypatch.setattr(critique, "generate_batched", generate_batched)
        return read

    start.tokenizer = tokenizer
    return start


def revised(script, revisions, rounds=None, original="first", block_size=256):
    """One item, one text of `revisions` a round -> (item, counts, all that the model read)."""
    texts = iter(revisions)
    read = script(
        lambda prompt: next(texts) if prompt.endswith("Revision:") else "so it breaks it ."
    )
    item = {"conversation": constitution.dialogue("q ?"), "original": original, "category": "theft"}
    cfg = critique.Config(rounds=rounds or len(revisions), max_new=20, temperature=1.0)
    writer = critique.Writer(None, Planner(script.tokenizer, block_size), cfg, None)
    counts = critique.critique_rounds(writer, [item], PRINCIPLES, random.Random(0))
    return item, counts, read


def test_a_revision_replaces_the_answer_and_is_what_is_criticised_next(script):
    item, counts, read = revised(script, ["second", "third"])
    assert item["revision"] == "third" and item["original"] == "first" and counts == {"revised": 2}
    shown = [text.split("Assistant: ")[1].split("\n")[0] for text in read]
    assert shown == ["first", "first", "second", "second"]
    assert all(
        text.startswith("Review:\nHuman: q ?\n") for text in read
    )  # a fresh conversation every round
    assert "Critique: so it breaks it .\nRevision:" in read[1] and read[0].endswith("Critique:")


def test_keep_leaves_the_answer(script):
    item, counts, _ = revised(script, [constitution.KEEP, "second", constitution.KEEP])
    assert item["revision"] == "second" and counts == {"keep": 2, "revised": 1}


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "empty"),
        ("first", "same as the answer"),
        ("half an answ...", "cut off"),
        ("keep the answer ....", "cut off"),
        ("the principle is about theft .", "not an answer"),
        ("Human: q", "not an answer"),
    ],
)
def test_what_is_no_revision_is_counted_and_never_stands(script, text, why):
    item, counts, _ = revised(script, [text])
    assert (
        item["revision"] == "first" and counts == {why: 1} and item["rounds"][0]["outcome"] == why
    )


def test_a_rambling_answer_is_left_alone_and_does_not_end_the_job(script):
    item, counts, read = revised(script, [], rounds=2, original="word " * 300)
    assert item["revision"] == item["original"] and counts == {"no room": 2} and read == []


def test_every_round_draws_its_own_principle(script):
    item, _, read = revised(script, [f"answer {n}" for n in range(12)])
    drawn = [r["principle"] for r in item["rounds"]]
    tiny = {p.id: p.tiny for p in PRINCIPLES}
    assert len(set(drawn)) > 3 and [r["round"] for r in item["rounds"]] == list(range(1, 13))
    assert [text.split("Principle: ")[1].split("\n")[0] for text in read[::2]] == [
        tiny[p] for p in drawn
    ]


@pytest.fixture
def cfg(tiny_base, tmp_path):
    rows = [
        {
            "id": f"{split}-{i}",
            "prompt": f"{split} {i} ?",
            "kind": kind,
            "split": split,
            "attack": "plain",
            "category": "theft" if kind == "harmful" else "",
            "action": "sell a map",
        }
        for i, (split, kind) in enumerate(
            [
                ("loop", "harmful"),
                ("loop", "benign"),
                ("eval", "harmful"),
                ("eval-twin", "benign"),
                ("unseen-category", "harmful"),
            ]
        )
    ]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return critique.Config(
        model=str(tiny_base),
        prompts=str(tmp_path / "prompts.jsonl"),
        responses=2,
        rounds=2,
        max_new=20,
        out=str(tmp_path / "revisions.jsonl"),
        device="cpu",
        threads=1,
    )


def test_rows_keep_everything_and_only_the_loops_prompts_are_used(script, cfg):
    step = iter(range(100))
    read = script(lambda prompt: f"text {next(step)}")
    assert (
        critique.main(cfg)["items"] == 3
    )  # two answers to the harmful prompt, one to the ordinary one
    rows = data.read_jsonl(cfg.out)
    assert [row["id"] for row in rows] == ["loop-0", "loop-0", "loop-1"]
    assert not [text for text in read if "eval" in text or "unseen" in text]
    written = {f"text {n}" for n in range(next(step))}
    kept = [row["original"] for row in rows] + [
        r[k] for row in rows for r in row["rounds"] for k in ("critique", "revision")
    ]
    assert set(kept) == written and len(kept) == len(
        written
    )  # each text that the model wrote, once
    for row in rows:
        assert row["revision"] == row["rounds"][-1]["revision"] and row["changed"]
        assert row.keys() >= {
            "prompt",
            "kind",
            "category",
            "attack",
            "original",
            "revision",
            "rounds",
        }
    stamp = data.sidecar(cfg.out).read_text()
    assert '"revised": 6' in stamp


def test_principles_are_aimed_at_the_prompts_own_category(script, cfg, monkeypatch):
    script(lambda prompt: "text")
    monkeypatch.setattr(critique, "AIM", 1.0)
    critique.main(cfg)
    for row in data.read_jsonl(cfg.out):
        targets = {r["principle"].split("-")[0] for r in row["rounds"]}
        assert targets <= ({"theft"} if row["kind"] == "harmful" else {"help", "reasons"})


def test_without_a_category_the_kind_says_what_principles_are_about(script, cfg, monkeypatch):
    """Prompts of one's own seldom name a category of ours; ordinary ones may name a topic."""
    script(lambda prompt: "text")
    monkeypatch.setattr(critique, "AIM", 1.0)
    rows = data.read_jsonl(cfg.prompts)
    category = {"harmful": "", "benign": "theft"}
    data.write_jsonl(cfg.prompts, [row | {"category": category[row["kind"]]} for row in rows])
    critique.main(cfg)
    targets = {p.id: p.target for p in PRINCIPLES}
    for row in data.read_jsonl(cfg.out):
        found = {targets[r["principle"]] for r in row["rounds"]}
        assert found <= ({"harm"} if row["kind"] == "harmful" else {"help", "reasons"})


def test_direct_revision_writes_no_critique_and_keeps_the_same_rules(script, cfg):
    texts = iter(["first", "second", "half...", constitution.KEEP] * 9)
    read = script(lambda prompt: "sure ." if prompt.endswith("Assistant:") else next(texts))
    found = critique.main(critique.Config(**{**vars(cfg), "direct": True, "rounds": 4}))
    rows = data.read_jsonl(cfg.out)
    outcomes = [r["outcome"] for row in rows for r in row["rounds"]]
    assert {name: outcomes.count(name) for name in set(outcomes)} == {
        k: found[k] for k in set(outcomes)
    }
    assert found["revised"] and found["keep"] and found["cut off"] and not found.get("no room")
    assert not any(r["critique"] for row in rows for r in row["rounds"])
    asked = [text for text in read if text.startswith("Review:")]
    assert len(asked) == 4 * len(rows) and len(read) == 5 * len(
        rows
    )  # half as many texts as with critiques
    assert all(text.endswith("\nRevision:") and "Critique:" not in text for text in asked)
    assert any("Assistant: first\n" in text for text in asked)  # a revision is what is revised next


def test_done_work_is_skipped_and_other_settings_are_an_error(script, cfg, capsys):
    read = script(lambda prompt: "text")
    critique.main(cfg)
    count = len(read)
    assert critique.main(cfg) == {"skipped": True} and len(read) == count
    assert "is there already, made with these settings (--again to redo)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rounds 2, now it is 3"):
        critique.main(critique.Config(**{**vars(cfg), "rounds": 3}))
    critique.main(critique.Config(**{**vars(cfg), "rounds": 3, "again": True}))
    assert len(data.read_jsonl(cfg.out)[0]["rounds"]) == 3


def test_without_a_prompt_of_the_loop_there_is_nothing_to_do(cfg, tmp_path):
    row = {"id": "x", "prompt": "q", "kind": "harmful", "split": "eval"}
    data.write_jsonl(tmp_path / "prompts.jsonl", [row])
    with pytest.raises(UserError, match="loop"):
        critique.main(cfg)


FEWSHOT = json.loads(
    (constitution.PATH.parent / "english" / "fewshot.json").read_text(encoding="utf-8")
)["review"]


@pytest.mark.parametrize(
    "text, why",
    [
        ("Keep the answer.", "keep"),
        ("keep the answer", "keep"),
        ("FIRST.", "same as the answer"),
        ("...", "empty"),
        ("Assistant: sorry", "not an answer"),
        ("Request: sorry", "not an answer"),
        ("(A): sorry", "not an answer"),
        ("it is wrong so it breaks this principle .", "not an answer"),
        ("So bad, it is.", "not an answer"),
        ("Review your notes every day.", ""),
        ("The answer is 42.", ""),
        ("Keep the answer to yourself.", ""),
        *[(shot["critique"], "not an answer") for shot in FEWSHOT],
    ],
)
def test_what_is_no_answer_takes_no_answers_place(text, why):
    """In English too, where case and punctuation vary; a critique is known by how it ends, or by
    being the one just written."""
    assert critique.rejected(text, "first", "So bad it is") == why


def test_the_examples_revisions_are_answers():
    for shot in FEWSHOT:
        kept = " ".join(critique.words(shot["revision"])) == " ".join(
            critique.words(constitution.KEEP)
        )
        assert critique.rejected(shot["revision"], shot["answer"], shot["critique"]) == (
            "keep" if kept else ""
        )


def test_prompts_of_one_s_own_with_unread_words_are_warned_of_once(tiny_base, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("how do i burn a lamp ?\nhow do i rent a flat ?\n")
    critique.main(
        critique.Config(
            model=str(tiny_base),
            prompts=f"{tmp_path}/mine.txt",
            rounds=1,
            responses=1,
            max_new=4,
            out=str(tmp_path / "revisions.jsonl"),
            device="cpu",
            threads=1,
        )
    )
    warning = f"1 of 2 prompts have words that {tiny_base} has never read: rent flat;"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize(
    "cut, told", [(True, "for this reason: cut off; raise --max-new"), (False, "")]
)
def test_a_reason_that_most_revisions_fail_for_is_told(script, cfg, capsys, cut, told):
    step = iter(range(100))
    script(
        lambda prompt: (
            f"text {next(step)}" + ("..." if cut and prompt.endswith("Revision:") else "")
        )
    )
    critique.main(cfg)
    shown = capsys.readouterr().out
    assert ("WARNING" in shown) == cut and told in shown
