"""The sections of the report on one run, as text and charts. A section that an older file lacks is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from spp.reporting.charts import Bar, Cell, bar_chart, heat_map
from spp.reporting.inputs import Run
from spp.reporting.key_values import facts
from spp.reporting.line_chart import Line, line_chart
from spp.reporting.results import Point, RunResults, Training
from spp.reporting.summary import MODELS, headline, perplexities, subject, verdict
from spp.reporting.tensor_table import tensor_table
from spp.reporting.units import duration, figure, share

_DRAWN_BELOW = 1e30  # no loss is larger, but a damaged one; sums and differences of larger ones may be infinite
_LAYER = re.compile(r"^(?:.*?\.)?(\d{1,4})\.(.+?)(?:\.weight)?$")


def run_sections(run: Run, prefix: str) -> dict[str, Any]:
    """The template's variables for one run; `prefix` makes its ids unique in the page."""
    results = run.results
    return {
        "name": run.name,
        "prefix": prefix,
        "subject": subject(results),
        "verdict": verdict(results),
        "headline": headline(results),
        "perplexity": _perplexity_section(results, prefix),
        "training": _training_section(results.training, prefix),
        "layers": _layer_charts(results, prefix),
        "skipped": results.sparsity.skipped,
        "tensors": tensor_table(results),
        "stages": _stage_chart(results.seconds, prefix),
        "options": list(facts(results.options, missing="default")),
        "command": results.command,
    }


def _perplexity_section(results: RunResults, prefix: str) -> dict[str, Any] | None:
    models = perplexities(results)
    if not models:
        return None
    bars = [Bar(MODELS[name], value, figure(value), name) for name, value in models.items()]
    dense = models.get("dense")
    rows = [
        (
            MODELS[name],
            figure(value),
            figure(math.log(value)) if value > 0 else "",
            f"{value / dense:.3f} x" if dense and math.isfinite(value / dense) else "",
        )
        for name, value in models.items()
    ]
    chart = bar_chart(f"{prefix}perplexity", "Perplexity of the models, lower is better", bars)
    return {"chart": chart, "rows": rows}


def _training_section(training: Training, prefix: str) -> dict[str, Any] | None:
    known = training.plain()
    if not known:
        return None
    losses = finite_points(training.losses)
    lines = [Line("training", losses)] if losses else []
    if validation := finite_points(training.validation):
        lines.append(Line("validation", validation, smooth=False))
    chart = None
    if lines:
        chart = line_chart(f"{prefix}loss", "Loss by optimizer step", lines, "optimizer step", "loss, nats per token")
    return {
        "chart": chart,
        "note": _loss_note(len(training.losses), len(losses)),
        "facts": list(facts(known, skip={"losses", "validation", "rates_tried", "out"})),
    }


def finite_points(points: Iterable[Point]) -> list[tuple[float, float]]:
    """(step, loss) of every recorded loss that can be drawn."""
    return [(step, loss) for step, loss in points if abs(step) < _DRAWN_BELOW and abs(loss) < _DRAWN_BELOW]


def _loss_note(recorded: int, drawn: int) -> str:
    if not recorded:
        return "No losses were recorded."
    return f"{recorded - drawn} of {recorded} losses are not finite and not drawn." if drawn < recorded else ""


def _layer_charts(results: RunResults, prefix: str) -> list[dict[str, Any]]:
    """Heat maps over layers and kinds of matrices: sparsity, and the largest relative change."""
    pruned, compared = results.sparsity.tensors, results.verification.tensors
    sparsities = {name: one.sparsity for name, one in pruned.items()}
    shown = [name for name in pruned or compared if name in compared]  # the same order of rows in both charts
    changes = {name: compared[name].largest_relative_change for name in shown}
    charts = []
    for name, title, values, ceiling in (
        ("sparsity", "Sparsity after pruning", sparsities, 1.0),
        ("change", "Largest relative change of a survivor", changes, None),
    ):
        if cells := _cells(values):
            high = ceiling or max((cell.value for cell in cells.values() if math.isfinite(cell.value)), default=1.0)
            note = f"Per cent, from 0% (faint) to {share(high)} (full)."
            if any("*" in kind for kind, _ in cells):
                note += " Experts of a layer share a cell: the largest value of any."
            chart = heat_map(f"{prefix}{name}", title, cells, high, "layer")
            charts.append({"title": title, "svg": chart, "note": note})
    return charts


def _cells(values: Mapping[str, float | None]) -> dict[tuple[str, int], Cell]:
    """(kind, layer) -> cell, of tensors with a layer number in their names; experts share the cell of the largest."""
    largest: dict[tuple[str, int], float] = {}
    for name, value in values.items():
        if value is not None and (found := _LAYER.match(name)):
            key = re.sub(r"\.\d+\.", ".*.", found[2]), int(found[1])
            largest[key] = max(value, largest.get(key, value))
    return {
        (kind, layer): Cell(value, _percent(value), f"layer {layer}, {kind}: {share(value)}")
        for (kind, layer), value in largest.items()
    }


def _percent(value: float) -> str:
    """A percentage short enough for a cell."""
    if not math.isfinite(value):
        return "!"
    return f"{value * 100:.0f}" if value < 9.995 else f"{value * 100:.0e}".replace("e+0", "e")


def _stage_chart(seconds: Mapping[str, float], prefix: str) -> Markup | None:
    if not seconds:
        return None
    bars = [Bar(name.replace("_", " "), value, duration(value)) for name, value in seconds.items()]
    return bar_chart(f"{prefix}stages", "Time of each stage", bars)
