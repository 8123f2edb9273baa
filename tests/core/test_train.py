"""The three training scripts, called in-process on a byte-level vocabulary and a random GPT of two
layers."""

import base64
import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_pm
import train_ppo
import train_sft
from mincai import UserError, critique, feedback, model
from mincai.constitution import dialogue
from mincai.losses import preference_loss, sft_loss
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import checkpoint, cli, data, health, optim, workers
from mincai.plumbing.logprobs import answer_scores, next_logp, pair_scores
from mincai.plumbing.tokenizer import from_ranks, load_tokenizer
from mincai.sample import generate_batched

ROOT = Path(__file__).resolve().parents[2]
EOT = 256
QUIET = dict(device="cpu", threads=1)


@pytest.fixture
def base(tmp_path):
    """A checkpoint folder of random weights with a vocabulary of the 256 bytes and end-of-text."""
    torch.manual_seed(0)
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32))
    checkpoint.save(model, tmp_path / "base", extra={"tokenizer.tiktoken": ranks})
    return str(tmp_path / "base")


@pytest.fixture
def revisions(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"q{i} ?",
            "original": "x",
            "revision": f"no {i} .",
            "kind": "harmful",
            "round": 1,
        }
        for i in range(10)
    ]
    data.write_jsonl(tmp_path / "revisions.jsonl", rows)
    return str(tmp_path / "revisions.jsonl")


@pytest.fixture
def pairs(tmp_path):
    """The planted rule: the judge likes an answer with a "y". One pair is too long, one has equal
    answers."""
    rows = []
    for i in range(40):
        a, b = list(b" ay") + [97 + i % 20, EOT], list(b" a") + [98 + i % 20, 97, EOT]
        a, b = (a, b) if i % 2 else (b, a)
        rows.append(
            {
                "id": f"p{i // 2}",
                "prompt": f"q{i // 2}",
                "a": "",
                "b": "",
                "a_ids": a,
                "b_ids": b,
                "p_a": 0.9 if 121 in a else 0.1,
                "principle": "x",
            }
        )
    rows.append({**rows[0], "a_ids": [97] * 70})
    rows.append({**rows[0], "a_ids": rows[0]["b_ids"]})
    data.write_jsonl(tmp_path / "comparisons.jsonl", rows)
    return str(tmp_path / "comparisons.jsonl")


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"q{i}",
            "kind": "harmful" if i % 2 else "benign",
            "category": "x",
            "attack": "",
            "split": "loop" if i < 8 else "test",
        }
        for i in range(10)
    ]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return str(tmp_path / "prompts.jsonl")


def sft(base, revisions, out, **more):
    settings = (
        dict(model=base, data=(revisions,), out=str(out), epochs=1, batch_size=4) | QUIET | more
    )
    return train_sft.Config(**settings)


def planted_pm(folder, base):
    """A preference model whose score says nothing yet; its weights are random."""
    torch.manual_seed(1)
    checkpoint.save(ScalarModel(checkpoint.load(base)), folder, load_tokenizer(base).files())
    return str(folder)


def ppo(base, pm, prompts, out, **more):
    settings = dict(
        model=base,
        pm=pm,
        prompts=prompts,
        out=str(out),
        updates=2,
        batch_size=8,
        max_new=4,
        micro_batch=4,
    )
    return train_ppo.Config(**settings | QUIET | more)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- fine-tuning ------------------------------------------------------------------------------------------


def test_sft_overfits_one_batch(base, revisions, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.0)
    metrics = train_sft.main(
        sft(base, revisions, tmp_path / "sft", epochs=80, batch_size=16, lr=0.01)
    )
    assert metrics["loss"] < 0.1 and metrics["held"] == 0
    model, tokenizer = checkpoint.load(tmp_path / "sft"), load_tokenizer(tmp_path / "sft")
    ids = tokenizer.encode(dialogue("q3 ?"))
    for _ in range(len(" no 3 .") + 1):
        ids.append(int(model.unembed(model(torch.tensor([ids])))[0, -1].argmax()))
    assert (
        tokenizer.decode(ids).endswith("Assistant: no 3 .") and ids[-1] == EOT
    )  # it learned to stop


