"""The settings that change what a judge or a critic reads, and what is kept: labels, ensembles,
examples, wording."""

import dataclasses
import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch

from mincai import UserError, constitution, critique, feedback
from mincai.plumbing import data
from mincai.plumbing.planner import Planner, load_shots
from mincai.plumbing.tokenizer import from_ranks, load_tokenizer

PRINCIPLES = constitution.select(constitution.load_constitution())
TALK = [constitution.dialogue(f"how do i {x} ?") for x in ("burn a lamp", "sell a map")]
EXAMPLES = {
    "answer": [{"human": "why ?", "assistant": "so ."}],
    "review": [
        {
            "human": "when ?",
            "answer": "now .",
            "principle_id": "help-5",
            "critique": "it breaks it .",
            "revision": "then .",
        }
    ],
    "compare": [
        {
            "human": "who ?",
            "a": "he .",
            "b": "she .",
            "principle_id": "help-5",
            "reasons": "she is .",
            "choice": "B",
        }
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture
def fewshot(tmp_path):
    (tmp_path / "shots.json").write_text(json.dumps(EXAMPLES))
    return str(tmp_path / "shots.json")


@pytest.mark.parametrize(
    "p, clamp, soft, hard, clamped",
    [
        (0.0, 0.4, 0.0, 0.0, 0.4),
        (0.3, 0.4, 0.3, 0.0, 0.4),
        (0.45, 0.4, 0.45, 0.0, 0.45),
        (0.5, 0.4, 0.5, 0.5, 0.5),
        (0.51, 0.4, 0.51, 1.0, 0.51),
        (0.97, 0.4, 0.97, 1.0, 0.6),
        (0.97, 0.1, 0.97, 1.0, 0.9),
        (1.0, 0.0, 1.0, 1.0, 1.0),
    ],
)
def test_labels_by_hand(monkeypatch, p, clamp, soft, hard, clamped):
    assert feedback.CLAMP == 0.4  # the paper's 40 to 60%
    monkeypatch.setattr(feedback, "CLAMP", clamp)
    assert feedback.label(p, "soft") == soft and feedback.label(p, "hard") == hard
    assert feedback.label(p, "clamped") == pytest.approx(clamped)


# --- what the judge reads -------------------------------------------------------------------------------------


@pytest.fixture
def judged(tokenizer, fake_judge):
    """judged(planner, a, b) -> (verdicts, prompts for reasons, prompts for a letter); it likes
    "good" answers."""

    def start(planner, a, b, **settings):
        wrote, chose = [], []

        def write(prompts):
            wrote.extend(map(tokenizer.decode, prompts))
            return [tokenizer.encode(" it is so .") + [tokenizer.newline] for _ in prompts]

        def choose(texts):
            chose.extend(texts)
            good = [[f"({x}): good" in text for x in "AB"] for text in texts]
            return torch.tensor([[0.0 if x else -2.0 for x in row] for row in good]).reshape(-1, 2)

        fake_judge(tokenizer, write, choose)
        rules = [p.tiny for p in PRINCIPLES[: len(a)]]
        return (
            feedback.judge(None, planner, TALK[: len(a)], a, b, rules, max_new=20, **settings),
            wrote,
            chose,
        )

    return start


def test_a_judge_with_examples_reads_them_first(tokenizer, judged, fewshot):
    shots = load_shots(fewshot, PRINCIPLES)
    _, wrote, chose = judged(
        Planner(tokenizer, 400, shots), ["good .", "bad ."], ["bad .", "good ."]
    )
    assert len(wrote) == len(chose) == 4  # two pairs, both orders
    (example,) = shots["compare"]
    assert example.endswith("Reasons: she is .\nChoice: (B)")
    for text in wrote + chose:
        assert (
            text.startswith(example + "\n\nCompare:\nHuman: how do i ")
            and text.count("Compare:") == 2
        )
        assert "Review:" not in text and "Human: why ?" not in text  # those are other kinds
    assert all(text.endswith("\nReasons:") for text in wrote)
    assert all(text.endswith("\nReasons: it is so .\nChoice: (") for text in chose)


def test_a_judge_without_examples_reads_the_pair_alone(tokenizer, judged):
    verdicts, wrote, chose = judged(
        Planner(tokenizer, 400), ["good .", "bad ."], ["bad .", "good ."]
    )
    assert all(
        text.startswith("Compare:\n") and text.count("Compare:") == 1 for text in wrote + chose
    )
    high = 1 / (1 + torch.tensor(-2.0).exp().item())
    assert (
        verdicts.p_a == pytest.approx([high, 1 - high]) and verdicts.reasons == ["it is so ."] * 2
    )


@pytest.mark.parametrize("shown", [True, False])
def test_without_reasons_nothing_is_written_and_no_example_has_any(
    tokenizer, judged, fewshot, shown
):
    shots = load_shots(fewshot if shown else "", PRINCIPLES, reasons=False)
    verdicts, wrote, chose = judged(
        Planner(tokenizer, 400, shots), ["good ."], ["bad ."], reasons=False
    )
    assert wrote == [] and len(chose) == 2 and verdicts.reasons == [""]
    assert all("Reasons" not in text and text.endswith(" .\nChoice: (") for text in chose)
    assert all(text.startswith("Compare:\nHuman: who ?") == shown for text in chose)


@pytest.mark.parametrize("reasons", [True, False])
def test_a_pair_without_room_has_no_verdict_and_the_others_have(tokenizer, judged, reasons):
    long = "good " + "lamp " * 200
    verdicts, _, chose = judged(
        Planner(tokenizer, 200), [long, "good ."], ["bad .", "bad ."], reasons=reasons
    )
    assert verdicts.p_a[0] is None and verdicts.p_a[1] > 0.8 and verdicts.same_slot == 0
    assert len(chose) == 2 and verdicts.reasons[0] == ""
    verdicts, _, _ = judged(Planner(tokenizer, 200), [long], ["bad ."], reasons=reasons)
    assert verdicts.p_a == [None] and verdicts.same_slot == 0  # nothing at all is left


# --- what the stage keeps -------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tiny_base, tmp_path):
    rows = [
        {"id": f"p{n}", "prompt": f"how {n} ?", "kind": kind, "category": category, "split": "loop"}
        for n, (kind, category) in enumerate(
            [("harmful", "theft"), ("harmful", "hate"), ("benign", "")]
        )
    ]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return feedback.Config(
        model=str(tiny_base),
        judge=str(tiny_base),
        prompts=str(tmp_path / "prompts.jsonl"),
        out=str(tmp_path / "comparisons.jsonl"),
        samples=3,
        base_samples=0,
        max_new=20,
        device="cpu",
        threads=1,
    )


@pytest.fixture
def stage(cfg, tokenizer, monkeypatch):
    """stage(judge, **settings) -> rows: three answers to each of three prompts, and p of (a, b,
    principle's text)."""

    def start(p_of, **settings):
        texts = itertools.cycle([" one .", " two .", " three ."])
        monkeypatch.setattr(
            feedback,
            "generate_batched",
            lambda model, prompts, *_, n=1, **__: [
                tokenizer.encode(next(texts)) + [tokenizer.eot] for _ in range(n * len(prompts))
            ],
        )

        def judge(model, planner, conversations, a, b, principles, **_):
            p = list(map(p_of, a, b, principles))
            return feedback.Verdicts(p, p, p, ["why"] * len(p), 0.5)

        monkeypatch.setattr(feedback, "judge", judge)
        feedback.main(dataclasses.replace(cfg, **settings))
        return data.read_jsonl(cfg.out)

    return start


@pytest.mark.parametrize(
    "labels, kept",
    [("soft", [0.03, 0.5, 0.7]), ("hard", [0.0, 0.5, 1.0]), ("clamped", [0.4, 0.5, 0.6])],
)
def test_the_label_that_was_asked_for_is_kept(stage, labels, kept):
    values = itertools.cycle([0.03, 0.5, 0.7])
    rows = stage(lambda *_: next(values), labels=labels)
    assert [row["p_a"] for row in rows] == pytest.approx(kept * 3)
    assert [row["p_ab"] for row in rows] == [0.03, 0.5, 0.7] * 3 and "votes" not in rows[0]


def test_an_ensemble_is_averaged_and_its_votes_are_kept(stage, monkeypatch):
    """Drawn in turn, so that the three principles of a pair differ; each has its own opinion."""
    turn = itertools.cycle(PRINCIPLES[:50])
    monkeypatch.setattr(constitution, "draw", lambda *_: next(turn))
    opinion = {p.tiny: n / 50 for n, p in enumerate(PRINCIPLES[:50])}
    tiny = {p.id: p.tiny for p in PRINCIPLES}
    rows = stage(lambda a, b, text: opinion[text], ensemble=3)
    assert len(rows) == 9
    for n, row in enumerate(rows):
        drawn = [PRINCIPLES[i].id for i in (3 * n, 3 * n + 1, 3 * n + 2)]
        assert (
            row["votes"] == {name: opinion[tiny[name]] for name in drawn}
            and row["principle"] == drawn[0]
        )
        assert row["p_a"] == pytest.approx((3 * n + 1) / 50)


def test_labels_are_made_of_the_average_and_not_of_the_votes(stage, monkeypatch):
    """0.9, 0.2 and 0.2 make 0.43, a loss; of three hard labels a third would be left."""
    turn = itertools.cycle(PRINCIPLES[:3])
    monkeypatch.setattr(constitution, "draw", lambda *_: next(turn))
    opinion = {p.tiny: x for p, x in zip(PRINCIPLES, (0.9, 0.2, 0.2))}
    rows = stage(lambda a, b, text: opinion[text], ensemble=3, labels="hard")
    assert [row["p_a"] for row in rows] == [0.0] * 9 and set(rows[0]["votes"].values()) == {
        0.9,
        0.2,
    }


def test_who_has_no_room_has_no_vote(stage, monkeypatch):
    turn = itertools.cycle(PRINCIPLES[:2])
    monkeypatch.setattr(constitution, "draw", lambda *_: next(turn))

    def p_of(a, b, text):
        return None if "three ." in (a, b) or text == PRINCIPLES[0].tiny else 0.8

    rows = stage(p_of, ensemble=2)
    assert len(rows) == 3 and all(
        row["p_a"] == 0.8 and "three ." not in (row["a"], row["b"]) for row in rows
    )
    assert [row["votes"] for row in rows] == [{PRINCIPLES[1].id: 0.8}] * 3
    with pytest.raises(UserError, match="nothing to compare"):
        stage(lambda *_: None, again=True)


@pytest.mark.parametrize("reasons", [True, False])
def test_the_stage_shows_its_examples(cfg, tokenizer, fewshot, fake_judge, monkeypatch, reasons):
    """Those of answers to the judge's own model only, those of comparisons to the judge, with
    reasons or without."""
    texts, read = itertools.cycle([" one .", " two ."]), {"answer": [], "reasons": [], "letter": []}

    def write(prompts):
        read["reasons"].extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode(next(texts)) + [tokenizer.newline] for _ in prompts]

    def choose(texts):
        read["letter"].extend(texts)
        return torch.zeros(len(texts), 2)

    fake_judge(tokenizer, write, choose)

    def generate_batched(model, prompts, *args, n, **more):
        read["answer"].extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode(next(texts)) + [tokenizer.eot] for _ in range(n * len(prompts))]

    monkeypatch.setattr(feedback, "generate_batched", generate_batched)
    feedback.main(dataclasses.replace(cfg, fewshot=fewshot, base_samples=1, reasons=reasons))
    assert [
        text.startswith("Human: why ?\nAssistant: so .\n\nHuman: how ") for text in read["answer"]
    ] == [False] * 3 + [True] * 3  # the tuned model needs no examples
    (example,) = load_shots(fewshot, PRINCIPLES, reasons)["compare"]
    assert read["letter"] and all(
        text.startswith(example + "\n\nCompare:\n") for text in read["letter"]
    )
    assert len(read["reasons"]) == (len(read["letter"]) if reasons else 0)
    assert reasons == any("Reasons:" in text for text in read["letter"])


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"labels": "firm"}, "--labels firm: choose soft, hard or clamped"),
        ({"ensemble": 0}, "--ensemble 0: give a number of 1 or more"),
        ({"fewshot": "none.json"}, "none.json"),
    ],
)
def test_a_wrong_setting_is_said(cfg, settings, match):
    with pytest.raises(UserError, match=match):
        feedback.main(dataclasses.replace(cfg, **settings))


