"""`spp report`: the report of one run or of several, as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output_file
from spp.checkpoints.json_files import write_text
from spp.checkpoints.lock import locked
from spp.errors import Problems
from spp.reporting import side_by_side
from spp.reporting.benchmark_table import benchmark_table
from spp.reporting.inputs import Benchmark, Run, read_benchmark, read_results, results_path, run_names
from spp.reporting.key_values import facts
from spp.reporting.options import ReportOptions
from spp.reporting.sections import run_sections


@dataclass(frozen=True, kw_only=True)
class ReportReport:
    """The result of `report`: the page, the names of its runs, and why their perplexities cannot be compared."""

    out: Path
    runs: list[str]
    differences: list[str]


def report(options: ReportOptions) -> ReportReport:
    """Write one page about the results of one run or of several.

    Raises:
        UsageError: a run or a benchmark is missing, unfinished or of another kind, or the output exists.
        SppError: a file cannot be read. Both list every problem.
    """
    problems = Problems()
    inputs = [*map(results_path, options.runs), *options.benchmarks]
    problems.of(check_output_file, options.out, options.overwrite, inputs)
    names = problems.of(run_names, options.runs)
    results = [problems.of(read_results, path) for path in options.runs]
    benchmarks = [problems.of(read_benchmark, path) for path in options.benchmarks]
    problems.raise_any()
    runs = [Run(name, found) for name, found in zip(names or [], results, strict=True) if found is not None]
    with locked(options.out):
        write_report(runs, options.out, [benchmark for benchmark in benchmarks if benchmark])
    differences = [label for label, _ in side_by_side.protocols(runs)["warnings"]]
    return ReportReport(out=options.out, runs=[run.name for run in runs], differences=differences)


def write_report(runs: Sequence[Run], path: Path, benchmarks: Sequence[Benchmark] = ()) -> None:
    """Write the page atomically: whole or not at all."""
    environment = Environment(
        loader=PackageLoader("spp.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_inline(environment, name) for name in ("report.css", "report.js"))
    page = _page(runs, benchmarks) | {"style": style, "script": script, "hashes": tuple(map(_hash, (style, script)))}
    write_text(path, environment.get_template("report.html.j2").render(page))


def _inline(environment: Environment, name: str) -> Markup:
    """One of our own template files, not escaped."""
    loader = environment.loader
    assert loader
    return Markup("\n" + loader.get_source(environment, name)[0])


def _hash(text: str) -> str:
    """The hash by which the page's content security policy allows an inline style or script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _page(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """The template's variables: text and charts."""
    several = len(runs) > 1
    sections = [run_sections(run, f"run-{number}-" if several else "") for number, run in enumerate(runs, 1)]
    return {
        "runs": sections,
        "protocol": side_by_side.protocols(runs),
        "machine": _machine(runs),
        "benchmarks": [benchmark_table(benchmark) for benchmark in benchmarks],
        "version": __version__,
        "comparison": _comparison(runs) if several else None,
    }


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "verdict": side_by_side.overall_verdict(runs),
        "quality": side_by_side.quality_table(runs),
        "gaps": side_by_side.gap_chart(runs),
        "curves": side_by_side.curves(runs),
    }


def _machine(runs: Sequence[Run]) -> dict[str, Any]:
    hardware = [facts(run.results.environment) for run in runs]
    versions = [facts(run.results.versions, missing="not installed") for run in runs]
    return {"hardware": side_by_side.side_by_side(hardware), "versions": side_by_side.side_by_side(versions)}
