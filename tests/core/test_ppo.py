"""PPO's four functions, on models so small that every answer can be listed."""

import dataclasses
import math

import pytest
import torch

from mincai import UserError, losses, ppo
from mincai.model import GPT, GPTConfig, ScalarModel, attention_mask, positions_of

STOP = 4  # of a vocabulary of five
CONFIG = GPTConfig(vocab_size=5, block_size=16, n_layer=1, n_head=2, n_embd=16)


def networks(seed=0):
    """Policy, reference with equal weights, critic. Weights are large: the reference is not
    uniform."""
    torch.manual_seed(seed)
    policy, ref, critic = GPT(CONFIG), GPT(CONFIG), ScalarModel(GPT(CONFIG))
    with torch.no_grad():
        for p in policy.parameters():
            if p.dim() == 2:
                p.mul_(5)
    ref.load_state_dict(policy.state_dict())
    return policy, ref.requires_grad_(False), critic


def optimizers(policy, critic, lr=0.003, critic_lr=0.003):
    return (
        torch.optim.Adam(policy.parameters(), lr, eps=1e-5),
        torch.optim.Adam(critic.parameters(), critic_lr, eps=1e-5),
    )


UPDATE = dict(epochs=2, minibatches=1, micro_batch=64, clip=0.2, value_clip=0.2, max_norm=1.0)


def update(nets, opts, batch, adv, returns, generator=None, **settings):
    """ppo.update of policy and critic, with UPDATE and these settings."""
    learners, how = map(ppo.Learner, (nets[0], nets[2]), opts), ppo.Steps(**UPDATE | settings)
    generator = generator or torch.Generator().manual_seed(0)
    return ppo.update(*learners, batch, adv, returns, how, generator)


def collect(nets, prompts, seed=0, max_new=2, micro_batch=64):
    return ppo.rollout(
        *nets,
        prompts,
        max_new=max_new,
        stop={STOP},
        micro_batch=micro_batch,
        generator=torch.Generator().manual_seed(seed),
    )


def ragged(n=24):
    return [[1 + i % 3] * (1 + i % 4) for i in range(n)]


def first_token_is_two(ids, valid, start):
    return (ids[:, start] == 2).float()


def train(nets, reward, beta, updates, batch=128, lr=0.003, lam=0.95, seed=0):
    """The loop of train_ppo in small: one prompt, a table as the score."""
    opts = optimizers(nets[0], nets[2], lr, lr)
    order = torch.Generator().manual_seed(seed)
    for u in range(updates):
        batch_ = collect(nets, [[0]] * batch, seed=1000 * seed + u, micro_batch=batch)
        scores, _ = ppo.score(batch_, reward, stop={STOP}, missing_eos_penalty=0.0)
        adv, returns = ppo.advantages(batch_, scores, beta=beta, gamma=1.0, lam=lam)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr * (1 - u / updates)
        update(nets, opts, batch_, adv, returns, order, micro_batch=batch)


def answers():
    """All answers of at most two tokens: [stop], [x, stop], [x, y]."""
    return [[STOP]] + [[x, y] for x in range(4) for y in range(5)]


@torch.no_grad()
def log_probs(model, table):
    """Log-probability of every answer, from plain causal forwards of the prompt [0] and the
    answer."""
    out = []
    for answer in table:
        logp = torch.log_softmax(model.unembed(model(torch.tensor([[0] + answer])))[0], -1)
        out.append(sum(logp[t, token] for t, token in enumerate(answer)))
    return torch.stack(out)


def table_reward(table, rewards):
    """A score function that looks the answer up."""
    lookup = {tuple(a): float(r) for a, r in zip(table, rewards)}

    def score_fn(ids, valid, start):
        return torch.tensor(
            [lookup[tuple(row[keep].tolist()[1:])] for row, keep in zip(ids, valid)]
        )

    return score_fn


