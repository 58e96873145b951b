"""The start of the command `spp`, of which nothing but this is imported before Ctrl-C is dealt with."""

from __future__ import annotations

from collections.abc import Sequence

from spp.cli.interrupts import ends_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 for success, 1 for failure, 2 for a wrong request, 130 for Ctrl-C."""
    with ends_at_once():
        from spp.cli.entry_point import main as run  # after the handler, because it takes a moment
    return run(argv)