# --- critique -------------------------------------------------------------------------------------------------


def test_answers_that_are_none_are_dropped_and_counted(tokenizer, monkeypatch):
    """A half answer can be criticised like any other; it is its revision that has to be whole."""
    ends = {
        "whole": "fine .",
        "line": "good .",
        "half": "half an",
        "empty": "",
        "blank": " ",
        "long": "never asked",
    }
    asked = []

    def generate_batched(model, prompts, max_new, stop, batch_size, temperature, **_):
        assert (
            stop == {tokenizer.eot, tokenizer.newline} and temperature == 1.0
        )  # whatever cfg says
        names = [
            name
            for prompt in prompts
            for name in ends
            if f"Human: {name} " in tokenizer.decode(prompt)
        ]
        asked.extend(names)
        return [
            tokenizer.encode(" " + ends[name]) * (name != "empty")
            + {"half": [], "line": [tokenizer.newline]}.get(name, [tokenizer.eot])
            for name in names
        ]

    monkeypatch.setattr(critique, "generate_batched", generate_batched)
    items = [
        {"conversation": constitution.dialogue(f"{name} {'lamp ' * 200 * (name == 'long')}?")}
        for name in ends
    ]
    planner, cfg = Planner(tokenizer, 200), critique.Config(max_new=20, batch_size=8)
    writer = critique.Writer(None, planner, cfg, None)
    kept, dropped = critique.respond(writer, items)
    assert [item["original"] for item in kept] == ["fine .", "good .", "half an"] and kept == items[
        :3
    ]
    assert dict(dropped) == {"empty": 2, "no room": 1}
    assert asked == ["whole", "line", "half", "empty", "blank"] and planner.counts["no room"] == 1
    assert dict(critique.respond(writer, items[:2])[1]) == {}