def test_reaches_the_optimum_that_theory_names():
    """max E[r] - beta KL has one solution, ref * exp(r / beta) normalised; a wrong sign or factor
    of beta, a score on the wrong token, or a missing KL term each end somewhere else."""
    nets, table, beta = networks(), answers(), 0.5
    rewards = torch.randn(len(table), generator=torch.Generator().manual_seed(3))
    ref_logp = log_probs(nets[1], table)
    assert abs(float(ref_logp.exp().sum()) - 1) < 1e-5  # the list is complete
    best = torch.log_softmax(ref_logp + rewards / beta, 0)
    start = float((ref_logp.exp() * (ref_logp - best)).sum())
    train(nets, table_reward(table, rewards), beta, updates=60, batch=256, lr=0.01, lam=1.0)
    logp = log_probs(nets[0], table)
    assert start > 0.5
    assert float((logp.exp() * (logp - best)).sum()) < 0.02


@pytest.mark.parametrize("minibatches, micro_batch", [(1, 24), (2, 12), (2, 4)])
def test_first_minibatch_has_ratio_exactly_one(minibatches, micro_batch):
    """Dropout, a shifted column or another temperature in old and new log-probs would show here."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6, micro_batch=micro_batch)
    scores = torch.randn(24, generator=torch.Generator().manual_seed(0))
    adv, returns = ppo.advantages(batch, scores, beta=0.1, gamma=1.0, lam=0.95)
    settings = dict(minibatches=minibatches, micro_batch=micro_batch)
    metrics = update(nets, optimizers(nets[0], nets[2]), batch, adv, returns, **settings)
    assert (
        metrics["first_ratio_error"]
        == metrics["first_approxkl"]
        == metrics["first_clipfrac"]
        == 0.0
    )
    assert metrics["approxkl"] > 0 and metrics["ratio_max"] > 1  # and it moved afterwards


def test_the_first_epoch_keeps_the_order_of_the_rows():
    """Sums over other slices may round differently on other hardware, so the first minibatch must
    be the first rows: old log-probs that are wrong in the second half only must not show in it."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6, micro_batch=12)
    wrong = batch.logp + (torch.arange(24) >= 12).float()[:, None]
    batch = dataclasses.replace(batch, logp=wrong)
    adv, returns = ppo.advantages(batch, torch.randn(24), beta=0.1, gamma=1.0, lam=0.95)
    opts = optimizers(nets[0], nets[2])
    metrics = update(nets, opts, batch, adv, returns, minibatches=2, micro_batch=12)
    assert metrics["first_ratio_error"] == 0.0 and metrics["approxkl"] > 0.05


def test_before_learning_every_kl_is_zero_and_the_sampler_agrees():
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    scores, ended = ppo.score(
        batch, lambda ids, valid, start: torch.zeros(len(ids)), stop={STOP}, missing_eos_penalty=0.0
    )
    _, returns = ppo.advantages(batch, scores, beta=0.1, gamma=1.0, lam=0.95)
    numbers = ppo.diagnostics(batch, scores, ended, returns, beta=0.1)
    assert (
        numbers["kl"]
        == numbers["kl_k3"]
        == numbers["kl_exact"]
        == numbers["non_score_reward"]
        == 0.0
    )
    assert numbers["sampling_gap"] < 1e-4
    assert 0 < numbers["entropy"] < torch.log(torch.tensor(5.0))


def test_columns_line_up():
    """Log-prob and value of answer token t are those of a plain forward over the row, read at t -
    1."""
    nets = policy, ref, critic = networks()
    prompts = ragged(5)
    batch = collect(nets, prompts, max_new=6)
    for i, prompt in enumerate(prompts):
        answer = batch.ids[i, batch.start :][batch.mask[i]].tolist()
        row = torch.tensor([prompt + answer])
        with torch.no_grad():
            logp = torch.log_softmax(policy.unembed(policy(row))[0], -1)
            values = critic(row)[0]
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        torch.testing.assert_close(batch.logp[i, : len(answer)], logp[places, torch.tensor(answer)])
        torch.testing.assert_close(batch.values[i, : len(answer)], values[places])


