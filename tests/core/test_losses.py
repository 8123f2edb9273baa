"""The formulas against hand arithmetic, brute force and enumeration; and that padding never
counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mincai import losses

B, R, V = 3, 6, 5
LENGTHS = torch.tensor([6, 2, 4])
MASK = torch.arange(R) < LENGTHS[:, None]  # (B, R)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distributions(seed):
    """Policy and reference over 5 tokens: logits of each (5,)."""
    return randn(V, seed=seed), randn(V, seed=seed + 100)


# --- log-probs and reductions -------------------------------------------------------------------------------


def test_gather_logp_and_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4, 3/4
    assert_close(losses.gather_logp(logits, torch.tensor([1])), torch.tensor([math.log(0.75)]))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert_close(losses.entropy(logits), torch.tensor([expected]))
    assert losses.gather_logp(logits.bfloat16(), torch.tensor([1])).dtype == torch.float32
    assert_close(losses.entropy(torch.tensor([0.0, 0.0, -math.inf])), torch.tensor(math.log(2.0)))


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask():
    x = 3 * randn(B, R) + 7
    white = losses.masked_whiten(x, MASK)
    assert_close(white[MASK].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(white[MASK].var(unbiased=False), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert (white[~MASK] == 0).all()
    assert white.sum(1).abs().min() > 0.1  # over all rows together, not each row by itself


def test_masked_mean_of_nothing_is_zero():
    assert losses.masked_mean(torch.ones(2, 2), torch.zeros(2, 2).bool()) == 0


# --- padding ------------------------------------------------------------------------------------------------


def everything(junk):
    """All masked losses, metrics and rewards, with `junk` in the padding of every input."""

    def fill(x):
        return torch.where(MASK if x.dim() == 2 else MASK[..., None], x, junk)

    logits, targets = fill(randn(B, R, V)), torch.arange(B * R).view(B, R) % V
    a, b, c, d = (fill(randn(B, R, seed=s)) for s in range(2, 6))
    found = {
        "sft": losses.sft_loss(logits, torch.where(MASK, targets, 3), MASK),
        "policy": losses.policy_loss(a, b, c, MASK, 0.2),
        "value": losses.value_loss(a, b, c, MASK, 0.2),
    }
    reward = losses.token_rewards(torch.tensor([1.0, 2.0, 3.0]), a, b, MASK, 0.1)
    advantages, returns = losses.gae(fill(reward), d, MASK, 0.99, 0.95)
    flat = [reward, advantages, returns, losses.masked_whiten(a, MASK), losses.masked_mean(a, MASK)]
    for loss, metrics in found.values():
        flat += [loss, *metrics.values()]
    return flat


@pytest.mark.parametrize("junk", [1e4, -3.0, math.nan, math.inf])
def test_padding_changes_no_loss_and_no_metric(junk):
    for clean, scrambled in zip(everything(0.0), everything(junk)):
        assert clean.isfinite().all()
        assert_close(scrambled, clean)


def test_padding_gets_no_gradient():
    logits, values, logp = (randn(*s).requires_grad_() for s in ((B, R, V), (B, R), (B, R)))
    junk = torch.where(MASK, 1.0, math.nan)
    total = losses.sft_loss(logits, torch.zeros(B, R, dtype=torch.long), MASK)[0]
    total = total + losses.value_loss(values, junk, junk, MASK, 0.2)[0]
    (total + losses.policy_loss(logp, junk, junk, MASK, 0.2)[0]).backward()
    for x in (logits, values, logp):
        assert (x.grad[~MASK] == 0).all() and x.grad[MASK].isfinite().all() and x.grad[MASK].any()


# --- micro-batches ------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_big_batch():
    """Loss, metrics and gradients, with micro-batches of unequal numbers of tokens."""
    logits, targets = randn(B, R, V), torch.arange(B * R).view(B, R) % V
    old, adv, returns = (randn(B, R, seed=s) for s in (2, 3, 4))

    def terms(x, rows, total):
        mask = MASK[rows]
        logp = losses.gather_logp(x, targets[rows])
        return [
            losses.sft_loss(x, targets[rows], mask, total),
            losses.policy_loss(logp, old[rows], adv[rows], mask, 0.2, total),
            losses.value_loss(x[..., 0], old[rows], returns[rows], mask, 0.2, total),
        ]

    whole = logits.clone().requires_grad_()
    big = terms(whole, slice(0, 3), None)
    sum(loss for loss, _ in big).backward()
    parts = logits.clone().requires_grad_()
    small = []
    for rows in (slice(0, 1), slice(1, 3)):
        small.append(terms(parts[rows], rows, MASK.sum()))
        sum(loss for loss, _ in small[-1]).backward()
    assert_close(parts.grad, whole.grad)
    for (loss, metrics), *pieces in zip(big, *small):
        assert_close(sum(piece for piece, _ in pieces), loss)
        for key in metrics:
            assert_close(sum(m[key] for _, m in pieces), metrics[key])


# --- supervised fine-tuning and preferences -----------------------------------------------------------------


def test_sft_loss_weighs_tokens():
    logits = torch.zeros(1, 2, 4)
    logits[0, 1, 2] = math.log(5.0)  # probabilities 1/4 for the first target, 5/8 for the second
    loss, metrics = losses.sft_loss(logits, torch.tensor([[1, 2]]), torch.tensor([[1.0, 3.0]]))
    assert_close(loss, torch.tensor((math.log(4) + 3 * math.log(8 / 5)) / 4))
    assert_close(metrics["accuracy"], torch.tensor(0.75))
    assert metrics["tokens"] == 4


def test_equal_scores_cost_log_2():
    score, p_a = torch.zeros(4), torch.tensor([0.0, 0.3, 0.5, 1.0])
    assert_close(losses.preference_loss(score, score, p_a)[0], torch.tensor(math.log(2.0)))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.5, 0.9])
def test_soft_label_is_best_met_by_its_logit(p):
    d = torch.tensor([math.log(p / (1 - p))], requires_grad=True)
    loss, _ = losses.preference_loss(d, torch.zeros(1), torch.tensor([p]))
    (gradient,) = torch.autograd.grad(loss, d, create_graph=True)
    assert_close(gradient, torch.zeros(1), atol=1e-6, rtol=0)
    assert torch.autograd.grad(gradient, d)[0] > 0  # a minimum
    assert_close(loss.detach(), torch.tensor(-p * math.log(p) - (1 - p) * math.log(1 - p)))


def test_preference_loss_stays_finite_and_is_symmetric():
    a, b, p_a = torch.tensor([500.0, -500.0]), torch.zeros(2), torch.tensor([0.25, 0.75])
    loss, metrics = losses.preference_loss(a, b, p_a)
    assert_close(loss, torch.tensor(375.0))
    swapped, also = losses.preference_loss(b, a, 1 - p_a)
    assert_close(swapped, loss)
    assert_close(also, metrics)


def test_preference_metrics_by_hand():
    a, b = torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 0.0, 0.0])
    _, metrics = losses.preference_loss(a, b, torch.tensor([0.9, 0.9, 0.9, 0.5]))
    assert (
        metrics["accuracy"] == (1 + 0 + 0.5 + 0.5) / 4
    )  # right, wrong, equal scores, undecided label
    assert metrics["margin"] == (1 - 2 + 0 + 0) / 4


# --- KL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kl_estimators_against_enumeration(seed):
    """Expectations over all five tokens under the policy, in place of sampling."""
    logits, ref_logits = distributions(seed)
    logp, ref_logp = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    p = logp.exp()
    true = sum(float(p[i]) * (float(logp[i]) - float(ref_logp[i])) for i in range(V))
    assert true > 0.05
    true = torch.tensor(true)
    assert_close((p * losses.kl_k1(logp, ref_logp)).sum(), true)
    assert_close((p * losses.kl_k3(logp, ref_logp)).sum(), true)
    assert_close(losses.exact_kl(logits, ref_logits), true)
    assert (losses.kl_k3(logp, ref_logp) >= 0).all() and (losses.kl_k1(logp, ref_logp) < 0).any()
    wrong = (p * losses.kl_k3(ref_logp, logp)).sum()  # the other direction estimates something else
    assert abs(wrong - true) > 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_of_k2_as_a_loss_is_that_of_the_kl(seed):
    """And k1 in the reward: both give the exact gradient of KL(policy || reference), by
    enumeration."""
    logits, ref_logits = distributions(seed)
    logits.requires_grad_()
    ref_logp = F.log_softmax(ref_logits, -1)

    def gradient(make):
        logp = F.log_softmax(logits, -1)
        return torch.autograd.grad((logp.detach().exp() * make(logp)).sum(), logits)[0]

    exact = torch.autograd.grad(losses.exact_kl(logits, ref_logits), logits)[0]
    as_loss = gradient(lambda logp: losses.kl_k2(logp, ref_logp))
    as_reward = gradient(lambda logp: losses.kl_k1(logp, ref_logp).detach() * logp)
    assert_close(as_loss, exact, atol=1e-6, rtol=1e-5)
    assert_close(as_reward, exact, atol=1e-6, rtol=1e-5)


# --- PPO ----------------------------------------------------------------------------------------------------


def test_score_is_added_once_on_the_last_real_token():
    logp, ref_logp = torch.full((B, R), -1.0), torch.full((B, R), -3.0)
    reward = losses.token_rewards(torch.tensor([10.0, 20.0, 30.0]), logp, ref_logp, MASK, beta=0.5)
    assert reward.tolist() == [
        [-1, -1, -1, -1, -1, 9],
        [-1, 19, 0, 0, 0, 0],
        [-1, -1, -1, 29, 0, 0],
    ]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_gae_against_the_double_sum(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, row by row without a mask."""
    rewards, values = randn(B, R), randn(B, R, seed=1)
    advantages, returns = losses.gae(rewards, values, MASK, gamma, lam)
    for b, length in enumerate(LENGTHS.tolist()):
        r, v = rewards[b, :length].tolist(), values[b, :length].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            for t in range(length)
        ]
        assert_close(advantages[b, :length], torch.tensor(expected))
        assert_close(returns[b, :length], torch.tensor(expected) + values[b, :length])
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_full_lambda_gives_the_sum_of_rewards_to_come():
    """gamma = lam = 1: the return does not depend on the values at all."""
    rewards = randn(B, R)
    _, returns = losses.gae(rewards, randn(B, R, seed=1), MASK, 1.0, 1.0)
    assert_close(returns[1, :2], torch.stack([rewards[1, 0] + rewards[1, 1], rewards[1, 1]]))


