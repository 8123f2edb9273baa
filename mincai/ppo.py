"""PPO for a language model: rollout, score, advantages, update - four functions around one record
of tensors.

Schulman et al. 2017 (clipped surrogate), Ziegler et al. 2019 (KL to the reference inside the
reward), Bai et al. 2022 (a preference model trained on AI labels as the score). Knows models and
tensors, no text: any function score_fn(ids (B, T), valid (B, T), start) -> (B,) can take the
preference model's place.

Shapes: B rows, P prompt columns (padded on the left), R response columns (padded on the right), T =
P + R. The response starts in one column for all rows, so a shift by one is a slice for the whole
batch:

    column          0     1    ..   P-1  |   P     P+1   ..   T-1
    ids            pad  prompt ..   ":"  |  act0   act1  ..   stop       (then padding)
    model reads   [0 ............................ T-2]                   ids[:, :-1]
    it predicts                     act0    act1   ..    stop            hidden[:, P-1:] (B, R, C)

The value of column t is read at the same place as its log-prob: what is expected before act t is
known. The stop token is an action: it has a log-prob, a value and, being last, the score; what
comes after it has value 0.

NOTE The first epoch goes through the rows in their order and in the very slices that the old
log-probs were computed in, because sums of other slices round differently: so the first minibatch
has ratio 1 exactly. Rows are drawn at random anyway. Later epochs shuffle.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from mincai import Diverged, losses
from mincai.losses import masked_mean
from mincai.model import attention_mask, positions_of
from mincai.plumbing import distributed, optim, workers
from mincai.plumbing.logprobs import row_scores
from mincai.sample import generate, left_pad

# Of a minibatch's tokens: one in a hundred is no rare event, and nothing useful is learnt
MOST_BEYOND = 0.01
LARGEST = ("ratio_max", "ratio_error")  # of micro-batches these do not add up


@dataclass(frozen=True)
class Rollout:
    """A batch of answers and what the models made of them before learning. Only the mask counts."""

    ids: torch.Tensor  # (B, T) long, prompt and response
    valid: torch.Tensor  # (B, T) bool, True at real tokens
    start: int  # P: the column of the first response token
    mask: torch.Tensor  # (B, R) bool, True up to and including the stop token
    logp: torch.Tensor  # (B, R) of the policy that sampled
    ref_logp: torch.Tensor  # (B, R) of the reference
    values: torch.Tensor  # (B, R) of the critic
    entropy: torch.Tensor  # (B, R) of the policy's distribution, nats
    kl: torch.Tensor  # (B, R) KL(policy || reference) over the whole vocabulary, nats
    sampling_gap: float  # largest |log-prob while sampling - in one forward|, the same number twice


def response_logits(model, ids, valid, start):
    """Logits (B, R, V) that predict the response columns; no other column meets the vocabulary."""
    seen = valid[:, :-1]
    hidden = model(ids[:, :-1], positions_of(seen), attention_mask(seen), start=start - 1)
    return distributed.bare(model).unembed(hidden)  # of (B, R, C)


def response_values(critic, ids, valid, start):
    """The critic's values (B, R) before each response token."""
    seen = valid[:, :-1]
    return critic(ids[:, :-1], positions_of(seen), attention_mask(seen), start=start - 1)