def numbers_of(nets, batch):
    """Everything that is computed from a rollout, with fresh copies of the networks."""
    policy, critic = GPT(CONFIG), ScalarModel(GPT(CONFIG))
    policy.load_state_dict(nets[0].state_dict())
    critic.load_state_dict(nets[2].state_dict())
    scores, ended = ppo.score(
        batch, ppo.preference_score(nets[2], 7), stop={STOP}, missing_eos_penalty=1.0
    )
    adv, returns = ppo.advantages(batch, scores, beta=0.1, gamma=1.0, lam=0.95)
    metrics = update((policy, None, critic), optimizers(policy, critic), batch, adv, returns)
    return {**ppo.diagnostics(batch, scores, ended, returns, beta=0.1), **metrics}


def test_padding_changes_no_metric():
    """What stands in padded columns (ids, log-probs, values, KL) enters no score, loss or
    diagnostic."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=8)
    with torch.no_grad():  # a policy that has moved, so that no KL is trivially 0
        for p in nets[1].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        ref_logits = ppo.response_logits(nets[1], batch.ids, batch.valid, batch.start)
        ref_logp = losses.gather_logp(ref_logits, batch.ids[:, batch.start :])
        batch = dataclasses.replace(batch, ref_logp=ref_logp)
    assert not batch.mask.all() and not batch.valid[:, : batch.start].all()
    noise = torch.Generator().manual_seed(2)

    def scramble(x):
        return torch.where(batch.mask, x, 100 * torch.randn(x.shape, generator=noise))

    ids = torch.where(batch.valid, batch.ids, torch.randint(0, 5, batch.ids.shape, generator=noise))
    assert not torch.equal(ids, batch.ids)
    other = dataclasses.replace(
        batch,
        ids=ids,
        **{
            name: scramble(getattr(batch, name))
            for name in ("logp", "ref_logp", "values", "entropy", "kl")
        },
    )
    expected, got = numbers_of(nets, batch), numbers_of(nets, other)
    assert expected["kl_k3"] > 0 and expected["grad_norm"] > 0
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_micro_batches_add_up_to_the_minibatch():
    """A mean of micro-batch means would weigh the tokens of short answers more."""
    weights = []
    for micro_batch in (24, 5):
        nets = networks()
        batch = collect(nets, ragged(), max_new=8, micro_batch=24)
        scores = torch.randn(24, generator=torch.Generator().manual_seed(0))
        adv, returns = ppo.advantages(batch, scores, beta=0.1, gamma=1.0, lam=0.95)
        opts = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (nets[0], nets[2])]
        update(nets, opts, batch, adv, returns, epochs=1, micro_batch=micro_batch, max_norm=1e9)
        trained = [*nets[0].parameters(), *nets[2].parameters()]
        weights.append(torch.cat([p.detach().flatten() for p in trained]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_an_answer_that_is_cut_off_is_fined():
    nets = networks()
    batch = collect(nets, [[0]] * 64, max_new=2)
    fined, ended = ppo.score(
        batch,
        lambda ids, valid, start: torch.full((len(ids),), 0.5),
        stop={STOP},
        missing_eos_penalty=2.0,
    )
    stops = (batch.ids[:, 1:] == STOP).any(1)
    assert torch.equal(ended, stops) and 0 < stops.sum() < 64
    torch.testing.assert_close(fined, torch.where(stops, 0.5, -1.5))


def test_a_stop_token_in_the_padding_ends_nothing():
    nets = networks()
    batch = collect(nets, [[0]] * 64, max_new=2)
    ids = torch.where(batch.valid, batch.ids, STOP)
    ids = torch.cat(
        [ids, torch.full_like(ids[:, :1], STOP)], 1
    )  # a column that is padding in every row
    batch = dataclasses.replace(
        batch,
        ids=ids,
        valid=torch.nn.functional.pad(batch.valid, (0, 1)),
        mask=torch.nn.functional.pad(batch.mask, (0, 1)),
    )
    _, ended = ppo.score(
        batch, lambda ids, valid, start: torch.zeros(len(ids)), stop={STOP}, missing_eos_penalty=1.0
    )
    assert torch.equal(ended, (ids[:, 1:3] == STOP).any(1)) and not ended.all()


def test_preference_score_reads_the_last_real_token():
    """Left-padded prompts and right-padded answers in one row: compared with each row alone,
    unpadded; the critic too."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=8)
    pm = nets[2]
    with torch.no_grad():
        alone = [pm(row[keep][None])[0] for row, keep in zip(batch.ids, batch.valid)]
    last = torch.stack([scores[-1] for scores in alone])
    torch.testing.assert_close(
        ppo.preference_score(pm, 7)(batch.ids, batch.valid, batch.start), last
    )
    scores, _ = ppo.score(batch, ppo.preference_score(pm, 7), stop={STOP}, missing_eos_penalty=0.0)
    torch.testing.assert_close(scores, last)
    values = ppo.response_values(pm, batch.ids, batch.valid, batch.start)
    for i, keep in enumerate(batch.valid):
        first = int(keep[: batch.start].sum())
        torch.testing.assert_close(
            values[i][batch.mask[i]], alone[i][first - 1 : -1]
        )  # before each token


