"""The report of a run: one HTML page that needs nothing but itself, and a table for the terminal.

Both are made from what `results.json` holds. A part that an older file lacks is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from spp.folders import write_text
from spp.stages import tensor_table
from spp.stages.charts import Bar, Cell, bar_chart, heat_map, line_chart
from spp.stages.quantities import duration, figure, share, size

_MODELS = {"dense": "dense", "pruned": "pruned", "spp": "pruned + SPP"}
_CRITERIA = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
_PROBLEMS_SHOWN = 20
_LABELS = {
    "unit": "perplexity is per",
    "per_document": "each document by itself",
    "train": "training data",
    "seconds": "time",
    "lm_eval": "lm_eval",
}
_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+?)(?:\.weight)?$")


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("spp"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template("report.html.j2").render(_page(results)))


def summary_table(results: Mapping[str, Any]) -> Table:
    """What came out, in a few rows."""
    table = Table(show_header=False, box=None)
    rows = [(f"{_MODELS[name]} perplexity", figure(value)) for name, value in _perplexities(results).items()]
    rows.append(("verified", verdict(results)["sentence"]))
    rows += [(label.lower(), f"{value} ({meaning})") for label, value, meaning in _headline(results)]
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the zeros were kept: state (`good`, `bad`, `unknown`), a sentence, and the first of the problems."""
    verification = results.get("verification") or {}
    verified = results.get("verified", verification.get("verified"))
    problems = verification.get("problems") or []
    if verified:
        counted = f"all {verification['zeros']:,} zeros" if "zeros" in verification else "all zeros"
        state, sentence = "good", f"Proved: {counted} of the pruned model are an exact +0.0 in the fine-tuned one."
    elif verified is None:
        state, sentence = "unknown", "This run holds no proof that the zeros were kept."
    else:
        found = f" with {len(problems)} problem{'' if len(problems) == 1 else 's'}" if problems else ""
        state, sentence = "bad", f"FAILED{found}: the fine-tuned model must not be taken for a sparse one."
    return {
        "state": state,
        "sentence": sentence,
        "problems": problems[:_PROBLEMS_SHOWN],
        "more": max(len(problems) - _PROBLEMS_SHOWN, 0),
    }


def _perplexities(results: Mapping[str, Any]) -> dict[str, float]:
    found = results.get("perplexity") or {}
    return {name: found[name] for name in _MODELS if found.get(name) is not None}