def test_what_is_to_be_one_line_ends_with_every_token_that_ends_one(monkeypatch):
    """GPT-2 has a token for two line ends; an answer that went on after it would be of several."""
    two = from_ranks({bytes([b]): b for b in range(256)} | {b"\n\n": 256})
    planner, seen = Planner(two, 400), []

    def generate_then(model, prompts, max_new, stop, *_, **__):
        seen.append(stop)
        return [[256] for _ in prompts], torch.zeros(len(prompts), 2)

    def generate_batched(model, prompts, max_new, stop, *_, **__):
        seen.append(stop)
        return [[*b" yes", 256] for _ in prompts]

    monkeypatch.setattr(feedback, "generate_then", generate_then)
    for module in (critique, feedback):
        monkeypatch.setattr(module, "generate_batched", generate_batched)
    feedback.judge_once(None, planner, ["Compare:"])
    writer = critique.Writer(None, planner, critique.Config(max_new=9), None)
    kept, _ = critique.respond(writer, [{"conversation": TALK[0]}])
    sampler = SimpleNamespace(config=SimpleNamespace(block_size=400))
    models = feedback.Models(None, sampler, planner, None)
    found = feedback.answers_of(sampler, 1, TALK[:1], models, feedback.Config(max_new=9), True)
    assert found == [[(*b" yes", two.eot)]] and kept[0]["original"] == "yes"
    assert seen == [{10, 256, two.eot}] * 3