def test_the_critic_knows_only_what_was_said_before():
    """The value beside an act must not move with the act itself, or the baseline would bias the
    gradient."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=8)
    with torch.no_grad():
        before = ppo.response_values(nets[2], batch.ids, batch.valid, batch.start)
        other = batch.ids.clone()
        other[:, batch.start + 3] = (other[:, batch.start + 3] + 1) % CONFIG.vocab_size
        after = ppo.response_values(nets[2], other, batch.valid, batch.start)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=0, rtol=0)
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 0.01


def learn(nets, batch, returns=None, adv=None, lr=0.003, **settings):
    """One call of `update` on this rollout, with random scores where no others are given."""
    found = ppo.advantages(
        batch,
        torch.randn(len(batch.ids), generator=torch.Generator().manual_seed(0)),
        beta=0.1,
        gamma=1.0,
        lam=0.95,
    )
    adv, returns = (mine if given is None else given for mine, given in zip(found, (adv, returns)))
    return update(nets, optimizers(nets[0], nets[2], lr, lr), batch, adv, returns, **settings)


def one_step(max_norm):
    """How far one step of gradient descent at rate 1 moves policy and critic: two lists of
    tensors."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    adv, returns = ppo.advantages(
        batch,
        5 * torch.randn(24, generator=torch.Generator().manual_seed(0)),
        beta=0.1,
        gamma=1.0,
        lam=0.95,
    )
    was = [[p.detach().clone() for p in nets[i].parameters()] for i in (0, 2)]
    opts = [torch.optim.SGD(nets[i].parameters(), lr=1.0) for i in (0, 2)]
    metrics = update(nets, opts, batch, adv, returns, epochs=1, max_norm=max_norm)
    moved = [
        [b - a.detach() for a, b in zip(nets[i].parameters(), old)] for i, old in zip((0, 2), was)
    ]
    return batch, adv, returns, moved, metrics


def test_a_step_goes_down_the_gradient_of_the_two_losses():
    """By its full length, too: Adam would hide a loss that is divided by too much."""
    batch, adv, returns, moved, _ = one_step(max_norm=1e9)
    policy, _, critic = networks()
    logits = ppo.response_logits(policy, batch.ids, batch.valid, batch.start)
    logp = losses.gather_logp(logits, batch.ids[:, batch.start :])
    ratio = (logp - batch.logp).exp()  # 1, where nothing is clipped
    (-(adv * ratio)[batch.mask].mean()).backward()
    values = ppo.response_values(critic, batch.ids, batch.valid, batch.start)
    (0.5 * (values - returns)[batch.mask].square().mean()).backward()
    for net, found in zip((policy, critic), moved):
        for p, step in zip(net.parameters(), found):
            torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=1e-6)


