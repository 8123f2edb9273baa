"""Numbers that go wrong are told where they do, with what was there before left as it is."""

import dataclasses
import math

import pytest
import torch
from test_train import QUIET, base, pairs, revisions, sft, weights  # noqa: F401

import train_pm
import train_sft
from mincai import Diverged, constitution, feedback, losses, ppo
from mincai.plumbing.planner import Planner
from mincai.plumbing.tokenizer import load_tokenizer
from mincai.sample import generate, generate_batched

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [NAN, INF])
def test_kl_and_entropy_of_no_numbers_are_none(bad):
    logits = torch.tensor([[0.0, bad, 1.0]])
    assert math.isnan(losses.entropy(logits)) and math.isnan(
        losses.exact_kl(logits, torch.zeros(1, 3))
    )
    assert not math.isfinite(losses.exact_kl(torch.zeros(1, 3), logits))
    sure = torch.tensor([[0.0, -INF, -INF]])  # probabilities of exactly 0 count nothing
    assert float(losses.entropy(sure)) == 0.0 and float(losses.exact_kl(sure, sure + 5)) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_nothing_is_sampled_from_a_model_of_nan(tiny_gpt, temperature):
    tiny_gpt.ln_f.bias.data[0] = NAN
    with pytest.raises(Diverged, match="weights hold NaN"):
        generate(tiny_gpt, [[1, 2]], 4, {0}, temperature)


def test_a_temperature_too_near_to_0_is_told(tiny_gpt):
    with pytest.raises(Diverged, match="temperature is too near to 0"):
        generate_batched(tiny_gpt, [[1, 2]], 4, {0}, temperature=1e-40)


def test_a_judge_of_nan_gives_no_label(tiny_base, monkeypatch):
    tokenizer = load_tokenizer(tiny_base)
    monkeypatch.setattr(feedback, "next_logp", lambda *_: torch.tensor([[NAN, -1.0]]))
    head = constitution.compare(constitution.dialogue("q ?"), "a", "b", "be kind")
    with pytest.raises(Diverged, match="look at --judge"):
        feedback.judge_once(None, Planner(tokenizer, 256), [head], reasons=False)


def test_training_that_runs_away_stops_and_replaces_nothing(base, revisions, pairs, tmp_path):
    out = tmp_path / "sft"
    train_sft.main(sft(base, revisions, out))
    before = weights(out)
    with pytest.raises(
        Diverged, match=r"train_sft, step \d+ of 6: the gradient's norm is nan; lower --lr"
    ):
        train_sft.main(sft(base, revisions, out, lr=1e30, epochs=2, again=True))
    assert (
        weights(out) == before
        and sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []
    )
    cfg = train_pm.Config(model=base, pairs=(pairs,), prompts="", out=str(tmp_path / "pm"), **QUIET)
    with pytest.raises(Diverged, match=r"train_pm, step \d+ of \d+: the gradient's norm is nan"):
        train_pm.main(dataclasses.replace(cfg, lr=1e30, freeze=0, batch_size=4))
    assert not (tmp_path / "pm").exists()


def test_a_score_that_is_none_is_told():
    ids = torch.ones(2, 4, dtype=torch.long)
    mask, zeros = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    batch = ppo.Rollout(ids, ids > 0, 2, mask, *[zeros] * 5, 0.0)
    for bad in (NAN, INF):
        with pytest.raises(Diverged, match="score is no finite number"):
            ppo.score(batch, lambda *_: torch.tensor([0.0, bad]), stop={1}, missing_eos_penalty=1.0)
