"""Drawings as parts of a page: colours that follow its theme, ids that cannot collide, nothing to fetch."""

import math
import random
import re
import sys

import pytest

from mincai import figures

RATE = {"k": 9, "n": 10, "rate": 0.9, "low": 0.6, "high": 0.98}


def bins(number=3):
    return [{"low": 0, "high": 1, "n": 5, "predicted": 0.2 + 0.2 * i, "observed": 0.25 * i} for i in range(number)]


# ---- numbers ----

def test_smooth_is_the_mean_of_the_last_few():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    for width in (1, 4, 60):
        by_hand = [sum(some) / len(some) for some in (values[max(0, i - width + 1):i + 1] for i in range(50))]
        assert figures.smooth(values, width) == pytest.approx(by_hand)


def test_reliability_bins_by_hand():
    found = figures.reliability_bins([0.05, 0.07, 0.15, 1.0, 0.91], [False, True, True, True, False])
    assert [(b["low"], b["n"]) for b in found] == [(0.0, 2), (0.1, 1), (0.9, 2)]
    assert found[0]["predicted"] == pytest.approx(0.06) and found[0]["observed"] == 0.5
    assert found[2]["predicted"] == pytest.approx(0.955) and found[2]["observed"] == 0.5


def test_an_interval_never_has_a_negative_arm():
    assert figures.arms(1.0, 0.5, 1.0 - 1e-16) == [[0.5], [0.0]]


# ---- markup ----

SVG = ('<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://www.w3.org/x.dtd">\n<svg width="3pt" viewBox="0 0 3 4" '
       'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/x">\n <metadata>http://a.b</metadata>'
       '<!-- x --><g id="kept"/><g id="dropped"/><use xlink:href="#kept" style="fill: #030303; clip-path: url(#clip)"/>'
       '<text style="font: 9px \'DejaVu Sans\', sans-serif; fill: #040404">a</text><clipPath id="clip"/></svg>')


def test_inline_by_hand():
    found = figures.inline(SVG, "p", 'a "b" <c>')
    assert found.startswith('<svg viewBox="0 0 3 4" role="img" aria-label="a &quot;b&quot; &lt;c>">')
    assert "http" not in found and "xmlns" not in found and "<!--" not in found and "dropped" not in found
    assert 'id="p-kept"' in found and 'href="#p-kept"' in found
    assert 'id="p-clip"' in found and "url(#p-clip)" in found
    assert "fill: var(--ppo)" in found and "font: 9px var(--sans); fill: var(--ink)" in found


DRAWINGS = {
    "lines": (figures.lines, ({"base": ([1, 2, 3], [1.0, 2.0, 1.5]), "ppo": ([1, 2], [0.5, 0.1])},), {"width": 2}),
    "reliability": (figures.reliability, ({"a": bins(), "b": bins(2)},), {}),
    "plane": (figures.plane, ({s: (RATE, RATE) for s in ("base", "sft", "ppo")},), {}),
    "zoom": (figures.plane, ({s: (RATE, RATE) for s in ("base", "sft")}, [(0.5, 0.5), (0.6, 0.7)]), {"zoom": True}),
    "elo": (figures.elo, (["base", "ppo-4"], {s: {"elo": 1, "low": 0, "high": 2} for s in ("base", "ppo-4")},
                          {s: {"elo": 1, "low": 0, "high": 2} for s in ("base", "ppo-4")}), {}),
    "goodhart": (figures.goodhart, ([{"kl": k, "score": k, "harmless": RATE, "helpful": RATE} for k in (0, 1)],), {}),
    "overlay": (figures.overlay, ({"best of n": [{"kl": -1e-9, "score": 1, "helpful": RATE}] * 2}, "helpful", "kl"), {}),
    "sweep": (figures.sweep, ([(p, {"attack_success": RATE, "helpful": RATE}) for p in (0, 50)],), {}),
    "scatter": (figures.scatter, ([[1, 2], [3, 4]], "x", "y"), {}),
    "spread": (figures.spread, ({"base": [0.1, 0.0, 1.0]}, "x"), {"log": True}),
    "histogram": (figures.histogram, ([1.0, 1.0], "x"), {}),
    "bars": (figures.bars, ([("one", RATE), ("two", RATE)], "x"), {})}


def test_an_overlay_draws_the_root_of_kl_or_the_score():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    rows = [{"kl": kl, "score": 7.0, "helpful": {"rate": 0.25}} for kl in (0.0, 4.0, -1e-9)]
    figures.overlay(axes, {"a": rows}, "helpful", "kl")
    figures.overlay(axes, {"b": rows}, "helpful", "score")
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0, 25], [2, 25], [0, 25]], [[7, 25]] * 3]


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_drawing_is_themed_and_stands_alone(name):
    pytest.importorskip("matplotlib")
    draw, values, settings = DRAWINGS[name]
    svg = figures.picture(draw, *values, name=name, label="what <it> shows", **settings)
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and 'aria-label="what &lt;it>' in svg
    assert "http" not in svg and "DejaVu" not in svg and "<text" in svg, "text must stay text"
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert not colours, f"{colours} would not follow the theme"
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and all(i.startswith(f"{name}-") for i in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_a_drawing_is_the_same_twice():
    pytest.importorskip("matplotlib")
    one, two = (figures.picture(figures.scatter, [[1, 2], [3, 4]], "x", "y", name="p") for _ in range(2))
    assert one == two


def test_a_point_is_drawn_where_it_lies():
    """Two of three points on one height, and the third above them: SVG counts downward."""
    pytest.importorskip("matplotlib")
    svg = figures.picture(figures.lines, {"base": ([0, 1, 2], [1.0, 1.0, 2.0])}, name="p")
    marks = [(float(x), float(y)) for x, y in re.findall(r'<use href="#p-[^"]+" x="([\d.]+)" y="([\d.]+)" style="fill: '
                                                         r'var\(--base\)', svg)]
    assert len(marks) == 3 and math.isclose(marks[0][1], marks[1][1]) and marks[2][1] < marks[1][1]
    assert math.isclose(marks[1][0] - marks[0][0], marks[2][0] - marks[1][0], rel_tol=1e-4)


def test_without_matplotlib_it_is_an_import_error(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        figures.picture(figures.scatter, [[1, 2]], "x", "y", name="p")