def _headline(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that people ask for first: label, value, and what it means."""
    rows = [("Gap closed", *_gap(results))]
    sparsity = results.get("sparsity") or {}
    if sparsity.get("overall") is not None:
        matrices = f"of {len(sparsity.get('tensors') or {})} matrices"
        skipped = len(sparsity.get("skipped") or [])
        rows.append(("Sparsity", share(sparsity["overall"]), matrices + (f"; {skipped} left dense" if skipped else "")))
    if seconds := results.get("seconds"):
        rows.append(("Time", duration(sum(seconds.values())), f"{len(seconds)} stages"))
    if peak := results.get("peak_rss_bytes"):
        rows.append(("Peak memory", size(peak), "resident, of the whole process"))
    return rows


def _gap(results: Mapping[str, Any]) -> tuple[str, str]:
    gap = results.get("gap_closed")
    if gap is None or not math.isfinite(gap):
        return "not defined", _why_no_gap(_perplexities(results))
    if gap < 0:
        return share(gap), "fine-tuning made the model worse"
    return share(gap), "of the loss that pruning cost"


def _why_no_gap(models: Mapping[str, float]) -> str:
    if len(models) < len(_MODELS):
        return "perplexities are missing"
    if not all(map(math.isfinite, models.values())):
        return "perplexities are not finite"
    return "pruning did not raise the perplexity"


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows, as text and charts."""
    protocol = results.get("protocol") or {}
    model = _short(str(protocol.get("model") or "a model"))
    return {
        "model": model,
        "pattern": protocol.get("pattern"),
        "criterion": _CRITERIA.get(protocol.get("criterion", ""), protocol.get("criterion")),
        "verdict": verdict(results),
        "headline": _headline(results),
        "perplexity": _perplexity_section(results),
        "training": _training_section(results.get("training") or {}),
        "layers": _layer_charts(results),
        "skipped": (results.get("sparsity") or {}).get("skipped") or [],
        "tensors": tensor_table.tensor_table(results),
        "protocol": _protocol_tables(protocol),
        "environment": list(facts(results.get("environment") or {})),
        "versions": list(facts(results.get("versions") or {}, missing="not installed")),
        "options": list(facts(results.get("options") or {}, missing="default")),
        "stages": _stage_chart(results.get("seconds") or {}),
        "command": results.get("command"),
        "version": (results.get("versions") or {}).get("spp"),
    }


def _short(model: str) -> str:
    """A folder by its last name alone; a hub id as it is."""
    return Path(model).name or model if model.startswith(("/", ".", "~")) or model.count("/") > 1 else model


def _perplexity_section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    models = _perplexities(results)
    if not models:
        return None
    bars = [Bar(_MODELS[name], value, figure(value), name) for name, value in models.items()]
    dense = models.get("dense")
    rows = [
        (
            _MODELS[name],
            figure(value),
            figure(math.log(value)) if value > 0 else "",
            f"{value / dense:.3f} x" if dense and math.isfinite(value / dense) else "",
        )
        for name, value in models.items()
    ]
    return {"chart": bar_chart("perplexity", "Perplexity of the three models, lower is better", bars), "rows": rows}


def _training_section(training: Mapping[str, Any]) -> dict[str, Any] | None:
    if not training:
        return None
    points = [(step, loss) for step, loss in training.get("losses") or [] if math.isfinite(loss)]
    chart = None
    if points:
        chart = line_chart("loss", "Training loss by optimiser step", points, "optimiser step", "loss, nats per token")
    return {
        "chart": chart,
        "note": _loss_note(len(training.get("losses") or []), len(points)),
        "facts": list(facts(training, skip={"losses", "out"})),
    }


def _loss_note(recorded: int, drawn: int) -> str:
    if not recorded:
        return "No losses were recorded."
    return f"{recorded - drawn} of {recorded} losses are not finite and not drawn." if drawn < recorded else ""


def _layer_charts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Heat maps of layers by kinds of matrices: sparsity, and the largest relative change."""
    pruned = (results.get("sparsity") or {}).get("tensors") or {}
    compared = (results.get("verification") or {}).get("tensors") or {}
    sparsities = {name: tensor["sparsity"] for name, tensor in pruned.items()}
    names = [name for name in pruned or compared if name in compared]  # one order of rows in both charts
    changes = {name: compared[name]["largest_relative_change"] for name in names}
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
            charts.append({"title": title, "svg": heat_map(name, title, cells, high, "layer"), "note": note})
    return charts


def _cells(values: Mapping[str, float]) -> dict[tuple[str, int], Cell]:
    """Cells by (kind, layer) of tensors with a layer number in their names; experts share one: the largest of them."""
    largest: dict[tuple[str, int], float] = {}
    for name, value in values.items():
        if found := _LAYER.match(name):
            key = re.sub(r"\.\d+\.", ".*.", found[2]), int(found[1])
            largest[key] = max(value, largest.get(key, value))
    return {
        (kind, layer): Cell(value, _percent(value), f"layer {layer}, {kind}: {share(value)}")
        for (kind, layer), value in largest.items()
    }


def _percent(value: float) -> str:
    """A percentage that fits a cell."""
    if not math.isfinite(value):
        return "!"
    return f"{value * 100:.0f}" if value < 9.995 else f"{value * 100:.0e}".replace("e+0", "e")


def _protocol_tables(protocol: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Caption and rows of one table for the plain facts, and of one for each nested part."""
    parts = {key: value for key, value in protocol.items() if isinstance(value, Mapping)}
    tables = [("Run", list(facts(protocol, skip=parts)))]
    tables += [(key.replace("_", " ").capitalize(), list(facts(part, skip={"seconds"}))) for key, part in parts.items()]
    return [(caption, rows) for caption, rows in tables if rows]


def _stage_chart(seconds: Mapping[str, float]) -> Markup | None:
    if not seconds:
        return None
    bars = [Bar(name.replace("_", " "), value, duration(value)) for name, value in seconds.items()]
    return bar_chart("stages", "Time of each stage", bars)


def facts(
    values: Mapping[str, Any], *, skip: Collection[str] = (), missing: str = "none", prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Rows of label and text for any nested mapping, so that a key which is new or gone is no problem."""
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, Mapping):
            yield from facts(value, missing=missing, prefix=f"{prefix}{key}: ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                yield from facts(item, missing=missing, prefix=f"{prefix}{key} {index}: ")
        else:
            label = _LABELS.get(key, key.removesuffix("_bytes").replace("_", " "))
            yield prefix + label, _text(key, value, missing)


def _text(key: str, value: Any, missing: str) -> str:
    match value:
        case None | []:
            return missing
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
        case int() | float() if key.endswith("_bytes"):
            return size(value)
        case int() | float() if key == "seconds":
            return duration(value)
        case float() if key == "sparsity":
            return share(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)
