"""The rows in benchmarks/data as tables of a Markdown page, each between two markers.

The markers are `<!-- layer -->` and `<!-- /layer -->`, and the same for the other names in `TABLES`. A page has those
that it wants.

python -m benchmarks.tables --write docs/performance.md
python -m benchmarks.tables --check docs/pruning.md      # exit code 1 where the page is not up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pandas import DataFrame

from benchmarks.common import DATA
from benchmarks.quality_tables import bits_table, pruned_table, quality_table, rates_table, start_table
from benchmarks.speed_tables import (
    criteria_table,
    decode_table,
    layer_table,
    merging_table,
    step_table,
    streaming_table,
)
from benchmarks.table_cells import NOT_MEASURED, read_frame

TABLES: dict[str, tuple[str, Callable[[DataFrame], str]]] = {
    "layer": ("layer.csv", layer_table),
    "step": ("step.csv", step_table),
    "decode": ("decode.csv", decode_table),
    "rates": ("rates.csv", rates_table),
    "criteria": ("pruning.csv", criteria_table),
    "streaming": ("streaming.csv", streaming_table),
    "merging": ("merging.csv", merging_table),
    "pruned": ("pruned_quality.csv", pruned_table),
    "bits": ("bits.csv", bits_table),
    "start": ("pruned_quality.csv", start_table),
    "quality": ("quality.csv", quality_table),
}
"""Name of the marker -> file of rows, and how they become Markdown."""


def tables(folder: Path = DATA) -> dict[str, str]:
    """Name of the marker -> Markdown."""
    return {name: _table(read_frame(folder / file), make) for name, (file, make) in TABLES.items()}


def _table(rows: DataFrame, make: Callable[[DataFrame], str]) -> str:
    return NOT_MEASURED if rows.empty else make(rows)


def replaced(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables between their markers.

    Raises:
        ValueError: there are none, or one has no end.
    """
    wanted = [name for name in made if f"<!-- {name} -->" in page]
    if not wanted:
        raise ValueError(f"the page has no marker: <!-- {' -->, <!-- '.join(made)} -->")
    for name in wanted:
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not between.search(page):
            raise ValueError(f"the page has no <!-- {name} --> on a line of its own with <!-- /{name} --> after it")
        page = between.sub(lambda found, table=made[name]: f"{found[1]}\n{table}\n\n{found[2]}", page, count=1)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or check a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="PATH", help="put the tables into this page")
    what.add_argument("--check", type=Path, metavar="PATH", help="only say whether its tables are these")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the CSV files (default: %(default)s)")
    args = parser.parse_args(arguments)
    path = args.write or args.check
    page = path.read_text(encoding="utf-8")
    try:
        new = replaced(page, tables(args.data))
    except ValueError as error:
        parser.error(f"{path}: {error}")
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif new != page:
        sys.exit(f"{path} is not up to date; run: python -m benchmarks.tables --write {path}")


if __name__ == "__main__":
    main()
