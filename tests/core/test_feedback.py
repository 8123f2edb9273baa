"""The judge treats both slots alike once both orders are averaged; pairs differ; rows keep token
ids."""

import random
from collections import Counter
from itertools import cycle

import pytest
import torch

from mincai import UserError, constitution, feedback
from mincai.plumbing import checkpoint, data
from mincai.plumbing.logprobs import next_logp
from mincai.plumbing.planner import Planner
from mincai.plumbing.tokenizer import load_tokenizer

TRAIN = {p.id for p in constitution.load_constitution() if p.split == "train"}
TALK = [
    constitution.dialogue(f"how do i {x} ?") for x in ("burn a lamp", "sell a map", "pull a wheel")
]
A, B = (
    ["sure . take it .", "sorry .", "you want to ?"],
    ["sorry , it is theft .", "sure .", "yes ."],
)
RULES = ["never lead people to violence .", "be kind : no slander .", "stay clear of theft ."]


@pytest.fixture
def judge(tiny_base):
    model, tokenizer = checkpoint.load(tiny_base), load_tokenizer(tiny_base)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():  # far from uniform, so that a slip shows
            parameter.add_(0.3 * torch.randn_like(parameter))
    planner = Planner(tokenizer, model.config.block_size)
    return lambda a, b, **more: feedback.judge(
        model, planner, TALK, a, b, RULES, **{"max_new": 12, **more}
    )


@pytest.mark.parametrize("reasons", [True, False])
def test_swapping_the_answers_turns_p_a_around(judge, reasons):
    one, other = judge(A, B, reasons=reasons), judge(B, A, reasons=reasons)
    assert one.p_ab == other.p_ba and one.p_ba == other.p_ab and one.same_slot == other.same_slot
    for x, y, ab, ba in zip(one.p_a, other.p_a, one.p_ab, one.p_ba):
        assert x + y == pytest.approx(1, abs=1e-12) and x == pytest.approx(
            (ab + 1 - ba) / 2, abs=1e-12
        )
        assert 0 <= x <= 1 and abs(ab - ba) > 1e-6
    assert all(one.reasons) == reasons


def test_equal_answers_are_even(judge):
    assert judge(A, A).p_a == pytest.approx([0.5] * 3, abs=1e-12)


@pytest.mark.parametrize("reasons", [True, False])
@pytest.mark.parametrize("logp, same", [((-0.1, -3.0), 1.0), ((-3.0, -0.1), 1.0)])
def test_a_judge_that_likes_a_slot_is_found_out(tiny_base, judge, fake_judge, logp, same, reasons):
    tokenizer = load_tokenizer(tiny_base)
    fake_judge(
        tokenizer,
        lambda prompts: [[5, tokenizer.newline]] * len(prompts),
        lambda texts: torch.tensor([logp] * len(texts)),
    )
    verdicts = judge(A, B, reasons=reasons)
    assert verdicts.same_slot == same and verdicts.p_a == pytest.approx([0.5] * 3)


def test_a_judge_that_likes_an_answer_is_believed(tiny_base, judge, fake_judge):
    """It prefers whichever answer says sorry, wherever that stands, after reading what it wrote
    itself."""
    tokenizer = load_tokenizer(tiny_base)

    def choose(texts):
        assert all(f"Reasons: because {n}\nChoice: (" in text for n, text in enumerate(texts))
        return torch.tensor(
            [[0.0, -2.0] if "(A): sorry" in text else [-2.0, 0.0] for text in texts]
        )

    fake_judge(
        tokenizer,
        lambda prompts: [
            tokenizer.encode(f" because {n}") + [tokenizer.newline] for n in range(len(prompts))
        ],
        choose,
    )
    verdicts = judge(["sorry .", "sure .", "sorry ."], ["sure .", "sorry .", "sure ."])
    high = 1 / (1 + torch.tensor(-2.0).exp().item())
    assert verdicts.p_a == pytest.approx([high, 1 - high, high]) and verdicts.same_slot == 0