def test_sft_begins_to_learn_with_its_first_step(base, revisions, tmp_path, monkeypatch):
    """The rate rises from the first step on, which is none of nothing; and the loss is a mean over
    tokens."""
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.0)
    out = tmp_path / "sft"
    monkeypatch.setattr(train_sft, "WARMUP", 0.2)
    train_sft.main(sft(base, revisions, out, epochs=5, batch_size=2, lr=0.01))
    rates = [row["lr"] for row in rows_of(out / "metrics.jsonl")]
    assert len(rates) == 25 and rates[:6] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    train_sft.main(sft(base, revisions, tmp_path / "one", batch_size=16, lr=0.0))
    (first,) = rows_of(tmp_path / "one" / "metrics.jsonl")
    model, tokenizer, nats = checkpoint.load(base), load_tokenizer(base), []
    for row in rows_of(revisions):
        prompt, answer = (
            tokenizer.encode(t) for t in (dialogue(row["prompt"]), " " + row["revision"])
        )
        ids = torch.tensor([[*prompt, *answer, EOT]])
        with torch.no_grad():
            logp = (
                model.unembed(model(ids))[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            )
        nats += (-logp[len(prompt) - 1 :]).tolist()
    assert first["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-4) and first[
        "tokens"
    ] == len(nats)


def test_sft_trains_the_answer_and_its_end_only(base, tmp_path):
    """A row's targets are its answer, behind one space, and end-of-text."""
    rows = [
        {"prompt": "q", "revision": "ab"},
        {"prompt": "qq", "revision": " c\n"},
        {"prompt": "q" * 60, "revision": "ab"},
        {"prompt": "q", "revision": "ab", "changed": False},
    ]
    data.write_jsonl(tmp_path / "rows.jsonl", rows)
    cfg = sft(base, str(tmp_path / "rows.jsonl"), "")
    kept, dropped = train_sft.read(cfg, load_tokenizer(base), 64)
    assert dropped == {"never revised": 1, "too long": 1}  # what no round revised teaches nothing
    assert [answer for _, _, answer in kept] == [list(b" ab") + [EOT], list(b" c") + [EOT]]
    ids, targets, loss_mask = data.sft_batch([row[1:] for row in kept])
    assert targets[0][loss_mask[0]].tolist() == kept[0][2]


def test_sft_in_micro_batches_equals_the_big_batch(base, revisions, tmp_path, monkeypatch):
    """One divisor for the step: a mean of the forward passes' means would weigh short answers more.
    Loss and gradient are compared, not weights: Adam would hide a gradient that is only scaled."""
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.0)
    rows = [{"prompt": "q", "revision": "ab " * n} for n in range(1, 13)]
    data.write_jsonl(tmp_path / "ragged.jsonl", rows)
    steps, sizes, kept, path = [], [], data.sft_batch, str(tmp_path / "ragged.jsonl")
    monkeypatch.setattr(
        data, "sft_batch", lambda some, *a: sizes.append(len(some)) or kept(some, *a)
    )
    for size, want in ((0, [6, 6]), (5, [5, 5, 2])):
        out = tmp_path / f"sft-{size}"
        train_sft.main(sft(base, path, out, batch_size=12, micro_batch=size))
        steps.append(rows_of(out / "metrics.jsonl"))
        assert sizes == want
        sizes.clear()
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.5)
    train_sft.main(sft(base, revisions, tmp_path / "held", micro_batch=2))
    assert set(sizes) == {1, 2}  # five held-out rows, before and after, take no more memory
    (big,), (parts,) = steps
    assert parts["tokens"] == big["tokens"]
    assert parts["loss"] == pytest.approx(big["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(big["grad_norm"], rel=1e-4)


ROUNDS = [
    {"outcome": "revised", "revision": "one"},
    {"outcome": "keep", "revision": "keep the answer ."},
    {"outcome": "revised", "revision": "two"},
    {"outcome": "revised", "revision": "one"},
]


@pytest.mark.parametrize(
    "row, learn, want",
    [
        ({"revision": "one", "changed": True, "rounds": ROUNDS}, "last", ["one"]),
        (
            {"revision": "one", "changed": True, "rounds": ROUNDS},
            "all",
            ["one", "two"],
        ),  # each once
        ({"revision": "mine"}, "all", ["mine"]),  # a row of one's own knows no rounds
        ({"revision": "x", "changed": False, "kind": "benign", "rounds": ROUNDS[1:2]}, "last", []),
        (
            {"revision": "x", "changed": False, "kind": "benign", "rounds": ROUNDS[1:2]},
            "all",
            ["x"],
        ),
        ({"revision": "x", "changed": False, "kind": "harmful", "rounds": ROUNDS[1:2]}, "all", []),
    ],
)
def test_sft_learns_the_revisions_that_stood(row, learn, want):
    assert train_sft.answers_of(row, learn) == want


def test_what_sft_is_to_learn_reaches_the_rows(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.0)
    rows = [
        {"prompt": f"q{i}", "kind": "benign", "revision": "one", "changed": i > 0, "rounds": ROUNDS}
        for i in range(3)
    ]
    path = str(tmp_path / "rows.jsonl")
    data.write_jsonl(path, rows)
    found = [
        train_sft.main(sft(base, path, tmp_path / f"{k}", **more))
        for k, more in enumerate(({}, {"learn": "all"}))
    ]
    assert [metrics["rows"] for metrics in found] == [2, 5]
    assert [metrics["dropped"]["never revised"] for metrics in found] == [1, 0]
    with pytest.raises(UserError, match="--learn every: choose last or all"):
        train_sft.main(sft(base, path, tmp_path / "bad", learn="every"))


def test_sft_holds_prompts_out_whole():
    rows = [(f"p{i % 20}", [1], [2]) for i in range(100)]
    train, held = data.split(rows, [row[0] for row in rows], 0.1, seed=0)
    assert len(held) == 10 and not {r[0] for r in train} & {r[0] for r in held}


# --- preference model -------------------------------------------------------------------------------------


def test_pm_learns_the_planted_rule_and_is_normalised(base, pairs, tmp_path, capsys):
    cfg = train_pm.Config(
        model=base,
        pairs=(pairs,),
        prompts="",
        out=str(tmp_path / "pm"),
        epochs=30,
        lr=0.003,
        freeze=0,
        batch_size=16,
        **QUIET,
    )
    metrics = train_pm.main(cfg)
    assert metrics["val_accuracy"] == 1.0 and metrics["dropped"] == {
        "too long": 1,
        "equal answers": 1,
        "undecided": 0,
    }
    assert metrics["val_loss_floor"] == pytest.approx(0.3251, abs=1e-4)  # -0.9 ln 0.9 - 0.1 ln 0.1
    assert (
        metrics["val_loss_floor"] <= metrics["val_loss"] < 0.4
        and metrics["val_calibration_error"] < 0.15
    )
    assert "no better" not in capsys.readouterr().out
    pm, tokenizer = checkpoint.load(tmp_path / "pm", scalar=True), load_tokenizer(tmp_path / "pm")
    language = checkpoint.load(base)
    asked = [tokenizer.encode(dialogue(f"q{i}")) for i in range(20)]
    fresh = generate_batched(
        language, asked * 20, 32, {EOT}, generator=torch.Generator().manual_seed(9)
    )
    scores = answer_scores(pm, asked * 20, fresh)  # drawn anew, so near 0 and 1 and not at them
    assert abs(float(scores.mean())) < 0.5 and 0.6 < float(scores.std(unbiased=False)) < 1.5


def test_scores_are_scaled_on_fresh_answers_to_the_prompts_of_ppo(
    base, pairs, prompts, tmp_path, monkeypatch
):
    """One answer at temperature 1 to each prompt of the loop, as many harmful as others; mean 0 and
    deviation 1 on exactly these, whatever the pairs hold."""
    asked, kept = [], train_pm.generate_batched
    monkeypatch.setattr(
        train_pm,
        "generate_batched",
        lambda model, some, *a, **k: (
            asked.append((model, some, found := kept(model, some, *a, **k))) or found
        ),
    )
    cfg = train_pm.Config(
        model=base, pairs=(pairs,), prompts=prompts, out=str(tmp_path / "pm"), epochs=1, **QUIET
    )
    train_pm.main(cfg)
    (model, some, found), tokenizer = asked[0], load_tokenizer(base)
    assert sorted(map(tokenizer.decode, some)) == [
        dialogue(f"q{i}") for i in range(8)
    ]  # the split loop
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), checkpoint.load(base).parameters())
    )
    scores = answer_scores(checkpoint.load(cfg.out, scalar=True), some, found)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_without_prompts_scores_are_scaled_on_pairs_from_all_of_the_file(base, monkeypatch):
    """Comparisons begin with those of harmful prompts."""
    monkeypatch.setattr(train_pm, "NORMALISED", 10)
    some = [train_pm.Pair(f"q{i // 2}", [], [], 0, 1.0) for i in range(80)]
    found = train_pm.some_prompts(train_pm.Config(prompts=""), some, load_tokenizer(base), 64)
    numbers = sorted(int(load_tokenizer(base).decode(ids)[1:]) for ids in found)
    assert len(set(numbers)) == 10 and numbers[2] < 20 <= numbers[-3]


