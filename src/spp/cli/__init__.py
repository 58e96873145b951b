"""The command line: the table of commands, their flags, and what they print."""

from spp.cli.entry_point import main

__all__ = ["main"]
