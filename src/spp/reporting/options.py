"""Options of reports."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from spp.options import Options


class ReportOptions(Options):
    """`spp report RUN [RUN ...]`: one page about the results of one run or of several."""

    runs: tuple[Path, ...] = Field(min_length=1, description="folders that spp run wrote, or their results.json")
    out: Path = Field(Path("report.html"), description="HTML file for the page", json_schema_extra={"metavar": "FILE"})
    benchmarks: tuple[Path, ...] = Field(
        (),
        description="CSV files of benchmark rows, as the scripts in benchmarks/ write them, to show as well",
        json_schema_extra={"metavar": "FILE"},
    )
    overwrite: bool = Field(False, description="replace the output file if it exists")