def test_each_networks_gradient_is_clipped_by_itself():
    _, _, _, moved, metrics = one_step(max_norm=1e-3)
    for found, name in zip(moved, ("grad_norm", "critic_grad_norm")):
        length = float(torch.cat([step.flatten() for step in found]).norm())
        assert metrics[name] > 0.01 and length == pytest.approx(1e-3, rel=0.01)


def test_values_are_held_near_the_old_ones():
    """A critic that has gone past the clip has no gradient: a small value_clip lets it go less
    far."""
    found = {}
    for value_clip in (0.01, 1e9):
        nets = networks()
        batch = collect(nets, ragged(), max_new=6)
        metrics = learn(nets, batch, lr=0.01, epochs=8, value_clip=value_clip)
        with torch.no_grad():
            values = ppo.response_values(nets[2], batch.ids, batch.valid, batch.start)
        found[value_clip] = (
            float((values - batch.values)[batch.mask].abs().mean()),
            metrics["vf_clipfrac"],
        )
    assert found[0.01][0] < 0.7 * found[1e9][0]
    assert found[0.01][1] > 0.1 and found[1e9][1] == 0.0


def shifted(batch, rows, by):
    """The rollout with old log-probs that are off by so many nats in these many rows."""
    return dataclasses.replace(
        batch, logp=batch.logp + by * (torch.arange(len(batch.ids)) < rows)[:, None]
    )


