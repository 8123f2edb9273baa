"""Ratings from comparisons, the difference of two models on the same prompts, and the best of n samples. Numbers alone.

Elo is the Bradley-Terry model (Bradley and Terry 1952) on a scale where 400 points are odds of 10 to 1: i beats j with
probability 1 / (1 + 10^(-(elo_i - elo_j) / 400)). As in Bai et al. 2022, figures 2 and 3, only differences mean
anything, so the first player stands at 0. Ties count half a win for each side: a crowd that cannot tell flips a coin.

Shapes: S players (snapshots of a model), P prompts, R resamples. wins[i, j] is how often i was preferred to j.
"""

import math
from collections import Counter

import numpy as np

SCALE = 400 / math.log(10)  # Elo points in one nat of log-odds


def fit(wins, prior: float = 0.5) -> np.ndarray:
    """Maximum-likelihood ratings: wins (..., S, S), ties as a half on either side -> Elo (..., S), the first 0.

    prior: wins that every pair of players is given each way on top, half a win by default. Without them a player who
    won every game would be rated infinitely high; with them 240 wins of 240 read as odds of 240.5 to 0.5, and all
    ratings lie a little closer together than the record alone says. It may be 0 where every player has lost to, and
    won against, some other.
    Newton's method, all records of a batch at once. A step changes no difference of two ratings by more than a nat:
    within that the logistic loss stays close enough to its parabola that every step goes uphill (Bach 2010).
    """
    wins = np.array(wins, dtype=float)
    assert wins.ndim >= 2 and wins.shape[-1] == wins.shape[-2] and (wins >= 0).all(), wins.shape
    S = wins.shape[-1]
    other = ~np.eye(S, dtype=bool)
    wins = np.where(other, wins + prior, 0.0)
    games = wins + wins.swapaxes(-1, -2)
    rating = np.zeros(wins.shape[:-1])  # (..., S), nats
    for _ in range(200):
        p = 1 / (1 + np.exp(rating[..., None, :] - rating[..., :, None]))  # (..., S, S): i beats j
        slope = (wins - games * p).sum(-1)  # (..., S)
        bend = games * p * (1 - p)  # minus the second derivatives: of i and j, and below of i alone
        bend = np.where(other, -bend, bend.sum(-1, keepdims=True))
        step = np.zeros_like(rating)  # the first player stays where it is, so its row and column are left out
        step[..., 1:] = np.linalg.solve(bend[..., 1:, 1:], slope[..., 1:, None])[..., 0]
        reach = step.max(-1, keepdims=True) - step.min(-1, keepdims=True)
        rating += step / np.maximum(1, reach)
        if np.abs(step).max() < 1e-10:
            break
    return rating * SCALE


def contests(levels) -> np.ndarray:
    """How good each player's answer to each prompt is, levels (P, S) -> wins of each prompt (P, S, S); ties a half."""
    levels = np.asarray(levels)
    mine, theirs = levels[:, :, None], levels[:, None, :]
    return np.where(mine == theirs, 0.5, mine > theirs) * ~np.eye(levels.shape[1], dtype=bool)


def bootstrap(games, seed: int = 0, resamples: int = 1000, prior: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile intervals of the ratings over prompts: games (P, S, S) -> low (S,), high (S,).

    All comparisons of a prompt are drawn together: they share its difficulty, and drawing them one by one would make
    the intervals too short.
    """
    games = np.asarray(games, dtype=float)
    P, S = games.shape[:2]
    times = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), size=resamples)  # (R, P)
    some = fit((times @ games.reshape(P, S * S)).reshape(-1, S, S), prior)  # (R, S)
    low, high = np.percentile(some, [2.5, 97.5], axis=0)
    return low, high


def ratings(names, levels, seed: int = 0, resamples: int = 1000) -> dict:
    """levels (P, S), S as many as names -> {name: {"elo", "low", "high"}}, rounded to tenths of a point."""
    games = contests(levels)
    found, (low, high) = fit(games.sum(0)), bootstrap(games, seed, resamples)
    table = np.round([found, low, high], 1) + 0.0  # no -0.0
    return {name: dict(zip(("elo", "low", "high"), column)) for name, column in zip(names, table.T.tolist())}


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar 1947: prompts that only one of two models gets right fall either way like a coin."""
    n = only_a + only_b
    return min(1.0, sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) * 2 / 2 ** n)


def paired(a_hits, b_hits, seed: int = 0, resamples: int = 1000) -> dict:
    """Two models on the same prompts in the same order, a boolean each -> {"difference" of the rates a - b, "low" and
    "high" of its 95% bootstrap interval over prompts, "n", "only_a", "only_b", "p" (McNemar's, exact)}.

    Where the two never differ the interval is a point: a bootstrap cannot know of what it has not seen; see n.
    """
    a, b = [bool(x) for x in a_hits], [bool(x) for x in b_hits]
    assert len(a) == len(b), f"{len(a)} and {len(b)} prompts; a paired comparison takes the same ones"
    n = len(a)
    only_a, only_b = sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    found = {"difference": (only_a - only_b) / max(1, n), "low": -1.0, "high": 1.0, "n": n, "only_a": only_a,
             "only_b": only_b, "p": mcnemar(only_a, only_b)}
    if n:  # a resample is known by how many prompts of each of three sorts it drew
        share = np.array([only_a, only_b, n - only_a - only_b]) / n
        drawn = np.random.default_rng(seed).multinomial(n, share, size=resamples)  # (R, 3)
        low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
        found |= {"low": float(low), "high": float(high)}
    return found


def best_of(samples: list[dict], n: int) -> dict:
    """One prompt's samples (dicts with answer, score, complied, right) -> what the best of n by score is expected to
    be: {score, complied, right}, and `kl`, of the best to a single sample, in nats.

    Of N samples, worst first, that at place i is the best of n drawn without repeats with chance C(i, n-1) / C(N, n).
    So this is the mean over all subsets of n: unbiased, with far less noise than one draw of n (Nakano et al. 2021,
    appendix I). log n - (n-1)/n is the KL if no two samples are alike and a bound if some are (Beirami et al. 2024,
    2401.01879); kl takes the samples' own frequencies for the policy, and the bound where that is smaller.
    """
    order, N = sorted(samples, key=lambda s: s["score"]), len(samples)
    chance = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    q, p = Counter(), Counter(s["answer"] for s in order)
    for c, s in zip(chance, order):
        q[s["answer"]] += c
    kl = sum(x * math.log(x * N / p[a]) for a, x in q.items() if x > 0)
    return {name: sum(c * s[name] for c, s in zip(chance, order)) for name in ("score", "complied", "right")} | {
        "kl": min(kl, math.log(n) - (n - 1) / n)}


def table(found: dict) -> list[str]:
    """eval_elo.json as lines of text."""
    def cell(r):
        return f"{r['elo']:+.0f} [{r['low']:+.0f}, {r['high']:+.0f}]"

    rows = [f"  {name:10} {cell(found['harmlessness'][name]):>22} {cell(found['helpfulness'][name]):>22}"
            for name in found["snapshots"]]
    return [f"Elo by the oracle, {found['pairs']} comparisons; only differences count",
            f"  {'':10} {'harmlessness':>22} {'helpfulness':>22}", *rows]
