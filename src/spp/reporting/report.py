"""The report of one run or of several: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output_file
from spp.checkpoints.json_files import write_text
from spp.errors import SppError, UsageError, raise_problems
from spp.reporting import side_by_side
from spp.reporting.benchmark_table import benchmark_table
from spp.reporting.inputs import Benchmark, Run, read_benchmark, read_results, results_path, run_names
from spp.reporting.key_values import facts
from spp.reporting.options import ReportOptions
from spp.reporting.sections import run_sections

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReportReport:
    """The result of `report`: the page, the names of its runs, and what keeps their perplexities from comparing."""

    out: Path
    runs: list[str]
    differences: list[str]


def report(options: ReportOptions) -> ReportReport:
    """Write one page about the results of one run or of several.

    Raises:
        UsageError: a run or a benchmark is missing, unfinished or something else, or the output exists.
        SppError: a file cannot be read. Either lists every problem.
    """
    failures = _Failures()
    inputs = [*map(results_path, options.runs), *options.benchmarks]
    failures.of(check_output_file, options.out, options.overwrite, inputs)
    names = failures.of(run_names, options.runs)
    results = [failures.of(read_results, path) for path in options.runs]
    benchmarks = [failures.of(read_benchmark, path) for path in options.benchmarks]
    failures.raise_any()
    runs = [Run(name, found) for name, found in zip(names or [], results, strict=True) if found is not None]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_report(runs, options.out, [benchmark for benchmark in benchmarks if benchmark])
    differences = [label for label, _ in side_by_side.protocols(runs)["warnings"]]
    return ReportReport(out=options.out, runs=[run.name for run in runs], differences=differences)


class _Failures:
    """Collects what goes wrong, so that a user sees all of it at once."""

    def __init__(self) -> None:
        self._errors: list[SppError] = []

    def of(self, work: Callable[P, T], *values: P.args, **named: P.kwargs) -> T | None:
        """What `work` returns, or None where it fails."""
        try:
            return work(*values, **named)
        except SppError as error:
            self._errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise one error about all of them: a wrong request where one is."""
        wrong = any(isinstance(error, UsageError) for error in self._errors)
        raise_problems([str(error) for error in self._errors], UsageError if wrong else SppError)


def write_report(runs: Sequence[Run], path: Path, benchmarks: Sequence[Benchmark] = ()) -> None:
    """Write the page, whole or not at all."""
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
    """One of our own files, to stand between tags as it is."""
    loader = environment.loader
    assert loader
    return Markup("\n" + loader.get_source(environment, name)[0])


def _hash(text: str) -> str:
    """What the page's policy allows an inline style or script by: nothing but these two is run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _page(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Everything that the template shows, as text and charts."""
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
