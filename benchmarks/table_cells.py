"""What the tables share: the rows of a CSV file as a frame of texts, the last run of each configuration, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.common import significant

RUN = ["device", "hardware", "instructions", "threads"]
"""The columns that say where a row was measured."""

NOT_MEASURED = "Not measured."


def read_frame(path: Path) -> DataFrame:
    """The rows of a CSV file, as texts; none where there is no file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else DataFrame()


def latest(rows: DataFrame, configuration: Sequence[str]) -> DataFrame:
    """The last run of each configuration, in order, so that a line's numbers were measured together."""
    last = rows.groupby(list(configuration))["date"].transform("last")
    runs = rows[rows["date"] == last].drop_duplicates([*configuration, "method"], keep="last")
    return in_order(runs, configuration)


def in_order(rows: DataFrame, columns: Sequence[str]) -> DataFrame:
    """Sorted by columns, numbers as numbers, also those in front of an x: 4096x11008 before 11008x4096."""
    return rows.sort_values(list(columns), key=_sortable)


def _sortable(texts: Series) -> Series:
    numbers = texts.str.extract(r"^(\d+(?:\.\d+)?)", expand=False).fillna("0").astype(float)
    return numbers.map("{:020.6f}".format) + texts


def by_method(rows: DataFrame, configuration: Sequence[str], column: str) -> DataFrame:
    """A line per configuration, in the order of the rows, with a column per method; empty where it was not measured."""
    lines = pd.MultiIndex.from_frame(rows[list(configuration)].drop_duplicates())
    return rows.pivot(index=list(configuration), columns="method", values=column).reindex(lines).fillna("")


def with_configuration(cells: DataFrame, headings: Mapping[str, str]) -> DataFrame:
    """Cells under their headings, behind the hardware and the named parts of their configuration.

    Args:
        cells: as `by_method` has them.
        headings: part of the configuration -> heading.
    """
    parts = cells.index.to_frame()
    parts["hardware"] = hardware(parts)
    return pd.concat([parts[["hardware", *headings]].rename(columns=dict(headings)), cells], axis=1)


def hardware(rows: DataFrame) -> Series:
    """The machine in words."""
    cpu = rows["hardware"] + " (" + rows["instructions"] + "), " + rows["threads"] + " threads"
    return rows["hardware"].where(rows["device"] == "cuda", cpu)


def number(text: str) -> str:
    """A number, or a dash where there is none."""
    return significant(float(text)) if text else "–"


def gigabytes(counts: Series) -> Series:
    """Bytes as GB."""
    return (counts.astype(int) / 1e9).map("{:.3g}".format)


def mebibytes(counts: Series) -> Series:
    """Bytes as MiB."""
    return (counts.astype(int) / 2**20).map("{:.0f}".format)


def percent(shares: Series) -> Series:
    """Shares as whole percents."""
    return shares.astype(float).map("{:.0%}".format)


def with_gpu_line(table: DataFrame, rows: DataFrame) -> DataFrame:
    """The table, with a line that says so where no row was measured on a GPU."""
    if (rows["device"] == "cuda").any():
        return table
    line = DataFrame([["NVIDIA H100", "not measured"]], columns=table.columns[:2])
    return pd.concat([table, line]).fillna("")


def markdown(table: DataFrame) -> str:
    """A frame of texts as a table of a Markdown page."""
    if table.empty:
        return NOT_MEASURED
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
