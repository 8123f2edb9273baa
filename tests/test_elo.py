"""Ratings against a search that knows no calculus and records whose answer is known; best of n against every subset."""

import math
from itertools import combinations

import numpy as np
import pytest

from mincai import elo


def log_likelihood(wins, rating):
    """By the definition, pair by pair; the half win of the prior is in `wins` already."""
    total = 0.0
    for i, row in enumerate(wins):
        for j, w in enumerate(row):
            if i != j:
                total -= w * math.log(1 + 10 ** (-(rating[i] - rating[j]) / 400))
    return total


def search(wins):
    """The best ratings by trying every coordinate up and down in ever smaller steps."""
    rating, step = [0.0] * len(wins), 400.0
    best = log_likelihood(wins, rating)
    while step > 1e-4:
        moved = False
        for i in range(1, len(rating)):
            for d in (step, -step):
                other = rating[:i] + [rating[i] + d] + rating[i + 1:]
                value = log_likelihood(wins, other)
                if value > best + 1e-12:
                    rating, best, moved = other, value, True
        step = step if moved else step / 2
    return rating


def test_equal_records_are_rated_alike():
    assert elo.fit(np.full((4, 4), 7.5)) == pytest.approx(np.zeros(4), abs=1e-9)
    cycle = [[0, 5, 1], [1, 0, 5], [5, 1, 0]]  # each beats the next
    assert elo.fit(cycle) == pytest.approx(np.zeros(3), abs=1e-9)


@pytest.mark.parametrize("wins", [
    [[0, 3, 10], [7, 0, 6.5], [2, 1.5, 0]],
    [[0, 0, 0], [20, 0, 9], [20, 11, 0]],  # the first loses everything
    [[0, 1, 0, 4], [30, 0, 2, 0], [0, 5, 0, 3.5], [1, 0, 0.5, 0]],  # not all have met
])
def test_fit_is_the_maximum_likelihood(wins):
    wins = np.array(wins, dtype=float)
    found = elo.fit(wins)
    assert found[0] == 0 and found == pytest.approx(search(wins + 0.5), abs=0.05)


def test_two_players_by_hand():
    """75 of 100 with half a win each way: odds of 75.5 to 25.5."""
    assert elo.fit([[0, 25], [75, 0]])[1] == pytest.approx(400 * math.log10(75.5 / 25.5), abs=1e-6)
    assert elo.fit([[0, 25], [75, 0]], prior=0)[1] == pytest.approx(400 * math.log10(3), abs=1e-6)
    perfect = elo.fit([[0, 0], [240, 0]])[1]
    assert perfect == pytest.approx(400 * math.log10(240.5 / 0.5), abs=1e-6)  # high, and finite


def test_ratings_that_made_the_wins_are_recovered():
    true = np.array([0.0, 120.0, -80.0, 400.0, 900.0])
    p = 1 / (1 + 10 ** (-(true[:, None] - true[None, :]) / 400))
    assert elo.fit(1e7 * p) == pytest.approx(true, abs=0.01)
    assert elo.fit(300 * p, prior=0) == pytest.approx(true, abs=1e-6)  # expected wins: exactly


def test_a_batch_is_fitted_as_one_by_one():
    wins = np.random.default_rng(0).integers(0, 30, (5, 4, 4)).astype(float)
    wins[0, 1:, 0] = 5000  # needs many more steps than the others
    wins[0, 0] = 0
    assert elo.fit(wins) == pytest.approx(np.stack([elo.fit(w) for w in wins]), abs=1e-5)
    assert elo.fit(np.zeros((1, 1))).tolist() == [0.0]


def test_contests_by_hand():
    assert elo.contests([[2, 0, 2]]).tolist() == [[[0, 1, .5], [0, 0, 0], [.5, 1, 0]]]
    assert elo.contests([[1, 0], [0, 1], [1, 1]]).sum(0).tolist() == [[0, 1.5], [1.5, 0]]


def test_the_bootstrap_of_two_players_against_resampling_by_hand():
    rng = np.random.default_rng(3)
    levels = np.stack([rng.integers(0, 2, 60), rng.integers(0, 3, 60)], 1)
    low, high = elo.bootstrap(elo.contests(levels), seed=1, resamples=4000)
    score = elo.contests(levels)[:, 1, 0]
    found = []
    for _ in range(4000):
        w = rng.choice(score, 60).sum()
        found.append(400 * math.log10((w + 0.5) / (60 - w + 0.5)))
    assert low[0] == high[0] == 0
    assert (low[1], high[1]) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])), abs=8)