def test_prompts_that_leave_no_room_to_scale_on_are_told(base, pairs, tmp_path):
    (tmp_path / "long.txt").write_text("why " * 30 + "\n")
    with pytest.raises(
        UserError, match="long.txt: no prompt leaves room for an answer of 32 tokens"
    ):
        train_pm.main(
            train_pm.Config(
                model=base,
                pairs=(pairs,),
                prompts=str(tmp_path / "long.txt"),
                out=str(tmp_path / "pm"),
                **QUIET,
            )
        )


def test_labels_are_learnt_as_they_are(base, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pm, "HOLDOUT", 0.0)
    seen, kept = set(), train_pm.preference_loss
    monkeypatch.setattr(
        train_pm,
        "preference_loss",
        lambda a, b, p: seen.update(round(x, 4) for x in p.tolist()) or kept(a, b, p),
    )
    train_pm.main(
        train_pm.Config(
            model=base, pairs=(pairs,), prompts="", out=str(tmp_path / "pm"), epochs=1, **QUIET
        )
    )
    assert seen == {0.1, 0.9}


def test_equal_scores_are_half_right(base, pairs):
    class Even(ScalarModel):
        def forward(self, ids, positions, mask, start):
            return torch.zeros(ids.shape)[:, start:]

    kept, _ = train_pm.read_pairs(pairs, load_tokenizer(base), 64)
    assert health.measure_pairs(Even(checkpoint.load(base)), kept, 8)["accuracy"] == 0.5


def test_pm_trains_only_what_is_not_frozen(base, pairs, tmp_path):
    cfg = train_pm.Config(
        model=base,
        pairs=(pairs,),
        prompts="",
        out=str(tmp_path / "pm"),
        epochs=1,
        freeze=1,
        **QUIET,
    )
    train_pm.main(cfg)
    before, after = (
        checkpoint.load(base).state_dict(),
        checkpoint.load(cfg.out, scalar=True).gpt.state_dict(),
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("h.1.", "ln_f.")) for name in moved)


def test_pm_score_does_not_depend_on_the_batch(base, pairs):
    pm, tokenizer = checkpoint.load(base, scalar=True, new_head=True), load_tokenizer(base)
    kept, _ = train_pm.read_pairs(pairs, tokenizer, 64)
    long = train_pm.Pair("p", list(kept[0].a) + [65] * 20 + [EOT], kept[0].b, kept[0].start, 0.5)
    alone, _ = pair_scores(pm, kept[:1])
    together, _ = pair_scores(pm, [kept[0], long])
    torch.testing.assert_close(alone[0], together[0])