@torch.no_grad()
def rollout(policy, ref, critic, prompts, *, max_new, stop, micro_batch, generator) -> Rollout:
    """Sample one answer per prompt (lists of ids) at temperature 1 and record what PPO needs of it.

    The log-probs come from one forward over the finished rows, by the function that `update` uses,
    not from the sampler's cache: those are equal in exact arithmetic, these to the last bit. Of
    several processes each does every world-th row, with the random numbers that the row would have
    had alone; all get all rows.
    """
    uniforms = torch.rand(len(prompts), max_new, generator=generator, device=generator.device)
    mine = distributed.share(list(range(len(prompts))))
    sampler = distributed.bare(policy)
    samples = generate(sampler, [prompts[i] for i in mine], max_new, stop, uniforms=uniforms[mine])
    prompt_ids, prompt_valid = left_pad(prompts, device=sampler.device)
    R = max(distributed.merge([samples.ids.shape[1]]))
    answers, mask, sampled_logp = (
        F.pad(x, (0, R - x.shape[1])) for x in (samples.ids, samples.mask, samples.logp)
    )
    ids = torch.cat([prompt_ids[mine], answers], 1)  # (B, T)
    valid = torch.cat([prompt_valid[mine], mask], 1)
    start, parts = prompt_ids.shape[1], []
    for i in range(0, len(ids), micro_batch):
        mb = ids[i : i + micro_batch], valid[i : i + micro_batch], start
        logits, ref_logits, values = workers.beside(
            sampler,
            partial(response_logits, policy, *mb),
            partial(response_logits, ref, *mb),
            partial(response_values, critic, *mb),
        )
        actions = mb[0][:, start:]
        logps = losses.gather_logp(logits, actions), losses.gather_logp(ref_logits, actions)
        more = losses.entropy(logits), losses.exact_kl(logits, ref_logits)
        parts.append((*logps, values, *more))
    logp, ref_logp, values, entropy, kl = (torch.cat(part) for part in zip(*parts))  # (B, R) each
    gap = torch.where(mask, sampled_logp - logp, 0.0).abs().max()
    rows = map(distributed.gather_rows, (ids, valid, mask, logp, ref_logp, values, entropy, kl))
    ids, valid, *rows = rows
    return Rollout(ids, valid, start, *rows, max(distributed.merge([float(gap)])))


def preference_score(pm, micro_batch):
    """A score_fn of a preference model: its score at each row's last real token."""

    def score_fn(ids, valid, start):
        rows = [row[real].tolist() for row, real in zip(ids.cpu(), valid.cpu())]
        return row_scores(pm, rows, micro_batch).to(ids.device)

    return score_fn


def score(batch: Rollout, score_fn, *, stop, missing_eos_penalty):
    """Scores (B,), and ended (B,) bool: whether the answer stopped by itself within its room.

    An answer that was cut off loses missing_eos_penalty: the preference model has read only answers
    that end (Ziegler et al. replace the score by a constant; a subtraction still ranks the cut
    answers). Diverged where a score is no finite number.
    """
    mine = distributed.share(list(range(len(batch.ids))))
    scores = score_fn(batch.ids[mine], batch.valid[mine], batch.start).float()
    scores = distributed.gather_rows(scores)
    assert scores.shape == batch.ids.shape[:1], f"{tuple(scores.shape)} for {len(batch.ids)} rows"
    if not torch.isfinite(scores).all():
        raise Diverged("an answer's score is no finite number; look at the preference model")
    stops = torch.tensor(sorted(stop), device=batch.ids.device)
    ended = (torch.isin(batch.ids[:, batch.start :], stops) & batch.mask).any(1)  # (B,)
    return scores - missing_eos_penalty * (~ended).float(), ended


def advantages(batch: Rollout, scores, *, beta, gamma, lam):
    """Advantages (B, R), whitened over all real tokens of the batch, and returns (B, R), which are
    not."""
    rewards = losses.token_rewards(scores, batch.logp, batch.ref_logp, batch.mask, beta)
    adv, returns = losses.gae(rewards, batch.values, batch.mask, gamma, lam)
    return losses.masked_whiten(adv, batch.mask), returns


@dataclass(frozen=True)
class Learner:
    """A network, wrapped or not, and the optimiser that moves it."""

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Steps:
    """How a rollout is learnt from.

    precision makes the context that forward passes run in. It is entered anew for every one,
    because autocast keeps its 16-bit copies of the weights until its context ends, and an optimiser
    step does not renew them.
    """

    epochs: int
    minibatches: int  # optimiser steps in an epoch
    micro_batch: int  # rows in one forward pass
    clip: float  # how far from 1 the probability ratio is still rewarded
    value_clip: float  # how far a value may move, in deviations of the score
    max_norm: float = optim.MAX_NORM  # largest norm of each gradient
    train_policy: bool = True  # False: the critic alone learns
    precision: Callable = nullcontext


def orders(rows: int, epochs: int, generator):
    """The order of the rows in each epoch: as they are in the first, see the note above."""
    for epoch in range(epochs):
        yield torch.arange(rows) if epoch == 0 else torch.randperm(rows, generator=generator)


