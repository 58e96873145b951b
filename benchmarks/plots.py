"""Draw the rows of quality.csv: what each method wins back, one panel per model.

    python -m benchmarks.plots [--csv FILE] [--out docs/images/quality.svg]

It needs matplotlib, which the extra `bench` brings: the report's own charts have no groups of bars and no spreads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.patches import Patch
from pandas import DataFrame

from benchmarks.common import DATA, ROOT
from benchmarks.quality_tables import quality_cells
from benchmarks.table_cells import read_frame

STYLE = {"svg.hashsalt": "spp", "svg.fonttype": "none", "font.family": "sans-serif"}


def draw(rows: DataFrame, out: Path) -> None:
    """Horizontal bars in groups of one method each, a colour per pattern, with the standard deviation over seeds."""
    matplotlib.use("svg")
    models, methods, patterns = (list(rows[column].unique()) for column in ("model", "method", "pattern"))
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(models), sharey=True, squeeze=False, figsize=(3.6 * len(models) + 1.5, 0.55 * len(methods) + 1.4)
        )
        for panel, model in zip(panels[0], models, strict=True):
            _draw_model(panel, rows[rows["model"] == model], methods, patterns)
            panel.set_title(model)
        panels[0][0].set_yticks(range(len(methods)), methods)
        panels[0][0].invert_yaxis()
        colours = [Patch(color=f"C{number}", label=pattern) for number, pattern in enumerate(patterns)]
        panels[0][-1].legend(handles=colours, title="pattern", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _draw_model(panel: Any, rows: DataFrame, methods: Sequence[str], patterns: Sequence[str]) -> None:
    measured, height = quality_cells(rows).reindex(methods, level="method"), 0.8 / len(patterns)
    for number, pattern in enumerate(patterns):
        cells = measured[measured.index.get_level_values("pattern") == pattern]
        places = [methods.index(method) for method, _ in cells.index]
        panel.barh(
            [place + (number - (len(patterns) - 1) / 2) * height for place in places],
            100 * cells["mean"],
            height,
            xerr=100 * cells["spread"],
            color=f"C{number}",
            error_kw={"linewidth": 0.8},
        )
    panel.set_xlabel("gap closed, %")
    panel.grid(axis="x", linewidth=0.4)
    panel.set_axisbelow(True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the file and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=DATA / "quality.csv", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "quality.svg")
    args = parser.parse_args(arguments)
    rows = read_frame(args.csv)
    if rows.empty:
        parser.error(f"{args.csv} has no rows; run python -m benchmarks.quality first")
    draw(rows, args.out)


if __name__ == "__main__":
    main()