@pytest.mark.parametrize(
    "said, why",
    [(" it breaks it .", "critique cut off"), ("", "critique empty"), (" ", "critique empty")],
)
def test_without_a_whole_critique_no_revision_stands(tokenizer, monkeypatch, said, why):
    def generate_batched(model, prompts, *_, **__):
        asks = tokenizer.decode(prompts[0]).endswith("Critique:")
        return [
            tokenizer.encode(said) + [tokenizer.eot] * (not said.strip())
            if asks
            else tokenizer.encode(" text .") + [tokenizer.eot]
        ]

    monkeypatch.setattr(critique, "generate_batched", generate_batched)
    item = {"conversation": TALK[0], "original": "first .", "category": "theft"}
    cfg = critique.Config(rounds=1, max_new=20)
    writer = critique.Writer(None, Planner(tokenizer, 256), cfg, None)
    counts = critique.critique_rounds(writer, [item], PRINCIPLES, random.Random(0))
    assert (
        dict(counts) == {why: 1}
        and item["revision"] == "first ."
        and item["rounds"][0]["revision"] == "text ."
    )


@pytest.mark.parametrize("shown", [True, False])
def test_with_examples_all_is_asked_in_full_words(tokenizer, monkeypatch, fewshot, shown):
    shots = load_shots(fewshot if shown else "", PRINCIPLES)
    read, rule = [], next(p for p in PRINCIPLES if p.target == "theft")
    written = iter((" text .", " other ."))

    def generate_batched(model, prompts, *_, **__):
        read.extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode(next(written)) + [tokenizer.newline] for _ in prompts]

    monkeypatch.setattr(critique, "generate_batched", generate_batched)
    item = {
        "conversation": constitution.dialogue("q ?"),
        "original": "first .",
        "category": "theft",
    }
    cfg = critique.Config(rounds=1, max_new=20)
    writer = critique.Writer(None, Planner(tokenizer, 2000, shots), cfg, None)
    critique.critique_rounds(writer, [item], [rule], random.Random(0))
    said = f"{rule.text} {rule.critique}" if shown else rule.tiny
    head = f"Review:\nHuman: q ?\nAssistant: first .\nPrinciple: {said}\nCritique:"
    front = shots["review"][0] + "\n\n" if shown else ""
    request = f"Request: {rule.revision}\n" if shown else ""
    assert read == [front + head, front + head + f" text .\n{request}Revision:"]
    assert item["revision"] == "other ." and ("\nRequest: " in front) == shown