def update(
    policy: Learner, critic: Learner, batch: Rollout, adv, returns, how: Steps, generator
) -> dict:
    """Several epochs of clipped steps on one rollout, the two networks apart; returns metrics
    (floats).

    A minibatch is one optimiser step; it is cut into micro-batches whose losses are divided by the
    minibatch's count of real tokens, so they add up to it exactly. Of several processes each does
    its own rows of every minibatch, and the gradients add up.

    ratios_beyond counts the tokens, of all minibatches, whose log-ratio is outside +-losses.LIMIT.
    Diverged, and no step, where they are more than MOST_BEYOND of a minibatch, or where a loss or
    a gradient is no finite number.
    """
    B, rank, world = len(batch.ids), distributed.rank(), distributed.world()
    assert B % how.minibatches == 0, (B, how.minibatches)
    steps, norms = [], {}
    learners = {"critic_grad_norm": (critic, "--critic-lr"), "grad_norm": (policy, "--lr")}
    if not how.train_policy:
        del learners["grad_norm"]
    for order in orders(B, how.epochs, generator):
        for rows in order.view(how.minibatches, -1):
            for learner in (policy, critic):
                learner.optimizer.zero_grad(set_to_none=True)
            total, parts = batch.mask[rows].sum(), []
            slices = rows[rank::world].split(how.micro_batch)
            for k, mb_rows in enumerate(slices):
                part = Part(batch, mb_rows, total, last=k == len(slices) - 1)
                vf, pg = workers.beside(
                    distributed.bare(policy.net),
                    partial(_add_value_gradient, critic.net, part, returns, how),
                    partial(_add_policy_gradient, policy.net, part, adv, how),
                )
                parts.append(vf | pg)
            whole = {"tokens": total}
            for name, (learner, _) in learners.items():
                whole[name] = torch.nn.utils.clip_grad_norm_(learner.net.parameters(), how.max_norm)
            *parts, whole = _numbers([*parts, whole])
            parts = distributed.merge(parts)
            step = {
                name: (max if name in LARGEST else sum)(part[name] for part in parts)
                for name in parts[0]
            }
            steps.append(step)
            place = f"minibatch {len(steps)} of {how.epochs * how.minibatches}"
            if step["ratios_beyond"] > MOST_BEYOND * whole["tokens"]:
                raise Diverged(
                    f"{place}: {step['ratios_beyond']:.0f} of its {whole['tokens']:.0f} tokens are more than "
                    f"e^{losses.LIMIT:g} times likelier, or less likely, than when they were sampled: the "
                    f"policy has run away; lower --lr or --epochs, or raise --beta"
                )
            _check_finite(step["pg_loss"], f"{place}: pg_loss", "--lr")
            _check_finite(step["vf_loss"], f"{place}: vf_loss", "--critic-lr")
            for name, (_, flag) in learners.items():
                norms[name] = whole[name]
                _check_finite(norms[name], f"{place}: {name}", flag)
            for learner, _ in learners.values():
                learner.optimizer.step()
    for learner in (policy, critic):
        learner.optimizer.zero_grad(set_to_none=True)
    names = [name for name in steps[0] if name not in LARGEST]
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in names}
    metrics["ratios_beyond"] = sum(step["ratios_beyond"] for step in steps)
    metrics["ratio_max"] = max(step["ratio_max"] for step in steps)
    metrics |= {f"first_{name}": steps[0][name] for name in ("approxkl", "clipfrac", "ratio_error")}
    return {**metrics, "grad_norm": 0.0, **norms}


def _numbers(found: list[dict]) -> list[dict]:
    """Dicts of 0-d tensors with Python's numbers in them; the host waits for the device once."""
    numbers = iter(torch.stack([x.double() for some in found for x in some.values()]).tolist())
    return [{name: next(numbers) for name in some} for some in found]


def _check_finite(number, name, flags):
    """Diverged for an infinity or a NaN, before a step carries it into the weights."""
    if not math.isfinite(number):
        raise Diverged(f"{name} is {number}; look at the scores and lower {flags}")