def test_unchanged_policy_has_ratio_1_exactly():
    logp, adv = randn(B, R), randn(B, R, seed=1)
    loss, metrics = losses.policy_loss(logp, logp.clone(), adv, MASK, 0.2)
    assert_close(loss, -adv[MASK].mean())
    assert metrics["ratio"] == 1 and metrics["clipfrac"] == 0 and metrics["approx_kl"] == 0


def test_policy_loss_clips_only_what_has_gone_too_far():
    """Ratios 1.5 and 0.5, advantages +1 and -1, clip 0.2: two of the four terms are cut."""
    logp = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    adv, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4).bool()
    loss, metrics = losses.policy_loss(logp, torch.zeros(1, 4), adv, mask, 0.2)
    assert_close(loss, torch.tensor((-1.2 + 1.5 - 0.5 + 0.8) / 4))
    assert metrics["clipfrac"] == 0.5
    k2 = (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4  # each twice; k1 would be -0.14, and often 0
    assert_close(metrics["approx_kl"], torch.tensor(k2))
    loss.backward()
    assert_close(
        logp.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]) / 4
    )  # ratio * -adv, or nothing where cut


def test_exponents_of_log_ratios_are_held():
    """exp is inf beyond 88 in float32; one such token would make a loss, or the log, inf."""
    logp, old = torch.tensor([[100.0, -100.0, 0.5, 30.0]]), torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    assert_close(
        losses.ratios(logp, old, mask),
        torch.tensor([[5e8, 0.0, math.exp(0.5), 1.0]]),
        rtol=0.04,
        atol=1e-8,
    )
    assert losses.beyond(logp, old, mask) == 2 and losses.beyond(logp * math.nan, old, mask) == 3
    loss, metrics = losses.policy_loss(logp, old, torch.ones(1, 4), mask, 0.2)
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    k3 = losses.kl_k3(torch.tensor([-100.0, -2.0, 100.0]), torch.zeros(3))
    assert_close(k3, torch.tensor([math.exp(20) - 101, math.exp(2) - 3, 99.0]))


