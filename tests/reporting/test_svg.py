"""Charts: where points lie, what is left out, and that names cannot end the markup."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from axolotl_medusa.reporting.svg import HEIGHT, WIDTH, bar_chart, line_chart, tree_chart

NASTY = """<script>"&'</script>"""


def parsed(markup):
    return ET.fromstring(f"<div>{markup}</div>")


def points(chart, index=0):
    line = parsed(chart).findall(".//polyline")[index]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_line_goes_through_its_points_from_left_to_right_and_up():
    (x0, y0), (x1, y1), (x2, y2) = points(line_chart("loss", {"a": [(0, 1.0), (5, 2.0), (10, 3.0)]}, "step", "loss"))
    assert 0 < x0 < x1 < x2 < WIDTH and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert HEIGHT > y0 > y1 > y2 > 0 and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_evaluation_is_dashed_with_dots_in_the_colour_of_its_training():
    chart = parsed(line_chart("x", {"m": [(0, 1), (1, 2)], "n": [(0, 1)], "eval_n": [(0, 1), (1, 3)]}, "s", "y"))
    classes = [line.get("class") for line in chart.findall(".//polyline")]
    assert classes == ["line c0", "line c1", "line c1 dashed"]
    assert len(chart.findall(".//circle")) == 1 + 2
    assert [entry.find("span").get("class") for entry in chart.findall(".//li")] == [
        "key c0",
        "key c1",
        "key dashed c1",
    ]


def test_what_cannot_be_drawn_is_left_out():
    assert line_chart("x", {"a": [(0, math.nan)], "b": []}, "s", "y") == ""
    assert len(points(line_chart("x", {"a": [(0, 1), (1, math.inf), (2, 3)]}, "s", "y"))) == 2
    assert bar_chart("x", {"all": {"a": math.nan}}, "y") == "" and bar_chart("x", {}, "y") == ""


def test_long_logs_are_thinned_out_with_their_ends_kept():
    long = points(line_chart("x", {"a": [(step, step) for step in range(10_001)]}, "s", "y"))
    assert 200 < len(long) <= 402
    short = points(line_chart("x", {"a": [(0, 0), (10_000, 10_000)]}, "s", "y"))
    assert (long[0], long[-1]) == (short[0], short[-1])


def test_one_value_alone_has_a_place():
    chart = parsed(line_chart("x", {"a": [(3, 7.0)]}, "s", "y"))
    dot = chart.find(".//circle")
    assert 0 < float(dot.get("cx")) < WIDTH and 0 < float(dot.get("cy")) < HEIGHT


def test_bars_are_as_high_as_their_values():
    bars = parsed(bar_chart("x", {"all": {"chain": 1.0, "tree": 2.0}, "code": {"tree": 0.5}}, "y", line=1.0))
    heights = [float(bar.get("height")) for bar in bars.findall(".//rect")]
    assert heights == pytest.approx([heights[1] / 2, heights[1], heights[1] / 4], abs=0.2)
    titles = [bar.find("title").text for bar in bars.findall(".//rect")]
    assert titles == ["all, chain: 1.00", "all, tree: 2.00", "code, tree: 0.50"]
    assert bars.find(".//line[@class='across']") is not None


def test_tree_has_a_node_for_each_choice_below_its_parent():
    choices = [[0], [1], [0, 0], [0, 1], [0, 0, 0], [5, 5]]  # the last one's parent is missing
    chart = parsed(tree_chart("tree", choices))
    titles = [node.find("title").text for node in chart.findall(".//circle")]
    assert titles == [
        "the model's own token",
        "head 0, guess 1",
        "head 0, guess 2",
        "head 1, guess 1",
        "head 1, guess 2",
        "head 2, guess 1",
    ]
    assert len(chart.findall(".//line")) == 5
    assert all(float(line.get("y1")) < float(line.get("y2")) for line in chart.findall(".//line"))


@pytest.mark.parametrize(
    "chart",
    [
        line_chart(NASTY, {NASTY: [(0, 1), (1, 2)]}, NASTY, NASTY),
        bar_chart(NASTY, {NASTY: {NASTY: 1.0}}, NASTY),
        tree_chart(NASTY, [[0]]),
    ],
)
def test_names_cannot_end_the_markup(chart):
    assert "script" not in {element.tag for element in parsed(chart).iter()}
    assert not re.search(r"<script", chart)
