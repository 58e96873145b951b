"""Nested mappings as rows of label and text, whatever their keys: added or missing keys are no error."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from spp.reporting.units import duration, share, size

_LABELS = {
    "unit": "perplexity is per",
    "per_document": "each document by itself",
    "source": "text",
    "train": "training data",
    "seconds": "time",
    "lm_eval": "lm_eval",
}


def facts(
    values: Mapping[str, Any], *, skip: Collection[str] = (), missing: str = "none", prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Label and text of every value whose key is not in `skip`; labels of nested values start with the outer key."""
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, Mapping):
            yield from facts(value, missing=missing, prefix=f"{prefix}{key}: ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                inner = item if isinstance(item, Mapping) else {"value": item}
                yield from facts(inner, missing=missing, prefix=f"{prefix}{key} {index}: ")
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
