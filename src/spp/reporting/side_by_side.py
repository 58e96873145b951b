"""Several runs side by side: their figures, their loss curves, and the differences in their protocols."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from spp.reporting.charts import Bar, bar_chart
from spp.reporting.inputs import Run
from spp.reporting.key_values import facts
from spp.reporting.line_chart import Line, line_chart, swatch
from spp.reporting.results import Protocol, RunResults, Training
from spp.reporting.sections import finite_points
from spp.reporting.summary import gap, gap_value, perplexities, subject, verdict
from spp.reporting.tensor_table import Entry
from spp.reporting.units import duration, figure, share, size

_MISSING = "none"
_LABEL = 40
"""Most characters of a bar's label that fit on a phone."""
_PROVED = {"good": "yes", "bad": "FAILED", "unknown": "no proof"}
_QUALITY = (
    "Model", "Pattern", "Criterion", "Sparsity", "Dense", "Pruned", "SPP", "Gap closed", "Trainable", "Time",
    "Peak memory", "Verified",
)  # fmt: skip
_CURVES = ("Steps", "Tokens", "First loss", "Last loss", "Tokens/s", "Peak memory")


def overall_verdict(runs: Sequence[Run]) -> dict[str, Any]:
    """The verdict on all runs: that of the worst run; its problems are the names of the failed runs."""
    states = [verdict(run.results)["state"] for run in runs]
    failed = [run.name for run, state in zip(runs, states, strict=True) if state == "bad"]
    unknown = [run.name for run, state in zip(runs, states, strict=True) if state == "unknown"]
    found = {"problems": failed, "more": 0}
    if failed:
        sentence = "FAILED: what these runs fine-tuned must not be taken for a sparse model."
        return found | {
            "state": "bad",
            "title": f"Verification failed in {len(failed)} of {len(runs)} runs",
            "sentence": sentence,
        }
    if unknown:
        sentence = f"No proof that the zeros were kept is held by {', '.join(unknown)}."
        return found | {
            "state": "unknown",
            "title": f"Not verified: {len(unknown)} of {len(runs)} runs",
            "sentence": sentence,
        }
    sentence = "Proved: all zeros of the pruned models are an exact +0.0 in the fine-tuned ones."
    return found | {"state": "good", "title": f"Sparsity kept in all {len(runs)} runs", "sentence": sentence}


def quality_table(runs: Sequence[Run]) -> dict[str, Any]:
    """The headings, and the entries of a row for each run."""
    return {"headings": _QUALITY, "rows": [_quality(run.results) for run in runs]}


def _quality(results: RunResults) -> list[Entry]:
    models, about = perplexities(results), subject(results)
    seconds, closed = results.seconds, gap_value(results)
    return [
        *(Entry(about[name] or "", None) for name in ("model", "pattern", "criterion")),
        _entry(results.sparsity.overall, share),
        *(_entry(models.get(name), figure) for name in ("dense", "pruned", "spp")),
        Entry(gap(results)[0], "" if closed is None else repr(closed)),
        _entry(results.training.trainable_parameters, "{:,}".format),
        _entry(sum(seconds.values()) if seconds else None, duration),
        _entry(results.peak_rss_bytes, size),
        Entry(_PROVED[verdict(results)["state"]], None),
    ]


def _entry(value: Any, write: Any) -> Entry:
    return Entry("", "") if value is None else Entry(write(value), repr(value))


def curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """All loss curves in one chart, with a table as their legend: number, name and figures of each run."""
    lines, rows = [], []
    for number, run in enumerate(runs, 1):
        training = run.results.training
        points = finite_points(training.losses)
        if not points:
            continue
        rows.append((number, run.name, swatch(len(lines)), _curve(training, points)))
        lines.append(Line(str(number), points))
    if not lines:
        return None
    chart = line_chart("losses", "Training loss of the runs", lines, "optimizer step", "loss, nats per token")
    return {"chart": chart, "headings": _CURVES, "rows": rows, "left_out": len(runs) - len(lines)}


def _curve(training: Training, points: Sequence[tuple[float, float]]) -> list[Entry]:
    return [
        _entry(training.steps, "{:,}".format),
        _entry(training.tokens, "{:,}".format),
        _entry(points[0][1], figure),
        _entry(points[-1][1], figure),
        _entry(training.tokens_per_second, "{:,.0f}".format),
        _entry(training.peak_memory_bytes, size),
    ]


def protocols(runs: Sequence[Run]) -> dict[str, Any]:
    """The runs' protocols: `same` for all, `differing`, and `warnings` that perplexities cannot be compared."""
    found = [run.results.protocol for run in runs]
    compared = side_by_side([facts(_evaluation(protocol)) for protocol in found])
    rest = side_by_side([facts(protocol.plain(), skip={"evaluation", "criterion_title"}) for protocol in found])
    return {
        "warnings": compared["differing"],
        "differing": rest["differing"],
        "same": grouped(rest["same"]) + grouped(compared["same"], "Evaluation"),
    }


def _evaluation(protocol: Protocol) -> dict[str, Any]:
    """How perplexity was measured, without the time that it took."""
    return {key: value for key, value in protocol.evaluation.items() if key != "seconds"}


def side_by_side(columns: Sequence[Iterable[tuple[str, str]]]) -> dict[str, Any]:
    """Facts of several runs: `differing` ones as label and the text of each run, `same` ones as label and text."""
    runs = [dict(column) for column in columns]
    found = list(dict.fromkeys(label for run in runs for label in run))
    # If one run has several facts under a label, a run that has "none" there lacks each of them.
    labels = [label for label in found if not any(other.startswith(f"{label}: ") for other in found)]
    rows = [(label, [run.get(label, _MISSING) for run in runs]) for label in labels]
    return {
        "differing": [(label, texts) for label, texts in rows if len(set(texts)) > 1],
        "same": [(label, texts[0]) for label, texts in rows if len(set(texts)) == 1],
    }


def grouped(rows: Sequence[tuple[str, str]], plain: str = "Run") -> list[tuple[str, list[tuple[str, str]]]]:
    """Caption and rows of a table for facts without a prefix, named `plain`, and of one for each prefix of labels."""
    tables: dict[str, list[tuple[str, str]]] = {}
    for label, text in rows:
        part, colon, rest = label.partition(": ")
        caption = part.replace("_", " ").capitalize() if colon else plain
        tables.setdefault(caption, []).append((rest if colon else label, text))
    return list(tables.items())


def gap_chart(runs: Sequence[Run]) -> Markup:
    """A bar for the gap that each run closed, if it is defined."""
    bars = []
    for number, run in enumerate(runs, 1):
        closed = gap_value(run.results)
        label = f"{number} {run.name}"
        label = label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
        bars.append(Bar(label, math.nan if closed is None else closed, gap(run.results)[0]))
    return bar_chart("gaps", "Gap closed by each run, higher is better", bars, full=1)