def test_a_policy_that_has_run_away_is_told_and_takes_no_step():
    nets = networks()
    before = {k: v.clone() for net in nets for k, v in net.state_dict().items()}
    batch = collect(nets, ragged(), max_new=6)
    for by in (-100.0, 100.0, float("nan")):  # exp(100) is inf in float32
        with pytest.raises(UserError, match="minibatch 1 of 2: .* of its .* run away; lower --lr"):
            learn(nets, shifted(batch, 24, by))
    after = {k: v for net in nets for k, v in net.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_rare_runaway_is_counted_and_stays_finite():
    nets = networks()
    batch = collect(nets, ragged(240), max_new=8, micro_batch=240)
    row = int((batch.mask.sum(1) == 1).nonzero()[0])  # an answer of one token
    logp = batch.logp.clone()
    logp[row, 0] -= 200
    metrics = learn(nets, dataclasses.replace(batch, logp=logp), micro_batch=240)
    assert metrics["ratios_beyond"] == 2  # once in each of two minibatches
    assert all(math.isfinite(number) for number in metrics.values())
    assert metrics["ratio_max"] == pytest.approx(math.exp(losses.LIMIT), rel=1e-4)
    off = dataclasses.replace(batch, ref_logp=logp)
    found = ppo.diagnostics(
        off, torch.zeros(240), torch.ones(240), torch.zeros_like(logp), beta=0.1
    )
    assert found["kl_beyond"] == 1 and all(math.isfinite(number) for number in found.values())
    assert learn(nets, batch, micro_batch=240)["ratios_beyond"] == 0


@pytest.mark.parametrize(
    "name, told",
    [("adv", "pg_loss is nan.*lower --lr"), ("returns", "vf_loss is nan.*lower --critic-lr")],
)
def test_a_loss_that_is_no_number_is_told(name, told):
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    with pytest.raises(UserError, match="minibatch 1 of 2: " + told):
        learn(nets, batch, **{name: torch.full_like(batch.logp, float("nan"))})


@pytest.mark.parametrize(
    "net, told", [(0, " grad_norm is nan.*--lr"), (2, "critic_grad_norm is nan.*--critic-lr")]
)
def test_a_gradient_that_is_no_number_is_told(net, told):
    """Clipping by an infinite norm would write NaN into every weight."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    next(nets[net].parameters()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(UserError, match="minibatch 1 of 2:.*" + told):
        learn(nets, batch)


def test_raises_a_planted_token_and_beta_holds_it_back():
    rates, kls = [], []
    for beta in (0.05, 1.0):
        nets = networks()
        table = answers()
        before = log_probs(nets[1], table).exp()
        is_two = torch.tensor([a[0] == 2 for a in table])
        train(
            nets,
            lambda ids, valid, start: first_token_is_two(ids, valid, 1),
            beta,
            updates=40,
            lr=0.01,
        )
        logp, ref_logp = log_probs(nets[0], table), log_probs(nets[1], table)
        rates.append(float(logp.exp()[is_two].sum()))
        kls.append(float((logp.exp() * (logp - ref_logp)).sum()))
    assert rates[0] > 0.9 and rates[0] > rates[1] > float(before[is_two].sum())
    assert kls[0] > 2 * kls[1] > 0


def test_an_update_leaves_no_gradient():
    """It would be memory that the next rollout lacks."""
    nets = policy, _, critic = networks()
    assert learn(nets, collect(nets, ragged(), max_new=6))["grad_norm"] > 0
    assert all(p.grad is None for net in (policy, critic) for p in net.parameters())


@pytest.mark.parametrize("micro_batch", [24, 3])
def test_the_host_waits_once_a_minibatch(monkeypatch, micro_batch):
    """On a GPU each number that Python sees stops it; micro-batches must not."""
    nets, waits = networks(), []
    batch = collect(nets, ragged())
    adv, returns = batch.mask.float(), batch.mask.float()
    opts = [torch.optim.SGD(net.parameters(), 0.001) for net in (nets[0], nets[2])]
    for name in ("__float__", "__int__", "__bool__", "item", "tolist"):
        real = getattr(torch.Tensor, name)
        counted = lambda self, name=name, real=real: waits.append(name) or real(self)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    update(nets, opts, batch, adv, returns, minibatches=2, micro_batch=micro_batch)
    assert waits == ["tolist"] * 2 * 2


def test_warm_up_trains_the_critic_only():
    nets = policy, ref, critic = networks()
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    batch = collect(nets, ragged(), max_new=6)
    assert learn(nets, batch, train_policy=False)["grad_norm"] == 0.0
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), ref.state_dict().values())
    )
    assert not torch.equal(before["score.weight"], critic.state_dict()["score.weight"])


def test_advantages_are_white_over_the_batch_not_over_each_row():
    """Row by row, every answer's advantages would sum to 0: good and bad answers would look
    alike."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    scores = 10 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    adv, _ = ppo.advantages(batch, scores, beta=0.0, gamma=1.0, lam=1.0)
    real = adv[batch.mask]
    assert abs(float(real.mean())) < 1e-5 and float(real.var(unbiased=False)) == pytest.approx(
        1, abs=1e-4
    )
    assert not adv[~batch.mask].any()
    assert float(torch.where(batch.mask, adv, 0.0).sum(1).abs().max()) > 1


def test_a_hand_made_row():
    """Two answer tokens, padding on both sides; beta 0.5, gamma 1, lambda 1. Reward of the first
    token: -0.5 * 0.2 = -0.1; of the last: -0.5 * -0.4 + 2 = 2.2. Returns: 2.1 and 2.2, nothing
    beyond."""
    mask = torch.tensor([[True, True, False]])
    zero = torch.zeros(1, 3)
    valid = torch.tensor([[False, True, True, True, False]])
    batch = ppo.Rollout(
        torch.zeros(1, 5, dtype=torch.long),
        valid,
        2,
        mask,
        torch.tensor([[-1.0, -1.0, 7.0]]),
        torch.tensor([[-1.2, -0.6, 0.0]]),
        torch.tensor([[0.3, 0.4, 9.0]]),
        zero,
        zero,
        0.0,
    )
    _, returns = ppo.advantages(batch, torch.tensor([2.0]), beta=0.5, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[2.1, 2.2, 0.0]]))


