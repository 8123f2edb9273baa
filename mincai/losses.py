"""Every formula of training: pure functions of tensors, which know no model and no text.

Shapes: B rows, T time, R response tokens, V vocabulary. A mask is bool and True where a token
counts. What lies outside a mask is dropped, not multiplied by zero: even a NaN there changes no
loss and no metric.

Metrics are detached 0-d tensors. `total` is the number of tokens of the whole optimiser step: given
it, the losses and metrics of micro-batches are summed, not averaged, and give those of the big
batch. Averaging the micro-batches' own means would weigh a token in a short micro-batch more than
one in a long micro-batch.
"""

import torch
import torch.nn.functional as F

# The largest exponent of a log-ratio, nats: e^20 is 5e8. Sums of such ratios stay finite in
# float32, whose exp is inf from 89 on, and no policy that still learns comes near it.
LIMIT = 20.0


def gather_logp(logits, targets):
    """Log-probability of each target: logits (..., V), targets (...) long -> (...) float32.

    float32 whatever the logits are: a bfloat16 log-prob is off by per cents, and PPO exponentiates
    it.
    """
    logp = F.log_softmax(logits.float(), dim=-1)  # (..., V)
    return logp.gather(-1, targets[..., None]).squeeze(-1)  # (...)


def entropy(logits):
    """Entropy of softmax(logits) in nats: (..., V) -> (...) float32; a logit of -inf is probability
    0."""
    logp = F.log_softmax(logits.float(), dim=-1)
    p = logp.exp()
    return -torch.where(p == 0, 0.0, p * logp).sum(-1)  # 0 * log 0 = 0; a NaN stays one


def masked_sum(x, mask):
    """Sum of x where mask is True: a number, whatever x holds elsewhere."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x, mask):
    """Mean of x where mask is True; 0 when it is True nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x, mask):
    """x scaled to mean 0 and variance 1 over the mask; 0 elsewhere.

    Biased variance and eps 1e-8, as in Ziegler et al. 2019 (their code, `whiten`). Over all rows
    together: whitening each row by itself would make every row's advantages sum to 0 and so erase
    which answers were the good ones.
    """
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(var + 1e-8), 0.0)


# ---- supervised fine-tuning ----------------------------------------------------------------------


def sft_loss(logits, targets, weight, total=None):
    """Weighted next-token cross-entropy in nats per token.

    logits (B, T, V) at the positions before the targets (B, T); weight (B, T) bool or float, 0 for
    what is not learned (prompt, padding). Returns sum(weight * nll) / total, by default total =
    weight.sum(), and {loss, accuracy (share of targets that are the likeliest token), tokens (sum
    of weights here)}.
    """
    weight = weight.float()
    total = weight.sum().clamp(min=1e-8) if total is None else total
    nll = -gather_logp(logits, targets)  # (B, T)
    loss = masked_sum(weight * nll, weight > 0) / total
    with torch.no_grad():
        hit = (logits.argmax(-1) == targets).float()
        accuracy = (weight * hit).sum() / total
    return loss, {"loss": loss.detach(), "accuracy": accuracy, "tokens": weight.sum()}


# ---- preference model ----------------------------------------------------------------------------


def preference_loss(score_a, score_b, p_a):
    """Bradley-Terry with a soft target; score_a, score_b, p_a (B,), p_a = P(a is the better
    answer).

    -[p log s(d) + (1-p) log s(-d)], d = score_a - score_b, s = sigmoid: the pairwise loss of
    Stiennon et al. 2020 with the label of Bai et al. 2022 for p. The minimum is at d = logit(p):
    labels clamped to 0.4..0.6 ask for gaps of at most 0.405. logsigmoid, because log(sigmoid(d)) is
    -inf below d = -89. Returns the mean over rows and {loss, accuracy (sign of d agrees with p_a; a
    tie on either side counts one half), margin (mean of d in the direction of the label)}.
    """
    d = score_a - score_b  # (B,)
    loss = -(p_a * F.logsigmoid(d) + (1 - p_a) * F.logsigmoid(-d)).mean()
    with torch.no_grad():
        side = torch.sign(p_a - 0.5)
        accuracy = (torch.sign(d) * side + 1).mean() / 2
        margin = (d * side).mean()
    return loss, {"loss": loss.detach(), "accuracy": accuracy, "margin": margin}


def calibration_error(prob, label, bins=10):
    """Expected calibration error of probabilities (N,) against labels (N,), soft or 0 and 1: the
    gap between the mean of either in each of `bins` equal bins, weighted by how many fall there
    (Naeini et al. 2015). A float."""
    which = (prob * bins).long().clamp(max=bins - 1)
    count = torch.bincount(which, minlength=bins).clamp(min=1)
    gaps = torch.zeros(bins).index_add_(0, which, (prob - label).float()) / count
    return float(gaps.abs()[which].mean())


