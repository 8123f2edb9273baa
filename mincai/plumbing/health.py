"""PPO's log: the samples that are printed, and warnings of what should never be seen."""

def show_samples(rows: list[dict]) -> list[str]:
    return [f"  score {row['score']:+.2f}  kl {row['kl']:+.2f}  total {row['total']:+.2f}  | "
            f"{row['prompt']}{row['answer']}".replace("\n", " / ") for row in rows]


MOST_KL = 15         # nats an answer; the policies that were worth keeping stayed well below
LEAST_ENTROPY = 0.1  # of the first update's
MOST_FALL = 0.1      # of the quality that is watched, a share
LEAST_GAIN = 0.1     # of the score, in deviations


def warnings(log: list[dict], gap: float = 1e-3) -> list[str]:
    """Lines about the last update of PPO's log: where two parts of the code disagree, and where the
    policy goes wrong. A NaN is never fine.

    gap: how far sampled log-probs may be off; rounding in float32 stays below 1e-4, in bfloat16 it reaches 0.1.
    """
    lines, updates = [], [row for row in log if "score" in row]
    first, row, negative = updates[0], updates[-1], 0
    for past in reversed(updates):
        if past["kl"] >= -0.05 or past["kl_k3"] <= 1e-6:  # a NaN goes on
            break
        negative += 1
    if negative >= 3:
        lines.append(f"KL to the reference is negative for {negative} updates ({row['kl']:.3f}): "
                     "answers are not drawn from the distribution that is scored")
    if not row["sampling_gap"] <= gap:
        lines.append(f"sampled log-probs are {row['sampling_gap']:.3f} off those of one forward")
    if not row["first_ratio_error"] <= 1e-3:
        lines.append(f"the first minibatch's ratio is off 1 by {row['first_ratio_error']:.4f}")
    if row["ratios_beyond"]:
        lines.append(f"{row['ratios_beyond']} tokens became e^20 times likelier or less likely within "
                     f"one update; lower --lr")
    if not row["kl_exact"] <= MOST_KL:
        lines.append(f"KL to the reference is {row['kl_exact']:.1f} nats an answer: the policy leaves "
                     f"what the preference model can judge; raise --beta or lower --lr")
    if not row["entropy"] >= LEAST_ENTROPY * first["entropy"]:
        lines.append(f"entropy fell from {first['entropy']:.3f} to {row['entropy']:.3f} nats a token: "
                     f"the policy says the same to everything; raise --beta or lower --lr")
    quality = [past["dev_quality"] for past in log if "dev_quality" in past]
    if "dev_quality" in row and not quality[-1] >= quality[0] - MOST_FALL and not (
            row["score"] <= first["score"]):
        lines.append(f"the score rises ({first['score']:+.2f} to {row['score']:+.2f}) while the quality of "
                     f"answers falls ({quality[0]:.3f} to {quality[-1]:.3f}): the preference model is "
                     f"exploited; raise --beta, or stop earlier (--updates)")
    return [f"  WARNING: {line}" for line in lines]


def nothing_learnt(gain: float) -> list[str]:
    """A line when a whole run moved the score by less than LEAST_GAIN deviations, or lowered it."""
    if gain >= LEAST_GAIN:
        return []
    return [f"  WARNING: the score moved by {gain:+.2f} deviations in the whole run: nothing was learnt; raise "
            f"--lr or --updates, or lower --beta"]
