"""Scores of several models side by side: a table for the terminal, and a chart in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from spp.checkpoints.json_files import write_text
from spp.errors import UsageError
from spp.reporting.charts import Bar, bar_chart, standalone
from spp.reporting.units import figure

if TYPE_CHECKING:
    from spp.evaluation.perplexity import EvalReport
    from spp.evaluation.tasks import TasksReport

_SHADES = 4
_LONGEST = 30  # characters of a model's name in a chart


@dataclass(frozen=True)
class Comparison:
    """Reports by the name of the model, and the chart's file if one was asked for."""

    models: Mapping[str, EvalReport | TasksReport]
    plot: Path | None


def check_plot(path: Path, overwrite: bool) -> None:
    """Check the chart's file before any work is done.

    Raises:
        UsageError: it does not end in .svg, its folder is missing, it is a folder, or it exists without `overwrite`.
    """
    if path.suffix != ".svg":
        raise UsageError(f"plot {path}: charts are SVG; name a file that ends in .svg")
    if not path.parent.is_dir():
        raise UsageError(f"plot {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"plot {path} is a folder; name a file with --plot")
    if path.exists() and not overwrite:
        raise UsageError(f"plot {path} exists; name another file with --plot, or pass --overwrite")


def write_plot(comparison: Comparison) -> None:
    """Draw one bar per measure and model, if a chart was asked for."""
    if comparison.plot is None:
        return
    labels = _short_names(list(comparison.models))
    bars = [
        Bar(f"{measure}: {labels[model]}", values[model][0], values[model][1], f"shade{index % _SHADES}")
        for measure, values in measures(comparison.models).items()
        for index, model in enumerate(comparison.models)
        if model in values
    ]
    write_text(comparison.plot, standalone(bar_chart("scores", "Scores side by side", bars)))


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """Names short enough for a chart: the last part of each path if that tells the models apart."""
    last = [Path(model).name for model in models]
    names = last if len(set(last)) == len(last) else models
    cut = [name if len(name) <= _LONGEST else "..." + name[3 - _LONGEST :] for name in names]
    return dict(zip(models, cut, strict=True))


def comparison_table(comparison: Comparison) -> Table:
    """One row per measure, one column per model."""
    table = Table("", *comparison.models, box=None)
    for measure, values in measures(comparison.models).items():
        table.add_row(measure, *(values[model][1] if model in values else "" for model in comparison.models))
    return table


def measures(models: Mapping[str, EvalReport | TasksReport]) -> dict[str, dict[str, tuple[float, str]]]:
    """Measure -> model -> (value, the value as text)."""
    rows: dict[str, dict[str, tuple[float, str]]] = {}
    for model, report in models.items():
        for measure, value, text in _values(report):
            rows.setdefault(measure, {})[model] = (value, text)
    return rows


def _values(report: EvalReport | TasksReport) -> Iterator[tuple[str, float, str]]:
    from spp.evaluation.tasks import TasksReport

    if not isinstance(report, TasksReport):
        yield "perplexity", report.perplexity, figure(report.perplexity)
        return
    for name, score in report.tasks.items():
        if score.part_of is None:
            for metric, found in score.metrics.items():
                yield f"{name} {metric}", found.value, with_error(found.value, found.stderr)
    if mean := report.mean:
        yield f"mean acc of {len(mean.tasks)}", mean.value, with_error(mean.value, mean.stderr)


def with_error(value: float, stderr: float | None) -> str:
    """`0.4512 ± 0.0087`; the value alone if its standard error is unknown."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
