"""How a training went: what a preference model's scores say of pairs that it was not trained on,
the samples of PPO that are printed, and warnings of what should never be seen.
"""

import torch

from mincai.losses import calibration_error, kl_k1, preference_loss
from mincai.plumbing.logprobs import pair_scores


@torch.no_grad()
def all_scores(pm, pairs, batch_size):
    """Scores (N,) of (A) and (N,) of (B), on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: max(len(pairs[i].a), len(pairs[i].b)))
    a, b = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        score_a, score_b = pair_scores(pm, [pairs[j] for j in rows])
        a[rows], b[rows] = score_a.cpu(), score_b.cpu()
    return a, b


def correlation(x, y):
    """Pearson's r; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return float(x @ y / scale) if scale > 0 else 0.0


def measure_pairs(pm, pairs, batch_size) -> dict:
    """What the scores say of these pairs, against the judge's labels as they are."""
    a, b = all_scores(pm, pairs, batch_size)
    p_a = torch.tensor([p.p_a for p in pairs])
    loss, _ = preference_loss(a, b, p_a)
    sure = p_a != 0.5  # of an even label neither answer is the right one
    right = (1 + (a - b).sign() * (p_a - 0.5).sign())[sure] / 2  # equal scores are half right
    # the baselines that need no model
    gap = torch.tensor([float(len(p.a) - len(p.b)) for p in pairs])
    shorter = torch.where(gap == 0, 0.5, ((gap < 0) == (p_a > 0.5)).float())[sure]
    accuracy, short = (float(x.mean()) if sure.any() else 0.5 for x in (right, shorter))
    lengths = torch.tensor([float(len(ids) - p.start) for p in pairs for ids in (p.a, p.b)])
    entropy = -(torch.xlogy(p_a, p_a) + torch.xlogy(1 - p_a, 1 - p_a)).mean()
    return {
        "loss": float(loss),
        "loss_floor": float(entropy),  # no score can do better on soft labels
        "accuracy": accuracy,
        "shorter": short,
        "longer": 1 - short if sure.any() else 0.5,
        "calibration_error": calibration_error(torch.sigmoid(a - b), p_a),
        "length_correlation": correlation(torch.stack([a, b], 1).flatten(), lengths),
    }


def examples(batch, scores, beta, decode) -> list[dict]:
    """Three answers of the batch as rows, for samples are the debugger. decode: ids to text."""
    k1 = torch.where(batch.mask, kl_k1(batch.logp, batch.ref_logp), 0.0).sum(1)
    rows = []
    for i in torch.linspace(0, len(scores) - 1, min(3, len(scores))).long().tolist():
        prompt, answer = batch.ids[i].split([batch.start, len(batch.ids[i]) - batch.start])
        prompt = decode(prompt[batch.valid[i, : batch.start]].tolist())
        row = {"prompt": prompt, "answer": decode(answer[batch.mask[i]].tolist())}
        row |= {"score": float(scores[i]), "kl": float(k1[i])}
        rows.append(row | {"total": float(scores[i] - beta * k1[i])})
    return rows


def show_samples(rows: list[dict]) -> list[str]:
    numbers = "  score {score:+.2f}  kl {kl:+.2f}  total {total:+.2f}  | "
    texts = [f"{row['prompt']}{row['answer']}".replace("\n", " / ") for row in rows]
    return [numbers.format(**row) + text for row, text in zip(rows, texts)]


MOST_KL = 15  # nats an answer; the policies that were worth keeping stayed well below
LEAST_ENTROPY = 0.1  # of the first update's
MOST_FALL = 0.1  # of the quality that is watched, a share
LEAST_GAIN = 0.1  # of the score, in deviations


def warnings(log: list[dict], gap: float = 1e-3) -> list[str]:
    """Lines about the last update of PPO's log: where two parts of the code disagree, and where the
    policy goes wrong. A NaN is never fine. gap: how far sampled log-probs may be off; rounding in
    float32 stays below 1e-4, in bfloat16 it reaches 0.1."""
    lines, updates = [], [row for row in log if "score" in row]
    first, row, negative = updates[0], updates[-1], 0
    for past in reversed(updates):
        if past["kl"] >= -0.05 or past["kl_k3"] <= 1e-6:  # a NaN goes on
            break
        negative += 1
    if negative >= 3:
        told = f"KL to the reference is negative for {negative} updates ({row['kl']:.3f})"
        lines.append(f"{told}: answers are not drawn from the distribution that is scored")
    if not row["sampling_gap"] <= gap:
        lines.append(f"sampled log-probs are {row['sampling_gap']:.3f} off those of one forward")
    if not row["first_ratio_error"] <= 1e-3:
        lines.append(f"the first minibatch's ratio is off 1 by {row['first_ratio_error']:.4f}")
    if row["ratios_beyond"]:
        told = f"{row['ratios_beyond']} tokens became e^20 times likelier or less likely"
        lines.append(f"{told} within one update; lower --lr")
    if not row["score_std"] > 1e-6:
        told = "there is nothing to learn from; look at the preference model"
        lines.append(f"all answers have the same score: {told}")
    advice = "raise --beta or lower --lr"
    if not row["kl_exact"] <= MOST_KL:
        told = f"KL to the reference is {row['kl_exact']:.1f} nats an answer: the policy leaves"
        lines.append(f"{told} what the preference model can judge; {advice}")
    if not row["entropy"] >= LEAST_ENTROPY * first["entropy"]:
        told = f"entropy fell from {first['entropy']:.3f} to {row['entropy']:.3f} nats a token"
        lines.append(f"{told}: the policy says the same to everything; {advice}")
    quality = [past["dev_quality"] for past in log if "dev_quality" in past]
    fell = "dev_quality" in row and not quality[-1] >= quality[0] - MOST_FALL
    if fell and not row["score"] <= first["score"]:
        rise = f"the score rises ({first['score']:+.2f} to {row['score']:+.2f})"
        fall = f"the quality of answers falls ({quality[0]:.3f} to {quality[-1]:.3f})"
        told = f"{rise} while {fall}: the preference model is exploited"
        lines.append(f"{told}; raise --beta, or stop earlier (--updates)")
    return lines


def nothing_learnt(gain: float) -> list[str]:
    """A line when a whole run moved the score by less than LEAST_GAIN deviations, or lowered it."""
    told = f"the score moved by {gain:+.2f} deviations in the whole run: nothing was learnt"
    return [] if gain >= LEAST_GAIN else [f"{told}; raise --lr or --updates, or lower --beta"]