def test_vectors_do_not_decay_and_what_is_frozen_does_not_learn(base, monkeypatch):
    pm = checkpoint.load(base, scalar=True, new_head=True)
    model.freeze(pm.gpt, 1)
    assert optim.WEIGHT_DECAY == 0.01
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.1)
    matrices, others = optim.adamw(pm, 0.02).param_groups
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    for group in (matrices, others):
        assert group["lr"] == 0.02 and group["betas"] == (0.9, 0.95)
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in others["params"]} == {
        1
    }
    assert (
        len(matrices["params"]) + len(others["params"])
        == sum(p.requires_grad for p in pm.parameters())
        < len(list(pm.parameters()))
    )


def test_the_learning_rate_rises_and_falls_by_hand():
    def rates(fall):
        return [optim.learning_rate(1.0, 0.2, step, 10, fall) for step in range(10)]

    assert rates("line") == pytest.approx(
        [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert rates("cosine")[:3] == pytest.approx([1 / 2, 1, 1]) and rates("cosine")[
        6
    ] == pytest.approx(0.5)
    assert optim.learning_rate(1.0, 0.0, 0, 4) == 1.0


def test_the_preference_model_warms_up_and_its_gains_do_not_decay(
    base, pairs, tmp_path, monkeypatch
):
    made, kept = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: made.append(kept(*a, **k)) or made[-1]
    )
    monkeypatch.setattr(train_pm, "WARMUP", 0.2)
    train_pm.main(
        train_pm.Config(
            model=base,
            pairs=(pairs,),
            prompts="",
            out=str(tmp_path / "pm"),
            epochs=10,
            lr=1e-3,
            **QUIET,
        )
    )
    rates = [row["lr"] for row in rows_of(tmp_path / "pm" / "metrics.jsonl")]
    assert rates == pytest.approx(
        [optim.learning_rate(1e-3, 0.2, k, len(rates), "line") for k in range(len(rates))]
    )
    assert rates[0] < max(rates) == pytest.approx(1e-3)
    assert [group["weight_decay"] for group in made[0].param_groups] == [optim.WEIGHT_DECAY, 0.0]


def test_length_correlation_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert health.correlation(x, 2 * x + 1) == pytest.approx(1)
    assert health.correlation(x, torch.ones(3)) == 0.0


# --- reinforcement learning -------------------------------------------------------------------------------


def test_ppo_runs_and_writes_what_it_says(base, prompts, tmp_path):
    pm = planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", warmup=1, kl_target=1.0))
    rows = rows_of(tmp_path / "ppo" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["kl"] == rows[0]["kl_k3"] == rows[0]["kl_exact"] == 0.0
    for row in rows:
        assert row["first_ratio_error"] == row["first_approxkl"] == row["first_clipfrac"] == 0.0
    assert rows[1]["kl_exact"] == 0.0  # the first update was the critic's
    assert rows[0]["beta"] == 0.2  # a KL of 0 is far below 1; a fifth is the most that counts
    assert rows[1]["beta"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 10_000), abs=1e-9)
    assert len(rows_of(tmp_path / "ppo" / "samples.jsonl")) == 3
    assert weights(tmp_path / "ppo") != weights(base)
    assert not (tmp_path / "ppo.partial").exists()


def test_ppo_warm_up_leaves_the_policy_and_moves_the_critic(base, prompts, tmp_path):
    pm, values = planted_pm(tmp_path / "pm", base), []
    for name, critic_lr in (("still", 0.0), ("moved", 0.01)):
        train_ppo.main(ppo(base, pm, prompts, tmp_path / name, warmup=2, critic_lr=critic_lr))
        assert weights(tmp_path / name) == weights(base)
        values.append([row["values_mean"] for row in rows_of(tmp_path / name / "metrics.jsonl")])
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


def test_ppo_learns_in_bfloat16_from_the_weights_of_the_last_step(
    base, prompts, tmp_path, monkeypatch
):
    """Autocast copies weights to 16 bits once a context: one around a whole update would go on with
    the copies of before its first step. A copy of the network has no such copies."""
    pm, found, forward = planted_pm(tmp_path / "pm", base), [], train_ppo.ppo.response_logits

    def checked(model, ids, *more):
        logits = forward(model, ids, *more)
        if torch.is_grad_enabled() and logits.requires_grad:  # while learning
            fresh = forward(copy.deepcopy(model), ids, *more)
            found.append((logits.dtype, float((logits - fresh).detach().abs().max())))
        return logits

    monkeypatch.setattr(train_ppo.ppo, "response_logits", checked)
    train_ppo.main(
        ppo(
            base,
            pm,
            prompts,
            tmp_path / "ppo",
            dtype="bfloat16",
            warmup=0,
            updates=1,
            minibatches=2,
            lr=0.01,
        )
    )
    assert found == [(torch.float32, 0.0)] * 4  # two minibatches, twice


def seen_by_update(monkeypatch):
    """A list that fills with what every call of ppo.update is given, and its networks' weights
    then."""
    seen, update = [], train_ppo.ppo.update

    def watched(policy, critic, batch, adv, returns, how, generator):
        seen.append(
            {
                "settings": vars(how),
                "policy": copy.deepcopy(policy.net),
                "critic": copy.deepcopy(critic.net),
                "groups": [dict(x.optimizer.param_groups[0]) for x in (policy, critic)],
            }
        )
        return update(policy, critic, batch, adv, returns, how, generator)

    monkeypatch.setattr(train_ppo.ppo, "update", watched)
    return seen


def test_ppo_rates_rise_from_a_networks_first_update_and_fall_to_the_end(
    base, prompts, tmp_path, monkeypatch
):
    pm, seen = planted_pm(tmp_path / "pm", base), seen_by_update(monkeypatch)
    train_ppo.main(
        ppo(base, pm, prompts, tmp_path / "ppo", updates=6, warmup=2, lr=1e-3, critic_lr=1e-2)
    )
    policy = [0, 0, 1 / 3 * 4 / 6, 2 / 3 * 3 / 6, 2 / 6, 1 / 6]
    critic = [1 / 3, 2 / 3 * 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [call["groups"][0]["lr"] for call in seen] == pytest.approx(
        [1e-3 * rate for rate in policy]
    )
    assert [call["groups"][1]["lr"] for call in seen] == pytest.approx(
        [1e-2 * rate for rate in critic]
    )
    rows = rows_of(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [call["groups"][0]["lr"] for call in seen]
    assert [call["settings"]["train_policy"] for call in seen] == [False] * 2 + [True] * 4
    assert train_ppo.learning_rate(train_ppo.Config(warmup=0, updates=4), 1.0, u=1, first=1) == 1.0


def test_ppo_hands_its_settings_and_the_preference_models_head_on(
    base, prompts, tmp_path, monkeypatch
):
    pm, seen = planted_pm(tmp_path / "pm", base), seen_by_update(monkeypatch)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", updates=1, clip=0.13, epochs=3))
    expected = dict(
        value_clip=0.13, clip=0.13, max_norm=1.0, epochs=3, minibatches=2, micro_batch=4
    )
    assert expected.items() <= seen[0]["settings"].items()
    assert [group["eps"] for group in seen[0]["groups"]] == [1e-5, 1e-5]  # Adam's default is 1e-8
    scored = checkpoint.load(pm, scalar=True).state_dict()
    assert all(
        torch.equal(tensor, scored[name]) for name, tensor in seen[0]["critic"].state_dict().items()
    )


def test_ppo_tells_what_was_gained_on_the_same_prompts(
    base, prompts, tmp_path, capsys, monkeypatch
):
    """A policy that does not move gives the same answers before and after; two updates do not."""
    pm = planted_pm(tmp_path / "pm", base)
    monkeypatch.setattr(train_ppo, "MISSING_EOS", 2.0)
    still = train_ppo.main(ppo(base, pm, prompts, tmp_path / "still", warmup=2))
    told = capsys.readouterr().out
    rows = rows_of(tmp_path / "still" / "metrics.jsonl")
    assert (
        still["score_before"] == still["score_after"]
        and still["score_gain"] == still["kl_after"] == 0.0
    )
    assert rows[0]["score"] != rows[1]["score"]
    a = f"{still['score_before']:+.3f}"
    assert (
        f"score of fresh samples on the same 128 prompts: {a} -> {a} (+0.00 deviations), KL" in told
    )
    assert (
        "WARNING: the score moved by +0.00 deviations in the whole run: nothing was learnt" in told
    )
    first = rows[0]["score"] + 2.0 * (1 - rows[0]["eos"])  # the fine is none of the score's own
    assert (
        f"update 1: fresh answers score {first:+.2f}, deviation " in told
        and "scaled to 0 and 1" in told
    )
    moved = train_ppo.main(
        ppo(base, pm, prompts, tmp_path / "moved", updates=6, warmup=0, lr=0.01, beta=0.0)
    )
    assert (
        moved["score_before"] == still["score_before"]
        and moved["score_after"] != moved["score_before"]
    )
    assert (
        moved["kl_after"] > 0
        and f"{moved['score_gain']:+.2f} deviations" in capsys.readouterr().out
    )
    kept = json.loads((tmp_path / "moved" / "run.json").read_text())["metrics"]
    assert (kept["score_before"], kept["score_after"]) == (
        moved["score_before"],
        moved["score_after"],
    )


def test_a_look_asks_both_kinds_and_fills_its_batches():
    harmful, benign = [[n] for n in range(200)], [[n] for n in range(200, 205)]
    cfg = train_ppo.Config(batch_size=48)
    same = train_ppo.same_prompts(cfg, harmful, benign)
    assert len(same) == 96 and sum(prompt[0] < 200 for prompt in same) == 48
    assert len({prompt[0] for prompt in same}) == 48 + 5 and same == train_ppo.same_prompts(
        cfg, harmful, benign
    )
    many = [[n] for n in range(200, 400)]
    large = train_ppo.same_prompts(train_ppo.Config(batch_size=500), harmful, many)
    assert len(large) == len({prompt[0] for prompt in large}) == 128


def test_a_look_goes_by_the_policy_and_not_by_the_size_of_its_batches(base, prompts, tmp_path):
    """The planted score counts an answer's tokens; the mean KL is that of the answers, against one
    by hand."""
    policy, ref = checkpoint.load(base), checkpoint.load(base)
    torch.manual_seed(5)
    with torch.no_grad():
        policy.ln_f.bias.add_(torch.randn(32))
    critic, found = ScalarModel(checkpoint.load(base)), []
    asked = [[65 + i] for i in range(8)]
    for batch_size in (8, 4):
        found.append(
            train_ppo.look(
                (policy, ref, critic),
                asked,
                lambda ids, valid, start: valid[:, start:].sum(1).float(),
                batch_size,
                max_new=5,
                stop={EOT, 97},
                micro_batch=4,
            )
        )
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    answers = train_ppo.ppo.generate(
        policy, asked, 5, {EOT, 97}, generator=torch.Generator().manual_seed(0)
    )
    lengths = answers.mask.sum(1).float()
    assert found[0]["score"] == pytest.approx(float(lengths.mean()))
    assert found[0]["score_std"] == pytest.approx(float(lengths.std(unbiased=False)), abs=1e-5)
    assert found[0]["kl"] > 0.1 and 0 <= found[0]["eos"] <= 1


def test_ppo_is_watched_and_learns_nothing_from_it(base, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ppo, "PRINT_EVERY", 2)
    pm, seen = planted_pm(tmp_path / "pm", base), []

    def watch(policy):
        assert not torch.is_grad_enabled()
        seen.append({k: v.clone() for k, v in policy.state_dict().items()})
        return {"quality": 1 - 0.3 * len(seen), "help": torch.tensor(0.5)}

    cfg = ppo(base, pm, prompts, tmp_path / "ppo", updates=5, warmup=0)
    train_ppo.main(cfg, watch=watch)
    rows = rows_of(tmp_path / "ppo" / "metrics.jsonl")
    assert rows[0] == {"update": 0, "dev_quality": pytest.approx(0.7), "dev_help": 0.5}
    assert [row["update"] for row in rows if "dev_quality" in row] == [0, 2, 4, 5]
    assert [row["update"] for row in rows] == list(range(6)) and len(seen) == 4
    for when, weights_then in ((base, seen[0]), (cfg.out, seen[-1])):
        then = checkpoint.load(when).state_dict()
        assert all(torch.equal(then[name], weights_then[name]) for name in then)
    told = capsys.readouterr().out
    assert "update 0: dev_quality 0.700  dev_help 0.500" in told and "dev_quality 0.400" in told
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "alone", updates=5, warmup=0))
    assert weights(tmp_path / "alone") == weights(tmp_path / "ppo")
    assert [row["update"] for row in rows_of(tmp_path / "alone" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_ppo_says_where_it_ran_away(base, prompts, tmp_path):
    pm = planted_pm(tmp_path / "pm", base)
    with pytest.raises(UserError, match="update [12] of 2, minibatch [234] of 4: .*lower --lr"):
        train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", lr=1e4, warmup=0))
    assert not (tmp_path / "ppo").exists()


def test_ppo_draws_only_the_loop_split_in_the_asked_share(base, prompts):
    cfg = train_ppo.Config(prompts=prompts, max_new=4)
    harmful, benign, dropped = train_ppo.read_prompts(cfg, load_tokenizer(base), 64)
    assert len(harmful) == len(benign) == 4 and dropped == 0
    with pytest.raises(UserError, match="harmful"):
        train_ppo.read_prompts(cfg, load_tokenizer(base), 20)


def test_ppo_names_words_never_read(base, prompts, capsys):
    cfg, tokenizer = train_ppo.Config(model=base, prompts=prompts, max_new=4), load_tokenizer(base)
    train_ppo.read_prompts(cfg, from_ranks(tokenizer.ranks, {"Human"}), 64)
    assert f"8 of 8 prompts have words that {base} has never read: " in capsys.readouterr().err


def test_ppo_draws_every_prompt_once_a_round():
    stream = train_ppo.shuffled("abcd", torch.Generator().manual_seed(0))
    rounds = [[next(stream) for _ in range(4)] for _ in range(3)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(map(tuple, rounds))) > 1


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(batch_size=9), "--batch-size 9 is no multiple of --minibatches 2"),
        (dict(micro_batch=3), "--micro-batch 3 does not divide a minibatch of 4"),
        (dict(beta=0.0, kl_target=6.0), "--kl-target is steered to by .* and 0 stays 0"),
        (dict(updates=0), "--updates 0: give"),
        (dict(clip=0.0), "--clip 0.0: give"),
    ],
)
def test_ppo_refuses_settings_that_cannot_work(base, prompts, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        train_ppo.main(ppo(base, "", prompts, tmp_path / "ppo", **more))


# --- all three --------------------------------------------------------------------------------------------


def test_same_seed_same_bits(base, revisions, pairs, prompts, tmp_path):
    pm = planted_pm(tmp_path / "start", base)
    for name in "ab":
        train_sft.main(sft(base, revisions, tmp_path / f"sft-{name}"))
        train_pm.main(
            train_pm.Config(
                model=base,
                pairs=(pairs,),
                prompts="",
                out=str(tmp_path / f"pm-{name}"),
                epochs=1,
                freeze=0,
                **QUIET,
            )
        )
        train_ppo.main(ppo(base, pm, prompts, tmp_path / f"ppo-{name}", warmup=0))
    for kind in ("sft", "pm", "ppo"):
        assert weights(tmp_path / f"{kind}-a") == weights(tmp_path / f"{kind}-b")
    train_sft.main(sft(base, revisions, tmp_path / "sft-c", seed=1))
    assert weights(tmp_path / "sft-c") != weights(tmp_path / "sft-a")


def test_training_does_not_depend_on_the_number_of_cores(
    base, revisions, pairs, prompts, tmp_path, monkeypatch
):
    """Halves of a batch add up to the same bits whichever thread is first; a model that is not
    small has whole batches."""
    start, sizes = planted_pm(tmp_path / "start", base), set()
    monkeypatch.setattr(
        train_pm, "pair_scores", lambda pm, some: sizes.add(len(some)) or pair_scores(pm, some)
    )
    read = dict(model=base, pairs=(pairs,), prompts="", epochs=2, freeze=0, device="cpu")
    for cores in (1, 2):
        train_sft.main(sft(base, revisions, tmp_path / f"sft-{cores}", epochs=3, threads=cores))
        train_pm.main(train_pm.Config(out=str(tmp_path / f"pm-{cores}"), threads=cores, **read))
        train_ppo.main(
            ppo(base, start, prompts, tmp_path / f"ppo-{cores}", warmup=0, threads=cores)
        )
    workers.use(1)
    for kind in ("sft", "pm", "ppo"):
        assert weights(tmp_path / f"{kind}-1") == weights(tmp_path / f"{kind}-2")
    assert max(sizes) == 8  # of sixteen
    monkeypatch.setattr(workers, "SMALL", 16)
    train_pm.main(train_pm.Config(out=str(tmp_path / "wide"), threads=1, **read))
    assert max(sizes) == 16
    first, whole = (rows_of(tmp_path / name / "metrics.jsonl")[0] for name in ("pm-1", "wide"))
    assert first == pytest.approx(whole, rel=1e-4, abs=1e-6)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def test_columns_that_nothing_is_read_from_change_no_loss_and_no_gradient(base, revisions, pairs):
    """Fine-tuning and preference model, against whole hidden states and all logits."""
    language, tokenizer = checkpoint.load(base), load_tokenizer(base)
    rows, _ = train_sft.read(sft(base, revisions, ""), tokenizer, 64)
    rows = [(prompt[n:], answer[n % 3 :]) for n, (_, prompt, answer) in enumerate(rows)]
    loss, found = train_sft.loss_of(language, 50, rows)
    ids, targets, mask = data.sft_batch(rows)
    want, metrics = sft_loss(language.unembed(language(ids)), targets, mask, 50)
    torch.testing.assert_close(found, metrics)
    assert 0 < metrics["tokens"] == train_sft.tokens_of(rows) < mask.numel() / 2
    torch.testing.assert_close(
        gradients(language, loss), gradients(language, want), atol=1e-6, rtol=1e-5
    )
    none, found = train_sft.loss_of(language, 50, rows, counts=False)
    assert none == 0 and found["tokens"] == 0  # and every parameter takes part
    assert len(gradients(language, none)) == len(list(language.parameters()))
    kept, _ = train_pm.read_pairs(pairs, tokenizer, 64)
    pm, some = ScalarModel(language), [replace(p, a=p.a[n:]) for n, p in enumerate(kept[:6])]
    loss, _ = train_pm.loss_of(pm, 6, some, True)
    a, b = (
        torch.stack([pm(torch.tensor([list(row)]))[0, -1] for row in rows])
        for rows in ([p.a for p in some], [p.b for p in some])
    )
    want, _ = preference_loss(a, b, torch.tensor([p.p_a for p in some]))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(pm, loss), gradients(pm, want), atol=1e-6, rtol=1e-5)


