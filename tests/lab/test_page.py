"""Text is escaped, few cases are no percentage, ticks are round and within the data, a still curve
is a sentence."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from mincai.lab import page
from mincai.lab.table import Table, rate

EVIL = '<script>alert("1")</script>'


@pytest.mark.parametrize(
    "made",
    [
        page.text(EVIL),
        page.fold(EVIL, EVIL),
        page.said(EVIL, EVIL),
        page.boxes([(EVIL, EVIL, [EVIL])]),
        page.table(Table(EVIL, [EVIL], [[EVIL, EVIL]])),
        page.tag("b", EVIL, title=EVIL),
        page.chart(EVIL, EVIL, [(0, 1.0), (1, 2.0)]),
        page.chart(EVIL, EVIL, []),
        page.document(EVIL, EVIL, [(EVIL, EVIL, EVIL)], EVIL),
        page.picture([(EVIL, EVIL, [EVIL])], []),
    ],
)
def test_text_is_escaped_everywhere(made):
    assert "<script" not in made and '="<' not in made and made.count("&lt;script&gt;") >= 1


def test_markup_is_escaped_once():
    assert page.tag("p", page.tag("b", "a < b"), class_="x", aria_label="", title="1") == (
        '<p class="x" title="1"><b>a &lt; b</b></p>'
    )


def test_a_few_cases_are_no_percentage():
    assert page.share(rate([True] * 3 + [False] * 6)) == "3 of 9" and page.share(rate([])) == "none"
    assert (
        page.share(rate([True] * 5 + [False] * 5)) == "50.0%<small>23.7–76.3</small>"
    )  # Wilson's interval
    assert page.share(rate([1.0, 0.5, 0.0])) == "1.5 of 3" and page.share(rate([1.0])) == "1 of 1"
    assert page.share("<") == "&lt;" and page.share(7) == "7" and page.share(0.0714) == "0.071"
    assert (
        page.share({"n": 3, "mean": 0.25, "q05": 0.1, "q50": 0.2, "q95": 0.5}) == "0.25 [0.1, 0.5]"
    )


def test_three_digits_tell():
    assert [page.short(x) for x in (0, 0.012345, -0.28149, 1.2345, 98.76, 12345.6)] == [
        "0",
        "0.0123",
        "-0.281",
        "1.23",
        "98.8",
        "12,346",
    ]


def test_a_row_can_be_set_in():
    made = page.table(Table("Counts", ["n"], [["all", 1], ["  some", 2], ["    few", 3]]))
    assert re.findall(r'<th scope="row"(.*?)>(.*?)</th>', made) == [
        ("", "all"),
        (' class="in1"', "some"),
        (' class="in2"', "few"),
    ]
    assert made.startswith('<div class="scroll"') and "<caption>Counts</caption>" in made


@pytest.mark.parametrize(
    "low, high, whole, wanted",
    [
        (-0.3, 1.9, False, [0, 0.5, 1, 1.5]),
        (0.036, 0.073, False, [0.04, 0.05, 0.06, 0.07]),
        (1, 12, True, [5, 10]),
        (0, 2, True, [0, 1, 2]),
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_ticks_are_round_and_within_the_data(low, high, whole, wanted):
    assert page.ticks(low, high, 5, whole) == pytest.approx(wanted)


def test_a_still_curve_is_a_sentence():
    still = page.chart("entropy", "nats a token", [(1, 0.2), (2, 0.203), (3, 0.201)])
    assert "<svg" not in still and "between 0.200 and 0.203 over 3 updates" in still
    assert "<svg" in page.chart("entropy", "nats a token", [(1, 0.2), (2, 0.205)]), (
        "2.4% of its magnitude"
    )
    assert page.flat([(1, 0.0), (2, 0.0)]) and "measured once" in page.flat([(4, 1.5)])
    assert page.flat([]) == "not measured." and not page.flat([(1, -0.01), (2, 0.01)])


def test_a_curve_goes_through_its_points():
    """x in proportion, y downward and in proportion, within the box; its ends named; the axis
    labelled."""
    made = page.plot([(0, 1.0), (5, 3.0), (10, 2.0)], 44, 8, 298, 130)
    line = [tuple(map(float, p.split(","))) for p in re.search(r'points="(.*?)"', made)[1].split()]
    assert [x for x, _ in line] == [44, 193, 342]
    assert line[0][1] - line[2][1] == pytest.approx((line[0][1] - line[1][1]) / 2, abs=0.1)
    assert 8 < line[1][1] < line[2][1] < line[0][1] < 138
    assert (
        re.findall(r'class="value"[^>]*>([^<]*)', made) == ["1.00", "2.00"]
        and ">update</text>" in made
    )
    assert re.findall(r'text-anchor="end">([^<]*)', made) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "ys, down", [([0, 1, 2], 16), ([2, 1, 0], -8), ([1, 0.9, 3, 3], 16), ([2, 2.1, 0, 0], -8)]
)
def test_the_first_value_stands_where_the_line_is_not(ys, down):
    """Below a line that rises beside it, above one that falls, whatever it does at first."""
    made = page.plot([(20 * x, float(y)) for x, y in enumerate(ys)], 0, 0, 20 * len(ys) - 20, 100)
    first = float(re.search(r'<circle class="end" cx="0\.?0?" cy="([\d.]+)"', made)[1])
    value = float(re.search(r'class="value" x="2\.0" y="([\d.]+)"', made)[1])
    assert value - first == pytest.approx(down, abs=0.1)


def test_the_last_value_has_room():
    """Eight characters of 7.5 pixels, bold, within the drawing's 400."""
    made = page.chart("entropy", "nats", [(1, 0.5), (9, 0.000123)])
    x = float(re.findall(r'class="value" x="([\d.]+)"', made)[-1])
    assert ">0.000123<" in made and x + 8 * 7.5 < 400


def test_a_drawing_says_in_words_what_it_shows():
    made = page.chart("KL", "nats an answer", [(1, 0.0), (24, 1.5)])
    assert 'role="img" aria-label="KL, nats an answer: 0 at first, 1.50 at update 24"' in made


def test_the_picture_stands_alone():
    stages = [(name, "1 → 2", ["one", "two"]) for name in "abcde"]
    root = ElementTree.fromstring(page.picture(stages, [(1, 0.0), (2, 1.0)]))  # an SVG file is XML
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg" and root.attrib["viewBox"] == "0 0 900 320"
    assert [r.attrib["class"] for r in root.iter(space + "rect")] == ["back"] + ["box"] * 5
    right = [
        float(r.attrib["x"]) + 160 for r in root.iter(space + "rect") if r.attrib["class"] == "box"
    ]
    assert right == sorted(right) and right[-1] < 900 and len(list(root.iter(space + "path"))) == 4
    assert root.find(space + "title").text == "The loop: " + "; ".join(
        f"{name} 1 → 2" for name in "abcde"
    )
    assert root.find(space + "polyline") is not None
    assert "not measured." in page.picture(stages, [])


def test_the_page_is_for_small_screens_and_dark_ones():
    made = page.document("a run", "x", [], "")
    assert made.startswith('<!doctype html>\n<html lang="en">') and "<title>a run</title>" in made
    assert (
        "width=device-width" in made
        and "prefers-color-scheme:dark" in made
        and "max-width:640px" in made
    )
    assert "{{" not in page.CSS and page.CSS.count("{") == page.CSS.count("}")