def test_value_loss_by_hand():
    """Old value 0, clip 0.2, return 1: a value of 0.5 counts as 0.2; one of -1 is worse than its
    clip."""
    values, zero, one = torch.tensor([[0.5, -1.0, 0.1]]), torch.zeros(1, 3), torch.ones(1, 3)
    loss, metrics = losses.value_loss(values, zero, one, one.bool(), 0.2)
    assert_close(loss, torch.tensor(0.5 * (0.64 + 4.0 + 0.81) / 3))
    assert_close(metrics["error"], torch.tensor((0.25 + 4.0 + 0.81) / 3))
    assert_close(metrics["clipfrac"], torch.tensor(1 / 3))


def test_calibration_error_by_hand():
    """Bin 0.2-0.3: |0.25 - 0.5| on two pairs; bin 0.9-1, edge included: |0.95 - 1| on two; mean
    0.15."""
    prob, label = torch.tensor([0.25, 0.25, 0.9, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert losses.calibration_error(prob, label) == pytest.approx(0.15, abs=1e-6)
    prob, label = torch.tensor([0.25, 0.25, 0.9, 1.0]), torch.tensor([0, 1, 1, 0])
    assert losses.calibration_error(prob, label) == pytest.approx(0.35, abs=1e-6)


def test_the_clips_by_hand():
    """Old log-probs 0, ratios 1.5, 1.5, 0.5, 0.5 and 1.1 with advantages +, -, +, -, +: the clip at
    0.2 cuts off the gradient where the policy moved in the advantage's own direction and beyond it,
    the first and the fourth."""
    logp = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]).log()
    adv = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, metrics = losses.policy_loss(logp, torch.zeros(1, 5), adv, mask, 0.2)
    assert float(metrics["clipfrac"]) == pytest.approx(2 / 5)
    assert float(loss) == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8 - 1.1) / 5)
    # values 1 above and 1 below the old ones, held within 0.2 of them; returns on the far side of
    # either
    values, old, returns = (torch.tensor([row]) for row in ([1.0, -1.0], [0.0, 0.0], [2.0, -3.0]))
    loss, metrics = losses.value_loss(values, old, returns, torch.ones(1, 2, dtype=torch.bool), 0.2)
    assert (
        float(loss) == pytest.approx(0.5 * (1.8**2 + 2.8**2) / 2)
        and float(metrics["clipfrac"]) == 1.0
    )


def test_a_small_weight_counts_for_what_it_is():
    logits = torch.zeros(1, 3, 4)  # every target costs ln 4
    loss, metrics = losses.sft_loss(
        logits, torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0.1, 0.4, 0.0]]), total=1
    )
    assert float(loss) == pytest.approx(0.5 * math.log(4)) and float(
        metrics["tokens"]
    ) == pytest.approx(0.5)