def test_done_work_is_skipped_and_other_settings_are_an_error(base, revisions, tmp_path, capsys):
    out = tmp_path / "sft"
    train_sft.main(sft(base, revisions, out))
    before = weights(out)
    assert train_sft.main(sft(base, revisions, out)) == {"skipped": True}
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lr"):
        train_sft.main(sft(base, revisions, out, lr=0.1))
    assert weights(out) == before
    train_sft.main(sft(base, revisions, out, lr=0.1, again=True))
    assert (
        weights(out) != before and json.loads((out / "run.json").read_text())["config"]["lr"] == 0.1
    )


STAGES = [critique, train_sft, feedback, train_pm, train_ppo]


def test_the_stages_flags_are_few_enough_to_be_read():
    assert sum(len(module.Config.__dataclass_fields__) for module in STAGES) <= 90


@pytest.mark.parametrize("module", STAGES)
def test_flags_are_read_and_misspelt_ones_refused(module):
    with pytest.raises(SystemExit) as stop:
        cli.parse(module.Config, ["--learning-rte", "1"])
    assert stop.value.code == 2
    source = Path(module.__file__).read_text() + (ROOT / "mincai/plumbing/stage.py").read_text()
    used = set(re.findall(r"cfg\.(\w+)", source))
    assert [name for name in module.Config.__dataclass_fields__ if name not in used] == []


