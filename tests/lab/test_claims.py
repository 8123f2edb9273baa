"""The table of claims: right figures from a run's files, verdicts that hold for every run, and what
is not there."""

import json

import pytest

from mincai import UserError
from mincai.lab import claims
from mincai.lab.claims import Claim, at
from mincai.lab.table import as_text, rate
from mincai.plumbing import data


def rates(k, n):
    return rate([True] * k + [False] * (n - k))


@pytest.fixture
def runs(tmp_path):
    """Three runs of which each knows one figure, 10, 20 and 30 of 100, and its share."""
    for n in (1, 2, 3):
        data.write_json(
            tmp_path / f"r{n}" / "eval.json",
            {
                "stages": {"ppo": {"attack_success": rates(10 * n, 100)}},
                "headline": {"ppo_help_kept": n / 10},
            },
        )
    return [tmp_path / f"r{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "sign, line, verdict",
    [
        (-1, 0.3, "reproduced"),
        (-1, 0.29, "partly"),
        (-1, 0.21, "partly"),
        (-1, 0.19, "not"),
        (1, 0.1, "reproduced"),
        (1, 0.11, "partly"),
        (1, 0.21, "not"),
        (0, 0, ""),
    ],
)
def test_verdicts(runs, sign, line, verdict):
    for place in ("eval.json:stages/ppo/attack_success", "eval.json:headline/ppo_help_kept"):
        found = claims.measured(Claim("x", place, sign, line), runs)
        assert found["verdict"] == verdict and found["values"] == pytest.approx([0.1, 0.2, 0.3])


def test_the_first_runs_interval_is_given(runs):
    found = claims.measured(Claim("x", "eval.json:stages/ppo/attack_success", -1, 0.3), runs)
    assert (found["low"], found["high"]) == (rates(10, 100)["low"], rates(10, 100)["high"])
    text = as_text(claims.tables({"claims": [found]}))
    assert (
        "at most 30.0%" in text
        and "20.0%" in text
        and "10.0% to 30.0%" in text
        and "reproduced" in text
    )


def test_another_runs_interval_is_not_the_firsts(runs):
    (runs[0] / "eval.json").unlink()
    found = claims.measured(Claim("x", "eval.json:stages/ppo/attack_success", -1, 0.3), runs)
    assert found["values"] == pytest.approx([0.2, 0.3]) and found["low"] is found["high"] is None


def test_a_rate_of_no_request_is_not_measured(runs):
    data.write_json(runs[0] / "eval.json", {"stages": {"ppo": {"attack_success": rates(0, 0)}}})
    data.write_json(runs[1] / "eval.json", {"stages": {"ppo": {"attack_success": rates(0, 9)}}})
    claim = Claim("x", "eval.json:stages/ppo/attack_success", -1, 0.04)
    alone, both = claims.measured(claim, runs[:1]), claims.measured(claim, runs[:2])
    assert (alone["verdict"], alone["values"], alone["low"]) == ("not measured", [], None)
    assert (both["verdict"], both["values"]) == ("reproduced", [0.0])


def test_what_is_not_there_is_not_measured(runs):
    found = claims.measure(runs)
    text = as_text(claims.tables(found))
    rows = {row["claim"]: row for row in found["claims"]}
    assert rows["of PPO's gain, what is left without labels"]["verdict"] == "not measured"
    assert rows["97% of help is kept"]["verdict"] == "not"
    assert rows["... to under 4%"]["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert json.loads(json.dumps(found)) == found and all(
        row["claim"] in text for row in found["claims"]
    )


def test_controls_are_found_by_name_and_the_strongest_people_count(tmp_path):
    rows = [
        {"name": "full", "attack_success": rates(2, 100), "kept": 1.0},
        {"name": "no labels", "kept": 0.1, "attack_success": rates(5, 100)},
        {"name": "human, careful", "attack_success": rates(12, 100)},
        {"name": "human, hurried", "attack_success": rates(40, 100)},
        {"name": "human, no phase 1", "failed": "x"},
    ]
    data.write_json(tmp_path / "controls.json", {"rows": rows})
    assert at(tmp_path, "controls.json:rows/no labels/kept") == 0.1
    assert claims.people(tmp_path)["value"] == pytest.approx(12.5 / 2.5)
    data.write_json(tmp_path / "controls.json", {"rows": rows[:2]})
    with pytest.raises(LookupError):
        claims.people(tmp_path)


def test_how_sure_near_the_boundary(tmp_path):
    pairs = {"near": {"margin": 1.0}, "far": {"margin": 4.0}}
    data.write_json(tmp_path / "eval_deep.json", {"doubt": {"pairs": pairs}})
    assert claims.near(tmp_path) == 0.25


def test_files_that_are_none_are_one_line(runs):
    with pytest.raises(UserError, match="make it with: python -m mincai.lab.evaluate"):
        claims.measure([runs[0], runs[0].parent / "nowhere"])
    (runs[1] / "eval.json").write_text("half")
    with pytest.raises(UserError, match="eval.json: cannot be read.*--again"):
        claims.measure(runs)