def test_the_interval_shrinks_with_the_root_of_the_prompts():
    rng = np.random.default_rng(5)
    levels = np.stack([rng.random(50) < 0.4, rng.random(50) < 0.6], 1)
    widths = []
    for times in (1, 16):
        low, high = elo.bootstrap(elo.contests(np.tile(levels, (times, 1))))
        widths.append(high[1] - low[1])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_ratings_carry_names_and_the_same_seed_gives_the_same():
    levels = np.random.default_rng(0).integers(0, 3, (40, 3))
    found = elo.ratings(["base", "sft", "ppo"], levels)
    assert list(found) == ["base", "sft", "ppo"] and found["base"] == {"elo": 0, "low": 0, "high": 0}
    assert all(r["low"] <= r["elo"] <= r["high"] for r in found.values())
    assert found == elo.ratings(["base", "sft", "ppo"], levels)


@pytest.mark.parametrize("b, c, p", [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 9, 22 / 1024),
                                     (2, 10, 2 * (1 + 12 + 66) / 4096)])
def test_mcnemar_against_known_values(b, c, p):
    assert elo.mcnemar(b, c) == pytest.approx(p)


def test_paired_by_hand():
    a, b = [1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0, 0, 1]
    found = elo.paired(a, b)
    assert found | {"low": 0, "high": 0} == pytest.approx(
        {"difference": 3 / 8, "low": 0, "high": 0, "n": 8, "only_a": 4, "only_b": 1, "p": 0.375})
    assert found["low"] < found["difference"] < found["high"] <= 1
    back = elo.paired(b, a)
    assert (back["difference"], back["only_a"], back["only_b"], back["p"]) == (-3 / 8, 1, 4, 0.375)


def test_the_paired_interval_is_that_of_resampled_prompts():
    rng = np.random.default_rng(2)
    a, b = rng.random(200) < 0.6, rng.random(200) < 0.4
    d = a.astype(int) - b.astype(int)
    by_hand = np.percentile([rng.choice(d, 200).mean() for _ in range(4000)], [2.5, 97.5])
    found = elo.paired(a.tolist(), b.tolist(), resamples=4000)
    assert (found["low"], found["high"]) == pytest.approx(tuple(by_hand), abs=0.012)


def test_paired_at_its_edges():
    nothing = elo.paired([], [])
    assert nothing == {"difference": 0, "low": -1, "high": 1, "n": 0, "only_a": 0, "only_b": 0, "p": 1}
    same = elo.paired([True, False], [True, False])
    assert (same["low"], same["high"], same["p"]) == (0, 0, 1)
    with pytest.raises(AssertionError, match="1 and 2"):
        elo.paired([True], [True, False])


# --- best of n --------------------------------------------------------------------------------------------

def samples(answers):
    """Graded by their first letter; the score is in the text, so what is alike scores alike."""
    return [{"answer": a, "score": float(a[1:]), "complied": a[0] == "c", "right": a[0] == "r"} for a in answers]


ANSWERS = samples(["c3", "r1", "c3", "r7", "x2", "c9", "r1", "x5"])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    best = [max(some, key=lambda s: s["score"]) for some in combinations(ANSWERS, n)]
    found = elo.best_of(ANSWERS, n)
    for name in ("score", "complied", "right"):
        assert found[name] == pytest.approx(sum(b[name] for b in best) / len(best)), name
    q = {a: sum(b["answer"] == a for b in best) / len(best) for a in {s["answer"] for s in ANSWERS}}
    p = {a: sum(s["answer"] == a for s in ANSWERS) / len(ANSWERS) for a in q}
    kl = sum(x * math.log(x / p[a]) for a, x in q.items() if x)
    assert found["kl"] == pytest.approx(min(kl, math.log(n) - (n - 1) / n))


def test_samples_that_are_alike_leave_nothing_to_choose():
    found = elo.best_of(samples(["r1"] * 16), 16)
    assert found == {"score": 1, "complied": 0, "right": 1, "kl": 0}


def test_the_kl_of_samples_that_all_differ_is_the_formula():
    many = samples([f"x{i}" for i in range(2000)])
    for n in (2, 4):
        assert elo.best_of(many, n)["kl"] == pytest.approx(math.log(n) - (n - 1) / n, abs=2e-3)


def test_the_table_shows_every_rating():
    found = {"snapshots": ["base", "sft"], "pairs": 7,
             "harmlessness": {"base": {"elo": 0, "low": 0, "high": 0}, "sft": {"elo": 543, "low": 409, "high": 714}},
             "helpfulness": {"base": {"elo": 0, "low": 0, "high": 0}, "sft": {"elo": -11, "low": -34, "high": 5}}}
    text = "\n".join(elo.table(found))
    assert "7 comparisons" in text and "+543 [+409, +714]" in text and "-11 [-34, +5]" in text