def test_an_error_is_one_line(tmp_path):
    ran = subprocess.run(
        [
            sys.executable,
            "train_sft.py",
            "--model",
            str(tmp_path / "nothing"),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("mincai: error:") and len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("stage", ["sft", "pm", "ppo"])
def test_a_place_that_cannot_be_written_is_told_before_training(
    stage, base, revisions, pairs, prompts, tmp_path, monkeypatch
):
    """Not after it, when hours would be lost."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    planted_pm(tmp_path / "start", base)

    def never(*_, **__):
        raise AssertionError("it trained")

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", never)
    for out in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "under"):
        main, cfg = {
            "sft": (train_sft.main, lambda: sft(base, revisions, out)),
            "pm": (
                train_pm.main,
                lambda: train_pm.Config(
                    model=base, pairs=(pairs,), prompts="", out=str(out), **QUIET
                ),
            ),
            "ppo": (train_ppo.main, lambda: ppo(base, str(tmp_path / "start"), prompts, out)),
        }[stage]
        with pytest.raises(
            UserError, match="give a new folder|does not record any settings|cannot be written"
        ):
            main(cfg())
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.txt"]


def test_another_vocabulary_is_told(base, pairs, prompts, tmp_path):
    planted_pm(tmp_path / "start", base)
    short = GPT(GPTConfig(vocab_size=200, block_size=64, n_layer=1, n_head=2, n_embd=32))
    checkpoint.save(short, tmp_path / "short", load_tokenizer(base).files())
    with pytest.raises(
        UserError, match="the vocabulary has 257 tokens, the embedding only 200 rows"
    ):
        train_pm.main(
            train_pm.Config(
                model=str(tmp_path / "short"), pairs=(pairs,), out=str(tmp_path / "pm"), **QUIET
            )
        )
    lines = (tmp_path / "start" / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    swapped = [
        base64.b64encode(b"b") + b" 97\n"
        if n == 97
        else base64.b64encode(b"a") + b" 98\n"
        if n == 98
        else line
        for n, line in enumerate(lines)
    ]
    (tmp_path / "start" / "tokenizer.tiktoken").write_bytes(b"".join(swapped))
    with pytest.raises(UserError, match="another vocabulary"):
        train_ppo.main(ppo(base, str(tmp_path / "start"), prompts, tmp_path / "ppo"))


def test_a_preference_model_that_is_no_better_than_length_says_so(base, pairs, tmp_path, capsys):
    rows = data.read_jsonl(pairs)[:40]
    data.write_jsonl(
        pairs, [row | {"a_ids": [97, EOT], "b_ids": [98, 98, EOT], "p_a": 1.0} for row in rows]
    )
    train_pm.main(
        train_pm.Config(
            model=base, pairs=(pairs,), prompts="", out=str(tmp_path / "pm"), epochs=0, **QUIET
        )
    )
    told = capsys.readouterr().out
    assert (
        "always the shorter 1.000" in told
        and "WARNING: that is no better than choosing by length" in told
    )
    assert "undecided on" not in told


def test_a_judge_that_decides_on_few_pairs_is_told(base, pairs, tmp_path, capsys):
    rows = data.read_jsonl(pairs)[:40]
    data.write_jsonl(pairs, [row | {"p_a": 0.5 if n < 31 else 0.9} for n, row in enumerate(rows)])
    train_pm.main(
        train_pm.Config(
            model=base, pairs=(pairs,), prompts="", out=str(tmp_path / "pm"), epochs=0, **QUIET
        )
    )
    assert (
        "WARNING: the judge was undecided on 31 pairs and decided on 9" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "change, told",
    [
        ({"revision": 3}, "line 2: revision is a int; write text"),
        ({"prompt": None}, "line 2: this row lacks prompt"),
        ({"revision": " "}, "line 2: the revision is empty"),
    ],
)
def test_a_revision_that_is_none_is_told(base, revisions, tmp_path, change, told):
    rows = data.read_jsonl(revisions)
    data.write_jsonl(revisions, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(UserError, match=told):
        train_sft.main(sft(base, revisions, tmp_path / "sft"))


def test_ids_without_a_token_are_never_drawn_or_scored(revisions, prompts, tmp_path):
    """300 rows under 257 tokens; the rows that nothing names would be drawn nearly always."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32))
    model.ln_f.bias.data.fill_(1.0)
    model.wte.weight.data[257:] = 3.0
    tokenizer = from_ranks({bytes([b]): b for b in range(256)})
    base = str(tmp_path / "base")
    checkpoint.save(model, base, tokenizer.files())
    whole = model.unembed(model(torch.tensor([[104, 105]])))[0, -1].softmax(-1)
    assert whole[257:].sum() > 0.99
    loaded = checkpoint.load(base)
    drawn = generate_batched(loaded, [[104, 105]], 20, {EOT}, n=20)
    assert max(map(max, drawn)) <= EOT
    logp = next_logp(loaded, [[104, 105]], list(range(257)))
    torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0))
    train_sft.main(sft(base, revisions, tmp_path / "sft"))
    ppo_out = tmp_path / "ppo"
    train_ppo.main(
        ppo(str(tmp_path / "sft"), planted_pm(tmp_path / "start", base), prompts, ppo_out)
    )
    assert checkpoint.read_config(ppo_out).vocab_size == 300
    first, *_ = rows_of(ppo_out / "metrics.jsonl")
    assert first["entropy"] <= math.log(257)  # nats a token, over what can be drawn
