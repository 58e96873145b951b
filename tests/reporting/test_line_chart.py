"""Lines against coordinates computed by hand, and lines that are told apart without colour."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from spp.reporting.line_chart import Line, line_chart, running_mean, swatch


def elements(svg: str, kind: str) -> list[dict[str, str]]:
    return [element.attrib for element in ET.fromstring(svg).iter(kind)]


def test_the_running_mean_has_fewer_values_at_the_ends():
    assert running_mean([1, 2, 6, 4], 3) == pytest.approx([1.5, 3, 4, 5])
    assert running_mean([1, 2, 6, 4], 1) == [1, 2, 6, 4]


def test_a_line_runs_from_corner_to_corner():
    # x: 64 to 500; y: 16 at 4.2 to 228 at 1.8, five per cent of 2 beyond the values 2 and 4.
    svg = line_chart("l", "Line", [Line("loss", [(0, 4), (50, 2), (100, 3)])], "step", "loss")
    [line] = elements(svg, "polyline")
    middle = 16 + (4.1 - 3) / 2.2 * 212
    assert line["points"] == f"64.0,{16 + 0.1 / 2.2 * 212:.1f} 282.0,{228 - 0.1 / 2.2 * 212:.1f} 500.0,{middle:.1f}"


def looks(svg: str, kind: str) -> list[str]:
    return [element["class"] for element in elements(svg, kind)]


def test_many_points_get_a_running_mean_and_one_point_a_marker():
    noisy = Line("loss", [(i, i % 2) for i in range(100)])
    alone = line_chart("l", "Line", [noisy], "step", "loss")
    assert looks(alone, "polyline") == ["raw look-0", "line look-0"] and not elements(alone, "path")
    beside = line_chart("l", "Line", [noisy, Line("loss", [(0, 1), (9, 2)])], "step", "loss")
    assert looks(beside, "polyline") == ["line look-0", "line look-1"]  # points of one would hide the other
    assert len(elements(line_chart("l", "Line", [Line("loss", [(1, 2.5)])], "step", "loss"), "path")) == 1


def test_thirty_lines_look_different_without_colour():
    samples = [swatch(index) for index in range(30)]
    dashes = [elements(sample, "line")[0]["stroke-dasharray"] for sample in samples]
    markers = [elements(sample, "path")[0]["d"] for sample in samples]
    assert len(set(zip(dashes, markers, strict=True))) == 30
    lines = [Line(str(index), [(0, 1), (9, 2)]) for index in range(30)]
    svg = line_chart("l", "Line", lines, "step", "loss")
    assert [line["stroke-dasharray"] for line in elements(svg, "polyline")] == dashes


def test_labels_stand_at_the_ends_and_apart():
    lines = [Line("1", [(0, 4), (10, 2)]), Line("2", [(0, 3), (10, 2)]), Line("3", [(0, 3), (5, 4)])]
    svg = line_chart("l", "Line", lines, "step", "loss")
    [*ends] = [text for text in ET.fromstring(svg).iter("text") if text.get("class") == "label strong"]
    places = {text.text: (float(text.get("x")), float(text.get("y"))) for text in ends}
    assert set(places) == {"1", "2", "3"}
    last = [line["points"].split()[-1].split(",") for line in elements(svg, "polyline")]
    for (x, y), (label_x, label_y) in zip(last, (places[name] for name in "123"), strict=True):
        assert 5 < label_x - float(x) < 15 and abs(label_y - float(y)) < 40
    assert abs(places["1"][1] - places["2"][1]) >= 14 and places["3"][0] < places["1"][0]


def test_every_line_is_described_in_words():
    svg = line_chart("l", "Line", [Line("a", [(1, 4), (2, 1), (3, 2)]), Line("b", [(1, 5)])], "step", "loss")
    [words] = [element.text for element in ET.fromstring(svg).iter("desc")]
    assert "a: 3 points, from 4 at 1 to 2 at 3, lowest 1 at 2." in words and "b: 1 points" in words


def test_text_is_escaped():
    evil = "<script>alert(1)</script>"
    svg = line_chart("l", evil, [Line(evil, [(0, 1), (1, 2)])] * 2, evil, evil)
    assert "<script" not in svg and svg.count("&lt;script&gt;") == 7