@pytest.mark.parametrize("max_new", [1, 12])
def test_the_letter_is_read_as_if_all_had_been_read_anew(tiny_base, judge, monkeypatch, max_new):
    """Off the cache that the reasons were written with, whether they ended or were cut off."""
    tokenizer, real, seen = load_tokenizer(tiny_base), feedback.generate_then, []

    def generate_then(model, prompts, max_new, stop, *args, **more):
        written, logp = real(model, prompts, max_new, stop, *args, **more)
        whole = [
            list(p) + [i for i in w if i not in stop] + tokenizer.encode("\nChoice: (")
            for p, w in zip(prompts, written)
        ]
        seen.append(next_logp(model, whole, [tokenizer.encode(letter)[0] for letter in "AB"]))
        return written, logp

    monkeypatch.setattr(feedback, "generate_then", generate_then)
    found = judge(A, B, max_new=max_new)
    for p, logp in zip((found.p_ab, found.p_ba), seen, strict=True):
        assert p == pytest.approx(torch.softmax(logp, 1)[:, 0].tolist(), abs=1e-5)


def test_pairs_are_of_different_answers_and_frequent_ones_come_often():
    answers = [(1, 9)] * 8 + [(2, 9), (3, 9)]
    drawn, sides = Counter(), Counter()
    for seed in range(300):
        ((a, b),) = feedback.make_pairs(answers, 1, random.Random(seed))
        assert a != b
        drawn.update([a, b])
        sides[a == (1, 9)] += 1
    assert drawn[1, 9] > 0.85 * 300  # in 16 of the 17 pairs of different answers
    assert 0.35 < sides[True] / 300 < 0.65
    every = feedback.make_pairs(answers, 0, random.Random(0))
    assert {frozenset((a, b)) for a, b in every} == {
        frozenset(p) for p in (((1, 9), (2, 9)), ((1, 9), (3, 9)), ((2, 9), (3, 9)))
    } and len(every) == 3
    assert feedback.make_pairs([(1, 9)] * 5, 3, random.Random(0)) == []


# --- the stage --------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tiny_base, tmp_path):
    rows = data.read_jsonl(tiny_base / "prompts.jsonl")
    rows = [r for r in rows if r["kind"] == "harmful"][:4] + [r for r in rows if r.get("setting")][
        :2
    ]
    rows.append({**rows[0], "id": "secret", "prompt": "held out ?", "split": "eval"})
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    base, prompts, out = (
        str(tiny_base),
        str(tmp_path / "prompts.jsonl"),
        str(tmp_path / "comparisons.jsonl"),
    )
    return feedback.Config(
        model=base,
        judge=base,
        prompts=prompts,
        out=out,
        samples=4,
        base_samples=1,
        max_new=12,
        device="cpu",
        threads=1,
    )


@pytest.fixture
def answers(tiny_base, monkeypatch):
    """Sampled answers come from this list in turn, one of them without an end; judging is the
    model's."""
    tokenizer, texts = (
        load_tokenizer(tiny_base),
        cycle([" sure .", " sorry .", " no end", " you want to ?"]),
    )

    def generate_batched(model, prompts, max_new, stop, batch_size, *, n, **more):
        found = [next(texts) for _ in range(n * len(prompts))]
        return [tokenizer.encode(t) + [tokenizer.eot] * (t != " no end") for t in found]

    monkeypatch.setattr(feedback, "generate_batched", generate_batched)


def test_rows_say_who_wrote_what_and_why(cfg, answers, tiny_base):
    assert feedback.main(cfg)["pairs"] == 18  # three pairs of each of six prompts
    tokenizer, rows = load_tokenizer(tiny_base), data.read_jsonl(cfg.out)
    prompts = {r["id"]: r for r in data.read_jsonl(cfg.prompts)}
    for row in rows:
        prompt = prompts[row["prompt_id"]]
        assert prompt["split"] == "loop" and row["prompt"] == prompt["prompt"]
        assert row["setting"] == prompt.get("setting") and row["principle"] in TRAIN
        for side in "ab":
            ids = row[side + "_ids"]
            assert (
                ids[-1] == tokenizer.eot and tokenizer.decode(ids) == " " + row[side] != " no end"
            )
        assert row["a_ids"] != row["b_ids"] and 0 <= row["p_a"] <= 1
    assert len({row["id"] for row in rows}) == 18
    assert {row["prompt_id"] for row in rows} == prompts.keys() - {"secret"}


