"""Draw the rows of quality.csv: what each method wins back, one panel per model.

    python benchmarks/plots.py [--csv FILE] [--out docs/images/quality.svg]

It needs matplotlib, which nothing else does: pip install matplotlib
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Python puts a script's folder first on the path, and there operator.py stands in for the library's `operator`.
    _here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(_here), *(entry for entry in sys.path if os.path.realpath(entry) != _here)]

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import DATA, read_rows
from benchmarks.tables import quality_cells

Row = Mapping[str, str]


def draw(rows: Sequence[Row], out: Path) -> None:
    """Horizontal bars in groups of one method each, a colour per pattern, with the standard deviation over seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "spp", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), sharey=True, squeeze=False, figsize=(3.6 * len(models) + 1.5, 0.55 * len(methods) + 1.4)
    )
    height = 0.8 / len(patterns)
    for panel, model in zip(panels[0], models, strict=True):
        cells = quality_cells(row for row in rows if row["model"] == model)
        for number, pattern in enumerate(patterns):
            there = [(index, cells[key]) for index, name in enumerate(methods) if (key := (name, pattern)) in cells]
            panel.barh(
                [index + (number - (len(patterns) - 1) / 2) * height for index, _ in there],
                [100 * cell.mean for _, cell in there],
                height,
                xerr=[100 * cell.spread for _, cell in there],
                color=f"C{number}",
                error_kw={"linewidth": 0.8},
            )
        panel.set_title(model)
        panel.set_xlabel("gap closed, %")
        panel.grid(axis="x", linewidth=0.4)
        panel.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(methods)), methods)
    panels[0][0].invert_yaxis()
    colours = [Patch(color=f"C{number}", label=pattern) for number, pattern in enumerate(patterns)]
    panels[0][-1].legend(handles=colours, title="pattern", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the file and draw it."""
    parser = argparse.ArgumentParser(prog="benchmarks/plots.py", description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=DATA / "quality.csv", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DATA.parents[1] / "docs" / "images" / "quality.svg")
    args = parser.parse_args(arguments)
    rows = read_rows(args.csv)
    if not rows:
        parser.error(f"{args.csv} has no rows; run benchmarks/quality.py first")
    draw(rows, args.out)


if __name__ == "__main__":
    main()
