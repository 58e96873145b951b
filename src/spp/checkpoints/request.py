"""Everything that a result depends on, stored with unfinished work, so that only the same request resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spp.checkpoints.json_files import read_object, write_json
from spp.errors import SppError


@dataclass(frozen=True)
class Request:
    """Everything that a result depends on, as JSON values.

    Attributes:
        options: name -> value of each option that the result depends on.
        inputs: description of an input (`training data`) -> a digest of its content.
        circumstances: name -> value of everything else: versions, the number of processes.
    """

    options: Mapping[str, Any]
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    circumstances: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Request | None:
        """Read a request; None if the file is missing or damaged."""
        try:
            found = read_object(path)
            return cls(*(dict(found[name]) for name in ("options", "inputs", "circumstances")))
        except (SppError, KeyError, TypeError, ValueError):
            return None

    def differences(self, asked: Request) -> list[str]:
        """The differences to another request, one phrase each."""
        values = [
            f"{name.replace('_', '-')} was {before.get(name)} and is {now.get(name)} now"
            for before, now in ((self.options, asked.options), (self.circumstances, asked.circumstances))
            for name in _different(before, now)
        ]
        return [*values, *(f"{name} changed" for name in _different(self.inputs, asked.inputs))]


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
