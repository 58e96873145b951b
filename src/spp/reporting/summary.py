"""The results of a run in a few words and figures, for the top of the report and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from spp.reporting.results import RunResults
from spp.reporting.units import duration, figure, share, size

MODELS = {"dense": "dense", "pruned": "pruned", "reconstructed": "pruned + reconstructed", "spp": "pruned + SPP"}
_PROBLEMS_SHOWN = 20


def summary_table(results: RunResults) -> Table:
    """The results of a run as a table of a few rows."""
    table = Table(show_header=False, box=None)
    rows = [(f"{MODELS[name]} perplexity", figure(value)) for name, value in perplexities(results).items()]
    rows.append(("verified", verdict(results)["sentence"]))
    rows += [(label.lower(), f"{value} ({meaning})") for label, value, meaning in headline(results)]
    rows += [("WARNING", warning) for warning in results.warnings]
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def verdict(results: RunResults) -> dict[str, Any]:
    """Whether the zeros were kept: state (`good`, `bad`, `unknown`), title, sentence, and the first few problems."""
    verification = results.verification
    verified = verification.verified if results.verified is None else results.verified
    problems = verification.problems
    if verified:
        counted = f"all {verification.zeros:,} zeros" if verification.zeros is not None else "all zeros"
        state, title = "good", "Sparsity kept"
        sentence = f"Proved: {counted} of the pruned model are an exact +0.0 in the fine-tuned one."
    elif verified is None:
        state, title = "unknown", "Not verified"
        sentence = "This run holds no proof that the zeros were kept."
    else:
        found = f" with {len(problems)} problem{'' if len(problems) == 1 else 's'}" if problems else ""
        state, title = "bad", "Verification failed: sparsity not kept"
        sentence = f"FAILED{found}: the fine-tuned model must not be taken for a sparse one."
    return {
        "state": state,
        "title": title,
        "sentence": sentence,
        "problems": problems[:_PROBLEMS_SHOWN],
        "more": max(len(problems) - _PROBLEMS_SHOWN, 0),
    }


def subject(results: RunResults) -> dict[str, str | None]:
    """The run's model and pattern, and the name of its criterion as in papers."""
    protocol = results.protocol
    return {
        "model": _short(protocol.model or "a model"),
        "pattern": protocol.pattern,
        "criterion": protocol.criterion_title or protocol.criterion,
    }


def _short(model: str) -> str:
    """The last part of a folder's path; a hub id as it is."""
    return Path(model).name or model if model.startswith(("/", ".", "~")) or model.count("/") > 1 else model


def perplexities(results: RunResults) -> dict[str, float]:
    """The known perplexities of the dense, the pruned, perhaps the reconstructed, and the fine-tuned model."""
    found = {name: results.perplexity.get(name) for name in MODELS}
    return {name: value for name, value in found.items() if value is not None}


def headline(results: RunResults) -> list[tuple[str, str, str]]:
    """The most important figures: label, value, and meaning."""
    rows = [("Gap closed", *gap(results))]
    sparsity = results.sparsity
    if sparsity.overall is not None:
        skipped = f"; {len(sparsity.skipped)} left dense" if sparsity.skipped else ""
        rows.append(("Sparsity", share(sparsity.overall), f"of {len(sparsity.tensors)} matrices{skipped}"))
    if seconds := results.seconds:
        rows.append(("Time", duration(sum(seconds.values())), f"{len(seconds)} stages"))
    if peak := results.peak_rss_bytes:
        rows.append(("Peak memory", size(peak), "resident, of the whole process"))
    return rows


def gap(results: RunResults) -> tuple[str, str]:
    """The gap closed as text, or "not defined", and its meaning."""
    value = gap_value(results)
    if value is None:
        return "not defined", _why_no_gap(perplexities(results))
    if value < 0:
        return share(value), "fine-tuning made the model worse"
    return share(value), "of the loss that pruning cost"


def gap_value(results: RunResults) -> float | None:
    """The gap closed; None if it is not defined."""
    value = results.gap_closed
    return value if value is not None and math.isfinite(value) else None


def _why_no_gap(models: Mapping[str, float]) -> str:
    if not {"dense", "pruned", "spp"} <= set(models):
        return "perplexities are missing"
    if not all(map(math.isfinite, models.values())):
        return "perplexities are not finite"
    return "pruning raised the perplexity by less than 1%"