# ---- KL(policy || reference) from samples; Schulman 2020, "Approximating KL divergence" ----------


def kl_k1(logp, ref_logp):
    """logp - ref_logp: unbiased, may be negative. For the reward: its policy gradient is the KL's
    own."""
    return logp - ref_logp


def kl_k2(logp, ref_logp):
    """(logp - ref_logp)^2 / 2: biased, small variance. For a loss term: its gradient is the KL's
    own."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp, ref_logp):
    """exp(-d) - 1 + d with d = logp - ref_logp: unbiased, never negative, small variance. For logs.

    With d the other way round it estimates something else: E[exp(d) - 1 - d] is not KL(policy ||
    reference). The exponent is held at LIMIT.
    """
    d = logp - ref_logp
    return torch.expm1((-d).clamp(max=LIMIT)) + d


def exact_kl(logits, ref_logits):
    """KL(policy || reference) over the whole vocabulary, in nats: two (..., V) -> (...) float32."""
    logp = F.log_softmax(logits.float(), dim=-1)
    ref_logp = F.log_softmax(ref_logits.float(), dim=-1)
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * (logp - ref_logp)).sum(-1)


# ---- PPO -----------------------------------------------------------------------------------------


def beyond(logp, other_logp, mask):
    """How many tokens in the mask have a log-ratio outside +-LIMIT, or none because it is NaN."""
    return (mask & ~((logp - other_logp).abs() <= LIMIT)).sum()


def ratios(logp, old_logp, mask):
    """Probability ratios exp(logp - old_logp), the exponent held within +-LIMIT; 1 outside the
    mask."""
    return torch.where(mask, logp - old_logp, 0.0).clamp(-LIMIT, LIMIT).exp()


def token_rewards(score, logp, ref_logp, mask, beta):
    """Reward of each response token (B, R): -beta * k1, plus the row's score at its last real
    token.

    score (B,); logp, ref_logp, mask (B, R). Ziegler et al. 2019, eq. 2. The score sits on the stop
    token itself, which is an action like any other; 0 outside the mask.
    """
    reward = torch.where(mask, -beta * kl_k1(logp, ref_logp), 0.0)  # (B, R)
    # True once in each row that has a token
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return reward + torch.where(last, score[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> advantages, returns,
    detached.

    All (B, R), the mask one unbroken run of True from the left. The value after a row's last token
    is 0, for nothing comes after the stop token. returns = advantages + values: take them before
    whitening.
    """
    rewards = torch.where(mask, rewards, 0.0).detach()
    values = torch.where(mask, values, 0.0).detach()  # so the token after the last has value 0
    advantages = torch.zeros_like(values)
    next_value = next_adv = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_adv = delta + gamma * lam * next_adv
        next_value = values[:, t]
        advantages[:, t] = next_adv
    return advantages, advantages + values


def policy_loss(logp, old_logp, adv, mask, clip, total=None):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated; all tensors (B, R).

    Returns sum / total over the mask and {loss, ratio (mean), approx_kl (k2 between old and new
    policy), clipfrac (share of tokens whose gradient the clip cuts off)}. With unchanged weights:
    ratio 1, approx_kl 0, clipfrac 0, exactly. A ratio beyond e^LIMIT counts as that and has no
    gradient.
    """
    total = mask.sum().clamp(min=1) if total is None else total
    ratio = ratios(logp, old_logp, mask)
    plain, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_sum(torch.maximum(plain, clipped), mask) / total
    with torch.no_grad():
        metrics = {
            "loss": loss.detach(),
            "ratio": masked_sum(ratio, mask) / total,
            "approx_kl": masked_sum(kl_k2(logp, old_logp), mask) / total,
            "clipfrac": masked_sum((clipped > plain).float(), mask) / total,
        }
    return loss, metrics


def value_loss(values, old_values, returns, mask, clip, total=None):
    """Half the squared error, with the new value held within `clip` of the old one; all tensors (B,
    R).

    0.5 * max((v - R)^2, (v_clipped - R)^2), as in Ziegler et al. 2019 (their code). Returns sum /
    total over the mask and {loss, error (squared error without the clip), clipfrac}.
    """
    total = mask.sum().clamp(min=1) if total is None else total
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    # The value itself, to the bit, where it is near
    held = values.clamp(old_values - clip, old_values + clip)
    plain, clipped = (values - returns) ** 2, (held - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(plain, clipped), mask) / total
    with torch.no_grad():
        metrics = {
            "loss": loss.detach(),
            "error": masked_sum(plain, mask) / total,
            "clipfrac": masked_sum((clipped > plain).float(), mask) / total,
        }
    return loss, metrics