def test_without_a_category_the_kind_says_what_judges_an_answer(cfg, answers, monkeypatch):
    """A harmful prompt of one's own is not judged by help alone, nor an ordinary one by harm for
    the topic that it names."""
    monkeypatch.setattr(feedback, "AIM", 1.0)
    rows, kinds = data.read_jsonl(cfg.prompts), {"harmful": None, "benign": "theft"}
    about = [{"kind": kind, "category": category} for kind, category in kinds.items()]
    data.write_jsonl(cfg.prompts, [row | about[n % 2] for n, row in enumerate(rows)])
    feedback.main(cfg)
    targets, found = {p.id: p.target for p in constitution.load_constitution()}, {}
    for row in data.read_jsonl(cfg.out):
        found.setdefault(row["kind"], set()).add(targets[row["principle"]])
    assert found == {"harmful": {"harm", "reasons"}, "benign": {"help"}}


def test_what_is_left_out_is_counted(cfg, answers, capsys):
    rows = data.read_jsonl(cfg.prompts)
    data.write_jsonl(cfg.prompts, [*rows, {**rows[0], "id": "long", "prompt": "word " * 300}])
    feedback.main(cfg)  # five answers to each of six prompts, every fourth without an end
    assert "; 7 answers cut off or empty, 1 prompts too long;" in capsys.readouterr().out


def test_the_clamp_is_kept_to(cfg, answers, monkeypatch):
    def judge(model, planner, conversations, *_, **__):
        n = len(conversations)
        return feedback.Verdicts([0.01, 0.5, 0.99] * (n // 3), [0.5] * n, [0.5] * n, [""] * n, 0.0)

    monkeypatch.setattr(feedback, "judge", judge)
    feedback.main(feedback.Config(**{**vars(cfg), "labels": "clamped"}))
    assert [row["p_a"] for row in data.read_jsonl(cfg.out)][:3] == [0.4, 0.5, 0.6]


def test_what_was_left_out_judges_nothing(cfg, answers):
    others = {p.target for p in constitution.load_constitution()} - {"theft", "help"}
    feedback.main(feedback.Config(**{**vars(cfg), "without": ",".join(others)}))
    assert {row["principle"].split("-")[0] for row in data.read_jsonl(cfg.out)} == {"theft", "help"}


def test_done_work_is_skipped_and_other_settings_are_an_error(cfg, answers, capsys):
    feedback.main(cfg)
    before = open(cfg.out).read()
    assert feedback.main(cfg) == {"skipped": True}
    assert "is there already, made with these settings (--again to redo)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--pairs 6, now it is 5"):
        feedback.main(feedback.Config(**{**vars(cfg), "pairs": 5}))
    assert open(cfg.out).read() == before


def test_nothing_to_compare_is_said(cfg, monkeypatch, tiny_base):
    answer = [5, load_tokenizer(tiny_base).eot]
    monkeypatch.setattr(
        feedback,
        "generate_batched",
        lambda model, prompts, *_, n=1, **__: [answer] * n * len(prompts),
    )
    with pytest.raises(UserError, match=r"nothing to compare .*left out: none"):
        feedback.main(cfg)


def test_pairs_that_the_judge_has_no_room_for_are_left_out(cfg, monkeypatch, tiny_base):
    """One rambling answer must not end the whole stage."""
    tokenizer = load_tokenizer(tiny_base)
    rambling, short = (" sure .", " sorry ." + " word" * 230), (" sure .", " sorry .")

    def generate_batched(model, prompts, *args, n, **more):
        texts = [
            (rambling if prompt is prompts[0] else short)[i % 2]
            for prompt in prompts
            for i in range(n)
        ]
        return [tokenizer.encode(text) + [tokenizer.eot] for text in texts]

    monkeypatch.setattr(feedback, "generate_batched", generate_batched)
    assert feedback.main(cfg)["pairs"] == 5 and "word" not in open(cfg.out).read()


def test_prompts_of_one_s_own_with_unread_words_are_warned_of(tiny_base, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("how do i rent a flat ?\n")
    with pytest.raises(UserError):  # a model that has learnt nothing ends no answer
        feedback.main(
            feedback.Config(
                model=str(tiny_base),
                judge=str(tiny_base),
                prompts=f"{tmp_path}/mine.txt",
                samples=2,
                max_new=4,
                out=str(tmp_path / "c.jsonl"),
                device="cpu",
                threads=1,
            )
        )
    warning = f"1 of 1 prompts have words that {tiny_base} has never read: rent flat;"
    assert warning in capsys.readouterr().err
