"""What a result is made from, written beside unfinished work, so that only the same request goes on with it."""

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
        options: name -> value, of the options that the result depends on.
        inputs: what it is, in words (`training data`) -> a digest of its content.
        circumstances: name -> value, of what else the result depends on: versions, the number of processes.
    """

    options: Mapping[str, Any]
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    circumstances: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Request | None:
        """Read one; None where none is there, or it is damaged, so that nobody can tell what it was."""
        try:
            found = read_object(path)
            return cls(*(dict(found[name]) for name in ("options", "inputs", "circumstances")))
        except (SppError, KeyError, TypeError, ValueError):
            return None

    def differences(self, asked: Request) -> list[str]:
        """In what another request differs from this one, in words."""
        values = [
            f"{name.replace('_', '-')} was {before.get(name)} and is {now.get(name)} now"
            for before, now in ((self.options, asked.options), (self.circumstances, asked.circumstances))
            for name in _different(before, now)
        ]
        return [*values, *(f"{name} changed" for name in _different(self.inputs, asked.inputs))]


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
