"""PPO's warnings: each where it belongs, and nothing where all is well."""

import math

import pytest

from mincai.plumbing.health import nothing_learnt, warnings

WELL = {
    "score": 0.0,
    "score_std": 1.0,
    "kl": 0.5,
    "kl_k3": 0.5,
    "kl_exact": 0.5,
    "sampling_gap": 1e-5,
    "first_ratio_error": 0.0,
    "ratios_beyond": 0,
    "entropy": 1.0,
}
NAN = math.nan


def log_of(*changes):
    """One row an update, each WELL but for its changes."""
    return [{"update": u, **WELL, **change} for u, change in enumerate(changes, 1)]


def test_a_healthy_run_is_not_warned_of():
    assert warnings(log_of({}, {"score": 1.0, "kl_exact": 14.9, "entropy": 0.11})) == []
    assert nothing_learnt(0.1) == []


@pytest.mark.parametrize(
    "change, told",
    [
        ({"score_std": 0.0}, "all answers have the same score"),
        ({"score_std": NAN}, "the same score"),
        ({"kl_exact": 15.5}, "KL to the reference is 15.5 nats an answer"),
        ({"kl_exact": NAN}, "KL to the reference is nan nats an answer"),
        ({"entropy": 0.09}, "entropy fell from 1.000 to 0.090"),
        ({"entropy": NAN}, "entropy fell from 1.000 to nan"),
        ({"sampling_gap": 0.002}, "sampled log-probs are 0.002 off"),
        ({"sampling_gap": NAN}, "sampled log-probs are nan off"),
        ({"first_ratio_error": 0.01}, "ratio is off 1 by 0.0100"),
        ({"first_ratio_error": NAN}, "ratio is off 1 by nan"),
        ({"ratios_beyond": 3}, "3 tokens became e^20 times likelier"),
    ],
)
def test_what_goes_wrong_is_told_and_a_nan_is_wrong(change, told):
    (line,) = warnings(log_of({}, change))
    assert told in line and "WARNING" not in line  # which stage.warn puts in front


def test_bfloat16_may_be_off_by_more():
    assert warnings(log_of({"sampling_gap": 0.002}), gap=0.3) == []


def test_a_negative_kl_is_told_from_the_third_update_on():
    low = {"kl": -0.2, "kl_k3": 0.1}
    assert warnings(log_of(low, low)) == []
    assert "negative for 3 updates (-0.200)" in warnings(log_of({}, low, low, low))[0]
    assert (
        "negative for 3 updates (nan)" in warnings(log_of(low, low, {"kl": NAN, "kl_k3": NAN}))[0]
    )
    assert warnings(log_of(low, low, {}, low)) == []
    untrained = {"kl": -0.2, "kl_k3": 0.0}  # policy and reference are one: rounding only
    assert warnings(log_of(untrained, untrained, untrained)) == []


def test_a_score_that_rises_while_quality_falls_is_told():
    def told(score, *quality):
        log = log_of({}, {}, {"score": score, "dev_quality": quality[-1]})
        return warnings([{"update": 0, "dev_quality": quality[0]}, *log])

    assert told(0.5, 0.8, 0.75) == [] and told(-0.5, 0.8, 0.2) == []
    assert (
        "(+0.00 to +0.50) while the quality of answers falls (0.800 to 0.600)"
        in told(0.5, 0.8, 0.6)[0]
    )
    assert "0.800 to nan" in told(0.5, 0.8, NAN)[0]
    log = [
        {"update": 0, "dev_quality": 0.8},
        *log_of({}, {"score": 1.0, "dev_quality": 0.1}, {"score": 1.0}),
    ]
    assert warnings(log) == []  # told once, when it was seen


@pytest.mark.parametrize("gain", [0.09, 0.0, -2.0, NAN])
def test_a_run_that_gained_nothing_is_told(gain):
    assert f"moved by {gain:+.2f} deviations in the whole run" in nothing_learnt(gain)[0]
