"""Rates, the ratio of two, and tables as text."""

import math
import random

import pytest

from mincai.lab.table import Table, as_text, counted, rate, ratio


def rates(k, n):
    return rate([True] * k + [False] * (n - k))


def test_a_ratio_of_rates_by_hand():
    found = ratio(rates(12, 100), rates(5, 100))
    assert found["value"] == pytest.approx(12.5 / 5.5)
    spread = 1.96 * math.sqrt(1 / 12.5 - 1 / 100.5 + 1 / 5.5 - 1 / 100.5)
    assert math.log(found["high"] / found["low"]) == pytest.approx(2 * spread)
    assert math.sqrt(found["high"] * found["low"]) == pytest.approx(found["value"])
    assert ratio(rates(100, 100), rates(100, 100))["value"] == 1
    assert all(map(math.isfinite, ratio(rates(3, 100), rates(0, 100)).values()))


def test_the_interval_of_the_ratio_holds_the_truth():
    """Drawn from known rates, 95 of a hundred intervals or so must hold their ratio."""
    rng, held = random.Random(0), 0
    for _ in range(400):
        a, b = (sum(rng.random() < p for _ in range(200)) for p in (0.12, 0.06))
        found = ratio(rates(a, 200), rates(b, 200))
        held += found["low"] <= 2.0 <= found["high"]
    assert 0.92 * 400 <= held <= 0.99 * 400


def test_a_table_as_text_has_columns_as_wide_as_they_need():
    rows = [
        ["all", 20, "x"],
        ["  some of them", 0.5],
        ["few", rates(1, 2), {"n": 1, "mean": 0.5, "q05": 0, "q95": 1}],
    ]
    assert as_text([Table("Things", ["a", "words"], rows), Table("None", [], [])]).splitlines() == [
        "",
        "Things",
        "                                a       words",
        "all                            20           x",
        "  some of them              0.500",
        "few             50.0% [9.5, 90.5]  0.5 [0, 1]",
        "",
        "None",
    ]


def test_a_count_stands_before_rates_that_share_it():
    some, other = rates(1, 3), rates(1, 4)
    assert (
        counted("x", [some, some]) == ["x", 3, some, some] and counted("x", [some, other])[1] == "-"
    )
    assert counted("x", [rates(0, 0), some])[1] == 3 and counted("x", [rates(0, 0)])[1] == 0
