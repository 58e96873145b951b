"""Charts as inline SVG: pure functions from numbers to markup, without scripts, fonts or external resources.

Colours are CSS classes of the page, so that charts follow its light and dark themes. Every chart has a title and a
description in words for screen readers. All text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 520
_BAR_ROW, _BAR_HEIGHT = 50, 12
_HEAT_ROW, _WIDE_CELL, _NARROW_CELL = 26, 44, 12
# Style of a standalone chart; in a page, the page's own style sheet has the colours.
_STYLE = """
svg { background: #fff; padding: 12px; font: 14px system-ui, sans-serif; }
text { fill: #1e1d1a; } .strong { font-weight: 600; } .track { fill: #efebe3; } .accent { fill: #0e6a68; }
.shade0 { fill: #857f75; } .shade1 { fill: #b3561d; } .shade2 { fill: #0e6a68; } .shade3 { fill: #3d5a98; }
"""


@dataclass(frozen=True)
class Axis:
    """A linear map from values `low` to `high` to pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; the middle if `low` equals `high`."""
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, the text at its end, and the CSS class that colours it."""

    label: str
    value: float
    text: str
    kind: str = "accent"


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: its value, a short text for wide cells, and the full text for the tooltip."""

    value: float
    short: str
    text: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count` of them."""
    if not high > low:
        return [float(low)]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def bar_chart(name: str, title: str, bars: Sequence[Bar], full: float = 0) -> Markup:
    """Horizontal bars from zero, each under a line with its label and its text.

    Args:
        name: prefix of ids, unique in the page.
        title: title of the chart.
        bars: finite values are drawn to scale, an infinite one at full length; a NaN has no bar.
        full: the value of a bar of full length, unless a bar's value is larger.
    """
    finite = [bar.value for bar in bars if math.isfinite(bar.value)]
    axis = Axis(0, max([full, *finite]) or 1, 0, WIDTH)
    rows = []
    for index, bar in enumerate(bars):
        top = index * _BAR_ROW
        length = WIDTH if bar.value == math.inf else axis.at(bar.value) if math.isfinite(bar.value) else 0
        rows.append(
            Markup(
                '<text x="0" y="{y}">{label}</text>'
                '<text class="strong" x="{width}" y="{y}" text-anchor="end">{text}</text>'
                '<rect class="track" x="0" y="{bar}" width="{width}" height="{height}" rx="3"/>'
                '<rect class="{kind}" x="0" y="{bar}" width="{length:.1f}" height="{height}" rx="3"/>'
            ).format(
                y=top + 17,
                bar=top + 26,
                label=bar.label,
                text=bar.text,
                kind=bar.kind,
                length=max(length, 0),
                width=WIDTH,
                height=_BAR_HEIGHT,
            )  # fmt: skip
        )
    description = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return svg(name, title, description, WIDTH, max(len(bars) * _BAR_ROW - 6, 1), rows)


def standalone(chart: Markup) -> str:
    """The text of a standalone SVG file of a chart, with its colours."""
    name_space = Markup('<svg xmlns="http://www.w3.org/2000/svg" ')
    head, body = chart.replace(Markup("<svg "), name_space, 1).split(Markup(">"), 1)
    return f"{head}><style>{_STYLE}</style>{body}\n"


def heat_map(
    name: str,
    title: str,
    cells: Mapping[tuple[str, int], Cell],
    high: float,
    column_label: str,
) -> Markup:
    """A grid of shades from 0 (pale) to `high` (full).

    Args:
        name: prefix of ids, unique in the page.
        title: title of the chart.
        cells: (row, column) -> cell; a missing one stays empty, an infinite or NaN value gets the full shade.
        high: the value of the full shade.
        column_label: label of the column axis.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells})
    left = 12 + 8 * max(len(row) for row in rows)
    cell_width = min(max(700 // len(columns), _NARROW_CELL), _WIDE_CELL)
    body = []
    for index, row in enumerate(rows):
        body.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 10, index * _HEAT_ROW + 18, row)
        )
        for position, column in enumerate(columns):
            if cell := cells.get((row, column)):
                body.append(_heat_cell(cell, left + position * cell_width, index * _HEAT_ROW, cell_width, high))
    bottom = len(rows) * _HEAT_ROW + 18
    every = math.ceil(28 / cell_width)
    body += [
        Markup('<text class="label" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            left + (position + 0.5) * cell_width, bottom, column
        )
        for position, column in enumerate(columns)
        if position % every == 0
    ]
    width = left + len(columns) * cell_width
    body.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(left - 10, bottom, column_label)
    )
    values = list(cells.values())
    lowest, highest = (pick(values, key=lambda cell: cell.value) for pick in (min, max))
    description = f"{len(rows)} kinds of matrices in {len(columns)} layers. "
    description += f"Lowest: {lowest.text}. Highest: {highest.text}. All values are in the table of tensors."
    return svg(name, title, description, width, bottom + 8, body, kind="heat")


def shade(value: float, high: float) -> float:
    """Opacity of a cell: from 0.06 for 0, so that it is visible, to 1 for `high`, values above it, and NaN."""
    share = value / high if high > 0 else 0.0
    return 1.0 if math.isnan(share) else 0.06 + 0.94 * min(max(share, 0.0), 1.0)


def _heat_cell(cell: Cell, left: float, top: float, width: float, high: float) -> Markup:
    label = Markup("")
    if width >= _WIDE_CELL:
        label = Markup('<text class="small" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            left + width / 2, top + 18, cell.short
        )
    return Markup(
        '<g><title>{}</title><rect class="cell" x="{}" y="{}" width="{}" height="{}" rx="2" fill-opacity="{:.3f}"/>'
        "{}</g>"
    ).format(cell.text, left + 1, top + 1, width - 2, _HEAT_ROW - 2, shade(cell.value, high), label)


def svg(
    name: str, title: str, description: str, width: int, height: int, body: Sequence[Markup], kind: str = "plot"
) -> Markup:
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-labelledby="{name}-title {name}-description">'
        '<title id="{name}-title">{title}</title><desc id="{name}-description">{description}</desc>{body}</svg>'
    ).format(
        kind=kind, width=width, height=height, name=name, title=title, description=description,
        body=Markup("").join(body),
    )  # fmt: skip
