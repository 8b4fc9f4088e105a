"""Charts: well-formed SVG that shows every point, bar and name, in its place, and refuses what has none."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_export.page.chart import HEIGHT, WIDTH, ChartAxis, Series, bars, lines, sheet
from ldm_runtime.errors import SpecError

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(1e-3, 1e6)


def marks(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(SVG + tag))


def texts(svg: str) -> list[str]:
    return [mark.text or "" for mark in marks(svg, "text")]


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=9), st.booleans(), st.booleans())
def test_points_lie_in_the_frame_in_the_order_of_their_values(points, log_x, log_y) -> None:
    svg = lines("a <title>", "x & y", "y", [Series("one", tuple(points))], log=(log_x, log_y))
    places = [(float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in marks(svg, "circle")]
    assert len(places) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    for one, place in zip(points, places, strict=True):
        for other, there in zip(points, places, strict=True):
            assert not (one[0] < other[0] and place[0] > there[0]) and not (one[1] < other[1] and place[1] < there[1])
    assert "a <title>" in texts(svg) and "x & y" in texts(svg)


@given(NUMBERS, NUMBERS, st.booleans())
def test_ticks_are_few_and_on_the_axis(one: float, other: float, log: bool) -> None:
    axis = ChartAxis.over([one, other], log)
    assert 1 <= len(axis.ticks()) <= 30
    assert all(-1e-9 <= axis.at(tick) <= 1 + 1e-9 for tick in axis.ticks())


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars("time", "seconds", {"unet": {"ours": 1.0, "theirs": 3.0}, "decoder & co": {"ours": 0.5}})
    widths = [float(mark.get("width", "")) for mark in marks(svg, "rect")[1:]]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.3) and widths[0] == pytest.approx(2 * widths[2], abs=0.3)
    assert {"1 ours", "3 theirs", "0.5 ours", "unet", "decoder & co", "seconds"} <= set(texts(svg))


def test_a_sheet_holds_all_its_charts() -> None:
    charts = [lines("one", "x", "y", [Series("a", ((1, 1), (2, 4)))]), bars("two", "s", {"b": {"c": 2.0}})]
    svg = sheet(charts)
    assert {"one", "two", "a", "b"} <= set(texts(svg))
    heights = [int(mark.get("height", "")) for mark in marks(svg, "svg")]
    assert heights[0] == sum(heights[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_has_no_place_is_refused(value: float) -> None:
    with pytest.raises(SpecError, match=r"chart: got .* expected finite numbers above zero"):
        lines("t", "x", "y", [Series("a", ((1.0, value),))], log=(True, True))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(SpecError, match="chart: got "):
        lines("t", "x", "y", [])
