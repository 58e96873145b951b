"""Draw the rows of bits.csv: perplexity above the dense model's by bits per weight, one panel per model.

    python -m benchmarks.bits_plot [--csv FILE] [--out docs/images/bits.svg]

It needs matplotlib, which the extra `bench` brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from pandas import DataFrame

from benchmarks.common import DATA, ROOT
from benchmarks.plots import STYLE
from benchmarks.quality_tables import bits_cells
from benchmarks.table_cells import read_frame


def draw(rows: DataFrame, out: Path) -> None:
    """A line per pattern through what error feedback reaches; dense is black. Models with one pattern are left out."""
    matplotlib.use("svg")
    fed = rows[rows["method"] == "feedback"].groupby("model", sort=False)["pattern"].nunique()
    models, patterns = list(fed[fed > 1].index), list(rows["pattern"].unique())
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(models), squeeze=False, figsize=(3.6 * len(models) + 1.5, 3.4))
        for panel, model in zip(panels[0], models, strict=True):
            _draw_model(panel, bits_cells(rows[rows["model"] == model]), patterns)
            panel.set_title(model)
        panels[0][0].set_ylabel("perplexity above dense bf16, %")
        panels[0][-1].legend(title="weights", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _draw_model(panel: Any, cells: DataFrame, patterns: Sequence[str]) -> None:
    for number, pattern in enumerate(patterns):
        points = cells[(cells["pattern"] == pattern) & (cells["method"] == "feedback")].sort_values("bits_per_weight")
        colour = "black" if pattern == "dense" else f"C{number}"
        panel.plot(points["bits_per_weight"], 100 * points["above"], marker="o", color=colour, label=pattern)
    panel.set_xlabel("bits per weight")
    panel.set_yscale("symlog", linthresh=1)
    panel.grid(linewidth=0.4)
    panel.set_axisbelow(True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the file and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits_plot", description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=DATA / "bits.csv", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "bits.svg")
    args = parser.parse_args(arguments)
    rows = read_frame(args.csv)
    if rows.empty:
        parser.error(f"{args.csv} has no rows; run python -m benchmarks.bits first")
    draw(rows, args.out)


if __name__ == "__main__":
    main()