class Part:
    """A micro-batch: these rows of a rollout. Without a row of its own a process takes part in
    summing gradients with one that does not count."""

    def __init__(self, batch: Rollout, rows, total, last: bool):
        empty = len(rows) == 0
        self.rows = torch.zeros(1, dtype=torch.long) if empty else rows
        self.ids, self.valid = batch.ids[self.rows], batch.valid[self.rows]
        self.mask = batch.mask[self.rows] & (not empty)
        self.logp, self.values = batch.logp[self.rows], batch.values[self.rows]  # the old ones
        self.start, self.total, self.last = batch.start, total, last


def _add_value_gradient(critic, mb: Part, returns, how: Steps) -> dict:
    """The critic's share of the minibatch's metrics."""
    with distributed.no_sync(critic, mb.last):
        with how.precision():
            values = response_values(critic, mb.ids, mb.valid, mb.start)  # (b, R)
        loss, vf = losses.value_loss(
            values, mb.values, returns[mb.rows], mb.mask, how.value_clip, mb.total
        )
        (loss * distributed.world()).backward()
    return {"vf_loss": vf["loss"], "vf_clipfrac": vf["clipfrac"]}


def _add_policy_gradient(policy, mb: Part, adv, how: Steps) -> dict:
    """The policy's share of the minibatch's metrics."""
    with torch.set_grad_enabled(how.train_policy), distributed.no_sync(policy, mb.last):
        with how.precision():
            logits = response_logits(policy, mb.ids, mb.valid, mb.start)  # (b, R, V)
        logp = losses.gather_logp(logits, mb.ids[:, mb.start :])  # (b, R)
        loss, pg = losses.policy_loss(logp, mb.logp, adv[mb.rows], mb.mask, how.clip, mb.total)
        if how.train_policy:
            (loss * distributed.world()).backward()
    ratio = losses.ratios(logp.detach(), mb.logp, mb.mask)
    found = {"pg_loss": pg["loss"], "approxkl": pg["approx_kl"], "clipfrac": pg["clipfrac"]}
    found |= {"ratio_mean": pg["ratio"], "ratios_beyond": losses.beyond(logp, mb.logp, mb.mask)}
    return found | {"ratio_max": ratio.max(), "ratio_error": (ratio - 1).abs().max()}


def diagnostics(batch: Rollout, scores, ended, returns, *, beta) -> dict:
    """What the rollout says of policy, reward and critic; every mean over tokens is masked. KLs in
    nats.

    kl is the sum over an answer of k1, what the reward is charged; kl_k3 and kl_exact are the same
    quantity estimated with less noise, and summed over the whole vocabulary at each token. All are
    0 while policy and reference are the same. kl_beyond counts the tokens whose log-ratio to the
    reference is outside +-losses.LIMIT, where kl_k3 is held.
    """
    mask = batch.mask
    k1 = torch.where(mask, losses.kl_k1(batch.logp, batch.ref_logp), 0.0).sum(1)  # (B,)
    k3 = torch.where(mask, losses.kl_k3(batch.logp, batch.ref_logp), 0.0).sum(1)
    exact = torch.where(mask, batch.kl, 0.0).sum(1)
    mean = masked_mean(returns, mask)
    variance = masked_mean((returns - mean) ** 2, mask)
    error = masked_mean((returns - batch.values) ** 2, mask)
    numbers = {
        "score": scores.mean(),
        "score_std": scores.std(unbiased=False),
        "kl": k1.mean(),
        "kl_k3": k3.mean(),
        "kl_exact": exact.mean(),
        "kl_beyond": losses.beyond(batch.logp, batch.ref_logp, mask),
        "kl_token": masked_mean(batch.kl, mask),
        "beta": beta,
        "non_score_reward": -beta * k1.mean(),
        "total": (scores - beta * k1).mean(),
        "entropy": masked_mean(batch.entropy, mask),
        "length": mask.sum(1).float().mean(),
        "eos": ended.float().mean(),
        "returns_mean": mean,
        "returns_var": variance,
        "values_mean": masked_mean(batch.values, mask),
        "explained": 1 - error / variance.clamp(min=1e-8),
        "sampling_gap": batch.sampling_gap,
    }
    return {name: float(number) for name, number in numbers.items()}
