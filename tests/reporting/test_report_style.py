"""Contrast of the page's colours by WCAG 2.2: 4.5 for text, 3 for lines and marks, in light and in dark."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

_CSS = (files("spp.reporting") / "templates" / "report.css").read_text(encoding="utf-8")
_TEXT = [
    *((ink, ground) for ink in ("ink", "soft", "accent") for ground in ("paper", "card")),
    *(("ink", f"{state}-ground") for state in ("good", "bad", "unknown", "warning")),
    *((state, f"{state}-ground") for state in ("good", "bad", "warning")),
    ("soft", "unknown-ground"), ("soft", "warning-ground"), ("ink", "track"), ("ink", "heat"), ("soft", "track"),
]  # fmt: skip
_MARKS = ["accent", "dense", "pruned", "good", "look-1", "look-2", "look-3", "look-4", "look-5"]


def themes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\n\s*\}", _CSS, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks[:2])
    assert set(light) == set(dark)
    return {"light": light, "dark": dark}


def contrast(one: str, other: str) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of the lighter and the darker relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_gives_known_values():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the grey that just fails


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast(theme):
    colours = themes()[theme]
    weak = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in _TEXT}
    assert {pair: round(ratio, 2) for pair, ratio in weak.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_have_enough_contrast(theme):
    colours = themes()[theme]
    weak = {mark: contrast(colours[mark], colours["paper"]) for mark in _MARKS}
    assert {mark: round(ratio, 2) for mark, ratio in weak.items() if ratio < 3} == {}


def test_reduced_motion_is_respected():
    assert "scroll-behavior: smooth" in _CSS and "prefers-reduced-motion: reduce" in _CSS
    assert not re.search(r"\b(animation|transition)\b", _CSS)
