"""Chart geometry against coordinates computed by hand, and text that is escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from spp.reporting.charts import Axis, Bar, Cell, bar_chart, heat_map, shade, ticks


def elements(svg: str, kind: str) -> list[dict[str, str]]:
    return [element.attrib for element in ET.fromstring(svg).iter(kind)]


def test_an_axis_maps_linearly_in_either_direction():
    assert Axis(0, 10, 100, 200).at(2.5) == 125
    assert Axis(2, 4, 200, 100).at(3.5) == 125
    assert Axis(3, 3, 100, 200).at(3) == 150


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (2.3, 3.1, 5, [2.4, 2.6, 2.8, 3.0]),
        (1, 150, 4, [50, 100, 150]),
        (-3, 3, 3, [-2, 0, 2]),
        (0, 0.004, 4, [0, 0.001, 0.002, 0.003, 0.004]),
        (7, 7, 5, [7]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, count, expected):
    assert ticks(low, high, count) == pytest.approx(expected)


def test_bars_start_at_zero_and_keep_their_ratio():
    bars = [Bar("dense", 10, "10.0", "dense"), Bar("pruned", 40, "40.0", "pruned"), Bar("none", 0, "0")]
    svg = bar_chart("b", "Bars", bars)
    drawn = [bar for bar in elements(svg, "rect") if bar["class"] != "track"]
    assert [(bar["class"], bar["x"], bar["width"]) for bar in drawn] == [
        ("dense", "0", "130.0"),
        ("pruned", "0", "520.0"),
        ("accent", "0", "0.0"),
    ]
    assert "<desc" in svg and "dense: 10.0; pruned: 40.0" in svg


def test_a_bar_of_infinity_is_full_and_one_of_nan_is_empty():
    svg = bar_chart("b", "Bars", [Bar("a", math.inf, "infinite"), Bar("b", math.nan, "?"), Bar("c", 5, "5")])
    widths = [bar["width"] for bar in elements(svg, "rect") if bar["class"] != "track"]
    assert widths == ["520.0", "0.0", "520.0"]


def test_a_heat_map_has_a_rectangle_and_a_tooltip_for_every_cell():
    cells = {("q", 0): Cell(0.0, "0", "layer 0, q: 0"), ("q", 3): Cell(0.5, "50", "layer 3, q: 50")}
    svg = heat_map("h", "Heat", {**cells, ("k", 3): Cell(1.0, "100", "layer 3, k: 100")}, 1.0, "layer")
    assert [(cell["y"], cell["fill-opacity"]) for cell in elements(svg, "rect")] == [
        ("1", "0.060"),
        ("1", "0.530"),
        ("27", "1.000"),
    ]
    titles = [title.text for title in ET.fromstring(svg).iter("title")]
    assert titles == ["Heat", "layer 0, q: 0", "layer 3, q: 50", "layer 3, k: 100"]


def test_shades_go_from_faint_to_full():
    assert shade(0, 2) == shade(-1, 2) == 0.06
    assert shade(2, 2) == shade(math.inf, 2) == shade(math.nan, 2) == 1
    assert shade(1, 2) == pytest.approx(0.53)
    assert shade(0, 0) == 0.06


def test_text_is_escaped():
    evil = "<script>alert(1)</script>"
    for svg in (
        bar_chart("b", evil, [Bar(evil, 1, evil)]),
        heat_map("h", evil, {(evil, 0): Cell(1, evil, evil)}, 1, evil),
    ):
        assert "<script" not in svg and "&lt;script&gt;" in svg
        ET.fromstring(svg)
