"""What a setting of the training scripts does: each is set apart from its default, and what comes
of it is looked at.

Fixtures and short cuts are those of test_train: random GPTs of two layers on a vocabulary of bytes.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_train import (  # noqa: F401
    QUIET,
    base,
    pairs,
    planted_pm,
    ppo,
    prompts,
    revisions,
    rows_of,
    seen_by_update,
    sft,
)

import train_pm
import train_ppo
import train_sft
from mincai import UserError
from mincai.plumbing import checkpoint, data, distributed, health, memory, optim
from mincai.plumbing.logprobs import answer_scores, pair_scores
from mincai.plumbing.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def nothing_held_out(monkeypatch):
    """But where a test says otherwise: every row counts."""
    monkeypatch.setattr(train_pm, "HOLDOUT", 0.0)


def pm(base, pairs, out, **more):
    settings = dict(model=base, pairs=(pairs,), prompts="", out=str(out), epochs=1)
    return train_pm.Config(**settings | QUIET | more)


def seen_by(monkeypatch, module, name):
    """A list that fills with (arguments, settings, what came back) of every call of a function of
    this module."""
    seen, kept = [], getattr(module, name)

    def watched(*args, **settings):
        found = kept(*args, **settings)
        seen.append((args, settings, found))
        return found

    monkeypatch.setattr(module, name, watched)
    return seen


# --- fine-tuning and the preference model -----------------------------------------------------------------


def test_a_preference_models_memory_is_planned_for_a_processs_own_pairs(
    base, pairs, tmp_path, monkeypatch
):
    """Of 16 pairs each of four processes reads 4; micro-batches may be smaller, and never larger."""
    found, real = [], memory.plan

    def plan(*args, **sizes):
        found.append(real(*args, **sizes)["activations"])
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "plan", plan)
    alone, world = train_pm.some_prompts, distributed.world
    for processes, sizes in (
        (1, dict(batch_size=4)),
        (4, dict(batch_size=16)),
        (4, dict(batch_size=16, micro_batch=8)),
        (4, dict(batch_size=16, micro_batch=2)),
    ):
        monkeypatch.setattr(  # what comes before the plan meets other processes
            train_pm,
            "some_prompts",
            lambda *a, n=processes: (
                monkeypatch.setattr(distributed, "world", lambda: n) or alone(*a)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            train_pm.main(pm(base, pairs, tmp_path / "pm", again=True, **sizes))
        monkeypatch.setattr(distributed, "world", world)
    assert found == [found[0]] * 3 + [found[0] / 2]


def test_a_row_fits_whose_last_token_is_only_a_target(base, tmp_path):
    """A context of 64 takes 65 tokens, the last of which is never read; a row of one more is left
    out whole."""
    path = str(tmp_path / "rows.jsonl")
    data.write_jsonl(path, [{"prompt": "q", "revision": "a" * n} for n in range(1, 61)])
    kept, dropped = train_sft.read(sft(base, path, ""), load_tokenizer(base), 64)
    lengths = [len(prompt) + len(answer) for _, prompt, answer in kept]
    assert lengths == list(range(lengths[0], 66)) and dropped["too long"] == 60 - len(kept) > 0
    inputs, *_ = data.sft_batch([row[1:] for row in kept])
    assert inputs.shape == (len(kept), 64)


@pytest.mark.parametrize("stage", ["sft", "pm"])
def test_a_step_is_no_longer_than_the_clip(stage, base, revisions, pairs, tmp_path, monkeypatch):
    """Gradient descent at rate 1 moves all weights by the gradient, which is longer than this
    clip."""
    monkeypatch.setattr(train_sft, "HOLDOUT", 0.0)
    monkeypatch.setattr(train_pm, "HOLDOUT", 0.0)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
    monkeypatch.setattr(optim, "MAX_NORM", 1e-3)
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.0)
    ends, more = [], dict(batch_size=64)
    for lr in (0.0, 1.0):
        out = tmp_path / f"{lr}"
        if stage == "sft":
            train_sft.main(sft(base, revisions, out, lr=lr, **more))
        else:
            train_pm.main(pm(base, pairs, out, lr=lr, freeze=0, **more))
        (step,) = rows_of(out / "metrics.jsonl")
        trained = checkpoint.load(out, scalar=stage == "pm").parameters()
        ends.append(torch.cat([p.detach().flatten() for p in trained]))
    assert step["grad_norm"] > 0.01 and float((ends[1] - ends[0]).norm()) == pytest.approx(
        1e-3, rel=0.01
    )


def test_pairs_of_one_prompt_are_never_on_both_sides(base, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pm, "HOLDOUT", 0.3)
    learnt, measured = (
        seen_by(monkeypatch, train_pm, "step"),
        seen_by(monkeypatch, health, "measure_pairs"),
    )
    train_pm.main(pm(base, pairs, tmp_path / "pm"))
    train = [pair.prompt for args, *_ in learnt for pair in args[2]]
    held = [pair.prompt for pair in measured[0][0][1]]
    assert len(train) == 28 and len(held) == 12  # of 20 prompts with two pairs each
    assert len(set(held)) == 6 and not set(train) & set(held)


def test_undecided_pairs_are_not_learnt_from(base, pairs, tmp_path, monkeypatch):
    """Those nearer to 1/2 than the contrast, on either side; without a contrast even an even label
    stays."""
    labels = [0.5, 0.53, 0.47, 0.56, 0.44, 0.9, 0.1, 0.5]
    data.write_jsonl(pairs, [row | {"p_a": p} for row, p in zip(data.read_jsonl(pairs), labels)])
    learnt = seen_by(monkeypatch, train_pm, "step")
    for contrast, want in (
        (0.05, [0.1, 0.44, 0.56, 0.9]),
        (0.2, [0.1, 0.9]),
        (0.0, sorted(labels)),
    ):
        learnt.clear()
        metrics = train_pm.main(pm(base, pairs, tmp_path / f"{contrast}", contrast=contrast))
        assert sorted(pair.p_a for args, *_ in learnt for pair in args[2]) == want
        assert metrics["dropped"]["undecided"] == 8 - len(want) and metrics["pairs"] == len(want)


def test_a_file_that_is_named_twice_is_read_twice(base, pairs, tmp_path, monkeypatch):
    learnt = seen_by(monkeypatch, train_pm, "step")
    train_pm.main(pm(base, pairs, tmp_path / "once"))
    once = [pair for args, *_ in learnt for pair in args[2]]
    learnt.clear()
    train_pm.main(replace(pm(base, pairs, tmp_path / "twice"), pairs=(pairs, pairs)))
    twice = [pair for args, *_ in learnt for pair in args[2]]
    assert len(once) == 40 and sorted(p.a.tolist() for p in twice) == sorted(
        2 * [p.a.tolist() for p in once]
    )


def test_a_micro_batch_counts_by_its_pairs(base, pairs, tmp_path, monkeypatch):
    """16 pairs at once, or as 5, 5, 5 and 1: one loss and one gradient. A mean of the parts' means
    would weigh the last pair five times. Gradients are compared, not weights: Adam would hide one
    that is only scaled."""
    steps, forward = {}, seen_by(monkeypatch, train_pm, "pair_scores")
    for size in (0, 5):
        forward.clear()
        train_pm.main(
            pm(base, pairs, tmp_path / f"{size}", lr=0.0, batch_size=16, micro_batch=size)
        )
        steps[size] = rows_of(tmp_path / f"{size}" / "metrics.jsonl")
        assert max(len(args[1]) for args, *_ in forward) == (size or 8)  # halves
    for whole, parts in zip(steps[0], steps[5], strict=True):
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_a_score_is_read_at_the_last_token_and_a_comes_first(base, pairs):
    """In a batch of uneven rows, against each row alone; PPO goes by the score itself, whose sign
    no accuracy shows."""
    kept, _ = train_pm.read_pairs(pairs, load_tokenizer(base), 64)
    kept = [
        replace(p, a=p.a[:-1]) if k % 3 else replace(p, b=p.b[:-1]) for k, p in enumerate(kept[:6])
    ]
    scored = checkpoint.load(base, scalar=True, new_head=True)
    with torch.no_grad():
        want = [
            torch.stack([scored(torch.tensor([list(row)]))[0, -1] for row in rows])
            for rows in ([p.a for p in kept], [p.b for p in kept])
        ]
        torch.testing.assert_close(list(pair_scores(scored, kept)), want)
    answers = [list(p.a[p.start :]) for p in kept]
    torch.testing.assert_close(
        answer_scores(scored, [list(p.a[: p.start]) for p in kept], answers), want[0]
    )


def test_pairs_are_measured_while_a_difference_of_scores_is_a_log_odds(
    base, pairs, tmp_path, monkeypatch
):
    """The model is written with scaled scores; multiplied by their deviation they give the loss
    that was told."""
    monkeypatch.setattr(train_pm, "HOLDOUT", 0.3)
    measured = seen_by(monkeypatch, health, "measure_pairs")
    metrics = train_pm.main(pm(base, pairs, tmp_path / "pm"))
    held, scored = measured[0][0][1], checkpoint.load(tmp_path / "pm", scalar=True)
    a, b = health.all_scores(scored, held, 8)
    want = F.binary_cross_entropy_with_logits(
        (a - b) * metrics["score_std"], torch.tensor([p.p_a for p in held])
    )
    assert abs(metrics["score_std"] - 1) > 0.05 and metrics["val_loss"] == pytest.approx(
        float(want), rel=1e-4
    )


FROZEN = [(0, {"wte", "wpe", "h.0", "h.1", "ln_f"}), (1, {"h.1", "ln_f"})]


def moved(before, after):
    """Which embeddings, blocks or norms have other weights in one GPT than in the other."""
    return {
        name[:3] if name.startswith("h.") else name.split(".")[0]
        for (name, p), q in zip(before.named_parameters(), after.parameters())
        if not torch.equal(p, q)
    }


@pytest.mark.parametrize("freeze, parts", FROZEN)
def test_pm_learns_in_all_that_is_not_frozen(base, pairs, tmp_path, freeze, parts):
    train_pm.main(pm(base, pairs, tmp_path / "pm", freeze=freeze))
    assert moved(checkpoint.load(base), checkpoint.load(tmp_path / "pm", scalar=True).gpt) == parts


# --- reinforcement learning -------------------------------------------------------------------------------


def seen_rollouts(monkeypatch):
    """seen_by of ppo.rollout, whose first call and last are a look at the policy and no update."""
    monkeypatch.setattr(train_ppo, "LOOKED_AT", 8)
    return seen_by(monkeypatch, train_ppo.ppo, "rollout")


@pytest.mark.parametrize("size, harmful", [(8, 4), (6, 3)])
def test_half_a_batch_is_of_harmful_prompts(base, prompts, tmp_path, monkeypatch, size, harmful):
    """Harmful prompts have odd numbers. They are not all in one minibatch."""
    rollouts, tokenizer = seen_rollouts(monkeypatch), load_tokenizer(base)
    pm = planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", batch_size=size))
    kinds = [
        [any(f"q{n}" in tokenizer.decode(prompt) for n in range(1, 8, 2)) for prompt in args[3]]
        for args, *_ in rollouts[1:-1]
    ]
    assert len(kinds) == 2 and all(sum(odd) == harmful for odd in kinds)
    assert any(odd != sorted(odd, reverse=True) for odd in kinds)


def test_both_kinds_are_needed(base, prompts):
    rows, tokenizer = data.read_jsonl(prompts), load_tokenizer(base)
    for kind, other in (("benign", "harmful"), ("harmful", "benign")):
        data.write_jsonl(prompts, [row for row in rows if row["kind"] == kind])
        with pytest.raises(UserError, match=f"no {other} prompt"):
            train_ppo.read_prompts(train_ppo.Config(prompts=prompts, max_new=4), tokenizer, 64)


def test_every_update_and_every_seed_draws_other_answers(base, prompts, tmp_path, monkeypatch):
    """The policy stays as it is and one prompt is asked over and over: what differs is drawn
    anew."""
    row = data.read_jsonl(prompts)[0]
    data.write_jsonl(prompts, [row | {"kind": kind} for kind in ("harmful", "benign")])
    rollouts, start = seen_rollouts(monkeypatch), planted_pm(tmp_path / "pm", base)
    for seed in (0, 1):
        train_ppo.main(ppo(base, start, prompts, tmp_path / f"{seed}", warmup=2, seed=seed))
    looks, drawn = (
        [found.ids[found.valid].tolist() for *_, found in rollouts[i::4]] for i in (0, 1)
    )
    drawn += [found.ids[found.valid].tolist() for *_, found in rollouts[2::4]]
    assert looks[0] == looks[1] and len(set(map(tuple, drawn))) == 4


def test_ppo_learns_in_all_parts_of_policy_and_critic(base, prompts, tmp_path, monkeypatch):
    seen, pm = seen_by_update(monkeypatch), planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", warmup=0))
    assert moved(seen[0]["policy"], seen[1]["policy"]) == FROZEN[0][1]
    assert moved(seen[0]["critic"].gpt, seen[1]["critic"].gpt) == FROZEN[0][1]


def test_ppo_settings_reach_the_four_functions(base, prompts, tmp_path, monkeypatch):
    rollouts = seen_rollouts(monkeypatch)
    calls = {name: seen_by(monkeypatch, train_ppo.ppo, name) for name in ("score", "advantages")}
    for name, usual, value in (("MISSING_EOS", 1.0, 0.3), ("GAMMA", 1.0, 0.9), ("LAM", 0.95, 0.7)):
        assert getattr(train_ppo, name) == usual
        monkeypatch.setattr(train_ppo, name, value)
    pm = planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", updates=1, max_new=3))
    assert [settings["max_new"] for _, settings, _ in rollouts] == [3, 3, 3]
    assert [settings["missing_eos_penalty"] for _, settings, _ in calls["score"]] == [
        0.0,
        0.3,
        0.0,
    ]  # looks fine none
    ((_, charged, _),) = calls["advantages"]
    assert (charged["gamma"], charged["lam"]) == (0.9, 0.7)


def test_another_seed_asks_in_another_order(base, prompts, tmp_path, monkeypatch):
    rollouts, start = seen_rollouts(monkeypatch), planted_pm(tmp_path / "pm", base)
    for seed in (0, 1):
        train_ppo.main(ppo(base, start, prompts, tmp_path / f"{seed}", updates=1, seed=seed))
    look, first, _, other_look, second, _ = (args[3] for args, *_ in rollouts)
    assert look == other_look and sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    "target, betas", [(2.0, [0.1, 0.098, 0.09898, 0.1009596, 0.1009596]), (0.0, [0.1] * 5)]
)
def test_beta_is_steered_by_a_fifth_at_most(base, prompts, tmp_path, monkeypatch, target, betas):
    """KLs of 0, 2.2, 99 and 2 nats against a target of 2 count as errors of -0.2, 0.1, 0.2 and 0; 8
    answers of a horizon of 80 make a tenth of each. What is learnt from is charged this beta, and
    so is what is shown."""
    monkeypatch.setattr(train_ppo, "PRINT_EVERY", 1)
    kls, kept = iter([0.0, 2.2, 99.0, 2.0, 2.0]), train_ppo.ppo.diagnostics
    charged = seen_by(monkeypatch, train_ppo.ppo, "advantages")
    shown = seen_by(monkeypatch, train_ppo, "examples")
    seen_rollouts(monkeypatch)
    monkeypatch.setattr(train_ppo, "KL_HORIZON", 80)
    monkeypatch.setattr(
        train_ppo.ppo, "diagnostics", lambda *a, **k: kept(*a, **k) | {"kl": next(kls)}
    )
    train_ppo.main(
        ppo(
            base,
            planted_pm(tmp_path / "pm", base),
            prompts,
            tmp_path / "ppo",
            updates=5,
            beta=0.1,
            kl_target=target,
        )
    )
    assert [row["beta"] for row in rows_of(tmp_path / "ppo" / "metrics.jsonl")] == pytest.approx(
        betas
    )
    assert [settings["beta"] for _, settings, _ in charged] == pytest.approx(betas)
    assert [args[2] for args, *_ in shown] == pytest.approx(betas)
