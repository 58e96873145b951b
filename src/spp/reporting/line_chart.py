"""Lines over steps as inline SVG. Lines differ in dash and marker as well as in colour, with labels at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from spp.reporting.charts import WIDTH, Axis, svg, ticks

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 280, 64, 20, 16, 52
_SMOOTHING_SHARE = 0.05
_LABEL_HEIGHT, _CHARACTER, _LABEL_GAP = 19, 8, 9
_MARKERS_ON_LINE = 5
_DASHES = ("none", "8 4", "2 3", "12 3 2 3", "5 2", "14 4 4 4")
_CIRCLE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z"
_MARKERS = (_CIRCLE, "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z", "M0 -5.4L5.4 0L0 5.4L-5.4 0Z", "M-5 -4H5L0 5Z")

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line: the label at its end, its finite points in the order of x, and whether their running mean is drawn."""

    label: str
    points: Sequence[Point]
    smooth: bool = True


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and its neighbours: `width` (odd) values, fewer at the ends."""
    half = width // 2
    windows = (values[max(index - half, 0) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def line_chart(name: str, title: str, lines: Sequence[Line], x_label: str, y_label: str) -> Markup:
    """Lines over a count, each as the running mean of its points where there are many.

    A single line is drawn over its points; several lines have markers, and labels at their ends.

    Args:
        name: prefix of ids, unique in the page.
        title: title of the chart.
        lines: each with at least one point; styles repeat after 30 lines.
        x_label: what is counted.
        y_label: the quantity and its unit.
    """
    drawn = [list(_smoothed(line)) for line in lines]
    smooth = [line for line in lines if line.smooth]
    behind = smooth[0].points if len(smooth) == 1 and _width(smooth[0]) > 1 else []
    points = [point for line in [*drawn, behind] for point in line]
    labels = [line.label for line in lines] if len(lines) > 1 else []
    right = WIDTH - max([_RIGHT, *(len(label) * _CHARACTER + 2 * _LABEL_GAP for label in labels)])
    x_axis = Axis(min(x for x, _ in points), max(x for x, _ in points), _LEFT, right)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low) * 0.05
    y_axis = Axis(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)
    body = [_y_ticks(y_axis, right), _x_ticks(x_axis), _axis_labels(x_label, y_label, right)]
    if behind:
        body.append(_polyline("raw", 0, x_axis, y_axis, behind))
    for index, line in enumerate(drawn):
        body.append(_polyline("line", index, x_axis, y_axis, line))
        if labels or len(line) == 1:
            body += [_marker(index, x_axis.at(x), y_axis.at(y)) for x, y in _marked(line, index)]
    ends = [(x_axis.at(line[-1][0]), y_axis.at(line[-1][1])) for line in drawn]
    body += _end_labels(labels, ends) if labels else []
    return svg(name, title, " ".join(map(_describe, lines)), WIDTH, _HEIGHT, body)


def swatch(index: int) -> Markup:
    """A short line in the style of the line with this index, for legends."""
    line = Markup(
        '<svg class="swatch" viewBox="0 0 44 14" width="44" height="14" aria-hidden="true">'
        '<line class="line look-{}" x1="1" x2="43" y1="7" y2="7" stroke-dasharray="{}"/>{}</svg>'
    )
    return line.format(index % len(_DASHES), _DASHES[index % len(_DASHES)], _marker(index, 22, 7))


def _width(line: Line) -> int:
    """Width of the running mean that is drawn, in points."""
    return int(len(line.points) * _SMOOTHING_SHARE) | 1 if line.smooth else 1


def _smoothed(line: Line) -> zip[Point]:
    means = running_mean([y for _, y in line.points], _width(line))
    return zip((x for x, _ in line.points), means, strict=True)


def _describe(line: Line) -> str:
    (first_x, first_y), (last_x, last_y) = line.points[0], line.points[-1]
    lowest_x, lowest_y = min(line.points, key=lambda point: point[1])
    text = f"{line.label}: {len(line.points)} points, from {first_y:.4g} at {first_x:g} to {last_y:.4g} at {last_x:g}, "
    text += f"lowest {lowest_y:.4g} at {lowest_x:g}."
    if (width := _width(line)) > 1:
        text += f" The strong line is the mean of {width} neighbouring points."
    return text


def _polyline(kind: str, index: int, x_axis: Axis, y_axis: Axis, points: Sequence[Point]) -> Markup:
    path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
    look = index % len(_DASHES)
    return Markup('<polyline class="{} look-{}" stroke-dasharray="{}" points="{}"/>').format(
        kind, look, _DASHES[look], path
    )


def _marked(points: Sequence[Point], index: int) -> list[Point]:
    """The points of a line that get a marker, the last among them; offset from the next line's, so both are visible."""
    shift = (index % len(_MARKERS)) / len(_MARKERS)
    places = [(number + shift) / _MARKERS_ON_LINE for number in range(_MARKERS_ON_LINE)]
    chosen = {round(place * (len(points) - 1)) for place in places} | {len(points) - 1}
    return [points[place] for place in sorted(chosen)]


def _marker(index: int, x: float, y: float) -> Markup:
    return Markup('<path class="marker look-{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        index % len(_DASHES), x, y, _MARKERS[index % len(_MARKERS)]
    )


def _end_labels(labels: Sequence[str], ends: Sequence[tuple[float, float]]) -> list[Markup]:
    """Labels at the ends of their lines, moved up or down so that they do not overlap."""
    placed: list[tuple[float, float]] = []
    texts = []
    template = Markup('<text class="label strong" x="{:.1f}" y="{:.1f}">{}</text>')
    for label, (x, y) in sorted(zip(labels, ends, strict=True), key=lambda item: item[1][1]):
        reach = len(label) * _CHARACTER + 2 * _LABEL_GAP
        near = [other for place, other in placed if abs(place - x) < reach]
        for step in range(2 * len(placed) + 1):  # 0, one down, one up, two down, ...
            tried = y + (step + 1) // 2 * _LABEL_HEIGHT * (1 if step % 2 else -1)
            if _TOP <= tried <= _HEIGHT - _BOTTOM and all(abs(tried - other) >= _LABEL_HEIGHT - 1 for other in near):
                y = tried
                break
        placed.append((x, y))
        texts.append(template.format(x + _LABEL_GAP, y + 5, label))
    return texts


def _axis_labels(x_label: str, y_label: str, right: float) -> Markup:
    return Markup(
        '<text class="label" x="{right}" y="{bottom}" text-anchor="end">{x_label}</text>'
        '<text class="label" x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        "{y_label}</text>"
    ).format(
        right=right,
        bottom=_HEIGHT - 6,
        middle=(_TOP + _HEIGHT - _BOTTOM) // 2,
        x_label=x_label,
        y_label=y_label,
    )


def _y_ticks(axis: Axis, right: float) -> Markup:
    template = Markup(
        '<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="label" x="{text}" y="{baseline:.1f}" text-anchor="end">{value:.6g}</text>'
    )
    return Markup("").join(
        template.format(
            left=_LEFT, right=right, text=_LEFT - 8, y=axis.at(tick), baseline=axis.at(tick) + 5, value=tick
        )
        for tick in ticks(axis.low, axis.high)
        for y in [axis.at(tick)]
    )


def _x_ticks(axis: Axis) -> Markup:
    template = Markup('<text class="label" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>')
    return Markup("").join(
        template.format(axis.at(tick), _HEIGHT - _BOTTOM + 20, tick)
        for tick in ticks(axis.low, axis.high, 4)
        if tick.is_integer()
    )