def test_mask_and_positions_serve_both_kinds_of_padding():
    valid = torch.tensor([[False, True, True, False]])
    assert positions_of(valid)[0, 1:3].tolist() == [0, 1]
    assert attention_mask(valid)[0, 2].tolist() == [False, True, True, False]
    assert attention_mask(valid).any(-1).all()  # an empty row of the softmax would be NaN


def test_each_minibatch_is_a_mean_over_its_own_tokens():
    """Two small steps of gradient descent go as far as the two minibatches' own gradients
    together."""
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    adv, returns = ppo.advantages(
        batch,
        torch.randn(24, generator=torch.Generator().manual_seed(0)),
        beta=0.1,
        gamma=1.0,
        lam=0.95,
    )
    was = [p.detach().clone() for p in nets[0].parameters()]
    opts = [torch.optim.SGD(nets[i].parameters(), lr=1e-4) for i in (0, 2)]
    update(nets, opts, batch, adv, returns, epochs=1, minibatches=2, max_norm=1e9)
    policy = networks()[0]
    logits = ppo.response_logits(policy, batch.ids, batch.valid, batch.start)
    ratio = (losses.gather_logp(logits, batch.ids[:, batch.start :]) - batch.logp).exp()
    (
        -sum((adv * ratio)[rows][batch.mask[rows]].mean() for rows in (slice(0, 12), slice(12, 24)))
    ).backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()])
    found = torch.cat(
        [((a - b.detach()) / 1e-4).flatten() for a, b in zip(was, nets[0].parameters())]
    )
    assert float((found - want).norm() / want.norm()) < 0.1


def test_later_epochs_go_through_the_rows_in_another_order(monkeypatch):
    nets, seen, kept = networks(), [], ppo.Part
    batch = collect(nets, ragged(), max_new=6)
    monkeypatch.setattr(
        ppo,
        "Part",
        lambda batch, rows, *a, **k: seen.append(rows.tolist()) or kept(batch, rows, *a, **k),
    )
    adv, returns = ppo.advantages(batch, torch.randn(24), beta=0.1, gamma=1.0, lam=0.95)
    opts = [torch.optim.SGD(nets[i].parameters(), lr=1e-4) for i in (0, 2)]
    update(nets, opts, batch, adv, returns, epochs=3)
    rows = [row for some in seen for row in some]
    epochs = [rows[:24], rows[24:48], rows[48:]]
    assert epochs[0] == list(range(24)) and all(sorted(some) == epochs[0] for some in epochs)
    assert epochs[1] != epochs[0] != epochs[2] != epochs[1]


def test_what_is_optimised_is_the_score_less_the_price_of_kl():
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    batch = dataclasses.replace(
        batch, ref_logp=batch.logp - 0.5 * batch.mask
    )  # half a nat on every token
    scores = torch.arange(24.0)
    found = ppo.diagnostics(
        batch, scores, torch.ones(24, dtype=torch.bool), torch.zeros_like(batch.logp), beta=0.1
    )
    kl = 0.5 * float(batch.mask.sum(1).float().mean())
    assert found["kl"] == pytest.approx(kl) and found["non_score_reward"] == pytest.approx(
        -0.1 * kl
    )
    assert found["total"] == pytest.approx(11.5 - 0.1 * kl)


def test_explained_is_one_for_a_perfect_critic_and_none_for_the_mean():
    nets = networks()
    batch = collect(nets, ragged(), max_new=6)
    returns = torch.randn(batch.logp.shape, generator=torch.Generator().manual_seed(1))
    mean = returns[batch.mask].mean()

    def explained(values):
        return ppo.diagnostics(
            dataclasses.replace(batch, values=values),
            torch.zeros(24),
            torch.ones(24),
            returns,
            beta=0.1,
        )["explained"]

    assert explained(returns) == pytest.approx(1) and explained(
        mean.expand_as(returns)
    ) == pytest.approx(0, abs=1e-5)
    assert explained((returns + mean) / 2) == pytest.approx(
        0.75, abs=1e-4
    )  # half of every error is left: a quarter
