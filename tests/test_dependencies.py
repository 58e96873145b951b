"""The lower bounds of the required packages are the versions that `make test-oldest` runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
_NEWER_THERE = {"torch"}  # constraints-oldest.txt says why


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    required = [Requirement(text) for text in project["dependencies"]]
    bounds = {one.name: next(part.version for part in one.specifier if part.operator == ">=") for one in required}
    assert bounds.keys() == oldest.keys()
    for requirement in required:
        lowest = bounds[requirement.name]
        assert oldest[requirement.name] in requirement.specifier
        same = oldest[requirement.name].startswith(lowest)
        assert same or requirement.name in _NEWER_THERE, f"{requirement.name} {lowest} was never run"
